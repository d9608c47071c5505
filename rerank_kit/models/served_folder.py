"""The folder that vLLM gets: the checkpoint's own, or links to it beside a config.json without code from the hub."""

import hashlib
import json
import tempfile
from pathlib import Path

from rerank_kit.models.checkpoint import SOURCE, Checkpoint
from rerank_kit.models.joined_head import NAME, write_joined
from rerank_kit.models.json_files import read_json
from rerank_kit.models.profiles import Profile
from rerank_kit.settings import ConfigError


def adapted_folder(checkpoint: Checkpoint, profile: Profile, root: Path) -> Path:
    """The folder that vLLM gets for this checkpoint: its own, or one below `root` that make_adapted() makes.

    vLLM chooses the configuration class by config.json, and in some checkpoints that file names code from the hub.
    """
    if not profile.config_changes:
        return checkpoint.path
    files = _adapted_files(checkpoint, profile).values()
    parts = [str(checkpoint.path), *files, *map(str, _linked(checkpoint, profile))]
    if profile.joined_head:  # the weights are a copy: another one for files that have changed
        parts += [f"{f.name} {f.stat().st_mtime_ns}" for f in sorted(checkpoint.path.rglob("*.safetensors"))]
    return root / f"model-{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:12]}"


def make_adapted(checkpoint: Checkpoint, profile: Profile, folder: Path) -> None:
    """Make adapted_folder(): links to the checkpoint's weights and tokenizer, beside a config.json of our own.

    Raises:
        ConfigError: the checkpoint brings tokenizer code of its own, or the folder cannot be written.
    """
    if folder == checkpoint.path or folder.is_dir():
        return
    if (read_json(checkpoint.path / "tokenizer_config.json") or {}).get("auto_map"):
        raise ConfigError(f"{checkpoint.path} brings a tokenizer with code of its own, which the kit does not run")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, ignore_cleanup_errors=True) as scratch:
            part = Path(scratch, folder.name)
            part.mkdir()
            for file in _linked(checkpoint, profile):
                (part / file.name).symlink_to(file.absolute())
            if profile.joined_head:
                write_joined(checkpoint, part / NAME)
            for name, text in _adapted_files(checkpoint, profile).items():
                (part / name).write_text(text, "utf-8")
            (part / SOURCE).symlink_to(checkpoint.path.absolute())
            part.rename(folder)
            for old in _older_copies(checkpoint, profile, folder):
                old.rename(Path(scratch, old.name))  # at once, and deleted with the scratch folder
    except OSError as exc:
        if not folder.is_dir():  # if it is there now, another process made it
            raise ConfigError(f"{folder} cannot be made: {exc.strerror}; is LOG_DIR writable?") from exc


def _older_copies(checkpoint: Checkpoint, profile: Profile, folder: Path) -> list[Path]:
    """Folders beside this one with another joined copy of the same checkpoint: its weights have changed since."""
    if not profile.joined_head:
        return []
    source = checkpoint.path.absolute()
    others = [f for f in folder.parent.glob("model-*") if f != folder and (f / SOURCE).is_symlink()]
    return [f for f in others if (f / SOURCE).readlink() == source and not (f / NAME).is_symlink()]


def _linked(checkpoint: Checkpoint, profile: Profile) -> list[Path]:
    """What an adapted folder links to: weights, tokenizer and the modules' folders, without which vLLM pools by its own
    default. No code."""
    kinds = (".json", ".safetensors", ".bin", ".model", ".txt")
    if profile.joined_head:
        files = [f for f in checkpoint.path.iterdir() if f.suffix in (".json", ".txt", ".model")]
        return sorted(f for f in files if f.name not in ("config.json", "modules.json", f"{NAME}.index.json"))
    files = [f for f in checkpoint.path.iterdir() if f.suffix in kinds and f.name != "config.json"]
    inside = {Path(m.get("path", "")).parts[:1] for m in read_json(checkpoint.path / "modules.json") or []}
    return sorted([*files, *(checkpoint.path.joinpath(*parts) for parts in inside if parts)])


def _adapted_files(checkpoint: Checkpoint, profile: Profile) -> dict[str, str]:
    """{name: text} of the files that an adapted folder has of its own."""
    config = {**checkpoint.config, **profile.config_changes}
    files = {"config.json": json.dumps({k: v for k, v in config.items() if v is not None}, indent=1)}
    if profile.config_file:
        files[profile.config_file] = Path(__file__).with_name(profile.config_file).read_text("utf-8")
    return files

"""What the files of a checkpoint say about it."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from rerank_kit.settings import ConfigError

SOURCE = "source"  # in an adapted folder: the link to its checkpoint


@dataclass(frozen=True)
class Checkpoint:
    """What the files of a checkpoint say about it."""

    path: Path
    config: dict
    modules: tuple[str, ...]
    logit_tokens: tuple[int | None, int | None] | None
    # Modes that the Pooling module concatenates: "mean", "cls", "lasttoken"; None without such a module.
    pooling: tuple[str, ...] | None = None

    @property
    def name(self) -> str:
        """The folder's name; in the Hugging Face cache (models--org--name/snapshots/<hash>) the name of the model."""
        folder = self.path.absolute()
        return folder.parent.parent.name if folder.parent.name == "snapshots" else folder.name

    @property
    def architectures(self) -> list[str]:
        return self.config.get("architectures") or []

    @property
    def num_labels(self) -> int:
        # The default of transformers' PretrainedConfig is two labels.
        return len(self.config.get("id2label") or range(self.config.get("num_labels") or 2))

    @property
    def max_length(self) -> int:
        """Tokens of the longest prompt that the model takes, by config.json and sentence_bert_config.json."""
        own = self.config.get("max_position_embeddings") or 4096
        # RoBERTa numbers its positions from padding_idx + 1.
        if "oberta" in "".join(self.architectures):
            own -= self.config.get("pad_token_id", 1) + 1
        try:
            limit = json.loads((self.path / "sentence_bert_config.json").read_text("utf-8")).get("max_seq_length")
        except (OSError, ValueError):
            limit = None
        return min(own, limit or own)

    @property
    def logit_texts(self) -> tuple[str | None, str | None] | None:
        """logit_tokens as the tokenizer spells them; None without them or without tokenizer.json."""
        if self.logit_tokens is None or not (self.path / "tokenizer.json").is_file():
            return None
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(self.path / "tokenizer.json"))
        first, second = (t if t is None else tokenizer.id_to_token(t) for t in self.logit_tokens)
        return first, second


def read_checkpoint(path: Path) -> Checkpoint:
    """Read config.json and the sentence-transformers files of a checkpoint folder.

    For an adapted folder (served_folder.py) this reads the checkpoint behind it.

    Raises:
        ConfigError: there is no folder or no config.json, or a file is not valid JSON.
    """
    path = Path(path)
    if (path / SOURCE).is_symlink():
        path = (path / SOURCE).readlink()
    if not path.is_dir():
        raise ConfigError(f"MODEL_PATH={str(path)!r} does not exist: give the folder of the checkpoint or a hub id")
    config = _read_json(path / "config.json")
    if config is None:
        raise ConfigError(f"MODEL_PATH={str(path)!r} holds no config.json: is it the folder of a checkpoint?")
    if isinstance(config.get("text_config"), dict):  # models with a vision tower keep the text model's sizes there
        config = {**config["text_config"], **config}
    modules = _read_json(path / "modules.json") or []
    logit = next((m for m in modules if m.get("type", "").endswith("LogitScore")), None)
    tokens = None
    if logit is not None:
        score = _read_json(path / logit.get("path", "") / "config.json") or {}
        tokens = (score.get("true_token_id"), score.get("false_token_id"))
    kinds = tuple(m.get("type", "").rsplit(".", 1)[-1] for m in modules)
    return Checkpoint(path, config, kinds, tokens, _pooling_modes(path, modules))


def content_id(path: Path, n_blocks: int = 64, block_bytes: int = 65536) -> str:
    """12 hex digits computed from the content of a checkpoint, the same on every host.

    File sizes do not tell a fine-tune from its base model. A weight file above 4 MiB is sampled in 64 blocks of 64 KiB;
    every other file is read as a whole.
    """
    digest = hashlib.sha256()
    for file in sorted(path.iterdir()):
        if file.suffix not in (".safetensors", ".bin", ".json", ".txt", ".model", ".jinja") or not file.is_file():
            continue
        size = file.stat().st_size
        digest.update(f"{file.name} {size} ".encode())
        sampled = file.suffix in (".safetensors", ".bin") and size > n_blocks * block_bytes
        with file.open("rb") as content:
            for number in range(n_blocks if sampled else 1):
                content.seek(number * (size - block_bytes) // (n_blocks - 1) if sampled else 0)
                digest.update(content.read(block_bytes if sampled else -1))
    return digest.hexdigest()[:12]


def _pooling_modes(path: Path, modules: list[dict]) -> tuple[str, ...] | None:
    """Modes of the Pooling module: `pooling_mode_*` flags, or one `pooling_mode` since sentence-transformers 5.4."""
    pooling = next((m for m in modules if m.get("type", "").endswith("Pooling")), None)
    if pooling is None:
        return None
    data = _read_json(path / pooling.get("path", "") / "config.json") or {}
    flags = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls", "pooling_mode_lasttoken": "lasttoken"}
    if "pooling_mode" in data:
        named = data["pooling_mode"]
        return (named,) if isinstance(named, str) else tuple(named)
    return tuple(flags.get(k, k) for k, v in data.items() if k.startswith("pooling_mode_") and v is True)


def _read_json(path: Path):
    try:
        return json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as exc:
        raise ConfigError(f"{path} cannot be read as JSON: {exc}") from exc

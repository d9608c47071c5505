"""What a folder is that holds no checkpoint, and what to do with it."""

from pathlib import Path

from rerank_kit.models.json_files import read_object
from rerank_kit.settings import ConfigError

WEIGHTS = (".safetensors", ".bin")


def snapshot_of(folder: Path) -> Path:
    """The snapshot inside a model's folder of the Hugging Face cache (models--org--name); any other folder unchanged.

    Raises:
        ConfigError: that folder holds no snapshot, or several and none of them is refs/main.
    """
    snapshots = folder / "snapshots"
    if not (folder.name.startswith("models--") and snapshots.is_dir()):
        return folder
    found = sorted(item for item in snapshots.iterdir() if item.is_dir())
    main = folder / "refs" / "main"
    named = snapshots / main.read_text("utf-8", "replace").strip() if main.is_file() else None
    if named in found:
        return named
    if len(found) == 1:
        return found[0]
    many = ", ".join(item.name[:12] for item in found)
    raise ConfigError(
        f"MODEL_PATH={str(folder)!r} is a model's folder in the Hugging Face cache with "
        f"{f'{len(found)} snapshots ({many}) and no refs/main' if found else 'no snapshot'}: "
        f"{'give the folder of one' if found else 'download the model again'}"
    )


def what_it_is(path: Path) -> str:
    """One line about a folder without config.json: what it is and what to do."""
    files = {item.name for item in path.iterdir()}
    adapter = path / "adapter_config.json"
    if adapter.name in files:
        base = read_object(adapter).get("base_model_name_or_path")
        return (
            f"is a LoRA adapter for {base or 'a base model'} (adapter_config.json), not a whole model: merge it "
            "(peft: merge_and_unload() and save_pretrained(); ms-swift: swift export --merge_lora true), save the "
            "tokenizer beside it, and give that folder"
        )
    if any(name.endswith(".gguf") for name in files):
        return (
            "holds a GGUF file, which llama.cpp reads and this kit does not: take the original safetensors checkpoint"
        )
    if "onnx" in files or any(name.endswith((".onnx", ".onnx_data")) for name in files):
        return "holds an ONNX export, which vLLM does not read: take the original safetensors checkpoint"
    if any(name.endswith((".incomplete", ".part", ".aria2", ".crdownload")) for name in files):
        return "holds an interrupted download and no config.json: download the model again"
    inner = sorted(item.name for item in path.iterdir() if item.is_dir() and (item / "config.json").is_file())
    module = path / "modules.json"
    if module.is_file() and inner:
        return (
            f"keeps its Transformer module in {inner[0]}/, as sentence-transformers did before release 1: vLLM cannot "
            "read that; load it in sentence-transformers and save it again"
        )
    if inner:
        return f"holds no config.json, but {', '.join(inner[:4])} does: give that folder"
    if not files:
        return "is empty, so it holds no config.json: download the model again"
    if any(name.endswith(WEIGHTS) for name in files):
        return "holds weights and no config.json: the download is incomplete; fetch config.json and the tokenizer too"
    return "holds no config.json: is it the folder of a checkpoint?"

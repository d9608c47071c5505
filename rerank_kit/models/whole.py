"""Whether a checkpoint's weights and tokenizer are whole. vLLM finds out minutes later, in a traceback.

This looks at names, sizes and the heads of files only.
"""

import json
import math
import re
import zipfile
from importlib.util import find_spec
from pathlib import Path

from rerank_kit.models.checkpoint import Checkpoint, load_tokenizer
from rerank_kit.models.folders import WEIGHTS, what_it_is
from rerank_kit.models.json_files import read_json, read_object, shown, typed
from rerank_kit.settings import ConfigError

# Bytes of one value in a safetensors file.
BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}
MOST_HEADER = 100_000_000  # the limit of safetensors itself
# Files that tokenizers are loaded from; any one of them is enough.
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.txt", "sentencepiece.bpe.model", "spiece.model", "vocab.json")
# Names of the token embedding: vLLM wants exactly config.json's size for it.
EMBEDDING = re.compile(r"(^|\.)(embed_tokens|word_embeddings|tok_embeddings)\.weight$")
# Methods that the installed vLLM may not have; what else a config.json names is left to it.
QUANTIZED = ("aqlm", "bitsandbytes", "eetq", "exl2", "exl3", "higgs", "hqq", "quanto", "spqr", "vptq")


def check_whole(checkpoint: Checkpoint) -> None:
    """Raise ConfigError if weights or tokenizer are missing, cut off, or are not what their names say."""
    path = checkpoint.path
    if (path / "adapter_config.json").is_file() and not weight_files(path):
        raise ConfigError(f"MODEL_PATH={str(path)!r} {what_it_is(path)}")
    _check_quantization(checkpoint)
    files = weight_files(path)
    if not files:
        raise ConfigError(f"MODEL_PATH={str(path)!r} {_no_weights(path)}")
    shapes: dict[str, list[int]] = {}
    for file in files:
        if file.suffix == ".bin":
            _check_pickle(file)
        else:
            shapes |= {name: item["shape"] for name, item in safetensors_header(file).items()}
    if "quantization_config" not in checkpoint.config:
        _check_sizes(checkpoint, shapes)
    _check_tokenizer(path)


def weight_files(path: Path) -> list[Path]:
    """The weight files that vLLM loads: those of the index, else *.safetensors, else *.bin."""
    for suffix in WEIGHTS:
        index = path / ("model.safetensors.index.json" if suffix == ".safetensors" else "pytorch_model.bin.index.json")
        if index.is_file() or index.is_symlink():
            named = typed(read_object(index).get("weight_map"), dict, index, "weight_map")
            files = sorted({path / typed(name, str, index, "weight_map") for name in named.values()})
            missing = [file.name for file in files if not file.is_file()]
            if missing:
                raise ConfigError(
                    f"{index} names {len(files)} weight files, and {len(missing)} are missing "
                    f"({', '.join(missing[:3])}): the download is incomplete; download the model again"
                )
            if files:
                return files
        files = sorted(file for file in path.glob(f"*{suffix}") if not file.is_dir())
        other = ("adapter", "training_args", "optimizer", "scheduler", "rng_state", "consolidated")
        files = [file for file in files if not file.name.startswith(other)]
        for file in files:
            if not file.exists():
                read_json(file)  # says where the link leads
        if files:
            return files
    return []


def _no_weights(path: Path) -> str:
    names = {item.name for item in path.iterdir()}
    if (
        (path / "adapter_config.json").is_file()
        or "onnx" in names
        or any(name.endswith((".gguf", ".onnx", ".incomplete")) for name in names)
    ):
        return what_it_is(path)
    return (
        "holds config.json and no weights (*.safetensors): the download is incomplete, or they were saved in another "
        "format; download the model again"
    )


def safetensors_header(file: Path) -> dict[str, dict]:
    """{tensor: {"dtype", "shape", "data_offsets"}} of a safetensors file, and a check that the file is whole."""
    size = file.stat().st_size
    with file.open("rb") as content:
        head = content.read(8)
        length = int.from_bytes(head, "little")
        text = content.read(length) if len(head) == 8 and 2 <= length <= min(size - 8, MOST_HEADER) else b""
    broken = f"{file} is no safetensors file"
    if not text:
        start = head.lower()
        kind = "a pointer of Git LFS" if start.startswith(b"version") else "a web page" if start[:1] == b"<" else ""
        kind = kind or ("empty" if not size else "a zip or pickle" if start[:2] in (b"PK", b"\x80\x02") else "damaged")
        raise ConfigError(f"{broken}, it is {kind} ({size} bytes): download it again")
    try:
        header = json.loads(text)
        header = {name: item for name, item in header.items() if name != "__metadata__"}
        end = 0
        for item in header.values():
            first, last = item["data_offsets"]
            n_bytes = math.prod(item["shape"]) * BYTES.get(item["dtype"], 1)
            if not 0 <= first <= last or (item["dtype"] in BYTES and last - first != n_bytes):
                raise ValueError("a tensor's size and place do not agree")
            end = max(end, last)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as exc:
        raise ConfigError(f"{broken}: its head is damaged ({type(exc).__name__}); download it again") from exc
    if size < 8 + length + end:
        raise ConfigError(f"{file} is cut off: {size} bytes of {8 + length + end}; download it again")
    return header


def _check_pickle(file: Path) -> None:
    """A file of torch.save: a zip archive, or the pickle of releases before 1.6."""
    with file.open("rb") as content:
        head = content.read(4)
    if head[:2] == b"PK":
        try:
            with zipfile.ZipFile(file):
                return
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as exc:
            raise ConfigError(f"{file} is cut off or damaged ({exc}): download it again") from exc
    if head[:1] != b"\x80":
        raise ConfigError(f"{file} is no file of torch.save ({file.stat().st_size} bytes): download it again")


def _check_sizes(checkpoint: Checkpoint, shapes: dict[str, list[int]]) -> None:
    """The token embedding has the size that config.json says; vLLM refuses it otherwise, with a traceback."""
    # ELECTRA's embeddings may be smaller than its states.
    key = "embedding_size" if checkpoint.config.get("embedding_size") else "hidden_size"
    wanted = (checkpoint.config.get("vocab_size"), checkpoint.config.get(key))
    if None in wanted:
        return
    for name, shape in shapes.items():
        if EMBEDDING.search(name) and "visual" not in name and tuple(shape) != wanted:
            raise ConfigError(
                f"{checkpoint.path}: config.json says vocab_size={wanted[0]} and {key}={wanted[1]}, and the "
                f"weights have {' x '.join(map(str, shape))} ({name}): they are of different models, "
                "or the vocabulary was resized and config.json was not saved again"
            )


def _check_tokenizer(path: Path) -> None:
    found = [name for name in TOKENIZERS if (path / name).is_file()]
    if not found:
        raise ConfigError(
            f"MODEL_PATH={str(path)!r} has no tokenizer (tokenizer.json, tokenizer.model or vocab.txt): a merge or a "
            "Trainer saved the model alone; copy tokenizer.json and tokenizer_config.json of the base model into it"
        )
    if "tokenizer.json" in found and find_spec("tokenizers"):
        load_tokenizer(path)
    kind = read_object(path / "tokenizer_config.json").get("tokenizer_class")
    if kind is not None:
        typed(kind, str, path / "tokenizer_config.json", "tokenizer_class")


def _check_quantization(checkpoint: Checkpoint) -> None:
    stated = checkpoint.config.get("quantization_config")
    if stated is None:
        return
    file = checkpoint.path / "config.json"
    method = typed(stated.get("quant_method", ""), str, file, "quantization_config.quant_method")
    if method in QUANTIZED and f'"{method}"' not in _vllm_methods():
        raise ConfigError(
            f"{file} has quantization_config.quant_method={shown(method)}, which the installed vLLM does not serve: "
            "take the checkpoint that is not quantised, or one in AWQ, GPTQ or compressed-tensors"
        )


def _vllm_methods() -> str:
    """The source text in which vLLM lists its methods; importing it would take seconds."""
    found = find_spec("vllm")
    for folder in (found.submodule_search_locations or []) if found else []:
        file = Path(folder, "model_executor", "layers", "quantization", "__init__.py")
        if file.is_file():
            return file.read_text("utf-8")
    return ""

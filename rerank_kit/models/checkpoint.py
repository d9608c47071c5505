"""What the files of a checkpoint say about it."""

import re
import sys
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from rerank_kit.models.folders import what_it_is
from rerank_kit.models.json_files import read_json, read_object, shown, typed
from rerank_kit.settings import ConfigError

SOURCE = "source"  # in an adapted folder: the link to its checkpoint

# Old releases of sentence-transformers named the file after the model.
TRANSFORMER_FILES = tuple(
    f"sentence_{kind}config.json"
    for kind in ("bert_", "roberta_", "distilbert_", "camembert_", "albert_", "xlm-roberta_", "xlnet_")
)
# Keys of config.json that the kit reads, and their types. null is allowed everywhere: it is the key's default.
KEYS: dict[str, tuple[type, int | None]] = {
    "architectures": (list, None),
    "id2label": (dict, None),
    "auto_map": (dict, None),
    "text_config": (dict, None),
    "sentence_transformers": (dict, None),
    "sbert_ce_default_activation_function": (str, None),
    "quantization_config": (dict, None),
    "model_type": (str, None),
    "pad_token_id": (int, None),
} | dict.fromkeys(
    (
        *(
            "num_labels",
            "max_position_embeddings",
            "max_trained_positions",
            "hidden_size",
            "embedding_size",
            "num_hidden_layers",
        ),
        "num_attention_heads",
        *("num_key_value_heads", "head_dim", "intermediate_size", "vocab_size"),
    ),
    (int, 1),
)


@dataclass(frozen=True)
class Said:
    """A value and the file (with its key) that says it."""

    value: Any
    source: str


@dataclass(frozen=True)
class Checkpoint:
    """What the files of a checkpoint say about it."""

    path: Path
    config: dict
    modules: tuple[str, ...]
    logit_tokens: tuple[int | None, int | None] | None
    # Modes that the Pooling module concatenates: "mean", "cls", "lasttoken"; None without such a module.
    pooling: tuple[str, ...] | None = None
    # Tokens at which sentence-transformers and transformers cut, by the tokenizer's and sentence-transformers' files.
    limit: Said | None = None
    # Name of the activation that sentence-transformers applies to the head's logit.
    activation: Said | None = None
    # The text that sentence-transformers puts before every query, or gives a chat template as the system message.
    default_prompt: Said | None = None
    # The checkpoint's chat template, where sentence-transformers would use it: see chat_template.py.
    chat_template: Said | None = None
    # How its messages hold their text: "flat", "structured", or "auto", for sentence-transformers to find out.
    message_format: str = "auto"
    # Written by sentence-transformers itself, with all its files.
    has_modules: bool = field(default=False)
    # The model that this one was trained from.
    base_model: Said | None = None
    # How sentence-transformers compares two embeddings of this model, where its files say so.
    similarity: Said | None = None
    # PyLate's settings of a late interaction model (config_sentence_transformers.json): see colbert.py.
    pylate: dict | None = None
    # Settings of the user that replace what the files say: TEMPLATE, SCORE_TOKENS (given.py).
    given: tuple[str, ...] = ()

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
    def positions(self) -> int:
        """Tokens of the longest prompt that the weights take, by config.json."""
        own = self.config.get("max_position_embeddings") or 4096
        if "NomicBertModel" in self.architectures:  # behind them its rotary positions are stretched
            own = self.config.get("max_trained_positions") or min(own, 2048)
        # RoBERTa (CamemBERT too) numbers its positions from padding_idx + 1.
        if re.search("oberta|Camembert", "".join(self.architectures)):
            padding = self.config.get("pad_token_id")
            own -= (1 if padding is None else padding) + 1
        return own

    @property
    def max_length(self) -> int:
        """Tokens at which the model's own library cuts: the weights' limit, or a smaller one that its files name."""
        return min(self.positions, self.limit.value) if self.limit else self.positions

    @property
    def logit_texts(self) -> tuple[str | None, str | None] | None:
        """logit_tokens as the tokenizer spells them; None without them or without tokenizer.json."""
        if self.logit_tokens is None or not (self.path / "tokenizer.json").is_file():
            return None
        tokenizer = load_tokenizer(self.path)
        # An id beyond 32 bits is no token either.
        first, second = (None if t is None else tokenizer.id_to_token(min(t, 2**32 - 1)) for t in self.logit_tokens)
        return first, second


class MissingPackage(ConfigError, ImportError):
    """This Python lacks a package."""


def load_tokenizer(path: Path):
    """The `tokenizers.Tokenizer` in a folder's tokenizer.json, which neither cuts nor pads.

    Raises:
        ConfigError: the file is missing or damaged, or this Python has no tokenizers.
    """
    file = path / "tokenizer.json"
    try:
        found = file.stat()
        return _loaded(file, found.st_mtime_ns, found.st_size)
    except ImportError as exc:  # says of this Python, not of the file
        raise MissingPackage(
            f"{sys.executable} cannot read {file}: {exc}; use the Python that serves (sh start_rerank.sh python)"
        ) from exc
    except Exception as exc:  # tokenizers raises plain Exception
        read_json(file)  # says more of a file that is no JSON
        line = str(exc).splitlines()[0][:160] if str(exc) else type(exc).__name__
        raise ConfigError(f"{file} is no tokenizer that this Python can load ({line}): take the original file") from exc


@lru_cache(4)
def _loaded(file: Path, mtime_ns: int, size: int):
    """One that large models have takes half a second to load, and several questions are asked about it."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def read_checkpoint(path: Path) -> Checkpoint:
    """Read config.json, the tokenizer's settings and the sentence-transformers files of a checkpoint folder.

    For an adapted folder (served_folder.py) this reads the checkpoint behind it.

    Raises:
        ConfigError: there is no folder or no config.json, or a file is damaged.
    """
    path = Path(path)
    if (path / SOURCE).is_symlink():
        path = (path / SOURCE).readlink()
    if not path.is_dir():
        raise ConfigError(f"MODEL_PATH={str(path)!r} does not exist: give the folder of the checkpoint or a hub id")
    config = read_json(path / "config.json")
    if config is None:
        raise ConfigError(f"MODEL_PATH={str(path)!r} {what_it_is(path)}")
    config = _checked_config(config, path / "config.json")
    modules = _modules(path)
    kinds = tuple(m["type"].rsplit(".", 1)[-1] for m in modules)
    more = read_object(path / "config_sentence_transformers.json") if modules else {}
    transformer = _transformer_config(path, modules)
    template, layout = _chat_template(path, modules, transformer)
    return Checkpoint(
        path,
        config,
        kinds,
        _logit_tokens(path, modules),
        _pooling_modes(path, modules),
        # PyLate saves the length of what it encoded last there.
        limit=None if more.get("model_type") == "ColBERT" else _limit(path, transformer),
        activation=_activation(path, config, more),
        default_prompt=_default_prompt(path, more),
        chat_template=template,
        message_format=layout,
        has_modules=bool(modules),
        base_model=_base_model(path, config),
        similarity=_similarity(path, more),
        pylate=more if more.get("model_type") == "ColBERT" else None,
    )


def _similarity(path: Path, more: dict) -> Said | None:
    name, key = more.get("similarity_fn_name"), "similarity_fn_name"
    if name is None:
        return None
    file = path / "config_sentence_transformers.json"
    return Said(typed(name, str, file, key), f"{file.name}: {key}")


def _base_model(path: Path, config: dict) -> Said | None:
    """Name of the model that this one was trained from, as ms-swift, peft, Trainer and transformers 4 note it."""
    args = path / "args.json"
    places = [(read_object(args).get("model"), f"{args.name}: model")]
    card = path / "README.md"
    if card.is_file():
        with card.open(encoding="utf-8", errors="replace") as text:
            head = text.read(20_000)
        front = head.split("---")[1] if head.startswith("---") else ""
        found = re.search(r"^base_model:[ \t]*(?:\n[ \t]*-[ \t]*)?['\"]?([^\s'\"]+)", front, re.MULTILINE)
        places.append((found[1] if found else None, f"{card.name}: base_model"))
    places.append((config.get("_name_or_path"), "config.json: _name_or_path"))
    return next((Said(name, source) for name, source in places if isinstance(name, str) and name), None)


def _checked_config(config: Any, file: Path) -> dict:
    """config.json with the text model's sizes on top; every key that the kit reads has the type that it must have."""
    config = dict(typed(config, dict, file, ""))
    inner = config.get("text_config")
    if inner is not None:  # models with a vision tower keep the text model's sizes there
        config = {**typed(inner, dict, file, "text_config"), **config}
    for key, (kind, low) in KEYS.items():
        if config.get(key) is not None:
            typed(config[key], kind, file, key, low)
    for name in config.get("architectures") or []:
        typed(name, str, file, "architectures")
    for name in (config.get("auto_map") or {}).values():
        # transformers writes a list for tokenizers: [slow class, fast class].
        if not isinstance(name, (str, list)):
            typed(name, str, file, "auto_map")
    named = (config.get("sentence_transformers") or {}).get("activation_fn")
    if named is not None:
        typed(named, str, file, "sentence_transformers.activation_fn")
    return config


def _modules(path: Path) -> list[dict]:
    """modules.json: the chain of sentence-transformers' modules; [] without the file."""
    file = path / "modules.json"
    data = read_json(file)
    modules = [] if data is None else typed(data, list, file, "")
    for module in modules:
        typed(module, dict, file, "")
        typed(module.get("type"), str, file, "type")
        inside = typed(module.get("path", ""), str, file, "path")
        if Path(inside).is_absolute() or ".." in Path(inside).parts:
            raise ConfigError(f"{file} has path={inside!r}, which leads out of the folder: take the original file")
    return modules


def _of_kind(modules: list[dict], kind: str) -> dict | None:
    return next((m for m in modules if m["type"].rsplit(".", 1)[-1] == kind), None)


def _logit_tokens(path: Path, modules: list[dict]) -> tuple[int | None, int | None] | None:
    """Ids of the tokens whose logits are the score, by the LogitScore module: (relevant, not relevant or None)."""
    module = _of_kind(modules, "LogitScore")
    if module is None:
        return None
    file = path / module.get("path", "") / "config.json"
    score = read_object(file)
    for key in ("true_token_id", "false_token_id"):
        if score.get(key) is not None:
            typed(score[key], int, file, key, 0)
    return score.get("true_token_id"), score.get("false_token_id")


def _pooling_modes(path: Path, modules: list[dict]) -> tuple[str, ...] | None:
    """Modes of the Pooling module: `pooling_mode_*` flags, or one `pooling_mode` since sentence-transformers 5.4."""
    pooling = _of_kind(modules, "Pooling")
    if pooling is None:
        return None
    file = path / pooling.get("path", "") / "config.json"
    data = read_object(file)
    flags = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls", "pooling_mode_lasttoken": "lasttoken"}
    if "pooling_mode" in data:
        named = data["pooling_mode"]
        names = [named] if isinstance(named, str) else typed(named, list, file, "pooling_mode")
        return tuple(typed(name, str, file, "pooling_mode") for name in names)
    return tuple(flags.get(k, k) for k, v in data.items() if k.startswith("pooling_mode_") and v is True)


def _transformer_config(path: Path, modules: list[dict]) -> tuple[dict, str]:
    """(sentence-transformers' settings of its Transformer module, name of their file)."""
    module = _of_kind(modules, "Transformer") or {}
    for name in TRANSFORMER_FILES:
        file = path / module.get("path", "") / name
        data = read_object(file)
        if data:
            for key in ("processor_kwargs", "tokenizer_args", "processing_kwargs", "modality_config"):
                if data.get(key) is not None:
                    typed(data[key], dict, file, key)
            return data, name
    return {}, TRANSFORMER_FILES[0]


def _limit(path: Path, transformer: tuple[dict, str]) -> Said | None:
    """The number of tokens at which the model's own library cuts a text, where its files name one.

    Source: Transformer of sentence-transformers 3 to 6. Its max_seq_length replaces the tokenizer's model_max_length;
    the max_length of its processing_kwargs applies in addition to either.
    """
    data, name = transformer
    found = []
    for key, holder in (
        ("max_seq_length", data),
        ("processor_kwargs.model_max_length", data.get("processor_kwargs") or {}),
        ("tokenizer_args.model_max_length", data.get("tokenizer_args") or {}),
    ):
        value = holder.get(key.rpartition(".")[2])
        if value is not None:
            found.append(Said(_length(value, path / name, key), f"{name}: {key}"))
    if not found:
        file = path / "tokenizer_config.json"
        value = read_object(file).get("model_max_length")
        if value is not None:
            found.append(Said(_length(value, file, "model_max_length"), "tokenizer_config.json: model_max_length"))
    found = found[:1]
    text = (data.get("processing_kwargs") or {}).get("text") or {}
    if isinstance(text, dict) and text.get("max_length") is not None:
        value = _length(text["max_length"], path / name, "processing_kwargs.text.max_length")
        found.append(Said(value, f"{name}: processing_kwargs.text.max_length"))
    return min(found, key=lambda said: said.value, default=None)


def _length(value: Any, file: Path, key: str) -> int:
    """A number of tokens. transformers writes 1e30 for none, some releases as a float."""
    if isinstance(value, float) and value >= 1:
        return int(min(value, 1e30))
    return typed(value, int, file, key, 1)


def _activation(path: Path, config: dict, more: dict) -> Said | None:
    """The activation that sentence-transformers 6 applies: its own file comes before config.json.

    Source: CrossEncoder of sentence-transformers 6.2: a name outside torch is ignored, because it is code of others.
    """
    own = config.get("sentence_transformers") or {}
    places = [
        (more.get("activation_fn"), "config_sentence_transformers.json: activation_fn"),
        (own.get("activation_fn"), "config.json: sentence_transformers.activation_fn"),
    ]
    if "activation_fn" not in own:
        old = config.get("sbert_ce_default_activation_function")
        places.append((old, "config.json: sbert_ce_default_activation_function"))
    for name, source in places:
        if name is not None:
            typed(name, str, path / source.partition(":")[0], source.partition(": ")[2])
            if name.startswith("torch."):
                return Said(name, source)
    return None


def _default_prompt(path: Path, more: dict) -> Said | None:
    name, file = more.get("default_prompt_name"), path / "config_sentence_transformers.json"
    if name is None:
        return None
    typed(name, str, file, "default_prompt_name")
    prompts = typed(more.get("prompts") or {}, dict, file, "prompts")
    if name not in prompts:
        raise ConfigError(
            f"{file} has default_prompt_name={shown(name)}, and its prompts are {shown(sorted(prompts))}: "
            "set it to null, or add that prompt"
        )
    prompt = prompts[name] or ""
    typed(prompt, str, file, f"prompts.{name}")
    return Said(prompt, f"config_sentence_transformers.json: prompts.{name}") if prompt else None


def _chat_template(path: Path, modules: list[dict], transformer: tuple[dict, str]) -> tuple[Said | None, str]:
    """(the chat template that sentence-transformers would use, format of its messages).

    A folder with modules.json uses it if modality_config names "message"; a folder without that file uses it wherever
    the tokenizer has one. Source: Transformer.load_config() and infer_modalities() of sentence-transformers 6.2.
    """
    message = (transformer[0].get("modality_config") or {}).get("message")
    layout = message.get("format", "auto") if isinstance(message, dict) else "auto"
    if modules and message is None:
        return None, layout
    file = path / "chat_template.jinja"
    if file.is_file():
        try:
            return Said(file.read_text("utf-8"), file.name), layout
        except (OSError, ValueError) as exc:
            raise ConfigError(f"{file} cannot be read as text: {exc}") from exc
    text = read_object(path / "tokenizer_config.json").get("chat_template")
    if isinstance(text, list):  # several templates, each with a name
        text = next((t.get("template") for t in text if isinstance(t, dict) and t.get("name") == "default"), None)
    if text is None:
        return None, layout
    typed(text, str, path / "tokenizer_config.json", "chat_template")
    return Said(text, "tokenizer_config.json: chat_template"), layout

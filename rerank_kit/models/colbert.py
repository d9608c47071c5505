"""What PyLate's files say about a late interaction model, and which of these models vLLM computes exactly."""

import string
from pathlib import Path

from rerank_kit.models.checkpoint import Checkpoint, load_tokenizer
from rerank_kit.models.json_files import read_json, read_object, shown, typed
from rerank_kit.models.late import Late
from rerank_kit.settings import ConfigError

FILE = "config_sentence_transformers.json"
IDENTITY = "torch.nn.modules.linear.Identity"
# What PyLate 1.6 takes where its file does not say.
QUERY_LENGTH, DOCUMENT_LENGTH, MARKERS = 32, 180, {"query": "[Q] ", "document": "[D] "}


def late_of(checkpoint: Checkpoint, max_model_len: int | None = None) -> Late:
    """How this checkpoint reads its texts.

    Args:
        max_model_len: MAX_MODEL_LEN, which replaces the length of documents; None = the file's.

    Raises:
        ConfigError: the files are damaged, or vLLM cannot compute the model as they say.
    """
    file, said = checkpoint.path / FILE, checkpoint.pylate
    if said is None:
        raise ConfigError(
            f"{file} does not name markers and lengths (model_type ColBERT, as PyLate writes it), so nothing says how "
            "the model reads a query and a document: unset MODEL_PROFILE"
        )
    _check_dense(checkpoint)
    lengths = {}
    for key, default in (("query_length", QUERY_LENGTH), ("document_length", DOCUMENT_LENGTH)):
        value = said.get(key)
        lengths[key] = min(typed(default if value is None else value, int, file, key, 4), checkpoint.positions)
    query_length, document_length = lengths["query_length"], lengths["document_length"]
    names = read_object(checkpoint.path / "tokenizer_config.json")
    expands = typed(_given(said, "do_query_expansion", True), bool, file, "do_query_expansion")
    attends = typed(_given(said, "attend_to_expansion_tokens", False), bool, file, "attend_to_expansion_tokens")
    if expands and not attends:
        raise ConfigError(
            f"{file} has attend_to_expansion_tokens=false, so the [MASK] tokens that fill a query up to {query_length} "
            "tokens see the query and nothing sees them. vLLM's attention has no such mask: with every token seen, a "
            "pair of the tests has 5.59 in place of PyLate's 0.96. Use a model without expansion "
            "(do_query_expansion=false: LateOn, ColBERT-Zero), PyLate itself, or a cross-encoder"
        )
    if max_model_len is not None:
        if max_model_len > checkpoint.positions:
            raise ConfigError(
                f"MAX_MODEL_LEN={max_model_len} is more than the {checkpoint.positions} tokens that this model takes "
                "(config.json: max_position_embeddings)"
            )
        query_length, document_length = min(query_length, max_model_len), max_model_len
        if expands and query_length < lengths["query_length"]:
            raise ConfigError(
                f"MAX_MODEL_LEN={max_model_len} is less than the {lengths['query_length']} tokens to which every query "
                f"is filled ({FILE}: query_length): raise it, or unset it"
            )
    ids = _Ids(checkpoint.path, names)
    marks = {side: _marker(said, side, ids, file) for side in MARKERS}
    words = said.get("skiplist_words")
    words = list(string.punctuation) if words is None else typed(words, list, file, "skiplist_words")
    prompts = typed(said.get("prompts") or {}, dict, file, "prompts")
    texts = {s: typed(prompts.get(s) or "", str, file, f"prompts.{s}") for s in MARKERS}
    return Late(
        query_length=query_length,
        document_length=document_length,
        query_marker=marks["query"],
        document_marker=marks["document"],
        expansion=ids.named("mask_token", "fill a query (do_query_expansion)") if expands else None,
        skip=tuple(sorted({ids.of(typed(word, str, file, "skiplist_words")) for word in words})),
        query_prompt=texts["query"],
        document_prompt=texts["document"],
    )


def _given(said: dict, key: str, default: bool) -> object:
    return default if said.get(key) is None else said[key]


def _marker(said: dict, side: str, ids: "_Ids", file: Path) -> int | None:
    """Id of the token behind the first one; None where the file has the empty text."""
    key = f"{side}_prefix"
    token = typed(MARKERS[side] if said.get(key) is None else said[key], str, file, key)
    if not token:
        return None
    number = ids.tokenizer.token_to_id(token)
    if number is None:
        raise ConfigError(
            f"{file} has {key}={shown(token)}, and {ids.path}/tokenizer.json has no such token: take the tokenizer "
            "that belongs to the model"
        )
    return number


class _Ids:
    """Tokens to ids, as transformers does it: the id of the unknown token for a word that is none."""

    def __init__(self, path: Path, names: dict):
        self.path, self.names, self.tokenizer = path, names, load_tokenizer(path)
        around = self.tokenizer.encode("").ids
        if len(around) != 2:
            raise ConfigError(
                f"{path}/tokenizer.json puts {len(around)} tokens around a text, and a ColBERT model has two of them, "
                "[CLS] and [SEP]: take the tokenizer that belongs to the model"
            )

    def of(self, word: str) -> int:
        number = self.tokenizer.token_to_id(word)
        return self.named("unk_token", f"stand for {word!r} (skiplist_words)") if number is None else number

    def named(self, key: str, purpose: str) -> int:
        token = self.names.get(key)
        token = token.get("content") if isinstance(token, dict) else token
        number = self.tokenizer.token_to_id(token) if isinstance(token, str) else None
        if number is None:
            raise ConfigError(f"{self.path}/tokenizer_config.json names no {key}, which has to {purpose}")
        return number


def _check_dense(checkpoint: Checkpoint) -> None:
    """vLLM loads linear layers, and leaves out what it cannot load without a word."""
    if checkpoint.modules[:2] != ("Transformer", "Dense") or set(checkpoint.modules[1:]) != {"Dense"}:
        raise ConfigError(
            f"{checkpoint.path}: its modules are {list(checkpoint.modules)}, and a ColBERT model of PyLate has a "
            "Transformer and Dense layers"
        )
    for module in (read_json(checkpoint.path / "modules.json") or [])[1:]:
        folder = checkpoint.path / module.get("path", "")
        layer = read_object(folder / "config.json")
        if not (folder / "model.safetensors").is_file():
            raise ConfigError(f"{folder}/model.safetensors is missing: the download is incomplete")
        for key, wanted in (("activation_function", IDENTITY), ("use_residual", False)):
            if layer.get(key, wanted) != wanted:
                raise ConfigError(
                    f"{folder}/config.json has {key}={shown(layer[key])}, which vLLM does not compute for the vectors "
                    "of tokens: use PyLate for this model, or a cross-encoder"
                )

"""What a scoring call asks for: its fields read by the table in fields.py, in the one shape that vLLM is asked in.

understand() changes the body in place: other APIs' names and shapes become vLLM's, and what the guard itself does is
taken out and kept in Asked. What would be ignored, or would change the score, is refused (docs/guard.md).
"""

from dataclasses import dataclass, field
from typing import Any

from rerank_kit.guard.answers import Refusal
from rerank_kit.guard.body import MEDIA_FIELDS
from rerank_kit.guard.fields import FIELDS
from rerank_kit.guard.images import CallImages, Images
from rerank_kit.guard.long_bodies import top_n_of
from rerank_kit.models.images import is_data_url

RERANK_PATHS = ("/rerank", "/v1/rerank", "/v2/rerank")
SCORE_PATHS = ("/score", "/v1/score")
NVIDIA_PATHS = ("/ranking", "/v1/ranking")
QUERY_NAMES = ("query", "queries", "text_1", "data_1")
DOCUMENT_NAMES = ("documents", "items", "texts", "passages", "text_2", "data_2")


@dataclass
class Asked:
    """What one call wants besides what vLLM itself reads."""

    dialect: str = ""  # whose answer it gets: "tei", "voyage", "nvidia"; "" = vLLM's, Cohere's and Jina's
    inner_path: str = ""  # vLLM's route
    texts: bool = True  # the answer has the documents' texts
    originals: list | None = None  # the documents as they were sent, where rank_fields made the texts
    fits: bool = False  # a pair that is too long may not fail the call
    min_score: float | None = None
    timeout_ms: float | None = None  # how long the caller waits
    max_windows: int = 0  # of a document; 0 = any number
    overlap: int | None = None  # tokens that neighbouring windows share; None = the kit's own number
    groups: list[int] = field(default_factory=list)  # documents of each of several queries
    top_n: int = 0  # where the guard itself keeps the best; 0 = all
    ignored: list[str] = field(default_factory=list)  # fields that neither the guard nor vLLM knows
    images: CallImages = field(default_factory=CallImages)
    as_rerank: bool = False  # vLLM's /score is asked, and the answer is that of /rerank: it repeats no image

    @property
    def plain(self) -> bool:
        """vLLM's answer is the right one but for what all answers get."""
        changed = self.dialect or self.groups or self.originals or self.as_rerank
        return not changed and self.texts and self.min_score is None


def understand(
    asked: Asked, path: str, payload: dict, max_docs: int = 0, max_bytes: int = 0, images: Images | None = None
) -> None:
    """Read a body's fields, and put it into vLLM's shape in place.

    Args:
        asked: filled in; its dialect first, since a refusal is told in that.
        max_docs, max_bytes: pairs that several queries may make, and bytes of their texts; 0 = any number.
        images: what the service does with images; None = it scores texts only.

    Raises:
        Refusal: 400 for shapes that cannot be read, 413 for too many pairs, 422 for fields that would be ignored or
            change the score.
    """
    asked.dialect = _dialect(path, payload)
    asked.inner_path = "/rerank" if asked.dialect else path
    for name in [name for name, value in payload.items() if value is None]:
        del payload[name]  # vLLM takes null for some fields only; langchain-cohere sends max_tokens_per_doc: null
    route = "score" if path in SCORE_PATHS else "rerank"
    asked.ignored = _check_fields(path, route, payload)
    _one_naming(payload)
    _rename(payload)
    asked.texts = payload.pop("return_documents", not asked.dialect)
    asked.min_score = payload.pop("min_score", None)
    asked.timeout_ms = payload.pop("timeout_ms", None)
    raw = "raw_scores" in payload
    if raw and payload.pop("raw_scores"):
        _put(payload, "use_activation", False, "raw_scores")
    elif not raw and asked.dialect == "nvidia":
        payload.setdefault("use_activation", False)  # NIM answers with logits
    _lengths(payload, asked)
    if route == "score" and "query" in payload:
        payload["queries"] = payload.pop("query")
    for name in ("texts", "passages"):
        if name in payload:
            payload["documents"] = payload.pop(name)
    if asked.min_score is not None and (top_n := top_n_of(payload)) is not None:
        asked.top_n = top_n
        payload.pop("top_n", None)
    if route == "rerank" and "queries" in payload:
        _many_queries(payload, asked, max_docs, max_bytes)
    for name in (*QUERY_NAMES, *DOCUMENT_NAMES):
        if name in payload:
            _as_texts(payload, name, asked, images or Images(0, 0, 0))
    if "rank_fields" in payload:
        raise _refused("rank_fields", "it needs documents that are objects")
    if asked.images and route == "rerank":
        _by_score(payload, asked)


def _dialect(path: str, payload: dict) -> str:
    """By path, or by the fields that only this API has; a null counts, since voyageai always sends top_k."""
    if path in NVIDIA_PATHS:
        return "nvidia"
    if path in RERANK_PATHS:
        if "texts" in payload:
            return "tei"
        if "top_n" not in payload and ("top_k" in payload or "truncation" in payload):
            return "voyage"
    return ""


def _check_fields(path: str, route: str, payload: dict) -> list[str]:
    """Refuse values that may not pass, drop those that change nothing; the fields that are unknown."""
    unknown = []
    for name in [*payload]:
        known = FIELDS.get(name)
        if known is None:
            unknown.append(name)
            continue
        value = payload[name]
        if route not in known.routes or (name == "passages" and path not in NVIDIA_PATHS):
            if known.does == "text":
                raise _refused(name, f"{path} does not read it: {_shape(path)}", 400)
            raise _refused(name, f"{path} would ignore it: leave it out")
        if known.does == "only":
            if not any(value is one or (type(value) is type(one) and value == one) for one in known.harmless):
                reason = "truncate" if name == "truncate_prompt_tokens" else "field"
                raise _refused(name, known.about.replace("`", ""), reason=reason)
            del payload[name]
        elif name in _KINDS and not _KINDS[name][1](value):
            raise _refused(name, f"it takes {_KINDS[name][0]}")
    return unknown


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _is_number(value: Any) -> bool:
    """A number that a float can hold; JSON's integers have up to 4300 digits."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -1e300 < value < 1e300


def _is_count(value: Any) -> bool:
    return _is_number(value) and value >= 1 and value == int(value)


# What a field takes, where the guard reads it or vLLM would read something else.
_KINDS = {
    **dict.fromkeys(("return_documents", "return_text", "raw_scores", "truncation"), ("true or false", _is_bool)),
    "use_activation": ("true or false", _is_bool),
    "truncate": ("true, false, END or NONE", lambda value: _is_bool(value) or value in ("END", "NONE")),
    "min_score": ("a number", _is_number),
    "timeout_ms": ("a number of milliseconds above 0", lambda value: _is_number(value) and value > 0),
    "max_chunks_per_doc": ("a whole number of 1 or more", _is_count),
    "overlap_tokens": (
        "a whole number of 0 or more",
        lambda value: _is_number(value) and value >= 0 and value == int(value),
    ),
    "instruct": ("a text", lambda value: isinstance(value, str)),
    "instruction": ("a text", lambda value: isinstance(value, str)),
    "rank_fields": (
        "a list of keys of the documents",
        lambda value: isinstance(value, list) and value and all(isinstance(key, str) for key in value),
    ),
}


def _one_naming(payload: dict) -> None:
    """Of two namings in one body, vLLM would score one and drop the other."""
    for names, what in ((QUERY_NAMES, "queries"), (DOCUMENT_NAMES, "documents")):
        given = [name for name in names if name in payload]
        if len(given) > 1:
            text = f"{given[0]} and {given[1]} are two names for the {what} of a call: send one of them"
            raise Refusal(400, "field", text, param=given[1])


def _rename(payload: dict) -> None:
    for name in [name for name in payload if name in FIELDS and FIELDS[name].alias]:
        _put(payload, FIELDS[name].alias, payload.pop(name), name)
    more = payload.get("chat_template_kwargs")
    inner = more.get("instruction") if isinstance(more, dict) else None
    if inner is not None and payload.get("instruction", inner) != inner:
        raise _refused("instruction", "chat_template_kwargs has another one: send one of them")


def _put(payload: dict, name: str, value: Any, said_as: str) -> None:
    if name in payload and payload[name] != value:
        raise _refused(said_as, f"it contradicts {name}: send one of them")
    payload[name] = value


def _lengths(payload: dict, asked: Asked) -> None:
    """truncate, truncation and max_chunks_per_doc in the words of long_documents."""
    fit_name = ""
    for name in ("truncate", "truncation"):
        if name in payload:
            if payload.pop(name) in (False, "NONE"):
                _put(payload, "long_documents", "error", name)
            else:
                asked.fits = True
                fit_name = name
    if asked.fits and payload.get("long_documents") == "error":
        raise _refused(fit_name, "true or END contradicts another field, by which a text that is too long is an error")
    if "overlap_tokens" in payload:
        asked.overlap = int(payload.pop("overlap_tokens"))
    if "max_chunks_per_doc" in payload:
        asked.max_windows = int(payload.pop("max_chunks_per_doc"))
        mode = "truncate" if asked.max_windows == 1 else "chunk"
        _put(payload, "long_documents", mode, "max_chunks_per_doc")


def _as_texts(payload: dict, name: str, asked: Asked, images: Images) -> None:
    """Objects as their texts: {"text": ...}, those by rank_fields, and those with an image, which is kept apart."""
    value = payload[name]
    items = value if isinstance(value, list) else [value]
    kinds = set(map(type, items))
    if dict not in kinds:
        return
    keys = payload.get("rank_fields") if name in DOCUMENT_NAMES else None
    if keys and kinds != {dict}:
        raise _refused("rank_fields", "it needs documents that are all objects")
    texts = []
    for i, item in enumerate(items):
        text = item
        if type(item) is dict:
            text = None if keys else images.read(asked.images, item, name, i if isinstance(value, list) else None)
            text = _text_of(item, name, i, keys) if text is None else text
        texts.append(text)
    if asked.images.at.get(name) and len(items) == 1:
        asked.images.single.add(name)
    if keys:
        payload.pop("rank_fields")
        asked.originals = items
    elif asked.images.at.get(name) and name in DOCUMENT_NAMES:
        asked.originals = [_echo(item, text) for item, text in zip(items, texts, strict=True)]
    payload[name] = texts if isinstance(value, list) else texts[0]


def _text_of(item: dict, name: str, index: int, keys: list[str] | None) -> Any:
    for key in keys or ("text",):
        if key.encode("utf-8", "replace") in MEDIA_FIELDS:
            raise _refused("rank_fields", f"{key} is a key of images, and holds no text")
        if not isinstance(item.get(key), str):
            text = f"{name}[{index}] has no text under {ascii(key)[:40]}"
            raise Refusal(400, "field", f"{text}: send texts, or objects that are all like {_like(keys)}", param=name)
    others = [key for key in item if key != "text"]
    if others and not keys:
        text = f'{name}[{index}]: the key {ascii(others[0])[:40]} was not expected beside "text"'
        remedy = 'leave it out, or say with rank_fields which keys are scored, such as ["text"]'
        raise Refusal(400, "field", f"{text}: {remedy}", param=name)
    return "\n".join(item[key] for key in keys) if keys else item["text"]


def _like(keys: list[str] | None) -> str:
    return "{" + ", ".join(f"{ascii(key)[:40]}: '...'" for key in (keys or ["text"])[:4]) + "}"


def _echo(item: Any, text: str) -> dict:
    """A document as the answer repeats it; of a data URL, only its kind."""
    found = item.get("image") if isinstance(item, dict) else None
    for part in item.get("content", ()) if isinstance(item, dict) else ():
        found = part.get("image_url", found)
    found = found.get("url") if isinstance(found, dict) else found
    if not isinstance(found, str):
        return {"text": text, "multi_modal": None}
    return {"text": text or None, "image": found.partition(",")[0] if is_data_url(found) else found}


def _by_score(payload: dict, asked: Asked) -> None:
    """A rerank call with images asks vLLM's /score: the answer of /rerank would repeat every image."""
    if not asked.groups:
        for name in ("query", "documents"):
            if name not in payload:
                raise _refused(name, f"it is missing: {_shape('/rerank')}", 400)
        top_n = top_n_of(payload)
        if top_n is None:
            raise Refusal(400, "field", "top_n must be a whole number of 0 or more", param="top_n")
        payload.pop("top_n", None)
        asked.top_n, asked.as_rerank, asked.inner_path = asked.top_n or top_n, True, "/score"
        payload["queries"] = payload.pop("query")
        asked.images.rename("query", "queries")
        documents = payload["documents"] if isinstance(payload["documents"], list) else [payload["documents"]]
        asked.originals = asked.originals or [{"text": text, "multi_modal": None} for text in documents]


def _many_queries(payload: dict, asked: Asked, max_docs: int, max_bytes: int) -> None:
    """Several queries in one call: vLLM's /score takes them as pairs, in order."""
    queries, lists = payload.pop("queries"), payload.get("documents")
    if not (isinstance(queries, list) and queries and isinstance(lists, list) and lists):
        raise Refusal(400, "field", "queries and documents must be lists that are not empty", param="queries")
    if not any(isinstance(one, list) for one in lists):
        lists = [lists] * len(queries)
    if len(lists) != len(queries):
        text = f"{len(queries)} queries, but {len(lists)} lists of documents: send one list for each, or one for all"
        raise Refusal(400, "field", text, param="documents")
    if not all(isinstance(one, list) and one for one in lists):
        raise Refusal(400, "field", "documents must be lists that are not empty, one for each query", param="documents")
    if "rank_fields" in payload:
        raise _refused("rank_fields", "it cannot be combined with several queries")
    n = sum(map(len, lists))
    if 0 < max_docs < n:
        text = f"the queries make {n} pairs with their documents, the limit is {max_docs} (MAX_DOCS_PER_CALL)"
        raise Refusal(413, "docs", f"{text}: send several calls", param="queries")
    # vLLM gets a query once for each of its documents.
    n_chars = sum(len(str(query)) * len(one) for query, one in zip(queries, lists, strict=True))
    if 0 < max_bytes < n_chars:
        text = f"repeated for each document the queries have {n_chars} characters, the limit is {max_bytes} bytes"
        raise Refusal(413, "bytes", f"{text} (MAX_BODY_BYTES): send several calls", param="queries")
    top_n = top_n_of(payload)
    if top_n is None:
        raise Refusal(400, "field", "top_n must be a whole number of 0 or more", param="top_n")
    payload.pop("top_n", None)
    payload["queries"] = [query for query, one in zip(queries, lists, strict=True) for _ in one]
    payload["documents"] = [text for one in lists for text in one]
    asked.groups, asked.inner_path = [len(one) for one in lists], "/score"
    asked.dialect = ""  # no other API has several queries: the answer is the general one
    asked.top_n = asked.top_n or top_n


def _shape(path: str) -> str:
    if path in NVIDIA_PATHS:
        return 'send {"query": {"text": ...}, "passages": [{"text": ...}, ...]}'
    if path in SCORE_PATHS:
        return 'send {"queries": ..., "documents": [...]}'
    return 'send {"query": ..., "documents": [...]}'


def _refused(name: str, text: str, status: int = 422, reason: str = "field") -> Refusal:
    return Refusal(status, reason, f"{name}: {text}", param=name)

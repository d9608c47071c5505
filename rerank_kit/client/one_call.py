"""One rerank or score call without IO: its arguments, the requests of its parts, the check and merge of the answers."""

import copy
import math
import operator
import re
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from .. import settings
from .errors import RerankResponseError
from .images import Document, checked, parts, text_of
from .sending import MAX_SECONDS, Reply
from .sessions import base_urls
from .two_stages import FirstStage, first_stage, told

MIXED_TRIES = 3  # tries of a split call whose parts were scored by different models


@dataclass(frozen=True, slots=True)
class RerankItem:
    """One scored document; index is its position in the input. doc is its text: "" for an image alone."""

    index: int
    score: float
    doc: str

    def to_dict(self) -> dict[str, Any]:
        """{"index", "score", "doc"}, for JSON."""
        return {"index": self.index, "score": self.score, "doc": self.doc}


Items = list[RerankItem]
# {(address, model): when it said so last} of listwise services: a list that is split there has other scores.
_listwise: dict[tuple[str | None, str], float] = {}
LISTWISE_S = 60  # so long it is believed: another model may be served there by then
_Value = TypeVar("_Value")
Ranked = tuple[Items, list[float | None], dict[str, Any]]  # what rerank() returns
# (address, model name of the request, model name of the answer), both listed by that server as names of one model.
_aliases: set[tuple[str, str, str]] = set()
First = FirstStage | tuple[str, int]


class _Call:
    """One rerank or score call: its arguments, the requests of its parts, and the check and merge of their answers."""

    def __init__(
        self,
        path: str,
        query: Document,
        documents: Iterable[Document],
        top_n: int | None,
        model: str | None,
        base_url: str | None,
        timeout_s: float | None,
        instruction: str | None,
        long_documents: str | None,
        batch_size: int | None,
        deadline_s: float | None,
        max_tokens_per_doc: int | None,
    ):
        cfg = settings.CLIENT
        base_urls(base_url)
        self.path, self.query, self.base_url = path, _document("query", query), base_url
        self.documents: list[Any] = _as_list("documents", documents)
        for i, doc in enumerate(self.documents):
            if not (isinstance(doc, str) and doc.isascii()):
                self.documents[i] = _document(f"documents[{i}]", doc)
        self.top_n = _at_least("top_n", 0, top_n, len(self.documents))
        self.model = _text("model", cfg.served_model_name if model is None else model)
        self.timeout_s, self.deadline_s = _seconds("timeout_s", timeout_s), _seconds("deadline_s", deadline_s)
        self.extra: dict[str, Any] = {}
        if instruction is not None:
            self.extra["instruction"] = _text("instruction", instruction)
        if long_documents not in (None, "truncate", "error", "chunk"):
            raise ValueError(f'long_documents={_shown(long_documents)} is none of "truncate", "error", "chunk"')
        self.chunk = long_documents == "chunk"
        if max_tokens_per_doc is not None:
            if long_documents in ("error", "chunk"):
                cuts = f"max_tokens_per_doc={_shown(max_tokens_per_doc)} cuts"
                raise ValueError(f'{cuts} documents: it cannot be combined with long_documents="{long_documents}"')
            self.extra["max_tokens_per_doc"] = _at_least("max_tokens_per_doc", 1, max_tokens_per_doc, 0)
        if long_documents == "error":
            self.extra["max_tokens_per_doc"] = 0  # means "error" to vLLM, so it works without the guard too
        elif long_documents:
            self.extra["long_documents"] = long_documents
        self.size = _at_least("batch_size", 1, batch_size, cfg.client_batch_size)
        self.parts = self._split()

    def _split(self) -> list[range]:
        n_docs = len(self.documents) if self.top_n else 0
        said_s = _listwise.get((self.base_url, self.model), -math.inf)
        if n_docs and time.monotonic() - said_s < LISTWISE_S:
            return [range(n_docs)]
        return parts(self.documents[:n_docs], self.size, self.query)

    def stage(self, first: First) -> tuple["_Call | None", int]:
        """The call of the first stage and how many documents go on; no call if all of them do.

        Raises:
            ValueError: first is invalid.
        """
        found = first_stage(first, min(self.top_n, len(self.documents)) if self.top_n < len(self.documents) else None)
        base_urls(found.base_url)
        small = copy.copy(self)
        small.base_url, small.top_n = found.base_url, len(self.documents)
        small.model = _text("model", settings.CLIENT.served_model_name if found.model is None else found.model)
        small.extra = dict(self.extra)
        if found.instruction is not None:
            small.extra["instruction"] = _text("instruction", found.instruction)
            if not found.instruction:
                del small.extra["instruction"]
        small.parts = small._split()
        return (None if not self.top_n or len(self.documents) <= found.keep else small), found.keep

    def only(self, indices: list[int], began: float) -> "_Call":
        """This call for some of its documents, with what is left of deadline_s since perf_counter() was `began`."""
        large = copy.copy(self)
        large.documents = [self.documents[i] for i in indices]
        large.top_n = min(self.top_n, len(indices))
        large.parts = large._split()
        if self.deadline_s is not None:
            large.deadline_s = max(1e-3, self.deadline_s - (time.perf_counter() - began))
        return large

    def joined(self, first: Ranked, kept: list[int], second: Ranked) -> Ranked:
        """The result of both stages, with the positions of the whole input."""
        items = [RerankItem(kept[item.index], item.score, item.doc) for item in second[0]]
        items.sort(key=lambda item: (-item.score, item.index))
        scores: list[float | None] = [None] * len(self.documents)
        for item in items:
            scores[item.index] = item.score
        return items, scores, told(first[2], list(first[1]), second[2], kept, self.names[0])

    def start(self) -> None:
        self.t0 = time.perf_counter()
        self.until = math.inf if self.deadline_s is None else time.monotonic() + self.deadline_s

    def request(self, part: range) -> tuple[str, dict[str, Any], str | None, float | None, float]:
        """Arguments of post() for the documents of one part."""
        documents = self.documents[part.start : part.stop]
        if self.path == "/score":
            payload: dict[str, Any] = {"model": self.model, "text_1": self.query, "text_2": documents}
        else:
            payload = {"model": self.model, "query": self.query, "documents": documents}
            if self.top_n < len(self.documents):  # the overall best are among the best of each part
                payload["top_n"] = min(self.top_n, len(documents))
        return self.path, payload | self.extra, self.base_url, self.timeout_s, self.until

    def check(self, part: range, reply: Reply) -> dict[str, Any]:
        """The reply's JSON, after a check that each result belongs to exactly one document of the part.

        Raises:
            RerankResponseError: a result is missing, duplicate or superfluous, belongs to another document or model,
                or has no finite score.
        """
        rows_name, score_name = self.names
        if self.chunk and reply.windows is None:
            raise reply.error("without X-Rerank-Windows: it splits no documents (GUARD=0, or another server)")
        model, rows = reply.data.get("model"), reply.data.get(rows_name)
        if self.other_name(reply):
            raise reply.error(f"as model {str(model)[:100]!r}, asked was {self.model!r}")
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise reply.error(f"without a list of {rows_name}")
        if len(rows) != (n := min(self.top_n, len(part))):
            raise reply.error(f"{len(rows)} {rows_name} for {n}")
        seen: set[int] = set()
        for row in rows:
            index, value = row.get("index"), row.get(score_name)
            if type(index) is not int or not 0 <= index < len(part) or index in seen:
                raise reply.error(f"index {_shown(index)} (wanted: 0 to {len(part) - 1}, each once)")
            seen.add(index)
            # isfinite() raises for an integer beyond a float's range, so that is checked first.
            if type(value) not in (int, float) or abs(value) > sys.float_info.max or not math.isfinite(value):
                raise reply.error(f"{score_name} {_shown(value)} for index {index}")
            echo = row.get("document")
            echo = echo.get("text") if isinstance(echo, dict) else echo
            # Some servers echo the beginning of the document or nothing. Any other text belongs to another request.
            # For an empty document of a cross-encoder the guard sends a space.
            if isinstance(echo, str) and not (text_of(self.documents[part.start + index]) or " ").startswith(echo):
                raise reply.error(f"another document at index {index}")
        # The guard's headers list the documents that were cut or split.
        cut = {part.start + index for index in _listed(reply.cut, len(part))}
        windows = {part.start + index: n for index, n in _listed(reply.windows or "", len(part)).items()}
        told = {"_cut": cut, "_windows": windows, "_version": reply.version, "_listwise": reply.listwise}
        return reply.data | told | {"_retries": reply.n_retries, "_url": reply.url.removesuffix(self.path)}

    def again(self, answers: list[dict[str, Any]], n_tries: int) -> bool:
        """True if the call has to be sent again: in one piece to a listwise model, in its parts if they are mixed().

        Raises:
            RerankResponseError: by mixed().
        """
        if any(answer["_listwise"] for answer in answers):
            _listwise[self.base_url, self.model] = time.monotonic()
            if len(answers) > 1:
                self.parts = self._split()
                return True
        return self.mixed(answers, n_tries)

    def mixed(self, answers: list[dict[str, Any]], n_tries: int) -> bool:
        """True if different models scored the parts, as while a fleet changes its model. All parts are then sent again.

        Raises:
            RerankResponseError: after MIXED_TRIES tries, because scores of two models cannot be ranked together.
        """
        versions = sorted({answer["_version"] for answer in answers} - {""})
        if len(versions) > 1 and n_tries >= MIXED_TRIES:
            text = f"the parts of this call were scored by different models or settings ({', '.join(versions)})"
            raise RerankResponseError(f"{text}: give all replicas the same, or raise CLIENT_BATCH_SIZE")
        return len(versions) > 1

    def other_name(self, reply: Reply) -> tuple[str, None, str, float | None, float] | None:
        """Arguments of post() for the server's list of models, if the reply has a model name that was not requested."""
        model, base_url = reply.data.get("model"), reply.url.removesuffix(self.path)
        if model is None or model == self.model or (base_url, self.model, str(model)) in _aliases:
            return None
        return "/models", None, base_url, self.timeout_s, self.until

    def learn_alias(self, reply: Reply, models: Reply) -> None:
        """Accept the reply's model name if the server lists it with the same root as the requested name.

        A server with several names for its model answers with the first of them.
        """
        listed = models.data.get("data")
        rows = [row for row in listed if isinstance(row, dict)] if isinstance(listed, list) else []
        root_of = {str(row.get("id")): row.get("root") for row in rows}
        model = str(reply.data["model"])
        if root_of.get(model) and root_of[model] == root_of.get(self.model):
            _aliases.add((models.url.removesuffix("/models"), self.model, model))

    @property
    def names(self) -> tuple[str, str]:
        return ("data", "score") if self.path == "/score" else ("results", "relevance_score")

    def merge(self, answers: list[dict[str, Any]]) -> tuple[Items, list[Any], dict[str, Any]]:
        """The result of rerank() or score() from the checked answers of all parts, in order."""
        rows_name, score_name = self.names
        raw: dict[str, Any] = answers[0] if answers else {"model": self.model, rows_name: []}
        if len(answers) > 1:
            rows = [
                {**row, "index": part.start + row["index"]}
                for part, answer in zip(self.parts, answers, strict=True)
                for row in answer[rows_name]
            ]
            if self.path == "/rerank":
                rows = sorted(rows, key=lambda row: (-row[score_name], row["index"]))[: self.top_n]
            raw = {**raw, rows_name: rows}
            if all(isinstance(answer.get("id"), str) for answer in answers):
                raw["id"] = ",".join(answer["id"] for answer in answers)
            usages = [answer["usage"] for answer in answers if isinstance(answer.get("usage"), dict)]
            if usages:
                raw["usage"] = {key: _sum([usage.get(key) for usage in usages]) for key in usages[0]}
        items = [
            RerankItem(r["index"], float(r[score_name]), text_of(self.documents[r["index"]])) for r in raw[rows_name]
        ]
        by_index = self.path == "/score"
        items.sort(key=lambda item: item.index if by_index else (-item.score, item.index))
        scores: list[float | None] = [None] * len(self.documents)
        for item in items:
            scores[item.index] = item.score
        cost_ms = (time.perf_counter() - self.t0) * 1e3
        told: dict[str, Any] = {"_cut": sorted(index for answer in answers for index in answer["_cut"])}
        told["_version"] = next((answer["_version"] for answer in answers if answer["_version"]), "")
        told["_windows"] = {index: n for answer in answers for index, n in answer["_windows"].items()}
        told["_client_cost_ms"], told["_client_calls"] = cost_ms, len(answers)
        told["_client_retries"] = sum(answer["_retries"] for answer in answers)
        told["_client_url"] = ",".join(dict.fromkeys(answer["_url"] for answer in answers))
        raw = {key: value for key, value in raw.items() if key not in ("_retries", "_url", "_listwise")}
        return items, scores, {**raw, **told}


def _listed(text: str, n_docs: int) -> dict[int, int]:
    """{index: value} from a list of the guard such as `0-3,7` or `0-3:2,7:5`. Invalid entries are ignored."""
    out: dict[int, int] = {}
    for first, last, value in re.findall(r"(?:^|,)(\d{1,9})(?:-(\d{1,9}))?(?::(\d{1,9}))?(?=,|$)", text):
        for index in range(int(first), min(int(last or first) + 1, n_docs)):
            out[index] = int(value or 1)
    return out


def _as_list(name: str, value: Iterable[_Value]) -> list[_Value]:
    # A str, a dict and a set are iterable too, but a caller never means them as a list of documents.
    if isinstance(value, str | bytes | dict | set | frozenset) or not isinstance(value, Iterable):
        raise ValueError(f"{name} is a {type(value).__name__}, not a list: {_shown(value)}")
    return list(value)


def _text(name: str, value: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name} is a {type(value).__name__}, not a str: {_shown(value)}")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as exc:
            raise ValueError(f"{name} has a lone surrogate at character {exc.start}: {_shown(value)}") from None
    return value


def _document(name: str, value: Document) -> str | dict[str, Any]:
    if not isinstance(value, Mapping):
        return _text(name, value)
    found = checked(name, value)
    _text(name, text_of(found))
    return found


def _at_least(name: str, low: int, value: int | None, default: int) -> int:
    if value is None:
        return default
    try:
        number = operator.index(value)  # also numpy's integers
    except TypeError:
        number = low - 1
    if isinstance(value, bool) or number < low:
        raise ValueError(f"{name}={_shown(value)} is not an integer of {low} or more")
    return number


def _seconds(name: str, value: float | None) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= MAX_SECONDS:
        raise ValueError(f"{name}={_shown(value)} is not a number of seconds above 0, up to {MAX_SECONDS:g}")
    return float(value)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:80] + "..."


def _sum(values: list[Any]) -> Any:
    return sum(values) if all(type(value) is int for value in values) else values[0]

"""Scores of pairs that were asked before: in this API process (RESULT_CACHE_MIB) and in Redis (RESULT_CACHE_URL).

Both are off by default. This file holds the keys and the process's own scores; shared_cache.py talks to Redis.

A key is a hash of everything that the score depends on: the service's version id, every field of the body but those
that only shape the answer, the query and the document. So a score comes back only for exactly the same pair.
"""

import hashlib
import json
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from rerank_kit.guard.long_bodies import top_n_of

ENTRY_BYTES = 350  # of one score with its key in the OrderedDict; tests/guard/test_cache.py measures it
NOT_OF_THE_SCORE = frozenset(("query", "queries", "documents", "top_n", "request_id", "user"))


class Known(NamedTuple):
    """What is kept of a pair: its score, whether the model saw only a part, in how many windows."""

    score: float
    cut: bool
    windows: int


class ResultCache:
    """The least recently used pairs go first. No locks: all calls come from one event loop."""

    def __init__(self, mib: float, version: bytes):
        self.most = int(mib * 2**20 / ENTRY_BYTES)
        self.version = version
        self._known: OrderedDict[bytes, Known] = OrderedDict()

    def __len__(self) -> int:
        return len(self._known)

    def get(self, key: bytes) -> Known | None:
        known = self._known.get(key)
        if known is not None:
            self._known.move_to_end(key)
        return known

    def put(self, key: bytes, known: Known) -> None:
        self._known[key] = known
        self._known.move_to_end(key)
        while len(self._known) > self.most:
            self._known.popitem(last=False)

    def look_up(self, payload: dict, inner_path: str, length_rules: tuple) -> "Lookup | None":
        """What is known of a body's pairs. None = no pairs of plain texts.

        Args:
            length_rules: what becomes of long texts, where the body does not say it.
        """
        documents, top_n = payload.get("documents"), top_n_of(payload)
        is_score = inner_path.endswith("/score")
        queries = payload.get("queries") if is_score else payload.get("query")
        many: list[Any] = queries if isinstance(queries, list) else [queries]
        if (
            not isinstance(documents, list)
            or not documents
            or top_n is None
            or not many
            or isinstance(queries, list) != is_score
        ):
            return None
        if set(map(type, documents)) != {str} or set(map(type, many)) != {str}:
            return None
        if is_score and len(many) != len(documents):
            return None
        if not all(isinstance(payload.get(name, ""), str) for name in ("request_id", "user")) or "priority" in payload:
            return None  # for vLLM to judge
        rest = {name: value for name, value in payload.items() if name not in NOT_OF_THE_SCORE}
        shared = json.dumps([rest, length_rules, is_score], sort_keys=True).encode() + self.version
        # The length parts query and document: a text may hold any character.
        parts = {query: b"%d:%b" % (len(query), _bytes(query)) for query in set(many)}
        seeds = {query: hashlib.blake2b(shared + part, digest_size=16) for query, part in parts.items()}
        keys = []
        for i, document in enumerate(documents):
            one = seeds[many[i if is_score else 0]].copy()
            one.update(_bytes(document))
            keys.append(one.digest())
        found = {i: known for i, key in enumerate(keys) if (known := self.get(key)) is not None}
        missing = [i for i in range(len(keys)) if i not in found]
        return Lookup(self, keys, many, documents, found, missing, top_n, is_score)


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


@dataclass
class Lookup:
    """One call's pairs: which are known, and which vLLM scores."""

    cache: ResultCache
    keys: list[bytes]
    queries: list[str]
    documents: list[str]
    found: dict[int, Known]
    missing: list[int]
    top_n: int
    is_score: bool
    keeps: bool = True  # False: another document of the call had a say in the prompts, by shortening the query
    cut: list[int] = field(default_factory=list)  # of all pairs, once the answer is complete
    windows: dict[int, int] = field(default_factory=dict)
    shared: int | None = None  # pairs that Redis knew; None = it is not used
    new: dict[bytes, Known] = field(default_factory=dict)  # what vLLM scored, once the answer is complete

    def add(self, found: dict[bytes, Known]) -> None:
        """What Redis knows of the missing pairs."""
        for key, known in found.items():
            self.cache.put(key, known)
        here = {i: found[self.keys[i]] for i in self.missing if self.keys[i] in found}
        self.shared = len(here)
        self.found |= here
        self.missing = [i for i in self.missing if i not in here]

    def leave_missing(self, payload: dict) -> None:
        """Take the pairs that are known out of the body, in place."""
        payload.pop("top_n", None)  # all scores are wanted, to be kept
        if self.found:
            payload["documents"] = [self.documents[i] for i in self.missing]
            if self.is_score:
                payload["queries"] = [self.queries[i] for i in self.missing]

    def empty(self, request_id: str, model: str) -> dict:
        """The answer of vLLM to a call of which every pair is known."""
        rows = "data" if self.is_score else "results"
        return {"id": f"score-{request_id}", "model": model, "usage": {"prompt_tokens": 0, "total_tokens": 0}, rows: []}

    def complete(self, answer: dict, cut: list[int], windows: dict[int, int]) -> dict:
        """vLLM's answer for the missing pairs as the answer for all; keeps their scores.

        Args:
            cut, windows: of the missing pairs, by their index in the body that vLLM got.
        """
        rows_name, score_name = ("data", "score") if self.is_score else ("results", "relevance_score")
        known, was_cut = dict(self.found), set(cut)
        for row in answer[rows_name]:
            at = row["index"]
            i = self.missing[at]
            known[i] = Known(row[score_name], at in was_cut, windows.get(at, 1))
            if self.keeps:
                self.cache.put(self.keys[i], known[i])
                self.new[self.keys[i]] = known[i]
        self.cut = sorted(i for i, one in known.items() if one.cut)
        self.windows = {i: one.windows for i, one in known.items() if one.windows > 1}
        rows: list[dict]
        if self.is_score:
            rows = [{"index": i, "object": "score", "score": one.score} for i, one in sorted(known.items())]
        else:
            rows = [
                {"index": i, "document": {"text": self.documents[i], "multi_modal": None}, "relevance_score": one.score}
                for i, one in sorted(known.items())
            ]
            rows.sort(key=lambda row: row["relevance_score"], reverse=True)  # stable, as vLLM's own
            rows = rows[: self.top_n or None]
        counts = {"cached": len(self.found)} | ({} if self.shared is None else {"cached_shared": self.shared})
        return {**answer, rows_name: rows, "meta": counts}

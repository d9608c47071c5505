"""vLLM's answer to a call in the shape that the caller's API has: TEI, Voyage, NVIDIA, several queries, min_score.

asked.py puts the bodies of these APIs into vLLM's shape; this file is the way back. docs/guard.md describes each.
"""

import json
from collections.abc import Callable
from typing import Any

from rerank_kit.guard.answers import error_body, with_additions
from rerank_kit.guard.asked import RERANK_PATHS, Asked
from rerank_kit.guard.long_bodies import Split, merge_windows


def edit(
    asked: Asked,
    split: Split | None,
    status: int,
    body: bytes,
    encode: Callable[[Any], bytes],
    scale: dict | None = None,
    complete: Callable[[dict], dict] | None = None,
) -> bytes:
    """The answer that the caller gets for vLLM's. An answer without change keeps its bytes.

    Args:
        scale: what a score of this model is, for `meta`.
        complete: adds what the result cache knows to an answer, after its windows are merged.
    """
    is_rerank = asked.inner_path in RERANK_PATHS or bool(asked.groups) or asked.as_rerank
    meta = {"score_scale": scale} if scale else {}
    if status == 200 and not split and asked.plain and not complete:
        return with_additions(body, encode(meta)) if is_rerank else body
    try:
        answer = json.loads(body)
    except ValueError:
        return body
    if not isinstance(answer, dict):  # to a client that has left vLLM answers null
        return body
    if status != 200:
        error = answer.get("error")
        if not isinstance(error, dict) or not isinstance(error.get("message"), str):
            return body
        return encode({**answer, **error_body(error)} if not asked.dialect else error_body(error, asked.dialect))
    if split:
        answer = merge_windows(split, answer)
    if complete:
        answer = complete(answer)
        meta |= answer.pop("meta")
    if asked.as_rerank and "data" in answer:
        answer = _reranked(answer)
    if is_rerank and ("data" if asked.groups else "results") in answer:
        answer = _shaped(asked, _with_meta(answer, meta))
    return encode(answer)


def _with_meta(answer: dict, meta: dict) -> dict:
    usage = answer.get("usage")
    if isinstance(usage, dict):
        answer = {**answer, "usage": {"completion_tokens": 0, **usage}}
    return {"meta": meta, **answer}


def _shaped(asked: Asked, answer: dict) -> Any:
    if asked.groups:
        rows, left_out = _grouped(asked, answer.pop("data")), 0
        for one in rows:
            left_out += _drop(asked, one)
        answer = {name: value for name, value in answer.items() if name not in ("object", "created")}
        answer["results"] = rows
    else:
        rows = answer["results"]
        left_out = _drop(asked, rows)
        for row in rows:
            if not asked.texts:
                row.pop("document", None)
            elif asked.originals:
                row["document"] = asked.originals[row["index"]]
    if asked.min_score is not None:
        answer["meta"] = {**answer["meta"], "left_out": left_out}
    return _IN_DIALECT.get(asked.dialect, lambda answer, _: answer)(answer, asked.texts)


def _drop(asked: Asked, rows: list[dict]) -> int:
    """Take rows below min_score and beyond top_n out, in place; how many were below."""
    n = len(rows)
    if asked.min_score is not None:
        rows[:] = [row for row in rows if row["relevance_score"] >= asked.min_score]
    left_out = n - len(rows)
    if asked.top_n:
        del rows[asked.top_n :]
    return left_out


def _grouped(asked: Asked, data: list[dict]) -> list[list[dict]]:
    """Rows of /score for the pairs of several queries, as one list of results for each, best first."""
    scores, out, at = {row["index"]: row["score"] for row in data}, [], 0
    for n in asked.groups:
        rows = [{"index": i, "relevance_score": scores[at + i]} for i in range(n)]
        rows.sort(key=lambda row: -row["relevance_score"])
        out.append(rows)
        at += n
    return out


def _reranked(answer: dict) -> dict:
    """An answer of /score as one of /rerank, best first; equal scores in input order, as in vLLM's."""
    rows = [{"index": row["index"], "document": None, "relevance_score": row["score"]} for row in answer["data"]]
    rows.sort(key=lambda row: -row["relevance_score"])
    usage = {name: answer["usage"].get(name, 0) for name in ("prompt_tokens", "total_tokens")}
    return {"id": answer.get("id"), "model": answer.get("model"), "usage": usage, "results": rows}


def _text(row: dict) -> Any:
    document = row.get("document")
    return document.get("text") if isinstance(document, dict) else document


def _tei(answer: dict, texts: bool) -> list[dict]:
    rows = answer["results"]
    return [
        {"index": row["index"], "score": row["relevance_score"], **({"text": _text(row)} if texts else {})}
        for row in rows
    ]


def _voyage(answer: dict, texts: bool) -> dict:
    """data for Voyage's clients, and results as well: other clients may send top_k."""
    data = [
        {**row, "object": "rerank_result", **({"document": _text(row)} if texts else {})} for row in answer["results"]
    ]
    return {**answer, "object": "list", "data": data}


def _nvidia(answer: dict, texts: bool) -> dict:
    rows = [{"index": row["index"], "logit": row["relevance_score"]} for row in answer["results"]]
    return {"rankings": rows, "usage": answer.get("usage"), "model": answer.get("model"), "meta": answer["meta"]}


_IN_DIALECT = {"tei": _tei, "voyage": _voyage, "nvidia": _nvidia}


def tei_info(model: str, length: int, max_docs: int, version: str, scale: dict | None, truncates: bool) -> dict:
    """TEI's GET /info. Fields that have no meaning here are those that TEI's clients need to parse it."""
    return {
        "model_id": model,
        "model_sha": version or None,
        "model_dtype": "",
        "model_type": {"reranker": {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}},
        "max_concurrent_requests": 512,
        "max_input_length": length,
        "max_batch_tokens": length,
        "max_batch_requests": None,
        "max_client_batch_size": max_docs or 2**31 - 1,
        "auto_truncate": truncates,
        "tokenization_workers": 1,
        "version": "rerank-kit",
        "sha": None,
        "docker_label": None,
        "score_scale": scale,
    }

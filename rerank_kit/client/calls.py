"""Rerank and score. Arguments are checked before a request is sent, answers before they are returned.

one_call.py holds the logic of one call and does no IO; running.py sends the requests that it makes.
"""

import threading
from collections.abc import Iterable, Sequence
from typing import Any, Literal, overload

from .. import settings
from .errors import RerankError
from .images import Document, image_document
from .one_call import First, Items, Ranked, RerankItem, _as_list, _at_least, _Call
from .running import _arun, _arun_stages, _counter, _in_threads, _run, _run_stages

__all__ = [
    "Items",
    "LongDocuments",
    "RerankItem",
    "arerank",
    "ascore",
    "image_document",
    "rerank",
    "rerank_many",
    "score",
]

LongDocuments = Literal["truncate", "error", "chunk"]


def rerank(
    query: Document,
    documents: Iterable[Document],
    top_n: int | None = None,
    model: str | None = None,
    base_url: str | None = None,
    timeout_s: float | None = None,
    *,
    instruction: str | None = None,
    long_documents: LongDocuments | None = None,
    batch_size: int | None = None,
    deadline_s: float | None = None,
    max_tokens_per_doc: int | None = None,
    first: First | None = None,
) -> Ranked:
    """Rank documents by relevance to the query with POST /v1/rerank.

    Args:
        query: the text to search for. Where the model takes images also {"image": address}, with or without "text"; an
            address is https://... or a data URL, and image_document(path) makes such an object of a file.
        documents: N texts, or objects like those. N = 0 returns empty results without a request.
        top_n: number of best documents to return; None or more than N = all. 0 returns empty items without a request,
            because a server takes 0 for "all".
        model: the served name, or another name of the same model; None = SERVED_MODEL_NAME.
        base_url: the address of the service, or several separated by commas in order of preference; None = BASE_URL.
        timeout_s: seconds for one answer, and upper limit for one connect; None = TIMEOUT_S.
        instruction: task instruction for the prompt; None = the server's.
        long_documents: treatment of pairs longer than MAX_MODEL_LEN. "truncate" cuts them as the model card does,
            "error" returns HTTP 400, "chunk" scores overlapping windows of the document and keeps the best score;
            None = the server's LONG_DOCUMENTS. Bare vLLM (GUARD=0) has "error" only.
        batch_size: limit on documents in one request; longer lists are split. None = CLIENT_BATCH_SIZE.
        deadline_s: seconds for the whole call, with all requests and retries; None = no limit.
        max_tokens_per_doc: limit on the tokens of a document, without query and template; the rest is cut.
        first: (base_url, keep) of a small model that scores all documents; this call's model then scores the best
            `keep` of them, and items holds no others. FirstStage has its model name and instruction too. Not asked
            for lists of `keep` documents or fewer.

    Returns:
        (items, scores, raw). items: min(top_n, N) RerankItem, best first, equal scores in input order.
        scores: N values; scores[i] belongs to documents[i]; None for a document that top_n excluded.
        raw: the server's JSON plus seven keys. "_cut": indices of the documents that the model saw in part, or whose
        query it saw in part. "_windows": {index: windows} of the documents that were split. "_version": the guard's
        id of the model and settings that made the scores; "" without guard. "_client_cost_ms": wall clock.
        "_client_calls": the number of requests. "_client_retries": how many were sent again, to the same address or
        another. "_client_url": the address that answered. Of several requests, results and usage are merged, ids and
        addresses are joined by commas. With `first` also "_first": scores of all documents by the first stage, its
        model, _cut, _version, address, cost, calls and retries; None where it was not asked. Cost, calls and retries
        outside are those of both.

    Raises:
        ValueError: an invalid argument; nothing was sent.
        RerankError: any failure of the call; subclasses in errors.py.

    Source: vLLM Rerank API, docs for the version in requirements.txt.
    """
    more = (model, base_url, timeout_s, instruction, long_documents, batch_size, deadline_s, max_tokens_per_doc)
    call = _Call("/rerank", query, documents, top_n, *more)
    return _run(call) if first is None else _run_stages(call, first)


def score(
    query: Document,
    documents: Iterable[Document],
    model: str | None = None,
    base_url: str | None = None,
    timeout_s: float | None = None,
    *,
    instruction: str | None = None,
    long_documents: LongDocuments | None = None,
    batch_size: int | None = None,
    deadline_s: float | None = None,
    max_tokens_per_doc: int | None = None,
) -> tuple[Items, list[float], dict[str, Any]]:
    """Score each document against the query with POST /v1/score.

    Args: as in rerank().

    Returns:
        (items, scores, raw). items: N RerankItem in input order. scores: N floats; scores[i] belongs to
        documents[i]. raw: as in rerank(), with "data" for "results".

    Raises: as rerank().

    Source: vLLM Score API, docs for the version in requirements.txt.
    """
    more = (model, base_url, timeout_s, instruction, long_documents, batch_size, deadline_s, max_tokens_per_doc)
    return _run(_Call("/score", query, documents, None, *more))


async def arerank(
    query: Document,
    documents: Iterable[Document],
    top_n: int | None = None,
    model: str | None = None,
    base_url: str | None = None,
    timeout_s: float | None = None,
    *,
    instruction: str | None = None,
    long_documents: LongDocuments | None = None,
    batch_size: int | None = None,
    deadline_s: float | None = None,
    max_tokens_per_doc: int | None = None,
    first: First | None = None,
) -> Ranked:
    """rerank() for asyncio: same arguments, results and errors."""
    more = (model, base_url, timeout_s, instruction, long_documents, batch_size, deadline_s, max_tokens_per_doc)
    call = _Call("/rerank", query, documents, top_n, *more)
    return await (_arun(call) if first is None else _arun_stages(call, first))


async def ascore(
    query: Document,
    documents: Iterable[Document],
    model: str | None = None,
    base_url: str | None = None,
    timeout_s: float | None = None,
    *,
    instruction: str | None = None,
    long_documents: LongDocuments | None = None,
    batch_size: int | None = None,
    deadline_s: float | None = None,
    max_tokens_per_doc: int | None = None,
) -> tuple[Items, list[float], dict[str, Any]]:
    """score() for asyncio: same arguments, results and errors."""
    more = (model, base_url, timeout_s, instruction, long_documents, batch_size, deadline_s, max_tokens_per_doc)
    return await _arun(_Call("/score", query, documents, None, *more))


@overload
def rerank_many(
    queries: Sequence[Document],
    documents_lists: Sequence[Iterable[Document]],
    top_n: int | None = None,
    model: str | None = None,
    base_url: str | None = None,
    timeout_s: float | None = None,
    *,
    concurrency: int | None = None,
    progress: bool = False,
    return_errors: Literal[False] = False,
    instruction: str | None = None,
    long_documents: LongDocuments | None = None,
    batch_size: int | None = None,
    deadline_s: float | None = None,
    max_tokens_per_doc: int | None = None,
    first: First | None = None,
) -> list[Ranked]: ...
@overload
def rerank_many(
    queries: Sequence[Document],
    documents_lists: Sequence[Iterable[Document]],
    top_n: int | None = None,
    model: str | None = None,
    base_url: str | None = None,
    timeout_s: float | None = None,
    *,
    concurrency: int | None = None,
    progress: bool = False,
    return_errors: bool,
    instruction: str | None = None,
    long_documents: LongDocuments | None = None,
    batch_size: int | None = None,
    deadline_s: float | None = None,
    max_tokens_per_doc: int | None = None,
    first: First | None = None,
) -> list[Ranked | RerankError]: ...
def rerank_many(
    queries: Sequence[Document],
    documents_lists: Sequence[Iterable[Document]],
    top_n: int | None = None,
    model: str | None = None,
    base_url: str | None = None,
    timeout_s: float | None = None,
    *,
    concurrency: int | None = None,
    progress: bool = False,
    return_errors: bool = False,
    instruction: str | None = None,
    long_documents: LongDocuments | None = None,
    batch_size: int | None = None,
    deadline_s: float | None = None,
    max_tokens_per_doc: int | None = None,
    first: First | None = None,
) -> list[Ranked] | list[Ranked | RerankError]:
    """Rerank Q queries, each with its own documents, in a limited number of threads.

    Args: as in rerank(), for every query (deadline_s too), and
        queries: Q texts.
        documents_lists: Q lists of texts; documents_lists[i] belongs to queries[i].
        concurrency: limit on requests in flight; None = CLIENT_CONCURRENCY.
        progress: show a counter on stderr.
        return_errors: return the RerankError of a failed query in its place instead of raising it.

    Returns:
        Q results of rerank(), in the order of the queries.

    Raises:
        ValueError: an invalid argument; nothing was sent.
        RerankError: the first failure. Queries that have not started are dropped.
    """
    queries, documents_lists = _as_list("queries", queries), _as_list("documents_lists", documents_lists)
    if len(queries) != len(documents_lists):
        raise ValueError(f"queries has {len(queries)} entries, documents_lists has {len(documents_lists)}")
    n_threads = _at_least("concurrency", 1, concurrency, settings.CLIENT.client_concurrency)
    more = (model, base_url, timeout_s, instruction, long_documents, batch_size, deadline_s, max_tokens_per_doc)
    calls = []
    for i, (query, documents) in enumerate(zip(queries, documents_lists, strict=True)):
        try:
            calls.append(_Call("/rerank", query, documents, top_n, *more))
            if first is not None:
                calls[-1].stage(first)  # checked before anything is sent
        except ValueError as exc:
            raise ValueError(f"query {i}: {exc}") from None

    stop = threading.Event()

    def one(call: _Call) -> Ranked | RerankError:
        try:
            # One thread: the queries already run in threads.
            return _run(call, 1, stop) if first is None else _run_stages(call, first, 1, stop)
        except RerankError as exc:
            if not return_errors:
                raise
            return exc

    with _counter(len(calls), progress) as tick:
        return _in_threads(one, calls, n_threads, stop, tick)

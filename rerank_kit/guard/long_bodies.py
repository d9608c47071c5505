"""The body of a scoring call whose pairs are longer than the model takes: cut, or split into windows and merged."""

from collections import Counter
from dataclasses import dataclass

from rerank_kit.models.fitting import Fitter, TooManyWindows

# The fields that hold queries and documents, over all spellings of vLLM's routes.
LIMITS = ("max_tokens_per_query", "max_tokens_per_doc")
QUERIES = ("query", "queries", "text_1", "data_1")
DOCUMENTS = ("documents", "items", "text_2", "data_2")


def _fields(payload: dict) -> tuple[str, list, str, list] | None:
    """(query field, queries, document field, documents) of a rerank or score body; None for shapes that vLLM checks."""
    given = [name for name in QUERIES if name in payload], [name for name in DOCUMENTS if name in payload]
    if [len(names) for names in given] != [1, 1]:
        return None  # several spellings in one body: vLLM decides which counts
    (first,), (second,) = given
    queries, documents = payload[first], payload[second]
    queries = queries if isinstance(queries, list) else [queries]
    documents = documents if isinstance(documents, list) else [documents]
    if not all(isinstance(text, str) for text in [*queries, *documents]) or not documents:
        return None
    return (first, queries, second, documents) if len(queries) in (1, len(documents)) else None


def _instruction(payload: dict) -> str | None:
    more = payload.get("chat_template_kwargs")
    given = more.get("instruction") if isinstance(more, dict) else None
    given = given or payload.get("instruction")
    return given if isinstance(given, str) else None


def _limit(payload: dict, name: str) -> int:
    """max_tokens_per_doc or max_tokens_per_query; 0 = none, or an invalid one, which vLLM refuses."""
    limit = payload.get(name)
    return limit if isinstance(limit, int) and limit > 0 else 0


def as_int(value: object) -> object:
    """A number as vLLM reads it for an integer ("5", 5.0 and "5.0" are 5); other values are returned unchanged."""
    if isinstance(value, int) or not isinstance(value, str | float):
        return value
    try:
        number = float(value)
        return int(number) if number == int(number) else value
    except (ValueError, OverflowError):
        return value


def payload_fits_surely(fitter: Fitter, payload: dict) -> bool:
    """No text of this body can be too long or needs another spelling; True also for shapes that only vLLM checks."""
    fields = _fields(payload)
    if fields is None:
        return True
    _, queries, _, documents = fields
    for texts, name in ((queries, "max_tokens_per_query"), (documents, "max_tokens_per_doc")):
        if (limit := _limit(payload, name)) and any(len(text.encode()) > limit for text in texts):
            return False
    if fitter.blank and "" in documents:
        return False
    longest = max(queries, key=lambda q: len(q.encode()))
    instruction = _instruction(payload)
    return all(fitter.fits_surely(longest, document, instruction) for document in documents)


def _pairs(fitter: Fitter, payload: dict, fields: tuple) -> list[tuple[str, str]]:
    """(query, document) of every pair, queries within max_tokens_per_query: vLLM cuts them before it joins the two."""
    _, queries, _, documents = fields
    if limit := _limit(payload, "max_tokens_per_query"):
        queries = [fitter.head(query, limit) for query in queries]
    if len(queries) == 1 and (fitter.template or fitter.separate):
        fitted = fitter.fit(queries[0], "", _instruction(payload))[0]  # once, not for every document
        if fitter.template and fitted != queries[0]:  # as fit() has it for a pair: a part of a query leaves no room
            documents = [""] * len(documents)
        queries = [fitted]
    many = queries if len(queries) == len(documents) else queries * len(documents)
    return list(zip(many, documents, strict=True))


def fit_payload(fitter: Fitter, payload: dict) -> list[int]:
    """Cut what does not fit in a rerank or score body, in place.

    Returns:
        Indices of the documents that were cut, or whose query was.
    """
    fields = _fields(payload)
    if fields is None:
        return []
    limit, instruction = _limit(payload, "max_tokens_per_doc"), _instruction(payload)
    fitted = [fitter.fit(q, d, instruction, limit)[:2] for q, d in _pairs(fitter, payload, fields)]
    _put(payload, fields, [query for query, _ in fitted], [document or fitter.blank for _, document in fitted])
    return _shorter(payload, fields, [document for _, document in fitted])


def cut_by_limits(fitter: Fitter, payload: dict) -> list[int]:
    """Cut by the body's token limits, in place; indices of the documents that are shorter now, or whose query is.

    vLLM would cut them too, but takes the accent off the last letter of decomposed text.
    """
    fields = _fields(payload)
    if fields is None:
        return []
    first, queries, second, documents = fields
    cut = []
    for texts, name in zip((queries, documents), LIMITS, strict=True):
        limit = _limit(payload, name)
        cut.append([fitter.head(text, limit) if limit else text for text in texts])
    payload[first] = cut[0] if isinstance(payload[first], list) else cut[0][0]
    payload[second] = cut[1] if isinstance(payload[second], list) else cut[1][0]
    shorter = [
        [a != b for a, b in zip(new, old, strict=True)] for new, old in zip(cut, (queries, documents), strict=True)
    ]
    of_query = shorter[0] if len(shorter[0]) > 1 else shorter[0] * len(shorter[1])
    return [i for i, both in enumerate(zip(of_query, shorter[1], strict=True)) if any(both)]


def keep_separators(fitter: Fitter, payload: dict) -> None:
    """Give empty documents the text that keeps their separator, in place (Fitter.blank)."""
    if fitter.blank and (fields := _fields(payload)):
        _, queries, _, documents = fields
        _put(payload, fields, queries, [document or fitter.blank for document in documents])


def _put(payload: dict, fields: tuple, queries: list[str], documents: list[str]) -> None:
    """Write one query and one document a pair back into the body's own fields, in its shape where that holds them."""
    first, old_queries, second, _ = fields
    if len(old_queries) == 1 and (first == "query" or len(set(queries)) == 1):
        # /rerank has one query for all documents, so the shortest that fits beside every document.
        queries = [min(queries, key=len)]
    payload[first] = queries if isinstance(payload[first], list) or len(queries) > 1 else queries[0]
    payload[second] = documents if isinstance(payload[second], list) or len(documents) > 1 else documents[0]


def _shorter(payload: dict, fields: tuple, kept: list[str]) -> list[int]:
    """Indices of the pairs that are now shorter in the body than they were sent."""
    first, old_queries, _, old_documents = fields
    sent = payload[first] if isinstance(payload[first], list) else [payload[first]]
    n = len(old_documents)
    sent, old = (texts if len(texts) == n else texts[:1] * n for texts in (sent, old_queries))
    return [i for i in range(n) if kept[i] != old_documents[i] or sent[i] != old[i]]


@dataclass(frozen=True)
class Split:
    """A body whose long documents became windows, and how to read its answer."""

    owners: list[int]  # owners[i] = index of the document that window i belongs to
    documents: list[str]  # as they came
    top_n: int  # of the call; 0 = all

    @property
    def counts(self) -> dict[int, int]:
        """{document: windows} of the documents that have several."""
        return {index: n for index, n in Counter(self.owners).items() if n > 1}


def split_payload(
    fitter: Fitter, payload: dict, most: int = 0, most_each: int = 0, overlap: int | None = None
) -> tuple[Split | None, list[int]]:
    """Replace the long documents of a rerank or score body by their windows, in place.

    Args:
        most: windows that are allowed in all; 0 = any number.
        most_each: windows that a document keeps, the first ones; 0 = all.
        overlap: tokens that neighbouring windows share; None = the kit's own number.

    Returns:
        (split, cut): None where every document is one window; indices of the documents of which, or of whose query,
        the model sees a part only.

    Raises:
        TooManyWindows: more than `most`.
    """
    fields = _fields(payload)
    top_n = top_n_of(payload)
    if fields is None or top_n is None:
        return None, []
    instruction, n = _instruction(payload), 0
    parts: list[tuple[str, list[str], bool]] = []
    more = {} if overlap is None else {"overlap": overlap}
    shortened: set[int] = set()  # documents that lost windows
    pairs = _pairs(fitter, payload, fields)
    for query, document in pairs:
        # Each remaining document makes at least one window.
        room = most - n - (len(pairs) - len(parts) - 1) if most else 0
        try:
            limit = 0 if most_each or not most else max(1, room)
            query, windows, is_cut = fitter.windows(query, document, instruction, limit, **more)
        except TooManyWindows as exc:
            raise TooManyWindows(n + int(str(exc))) from None
        if 0 < most_each < len(windows):
            windows = windows[:most_each]
            shortened.add(len(parts))
        parts.append((query, windows, is_cut))
        n += len(windows)
    if most and n > most:
        raise TooManyWindows(n)
    owners = [index for index, (_, windows, _) in enumerate(parts) for _ in windows]
    texts = [window or fitter.blank for _, windows, _ in parts for window in windows]
    queries = [parts[index][0] for index in owners]
    _put(payload, fields, queries, texts)
    first, old_queries, _, documents = fields
    used = queries if first != "query" else [payload[first]] * len(queries)
    old = old_queries if len(old_queries) == len(documents) else old_queries * len(documents)
    cut = sorted({owner for owner, query in zip(owners, used, strict=True) if query != old[owner]})
    # A document with no room beside its query is lost completely.
    cut = sorted({*cut, *shortened, *(i for i, (_, w, is_cut) in enumerate(parts) if is_cut and len(w) == 1)})
    if owners == list(range(len(documents))):
        return None, cut
    payload.pop("top_n", None)  # the best documents may have several windows each, so all windows are requested
    return Split(owners, documents, top_n), cut


def top_n_of(payload: dict) -> int | None:
    """top_n as vLLM reads it (also "2" and 2.0); 0 = all; None = vLLM refuses it."""
    number = as_int(payload.get("top_n", 0))
    return int(number) if isinstance(number, int) and number >= 0 else None


def merge_windows(split: Split, answer: dict) -> dict:
    """vLLM's answer for windows as the answer for their documents: each document has its best window's score.

    Source: the maximum over chunks is what Cohere's rerank documents for long texts.
    """
    rows_name, score_name = ("results", "relevance_score") if "results" in answer else ("data", "score")
    best: dict[int, dict] = {}
    for row in answer[rows_name]:
        owner = split.owners[row["index"]]
        if owner not in best or row[score_name] > best[owner][score_name]:
            best[owner] = row
    rows = []
    for owner, row in sorted(best.items()):
        row = {**row, "index": owner}
        if isinstance(row.get("document"), dict):
            row["document"] = {**row["document"], "text": split.documents[owner]}
        rows.append(row)
    if rows_name == "results":
        rows.sort(key=lambda row: -row[score_name])
        rows = rows[: split.top_n or None]
    return {**answer, rows_name: rows}

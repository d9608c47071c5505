"""Cuts and windows: query and document texts whose prompt fits the model, cut as the family's reference cuts.

Used by server_guard.py inside the server. Needs nothing but a tokenizer.
"""

import unicodedata

MARK = "\ue000"  # a private character: stands for a field while the template's frame is measured
OVERLAP = 64  # tokens that two neighbouring windows share, so that no sentence is lost at a border


class Fitter:
    """Fits pairs into max_length tokens.

    Args:
        tokenizer: a fast transformers tokenizer.
        template: Jinja score template with messages of role query and document; None = the tokenizer's own format.
        max_length: tokens of the longest prompt.
        separate: query and document are two prompts (embedding models).

    Source: model card of Qwen3-Reranker for templates (the document's end is cut, then the query's; the suffix stays);
    transformers' truncation="longest_first" for pairs, as sentence-transformers' CrossEncoder uses it.
    """

    def __init__(self, tokenizer, template: str | None, max_length: int, *, separate: bool = False):
        self.tokenizer, self.template, self.max_length, self.separate = tokenizer, template, max_length, separate
        # Bytes that surely fit: a token is at least one byte, and the frame is the same for every pair.
        self.frame_tokens = len(self._ids("", "", None))

    def fits_surely(self, query: str, document: str, instruction: str | None = None) -> bool:
        """A cheap yes for the common short pair; False means that fit() must count."""
        texts = (query, document, instruction or "")
        if not all(unicodedata.is_normalized("NFC", text) for text in texts):
            return False  # normalising may lengthen a text
        length = sum(len(t.encode()) for t in texts)
        # A neutralised control token is longer by one byte than it was.
        return self.frame_tokens + length + sum(t.count("<|") for t in texts) < self.max_length

    def fit(self, query: str, document: str, instruction: str | None = None, limit: int = 0) -> tuple[str, str, bool]:
        """Cut what does not fit.

        Args:
            limit: most tokens of the document (max_tokens_per_doc); 0 = as many as fit.

        Returns:
            (query, document, cut).
        """
        if not limit and self.fits_surely(query, document, instruction):
            return query, document, False
        # Tokenizing a book to use its first page would cost seconds.
        whole = query, document
        query, document = self._enough(query), self._enough(document)
        if limit:
            document = self._head(document, limit)
        if self.separate:
            fitted = self._fit_alone(query), self._fit_alone(document)
        elif self.template is None:
            fitted = self._fit_pair(query, document)
        else:
            fitted = self._fit_template(query, document, instruction)
        return *fitted, fitted != whole

    def windows(self, query: str, document: str, instruction: str | None = None) -> list[str]:
        """The document as overlapping windows that each fit beside the query; [document] when it fits as a whole."""
        _, first, cut = self.fit(query, document, instruction)
        if not cut:
            return [document]
        offsets = self._offsets(document)
        room = max(2, len(self._offsets(first)))
        step = max(1, room - OVERLAP) if room > 2 * OVERLAP else max(1, room // 2)
        out = []
        for start in range(0, len(offsets), step):
            end = min(start + room, len(offsets))
            window = document[offsets[start][0] : offsets[end - 1][1]]
            out.append(self.fit(query, window, instruction)[1])
            if end == len(offsets):
                break
        return out

    # --- how each kind cuts ---

    def _fit_template(self, query: str, document: str, instruction: str | None) -> tuple[str, str]:
        before, after = self._render(query, MARK, instruction).rsplit(MARK, 1)
        room = self.max_length - len(self.tokenizer(after, add_special_tokens=False)["input_ids"])
        if len(self._ids(query, "", instruction)) > self.max_length:
            return self._fit_query(query, instruction), ""
        if len(self._ids(query, document, instruction)) <= self.max_length:
            return query, document
        # Cut the text that the template shows, and give back that much of the original: the template may lengthen it
        # (control tokens get a space), so what is over is taken off again.
        whole = self._render(query, document, instruction)
        text = whole[: len(whole) - len(after)]
        document = document[: max(0, self._end(text, room) - len(before))]
        while document and (over := len(self._ids(query, document, instruction)) - self.max_length) > 0:
            document = self._head(document, len(self._offsets(document)) - over)
        return query, document

    def _fit_query(self, query: str, instruction: str | None) -> str:
        frame = len(self._ids("", "", instruction))
        query = self._head(query, max(0, self.max_length - frame))
        while query and len(self._ids(query, "", instruction)) > self.max_length:
            query = self._head(query, len(self._offsets(query)) - 1)
        return query

    def _fit_pair(self, query: str, document: str) -> tuple[str, str]:
        length = self.max_length
        while True:
            batch = self.tokenizer(
                query, document, truncation="longest_first", max_length=length, return_offsets_mapping=True
            )
            ends = [0, 0]
            for segment, (_, end) in zip(batch.sequence_ids(0), batch["offset_mapping"], strict=True):
                if segment is not None:
                    ends[segment] = max(ends[segment], end)
            fitted = query[: ends[0]], document[: ends[1]]
            if len(self.tokenizer(*fitted)["input_ids"]) <= self.max_length or length < 8:
                return fitted
            length -= 1  # a text that is cut inside a word may get one token more

    def _fit_alone(self, text: str) -> str:
        fixed = len(self.tokenizer("")["input_ids"])
        room = self.max_length - fixed
        while len(self.tokenizer(text)["input_ids"]) > self.max_length and room > 0:
            text = self._head(text, room)
            room -= 1
        return text

    # --- measuring ---

    def _enough(self, text: str) -> str:
        """A prefix that has more tokens than any prompt."""
        n_chars = 8 * self.max_length
        while n_chars < len(text) and len(self._offsets(text[:n_chars])) <= self.max_length:
            n_chars *= 4
        return text[:n_chars]

    def _render(self, query: str, document: str, instruction: str | None) -> str:
        chat = [{"role": "query", "content": query}, {"role": "document", "content": document}]
        more = {"instruction": instruction} if instruction else {}
        return self.tokenizer.apply_chat_template(chat, chat_template=self.template, tokenize=False, **more)

    def _ids(self, query: str, document: str, instruction: str | None) -> list[int]:
        if self.template is None:
            both = (query + document,) if self.separate else (query, document)
            return self.tokenizer(*both)["input_ids"]
        return self.tokenizer(self._render(query, document, instruction))["input_ids"]

    def _offsets(self, text: str) -> list[tuple[int, int]]:
        return self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]

    def _end(self, text: str, n_tokens: int) -> int:
        """Characters of the first n tokens; never a half character (several tokens can make one)."""
        offsets = self.tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
        if len(offsets) <= n_tokens:
            return len(text)
        return min(offsets[n_tokens - 1][1], offsets[n_tokens][0]) if n_tokens > 0 else 0

    def _head(self, text: str, n_tokens: int) -> str:
        offsets = self._offsets(text)
        if len(offsets) <= n_tokens:
            return text
        return text[: min(offsets[n_tokens - 1][1], offsets[n_tokens][0])] if n_tokens > 0 else ""


# The fields that hold queries and documents, over all spellings of vLLM's routes.
QUERIES = ("query", "queries", "text_1", "data_1")
DOCUMENTS = ("documents", "items", "text_2", "data_2")


def _fields(payload: dict) -> tuple[str, list, str, list] | None:
    """(query field, queries, document field, documents) of a rerank or score body; None for shapes that vLLM judges."""
    try:
        first = next(name for name in QUERIES if name in payload)
        second = next(name for name in DOCUMENTS if name in payload)
    except StopIteration:
        return None
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


def payload_fits_surely(fitter: Fitter, payload: dict) -> bool:
    """No text of this body can be too long; True also for shapes that are left to vLLM."""
    fields = _fields(payload)
    if fields is None:
        return True
    _, queries, _, documents = fields
    limit = payload.get("max_tokens_per_doc")
    if isinstance(limit, int) and limit > 0 and any(len(d.encode()) > limit for d in documents):
        return False
    longest = max(queries, key=lambda q: len(q.encode()))
    instruction = _instruction(payload)
    return all(fitter.fits_surely(longest, document, instruction) for document in documents)


def fit_payload(fitter: Fitter, payload: dict) -> list[int]:
    """Cut what does not fit in a rerank or score body, in place.

    Returns:
        Indices of the documents of which, or of whose query, a part was cut.
    """
    fields = _fields(payload)
    if fields is None:
        return []
    first, queries, second, documents = fields
    limit = payload.get("max_tokens_per_doc")
    limit = limit if isinstance(limit, int) and limit > 0 else 0
    many = queries if len(queries) == len(documents) else queries * len(documents)
    fitted = [fitter.fit(q, d, _instruction(payload), limit) for q, d in zip(many, documents, strict=True)]
    cut = [index for index, (*_, is_cut) in enumerate(fitted) if is_cut]
    if cut:
        new_queries = [query for query, _, _ in fitted]
        if len(queries) == 1:
            # One query for all: the shortest that any document left room for.
            new_queries = [min(new_queries, key=len)]
        new_documents = [document for _, document, _ in fitted]
        payload[first] = new_queries if isinstance(payload[first], list) else new_queries[0]
        payload[second] = new_documents if isinstance(payload[second], list) else new_documents[0]
    return cut

"""Shortens a query and a document until their prompt fits the model, the way the model's reference code does, or splits
the document into windows.

The guard inside the server and offline scoring use it. It needs a tokenizer only.
"""

import math
import unicodedata
from bisect import bisect_right

from rerank_kit.models.late import Late

# A pair that is too long for the model is cut, refused, or scored in overlapping windows.
MODES = ("truncate", "error", "chunk")

MARK = "\ue000"  # a private character; it replaces a field while the template's frame is measured
OVERLAP = 64  # tokens that two neighbouring windows share, so that no sentence is lost at a border


def after_marks(text: str, end: int) -> int:
    """`end`, or behind the characters there that belong to the letter before it (decomposed text: e and its accent).

    A tokenizer that composes them gives the letter's token the place of its first character only.
    """
    stop = end
    composed = len(unicodedata.normalize("NFC", text[max(0, end - 1) : end]))
    while 0 < stop < len(text) and len(unicodedata.normalize("NFC", text[end - 1 : stop + 1])) == composed:
        stop += 1
    return stop


def tail_ids(tokenizer, text: str) -> list[int]:
    """Token ids of a text that ends a prompt. A tokenizer may put a space before a text that stands alone."""
    lead = tokenizer("x", add_special_tokens=False)["input_ids"]
    ids = tokenizer("x" + text, add_special_tokens=False)["input_ids"]
    if ids[: len(lead)] == lead:
        return ids[len(lead) :]
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def document_first(prompt: str, document: str, query: str) -> bool:
    """Whether a prompt has the document before the query; both stand for marks."""
    return document in prompt and query in prompt and prompt.index(document) < prompt.rindex(query)


class TooManyWindows(ValueError):
    """The documents of a body make more windows than allowed; str() is a lower bound of their number."""


class EmptyTextCounts:
    """A tokenizer that treats an empty second text as a text, so that the pair keeps its separator.

    transformers reads text_pair="" as "no second text" and [""] as an empty one; sentence-transformers passes the list.
    """

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer

    def __getattr__(self, name):
        if name == "_tokenizer":  # copy and pickle ask before __init__ ran
            raise AttributeError(name)
        return getattr(self._tokenizer, name)

    def __call__(self, text, text_pair=None, **kwargs):
        if not isinstance(text, str) or text_pair != "":
            return self._tokenizer(text, text_pair, **kwargs)
        batch = self._tokenizer([text], [""], **kwargs)
        return type(batch)({key: rows[0] for key, rows in batch.items()}, batch.encodings)


class Fitter:
    """Fits pairs into max_length tokens.

    Args:
        tokenizer: a fast transformers tokenizer.
        template: Jinja score template with messages of role query and document; None = the tokenizer's own format.
        max_length: tokens of the longest prompt.
        separate: query and document are two prompts (embedding models).
        query_length: with separate, tokens of the longest query; None = max_length.

    Source: for templates the model card of Qwen3-Reranker (it cuts the document's end, then the query's, and keeps the
    suffix); for pairs transformers' truncation="longest_first", which sentence-transformers' CrossEncoder uses.
    """

    def __init__(
        self,
        tokenizer,
        template: str | None,
        max_length: int,
        *,
        separate: bool = False,
        query_length: int | None = None,
    ):
        self.tokenizer, self.template, self.max_length, self.separate = tokenizer, template, max_length, separate
        self.query_length = query_length or max_length
        # vLLM passes an empty second text to the tokenizer as "", and the tokenizer then leaves out the separator. A
        # space replaces it if that gives the wanted ids; if not (byte-level BPE), vLLM's tokenizer has to be wrapped.
        self.blank, self.needs_cover = "", False
        if template is None and not separate:
            self.tokenizer = EmptyTextCounts(tokenizer)
            wanted = self.tokenizer("q", "")["input_ids"]
            if tokenizer("q", "")["input_ids"] != wanted:
                self.blank = " " if tokenizer("q", " ")["input_ids"] == wanted else ""
                self.needs_cover = not self.blank
        # A token has at least one byte, and the frame is the same for every pair: so few bytes surely fit.
        self.frame_tokens = len(self._ids("", "", None))
        # As ctxl-rerank-v2 has it: then the query belongs to the end that is never cut.
        self.document_first = template is not None and document_first(
            self._render("\ue001", MARK, None), MARK, "\ue001"
        )
        self._counted: tuple = (None, None, 0)
        # A tokenizer that expands compatibility characters (XLM-R's) makes up to 18 characters of one.
        self.form = "NFKC" if len(self._offsets("\ufdfa" * 8)) > 24 else "NFC"

    def fits_surely(self, query: str, document: str, instruction: str | None = None) -> bool:
        """True if a cheap bound shows that the pair fits; False means that fit() must count the tokens."""
        texts = (query, document, instruction or "")
        if self.query_length < self.max_length and self.frame_tokens + self._most_tokens(query) >= self.query_length:
            return False
        return self.frame_tokens + sum(map(self._most_tokens, texts)) < self.max_length

    def _most_tokens(self, text: str) -> float:
        """An upper bound of a text's tokens: one for each byte of its normalized form."""
        if self.form == "NFKC":
            text = unicodedata.normalize("NFKC", text)
        elif not unicodedata.is_normalized("NFC", text):
            return math.inf  # NFC may lengthen it
        # Neutralizing a control token adds one byte to it.
        return len(text.encode()) + text.count("<")

    def _fits_beside(self, query: str, document: str, instruction: str | None) -> bool:
        """True if a short document surely fits beside a long query, whose tokens are counted once per call."""
        if self.separate:
            return False
        # 16: tokens that may change where the two texts meet.
        room = self.max_length - self._beside(query, instruction) - 16
        return self._most_tokens(document) <= room

    def _beside(self, query: str, instruction: str | None) -> int:
        """Tokens of a prompt without its document; the last count is kept, since a call has one query."""
        if (query, instruction) != self._counted[:2]:
            self._counted = query, instruction, len(self._ids(query, "", instruction))
        return self._counted[2]

    def fit(self, query: str, document: str, instruction: str | None = None, limit: int = 0) -> tuple[str, str, bool]:
        """Cut query and document until their prompt fits.

        Args:
            limit: most tokens of the document (max_tokens_per_doc); 0 = as many as fit.

        Returns:
            (query, document, cut).
        """
        if not limit and (
            self.fits_surely(query, document, instruction) or self._fits_beside(query, document, instruction)
        ):
            return query, document, False
        if self.template and self._beside(query, instruction) >= self.max_length and document:
            return self.fit(query, "", instruction)[0], "", True
        # Tokenizing a whole book, of which one page fits, would cost seconds.
        whole = query, document
        query, document = self._enough(query), self._enough(document)
        if limit:
            document = self.head(document, limit)
        if self.separate:
            fitted = self._fit_alone(query, self.query_length), self._fit_alone(document, self.max_length)
        elif self.template is None:
            fitted = self._fit_pair(query, document)
        else:
            fitted = self._fit_template(query, document, instruction)
        return *fitted, fitted != whole

    def windows(
        self, query: str, document: str, instruction: str | None = None, most: int = 0, overlap: int = OVERLAP
    ) -> tuple[str, list[str], bool]:
        """The document as overlapping windows that each fit beside the query.

        Args:
            most: windows that are allowed; 0 = any number.
            overlap: tokens that two neighbouring windows share, half a window at most.

        Returns:
            (query, windows, cut). windows: [document] if the whole pair fits. cut: the query itself was too long; the
            returned one is the part that the model sees. There is one window if the query leaves less than 1/64 of
            the length.

        Raises:
            TooManyWindows: there are more than `most`; raised before all of them are made.
        """
        shorter, first, cut = self.fit(query, document, instruction)
        if not cut:
            return query, [document], False
        least = max(2, self.max_length // 64)  # smallest useful window: each window costs a whole query
        joined = self.template is None and not self.separate
        if joined and shorter != query and self.max_length - self._beside(query, None) >= least:
            # longest_first may cut the query. Windows keep it whole as long as a window fits beside it.
            shorter, first = query, self._shorten(query, self._enough(document), None)
        if not first:
            return shorter, [first], True
        offsets = self._offsets(document)
        if not offsets:  # only white space, which the tokenizer drops
            return shorter, [first], cut
        room = max(2, len(self._offsets(first)))
        if room < least:
            return shorter, [first], True
        n_about = len(offsets) // room
        if most and n_about > most:
            raise TooManyWindows(n_about)
        out: list[str] = []
        start = 0
        while True:
            if most and len(out) >= most:
                raise TooManyWindows(most + 1)
            end = min(start + room, len(offsets))
            begin = offsets[start][0]
            window = document[begin : after_marks(document, offsets[end - 1][1])]
            out.append(self._shorten(shorter, window, instruction))
            if len(out[-1]) < len(window):  # the template lengthened the window, so its end was cut
                end = bisect_right(offsets, begin + len(out[-1]), lo=start + 1, key=lambda offset: offset[1])
            if end == len(offsets):
                break
            seen = end - start
            start = max(start + 1, end - min(overlap, seen // 2))
        return shorter, out, shorter != query

    # --- how each kind cuts ---

    def _fit_template(self, query: str, document: str, instruction: str | None) -> tuple[str, str]:
        marked = self._render(query, MARK, instruction)
        before, after = marked.split(MARK, 1) if self.document_first else marked.rsplit(MARK, 1)
        room = self.max_length - len(tail_ids(self.tokenizer, after))
        if len(self._ids(query, "", instruction)) > self.max_length:
            return self._fit_query(query, instruction), ""
        if len(self._ids(query, document, instruction)) <= self.max_length:
            return query, document
        # Cut the rendered text, and return as many characters of the original. The template may lengthen the text
        # (control tokens get a space), so _shorten() removes any excess.
        whole = self._render(query, document, instruction)
        text = whole[: len(whole) - len(after)]
        document = document[: max(0, self._end(text, room) - len(before))]
        return query, self._shorten(query, document, instruction)

    def _shorten(self, query: str, document: str, instruction: str | None) -> str:
        """The beginning of the document that fits beside the whole query."""
        if self.separate:
            return self._fit_alone(document, self.max_length)
        while document and (over := len(self._ids(query, document, instruction)) - self.max_length) > 0:
            n = len(self._offsets(document))
            document = self.head(document, n - over if over < n else n // 2)
        return document

    def _fit_query(self, query: str, instruction: str | None) -> str:
        frame = len(self._ids("", "", instruction))
        query = self.head(query, max(0, self.max_length - frame))
        while query and len(self._ids(query, "", instruction)) > self.max_length:
            query = self.head(query, len(self._offsets(query)) - 1)
        return query

    def _fit_pair(self, query: str, document: str) -> tuple[str, str]:
        length = self.max_length
        if len(self.tokenizer(query, document)["input_ids"]) <= length:
            return query, document
        while True:
            batch = self.tokenizer(
                query, document, truncation="longest_first", max_length=length, return_offsets_mapping=True
            )
            ends, counts = [0, 0], [0, 0]
            for segment, (_, end) in zip(batch.sequence_ids(0), batch["offset_mapping"], strict=True):
                if segment is not None:
                    ends[segment], counts[segment] = max(ends[segment], end), counts[segment] + 1
            # Offsets leave out white space at a text's end, so a text that lost no token is returned unchanged.
            kept = [counts[i] == len(self._offsets(text)) for i, text in enumerate((query, document))]
            fitted = query if kept[0] else query[: ends[0]], document if kept[1] else document[: ends[1]]
            longer = (
                query[: after_marks(query, len(fitted[0]))],
                document[: after_marks(document, len(fitted[1]))],
            )
            if longer != fitted and self.tokenizer(*longer)["input_ids"] == batch["input_ids"]:
                fitted = longer
            if len(self.tokenizer(*fitted)["input_ids"]) <= self.max_length or length < 8:
                return fitted
            length -= 1  # cutting inside a word may add a token

    def _fit_alone(self, text: str, length: int) -> str:
        fixed = len(self.tokenizer("")["input_ids"])
        room = length - fixed
        while len(self.tokenizer(text)["input_ids"]) > length and room > 0:
            text = self.head(text, room)
            room -= 1
        return text

    # --- measuring ---

    def _enough(self, text: str) -> str:
        """A prefix of the text with more tokens than any prompt holds, or the whole text."""
        most = max(self.max_length, self.query_length)
        n_chars = 8 * most
        while n_chars < len(text) and len(self._offsets(text[:n_chars])) <= most:
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

    def _end(self, text: str, n_tokens: int, *, special: bool = True) -> int:
        """Number of characters in the first n tokens. A character made of several tokens is never split.

        Args:
            special: the tokenizer adds its special tokens, which count.
        """
        batch = self.tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
        offsets = batch["offset_mapping"]
        if len(offsets) <= n_tokens:
            return len(text)
        end = min(offsets[n_tokens - 1][1], offsets[n_tokens][0]) if n_tokens > 0 else 0
        # A mark goes with its letter if the prompt then has the model's tokens.
        for stop in range(end, last + 1) if (last := after_marks(text, end)) > end else ():
            ids = self.tokenizer(text[:stop], add_special_tokens=special)["input_ids"]
            if ids == batch["input_ids"][:n_tokens]:
                return stop
        return end

    def head(self, text: str, n_tokens: int) -> str:
        """The text of the first n tokens."""
        return text[: self._end(text, n_tokens, special=False)]


def late_fitter(tokenizer, late: Late) -> Fitter:
    """A Fitter for the two texts of a late interaction model, which have lengths of their own."""
    frame = len(tokenizer("")["input_ids"])
    rooms = []
    for is_query, prompt in ((False, late.document_prompt), (True, late.query_prompt)):
        rooms.append(late.text_room(is_query, len(tokenizer(prompt)["input_ids"]) - frame))
    return Fitter(tokenizer, None, rooms[0], separate=True, query_length=rooms[1])

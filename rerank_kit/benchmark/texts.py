"""The texts a benchmark sends: of given lengths, or from a user's file."""

import json
import math
import random
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from rerank_kit.offline.records import UNREADABLE, Broken, read_records

SERIAL_WORDS = 5  # words that number a text: 50 ** 5 texts before one comes again
MOST_SHOWN = 5  # broken records of a file that are named one by one
LONGEST = 32768  # words or tokens of a text
# Common English words, about one token each for the usual tokenizers.
WORDS = re.findall(
    r"\w+",
    """able above across air animal answer area art back bank beach bear bird black board boat body book bread bridge
    brother build camp capital car city clear cloud coast cold color country dance daughter day doctor dollar door
    dream earth east edge engine evening fire fish floor forest friend garden""",
)


@dataclass(frozen=True)
class Lengths:
    """Lengths of texts in words or tokens: `128`, `64-512` (uniform), `lognormal:200,0.8` (mean, sigma of the log)."""

    spec: str
    kind: str
    low: float  # fixed: the length | uniform: the least | lognormal: the mean
    high: float  # uniform: the most | lognormal: sigma

    @classmethod
    def parse(cls, spec: str) -> "Lengths":
        """Raises ValueError for a text that names no distribution, or lengths outside 5..32768."""
        number = r"(\d+(?:\.\d+)?)"
        if found := re.fullmatch(r"(\d+)(?:-(\d+))?", spec):
            kind = "uniform" if found[2] else "fixed"
            low, high = float(found[1]), float(found[2] or found[1])
            wrong = high < low or high > LONGEST
        elif found := re.fullmatch(rf"lognormal:{number},{number}", spec):
            kind, low, high = "lognormal", float(found[1]), float(found[2])
            wrong = low > LONGEST or not 0 < high <= 3
        else:
            raise ValueError(f"{spec!r} is not a length: write 128, 64-512 or lognormal:MEAN,SIGMA")
        if wrong or low < SERIAL_WORDS:
            raise ValueError(f"{spec!r} is out of range: lengths of {SERIAL_WORDS} to {LONGEST}, sigma up to 3")
        return cls(spec, kind, low, high)

    def draw(self, rng: random.Random) -> int:
        """One length; a lognormal one is kept within 5..32768."""
        if self.kind == "lognormal":
            # exp(mu + sigma**2 / 2) is the mean of a lognormal distribution.
            drawn = round(rng.lognormvariate(math.log(self.low) - self.high**2 / 2, self.high))
            return min(max(drawn, SERIAL_WORDS), LONGEST)
        low, high = int(self.low), int(self.high)
        return rng.randint(low, high) if self.kind == "uniform" else low

    @property
    def most(self) -> int:
        return LONGEST if self.kind == "lognormal" else int(self.high)


class Texts:
    """Queries and documents from a seed: call k always gets the same texts, and no two calls share one.

    Args:
        doc, query: lengths in words.
        repeat: None; "query" = all calls share their query; "all" = query and documents.
        words: vocabulary; with that of one_token_words(), lengths are in tokens. None = WORDS.
    """

    lines = None  # how many calls there are before texts come again; None = no end

    def __init__(
        self,
        seed: int,
        n_docs: int,
        doc: str = "100",
        query: str = "10",
        repeat: str | None = None,
        words: list[str] | None = None,
    ):
        rng = random.Random(seed)
        self.seed, self.n_docs, self.repeat = seed, n_docs, repeat
        self.doc, self.query = Lengths.parse(doc), Lengths.parse(query)
        self.words = rng.sample(words or WORDS, len(words or WORDS))
        self.ring = rng.choices(words or WORDS, k=20_000 + max(self.doc.most, self.query.most))
        unit = "tokens" if words else "words"
        again = {None: "new for each call", "query": "one query for all calls", "all": "the same for all calls"}
        self.about = f"{n_docs} documents of {doc} {unit} a call, query of {query} {unit}, {again[repeat]}"

    def _text(self, serial: int, lengths: Lengths, rng: random.Random) -> str:
        # The serial number comes first, lowest digit first: texts differ from their first tokens on, and
        # the prefix cache finds nothing. Slices of ready text keep this cheap beside the calls in flight.
        opening = []
        for _ in range(SERIAL_WORDS):
            serial, digit = divmod(serial, len(self.words))
            opening.append(self.words[digit])
        n_words, at = lengths.draw(rng), rng.randrange(20_000)
        return " ".join(opening + self.ring[at : at + n_words - SERIAL_WORDS])

    def of_call(self, k: int) -> tuple[str, list[str]]:
        """Query and n_docs documents of call k."""
        q, d = (0 if self.repeat else k), (0 if self.repeat == "all" else k)
        query = self._text(q, self.query, random.Random(f"{self.seed} query {q}"))
        rng = random.Random(f"{self.seed} documents {d}")
        return query, [self._text(d * self.n_docs + i, self.doc, rng) for i in range(self.n_docs)]

    def body(self, endpoint: str, model: str, k: int) -> tuple[bytes, int]:
        """JSON body of call k, and how many documents it has."""
        return json_body(endpoint, model, *self.of_call(k)), self.n_docs


class FileTexts:
    """Calls from a file, in an order from the seed: records of a query and its documents, or pairs.

    The file is read as those of offline scoring are (offline/records.py): JSON lines, CSV, TSV or Parquet. Pairs with
    the same query and instruction that follow each other are one call. A record's "instruction" is sent with it. A
    broken record is left out and reported. After the last call the file starts over, and the prefix cache may hold
    its texts.

    Raises:
        ValueError: no call at all. OSError: no such file, or one that cannot be read.
    """

    def __init__(self, path: str, seed: int):
        self.calls: list[tuple[str, list[str], str | None]] = []
        self.broken: list[str] = []
        before: tuple | None = None  # query and instruction of the pair before
        try:
            for number, row in read_records(Path(path)):
                call = _call_of(row)
                if isinstance(call, Broken):
                    self.broken.append(f"{path} line {number} is left out: {call.reason}")
                    continue
                query, documents, instruction = call
                same = isinstance(row, dict) and "document" in row and (query, instruction)
                if same and same == before:
                    self.calls[-1][1].extend(documents)
                else:
                    self.calls.append(call)
                before = same or None
        except UNREADABLE as exc:
            raise exc if getattr(exc, "filename", None) else OSError(None, str(exc), path) from None
        for text in self.broken[:MOST_SHOWN]:
            print(f"[WARN] {text}", file=sys.stderr)
        if len(self.broken) > MOST_SHOWN:
            print(f"[WARN] {path}: {len(self.broken)} records are left out in all", file=sys.stderr)
        if not self.calls:
            raise ValueError(f"{path} has no calls" + (f": {self.broken[0]}" if self.broken else ": it is empty"))
        random.Random(seed).shuffle(self.calls)
        self.seed, self.lines = seed, len(self.calls)
        self.about = f"{path}: {self.lines} calls of {sum(len(c[1]) for c in self.calls) / self.lines:.1f} documents"

    def body(self, endpoint: str, model: str, k: int) -> tuple[bytes, int]:
        """JSON body of call k, and how many documents it has."""
        query, documents, instruction = self.calls[k % self.lines]
        return json_body(endpoint, model, query, documents, instruction), len(documents)


def _call_of(row: dict | Broken) -> tuple[str, list[str], str | None] | Broken:
    """(query, documents, instruction) of a record."""
    if isinstance(row, Broken):
        return row
    query, instruction = row.get("query"), row.get("instruction")
    documents = row["documents"] if "documents" in row else [row.get("document")]
    if not isinstance(documents, list) or not documents:
        return Broken("field 'documents' is not a list of texts")
    if not isinstance(query, str) or not all(isinstance(text, str) for text in documents):
        return Broken('it is not {"query": "...", "documents": ["...", ...]} or {"query": "...", "document": "..."}')
    if not isinstance(instruction, str | None):
        return Broken("field 'instruction' is not a text")
    return query, [*documents], instruction


def json_body(endpoint: str, model: str, query: str, documents: list[str], instruction: str | None = None) -> bytes:
    # text_1 / text_2: the spelling of the Score API that every vLLM knows.
    names = ("query", "documents") if endpoint == "rerank" else ("text_1", "text_2")
    more = {} if instruction is None else {"instruction": instruction}
    return json.dumps({"model": model, names[0]: query, names[1]: documents, **more}).encode()


def one_token_words(folder: str) -> list[str]:
    """Words of which each is one token of the tokenizer in `folder`, first in a text or after a space.

    Raises:
        ValueError: no tokenizer.json, the package `tokenizers` is missing, or fewer than 20 such words.
    """
    try:
        from tokenizers import Tokenizer  # comes with vLLM; needed for lengths in tokens only

        tokenizer = Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
        tokenizer.no_truncation()  # both may be set in the file
        tokenizer.no_padding()
    except ImportError:
        raise ValueError("lengths in tokens need the package tokenizers: pip install tokenizers") from None
    except Exception as exc:  # tokenizers raises bare Exception
        raise ValueError(f"no tokenizer in {folder}: {exc}") from None

    def tokens(text: str) -> int:
        return len(tokenizer.encode(text, add_special_tokens=False).ids)

    words = [w for w in WORDS if tokens(w) == 1 and tokens(f"{w} {w} {w}") == 3]
    joined = random.Random(0).choices(words, k=1000) if words else []
    if len(words) < 20 or tokens(" ".join(joined)) != 1000:
        raise ValueError(f"the tokenizer in {folder} has too few English words as one token: use lengths in words")
    return words

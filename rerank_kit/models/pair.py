"""One query with one document: the unit that all scoring code passes on."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Pair:
    """One query with one document; `line` is its number in the input file, `extra` its id."""

    query: str
    document: str
    instruction: str | None = None
    line: int = 0
    extra: tuple = ()
    images: tuple[str | None, str | None] = (None, None)  # addresses of the query's and the document's image

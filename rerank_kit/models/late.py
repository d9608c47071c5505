"""How a late interaction model (ColBERT) reads a query and a document, and its score: MaxSim.

The guard inside vLLM and offline scoring use it: numbers only, no files and no settings.

Source: ColBERT.tokenize() and encode() of package pylate 1.6.0, whose files say these numbers (models/colbert.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Late:
    """The rules of one checkpoint. Lengths count every token of a prompt; None = the model has no such token."""

    query_length: int
    document_length: int
    query_marker: int | None = None  # the token behind the first one
    document_marker: int | None = None
    expansion: int | None = None  # the token that fills every query up to query_length
    skip: tuple[int, ...] = ()  # tokens of a document that are no match for a query token (punctuation)
    query_prompt: str = ""
    document_prompt: str = ""

    def text(self, text: str, is_query: bool) -> str:
        """What is tokenized: the saved prompt and the text, without white space at both ends."""
        return ((self.query_prompt if is_query else self.document_prompt) + text).strip()

    def room(self, is_query: bool) -> int:
        """Tokens that a text may have with the tokenizer's first and last one, and without a marker."""
        if is_query:
            return self.query_length - (self.query_marker is not None)
        return self.document_length - (self.document_marker is not None)

    def text_room(self, is_query: bool, prompt_tokens: int) -> int:
        """room() without the saved prompt, which has so many tokens."""
        return max(4, self.room(is_query) - prompt_tokens)

    def prompt(self, ids: Sequence[int], is_query: bool) -> tuple[list[int], bool]:
        """(token ids of the prompt, cut) of a text()'s own ids. The last token, [SEP], stays."""
        room = self.room(is_query)
        cut = len(ids) > room
        out = [*ids[: room - 1], ids[-1]] if cut else list(ids)
        marker = self.query_marker if is_query else self.document_marker
        if marker is not None:
            out.insert(1, marker)
        if is_query and self.expansion is not None:
            out += [self.expansion] * (self.query_length - len(out))
        return out, cut


def maxsim(query: Any, document: Any, document_ids: Sequence[int], skip: Sequence[int]) -> Any:
    """Sum over the query's vectors of the best dot product with one of the document's; vectors have length 1.

    Args:
        query, document: tensors [tokens, size], of the prompts as a whole.
        document_ids: the document's tokens; those in `skip` are no match.
    """
    if skip:
        ignored = set(skip)
        document = document[[i for i, token in enumerate(document_ids) if token not in ignored]]
    return (query.float() @ document.float().T).amax(dim=1).sum()

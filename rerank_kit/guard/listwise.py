"""Calls to a listwise model, whose score of a document depends on the other documents of the call: never split.

One call is one prompt. Its documents and tokens have limits, which are refused with the number. Control tokens in the
texts become ordinary text here, because vLLM writes this prompt itself, without a template of the kit's.

Source: rerank() in modeling.py of jinaai/jina-reranker-v3, and JinaRankingIOProcessor of vLLM 0.32.0.
"""

import asyncio
from typing import Any

from rerank_kit.guard.answers import Refusal
from rerank_kit.guard.long_bodies import _fields, _limit
from rerank_kit.guard.long_documents import LongDocuments, plain_tokenizer
from rerank_kit.models.fitting import Fitter

# rerank() of the model's own code makes another prompt from the 126th document on, and mixes the scores of the two.
MOST_DOCUMENTS = 125
# It cuts each document and the query to so many tokens.
DOCUMENT_TOKENS, QUERY_TOKENS = 2048, 512


class Lists(LongDocuments):
    """LongDocuments of a listwise model: cuts single documents, and refuses what would divide a list."""

    def choose_mode(self, call, payload: dict) -> str | None:
        asked = super().choose_mode(call, payload)
        if call.mode == "chunk":
            text = "this model is listwise, so a document has no windows of its own: use truncate or error"
            raise Refusal(422, "long", text, param="long_documents")
        call.mode = call.mode or "truncate"
        call.requests = 1
        fields = _fields(payload)
        if call.asked.groups or (fields and len(fields[1]) > 1):
            text = "this model is listwise, and several queries in one call would score each document alone"
            raise Refusal(422, "field", f"{text}: send one call a query", param="queries")
        if fields and len(fields[3]) > MOST_DOCUMENTS:
            text = f"{len(fields[3])} documents, and this listwise model takes {MOST_DOCUMENTS} in a call"
            raise Refusal(413, "docs", f"{text}: keep the best of an earlier stage", param=fields[2])
        return asked

    async def prepare(self, scope) -> None:
        if self.fitter is None:
            self.fitter = await asyncio.get_running_loop().run_in_executor(self.worker, ListFitter, scope)

    async def fit(self, scope, call, body: bytes, receive) -> bytes | None:
        await self.prepare(scope)
        done = await self._in_worker(call, receive, fit_list, self.fitter, call)
        if call.aborted:
            return None
        call.cut = done or []
        return self.encode(call.payload)


class ListFitter:
    """What fit_list() needs of the served model: its tokenizer, vLLM's own way to write the prompt, its length."""

    def __init__(self, scope):
        served = scope["app"].state.serving_scores.io_processor  # vLLM's own, not a documented interface
        config = served.model_config
        self.max_length = config.max_model_len
        self.prompt = served.format_docs_prompts_func
        self.tokenizer = plain_tokenizer(config.tokenizer, config.trust_remote_code)
        self.head = Fitter(self.tokenizer, None, self.max_length, separate=True).head
        # <|fim_prefix|> and its like are not marked as special, but are control tokens all the same.
        added = self.tokenizer.added_tokens_decoder.values()
        self.control = sorted({t.content for t in added if t.special or t.content.startswith("<|")}, key=len)[::-1]

    def plain(self, text: str) -> str:
        """The text with a space in the spelling of control tokens, as in the kit's templates."""
        for token in self.control if "<" in text else ():
            cut = 2 if token.startswith("<|") else 1
            text = text.replace(token, f"{token[:cut]} {token[cut:]}")
        return text

    def count(self, text: str) -> int:
        return len(self.tokenizer(text)["input_ids"])


def fit_list(fitter: ListFitter, call: Any) -> list[int]:
    """Put the texts of a call as they are scored into its payload.

    Returns:
        The documents that were cut; all of them if the query was.

    Raises:
        Refusal: the list has more tokens than the model takes, or a text does in a call that allows no cut.
    """
    payload = call.payload
    fields = _fields(payload)
    if fields is None:  # vLLM says what is wrong
        return []
    query_name, queries, documents_name, documents = fields
    per_query = _limit(payload, "max_tokens_per_query") or QUERY_TOKENS
    query = _shorter(fitter, call, query_name, queries[0], per_query)
    per_doc = _limit(payload, "max_tokens_per_doc") or DOCUMENT_TOKENS
    texts = [_shorter(fitter, call, f"{documents_name}[{i}]", text, per_doc) for i, text in enumerate(documents)]
    cut = [i for i, (old, new) in enumerate(zip(documents, texts, strict=True)) if old != new]
    cut = list(range(len(texts))) if query != queries[0] else cut
    plain = [fitter.plain(text) for text in texts]
    query = fitter.plain(query)
    n_tokens = fitter.count(fitter.prompt(query, plain))
    if n_tokens > fitter.max_length:
        text = f"query and documents make one prompt of {n_tokens} tokens"
        text += f", the limit is {fitter.max_length} (MAX_MODEL_LEN)"
        raise Refusal(413, "docs", f"{text}: send fewer documents, or max_tokens_per_doc", param=documents_name)
    if plain != texts and not call.asked.originals:
        call.asked.originals = [{"text": text} for text in texts]
    for name in ("max_tokens_per_query", "max_tokens_per_doc"):  # done here
        payload.pop(name, None)
    payload[query_name] = [query] if isinstance(payload[query_name], list) else query
    payload[documents_name] = plain if isinstance(payload[documents_name], list) else plain[0]
    return cut


def _shorter(fitter: ListFitter, call: Any, name: str, text: str, limit: int) -> str:
    if len(text.encode()) <= limit:  # a token has at least one byte
        return text
    shorter = fitter.head(text, limit)
    if shorter != text and call.mode == "error":
        raise Refusal(400, "long", f"{name} has more than {limit} tokens (long_documents=error)", param=name)
    return shorter

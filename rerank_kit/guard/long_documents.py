"""What the guard does with pairs that are longer than the model takes: cut, refuse or split into windows, and say so.

The Guard has one LongDocuments in each API process; long_bodies.py and models/fitting.py do the text work.
docs/guard.md describes the field `long_documents` and the two headers, docs/scores.md what each way scores.
"""

import asyncio
import logging
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from rerank_kit.guard.answers import Refusal
from rerank_kit.guard.long_bodies import (
    LIMITS,
    cut_by_limits,
    fit_payload,
    keep_separators,
    payload_fits_surely,
    split_payload,
)
from rerank_kit.models.fitting import MODES, EmptyTextCounts, Fitter, TooManyWindows

MAX_LIST_BYTES = 1500  # of one header that lists documents; two of them and the rest stay below 4 KB

logger = logging.getLogger("vllm.rerank_guard")  # below "vllm": its handler and level


class LongDocuments:
    """Fits the texts of scoring calls to the model. A call keeps what was done in .mode, .cut and .split.

    take_windows(call) admits a call once more by its windows, or raises Refusal.
    """

    def __init__(self, max_docs: int, encode: Callable[[dict], bytes], take_windows: Callable):
        self.max_docs, self.encode, self.take_windows = max_docs, encode, take_windows
        self.default = os.environ.get("GUARD_LONG_DOCUMENTS", "")
        if self.default not in ("", *MODES):
            raise ValueError(f"GUARD_LONG_DOCUMENTS={self.default!r} is unknown: allowed is {', '.join(MODES)}")
        self.fitter: Any = None  # made before the service is ready
        self.worker = ThreadPoolExecutor(1, "guard-tokenizer")  # one thread: a fast tokenizer is not thread-safe

    def choose_mode(self, call, payload: dict) -> str | None:
        """Set what happens to this call's long pairs. Returns the call's own value."""
        asked = payload.pop("long_documents", None)
        if asked is not None and asked not in MODES:
            text = f"long_documents={ascii(asked)[:40]} is unknown: allowed is {', '.join(MODES)}"
            raise Refusal(422, "long", text, param="long_documents")
        if call.asked.fits and (asked or self.default) not in ("truncate", "chunk"):
            asked = "truncate"
        limit = payload.get("max_tokens_per_doc")
        if asked in ("error", "chunk") and limit:
            text = f"max_tokens_per_doc cuts documents: it cannot be combined with long_documents={asked}"
            raise Refusal(422, "long", text, param="max_tokens_per_doc")
        # In vLLM, max_tokens_per_doc: 0 means the whole document, or an error.
        call.mode = asked or ("error" if limit == 0 and limit is not False else self.default)
        if call.mode == "chunk" and limit:  # the server's default is chunk, but this call asks for a cut
            call.mode = "truncate"
        return asked

    async def prepare(self, scope) -> None:
        """Load the tokenizer, if a call may need it and it is not loaded."""
        if self.fitter is None:
            self.fitter = await asyncio.get_running_loop().run_in_executor(self.worker, make_fitter, scope)

    async def fit(self, scope, call, body: bytes, receive) -> bytes | None:
        """The body that vLLM gets: texts that are too long for the model cut or split. None = the client left."""
        if not call.mode:
            return body
        await self.prepare(scope)
        if not self.fitter:
            if call.mode == "chunk" and call.asked.max_windows:
                call.mode = ""  # at most N windows: one is right too, and vLLM refuses what is too long
            if call.mode == "chunk":
                raise Refusal(422, "long", "this server cannot split documents: see its log", param="long_documents")
            return body
        if payload_fits_surely(self.fitter, call.payload):
            return body
        if call.mode == "error":
            keep_separators(self.fitter, call.payload)
            if any(call.payload.get(name) for name in LIMITS):  # which vLLM applies
                call.cut = await self._in_worker(call, receive, cut_by_limits, self.fitter, call.payload) or []
        elif call.mode == "chunk":
            try:
                limits = self.max_docs, call.asked.max_windows, call.asked.overlap
                done = await self._in_worker(call, receive, split_payload, self.fitter, call.payload, *limits)
            except TooManyWindows as exc:
                limit = f"the limit is {self.max_docs} (MAX_DOCS_PER_CALL)"
                text = f"the documents make {exc} windows or more, {limit}: send fewer documents a call, or truncate"
                raise Refusal(413, "docs", text, param="long_documents") from exc
            call.split, call.cut = done or (None, [])
            if call.split:
                self.take_windows(call)
        else:
            call.cut = await self._in_worker(call, receive, fit_payload, self.fitter, call.payload) or []
        return None if call.aborted else self.encode(call.payload)

    async def _in_worker(self, call, receive, work: Callable, *args) -> Any:
        """work(*args) in the tokenizer's thread; None if the client disconnects first, which frees its place."""
        job = asyncio.get_running_loop().run_in_executor(self.worker, work, *args)
        leaves = asyncio.ensure_future(receive())  # the body is read: what comes now is a disconnect
        try:
            await asyncio.wait((job, leaves), return_when=asyncio.FIRST_COMPLETED)
            if job.done():
                return job.result()
            call.aborted = True
            return None
        finally:
            job.cancel()
            leaves.cancel()

    def headers(self, call) -> list[tuple[bytes, bytes]]:
        """X-Rerank-Cut and X-Rerank-Windows of the answer."""
        headers = []
        if call.cut:
            headers.append((b"x-rerank-cut", listed(dict.fromkeys(call.cut, ""))))
        if call.mode == "chunk":
            counts = call.split.counts if call.split else {}
            # Never empty: a proxy may drop an empty header, and the client learns from it that windows were made.
            counts = counts if call.lookup is None else call.lookup.windows
            headers.append((b"x-rerank-windows", listed({i: f":{n}" for i, n in counts.items()}) or b"none"))
        return headers


def served_length(scope) -> int:
    """MAX_MODEL_LEN of the model that this process serves; 0 where it cannot be known."""
    try:
        return int(scope["app"].state.serving_scores.io_processor.model_config.max_model_len)
    except (AttributeError, KeyError, TypeError, ValueError):  # another release of vLLM
        return 0


def make_fitter(scope):
    """A Fitter for the model that this process serves; False where it cannot be known."""
    try:
        served = scope["app"].state.serving_scores.io_processor  # vLLM's own, not a documented interface
        template, separate = getattr(served, "chat_template", None), served.name == "bi-encoder"
        if not separate and (served.name != "cross-encoder" or not (template or served.use_sep_token)):
            raise LookupError(f"scoring of kind {served.name}")
        config = served.model_config
        tokenizer = plain_tokenizer(config.tokenizer, config.trust_remote_code)
        fitter = Fitter(tokenizer, None if separate else template, config.max_model_len, separate=separate)
        if fitter.needs_cover:
            served.tokenizer = EmptyTextCounts(served.tokenizer)
        return fitter
    except Exception as exc:  # another release of vLLM: long texts get vLLM's own 400
        logger.warning("guard: long documents are not cut (%s: %s)", type(exc).__name__, exc)
        return False


def plain_tokenizer(name: str, trust_remote_code: bool):
    """transformers' own tokenizer, which knows the characters of its tokens; the one of fastokens does not."""
    import transformers

    patched = os.environ.get("VLLM_USE_FASTOKENS") == "1"  # vLLM has patched transformers in this process
    if patched:
        import fastokens

        fastokens.unpatch_transformers()
    try:
        return transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    finally:
        if patched:
            fastokens.patch_transformers()


def listed(values: dict[int, str]) -> bytes:
    """Header value `0-3,7` or `0-3:2,7:5`: documents, or runs of documents with the same value.

    A long list ends with "...": nginx takes 4 KB of headers, aiohttp 8 KB a line.
    """
    runs: list[list] = []  # [first, last, value]
    for index, value in sorted(values.items()):
        if runs and runs[-1][1:] == [index - 1, value]:
            runs[-1][1] = index
        else:
            runs.append([index, index, value])
    text = ",".join((f"{first}-{last}" if last > first else f"{first}") + value for first, last, value in runs)
    return (text if len(text) <= MAX_LIST_BYTES else text[:MAX_LIST_BYTES].rpartition(",")[0] + ",...").encode()

"""What the service enforces on every request: key, paths, limits, defaults, admission, metrics.

`vllm serve --middleware server_guard.Guard` loads this plain ASGI class (the kit's folder on PYTHONPATH). Each API
process has its own Guard. Settings come from the environment, GUARD_<KEY> for the keys of group "guard" in
env_utils.py, and VLLM_API_KEY; what is unset, empty or 0 is off. docs/guard.md describes every limit and error.

Source: vllm/entrypoints/serve/middleware and vllm/entrypoints/pooling/scoring of vLLM 0.32.0.
"""

import asyncio
import functools
import hashlib
import hmac
import json
import logging
import math
import os
import re
import threading
import time
import types
import uuid
from concurrent.futures import ThreadPoolExecutor

from guard_rules import FIRST_PAIRS, MAX_DEPTH, Load, Refusal, parse
from long_documents import (
    MODES,
    EmptyTextCounts,
    Fitter,
    Split,
    TooManyWindows,
    fit_payload,
    keep_separators,
    merge_windows,
    payload_fits_surely,
    split_payload,
)

RERANK_FIELDS = ("documents",)
# The four spellings that vLLM's score routes take. All are counted: a body may hold several.
SCORE_FIELDS = ("queries", "documents", "items", "text_1", "text_2", "data_1", "data_2")
SCORING = {
    **dict.fromkeys(("/rerank", "/v1/rerank", "/v2/rerank"), RERANK_FIELDS),
    **dict.fromkeys(("/score", "/v1/score"), SCORE_FIELDS),
}
NO_KEY_PATHS = frozenset(("/health", "/live", "/ready"))
PATHS = NO_KEY_PATHS | {"/ping", "/version", "/metrics", "/load", "/v1/models", *SCORING}
MEDIA_FIELDS = frozenset(("image_url", "image_embeds", "video_url", "audio_url"))  # base64, not text

DRAIN_RETRY_S = 5
MAX_LIST_BYTES = 1500  # of one header that lists documents; two of them and the rest stay below 4 KB

ERROR_TYPES = {400: "BadRequestError", 401: "AuthenticationError", 404: "NotFoundError", 413: "ContentTooLargeError"}
ERROR_TYPES |= {422: "UnprocessableEntityError", 429: "TooManyRequestsError", 503: "ServiceUnavailableError"}

logger = logging.getLogger("vllm.server_guard")  # below "vllm": its handler and level
# vLLM 0.32 warns at each call of /v1/score (api_router.py) that the route is not part of OpenAI's API.
SCORE_LOGGER, SCORE_WARNING = "vllm.entrypoints.pooling.scoring.api_router", "Score API is not part of standard OpenAI"


class Call:
    """State of one HTTP request."""

    def __init__(self, scope: dict):
        # The first of a repeated header counts, as in vLLM's own key check.
        self.headers = dict(reversed(scope["headers"]))
        self.path = scope["path"].removeprefix(scope.get("root_path", ""))
        self.scoring = scope["method"] == "POST" and self.path in SCORING
        given = self.headers.get(b"x-request-id", b"")
        self.request_id = given if re.fullmatch(rb"[!-~]{1,128}", given) else uuid.uuid4().hex.encode()
        self.payload: dict = {}
        self.mode = ""  # what happens to pairs that are too long: one of MODES; "" = vLLM's 400
        self.cut: list[int] = []  # documents of which the model sees a part only
        self.split: Split | None = None
        self.start_s = time.perf_counter()
        self.status = 0  # 0 = no answer yet
        self.pairs = self.n_bytes = 0
        self.in_flight = self.aborted = self.has_own_id = False


class Guard:
    """ASGI middleware around vLLM's app. Raises ValueError for a setting that cannot be used: the server stops."""

    def __init__(self, app):
        import msgspec  # vLLM requires it; 8 times faster than json.dumps

        self.app = app
        self.encode = msgspec.json.encode
        self.max_docs = _setting("MAX_DOCS_PER_CALL")
        self.max_bytes = _setting("MAX_BODY_BYTES")
        self.max_chars = _setting("MAX_CHARS_PER_FIELD")
        self.slow_ms = _setting("SLOW_CALL_MS", float)
        self.defaults = {f"max_tokens_per_{x}": _setting(f"MAX_TOKENS_PER_{x.upper()}") for x in ("doc", "query")}
        extra = {path.strip() for path in os.environ.get("GUARD_ALLOW_PATHS", "").split(",") if path.strip()}
        if wrong := sorted(path for path in extra if not path.startswith("/")):
            raise ValueError(f"GUARD_ALLOW_PATHS: {wrong[0]!r} is not a path: write /{wrong[0]}")
        self.paths = PATHS | extra
        key = os.environ.get("VLLM_API_KEY")
        self.key_hash = hashlib.sha256(key.encode()).digest() if key else None
        # Each API process admits its share; vLLM spreads connections evenly over the processes.
        share = _setting("API_SERVERS") or 1
        max_pairs = math.ceil(_setting("MAX_PAIRS_IN_FLIGHT") / share)
        first_pairs = math.ceil((_setting("FIRST_PAIRS") or FIRST_PAIRS) / share)
        self.load = Load(max_pairs, _setting("MAX_WAIT_S", float), first_pairs)
        self.metrics = _metrics()
        logging.getLogger(SCORE_LOGGER).addFilter(_once(SCORE_WARNING))
        self.long_mode = os.environ.get("GUARD_LONG_DOCUMENTS", "")
        if self.long_mode not in ("", *MODES):
            raise ValueError(f"GUARD_LONG_DOCUMENTS={self.long_mode!r} is unknown: allowed is {', '.join(MODES)}")
        self.takes_instruction = os.environ.get("GUARD_TAKES_INSTRUCTION", "1") != "0"
        self.fitter = None  # made by the first scoring call, which is start's own probe
        self.worker = ThreadPoolExecutor(1, "guard-tokenizer")  # one thread: a fast tokenizer is not thread-safe
        self.draining = False
        self.tasks = set()  # of the calls in flight
        limits = {k: v for k, v in vars(self).items() if k.startswith("max_")}
        logger.info(
            "guard: %s, %s, pairs in flight %s (1/%d of the service), wait %s s, key %s (0 = off)",
            limits, self.defaults, max_pairs, share, self.load.max_wait_s, "on" if key else "off",
        )  # fmt: skip

    async def __call__(self, scope, receive, send):
        if scope["type"] == "websocket":  # no scoring route is one
            await receive()
            return await send({"type": "websocket.close", "code": 1008})
        if scope["type"] != "http":
            self._watch_stop(scope)
            return await self.app(scope, receive, send)
        call = Call(scope)

        async def answer(message):
            if message["type"] == "http.response.start":
                call.status = message["status"]
                # The scores exist now: a client that reads slowly holds no pairs.
                self._release(call)
                headers = [pair for pair in message.get("headers", ()) if pair[0].lower() != b"x-request-id"]
                headers.append((b"x-request-id", call.request_id))
                if call.cut:
                    headers.append((b"x-rerank-cut", _listed(dict.fromkeys(call.cut, ""))))
                if call.mode == "chunk":
                    counts = call.split.counts if call.split else {}
                    # Never empty: a proxy may drop an empty header, by which the client knows that windows were made.
                    headers.append((b"x-rerank-windows", _listed({i: f":{n}" for i, n in counts.items()}) or b"none"))
                message = {**message, "headers": headers}
            await send(message)

        async def watched_receive():
            message = await receive()
            if message["type"] == "http.disconnect" and not call.status:
                call.aborted = True  # vLLM cancels the call and answers into the void
            return message

        try:
            self._check_access(call)
            if call.path == "/live":
                return await _send_json(answer, 200, {"status": "live"})
            if call.path == "/ready":
                return await self._ready(scope, watched_receive, answer)
            if call.scoring:
                body = await self._admit(call, watched_receive)
                if body is None:  # the client left while it sent
                    return None
                body = await self._fit(scope, call, body, watched_receive)
                if body is None:
                    return None
                scope = {**scope, "headers": _inner_headers(scope["headers"], call, len(body))}
                reply = self._merged(call.split, answer) if call.split else answer
                return await self.app(scope, _replay(body, watched_receive), reply)
            return await self.app(scope, watched_receive, answer)
        except Refusal as exc:
            self.metrics.refusals.labels(exc.reason).inc()
            await _send_refusal(answer, exc)
        except BaseException as exc:
            if isinstance(exc, asyncio.CancelledError) and self.draining and call.in_flight:
                return await _send_refusal(answer, self._stopping())
            call.status = call.status or 500
            raise
        finally:
            self._release(call)
            self._record(call)

    def _check_access(self, call: Call) -> None:
        """Key first, so that a stranger does not learn which paths exist."""
        if self.key_hash and call.path not in NO_KEY_PATHS:
            scheme, _, key = call.headers.get(b"authorization", b"").partition(b" ")
            right = hmac.compare_digest(hashlib.sha256(key).digest(), self.key_hash)
            if scheme.lower() != b"bearer" or not right:
                raise Refusal(401, "key", "wrong or missing API key: send the header 'Authorization: Bearer <key>'")
        if call.path not in self.paths:
            shown = ascii(call.path[:100])
            raise Refusal(404, "path", f"{shown} is closed here: this server scores ({', '.join(sorted(SCORING))})")

    async def _admit(self, call: Call, receive) -> bytes | None:
        """Read, check and complete one scoring call and take its pairs. None = the client left; or Refusal."""
        if self.draining:
            raise self._stopping()
        length = call.headers.get(b"content-length", b"0")
        if self.max_bytes and length.isdigit() and (len(length) > 15 or int(length) > self.max_bytes):
            raise self._too_large(length.decode()[:20])
        self.load.check(1)  # full for any call: no need to read it; uvicorn throws its body away
        body = await self._read(receive)
        if body is None:
            return None
        call.n_bytes = len(body)
        payload = parse(body)
        for name, value in payload.items():
            self._check_size(name, value, MAX_DEPTH)
        changed = self._complete(call, payload)
        if changed or b"\\u" in body:
            try:
                encoded = self.encode(payload)
            except UnicodeEncodeError as exc:
                raise Refusal(400, "json", "the body holds half of a surrogate pair (\\ud800-\\udfff)") from exc
            body = encoded if changed else body
        call.has_own_id = "request_id" in payload  # in vLLM the header would win over it
        fields = [payload[name] for name in SCORING[call.path] if name in payload]
        pairs = max([1, *(len(field) for field in fields if isinstance(field, list))])
        if self.draining:  # since the body began
            raise self._stopping()
        self.load.take(pairs)  # no await between check and count
        call.pairs, call.in_flight, call.payload = pairs, True, payload
        call.task = asyncio.current_task()
        self.tasks.add(call.task)
        self._show_load()
        return body

    async def _fit(self, scope, call: Call, body: bytes, receive) -> bytes | None:
        """Cut or split texts that are too long for the model, which two headers tell. None = the client left."""
        if not call.mode:
            return body
        if self.fitter is None:
            self.fitter = await asyncio.get_running_loop().run_in_executor(self.worker, _make_fitter, scope)
        if not self.fitter:
            if call.mode == "chunk":
                raise Refusal(422, "long", "this server cannot split documents: see its log", param="long_documents")
            return body
        if payload_fits_surely(self.fitter, call.payload):
            return body
        if call.mode == "error":
            keep_separators(self.fitter, call.payload)
        elif call.mode == "chunk":
            try:
                done = await self._in_worker(call, receive, split_payload, self.fitter, call.payload, self.max_docs)
            except TooManyWindows as exc:
                limit = f"the limit is {self.max_docs} (MAX_DOCS_PER_CALL)"
                text = f"the documents make {exc} windows or more, {limit}: send fewer documents a call, or truncate"
                raise Refusal(413, "docs", text, param="long_documents") from exc
            call.split, call.cut = done or (None, [])
            if call.split:
                self._take_windows(call)
        else:
            call.cut = await self._in_worker(call, receive, fit_payload, self.fitter, call.payload) or []
        self.metrics.cut.inc(len(call.cut))
        return None if call.aborted else self.encode(call.payload)

    async def _in_worker(self, call: Call, receive, work, *args):
        """work(*args) in the tokenizer's thread; None when the client leaves first: its place in the queue is free."""
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

    def _take_windows(self, call: Call) -> None:
        """Admit a call, let in by its documents, once more by its windows."""
        n = len(call.split.owners)
        self.load.add(-call.pairs)
        try:
            self.load.check(n)
        except Refusal:
            self.load.add(call.pairs)
            raise
        self.load.add(n)
        call.pairs = n
        self._show_load()

    def _merged(self, split: Split, send):
        """A send() that holds vLLM's answer for windows until it is whole, and sends the documents' scores instead."""
        start, chunks = {}, []

        async def merged(message):
            nonlocal start
            if message["type"] == "http.response.start":
                start = message
                return
            chunks.append(message.get("body", b""))
            if message.get("more_body"):
                return
            body = b"".join(chunks)
            if start["status"] == 200:
                body = self.encode(merge_windows(split, json.loads(body)))
            headers = [pair for pair in start.get("headers", ()) if pair[0].lower() != b"content-length"]
            headers.append((b"content-length", str(len(body)).encode()))
            await send({**start, "headers": headers})
            await send({"type": "http.response.body", "body": body})

        return merged

    async def _read(self, receive) -> bytes | None:
        chunks, size = [], 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            chunks.append(message.get("body", b""))
            size += len(chunks[-1])
            if self.max_bytes and size > self.max_bytes:
                raise self._too_large(f"more than {self.max_bytes}")
            if not message.get("more_body"):
                return b"".join(chunks)

    def _stopping(self) -> Refusal:
        return Refusal(503, "draining", "the server is stopping: send the call again later", retry_s=DRAIN_RETRY_S)

    def _too_large(self, size: str) -> Refusal:
        text = f"the body has {size} bytes, the limit is {self.max_bytes} (MAX_BODY_BYTES): send fewer documents a call"
        return Refusal(413, "bytes", text)

    def _check_size(self, name: str, value, levels: int, media: bool = False) -> None:
        """Cap list lengths, text lengths and nesting of one field; media = base64, not text."""
        if isinstance(value, str):
            if self.max_chars and len(value) > self.max_chars and not media:
                limit = f"the limit is {self.max_chars} a text (MAX_CHARS_PER_FIELD)"
                text = f"{ascii(name)[:40]} holds a text of {len(value)} characters, {limit}: shorten or split it"
                raise Refusal(422, "chars", text, param=name[:40])
        elif isinstance(value, (list, dict)):
            if not levels:
                raise Refusal(400, "json", f"the body is nested deeper than {MAX_DEPTH} levels")
            if isinstance(value, list) and self.max_docs and len(value) > self.max_docs:
                limit = f"the limit is {self.max_docs} (MAX_DOCS_PER_CALL)"
                text = f"{ascii(name)[:40]} holds {len(value)} items, {limit}: send several calls"
                raise Refusal(413, "docs", text, param=name[:40])
            for key, item in value.items() if isinstance(value, dict) else enumerate(value):
                self._check_size(name, item, levels - 1, media or key in MEDIA_FIELDS)

    def _complete(self, call: Call, payload: dict) -> bool:
        """Drop nulls, take our own fields out, fill in defaults; True = payload has changed."""
        nulls = [name for name, value in payload.items() if value is None]
        for name in nulls:  # vLLM takes null for some fields only; langchain-cohere sends max_tokens_per_doc: null
            del payload[name]
        if "truncate_prompt_tokens" in payload:
            text = (
                "truncate_prompt_tokens cuts the end of the prompt, where the model is asked for its answer, and makes "
                "the scores wrong: send max_tokens_per_doc instead"
            )
            raise Refusal(422, "truncate", text, param="truncate_prompt_tokens")
        more = payload.get("chat_template_kwargs")
        if not self.takes_instruction and (
            payload.get("instruction") or (isinstance(more, dict) and more.get("instruction"))
        ):
            text = "this model takes no instruction, and its score would not change: leave instruction out"
            raise Refusal(422, "instruction", text, param="instruction")
        asked = self._choose_mode(call, payload)
        whole = call.mode == "chunk" or asked == "error"  # the default for documents would cut
        added = {name: value for name, value in self.defaults.items() if value and name not in payload}
        if whole:
            added.pop("max_tokens_per_doc", None)
        payload |= added
        return bool(nulls or added or asked)

    def _choose_mode(self, call: Call, payload: dict) -> str | None:
        """Set what happens to this call's long pairs; gives back what the call said itself."""
        asked = payload.pop("long_documents", None)
        if asked is not None and asked not in MODES:
            text = f"long_documents={ascii(asked)[:40]} is unknown: allowed is {', '.join(MODES)}"
            raise Refusal(422, "long", text, param="long_documents")
        limit = payload.get("max_tokens_per_doc")
        if asked in ("error", "chunk") and limit:
            text = f"max_tokens_per_doc cuts documents: it excludes long_documents={asked}"
            raise Refusal(422, "long", text, param="max_tokens_per_doc")
        # max_tokens_per_doc: 0 says "whole, or an error" in vLLM's own words.
        call.mode = asked or ("error" if limit == 0 and limit is not False else self.long_mode)
        if call.mode == "chunk" and limit:  # the server's way, but this call asks for a cut
            call.mode = "truncate"
        return asked

    async def _ready(self, scope, receive, answer) -> None:
        """200 while the engine is healthy (vLLM's /health) and no stop is under way."""
        status = 503

        async def note_status(message):
            nonlocal status
            status = message.get("status", status)

        if not self.draining:
            inner = {**scope, "method": "GET", "path": "/health", "raw_path": b"/health"}
            await self.app(inner, receive, note_status)
        if status != 200:
            text = "the server is stopping" if self.draining else "the engine is not healthy: see the server's log"
            raise Refusal(503, "not_ready", text, retry_s=DRAIN_RETRY_S)
        await _send_json(answer, 200, {"status": "ready"})

    def _release(self, call: Call) -> None:
        if call.in_flight:
            call.in_flight = False
            self.tasks.discard(call.task)
            self.load.release(call.pairs, call.status == 200 and not call.aborted)
            self._show_load()

    def _show_load(self) -> None:
        self.metrics.in_flight.set(self.load.in_flight)
        self.metrics.wait.set(self.load.wait_s)
        self.metrics.speed.set(self.load.pairs_per_s)

    def _record(self, call: Call) -> None:
        taken_s = time.perf_counter() - call.start_s
        route = call.path if call.path in self.paths else "closed"
        status = "aborted" if call.aborted or not call.status else f"{call.status // 100}xx"
        self.metrics.calls.labels(route, status).inc()
        if call.pairs and status == "2xx":
            self.metrics.pairs.inc(call.pairs)
            self.metrics.call_pairs.observe(call.pairs)
            self.metrics.call_bytes.observe(call.n_bytes)
            self.metrics.call_s.observe(taken_s)
        if call.pairs and self.slow_ms and taken_s * 1000 > self.slow_ms:
            logger.warning(
                "slow call: %s %s, %d pairs, %d bytes, %.0f ms, %d pairs in flight now, request id %s",
                route, status, call.pairs, call.n_bytes, taken_s * 1000, self.load.in_flight, call.request_id.decode(),
            )  # fmt: skip

    def _watch_stop(self, scope) -> None:
        """Let calls in flight finish before vLLM stops its engine; from then on new calls get 503.

        vLLM 0.32 keeps HTTP open while it stops the engine in a thread (handle_shutdown in launcher.py), but a pooling
        pair that reaches the stopping engine fails all calls in flight (AssertionError in output_processor.py). So the
        engine is told to stop when no pair is left, or after --shutdown-timeout; what is left then ends with 503.
        """
        engine = getattr(getattr(scope.get("app"), "state", None), "engine_client", None)
        if engine is None:
            return
        stop, loop = engine.shutdown, asyncio.get_running_loop()

        def drain_then_stop(*args, timeout=None, **kwargs):
            self.draining = True
            if threading.current_thread() is threading.main_thread():  # the event loop's own: it must not wait
                return stop(*args, timeout=timeout, **kwargs)
            end_s = time.monotonic() + (timeout or 0)
            while self.load.in_flight and time.monotonic() < end_s:
                time.sleep(0.05)
            try:
                return stop(*args, timeout=timeout and max(1.0, end_s - time.monotonic()), **kwargs)
            finally:
                for task in tuple(self.tasks):  # else vLLM waits for them without end
                    loop.call_soon_threadsafe(task.cancel)

        engine.shutdown = drain_then_stop


def _make_fitter(scope):
    """A long_documents.Fitter for the model that this process serves; False where it cannot be known."""
    try:
        served = scope["app"].state.serving_scores.io_processor  # vLLM's own, not a documented interface
        template, separate = getattr(served, "chat_template", None), served.name == "bi-encoder"
        if not separate and (served.name != "cross-encoder" or not (template or served.use_sep_token)):
            raise LookupError(f"scoring of kind {served.name}")
        config = served.model_config
        tokenizer = _plain_tokenizer(config.tokenizer, config.trust_remote_code)
        fitter = Fitter(tokenizer, None if separate else template, config.max_model_len, separate=separate)
        if fitter.needs_cover:
            served.tokenizer = EmptyTextCounts(served.tokenizer)
        return fitter
    except Exception as exc:  # another release of vLLM: long texts get vLLM's own 400
        logger.warning("guard: long documents are not cut (%s: %s)", type(exc).__name__, exc)
        return False


def _plain_tokenizer(name: str, trust_remote_code: bool):
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


def _setting(name: str, kind=int):
    """GUARD_<name> as a number; unset or empty = 0 = off."""
    text = os.environ.get(f"GUARD_{name}", "").strip()
    try:
        value = kind(text or 0)
    except ValueError:
        value = -1
    if not 0 <= value < math.inf:
        raise ValueError(f"GUARD_{name}={text!r} is not {'an integer' if kind is int else 'a number'} of 0 or more")
    return value


@functools.cache  # one filter a process, however often the class is made
def _once(text: str):
    """A logging filter that lets the first record with this text pass, and all records without it."""
    seen = False

    def passes(record: logging.LogRecord) -> bool:
        nonlocal seen
        found, before = text in record.getMessage(), seen
        seen = seen or found
        return not (found and before)

    return passes


def _listed(values: dict[int, str]) -> bytes:
    """`0-3,7` or `0-3:2,7:5` for a header: document, or a run of documents with the same value.

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


def _inner_headers(headers, call: Call, length: int) -> list:
    """Headers for vLLM: the length of the new body, and our request id, which vLLM takes for its own."""
    dropped = (b"content-length", b"transfer-encoding", b"x-request-id")
    kept = [pair for pair in headers if pair[0] not in dropped]
    kept.append((b"content-length", str(length).encode()))
    return kept if call.has_own_id else [*kept, (b"x-request-id", call.request_id)]


def _replay(body: bytes, receive):
    """An ASGI receive() that gives the body, then what the client does (vLLM waits for a disconnect)."""
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay():
        return messages.pop() if messages else await receive()

    return replay


async def _send_json(send, status: int, content: dict, headers=()) -> None:
    body = json.dumps(content).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), *headers]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _send_refusal(send, exc: Refusal) -> None:
    """Answer in vLLM's error format (ErrorResponse in vllm/entrypoints/serve/engine/protocol.py)."""
    headers = []
    if exc.retry_s:
        headers.append((b"retry-after", str(min(math.ceil(exc.retry_s), 60)).encode()))
    if exc.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    error = {"message": str(exc), "type": ERROR_TYPES[exc.status], "param": exc.param, "code": exc.status}
    await _send_json(send, exc.status, {"error": error}, headers)


@functools.cache  # a metric's name can be registered once in a process
def _metrics():
    """Metrics in prometheus_client's default registry, which vLLM's /metrics shows; multi-process mode included."""
    from prometheus_client import Counter, Gauge, Histogram

    seconds = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120)
    pairs = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000)
    n_bytes = tuple(4**i for i in range(4, 14))  # 256 B ... 64 MiB
    p = "rerank_guard_"
    return types.SimpleNamespace(
        calls=Counter(f"{p}calls", "Calls by route and status class", ["route", "status"]),
        pairs=Counter(f"{p}pairs", "Pairs answered with scores"),
        cut=Counter(f"{p}cut_documents", "Documents of which the model saw a part only"),
        refusals=Counter(f"{p}refusals", "Requests refused by the guard", ["reason"]),
        in_flight=Gauge(f"{p}pairs_in_flight", "Pairs taken and not yet scored", multiprocess_mode="livesum"),
        wait=Gauge(f"{p}estimated_wait_seconds", "Seconds before a new pair starts", multiprocess_mode="livemax"),
        speed=Gauge(f"{p}pairs_per_second", "Pairs served a second while busy", multiprocess_mode="livesum"),
        call_s=Histogram(f"{p}call_seconds", "Seconds from request to scores", buckets=seconds),
        call_pairs=Histogram(f"{p}call_pairs", "Pairs of a scored call", buckets=pairs),
        call_bytes=Histogram(f"{p}call_bytes", "Body bytes of a scored call", buckets=n_bytes),
    )

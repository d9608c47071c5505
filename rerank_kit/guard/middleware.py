"""What the service enforces on every request: key, paths, limits, defaults, admission, metrics.

`vllm serve --middleware rerank_kit.guard.Guard` loads this plain ASGI class (the kit's folder on PYTHONPATH). Each API
process has its own Guard. Settings come from the environment, GUARD_<KEY> for the keys of group "guard" in
settings.py, and VLLM_API_KEY. A setting that is unset, empty or 0 is off. docs/guard.md lists every limit and error.

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
import threading
import time

from rerank_kit.guard import dialects, playground, upgrades
from rerank_kit.guard.admission import FIRST_PAIRS, Load
from rerank_kit.guard.answers import Refusal, _send_json, _send_refusal, whole
from rerank_kit.guard.asked import understand
from rerank_kit.guard.body import Limits, parse
from rerank_kit.guard.cache import Lookup, ResultCache
from rerank_kit.guard.call import ID, Call
from rerank_kit.guard.counts import Counts
from rerank_kit.guard.deadline import deadline_s, late
from rerank_kit.guard.health import Health
from rerank_kit.guard.images import Images
from rerank_kit.guard.late import LateTexts, late_rules
from rerank_kit.guard.listwise import Lists
from rerank_kit.guard.long_bodies import LIMITS, as_int
from rerank_kit.guard.long_documents import LongDocuments, served_length
from rerank_kit.guard.metrics import _metrics
from rerank_kit.guard.openapi import with_dialects
from rerank_kit.guard.paths import NO_KEY_PATHS, PATHS, SCORING, closed
from rerank_kit.guard.reading import Reading
from rerank_kit.guard.shared_cache import SharedCache, code_id

PROBES = ("/live", "/ready")

DRAIN_RETRY_S = 5

logger = logging.getLogger("vllm.rerank_guard")  # below "vllm": its handler and level
# vLLM 0.32 warns at each call of /v1/score (api_router.py) that the route is not part of OpenAI's API.
SCORE_LOGGER, SCORE_WARNING = "vllm.entrypoints.pooling.scoring.api_router", "Score API is not part of standard OpenAI"


class Guard:
    """ASGI middleware around vLLM's app. Raises ValueError for a setting that cannot be used: the server stops."""

    def __init__(self, app):
        import msgspec  # vLLM requires it; 8 times faster than json.dumps

        self.app = app
        self.encode = msgspec.json.encode
        names = ("MAX_BODY_BYTES", "MAX_DOCS_PER_CALL", "MAX_CHARS_PER_FIELD")
        self.limits = Limits(*(_setting(name) for name in names))
        self.slow_ms = _setting("SLOW_CALL_MS", float)
        self.defaults = {f"max_tokens_per_{x}": _setting(f"MAX_TOKENS_PER_{x.upper()}") for x in ("doc", "query")}
        extra = {path.strip() for path in os.environ.get("GUARD_ALLOW_PATHS", "").split(",") if path.strip()}
        if wrong := sorted(path for path in extra if not path.startswith("/")):
            raise ValueError(f"GUARD_ALLOW_PATHS: {wrong[0]!r} is not a path: write /{wrong[0]}")
        self.paths = PATHS | extra
        key = os.environ.get("VLLM_API_KEY")
        self.key_hash = hashlib.sha256(key.encode()).digest() if key else None
        # vLLM gives its API processes a shared folder (for metrics), through which they count together. Without it
        # each admits its share.
        n_processes, folder = _setting("API_SERVERS") or 1, os.environ.get("PROMETHEUS_MULTIPROC_DIR")
        share = 1 if folder else n_processes
        self.reading = Reading(self.limits, _setting("BODY_TIMEOUT_S", float), n_processes)
        max_pairs = math.ceil(_setting("MAX_PAIRS_IN_FLIGHT") / share)
        first_pairs = math.ceil((_setting("FIRST_PAIRS") or FIRST_PAIRS) / share)
        counts = Counts(folder, n_processes, n_engines=_setting("ENGINES") or 1)
        self.load = Load(max_pairs, _setting("MAX_WAIT_S", float), first_pairs, counts=counts)
        self.metrics = _metrics()
        self.version = os.environ.get("GUARD_VERSION", "").encode()
        self.metrics.restarts.set(_setting("RESTARTS"))
        self.metrics.started.set(time.time())
        self.metrics.version.labels(self.version.decode()).set(1)
        logging.getLogger(SCORE_LOGGER).addFilter(_once(SCORE_WARNING))
        upgrades.read_bodies()
        self.listwise = _setting("LISTWISE") == 1
        of_late = late_rules()
        kind = Lists if self.listwise else functools.partial(LateTexts, of_late) if of_late else LongDocuments
        self.long = kind(self.limits.max_docs, self.encode, self._take_windows)
        self.health = Health(counts, _setting("HEALTH_TIMEOUT_S", float), self.long.prepare)
        self._make_cache()
        self.scale = json.loads(os.environ.get("GUARD_SCORE_SCALE") or "null")
        self.model = os.environ.get("GUARD_MODEL", "")
        most = (_setting(f"MAX_{name}") for name in ("IMAGES_PER_CALL", "IMAGE_BYTES", "IMAGE_PIXELS"))
        self.images = Images(*most, self.long, self.limits.max_bytes)
        self.takes_instruction = os.environ.get("GUARD_TAKES_INSTRUCTION", "1") != "0"
        # With several API processes the parent ends those still working after --shutdown-timeout, so finish before it.
        self.early_s = 2.0 if n_processes > 1 else 0.0
        self.stop_delay_s = _setting("STOP_DELAY_S", float)
        self.leaving = self.draining = False  # leaving: /ready is 503, and calls are taken until draining
        self.tasks = set()  # of all calls, also of clients that still send or do not read their answer
        logger.info(
            "guard: %s, %s, pairs in flight %s (1/%d of the service), wait %s s, key %s (0 = off)",
            vars(self.limits), self.defaults, max_pairs, share, self.load.max_wait_s, "on" if key else "off",
        )  # fmt: skip

    async def __call__(self, scope, receive, send):
        if scope["type"] == "websocket":  # no scoring route is one
            await receive()
            return await send({"type": "websocket.close", "code": 1008})
        if scope["type"] != "http":
            self._watch_stop(scope)
            if self.shared is not None:
                self.shared.begin()
            try:
                return await self.app(scope, receive, send)
            finally:  # of vLLM's app: the service ends
                if self.shared is not None:
                    await self.shared.close()
        call, task = Call(scope, self.paths), asyncio.current_task()
        self.tasks.add(task)
        if call.path != call.sent_path:
            scope = {**scope, "path": call.path, "raw_path": call.path.encode()}

        async def answer(message):
            if call.answered:  # in vLLM's place
                return
            if message["type"] == "http.response.start":
                if call.is_late and message["status"] != 504:
                    await _send_refusal(answer, late(), call.asked.dialect)
                    self.metrics.refusals.labels("deadline").inc()
                    call.answered = True
                    return
                if message["status"] == 500 and call.scoring and _engine_is_dead(scope):
                    text = "the engine died: send the call to another server, or retry when this one is back"
                    await _send_refusal(answer, Refusal(503, "dead", text, retry_s=DRAIN_RETRY_S), call.asked.dialect)
                    self.metrics.refusals.labels("dead").inc()
                    call.answered = True
                    return
                call.status, call.taken_s = message["status"], time.perf_counter() - call.start_s
                # The scores exist now: a client that reads slowly holds no pairs.
                self._release(call)
                headers = [pair for pair in message.get("headers", ()) if pair[0].lower() != b"x-request-id"]
                headers += [(b"x-request-id", call.request_id), *self.long.headers(call)]
                if self.version:
                    headers.append((b"x-rerank-version", self.version))
                if self.listwise:
                    headers.append((b"x-rerank-listwise", b"1"))
                if call.asked.ignored:
                    headers.append((b"x-rerank-ignored", _names(call.asked.ignored)))
                message = {**message, "headers": headers}
            await send(message)

        async def watched_receive():
            try:
                left_s = call.deadline_s - time.perf_counter()
                message = await (receive() if left_s == math.inf else asyncio.wait_for(receive(), max(0.0, left_s)))
            except TimeoutError:
                call.is_late = True  # vLLM cancels the call as if the client had left
                return {"type": "http.disconnect"}
            if message["type"] == "http.disconnect" and not call.status:
                call.aborted = True  # vLLM cancels the call; nobody reads the answer
            return message

        try:
            self._check_access(call)
            if call.path in PROBES:
                return await self._probe(call.path, scope, watched_receive, answer)
            if call.path == playground.PATH:
                return await playground.send_page(answer)
            if call.path == "/info":
                return await self._info(scope, answer)
            if scope["method"] == "HEAD" and call.path in PATHS:
                scope = {**scope, "method": "GET"}  # vLLM has no HEAD; uvicorn leaves the body out
            if call.scoring:
                body = await self._admit(scope, call, watched_receive)
                if call.lookup and not call.lookup.missing:
                    return await self._answer_known(call, call.lookup, answer)
                if body is not None:
                    query = call.payload.get("query")
                    fitting = self.images if call.asked.images else self.long
                    body = await fitting.fit(scope, call, body, watched_receive)
                    if call.lookup:
                        call.lookup.keeps = call.payload.get("query") == query
                    self.metrics.cut.inc(len(call.cut))
                if call.is_late:
                    call.aborted = False
                    raise late()
                if body is None:  # the client left
                    return None
                scope = {**scope, "headers": _inner_headers(scope["headers"], call, len(body))}
                if call.asked.inner_path != call.path:
                    scope |= {"path": call.asked.inner_path, "raw_path": call.asked.inner_path.encode()}
                reply = whole(answer, functools.partial(self._edited, call))
                return await self.app(scope, _replay(body, watched_receive), reply)
            if call.path == "/openapi.json":
                described = whole(answer, lambda status, body: with_dialects(body))
                return await self.app(scope, watched_receive, described)
            return await self.app(scope, watched_receive, answer)
        except Refusal as exc:
            self.metrics.refusals.labels(exc.reason).inc()
            await _send_refusal(answer, exc, call.asked.dialect)
        except BaseException as exc:
            if isinstance(exc, asyncio.CancelledError) and self.draining and not call.status:
                return await _send_refusal(answer, self._stopping(), call.asked.dialect)
            if isinstance(exc, Exception) and not call.status:
                # vLLM's own answer would come from outside all middleware, without our headers.
                text = f"{type(exc).__name__}: see the server's log, request id {call.request_id.decode()}"
                await _send_refusal(answer, Refusal(500, "error", text), call.asked.dialect)
            call.status = call.status or 500
            raise
        finally:
            self.tasks.discard(task)
            self._release(call)
            self._record(call)

    def _make_cache(self) -> None:
        mib, url = _setting("RESULT_CACHE_MIB", float), os.environ.get("GUARD_RESULT_CACHE_URL", "")
        wanted = (mib or url) and not self.listwise
        if wanted and url and not self.version:
            raise ValueError("GUARD_RESULT_CACHE_URL needs GUARD_VERSION, by which the scores of two models differ")
        self.shared = SharedCache(url, self.metrics) if wanted and url else None
        version = self.version + (code_id() if self.shared is not None else b"")
        self.cache = ResultCache(mib, version) if wanted else None

    def _check_access(self, call: Call) -> None:
        """Check the key first, so that callers without it do not learn which paths exist."""
        # A browser cannot send a key with an address; the page asks for it, and holds nothing secret.
        is_page = call.path == playground.PATH and call.path in self.paths
        if self.key_hash and call.path not in NO_KEY_PATHS and not is_page:
            scheme, _, key = call.headers.get(b"authorization", b"").partition(b" ")
            right = hmac.compare_digest(hashlib.sha256(key).digest(), self.key_hash)
            if scheme.lower() != b"bearer" or not right:
                raise Refusal(401, "key", "wrong or missing API key: send the header 'Authorization: Bearer <key>'")
        if call.path not in self.paths:
            raise Refusal(404, "path", closed(call.path))

    async def _admit(self, scope, call: Call, receive) -> bytes | None:
        """Read, check and complete one scoring call, and count its pairs in. None = the client left. Raises Refusal."""
        if self.draining:
            raise self._stopping()
        timeout = call.headers.get(b"x-request-timeout-ms", b"")
        call.deadline_s = deadline_s(call.start_s, timeout, None)
        self.limits.check_length(call.headers.get(b"content-length", b"0"))
        self.load.check(1)  # too busy for any call, so the body is not read; uvicorn discards it
        body = await self.reading.read(receive)
        if body is None:
            return None
        body = await self.reading.unpack(body, call.headers.get(b"content-encoding", b""))
        call.n_bytes = len(body)
        self.limits.check(body)
        payload = parse(body)
        before = dict(payload)
        understand(call.asked, call.path, payload, self.limits.max_docs, self.limits.max_bytes, self.images)
        changed = payload != before
        changed |= self._complete(call, payload, served_length(scope))
        if "request_id" in payload:
            call.body_id = str(payload["request_id"]).encode("utf-8", "replace")
        if call.asked.images:
            self.images.check_hosts(call.asked.images)
            await self.images.measure(call.asked.images)
        elif self.cache is not None:
            rules = call.mode, call.asked.max_windows, call.asked.overlap
            call.lookup = self.cache.look_up(payload, call.asked.inner_path, rules)
            if call.lookup:
                if self.shared is not None:
                    keys = dict.fromkeys(call.lookup.keys[i] for i in call.lookup.missing)
                    call.lookup.add(await self.shared.get([*keys]) if keys else {})
                call.lookup.leave_missing(payload)
                changed = True
                if not call.lookup.missing:
                    call.payload = payload
                    return b""
        if changed or b"\\u" in body:
            try:
                encoded = self.encode(payload)
            except UnicodeEncodeError as exc:
                raise Refusal(400, "json", "the body holds half of a surrogate pair (\\ud800-\\udfff)") from exc
            body = encoded if changed else body
        fields = [payload[name] for name in SCORING[call.asked.inner_path] if name in payload]
        pairs = max([1, *(len(field) for field in fields if isinstance(field, list))])
        if self.draining:  # since the body began
            raise self._stopping()
        call.deadline_s = deadline_s(call.start_s, timeout, call.asked.timeout_ms)
        work = self.images.work(call.asked.images, payload, pairs) if call.asked.images else pairs
        self.load.check_deadline(work, call.deadline_s - time.perf_counter())
        self.load.take(work)
        call.pairs, call.work, call.in_flight, call.payload = pairs, work, True, payload
        self._show_load()
        return body

    def _take_windows(self, call: Call) -> None:
        """Admit a call again, now by its windows instead of its documents."""
        assert call.split is not None  # LongDocuments calls this after a split
        n = len(call.split.owners)
        self.load.reserve(n, instead_of=call.work)
        call.pairs = call.work = n
        self._show_load()

    def _stopping(self) -> Refusal:
        return Refusal(503, "draining", "the server is stopping: send the call again later", retry_s=DRAIN_RETRY_S)

    def _complete(self, call: Call, payload: dict, length: int = 0) -> bool:
        """Take our own fields out, fill in defaults; True = payload has changed. length: MAX_MODEL_LEN; 0 = unknown."""
        more = payload.get("chat_template_kwargs")
        more = more if isinstance(more, dict) else {}
        wrong = [name for name, value in more.items() if name != "instruction" or not isinstance(value, str | None)]
        if wrong:  # other keys can remove the prompt's end; control tokens are neutralised only in texts
            text = f"chat_template_kwargs takes only instruction (a text), not {ascii(wrong[0])[:40]}"
            raise Refusal(422, "instruction", text, param="chat_template_kwargs")
        limits = [name for name in LIMITS if as_int(payload.get(name)) is not payload.get(name)]
        payload |= {name: as_int(payload[name]) for name in limits}
        # cohere-haystack sends 4096 always; vLLM refuses what is not below MAX_MODEL_LEN, and it would cut nothing.
        idle = [name for name in LIMITS if length and isinstance(payload.get(name), int) and payload[name] >= length]
        for name in idle:
            del payload[name]
        if not self.takes_instruction and (payload.get("instruction") or more.get("instruction")):
            text = "this model takes no instruction, and its score would not change: leave instruction out"
            raise Refusal(422, "instruction", text, param="instruction")
        asked = self.long.choose_mode(call, payload)
        if call.asked.images:
            self.images.choose_mode(call, asked)
        whole = call.mode == "chunk" or asked == "error"  # the default for documents would cut
        added = {name: value for name, value in self.defaults.items() if value and name not in payload}
        if whole:
            added.pop("max_tokens_per_doc", None)
        payload |= added
        return bool(added or asked or limits or idle)

    def _edited(self, call: Call, status: int, body: bytes) -> bytes:
        is_raw = call.payload.get("use_activation") is False and self.scale and self.scale.get("name") == "probability"
        scale = {"name": "logit"} if is_raw else self.scale
        if status == 200:
            body = _with_callers_id(call, body)
        complete = functools.partial(self._with_known, call, call.lookup) if call.lookup else None
        return dialects.edit(call.asked, call.split, status, body, self.encode, scale, complete)

    def _with_known(self, call: Call, lookup: Lookup, answer: dict) -> dict:
        """vLLM's answer with the pairs that the result cache knows."""
        windows = call.split.counts if call.split else {}
        answer = lookup.complete(answer, call.cut, windows)
        call.cut = lookup.cut
        n_shared = lookup.shared or 0
        self.metrics.cached.labels("process").inc(len(lookup.found) - n_shared)
        if self.shared is not None:
            self.metrics.cached.labels("redis").inc(n_shared)
            self.shared.put(lookup.new)
        return answer

    async def _answer_known(self, call: Call, lookup: Lookup, answer) -> None:
        """Answer a call of which the result cache knows every pair."""
        whole_answer = lookup.empty(call.body_id.decode("utf-8", "replace"), call.payload.get("model") or self.model)
        await _send_json(answer, 200, None, body=self._edited(call, 200, self.encode(whole_answer)))

    async def _info(self, scope, answer) -> None:
        """TEI's /info; GET only."""
        if scope["method"] not in ("GET", "HEAD"):
            raise Refusal(404, "path", "/info is read with GET")
        truncates = self.long.default in ("truncate", "chunk")
        limits = served_length(scope), self.limits.max_docs
        await _send_json(
            answer, 200, dialects.tei_info(self.model, *limits, self.version.decode(), self.scale, truncates)
        )

    async def _probe(self, path: str, scope, receive, answer) -> None:
        """/live: no engine hangs. /ready: and the first pairs were scored, /health is 200, no stop is under way."""
        if hang := self.health.hang:
            raise Refusal(503, "hang", hang, retry_s=DRAIN_RETRY_S)
        if path == "/live":
            return await _send_json(answer, 200, {"status": "live"})
        status = 503

        async def note_status(message):
            nonlocal status
            status = message.get("status", status)

        wrong = "the server is stopping" if self.leaving else self.health.not_ready
        if not wrong:
            inner = {**scope, "method": "GET", "path": "/health", "raw_path": b"/health"}
            await self.app(inner, receive, note_status)
            wrong = "" if status == 200 else "the engine is not healthy: see the server's log"
        if wrong:
            raise Refusal(503, "not_ready", wrong, retry_s=DRAIN_RETRY_S)
        await _send_json(answer, 200, {"status": "ready"})

    def _release(self, call: Call) -> None:
        if call.in_flight:
            call.in_flight = False
            served = call.status == 200 and not call.aborted
            self.load.release(call.work, served)
            if served:
                self.health.served()
            self._show_load()

    def _show_load(self) -> None:
        self.metrics.in_flight.set(self.load.in_flight)
        self.metrics.wait.set(self.load.wait_s)
        self.metrics.speed.set(self.load.pairs_per_s)

    def _record(self, call: Call) -> None:
        taken_s = call.taken_s or time.perf_counter() - call.start_s
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
                "slow call: %s %s, %d pairs, %d bytes, %.0f ms, %d pairs in flight now, request id %s, trace %s",
                route, status, call.pairs, call.n_bytes, taken_s * 1000, self.load.in_flight, call.request_id.decode(),
                call.trace_id,
            )  # fmt: skip

    def _watch_stop(self, scope) -> None:
        """Let calls in flight finish before vLLM stops its engine; new calls get 503 after STOP_DELAY_S.

        vLLM 0.32 keeps HTTP open while it stops the engine in a thread (handle_shutdown in launcher.py), but a pooling
        pair that reaches the stopping engine fails all calls in flight (AssertionError in output_processor.py). So the
        engine is told to stop when no pair is left, or after --shutdown-timeout; what is left then ends with 503.
        """
        engine = getattr(getattr(scope.get("app"), "state", None), "engine_client", None)
        if engine is None:
            return
        stop, loop = engine.shutdown, asyncio.get_running_loop()
        self.health.begin(scope["app"], self.app)

        def drain_then_stop(*args, timeout=None, **kwargs):
            self.leaving, end_s = True, time.monotonic() + max(0.0, (timeout or 0) - self.early_s)
            loop.call_soon_threadsafe(self.health.end)
            if threading.current_thread() is threading.main_thread():  # the event loop's own: it must not wait
                self.draining = True
                return stop(*args, timeout=timeout, **kwargs)
            time.sleep(min(self.stop_delay_s, timeout or 0))
            self.draining = True
            while self.load.in_flight and time.monotonic() < end_s:
                time.sleep(0.05)
            try:
                return stop(*args, timeout=timeout and max(1.0, end_s - time.monotonic()), **kwargs)
            finally:
                for task in tuple(self.tasks):  # otherwise vLLM waits for them forever
                    loop.call_soon_threadsafe(task.cancel)

        engine.shutdown = drain_then_stop


def _names(names: list[str]) -> bytes:
    """A header's value that lists fields of a body; characters that a header cannot hold are escaped."""
    return ",".join(ascii(name)[1:41].rstrip("'\"").replace(",", "") for name in names[:20]).encode()


def _engine_is_dead(scope) -> bool:
    """When its engine dies, vLLM answers 500 to the calls in flight and ends; the calls were not at fault."""
    engine = getattr(getattr(scope.get("app"), "state", None), "engine_client", None)
    return bool(getattr(engine, "errored", False))


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


def _inner_headers(headers, call: Call, length: int) -> list:
    """Headers for vLLM: the length of the new body, and our request id, which vLLM takes for its own."""
    dropped = (b"content-length", b"content-encoding", b"transfer-encoding", b"x-request-id")
    kept = [pair for pair in headers if pair[0] not in dropped]
    kept.append((b"content-length", str(length).encode()))
    # In vLLM the header takes precedence over the body's request_id.
    return [*kept, (b"x-request-id", call.engine_id)] if ID.fullmatch(call.body_id) else kept


def _with_callers_id(call: Call, body: bytes) -> bytes:
    """vLLM's answer with the caller's id in place of the engine's, which counts the pairs too."""
    ours, callers = (
        b"score-%b" % name.replace(b"\\", b"\\\\").replace(b'"', b'\\"') for name in (call.engine_id, call.body_id)
    )
    return body.replace(b'"%b"' % ours, b'"%b"' % callers, 1)


def _replay(body: bytes, receive):
    """An ASGI receive() that gives the body, then what the client does (vLLM waits for a disconnect)."""
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay():
        return messages.pop() if messages else await receive()

    return replay

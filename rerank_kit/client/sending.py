"""Sends one JSON object: retries, fail-over, deadline.

post() and apost() are both driven by _attempts(), which decides everything (where to, how long, again or not) and does
no IO: sync and async cannot differ.
"""

import asyncio
import json
import math
import random
import sys
import threading
import time
import traceback
from collections.abc import Generator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime

from .. import settings
from .errors import (
    MAX_BODY_CHARS,
    RerankConnectionError,
    RerankError,
    RerankHTTPError,
    RerankResponseError,
    RerankTimeout,
    excerpt,
)
from .exchange import Answer, Failure, NoProxy, Step, aexchange, exchange, new_async_session
from .sessions import SharedResources, _Endpoint, _headers, base_urls

try:  # where vLLM is; a client alone may do without: json does the same, 0.1 ms of a call of 32 documents slower
    import msgspec
except ImportError:
    msgspec = None

BACKOFF_S, BACKOFF_MAX_S = 0.5, 8.0  # retry n waits a random part of BACKOFF_S * 2**n ("full jitter")
DOWN_S = 10.0  # so long is an address that failed asked last
UNAVAILABLE = {502, 503, 504}  # another server may do better
RETRY_STATUS = {429, *UNAVAILABLE}
MAX_SECONDS = 1e6  # 11 days: a socket cannot count to 25


def _encode(payload: dict) -> bytes:
    if msgspec:
        with suppress(TypeError):  # a subclass of str, which json takes
            return msgspec.json.encode(payload)
    return json.dumps(payload, ensure_ascii=False).encode()


def _decode(body: bytes):
    if msgspec:
        with suppress(ValueError):  # NaN, 1e400, half surrogates, no JSON at all: json decides
            return msgspec.json.decode(body)
    return json.loads(body)


def _server_text(body: bytes) -> str:
    """The server's own words: {"error": {"message"}} of vLLM, {"detail"} of FastAPI, else the body."""
    try:
        data = json.loads(body)
    except (ValueError, RecursionError):
        data = None
    for key in ("error", "detail", "message") if isinstance(data, dict) else ():
        value = data.get(key)
        if isinstance(value, dict):
            value = value.get("message")
        if isinstance(value, list):  # FastAPI: one entry for every field it refused
            value = json.dumps(value, ensure_ascii=False)
        if isinstance(value, str) and value.strip():
            return excerpt(value, 500)
    return excerpt(body, 500) or "(empty body)"


def _trace_headers() -> dict[str, str]:
    """traceparent (and tracestate) of the caller's OpenTelemetry span; empty where his program does not trace."""
    headers: dict[str, str] = {}
    if "opentelemetry.trace" in sys.modules:  # imported by the caller, never by us first
        from opentelemetry import propagate

        propagate.inject(headers)
    return {name: headers[name] for name in ("traceparent", "tracestate") if name in headers}


@dataclass(slots=True)
class Reply:
    """A 2xx answer: its JSON object, the URL it came from, its bytes, and the guard's X-Rerank-... headers."""

    data: dict
    url: str
    body: bytes
    cut: str = ""
    windows: str | None = None
    version: str = ""  # id of the model and the settings that scored

    def error(self, what: str) -> RerankResponseError:
        return RerankResponseError(f"{self.url} answered {excerpt(what)}: {excerpt(self.body)}")


def _reply(step: Step, answer: Answer) -> Reply:
    told = answer.headers.get("X-Rerank-Cut", ""), answer.headers.get("X-Rerank-Windows")
    told += (answer.headers.get("X-Rerank-Version", ""),)
    reply = Reply({}, step.url, bytes(answer.body), *told)
    kind = answer.headers.get("Content-Type", "application/json").partition(";")[0].strip().lower()
    if not answer.whole:
        raise reply.error(f"more than {answer.limit} bytes")
    if kind != "application/json":
        raise reply.error(f"{excerpt(kind)!r}, not application/json")
    try:
        reply.data = _decode(reply.body)
    except (ValueError, RecursionError):
        raise reply.error("what is not JSON") from None
    if not isinstance(reply.data, dict):
        raise reply.error("no JSON object")
    return reply


def _error(step: Step, outcome: Answer | Failure) -> RerankError:
    """The exception that tells a caller what happened, where, and what to do."""
    if isinstance(outcome, Answer):
        text = _server_text(bytes(outcome.body))
        if 300 <= outcome.status < 400:
            target = excerpt(outcome.headers.get("Location", "nowhere"))
            text = f"redirects to {target}, which is not followed: set BASE_URL to the final address"
        elif outcome.status in (401, 403):
            text += " (check API_KEY)"
        message = f"HTTP {outcome.status} from {step.url}: {text}"
        return RerankHTTPError(message, outcome.status, excerpt(bytes(outcome.body), MAX_BODY_CHARS))
    status, cause = 'run "sh start_rerank.sh status"', excerpt(outcome.cause)
    if outcome.kind == "pool":
        advice = "raise POOL_SIZE or deadline_s"
        return RerankTimeout(f"no connection to {step.base_url} was free before deadline_s was over: {advice}")
    if outcome.kind == "timeout":
        limit = "deadline_s" if time.monotonic() >= step.until else "TIMEOUT_S"
        advice = f"raise {limit} or send fewer documents at a time"
        return RerankTimeout(f"no complete answer from {step.url} within {step.answer_s:.3g} s: {advice}")
    if outcome.kind == "tls":
        advice = "check the certificate; REQUESTS_CA_BUNDLE names a CA file"
        return RerankConnectionError(f"no TLS connection to {step.base_url} ({cause}): {advice}")
    if outcome.kind == "connect" and outcome.timed_out:
        return RerankTimeout(f"no connection to {step.base_url} within {step.connect_s:.3g} s: {status}")
    if outcome.kind == "connect":
        return RerankConnectionError(f"no server at {step.base_url} ({cause}): {status}")
    return RerankConnectionError(f"{step.url} broke off before its answer was complete ({cause}): {status}")


def _shareable(exc: Exception | None) -> Exception | None:
    """The exception behind ours, unless it shows the API key: a library quotes what it could not parse."""
    key = settings.CFG.api_key
    return None if exc and key and key in "".join(traceback.format_exception(exc)) else exc


def _retry_after_s(headers: Mapping[str, str]) -> float:
    """Retry-After in seconds, given as a number or as an HTTP date; 0.0 if absent or senseless."""
    text = headers.get("Retry-After", "")
    try:
        seconds = float(text)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(text).timestamp() - time.time()
        except (ValueError, TypeError, OverflowError):
            return 0.0
    return seconds if 0 < seconds < math.inf else 0.0


def _choose(endpoints: list[_Endpoint]) -> _Endpoint:
    """The first that is not known to be down; after DOWN_S one call, not all, finds out whether it is up again."""
    now = time.monotonic()
    endpoint = next((e for e in endpoints if e.down_until <= now), None) or min(endpoints, key=lambda e: e.down_until)
    if endpoint.down_until:
        endpoint.down_until = now + DOWN_S
    return endpoint


def _attempts(
    path: str, payload: dict | None, base_url: str | None, timeout_s: float | None, until: float
) -> Generator[Step | float, Answer | Failure | None, Reply]:
    """One call: yields a Step to send (wants its outcome) or seconds to sleep; returns the Reply.

    Sent again are failed connects and 429, 502, 503, 504, and at once a request that met a connection which the
    server had closed. Not after a read timeout, nor when a connection broke later: the GPU may be busy with it.
    """
    cfg = settings.CFG
    timeout_s = min(cfg.timeout_s if timeout_s is None else timeout_s, MAX_SECONDS)
    body = _encode(payload) if payload is not None else b""
    method = "GET" if payload is None else "POST"
    endpoints = [SharedResources._endpoint(url) for url in base_urls(base_url)]
    untried, n_retries, fresh, endpoint, error, budget = list(endpoints), 0, False, None, None, endpoints[0]
    trace = _trace_headers()
    budget.earn()
    while True:
        endpoint = endpoint if fresh else _choose(untried)
        left_s = until - time.monotonic()
        if left_s <= 0:
            raise RerankTimeout(f"deadline_s was over before {endpoint.url + path} was asked") from error
        connect_s, answer_s = min(cfg.connect_timeout_s, timeout_s, left_s), min(timeout_s, left_s)
        step = Step(endpoint.url + path, endpoint.url, body, connect_s, answer_s, until, fresh, method, trace)
        outcome = yield step
        what = outcome.status if isinstance(outcome, Answer) else outcome.kind
        if isinstance(what, int) and what not in UNAVAILABLE:
            endpoint.down_until = 0.0
            if 200 <= what < 300:
                return _reply(step, outcome)
        fresh = what == "stale" and not step.fresh
        if fresh:
            continue
        error = _error(step, outcome)
        unsent = what in ("connect", "tls")
        if unsent or what in UNAVAILABLE:
            endpoint.down_until = time.monotonic() + DOWN_S
            untried.remove(endpoint)
            if untried and (unsent or budget.spend()):
                continue
        if what == "connect" or what in RETRY_STATUS:
            asked_s = _retry_after_s(outcome.headers) if isinstance(outcome, Answer) else 0.0
            wait_s = asked_s + random.uniform(0, min(BACKOFF_MAX_S, BACKOFF_S * 2**n_retries))
            n_retries += 1
            in_time = asked_s <= timeout_s and time.monotonic() + wait_s < until
            if n_retries <= cfg.retries and in_time and budget.spend():
                untried = list(endpoints)
                yield wait_s
                continue
        raise error from _shareable(getattr(outcome, "exc", None))


def post(
    path: str,
    payload: dict | None,
    base_url: str | None = None,
    timeout_s: float | None = None,
    until: float = math.inf,
    stop: threading.Event | None = None,
) -> Reply:
    """POST a JSON object to base_url + path.

    Args:
        path: e.g. "/rerank".
        payload: the object; None = GET.
        base_url: one address or several, separated by commas; None = config.
        timeout_s: seconds for one answer, from the first byte sent to the last received; None = config.
        until: time.monotonic() at which the call with all its retries must be over.
        stop: once it is set, nothing more is sent; an answer that is under way is still awaited.

    Raises:
        RerankError: one of its subclasses; no exception of requests or aiohttp leaves.
    """
    steps, outcome = _attempts(path, payload, base_url, timeout_s, until), None
    while True:
        try:
            step = steps.send(outcome)
        except StopIteration as done:
            return done.value
        if stop and stop.is_set():
            raise RerankError("given up: another part of this call has failed")
        if isinstance(step, Step):
            outcome = exchange(SharedResources.get_local_rerank_client(step.base_url), step)
        else:
            (stop.wait if stop else time.sleep)(step)
            outcome = None


async def apost(
    path: str,
    payload: dict | None,
    base_url: str | None = None,
    timeout_s: float | None = None,
    until: float = math.inf,
) -> Reply:
    """The same as post() on the running event loop."""
    steps, outcome = _attempts(path, payload, base_url, timeout_s, until), None
    while True:
        try:
            step = steps.send(outcome)
        except StopIteration as done:
            return done.value
        if not isinstance(step, Step):
            outcome = await asyncio.sleep(step)
        else:
            outcome = await _aexchange(step)


async def _aexchange(step: Step) -> Answer | Failure:
    """aexchange() over the right session."""
    try:
        if step.fresh:  # aiohttp offers no other way to a new connection
            async with new_async_session(step.base_url, _headers(), 1, reuse=False) as session:
                return await aexchange(session, step)
        session = await SharedResources.get_async_rerank_client(step.base_url)
    except NoProxy as exc:
        return Failure("connect", exc, False, str(exc))
    except OSError as exc:  # the CA file that the environment names
        return Failure("tls", exc, False, str(exc))
    return await aexchange(session, step)

"""Sends one JSON object, with retries, fail-over and a deadline.

post() and apost() both follow _attempts(). It chooses the address, the timeouts and the retries and does no IO, so
sync and async calls behave alike.
"""

import asyncio
import json
import logging
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
from importlib import import_module
from typing import Any

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
from .exchange import Answer, Failure, Step, aexchange, exchange, new_async_session
from .net import NoProxy
from .sessions import SharedResources, _Endpoint, _headers, base_urls

try:  # installed with vLLM, optional for a client: json gives the same result, 0.1 ms slower at 32 documents
    msgspec: Any = import_module("msgspec")
except ImportError:
    msgspec = None

BACKOFF_S, BACKOFF_MAX_S = 0.5, 8.0  # retry n waits a random part of BACKOFF_S * 2**n ("full jitter")
DOWN_S = 10.0  # for this time a failed address comes last
UNAVAILABLE = {502, 503, 504}  # another address may be able to answer
RETRY_STATUS = {429, *UNAVAILABLE}
MODELS_S = 5.0  # for the list of models, which only a message shows
MAX_SECONDS = 1e6  # 11 days; a socket's timeout overflows at 25 days

logger = logging.getLogger("rerank_kit")
logger.addHandler(logging.NullHandler())  # silent unless the program around it logs


def _encode(payload: dict[str, Any]) -> bytes:
    if msgspec:
        with suppress(TypeError):  # msgspec takes no subclass of str, json does
            body: bytes = msgspec.json.encode(payload)
            return body
    return json.dumps(payload, ensure_ascii=False).encode()


def _decode(body: bytes) -> Any:
    if msgspec:
        with suppress(ValueError):  # NaN, 1e400, lone surrogates, invalid JSON: json decides
            return msgspec.json.decode(body)
    return json.loads(body)


def _server_text(body: bytes) -> str:
    """The server's error text: {"error": {"message"}} of vLLM, {"detail"} of FastAPI, else the body."""
    try:
        data = json.loads(body)
    except (ValueError, RecursionError):
        data = None
    for key in ("error", "detail", "message") if isinstance(data, dict) else ():
        value = data.get(key)
        if isinstance(value, dict):
            value = value.get("message")
        if isinstance(value, list):  # FastAPI: one entry for each invalid field
            value = json.dumps(value, ensure_ascii=False)
        if isinstance(value, str) and value.strip():
            return excerpt(value, 500)
    return excerpt(body, 500) or "(empty body)"


def _trace_headers() -> dict[str, str]:
    """traceparent (and tracestate) of the caller's OpenTelemetry span; empty if the program does not trace."""
    headers: dict[str, str] = {}
    if "opentelemetry.trace" in sys.modules:  # the client never imports it first
        from opentelemetry import propagate  # type: ignore[import-not-found,unused-ignore]  # optional

        propagate.inject(headers)
    return {name: headers[name] for name in ("traceparent", "tracestate") if name in headers}


@dataclass(slots=True)
class Reply:
    """A 2xx answer: its JSON object, the URL it came from, its bytes, and the guard's X-Rerank-... headers."""

    data: dict[str, Any]
    url: str
    body: bytes
    cut: str = ""
    windows: str | None = None
    version: str = ""  # id of the model and settings that made the scores
    listwise: bool = False  # a score depends on the other documents of the request
    n_retries: int = 0  # how often it was sent again, to this address or another

    def error(self, what: str) -> RerankResponseError:
        return RerankResponseError(f"{self.url} answered {excerpt(what)}: {excerpt(self.body)}")


def _reply(step: Step, answer: Answer) -> Reply:
    get = answer.headers.get
    told = (
        get("X-Rerank-Cut", ""),
        get("X-Rerank-Windows"),
        get("X-Rerank-Version", ""),
        get("X-Rerank-Listwise") == "1",
    )
    reply = Reply({}, step.url, bytes(answer.body), *told)
    kind = get("Content-Type", "application/json").partition(";")[0].strip().lower()
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
    """The exception whose message says what happened, where, and what to do."""
    if isinstance(outcome, Answer):
        text = _server_text(bytes(outcome.body))
        if 300 <= outcome.status < 400:
            target = excerpt(outcome.headers.get("Location", "nowhere"))
            text = f"redirects to {target}, which is not followed: set BASE_URL to the final address"
        elif outcome.status in (401, 403):
            text += f" (check RERANK_API_KEY{settings.not_read_by_client()})"
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
        status += settings.not_read_by_client()
        return RerankConnectionError(f"no server at {step.base_url} ({cause}): {status}")
    return RerankConnectionError(f"{step.url} broke off before its answer was complete ({cause}): {status}")


def _shareable(exc: Exception | None) -> Exception | None:
    """exc as the cause of a RerankError; None if it shows the API key, as libraries quote what they cannot parse."""
    key = settings.CLIENT.api_key
    return None if exc and key and key in "".join(traceback.format_exception(exc)) else exc


def _retry_after_s(headers: Mapping[str, str]) -> float:
    """Retry-After in seconds, from a number or an HTTP date; 0.0 if it is absent or invalid."""
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
    """The first address that is not known to be down. After DOWN_S a single call tries a down address again."""
    now = time.monotonic()
    endpoint = next((e for e in endpoints if e.down_until <= now), None) or min(endpoints, key=lambda e: e.down_until)
    if endpoint.down_until:
        endpoint.down_until = now + DOWN_S
    return endpoint


def _served_names(answer: Answer | Failure | None) -> str:
    """The models of an answer to GET /models, as a hint; empty if it is none."""
    try:
        rows = _decode(bytes(answer.body))["data"] if isinstance(answer, Answer) and answer.status == 200 else []
        names = [str(row["id"]) for row in rows]
    except (ValueError, LookupError, TypeError, RecursionError):
        names = []
    return f" (it serves {excerpt(', '.join(names))}: set model or SERVED_MODEL_NAME)" if names else ""


def _attempts(
    path: str, payload: dict[str, Any] | None, base_url: str | None, timeout_s: float | None, until: float
) -> Generator[Step | float, Answer | Failure | None, Reply]:
    """Drive one call. Yields a Step, whose outcome the caller sends back, or seconds to sleep; returns the Reply.

    A failed connect and 429, 502, 503, 504 are retried. A request on a connection that the server had closed is sent
    again at once. A read timeout and a connection that broke later are not retried: the GPU may be busy with the call.
    """
    cfg = settings.CLIENT
    timeout_s = min(cfg.timeout_s if timeout_s is None else timeout_s, MAX_SECONDS)
    body = _encode(payload) if payload is not None else b""
    method = "GET" if payload is None else "POST"
    endpoints = [SharedResources._endpoint(url) for url in base_urls(base_url)]
    untried, n_retries, fresh, endpoint, budget = list(endpoints), 0, False, endpoints[0], endpoints[0]
    n_sent = 0
    error: RerankError | None = None
    trace = _trace_headers()
    budget.earn()
    while True:
        endpoint = endpoint if fresh else _choose(untried)
        left_s = until - time.monotonic()
        if left_s <= 0:
            raise RerankTimeout(f"deadline_s was over before {endpoint.url + path} was asked") from error
        connect_s, answer_s = min(cfg.connect_timeout_s, timeout_s, left_s), min(timeout_s, left_s)
        step = Step(endpoint.url + path, endpoint.url, body, connect_s, answer_s, until, fresh, method, trace)
        n_sent += 1
        outcome = yield step
        assert outcome is not None  # only a sleep has no outcome
        if isinstance(outcome, Answer) and outcome.status not in UNAVAILABLE:
            endpoint.down_until = 0.0
            if 200 <= outcome.status < 300:
                reply = _reply(step, outcome)
                reply.n_retries = n_sent - 1
                return reply
        what = outcome.status if isinstance(outcome, Answer) else outcome.kind
        fresh = what == "stale" and not step.fresh
        if fresh:
            logger.debug("%s had closed the connection: sent again", endpoint.url)
            continue
        error = _error(step, outcome)
        unsent = what in ("connect", "tls")
        if unsent or what in UNAVAILABLE:
            endpoint.down_until = time.monotonic() + DOWN_S
            untried.remove(endpoint)
            if untried and (unsent or budget.spend()):
                logger.warning("fail-over from %s to another address: %s", endpoint.url, error)
                continue
        if what == "connect" or what in RETRY_STATUS:
            asked_s = _retry_after_s(outcome.headers) if isinstance(outcome, Answer) else 0.0
            wait_s = asked_s + random.uniform(0, min(BACKOFF_MAX_S, BACKOFF_S * 2**n_retries))
            n_retries += 1
            in_time = asked_s <= timeout_s and time.monotonic() + wait_s < until
            if n_retries <= cfg.retries and in_time and budget.spend():
                untried = list(endpoints)
                logger.warning("retry %d of %d in %.1f s: %s", n_retries, cfg.retries, wait_s, error)
                yield wait_s
                continue
        if what == 404 and payload is not None and isinstance(error, RerankHTTPError):
            models_s = min(MODELS_S, until - time.monotonic())
            asks = Step(endpoint.url + "/models", endpoint.url, b"", connect_s, models_s, until, False, "GET", trace)
            hint = _served_names((yield asks) if models_s > 0 else None)
            error = RerankHTTPError(f"{error}{hint}", error.status_code, error.body)
        raise error from _shareable(getattr(outcome, "exc", None))


def post(
    path: str,
    payload: dict[str, Any] | None,
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
        until: time.monotonic() by which the call with all its retries must end.
        stop: once it is set, nothing more is sent; the answer to a request in flight is still awaited.

    Raises:
        RerankError: one of its subclasses; never an exception of requests or aiohttp.
    """
    steps = _attempts(path, payload, base_url, timeout_s, until)
    outcome: Answer | Failure | None = None
    while True:
        try:
            step = steps.send(outcome)
        except StopIteration as done:
            reply: Reply = done.value
            return reply
        if stop and stop.is_set():
            raise RerankError("given up: another part of this call has failed")
        if isinstance(step, Step):
            outcome = exchange(SharedResources.get_local_rerank_client(step.base_url), step)
        else:
            (stop.wait if stop else time.sleep)(step)
            outcome = None


async def apost(
    path: str,
    payload: dict[str, Any] | None,
    base_url: str | None = None,
    timeout_s: float | None = None,
    until: float = math.inf,
) -> Reply:
    """post() on the running event loop."""
    steps = _attempts(path, payload, base_url, timeout_s, until)
    outcome: Answer | Failure | None = None
    while True:
        try:
            step = steps.send(outcome)
        except StopIteration as done:
            reply: Reply = done.value
            return reply
        if not isinstance(step, Step):
            await asyncio.sleep(step)
            outcome = None
        else:
            outcome = await _aexchange(step)


async def _aexchange(step: Step) -> Answer | Failure:
    """aexchange() over the session of the event loop, or over a new one if the Step asks for that."""
    try:
        if step.fresh:  # aiohttp has no other way to force a new connection
            async with new_async_session(step.base_url, _headers(), 1, reuse=False) as session:
                return await aexchange(session, step)
        session = await SharedResources.get_async_rerank_client(step.base_url)
    except NoProxy as exc:
        return Failure("connect", exc, False, str(exc))
    except OSError as exc:  # the CA file that the environment names
        return Failure("tls", exc, False, str(exc))
    return await aexchange(session, step)

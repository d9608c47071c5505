"""The guard's own answers, refusals and errors, and what it adds to vLLM's answers."""

import json
import math
from collections.abc import Callable
from typing import Any


class Refusal(Exception):
    """A request that is not passed on. reason labels the metric, param names the field at fault."""

    def __init__(self, status: int, reason: str, message: str, *, param: str | None = None, retry_s: float = 0):
        super().__init__(message)
        self.status, self.reason, self.param, self.retry_s = status, reason, param, retry_s


ERROR_TYPES = {400: "BadRequestError", 401: "AuthenticationError", 404: "NotFoundError", 413: "ContentTooLargeError"}
ERROR_TYPES |= {408: "RequestTimeoutError", 415: "UnsupportedMediaTypeError", 422: "UnprocessableEntityError"}
ERROR_TYPES |= {429: "TooManyRequestsError", 500: "InternalServerError", 503: "ServiceUnavailableError"}
ERROR_TYPES |= {504: "GatewayTimeoutError"}
MOST_RETRY_S = 59  # the Vercel AI SDK obeys 59 seconds and ignores 60

# Of TEI's ErrorType (core/src/lib.rs of text-embeddings-inference).
TEI_TYPES = {429: "overloaded", 500: "backend", 503: "unhealthy", 504: "backend"}


def error_body(error: dict, dialect: str = "") -> dict:
    """An error in the shape of one API. error: vLLM's {"message", "type", "param", "code"}."""
    message = error["message"]
    if dialect == "tei":
        kind = TEI_TYPES.get(error.get("code") or 0, "validation")
        return {"error": message, "error_type": kind, "message": message}
    if dialect == "voyage":
        return {"detail": message, "message": message}
    if dialect == "nvidia":
        return {"object": "error", "message": message, "detail": message, "type": error.get("type")}
    # detail: clients for Jina's API fail with a KeyError without it. message: the AI SDK shows no other.
    return {"error": error, "detail": message, "message": message}


async def _send_json(send, status: int, content: Any, headers=(), body: bytes | None = None) -> None:
    """Send content as JSON, or a body that is JSON already."""
    body = json.dumps(content).encode() if body is None else body
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), *headers]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _send_refusal(send, exc: Refusal, dialect: str = "") -> None:
    """Answer in vLLM's error format (ErrorResponse in vllm/entrypoints/serve/engine/protocol.py), or a dialect's."""
    headers = []
    if exc.retry_s:
        headers.append((b"retry-after", str(min(math.ceil(exc.retry_s), MOST_RETRY_S)).encode()))
    if exc.status == 408:  # what may still come of the body is not waited for
        headers.append((b"connection", b"close"))
    if exc.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    error = {"message": str(exc), "type": ERROR_TYPES[exc.status], "param": exc.param, "code": exc.status}
    await _send_json(send, exc.status, error_body(error, dialect), headers)


def whole(send, edit: Callable[[int, bytes], bytes]):
    """A send() that holds an answer until it is complete, and sends edit(status, body) instead of its body."""
    start: dict = {}
    chunks: list[bytes] = []

    async def send_whole(message):
        nonlocal start
        if message["type"] == "http.response.start":
            start = message
            return
        chunks.append(message.get("body", b""))
        if message.get("more_body"):
            return
        body = edit(start["status"], b"".join(chunks))
        headers = [pair for pair in start.get("headers", ()) if pair[0].lower() != b"content-length"]
        headers.append((b"content-length", str(len(body)).encode()))
        await send({**start, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    return send_whole


# vLLM writes id, model and usage before the results; ids and names are short.
_USAGE, _WITHIN = b'"usage":{', 4096


def with_additions(body: bytes, meta: bytes = b"{}") -> bytes:
    """vLLM's rerank answer with the fields that Cohere's and Together's clients need, put in by bytes.

    @ai-sdk/cohere refuses an answer without `meta`, @ai-sdk/togetherai one without `usage.completion_tokens`.
    """
    at = body.find(_USAGE, 0, _WITHIN)  # inside a JSON text its quotes would be escaped
    if at < 0 or not body.startswith(b"{"):
        return body
    at += len(_USAGE)
    added = b"" if body.startswith(b'"completion_tokens"', at) else b'"completion_tokens":0,'
    return b"".join((b'{"meta":', meta, b",", body[1:at], added, body[at:]))

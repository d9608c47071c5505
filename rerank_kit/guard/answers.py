"""The guard's own answers: refusals and errors, in vLLM's error format."""

import json
import math


class Refusal(Exception):
    """A request that is not passed on. reason labels the metric, param names the field at fault."""

    def __init__(self, status: int, reason: str, message: str, *, param: str | None = None, retry_s: float = 0):
        super().__init__(message)
        self.status, self.reason, self.param, self.retry_s = status, reason, param, retry_s


ERROR_TYPES = {400: "BadRequestError", 401: "AuthenticationError", 404: "NotFoundError", 413: "ContentTooLargeError"}
ERROR_TYPES |= {422: "UnprocessableEntityError", 429: "TooManyRequestsError", 503: "ServiceUnavailableError"}
ERROR_TYPES |= {408: "RequestTimeoutError", 500: "InternalServerError"}


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
    if exc.status == 408:  # what may still come of the body is not waited for
        headers.append((b"connection", b"close"))
    if exc.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    error = {"message": str(exc), "type": ERROR_TYPES[exc.status], "param": exc.param, "code": exc.status}
    # detail: clients for Jina's API read it and fail with a KeyError without it.
    await _send_json(send, exc.status, {"error": error, "detail": str(exc)}, headers)

"""The exceptions of the client, and what they may quote of an answer."""

from .. import settings
from .exchange import ERROR_BYTES

MAX_BODY_CHARS = 2000  # of an error's body, kept in the exception


class RerankError(RuntimeError):
    """Any failure of a call."""


class RerankConnectionError(RerankError):
    """No connection, or it broke before the answer was complete."""


class RerankTimeout(RerankConnectionError):
    """No connection or no complete answer in time."""


class RerankHTTPError(RerankError):
    """The server answered with another status than 2xx.

    Attributes:
        status_code: the HTTP status.
        body: the answer's text, at most MAX_BODY_CHARS characters.
    """

    def __init__(self, message: str, status_code: int = 0, body: str = ""):
        super().__init__(message)
        self.status_code, self.body = status_code, body


class RerankResponseError(RerankError, ValueError):
    """A 2xx answer that is not what was asked for."""


def excerpt(body: bytes | str, limit: int = 200) -> str:
    """The beginning of an answer on one line, for a message: printable, and without our API key."""
    text = body if isinstance(body, str) else body[:ERROR_BYTES].decode("utf-8", "replace")
    if settings.CFG.api_key:  # a server may echo the request's headers
        text = text.replace(settings.CFG.api_key, "***")
    text = " ".join("".join(c if c.isprintable() else " " for c in text[: 4 * limit]).split())
    return text if len(text) <= limit else text[:limit] + "..."

"""The exceptions of the client, and the excerpt of an answer that a message may quote."""

from .. import settings
from .exchange import ERROR_BYTES

MAX_BODY_CHARS = 2000  # limit on the characters of an error's body that the exception keeps


class RerankError(RuntimeError):
    """Any failure of a call."""


class RerankConnectionError(RerankError):
    """No connection, or the connection broke before the answer was complete."""


class RerankTimeout(RerankConnectionError):
    """No connection or no complete answer in time."""


class RerankHTTPError(RerankError):
    """The server answered with a status other than 2xx.

    Attributes:
        status_code: the HTTP status.
        body: the answer's text, at most MAX_BODY_CHARS characters.
    """

    def __init__(self, message: str, status_code: int = 0, body: str = ""):
        super().__init__(message)
        self.status_code, self.body = status_code, body


class RerankResponseError(RerankError, ValueError):
    """A 2xx answer that does not fit the request, such as a missing score or a wrong index."""


def excerpt(body: bytes | str, limit: int = 200) -> str:
    """The beginning of an answer as one printable line, without the API key."""
    text = body if isinstance(body, str) else body[:ERROR_BYTES].decode("utf-8", "replace")
    if settings.CLIENT.api_key:  # a server may echo the request's headers
        text = text.replace(settings.CLIENT.api_key, "***")
    text = " ".join("".join(c if c.isprintable() else " " for c in text[: 4 * limit]).split())
    return text if len(text) <= limit else text[:limit] + "..."

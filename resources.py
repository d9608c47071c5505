"""Shared sessions of the client and its error types. The code is in rerank_kit/client/."""

from typing import TYPE_CHECKING

from rerank_kit import settings
from rerank_kit.client.errors import (
    RerankConnectionError,
    RerankError,
    RerankHTTPError,
    RerankResponseError,
    RerankTimeout,
)
from rerank_kit.client.sending import Reply, apost, post
from rerank_kit.client.sessions import SharedResources, base_urls

__all__ = [
    "LOCAL_BASE_URL",
    "PORT",
    "Reply",
    "RerankConnectionError",
    "RerankError",
    "RerankHTTPError",
    "RerankResponseError",
    "RerankTimeout",
    "SharedResources",
    "apost",
    "base_urls",
    "post",
]


PORT: int  # these two have a type here and a value by __getattr__
LOCAL_BASE_URL: str
if not TYPE_CHECKING:  # a type checker would take every misspelt name for one that __getattr__ knows

    def __getattr__(name: str) -> int | str:
        """PORT and LOCAL_BASE_URL are read on first use: importing this module does nothing."""
        if name == "PORT":
            return settings.CLIENT.port
        if name == "LOCAL_BASE_URL":
            return base_urls()[0]
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


settings.warn_of_edits(__name__, globals())

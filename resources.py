"""The way to the reranker: shared sessions and the error types. The code is in rerank_kit/client/."""

from typing import Any

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
    "LOCAL_BASE_URL",  # noqa: F822 these two by __getattr__
    "PORT",  # noqa: F822
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


def __getattr__(name: str) -> Any:
    """PORT and LOCAL_BASE_URL are read on first use: importing this module does nothing."""
    if name == "PORT":
        return settings.CFG.port
    if name == "LOCAL_BASE_URL":
        return base_urls()[0]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

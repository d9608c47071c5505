"""Rerankers on vLLM in production: client, service, offline scoring, benchmark. docs/architecture.md shows the parts.

    from rerank_kit import rerank, score, arerank, ascore, rerank_many

The names of the client are imported on first use, so the guard and the supervisor load this package without requests.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .client import (
        FirstStage,
        RerankConnectionError,
        RerankError,
        RerankHTTPError,
        RerankItem,
        RerankResponseError,
        RerankTimeout,
        SharedResources,
        arerank,
        ascore,
        image_document,
        rerank,
        rerank_many,
        score,
    )
    from .settings import ConfigError

__version__ = "1.0.0"
__all__ = [
    "ConfigError",
    "FirstStage",
    "RerankConnectionError",
    "RerankError",
    "RerankHTTPError",
    "RerankItem",
    "RerankResponseError",
    "RerankTimeout",
    "SharedResources",
    "arerank",
    "ascore",
    "image_document",
    "rerank",
    "rerank_many",
    "score",
]


if not TYPE_CHECKING:  # a type checker would take every misspelt name for one that __getattr__ knows

    def __getattr__(name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        if name == "ConfigError":
            from .settings import ConfigError

            return ConfigError
        from . import client

        return getattr(client, name)

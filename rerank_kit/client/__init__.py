"""What a caller of the service needs: rerank() and score(), sync and async, over pooled sessions.

Imports are relative and reach no further than settings.py: the folder can be copied into another package.
"""

from .calls import RerankItem, arerank, ascore, image_document, rerank, rerank_many, score
from .errors import RerankConnectionError, RerankError, RerankHTTPError, RerankResponseError, RerankTimeout
from .sessions import SharedResources
from .two_stages import FirstStage

__all__ = [
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

"""rerank() and score(), sent to the running service. The code is in rerank_kit/client/calls.py.

from model_utils import rerank, score

items, scores, raw = rerank("What is the capital of China?", ["Beijing is ...", "Gravity ..."], top_n=1)
"""

from rerank_kit.client.calls import (
    Items,
    LongDocuments,
    RerankItem,
    arerank,
    ascore,
    image_document,
    rerank,
    rerank_many,
    score,
)
from rerank_kit.client.two_stages import FirstStage

__all__ = [
    "FirstStage",
    "Items",
    "LongDocuments",
    "RerankItem",
    "arerank",
    "ascore",
    "image_document",
    "rerank",
    "rerank_many",
    "score",
]

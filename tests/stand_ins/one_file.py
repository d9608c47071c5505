"""Scores one file, as vllm_usage.py does for many."""

from pathlib import Path

from rerank_kit.offline.files import Shard, score_shards
from rerank_kit.settings import ConfigError


def score_file(reranker, source: Path, output: Path, skip: int, total: int) -> tuple[int, int]:
    """(lines scored, lines without a score) from line skip + 1 on."""
    scored, failed, broken = score_shards(reranker, [Shard(source, output, skip, total)])
    if broken:
        raise ConfigError(broken[0])
    return scored, failed

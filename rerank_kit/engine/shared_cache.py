"""Whether the Redis of RESULT_CACHE_URL can be asked at all; it need not run yet."""

import sys
from importlib.util import find_spec
from pathlib import Path

from rerank_kit.redis_url import TLS_OPTIONS, redis_arguments
from rerank_kit.settings import KIT_DIR, ConfigError, EnvConfig, source_of


def check_shared_cache(cfg: EnvConfig) -> None:
    """Raise ConfigError if RESULT_CACHE_URL has another form, names files that are missing, or redis-py is missing."""
    if not cfg.result_cache_url:
        return
    named = f"RESULT_CACHE_URL=*** ({source_of(cfg, 'RESULT_CACHE_URL')})"
    try:
        found = redis_arguments(cfg.result_cache_url)
    except ValueError as exc:
        raise ConfigError(f"{named} {exc}") from None
    for option in TLS_OPTIONS:
        if option in found and not Path(found[option]).is_file():
            raise ConfigError(f"{named}: {option}={found[option]} is no file: give the whole path")
    if find_spec("redis") is None:
        file = KIT_DIR / "requirements-redis.txt"
        raise ConfigError(f"{named} needs the Python package redis: {sys.executable} -m pip install -r {file}")

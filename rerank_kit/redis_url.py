"""RESULT_CACHE_URL in its parts. No error shows a part of it, since any part may be the password."""

import re
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

# Strict: an @ / ? # of a password that is not escaped would make its first half the host, which logs show.
URL = re.compile(
    r"rediss?://(?:[^\s/@:?#]*(?::[^\s/@:?#]*)?@)?(?:\[[0-9a-f:.]+\]|[\w.-]+)(?::\d+)?(?:/\d{0,5})?(?:\?[^\s@]*)?",
    re.ASCII | re.IGNORECASE,
)
FORM = (
    "redis://[USER:PASSWORD@]HOST[:PORT][/DATABASE], or rediss:// for TLS; within a password write "
    "% @ : / ? # as %25 %40 %3A %2F %3F %23"
)
TLS_OPTIONS = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile")


def redis_arguments(url: str) -> dict[str, Any]:
    """A URL as arguments of redis.asyncio.Redis: host, port, db; username, password; ssl and its files.

    Raises:
        ValueError: the URL has another form.
    """
    try:
        parts = urlsplit(url)
        port = 6379 if parts.port is None else parts.port
        options = dict(parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query)))
    except ValueError:
        raise ValueError(f"is not {FORM}") from None
    if not URL.fullmatch(url) or not port:
        raise ValueError(f"is not {FORM}")
    is_tls = parts.scheme == "rediss"
    if options.keys() - set(TLS_OPTIONS if is_tls else ()):
        raise ValueError(f"may have {', '.join(TLS_OPTIONS)} behind its ?, with rediss:// only, and nothing else")
    found: dict[str, Any] = {"host": parts.hostname, "port": port, "db": int(parts.path[1:] or 0)}
    found |= {name: unquote(text) for name in ("username", "password") if (text := getattr(parts, name))}
    return found | options | ({"ssl": True} if is_tls else {})

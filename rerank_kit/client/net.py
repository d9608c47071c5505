"""What this process's environment says of the network: proxies and certificates; and how new a library has to be."""

import ipaddress
import os
import ssl
from functools import lru_cache
from urllib.parse import urlsplit

import requests

from ..settings import ConfigError


class NoProxy(OSError):
    """The environment names a proxy that cannot be used."""


def _net(base_url: str) -> tuple[dict[str, str], str | None]:
    """(proxies by scheme, CA file or folder) from the environment. Loopback addresses get no proxy."""
    host = urlsplit(base_url).hostname or ""
    try:
        address = ipaddress.ip_address(host)
        loopback = address.is_loopback or address.is_unspecified
    except ValueError:
        loopback = host == "localhost" or host.endswith(".localhost")
    proxies: dict[str, str] = {} if loopback else requests.utils.get_environ_proxies(base_url)
    return proxies, os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("SSL_CERT_FILE")


def _http_proxy(base_url: str, proxies: dict[str, str]) -> str | None:
    """The proxy that requests would choose. aiohttp reads no ALL_PROXY and takes no address without a scheme."""
    proxy: str | None = requests.utils.select_proxy(base_url, proxies)
    if not proxy:
        return None
    proxy = requests.utils.prepend_scheme_if_needed(proxy, "http")  # type: ignore[no-untyped-call,unused-ignore]  # no types in the stubs
    if not urlsplit(proxy).hostname or urlsplit(proxy).scheme not in ("http", "https"):
        # The message does not quote the address: it may hold a password.
        raise NoProxy("HTTP_PROXY, HTTPS_PROXY or ALL_PROXY is not an HTTP proxy: asyncio needs http://HOST:PORT")
    return proxy


def _need(name: str, found: str, *oldest: int) -> None:
    numbers = tuple(int(part) if part.isdigit() else 0 for part in found.split(".")[:2])
    if numbers < oldest:
        raise ConfigError(f"{name} {found} is too old for the client: pip install '{name}>={oldest[0]}.{oldest[1]}'")


@lru_cache
def _tls_context(ca: str | None) -> ssl.SSLContext:
    ca = ca or requests.utils.DEFAULT_CA_BUNDLE_PATH  # the certificates that requests trusts
    return ssl.create_default_context(capath=ca) if os.path.isdir(ca) else ssl.create_default_context(cafile=ca)

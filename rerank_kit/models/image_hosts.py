"""Images from the network: which hosts may be asked (IMAGE_HOSTS), and one image fetched from them.

A service that fetches what its callers name can be used to reach what only the service reaches. So no host is asked
unless IMAGE_HOSTS names it, and no address that is private (loopback, link-local, of a local network) unless it lies in
a network that IMAGE_HOSTS names. The address that was checked is the one that is connected to, after each redirect too.
Proxies of the environment are not used.
"""

import asyncio
import ipaddress
import re
import socket
from typing import Any

from rerank_kit.models.images import REMEDY, BadImage, check_bytes, shown

FETCH_S = 10.0  # for one image, with its redirects
MOST_REDIRECTS = 3
_NAME = re.compile(r"(\*\.)?[a-z0-9_-]+(\.[a-z0-9_-]+)*\.?")
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


class ImageHosts:
    """IMAGE_HOSTS: names, `*.name`, `*` for every public host, and addresses or networks that may be private.

    Raises ValueError for a list that cannot be read.
    """

    def __init__(self, text: str):
        self.names: set[str] = set()
        self.networks: list[Any] = []
        for entry in filter(None, (part.strip().lower() for part in text.split(","))):
            try:
                self.networks.append(ipaddress.ip_network(entry.strip("[]"), strict=False))
            except ValueError:
                if entry != "*" and not _NAME.fullmatch(entry):
                    what = "no host name, *.name, * or network such as 10.0.0.0/8 (without https:// and port)"
                    raise ValueError(f"IMAGE_HOSTS: {entry!r} is {what}") from None
                self.names.add(entry.rstrip("."))

    def check(self, url: str) -> Any:
        """The address as yarl.URL, which aiohttp asks. Raises BadImage for one that may not be asked."""
        from yarl import URL

        try:
            target = URL(url)
            host = (target.raw_host or "").lower().rstrip(".")
            _ = target.port
        except (ValueError, TypeError):
            raise BadImage(f"{shown(url)} is no address of an image: {REMEDY}") from None
        if target.scheme not in ("http", "https") or not host:
            raise BadImage(f"{shown(url)} is no address of an image: {REMEDY}")
        if target.raw_user is not None or target.raw_password is not None:
            raise BadImage("its address has a user or password, which is not sent: leave it out")
        try:
            address = ipaddress.ip_address(host)
        except ValueError:
            if not self.has_name(host):
                raise BadImage(f"images are not fetched from {host[:100]!a}: {self._remedy()}") from None
        else:
            if not self._has_address(address, "*" in self.names):
                raise BadImage(f"images are not fetched from {host[:100]!a}: {self._remedy()}")
        return target

    def has_name(self, host: str) -> bool:
        if "*" in self.names or host in self.names:
            return True
        parts = host.split(".")
        return any("*." + ".".join(parts[i:]) in self.names for i in range(1, len(parts)))

    def takes(self, address: str) -> bool:
        """Whether a host whose name is allowed may be asked at this address."""
        return self._has_address(ipaddress.ip_address(address.partition("%")[0]), True)

    def _has_address(self, address: Any, public: bool) -> bool:
        inner = _inside(address)
        if any(one in network for one in (address, inner) for network in self.networks):
            return True
        return public and all(one.is_global and not one.is_multicast for one in (address, inner))

    def _remedy(self) -> str:
        if not self.names and not self.networks:
            return "send a data URL (data:image/png;base64,...); IMAGE_HOSTS of the service names no host"
        return "IMAGE_HOSTS of the service does not name it; send a data URL (data:image/png;base64,...)"


def _inside(address: Any) -> Any:
    """The IPv4 address that an IPv6 address leads to; the address itself where it leads to none."""
    if address.version == 6:
        if address in _NAT64:
            return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        teredo = address.teredo
        return address.ipv4_mapped or address.sixtofour or (teredo[1] if teredo else address)
    return address


async def fetch(url: str, hosts: ImageHosts, max_bytes: int, within_s: float = FETCH_S) -> bytes:
    """The bytes behind an address. Raises BadImage."""
    import aiohttp

    target = hosts.check(url)
    host = ascii(target.raw_host[:100])
    try:
        async with asyncio.timeout(within_s):
            return await _fetch(target, hosts, max_bytes)
    except TimeoutError:
        raise BadImage(f"{host} did not send the image within {within_s:.0f} s") from None
    except (aiohttp.ClientError, OSError, ValueError) as exc:
        if isinstance(exc, BadImage):
            raise
        raise BadImage(f"the image could not be fetched from {host} ({type(exc).__name__})") from None


async def _fetch(target: Any, hosts: ImageHosts, max_bytes: int) -> bytes:
    import aiohttp
    from yarl import URL

    connector = aiohttp.TCPConnector(resolver=_checked_resolver(hosts), use_dns_cache=False, force_close=True)
    more: dict[str, Any] = {"trust_env": False, "auto_decompress": False, "cookie_jar": aiohttp.DummyCookieJar()}
    async with aiohttp.ClientSession(connector=connector, **more) as session:
        for _ in range(MOST_REDIRECTS + 1):
            headers = {"accept": "image/*", "accept-encoding": "identity"}
            async with session.get(target, allow_redirects=False, headers=headers) as reply:
                if reply.status in (301, 302, 303, 307, 308) and (place := reply.headers.get("location")):
                    target = hosts.check(str(target.join(URL(place))))
                    continue
                host = ascii(target.raw_host[:100])
                if reply.status != 200:
                    raise BadImage(f"{host} answered {reply.status} in place of the image")
                if reply.headers.get("content-encoding", "identity") != "identity":
                    raise BadImage(f"{host} sent the image compressed as a whole, which is not read here")
                check_bytes(reply.content_length or 0, max_bytes)
                data = bytearray()
                async for chunk in reply.content.iter_chunked(65536):
                    data += chunk
                    check_bytes(len(data), max_bytes)
                return bytes(data)
    raise BadImage(f"its address leads on more than {MOST_REDIRECTS} times")


def _checked_resolver(hosts: ImageHosts) -> Any:
    import aiohttp.abc

    class Checked(aiohttp.abc.AbstractResolver):
        """Addresses of a name, each of which may be asked. aiohttp connects to these and asks for no others."""

        async def resolve(self, host: str, port: int = 0, family: Any = socket.AF_INET) -> list[Any]:
            loop = asyncio.get_running_loop()
            found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM, family=family)
            addresses = [row[4][0] for row in found]
            if any(not hosts.takes(str(address)) for address in addresses):
                said = f"images are not fetched from {host[:100]!a}: its address is private"
                raise BadImage(f"{said}, and IMAGE_HOSTS of the service names no network that holds it")
            return [
                {"hostname": host, "host": row[4][0], "port": port, "family": row[0], "proto": row[2], "flags": 0}
                for row in found
            ]

        async def close(self) -> None:
            pass

    return Checked()

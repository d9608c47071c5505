"""One image: its header, its tokens, the hosts that may be asked for it, and what is fetched from them."""

import asyncio
import base64
import io
import socket
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from rerank_kit.models.image_hosts import ImageHosts, fetch
from rerank_kit.models.images import BadImage, Sizes, data_of, data_url, size_of
from rerank_kit.models.profiles import all_profiles

PIL = pytest.importorskip("PIL.Image")
SIZES = Sizes(**all_profiles()["qwen3_vl_reranker"].images)


def png(width=64, height=32, kind="PNG") -> bytes:
    out = io.BytesIO()
    PIL.new("RGB", (width, height), (200, 30, 60)).save(out, kind)
    return out.getvalue()


# ---- size ----


@pytest.mark.parametrize(
    ("size", "tokens"),
    [((64, 32), 6), ((64, 64), 4), ((96, 64), 6), ((100, 150), 15), ((1, 1), 4), ((4000, 3000), 1230), ((200, 1), 29)],
)
def test_tokens_are_those_of_the_resized_image(size, tokens):
    width, height = SIZES.resized(*size)
    assert width % 32 == height % 32 == 0 and SIZES.min_pixels <= width * height <= SIZES.max_pixels
    assert SIZES.tokens(*size) == tokens <= SIZES.most_tokens == 1280


def test_resizing_is_that_of_transformers():
    transformers = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    for size in (
        (64, 32),
        (100, 150),
        (33, 47),
        (1, 1),
        (4000, 3000),
        (1700, 2200),
        (1280, 1024),
        (48, 9000),
        (200, 1),
        (7, 900),
    ):
        height, width = transformers.smart_resize(size[1], size[0], 32, SIZES.min_pixels, SIZES.max_pixels)
        assert SIZES.resized(*size) == (width, height), size


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_the_header_has_the_size(kind):
    assert size_of(png(40, 30, kind)) == (40, 30)


def test_a_decompression_bomb_is_refused_by_its_header():
    """65,000 x 65,000 pixels in 60 bytes: decoded, they would be 12 GB."""
    bomb = bytearray(png())
    bomb[16:24] = (65000).to_bytes(4, "big") * 2
    with pytest.raises(BadImage):
        size_of(bytes(bomb), 25_000_000)
    bomb[16:24] = (6000).to_bytes(4, "big") * 2
    # The checksum of the header is wrong now: Pillow may say so, or the size is too large.
    with pytest.raises(BadImage):
        size_of(bytes(bomb), 25_000_000)
    whole = png(5001, 5000)
    with pytest.raises(BadImage, match=r"5001 x 5000 pixels, the limit is 25000000 \(MAX_IMAGE_PIXELS\)"):
        size_of(whole, 25_000_000)
    assert size_of(whole) == (5001, 5000)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "no image that is read here"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "PNG, JPEG, WEBP, GIF, BMP"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no image"),
        (png()[:20], "no image"),
        (png(201, 1), "more than 200 times the other"),
    ],
)
def test_other_bytes_are_no_image(data, said):
    with pytest.raises(BadImage, match=said):
        size_of(data)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("data:image/png,abc", "no base64 data URL"),
        ("data:image/png;base64", "no base64 data URL"),
        ("data:image/png;base64,@@@@", "no valid base64"),
        ("data:image/png;base64,AAA", "no valid base64"),
        ("data:image/png;base64," + "A" * 400, r"more than 100 bytes \(MAX_IMAGE_BYTES\)"),
    ],
)
def test_a_data_url_that_is_none(url, said):
    with pytest.raises(BadImage, match=said):
        data_of(url, 100)


def test_a_data_url_is_its_bytes():
    data = png()
    assert data_of("data:image/png;base64," + base64.b64encode(data).decode(), len(data)) == data
    assert data_of("DATA:;charset=x;base64," + base64.b64encode(data).decode()) == data
    assert data_of(data_url(data)) == data


# ---- hosts ----

PUBLIC, PRIVATE = "8.8.8.8", "10.1.2.3"


@pytest.mark.parametrize(
    ("hosts", "url", "taken"),
    [
        ("", "https://example.com/a.png", False),
        ("example.com", "https://example.com/a.png", True),
        ("example.com", "https://EXAMPLE.com./a.png", True),
        ("example.com", "https://a.example.com/a.png", False),
        ("example.com", "https://example.com.evil.org/a.png", False),
        ("example.com", "https://example.com@evil.org/a.png", False),
        ("example.com", "https://user:word@example.com/a.png", False),
        ("example.com", "file://example.com/etc/passwd", False),
        ("example.com", "ftp://example.com/a.png", False),
        ("example.com", "https:///a.png", False),
        ("example.com", "/tmp/a.png", False),
        ("example.com", "https://example.com:99999/", False),
        ("*.example.com", "https://a.b.example.com/a.png", True),
        ("*.example.com", "https://example.com/a.png", False),
        ("*.example.com", "https://badexample.com/a.png", False),
        ("*", "https://anything.org/a.png", True),
        ("*", f"https://{PUBLIC}/a.png", True),
        ("example.com", f"https://{PUBLIC}/a.png", False),
        ("*", f"http://{PRIVATE}/a.png", False),
        ("*", "http://127.0.0.1/", False),
        ("*", "http://[::1]/", False),
        ("*", "http://[::ffff:127.0.0.1]/", False),
        ("*", "http://[::ffff:a9fe:a9fe]/", False),
        ("*", "http://[64:ff9b::7f00:1]/", False),
        ("*", "http://[2002:7f00:1::]/", False),
        ("*", "http://169.254.169.254/latest/meta-data", False),
        ("*", "http://100.64.0.1/", False),
        ("*", "http://0.0.0.0/", False),
        ("*", "http://[fe80::1]/", False),
        ("*", "http://224.0.0.1/", False),
        ("10.0.0.0/8", f"http://{PRIVATE}/a.png", True),
        ("10.1.2.3", f"http://{PRIVATE}:9000/a.png", True),
        ("10.1.2.4", f"http://{PRIVATE}/a.png", False),
        ("10.0.0.0/8", f"http://[::ffff:{PRIVATE}]/a.png", True),
        ("127.0.0.1, example.com", "http://[::1]/", False),
        ("::1", "http://[::1]/", True),
    ],
)
def test_which_addresses_may_be_asked(hosts, url, taken):
    try:
        ImageHosts(hosts).check(url)
        assert taken
    except BadImage:
        assert not taken


@pytest.mark.parametrize("entry", ["https://example.com", "example.com:80", "a b", "*.*", "ex*mple.com", "10.0.0.0/99"])
def test_an_entry_that_is_no_host_is_named(entry):
    with pytest.raises(ValueError, match="IMAGE_HOSTS: ") as caught:
        ImageHosts(f"good.org,{entry}")
    assert repr(entry) in str(caught.value)


# ---- fetching ----

GOOD = png()


class Site(BaseHTTPRequestHandler):
    """A host of images: good ones, large ones, slow ones, and redirects."""

    def do_GET(self):
        self.server.asked.append(self.path)
        path, _, place = self.path.partition("?to=")
        status = {"/missing": 404, "/to": 302, "/broken": 500}.get(path, 200)
        self.send_response(status)
        if path == "/to":
            self.send_header("location", place)
        if path == "/packed":
            self.send_header("content-encoding", "gzip")
        if path == "/said-large":
            self.send_header("content-length", "999999")
        if path == "/slow":
            self.server.slow.wait(5)
        with suppress(OSError):  # the kit leaves
            self.end_headers()
            for _ in range(50 if path == "/large" else 1):
                self.wfile.write(GOOD)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def site():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Site)
    server.asked, server.slow = [], threading.Event()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.slow.set()
    server.shutdown()
    server.server_close()


def got(url, hosts="127.0.0.1", most=1500, **more):
    pytest.importorskip("aiohttp")
    return asyncio.run(fetch(url, ImageHosts(hosts), most, **more))


def test_an_image_is_fetched_also_behind_redirects(site):
    root = f"http://127.0.0.1:{site.server_port}"
    assert got(f"{root}/a.png") == GOOD
    assert got(f"{root}/to?to=/to?to=/a.png") == GOOD
    assert got(f"{root}/to?to={root}/a.png") == GOOD


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("/missing", "answered 404"),
        ("/broken", "answered 500"),
        ("/large", r"more than \d+ bytes \(MAX_IMAGE_BYTES\)"),
        ("/said-large", r"more than \d+ bytes \(MAX_IMAGE_BYTES\)"),
        ("/packed", "compressed as a whole"),
        ("/to?to=/to?to=/to?to=/to?to=/a.png", "more than 3 times"),
        ("/to?to=http://127.0.0.2:1/a.png", "images are not fetched from '127.0.0.2'"),
        ("/to?to=http://localhost:1/a.png", "images are not fetched from 'localhost'"),
        ("/to?to=file:///etc/passwd", "no address of an image"),
    ],
)
def test_what_is_not_fetched(site, path, said):
    with pytest.raises(BadImage, match=said):
        got(f"http://127.0.0.1:{site.server_port}{path}")


def test_a_host_that_is_slow_or_away(site):
    with pytest.raises(BadImage, match="did not send the image within"):
        got(f"http://127.0.0.1:{site.server_port}/slow", within_s=0.3)
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        with pytest.raises(BadImage, match=r"could not be fetched from '127\.0\.0\.1'"):
            got(f"http://127.0.0.1:{held.getsockname()[1]}/a.png")


@pytest.mark.parametrize("hosts", ["*", "*,10.0.0.0/8", "localhost"])
def test_a_name_with_a_private_address_is_not_asked(site, hosts):
    """Also where a number is spelled in a way that only the system's resolver reads as an address."""
    before = len(site.asked)
    names = ["localhost"] if hosts == "localhost" else ["localhost", "127.1", "2130706433", "0x7f.1"]
    for name in names:
        with pytest.raises(BadImage, match=r"its address is private|not fetched|could not be fetched"):
            got(f"http://{name}:{site.server_port}/a.png", hosts)
    assert len(site.asked) == before, "the host was asked"
    assert got(f"http://localhost:{site.server_port}/a.png", f"{hosts},127.0.0.0/8,::1") == GOOD


def test_the_address_that_was_checked_is_the_one_that_is_asked(site, monkeypatch):
    """A name whose address changes between two questions (DNS rebinding) is resolved once for each connection."""
    asked = []

    async def resolve(loop, host, port, **more):
        asked.append(host)
        address = "127.0.0.1" if len(asked) == 1 else "127.0.0.9"
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]

    monkeypatch.setattr(asyncio.base_events.BaseEventLoop, "getaddrinfo", resolve)
    assert got(f"http://rebound.test:{site.server_port}/a.png", "rebound.test,127.0.0.1") == GOOD
    assert asked == ["rebound.test"]


def test_the_proxy_of_the_environment_is_not_asked(site, monkeypatch):
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert got(f"http://127.0.0.1:{site.server_port}/a.png") == GOOD

"""Requests that offer HTTP/2 by Upgrade, as Java's HttpClient does, over real sockets to uvicorn."""

import json
import re
import socket
import threading
import time

import pytest

from rerank_kit.guard.upgrades import read_bodies

OFFER = b"connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AAEAAEAAAAIAAAAB\r\n"
FRAMED = {
    "length": (b"content-length: 11\r\n", b"hello world"),
    "chunked": (b"transfer-encoding: chunked\r\n", b"5\r\nhello\r\n6\r\n world\r\n0\r\n\r\n"),
}


async def app(scope, receive, send):
    """Answers with method, path and body."""
    body, more = b"", True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)  # neither of "http.disconnect"
    said = json.dumps([scope["method"], scope["path"], body.decode()]).encode()
    length = (b"content-length", b"%d" % len(said))
    await send({"type": "http.response.start", "status": 200, "headers": [length]})
    await send({"type": "http.response.body", "body": said})


@pytest.fixture(scope="module")
def port():
    uvicorn = pytest.importorskip("uvicorn")
    pytest.importorskip("httptools")
    read_bodies()
    read_bodies()  # of a second Guard
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", lifespan="off", http="httptools"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = server.force_exit = True
    thread.join(10)


def answers(port, parts, n):
    """The first n answers on one connection to which the parts are sent one by one."""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for part in parts:
            connection.sendall(part)
            time.sleep(0.001)
        data = b""
        while len(found := re.findall(rb"HTTP/1\.1 200 OK.*?\r\n\r\n(\[.*?\])", data, re.S)) < n:
            more = connection.recv(65536)
            assert more, data
            data += more
        return [json.loads(one) for one in found]


def request(path, framing="length", offer=OFFER, method=b"POST"):
    head, body = FRAMED[framing] if framing else (b"", b"")
    return method + b" " + path + b" HTTP/1.1\r\nhost: x\r\n" + offer + head + b"\r\n" + body


@pytest.mark.parametrize("framing", FRAMED)
def test_body_arrives_wherever_the_segments_end(port, framing):
    whole = request(b"/a", framing)
    for cut in range(1, len(whole)):
        assert answers(port, [whole[:cut], whole[cut:]], 1) == [["POST", "/a", "hello world"]], cut


@pytest.mark.parametrize("framing", FRAMED)
def test_connection_stays_usable(port, framing):
    mixed = [request(b"/a", framing), request(b"/b", "length", b""), request(b"/c", framing), request(b"/d", framing)]
    wanted = [["POST", path, "hello world"] for path in ("/a", "/b", "/c", "/d")]
    assert answers(port, mixed, 4) == wanted
    assert answers(port, [b"".join(mixed)], 4) == wanted, "sent at once"


def test_request_without_body(port):
    empty = request(b"/a", None, method=b"GET")
    assert answers(port, [empty, request(b"/b")], 2) == [["GET", "/a", ""], ["POST", "/b", "hello world"]]
    nothing = b"POST /a HTTP/1.1\r\nhost: x\r\n" + OFFER + b"content-length: 0\r\n\r\n"
    assert answers(port, [nothing, request(b"/b")], 2) == [["POST", "/a", ""], ["POST", "/b", "hello world"]]


def test_many_at_once(port):
    """Each takes a new parser."""
    nothing = b"POST /a HTTP/1.1\r\nhost: x\r\n" + OFFER + b"content-length: 0\r\n\r\n"
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall(nothing * 1500)
        data = b""
        while data.count(b"HTTP/1.1 200 OK") < 1500 and (more := connection.recv(65536)):
            data += more
    assert data.count(b"HTTP/1.1 200 OK") == 1500


def test_body_without_an_end_is_400(port, caplog):
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall(b"POST /a HTTP/1.1\r\nhost: x\r\n" + OFFER + b"transfer-encoding: gzip\r\n\r\nhello")
        assert connection.recv(65536).startswith(b"HTTP/1.1 400 ")
    assert "Traceback" not in caplog.text

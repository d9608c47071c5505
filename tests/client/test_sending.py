"""resources: what happens to a call when the network or the server misbehaves, over real sockets, sync and async."""

# ruff: noqa: F401, F811 (a fixture is imported, then named as an argument)

import asyncio
import contextlib
import email.utils
import gc
import json
import logging
import math
import os
import pickle
import socket
import subprocess
import sys
import threading
import time
import traceback
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests
from conftest import free_port, until
from fault_server import (
    DOCS,
    RIGHT,
    answer,
    client,
    config,
    drip,
    http,
    reply,
    score_of,
    self_signed,
    send,
    serve,
    slow,
    status,
)
from hypothesis import given
from hypothesis import settings as tries
from hypothesis import strategies as st

import resources
from rerank_kit import settings
from rerank_kit.client import exchange, sending
from rerank_kit.client.calls import arerank, rerank
from rerank_kit.client.errors import (
    RerankConnectionError,
    RerankError,
    RerankHTTPError,
    RerankResponseError,
    RerankTimeout,
)
from rerank_kit.client.sessions import SharedResources, base_urls

pytestmark = [pytest.mark.timeout(90), pytest.mark.filterwarnings("error")]


KIT = Path(resources.__file__).parent


def dead_url() -> str:
    return f"http://127.0.0.1:{free_port()}/v1"


# --- JSON: msgspec where it is installed, else json ------------------------------------------------------------

_texts = st.text(st.characters(codec="utf-8"), max_size=8)
_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_texts, inner, max_size=4),
    max_leaves=10,
)


def outcome(decode, body):
    try:
        return repr(decode(body))
    except (ValueError, RecursionError):
        return "what is not JSON"


@tries(max_examples=400, deadline=None)
@given(
    _json.map(lambda value: json.dumps(value).encode())
    | st.binary(max_size=12)
    | st.text('0123456789.eE+-[]{}:,"\\u dn', max_size=16).map(str.encode)
    | st.sampled_from([b"1e999", b"9" * 5000, b"[" * 100_000, b"\xef\xbb\xbf{}", "{}".encode("utf-16"), b'"\\ud800"'])
)
def test_the_faster_json_reads_what_json_reads(body):
    assert sending.msgspec, "it comes with vLLM"
    assert outcome(sending._decode, body) == outcome(json.loads, body)


class Name(str):
    pass


@given(_texts, st.lists(_texts, max_size=4), st.integers(0, 1 << 70))
def test_the_faster_json_writes_what_json_reads_the_same(query, documents, top_n):
    payload = {"query": query, "documents": documents, "top_n": top_n}
    assert json.loads(sending._encode(payload)) == payload
    assert json.loads(sending._encode(payload | {"query": Name(query)})) == payload


def test_a_client_without_msgspec_gets_the_same(client, serve, monkeypatch):
    server = serve()
    with_it = client.rerank("q", DOCS, base_url=server.url)
    monkeypatch.setattr(sending, "msgspec", None)
    items, scores, raw = client.rerank("q", DOCS, base_url=server.url)
    assert (items, scores, raw["results"]) == (*with_it[:2], with_it[2]["results"])


# --- no connection --------------------------------------------------------------------------------------------


def test_refused_connection_says_what_to_do(client):
    url = dead_url()
    with pytest.raises(RerankConnectionError) as caught:
        client.rerank("q", DOCS, base_url=url)
    assert str(caught.value) == f'no server at {url} (Connection refused): run "sh start_rerank.sh status"'
    assert not isinstance(caught.value, RerankTimeout)
    assert caught.value.__cause__ is not None


def test_refused_connection_is_tried_again(client, serve, config, monkeypatch):
    config(retries=8)
    monkeypatch.setattr(sending, "BACKOFF_S", 0.3)
    port = free_port()
    timer = threading.Timer(0.2, lambda: serve(port=port))
    timer.start()
    assert client.rerank("q", DOCS, base_url=f"http://127.0.0.1:{port}")[1] == RIGHT
    timer.join()


def test_unknown_host_is_a_connection_error(client, config):
    config(retries=1)
    with pytest.raises(RerankConnectionError, match=r"no server at http://no-such-host\.invalid/v1 \("):
        client.rerank("q", DOCS, base_url="http://no-such-host.invalid", deadline_s=10)


def test_connect_timeout(client, config):
    config(connect_timeout_s=0.2, retries=0)
    # A listener whose queue is full drops further connects, as a host that is gone does.
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(0)
    address = listener.getsockname()
    fillers = [socket.socket() for _ in range(3)]
    for filler in fillers:
        filler.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            filler.connect(address)
    t0 = time.monotonic()
    with pytest.raises(RerankTimeout, match=r"no connection to .* within 0\.2 s"):
        client.rerank("q", DOCS, base_url=f"http://127.0.0.1:{address[1]}")
    assert 0.15 < time.monotonic() - t0 < 4
    for one in [listener, *fillers]:
        one.close()


# --- broken answers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["close", "reset"])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.2, 0.5, 0.99])
def test_broken_off_answer_is_a_connection_error_and_not_sent_again(client, serve, end, share):
    """Before the answer, in the status line, in the headers, in the body."""
    server = serve(send(None, share, end))
    with pytest.raises(RerankConnectionError, match="broke off before its answer was complete") as caught:
        client.rerank("q", DOCS, base_url=server.url)
    assert not isinstance(caught.value, RerankTimeout)
    assert len(server.requests) == 1
    assert client.rerank("q", DOCS, base_url=server.url)[1] == RIGHT


@pytest.mark.parametrize("share", [0.0, 0.2, 0.9])
def test_stalled_answer_is_a_timeout_and_not_sent_again(client, serve, share):
    server = serve(send(None, share, "stall"))
    t0 = time.monotonic()
    with pytest.raises(RerankTimeout, match=r"no complete answer from .*/v1/rerank within 0\.5 s"):
        client.rerank("q", DOCS, base_url=server.url, timeout_s=0.5)
    assert 0.4 < time.monotonic() - t0 < 5
    time.sleep(0.1)
    assert len(server.requests) <= 1  # 0: a busy machine
    server.script.clear()
    assert client.rerank("q", DOCS, base_url=server.url)[1] == RIGHT


@pytest.mark.parametrize("start", [0, 60, 150])
def test_dripping_answer_ends_at_the_timeout(client, serve, start):
    """Every byte comes in time, the answer never: the timer is that of the answer, not of a read."""
    server = serve(drip(start))
    t0 = time.monotonic()
    with pytest.raises(RerankTimeout):
        client.rerank("q", DOCS, base_url=server.url, timeout_s=0.5)
    assert time.monotonic() - t0 < 5
    assert len(server.requests) <= 1  # 0: a busy machine


def test_big_request_to_a_server_that_does_not_read_ends_at_the_timeout(client, config):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        t0 = time.monotonic()
        with pytest.raises(RerankTimeout):
            client.rerank("q", ["x" * 20_000_000], base_url=url, timeout_s=0.4)
        assert time.monotonic() - t0 < 5


def test_short_timeout_of_one_call_does_not_stay_on_the_connection(client, serve):
    server = serve(answer, slow(1))
    client.rerank("q", DOCS, base_url=server.url, timeout_s=0.8)
    assert client.rerank("q", DOCS, base_url=server.url, timeout_s=5)[1] == RIGHT
    assert server.accepts == 1


def test_timeout_of_one_call_is_not_that_of_the_next_send(client, serve):
    """A socket keeps its timeout; here the next body takes longer to send than that."""
    server = serve(pause_reading_s=1.1)
    client.rerank("q", DOCS, base_url=server.url, timeout_s=0.8)
    big = ["x" * 8_000_000]
    assert client.rerank("q", big, base_url=server.url, timeout_s=10)[1] == [score_of("q", big[0])]
    assert server.accepts == 1


def test_connect_timeout_is_not_the_time_for_the_answer(client, serve, config):
    config(connect_timeout_s=0.3)
    server = serve(default=slow(0.6))
    for _ in range(2):  # over a new connection and over one that stands
        assert client.rerank("q", DOCS, base_url=server.url, timeout_s=5)[1] == RIGHT


def test_stall_on_a_reused_connection_is_a_timeout(client, serve):
    server = serve(answer, send(None, 0.0, "stall"))
    client.rerank("q", DOCS, base_url=server.url)
    t0 = time.monotonic()
    with pytest.raises(RerankTimeout):
        client.rerank("q", DOCS, base_url=server.url, timeout_s=0.5)
    assert time.monotonic() - t0 < 5
    assert len(server.requests) <= 2


@pytest.mark.parametrize(
    "data",
    [
        b"SSH-2.0-OpenSSH_9\r\n",
        b"\x00\x01\x02\r\n\r\n",
        b"HTTP/1.1 abc\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"x" * 100_000,
    ],
)
def test_other_protocol_is_a_connection_error(client, serve, data):
    with pytest.raises(RerankConnectionError, match="broke off"):
        client.rerank("q", DOCS, base_url=serve(send(data)).url)


def test_half_json_is_a_response_error(client, serve):
    with pytest.raises(RerankResponseError, match="not JSON"):
        client.rerank("q", DOCS, base_url=serve(reply(b'{"results": [')).url)


@pytest.mark.parametrize("kind", ["text/html", "application/octet-stream", "text/event-stream"])
def test_wrong_content_type_is_a_response_error(client, serve, kind):
    server = serve(reply(lambda r: r.results(), {"Content-Type": f"{kind}; charset=utf-8"}))
    with pytest.raises(RerankResponseError, match=f"{kind}.*not application/json"):
        client.rerank("q", DOCS, base_url=server.url)


@pytest.mark.parametrize("kind", ["application/json; charset=utf-8", "Application/JSON", None])
def test_right_or_absent_content_type_is_fine(client, serve, kind):
    server = serve(reply(lambda r: r.results(), {"Content-Type": kind}))
    assert client.rerank("q", DOCS, base_url=server.url)[1] == RIGHT


def test_chunked_answer_is_fine(client, serve):
    def body(request):
        return b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (b'{"results": [', rest(request), b""))

    def rest(request):
        return json.dumps(request.results()["results"])[1:].encode() + b"}"

    server = serve(reply(body, {"Content-Length": None, "Transfer-Encoding": "chunked"}))
    assert client.rerank("q", DOCS, base_url=server.url)[1] == RIGHT


def test_answer_without_length_ends_with_the_connection(client, serve):
    def behave(server, connection, request):
        reply(lambda r: r.results(), {"Content-Length": None, "Connection": "close"})(server, connection, request)
        return False

    assert client.rerank("q", DOCS, base_url=serve(behave).url)[1] == RIGHT


@pytest.mark.parametrize("code", [200, 400, 503])
def test_huge_body_is_not_read_to_its_end(client, serve, config, code):
    config(retries=0)
    sent = [0]

    def behave(server, connection, request):
        connection.sendall(http(code, b"", {"Content-Length": 1 << 40}))
        with contextlib.suppress(OSError):
            while sent[0] < 1 << 30:
                connection.sendall(b" " * (1 << 20))
                sent[0] += 1 << 20
        return False

    with pytest.raises((RerankResponseError, RerankHTTPError)) as caught:
        client.rerank("q", DOCS, base_url=serve(behave).url, timeout_s=20)
    assert sent[0] < 64 << 20
    assert len(str(caught.value)) < 500
    if code == 200:
        assert "more than" in str(caught.value)
    else:
        assert caught.value.status_code == code


def test_compressed_answer_is_not_asked_for_nor_unpacked(client, serve):
    import gzip

    server = serve(reply(gzip.compress(b"{}" + b" " * 10**6), {"Content-Encoding": "gzip"}))
    with pytest.raises(RerankResponseError, match="not JSON"):
        client.rerank("q", DOCS, base_url=server.url)
    assert server.requests[0].headers["accept-encoding"] == "identity"


# --- error answers --------------------------------------------------------------------------------------------


def test_error_keeps_the_servers_text(client, serve):
    text = "This model's maximum context length is 256 tokens. However, you requested 300 tokens."
    for body, shown in (
        ({"error": {"message": text, "type": "BadRequestError", "param": None, "code": 400}}, text),
        ({"error": text, "error_type": "Validation"}, text),
        ({"object": "error", "message": text}, text),
        ({"detail": text}, text),
        ({"detail": [{"loc": ["body", "query"], "msg": "Field required"}]}, "Field required"),
        (b"<html>\n<h1>413   Too Large</h1>\x1b[31m</html>", "<html> <h1>413 Too Large</h1> [31m</html>"),
        (b"", "(empty body)"),
        (b"\xff\xff", "\ufffd\ufffd"),
    ):
        server = serve(status(400, body))
        with pytest.raises(RerankHTTPError) as caught:
            client.rerank("q", DOCS, base_url=server.url)
        assert str(caught.value).startswith(f"HTTP 400 from {server.url}/rerank: ")
        assert shown in str(caught.value)
        assert caught.value.status_code == 400 and shown[:10] in (caught.value.body or shown)
        assert len(server.requests) == 1


def test_error_text_is_bounded(client, serve):
    with pytest.raises(RerankHTTPError) as caught:
        client.rerank("q", DOCS, base_url=serve(status(400, {"detail": "x" * 50_000})).url)
    assert len(str(caught.value)) < 700 and 1000 < len(caught.value.body) < 2100


def test_errors_can_be_pickled(client, serve):
    with pytest.raises(RerankHTTPError) as caught:
        client.rerank("q", DOCS, base_url=serve(status(418)).url)
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.status_code, again.body) == (str(caught.value), 418, caught.value.body)


@pytest.mark.parametrize("code", [400, 401, 404, 413, 422, 500, 501])
def test_other_errors_are_not_sent_again(client, serve, code):
    server = serve(status(code))
    with pytest.raises(RerankHTTPError, match=f"HTTP {code} from") as caught:
        client.rerank("q", DOCS, base_url=server.url)
    assert len(server.requests) == 1
    assert ("check RERANK_API_KEY" in str(caught.value)) == (code == 401)


@pytest.mark.parametrize("code", [429, 502, 503, 504])
def test_overload_is_tried_again(client, serve, code):
    server = serve(status(code), status(code))
    assert client.rerank("q", DOCS, base_url=server.url)[1] == RIGHT
    assert len(server.requests) == 3 and server.accepts == 1
    assert len({r.body for r in server.requests}) == 1


@pytest.mark.parametrize("code", [429, 503])
def test_overload_that_stays_is_reported(client, serve, config, code):
    for retries in (0, 2):
        config(retries=retries)
        server = serve(default=status(code))
        with pytest.raises(RerankHTTPError, match=f"told to say {code}"):
            client.rerank("q", DOCS, base_url=server.url)
        assert len(server.requests) == retries + 1


def test_error_whose_text_breaks_off_still_counts_by_its_status(client, serve):
    half = http(503, b'{"error": {"mess', {"Content-Length": 500})
    server = serve(send(half), send(half, end="reset"))
    assert client.rerank("q", DOCS, base_url=server.url)[1] == RIGHT
    assert len(server.requests) == 3


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_retry_after_is_honoured(client, serve, form):
    def refuse(server, connection, request):
        text = "1" if form == "seconds" else email.utils.formatdate(time.time() + 2, usegmt=True)
        return status(429, headers={"Retry-After": text})(server, connection, request)

    server = serve(refuse)
    client.rerank("q", DOCS, base_url=server.url)
    waited = server.requests[1].received - server.requests[0].received
    assert (1.0 if form == "seconds" else 0.9) <= waited < 6


@pytest.mark.timing
def test_retry_after_beyond_the_deadline_fails_at_once(client, serve):
    for headers, more in (
        ({"Retry-After": "3600"}, {}),  # also longer than timeout_s
        ({"Retry-After": "3"}, {"deadline_s": 1.0}),
        ({"Retry-After": email.utils.formatdate(time.time() + 5000, usegmt=True)}, {}),
    ):
        server = serve(default=status(503, headers=headers))
        t0 = time.monotonic()
        with pytest.raises(RerankHTTPError, match="told to say 503"):
            client.rerank("q", DOCS, base_url=server.url, **more)
        assert time.monotonic() - t0 < 2.5
        assert len(server.requests) == 1


@pytest.mark.parametrize("text", ["soon", "", "-5", "nan", "inf", "Thu, 99 Foo 2026", "1e400"])
def test_senseless_retry_after_is_ignored(client, serve, text):
    server = serve(status(429, headers={"Retry-After": text}))
    t0 = time.monotonic()
    assert client.rerank("q", DOCS, base_url=server.url)[1] == RIGHT
    assert time.monotonic() - t0 < 5


def test_deadline_holds_across_retries(client, serve, config):
    config(retries=20)
    server = serve(default=slow(0.1, status(503)))
    t0 = time.monotonic()
    with pytest.raises(RerankError):
        client.rerank("q", DOCS, base_url=server.url, deadline_s=0.7)
    assert time.monotonic() - t0 < 5
    assert 2 <= len(server.requests) <= 10


def test_deadline_shortens_the_wait_for_an_answer(client, serve):
    server = serve(slow(10))
    t0 = time.monotonic()
    with pytest.raises(RerankTimeout, match=r"within 0\.[23]"):
        client.rerank("q", DOCS, base_url=server.url, deadline_s=0.3, timeout_s=10)
    assert time.monotonic() - t0 < 5


def test_the_message_names_the_limit_that_was_met(client, serve, config):
    server = serve(default=slow(10))
    with pytest.raises(RerankTimeout, match="raise deadline_s or send fewer"):
        client.rerank("q", DOCS, base_url=server.url, deadline_s=0.3)
    with pytest.raises(RerankTimeout, match="raise TIMEOUT_S or send fewer"):
        client.rerank("q", DOCS, base_url=server.url, timeout_s=0.3, deadline_s=10)


def test_a_call_that_got_no_connection_says_so(serve, config):
    config(pool_size=1)
    server = serve(default=slow(1))

    async def two():
        first = asyncio.ensure_future(arerank("q", DOCS, base_url=server.url))
        await asyncio.sleep(0.2)
        with pytest.raises(RerankTimeout, match="was free before deadline_s was over: raise POOL_SIZE"):
            await arerank("q", ["x"], base_url=server.url, deadline_s=0.3)
        await first

    asyncio.run(two())
    assert len(server.requests) == 1


def test_a_bad_address_of_the_configuration_names_its_key(config):
    config(base_url="localhost:11438")
    with pytest.raises(settings.ConfigError, match="BASE_URL cannot be used"):
        rerank("q", DOCS)
    with pytest.raises(ValueError, match="base_url='localhost:1' is not like"):
        rerank("q", DOCS, base_url="localhost:1")


def test_retry_budget_bounds_the_load_of_a_sick_server(client, serve, monkeypatch):
    monkeypatch.setattr(sending, "BACKOFF_S", 0.0)
    server = serve(default=status(503))
    for _ in range(150):
        with pytest.raises(RerankHTTPError):
            client.rerank("q", ["d"], base_url=server.url)
    # Ten are free, a tenth of the calls, one a second; without a budget it would be 300.
    assert 15 <= len(server.requests) - 150 <= 40


def test_backoff_is_random_and_grows(config, monkeypatch):
    monkeypatch.setattr(sending, "BACKOFF_S", 0.5)
    config(retries=6)
    waits = []
    for _ in range(200):
        SharedResources._endpoints.clear()
        steps = sending._attempts("/rerank", {}, "http://127.0.0.1:1", None, math.inf)
        step = steps.send(None)
        failure = exchange.Failure("connect", OSError("x"), False, "x")
        seen = []
        with contextlib.suppress(RerankConnectionError):
            while True:
                step = steps.send(failure if isinstance(step, exchange.Step) else None)
                if isinstance(step, float):
                    seen.append(step)
        waits.append(seen)
    for n, column in enumerate(zip(*waits, strict=True)):
        top = min(8.0, 0.5 * 2**n)
        assert 0 <= min(column) < 0.2 * top and 0.8 * top < max(column) <= top
    assert len(waits[0]) == 6


# --- redirects and the key ------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_redirect_is_reported_not_followed(client, serve, config, code):
    config(api_key="sekret-123")
    other = serve()
    server = serve(status(code, b"", {"Location": f"{other.url}/rerank"}))
    with pytest.raises(RerankHTTPError, match=r"redirects to .* not followed: set BASE_URL") as caught:
        client.rerank("q", DOCS, base_url=server.url)
    assert caught.value.status_code == code and other.url in str(caught.value)
    assert other.accepts == 0


def everything(exc: BaseException) -> str:
    """All that a log or a debugger would show of an exception and those behind it."""
    seen, text = [], ""
    while exc is not None and exc not in seen:
        seen.append(exc)
        text += f"{exc} {exc!r} {exc.args!r} {vars(exc)!r}"
        for value in vars(exc).values():
            text += f"{getattr(value, 'headers', '')!r}"
        exc = exc.__cause__ or exc.__context__
    return text + "".join(traceback.format_exception(seen[0]))


def test_key_is_sent_and_never_shown(client, serve, config, caplog):
    caplog.set_level(logging.DEBUG)
    config(api_key="sekret-123", retries=0)

    def echo(request):
        return {"error": {"message": f"headers: {request.headers}"}}

    for behave in (
        status(401, echo),
        status(307, b"", {"Location": "http://h/?key=sekret-123"}),
        reply(lambda r: b"Authorization: Bearer sekret-123", {"Content-Type": "text/sekret-123"}),
        reply(lambda r: {"results": r.headers}),
        reply(lambda r: {"results": [], "model": "sekret-123"}),
        send(b"sekret-123\r\n\r\n"),
        send(b"not HTTP\r\n\r\n"),
        send(None, 0.0),
        send(None, 0.5, "reset"),
        send(None, 0.0, "stall"),
    ):
        server = serve(behave)
        with pytest.raises(RerankError) as caught:
            client.rerank("q", DOCS, base_url=server.url, timeout_s=1)
        assert server.requests[0].headers["authorization"] == "Bearer sekret-123"
        assert "sekret" not in everything(caught.value)
    with pytest.raises(RerankError) as caught:
        client.rerank("q", DOCS, base_url=dead_url())
    assert "sekret" not in everything(caught.value)
    assert "sekret" not in repr(SharedResources.get_local_rerank_client(server.url))
    assert "sekret" not in caplog.text


def test_no_key_no_header(client, serve):
    server = serve()
    client.rerank("q", DOCS, base_url=server.url)
    assert "authorization" not in server.requests[0].headers


@pytest.mark.parametrize("key", ["schlüssel", "пароль", "a b"])
def test_key_that_fits_in_no_header_is_a_configuration_error(client, serve, monkeypatch, key):
    """The server would have read other bytes than the client sent, or none could be sent at all."""
    monkeypatch.setenv("RERANK_API_KEY", key)
    monkeypatch.setattr(settings, "_cache", {})
    server = serve()
    with pytest.raises(settings.ConfigError, match="non-ASCII") as caught:
        client.rerank("q", DOCS, base_url=server.url)
    assert key not in str(caught.value) and server.requests == []


def test_netrc_does_not_replace_the_key(client, serve, config, monkeypatch, tmp_path):
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login a password b\n")
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
    config(api_key="sekret-123")
    server = serve()
    client.rerank("q", DOCS, base_url=server.url)
    assert server.requests[0].headers["authorization"] == "Bearer sekret-123"


def test_server_cookies_are_dropped(client, serve):
    server = serve(reply(lambda r: r.results(), {"Set-Cookie": "a=b"}))
    for _ in range(2):  # by name: aiohttp keeps no cookies of bare addresses anyway
        client.rerank("q", DOCS, base_url=f"http://localhost:{server.port}")
    assert "cookie" not in server.requests[1].headers


# --- TLS ------------------------------------------------------------------------------------------------------


def test_tls_with_a_trusted_certificate(client, serve, tmp_path, monkeypatch):
    context, ca = self_signed(tmp_path)
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", ca)
    server = serve(tls=context)
    for _ in range(3):
        assert client.rerank("q", DOCS, base_url=server.url)[1] == RIGHT
    assert server.accepts == 1


def test_tls_with_an_unknown_certificate_is_refused(client, serve, tmp_path, monkeypatch):
    context, _ = self_signed(tmp_path)
    monkeypatch.delenv("REQUESTS_CA_BUNDLE", raising=False)
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    server = serve(tls=context)
    with pytest.raises(RerankConnectionError, match=r"no TLS connection to .*certificate"):
        client.rerank("q", DOCS, base_url=server.url)
    assert server.requests == [] and server.accepts == 1


@pytest.mark.timeout(20)
def test_a_ca_file_that_is_not_there_is_an_error_and_no_loop(client, serve, tmp_path, monkeypatch):
    """The sync client once took it for a connection that the server had closed, and tried again for ever."""
    context, _ = self_signed(tmp_path)
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "gone.pem"))
    server = serve(tls=context)
    with pytest.raises(RerankConnectionError, match=r"gone\.pem|No such file"):
        client.rerank("q", DOCS, base_url=server.url)
    assert server.accepts == 0


def test_tls_to_a_plain_server_and_back(client, serve, tmp_path):
    context, _ = self_signed(tmp_path)

    def hang_up():
        with contextlib.suppress(OSError):
            connection, _ = listener.accept()
            connection.recv(100)
            connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            connection.close()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=hang_up, name="fault-server", daemon=True).start()
        with pytest.raises(RerankConnectionError, match="no TLS connection"):
            client.rerank("q", DOCS, base_url=f"https://127.0.0.1:{listener.getsockname()[1]}")
    server = serve(tls=context)
    with pytest.raises(RerankConnectionError):
        client.rerank("q", DOCS, base_url=server.url.replace("https", "http"))


def test_tls_handshake_that_stalls_ends_at_the_connect_timeout(client, config):
    config(connect_timeout_s=0.3, retries=0)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        t0 = time.monotonic()
        with pytest.raises(RerankTimeout, match="no connection"):
            client.rerank("q", DOCS, base_url=f"https://127.0.0.1:{listener.getsockname()[1]}")
        assert time.monotonic() - t0 < 5


# --- addresses ------------------------------------------------------------------------------------------------


def test_base_url_forms():
    for text in ("http://h:1", "http://h:1/", "http://h:1/v1", "http://h:1/v1/", "http://h:1//"):
        assert base_urls(text) == ("http://h:1/v1",)
    for host in ("rerank", "score", "v1"):  # names that a container or a service may have
        assert base_urls(f"http://{host}") == base_urls(f"http://{host}/v1/rerank") == (f"http://{host}/v1",)
    assert base_urls("https://h/rerankers/") == ("https://h/rerankers/v1",)
    assert base_urls("http://[::1]:80") == ("http://[::1]:80/v1",)
    assert base_urls(" http://a:1, http://b:2/v1 ,,http://a:1/") == ("http://a:1/v1", "http://b:2/v1")


def test_module_attributes_follow_the_configuration(config):
    config(port=4711)
    assert (resources.PORT, resources.LOCAL_BASE_URL) == (4711, "http://127.0.0.1:4711/v1")
    config(base_url="http://a:1,http://b:2")
    assert resources.LOCAL_BASE_URL == "http://a:1/v1"
    with pytest.raises(AttributeError, match="NO_SUCH"):
        _ = resources.NO_SUCH


def test_import_does_nothing():
    code = """
import sys, threading
def watch(event, args):
    assert event != "socket.connect" and not (event == "open" and str(args[0]).endswith(".env")), (event, args)
sys.addaudithook(watch)
import env_utils, main, model_utils, rerank_kit.settings, resources
assert rerank_kit.settings._cache == {} and resources.SharedResources._endpoints == {}
assert threading.active_count() == 1 and "aiohttp" not in sys.modules
"""
    env = {**os.environ, "KIT_ENV_FILE": "/no/such/folder/.env", "PORT": "not a number"}
    done = subprocess.run([sys.executable, "-c", code], cwd=KIT, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_proxy_variables_do_not_apply_to_loopback(client, serve, monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, dead_url())
    server = serve()
    for host in ("127.0.0.1", "localhost", "127.0.0.2"):
        if host == "127.0.0.2":
            continue  # the server listens on 127.0.0.1 only; its class is checked below
        assert client.rerank("q", DOCS, base_url=f"http://{host}:{server.port}")[1] == RIGHT

    for host in ("127.0.0.2", "[::1]", "0.0.0.0", "a.localhost"):
        assert exchange._net(f"http://{host}:1/v1")[0] == {}


def test_proxy_variables_apply_elsewhere(client, serve, config, monkeypatch):
    config(retries=0)
    proxy = serve()
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy.port}")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    client.rerank("q", DOCS, base_url="http://reranker.example:9")
    request = proxy.requests.pop()
    assert request.path == "http://reranker.example:9/v1/rerank"
    proxy.problems.clear()  # the absolute path, and with it an unknown route, is meant
    monkeypatch.setenv("no_proxy", "reranker.example")
    with pytest.raises(RerankConnectionError):
        client.rerank("q", DOCS, base_url="http://reranker.example:10", deadline_s=10)
    assert proxy.requests == []


@pytest.mark.timeout(20)
def test_a_proxy_that_cannot_be_used_is_an_error_and_no_loop(client, config, monkeypatch):
    config(retries=1)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for proxy, said in (("socks5h://127.0.0.1:9", "SOCKS|[Pp]roxy|refused"), ("ftp://127.0.0.1:9", "[Pp]roxy|ftp")):
        monkeypatch.setenv("http_proxy", proxy)
        with pytest.raises(RerankConnectionError, match=said):
            client.rerank("q", DOCS, base_url=f"http://{proxy[:5].strip(':')}.example:9", deadline_s=15)


# --- fail-over ------------------------------------------------------------------------------------------------


def test_failover_on_refused_connection_needs_no_retry(client, serve, config):
    config(retries=0)
    second = serve()
    for _ in range(5):
        assert client.rerank("q", DOCS, base_url=f"{dead_url()},{second.url}")[1] == RIGHT
    assert len(second.requests) == 5


@pytest.mark.parametrize("code", [502, 503, 504])
def test_failover_on_unavailable_server_and_remembers_it(client, serve, code):
    first, second = serve(default=status(code)), serve()
    for _ in range(5):
        assert client.rerank("q", DOCS, base_url=f"{first.url},{second.url}")[1] == RIGHT
    assert (len(first.requests), len(second.requests)) == (1, 5)


def down_s_is_over(server):
    """As if DOWN_S had passed: a busy machine may take any time for the calls before."""
    SharedResources._endpoints[server.url].down_until = time.monotonic() - 1


def test_failover_returns_to_the_first_when_it_is_back(client, serve):
    first, second = serve(status(503)), serve()
    both = f"{first.url},{second.url}"
    for _ in range(3):
        client.rerank("q", DOCS, base_url=both)
    assert len(second.requests) == 3
    down_s_is_over(first)
    for _ in range(3):
        client.rerank("q", DOCS, base_url=both)
    assert (len(first.requests), len(second.requests)) == (4, 3)


def test_failover_asks_a_server_that_was_down_with_one_call_only(client, serve):
    second = serve()

    def when_the_others_are_through(server, connection, request):
        until(lambda: len(second.requests) == 5)
        return answer(server, connection, request)

    first = serve(status(503), default=when_the_others_are_through)
    both = f"{first.url},{second.url}"
    client.rerank("q", DOCS, base_url=both)
    down_s_is_over(first)
    if client.mode == "sync":
        with ThreadPoolExecutor(5) as pool:
            list(pool.map(lambda _: rerank("q", DOCS, base_url=both), range(5)))
    else:

        async def five():
            await asyncio.gather(*(arerank("q", DOCS, base_url=both) for _ in range(5)))

        client.runner.run(five())
    assert (len(first.requests), len(second.requests)) == (2, 5)


def test_failover_takes_any_answer_as_a_sign_of_life(client, serve):
    first, second = serve(status(503), status(400)), serve()
    both = f"{first.url},{second.url}"
    client.rerank("q", DOCS, base_url=both)
    down_s_is_over(first)
    with pytest.raises(RerankHTTPError, match="told to say 400"):
        client.rerank("q", DOCS, base_url=both)
    assert client.rerank("q", DOCS, base_url=both)[1] == RIGHT
    assert (len(first.requests), len(second.requests)) == (3, 1)


@pytest.mark.parametrize("code", [400, 429, 500])
def test_no_failover_on_what_another_server_would_say_too(client, serve, config, code):
    config(retries=0)
    first, second = serve(default=status(code)), serve()
    with pytest.raises(RerankHTTPError):
        client.rerank("q", DOCS, base_url=f"{first.url},{second.url}")
    assert second.accepts == 0


def test_no_failover_after_a_timeout(client, serve):
    first, second = serve(slow(10)), serve()
    with pytest.raises(RerankTimeout):
        client.rerank("q", DOCS, base_url=f"{first.url},{second.url}", timeout_s=1)
    assert second.accepts == 0


def test_all_down_is_reported(client):
    with pytest.raises(RerankConnectionError, match="no server at"):
        client.rerank("q", DOCS, base_url=f"{dead_url()},{dead_url()}")

"""Bodies as clients send them: packed, with a byte order mark, with a limit that cuts nothing."""

import asyncio
import gzip
import json
import time
import tracemalloc
import zlib
from types import SimpleNamespace as Names

import pytest
from guard_app import RERANK, Inner, documents, one

from rerank_kit.guard import middleware
from rerank_kit.guard.answers import Refusal
from rerank_kit.guard.body import Limits
from rerank_kit.guard.long_documents import served_length
from rerank_kit.guard.middleware import Guard


def packed(data: bytes, level: int = 9) -> bytes:
    """gzip without the time of day, which would be part of a test's name."""
    return gzip.compress(data, level, mtime=0)


BODY = json.dumps({"query": "q", "documents": ["a", "b", "c"]}).encode()
RAW = zlib.compressobj(wbits=-15)
PACKED = [
    ("gzip", packed(BODY)),
    ("GZIP", packed(BODY[:5]) + packed(BODY[5:])),
    ("deflate", zlib.compress(BODY)),
    ("deflate", RAW.compress(BODY) + RAW.flush()),
    ("identity", BODY),
    ("", BODY),
    ("gzip", packed(b"\xef\xbb\xbf" + BODY)),
]


@pytest.mark.parametrize(("encoding", "data"), PACKED)
def test_packed_bodies(encoding, data):
    inner = Inner()
    assert one(Guard(inner), RERANK, data, headers={"Content-Encoding": encoding}).status == 200
    _, headers, body = inner.calls[0]
    assert body == BODY and b"content-encoding" not in headers
    assert headers[b"content-length"] == str(len(BODY)).encode()


@pytest.mark.parametrize(
    ("encoding", "data", "status"),
    [
        ("gzip", BODY, 400),
        ("gzip", b"", 400),
        ("gzip", packed(BODY)[:-9], 400),
        ("gzip", packed(BODY) + b"x", 400),
        ("deflate", zlib.compress(BODY)[:-5], 400),
        ("br", BODY, 415),
        ("gzip, gzip", packed(packed(BODY)), 415),
        ("\xff", BODY, 415),
        ("gzip", packed(b" " * 2000), 413),  # unpacked
        ("gzip", bytes(1001), 413),  # packed
    ],
)
def test_packed_bodies_that_cannot_be_read(monkeypatch, encoding, data, status):
    monkeypatch.setenv("GUARD_MAX_BODY_BYTES", "1000")
    inner = Inner()
    answer = one(Guard(inner), RERANK, data, headers={"Content-Encoding": encoding})
    assert answer.status == status and answer.message and not inner.calls


def test_a_packed_bomb_is_not_unpacked(monkeypatch):
    bomb = packed(bytes(200_000_000), 9)
    tracemalloc.start()
    with pytest.raises(Refusal, match="MAX_BODY_BYTES"):
        asyncio.run(Limits(1_000_000, 0, 0).unpack(bomb, b"gzip"))
    assert tracemalloc.get_traced_memory()[1] < 10_000_000
    tracemalloc.stop()


def test_a_body_of_many_parts_is_refused_soon():
    began = time.perf_counter()
    with pytest.raises(Refusal, match="more than 100 parts"):
        asyncio.run(Limits(33_554_432, 0, 0).unpack(packed(b"") * 1_000_000, b"gzip"))
    assert time.perf_counter() - began < 5


def test_a_byte_order_mark_is_dropped():
    inner = Inner()
    assert one(Guard(inner), RERANK, b"\xef\xbb\xbf" + BODY).status == 200
    assert inner.calls[0][2] == BODY


@pytest.mark.parametrize(
    ("sent", "kept"), [(4096, False), (4097, False), (4095, True), ("4096", False), (4096.0, False)]
)
def test_a_limit_that_cuts_nothing_is_dropped(monkeypatch, sent, kept):
    """cohere-haystack always sends 4096, and vLLM refuses what is not below MAX_MODEL_LEN."""
    monkeypatch.setattr(middleware, "served_length", lambda scope: 4096)
    inner = Inner()
    assert one(Guard(inner), RERANK, documents(max_tokens_per_doc=sent, max_tokens_per_query=sent)).status == 200
    got = json.loads(inner.calls[0][2])
    assert ("max_tokens_per_doc" in got, "max_tokens_per_query" in got) == (kept, kept)


def test_the_length_is_read_from_vllms_app():
    app = Names(state=Names(serving_scores=Names(io_processor=Names(model_config=Names(max_model_len=512)))))
    assert served_length({"app": app}) == 512 and served_length({}) == 0 and served_length({"app": None}) == 0

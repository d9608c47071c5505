"""Limits that hold before a body is parsed, against a plain check of the parsed one."""

import contextlib
import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_middleware import BAD_BODIES

from rerank_kit.guard.answers import Refusal
from rerank_kit.guard.body import MEDIA_FIELDS, Limits, parse


def faults(value, max_docs, max_chars, media=False, top=True):
    """Every reason that the limits give for a parsed body."""
    if isinstance(value, str):
        return {"chars"} if 0 < max_chars < len(value) and not media else set()
    if not isinstance(value, (list, dict)):
        return set()
    found = {"docs"} if isinstance(value, list) and 0 < max_docs < len(value) else set()
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        found |= faults(item, max_docs, max_chars, media or (not top and str(key).encode() in MEDIA_FIELDS), False)
    return found


texts = st.text(st.characters(codec="utf-8") | st.sampled_from('"\\,[]{}:'), max_size=8)
keys = texts | st.sampled_from([name.decode() for name in MEDIA_FIELDS])
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(keys, inner),
    max_leaves=25,
)


@settings(max_examples=500, deadline=None)
@given(
    payload=st.dictionaries(texts | st.sampled_from(["documents", "image_url"]), values, max_size=4),
    max_docs=st.integers(0, 5),
    max_chars=st.integers(0, 7),
    ascii_only=st.booleans(),
    indent=st.sampled_from([None, 1]),
)
def test_refuses_what_a_check_of_the_parsed_body_refuses(payload, max_docs, max_chars, ascii_only, indent):
    body = json.dumps(payload, ensure_ascii=ascii_only, indent=indent, separators=(" , ", " : ")).encode()
    expected = faults(payload, max_docs, max_chars)
    try:
        Limits(0, max_docs, max_chars).check(body)
        assert not expected
    except Refusal as exc:
        assert exc.reason in expected and exc.status == {"docs": 413, "chars": 422}[exc.reason]
        assert exc.param in payload
    Limits(0, 0, 0).check(body)  # 0 = off


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b'{"documents": ["a", "b", "c", ', "'documents' holds more items than the limit of 3 (MAX_DOCS_PER_CALL)"),
        (b'{"documents": ["' + b"x" * 70 + b'", ', "'documents' holds a text of 70 characters, the limit is 64 per"),
        (b'{"query": "' + "检".encode() * 65 + b'", ', "'query' holds a text of 65 characters"),
    ],
)
def test_refuses_before_anything_is_parsed(body, said):
    with pytest.raises(Refusal) as caught:
        Limits(0, 3, 64).check(body + b"this is no JSON")
    assert said in str(caught.value)


def test_a_text_is_measured_in_characters_not_bytes():
    for ascii_only in (True, False):
        Limits(0, 3, 64).check(json.dumps({"query": "检😀" * 32}, ensure_ascii=ascii_only).encode())


@pytest.mark.parametrize("name", sorted(set(BAD_BODIES) - {"surrogate", "surrogate_in_key"}))  # refused later
def test_wrong_json_is_refused_in_the_parsers_words(name):
    body = BAD_BODIES[name] + b" " * 600_000  # may hold a text that is too long
    with pytest.raises(Refusal) as caught:
        Limits(0, 1000, 500_000).check(body)
        parse(body)
    assert caught.value.status == (413 if name == "nested_deep" else 400)  # 200,000 lists
    assert ("deeper than 32 levels" in str(caught.value)) == (name.startswith("nested") and name != "nested_deep")


PIECES = [b'\\\\"', b'"', b"[", b'{"', b"]", b'",', b"\\\\", b'"a":', b'["a",', b",", b"[]", b"{},", b'"k":1,', b"1,"]


@pytest.mark.parametrize("piece", PIECES, ids=repr)
@pytest.mark.parametrize("opening", [b"{", b'{"documents": ["', b'{"documents": ['])
def test_no_body_holds_the_service_up(opening, piece):
    """8 MB of one piece: refused by count, or left to the parser, within a quarter of a second of work for each MB."""
    start_s = time.process_time()
    with contextlib.suppress(Refusal):
        Limits(0, 1000, 500_000).check(opening + piece * (8_000_000 // len(piece)))
    assert time.process_time() - start_s < 2


def test_values_are_bounded_by_the_documents_allowed():
    rows = [{f"key {n}": n for n in range(90)} for _ in range(1000)]
    Limits(0, 1000, 500_000).check(json.dumps({"documents": rows}).encode())
    for value in ({"a": 1}, [], 1):
        body = json.dumps({"documents": [{f"key {n}": value for n in range(101)} for _ in range(1000)]}).encode()
        with pytest.raises(Refusal, match="more than 100000 values, 100 for each of MAX_DOCS_PER_CALL=1000"):
            Limits(0, 1000, 500_000).check(body)
        Limits(0, 0, 500_000).check(body)
    Limits(0, 1000, 500_000).check(json.dumps({"documents": ["[{()}], " * 300] * 1000}).encode())  # code is text


def test_a_body_that_is_no_object_is_refused_as_that():
    for body in (b"[1,2,3]", b' ["a", "b", "c"', b"[" * 300_000):
        Limits(0, 2, 1).check(body)
        with pytest.raises(Refusal, match="not a JSON object"):
            parse(body)


def test_depth_is_counted_in_containers_not_in_brackets():
    flat = {"query": "[{" * 60, "documents": [{"text": "a"}] * 60}
    assert parse(json.dumps(flat).encode()) == flat
    assert parse(b'{"x":' + b"[" * 32 + b"]" * 32 + b"}")  # below the object that every body is
    for deep in (b"[" * 33 + b"]" * 33, b'{"a":' * 33 + b"1" + b"}" * 33):
        for limits in (Limits(0, 0, 0), Limits(0, 1, 1)):
            with pytest.raises(Refusal, match="deeper than 32 levels"):
                limits.check(b'{"x":' + deep + b"}")
                parse(b'{"x":' + deep + b"}")

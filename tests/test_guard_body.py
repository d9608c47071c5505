"""guard_body.py: limits that hold before a body is parsed, against a plain check of the parsed one."""

import contextlib
import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_server_guard import BAD_BODIES

from guard_body import MEDIA_FIELDS, Limits, parse
from guard_rules import Refusal


def faults(value, max_docs, max_chars, media=False, top=True):
    """Every reason that the limits give for a parsed body."""
    if isinstance(value, str):
        return {"chars"} if len(value) > max_chars and not media else set()
    if not isinstance(value, (list, dict)):
        return set()
    found = {"docs"} if isinstance(value, list) and len(value) > max_docs else set()
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        found |= faults(item, max_docs, max_chars, media or (not top and key in MEDIA_FIELDS), False)
    return found


texts = st.text(st.characters(codec="utf-8") | st.sampled_from('"\\,[]{}:'), max_size=8)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(texts | st.sampled_from([*MEDIA_FIELDS]), inner),
    max_leaves=25,
)


@settings(max_examples=500, deadline=None)
@given(
    payload=st.dictionaries(texts | st.sampled_from(["documents", "image_url"]), values, max_size=4),
    max_docs=st.integers(1, 5),
    max_chars=st.integers(1, 7),
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
        (b'{"documents": ["' + b"x" * 70 + b'", ', "'documents' holds a text of 70 characters, the limit is 64 a text"),
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
    assert caught.value.status == 400
    assert ("deeper than 32 levels" in str(caught.value)) == name.startswith("nested")


@pytest.mark.parametrize("piece", [b'\\"', b'"', b"[", b'{"', b"]", b'",', b"\\", b'"a":', b'["a",'], ids=repr)
def test_no_body_takes_more_than_its_length(piece):
    """1 MB of it; time that grows with the square would be minutes or hours."""
    for body in (piece * (1_000_000 // len(piece)), b'{"documents": ["' + piece * (1_000_000 // len(piece))):
        start_s = time.process_time()
        with contextlib.suppress(Refusal):
            Limits(0, 10_000_000, 500_000).check(body)
        assert time.process_time() - start_s < 10


def test_depth_is_counted_in_containers_not_in_brackets():
    flat = {"query": "[{" * 60, "documents": [{"text": "a"}] * 60}
    assert parse(json.dumps(flat).encode()) == flat
    assert parse(b'{"x":' + b"[" * 32 + b"]" * 32 + b"}")  # below the object that every body is
    for deep in (b"[" * 33 + b"]" * 33, b'{"a":' * 33 + b"1" + b"}" * 33):
        for limits in (Limits(0, 0, 0), Limits(0, 1, 1)):
            with pytest.raises(Refusal, match="deeper than 32 levels"):
                limits.check(b'{"x":' + deep + b"}")
                parse(b'{"x":' + deep + b"}")

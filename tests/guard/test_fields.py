"""Every field of every API that the service speaks has a decision, and the decision is what happens."""

import json
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
from guard_app import KIT, RERANK, SCOPE, Inner, documents, one

from rerank_kit.guard import middleware
from rerank_kit.guard.asked import understand
from rerank_kit.guard.fields import DOES, FIELDS, TABLE, markdown
from rerank_kit.guard.middleware import Guard

WITH_VALUES = [(field, value) for field in TABLE for value in field.good]
REFUSED = [(field, value) for field in TABLE for value in field.bad]


def body_for(field, value):
    """(path, body) of a call with this field on a route that it belongs to."""
    if "rerank" in field.routes:
        return RERANK, documents(**{field.name: value})
    return "/v1/score", {"queries": "q", "documents": ["a"], field.name: value}


def sent_on(path, body, **headers):
    """(answer, body that vLLM got)."""
    inner = Inner()
    answer = one(Guard(inner), path, body, headers=headers)
    return answer, json.loads(inner.calls[0][2]) if inner.calls else None


def test_the_page_shows_the_table():
    assert markdown() in (KIT / "docs" / "guard.md").read_text()


def test_the_table_is_whole():
    assert len(FIELDS) == len(TABLE), "a field has two rows"
    for field in TABLE:
        assert field.does in DOES and field.about and field.apis and field.routes
        assert (field.does == "name") == bool(field.alias) and (not field.alias or field.alias in FIELDS)
        if field.does != "text" and field.name not in ("rank_fields", "mm_processor_kwargs", "label_token_ids"):
            assert field.good or field.bad, f"{field.name}: no value is tried"


@pytest.mark.parametrize(("field", "value"), WITH_VALUES, ids=lambda x: getattr(x, "name", repr(x)))
def test_a_value_that_is_taken_reaches_vllm_or_changes_nothing(field, value):
    path, body = body_for(field, value)
    answer, got = sent_on(path, body)
    assert answer.status == 200, answer.body
    assert "x-rerank-ignored" not in answer.headers
    if field.does == "vllm":
        assert got[field.name] == value
    elif field.does == "only":
        del body[field.name]
        assert got == body
    elif field.alias in ("instruction", "max_tokens_per_doc", "max_tokens_per_query", "top_n"):
        assert got[field.alias] == value and field.name not in got
    elif field.does != "text" and field.name not in ("max_tokens_per_doc", "max_tokens_per_query", "top_n"):
        assert field.name not in got  # the guard's own: vLLM would ignore it


@pytest.mark.parametrize(("field", "value"), REFUSED, ids=lambda x: getattr(x, "name", repr(x)))
def test_a_value_that_would_be_ignored_or_change_the_score_is_refused(field, value):
    answer, got = sent_on(*body_for(field, value))
    assert (answer.status, got) == (422, None), answer.body
    message = json.loads(answer.body)["message"]
    assert field.name in message and len(message) < 300


@pytest.mark.parametrize("field", [field for field in TABLE if len(field.routes) == 1], ids=lambda field: field.name)
def test_a_field_of_another_route_is_refused(field):
    other = "/v1/score" if field.routes == ("rerank",) else RERANK
    value = field.good[0] if field.good else ["a"]
    if field.does == "text":
        other, value = ("/v1/score", ["a"]) if other != RERANK else (RERANK, ["a"])
    answer, got = sent_on(other, {"query": "q", "documents": ["a"], field.name: value})
    assert answer.status == (400 if field.does == "text" else 422)  # as the page says
    assert got is None and field.name in answer.message


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (RERANK, {"query": "q", "documents": ["a"], "texts": ["b"]}),
        (RERANK, {"query": "q", "queries": ["r"], "documents": ["a"]}),
        ("/v1/score", {"text_1": "a", "text_2": "b", "queries": "c", "documents": ["d"]}),
        ("/v1/score", {"queries": "q", "documents": ["a"], "items": ["b"]}),
        ("/score", {"data_1": "a", "data_2": "b", "text_2": "c"}),
        ("/score", {"query": "q", "queries": "r", "documents": ["a"]}),
        ("/v1/ranking", {"query": {"text": "q"}, "passages": [{"text": "a"}], "documents": ["b"]}),
    ],
)
def test_two_namings_in_one_body_are_refused(path, body):
    answer, got = sent_on(path, body)
    assert answer.status == 400 and got is None
    assert "two names for the" in json.loads(answer.body)["message"]


@pytest.mark.parametrize(
    "more",
    [
        {"instruct": "a", "instruction": "b"},
        {"instruction": "a", "chat_template_kwargs": {"instruction": "b"}},
        {"top_n": 1, "top_k": 2},
        {"raw_scores": True, "use_activation": True},
        {"truncation": False, "long_documents": "chunk"},
        {"truncate": True, "long_documents": "error"},
        {"truncate": "END", "truncation": False},
        {"max_chunks_per_doc": 3, "long_documents": "truncate"},
        {"max_doc_length": 3, "max_tokens_per_doc": 4},
        {"return_documents": True, "return_text": False},
    ],
    ids=str,
)
def test_fields_that_contradict_each_other_are_refused(more):
    answer, got = sent_on(RERANK, documents(**more))
    assert answer.status == 422 and got is None, answer.body
    names = [name for name in more if name in json.loads(answer.body)["message"]]
    assert names or "max_tokens_per_doc" in answer.message


def test_names_that_agree_are_one():
    answer, got = sent_on(RERANK, documents(instruct="a", instruction="a", top_n=1, top_k=1))
    assert answer.status == 200 and got == documents(instruction="a", top_n=1)


def test_unknown_fields_pass_and_are_named():
    answer, got = sent_on(RERANK, {**documents(max_token_per_doc=3, top=None), "Ünï,\r\nx": 1})
    assert answer.status == 200 and got["max_token_per_doc"] == 3
    ignored = answer.headers["x-rerank-ignored"]
    assert ignored.startswith("max_token_per_doc,") and re.fullmatch("[ -~]*", ignored)
    assert "x-rerank-ignored" not in sent_on(RERANK, documents())[0].headers


@pytest.mark.parametrize(
    ("sent", "mode", "default"),
    [
        ({"truncation": True}, "truncate", "error"),
        ({"truncation": True}, "chunk", "chunk"),
        ({"truncation": True, "long_documents": "chunk"}, "chunk", "error"),
        ({"truncation": False}, "error", "truncate"),
        ({"truncate": "NONE"}, "error", "chunk"),
        ({"truncate": "END"}, "truncate", ""),
        ({"max_chunks_per_doc": 1}, "truncate", "chunk"),
        ({"max_chunks_per_doc": 5}, "chunk", "error"),
    ],
    ids=str,
)
def test_what_other_apis_say_of_long_texts(monkeypatch, sent, mode, default):
    monkeypatch.setenv("GUARD_LONG_DOCUMENTS", default)
    guard, call, payload = Guard(Inner()), middleware.Call(dict(SCOPE)), documents(**sent)
    understand(call.asked, RERANK, payload)
    guard._complete(call, payload)
    assert call.mode == mode and payload == documents()


# ---- documents that are objects ----


def test_objects_with_text_are_texts():
    body = {"query": {"text": "q"}, "documents": [{"text": "a"}, "b", {"text": ""}]}
    assert sent_on(RERANK, body)[1] == {"query": "q", "documents": ["a", "b", ""]}
    assert sent_on("/score", {"query": {"text": "q"}, "items": {"text": "a"}})[1] == {"queries": "q", "items": "a"}


def test_content_parts_of_text_are_a_text():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    body = {"query": {"content": parts[:1]}, "documents": [{"content": parts}, "c"]}
    assert sent_on(RERANK, body)[1] == {"query": "a", "documents": ["a\nb", "c"]}


@pytest.mark.parametrize(
    ("document", "said"),
    [
        ({"text": "a", "title": "t"}, "the key 'title' was not expected"),
        ({"text": "a", "id": 3}, "the key 'id' was not expected"),
        ({"title": "t"}, "no text under 'text'"),
        ({"text": None}, "no text under 'text'"),
        ({"image": "http://x/y.png"}, "holds an image (key image), and this service scores texts only"),
        ({"content": []}, "with one part or more"),
        ({}, "no text under 'text'"),
    ],
)
def test_other_objects_are_refused_with_the_key(document, said):
    answer, got = sent_on(RERANK, {"query": "q", "documents": ["a", document]})
    assert answer.status == 400 and got is None and said in answer.message and "documents[1]" in answer.message


def test_rank_fields_say_what_is_scored():
    objects = [{"text": "a", "title": "t", "id": 7}, {"title": "u", "text": "b"}]
    answer, got = sent_on(RERANK, {"query": "q", "documents": objects, "rank_fields": ["title", "text"]})
    assert answer.status == 200 and got == {"query": "q", "documents": ["t\na", "u\nb"]}
    for wrong in ({"documents": ["a"]}, {"documents": [{"title": "t"}]}, {"documents": [objects[0], "b"]}):
        answer, got = sent_on(RERANK, {"query": "q", **wrong, "rank_fields": ["text"]})
        assert answer.status in (400, 422) and got is None


# ---- against the installed vLLM ----


@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")
def test_every_field_of_vllms_protocol_has_a_decision():
    """A release that adds a field must fail here: nobody has decided yet what it does to a score."""
    folder = Path(find_spec("vllm").origin).parent / "entrypoints/pooling"
    source = (folder / "scoring/protocol.py").read_text()
    classes = re.findall(r"^class (\w+)\((\w[\w, ]*)\):\n(.*?)(?=^class |^\w)", source, re.S | re.M)
    base = re.findall(
        r"^class (\w+)\((\w[\w, ]*)\):\n(.*?)(?=^class |^def |\Z)",
        (folder / "base/protocol.py").read_text(),
        re.S | re.M,
    )
    known = {name: (parents, text) for name, parents, text in [*base, *classes]}
    asked = [name for name in known if name.endswith("Request") and name.startswith(("Score", "Rerank"))]
    assert len(asked) == 5, asked
    fields = set()

    def collect(name):
        parents, text = known.get(name, ("", ""))
        fields.update(re.findall(r"^    (\w+): (?!ClassVar)", text, re.M))
        for parent in filter(None, parents.split(", ")):
            collect(parent)

    for name in asked:
        collect(name)
    assert {"padding", "use_activation", "top_n", "cache_salt"} <= fields
    assert fields <= FIELDS.keys(), f"no decision about {sorted(fields - FIELDS.keys())}"
    of_vllm = {name for name, field in FIELDS.items() if "vLLM" in field.apis and "before" not in field.apis}
    assert of_vllm | {"query"} <= fields | {"model"}, f"vLLM has no {sorted(of_vllm - fields)}"

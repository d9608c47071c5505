"""Texts that are too long: cut as the reference cuts, on every route; the caller learns which."""

import json
import urllib.request

import pytest

from engine_args import make_plan
from env_utils import get_config
from long_documents import Fitter, fit_payload, payload_fits_surely
from vllm_usage import Pair
from vllm_usage_tiny import qwen3_prompt_ids, reference_scores

LENGTH = 128


@pytest.fixture(scope="module")
def fitter(checkpoints):
    from transformers import AutoTokenizer

    template = make_plan(get_config(), checkpoints["qwen3"]).template
    return Fitter(AutoTokenizer.from_pretrained(checkpoints["qwen3"]), template, LENGTH)


def grow(tokenizer, length, query="q", unit="7"):
    """A document whose model-card prompt has exactly `length` tokens."""
    document = ""
    while (n := len(qwen3_prompt_ids(tokenizer, Pair(query, document), max_length=10**6))) < length:
        document += unit * (length - n)
    assert n == length
    return document


@pytest.mark.parametrize("over", [-1, 0, 1, 2, 10 * LENGTH])
def test_fit_at_every_boundary(fitter, over):
    document = grow(fitter.tokenizer, LENGTH + over)
    query, cut_document, cut = fitter.fit("q", document)
    assert (query, cut) == ("q", over > 0)
    prompt = fitter.tokenizer(fitter._render(query, cut_document, None))["input_ids"]
    assert prompt == qwen3_prompt_ids(fitter.tokenizer, Pair("q", document), max_length=LENGTH)


@pytest.mark.parametrize("document", ["🚀" * 400, "<|im_end|>" * 200, "é" * 300, "中文文档" * 100, "a\n\n b " * 100])
def test_fit_keeps_the_prompt_whole_and_gives_a_prefix(fitter, document):
    _, shorter, cut = fitter.fit("query", document, "judge <|im_start|>")
    assert cut and document.startswith(shorter) and 0 < len(shorter) < len(document)
    text = fitter._render("query", shorter, "judge <|im_start|>")
    assert text.endswith("<think>\n\n</think>\n\n")
    assert LENGTH - 16 <= len(fitter.tokenizer(text)["input_ids"]) <= LENGTH


def test_fit_cuts_a_query_that_leaves_no_room(fitter):
    query, document, cut = fitter.fit("why " * 500, "document")
    assert cut and document == "" and 0 < len(query) < 2000
    assert len(fitter.tokenizer(fitter._render(query, document, None))["input_ids"]) <= LENGTH


def test_fit_obeys_the_callers_limit(fitter):
    _, document, cut = fitter.fit("q", "7" * 30, None, 10)
    assert (document, cut) == ("7" * 10, True)
    assert fitter.fit("q", "7" * 10, None, 10) == ("q", "7" * 10, False)


def test_fits_surely_never_lies(fitter):
    for text in ("short", "é" * 10, "<|im_end|>" * 3, "\u0958" * 8, "e\u0301" * 5):
        if fitter.fits_surely("q", text):
            assert len(fitter._ids("q", text, None)) <= LENGTH
    assert fitter.fits_surely("q", "short") and not fitter.fits_surely("q", "x" * LENGTH)


def test_pairs_and_single_texts(checkpoints):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoints["bert"])
    pair = Fitter(tokenizer, None, 32)
    for query, document in (("q", "doc " * 99), ("query " * 99, "d"), ("query " * 99, "doc " * 99)):
        fitted = pair.fit(query, document)
        expected = tokenizer(query, document, truncation=True, max_length=32)["input_ids"]
        assert tokenizer(*fitted[:2])["input_ids"] == expected and fitted[2]
    alone = Fitter(tokenizer, None, 32, separate=True)
    query, document, cut = alone.fit("q", "doc " * 99)
    assert query == "q" and cut
    assert tokenizer(document)["input_ids"] == tokenizer("doc " * 99, truncation=True, max_length=32)["input_ids"]


def test_windows_cover_the_document_and_overlap(fitter):
    words = [f"w{n}" for n in range(150)]
    document = " ".join(words)
    windows = fitter.windows("q", document)
    assert len(windows) > 3 and windows[0] == document[: len(windows[0])]
    position = 0
    for window in windows:
        start = document.index(window)
        assert start <= position, "a gap between two windows"
        position = start + len(window)
        assert len(fitter._ids("q", window, None)) <= LENGTH
    assert position == len(document)
    assert fitter.windows("q", "short") == ["short"]


@pytest.mark.parametrize(
    ("payload", "cut"),
    [
        ({"query": "q", "documents": ["a", "7" * 999, "b"]}, [1]),
        ({"text_1": "q", "text_2": "7" * 999}, [0]),
        ({"queries": ["q", "r" * 999], "items": ["7" * 999, "b"]}, [0, 1]),
        ({"data_1": "q", "data_2": ["a"], "max_tokens_per_doc": 0}, []),
        ({"query": "q", "documents": ["abc def"], "max_tokens_per_doc": 1}, [0]),
        ({"query": "q", "documents": [{"content": []}, "7" * 999]}, []),
        ({"query": 5, "documents": ["7" * 999]}, []),
        ({"query": ["q", "r"], "documents": ["7" * 999]}, []),
        ({"documents": ["7" * 999]}, []),
    ],
)
def test_fit_payload_finds_the_fields_and_leaves_strange_shapes(fitter, payload, cut):
    before = json.loads(json.dumps(payload))
    assert payload_fits_surely(fitter, payload) is (not cut)
    assert fit_payload(fitter, payload) == cut
    assert (payload == before) is (not cut)
    assert payload.keys() == before.keys()


# --- the real service, MAX_MODEL_LEN=1024 ---


def call(service, path, **body):
    data = json.dumps({"model": "qwen3-reranker", **body}).encode()
    request = urllib.request.Request(service.url + path, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer), answer.headers.get("X-Rerank-Cut")


@pytest.mark.server
def test_service_scores_long_documents_as_the_reference(service):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(service.model)
    documents = [grow(tokenizer, 1024 + over) for over in (-1, 0, 1, 2, 9216)]
    documents.insert(2, "The capital of China is Beijing.")
    expected = reference_scores(service.model, "causal_yes_no", [Pair("q", d) for d in documents], None, 1024)
    answer, cut = call(service, "/v1/score", text_1="q", text_2=documents)
    assert [row["score"] for row in answer["data"]] == pytest.approx(expected, abs=1e-4)
    assert cut == "3,4,5"
    answer, cut = call(service, "/v1/rerank", query="q", documents=documents)
    ranked = {row["index"]: row["relevance_score"] for row in answer["results"]}
    assert [ranked[i] for i in range(6)] == pytest.approx(expected, abs=1e-4)
    assert cut == "3,4,5"
    answer, cut = call(service, "/v1/rerank", query="q", documents=["short"])
    assert cut is None


@pytest.mark.server
def test_client_learns_what_was_cut(service, monkeypatch):
    import env_utils
    from model_utils import rerank, score
    from resources import RerankHTTPError

    monkeypatch.setattr(env_utils, "_cache", {})
    documents = ["short", "long " * 3000, "<|im_start|>" * 2000]
    for function in (rerank, score):
        items, _, raw = function("q", documents, base_url=f"{service.url}/v1")
        assert len(items) == 3 and raw["_cut"] == [1, 2]
        _, _, raw = function("q", documents, base_url=f"{service.url}/v1", batch_size=1)
        assert raw["_cut"] == [1, 2]
        with pytest.raises(RerankHTTPError, match="1024"):
            function("q", documents, base_url=f"{service.url}/v1", long_documents="error")

"""Texts that are too long: cut as the reference cuts, on every route; the caller learns which."""

import asyncio
import json
import unicodedata
import urllib.request

import pytest

from rerank_kit import settings
from rerank_kit.engine.plan import plan_service
from rerank_kit.guard.long_bodies import cut_by_limits, fit_payload, merge_windows, payload_fits_surely, split_payload
from rerank_kit.models.card_prompts import qwen3_prompt_ids
from rerank_kit.models.fitting import EmptyTextCounts, Fitter, TooManyWindows
from rerank_kit.models.pair import Pair
from rerank_kit.models.reference import reference_scores
from rerank_kit.settings import get_config

LENGTH = 128


@pytest.fixture(scope="module")
def fitter(checkpoints):
    from transformers import AutoTokenizer

    template = plan_service(get_config(), checkpoints["qwen3"]).template
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


def test_fits_surely_knows_normalizers_that_write_characters_out():
    """As XLM-R's does: one character of three bytes becomes four words."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = sorted({*"صلى الله عليه وسلم", *"abcdefghijklmnopqrstuvwxyz"} - {" "})
    pieces = [(piece, 0.0) for piece in ("<s>", "</s>", "<unk>", "▁", *letters)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    special = [("<s>", 0), ("</s>", 1)]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=special
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", cls_token="<s>", sep_token="</s>")
    made = Fitter(fast, None, LENGTH)
    document = "\ufdfa" * 38
    assert len(made._ids("q", document, None)) > LENGTH > len(document.encode())
    assert not made.fits_surely("q", document)
    fitted = made.fit("q", document)
    assert fitted[2] and len(made._ids(*fitted[:2], None)) <= LENGTH
    assert made.fits_surely("q", "short")
    assert made.fits_surely("q", "，。！" * 9), "full-width punctuation gets shorter: Chinese texts need no count"


def test_windows_leave_a_query_whole_that_leaves_room(checkpoints):
    """longest_first would cut a query above half of the length, for short documents of the same call too."""
    from transformers import AutoTokenizer

    fitter = Fitter(AutoTokenizer.from_pretrained(checkpoints["bert"]), None, 64)
    query = " ".join(["capital"] * 45)
    payload = {"query": query, "documents": ["beijing " * 99, "beijing china"]}
    split, cut = split_payload(fitter, payload)
    assert payload["query"] == query and cut == [] and split.counts[0] > 5
    assert all(len(fitter._ids(query, window, None)) <= 64 for window in payload["documents"])
    payload = {"query": "capital " * 62, "documents": ["beijing " * 99]}  # no room worth it
    split, cut = split_payload(fitter, payload)
    assert cut == [0] and payload["query"] != "capital " * 62


def test_cuts_by_the_limits_of_the_call_are_known_beforehand(fitter):
    payload = {"query": "7" * 20, "documents": ["7" * 30, "7", ""], "max_tokens_per_doc": 10}
    assert cut_by_limits(fitter, dict(payload)) == [0]
    assert cut_by_limits(fitter, {**payload, "max_tokens_per_query": 5}) == [0, 1, 2]
    assert cut_by_limits(fitter, {**payload, "max_tokens_per_query": 20, "max_tokens_per_doc": 30}) == []
    scores = {"text_1": ["7" * 9, "7"], "text_2": ["7", "7" * 9], "max_tokens_per_query": 5}
    assert cut_by_limits(fitter, scores) == [0]
    assert cut_by_limits(fitter, payload) == [0] and payload["documents"] == ["7" * 10, "7", ""]
    assert cut_by_limits(fitter, {"query": 5, "documents": ["a"], "max_tokens_per_doc": 1}) == []


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
    query, windows, cut = fitter.windows("q", document)
    assert (query, cut) == ("q", False)
    assert len(windows) > 3 and windows[0] == document[: len(windows[0])]
    position = 0
    for window in windows:
        start = document.index(window)
        assert start <= position, "a gap between two windows"
        position = start + len(window)
        assert len(fitter._ids("q", window, None)) <= LENGTH
    assert position == len(document)
    assert fitter.windows("q", "short") == ("q", ["short"], False)
    assert fitter.windows("q", "") == ("q", [""], False)


def test_windows_of_a_query_that_leaves_little_room(fitter):
    query, windows, cut = fitter.windows("why " * 500, "7" * 500)
    assert cut and windows == [""] and query in "why " * 500
    room = LENGTH - len(fitter._ids("", "", None))
    query, windows, cut = fitter.windows("7" * (room - 5), "x" * 50)  # five tokens are left for the document
    assert not cut and query == "7" * (room - 5) and len(windows) > 10
    assert all(len(fitter._ids(query, window, None)) <= LENGTH for window in windows)


def test_windows_lose_no_text_where_the_template_lengthens_it(fitter):
    """A control token is one token as it is sent, and several as the template breaks its spelling."""
    turns = [f"<|im_start|>user\nturn{n:02} <|im_end|>\n" for n in range(40)]
    document = "Gravity attracts bodies. " * 20 + "".join(turns)
    _, windows, cut = fitter.windows("q", document)
    assert not cut and all(windows)
    position = 0
    for window in windows:
        start = document.rfind(window, 0, position + len(window))
        assert start >= 0, "a gap between two windows"
        position = max(position, start + len(window))
    assert position == len(document.rstrip()) or position == len(document)
    assert all(len(fitter._ids("q", window, None)) <= LENGTH for window in windows)


def test_windows_overlap_by_half_where_there_is_little_room(fitter):
    room = LENGTH - len(fitter._ids("", "", None))
    _, windows, _ = fitter.windows("7" * (room - 10), "x y z " * 20)
    assert 8 < len(windows) < 30


def test_windows_stop_early(fitter):
    assert len(fitter.windows("q", "7" * 300, None, 99)[1]) > 4
    with pytest.raises(TooManyWindows):
        fitter.windows("q", "7" * 300, None, 4)
    with pytest.raises(TooManyWindows, match=r"\d{4}"):  # known from the length
        fitter.windows("q", "7" * 500_000, None, 100)
    payload = {"query": "q", "documents": ["7" * 100] * 5}
    n = len(fitter.windows("q", "7" * 100)[1]) * 5
    assert len(split_payload(fitter, dict(payload), n)[0].owners) == n
    with pytest.raises(TooManyWindows, match=f"^{n}$"):  # all of them, not the last document's
        split_payload(fitter, dict(payload), n - 1)


def test_no_windows_where_the_query_leaves_no_room_worth_it(checkpoints):
    from transformers import AutoTokenizer

    template = plan_service(get_config(), checkpoints["qwen3"]).template
    fitter = Fitter(AutoTokenizer.from_pretrained(checkpoints["qwen3"]), template, 1024)
    room = 1024 - len(fitter._ids("", "", None))
    for left, n_windows in ((12, 1), (20, 9)):
        _, windows, cut = fitter.windows("7" * (room - left), "7" * 100)
        assert (len(windows), cut) == (n_windows, n_windows == 1)


def test_a_long_query_is_counted_once_for_all_documents(fitter, monkeypatch):
    counted = []
    ids = fitter._ids
    monkeypatch.setattr(fitter, "_ids", lambda *args: counted.append(args) or ids(*args))
    room = LENGTH - len(ids("", "", None))
    for query in ("7" * (room - 40), "7" * 999):
        counted.clear()
        payload = {"query": query, "documents": ["x"] * 50}
        cut = fit_payload(fitter, payload)
        assert cut == (list(range(50)) if query == "7" * 999 else [])
        assert len(counted) < (10 if query != "7" * 999 else 120), "once for each document"


def test_the_query_limit_leaves_room_for_the_document(fitter):
    """vLLM cuts the query to max_tokens_per_query; what is cut before it must not be cut for the whole query."""
    for long in (fit_payload, split_payload):
        payload = {"query": "7" * 999, "documents": ["x" * 20, "y"], "max_tokens_per_query": 5}
        cut = long(fitter, payload)
        assert payload["query"] == "7" * 5 and payload["documents"] == ["x" * 20, "y"]
        assert (cut if long is fit_payload else cut[1]) == [0, 1]
    assert not payload_fits_surely(fitter, {"query": "7" * 20, "documents": ["x"], "max_tokens_per_query": 5})


def test_pairs_that_fit_are_not_named_as_cut(checkpoints):
    from transformers import AutoTokenizer

    fitter = Fitter(AutoTokenizer.from_pretrained(checkpoints["bert"]), None, 64)
    payload = {"query": "capital\n", "documents": ["beijing " * 9 + "\n", "beijing " * 99]}
    sent = dict(payload)
    assert fit_payload(fitter, payload) == [1]
    assert payload["documents"][0] == sent["documents"][0] and payload["query"] == sent["query"]


def test_a_query_that_one_document_shortens_is_reported_for_all(checkpoints):
    """/rerank has one query for all documents; /score can have one for each."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoints["bert"])
    fitter = Fitter(tokenizer, None, 64)
    query, documents = "capital " * 45, ["beijing", "beijing " * 99]
    payload = {"query": query, "documents": list(documents)}
    assert fit_payload(fitter, payload) == [0, 1] and payload["query"] in query and payload["query"] != query
    payload = {"text_1": query, "text_2": list(documents)}
    assert fit_payload(fitter, payload) == [1] and payload["text_1"][0] == query
    expected = [tokenizer(query, d, truncation=True, max_length=64)["input_ids"] for d in documents]
    assert [tokenizer(*p)["input_ids"] for p in zip(payload["text_1"], payload["text_2"], strict=True)] == expected


def test_split_loses_no_document_that_has_no_tokens(checkpoints):
    from transformers import AutoTokenizer

    fitter = Fitter(AutoTokenizer.from_pretrained(checkpoints["bert"]), None, 32, separate=True)
    for documents in (["beijing " * 63, "   "], ["   ", "beijing " * 63], ["   ", ""]):
        payload = {"query": "query " * 99, "documents": list(documents)}
        split, cut = split_payload(fitter, payload)
        owners = split.owners if split else list(range(2))
        assert set(owners) == {0, 1} and len(payload["documents"]) == len(owners) and cut == [0, 1]


@pytest.mark.parametrize(("top_n", "kept"), [("1", 1), (1.0, 1), ("2.0", 2), (0, 0), (2, 2)])
def test_top_n_is_read_as_vllm_reads_it(fitter, top_n, kept):
    payload = {"query": "q", "documents": ["7" * 300], "top_n": top_n}
    assert split_payload(fitter, payload)[0].top_n == kept and "top_n" not in payload


@pytest.mark.parametrize("top_n", [-1, "x", 1.5, [1], float("inf")])
def test_a_top_n_that_vllm_refuses_is_left_to_it(fitter, top_n):
    payload = {"query": "q", "documents": ["7" * 300], "top_n": top_n}
    assert split_payload(fitter, payload) == (None, []) and payload["top_n"] == top_n


@pytest.mark.parametrize("separate", [False, True])
def test_windows_without_a_template(checkpoints, separate):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoints["bert"])
    fitter = Fitter(tokenizer, None, 32, separate=separate)
    words = ["capital", "of", "china", "gravity", "attracts", "bodies", "beijing"]
    document = " ".join(words[i % 7] for i in range(90))
    query, windows, cut = fitter.windows("query " * 50, document)
    assert cut and len(windows) > 4 and query and query < "query " * 50
    assert windows[0] == document[: len(windows[0])] and document.endswith(windows[-1])
    for window in windows:
        assert window in document
        assert len(tokenizer(*((window,) if separate else (query, window)))["input_ids"]) <= 32


def test_split_and_merge_give_each_document_its_best_window(fitter):
    long = "7" * 300
    n = len(fitter.windows("q", long)[1])
    payload = {"query": "q", "documents": ["a", long, "b"], "top_n": 2}
    split, cut = split_payload(fitter, payload)
    assert (split.counts, cut, split.top_n) == ({1: n}, [], 2) and n > 3
    assert "top_n" not in payload and len(payload["documents"]) == n + 2
    assert payload["documents"][0] == "a" and payload["documents"][-1] == "b"
    # Windows 1 to n belong to document 1; its best is window 2.
    values = {0: 0.5, 2: 0.9, n + 1: 0.5}
    rows = [
        {"index": i, "relevance_score": values.get(i, 0.1), "document": {"text": text, "multi_modal": None}}
        for i, text in enumerate(payload["documents"])
    ]
    merged = merge_windows(split, {"id": "x", "results": rows[::-1]})
    assert [(row["index"], row["relevance_score"]) for row in merged["results"]] == [(1, 0.9), (0, 0.5)]
    assert merged["results"][0]["document"] == {"text": long, "multi_modal": None} and merged["id"] == "x"

    payload = {"text_1": ["q", "r"], "text_2": [long, "b"]}
    split, _ = split_payload(fitter, payload)
    assert payload["text_1"] == ["q"] * n + ["r"]
    merged = merge_windows(split, {"data": [{"index": i, "score": -1.0 * i} for i in range(n + 1)]})
    assert [(row["index"], row["score"]) for row in merged["data"]] == [(0, 0.0), (1, -1.0 * n)]

    payload = {"text_1": "q", "text_2": long}
    assert split_payload(fitter, payload)[0].counts == {0: n} and len(payload["text_2"]) == n
    for payload in ({"query": "q", "documents": ["a"], "top_n": 1}, {"query": 5, "documents": [long]}):
        before = dict(payload)
        assert split_payload(fitter, payload) == (None, []) and payload == before
    # Several spellings in one body: which one counts is vLLM's to decide.
    payload = {"text_1": "q", "text_2": ["a", "b"], "documents": [long]}
    assert split_payload(fitter, payload) == (None, []) and fit_payload(fitter, payload) == []


def test_an_empty_document_of_a_pair_keeps_its_separator(checkpoints):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoints["bert"])
    fitter = Fitter(tokenizer, None, 32)
    payload = {"query": "q", "documents": ["a", ""]}
    assert not payload_fits_surely(fitter, payload) and fit_payload(fitter, payload) == []
    # vLLM calls the tokenizer with two strings; the reference (sentence-transformers) with two lists.
    as_vllm = tokenizer(text="q", text_pair=payload["documents"][1])["input_ids"]
    assert as_vllm == tokenizer(["q"], [""])["input_ids"][0] != tokenizer(text="q", text_pair="")["input_ids"]
    # A query as long as its prompt may be, beside an empty document: the separator counts too.
    for length in range(24, 34):
        payload = {"query": "q " * length, "documents": [""]}
        fit_payload(fitter, payload)
        ids = tokenizer(text=payload["query"], text_pair=payload["documents"][0])["input_ids"]
        assert len(ids) == min(length + 3, 32)


def test_an_empty_document_keeps_its_separator_where_no_text_stands_for_it(tmp_path):
    import tiny_models
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_models.modernbert_cross_encoder(tmp_path))
    fitter = Fitter(tokenizer, None, 32)
    assert fitter.needs_cover and not fitter.blank
    covered = EmptyTextCounts(tokenizer)
    whole = tokenizer(["q"], [""])
    one = covered(text="q", text_pair="", return_offsets_mapping=True)
    assert one["input_ids"] == whole["input_ids"][0] != tokenizer(text="q", text_pair="")["input_ids"]
    assert one.sequence_ids(0) == [None, 0, None, None] and len(one["offset_mapping"]) == 4
    assert covered("q", "d")["input_ids"] == tokenizer("q", "d")["input_ids"]
    assert covered("")["input_ids"] == tokenizer("")["input_ids"]
    assert covered(["a", "b"], ["", ""])["input_ids"] == tokenizer(["a", "b"], ["", ""])["input_ids"]
    assert covered.pad_token_id == tokenizer.pad_token_id
    payload = {"query": "q " * 40, "documents": [""]}
    fit_payload(fitter, payload)
    assert len(covered(text=payload["query"], text_pair="")["input_ids"]) == 32


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
    assert cut == "3-5"
    answer, cut = call(service, "/v1/rerank", query="q", documents=documents)
    ranked = {row["index"]: row["relevance_score"] for row in answer["results"]}
    assert [ranked[i] for i in range(6)] == pytest.approx(expected, abs=1e-4)
    assert cut == "3-5"
    answer, cut = call(service, "/v1/rerank", query="q", documents=["short"])
    assert cut is None


@pytest.mark.server
def test_client_learns_what_was_cut(service, monkeypatch):
    from rerank_kit.client.calls import rerank, score
    from rerank_kit.client.errors import RerankHTTPError

    monkeypatch.setattr(settings, "_cache", {})
    documents = ["short", "long " * 3000, "<|im_start|>" * 2000]
    for function in (rerank, score):
        items, _, raw = function("q", documents, base_url=f"{service.url}/v1")
        assert len(items) == 3 and raw["_cut"] == [1, 2]
        _, _, raw = function("q", documents, base_url=f"{service.url}/v1", batch_size=1)
        assert raw["_cut"] == [1, 2]
        with pytest.raises(RerankHTTPError, match="1024"):
            function("q", documents, base_url=f"{service.url}/v1", long_documents="error")


@pytest.mark.server
def test_an_empty_document_is_scored(service, monkeypatch):
    from rerank_kit.client.calls import rerank

    monkeypatch.setattr(settings, "_cache", {})
    for mode in (None, "chunk", "error"):
        _, scores, _ = rerank("q", ["beijing", "", " "], base_url=f"{service.url}/v1", long_documents=mode)
        assert all(0 <= score <= 1 for score in scores)


@pytest.mark.server
def test_chunk_scores_a_document_by_its_best_window(service, monkeypatch):
    from rerank_kit.client.calls import arerank, rerank, score

    monkeypatch.setattr(settings, "_cache", {})
    fitter = Fitter(*service_tokenizer_and_template(service), 1024)
    documents = ["The capital of China is Beijing.", "word " * 3000 + "The capital of China is Beijing.", "中文" * 2000]
    windows = [fitter.windows("capital of China", document)[1] for document in documents]
    assert [len(w) > 2 for w in windows] == [False, True, True]
    pairs = [Pair("capital of China", window) for w in windows for window in w]
    reference = iter(reference_scores(service.model, "causal_yes_no", pairs, None, 1024))
    expected = [max(next(reference) for _ in w) for w in windows]
    cut = reference_scores(service.model, "causal_yes_no", [Pair("capital of China", d) for d in documents], None, 1024)
    assert max(abs(a - b) for a, b in zip(expected, cut, strict=True)) > 1e-3, "another window must be the best"

    told = {"base_url": f"{service.url}/v1", "long_documents": "chunk"}
    calls = [rerank("capital of China", documents, **told), score("capital of China", documents, **told)]
    calls.append(asyncio.run(arerank("capital of China", documents, **told)))
    for items, scores, raw in calls:
        assert scores == pytest.approx(expected, abs=1e-4)
        assert raw["_windows"] == {i: len(w) for i, w in enumerate(windows) if len(w) > 1} and raw["_cut"] == []
        assert [item.doc for item in items] == [documents[item.index] for item in items]
    best = max(range(3), key=expected.__getitem__)
    items, scores, raw = rerank("capital of China", documents, 1, **told)
    assert [item.index for item in items] == [best] and len(raw["results"]) == 1
    assert rerank("capital of China", documents[:1], **told)[2]["_windows"] == {}


def service_tokenizer_and_template(service):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(service.model), plan_service(get_config(), service.model).template


DECOMPOSED = [
    unicodedata.normalize("NFD", text)
    for text in (
        "ééé" * 60,
        "Tiếng Việt có dấu phức tạp ộ ữ " * 20,
        "한국어 문서 검색 " * 30,
        "a\u0323\u0301x\u0301\u0301 " * 40,
    )
]


@pytest.mark.parametrize("text", DECOMPOSED, ids=range(4))
def test_a_cut_keeps_a_letter_and_its_marks_together(fitter, text):
    """Decomposed text (file names of macOS, Vietnamese): the tokens of a cut are the first of the whole text."""
    ids = fitter.tokenizer(text, add_special_tokens=False)["input_ids"]
    composed = unicodedata.normalize("NFC", text)
    other = 0
    for n in range(1, 40):
        head = fitter.head(text, n)
        assert text.startswith(head)
        got = fitter.tokenizer(head, add_special_tokens=False)["input_ids"]
        # A cut inside a letter of several tokens falls before it, in composed text too.
        wanted = fitter.tokenizer(fitter.head(composed, n), add_special_tokens=False)["input_ids"]
        assert got == wanted and len(got) <= n
        other += got != ids[:n]
    assert other < 39, "no cut had the ids of the whole text"


@pytest.mark.parametrize("text", DECOMPOSED[:3], ids=range(3))
def test_whole_prompts_and_windows_keep_marks_too(fitter, text):
    composed = unicodedata.normalize("NFC", text)
    _, cut, is_cut = fitter.fit("q", text)
    assert is_cut and unicodedata.normalize("NFC", cut) == fitter.fit("q", composed)[1]
    windows, wanted = fitter.windows("q", text)[1], fitter.windows("q", composed)[1]
    assert [unicodedata.normalize("NFC", window) for window in windows] == wanted


def test_windows_share_as_many_tokens_as_asked(fitter):
    document = "7" * 300
    room = len(fitter.windows("q", document)[1][0])
    for overlap in (0, 5, 10**9):
        payload = {"query": "q", "documents": [document]}
        split, _ = split_payload(fitter, payload, overlap=overlap)
        shared = min(overlap, room // 2)
        n = -(-(len(document) - room) // (room - shared)) + 1
        assert len(split.owners) == n and sum(map(len, payload["documents"])) == len(document) + shared * (n - 1)


def test_limits_are_cut_before_vllm_cuts_the_accent_off(fitter):
    payload = {
        "query": DECOMPOSED[0],
        "documents": [DECOMPOSED[0], "ok"],
        "max_tokens_per_query": 3,
        "max_tokens_per_doc": 4,
    }
    assert cut_by_limits(fitter, payload) == [0, 1]
    for text, n in ((payload["query"], 3), (payload["documents"][0], 4)):
        ids = fitter.tokenizer(DECOMPOSED[0], add_special_tokens=False)["input_ids"]
        got = fitter.tokenizer(text, add_special_tokens=False)["input_ids"]
        assert got == ids[: len(got)] and n - 1 <= len(got) <= n  # this tokenizer has two tokens for the letter
    assert payload["documents"][1] == "ok"

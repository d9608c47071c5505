"""ctxl-rerank-v2 has the document before the query: what is cut, by the server's way and by the offline one."""

import pytest
import tiny_hub_models
from conftest import Later

from rerank_kit.engine.machine import Machine
from rerank_kit.engine.plan import plan_engine
from rerank_kit.guard.long_bodies import fit_payload
from rerank_kit.models.card_prompts import ctxl_prompt_ids
from rerank_kit.models.fitting import MARK, Fitter
from rerank_kit.models.pair import Pair
from rerank_kit.offline.prompts import PairEncoder
from rerank_kit.settings import ConfigError, get_config

transformers = Later("transformers")
CPU = Machine("0.32.0+cpu", (), (0, 1), 2**34)
LENGTH = 128
LONG = "Gravity attracts bodies. " * 60
PAIRS = [
    Pair("q", LONG),
    Pair("What is the capital of China?", LONG, "Prefer recent ones"),
    Pair(LONG, "short"),
    Pair(LONG, LONG, "Prefer recent ones"),
    Pair(f"a {MARK} mark", LONG),
    Pair("\ue001", LONG),
    Pair("short", "short"),
]
MAKERS = {"qwen": tiny_hub_models.ctxl_rerank_v2, "mistral": tiny_hub_models.ctxl_rerank_v2_mistral}


@pytest.fixture(scope="module", params=MAKERS)
def served(request, tmp_path_factory):
    """(encoder, fitter, tokenizer) of a checkpoint whose prompts have LENGTH tokens at most."""
    folder = MAKERS[request.param](tmp_path_factory.mktemp("ctxl") / "ctxl-rerank-v2")
    plan = plan_engine(get_config(max_model_len=LENGTH), folder, CPU)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return PairEncoder(plan), Fitter(tokenizer, plan.template, LENGTH), tokenizer


def test_both_ways_keep_the_query_and_have_the_recipes_ids(served):
    encoder, fitter, tokenizer = served
    for pair, prompt in zip(PAIRS, encoder.encode(PAIRS), strict=True):
        expected = ctxl_prompt_ids(tokenizer, pair, None, LENGTH)
        assert prompt.ids == expected and prompt.cut == (LONG in (pair.query, pair.document))
        query, document, cut = fitter.fit(pair.query, pair.document, pair.instruction)
        ids = fitter._ids(query, document, pair.instruction)
        # The server cuts text: the rest of a word may be written in other tokens than the word's first ones.
        assert ids[-6:] == expected[-6:] and len(expected) - 4 <= len(ids) <= len(expected) and cut == prompt.cut
        assert tokenizer.decode(expected).endswith(" ??") and len(expected) <= LENGTH
        if pair.query != LONG:
            assert query == pair.query and pair.query in tokenizer.decode(expected)
        else:
            assert not document


def test_windows_have_the_whole_query_behind_them(served):
    _, fitter, _ = served
    query, windows, cut = fitter.windows("What is the capital of China?", LONG)
    assert query == "What is the capital of China?" and not cut and len(windows) > 2
    assert all(len(fitter._ids(query, window, None)) <= LENGTH for window in windows)
    assert windows[0].startswith("Gravity") and LONG.rstrip().endswith(windows[-1].rstrip())
    assert all(window in LONG for window in windows)


def test_a_length_without_room_beside_the_template_is_refused(served, tmp_path):
    encoder, _, _ = served
    encoder.max_length, before = 24, encoder.max_length
    try:
        with pytest.raises(ConfigError, match="leaves no room beside the template"):
            encoder.encode([Pair(LONG, LONG, "instruction " * 40)])
    finally:
        encoder.max_length = before


def test_a_query_that_was_cut_has_no_document_beside_it_in_any_call(served):
    """A query cut to the tokens that surely fit leaves two or three, into which the beginning of a document went."""
    _, fitter, _ = served
    documents = ["a b c", "d"]
    one, many = {"query": LONG, "documents": documents}, {"queries": [LONG, LONG], "documents": documents}
    assert fit_payload(fitter, one) == fit_payload(fitter, many) == [0, 1]
    assert one["documents"] == many["documents"] == ["", ""]
    assert many["queries"] in (one["query"], [one["query"]], [one["query"]] * 2)

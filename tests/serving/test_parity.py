"""Server, vllm.LLM and transformers: the same token ids and the same scores, within 1e-4 in float32."""

import json
import subprocess

import pytest
from conftest import KIT, http, kit_environment

from rerank_kit import settings
from rerank_kit.models.card_prompts import qwen3_prompt_ids
from rerank_kit.models.pair import Pair
from rerank_kit.models.profiles import PROFILE_DIR, load_profiles
from rerank_kit.models.reference import reference_scores

pytestmark = pytest.mark.server

TEXTS = [
    ("What is the capital of China?", "The capital of China is Beijing."),
    ("中国的首都是哪里？", "中国的首都是北京。"),
    ("emoji 🚀👩‍👩‍👧", "flags 🇨🇳 and 👍🏽 and ☃️"),
    ("", ""),
    ("empty document", ""),
    ("", "empty query"),
    ("  edges  ", "\n  white space at both edges \t\n"),
    ("two\nlines\r\n", "line one\n\n\nline two\r\nline three\n"),
    ("code", "if (a <| b) { x |> f } <think> </think> <|not_a_token|> &lt;b&gt; {{ jinja }} {% raw %}"),
    ("e\u0301 decomposed", "Å ﬁ ② ½ \u200b\u00a0\ufeff"),
    ("yes", "no"),
    ("long", "word " * 100),
]
INSTRUCTIONS = [None, "Find the paragraph that answers the question", "判断文档是否相关\n第二行"]


def pairs_of(instruction):
    return [Pair(query, document, instruction) for query, document in TEXTS]


@pytest.fixture(scope="module")
def offline(checkpoints, fork_server, tmp_path_factory):
    """{instruction: (scores, token ids)} of every pair by vllm.LLM, in a process of its own."""
    out = tmp_path_factory.mktemp("offline") / "out.json"
    code = """
import json, sys
from rerank_kit.engine.plan import plan_engine
from rerank_kit.models.pair import Pair
from rerank_kit.offline.program import leave
from rerank_kit.offline.reranker import OfflineReranker
from rerank_kit.settings import get_config
if __name__ == "__main__":
    result = []
    with OfflineReranker(plan_engine(get_config())) as reranker, open(sys.argv[1], "w") as out:
        for instruction, texts in json.load(sys.stdin):
            pairs = [Pair(q, d, instruction) for q, d in texts]
            prompts = reranker.encoder.encode(pairs)
            result.append([[r.score for r in reranker.score(pairs)], [p.ids for p in prompts]])
        json.dump(result, out)
    leave(0)
"""
    script = out.with_name("offline.py")
    script.write_text(code)
    env = kit_environment(MODEL_PATH=checkpoints["qwen3"], DTYPE="float32", MAX_MODEL_LEN=1024, PYTHONPATH=KIT)
    asked = json.dumps([(instruction, TEXTS) for instruction in INSTRUCTIONS])
    command = [*fork_server.command, str(script), str(out)]
    done = subprocess.run(command, input=asked, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(zip(INSTRUCTIONS, json.loads(out.read_text()), strict=True))


@pytest.fixture(scope="module")
def tokenizer(checkpoints):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(checkpoints["qwen3"])


def server_scores(service, pairs):
    """Scores and prompt lengths from /v1/score, one pair a call."""
    scores, lengths = [], []
    for pair in pairs:
        body = {"model": "qwen3-reranker", "text_1": pair.query, "text_2": pair.document}
        if pair.instruction:
            body["instruction"] = pair.instruction
        status, answer = http("POST", f"{service.url}/v1/score", body)
        assert status == 200, answer
        scores.append(answer["data"][0]["score"])
        lengths.append(answer["usage"]["prompt_tokens"])
    return scores, lengths


@pytest.mark.parametrize("instruction", INSTRUCTIONS)
def test_three_ways_one_score(service, offline, tokenizer, checkpoints, instruction):
    pairs = pairs_of(instruction)
    expected = reference_scores(checkpoints["qwen3"], "causal_yes_no", pairs, None, 1024)
    scores, lengths = server_scores(service, pairs)
    assert scores == pytest.approx(expected, abs=1e-4)
    assert offline[instruction][0] == pytest.approx(expected, abs=1e-4)
    reference_ids = [qwen3_prompt_ids(tokenizer, pair) for pair in pairs]
    assert offline[instruction][1] == reference_ids
    assert lengths == [len(ids) for ids in reference_ids]
    assert max(expected) - min(expected) > 0.2, "scores that do not differ prove nothing"


def test_instruction_changes_scores(offline):
    plain, asked = offline[None][0], offline[INSTRUCTIONS[1]][0]
    assert max(abs(a - b) for a, b in zip(plain, asked, strict=True)) > 0.01


def test_rerank_and_score_agree(service):
    query, documents = "capital", [document for _, document in TEXTS]
    status, ranked = http(
        "POST", f"{service.url}/v1/rerank", {"model": "qwen3-reranker", "query": query, "documents": documents}
    )
    assert status == 200, ranked
    status, scored = http(
        "POST", f"{service.url}/v1/score", {"model": "qwen3-reranker", "text_1": query, "text_2": documents}
    )
    assert status == 200, scored
    by_index = {r["index"]: r["relevance_score"] for r in ranked["results"]}
    assert [by_index[i] for i in range(len(documents))] == pytest.approx([d["score"] for d in scored["data"]], abs=1e-6)
    order = [r["relevance_score"] for r in ranked["results"]]
    assert order == sorted(order, reverse=True)


def test_equal_scores_keep_the_input_order(service, monkeypatch):
    """Ten equal documents between twenty others of many lengths, in one call and split by the client."""
    from rerank_kit.client.calls import rerank

    monkeypatch.setattr(settings, "_cache", {})
    documents = [TEXTS[i % 12][1] + " word" * i if i % 3 else "The capital of China is Beijing." for i in range(30)]
    for batch_size in (None, 4):
        items, scores, _ = rerank("capital", documents, base_url=f"{service.url}/v1", batch_size=batch_size)
        same = [item.index for item in items if item.index % 3 == 0]
        assert same == list(range(0, 30, 3)), "equal documents must keep their order"
        assert len({scores[i] for i in same}) == 1
    body = {"model": "qwen3-reranker", "query": "capital", "documents": documents}
    _, answer = http("POST", f"{service.url}/v1/rerank", body)
    assert [row["index"] for row in answer["results"] if row["index"] % 3 == 0] == list(range(0, 30, 3))


@pytest.mark.soak
def test_the_table_of_differences_is_what_is_measured(checkpoints):
    """docs/scores.md shows what `python measurements/score_table.py` prints; the last digits depend on the CPU."""
    from measurements import score_table

    text = (KIT / "docs" / "scores.md").read_text("utf-8")
    shown = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    shown = {row[0]: row[1:] for row in shown if len(row) == 4}
    for name, worst, mean, moved in score_table.rows(checkpoints["qwen3"]):
        claimed = shown[name]
        assert float(claimed[0]) == pytest.approx(worst, rel=0.5, abs=1e-5)
        assert float(claimed[1]) == pytest.approx(mean, rel=0.5, abs=1e-5)
        assert abs(int(claimed[2].split()[0]) - moved) <= (6 if "bfloat16" in name else 0)


def test_the_prompt_ends_with_two_newlines(tokenizer):
    """The fault of the template that ends in literal newlines: Jinja drops one, and the score changes."""
    text = load_profiles()["qwen3_reranker"].template_text()
    messages = [{"role": "query", "content": "q"}, {"role": "document", "content": "d"}]
    rendered = tokenizer.apply_chat_template(messages, chat_template=text, tokenize=False)
    assert rendered.endswith("<think>\n\n</think>\n\n")
    for ending in ("", "\n"):  # an editor may add or strip the file's last newline
        again = tokenizer.apply_chat_template(messages, chat_template=text.rstrip("\n") + ending, tokenize=False)
        assert again == rendered


def test_templates_exist_and_name_every_control_token():
    """The control tokens of Qwen3's tokenizer_config.json are all neutralised; prose tags are left alone."""
    from tiny_models import QWEN3_ADDED

    text = (PROFILE_DIR / "qwen3_reranker.jinja").read_text()
    for token in QWEN3_ADDED:
        assert (f'"{token}"' in text) == token.startswith("<|"), token


def test_tiny_check_compares_with_transformers(checkpoints, fork_server):
    env = kit_environment(MODEL_PATH_TINY=checkpoints["qwen3_untied"], DTYPE="float32")
    command = [*fork_server.command, str(KIT / "vllm_usage_tiny.py"), "--check"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert "in float32" in done.stdout and "largest difference" in done.stdout

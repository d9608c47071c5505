"""--quality --offline: what is asked of the engine and what the file says of the run. A stand-in scores the pairs."""

import json

import pytest

import bench_rerank
from rerank_kit.engine.machine import vllm_version
from rerank_kit.offline import reranker
from rerank_kit.offline.files import Result


class FakeReranker:
    """Scores a document by its length; "broken" has no score."""

    embeds = False
    chunk = 3

    def __init__(self, plan):
        self.asked = []
        FakeReranker.last = self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def prepare(self, pairs):
        return len(pairs)

    def stream(self, parts):
        for part, n_pairs in parts:
            assert n_pairs == len(part) <= self.chunk
            self.asked += part
            yield (
                part,
                [
                    Result(None, error="too long")
                    if p.document == "broken"
                    else Result(float(len(p.document)), cut=len(p.document) > 4)
                    for p in part
                ],
            )


@pytest.fixture
def run(tmp_path, monkeypatch, checkpoints):
    def quality(*rows, code=0, more=()):
        (tmp_path / "j.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        argv = ["--quality", str(tmp_path / "j.jsonl"), "--offline", "--json", str(tmp_path / "out.json"), *more]
        assert bench_rerank.main(argv) == code
        return json.loads((tmp_path / "out.json").read_text())

    monkeypatch.setattr(reranker, "OfflineReranker", FakeReranker)
    monkeypatch.setenv("MODEL_PATH", str(checkpoints["bert"]))
    monkeypatch.setenv("KIT_ENV_FILE", "/dev/null")
    return quality


def test_the_file_names_what_repeats_the_run(run, checkpoints):
    row = {"query": "q", "documents": ["aaaaaa", "bb", "cccc"], "relevance": [0, 2, 0]}
    out = run(row, {**row, "query": "other"}, more=("--max-tokens-per-doc", "9"))
    assert out["vllm"] == vllm_version() and out["model_root"] == str(checkpoints["bert"])
    assert out["profile"] == "cross_encoder" and "logit" in out["score_scale"] and out["max_tokens_per_doc"] == 9
    assert "dtype" in out["server_flags"] and out["server"] == "none: vllm.LLM in this process" and out["hardware"]
    assert [one["scores"] for one in out["scored"]] == [[6.0, 2.0, 4.0]] * 2 and out["cut_documents"] == 2
    assert [(p.query, p.document) for p in FakeReranker.last.asked[:3]] == [("q", "aaaaaa"), ("q", "bb"), ("q", "cccc")]
    assert out["metrics"][1]["value"] == pytest.approx(1 / 3), "the relevant document is third"


def test_a_query_with_a_pair_that_failed_has_no_metrics(run):
    good = {"query": "q", "documents": ["aaaa", "bb"], "relevance": [1, 0]}
    out = run(good, {"query": "r", "documents": ["broken", "bb"], "relevance": [1, 0]}, code=1)
    assert out["failed_queries"] == 1 and [one["scores"] for one in out["scored"]] == [[4.0, 2.0]]

"""deploy/ray_bulk_score.py: an actor's work, its refusals; the real Ray against a single process (soak)."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
from conftest import KIT, kit_environment
from one_file import score_file
from test_reranker import LengthReranker, folder_of_shards

from rerank_kit.engine import plan as engine_plan
from rerank_kit.offline import files as offline_files
from rerank_kit.offline import reranker
from rerank_kit.settings import FIELDS


def program():
    spec = importlib.util.spec_from_file_location("ray_bulk_score", KIT / "deploy" / "ray_bulk_score.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_program(*args, **settings):
    command = [sys.executable, str(KIT / "deploy" / "ray_bulk_score.py"), *map(str, args)]
    return subprocess.run(command, env=kit_environment(**settings), capture_output=True, text=True, timeout=600)


def test_an_actor_scores_shards_goes_on_and_reports_broken_ones(tmp_path):
    source, output = folder_of_shards(tmp_path / "in"), tmp_path / "out"
    files = offline_files.shard_files(source, output)
    actor = object.__new__(program().ShardScorer)
    actor.reranker = LengthReranker()
    batch = {"source": [str(s) for s, _ in files], "output": [str(o) for _, o in files]}
    got = actor(batch)
    assert list(got["scored"]) == [11, 0, 9, 0, 0] and sum(got["failed"]) == 0
    assert [bool(reason) for reason in got["broken"]] == [False, False, False, True, True]
    assert sum(actor(batch)["scored"]) == 0  # nothing is scored twice
    wanted = tmp_path / "a.jsonl"
    score_file(LengthReranker(), source / "a.jsonl", wanted, 0, 11)
    assert (output / "a.jsonl").read_bytes() == wanted.read_bytes()


@pytest.mark.parametrize(
    ("gpus", "tp", "asked", "n"), [(0, 1, None, 1), (8, 1, None, 8), (8, 4, None, 2), (1, 2, None, 1), (8, 1, 3, 3)]
)
def test_one_actor_for_each_tp_gpus(gpus, tp, asked, n):
    assert program().n_actors({"GPU": gpus} if gpus else {}, tp, asked) == n


def test_the_shells_settings_reach_the_actors_and_no_secret(monkeypatch):
    for key, value in {"API_KEY": "s3cret", "DTYPE": "float32", "CUDA_VISIBLE_DEVICES": "0", "OTHER": "x"}.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setenv("KIT_ENV_FILE", "/kit.env")
    assert program().actor_settings(FIELDS) == {"DTYPE": "float32", "KIT_ENV_FILE": "/kit.env"}


def test_an_actor_takes_library_settings_of_env(tmp_path, monkeypatch):
    env_file = tmp_path / "kit.env"
    env_file.write_text("HF_ENDPOINT=http://from.env\n")
    monkeypatch.setattr(os, "environ", {**os.environ, "KIT_ENV_FILE": str(env_file)})
    os.environ.pop("HF_ENDPOINT", None)
    monkeypatch.setattr(engine_plan, "plan_engine", lambda *_, **__: os.environ["HF_ENDPOINT"])
    monkeypatch.setattr(reranker, "OfflineReranker", lambda plan: plan)
    assert program().ShardScorer(str(KIT), None).reranker == "http://from.env"


def test_bad_calls_are_refused_before_ray_starts(tmp_path):
    for folder, said in ((tmp_path / "none", "is no folder"), (tmp_path, "has no *.jsonl, *.csv, *.tsv or *.parquet")):
        done = run_program("--input", folder, "--output", tmp_path / "out")
        assert done.returncode == 6 and said in done.stderr


@pytest.mark.soak
@pytest.mark.server
def test_ray_writes_what_a_single_process_writes(checkpoints, tmp_path):
    """Needs `pip install "ray[data]"`; two engines start one after the other, 2 to 3 minutes."""
    pytest.importorskip("ray")
    source = tmp_path / "in"
    source.mkdir()
    for name in "abc":
        rows = [{"query": f"{name} {n // 8}", "document": f"document {n} of {name} " * (n % 9 + 1)} for n in range(700)]
        (source / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    settings = {"MODEL_PATH": checkpoints["qwen3"], "DTYPE": "float32", "MAX_MODEL_LEN": 512}
    command = [sys.executable, str(KIT / "vllm_usage.py"), "--input", str(source), "--output", str(tmp_path / "one")]
    single = subprocess.run(command, env=kit_environment(**settings), capture_output=True, text=True, timeout=600)
    assert single.returncode == 0, single.stderr[-2000:]
    done = run_program("--input", source, "--output", tmp_path / "ray", **settings)
    assert done.returncode == 0 and "2100 scored" in done.stdout, done.stdout + done.stderr[-3000:]
    for name in "abc":
        one, other = (
            [json.loads(line) for line in (tmp_path / folder / f"{name}.jsonl").read_text().splitlines()]
            for folder in ("one", "ray")
        )
        assert [r["line"] for r in one] == [r["line"] for r in other] == list(range(1, 701))
        # Which pairs share an engine step depends on the moment, and with it the last bits of a score.
        assert [r["score"] for r in one] == pytest.approx([r["score"] for r in other], abs=2e-6)
    again = run_program("--input", source, "--output", tmp_path / "ray", **settings)
    assert again.returncode == 0 and again.stdout.startswith("0 scored"), again.stdout

"""main: what it prints, and how it ends without a server."""

# ruff: noqa: F401, F811 (a fixture is imported, then named as an argument)

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import run_kit
from fault_server import config, reply, serve, status

import main
from rerank_kit import settings

pytestmark = pytest.mark.timeout(90)

KIT = Path(main.__file__).parent


def run(**env: str) -> subprocess.CompletedProcess:
    clean = {k: v for k, v in os.environ.items() if k not in settings.FIELDS}
    env = clean | {"KIT_ENV_FILE": "/no/such/.env", "RETRIES": "0"} | env
    command = [sys.executable, "-W", "error", str(KIT / "main.py")]
    return subprocess.run(command, cwd="/", env=env, capture_output=True, text=True, timeout=60)


SCORES = [0.0611, 0.8655, 0.5991]


def right(request) -> dict:
    """vLLM's answer with the scores of a small model, so that the sorting shows."""
    rows = [{"index": i, "relevance_score": s, "score": s} for i, s in enumerate(SCORES)]
    return {"data": rows, "results": sorted(rows, key=lambda row: -row["score"])}


def test_main_prints_ranked_and_scored_lines(serve):
    server = serve(default=reply(right))
    done = run(BASE_URL=server.url)
    assert (done.returncode, done.stderr) == (0, "")
    lines = [f"- score={SCORES[i]:.4f} | idx={i} | doc={main.DOCUMENTS[i]}" for i in range(3)]
    ranked = [lines[1], lines[2], lines[0]]
    assert ranked[0] == "- score=0.8655 | idx=1 | doc=The capital of China is Beijing."
    assert done.stdout.splitlines() == ["rerank: best first", *ranked, "score: input order", *lines]
    assert [request.path for request in server.requests] == ["/v1/rerank", "/v1/score"]


def test_main_without_a_server_says_one_line_and_exits_1(serve):
    server = serve()
    server.stop()
    done = run(BASE_URL=server.url)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        f'RerankConnectionError: no server at {server.url} (Connection refused): run "sh start_rerank.sh status"\n'
    )


def test_main_shows_the_servers_refusal(serve):
    done = run(BASE_URL=serve(status(401)).url, RERANK_API_KEY="sekret-123")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 1 and "told to say 401 (check RERANK_API_KEY)" in done.stderr
    assert "sekret" not in done.stderr


def test_main_with_a_bad_setting_says_which(serve):
    done = run(RETRIES="many")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("ConfigError: RETRIES='many' (environment)") and done.stderr.count("\n") == 1


def test_example_of_the_script_takes_the_clients_own_names_first(serve):
    """RERANK_BASE_URL, BASE_URL, then the service of the settings; RERANK_API_KEY, then API_KEY."""
    own, general, service = serve(), serve(), serve()
    given = {"PORT": service.url.rpartition(":")[2].removesuffix("/v1"), "API_KEY": "general"}
    for server, key, more in (
        (service, "general", {}),
        (general, "general", {"BASE_URL": general.url}),
        (own, "own", {"RERANK_BASE_URL": own.url, "RERANK_API_KEY": "own"}),
    ):
        given |= more
        done = run_kit("example", **given)
        assert (done.returncode, done.stderr) == (0, "") and "- score=" in done.stdout
        assert [request.headers["authorization"] for request in server.requests] == [f"Bearer {key}"] * 2
    assert [len(server.requests) for server in (own, general, service)] == [2, 2, 2]

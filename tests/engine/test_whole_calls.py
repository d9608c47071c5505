"""The scheduler of whole calls in a real `vllm serve`: one call, one engine step."""

import pytest
from conftest import free_port, http, run_kit

DOCUMENTS = [f"Document {i}: the capital of China is Beijing." for i in range(32)]


@pytest.fixture(scope="module")
def url(checkpoints, forked_python, tmp_path_factory):
    settings = {
        "MODEL_PATH": checkpoints["qwen3"],
        "PORT": free_port(),
        "LOG_DIR": tmp_path_factory.mktemp("logs"),
        "PYTHON": forked_python,
        "DTYPE": "float32",
        "MAX_NUM_BATCHED_TOKENS": 16384,  # room for a whole call in a step
        "STOP_TIMEOUT_S": 10,
        "EXTRA_ARGS": "--scheduler-cls rerank_kit.engine.call_scheduler.CallScheduler",
    }
    started = run_kit("start", **settings)
    assert started.returncode == 0, started.stdout + started.stderr
    yield f"http://127.0.0.1:{settings['PORT']}"
    assert run_kit("stop", **settings).returncode == 0


def steps_of(url, n_calls=8, headers=None):
    """Engine steps of calls of 32 documents, one after the other, and the scores of the last."""

    def steps():
        lines = http("GET", f"{url}/metrics")[1].splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:iteration_tokens_total_count"))

    before = steps()
    for i in range(n_calls):
        body = {"model": "qwen3-reranker", "query": f"Query {i}", "documents": DOCUMENTS}
        status, answer = http("POST", f"{url}/v1/rerank", body, headers)
        assert status == 200 and len(answer["results"]) == 32
    return steps() - before, {item["index"]: item["relevance_score"] for item in answer["results"]}


def test_a_call_is_one_step(url, service):
    n_steps, scores = steps_of(url)
    assert n_steps == 8
    # vLLM's own scheduler begins with the pairs that are there.
    more_steps, same = steps_of(service.url)
    assert more_steps > 8
    assert scores == pytest.approx(same, abs=1e-5)


def test_a_call_with_an_id_of_the_client_waits_for_quiet(url):
    n_steps, _ = steps_of(url, headers={"X-Request-Id": "mine"})
    assert n_steps < 12  # its count is unknown: a pause of a busy machine may split a call


def test_an_abandoned_call_holds_up_nobody(url):
    import socket
    from json import dumps
    from urllib.parse import urlparse

    body = dumps({"model": "qwen3-reranker", "query": "left", "documents": DOCUMENTS * 20}).encode()
    for _ in range(5):
        with socket.create_connection(("127.0.0.1", urlparse(url).port)) as client:
            head = (
                f"POST /v1/rerank HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
            )
            client.sendall(head.encode() + b"\r\n\r\n" + body)
    status, answer = http("POST", f"{url}/v1/rerank", {"model": "qwen3-reranker", "query": "q", "documents": ["d"]})
    assert status == 200 and len(answer["results"]) == 1

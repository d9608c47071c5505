"""A real service with TLS, a key and two engines: killed under load, stopped while it scores; nobody sees the key."""

import json
import os
import signal
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import http, run_kit, until
from fake_kit import alive, session_of

from rerank_kit import settings
from rerank_kit.serving.health import metrics, progress, warm_up
from rerank_kit.settings import get_config

KEY = "a-key-that-nobody-may-see"


@pytest.fixture(scope="module")
def real(keyed_service):
    """Settings of the service with TLS and a key, to be killed."""
    assert keyed_service["API_KEY"] == KEY
    return keyed_service


def ask(port):
    body = {"model": "qwen3-reranker", "text_1": "capital", "text_2": ["The capital of China is Beijing.", "yes"]}
    key = {"Authorization": f"Bearer {KEY}"}
    status, answer = http("POST", f"https://127.0.0.1:{port}/v1/score", body, key)
    return [row["score"] for row in answer["data"]] if status == 200 else status


class Load(threading.Thread):
    """Calls without end; counts what came of them."""

    def __init__(self, port):
        super().__init__(daemon=True)
        self.port, self.seen, self.over = port, Counter(), threading.Event()
        self.start()

    def run(self):
        while not self.over.is_set():
            try:
                answer = ask(self.port)
                self.seen["ok" if isinstance(answer, list) else answer] += 1
            except OSError:
                self.seen["none"] += 1
                time.sleep(0.2)


def members(leader):
    """{what it is: PID} of the processes of a session with two engines."""
    found = {}
    for pid in sorted(session_of(leader)):
        name = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
        for kind in ("--headless", "vllm serve", "EngineCore_DP0", "EngineCore_DP1"):
            if kind in name:
                found[kind] = pid
                break
        else:
            if "Worker" in name:
                found[f"Worker {sum(key.startswith('Worker') for key in found)}"] = pid
    return found


@pytest.mark.server
@pytest.mark.parametrize(
    ("victim", "how"),
    [
        # CI has 25 minutes; tests/deploy/test_nginx.py kills a server there.
        pytest.param("vllm serve", "KILL", marks=pytest.mark.soak),
        pytest.param("EngineCore_DP1", "KILL", marks=pytest.mark.soak),
        pytest.param("Worker 0", "KILL", marks=pytest.mark.soak),
        ("EngineCore_DP1", "STOP"),
    ],
)
def test_the_real_service_comes_back_under_load(real, victim, how):
    status = json.loads(run_kit("status", "--json", **real).stdout)
    leader, before, port = status["pid"], status["restarts"], real["PORT"]
    expected = ask(port)
    assert isinstance(expected, list)
    engines = progress(get_config(port=port, api_key=KEY, ssl_certfile="a", ssl_keyfile="b"))
    assert set(engines) == {"0", "1"} and all(count > 0 for count, _ in engines.values()), "both engines score"
    old = members(leader)
    assert set(old) == {"vllm serve", "--headless", "EngineCore_DP0", "EngineCore_DP1", "Worker 0", "Worker 1"}
    load = Load(port)
    until(lambda: load.seen["ok"] > 3)
    began = time.monotonic()
    os.kill(old[victim], getattr(signal, f"SIG{how}"))
    until(lambda: json.loads(run_kit("status", "--json", **real).stdout)["restarts"] == before + 1, 60)
    assert run_kit("wait", **real).returncode == 0
    print(f"back after {time.monotonic() - began:.0f} s, {dict(load.seen)}", file=sys.stderr)
    good = load.seen["ok"]
    until(lambda: load.seen["ok"] > good + 3)
    load.over.set()
    load.join(70)
    assert not any(map(alive, old.values())), "nothing of the dead server is left"
    assert ask(port) == pytest.approx(expected, abs=1e-6)


@pytest.mark.server
def test_the_client_checks_the_certificate(real, monkeypatch):
    from rerank_kit.client.calls import rerank
    from rerank_kit.client.errors import RerankError
    from rerank_kit.client.sessions import SharedResources

    monkeypatch.setattr(settings, "_cache", {})
    monkeypatch.setenv("RERANK_API_KEY", KEY)
    url = f"https://localhost:{real['PORT']}/v1"
    with pytest.raises(RerankError, match="REQUESTS_CA_BUNDLE"):
        rerank("q", ["d"], base_url=url)
    SharedResources().close_local_rerank_client()  # its sessions know the CAs of their time
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", real["SSL_CERTFILE"])
    assert len(rerank("q", ["d"], base_url=url)[0]) == 1
    SharedResources().close_local_rerank_client()


@pytest.mark.server
def test_warm_up_scores_its_burst(real):
    files = {name: real[name] for name in ("SSL_CERTFILE", "SSL_KEYFILE")}
    cfg = get_config(port=real["PORT"], api_key=KEY, **{name.lower(): value for name, value in files.items()})
    assert warm_up(cfg, n_calls=2, n_docs=3) == 2
    assert warm_up(get_config(port=1), n_calls=2, n_docs=3) == 0


@pytest.mark.server
def test_no_key_no_answer_and_no_trace_of_it(real):
    status = json.loads(run_kit("status", "--json", **real).stdout)
    for path in ("/v1/score", "/score", "/metrics", "/v1/models"):
        assert http("POST", f"https://127.0.0.1:{real['PORT']}{path}", {})[0] == 401
    seen = "".join(Path(f"/proc/{pid}/cmdline").read_text() for pid in session_of(status["pid"]))
    for path in Path(real["LOG_DIR"]).iterdir():
        assert path.stat().st_mode & 0o077 == 0, f"{path.name} is for its owner only"
        seen += path.read_text()
    assert KEY not in seen and KEY not in json.dumps(status)


@pytest.mark.server
def test_stop_lets_calls_in_flight_finish(real):
    """The last test of this service: stop comes while six calls of many documents are in flight.

    The engines are frozen until all six and the stop have arrived, so that none is over before.
    """
    body = {"model": "qwen3-reranker", "query": "capital", "documents": [f"{i} " + "word " * 400 for i in range(120)]}
    url, key = f"https://127.0.0.1:{real['PORT']}/v1/rerank", {"Authorization": f"Bearer {KEY}"}
    leader = json.loads(run_kit("status", "--json", **real).stdout)["pid"]
    pids, answers, state = session_of(leader), [], Path(real["LOG_DIR"]) / f"rerank-{real['PORT']}.state"
    calls = [threading.Thread(target=lambda: answers.append(http("POST", url, body, key))) for _ in range(6)]
    busy = get_config(port=real["PORT"], api_key=KEY, ssl_certfile="a", ssl_keyfile="b")
    engines = [pid for name, pid in members(leader).items() if name.startswith("EngineCore")]
    with ThreadPoolExecutor(1) as pool:
        try:
            for pid in engines:
                os.kill(pid, signal.SIGSTOP)
            for call in calls:
                call.start()
            until(lambda: metrics(busy).get("rerank_guard_pairs_in_flight", 0) == 6 * 120)
            stopping = pool.submit(run_kit, "stop", **real)
            until(lambda: '"state": "stopping"' in state.read_text())
            assert not answers
        finally:
            for pid in engines:
                os.kill(pid, signal.SIGCONT)
        stopped = stopping.result()
    for call in calls:
        call.join(30)
    assert len(engines) == 2 and stopped.returncode == 0, stopped.stderr
    assert [status for status, _ in answers] == [200] * 6
    assert all(len(answer["results"]) == 120 for _, answer in answers)
    assert not any(map(alive, pids))

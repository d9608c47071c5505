"""The guard with two API processes (1 minute): `python -m pytest -m soak tests/serving/test_api_processes.py`

Not in CI: it needs a server of its own. That the metrics add up and each process takes its share is tested without
vLLM in tests/guard/test_admission.py.
"""

import json
import os
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import free_port, http, run_kit
from fake_kit import session_of

from rerank_kit.client.calls import rerank
from rerank_kit.serving.health import metrics
from rerank_kit.settings import get_config

KEY = "a-key-that-nobody-may-see"
DOCUMENTS = [f"document {i} about {'gravity' if i % 3 else 'the capital of China'}" for i in range(32)]


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.soak
@pytest.mark.server
@pytest.mark.timeout(400)
def test_two_api_processes_keep_one_limit(checkpoints, tmp_path, monkeypatch):
    settings = {
        "MODEL_PATH": checkpoints["qwen3"],
        "PORT": free_port(),
        "LOG_DIR": tmp_path,
        "DTYPE": "float32",
        "MAX_MODEL_LEN": 512,
        "API_KEY": KEY,
        "API_SERVER_COUNT": 2,
        "MAX_PAIRS_IN_FLIGHT": 128,
        "STARTUP_CHECK": 0,
        "EXTRA_ARGS": "--served-model-name qwen3-reranker second",
    }
    started = run_kit("start", **settings)
    assert started.returncode == 0, started.stdout + started.stderr
    try:
        url, key = f"http://127.0.0.1:{settings['PORT']}", {"Authorization": f"Bearer {KEY}"}
        cfg = get_config(port=settings["PORT"], api_key=KEY)
        body = {"model": "qwen3-reranker", "text_1": "capital", "text_2": DOCUMENTS}
        _, alone = http("POST", f"{url}/v1/score", body, key)
        expected = [row["score"] for row in alone["data"]]
        before = metrics(cfg)
        leader = json.loads(run_kit("status", "--json", **settings).stdout)["pid"]
        titles = {pid: Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace") for pid in session_of(leader)}
        processes = {pid: cpu_s(pid) for pid, title in titles.items() if "APIServer" in title}
        assert len(processes) == 2, titles

        over, most = threading.Event(), []

        def watch():
            while not over.wait(0.05):
                most.append(metrics(cfg).get("rerank_guard_pairs_in_flight", 0))

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()

        def until_three_are_scored(_):
            """One client, each call over a connection of its own: its answers."""
            answers = []
            while sum(status == 200 for status, _ in answers) < 3:
                answers.append(http("POST", f"{url}/v1/score", body, key))
                time.sleep(0.2 * (answers[-1][0] == 429))
            return answers

        with ThreadPoolExecutor(40) as pool:
            answers = [answer for client in pool.map(until_three_are_scored, range(40)) for answer in client]
            strangers = list(pool.map(lambda _: http("POST", f"{url}/v1/score", body)[0], range(40)))
        over.set()
        watcher.join(10)

        seen = Counter(status for status, _ in answers)
        assert set(seen) == {200, 429}, seen
        for status, answer in answers:
            if status == 200:
                assert [row["score"] for row in answer["data"]] == pytest.approx(expected, abs=1e-5)
            else:
                assert answer["error"]["type"] == "TooManyRequestsError"
        assert set(strangers) == {401}, "each process asks for the key"
        assert 64 < max(most) <= 128, "both take calls, and never more than the limit together"
        after = metrics(cfg)
        grown = {name: after.get(name, 0) - before.get(name, 0) for name in after}
        pairs = sum(value for name, value in grown.items() if name.startswith("rerank_guard_pairs_total"))
        assert seen[200] == 120 and 0 <= pairs - 32 * seen[200] <= 20, "the rest are the supervisor's own probes"
        end_s = time.monotonic() + 20  # a probe of the supervisor may be under way
        while metrics(cfg)["rerank_guard_pairs_in_flight"] and time.monotonic() < end_s:
            time.sleep(0.05)
        assert time.monotonic() < end_s, "pairs stay in flight though no call does"
        assert all(cpu_s(pid) > was + 0.1 for pid, was in processes.items()), "both work"

        monkeypatch.setattr(settings, "_cache", {"CLIENT": cfg})
        _, scores, raw = rerank("capital", DOCUMENTS, model="second", base_url=f"{url}/v1")
        assert raw["model"] == "qwen3-reranker" and scores == pytest.approx(expected, abs=1e-5), "another name of it"
    finally:
        assert run_kit("stop", **settings).returncode == 0

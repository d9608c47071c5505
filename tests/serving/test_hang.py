"""A real service without a supervisor (`run`): ready after its own first scores, 503 while its engine is stopped."""

import os
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path

import pytest
from conftest import KIT, free_port, http, kit_environment, until
from fake_kit import session_of

from rerank_kit.serving.health import API_HANGS, metrics
from rerank_kit.settings import get_config

pytestmark = [pytest.mark.server, pytest.mark.timeout(400)]
KEY = "a-key-that-nobody-may-see"
LIMIT_S = 5


def members_of(session: int, title: str) -> list[int]:
    """PIDs of the engines (EngineCore) or API processes (APIServer) in a session, in the order of their ranks."""
    named = {pid: Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace") for pid in session_of(session)}
    return sorted((pid for pid, name in named.items() if title in name), key=named.get)


class Caller(threading.Thread):
    """Calls one after the other; those that the service does not answer are left after patience_s."""

    def __init__(self, url: str, patience_s: float, n_docs: int = 24):
        super().__init__(daemon=True)
        self.url, self.patience_s, self.n_docs, self.good, self.over = url, patience_s, n_docs, 0, threading.Event()
        self.start()

    def run(self):
        body = {"query": "capital", "documents": [f"{i} is a city" for i in range(self.n_docs)]}
        while not self.over.is_set():
            try:
                status, _ = http(
                    "POST", f"{self.url}/v1/rerank", body, {"Authorization": f"Bearer {KEY}"}, self.patience_s
                )
                self.good += status == 200
            except OSError:
                time.sleep(0.1)

    def stop(self):
        self.over.set()
        self.join(30)


@pytest.mark.parametrize(
    ("model", "more", "victim"),
    [
        ("qwen3", {}, "EngineCore"),
        # Two engines and two API processes, one of which may have no pair when it is asked. One engine hangs.
        pytest.param("qwen3", {"DP": 2}, "EngineCore", marks=pytest.mark.soak),
        pytest.param("bert", {"LONG_DOCUMENTS": "chunk", "API_SERVER_COUNT": 2}, "EngineCore", marks=pytest.mark.soak),
        pytest.param("qwen3_seq_cls", {"STARTUP_CHECK": 0}, "EngineCore", marks=pytest.mark.soak),
        # One of two API processes hangs: it shares the port, so no probe reaches it.
        pytest.param("qwen3", {"API_SERVER_COUNT": 2}, "APIServer", marks=pytest.mark.soak),
    ],
)
def test_a_hang_is_seen_by_both_probes_without_a_supervisor(model, more, victim, checkpoints, quick_python, tmp_path):
    port, told = free_port(), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    told.bind(str(tmp_path / "notify"))
    told.setblocking(False)
    env = kit_environment(
        **{"MODEL_PATH": checkpoints[model], "PORT": port, "LOG_DIR": tmp_path, "DTYPE": "float32", "API_KEY": KEY},
        **{"MAX_MODEL_LEN": 256, "HEALTH_TIMEOUT_S": LIMIT_S, "STOP_TIMEOUT_S": 5, "PYTHON": quick_python, **more},
    )
    env["NOTIFY_SOCKET"] = str(tmp_path / "notify")
    url, log = f"http://127.0.0.1:{port}", tmp_path / "log"
    command = ["dash", str(KIT / "start_rerank.sh"), "run"]
    with log.open("wb") as output:
        server = subprocess.Popen(command, env=env, stdout=output, stderr=output, start_new_session=True)
    stopped = 0

    def probes():
        assert server.poll() is None, log.read_text(errors="replace")[-3000:]
        try:
            return [http("GET", f"{url}/{name}", timeout_s=5) for name in ("ready", "live")]
        except OSError:
            return [(0, ""), (0, "")]

    def notified():
        try:
            return told.recv(100)
        except BlockingIOError:
            return b""

    def both(status):
        return lambda: [found for found, _ in probes()] == [status, status]

    try:
        until(both(200), 120)
        text = log.read_text(errors="replace")
        assert text.count("ready: the first pairs were scored") >= 1, text[-2000:]
        assert ("as they should be" in text) == (more.get("STARTUP_CHECK", 1) == 1)
        cfg = get_config(port=port, api_key=KEY)
        seen = metrics(cfg)
        assert not seen.get("rerank_guard_pairs_total"), "the guard's own pairs are nobody's calls"

        # Busy for longer than the limit: never 503.
        callers = [Caller(url, 60) for _ in range(4)]
        end_s, wrong = time.monotonic() + 1.2 * LIMIT_S, []
        while time.monotonic() < end_s:
            wrong += [found for found in probes() if found[0] != 200]
            time.sleep(0.1)
        for caller in callers:
            caller.stop()
        assert not wrong and sum(caller.good for caller in callers) > 4

        # Every client leaves after a second, so no pair is in flight for as long as the limit.
        stopped = members_of(server.pid, victim)[-1]
        os.kill(stopped, signal.SIGSTOP)
        began = time.monotonic()
        caller = Caller(url, 1)
        until(both(503), 40)
        assert time.monotonic() - began > LIMIT_S - 1
        for _, answer in probes():
            said = "hangs: pairs wait, and none was scored for" if victim == "EngineCore" else API_HANGS
            assert said in answer["error"]["message"]
            assert ("engine 1 hangs" in answer["error"]["message"]) == ("DP" in more)
        assert both(503)(), "all API processes say so"
        assert until(notified, 5) == b"WATCHDOG=trigger"
        caller.stop()
        time.sleep(1)
        assert both(503)(), "also when no call is left"
        os.kill(stopped, signal.SIGCONT)
        stopped = 0
        until(both(200), 30)
        assert (
            http("POST", f"{url}/v1/score", {"text_1": "q", "text_2": ["d"]}, {"Authorization": f"Bearer {KEY}"})[0]
            == 200
        )
    finally:
        told.close()
        if stopped:
            os.kill(stopped, signal.SIGCONT)
        server.terminate()
        try:
            server.wait(60)
        finally:
            for pid in session_of(server.pid):
                os.kill(pid, signal.SIGKILL)

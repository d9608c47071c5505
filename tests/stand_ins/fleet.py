"""Two real services behind a real nginx, and load on them.

For the tests, and for measurements/fleet_drills.py.
"""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import threading
import time
from contextlib import suppress
from pathlib import Path

from conftest import KIT, free_port, http, run_kit, self_signed
from fake_kit import session_of

from rerank_kit import settings

KEY = "a-key-that-no-log-may-show"
FAIL_TIMEOUT_S = 10  # of nginx-upstream.conf
TOLERANCE = 1e-5  # float32; vLLM's batches differ from call to call
WORDS = [
    "capital",
    "china",
    "beijing",
    "gravity",
    "bodies",
    "search",
    "engine",
    "documents",
    "首都",
    "yes",
    "no",
    "query",
]
QUERIES = [f"{word} of {other}" for word, other in zip(WORDS[:6], WORDS[6:12], strict=True)]
DOCUMENTS = [" ".join(random.Random(i).choices(WORDS, k=3 + 5 * (i % 9))) for i in range(24)]


class Replica:
    """One service of the kit, started and stopped by the script, pinned to one core."""

    def __init__(self, number: int, model: Path, folder: Path, **settings):
        cores = sorted(os.sched_getaffinity(0))
        self.port = free_port()
        self.settings = {
            "MODEL_PATH": model,
            "PORT": self.port,
            "LOG_DIR": folder / f"replica-{number}",
            "API_KEY": KEY,
            "DTYPE": "float32",
            "MAX_MODEL_LEN": 512,
            "STOP_TIMEOUT_S": 20,
            # Two services on the same core starve each other.
            "VLLM_CPU_OMP_THREADS_BIND": cores[number % len(cores)],
            **settings,
        }

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def kit(self, *args: str) -> subprocess.CompletedProcess:
        done = run_kit(*args, **self.settings)
        assert done.returncode == 0, f"{args} on port {self.port}: {done.stdout}{done.stderr}"
        return done

    def start(self, **settings) -> None:
        self.settings |= settings
        self.kit("start")

    @property
    def leader(self) -> int:
        """PID of the supervisor, which leads the service's session."""
        return int((Path(self.settings["LOG_DIR"]) / f"rerank-{self.port}.pid").read_text().split()[0])

    def signal(self, name: str, title: str = "") -> None:
        """Signal all processes of the session, or the one whose title has this word."""
        hit = 0
        for pid in session_of(self.leader):
            with suppress(ProcessLookupError, FileNotFoundError):
                if title in Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode():
                    os.kill(pid, getattr(signal, f"SIG{name}"))
                    hit += 1
        assert hit, f"no process of {self.port} has {title!r} in its title"

    def headers(self) -> dict[str, str]:
        command = ["curl", "-s", "--noproxy", "*", "-m", "20", "-D", "-", "-o", "/dev/null", f"{self.url}/ready"]
        lines = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
        return {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in lines[1:])}

    @property
    def version(self) -> str:
        return self.headers().get("x-rerank-version", "")

    def scores(self) -> dict[tuple[str, str], float]:
        """Its score for every query and document; asked directly, one query at a time."""
        out = {}
        for query in QUERIES:
            body = {"model": "qwen3-reranker", "text_1": query, "text_2": DOCUMENTS}
            status, answer = http("POST", f"{self.url}/v1/score", body, {"Authorization": f"Bearer {KEY}"})
            assert status == 200, answer
            out |= {(query, doc): row["score"] for doc, row in zip(DOCUMENTS, answer["data"], strict=True)}
        return out


class Nginx:
    """The files of deploy/ with other ports and folders, run by the nginx of this machine.

    host.conf is the host's own configuration, with another site; it includes nginx.conf, that of deploy/.
    """

    def __init__(self, folder: Path, a: list[int], b: list[int], *, tls: bool = True, **changes: str):
        self.folder, self.port, self.tls_port, self.other_port = folder, free_port(), free_port(), free_port()
        folder.mkdir(parents=True, exist_ok=True)
        self.access_log, self.error_log = folder / "access.log", folder / "error.log"
        self.certificate = self_signed(folder)["SSL_CERTFILE"]
        text = (KIT / "deploy/nginx.conf").read_text()
        own = {
            "/var/log/nginx/rerank.log": str(self.access_log),
            "127.0.0.1:8080": f"127.0.0.1:{self.port}",
        }
        for old, new in {**own, **changes}.items():
            assert text.count(old) == 1, old
            text = text.replace(old, new)
        # Debian's compiled-in folders for bodies and answers are root's.
        kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        paths = "".join(f"\n    {kind}_temp_path {folder}/{kind};" for kind in kinds)
        (folder / "nginx.conf").write_text(text)
        (folder / "host.conf").write_text(
            f"worker_processes auto;\npid {folder}/nginx.pid;\nerror_log {self.error_log} warn;\n"
            f"events {{ worker_connections 8192; }}\nhttp {{{paths}\n    access_log {folder}/host.log;\n"
            f"    server {{ listen 127.0.0.1:{self.other_port}; location / {{ return 200 other; }} }}\n"
            "    include nginx.conf;\n}\n"
        )
        self.set_upstreams(a, b)
        shutil.copy(KIT / "deploy/nginx-switch.conf", folder)
        if tls:
            text = (KIT / "deploy/nginx-tls.conf").read_text()
            text = text.replace("listen 443 ssl", f"listen 127.0.0.1:{self.tls_port} ssl")
            (folder / "nginx-tls.conf").write_text(re.sub(r"/etc/nginx/rerank\.(crt|key)", self._file, text))

    def set_upstreams(self, a: list[int], b: list[int]) -> None:
        """Edit the lists of servers as an operator does; port 1 represents an empty list."""
        upstream = (KIT / "deploy/nginx-upstream.conf").read_text()
        for ports, first in ((a, 11438), (b, 11448)):
            line = "    server 127.0.0.1:{} max_fails=3 fail_timeout=" + f"{FAIL_TIMEOUT_S}s;\n"
            old = "".join(line.format(first + i) for i in range(2))
            assert upstream.count(old) == 1
            upstream = upstream.replace(old, "".join(line.format(port) for port in ports or [1]))
        (self.folder / "nginx-upstream.conf").write_text(upstream)

    def _file(self, match: re.Match) -> str:
        return str(self.folder / {"crt": "cert.pem", "key": "key.pem"}[match[1]])

    @property
    def command(self) -> list[str]:
        program = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
        assert program, "nginx is not installed: apt install nginx-light"
        return [program, "-p", str(self.folder), "-c", str(self.folder / "host.conf")]

    def run(self, *args: str) -> subprocess.CompletedProcess:
        return subprocess.run([*self.command, *args], capture_output=True, text=True, timeout=30)

    def start(self) -> "Nginx":
        done = self.run()
        assert done.returncode == 0, done.stderr
        return self

    def stop(self) -> None:
        if (self.folder / "nginx.pid").exists():
            self.run("-s", "stop")

    def switch(self, *args: str, **env: str) -> subprocess.CompletedProcess:
        env = {**os.environ, "NGINX_DIR": str(self.folder), "NGINX": " ".join(self.command), **env}
        command = ["dash", str(KIT / "deploy/switch_model.sh"), *args]
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)

    @property
    def urls(self) -> tuple[str, str]:
        return f"http://127.0.0.1:{self.port}/v1", f"https://localhost:{self.tls_port}/v1"

    def log(self, since: float = 0.0) -> list[dict]:
        """Lines of the access log, those that ended after `since` (Unix time, whole seconds)."""
        lines = [json.loads(line) for line in self.access_log.read_text().splitlines()]
        for line in lines:
            line["at"] = time.mktime(time.strptime(line["time"][:19], "%Y-%m-%dT%H:%M:%S"))
        return [line for line in lines if line["at"] >= since]

    def line(self, call_id: str) -> dict:
        """The line of one call; nginx writes it after the answer."""
        end = time.monotonic() + 10
        while not (found := [line for line in self.log() if line["id"] == call_id]):
            assert time.monotonic() < end, f"no line of {call_id}"
            time.sleep(0.05)
        return found[0]


class Fleet:
    """Two replicas of one model behind nginx. known: version -> the scores that it gives."""

    def __init__(self, folder: Path, model: Path, **settings):
        # Room for the load of the drills, not for two calls of 400 documents in one replica.
        settings = {"MAX_PAIRS_IN_FLIGHT": 600, **settings}
        self.replicas = [Replica(i, model, folder, **settings) for i in range(2)]
        self.nginx = Nginx(folder / "nginx", [r.port for r in self.replicas], [])
        self.known: dict[str, dict] = {}

    def start(self) -> "Fleet":
        threads = [threading.Thread(target=replica.start) for replica in self.replicas]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.nginx.start()
        first, second = (self.learn(replica) for replica in self.replicas)
        assert first == second, "both serve the same"
        return self

    def learn(self, replica: Replica) -> str:
        """The version that a replica serves; its scores are known from now on."""
        version = replica.version
        assert version, f"no replica on port {replica.port}"
        self.known[version] = replica.scores()
        return version

    def stop(self) -> None:
        self.nginx.stop()
        threads = [threading.Thread(target=run_kit, args=("stop",), kwargs=r.settings) for r in self.replicas]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def use_client(certificate: str = "", **changed) -> None:
    """The kit's client of this process takes these settings and the key from now on."""
    from rerank_kit.client.sessions import SharedResources

    SharedResources.close_local_rerank_client()
    SharedResources._endpoints.clear()
    if certificate:
        os.environ["REQUESTS_CA_BUNDLE"] = certificate
    settings._cache["CLIENT"] = settings.get_config("/nonexistent", api_key=KEY, client_batch_size=16, **changed)


class Load:
    """Threads that call the kit's client without a pause and check every score of every answer."""

    def __init__(self, urls: tuple[str, ...], known: dict[str, dict], n_threads: int = 6, pause_s: float = 0.0):
        self.known, self.pause_s = known, pause_s  # known: version -> {(query, document): score}
        self.calls: list[dict] = []
        self.over = threading.Event()
        self.threads = [threading.Thread(target=self.run, args=(i, urls[i % len(urls)])) for i in range(n_threads)]
        for thread in self.threads:
            thread.start()

    def run(self, number: int, url: str) -> None:
        rng = random.Random(number)
        while not self.over.wait(self.pause_s):
            self.one(rng, url)

    def one(self, rng: random.Random, url: str) -> None:
        from rerank_kit.client.calls import rerank, score
        from rerank_kit.client.errors import RerankError

        query, documents = rng.choice(QUERIES), rng.sample(DOCUMENTS, rng.randint(1, len(DOCUMENTS)))
        began, ask = time.time(), rng.choice((rerank, score))
        row = {"began": began, "error": "", "wrong": 0.0, "version": "", "parts": 0}
        try:
            _, scores, raw = ask(query, documents, base_url=url)
        except RerankError as exc:
            row["error"] = f"{type(exc).__name__}: {str(exc)[:200]}"
        else:
            right = self.known.get(raw["_version"], {})
            pairs = zip(documents, scores, strict=True)
            row["wrong"] = max(abs(value - right.get((query, doc), 9e9)) for doc, value in pairs)
            row |= {"version": raw["_version"], "parts": raw["_client_calls"]}
            if raw["model"] != "qwen3-reranker":
                row["error"] = f"model {raw['model']!r}"
        row["seconds"] = time.time() - began
        self.calls.append(row)

    def wait_for(self, n_more: int, timeout_s: float = 60, **wanted) -> None:
        """Wait for that many further calls (of this version)."""
        begin, end = time.time(), time.time() + timeout_s
        while (
            sum(c["began"] >= begin and all(c[k] == v for k, v in wanted.items()) for c in tuple(self.calls)) < n_more
        ):
            assert time.time() < end, f"no {n_more} calls in {timeout_s} s: {self.calls[-3:]}"
            time.sleep(0.05)

    def stop(self) -> "Load":
        self.over.set()
        for thread in self.threads:
            thread.join(150)
        return self

    @property
    def lost(self) -> list[str]:
        return [call["error"] for call in self.calls if call["error"]]

    @property
    def wrong(self) -> list[dict]:
        """Answers with a score that differs from their version's."""
        return [call for call in self.calls if not call["error"] and call["wrong"] > TOLERANCE]

    def summary(self) -> dict:
        seconds = sorted(call["seconds"] for call in self.calls)
        return {
            "calls": len(seconds),
            "lost": len(self.lost),
            "wrong": len(self.wrong),
            "p50_s": round(seconds[len(seconds) // 2], 2),
            "longest_s": round(seconds[-1], 1),
        }

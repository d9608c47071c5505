"""Two real services behind a real nginx, and what can happen to them.

    python tests/fleet.py [nginx] [client] [DRILL ...]

Replica, Nginx, Fleet and Load are shared with the tests. Run as a program it starts both services with a seeded tiny
model, runs every drill (or those named) under load by the kit's client, through nginx and with two base URLs (or one of
the two ways), and prints the table of docs/fleet.md. Exit code 1 when a call was lost behind nginx or a score differed.
20 minutes on 2 cores.
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path

KIT = Path(__file__).resolve().parents[1]
sys.path[:0] = [path for path in (str(KIT), str(KIT / "tests")) if path not in sys.path]

from conftest import free_port, http, run_kit, self_signed  # noqa: E402
from fake_kit import session_of  # noqa: E402

import env_utils  # noqa: E402

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
        """A signal to all processes of the session, or to the one whose title has this word."""
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
        """What it gives for every query and document, asked one query at a time and past everything else."""
        out = {}
        for query in QUERIES:
            body = {"model": "qwen3-reranker", "text_1": query, "text_2": DOCUMENTS}
            status, answer = http("POST", f"{self.url}/v1/score", body, {"Authorization": f"Bearer {KEY}"})
            assert status == 200, answer
            out |= {(query, doc): row["score"] for doc, row in zip(DOCUMENTS, answer["data"], strict=True)}
        return out


class Nginx:
    """The files of deploy/ with other ports and folders, run by the nginx of this machine."""

    def __init__(self, folder: Path, a: list[int], b: list[int], *, tls: bool = True, **changes: str):
        self.folder, self.port, self.tls_port = folder, free_port(), free_port()
        folder.mkdir(parents=True, exist_ok=True)
        self.access_log, self.error_log = folder / "access.log", folder / "error.log"
        self.certificate = self_signed(folder)["SSL_CERTFILE"]
        text = (KIT / "deploy/nginx.conf").read_text()
        own = {
            "user www-data;": "",
            "pid /run/nginx.pid;": f"pid {folder}/nginx.pid;",
            "/var/log/nginx/error.log": str(self.error_log),
            "/var/log/nginx/access.log": str(self.access_log),
            "127.0.0.1:8080": f"127.0.0.1:{self.port}",
        }
        for old, new in {**own, **changes}.items():
            assert text.count(old) == 1, old
            text = text.replace(old, new)
        # Debian's compiled-in folders for bodies and answers are root's.
        kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        paths = "".join(f"\n    {kind}_temp_path {folder}/{kind};" for kind in kinds)
        (folder / "nginx.conf").write_text(text.replace("http {", "http {" + paths, 1))
        self.set_upstreams(a, b)
        shutil.copy(KIT / "deploy/nginx-switch.conf", folder)
        if tls:
            text = (KIT / "deploy/nginx-tls.conf").read_text()
            text = text.replace("listen 443 ssl", f"listen 127.0.0.1:{self.tls_port} ssl")
            (folder / "nginx-tls.conf").write_text(re.sub(r"/etc/nginx/rerank\.(crt|key)", self._file, text))

    def set_upstreams(self, a: list[int], b: list[int]) -> None:
        """Edit the lists of servers, as a person does; port 1 stands in for an empty one."""
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
        return [program, "-p", str(self.folder), "-c", str(self.folder / "nginx.conf")]

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


def use_client(certificate: str = "", **settings) -> None:
    """The kit's client of this process takes these settings and the key from now on."""
    from resources import SharedResources

    SharedResources.close_local_rerank_client()
    SharedResources._endpoints.clear()
    if certificate:
        os.environ["REQUESTS_CA_BUNDLE"] = certificate
    env_utils._cache["CFG"] = env_utils.get_config("/nonexistent", api_key=KEY, client_batch_size=16, **settings)


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
        from model_utils import rerank, score
        from resources import RerankError

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
        """Until that many further calls ended (of this version)."""
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
        """Answers with a score that its version does not give."""
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


def answers_again(port: int, timeout_s: float = 240) -> None:
    """Block until the replica's /ready says so."""
    end = time.monotonic() + timeout_s
    while True:
        with suppress(OSError):
            if http("GET", f"http://127.0.0.1:{port}/ready", timeout_s=2)[0] == 200:
                return
        assert time.monotonic() < end, "the replica did not come back"
        time.sleep(0.2)


# --- drills: what happens to the second of two replicas, and how it comes back ----------------------------------------


def kill_session(replicas: list[Replica], nginx: Nginx) -> None:
    """The host is gone; 5 s later somebody starts it."""
    replicas[1].signal("KILL")
    time.sleep(5)
    replicas[1].start()


def kill_engine(replicas: list[Replica], nginx: Nginx) -> None:
    replicas[1].signal("KILL", "EngineCore")
    time.sleep(3)
    answers_again(replicas[1].port)


def kill_api(replicas: list[Replica], nginx: Nginx) -> None:
    replicas[1].signal("KILL", "vllm serve")
    time.sleep(1)
    answers_again(replicas[1].port)


def stop_session(replicas: list[Replica], nginx: Nginx) -> None:
    """A host that hangs: it takes connections and never answers. After 70 s it goes on."""
    replicas[1].signal("STOP")
    time.sleep(70)
    replicas[1].signal("CONT")
    answers_again(replicas[1].port)


def stop_engine(replicas: list[Replica], nginx: Nginx) -> None:
    """The engine hangs, its supervisor sees that after HEALTH_TIMEOUT_S."""
    replicas[1].signal("STOP", "EngineCore")
    time.sleep(20)
    answers_again(replicas[1].port)


def roll(replicas: list[Replica], nginx: Nginx) -> None:
    """As docs/fleet.md says: the next one only when nginx asks the one before it again."""
    for number, replica in enumerate(replicas):
        if number:
            time.sleep(FAIL_TIMEOUT_S)
        replica.kit("restart")


def reload_nginx(replicas: list[Replica], nginx: Nginx) -> None:
    for _ in range(20):
        assert nginx.run("-s", "reload").returncode == 0
        time.sleep(0.5)


DRILLS = (kill_session, kill_engine, kill_api, stop_session, stop_engine, roll, reload_nginx)


def drill(what, replicas: list[Replica], nginx: Nginx, urls: tuple[str, ...], known: dict) -> dict:
    """One drill under load: what clients felt, and the seconds until the second replica was ready and asked again."""
    address, back = f"127.0.0.1:{replicas[1].port}", None
    load = Load(urls, known)
    try:
        load.wait_for(20)
        began = time.time()
        what(replicas, nginx)
        through = time.time()
        load.wait_for(20)
        while urls == nginx.urls and back is None:  # nginx leaves it out for fail_timeout
            assert time.time() < through + 60, "nginx does not ask it any more"
            time.sleep(0.5)
            good = [x["at"] for x in nginx.log(through) if x["replica"].endswith(address) and x["status"] == 200]
            back = good[0] - began if good else None
    finally:
        load.stop()
    for error in load.lost[:3]:
        print(f"lost: {error}", file=sys.stderr)
    again = [line for line in nginx.log(began - 1) if "," in line["replica"]]
    row = load.summary() | {"sent_again": len(again), "ready_s": round(through - began)}
    return row | {"asked_again_s": "-" if back is None else round(back)}


def main(argv: list[str]) -> int:
    import tiny_models

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = ["nginx", "client", *(drill.__name__ for drill in DRILLS)]
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(known)}; default: all")
    names = parser.parse_args(argv).names
    if unknown := set(names) - set(known):
        parser.error(f"{sorted(unknown)[0]!r} is none of {', '.join(known)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the services must not outlive it
    named = [d for d in DRILLS if d.__name__ in names]
    rows, chosen = {}, named or DRILLS
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        fleet = Fleet(folder, tiny_models.qwen3_reranker(folder / "Qwen3-Reranker-tiny"), HEALTH_TIMEOUT_S=12)
        replicas, nginx = fleet.replicas, fleet.nginx
        try:
            fleet.start()
            use_client(nginx.certificate)
            direct = (",".join(f"{r.url}/v1" for r in reversed(replicas)),)  # the one that fails is asked first
            for way, urls in (("nginx", nginx.urls), ("client", direct)):
                for what in chosen:
                    other = {"nginx": "client", "client": "nginx"}[way]
                    if (other in names and way not in names) or (way == "client" and what is reload_nginx):
                        continue
                    print(f"{what.__name__} by {way} ...", file=sys.stderr, flush=True)
                    rows[what.__name__, way] = drill(what, replicas, nginx, urls, fleet.known)
                    print(rows[what.__name__, way], file=sys.stderr, flush=True)
            assert KEY not in nginx.access_log.read_text() + nginx.error_log.read_text()
        finally:
            fleet.stop()
    columns = list(next(iter(rows.values())))
    print("| drill | way | " + " | ".join(columns) + " |\n" + "|---" * (len(columns) + 2) + "|")
    for (name, way), row in rows.items():
        print(f"| {name} | {way} | " + " | ".join(str(row[c]) for c in columns) + " |")
    behind_nginx = [row for (_, way), row in rows.items() if way.startswith("nginx")]
    return int(any(row["lost"] or row["wrong"] for row in behind_nginx))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

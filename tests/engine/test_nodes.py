"""Nodes and peers: settings of nodes, the watch over their connections; two network namespaces as two hosts (soak)."""

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from conftest import KIT, free_port, http, kit_environment, until
from fake_kit import alive, session_of

from rerank_kit.engine.nodes import check_nodes, node_flags
from rerank_kit.serving import health
from rerank_kit.serving import peers as serving_peers
from rerank_kit.serving.peers import Peers, connections
from rerank_kit.settings import ConfigError, get_config

NODES = {"dp": 4, "dp_local": 2, "dp_address": "10.0.0.1"}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"node_rank": 1}, "NODE_RANK=1 is for several hosts: set DP_ADDRESS"),
        ({"dp": 2, "dp_local": 1}, "DP_LOCAL=1 is for several hosts: set DP_ADDRESS"),
        ({"dp": 2, "dp_address": "10.0.0.1"}, "set DP_LOCAL"),
        (NODES | {"dp": 3}, "DP=3 copies with DP_LOCAL=2"),
        (NODES | {"dp": 2}, "do not make two or more equal hosts"),
        (NODES | {"node_rank": 2}, "make 2 hosts: allowed is 0 (the head) to 1"),
        (NODES | {"node_rank": 1, "api_server_count": 4}, "API_SERVER_COUNT=4: node 1 has no API"),
        (NODES | {"dp_address": "8.8.8.8"}, "public address"),
        (NODES | {"dp_address": "no.such.host.invalid"}, "is not an address"),
    ],
)
def test_node_settings_that_do_not_fit_are_refused(settings, said):
    with pytest.raises(ConfigError) as raised:
        check_nodes(get_config(**settings))
    assert said in str(raised.value)


def test_node_flags_are_those_of_the_role():
    assert node_flags(get_config(dp=4)) == []
    head = [
        "--data-parallel-address",
        "10.0.0.1",
        "--data-parallel-rpc-port",
        "29550",
        "--data-parallel-size-local",
        "2",
    ]
    assert node_flags(get_config(**NODES)) == head
    assert node_flags(get_config(**NODES, node_rank=1)) == [*head, "--headless", "--data-parallel-start-rank", "2"]
    check_nodes(get_config(**NODES))
    check_nodes(get_config(**NODES | {"dp_address": "8.8.8.8", "allow_no_key": 1}))


LISTENER = """
import socket, sys
listener = socket.create_server(("127.0.0.1", int(sys.argv[1])))
print(listener.getsockname()[1], flush=True)
held = []
while True:
    held.append(listener.accept())
"""
CALLER = """
import socket, sys, time
held = [socket.create_connection(("127.0.0.1", int(sys.argv[1]))) for _ in range(2)]
print("connected", flush=True)
time.sleep(60)
"""


@pytest.fixture
def programs():
    """run(code, argument): a Python program that has printed its first line; (process, that line)."""
    made = []

    def run(code, argument):
        made.append(subprocess.Popen([sys.executable, "-c", code, str(argument)], stdout=subprocess.PIPE, text=True))
        return made[-1], made[-1].stdout.readline().strip()

    yield run
    for one in made:
        one.kill()
        one.wait()
        one.stdout.close()


def test_connections_are_those_of_the_processes(programs):
    server, port = programs(LISTENER, 0)
    caller, _ = programs(CALLER, port)
    there = until(lambda: len(connections([server.pid])[0]) == 2 and connections([server.pid]))
    assert there[1] == {int(port)} and {key[1] for key in there[0]} == {int(port)}
    assert set(there[0].values()) == {0}, "nothing is sent again"
    found, ports = connections([caller.pid])
    assert {key[2:] for key in found} == {("127.0.0.1", int(port))} and not ports
    assert connections([server.pid, caller.pid])[0] == {}, "both ends are ours"


def looked_at(monkeypatch, process):
    """pids() for Peers, which counts the looks; they come twenty times as often."""
    monkeypatch.setattr(serving_peers, "LOST_AFTER_S", 0.3)
    monkeypatch.setattr(serving_peers, "LOOK_EVERY_S", 0.05)

    def pids():
        pids.looks += 1
        return [process.pid]

    pids.looks = 0
    return pids


def looks(pids, n: int) -> None:
    """Wait for n looks more."""
    wanted = pids.looks + n
    until(lambda: pids.looks >= wanted)


def test_a_headless_node_sees_that_its_head_is_gone(programs, monkeypatch):
    server, port = programs(LISTENER, 0)
    caller, _ = programs(CALLER, port)
    cfg = get_config(**NODES | {"dp_address": "127.0.0.1"}, node_rank=1)
    pids = looked_at(monkeypatch, caller)
    peers = Peers(cfg, pids)
    until(lambda: peers.ready)
    looks(pids, 20)
    assert not peers.lost()
    server.kill()
    assert "the head is lost" in until(peers.lost)


def test_the_head_sees_that_a_node_is_gone(programs, monkeypatch):
    server, port = programs(LISTENER, 0)
    caller, _ = programs(CALLER, port)
    programs(CALLER, port)  # another node at the same address
    cfg = get_config(**NODES | {"dp_address": "127.0.0.1"})
    until(lambda: len(connections([server.pid])[0]) == 4)
    pids = looked_at(monkeypatch, server)
    peers = Peers(cfg, pids)
    looks(pids, 10)
    assert not peers.baseline, "before the first ready nothing is watched"
    peers.watch()
    looks(pids, 20)
    assert not peers.lost()
    caller.kill()
    assert "a node is lost: connections to 127.0.0.1 are gone" in until(peers.lost)
    of_http = Peers(get_config(**NODES | {"dp_address": "127.0.0.1"}, port=int(port)), lambda: [server.pid])
    of_http.watch()
    assert not of_http.baseline, "callers of the API are no nodes"
    of_http.stopped.set()


def test_life_of_a_headless_node(kit, programs):
    """The stand-in connects to a head: ready, status, wait; the head goes away and comes back; stop."""
    kit.change("serving/peers.py", "LOST_AFTER_S = 5.0", "LOST_AFTER_S = 0.5")
    kit.change("serving/peers.py", "LOOK_EVERY_S = 1.0", "LOOK_EVERY_S = 0.1")
    server, port = programs(LISTENER, 0)
    kit.settings |= {"DP": 2, "DP_LOCAL": 1, "DP_ADDRESS": "127.0.0.1", "NODE_RANK": 1, "FAKE_HEAD": port}
    started = kit("start")
    assert started.returncode == 0, started.stderr
    assert "node 1 of 2 (1 engine, head 127.0.0.1:29550) is registered at the head" in started.stdout
    assert "http://" not in started.stdout
    status = kit("status")
    assert status.returncode == 0 and status.stdout.startswith("ready: registered at the head, node 1 of 2")
    assert kit("wait").returncode == 0
    refused = kit("check")
    assert refused.returncode == 6 and "run check on node 0" in refused.stderr
    assert " --headless --data-parallel-start-rank 1 " in kit.log and "--port" not in kit.log
    server.kill()
    until(lambda: kit.state["restarts"] >= 1)
    assert "the head is lost" in kit.state["why"]
    programs(LISTENER, port)
    until(lambda: kit.state["state"] == "ready", 60)
    assert kit("status").returncode == 0
    pids = session_of(kit.pid)
    assert kit("stop").returncode == 0 and not any(map(alive, pids))


def test_run_of_a_headless_node_ends_with_its_head(kit, programs):
    """Whoever started it (systemd, a container runtime) starts it again."""
    kit.change("serving/peers.py", "LOST_AFTER_S = 5.0", "LOST_AFTER_S = 0.5")
    server, port = programs(LISTENER, 0)
    kit.settings |= {"DP": 2, "DP_LOCAL": 1, "DP_ADDRESS": "127.0.0.1", "NODE_RANK": 1, "FAKE_HEAD": port}
    command = ["dash", str(kit.folder / "start_rerank.sh"), "run"]
    with subprocess.Popen(command, env=kit_environment(**kit.settings), stdout=subprocess.PIPE, text=True) as node:
        try:
            until(lambda: " ready after " in node.stdout.readline(), 30)
            server.kill()
            assert node.wait(30) == 1
            assert "the head is lost" in node.stdout.read()
        finally:
            node.terminate()


def test_wait_on_a_headless_node_in_the_foreground_has_nothing_to_ask(capsys):
    """As deploy/rerank.service does: the output goes to the journal."""
    cfg = get_config(**NODES | {"dp_address": "127.0.0.1"}, node_rank=1)
    assert health.wait(cfg, os.getpid(), Path(os.devnull), 5) == health.READY
    assert "node 1 of 2" in capsys.readouterr().out


def test_a_head_starts_only_where_it_can_listen_for_its_nodes(kit):
    kit.settings |= {"DP": 2, "DP_LOCAL": 1, "DP_ADDRESS": "192.0.2.1"}
    done = kit("start")
    assert done.returncode == 6 and "DP_ADDRESS must be the address" in done.stderr


# --- two network namespaces as two hosts ---


def ip(*words):
    subprocess.run(["ip", *words], check=True, capture_output=True)


class Hosts:
    """Hosts A (head) and B with a link between them; the tests reach A over a link of its own, as clients do."""

    def __init__(self, model: Path, logs: Path):
        mark = f"{os.getpid() % 10000}"
        self.names = {"A": f"kitA{mark}", "B": f"kitB{mark}"}
        self.links = {"A": f"va{mark}", "B": f"vb{mark}"}
        self.client_link = f"cr{mark}"
        self.port, self.model = free_port(), model
        self.settings = {
            "MODEL_PATH": model,
            "DTYPE": "float32",
            "MAX_MODEL_LEN": 512,
            "STOP_TIMEOUT_S": 5,
            "HEALTH_TIMEOUT_S": 40,
            "RESTART_MAX": 50,  # all these faults come within its ten minutes
            "PORT": self.port,
            "HOST": "0.0.0.0",
            "ALLOW_NO_KEY": 1,
            "DP": 2,
            "DP_LOCAL": 1,
            "DP_ADDRESS": "10.77.0.1",
            "VLLM_CPU_KVCACHE_SPACE": 1,
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": 1,
        }
        self.of = {"A": {"LOG_DIR": logs / "A"}, "B": {"LOG_DIR": logs / "B", "NODE_RANK": 1}}
        self.url = f"http://10.78.0.1:{self.port}"

    def up(self):
        for name in self.names.values():
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        a, b = self.names["A"], self.names["B"]
        ip("link", "add", self.links["A"], "netns", a, "type", "veth", "peer", "name", self.links["B"], "netns", b)
        ip("link", "add", self.client_link, "type", "veth", "peer", "name", "client", "netns", a)
        for host, number in (("A", 1), ("B", 2)):
            ip("-n", self.names[host], "addr", "add", f"10.77.0.{number}/24", "dev", self.links[host])
            ip("-n", self.names[host], "link", "set", self.links[host], "up")
        ip("-n", a, "addr", "add", "10.78.0.1/24", "dev", "client")
        ip("-n", a, "link", "set", "client", "up")
        ip("addr", "add", "10.78.0.2/24", "dev", self.client_link)
        ip("link", "set", self.client_link, "up")

    def down(self):
        for host in "AB":
            self.kit(host, "stop")
        subprocess.run(["ip", "link", "del", self.client_link], capture_output=True)
        for name in self.names.values():
            subprocess.run(["ip", "netns", "del", name], capture_output=True)

    def link(self, state):
        ip("-n", self.names["B"], "link", "set", self.links["B"], state)

    def kit(self, host, *args, timeout_s=200):
        command = ["ip", "netns", "exec", self.names[host], "sh", str(KIT / "start_rerank.sh"), *args]
        env = kit_environment(**self.settings, **self.of[host])
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout_s)

    def start(self, hosts="BA"):
        """Both at once, since neither is ready without the other."""
        done = {}
        threads = [threading.Thread(target=lambda h=h: done.update({h: self.kit(h, "start")})) for h in hosts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for one in done.values():
            assert one.returncode == 0, one.stdout + one.stderr
        return done

    def status(self, host):
        return json.loads(self.kit(host, "status", "--json").stdout)

    def deaths(self):
        """What the supervisors noted, for a failure's message."""
        logs = {host: self.of[host]["LOG_DIR"] / f"rerank-{self.port}.log" for host in "AB"}
        return {
            h: [line[:200] for line in log.read_text().splitlines() if " died: " in line] for h, log in logs.items()
        }

    def process(self, host, name):
        """PID of the service's process with this name."""
        for pid in session_of(self.status(host)["pid"]):
            if name in Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode():
                return pid
        raise AssertionError(f"no {name} on host {host}")

    def scores(self, query, documents, timeout_s=10):
        body = {"model": "qwen3-reranker", "query": query, "documents": documents}
        status, answer = http("POST", f"{self.url}/v1/rerank", body, timeout_s=timeout_s)
        if status != 200:
            raise OSError(f"{status}: {answer}")
        found = {row["index"]: row["relevance_score"] for row in answer["results"]}
        return [found[i] for i in range(len(documents))]

    def by_engine(self):
        text = http("GET", f"{self.url}/metrics")[1]
        lines = [line for line in text.splitlines() if line.startswith("vllm:request_success_total")]
        return {n: sum(float(line.split()[-1]) for line in lines if f'engine="{n}"' in line) for n in (0, 1)}


QUERIES = [f"capital of number {i}" for i in range(10)]
DOCUMENTS = ["The capital of China is Beijing.", "Gravity attracts bodies.", "yes", "no " * 60, "搜索 检索", "x"]


class HostLoad:
    """Six callers without end, each call with a new query; every score is compared."""

    def __init__(self, hosts, expected):
        self.hosts, self.expected, self.over = hosts, expected, threading.Event()
        self.seen, self.good_at, self.wrong = Counter(), [time.monotonic()], []
        self.threads = [threading.Thread(target=self.run, args=(i,), daemon=True) for i in range(6)]
        for thread in self.threads:
            thread.start()

    def run(self, number):
        rng = random.Random(number)
        while not self.over.is_set():
            query = rng.choice(QUERIES)
            order = rng.sample(range(len(DOCUMENTS)), len(DOCUMENTS))
            try:
                scores = self.hosts.scores(query, [DOCUMENTS[i] for i in order], timeout_s=10)
            except TimeoutError:
                self.seen["no answer in 10 s"] += 1
                continue
            except OSError as exc:
                self.seen["timed out" if "timed out" in str(exc) else str(exc)[:30]] += 1
                time.sleep(0.3)
                continue
            self.seen["ok"] += 1
            self.good_at.append(time.monotonic())
            gaps = [abs(s - self.expected[query][i]) for s, i in zip(scores, order, strict=True)]
            if not max(gaps) < 1e-5:
                self.wrong.append((query, order, scores))

    def longest_gap(self):
        times = [*sorted(self.good_at), time.monotonic()]
        return max(b - a for a, b in itertools.pairwise(times))

    def until_good(self, n, timeout_s):
        """n good answers more from now on."""
        wanted, end = self.seen["ok"] + n, time.monotonic() + timeout_s
        while self.seen["ok"] < wanted:
            assert time.monotonic() < end, f"{dict(self.seen)}"
            time.sleep(0.1)

    def end(self):
        self.over.set()
        for thread in self.threads:
            thread.join(30)


@pytest.fixture(scope="module")
def hosts(checkpoints, tmp_path_factory):
    if os.getuid() or not shutil.which("ip"):
        pytest.skip("network namespaces need root and iproute2")
    made = Hosts(checkpoints["qwen3"], tmp_path_factory.mktemp("hosts"))
    try:
        made.up()
        made.started = made.start()
        yield made
    finally:
        made.down()


@pytest.fixture(scope="module")
def expected(hosts):
    """Scores by transformers."""
    from rerank_kit.models.pair import Pair
    from rerank_kit.models.reference import reference_scores

    pairs = [Pair(q, d) for q in QUERIES for d in DOCUMENTS]
    scores = iter(reference_scores(hosts.model, "causal_yes_no", pairs, None, 512))
    return {q: [next(scores) for _ in DOCUMENTS] for q in QUERIES}


def ready_again(hosts, restarts, timeout_s):
    """Both nodes are ready after these restarts ({host: number}); seconds that it took."""
    began = time.monotonic()
    while True:
        now = {h: hosts.status(h) for h in "AB"}
        if all(now[h]["state"] == "ready" and now[h]["restarts"] >= n for h, n in restarts.items()):
            return time.monotonic() - began
        assert time.monotonic() - began < timeout_s, now
        time.sleep(1)


def tell(what, load, seconds):
    print(
        f"\n{what}: ready after {seconds:.0f} s, longest gap {load.longest_gap():.0f} s, {dict(load.seen)}",
        file=sys.stderr,
    )


def restarts(hosts):
    return {h: hosts.status(h)["restarts"] for h in "AB"}


@pytest.mark.soak
def test_two_hosts_score_as_one(hosts, expected):
    said = hosts.started["B"].stdout
    assert "node 1 of 2 (1 engine, head 10.77.0.1:" in said and "is registered at the head" in said
    for query in QUERIES:
        assert hosts.scores(query, DOCUMENTS) == pytest.approx(expected[query], abs=1e-4)
    assert all(n >= 20 for n in hosts.by_engine().values()), hosts.by_engine()
    check = hosts.kit("A", "check")
    assert check.returncode == 0 and "2 engines for the same pair agree" in check.stdout
    assert hosts.kit("B", "check").returncode == 6
    line = hosts.kit("B", "status")
    assert line.returncode == 0 and line.stdout.startswith("ready: registered at the head, node 1 of 2")
    assert hosts.kit("B", "wait").returncode == 0


def served(hosts, expected):
    """What the service itself gives now: the differences to transformers in float32 are its own."""
    return {q: hosts.scores(q, DOCUMENTS) for q in QUERIES}


@pytest.mark.soak
@pytest.mark.parametrize(
    ("host", "victim"), [("B", "EngineCore"), ("B", "vllm serve"), ("A", "vllm serve"), ("A", "EngineCore")]
)
def test_kill_9_under_load(hosts, expected, host, victim):
    before, seconds = restarts(hosts), float("nan")
    load = HostLoad(hosts, served(hosts, expected))
    try:
        load.until_good(20, 60)
        os.kill(hosts.process(host, victim), signal.SIGKILL)
        seconds = ready_again(hosts, {h: n + 1 for h, n in before.items()}, 400)
        load.until_good(20, 60)
    finally:
        load.end()
        tell(f"kill -9 {victim} on {host}", load, seconds)
    assert not load.wrong
    served_now = hosts.by_engine()
    assert min(served_now.values()) > 0, served_now
    assert restarts(hosts) == {h: n + 1 for h, n in before.items()}, hosts.deaths()


@pytest.mark.soak
@pytest.mark.parametrize("seconds_cut", [3, 30])
def test_network_cut_under_load(hosts, expected, seconds_cut):
    before, seconds = restarts(hosts), float("nan")
    load = HostLoad(hosts, served(hosts, expected))
    try:
        load.until_good(20, 60)
        hosts.link("down")
        time.sleep(seconds_cut)
        hosts.link("up")
        wanted = {h: n + (seconds_cut > 20) for h, n in before.items()}
        seconds = ready_again(hosts, wanted, 400)
        load.until_good(20, 60)
    finally:
        load.end()
        tell(f"network cut for {seconds_cut} s", load, seconds)
    assert not load.wrong
    if seconds_cut < 5:
        assert restarts(hosts) == before, "TCP sends again what was lost"


@pytest.mark.soak
def test_network_cut_without_load(hosts, expected):
    before = restarts(hosts)
    hosts.link("down")
    time.sleep(30)
    hosts.link("up")
    seconds = ready_again(hosts, {h: n + 1 for h, n in before.items()}, 400)
    print(f"\nnetwork cut for 30 s without load: ready after {seconds:.0f} s", file=sys.stderr)
    for query in QUERIES:
        assert hosts.scores(query, DOCUMENTS) == pytest.approx(expected[query], abs=1e-4)


@pytest.mark.soak
def test_a_head_that_comes_back_finds_its_node(hosts, expected):
    """The head is stopped for some time: the other host waits for it, and stops at once when it is told to."""
    assert hosts.kit("A", "stop").returncode == 0
    time.sleep(30)
    assert hosts.status("B")["state"] in ("loading", "restarting")
    hosts.start("A")
    ready_again(hosts, {"A": 0, "B": 1}, 120)
    for query in QUERIES:
        assert hosts.scores(query, DOCUMENTS) == pytest.approx(expected[query], abs=1e-4)
    pids = session_of(hosts.status("B")["pid"])
    assert hosts.kit("B", "stop").returncode == 0
    assert not any(map(alive, pids))

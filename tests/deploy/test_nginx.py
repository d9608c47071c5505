"""deploy/nginx*.conf and switch_model.sh: real nginx, two real services, load by the kit's client."""

import fcntl
import json
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import closing
from http.client import HTTPConnection, HTTPMessage

import pytest
from conftest import KIT, free_port, http
from fleet import KEY, Load, Nginx

from rerank_kit.client.exchange import IDLE_S
from rerank_kit.settings import EnvConfig

DEFAULTS = EnvConfig()
SIZES = {"k": 2**10, "m": 2**20}


def setting(name: str, file: str = "nginx.conf") -> str:
    """The one value of a directive."""
    values = re.findall(rf"^\s*{name}\s+(.*?);", (KIT / "deploy" / file).read_text(), re.M)
    assert len(set(values)) == 1, (name, values)
    return values[0]


def seconds(name: str, file: str = "nginx.conf") -> int:
    return int(setting(name, file).removesuffix("s"))


@pytest.fixture
def nginx(tmp_path):
    """nginx in front of nothing: every port of its replicas is closed."""
    made = Nginx(tmp_path / "nginx", [free_port(), free_port()], [free_port()])
    yield made
    made.stop()


# --- the files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tls", [False, True])
def test_files_are_valid(tmp_path, tls):
    made = Nginx(tmp_path / "nginx", [1, 2], [3], tls=tls)
    done = made.run("-t")
    assert done.returncode == 0 and "warn" not in done.stderr, done.stderr
    text = (made.folder / "nginx.conf").read_text()
    (made.folder / "nginx.conf").write_text(text.replace("proxy_next_upstream_tries", "proxy_next_upstream_trys"))
    assert made.run("-t").returncode != 0


def test_numbers_fit_those_of_the_kit():
    size = setting("client_max_body_size")
    assert int(size[:-1]) * SIZES[size[-1]] == DEFAULTS.max_body_bytes
    assert seconds("keepalive_timeout", "nginx-upstream.conf") < 5, "uvicorn closes idle connections after 5 s"
    assert seconds("keepalive_timeout") > IDLE_S, "the client drops idle connections before nginx does"
    # A call that hangs in one replica is answered by another one while the client still waits.
    assert 2 * seconds("proxy_read_timeout") + seconds("proxy_connect_timeout") < DEFAULTS.timeout_s
    assert seconds("proxy_read_timeout") < seconds("proxy_next_upstream_timeout")
    assert "non_idempotent" in setting("proxy_next_upstream") and "429" not in setting("proxy_next_upstream")


def test_errors_of_nginx_have_the_form_of_the_service(nginx):
    nginx.start()
    base, body = f"http://127.0.0.1:{nginx.port}", {"query": "q", "documents": ["d"]}
    status, answer = http("POST", f"{base}/v1/rerank", body)
    assert (status, answer["error"]["code"]) == (502, 502) and "no replica" in answer["error"]["message"]
    asked = [post(nginx.port, ["d"], path=path)[1] for path in ("/v1/rerank", "/metrics")]
    assert [headers.get("Retry-After") for headers in asked] == ["2", None] and all(h["X-Request-ID"] for h in asked)
    status, answer = http("POST", f"{base}/v1/rerank", {"query": "q", "documents": ["x" * (33 * 2**20)]})
    assert status == 413 and answer["error"]["type"] == "ContentTooLargeError"
    for path in ("/metrics", "/load"):
        assert http("GET", base + path)[0] == 404
    # A refused replica costs nothing: both were tried, and the call's id is the same everywhere.
    with closing(HTTPConnection("127.0.0.1", nginx.port)) as connection:
        connection.request("POST", "/v1/score?api_key=secret", "{}", {"X-Request-ID": "abc-1", "Authorization": KEY})
        answer = connection.getresponse()
        assert (answer.status, answer.headers["X-Request-ID"]) == (502, "abc-1")
    line = nginx.line("abc-1")
    assert (line["status"], line["path"], line["replica_status"]) == (502, "/v1/score", "502, 502")
    assert KEY not in nginx.access_log.read_text() and "secret" not in nginx.access_log.read_text()


def test_other_sites_of_the_host_stay_as_they_are(nginx):
    """nginx.conf is a part of the host's configuration, not all of it."""
    nginx.start()
    answer = http("GET", f"http://127.0.0.1:{nginx.other_port}/metrics")
    assert answer == (200, "other") and not nginx.access_log.read_text()
    text = (KIT / "deploy/nginx.conf").read_text()
    depth, outside = 0, []
    for line in text.splitlines():
        code = re.sub(r"'[^']*'|#.*", "", line).strip()
        if not depth and code:
            outside.append(code.split()[0])
        depth += code.count("{") - code.count("}")
    assert depth == 0 and set(outside) <= {
        "log_format",
        "map",
        "include",
        "limit_conn_zone",
        "limit_req_zone",
        "server",
        "}",
        ";",
    }
    for name in re.findall(r"^map \S+ \$(\w+)|zone=(\w+):|^log_format (\w+)", text, re.M):
        assert "".join(name).startswith("rerank"), "no name of another site's"


def test_one_client_cannot_take_all_of_nginx(tmp_path):
    made = Nginx(tmp_path / "nginx", [1], [1], **{"rate=2000r/s": "rate=1r/m", "burst=2000": "burst=2"})
    made.start()
    try:
        answers = [http("POST", f"http://127.0.0.1:{made.port}/v1/rerank", {}) for _ in range(6)]
    finally:
        made.stop()
    assert [status for status, _ in answers] == [502] * 3 + [429] * 3
    assert answers[-1][1]["error"]["type"] == "TooManyRequestsError"


@pytest.mark.parametrize(
    "args", [[], ["to"], ["to", "c"], ["canary", "b"], ["canary", "b", "0"], ["canary", "b", "100"], ["show", "a"]]
)
def test_switch_wants_its_arguments(nginx, args):
    assert nginx.switch(*args).returncode == 2


def test_switch_refuses_what_is_not_ready(nginx):
    nginx.start()
    before = (nginx.folder / "nginx-switch.conf").read_text()
    for env in ({}, {"ANYWAY": "1"}):
        done = nginx.switch("to", "b", **env)
        assert done.returncode == 1 and "ready" in done.stderr and "nothing was changed" in done.stderr
    assert (nginx.folder / "nginx-switch.conf").read_text() == before
    shown = nginx.switch("show").stdout
    assert "default rerank_a" in shown and shown.count(" 000 -") == 3


def test_two_switches_exclude_each_other(nginx):
    with (nginx.folder / "nginx-switch.conf.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for args in (("to", "b"), ("canary", "b", "5")):
            done = nginx.switch(*args)
            assert done.returncode == 1 and "another switch_model.sh is under way: nothing was changed" in done.stderr
        assert nginx.switch("show").returncode == 0
    assert "is not ready" in nginx.switch("to", "b").stderr


# --- two real services ------------------------------------------------------------------------------------------------


def post(
    port: int, documents: list[str], source: str = "127.0.0.1", path: str = "/v1/rerank", **headers
) -> tuple[int, HTTPMessage, dict]:
    """(status, headers, answer) of one rerank call over http."""
    connection = HTTPConnection("127.0.0.1", port, timeout=60, source_address=(source, 0))
    body = json.dumps({"model": "qwen3-reranker", "query": "capital", "documents": documents})
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json", **headers}
    connection.request("POST", path, body, headers)
    answer = connection.getresponse()
    text = answer.read()
    connection.close()
    return answer.status, answer.headers, json.loads(text)


@pytest.mark.server
def test_key_ids_and_long_headers_pass(fleet, fleet_client):
    documents = [("word " * 600 if i % 2 else "word") + f" {i}" for i in range(100)]  # every second one is cut
    status, headers, answer = post(fleet.nginx.port, documents, **{"X-Request-ID": "mine-7"})
    assert status == 200 and len(answer["results"]) == 100
    assert headers["X-Rerank-Cut"] == ",".join(str(i) for i in range(1, 100, 2))
    assert headers["X-Request-ID"] == "mine-7" and headers["X-Rerank-Version"] == fleet.replicas[0].version
    line = fleet.nginx.line("mine-7")
    assert line["version"] == headers["X-Rerank-Version"] and line["replica_status"] == "200"
    assert post(fleet.nginx.port, ["d"], Authorization="Bearer wrong")[0] == 401
    assert http("POST", f"https://127.0.0.1:{fleet.nginx.tls_port}/v1/rerank", {})[0] == 401


@pytest.mark.server
def test_a_busy_replica_is_not_left_out(fleet, fleet_client):
    """429 of the guard goes to the client as it is: not to the other replica, and the replica counts as healthy."""
    documents, answers = ["word " * 100 + str(i) for i in range(400)], []
    calls = [threading.Thread(target=lambda: answers.append(post(fleet.nginx.port, documents))) for _ in range(10)]
    for call in calls:
        call.start()
    for call in calls:
        call.join(120)
    counts = Counter(status for status, *_ in answers)
    assert set(counts) == {200, 429} and counts[429] >= 4, counts
    assert all(headers["Retry-After"] for status, headers, _ in answers if status == 429)
    refused = [line for line in fleet.nginx.log() if line["status"] == 429]
    assert len(refused) == counts[429] and not any("," in line["replica"] for line in refused)
    n_before = len(fleet.nginx.log())
    for _ in range(6):
        assert post(fleet.nginx.port, ["d"])[0] == 200
    asked = {line["replica"] for line in fleet.nginx.log()[n_before:]}
    assert asked == {f"127.0.0.1:{replica.port}" for replica in fleet.replicas}


@pytest.mark.server
def test_a_killed_replica_and_a_change_of_the_model_lose_no_call(fleet, fleet_client):
    """Under load over http and TLS: kill -9 one replica, start it with the new model, canary, switch, and back."""
    first, second = fleet.replicas
    nginx, old = fleet.nginx, first.version
    load = Load(nginx.urls, fleet.known, n_threads=4, pause_s=0.2)  # a start needs the cores too
    try:
        load.wait_for(20)
        second.signal("KILL")
        load.wait_for(20)
        nginx.set_upstreams([first.port], [second.port])
        assert nginx.run("-s", "reload").returncode == 0
        assert nginx.switch("to", "b").returncode == 1, "it is not ready yet"
        second.start(MODEL_PATH=fleet.other_model)
        new = fleet.learn(second)
        assert new != old and fleet.known[new] != fleet.known[old]

        done = nginx.switch("canary", "b", "30")
        assert done.returncode == 0, done.stderr
        for _ in range(20):  # for a moment after a reload, workers with the old choice still take connections
            seen = [{versions_of(nginx, f"127.0.1.{i}") for _ in range(2)} for i in range(1, 25)]
            if all(len(versions) == 1 for versions in seen) and len(set.union(*seen)) == 2:
                break
            time.sleep(0.2)
        assert all(len(versions) == 1 for versions in seen), "an address keeps its version"
        assert Counter(version for versions in seen for version in versions).keys() == {old, new}

        for pool, version in (("b", new), ("a", old)):
            done = nginx.switch("to", pool)
            assert done.returncode == 0 and version in done.stdout, done.stdout + done.stderr
            load.wait_for(20, version=version)
            assert load.calls[-1]["version"] == version

        (nginx.folder / "nginx.conf").rename(nginx.folder / "whole.conf")
        assert nginx.switch("to", "b").returncode == 1, "nginx rejects it: the old choice stays"
        assert "default rerank_a" in nginx.switch("show").stdout
        (nginx.folder / "whole.conf").rename(nginx.folder / "nginx.conf")
    finally:
        load.stop()
    print(load.summary(), Counter(call["version"] for call in load.calls))
    print(nginx.switch("show").stdout)
    assert load.lost == [] and load.wrong == []
    assert {call["version"] for call in load.calls} == {old, new}
    assert any(call["parts"] > 1 for call in load.calls)
    assert any("," in line["replica"] for line in nginx.log()), "nginx sent calls of the dead replica again"
    assert KEY not in nginx.access_log.read_text() + nginx.error_log.read_text()


def versions_of(nginx: Nginx, source: str) -> str:
    status, headers, _ = post(nginx.port, ["d"], source)
    assert status == 200
    return headers["X-Rerank-Version"]


@pytest.mark.soak
def test_every_drill(tmp_path):
    """Kills, hangs, rolling restarts, reloads; 12 minutes on 2 cores. Its table is the one of docs/fleet.md."""
    done = subprocess.run(
        [sys.executable, str(KIT / "measurements/fleet_drills.py")], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stdout + done.stderr

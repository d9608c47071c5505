"""Tuning on a simulated service whose speed is a known function of the settings, in simulated time, and once
through start_rerank.sh with the stand-in for vllm."""

import asyncio
import json
import math
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import types

import pytest
from conftest import KIT, http, kit_environment
from fake_kit import FakeKit, session_of

import bench_rerank
from rerank_kit.benchmark import service, tune
from rerank_kit.benchmark.knobs import Knob
from rerank_kit.benchmark.service import Trouble
from rerank_kit.benchmark.tune import Tuner
from rerank_kit.settings import get_config

START = {"MAX_NUM_BATCHED_TOKENS": 4096, "MAX_NUM_SEQS": 128, "API_SERVER_COUNT": 1, "RENDERER_WORKERS": 1}
START |= {"GPU_MEMORY_UTILIZATION": 0.85, "TP": 1, "DP": 1}
KNOBS = [
    Knob("API_SERVER_COUNT", ("API_SERVER_COUNT",), high=8),
    Knob("RENDERER_WORKERS", ("RENDERER_WORKERS",), high=8),
    Knob("STEP", ("MAX_NUM_BATCHED_TOKENS", "MAX_NUM_SEQS"), low=(1024, 8), high=262144),
    Knob("MAX_NUM_BATCHED_TOKENS", ("MAX_NUM_BATCHED_TOKENS",), low=1024, high=262144),
    Knob("MAX_NUM_SEQS", ("MAX_NUM_SEQS",), low=8, high=4096),
    Knob("TP_DP", ("TP", "DP"), choices=((1, 1), (2, 1), (1, 2))),
    Knob("GPU_MEMORY_UTILIZATION", ("GPU_MEMORY_UTILIZATION",), factor=1.08, low=0.5, high=0.95),
]
DEFAULTS = {"MAX_NUM_BATCHED_TOKENS": "4096", "MAX_NUM_SEQS": "128", "API_SERVER_COUNT": "1", "TP": "1", "DP": "1"}


def speed(s):
    """Pairs/s: API processes help up to 4, both sizes of a step have a peak, two copies do little, TP harms."""
    api = min(s["API_SERVER_COUNT"], 4) ** 0.5
    tokens = math.exp(-0.05 * math.log2(s["MAX_NUM_BATCHED_TOKENS"] / 16384) ** 2)
    seqs = math.exp(-0.08 * math.log2(s["MAX_NUM_SEQS"] / 256) ** 2)
    return 400 * api * tokens * seqs * (1.25 if s["DP"] == 2 else 0.7 if s["TP"] == 2 else 1.0)


BEST = START | {"API_SERVER_COUNT": 4, "MAX_NUM_BATCHED_TOKENS": 16384, "MAX_NUM_SEQS": 256, "DP": 2}


class World:
    """A service, its load generator and the clock; a start takes 40 s, a window 10 s."""

    def __init__(self, speed=speed, noise=0.01, seed=1, dies=None, scores=None, interrupt_at=None, other_pairs=0):
        self.speed, self.noise, self.rng = speed, noise, random.Random(seed)
        self.dies, self.of_scores = dies or (lambda s: None), scores or (lambda s: 0.0)
        self.now, self.settings, self.starts, self.windows = 0.0, None, [], 0
        self.interrupt_at, self.other_pairs, self.answered_by_server = interrupt_at, other_pairs, 0
        self.bench = types.SimpleNamespace(answered=0)

    def decode(self, env):
        out = dict(START)
        for key, value in env.items():
            if key == "EXTRA_ARGS":
                out["RENDERER_WORKERS"] = int(value.split("--renderer-num-workers ")[1])
            elif key != "RESTART":
                out[key] = type(START[key])(value)
        return out

    # the service

    async def start(self, env):
        assert (env.get("RESTART") == "no") == bool(env)  # the present settings start as the user starts them
        self.now += 40
        self.settings = self.decode(env)
        self.starts.append(self.settings)
        self.answered_by_server = 0
        return self.dies(self.settings)

    async def leader(self):
        return [len(self.starts), 7]

    # the meter

    async def ready(self):
        pass

    async def served(self):
        return self.answered_by_server

    async def scores(self):
        self.bench.answered += 64
        self.answered_by_server += 64
        return [0.01 * i + self.of_scores(self.settings) for i in range(64)]

    async def window(self, label):
        self.windows += 1
        if self.windows == self.interrupt_at:
            raise asyncio.CancelledError
        self.now += 10
        self.bench.answered += 1000
        self.answered_by_server += 1000 + self.other_pairs
        value = self.speed(self.settings) * self.rng.gauss(1, self.noise)
        row = {"ok": 100, "refused": 0, "err": 0, "pairs/s": value, "req/s": value / 32, "errors": {}}
        return row | {"p95_ms": 100.0, "bound": "cpu"}

    def held(self, label):
        async def hold(rate):
            self.now += 10
            return rate <= self.speed(self.settings) / 40 * self.rng.gauss(1, self.noise)

        return hold


def tuner_of(world, state=None, knobs=KNOBS, **more):
    tuner = Tuner(world, world, START, knobs, **more)
    tuner.clock = lambda: world.now
    saved = {}
    tuner.save = lambda: saved.update(json.loads(json.dumps(tuner.state)))
    if state:
        tuner.state = state
    return tuner, saved


def outcomes(tuner):
    return {t["label"]: t["outcome"] for t in tuner.state["tried"]}


@pytest.mark.parametrize("seed", range(10))
def test_search_finds_the_optimum_within_its_budget(seed):
    world = World(seed=seed)
    tuner, _ = tuner_of(world, budget_s=5400)
    lines = asyncio.run(tuner.run())
    assert world.now <= 5400
    settings = [line for line in lines if "=" in line and not line.startswith("tune")]
    assert set(settings) == {
        "API_SERVER_COUNT=4", "MAX_NUM_BATCHED_TOKENS=16384", "MAX_NUM_SEQS=256", "TP=1", "DP=2"
    }  # fmt: skip
    change, half, sure = tuner.state["gain"]
    truth = 100 * (speed(BEST) / speed(START) - 1)
    assert sure and abs(change - truth) < max(2 * half, 0.02 * truth)
    assert "no further step improves the result" in lines[0]


def test_search_reaches_most_of_the_gain_in_a_short_budget():
    world = World()
    tuner, _ = tuner_of(world, budget_s=1800)
    asyncio.run(tuner.run())
    assert world.now <= 1800 and tuner.state["ended"] == "the budget ran out"
    best = [t for t in tuner.state["tried"] if t["outcome"] == "better"][-1]["settings"]
    assert speed(best) >= 2 * speed(START) and tuner.state["gain"][2]


def test_the_verdict_says_what_is_tried_first():
    for bound, first in (("cpu", "API_SERVER_COUNT"), ("gpu", "TP")):
        world = World()
        real = world.window

        async def window(label, real=real, bound=bound):
            return await real(label) | {"bound": bound}

        world.window = window
        tuner, _ = tuner_of(world, budget_s=900)
        asyncio.run(tuner.run())
        assert tuner.state["tried"][1]["label"].startswith(first)


def test_bad_candidates_are_left_after_one_window_and_close_ones_get_more():
    world = World(lambda s: {128: 100.0, 256: 101.0, 64: 60.0}[s["MAX_NUM_SEQS"]], noise=0.01)
    tuner, _ = tuner_of(world, knobs=[KNOBS[4]])
    asyncio.run(tuner.run())
    windows = {t["label"]: (len(t["values"]), t["outcome"]) for t in tuner.state["tried"]}
    assert windows["MAX_NUM_SEQS=64"] == (1, "worse")
    assert windows["MAX_NUM_SEQS=256"][0] > 2 and windows["MAX_NUM_SEQS=256"][1] in ("close", "worse")


def test_no_gain_is_said_as_such():
    for seed in range(5):
        world = World(lambda s: 500.0, noise=0.03, seed=seed)
        tuner, _ = tuner_of(world)
        lines = asyncio.run(tuner.run())
        assert "no measurable gain" in lines[1] and not any("put into .env" in line for line in lines)


def test_a_lucky_winner_does_not_pass_the_proof():
    world = World(lambda s: 500.0, noise=0.0)
    real = world.window

    async def window(label):
        row = await real(label)
        lucky = world.settings["MAX_NUM_SEQS"] == 256 and not label.startswith("turn")
        return row | {"pairs/s": row["pairs/s"] * (1.2 if lucky else world.rng.gauss(1, 0.02))}

    world.window = window
    tuner, _ = tuner_of(world, knobs=[KNOBS[4]])
    lines = asyncio.run(tuner.run())
    assert outcomes(tuner)["MAX_NUM_SEQS=256"] == "better"
    assert "no measurable gain, keep the present settings: MAX_NUM_SEQS=256" in lines[-1]


def test_settings_that_change_scores_are_rejected(capsys):
    # The fastest of all, and wrong.
    world = World(lambda s: speed(s) * s["RENDERER_WORKERS"], scores=lambda s: 0.05 * (s["RENDERER_WORKERS"] > 1))
    tuner, _ = tuner_of(world, budget_s=5400)
    lines = asyncio.run(tuner.run())
    assert outcomes(tuner)["API_SERVER_COUNT=4 RENDERER_WORKERS=2"] == "scores"
    assert not any("EXTRA_ARGS" in line for line in lines) and "scores" in lines[0]
    assert "REJECTED, scores differ by up to 0.05, tolerance 0.02" in capsys.readouterr().out
    tuner, _ = tuner_of(
        World(lambda s: speed(s) * s["RENDERER_WORKERS"], scores=lambda s: 0.01 * s["RENDERER_WORKERS"])
    )
    assert any("EXTRA_ARGS=--renderer-num-workers" in line for line in asyncio.run(tuner.run()))


def test_a_candidate_that_does_not_start_is_a_result(capsys):
    world = World(dies=lambda s: "died: out of GPU memory" if s["MAX_NUM_BATCHED_TOKENS"] > 8192 else None)
    tuner, _ = tuner_of(world, budget_s=5400)
    lines = asyncio.run(tuner.run())
    assert "did not start: died: out of GPU memory" in capsys.readouterr().out
    assert "MAX_NUM_BATCHED_TOKENS=8192" in lines and " no start)" in lines[0]


def test_a_candidate_that_fails_under_load_is_a_result():
    world = World()
    real = world.window

    async def window(label):
        row = await real(label)
        if world.settings["API_SERVER_COUNT"] == 2:
            row |= {"ok": 90, "refused": 10}
        if world.settings["API_SERVER_COUNT"] == 4:
            row |= {"ok": 0, "err": 100, "errors": {"disconnect": 100}}
        return row

    world.window = window
    tuner, _ = tuner_of(world, knobs=[Knob("API_SERVER_COUNT", ("API_SERVER_COUNT",), choices=((1,), (2,), (4,)))])
    asyncio.run(tuner.run())
    assert [t["outcome"] for t in tuner.state["tried"]] == ["start", "failed", "failed"]
    assert "10% of the calls" in tuner.state["tried"][1]["why"] and "disconnect" in tuner.state["tried"][2]["why"]


def test_present_settings_that_do_not_start_end_the_search():
    tuner, _ = tuner_of(World(dies=lambda s: "died: boom"))
    with pytest.raises(Trouble, match="present settings cannot be measured: died: boom"):
        asyncio.run(tuner.run())


def test_the_last_turn_runs_the_present_settings():
    for budget_s in (1200, 1800, 2400, 5400):
        world = World()
        tuner, _ = tuner_of(world, knobs=KNOBS[:1], budget_s=budget_s)
        asyncio.run(tuner.run())
        sides = [t["side"] for t in tuner.state["turns"]]
        assert sides[-1] == "present" and sides.count("best") == sides.count("present") >= 2
        assert tuner.running == START and world.starts[-len(sides) :] == [
            START if side == "present" else START | {"API_SERVER_COUNT": 4} for side in sides
        ]


@pytest.mark.parametrize("interrupt_at", [2, 5, 9, 20, 30, 45, 52])
def test_search_goes_on_after_an_interrupt(interrupt_at):
    whole, _ = tuner_of(World(), budget_s=5400)
    lines = asyncio.run(whole.run())
    world = World(interrupt_at=interrupt_at)
    tuner, saved = tuner_of(world, budget_s=5400)
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(tuner.run())
    first, spent_s = World(seed=2), saved["spent_s"]
    assert spent_s == world.now > 0
    tuner, _ = tuner_of(first, state=saved, budget_s=5400)
    known = [t["label"] for t in saved["tried"]]
    again = asyncio.run(tuner.run())
    assert set(lines[-5:]) == set(again[-5:])
    labels = [t["label"] for t in tuner.state["tried"]]
    assert labels[: len(known)] == known and len(set(labels)) == len(labels)  # nothing is measured twice
    assert tuner.spent_s() == spent_s + first.now
    if not known:
        assert first.starts[0] == START


def test_slo_search_finds_the_settings_with_the_highest_rate():
    world = World(noise=0.01)
    tuner, _ = tuner_of(world, knobs=KNOBS[:2], slo=True, budget_s=5400)
    lines = asyncio.run(tuner.run())
    assert "API_SERVER_COUNT=4" in lines and world.now <= 5400
    change, _, sure = tuner.state["gain"]
    assert sure and 75 < change < 130 and "calls/s within the SLO" in lines[1]
    bad = next(t for t in tuner.state["tried"] if t["outcome"] == "worse")
    assert bad["measure_s"] <= 10 and "did not hold" in bad["why"]  # one window


def test_a_proof_in_which_nothing_holds_is_no_gain_and_no_crash():
    tuner, _ = tuner_of(World(), slo=True)
    record = {"label": "x", "settings": START, "values": [1.0], "outcome": "better"}
    turns = [{"side": side, "value": 0.0, "score_difference": 0.0} for side in ("present", "best") * 2]
    tuner.began = 0.0
    tuner.state |= {"tried": [record, record], "turns": turns, "ended": "no further step improves the result"}
    assert tuner.result(record)[-1].startswith("tune: no rate held the SLO in the proof")
    assert tuner.state["gain"] == (0.0, None, False)


def test_the_service_is_put_back_after_whatever_happens(monkeypatch):
    done = []

    class Session:
        touched = True

        def __init__(self, *_):
            pass

        async def run(self):
            raise IndexError("a fault of the program")

        def put_back(self):
            done.append("put back")

    monkeypatch.setattr(tune, "Session", Session)
    with pytest.raises(IndexError):
        tune.tune(None, None)
    assert done == ["put back"]


def test_other_traffic_ends_the_search():
    tuner, _ = tuner_of(World(other_pairs=100))
    with pytest.raises(Trouble, match=r"others use the service \(300 pairs came"):
        asyncio.run(tuner.run())


def test_a_budget_without_room_says_what_it_needs():
    world = World()
    tuner, _ = tuner_of(world, budget_s=300)
    lines = asyncio.run(tuner.run())
    assert len(tuner.state["tried"]) == 1 and "need about" in lines[1] and world.now <= 300


# --- through the script ---


@pytest.fixture
def tunable_kit(tmp_path, checkpoints):
    """The kit with a stand-in whose speed its settings decide (tunable_vllm.py)."""
    made = FakeKit(tmp_path, checkpoints["qwen3"], program=KIT / "tests" / "stand_ins" / "tunable_vllm.py")
    yield made
    for pid in session_of(made.pid) if made.pid_file.exists() else []:
        os.kill(pid, signal.SIGKILL)


def wait_for(what, timeout_s=60):
    end = time.monotonic() + timeout_s
    while not (found := what()) and time.monotonic() < end:
        time.sleep(0.05)
    assert found
    return found


@pytest.mark.timing
def test_tune_through_the_script_with_an_interrupt(tunable_kit, tmp_path, monkeypatch, capsys):
    kit = tunable_kit
    env_file = tmp_path / "my.env"
    env_file.write_text(f"MODEL_PATH={kit.settings.pop('MODEL_PATH')}\nMAX_NUM_SEQS=128\nSTOP_TIMEOUT_S=1\n")
    kit.settings["KIT_ENV_FILE"] = env_file
    assert kit("start").returncode == 0
    before = kit.state
    argv = ["--tune", "RENDERER_WORKERS,MAX_NUM_SEQS", "--concurrency", "16", "--docs", "2", "--seconds", "0.5"]
    command = [sys.executable, str(KIT / "bench_rerank.py"), *argv, "--budget", "10m"]
    state_file = kit.logs / f"tune-{kit.settings['PORT']}.json"

    # Ctrl-C while a candidate starts: the service is as before.
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, env=kit_environment(**kit.settings), **pipes) as process:
        wait_for(lambda: state_file.exists() and json.loads(state_file.read_text())["tried"])
        wait_for(lambda: not kit.pid_file.exists() or kit.state.get("command") != before["command"])
        process.send_signal(signal.SIGINT)
        shown = process.communicate(timeout=60)[0]
    assert process.returncode == 130 and "the same command goes on" in shown, shown
    assert kit("status").returncode == 0
    assert (kit.state["command"], kit.state["env"]) == (before["command"], before["env"])
    known = json.loads(state_file.read_text())
    assert not known["done"] and known["was_running"] and known["tried"][0]["outcome"] == "start"

    # The same again goes on and ends. The service that runs by then is not that search's to stop: as if it had been
    # started only after the interrupt.
    state_file.write_text(json.dumps({**known, "was_running": False}))
    for key, value in kit_environment(**kit.settings).items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(service, "LOOK_S", 0.5)
    monkeypatch.setattr(tune, "TURNS", (2, 2, 2))
    files = {kind: tmp_path / f"out.{kind}" for kind in ("json", "html", "csv")}
    outs = [word for kind, path in files.items() for word in (f"--{kind}", str(path))]
    assert bench_rerank.main([*argv, "--budget", "9m", *outs]) == 0
    shown = capsys.readouterr()
    assert "resuming the search" in shown.err
    out = json.loads(files["json"].read_text())["tune"]
    assert [(t["label"], t["outcome"]) for t in out["tried"]] == [
        ("present settings", "start"),
        ("RENDERER_WORKERS=2", "scores"),
        ("MAX_NUM_SEQS=256", "better"),
        ("MAX_NUM_SEQS=512", "no start"),
    ]
    assert "out of GPU memory" in out["tried"][3]["why"] and "did not start: " in shown.out
    change, half, sure = out["gain"]
    assert sure and abs(change - 100) < max(10, 2 * half)  # twice as fast
    assert "# tune: put into .env:\nMAX_NUM_SEQS=256\n" in shown.out
    assert files["csv"].read_text().count("MAX_NUM_SEQS=256") > 3
    page = files["html"].read_text()
    assert "<td>MAX_NUM_SEQS=512</td>" in page and "pairs/s, best and present settings in turns" in page
    assert "<p>tune: put into .env:</p>\n<p>MAX_NUM_SEQS=256</p>" in page
    # All is as it was: .env, and a service with the present settings that is supervised as before.
    assert "MAX_NUM_SEQS=128" in env_file.read_text() and len(env_file.read_text().splitlines()) == 3
    assert (kit.state["command"], kit.state["env"]) == (before["command"], before["env"])
    assert json.loads(kit("status", "--json").stdout)["state"] == "ready"
    assert json.loads(state_file.read_text())["done"]


def test_tune_refuses_a_service_that_is_not_its_own(tunable_kit, monkeypatch, capsys):
    kit = tunable_kit
    for key, value in kit_environment(**kit.settings).items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(service, "LOOK_S", 0.5)
    argv = ["--tune", "MAX_NUM_SEQS", "--concurrency", "2", "--docs", "4", "--seconds", "0.3"]

    # Somebody's server on the port, which the script did not start.
    with socket.create_server(("127.0.0.1", kit.settings["PORT"])):
        assert bench_rerank.main(argv) == 1
    assert "start_rerank.sh did not start" in capsys.readouterr().err and not kit.pid_file.exists()

    # Started with other settings than the present ones: it could not be put back.
    assert kit("start", MAX_NUM_SEQS=64).returncode == 0
    assert bench_rerank.main(argv) == 1
    assert "--max-num-seqs" not in (said := capsys.readouterr().err) and "64 -> 128" in said
    assert kit.state["command"][kit.state["command"].index("--max-num-seqs") + 1] == "64"

    # Others use it.
    monkeypatch.setenv("MAX_NUM_SEQS", "64")
    url, stop = f"http://127.0.0.1:{kit.settings['PORT']}/v1/rerank", threading.Event()

    def load():
        while not stop.is_set():
            http("POST", url, {"query": "q", "documents": ["d"] * 4})

    thread = threading.Thread(target=load)
    thread.start()
    try:
        assert bench_rerank.main(argv) == 1
    finally:
        stop.set()
        thread.join()
    pid = kit.server_pid
    assert "others use the service" in capsys.readouterr().err and session_of(kit.pid) and pid == kit.server_pid

    # Another host's service is not ours to restart.
    assert bench_rerank.main([*argv, "--base-url", "http://10.1.2.3:80/v1"]) == 1
    assert "of this host" in capsys.readouterr().err


def test_two_searches_of_one_port_exclude_each_other(tmp_path, capsys, monkeypatch):
    """The second would take the first one's candidate for what a killed search left, and restart it."""
    monkeypatch.setenv("LOG_DIR", str(tmp_path / "log"))
    cfg = get_config()
    with service.only_search(cfg):
        assert tune.tune(types.SimpleNamespace(), None) == 1
        said = capsys.readouterr().err
        assert f"another --tune of port {cfg.port} is under way (PID {os.getpid()})" in said
        with service.only_search(get_config(port=cfg.port + 1)):
            pass
    with service.only_search(cfg):
        pass

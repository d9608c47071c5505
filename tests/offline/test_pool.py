"""Several engine processes: order, errors of a process, the end of the run."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import KIT, kit_environment, until
from engine_processes import Reranker

from rerank_kit.engine.machine import Machine
from rerank_kit.engine.plan import plan_engine
from rerank_kit.models.pair import Pair
from rerank_kit.offline import program
from rerank_kit.offline.pool import CHUNKS_AHEAD, CHUNKS_OPEN, RerankerPool, Worker
from rerank_kit.settings import ConfigError, get_config

H100 = Machine("0.32.0", ("NVIDIA H100, 81559",), tuple(range(16)), 2**37)


def plan(engines=2, **more):
    profile = SimpleNamespace(instruction=True, name="cross_encoder", reference="cross-encoder")
    given = {"engines": engines, "profile": profile, "cfg": get_config(), "dies": None, "fails": None, "marks": None}
    given |= {"killed": None, "slow": None, "child": None}
    return SimpleNamespace(**given | more)


def pairs_of(n, start=0):
    return [Pair("q", "d" * (start + i + 1)) for i in range(n)]


def test_results_come_in_input_order_from_all_processes():
    with RerankerPool(plan(3), Reranker) as pool:
        lists = [pairs_of(i % 5, 3 * i) for i in range(150)]  # some are empty; more than the processes hold ahead
        got = list(pool.stream((i, pool.prepare(pairs)) for i, pairs in enumerate(lists)))
        assert [tag for tag, _ in got] == list(range(150))
        for (_, results), pairs in zip(got, lists, strict=True):
            assert [round(r.score * 1000) for r in results] == [len(p.document) for p in pairs]
        assert all(worker.n_chunks == 0 for worker in pool.workers)
        assert [round(r.score * 1000) for r in pool.score(pairs_of(11))] == list(range(1, 12))
        # A run that is given up leaves nothing of it to the next one.
        first = next(pool.stream((i, pairs_of(4)) for i in range(100)))
        assert first[0] == 0
        assert [round(r.score * 1000) for r in pool.score(pairs_of(3, 500))] == [501, 502, 503]


def test_processes_end_their_engines_with_the_pool(tmp_path):
    with RerankerPool(plan(2, marks=tmp_path), Reranker) as pool:
        pids = [worker.process.pid for worker in pool.workers]
        pool.score(pairs_of(9))
    assert sorted(int(path.name) for path in tmp_path.iterdir()) == sorted(pids)
    assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)


@pytest.mark.parametrize(
    ("more", "error", "said"),
    [
        ({"fails": "ddd"}, RuntimeError, "engine process [01]: ValueError: bad document 'ddd'"),
        ({"dies": "ddd"}, RuntimeError, "engine process [01] ended with exit code 7"),
        ({"fails": "start"}, ConfigError, "engine process 0: ConfigError: no room on the GPU"),
    ],
)
def test_an_error_of_a_process_reaches_the_parent(more, error, said):
    with pytest.raises(error, match=said), RerankerPool(plan(2, **more), Reranker) as pool:
        pool.score(pairs_of(40))


def test_a_process_that_is_killed_between_two_runs_is_reported():
    with RerankerPool(plan(1), Reranker) as pool:
        assert len(pool.score(pairs_of(2))) == 2
        os.kill(pool.workers[0].process.pid, signal.SIGKILL)
        with pytest.raises(RuntimeError, match="ended with exit code -9"):
            pool.score(pairs_of(2))


def children_of(group):
    """Processes of a process group that are no zombies."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, its = path.read_text().rpartition(")")[2].split()[:3]
            found += [int(path.parent.name)] if int(its) == group and state != "Z" else []
    return found


@pytest.mark.parametrize("child", ["same group", "own group"])
@pytest.mark.parametrize("when", ["at start", "in a chunk", "between two runs"])
def test_a_killed_process_is_reported_while_a_child_holds_its_pipe(tmp_path, when, child):
    began, pid = time.monotonic(), None
    more = {"fails": "killed at start" if when == "at start" else None, "child": child, "marks": tmp_path}
    try:
        with (
            pytest.raises(RuntimeError, match=r"engine process [01] ended with exit code -9"),
            RerankerPool(plan(2, killed="ddd", **more), Reranker) as pool,
        ):
            pid = pool.workers[0].process.pid
            assert len(children_of(pid)) == (1 if child == "own group" else 2)
            if when == "between two runs":
                os.kill(pid, signal.SIGKILL)
                pool.score([Pair("q", "x" * 300_000)] * 8)  # more than a pipe holds
            pool.score(pairs_of(40))
        assert time.monotonic() - began < 15  # the child ends after 20 s
        until(lambda: pid is None or not children_of(pid), 5)
    finally:
        for path in tmp_path.glob("child-*"):
            with suppress(ProcessLookupError):
                os.kill(int(path.name.removeprefix("child-")), signal.SIGKILL)


def test_ctrl_c_while_the_engines_load_does_not_wait_for_them(monkeypatch):
    def interrupted(worker):
        time.sleep(0.5)  # they are in their own process groups by now
        raise KeyboardInterrupt

    monkeypatch.setattr(Worker, "read", interrupted)
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        RerankerPool(plan(2, slow="start"), Reranker)
    assert time.monotonic() - began < 10


def test_a_slow_process_does_not_let_the_others_read_the_whole_input():
    read = 0

    def source():
        nonlocal read
        for i in range(600):
            read += 1
            yield i, pairs_of(1, i)

    with RerankerPool(plan(2, slow="d"), Reranker) as pool:
        lists = pool.stream(source())
        assert next(lists)[0] == 0
        # The other process has done all that it may meanwhile: more than it holds ahead, less than the input.
        assert CHUNKS_AHEAD < read <= CHUNKS_OPEN * 2
        assert [tag for tag, _ in lists] == list(range(1, 600))


def test_processes_do_not_outlive_a_killed_parent(tmp_path):
    code = (
        "import sys, time; from test_pool import *; p = RerankerPool(plan(2), Reranker); "
        "print(*[w.process.pid for w in p.workers], flush=True); time.sleep(60)"
    )
    env = {**kit_environment(), "PYTHONPATH": os.pathsep.join([str(KIT), *sys.path])}
    parent = subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, text=True)
    try:
        pids = [int(word) for word in parent.stdout.readline().split()]
        assert len(pids) == 2
        parent.kill()
        end = time.monotonic() + 15
        while any(os.path.exists(f"/proc/{pid}") for pid in pids) and time.monotonic() < end:
            time.sleep(0.05)
        assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)
    finally:
        parent.kill()
        parent.communicate()


def test_several_engines_where_the_service_has_them(checkpoints, monkeypatch):
    """As many as the service on a large GPU, each with its share of the memory; one for a small file or GPU."""
    model = checkpoints["qwen3"]
    assert plan_engine(get_config(), model, H100).engines == 1
    several = plan_engine(get_config(), model, H100, several=True)
    assert several.engines == 3 and "data_parallel_size" not in several.engine
    assert several.engine["gpu_memory_utilization"] == 0.283 and several.engine["kv_cache_memory_bytes"] > 2**30
    small = Machine("0.32.0", ("NVIDIA L4, 23034",), H100.cores, 2**37)
    assert plan_engine(get_config(), model, small, several=True).engines == 1
    cpu = Machine("0.32.0+cpu", (), (0, 1), 2**35)
    assert plan_engine(get_config(engines_per_gpu=2), model, cpu, several=True).engines == 1
    monkeypatch.setattr(program, "OfflineReranker", lambda made: ("one", made.engines))
    monkeypatch.setattr(program, "RerankerPool", lambda made: ("pool", made.engines))
    made = plan_engine(get_config(), model, H100)
    assert program.opened_for(made, program.MANY_PAIRS - 1, model) == ("one", 1)
    assert program.opened_for(made, program.MANY_PAIRS, model) == ("pool", 3)
    mine = plan_engine(get_config(engines_per_gpu=2), model, H100)
    assert program.opened_for(mine, 1, model) == ("pool", 2)

"""CPU and memory limits of control groups, v1 and v2, at the group itself and above it."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from rerank_kit.engine import limits, machine
from rerank_kit.engine.machine import Machine, free_memory, usable_cores
from rerank_kit.engine.plan import plan_service
from rerank_kit.serving.command import explain
from rerank_kit.settings import EnvConfig

GIB = 2**30


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """Writes a tree of control groups: tree(content of /proc/self/cgroup, {file: text})."""
    monkeypatch.setattr(limits, "ROOT", tmp_path / "cgroup")
    monkeypatch.setattr(limits, "SELF", tmp_path / "self")

    def make(own: str, files: dict[str, object]) -> None:
        (tmp_path / "self").write_text(own)
        for name, text in files.items():
            file = tmp_path / "cgroup" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f"{text}\n")

    return make


V2 = {
    "memory.max": 4 * GIB,
    "memory.current": 3 * GIB,
    "memory.stat": f"anon 5\ninactive_file {GIB}",
    "cpu.max": "150000 100000",
}
V1 = {"memory.limit_in_bytes": 4 * GIB, "memory.usage_in_bytes": 3 * GIB, "memory.stat": f"total_inactive_file {GIB}"}
CPU1 = {"cpu.cfs_quota_us": 150000, "cpu.cfs_period_us": 100000}


def under(folder: str, files: dict[str, object]) -> dict[str, object]:
    return {f"{folder}/{name}": text for name, text in files.items()}


@pytest.mark.parametrize(
    ("own", "files"),
    [
        ("0::/\n", V2),  # a container with a namespace of its own
        ("0::/kubepods/pod1\n", V2),  # the path is the host's, the mount the container's
        ("0::/system.slice/rerank.service\n", under("system.slice/rerank.service", V2)),
        ("0::/system.slice/rerank.service\n", under("system.slice", V2)),
        (
            "5:memory:/docker/x\n2:cpu,cpuacct:/docker/x\n",
            under("memory/docker/x", V1) | under("cpu,cpuacct/docker/x", CPU1),
        ),
        ("5:memory:/docker/x\n2:cpuacct:/\n1:cpu:/docker/x\n0::/\n", under("memory", V1) | under("cpu", CPU1)),
    ],
)
def test_limits_are_found_wherever_they_are_set(tree, own, files):
    tree(own, files)
    assert limits.free_in_cgroup() == 2 * GIB, "4 less 3 used, of which 1 is page cache"
    assert limits.cpu_quota() == 1.5


def test_the_smallest_limit_counts(tree):
    tight = {"memory.max": 2 * GIB, "memory.current": GIB, "cpu.max": "50000 100000"}
    tree("0::/a/b\n", under("a", V2) | under("a/b", tight))
    assert (limits.free_in_cgroup(), limits.cpu_quota()) == (GIB, 0.5)
    tree("0::/a/b\n", under("a/b", {"memory.max": 100 * GIB, "cpu.max": "max 100000"}))
    assert (limits.free_in_cgroup(), limits.cpu_quota()) == (2 * GIB, 1.5)
    tree("0::/a/b\n", under("a/b", {"memory.max": GIB, "memory.current": 5 * GIB}))
    assert limits.free_in_cgroup() == 0, "never less than nothing"


@pytest.mark.parametrize(
    ("own", "files"),
    [
        ("0::/\n", {"memory.max": "max", "memory.current": GIB, "cpu.max": "max 100000"}),
        (
            "3:memory:/\n1:cpu:/\n",
            under("memory", V1 | {"memory.limit_in_bytes": 9223372036854771712})
            | under("cpu", CPU1 | {"cpu.cfs_quota_us": -1}),
        ),
        ("0::/\n", {"memory.max": "", "memory.current": "?", "cpu.max": "x"}),
        ("0::/\n", {}),
        ("", {}),
    ],
)
def test_no_limit(tree, own, files):
    tree(own, files)
    assert limits.free_in_cgroup() is None and limits.cpu_quota() is None


def test_this_machines_own_groups_can_be_read():
    limit, quota = limits.free_in_cgroup(), limits.cpu_quota()
    assert (limit is None or limit > 0) and (quota is None or quota > 0)
    assert list(limits._groups("memory")) or not Path("/proc/self/cgroup").exists()


def test_the_machine_is_what_the_limits_leave(tree, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 4, 5})
    for quota, cores, limit in ((1.5, (0,), 1.5), (0.5, (0,), 0.5), (3.0, (0, 1, 4), 3.0), (4.0, (0, 1, 4, 5), None)):
        tree("0::/\n", {"cpu.max": f"{int(quota * 100000)} 100000", "memory.max": GIB // 2, "memory.current": 0})
        assert usable_cores() == (cores, limit)
    assert free_memory() == GIB // 2
    monkeypatch.setattr(machine, "vllm_version", lambda: "0.32.0+cpu")
    assert machine.probe_machine().cpu_quota is None


def test_a_cpu_limit_sets_the_threads_and_binds_none(checkpoints):
    free = Machine("0.32.0+cpu", (), (0,), 2**37)
    bound = plan_service(EnvConfig(), checkpoints["bert"], free)
    made = plan_service(EnvConfig(), checkpoints["bert"], replace(free, cpu_quota=1.5))
    assert bound.env["VLLM_CPU_OMP_THREADS_BIND"] == "0" and "OMP_NUM_THREADS" not in bound.env
    assert (made.env["VLLM_CPU_OMP_THREADS_BIND"], made.env["OMP_NUM_THREADS"]) == ("nobind", "1")
    said = explain(made)
    assert "threads: 1 by the cgroup's CPU limit of 1.5" in said and " cores=1 " in said and " cpu_limit=1.5" in said
    assert "cpu_limit" not in explain(bound)

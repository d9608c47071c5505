"""Limits of this process's control groups: CPU time and memory, for cgroup v1 and v2.

In a container /proc/meminfo and the list of cores are the host's. A limit may be set on the group itself or on one
above it, and the smallest one counts.
Source: cgroup-v2.rst, cgroup-v1/memory.rst and scheduler/sched-bwc.rst of the Linux kernel.
"""

from collections.abc import Iterator
from pathlib import Path

ROOT, SELF = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
UNLIMITED = 2**60  # v1 writes a number near 2**63 for "no limit"


def _groups(controller: str) -> Iterator[tuple[int, Path]]:
    """(version, folder) of this process's group and of those above it, for `memory` or `cpu`."""
    try:
        lines = SELF.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, names, path = line.split(":", 2)
        if names and controller not in names.split(","):
            continue
        # v1 has a mount for each controller, or for several: /sys/fs/cgroup/cpu,cpuacct.
        mounts = [ROOT / controller, ROOT / names] if names else [ROOT, ROOT / "unified"]
        mount = next((folder for folder in mounts if folder.is_dir()), None)
        if mount is None:
            continue
        # In a container the path may be one of the host's, and the mount already the container's own group.
        folder = mount / path.lstrip("/")
        for group in (folder, *folder.parents):
            if group.is_dir() and (group == mount or mount in group.parents):
                yield (1 if names else 2), group
            if group == mount:
                break


def _number(file: Path) -> int | None:
    """The file's number; None for "max", -1 or no such file."""
    try:
        value = int(file.read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return None
    return value if 0 <= value < UNLIMITED else None


def _stat(file: Path, key: str) -> int:
    try:
        return next((int(line.split()[1]) for line in file.read_text().splitlines() if line.split()[0] == key), 0)
    except (OSError, ValueError, IndexError):
        return 0


def free_in_cgroup() -> int | None:
    """Bytes that this process may still take by its memory limit; None = it has none."""
    free: list[int] = []
    for version, group in _groups("memory"):
        limit = _number(group / ("memory.max" if version == 2 else "memory.limit_in_bytes"))
        used = _number(group / ("memory.current" if version == 2 else "memory.usage_in_bytes"))
        if limit is None or used is None:
            continue
        # Files in the page cache count as used, but the kernel gives them up first.
        cache = _stat(group / "memory.stat", "inactive_file" if version == 2 else "total_inactive_file")
        free.append(max(0, limit - max(0, used - cache)))
    return min(free, default=None)


def cpu_quota() -> float | None:
    """Cores' worth of CPU time that this process may use; None = no limit."""
    quotas: list[float] = []
    for version, group in _groups("cpu"):
        if version == 2:
            try:
                quota, period = (group / "cpu.max").read_text().split()
                quotas += [int(quota) / int(period)] if quota != "max" else []
            except (OSError, ValueError, ZeroDivisionError):
                continue
        else:
            quota_us, period_us = _number(group / "cpu.cfs_quota_us"), _number(group / "cpu.cfs_period_us")
            quotas += [quota_us / period_us] if quota_us and period_us else []
    return min(quotas, default=None)

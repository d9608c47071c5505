"""Processes by PID and start time: which are alive, which are in a session, and on which machine a PID is valid."""

import ctypes
import os
import signal
from contextlib import suppress
from pathlib import Path

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def this_machine() -> str:
    """Host name, boot and PID namespace. A PID that was written elsewhere names another process here."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{os.uname().nodename}:{boot}:{os.readlink('/proc/self/ns/pid')}"


def stat_fields(pid: int) -> list[str]:
    """/proc/PID/stat from the state letter on; empty when there is no such process."""
    try:
        # The name may hold spaces and brackets, so the fields are counted after it.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def born(pid: int) -> int | None:
    """Start time in clock ticks; PID and start time together identify a process. None if it is dead or a zombie."""
    fields = stat_fields(pid)
    return int(fields[19]) if fields and fields[0] not in ("Z", "X") else None


def session_pids(session: int) -> list[int]:
    """PIDs of the live processes in a session."""
    out = []
    for folder in Path("/proc").glob("[0-9]*"):
        fields = stat_fields(int(folder.name))
        if fields and fields[0] not in ("Z", "X") and int(fields[3]) == session:
            out.append(int(folder.name))
    return sorted(out)


def is_alive(pid: int) -> bool:
    """The process exists and is no zombie."""
    return born(pid) is not None


def end_with_parent() -> None:
    """TERM for this process when its parent ends."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)

"""Detects lost hosts of a multi-node service by the TCP connections between the nodes."""

import ipaddress
import os
import re
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path

from rerank_kit.engine.nodes import head_address, is_headless
from rerank_kit.settings import EnvConfig

LOST_AFTER_S = 5.0  # without a connection; ZeroMQ restores a dropped one within a second
LOOK_EVERY_S = 1.0
CONNECT_S = 3.0
# Retransmits of one segment, with doubling intervals: 0.2 + 0.4 + ... = 12.6 s without an answer.
MOST_RETRANSMITS = 6
# vLLM logs this when the head did not answer for five minutes (HANDSHAKE_TIMEOUT_MINS in vllm/v1/engine/core.py).
NO_HEAD = r"Did not receive response from front-end.*"
HEAD_LOST = "the head is lost"
ESTABLISHED, LISTEN = "01", "0A"


# --- the connections between the nodes ---


def _endpoint(text: str) -> tuple[str, int]:
    """`0100007F:1F90` of /proc/net/tcp as (address, port)."""
    address, port = text.split(":")
    words = [bytes.fromhex(address[i : i + 8])[::-1] for i in range(0, len(address), 8)]
    found = ipaddress.ip_address(b"".join(words))
    return str(getattr(found, "ipv4_mapped", None) or found), int(port, 16)


def connections(pids: list[int]) -> tuple[dict[tuple, int], set[int]]:
    """TCP connections from these processes to other processes, and the ports on which these processes listen.

    Returns:
        ({(own address, own port, other address, other port): retransmits of the oldest segment}, ports).
    """
    inodes = set()
    for pid in pids:
        with suppress(OSError):  # the process has ended
            for fd in Path(f"/proc/{pid}/fd").iterdir():
                with suppress(OSError):
                    if found := re.fullmatch(r"socket:\[(\d+)\]", os.readlink(fd)):
                        inodes.add(found[1])
    out, ports = {}, set()
    for name in ("/proc/net/tcp", "/proc/net/tcp6"):
        with suppress(OSError):
            for line in Path(name).read_text().splitlines()[1:]:
                words = line.split()
                if words[9] in inodes and words[3] == ESTABLISHED:
                    out[(*_endpoint(words[1]), *_endpoint(words[2]))] = int(words[6], 16)
                elif words[9] in inodes and words[3] == LISTEN:
                    ports.add(_endpoint(words[1])[1])
    return {key: n for key, n in out.items() if (*key[2:], *key[:2]) not in out}, ports


def accepts(address: str, port: int, timeout_s: float = CONNECT_S) -> bool:
    """Whether something listens there."""
    try:
        with socket.create_connection((address, port), timeout=timeout_s):
            return True
    except OSError:
        return False


class Peers(threading.Thread):
    """Watches the connections of this node's vLLM to the other nodes, from the first time that it is ready.

    The other nodes connect to the head. A node is lost when its connection is gone or it does not acknowledge data. A
    headless node also checks that the head still listens, because an idle connection does not show a lost head.
    """

    def __init__(self, cfg: EnvConfig, pids):
        super().__init__(daemon=True)
        self.cfg, self.pids = cfg, pids  # pids() returns the processes of this vLLM
        self.head = head_address(cfg)
        self.warming = False  # as in Watch; a headless node has no API to warm
        self.ready = False  # on a headless node: its engines are connected to the head
        self.baseline: set[tuple] = set()
        self.why = ""  # why the other nodes count as lost; empty = they do not
        self.stopped = threading.Event()
        self.start()

    def run(self) -> None:
        good_at = time.monotonic()
        while not self.stopped.wait(LOOK_EVERY_S):
            now = self._now()
            if not self.baseline:
                if is_headless(self.cfg) and now:
                    # The first connections open one by one: wait until their set is stable.
                    self.stopped.wait(LOOK_EVERY_S)
                    if set(self._now()) == set(now):
                        self.watch(now)
                        self.ready = True
                good_at = time.monotonic()
                continue
            wrong = self._wrong(now)
            if not wrong:
                good_at = time.monotonic()
            elif time.monotonic() - good_at >= LOST_AFTER_S:
                self.why = wrong
                return

    def hangs(self) -> str:
        """Always empty: peers get lost, see lost()."""
        return ""

    def lost(self) -> str:
        """Why this node's vLLM must be restarted; empty = no reason."""
        if not self.why:
            return ""
        if is_headless(self.cfg):
            return f"{HEAD_LOST}: {self.why}; its engines cannot reconnect to it"
        return f"a node is lost: {self.why}; calls sent there would hang permanently, and vLLM takes no engine back"

    def watch(self, now: dict | None = None) -> None:
        """Take the current connections as those that must stay."""
        self.baseline = set(self._now() if now is None else now)

    def _now(self) -> dict[tuple, int]:
        """Connections between engines and API of different nodes, without those of the handshake and HTTP."""
        found, ports = connections(self.pids())
        if is_headless(self.cfg):
            return {key: n for key, n in found.items() if key[2] == self.head and key[3] != self.cfg.dp_rpc_port}
        ports -= {self.cfg.dp_rpc_port, self.cfg.port}
        return {key: n for key, n in found.items() if key[1] in ports}

    def _wrong(self, now: dict[tuple, int]) -> str:
        """The fault of the connections; empty = none."""
        for address in sorted({key[2] for key in self.baseline}):
            here = [key for key in now if key[2] == address]
            if len(here) < sum(key[2] == address for key in self.baseline):
                return f"connections to {address} are gone"
            if max(now[key] for key in here) >= MOST_RETRANSMITS:
                return f"{address} does not answer"
        if is_headless(self.cfg) and not accepts(*min(key[2:] for key in self.baseline)):
            return f"the head {self.head} does not listen any more"
        return ""

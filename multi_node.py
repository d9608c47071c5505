"""vLLM's data parallel over several hosts: which node this is, what vLLM must be told, whether the others are there.

Node 0 is the head: API, load balancing and its own engines. The others are headless: engines only, no HTTP. vLLM itself
notices neither a node that is gone (calls sent there hang for ever) nor, on a headless node, a head that was started
anew; and an engine cannot join a running head again. So the supervisors look at the TCP connections between the nodes,
in /proc/net/tcp, and start their own vLLM again when they are gone. docs/multi_node.md has what was measured.

Source: vllm/v1/engine/utils.py (wait_for_engine_startup), vllm/entrypoints/cli/serve.py (run_headless), vLLM 0.32.0.
"""

import ipaddress
import os
import re
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path

from env_utils import ConfigError, EnvConfig

LOST_AFTER_S = 5.0  # without a connection; ZeroMQ reconnects a dropped one within a second
LOOK_EVERY_S = 1.0
CONNECT_S = 3.0
# Of one segment, each after twice the time: 0.2 + 0.4 + ... = 12.6 s without an answer.
MOST_RETRANSMITS = 6
# What vLLM says when the head was not there for five minutes (HANDSHAKE_TIMEOUT_MINS in vllm/v1/engine/core.py).
NO_HEAD = r"Did not receive response from front-end.*"
HEAD_LOST = "the head is lost"
ESTABLISHED, LISTEN = "01", "0A"


def is_headless(cfg: EnvConfig) -> bool:
    """This node has engines only."""
    return cfg.node_rank > 0


def has_other_nodes(cfg: EnvConfig) -> bool:
    """Some of the engines are on other hosts."""
    return cfg.dp_address is not None and cfg.engines_here < cfg.dp


def check_nodes(cfg: EnvConfig) -> None:
    """Raise ConfigError for node settings that do not fit together."""
    if cfg.dp_address is None:
        for key, value in (("NODE_RANK", cfg.node_rank), ("DP_LOCAL", cfg.dp_local)):
            if value:
                raise ConfigError(
                    f"{key}={value} is for several hosts: set DP_ADDRESS to the address of node 0, or unset {key}"
                )
        return
    if cfg.dp_local is None:
        raise ConfigError(
            f"DP_ADDRESS={cfg.dp_address} is for several hosts: set DP_LOCAL, the copies on each of them (DP={cfg.dp} "
            "is their sum)"
        )
    nodes, rest = divmod(cfg.dp, cfg.dp_local)
    if rest or nodes < 2:
        raise ConfigError(
            f"DP={cfg.dp} copies with DP_LOCAL={cfg.dp_local} on each host make no two or more equal hosts: DP must be "
            "a multiple of DP_LOCAL, twice it or more; on one host unset DP_ADDRESS and DP_LOCAL"
        )
    if cfg.node_rank >= nodes:
        raise ConfigError(
            f"NODE_RANK={cfg.node_rank}, but DP={cfg.dp} copies, {cfg.dp_local} a host, make {nodes} hosts: "
            f"allowed is 0 (the head) to {nodes - 1}"
        )
    if (cfg.engines_per_gpu or 1) > 1:
        raise ConfigError(
            f"ENGINES_PER_GPU={cfg.engines_per_gpu} works on one host only: unset it, or run a service on each host"
        )
    if is_headless(cfg) and cfg.api_server_count:
        raise ConfigError(
            f"API_SERVER_COUNT={cfg.api_server_count}: node {cfg.node_rank} has no API, node 0 has: unset it"
        )
    address = ipaddress.ip_address(head_address(cfg))
    if address.is_global and not cfg.allow_no_key:
        raise ConfigError(
            f"DP_ADDRESS={cfg.dp_address} is a public address, and vLLM's connections between nodes have neither key "
            "nor encryption: use a network of the nodes' own (or ALLOW_NO_KEY=1, where a firewall keeps strangers out)"
        )


def head_address(cfg: EnvConfig) -> str:
    """DP_ADDRESS as a number: vLLM cannot listen on a name."""
    try:
        return socket.getaddrinfo(cfg.dp_address, cfg.dp_rpc_port, type=socket.SOCK_STREAM)[0][4][0]
    except OSError as exc:
        raise ConfigError(f"DP_ADDRESS={cfg.dp_address!r} is no address of node 0: {exc.strerror}") from exc


def check_rpc_port(cfg: EnvConfig) -> None:
    """Raise ConfigError where the head cannot listen for its nodes."""
    address = head_address(cfg)
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, cfg.dp_rpc_port))
        except OSError as exc:
            raise ConfigError(
                f"DP_ADDRESS={cfg.dp_address} DP_RPC_PORT={cfg.dp_rpc_port} cannot be bound ({exc.strerror}): on node "
                "0 DP_ADDRESS is the address of this host by which the other nodes reach it; the port must be free"
            ) from exc


def node_flags(cfg: EnvConfig) -> list[str]:
    """Arguments of `vllm serve` for this node; none on one host."""
    if not has_other_nodes(cfg):
        return []
    flags = ["--data-parallel-address", head_address(cfg), "--data-parallel-rpc-port", str(cfg.dp_rpc_port)]
    flags += ["--data-parallel-size-local", str(cfg.engines_here)]
    if is_headless(cfg):
        flags += ["--headless", "--data-parallel-start-rank", str(cfg.node_rank * cfg.engines_here)]
    return flags


def node_env(cfg: EnvConfig) -> dict[str, str]:
    """Environment of `vllm serve` for this node: the address that it has in the nodes' network."""
    if not has_other_nodes(cfg):
        return {}
    with suppress(OSError):
        head = head_address(cfg)
        with socket.socket(socket.AF_INET6 if ":" in head else socket.AF_INET, socket.SOCK_DGRAM) as one:
            one.connect((head, cfg.dp_rpc_port))  # sends nothing: asks the kernel which way it would go
            return {"VLLM_HOST_IP": one.getsockname()[0]}
    return {}


def describe_node(cfg: EnvConfig) -> str:
    """`node 1 of 2 (1 engine, head 10.0.0.1:29550)`."""
    engines = f"{cfg.engines_here} engine" + "s" * (cfg.engines_here > 1)
    head = f"[{cfg.dp_address}]" if ":" in cfg.dp_address else cfg.dp_address
    return f"node {cfg.node_rank} of {cfg.dp // cfg.engines_here} ({engines}, head {head}:{cfg.dp_rpc_port})"


# --- the connections between the nodes ---


def _endpoint(text: str) -> tuple[str, int]:
    """`0100007F:1F90` of /proc/net/tcp as (address, port)."""
    address, port = text.split(":")
    words = [bytes.fromhex(address[i : i + 8])[::-1] for i in range(0, len(address), 8)]
    found = ipaddress.ip_address(b"".join(words))
    return str(getattr(found, "ipv4_mapped", None) or found), int(port, 16)


def connections(pids: list[int]) -> tuple[dict[tuple, int], set[int]]:
    """The processes' TCP connections to others than these processes, and the ports on which they listen.

    Returns:
        ({(own address, own port, other address, other port): retransmits of its oldest segment}, ports).
    """
    inodes = set()
    for pid in pids:
        with suppress(OSError):  # ended
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
    """Something listens there."""
    try:
        with socket.create_connection((address, port), timeout=timeout_s):
            return True
    except OSError:
        return False


class Peers(threading.Thread):
    """Watches the connections of this node's vLLM to the other nodes, from the first ready on.

    On the head the others connect to it: one that is gone, or does not acknowledge what is sent, is lost. A headless
    node connects to the head and asks, too, whether the head still listens there: an idle connection tells nothing.
    """

    def __init__(self, cfg: EnvConfig, pids):
        super().__init__(daemon=True)
        self.cfg, self.pids = cfg, pids  # pids() = the processes of this vLLM
        self.head = head_address(cfg)
        self.ready = False  # headless: vLLM's engines are connected to the head
        self.baseline: set[tuple] = set()
        self.why = ""  # the others are lost: why
        self.stopped = threading.Event()
        self.start()

    def run(self) -> None:
        good_at = time.monotonic()
        while not self.stopped.wait(LOOK_EVERY_S):
            now = self._now()
            if not self.baseline:
                if is_headless(self.cfg) and now:
                    # The first ones come one after the other: wait until they stay the same.
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
        """Nothing here hangs: what can happen is lost()."""
        return ""

    def lost(self) -> str:
        """Why this node's vLLM must be started again; empty = it need not."""
        if not self.why:
            return ""
        if is_headless(self.cfg):
            return f"{HEAD_LOST}: {self.why}; its engines cannot find back to it"
        return f"a node is lost: {self.why}; calls sent there would wait for ever, and vLLM takes no engine back"

    def watch(self, now: dict | None = None) -> None:
        """From now on, what is connected must stay so."""
        self.baseline = set(self._now() if now is None else now)

    def _now(self) -> dict[tuple, int]:
        """Connections between engines and API of different nodes; the handshake's and HTTP's are neither."""
        found, ports = connections(self.pids())
        if is_headless(self.cfg):
            return {key: n for key, n in found.items() if key[2] == self.head and key[3] != self.cfg.dp_rpc_port}
        ports -= {self.cfg.dp_rpc_port, self.cfg.port}
        return {key: n for key, n in found.items() if key[1] in ports}

    def _wrong(self, now: dict[tuple, int]) -> str:
        """What is wrong with the connections; empty = nothing."""
        for address in sorted({key[2] for key in self.baseline}):
            here = [key for key in now if key[2] == address]
            if len(here) < sum(key[2] == address for key in self.baseline):
                return f"connections to {address} are gone"
            if max(now[key] for key in here) >= MOST_RETRANSMITS:
                return f"{address} does not answer"
        if is_headless(self.cfg) and not accepts(*min(key[2:] for key in self.baseline)):
            return f"the head {self.head} does not listen any more"
        return ""

"""vLLM's data parallel over several hosts: which node this is, and which arguments vLLM needs for it.

Node 0 is the head: API, load balancing and its own engines. The other nodes are headless: engines only, no HTTP.
vLLM does not notice a lost node, and calls sent there hang permanently. A headless node does not notice that the head
was restarted, and an engine cannot join a running head again. Therefore each supervisor watches the TCP connections
between the nodes in /proc/net/tcp, and restarts its own vLLM when they are gone. docs/multi_node.md has measurements.

Source: vllm/v1/engine/utils.py (wait_for_engine_startup), vllm/entrypoints/cli/serve.py (run_headless), vLLM 0.32.0.
"""

import ipaddress
import socket
from contextlib import suppress

from rerank_kit.settings import ConfigError, EnvConfig


def is_headless(cfg: EnvConfig) -> bool:
    """Whether this node has engines only."""
    return cfg.node_rank > 0


def has_other_nodes(cfg: EnvConfig) -> bool:
    """Whether some of the engines are on other hosts."""
    return cfg.dp_address is not None and cfg.engines_here < cfg.dp


def check_nodes(cfg: EnvConfig) -> None:
    """Raise ConfigError if the node settings contradict each other."""
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
            f"DP={cfg.dp} copies with DP_LOCAL={cfg.dp_local} on each host do not make two or more equal hosts: DP "
            "must be a multiple of DP_LOCAL, at least twice DP_LOCAL; on one host unset DP_ADDRESS and DP_LOCAL"
        )
    if cfg.node_rank >= nodes:
        raise ConfigError(
            f"NODE_RANK={cfg.node_rank}, but DP={cfg.dp} copies, {cfg.dp_local} on each host, make {nodes} hosts: "
            f"allowed is 0 (the head) to {nodes - 1}"
        )
    if (cfg.engines_per_gpu or 1) > 1:
        raise ConfigError(
            f"ENGINES_PER_GPU={cfg.engines_per_gpu} works on one host only: unset it, or run a service on each host"
        )
    if is_headless(cfg) and cfg.api_server_count:
        raise ConfigError(
            f"API_SERVER_COUNT={cfg.api_server_count}: node {cfg.node_rank} has no API; unset it here, set it on node 0"
        )
    address = ipaddress.ip_address(head_address(cfg))
    if address.is_global and not cfg.allow_no_key:
        raise ConfigError(
            f"DP_ADDRESS={cfg.dp_address} is a public address, and vLLM's connections between nodes have neither key "
            "nor encryption: use a private network of the nodes (or ALLOW_NO_KEY=1 if a firewall keeps strangers out)"
        )


def head_address(cfg: EnvConfig) -> str:
    """DP_ADDRESS as an IP address, because vLLM cannot listen on a name."""
    try:
        return str(socket.getaddrinfo(cfg.dp_address, cfg.dp_rpc_port, type=socket.SOCK_STREAM)[0][4][0])
    except OSError as exc:
        raise ConfigError(f"DP_ADDRESS={cfg.dp_address!r} is not an address: {exc.strerror}") from exc


def check_rpc_port(cfg: EnvConfig) -> None:
    """Raise ConfigError if the head cannot listen for the other nodes."""
    address = head_address(cfg)
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, cfg.dp_rpc_port))
        except OSError as exc:
            raise ConfigError(
                f"DP_ADDRESS={cfg.dp_address} DP_RPC_PORT={cfg.dp_rpc_port} cannot be bound ({exc.strerror}): on node "
                "0 DP_ADDRESS must be the address at which the other nodes reach this host, and the port must be free"
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
    """Environment of `vllm serve` for this node: this host's address in the network of the nodes."""
    if not has_other_nodes(cfg):
        return {}
    with suppress(OSError):
        head = head_address(cfg)
        with socket.socket(socket.AF_INET6 if ":" in head else socket.AF_INET, socket.SOCK_DGRAM) as one:
            one.connect((head, cfg.dp_rpc_port))  # sends nothing; the kernel chooses the route
            return {"VLLM_HOST_IP": one.getsockname()[0]}
    return {}


def describe_node(cfg: EnvConfig) -> str:
    """`node 1 of 2 (1 engine, head 10.0.0.1:29550)`."""
    engines = f"{cfg.engines_here} engine" + "s" * (cfg.engines_here > 1)
    head = f"[{cfg.dp_address}]" if ":" in (cfg.dp_address or "") else cfg.dp_address
    return f"node {cfg.node_rank} of {cfg.dp // cfg.engines_here} ({engines}, head {head}:{cfg.dp_rpc_port})"

"""Checks before a start whether the service may listen at its address: missing key, TLS files, a taken port."""

import errno
import ipaddress
import os
import socket
import ssl
from contextlib import suppress
from pathlib import Path

from rerank_kit.settings import ConfigError, EnvConfig, check_host, passed_on_env, setting_path, source_of


def check_network(cfg: EnvConfig) -> None:
    """Raise ConfigError if strangers could use the service, or if the TLS files cannot be read."""
    check_host(cfg)
    try:
        own = ipaddress.ip_address(cfg.host).is_loopback
    except ValueError:
        own = cfg.host == "localhost"
    if not own and not (cfg.api_key and cfg.guard) and not cfg.allow_no_key:
        lacks = "there is no API_KEY" if not cfg.api_key else "with GUARD=0 vLLM asks for the key on /v1 paths only"
        raise ConfigError(
            f"HOST={cfg.host} ({source_of(cfg, 'HOST')}) opens the service to the network, and {lacks}: set API_KEY or "
            "API_KEY_FILE and GUARD=1, or ALLOW_NO_KEY=1 if the network itself keeps strangers out"
        )
    if not cfg.api_key and {**passed_on_env(), **os.environ}.get("VLLM_API_KEY"):
        raise ConfigError("VLLM_API_KEY is set, but the kit's own calls do not send it: set API_KEY instead")
    if cfg.ssl_certfile or cfg.ssl_keyfile:
        certificate, key = tls_files(cfg)
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key)
        except (OSError, ValueError) as exc:
            files = f"SSL_CERTFILE={cfg.ssl_certfile!r} SSL_KEYFILE={cfg.ssl_keyfile!r}"
            raise ConfigError(f"{files} cannot be used: {getattr(exc, 'strerror', None) or exc}") from exc


def tls_files(cfg: EnvConfig) -> tuple[str, str]:
    """Paths of certificate and key; a relative one starts at the kit's folder. ConfigError if one is not set."""
    if not (cfg.ssl_certfile and cfg.ssl_keyfile):
        raise ConfigError("SSL_CERTFILE and SSL_KEYFILE belong together: set both or neither")
    return str(setting_path("SSL_CERTFILE", cfg.ssl_certfile)), str(setting_path("SSL_KEYFILE", cfg.ssl_keyfile))


def check_address(cfg: EnvConfig) -> None:
    """Raise ConfigError if HOST is no address of this host. Its port may be taken, by the service that is replaced."""
    family = socket.AF_INET6 if ":" in cfg.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        try:
            probe.bind((cfg.host, 0))
        except OSError as exc:
            raise ConfigError(_not_bound(cfg, exc)) from exc


def check_port(cfg: EnvConfig) -> None:
    """Raise ConfigError if the address cannot be bound: it is in use, not of this host, or not permitted."""
    family = socket.AF_INET6 if ":" in cfg.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        # Connections of an earlier server may linger. With this option only a listening socket makes the bind fail.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((cfg.host, cfg.port))
        except OSError as exc:
            raise ConfigError(_not_bound(cfg, exc)) from exc
    if _is_reserved(cfg, family):
        raise ConfigError(
            f"HOST={cfg.host} PORT={cfg.port} is bound by a process that does not listen yet, as vLLM does while it "
            "loads: stop it, or change PORT"
        )


def _not_bound(cfg: EnvConfig, exc: OSError) -> str:
    """Why HOST:PORT cannot be bound, and what to do about it."""
    source = source_of(cfg, "HOST")
    if isinstance(exc, socket.gaierror) or exc.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
        return f"HOST={cfg.host} ({source}) is no address of this host ({exc.strerror}): set one of its own"
    if exc.errno == errno.EACCES:
        return f"PORT={cfg.port} ({source_of(cfg, 'PORT')}) is for root alone: set one of 1024 or more"
    return (
        f"HOST={cfg.host} PORT={cfg.port} cannot be bound ({exc.strerror}): another process may listen there "
        f'(see "ss -ltnp"); stop it, or change PORT'
    )


def _is_reserved(cfg: EnvConfig, family: int) -> bool:
    """Whether another process has bound the port without listening yet. /proc/net and ss do not list such a socket.

    Two loading servers can both bind one port. With several API processes (SO_REUSEPORT) both would then listen, and
    the kernel would distribute the calls over two models.
    """
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        try:
            probe.bind((cfg.host, cfg.port))
        except OSError as exc:
            taken = exc.errno == errno.EADDRINUSE
        else:
            return False
    for name in ("tcp", "tcp6"):  # connections of an earlier server may linger
        with suppress(OSError):
            rows = Path(f"/proc/net/{name}").read_text().splitlines()[1:]
            taken = taken and not any(int(row.split()[1].rpartition(":")[2], 16) == cfg.port for row in rows)
    return taken


def hold_port(cfg: EnvConfig) -> socket.socket:
    """Reserve HOST:PORT among the services of the kit for as long as the returned socket is open.

    vLLM binds its port some seconds after the start, and listens only when it has loaded. An abstract Unix socket name
    belongs to the network namespace, as ports do, and is released when its owner dies in any way.

    Raises:
        ConfigError: another service of the kit loads or serves at this address.
    """
    holder = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        holder.bind(f"\0rerank-kit:{cfg.host}:{cfg.port}")
    except OSError as exc:
        holder.close()
        raise ConfigError(
            f"HOST={cfg.host} PORT={cfg.port} is taken: another service of the kit, with another LOG_DIR or in the "
            "foreground, loads or serves there; stop it, or change PORT"
        ) from exc
    return holder

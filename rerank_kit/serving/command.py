"""Builds the `vllm serve` command of a plan, to explain, check or start it.

start_rerank.sh calls `python -m rerank_kit.serving.command cfg | vllm | exec`.
"""

import json
import os
import random
import re
import shlex
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from rerank_kit.engine.extra_args import SECRET_FLAG
from rerank_kit.engine.machine import GIB, NoVllm, untested, vllm_command, vllm_version
from rerank_kit.engine.nodes import check_rpc_port, has_other_nodes, is_headless, node_flags
from rerank_kit.engine.plan import Plan, plan_service
from rerank_kit.models.served_folder import make_adapted
from rerank_kit.models.settled import Settled
from rerank_kit.processes import end_with_parent
from rerank_kit.serving.check import expectation
from rerank_kit.serving.network import check_network, check_port, hold_port, tls_files
from rerank_kit.settings import FIELDS, KIT_DIR, ConfigError, EnvConfig, get_config, passed_on_env

# Under which name the server finds a secret.
SECRET_VARIABLES = {"API_KEY": "VLLM_API_KEY", "RESULT_CACHE_URL": "GUARD_RESULT_CACHE_URL"}


def serve_args(plan: Plan, group: int = 0, rpc_port: int | str = "FREE_PORT") -> list[str]:
    """Arguments of `vllm serve`, without secrets.

    Args:
        group: 0 = API processes and the first engine of each GPU; 1, 2 ... = the next engine of each GPU, without an
            API. vLLM takes such a group for a headless node of a data parallel service, here on the same host.
        rpc_port: loopback port at which the groups connect to each other.
    """
    cfg, engine = plan.cfg, dict(plan.engine)
    args = ["serve", engine.pop("model")]
    if group == 0 and not is_headless(cfg):
        args += ["--served-model-name", cfg.served_model_name, "--host", cfg.host, "--port", str(cfg.port)]
    for key, value in engine.items():
        flag = "--" + key.replace("_", "-")
        if value is True:
            args.append(flag)
        elif isinstance(value, list):
            args += [flag, *value]
        else:
            args += [flag, json.dumps(value) if isinstance(value, dict) else str(value)]
    if plan.engines > 1:
        args += ["--data-parallel-size-local", str(cfg.dp), "--data-parallel-address", "127.0.0.1"]
        args += ["--data-parallel-rpc-port", str(rpc_port)]
    args += node_flags(cfg)
    if group:
        args += ["--headless", "--data-parallel-start-rank", str(cfg.dp * group)]
    elif not is_headless(cfg):
        args += _api_args(plan)
    args += ["--shutdown-timeout", str(cfg.drain_s)]
    try:
        return args + shlex.split(cfg.extra_args)
    except ValueError as exc:
        raise ConfigError(f"EXTRA_ARGS={_hidden(cfg.extra_args)!r} is not valid shell syntax: {exc}") from None


def _api_args(plan: Plan) -> list[str]:
    """Arguments for the API processes, in addition to the engine's."""
    cfg, args = plan.cfg, ["--disable-uvicorn-access-log"]
    if plan.template is not None:
        args += ["--chat-template", str(_template_file(plan))]
    if plan.api_servers:
        args += ["--api-server-count", str(plan.api_servers)]
    if cfg.ssl_certfile:
        certificate, key = tls_files(cfg)
        args += ["--ssl-certfile", certificate, "--ssl-keyfile", key]
    if cfg.guard:
        args += ["--middleware", "rerank_kit.guard.Guard"]
    return args


def shown_args(plan: Plan, group: int = 0) -> list[str]:
    """serve_args() for display: keys and tokens from EXTRA_ARGS are hidden."""
    return _hidden("\0".join(serve_args(plan, group))).split("\0")


def shown_env(env: dict[str, str]) -> dict[str, str]:
    """The variables that change what `vllm serve` does, without secrets."""
    shown = re.compile(r"(VLLM|NCCL|OMP|GUARD)_|CUDA_VISIBLE")
    return {k: v for k, v in env.items() if shown.match(k) and k not in SECRET_VARIABLES.values()}


def _hidden(text: str) -> str:
    """The text with the values of key and token arguments replaced by ***."""
    more = r"(?:[\s\0]+(?!-)[^\s\0]+)*"  # --api-key takes several values
    return re.sub(rf"({SECRET_FLAG}['\"]?[=\s\0]+)[^\s\0]+{more}", r"\1***", text)


def _template_file(plan: Plan) -> Path:
    """The profile's template; if INSTRUCTION or the checkpoint's own files change it, a file in LOG_DIR."""
    if plan.profile.template and plan.template == plan.profile.template_text():
        return KIT_DIR / "profiles" / plan.profile.template
    return plan.cfg.log_path / f"template-{plan.cfg.port}.jinja"


def explain(plan: Plan) -> str:
    """The output of `start_rerank.sh cfg`: every setting, every choice, the exact command."""
    cfg = plan.cfg
    lines = ["# settings (argument > environment > .env > default)"]
    for key, item in FIELDS.items():
        value = getattr(cfg, item.name)
        if item.metadata["secret"] and value is not None:
            value = "***"
        lines.append(f"{key}={'' if value is None else _hidden(str(value))}")
    gpus = "; ".join(plan.machine.gpus) or "none"
    lines += [
        "# machine",
        f"vllm={plan.machine.vllm_version} gpus={gpus} cores={len(plan.machine.cores)} "
        f"free_memory_gib={plan.machine.memory_bytes / GIB:.1f}"
        + (f" cpu_limit={plan.machine.cpu_quota:g}" if plan.machine.cpu_quota else ""),
        "# model",
        f"path={plan.checkpoint.path}",
        f"profile={plan.profile.name}: {plan.profile.title}",
        f"score={plan.profile.score}",
        "# why",
    ]
    for key, reason in plan.why.items():
        lines.append(f"{key}: {plan.engine[key]} ({reason})" if key in plan.engine else f"{key}: {reason}")
    lines.append("# command")
    env = [f"{k}={shlex.quote(v)}" for k, v in plan.env.items()]
    env += [f"{name}=***" for key, name in SECRET_VARIABLES.items() if getattr(cfg, key.lower())]
    try:
        program = shlex.quote(vllm_command())
    except NoVllm:
        program = "vllm"
    env = [f"PYTHONPATH={shlex.quote(str(KIT_DIR))}", *env]  # so that it runs from any folder
    commands = [" ".join([*env, program, shlex.join(shown_args(plan, group))]) for group in range(plan.engines)]
    return "\n".join([*lines, *commands])


def server_commands(plan: Plan) -> tuple[list[list[str]], dict[str, str]]:
    """(argv of each `vllm serve`, their environment). The first is the service, the others are engines beside it.

    Secrets are in the environment, because everybody can read the process list.
    """
    make_files(plan)
    rpc_port = _free_port() if plan.engines > 1 else 0
    commands = [[vllm_command(), *serve_args(plan, group, rpc_port)] for group in range(plan.engines)]
    return commands, server_env(plan)


def server_env(plan: Plan) -> dict[str, str]:
    """The environment of `vllm serve`."""
    env = {**os.environ, **passed_on_env(), **plan.env}
    if plan.cfg.cuda_visible_devices is not None:
        env["CUDA_VISIBLE_DEVICES"] = plan.cfg.cuda_visible_devices
    for key in (*SECRET_VARIABLES, "API_KEY_FILE"):
        env.pop(key, None)
    for key, name in SECRET_VARIABLES.items():
        if value := getattr(plan.cfg, key.lower()):
            env[name] = value
    if plan.cfg.guard and plan.cfg.startup_check and not is_headless(plan.cfg):
        expected = expectation(plan.checkpoint, Settled(plan.profile, plan.template))
        if _fits(plan, max(expected["tokens"] or [0])):
            env["GUARD_CHECK"] = json.dumps(expected)
    return with_kit_on_path(env)


def _fits(plan: Plan, n_tokens: int) -> bool:
    """Whether the short pairs of the start-up check, n_tokens long at most, fit into the model.

    A checkpoint may say so short a limit itself; then every pair is cut, as its own library cuts, and the guard only
    waits for a first score.

    Raises:
        ConfigError: they do not fit, and a setting is the reason.
    """
    most, cfg = plan.engine["max_model_len"], plan.cfg
    if n_tokens <= most or plan.profile.convert == "embed":
        return True
    if cfg.max_model_len is None and not cfg.instruction:
        return False
    limit = f"MAX_MODEL_LEN={most}" if cfg.max_model_len else f"the model's limit of {most} tokens"
    raise ConfigError(
        f"{limit} has no room for a short pair: with this prompt those of the start-up check have "
        f"up to {n_tokens} tokens. Raise MAX_MODEL_LEN (unset: the model's own limit), or shorten INSTRUCTION"
    )


def make_files(plan: Plan) -> None:
    """The files in LOG_DIR that the command names: the adapted checkpoint, a template that is no profile's file."""
    make_joined(plan)
    make_adapted(plan.checkpoint, plan.profile, Path(plan.engine["model"]))
    if plan.template is not None and _template_file(plan).parent == plan.cfg.log_path:
        plan.cfg.log_path.mkdir(parents=True, exist_ok=True)
        _write_once(_template_file(plan), plan.template)


def make_joined(plan: Plan) -> None:
    """A folder whose weights are a joined copy, if it is missing. A child process makes it.

    The copy imports torch and may have gigabytes; the supervisor holds nothing but the standard library.
    """
    folder = Path(plan.engine["model"])
    if plan.profile.joined_head and not folder.is_dir():
        _in_child(lambda: make_adapted(plan.checkpoint, plan.profile, folder))


def _in_child(work: Callable[[], None]) -> None:
    """Do work() in a child process and wait for its end.

    Raises:
        ConfigError: it failed; with the child's own words.
    """
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.close(read_end)
            signal.set_wakeup_fd(-1)
            # By an exception, which removes half a copy.
            signal.signal(signal.SIGTERM, lambda *_: sys.exit("TERM came while encoder and head were joined"))
            end_with_parent()
            work()
            code = 0
        except BaseException as exc:
            text = str(exc) if isinstance(exc, ConfigError | SystemExit) else f"{type(exc).__name__}: {exc}"
            os.write(write_end, text.encode()[:4096])
        finally:
            os._exit(code)
    os.close(write_end)
    with open(read_end, "rb") as said:
        text = said.read().decode("utf-8", "replace")
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if status:
        raise ConfigError(text or f"the process that joins encoder and head ended with code {status}; is memory free?")


def _write_once(path: Path, text: str) -> None:
    """The file with this text, by rename: a server that starts beside never reads half of it."""
    if path.is_file() and path.read_text("utf-8") == text:
        return
    part = path.with_suffix(f".{os.getpid()}.part")
    try:
        part.write_text(text, "utf-8")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def with_kit_on_path(env: dict[str, str]) -> dict[str, str]:
    """The environment with the kit's folder first on PYTHONPATH, from where vLLM imports the guard."""
    others = [folder for folder in env.get("PYTHONPATH", "").split(os.pathsep) if folder not in ("", str(KIT_DIR))]
    return {**env, "PYTHONPATH": os.pathsep.join([str(KIT_DIR), *others])}


def _free_port() -> int:
    """A loopback port that is free now and stays free until vLLM binds it, up to a minute later.

    Chosen below the ephemeral range, so that no outgoing connection takes it before vLLM binds.
    """
    for _ in range(100):
        port = random.SystemRandom().randrange(20000, 32000)
        with socket.socket() as found, suppress(OSError):
            found.bind(("127.0.0.1", port))
            return port
    raise ConfigError("no port between 20000 and 32000 on 127.0.0.1 is free for the engines of this service")


def become_server(plan: Plan) -> None:
    """Replace this process by `vllm serve`, or by a supervisor if the service has several servers or hosts."""
    commands, env = server_commands(plan)
    if len(commands) > 1 or has_other_nodes(plan.cfg):
        supervisor = [sys.executable, "-P", "-m", "rerank_kit.serving.supervisor", "foreground"]
        os.execve(sys.executable, supervisor, with_kit_on_path(dict(os.environ)))
    holder = hold_port(plan.cfg)
    holder.set_inheritable(True)
    if address := os.environ.get("NOTIFY_SOCKET"):  # "run" is systemd's service: a hang is a reason to restart it
        env["GUARD_NOTIFY_SOCKET"] = address
    os.execve(commands[0][0], commands[0], env)


def startable_plan(cfg: EnvConfig) -> Plan:
    """The plan of a service that can be started here and now.

    Raises:
        ConfigError: why it cannot.
    """
    plan = plan_service(cfg)
    vllm_command()
    if line := untested(plan.machine.vllm_version):
        print(f"[WARN] {line}", file=sys.stderr)
    serve_args(plan)
    if not is_headless(cfg):  # a headless node listens on no port
        check_network(cfg)
        hold_port(cfg).close()
        check_port(cfg)
        if has_other_nodes(cfg):
            check_rpc_port(cfg)
    return plan


def refused(exc: ConfigError | OSError) -> int:
    """Say in one line why these settings start no service. Returns the exit code."""
    # OSError: another user owns the folder, the weights or LOG_DIR.
    text = exc if isinstance(exc, ConfigError) else f"{exc.filename}: {exc.strerror}"
    print(f"ConfigError: {text}", file=sys.stderr)
    return 5 if isinstance(exc, NoVllm) else 6


def main(argv: list[str]) -> int:
    """`cfg` explains the plan, `vllm` prints the release, `exec` checks the settings and becomes the server."""
    try:
        if argv == ["vllm"]:
            print(vllm_version())
        elif argv == ["cfg"]:
            plan = plan_service(get_config())
            make_files(plan)  # so that the printed command can be pasted
            print(explain(plan))
        elif argv == ["exec"]:
            become_server(startable_plan(get_config()))
        else:
            print("usage: python -m rerank_kit.serving.command cfg | vllm | exec", file=sys.stderr)
            return 2
    except (ConfigError, OSError) as exc:
        return refused(exc)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

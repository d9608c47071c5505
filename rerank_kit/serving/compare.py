"""The running service beside the settings: what differs, and whether a restart could succeed.

`python -m rerank_kit.serving.compare running | next`; start_rerank.sh asks before it says "already running", and before
it stops a service.
"""

import sys
from dataclasses import replace

from rerank_kit.engine.machine import NoVllm, probe_machine, vllm_command
from rerank_kit.engine.nodes import is_headless
from rerank_kit.engine.plan import Plan, plan_service
from rerank_kit.serving.command import serve_args, shown_args, shown_env
from rerank_kit.serving.network import check_network
from rerank_kit.serving.status import known_state, memory_of_service
from rerank_kit.settings import ConfigError, EnvConfig, get_config

MOST_LINES = 8  # differences that are listed one by one


def plan_beside(cfg: EnvConfig) -> Plan:
    """The plan of the next start, made while the service that it would replace still has its memory."""
    machine = probe_machine()
    return plan_service(cfg, machine=replace(machine, memory_bytes=machine.memory_bytes + memory_of_service(cfg)))


def flags_of(command: list[str]) -> dict[str, str]:
    """{flag: value} of `serve MODEL --flag value ...`; several values are joined."""
    out: dict[str, list[str]] = {}
    values: list[str] = []
    for word in command[2:]:
        if word.startswith("--"):
            name, _, value = word.partition("=")
            values = out.setdefault(name, [])
            values += [value] if value else []
        else:
            values.append(word)
    return {flag: " ".join(found) for flag, found in out.items()}


def differences(plan: Plan, known: dict) -> list[str]:
    """What the running service (the supervisor's state) has otherwise than the plan, one line each; empty = nothing."""
    if not known.get("command"):
        return []
    runs, wanted = known.get("model"), str(plan.checkpoint.path)
    if runs != wanted:
        return [f"it runs {runs}, the settings say {wanted}"]
    old, new = flags_of(known["command"]), flags_of(shown_args(plan))
    env = {key: value for key, value in shown_env(plan.env).items() if key.startswith("GUARD_")}
    for key, value in known.get("env", {}).items():
        if key.startswith("GUARD_"):
            old[key] = value
    new |= env
    # A setting that the user's environment gives the server is not in the plan.
    changed = [key for key in {**old, **new} if old.get(key) != new.get(key) and key != "GUARD_VERSION"]
    lines = [
        f"{key}: it runs {old.get(key, 'without')!r}, the settings say {new.get(key, 'without')!r}" for key in changed
    ]
    if not lines and old.get("GUARD_VERSION") != new.get("GUARD_VERSION"):
        return [f"the files of {wanted}, its template or INSTRUCTION have changed since it was started"]
    more = len(lines) - MOST_LINES
    return [*lines[:MOST_LINES], *([f"and {more} more"] if more > 0 else [])]


def main(argv: list[str]) -> int:
    """`running`: 1 where the service has other settings. `next`: 5 or 6 where a restart could not start it."""
    if argv not in (["running"], ["next"]):
        print("usage: python -m rerank_kit.serving.compare running | next", file=sys.stderr)
        return 2
    try:
        cfg = get_config()
        if argv == ["running"] and not cfg.model_path:  # as after `demo`: nothing says what should run
            return 0
        plan = plan_beside(cfg)
        if argv == ["running"]:
            found = differences(plan, known_state(cfg))
            for text in found:
                print(f"[ERR] {text}", file=sys.stderr)
            return 1 if found else 0
        vllm_command()
        serve_args(plan)
        if not is_headless(cfg):
            check_network(cfg)
    except NoVllm as exc:
        print(f"ConfigError: {exc}", file=sys.stderr)
        return 5
    except ConfigError as exc:
        print(f"ConfigError: {exc}", file=sys.stderr)
        return 6
    except OSError as exc:  # a folder, the weights or LOG_DIR belong to somebody else
        print(f"ConfigError: {exc.filename}: {exc.strerror}", file=sys.stderr)
        return 6
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

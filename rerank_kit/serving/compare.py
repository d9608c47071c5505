"""The running service beside the settings: what differs, and whether a restart could succeed.

`python -m rerank_kit.serving.compare running | next`; start_rerank.sh asks before it says "already running", and before
it stops a service.
"""

import hashlib
import os
import sys
from dataclasses import replace

from rerank_kit.engine.machine import probe_machine, vllm_command
from rerank_kit.engine.nodes import is_headless
from rerank_kit.engine.plan import Plan, plan_service
from rerank_kit.models.download import locate
from rerank_kit.serving.command import refused, serve_args, server_env, shown_args, shown_env
from rerank_kit.serving.network import check_address, check_network
from rerank_kit.serving.status import known_state, memory_of_service
from rerank_kit.settings import ConfigError, EnvConfig, get_config, model_setting

MOST_LINES = 8  # differences that are listed one by one
FOLLOWS = ("GUARD_VERSION", "GUARD_CHECK")  # of checkpoint, template and settings
# What the supervisor does itself; all else reaches the server as an argument or a variable. START_TIMEOUT_S is left
# out: one start may be waited for with another one.
SUPERVISED = ("restart", "restart_max", "restart_window_s", "health_timeout_s", "log_max_mib", "log_keep")


def plan_beside(cfg: EnvConfig) -> Plan:
    """The plan of the next start, made while the service that it would replace still has its memory."""
    machine = probe_machine()
    return plan_service(cfg, machine=replace(machine, memory_bytes=machine.memory_bytes + memory_of_service(cfg)))


def supervised_settings(cfg: EnvConfig) -> dict[str, str]:
    """The settings that the supervisor follows, as text."""
    return {name.upper(): str(getattr(cfg, name)) for name in SUPERVISED}


def key_mark(key: str | None, salt: str = "") -> str:
    """SALT:HASH of a secret, by which a later one can be told to be the same; empty without one."""
    salt = salt or os.urandom(8).hex()
    return f"{salt}:{hashlib.pbkdf2_hmac('sha256', key.encode(), salt.encode(), 100_000).hex()}" if key else ""


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


def other_model(cfg: EnvConfig, known: dict) -> list[str]:
    """A line if the running service has another model than the settings; no hub is asked for it."""
    runs = known.get("model")
    if not runs or not cfg.model_path:
        return []
    before = os.environ.get("HF_HUB_OFFLINE")
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        wanted = str(locate(model_setting(cfg.model_path)))
    except ConfigError:  # not on this machine, so it is what runs only if that was started by this name
        wanted = runs if known.get("source") == cfg.model_path else cfg.model_path
    finally:
        if before is None:
            del os.environ["HF_HUB_OFFLINE"]
        else:
            os.environ["HF_HUB_OFFLINE"] = before
    return [f"it runs {runs}, the settings say {wanted}"] if runs != wanted else []


def differences(plan: Plan, known: dict) -> list[str]:
    """What the running service (the supervisor's state) has otherwise than the plan, one line each; empty = nothing.

    What the state of an older kit does not hold is not compared.
    """
    if not known.get("command"):
        return []
    runs, wanted = known.get("model"), str(plan.checkpoint.path)
    if runs != wanted:
        return [f"it runs {runs}, the settings say {wanted}"]
    old, new = flags_of(known["command"]), flags_of(shown_args(plan))
    pairs = [(known.get("env"), shown_env(server_env(plan))), (known.get("settings"), supervised_settings(plan.cfg))]
    for then, now in pairs:
        if then is not None:
            old, new = old | then, new | now
    changed = [key for key in {**old, **new} if old.get(key) != new.get(key) and key not in FOLLOWS]
    changed = [key for key in changed if key.removeprefix("GUARD_") not in set(changed) - {key}]  # one line a setting
    lines = [
        f"{key}: it runs {old.get(key, 'without')!r}, the settings say {new.get(key, 'without')!r}" for key in changed
    ]
    for key, mark, secret in (
        ("API_KEY", known.get("key"), plan.cfg.api_key),
        ("RESULT_CACHE_URL", known.get("cache_url"), plan.cfg.result_cache_url),
    ):
        if mark is not None and mark != key_mark(secret, mark.partition(":")[0]):
            lines.append(f"{key}: {'it runs with another one' if mark and secret else _one_key(mark)}")
    if not lines and old.get("GUARD_VERSION") != new.get("GUARD_VERSION"):
        return [f"the files of {wanted}, its template or INSTRUCTION have changed since it was started"]
    more = len(lines) - MOST_LINES
    return [*lines[:MOST_LINES], *([f"and {more} more"] if more > 0 else [])]


def _one_key(mark: str) -> str:
    return "it runs with one, the settings have none" if mark else "it runs without one, the settings have one"


def compare_running(cfg: EnvConfig) -> int:
    """1 where the running service has another model or other settings. Nothing is downloaded for it."""
    if not cfg.model_path:  # as after `demo`: nothing says what should run
        return 0
    known = known_state(cfg)
    found = other_model(cfg, known)
    if not found:
        try:
            found = differences(plan_beside(replace(cfg, model_path=known.get("model") or cfg.model_path)), known)
        except ConfigError as exc:  # the service that runs is none the worse for it
            print(f"[WARN] it runs, but the settings could not start it again: {exc}", file=sys.stderr)
    for text in found:
        print(f"[ERR] {text}", file=sys.stderr)
    return 1 if found else 0


def main(argv: list[str]) -> int:
    """`running`: 1 where the service has other settings. `next`: 5 or 6 where a restart could not start it."""
    if argv not in (["running"], ["next"]):
        print("usage: python -m rerank_kit.serving.compare running | next", file=sys.stderr)
        return 2
    try:
        cfg = get_config()
        if argv == ["running"]:
            return compare_running(cfg)
        plan = plan_beside(cfg)
        vllm_command()
        serve_args(plan)
        if not is_headless(cfg):
            check_network(cfg)
            check_address(cfg)
    except (ConfigError, OSError) as exc:
        return refused(exc)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

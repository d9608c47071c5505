"""Starts and stops the service of this host for --tune, and finds out who started it and who uses it."""

import asyncio
import contextlib
import fcntl
import json
import os
import re
import shlex
import signal
from collections.abc import Iterator

from rerank_kit.processes import born
from rerank_kit.serving.command import shown_env
from rerank_kit.serving.health import PROBE_PAIRS, listens, metrics, state_file
from rerank_kit.settings import KIT_DIR, EnvConfig, passed_on_env

LOOK_S = 5.0  # how long other traffic is looked for
COUNTERS = ("rerank_guard_pairs_total", "vllm:request_queue_time_seconds_count")  # pairs; the first that is there


class Trouble(Exception):
    """The search cannot begin or go on; the text says why and what to do."""


def read_cfg(text: str) -> dict:
    """What `start_rerank.sh cfg` prints: {words, env} of the command, engines on a GPU, {vllm, gpus, cores}."""
    # Several engines on a GPU: a command each, the first with the API.
    commands = text.strip().rpartition("\n# command\n")[2].splitlines()
    parts = shlex.split(commands[0])
    at = parts.index("serve")
    found = re.search(r"^vllm=(\S+) gpus=(.*) cores=(\d+) ", text, re.M)
    assert found is not None, "start_rerank.sh cfg prints this line"
    env = dict(part.partition("=")[::2] for part in parts[: at - 1])
    gpus = 0 if found[2] == "none" else found[2].count(";") + 1
    machine = {"vllm": found[1], "gpus": gpus, "cores": int(found[3])}
    return {"words": parts[at:], "env": env, "engines": len(commands), **machine}


class Service:
    """Starts and stops the service of this configuration through start_rerank.sh, and knows who started it."""

    def __init__(self, cfg: EnvConfig):
        self.cfg = cfg

    async def run(self, *action: str, settings: dict[str, str] | None = None) -> tuple[int, str, str]:
        """(exit code, stdout, stderr) of the script. A cancelled call ends the script with all it started."""
        command = ["sh", str(KIT_DIR / "start_rerank.sh"), *action]
        env = {**os.environ, **(settings or {})}
        # A group of its own: Ctrl-C reaches this program alone, which then ends the script in order.
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(
            *command, env=env, start_new_session=True, stdout=pipe, stderr=pipe
        )
        try:
            out, err = await process.communicate()
        except asyncio.CancelledError:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            await process.wait()
            raise
        assert process.returncode is not None  # communicate() waits for the end
        return process.returncode, out.decode(errors="replace"), err.decode(errors="replace")

    async def shown(self) -> dict:
        """read_cfg() of the present configuration. Raises Trouble."""
        code, out, err = await self.run("cfg")
        if code:
            raise Trouble(f"start_rerank.sh cfg failed: {err.strip()}")
        return read_cfg(out)

    async def state(self) -> dict:
        """serving.status.gather()."""
        _, out, err = await self.run("status", "--json")
        try:
            return json.loads(out)
        except ValueError:
            raise Trouble(f"start_rerank.sh status failed: {err.strip() or out.strip()}") from None

    async def start(self, settings: dict[str, str]) -> str | None:
        """Restart with `settings` over the present configuration. None = ready, else why not; nothing runs then."""
        code, out, err = await self.run("restart", settings=settings)
        if code == 0:
            return None
        await self.run("stop")  # one that still loads at the deadline
        said = [line for line in (err + out).splitlines() if line.startswith(("[ERR]", "ConfigError", "[WARN] still"))]
        return said[0].removeprefix("[ERR] ") if said else f"exit code {code}"

    async def stop(self) -> None:
        await self.run("stop")

    async def leader(self) -> list[int | None] | None:
        """[PID, start time] of the supervisor, which name it for ever."""
        pid = (await self.state())["pid"]
        return [pid, born(pid)] if pid else None

    def differs(self, shown: dict) -> str:
        """How the running server differs from what the script would start now; empty = not at all."""
        try:
            known = json.loads(state_file(self.cfg).read_text("utf-8"))
            command, env = known["command"], known["env"]
        except (OSError, ValueError, LookupError):
            return "its supervisor does not report how it was started"
        wanted = shown_env({**os.environ, **passed_on_env(), **shown["env"]})
        if self.cfg.cuda_visible_devices is not None:
            wanted["CUDA_VISIBLE_DEVICES"] = self.cfg.cuda_visible_devices
        then, now = (set(words) for words in (command, shown["words"]))
        mixed = [" ".join(w for w in command if w not in now), " ".join(w for w in shown["words"] if w not in then)]
        out = [f"{mixed[0]} -> {mixed[1]}"] if command != shown["words"] else []
        out += [f"{k}={env.get(k)} -> {wanted.get(k)}" for k in {*env, *wanted} if env.get(k) != wanted.get(k)]
        return ", ".join(out)


@contextlib.contextmanager
def only_search(cfg: EnvConfig) -> Iterator[None]:
    """Hold the lock of the searches of this port. Raises Trouble if another --tune has it, dead ones have not."""
    path = cfg.log_path / f"tune-{cfg.port}.lock"
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with path.open("a+") as lock:  # not inherited by the service that the search starts
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise Trouble(
                f"another --tune of port {cfg.port} is under way (PID {lock.read().strip() or 'unknown'}): it restarts "
                "this service too. Wait for its end, or stop it"
            ) from None
        lock.truncate(0)
        print(os.getpid(), file=lock, flush=True)
        yield


async def look_at(service: Service, shown: dict, mine: list[int] | None) -> bool:
    """Was the service running before? Raises Trouble if it may not be restarted.

    Args:
        mine: [PID, start time] that an interrupted search left running; it may have any settings.
    """
    now = await service.state()
    if now["state"] == "not running" or (now["state"] == "dead" and mine):
        if listens(service.cfg):
            raise Trouble(f"port {service.cfg.port} is served by something that start_rerank.sh did not start")
        return False
    if mine and now["pid"] == mine[0] and born(mine[0]) == mine[1]:
        return True
    if now["state"] != "ready" or not now["supervised"]:
        raise Trouble(f'the service is not ready ({now["state"]}): see "sh start_rerank.sh status"')
    if mixed := service.differs(shown):
        raise Trouble(
            f"the running service has other settings than .env and this environment give: {mixed}. It could not be put "
            'back as it is: run "sh start_rerank.sh restart" first, or give the same settings'
        )
    return True


async def pairs_served(cfg: EnvConfig) -> float | None:
    """Pairs that the server has answered since it started; None = it does not tell."""
    now = await asyncio.to_thread(metrics, cfg)
    return next((now[name] for name in COUNTERS if name in now), None)


async def refuse_traffic(cfg: EnvConfig, engines: int = 1) -> None:
    """Raise Trouble where others use the service."""
    own = 1 if engines == 1 else PROBE_PAIRS * engines  # pairs of the supervisor's probe, which comes now and then
    before, busy = await pairs_served(cfg), 0.0
    for _ in range(10):
        now = await asyncio.to_thread(metrics, cfg)
        busy = max(busy, sum(now.get(f"vllm:num_requests_{what}", 0.0) for what in ("running", "waiting")))
        await asyncio.sleep(LOOK_S / 10)
    came = ((await pairs_served(cfg)) or 0.0) - (before or 0.0)
    if busy > own or came > max(2, own):
        seen = f"{busy:.0f} pairs in the engine at once, {came:.0f} answered in {LOOK_S:g} s"
        raise Trouble(f"others use the service ({seen}): a search would restart it; redirect them first")

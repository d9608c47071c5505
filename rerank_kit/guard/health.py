"""Whether this service scores: its first scores after a start, and engines that no longer answer.

The guard asks for scores itself, in its own process and past its own limits. `/ready` is 503 until a first pair was
scored and, with GUARD_CHECK, the scores of a few known pairs are what the model's family gives. `/ready` and `/live`
are 503 while pairs wait for an engine that gave no scores for GUARD_HEALTH_TIMEOUT_S, and while another API process has
given no sign of life for that time. docs/guard.md describes both.

Source: vllm/v1/engine/async_llm.py (output_handler) and core_client.py (reqs_in_flight) of vLLM 0.32.0.
"""

import asyncio
import json
import logging
import math
import os
import socket
from collections.abc import Callable
from typing import Any

from rerank_kit.guard.counts import Counts
from rerank_kit.models.known_pairs import PAIRS, judge

AGAIN_S = 2.0  # between two tries of the first scores
LOOK_S = 5.0  # between two looks at the engines, at most
NOT_YET = "no pair was scored yet"

logger = logging.getLogger("vllm.rerank_guard")  # below "vllm": its handler and level


class NotScored(Exception):
    """vLLM's answer to the guard's own call has no score."""


class Health:
    """Asked by the probes: not_ready and hang. Both are empty without vLLM's app, as in a test of the guard."""

    def __init__(self, counts: Counts, timeout_s: float, prepare: Callable):
        self.counts, self.timeout_s, self.prepare = counts, timeout_s, prepare
        try:
            self.expected = json.loads(os.environ.get("GUARD_CHECK") or "null")
        except ValueError as exc:
            raise ValueError(f"GUARD_CHECK is not JSON: {exc}") from None
        key = os.environ.get("VLLM_API_KEY")
        self.headers = [(b"content-type", b"application/json"), (b"host", b"guard")]
        self.headers += [(b"authorization", b"Bearer " + key.encode())] if key else []
        self.fault = ""
        self.core: Any = None  # vLLM's connection to its engines
        self.exact = False  # it says which engine has which pair
        self.probe: asyncio.Task | None = None
        self.tasks: list[asyncio.Task] = []
        self.told = self.ending = False
        self.mute_s = [0.0, 0.0]  # silence of another API process at the last two looks

    def begin(self, app: Any, inner: Callable) -> None:
        """Begin to watch. app: vLLM's, for the scope of the guard's own calls; inner: what the guard wraps."""
        self.app, self.inner = app, inner
        self.fault = NOT_YET
        self._note_scores(getattr(app.state, "engine_client", None))
        self.tasks.append(asyncio.create_task(self._first_scores()))
        if self.timeout_s:
            self.tasks.append(asyncio.create_task(self._look_at_engines()))

    def end(self) -> None:
        """Ask for no more scores: the service stops."""
        self.ending = True
        self.counts.note_alive(False)
        for task in filter(None, (*self.tasks[:1], self.probe)):
            task.cancel()

    @property
    def not_ready(self) -> str:
        """Why the service is not ready, as far as its first scores tell; empty = it is."""
        others = not self.tasks or self.fault or self.counts.others_ready()
        return self.fault if others else "another API process has scored no pair yet"

    @property
    def hang(self) -> str:
        """One line about the engines or the API process that hang; empty = none does."""
        if not self.timeout_s:
            return ""
        # Two looks, because after a pause of the whole machine one process runs before the other.
        if (mute_s := min(self.mute_s)) > self.timeout_s:
            return f"an API process hangs: it gave no sign of life for {mute_s:.0f} s"
        hung = {engine: s for engine, s in self.counts.silent_s().items() if s > self.timeout_s}
        if not hung:
            return ""
        name = "the engine" if self.counts.n_engines == 1 else f"engine {', '.join(map(str, hung))}"
        return f"{name} hangs: pairs wait, and none was scored for {max(hung.values()):.0f} s"

    # ---- the first scores ----

    async def _first_scores(self) -> None:
        while self.fault:
            try:
                fault = await self._fault()
            except NotScored as exc:
                fault = f"the first pair was not scored: {exc}"
            except Exception as exc:
                fault = f"the first pair was not scored: {type(exc).__name__}: {exc}"
            if fault and fault != self.fault:
                logger.error("guard: not ready: %s", fault)
            self.fault = fault
            if fault:
                await asyncio.sleep(AGAIN_S)
        self.counts.note_ready()
        logger.info("guard: ready: the first pairs were scored%s", ", as they should be" if self.expected else "")

    async def _fault(self) -> str:
        """What is wrong with the scores of a few pairs; empty = nothing."""
        await self.prepare({"app": self.app})  # else the first call of a user loads the tokenizer
        pairs = PAIRS if self.expected else [("ping", "pong")]
        # One pair alone first: of many processes, each would compile its kernels for all of them.
        answers = [await self.score(*pairs[0])]
        answers += await asyncio.gather(*(self.score(*pair) for pair in pairs[1:]))
        if not self.expected:
            return "" if isinstance(answers[0][0], float) and math.isfinite(answers[0][0]) else "a score is not finite"
        faults = [fault for _, fault, _ in judge(self.expected, answers) if fault]
        return f"the scores cannot be right: {'; '.join(faults)}" if faults else ""

    async def score(self, query: str, document: str) -> tuple[Any, int]:
        """(score, prompt tokens) of one pair. NotScored names vLLM's answer without one."""
        body = json.dumps({"text_1": query, "text_2": document}).encode()
        headers = [*self.headers, (b"content-length", str(len(body)).encode())]
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": "/v1/score",
            "raw_path": b"/v1/score",
            "query_string": b"",
            "root_path": "",
            "headers": headers,
            "client": None,
            "server": None,
            "app": self.app,
            "state": {},
        }
        messages, status, answer = [{"type": "http.request", "body": body, "more_body": False}], 0, b""

        async def receive():
            return messages.pop() if messages else await asyncio.Event().wait()  # the guard does not leave

        async def send(message):
            nonlocal status, answer
            status = message.get("status", status)
            answer += message.get("body", b"")

        await self.inner(scope, receive, send)
        if status != 200:
            raise NotScored(f"vLLM answers {status}: {answer[:300].decode('utf-8', 'replace')}")
        data = json.loads(answer)
        return data["data"][0]["score"], data["usage"]["prompt_tokens"]

    # ---- engines ----

    def served(self) -> None:
        """Note that a call was answered with scores."""
        if not self.exact:
            self.counts.engine_scored(0)

    def _note_scores(self, engine_client: Any) -> None:
        """Note the time of each answer of an engine. It has the pairs of a whole step, so this costs nothing."""
        self.core = getattr(engine_client, "engine_core", None)
        self.exact = self.counts.n_engines > 1 and hasattr(self.core, "reqs_in_flight")
        take = getattr(self.core, "get_output_async", None)
        if take is None:  # another release of vLLM: served() and the guard's own pairs are all that is seen
            return

        async def noted():
            outputs = await take()
            if outputs.outputs:
                self.counts.engine_scored(outputs.engine_index if self.exact else 0)
            return outputs

        self.core.get_output_async = noted

    def look(self) -> None:
        """Note for which engines pairs wait, and that this process lives."""
        counts = self.counts
        if not self.ending:
            counts.note_alive()
        self.mute_s = [self.mute_s[1], counts.mute_s()]
        if self.exact:
            # A pair stays here until its engine has answered or dropped it, also when its client has left.
            waited_for = {int.from_bytes(identity, "little") for identity in tuple(self.core.reqs_in_flight.values())}
        else:
            waited_for = {0} if counts.own_in_flight or self.probe else set()
            # The pairs may be gone because their clients left, which says nothing about the engine. So ask it.
            unknown = not waited_for and counts.unanswered(0)
            if not self.probe and not self.ending and (unknown or counts.own_wait_s(0) > self.timeout_s / 4):
                self.probe = asyncio.create_task(self._ask())
                waited_for = {0}
        for engine in range(counts.n_engines):
            counts.engine_waits(engine, engine in waited_for)
        if self.hang and not self.told:
            logger.error("guard: %s", self.hang)
            tell_systemd("WATCHDOG=trigger")
        self.told = bool(self.hang)

    async def _ask(self) -> None:
        try:
            await self.score("ping", "pong")
            self.served()
        except Exception as exc:
            logger.warning("guard: a pair of its own was not scored: %s", exc)
        finally:
            self.probe = None

    async def _look_at_engines(self) -> None:
        while True:
            await asyncio.sleep(min(LOOK_S, self.timeout_s / 10))
            self.look()


def tell_systemd(text: str) -> None:
    """Send a message to the service manager, where serving.command says that it is systemd and this its service."""
    address = os.environ.get("GUARD_NOTIFY_SOCKET", "")
    if not address:
        return
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.sendto(text.encode(), "\0" + address[1:] if address.startswith("@") else address)
    except OSError as exc:
        logger.warning("guard: systemd was not told: %s", exc)

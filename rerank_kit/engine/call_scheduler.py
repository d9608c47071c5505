"""A scheduler for vLLM that scores the pairs of one call in one engine step.

`vllm serve --scheduler-cls rerank_kit.engine.call_scheduler.CallScheduler`. An API process sends the pairs of a call to
the engine one by one, over some milliseconds. vLLM's own scheduler begins a step with the first of them, and the others
wait for the next step. This one gives vLLM an empty step while pairs of a call are still arriving and nothing else
runs. vLLM sleeps 1 ms after an empty step and takes in what came since then.

A wait ends when the call is complete, when QUIET_S passed without a new pair, when a full step waits, or after HOLD_S.
How many pairs a call has is read from the request id where the guard wrote it (`Call.engine_id`); without it only the
other three rules end the wait.

vLLM sets data_parallel_size to 1 in each engine before it makes the scheduler (but for mixtures of experts), so the
plan passes the number of engines in RERANK_ENGINES.

Source: vllm/v1/core/sched/scheduler.py and vllm/v1/engine/core.py of vLLM 0.32.0. PAUSED_NEW is vLLM's own state in
which no waiting request is scheduled.
"""

import os
import re
import time

from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.scheduler import Scheduler

ENGINES = "RERANK_ENGINES"  # environment: number of engines that share the calls
QUIET_S = 0.0008  # vLLM sleeps 1 ms after an empty step: this is one such step without a new pair
KNOWN_QUIET_S = 0.003  # the same where the ids say that more is to come
HOLD_S = 0.012  # the longest wait for a step; a call of 32 pairs takes 4 to 8 ms to arrive
# "score-<id>.n<pairs>-<index>-<8 hex digits of vLLM>": the guard writes ".n<pairs>".
COUNTED = re.compile(r"(.+\.n(\d+))-(\d+)-[0-9a-f]{8}")


class CallScheduler(Scheduler):
    """vLLM's scheduler of pooling models, but for the wait."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        own_ranks = self.vllm_config.parallel_config.data_parallel_size
        self.n_engines = max(own_ranks, int(os.environ.get(ENGINES, 1)))
        # Ranks of a mixture of experts step together: an empty step of one is a dummy step of all.
        self.may_hold = not (own_ranks > 1 and self.vllm_config.model_config.is_moe)
        self.open_calls: set[str] = set()  # of which more pairs are to come, as far as their ids say
        self.uncounted = False  # pairs of calls of unknown size came since the last step
        self.left_over = False  # the last step was full
        self.new_tokens = 0  # since the last step
        self.last_add_s = self.hold_since_s = 0.0
        self.holding = False

    def add_request(self, request) -> None:
        """Note what came, beside vLLM's own work."""
        if not self.waiting:  # also after an abort
            self._forget()
        super().add_request(request)
        self.last_add_s = time.monotonic()
        self.new_tokens += request.num_prompt_tokens
        if found := COUNTED.fullmatch(request.request_id):
            call, n_pairs, index = found[1], int(found[2]), int(found[3])
            # The pairs of a call go to the engines in turn: one of the last n_engines is the last one here.
            if index < n_pairs - self.n_engines:
                self.open_calls.add(call)
            else:
                self.open_calls.discard(call)
                # An embedding model scores n pairs by more than n texts.
                self.uncounted |= request.pooling_params is None or request.pooling_params.task != "classify"
        else:
            self.uncounted = True

    def schedule(self, *args, **kwargs):
        """A step of the engine, or an empty one while pairs of a call arrive."""
        self.holding = self._must_hold(time.monotonic())
        if not self.holding:
            self._forget()
            output = super().schedule(*args, **kwargs)
            self.left_over = bool(self.waiting)
            return output
        self._pause_state = PauseState.PAUSED_NEW
        try:
            return super().schedule(*args, **kwargs)
        finally:
            self._pause_state = PauseState.UNPAUSED

    def make_stats(self, *args, **kwargs):
        """None after an empty step: it would wake an API process that has nothing to do."""
        return None if self.holding else super().make_stats(*args, **kwargs)

    def _forget(self) -> None:
        self.open_calls.clear()
        self.uncounted, self.new_tokens, self.hold_since_s = False, 0, 0.0

    def _must_hold(self, now_s: float) -> bool:
        if not self.may_hold or self.running or not self.waiting or self._pause_state != PauseState.UNPAUSED:
            return False
        if self.left_over or self.new_tokens >= self.max_num_scheduled_tokens:
            return False
        if len(self.waiting) >= self.max_num_running_reqs or not (self.open_calls or self.uncounted):
            return False
        if now_s - self.last_add_s > (KNOWN_QUIET_S if self.open_calls else QUIET_S):
            return False
        self.hold_since_s = self.hold_since_s or now_s
        return now_s - self.hold_since_s < HOLD_S

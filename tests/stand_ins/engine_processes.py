"""Rerankers for the processes of a RerankerPool: OfflineReranker over an engine that answers slowly, out of order."""

import os
import signal
import time
from types import SimpleNamespace

from rerank_kit.offline.feeding import Batch
from rerank_kit.offline.prompts import Prompt
from rerank_kit.offline.reranker import OfflineReranker
from rerank_kit.settings import ConfigError


class SlowEngine:
    """Feeder without vLLM. A step answers the youngest request, as the engine may."""

    def __init__(self):
        self.queue = []

    has_room = property(lambda self: len(self.queue) < 6)
    busy = property(lambda self: bool(self.queue))

    def submit(self, prompts):
        batch = Batch(prompts, [None] * len(prompts), len(prompts))
        self.queue += [(batch, i) for i in range(len(prompts))]
        return batch

    def step(self):
        batch, i = self.queue.pop()
        batch.outputs[i] = batch.prompts[i].ids[0] / 1000
        batch.n_left -= 1

    def abort(self):
        self.queue.clear()


SLOW_S = 1.5


def fork_engine(group, marks):
    """A forked child that holds the pipe, as vLLM's engine does; "own group": in a process group of its own."""
    if not (pid := os.fork()):
        time.sleep(20)
        os._exit(0)
    (marks / f"child-{pid}").touch()
    if group == "own group":
        os.setpgid(pid, pid)


class Reranker(OfflineReranker):
    """Scores a document by its length.

    plan.dies: the document that ends the process; plan.fails: that raises; plan.killed: that brings SIGKILL; plan.slow:
    that takes SLOW_S. "start": it fails, or takes 20 s, before it is ready.
    """

    def __init__(self, plan):
        if plan.fails == "start":
            raise ConfigError("no room on the GPU")
        if plan.slow == "start":
            time.sleep(20)
        self.plan, self.embeds, self.late, self.fitter, self.chunk = plan, False, None, None, 4
        self.encoder = SimpleNamespace(encode=self.encode, max_length=99, first_tokens=lambda texts, n: texts)
        self.feeder = SlowEngine()
        if plan.child:
            fork_engine(plan.child, plan.marks)
        if plan.fails == "killed at start":
            os.kill(os.getpid(), signal.SIGKILL)

    def encode(self, pairs):
        for pair in pairs:
            if pair.document == self.plan.killed:
                os.kill(os.getpid(), signal.SIGKILL)
            if pair.document == self.plan.slow:
                time.sleep(SLOW_S)
            if pair.document == self.plan.dies:
                os._exit(7)
            if pair.document == self.plan.fails:
                raise ValueError(f"bad document {pair.document!r}")
        time.sleep(0.002)
        return [Prompt([len(pair.document)], False) for pair in pairs]

    def _scores(self, prepared, outputs):
        return [outputs[i] for (i,) in prepared.needs]  # without torch, whose import takes seconds in each process

    def __exit__(self, *_):
        if self.plan.marks:
            (self.plan.marks / str(os.getpid())).touch()

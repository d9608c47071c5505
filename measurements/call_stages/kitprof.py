"""Time stamps of one call, by vLLM's general_plugins entry point: a measurement, no part of a service.

KITPROF=FOLDER switches it on. While FOLDER/on exists, events (time.monotonic seconds, name, detail) go to
FOLDER/<pid>.jsonl, one a line. While FOLDER/torch exists, engines run under torch.profiler and write their kernels.
"""

import functools
import json
import os
import threading
import time

ON, EVENTS, D = False, [], os.environ.get("KITPROF")
now = time.monotonic


def ev(name, detail=None):
    if ON:
        EVENTS.append((now(), name, detail))


def _watch():
    global ON, EVENTS
    while True:
        time.sleep(0.1)
        ON = os.path.exists(D + "/on")
        if EVENTS and not ON:
            got, EVENTS = EVENTS, []
            with open(f"{D}/{os.getpid()}.jsonl", "a") as f:
                f.writelines(json.dumps(e) + "\n" for e in got)


def around(cls, name, label, detail=None, is_async=False):
    old = getattr(cls, name)
    if is_async:

        @functools.wraps(old)
        async def new(self, *a, **k):
            ev(label + "<", detail(self, a, k) if detail else None)
            try:
                return await old(self, *a, **k)
            finally:
                ev(label + ">")
    else:

        @functools.wraps(old)
        def new(self, *a, **k):
            ev(label + "<", detail(self, a, k) if detail else None)
            try:
                return old(self, *a, **k)
            finally:
                ev(label + ">")

    setattr(cls, name, new)


def kernels(prof, path):
    """Names, start and length (us, epoch) of what ran on the GPU."""
    out = []
    for e in prof.profiler.kineto_results.events():
        if str(e.device_type()).endswith("CUDA"):
            out.append((e.start_ns() / 1000, e.duration_ns() / 1000, e.name()[:60]))
    with open(path, "w") as f:
        json.dump({"offset_s": time.time() - now(), "kernels": out}, f)


def register():
    if not D or getattr(register, "done", False):
        return
    register.done = True
    os.makedirs(D, exist_ok=True)
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine.core import EngineCore

    around(EngineCore, "preprocess_add_request", "eng.decode")
    around(EngineCore, "add_request", "eng.add")
    step, sched = EngineCore.step, Scheduler.schedule
    state = {"prof": None}

    def new_step(self):
        want = os.path.exists(D + "/torch") if ON or state["prof"] else False
        if want and state["prof"] is None:
            import torch

            state["prof"] = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
            state["prof"].start()
        ev("eng.step<")
        r = step(self)
        ev("eng.step>")
        if state["prof"] and not want:
            p, state["prof"] = state["prof"], None
            p.stop()
            kernels(p, f"{D}/kernels.{os.getpid()}.json")
        return r

    def new_sched(self, *a, **k):
        ev("eng.sched<", [len(self.waiting), len(self.running)])
        o = sched(self, *a, **k)
        ev("eng.sched>", [len(o.num_scheduled_tokens), o.total_num_scheduled_tokens])
        return o

    EngineCore.step, Scheduler.schedule = new_step, new_sched
    around(Scheduler, "update_from_output", "eng.update")
    try:
        from vllm.v1.worker.gpu.model_runner import GPUModelRunner

        around(GPUModelRunner, "execute_model", "eng.exec")
        for n in ("prepare_inputs", "prepare_attn", "pool"):
            if hasattr(GPUModelRunner, n):
                around(GPUModelRunner, n, "eng." + n)
        from vllm.v1.worker.gpu.pool.pooling_runner import PoolingRunner

        around(PoolingRunner, "pool", "eng.pooler")
    except Exception as exc:
        print("kitprof", exc, flush=True)
    from vllm.entrypoints.pooling.base.serving import PoolingBaseServing as P
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.output_processor import OutputProcessor

    around(P, "__call__", "api.serve", is_async=True)
    around(P, "_preprocessing", "api.prep", is_async=True)
    around(P, "_collect_batch", "api.collect", is_async=True)
    around(P, "_postprocessing", "api.post")
    around(AsyncLLM, "add_request", "api.add", is_async=True)
    around(OutputProcessor, "process_outputs", "api.out", detail=lambda s, a, k: len(a[0]) if a else None)
    from rerank_kit.guard import Guard

    old = Guard.__call__

    async def guard(self, scope, receive, send):
        if scope.get("type") != "http" or scope.get("method") != "POST":
            return await old(self, scope, receive, send)

        async def snd(m):
            await send(m)
            if m["type"] == "http.response.body":
                ev("api.sent")

        ev("api.guard<")
        return await old(self, scope, receive, snd)

    Guard.__call__ = guard
    threading.Thread(target=_watch, daemon=True).start()

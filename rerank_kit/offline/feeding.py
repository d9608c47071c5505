"""The engine of a vllm.LLM fed request by request, so that it never waits for the next call of LLM.classify().

LLM.classify() returns when its whole list is done, so the engine is idle between two lists. Its one thread also
validates, clones, wraps and unwraps each pair. Here a request is a copy of one that vLLM itself has made, and its
result is the tensor that the engine sends.
"""

import itertools
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from rerank_kit.engine.machine import release_of, vllm_version
from rerank_kit.models.images import BadImage
from rerank_kit.offline.prompts import Prompt

STEPS_AHEAD = 6  # engine steps of work that the engine holds; a refill takes less time than one of them


@dataclass(eq=False)
class Batch:
    """N prompts given to the engine. outputs[i] belongs to prompts[i]; None = no output, a BadImage = none to come."""

    prompts: Sequence[Prompt]
    outputs: list = field(default_factory=list)
    n_left: int = 0

    @property
    def done(self) -> bool:
        return self.n_left == 0


class Feeder:
    """Prompts in, pooled outputs out.

    Args:
        llm: a vllm.LLM whose runner is pooling.
        task: "classify" or "embed".

    Source: LLMEngine.add_request() and step() of vLLM 0.26 to 0.33, without their work on each request.
    """

    def __init__(self, llm, task: str):
        from msgspec.structs import replace
        from vllm import PoolingParams

        self._replace = replace
        engine = llm.llm_engine
        self._inputs, self._tasks = engine.input_processor, engine.get_supported_tasks()
        self.core = engine.engine_core
        one = {"type": "token", "prompt_token_ids": [0]}
        # vLLM's own request, with every field that this release fills in; the pairs' requests differ in id and tokens.
        self._first = engine.input_processor.process_inputs("0", one, PoolingParams(task=task), self._tasks)
        self._segment = segment_of(vllm_version())
        self._params: dict[int | None, Any] = {None: self._first.pooling_params}
        self._where: dict[str, tuple[Batch, int, int]] = {}
        self._numbers = itertools.count()
        scheduler = engine.vllm_config.scheduler_config
        self._most = STEPS_AHEAD * scheduler.max_num_seqs, STEPS_AHEAD * scheduler.max_num_batched_tokens
        self._n_tokens = 0

    @property
    def busy(self) -> bool:
        """The engine holds requests."""
        return bool(self._where)

    @property
    def has_room(self) -> bool:
        """The engine holds less than STEPS_AHEAD steps of work."""
        return len(self._where) < self._most[0] and self._n_tokens < self._most[1]

    def submit(self, prompts: Sequence[Prompt]) -> Batch:
        """Give N prompts to the engine; step() brings their outputs."""
        batch = Batch(prompts, [None] * len(prompts), len(prompts))
        for index, prompt in enumerate(prompts):
            name = str(next(self._numbers))
            n_tokens = len(prompt.ids) + prompt.n_images
            self._where[name] = batch, index, n_tokens
            self._n_tokens += n_tokens
            try:
                self.core.add_request(self._request(name, prompt))
            except BadImage as exc:
                del self._where[name]
                batch.outputs[index], batch.n_left = exc, batch.n_left - 1
                self._n_tokens -= n_tokens
        return batch

    def _request(self, name: str, prompt: Prompt) -> Any:
        if prompt.images:
            return self._with_images(name, prompt)
        params = self._params.get(prompt.n_first) or self._params_for(prompt.n_first)
        return self._replace(self._first, request_id=name, prompt_token_ids=prompt.ids, pooling_params=params)

    def _with_images(self, name: str, prompt: Prompt) -> Any:
        """A request whose images vLLM reads, resizes and puts into the prompt, as its server does.

        Source: CrossEncoderIOProcessor.render() of vLLM 0.32.

        Raises:
            BadImage: an image cannot be decoded.
        """
        from vllm.multimodal.media.image import ImageMediaIO

        images = []
        for data in prompt.images:
            try:
                images.append(ImageMediaIO().load_bytes(data))
            except Exception as exc:  # Pillow's plugins raise many kinds
                raise BadImage(f"the image cannot be decoded ({' '.join(str(exc).split())[:100]})") from exc
        asked: Any = {"prompt_token_ids": prompt.ids, "multi_modal_data": {"image": images}}
        found = self._inputs.renderer.process_for_engine(asked, time.time())
        return self._inputs.process_inputs(name, found, self._first.pooling_params, self._tasks)

    def step(self) -> None:
        """Wait for the engine's next outputs and put them into their batches."""
        for output in self.core.get_output().outputs:
            if output.finish_reason is None and output.pooling_output is None:
                continue
            batch, index, n_tokens = self._where.pop(output.request_id, (None, 0, 0))
            if batch is not None:  # not from an earlier, interrupted run
                batch.outputs[index] = output.pooling_output
                batch.n_left -= 1
                self._n_tokens -= n_tokens

    def abort(self) -> None:
        """Abort the requests that are not done."""
        if self._where:
            self.core.abort_requests(list(self._where))
        self._where.clear()
        self._n_tokens = 0

    def _params_for(self, n_first: int | None) -> Any:
        """Parameters of a pair whose first segment has n_first tokens; one object for all such pairs."""
        more = {"compressed_token_type_ids": n_first if n_first is None else self._segment(n_first)}
        self._params[n_first] = self._replace(self._first.pooling_params, extra_kwargs=more)
        return self._params[n_first]


def segment_of(version: str) -> Callable[[int], int | tuple[int, int]]:
    """How a release of vLLM is told where a pair's second segment begins: by its start, from 0.33 on by a range.

    A range ends before what its own server may pad; prompts here are not padded.
    """
    if release_of(version) < (0, 33):
        return lambda n_first: n_first
    return lambda n_first: (n_first, 2**31 - 1)


def ahead(items: Iterator, n_ahead: int = 4) -> Iterator:
    """The same items, made by a thread of their own, at most n_ahead in advance."""
    ready: queue.Queue = queue.Queue(n_ahead)
    end = object()
    stop = threading.Event()

    def fill() -> None:
        last = end
        try:
            for item in items:
                ready.put((item, None))
                if stop.is_set():
                    return
        except BaseException as exc:  # raised where the items are used
            last = exc
        ready.put((end, last))

    threading.Thread(target=fill, name="prepare", daemon=True).start()
    try:
        while True:
            item, last = ready.get()
            if item is end:
                if last is not end:
                    raise last
                return
            yield item
    finally:
        stop.set()
        while not ready.empty():  # the thread may wait for room
            ready.get_nowait()

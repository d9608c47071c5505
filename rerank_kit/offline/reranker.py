"""A vllm.LLM in this process that scores pairs, without a server."""

import math
import os
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rerank_kit.engine.plan import Plan
from rerank_kit.models.fitting import Fitter, late_fitter
from rerank_kit.models.images import BadImage
from rerank_kit.models.late import Late, maxsim
from rerank_kit.models.pair import Pair
from rerank_kit.offline import images
from rerank_kit.offline.feeding import Batch, Feeder, ahead
from rerank_kit.offline.files import CHUNK, Result
from rerank_kit.offline.images import PairImages
from rerank_kit.offline.prompts import PairEncoder, Prompt


@dataclass(frozen=True)
class Prepared:
    """N pairs ready for the engine: their prompts, and which pair each belongs to."""

    n_pairs: int
    owners: list[int]  # owners[i] = index of the pair to which the i-th scored pair (or window) belongs
    needs: Sequence[tuple[int, ...]]  # needs[i] = indices of the prompts that its score comes from
    prompts: list[Prompt]
    cut: set[int]  # indices of pairs that were cut before the prompts were made
    errors: dict[int, str] = field(default_factory=dict)  # by the index of a pair that is not scored


class OfflineReranker:
    """vllm.LLM with a plan's arguments. Loads the model when it is made."""

    late: Late | None = None
    _images: PairImages | None = None

    def __init__(self, plan: Plan):
        os.environ.update(plan.env)  # before vllm is imported: it reads its settings then
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # scores, not start-up chatter
        if plan.cfg.cuda_visible_devices is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = plan.cfg.cuda_visible_devices
        from vllm import LLM

        # Copies of the model need a server in front of them; offline, one engine takes every pair.
        engine = {k: v for k, v in plan.engine.items() if k != "data_parallel_size"}
        self.plan = plan
        self.embeds = plan.profile.reference == "embedding"
        self.late = plan.profile.late
        # Each distinct text of a chunk is embedded once, so larger chunks embed fewer texts twice. A late interaction
        # model has a vector for each token.
        self.chunk = 4096 if self.embeds else CHUNK // 2 if self.late else CHUNK
        self.encoder = PairEncoder(plan)
        if plan.images:
            self.chunk = images.CHUNK
        self.fitter = None
        if plan.cfg.long_documents == "chunk":
            length = plan.engine["max_model_len"]
            self.fitter = Fitter(self.encoder.tokenizer, plan.template, length, separate=self.embeds)
            if self.late:
                self.fitter = late_fitter(self.encoder.tokenizer, self.late)
        self.llm = LLM(**engine)
        self.feeder = Feeder(self.llm, "token_embed" if self.late else "embed" if self.embeds else "classify")

    def score(self, pairs: list[Pair]) -> list[Result]:
        """Score N pairs; N results in the same order."""
        parts = (pairs[i : i + self.chunk] for i in range(0, len(pairs), self.chunk))
        prepared = ahead((None, self.prepare(part)) for part in parts)
        return [result for _, results in self.stream(prepared) for result in results]

    def prepare(self, pairs: list[Pair]) -> Prepared:
        """Tokenize N pairs. Needs no engine, so a thread can do it while the engine runs."""
        owners, scored = [], []
        shorter, cut = self._within_limits(pairs)
        for index, pair in enumerate(shorter):
            if not self._takes(pair) or any(pair.images):
                continue
            parts = [pair]
            if self.fitter:
                query, windows, is_cut = self.fitter.windows(pair.query, pair.document, pair.instruction)
                parts = [replace(pair, query=query, document=window) for window in windows]
                cut |= {index} if is_cut else set()
            owners += [index] * len(parts)
            scored += parts
        shown = [i for i, pair in enumerate(shorter) if any(pair.images) and self._takes(pair)]
        beside = dict(zip(shown, self._encode_images([shorter[i] for i in shown]), strict=True))
        errors = {index: str(prompt) for index, prompt in beside.items() if isinstance(prompt, BadImage)}
        if self.late:
            sides = list(dict.fromkeys(side for p in scored for side in ((p.query, True), (p.document, False))))
            at = {side: i for i, side in enumerate(sides)}
            both = [(at[pair.query, True], at[pair.document, False]) for pair in scored]
            return Prepared(len(pairs), owners, both, self.encoder.encode_sides(sides) if sides else [], cut, errors)
        if not self.embeds:
            prompts = self.encoder.encode(scored)
            for index, prompt in beside.items():
                if not isinstance(prompt, BadImage):
                    owners.append(index)
                    prompts.append(prompt)
            return Prepared(len(pairs), owners, [(i,) for i in range(len(prompts))], prompts, cut, errors)
        texts = list(dict.fromkeys(text for pair in scored for text in (pair.query, pair.document)))
        where = {text: i for i, text in enumerate(texts)}
        needs = [(where[pair.query], where[pair.document]) for pair in scored]
        return Prepared(len(pairs), owners, needs, self.encoder.encode_texts(texts) if texts else [], cut, errors)

    def _encode_images(self, pairs: list[Pair]) -> list[Prompt | BadImage]:
        """Prompts of pairs with images; for one that is not scored, the reason."""
        if pairs and self._images is None:
            self._images = PairImages(self.plan, self.encoder)
        return self._images.encode(pairs) if self._images and pairs else []

    def _within_limits(self, pairs: list[Pair]) -> tuple[list[Pair], set[int]]:
        """The pairs within MAX_TOKENS_PER_QUERY and MAX_TOKENS_PER_DOC, and the indices of those that were cut."""
        cfg, out = self.plan.cfg, pairs
        # As in the guard: chunk scores the whole document.
        per_doc = None if cfg.long_documents == "chunk" else cfg.max_tokens_per_doc
        for name, limit in (("query", cfg.max_tokens_per_query), ("document", per_doc)):
            if limit:
                texts = list({getattr(pair, name): None for pair in out})
                short = dict(zip(texts, self.encoder.first_tokens(texts, limit), strict=True))
                out = [replace(pair, **{name: short[getattr(pair, name)]}) for pair in out]
        return out, {i for i, (old, new) in enumerate(zip(pairs, out, strict=True)) if old != new}

    @property
    def busy(self) -> bool:
        """The engine holds pairs whose outputs are to be fetched."""
        return self.feeder.busy

    def stream(self, source: Iterable[tuple[Any, Prepared] | None]) -> Iterator[tuple[Any, list[Result]]]:
        """Results of many prepare()d lists, each with the tag that came with it, in their order.

        The engine gets the next lists while it works on the first, so it is never idle between two.

        Args:
            source: the lists. A None means that none is there yet; it may come only while the engine is busy.
        """
        lists, more = iter(source), True
        waiting: deque[tuple[Any, Prepared, Batch]] = deque()
        end = object()
        try:
            while True:
                while waiting and waiting[0][2].done:
                    tag, prepared, batch = waiting.popleft()
                    yield tag, self._results(prepared, batch.outputs)
                while more and self.feeder.has_room and not (waiting and waiting[0][2].done):
                    found: Any = next(lists, end)
                    more = found is not end
                    if found is end or found is None:
                        break
                    waiting.append((*found, self.feeder.submit(found[1].prompts)))
                if not waiting and not more:
                    return
                if self.feeder.busy:
                    self.feeder.step()
        finally:
            self.feeder.abort()

    def _results(self, prepared: Prepared, outputs: list) -> list[Result]:
        """Results of the pairs of one prepare(), in their order."""
        refused = Result(None, error=f"profile {self.plan.profile.name} takes no instruction")
        out = [refused] * prepared.n_pairs
        for index, error in prepared.errors.items():
            out[index] = Result(None, error=error)
        windows = Counter(prepared.owners)
        scores = self._scores(prepared, outputs)
        for owner, needs, score in zip(prepared.owners, prepared.needs, scores, strict=True):
            cut = any(prepared.prompts[i].cut for i in needs)
            if isinstance(score, BadImage):
                out[owner] = Result(None, error=str(score))
            elif cut and self.plan.cfg.long_documents == "error":
                limit = self.encoder.max_length
                out[owner] = Result(None, error=f"longer than MAX_MODEL_LEN={limit} (LONG_DOCUMENTS=error)")
            elif not math.isfinite(score):
                out[owner] = Result(None, error=f"the model gave the score {score}")
            elif out[owner] is refused or ((best := out[owner].score) is not None and score > best):
                out[owner] = Result(score, cut or owner in prepared.cut, windows=windows[owner])
        return out

    def _scores(self, prepared: Prepared, outputs: list) -> list[Any]:
        """One score for each of prepared.needs: the head's, the cosine of two embeddings, MaxSim, or a BadImage."""
        import torch

        needs = prepared.needs
        if not needs:
            return []
        if any(output is None for output in outputs):
            raise RuntimeError("the engine gave no output for a pair; its log says why (VLLM_LOGGING_LEVEL=INFO)")
        if self.late:
            skip = self.late.skip
            return [maxsim(outputs[q], outputs[d], prepared.prompts[d].ids, skip).item() for q, d in needs]
        if not self.embeds:
            good = [output for output in outputs if not isinstance(output, BadImage)]
            scores = iter(torch.stack(good).float()[:, 0].tolist() if good else ())
            return [output if isinstance(output, BadImage) else next(scores) for output in outputs]
        values = torch.stack(outputs).float()
        first, second = (values[torch.tensor(side)] for side in zip(*needs, strict=True))
        return torch.cosine_similarity(first, second, dim=1).tolist()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        """End the engine's processes, also after an interrupt: leave() skips what would end them at exit."""
        self.llm.llm_engine.engine_core.shutdown()

    def _takes(self, pair: Pair) -> bool:
        return self.plan.profile.instruction or not pair.instruction

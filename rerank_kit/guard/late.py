"""Calls to a late interaction model: vLLM gets the model's own tokens, and the score is the model's own MaxSim.

vLLM 0.32 tokenizes query and document alike, without markers and without filling the query, and every token of a
document counts. Here its class that makes the two prompts and the score is replaced by one that follows `Late`.

Source: LateInteractionIOProcessor and ServingScores of vLLM 0.32.0.
"""

import asyncio
import json
import os
from typing import Any

from rerank_kit.guard.answers import Refusal
from rerank_kit.guard.long_bodies import LIMITS, _fields, _limit, cut_by_limits
from rerank_kit.guard.long_documents import LongDocuments, plain_tokenizer
from rerank_kit.models.fitting import late_fitter
from rerank_kit.models.late import Late, maxsim

IDS = "rerank_kit.late"  # the key of a scope under which the tokens of a call's texts lie


def late_rules() -> Late | None:
    """The rules of the served model; None where it is no late interaction model."""
    text = os.environ.get("GUARD_LATE", "")
    if not text:
        return None
    values = json.loads(text)
    return Late(**{**values, "skip": tuple(values["skip"])})


class LateTexts(LongDocuments):
    """LongDocuments of a late interaction model: makes the tokens of every call, and says which texts were cut."""

    def __init__(self, late: Late, *args):
        super().__init__(*args)
        self.late = late

    def choose_mode(self, call, payload: dict) -> str | None:
        asked = super().choose_mode(call, payload)
        call.mode = call.mode or "truncate"  # the length is the model's, at which its library cuts
        payload.pop("use_activation", None)  # of vectors, vLLM takes it for their length, which is 1 here
        return asked

    async def prepare(self, scope) -> None:
        if self.fitter is None:
            self.fitter = await asyncio.get_running_loop().run_in_executor(self.worker, take_over, scope, self.late)

    async def fit(self, scope, call, body: bytes, receive) -> bytes | None:
        await self.prepare(scope)
        if call.mode == "chunk" and await super().fit(scope, call, body, receive) is None:
            return None
        found = await self._in_worker(call, receive, read_texts, self.fitter, self.late, call)
        if call.aborted:
            return None
        if found:
            cut, scope[IDS] = found
            call.cut = call.cut if call.mode == "chunk" else cut
        return self.encode(call.payload)


def read_texts(fitter, late: Late, call: Any) -> tuple[list[int], list[list[int]]] | None:
    """(documents of which, or of whose query, the model sees a part; token ids of all prompts, queries first).

    None for a body that vLLM refuses. The body's token limits are applied to its texts.

    Raises:
        Refusal: a text is too long in a call that allows no cut.
    """
    payload = call.payload
    limited = set(cut_by_limits(fitter, payload)) if any(_limit(payload, name) for name in LIMITS) else set()
    for name in LIMITS:
        if _limit(payload, name):
            del payload[name]
    fields = _fields(payload)
    if fields is None:
        return None
    query_name, queries, documents_name, documents = fields
    ids, cuts = [], []
    for name, texts, is_query in ((query_name, queries, True), (documents_name, documents, False)):
        for number, text in enumerate(texts):
            whole = fitter.tokenizer(late.text(fitter._enough(text), is_query))["input_ids"]
            prompt, is_cut = late.prompt(whole, is_query)
            if is_cut and call.mode == "error":
                which = name if is_query and len(texts) == 1 else f"{name}[{number}]"
                limit = late.query_length if is_query else late.document_length
                text = f"{which} has more than the {limit} tokens that the model takes (long_documents=error)"
                raise Refusal(400, "long", text, param=name)
            ids.append(prompt)
            cuts.append(is_cut)
    of_query, of_document = cuts[: len(queries)], cuts[len(queries) :]
    of_query = of_query if len(of_query) > 1 else of_query * len(documents)
    cut = [i for i, both in enumerate(zip(of_query, of_document, strict=True)) if any(both) or i in limited]
    return cut, ids


def take_over(scope, late: Late):
    """Put our class in the place of the one by which vLLM makes prompts and scores; a Fitter for the model's texts."""
    from vllm.entrypoints.pooling.scoring.io_processor import LateInteractionIOProcessor
    from vllm.outputs import PoolingRequestOutput

    scores = scope["app"].state.serving_scores  # vLLM's own, not a documented interface
    served = scores.io_processor
    if not isinstance(served, LateInteractionIOProcessor):
        raise LookupError(f"vLLM scores by {served.name}, and late interaction is expected")
    config = served.model_config
    # vLLM's own texts (a probe) are tokenized in its thread, all others in the guard's: a tokenizer each.
    own = plain_tokenizer(config.tokenizer, False)

    class MaxSim(LateInteractionIOProcessor):
        def get_request_factory_online(self, ctx):
            requests = super().get_request_factory_online(ctx)
            given = ctx.raw_request.scope.get(IDS) if ctx.raw_request is not None else None
            for number, request in enumerate(requests):
                if given is not None and len(given) == len(requests):
                    ids = given[number]
                else:
                    is_query = number < ctx.n_queries
                    text = late.text(request["prompts"]["prompt"], is_query)
                    ids, _ = late.prompt(own(text)["input_ids"], is_query)
                request["prompts"] = {"prompt_token_ids": ids}
            return requests

        def _post_process(self, outputs, n_queries):
            queries, documents = outputs[:n_queries], outputs[n_queries:]
            queries = queries if len(queries) > 1 else queries * len(documents)
            done = []
            for query, document in zip(queries, documents, strict=True):
                failed = self._pair_error_output(query, document)
                score = failed or PoolingRequestOutput(
                    request_id=f"{query.request_id}_{document.request_id}",
                    outputs=maxsim(query.outputs.data, document.outputs.data, document.prompt_token_ids, late.skip),
                    prompt_token_ids=[*query.prompt_token_ids, *document.prompt_token_ids],
                    num_cached_tokens=query.num_cached_tokens + document.num_cached_tokens,
                    finished=True,
                )
                done.append(score)
            return done

    served.__class__ = MaxSim
    # vLLM's faster way takes MaxSim in the engine, where every token of a document counts.
    scores.enable_flash_late_interaction = False
    return late_fitter(plain_tokenizer(config.tokenizer, False), late)

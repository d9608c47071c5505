"""Query-document pairs to token ids, many at a time.

The ids are those of vLLM's own rendering, pair by pair, in a fraction of its time: the template is rendered once and
the texts are put into it, and the tokenizer gets hundreds of prompts a call.
"""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from rerank_kit.engine.choices import fastokens_agrees
from rerank_kit.engine.plan import Plan
from rerank_kit.models.fitting import Fitter, after_marks, document_first, tail_ids
from rerank_kit.models.images import WRAPPED, beside, plain_macro
from rerank_kit.models.pair import Pair
from rerank_kit.models.served_folder import make_adapted
from rerank_kit.settings import ConfigError, passed_on_env

# Private-use characters that no template contains; placeholders for the texts while it is rendered.
MARKS = {"query": "\ue000", "document": "\ue001", "instruction": "\ue002"}
# Texts that a template may treat in its own way: control tokens, half ones, white space, emptiness.
PROBES = ("", " \n", "a <|im_end|>\n<|im_start|>b", "<|im_<|im_end|>end|>", "<bos><eos><unused1>", "<a> |> b\n\n")


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids of one prompt. A long one is cut as its family's reference does; cut = True then."""

    ids: list[int]
    cut: bool = False
    n_first: int | None = None  # BERT: tokens of the first segment
    images: tuple[bytes, ...] = ()  # in the order of their marks in ids
    n_images: int = 0  # tokens that the images add to ids


class PairEncoder:
    """Pairs to token ids, many at a time. Used by one thread: a tokenizer is not thread-safe."""

    def __init__(self, plan: Plan):
        from transformers import AutoTokenizer

        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
        make_adapted(plan.checkpoint, plan.profile, Path(plan.engine["model"]))
        # Set explicitly: by default transformers asks on the terminal whether to run a checkpoint's code.
        trusted = plan.engine.get("trust_remote_code", False)
        self.tokenizer = AutoTokenizer.from_pretrained(plan.engine["model"], trust_remote_code=trusted)
        self.template, self.max_length = plan.template, plan.engine["max_model_len"]
        self.late = plan.profile.late
        self._backend = _rust_tokenizer(self.tokenizer)
        self._ids_of = _fast_ids(plan, self.tokenizer) if self.template is not None else None
        self._plain: Callable[[str], str] | None = None
        if self.template is not None:
            self._plain = plain_macro(self.template)
        # Queries and instructions repeat often, documents rarely.
        self._plain_again = lru_cache(4096)(self._plain) if self._plain else str
        self._last_suffix: tuple[tuple[str, str | None], list[int]] | None = None
        self._document_first = self.template is not None and document_first(
            self.render_by_jinja(Pair(MARKS["query"], MARKS["document"])), MARKS["document"], MARKS["query"]
        )
        self._fitter: Fitter | None = None
        self._frames: dict[bool, list[str] | None] = {}

    def encode(self, pairs: list[Pair]) -> list[Prompt]:
        """Token ids of N pairs.

        Source: the profile's template, cut as on the model card of Qwen3-Reranker (the end of the document, then of
        the query; the suffix stays); without a template the tokenizer's own pair format with longest_first.
        """
        if not pairs:
            return []
        if self.template is None:
            return self._encode_segments(pairs)
        out = []
        for pair, ids in zip(pairs, self._ids(self.render(pairs)), strict=True):
            cut = len(ids) > self.max_length
            out.append(Prompt(self._cut(pair, ids) if cut else ids, cut))
        return out

    def encode_texts(self, texts: list[str]) -> list[Prompt]:
        """Token ids of N texts by themselves, for embedding models; long ones cut by the tokenizer's own rule."""
        out = [Prompt(ids) for ids in self._ids(texts)]
        long = [i for i, prompt in enumerate(out) if len(prompt.ids) > self.max_length]
        if long:
            cut = self.tokenizer([texts[i] for i in long], truncation=True, max_length=self.max_length)["input_ids"]
            for i, ids in zip(long, cut, strict=True):
                out[i] = Prompt(ids, True)
        return out

    def encode_sides(self, texts: list[tuple[str, bool]]) -> list[Prompt]:
        """Token ids of N texts for late interaction; each with whether it is a query."""
        assert self.late is not None
        all_ids = self._ids([self.late.text(*text) for text in texts])
        return [Prompt(*self.late.prompt(ids, is_query)) for ids, (_, is_query) in zip(all_ids, texts, strict=True)]

    def encode_beside(self, pair: Pair, images: list[tuple[int, bytes, int]], mark: str) -> Prompt:
        """Token ids of a pair with images; the texts are cut to what the images leave.

        Args:
            images: (0 for the query or 1 for the document, bytes, tokens) of each.
            mark: what the prompt has in an image's place, before the text.

        Raises:
            BadImage: the images leave no room for the prompt.
        """
        assert self._plain is not None
        if self._fitter is None:
            self._fitter = Fitter(self.tokenizer, self.template, self.max_length)
        fitter = beside(self._fitter, sum(n + WRAPPED for _, _, n in images))
        query, document, cut = fitter.fit(pair.query, pair.document, pair.instruction)
        texts = [self._plain(query), self._plain(document)]
        for side, _, _ in images:
            texts[side] = mark + texts[side]
        ids = self._ids([self.render_by_jinja(replace(pair, query=texts[0], document=texts[1]), images=True)])[0]
        return Prompt(ids, cut, None, tuple(data for _, data, _ in images), sum(n - 1 for _, _, n in images))

    def first_tokens(self, texts: list[str], n_tokens: int) -> list[str]:
        """Each text, cut to its first n tokens.

        Source: truncate_text_to_tokens() of vLLM 0.32, by which the service cuts to max_tokens_per_doc and _query.

        Raises:
            ConfigError: the tokenizer does not know the characters of its tokens.
        """
        if self._backend is None:
            raise ConfigError("MAX_TOKENS_PER_DOC and MAX_TOKENS_PER_QUERY need a fast tokenizer: unset them")
        out, left = list(texts), list(range(len(texts)))
        while left:
            encodings = self._backend.encode_batch([out[i] for i in left], add_special_tokens=False)
            long = [(i, e) for i, e in zip(left, encodings, strict=True) if len(e) > n_tokens]
            for i, encoding in long:
                offsets = encoding.offsets
                end = min(offsets[n_tokens - 1][1], offsets[n_tokens][0])  # never inside a character
                end = self._with_marks(out[i], end, encoding.ids[:n_tokens])
                out[i] = out[i][: min(end, len(out[i]) - 1)]
            left = [i for i, _ in long]  # a text that is cut inside a word may get one token more
        return out

    def _with_marks(self, text: str, end: int, ids: list[int]) -> int:
        """`end`, or behind the marks of the letter before it if the text then has these ids, as in fitting.py."""
        for stop in range(end, last + 1) if (last := after_marks(text, end)) > end else ():
            if self._backend.encode(text[:stop], add_special_tokens=False).ids == ids:
                return stop
        return end

    # --- the template ---

    def render(self, pairs: list[Pair]) -> list[str]:
        """Prompts of N pairs: the texts of apply_chat_template(), the template itself rendered once."""
        out = []
        for pair in pairs:
            parts = self._frame(bool(pair.instruction))
            if parts is None or self._plain is None:
                out.append(self.render_by_jinja(pair))
                continue
            filled = list(parts)
            for at in range(1, len(parts), 2):
                text = getattr(pair, parts[at])
                filled[at] = self._plain(text) if parts[at] == "document" else self._plain_again(text)
            out.append("".join(filled))
        return out

    def render_by_jinja(self, pair: Pair, **more: Any) -> str:
        chat = [{"role": "query", "content": pair.query}, {"role": "document", "content": pair.document}]
        more |= {"instruction": pair.instruction} if pair.instruction else {}
        return self.tokenizer.apply_chat_template(chat, chat_template=self.template, tokenize=False, **more)

    def _frame(self, with_instruction: bool) -> list[str] | None:
        """The rendered template as [text, name, text, name, ... text]; None if the template does more than that."""
        if with_instruction not in self._frames:
            self._frames[with_instruction] = self._find_frame(with_instruction)
        return self._frames[with_instruction]

    def _find_frame(self, with_instruction: bool) -> list[str] | None:
        if self._plain is None:
            return None
        instruction = MARKS["instruction"] if with_instruction else None
        rendered = self.render_by_jinja(Pair(MARKS["query"], MARKS["document"], instruction))
        parts = re.split(f"([{''.join(MARKS.values())}])", rendered)
        names = {mark: name for name, mark in MARKS.items()}
        parts[1::2] = [names[mark] for mark in parts[1::2]]
        wanted = {"query", "document"} | ({"instruction"} if with_instruction and "instruction" in parts else set())
        if sorted(parts[1::2]) != sorted(wanted):
            return None
        for query in PROBES:  # the template may do more than put the texts in
            for document in PROBES:
                probe = Pair(query, document, f"{document}do{query}" if with_instruction else None)
                filled = [self._plain(getattr(probe, part)) if at % 2 else part for at, part in enumerate(parts)]
                if "".join(filled) != self.render_by_jinja(probe):
                    return None
        return parts

    def _cut(self, pair: Pair, ids: list[int]) -> list[int]:
        """The ids of a long pair without the end of its document; if the query leaves no room, of its query."""
        if self._document_first:
            without = self._ids(self.render([replace(pair, document="")]))[0]
            if len(without) >= self.max_length:  # the end that must stay is too long itself
                self._suffix("", pair.instruction)
                fitter = Fitter(self.tokenizer, self.template, self.max_length)
                query, document, _ = fitter.fit(pair.query, pair.document, pair.instruction)
                return self._ids(self.render([replace(pair, query=query, document=document)]))[0]
        suffix = self._suffix(pair.query if self._document_first else "", pair.instruction)
        return ids[: self.max_length - len(suffix)] + suffix

    def _suffix(self, query: str, instruction: str | None) -> list[int]:
        """Token ids behind the document. The last result is cached, since instructions rarely differ."""
        if self._last_suffix is None or self._last_suffix[0] != (query, instruction):
            mark = MARKS["document"]
            text = self.render_by_jinja(Pair(query, mark, instruction))
            text = text.partition(mark)[2] if self._document_first else text.rpartition(mark)[2]
            ids = tail_ids(self.tokenizer, text)
            if not query and len(ids) + 16 > self.max_length:
                raise ConfigError(f"MAX_MODEL_LEN={self.max_length} leaves no room beside the template")
            self._last_suffix = (query, instruction), ids
        return self._last_suffix[1]

    # --- the tokenizer ---

    def _ids(self, texts: list[str]) -> list[list[int]]:
        if self._ids_of:
            return self._ids_of(texts)
        if self._backend is None:
            return self.tokenizer(texts)["input_ids"]
        return [encoding.ids for encoding in self._backend.encode_batch_fast(texts)]

    def _encode_segments(self, pairs: list[Pair]) -> list[Prompt]:
        out = self._segments(pairs)
        long = [index for index, prompt in enumerate(out) if len(prompt.ids) > self.max_length]
        if long:
            cut = self._segments([pairs[i] for i in long], truncation="longest_first", max_length=self.max_length)
            for index, prompt in zip(long, cut, strict=True):
                out[index] = replace(prompt, cut=True)
        return out

    def _segments(self, pairs: list[Pair], **truncation) -> list[Prompt]:
        # Lists, as in sentence-transformers: given two strings, transformers ignores an empty second one.
        if self._backend is not None and not truncation:
            kinds_too = "token_type_ids" in self.tokenizer.model_input_names
            encodings = self._backend.encode_batch_fast([(p.query, p.document) for p in pairs])
            return [Prompt(e.ids, n_first=_first_segment(e.type_ids) if kinds_too else None) for e in encodings]
        batch = self.tokenizer([p.query for p in pairs], [p.document for p in pairs], **truncation)
        kinds = batch.get("token_type_ids") or [None] * len(pairs)
        return [Prompt(i, n_first=_first_segment(k)) for i, k in zip(batch["input_ids"], kinds, strict=True)]


def _first_segment(kinds: list[int] | None) -> int | None:
    return kinds.index(1) if kinds and 1 in kinds else None


def _rust_tokenizer(tokenizer):
    """A copy of a fast tokenizer's own `tokenizers.Tokenizer` that never cuts or pads; None for a slow one.

    transformers makes lists of ids, type ids and masks of every text, which takes longer than the tokenizer itself.
    """
    from tokenizers import Tokenizer

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer) or not hasattr(backend, "encode_batch_fast"):
        return None
    copy = Tokenizer.from_str(backend.to_str())
    copy.no_truncation()
    copy.no_padding()
    copy.encode_special_tokens = backend.encode_special_tokens
    return copy


def _fast_ids(plan: Plan, tokenizer) -> Callable[[list[str]], list[list[int]]] | None:
    """Texts to ids by fastokens, if its ids equal this tokenizer's; None if they do not, or if it is switched off."""
    if {**os.environ, **passed_on_env()}.get("VLLM_USE_FASTOKENS", "1") != "1":
        return None
    # The comparison leaves out tokens put around a text, so the tokenizer must not add any.
    if tokenizer("")["input_ids"] or getattr(tokenizer, "split_special_tokens", False):
        return None
    if not fastokens_agrees(plan.checkpoint.path)[0]:
        return None
    import fastokens

    fast = fastokens.Tokenizer.from_file(str(plan.checkpoint.path / "tokenizer.json"))
    fast.no_truncation()
    fast.no_padding()

    def ids_of(texts: list[str]) -> list[list[int]]:
        return [list(e.ids) for e in fast.encode_batch(texts)]

    return ids_of

"""No query, document or instruction writes the prompt: whatever it spells, no control token comes out of its field.

And where no control token is spelled, the prompt has the ids of the model card's own recipe.
"""

import re

import pytest
import tiny_hub_models
import tiny_models
from hypothesis import given, settings
from hypothesis import strategies as st

from rerank_kit.models.card_prompts import PROMPT_IDS, qwen3_prompt_ids
from rerank_kit.models.pair import Pair
from rerank_kit.models.profiles import all_profiles

# Every family that has a template: how its tokenizer is made, its profile.
FAMILIES = {
    "qwen3_reranker": tiny_models.qwen3_tokenizer,
    "mxbai_rerank_v2": tiny_models.qwen3_tokenizer,
    "zerank2": tiny_models.qwen3_tokenizer,
    "qwen3_vl_reranker": tiny_models.qwen3_tokenizer,
    "bge_reranker_v2_gemma": tiny_models.gemma_tokenizer,
    "ctxl_rerank_v2": tiny_models.qwen3_tokenizer,
    "ctxl_rerank_v2_mistral": tiny_hub_models.mistral_tokenizer,
    "llama_nemotron_rerank": tiny_hub_models.llama3_tokenizer,
}
# Its prompt is plain text, and its tokenizer puts nothing before it.
NO_FRAME = ("ctxl_rerank_v2",)
INVISIBLE = "\u200b\u00ad\u2060\ufe0f\u0338"


class Prompt:
    """A family's template, its tokenizer, and the ids that only the template may write."""

    def __init__(self, name, folder):
        from transformers import AutoTokenizer

        FAMILIES[name](folder)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.profile = all_profiles()[name]
        self.template = self.profile.template_text()
        self.added = self.tokenizer.added_tokens_decoder
        # <|fim_prefix|> and its like are not marked as special, but are control tokens all the same.
        self.control = {t.content for t in self.added.values() if t.special or t.content.startswith("<|")}
        self.control_ids = {i for i, t in self.added.items() if t.content in self.control}
        self.frame = self.count("", "", "x")

    def ids(self, query, document, instruction):
        chat = [{"role": "query", "content": query}, {"role": "document", "content": document}]
        more = {"instruction": instruction} if instruction and self.profile.instruction else {}
        text = self.tokenizer.apply_chat_template(chat, chat_template=self.template, tokenize=False, **more)
        return self.tokenizer(text)["input_ids"]

    def count(self, query, document, instruction=None):
        """How many control tokens of each kind the prompt has."""
        ids = self.ids(query, document, instruction)
        return {self.tokenizer.convert_ids_to_tokens(i): ids.count(i) for i in self.control_ids if i in ids}

    def reference_ids(self, query, document, instruction):
        make = PROMPT_IDS.get(self.profile.reference, qwen3_prompt_ids)
        return make(self.tokenizer, Pair(query, document, instruction), None, 10**6)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    return {name: Prompt(name, tmp_path_factory.mktemp(name)) for name in FAMILIES}


def attacks(token):
    """Ways to spell a control token, whole, in pieces, in one another, and with look-alikes."""
    half = len(token) // 2
    yield from (token, token * 3, f"a{token}b", f" {token} ", f"\n{token}\n", token[1:], token[:-1], token.upper())
    for cut in {1, 2, half, len(token) - 1}:
        yield token[:cut] + token + token[cut:]  # taking the inner one out would leave the outer one
        yield token[:cut] + " " + token[cut:]
        for mark in INVISIBLE:
            yield token[:cut] + mark + token[cut:]
    yield token.replace("<", "＜").replace(">", "＞").replace("|", "｜")
    yield token.replace("<", "&lt;").replace(">", "&gt;")
    yield token.replace("_", "\\_")
    yield "".join(f"\\u{ord(char):04x}" for char in token)


@pytest.mark.parametrize("name", FAMILIES)
def test_no_spelling_of_a_control_token_becomes_one(prompts, name):
    prompt = prompts[name]
    assert len(prompt.control) > 8 and bool(prompt.frame) == (name not in NO_FRAME)
    for token in sorted(prompt.control):
        for text in attacks(token):
            assert prompt.count(text, text, text) == prompt.frame, text
        for cut in range(1, len(token)):  # one half at the end of a field, the other at the start of the next
            assert prompt.count("q" + token[:cut], token[cut:] + "d", token[:cut]) == prompt.frame


PIECES = [
    *("<|", "|>", "<", ">", "|", "im_end", "im_start", "endoftext", "<|im_", "_end|>", "<| im_end|>", "<|im_end|>"),
    *("[INST]", "[control_9]", "</s>", "<|eot_id|>", "[ INST]", "<unk>", "reserved_special_token_0"),
    *("<bos>", "<eos>", "<unused", "12>", "<start_of_turn>", "<pad>", "[@BOS@]", "< bos>"),
    *(
        "<think>",
        "</think>",
        "<tool_call>",
        "&lt;",
        "<a href='x'>",
        "a <| b |> c",
        " ",
        "\n",
        "\n\n",
        "x",
        "中",
        "é",
        "e\u0301",
    ),
]
TEXTS = st.lists(st.sampled_from(PIECES) | st.text(max_size=3), max_size=12).map("".join)


@pytest.mark.parametrize("name", FAMILIES)
def test_other_text_keeps_the_ids_of_the_model_card(prompts, name):
    prompt = prompts[name]
    spelled = re.compile(
        "|".join(map(re.escape, [*prompt.control, "<unused", "[control_", "<|reserved_special_token_"]))
    )
    seen = {"spelled": 0, "kept": 0}

    @settings(max_examples=400, deadline=None, derandomize=True)
    @given(TEXTS, TEXTS, TEXTS)
    def judge(query, document, instruction):
        assert prompt.count(query, document, instruction or None) == prompt.frame
        if any(spelled.search(text) for text in (query, document, instruction)):
            seen["spelled"] += 1
            return
        seen["kept"] += 1
        ids = prompt.ids(query, document, instruction)
        if name == "bge_reranker_v2_gemma":
            instruction = ""
            # Its model card joins the ids of the parts, the template tokenizes one text: only where that is the same.
            if re.search(r"\n$", query + document) or query.endswith("\n") or document.endswith("\n"):
                return
        assert ids == prompt.reference_ids(query, document, instruction or None)

    judge()
    assert min(seen.values()) > 50, seen

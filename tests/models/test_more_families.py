"""Further architectures of vLLM's registry: `vllm serve` and vllm.LLM against the model's own library or card.

Within 1e-4 in float32, on the texts of test_families.py. What only TEMPLATE and SCORE_TOKENS can tell is told by them.
"""

import json
import os
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import tiny_hub_models
import tiny_registry
from test_families import (
    ASCII_LONG,
    ENCODER_TEXTS,
    GEMMA_CONTROL,
    INSTRUCTION,
    LONG_QUERY,
    QWEN_CONTROL,
    TEXTS,
    Family,
    offline_scores,
    rerank_scores,
    server_scores,
    serving,
    zerank1,
)
from tiny_models import set_config

from rerank_kit.models.given import for_reference
from rerank_kit.models.opened import opened
from rerank_kit.models.pair import Pair
from rerank_kit.models.reference import _chat_ids, reference_scores
from rerank_kit.models.served_folder import make_adapted
from rerank_kit.models.whole import safetensors_header
from rerank_kit.settings import ConfigError, get_config

# FollowIRReranker of package mteb 2.26.24: its prompt, and the softmax of the tokens "true" and "false".
FOLLOWIR = (
    "{{ bos_token }} [INST] You are an expert Google searcher, whose job is to determine if the following document is "
    "relevant to the query (true/false). Answer using only one word, one of those two choices.\n\n"
    "Query: {{ messages[0].content }}\nDocument: {{ messages[1].content }}\n"
    'Relevant (only output one word, either "true" or "false"): [/INST] '
)
LLAMA_CONTROL = (("a </s> <s>", "b <unk></s>"), ("a < /s> < s>", "b < unk>< /s>"))


def decoder(name: str, head: str = "ForSequenceClassification", template: str | None = tiny_registry.PAIR, **more):
    return partial(tiny_registry.decoder, name=name, head=head, template=template, **more)


def language_model(name: str, control: tuple, words: str, profile: str = "logit_score") -> Family:
    """A language model with a chat template of its own; SCORE_TOKENS says what the file of a library would."""
    settings = (("SCORE_TOKENS", words),)
    return Family(decoder(name, "ForCausalLM"), "my-model", profile, 512, control=control, settings=settings)


def head(name: str, control: tuple, profile: str = "decoder_head") -> Family:
    return Family(decoder(name), "my-model", profile, 512, control=control)


def known(profile: str, make, folder: str) -> Family:
    return Family(make, folder, profile, 512, settings=(("TEMPLATE", ""),), online=False)


FAMILIES = {
    "electra": Family(tiny_registry.electra_cross_encoder, "ms-marco-electra", "cross_encoder", 256, ENCODER_TEXTS),
    "camembert": Family(tiny_registry.camembert_cross_encoder, "camembert", "cross_encoder", 256, ENCODER_TEXTS),
    "ettin": Family(tiny_registry.ettin_reranker, "ettin-reranker-17m-v1", "modernbert_modules", 256, ENCODER_TEXTS),
    "ettin_bias": Family(
        partial(tiny_registry.ettin_reranker, bias=True), "my-ettin", "modernbert_modules", 256, ENCODER_TEXTS
    ),
    "qwen2_head": head("Qwen2", QWEN_CONTROL),
    "qwen3_head": head("Qwen3", QWEN_CONTROL, "qwen3_reranker_seq_cls"),
    "llama_head": head("Llama", LLAMA_CONTROL),
    "mistral_head": head("Mistral", LLAMA_CONTROL),
    "gemma_head": head("Gemma", GEMMA_CONTROL),
    "gemma2_head": head("Gemma2", GEMMA_CONTROL),
    # The template is the user's: nothing in the folder says how a pair is written.
    "template": replace(
        head("Llama", LLAMA_CONTROL), make=decoder("Llama", template=None), settings=(("TEMPLATE", ""),)
    ),
    "followir": Family(
        decoder("Mistral", "ForCausalLM", None),
        "FollowIR-7B",
        "logit_score",
        512,
        control=LLAMA_CONTROL,
        settings=(("TEMPLATE", ""), ("SCORE_TOKENS", "true,false")),
    ),
    # A known family whose prompt alone is another: tokens, head, temperature and divisor stay.
    "nemotron_template": known(
        "llama_nemotron_rerank", tiny_hub_models.llama_nemotron_rerank, "llama-nemotron-rerank-1b"
    ),
    "zerank_template": known("zerank1", zerank1, "zerank-1-small"),
    "qwen2_lm": language_model("Qwen2", QWEN_CONTROL, "yes,no"),
    "llama_lm": language_model("Llama", LLAMA_CONTROL, "true"),
    "gemma_lm": language_model("Gemma", GEMMA_CONTROL, "Yes,No"),
    "gemma3_lm": language_model("Gemma3", GEMMA_CONTROL, "Yes,No"),
    "e5_mistral": Family(tiny_registry.e5_mistral, "e5-mistral", "embedding", 512, (*TEXTS, LONG_QUERY)),
    "nomic_embed": Family(tiny_registry.nomic_embed, "nomic-embed-text-v1.5", "nomic_embed", 256, ENCODER_TEXTS),
    "nomic_transformers": Family(
        partial(tiny_registry.nomic_embed, hub=False), "my-nomic", "nomic_embed", 256, ENCODER_TEXTS
    ),
    "embedding_gemma": Family(
        tiny_registry.embedding_gemma, "embeddinggemma-300m", "embedding_gemma", 512, (*TEXTS, LONG_QUERY)
    ),
}
# Every run takes these, on a server or without one; `python -m pytest -m soak tests/models/test_more_families.py` takes
# all the others, each on a server and without one.
ONLINE, OFFLINE = ("electra", "followir"), ("camembert", "ettin", "nomic_embed")


@pytest.fixture
def family(request, tmp_path) -> tuple[Family, Path]:
    """The family with its settings written out, and its checkpoint."""
    found = FAMILIES[request.param]
    text = FOLLOWIR if request.param == "followir" else "{{ bos_token }}" + tiny_registry.PAIR
    (tmp_path / "own.jinja").write_text(text)
    told = tuple((key, value or str(tmp_path / "own.jinja")) for key, value in found.settings)
    return replace(found, settings=told), found.make(tmp_path / found.folder)


def told(family: Family, monkeypatch):
    """Settings of this process, as the family's servers get them."""
    for key, value in family.settings:
        monkeypatch.setenv(key, value)
    return get_config()


ALL = [pytest.param(n, FAMILIES[n].online, id=n, marks=[pytest.mark.soak] * (n not in ONLINE)) for n in FAMILIES]
ALL += [pytest.param(n, False, id=f"{n}-offline") for n in OFFLINE]


@pytest.mark.server
@pytest.mark.parametrize(("family", "online"), ALL, indirect=["family"])
def test_scores_are_those_of_the_models_library(family, online, fork_server, forked_python, tmp_path, monkeypatch):
    family, model = family
    found = opened(model, told(family, monkeypatch))
    profile = found.profile
    assert profile.name == family.profile
    pairs = [Pair(*text) for text in (*family.texts, ASCII_LONG)]
    wanted = list(pairs)
    if family.control:
        spelled, broken = family.control
        pairs.append(Pair(*spelled))
        wanted.append(Pair(*broken))
    if profile.instruction:
        pairs.append(replace(pairs[0], instruction=INSTRUCTION))
        wanted.append(pairs[-1])
    results, ids = offline_scores(fork_server.command, model, family, pairs, tmp_path)
    given = for_reference(found.checkpoint, profile)
    expected = reference_scores(model, profile.reference, wanted, None, family.max_length, **given)
    assert [r["score"] for r in results] == pytest.approx(expected, abs=1e-4)
    assert max(expected) - min(expected) > 0.1, "scores that do not differ prove nothing"
    if profile.reference == "chat_template" or profile.own_prompt:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
        asked = [_chat_ids(tokenizer, model, p, None, family.max_length, given["template"]) for p in wanted]
        assert ids == asked
    if not online:
        return
    with serving(forked_python, model, family, tmp_path / "log") as ready:
        url = ready()
        some = [i for i, p in enumerate(pairs) if len(p.document) < 1000 or p.document.isascii()]
        scores, lengths = server_scores(url, [pairs[i] for i in some])
        assert scores == pytest.approx([expected[i] for i in some], abs=1e-4)
        empty = [i for i in some if pairs[i].query in ("", "empty document")]
        assert rerank_scores(url, [pairs[i] for i in empty]) == pytest.approx([expected[i] for i in empty], abs=1e-4)
        if profile.reference != "embedding":
            assert lengths == [len(ids[i]) for i in some]


@pytest.mark.soak
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (tiny_registry.distilbert_cross_encoder, "does not dispatch through the Transformers attention interface"),
        (tiny_registry.eurobert_cross_encoder, "named 'dense'"),
    ],
)
def test_heads_that_vllm_does_not_start_are_refused(make, words, fork_server, tmp_path):
    """What profiles/unsupported.json says of them; a release of vLLM that starts them deserves a profile."""
    folder = make(tmp_path / "my-ranker")
    with pytest.raises(ConfigError, match="of a family that cannot be served"):
        opened(folder, get_config())
    family = Family(None, folder.name, "cross_encoder", 256, settings=(("MODEL_PROFILE", "cross_encoder"),))
    with pytest.raises(AssertionError, match=words):
        offline_scores(fork_server.command, folder, family, [Pair("q", "d")], tmp_path)


@pytest.mark.parametrize("modes", [["max"], ["weightedmean"], ["cls", "mean"]])
def test_embedding_gemma_with_another_pooling_is_refused(modes, tmp_path):
    folder = tiny_registry.embedding_gemma(tmp_path / "embeddinggemma-300m")
    assert opened(folder, get_config()).profile.name == "embedding_gemma"
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": modes}))
    with pytest.raises(ConfigError, match="with other pooling than mean, cls or last token"):
        opened(folder, get_config())


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"activation_function": "gelu"}, 'config.json has activation_function="gelu", and nomic-embed-text v1'),
        ({"moe_every_n_layers": 2}, "config.json has moe_every_n_layers=2"),
        ({"qkv_proj_bias": True}, "config.json has qkv_proj_bias=true"),
        ({"n_embd": "64"}, 'config.json has n_embd="64", and .* is expected'),
    ],
)
def test_another_nomic_bert_is_refused(values, words, tmp_path):
    folder = tiny_registry.nomic_embed(tmp_path / "nomic-embed-text-v1.5")
    found = opened(folder, get_config())
    assert found.profile.name == "nomic_embed" and found.checkpoint.max_length == 256
    set_config(folder, **values)
    with pytest.raises(ConfigError, match=words):
        opened(folder, get_config())


@pytest.fixture(scope="module")
def ettin(tmp_path_factory):
    return tiny_registry.ettin_reranker(tmp_path_factory.mktemp("ettin") / "ettin-reranker-17m-v1")


@pytest.mark.parametrize(
    ("file", "values", "words"),
    [
        ("2_Dense/config.json", {"activation_function": "torch.nn.modules.activation.Tanh"}, "2_Dense: in_features"),
        ("2_Dense/config.json", {"out_features": 32}, "2_Dense: in_features"),
        ("3_LayerNorm/config.json", {"dimension": 32}, "3_LayerNorm: dimension is 32, and 64 is needed"),
        ("4_Dense/config.json", {"out_features": 2}, "4_Dense: in_features"),
        ("4_Dense/config.json", {"activation_function": "torch.nn.modules.activation.Sigmoid"}, "4_Dense: in_features"),
        ("config.json", {"norm_eps": 1e-6}, "config.json: norm_eps is 1e-06"),
        ("1_Pooling/config.json", {"pooling_mode": "lasttoken"}, r"pooling is \('lasttoken',\)"),
    ],
)
def test_modules_that_are_no_modernbert_head_are_refused(file, values, words, ettin, tmp_path):
    folder = shutil.copytree(ettin, tmp_path / "mine")
    data = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(data | values))
    with pytest.raises(ConfigError, match=words):
        opened(folder, get_config())


def test_a_head_whose_weights_are_missing_is_refused(ettin, tmp_path):
    folder = shutil.copytree(ettin, tmp_path / "mine")
    (folder / "3_LayerNorm" / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"3_LayerNorm/model\.safetensors is missing: the download is incomplete"):
        opened(folder, get_config())


def test_the_joined_model_is_made_once_and_again_for_other_weights(ettin, tmp_path):
    folder = shutil.copytree(ettin, tmp_path / "mine")
    found = opened(folder, get_config(log_dir=str(tmp_path / "log")))
    make_adapted(found.checkpoint, found.profile, found.folder)
    names = set(safetensors_header(found.folder / "model.safetensors"))
    assert {"head.dense.weight", "head.norm.weight", "classifier.weight", "classifier.bias"} < names
    assert {name for name in names if not name.startswith(("model.", "head.", "classifier."))} == set()
    assert opened(folder, get_config(log_dir=str(tmp_path / "log"))).folder == found.folder
    other = opened(shutil.copytree(folder, tmp_path / "other"), get_config(log_dir=str(tmp_path / "log")))
    make_adapted(other.checkpoint, other.profile, other.folder)
    os.utime(folder / "4_Dense" / "model.safetensors", (1, 1))
    again = opened(folder, get_config(log_dir=str(tmp_path / "log")))
    assert again.folder != found.folder
    make_adapted(again.checkpoint, again.profile, again.folder)
    # The older copy is removed, that of another checkpoint is not, and nothing else is left.
    assert set((tmp_path / "log").iterdir()) == {again.folder, other.folder}
    assert (folder / "model.safetensors").is_file()

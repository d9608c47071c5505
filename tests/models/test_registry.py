"""Every architecture of the installed vLLM is served by a profile, or refused with a reason and what to use instead."""

import ast
import csv
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

from rerank_kit.models.checkpoint import Checkpoint
from rerank_kit.models.profiles import all_profiles, find_profile, load_profiles
from rerank_kit.settings import KIT_DIR, ConfigError

REGISTRY = Path(find_spec("vllm").origin).parent / "model_executor" / "models" / "registry.py"
CAUSAL = {"causal_lm", "capped_logits", "other_causal_lm"}
IMAGES = {"image_model", "visual_retriever", "multimodal", "qwen3_vl_reranker"}
# The families that an architecture of each of the registry's tables may be told to be of. A pattern that catches more
# than it should tells a user something untrue.
KINDS = {
    "_TEXT_GENERATION_MODELS": CAUSAL | {"image_model"},
    "_EMBEDDING_MODELS": CAUSAL
    | IMAGES
    | {"embedding", "embedding_alone", "other_embedding", "nomic", "sparse", "wrapper"},
    "_LATE_INTERACTION_MODELS": IMAGES | {"late_interaction", "listwise"},
    "_REWARD_MODELS": {"reward"},
    "_TOKEN_CLASSIFICATION_MODELS": {"token_classifier"},
    "_SEQUENCE_CLASSIFICATION_MODELS": IMAGES
    | {"cross_encoder", "other_head", "llama_nemotron_rerank", "nemotron_rerank", "nli_head"},
    "_MULTIMODAL_MODELS": IMAGES | {"speech", "encoder_decoder"},
    "_SPECULATIVE_DECODING_MODELS": {"draft_model"},
    "_TRANSFORMERS_SUPPORTED_MODELS": CAUSAL | IMAGES | {"speech"},
    "_TRANSFORMERS_BACKEND_MODELS": {"wrapper", "nli_head"},
    "_PREVIOUSLY_SUPPORTED_MODELS": CAUSAL
    | IMAGES
    | {"other_embedding", "other_head", "nli_head", "token_classifier", "encoder_decoder", "speech", "wrapper"},
    "_OOT_SUPPORTED_MODELS": {"encoder_decoder", "speech"},
}
# The one text model among them that reads images too.
READS_IMAGES = {"HCXVisionV2ForCausalLM"}


@cache
def registry() -> dict[str, list[str]]:
    """{table: architectures} by the text of vLLM's registry; importing it would take seconds."""
    tables = {}
    for statement in ast.parse(REGISTRY.read_text("utf-8")).body:
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Dict):
            names = [key.value for key in statement.value.keys if isinstance(key, ast.Constant)]
            tables[statement.targets[0].id] = names
    return {table: names for table, names in tables.items() if names}


def decided(architecture: str, name: str = "model", **more) -> str:
    """Name of the profile or refusal that the kit decides on."""
    modules = more.pop("modules", ())
    pooling = more.pop("pooling", None)
    more |= more.pop("config", {})
    pylate = more.pop("pylate", None)
    labels = {"id2label": {str(i): "" for i in range(more.pop("labels", 1))}}
    config = {"architectures": [architecture], **labels, **more}
    found = Checkpoint(Path("/m") / name, config, modules, None, pooling, pylate=pylate)
    try:
        return find_profile(found).name
    except ConfigError as exc:
        for refused in all_profiles().values():
            if refused.unsupported and f"{refused.title}: {refused.unsupported}\nuse instead: {refused.instead}" in str(
                exc
            ):
                return refused.name
        return f"neither: {exc}"


def test_the_registry_is_read():
    assert set(registry()) == set(KINDS), "vLLM has other tables: say what their architectures may be"
    assert "Qwen3ForCausalLM" in registry()["_TEXT_GENERATION_MODELS"]
    assert sum(len(names) for names in registry().values()) > 400


@pytest.mark.parametrize("table", KINDS)
@pytest.mark.parametrize("labels", [1, 2])
def test_every_architecture_of_vllm_is_served_or_refused_with_a_remedy(table, labels):
    told = {name: decided(name, labels=labels) for name in registry()[table]}
    assert {name: what for name, what in told.items() if what not in KINDS[table]} == {}
    if table == "_TEXT_GENERATION_MODELS":
        assert {name for name, what in told.items() if what == "image_model"} == READS_IMAGES


def test_an_embedding_model_is_served_or_refused_with_a_remedy():
    """The same folders with the modules of sentence-transformers."""
    told = {
        name: decided(name, modules=("Transformer", "Pooling", "Normalize"), pooling=("mean",))
        for name in registry()["_EMBEDDING_MODELS"]
    }
    assert {name: what for name, what in told.items() if what.startswith("neither")} == {}
    assert {"BertModel", "RobertaModel", "XLMRobertaModel", "ModernBertModel"} <= {
        name for name, what in told.items() if what == "embedding"
    }


def test_electra_is_served_where_no_layer_is_left_out():
    """vLLM 0.32 drops embeddings_project, and its memory is then whatever was there before."""
    head = "ElectraForSequenceClassification"
    assert decided(head, embedding_size=256, hidden_size=256) == "cross_encoder"
    assert decided(head, embedding_size=128, hidden_size=256) == "small_electra"
    assert decided(head, hidden_size=256) == "small_electra", "the default of ElectraConfig is 128"


def test_a_dense_layer_behind_pooling_is_no_late_interaction():
    modules = ("Transformer", "Pooling", "Dense")
    assert decided("LlamaModel", modules=modules, pooling=("mean",)) == "other_embedding"
    assert decided("LlamaModel", modules=("Transformer", "Dense")) == "late_interaction"


def test_camembert_counts_its_positions_as_roberta_does():
    for name in ("CamembertForSequenceClassification", "RobertaForSequenceClassification"):
        config = {"architectures": [name], "max_position_embeddings": 514, "pad_token_id": 1}
        assert Checkpoint(Path("/m"), config, (), None).positions == 512


def test_code_of_the_hub_is_the_last_reason():
    code = {"auto_map": {"AutoModel": "org/code--modeling.Model"}}
    assert decided("SomethingNew", **code) == "code_from_the_hub"
    assert decided("SomethingNew").startswith("neither")
    assert decided("MiniCPMV", **code) == "image_model"


@pytest.mark.parametrize(
    ("architecture", "words"),
    [
        ("Qwen3ForCausalLM", ("MODEL_PROFILE", "TEMPLATE=FILE", "SCORE_TOKENS")),
        ("MistralForCausalLM", ("TEMPLATE=FILE", "SCORE_TOKENS")),
        ("LlamaForSequenceClassification", ("TEMPLATE=FILE", "chat_template.jinja")),
        ("Qwen2ForRewardModel", ("Qwen3-Reranker",)),
        ("T5ForConditionalGeneration", ("encoder-decoder", "Qwen3-Reranker")),
        ("WhisperForConditionalGeneration", ("speech",)),
    ],
)
def test_the_line_says_what_to_do(architecture, words):
    refused = all_profiles()[decided(architecture)]
    said = f"{refused.title} {refused.unsupported} {refused.instead}"
    assert [word for word in words if word not in said] == []


def test_every_refusal_has_a_reason_and_a_remedy():
    for refused in all_profiles().values():
        if refused.unsupported:
            assert refused.title and refused.match and refused.instead, refused.name
            assert not refused.score and refused.name not in load_profiles()
        else:
            assert not refused.fallback and not refused.instead


def public_rerankers() -> list[dict[str, str]]:
    """docs/rerankers.csv: rerankers of public lists, as far as their files are known."""
    with (KIT_DIR / "docs" / "rerankers.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("row", [r for r in public_rerankers() if r["decision"] != "?"], ids=lambda row: row["model"])
def test_a_public_reranker_is_served_or_refused_as_its_page_says(row):
    more = {}
    for word in row["files"].split():
        kind, _, value = word.partition("=")
        if kind == "modules":
            more["modules"] = tuple(value.split("+"))
            more["pooling"] = ("cls",) if "Pooling" in value else None
        elif kind == "pylate":
            more["pylate"] = {}
        elif kind == "pooled":
            more["config"] = {"pooling": value}
        elif value.isdigit():
            more[kind] = int(value)
        else:
            more["auto_map"] = {"AutoConfig": value or "code.Config"}
    labels = int(row["labels"] or 2)
    assert decided(row["architecture"], row["model"].rpartition("/")[2], labels=labels, **more) == row["decision"]


def test_every_row_of_the_public_list_is_whole():
    rows = public_rerankers()
    assert len({row["model"] for row in rows}) == len(rows) > 80
    for row in rows:
        assert row["decision"] == "?" or (row["architecture"] and row["decision"] in all_profiles()), row["model"]
        assert row["architecture"].endswith("ForSequenceClassification") <= bool(
            row["labels"] or row["decision"] == "?"
        )

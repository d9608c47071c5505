"""Families whose hub repositories do not load as they are: recognised, adapted without their code, compared."""

import json
import os

import pytest
import tiny_hub_models
import tiny_models
from conftest import Later

from rerank_kit.engine.machine import Machine
from rerank_kit.engine.plan import plan_service, version_id
from rerank_kit.models.card_prompts import qwen3_vl_prompt_ids
from rerank_kit.models.checkpoint import read_checkpoint
from rerank_kit.models.given import for_reference
from rerank_kit.models.opened import opened
from rerank_kit.models.pair import Pair
from rerank_kit.models.profiles import all_profiles, find_profile
from rerank_kit.models.reference import reference_scores
from rerank_kit.serving.command import serve_args, server_commands
from rerank_kit.settings import ConfigError, get_config

plain_encoders, torch, transformers = (Later(name) for name in ("plain_encoders", "torch", "transformers"))
CPU = Machine("0.32.0+cpu", (), (0, 1), 64 * 2**30)
MODELS = {
    "jina_reranker_v2": tiny_hub_models.jina_reranker_v2,
    "gte_multilingual_reranker": tiny_hub_models.gte_multilingual_reranker,
}
RECIPES = {
    "mxbai_rerank_v2": (tiny_models.mxbai_rerank_v2, "mxbai-rerank-base-v2"),
    "bge_reranker_v2_gemma": (tiny_models.bge_reranker_v2_gemma, "bge-reranker-v2-gemma"),
    "zerank2": (tiny_models.zerank2, "zerank-2"),
    "ctxl_rerank_v2": (tiny_hub_models.ctxl_rerank_v2, "ctxl-rerank-v2-instruct-multilingual-1b"),
    "llama_nemotron_rerank": (tiny_hub_models.llama_nemotron_rerank, "llama-nemotron-rerank-1b-v2"),
}
BOS = {"bge_reranker_v2_gemma": "{{ bos_token }}", "llama_nemotron_rerank": "{{ bos_token }}"}
OWN = "{{ bos_token }}{# query, document #}one: {{ messages[-2].content }} two: {{ messages[-1].content }} answer:"
PAIRS = [Pair("What is the capital of China?", "Beijing."), Pair("中国", "引力 " * 200), Pair("a", ""), Pair("", "b")]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("hub")
    return {name: make(root / f"model-{name}") for name, make in MODELS.items()}


@pytest.mark.parametrize("name", MODELS)
def test_the_reference_computes_what_the_published_code_computes(folders, name):
    folder, plain = folders[name], getattr(plain_encoders, name)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    both = [p.query for p in PAIRS], [p.document for p in PAIRS]
    ids = tokenizer(*both, truncation="longest_first", max_length=256)["input_ids"]
    expected = [torch.tensor(plain(folder, row)).sigmoid().item() for row in ids]
    assert reference_scores(folder, name, PAIRS, None, 256) == pytest.approx(expected, abs=1e-5)
    assert max(expected) - min(expected) > 0.05, "scores that do not differ prove nothing"


@pytest.mark.parametrize("name", MODELS)
def test_the_folder_that_is_served_holds_no_code_but_our_own(folders, name, tmp_path):
    folder, trusted = folders[name], name == "gte_multilingual_reranker"
    (folder / "modeling.py").write_text("raise SystemExit('code of the checkpoint ran')\n")
    plan = plan_service(get_config(log_dir=str(tmp_path)), folder, CPU)
    assert plan.profile.name == name and plan.checkpoint.path == folder
    assert not list(tmp_path.iterdir()), "a plan alone writes nothing"
    server_commands(plan)
    server_commands(plan)  # a restart takes the folder that is there
    served = tmp_path / os.path.basename(plan.engine["model"])
    assert [served] == list(tmp_path.iterdir())
    code = [file.name for file in served.glob("*.py")]
    assert code == (["gte_config.py"] if trusted else [])
    assert plan.engine.get("trust_remote_code", False) == trusted
    # What is running says this folder; check and reference look at the checkpoint behind it.
    assert read_checkpoint(served) == read_checkpoint(folder)
    config = json.loads((served / "config.json").read_text())
    assert "--" not in str(config.get("auto_map", "")), "nothing of the hub is named"


def test_a_tokenizer_with_code_of_its_own_is_refused(tmp_path):
    folder = tiny_hub_models.gte_multilingual_reranker(tmp_path / "gte")
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "auto_map": {"AutoTokenizer": ["x.Y", None]}}))
    plan = plan_service(get_config(log_dir=str(tmp_path / "log")), folder, CPU)
    with pytest.raises(ConfigError, match="tokenizer with code of its own"):
        server_commands(plan)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        # vLLM's class of XLM-RoBERTa with a head knows learnt positions only.
        ("jina_reranker_v2", {"position_embedding_type": "rotary"}),
        ("jina_reranker_v2", {"auto_map": {"AutoConfig": "someone/else--configuration.Config"}}),
        # What vLLM's class leaves out.
        ("gte_multilingual_reranker", {"logn_attention_scale": True}),
        ("gte_multilingual_reranker", {"layer_norm_type": "rms_norm"}),
        ("gte_multilingual_reranker", {"pack_qkv": False}),
    ],
)
def test_a_variant_that_vllm_computes_otherwise_is_refused(name, changes, tmp_path):
    folder = tiny_models.set_config(MODELS[name](tmp_path / "model"), **changes)
    with pytest.raises(ConfigError, match=all_profiles()["own_code"].title.split("(")[0]):
        find_profile(read_checkpoint(folder))


def test_qwen3_vl_is_refused_where_vllm_cannot_import_it(tmp_path, monkeypatch):
    folder = tiny_hub_models.qwen3_vl_reranker(tmp_path / "Qwen3-VL-Reranker-2B")
    monkeypatch.setattr("rerank_kit.models.opened.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="imports torchvision"):
        plan_service(get_config(), folder, CPU)
    monkeypatch.setattr("rerank_kit.models.opened.find_spec", lambda name: object())
    plan = plan_service(get_config(), folder, CPU)
    assert plan.engine["limit_mm_per_prompt"] == {"image": 2, "video": 0}
    assert plan.engine["mm_processor_cache_gb"] == 1
    assert plan.engine["mm_processor_kwargs"] == {"min_pixels": 4096, "max_pixels": 1310720}
    assert json.loads(plan.env["GUARD_IMAGES"]) == plan.profile.images
    assert plan.env["VLLM_MAX_IMAGE_PIXELS"] == "25000000" == plan.env["GUARD_MAX_IMAGE_PIXELS"]
    command = " ".join(serve_args(plan))
    assert '--limit-mm-per-prompt {"image": 2, "video": 0}' in command
    assert "--allowed-media-domains images.invalid --" in command, "vLLM fetches nothing"
    assert plan.engine["max_model_len"] == 2048, "the sizes of the text model count"
    assert "text_config" not in plan.engine["hf_overrides"]
    untied = tiny_hub_models.qwen3_vl_reranker(tmp_path / "Qwen3-VL-Reranker-8B", tied=False)
    overrides = plan_service(get_config(), untied, CPU).engine["hf_overrides"]
    assert overrides["text_config"] == {"tie_word_embeddings": False}
    assert "text_config" not in plan.profile.hf_overrides, "the profile itself stays as it is"


def test_images_are_off_where_they_cannot_be_served(tmp_path, monkeypatch):
    monkeypatch.setattr("rerank_kit.models.opened.find_spec", lambda name: object())
    folder = tiny_hub_models.qwen3_vl_reranker(tmp_path / "Qwen3-VL-Reranker-2B")
    template = tmp_path / "own.jinja"
    template.write_text('{{ messages[0]["content"] }} {{ messages[1]["content"] }}')
    versions = {version_id(plan_service(get_config(), folder, CPU))}
    for settings, why in (
        ({"max_images_per_call": 0}, "MAX_IMAGES_PER_CALL=0"),
        ({"guard": 0}, "GUARD=0"),
        ({"template": str(template)}, "the prompt is not the profile's own"),
    ):
        plan = plan_service(get_config(**settings), folder, CPU)
        assert plan.engine["limit_mm_per_prompt"] == {"image": 0, "video": 0}
        assert "mm_processor_kwargs" not in plan.engine and "GUARD_IMAGES" not in plan.env
        assert why in plan.why["images"] and not plan.images
        assert plan.engine["allowed_media_domains"] == ["images.invalid"]
        versions.add(version_id(plan))
    assert len(versions) >= 3, "images and the prompt decide scores"
    with pytest.raises(ConfigError, match="IMAGE_HOSTS: 'http://a' is no host name"):
        plan_service(get_config(image_hosts="b,http://a"), folder, CPU)


def test_a_service_of_texts_knows_which_profiles_take_images(tmp_path):
    folder = tiny_models.qwen3_reranker(tmp_path / "Qwen3-Reranker-0.6B")
    plan = plan_service(get_config(), folder, CPU)
    assert plan.env["GUARD_IMAGE_PROFILES"] == "qwen3_vl_reranker" and "GUARD_IMAGES" not in plan.env
    assert "allowed_media_domains" not in plan.engine


def test_qwen3_vl_template_and_cut_are_those_of_the_model_card(tmp_path):
    tiny_models.qwen3_tokenizer(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    template = all_profiles()["qwen3_vl_reranker"].template_text()
    for query, document, instruction in (("q", "d", None), ("", "", None), ("a\nb", "中国 ", "Find 判断\nit")):
        chat = [{"role": "query", "content": query}, {"role": "document", "content": document}]
        more = {"instruction": instruction} if instruction else {}
        text = tokenizer.apply_chat_template(chat, chat_template=template, tokenize=False, **more)
        expected = qwen3_vl_prompt_ids(tokenizer, Pair(query, document, instruction))
        assert tokenizer(text)["input_ids"] == expected
    whole = qwen3_vl_prompt_ids(tokenizer, Pair("q", "Gravity attracts bodies. " * 50))
    cut = qwen3_vl_prompt_ids(tokenizer, Pair("q", "Gravity attracts bodies. " * 50), None, 150)
    n_last = len(tokenizer("<|im_end|>\n<|im_start|>assistant\n")["input_ids"])
    assert cut == whole[: 150 - n_last] + whole[-n_last:]


@pytest.mark.parametrize("value", [0, -1.0, "0.5", True])
def test_a_temperature_that_is_no_divisor_is_refused(value, tmp_path):
    folder = tiny_models.set_config(tiny_hub_models.llama_nemotron_rerank(tmp_path / "nemotron"), temperature=value)
    with pytest.raises(ConfigError, match=r"config\.json: temperature is"):
        plan_service(get_config(log_dir=str(tmp_path)), folder, CPU)


def test_temperature_is_told_to_vllm_and_other_pooling_is_refused(tmp_path):
    folder = tiny_hub_models.llama_nemotron_rerank(tmp_path / "nemotron")
    cfg = get_config(log_dir=str(tmp_path))
    assert plan_service(cfg, folder, CPU).engine["pooler_config"] == {"logit_sigma": 0.5}
    tiny_models.set_config(folder, temperature=1.0)
    assert "pooler_config" not in plan_service(cfg, folder, CPU).engine
    tiny_models.set_config(folder, pooling="last")
    with pytest.raises(ConfigError, match="with another pooling"):
        find_profile(read_checkpoint(folder))


def test_a_template_of_its_own_leaves_the_temperature(tmp_path):
    """In the folder, or by TEMPLATE: prompt and head are two things."""
    folder = tiny_hub_models.llama_nemotron_rerank(tmp_path / "nemotron")
    file = tmp_path / "own.jinja"
    file.write_text(OWN)
    cfg = get_config(log_dir=str(tmp_path), template=str(file))
    assert plan_service(cfg, folder, CPU).engine["pooler_config"] == {"logit_sigma": 0.5}
    (folder / "chat_template.jinja").write_text(OWN)
    plan = plan_service(get_config(log_dir=str(tmp_path)), folder, CPU)
    assert plan.engine["pooler_config"] == {"logit_sigma": 0.5} and plan.profile.own_prompt


@pytest.mark.parametrize("in_folder", [False, True])
@pytest.mark.parametrize("profile", RECIPES)
def test_the_reference_of_another_prompt_keeps_the_familys_score(profile, in_folder, tmp_path, monkeypatch):
    """Score tokens, head, divisor and activation are the family's: with its prompt as TEMPLATE its scores come out."""
    asked = []
    monkeypatch.setattr("builtins.input", lambda *_: asked.append("run the custom code? [y/N]") or "n")
    make, name = RECIPES[profile]
    folder, file = make(tmp_path / name), tmp_path / "own.jinja"
    (folder / "modules.json").unlink(missing_ok=True)  # the family is known by the name: no file has the tokens
    (folder / "chat_template.jinja" if in_folder else file).write_text(OWN)
    found = opened(folder, get_config(template=None if in_folder else str(file)))
    assert found.profile.name == profile
    given = for_reference(found.checkpoint, found.profile)
    assert given["own_prompt"] and (given["template"] is None) == in_folder
    pairs = [Pair("What is the capital of China?", "Beijing"), Pair("gravity", "attracts two bodies"), Pair("a", "b")]
    kind, card = found.profile.reference, all_profiles()[profile]
    other = reference_scores(folder, kind, pairs, None, 256, **given)
    text = ("" if "bos_token" in card.template_text() else BOS.get(profile, "")) + card.template_text()
    expected = reference_scores(folder, kind, pairs, None, 256)
    scores = reference_scores(folder, kind, pairs, None, 256, own_prompt=True, template=text)
    assert scores == pytest.approx(expected, abs=1e-5)
    assert other != pytest.approx(expected, abs=1e-3)
    assert not asked


def test_transformers_never_asks_whether_to_run_code(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("builtins.input", lambda *_: asked.append("run the custom code? [y/N]") or "n")
    folder = tiny_hub_models.llama_nemotron_rerank(tmp_path / "nemotron")
    with pytest.raises(ValueError, match="custom code"):
        reference_scores(folder, "sequence_classification", PAIRS, None, 256)
    assert not asked


@pytest.mark.parametrize(
    ("make", "architecture"),
    [(tiny_hub_models.ctxl_rerank_v2, "Qwen3"), (tiny_hub_models.ctxl_rerank_v2_mistral, "Mistral")],
)
def test_ctxl_needs_the_token_that_its_card_scores(make, architecture, tmp_path):
    folder = make(tmp_path / "ctxl-rerank-v2-instruct-multilingual-1b")
    found = read_checkpoint(folder)
    assert find_profile(found).hf_overrides["architectures"] == [f"{architecture}ForSequenceClassification"]
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    names = {i: token for token, i in tokenizer["model"]["vocab"].items()}
    tokenizer["model"]["vocab"] |= {names[0]: 5, names[5]: 0}
    tokenizer["added_tokens"] = [t for t in tokenizer["added_tokens"] if t["id"] not in (0, 5)]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ConfigError, match="which token answers is nowhere written"):
        find_profile(found)


def logit_score_of_id_0(folder):
    """The files of sentence-transformers around a model whose score is the logit of token 0."""
    kinds = ("base.modules.transformer.Transformer", "cross_encoder.modules.logit_score.LogitScore")
    paths = ("", "1_LogitScore")
    modules = [{"path": p, "type": f"sentence_transformers.{k}"} for p, k in zip(paths, kinds, strict=True)]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_LogitScore").mkdir()
    (folder / "1_LogitScore" / "config.json").write_text('{"true_token_id": 0, "false_token_id": null}')
    (folder / "sentence_bert_config.json").write_text('{"modality_config": {"message": {"format": "flat"}}}')
    return folder


@pytest.mark.parametrize("bos", ["{{ bos_token }}", ""])
def test_a_template_of_which_the_server_would_make_other_tokens_is_refused(bos, tmp_path):
    """sentence-transformers puts nothing before a template's text, and Mistral's tokenizer no space behind <s>."""
    folder = logit_score_of_id_0(tiny_hub_models.ctxl_rerank_v2_mistral(tmp_path / "my-ranker"))
    template = bos + "Q: {{ messages[-2].content }} D: {{ messages[-1].content }}"
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(ConfigError, match="makes other tokens of it") as caught:
        plan_service(get_config(log_dir=str(tmp_path)), folder, CPU)
    assert "MODEL_PROFILE=ctxl_rerank_v2_mistral" in str(caught.value)


def test_ctxl_as_sentence_transformers_writes_it(tmp_path):
    """LogitScore with true_token_id 0: in a folder of any name, and before the profile of own templates."""
    folder = logit_score_of_id_0(tiny_hub_models.ctxl_rerank_v2(tmp_path / "my-ranker"))
    template = (
        "Check whether a given document contains information helpful to answer the query.\n<Document> "
        "{{ messages[-1].content }}\n<Query> {{ messages[-2].content }}"
        "{% if messages[0].role == 'system' %} {{ messages[0].content }}{% endif %} ??"
    )
    (folder / "chat_template.jinja").write_text(template)
    plan = plan_service(get_config(log_dir=str(tmp_path)), folder, CPU)
    assert plan.profile.name == "ctxl_rerank_v2" and plan.profile.instruction
    assert "makes the prompts of the checkpoint's chat_template.jinja" in plan.why["template"]
    assert plan.engine["hf_overrides"]["classifier_from_token"] == ["!"]
    (folder / "chat_template.jinja").write_text(template.replace("<Query> ", "<Question> "))
    with pytest.raises(ConfigError, match="MODEL_PROFILE=ctxl_rerank_v2"):
        plan_service(get_config(log_dir=str(tmp_path)), folder, CPU)

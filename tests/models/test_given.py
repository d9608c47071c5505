"""TEMPLATE and SCORE_TOKENS, and checkpoints whose files leave two ways open: a message that names both."""

import json

import pytest
import tiny_hub_models
import tiny_models

from rerank_kit.models.chat_template import render, template_fault
from rerank_kit.models.checkpoint import read_checkpoint
from rerank_kit.models.given import for_reference, with_settings
from rerank_kit.models.profiles import PROFILE_DIR, find_profile, load_profiles
from rerank_kit.models.settled import settle
from rerank_kit.settings import KIT_DIR, ConfigError, get_config

PAIR = "q: {{ messages[-2].content }} d: {{ messages[-1].content }} answer:"
BROKEN = "{% for m in messages if m.role != 'user' %}{{ raise_exception('no role ' ~ m.role) }}{% endfor %}"


def folder(path, architecture, name="model", template=None, **config):
    """The files that the kit looks at before weights: config.json and a tokenizer."""
    path = path / name
    tiny_models.qwen3_tokenizer(path)
    (path / "config.json").write_text(json.dumps({"architectures": [architecture], **config}))
    if template is not None:
        (path / "chat_template.jinja").write_text(template)
    return path


def decided(path, monkeypatch, **env):
    """(checkpoint, profile, settled) as every command decides them."""
    for key, value in env.items():
        monkeypatch.setenv(key, str(value))
    cfg = get_config()
    checkpoint = with_settings(read_checkpoint(path), cfg)
    profile = find_profile(checkpoint, cfg.model_profile)
    return checkpoint, profile, settle(checkpoint, profile, cfg)


def template(tmp_path, text=PAIR):
    file = tmp_path / "own.jinja"
    file.write_text(text)
    return file


ONE = {"id2label": {"0": "LABEL_0"}}


@pytest.mark.parametrize("name", ["Qwen2", "Llama", "Mistral", "Gemma", "Gemma2"])
def test_template_serves_a_head_that_no_file_tells_how_to_ask(name, tmp_path, monkeypatch):
    path = folder(tmp_path, f"{name}ForSequenceClassification", **ONE)
    with pytest.raises(ConfigError, match="use instead: TEMPLATE=FILE"):
        decided(path, monkeypatch)
    file = template(tmp_path)
    _, profile, settled = decided(path, monkeypatch, TEMPLATE=file)
    assert profile.name == "decoder_head" and settled.profile.reference == "chat_template"
    assert settled.template.endswith(PAIR) and "plain(query)" in settled.template
    assert settled.why["template"] == f"TEMPLATE={file}"


def test_template_and_score_tokens_serve_a_language_model(tmp_path, monkeypatch):
    path = folder(tmp_path, "MistralForCausalLM")
    with pytest.raises(ConfigError, match="TEMPLATE=FILE and SCORE_TOKENS=yes,no"):
        decided(path, monkeypatch)
    file = template(tmp_path)
    with pytest.raises(ConfigError) as caught:
        decided(path, monkeypatch, TEMPLATE=file)
    said = str(caught.value)
    assert f"(MistralForCausalLM, TEMPLATE={file}) is of a family" in said
    assert "which token answers is nowhere written" in said and "use instead: SCORE_TOKENS=yes,no" in said
    checkpoint, profile, settled = decided(path, monkeypatch, SCORE_TOKENS="yes,no")
    assert profile.name == "logit_score" and checkpoint.logit_texts == ("yes", "no")
    overrides = settled.profile.hf_overrides
    assert overrides["architectures"] == ["MistralForSequenceClassification"]
    assert overrides["classifier_from_token"] == ["no", "yes"] and overrides["method"] == "from_2_way_softmax"
    assert settled.why["score_tokens"] == "'yes' against 'no' (SCORE_TOKENS)"
    settled = decided(path, monkeypatch, SCORE_TOKENS="yes")[2]
    assert settled.profile.hf_overrides["classifier_from_token"] == ["yes"]
    assert settled.profile.hf_overrides["method"] == "no_post_processing"


def test_template_wins_over_the_prompt_of_a_named_profile(tmp_path, monkeypatch):
    path = folder(tmp_path, "Qwen3ForCausalLM", "Qwen3-Reranker-0.6B")
    assert decided(path, monkeypatch)[2].template.count("Judge whether")
    file = template(tmp_path)
    for env in ({"TEMPLATE": file}, {"MODEL_PROFILE": "qwen3_reranker"}):  # the second beside the first
        _, profile, settled = decided(path, monkeypatch, **env)
        assert profile.name == "qwen3_reranker" and settled.template.endswith(PAIR)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("q: {{ messages[0].content }}", "leaves the document out of the prompt"),
        ("no place", "leaves the query and the document out of the prompt, which is 'no place'"),
        ("{{ messages[0].content", "cannot be rendered for a query and a document (TemplateSyntaxError"),
        (BROKEN, "cannot be rendered for a query and a document (ValueError: no role query)"),
        ("", "leaves the query and the document out"),
    ],
)
def test_a_template_that_makes_no_prompt_is_refused(text, words, tmp_path, monkeypatch):
    path, file = folder(tmp_path, "Qwen3ForCausalLM", "Qwen3-Reranker-0.6B"), template(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        decided(path, monkeypatch, TEMPLATE=file)
    assert f"TEMPLATE={file} {words}" in str(caught.value) and "role query and document" in str(caught.value)


def test_a_template_that_is_no_file_is_refused(tmp_path, monkeypatch):
    path = folder(tmp_path, "Qwen3ForCausalLM", "Qwen3-Reranker-0.6B")
    with pytest.raises(
        ConfigError, match=r"TEMPLATE='no/such\.jinja': there is no file .*/no/such\.jinja; give a Jinja"
    ):
        decided(path, monkeypatch, TEMPLATE="no/such.jinja")
    (tmp_path / "binary.jinja").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read as text"):
        decided(path, monkeypatch, TEMPLATE=tmp_path / "binary.jinja")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("yes,no,maybe", "is not one token, or two that differ"),
        ("yes,yes", "is not one token, or two that differ"),
        ("yes,", "is not one token, or two that differ"),
        ("yes,Nowhere", r"'Nowhere' is no token of .*tokenizer\.json, which makes \["),
    ],
)
def test_score_tokens_that_name_no_tokens_are_refused(value, words, tmp_path, monkeypatch):
    path = folder(tmp_path, "MistralForCausalLM")
    with pytest.raises(ConfigError, match=f"SCORE_TOKENS='{value}'.*{words}"):
        decided(path, monkeypatch, SCORE_TOKENS=value)


def test_settings_that_a_family_cannot_follow_are_refused(tmp_path, monkeypatch):
    bert = folder(tmp_path, "BertForSequenceClassification", "bert", **ONE)
    with pytest.raises(
        ConfigError, match=r"SCORE_TOKENS is set, but .* is no language model that answers with a token"
    ):
        decided(bert, monkeypatch, SCORE_TOKENS="yes,no")
    monkeypatch.delenv("SCORE_TOKENS")
    with pytest.raises(ConfigError, match=r"TEMPLATE set, but profile cross_encoder .* takes the two texts without"):
        decided(bert, monkeypatch, TEMPLATE=template(tmp_path))
    monkeypatch.delenv("TEMPLATE")
    qwen = folder(tmp_path, "Qwen3ForCausalLM", "Qwen3-Reranker-0.6B")
    with pytest.raises(ConfigError, match=r"SCORE_TOKENS names \['yes'\], and profile qwen3_reranker scores by"):
        decided(qwen, monkeypatch, SCORE_TOKENS="yes", MODEL_PROFILE="qwen3_reranker")


def test_score_tokens_alone_say_no_prompt(tmp_path, monkeypatch):
    """The tokens of Qwen3-Reranker in a folder of another name: its prompt is not guessed."""
    path = folder(tmp_path, "Qwen3ForCausalLM", "my-model")
    with pytest.raises(ConfigError) as caught:
        decided(path, monkeypatch, SCORE_TOKENS="yes,no")
    assert "MODEL_PROFILE=qwen3_reranker" in str(caught.value) and "TEMPLATE=FILE" in str(caught.value)


def test_score_tokens_of_no_family_are_named_with_their_setting(tmp_path, monkeypatch):
    path = folder(tmp_path, "MistralForCausalLM", "my-model")
    with pytest.raises(ConfigError, match=r"\(MistralForCausalLM, SCORE_TOKENS=yes\) is of a family") as caught:
        decided(path, monkeypatch, SCORE_TOKENS="yes")
    assert "LogitScore" not in str(caught.value)


def test_every_family_with_tokens_of_its_own_goes_before_logit_score():
    """Its tokens in SCORE_TOKENS fit both, and the family is what they mean."""
    profiles = load_profiles()
    general = profiles["logit_score"]
    architectures = {name for rule in general.match for name in rule["architectures"]}
    own = {
        name
        for name, profile in profiles.items()
        if profile is not general
        and any(
            {"logit_tokens", "logit_texts"} & rule.keys()
            and architectures & set(rule.get("architectures", ()))
            and not rule.get("custom_code")  # which logit_score never takes
            for rule in profile.match
        )
    }
    assert len(own) > 4 and own == set(general.unless)


def test_ctxl_with_its_token_in_score_tokens_is_that_family(tmp_path, monkeypatch):
    path = tmp_path / "ctxl-rerank-v2-instruct-multilingual-6b"
    tiny_hub_models.mistral_tokenizer(path)
    (path / "config.json").write_text(json.dumps({"architectures": ["MistralForCausalLM"]}))
    file = template(tmp_path, "{{ bos_token }} " + PAIR)
    _, profile, settled = decided(path, monkeypatch, TEMPLATE=file, SCORE_TOKENS="<unk>")
    assert profile.name == "ctxl_rerank_v2_mistral" and settled.template.endswith(PAIR)


def edited(tmp_path, name):
    """A user's copy of a profile's template with one word changed."""
    text = (PROFILE_DIR / f"{name}.jinja").read_text("utf-8")
    return template(tmp_path, text.replace("<Document>", "<Passage>"))


def test_an_edited_copy_of_a_profiles_template_takes_the_instruction(tmp_path, monkeypatch):
    path, file = folder(tmp_path, "Qwen3ForCausalLM", "Qwen3-Reranker-0.6B"), edited(tmp_path, "qwen3_reranker")
    chat = [{"role": "query", "content": "<|im_end|>Q"}, {"role": "document", "content": "D"}]
    settled = decided(path, monkeypatch, TEMPLATE=file)[2]
    assert settled.profile.instruction
    prompt = render(settled.template, chat)
    assert "<Instruct>: Given a web search query" in prompt and "<Passage>: D<" in prompt and "<| im_end|>Q" in prompt
    checkpoint, _, settled = decided(path, monkeypatch, INSTRUCTION="Mine <|im_end|>")
    assert "<Instruct>: Mine <| im_end|>\n<Query>" in render(settled.template, chat)
    assert "<Instruct>: of the call\n" in render(settled.template, chat, instruction="of the call")
    # What the reference renders, from messages alone, is the same.
    system = [{"role": "system", "content": "Mine"}]
    told = render(for_reference(checkpoint, settled.profile)["template"], system + chat)
    assert told.replace("<|im_end|>Q", "<| im_end|>Q") == render(settled.template, chat, instruction="Mine")


def test_an_unchanged_copy_of_a_profiles_template_is_that_profiles(tmp_path, monkeypatch):
    path = folder(tmp_path, "Qwen3ForCausalLM", "Qwen3-Reranker-0.6B")
    text = (PROFILE_DIR / "qwen3_reranker.jinja").read_text("utf-8")
    settled = decided(path, monkeypatch, TEMPLATE=template(tmp_path, text), INSTRUCTION="Mine")[2]
    assert settled.template.endswith(text) and '"Mine"' in settled.template


def test_a_template_with_the_document_first_is_refused_plainly(tmp_path, monkeypatch):
    path = folder(tmp_path, "Qwen3ForCausalLM", "ctxl-rerank-v2-instruct-multilingual-1b")
    file = edited(tmp_path, "ctxl_rerank_v2")
    with pytest.raises(ConfigError) as caught:
        decided(path, monkeypatch, TEMPLATE=file, MODEL_PROFILE="ctxl_rerank_v2")
    said = str(caught.value)
    assert said.startswith(f"TEMPLATE={file} puts the document before the query (")
    assert "is served for ctxl_rerank_v2 alone" in said and "TEMPLATE=FILE" not in said
    text = (PROFILE_DIR / "ctxl_rerank_v2.jinja").read_text("utf-8")
    settled = decided(path, monkeypatch, TEMPLATE=template(tmp_path, text))[2]
    assert settled.template == text


def test_what_is_wrong_with_a_given_template_is_said_without_the_folder(tmp_path, monkeypatch):
    path, file = folder(tmp_path, "Qwen3ForCausalLM", "Qwen3-Reranker-0.6B"), template(tmp_path, PAIR + PAIR)
    with pytest.raises(ConfigError) as caught:
        decided(path, monkeypatch, TEMPLATE=file)
    assert str(caught.value).startswith(f"TEMPLATE={file} does not put the query once before the document")


@pytest.mark.parametrize("text", [BROKEN + "{# query document #}", "{{ query }} {{ document }}", "{% query document"])
def test_a_checkpoints_own_template_that_makes_no_prompt_names_both_ways(text, tmp_path, monkeypatch):
    path = folder(tmp_path, "Qwen3ForCausalLM", "Qwen3-Reranker-0.6B", text)
    assert template_fault(read_checkpoint(path))
    with pytest.raises(ConfigError) as caught:
        decided(path, monkeypatch)
    said = str(caught.value)
    assert "chat_template.jinja" in said and "profile qwen3_reranker, whose prompt is" in said
    assert "MODEL_PROFILE=qwen3_reranker" in said and "TEMPLATE=FILE" in said
    assert decided(path, monkeypatch, MODEL_PROFILE="qwen3_reranker")[2].template.count("Judge whether")
    monkeypatch.delenv("MODEL_PROFILE")
    assert decided(path, monkeypatch, TEMPLATE=template(tmp_path))[2].template.endswith(PAIR)


def test_a_broken_template_of_a_head_is_named(tmp_path, monkeypatch):
    path = folder(tmp_path, "LlamaForSequenceClassification", template="{{ query }} {{ document }}", **ONE)
    with pytest.raises(ConfigError, match=r"whose chat_template\.jinja leaves the query and the document out"):
        decided(path, monkeypatch)


def test_files_that_fit_two_families_name_both(tmp_path, monkeypatch):
    path = folder(tmp_path, "Qwen3ForCausalLM", "Qwen3-Reranker-0.6B-embedding")
    modules = [{"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"}]
    (path / "modules.json").write_text(json.dumps(modules))
    (path / "1_Pooling").mkdir()
    (path / "1_Pooling" / "config.json").write_text('{"pooling_mode": "lasttoken"}')
    with pytest.raises(ConfigError) as caught:
        decided(path, monkeypatch)
    said = str(caught.value)
    assert "fits several profiles: set MODEL_PROFILE" in said and "TEMPLATE=FILE" in said
    named = [line.split(":")[0].strip() for line in said.splitlines()[1:]]
    assert named == ["embedding", "qwen3_reranker"]
    assert decided(path, monkeypatch, MODEL_PROFILE="embedding")[1].name == "embedding"


def test_code_beside_a_checkpoint_is_never_run(tmp_path, monkeypatch):
    code = {"auto_map": {"AutoConfig": "code.Config", "AutoModelForSequenceClassification": "code.Model"}}
    path = folder(tmp_path, "SomethingNewForRanking", **ONE, **code)
    (path / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(ConfigError, match="which the kit never runs"):
        decided(path, monkeypatch)
    assert not (tmp_path / "ran").exists()


def test_the_template_in_the_docs_is_followirs_prompt():
    """The recipe of FollowIRReranker in package mteb 2.26.24; its <s> is the tokenizer's, as for every template."""
    text = (KIT_DIR / "docs" / "scores.md").read_text("utf-8").partition("```jinja\n")[2].partition("```")[0]
    chat = [{"role": "query", "content": "QUERY"}, {"role": "document", "content": "DOC"}]
    assert render(text, chat, {"bos_token": "<s>"}) == (
        "<s> [INST] You are an expert Google searcher, whose job is to determine if the following document is relevant "
        "to the query (true/false). Answer using only one word, one of those two choices.\n\nQuery: QUERY\nDocument: "
        'DOC\nRelevant (only output one word, either "true" or "false"): [/INST] '
    )


def test_logits_that_the_model_changes_afterwards_are_refused(tmp_path, monkeypatch):
    file = template(tmp_path)
    path = folder(tmp_path, "Gemma3ForCausalLM", final_logit_softcapping=30.0)
    with pytest.raises(ConfigError, match=r"config\.json has final_logit_softcapping=30\.0, which changes the logits"):
        decided(path, monkeypatch, TEMPLATE=file, SCORE_TOKENS="yes,no")
    path = folder(tmp_path, "Gemma3ForCausalLM", "plain", final_logit_softcapping=None)
    assert decided(path, monkeypatch)[1].name == "logit_score"


@pytest.mark.parametrize("architecture", ["LlamaForSequenceClassification", "MistralForCausalLM", "CohereForCausalLM"])
def test_settings_do_not_unlock_code_of_the_hub(architecture, tmp_path, monkeypatch):
    code = {"auto_map": {"AutoConfig": "code.Config"}}
    path = folder(tmp_path, architecture, **ONE, **code)
    env = {"SCORE_TOKENS": "yes,no"} if architecture.endswith("LM") else {}
    with pytest.raises(ConfigError, match="which the kit never runs"):
        decided(path, monkeypatch, TEMPLATE=template(tmp_path), **env)

"""What is served where a profile and the checkpoint's own files both speak: the files win, or the start is refused.

An explicit MODEL_PROFILE is the user's own word on prompt and score tokens, and wins over the files.
"""

from dataclasses import dataclass, field, replace

from rerank_kit.models.chat_template import (
    DOCUMENT,
    QUERY,
    PairTemplate,
    agrees,
    pair_template,
    render,
    served_text,
    template_fault,
)
from rerank_kit.models.checkpoint import Checkpoint
from rerank_kit.models.colbert import FILE, late_of
from rerank_kit.models.joined_head import head_config
from rerank_kit.models.nomic import nomic_config
from rerank_kit.models.profiles import Profile
from rerank_kit.settings import ConfigError, EnvConfig

SIGMOID = "torch.nn.modules.activation.Sigmoid"
IDENTITY = "torch.nn.modules.linear.Identity"
LOGIT_STEPS = ("final_logit_softcapping", "logit_scale", "logits_scaling")  # of Gemma, Cohere, Granite
BARE = "{{ messages[0]['content'] }}{{ messages[1]['content'] }}"


@dataclass(frozen=True)
class Settled:
    """A profile made to fit one checkpoint."""

    profile: Profile
    template: str | None  # Jinja text with its default instruction; None = the tokenizer's own format
    why: dict[str, str] = field(default_factory=dict)  # choice -> one line with the file that it comes from


def settle(checkpoint: Checkpoint, profile: Profile, cfg: EnvConfig) -> Settled:
    """Decide prompt, instruction, score tokens and activation.

    Raises:
        ConfigError: the files say something that cannot be served as they say it; names file, key and remedy.
    """
    why: dict[str, str] = {}
    own = pair_template(checkpoint)
    if not cfg.model_profile and (profile.template or profile.own_template):
        _refuse_fault(checkpoint, profile)
    if profile.template is None and not profile.own_template:
        _refuse_prompts(checkpoint, profile, own)
        template = profile.template_text(cfg.instruction)
    else:
        profile, template = _prompt(checkpoint, profile, own, cfg, why)
    overrides = dict(profile.hf_overrides)
    if checkpoint.logit_tokens and profile.convert is None:
        why["score_tokens"] = _score_tokens(checkpoint, profile, overrides, explicit=cfg.model_profile is not None)
    if profile.convert is None and not profile.listwise:
        _activation(checkpoint, profile, overrides, why)
    said = checkpoint.similarity
    if profile.reference == "late_interaction":
        profile = replace(profile, late=late_of(checkpoint, cfg.max_model_len))
        _say_late(profile, why)
    elif profile.convert == "embed" and said and said.value not in ("cosine", "dot" if _normalizes(checkpoint) else ""):
        why["similarity"] = (
            f"cosine, as for every embedding model; {said.source} is {said.value}, which ranks otherwise"
        )
    if "XLMRobertaModel" in checkpoint.architectures and "position_embedding_type" not in checkpoint.config:
        # transformers 5 leaves it out, and vLLM 0.32 dies without it ('XLMRobertaConfig' object has no attribute ...).
        overrides["position_embedding_type"] = "absolute"
        why["position_embedding_type"] = "absolute: transformers 5 no longer writes it, and vLLM asks for it"
    if "CamembertForSequenceClassification" in checkpoint.architectures:
        # The same layers and names as RoBERTa's. vLLM 0.32's Transformers backend would count its positions from 0.
        overrides["architectures"] = ["RobertaForSequenceClassification"]
        why["architectures"] = "RoBERTa's, which computes CamemBERT's layers; vLLM has none of that name"
    pooler = dict(profile.pooler_config)
    if profile.reference == "llama_bidirectional":
        _temperature(checkpoint, pooler, why)
    changes = dict(profile.config_changes)
    if profile.joined_head:
        changes |= head_config(checkpoint)
        why["head"] = "the modules behind Pooling, in one file with the encoder under the names of ModernBERT's head"
    if "NomicBertModel" in checkpoint.architectures:
        changes |= nomic_config(checkpoint)
        overrides["rotary_emb_scale_base"] = None  # vLLM asks for it, and null in config.json is no key there
        why["config.json"] = "sizes under the names of transformers and vLLM; the file has those of code from the hub"
    changed = replace(profile, hf_overrides=overrides, pooler_config=pooler, config_changes=changes)
    return Settled(changed, template, why)


def _say_late(profile: Profile, why: dict[str, str]) -> None:
    late = profile.late
    assert late is not None
    fills = ", filled with [MASK]" if late.expansion is not None else ""
    why["texts"] = (
        f"queries of {late.query_length} tokens at most{fills}, documents of {late.document_length}; "
        f"{len(late.skip)} tokens of a document are no match ({FILE}: skiplist_words)"
    )
    prompts = [text for text in (late.query_prompt, late.document_prompt) if text]
    if prompts:
        why["prompts"] = f"before query and document: {', '.join(map(repr, prompts))} ({FILE}: prompts)"


def _temperature(checkpoint: Checkpoint, pooler: dict, why: dict[str, str]) -> None:
    """NVIDIA's head divides its logit by config.json's temperature, which vLLM 0.32 does not read."""
    value = checkpoint.config.get("temperature")
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise ConfigError(f"{checkpoint.path}/config.json: temperature is {value!r}, and a number above 0 is expected")
    if value == 1:
        return
    pooler["logit_sigma"] = float(value)
    why["logit_sigma"] = f"{value}: temperature of config.json, by which the head's logit is divided"


def _normalizes(checkpoint: Checkpoint) -> bool:
    return "Normalize" in checkpoint.modules


def _prompt(
    checkpoint: Checkpoint, profile: Profile, own: PairTemplate | None, cfg: EnvConfig, why: dict[str, str]
) -> tuple[Profile, str]:
    """The profile with what its prompt takes, and the template."""
    said = checkpoint.default_prompt
    instruction = cfg.instruction or (said.value if said else None)
    if profile.own_template and own is None:
        raise ConfigError(f"{checkpoint.path}: {_no_prompt(checkpoint)}")
    explicit = cfg.model_profile is not None and not profile.own_template and "TEMPLATE" not in checkpoint.given
    same = (
        own is not None and not profile.own_template and agrees(own, profile.template_text() or "", profile.instruction)
    )
    if explicit:
        differs = f"; {own.source} has another one" if own and not same else ""
        why["template"] = f"that of profile {profile.name}, by MODEL_PROFILE{differs}"
    elif own is None:
        _need_a_hint(checkpoint, profile)
        base = checkpoint.base_model
        hint = f"; its base is {base.value} ({base.source})" if base else ""
        why["template"] = f"that of profile {profile.name}: no file of the checkpoint says how it writes a pair{hint}"
    elif same:
        why["template"] = f"that of profile {profile.name}, which makes the prompts of the checkpoint's {own.source}"
    else:
        return _own_prompt(checkpoint, profile, own, instruction, cfg, why)
    if instruction and not profile.instruction:
        _refuse_instruction(checkpoint, cfg, f"profile {profile.name} takes none")
    _say_instruction(instruction, cfg, checkpoint, why)
    return profile, profile.template_text(instruction) or ""


def _own_prompt(
    checkpoint: Checkpoint,
    profile: Profile,
    own: PairTemplate,
    instruction: str | None,
    cfg: EnvConfig,
    why: dict[str, str],
) -> tuple[Profile, str]:
    """The checkpoint's own template, and a profile that takes an instruction only if that template does."""
    if instruction and not own.instruction:
        _refuse_instruction(checkpoint, cfg, f"{own.source} uses no message of role system, which carries it")
    try:
        template = served_text(own, checkpoint, instruction)
    except ConfigError as exc:
        raise ConfigError(f"{exc}\n{_both(own, profile)}\n{_choose(profile)}") from exc
    others = "" if profile.own_template else f"; profile {profile.name} has another prompt"
    whose = "" if "TEMPLATE" in checkpoint.given else "the checkpoint's own: "
    why["template"] = f"{whose}{own.source}{others}"
    _say_instruction(instruction, cfg, checkpoint, why)
    return replace(profile, instruction=own.instruction, own_prompt=True), template


def _say_instruction(instruction: str | None, cfg: EnvConfig, checkpoint: Checkpoint, why: dict[str, str]) -> None:
    if instruction and checkpoint.default_prompt and not cfg.instruction:
        why["instruction"] = f"{instruction!r} ({checkpoint.default_prompt.source})"
    elif instruction:
        more = f"; {checkpoint.default_prompt.source} has another" if checkpoint.default_prompt else ""
        why["instruction"] = f"INSTRUCTION{more}"


def _refuse_instruction(checkpoint: Checkpoint, cfg: EnvConfig, reason: str) -> None:
    if cfg.instruction:
        raise ConfigError(f"INSTRUCTION is set, but {reason}: unset INSTRUCTION")
    said = checkpoint.default_prompt
    assert said is not None
    raise ConfigError(
        f"{checkpoint.path}/{said.source} is the default prompt {said.value!r}, and {reason}: the scores would not be "
        "those of the library that saved it; set default_prompt_name to null if the model was trained without it"
    )


def _refuse_prompts(checkpoint: Checkpoint, profile: Profile, own: PairTemplate | None) -> None:
    """A family without template cannot follow a default prompt or a chat template."""
    if checkpoint.given:
        raise ConfigError(
            f"{' and '.join(checkpoint.given)} set, but profile {profile.name} ({profile.title}) takes the two texts "
            "without a prompt: unset it, or set MODEL_PROFILE to the family that the model is of"
        )
    said = checkpoint.default_prompt
    embeds = profile.convert == "embed"
    if said is not None:
        where = "every text" if embeds else "the query"
        raise ConfigError(
            f"{checkpoint.path}/{said.source} is the default prompt {said.value!r}, which sentence-transformers puts "
            f"before {where}; profile {profile.name} adds no prompt. Set default_prompt_name to null in that file and "
            f"write the prompt into {where} yourself, or null alone if the model was trained without it"
        )
    template = checkpoint.chat_template
    if checkpoint.has_modules and template is not None and (embeds or own is not None):
        raise ConfigError(
            f"{checkpoint.path}: sentence-transformers renders each text through {template.source} (modality_config "
            f"names message), and profile {profile.name} has no template: such a model is not served. If it was "
            "trained without template, remove message from modality_config in sentence_bert_config.json"
        )


def _need_a_hint(checkpoint: Checkpoint, profile: Profile) -> None:
    """Without a template in the files, the folder's name is the last hint at the prompt."""
    if (checkpoint.has_modules or checkpoint.given) and not profile.named(checkpoint):
        raise ConfigError(
            f"{checkpoint.path}: {_no_prompt(checkpoint)}. Profile {profile.name}, which its score tokens fit, makes\n"
            f"  {render(profile.template_text() or '', _messages())!r}\n{_choose(profile)}"
        )


def _refuse_fault(checkpoint: Checkpoint, profile: Profile) -> None:
    """A template that was made for pairs and makes no prompt of one: what it was meant to say is not known."""
    fault = template_fault(checkpoint)
    if fault and not checkpoint.has_modules:
        said = checkpoint.chat_template
        prompt = f", whose prompt is {render(profile.template_text() or '', _messages())!r}" if profile.template else ""
        raise ConfigError(
            f"{checkpoint.path}: {said.source if said else ''} {fault}. The files fit profile {profile.name}{prompt}: "
            f"set MODEL_PROFILE={profile.name} if the model was trained with that, or TEMPLATE=FILE with its own"
        )


def _no_prompt(checkpoint: Checkpoint) -> str:
    if checkpoint.chat_template is not None:
        fault = template_fault(checkpoint) or "was not made for a query and a document"
        return (
            f"{checkpoint.chat_template.source} {fault} (messages of role query and document), so no file says how a "
            "pair is written; put the template that the model was trained with into chat_template.jinja or "
            "TEMPLATE=FILE, or set MODEL_PROFILE to the family whose prompt it has"
        )
    return (
        "it has no chat template, so sentence-transformers scores query and document joined, without any prompt: "
        f"{render(BARE, _messages())!r}, which is not served; put the template that it was trained with into "
        "chat_template.jinja or TEMPLATE=FILE, or set MODEL_PROFILE to the family whose prompt it has"
    )


def _choose(profile: Profile) -> str:
    return (
        f"if the model was trained with the profile's prompt, set MODEL_PROFILE={profile.name}; if not, put the "
        "template that it was trained with into chat_template.jinja or TEMPLATE=FILE"
    )


def _both(own: PairTemplate, profile: Profile) -> str:
    """The two prompts of one pair, for a message."""
    prompts = [f"  {own.source}: {own.render(QUERY, DOCUMENT)!r}"]
    if profile.template:
        prompts.append(f"  profile {profile.name}: {render(profile.template_text() or '', _messages())!r}")
    text = "\n".join(prompts)
    return text.replace("\\ue000", "QUERY").replace("\\ue001", "DOCUMENT")


def _messages() -> list[dict]:
    return [{"role": "query", "content": "QUERY"}, {"role": "document", "content": "DOCUMENT"}]


def _score_tokens(checkpoint: Checkpoint, profile: Profile, overrides: dict, *, explicit: bool) -> str:
    """Put the tokens of the LogitScore module into hf_overrides; one line about them."""
    ids, texts = checkpoint.logit_tokens, checkpoint.logit_texts
    assert ids is not None
    file = "the LogitScore module's config.json"
    if "SCORE_TOKENS" in checkpoint.given:
        file = "SCORE_TOKENS"
        own = [text for text in reversed(texts or ()) if text is not None]
        if not profile.own_template and own != profile.hf_overrides.get("classifier_from_token"):
            raise ConfigError(
                f"SCORE_TOKENS names {own}, and profile {profile.name} scores by "
                f"{profile.hf_overrides.get('classifier_from_token')}: unset SCORE_TOKENS, or MODEL_PROFILE"
            )
    elif explicit and not profile.own_template:
        return f"those of profile {profile.name}, by MODEL_PROFILE; {file} has {ids}"
    if ids[0] is None or texts is None or texts[0] is None or (ids[1] is not None and texts[1] is None):
        if not profile.own_template:
            return f"those of profile {profile.name}; {file} has {ids}"
        raise ConfigError(
            f"{checkpoint.path}: {file} has true_token_id={ids[0]} and false_token_id={ids[1]}, and the tokenizer has "
            "no such tokens: take the tokenizer that belongs to the model"
        )
    true, false = texts
    capped = next((key for key in LOGIT_STEPS if checkpoint.config.get(key) not in (None, 1)), None)
    if capped and profile.own_template:
        raise ConfigError(
            f"{checkpoint.path}: config.json has {capped}={checkpoint.config[capped]}, which changes the logits; vLLM "
            "leaves that out where it makes a score of them, so such a model is not served"
        )
    if profile.own_template:
        architecture = checkpoint.architectures[0].replace("ForCausalLM", "ForSequenceClassification")
        overrides["architectures"] = [architecture]
        overrides["classifier_from_token"] = [true] if false is None else [false, true]
        overrides["method"] = "no_post_processing" if false is None else "from_2_way_softmax"
    return f"{true!r}{'' if false is None else f' against {false!r}'} ({file})"


def _activation(checkpoint: Checkpoint, profile: Profile, overrides: dict, why: dict[str, str]) -> None:
    """The function from the head's logit to the score, always told to vLLM where config.json might mislead it."""
    if checkpoint.config.get("problem_type"):
        overrides["problem_type"] = None  # vLLM 0.32 drops the sigmoid for "regression", which Trainer writes
        why["problem_type"] = (
            f"{checkpoint.config['problem_type']!r} of config.json is about training; it changes no score"
        )
    said = checkpoint.activation
    wanted = said.value if said else SIGMOID
    short = wanted.rpartition(".")[2]
    if profile.template or profile.own_template:
        sigmoid = profile.activation == "Sigmoid"
        reason = (
            "sigmoid, as the profile's scores are 0 to 1" if sigmoid else "none: the logit, as the model card has it"
        )
        if short not in (("Sigmoid", "Softmax") if sigmoid else ("Identity",)) and (said or sigmoid):
            reason += f"; sentence-transformers gives {short} of the logit ({said.source if said else ''})"
            reason += ", which ranks alike" if short in ("Identity", "Sigmoid") else ""
        why["activation"] = reason
        wanted = SIGMOID if sigmoid else IDENTITY
    else:
        names = {"Sigmoid": SIGMOID, "Identity": IDENTITY}
        wanted = names.get(short, wanted)
        if not wanted.startswith("torch.nn.modules."):
            raise ConfigError(
                f"{checkpoint.path}/{said.source if said else ''} is {wanted}, and vLLM takes functions of "
                "torch.nn.modules alone: name the same function from there"
            )
        why["activation"] = f"{short} ({said.source})" if said else "Sigmoid: the files name none"
    if wanted != _vllm_reads(checkpoint):
        overrides["sentence_transformers"] = {"activation_fn": wanted}


def _vllm_reads(checkpoint: Checkpoint) -> str:
    """The activation that vLLM 0.32 takes from config.json by itself. Source: get_act_fn() in pooler/activations.py."""
    own = checkpoint.config.get("sentence_transformers") or {}
    if "activation_fn" in own:
        return own["activation_fn"] or ""
    return checkpoint.config.get("sbert_ce_default_activation_function") or SIGMOID

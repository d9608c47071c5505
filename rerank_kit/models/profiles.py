"""Finds the profile in profiles/ that serves a checkpoint correctly."""

import json
import re
from dataclasses import dataclass, field

from rerank_kit.models.chat_template import agrees, pair_template, template_fault
from rerank_kit.models.checkpoint import Checkpoint, load_tokenizer
from rerank_kit.models.late import Late
from rerank_kit.settings import KIT_DIR, ConfigError

PROFILE_DIR = KIT_DIR / "profiles"


@dataclass(frozen=True)
class Profile:
    """How one model family is recognised, prompted and scored; one JSON file in profiles/.

    A family with `unsupported` set (profiles/unsupported.json) is recognised and refused with that reason.
    """

    name: str
    title: str
    match: tuple[dict, ...]
    hf_overrides: dict = field(default_factory=dict)
    template: str | None = None
    instruction: bool = False
    score: str = ""
    reference: str = ""
    convert: str | None = None
    # vLLM 0.32 dies on encoder-only models with prefix caching ("at least one cacheable group").
    prefix_caching: bool = False
    pooler_config: dict = field(default_factory=dict)
    # Further keyword arguments of vllm.LLM, which are flags of vllm serve too.
    engine: dict = field(default_factory=dict)
    # How the family resizes images, for images.Sizes; empty = it scores texts only.
    images: dict = field(default_factory=dict)
    # A Python package that vLLM imports for this family and that the CPU build leaves out.
    needs: str | None = None
    # Changes to config.json, by which vLLM chooses its configuration class (None removes a key), and the kit's file
    # that defines this class: see adapted_folder() in served_folder.py.
    config_changes: dict = field(default_factory=dict)
    config_file: str | None = None
    # Encoder and head are put into one weight file in the adapted folder: see joined_head.py.
    joined_head: bool = False
    unsupported: str | None = None
    instead: str = ""  # what to use in place of a family that is refused
    # The family's row in README's table: family, example, score, images.
    readme: dict = field(default_factory=dict)
    # Counts only where no other profile or refusal fits: the first such family in the file's order.
    fallback: bool = False
    # Profiles that take precedence when both they and this profile (or refusal) match.
    unless: tuple[str, ...] = ()
    # The prompt is the checkpoint's own chat template, whatever it says, and the score tokens are its LogitScore's.
    own_template: bool = False
    # Set by settle(): the checkpoint's chat template or TEMPLATE replaces `template`; the rest is the family's.
    own_prompt: bool = False
    # A score depends on the other documents of the call: lists are never split, and pairs alone are not scored offline.
    listwise: bool = False
    # Set by settle(): how a late interaction model reads its two texts.
    late: Late | None = None
    # Of a family with a prompt: the function from the head's logit to the score, Sigmoid or Identity.
    activation: str = "Sigmoid"

    def named(self, checkpoint: Checkpoint) -> bool:
        """Whether the folder's or hub's name is one of this family."""
        names = [checkpoint.name, checkpoint.base_model.value if checkpoint.base_model else ""]
        known = [rule[key] for rule in self.match for key in ("name", "base_model") if key in rule]
        return any(re.search(pattern, name, re.IGNORECASE) for pattern in known for name in names)

    def template_text(self, instruction: str | None = None) -> str | None:
        """The Jinja score template; `instruction` replaces the family's default instruction."""
        if self.template is None:
            if instruction:
                raise ConfigError(f"INSTRUCTION is set, but profile {self.name} takes none: unset INSTRUCTION")
            return None
        text = (PROFILE_DIR / self.template).read_text("utf-8")
        if instruction:
            # An instruction that a call brings takes precedence over the configured one.
            default = json.dumps(instruction, ensure_ascii=False)
            text = "{%- set instruction = instruction | default(" + default + ", true) -%}" + text
        return text


def all_profiles() -> dict[str, Profile]:
    """Every profile in profiles/*.json by name, with the refused ones; unsupported.json holds several."""
    out = {}
    for path in sorted(PROFILE_DIR.glob("*.json")):
        data = json.loads(path.read_text("utf-8"))
        for name, item in data.items() if path.stem == "unsupported" else [(path.stem, data)]:
            tuples = {key: tuple(item[key]) for key in ("match", "unless") if key in item}
            out[name] = Profile(name=name, **{**item, **tuples})
    return out


def load_profiles() -> dict[str, Profile]:
    """The profiles that are served, by name."""
    return {name: profile for name, profile in all_profiles().items() if not profile.unsupported}


def find_profile(checkpoint: Checkpoint, wanted: str | None = None) -> Profile:
    """The profile of a checkpoint: `wanted` (MODEL_PROFILE) if given, else the one that its files match.

    Raises:
        ConfigError: the name is unknown, the family cannot be served (the message has the reason), or the checkpoint
            fits no profile or several (the message lists the profiles).
    """
    known = all_profiles()
    profiles = {name: p for name, p in known.items() if not p.unsupported}
    listing = "".join(f"\n  {p.name}: {p.title}" for p in profiles.values())
    if wanted:
        if wanted in known and known[wanted].unsupported:
            why, instead = known[wanted].unsupported, known[wanted].instead
            raise ConfigError(f"MODEL_PROFILE={wanted!r} cannot be served: {why}; use instead: {instead}")
        if wanted not in profiles:
            raise ConfigError(f"MODEL_PROFILE={wanted!r} is unknown; the profiles are:{listing}")
        return profiles[wanted]
    fits = _matches(checkpoint, known)
    what = f"{checkpoint.path} ({', '.join(checkpoint.architectures) or 'no architecture'}"
    what += f", {checkpoint.num_labels} labels" if "id2label" in checkpoint.config else ""
    what += f"{_told(checkpoint)})"
    fault = template_fault(checkpoint)
    if fault and checkpoint.chat_template and not checkpoint.has_modules:
        what += f", whose {checkpoint.chat_template.source} {fault},"
    names = {p.name for p in fits if not p.unsupported}
    served = [p for p in fits if not p.unsupported and not names & set(p.unless)]
    refused = next((p for p in fits if p.unsupported and not names & set(p.unless)), None)
    if refused:
        raise ConfigError(
            f"{what} is of a family that cannot be served, {refused.title}: {refused.unsupported}\n"
            f"use instead: {refused.instead}\n"
            f"profiles that are served: {', '.join(profiles)}"
        )
    if len(served) == 1:
        return served[0]
    if len(served) > 1:
        listing = "".join(f"\n  {p.name}: {p.title}" for p in served)
        raise ConfigError(
            f"{what} fits several profiles: set MODEL_PROFILE to the one that the model is of "
            f"(its prompt alone may be another: TEMPLATE=FILE):{listing}"
        )
    raise ConfigError(f"{what} fits no profile; if you know which one is right, set MODEL_PROFILE to one of:{listing}")


def _told(checkpoint: Checkpoint) -> str:
    """Score tokens and given template, each with the place that names it."""
    said = checkpoint.chat_template
    out = f", {said.source}" if said and "TEMPLATE" in checkpoint.given else ""
    tokens = checkpoint.logit_texts or checkpoint.logit_tokens
    if tokens and "SCORE_TOKENS" in checkpoint.given:
        return f"{out}, SCORE_TOKENS={','.join(str(token) for token in tokens if token is not None)}"
    return f"{out}, LogitScore {tokens}" if tokens else out


def _matches(checkpoint: Checkpoint, known: dict[str, Profile]) -> list[Profile]:
    """Profiles and refusals that fit a checkpoint; where none does, those that are a fallback, first one first."""
    fits = [p for p in known.values() if any(_fits(checkpoint, rule) for rule in p.match)]
    return [p for p in fits if not p.fallback] or fits


def _has_prompt_of(checkpoint: Checkpoint, template: str) -> bool:
    own = pair_template(checkpoint)
    return own is not None and agrees(own, (PROFILE_DIR / template).read_text("utf-8"), own.instruction)


def _has_tokens(checkpoint: Checkpoint, tokens: dict[str, int]) -> bool:
    """The tokenizer has these tokens with these ids."""
    if not (checkpoint.path / "tokenizer.json").is_file():
        return False
    tokenizer = load_tokenizer(checkpoint.path)
    return all(tokenizer.token_to_id(token) == number for token, number in tokens.items())


def _first_token(checkpoint: Checkpoint) -> str | None:
    """The token with id 0, by tokenizer.json."""
    return load_tokenizer(checkpoint.path).id_to_token(0) if (checkpoint.path / "tokenizer.json").is_file() else None


def _fits(checkpoint: Checkpoint, rule: dict) -> bool:
    """All conditions of one match rule hold."""
    tests = {
        "architectures": lambda v: any(a in v for a in checkpoint.architectures),
        "architecture": lambda v: any(re.fullmatch(v, a) for a in checkpoint.architectures),
        "num_labels": lambda v: checkpoint.num_labels == v,
        "module": lambda v: v in checkpoint.modules,
        "modules": lambda v: checkpoint.modules == tuple(v),
        "without": lambda v: v not in checkpoint.modules,
        "pylate": lambda v: (checkpoint.pylate is not None) == v,
        "has_modules": lambda v: bool(checkpoint.modules) == v,
        "module_besides": lambda v: not set(checkpoint.modules) <= set(v),
        "pooling_besides": lambda v: checkpoint.pooling is not None and checkpoint.pooling not in [(p,) for p in v],
        "custom_code": lambda v: bool(checkpoint.config.get("auto_map")) == v,
        "config_code": lambda v: (
            re.search(v + "$", checkpoint.config.get("auto_map", {}).get("AutoConfig", "")) is not None
        ),
        "config": lambda v: all(checkpoint.config.get(key, wanted) == wanted for key, wanted in v.items()),
        "differ": lambda v: len({checkpoint.config.get(key) for key in v}) > 1,
        "labels_besides": lambda v: checkpoint.num_labels != v,
        "logit_tokens": lambda v: checkpoint.logit_tokens == tuple(v),
        "logit_texts": lambda v: checkpoint.logit_texts == tuple(v),
        "tokens": lambda v: _has_tokens(checkpoint, v),
        "first_token": lambda v: _first_token(checkpoint) == v,
        "logit_score": lambda v: (checkpoint.logit_tokens is not None) == v,
        "pair_template": lambda v: (pair_template(checkpoint) is not None) == v,
        "prompt_of": lambda v: _has_prompt_of(checkpoint, v),
        "base_model": lambda v: (
            checkpoint.base_model is not None
            and re.search(v, checkpoint.base_model.value.rstrip("/").rpartition("/")[2], re.IGNORECASE) is not None
            and not checkpoint.modules
        ),
        # A name is the last hint: it says nothing where the files name the tokens of the score.
        "name": lambda v: (
            re.search(v, checkpoint.name, re.IGNORECASE) is not None
            and (checkpoint.logit_tokens is None or "logit_tokens" in rule or "logit_texts" in rule)
        ),
    }
    return all(tests[key](value) for key, value in rule.items())

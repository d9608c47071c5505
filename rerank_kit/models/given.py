"""What settings say in place of a checkpoint's own files: TEMPLATE (how a pair is written) and SCORE_TOKENS (which
tokens answer)."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from rerank_kit.models.chat_template import DOCUMENT, QUERY, PairTemplate, agrees, pair_template, template_fault
from rerank_kit.models.checkpoint import Checkpoint, Said, load_tokenizer
from rerank_kit.models.profiles import Profile, load_profiles
from rerank_kit.settings import KIT_DIR, ConfigError, EnvConfig

# Put before a TEMPLATE that takes the instruction as the variable `instruction`, as those in profiles/ do. It then
# takes a message of role system, which is how the kit and the reference give an instruction to a checkpoint's template.
FROM_SYSTEM = (
    "{#- Made by the kit: the message of role system becomes the variable `instruction`. -#}"
    '{%- if messages[0]["role"] == "system" -%}'
    '{%- set instruction, messages = messages[0]["content"], messages[1:] -%}'
    "{%- endif %}\n"
)


def with_settings(checkpoint: Checkpoint, cfg: EnvConfig) -> Checkpoint:
    """The checkpoint as TEMPLATE and SCORE_TOKENS describe it.

    Raises:
        ConfigError: the template cannot be read or makes no prompt of a pair, or a token is none of the tokenizer.
    """
    if cfg.template:
        text = _read(cfg.template)
        given = replace(checkpoint, message_format="auto", given=(*checkpoint.given, "TEMPLATE"))
        checkpoint = _with_template(given, text, f"TEMPLATE={cfg.template}")
    if cfg.score_tokens:
        ids = _ids(checkpoint, cfg.score_tokens)
        checkpoint = replace(checkpoint, logit_tokens=ids, given=(*checkpoint.given, "SCORE_TOKENS"))
    return checkpoint


def _with_template(checkpoint: Checkpoint, text: str, source: str) -> Checkpoint:
    checkpoint = replace(checkpoint, chat_template=Said(text, source))
    own = pair_template(checkpoint)
    if own is None:
        raise ConfigError(
            f"{source} {template_fault(checkpoint)}: it must write both texts, from messages of role query and "
            "document, as in profiles/qwen3_reranker.jinja (an instruction: from the variable `instruction`, as there, "
            "or from a message of role system in front of the two)"
        )
    if not own.instruction and not own.structured and "instruction" in text:
        changed = replace(checkpoint, chat_template=Said(FROM_SYSTEM + text, source))
        taking = pair_template(changed)
        if taking and taking.instruction and taking.render(QUERY, DOCUMENT) == own.render(QUERY, DOCUMENT):
            checkpoint, own = changed, taking
    _refuse_document_first(own, source)
    return checkpoint


def _refuse_document_first(own: PairTemplate, source: str) -> None:
    prompt = own.render(QUERY, DOCUMENT)
    if prompt.index(QUERY) < prompt.index(DOCUMENT):
        return
    profiles = [p for p in load_profiles().values() if p.template]
    if any(agrees(own, p.template_text() or "", p.instruction) for p in profiles):
        return
    shown = prompt.replace(QUERY, "QUERY").replace(DOCUMENT, "DOCUMENT")
    raise ConfigError(
        f"{source} puts the document before the query ({shown!r}): such a prompt is served for ctxl_rerank_v2 alone, "
        "with the template of its profile, because elsewhere a long pair could not be cut so that the query stays. "
        "Unset TEMPLATE for a ctxl-rerank-v2 model; a model that was trained with another such prompt is not served"
    )


def _read(setting: str) -> str:
    path = Path(setting).expanduser()
    path = path if path.is_absolute() else KIT_DIR / path
    try:
        return path.read_text("utf-8")
    except FileNotFoundError as exc:
        raise ConfigError(f"TEMPLATE={setting!r}: there is no file {path}; give a Jinja file") from exc
    except (OSError, ValueError) as exc:
        raise ConfigError(f"TEMPLATE={setting!r} cannot be read as text: {exc}; give a Jinja file") from exc


def _ids(checkpoint: Checkpoint, setting: str) -> tuple[int, int | None]:
    """(id of the token for relevant, id of the one for not relevant or None)."""
    names = checkpoint.architectures
    if not any(name.endswith(("ForCausalLM", "ForConditionalGeneration")) for name in names):
        raise ConfigError(
            f"SCORE_TOKENS is set, but {checkpoint.path} ({', '.join(names) or 'no architecture'}) is no language "
            "model that answers with a token: unset SCORE_TOKENS"
        )
    words = [word.strip() for word in setting.split(",")]
    if len(words) > 2 or not all(words) or len(set(words)) < len(words):
        raise ConfigError(
            f"SCORE_TOKENS={setting!r} is not one token, or two that differ: write the token for relevant, then the "
            "one for not relevant, as yes,no"
        )
    tokenizer = load_tokenizer(checkpoint.path)
    ids = [tokenizer.token_to_id(word) for word in words]
    for word, number in zip(words, ids, strict=True):
        if number is None:
            made = tokenizer.encode(word, add_special_tokens=False).tokens
            raise ConfigError(
                f"SCORE_TOKENS={setting!r}: {word!r} is no token of {checkpoint.path}/tokenizer.json, which makes "
                f"{made} of it: write a token as that file spells it"
            )
    return ids[0], ids[1] if len(ids) == 2 else None


def for_reference(checkpoint: Checkpoint, profile: Profile) -> dict[str, Any]:
    """What reference_scores() has to know of these settings and of settle(), since it reads the files itself."""
    template = checkpoint.chat_template.value if checkpoint.chat_template and "TEMPLATE" in checkpoint.given else None
    tokens = checkpoint.logit_tokens if "SCORE_TOKENS" in checkpoint.given else None
    return {"own_prompt": profile.own_prompt, "template": template, "tokens": tokens}

"""The chat template that a checkpoint brings: what it makes of a pair, and how the kit serves it.

A training library renders a pair as messages of role "query" and "document", with the instruction as message of role
"system". A template of a language model, which knows neither role, leaves the prompt of a pair open.
"""

import datetime
import json
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from rerank_kit.models.checkpoint import Checkpoint, load_tokenizer
from rerank_kit.models.json_files import read_object
from rerank_kit.settings import ConfigError

QUERY, DOCUMENT, INSTRUCTION = "\ue000", "\ue001", "\ue002"
# Pairs on which two templates are compared: order, white space at the edges, several lines, quotes, emptiness.
PROBES = (
    (QUERY, DOCUMENT),
    ("What is the capital of China?", "The capital of China is Beijing."),
    ("  edges \n", "\n two\r\nlines\t "),
    ("\"yes\" 'no' {{ x }} <a> & b", "中国的首都是北京。 🚀"),
    ("", "the query is empty"),
)
INSTRUCTIONS = (None, INSTRUCTION, ' Find "it",\nline by line ')
# transformers names a template's text content in this way when it is not a plain string.
STRUCTURED = ("content[0]", ".type", "'type'", '"type"', "item.type", "message.content[")


@dataclass(frozen=True)
class PairTemplate:
    """A checkpoint's own chat template, which carries a query and a document."""

    text: str
    source: str
    structured: bool
    names: tuple[tuple[str, str], ...]  # bos_token and the like, by tokenizer_config.json
    instruction: bool  # it uses a message of role system
    added: tuple[str, ...] = ()  # tokens that the tokenizer puts around every text
    # The server's ids of a prompt are those of the library, which adds no token to what a template renders.
    same_ids: bool = True

    def prompt(self, query: str, document: str, instruction: str | None = None) -> str:
        """render(), without a <bos> that the tokenizer puts there on the server."""
        bos = dict(self.names).get("bos_token", "")
        text = self.render(query, document, instruction)
        return text.removeprefix(bos) if self.added == (bos,) else text

    def render(self, query: str, document: str, instruction: str | None = None) -> str:
        """The prompt as transformers' apply_chat_template() makes it for sentence-transformers."""
        messages = [{"role": "system", "content": self._content(instruction)}] if instruction else []
        messages += [
            {"role": role, "content": self._content(text)} for role, text in (("query", query), ("document", document))
        ]
        return render(self.text, messages, dict(self.names))

    def _content(self, text: str | None) -> Any:
        return [{"type": "text", "text": text}] if self.structured else text


def pair_template(checkpoint: Checkpoint) -> PairTemplate | None:
    """The checkpoint's chat template, if a query and a document reach the prompt; None if it leaves the prompt open."""
    own = _for_pairs(checkpoint)
    if own is None:
        return None
    try:
        prompt = own.render(QUERY, DOCUMENT)
        if QUERY not in prompt or DOCUMENT not in prompt:
            return None
    except Exception:  # a template may raise what it likes, and does for roles that it does not know
        return None
    try:
        instructed = own.render(QUERY, DOCUMENT, INSTRUCTION)
    except Exception:  # it knows no system message
        instructed = ""
    tokenizer = load_tokenizer(checkpoint.path)
    takes = all(mark in instructed for mark in (QUERY, DOCUMENT, INSTRUCTION))
    own = replace(own, instruction=takes, added=tuple(tokenizer.encode("").tokens))
    library = tokenizer.encode(prompt, add_special_tokens=False).ids
    return replace(own, same_ids=library == tokenizer.encode(own.prompt(QUERY, DOCUMENT)).ids)


def template_fault(checkpoint: Checkpoint) -> str | None:
    """Why a chat template that was made for pairs makes no prompt of one; None if it does, or if there is none."""
    own = _for_pairs(checkpoint)
    if own is None:
        return None
    try:
        prompt = own.render(QUERY, DOCUMENT)
    except Exception as exc:
        return f"cannot be rendered for a query and a document ({type(exc).__name__}: {str(exc)[:200]})"
    lost = [name for name, mark in (("query", QUERY), ("document", DOCUMENT)) if mark not in prompt]
    return f"leaves the {' and the '.join(lost)} out of the prompt, which is {prompt[:200]!r}" if lost else None


def _for_pairs(checkpoint: Checkpoint) -> PairTemplate | None:
    """The checkpoint's chat template, if it was made for a query and a document."""
    said = checkpoint.chat_template
    if said is None:
        return None
    # Many checkpoints inherit a template that prints any role. Where sentence-transformers did not save the model, only
    # one that names the two roles was made for pairs. TEMPLATE is the user's own word.
    ours = checkpoint.has_modules or "TEMPLATE" in checkpoint.given
    if not ours and not ("query" in said.value and "document" in said.value):
        return None
    structured = checkpoint.message_format == "structured" or (
        checkpoint.message_format == "auto" and any(pattern in said.value for pattern in STRUCTURED)
    )
    names = tuple(special_tokens(checkpoint).items())
    return PairTemplate(said.value, said.source, structured, names, instruction=True)


def render(template: str, messages: list[dict], names: dict[str, str] | None = None, **more: Any) -> str:
    """A template's text for messages, as transformers 5 renders it."""
    return _compiled(template).render(
        messages=messages, tools=None, add_generation_prompt=False, **(names or {}), **more
    )


@cache
def _compiled(template: str):
    """The template in the environment of transformers' apply_chat_template(), which would take seconds to import."""
    from jinja2 import ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message):
        raise ValueError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[ext.loopcontrols])
    environment.filters["tojson"] = lambda x, **more: json.dumps(x, ensure_ascii=False, **more)
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(template)


def special_tokens(checkpoint: Checkpoint) -> dict[str, str]:
    """bos_token, eos_token and the like by tokenizer_config.json; templates use them by these names."""
    data = read_object(checkpoint.path / "tokenizer_config.json")
    out = {}
    for key, value in data.items():
        if key.endswith("_token"):
            text = value.get("content") if isinstance(value, dict) else value
            if isinstance(text, str):
                out[key] = text
    return out


def agrees(own: PairTemplate, profile_text: str, instruction: bool) -> bool:
    """Whether the checkpoint's own template makes the same prompts as a profile's."""
    if not own.same_ids:
        return False
    try:
        for query, document in PROBES:
            for asked in INSTRUCTIONS if instruction or own.instruction else (None,):
                chat = [{"role": "query", "content": query}, {"role": "document", "content": document}]
                more = {"instruction": asked} if asked else {}
                if own.prompt(query, document, asked) != render(profile_text, chat, dict(own.names), **more):
                    return False
    except Exception:  # some templates refuse some texts
        return False
    return True


def served_text(own: PairTemplate, checkpoint: Checkpoint, instruction: str | None) -> str:
    """The checkpoint's own template as the kit serves it.

    In front of it: control tokens in the input become ordinary text, and the instruction becomes the system message.

    Raises:
        ConfigError: the prompt could not be served as the checkpoint's own library makes it; says why.
    """
    control = _control_tokens(checkpoint)
    text = _front(own, control, instruction) + own.text
    where = own.source if "TEMPLATE" in checkpoint.given else f"{checkpoint.path}/{own.source}"
    prompt = own.render(QUERY, DOCUMENT)
    if prompt.count(QUERY) != 1 or prompt.count(DOCUMENT) != 1 or prompt.index(QUERY) > prompt.index(DOCUMENT):
        raise ConfigError(
            f"{where} does not put the query once before the document: a long pair could not be cut so that the query "
            f"stays. It renders {prompt!r}; such a prompt is not served"
        )
    if own.added and own.added != (dict(own.names).get("bos_token"),):
        raise ConfigError(
            f"{where} is rendered as the whole prompt by the library that wrote it, and the tokenizer puts "
            f"{list(own.added)} around every text on the server: such a prompt is not served"
        )
    if not own.same_ids:
        raise ConfigError(
            f"{where} is rendered as the whole prompt by the library that wrote it, and the server's tokenizer, which "
            f"puts {list(own.added)} before a text, makes other tokens of it: such a prompt is not served"
        )
    for query, document in PROBES:
        for asked in INSTRUCTIONS if own.instruction else (None,):
            chat = [{"role": "query", "content": query}, {"role": "document", "content": document}]
            more = {"instruction": asked} if asked else {}
            wanted = own.prompt(query, document, asked or instruction)
            if render(text, chat, dict(own.names), **more) != wanted:
                raise ConfigError(
                    f"{where} cannot be served: with control tokens taken out of the texts it renders other prompts "
                    f"than alone, as for the pair {query!r}, {document!r}"
                )
    return text


def _front(own: PairTemplate, control: list[str], instruction: str | None) -> str:
    """What the kit puts before a checkpoint's own template. Its last line ends where the template's first begins."""
    default = f" | default({json.dumps(instruction, ensure_ascii=False)}, true)" if instruction else ""
    value = '[{"type": "text", "text": %s}]' if own.structured else "%s"
    parts = [
        "{#- Made by the kit: control tokens in the input become ordinary text, the instruction the system message.",
        f"    Behind it, unchanged: {own.source} of the checkpoint. -#}}",
        "{%- macro plain(text) -%}",
        "  {%- set ns = namespace(text=text) -%}",
        f"  {{%- for token in {json.dumps(control, ensure_ascii=False)} -%}}",
        '    {%- set cut = 2 if token[:2] == "<|" else 1 -%}',
        '    {%- set ns.text = ns.text.replace(token, token[:cut] ~ " " ~ token[cut:]) -%}',
        "  {%- endfor -%}",
        "  {{- ns.text -}}",
        "{%- endmacro -%}",
        '{%- set query, document = messages[0]["content"], messages[1]["content"] -%}',
        '{%- if messages[0]["role"] == "document" -%}{%- set query, document = document, query -%}{%- endif -%}',
        "{%- set query, document = plain(query), plain(document) -%}",
        f'{{%- set messages = [{{"role": "query", "content": {value % "query"}}}, '
        f'{{"role": "document", "content": {value % "document"}}}] -%}}',
    ]
    if own.instruction:
        parts += [
            f"{{%- set instruction = instruction{default} -%}}",
            "{%- if instruction is defined and instruction -%}",
            "  {%- set instruct = plain(instruction) -%}",
            f'  {{%- set messages = [{{"role": "system", "content": {value % "instruct"}}}] + messages -%}}',
            "{%- endif -%}",
        ]
    if own.added:  # the tokenizer puts it there
        parts.append('{%- set bos_token = "" -%}')
    # Jinja's trim_blocks takes the line's end away, so the checkpoint's first line begins a line, as it does alone.
    return "\n".join([*parts, "{%- set tools = none %}\n"])


def _control_tokens(checkpoint: Checkpoint) -> list[str]:
    """Added tokens of the tokenizer that a text must not spell: the control tokens, longest first."""
    added = load_tokenizer(checkpoint.path).get_added_tokens_decoder().values()
    # Qwen3 marks <|fim_prefix|> and the like as no special tokens; they control all the same. <think> is text there.
    found = {t.content for t in added if len(t.content) > 1 and (t.special or t.content.startswith("<|"))}
    return sorted(found, key=lambda token: (-len(token), token))

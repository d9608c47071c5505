"""The body of a scoring call: size limits that hold before it is parsed, and strict JSON.

Imported by server_guard.py inside the server. docs/guard.md lists every refusal.
"""

import json
import math
import re
from collections.abc import Awaitable, Callable

from guard_rules import Refusal

MAX_DEPTH = 32  # lists and objects inside the body's own; a rerank body needs 4
MEDIA_FIELDS = frozenset(("image_url", "image_embeds", "video_url", "audio_url"))  # base64, not text
# A text, with the colon that makes it a key, or what opens, closes and divides. In right JSON these are exact; wrong
# JSON is the parser's to refuse. Possessive, and content with the body's end for a closing quote: the time grows with
# the length only. (ijson would do this while a body comes, but its C part crashes on an integer of 5000 digits.)
_TOKEN = re.compile(rb'("[^"]*+"?)([ \t\r\n]*+:)?|[][{},]')
TEXT, KEY = 1, 2  # the last group that took part


class Limits:
    """Sizes of one body: bytes, items of any list, characters of any text. 0 = off."""

    def __init__(self, max_bytes: int, max_docs: int, max_chars: int):
        self.max_bytes, self.max_docs, self.max_chars = max_bytes, max_docs, max_chars

    def check_length(self, content_length: bytes) -> None:
        """Raise Refusal (413) for what the client says it will send."""
        known = self.max_bytes and content_length.isdigit()
        if known and (len(content_length) > 15 or int(content_length) > self.max_bytes):
            raise self._too_large(content_length.decode()[:20])

    async def read(self, receive: Callable[[], Awaitable[dict]]) -> bytes | None:
        """The whole body from an ASGI receive(), or Refusal as soon as it is too large. None = the client left."""
        pieces, size = [], 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            pieces.append(message.get("body", b""))
            size += len(pieces[-1])
            if self.max_bytes and size > self.max_bytes:
                raise self._too_large(f"more than {self.max_bytes}")
            if not message.get("more_body"):
                return b"".join(pieces)

    def check(self, body: bytes) -> None:
        """Raise Refusal at the first list or text that is too long.

        A list's second item needs a comma, a character a byte: with few of them nothing can exceed a limit, and most
        bodies are only counted.
        """
        if (self.max_docs and body.count(b",") >= self.max_docs) or 0 < self.max_chars < len(body):
            self._scan(body)

    def _scan(self, body: bytes) -> None:
        field = key = ""
        commas: list[int | None] = []  # in each list that is open; None for an object
        media_level = 0  # of the list or object that holds media; 0 = none is open
        # Of the same length, but without escaped quotes: every quote left opens or closes a text.
        plain = body.replace(b"\\\\", b"__").replace(b'\\"', b"__")
        for token in _TOKEN.finditer(plain):
            (start, end), kind = token.span(1 if token.lastindex else 0), token.lastindex
            mark = body[start : start + 1]
            is_media = media_level or (len(commas) > 1 and commas[-1] is None and key in MEDIA_FIELDS)
            if kind == KEY:
                key = _text(body[start:end])
                field = key if len(commas) == 1 else field
            elif kind == TEXT:
                n = len(_text(body[start:end])) if 0 < self.max_chars < end - start and not is_media else 0
                if n > self.max_chars:
                    limit = f"the limit is {self.max_chars} a text (MAX_CHARS_PER_FIELD)"
                    text = f"{ascii(field)[:40]} holds a text of {n} characters, {limit}: shorten or split it"
                    raise Refusal(422, "chars", text, param=field[:40])
            elif mark in b"[{":
                commas.append(0 if mark == b"[" else None)
                media_level = media_level or (len(commas) if is_media else 0)
                if len(commas) > MAX_DEPTH + 1:
                    raise _too_deep()
            elif not commas:
                return  # wrong JSON
            elif mark in b"]}":
                commas.pop()
                media_level = media_level if len(commas) >= media_level else 0
            elif commas[-1] is not None:
                commas[-1] += 1
                if 0 < self.max_docs <= commas[-1]:
                    text = f"{ascii(field)[:40]} holds more items than the limit of {self.max_docs} (MAX_DOCS_PER_CALL)"
                    raise Refusal(413, "docs", f"{text}: send several calls", param=field[:40])

    def _too_large(self, size: str) -> Refusal:
        text = f"the body has {size} bytes, the limit is {self.max_bytes} (MAX_BODY_BYTES): send fewer documents a call"
        return Refusal(413, "bytes", text)


def parse(body: bytes) -> dict:
    """Strict JSON: one UTF-8 object of few levels, no repeated key, no NaN or infinity. Raises Refusal (400)."""
    try:
        payload = _DECODER.decode(body.decode("utf-8"))
        deep = _is_deeper(payload, MAX_DEPTH)
    except UnicodeDecodeError as exc:
        raise Refusal(400, "json", f"the body is not UTF-8 text: {exc.reason} at byte {exc.start}") from exc
    except RecursionError:
        deep = True
    except ValueError as exc:
        raise Refusal(400, "json", f"the body is not valid JSON: {exc}") from exc
    if deep:
        raise _too_deep()
    if not isinstance(payload, dict):
        raise Refusal(400, "json", 'the body is not a JSON object: send {"query": ..., "documents": [...]}')
    return payload


def _is_deeper(value: list | dict, levels: int) -> bool:
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    inner = [item for item in items if isinstance(item, (list, dict))]
    return bool(inner) and (not levels or any(_is_deeper(item, levels - 1) for item in inner))


def _too_deep() -> Refusal:
    return Refusal(400, "json", f"the body is nested deeper than {MAX_DEPTH} levels")


def _text(token: bytes) -> str:
    """A JSON text; "" if it is none, which the parser says better."""
    try:
        return json.loads(token)
    except ValueError:
        return ""


def _unique(pairs: list) -> dict:
    fields = dict(pairs)
    if len(fields) != len(pairs):  # parsers differ in which of two equal keys they take
        raise ValueError(f"a key stands there twice: {ascii([name for name, _ in pairs])[:200]}")
    return fields


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):  # NaN, Infinity, 1e999
        raise ValueError(f"{text[:20]} is not a finite number")
    return value


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_float=_finite, parse_constant=_finite)

"""The body of a scoring call: size limits, checked before parsing, and strict JSON.

docs/guard.md lists every refusal.
"""

import asyncio
import json
import math
import re
import zlib

from rerank_kit.guard.answers import Refusal

MAX_DEPTH = 32  # lists and objects inside the body's own; a rerank body needs 4
MEDIA_FIELDS = frozenset((b"image", b"image_url", b"image_embeds", b"video_url", b"audio_url"))  # base64, not text
UNPACKED = 2**28  # bytes of an unpacked body where MAX_BODY_BYTES is off: 1 MB of gzip can hold 1 GB
MEMBERS = 100  # of a gzip body: each costs a copy of the rest
PARTS = 100  # values in a body for each document that is allowed
# A text (with a colon behind it: a key) or a structural character. The body's end may replace a closing quote.
# The quantifiers are possessive, so the time is linear in the length.
_TOKEN = re.compile(rb'"([^"]*+)"?([ \t\r\n]*+:)?|[][{},]')
TEXT, KEY = 1, 2  # the last group that took part


class Limits:
    """Sizes of one body: bytes, items of any list, characters of any text. 0 = off."""

    def __init__(self, max_bytes: int, max_docs: int, max_chars: int):
        self.max_bytes, self.max_docs, self.max_chars = max_bytes, max_docs, max_chars

    def check_length(self, content_length: bytes) -> None:
        """Raise Refusal (413) if Content-Length exceeds the limit."""
        known = self.max_bytes and content_length.isdigit()
        if known and (len(content_length) > 15 or int(content_length) > self.max_bytes):
            raise self._too_large(content_length.decode()[:20])

    def check_size(self, n_bytes: int) -> None:
        """Raise Refusal (413) if so many bytes have come and exceed the limit."""
        if self.max_bytes and n_bytes > self.max_bytes:
            raise self._too_large(f"more than {self.max_bytes}")

    async def unpack(self, body: bytes, encoding: bytes) -> bytes:
        """The JSON text of a body: unpacked (gzip, deflate), and without a byte order mark. Raises Refusal."""
        names = [name for name in encoding.decode("latin-1").lower().replace(" ", "").split(",") if name != "identity"]
        if names and names != [""]:
            if names not in (["gzip"], ["x-gzip"], ["deflate"]):
                text = f"Content-Encoding {ascii(names)[1:41]} is not read here: send gzip, deflate or none"
                raise Refusal(415, "encoding", text)
            body = await asyncio.to_thread(_unpacked, body, names[0], self.max_bytes or UNPACKED)
            if len(body) > (self.max_bytes or UNPACKED):
                raise self._too_large(f"more than {self.max_bytes or UNPACKED}")
        return body.removeprefix(b"\xef\xbb\xbf")

    def check(self, body: bytes) -> None:
        """Raise Refusal (413, 422) for a list or a text that is too long, before anything is parsed.

        Exact for valid JSON; the parser refuses the rest. A list's second item needs a comma and a character needs a
        byte, so a small body is not split at its quotes. Only one that may exceed a limit is walked through.
        (ijson 3.6.0 would do this while a body comes, but its C part crashes on an integer of 5000 digits.)
        """
        could = 0 < self.max_docs <= body.count(b",") or 0 < self.max_chars < len(body)
        if not could or not body.lstrip().startswith(b"{"):
            return
        # Same length, but without escaped quotes, so each quote left opens or closes a text.
        plain = body.replace(b"\\\\", b"__").replace(b'\\"', b"__") if b"\\" in body else body
        most = PARTS * self.max_docs or math.inf
        too_many = plain.count(b'"') > 2 * most
        pieces = [] if too_many else plain.split(b'"')
        outside = b"".join(pieces[::2])
        n_commas, longest = outside.count(b","), max(map(len, pieces[1::2]), default=0)
        if too_many or max(n_commas, outside.count(b"[") + outside.count(b"{")) > most:
            text = f"the body holds more than {most} values, {PARTS} for each of MAX_DOCS_PER_CALL={self.max_docs}"
            raise Refusal(413, "docs", f"{text}: send several calls")
        if 0 < self.max_docs <= n_commas or 0 < self.max_chars < longest:
            self._walk(body, plain)

    def _walk(self, body: bytes, plain: bytes) -> None:
        field = key = b""  # field: the key at the body's own level
        commas: list[int | None] = []  # in each list that is open; None for an object
        media_level = 0  # of the list or object that holds media; 0 = none is open
        for token in _TOKEN.finditer(plain):
            kind, mark = token.lastindex, token[0]
            is_media = media_level or (len(commas) > 1 and commas[-1] is None and key in MEDIA_FIELDS)
            if kind == KEY:
                key = body[token.start(1) : token.end(1)]
                field = key if len(commas) == 1 else field
            elif kind == TEXT:
                if 0 < self.max_chars < len(token[1]) and not is_media:
                    self._check_text(field, _text(body[token.start(1) : token.end(1)]))
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
                    name = _text(field)
                    text = f"{ascii(name)[:40]} holds more items than the limit of {self.max_docs} (MAX_DOCS_PER_CALL)"
                    raise Refusal(413, "docs", f"{text}: send several calls", param=name[:40])

    def _check_text(self, field: bytes, text: str) -> None:
        if len(text) > self.max_chars:
            name, limit = _text(field), f"the limit is {self.max_chars} per text (MAX_CHARS_PER_FIELD)"
            what = f"{ascii(name)[:40]} holds a text of {len(text)} characters, {limit}: shorten or split it"
            raise Refusal(422, "chars", what, param=name[:40])

    def _too_large(self, size: str) -> Refusal:
        text = f"the body has {size} bytes, the limit is {self.max_bytes} (MAX_BODY_BYTES): send fewer documents a call"
        return Refusal(413, "bytes", text)


def _unpacked(body: bytes, name: str, most: int) -> bytes:
    """At most `most` + 1 bytes of a packed body. Raises Refusal (400) for one that is no such data, or broken off."""
    # Clients send both forms under the name deflate; RFC 9110 means the one with zlib's header.
    is_raw = name == "deflate" and (len(body) < 2 or body[0] & 15 != 8 or (body[0] << 8 | body[1]) % 31)
    wbits = -15 if is_raw else 15 if name == "deflate" else 31
    pieces, left = [], most + 1
    try:
        for n in range(MEMBERS + 1):
            if n == MEMBERS:
                raise zlib.error(f"it has more than {MEMBERS} parts")
            unpacker = zlib.decompressobj(wbits)
            pieces.append(unpacker.decompress(body, left))
            left -= len(pieces[-1])
            if left <= 0:
                break
            if not unpacker.eof:
                raise zlib.error("it ends too early")
            body = unpacker.unused_data
            if not body:
                break
    except zlib.error as exc:
        raise Refusal(400, "encoding", f"the body is not {name} data, as Content-Encoding says: {exc}") from exc
    return b"".join(pieces)


def parse(body: bytes) -> dict:
    """Strict JSON: one UTF-8 object of few levels, no repeated key, no NaN or infinity. Raises Refusal (400)."""
    try:
        text = body.decode("utf-8")
        # A list is refused as it is: check() has not looked into it.
        payload = [] if text.lstrip().startswith("[") else _DECODER.decode(text)
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


def _is_deeper(value, levels: int) -> bool:
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    inner = [item for item in items if isinstance(item, (list, dict))]
    return bool(inner) and (not levels or any(_is_deeper(item, levels - 1) for item in inner))


def _too_deep() -> Refusal:
    return Refusal(400, "json", f"the body is nested deeper than {MAX_DEPTH} levels")


def _text(inside: bytes) -> str:
    """The text between two quotes; "" if it is invalid, which the parser reports."""
    try:
        return json.loads(b'"' + inside + b'"')
    except ValueError:
        return ""


def _unique(pairs: list) -> dict:
    fields = dict(pairs)
    if len(fields) != len(pairs):  # parsers differ in which of two equal keys they take
        raise ValueError(f"duplicate key: {ascii([name for name, _ in pairs])[:200]}")
    return fields


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):  # NaN, Infinity, 1e999
        raise ValueError(f"{text[:20]} is not a finite number")
    return value


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_float=_finite, parse_constant=_finite)

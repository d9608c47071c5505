"""Queries and documents with an image, for a service whose model takes images (docs/guard.md, Images)."""

import base64
from collections.abc import Mapping
from os import PathLike
from typing import Any

# A text, {"image": address, "text": ...}, or vLLM's {"content": [parts]}; an address is https://... or a data URL.
Document = str | Mapping[str, Any]

PART_CHARS = 16 * 2**20  # of images in one request; the service takes bodies of MAX_BODY_BYTES (32 MiB)
_KINDS = {
    "png": (b"\x89PNG\r\n\x1a\n",),
    "jpeg": (b"\xff\xd8\xff",),
    "gif": (b"GIF87a", b"GIF89a"),
    "bmp": (b"BM",),
}


def image_document(path: str | PathLike[str], text: str = "") -> dict[str, str]:
    """A document, or a query, of an image file: {"image": data URL}, with its text if there is one.

    Raises:
        ValueError: the file is no PNG, JPEG, WEBP, GIF or BMP image. OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        data = file.read()
    kind = next((kind for kind, starts in _KINDS.items() if data.startswith(starts)), "")
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        kind = "webp"
    if not kind:
        raise ValueError(f"{path} is no PNG, JPEG, WEBP, GIF or BMP image")
    url = f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"
    return {"image": url, "text": text} if text else {"image": url}


def checked(name: str, value: Mapping[str, Any]) -> dict[str, Any]:
    """A document that is an object, as it is sent. Raises ValueError for one that no service takes."""
    shapes = '{"image": address}, {"image": address, "text": text}, {"text": text} or {"content": [parts]}'
    if not value or not (set(value) <= {"image", "text"} or set(value) == {"content"}):
        raise ValueError(f"{name} has the keys {sorted(map(str, value))[:5]}: write {shapes}")
    if "content" in value and not isinstance(value["content"], list):
        raise ValueError(f"{name}: content is no list: write {shapes}")
    if not isinstance(value.get("text", ""), str):
        raise ValueError(f"{name}: text is a {type(value['text']).__name__}, not a str")
    image = value.get("image", "data:")
    if not isinstance(image, str) or not image.lower().startswith(("data:", "http://", "https://")):
        shown = repr(image)[:80]
        raise ValueError(f"{name}: image={shown} is no https://... and no data URL; for a file: image_document(path)")
    return dict(value)


def text_of(document: Document) -> str:
    """A document's text; that of an image alone is empty."""
    if isinstance(document, str):
        return document
    if "content" in document:
        texts = [part.get("text") for part in document["content"] if isinstance(part, dict)]
        return "\n".join(text for text in texts if isinstance(text, str))
    return str(document.get("text", ""))


def weight(document: Document) -> int:
    """Characters of a document's images."""
    if isinstance(document, str):
        return 0
    if "content" in document:
        return sum(len(str(part)) for part in document["content"])
    return len(document.get("image", ""))


def parts(documents: list[Any], size: int, query: Document) -> list[range]:
    """The documents of each request: `size` at most, and with fewer than PART_CHARS of images unless it is one."""
    out, first, chars = [], 0, weight(query)
    for i, document in enumerate(documents):
        more = weight(document)
        if i > first and (i - first >= size or (more and chars + more > PART_CHARS)):
            out.append(range(first, i))
            first, chars = i, weight(query)
        chars += more
    return [*out, range(first, len(documents))] if documents else []

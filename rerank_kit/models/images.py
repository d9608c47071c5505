"""An image of a query or document: its bytes, its size by the header, and the tokens that it becomes.

The guard inside the server and offline scoring use it. Nothing is decoded here but the header, so that an image whose
pixels would fill the memory is refused before.
"""

import base64
import binascii
import copy
import io
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rerank_kit.models.fitting import Fitter

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")  # Pillow's names
MOST_RATIO = 200  # of the two sides, as Qwen's smart_resize() has it
WRAPPED = 2  # tokens around an image: <|vision_start|> and <|vision_end|>
_DATA_URL = re.compile(r"data:([a-z0-9.+/-]{0,60})(?:;[a-z0-9=.-]{1,40})*;base64", re.IGNORECASE)
REMEDY = "send https://..., or data:image/png;base64,..."


class BadImage(ValueError):
    """An image that is not scored; the text goes on from its place, as in `documents[3]: ...`."""


@dataclass(frozen=True)
class Sizes:
    """How a model family resizes an image; Profile.images.

    Source: smart_resize() of Qwen2VLImageProcessor in transformers, which vLLM resizes with; the pixels are those of
    scripts/qwen3_vl_reranker.py on the model card.
    """

    factor: int  # both sides become a multiple of it, and so many pixels squared one token
    min_pixels: int
    max_pixels: int
    placeholder: str  # what the prompt has in an image's place

    @property
    def most_tokens(self) -> int:
        return self.max_pixels // self.factor**2

    def resized(self, width: int, height: int) -> tuple[int, int]:
        """Width and height of the image that the model sees."""
        step = self.factor
        sides = [round(side / step) * step for side in (width, height)]
        if sides[0] * sides[1] > self.max_pixels:
            ratio = math.sqrt(width * height / self.max_pixels)
            sides = [max(step, math.floor(side / ratio / step) * step) for side in (width, height)]
        elif sides[0] * sides[1] < self.min_pixels:
            ratio = math.sqrt(self.min_pixels / (width * height))
            sides = [math.ceil(side * ratio / step) * step for side in (width, height)]
        return sides[0], sides[1]

    def tokens(self, width: int, height: int) -> int:
        """Tokens of an image, without those around it."""
        width, height = self.resized(width, height)
        return width * height // self.factor**2


def parts_of(item: dict) -> tuple[str, list[str]] | None:
    """(text, addresses of images) of a query or document that is an object; None where neither key is there.

    The shapes are {"image": address, "text": ...} and vLLM's {"content": [parts]}. Raises BadImage for others.
    """
    text: Any
    if "content" in item:
        text, urls = _content(item)
    elif "image" in item:
        if others := [key for key in item if key not in ("image", "text")]:
            said = f"the key {ascii(others[0])[:40]} was not expected beside image"
            raise BadImage(f'{said}: send {{"image": ..., "text": ...}}')
        text, urls = item.get("text") or "", [_address(item["image"])]
        if not isinstance(text, str):
            raise BadImage("text is no text")
    else:
        return None
    if len(urls) > 1:
        raise BadImage(f"it holds {len(urls)} images: a query or document has one at most")
    return text, urls


def _content(item: dict) -> tuple[str, list[str]]:
    parts = item["content"]
    if set(item) != {"content"} or not isinstance(parts, list) or not parts:
        raise BadImage('send {"content": [...]} with one part or more, and no other key')
    urls, texts = [], []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str) and len(part) == 2:
            texts.append(part["text"])
        elif kind == "image_url" and len(part) == 2 and "image_url" in part:
            urls.append(_address(part["image_url"]))
        else:  # also uuid, by which a caller would get the image that another one sent
            known = '{"type": "text", "text": ...} and {"type": "image_url", "image_url": {"url": ...}}'
            raise BadImage(f"a part of content is none of {known}")
    return "\n".join(texts), urls


def _address(value: Any) -> str:
    """The address in "..." or {"url": "..."}."""
    if isinstance(value, dict) and set(value) <= {"url", "detail"}:
        value = value.get("url")
    if not isinstance(value, str) or not value:
        raise BadImage("image is no address: send a data URL, or https://...")
    return value


def is_data_url(url: str) -> bool:
    return url[:5].lower() == "data:"


def data_of(url: str, max_bytes: int = 0) -> bytes:
    """The bytes of a data URL. Raises BadImage. max_bytes: 0 = any number."""
    head, comma, text = url.partition(",")
    if not comma or not _DATA_URL.fullmatch(head):
        raise BadImage(f"{shown(url)} is no base64 data URL: write data:image/png;base64,...")
    check_bytes(len(text) * 3 // 4 - 2, max_bytes)
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as exc:
        raise BadImage(f"its data URL is no valid base64 ({exc})") from None


def data_url(data: bytes) -> str:
    return f"data:image/any;base64,{base64.b64encode(data).decode()}"


def check_bytes(n_bytes: int, max_bytes: int) -> None:
    if 0 < max_bytes < n_bytes:
        raise BadImage(f"the image has more than {max_bytes} bytes (MAX_IMAGE_BYTES): send a smaller one")


def size_of(data: bytes, max_pixels: int = 0) -> tuple[int, int]:
    """Width and height of an image by its header. Raises BadImage. max_pixels: 0 = any number."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
    except Image.DecompressionBombError:
        raise BadImage(f"the image has more than {max_pixels or 'a hundred million'} pixels") from None
    except Exception:  # Pillow's plugins raise many kinds
        raise BadImage(f"its bytes are no image that is read here ({', '.join(FORMATS)})") from None
    if 0 < max_pixels < width * height:
        said = f"the image has {width} x {height} pixels, the limit is {max_pixels} (MAX_IMAGE_PIXELS)"
        raise BadImage(f"{said}: send a smaller one")
    if max(width, height) > MOST_RATIO * max(1, min(width, height)):
        raise BadImage(f"one side of {width} x {height} pixels is more than {MOST_RATIO} times the other")
    return width, height


def beside(fitter: Fitter, taken: int) -> Fitter:
    """A fitter for the texts beside images of so many tokens. Raises BadImage where they leave no room."""
    if not taken:
        return fitter
    shorter = copy.copy(fitter)
    shorter.max_length = fitter.max_length - taken
    if shorter.max_length <= fitter.frame_tokens:
        said = f"the images of the pair take {taken} tokens, and beside them the prompt needs {fitter.frame_tokens}"
        raise BadImage(f"{said}: more than MAX_MODEL_LEN={fitter.max_length}; send a smaller image")
    return shorter


def shown(url: str) -> str:
    """The beginning of an address, for a message."""
    return ascii(url[:60]) + ("..." if len(url) > 60 else "")


def plain_macro(template: str) -> Callable[[str], str] | None:
    """The template's macro `plain`, which neutralises control tokens; None where it has none."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    # Behind the macro a checkpoint's own template may follow, which need not render without a pair.
    front, end, _ = template.partition("{%- endmacro -%}")
    if not end:
        return None
    # The environment of transformers' apply_chat_template().
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    return getattr(environment.from_string(front + end).make_module({"messages": []}), "plain", None)

"""The scores of pairs with images again, in transformers and float32, from the model card of Qwen3-VL-Reranker.

Source: scripts/qwen3_vl_reranker.py of Qwen/Qwen3-VL-Reranker-2B, and fetch_image() of qwen-vl-utils 0.0.14, which it
resizes with: Pillow's bicubic filter, where vLLM has that of torchvision.
"""

import io
import math
from pathlib import Path
from typing import Any, NamedTuple

from rerank_kit.models.card_prompts import VL_INSTRUCTION
from rerank_kit.models.images import data_of
from rerank_kit.models.pair import Pair

FACTOR, MIN_PIXELS, MAX_PIXELS = 32, 4 * 32 * 32, 1280 * 32 * 32
SYSTEM = "Judge whether the Document meets the requirements based on the Query and the Instruct provided. Note that "
SYSTEM += 'the answer can only be "yes" or "no".'
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"


class Scored(NamedTuple):
    """What one pair is for the model: its ids with the places of its images, their pixels, and the score."""

    ids: list[int]
    pixels: Any  # None without images
    score: float


def image_scores(model: Path, pairs: list[Pair], instruction: str | None = None) -> list[Scored]:
    """N pairs, whose images are data URLs; nothing is cut."""
    import torch
    from transformers import AutoProcessor, Qwen3VLForConditionalGeneration

    processor = AutoProcessor.from_pretrained(model, trust_remote_code=False)
    loaded: dict[str, Any] = {"dtype": torch.float32, "trust_remote_code": False}
    network = Qwen3VLForConditionalGeneration.from_pretrained(model, **loaded).eval()
    yes, no = (processor.tokenizer.get_vocab()[token] for token in ("yes", "no"))
    out = []
    with torch.inference_mode():
        for pair in pairs:
            images = [_image(url) for url in pair.images if url]
            text = _prompt(pair, instruction or VL_INSTRUCTION)
            batch = processor(text=[text], images=images or None, do_resize=False, return_tensors="pt")
            logits = network(**batch).logits[0, -1]
            score = torch.sigmoid(logits[yes] - logits[no]).item()
            out.append(Scored(batch["input_ids"][0].tolist(), batch.get("pixel_values"), score))
    return out


def _prompt(pair: Pair, instruction: str) -> str:
    """format_mm_instruction(): an image comes before the text of its side; NULL where a side has neither."""
    sides = [(IMAGE if url else "") + text for text, url in zip((pair.query, pair.document), pair.images, strict=True)]
    query, document = (side or "NULL" for side in sides)
    user = f"<Instruct>: {pair.instruction or instruction}<Query>:{query}\n<Document>:{document}"
    return f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n"


def _image(url: str) -> Any:
    """fetch_image(): on white where it is transparent, and resized."""
    from PIL import Image

    image: Any = Image.open(io.BytesIO(data_of(url)))
    if image.mode == "RGBA":
        white = Image.new("RGB", image.size, (255, 255, 255))
        white.paste(image, mask=image.split()[3])
        image = white
    image = image.convert("RGB")
    width, height = image.size
    sides = [max(FACTOR, round(side / FACTOR) * FACTOR) for side in image.size]
    if sides[0] * sides[1] > MAX_PIXELS:
        ratio = math.sqrt(width * height / MAX_PIXELS)
        sides = [math.floor(side / ratio / FACTOR) * FACTOR for side in image.size]
    elif sides[0] * sides[1] < MIN_PIXELS:
        ratio = math.sqrt(MIN_PIXELS / (width * height))
        sides = [math.ceil(side * ratio / FACTOR) * FACTOR for side in image.size]
    return image.resize((sides[0], sides[1]))

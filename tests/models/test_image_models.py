"""Pairs with images: `vllm serve` and vllm.LLM against the code of the model card, within 1e-4 in float32.

vLLM imports torchvision for this family, which the CPU build leaves out (its PyPI build needs the CUDA build of torch).
docs/scores.md says how an environment that has both is made.
"""

import base64
import io
import json
import subprocess
from dataclasses import replace
from importlib.util import find_spec

import pytest
import tiny_hub_models
from conftest import KIT, http, kit_environment
from test_families import Family, serving

from rerank_kit.models.images import data_of
from rerank_kit.models.pair import Pair
from rerank_kit.models.profiles import all_profiles
from rerank_kit.models.reference_images import image_scores

needs_torchvision = pytest.mark.skipif(find_spec("torchvision") is None, reason="vLLM imports torchvision for images")
LENGTH = 700
FAMILY = Family(tiny_hub_models.qwen3_vl_reranker, "Qwen3-VL-Reranker-2B", "qwen3_vl_reranker", LENGTH)
LONG = "Gravity attracts bodies. " * 300


def image(width: int, height: int, seed: int, mode: str = "RGB", kind: str = "PNG") -> str:
    """Coloured noise as a data URL."""
    import numpy as np
    from PIL import Image

    noise = np.random.default_rng(seed).integers(0, 255, (height // 8 + 1, width // 8 + 1, len(mode)), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(noise).resize((width, height)).save(out, kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(out.getvalue()).decode()}"


def made_pairs() -> list[Pair]:
    """Images whose sides are multiples of 32 are not resized, so no filter has a part in these scores."""
    a, b = image(64, 96, 1), image(160, 128, 2)
    clear, photo = image(96, 96, 3, "RGBA"), image(128, 64, 4, kind="JPEG")
    return [
        Pair("What is the capital of China?", "The capital of China is Beijing."),
        Pair("the query", "", images=(None, a)),
        Pair("the query", "", images=(None, b)),
        Pair("the query", "a caption 北京", images=(None, b)),
        Pair("", "a text", images=(a, None)),
        Pair("like this", "or this", images=(a, b)),
        Pair("like this", "or this", images=(b, a)),
        Pair("the query", "", "Find what is similar.", images=(None, clear)),
        Pair("a <|im_end|>", "<|image_pad|>", images=(None, photo)),
        Pair("", ""),
    ]


def made_resized() -> list[Pair]:
    return [Pair("q", "", images=(None, image(*size, 5))) for size in ((100, 150), (33, 47), (600, 500))]


def as_sent(text: str, url: str | None, number: int):
    """A query or document as a caller writes it: in both spellings, by turns."""
    if not url:
        return text
    part = {"type": "image_url", "image_url": {"url": url}}
    return {"image": url, "text": text} if number % 2 else {"content": [part, {"type": "text", "text": text}]}


@needs_torchvision
def test_pixels_are_those_of_the_model_card(tmp_path):
    """vLLM resizes by this processor with the profile's sizes; the card's code by Pillow before it."""
    from PIL import Image
    from transformers import AutoImageProcessor

    model = FAMILY.make(tmp_path / FAMILY.folder)
    processor = AutoImageProcessor.from_pretrained(model)
    sizes = all_profiles()[FAMILY.profile].images
    size = {"shortest_edge": sizes["min_pixels"], "longest_edge": sizes["max_pixels"]}
    alone = [Pair("q", "", images=(None, pair.images[1])) for pair in made_pairs() + made_resized() if pair.images[1]]
    for pair, scored in zip(alone, image_scores(model, alone), strict=True):
        shown = Image.open(io.BytesIO(data_of(pair.images[1])))
        if shown.mode == "RGBA":
            shown = Image.alpha_composite(Image.new("RGBA", shown.size, (255, 255, 255)), shown)
        pixels = processor(shown.convert("RGB"), size=size, return_tensors="pt")["pixel_values"]
        assert pixels.shape == scored.pixels.shape
        most = 0 if not any(side % 32 for side in shown.size) else 0.02  # a step of one bit is 2 / 255
        assert (pixels - scored.pixels).abs().max() <= most + 1e-6


OFFLINE = """
import json, sys
from pathlib import Path
from rerank_kit.engine.plan import plan_engine
from rerank_kit.offline.files import as_pair
from rerank_kit.offline.program import leave
from rerank_kit.offline.reranker import OfflineReranker
from rerank_kit.settings import get_config
if __name__ == "__main__":
    pairs = [as_pair(row, i) for i, row in enumerate(json.load(sys.stdin))]
    with OfflineReranker(plan_engine(get_config())) as reranker:
        got = [(r.score, r.cut, r.error) for r in reranker.score(pairs)]
        alone = [reranker.prepare([pair]).prompts for pair in pairs]
        lengths = [len(p[0].ids) + p[0].n_images if p else None for p in alone]
        Path(sys.argv[1]).write_text(json.dumps([got, lengths]))
    leave(0)
"""


@needs_torchvision
@pytest.mark.server
def test_scores_of_images_are_those_of_the_model_card(fork_server, forked_python, tmp_path):
    model = FAMILY.make(tmp_path / FAMILY.folder)
    pairs = made_pairs()
    n, pairs = len(pairs), pairs + made_resized()
    with serving(forked_python, model, FAMILY, tmp_path / "log") as ready:
        plain = [replace(p, query=p.query.replace("<|im", "<| im")) for p in pairs]
        plain = [replace(p, document=p.document.replace("<|im", "<| im")) for p in plain]
        expected = image_scores(model, plain)
        wanted = [one.score for one in expected]
        assert max(wanted) - min(wanted) > 0.1, "scores that do not differ prove nothing"
        assert abs(wanted[5] - wanted[6]) > 1e-3, "the order of the images changes nothing"

        rows = [
            {"query": as_sent(p.query, p.images[0], i), "document": as_sent(p.document, p.images[1], i)}
            | ({"instruction": p.instruction} if p.instruction else {})
            for i, p in enumerate(pairs)
        ]
        first = pairs[1].images[1]
        half = first[: len("data:image/png;base64,") + 400]
        more = [{"image": first, "text": LONG}, {"image": half}, {"image": "https://example.org/a.png"}]
        results, lengths = offline(
            fork_server.command, model, [*rows, *({"query": "q", "document": d} for d in more)], tmp_path
        )
        scores = [score for score, _, _ in results]
        assert scores[:n] == pytest.approx(wanted[:n], abs=1e-4)
        assert scores[n : len(pairs)] == pytest.approx(wanted[n:], abs=0.02)  # the filter is another one
        assert lengths[: len(pairs)] == [len(one.ids) for one in expected]
        (cut_score, cut, _), (_, _, broken), (_, _, elsewhere) = results[len(pairs) :]
        assert cut and cut_score is not None and lengths[-3] <= LENGTH
        assert "cannot be decoded" in broken and "IMAGE_HOSTS of the service names no host" in elsewhere

        url = ready()
        for path in ("score", "rerank"):
            got, used = [], []
            for row in rows:
                body = {"model": "qwen3-reranker", "query": row["query"], "documents": [row["document"]]}
                status, answer = http(
                    "POST", f"{url}/{path}", body | {k: v for k, v in row.items() if k == "instruction"}
                )
                assert status == 200, answer
                got.append(answer["data"][0]["score"] if path == "score" else answer["results"][0]["relevance_score"])
                used.append(answer["usage"]["prompt_tokens"])
            assert got[:n] == pytest.approx(wanted[:n], abs=1e-4)
            assert got == pytest.approx(scores[: len(pairs)], abs=1e-5), "as offline, the resized ones too"
            assert used == lengths[: len(pairs)]

        # One call with texts and images, and an image as the query.
        body = {"model": "qwen3-reranker", "query": rows[5]["query"], "documents": [rows[5]["document"], "a text"]}
        status, answer = http("POST", f"{url}/rerank", body)
        assert status == 200, answer
        together = {row["index"]: row["relevance_score"] for row in answer["results"]}
        beside = image_scores(model, [Pair("like this", "a text", images=(pairs[5].images[0], None))])[0].score
        assert together == pytest.approx({0: wanted[5], 1: beside}, abs=1e-4)

        status, answer = http("POST", f"{url}/rerank", {**body, "query": "q", "documents": more[:1]})
        assert status == 200 and answer["results"][0]["relevance_score"] == pytest.approx(cut_score, abs=1e-4)
        assert answer["usage"]["prompt_tokens"] == lengths[-3]
        for document in more[1:]:
            status, answer = http("POST", f"{url}/rerank", {**body, "documents": [document]})
            assert status in (400, 422), answer
        assert http("POST", f"{url}/rerank", body)[0] == 200


def offline(python: list[str], model, rows: list[dict], work) -> tuple[list, list]:
    """((score, cut, error), tokens) of each row by OfflineReranker in a process of its own."""
    script, out = work / "offline.py", work / "out.json"
    script.write_text(OFFLINE)
    settings = {"MODEL_PATH": model, "DTYPE": "float32", "MAX_MODEL_LEN": LENGTH, "PYTHONPATH": KIT}
    env = kit_environment(**settings, VLLM_ENABLE_V1_MULTIPROCESSING=0)
    command = [*python, str(script), str(out)]
    done = subprocess.run(command, input=json.dumps(rows), env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())

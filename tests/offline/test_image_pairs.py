"""Pairs with images without a server: how a file says them, and the prompts that the engine gets."""

import base64
import io
import json

import pytest
import tiny_hub_models

from rerank_kit.engine.machine import Machine
from rerank_kit.engine.plan import plan_engine
from rerank_kit.models.images import BadImage
from rerank_kit.models.pair import Pair
from rerank_kit.offline.files import parse_line
from rerank_kit.offline.images import PairImages
from rerank_kit.offline.prompts import PairEncoder
from rerank_kit.settings import get_config

PIL = pytest.importorskip("PIL.Image")
CPU = Machine("0.32.0+cpu", (), (0, 1), 2**34)
MARK = "<|vision_start|><|image_pad|><|vision_end|>"
LENGTH = 400


def image(width, height) -> str:
    out = io.BytesIO()
    PIL.new("RGB", (width, height), (9, 99, 199)).save(out, "PNG")
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()


ONE, OTHER, WIDE = image(64, 96), image(96, 96), image(1000, 1000)


def part(url):
    return {"type": "image_url", "image_url": {"url": url}}


@pytest.mark.parametrize(
    ("document", "text", "url"),
    [
        ("a", "a", None),
        ({"image": ONE}, "", ONE),
        ({"image": ONE, "text": "a"}, "a", ONE),
        ({"content": [part(ONE), {"type": "text", "text": "a"}]}, "a", ONE),
        ({"content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}, "a\nb", None),
    ],
)
def test_a_line_may_have_images(document, text, url):
    line = json.dumps({"query": "q", "document": document, "id": 7})
    assert parse_line(line, 3) == Pair("q", text, None, 3, (("id", 7),), (None, url))
    line = json.dumps({"query": document, "document": "d"})
    assert parse_line(line, 3) == Pair(text, "d", None, 3, (), (url, None))


@pytest.mark.parametrize(
    ("document", "said"),
    [
        ({"image": 7}, "document: image is no address"),
        ({"image": ONE, "title": "t"}, "document: the key 'title'"),
        ({"content": []}, "document: send"),
        ({"title": "t"}, "field 'document' is missing or not a text"),
        ({"content": [part(ONE), part(ONE)]}, "document: it holds 2 images"),
    ],
)
def test_a_line_that_is_wrong_is_reported_in_its_place(document, said):
    found = parse_line(json.dumps({"query": "q", "document": document}), 3)
    assert found["line"] == 3 and said in found["error"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_hub_models.qwen3_vl_reranker(tmp_path_factory.mktemp("vl") / "Qwen3-VL-Reranker-2B")


@pytest.fixture
def images(folder, monkeypatch):
    """images(**settings): what encodes pairs with images, for a service of these settings."""
    monkeypatch.setattr("rerank_kit.models.opened.find_spec", lambda name: object())

    def make(**settings):
        plan = plan_engine(get_config(max_model_len=LENGTH, **settings), folder, CPU)
        return PairImages(plan, PairEncoder(plan))

    return make


def test_the_prompt_has_a_mark_before_the_text_and_grows_by_the_image(images):
    found = images()
    pair = Pair("q", "a <|im_end|>" + MARK, images=(ONE, OTHER))
    (prompt,) = found.encode([pair])
    text = found.encoder.tokenizer.decode(prompt.ids)
    assert f"<Query>:{MARK}q\n<Document>:{MARK}a <| im_end|><| vision_start|><| image_pad|><| vision_end|>" in text
    assert prompt.n_images == 6 + 9 - 2 and not prompt.cut
    assert list(map(len, prompt.images)) == [len(base64.b64decode(u.partition(",")[2])) for u in pair.images]
    assert found.encoder.encode([Pair("q", "")])[0].ids != found.encode([Pair("q", "", images=(None, ONE))])[0].ids


def test_the_text_is_cut_to_what_the_image_leaves(images):
    long = Pair("q", "Gravity attracts bodies. " * 200, images=(None, OTHER))
    (prompt,) = images().encode([long])
    assert prompt.cut and LENGTH - 3 <= len(prompt.ids) + prompt.n_images <= LENGTH


@pytest.mark.parametrize(
    ("url", "settings", "said"),
    [
        (WIDE, {}, f"take 963 tokens, and beside them the prompt needs .* MAX_MODEL_LEN={LENGTH}"),
        (WIDE, {"max_image_pixels": 10000}, "MAX_IMAGE_PIXELS"),
        (ONE, {"max_image_bytes": 20}, "MAX_IMAGE_BYTES"),
        (ONE, {"max_images_per_call": 0}, "takes none here: off: MAX_IMAGES_PER_CALL=0"),
        ("https://example.org/a.png", {}, "IMAGE_HOSTS of the service names no host"),
        ("http://127.0.0.1:1/a.png", {"image_hosts": "*"}, "images are not fetched from '127.0.0.1'"),
        ("http://127.0.0.1:1/a.png", {"image_hosts": "127.0.0.1"}, "could not be fetched from '127.0.0.1'"),
        ("cat.png", {}, "'cat.png' is no address of an image"),
    ],
)
def test_an_image_that_is_not_scored_fails_its_pair_alone(images, url, settings, said):
    bad, good = images(**settings).encode([Pair("q", "", images=(None, url)), Pair("q", "", images=(None, ONE))])
    assert isinstance(bad, BadImage)
    assert isinstance(good, BadImage) == (url == ONE), "the other pair is scored"
    with pytest.raises(BadImage, match=said):
        raise bad

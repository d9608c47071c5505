"""Queries and documents with images, as the client sends them."""

import base64

import pytest

from rerank_kit.client import images
from rerank_kit.client.images import image_document, parts
from rerank_kit.client.one_call import _Call

PNG = b"\x89PNG\r\n\x1a\n" + b"0" * 30
URL = "data:image/png;base64," + base64.b64encode(PNG).decode()


def call(query, documents, path="/rerank", batch_size=None):
    made = _Call(path, query, documents, None, "m", "http://127.0.0.1:1/v1", None, None, None, batch_size, None, None)
    made.start()
    return made


def sent(made):
    return made.request(made.parts[0])[1]


def test_objects_are_sent_as_they_are():
    parts_of_vllm = {"content": [{"type": "image_url", "image_url": {"url": URL}}, {"type": "text", "text": "b"}]}
    documents = ["a", {"image": URL}, {"image": "https://x.org/y.png", "text": "c"}, parts_of_vllm, {"text": "d"}]
    made = call({"image": URL, "text": "q"}, documents)
    assert sent(made) == {"model": "m", "query": {"image": URL, "text": "q"}, "documents": documents}
    assert sent(call({"image": URL}, documents, "/score"))["text_1"] == {"image": URL}
    rows = [{"index": i, "relevance_score": 0.5} for i in range(5)]
    row = {"model": "m", "results": rows, "_version": "", "_cut": (), "_windows": {}, "_retries": 0, "_url": ""}
    items, _, _ = made.merge([row | {"_listwise": False}])
    assert [item.doc for item in items] == ["a", "", "c", "b", "d"], "doc is a text"


@pytest.mark.parametrize(
    ("document", "said"),
    [
        ({"image": "cat.png"}, "image='cat.png' is no https://... and no data URL; for a file: image_document(path)"),
        ({"image": "/data/cat.png"}, "image_document(path)"),
        ({"image": b"bytes"}, "image_document(path)"),
        ({"image": URL, "title": "t"}, "has the keys ['image', 'title']"),
        ({"page_content": "t"}, "has the keys ['page_content']"),
        ({}, "has the keys []"),
        ({"text": 7}, "text is a int, not a str"),
        ({"image": URL, "text": "half \ud800"}, "lone surrogate"),
        ({"content": [{"type": "text", "text": "half \ud800"}]}, "lone surrogate"),
        ({"content": "t"}, "content is no list"),
        ({"content": [], "text": ""}, "has the keys"),
    ],
)
def test_an_object_that_no_service_takes_is_named_before_anything_is_sent(document, said):
    with pytest.raises(ValueError) as caught:
        call("q", ["a", document])
    assert str(caught.value).startswith("documents[1]") and said in str(caught.value)
    with pytest.raises(ValueError, match=r"^query"):
        call(document, ["a"])


def test_an_image_file_becomes_a_data_url(tmp_path):
    file = tmp_path / "a.bin"
    starts = {"png": PNG, "jpeg": b"\xff\xd8\xff\xe0", "gif": b"GIF89a", "webp": b"RIFF1234WEBPVP8 ", "bmp": b"BM12"}
    for kind, data in starts.items():
        file.write_bytes(data)
        url = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
        assert image_document(file) == {"image": url}
        assert image_document(str(file), "t") == {"image": url, "text": "t"}
    file.write_bytes(b"%PDF-1.7")
    with pytest.raises(ValueError, match="is no PNG, JPEG, WEBP, GIF or BMP image"):
        image_document(file)


def test_lists_with_images_are_split_by_their_bytes_too(monkeypatch):
    monkeypatch.setattr(images, "PART_CHARS", 2 * len(URL))
    shown = {"image": URL}
    assert parts(["a"] * 5, 2, "q") == [range(2), range(2, 4), range(4, 5)]
    assert parts([shown] * 5, 64, "q") == [range(2), range(2, 4), range(4, 5)]
    assert parts([shown] * 3, 64, shown) == [range(1), range(1, 2), range(2, 3)]
    assert parts([shown, "a", "b", shown, "c", shown], 64, "q") == [range(5), range(5, 6)]
    assert parts([], 64, "q") == []
    assert call("q", [shown] * 5).parts == [range(2), range(2, 4), range(4, 5)]


def test_the_client_and_the_door_export_it():
    import model_utils
    import rerank_kit

    assert model_utils.image_document is rerank_kit.image_document is image_document

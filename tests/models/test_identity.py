"""The id of a checkpoint's content: any tensor and any file that can change a score changes it."""

import json
import time
import zipfile
from pathlib import Path

import pytest

from rerank_kit.models.identity import content_id

SIZE = 3 << 20


def checkpoint(folder: Path) -> Path:
    """Three tensors of 3 MiB, and the files of a LogitScore module."""
    names = ("a.weight", "b.weight", "c.weight")
    head = {
        name: {"dtype": "U8", "shape": [SIZE], "data_offsets": [n * SIZE, (n + 1) * SIZE]}
        for n, name in enumerate(names)
    }
    text = json.dumps(head).encode()
    (folder / "1_LogitScore").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(3 * SIZE))
    (folder / "config.json").write_text("{}")
    (folder / "modules.json").write_text('[{"path": "1_LogitScore", "type": "LogitScore"}]')
    (folder / "1_LogitScore" / "config.json").write_text('{"true_token_id": 1}')
    return folder


def change(file: Path, at: int) -> None:
    with file.open("r+b") as content:
        content.seek(at, 2 if at < 0 else 0)
        content.write(b"x")


@pytest.mark.parametrize("place", [-1, -SIZE, -SIZE - 1, -2 * SIZE, -2 * SIZE - 1, -3 * SIZE])
def test_the_first_and_last_bytes_of_every_tensor_count(tmp_path, place):
    folder = checkpoint(tmp_path / "m")
    before = content_id(folder)
    assert before == content_id(folder) and len(before) == 12
    change(folder / "model.safetensors", place)
    assert content_id(folder) != before


def test_names_of_tensors_and_files_of_modules_count(tmp_path):
    folder = checkpoint(tmp_path / "m")
    ids = {content_id(folder)}
    change(folder / "model.safetensors", 10)
    ids.add(content_id(folder))
    (folder / "1_LogitScore" / "config.json").write_text('{"true_token_id": 2}')
    ids.add(content_id(folder))
    (folder / "chat_template.jinja").write_text("x")
    ids.add(content_id(folder))
    assert len(ids) == 4
    (folder / "checkpoint-500").mkdir()
    (folder / "checkpoint-500" / "config.json").write_text("{}")  # of no module: nothing loads it
    assert content_id(folder) in ids


def test_a_file_of_torch_save_counts_by_its_checksums(tmp_path):
    ids = set()
    for byte in (b"a", b"b"):
        with zipfile.ZipFile(tmp_path / "pytorch_model.bin", "w") as archive:
            archive.writestr("data/0", bytes(SIZE) + byte + bytes(SIZE))
        ids.add(content_id(tmp_path))
    assert len(ids) == 2


@pytest.mark.timing
def test_sixteen_gib_take_less_than_two_seconds(tmp_path):
    size = (4 << 30) // 100
    for shard in range(4):
        head = {
            f"layers.{shard}.{n}.weight": {"dtype": "U8", "shape": [size], "data_offsets": [n * size, (n + 1) * size]}
            for n in range(100)
        }
        text = json.dumps(head).encode()
        with (tmp_path / f"model-{shard}.safetensors").open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + 100 * size)  # sparse: it takes no room
    began = time.perf_counter()
    content_id(tmp_path)
    assert time.perf_counter() - began < 2

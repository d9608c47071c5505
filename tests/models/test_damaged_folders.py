"""No folder gives a traceback: what is no checkpoint, or a damaged one, is one ConfigError before vLLM is started.

The soak test damages 2,500 folders, and asks the script itself (`cfg`, and `start` where it must refuse) about every
tenth: python -m pytest -m soak tests/models/test_damaged_folders.py
"""

import json
import os
import random
import re
import shutil
import time
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import free_port, run_kit
from library import checkpoints_of

from rerank_kit.engine.machine import Machine
from rerank_kit.engine.plan import plan_service
from rerank_kit.models.download import locate
from rerank_kit.settings import ConfigError, get_config

CPU = Machine("0.32.0+cpu", (), (0, 1), 16 * 2**30)
FOLDERS = ("own_default_prompt", "Qwen3-Reranker-true_false", "seq_cls-official", "ms-marco", "qwen_embedding-plain")
VALUES = (None, True, 7, -1, 0, 1e30, "", "text", [], [1], {}, {"a": []}, [None], "\ud7ff", 10**30, [[["a"]]])
TEXTS = (
    b"",
    b"\0" * 4096,
    b"null",
    b"[]",
    b'"x"',
    b"{",
    b"[" * 20_000,
    b"<!DOCTYPE html><html><body>401</body></html>",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    b"\xff\xfe{\x00}\x00",
    b"PK\x03\x04 not a zip",
    b"\x80\x02 not a pickle",
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> list[Path]:
    return checkpoints_of(tmp_path_factory.mktemp("whole"), FOLDERS)


def planned(folder: Path) -> str | None:
    """None if the folder is planned for, the reason if it is refused; any other exception is the test's failure."""
    began = time.monotonic()
    try:
        plan_service(get_config(), locate(str(folder)), CPU)
    except ConfigError as exc:
        said = str(exc)
        reason, *listing = said.splitlines()
        assert reason and len(said) < 3000, said
        assert all(line.startswith(("  ", "use instead: ", "profiles that are served: ")) for line in listing), (
            "a list, below one line"
        )
        return said
    finally:
        assert time.monotonic() - began < 5
    return None


def damage(folder: Path, rng: random.Random) -> str:
    """Damage one file of a folder, or a value in one; says how."""
    files = sorted(f for f in folder.rglob("*") if f.is_file() and f.name != "made_by.json")
    file = rng.choice(files)
    kind = rng.choice(("value", "value", "value", "cut", "text", "delete", "swap", "dangle", "folder", "bytes"))
    data = file.read_bytes()
    if kind == "value" and file.suffix == ".json":
        with suppress(ValueError, RecursionError):  # damaged before
            tree = json.loads(data)
            where = change(tree, rng) if isinstance(tree, (dict, list)) else ""
            file.write_text(json.dumps(tree))
            return f"{kind} {file.name} {where}"
    if kind == "cut":
        file.write_bytes(data[: rng.randrange(len(data) or 1)])
    elif kind == "text":
        file.write_bytes(rng.choice(TEXTS))
    elif kind == "swap":
        other = rng.choice(files)
        content = other.read_bytes()
        other.write_bytes(data)
        file.write_bytes(content)
    elif kind == "bytes":
        spoilt = bytearray(data or b"x")
        for _ in range(rng.randint(1, 40)):
            spoilt[rng.randrange(min(len(spoilt), 4000))] = rng.randrange(256)
        file.write_bytes(bytes(spoilt))
    else:
        file.unlink()
        if kind == "dangle":
            file.symlink_to(folder / "blobs" / "gone")
        elif kind == "folder":
            file.mkdir()
    return f"{kind} {file.name}"


def change(tree, rng: random.Random) -> str:
    """Replace or remove one value somewhere in a JSON tree."""
    path = []
    while True:
        keys = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
        if not keys:
            return "/".join(path)
        key = rng.choice(keys[:40])
        path.append(str(key))
        if isinstance(tree[key], (dict, list)) and tree[key] and rng.random() < 0.6:
            tree = tree[key]
            continue
        if isinstance(tree, dict) and rng.random() < 0.1:
            del tree[key]
        else:
            tree[key] = rng.choice(VALUES)
            path.append(f"= {str(tree[key])[:20]}")
        return "/".join(path)


@pytest.mark.parametrize("n", [160, pytest.param(2500, marks=pytest.mark.soak)])
def test_a_damaged_folder_is_refused_in_words_or_planned_for(whole, tmp_path, n, monkeypatch):
    monkeypatch.setenv("LOG_DIR", str(tmp_path / "log"))
    rng, refused = random.Random(n), 0
    for number in range(n):
        folder = tmp_path / "Qwen3-Reranker-damaged"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(whole[number % len(whole)], folder)
        how = " and ".join(damage(folder, rng) for _ in range(rng.randint(1, 2)) if any(folder.iterdir()))
        where = f"{number}: {whole[number % len(whole)].name}: {how}"
        try:
            said = planned(folder)
        except Exception as exc:
            raise AssertionError(where) from exc
        refused += said is not None
        if n > 1000 and number % 10 == 0:
            ask_the_script(folder, tmp_path / "log", said, where)
    assert n / 4 < refused < n, refused


def cpu_s() -> float:
    """CPU time of all processes that this one has waited for."""
    return sum(os.times()[2:4])


def ask_the_script(folder: Path, log: Path, refusal: str | None, where: str) -> None:
    """`cfg` and `start` end within 5 s with the line of the refusal; what is planned for is never started."""
    settings = {"MODEL_PATH": folder, "LOG_DIR": log, "PORT": free_port()}
    for action in ("cfg", "start") if refusal else ("cfg",):
        began = cpu_s()  # a busy machine is no fault of the script
        done = run_kit(action, **settings, timeout_s=30)
        took_s, lines = cpu_s() - began, done.stderr.splitlines()
        assert took_s < 5, f"{where}: {action} took {took_s:.1f} s"
        if refusal:
            wanted = f"ConfigError: {refusal}".splitlines()
            memory = r"[\d.]+ GiB of free memory"  # another machine than CPU
            lines, wanted = ([re.sub(memory, "", line) for line in some] for some in (lines, wanted))
            assert (done.returncode, lines) == (6, wanted), f"{where}: {action}: {done.stderr}"
        else:
            assert done.returncode == 0 and "Traceback" not in done.stderr, f"{where}: {action}: {done.stderr}"


CASES = {
    "adapter": (["adapter_config.json", "adapter_model.safetensors"], "is a LoRA adapter for org/base .*merge it"),
    "gguf": (["model-q4.gguf"], "holds a GGUF file"),
    "onnx": (["model.onnx"], "holds an ONNX export"),
    "part": (["model.safetensors.incomplete"], "interrupted download"),
    "weights alone": (["model.safetensors"], "holds weights and no config.json"),
    "nothing": ([], "is empty"),
    "other": (["notes.txt"], "is it the folder of a checkpoint"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_folder_without_config_says_what_it_is(case, tmp_path):
    files, said = CASES[case]
    for name in files:
        (tmp_path / name).write_text('{"base_model_name_or_path": "org/base"}')
    with pytest.raises(ConfigError, match=said):
        planned_or_raise(tmp_path)


def planned_or_raise(folder: Path):
    return plan_service(get_config(), locate(str(folder)), CPU)


def test_a_folder_above_checkpoints_names_them(whole, tmp_path):
    shutil.copytree(whole[3], tmp_path / "checkpoint-500")
    with pytest.raises(ConfigError, match="checkpoint-500 does: give that folder"):
        planned_or_raise(tmp_path)


def test_an_adapter_beside_a_config_is_no_model(whole, tmp_path):
    folder = shutil.copytree(whole[0], tmp_path / "Qwen3-Reranker-lora")
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "Qwen/Qwen3-Reranker-0.6B"}')
    with pytest.raises(ConfigError, match="LoRA adapter for Qwen/Qwen3-Reranker"):
        planned_or_raise(folder)


def test_the_hub_caches_folder_of_a_model_is_its_snapshot(whole, tmp_path):
    model = tmp_path / "models--Qwen--Qwen3-Reranker-tiny"
    for name in ("abc", "def"):
        shutil.copytree(whole[0], model / "snapshots" / name)
    with pytest.raises(ConfigError, match="2 snapshots"):
        locate(str(model))
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text("def")
    assert locate(str(model)) == model / "snapshots" / "def"
    planned_or_raise(model)
    file = model / "snapshots" / "def" / "model.safetensors"
    file.unlink()
    file.symlink_to("../../blobs/gone")
    with pytest.raises(ConfigError, match=r"model\.safetensors is a link to .*gone, which does not exist"):
        planned_or_raise(model)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda f: (f / "tokenizer.json").unlink(), "has no tokenizer .*copy tokenizer.json"),
        (lambda f: (f / "model.safetensors").unlink(), "holds config.json and no weights"),
        (lambda f: os.truncate(f / "model.safetensors", 5000), "is cut off: 5000 bytes of|is no safetensors file"),
        (lambda f: (f / "model.safetensors").write_bytes(TEXTS[8]), "it is a pointer of Git LFS"),
        (lambda f: (f / "model.safetensors").write_bytes(TEXTS[7]), "it is a web page"),
        (lambda f: (f / "config.json").write_bytes(TEXTS[7]), "config.json cannot be read as JSON: it is a web page"),
        (lambda f: edit(f, vocab_size=77), "vocab_size=77 and hidden_size=32, and the weights have 960 x 32"),
        (lambda f: edit(f, hidden_size="32"), 'config.json has hidden_size="32", and a whole number of at least 1'),
        (
            lambda f: edit(f, quantization_config={"quant_method": "exl2"}),
            'quant_method="exl2", which the installed vLLM does not',
        ),
        (lambda f: edit(f, architectures=None), "names no architectures"),
    ],
)
def test_a_spoilt_file_is_named_with_its_remedy(whole, tmp_path, spoil, said):
    folder = shutil.copytree(whole[0], tmp_path / "Qwen3-Reranker-tiny")
    assert planned(folder) is None
    spoil(folder)
    with pytest.raises(ConfigError, match=said) as caught:
        planned_or_raise(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def edit(folder: Path, **values) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


def test_quantised_weights_are_left_to_vllm(whole, tmp_path):
    folder = shutil.copytree(whole[0], tmp_path / "Qwen3-Reranker-awq")
    edit(folder, quantization_config={"quant_method": "awq", "bits": 4}, vocab_size=77)
    assert planned(folder) is None

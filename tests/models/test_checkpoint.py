"""Which profile serves a checkpoint, and how a checkpoint gets here."""

import json
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
from conftest import KIT, kit_environment, run_kit

from rerank_kit.models import download
from rerank_kit.models.checkpoint import Checkpoint, read_checkpoint
from rerank_kit.models.download import locate
from rerank_kit.models.profiles import find_profile, load_profiles
from rerank_kit.settings import ConfigError


def checkpoint(name, architectures, modules=(), logit_tokens=None, **config):
    return Checkpoint(Path("/m") / name, {"architectures": architectures, **config}, modules, logit_tokens)


MODULES = [("", "Transformer"), ("1_LogitScore", "LogitScore")]
ONE_LABEL = {"id2label": {"0": "LABEL_0"}}
THREE_LABELS = {"id2label": {"0": "a", "1": "b", "2": "c"}}


@pytest.mark.parametrize(
    ("found", "profile"),
    [
        (checkpoint("Qwen3-Reranker-8B", ["Qwen3ForCausalLM"]), "qwen3_reranker"),
        (checkpoint("my_model", ["Qwen3ForCausalLM"], ("Transformer", "LogitScore"), (9693, 2152)), "qwen3_reranker"),
        (checkpoint("Qwen3-Reranker-0___6B", ["Qwen3ForCausalLM"]), "qwen3_reranker"),
        (
            checkpoint("qwen3_reranker_ft-seq", ["Qwen3ForSequenceClassification"], **ONE_LABEL),
            "qwen3_reranker_seq_cls",
        ),
        (checkpoint("bge-reranker-v2-m3", ["XLMRobertaForSequenceClassification"], **ONE_LABEL), "cross_encoder"),
        (
            checkpoint("Qwen3-Embedding-0.6B", ["Qwen3ForCausalLM"], ("Transformer", "Pooling", "Normalize")),
            "embedding",
        ),
        (checkpoint("all-MiniLM-L6-v2", ["BertModel"], ("Transformer", "Pooling", "Normalize")), "embedding"),
    ],
)
def test_find_profile_from_the_files(found, profile):
    assert find_profile(found).name == profile


@pytest.mark.parametrize(
    "found",
    [
        checkpoint("Qwen3-0.6B", ["Qwen3ForCausalLM"]),  # a language model: yes/no of it means nothing
        checkpoint("my-nli", ["BertForSequenceClassification"], **THREE_LABELS),
        checkpoint("two-labels", ["BertForSequenceClassification"]),
        checkpoint("Qwen3-other", ["Qwen3ForSequenceClassification"], **ONE_LABEL),
        checkpoint("bert-base", ["BertModel"]),  # no pooling named: not an embedding model
        checkpoint("llama", ["LlamaForCausalLM"]),
        checkpoint("empty", None),
    ],
)
def test_find_profile_refuses_what_it_cannot_know(found):
    with pytest.raises(ConfigError) as caught:
        find_profile(found)
    for name in load_profiles():
        assert name in str(caught.value)


def test_find_profile_takes_the_wanted_one_and_refuses_unknown_names():
    assert find_profile(checkpoint("x", ["Qwen3ForCausalLM"]), "qwen3_reranker").name == "qwen3_reranker"
    with pytest.raises(ConfigError, match="MODEL_PROFILE='nope' is unknown"):
        find_profile(checkpoint("x", ["Qwen3ForCausalLM"]), "nope")


def test_name_is_read_from_a_hub_cache_but_not_from_any_parent():
    inside = Checkpoint(
        Path("/c/models--Qwen--Qwen3-Reranker-4B/snapshots/abc"), {"architectures": ["Qwen3ForCausalLM"]}, (), None
    )
    assert find_profile(inside).name == "qwen3_reranker"
    beside = Checkpoint(Path("/data/qwen3-reranker/Qwen3-0.6B"), {"architectures": ["Qwen3ForCausalLM"]}, (), None)
    with pytest.raises(ConfigError):
        find_profile(beside)


def test_read_checkpoint_names_what_is_wrong(tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        read_checkpoint(tmp_path / "none")
    with pytest.raises(ConfigError, match=r"holds no config\.json"):
        read_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot be read as JSON"):
        read_checkpoint(tmp_path)


def test_read_checkpoint_finds_the_logit_tokens(tmp_path):
    (tmp_path / "1_LogitScore").mkdir()
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["Qwen3ForCausalLM"]}))
    modules = [{"type": "sentence_transformers.base.modules.LogitScore", "path": "1_LogitScore"}]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    (tmp_path / "1_LogitScore" / "config.json").write_text(json.dumps({"true_token_id": 9693, "false_token_id": 2152}))
    assert find_profile(read_checkpoint(tmp_path)).name == "qwen3_reranker"


def test_template_text_carries_the_instruction_and_refuses_it_where_there_is_none():
    profiles = load_profiles()
    text = profiles["qwen3_reranker"].template_text('say "yes" {{ 1 }}')
    assert '"say \\"yes\\" {{ 1 }}"' in text
    with pytest.raises(ConfigError, match="takes none"):
        profiles["cross_encoder"].template_text("x")


@pytest.mark.parametrize("model", ["/no/such/folder", "./rel", "~/nothing-here", "a/b/c", "name"])
def test_locate_refuses_what_is_neither_folder_nor_hub_id(model):
    with pytest.raises(ConfigError, match="does not exist"):
        locate(model)


class FakeHub(BaseHTTPRequestHandler):
    """As much of the Hugging Face API as a snapshot download asks for."""

    files: ClassVar[dict[str, bytes]] = {}
    sha = "0123456789abcdef0123456789abcdef01234567"

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = self.path.split("?")[0]
        if "/tree/" in path:
            data = json.dumps(
                [{"type": "file", "path": n, "size": len(d), "oid": str(len(d))} for n, d in self.files.items()]
            ).encode()
        elif path.startswith("/api/models/"):
            siblings = [{"rfilename": name} for name in self.files]
            data = json.dumps(
                {"id": "org/m", "modelId": "org/m", "sha": self.sha, "siblings": siblings, "tags": []}
            ).encode()
        elif "/resolve/" in path:
            data = self.files[path.rsplit("/", 1)[1]]
        else:
            data = b"hub"
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", f'"{len(data)}-{abs(hash(data))}"')
        self.send_header("X-Repo-Commit", self.sha)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    FakeHub.files = {"config.json": b'{"architectures": ["BertModel"]}', "model.safetensors": b"weights"}
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def run_locate(model, tmp_path, **env):
    settings = {"HF_HOME": tmp_path / "hf", "MODELSCOPE_DOMAIN": "127.0.0.1:9", "HF_HUB_DISABLE_XET": 1, **env}
    command = [sys.executable, "-m", "rerank_kit.models.download", "locate", model]
    return subprocess.run(
        command, env=kit_environment(**settings), capture_output=True, text=True, timeout=120, cwd=KIT
    )


def test_locate_downloads_from_hf_endpoint_and_then_needs_no_hub(hub, tmp_path):
    first = run_locate("org/m", tmp_path, HF_ENDPOINT=hub)
    assert first.returncode == 0, first.stderr
    folder = Path(first.stdout.strip())
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    offline = run_locate("org/m", tmp_path, HF_ENDPOINT="http://127.0.0.1:9")
    assert (offline.returncode, offline.stdout) == (0, first.stdout)


def test_locate_refuses_a_half_downloaded_model_without_a_hub(hub, tmp_path):
    folder = Path(run_locate("org/m", tmp_path, HF_ENDPOINT=hub).stdout.strip())
    (folder / "model.safetensors").unlink()
    done = run_locate("org/m", tmp_path, HF_ENDPOINT="http://127.0.0.1:9")
    assert done.returncode == 6
    assert "org/m is not on this machine and no hub gave it" in done.stderr
    assert "HF_ENDPOINT" in done.stderr


def test_a_python_without_tokenizers_is_one_line(kit):
    """The checkpoint names its score tokens by their ids, and only the tokenizer knows their text."""
    folder = kit.root / "ft"
    shutil.copytree(kit.settings["MODEL_PATH"], folder)
    modules = [{"idx": n, "name": str(n), "path": path, "type": f"x.{kind}"} for n, (path, kind) in enumerate(MODULES)]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_LogitScore").mkdir()
    (folder / "1_LogitScore" / "config.json").write_text('{"true_token_id": 3, "false_token_id": 4}')
    done = kit("cfg", MODEL_PATH=folder)
    assert (done.returncode, done.stdout) == (6, "")
    (line,) = done.stderr.splitlines()
    assert (
        f"cannot read {folder}/tokenizer.json: No module named 'tokenizers'" in line
        and "start_rerank.sh python" in line
    )


def test_minilm_is_downloaded_once_and_checked(tmp_path, monkeypatch):
    monkeypatch.setattr(download, "MINILM_DIR", tmp_path / "models" / "all-MiniLM-L6-v2")
    folder = download.minilm()
    stamp = (folder / "model.safetensors").stat().st_mtime_ns
    assert find_profile(read_checkpoint(folder)).name == "embedding"
    assert download.minilm() == folder and (folder / "model.safetensors").stat().st_mtime_ns == stamp
    (folder / "model.safetensors").write_bytes(b"damaged")
    download.minilm()  # repairs it
    assert download._sha256(folder / "model.safetensors") == download.MINILM_SHA256
    monkeypatch.setattr(download, "MINILM_SHA256", "0" * 64)
    with pytest.raises(ConfigError, match="sha256 differs"):
        download.minilm()


def test_cfg_of_an_unknown_checkpoint_lists_the_profiles(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    done = run_kit("cfg", MODEL_PATH=tmp_path)
    assert done.returncode == 6
    assert "LlamaForCausalLM" in done.stderr and "profiles that are served: bge_reranker_v2_gemma" in done.stderr
    assert "use instead: MODEL_PROFILE" in done.stderr and "TEMPLATE=FILE and SCORE_TOKENS" in done.stderr

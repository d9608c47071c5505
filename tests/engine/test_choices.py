"""Choices by model and machine: API processes, fastokens; what the plan makes of them."""

import json
import shutil
from itertools import pairwise

import pytest

from rerank_kit.engine import choices
from rerank_kit.engine import plan as engine_plan
from rerank_kit.engine.choices import (
    api_servers,
    count_weights,
    engines_per_gpu,
    fastokens_agrees,
    graph_sizes,
    whole_calls,
    whole_graphs,
)
from rerank_kit.engine.machine import Machine
from rerank_kit.engine.plan import plan_engine, plan_service
from rerank_kit.serving.command import explain, serve_args
from rerank_kit.settings import get_config

fastokens = pytest.importorskip("fastokens")  # x86-64 only
H100 = Machine("0.32.0", ("NVIDIA H100, 81559",), tuple(range(16)), 2**37)
QWEN3 = {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151669, "tie_word_embeddings": True}
SIZES = {
    0.596e9: {"hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16, "num_hidden_layers": 28},
    4.02e9: {"hidden_size": 2560, "intermediate_size": 9728, "num_attention_heads": 32, "num_hidden_layers": 36},
    8.19e9: {
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_attention_heads": 32,
        "num_hidden_layers": 36,
        "tie_word_embeddings": False,
    },
}


@pytest.mark.parametrize("n_weights", SIZES)
def test_weights_are_counted_from_the_config(n_weights):
    assert count_weights({**QWEN3, **SIZES[n_weights]}) == pytest.approx(n_weights, rel=0.005)
    assert count_weights({}) == 0


@pytest.mark.parametrize(
    ("n_weights", "n_cores", "dp", "n"),
    [
        *((0.6e9, 16, 1, 4), (0.6e9, 4, 1, 2), (0.6e9, 2, 1, 1), (4e9, 16, 1, 2), (4e9, 4, 1, 1), (8e9, 64, 1, 1)),
        *((0.6e9, 32, 2, 8), (0.6e9, 16, 8, 8), (8e9, 64, 4, 4)),
    ],
)
def test_small_models_get_more_api_processes(n_weights, n_cores, dp, n):
    assert api_servers(n_weights, n_cores, dp)[0] == n


@pytest.mark.parametrize(
    ("n_weights", "gpu_mib", "n_cores", "n"),
    [
        (0.6e9, 81559, 16, 3),
        (0.6e9, 81559, 12, 2),
        (0.6e9, 81559, 8, 1),
        (0.6e9, 24564, 16, 1),
        (4e9, 81559, 64, 1),
        (0, 81559, 16, 1),
    ],
)
def test_small_models_share_a_large_gpu(n_weights, gpu_mib, n_cores, n):
    assert engines_per_gpu(n_weights, gpu_mib, n_cores)[0] == n


def test_fastokens_is_used_only_with_the_same_ids(checkpoints, monkeypatch, tmp_path):
    assert fastokens_agrees(checkpoints["qwen3"])[0]
    agrees, why = fastokens_agrees(checkpoints["bert"])
    assert not agrees and "BertNormalizer" in why
    assert fastokens_agrees(tmp_path) == (False, "the checkpoint has no tokenizer.json")

    # One added token is known to fastokens alone: only a text that spells it shows the difference.
    data = json.loads((checkpoints["qwen3"] / "tokenizer.json").read_text())
    real = fastokens.Tokenizer.from_file

    class Other:
        @staticmethod
        def from_file(path):
            data["added_tokens"] = [t for t in data["added_tokens"] if t["content"] != "<|box_end|>"]
            (tmp_path / "other.json").write_text(json.dumps(data))
            return real(str(tmp_path / "other.json"))

    monkeypatch.setattr(fastokens, "Tokenizer", Other)
    agrees, why = fastokens_agrees(checkpoints["qwen3"])
    assert not agrees and "different ids" in why

    def missing(_):
        raise choices.PackageNotFoundError

    monkeypatch.setattr(choices, "version", missing)
    assert fastokens_agrees(checkpoints["qwen3"]) == (False, "fastokens is not installed")


def test_the_plan_of_a_gpu_service_feeds_the_gpu(checkpoints, monkeypatch):
    monkeypatch.delenv("VLLM_USE_FASTOKENS", raising=False)
    plan = plan_service(get_config(), checkpoints["qwen3"], H100)
    args = serve_args(plan)
    assert args[args.index("--api-server-count") + 1] == "4" and plan.env["GUARD_API_SERVERS"] == "4"
    assert plan.env["VLLM_USE_FASTOKENS"] == "1"
    shown = explain(plan)
    assert "api_server_count: 4: one API process" in shown
    assert "fastokens: on: fastokens 0.3.5 and tokenizers gave the same ids" in shown

    plan = plan_service(get_config(api_server_count=1), checkpoints["bert"], H100)
    args = serve_args(plan)
    assert args[args.index("--api-server-count") + 1] == "1"
    assert "VLLM_USE_FASTOKENS" not in plan.env and "fastokens: off: " in explain(plan)

    monkeypatch.setenv("VLLM_USE_FASTOKENS", "0")
    assert "VLLM_USE_FASTOKENS" not in plan_service(get_config(), checkpoints["qwen3"], H100).env


@pytest.mark.parametrize("other", [{"offline": True}, {"dp": 2}, {"cpu": True}])
def test_other_services(checkpoints, monkeypatch, other):
    monkeypatch.delenv("VLLM_USE_FASTOKENS", raising=False)
    machine = Machine("0.32.0+cpu", (), tuple(range(16)), 2**37) if "cpu" in other else H100
    if "dp" in other:
        machine = Machine("0.32.0", H100.gpus * 2, H100.cores, 2**37)
    make = plan_engine if "offline" in other else plan_service
    plan = make(get_config(dp=other.get("dp", 1)), checkpoints["qwen3"], machine)
    # Two copies need twice the API processes of one.
    assert ("--api-server-count" in serve_args(plan)) == ("dp" in other)
    assert ("VLLM_USE_FASTOKENS" in plan.env) == ("dp" in other)


@pytest.mark.parametrize(
    ("vllm", "extra", "fits"),
    [
        *(("0.32.0", "", True), ("0.32.1", "--max-logprobs 1", True), ("0.32.0+cpu", "", True), ("0.33.0", "", False)),
        *(("0.26.0", "", False), ("0.32.0", "--async-scheduling", False), ("0.32.0", "--scheduler_cls a.B", False)),
        *(("0.32.0", "-pp 2", False), ("0.32.0", "--kv-transfer-config {}", False)),
    ],
)
def test_whole_calls_only_with_the_scheduler_that_is_known(vllm, extra, fits):
    found, why = whole_calls(vllm, extra)
    assert found == fits and (fits or extra.split(" ")[0][:12] in why or vllm in why)


@pytest.mark.parametrize("limit", [50, 512, 5000, 8192, 24576])
def test_graph_sizes_pad_little(limit):
    sizes = graph_sizes(limit)
    assert sizes == sorted(set(sizes)) and sizes[-1] == min(limit, 8192) and len(sizes) <= 40
    for small, big in pairwise([0, *sizes]):
        assert big - small <= (32 if big <= 256 else 64 if big <= 512 else big / 5)


@pytest.mark.parametrize(
    ("vllm", "fits"), [("0.26.0", False), ("0.31.4", False), ("0.32.0", True), ("0.33.0+cu130", True)]
)
def test_step_graphs_are_for_releases_that_they_were_measured_with(checkpoints, vllm, fits):
    plan = plan_service(get_config(), checkpoints["qwen3"], Machine(vllm, H100.gpus, H100.cores, 2**37))
    assert ("compilation_config" in plan.engine) == fits
    assert ("this is " + vllm in plan.why["compilation_config"]) != fits


QWEN = {"model_type": "qwen3", "torch_dtype": "bfloat16"}


@pytest.mark.parametrize(
    ("vllm", "capabilities", "dtype", "config", "extra", "said"),
    [
        ("0.32.0", ("9.0", "9.0"), "auto", QWEN, "--max-logprobs 1", None),
        ("0.33.0", ("9.0",), "auto", QWEN, "", "not that of 0.33.0"),
        ("0.32.0", ("9.0", "8.9"), "auto", QWEN, "", "Hopper"),
        ("0.32.0", (), "auto", QWEN, "", "Hopper"),
        ("0.32.0", ("9.0",), "float32", QWEN, "", "16 bits"),
        ("0.32.0", ("9.0",), "auto", {"model_type": "qwen3", "dtype": "float32"}, "", "16 bits"),
        ("0.32.0", ("9.0",), "auto", {"model_type": "gemma"}, "", "Qwen"),
        ("0.32.0", ("9.0",), "auto", QWEN, "--worker-cls a.B", "EXTRA_ARGS holds --worker-cls"),
        ("0.32.0", ("9.0",), "auto", QWEN, "--attention-backend X", "EXTRA_ARGS holds --attention-backend"),
    ],
)
def test_whole_graphs_only_where_they_are_proved(vllm, capabilities, dtype, config, extra, said):
    fits, why = whole_graphs(vllm, capabilities, dtype, config, extra)
    assert fits == (said is None) and (said or "one launch") in why


def test_whole_graphs_reach_the_service(checkpoints, monkeypatch, tmp_path):
    half = tmp_path / "Qwen3-Reranker-tiny"  # config.json says in which precision a checkpoint is served
    shutil.copytree(checkpoints["qwen3"], half)
    config = json.loads((half / "config.json").read_text())
    (half / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    monkeypatch.setattr(engine_plan, "compute_capabilities", lambda: ("9.0",))
    plan = plan_service(get_config(dtype="bfloat16"), half, H100)
    args = serve_args(plan, group=2)
    assert args[args.index("--worker-cls") + 1] == "rerank_kit.engine.whole_graphs.WholeGraphs"
    assert json.loads(args[args.index("--attention-config") + 1]) == {"flash_attn_max_num_splits_for_cuda_graph": 1}
    two = Machine("0.32.0", H100.gpus * 2, H100.cores, 2**37)
    parallel = plan_service(get_config(tp=2), half, two)
    assert "worker_cls" not in parallel.engine and "TP=1" in parallel.why["worker_cls"]
    monkeypatch.setattr(engine_plan, "compute_capabilities", lambda: ("8.0",))
    assert "worker_cls" not in plan_service(get_config(), half, H100).engine
    monkeypatch.setattr(engine_plan, "compute_capabilities", lambda: ("9.0",))
    assert "worker_cls" not in plan_service(get_config(), checkpoints["qwen3"], H100).engine  # float32


def test_whole_graphs_are_a_worker_of_the_installed_vllm():
    """The command line and the modes that whole_graphs.py relies on exist in this release."""
    pytest.importorskip("vllm")
    from vllm.config import AttentionConfig, CUDAGraphMode
    from vllm.v1.attention.backend import AttentionCGSupport

    assert CUDAGraphMode.FULL.has_full_cudagraphs() and AttentionCGSupport.ALWAYS
    assert AttentionConfig(flash_attn_max_num_splits_for_cuda_graph=1).flash_attn_max_num_splits_for_cuda_graph == 1


def test_light_load_is_planned_for_a_small_decoder_on_a_large_gpu(checkpoints):
    def engine(machine=H100, model="qwen3", **settings):
        return plan_service(get_config(**settings), checkpoints[model], machine)

    plan = engine()
    args = serve_args(plan, group=1)
    assert args[args.index("--scheduler-cls") + 1] == "rerank_kit.engine.call_scheduler.CallScheduler"
    assert plan.env["RERANK_ENGINES"] == "3"
    sizes = json.loads(args[args.index("--compilation-config") + 1])
    assert sizes == {"cudagraph_mode": "PIECEWISE", "cudagraph_capture_sizes": graph_sizes(8192)}
    assert "graphs for steps of whole calls" in explain(plan) and "scored in one step" in explain(plan)
    own = engine(extra_args="--scheduler-cls a.B --compilation-config {}")
    assert "scheduler_cls" not in own.engine and "compilation_config" not in own.engine
    assert "EXTRA_ARGS holds --scheduler-cls" in explain(own)
    small = engine(Machine("0.32.0", ("NVIDIA L4, 23034",), tuple(range(16)), 2**37))
    assert "compilation_config" not in small.engine and "scheduler_cls" in small.engine
    assert "compilation_config" not in engine(model="bert").engine
    assert "compilation_config" not in plan_engine(get_config(), checkpoints["qwen3"], H100).engine

"""What can be turned, in which steps, and how it is written."""

import dataclasses

import pytest

from rerank_kit.benchmark import knobs as benchmark_knobs
from rerank_kit.benchmark.knobs import NAMES, Knob, flag, knobs_of, label_of, settings_of
from rerank_kit.benchmark.service import read_cfg
from rerank_kit.engine.machine import Machine
from rerank_kit.engine.plan import plan_service
from rerank_kit.serving.command import explain, shown_args
from rerank_kit.settings import EnvConfig, get_config

CFG = """# settings
PORT=11438
# machine
vllm={vllm} gpus={gpus} cores=16 free_memory_gib=100.0
# why
max_model_len: 4096 (x)
# command
CUDA_VISIBLE_DEVICES=0 VLLM_API_KEY=*** vllm serve /m --max-model-len 4096 --hf-overrides '{{"a": [1, 2]}}' \
--max-num-batched-tokens 24576 --max-num-seqs 256 --gpu-memory-utilization 0.85 --api-server-count 4 {more}
"""


def shown(vllm="0.32.0", gpus="NVIDIA H100, 81559; NVIDIA H100, 81559", more=""):
    return read_cfg(CFG.format(vllm=vllm, gpus=gpus, more=more))


def test_read_cfg_has_command_and_machine():
    found = shown()
    assert found["words"][:4] == ["serve", "/m", "--max-model-len", "4096"] and '{"a": [1, 2]}' in found["words"]
    assert found["env"] == {"CUDA_VISIBLE_DEVICES": "0", "VLLM_API_KEY": "***"}
    assert (found["vllm"], found["gpus"], found["cores"]) == ("0.32.0", 2, 16)
    assert shown("0.32.0+cpu", "none")["gpus"] == 0


def test_engines_that_share_a_gpu_are_one_service(checkpoints):
    """The first of their commands has the API; --tune once read the last one and refused every running service."""
    machine = Machine("0.32.0", ("NVIDIA H100, 81559",), tuple(range(16)), 2**37)
    cfg = get_config(engines_per_gpu=3)
    plan = plan_service(cfg, checkpoints["qwen3"], machine)
    found = read_cfg(explain(plan))
    assert found["words"] == shown_args(plan) and found["engines"] == 3
    now, knobs = knobs_of(found, cfg)
    assert (now["ENGINES_PER_GPU"], now["API_SERVER_COUNT"], now["GPU_MEMORY_UTILIZATION"]) == (3, 4, 0.85)
    knob = next(k for k in knobs if k.name == "ENGINES_PER_GPU")
    assert [v["ENGINES_PER_GPU"] for v in knob.path(now, up=False)] == [1]
    assert settings_of(now | {"ENGINES_PER_GPU": 1}, now, "") == {"ENGINES_PER_GPU": "1"}


def test_flag_takes_the_last_one():
    assert flag(["--a", "1", "--a=2", "--b", "0.5"], "--a") == 2 and flag(["--b", "0.5"], "--b") == 0.5
    assert flag([], "--a", 7) == 7


def test_knobs_of_a_gpu_host_and_of_a_cpu():
    now, knobs = knobs_of(shown(), EnvConfig())
    assert now["MAX_NUM_SEQS"] == 256 and now["API_SERVER_COUNT"] == 4 and now["GPU_MEMORY_UTILIZATION"] == 0.85
    by_name = {k.name: k for k in knobs}
    assert list(by_name) == [name for name in NAMES if name in by_name] and "GPU_MEMORY_UTILIZATION" in by_name
    assert by_name["TP_DP"].choices == ((1, 1), (1, 2), (2, 1))
    # The user's own choice of GPUs is kept.
    two = EnvConfig(tp=2, cuda_visible_devices="0,1")
    assert {k.name: k for k in knobs_of(shown(), two)[1]}["TP_DP"].choices == ((1, 2), (2, 1))
    cpu = shown("0.32.0+cpu", "none")
    assert not {"TP_DP", "GPU_MEMORY_UTILIZATION", "ENGINES_PER_GPU"} & {k.name for k in knobs_of(cpu, EnvConfig())[1]}
    assert [k.name for k in knobs_of(cpu, EnvConfig(), ["MAX_NUM_SEQS"])[1]] == ["MAX_NUM_SEQS"]


def test_knobs_only_for_what_vllm_and_the_kit_have(monkeypatch):
    monkeypatch.setattr(benchmark_knobs, "has_renderer_workers", lambda: False)
    monkeypatch.setattr(benchmark_knobs, "FIELDS", {"ENGINES_PER_GPU": None})

    @dataclasses.dataclass
    class Later:
        tp: int = 1
        dp: int = 1
        cuda_visible_devices: str | None = None

    now, knobs = knobs_of(shown(), Later())
    names = [k.name for k in knobs]
    assert "RENDERER_WORKERS" not in names and names[0] == "ENGINES_PER_GPU" and now["ENGINES_PER_GPU"] == 1
    monkeypatch.setattr(benchmark_knobs, "FIELDS", {})
    assert "ENGINES_PER_GPU" not in [k.name for k in knobs_of(shown(), Later())[1]]


def test_has_renderer_workers_reads_the_installed_vllm():
    pytest.importorskip("vllm.version")
    assert benchmark_knobs.has_renderer_workers()


def test_path_steps_within_its_limits():
    knob = Knob("STEP", ("A", "B"), low=(1024, 8), high=16384)
    assert list(knob.path({"A": 4096, "B": 32}, True)) == [{"A": 8192, "B": 64}, {"A": 16384, "B": 128}]
    assert list(knob.path({"A": 4096, "B": 32}, False)) == [{"A": 2048, "B": 16}, {"A": 1024, "B": 8}]
    share = Knob("G", ("G",), factor=1.08, low=0.5, high=0.95)
    assert [v["G"] for v in share.path({"G": 0.85}, True)] == [0.92]
    choice = Knob("TP_DP", ("TP", "DP"), choices=((1, 1), (2, 1), (1, 2)))
    assert list(choice.path({"TP": 2, "DP": 1}, True)) == [{"TP": 1, "DP": 1}, {"TP": 1, "DP": 2}]
    assert list(choice.path({"TP": 2, "DP": 1}, False)) == []


def test_settings_are_what_differs():
    start = {"MAX_NUM_SEQS": 128, "RENDERER_WORKERS": 1, "GPU_MEMORY_UTILIZATION": 0.85, "TP": 1, "DP": 1}
    assert settings_of(start, start, "--x 1") == {} and label_of(start, start) == "present settings"
    moved = start | {"MAX_NUM_SEQS": 256, "RENDERER_WORKERS": 2, "GPU_MEMORY_UTILIZATION": 0.92, "DP": 2}
    assert settings_of(moved, start, "--x 'a b' --renderer-num-workers 1 --y") == {
        "MAX_NUM_SEQS": "256", "GPU_MEMORY_UTILIZATION": "0.92", "TP": "1", "DP": "2",
        "EXTRA_ARGS": "--x 'a b' --y --renderer-num-workers 2",
    }  # fmt: skip
    assert label_of(moved, start) == "MAX_NUM_SEQS=256 RENDERER_WORKERS=2 GPU_MEMORY_UTILIZATION=0.92 DP=2"

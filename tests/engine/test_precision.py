"""QUANTIZATION's names, and where EXACT=1 is refused."""

import re
import sys

import pytest

from rerank_kit.engine import machine, precision
from rerank_kit.engine.machine import Machine
from rerank_kit.engine.plan import plan_engine, plan_service
from rerank_kit.serving.command import explain
from rerank_kit.settings import ConfigError, get_config

GPU = Machine("0.32.0", ("NVIDIA H100, 81559",), tuple(range(16)), 2**37)
GPU2 = Machine("0.32.0", ("NVIDIA H100, 81559",) * 2, tuple(range(16)), 2**37)
CPU = Machine("0.32.0+cpu", (), (0, 1), 2**34)


@pytest.fixture(autouse=True)
def hopper(monkeypatch):
    monkeypatch.delenv(precision.MODE, raising=False)
    monkeypatch.setattr(precision, "compute_capabilities", lambda: ("9.0",))


def test_methods_are_those_of_the_installed_vllm():
    pytest.importorskip("vllm")
    known = machine.quantization_methods()
    assert "fp8" in known and len(known) > 10
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS

    assert list(known) == QUANTIZATION_METHODS[: len(known)]  # plugins may add to the list at run time


@pytest.mark.parametrize(
    ("name", "methods", "config", "wanted"),
    [
        ("fp8", ("fp8", "fp8_per_tensor"), {}, "fp8_per_tensor"),
        ("fp8", ("fp8",), {}, "fp8"),  # vLLM 0.26
        ("fp8", ("fp8", "fp8_per_tensor"), {"quantization_config": {"quant_method": "fp8"}}, "fp8"),
        ("fp8_per_channel", ("fp8", "fp8_per_channel"), {}, "fp8_per_channel"),
        ("fp8_per_block", ("fp8_per_block",), {}, "fp8_per_block"),
        ("anything", (), {}, "anything"),  # a vLLM whose list is not found
    ],
)
def test_quantization_gets_the_name_of_the_installed_vllm(monkeypatch, name, methods, config, wanted):
    monkeypatch.setattr(precision, "quantization_methods", lambda: methods)
    assert precision.quantization(name, config)[0] == wanted


def test_an_unknown_method_is_refused_with_the_known_ones(checkpoints, monkeypatch):
    monkeypatch.setattr(precision, "quantization_methods", lambda: ("fp8_per_channel", "awq"))
    said = r"QUANTIZATION='fp8_per_chanel': .* did you mean fp8_per_channel\? It has fp8_per_channel, awq"
    with pytest.raises(ConfigError, match=said):
        plan_service(get_config(quantization="fp8_per_chanel"), checkpoints["qwen3"], GPU)


def test_plan_and_cfg_name_the_method(checkpoints, monkeypatch):
    monkeypatch.setattr(precision, "quantization_methods", lambda: ("fp8", "fp8_per_tensor"))
    plan = plan_service(get_config(quantization="fp8"), checkpoints["qwen3"], GPU)
    assert plan.engine["quantization"] == "fp8_per_tensor"
    assert "quantization: fp8_per_tensor (QUANTIZATION=fp8, which this vLLM calls fp8_per_tensor)" in explain(plan)


def test_exact_reaches_the_service_and_the_cold_start(checkpoints):
    plain = plan_service(get_config(), checkpoints["qwen3"], GPU)
    exact = plan_service(get_config(exact=1), checkpoints["qwen3"], GPU)
    assert precision.MODE not in plain.env and exact.env[precision.MODE] == "1"
    assert plan_engine(get_config(exact=1), checkpoints["qwen3"], GPU).env[precision.MODE] == "1"
    assert "exact: EXACT: the bits of a score" in explain(exact) and "EXACT=1\n" in explain(exact)
    assert re.fullmatch("[0-9a-f]{12}-exact", exact.env["GUARD_VERSION"])
    assert exact.env["GUARD_VERSION"][:12] != plain.env["GUARD_VERSION"]
    other_gpu = Machine("0.32.0", ("NVIDIA L4, 81559",), GPU.cores, GPU.memory_bytes)
    other_release = Machine("0.32.1", GPU.gpus, GPU.cores, GPU.memory_bytes)
    others = [plan_service(get_config(exact=1), checkpoints["qwen3"], on) for on in (other_gpu, other_release)]
    assert len({plan.env["GUARD_VERSION"] for plan in (exact, *others)}) == 3


@pytest.mark.parametrize(
    ("on", "settings", "said"),
    [
        (CPU, {}, "the CPU build of vLLM (0.32.0+cpu) has no batch-invariant mode"),
        (Machine("0.31.0", GPU.gpus, GPU.cores, 2**37), {}, "this is 0.31.0"),
        (GPU2, {"tp": 2}, "not proved with TP=2"),
        (GPU, {"dtype": "float32"}, "not proved with DTYPE=float32"),
        (GPU, {"quantization": "fp8"}, "not proved with quantized weights (fp8)"),
        (GPU, {"extra_args": "-pp 2"}, "not proved with -pp"),
        (GPU, {"extra_args": "--kv-cache-dtype fp8"}, "not proved with --kv-cache-dtype"),
        (GPU, {"extra_args": "--kv_cache_dtype=fp8"}, "not proved with --kv_cache_dtype"),
        (GPU, {"extra_args": "-dcp 2"}, "not proved with -dcp"),
    ],
)
def test_exact_is_refused_where_it_is_not_proved(checkpoints, on, settings, said):
    with pytest.raises(ConfigError) as caught:
        plan_service(get_config(exact=1, **settings), checkpoints["qwen3"], on)
    assert said in str(caught.value) and "EXACT" in str(caught.value)


@pytest.mark.parametrize(("model_type", "proved"), [("qwen2", True), ("qwen3", True), ("bert", False), (None, False)])
def test_exact_is_for_the_decoders_that_are_proved(model_type, proved):
    config = {"model_type": model_type}
    for dtype in ("auto", "bfloat16", "float16"):
        if proved:
            assert precision.check_exact(get_config(exact=1, dtype=dtype), GPU, config).startswith("EXACT")
        else:
            with pytest.raises(ConfigError, match=rf"not proved with models of type {model_type!r}.*unset EXACT"):
                precision.check_exact(get_config(exact=1, dtype=dtype), GPU, config)


@pytest.mark.parametrize(
    ("capabilities", "said"),
    [(("7.5",), "a GPU here has 7.5"), (("9.0", "7.0"), "a GPU here has 7.0"), ((), "does not say")],
)
def test_exact_is_refused_on_gpus_without_the_kernels(checkpoints, monkeypatch, capabilities, said):
    monkeypatch.setattr(precision, "compute_capabilities", lambda: capabilities)
    with pytest.raises(ConfigError, match=said):
        plan_service(get_config(exact=1), checkpoints["qwen3"], GPU)


def test_a_variable_that_switches_the_mode_off_is_refused(checkpoints, monkeypatch):
    monkeypatch.setenv(precision.MODE, "0")
    with pytest.raises(ConfigError, match="VLLM_BATCH_INVARIANT=0 contradict"):
        plan_service(get_config(exact=1), checkpoints["qwen3"], GPU)


def test_capabilities_come_from_nvidia_smi(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine.compute_capabilities() == ()
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!{sys.executable}\nprint('9.0\\n8.9\\n[N/A]')\n")
    tool.chmod(0o755)
    assert machine.compute_capabilities() == ("9.0", "8.9")

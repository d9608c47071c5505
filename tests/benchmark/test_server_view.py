"""What is read of a server, on inputs with known answers."""

import os

import pytest

from rerank_kit.benchmark.server_view import (
    flops_per_token,
    gpus_of,
    metric_sums,
    peak_flops,
    utilisation,
    what_changed,
)
from rerank_kit.engine.machine import Machine
from rerank_kit.engine.plan import plan_service
from rerank_kit.serving.command import serve_args
from rerank_kit.settings import get_config


def test_metrics_of_vllm_become_what_was_seen():
    before = """# HELP vllm:request_queue_time_seconds Histogram
# TYPE vllm:request_queue_time_seconds histogram
vllm:request_queue_time_seconds_bucket{engine="0",le="0.3",model_name="m"} 9.0
vllm:request_queue_time_seconds_count{engine="0",model_name="m"} 10.0
vllm:request_queue_time_seconds_sum{engine="0",model_name="m"} 1.0
vllm:request_queue_time_seconds_count{engine="1",model_name="a}b"} 0.0
vllm:request_queue_time_seconds_sum{engine="1",model_name="a}b"} 0.0
vllm:prefix_cache_queries_total{engine="0",model_name="m"} 1000.0
vllm:prefix_cache_hits_total{engine="0",model_name="m"} 1e+02
vllm:iteration_tokens_total_sum{engine="0",model_name="m"} 0.0
vllm:iteration_tokens_total_count{engine="0",model_name="m"} 0.0
vllm:external_prefix_cache_queries_total{engine="0"} 77.0
"""
    after = before.replace('_count{engine="0",model_name="m"} 10.0', '_count{engine="0",model_name="m"} 30.0')
    after = after.replace('_count{engine="1",model_name="a}b"} 0.0', '_count{engine="1",model_name="a}b"} 20.0')
    after = after.replace('_sum{engine="0",model_name="m"} 1.0', '_sum{engine="0",model_name="m"} 2.0')
    after = after.replace('_sum{engine="1",model_name="a}b"} 0.0', '_sum{engine="1",model_name="a}b"} 1.0')
    after = after.replace(" 1000.0", " 3000.0").replace(" 1e+02", " 6e+02")
    first, last = ({"time_s": t, **metric_sums(text)} for t, text in ((5.0, before), (7.0, after)))
    seen = what_changed(first, last, {}, [])
    assert seen == {"queue_ms": pytest.approx(50.0), "cache_hits": 0.25}  # 2 s over 40 pairs; 500 of 2000 tokens
    assert what_changed(last, first, {}, []) == {}  # the counters fell: the server started anew


def test_processes_and_gpus_become_what_was_seen():
    first = {"time_s": 10.0, 7: 1.0, 8: 2.0, 9: 5.0, "host_all": 1000, "host_busy": 100}
    last = {"time_s": 12.0, 7: 2.8, 8: 2.2, 9: 8.0, "host_all": 1400, "host_busy": 400}
    lines = ["0, 10, 1024\n", "1, 90, 40960\n", "0, 20, 1024\n", "1, 100, 51200\n", "1, [N/A], 4\n", "1, 5"]
    seen = what_changed(first, last, {7: True, 8: True, 9: False, 10: True}, lines)
    assert seen == {
        "gpu_util": 95.0, "gpu_mem_gib": 50.0, "host_cpu": 0.75, "host_cores": os.cpu_count(),
        "server_cpu": pytest.approx(2.5), "api_cpu": pytest.approx(0.9), "engine_cpu": pytest.approx(1.5),
    }  # fmt: skip


def test_gpus_of_reads_the_servers_arguments():
    assert gpus_of(None) is None and gpus_of("m --port 1") == 1
    assert gpus_of("--data-parallel-size 8 --tensor-parallel-size 2") == 16


def test_gpus_of_engines_that_share_them(checkpoints):
    """Seen on an H100: three engines on one GPU counted as three GPUs, so that its utilisation read a third."""
    machine = Machine("0.32.0", ("NVIDIA H100, 81559",) * 2, tuple(range(32)), 2**38)
    for settings, n in (({"engines_per_gpu": 3}, 1), ({"engines_per_gpu": 3, "dp": 2}, 2), ({"tp": 2}, 2)):
        flags = " ".join(serve_args(plan_service(get_config(**settings), checkpoints["qwen3"], machine)))
        assert gpus_of(flags) == n, flags


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA RTX A3000", None),
        ("", None),
    ],
)
def test_peak_is_that_of_the_card(name, peak):
    assert peak_flops(name) == peak


def test_encoders_have_no_utilisation():
    """Neither a gated MLP nor causal attention: the formula is another one."""
    config = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
    assert flops_per_token({**config, "model_type": "xlm-roberta"}, 128) is None


def test_flops_utilisation_by_hand():
    # Qwen3-Reranker-0.6B: 28 layers of 2 * 1024 * 128 * (16 + 8) + 3 * 1024 * 3072 weights = 440.4e6, embeddings apart.
    config = {"hidden_size": 1024, "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8}
    config |= {"head_dim": 128, "intermediate_size": 3072, "vocab_size": 151669}
    assert flops_per_token(config, 0) == pytest.approx(2 * 440.4e6, rel=1e-4)
    # Attention over 1000 tokens, 500 seen on average: 2 * 2 * 28 * 16 * 128 * 500.
    assert flops_per_token(config, 1000) - flops_per_token(config, 0) == 2 * 2 * 28 * 16 * 128 * 500
    row = {"tok/s": 300_000.0, "tokens_per_pair": 0.0, "cache_hits": 0.5}
    # 150,000 computed tokens/s * 880.8e6 = 132e12 of 989e12.
    assert utilisation(row, config, "1 x NVIDIA H100 80GB HBM3", 1) == pytest.approx(0.1336, rel=1e-3)
    assert utilisation(row, config, "4 x NVIDIA H100 80GB HBM3", 2) == pytest.approx(0.0668, rel=1e-3)
    assert utilisation(row | {"tok/s": None}, config, "1 x NVIDIA H100 80GB HBM3", 1) is None
    assert utilisation(row, config, "2 x AMD EPYC", 1) is None and utilisation(row, {}, "H100", 1) is None
    names = ("NVIDIA H100 PCIe", "NVIDIA L4", "NVIDIA L40S", "NVIDIA A100-SXM4-80GB", "NVIDIA GeForce GTX 1080")
    assert [peak_flops(name) for name in names] == [756e12, 121e12, 362e12, 312e12, None]

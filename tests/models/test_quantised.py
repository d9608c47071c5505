"""Quantised weights: what the CPU build serves has the scores of what the weights mean; the rest is refused in a line.

The checkpoints are those of tests/stand_ins/quantised.py. Tolerances: these kernels compute in 16 bits, and w8a8 rounds
activations to 8 bits.
"""

import pytest
from quantised import WRITERS, quantised
from test_library_checkpoints import PAIRS, engine_scores

from rerank_kit.models.given import for_reference
from rerank_kit.models.opened import opened
from rerank_kit.models.pair import Pair
from rerank_kit.models.reference import reference_scores
from rerank_kit.serving import check
from rerank_kit.settings import ConfigError, get_config

pairs = [Pair(*pair) for pair in PAIRS]


def reference(folder):
    found = opened(folder, get_config())
    given = for_reference(found.checkpoint, found.profile)
    return reference_scores(folder, found.profile.reference, pairs, None, 512, **given)


@pytest.mark.server
@pytest.mark.parametrize("method", ["gptq", *(pytest.param(m, marks=pytest.mark.soak) for m in WRITERS if m != "gptq")])
def test_the_engine_has_the_scores_of_what_the_weights_mean(method, checkpoints, fork_server, tmp_path):
    name = f"Qwen3-Reranker-{method.replace(' ', '-')}"
    folder, twin = quantised(checkpoints["qwen3"], tmp_path / name, method)
    [scores] = engine_scores(fork_server.command, [folder], tmp_path, "bfloat16")
    expected, before = reference(twin), reference(checkpoints["qwen3"])
    eight_bits = method.endswith("w8a8")
    moved = max(abs(a - b) for a, b in zip(expected, before, strict=True))
    assert moved > (0.01 if eight_bits else 0.1), "rounding shows"
    assert scores == pytest.approx(expected, abs=0.06 if eight_bits else 0.04)


def test_what_transformers_cannot_load_is_said_in_one_line(checkpoints, tmp_path, monkeypatch):
    """GPTQ needs a package that the kit does not install: no traceback, and no advice to use another Python."""
    folder, _ = quantised(checkpoints["qwen3"], tmp_path / "Qwen3-Reranker-gptq", "gptq")
    with pytest.raises(
        ConfigError, match=r"has weights in gptq, which transformers cannot load here \(.*optimum"
    ) as caught:
        reference(folder)
    assert "\n" not in str(caught.value)
    found = opened(folder, get_config())
    with pytest.raises(check.NotMade, match=r"reference  not compared: .*in gptq"):
        list(check.check_references(get_config(), found.checkpoint, found, [0.5] * len(check.PAIRS)))

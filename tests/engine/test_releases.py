"""What differs between releases of vLLM, and the line about one that is newer than the tested one."""

import pytest
from conftest import free_port
from test_plan import plan

from rerank_kit.engine.machine import Machine, untested
from rerank_kit.offline.feeding import segment_of
from rerank_kit.serving import command


@pytest.mark.parametrize(
    ("version", "newer"), [("0.26.0", False), ("0.32.0+cpu", False), ("0.32.9", False), ("0.33.0", True), ("1.0", True)]
)
def test_untested(version, newer):
    line = untested(version)
    assert bool(line) == newer and line.count("\n") == 0
    assert not newer or line.startswith(f"vLLM {version} is newer than 0.32, ")


@pytest.mark.parametrize(("version", "said"), [("0.32.0+cpu", ""), ("0.33.0+cpu", "[WARN] vLLM 0.33.0+cpu is newer")])
def test_start_says_it_and_cfg_too(checkpoints, monkeypatch, capsys, version, said):
    made = plan(checkpoints, Machine(version, (), (0, 1), 16 * 2**30), port=free_port())
    assert ("vllm" in made.why) == bool(said)
    monkeypatch.setattr(command, "plan_service", lambda cfg: made)
    monkeypatch.setattr(command, "vllm_command", lambda: "vllm")
    assert command.startable_plan(made.cfg) is made
    err = capsys.readouterr().err
    assert err.startswith(said) and err.count("\n") == bool(said)


def test_where_the_second_segment_begins():
    """token_type_start in vLLM 0.32, and token_type_end too in 0.33 (v1/worker/gpu/model_states/encoder_only.py)."""
    assert segment_of("0.32.0+cpu")(7) == 7
    start, end = segment_of("0.33.0")(7)
    assert start == 7 and end > 10**6

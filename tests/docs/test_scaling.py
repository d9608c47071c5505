"""docs/scaling.md is what the program computes from measurements/results; the model behind it, by hand."""

import pytest

from measurements import results, scaling_table
from measurements.scaling_table import Assumed, plan

TIERS = {"documents": 32, "request_bytes": 16000, "answer_bytes": 20000}
TIERS["cpu_s_per_1000_calls"] = {"client": 0.25, "nginx_tls": 0.06, "guard": 0.05}


def test_the_document_has_the_tables_of_the_results():
    text = scaling_table.DOC.read_text("utf-8")
    assert scaling_table.filled_in(text) == text, "run: python measurements/scaling_table.py --write"


def test_a_plan_by_hand():
    about = Assumed(utilisation=0.5, spare=0.1, gpus_per_host=4, price_per_hour=2.0)
    found = plan(10_000, 1000.0, 20, 128, about, TIERS, api=2000.0)
    assert found["GPUs by throughput"] == 20 and found["hosts"] == "6 (5 + 1 spare)"
    assert found["calls/s"] == 500
    # 500 calls/s x 16,000 bytes x 20 of 32 documents x 8 bits
    assert found["Gb/s to the service"] == pytest.approx(0.04)
    assert found["API cores, all hosts"] == pytest.approx(5 / 0.6)
    assert found["cost an hour"] == 6 * 4 * 2.0
    assert found["cost of a million pairs"] == pytest.approx(48 / 36)


def test_a_plan_follows_what_is_assumed():
    about = Assumed()
    small, large = (plan(target, 2000.0, 32, 128, about, TIERS, 1600.0) for target in (10_000, 1_000_000))
    assert large["cells"] > small["cells"] == 1 and large["balancers"] >= 2 * large["cells"]
    longer = plan(10_000, 2000.0, 32, 512, about, TIERS, 400.0)
    assert longer["Gb/s back"] == pytest.approx(4 * small["Gb/s back"])
    worse = plan(10_000, 2000.0, 32, 128, Assumed(efficiency=0.5), TIERS, 1600.0)
    assert worse["GPUs by throughput"] == pytest.approx(2 * small["GPUs by throughput"], abs=1)


def test_results_of_several_gpus_come_into_the_table(tmp_path, monkeypatch):
    assert "not measured yet" in scaling_table.scale_table() or list(results.FOLDER.glob("scale*.csv"))
    row = {"model": "m", "arrangement": "DP=2", "gpus": 2, "tokens": 128, "in_flight": 64, "pairs/s": 4000.0}
    row |= {"p50_ms": 500.0, "p95_ms": None, "efficiency": 0.97, "parity": 0.0}
    results.write(tmp_path / "scale.csv", {"hardware": "2 x H100", "vllm": "0.26.0"}, [row])
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    line = scaling_table.scale_table().splitlines()[-1]
    assert "2 x H100" in line and "| DP=2 | 2 | 128 | 64 | 4,000 | 500 | - | 0.97 | 0.0e+00 |" in line

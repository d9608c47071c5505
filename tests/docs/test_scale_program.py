"""measurements/scale.py: the settings of an arrangement, and the figures from its rows. No service is started."""

import threading

import pytest

from measurements import scale
from measurements.scale import Cards, parse_args
from measurements.scale_rows import (
    COLUMNS,
    N_DOCS,
    N_QUERIES,
    Arrangement,
    efficiency,
    markdown,
    parity,
    parse_arrangement,
    table,
)


def made(text, rows=(), scores=(), model="m"):
    one = parse_arrangement(model, text)
    one.rows = [{"tokens": 128, "level": level, "pairs/s": rate} for level, rate in rows]
    one.scores = list(scores)
    return one


def test_an_arrangement_is_settings_and_replicas():
    one = parse_arrangement("m", "TP=2 replicas=3 API_SERVER_COUNT=4")
    assert (one.gpus, one.replicas, one.settings) == (6, 3, {"TP": "2", "API_SERVER_COUNT": "4"})
    assert parse_arrangement("m", "MODEL_PATH=other DP=2").model == "other"
    assert parse_arrangement("m", "VLLM_USE_FASTOKENS=0").settings == {"VLLM_USE_FASTOKENS": "0"}
    for wrong in ("DP", "TB=2", "replicas=0", "replicas=x"):
        with pytest.raises(ValueError, match="neither a setting of the kit nor"):
            parse_arrangement("m", wrong)


def test_efficiency_compares_equal_load_for_each_gpu():
    one, two = made("DP=1", [(16, 100.0), (64, 120.0)]), made("DP=2", [(32, 180.0), (64, 210.0)])
    both = [one, two]
    assert efficiency(two, two.rows[0], both) == pytest.approx(180 / 200)  # 32 for two GPUs = 16 for one
    assert efficiency(two, two.rows[1], both) == pytest.approx(210 / 240)  # 32 for one: not measured, so its best
    assert efficiency(two, two.rows[0], [two]) is None
    assert efficiency(two, {"tokens": 512, "level": 32, "pairs/s": 1.0}, both) is None


def test_parity_is_the_largest_difference_over_all_replicas():
    scores = [i / 100 for i in range(N_DOCS)]  # of one query: the last document is first
    swapped = [*scores[:-2], scores[-1], scores[-2]]
    first, other = made("DP=1", scores=[scores]), made("replicas=2", scores=[scores, swapped])
    found = parity(other, [first, other])
    assert found["to"] == "DP=1" and found["max"] == pytest.approx(0.01) and found["pairs"] == 2 * N_DOCS
    assert found["other_first"] == "1 of 2 queries"
    assert found["swapped"] == f"1 of {N_DOCS * (N_DOCS - 1)} document pairs"
    assert parity(made("TP=2"), [first]) is None


def test_a_failed_arrangement_has_a_row_with_its_reason():
    failed = made("TP=2")
    failed.error = "RuntimeError: start ended with 1: out of | memory"
    line = markdown(table([made("DP=1", [(16, 100.0)]), failed])).splitlines()[-1]
    assert "| TP=2 | 2 | - |" in line and "failed: RuntimeError: start ended with 1" in line
    assert line.replace("\\|", "").count("|") == len(COLUMNS) + 1


def test_cards_are_disjoint_unless_shared():
    cards = Cards(["0", "1", "2"], shared=False)
    first = cards.take(2)
    waiting = threading.Thread(target=lambda: first.append(cards.take(2)))
    waiting.start()
    waiting.join(0.2)
    assert waiting.is_alive(), "one card is free, two are asked for"
    cards.give(["0", "1"])
    waiting.join(5)
    assert first == ["0", "1", ["0", "1"]]
    with pytest.raises(RuntimeError, match="needs 4 GPUs, there are 3"):
        cards.take(4)
    assert Cards(["0", "1"], shared=True).take(2) == ["0", "1"]


def test_each_replica_gets_its_own_cards(tmp_path):
    args = parse_args(["--model", str(tmp_path), "--arrange", "TP=2 replicas=2", "--out", str(tmp_path / "s")])
    one: Arrangement = args.arrangements[0]
    one.cards, one.ports = ["0", "1", "2", "3"], [1, 2]
    run = scale.Run(args, Cards(one.cards, shared=False))
    assert [run.settings(one, i)["CUDA_VISIBLE_DEVICES"] for i in (0, 1)] == ["0,1", "2,3"]
    assert run.settings(one, 0)["LOG_DIR"] == str(tmp_path / "s.logs") and run.settings(one, 1)["PORT"] == "2"


def test_the_known_pairs_are_the_same_each_time():
    assert scale.known_pairs() == scale.known_pairs()
    assert sum(len(documents) for _, documents in scale.known_pairs()) == N_QUERIES * N_DOCS

"""A seeded part of measurements/fuzz.py against the shared service; the program itself sends 20,000 bodies."""

import json

import pytest

from measurements.fuzz import Sender, Wrong, all_kinds, fuzz, horrors
from rerank_kit.client.calls import rerank


@pytest.mark.server
@pytest.mark.parametrize(
    "n_bodies",
    [
        pytest.param(600, marks=pytest.mark.timeout(300)),
        pytest.param(20_000, marks=[pytest.mark.soak, pytest.mark.timeout(3600)]),
    ],
)
def test_no_body_costs_a_5xx_a_hang_or_a_score(service, n_bodies):
    before = rerank("capital", ["Beijing.", "Gravity."], base_url=service.url + "/v1")[1]
    sender = fuzz(service.url, n_bodies, number=5)
    assert sum(sender.seen.values()) >= n_bodies + len(horrors())
    assert sender.seen[200] > n_bodies / 7, f"too few bodies were right: {sender.seen}"
    assert sender.seen[400] > n_bodies / 7 and sender.seen[422] > 10 and sender.seen[413] >= 1
    assert all_kinds() - sender.kinds.keys() == set(), sender.kinds
    assert sender.slowest[0] < 30, sender.slowest
    assert rerank("capital", ["Beijing.", "Gravity."], base_url=service.url + "/v1")[1] == before


class Said(Sender):
    """Judges an answer that no service gave."""

    def __init__(self, *answer):
        super().__init__("http://127.0.0.1:1")
        self.answer = answer

    def send(self, path, kind, data):
        return self.answer


def rows(*scores):
    return json.dumps({"results": [{"index": i, "relevance_score": x} for i, x in enumerate(scores)]}).encode()


ERROR = b'{"error": {"message": "x"}}'


@pytest.mark.parametrize(
    "answer",
    [
        (500, {}, ERROR),
        (503, {}, ERROR),
        (429, {}, ERROR),
        (502, {}, b"<html>"),
        (400, {}, b""),
        (400, {}, b'{"error": {"message": ""}}'),
        (200, {}, rows()),
        (200, {}, rows(float("nan"))),
        (200, {}, b'{"results": [{"index": 0, "relevance_score": null}]}'),
        (200, {}, b'{"results": [{"index": 0, "relevance_score": 0.5}, {"index": 0, "relevance_score": 0.5}]}'),
        (302, {}, ERROR),
    ],
)
def test_a_wrong_answer_is_noticed(answer):
    with pytest.raises(Wrong):
        Said(*answer).judge("/v1/rerank", "application/json", b"{}")


@pytest.mark.parametrize("answer", [(200, {}, rows(0.5, 0.25)), (422, {}, ERROR), (503, {"Retry-After": "5"}, ERROR)])
def test_a_right_answer_passes(answer):
    assert Said(*answer).judge("/v1/rerank", "application/json", b"{}") == answer[0]

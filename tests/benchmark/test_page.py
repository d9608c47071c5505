"""One page that shows everything."""

import json
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import pytest
from test_report import a_row, runs

from rerank_kit.benchmark import charts
from rerank_kit.benchmark.load import Call, Level
from rerank_kit.benchmark.page import compare_page, page, write_files
from rerank_kit.benchmark.report import summarise


class Balance(HTMLParser):
    """Every tag that opens closes, in order; remembers tags and attributes."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_bars_below_zero_begin_at_the_axis():
    text = charts.chart("gain", "queries", {}, [[0, 1, 2.0], [1, 2, -1.0]])
    (up, up_height), (down, down_height) = (
        tuple(map(float, found)) for found in re.findall(r' x="[^"]+" y="([^"]+)" width="[^"]+" height="([^"]+)"', text)
    )
    assert up + up_height == pytest.approx(down, abs=0.11) and up_height == pytest.approx(2 * down_height, abs=0.2)
    assert 0 < up < down < down + down_height < charts.HIGH
    assert ">-1</text>" in text and ">2</text>" in text


def test_page_needs_no_other_file_and_shows_everything():
    rows = runs([100, 110]) + runs([200, 210], level=16) + [a_row(level=2, ok=0, p50_ms=None)]
    about = {"command": "python bench_rerank.py --seed 7", "server_flags": None, "error_texts": {"x": "<script>&\"'"}}
    text = page(about, rows)
    found = Balance(text)
    assert "script" not in found.tags and "link" not in found.tags and "img" not in found.tags
    assert not {"src", "href", "style"} & {name for name, _ in found.attributes} and "url(" not in text
    assert "@import" not in text and "http" not in text
    shown = "".join(found.text)
    assert "python bench_rerank.py --seed 7" in shown and "<script>" in shown and "unknown" in shown
    drawings = [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", text, re.S)]
    assert len(drawings) == 3 + 3 * len(rows)
    # Latency over throughput: a point for each level, the median of its runs. One level has no p50.
    assert len(drawings[0].findall("circle")) == 2 + 3
    # Throughput against load: a point for each row, at a height in proportion to it.
    circles = drawings[1].findall("circle")
    expected = [pairs for _, pairs in sorted((row["level"], row["pairs/s"]) for row in rows)]
    assert [float(c.find("title").text.split(": ")[1]) for c in circles] == pytest.approx(expected, rel=1e-4)
    ground = charts.HIGH - charts.BOTTOM
    heights = [(ground - float(c.get("cy"))) / float(c.find("title").text.split(": ")[1]) for c in circles]
    assert heights == pytest.approx([heights[0]] * len(rows), rel=0.02)
    # The line goes through the medians: one point a level.
    line = [float(point.split(",")[1]) for point in drawings[1].find("polyline").get("points").split()]
    ys = [float(c.get("cy")) for c in circles]  # one of level 2, two of 8, two of 16
    assert line == pytest.approx([ys[0], (ys[1] + ys[2]) / 2, (ys[3] + ys[4]) / 2], abs=0.11)
    # The histogram's bars are the calls.
    bars = drawings[3].findall("rect")
    assert sum(float(bar.find("title").text.split(": ")[1]) for bar in bars) == 40


def test_page_of_one_row_without_answers():
    level = Level("score", "open", 5, 0, 1, None, opened=0.0, closed=1.0)
    level.calls = [Call(0.0, 0.0, 0.5, "timeout", 0, 1, True)]
    assert "no call succeeded" in "".join(Balance(page({}, [summarise(level)])).text)
    json.dumps(summarise(level))


def test_files_are_replaced_at_once_or_stay(tmp_path, monkeypatch):
    paths = {kind: str(tmp_path / f"out.{kind}") for kind in ("json", "csv", "html")}
    about = {"started": "now", "findings": []}
    write_files(paths, about, [])  # no row yet
    before = {kind: Path(path).read_text() for kind, path in paths.items()}
    real = Path.write_text

    def full(self, text, *args, **kwargs):
        real(self, text[: len(text) // 2], *args, **kwargs)
        raise OSError(28, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_text", full)
    for kind, path in paths.items():
        with pytest.raises(OSError, match=f"No space left on device: .*/out.{kind}'"):
            write_files({kind: path}, about, [])
    assert {kind: Path(path).read_text() for kind, path in paths.items()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.csv", "out.html", "out.json"]


def test_what_is_no_file_stays_what_it_is(capfd):
    write_files({"json": "/dev/stdout", "csv": "/dev/null"}, {}, [])
    assert json.loads(capfd.readouterr().out) == {"rows": []} and not Path("/dev/null").is_file()


def test_compare_page_has_all_files_in_each_chart():
    files = {"TP1 <a>.json": {"rows": runs([100, 101]) + runs([150], level=16)}, "TP2.json": {"rows": runs([170, 171])}}
    shown = Balance(text := compare_page(files, ["worse <b>"]))
    assert shown.tags.count("svg") == 4 and "worse &lt;b&gt;" in text and "<a>" not in text
    assert text.count(">TP2.json</tspan>") == 4 and shown.tags.count("circle") == 3 * 5 + 3  # three medians of a level


def test_the_headline_says_what_the_best_level_gives():
    rows = runs([100, 110]) + runs([900], level=64)
    rows[-1] |= {"bound": "gpu", "verdict": "the busiest GPU was busy 97 % of the time: try fp8"}
    about = {
        "findings": [
            f"rerank closed 64: gpu: {rows[-1]['verdict']}",
            "rerank closed 64: 900 pairs/s, 0.55 per million pairs",
        ]
    }
    text = page(about, rows)
    cards = re.findall(r'<div class="card"><b>(.*?)</b>(.*?)<div class="note">(.*?)</div>', text)
    assert (
        cards[0][1] == "pairs/s at most"
        and cards[0][0] == f"{rows[-1]['pairs/s']:,.0f}"
        and "64 calls in flight" in cards[0][2]
    )
    assert [name for _, name, _ in cards[1:3]] == ["p50 at light load", "p95 at light load"]
    assert "8 calls in flight" in cards[1][2], "light load is the smallest level"
    assert cards[3] == ("gpu", "bounds it", rows[-1]["verdict"]) and cards[4][0] == "0.55"
    assert text.count("the busiest GPU was busy 97 %") == 2, (
        "in its card and at its level, not in a list of all verdicts"
    )
    held = rows[0] | {"slo_held": True, "mode": "open"}
    text = page({"findings": ["rerank: p95 <= 500 ms held up to 8 calls/s"]}, [held, *rows[1:]])
    assert "pairs/s at p95 &lt;= 500 ms" in text


def test_the_page_is_made_for_phone_dark_mode_and_paper():
    text = page({}, runs([100, 110]) + runs([900], level=64))
    assert '<meta name="viewport"' in text and "prefers-color-scheme:dark" in text and "@media print" in text
    assert "viewBox" in text and not re.search(r"<svg[^>]*\swidth=", text), "charts take the width that there is"

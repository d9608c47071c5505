"""docs/terminal.py records what a command prints; the kept recording is what the script says today."""

import re
import sys
import xml.etree.ElementTree as ElementTree

import pytest
from conftest import KIT

from docs import terminal


def lines_of(svg: str) -> list[str]:
    return [text.text or "" for text in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]


def test_a_command_is_recorded_with_its_times():
    code = "import time; print('a <b>', flush=True); time.sleep(1); print('one\\rtwo')"
    code += "; print('[ERR] \\x1b[31mred\\x1b[0m')"
    command = [sys.executable, "-c", code]
    lines = terminal.record(command)
    assert [text for _, text in lines] == ["a <b>", "two", "[ERR] red"]
    assert 0.5 < lines[1][0] - lines[0][0] < 6
    svg = terminal.svg(["show", "it"], lines)
    assert lines_of(svg) == ["$ show it", "a <b>", "two", "[ERR] red"]
    starts = [float(n) for n in re.findall(r"@keyframes l\d+\{0%,([\d.]+)%", svg)]
    assert starts == sorted(starts) and len(starts) == 3
    assert 'class="error"' in svg and "prefers-reduced-motion" in svg


def test_long_waits_are_shortened_and_long_lines_wrapped():
    svg = terminal.svg(["x"], [(100.0, "late"), (100.0, "w" * (terminal.COLUMNS + 5))])
    assert float(re.search(r"animation:var\(--n\) ([\d.]+)s", svg)[1]) < 10
    assert lines_of(svg)[2:] == ["w" * terminal.COLUMNS, "w" * 5]


def test_a_command_that_fails_is_not_kept():
    with pytest.raises(SystemExit, match="ended with 3"):
        terminal.record([sys.executable, "-c", "raise SystemExit(3)"])


def test_the_kept_recording_says_what_the_script_says():
    shown = lines_of((KIT / "docs" / "images" / "demo.svg").read_text("utf-8"))
    script = (KIT / "start_rerank.sh").read_text("utf-8")
    said = shown[next(i for i, line in enumerate(shown) if line.startswith("This was all-MiniLM")) : -1]
    assert len(said) == 3 and all(line.replace('"', '\\"') in script for line in said), (
        "record it again: CONTRIBUTING.md"
    )
    assert shown[0] == "$ sh start_rerank.sh demo" and any("idx=1 | doc=The capital of China" in line for line in shown)
    (told,) = {text[text.index("(") : text.index(")")] for text in shown if "importing vLLM (usually" in text}
    assert told.strip("(") in (KIT / "rerank_kit" / "serving" / "health.py").read_text("utf-8"), "record it again"

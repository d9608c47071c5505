"""The HTML report in a real browser, at desktop and phone width, light and dark: as the kept pictures, loosely.

Needs Chromium (`apt install chromium`). After a wanted change,
`LOOKS=keep python -m pytest tests/benchmark/test_looks.py` writes the pictures anew; look at them before you commit.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from test_report import a_row

from rerank_kit.benchmark.page import page

Image = pytest.importorskip("PIL.Image")  # comes with vLLM
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="chromium is not installed")
LOOKS = Path(__file__).parent / "looks"
QUIET = ("--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking", "--disable-component-update")
QUIET += ("--disable-sync", "--no-first-run", "--hide-scrollbars")
SHOTS = {"desktop": ((1300, 1000), ()), "phone": ((500, 1400), ()), "dark": ((500, 1400), ("preferredColorScheme=0",))}
ABOUT = {"model_root": "Qwen3-Reranker-0.6B", "hardware": "a card", "texts": "32 documents", "vllm": "0.32.0"}


def report() -> str:
    """A run of which every number is made up, and always the same."""
    rows = [a_row(level, rate, p50) for level, rate, p50 in ((1, 20, 41), (4, 56, 67), (16, 76, 202), (64, 78, 829))]
    for row in rows:
        row |= {"bound": "gpu" if row["level"] > 4 else "idle", "verdict": "the busiest GPU was busy 97 % of the time"}
    return page({**ABOUT, "command": "python bench_rerank.py --seed 1"}, rows)


def shot(tmp_path: Path, name: str) -> "Image.Image":
    (tmp_path / "report.html").write_text(report())
    (wide, high), settings = SHOTS[name]
    command = [CHROMIUM, "--headless=new", "--no-sandbox", *QUIET, f"--user-data-dir={tmp_path / 'profile'}"]
    command += [f"--blink-settings={one}" for one in settings]
    command += [f"--window-size={wide},{high}", f"--screenshot={tmp_path / 'shot.png'}"]
    subprocess.run([*command, f"file://{tmp_path / 'report.html'}"], check=True, capture_output=True, timeout=60)
    # A tenth of its size: what is where stays, the shapes of letters go.
    return Image.open(tmp_path / "shot.png").convert("L").resize((wide // 10, high // 10), Image.Resampling.BOX)


def difference(one: "Image.Image", other: "Image.Image") -> float:
    """Mean difference of a pixel, of 255."""
    assert one.size == other.size
    return sum(abs(a - b) for a, b in zip(one.tobytes(), other.tobytes(), strict=True)) / len(one.tobytes())


@pytest.mark.parametrize("name", SHOTS)
def test_the_report_looks_as_it_was_kept(name, tmp_path):
    seen = shot(tmp_path, name)
    if os.environ.get("LOOKS") == "keep":
        seen.save(LOOKS / f"{name}.png")
    kept = Image.open(LOOKS / f"{name}.png")
    assert difference(seen, kept) < 5, f"{name}: see the head of this file"


def test_the_report_prints_to_one_page(tmp_path):
    (tmp_path / "report.html").write_text(report())
    command = [CHROMIUM, "--headless=new", "--no-sandbox", *QUIET, f"--user-data-dir={tmp_path / 'profile'}"]
    command += [f"--print-to-pdf={tmp_path / 'r.pdf'}", f"file://{tmp_path / 'report.html'}"]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    assert len(re.findall(rb"/Type /Page\b(?!s)", (tmp_path / "r.pdf").read_bytes())) == 1


def test_the_kept_pictures_differ_from_each_other_and_from_an_empty_page():
    phone, dark = (Image.open(LOOKS / f"{name}.png") for name in ("phone", "dark"))
    assert difference(phone, dark) > 100, "the dark page is dark"
    for name in SHOTS:
        kept = Image.open(LOOKS / f"{name}.png")
        empty = Image.new("L", kept.size, kept.getpixel((0, 0)))
        assert difference(kept, empty) > 7, "what the test allows is less than what the page holds"

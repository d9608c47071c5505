"""The HTML pages in a real browser, at desktop and phone width, light and dark: as the kept pictures, loosely.

Needs Chromium (`apt install chromium`). After a wanted change,
`LOOKS=keep python -m pytest tests/benchmark/test_looks.py` writes the pictures anew; look at them before you commit.
"""

import math
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from test_report import a_row

from rerank_kit.benchmark.page import page
from rerank_kit.benchmark.quality.page import page as quality_page

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


def quality_report() -> str:
    """A quality run of which every number is made up, and always the same."""
    metrics = ("nDCG@10", "MRR@10", "MAP", "recall@10")
    row = {"value": 0.389, "low": 0.3548, "high": 0.425, "first_stage": 0.3361, "gain": 0.0529, "gain_low": 0.0295}
    row |= {"gain_high": 0.0777, "p": 0.0004, "best_possible": 0.7989}
    queries, scored = [], []
    for i in range(60):
        value = 0.5 + 0.45 * math.sin(2.4 * i)
        query = "what similarity laws must be obeyed when constructing aeroelastic models"[: 30 + i]
        queries.append({"id": str(i), "query": query, "values": dict.fromkeys(metrics, value)})
        queries[-1]["first_stage"] = dict.fromkeys(metrics, max(0.0, value - 0.12 - 0.2 * math.sin(i)))
        scores = [0.1 + 0.6 * math.sin(i * j + j) ** 2 + 0.2 * (j % 5 == 0) for j in range(20)]
        scored.append({"scores": scores, "grades": [2 * (j % 5 == 0) for j in range(20)]})
    out = {**ABOUT, "kind": "quality", "judgements": "FOLDER: 60 queries, 6000 candidates", "instruction": None}
    out |= {"command": "python bench_rerank.py --quality FOLDER --html report.html", "relevant_grade": 1}
    out |= {"metrics": [{"metric": name} | row for name in metrics], "queries": queries, "scored": scored}
    out |= {"findings": ["6000 pairs, 192.3 pairs/s; metrics of 60 queries"], "pairs/s": 192.3}
    return quality_page(out | {"warnings": ["5200 of 6000 candidates are not judged (87%)"]})


PAGES = {"report": report, "quality": quality_report}


def kept(page_name: str, name: str) -> Path:
    return LOOKS / (f"{name}.png" if page_name == "report" else f"{page_name}-{name}.png")


def chromium(tmp_path: Path, text: str, *options: str) -> None:
    """Open a page in a browser of its own."""
    (tmp_path / "page.html").write_text(text)
    command = [CHROMIUM, "--headless=new", "--no-sandbox", *QUIET, f"--user-data-dir={tmp_path / 'profile'}"]
    subprocess.run(
        [*command, *options, f"file://{tmp_path / 'page.html'}"], check=True, capture_output=True, timeout=60
    )


def shot(tmp_path: Path, page_name: str, name: str) -> "Image.Image":
    (wide, high), settings = SHOTS[name]
    options = [f"--blink-settings={one}" for one in settings]
    options += [f"--window-size={wide},{high}", f"--screenshot={tmp_path / 'shot.png'}"]
    chromium(tmp_path, PAGES[page_name](), *options)
    # A tenth of its size: what is where stays, the shapes of letters go.
    return Image.open(tmp_path / "shot.png").convert("L").resize((wide // 10, high // 10), Image.Resampling.BOX)


def difference(one: "Image.Image", other: "Image.Image") -> float:
    """Mean difference of a pixel, of 255."""
    assert one.size == other.size
    return sum(abs(a - b) for a, b in zip(one.tobytes(), other.tobytes(), strict=True)) / len(one.tobytes())


@pytest.mark.parametrize("name", SHOTS)
@pytest.mark.parametrize("page_name", PAGES)
def test_the_page_looks_as_it_was_kept(page_name, name, tmp_path):
    seen = shot(tmp_path, page_name, name)
    if os.environ.get("LOOKS") == "keep":
        seen.save(kept(page_name, name))
    assert difference(seen, Image.open(kept(page_name, name))) < 5, f"{page_name} {name}: see the head of this file"


@pytest.mark.parametrize("page_name", PAGES)
def test_the_page_prints_to_one_page(page_name, tmp_path):
    chromium(tmp_path, PAGES[page_name](), f"--print-to-pdf={tmp_path / 'r.pdf'}")
    assert len(re.findall(rb"/Type /Page\b(?!s)", (tmp_path / "r.pdf").read_bytes())) == 1


@pytest.mark.parametrize("page_name", PAGES)
def test_nothing_is_wider_than_a_phone(page_name, tmp_path):
    """What is wide scrolls in a box of its own; the page does not."""
    said = "<script>document.title=document.documentElement.scrollWidth+' of '+innerWidth</script></body>"
    text = PAGES[page_name]().replace("</body>", said)
    (tmp_path / "page.html").write_text(text)
    command = [CHROMIUM, "--headless=new", "--no-sandbox", *QUIET, f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--window-size=500,1400", "--dump-dom", f"file://{tmp_path / 'page.html'}"]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
    wide, window = map(int, re.search(r"<title>(\d+) of (\d+)</title>", done.stdout).groups())
    assert wide <= window <= 500, f"{wide} pixels wide in a window of {window}"
    assert 'name="viewport" content="width=device-width' in text, "a phone would show it at the width of a desktop"


@pytest.mark.parametrize("page_name", PAGES)
def test_the_kept_pictures_differ_from_each_other_and_from_an_empty_page(page_name):
    phone, dark = (Image.open(kept(page_name, name)) for name in ("phone", "dark"))
    assert difference(phone, dark) > 100, "the dark page is dark"
    for name in SHOTS:
        picture = Image.open(kept(page_name, name))
        empty = Image.new("L", picture.size, picture.getpixel((0, 0)))
        assert difference(picture, empty) > 7, "what the test allows is less than what the page holds"

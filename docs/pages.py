"""The generated parts of the documentation, and .env.example.

    python docs/pages.py             # says what is out of date, exit code 1
    python docs/pages.py --write     # writes it

Settings come from rerank_kit/settings.py, models from profiles/. A Chinese cell stays in its page: a new key gets the
English text there, which a test refuses until somebody translates it.
"""

import csv
import re
import sys
from collections.abc import Iterator
from pathlib import Path

KIT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(KIT))

from rerank_kit import settings
from rerank_kit.models.profiles import all_profiles, load_profiles

CELL = re.compile(r"(?<!\\)\|")
FIXED = {
    "settings": 2,
    "models": 1,
    "refused": 1,
    "sizes": 4,
    "families": 1,
}  # leading columns that are the same in both languages


def cells(line: str) -> list[str]:
    return [cell.strip().replace("\\|", "|") for cell in CELL.split(line.strip())[1:-1]]


def row(*values: str) -> str:
    return "| " + " | ".join(value.replace("|", "\\|") for value in values) + " |"


def settings_rows() -> list[str]:
    return settings.markdown_table().splitlines()[2:]


def models_rows() -> list[str]:
    lines = []
    for profile in load_profiles().values():
        needs = f"; GPU build (vLLM needs {profile.needs} for it)" if profile.needs else ""
        lines.append(row(f"`{profile.name}`", profile.title + needs, profile.score))
    return lines


def refused_rows() -> list[str]:
    refused = [p for p in all_profiles().values() if p.unsupported]
    return [row(f"`{p.name}`", p.title, p.unsupported, p.instead) for p in refused]


def public_rerankers() -> list[dict[str, str]]:
    """Rerankers of public lists, as far as their files are known."""
    with (KIT / "docs" / "rerankers.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def public_rows() -> list[str]:
    """What the kit does with each of them, those that are served first."""
    known = all_profiles()
    groups: dict[int, list[str]] = {0: [], 1: [], 2: []}
    for item in public_rerankers():
        found = known.get(item["decision"])
        if found is None:
            said = f"decided when it is opened{': ' + item['note'] if item['note'] else ''}"
        elif found.unsupported:
            said = f"refused, `{found.name}`"
        else:
            said = f"served, `{found.name}`"
        group = 2 if found is None else 1 if found.unsupported else 0
        groups[group].append(row(item["model"], item["architecture"] or "not known here", said, item["listed"] or "-"))
    return groups[0] + groups[1] + groups[2]


def sizes_rows() -> list[str]:
    """Memory, length and licence of what is served by name, as far as they are known."""
    lines, served = [], load_profiles()
    for item in public_rerankers():
        profile = served.get(item["decision"])
        if profile is None or not (item["parameters"] or item["max_tokens"]):
            continue
        gib = 2 * int(item["parameters"] or 0) / 2**30
        weights = f"{gib:.1f}" if gib >= 1 else f"{gib:.2f}" if gib else "-"
        licence = item["licence"]
        commercial = "yes" if licence in FREE else "no" if "-nc-" in licence else "read it"
        if licence and commercial != "read it":
            commercial += f" ({licence})"
        longest = item["max_tokens"] or "-"
        cache = "yes" if profile.prefix_caching else "no"
        lines.append(row(item["model"], f"`{profile.name}`", weights, longest, commercial, cache))
    return lines


def families_rows() -> list[str]:
    """README's table, the models that most people ask for first."""
    rows = [p.readme for p in load_profiles().values() if p.readme]
    rows.sort(key=lambda r: not r["family"].startswith("Qwen3-Reranker"))
    return [row(r["family"], r["example"], r["score"], r["images"]) for r in rows]


FREE = ("apache-2.0", "mit")
TABLES = {
    "settings": settings_rows,
    "models": models_rows,
    "refused": refused_rows,
    "public": public_rows,
    "sizes": sizes_rows,
    "families": families_rows,
}
PAGES = (
    *("README.md", "README.zh-CN.md", "docs/settings.md", "docs/models.md", "docs/rerankers.md"),
    *("docs/settings.zh-CN.md", "docs/models.zh-CN.md"),
)


def translated(rows: list[str], old: list[str], fixed: int) -> list[str]:
    """The rows with the texts that the page has for the same key, behind the columns that need no translation."""
    known = {cells(line)[0]: cells(line)[fixed:] for line in old}
    return [row(*cells(line)[:fixed], *known.get(cells(line)[0], cells(line)[fixed:])) for line in rows]


def filled_in(name: str, text: str) -> str:
    """The page with every table made anew; the two lines of a table's head are the page's own."""

    def table(found: re.Match[str]) -> str:
        kind, head, old = found[1], found[2], found[3].splitlines()
        rows = TABLES[kind]()
        rows = translated(rows, old, FIXED[kind]) if name.endswith(".zh-CN.md") else rows
        return f"<!-- table: {kind} -->\n{head}" + "".join(f"{line}\n" for line in rows) + "<!-- end -->"

    return re.sub(r"<!-- table: (\w+) -->\n((?:\|.*\n){2})((?:\|.*\n)*)<!-- end -->", table, text)


def generated() -> Iterator[tuple[Path, str]]:
    """(file, what it must say)"""
    yield KIT / ".env.example", settings.env_example()
    for name in PAGES:
        yield KIT / name, filled_in(name, (KIT / name).read_text("utf-8"))


def main(argv: list[str]) -> int:
    if argv not in ([], ["--write"]):
        print(__doc__, file=sys.stderr)
        return 2
    stale = [(path, text) for path, text in generated() if not path.exists() or path.read_text("utf-8") != text]
    for path, text in stale:
        if argv:
            path.write_text(text, "utf-8")
        print(f"{'written' if argv else 'out of date'}: {path.relative_to(KIT)}")
    return 1 if stale and not argv else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

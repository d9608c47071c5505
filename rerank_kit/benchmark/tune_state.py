"""The state file of --tune: what was measured so far, and whether a search is the same one."""

import argparse
import json
from pathlib import Path

from rerank_kit.benchmark.knobs import Knob


def same_search(args: argparse.Namespace, shown: dict, start: dict, knobs: list[Knob]) -> dict:
    """What must be equal for a search to resume from a state file. The budget may differ."""
    names = ["endpoint", "concurrency", "slo", "seconds", "requests", "docs", "doc_words", "doc_tokens", "query_words"]
    names += ["query_tokens", "repeat", "input", "model", "constant"]
    key = {name: getattr(args, name) for name in names}
    key |= {"command": shown["words"], "env": shown["env"], "vllm": shown["vllm"]}
    key |= {"start": start, "knobs": [k.name for k in knobs]}
    return json.loads(json.dumps(key))


def load_state(path: Path, key: dict) -> dict | None:
    """The state of the same search that was interrupted; None = there is none."""
    try:
        state = json.loads(path.read_text("utf-8"))
        if state["done"] or state["key"] != key:
            return None
        return state
    except (OSError, ValueError, LookupError, TypeError):
        return None


def save_state(path: Path, state: dict) -> None:
    scratch = path.with_suffix(".part")
    scratch.write_text(json.dumps(state, indent=1), "utf-8")
    scratch.chmod(0o600)
    scratch.replace(path)


def load_any(path: Path) -> dict:
    """The state file of any search; {} = none."""
    try:
        return dict(json.loads(path.read_text("utf-8")))
    except (OSError, ValueError, TypeError):
        return {}

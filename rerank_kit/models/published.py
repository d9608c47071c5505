"""Answers that publishers print on their model cards, by which `check` knows whether it serves those very weights.

Logits, "yes" minus "no", for two documents of the card's example with the default instruction. Sources: the model cards
of Qwen/Qwen3-Reranker-0.6B, -4B and -8B (bfloat16); for 0.6B also a float32 run on a CPU.
"""

import math
from dataclasses import dataclass
from pathlib import Path

from rerank_kit.models.checkpoint import Checkpoint

QUERY = "What is the capital of China?"
DOCUMENTS = (
    "The capital of China is Beijing.",
    "Gravity is a force that attracts two bodies towards each other. It gives weight to physical objects and is "
    "responsible for the movement of planets around the sun.",
)
# The card's bfloat16 and a float32 run of the same 0.6B weights differ by 0.8 at -12: that is rounding. A prompt
# without template, or a head that was not loaded, is further away.
TOLERANCE = 1.5


@dataclass(frozen=True)
class Published:
    """A checkpoint with published answers; `sizes` are hidden_size and num_hidden_layers."""

    name: str
    revision: str
    sizes: tuple[int, int]
    logits: tuple[tuple[float, float], ...]  # each run: (of the relevant document, of the irrelevant one)


KNOWN = (
    Published("Qwen/Qwen3-Reranker-0.6B", "e61197ed", (1024, 28), ((7.625, -11.375), (7.596951, -12.192464))),
    Published("Qwen/Qwen3-Reranker-4B", "22e68366", (2560, 36), ((6.4375, -14.375),)),
    Published("Qwen/Qwen3-Reranker-8B", "77d193c7", (4096, 36), ((5.0625, -14.25),)),
)


def published(checkpoint: Checkpoint) -> tuple[Published, bool] | None:
    """(the published checkpoint of this size, whether the files are surely that revision); None if there is none.

    The revision is that of the hub's cache or of `hf download --local-dir`, which noted it beside the weights. A weight
    file that was written after its note, as by a fine-tune that was saved there, has no revision. Without one a
    fine-tune of the same size cannot be told from the original before it has answered.
    """
    sizes = checkpoint.config.get("hidden_size"), checkpoint.config.get("num_hidden_layers")
    known = next((k for k in KNOWN if k.sizes == sizes), None)
    if known is None:
        return None
    return known, _revision(checkpoint).startswith(known.revision)


def _revision(checkpoint: Checkpoint) -> str:
    folder = checkpoint.path.absolute()
    if folder.parent.name == "snapshots":
        return folder.name
    found = {_noted(folder, weights) for weights in folder.glob("*.safetensors")}
    return found.pop() if len(found) == 1 else ""


def _noted(folder: Path, weights: Path) -> str:
    """The revision that was noted for this file, "" if there is none or the file was written later.

    A note has three lines: revision, etag, time of the download. huggingface_hub allows the file one second more.
    """
    note = folder / ".cache" / "huggingface" / "download" / f"{weights.name}.metadata"
    try:
        revision, _, downloaded = note.read_text("utf-8").split("\n")[:3]
        return revision.strip() if weights.stat().st_mtime <= float(downloaded) + 1 else ""
    except (OSError, ValueError):
        return ""


def logit(score: float) -> float:
    """The logit of a probability."""
    score = min(max(score, 1e-12), 1 - 1e-12)
    return math.log(score / (1 - score))


def probability(logit: float) -> float:
    """The probability that a logit stands for."""
    return 1 / (1 + math.exp(-logit)) if logit > -700 else 0.0


def difference(score: float, wanted: float) -> float:
    """How far a score lies from the wanted one."""
    return abs(score - wanted)


def logit_difference(score: float, wanted: float) -> float:
    """The difference of two logits' probabilities, or a fifth of their own relative one where that is larger.

    bf16 moves large logits far, by 0.8 at -12 above, and their probabilities are alike all the same. Those of 4 and 8
    are alike too, so the logits count by themselves: a tolerance of 0.02 allows 0.1 * (2 + |wanted|), which is 1.4 at
    -12, 0.6 at 4, and less than what a factor of 1.2 adds to a logit above 2.
    """
    relative = abs(score - wanted) / (5 * (2 + abs(wanted)))
    return max(relative, abs(probability(score) - probability(wanted)))  # max() keeps a NaN that comes first


def sum_difference(score: float, wanted: float) -> float:
    """The difference of two sums over a query's tokens, as a share of the wanted one."""
    return abs(score - wanted) / max(1.0, abs(wanted))


def distance(known: Published, scores: list[float]) -> float:
    """Largest difference of the two logits from the closest published run."""
    got = [logit(score) for score in scores]
    return min(max(abs(a - b) for a, b in zip(run, got, strict=True)) for run in known.logits)

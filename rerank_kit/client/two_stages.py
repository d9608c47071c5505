"""Two stages: a small model scores all documents, a large one the best of them. No IO here."""

import operator
from typing import Any, NamedTuple


class FirstStage(NamedTuple):
    """The service that scores all documents first, and how many of them go on. A plain (base_url, keep) means the same.

    base_url: as in rerank().
    keep: documents for the second stage, 1 or more.
    model: its served name; None = SERVED_MODEL_NAME.
    instruction: for the first stage only; None = the call's own, "" = none, for a model that takes none.
    """

    base_url: str
    keep: int
    model: str | None = None
    instruction: str | None = None


def first_stage(value: Any, top_n: int | None) -> FirstStage:
    """Check the argument `first`. Raises ValueError."""
    if not isinstance(value, tuple | list) or not 2 <= len(value) <= 4:
        raise ValueError(f"first={value!r} is not (base_url, keep)")
    found = FirstStage(*value)
    if not isinstance(found.base_url, str) or not found.base_url:
        raise ValueError(f"first: base_url {found.base_url!r} is not an address")
    try:
        keep = operator.index(found.keep)
    except TypeError:
        keep = 0
    if isinstance(found.keep, bool) or keep < 1:
        raise ValueError(f"first: keep={found.keep!r} is not an integer of 1 or more")
    if top_n is not None and top_n > keep:
        raise ValueError(f"first: keep={keep} is less than top_n={top_n}: the second stage would not see enough")
    return found._replace(keep=keep)


def told(
    first: dict[str, Any], scores: list[Any], second: dict[str, Any], kept: list[int], name: str
) -> dict[str, Any]:
    """The second stage's raw answer with the positions of the whole input, and what the first stage said in "_first".

    Args:
        first, second: raw answers of both stages. scores: those of the first stage, one for each document.
        kept: kept[i] = position of the second stage's document i. name: of its list of results.
    """
    raw = {**second, name: [{**row, "index": kept[row["index"]]} for row in second[name]]}
    raw["_cut"] = sorted(kept[index] for index in second["_cut"])
    raw["_windows"] = {kept[index]: n for index, n in second["_windows"].items()}
    summed = ("_client_cost_ms", "_client_calls", "_client_retries")
    raw |= {key: first[key] + second[key] for key in summed}
    keys = ("model", "usage", "_cut", "_windows", "_version", "_client_url", *summed)
    raw["_first"] = {"scores": scores, **{key: first[key] for key in keys if key in first}}
    return raw

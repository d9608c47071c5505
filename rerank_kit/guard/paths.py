"""The paths that the guard opens, and the one that a client means whose address is not quite right."""

import re

from rerank_kit.guard.asked import NVIDIA_PATHS, RERANK_PATHS, SCORE_PATHS

RERANK_FIELDS = ("documents",)
# The four spellings that vLLM's score routes take. All are counted: a body may hold several.
SCORE_FIELDS = ("queries", "documents", "items", "text_1", "text_2", "data_1", "data_2")
SCORING = {
    **dict.fromkeys((*RERANK_PATHS, *NVIDIA_PATHS), RERANK_FIELDS),
    **dict.fromkeys(SCORE_PATHS, SCORE_FIELDS),
}
NO_KEY_PATHS = frozenset(("/health", "/live", "/ready"))
PATHS = NO_KEY_PATHS | {"/ping", "/version", "/metrics", "/load", "/v1/models", "/info", *SCORING}


def cleaned(path: str, known) -> str:
    """The served path that a client means: its address ended in a slash, or had /v1 although the client adds it."""
    if path in known:
        return path
    short = re.sub("/{2,}", "/", path).rstrip("/")
    again = short.removeprefix("/v1") if short.startswith(("/v1/v1/", "/v1/v2/")) else short
    return next((one for one in (short, again) if one in known), path)


def closed(path: str) -> str:
    """What a caller of a path that is not served is told."""
    meant = [one for one in sorted(SCORING, key=len) if path.rstrip("/").endswith(one)]
    advice = "ALLOW_PATHS opens further paths"
    if meant:
        advice = f"set the client's address so that the whole path is {meant[-1]}"
    scores = ", ".join(sorted(SCORING))
    return f"{path[:100]!a} is not served here (this server scores: {scores}); {advice}"

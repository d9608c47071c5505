"""Scores by sentence-transformers itself, which loads the folder as it is: a reference without code of the kit.

It runs in a process of its own, because the serving environment does without the library (requirements-reference.txt).
"""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from rerank_kit.models.chat_template import pair_template
from rerank_kit.models.checkpoint import Checkpoint
from rerank_kit.models.pair import Pair
from rerank_kit.models.profiles import Profile
from rerank_kit.settings import KIT_DIR

FOLDER = KIT_DIR / "models" / "sentence-transformers"
INSTALL = f"pip install --no-deps --target {FOLDER.relative_to(KIT_DIR)} -r requirements-reference.txt"
TIMEOUT_S = 1800
TOLERANCE = 1e-4  # two references in float32 differ by rounding alone
RECIPE = "the kit's own recipe"
Compared = tuple[Sequence[float | None], float, Callable[[float, float], float]]  # see compare()


class NotComparable(Exception):
    """Why sentence-transformers cannot score this checkpoint."""


def library_scores(checkpoint: Checkpoint, profile: Profile, pairs: list[Pair], instruction: str | None) -> list[float]:
    """Scores of N pairs by CrossEncoder, SentenceTransformer or MultiVectorEncoder in float32 on the CPU.

    Args:
        profile: as settle() made it for this checkpoint.
        instruction: INSTRUCTION; None = the one that the checkpoint saves.

    Raises:
        NotComparable: the library is not installed, or cannot load or score the folder; says why.
    """
    if checkpoint.given:
        raise NotComparable(f"{' and '.join(checkpoint.given)} of the settings replace what it would read")
    if profile.convert != "embed" and (profile.template or profile.own_template) and pair_template(checkpoint) is None:
        raise NotComparable("the folder has no template for a pair, without which the library knows no prompt")
    if checkpoint.config.get("auto_map"):
        raise NotComparable("config.json names code of its own (auto_map), which the kit does not run")
    env = dict(os.environ)
    if find_spec("sentence_transformers") is None:
        if not FOLDER.is_dir():
            raise NotComparable(f"it is not installed: {INSTALL} (in the kit's folder)")
        env["PYTHONPATH"] = os.pathsep.join([str(FOLDER), str(KIT_DIR), env.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    asked = {
        "model": str(checkpoint.path),
        "embeds": profile.convert == "embed",
        "late": profile.reference == "late_interaction",
        # A family with a prompt has the profile's function of the logit, the others what their files say.
        "activation": profile.activation if profile.template or profile.own_template else None,
        "divisor": profile.pooler_config.get("logit_sigma", 1),
        "prompt": instruction,
        "pairs": [(pair.query, pair.document) for pair in pairs],
    }
    done = subprocess.run(
        [sys.executable, "-P", "-m", "rerank_kit.models.library"],
        input=json.dumps(asked),
        env={**env, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""},
        cwd=KIT_DIR,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    if done.returncode:
        lines = [line for line in done.stderr.strip().splitlines() if line.strip()]
        raise NotComparable(f"it cannot load or score the folder: {(lines or ['no reason given'])[-1][:300]}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(
    checkpoint: Checkpoint,
    profile: Profile,
    pairs: list[Pair],
    instruction: str | None,
    others: Mapping[str, Compared],
) -> Iterator[tuple[bool, str]]:
    """Whether the library's scores are those of the others, and one line about each.

    Args:
        others: {whose scores: (the scores, the difference that rounding explains, how far a score lies from the
            library's)}; None is no score.

    What cannot be compared is no difference, and one line.
    """
    try:
        theirs = library_scores(checkpoint, profile, pairs, instruction)
    except NotComparable as exc:
        yield True, f"not compared with sentence-transformers: {exc}"
        return
    what, shown = f"sentence-transformers {version()} in float32", ", ".join(f"{score:.4f}" for score in theirs)
    for who, (scores, tolerance, far) in others.items():
        differences = [math.inf if a is None else far(a, b) for a, b in zip(scores, theirs, strict=True)]
        worst = max(math.inf if math.isnan(value) else value for value in differences)  # max() passes over NaN
        if worst <= tolerance:
            yield True, f"{what} and {who} agree within {worst:.1e}"
        else:
            reads = "one of them reads the checkpoint's files wrong"
            yield False, f"{what} DIFFERS from {who} by {worst:.4f} (it gives {shown}): {reads}"


def main() -> None:
    """Read what library_scores() asks from standard input; print the scores."""
    import sentence_transformers
    import torch

    asked = json.load(sys.stdin)
    more = {"device": "cpu", "model_kwargs": {"dtype": torch.float32}, "local_files_only": True}
    if asked["late"]:
        model = sentence_transformers.MultiVectorEncoder(asked["model"], **more)
        # PyLate 1.6.0, which trains these models, takes away the spaces at a text's edges (as sentence-transformers 5.3
        # does for it); 6.2 by itself keeps them.
        queries, documents = ([text.strip() for text in side] for side in zip(*asked["pairs"], strict=True))
        vectors = model.encode_query(queries), model.encode_document(documents)
        scores = model.similarity_pairwise(*vectors)
    elif asked["embeds"]:
        model = sentence_transformers.SentenceTransformer(asked["model"], **more)
        sides = [model.encode(list(side), convert_to_tensor=True) for side in zip(*asked["pairs"], strict=True)]
        scores = torch.cosine_similarity(*sides, dim=1)
    else:
        model = sentence_transformers.CrossEncoder(asked["model"], **more)
        divisor = asked["divisor"]
        function = {"Sigmoid": torch.sigmoid, "Identity": torch.nn.Identity()}.get(asked["activation"])
        activation = {"activation_fn": lambda logit: function(logit / divisor)} if function else {}
        prompt = {"prompt": asked["prompt"]} if asked["prompt"] else {}
        # One pair a batch: nothing is padded.
        scores = model.predict(
            asked["pairs"], batch_size=1, convert_to_tensor=True, show_progress_bar=False, **activation, **prompt
        )
    print(json.dumps(scores.tolist()))


def version(folder: Path = FOLDER) -> str:
    """The release that library_scores() uses."""
    from importlib.metadata import PackageNotFoundError, distributions
    from importlib.metadata import version as installed

    try:
        return installed("sentence-transformers")
    except PackageNotFoundError:
        found = [d.version for d in distributions(name="sentence-transformers", path=[str(folder)])]
        return found[0] if found else "none"


if __name__ == "__main__":
    main()

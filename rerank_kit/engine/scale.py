"""What a score of one checkpoint is: said in the service's answers (meta.score_scale) and by /info."""

from collections.abc import Callable

from rerank_kit.models.checkpoint import Checkpoint
from rerank_kit.models.profiles import Profile
from rerank_kit.models.published import difference, logit_difference, sum_difference


def score_scale(profile: Profile, checkpoint: Checkpoint) -> dict:
    """{"name", "min", "max", "profile"}: probability (0 to 1), cosine (-1 to 1), maxsim (a sum of cosines),
    logit or another function's value.

    "listwise": True where it depends on the other documents of the call.

    Profiles with a prompt name their function (models/settled.py); a head without one follows the files.
    """
    said = checkpoint.activation
    function = said.value.rpartition(".")[2] if said else "Sigmoid"
    if profile.template or profile.own_template:
        function = profile.activation
    if profile.reference in ("embedding", "listwise"):
        scale = {"name": "cosine", "min": -1, "max": 1}
    elif profile.reference == "late_interaction":
        scale = {"name": "maxsim", "min": None, "max": None}
    elif function == "Sigmoid":
        scale = {"name": "probability", "min": 0, "max": 1}
    else:
        scale = {"name": "logit" if function == "Identity" else function, "min": None, "max": None}
    return scale | {"profile": profile.name} | ({"listwise": True} if profile.listwise else {})


def score_difference(profile: Profile, checkpoint: Checkpoint) -> Callable[[float, float], float]:
    """How far a score lies from the wanted one, on the scale of tolerances for scores from 0 to 1."""
    name = score_scale(profile, checkpoint)["name"]
    return {"logit": logit_difference, "maxsim": sum_difference}.get(name, difference)

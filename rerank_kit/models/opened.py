"""Open a model: its folder, its files, the profile that serves it, and the folder that vLLM gets."""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from rerank_kit.models.checkpoint import Checkpoint, read_checkpoint
from rerank_kit.models.download import locate
from rerank_kit.models.given import with_settings
from rerank_kit.models.profiles import Profile, find_profile
from rerank_kit.models.served_folder import adapted_folder
from rerank_kit.models.settled import settle
from rerank_kit.models.whole import check_whole
from rerank_kit.settings import ConfigError, EnvConfig


@dataclass(frozen=True)
class Opened:
    """A model that the kit can serve."""

    checkpoint: Checkpoint
    profile: Profile
    template: str | None  # Jinja text, with INSTRUCTION as its default; None = the tokenizer's own format
    folder: Path  # the folder that vLLM gets: the checkpoint's, or one that make_adapted() makes
    why: dict[str, str]  # choice -> one line with the file of the checkpoint that it comes from


def opened(model: str | Path, cfg: EnvConfig) -> Opened:
    """Find a model and everything that follows from its family.

    Args:
        model: a folder, or a hub id, which is downloaded.
        cfg: only MODEL_PROFILE, TEMPLATE, SCORE_TOKENS, INSTRUCTION and LOG_DIR are used.

    Raises:
        ConfigError: there is no such model, no profile fits, or this Python lacks a package that the family needs.
    """
    checkpoint = with_settings(read_checkpoint(locate(str(model))), cfg)
    if not checkpoint.architectures and not cfg.model_profile:
        raise ConfigError(
            f"{checkpoint.path}/config.json names no architectures: it is not the config.json of a model that "
            "transformers saved; take the original file, or set MODEL_PROFILE"
        )
    if checkpoint.logit_tokens:  # the family follows from what the tokenizer calls them
        check_whole(checkpoint)
    profile = find_profile(checkpoint, cfg.model_profile)
    check_whole(checkpoint)
    settled = settle(checkpoint, profile, cfg)
    profile = settled.profile
    if profile.needs and find_spec(profile.needs) is None:
        raise ConfigError(
            f"{checkpoint.path} is served by profile {profile.name}, for which vLLM imports {profile.needs}, and this "
            f"Python does not have it (the CPU build leaves it out): use the GPU build"
        )
    folder = adapted_folder(checkpoint, profile, cfg.log_path)
    return Opened(checkpoint, profile, settled.template, folder, settled.why)

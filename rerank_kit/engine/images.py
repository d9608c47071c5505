"""Images in a plan: whether queries and documents may hold them, and what vLLM and the guard are told of them."""

import json
from typing import Any

from rerank_kit.models.image_hosts import ImageHosts
from rerank_kit.models.profiles import load_profiles
from rerank_kit.settings import ConfigError

NOWHERE = "images.invalid"  # a name that no DNS has (RFC 2606)


def plan_images(plan: Any, off: str = "") -> None:
    """Put images into a plan, where its profile takes them and the settings do. off: why they are off all the same."""
    cfg, sizes = plan.cfg, plan.profile.images
    try:
        ImageHosts(cfg.image_hosts)
    except ValueError as exc:
        raise ConfigError(str(exc)) from None
    if not sizes:
        return
    # vLLM itself never fetches: its own client follows redirects to any address. The kit asks IMAGE_HOSTS.
    plan.engine["allowed_media_domains"] = [NOWHERE]
    if not cfg.max_images_per_call:
        off = "off: MAX_IMAGES_PER_CALL=0"
    elif plan.profile.own_prompt:
        off = "off: the prompt is not the profile's own, which says where an image stands"
    if off:
        plan.why["images"] = off
        return
    plan.images = True
    plan.engine["limit_mm_per_prompt"] = {"image": 2, "video": 0}  # one in the query, one in the document
    plan.engine["mm_processor_kwargs"] = {name: sizes[name] for name in ("min_pixels", "max_pixels")}
    # vLLM's default of 4 GiB is for each API process and each engine. A large image takes 16 MB of it.
    plan.engine["mm_processor_cache_gb"] = 1
    plan.why["mm_processor_cache_gb"] = "for each API process and each engine"
    if cfg.max_image_pixels:  # the kit reads the header first; should vLLM read another one, the limit holds too
        plan.env["VLLM_MAX_IMAGE_PIXELS"] = str(cfg.max_image_pixels)


def images_env(plan: Any) -> dict[str, str]:
    """What the guard reads of it."""
    if plan.images:
        return {"GUARD_IMAGES": json.dumps(plan.profile.images)}
    if plan.profile.images:
        return {"GUARD_IMAGE_PROFILES": f"{plan.profile.name}, where images are not off ({plan.why['images']})"}
    return {"GUARD_IMAGE_PROFILES": ", ".join(p.name for p in load_profiles().values() if p.images)}

"""The images of pairs that are scored without a server: read from data URLs, or fetched from IMAGE_HOSTS."""

import asyncio

from rerank_kit.engine.plan import Plan
from rerank_kit.models.image_hosts import ImageHosts, fetch
from rerank_kit.models.images import BadImage, Sizes, check_bytes, data_of, is_data_url, size_of
from rerank_kit.models.pair import Pair
from rerank_kit.offline.prompts import PairEncoder, Prompt

FETCHES = 16  # at a time
CHUNK = 32  # pairs that are prepared together: their images are held in memory, as vLLM resized them
Found = dict[str, bytes | BadImage]  # by address


class PairImages:
    """Prompts of pairs with images."""

    def __init__(self, plan: Plan, encoder: PairEncoder):
        self.plan, self.encoder = plan, encoder
        self.sizes = Sizes(**plan.profile.images) if plan.images else None
        self.hosts = ImageHosts(plan.cfg.image_hosts)

    def encode(self, pairs: list[Pair]) -> list[Prompt | BadImage]:
        """N prompts; for a pair whose image is not scored, the reason."""
        urls = {url for pair in pairs for url in pair.images if url and not is_data_url(url)}
        found: Found = asyncio.run(self._fetch(sorted(urls))) if urls and self.sizes else {}
        out: list[Prompt | BadImage] = []
        for pair in pairs:
            try:
                out.append(self._prompt(pair, found))
            except BadImage as exc:
                out.append(exc)
        return out

    async def _fetch(self, urls: list[str]) -> Found:
        places = asyncio.Semaphore(FETCHES)

        async def one(url: str) -> bytes | BadImage:
            async with places:
                try:
                    return await fetch(url, self.hosts, self.plan.cfg.max_image_bytes)
                except BadImage as exc:
                    return exc

        return dict(zip(urls, await asyncio.gather(*map(one, urls)), strict=True))

    def _prompt(self, pair: Pair, found: Found) -> Prompt:
        if self.sizes is None:
            why = self.plan.why.get("images", "it scores texts only")
            raise BadImage(f"the pair has an image, and profile {self.plan.profile.name} takes none here: {why}")
        cfg, images = self.plan.cfg, []
        for side, url in enumerate(pair.images):
            if url:
                data = data_of(url, cfg.max_image_bytes) if is_data_url(url) else found[url]
                if isinstance(data, BadImage):
                    raise data
                check_bytes(len(data), cfg.max_image_bytes)
                images.append((side, data, self.sizes.tokens(*size_of(data, cfg.max_image_pixels))))
        return self.encoder.encode_beside(pair, images, self.sizes.placeholder)

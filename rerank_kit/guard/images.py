"""Images in a scoring call: taken out of its body, checked, fetched, counted, and put back for vLLM.

While the guard works on a call, a query or document with an image is its text, so all that is done to texts is done to
it. merge() puts the images in again. vLLM gets data URLs only, and never fetches anything. docs/guard.md has the rules.

Source: parse_score_data() in vllm/entrypoints/pooling/scoring/utils.py of vLLM 0.32.0, which puts the images of a text
before it, as scripts/qwen3_vl_reranker.py of the model card does.
"""

import asyncio
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from rerank_kit.guard.answers import Refusal
from rerank_kit.guard.long_bodies import DOCUMENTS, LIMITS, QUERIES, _fields, _instruction, _limit
from rerank_kit.guard.long_documents import LongDocuments
from rerank_kit.models.fitting import Fitter
from rerank_kit.models.image_hosts import ImageHosts, fetch
from rerank_kit.models.images import (
    WRAPPED,
    BadImage,
    Sizes,
    beside,
    check_bytes,
    data_of,
    data_url,
    is_data_url,
    parts_of,
    plain_macro,
    size_of,
)

TOKENS_A_PAIR = 256  # so many tokens of images count as one pair more in admission
FETCHES = 16  # at a time in each API process


@dataclass(eq=False)
class Image:
    """One image of a call; queries and documents that have the same address share it."""

    url: str
    place: str  # where the body has it first
    n_tokens: int = 0  # 0 = not known yet


@dataclass
class CallImages:
    """The images of one call."""

    known: dict[str, Image] = field(default_factory=dict)  # by address
    at: dict[str, dict[int, Image]] = field(default_factory=dict)  # by field and index
    single: set[str] = field(default_factory=set)  # fields that have one text; it may be repeated for each document

    def __bool__(self) -> bool:
        return bool(self.known)

    def of(self, name: str, index: int) -> Image | None:
        """The image of a field's text."""
        return self.at.get(name, {}).get(0 if name in self.single else index)

    def rename(self, old: str, new: str) -> None:
        """The field has another name now."""
        if old in self.at:
            self.at[new] = self.at.pop(old)
        if old in self.single:
            self.single.add(new)


class Images:
    """What the service does with images: GUARD_IMAGES, GUARD_MAX_IMAGE_BYTES and the like.

    Raises ValueError for a setting that cannot be used.
    """

    def __init__(
        self, n_images: int, max_bytes: int, max_pixels: int, long: LongDocuments | None = None, max_body: int = 0
    ):
        self.long: Any = long  # fits texts
        self.max_body = max_body  # bytes of all images that are fetched for one call; 0 = any number
        self.n_images, self.max_bytes, self.max_pixels = n_images, max_bytes, max_pixels
        told = json.loads(os.environ.get("GUARD_IMAGES") or "null")
        self.sizes = Sizes(**told) if told and n_images else None  # None: texts only
        others = os.environ.get("GUARD_IMAGE_PROFILES", "")
        self.advice = f"; profiles that take images: {others}" if others else ""
        self.hosts = ImageHosts(os.environ.get("GUARD_IMAGE_HOSTS", ""))
        self.fetches = asyncio.Semaphore(FETCHES)
        self._plain: Any = None

    # --- reading the body ---

    def read(self, images: CallImages, item: dict, name: str, index: int | None) -> str | None:
        """Take an item's image out of the body: the item's text. None = an object that is no image's."""
        place = name if index is None else f"{name}[{index}]"
        try:
            found = parts_of(item)
        except BadImage as exc:
            raise _refused(f"{place}: {exc}", name) from None
        if found is None:
            return None
        text, urls = found
        for url in urls:
            if self.sizes is None:
                said = f"{place} holds an image (key image), and this service scores texts only{self.advice}"
                raise _refused(said, name)
            image = images.known.setdefault(url, Image(url, place))
            if len(images.known) > self.n_images:
                said = f"the call holds more than {self.n_images} images (MAX_IMAGES_PER_CALL)"
                raise Refusal(413, "images", f"{said}: send several calls", param=name)
            images.at.setdefault(name, {})[index or 0] = image
        return text

    def check_hosts(self, images: CallImages) -> None:
        """Raise Refusal for an address that would not be fetched; nothing is fetched here."""
        for image in images.known.values():
            if not is_data_url(image.url):
                with _told(image):
                    self.hosts.check(image.url)

    async def measure(self, images: CallImages) -> None:
        """Read the headers of the images that are in the body. Raises Refusal."""
        inside = [image for image in images.known.values() if is_data_url(image.url)]
        await asyncio.to_thread(self._measure_all, inside)

    def _measure_all(self, inside: list[Image]) -> None:
        for image in inside:
            self._measure(image, None)

    def _measure(self, image: Image, data: bytes | None) -> None:
        assert self.sizes is not None
        with _told(image):
            if data is None:
                data = data_of(image.url, self.max_bytes)
            check_bytes(len(data), self.max_bytes)
            image.n_tokens = self.sizes.tokens(*size_of(data, self.max_pixels))

    def work(self, images: CallImages, payload: dict, n_pairs: int) -> int:
        """Pairs that the call counts as in admission: one more for each TOKENS_A_PAIR tokens of an image in a pair.

        An image that is not fetched yet counts as the largest one.
        """
        assert self.sizes is not None
        total = n_pairs
        for name, value in payload.items():
            if name not in images.at:
                continue
            times = n_pairs if name in images.single else 1
            for i in range(len(value) if isinstance(value, list) else 1):
                if image := images.of(name, i):
                    total += times * math.ceil((image.n_tokens or self.sizes.most_tokens) / TOKENS_A_PAIR)
        return total

    def choose_mode(self, call: Any, asked: str | None) -> None:
        """Windows are made of texts: a call that asks for them is refused, one that gets them by default is cut."""
        if call.mode == "chunk":
            if asked == "chunk":
                text = "a document with an image has no windows: use truncate or error"
                raise Refusal(422, "long", text, param="long_documents")
            call.mode = "truncate"

    # --- what vLLM gets ---

    async def fit(self, scope: dict, call: Any, body: bytes, receive: Any) -> bytes | None:
        """The body that vLLM gets: images fetched, texts cut to what is left beside them. None = the client left."""
        long = self.long
        fetched = await self._fetch_all(call, receive)
        if call.aborted:
            return None
        await long.prepare(scope)
        if not long.fitter or not long.fitter.template:
            raise Refusal(422, "images", "this server cannot read images beside text: see its log")
        if self._plain is None:
            self._plain = plain_macro(long.fitter.template)
        call.cut = await long._in_worker(call, receive, self._fitted, long.fitter, call) or []
        if call.aborted:
            return None
        merge(call.asked.images, call.payload, fetched, self._plain)
        return await asyncio.to_thread(long.encode, call.payload)

    async def _fetch_all(self, call: Any, receive: Any) -> dict[Image, str]:
        """{image: data URL} of those that are fetched, all at once; what is left is aborted with the client."""
        outside = [image for image in call.asked.images.known.values() if not image.n_tokens]
        if not outside:
            return {}
        fetched: dict[Image, str] = {}
        jobs = [asyncio.create_task(self._fetch(image, fetched)) for image in outside]
        leaves = asyncio.ensure_future(receive())  # the body is read: what comes now is a disconnect
        job = asyncio.gather(*jobs)
        try:
            await asyncio.wait((job, leaves), return_when=asyncio.FIRST_COMPLETED)
            if job.done():
                job.result()
                return fetched
            call.aborted = True
            return {}
        finally:  # gather() leaves the others running when one fails
            for task in (*jobs, job, leaves):
                task.cancel()

    async def _fetch(self, image: Image, fetched: dict[Image, str]) -> None:
        async with self.fetches:
            with _told(image):
                data = await fetch(image.url, self.hosts, self.max_bytes)
            await asyncio.to_thread(self._measure, image, data)
            fetched[image] = data_url(data)
        if 0 < self.max_body < sum(map(len, fetched.values())):
            said = f"the images of the call are longer than {self.max_body} bytes as data URLs (MAX_BODY_BYTES)"
            raise Refusal(413, "bytes", f"{said}: send several calls")

    def _fitted(self, fitter: Fitter, call: Any) -> list[int]:
        """Cut the texts of a call to its limits, and to what its images leave, in place; documents that were cut."""
        images, payload = call.asked.images, call.payload
        fields = _fields(payload)
        if fields is None:  # vLLM says what is wrong
            return []
        first, queries, second, documents = fields
        n, instruction = len(documents), _instruction(payload)
        per_query, per_doc = (_limit(payload, name) for name in LIMITS)
        for name in LIMITS:  # done here: vLLM would cut through an image
            payload.pop(name, None)
        many = queries if len(queries) == n else queries * n
        out, cut, fitters = [], [], {}
        for i, (query, document) in enumerate(zip(many, documents, strict=True)):
            found = [images.of(first, i), images.of(second, i)]
            taken = sum(image.n_tokens + WRAPPED for image in found if image)
            short = fitter.head(query, per_query) if per_query else query
            if call.mode == "truncate":
                if taken not in fitters:
                    fitters[taken] = _fitter_beside(fitter, taken, f"{second}[{i}]")
                new = fitters[taken].fit(short, document, instruction, per_doc)[:2]
            else:
                new = short, fitter.head(document, per_doc) if per_doc else document
            out.append(new)
            if new != (query, document):
                cut.append(i)
        new_queries = [query for query, _ in out]
        if len(queries) != n and len(set(new_queries)) == 1:
            new_queries = new_queries[:1]
        payload[first] = new_queries
        payload[second] = [document for _, document in out]
        return cut


def merge(images: CallImages, payload: dict, fetched: dict[Image, str], plain: Any) -> None:
    """Put the images into a body again, in vLLM's shape, in place.

    The template cannot tell vLLM's own marks of an image from those that a text spells. So the texts are made plain
    here, and the template is told that they are.
    """
    clean = plain or (lambda text: text)
    for name in [name for name in payload if name in (*QUERIES, *DOCUMENTS)]:
        values = payload[name] if isinstance(payload[name], list) else [payload[name]]
        out: list[Any] = []
        for i, text in enumerate(values):
            if not isinstance(text, str):
                out.append(text)
                continue
            text = clean(text) if "<|" in text else text
            if image := images.of(name, i):
                url = fetched.get(image, image.url)
                parts = [{"type": "image_url", "image_url": {"url": url}}]
                out.append({"content": [*parts, *([{"type": "text", "text": text}] if text else [])]})
            else:
                out.append(text)
        payload[name] = out if isinstance(payload[name], list) else out[0]
    payload["chat_template_kwargs"] = {**(payload.get("chat_template_kwargs") or {}), "images": True}


def _fitter_beside(fitter: Fitter, taken: int, place: str) -> Fitter:
    try:
        return beside(fitter, taken)
    except BadImage as exc:
        raise Refusal(400, "long", f"{place}: {exc}", param=place.partition("[")[0]) from None


@contextmanager
def _told(image: Image) -> Iterator[None]:
    """Turns a BadImage into the Refusal that names its place."""
    try:
        yield
    except BadImage as exc:
        name = image.place.partition("[")[0]
        raise Refusal(422, "images", f"{image.place}: {exc}", param=name) from None


def _refused(text: str, param: str) -> Refusal:
    return Refusal(400, "field", text, param=param)

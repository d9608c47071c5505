"""Reads the bodies of scoring calls within bounds of memory and time, which hold before a call is admitted."""

import asyncio
from collections.abc import Awaitable, Callable

from rerank_kit.guard.answers import Refusal
from rerank_kit.guard.body import Limits

# Bodies in the making may hold BUDGET x MAX_BODY_BYTES together. The first MAX_BODY_BYTES / FREE_SHARE bytes of each do
# not count, so a few large bodies that never end keep no usual call out. So 1000 hold at most 8 x MAX_BODY_BYTES.
BUDGET, FREE_SHARE = 6, 512
AGAIN_S = 1


class Reading:
    """The bodies that this process is reading. All numbers are bytes."""

    def __init__(self, limits: Limits, timeout_s: float, n_processes: int):
        self.limits, self.timeout_s = limits, timeout_s
        # One body of the largest size always fits.
        self.most = max(limits.max_bytes, BUDGET * limits.max_bytes // n_processes)
        self.free = limits.max_bytes // FREE_SHARE
        self.held = 0
        # An unpacked body can be a thousand times as large as what came. It is parsed as soon as its turn has come, so
        # at most so many exist at a time.
        self.unpacking = asyncio.Semaphore(2)

    async def unpack(self, body: bytes, encoding: bytes) -> bytes:
        """The JSON text of a body, see Limits.unpack(). The caller parses it before it awaits anything."""
        if not encoding:
            return await self.limits.unpack(body, encoding)
        async with self.unpacking:
            return await self.limits.unpack(body, encoding)

    async def read(self, receive: Callable[[], Awaitable[dict]]) -> bytes | None:
        """The whole body from an ASGI receive(), or Refusal as soon as it exceeds a bound. None = the client left."""
        body, held = bytearray(), 0  # one buffer: a list of single bytes would take forty times their size
        try:
            async with asyncio.timeout(self.timeout_s or None):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    if not body and not message.get("more_body"):
                        self.limits.check_size(len(message.get("body", b"")))
                        return message.get("body", b"")  # the usual call
                    body += message.get("body", b"")
                    self.limits.check_size(len(body))
                    if not message.get("more_body"):
                        return bytes(body)
                    more = max(0, len(body) - self.free) - held
                    if self.most and self.held + more > self.most:
                        raise self._full()
                    self.held, held = self.held + more, held + more
        except TimeoutError:
            text = f"the body was not complete after {self.timeout_s:g} s (BODY_TIMEOUT_S): send it faster"
            raise Refusal(408, "slow", text) from None
        finally:
            self.held -= held

    def _full(self) -> Refusal:
        text = (
            f"the server is reading {self.held} bytes of other calls, and reads {self.most} at a time "
            f"({BUDGET} x MAX_BODY_BYTES): send the call again after Retry-After seconds, or fewer documents at a time"
        )
        return Refusal(429, "reading", text, retry_s=AGAIN_S)

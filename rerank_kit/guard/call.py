"""What the guard knows of one HTTP request while it passes."""

import math
import re
import time
import uuid

from rerank_kit.guard.asked import Asked
from rerank_kit.guard.cache import Lookup
from rerank_kit.guard.long_bodies import Split
from rerank_kit.guard.paths import PATHS, SCORING, cleaned

ID = re.compile(rb"[!-~]{1,128}")  # a request id that a header can carry


class Call:
    """State of one HTTP request."""

    def __init__(self, scope: dict, known=PATHS):
        # The first of a repeated header counts, as in vLLM's own key check.
        self.headers = dict(reversed(scope["headers"]))
        self.sent_path = scope["path"].removeprefix(scope.get("root_path", ""))
        self.path = cleaned(self.sent_path, known)
        self.scoring = scope["method"] == "POST" and self.path in SCORING
        given = self.headers.get(b"x-request-id", b"")
        self.request_id = given if ID.fullmatch(given) else uuid.uuid4().hex.encode()
        trace = re.fullmatch(rb"[0-9a-f]{2}-([0-9a-f]{32})-.*", self.headers.get(b"traceparent", b""))
        self.trace_id = trace[1].decode() if trace else "-"
        self.payload: dict = {}
        self.asked = Asked(inner_path=self.path)
        self.mode = ""  # what happens to pairs that are too long: one of MODES; "" = vLLM's 400
        self.cut: list[int] = []  # documents of which the model sees a part only
        self.split: Split | None = None
        self.lookup: Lookup | None = None  # what the result cache knows of the call's pairs
        self.start_s = time.perf_counter()
        self.taken_s = 0.0  # until the answer began, since a client that reads slowly is not a slow call
        self.status = 0  # 0 = no answer yet
        self.pairs = self.n_bytes = 0
        self.work = 0  # pairs that it counts as in admission: images count as several
        self.requests = 0  # that vLLM makes of the pairs; 0 = one for each
        self.in_flight = self.aborted = self.answered = False
        self.body_id = self.request_id  # the id in vLLM's answer: the body's own request_id comes before the header's
        self.deadline_s = math.inf  # of time.perf_counter(); the caller waits no longer
        self.is_late = False

    @property
    def engine_id(self) -> bytes:
        """The id for vLLM says how many pairs come, because call_scheduler.py waits for them."""
        return b"%b.n%d" % (self.body_id, self.requests or self.pairs) if ID.fullmatch(self.body_id) else self.body_id

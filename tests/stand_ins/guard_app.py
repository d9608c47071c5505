"""The guard driven as an ASGI app: an app in vLLM's place, a client, calls that are held in flight."""

import asyncio
import json
from pathlib import Path

import pytest

from rerank_kit.guard.middleware import Guard

pytest.importorskip("msgspec")  # both come with vLLM
pytest.importorskip("prometheus_client")

RERANK = "/v1/rerank"
SCOPE = {"type": "http", "method": "POST", "path": RERANK, "headers": []}
KIT = Path(__file__).resolve().parents[2]


class Inner:
    """Replaces vLLM's app: records requests, answers 200 or as told."""

    def __init__(self, status=200, gate=None, error=None, headers=()):
        self.status, self.gate, self.error, self.headers = status, gate, error, list(headers)
        self.calls = []  # (path, headers, body)

    async def __call__(self, scope, receive, send):
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        self.calls.append((scope["path"], dict(scope["headers"]), body))
        if self.gate:
            await self.gate.wait()
        if self.error:
            raise self.error
        await send({"type": "http.response.start", "status": self.status, "headers": self.headers})
        await send({"type": "http.response.body", "body": b"{}"})


class Answer:
    def __init__(self, messages):
        assert messages, "no answer"
        self.status = messages[0]["status"]
        self.headers = {k.decode(): v.decode() for k, v in messages[0]["headers"]}
        self.n_request_ids = sum(k == b"x-request-id" for k, _ in messages[0]["headers"])
        self.body = b"".join(m.get("body", b"") for m in messages[1:])

    @property
    def message(self):
        """Text of an error in vLLM's format."""
        error = json.loads(self.body)["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["code"] == self.status
        return error["message"]


async def ask(
    app, path=RERANK, body=b"", *, method="POST", headers=None, chunks=None, length=True, root_path="", leaves=False
):
    """One request; chunks = the body in pieces (or functions that give one); None, or leaves = the client leaves."""
    if isinstance(body, (dict, list)):
        body = json.dumps(body).encode()
    pieces = [body] if chunks is None else list(chunks)
    lines = [(k.lower().encode(), v.encode()) for k, v in (headers or {}).items()]
    if length and chunks is None:
        lines.append((b"content-length", str(len(body)).encode()))
    scope = {"type": "http", "method": method, "path": path, "root_path": root_path, "headers": lines}
    sent = []

    async def receive():
        if not pieces:
            if leaves:
                return {"type": "http.disconnect"}
            await asyncio.Event().wait()  # a client that waits
        piece = pieces.pop(0)
        if callable(piece):
            piece = piece()
        if piece is None:
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": piece, "more_body": bool(pieces)}

    async def send(message):
        sent.append(message)

    await app(scope, receive, send)
    return Answer(sent) if sent else None


def one(app, *args, **kwargs):
    return asyncio.run(ask(app, *args, **kwargs))


def documents(n=2, **more):
    return {"query": "q", "documents": [f"d{i}" for i in range(n)], **more}


def metric(name, **labels):
    from prometheus_client import REGISTRY

    return REGISTRY.get_sample_value(f"rerank_guard_{name}", labels) or 0.0


def run_admission(case, monkeypatch, inner_kwargs=None, **env):
    """Run case(guard, gate, inner): the inner app answers once the gate is set."""
    for key, value in env.items():
        monkeypatch.setenv(f"GUARD_{key}", str(value))

    async def main():
        gate = asyncio.Event()
        inner = Inner(gate=gate, **(inner_kwargs or {}))
        await asyncio.wait_for(case(Guard(inner), gate, inner), 20)

    asyncio.run(main())


async def started(guard, n_pairs, path=RERANK):
    """A call that now waits in the inner app."""
    task = asyncio.create_task(ask(guard, path, documents(n_pairs)))
    before = guard.load.in_flight
    while guard.load.in_flight == before and not task.done():
        await asyncio.sleep(0)
    return task

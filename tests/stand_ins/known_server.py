"""Servers whose behaviour is known, for the tests of bench_rerank.py, and what runs it against them."""

import asyncio
import contextlib
import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from aiohttp import web

import bench_rerank
from rerank_kit.benchmark.load import Bench
from rerank_kit.benchmark.texts import Texts

KIT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def own_settings(monkeypatch, tmp_path):
    """Hides the developer's .env and environment."""
    monkeypatch.setenv("KIT_ENV_FILE", str(tmp_path / "no.env"))
    for key in ("API_KEY", "API_KEY_FILE", "BASE_URL", "HOST", "PORT", "SERVED_MODEL_NAME", "TIMEOUT_S"):
        monkeypatch.delenv(key, raising=False)


def good(endpoint, n):
    """A correct answer for n documents, as vLLM writes it."""
    usage = {"prompt_tokens": 7 * n, "total_tokens": 7 * n}
    if endpoint == "rerank":
        results = [{"index": i, "document": {"text": "x"}, "relevance_score": 1 - i / n} for i in range(n)]
        return {"id": "a", "model": "m", "usage": usage, "results": results}
    return {"id": "a", "model": "m", "usage": usage, "data": [{"index": i, "score": 0.5} for i in range(n)]}


class Service:
    """Answers POSTs by `behave(service, endpoint, body)`; None from it = a good answer. Remembers every call."""

    def __init__(self, behave=None):
        self.behave, self.bodies, self.headers, self.in_flight, self.most_in_flight = behave, [], [], 0, 0

    async def answer(self, request):
        endpoint, body = request.path.rsplit("/", 1)[-1], await request.json()
        self.bodies.append((endpoint, body))
        self.headers.append(request.headers)
        self.request = request
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            said = await self.behave(self, endpoint, body) if self.behave else None
        finally:
            self.in_flight -= 1
        documents = body["documents" if endpoint == "rerank" else "text_2"]
        return web.json_response(good(endpoint, len(documents))) if said is None else said

    async def metrics(self, request):
        """Counters of a server where each pair waits 30 ms and a quarter of the tokens is cached; initially 0."""
        pairs = max(0, len(self.documents) - 60)
        text = "# TYPE x y\n"
        for name, value in (
            ("request_queue_time_seconds_sum", 0.03 * pairs),
            ("request_queue_time_seconds_count", pairs),
            ("prefix_cache_queries_total", 200 * pairs),
            ("prefix_cache_hits_total", 50 * pairs),
        ):
            text += f'vllm:{name}{{engine="0",model_name="m"}} {float(value)}\n'
        return web.Response(text=text)

    @property
    def documents(self):
        return [d for _, body in self.bodies for d in body.get("documents") or body["text_2"]]

    @property
    def queries(self):
        return [body.get("query") or body["text_1"] for _, body in self.bodies]


def says(value):
    async def answer(request):
        return web.json_response(value)

    return answer


@contextlib.contextmanager
def serving(behave=None, root="some-checkpoint"):
    """A Service in a thread of its own; .url is its base URL."""
    service, loop, ready = Service(behave), asyncio.new_event_loop(), threading.Event()

    async def start():
        app = web.Application()
        app.router.add_post("/v1/{endpoint}", service.answer)
        cards = [{"id": "other"}, {"id": "qwen3-reranker", "root": root, "max_model_len": 4096}]
        app.router.add_get("/version", says({"version": "9.9.9"}))
        app.router.add_get("/v1/models", says({"data": cards}))
        app.router.add_get("/metrics", service.metrics)
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        service.url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
        service.runner = runner
        ready.set()

    def run():
        loop.run_until_complete(start())
        loop.run_forever()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        assert ready.wait(10)
        yield service
    finally:
        asyncio.run_coroutine_threadsafe(service.runner.cleanup(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()


def slow(seconds):
    async def behave(service, endpoint, body):
        await asyncio.sleep(seconds)

    return behave


def after_check(behave):
    """A good answer to the first call (the check), then `behave`."""

    async def wrapped(service, endpoint, body):
        return None if len(service.bodies) == 1 else await behave(service, endpoint, body)

    return wrapped


def status(code, text="no", headers=None):
    async def behave(service, endpoint, body):
        return web.Response(status=code, text=text, headers=headers)

    return behave


def bench(service, tmp_path, *argv):
    """Run the program in this process. Returns (exit code, JSON of --json)."""
    out = tmp_path / "out.json"
    docs = [] if "--input" in argv else ["--docs", "4"]
    processes = [] if "--processes" in argv else ["--processes", "1"]  # on a busy machine the program would add some
    code = bench_rerank.main(["--base-url", service.url, *docs, *processes, "--json", str(out), *argv])
    return code, json.loads(out.read_text()) if out.exists() else {}


def table_of(out):
    """The table's lines as cells, the head first."""
    return [line.split() for line in out.splitlines() if not line.startswith("#")]


def one_level(url, coro, n_docs=4, seed=1, timeout_s=5):
    """Run coro(bench) with a session."""

    async def main():
        async with Bench(url, "m", Texts(seed, n_docs), timeout_s=timeout_s, connect_timeout_s=2) as bench:
            return await coro(bench)

    return asyncio.run(main())


def null_server(*argv):
    """The null server in a process of its own; (process, base URL)."""
    command = [sys.executable, "tests/stand_ins/null_server.py", "--docs", "4", *argv]
    process = subprocess.Popen(command, cwd=KIT, stdout=subprocess.PIPE, text=True)
    return process, f"http://127.0.0.1:{int(process.stdout.readline())}/v1"

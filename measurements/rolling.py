"""Rolling restarts and model switches of two replicas behind nginx, under load, one after the other without a pause.

    python measurements/rolling.py --rolls 20 --switches 5      # 12 minutes on 2 cores
    python measurements/rolling.py --rolls 3 --switches 0 --stop-delay 0      # what is lost without STOP_DELAY_S

nginx, its files, switch_model.sh, the client and the guard are the real ones. An app replaces vLLM: it loads for 3 s,
scores a pair after 20 ms by a checksum of version and texts, and stops as vLLM's launcher does. Prints the calls, those
that were lost, and answers by a wrong version: `wrong` has other scores than its id says, `stale` is of another version
than the one that nginx was switched to. Exit code 1 if there is any.
"""

import argparse
import asyncio
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from contextlib import nullcontext, suppress
from pathlib import Path
from types import SimpleNamespace

KIT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(KIT), str(KIT / "tests"), str(KIT / "tests" / "stand_ins")]

LOAD_S, SCORE_S, STOP_TIMEOUT_S = 3, 0.02, 10
PAUSE_S = 0.03  # of each of the clients' six threads between two calls
SWITCHED_S = 1.0  # calls that begin so soon after a switch may still meet nginx's old processes


def score_of(version: str, query: str, document: str) -> float:
    return zlib.crc32(f"{version}\0{query}\0{document}".encode()) % 10_007 / 10_007


# --- a replica: the guard in front of an app in vLLM's place ---


async def scores(scope, receive, send):
    """vLLM's routes, as far as the client and the guard need them."""
    import json

    if scope["type"] == "lifespan":
        while (message := await receive())["type"] != "lifespan.shutdown":
            await send({"type": f"{message['type']}.complete"})
        return await send({"type": "lifespan.shutdown.complete"})
    body, more = b"", True
    while more:
        message = await receive()
        body, more = body + message.get("body", b""), message.get("more_body", False)
    answer = {}
    if scope["method"] == "POST":
        asked, version = json.loads(body), os.environ["GUARD_VERSION"]
        await asyncio.sleep(SCORE_S)
        query, documents = asked.get("query", asked.get("text_1")), asked.get("documents", asked.get("text_2"))
        documents = [documents] if isinstance(documents, str) else documents
        values = [score_of(version, query, document) for document in documents]
        answer = {"id": "x", "model": asked.get("model"), "usage": {"prompt_tokens": 1}}
        if "documents" in asked:
            answer["results"] = [{"index": i, "relevance_score": value} for i, value in enumerate(values)]
        else:
            answer["data"] = [{"index": i, "score": value} for i, value in enumerate(values)]
    data = json.dumps(answer).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(data)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": data})


async def serve(port: int, timeout_s: float) -> None:
    """Serve until TERM, and stop as serve_http() in vllm/entrypoints/launchers/launcher.py of vLLM 0.32.0 does."""
    import uvicorn

    from rerank_kit.guard import Guard

    logging.getLogger("vllm.rerank_guard").setLevel(logging.ERROR)
    await asyncio.sleep(LOAD_S)

    class Server(uvicorn.Server):
        def capture_signals(self):
            return nullcontext()

    guard, engine = Guard(scores), SimpleNamespace(shutdown=lambda timeout=None: None)
    vllm = SimpleNamespace(state=SimpleNamespace(engine_client=engine))

    async def app(scope, receive, send):
        await guard({**scope, "app": vllm}, receive, send)

    server = Server(uvicorn.Config(app, port=port, log_level="error", timeout_keep_alive=5))
    loop, over = asyncio.get_running_loop(), asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, over.set)
    serving = asyncio.create_task(server.serve())
    await over.wait()
    await asyncio.to_thread(lambda: engine.shutdown(timeout=timeout_s))
    server.should_exit = True
    await serving


class Replica:
    def __init__(self, stop_delay_s: float):
        from conftest import free_port

        self.port, self.stop_delay_s = free_port(), stop_delay_s
        self.process: subprocess.Popen | None = None

    def start(self, version: str) -> None:
        from conftest import http, until
        from fleet import KEY

        env = {**os.environ, "GUARD_VERSION": version, "VLLM_API_KEY": KEY, "PYTHONPATH": str(KIT)}
        env["GUARD_STOP_DELAY_S"] = str(self.stop_delay_s)
        command = [sys.executable, __file__, "--serve", str(self.port), "--stop-delay", str(self.stop_delay_s)]
        self.process = subprocess.Popen(command, env=env)

        def ready() -> bool:
            with suppress(OSError):
                return http("GET", f"http://127.0.0.1:{self.port}/ready", timeout_s=2)[0] == 200
            return False

        until(ready, 60)

    def stop(self) -> None:
        assert self.process
        self.process.terminate()
        assert self.process.wait(60) == 0


# --- the drill ---


def drill(n_rolls: int, n_switches: int, stop_delay_s: float, folder: Path) -> dict:
    from fleet import DOCUMENTS, QUERIES, Load, Nginx, use_client

    pools = {name: [Replica(stop_delay_s), Replica(stop_delay_s)] for name in "ab"}
    known = {
        f"{n:012x}": {(q, d): score_of(f"{n:012x}", q, d) for q in QUERIES for d in DOCUMENTS}
        for n in range(n_switches + 1)
    }
    versions, pool, switched = list(known), "a", []  # switched: (time, version)
    nginx = Nginx(folder, [r.port for r in pools["a"]], [r.port for r in pools["b"]])
    load = None
    try:
        for replica in pools[pool]:
            replica.start(versions[0])
        nginx.start()
        use_client(nginx.certificate)
        began, load = time.time(), Load(nginx.urls, known, pause_s=PAUSE_S)
        switched.append((began, versions[0]))
        load.wait_for(20)
        for number in range(max(n_rolls, n_switches)):
            if number < n_rolls:
                for replica in pools[pool]:
                    replica.stop()
                    replica.start(switched[-1][1])
            if number < n_switches:
                other = "b" if pool == "a" else "a"
                for replica in pools[other]:
                    replica.start(versions[number + 1])
                done = nginx.switch("to", other)
                assert done.returncode == 0, done.stderr
                switched.append((time.time(), versions[number + 1]))
                load.wait_for(20)
                time.sleep(SWITCHED_S)
                for replica in pools[pool]:
                    replica.stop()
                pool = other
            print(f"{number + 1}: {load.summary()}", file=sys.stderr, flush=True)
        load.wait_for(20)
    finally:
        if load:
            load.stop()
        nginx.stop()
        for replica in (*pools["a"], *pools["b"]):
            if replica.process:
                replica.process.kill()
                replica.process.wait()
    for error in load.lost[:3]:
        print(f"lost: {error}", file=sys.stderr)
    ends = [at for at, _ in switched[1:]] + [time.time()]
    stale = 0
    for (at, version), end in zip(switched, ends, strict=True):
        calls = [
            c for c in load.calls if at + SWITCHED_S < c["began"] and c["began"] + c["seconds"] < end and not c["error"]
        ]
        # Until the end of a switch both versions may answer.
        allowed = {version} | {v for _, v in switched[switched.index((at, version)) + 1 :][:1]}
        stale += sum(call["version"] not in allowed for call in calls)
    return load.summary() | {"stale": stale, "seconds": round(time.time() - began), "switches": len(switched) - 1}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rolls", type=int, default=20)
    parser.add_argument("--switches", type=int, default=5)
    parser.add_argument("--stop-delay", type=float, default=11, help="STOP_DELAY_S; 10 s is nginx's fail_timeout")
    parser.add_argument("--serve", type=int, metavar="PORT", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        asyncio.run(serve(args.serve, args.stop_delay + STOP_TIMEOUT_S))
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the replicas must not outlive this program
    with tempfile.TemporaryDirectory() as scratch:
        row = drill(args.rolls, args.switches, args.stop_delay, Path(scratch) / "nginx")
    print(f"rolls={args.rolls} stop_delay={args.stop_delay:g} " + " ".join(f"{k}={v}" for k, v in row.items()))
    return int(bool(row["lost"] or row["wrong"] or row["stale"]))


if __name__ == "__main__":
    sys.exit(main())

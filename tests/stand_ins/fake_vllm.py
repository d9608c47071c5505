"""Stand-in for the vllm program, for outcomes that are rare with the real one. FAKE_MODE selects the behaviour:
ok, die (FAKE_LOG on stderr), slow (never ready, ignores TERM), stubborn (ignores TERM), family (a child outlives it).
FAKE_WARMS: a call of 64 documents, as in the burst before ready, takes until that file is gone.
FAKE_LOADS: it binds the port at once, as vLLM does while it loads, and listens when that file is gone.
It dies at start while the file FAKE_DIE exists, and refuses calls with 429 while the file FAKE_BUSY exists; its
counters grow then only if that file says so. /ready is 503 with the text of the file FAKE_UNREADY while that exists."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

MODE = os.environ.get("FAKE_MODE", "ok")
DIE, BUSY, UNREADY = (os.environ.get(name, "/nonexistent") for name in ("FAKE_DIE", "FAKE_BUSY", "FAKE_UNREADY"))
pairs = refused = 0


class Handler(BaseHTTPRequestHandler):
    def answer(self, status, body):
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        global pairs
        if self.path == "/ready" and os.path.exists(UNREADY):
            return self.answer(503, {"error": {"message": Path(UNREADY).read_text()}})
        if self.path != "/metrics":
            return self.answer(200, {})
        if os.path.exists(BUSY) and "grow" in Path(BUSY).read_text():
            pairs += 1
        data = f"rerank_guard_pairs_total {pairs}\nfake_refused_total {refused}\n".encode()
        data += b'vllm:num_requests_running{engine="0"} 2.0\n'
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_POST(self):
        global refused
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        key = os.environ.get("VLLM_API_KEY")
        if key and self.headers.get("Authorization") != f"Bearer {key}":
            return self.answer(401, {"error": "no key"})
        if os.path.exists(BUSY):
            refused += 1
            return self.answer(429, {"error": "busy"})
        while len(body["documents"]) == 64 and os.path.exists(os.environ.get("FAKE_WARMS", "/nonexistent")):
            time.sleep(0.05)
        results = [
            {"index": i, "relevance_score": 0.5, "document": {"text": d}} for i, d in enumerate(body["documents"])
        ]
        self.answer(200, {"model": body["model"], "results": results, "usage": {}})

    def log_message(self, *args):
        pass


def main():
    args = sys.argv[1:]
    if os.environ.get("FAKE_ARGS"):
        with open(os.environ["FAKE_ARGS"], "w") as file:
            json.dump({"args": args, "env": dict(os.environ)}, file)
    if MODE == "die" or os.path.exists(DIE):
        print(os.environ.get("FAKE_LOG", "RuntimeError: boom"), file=sys.stderr)
        return 1
    if os.environ.get("FAKE_HEAD"):  # a headless engine, registered at the head
        head = socket.create_connection(("127.0.0.1", int(os.environ["FAKE_HEAD"])))
        signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
        while True:
            head.recv(1)
            time.sleep(0.1)
    if MODE == "slow":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as vLLM while it loads
        time.sleep(600)
    if MODE == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    else:
        signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    if MODE == "family":
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    if "--headless" in args:
        time.sleep(600)
    host, port = args[args.index("--host") + 1], int(args[args.index("--port") + 1])
    server = ThreadingHTTPServer((host, port), Handler, bind_and_activate=False)
    server.server_bind()
    while os.path.exists(os.environ.get("FAKE_LOADS", "/nonexistent")):
        time.sleep(0.05)
    server.server_activate()
    print("INFO 01-01 00:00:00 [fake.py:1] Application startup complete.", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    sys.exit(main())

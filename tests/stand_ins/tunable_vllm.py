"""Stand-in for the vllm program whose speed is a known function of its arguments (bench_rerank.py --tune).

Pairs/s by --max-num-seqs: 400 at 128, 800 at 256; from 512 it does not start. --renderer-num-workers above 1 doubles
the speed and changes the scores. /metrics counts pairs as the guard does.
"""

import json
import os
import signal
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def value(name, default):
    args = sys.argv
    return int(args[args.index(name) + 1]) if name in args else default


class Handler(BaseHTTPRequestHandler):
    protocol_version, disable_nagle_algorithm, wbufsize = "HTTP/1.1", True, -1  # an answer is one packet
    lock, next_free, pairs, speed, shift = threading.Lock(), 0.0, 0, 1.0, 0.0

    def answer(self, data, kind="application/json"):
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        if self.path == "/metrics":
            return self.answer(f"rerank_guard_pairs_total {Handler.pairs}.0\n".encode(), "text/plain")
        self.answer(b"{}")

    def do_POST(self):
        documents = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["documents"]
        # One engine: calls are served one after the other, each for pairs / speed seconds.
        with Handler.lock:
            Handler.next_free = max(Handler.next_free, time.monotonic()) + len(documents) / Handler.speed
            until = Handler.next_free
        time.sleep(max(0.0, until - time.monotonic()))
        results = [{"index": i, "relevance_score": len(d) % 7 / 10 + Handler.shift} for i, d in enumerate(documents)]
        with Handler.lock:
            Handler.pairs += len(documents)
        self.answer(json.dumps({"results": results, "usage": {"prompt_tokens": 100 * len(documents)}}).encode())

    def log_message(self, *args):
        pass


def main():
    seqs, workers = value("--max-num-seqs", 128), value("--renderer-num-workers", 1)
    if seqs >= 512:
        print("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 9 GiB", file=sys.stderr)
        return 1
    Handler.speed = {128: 400, 256: 800}.get(seqs, 200) * workers
    Handler.shift = 0.1 * (workers > 1)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    host = sys.argv[sys.argv.index("--host") + 1]
    server = ThreadingHTTPServer((host, value("--port", 0)), Handler)
    print("INFO 01-01 00:00:00 [fake.py:1] Application startup complete.", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    sys.exit(main())

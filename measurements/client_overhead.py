"""Overhead of rerank() over the bare HTTP exchange: same bytes, same server, one call at a time.

    python measurements/client_overhead.py --docs 32 --chars 1000 --rounds 600

The server runs in its own process and answers every request at once with the same bytes. In each round every client
sends one call, in random order, so that a busy machine slows all of them alike. The table shows medians, and medians
of the differences within a round.
"""

import argparse
import asyncio
import http.client
import json
import multiprocessing
import random
import socket
import statistics
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

import requests

from rerank_kit import settings
from rerank_kit.client import sending
from rerank_kit.client.calls import arerank, rerank, score


def serve(answers: dict[bytes, bytes], port_to) -> None:
    """One thread for each connection; requests are not parsed beyond their length."""
    import threading

    def handle(connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        data = b""
        while True:
            while b"\r\n\r\n" not in data:
                more = connection.recv(1 << 20)
                if not more:
                    return
                data += more
            head, _, data = data.partition(b"\r\n\r\n")
            length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
            while len(data) < length:
                data += connection.recv(1 << 20)
            data = data[length:]
            connection.sendall(answers[head.split(b" ", 2)[1]])

    listener = socket.create_server(("127.0.0.1", 0))
    port_to.send(listener.getsockname()[1])
    while True:
        threading.Thread(target=handle, args=(listener.accept()[0],), daemon=True).start()


def whole(body: dict) -> bytes:
    data = json.dumps(body, ensure_ascii=False).encode()
    return b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (len(data), data)


def median_ms(seconds: list[float]) -> float:
    return statistics.median(seconds) * 1e3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--docs", type=int, default=32)
    parser.add_argument("--chars", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=600)
    args = parser.parse_args()

    rng = random.Random(7)
    docs = ["".join(rng.choices('abcdefghij klmnop"qrstuvé', k=args.chars)) for _ in range(args.docs)]
    model = settings.CFG.served_model_name
    usage = {"prompt_tokens": 9, "total_tokens": 9}
    rows = [{"index": i, "document": {"text": doc}, "relevance_score": rng.random()} for i, doc in enumerate(docs)]
    rows.sort(key=lambda row: -row["relevance_score"])
    scored = [{"index": i, "object": "score", "score": rng.random()} for i in range(args.docs)]
    answers = {
        b"/v1/rerank": whole({"id": "score-1", "model": model, "usage": usage, "results": rows}),
        b"/v1/score": whole({"id": "score-1", "object": "list", "model": model, "data": scored, "usage": usage}),
    }
    here, there = multiprocessing.Pipe()
    server = multiprocessing.get_context("spawn").Process(target=serve, args=(answers, there), daemon=True)
    server.start()
    port = here.recv()
    url = f"http://127.0.0.1:{port}/v1"
    body = json.dumps({"model": model, "query": "q", "documents": docs}, ensure_ascii=False).encode()
    headers = {"Content-Type": "application/json"}

    raw = socket.create_connection(("127.0.0.1", port))
    raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    head = b"POST /v1/rerank HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    message, size = head % len(body) + body, len(answers[b"/v1/rerank"])

    def by_socket() -> None:
        raw.sendall(message)
        left = size
        while left:
            left -= len(raw.recv(1 << 20))

    plain = http.client.HTTPConnection("127.0.0.1", port)

    def by_http_client() -> None:
        plain.request("POST", "/v1/rerank", body, headers)
        plain.getresponse().read()

    session = requests.Session()
    session.trust_env = False  # as in the kit's client, since looking up proxies costs more than everything else

    def by_requests() -> None:
        session.post(f"{url}/rerank", data=body, headers=headers, timeout=120)

    def by_requests_json() -> None:
        answer = session.post(f"{url}/rerank", json={"model": model, "query": "q", "documents": docs}, timeout=120)
        answer.json()

    loop = asyncio.new_event_loop()
    ways = {
        "raw socket": by_socket,
        "http.client": by_http_client,
        "requests.Session.post(bytes)": by_requests,
        "requests.Session.post(json=) + .json()": by_requests_json,
        "rerank": lambda: rerank("q", docs, base_url=url),
        "score": lambda: score("q", docs, base_url=url),
        "arerank": lambda: loop.run_until_complete(arerank("q", docs, base_url=url)),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    order = list(ways)
    for n in range(args.rounds + 30):
        rng.shuffle(order)
        for name in order:
            t0 = time.perf_counter()
            ways[name]()
            if n >= 30:  # the rest is warm-up
                times[name].append(time.perf_counter() - t0)

    print(f"{args.docs} documents of {args.chars} characters, {len(body)} bytes out, {size} bytes back; {sys.version}")
    print(f"{'way':40} {'median_ms':>9} {'over socket':>11} {'over http.client':>16} {'over requests':>13}")
    bases = ["raw socket", "http.client", "requests.Session.post(bytes)"]
    for name, taken in times.items():
        over = [median_ms([a - b for a, b in zip(taken, times[base], strict=True)]) for base in bases]
        print(f"{name:40} {median_ms(taken):9.3f} {over[0]:11.3f} {over[1]:16.3f} {over[2]:13.3f}")

    payload = json.loads(body)
    answer = answers[b"/v1/rerank"].partition(b"\r\n\r\n")[2]
    codecs = {"json": (lambda: json.dumps(payload, ensure_ascii=False).encode(), lambda: json.loads(answer))}
    if sending.msgspec:
        codecs["msgspec"] = (
            lambda: sending.msgspec.json.encode(payload),
            lambda: sending.msgspec.json.decode(answer),
        )
    else:
        print("msgspec is not installed: the client uses json")
    for name, (dump, load) in codecs.items():
        taken = {dump: [], load: []}
        for _ in range(2000):
            for work, into in taken.items():
                t0 = time.perf_counter()
                work()
                into.append(time.perf_counter() - t0)
        print(f"{name:7} encode {median_ms(taken[dump]):.3f} ms, decode {median_ms(taken[load]):.3f} ms")
    loop.close()
    server.terminate()
    server.join()
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Cost of a call in each tier: bytes, and CPU seconds per 1,000 calls of client, nginx, TLS and guard.

    python measurements/tiers.py --csv measurements/results/tiers.csv

A call has 32 documents of 85 words (about 128 tokens), as in docs/performance.md. A null server answers at once with as
many bytes as vLLM does, which sends every document back. CPU time is a process's own (user and system), so that other
programs on the machine change it little. nginx is left out where it is not installed. Takes about a minute.
"""

import argparse
import asyncio
import http.client
import json
import multiprocessing
import os
import platform
import re
import shutil
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

KIT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(KIT), str(KIT / "tests"), str(KIT / "tests" / "stand_ins")]

from measurements import results
from rerank_kit.benchmark.server_view import hardware
from rerank_kit.benchmark.texts import Texts
from rerank_kit.client.calls import arerank, rerank

DOCS, WORDS_A_DOC, WORDS_A_QUERY = 32, 85, 10
# The parts of deploy/nginx.conf that matter here: keep-alive on both sides, buffers, one log line a call.
NGINX = """
daemon off; worker_processes 1; pid {folder}/pid; error_log {folder}/error.log;
events {{ worker_connections 1024; }}
http {{
  access_log {folder}/access.log;
  upstream replicas {{ least_conn; server 127.0.0.1:{server}; keepalive 64; }}
  client_max_body_size 32m; client_body_buffer_size 256k; keepalive_requests 100000;
  client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/f; uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
  proxy_http_version 1.1; proxy_set_header Connection ""; proxy_buffers 16 32k;
  server {{ listen 127.0.0.1:{plain}; location / {{ proxy_pass http://replicas; }} }}
  server {{ listen 127.0.0.1:{tls} ssl; ssl_certificate {folder}/cert.pem; ssl_certificate_key {folder}/key.pem;
           ssl_protocols TLSv1.2 TLSv1.3; location / {{ proxy_pass http://replicas; }} }}
}}
"""


def null_server(port_to) -> None:
    """Answers each /v1/rerank with the texts of one call, as vLLM does."""
    from null_server import NullServer, reply

    _, documents = Texts(1, DOCS, str(WORDS_A_DOC), str(WORDS_A_QUERY)).of_call(0)
    results = [
        {"index": i, "document": {"text": text, "multi_modal": None}, "relevance_score": 1 / (i + 3)}
        for i, text in enumerate(documents)
    ]
    usage = {"prompt_tokens": 214 * DOCS, "total_tokens": 214 * DOCS}
    body = {"id": "score-" + "0" * 32, "model": "qwen3-reranker", "usage": usage, "results": results}
    replies = {b"rerank": reply(body)}

    async def serve() -> None:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(lambda: NullServer(replies, 0.0, 0.0), "127.0.0.1", 0)
        port_to.send((server.sockets[0].getsockname()[1], len(replies[b"rerank"])))
        await server.serve_forever()

    asyncio.run(serve())


def sync_client(url: str, n: int) -> float:
    """CPU seconds of this process for n calls of rerank()."""
    query, documents = Texts(1, DOCS, str(WORDS_A_DOC), str(WORDS_A_QUERY)).of_call(0)
    for _ in range(50):
        rerank(query, documents, base_url=url)
    before = time.process_time()
    for _ in range(n):
        rerank(query, documents, base_url=url)
    return time.process_time() - before


def async_client(url: str, n: int, in_flight: int = 16) -> float:
    """CPU seconds of this process for n calls of arerank(), several in flight."""
    query, documents = Texts(1, DOCS, str(WORDS_A_DOC), str(WORDS_A_QUERY)).of_call(0)

    async def some(n_calls: int) -> None:
        waiting = iter(range(n_calls))

        async def worker() -> None:
            for _ in waiting:
                await arerank(query, documents, base_url=url)

        await asyncio.gather(*(worker() for _ in range(in_flight)))

    async def main() -> float:
        await some(50)
        before = time.process_time()
        await some(n)
        return time.process_time() - before

    return asyncio.run(main())


def cpu_of(pids: list[int]) -> float:
    ticks = 0
    for pid in pids:
        ticks += sum(map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]))
    return ticks / os.sysconf("SC_CLK_TCK")


def send_calls(port: int, n: int, context: ssl.SSLContext | None = None, threads: int = 4) -> None:
    """n calls over `threads` kept connections."""
    texts = Texts(4, DOCS, str(WORDS_A_DOC), str(WORDS_A_QUERY))
    bodies = [texts.body("rerank", "qwen3-reranker", k)[0] for k in range(200)]

    def one(share: int) -> None:
        if context:
            connection = http.client.HTTPSConnection("127.0.0.1", port, context=context)
        else:
            connection = http.client.HTTPConnection("127.0.0.1", port)
        for k in range(share, n, threads):
            connection.request("POST", "/v1/rerank", bodies[k % 200], {"Content-Type": "application/json"})
            answer = connection.getresponse()
            answer.read()
            assert answer.status == 200, answer.status
        connection.close()

    workers = [threading.Thread(target=one, args=(share,)) for share in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


def free_ports(n: int) -> list[int]:
    import socket

    held = [socket.create_server(("127.0.0.1", 0)) for _ in range(n)]
    ports = [one.getsockname()[1] for one in held]
    for one in held:
        one.close()
    return ports


def nginx_costs(server: int, n: int) -> dict[str, float]:
    """CPU seconds of nginx for 1,000 calls, plain and with TLS; {} without nginx."""
    if not shutil.which("nginx") or not shutil.which("openssl"):
        return {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost"]
        command += ["-keyout", str(folder / "key.pem"), "-out", str(folder / "cert.pem")]
        subprocess.run(command, check=True, capture_output=True)
        plain, tls = free_ports(2)
        (folder / "nginx.conf").write_text(NGINX.format(folder=folder, server=server, plain=plain, tls=tls))
        command = ["nginx", "-p", name, "-c", str(folder / "nginx.conf"), "-e", str(folder / "error.log")]
        nginx = subprocess.Popen(command)
        try:
            time.sleep(1)
            kids = Path(f"/proc/{nginx.pid}/task/{nginx.pid}/children").read_text().split()
            pids, out = [int(pid) for pid in kids], {}
            context = ssl._create_unverified_context()
            for what, port, how in (("nginx", plain, None), ("nginx_tls", tls, context)):
                send_calls(port, 200, how)
                before = cpu_of(pids)
                send_calls(port, n, how)
                out[what] = (cpu_of(pids) - before) * 1000 / n
            return out
        finally:
            nginx.terminate()
            nginx.wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--calls", type=int, default=4000, help="calls of each measurement")
    parser.add_argument("--csv", type=Path, help="file to write, as in measurements/results/")
    args = parser.parse_args()
    here, there = multiprocessing.Pipe()
    server = multiprocessing.get_context("spawn").Process(target=null_server, args=(there,), daemon=True)
    server.start()
    port, answer_bytes = here.recv()
    url, n = f"http://127.0.0.1:{port}/v1", args.calls
    body = Texts(5, DOCS, str(WORDS_A_DOC), str(WORDS_A_QUERY)).body("rerank", "qwen3-reranker", 0)[0]
    cpu = {"client": sync_client(url, n) * 1000 / n, "client_async": async_client(url, n) * 1000 / n}
    cpu |= nginx_costs(port, n)
    server.terminate()
    from measurements.guard import guard_cost

    guard = [float(re.search(r"([\d.]+) us a call", line)[1]) for line in guard_cost()]
    cpu["guard"] = guard[0] / 1000  # microseconds a call = milliseconds for 1,000 calls
    head = {
        "date": time.strftime("%Y-%m-%d"),
        "command": "python measurements/tiers.py" + (f" --calls {n}" if n != 4000 else ""),
        "hardware": hardware(),
        "python": platform.python_version(),
        "call": f"{DOCS} documents of {WORDS_A_DOC} words, query of {WORDS_A_QUERY}",
        "documents": DOCS,
        "request_bytes": len(body) + 250,  # and the head of the request
        "answer_bytes": answer_bytes + 150,  # and the service's further headers
    }
    rows = [{"tier": name, "cpu_s_per_1000_calls": round(value, 3)} for name, value in cpu.items()]
    print(json.dumps({**head, "tiers": rows}, indent=1))
    if args.csv:
        results.write(args.csv, head, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Memory that connections cost which never finish their bodies, with the guard under uvicorn (vLLM's HTTP server).

    python measurements/unfinished.py --connections 1000 --mib-each 4        # half a minute

Starts a server of its own whose app answers at once, opens the connections, and sends each body but for its end. Prints
how much the server's own memory has grown, what became of the calls, and how long a usual call takes meanwhile.
"""

import argparse
import http.client
import json
import os
import resource
import socket
import subprocess
import sys
import time
from pathlib import Path

KIT = Path(__file__).resolve().parent.parent
SERVER = """
import sys
import uvicorn
from rerank_kit.guard import Guard

async def app(scope, receive, send):
    await receive()
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"{}"})

uvicorn.run(Guard(app), fd=int(sys.argv[1]), log_level="error", lifespan="off")
"""
CALL = json.dumps({"query": "q", "documents": ["a document of a usual call " * 20] * 32}).encode()


def resident(pid: int) -> int:
    """Bytes of a process's own memory, without files."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def call_s(port: int) -> tuple[int, float]:
    """(status, seconds) of a call of 32 documents."""
    begin = time.perf_counter()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST", "/v1/rerank", CALL)
    status = connection.getresponse().status
    connection.close()
    return status, time.perf_counter() - begin


def measure(n_connections: int, n_bytes: int, **settings: int) -> dict:
    """What n_connections cost of which each sends n_bytes of a body that is longer. settings: GUARD_<name>."""
    env = {**os.environ, "PYTHONPATH": str(KIT), **{f"GUARD_{name}": str(value) for name, value in settings.items()}}
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(2048)
        port, fd = listener.getsockname()[1], listener.fileno()
        server = subprocess.Popen([sys.executable, "-c", SERVER, str(fd)], env=env, pass_fds=[fd], cwd="/")
    clients = []
    try:
        assert call_s(port)[0] == 200
        before, piece = resident(server.pid), b" " * 65536
        head = b"POST /v1/rerank HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % (n_bytes + 1)
        most = before
        for _ in range(n_connections):
            client = socket.create_connection(("127.0.0.1", port), timeout=60)
            clients.append(client)
            client.sendall(head)
            for begin in range(0, n_bytes, len(piece)):
                client.sendall(piece[: n_bytes - begin])
            most = max(most, resident(server.pid))
        time.sleep(1)
        most = max(most, resident(server.pid))
        answers: dict[str, int] = {}
        for client in clients:
            client.setblocking(False)
            try:
                answer = client.recv(1000)[9:12].decode()
            except BlockingIOError:
                answer = "reads on"
            answers[answer] = answers.get(answer, 0) + 1
        status, seconds = call_s(port)
        return {"grown": most - before, "answers": answers, "usual_call": status, "usual_call_ms": round(seconds * 1e3)}
    finally:
        for client in clients:
            client.close()
        server.terminate()
        server.wait(30)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--connections", type=int, default=1000)
    parser.add_argument("--mib-each", type=float, default=4.0, help="MiB of its body that each connection sends")
    parser.add_argument("--max-body-bytes", type=int, default=32 << 20)
    args = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_NOFILE, (args.connections + 100, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    limits = {"MAX_BODY_BYTES": args.max_body_bytes, "BODY_TIMEOUT_S": 600}
    seen = measure(args.connections, int(args.mib_each * 2**20), **limits)
    times = seen["grown"] / args.max_body_bytes
    print(f"{args.connections} connections with {args.mib_each:g} MiB each: {seen['grown'] / 2**20:.0f} MiB")
    print(f"= {times:.1f} x MAX_BODY_BYTES; {seen['answers']}")
    print(f"a usual call: {seen['usual_call']}, {seen['usual_call_ms']} ms")


if __name__ == "__main__":
    main()

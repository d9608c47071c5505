"""A rerank server that does almost nothing: it measures the load generator, not a model.

    python tests/stand_ins/null_server.py --port 0 --docs 32

Prints the port, then answers every POST with the same ready-made answer for --docs documents (texts in it,
as vLLM sends them), and GET /version and /v1/models. Bodies are not parsed. Standard library only.
"""

import argparse
import asyncio
import json
import time


def reply(body: dict) -> bytes:
    """A whole HTTP answer."""
    data = json.dumps(body).encode()
    head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    return head.encode() + data


NOT_FOUND = b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"


class NullServer(asyncio.Protocol):
    """Cuts requests by Content-Length and sends the ready-made answers, after `cpu_s` of work and `delay_s`."""

    def __init__(self, replies: dict[bytes, bytes], delay_s: float, cpu_s: float):
        self.replies, self.delay_s, self.cpu_s, self.pending = replies, delay_s, cpu_s, b""

    def connection_made(self, transport):
        self.transport = transport

    def data_received(self, data):
        self.pending += data
        while (end := self.pending.find(b"\r\n\r\n")) >= 0:
            head = self.pending[:end].lower()
            at = head.find(b"content-length:")
            length = int(head[at + 15 :].split(b"\r\n", 1)[0]) if at >= 0 else 0
            if len(self.pending) < end + 4 + length:
                return
            self.pending = self.pending[end + 4 + length :]
            answer = self.replies.get(head.split(b" ", 2)[1].rsplit(b"/", 1)[-1], NOT_FOUND)
            until = time.process_time() + self.cpu_s
            while self.cpu_s and time.process_time() < until:
                pass
            if self.delay_s:
                asyncio.get_running_loop().call_later(self.delay_s, self.transport.write, answer)
            else:
                self.transport.write(answer)


async def serve(port: int, docs: int, delay_s: float, cpu_s: float) -> None:
    """Listen on 127.0.0.1 until ended; port 0 = any free one."""
    text = "able above across air animal answer " * 17  # about 100 words
    usage = {"prompt_tokens": 120 * docs, "total_tokens": 120 * docs}
    results = [{"index": i, "document": {"text": text}, "relevance_score": 1 / (i + 1)} for i in range(docs)]
    scores = [{"index": i, "object": "score", "score": 1 / (i + 1)} for i in range(docs)]
    replies = {
        b"rerank": reply({"id": "null", "model": "null", "usage": usage, "results": results}),
        b"score": reply({"id": "null", "object": "list", "model": "null", "data": scores, "usage": usage}),
        b"version": reply({"version": "null"}),
        b"models": reply({"object": "list", "data": []}),
    }
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: NullServer(replies, delay_s, cpu_s), "127.0.0.1", port)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


def main() -> None:
    parser = argparse.ArgumentParser(description="A rerank server that does almost nothing.")
    parser.add_argument("--port", type=int, default=0, help="0 = any free one; printed")
    parser.add_argument("--docs", type=int, default=32, help="documents that each answer is for")
    parser.add_argument("--delay-ms", type=float, default=0, help="time to each answer")
    parser.add_argument("--cpu-ms", type=float, default=0, help="CPU time of each answer")
    args = parser.parse_args()
    asyncio.run(serve(args.port, args.docs, args.delay_ms / 1000, args.cpu_ms / 1000))


if __name__ == "__main__":
    main()

"""A replica of the service without vLLM: the guard under uvicorn, before an app that makes a score of a pair's bytes.

    python cached_replica.py FD SEED      # a listening socket; replicas with another SEED give other scores

Settings by GUARD_* and VLLM_API_KEY. Its log goes to stderr.
"""

import hashlib
import json
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import uvicorn
from prometheus_client import generate_latest

from rerank_kit.guard.middleware import Guard


def score(seed: str, query: str, document: str) -> float:
    digest = hashlib.blake2b(f"{seed}\0{query}\0{document}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        while (await receive())["type"] != "lifespan.shutdown":
            await send({"type": "lifespan.startup.complete"})
        return await send({"type": "lifespan.shutdown.complete"})
    if scope["path"] == "/metrics":
        data = generate_latest()
    else:
        body = json.loads((await receive())["body"])
        texts = body["documents"]
        rows = [
            {"index": i, "document": {"text": text}, "relevance_score": score(sys.argv[2], body["query"], text)}
            for i, text in enumerate(texts)
        ]
        rows.sort(key=lambda row: -row["relevance_score"])
        usage = {"prompt_tokens": len(texts), "total_tokens": len(texts)}
        data = json.dumps({"id": "score-1", "model": "m", "usage": usage, "results": rows}).encode()
    headers = [(b"content-length", b"%d" % len(data)), (b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": data})


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    uvicorn.run(Guard(app), fd=int(sys.argv[1]), log_level="warning", lifespan="on")

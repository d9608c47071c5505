"""What the guard adds to vLLM's description of its API (/openapi.json, /docs; only where ALLOW_PATHS opens them)."""

import json

from rerank_kit.guard.asked import NVIDIA_PATHS
from rerank_kit.guard.fields import TABLE

NVIDIA_EXAMPLE = {
    "model": "qwen3-reranker",
    "query": {"text": "What is the capital of China?"},
    "passages": [{"text": "Beijing."}, {"text": "Gravity attracts bodies."}],
}
RERANK_EXAMPLES = {
    "cohere, jina, vllm": {"query": "q", "documents": ["a", {"text": "b"}], "top_n": 1},
    "tei": {"query": "q", "texts": ["a", "b"], "return_text": True},
    "voyage": {"query": "q", "documents": ["a", "b"], "top_k": 1},
    "several queries": {"queries": ["q", "r"], "documents": [["a", "b"], ["c"]]},
}


def with_dialects(body: bytes) -> bytes:
    """vLLM's OpenAPI document with the guard's routes and fields; anything else unchanged."""
    try:
        page = json.loads(body)
        paths, schemas = page["paths"], page["components"]["schemas"]
        for path in paths:
            if path.endswith("/rerank"):
                content = paths[path]["post"]["requestBody"]["content"]["application/json"]
                content["examples"] = {name: {"value": value} for name, value in RERANK_EXAMPLES.items()}
        for name, route in (("RerankRequest", "rerank"), *((name, "score") for name in schemas if _is_score(name))):
            properties = schemas[name]["properties"]
            for field in TABLE:
                if route in field.routes and field.does != "text":
                    known = properties.setdefault(field.name, {"title": field.name})
                    known["description"] = f"{field.apis}: {field.about}"
    except (ValueError, LookupError, TypeError, AttributeError):  # another release of vLLM, or an error
        return body
    example = {"application/json": {"schema": {"type": "object"}, "example": NVIDIA_EXAMPLE}}
    done = {"200": {"description": 'rankings: [{"index", "logit"}], best first'}}
    for path in NVIDIA_PATHS:
        text = "Rerank, as NVIDIA's NIM"
        paths[path] = {"post": {"summary": text, "requestBody": {"content": example}, "responses": done}}
    paths["/info"] = {"get": {"summary": "The model, as TEI tells it", "responses": {"200": {"description": "OK"}}}}
    return json.dumps(page).encode()


def _is_score(name: str) -> bool:
    return name.startswith("Score") and name.endswith("Request")

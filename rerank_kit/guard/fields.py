"""Every field that a scoring call may have, in all APIs that people's clients speak, and what the service does with it.

docs/guard.md shows this table; asked.py applies it. A field that is not in it reaches vLLM, which ignores it, and the
answer names it in X-Rerank-Ignored.

Source: vllm/entrypoints/pooling/scoring/protocol.py of vLLM 0.32.0 (tests/guard/test_fields.py reads the installed
one), the API references of Cohere (v1, v2), Jina, TEI, Voyage, NVIDIA NIM, SGLang, Xinference and SiliconFlow.
"""

from dataclasses import dataclass
from typing import Any

# What becomes of a field, and the word for it in docs/guard.md.
DOES = {
    "text": "texts",  # a naming of the queries or documents
    "vllm": "vLLM",  # passed on; vLLM checks and uses it
    "guard": "honoured",  # the guard does it
    "name": "honoured",  # another name of a field that is honoured
    "only": "refused",  # only values that change nothing are taken, and dropped
}


@dataclass(frozen=True)
class Field:
    """One field. good and bad are values for the tests; harmless are the only ones taken where does is "only"."""

    name: str
    apis: str
    does: str
    about: str
    good: tuple = ()
    bad: tuple = ()
    alias: str = ""  # of which field this is another name
    harmless: tuple = ()
    routes: tuple[str, ...] = ("rerank", "score")


def _only(name: str, apis: str, harmless: tuple, about: str, bad: tuple, **more: Any) -> Field:
    return Field(name, apis, "only", about, harmless, bad, harmless=harmless, **more)


RERANK, SCORE = ("rerank",), ("score",)
ONE = 'a text, `{"text": ...}`, or what [Images](#images) says'
BOTH = "one naming of each in a body, else 400"
NO_PADDING = "only `do_not_pad`: vLLM would fill the prompt behind the place of the answer, and the score would change"
CUTS_END = "it cuts the end of the prompt, where the model is asked for its answer: send `max_tokens_per_doc`"
LENGTH = (
    "true: a pair that is too long never fails the call (cut, or in windows where LONG_DOCUMENTS=chunk); false: 400"
)

TABLE = (
    # --- texts ---
    Field("query", "Cohere, Jina, TEI, Voyage, NVIDIA, SGLang, vLLM", "text", f"{ONE}; {BOTH}"),
    Field("documents", "Cohere, Jina, Voyage, SGLang, vLLM", "text", f"each {ONE}; {BOTH}"),
    Field(
        "queries",
        "vLLM /score; this kit on /rerank",
        "text",
        "on /rerank a list of queries, with one list of documents for each or one that all share",
    ),
    Field("items", "vLLM, SGLang /score", "text", BOTH, routes=SCORE),
    Field("text_1", "vLLM /score", "text", BOTH, routes=SCORE),
    Field("text_2", "vLLM /score", "text", BOTH, routes=SCORE),
    Field("data_1", "vLLM /score", "text", BOTH, routes=SCORE),
    Field("data_2", "vLLM /score", "text", BOTH, routes=SCORE),
    Field("texts", "TEI", "text", "in place of `documents`: TEI's answer", routes=RERANK),
    Field("passages", "NVIDIA /ranking", "text", "in place of `documents`, on /ranking only", routes=RERANK),
    # --- the prompt ---
    Field("instruction", "vLLM, SiliconFlow", "vllm", "422 for a model that takes none", ("Judge.",), (7,)),
    Field("instruct", "SGLang, DashScope", "name", "as `instruction`", ("Judge.",), (7,), "instruction"),
    Field(
        "chat_template_kwargs",
        "vLLM",
        "vllm",
        "only `instruction`, a text: other keys can change the prompt",
        ({"instruction": "Judge."},),
        ({"enable_thinking": True}, {"instruction": 7}),
    ),
    _only("padding", "vLLM", ("do_not_pad",), NO_PADDING, ("max_length", 1)),
    Field("truncate_prompt_tokens", "vLLM", "only", CUTS_END, (), (10, -1, 0, "10")),
    _only("truncation_side", "vLLM", ("right",), "only `right`: documents are cut at their end", ("left",)),
    Field("cache_salt", "vLLM", "vllm", "prefix cache of its own; no effect on the scores", ("salt",)),
    _only("mm_processor_kwargs", "vLLM", (), "the profile decides how images are resized", ({"max_pixels": 9**9},)),
    # --- lengths ---
    Field(
        "max_tokens_per_doc",
        "vLLM, Cohere v2",
        "guard",
        "tokens that a document keeps; MAX_MODEL_LEN or more cuts nothing and is dropped (vLLM answers 400 to it)",
        (7, "7"),
    ),
    Field("max_tokens_per_query", "vLLM", "guard", "the same for the query", (7,)),
    Field("max_doc_length", "Jina", "name", "as `max_tokens_per_doc`", (7,), (), "max_tokens_per_doc"),
    Field("max_query_length", "Jina", "name", "as `max_tokens_per_query`", (7,), (), "max_tokens_per_query"),
    Field("long_documents", "this kit", "guard", "`truncate`, `error` or `chunk`", ("truncate",), ("cut", 1)),
    Field(
        "max_chunks_per_doc",
        "Cohere v1, Xinference, SiliconFlow",
        "guard",
        "1: `truncate`; N: `chunk`, at most N windows of a document, and what is left out counts as cut",
        (1, 1.0),
        (0, -1, "two", True, 10**400),
        routes=RERANK,
    ),
    Field(
        "overlap_tokens",
        "SiliconFlow",
        "guard",
        "tokens that neighbouring windows share, half a window at most; 64 without it",
        (0, 80),
        (-1, "many", True, 0.5),
        routes=RERANK,
    ),
    Field("truncation", "Voyage, Jina", "guard", LENGTH, (True, False), ("yes", 1)),
    Field(
        "truncate",
        "TEI (true, false), NVIDIA (`END`, `NONE`)",
        "guard",
        "as `truncation`; `START` is refused: documents are cut at their end",
        (True, False, "END", "NONE"),
        ("START", 1),
    ),
    _only("truncation_direction", "TEI", ("right", "Right"), "only `right`", ("left", "Left")),
    # --- the score ---
    Field("use_activation", "vLLM", "vllm", "false: the model's logit instead of its score", (True, False), ("raw",)),
    Field("raw_scores", "TEI, Infinity", "guard", "true: as `use_activation: false`", (True, False), ("yes", 1)),
    _only("apply_softmax", "SGLang /score", (False,), "only false: the profile decides what the score is", (True,)),
    _only("item_first", "SGLang /score", (False,), "only false: the query comes first", (True,)),
    _only("label_token_ids", "SGLang /score", (), "the checkpoint's profile decides the score tokens", ([9693, 2152],)),
    _only("normalize", "vLLM before 0.26", (), "removed from vLLM: use `use_activation`", (True,)),
    _only("task", "vLLM before 0.26", ("score", "classify"), "the profile decides it", ("embed",)),
    # --- the answer ---
    Field("top_n", "Cohere, Jina, SGLang, vLLM", "guard", "the best N; 0 or none: all", (1, "1", 0), (), routes=RERANK),
    Field("top_k", "Voyage", "name", "as `top_n`", (1,), (), "top_n", routes=RERANK),
    Field(
        "return_documents",
        "Cohere v1, Jina, Voyage, SGLang",
        "guard",
        "false: the answer has no texts. Without it: texts, but none in the answers of TEI, Voyage and NVIDIA",
        (True, False),
        ("yes", 1),
        routes=RERANK,
    ),
    Field("return_text", "TEI", "name", "as `return_documents`", (True,), ("yes",), "return_documents", routes=RERANK),
    Field(
        "rank_fields",
        "Cohere v1",
        "guard",
        "for documents that are objects: the values of these keys, in this order, a line each, are the document",
        (),
        ("title", [], [7]),
        routes=RERANK,
    ),
    Field(
        "min_score",
        "this kit",
        "guard",
        "documents below it are left out; `meta.left_out` counts them",
        (0.5, 0, -1),
        ("high", True, 10**400),
        routes=RERANK,
    ),
    _only("return_len", "Xinference", (False,), "only false; `usage` has the tokens of the call", (True,)),
    _only("return_embeddings", "Jina", (False,), "only false", (True,)),
    # --- the call ---
    Field("model", "all", "vllm", "404 for another name than SERVED_MODEL_NAME", ("qwen3-reranker",)),
    Field(
        "timeout_ms",
        "this kit",
        "guard",
        "as the header `X-Request-Timeout-Ms`: how long the caller waits; 429 if it cannot be met, 504 when it is over",
        (60000, 1500.5),
        (0, -1, "soon", True, 10**400),
    ),
    Field("user", "vLLM", "vllm", "no effect", ("me",)),
    Field("request_id", "vLLM", "vllm", "id in the answer and in the log", ("mine",)),
    Field("priority", "vLLM, Cohere v2", "vllm", "0; vLLM refuses others unless --scheduling-policy priority", (0,)),
)  # fmt: skip
FIELDS = {field.name: field for field in TABLE}


def markdown() -> str:
    """The table of docs/guard.md."""
    lines = ["| field | of | what becomes of it |", "|---|---|---|"]
    for field in TABLE:
        status = 400 if field.does == "text" else 422
        where = "" if len(field.routes) > 1 else f" (only /{field.routes[0]}: {status} elsewhere)"
        lines.append(f"| `{field.name}` | {field.apis} | {DOES[field.does]}: {field.about}{where} |")
    return "\n".join(lines) + "\n"

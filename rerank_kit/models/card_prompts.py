"""The prompts of each family as its model card writes them, as token ids. The reference scores them."""

from rerank_kit.models.pair import Pair

# Model card of Qwen/Qwen3-Reranker-0.6B: the two fixed parts of the prompt and the default instruction.
PREFIX = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
)
SUFFIX = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"

VL_INSTRUCTION = "Given a search query, retrieve relevant candidates that answer the query."

# MxbaiRerankV2 of package mxbai-rerank 0.1.6.
MXBAI_SYSTEM = "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
MXBAI_TASK = (
    "You are a search relevance expert who evaluates how well documents match search queries. For each query-document "
    "pair, carefully analyze the semantic relationship between them, then provide your binary relevance judgment "
    "(0 for not relevant, 1 for relevant).\nRelevance:"
)
# Model card of BAAI/bge-reranker-v2-gemma.
BGE_TASK = (
    "Given a query A and a passage B, determine whether the passage contains an answer to the query by providing a "
    "prediction of either 'Yes' or 'No'."
)
# Model cards of ContextualAI/ctxl-rerank-v2-instruct-multilingual-1b, -2b and -6b.
CTXL_TASK = "Check whether a given document contains information helpful to answer the query.\n<Document> "
# modeling.py of jinaai/jina-reranker-v3.
JINA_V3_SYSTEM = (
    "You are a search relevance expert who can determine a ranking of the passages based on how relevant they are to "
    "the query. If the query is a question, how relevant a passage is depends on how well it answers the question. If "
    "not, try to analyze the intent of the query and assess how well each passage satisfies the intent. If an "
    "instruction is provided, you should follow the instruction when determining the ranking."
)
ASSISTANT = "<|im_end|>\n<|im_start|>assistant\n"


def qwen3_prompt_ids(tokenizer, pair: Pair, instruction: str | None = None, max_length: int = 8192) -> list[int]:
    """Token ids of one prompt as the model card builds it. A long document loses its end; the suffix is kept."""
    prefix = tokenizer.encode(PREFIX, add_special_tokens=False)
    suffix = tokenizer.encode(SUFFIX, add_special_tokens=False)
    instruct = pair.instruction or instruction or INSTRUCTION
    text = f"<Instruct>: {instruct}\n<Query>: {pair.query}\n<Document>: {pair.document}"
    middle = tokenizer.encode(text, add_special_tokens=False)
    return prefix + middle[: max_length - len(prefix) - len(suffix)] + suffix


def mxbai_prompt_ids(tokenizer, pair: Pair, instruction: str | None = None, max_length: int = 8192) -> list[int]:
    """Token ids of mxbai-rerank-v2's prompt, tokenized as one text.

    The mxbai-rerank package joins the ids of the parts instead, so its ids differ if the query or the document ends
    in punctuation (".\\n" is one token). A server that fills a template cannot join ids.
    """
    instruct = pair.instruction or instruction
    text = MXBAI_SYSTEM + "<|im_start|>user\n" + (f"instruction: {instruct}\n" if instruct else "")
    return _joint_ids(
        tokenizer, f"{text}query: {pair.query}\ndocument: {pair.document}", f"\n{MXBAI_TASK}{ASSISTANT}", max_length
    )


def zerank_prompt_ids(tokenizer, pair: Pair, instruction: str | None = None, max_length: int = 8192) -> list[int]:
    """Token ids of zerank-2's prompt: the query as system message, the document as user message."""
    instruct = pair.instruction or instruction
    query = f"<query>{pair.query}</query>\n<instruction>{instruct}</instruction>" if instruct else pair.query
    text = f"<|im_start|>system\n{query}<|im_end|>\n<|im_start|>user\n{pair.document}"
    return _joint_ids(tokenizer, text, ASSISTANT, max_length)


def ctxl_prompt_ids(tokenizer, pair: Pair, instruction: str | None = None, max_length: int = 8192) -> list[int]:
    """Token ids of ctxl-rerank-v2's prompt: format_prompts() of its model card, the document before the query.

    The card cuts a long prompt at its end, where the query stands. Here the document's end goes, then the query's.
    """
    instruct = pair.instruction or instruction

    def text_of(query: str, document: str) -> tuple[str, str]:
        return f"{CTXL_TASK}{document}", f"\n<Query> {query}{f' {instruct}' if instruct else ''} ??"

    head, tail = text_of(pair.query, pair.document)
    ids = tokenizer.encode(head + tail)
    if len(ids) <= max_length:
        return ids
    query = pair.query
    if len(tokenizer.encode("".join(text_of(query, "")))) > max_length:
        room = max_length - len(tokenizer.encode("".join(text_of("", ""))))
        offsets = tokenizer(query, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        query = query[: offsets[room][0]]
    if query != pair.query:
        return tokenizer.encode("".join(text_of(query, "")))
    begin, whole = (len(tokenizer.encode(text, add_special_tokens=False)) for text in ("x", f"x{tail}"))
    last = tokenizer.encode(f"x{tail}", add_special_tokens=False)[begin - whole :]
    return ids[: max_length - len(last)] + last


def nemotron_prompt_ids(tokenizer, pair: Pair, instruction: str | None = None, max_length: int = 8192) -> list[int]:
    """Token ids of llama-nemotron-rerank's prompt: prompt_template() of its model card, cut at its end."""
    text = f"question:{pair.query} \n \n passage:{pair.document}"
    return tokenizer(text, truncation=True, max_length=max_length)["input_ids"]


def jina_v3_prompt(query: str, documents: list[str]) -> str:
    """The prompt of a whole list: format_docs_prompts_func() in modeling.py of jinaai/jina-reranker-v3."""
    passages = "".join(f'<passage id="{i}">\n{d}<|embed_token|>\n</passage>\n' for i, d in enumerate(documents))
    return (
        f"<|im_start|>system\n{JINA_V3_SYSTEM}<|im_end|>\n<|im_start|>user\n"
        f"I will provide you with {len(documents)} passages, each indicated by a numerical identifier. "
        f"Rank the passages based on their relevance to query: {query}\n"
        f"{passages}<query>\n{query}<|rerank_token|>\n</query>{SUFFIX}"
    )


def _joint_ids(tokenizer, text: str, suffix: str, max_length: int) -> list[int]:
    """Tokenize the whole prompt at once. A long one loses the end of the document and keeps the suffix."""
    ids = tokenizer.encode(text + suffix, add_special_tokens=False)
    if len(ids) <= max_length:
        return ids
    last = tokenizer.encode(suffix, add_special_tokens=False)
    return ids[: max_length - len(last)] + last


def bge_gemma_prompt_ids(tokenizer, pair: Pair, instruction: str | None = None, max_length: int = 8192) -> list[int]:
    """Token ids of bge-reranker-v2-gemma's prompt, tokenized part by part as on its model card; no instruction."""
    query, passage, newline, task = (
        tokenizer.encode(text, add_special_tokens=False)
        for text in (f"A: {pair.query}", f"B: {pair.document}", "\n", BGE_TASK)
    )
    suffix = newline + task
    return [tokenizer.bos_token_id, *query, *newline, *passage][: max_length - len(suffix)] + suffix


def qwen3_vl_prompt_ids(tokenizer, pair: Pair, instruction: str | None = None, max_length: int = 8192) -> list[int]:
    """Token ids of Qwen3-VL-Reranker's prompt for text, as scripts/qwen3_vl_reranker.py on its model card builds it.

    The whole prompt is one text. A long one loses the end of the document and keeps the last turn.
    """
    system = PREFIX.partition("<|im_end|>")[0]
    text = f"{system}<|im_end|>\n<|im_start|>user\n<Instruct>: {pair.instruction or instruction or VL_INSTRUCTION}"
    text += f"<Query>:{pair.query or 'NULL'}\n<Document>:{pair.document or 'NULL'}"
    return _joint_ids(tokenizer, text, ASSISTANT, max_length)


# Causal rerankers: the prompt, the tokens for relevant and not relevant (None: only the first logit is used), and the
# divisor of the logit before the sigmoid. The sigmoid of the difference of two logits is their softmax. A token may be
# an id, and a divisor of None means that the score is the logit itself.
CAUSAL: dict[str, tuple] = {
    "causal_yes_no": (qwen3_prompt_ids, "yes", "no", 1),
    "mxbai_rerank_v2": (mxbai_prompt_ids, "1", "0", 1),
    "bge_reranker_v2_gemma": (bge_gemma_prompt_ids, "Yes", None, 1),
    "zerank2": (zerank_prompt_ids, "Yes", None, 5),
    "qwen3_vl_reranker": (qwen3_vl_prompt_ids, "yes", "no", 1),
    "ctxl_rerank_v2": (ctxl_prompt_ids, 0, None, None),
}
# Kinds whose prompt is written from the model card: its token ids.
PROMPT_IDS = {kind: recipe[0] for kind, recipe in CAUSAL.items()} | {"llama_bidirectional": nemotron_prompt_ids}

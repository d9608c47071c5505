"""The float32 MaxSim of a late interaction model in transformers, written from package pylate 1.6.0.

Apart from late.py and colbert.py on purpose: it reads the files by itself, and it knows queries whose [MASK] tokens
nothing sees, which vLLM cannot compute.

Source: ColBERT.__init__(), tokenize() and encode(), and colbert_scores() of pylate 1.6.0.
"""

import json
import string
from pathlib import Path

from rerank_kit.models.pair import Pair


def late_score(model: Path, tokenizer, network, dense: list, pair: Pair, max_length: int) -> float:
    """MaxSim of one pair.

    Args:
        network: the encoder, without its Dense layers.
        max_length: the longer of the two lengths in the files, or another length for documents.
    """
    import torch

    said = json.loads((model / "config_sentence_transformers.json").read_text("utf-8"))
    lengths = {True: said.get("query_length") or 32, False: said.get("document_length") or 180}
    if max_length != max(lengths.values()):
        lengths = {True: min(lengths[True], max_length), False: max_length}
    expands = said.get("do_query_expansion") is not False
    vectors = {}
    for is_query, text in ((True, pair.query), (False, pair.document)):
        side = "query" if is_query else "document"
        marker = said.get(f"{side}_prefix")
        marker = {"query": "[Q] ", "document": "[D] "}[side] if marker is None else marker
        text = ((said.get("prompts") or {}).get(side) or "") + text
        batch = tokenizer([text.strip()], truncation=True, max_length=lengths[is_query] - bool(marker))
        ids = batch["input_ids"][0]
        if marker:
            ids = [ids[0], tokenizer.convert_tokens_to_ids(marker), *ids[1:]]
        seen = [1] * len(ids)
        if is_query and expands:
            more = lengths[True] - len(ids)
            ids += [tokenizer.mask_token_id] * more
            seen += [int(bool(said.get("attend_to_expansion_tokens")))] * more
        states = network(torch.tensor([ids]), attention_mask=torch.tensor([seen])).last_hidden_state[0]
        for layer in dense:
            states = layer(states)
        if not is_query:
            words = said.get("skiplist_words")
            skipped = tokenizer.convert_tokens_to_ids(list(string.punctuation) if words is None else words)
            states = states[[i for i, token in enumerate(ids) if token not in skipped]]
        vectors[is_query] = torch.nn.functional.normalize(states, dim=1)
    return torch.einsum("qh,dh->qd", vectors[True], vectors[False]).max(dim=1).values.sum().item()

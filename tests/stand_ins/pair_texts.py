"""Seeded query-document pairs of a given length, for the measurements: sentences of Python's docstrings."""

import ast
import random
import re
import sysconfig
from pathlib import Path


def sentences() -> list[str]:
    """Distinct sentences of the standard library's docstrings; the same for one Python release."""
    found: dict[str, None] = {}
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("**/*.py")):
        if {"site-packages", "test", "tests", "lib2to3"} & set(path.parts):
            continue
        try:
            tree = ast.parse(path.read_text("utf-8"))
        except (SyntaxError, ValueError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
                text = re.sub(r"\s+", " ", ast.get_docstring(node) or "")
                found |= dict.fromkeys(s for s in re.split(r"(?<=[.!?:;])\s+", text) if 20 < len(s) < 400)
    return list(found)


def make_pairs(tokenizer_file: Path, n_pairs: int, doc_tokens: int, docs_per_query: int, seed: int) -> list[tuple]:
    """N (query, document) of about doc_tokens tokens a document, docs_per_query documents in a row for each query."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    parts = sentences()
    lengths = [len(e.ids) for e in tokenizer.encode_batch(parts, add_special_tokens=False)]
    rng = random.Random(seed)
    out, query = [], ""
    for n in range(n_pairs):
        if n % docs_per_query == 0:
            words = " ".join(rng.choices(parts, k=2)).split()
            query = " ".join(words[: rng.randint(8, 14)]).rstrip(".,;:") + f" ({n // docs_per_query})?"
        chosen, left = [], doc_tokens
        while left > 8:
            index = rng.randrange(len(parts))
            if lengths[index] <= left + 4:
                chosen.append(parts[index])
                left -= lengths[index]
        out.append((query, " ".join(chosen)))
    return out

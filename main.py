"""A minimal program: rank three documents, then score them."""

import sys

from env_utils import ConfigError
from rerank_kit.settings import not_installed

try:
    from model_utils import rerank, score
    from resources import RerankError
except ModuleNotFoundError as exc:
    if __name__ != "__main__":
        raise
    sys.exit(not_installed(exc, "main.py", "example"))

QUERY = "What is the capital of China?"
DOCUMENTS = ["Gravity attracts bodies.", "The capital of China is Beijing.", "Shanghai is a large city in China."]


def main() -> int:
    try:
        ranked, _, _ = rerank(QUERY, DOCUMENTS)
        scored, _, _ = score(QUERY, DOCUMENTS)
    except (RerankError, ConfigError) as exc:
        print(f"{type(exc).__name__}: {exc}", file=sys.stderr)
        return 1
    for title, items in (("rerank: best first", ranked), ("score: input order", scored)):
        print(title)
        for item in items:
            print(f"- score={item.score:.4f} | idx={item.index} | doc={item.doc}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

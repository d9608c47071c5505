"""Runs one program of docs/integrations.md unchanged, in the environment of the SDKs (tests/docs/test_integrations.py).

stdin: {"code", "query", "calls": {name: {"documents", "url", "key"}}}. stdout: {name: {"lines"} or {"error", "text"}}
and the version of cohere, where it was used.
Only the address and the key of the program are replaced.
"""

import builtins
import json
import sys
import time


def main() -> int:
    given = json.load(sys.stdin)
    out = {}
    for name, call in given["calls"].items():
        code = given["code"].replace("http://127.0.0.1:11438", call["url"]).replace("your-key", call["key"])
        lines = []
        names = {
            "query": given["query"],
            "documents": call["documents"],
            "print": lambda score, text, into=lines: into.append([float(score), text]),
        }
        began = time.perf_counter()
        try:
            exec(compile(code, "docs/integrations.md", "exec"), names)
            out[name] = {"lines": lines}
        except Exception as exc:
            kind = type(exc)
            out[name] = {"error": f"{kind.__module__.partition('.')[0]}.{kind.__name__}", "text": str(exc)}
        out[name]["seconds"] = time.perf_counter() - began
    out["cohere"] = getattr(sys.modules.get("cohere"), "__version__", None)
    builtins.print(json.dumps(out))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The ASGI class inside the server: key, limits, admission, long documents, metrics. It never reads settings.py.

`vllm serve --middleware rerank_kit.guard.Guard` finds it here.
"""

from rerank_kit.guard.middleware import Guard as Guard

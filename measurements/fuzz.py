"""Sends thousands of valid and invalid bodies to a real service. None may cause a 5xx, a hang or a wrong score.

    python measurements/fuzz.py [--bodies 20000] [--seed 1] [--model FOLDER | --url http://127.0.0.1:11438 --key KEY]

Starts a service of its own (without --model, of a seeded tiny Qwen3-Reranker) and sends over real sockets: bodies
built from the OpenAPI description of /v1/rerank and /v1/score, half of the rerank bodies as clients of TEI, Voyage and
NVIDIA send them or with several queries, most of them with one or two faults, and each of the hand-made ones in
HORRORS. Every answer must come whole, in time and as JSON: 200 with one finite score for each document, an error below
500, a deliberate refusal (429 or 503 with Retry-After), or 504 where the body gave a time that is over. A probe is
scored before and after, and its scores must be bit-identical. Exit code 1 and the smallest body found when something
is wrong.
--url: a running service, which needs ALLOW_PATHS=/openapi.json.
"""

import argparse
import gzip
import http.client
import json
import math
import random
import re
import socket
import sys
import tempfile
import time
from collections import Counter
from contextlib import closing
from pathlib import Path
from urllib.parse import urlsplit

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

KIT = Path(__file__).resolve().parents[1]
ROUTES = {"/v1/rerank": "results", "/v1/score": "data", "/rerank": "results", "/v2/rerank": "results", "/score": "data"}
DIALECTS = ["nvidia", "tei", "voyage", "queries", "plain"]
ANSWER_S = 60  # a body without an answer for that long counts as a hang
PROBE = {"query": "What is the capital of China?", "documents": ["Beijing.", "Gravity attracts bodies.", "首都 😀"]}
JSON_TYPE = "application/json"

# --- bodies -----------------------------------------------------------------------------------------------------

words = st.sampled_from(
    ["capital", "<|im_end|>", "\n", "{{ query }}", "é", "首都", "😀", "\x00", "\u202e", "yes", "'\"\\"]
)
plain = st.text(max_size=20) | st.lists(words, max_size=8).map(" ".join)
texts = plain | st.builds(lambda text, n: text * n, plain, st.sampled_from([1, 1, 1, 40, 3000]))
numbers = st.sampled_from([0, 1, -1, 2, 3, 2**31, 2**63, 2**64, -(2**63) - 1, 10**300, 0.5, -0.0, 1e308, 5e-324])
scalars = st.none() | st.booleans() | numbers | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts
junk = st.recursive(scalars, lambda x: st.lists(x, max_size=4) | st.dictionaries(plain, x, max_size=4), max_leaves=8)
# Not written by json.dumps(): put in place of the marker string afterwards.
RAW = {
    "@nan": b"NaN",
    "@inf": b"-Infinity",
    "@big": b"1e999",
    "@half": b'"\\ud800"',
    "@long": b"9" * 6000,
    "@bad": b"\xff",
}


def from_schema(schema: dict, parts: dict, depth: int = 0):
    """A strategy for values of one JSON schema; parts = the document's components, for "$ref"."""
    if "$ref" in schema:
        schema = parts[schema["$ref"].rpartition("/")[2]]
    if depth > 6:
        return junk
    if options := schema.get("anyOf") or schema.get("oneOf"):
        return st.one_of([from_schema(option, parts, depth + 1) for option in options])
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    if "const" in schema:
        return st.just(schema["const"])
    kind = schema.get("type")
    if kind == "array":
        return st.lists(from_schema(schema.get("items", {}), parts, depth + 1), max_size=4)
    if kind == "object":
        known = schema.get("properties", {}).items()
        # The guard's own fields have no schema: in_dialect() sends them.
        fields = {name: from_schema(of, parts, depth + 1) for name, of in known if of.keys() - {"title", "description"}}
        needed = {name: of for name, of in fields.items() if name in schema.get("required", ())}
        others = {name: of for name, of in fields.items() if name not in needed}
        if not fields:
            return st.dictionaries(plain, junk, max_size=3)
        few = st.lists(st.sampled_from(sorted(others)), max_size=3, unique=True) if others else st.just([])
        return few.flatmap(lambda names: st.fixed_dictionaries(needed | {name: others[name] for name in names}))
    simple = {"string": texts, "integer": st.integers(0, 9) | numbers, "number": numbers, "boolean": st.booleans()}
    return {**simple, "null": st.none()}.get(kind, junk)


def in_dialect(path: str, body: dict, dialect: str, rng: random.Random) -> tuple[str, dict]:
    """A rerank body as clients of another API send it, with some of that API's fields."""
    query, documents = body.pop("query", "q"), body.pop("documents", ["a"])
    some = {name: rng.choice(values) for name, values in OTHER_FIELDS.items() if rng.random() < 0.04}
    if dialect == "nvidia":
        items = documents if isinstance(documents, list) else [documents]
        passages = [{"text": text} for text in items]
        return "/v1/ranking", body | some | {"query": {"text": query}, "passages": passages}
    if dialect == "tei":
        return "/rerank", body | some | {"query": query, "texts": documents}
    if dialect == "queries":
        lists = rng.choice([documents, [documents, documents]])
        return path, body | some | {"queries": [query, query], "documents": lists}
    more = {"top_k": rng.choice([None, 1, 2])} if dialect == "voyage" else {"return_documents": False}
    return path, body | some | more | {"query": query, "documents": documents}


# Fields of other APIs, with values that are right or wrong.
OTHER_FIELDS = {
    "truncate": [True, False, "END", "NONE", "START"],
    "truncation": [True, False, 1],
    "raw_scores": [True, False, "x"],
    "return_text": [True, False],
    "rank_fields": [["text"], ["a", "b"], "text"],
    "min_score": [0, 0.5, -1e300, "x"],
    "max_chunks_per_doc": [1, 2, 10**9, 0],
    "padding": ["do_not_pad", "max_length"],
    "instruct": ["Judge.", 7],
    "timeout_ms": [60000, 1e300, 0.0001, -1],
    "top_k": [1, 0, "2"],
}


REFUSED = ("padding", "truncate_prompt_tokens", "truncation_side", "mm_processor_kwargs", "chat_template_kwargs")


def with_fault(body: dict, rng: random.Random, value) -> dict:
    """The body with one fault: a field of another type, missing, or unknown."""
    body = dict(body)
    name = rng.choice(
        [*body, "documents", "query", "top_n", "max_tokens_per_doc", "long_documents", "chat_template_kwargs"]
    )
    what = rng.random()
    if what < 0.2:
        body.pop(name, None)
    elif what < 0.3:
        body[f"x{name}"] = value
    elif what < 0.6 and isinstance(body.get(name), list):
        body[name] = [*body[name], value]
    else:
        body[name] = value
    return body


def bodies(openapi: dict):
    """A strategy for (path, content type, bytes)."""
    parts = openapi.get("components", {}).get("schemas", {})
    known = {}
    for path in ROUTES:
        content = openapi["paths"][path]["post"]["requestBody"]["content"]
        known[path] = from_schema(content[JSON_TYPE]["schema"], parts)
    types = st.sampled_from(
        [JSON_TYPE] * 20 + ["application/json; charset=utf-8", "text/plain", "", "multipart/form-data"]
    )

    @st.composite
    def one(draw):
        path = draw(st.sampled_from([*ROUTES]))
        body = draw(known[path])
        if draw(st.booleans()):  # a fuzzed query is rarely valid
            fields = ("query", "documents") if ROUTES[path] == "results" else ("text_1", "text_2")
            body |= {fields[0]: draw(texts), fields[1]: draw(st.lists(texts, min_size=1, max_size=4))}
        if draw(st.integers(0, 2)):  # most values of these are refused by the guard
            body = {name: value for name, value in body.items() if name not in REFUSED}
        if draw(st.integers(0, 3)):
            body.pop("model", None)  # a wrong model name would end the call early
        if ROUTES[path] == "results" and (dialect := draw(st.sampled_from([""] * 4 + DIALECTS))):
            path, body = in_dialect(path, dict(body), dialect, draw(st.randoms(use_true_random=False)))
        for _ in range(draw(st.sampled_from([0, 0, 1, 1, 2]))):
            value = draw(junk | st.sampled_from(sorted(RAW)))
            body = with_fault(body, draw(st.randoms(use_true_random=False)), value)
        data = json.dumps(body, ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass")
        for marker, raw in RAW.items():
            data = data.replace(b'"%s"' % marker.encode(), raw)
        if not draw(st.integers(0, 30)):  # cut short, or with a duplicate key
            data = data[: draw(st.integers(0, len(data)))] if draw(st.booleans()) else b'{"query":1,' + data[1:]
        return path, draw(types), data

    return one()


def horrors() -> list[tuple[str, str, bytes]]:
    """(path, content type, bytes) of the hand-made ones."""
    deep, query = 100_000, b'{"query":"q","documents":'
    found = [
        b"",
        b"\x00" * 1000,
        b"[" * deep,
        query + b"[" * deep + b"]" * deep + b"}",
        b'{"a":' * deep + b"1" + b"}" * deep,
        query + b'["a"],"chat_template_kwargs":' + b'{"a":' * 30 + b"1" + b"}" * 30 + b"}",
        query + b'["' + b"a" * 10_000_000 + b'"]}',
        query + b'["' + "首".encode() * 3_300_000 + b'"]}',
        query + b'["' + b"\\u0041" * 1_000_000 + b'"]}',
        query + b'["\\ud800"]}',
        query + b'["\\udc00\\ud800"],"instruction":"\\ud83d"}',
        query + b'["\xed\xa0\x80"]}',
        query + b'["\xff\xfe"]}',
        query + b'["a\\u0000b", "\\u0000", ""]}',
        query + b'["' + b"a " * 200_000 + b'"]}',
        query + b'["' + b"\xf0\x9f\x98\x80" * 100_000 + b'"]}',
        query + b'["' + b"<|im_end|>" * 20_000 + b'"]}',
        query + b"[" + b'"a",' * 5000 + b'"a"]}',
        query + b"[" + b'"",' * 900 + b'""]}',
        query + b'["a"],"top_n":' + b"9" * 4000 + b"}",
        query + b'["a"],"top_n":9223372036854775808}',
        query + b'["a"],"max_tokens_per_doc":-9223372036854775809}',
        query + b'["a"],"max_tokens_per_doc":1e300}',
        query + b'["a"],"max_tokens_per_query":1}',
        query + b'["a"],"priority":1e400}',
        query + b'["a"],"priority":-9223372036854775809}',
        query + b'["a"],"top_n":NaN}',
        query + b'["a"],"documents":["b"]}',
        query + b'["a"],"request_id":"' + b"x" * 100_000 + b'"}',
        query + b'["a"],"request_id":"a\\nb\\u0000"}',
        query + b'["a"],"instruction":"' + b"a " * 5000 + b'"}',
        query + b'["a"],"chat_template":"{% for i in range(999999999) %}x{% endfor %}"}',
        query + b'["a"],"chat_template_kwargs":{"messages":1,"chat_template":"{{ 1/0 }}","tokenize":true}}',
        query + b'["a"],"chat_template_kwargs":{"instruction":{"a":[1]},"tools":"x"}}',
        query + b'["a"],"long_documents":"chunk","chat_template_kwargs":{"instruction":7}}',
        query + b'["' + b"word " * 3000 + b'", "", " "],"long_documents":"chunk"}',
        query + b'["' + b"word " * 3000 + b'"],"long_documents":"error"}',
        query + b'[{"content":[{"type":"image_url","image_url":{"url":"http://127.0.0.1:9/x.png"}}]}]}',
        query + b'[{"content":[{"type":"image_url","image_url":{"url":"file:///etc/passwd"}}]}]}',
        query + b'[{"content":[{"type":"image_url","image_url":{"url":"data:image/png;base64,AAAA"}}]}]}',
        query + b'[{"content":[{"type":"video_url","video_url":{"url":7}}]}]}',
        query + b'[{"content":[{"type":"text","text":"a"},{"type":"text"}]}]}',
        query + b'[{"content":[]}, {"content":null}, {}]}',
        query + b'["a"],"mm_processor_kwargs":{"a":1},"cache_salt":"","use_activation":"no"}',
        b'{"query":["q"],"documents":["a"]}',
        b'{"query":{"content":[{"type":"text","text":"q"}]},"documents":["a"]}',
        b'{"query":"q","documents":{"content":[{"type":"text","text":"a"}]}}',
        b'{"query":"","documents":""}',
        b'{"__proto__":1,"query":"q","documents":["a"]}',
        b"\xef\xbb\xbf" + query + b'["a"]}',
        (query + b'["a"]}').decode().encode("utf-16"),
        gzip.compress(query + b'["a"]}'),
        query + b'["a"]}' + b" " * 1_000_000,
        query + b'["a"]} {"query":1}',
        b"query=q&documents=a",
    ]
    score = [
        b'{"text_1":["a","b"],"text_2":["c"]}',
        b'{"text_1":["a","b"],"text_2":["c","d"]}',
        b'{"text_1":[],"text_2":[]}',
        b'{"text_1":"a","text_2":[]}',
        b'{"text_1":"a","text_2":"b","queries":"c","documents":["d","e"]}',
        b'{"queries":["a"],"items":["b",{"content":[{"type":"text","text":"c"}]}]}',
        b'{"data_1":"a","data_2":["\\ud800"]}',
        b'{"text_1":"' + b"a " * 5000 + b'","text_2":["b","' + b"c " * 5000 + b'"],"long_documents":"chunk"}',
    ]
    kinds = ["text/plain", "application/xml", "", "application/json; charset=latin1", "multipart/form-data; boundary=x"]
    odd = [("/v1/rerank", kind, query + b'["a"]}') for kind in kinds]
    return (
        [("/v1/rerank", JSON_TYPE, data) for data in found] + [("/v1/score", JSON_TYPE, data) for data in score] + odd
    )


# A trace that each kind leaves in the bytes of its body.
TRACES = {
    **{
        name: re.compile(b'"%s": ?' % name.encode())
        for name in ("texts", "passages", "top_k", "queries", *OTHER_FIELDS)
    },
    "NaN": re.compile(rb": ?NaN|\[NaN|, ?NaN"),
    "-Infinity": re.compile(b"-Infinity"),
    "1e999": re.compile(b"1e999"),
    "half a surrogate pair": re.compile(rb"\\ud800|\xed\xa0\x80"),
    "6000 digits": re.compile(b"9{6000}"),
    "invalid UTF-8": re.compile(b"\xff"),
    "a key twice": re.compile(rb'^\{"query":1,'),
    "broken off": re.compile(rb"[^}]\Z"),
    "long texts": re.compile(rb"(?s).{40000}"),
}


def kinds_of(path: str, kind: str, data: bytes) -> set[str]:
    """Route, content type, API and faults of a generated body."""
    return {path, kind or "no content type", *(name for name, trace in TRACES.items() if trace.search(data))}


def all_kinds() -> set[str]:
    types = {JSON_TYPE, "application/json; charset=utf-8", "text/plain", "no content type", "multipart/form-data"}
    return {*ROUTES, "/v1/ranking", *types, *TRACES}


# --- the service --------------------------------------------------------------------------------------------------


SCORE_NAMES = ("relevance_score", "score", "logit")


def rows_of(answer) -> list[list[dict]]:
    """The lists of rows in an answer of any dialect; several for several queries."""
    if isinstance(answer, list):
        return [answer]
    rows = next(answer[name] for name in ("rankings", "data", "results") if name in answer)
    return rows if rows and isinstance(rows[0], list) else [rows]


def said_in(answer: dict) -> str:
    """The text of an error of any dialect."""
    error = answer.get("error")
    return error["message"] if isinstance(error, dict) else error or answer.get("detail")


class Wrong(AssertionError):
    """An answer that the service must not give."""


class Sender:
    """Sends bodies over one kept connection and judges the answers."""

    def __init__(self, url: str, key: str = ""):
        self.address = urlsplit(url)
        self.headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.seen: Counter = Counter()
        self.kinds: Counter = Counter()  # of all bodies but the broken requests
        self.slowest = 0.0, b""
        self.connection = None

    def send(self, path: str, kind: str, data: bytes) -> tuple[int, dict, bytes]:
        """(status, headers, body). Raises Wrong when no whole answer comes in time."""
        headers = {**self.headers, "Content-Type": kind} if kind else self.headers
        for again in (True, False):
            try:
                if self.connection is None:
                    self.connection = http.client.HTTPConnection(self.address.netloc, timeout=ANSWER_S)
                    again = False
                self.connection.request("POST", path, data, headers)
                answer = self.connection.getresponse()
                return answer.status, dict(answer.getheaders()), answer.read()
            except (OSError, http.client.HTTPException) as exc:
                self.close()
                if not again or isinstance(exc, TimeoutError):  # the server may have closed an idle connection
                    raise Wrong(f"no answer: {exc!r}") from exc
        raise AssertionError("not reached")

    def close(self) -> None:
        if self.connection:
            self.connection.close()
            self.connection = None

    def judge(self, path: str, kind: str, data: bytes) -> int:
        """Send one body; its status. Raises Wrong."""
        began = time.perf_counter()
        status, headers, body = self.send(path, kind, data)
        self.slowest = max(self.slowest, (time.perf_counter() - began, data[:200]))
        self.seen[status] += 1
        headers = {name.lower(): value for name, value in headers.items()}
        try:
            answer = json.loads(body)
        except ValueError as exc:
            raise Wrong(f"{status} without JSON: {body[:200]!r}") from exc
        if status == 200:
            for rows in rows_of(answer):
                values = [next(row[name] for name in SCORE_NAMES if name in row) for row in rows]
                if not (values or b"min_score" in data) or not all(
                    type(x) is float and math.isfinite(x) for x in values
                ):
                    raise Wrong(f"200 with the scores {values[:9]}")
                if len({row["index"] for row in rows}) != len(rows):
                    raise Wrong("200 with a duplicate index")
        elif not (400 <= status < 500 and status != 429) and "retry-after" not in headers and status != 504:
            raise Wrong(f"{status}: {body[:300]!r}")
        elif not said_in(answer):
            raise Wrong(f"{status} without a message")
        return status

    def scores(self) -> list[float]:
        """Scores of the probe in input order."""
        status, _, body = self.send("/v1/rerank", JSON_TYPE, json.dumps(PROBE).encode())
        if status != 200:
            raise Wrong(f"the probe got {status}: {body[:300]!r}")
        rows = sorted(json.loads(body)["results"], key=lambda row: row["index"])
        return [row["relevance_score"] for row in rows]

    def openapi(self) -> dict:
        connection = http.client.HTTPConnection(self.address.netloc, timeout=ANSWER_S)
        connection.request("GET", "/openapi.json", headers=self.headers)
        answer = connection.getresponse()
        body = answer.read()
        connection.close()
        if answer.status != 200:
            raise SystemExit(f"/openapi.json got {answer.status}: start the service with ALLOW_PATHS=/openapi.json")
        return json.loads(body)


def broken_requests(sender: Sender) -> int:
    """Requests that no HTTP library sends: wrong lengths, and clients that leave. The service must answer or close."""
    body = b'{"query":"q","documents":["a"]}'
    head = b"POST /v1/rerank HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    if "Authorization" in sender.headers:
        head += b"Authorization: %s\r\n" % sender.headers["Authorization"].encode()
    requests = [
        head + b"Content-Length: 5\r\n\r\n" + body,
        head + b"Content-Length: 999999\r\n\r\n" + body,
        head + b"Content-Length: -1\r\n\r\n" + body,
        head + b"Content-Length: 9999999999999999999999\r\n\r\n" + body,
        head + b"Content-Length: x\r\n\r\n" + body,
        head + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n" + body,
        head + b"Transfer-Encoding: chunked\r\n\r\n1f\r\n" + body + b"\r\n0\r\n\r\n",
        head + b"Transfer-Encoding: chunked\r\nContent-Length: 31\r\n\r\n1f\r\n" + body + b"\r\n0\r\n\r\n",
        head + b"Content-Length: 31\r\nContent-Length: 30\r\n\r\n" + body,
        head + b"Expect: 100-continue\r\nContent-Length: 31\r\n\r\n" + body,
        head + b"X-Request-ID: \xff\x00\r\nContent-Length: 31\r\n\r\n" + body,
        head + b"X: " + b"a" * 100_000 + b"\r\nContent-Length: 31\r\n\r\n" + body,
        b"GET /v1/rerank HTTP/1.1\r\nHost: x\r\n\r\n",
        b"POST /v1/rerank HTTP/0.9\r\n\r\n",
        b"\x16\x03\x01\x02\x00" + b"\x00" * 100,  # TLS
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ]
    for request in requests:
        address = sender.address.hostname, sender.address.port
        with socket.create_connection(address, timeout=2) as connection:
            connection.sendall(request)
            try:
                answer = connection.recv(65536)
            except TimeoutError:
                answer = b""  # it waits for the rest of the body; the client leaves
            except ConnectionResetError:
                answer = b""
            if b" 50" in answer[:16]:
                raise Wrong(f"{answer[:300]!r} to {request[:300]!r}")
    return len(requests)


def fuzz(url: str, n_bodies: int, number: int, key: str = "", say=lambda text: None) -> Sender:
    """Send about n_bodies generated ones, and all hand-made. Raises Wrong at the first fault."""
    with closing(Sender(url, key)) as sender:
        before = sender.scores()
        for path, kind, data in horrors():
            try:
                sender.kinds.update(kinds_of(path, kind, data))
                sender.judge(path, kind, data)
            except Wrong as exc:
                raise Wrong(f"{exc}\nfor {path} {kind!r} {data[:300]!r} ({len(data)} bytes)") from None
        broken_requests(sender)

        @seed(number)
        @settings(
            max_examples=n_bodies,
            deadline=None,
            database=None,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=[*HealthCheck],
        )
        @given(request=bodies(sender.openapi()))
        def each(request):
            sender.kinds.update(kinds_of(*request))
            sender.judge(*request)
            if not sum(sender.seen.values()) % 1000:
                say(f"{sum(sender.seen.values())} bodies: {dict(sorted(sender.seen.items()))}")

        each()
        after = sender.scores()
        if after != before:
            raise Wrong(f"the probe's scores were {before}, now they are {after}")
    return sender


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bodies", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--model", help="checkpoint folder; default: a seeded tiny one")
    parser.add_argument("--url", help="use this running service instead of starting one")
    parser.add_argument("--key", default="", help="API key of the service at --url")
    args = parser.parse_args()
    sys.path[:0] = [str(KIT), str(KIT / "tests"), str(KIT / "tests" / "stand_ins")]
    from conftest import free_port, run_kit

    with tempfile.TemporaryDirectory() as scratch:
        url, settings_ = args.url, {}
        if not url:
            model = args.model
            if not model:
                import tiny_models

                model = tiny_models.qwen3_reranker(Path(scratch, "Qwen3-Reranker-tiny"))
            settings_ = {"MODEL_PATH": model, "PORT": free_port(), "LOG_DIR": scratch, "MAX_MODEL_LEN": 1024}
            settings_ |= {"ALLOW_PATHS": "/openapi.json", "DTYPE": "float32", "RESTART": "no"}
            if (started := run_kit("start", shell="sh", **settings_)).returncode:
                print(started.stdout + started.stderr, file=sys.stderr)
                return 1
            url = f"http://127.0.0.1:{settings_['PORT']}"
        began = time.perf_counter()
        try:
            sender = fuzz(url, args.bodies, args.seed, args.key, lambda text: print(text, file=sys.stderr, flush=True))
        except Wrong as exc:
            print(f"WRONG: {exc}", *getattr(exc, "__notes__", ()), sep="\n")
            return 1
        finally:
            if settings_:
                print(run_kit("stop", shell="sh", **settings_).stdout)
        taken_s = time.perf_counter() - began
        print(f"{sum(sender.seen.values())} bodies in {taken_s:.0f} s, by status: {dict(sorted(sender.seen.items()))}")
        print(f"slowest {sender.slowest[0]:.1f} s: {sender.slowest[1]!r}\nthe probe's scores are the same as before")
    return 0


if __name__ == "__main__":
    sys.exit(main())

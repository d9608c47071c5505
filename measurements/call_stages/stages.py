"""Stages of one call from kitprof's events. usage: stages.py FOLDER OUT NAME"""

import glob
import json
import statistics as st
import sys
from pathlib import Path

D, OUT, NAME = sys.argv[1:4]
ev = []
for f in glob.glob(D + "/*.jsonl"):
    pid = f.rsplit("/", 1)[1].split(".")[0]
    ev += [(t, n, d, pid) for t, n, d in map(json.loads, Path(f).read_text().splitlines())]
ev.sort(key=lambda e: e[0])
start = [e[0] for e in ev if e[1] == "api.guard<"] or [e[0] for e in ev if e[1] == "api.serve<"]
calls = []
for a, b in zip(start, [*start[1:], 1e18], strict=False):
    calls.append([e for e in ev if a - 0.0005 <= e[0] < b - 0.0005])
calls = calls[3:]


def at(c, n, k=0):
    x = [e[0] for e in c if e[1] == n]
    return x[k] if x else None


rows = {}


def add(k, v):
    if v is not None:
        rows.setdefault(k, []).append(v)


def ms(a, b):
    return None if a is None or b is None else (b - a) * 1000


for c in calls:
    t0, end = c[0][0], at(c, "api.sent", -1) or at(c, "api.serve>", -1)
    add("0 whole call in the API process", ms(t0, end))
    add("1 guard and HTTP parsing, until vLLM's handler", ms(t0, at(c, "api.serve<")))
    add("2 template and tokenizer (prep)", ms(at(c, "api.prep<"), at(c, "api.prep>", -1)))
    add("3 prep to first pair handed over", ms(at(c, "api.prep>", -1), at(c, "api.add<")))
    add("4 first to last pair handed over (API)", ms(at(c, "api.add<"), at(c, "api.add>", -1)))
    add("5 first to last pair decoded (engines)", ms(at(c, "eng.decode<"), at(c, "eng.decode>", -1)))
    real = []  # steps with work
    for pid in {e[3] for e in c if e[1].startswith("eng.")}:
        cur = None
        for t, n, d, p in c:
            if p != pid:
                continue
            if n == "eng.step<":
                cur = {"pid": pid, "a": t}
            elif cur is not None and n == "eng.sched>":
                cur["s"], cur["n"], cur["tok"] = t, d[0], d[1]
            elif cur is not None and n == "eng.exec<":
                cur["x0"] = t
            elif cur is not None and n == "eng.exec>":
                cur["x"] = t
            elif cur is not None and n == "eng.pooler>":
                cur["p"] = t
            elif cur is not None and n == "eng.update<":
                cur["u"] = t
            elif cur is not None and n == "eng.step>":
                cur["b"] = t
                if cur.get("n"):
                    real.append(cur)
                cur = None
    if not real:
        continue
    real.sort(key=lambda s: s["a"])
    add("6 first pair handed over to first step", ms(at(c, "api.add<"), real[0]["a"]))
    add("7 first step begins to last step ends", ms(real[0]["a"], max(s["b"] for s in real)))
    add("7a steps (number, all engines)", len(real))
    add("7b engines that worked", len({s["pid"] for s in real}))
    for i in range(3):
        for s in [x for x in real if len([y for y in real if y["pid"] == x["pid"] and y["a"] < x["a"]]) == i]:
            k = f"8.{i + 1} step {i + 1} of an engine: "
            add(k + "pairs", s["n"])
            add(k + "tokens", s["tok"])
            add(k + "ms", ms(s["a"], s["b"]))
            add(k + "schedule ms", ms(s["a"], s.get("s")))
            add(k + "execute_model (launch) ms", ms(s.get("x0"), s.get("x")))
            add(k + "pooler ms", ms(s.get("x"), s.get("p")))
            add(k + "wait for the GPU ms", ms(s.get("p") or s.get("x"), s.get("u")))
            add(k + "update ms", ms(s.get("u"), s["b"]))
    last = max(s["b"] for s in real)
    add("9 last step ends to answer collected", ms(last, at(c, "api.collect>", -1)))
    add("A answer built and sent", ms(at(c, "api.collect>", -1), end))
for k in sorted(rows):
    print(f"{k:52} {st.median(rows[k]):8.2f}  (p90 {sorted(rows[k])[int(len(rows[k]) * 0.9)]:.2f}, n {len(rows[k])})")
out = {"name": NAME, "medians": {k: round(st.median(v), 3) for k, v in sorted(rows.items())}, "calls": len(calls)}
ks = glob.glob(D + "/kernels.*.json")
if ks:  # GPU busy: union of kernels over all engines, by call
    iv, names = [], {}
    for f in ks:
        j = json.loads(Path(f).read_text())
        for a, d, n in j["kernels"]:
            a = a / 1e6 - j["offset_s"]
            iv.append((a, a + d / 1e6))
            names[n] = names.get(n, 0) + d
    iv.sort()
    busy = []
    total = []
    for c in calls:
        a0, b0 = c[0][0], at(c, "api.sent", -1) or c[-1][0]
        cur, s = None, 0.0
        x = [i for i in iv if a0 <= i[0] < b0]
        if not x:
            continue
        for a, b in x:
            if cur is None or a > cur[1]:
                if cur:
                    s += cur[1] - cur[0]
                cur = [a, b]
            else:
                cur[1] = max(cur[1], b)
        s += cur[1] - cur[0]
        busy.append(s * 1000)
        total.append((b0 - a0) * 1000)
    if busy:
        print(
            f"GPU busy {st.median(busy):.2f} ms of a call of {st.median(total):.2f} ms, "
            f"{len(busy)} calls, kernels {len(iv)}"
        )
        for n, d in sorted(names.items(), key=lambda x: -x[1])[:9]:
            print(f"   {d / 1000 / max(1, len(busy)):8.3f} ms a call  {n}")
        out["gpu_busy_ms"], out["call_ms"] = round(st.median(busy), 3), round(st.median(total), 3)
        out["kernels_ms_a_call"] = {
            n: round(d / 1000 / len(busy), 3) for n, d in sorted(names.items(), key=lambda x: -x[1])[:12]
        }
with Path(OUT, "where.jsonl").open("a") as file:
    file.write(json.dumps(out) + "\n")

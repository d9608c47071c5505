#!/bin/sh
# Bet, written before the first run: for one query whose run holds two documents with the same score, one relevant and
# one not, ranx, pytrec_eval and scikit-learn's ndcg_score give the same nDCG, or at least none of them depends on the
# documents' names.
#
# The bet was wrong. Three libraries, three answers: pytrec_eval ranks equal scores by document name, the last name first
# (as trec_eval does); ranx keeps the order in which the run lists them; scikit-learn gives the mean over both orders.
# So a reranker whose scores tie (bf16 has 128 values from 0.5 to 1) gets another nDCG from each of them.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/env"
"$dir/env/bin/python" -m pip --disable-pip-version-check -q install \
  ranx==0.3.21 numba==0.68.1 numpy==2.4.6 pytrec-eval-terrier==0.5.11 scikit-learn==1.9.1
cat >"$dir/look.py" <<'PY'
from importlib.metadata import version

import pytrec_eval
from ranx import Qrels, Run, evaluate
from sklearn.metrics import ndcg_score

for name in ("ranx", "pytrec-eval-terrier", "scikit-learn"):
    print(name, version(name))
seen = []
for good, bad in (("a", "b"), ("b", "a")):
    for first in (good, bad):
        second = bad if first == good else good
        qrels, run = {"q": {good: 1, bad: 0}}, {"q": {first: 0.5, second: 0.5}}
        trec = pytrec_eval.RelevanceEvaluator(qrels, {"ndcg"}).evaluate(run)["q"]["ndcg"]
        ranx = evaluate(Qrels(qrels), Run(run), "ndcg")
        order = [first, second]
        sk = ndcg_score([[float(name == good) for name in order]], [[0.5, 0.5]])
        seen.append((round(float(trec), 3), round(float(ranx), 3), round(float(sk), 3)))
        print(f"relevant {good!r}, listed first {first!r}: pytrec_eval {trec:.3f} ranx {ranx:.3f} scikit-learn {sk:.3f}")
known = [(0.631, 1.0, 0.815), (0.631, 0.631, 0.815), (1.0, 1.0, 0.815), (1.0, 0.631, 0.815)]
print("one relevant and one other document with equal scores: each library has a rule of its own")
raise SystemExit(0 if seen == known else f"this has changed: {seen}")
PY
"$dir/env/bin/python" -W ignore "$dir/look.py"

"""Compares the kit with other ways to score the same seeded pairs, each in its own process.

python measurements/peers.py --model FOLDER [--model FOLDER ...] [--csv FILE]

  kit                    OfflineReranker (texts in, floats out) with the kit's choices for this machine
  llm_score              bare vllm.LLM(...).score() with the three documented settings, otherwise vLLM's defaults
  transformers           sorted by length, right-padded, every --batch-sizes; the best is reported
  sentence_transformers  CrossEncoder, or SentenceTransformer for an embedding model; every --batch-sizes, the best
  --service NAME=URL     an HTTP service that has /rerank (kit, bare vllm serve ...): bench_rerank.py's loop

Throughput is the median over --runs runs of all pairs, after a warm-up; loading is not counted, tokenizing is. Every
way gives its scores for the first pairs; the table shows the largest difference to transformers in float32 on the same
pairs (without float32: in the first precision). If a way fails, its reason is reported and the others are measured.
"""

import argparse
import contextlib
import json
import os
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

KIT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(KIT), str(KIT / "tests" / "stand_ins")]

from pair_texts import make_pairs

from measurements import results

WAYS = ("kit", "llm_score", "transformers", "sentence_transformers")
N_CHECKED = 32  # pairs whose scores are compared
TORCH_DTYPE = {"bf16": "bfloat16", "float32": "float32"}


# --- one way in its own process ---


def plan_for(args, dtype: str):
    from rerank_kit.engine.plan import plan_engine
    from rerank_kit.settings import get_config

    return plan_engine(get_config(dtype=TORCH_DTYPE[dtype]), args.model)


def kit_way(args):
    """(variants, llm): {label: pairs -> N floats}, and the vllm.LLM, whose caches and processes need care."""
    from rerank_kit.models.pair import Pair
    from rerank_kit.offline.reranker import OfflineReranker

    reranker = OfflineReranker(plan_for(args, args.dtype))
    run = lambda pairs: [r.score for r in reranker.score([Pair(*p) for p in pairs])]  # noqa: E731
    return {"": run}, reranker.llm


def llm_score_way(args):
    plan = plan_for(args, args.dtype)
    on_cpu = plan.machine.is_cpu
    if on_cpu:
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm import LLM

    documented = {k: plan.engine[k] for k in ("runner", "convert", "hf_overrides", "pooler_config") if k in plan.engine}
    # 4096 tokens a prompt on both sides: the model's own 40960 would only make a larger cache necessary.
    llm = LLM(str(args.model), dtype=TORCH_DTYPE[args.dtype], max_model_len=plan.engine["max_model_len"], **documented)
    more = {"chat_template": plan.template} if plan.template else {}

    def run(pairs):
        outputs = llm.score([q for q, _ in pairs], [d for _, d in pairs], use_tqdm=False, **more)
        return [output.outputs.score for output in outputs]

    return {"": run}, llm


def transformers_way(args):
    import torch
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    from rerank_kit.models.card_prompts import INSTRUCTION, PREFIX, SUFFIX

    kind = plan_for(args, args.dtype).profile.reference
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    classes = {
        "causal_yes_no": AutoModelForCausalLM,
        "embedding": AutoModel,
        "sequence_classification": AutoModelForSequenceClassification,
    }
    network = classes[kind].from_pretrained(
        args.model, dtype=getattr(torch, TORCH_DTYPE[args.dtype]), attn_implementation="sdpa"
    )
    network = network.to(device).eval()
    pad = tokenizer.pad_token_id or 0

    def in_batches(ids, size, forward):
        """One output a prompt, in input order; batches of prompts of like length, the longest first."""
        order, out = sorted(range(len(ids)), key=lambda i: -len(ids[i])), [None] * len(ids)
        for start in range(0, len(order), size):
            part = order[start : start + size]
            width = len(ids[part[0]])
            batch = torch.tensor([ids[i] + [pad] * (width - len(ids[i])) for i in part], device=device)
            mask = torch.tensor([[1] * len(ids[i]) + [0] * (width - len(ids[i])) for i in part], device=device)
            for i, row in zip(part, forward(batch, mask), strict=True):
                out[i] = row
        return torch.stack(out)

    if kind == "causal_yes_no":
        head = network.get_output_embeddings().weight
        yes, no = tokenizer.convert_tokens_to_ids(["yes", "no"])
        direction = (head[yes] - head[no]).float()

        def forward(batch, mask):
            hidden = network.model(input_ids=batch, attention_mask=mask, use_cache=False).last_hidden_state
            last = hidden[torch.arange(len(batch), device=device), mask.sum(1) - 1]
            return torch.sigmoid(last.float() @ direction)

        def ids_of(pairs):
            texts = [f"{PREFIX}<Instruct>: {INSTRUCTION}\n<Query>: {q}\n<Document>: {d}{SUFFIX}" for q, d in pairs]
            return tokenizer(texts)["input_ids"]

        score = lambda pairs, size: in_batches(ids_of(pairs), size, forward).cpu().tolist()  # noqa: E731
    elif kind == "embedding":

        def forward(batch, mask):
            hidden = network(input_ids=batch, attention_mask=mask).last_hidden_state.float()
            return (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)

        def score(pairs, size):
            texts = list(dict.fromkeys(text for pair in pairs for text in pair))
            ids = tokenizer(texts, truncation=True, max_length=args.max_length)["input_ids"]
            where = {text: i for i, text in enumerate(texts)}
            vectors = in_batches(ids, size, forward)
            first, second = (vectors[torch.tensor([where[pair[side]] for pair in pairs])] for side in (0, 1))
            return torch.cosine_similarity(first, second).cpu().tolist()
    else:

        def forward(batch, mask):
            return torch.sigmoid(network(input_ids=batch, attention_mask=mask).logits[:, 0].float())

        def score(pairs, size):
            both = [q for q, _ in pairs], [d for _, d in pairs]
            return in_batches(tokenizer(*both)["input_ids"], size, forward).cpu().tolist()

    return with_sizes(args, score, torch.inference_mode), None


def sentence_transformers_way(args):
    import torch
    from sentence_transformers import CrossEncoder, SentenceTransformer

    plan = plan_for(args, args.dtype)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    more = {
        "device": device,
        "model_kwargs": {"dtype": getattr(torch, TORCH_DTYPE[args.dtype]), "attn_implementation": "sdpa"},
    }
    if plan.profile.reference == "embedding":
        model = SentenceTransformer(str(args.model), local_files_only=True, **more)

        def score(pairs, size):
            texts = list(dict.fromkeys(text for pair in pairs for text in pair))
            where = {text: i for i, text in enumerate(texts)}
            vectors = model.encode(texts, batch_size=size, convert_to_tensor=True, show_progress_bar=False).float()
            first, second = (vectors[torch.tensor([where[pair[side]] for pair in pairs])] for side in (0, 1))
            return torch.cosine_similarity(first, second).cpu().tolist()
    else:
        folder = args.model
        if plan.template:  # it takes the prompt from the tokenizer's chat template
            folder = Path(tempfile.mkdtemp())
            for file in args.model.iterdir():
                (folder / file.name).symlink_to(file)
            (folder / "chat_template.jinja").unlink(missing_ok=True)
            (folder / "chat_template.jinja").write_text(plan.template, "utf-8")
        model = CrossEncoder(str(folder), local_files_only=True, **more)

        def score(pairs, size):
            scores = model.predict(
                pairs,
                batch_size=size,
                show_progress_bar=False,
                activation_fn=torch.nn.Sigmoid(),
                convert_to_tensor=True,
            )
            return scores.float().cpu().tolist()

    return with_sizes(args, score, torch.inference_mode), None


def with_sizes(args, score, context):
    """{label: pairs -> scores} for every batch size."""

    def one(size):
        def run(pairs):
            with context():
                return score(pairs, size)

        return run

    return {f"batch {size}": one(size) for size in args.sizes}


def work(args) -> dict:
    """What a way's process reports: for each length the runs of its best variant, and its first scores."""
    began = time.perf_counter()
    variants, llm = globals()[f"{args.way}_way"](args)
    report = {"load_s": round(time.perf_counter() - began, 1), "lengths": {}}
    for length in args.lengths:
        pairs = [tuple(pair) for pair in json.loads((args.folder / f"{length}.json").read_text("utf-8"))]
        speeds: dict[str, list[float]] = {label: [] for label in variants}

        def timed(label, pairs=pairs, speeds=speeds):
            if llm:
                llm.reset_prefix_cache()
            start = time.perf_counter()
            scores = variants[label](pairs)
            speeds[label].append(len(pairs) / (time.perf_counter() - start))
            return scores

        for run in variants.values():
            run(pairs[: max(4, len(pairs) // 8)])  # warm-up
        for label in variants:
            scores = timed(label)
        # Every variant once; then only the best one again, since batch sizes differ by more than runs do.
        best = max(speeds, key=lambda label: speeds[label][0])
        for _ in range(args.runs - 1):
            scores = timed(best)
        report["lengths"][length] = {
            "variant": best,
            "pairs_s": statistics.median(speeds[best]),
            "pairs_s_min": min(speeds[best]),
            "pairs_s_max": max(speeds[best]),
            "runs": speeds,
            "scores": scores[:N_CHECKED],
        }
    if llm:
        llm.llm_engine.engine_core.shutdown()  # its process would outlive the os._exit() below
    return report


# --- all ways ---


def service(name: str, url: str, args, length: int) -> dict:
    """bench_rerank.py's closed loop against a running service, 32 documents a call."""
    calls: dict[str, list[str]] = {}
    for query, document in json.loads((args.folder / f"{length}.json").read_text("utf-8")):
        calls.setdefault(query, []).append(document)
    source, out = args.folder / "calls.jsonl", args.folder / "service.json"
    source.write_text("".join(json.dumps({"query": q, "documents": d}) + "\n" for q, d in calls.items()), "utf-8")
    command = [sys.executable, str(KIT / "bench_rerank.py"), "--endpoint", "rerank", "--base-url", url]
    command += ["--concurrency", args.concurrency, "--seconds", str(args.seconds), "--runs", str(args.runs)]
    subprocess.run([*command, "--input", str(source), "--json", str(out)], check=True, stdout=sys.stderr)
    rows = json.loads(out.read_text("utf-8"))["rows"]
    best = max({row["level"] for row in rows}, key=lambda n: statistics.median(speeds_at(rows, n)))
    speeds = speeds_at(rows, best)
    variant = f"{best} in flight"
    return {"variant": variant, "pairs_s": statistics.median(speeds), "runs": {variant: speeds}}


def speeds_at(rows: list[dict], level) -> list[float]:
    return [row["pairs/s"] for row in rows if row["level"] == level]


def run_way(way: str, dtype: str, model: Path, args) -> dict:
    """A way's report, or {"error": reason}."""
    out = args.folder / "report.json"
    out.unlink(missing_ok=True)
    command = [sys.executable, __file__, "--worker", way, "--dtype", dtype, "--model", str(model)]
    command += ["--folder", str(args.folder), "--out", str(out), "--runs", str(args.runs)]
    command += ["--lengths", ",".join(map(str, args.lengths)), "--batch-sizes", ",".join(map(str, args.sizes))]
    log = args.folder / "log.txt"
    with log.open("w") as file:  # not a pipe, which a process that outlives its parent would hold open
        child = subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)
        try:
            code = f"exit code {child.wait(args.timeout_s)}"
        except subprocess.TimeoutExpired:
            code = f"not done in {args.timeout_s:g} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)  # engine processes of a way that failed or was interrupted
            child.wait()
    if out.exists():
        return json.loads(out.read_text("utf-8"))
    said = log.read_text("utf-8", "replace")
    print(said[-3000:], file=sys.stderr)
    lines = [line for line in said.splitlines() if "Error" in line] or ["no message"]
    return {"error": f"{code}: {lines[-1][:200]}"}


def table(rows: list[dict]) -> str:
    """Rows as Markdown, with the ratio to transformers in the same precision."""
    base = {
        (r["model"], r["tokens"], r["dtype"]): r["pairs_s"]
        for r in rows
        if r["way"] == "transformers" and "pairs_s" in r
    }
    out = ["| model | document tokens | precision | way | pairs/s (spread) | x transformers | difference |"]
    out.append("|---|---|---|---|---|---|---|")
    for r in rows:
        start = f"| {r['model']} | {r['tokens']} | {r['dtype']} | {r['way']} {r.get('variant', '')} | "
        if "error" in r:
            out.append(f"{start}{r['error']} | | |")
            continue
        other = base.get((r["model"], r["tokens"], r["dtype"]))
        r["x_transformers"] = r["pairs_s"] / other if other else None
        ratio = f"{r['x_transformers']:.2f}" if other else "-"
        spread = f"{r['pairs_s_min']:.4g} to {r['pairs_s_max']:.4g}" if "pairs_s_min" in r else "-"
        differs = f"{r['difference']:.1e}" if r.get("difference") is not None else "-"
        out.append(f"{start}{r['pairs_s']:.4g} ({spread}) | {ratio} | {differs} |")
    return "\n".join(out)


def csv_rows(row: dict, pairs: int) -> list[results.Row]:
    """A row for each variant that ran (a batch size), for measurements/results/."""
    start = {"model": row["model"], "tokens": row["tokens"], "dtype": row["dtype"], "way": row["way"], "pairs": pairs}
    out = []
    for variant, speeds in row.get("runs", {}).items():
        spread = {"pairs_s": statistics.median(speeds), "pairs_s_min": min(speeds), "pairs_s_max": max(speeds)}
        out.append({**start, "variant": variant, "runs": len(speeds), **spread})
        if variant == row["variant"]:
            out[-1] |= {"load_s": row.get("load_s"), "difference": row.get("difference")}
    return out or [{**start, "error": row.get("error")}]


def found_version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def measure_model(model: Path, args, rows: list[dict]) -> None:
    """Append this model's rows; prints the table so far to stderr after every way, so an interrupt loses little."""
    before = len(rows)
    for length in args.lengths:
        pairs = make_pairs(model / "tokenizer.json", args.pairs, length, args.docs, seed=length)
        (args.folder / f"{length}.json").write_text(json.dumps(pairs), "utf-8")
    for dtype in args.dtypes:
        for way in args.ways:
            print(f"[{time.strftime('%H:%M:%S')}] {model.name} {dtype} {way}", file=sys.stderr, flush=True)
            report = run_way(way, dtype, model, args)
            for length in args.lengths:
                row = {"model": model.name, "tokens": length, "dtype": dtype, "way": way}
                found = {"error": report["error"]} if "error" in report else report["lengths"][str(length)]
                rows.append({**row, "load_s": report.get("load_s"), **found})
            print(table(rows), file=sys.stderr, flush=True)
    # The reference: transformers in float32 where it ran, else in the first precision.
    for row in rows[before:]:
        for dtype in ("float32", *args.dtypes):
            key = (row["tokens"], dtype, "transformers")
            same = [r for r in rows[before:] if (r["tokens"], r["dtype"], r["way"]) == key and "scores" in r]
            if same and "scores" in row:
                pairs = zip(row["scores"], same[0]["scores"], strict=True)
                row["difference"] = max(abs(a - b) for a, b in pairs)
                break


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", type=Path, action="append", required=True, help="checkpoint folder; several are measured in turn")
    add("--ways", default=",".join(WAYS))
    add("--dtypes", help="precisions, of bf16,float32; default: bf16 on a GPU; on a CPU both, if it has bf16")
    add("--lengths", help="tokens a document; default 128,512 on a GPU, 128 on a CPU")
    add("--pairs", type=int, help="pairs a run; default 4096 on a GPU, 64 on a CPU")
    add("--docs", type=int, default=32, help="documents a query")
    add("--runs", type=int, default=3)
    add("--batch-sizes", help="of transformers and sentence-transformers; default 64,128,256 or 1,8,32 on a CPU")
    add(
        "--service", action="append", default=[], metavar="NAME=URL", help="a running service, e.g. with /v1 at its end"
    )
    add("--concurrency", default="16,64", help="calls in flight for --service")
    add("--seconds", type=float, default=8, help="a level for --service")
    add("--timeout-s", type=float, default=900, help="longest time of one way")
    add("--csv", type=Path, help="write the rows here too, as in measurements/results/")
    for name in ("--worker", "--dtype", "--folder", "--out"):  # of the processes of this program
        add(name, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.ways = [way for way in args.ways.split(",") if way]
    if unknown := set(args.ways) - set(WAYS):
        parser.error(f"--ways {','.join(sorted(unknown))}: choose from {','.join(WAYS)}")
    return args


def defaults(args) -> None:
    """Fill in what was not given, by machine."""
    from rerank_kit.benchmark.server_view import hardware
    from rerank_kit.engine.machine import cpu_has_bf16, probe_machine

    machine = probe_machine()
    gpu = not machine.is_cpu
    args.dtypes = (args.dtypes or ("bf16" if gpu else "bf16,float32" if cpu_has_bf16() else "float32")).split(",")
    args.lengths = [int(n) for n in (args.lengths or ("128,512" if gpu else "128")).split(",")]
    args.sizes = [int(n) for n in (args.batch_sizes or ("64,128,256" if gpu else "1,8,32")).split(",")]
    args.pairs = args.pairs or (4096 if gpu else 64)
    args.about = {"command": shlex.join(["python", "measurements/peers.py", *sys.argv[1:]]), "hardware": hardware()}
    args.about |= {"cores": len(machine.cores), "vllm": machine.vllm_version}
    args.about |= {
        name: found_version(name) for name in ("torch", "transformers", "sentence-transformers", "fastokens")
    }


def main() -> int:
    args = parse()
    if args.worker:
        args.way, args.model, args.folder = args.worker, args.model[0], Path(args.folder)
        args.lengths = [int(n) for n in args.lengths.split(",")]
        args.sizes = [int(n) for n in args.batch_sizes.split(",")]
        args.max_length = plan_for(args, args.dtype).engine["max_model_len"]
        report = work(args)
        Path(args.out).write_text(json.dumps(report), "utf-8")
        return 0
    defaults(args)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the running way is also ended
    args.folder = Path(tempfile.mkdtemp(prefix="peers-"))
    rows = []
    try:
        for model in args.model:
            measure_model(model.resolve(), args, rows)
        for name, url in (item.split("=", 1) for item in args.service):
            for length in args.lengths:
                row = {"model": args.model[-1].name, "tokens": length, "dtype": "service", "way": name}
                try:
                    rows.append({**row, **service(name, url, args, length)})
                except (OSError, ValueError, subprocess.CalledProcessError) as exc:
                    rows.append({**row, "error": str(exc)[:200]})
    finally:
        shutil.rmtree(args.folder)
    text = table(rows)
    if args.csv:
        head = {"date": time.strftime("%Y-%m-%d"), **args.about, "documents_per_query": args.docs}
        results.write(args.csv, head, [row for one in rows for row in csv_rows(one, args.pairs)])
    print(text)
    return 0 if all("error" not in row for row in rows) else 1


if __name__ == "__main__":  # vLLM's workers import this file again
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # vLLM 0.26's teardown can abort after all work is done

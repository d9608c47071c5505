"""Score a folder of shards as a Ray Data pipeline: one OfflineReranker per actor, one actor per TP GPUs.

python deploy/ray_bulk_score.py --input FOLDER --output FOLDER                        Ray on this machine
python deploy/ray_bulk_score.py --input FOLDER --output FOLDER --address HOST:6379    a Ray cluster

Shards and outputs are those of `vllm_usage.py --input FOLDER`, line for line, and either program continues where an
earlier run of the two stopped. On a cluster every node sees this folder of scripts, the model and both folders at the
same paths. Needs `pip install "ray[data]"` beside vLLM; see docs/bulk.md.
"""

import argparse
import os
import sys
import time
from pathlib import Path

KIT = Path(__file__).resolve().parents[1]


class ShardScorer:
    """An actor: loads the model once, then scores one shard a call."""

    def __init__(self, kit: str, model: str | None):
        sys.path.insert(0, kit)
        # vLLM's own processes find the kit's modules too.
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [kit, os.environ.get("PYTHONPATH")]))
        from rerank_kit.engine.plan import plan_engine
        from rerank_kit.offline.reranker import OfflineReranker
        from rerank_kit.settings import get_config, passed_on_env

        os.environ.update(passed_on_env())  # HF_*, VLLM_* ... of .env; the environment's own are not among them
        # Planned here, not by the driver: Ray has just given this actor its GPUs by CUDA_VISIBLE_DEVICES.
        self.reranker = OfflineReranker(plan_engine(get_config(), model))

    def __call__(self, batch: dict) -> dict:
        import numpy

        from rerank_kit.offline.files import find_shard, score_shards
        from rerank_kit.settings import ConfigError

        scored, failed, broken, times = [], [], [], []
        for source, output in zip(batch["source"], batch["output"], strict=True):
            good, bad, began = 0, 0, time.time()
            wrong: list[str] = []
            try:
                shard = find_shard(Path(source), Path(output))
                bad = shard.failed
                if not shard.done:
                    good, more, wrong = score_shards(self.reranker, [shard])
                    bad += more
            except ConfigError as exc:
                wrong = [str(exc)]
            scored.append(good)
            failed.append(bad)
            broken.append("; ".join(wrong))
            times.append((began, time.time()))
        counts = {"scored": numpy.array(scored), "failed": numpy.array(failed)}
        began, ended = numpy.array(times).T
        return {**counts, "broken": numpy.array(broken, object), "began": began, "ended": ended}


def n_actors(resources: dict, tp: int, asked: int | None) -> int:
    """Number of actors that the cluster has GPUs for; 1 without GPUs."""
    return asked or max(1, int(resources.get("GPU", 0)) // tp)


def actor_settings(fields: dict) -> dict[str, str]:
    """Settings of this shell for the actors, which read those of .env themselves. Ray shows them, so no secrets."""
    names = [name for name, field in fields.items() if not field.metadata["secret"] and name != "CUDA_VISIBLE_DEVICES"]
    return {name: os.environ[name] for name in (*names, "KIT_ENV_FILE") if name in os.environ}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--input", type=Path, required=True, metavar="FOLDER", help="of *.jsonl, *.csv, *.tsv, *.parquet"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--model", help="folder or hub id; default: the configured one")
    parser.add_argument("--address", help="Ray cluster (HOST:6379, ray://..., auto); default: Ray on this machine")
    parser.add_argument("--actors", type=int, help="default: GPUs of the cluster / TP, or 1 without GPUs")
    args = parser.parse_args()
    sys.path.insert(0, str(KIT))
    from rerank_kit.offline.files import shard_files
    from rerank_kit.settings import FIELDS, ConfigError, get_config

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        cfg = get_config()
        if not args.input.is_dir():
            raise ConfigError(f"--input {args.input} is no folder")
        shards = shard_files(args.input.resolve(), args.output.resolve())
        try:
            import ray
            import ray.data
        except ImportError as exc:
            raise ConfigError(f'ray is not installed for this Python ({exc}): pip install "ray[data]"') from None
    except ConfigError as exc:
        print(f"ConfigError: {exc}", file=sys.stderr)
        return 6
    local = {} if args.address else {"include_dashboard": False}
    env_vars = actor_settings(FIELDS)
    ray.init(address=args.address or "local", runtime_env={"env_vars": env_vars}, log_to_driver=True, **local)
    resources = ray.cluster_resources()
    size = min(n_actors(resources, cfg.tp, args.actors), len(shards))
    rows = [{"source": str(source), "output": str(output)} for source, output in shards]
    done = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        ShardScorer,
        fn_constructor_args=(str(KIT), args.model),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=size, max_tasks_in_flight_per_actor=1),
        num_gpus=cfg.tp if resources.get("GPU") else 0,
        num_cpus=1,
    )
    results = done.take_all()
    ray.shutdown()
    wall = max(r["ended"] for r in results) - min(r["began"] for r in results)  # without loading
    scored, failed = (sum(int(r[name]) for r in results) for name in ("scored", "failed"))
    broken = [r["broken"] for r in results if r["broken"]]
    for reason in broken:
        print(f"[WARN] {reason}", file=sys.stderr)
    print(
        f"{scored} scored ({scored / wall:.0f} pairs/s, {size} actors), {failed} without a score, "
        f"{len(broken)} of {len(shards)} files not done -> {args.output}"
    )
    return 1 if failed or broken else 0


if __name__ == "__main__":  # vLLM's workers import this file again
    sys.exit(main())

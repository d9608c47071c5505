"""The settings that --tune can change, their steps, and how each is written to the environment."""

import dataclasses
import math
import shlex
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from rerank_kit.engine.extra_args import find_flag
from rerank_kit.settings import FIELDS, EnvConfig


@dataclasses.dataclass(frozen=True)
class Knob:
    """One tunable setting: the values it changes, the factor (or the choices), and the limits."""

    name: str
    keys: tuple[str, ...]
    factor: float = 2.0
    low: float | tuple[float, ...] = 1  # one for all keys, or one each
    high: float = math.inf
    choices: tuple[tuple, ...] = ()  # in place of steps: values for all keys

    def path(self, values: dict, up: bool) -> Iterator[dict]:
        """The settings that this knob leads to from `values`, the nearest first."""
        if self.choices:
            now = tuple(values[key] for key in self.keys)
            yield from (values | dict(zip(self.keys, one, strict=True)) for one in self.choices if up and one != now)
            return
        while True:
            step = self.factor if up else 1 / self.factor
            moved = {key: values[key] * step for key in self.keys}
            moved = {key: round(v, 2) if isinstance(values[key], float) else int(v) for key, v in moved.items()}
            lows = self.low if isinstance(self.low, tuple) else (self.low,) * len(self.keys)
            if any(
                not low <= moved[k] <= self.high or moved[k] == values[k]
                for k, low in zip(self.keys, lows, strict=True)
            ):
                return
            values = values | moved
            yield values


# The knobs that a verdict (report.verdict) points to.
FIRST = {
    "cpu": ("API_SERVER_COUNT", "RENDERER_WORKERS", "ENGINES_PER_GPU"),
    "engine": ("ENGINES_PER_GPU", "STEP", "MAX_NUM_BATCHED_TOKENS", "MAX_NUM_SEQS"),
    "gpu": ("TP_DP", "STEP", "MAX_NUM_BATCHED_TOKENS"),
}
NAMES = (
    "ENGINES_PER_GPU",
    "API_SERVER_COUNT",
    "RENDERER_WORKERS",
    "STEP",
    "MAX_NUM_BATCHED_TOKENS",
    "MAX_NUM_SEQS",
    "TP_DP",
    "GPU_MEMORY_UTILIZATION",
)


def flag(words: list[str], name: str, default=None):
    """Value of a flag of `vllm serve`, the last one given, as number."""
    value = default
    for word, after in zip(words, [*words[1:], ""], strict=False):
        if word == name or word.startswith(f"{name}="):
            value = after if word == name else word.partition("=")[2]
    return value if value is None or isinstance(value, int | float) else float(value) if "." in value else int(value)


def has_renderer_workers() -> bool:
    """The installed vLLM knows --renderer-num-workers; read from its source, as importing it takes many seconds."""
    spec = find_spec("vllm")
    source = Path(spec.origin).parent / "engine" / "arg_utils.py" if spec and spec.origin else None
    return bool(source and source.exists() and "--renderer-num-workers" in source.read_text("utf-8"))


def knobs_of(shown: dict, cfg: EnvConfig, only: list[str] | None = None) -> tuple[dict, list[Knob]]:
    """(values in force, knobs that can be changed here) from read_cfg() and the configuration; only: names to keep."""
    words = shown["words"]
    on_gpu = not shown["vllm"].endswith("+cpu")
    now = {
        "MAX_NUM_BATCHED_TOKENS": flag(words, "--max-num-batched-tokens"),
        "MAX_NUM_SEQS": flag(words, "--max-num-seqs"),
        "API_SERVER_COUNT": flag(words, "--api-server-count", cfg.dp),
        "RENDERER_WORKERS": flag(words, "--renderer-num-workers", 1),
        # The kit shares it out over the engines of a GPU.
        "GPU_MEMORY_UTILIZATION": round(shown["engines"] * float(flag(words, "--gpu-memory-utilization", 0) or 0), 2),
        "TP": cfg.tp,
        "DP": cfg.dp,
    }
    longest = flag(words, "--max-model-len", 1)
    knobs = [
        Knob("API_SERVER_COUNT", ("API_SERVER_COUNT",), high=max(shown["cores"], now["API_SERVER_COUNT"])),
        Knob("STEP", ("MAX_NUM_BATCHED_TOKENS", "MAX_NUM_SEQS"), low=(longest, 8), high=262144),
        Knob("MAX_NUM_BATCHED_TOKENS", ("MAX_NUM_BATCHED_TOKENS",), low=longest, high=262144),
        Knob("MAX_NUM_SEQS", ("MAX_NUM_SEQS",), high=4096),
    ]
    if has_renderer_workers():
        knobs.append(Knob("RENDERER_WORKERS", ("RENDERER_WORKERS",), high=8))
    if on_gpu:
        knobs.append(Knob("GPU_MEMORY_UTILIZATION", ("GPU_MEMORY_UTILIZATION",), factor=1.08, low=0.5, high=0.95))
        # CUDA_VISIBLE_DEVICES must have TP x DP GPUs; where it is not set, the kit takes the first ones of the host.
        reach = {cfg.tp * cfg.dp, shown["gpus"] if cfg.cuda_visible_devices is None else cfg.tp * cfg.dp}
        layouts = [(tp, n // tp) for n in sorted(reach) for tp in (1, 2, 4, 8) if n % tp == 0]
        knobs.append(Knob("TP_DP", ("TP", "DP"), choices=tuple(layouts)))
        if "ENGINES_PER_GPU" in FIELDS:
            now["ENGINES_PER_GPU"] = shown["engines"]
            knobs.append(Knob("ENGINES_PER_GPU", ("ENGINES_PER_GPU",), high=4))
    knobs = [k for k in sorted(knobs, key=lambda k: NAMES.index(k.name)) if not only or k.name in only]
    # Steps need a start, so a setting with an unknown present value is left out.
    return now, [k for k in knobs if k.choices or all(now[key] for key in k.keys)]


def settings_of(values: dict, start: dict, extra_args: str) -> dict[str, str]:
    """The environment (and the lines of .env) for `values`: what differs from the present ones."""
    out = {key: f"{v:g}" if isinstance(v, float) else str(v) for key, v in values.items() if v != start[key]}
    if (workers := out.pop("RENDERER_WORKERS", None)) is not None:
        words, kept = shlex.split(extra_args), []
        while words:
            word = words.pop(0)
            if not find_flag(shlex.quote(word), "--renderer-num-workers"):
                kept.append(word)
            elif "=" not in word:
                words = words[1:]
        out["EXTRA_ARGS"] = shlex.join([*kept, "--renderer-num-workers", workers])
    if "TP" in out or "DP" in out:
        out |= {"TP": str(values["TP"]), "DP": str(values["DP"])}
    return out


def label_of(values: dict, start: dict) -> str:
    """`MAX_NUM_SEQS=256 TP=2`; `present settings` where nothing differs."""
    out = [f"{key}={v:g}" for key, v in values.items() if v != start[key]]
    return " ".join(out) or "present settings"

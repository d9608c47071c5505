"""Finds better settings for the service of this host by restarting it (--tune).

The search changes one setting at a time, by factors of two while throughput grows (coordinate search). It begins with
the settings that the verdict on the present ones points to. A restart takes most of the time, so a candidate that is
clearly worse is dropped after one window, and close ones get more. A search also picks winners by luck, so time is
kept for a proof, which measures the best and the present settings in turns, with a new start each turn.

Guarantees:
- Every start and stop goes through start_rerank.sh. Candidates are set in the environment; .env is never written.
- The service is put back as it was found, also after Ctrl-C and after candidates that do not start.
- Settings that change the scores by more than the tolerance are rejected.
- LOG_DIR/tune-PORT.json holds the measurements after each step, and the same command continues from there.
"""

import argparse
import asyncio
import re
import signal
import statistics
import time
from typing import Any

from rerank_kit.benchmark.compare import difference
from rerank_kit.benchmark.knobs import FIRST, NAMES, Knob, knobs_of, label_of, settings_of
from rerank_kit.benchmark.load import Bench, say
from rerank_kit.benchmark.meter import Meter
from rerank_kit.benchmark.report import calls_of
from rerank_kit.benchmark.rows import Interrupted
from rerank_kit.benchmark.searches import MOST_PROBES, highest_rate
from rerank_kit.benchmark.service import Service, Trouble, look_at, only_search, refuse_traffic
from rerank_kit.benchmark.tune_state import load_any, load_state, same_search, save_state
from rerank_kit.settings import EnvConfig, get_config

MOST_WINDOWS = 4  # of one candidate
LEAST_GAIN, CLEAR_GAIN = 0.02, 0.06  # a candidate needs at least the first to be kept
BAD = ("no start", "scores", "failed")
CLEAR_LOSS = 0.9  # a step that gave this share or less is not tried again beside other settings
TURNS = (2, 3, 5)  # least, planned, most turns a side of the proof
TOLERANCE = 0.02  # of scores in half precision, which is not batch-invariant (docs/scores.md)
OTHER_PAIRS = 8  # the supervisor scores one pair every 10 s


# --- the search ---


class Tuner:
    """The search and its proof. service: anything that starts; meter: anything that measures.

    `state` holds all results and is saved after each step. A resumed search replays its path on these results.
    """

    def __init__(
        self, service: Any, meter: Any, start: dict, knobs: list[Knob], *, extra_args="", slo=False, budget_s=1800.0
    ):
        self.service, self.meter, self.start, self.knobs = service, meter, start, knobs
        self.extra_args, self.slo, self.budget_s = extra_args, slo, budget_s
        self.unit = "calls/s within the SLO" if slo else "pairs/s"
        self.tolerance, self.clock, self.save = TOLERANCE, time.monotonic, lambda: None
        self.state: dict[str, Any] = {"tried": [], "turns": [], "spent_s": 0.0, "scores": None, "unit": self.unit}
        self.seen: list[dict] = []  # settings of this search's path so far
        self.running: dict | None = None  # settings of the service that runs now
        self.began: float | None = None

    # - time -

    def spent_s(self) -> float:
        return self.state["spent_s"] + (self.clock() - self.began if self.began is not None else 0.0)

    def cost_s(self) -> float:
        """Expected seconds of one candidate: a start and its windows."""
        tried = [t for t in self.state["tried"] if t["restart_s"] and t["values"]]
        if not tried:
            return 60.0
        return max(statistics.mean(t["restart_s"] + t["measure_s"] for t in tried), 1e-9)

    def room(self) -> bool:
        """One more candidate, and the proof after it, fit into the budget."""
        return self.spent_s() + self.cost_s() * (1 + 2 * TURNS[1]) <= self.budget_s

    # - one candidate -

    async def started(self, values: dict) -> tuple[float, str | None]:
        """(seconds of the restart, why it did not start); 0 s for settings that run already."""
        began = self.clock()
        if self.running == values:
            return 0.0, None
        self.running = None
        settings = settings_of(values, self.start, self.extra_args)
        # No restart of a candidate that dies under load, since the death is its result.
        wrong = await self.service.start(settings | ({"RESTART": "no"} if settings else {}))
        if not wrong:
            self.running = values
            self.state["mine"] = await self.service.leader()
            self.save()
        return self.clock() - began, wrong

    async def parity(self) -> tuple[float, str | None]:
        """(largest difference to the scores of the present settings, what is wrong)."""
        scores = await self.meter.scores()
        if self.state["scores"] is None:
            self.state["scores"] = scores
            return 0.0, None
        scale = max(1.0, max(map(abs, self.state["scores"])))
        worst = max(abs(a - b) for a, b in zip(scores, self.state["scores"], strict=True)) / scale
        wrong = f"scores differ by up to {worst:.2g}, tolerance {self.tolerance:g}"
        return worst, wrong if worst > self.tolerance else None

    async def measure(self, values: dict, best: dict | None) -> dict:
        """Start and judge one candidate. Its record has the result and the cost."""
        label = label_of(values, self.start)
        out: dict[str, Any] = {
            "settings": values,
            "label": label,
            "values": [],
            "outcome": "",
            "why": "",
            "measure_s": 0.0,
        }
        out |= {"score_difference": None, "bound": None, "p95_ms": None}
        out["restart_s"], wrong = await self.started(values)
        began = self.clock()
        if wrong:
            out |= {"outcome": "no start", "why": wrong}
        else:
            try:
                await self.meter.ready()
                before, ours = await self.meter.served(), self.meter.bench.answered
                out["score_difference"], wrong = await self.parity()
                if wrong:
                    out |= {"outcome": "scores", "why": wrong}
                else:
                    await (self.judge_rate if self.slo else self.judge)(out, best)
                await self.others(before, ours)
            except RuntimeError as exc:
                self.running = None  # it may be dead, so the next candidate needs a start
                out |= {"outcome": "failed", "why": str(exc)}
        out["measure_s"] = self.clock() - began
        self.state["tried"].append(out)
        self.note(out, best)
        self.save()
        return out

    async def others(self, before: float | None, ours: int) -> None:
        """Raise Trouble when the server answered more pairs than we sent."""
        after, sent = await self.meter.served(), self.meter.bench.answered - ours
        if before is not None and after is not None and after - before > 1.02 * sent + OTHER_PAIRS:
            came = after - before - sent
            raise Trouble(f"others use the service ({came:.0f} pairs came from outside this search): search ended")

    async def judge(self, out: dict, best: dict | None) -> None:
        """Windows of load until it is clear whether they are better than the best's."""
        values = out["values"]
        known = best["values"] if best else []
        # Relative spread of equal windows; a difference of three times that is not chance.
        noise = max(0.02, 3 * statistics.stdev(known) / statistics.mean(known)) if len(known) > 1 else 0.02
        for _ in range(MOST_WINDOWS if best else MOST_WINDOWS - 1):
            row = await self.meter.window(out["label"])
            if not row or not row["ok"]:
                raise RuntimeError(f"no call succeeded under load: {row and row['errors']}")
            lost = 1 - row["ok"] / calls_of(row)
            if lost > 0.01 and best:
                out |= {"outcome": "failed", "why": f"{lost:.0%} of the calls were refused or failed"}
                return
            values.append(row["pairs/s"])
            out |= {"bound": row["bound"], "p95_ms": row["p95_ms"], "lost": lost}
            if not best:
                continue
            ratio = statistics.mean(values) / statistics.mean(known)
            if ratio < 1 - max(0.03, noise) or (len(values) > 2 and ratio <= 1):
                out["outcome"] = "worse"
                return
            found = difference(known, values)
            # A small gain is tested once, after all windows; testing after each would find chance more often.
            enough = 1 + (CLEAR_GAIN if len(values) < MOST_WINDOWS else LEAST_GAIN)
            if found and found[0] > found[1] and ratio > enough:
                out["outcome"] = "better"
                return
        out["outcome"] = "close" if best else "start"

    async def judge_rate(self, out: dict, best: dict | None) -> None:
        """The highest rate within the SLO; one window is enough for settings that do not hold more than the best."""
        held = self.meter.held(out["label"])
        if best:
            rate = float(f"{1.1 * best['values'][0]:.3g}")  # a search ends 10 % apart
            if not await held(rate):
                out |= {"outcome": "worse", "why": f"{rate:g} calls/s did not hold"}
                return
        else:
            row = await self.meter.window(out["label"])
            if not row or not row["req/s"]:
                raise RuntimeError("no call succeeded under load")
            out["bound"], rate = row["bound"], 0.7 * row["req/s"]
        low, _, _ = await highest_rate(held, float(f"{rate:.3g}"), MOST_PROBES // 2)
        if not low:
            raise RuntimeError(f"the SLO did not hold even at {rate / 64:.2g} calls/s")
        out["values"] = [low]
        better = best and low >= 1.05 * best["values"][0]
        out["outcome"] = "start" if not best else "better" if better else "close"

    def note(self, out: dict, best: dict | None) -> None:
        """One line for one candidate, with its cost."""
        n, cost = len(self.state["tried"]), f"start {out['restart_s']:.0f} s, measuring {out['measure_s']:.0f} s"
        said = out["why"] or out["outcome"]
        if out["values"]:
            mean = statistics.mean(out["values"])
            change = (
                f" ({100 * (mean / statistics.mean(best['values']) - 1):+.1f} % of the best so far)" if best else ""
            )
            said = f"{mean:.4g} {self.unit}{change}: {out['outcome']}" + (f", {out['why']}" if out["why"] else "")
        words = {"scores": "REJECTED, ", "no start": "did not start: ", "failed": "failed: "}
        print(f"# {n}. {out['label']}: {words.get(out['outcome'], '')}{said} [{cost}]", flush=True)

    # - all of it -

    async def search(self) -> dict:
        """The best record. Raises Trouble when not even the present settings can be measured."""
        best = await self.visit(self.start, None)
        if best["outcome"] != "start":
            raise Trouble(f"the present settings cannot be measured: {best['why']}")
        first = FIRST.get(best["bound"], ())
        knobs = sorted(self.knobs, key=lambda k: first.index(k.name) if k.name in first else len(first))
        gained, lost = True, set()
        while gained:
            gained = False
            for knob in knobs:
                for up in (True, False):
                    begin = best
                    for values in knob.path(begin["settings"], up):
                        step = (knob.name, *(best["settings"][k] for k in knob.keys), *(values[k] for k in knob.keys))
                        if values in self.seen or step in lost:
                            if knob.choices:
                                continue
                            break
                        known = any(t["settings"] == values for t in self.state["tried"])
                        if not known and not self.room():
                            self.state["ended"] = "the budget ran out"
                            return best
                        found = await self.visit(values, best)
                        if found["outcome"] == "better":
                            best, gained = found, True
                            continue
                        made = statistics.mean(found["values"] or best["values"]) / statistics.mean(best["values"])
                        if made <= CLEAR_LOSS or found["outcome"] in BAD:
                            lost.add(step)
                        if not knob.choices:
                            break
                    if best is not begin:
                        break
        self.state["ended"] = "no further step improves the result"
        return best

    async def visit(self, values: dict, best: dict | None) -> dict:
        self.seen.append(values)
        for found in self.state["tried"]:
            if found["settings"] == values:
                return found
        return await self.measure(values, best)

    async def prove(self, best: dict) -> None:
        """The best and the present settings in turns, each turn a start of its own; the last one is the present's."""
        turns, first = self.state["turns"], self.state["tried"][0]
        if "n_turns" not in self.state:
            fit = int((self.budget_s - self.spent_s()) / (2 * self.cost_s()))
            self.state["n_turns"] = min(max(fit, TURNS[0]), TURNS[2])
        pairs = [("best", "present") if (self.state["n_turns"] - i) % 2 else ("present", "best") for i in range(99)]
        order = [side for pair in pairs[: self.state["n_turns"]] for side in pair]
        for side in order[len(turns) :]:
            record = best if side == "best" else first
            self.running = None
            restart_s, wrong = await self.started(record["settings"])
            if wrong:
                raise Trouble(f"{record['label']} started before but does not start now: {wrong}")
            began = self.clock()
            await self.meter.ready()
            before, ours = await self.meter.served(), self.meter.bench.answered
            worst, wrong = await self.parity()
            if wrong:
                raise Trouble(f"{record['label']}: {wrong}, which did not happen before")
            label = f"turn {len(turns) // 2 + 1}: {record['label']}"
            if self.slo:
                value, _, _ = await highest_rate(self.meter.held(label), record["values"][0], MOST_PROBES // 2)
            else:
                made = [await self.meter.window(label) for _ in range(2)]
                value = statistics.mean(row["pairs/s"] for row in made)
            await self.others(before, ours)
            turns.append({"side": side, "value": value, "score_difference": worst, "restart_s": restart_s})
            turns[-1]["measure_s"] = self.clock() - began
            print(f"# {label}: {value:.4g} {self.unit} [start {restart_s:.0f} s]", flush=True)
            self.save()

    def result(self, best: dict) -> list[str]:
        """What came out, in sentences; sets state["gain"] = (percent, half its interval, is it sure)."""
        tried, out = self.state["tried"], []
        counts = {what: sum(t["outcome"] == what for t in tried) for what in BAD}
        bad = ", ".join(f"{n} {what}" for what, n in counts.items() if n)
        head = f"{len(tried)} settings tried" + (f" ({bad})" if bad else "")
        took = f"{len(self.state['turns'])} turns in {self.spent_s() / 60:.1f} min"
        out.append(f"tune: {head}, {took}: {self.state['ended']}")
        sides = {s: [t["value"] for t in self.state["turns"] if t["side"] == s] for s in ("present", "best")}
        if not sides["best"]:
            self.state["gain"] = (0.0, None, False)
            if len(tried) == 1:
                need = self.spent_s() + self.cost_s() * (1 + 2 * TURNS[1])
                return [*out, f"tune: nothing was tried: a candidate and its proof need about {need:.0f} s (--budget)"]
            return [*out, "tune: no measurable gain: no candidate was better, so keep the present settings"]
        if not all(map(statistics.mean, sides.values())):
            self.state["gain"] = (0.0, None, False)
            return [*out, "tune: no rate held the SLO in the proof: use a larger SLO or longer windows (--seconds)"]
        found = difference(sides["present"], sides["best"])
        assert found is not None, "the proof has two turns or more for each side"
        change, half = found
        percent = 100 / statistics.mean(sides["present"])
        self.state["gain"] = (change * percent, half * percent, change > half)
        n = len(sides["best"])
        text = f"{statistics.mean(sides['present']):.4g} -> {statistics.mean(sides['best']):.4g} {self.unit}"
        text += f", {change * percent:+.1f} +- {half * percent:.1f} % (95 %, {n} turns each, a start each)"
        if change <= half:
            return [*out, f"tune: no measurable gain, keep the present settings: {best['label']}: {text}"]
        worst = max(t["score_difference"] for t in self.state["turns"] if t["side"] == "best")
        out.append(f"tune: {best['label']}: {text}")
        before, after = (r["settings"]["TP"] * r["settings"]["DP"] for r in (tried[0], best))
        if before != after:
            factor = statistics.mean(sides["best"]) / statistics.mean(sides["present"])
            each = f"{factor * before / after:.0%} of it for each GPU"
            out.append(f"tune: {before} -> {after} GPUs: {factor:.2f} times the throughput, {each}")
        out.append(f"tune: scores differ from the present ones by {worst:.2g} at most (tolerance {self.tolerance:g})")
        lines = [f"{k}={v}" for k, v in settings_of(best["settings"], self.start, self.extra_args).items()]
        return [*out, "tune: put into .env:", *lines]

    async def run(self) -> list[str]:
        """Search, prove, and say what came out."""
        self.began = self.clock()
        try:
            best = await self.search()
            if best["settings"] != self.start:
                await self.prove(best)
            return self.result(best)
        finally:
            self.state["spent_s"], self.began = self.spent_s(), None
            self.save()


# --- the program ---


def knob_names(text: str) -> list[str]:
    """argparse type of --tune: names of knobs with commas."""
    names = text.split(",")
    if wrong := [name for name in names if name not in NAMES]:
        raise argparse.ArgumentTypeError(f"{wrong[0]!r} cannot be tuned; choose from: {', '.join(NAMES)}")
    return names


def budget(text: str) -> float:
    """argparse type: `90s`, `30m` or `2h` as seconds."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text)
    if not found or not float(found[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is not a time: write 30m (s, m or h)")
    return float(found[1]) * {"s": 1, "m": 60, "h": 3600}[found[2]]


class Session:
    """One run of --tune. It records the service as found, so that it can always be put back."""

    def __init__(self, args: argparse.Namespace, cfg: EnvConfig, begin):
        self.args, self.cfg, self.begin = args, cfg, begin
        self.service, self.touched = Service(cfg), False
        self.tuner: Tuner | None = None
        self.path = cfg.log_path / f"tune-{cfg.port}.json"

    async def run(self) -> int:
        """Prepare, search, report. Raises Trouble; Interrupted or CancelledError after a signal."""
        task, loop = asyncio.current_task(), asyncio.get_running_loop()
        assert task is not None  # a coroutine of asyncio.run() is a task
        for number in (signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, task.cancel)
        args, cfg = self.args, self.cfg
        if args.base_url != cfg.service_url:
            raise Trouble(f"--tune restarts the service of this host at {cfg.service_url}, not {args.base_url}")
        shown = await self.service.shown()
        start, knobs = knobs_of(shown, cfg, args.tune)
        if not knobs:
            raise Trouble("none of these settings can be tuned here: see --tune in docs/benchmarking.md")
        key = same_search(args, shown, start, knobs)
        known = load_state(self.path, key)
        # A killed search with other arguments may also have left its candidate running.
        old = load_any(self.path)
        left = old.get("mine")
        running = await look_at(self.service, shown, left)
        tuner = Tuner(
            self.service, None, start, knobs, extra_args=cfg.extra_args, slo=bool(args.slo), budget_s=args.budget
        )
        tuner.tolerance = args.score_tolerance
        if known:
            n = len(known["tried"])
            say(f"[INFO] resuming the search in {self.path}, {n} settings measured; delete that file to start over")
            tuner.state = known
            if not left:  # nothing of that search runs, so the service's present state counts
                tuner.state["was_running"] = running
        else:
            tuner.state |= {"key": key, "done": False, "mine": None}
            tuner.state["was_running"] = old["was_running"] if left else running
        tuner.save = lambda: save_state(self.path, tuner.state)
        # As the script starts it; a service left by a killed search has a candidate's settings.
        tuner.running = start if running and not left else None
        async with Bench(args.base_url, args.model, None, cfg.api_key, args.timeout_s, cfg.connect_timeout_s) as bench:
            if tuner.running:
                await refuse_traffic(cfg, shown["engines"] * cfg.dp)
            self.tuner, self.touched = tuner, True
            if not tuner.running:
                say("starting the present settings")
                _, wrong = await tuner.started(start)
                if wrong:
                    raise Trouble(f"the present settings do not start: {wrong}")
            rows = await self.begin(args, bench)
            rows.about["tune"] = tuner.state
            tuner.meter = Meter(args, rows, bench, cfg)
            names = ", ".join(k.name for k in knobs)
            print(
                f"# tune: {names}; budget {args.budget / 60:g} min; scores may differ by {tuner.tolerance:g}",
                flush=True,
            )
            findings = await tuner.run()
            tuner.state["done"] = True
            tuner.save()
            rows.about["findings"] += findings
            for text in findings:
                print(f"# {text}" if text.startswith("tune: ") else text)
            rows.write()
        return 0

    def put_back(self) -> str | None:
        """Leave the service as it was found. None = done, else what went wrong."""
        tuner, wrong = self.tuner, None
        assert tuner is not None  # touched is set with it
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, lambda *_: say("[INFO] please wait: the service is being put back as it was"))
        if not tuner.state["was_running"]:
            say("[INFO] the service did not run before: stopping it")
            asyncio.run(self.service.stop())
        elif tuner.running != tuner.start:
            say("[INFO] starting the service with its own settings again")
            if wrong := asyncio.run(self.service.start({})):
                wrong = f"the service could not be put back: {wrong}: run sh start_rerank.sh start"
        tuner.state["mine"] = None
        tuner.save()
        return wrong


def tune(args: argparse.Namespace, begin) -> int:
    """Search for better settings. 0 done, 1 it could not, 130 interrupted.

    Args:
        begin: async function (args, bench) -> Rows: asks the server that runs and prints the header.
    """
    cfg = get_config()
    try:
        with only_search(cfg):
            return _search(Session(args, cfg, begin))
    except (Trouble, OSError) as exc:
        say(f"[ERR] {exc}")
        return 1


def _search(session: Session) -> int:
    code = 1
    try:
        code = asyncio.run(session.run())
    except (Trouble, RuntimeError, ValueError, OSError) as exc:
        say(f"[ERR] {exc}")
    except (Interrupted, KeyboardInterrupt, asyncio.CancelledError):
        say(f"[INFO] interrupted; the same command goes on from {session.path}")
        code = 130
    finally:
        if session.touched and (wrong := session.put_back()):
            say(f"[ERR] {wrong}")
            code = 1
    return code

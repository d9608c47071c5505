"""Random faults in a supervised service under load, one after the other: how soon it scores again, and what is lost.

    python measurements/faults.py --faults 100 --csv measurements/results/faults-cpu.csv     # 90 minutes on 2 cores
    python measurements/faults.py --faults 20 --first 30 --csv FILE      # faults 30 to 49 of the same seed, appended
    python measurements/faults.py --saturate 40                          # minutes of 64 calls in flight; no fault
    python measurements/faults.py --summary FILE                         # the table of docs/reliability.md

`start_rerank.sh start` runs a real service of a seeded tiny Qwen3-Reranker (float32) with several API processes, and
the kit's client calls it all the time and checks every score. A fault is over when its victim is gone, /ready is 200
and a call that began after the fault has the right score. The exit code is 1 where a fault was not overcome, a score
was wrong or a process was left.

What differs from the defaults: HEALTH_TIMEOUT_S (--health-timeout, 20 instead of 120: a hang would take minutes), and
RESTART_MAX and RESTART_WINDOW_S, because a fault a minute would otherwise end in `stays down`, as it should.

LOG_DIR is a file system of its own, which is filled up (root on Linux), and the memory limit is a memory control group
below that of this program (cgroup v1). Where one cannot be had, its faults are left out, and the program says so.
"""

import argparse
import csv
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from datetime import date
from pathlib import Path

KIT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(KIT), str(KIT / "tests"), str(KIT / "tests" / "stand_ins")]

# (victim, what happens to it)
SIGNALS = [(victim, how) for victim in ("engine", "worker", "api", "server") for how in ("KILL", "STOP")]
DISK = [("disk", "full"), ("disk", "full, engine killed")]
MEMORY = [("memory", "limit of 1 MiB more")]
TITLES = {"engine": "EngineCore", "worker": "Worker", "api": "APIServer", "server": "vllm serve"}
LIMIT_S = 240  # a fault that is not over by then is not overcome
MIB = 2**20
COLUMNS = ("number", "victim", "fault", "recovery_s", "over", "calls", "lost", "broken", "wrong", "left", "restarts")
COLUMNS += ("said", "load_average")


class Service:
    """The service under test, and the machinery to hurt it."""

    def __init__(self, folder: Path, args: argparse.Namespace):
        import tiny_models
        from fleet import KEY, Replica

        self.disk = mounted(folder / "disk")
        self.group = memory_group()
        changed = {"HEALTH_TIMEOUT_S": args.health_timeout, "RESTART_MAX": 1000, "RESTART_WINDOW_S": 20}
        changed |= {"API_SERVER_COUNT": args.api_servers, "DTYPE": "float32", "MAX_MODEL_LEN": 512, "API_KEY": KEY}
        if args.saturate:
            changed = {k: v for k, v in changed.items() if not k.startswith(("HEALTH", "RESTART"))}
        model = tiny_models.qwen3_reranker(folder / "Qwen3-Reranker-tiny")
        # Replica pins a service to one core, for fleets; this one has the machine.
        self.replica = Replica(0, model, folder)
        settings = {"MODEL_PATH": model, "PORT": self.replica.port, "LOG_DIR": self.disk or folder / "log"}
        self.replica.settings = settings | changed
        self.changed = changed

    def start(self) -> None:
        from conftest import run_kit

        done = run_kit("start", **self.replica.settings, timeout_s=900)
        if done.returncode:
            raise SystemExit(f"start failed: {done.stdout}{done.stderr}")

    def close(self) -> None:
        from conftest import run_kit

        with suppress(OSError, ValueError):
            for pid in self.processes():
                os.kill(pid, signal.SIGCONT)
        run_kit("stop", **self.replica.settings)
        if self.disk:
            subprocess.run(["umount", str(self.disk)], check=True)
        if self.group:
            with suppress(OSError):
                self.group.rmdir()

    @property
    def kinds(self) -> list[tuple[str, str]]:
        return SIGNALS + (DISK if self.disk else []) + (MEMORY if self.group else [])

    def processes(self) -> dict[int, str]:
        """{PID: title} of the server, without the supervisor."""
        from fake_kit import session_of

        found = {}
        for pid in session_of(leader := self.replica.leader):
            with suppress(OSError):
                if pid != leader:
                    found[pid] = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        return found

    def victim(self, kind: str, rng: random.Random) -> int:
        titles = self.processes()
        kind = {"disk": "engine", "memory": "worker"}.get(kind, kind)
        found = [pid for pid, title in sorted(titles.items()) if TITLES[kind] in title]
        # One API process or one worker is the server or the engine itself.
        if not found:
            title = TITLES["server" if kind == "api" else "engine"]
            found = [pid for pid, seen in titles.items() if title in seen]
        return rng.choice(found)

    def status(self) -> dict:
        from conftest import run_kit

        return json.loads(run_kit("status", "--json", **self.replica.settings).stdout)

    def scores(self) -> bool:
        """Whether /ready is 200 and a score is right, both asked anew."""
        from conftest import http
        from fleet import DOCUMENTS, KEY, QUERIES, TOLERANCE

        try:
            if http("GET", f"{self.replica.url}/ready", timeout_s=5)[0] != 200:
                return False
            body = {"model": "qwen3-reranker", "text_1": QUERIES[0], "text_2": DOCUMENTS[0]}
            key = {"Authorization": f"Bearer {KEY}"}
            status, answer = http("POST", f"{self.replica.url}/v1/score", body, key, timeout_s=5)
        except OSError:
            return False
        right = self.right[QUERIES[0], DOCUMENTS[0]]
        return status == 200 and abs(answer["data"][0]["score"] - right) < TOLERANCE

    def hurt(self, victim: str, how: str, pid: int) -> None:
        if victim == "disk":
            fill(self.disk / "filler")
            if "killed" in how:
                os.kill(pid, signal.SIGKILL)
        elif victim == "memory":
            (self.group / "memory.limit_in_bytes").write_text(str(MIB))
            (self.group / "cgroup.procs").write_text(str(pid))
        else:
            os.kill(pid, getattr(signal, f"SIG{how}"))

    def heal(self, pid: int, since: int | None) -> None:
        """Undo what outlasts a fault."""
        from rerank_kit.processes import born

        if self.disk:
            (self.disk / "filler").unlink(missing_ok=True)
        if born(pid) == since:
            os.kill(pid, signal.SIGCONT)
        if self.group:
            (self.group / "memory.limit_in_bytes").write_text("-1")
            for left in (self.group / "cgroup.procs").read_text().split():
                with suppress(OSError):
                    (self.group.parent / "cgroup.procs").write_text(left)


def mounted(folder: Path, mib: int = 16) -> Path | None:
    """A small file system of its own, or None."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={mib}m,mode=700", "tmpfs", str(folder)]
    if os.getuid() or subprocess.run(command, capture_output=True).returncode:
        print("no file system can be mounted here: the faults of a full disk are left out", file=sys.stderr)
        return None
    return folder


def memory_group() -> Path | None:
    """An empty memory control group below this program's, or None."""
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/cgroup").read_text().splitlines()
        own = next(line.split(":")[2] for line in lines if line.split(":")[1] == "memory")
        group = Path(f"/sys/fs/cgroup/memory{own}", f"faults-{os.getpid()}")
        group.mkdir()
        return group
    print("no memory control group (v1) can be made here: the faults of a memory limit are left out", file=sys.stderr)
    return None


def fill(file: Path) -> None:
    with suppress(OSError), file.open("wb", buffering=0) as filler:
        for size in (64 * 1024, 1):
            with suppress(OSError):
                while filler.write(b"x" * size):
                    pass


def one_fault(service: Service, load, number: int, kind: tuple[str, str], rng: random.Random) -> dict:
    from rerank_kit.processes import born

    victim, how = kind
    load.wait_for(5, timeout_s=120, error="")
    time.sleep(rng.uniform(0, 5))
    before, old, first = service.status(), service.processes(), len(load.calls)
    pid = service.victim(victim, rng)
    since, began = born(pid), time.time()
    service.hurt(victim, how, pid)
    # Nobody dies of a full disk, nor of a parent that only waits for its API processes.
    stays = how == "full" or (victim == "server" and how == "STOP" and any("APIServer" in t for t in old.values()))

    def over() -> bool:
        return (stays or born(pid) != since) and service.scores()

    if stays:
        time.sleep(10)  # under load
    while not (done := over()) and time.time() - began < LIMIT_S:
        time.sleep(0.25)
    recovery_s = time.time() - began - 10 * stays
    after = service.status()
    left = [p for p in old if p in service.processes()] if done and not stays else []
    service.heal(pid, since)
    calls = load.calls[first:]
    lost = [call for call in calls if call["error"]]
    broken = [call for call in lost if call["began"] < began]
    row = {
        "number": number,
        "victim": victim,
        "fault": how,
        "recovery_s": round(recovery_s, 1),
        "over": "yes" if done else "no",
        "calls": len(calls),
        "lost": len(lost),
        "broken": len(broken),
        "wrong": sum(not call["error"] and call["wrong"] > 1e-5 for call in calls),
        "left": len(left),
        "restarts": after["restarts"] - before["restarts"],
        "said": (after["why"] or after["state"])[:160] if after["restarts"] > before["restarts"] else after["state"],
        "load_average": round(os.getloadavg()[0], 1),
    }
    if not done:  # the next fault needs a good service
        service.replica.kit("restart")
    return row


def append(path: Path, head: dict, row: dict) -> None:
    """Append one row to a table of results/; the head is written once."""
    from measurements.results import _cell

    new = not path.exists()
    with path.open("a", encoding="utf-8", newline="") as file:
        if new:
            file.writelines(f"# {name}: {_cell(value)}\n" for name, value in head.items())
        table = csv.writer(file, lineterminator="\n")
        if new:
            table.writerow(COLUMNS)
        table.writerow([_cell(row[name]) for name in COLUMNS])


def describe(service: Service, args: argparse.Namespace) -> dict:
    from importlib.metadata import version

    cpu = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), "")
    return {
        "date": date.today().isoformat(),
        "command": " ".join(["python", "measurements/faults.py", *sys.argv[1:]]),
        "vllm": version("vllm"),
        "hardware": f"{len(os.sched_getaffinity(0))} cores, {cpu.partition(':')[2].strip()}",
        "model": "seeded tiny Qwen3-Reranker, float32",
        "settings": " ".join(f"{k}={v}" for k, v in service.changed.items() if k != "API_KEY"),
        "load": f"{args.threads} threads of the kit's client, {args.pause:g} s pause, 1 to 24 documents a call",
    }


def faults(service: Service, args: argparse.Namespace) -> int:
    from fleet import Load, use_client

    rng = random.Random(args.seed)
    # Rounds, each with every kind in random order: a part of a run has all kinds too.
    kinds = [kind for kind in service.kinds if not args.only or ",".join(kind) == args.only]
    n_rounds = 1 + (args.first + args.faults) // len(kinds)
    plan = [kind for _ in range(n_rounds) for kind in rng.sample(kinds, len(kinds))]
    service.right = service.replica.scores()
    version, head, bad = service.replica.version, describe(service, args), 0
    use_client()
    load = Load((f"{service.replica.url}/v1",), {version: service.right}, args.threads, args.pause)
    end = time.monotonic() + 60 * (args.minutes or 1e9)
    try:
        for number in range(args.first, args.first + args.faults):
            if time.monotonic() > end:
                break
            row = one_fault(service, load, number, plan[number], random.Random(f"{args.seed} {number}"))
            bad += bool(row["over"] != "yes" or row["wrong"] or row["left"])
            print(" ".join(f"{k}={v}" for k, v in row.items()), flush=True)
            if args.csv:
                append(args.csv, head, row)
    finally:
        load.stop()
    print(f"all calls: {load.summary()}; errors {by_kind(load.lost)}")
    return int(bool(bad))


def saturate(service: Service, args: argparse.Namespace) -> int:
    """Calls in flight without a pause for so many minutes; a restart is a fault."""
    from fleet import Load, use_client

    right, before = service.replica.scores(), service.status()["restarts"]
    use_client()
    load = Load((f"{service.replica.url}/v1",), {service.replica.version: right}, args.in_flight)
    began, not_ready = time.time(), 0
    try:
        while time.time() - began < 60 * args.saturate:
            time.sleep(10)
            with suppress(OSError):
                from conftest import http

                not_ready += http("GET", f"{service.replica.url}/ready", timeout_s=10)[0] != 200
            if int(time.time() - began) % 60 < 10:
                print(f"{time.time() - began:.0f} s: {load.summary()}", flush=True)
    finally:
        load.stop()
    now = service.status()
    print(f"{args.saturate:g} min, {args.in_flight} in flight: {load.summary()}, errors {by_kind(load.lost)}")
    print(f"restarts {now['restarts'] - before}, /ready not 200 {not_ready} times, load {os.getloadavg()[0]:.1f}")
    print(f"head: {describe(service, args)}")
    return int(bool(now["restarts"] - before or load.wrong))


def by_kind(errors: list[str]) -> dict[str, int]:
    """How often each came: "RerankHTTPError: HTTP 429"."""
    return dict(Counter(" ".join(error.split()[:3]) for error in errors))


def percentile(values: list[float], share: float) -> float:
    """Nearest rank."""
    return sorted(values)[max(0, -(-len(values) * int(share * 100) // 100) - 1)]


def figures(rows: list[dict]) -> dict[str, list[float]]:
    """{kind of fault, and all that ended the server: [faults, p50, p99, longest recovery in s, lost calls, wrong]}."""
    kinds: dict[str, list[dict]] = {}
    for row in rows:
        kinds.setdefault(f"{row['victim']}: {row['fault']}", []).append(row)
    kinds = dict(sorted(kinds.items())) | {"all that ended the server": [row for row in rows if row["recovery_s"] > 1]}
    found = {}
    for name, of_kind in kinds.items():
        seconds = [row["recovery_s"] for row in of_kind]
        found[name] = [len(of_kind), *(percentile(seconds, share) for share in (0.5, 0.99, 1))]
        found[name] += [sum(row[column] for row in of_kind) for column in ("lost", "wrong")]
    return found


def summary(path: Path) -> list[str]:
    """The Markdown table of a result file."""
    from measurements import results

    results.FOLDER = path.resolve().parent
    names = ("fault", "n", "recovery p50", "p99", "longest", "lost calls", "wrong scores")
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for name, (n, *seconds, lost, wrong) in figures(results.read(path.stem)[1]).items():
        cells = [n, *(f"{value:.1f} s" for value in seconds), lost, wrong]
        lines.append(f"| {name} | " + " | ".join(map(str, cells)) + " |")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=100)
    parser.add_argument("--first", type=int, default=0, help="number of the first fault of the seed's sequence")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", metavar="VICTIM,FAULT", help="such faults alone, as api,STOP")
    parser.add_argument("--minutes", type=float, help="begin no fault after that")
    parser.add_argument("--api-servers", type=int, default=2)
    parser.add_argument("--health-timeout", type=int, default=20, help="HEALTH_TIMEOUT_S")
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--pause", type=float, default=1.0, help="seconds between two calls of a thread")
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--saturate", type=float, metavar="MINUTES")
    parser.add_argument("--in-flight", type=int, default=64)
    parser.add_argument("--summary", type=Path, metavar="CSV")
    args = parser.parse_args()
    if args.summary:
        print("\n".join(summary(args.summary)))
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the service must not outlive this program
    with tempfile.TemporaryDirectory() as scratch:
        service = Service(Path(scratch), args)
        try:
            service.start()
            return saturate(service, args) if args.saturate else faults(service, args)
        finally:
            service.close()


if __name__ == "__main__":
    sys.exit(main())

"""Failure drills of two services behind nginx, under load: kills, hangs, rolling restarts, reloads.

    python measurements/fleet_drills.py [nginx] [client] [DRILL ...]

Starts both services with a seeded tiny model, runs every drill (or those named) under load by the kit's client, through
nginx and with two base URLs (or one of the two ways), and prints the table of docs/fleet.md. Exit code 1 when a call
was lost behind nginx or a score differed. 20 minutes on 2 cores.
"""

import argparse
import signal
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

KIT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(KIT), str(KIT / "tests"), str(KIT / "tests" / "stand_ins")]

from conftest import http
from fleet import FAIL_TIMEOUT_S, KEY, Fleet, Load, Nginx, Replica, use_client


def answers_again(port: int, timeout_s: float = 240) -> None:
    """Block until the replica's /ready says so."""
    end = time.monotonic() + timeout_s
    while True:
        with suppress(OSError):
            if http("GET", f"http://127.0.0.1:{port}/ready", timeout_s=2)[0] == 200:
                return
        assert time.monotonic() < end, "the replica did not come back"
        time.sleep(0.2)


# --- drills: what happens to the second of two replicas, and how it comes back ----------------------------------------


def kill_session(replicas: list[Replica], nginx: Nginx) -> None:
    """The host fails; it is started again 5 s later."""
    replicas[1].signal("KILL")
    time.sleep(5)
    replicas[1].start()


def kill_engine(replicas: list[Replica], nginx: Nginx) -> None:
    replicas[1].signal("KILL", "EngineCore")
    time.sleep(3)
    answers_again(replicas[1].port)


def kill_api(replicas: list[Replica], nginx: Nginx) -> None:
    replicas[1].signal("KILL", "vllm serve")
    time.sleep(1)
    answers_again(replicas[1].port)


def stop_session(replicas: list[Replica], nginx: Nginx) -> None:
    """The host hangs: it accepts connections and never answers. After 70 s it resumes."""
    replicas[1].signal("STOP")
    time.sleep(70)
    replicas[1].signal("CONT")
    answers_again(replicas[1].port)


def stop_engine(replicas: list[Replica], nginx: Nginx) -> None:
    """The engine hangs. Its supervisor detects that after HEALTH_TIMEOUT_S."""
    replicas[1].signal("STOP", "EngineCore")
    time.sleep(20)
    answers_again(replicas[1].port)


def roll(replicas: list[Replica], nginx: Nginx) -> None:
    """Restarts one replica after the other, as in docs/fleet.md: STOP_DELAY_S is the pause between them."""
    for replica in replicas:
        replica.kit("restart")


def reload_nginx(replicas: list[Replica], nginx: Nginx) -> None:
    for _ in range(20):
        assert nginx.run("-s", "reload").returncode == 0
        time.sleep(0.5)


DRILLS = (kill_session, kill_engine, kill_api, stop_session, stop_engine, roll, reload_nginx)


def drill(what, replicas: list[Replica], nginx: Nginx, urls: tuple[str, ...], known: dict) -> dict:
    """One drill under load: the clients' results, and seconds until the second replica was ready and used again."""
    address, back = f"127.0.0.1:{replicas[1].port}", None
    load = Load(urls, known)
    try:
        load.wait_for(20)
        began = time.time()
        what(replicas, nginx)
        through = time.time()
        load.wait_for(20)
        while urls == nginx.urls and back is None:  # nginx leaves it out for fail_timeout
            assert time.time() < through + 60, "nginx does not send it calls again"
            time.sleep(0.5)
            good = [x["at"] for x in nginx.log(through) if x["replica"].endswith(address) and x["status"] == 200]
            back = good[0] - began if good else None
    finally:
        load.stop()
    for error in load.lost[:3]:
        print(f"lost: {error}", file=sys.stderr)
    again = [line for line in nginx.log(began - 1) if "," in line["replica"]]
    row = load.summary() | {"sent_again": len(again), "ready_s": round(through - began)}
    return row | {"asked_again_s": "-" if back is None else round(back)}


def main(argv: list[str]) -> int:
    import tiny_models

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = ["nginx", "client", *(drill.__name__ for drill in DRILLS)]
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(known)}; default: all")
    names = parser.parse_args(argv).names
    if unknown := set(names) - set(known):
        parser.error(f"{sorted(unknown)[0]!r} is unknown: choose from {', '.join(known)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the services must not outlive this program
    named = [d for d in DRILLS if d.__name__ in names]
    rows, chosen = {}, named or DRILLS
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        settings = {"HEALTH_TIMEOUT_S": 12, "STOP_DELAY_S": FAIL_TIMEOUT_S + 1}
        fleet = Fleet(folder, tiny_models.qwen3_reranker(folder / "Qwen3-Reranker-tiny"), **settings)
        replicas, nginx = fleet.replicas, fleet.nginx
        try:
            fleet.start()
            use_client(nginx.certificate)
            direct = (",".join(f"{r.url}/v1" for r in reversed(replicas)),)  # the failing one comes first
            for way, urls in (("nginx", nginx.urls), ("client", direct)):
                for what in chosen:
                    other = {"nginx": "client", "client": "nginx"}[way]
                    if (other in names and way not in names) or (way == "client" and what is reload_nginx):
                        continue
                    print(f"{what.__name__} by {way} ...", file=sys.stderr, flush=True)
                    rows[what.__name__, way] = drill(what, replicas, nginx, urls, fleet.known)
                    print(rows[what.__name__, way], file=sys.stderr, flush=True)
            assert KEY not in nginx.access_log.read_text() + nginx.error_log.read_text()
        finally:
            fleet.stop()
    columns = list(next(iter(rows.values())))
    print("| drill | way | " + " | ".join(columns) + " |\n" + "|---" * (len(columns) + 2) + "|")
    for (name, way), row in rows.items():
        print(f"| {name} | {way} | " + " | ".join(str(row[c]) for c in columns) + " |")
    behind_nginx = [row for (_, way), row in rows.items() if way.startswith("nginx")]
    return int(any(row["lost"] or row["wrong"] for row in behind_nginx))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Records a command's terminal as an animated SVG, from a real run.

    python docs/terminal.py docs/images/demo.svg sh start_rerank.sh demo

Each line appears when it was printed; waits are shortened to PAUSE_S. A viewer that plays no animation, or whose user
wants none, shows the whole screen. The lines with their times are kept in the file's comment.
"""

import html
import os
import pty
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

COLUMNS, SIZE, LINE = 118, 13, 18  # characters a line, font size and line height in pixels
PAUSE_S, END_S = 1.2, 6.0  # longest wait between two lines, and the pause before it starts again

STYLE = f"""text{{font:{SIZE}px ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;fill:#d5d9e0;white-space:pre}}
.typed{{fill:#8fd18f}}.error{{fill:#f0a070}}
@media (prefers-reduced-motion:no-preference){{text{{animation:var(--n) WHOLEs infinite}}}}"""


def record(command: list[str]) -> list[tuple[float, str]]:
    """(seconds since the start, line) of everything that the command prints to a terminal."""
    ours, theirs = pty.openpty()
    began = time.monotonic()
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs)
    os.close(theirs)
    lines, rest = [], ""
    while True:
        try:
            data = os.read(ours, 65536).decode("utf-8", "replace")
        except OSError:  # the other end is closed
            data = ""
        if not data:
            break
        *whole, rest = (rest + data).split("\n")
        lines += [(time.monotonic() - began, shown(line)) for line in whole]
    os.close(ours)
    if process.wait():
        raise SystemExit(f"{shlex.join(command)} ended with {process.returncode}:\n" + "\n".join(t for _, t in lines))
    return lines + ([(time.monotonic() - began, shown(rest))] if rest else [])


def shown(line: str) -> str:
    """What stays of a line on the screen: without escape codes, and what a carriage return left over."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line).rstrip("\r").rsplit("\r", 1)[-1]


def svg(command: list[str], lines: list[tuple[float, str]]) -> str:
    rows, at, last = [(0.0, "typed", "$ " + shlex.join(command))], 0.8, 0.0
    for seconds, text in lines:
        at += min(max(0.0, seconds - last), PAUSE_S)
        last = seconds
        kind = "error" if text.startswith(("[ERR]", "[WARN]")) else ""
        rows += [(at, kind, text[n : n + COLUMNS]) for n in range(0, len(text) or 1, COLUMNS)]
    whole = at + END_S
    wide, high = round(COLUMNS * SIZE * 0.602) + 32, LINE * len(rows) + 32
    frames, out = [], []
    for number, (when, kind, text) in enumerate(rows):
        percent = 100 * when / whole
        frames.append(f"@keyframes l{number}{{0%,{percent:.2f}%{{opacity:0}}{percent + 0.01:.2f}%,100%{{opacity:1}}}}")
        attributes = f'class="{kind}" ' if kind else ""
        out.append(
            f'<text {attributes}style="--n:l{number}" x="16" y="{LINE * number + 30}">{html.escape(text)}</text>'
        )
    style = STYLE.replace("WHOLE", f"{whole:.1f}") + "\n" + "\n".join(frames[1:])
    times = "\n".join(f"{seconds:7.1f} {text}" for seconds, text in lines).replace("--", "- -")
    title = html.escape(shlex.join(command))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {high}" width="{wide}" role="img">\n'
        f"<!-- seconds and lines, as recorded:\n{times}\n-->\n<title>{title}</title><style>{style}</style>\n"
        f'<rect width="100%" height="100%" rx="8" fill="#1b1f27"/>\n' + "\n".join(out) + "\n</svg>\n"
    )


def main(argv: list[str]) -> int:
    if len(argv) < 2 or argv[0].startswith("-"):
        print(__doc__, file=sys.stderr)
        return 2
    Path(argv[0]).write_text(svg(argv[1:], record(argv[1:])), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""The kit with a stand-in for the vllm program, for outcomes that are rare with the real one."""

import json
import sys
from pathlib import Path

from conftest import KIT, copy_kit, free_port, run_kit

FAKE = Path(__file__).parent / "fake_vllm.py"


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def session_of(pid: int) -> list[int]:
    """PIDs in the session that `pid` leads or led."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == pid and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


class FakeKit:
    """The kit with a Python environment whose vllm is the stand-in `program`."""

    def __init__(self, root: Path, model: Path, version: str | None = "0.32.0+cpu", program: Path = FAKE):
        bin_dir = root / "fake env" / "bin"
        bin_dir.mkdir(parents=True)
        site = bin_dir.parent / "lib" / f"python3.{sys.version_info[1]}" / "site-packages"
        site.mkdir(parents=True)
        (bin_dir.parent / "pyvenv.cfg").write_text(f"home = {Path(sys._base_executable).parent}\n")
        (bin_dir / "python").symlink_to(sys._base_executable)
        if version:
            info = site / f"vllm-{version}.dist-info"
            info.mkdir()
            (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
        vllm = bin_dir / "vllm"
        vllm.write_text(f'#!/bin/sh\nexec "{sys._base_executable}" -S "{program}" "$@"\n')
        vllm.chmod(0o755)
        self.folder, self.root = KIT, root
        self.logs = root / "logs"
        self.settings = {
            "PYTHON": bin_dir / "python",
            "MODEL_PATH": model,
            "PORT": free_port(),
            "LOG_DIR": self.logs,
            "STARTUP_CHECK": 0,
            "START_TIMEOUT_S": 30,
            "STOP_TIMEOUT_S": 2,
        }

    def __call__(self, *args, shell="dash", timeout_s=90, **settings):
        return run_kit(*args, shell=shell, timeout_s=timeout_s, folder=self.folder, **{**self.settings, **settings})

    def change(self, module: str, old: str, new: str) -> None:
        """From now on a copy of the kit runs in which a piece of code is another one, as a shorter time limit."""
        if self.folder == KIT:
            self.folder = copy_kit(self.root / "changed kit")
        file = self.folder / "rerank_kit" / module
        text = file.read_text()
        assert text.count(old) == 1, f"{old} is not once in {module}"
        file.write_text(text.replace(old, new))

    @property
    def pid_file(self) -> Path:
        return self.logs / f"rerank-{self.settings['PORT']}.pid"

    @property
    def log(self) -> str:
        return (self.logs / f"rerank-{self.settings['PORT']}.log").read_text()

    @property
    def pid(self) -> int:
        """The supervisor's."""
        return int(self.pid_file.read_text().split()[0])

    @property
    def state(self) -> dict:
        return json.loads(self.pid_file.with_suffix(".state").read_text())

    @property
    def server_pid(self) -> int:
        return self.state["server_pid"]

"""The checkpoints of tests/models/library_checkpoints.tar.xz, which training libraries saved themselves.

measurements/library_checkpoints.py makes them, and records beside each the scores that the library gives after loading.
"""

import json
import tarfile
from pathlib import Path

ARCHIVE = Path(__file__).parents[1] / "models" / "library_checkpoints.tar.xz"


def all_checkpoints(target: Path) -> list[Path]:
    """Unpack all of them; the folders, named ENVIRONMENT/CHECKPOINT."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(target, filter="data")
    return sorted(file.parent for file in target.glob("*/*/made_by.json"))


def checkpoints_of(target: Path, names: tuple[str, ...]) -> list[Path]:
    """Those of these names by the newest libraries that made each, in this order."""
    found = {folder.name: folder for folder in all_checkpoints(target)}
    return [found[name] for name in names]


def record(folder: Path) -> dict:
    """What made the checkpoint, the profile that it must get, and the library's scores."""
    return json.loads((folder / "made_by.json").read_text())

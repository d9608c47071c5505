"""Tells one checkpoint from another by its content, in a second or two for any size."""

import hashlib
import zipfile
from collections.abc import Iterator
from pathlib import Path

from rerank_kit.models.folders import WEIGHTS
from rerank_kit.models.json_files import read_json
from rerank_kit.models.whole import safetensors_header
from rerank_kit.settings import ConfigError

TEXTS = (".json", ".txt", ".model", ".jinja")


def content_id(path: Path, n_blocks: int = 16, block_bytes: int = 4096) -> str:
    """12 hex digits computed from the content of a checkpoint, the same on every host.

    File sizes do not tell a fine-tune from its base model. Weights above 4 MiB are sampled: n_blocks blocks of every
    tensor, spread over it, and smaller tensors as a whole. Every other file is read as a whole, also in the folders
    of sentence-transformers' modules.
    """
    digest = hashlib.sha256()
    for file in _files(path):
        size = file.stat().st_size
        digest.update(f"{file.relative_to(path)} {size} ".encode())
        with file.open("rb") as content:
            if file.suffix not in WEIGHTS or size <= 4 << 20:
                while part := content.read(1 << 20):
                    digest.update(part)
                continue
            for start, end in _tensors(file, size):
                for at in _places(start, end, n_blocks, block_bytes):
                    content.seek(at)
                    digest.update(content.read(min(block_bytes, end - at)))
    return digest.hexdigest()[:12]


def _files(path: Path) -> list[Path]:
    """Files that can change a score: those of the folder and of the modules that modules.json names."""
    modules = read_json(path / "modules.json")
    inside = [m.get("path", "") for m in modules if isinstance(m, dict)] if isinstance(modules, list) else []
    folders = [path, *(path / name for name in dict.fromkeys(inside) if name and (path / name).is_dir())]
    found = [file for folder in folders for file in folder.iterdir() if file.suffix in (*WEIGHTS, *TEXTS)]
    return sorted(file for file in found if file.is_file())


def _tensors(file: Path, size: int) -> Iterator[tuple[int, int]]:
    """(first byte, end) of the parts of a weight file: its head, then each tensor."""
    try:
        if file.suffix == ".safetensors":
            header = safetensors_header(file)
            start = 8 + _header_bytes(file)
            yield from _pieces(0, start)
            for item in header.values():
                first, last = item["data_offsets"]
                yield start + first, start + last
            return
        with zipfile.ZipFile(file) as archive:
            yield from _pieces(archive.start_dir, size)  # names, sizes and checksums of all tensors
            for entry in archive.infolist():  # stored as they are, behind a local head of some dozen bytes
                yield entry.header_offset, min(size, entry.header_offset + 128 + entry.compress_size)
    except (ConfigError, zipfile.BadZipFile, OSError, ValueError):
        step = max(1, size // 64)
        for start in range(0, size, step):
            yield start, min(size, start + step)


def _pieces(start: int, end: int, n_bytes: int = 16 * 4096) -> Iterator[tuple[int, int]]:
    """The bytes from start to end in parts that are small enough to be read as a whole."""
    for at in range(start, end, n_bytes):
        yield at, min(end, at + n_bytes)


def _header_bytes(file: Path) -> int:
    with file.open("rb") as content:
        return int.from_bytes(content.read(8), "little")


def _places(start: int, end: int, n_blocks: int, block_bytes: int) -> list[int]:
    """Where the blocks of one tensor begin: its start, its end, and evenly between; all of it where it is small."""
    if end - start <= n_blocks * block_bytes:
        return list(range(start, end, block_bytes))
    last = end - block_bytes
    return [start + number * (last - start) // (n_blocks - 1) for number in range(n_blocks)]

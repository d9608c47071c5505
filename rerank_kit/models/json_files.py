"""Reads the JSON files of a checkpoint, whatever somebody put there: one line instead of a traceback."""

import json
from pathlib import Path
from typing import Any

from rerank_kit.settings import ConfigError

# What a value is called in a message.
NAMES = {
    dict: "an object",
    list: "a list",
    str: "a text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
}


def read_json(path: Path) -> Any:
    """The value in a JSON file; None where there is no file.

    Raises:
        ConfigError: the file cannot be read, or is not JSON. A pointer of Git LFS and a web page are named as such.
    """
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError:
        if path.is_symlink():
            raise ConfigError(
                f"{path} is a link to {path.readlink()}, which does not exist: the download is incomplete or its cache "
                "was deleted; download the model again"
            ) from None
        return None
    except (OSError, ValueError) as exc:
        raise ConfigError(f"{path} cannot be read as JSON: {exc}") from exc
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as exc:
        raise ConfigError(f"{path} cannot be read as JSON: {_what_it_is(text) or exc}; download it again") from exc


def read_object(path: Path) -> dict:
    """The JSON object in a file; {} where there is no file."""
    data = read_json(path)
    return {} if data is None else typed(data, dict, path, "")


def typed(value: Any, kind: type, path: Path, key: str, low: int | None = None) -> Any:
    """The value, if it is of this type; ConfigError with file and key if it is not."""
    fits = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
    if not fits or (low is not None and value < low):
        wanted = NAMES[kind] + (f" of at least {low}" if low is not None else "")
        raise ConfigError(
            f"{path} {f'has {key}={shown(value)}' if key else f'holds {shown(value)}'}, and {wanted} is expected: "
            "the file is damaged or was edited; take the original one"
        )
    return value


def shown(value: Any) -> str:
    """A value as JSON, for a message; long ones are cut."""
    text = json.dumps(value, ensure_ascii=True)
    return text if len(text) <= 60 else text[:57] + "..."


def _what_it_is(text: str) -> str | None:
    head = text[:200].lstrip().lower()
    if head.startswith("version https://git-lfs"):
        return "it is a pointer of Git LFS, not the file itself (run git lfs pull)"
    if head.startswith(("<!doctype", "<html")):
        return "it is a web page: the download was refused or redirected"
    if not text.strip("\0 \r\n\t"):
        return "it is empty"
    return None

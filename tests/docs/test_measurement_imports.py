"""What the measurement programs import from the kit exists: most of them run on a GPU machine only."""

import ast
import importlib

import pytest
from conftest import KIT

PROGRAMS = sorted((KIT / "measurements").rglob("*.py"))
OWN = ("rerank_kit", "measurements", *(path.stem for path in KIT.glob("*.py")))


def own_imports(path):
    """(module, name or None) of every import from this repository, at any depth of the file."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found = [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found = [(node.module, alias.name) for alias in node.names]
        else:
            continue
        yield from ((module, name) for module, name in found if module.split(".")[0] in OWN)


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: str(path.relative_to(KIT)))
def test_imports_from_the_kit_exist(path):
    for module, name in own_imports(path):
        found = importlib.import_module(module)
        assert name is None or hasattr(found, name) or importlib.util.find_spec(f"{module}.{name}"), (module, name)


def test_modules_that_moved_are_named_by_no_program():
    """An import under `except ImportError` would hide them."""
    moved = ("server_guard", "engine_args", "engine_defaults", "service_health", "guard_rules", "check_rerank")
    for path in PROGRAMS:
        assert not [name for name in moved if f"import {name}" in path.read_text("utf-8")], path

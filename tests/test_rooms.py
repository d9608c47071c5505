"""Imports run one way: which room of rerank_kit/ may use which, and no circle between files."""

import ast
import subprocess
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from conftest import KIT

PACKAGE = KIT / "rerank_kit"
# Room: what it may import of the package, besides itself. A file in place of a room allows that file alone.
MAY_USE = {
    "settings": (),
    "processes": (),
    "redis_url": (),
    "client": ("settings",),
    "models": ("settings",),
    "engine": ("settings", "redis_url", "models"),
    "guard": (
        "models.fitting",
        "models.image_hosts",
        "models.images",
        "models.known_pairs",
        "models.late",
        "processes",
        "redis_url",
    ),  # it lives inside vLLM and reads GUARD_*, never the settings
    "serving": ("settings", "processes", "models", "engine"),
    "offline": ("settings", "models", "engine"),
    # client, offline and models: --quality asks the service as a caller does, or scores in this process
    "benchmark": ("settings", "processes", "client", "models", "engine", "serving", "offline"),
}
DOORS = {path.stem for path in KIT.glob("*.py")}


def module_of(file: Path) -> str:
    """`client.calls` of rerank_kit/client/calls.py; `client` of its __init__.py; "" of the package's own."""
    return ".".join(file.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").rstrip(".")


def imports_of(source: str, module: str, is_package: bool) -> set[str]:
    """Modules of the package that a source imports anywhere, as `client.calls`, and doors as `door:NAME`."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = ["rerank_kit", *module.split(".")] if module else ["rerank_kit"]
                parts = parts[: len(parts) - node.level + is_package]
                base = ".".join([*parts, *filter(None, [node.module])])
            names = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            top, _, rest = name.partition(".")
            if top == "rerank_kit":
                found.add(existing(rest))
            elif top in DOORS:
                found.add(f"door:{top}")
    return found


def existing(name: str) -> str:
    """The module in `client.calls.rerank`."""
    while name and not (PACKAGE / (name.replace(".", "/") + ".py")).exists():
        if (PACKAGE / name.replace(".", "/")).is_dir():
            return name
        name = name.rpartition(".")[0]
    return name


def all_imports() -> dict[str, set[str]]:
    files = sorted(PACKAGE.rglob("*.py"))
    return {module_of(f): imports_of(f.read_text("utf-8"), module_of(f), f.stem == "__init__") for f in files}


def faults(imports: dict[str, set[str]]) -> list[str]:
    """What breaks the rules, one line each."""
    out = []
    for module, used in imports.items():
        room = module.partition(".")[0]
        for target in used:
            if target.startswith("door:"):
                out.append(f"{module} imports the top-level file {target[5:]}.py")
            elif not module:  # the package's own names: client and ConfigError, on first use
                if target.partition(".")[0] not in ("client", "settings"):
                    out.append(f"rerank_kit/__init__.py imports {target}")
            elif target.partition(".")[0] not in (room, "") and not any(
                target == allowed or target.startswith(f"{allowed}.") for allowed in MAY_USE[room]
            ):
                out.append(f"{module} imports {target}: {room} may use {', '.join(MAY_USE[room]) or 'nothing'}")
    try:
        # A package's __init__ hands out what its files hold: no dependency of the files on it.
        graph = {m: {t for t in used if t and t != m and not t.startswith("door:")} for m, used in imports.items() if m}
        list(TopologicalSorter(graph).static_order())
    except CycleError as exc:
        out.append(f"a circle: {' -> '.join(exc.args[1])}")
    return out


def test_imports_run_one_way():
    imports = all_imports()
    assert {module.partition(".")[0] for module in imports} - {""} == set(MAY_USE), "a room without a rule"
    assert faults(imports) == []


@pytest.mark.parametrize(
    ("module", "source", "said"),
    [
        ("client.calls", "from ..engine.plan import Plan", "client may use settings"),
        ("guard.body", "def f():\n    from rerank_kit.settings import get_config", "guard may use models.fitting"),
        ("guard.body", "import rerank_kit.models.profiles", "guard may use models.fitting"),
        ("models.pair", "import env_utils", "the top-level file env_utils.py"),
        ("settings", "from .client import calls", "settings may use nothing"),
        ("engine.machine", "from rerank_kit.engine import plan", "a circle"),
    ],
)
def test_a_wrong_import_is_found(module, source, said):
    imports = all_imports()
    imports[module] = imports[module] | imports_of(source, module, False)
    assert any(said in fault for fault in faults(imports)), faults(imports)


def test_no_file_of_the_package_is_hidden_from_git():
    """.gitignore names a folder of weights as one of the rooms is called."""
    if not (KIT / ".git").exists():
        pytest.skip("no git checkout")
    command = ["git", "-C", str(KIT), "ls-files", "--others", "--ignored", "--exclude-standard", "rerank_kit", "tests"]
    hidden = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert [name for name in hidden if "__pycache__" not in name and not name.endswith(".pyc")] == []


def test_every_room_says_what_it_is():
    for file in PACKAGE.rglob("*.py"):
        assert ast.get_docstring(ast.parse(file.read_text("utf-8"))), file
    page = (KIT / "docs" / "architecture.md").read_text("utf-8")
    for room in MAY_USE:
        assert f"`{room}/`" in page or f"`{room}.py`" in page, room


def test_doors_hold_no_code_of_their_own():
    """A door re-exports, and runs its main(); it is read in a minute."""
    for name in ("env_utils", "resources", "model_utils", "main", "vllm_usage", "vllm_usage_tiny", "bench_rerank"):
        text = (KIT / f"{name}.py").read_text("utf-8")
        assert len(text.splitlines()) <= 100, name
        functions = [n.name for n in ast.parse(text).body if isinstance(n, ast.FunctionDef | ast.ClassDef)]
        assert set(functions) <= {"main", "__getattr__", "check"}, name

"""The order of a parallel run: what shares a server is one lane, what takes longest comes first (conftest.py)."""

import json
from types import SimpleNamespace

import conftest
import pytest
from conftest import FIRST, KIT, LANES_FOLDER, REAL


class Item:
    def __init__(self, file, *fixtures):
        self.path, self.fixturenames, self.nodeid = KIT / "tests" / f"{file}.py", fixtures, f"{file}::{fixtures}"


ITEMS = [
    Item("test_a"),
    Item("test_b", "tmp_path", "service"),
    Item("test_start_rerank", "kit"),
    Item("test_a", "keyed_service"),
    Item("test_supervisor", "kit"),
    Item("test_start_rerank", "service"),
    Item("test_a", "capsys"),
]
SORTED = [3, 1, 5, 4, 2, 0, 6]


def test_tests_of_a_real_server_are_one_lane_and_come_first(tmp_path):
    items, file = [*ITEMS], tmp_path / "lanes"
    conftest.pytest_collection_modifyitems(SimpleNamespace(workerinput={"lanes": str(file)}), items)
    assert items == [ITEMS[number] for number in SORTED]
    lanes = json.loads(file.read_text())
    real = ["real services", "forked services", "forked services"]
    assert [lanes[item.nodeid] for item in items] == [*real, "test_supervisor", "test_start_rerank", "test_a", "test_a"]


def test_a_run_without_lanes_keeps_its_order():
    items = [*ITEMS]
    conftest.pytest_collection_modifyitems(SimpleNamespace(), items)
    assert items == ITEMS


def test_the_scheduler_asks_for_the_lane(pytestconfig, tmp_path):
    pytest.importorskip("xdist")
    (tmp_path / "gw0").write_text(json.dumps({"tests/x.py::one": "real"}))
    config = SimpleNamespace(
        option=pytestconfig.option,
        getvalue=lambda name: ["popen"],
        stash={LANES_FOLDER: SimpleNamespace(name=str(tmp_path))},
    )
    before = pytestconfig.option.loadscopereorder
    try:
        scheduler = conftest.pytest_xdist_make_scheduler(config, None)
        assert scheduler._split_scope("tests/x.py::one") == "real"
        assert config.option.loadscopereorder is False, "the order is the one of the tests"
    finally:
        pytestconfig.option.loadscopereorder = before


def test_the_names_are_of_fixtures_and_files_that_exist():
    assert all(hasattr(conftest, name) for fixtures in REAL.values() for name in fixtures)
    names = {path.stem for path in (KIT / "tests").rglob("test_*.py")}
    assert set(FIRST) - set(REAL) <= names

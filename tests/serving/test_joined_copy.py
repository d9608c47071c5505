"""The weights of a model that is served as a joined copy: who makes it, and when."""

import os
import signal
import time
from types import SimpleNamespace

import pytest

from rerank_kit.models import served_folder
from rerank_kit.models.checkpoint import Checkpoint
from rerank_kit.models.profiles import load_profiles
from rerank_kit.serving import command, supervisor
from rerank_kit.settings import ConfigError, get_config


@pytest.fixture
def plan(tmp_path):
    checkpoint = Checkpoint(tmp_path / "ettin", {}, (), None)
    checkpoint.path.mkdir()
    profile = load_profiles()["modernbert_modules"]
    folder = tmp_path / "log" / "model-1"
    return SimpleNamespace(cfg=get_config(), checkpoint=checkpoint, profile=profile, engine={"model": str(folder)})


def begun(plan, monkeypatch, write) -> int:
    """The exit code of `supervisor begin`, with `write` in place of the copy."""

    def launch(cfg, script, supervise):
        assert (plan.folder / "model.safetensors").is_file(), "made before there is a supervisor"
        return 0

    plan.folder = command.Path(plan.engine["model"])
    monkeypatch.setattr(supervisor, "startable_plan", lambda cfg: plan)
    monkeypatch.setattr(supervisor, "launch", launch)
    monkeypatch.setattr(served_folder, "write_joined", write)
    return supervisor.begin(os.getpid())


def test_another_process_makes_the_copy_before_the_supervisor_is_there(plan, monkeypatch):
    assert begun(plan, monkeypatch, lambda checkpoint, target: target.write_text(str(os.getpid()))) == 0
    first = (plan.folder / "model.safetensors").read_text()
    assert int(first) != os.getpid()
    with pytest.raises(ChildProcessError):
        os.waitpid(int(first), os.WNOHANG)
    command.make_joined(plan)  # as the supervisor's own start and every restart
    assert (plan.folder / "model.safetensors").read_text() == first


def refuse(checkpoint, target):
    raise ConfigError("3_LayerNorm/model.safetensors is missing")


def killed(checkpoint, target):
    target.write_text("half")
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)


def no_memory(checkpoint, target):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (refuse, "3_LayerNorm/model.safetensors is missing"),
        (killed, "TERM came while encoder and head were joined"),
        (no_memory, "the process that joins encoder and head ended with code -9"),
    ],
)
def test_a_copy_that_fails_is_one_line_and_nothing_is_launched(plan, monkeypatch, capfd, write, said):
    assert begun(plan, monkeypatch, write) == 6
    # A library of another test (gRPC) has its own word on forks.
    lines = [line for line in capfd.readouterr().err.splitlines() if "fork_posix" not in line]
    assert len(lines) == 1 and lines[0].startswith(f"ConfigError: {said}")
    left = list(plan.folder.parent.iterdir())
    assert not plan.folder.exists() and (not left or write is no_memory)

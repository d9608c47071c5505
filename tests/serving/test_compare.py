"""What runs beside what is configured: `start` says a difference, `restart` stops nothing for a bad next one."""

import itertools
import json
import os
import signal

import pytest
from conftest import until
from fake_kit import FakeKit, alive
from tiny_models import bert_cross_encoder

from rerank_kit.serving import status as status_module
from rerank_kit.serving.compare import compare_running, differences, flags_of, key_mark, main
from rerank_kit.serving.status import memory_of_service, one_line
from rerank_kit.settings import EnvConfig


@pytest.fixture(scope="module")
def running(tmp_path_factory, checkpoints):
    """A service that the tests below share."""
    made = FakeKit(tmp_path_factory.mktemp("running"), checkpoints["qwen3"])
    assert made("start").returncode == 0
    yield made
    assert made("stop").returncode == 0


@pytest.fixture(scope="module")
def next_shell(shells):
    """Each shell in turn."""
    return itertools.cycle(shells)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"MODEL_PATH": "/no/such/model"}, "MODEL_PATH='/no/such/model' does not exist"),
        ({"TP": "two"}, "TP='two' (environment) is not an integer"),
        ({"MODEL_PROFILE": "none"}, "MODEL_PROFILE='none' is unknown"),
        ({"MAX_MODEL_LEN": 999999}, "MAX_MODEL_LEN=999999 is more than"),
        ({"HOST": "0.0.0.0"}, "opens the service to the network"),
        ({"HOST": "203.0.113.9", "API_KEY": "k"}, "HOST=203.0.113.9 (environment) is no address of this host"),
        ({"EXTRA_ARGS": "'open"}, "is not valid shell syntax"),
        ({"EXTRA_ARGS": "--host 0.0.0.0"}, "EXTRA_ARGS holds --host: take it out, set HOST"),
        ({"SSL_CERTFILE": "/no/such.pem"}, "belong together: set both"),
        ({"SSL_CERTFILE": "/no/such.pem", "SSL_KEYFILE": "/no/such.pem"}, "cannot be used: No such file"),
    ],
)
def test_restart_keeps_a_service_that_the_settings_could_not_start(running, next_shell, settings, said):
    pid, server = running.pid, running.server_pid
    done = running("restart", shell=next(next_shell), **settings)
    assert done.returncode == 6 and said in done.stderr, done.stdout + done.stderr
    assert alive(pid) and alive(server) and "stopping" not in done.stdout
    assert f"PID {pid}" in running("status").stdout


def test_restart_after_settings_that_could_not_start(running):
    pid = running.pid
    assert running("restart").returncode == 0 and running.pid != pid and not alive(pid)


def test_start_says_that_another_model_runs(kit, tmp_path, shells):
    other = bert_cross_encoder(tmp_path / "ms-marco-other")
    assert kit("start").returncode == 0
    pid = kit.pid
    for shell in shells:
        done = kit("start", shell=shell, MODEL_PATH=other)
        assert done.returncode == 1 and "already running" in done.stdout
        assert f"it runs {kit.settings['MODEL_PATH']}, the settings say {other}" in done.stderr
        assert '"sh start_rerank.sh restart" changes it' in done.stderr
    assert kit.pid == pid and kit("start").returncode == 0, "the same settings are no difference"
    changed = kit("start", MAX_NUM_SEQS=7, MAX_DOCS_PER_CALL=9)
    assert changed.returncode == 1
    assert "--max-num-seqs: it runs '128', the settings say '7'" in changed.stderr
    assert "GUARD_MAX_DOCS_PER_CALL: it runs '1000', the settings say '9'" in changed.stderr
    assert "--host" not in changed.stderr
    assert kit("restart", MODEL_PATH=other).returncode == 0
    status = kit("status", MODEL_PATH=other)
    assert f"({other}, profile cross_encoder, version " in status.stdout


def test_start_compares_what_is_neither_a_flag_nor_the_guards(kit, monkeypatch, capsys):
    """Variables of vLLM, what the supervisor follows, the key; and a GUARD_ variable of one's own is no difference."""
    same = {"API_KEY": "first-key", "GUARD_MAX_DOCS_PER_CALL": 5, "VLLM_LOGGING_LEVEL": "INFO"}
    assert kit("start", **same).returncode == 0
    same_again = kit("start", **same)
    assert same_again.returncode == 0, same_again.stderr
    assert "first-key" not in json.dumps(kit.state)
    for key, value in {**kit.settings, **same}.items():
        monkeypatch.setenv(key, str(value))
    assert main(["running"]) == 0, "the same in this process"
    for key, value, said in (
        ("VLLM_LOGGING_LEVEL", "DEBUG", "VLLM_LOGGING_LEVEL: it runs 'INFO', the settings say 'DEBUG'"),
        ("OMP_NUM_THREADS", "1", "OMP_NUM_THREADS: it runs 'without', the settings say '1'"),
        ("HEALTH_TIMEOUT_S", "7", "HEALTH_TIMEOUT_S: it runs '120', the settings say '7'"),
        ("RESTART", "no", "RESTART: it runs 'yes', the settings say 'no'"),
        ("API_KEY", "second-key", "API_KEY: it runs with another one"),
        ("API_KEY", "", "API_KEY: it runs with one, the settings have none"),
    ):
        with monkeypatch.context() as changed:
            changed.setenv(key, value)
            assert main(["running"]) == 1
        lines = capsys.readouterr().err.splitlines()
        assert f"[ERR] {said}" in lines and len(lines) == 1 + (key == "HEALTH_TIMEOUT_S") * lines[-1].count(
            "GUARD_HEALTH"
        )


def test_start_beside_a_running_service_asks_no_hub(kit):
    """The step after `demo`: a hub id that is not on this machine yet."""
    assert kit("start").returncode == 0
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9", "MODELSCOPE_DOMAIN": "http://127.0.0.1:9"}
    done = kit("start", MODEL_PATH="Qwen/Qwen3-Reranker-0.6B", **nowhere)
    assert done.returncode == 1 and "no hub" not in done.stderr, done.stderr
    assert f"it runs {kit.settings['MODEL_PATH']}, the settings say Qwen/Qwen3-Reranker-0.6B" in done.stderr


def test_start_beside_a_running_service_that_could_not_be_planned_again_warns(kit):
    assert kit("start").returncode == 0
    done = kit("start", MAX_MODEL_LEN=999999)
    assert done.returncode == 0 and "ready after" in done.stdout, done.stdout + done.stderr
    assert "[WARN] it runs, but the settings could not start it again: MAX_MODEL_LEN=999999" in done.stderr


def test_a_service_that_was_started_by_a_hub_id_is_known_by_it(monkeypatch, tmp_path, capsys):
    """Also where the hub's files are not in the cache of this user."""
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    cfg = EnvConfig(model_path="some/model", log_dir=str(tmp_path))
    known = {"model": "/cache/some--model", "source": "some/model"}
    monkeypatch.setattr("rerank_kit.serving.compare.known_state", lambda cfg: known)
    planned = []
    monkeypatch.setattr("rerank_kit.serving.compare.plan_beside", lambda cfg: planned.append(cfg.model_path))
    assert compare_running(cfg) == 0 and planned == ["/cache/some--model"]
    known["source"] = "other/model"
    assert compare_running(cfg) == 1
    assert "it runs /cache/some--model, the settings say some/model" in capsys.readouterr().err


def test_memory_of_a_service_whose_supervisor_was_killed_counts(kit):
    assert kit("start").returncode == 0
    cfg = EnvConfig(log_dir=str(kit.logs), port=int(kit.settings["PORT"]))
    before = memory_of_service(cfg)
    assert before > 0
    os.kill(kit.pid, signal.SIGKILL)
    until(lambda: not alive(kit.pid))
    assert 0 < memory_of_service(cfg) < before
    os.kill(kit.server_pid, signal.SIGKILL)
    until(lambda: not alive(kit.server_pid))
    assert memory_of_service(cfg) == 0 and status_module.known_state(cfg)


def test_a_key_is_known_by_its_mark_alone():
    mark = key_mark("secret")
    assert key_mark(None) == "" and "secret" not in mark and key_mark("secret") != mark
    assert key_mark("secret", mark.partition(":")[0]) == mark != key_mark("other", mark.partition(":")[0])


def test_start_says_that_an_instruction_has_changed(kit):
    assert kit("start", INSTRUCTION="first").returncode == 0
    done = kit("start", INSTRUCTION="second")
    assert done.returncode == 1 and "its template or INSTRUCTION have changed" in done.stderr, done.stderr


def test_start_without_a_model_finds_what_runs(kit):
    """As after `demo`, which names its model for itself alone."""
    assert kit("start").returncode == 0
    done = kit("start", MODEL_PATH="")
    assert done.returncode == 0 and "already running" in done.stdout, done.stderr


def test_flags_are_read_in_both_spellings():
    command = ["serve", "/m", "--a", "1", "--b=2", "--c", "--d", "x", "y"]
    assert flags_of(command) == {"--a": "1", "--b": "2", "--c": "", "--d": "x y"}


def test_a_state_of_an_older_kit_is_no_difference():
    assert differences(None, {}) == [] and differences(None, {"pid": 1}) == []


def test_one_line_names_what_it_knows():
    now = {"exit_code": 0, "state": "ready", "url": "u", "node": None, "pid": 1, "served_model_name": "m", "why": None}
    now |= dict.fromkeys(("uptime_s", "requests_running", "gpu_memory_mib", "memory_mib", "vllm", "died_at"))
    now |= {"restarts": 0, "supervised": True, "model": "/x", "profile": None, "version": None}
    assert one_line(now) == "ready: u, PID 1, model name m (/x)"
    assert one_line(now | {"profile": "p", "version": "v"}).endswith("model name m (/x, profile p, version v)")

"""What runs beside what is configured: `start` says a difference, `restart` stops nothing for a bad next one."""

import pytest
from fake_kit import alive
from tiny_models import bert_cross_encoder

from rerank_kit.serving.compare import differences, flags_of
from rerank_kit.serving.status import one_line


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"MODEL_PATH": "/no/such/model"}, "MODEL_PATH='/no/such/model' does not exist"),
        ({"TP": "two"}, "TP='two' (environment) is not an integer"),
        ({"MODEL_PROFILE": "none"}, "MODEL_PROFILE='none' is unknown"),
        ({"MAX_MODEL_LEN": 999999}, "MAX_MODEL_LEN=999999 is more than"),
        ({"HOST": "0.0.0.0"}, "opens the service to the network"),
        ({"EXTRA_ARGS": "'open"}, "is not valid shell syntax"),
        ({"SSL_CERTFILE": "/no/such.pem"}, "belong together: set both"),
        ({"SSL_CERTFILE": "/no/such.pem", "SSL_KEYFILE": "/no/such.pem"}, "cannot be used: No such file"),
    ],
)
def test_restart_keeps_a_service_that_the_settings_could_not_start(kit, shells, settings, said):
    assert kit("start").returncode == 0
    pid, server = kit.pid, kit.server_pid
    for shell in shells:
        done = kit("restart", shell=shell, **settings)
        assert done.returncode == 6 and said in done.stderr, done.stdout + done.stderr
        assert alive(pid) and alive(server) and "stopping" not in done.stdout
    status = kit("status")
    assert status.returncode == 0 and f"PID {pid}" in status.stdout
    assert kit("restart").returncode == 0 and kit.pid != pid


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

"""Configuration: one definition a key, argument > environment > .env > default, errors that name themselves."""

import os
import subprocess
import sys

import pytest
from conftest import KIT

from rerank_kit import settings
from rerank_kit.settings import ConfigError, EnvConfig, get_config, load_env


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def test_order_argument_environment_file_default(tmp_path, monkeypatch):
    env_file = write(tmp_path / ".env", "PORT=1001\nTP=3\n")
    assert get_config(env_file).port == 1001
    monkeypatch.setenv("PORT", "1002")
    assert get_config(env_file).port == 1002
    assert get_config(env_file, port=1003).port == 1003
    assert get_config(env_file).tp == 3
    assert get_config(env_file).host == "127.0.0.1"


def test_load_env_reads_what_people_write(tmp_path):
    text = "\ufeff# comment\r\nexport HOST = 0.0.0.0 # open\r\n"
    text += "INSTRUCTION='a # b'\r\nEXTRA_ARGS=\"--x 'y z'\" # c\r\nA=\r\n"
    env = load_env(write(tmp_path / ".env", text))
    assert env == {"HOST": "0.0.0.0", "INSTRUCTION": "a # b", "EXTRA_ARGS": "--x 'y z'", "A": ""}


def test_load_env_does_not_touch_the_environment(tmp_path):
    before = dict(os.environ)
    load_env(write(tmp_path / ".env", "PORT=1\nHF_TOKEN=x\n"))
    assert dict(os.environ) == before


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("PORT", ".env line 2 is not KEY=VALUE"),
        ("INSTRUCTION='open", "line 2: the quote of INSTRUCTION is not closed"),
    ],
)
def test_load_env_names_the_line(tmp_path, line, said):
    with pytest.raises(ConfigError) as caught:
        load_env(write(tmp_path / ".env", f"HOST=x\n{line}\n"))
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("MAX_MODEL_LEN", "4k", "MAX_MODEL_LEN='4k' (environment) is not an integer"),
        ("PORT", "99999", "PORT='99999' (environment) is out of range: allowed is 1 to 65535"),
        ("GPU_MEMORY_UTILIZATION", "nan", "GPU_MEMORY_UTILIZATION='nan' (environment) is not a finite number"),
        ("MAX_WAIT_S", "inf", "MAX_WAIT_S='inf' (environment) is not a finite number: limit on the estimated"),
        ("SLOW_CALL_MS", "-inf", "SLOW_CALL_MS='-inf' (environment) is not a finite number"),
        ("PORT", "9" * 400, "is out of range: allowed is 1 to 65535"),
        ("TIMEOUT_S", "Infinity", "TIMEOUT_S='Infinity' (environment) is not a finite number"),
        ("DTYPE", "bf16", "DTYPE='bf16' (environment) is unknown: allowed is auto, bfloat16"),
        ("TP", "0", "TP='0' (environment) is out of range: allowed is 1 or more"),
    ],
)
def test_bad_value_names_key_source_and_allowed(monkeypatch, key, value, said):
    monkeypatch.setenv(key, value)
    with pytest.raises(ConfigError) as caught:
        get_config()
    assert said in str(caught.value)


def test_all_bad_values_are_reported_at_once(monkeypatch):
    monkeypatch.setenv("PORT", "x")
    monkeypatch.setenv("TP", "y")
    with pytest.raises(ConfigError) as caught:
        get_config()
    assert "PORT='x'" in str(caught.value) and "TP='y'" in str(caught.value)


def test_api_key_comes_from_file_and_never_shows(tmp_path, monkeypatch):
    monkeypatch.setenv("API_KEY_FILE", str(write(tmp_path / "key", "s3cret\n")))
    cfg = get_config()
    assert cfg.api_key == "s3cret"
    assert "s3cret" not in repr(cfg) + settings._shell_values()
    monkeypatch.setenv("API_KEY", "has space")
    with pytest.raises(ConfigError) as caught:
        get_config()
    assert "has space" not in str(caught.value)


def test_api_key_file_missing_or_empty(tmp_path, monkeypatch):
    monkeypatch.setenv("API_KEY_FILE", str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="cannot be read"):
        get_config()
    monkeypatch.setenv("API_KEY_FILE", str(write(tmp_path / "key", " \n")))
    with pytest.raises(ConfigError, match="is empty"):
        get_config()


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:11438/v1"),
        ("0.0.0.0", "http://127.0.0.1:11438/v1"),
        ("::", "http://[::1]:11438/v1"),
        ("10.1.2.3", "http://10.1.2.3:11438/v1"),
    ],
)
def test_service_url_is_one_to_connect_to(monkeypatch, host, url):
    monkeypatch.setenv("HOST", host)
    assert get_config().service_url == url


def test_base_url_moves_clients_not_the_service(monkeypatch):
    monkeypatch.setenv("BASE_URL", "http://far:1/v1/")
    assert get_config().local_base_url == "http://far:1/v1"
    assert get_config().service_url == "http://127.0.0.1:11438/v1"


def test_unknown_key_gets_the_nearest_name(tmp_path):
    env_file = write(tmp_path / ".env", "MAX_NUM_SEQ=4\nHF_TOKEN=x\nPORT=2\n")
    assert settings.warnings_of(env_file) == ["MAX_NUM_SEQ in .env is not a setting: did you mean MAX_NUM_SEQS?"]
    assert settings.passed_on_env(env_file) == {"HF_TOKEN": "x"}


def test_python_in_the_file_has_no_effect_and_says_so(tmp_path, monkeypatch):
    env_file = write(tmp_path / ".env", "PYTHON=/opt/python\n")
    monkeypatch.setenv("PYTHON", "/usr/bin/python3")
    (said,) = settings.warnings_of(env_file)
    assert said.startswith("PYTHON in .env has no effect") and "set it in the environment" in said
    monkeypatch.setenv("PYTHON", "/opt/python")  # as systemd and compose set it from the same file
    assert settings.warnings_of(env_file) == []


def test_files_that_others_can_read_or_write_are_named(tmp_path, monkeypatch):
    env_file = write(tmp_path / "my.env", "PORT=1\n")
    key, tls = write(tmp_path / "key", "s3cret\n"), write(tmp_path / "tls.pem", "x")
    cfg = EnvConfig(api_key_file=str(key), ssl_keyfile=str(tls), ssl_certfile=str(tls))

    def said(*modes: int) -> list[str]:
        for file, mode in zip((env_file, key, tls), modes, strict=True):
            file.chmod(mode)
        return [text.replace(f"{tmp_path}/", "") for text in settings.permission_warnings(cfg, env_file)]

    assert said(0o644, 0o640, 0o600) == [], "without a secret .env may be read, and a group may read a key"
    assert said(0o600, 0o644, 0o604) == [
        "API_KEY_FILE: everybody on this host can read key: chmod o-rwx key",
        "SSL_KEYFILE: everybody on this host can read tls.pem: chmod o-rwx tls.pem",
    ]
    assert said(0o666, 0o602, 0o600) == [
        ".env: everybody on this host can write my.env: chmod o-rwx my.env",
        "API_KEY_FILE: everybody on this host can write key: chmod o-rwx key",
    ]
    for line, n in (("API_KEY=x", 1), ("HF_TOKEN=x", 1), ("RESULT_CACHE_URL=x", 1), ("API_KEY_FILE=key", 0)):
        write(env_file, f"{line}\n")
        assert len(said(0o644, 0o600, 0o600)) == n, line
    monkeypatch.setenv("KIT_ENV_FILE", str(write(env_file, "API_KEY=x\n")))
    assert "warn '.env: everybody on this host can read" in settings._shell_values(), "the script prints it"
    assert settings.permission_warnings(EnvConfig(api_key_file="/no/such"), tmp_path / "none") == []


@pytest.mark.parametrize("host", ["x86_64-conda-linux-gnu", "aarch64-conda-linux-gnu", "my-computer"])
def test_a_host_that_the_shell_exports_is_named_with_its_source(tmp_path, monkeypatch, host):
    monkeypatch.setenv("HOST", host)
    for ask in (settings._shell_values, lambda: settings.check_host(get_config(api_key="k", allow_no_key=1))):
        with pytest.raises(ConfigError, match=r"\(environment\) is not an address.*conda.*unset HOST") as caught:
            ask()
        assert host in str(caught.value) and "\n" not in str(caught.value)
    for good in ("127.0.0.1", "::1", "localhost", "0.0.0.0"):
        monkeypatch.setenv("HOST", good)
        settings.check_host(get_config())
    monkeypatch.setenv("HOST", "")
    settings.check_host(get_config(write(tmp_path / ".env", "HOST=gpu-host\n")))  # a name on purpose


def test_the_source_of_a_value(tmp_path, monkeypatch):
    env_file = write(tmp_path / ".env", "PORT=2\n")
    assert [settings.source_of(get_config(env_file, port=port), "PORT", env_file) for port in (None, 3)] == [
        ".env",
        "argument",
    ]
    assert settings.source_of(EnvConfig(), "PORT", tmp_path / "none") == "default"
    monkeypatch.setenv("PORT", "4")
    assert settings.source_of(get_config(env_file), "PORT", env_file) == "environment"


def test_a_relative_model_starts_at_the_kits_folder_from_everywhere(tmp_path, monkeypatch):
    monkeypatch.setattr(settings, "KIT_DIR", tmp_path / "kit")
    for folder in ("kit/models/a", "elsewhere/models/a", "elsewhere/models/b"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert settings.model_setting("models/a") == str(tmp_path / "kit/models/a")
    assert settings.model_setting("Qwen/Qwen3-Reranker-0.6B") == "Qwen/Qwen3-Reranker-0.6B"
    assert settings.model_setting(str(tmp_path / "elsewhere/models/b")) == str(tmp_path / "elsewhere/models/b")
    with pytest.raises(ConfigError, match=f"write MODEL_PATH={tmp_path}/elsewhere/models/b"):
        settings.model_setting("models/b")
    with pytest.raises(ConfigError, match="MODEL_PATH='~nouser/m': ~nouser is no user's home here"):
        settings.model_setting("~nouser/m")
    with pytest.raises(
        ConfigError, match=r"MODEL_PATH=.mm.* \(300 characters\)" r". cannot be looked up: File name too long"
    ):
        settings.model_setting("m" * 300)
    for broken in ({"log_dir": "~nouser/l"}, {"ssl_keyfile": "~nouser/k"}):
        with pytest.raises(ConfigError, match=r"(LOG_DIR|SSL_KEYFILE)='~nouser/"):
            cfg = EnvConfig(**broken)
            settings.permission_warnings(cfg), cfg.log_path


def test_shell_values_survive_nasty_text(monkeypatch, tmp_path):
    nasty = 'it\'s "$HOME" `x` \\ ; rm'
    monkeypatch.setenv("INSTRUCTION", nasty)
    script = settings._shell_values() + '\nprintf %s "$INSTRUCTION"'
    assert subprocess.run(["sh", "-c", script], capture_output=True, text=True).stdout == nasty


def test_model_path_unset_is_an_error_with_a_remedy(monkeypatch):
    monkeypatch.setattr(settings, "_cache", {})
    with pytest.raises(ConfigError, match="write MODEL_PATH="):
        _ = settings.MODEL_PATH
    assert settings.MODEL_PATH_TINY == "Qwen/Qwen3-Reranker-0.6B"


def test_import_does_nothing(tmp_path):
    """A broken .env must not break an import."""
    rooms = (
        "models.opened models.download engine.plan serving.command serving.health serving.supervisor offline.reranker"
    )
    names = ["env_utils", "vllm_usage", "vllm_usage_tiny", "rerank_kit", *(f"rerank_kit.{m}" for m in rooms.split())]
    code = f"import sys, {', '.join(names)}; "
    code += "print([m for m in ('torch', 'vllm', 'requests', 'aiohttp') if m in sys.modules])"
    env_file = write(tmp_path / ".env", "broken")
    env = {"KIT_ENV_FILE": str(env_file), "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", code], cwd=KIT, env=env, capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


def test_env_example_is_current_and_loads_to_the_defaults(tmp_path):
    text = (KIT / ".env.example").read_text("utf-8")
    assert text == settings.env_example(), "run: python docs/pages.py --write"
    lines = [line.removeprefix("#") if line[1:2].isupper() else line for line in text.splitlines()]
    assert get_config(write(tmp_path / ".env", "\n".join(lines))) == get_config()

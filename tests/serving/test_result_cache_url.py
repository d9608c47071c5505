"""RESULT_CACHE_URL on its way from the settings to the server: nobody else sees it, and a wrong one starts nothing."""

import subprocess
from pathlib import Path

import pytest
from fake_kit import FakeKit

from rerank_kit.engine import shared_cache
from rerank_kit.engine.shared_cache import check_shared_cache
from rerank_kit.settings import ConfigError, get_config

URL = "redis://user:s3cret%40word@127.0.0.1:1/2"


def test_only_the_server_gets_it(kit: FakeKit, tmp_path, monkeypatch):
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "redis.py").touch()  # the stand-in's Python has none
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "packages"))
    done = kit("start", RESULT_CACHE_URL=URL)
    assert done.returncode == 0, done.stderr
    environment = Path(f"/proc/{kit.server_pid}/environ").read_bytes().split(b"\0")
    names = [line.partition(b"=")[0] for line in environment if b"s3cret" in line]
    assert names == [b"GUARD_RESULT_CACHE_URL"] and f"GUARD_RESULT_CACHE_URL={URL}".encode() in environment
    seen = {"start": done.stdout + done.stderr}
    for action in ("cfg", "status", "logs"):
        seen[action] = "".join((said := kit(action, RESULT_CACHE_URL=URL)).stdout + said.stderr)
    seen["ps"] = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    seen |= {str(file): file.read_text("utf-8", "replace") for file in kit.logs.rglob("*") if file.is_file()}
    assert len(seen) > 6 and "RESULT_CACHE_URL=***" in seen["cfg"] and "GUARD_RESULT_CACHE_URL=***" in seen["cfg"]
    assert [name for name, text in seen.items() if "s3cret" in text] == []
    # `start` beside it compares without knowing it.
    assert kit("start", RESULT_CACHE_URL=URL).returncode == 0
    for other, said in ((URL + "9", "it runs with another one"), ("", "it runs with one, the settings have none")):
        done = kit("start", RESULT_CACHE_URL=other)
        assert done.returncode == 1 and f"RESULT_CACHE_URL: {said}" in done.stderr and "s3cret" not in done.stderr


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("redis://:s3cret/x@h", "RESULT_CACHE_URL=*** (environment) is not redis://[USER:PASSWORD@]HOST"),
        ("redis://s3cret?db=1", "may have ssl_ca_certs, ssl_certfile, ssl_keyfile behind its ?"),
        ("rediss://s3cret?ssl_ca_certs=/no/ca.pem", "(environment): ssl_ca_certs=/no/ca.pem is no file"),
    ],
)
def test_a_url_that_cannot_be_used_is_one_line(monkeypatch, url, said):
    monkeypatch.setenv("RESULT_CACHE_URL", url)
    with pytest.raises(ConfigError) as caught:
        check_shared_cache(get_config())
    assert said in str(caught.value) and "s3cret" not in str(caught.value) and "\n" not in str(caught.value)


def test_start_without_the_package_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(shared_cache, "find_spec", lambda name: None)
    check_shared_cache(get_config())
    with pytest.raises(
        ConfigError, match=r"needs the Python package redis: .* -m pip install -r .*requirements-redis.txt$"
    ):
        check_shared_cache(get_config(result_cache_url=URL))

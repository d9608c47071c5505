"""Whether the service may listen at its address: each refusal names the value, its source and the remedy."""

import errno
import socket

import pytest
from conftest import free_port

from rerank_kit.serving.network import _not_bound, check_network, check_port
from rerank_kit.settings import ConfigError, EnvConfig, get_config


def test_an_address_of_another_host_is_named(monkeypatch):
    monkeypatch.setenv("HOST", "203.0.113.9")  # TEST-NET-3 of RFC 5737, nobody's
    with pytest.raises(ConfigError) as caught:
        check_port(get_config(port=free_port()))
    assert "HOST=203.0.113.9 (environment) is no address of this host" in str(caught.value)
    assert "another process" not in str(caught.value)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (socket.gaierror(socket.EAI_NONAME, "Name or service not known"), "HOST=gpu (argument) is no address of this"),
        (PermissionError(errno.EACCES, "Permission denied"), "PORT=80 (argument) is for root alone: set one of 1024"),
        (OSError(errno.EADDRINUSE, "Address already in use"), "another process may listen there"),
    ],
)
def test_why_a_port_cannot_be_bound(error, said):
    text = _not_bound(EnvConfig(host="gpu", port=80), error)
    assert said in text and "\n" not in text


@pytest.mark.parametrize("more", [{}, {"api_key": "k"}, {"allow_no_key": 1}])
def test_a_host_of_the_shell_is_not_taken_for_an_open_service(monkeypatch, more):
    """Neither advice would help: to set a key, or to look for another process on the port."""
    monkeypatch.setenv("HOST", "x86_64-conda-linux-gnu")
    with pytest.raises(
        ConfigError, match=r"^HOST='x86_64-conda-linux-gnu' \(environment\) is not an address"
    ) as caught:
        check_network(get_config(**more))
    assert "API_KEY" not in str(caught.value)


def test_an_open_service_names_the_source_of_its_host(monkeypatch, tmp_path):
    env_file = tmp_path / "my.env"
    env_file.write_text("HOST=0.0.0.0\n")
    monkeypatch.setenv("KIT_ENV_FILE", str(env_file))
    with pytest.raises(ConfigError, match=r"^HOST=0\.0\.0\.0 \(\.env\) opens the service to the network"):
        check_network(get_config())
    check_network(get_config(api_key="k"))

"""docs/fleet.md, two GPU hosts: its lines in two network namespaces, nginx and Prometheus on this host."""

import os
import re
import shlex
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from conftest import KIT, free_port, http, kit_environment
from fake_kit import FakeKit
from fleet import KEY, Nginx
from test_deploy import unit_command
from test_observability import Prometheus

HOSTS = ("10.0.0.11", "10.0.0.12")


def recipe() -> str:
    text = (KIT / "docs" / "fleet.md").read_text()
    return text[text.index("## Two GPU hosts") : text.index("## What was measured")]


def block(kind: str) -> list[str]:
    """The lines of the one block of this kind."""
    (found,) = re.findall(rf"```{kind}\n(.*?)```", recipe(), re.S)
    return [line.strip() for line in found.strip().splitlines()]


def ip(*args: str) -> None:
    subprocess.run(["ip", *args], check=True, capture_output=True, text=True)


class Host:
    """A network namespace with one address, which this machine reaches by a cable of its own."""

    def __init__(self, number: int, fake: FakeKit):
        self.name, self.cable = f"kitH{os.getpid() % 10000}{number}", f"kc{os.getpid() % 10000}{number}"
        self.address, self.fake = f"10.79.{number}.2", fake
        ip("netns", "add", self.name)
        ip("link", "add", self.cable, "type", "veth", "peer", "name", "lan", "netns", self.name)
        for at, device, last in (((), self.cable, 1), (("-n", self.name), "lan", 2)):
            ip(*at, "addr", "add", f"10.79.{number}.{last}/24", "dev", device)
            ip(*at, "link", "set", device, "up")
        ip("-n", self.name, "link", "set", "lo", "up")
        self.server: subprocess.Popen | None = None

    def environment(self, **more) -> dict[str, str]:
        return kit_environment(**{**self.fake.settings, **more})

    def start(self) -> None:
        """As systemd does: ExecStart, then the first ExecStartPost, which waits until a probe was scored."""
        inside = ["ip", "netns", "exec", self.name]
        self.server = subprocess.Popen(
            [*inside, *shlex.split(unit_command("ExecStart"))],
            env=self.environment(),
            start_new_session=True,
            stdout=subprocess.DEVNULL,
        )
        waited = subprocess.run(
            [*inside, *shlex.split(unit_command("ExecStartPost"))],
            env=self.environment(MAINPID=self.server.pid),
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert waited.returncode == 0, waited.stdout + waited.stderr

    def stop(self) -> None:
        if self.server:
            self.server.terminate()
            self.server.wait(20)
        subprocess.run(["ip", "link", "del", self.cable], capture_output=True)
        subprocess.run(["ip", "netns", "del", self.name], capture_output=True)


@pytest.fixture
def hosts(tmp_path, checkpoints):
    if os.geteuid() or not shutil.which("ip"):
        pytest.skip("needs root and ip: apt install iproute2")
    made: list[Host] = []
    port, key = free_port(), tmp_path / "api_key"
    key.write_text(KEY + "\n")
    key.chmod(0o600)
    try:
        for number in (1, 2):
            fake = FakeKit(tmp_path / f"host{number}", checkpoints["qwen3"])
            env = "\n".join(line for line in block("ini") if not line.startswith("MODEL_PATH="))
            assert "HOST=0.0.0.0" in env and "PORT=11438" in env
            file = tmp_path / f"host{number}" / "rerank.env"
            file.write_text(env.replace("11438", str(port)) + "\n")
            del fake.settings["PORT"]
            fake.settings |= {"KIT_ENV_FILE": file, "API_KEY_FILE": key}
            made.append(Host(number, fake))
        for host in made:
            host.start()
        yield made, port
    finally:
        for host in made:
            host.stop()


def here(text: str, made: list[Host], port: int) -> str:
    for address, host in zip(HOSTS, made, strict=True):
        text = text.replace(f"{address}:11438", f"{host.address}:{port}")
    return text


def test_two_hosts_behind_nginx_and_prometheus(hosts, tmp_path):
    made, port = hosts
    nginx = Nginx(tmp_path / "nginx", [1], [1], tls=False)
    upstream = nginx.folder / "nginx-upstream.conf"
    one = "    server 127.0.0.1:1 max_fails=3 fail_timeout=10s;\n"
    lines = "".join(f"    {line}\n" for line in block("nginx"))
    upstream.write_text(upstream.read_text().replace(one, here(lines, made, port), 1))
    (targets,) = block("yaml")
    found = re.findall(r'"(.*?)"', here(targets, made, port))
    assert found == [f"{host.address}:{port}" for host in made]
    prometheus = Prometheus(tmp_path / "prometheus", found)
    body, key = {"query": "q", "documents": ["d"]}, {"Authorization": f"Bearer {KEY}"}
    nginx.start()
    try:
        assert http("POST", f"http://127.0.0.1:{nginx.port}/v1/rerank", {**body, "model": "m"})[0] == 401
        for _ in range(8):
            status, answer = http("POST", f"http://127.0.0.1:{nginx.port}/v1/rerank", {**body, "model": "m"}, key)
            assert status == 200 and answer["results"][0]["relevance_score"] == 0.5
        assert {line["replica"] for line in nginx.log() if line["status"] == 200} == set(found), "both are asked"
        prometheus.wait_for('sum(up{job="rerank"}) == 2', 60)

        ip("-n", made[0].name, "link", "set", "lan", "down")  # as a host whose network is gone
        began = time.monotonic()
        for _ in range(3):
            assert http("POST", f"http://127.0.0.1:{nginx.port}/v1/rerank", {**body, "model": "m"}, key)[0] == 200
        assert time.monotonic() - began < 40, "refused after proxy_connect_timeout, not after proxy_read_timeout"
        prometheus.wait_for('ALERTS{alertname="RerankDown", alertstate="pending"}', 60)
        assert not prometheus.ask('ALERTS{alertname="RerankAllDown"}')
    finally:
        nginx.stop()
        prometheus.stop()


def test_the_commands_of_the_recipe_exist():
    text = recipe()
    assert Path(KIT / "tests/deploy/test_two_hosts.py").samefile(__file__) and "tests/deploy/test_two_hosts.py" in text
    for link in re.findall(r"\]\(\.\./([\w/.]+)(#\w+)?\)", text):
        assert (KIT / link[0]).exists()
        if link[1]:
            assert f"\n## {link[1][1:]}\n" in (KIT / link[0]).read_text().lower()
    assert f"PORT={11438}" in text and all(f"{address}:11438" in text for address in HOSTS)

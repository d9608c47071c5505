"""Shared fixtures: seeded tiny checkpoints and one real service for the whole session."""

import gc
import importlib
import itertools
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import warnings
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from rerank_kit import settings
from rerank_kit.client import one_call
from rerank_kit.client.sessions import SharedResources

KIT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(Path(__file__).parent / "stand_ins"), str(Path(__file__).parent)]


class Later:
    """A module that is imported at its first use: each process collects all tests, and torch and vLLM take seconds."""

    def __init__(self, name: str):
        self._name = name

    def __getattr__(self, attribute: str):
        if attribute.startswith("_"):  # pytest looks at all that a test file holds
            raise AttributeError(attribute)
        return getattr(importlib.import_module(self._name), attribute)


# Variables of the developer's own shell that would change what is tested.
SETTINGS = {*settings.FIELDS, *settings.CLIENTS_OWN, "VLLM_API_KEY", "KIT_ENV_FILE"}


# pytest -n 4: what uses one of these fixtures is run by one process, one fixture after the other; a file is run by one
# process too. Two of them run real servers: more would wait for each other's cores. The others run what sleeps.
# (--dist loadgroup of xdist 3.8 does nothing under pytest 9.2: findings/xdist_loadgroup_pytest9.sh.)
REAL = {
    "real services": ("keyed_service", "fleet", "demo"),
    "forked services": ("fork_server", "service"),
}
# What takes longest comes first.
FIRST = (*REAL, "test_supervisor", "test_start_rerank", "test_one_service", "test_compare", "test_nodes")


def _lane(item) -> tuple[str, int]:
    """(what one process runs, place in it)."""
    for lane, fixtures in REAL.items():
        for place, name in enumerate(fixtures):
            if name in item.fixturenames:
                return lane, place
    return item.path.stem, 0


def pytest_collection_modifyitems(config, items):
    """Sort the tests by lane, and tell the process that deals them out."""
    if not hasattr(config, "workerinput"):
        return
    lanes = {item: _lane(item) for item in items}
    order = {lane: number for number, lane in enumerate(FIRST)}
    items.sort(key=lambda item: (order.get(lanes[item][0], len(FIRST)), lanes[item][1]))
    file = Path(config.workerinput["lanes"])
    file.write_text(json.dumps({item.nodeid: lane for item, (lane, _) in lanes.items()}))


def pytest_collection_finish(session):
    loaded = {"torch", "vllm"} & set(sys.modules)
    assert not (loaded and hasattr(session.config, "workerinput")), f"a test file imports {loaded}: use conftest.Later"


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node):
    if LANES_FOLDER not in node.config.stash:
        node.config.stash[LANES_FOLDER] = tempfile.TemporaryDirectory()
        node.config.add_cleanup(node.config.stash[LANES_FOLDER].cleanup)
    node.workerinput["lanes"] = f"{node.config.stash[LANES_FOLDER].name}/{node.gateway.id}"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    from xdist.scheduler import LoadScopeScheduling

    class ByLane(LoadScopeScheduling):
        lanes = None

        def _split_scope(self, nodeid):
            if not self.lanes:
                self.lanes = json.loads(next(Path(config.stash[LANES_FOLDER].name).iterdir()).read_text())
            return self.lanes[nodeid]

    config.option.loadscopereorder = False
    return ByLane(config, log)


LANES_FOLDER = pytest.StashKey[tempfile.TemporaryDirectory]()


@pytest.fixture(autouse=True)
def ctrl_c_is_heard():
    """A shell ignores SIGINT for what it runs in the background, and children inherit it; --tune keeps its handler."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGQUIT, signal.SIG_DFL)


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch, tmp_path):
    """No setting of this shell or of a .env beside the kit reaches a test."""
    for key in [*SETTINGS, *(key for key in os.environ if key.startswith("GUARD_"))]:
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("KIT_ENV_FILE", str(tmp_path / "no.env"))


@pytest.fixture(scope="module", autouse=True)
def nothing_is_left_open():
    """A socket or file that nobody closed is found in the module that left it, not by chance in a later one."""
    yield
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ResourceWarning)
        gc.collect()
    left = [str(warning.message) for warning in caught if issubclass(warning.category, ResourceWarning)]
    assert not left, f"left to the garbage collector: {left}"


@pytest.fixture(autouse=True)
def closed_sessions():
    """The client's connections end with their test, and what it knows of a server: ports come again."""
    yield
    SharedResources.close_local_rerank_client()
    SharedResources._endpoints.clear()
    one_call._aliases.clear()


def _ports():
    """Ports for the tests of this process: none that the kernel gives to a connection, none of another process's."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:])
    low = 12_000 + worker % 4 * 5_000
    start = os.getpid() * 100 % 5_000
    return (low + (start + n) % 5_000 for n in itertools.count())


_next_port = _ports()


def free_port() -> int:
    for port in _next_port:
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def until(what, timeout_s: float = 90):
    """Wait until what() is true, and give that value back."""
    end = time.monotonic() + timeout_s
    while not (value := what()):
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)
    return value


def kit_environment(**settings) -> dict[str, str]:
    """Environment of a kit program: this Python serves, only the given settings are set."""
    env = {k: v for k, v in os.environ.items() if k not in SETTINGS}
    return {
        **env,
        "PYTHON": sys.executable,
        "KIT_ENV_FILE": "/nonexistent/.env",
        **{k: str(v) for k, v in settings.items()},
    }


def copy_kit(target: Path) -> Path:
    """A copy of what a user has, without environments, models, logs, tests."""
    target.mkdir(parents=True)
    for pattern in ("*.py", "*.sh", "requirements*.txt", "pyproject.toml", "README.md"):
        for file in KIT.glob(pattern):
            shutil.copy(file, target)
    for room in ("rerank_kit", "profiles"):
        shutil.copytree(KIT / room, target / room, ignore=shutil.ignore_patterns("__pycache__"))
    return target


def self_signed(folder: Path) -> dict[str, str]:
    """SSL_CERTFILE and SSL_KEYFILE of a new certificate for localhost."""
    files = {"SSL_CERTFILE": str(folder / "cert.pem"), "SSL_KEYFILE": str(folder / "key.pem")}
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    command += [
        "-addext",
        "subjectAltName=DNS:localhost",
        "-out",
        files["SSL_CERTFILE"],
        "-keyout",
        files["SSL_KEYFILE"],
    ]
    subprocess.run(command, check=True, capture_output=True)
    return files


def run_kit(
    *args: str, shell: str = "dash", timeout_s: float = 300, cwd: Path | str = "/", folder: Path = KIT, **settings
):
    """Run `start_rerank.sh ARGS` of a folder under a shell; the finished process with its output as text."""
    command = [*shell.split(), str(folder / "start_rerank.sh"), *args]
    env = kit_environment(**settings)
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout_s, cwd=cwd)


def http(method: str, url: str, body: dict | None = None, headers: dict | None = None, timeout_s: float = 60):
    """(status, parsed JSON or text) of one call without the kit's client."""
    data = json.dumps(body).encode() if body is not None else None
    request = urllib.request.Request(url, data, {"Content-Type": "application/json", **(headers or {})}, method=method)
    try:
        # The certificates of the tests are self-signed; tests of the client check them.
        handlers = (
            urllib.request.ProxyHandler({}),
            urllib.request.HTTPSHandler(context=ssl._create_unverified_context()),
        )
        with urllib.request.build_opener(*handlers).open(request, timeout=timeout_s) as answer:
            status, text = answer.status, answer.read().decode()
    except urllib.error.HTTPError as exc:
        status, text = exc.code, exc.read().decode()
    try:
        return status, json.loads(text)
    except ValueError:
        return status, text


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    """Seeded tiny checkpoints of each family; the folders are named as the real ones."""
    import tiny_models

    root = tmp_path_factory.mktemp("checkpoints")
    original = tiny_models.qwen3_reranker(root / "Qwen3-Reranker-tiny")
    return {
        "qwen3": original,
        "qwen3_untied": tiny_models.qwen3_reranker(root / "Qwen3-Reranker-untied", tied=False),
        "qwen3_seq_cls": tiny_models.qwen3_seq_cls(root / "Qwen3-Reranker-seq-cls", original),
        "bert": tiny_models.bert_cross_encoder(root / "ms-marco-tiny"),
    }


@pytest.fixture(scope="session")
def fork_server():
    """A process that has imported vLLM; what it runs starts many seconds sooner (forking_vllm.py)."""
    from forking_vllm import ForkServer

    server = ForkServer(kit_environment())
    yield server
    server.stop()


@pytest.fixture(scope="session")
def forked_python(fork_server, tmp_path_factory) -> Path:
    """PYTHON of a service that nobody kills: its `vllm serve` runs in a fork, outside the supervisor's session."""
    return fork_server.environment(tmp_path_factory.mktemp("forked") / "env")


@pytest.fixture(scope="session")
def quick_python(tmp_path_factory) -> Path:
    """PYTHON of a service whose `vllm serve` imports vLLM once and forks its engine and workers."""
    from forking_vllm import quick_environment

    return quick_environment(tmp_path_factory.mktemp("quick") / "env")


@dataclass
class Service:
    """A real service under test."""

    port: int
    model: Path
    settings: dict

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@pytest.fixture(scope="session")
def service(checkpoints, tmp_path_factory):
    """One real `vllm serve` of the tiny Qwen3-Reranker in float32, started and stopped by the script."""
    logs = tmp_path_factory.mktemp("logs with spaces")
    settings = {
        "MODEL_PATH": checkpoints["qwen3"],
        "PORT": free_port(),
        "LOG_DIR": logs,
        "DTYPE": "float32",
        "MAX_MODEL_LEN": 1024,
        "STOP_TIMEOUT_S": 10,
        "ALLOW_PATHS": "/openapi.json",  # test_fuzz.py makes its bodies from it
    }
    started = run_kit("start", **settings)
    assert started.returncode == 0, started.stdout + started.stderr
    yield Service(settings["PORT"], checkpoints["qwen3"], settings)
    stopped = run_kit("stop", **settings)
    assert stopped.returncode == 0, stopped.stdout + stopped.stderr


@dataclass
class Demo:
    """What the demo left: a copy of the kit with its service, and the environment of an empty shell beside it."""

    folder: Path
    env: dict[str, str]
    port: int
    done: subprocess.CompletedProcess


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    """`sh start_rerank.sh demo` in a copy of the kit, from a shell that knows the installed Python alone."""
    folder = copy_kit(tmp_path_factory.mktemp("newcomer") / "rerank kit")
    (KIT / "models").mkdir(exist_ok=True)  # what was downloaded once is not downloaded again
    (folder / "models").symlink_to(KIT / "models")
    env = {
        name: os.environ[name] for name in ("HOME", "PATH", "PIP_INDEX_URL", "PIP_CONFIG_FILE") if name in os.environ
    }
    env["PYTHON"] = sys.executable
    port = free_port()
    (folder / ".env").write_text(f"PORT={port}\n")
    run = ["sh", "start_rerank.sh"]
    done = subprocess.run([*run, "demo"], cwd=folder, env=env, capture_output=True, text=True, timeout=300)
    yield Demo(folder, env, port, done)
    subprocess.run([*run, "stop"], cwd=folder, env=env, check=True, capture_output=True, timeout=100)


@pytest.fixture(scope="session")
def keyed_service(checkpoints, quick_python, tmp_path_factory):
    """Settings of a second real service with TLS, a key and two engines, open to the network.

    test_integrations.py calls it; then test_keyed_service.py kills it, and last stops it.
    """
    settings = {
        **self_signed(tmp_path_factory.mktemp("tls")),
        "HOST": "0.0.0.0",
        "API_KEY": "a-key-that-nobody-may-see",
        "MODEL_PATH": checkpoints["qwen3"],
        "PORT": free_port(),
        "LOG_DIR": tmp_path_factory.mktemp("logs"),
        "DTYPE": "float32",
        "MAX_MODEL_LEN": 512,
        "STOP_TIMEOUT_S": 10,
        "HEALTH_TIMEOUT_S": 12,
        "STARTUP_CHECK": 0,
        "ENGINES_PER_GPU": 2,
        "API_SERVER_COUNT": 1,
        "PYTHON": quick_python,
    }
    started = run_kit("start", **settings)
    assert started.returncode == 0, started.stdout + started.stderr
    yield settings
    assert run_kit("stop", **settings).returncode == 0


@pytest.fixture(scope="session")
def fleet(checkpoints, quick_python, tmp_path_factory):
    """Two real services with a key behind a real nginx (http and TLS), and a collector of their traces (fleet.py)."""
    from fleet import Fleet
    from otlp_collector import Collector

    collector = Collector()
    folder = tmp_path_factory.mktemp("fleet")
    made = Fleet(folder, checkpoints["qwen3"], **tracing(collector.url), PYTHON=quick_python)
    made.collector, made.other_model = collector, checkpoints["qwen3_untied"]
    try:
        yield made.start()
    finally:
        made.stop()
        collector.server.stop(0)


@pytest.fixture
def fleet_client(fleet, monkeypatch):
    """The kit's client of this process knows the key and trusts nginx's certificate."""
    from fleet import use_client

    monkeypatch.setitem(settings._cache, "CLIENT", settings.CLIENT)
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", fleet.nginx.certificate)
    use_client()


def tracing(url: str) -> dict[str, str]:
    """Settings of a service that exports the spans of calls whose caller traces them."""
    env = {"OTEL_TRACES_SAMPLER": "parentbased_always_off", "OTEL_BSP_SCHEDULE_DELAY": "300"}
    return {**env, "EXTRA_ARGS": f"--otlp-traces-endpoint {url}"}


@pytest.fixture
def kit(tmp_path, checkpoints):
    """The kit with the stand-in (fake_kit.py); nothing of it outlives the test."""
    from fake_kit import FakeKit, session_of

    made = FakeKit(tmp_path, checkpoints["qwen3"])
    yield made
    pids = session_of(made.pid) if made.pid_file.exists() else []
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


@pytest.fixture(scope="session")
def shells() -> list[str]:
    """The shells that start_rerank.sh must run under and that this machine has."""
    found = [s for s in ("dash", "busybox sh", "bash --posix") if shutil.which(s.split()[0])]
    assert found, "no shell to test with"
    return found

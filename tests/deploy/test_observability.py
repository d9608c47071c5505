"""Prometheus, alerts, dashboard, traces: promtool and a real Prometheus on two real services, an OTLP collector."""

import json
import re
import shutil
import subprocess
import time
import urllib.parse
from pathlib import Path

import pytest
import yaml
from conftest import KIT, free_port, http
from fake_kit import alive, session_of
from fleet import KEY

DEPLOY = KIT / "deploy"
GPU = re.compile(r"DCGM_\w+")  # of dcgm-exporter; there is no GPU here
METRIC = re.compile(r"\b(?:rerank_guard_|vllm:|DCGM_FI_)\w+")


def program(name: str) -> str:
    found = shutil.which(name)
    if not found:
        pytest.skip(f"{name} is not installed: apt install prometheus")
    return found


def promtool(*args: str | Path) -> subprocess.CompletedProcess:
    return subprocess.run([program("promtool"), *map(str, args)], capture_output=True, text=True, timeout=60)


def configuration(folder: Path, targets: list[str], key: str = KEY, **changes: str) -> Path:
    """deploy/prometheus.yml for other targets, with all that belongs beside it."""
    text = (DEPLOY / "prometheus.yml").read_text()
    for old, new in {'"127.0.0.1:11438", "127.0.0.1:11439"': json.dumps(targets)[1:-1], **changes}.items():
        assert old in text
        text = text.replace(old, new)
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(DEPLOY / "alerts.yml", folder)
    (folder / "rerank_api_key").write_text(key)
    (folder / "prometheus.yml").write_text(text)
    return folder / "prometheus.yml"


def rules() -> list[dict]:
    return yaml.safe_load((DEPLOY / "alerts.yml").read_text())["groups"][0]["rules"]


def dashboard() -> dict:
    return json.loads((DEPLOY / "grafana-dashboard.json").read_text())


def panels() -> list[dict]:
    return [panel for panel in dashboard()["panels"] if panel["type"] != "row"]


# --- the files --------------------------------------------------------------------------------------------------------


def test_configuration_and_rules_are_valid(tmp_path):
    done = promtool("check", "config", configuration(tmp_path, ["127.0.0.1:1"]))
    assert done.returncode == 0, done.stdout + done.stderr
    (tmp_path / "rerank_api_key").unlink()
    assert "rerank_api_key" in promtool("check", "config", tmp_path / "prometheus.yml").stderr


def test_alerts_fire_when_they_should():
    done = promtool("test", "rules", Path(__file__).with_name("alerts_test.yml"))
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_is_tested(tmp_path):
    """Each one's unit test fails when its rule can no longer fire."""
    group = yaml.safe_load((DEPLOY / "alerts.yml").read_text())
    for rule in group["groups"][0]["rules"]:
        rule["expr"] = "vector(0) > 1"
        assert rule["labels"]["severity"] in ("page", "ticket") and set(rule["annotations"]) == {"summary", "action"}
    (tmp_path / "alerts.yml").write_text(yaml.safe_dump(group, allow_unicode=True))
    tests = Path(__file__).with_name("alerts_test.yml").read_text().replace("../../deploy/alerts.yml", "alerts.yml")
    (tmp_path / "test.yml").write_text(tests)
    done = promtool("test", "rules", tmp_path / "test.yml")
    failed = set(re.findall(r"alertname: (\w+),", done.stdout + done.stderr))
    assert done.returncode == 1 and failed == {rule["alert"] for rule in rules()}


def test_the_operators_files_are_those_of_prometheus(tmp_path):
    """podmonitor.yaml and prometheusrule.yaml beside prometheus.yml, alerts.yml and the pods of kubernetes.yaml."""
    rule = yaml.safe_load((DEPLOY / "prometheusrule.yaml").read_text())
    assert rule["kind"] == "PrometheusRule" and rule["spec"] == yaml.safe_load((DEPLOY / "alerts.yml").read_text())
    command = re.search(r"^#   (sed .*) alerts\.yml$", (DEPLOY / "prometheusrule.yaml").read_text(), re.M)[1]
    made = subprocess.run(f"{command} alerts.yml", shell=True, cwd=DEPLOY, capture_output=True, text=True).stdout
    assert (DEPLOY / "prometheusrule.yaml").read_text().endswith(made) and made.startswith("  groups:")
    (tmp_path / "rules.yml").write_text(yaml.safe_dump(rule["spec"], allow_unicode=True))
    done = promtool("check", "rules", tmp_path / "rules.yml")
    assert done.returncode == 0, done.stdout + done.stderr

    monitor = yaml.safe_load((DEPLOY / "podmonitor.yaml").read_text())
    assert (monitor["kind"], monitor["apiVersion"]) == ("PodMonitor", rule["apiVersion"])
    pods = yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())
    pod = next(m for m in pods if m["kind"] == "Deployment")["spec"]["template"]
    labels = pod["metadata"]["labels"]
    assert monitor["spec"]["selector"]["matchLabels"].items() <= labels.items()
    # The operator's rule: the job is the value of that label of the pod.
    (job,) = {c["job_name"] for c in yaml.safe_load((DEPLOY / "prometheus.yml").read_text())["scrape_configs"]} - {
        "gpu"
    }
    assert labels[monitor["spec"]["jobLabel"]] == job
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    assert endpoint["port"] in {p["name"] for p in pod["spec"]["containers"][0]["ports"]}
    secret = next(v["secret"] for v in pod["spec"]["volumes"] if "secret" in v)
    assert endpoint["authorization"]["credentials"] == {"name": secret["secretName"], "key": "api_key"}


def test_dashboard_has_grafanas_structure():
    """Every field survives the way through Grafana's own schema types: a name that they do not know would be lost."""
    sdk = pytest.importorskip("grafana_foundation_sdk.models.dashboard")
    from grafana_foundation_sdk.cog import encoder, plugins

    plugins.register_default_plugins()
    whole = dashboard()
    back = json.loads(encoder.JSONEncoder().encode(sdk.Dashboard.from_json(whole)))
    assert lost(whole, back) == []
    broken = json.loads(json.dumps(whole))
    broken["panels"][1]["fieldConfig"]["defaults"]["unitt"] = "s"
    back = json.loads(encoder.JSONEncoder().encode(sdk.Dashboard.from_json(broken)))
    assert lost(broken, back) == ["/panels/1/fieldConfig/defaults/unitt"]


def lost(sent, back, path: str = "") -> list[str]:
    """Paths of the values of `sent` that are not in `back`."""
    if isinstance(sent, dict):
        empty = (None, [], {}, "")
        return [
            place
            for key, value in sent.items()
            for place in (
                lost(value, back[key], f"{path}/{key}")
                if isinstance(back, dict) and key in back
                else [f"{path}/{key}"] * (value not in empty)
            )
        ]
    if isinstance(sent, list) and isinstance(back, list) and len(sent) == len(back):
        return [place for i, (a, b) in enumerate(zip(sent, back, strict=True)) for place in lost(a, b, f"{path}/{i}")]
    return [] if sent == back else [path]


def test_dashboard_panels_have_their_own_place():
    whole = dashboard()
    assert len({panel["id"] for panel in whole["panels"]}) == len(whole["panels"])
    taken = set()
    for panel in whole["panels"]:
        place = panel["gridPos"]
        columns, rows = range(place["x"], place["x"] + place["w"]), range(place["y"], place["y"] + place["h"])
        cells = {(x, y) for x in columns for y in rows}
        assert place["x"] + place["w"] <= 24 and not cells & taken, panel["title"]
        taken |= cells
    for panel in panels():
        assert panel["title"] and panel["targets"], panel
        for target in panel["targets"]:
            assert target["datasource"]["uid"] == "${datasource}"
            assert GPU.search(target["expr"]) or 'instance=~"$instance"' in target["expr"], target["expr"]


# --- real services ----------------------------------------------------------------------------------------------------


class Prometheus:
    """A real Prometheus with the kit's configuration, which asks once a second."""

    def __init__(self, folder: Path, targets: list[str], **options):
        every = {"scrape_interval: 15s": "scrape_interval: 1s", "evaluation_interval: 15s": "evaluation_interval: 1s"}
        self.config = configuration(folder, targets, **options, **every)
        self.url = f"http://127.0.0.1:{free_port()}"
        command = [program("prometheus"), f"--config.file={self.config}", f"--storage.tsdb.path={folder}/data"]
        self.log = (folder / "log").open("w")
        self.process = subprocess.Popen(
            [*command, f"--web.listen-address={self.url.removeprefix('http://')}"], stdout=self.log, stderr=self.log
        )

    def ask(self, expr: str) -> list[dict]:
        status, answer = http("GET", f"{self.url}/api/v1/query?query={urllib.parse.quote(expr)}")
        assert status == 200, (expr, answer)
        return answer["data"]["result"]

    def wait_for(self, expr: str, timeout_s: float = 90) -> list[dict]:
        end = time.monotonic() + timeout_s
        while True:
            try:
                if found := self.ask(expr):
                    return found
            except OSError:
                assert self.process.poll() is None, self.log.name
            assert time.monotonic() < end, f"no result: {expr}"
            time.sleep(0.3)

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(20)
        self.log.close()


@pytest.mark.server
def test_every_panel_and_every_metric_has_data(fleet, fleet_client, tmp_path):
    from rerank_kit.client.calls import rerank
    from rerank_kit.client.errors import RerankHTTPError

    targets = [f"127.0.0.1:{replica.port}" for replica in fleet.replicas]
    prometheus = Prometheus(tmp_path, targets)
    stranger = Prometheus(tmp_path / "stranger", targets, key="wrong")
    try:
        prometheus.wait_for('sum(up{job="rerank"}) == 2')
        for turn in range(6):  # seconds apart, so that rates have something to see
            for replica in fleet.replicas:
                documents = [f"{turn} gravity {i}" for i in range(20)] + ["word " * 600]
                rerank("capital of china", documents, base_url=replica.url)
                with pytest.raises(RerankHTTPError):
                    rerank("q", ["d" * 600_000], base_url=replica.url)
            time.sleep(1.2)
        empty = []
        for panel in panels():
            for target in panel["targets"]:
                expr = target["expr"].replace("$__rate_interval", "1m").replace("$instance", ".*")
                found = prometheus.ask(expr)
                finite = [row for row in found if row["value"][1] != "NaN"]
                if bool(finite) == bool(GPU.search(expr)):
                    empty.append((panel["title"], expr, found))
        assert not empty, "no data where there should be, or data of a GPU that is not here"
        for rule in rules():
            for name in METRIC.findall(rule["expr"]):
                assert prometheus.ask(name) or GPU.search(name), f"{rule['alert']}: nobody exports {name}"
        cut = prometheus.ask("sum(rerank_guard_cut_documents_total)")
        assert float(cut[0]["value"][1]) >= 12
        versions = {row["metric"]["version"] for row in prometheus.ask("rerank_guard_version")}
        assert versions == {replica.version for replica in fleet.replicas}
        stranger.wait_for('sum(up{job="rerank"}) == 0')
        stranger.wait_for('ALERTS{alertname="RerankDown", alertstate="pending"}')
    finally:
        prometheus.stop()
        stranger.stop()


@pytest.mark.server
def test_one_trace_from_the_caller_through_nginx_to_the_engine(fleet, fleet_client):
    """The caller's span is the parent of vLLM's, one a pair; nginx and the log of slow calls name the same trace."""
    from opentelemetry.sdk.trace import TracerProvider

    from rerank_kit.client.calls import rerank

    tracer = TracerProvider().get_tracer("caller")
    with tracer.start_as_current_span("search") as span:
        rerank("capital", ["The capital of China is Beijing.", "Gravity"], base_url=fleet.nginx.urls[1])
    context = span.get_span_context()
    spans = fleet.collector.wait_for(2, context.trace_id)
    assert {int.from_bytes(span.parent_span_id) for span in spans} == {context.span_id}
    assert {span.name for span in spans} == {"llm_request"} and len(spans) == 2
    tokens = {a.key: a.value.int_value for a in spans[0].attributes}["gen_ai.usage.prompt_tokens"]
    assert tokens > 3
    line = next(line for line in fleet.nginx.log() if line["trace"] == f"{context.trace_id:032x}")
    assert line["path"] == "/v1/rerank" and line["status"] == 200
    for one in spans:  # shown in docs/fleet.md
        attributes = {a.key: a.value.int_value or a.value.double_value or a.value.string_value for a in one.attributes}
        print(f"{one.name} parent={one.parent_span_id.hex()} span={one.span_id.hex()} {attributes}")
    print(f"caller: trace={context.trace_id:032x} span={context.span_id:016x}; nginx: {line}")
    n_spans = len(fleet.collector.spans)
    rerank("capital", ["Gravity"], base_url=fleet.nginx.urls[0])  # a caller that does not trace
    time.sleep(1)
    assert len(fleet.collector.spans) == n_spans


@pytest.mark.server
def test_the_fleet_stops_and_leaves_nothing(fleet):
    """Last in the last file that uses it: two idle services would slow down what comes after."""
    pids = [pid for replica in fleet.replicas for pid in session_of(replica.leader)]
    assert len(pids) >= 8, "two supervisors, API processes, engines and workers"
    fleet.stop()
    assert not any(map(alive, pids))

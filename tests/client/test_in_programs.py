"""The client inside somebody's program: its environment, its Ctrl-C, its log, its mocks and its traces."""

# ruff: noqa: F401, F811 (a fixture is imported, then named as an argument)

import json
import logging
import os
import signal
import subprocess
import sys
import time

import pytest
import requests
from conftest import KIT, free_port
from fault_server import DOCS, RIGHT, client, config, reply, serve, slow, status

from rerank_kit import settings
from rerank_kit.client.calls import RerankItem, rerank, score
from rerank_kit.client.errors import RerankConnectionError, RerankError, RerankHTTPError, RerankTimeout
from rerank_kit.client.sessions import base_urls

pytestmark = pytest.mark.timeout(60)
URL = "http://rerank.test:11438/v1"
ANSWER = {"model": "qwen3-reranker", "results": [{"index": 0, "relevance_score": 0.9}]}


def dead_url() -> str:
    return f"http://127.0.0.1:{free_port()}/v1"


# ---- the environment ----


@pytest.fixture
def program(monkeypatch, tmp_path):
    """program(.env, **environment): the client's configuration in a program with that environment."""

    def set_up(env_file="", **environment):
        (tmp_path / "kit.env").write_text(env_file)
        monkeypatch.setenv("KIT_ENV_FILE", str(tmp_path / "kit.env"))
        for key, value in environment.items():
            monkeypatch.setenv(key, value)
        monkeypatch.setattr(settings, "_cache", {})
        return settings.CLIENT

    return set_up


FOREIGN = {"PORT": "tcp://10.0.0.1:80", "HOST": "x86_64-conda-linux-gnu", "API_KEY": "the-programs-own"}
FOREIGN |= {"RESTART": "always", "DTYPE": "int", "TP": "two", "API_KEY_FILE": "/no/such/file", "SSL_CERTFILE": "/no"}


def test_a_programs_own_variables_do_not_reach_the_client(program, serve):
    cfg = program(**FOREIGN)
    assert cfg.local_base_url == "http://127.0.0.1:11438/v1" and cfg.api_key is None
    server = serve()
    assert rerank("q", DOCS, base_url=server.url)[1] == RIGHT
    assert "authorization" not in server.requests[0].headers


def test_the_clients_own_names_come_first(program, serve):
    server = serve()
    both = "BASE_URL=http://file:1\nAPI_KEY=file\nRERANK_API_KEY=files-own\n"
    cfg = program(both, RERANK_BASE_URL=server.url, RERANK_API_KEY="own", BASE_URL="http://other:1", **FOREIGN)
    assert (cfg.local_base_url, cfg.api_key) == (server.url, "own")
    assert rerank("q", DOCS)[1] == RIGHT and server.requests[0].headers["authorization"] == "Bearer own"
    assert program(both).api_key == "own"
    for name in ("RERANK_API_KEY", "RERANK_BASE_URL", "BASE_URL"):
        os.environ.pop(name)
    cfg = program(both)
    assert (cfg.local_base_url, cfg.api_key) == ("http://file:1", "files-own")


def test_the_kits_env_file_describes_the_service(program, tmp_path):
    cfg = program("HOST=0.0.0.0\nPORT=12000\nAPI_KEY=secret\nRESTART=always\nTP=two\n", **FOREIGN)
    assert (cfg.local_base_url, cfg.api_key) == ("http://127.0.0.1:12000/v1", "secret")
    (tmp_path / "key").write_text("of-the-file\n")
    assert program(f"API_KEY_FILE={tmp_path / 'key'}\n", **FOREIGN).api_key == "of-the-file"


def test_the_environment_comes_before_the_file(program):
    cfg = program("RETRIES=1\nSERVED_MODEL_NAME=a\nTIMEOUT_S=3\n", RETRIES="4", SERVED_MODEL_NAME="b")
    assert (cfg.retries, cfg.served_model_name, cfg.timeout_s) == (4, "b", 3)


@pytest.mark.parametrize(
    ("file", "environment", "said"),
    [
        ("", {"RETRIES": "many"}, "RETRIES='many' (environment) is not an integer"),
        ("PORT=eighty", {}, "PORT='eighty' (.env) is not an integer"),
        ("", {"RERANK_API_KEY": "a b"}, "API_KEY=*** holds white space"),
        ("API_KEY_FILE=/no/such", {}, "API_KEY_FILE='/no/such' cannot be read"),
    ],
)
def test_a_bad_value_of_the_clients_own_is_named(program, file, environment, said):
    with pytest.raises(settings.ConfigError) as caught:
        program(file, **environment)
    assert said in str(caught.value)


def test_a_bad_port_is_not_asked_for_when_the_address_is_known(program):
    assert program("PORT=eighty\nHOST=\n", RERANK_BASE_URL=URL).local_base_url == URL


def test_errors_say_which_variables_are_not_read(program, serve):
    program(PORT="8000", API_KEY="own")
    with pytest.raises(
        RerankHTTPError, match=r"check RERANK_API_KEY; the client does not read PORT, API_KEY of the env"
    ):
        rerank("q", DOCS, base_url=serve(status(401)).url)
    program(RETRIES="0", PORT="8000", API_KEY="own")
    with pytest.raises(RerankConnectionError, match="set RERANK_BASE_URL, RERANK_API_KEY"):
        rerank("q", DOCS, base_url=dead_url())


def test_the_clients_names_in_the_env_file_are_settings(tmp_path):
    (tmp_path / ".env").write_text("RERANK_BASE_URL=http://a\nRERANK_API_KEY=b\nRERANK_PORT=1\n")
    assert [line.split()[0] for line in settings.warnings_of(tmp_path / ".env")] == ["RERANK_PORT"]


@pytest.mark.parametrize(
    "tail", ["", "/", "/v1", "/v1/", "/rerank", "/v1/rerank", "/v1/score/", "/score", "/v2/rerank"]
)
@pytest.mark.parametrize("path", ["", "/proxy/llm"])
def test_addresses_of_a_whole_call_are_understood(path, tail):
    assert base_urls(f"http://host:1{path}{tail}") == (f"http://host:1{path}/v1",)


def test_an_address_whose_path_only_looks_alike_stays():
    assert base_urls("http://host/my-rerank,http://rerank/scores") == (
        "http://host/my-rerank/v1",
        "http://rerank/scores/v1",
    )


# ---- Ctrl-C ----

MANY = """
import sys
from rerank_kit.client import rerank_many, rerank
print("begun", flush=True)
if sys.argv[2] == "many":
    rerank_many(["q"] * 8, [["a", "b"]] * 8, base_url=sys.argv[1])
else:
    rerank("q", ["d"] * 300, base_url=sys.argv[1], batch_size=sys.argv[2] == "one" and 300 or 16)
"""


@pytest.mark.timing
@pytest.mark.parametrize("how", ["many", "split", "one"])
def test_ctrl_c_ends_the_process_within_a_second(serve, how):
    server = serve(default=slow(12))
    command = [sys.executable, "-c", MANY, server.url, how]
    process = subprocess.Popen(command, cwd=KIT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "begun\n"
        end = time.monotonic() + 20
        while not server.requests and time.monotonic() < end:
            time.sleep(0.02)
        assert server.requests, "it sent nothing"
        began = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=20)
        assert time.monotonic() - began < 1 and "KeyboardInterrupt" in err
        assert process.returncode == -signal.SIGINT
    finally:
        process.kill()


# ---- retries ----


def test_retries_are_logged_and_counted(client, serve, config, caplog):
    config(retries=2)
    server = serve(status(429), status(503))
    with caplog.at_level(logging.WARNING, "rerank_kit"):
        _, _, raw = client.rerank("q", DOCS, base_url=server.url)
    assert (raw["_client_retries"], raw["_client_url"]) == (2, server.url)
    lines = [record.getMessage() for record in caplog.records if record.name == "rerank_kit"]
    assert len(lines) == 2 and lines[0].startswith("retry 1 of 2 in ") and f"HTTP 429 from {server.url}" in lines[0]
    assert lines[1].startswith("retry 2 of 2 in ")


def test_fail_overs_are_logged_and_counted(client, serve, caplog):
    dead, server = dead_url(), serve()
    with caplog.at_level(logging.WARNING, "rerank_kit"):
        _, _, raw = client.rerank("q", DOCS, base_url=f"{dead},{server.url}")
    assert (raw["_client_retries"], raw["_client_url"]) == (1, server.url)
    [line] = [record.getMessage() for record in caplog.records if record.name == "rerank_kit"]
    assert line.startswith(f"fail-over from {dead} to another address: no server at {dead}")


def test_a_smooth_call_logs_nothing_and_counts_all_parts(client, serve, caplog):
    server = serve()
    with caplog.at_level(logging.DEBUG, "rerank_kit"):
        _, _, raw = client.rerank("q", DOCS, base_url=server.url, batch_size=1)
    assert (raw["_client_retries"], raw["_client_url"], raw["_client_calls"]) == (0, server.url, len(DOCS))
    assert not [record for record in caplog.records if record.name == "rerank_kit"]
    assert not {"_retries", "_url"} & set(raw)


def test_nothing_is_printed_where_the_program_sets_up_no_log(serve):
    server = serve(status(503))
    code = "import sys; from rerank_kit.client import rerank; rerank('q', ['d'], base_url=sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", code, server.url], cwd=KIT, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# ---- a wrong model ----


@pytest.mark.parametrize(
    ("models", "hint"),
    [
        ({"data": [{"id": "qwen3-reranker"}, {"id": "alias"}]}, " (it serves qwen3-reranker, alias: set model or"),
        (None, ""),
        ({"data": [{"name": "x"}]}, ""),
        ([1], ""),
    ],
)
def test_a_wrong_model_name_is_answered_with_the_served_ones(client, serve, models, hint):
    server = serve(status(404, {"error": {"message": "The model `nope` does not exist."}}))
    server.models = models
    with pytest.raises(RerankHTTPError) as caught:
        client.rerank("q", DOCS, base_url=server.url, model="nope")
    assert "`nope` does not exist." in str(caught.value) and ("it serves" in str(caught.value)) == bool(hint)
    assert hint in str(caught.value) and caught.value.status_code == 404
    assert len(server.requests) == 1 and server.models_asked == 1


def test_an_item_is_json():
    item = RerankItem(3, 0.5, "text")
    assert json.loads(json.dumps(item.to_dict())) == {"index": 3, "score": 0.5, "doc": "text"}


# ---- mocks and traces ----


def test_responses_intercepts(config):
    responses = pytest.importorskip("responses")
    with responses.RequestsMock() as mock:
        mock.post(f"{URL}/rerank", json=ANSWER)
        items, scores, raw = rerank("q", ["d"], base_url=URL)
        assert (scores, raw["_client_url"]) == ([0.9], URL) and items == [RerankItem(0, 0.9, "d")]
        assert json.loads(mock.calls[0].request.body) == {"model": "qwen3-reranker", "query": "q", "documents": ["d"]}
        mock.post(f"{URL}/score", json={"error": {"message": "no"}}, status=400)
        with pytest.raises(RerankHTTPError, match=r"HTTP 400 .*: no"):
            score("q", ["d"], base_url=URL)


def test_requests_mock_intercepts(config):
    requests_mock = pytest.importorskip("requests_mock")
    with requests_mock.Mocker() as mock:
        mock.post(f"{URL}/rerank", [{"status_code": 503}, {"json": ANSWER}])
        _, scores, raw = rerank("q", ["d"], base_url=URL)
        assert (scores, raw["_client_retries"], mock.call_count) == ([0.9], 1, 2)
        assert mock.last_request.json()["documents"] == ["d"]


@pytest.mark.parametrize(
    ("raised", "expected"),
    [(requests.ConnectionError("no route"), RerankConnectionError), (requests.ReadTimeout("slow"), RerankTimeout)],
)
def test_errors_of_a_mock_are_errors_of_the_client(config, raised, expected):
    responses = pytest.importorskip("responses")
    with responses.RequestsMock() as mock:
        mock.post(f"{URL}/rerank", body=raised)
        with pytest.raises(expected):
            rerank("q", ["d"], base_url=URL)
        assert len(mock.calls) == 1
    with responses.RequestsMock(), pytest.raises(RerankError):  # nothing is registered
        rerank("q", ["d"], base_url=URL)


def test_the_recipe_of_the_page_works(monkeypatch):
    page = (KIT / "docs" / "integrations.md").read_text("utf-8").partition("**In tests.**")[2]
    names = {}
    exec(page.partition("```python\n")[2].partition("```")[0], names)
    names["test_my_program"](monkeypatch)


def test_an_adapter_of_the_programs_own_is_used(config, serve):
    from rerank_kit.client.sessions import SharedResources

    seen = []

    class Adapter(requests.adapters.HTTPAdapter):
        def send(self, request, **kwargs):
            seen.append(request.url)
            return super().send(request, **kwargs)

    server = serve()
    SharedResources.get_local_rerank_client(server.url).mount(server.url, Adapter())
    assert rerank("q", DOCS, base_url=server.url)[1] == RIGHT and seen == [f"{server.url}/rerank"]


def test_opentelemetrys_instrumentation_of_requests_sees_each_call(config, serve):
    instrumentation = pytest.importorskip("opentelemetry.instrumentation.requests")
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    spans, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(spans))
    config(retries=1)
    server = serve(status(503))
    instrumentor = instrumentation.RequestsInstrumentor()
    instrumentor.instrument(tracer_provider=provider)
    try:
        assert rerank("q", DOCS, base_url=server.url)[1] == RIGHT
        assert rerank("q", DOCS, base_url=server.url)[1] == RIGHT
    finally:
        instrumentor.uninstrument()
    finished = spans.get_finished_spans()
    assert [span.attributes["http.status_code"] for span in finished] == [503, 200, 200]
    sent = [request.headers["traceparent"].split("-")[2] for request in server.requests]
    assert sent == [f"{span.context.span_id:016x}" for span in finished], "the service's spans are children of these"
    assert len({request.connection for request in server.requests}) == 1, "the pool is used all the same"
    assert rerank("q", DOCS, base_url=server.url)[1] == RIGHT and "traceparent" not in server.requests[-1].headers

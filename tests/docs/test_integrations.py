"""Other projects' clients, unmodified, against a real service with the guard, TLS and a key.

Each program of docs/integrations.md is run as it stands by sdk_driver.py, in the environment that run.sh makes for the
SDKs: their requirements do not go together with vLLM's.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from rerank_kit import settings
from rerank_kit.client.calls import rerank
from rerank_kit.client.sessions import SharedResources

KIT = Path(__file__).resolve().parents[2]
PAGE = (KIT / "docs" / "integrations.md").read_text()
SDK_PYTHON = Path(os.environ.get("SDK_VENV", KIT / ".venv-sdk"), "bin", "python")
SDK_JS = SDK_PYTHON.parents[1] / "js"
NEWER_COHERE = SDK_PYTHON.parents[1] / "cohere-7"


class Client(NamedTuple):
    """A section of the page: what it takes, and what it shows of a wrong key."""

    package: str  # in tests/requirements-sdk.txt
    address: str  # R = http://host:port
    error: str
    says: str = "wrong or missing API key"  # in the error's text


COHERE, RUNTIME = "cohere.UnauthorizedError", "builtins.RuntimeError"
CLIENTS = {
    "Cohere SDK, v2": Client("cohere", "R", COHERE),
    "Cohere SDK, v1": Client("cohere", "R", COHERE),
    "LangChain, CohereRerank": Client("langchain-cohere", "R", COHERE),
    "LangChain, JinaRerank": Client("langchain-community", "R/v1/rerank", RUNTIME),
    "LlamaIndex, CohereRerank": Client("llama-index-postprocessor-cohere-rerank", "R", COHERE),
    "LlamaIndex, JinaRerank": Client("llama-index-postprocessor-jinaai-rerank", "R/v1", RUNTIME),
    "Haystack, VLLMRanker": Client("vllm-haystack", "R/v1", RUNTIME),
    "LiteLLM, hosted_vllm": Client("litellm", "R/v1", "litellm.AuthenticationError"),
    "Voyage SDK": Client("voyageai", "R/v1", "voyageai.AuthenticationError"),
    "LangChain, NVIDIARerank": Client("langchain-nvidia-ai-endpoints", "R/v1", "builtins.Exception"),
    "LlamaIndex, NVIDIARerank": Client(
        "llama-index-postprocessor-nvidia-rerank", "R/v1", "httpx.HTTPStatusError", "401 Unauthorized"
    ),
    "LlamaIndex, TextEmbeddingInference": Client(
        "llama-index-postprocessor-tei-rerank", "R", "builtins.AssertionError", ""
    ),
    "LlamaIndex, SiliconFlowRerank": Client("llama-index-postprocessor-siliconflow-rerank", "R/v1/rerank", RUNTIME),
    "Haystack, NvidiaRanker": Client("nvidia-haystack", "R/v1", "builtins.ValueError"),
    "Haystack, CohereRanker": Client("cohere-haystack", "R", COHERE),
    "Haystack, JinaRanker": Client("jina-haystack", "R/v1/rerank", RUNTIME),
    "rerankers": Client("rerankers", "R/v1/rerank", "builtins.KeyError", "results"),
    "LiteLLM, other providers": Client("litellm", "R or R/v1", "litellm.AuthenticationError"),
    "Together SDK": Client("together", "R", "together.AuthenticationError"),
    "Infinity client": Client("infinity-client", "R/v1", "infinity_client.UnexpectedStatus"),
    "Xinference client": Client("xinference-client", "R", RUNTIME),
    "LightRAG": Client("lightrag-hku", "R/v1/rerank", "tenacity.RetryError", ""),
    "OpenAI SDK": Client("openai", "R/v1", "openai.AuthenticationError"),
}
AI_ERROR = "AI_APICallError"
JS_CLIENTS = {
    "Vercel AI SDK, cohere": Client("@ai-sdk/cohere", "R/v2", AI_ERROR),
    "Vercel AI SDK, togetherai": Client("@ai-sdk/togetherai", "R/v1", AI_ERROR),
    "Vercel AI SDK, voyage": Client("@ai-sdk/voyage", "R/v1", AI_ERROR),
    "cohere-ai, v2": Client("cohere-ai", "R", "UnauthorizedError"),
    "cohere-ai, v1": Client("cohere-ai", "R", "UnauthorizedError"),
}
# Programs that are whole: (language of the code block, file, command).
LANGUAGES = {
    "curl": ("sh", "rank.sh", "sh"),
    "wget": ("sh", "rank.sh", "sh"),
    "Java": ("java", "Rank.java", "java"),
    "Go": ("go", "rank.go", "go run"),
    "PHP": ("php", "rank.php", "php"),
    "Ruby": ("ruby", "rank.rb", "ruby"),
    "Rust": ("rust", "src/main.rs", "cargo run --quiet --offline"),
}
# Crates as files, as Debian's packages librust-*-dev have them: the tests ask no registry of crates.
CRATES = Path(os.environ.get("RUST_CRATES", "/usr/share/cargo/registry"))
QUERY = "What is the capital of China?"
DOCUMENTS = ["Gravity attracts bodies.", "The capital of China is Beijing.", "首都是北京。", "a "]
LONG = [*DOCUMENTS, "word " * 8000]  # 40,000 characters, far more than MAX_MODEL_LEN

pytestmark = [pytest.mark.server, pytest.mark.timeout(300)]


def program(title: str) -> tuple[str, str]:
    """(text, code) of a section."""
    section = PAGE.partition(f"### {title}\n")[2].partition("\n##")[0]
    fence = LANGUAGES[title][0] if title in LANGUAGES else "js" if title in JS_CLIENTS else "python"
    text, _, rest = section.partition(f"```{fence}\n")
    return text, rest.partition("```")[0]


@pytest.fixture(scope="module")
def expected(keyed_service):
    """{name: [(score, document)]} by the kit's own client, best first."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(settings, "_cache", {})
        patch.setenv("KIT_ENV_FILE", "/nonexistent")
        patch.setenv("RERANK_API_KEY", keyed_service["API_KEY"])
        patch.setenv("REQUESTS_CA_BUNDLE", keyed_service["SSL_CERTFILE"])
        url, found = f"https://localhost:{keyed_service['PORT']}/v1", {}
        for name, documents in {"short": DOCUMENTS, "long": LONG}.items():
            items, _, raw = rerank(QUERY, documents, 3 if name == "short" else None, base_url=url)
            found[name] = [(item.score, item.doc) for item in items]
            assert raw["_cut"] == ([] if name == "short" else [4])
        SharedResources.close_local_rerank_client()  # its sessions know this test's CA
    return found


def run(title: str, settings: dict, **more) -> dict:
    """What the program printed for short documents, long ones, and with a wrong key."""
    assert SDK_PYTHON.exists(), "run tests/run.sh: it makes .venv-sdk"
    code = program(title)[1]
    good = {"url": f"https://localhost:{settings['PORT']}", "key": settings["API_KEY"]}
    calls = {
        "short": {"documents": DOCUMENTS, **good},
        "long": {"documents": LONG, **good},
        "wrong": {"documents": DOCUMENTS, **good, "key": "wrong-key"},
    }
    env = {
        **{
            key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "COHERE_API_KEY", "CO_API_KEY")
        },
        "SSL_CERT_FILE": settings["SSL_CERTFILE"],
        "REQUESTS_CA_BUNDLE": settings["SSL_CERTFILE"],
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",  # else it asks GitHub for prices when it is imported
        "HAYSTACK_TELEMETRY_ENABLED": "False",
        **more,
    }
    given = json.dumps({"code": code, "query": QUERY, "calls": calls})
    command = [str(SDK_PYTHON), "-W", "ignore", str(KIT / "tests" / "stand_ins" / "sdk_driver.py")]
    done = subprocess.run(command, input=given, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    print(title, done.stdout[:300], file=sys.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def check(seen: dict, expected: dict, client: Client) -> None:
    for name in ("short", "long"):
        assert "lines" in seen[name], seen[name]
        lines = [(score, text) for score, text in seen[name]["lines"]]
        assert lines and len(lines) % 3 == 0  # the program of several providers ranks once for each
        for ranked in (lines[i : i + 3] for i in range(0, len(lines), 3)):
            assert [text for _, text in ranked] == [text for _, text in expected[name][:3]]
            assert [score for score, _ in ranked] == pytest.approx([score for score, _ in expected[name][:3]], abs=1e-6)
    assert seen["wrong"].get("error") == client.error, seen["wrong"]
    assert client.says in seen["wrong"]["text"]


@pytest.mark.parametrize("title", CLIENTS)
def test_client_ranks_as_the_kits_own(title, keyed_service, expected):
    check(run(title, keyed_service), expected, CLIENTS[title])


def run_js(title: str, settings: dict, folder: Path) -> dict:
    """As run(), for a program in JavaScript."""
    (folder / "node_modules").symlink_to(SDK_JS / "node_modules")
    url, calls = f"https://localhost:{settings['PORT']}", {"short": DOCUMENTS, "long": LONG, "wrong": DOCUMENTS}
    for name in calls:
        key = "wrong-key" if name == "wrong" else settings["API_KEY"]
        code = program(title)[1].replace("http://127.0.0.1:11438", url).replace("your-key", key)
        (folder / f"{name}.mjs").write_text(code)
    (folder / "calls.json").write_text(json.dumps({"query": QUERY, "calls": calls}))
    driver = folder / "driver.mjs"
    driver.write_text((KIT / "tests" / "stand_ins" / "sdk_driver.mjs").read_text())
    env = {**os.environ, "NODE_EXTRA_CA_CERTS": str(settings["SSL_CERTFILE"])}
    done = subprocess.run(["node", driver, folder], env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.skipif(not shutil.which("npm"), reason="npm is not installed")
@pytest.mark.parametrize("title", JS_CLIENTS)
def test_client_in_javascript_ranks_as_the_kits_own(title, keyed_service, expected, tmp_path):
    assert (SDK_JS / "node_modules").is_dir(), "run tests/run.sh: it installs them"
    check(run_js(title, keyed_service, tmp_path), expected, JS_CLIENTS[title])


@pytest.mark.parametrize("title", LANGUAGES)
def test_client_of_another_language_ranks_as_the_kits_own(title, service, tmp_path):
    _, name, command = LANGUAGES[title]
    if not shutil.which(title if name == "rank.sh" else command.split()[0]):
        pytest.skip(f"{title} is not installed")
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(program(title)[1].replace("http://127.0.0.1:11438", service.url))
    command = [*command.split(), name]
    if title == "Rust":
        if not any(CRATES.glob("ureq-2.*")):
            pytest.skip("the crate ureq is not installed: apt install librust-ureq-dev")
        command.remove(name)
        (tmp_path / "Cargo.toml").write_text(program(title)[0].partition("```toml\n")[2].partition("```")[0])
        (tmp_path / ".cargo").mkdir()
        source = f'[source.crates-io]\nreplace-with = "files"\n[source.files]\ndirectory = "{CRATES}"\n'
        (tmp_path / ".cargo" / "config.toml").write_text(source)
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    if done.stdout.startswith("{"):
        results = json.loads(done.stdout)["results"]
        ranked = [(row["relevance_score"], row["document"]["text"]) for row in results]
    else:
        ranked = [(float(score), text) for score, text in (line.split(" ", 1) for line in done.stdout.splitlines())]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(settings, "_cache", {})
        items, _, _ = rerank(QUERY, DOCUMENTS[:3], 2, base_url=f"{service.url}/v1")
    assert [text for _, text in ranked] == [item.doc for item in items]
    assert [score for score, _ in ranked] == pytest.approx([item.score for item in items], abs=1e-6)


def table() -> str:
    """The table of docs/integrations.md."""
    pins = dict(re.findall(r"(?m)^([\w-]+)==(\S+)$", (KIT / "tests" / "requirements-sdk.txt").read_text()))
    pins |= json.loads((KIT / "tests" / "sdk-js" / "package.json").read_text())["dependencies"]
    lines = ["| client | version | address | a wrong key gives |", "|---|---|---|---|"]
    for title, client in (CLIENTS | JS_CLIENTS).items():
        anchor = re.sub(r"[^\w -]", "", title).lower().replace(" ", "-")
        version = f"{client.package} {pins[client.package]}"
        error = client.error.removeprefix("builtins.")
        lines.append(f"| [{title}](#{anchor}) | {version} | `{client.address}` | `{error}` |")
    return "\n".join(lines)


@pytest.mark.parametrize("title", ["Cohere SDK, v2", "Cohere SDK, v1"])
def test_the_newest_cohere_sdk_too(title, keyed_service, expected):
    """langchain-cohere keeps the other tests at version 5."""
    assert NEWER_COHERE.exists(), "run tests/run.sh: it installs it"
    seen = run(title, keyed_service, PYTHONPATH=str(NEWER_COHERE))
    assert seen["cohere"].startswith("7.")
    check(seen, expected, CLIENTS[title])


def test_the_page_names_every_error_and_version():
    titles = re.findall(r"(?m)^### (.+)$", PAGE.partition("## Run by the tests")[2].partition("## Read, not run")[0])
    assert titles == [*CLIENTS, *JS_CLIENTS, "TLS", *LANGUAGES]
    assert table() in PAGE, table()
    for title, client in (CLIENTS | JS_CLIENTS).items():
        assert f"`{client.error.removeprefix('builtins.')}`" in program(title)[0]

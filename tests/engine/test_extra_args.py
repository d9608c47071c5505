"""EXTRA_ARGS cannot undo what a setting or a profile has decided."""

import re
import subprocess
from importlib.util import find_spec

import pytest

from rerank_kit.engine.extra_args import OTHER_SHORT, REPLACED, SHORT, check_extra_args, find_flag
from rerank_kit.settings import FIELDS, ConfigError, EnvConfig


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("--host 0.0.0.0", "EXTRA_ARGS holds --host: take it out, set HOST"),
        ("--seed 1 --port=8000", "--port: take it out, set PORT"),
        ("--api-key=s3cret", "EXTRA_ARGS holds --api-key: take it out, set API_KEY or API_KEY_FILE"),
        ("--ssl_keyfile k.pem", "set SSL_KEYFILE"),
        ("--ssl-ca-certs ca.pem", "bring no certificate"),
        ("--root-path /x", "let the proxy"),
        ("--chat-template t.jinja", "set TEMPLATE, INSTRUCTION or MODEL_PROFILE"),
        ("--hf-overrides.architectures+ X", "MODEL_PROFILE"),
        ("--task score", "MODEL_PROFILE"),
        ("-tp 2", "EXTRA_ARGS holds -tp: take it out, set TP"),
        ("-dp=2", "set DP"),
        ("--max-num-seqs 4", "set MAX_NUM_SEQS"),
        ("--config c.yaml", "write settings into .env"),
        ("--hos 0.0.0.0", "set HOST"),  # argparse takes an unambiguous beginning
        ("--served-model 0.0.0.0", "without SERVED_MODEL_NAME=qwen3-reranker"),
        ("--served-model-name other", '"--served-model-name qwen3-reranker second"'),
        ("--served-model-name=other --seed 1", "without SERVED_MODEL_NAME=qwen3-reranker"),
        ("--served-model-name other --seed qwen3-reranker", "without SERVED_MODEL_NAME"),
        ("--middleware rerank_kit.guard.Guard", "GUARD=1 loads the guard"),
    ],
)
def test_what_a_setting_replaces_is_refused_with_it(text, said):
    with pytest.raises(ConfigError) as caught:
        check_extra_args(EnvConfig(extra_args=text))
    assert said in str(caught.value) and "s3cret" not in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "--enforce-eager --kv-cache-memory-bytes 2G --no-enable-prefix-caching",
        "--served-model-name qwen3-reranker second",
        "--served-model-name=second qwen3-reranker",
        "--middleware my.package.Class --otlp-traces-endpoint http://c:4317",
        "--data-parallel-backend ray --distributed-executor-backend uni --renderer-num-workers 2",
        "--hf-token x --model-impl vllm --model-loader-extra-config {}",
        "--compilation-config.cudagraph_mode NONE -O0 -cc {} --scheduler-cls a.B",
        "'open",  # reported where the command is built
    ],
)
def test_what_no_setting_replaces_is_passed_on(text):
    check_extra_args(EnvConfig(extra_args=text))


@pytest.mark.parametrize(
    ("text", "wanted", "found"),
    [
        ("--seed 1 --kv_cache_dtype=fp8", "--kv-cache-dtype", "--kv_cache_dtype"),
        ("--data_parallel_backend ray", "--data-parallel*", "--data_parallel_backend"),
        ("--scheduler_c a.B", "--scheduler-cls", "--scheduler_c"),
        ("-pp 2", "--pipeline-parallel*", "-pp"),
        ("-O3", "--optimization-level", "-O3"),
        ("-cc.mode=3", "--compilation-config", "-cc"),
        ("--compilation_config.cudagraph_mode NONE", "--compilation-config", "--compilation_config"),
        ("--enforce_eager 'open", "--enforce-eager", "--enforce_eager"),
        ("--no-async-scheduling", "--async-scheduling", None),
        ("--kv-cache-dtype-skip-layers 1", "--kv-cache-dtype", None),
        ('--model-loader-extra-config \'{"a": "--enforce-eager"}\'', "--enforce-eager", None),
        ("", "--enforce-eager", None),
    ],
)
def test_a_flag_is_found_in_every_way_that_vllm_takes_it(text, wanted, found):
    assert find_flag(text, "--other", wanted) == found


def test_every_setting_that_is_named_exists():
    named = {word for why in REPLACED.values() for word in re.findall(r"\b[A-Z][A-Z_]+\b", why)}
    assert named and named <= set(FIELDS)
    assert set(SHORT.values()) <= set(REPLACED)


@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")
def test_the_flags_are_those_of_the_installed_vllm():
    """A flag that vLLM renames would be let through; read from its source, since its parser takes 10 s to import."""
    root = find_spec("vllm").submodule_search_locations[0]
    missing = []
    for flag in {*REPLACED, *SHORT, *OTHER_SHORT, *OTHER_SHORT.values()} - {"--task", "--model-tag"}:
        field = flag.lstrip("-").replace("-", "_")
        pattern = rf'"{flag}"' if flag in {*SHORT, *OTHER_SHORT} else rf'"{flag}"|^    {field}:|^    {field} ='
        command = ["grep", "-rqE", "--include=*.py", pattern, f"{root}/engine", f"{root}/entrypoints", f"{root}/utils"]
        if subprocess.run(command).returncode:
            missing.append(flag)
    assert not missing

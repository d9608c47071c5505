"""The plan: what vLLM is told, and why it is refused."""

import json
import os
import re
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError

import pytest
from conftest import self_signed

from rerank_kit.engine import machine as engine_machine
from rerank_kit.engine import plan as engine_plan
from rerank_kit.engine.machine import Machine, NoVllm
from rerank_kit.engine.plan import plan_engine, plan_service
from rerank_kit.serving import command, network
from rerank_kit.serving.command import explain, serve_args
from rerank_kit.settings import ConfigError, get_config

CPU = Machine("0.32.0+cpu", (), (0, 1), 16 * 2**30)
GPU4 = Machine("0.32.0", ("NVIDIA H100, 81559",) * 4, tuple(range(16)), 2**37)


def plan(checkpoints, on=CPU, model="qwen3", **settings):
    return plan_service(get_config(**settings), checkpoints[model], on)


def flag(args, name):
    return args[args.index(name) + 1]


def test_qwen3_original_gets_the_three_parts(checkpoints):
    args = serve_args(plan(checkpoints))
    assert flag(args, "--runner") == "pooling"
    overrides = json.loads(flag(args, "--hf-overrides"))
    assert overrides["architectures"] == ["Qwen3ForSequenceClassification"]
    assert overrides["classifier_from_token"] == ["no", "yes"]
    assert flag(args, "--chat-template").endswith("qwen3_reranker.jinja")
    assert "--enable-prefix-caching" in args and "--disable-log-stats" not in args
    assert flag(args, "--served-model-name") == "qwen3-reranker"


def test_encoders_get_no_template_and_no_prefix_cache(checkpoints):
    args = serve_args(plan(checkpoints, model="bert"))
    assert "--chat-template" not in args and "--enable-prefix-caching" not in args


def test_settings_reach_vllm(checkpoints):
    args = serve_args(
        plan(
            checkpoints,
            GPU4,
            tp=2,
            dp=2,
            gpu_memory_utilization=0.5,
            max_model_len=512,
            max_num_batched_tokens=999,
            max_num_seqs=7,
            dtype="bfloat16",
            quantization="fp8_per_channel",
            host="0.0.0.0",
            port=1234,
            served_model_name="mine",
            api_server_count=3,
            extra_args="--seed 5 --foo 'a b'",
        )
    )
    wanted = {
        "--tensor-parallel-size": "2",
        "--data-parallel-size": "2",
        "--gpu-memory-utilization": "0.5",
        "--max-model-len": "512",
        "--max-num-batched-tokens": "999",
        "--max-num-seqs": "7",
        "--dtype": "bfloat16",
        "--quantization": "fp8_per_channel",
        "--host": "0.0.0.0",
        "--port": "1234",
        "--served-model-name": "mine",
        "--api-server-count": "3",
    }
    assert {name: flag(args, name) for name in wanted} == wanted
    assert args[-4:] == ["--seed", "5", "--foo", "a b"]


def test_steps_fit_the_engines_and_cfg_says_why(checkpoints):
    one, three = (plan(checkpoints, GPU4, engines_per_gpu=n) for n in (1, 3))
    own = plan(checkpoints, GPU4, engines_per_gpu=3, max_num_batched_tokens=999, max_num_seqs=7)
    plans = (one, three, own, plan(checkpoints))
    steps = [(p.engine["max_num_batched_tokens"], p.engine["max_num_seqs"]) for p in plans]
    assert steps == [(24576, 256), (8192, 256), (999, 7), (4096, 128)]
    assert "max_num_batched_tokens: 8192 (small steps" in explain(three)
    assert "max_num_seqs: 256 (256 pairs a step unless set)" in explain(three)
    said = "max_num_batched_tokens: 999 (MAX_NUM_BATCHED_TOKENS)\nmax_num_seqs: 7 (MAX_NUM_SEQS)\nquantization: off"
    assert said in explain(own)
    engine_plan._plan_steps(three, three.engine["max_model_len"] - 1, 8, "small")
    assert "max_num_batched_tokens: 2048 (at least max_model_len)" in explain(three)


def test_first_gpus_are_taken_when_none_are_named(checkpoints):
    assert plan(checkpoints, GPU4, tp=2).env["CUDA_VISIBLE_DEVICES"] == "0,1"
    assert "CUDA_VISIBLE_DEVICES" not in plan(checkpoints, GPU4, tp=2, cuda_visible_devices="2,3").env


@pytest.mark.parametrize(
    ("on", "settings", "said"),
    [
        (GPU4, {"tp": 1, "cuda_visible_devices": "0,1"}, ("= 1 x 1 = 1,", "makes 2 GPUs")),
        (GPU4, {"tp": 2, "dp": 2, "cuda_visible_devices": "0"}, ("= 2 x 2 = 4,", "makes 1 GPUs")),
        (GPU4, {"tp": 8}, ("8 x 1 = 8", "has 4 GPUs")),
        (Machine("0.32.0", (), (0,), 2**34), {}, ("nvidia-smi finds no GPU",)),
        (CPU, {"cuda_visible_devices": "0"}, ("CUDA_VISIBLE_DEVICES='0' asks for a GPU", "CPU build")),
        (CPU, {"max_model_len": 99999}, ("MAX_MODEL_LEN=99999", "2048")),
        (CPU, {"max_num_batched_tokens": 400_000_000}, ("KV cache do not fit",)),
        (CPU, {"extra_args": "--api-server-count 4"}, ("set API_SERVER_COUNT",)),
        (CPU, {"engines_per_gpu": 8, "dp": 2}, ("16.0 GiB of KV cache do not fit",)),
        (GPU4, {"engines_per_gpu": 8, "gpu_memory_utilization": 0.4}, ("ENGINES_PER_GPU=8 leaves 0.0 GiB",)),
        (CPU, {"instruction": "x", "model": "bert"}, ("takes none",)),
        (CPU, {"extra_args": "'open"}, ("EXTRA_ARGS", "shell syntax")),
    ],
)
def test_refusals_name_the_numbers(checkpoints, on, settings, said):
    with pytest.raises(ConfigError) as caught:
        serve_args(plan(checkpoints, on, **settings))
    for part in said:
        assert part in str(caught.value)


def test_cpu_takes_all_cores_of_a_small_machine_and_leaves_the_users_choice(checkpoints, monkeypatch):
    assert plan(checkpoints).env["VLLM_CPU_OMP_THREADS_BIND"] == "0,1"
    assert plan(checkpoints).engine["kv_cache_memory_bytes"] >= 2**30
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "1")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "2")
    mine = plan(checkpoints)
    assert "VLLM_CPU_OMP_THREADS_BIND" not in mine.env and "kv_cache_memory_bytes" not in mine.engine


@pytest.mark.parametrize(("has_bf16", "dtype"), [(True, "bfloat16"), (False, "float32")])
def test_cpu_computes_in_a_precision_that_it_has(checkpoints, monkeypatch, has_bf16, dtype):
    monkeypatch.setattr(engine_plan, "cpu_has_bf16", lambda: has_bf16)
    assert flag(serve_args(plan(checkpoints)), "--dtype") == dtype
    assert flag(serve_args(plan(checkpoints, dtype="float16")), "--dtype") == "float16"
    assert flag(serve_args(plan(checkpoints, GPU4)), "--dtype") == "auto"


def test_instruction_becomes_the_templates_default(checkpoints, tmp_path):
    mine = plan(checkpoints, instruction="Find code", log_dir=str(tmp_path))
    assert "Find code" in mine.template
    assert flag(serve_args(mine), "--chat-template") == f"{tmp_path}/template-11438.jinja"


def test_engines_that_share_a_gpu_are_nodes_of_one_service(checkpoints):
    """Two GPUs with two engines each: ranks 0 and 1 behind the API, 2 and 3 on the same GPUs beside it."""
    made = plan(checkpoints, GPU4, dp=2, engines_per_gpu=2, gpu_memory_utilization=0.8, api_key="k", port=5)
    first, second = serve_args(made, 0, 7), serve_args(made, 1, 7)
    for args in (first, second):
        assert flag(args, "--data-parallel-size") == "4" and flag(args, "--data-parallel-size-local") == "2"
        assert (flag(args, "--data-parallel-address"), flag(args, "--data-parallel-rpc-port")) == ("127.0.0.1", "7")
        assert flag(args, "--gpu-memory-utilization") == "0.4"
        assert flag(args, "--distributed-executor-backend") == "uni"
        # Half of 81559 MiB x 0.8, less 4 GiB; a tiny model's cache has no use for more than 16 GiB.
        assert int(flag(args, "--kv-cache-memory-bytes")) == 16 * 2**30
    assert flag(first, "--port") == "5" and "--middleware" in first and "--headless" not in first
    assert "--headless" in second and flag(second, "--data-parallel-start-rank") == "2"
    assert not {"--port", "--middleware", "--chat-template", "--api-server-count"} & set(second)
    assert made.env["CUDA_VISIBLE_DEVICES"] == "0,1" and made.env["GUARD_API_SERVERS"] == flag(
        first, "--api-server-count"
    )
    commands, env = command.server_commands(made)
    assert len(commands) == 2 and flag(commands[0], "--data-parallel-rpc-port") == flag(
        commands[1], "--data-parallel-rpc-port"
    )
    assert env["VLLM_API_KEY"] == "k"
    assert command.explain(made).count("vllm serve ") == 2


def test_one_engine_needs_no_nodes(checkpoints):
    assert "--distributed-executor-backend" not in serve_args(plan(checkpoints, GPU4, tp=2, dp=2))
    args = serve_args(plan(checkpoints, GPU4, dp=2, extra_args="--distributed-executor-backend mp"))
    assert args.count("--distributed-executor-backend") == 1
    args = serve_args(plan(checkpoints, GPU4, dp=2, engines_per_gpu=1))
    assert flag(args, "--distributed-executor-backend") == "uni"
    assert not [word for word in args if word.startswith("--data-parallel-") and word != "--data-parallel-size"]
    assert plan_engine(get_config(engines_per_gpu=2), checkpoints["qwen3"], GPU4).copies == 1


def test_offline_leaves_data_parallel_to_the_service(checkpoints):
    """One process a GPU beside a .env with DP=8; or all GPUs of the service visible, of which TP are used."""

    def offline(**settings):
        return plan_engine(get_config(**settings), checkpoints["qwen3"], GPU4)

    for settings in (
        {"dp": 8, "cuda_visible_devices": "1"},
        {"dp": 4, "cuda_visible_devices": "0,1,2,3"},
        {"dp": 8, "dp_local": 4, "dp_address": "10.0.0.1", "cuda_visible_devices": "2"},
    ):
        made = offline(**settings)
        assert made.copies == 1 and "data_parallel_size" not in made.engine
    assert offline(dp=4).env["CUDA_VISIBLE_DEVICES"] == "0"
    with pytest.raises(ConfigError, match="= 2 x 1 = 2, but CUDA_VISIBLE_DEVICES='1' makes 1 GPUs"):
        offline(tp=2, dp=8, cuda_visible_devices="1")


@pytest.mark.parametrize(
    ("found", "said"),
    [("0.25.1", "0.25.1 is too old"), (None, "not installed")],
)
def test_vllm_version_refuses_missing_and_old(monkeypatch, found, said):
    def version(name):
        if found is None:
            raise PackageNotFoundError(name)
        return found

    monkeypatch.setattr(engine_machine, "version", version)
    with pytest.raises(NoVllm, match=said):
        engine_machine.vllm_version()


def test_explain_shows_the_command_and_no_secret(checkpoints):
    text = command.explain(plan(checkpoints, api_key="s3cret"))
    assert "API_KEY=***" in text and "VLLM_API_KEY=***" in text and "s3cret" not in text
    assert "vllm serve " in text and "PORT=11438" in text


def test_every_flag_is_known_to_the_installed_vllm(checkpoints, fork_server):
    """`vllm serve` exits at an unknown flag; ask its help instead of a running server."""
    args = serve_args(plan(checkpoints, GPU4, tp=2, dp=2, quantization="fp8", api_server_count=2))
    args += serve_args(plan(checkpoints))
    args += serve_args(plan(checkpoints, GPU4, engines_per_gpu=2), 1)
    flags = sorted({a for a in args if a.startswith("--")})
    env = {**os.environ, "VLLM_LOGGING_LEVEL": "ERROR"}
    command = [*fork_server.command, engine_machine.vllm_command(), "serve", "--help=all"]
    help_text = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120).stdout
    assert "--served-model-name" in help_text
    assert [f for f in flags if not re.search(rf"(^|[\s,]){f}\b(?!-)", help_text)] == []


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, None),
        ({"host": "localhost"}, None),
        ({"host": "::1"}, None),
        ({"host": "127.0.0.2"}, None),
        ({"host": "0.0.0.0"}, "there is no API_KEY"),
        ({"host": "::"}, "there is no API_KEY"),
        ({"host": "10.0.0.1"}, "there is no API_KEY"),
        ({"host": "gpu-host"}, "there is no API_KEY"),
        ({"host": "0.0.0.0", "api_key": "k"}, None),
        ({"host": "0.0.0.0", "api_key": "k", "guard": 0}, "on /v1 paths only"),
        ({"host": "0.0.0.0", "allow_no_key": 1}, None),
        ({"ssl_certfile": "/c.pem"}, "belong together"),
        ({"ssl_keyfile": "/k.pem"}, "belong together"),
        ({"ssl_certfile": "/no/c.pem", "ssl_keyfile": "/no/k.pem"}, "No such file"),
        ({"ssl_certfile": "/c\0.pem", "ssl_keyfile": "/k.pem"}, "cannot be used: embedded null"),  # a ValueError
    ],
)
def test_a_service_that_strangers_could_use_is_refused(settings, said):
    cfg = get_config(**settings)
    if said is None:
        network.check_network(cfg)
    else:
        with pytest.raises(ConfigError, match=said):
            network.check_network(cfg)


def test_tls_reaches_vllm_and_the_url(checkpoints, tmp_path):
    files = {name.lower(): value for name, value in self_signed(tmp_path).items()}
    made = plan(checkpoints, **files)
    network.check_network(made.cfg)
    args = serve_args(made)
    assert flag(args, "--ssl-certfile") == files["ssl_certfile"] and flag(args, "--ssl-keyfile") == files["ssl_keyfile"]
    assert made.cfg.service_url.startswith("https://")
    (tmp_path / "key.pem").write_text("no key")
    with pytest.raises(ConfigError, match="cannot be used"):
        network.check_network(made.cfg)


@pytest.mark.parametrize(
    "extra",
    [
        *("--hf-token s3cret --seed 5", "--hf-token=s3cret --seed 5", "--hf_token s3cret --seed 5"),
        *("--hf-tok s3cret --seed 5", "--hf_t=s3cret --seed 5", "'--hf-token' s3cret --seed 5"),
    ],
)
def test_a_key_in_extra_args_is_not_shown(checkpoints, extra):
    made = plan(checkpoints, extra_args=extra)
    assert "s3cret" in " ".join(serve_args(made))
    shown = command.shown_args(made)
    assert "s3cret" not in " ".join(shown) and shown[-2:] == ["--seed", "5"] and "***" in " ".join(shown)
    assert "s3cret" not in command.explain(made)
    with pytest.raises(ConfigError) as caught:
        serve_args(plan(checkpoints, extra_args=f"{extra} 'open"))
    assert "s3cret" not in str(caught.value)
    with pytest.raises(ConfigError) as caught:
        plan(checkpoints, extra_args="--api-key=s3cret")
    assert "s3cret" not in str(caught.value) and "set API_KEY or API_KEY_FILE" in str(caught.value)


def test_version_tells_what_scores_differently(checkpoints, tmp_path):
    """Replicas with one id may answer for each other: the id follows weights, prompt and limits, not host or port."""

    def version(model="qwen3", machine=CPU, **settings):
        return plan(checkpoints, machine, model, **settings).env["GUARD_VERSION"]

    own = version(dtype="float32")
    assert re.fullmatch("[0-9a-f]{12}", own)
    assert own == version(dtype="float32", port=1, log_dir="x", max_num_seqs=7, api_key="k")
    others = [
        version(dtype="bfloat16"),
        version(dtype="float32", max_model_len=512),
        version(dtype="float32", instruction="Find code"),
        version(dtype="float32", long_documents="chunk"),
        version(dtype="float32", max_tokens_per_doc=9),
        version(dtype="float32", extra_args="--seed 1"),
        version("qwen3_untied", dtype="float32"),
        version(dtype="float32", machine=Machine("0.33.0+cpu", (), (0, 1), 16 * 2**30)),
    ]
    assert len({own, *others}) == 1 + len(others)
    copied = tmp_path / "elsewhere" / "Qwen3-Reranker-tiny"
    shutil.copytree(checkpoints["qwen3"], copied)
    assert version(dtype="float32") == plan({"x": copied}, model="x", dtype="float32").env["GUARD_VERSION"]
    with (copied / "model.safetensors").open("r+b") as weights:
        weights.seek(-5, os.SEEK_END)
        weights.write(b"\1\2\3")
    assert plan({"x": copied}, model="x", dtype="float32").env["GUARD_VERSION"] != own


def test_vllms_watchdog_where_the_release_has_one(checkpoints, tmp_path):
    old, new = Machine("0.32.0+cpu", (), (0, 1), 2**37), Machine("0.33.0+cpu", (), (0, 1), 2**37)
    assert "--watchdog-config" not in serve_args(plan(checkpoints, old, log_dir=str(tmp_path)))
    args = serve_args(plan(checkpoints, new, log_dir=str(tmp_path), health_timeout_s=50))
    assert json.loads(flag(args, "--watchdog-config")) == {"dump_dir": str(tmp_path), "timeout": 25}
    assert "--watchdog-config" not in serve_args(plan(checkpoints, new, health_timeout_s=0))
    own = serve_args(plan(checkpoints, new, extra_args="--watchdog_config {}"))
    assert "--watchdog-config" not in own and own[-2:] == ["--watchdog_config", "{}"]
    assert (old.release, new.release) == ((0, 32), (0, 33))


@pytest.mark.parametrize(
    ("length", "more", "fits"), [(200, {}, True), (60, {}, False), (200, {"instruction": "x " * 200}, False)]
)
def test_the_pairs_of_the_check_must_fit(checkpoints, length, more, fits):
    """Else the service would load and never be ready."""
    made = plan(checkpoints, max_model_len=length, **more)
    if fits:
        assert json.loads(command.server_env(made)["GUARD_CHECK"])["tokens"]
        return
    with pytest.raises(ConfigError, match=f"MAX_MODEL_LEN={length} has no room for a short pair"):
        command.server_env(made)
    assert "GUARD_CHECK" not in command.server_env(plan(checkpoints, max_model_len=length, startup_check=0, **more))


def test_a_checkpoint_with_a_limit_below_the_pairs_of_the_check_is_served(checkpoints, tmp_path):
    """It was trained so, and cuts every pair; nobody set MAX_MODEL_LEN."""
    folder = shutil.copytree(checkpoints["bert"], tmp_path / "ms-marco-short")
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "model_max_length": 24}))
    (folder / "modules.json").write_text('[{"idx": 0, "name": "0", "path": "", "type": "a.Transformer"}]')
    made = plan_service(get_config(model_path=str(folder)), folder, CPU)
    assert made.engine["max_model_len"] == 24
    assert "GUARD_CHECK" not in command.server_env(made)

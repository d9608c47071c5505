"""Plans the arguments of vLLM by model, machine and settings, for `vllm serve` and `vllm.LLM` alike."""

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from rerank_kit.engine.choices import (
    api_servers,
    count_weights,
    engines_per_gpu,
    fastokens_agrees,
    graph_sizes,
    step_graphs,
    weight_bytes,
    whole_calls,
    whole_graphs,
)
from rerank_kit.engine.extra_args import check_extra_args, find_flag
from rerank_kit.engine.images import images_env, plan_images
from rerank_kit.engine.machine import GIB, Machine, compute_capabilities, cpu_has_bf16, probe_machine, untested
from rerank_kit.engine.nodes import check_nodes, describe_node, has_other_nodes, is_headless, node_env
from rerank_kit.engine.precision import MODE, check_exact, quantization
from rerank_kit.engine.scale import score_scale
from rerank_kit.engine.shared_cache import check_shared_cache
from rerank_kit.models.checkpoint import Checkpoint
from rerank_kit.models.identity import content_id
from rerank_kit.models.opened import opened
from rerank_kit.models.profiles import Profile
from rerank_kit.settings import FIELDS, ConfigError, EnvConfig, model_setting, passed_on_env

# Flags in EXTRA_ARGS that decide the worker processes, and the CUDA graphs.
WORKERS = ("--distributed*", "--pipeline*", "--nnodes*")
GRAPHS = (
    *("--enforce-eager", "--compilation-config", "--optimization-level", "--cudagraph*", "--cuda-graph*"),
    "--max-cudagraph*",
)
LIST_TOKENS = 16384  # of a whole list, for a listwise model; the others have 4096 for a pair
KV_GIB_AT_MOST = 16  # limit for each of several engines on a GPU: six full steps of a 0.6B model
ENGINE_GIB = 4  # CUDA context, activations of one step and graphs of one engine, in addition to weights and KV cache


@dataclass
class Plan:
    """Everything that one start of vLLM needs."""

    cfg: EnvConfig
    machine: Machine
    profile: Profile
    checkpoint: Checkpoint
    template: str | None  # Jinja text
    engine: dict  # keyword arguments of vllm.LLM; the flags of vllm serve have the same names
    engines: int = 1  # on each GPU
    api_servers: int | None = None  # None = vLLM's own default, one for each data parallel rank
    env: dict[str, str] = field(default_factory=dict)
    why: dict[str, str] = field(default_factory=dict)  # engine key -> one line
    images: bool = False  # queries and documents may hold images

    @property
    def copies(self) -> int:
        """Number of all engines: vLLM's data parallel ranks."""
        return self.cfg.dp * self.engines

    @property
    def copies_here(self) -> int:
        """Number of engines on this host."""
        return self.cfg.engines_here * self.engines


def plan_service(cfg: EnvConfig, model: str | Path | None = None, machine: Machine | None = None) -> Plan:
    """Decide how `vllm serve` serves one model on this machine.

    Args:
        cfg: the configuration; its settings take precedence over every choice made here.
        model: folder or hub id; None = MODEL_PATH.
        machine: None = the one this runs on.

    Raises:
        ConfigError: a model, a profile, GPUs or memory are missing. NoVllm: vLLM is missing or too old.
    """
    model, machine = _checked(cfg, model), machine or probe_machine()
    check_nodes(cfg)
    _check_gpus(cfg, machine)
    plan = _plan_model(cfg, model, machine)
    plan_images(plan, "off: GUARD=0, and the guard is what reads them" if not cfg.guard else "")
    if plan.profile.listwise:
        _check_listwise(plan)
    if plan.profile.late and not cfg.guard:
        raise ConfigError(
            f"GUARD=0, and profile {plan.profile.name} is late interaction: the guard gives vLLM the model's own "
            "tokens (markers, lengths) and leaves out of MaxSim what the model does. Unset GUARD"
        )
    plan.api_servers = cfg.api_server_count
    plan.engines, plan.why["engines_per_gpu"] = _engines(plan)
    if plan.copies > 1:
        plan.engine["data_parallel_size"] = plan.copies
    if machine.is_cpu:
        _plan_cpu(plan)
    else:
        _plan_gpu(plan, *_service_steps(plan))
        _plan_tokenizing(plan)
        _plan_light_load(plan)
    _plan_watchdog(plan)
    if has_other_nodes(cfg):
        plan.env |= node_env(cfg)
        plan.why["node"] = describe_node(cfg)
    if cfg.guard and not is_headless(cfg):
        check_shared_cache(cfg)
        plan.env |= _guard_env(plan)
    return _finished(plan)


def plan_engine(
    cfg: EnvConfig, model: str | Path | None = None, machine: Machine | None = None, *, several: bool = False
) -> Plan:
    """Decide how vllm.LLM scores with one model in this process. Throughput matters here, latency does not.

    DP and DP_ADDRESS apply to the service only. Arguments and errors are those of plan_service().

    Args:
        several: plan.engines may be more than 1; then the plan is that of one of so many processes on the GPU.
    """
    cfg = replace(cfg, dp=1, dp_local=None, dp_address=None)
    model, machine = _checked(cfg, model), machine or probe_machine()
    _check_gpus(cfg, machine, may_be_more=True)
    plan = _plan_model(cfg, model, machine)
    plan_images(plan)
    if plan.profile.listwise:
        raise ConfigError(
            f"{plan.checkpoint.path} is listwise (profile {plan.profile.name}): a score depends on the other documents "
            "of its call, which pairs in a file do not have. Start the service and send it whole lists"
        )
    if several and not machine.is_cpu:  # one engine of the CPU build already takes all cores
        plan.engines, plan.why["engines_per_gpu"] = _engines(plan)
    if machine.is_cpu:
        _plan_cpu(plan)
    elif machine.gpu_mib > 70_000 and plan.engines == 1:
        # 0.6B on an H100, engine alone: 1079 pairs/s with 8192 tokens and 128 pairs a step, 1712 with 65536 and 1024.
        _plan_gpu(plan, 65536, 1024, "large steps: offline, throughput matters and latency does not")
    else:
        _plan_gpu(plan, *_service_steps(plan))
    return _finished(plan)


def _checked(cfg: EnvConfig, model: str | Path | None) -> str | Path:
    """The model to plan for. Raises the errors that need no look at the machine."""
    model = model or (cfg.model_path and model_setting(cfg.model_path))
    if not model:
        raise ConfigError("MODEL_PATH is not set: write MODEL_PATH=/folder/of/the/checkpoint (or a hub id) into .env")
    check_extra_args(cfg)
    return model


def _plan_model(cfg: EnvConfig, model: str | Path, machine: Machine) -> Plan:
    """The part of a plan that follows from model and settings and is the same on every machine."""
    found = opened(model, cfg)
    profile = found.profile
    plan = Plan(cfg, machine, profile, found.checkpoint, found.template, {})
    engine, why = plan.engine, plan.why
    why |= found.why
    if line := untested(machine.vllm_version):
        why["vllm"] = line
    engine["model"] = str(found.folder)
    if profile.joined_head:
        why["model"] = "made by start: encoder and head in one weight file, a copy beside links to the rest"
    elif profile.config_changes:
        why["model"] = "made by start: links to the checkpoint, and a config.json that names no code from the hub"
    if profile.config_file:
        # This trusts the kit's own code only: the adapted folder holds no other code.
        engine["trust_remote_code"] = True
        why["trust_remote_code"] = f"for the kit's own {profile.config_file} in the served folder"
    engine["runner"] = "pooling"
    if profile.convert:
        engine["convert"] = profile.convert
    overrides = dict(profile.hf_overrides)
    text = found.checkpoint.config.get("text_config")
    if isinstance(text, dict) and "tie_word_embeddings" not in text:
        # Qwen3-VL-Reranker-8B has it at the top level only, and vLLM 0.32 dies if text_config lacks it.
        tied = found.checkpoint.config.get("tie_word_embeddings", False)
        overrides["text_config"] = {"tie_word_embeddings": tied}
    if overrides:
        engine["hf_overrides"] = overrides
    if profile.pooler_config:
        engine["pooler_config"] = profile.pooler_config
    engine["dtype"] = cfg.dtype
    if cfg.quantization:
        engine["quantization"], why["quantization"] = quantization(cfg.quantization, found.checkpoint.config)
    if cfg.exact:
        why["exact"] = check_exact(cfg, machine, found.checkpoint.config)
        plan.env[MODE] = "1"
    engine["max_model_len"], why["max_model_len"] = _max_model_len(cfg, found.checkpoint, profile)
    engine |= profile.engine
    if profile.late:
        # vLLM takes PyLate's max_seq_length, the length of what was encoded last, for the model's limit.
        plan.env["VLLM_ALLOW_LONG_MAX_MODEL_LEN"] = "1"
    engine["tensor_parallel_size"] = cfg.tp
    if profile.prefix_caching:
        engine["enable_prefix_caching"] = True
    return plan


def _check_listwise(plan: Plan) -> None:
    """Refuse settings that would divide a list, and say what is off for a listwise model."""
    cfg = plan.cfg
    if not cfg.guard:
        raise ConfigError(
            f"GUARD=0, and profile {plan.profile.name} is listwise: the guard keeps its lists whole, and control "
            "tokens in texts out of its prompt. Unset GUARD"
        )
    if cfg.long_documents == "chunk":
        raise ConfigError(
            f"LONG_DOCUMENTS=chunk splits documents into windows, and profile {plan.profile.name} is listwise: a score "
            "depends on the other documents of its call. Set LONG_DOCUMENTS to truncate or error"
        )
    for name in ("result_cache_mib", "result_cache_url"):
        if getattr(cfg, name):
            plan.why[name] = "off: a score depends on the other documents of its call (listwise)"


def _finished(plan: Plan) -> Plan:
    """The plan with the environment that every vLLM gets. A variable that the user set takes precedence."""
    plan.env |= {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    for key in list(plan.env):
        if key in os.environ or key in passed_on_env():
            plan.env.pop(key)
    return plan


def _guard_env(plan: Plan) -> dict[str, str]:
    """Settings of the guard, which reads the environment only."""
    cfg = plan.cfg
    # A secret joins the environment at the start of the server alone: the plan is shown.
    of_guard = {k: f for k, f in FIELDS.items() if f.metadata["group"] == "guard" and not f.metadata["secret"]}
    values = {k: getattr(cfg, f.name) for k, f in of_guard.items() if k != "GUARD"}
    env = {f"GUARD_{k}": str(v) for k, v in values.items() if v not in (None, "")}
    # Limit on pairs before the speed is measured: some seconds of work. On an H100 with 8 API processes, 1024 (128 for
    # each process) refused 16 concurrent calls of 32 documents.
    env["GUARD_FIRST_PAIRS"] = "1024" if plan.machine.is_cpu else "16384"
    # vLLM accepts an instruction for any model and drops it if the template does not use it.
    env["GUARD_TAKES_INSTRUCTION"] = str(int(plan.profile.instruction))
    env["GUARD_VERSION"] = version_id(plan)
    env["GUARD_HEALTH_TIMEOUT_S"], env["GUARD_ENGINES"] = str(plan.cfg.health_timeout_s), str(plan.copies)
    env["GUARD_SCORE_SCALE"] = json.dumps(score_scale(plan.profile, plan.checkpoint))
    env["GUARD_MODEL"] = cfg.served_model_name
    if plan.profile.listwise:
        env["GUARD_LISTWISE"] = "1"
    if plan.profile.late:
        env["GUARD_LATE"] = json.dumps(asdict(plan.profile.late))
    env |= images_env(plan)
    env["GUARD_STOP_DELAY_S"] = str(plan.cfg.stop_delay_s)
    # By default vLLM runs one API process for each data parallel rank.
    return env | {"GUARD_API_SERVERS": str(plan.api_servers or plan.copies)}


def version_id(plan: Plan) -> str:
    """12 hex digits of everything that decides a score. Replicas with the same id give the same scores, on any host.

    With EXACT=1 it ends in "-exact", and replicas with the same id give the same bits.
    """
    cfg = plan.cfg
    names = ("convert", "hf_overrides", "pooler_config", "dtype", "quantization", "max_model_len")
    decides = {name: plan.engine.get(name) for name in names}
    decides |= {name: getattr(cfg, name) for name in ("long_documents", "max_tokens_per_doc", "max_tokens_per_query")}
    decides |= {"template": plan.template, "extra_args": cfg.extra_args, "vllm": plan.machine.vllm_version}
    if plan.images:
        decides["images"] = plan.profile.images
    decides["checkpoint"] = content_id(plan.checkpoint.path)
    if cfg.exact:  # each kind of GPU has its own kernels, and so its own bits
        decides["exact"] = sorted({gpu.rpartition(",")[0] for gpu in plan.machine.gpus})
    digits = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:12]
    return f"{digits}-exact" if cfg.exact else digits


def _check_gpus(cfg: EnvConfig, machine: Machine, *, may_be_more: bool = False) -> None:
    """Raise ConfigError if the GPUs do not match the settings.

    may_be_more: more GPUs may be visible than are used. Offline, the list may be that of a service with DP.
    """
    copies, key = (cfg.engines_here, "DP_LOCAL") if has_other_nodes(cfg) else (cfg.dp, "DP")
    wanted = cfg.tp * copies
    visible = cfg.cuda_visible_devices
    if machine.is_cpu:
        if visible not in (None, "", "-1"):
            raise ConfigError(
                f"CUDA_VISIBLE_DEVICES={visible!r} asks for a GPU, but the installed vLLM {machine.vllm_version} is "
                "the CPU build: unset it, or install the GPU build on a machine with an NVIDIA driver"
            )
        return
    if not machine.gpus:
        raise ConfigError(
            f"vLLM {machine.vllm_version} is the GPU build, but nvidia-smi finds no GPU: check the driver, "
            "or use a Python environment with the CPU build"
        )
    n_visible = len([v for v in visible.split(",") if v.strip()]) if visible is not None else None
    if n_visible is not None and (n_visible < wanted if may_be_more else n_visible != wanted):
        raise ConfigError(
            f"TP x {key} = {cfg.tp} x {copies} = {wanted}, but CUDA_VISIBLE_DEVICES={visible!r} makes {n_visible} GPUs "
            f"visible: the two must be equal (TP={n_visible} spreads one model over them, {key}={n_visible} copies it)"
        )
    if wanted > len(machine.gpus):
        raise ConfigError(f"TP x {key} = {cfg.tp} x {copies} = {wanted}, but this host has {len(machine.gpus)} GPUs")


def _engines(plan: Plan) -> tuple[int, str]:
    """Engine processes on each GPU, and why."""
    cfg, machine = plan.cfg, plan.machine
    if cfg.engines_per_gpu:
        return cfg.engines_per_gpu, f"{cfg.engines_per_gpu}: ENGINES_PER_GPU"
    if machine.is_cpu:
        return 1, "1: the CPU build"
    if cfg.tp > 1 or has_other_nodes(cfg):
        return 1, "1: TP or several hosts"
    if find_flag(cfg.extra_args, "--data-parallel*"):
        return 1, "1: EXTRA_ARGS sets up data parallel ranks"
    n_cores = len(machine.cores) // cfg.dp
    n, why = engines_per_gpu(count_weights(plan.checkpoint.config), machine.gpu_mib, n_cores)
    return n, f"{n}: {why}"


def _max_model_len(cfg: EnvConfig, checkpoint: Checkpoint, profile: Profile) -> tuple[int, str]:
    """Tokens of the longest prompt, and why."""
    own, said = checkpoint.max_length, checkpoint.limit
    if profile.late:
        longest = max(profile.late.query_length, profile.late.document_length)
        return longest, "MAX_MODEL_LEN" if cfg.max_model_len else "the longer of query_length and document_length"
    usual = LIST_TOKENS if profile.listwise else 4096
    source = said.source if said and said.value < checkpoint.positions else "config.json: max_position_embeddings"
    if cfg.max_model_len is None:
        whole_list = ", for a whole list" if profile.listwise else ""
        most = f"at most {usual}{whole_list} unless MAX_MODEL_LEN is set"
        return min(usual, own), f"the model's limit is {own} ({source}); {most}"
    # A decoder takes longer prompts than its tokenizer's limit, which was a choice of whoever trained it.
    soft = profile.prefix_caching and "tokenizer" in source
    if cfg.max_model_len > (checkpoint.positions if soft else own):
        raise ConfigError(
            f"MAX_MODEL_LEN={cfg.max_model_len} is more than the {own} tokens that this model takes ({source})"
        )
    beyond = f"; the model's own library cuts at {own} ({source})" if cfg.max_model_len > own else ""
    return cfg.max_model_len, f"MAX_MODEL_LEN{beyond}"


def _service_steps(plan: Plan) -> tuple[int, int, str]:
    """Tokens and pairs of one engine step on a GPU, and why."""
    if plan.engines > 1:
        # Three engines on an H200: p50 at 8 calls in flight, then pairs/s at 8, 16, 64, 150 calls in flight.
        # 24576 tokens a step: 131 ms; 1967, 2503, 2747, 2787. 8192 tokens: 113 ms; 2217, 2605, 2651, 2720.
        return 8192, 256, "small steps lower the latency at light load, and several engines leave the GPU no gaps"
    return 24576, 256, "one engine needs large steps, because launching a step has a fixed cost"


def _plan_gpu(plan: Plan, tokens: int, pairs: int, reason: str) -> None:
    """Memory, steps and processes of the engines. tokens, pairs and reason are the defaults for one step."""
    cfg, engine, why = plan.cfg, plan.engine, plan.why
    share = cfg.gpu_memory_utilization or 0.85
    # Each engine checks at its start that its share is free, while the others allocate theirs.
    engine["gpu_memory_utilization"] = round(share / plan.engines, 3)
    _plan_steps(plan, tokens, pairs, reason)
    why.setdefault("quantization", "off: it changes scores, see docs/performance.md")
    why["gpu_memory_utilization"] = "GPU_MEMORY_UTILIZATION" if cfg.gpu_memory_utilization else "0.85 unless set"
    if plan.copies > 1 and cfg.tp == 1 and not find_flag(cfg.extra_args, *WORKERS):
        # By default each rank has a worker process of its own. H100, 0.6B, two engines on the card, vLLM 0.26, pairs/s
        # at 64 calls in flight: 2069 with worker processes, 2335 with the worker inside the engine's process.
        engine["distributed_executor_backend"] = "uni"
        why["distributed_executor_backend"] = "one process for each engine and its GPU"
    if plan.engines > 1:
        why["gpu_memory_utilization"] += f", shared by {plan.engines} engines"
        _plan_kv_cache(plan)
    if cfg.cuda_visible_devices is None:
        plan.env["CUDA_VISIBLE_DEVICES"] = ",".join(str(i) for i in range(cfg.tp * cfg.engines_here))


def _plan_steps(plan: Plan, tokens: int, pairs: int, reason: str) -> None:
    """Tokens and pairs of one engine step: the settings, or the defaults given here."""
    cfg, engine, why = plan.cfg, plan.engine, plan.why
    if engine["max_model_len"] > tokens:
        tokens, reason = engine["max_model_len"], "at least max_model_len"
    engine["max_num_batched_tokens"] = cfg.max_num_batched_tokens or tokens
    engine["max_num_seqs"] = cfg.max_num_seqs or pairs
    why["max_num_batched_tokens"] = "MAX_NUM_BATCHED_TOKENS" if cfg.max_num_batched_tokens else reason
    why["max_num_seqs"] = "MAX_NUM_SEQS" if cfg.max_num_seqs else f"{pairs} pairs a step unless set"


def _plan_kv_cache(plan: Plan) -> None:
    """KV cache of one of several engines on a GPU. vLLM's own measurement would count the memory of the others."""
    engine, cfg = plan.engine, plan.cfg
    if find_flag(cfg.extra_args, "--kv-cache-memory-bytes"):
        return
    share = engine["gpu_memory_utilization"] * plan.machine.gpu_mib * 2**20
    left = int(share - weight_bytes(plan.checkpoint.path, plan.checkpoint.config) / cfg.tp - ENGINE_GIB * GIB)
    step = engine["max_num_batched_tokens"] * _kv_bytes_per_token(plan) // cfg.tp
    if left < step:
        raise ConfigError(
            f"ENGINES_PER_GPU={plan.engines} leaves {max(0, left) / GIB:.1f} GiB of KV cache to each engine, and one "
            f"step of {engine['max_num_batched_tokens']} tokens needs {step / GIB:.1f}: lower ENGINES_PER_GPU or "
            "MAX_NUM_BATCHED_TOKENS"
        )
    engine["kv_cache_memory_bytes"] = min(left, max(KV_GIB_AT_MOST * GIB, 2 * step))
    plan.why["kv_cache_memory_bytes"] = f"an engine's share minus weights and {ENGINE_GIB} GiB; about six steps at most"


def _plan_tokenizing(plan: Plan) -> None:
    """API processes and the tokenizer's implementation, which limit a small model on a large GPU."""
    cfg = plan.cfg
    if cfg.api_server_count is None:
        n, why = api_servers(count_weights(plan.checkpoint.config), len(plan.machine.cores), cfg.dp)
        plan.api_servers = n if n > 1 or plan.copies > 1 else None
        plan.why["api_server_count"] = f"{n}: {why}"
    if "VLLM_USE_FASTOKENS" not in {**os.environ, **passed_on_env()}:
        agrees, why = fastokens_agrees(plan.checkpoint.path)
        if agrees:
            plan.env["VLLM_USE_FASTOKENS"] = "1"
        plan.why["fastokens"] = f"{'on' if agrees else 'off'}: {why}"


def _plan_light_load(plan: Plan) -> None:
    """What makes one call alone fast: one step for all its pairs, and CUDA graphs for steps of that size."""
    cfg, engine, why = plan.cfg, plan.engine, plan.why
    fits, why["scheduler_cls"] = whole_calls(plan.machine.vllm_version, cfg.extra_args)
    if fits:
        engine["scheduler_cls"] = "rerank_kit.engine.call_scheduler.CallScheduler"
        plan.env["RERANK_ENGINES"] = str(plan.copies)  # the scheduler cannot learn it from vLLM's configuration
    if find_flag(cfg.extra_args, *GRAPHS):
        why["compilation_config"] = "EXTRA_ARGS"
    elif (
        plan.profile.prefix_caching
        and plan.machine.gpu_mib > 70_000
        and 0 < count_weights(plan.checkpoint.config) <= 2e9
    ):
        # Measured with decoders on an H100 only. vLLM 0.32 captures the pieces of a pooling model only, and warns of
        # its own default mode.
        fits, why["compilation_config"] = step_graphs(plan.machine.vllm_version)
        if fits:
            sizes = graph_sizes(engine["max_num_batched_tokens"])
            engine["compilation_config"] = {"cudagraph_mode": "PIECEWISE", "cudagraph_capture_sizes": sizes}
            _plan_whole_graphs(plan)


def _plan_whole_graphs(plan: Plan) -> None:
    """Graphs of the whole forward pass, where they are proved."""
    cfg, engine = plan.cfg, plan.engine
    if cfg.tp > 1:
        plan.why["worker_cls"] = "graphs of the pieces: the whole pass is proved with TP=1"
        return
    fits, plan.why["worker_cls"] = whole_graphs(
        plan.machine.vllm_version, compute_capabilities(), cfg.dtype, plan.checkpoint.config, cfg.extra_args
    )
    if fits:
        engine["worker_cls"] = "rerank_kit.engine.whole_graphs.WholeGraphs"
        # The number of splits of a long prompt is fixed at capture.
        engine["attention_config"] = {"flash_attn_max_num_splits_for_cuda_graph": 1}


def _plan_watchdog(plan: Plan) -> None:
    """vLLM's own watchdog, from 0.33 on: it writes the stacks of all threads of a step that stalls into LOG_DIR."""
    cfg = plan.cfg
    if plan.machine.release < (0, 33) or not cfg.health_timeout_s or find_flag(cfg.extra_args, "--watchdog*"):
        return
    # Well before the supervisor kills what hangs for HEALTH_TIMEOUT_S.
    plan.engine["watchdog_config"] = {"dump_dir": str(cfg.log_path), "timeout": max(1, cfg.health_timeout_s // 2)}
    plan.why["watchdog_config"] = "stacks of a stalled step go to LOG_DIR after half of HEALTH_TIMEOUT_S"


def _plan_cpu(plan: Plan) -> None:
    """CPU build: all cores, a KV cache that fits, no compilation (which costs 25 s at every first start)."""
    cfg, engine, why, cores = plan.cfg, plan.engine, plan.why, plan.machine.cores
    _plan_steps(plan, 4096, 128, "small steps already keep a CPU busy")
    engine["enforce_eager"] = True
    if cfg.dtype == "auto":
        # vLLM would choose float16 for a float32 checkpoint, and the CPU build computes float16 many times slower.
        engine["dtype"] = "bfloat16" if cpu_has_bf16() else "float32"
        why["dtype"] = "bfloat16 if the CPU has instructions for it, else float32"
    if cfg.gpu_memory_utilization:
        engine["gpu_memory_utilization"] = cfg.gpu_memory_utilization
        why["gpu_memory_utilization"] = "GPU_MEMORY_UTILIZATION; on the CPU a share of the host's memory"
    elif "VLLM_CPU_KVCACHE_SPACE" not in {**os.environ, **passed_on_env()}:
        need = 2 * engine["max_num_batched_tokens"] * _kv_bytes_per_token(plan)
        engine["kv_cache_memory_bytes"] = max(GIB, need)
        why["kv_cache_memory_bytes"] = "room for two engine steps, at least 1 GiB"
        all_engines = plan.copies_here * engine["kv_cache_memory_bytes"]
        if all_engines > 0.8 * plan.machine.memory_bytes:
            free = plan.machine.memory_bytes / GIB
            raise ConfigError(
                f"{all_engines / GIB:.1f} GiB of KV cache do not fit into {free:.1f} GiB of free "
                "memory: lower MAX_NUM_BATCHED_TOKENS or MAX_MODEL_LEN"
            )
    workers = cfg.tp * plan.copies_here
    if workers > 1:
        plan.env["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        plan.env["OMP_NUM_THREADS"] = str(max(1, len(cores) // workers))
        why["threads"] = f"{len(cores)} cores shared by {workers} workers"
    elif plan.machine.cpu_quota:
        # The limit is on time, not on cores: the same cores for every container of a host would be crowded.
        plan.env["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        plan.env["OMP_NUM_THREADS"] = str(len(cores))
        why["threads"] = f"{len(cores)} by the cgroup's CPU limit of {plan.machine.cpu_quota:g}"
    elif len(cores) <= 4:
        # vLLM would reserve a core for the API process; with 2 cores that is half of the machine.
        plan.env["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, cores))
        why["threads"] = f"all {len(cores)} cores compute"
    else:
        why["threads"] = "vLLM binds a thread to each physical core except one"


def _kv_bytes_per_token(plan: Plan) -> int:
    config = plan.checkpoint.config
    heads = config.get("num_attention_heads") or 1
    size = 4 if plan.engine["dtype"] in ("float", "float32") else 2
    head_dim = config.get("head_dim") or (config.get("hidden_size") or 1024) // heads
    layers = config.get("num_hidden_layers") or 1
    return 2 * layers * (config.get("num_key_value_heads") or heads) * head_dim * size

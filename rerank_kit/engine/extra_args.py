"""What EXTRA_ARGS may not hold: flags of `vllm serve` that would undo what a setting or a profile has decided.

vLLM takes the last value of a flag, and EXTRA_ARGS comes last: `--host 0.0.0.0` would open a service whose HOST was
checked, `--served-model-name x` would make the kit's own probes fail.
"""

import re
import shlex

from rerank_kit.settings import ConfigError, EnvConfig

PROFILE = "the profile decides it; MODEL_PROFILE names another one, and profiles/ takes one of your own"
REPLACED = {
    "--host": "set HOST",
    "--port": "set PORT",
    "--uds": "set HOST and PORT",
    "--api-key": "set API_KEY or API_KEY_FILE, which no process list shows",
    "--ssl-certfile": "set SSL_CERTFILE",
    "--ssl-keyfile": "set SSL_KEYFILE",
    "--ssl-ca-certs": "the kit's own calls bring no certificate; let a proxy ask clients for theirs",
    "--ssl-cert-reqs": "the kit's own calls bring no certificate; let a proxy ask clients for theirs",
    "--root-path": "let the proxy take the prefix off; the guard serves paths without one",
    "--shutdown-timeout": "set STOP_TIMEOUT_S",
    "--api-server-count": "set API_SERVER_COUNT",  # each guard must know their number
    "--config": "write settings into .env",
    "--model": "set MODEL_PATH",
    "--model-tag": "set MODEL_PATH",
    "--chat-template": f"set TEMPLATE, INSTRUCTION or MODEL_PROFILE: {PROFILE}",
    "--hf-overrides": PROFILE,
    "--pooler-config": PROFILE,
    "--runner": PROFILE,
    "--convert": PROFILE,
    "--task": PROFILE,
    "--dtype": "set DTYPE",
    "--quantization": "set QUANTIZATION",
    "--max-model-len": "set MAX_MODEL_LEN",
    "--max-num-batched-tokens": "set MAX_NUM_BATCHED_TOKENS",
    "--max-num-seqs": "set MAX_NUM_SEQS",
    "--gpu-memory-utilization": "set GPU_MEMORY_UTILIZATION",
    "--tensor-parallel-size": "set TP",
    "--data-parallel-size": "set DP",
    "--data-parallel-size-local": "set DP_LOCAL",
    "--data-parallel-address": "set DP_ADDRESS",
    "--data-parallel-rpc-port": "set DP_RPC_PORT",
    "--data-parallel-start-rank": "set NODE_RANK",
    "--headless": "set NODE_RANK",
}
SHORT = {
    "-asc": "--api-server-count",
    "-q": "--quantization",
    "-tp": "--tensor-parallel-size",
    "-dp": "--data-parallel-size",
    "-dpl": "--data-parallel-size-local",
    "-dpa": "--data-parallel-address",
    "-dpp": "--data-parallel-rpc-port",
    "-dpr": "--data-parallel-start-rank",
}
# Short forms of flags that nothing replaces, but that a choice looks for.
OTHER_SHORT = {
    "-pp": "--pipeline-parallel-size",
    "-dcp": "--decode-context-parallel-size",
    "-pcp": "--prefill-context-parallel-size",
    "-n": "--nnodes",
    "-cc": "--compilation-config",
    "-ac": "--attention-config",
    "-sc": "--speculative-config",
    "-O": "--optimization-level",
}


def check_extra_args(cfg: EnvConfig) -> None:
    """Raise ConfigError if EXTRA_ARGS holds a flag that a setting replaces, with that setting."""
    try:
        words = shlex.split(cfg.extra_args)
    except ValueError:
        return  # reported where the command is built
    for number, word in enumerate(words):
        name = _flag(word)
        if name == "--served-model-name":
            _check_names(cfg, words, number)
        elif name == "--middleware" and re.search(r"(server_guard|rerank_kit\.guard)\.Guard", " ".join(words)):
            raise ConfigError(
                "EXTRA_ARGS holds --middleware with the kit's guard: take it out, GUARD=1 loads the guard "
                "(server_guard.Guard is rerank_kit.guard.Guard now)"
            )
        elif name in REPLACED:
            raise ConfigError(f"EXTRA_ARGS holds {_written(word)}: take it out, {REPLACED[name]}")


# For a regular expression: flags of vLLM with a secret, and the beginnings of them that it takes.
SECRET_FLAG = r"--(?:api[-_]k(?:ey?)?|hf[-_]t(?:o(?:k(?:en?)?)?)?)"


def find_flag(extra_args: str, *wanted: str) -> str | None:
    """The first word of EXTRA_ARGS, as written and without its value, that vLLM takes for a wanted flag.

    Args:
        wanted: full names of flags; one that ends in * stands for all flags with that beginning.
    """
    for word in _words(extra_args):
        name = _full(word)
        for flag in wanted:
            whole = flag.rstrip("*")
            shortened = len(name) >= 4 and name.startswith("--") and whole.startswith(name)
            if name == whole or shortened or (flag != whole and name.startswith(whole)):
                return _NAME.split(word, maxsplit=1)[0]
    return None


def _words(extra_args: str) -> list[str]:
    try:
        return shlex.split(extra_args)
    except ValueError:  # reported where the command is built
        return extra_args.split()


_NAME = re.compile(r"[=.]")  # ends there: a value or a JSON path follows


def _full(word: str) -> str:
    """The flag's name with dashes, without value and JSON path; that of a short form in full."""
    name = _NAME.split(word, maxsplit=1)[0]
    if name.startswith("--"):
        return name.replace("_", "-").rstrip("+")
    return {**SHORT, **OTHER_SHORT}.get(re.sub(r"^-O\d$", "-O", name), name)


def _written(word: str) -> str:
    return word.partition("=")[0]  # the value may be a key


def _flag(word: str) -> str:
    """The full name of the flag that vLLM takes this word for; the word itself if it is none of those above.

    vLLM accepts underscores, unambiguous beginnings (--served-model), and JSON in parts (--hf-overrides.a.b).
    """
    name = _full(word)
    if not name.startswith("--"):
        return name
    known = [*REPLACED, "--served-model-name", "--middleware"]
    return name if name in known or len(name) < 4 else next((flag for flag in known if flag.startswith(name)), name)


def _check_names(cfg: EnvConfig, words: list[str], number: int) -> None:
    """Further names are an extension, but the kit's own calls send SERVED_MODEL_NAME."""
    first = words[number].partition("=")[2]
    names = [first] if first else []
    for word in words[number + 1 :]:
        if word.startswith("-"):
            break
        names.append(word)
    if cfg.served_model_name not in names:
        raise ConfigError(
            f"EXTRA_ARGS holds --served-model-name without SERVED_MODEL_NAME={cfg.served_model_name}: set that one, or "
            f'name it too ("--served-model-name {cfg.served_model_name} second")'
        )

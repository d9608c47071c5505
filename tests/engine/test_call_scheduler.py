"""call_scheduler.py inside vLLM's own scheduling code: one engine's scheduler, without a model."""

import time
from importlib.util import find_spec

import pytest
import tiny_models
from conftest import Later

pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")
code = Later("rerank_kit.engine.call_scheduler")
TOKENS = 20  # of a pair


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    from vllm.engine.arg_utils import EngineArgs

    folder = tiny_models.qwen3_reranker(tmp_path_factory.mktemp("calls") / "Qwen3-Reranker-tiny")
    more = {"hf_overrides": {"architectures": ["Qwen3ForSequenceClassification"], "num_labels": 1}}
    args = EngineArgs(model=str(folder), runner="pooling", max_model_len=512, max_num_batched_tokens=512, **more)
    args.max_num_seqs, args.enable_prefix_caching = 16, False
    return args.create_engine_config()


class Clock:
    """time.monotonic() of call_scheduler.py."""

    def __init__(self):
        self.now_s = 100.0

    def monotonic(self):
        return self.now_s


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr("rerank_kit.engine.call_scheduler.time", clock)
    return clock


@pytest.fixture
def scheduler(config, clock):
    return make(config)


def make(config):
    import torch
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.structured_output import StructuredOutputManager

    config.cache_config.num_gpu_blocks = 1000
    spec = FullAttentionSpec(block_size=16, num_kv_heads=1, head_size=16, dtype=torch.float32)
    cache = KVCacheConfig(num_blocks=1000, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)])
    manager = StructuredOutputManager(config)
    return code.CallScheduler(config, cache, manager, block_size=16, hash_block_size=16, log_stats=True)


def add(scheduler, *ids, task="classify", tokens=TOKENS):
    from vllm import PoolingParams
    from vllm.v1.request import Request

    for request_id in ids:
        own = [hash((request_id, i)) % 900 for i in range(tokens)]
        scheduler.add_request(
            Request(
                request_id=request_id,
                prompt_token_ids=own,
                sampling_params=None,
                pooling_params=PoolingParams(task=task),
            )
        )


def pair(call, n, index):
    return f"score-{call}.n{n}-{index}-0123abcd"


def n_pairs(scheduler):
    return len(scheduler.schedule().num_scheduled_tokens)


def test_call_waits_until_it_is_complete(scheduler, clock):
    add(scheduler, pair("a", 3, 0))
    assert n_pairs(scheduler) == 0 and scheduler.has_requests()
    add(scheduler, pair("a", 3, 1))
    assert n_pairs(scheduler) == 0
    add(scheduler, pair("a", 3, 2))
    assert n_pairs(scheduler) == 3


def test_single_pair_never_waits(scheduler):
    add(scheduler, pair("a", 1, 0))
    assert n_pairs(scheduler) == 1


def test_call_that_stops_arriving_is_scored(scheduler, clock):
    add(scheduler, pair("a", 9, 0), pair("a", 9, 1))
    clock.now_s += code.KNOWN_QUIET_S * 0.9
    assert n_pairs(scheduler) == 0
    clock.now_s += code.KNOWN_QUIET_S * 0.2
    assert n_pairs(scheduler) == 2


def test_wait_is_bounded_while_pairs_trickle_in(scheduler, clock):
    begin, index = clock.now_s, 0
    while True:
        add(scheduler, pair("a", 10**6, index), tokens=1)
        index += 1
        if scheduler.schedule().num_scheduled_tokens:
            break
        clock.now_s += code.QUIET_S / 1.5
    assert clock.now_s - begin <= code.HOLD_S + code.QUIET_S


def test_unknown_count_waits_for_one_quiet_step(scheduler, clock):
    add(scheduler, "score-mine-0-0123abcd", "score-mine-1-0123abcd")
    assert n_pairs(scheduler) == 0
    clock.now_s += code.QUIET_S * 1.1
    assert n_pairs(scheduler) == 2


def test_embedding_texts_beyond_the_count_are_waited_for(scheduler, clock):
    add(scheduler, pair("a", 2, 0), pair("a", 2, 1), task="embed")
    assert n_pairs(scheduler) == 0
    add(scheduler, pair("a", 2, 2), task="embed")
    clock.now_s += code.QUIET_S * 1.1
    assert n_pairs(scheduler) == 3


def test_full_step_does_not_wait(scheduler):
    limit = scheduler.max_num_scheduled_tokens
    add(scheduler, pair("a", 99, 0), pair("a", 99, 1), tokens=limit // 2)
    assert n_pairs(scheduler) == 2


def test_as_many_pairs_as_a_step_takes_do_not_wait(scheduler):
    add(scheduler, *(pair("a", 99, i) for i in range(16)))
    assert n_pairs(scheduler) == 16


def test_engines_share_a_call(config, clock, monkeypatch):
    from copy import deepcopy

    monkeypatch.setenv("RERANK_ENGINES", "3")
    config = deepcopy(config)
    config.parallel_config.data_parallel_size, config.parallel_config.data_parallel_rank = 3, 1
    config.parallel_config.reconfigure_for_independent_dp_rank()  # as vLLM's engines do first
    scheduler = make(config)
    add(scheduler, pair("a", 8, 0), pair("a", 8, 3))
    assert n_pairs(scheduler) == 0
    add(scheduler, pair("a", 8, 6))
    assert n_pairs(scheduler) == 3


def test_second_call_waits_behind_the_first(scheduler, clock):
    add(scheduler, pair("a", 2, 0), pair("a", 2, 1), pair("b", 2, 0))
    assert n_pairs(scheduler) == 0
    add(scheduler, pair("b", 2, 1))
    assert n_pairs(scheduler) == 4


def test_abort_of_a_waiting_call_leaves_nothing(scheduler, clock):
    from vllm.v1.request import RequestStatus

    add(scheduler, pair("a", 3, 0))
    assert n_pairs(scheduler) == 0
    scheduler.finish_requests(pair("a", 3, 0), RequestStatus.FINISHED_ABORTED)
    output = scheduler.schedule()
    assert output.finished_req_ids == {pair("a", 3, 0)} and not output.num_scheduled_tokens
    assert not scheduler.has_requests() and not scheduler.requests
    add(scheduler, pair("b", 1, 0))
    assert n_pairs(scheduler) == 1 and not scheduler.open_calls


def test_finished_ids_leave_with_an_empty_step(scheduler, clock):
    from vllm.v1.request import RequestStatus

    add(scheduler, pair("a", 1, 0))
    assert n_pairs(scheduler) == 1
    scheduler.finish_requests(pair("a", 1, 0), RequestStatus.FINISHED_ABORTED)
    add(scheduler, pair("b", 2, 0))
    output = scheduler.schedule()
    assert output.finished_req_ids == {pair("a", 1, 0)} and not output.num_scheduled_tokens


def test_running_pairs_are_never_held(scheduler, clock):
    add(scheduler, pair("a", 1, 0), tokens=400)
    add(scheduler, pair("b", 1, 0), tokens=400)
    first = scheduler.schedule()
    assert sum(first.num_scheduled_tokens.values()) == 512  # the second in part
    add(scheduler, pair("c", 5, 0))
    assert pair("b", 1, 0) in scheduler.schedule().num_scheduled_tokens


def test_paused_scheduler_stays_paused(scheduler, clock):
    from vllm.v1.core.sched.interface import PauseState

    scheduler.set_pause_state(PauseState.PAUSED_ALL)
    add(scheduler, pair("a", 1, 0), pair("b", 2, 0))
    assert n_pairs(scheduler) == 0 and scheduler.pause_state == PauseState.PAUSED_ALL
    scheduler.set_pause_state(PauseState.UNPAUSED)
    assert n_pairs(scheduler) == 2 and scheduler.pause_state == PauseState.UNPAUSED


def test_empty_steps_report_no_statistics(scheduler, clock):
    from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT

    add(scheduler, pair("a", 2, 0))
    output = scheduler.schedule()
    assert scheduler.update_from_output(output, EMPTY_MODEL_RUNNER_OUTPUT) == {}


def test_clock_is_the_real_one_outside_tests(config):
    scheduler = make(config)
    add(scheduler, pair("a", 5, 0))
    assert n_pairs(scheduler) == 0
    time.sleep(code.KNOWN_QUIET_S * 2)
    assert n_pairs(scheduler) == 1

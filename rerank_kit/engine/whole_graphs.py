"""A vLLM worker that replays the whole forward pass of a reranker as one CUDA graph.

`vllm serve --worker-cls rerank_kit.engine.whole_graphs.WholeGraphs --attention-config
'{"flash_attn_max_num_splits_for_cuda_graph": 1}'`. vLLM 0.32 captures only the pieces between two attentions for
pooling models, so a step of a 28-layer model is 57 launches from Python. FlashAttention 3 (Hopper) can be captured for
any mix of prompts (AttentionCGSupport.ALWAYS), and vLLM does so for text generation.

Source: VllmConfig.__post_init__ of vLLM 0.32.0 ("Pooling models do not support full cudagraphs"), which gives no
reason; vllm/v1/worker/gpu/cudagraph_utils.py.
"""

from vllm.config import CUDAGraphMode, VllmConfig
from vllm.v1.worker.gpu_worker import Worker


class WholeGraphs(Worker):
    """vLLM's worker, but for the mode that its configuration rules out."""

    def __init__(self, vllm_config: VllmConfig, *args, **kwargs):
        vllm_config.compilation_config.cudagraph_mode = CUDAGraphMode.FULL
        super().__init__(vllm_config, *args, **kwargs)

"""An experiment, not used by the kit: the whole forward pass of a pooling model in one CUDA graph.

`vllm serve --worker-cls full_graph_worker.FullGraphWorker`. vLLM 0.32 itself allows graphs of pieces only.
"""

from vllm.config import CUDAGraphMode
from vllm.v1.worker.gpu_worker import Worker


class FullGraphWorker(Worker):
    def __init__(self, vllm_config, *args, **kwargs):
        vllm_config.compilation_config.cudagraph_mode = CUDAGraphMode.FULL
        super().__init__(vllm_config, *args, **kwargs)

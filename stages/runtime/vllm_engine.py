"""vLLM as an engine to be timed, in this very process. It is optional: nothing here imports it before an engine is made.

Facts: engine arguments, https://docs.vllm.ai/en/latest/configuration/engine_args.html; `int8_per_token_head`, vllm-project/vllm pull
request 38378; with its engine in a child process single calls stall now and then (vllm-project/vllm issue 48229), so that it is not.
"""

import os
import time
from typing import Any

import torch

from pipeline.artifact import Checkpoint
from pipeline.compute_dtype import Dtype
from pipeline.kv_sidecar import read_cache
from stages.runtime.benchmarking import release
from stages.runtime.harness_vllm import VLLM_DTYPES
from stages.runtime.loading import resolve_device

SETTINGS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}  # the engine in this process; no report to its authors


def engine_arguments(checkpoint: Checkpoint, dtype: Dtype, max_tokens: int, batch_size: int, tensor_parallel_size: int) -> dict[str, Any]:
    """Of `vllm.LLM`, to serve `batch_size` sequences of up to `max_tokens` tokens.

    Packed weights have their own kernels. The cache is INT8 where the checkpoint
    asks for it, and prompts are read anew each time.
    """
    cache = {"kv_cache_dtype": "int8_per_token_head"} if read_cache(checkpoint.path) else {}
    return {
        "model": str(checkpoint.path),
        "dtype": VLLM_DTYPES[dtype],
        "max_model_len": max_tokens,
        "max_num_seqs": batch_size,
        "tensor_parallel_size": tensor_parallel_size,
        "enable_prefix_caching": False,
        "skip_tokenizer_init": True,  # prompts are token ids
        "trust_remote_code": False,
        "seed": 0,
        **cache,
    }


class VLLMEngine:
    """Decoding is timed as the whole less its prefill: `generate` tells no times between tokens."""

    label = "vllm"

    def __init__(self, checkpoint: Checkpoint, dtype: Dtype, max_tokens: int, batch_size: int, tensor_parallel_size: int) -> None:
        """ValueError where there is no GPU."""
        self.device: torch.device = resolve_device("cuda")
        os.environ.update(SETTINGS)
        import vllm

        self.vllm = vllm
        self.label = f"vllm {vllm.__version__}" + (f", over {tensor_parallel_size} GPUs" if tensor_parallel_size > 1 else "")
        started = time.perf_counter()
        self.model: Any = vllm.LLM(**engine_arguments(checkpoint, dtype, max_tokens, batch_size, tensor_parallel_size))
        self.load_seconds = time.perf_counter() - started

    def run(self, prompt: torch.Tensor, new_tokens: int) -> tuple[float, float]:
        prefill = self._seconds(prompt, 1)
        return prefill, self._seconds(prompt, new_tokens) - prefill

    def _seconds(self, prompt: torch.Tensor, new_tokens: int) -> float:
        greedy = self.vllm.SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
        prompts = [{"prompt_token_ids": row} for row in prompt.tolist()]
        started = time.perf_counter()
        self.model.generate(prompts, greedy, use_tqdm=False)
        return time.perf_counter() - started

    def weights_bytes(self) -> int | None:
        return None

    def cache_bytes(self) -> int | None:
        """It is taken in advance, as large as memory allows."""
        return None

    def close(self) -> None:
        self.model = None
        release(self.device)

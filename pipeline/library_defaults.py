"""Settings of libraries, for every process of llmpress that imports them."""

import os

LIBRARY_DEFAULTS = {
    "OMP_WAIT_POLICY": "PASSIVE",  # idle threads sleep: spinning ones make two runs on the same cores ten times as slow
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # cuda.is_available() then asks the driver without initialising CUDA
    "THP_MEM_ALLOC_ENABLE": "1",  # torch takes large tensors from huge pages and returns them: peaks are lower
    "HF_HUB_OFFLINE": "1",  # a stage reads what the plan names; bitsandbytes would fetch native code wherever `kernels` is installed
    "JE_ARROW_MALLOC_CONF": "background_thread:false",  # pyarrow (through pandas) would start a thread, after which forking is unsafe
}


def set_library_defaults() -> None:
    """Before torch is imported. What the user's environment says goes first."""
    for name, value in LIBRARY_DEFAULTS.items():
        os.environ.setdefault(name, value)

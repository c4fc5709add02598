"""What a process says of its own memory."""

import os
import subprocess
import sys

import pytest

from pipeline.usage import parse_peak_rss, peak_rss, resident

CORES = os.cpu_count() or 1
KERNEL_SLACK = max(8 << 20, CORES * max(32, 2 * CORES) * 4096)  # bytes: Linux adds the counts of its cores up when they are large enough
BLOCK = max(64 << 20, 4 * KERNEL_SLACK)


def test_peak_memory_is_in_bytes() -> None:
    assert parse_peak_rss("Name:\tx\nVmHWM:\t  2048 kB\n") == 2048 * 1024
    assert parse_peak_rss("State:\tZ (zombie)\n") == 0
    code = f"from pipeline.usage import peak_rss; before = peak_rss(); block = bytearray({BLOCK}); print(peak_rss() - before)"
    grown = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)  # this process has had its peak
    assert 0.5 * BLOCK <= int(grown.stdout) <= 1.5 * BLOCK


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not say what is resident now")
def test_what_is_resident_falls_again_and_the_peak_does_not() -> None:
    block = bytearray(b"x") * BLOCK
    held, peak = resident(), peak_rss()
    assert held is not None and held < peak + KERNEL_SLACK
    del block
    after = resident()
    assert after is not None and held - after > 0.75 * BLOCK
    assert peak_rss() > peak - KERNEL_SLACK


def test_asking_for_gpu_memory_imports_nothing() -> None:
    code = "import sys; from pipeline.usage import peak_vram; print(peak_vram(), 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "None False\n"


def test_asking_for_gpu_memory_does_not_initialise_cuda() -> None:
    code = "import torch; from pipeline.usage import peak_vram; print(peak_vram(), torch.cuda.is_initialized())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "None False\n"


@pytest.mark.gpu
def test_gpu_memory_that_was_freed_counts_in_the_peak() -> None:
    code = """
import torch
from pipeline.usage import peak_vram
del_me = torch.zeros(64 << 20, dtype=torch.uint8, device="cuda")
del del_me
torch.cuda.empty_cache()
print(peak_vram())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 64 << 20 <= int(done.stdout) < 128 << 20

"""The machine: what it is, and the arithmetic that is fast on it."""

import functools
import platform
import time
from typing import Any

import torch


@functools.cache
def compute_dtype() -> torch.dtype:
    """bfloat16; float32 on a CPU without instructions for bfloat16 (no AVX-512, as most laptops).

    PyTorch multiplies bfloat16 there in a plain loop: 400 times as slowly as float32, measured on
    two Zen 3 cores. On other CPUs both take about as long, so a factor of 4 tells them apart."""
    if torch.accelerator.is_available():
        return torch.bfloat16
    matrices = [torch.ones(256, 256, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)]
    single, half = (min(product_seconds(matrix) for _ in range(3)) for matrix in matrices)
    return torch.float32 if half > 4 * single else torch.bfloat16


def product_seconds(matrix: torch.Tensor) -> float:
    """Seconds of one matrix product on the CPU."""
    started = time.perf_counter()
    matrix @ matrix
    return time.perf_counter() - started


def describe_hardware() -> dict[str, Any]:
    """For config.json: the device, its name, how many (a CPU's threads), and the arithmetic."""
    if torch.cuda.is_available():
        device, name, count = "cuda", torch.cuda.get_device_name(), torch.cuda.device_count()
    else:
        device, count = "cpu", torch.get_num_threads()
        name = platform.processor() or platform.machine()
    return {"device": device, "name": name, "count": count,
            "dtype": str(compute_dtype()).removeprefix("torch.")}

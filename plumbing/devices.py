"""The machine: what it is, and the arithmetic that is fast on it."""

import platform
from typing import Any

import torch


def compute_dtype() -> torch.dtype:
    """bfloat16; float32 on a CPU without instructions for bfloat16 (no AVX-512, as most laptops).

    PyTorch multiplies bfloat16 there in a plain loop: 400 times as slowly as float32, measured on
    two Zen 3 cores. Asked is what PyTorch asks itself before it takes the loop: a measurement could
    come out otherwise on a busy machine, or on another rank."""
    if torch.accelerator.is_available():
        return torch.bfloat16
    mkldnn = torch.backends.mkldnn.is_available()
    fast = mkldnn and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if fast else torch.float32


def describe_hardware() -> dict[str, Any]:
    """For config.json: the device, its name, how many (a CPU's threads), and the arithmetic."""
    if torch.cuda.is_available():
        device, name, count = "cuda", torch.cuda.get_device_name(), torch.cuda.device_count()
    else:
        device, count = "cpu", torch.get_num_threads()
        name = platform.processor() or platform.machine()
    return {"device": device, "name": name, "count": count,
            "dtype": str(compute_dtype()).removeprefix("torch.")}

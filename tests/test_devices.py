"""The arithmetic: float32 where PyTorch multiplies bfloat16 in a plain loop."""

import time

import pytest
import torch
from helpers import make_model, make_tokenizer

from plumbing import devices, models, served
from plumbing.runfolder import describe_run


@pytest.fixture(params=[(True, "bfloat16", "bf16"), (False, "float32", "no")])
def arithmetic(request, monkeypatch) -> tuple[str, str]:
    """A CPU that has, or lacks, instructions for bfloat16: the dtype, and Accelerate's name."""
    has, dtype, precision = request.param
    if torch.accelerator.is_available():
        dtype, precision = "bfloat16", "bf16"
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: has)
    return dtype, precision


def test_the_arithmetic_is_what_the_machine_multiplies_fast(arithmetic):
    dtype, precision = arithmetic
    assert devices.compute_dtype() == getattr(torch, dtype)
    assert describe_run()["hardware"]["dtype"] == dtype
    assert models.make_accelerator().mixed_precision == precision


def test_the_sampler_has_the_same_arithmetic(arithmetic, tmp_path):
    tokenizer = make_tokenizer()
    models.save_model(make_model(len(tokenizer)), tokenizer, tmp_path / "model")
    generator = served.load_generator(str(tmp_path / "model"), "hf")
    assert generator.model.dtype == getattr(torch, arithmetic[0])


@pytest.mark.skipif(torch.accelerator.is_available(), reason="a CPU's choice")
def test_it_is_not_the_plain_loop_on_this_machine():
    """In seconds of this thread, which other work on the machine doesn't lengthen."""
    seconds = {}
    for dtype in (torch.float32, devices.compute_dtype()):
        matrix, begun = torch.ones(512, 512, dtype=dtype), time.thread_time()
        matrix @ matrix
        seconds[dtype] = time.thread_time() - begun
    assert seconds[devices.compute_dtype()] < 20 * seconds[torch.float32] + 0.05

"""The arithmetic: float32 where a machine multiplies bfloat16 in a plain loop."""

import pytest
import torch
from helpers import make_model, make_tokenizer

from plumbing import devices, models, served
from plumbing.runfolder import describe_run


@pytest.fixture
def half_takes(monkeypatch):
    """Set how many times as long as float32's a bfloat16 product takes."""
    def use(times: float) -> None:
        seconds = {torch.float32: 1.0, torch.bfloat16: times}
        monkeypatch.setattr(devices, "product_seconds", lambda matrix: seconds[matrix.dtype])
        devices.compute_dtype.cache_clear()
    yield use
    monkeypatch.undo()
    devices.compute_dtype.cache_clear()


@pytest.mark.parametrize(("times", "dtype"),
                         [(400, "float32"), (1.5, "bfloat16"), (0.3, "bfloat16")])
def test_the_arithmetic_is_what_the_machine_multiplies_fast(half_takes, times, dtype):
    half_takes(times)
    if torch.accelerator.is_available():
        dtype = "bfloat16"
    assert devices.compute_dtype() == getattr(torch, dtype)
    assert describe_run()["hardware"]["dtype"] == dtype
    precision = models.make_accelerator().mixed_precision
    assert precision == {"bfloat16": "bf16", "float32": "no"}[dtype]


@pytest.mark.parametrize("times", [400, 1.5])
def test_the_sampler_has_the_same_arithmetic(half_takes, tmp_path, times):
    half_takes(times)
    tokenizer = make_tokenizer()
    models.save_model(make_model(len(tokenizer)), tokenizer, tmp_path / "model")
    generator = served.load_generator(str(tmp_path / "model"), "hf")
    assert generator.model.dtype == devices.compute_dtype()

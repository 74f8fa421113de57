"""Clocks and rates: seconds by phase, tokens and useful operations per second, MFU."""

import itertools
import math
import time
from collections import Counter
from contextlib import contextmanager

import torch
from accelerate import Accelerator

from plumbing.devices import compute_dtype
from plumbing.ranks import Pass, Worker
from plumbing.scorer import own_tokens


class PhaseClock:
    """Seconds of one step by phase: `with clock("rollout"): ...`."""

    def __init__(self):
        self.started, self.seconds = time.perf_counter(), Counter()

    @contextmanager
    def __call__(self, phase: str):
        begun = time.perf_counter()
        try:
            yield
        finally:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.seconds[phase] += time.perf_counter() - begun

    def metrics(self) -> dict[str, float]:
        phases = {f"time/{phase}": seconds for phase, seconds in self.seconds.items()}
        return phases | {"time/step": time.perf_counter() - self.started}


def rates(trainer: Worker, metrics: dict[str, float], peak: float) -> dict[str, float]:
    """Tokens and useful TFLOP per second by phase, over all ranks; MFU of the update.

    peak: measured FLOP/s of all ranks. Useful operations: see `Pass`; the head counts for scored
    tokens only, a shared prefix once (as tokens in every sequence). Recomputation and the products
    inside attention don't count."""
    found = {"rate/rollout_tokens": metrics["cost/policy_tokens"]
             / metrics.get("time/rollout", math.inf)}
    for phase, operations in (("reference", 2), ("update", 6)):
        done = [work for work in trainer.work if work.operations == operations]
        tokens = trainer.total(sum(len(s.ids) for work in done for s in work.batch))
        products = sum(useful_products(trainer.accelerator, work) for work in done)
        flops = trainer.total(operations * products)
        found[f"rate/{phase}_tokens"] = tokens / metrics[f"time/{phase}"]
        found[f"rate/{phase}_tflops"] = flops / metrics[f"time/{phase}"] / 1e12
    trainer.work.clear()
    return found | {"rate/mfu": found["rate/update_tflops"] * 1e12 / peak}


def useful_products(accelerator: Accelerator, work: Pass) -> int:
    """Parameters times the tokens they see: all for the body, none for the embedding (a lookup),
    scored ones for the head."""
    seen = sum(own_tokens(s, above) for above, s in itertools.pairwise([None, *work.batch]))
    scored = sum(sum(s.mask[1:]) for s in work.batch)
    decoder, head = accelerator.unwrap_model(work.module).parts()
    body = sum(p.numel() for p in decoder.parameters())
    body -= decoder.get_input_embeddings().weight.numel()
    return body * seen + head.weight.numel() * scored


def peak_flops(device: torch.device) -> float:
    """FLOP/s of a large matrix product in `compute_dtype`, best of three: MFU's denominator."""
    n = 8192 if device.type == "cuda" else 2048
    matrix = torch.rand(n, n, generator=torch.Generator().manual_seed(0))
    matrix = matrix.to(device, compute_dtype())
    clock = PhaseClock()
    for trial in ("0", "1", "2"):
        with clock(trial):
            matrix @ matrix
    return 2 * n**3 / min(clock.seconds.values())

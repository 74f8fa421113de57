"""Clocks and rates: seconds by phase, useful operations, MFU."""

import itertools
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch import nn

from plumbing.scorer import Sequence, own_tokens


class PhaseClock:
    """Seconds by phase of one step: `with clock("rollout"): ...`."""

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
        return {f"time/{phase}": s for phase, s in self.seconds.items()} | {"time/step": time.perf_counter() - self.started}


@dataclass
class Pass:
    """A module's pass over a micro-batch: forward (2 operations a parameter and token) or backward too (6)."""

    module: nn.Module
    batch: list[Sequence]
    operations: Literal[2, 6]


def rates(trainer: Any, metrics: dict[str, float], peak: float) -> dict[str, float]:
    """Tokens a second and useful TFLOP/s by phase, over all ranks; MFU, the share of their measured peak the update reaches.

    Useful operations: 2 (forward) or 6 (backward too) for each parameter of the body and token, and for each of the head
    where it scores a token. A beginning that sequences of a micro-batch share is computed, and counted, once; as tokens
    a second it counts in each. Recomputation and attention's own products don't count."""
    found = {"rate/rollout_tokens": metrics["cost/policy_tokens"] / metrics["time/rollout"]}
    for phase, operations in (("reference", 2), ("update", 6)):
        done = [work for work in trainer.work if work.operations == operations]
        tokens = trainer.total(sum(len(s.ids) for work in done for s in work.batch))
        flops = trainer.total(sum(operations * useful_products(trainer.accelerator, work) for work in done))
        found[f"rate/{phase}_tokens"] = tokens / metrics[f"time/{phase}"]
        found[f"rate/{phase}_tflops"] = flops / metrics[f"time/{phase}"] / 1e12
    trainer.work.clear()
    return found | {"rate/mfu": found["rate/update_tflops"] * 1e12 / peak}


def useful_products(accelerator: Accelerator, work: Pass) -> int:
    """Parameters times the tokens they see: the embedding, a mere lookup, sees none, the head the scored ones."""
    seen = sum(own_tokens(s, above) for above, s in itertools.pairwise([None, *work.batch]))
    scored = sum(sum(s.mask[1:]) for s in work.batch)
    module = accelerator.unwrap_model(work.module)
    decoder, head = module.parts()
    body = sum(p.numel() for p in decoder.parameters()) - decoder.get_input_embeddings().weight.numel()
    return body * seen + head.weight.numel() * scored


def peak_flops(device: torch.device) -> float:
    """Operations a second of one large bfloat16 matrix product, the best of three: what MFU is a share of."""
    n = 8192 if device.type == "cuda" else 2048
    matrix = torch.rand(n, n, generator=torch.Generator().manual_seed(0)).to(device, torch.bfloat16)
    clock = PhaseClock()
    for trial in ("0", "1", "2"):
        with clock(trial):
            matrix @ matrix
    return 2 * n**3 / min(clock.seconds.values())

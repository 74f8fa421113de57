"""What one of several ranks does: passes without gradient, sums over all ranks, its share."""

import math
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from plumbing.scorer import NOTHING, Sequence, collate, micro_batches, same_count


@dataclass
class Pass:
    """A module's pass over a micro-batch: operations a parameter and token (6: backward too)."""

    module: nn.Module
    batch: list[Sequence]
    operations: Literal[2, 6]


@dataclass
class Worker:
    """One of Accelerate's ranks. work: what it has computed since that was last cleared."""

    accelerator: Accelerator
    work: list[Pass] = field(default_factory=list, kw_only=True)

    def micro_batches(self, sequences: list[Sequence], budget: int,
                      *modules: nn.Module | None) -> list[list[int]]:
        """Micro-batches that all the modules can compute, as many as on any other rank."""
        modules = [self.accelerator.unwrap_model(module) for module in modules if module]
        packed = all(module.packed for module in modules)
        return same_count(self.accelerator, micro_batches(sequences, budget, packed))

    def evaluate(self, module: nn.Module, sequences: list[Sequence], budget: int,
                 **kwargs: Any) -> list[Tensor]:
        """A scorer's or critic's output without gradient, one tensor (L_i,) a sequence.

        budget: tokens of a micro-batch."""
        results: list[Tensor] = [torch.empty(0)] * len(sequences)
        with torch.no_grad():
            for part in self.micro_batches(sequences, budget, module):
                batch = [sequences[i] for i in part]
                out = module(*collate(batch or [NOTHING], self.accelerator.device), **kwargs)
                out = out[0] if isinstance(out, tuple) else out
                self.work.append(Pass(module, batch, 2))
                for i, values in zip(part, out.split([sum(s.mask[1:]) for s in batch] or 1)):
                    results[i] = values
        return results

    def backward_mean(self, losses: Tensor, tokens: float) -> None:
        """Add the gradient of the losses' mean over the `tokens` of all ranks.

        Accelerate averages the ranks' gradients: hence the factor."""
        self.accelerator.backward(losses.sum() * self.accelerator.num_processes / tokens)

    def idle_backward(self, *modules: nn.Module | None) -> None:
        """A backward pass that adds nothing, for a rank with fewer micro-batches than another."""
        for module in filter(None, modules):
            out = module(*collate([NOTHING], self.accelerator.device))
            self.accelerator.backward((out[0] if isinstance(out, tuple) else out).sum() * 0)

    def total(self, value: float | Tensor) -> float:
        """The sum over all ranks."""
        if self.accelerator.num_processes == 1:
            return float(value)  # without a float64 tensor on the device: Apple's GPUs have none
        value = torch.as_tensor(value, dtype=torch.float64, device=self.accelerator.device)
        return self.accelerator.reduce(value).item()

    def moments(self, values: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation over the (masked) entries of all ranks."""
        mask = torch.ones_like(values) if mask is None else mask
        count = self.total(mask.sum())
        mean = self.total((values * mask).sum()) / count
        variance = self.total(((values - mean) ** 2 * mask).sum()) / max(count - 1, 1)
        return values.new_tensor(mean), values.new_tensor(math.sqrt(variance))


def balance_over_ranks(episodes: list[Any], group_size: int, ranks: int) -> list[list[Any]]:
    """Whole groups of episodes for each rank: longest first, to the rank with the fewest tokens."""
    groups = [episodes[i : i + group_size] for i in range(0, len(episodes), group_size)]
    tokens = {id(group): sum(len(e.ids) for e in group) for group in groups}
    shares: list[list[list[Any]]] = [[] for _ in range(ranks)]
    for group in sorted(groups, key=lambda group: -tokens[id(group)]):
        min(shares, key=lambda share: sum(tokens[id(group)] for group in share)).append(group)
    return [[episode for group in share for episode in group] for share in shares]


def gather_groups(mine: list[Any], size: int) -> list[Any]:
    """The groups of all ranks in the order in which they were dealt: to the ranks by turns."""
    shares = gather_object([mine])
    groups = [[share[i : i + size] for i in range(0, len(share), size)] for share in shares]
    return [e for turn in zip_longest(*groups, fillvalue=[]) for group in turn for e in group]


def split(episodes: list[Any], mine: list[Any], size: int) -> list[list[int]]:
    """Mini-batches of `size` of all episodes, as indices of those that are mine."""
    places = {id(episode): i for i, episode in enumerate(mine)}
    return [[places[id(e)] for e in episodes[start : start + size] if id(e) in places]
            for start in range(0, len(episodes), size)]


def pad(ragged: list[Tensor]) -> Tensor:
    """Tensors (L_i,) as the rows of one matrix, padded on the right with 0. -> (B, L), L >= 1."""
    return pad_sequence([*ragged, ragged[0].new_zeros(1)], batch_first=True)[:-1]


def unpad(matrix: Tensor, like: list[Tensor]) -> list[Tensor]:
    """The rows of a matrix (B, L), each cut to the length of its like: (L_i,)."""
    return [row[: len(x)] for row, x in zip(matrix, like)]

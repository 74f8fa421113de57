"""What test_scale.py runs on two ranks: `accelerate launch --num_processes 2 ranks.py OUT` writes OUT, a torch file."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from accelerate import Accelerator
from helpers import ALGORITHMS, exact_model, gradient, saved_episodes, settings
from torch.distributed import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import sft_simulator as sim
import train_rl as rl

CASES = [(dtype, changes) for dtype in (torch.float64, torch.float32) for changes in ALGORITHMS]


def episodes(rank: int | None = None):
    """The global batch, three groups of two; rank 0 gets the first group, rank 1 the others: unequal shares, ragged."""
    batch = saved_episodes(count=6)
    return batch if rank is None else batch[2:] if rank else batch[:2]


def step(batch, mesh=None):
    """The trainer after a PPO step of two epochs with a KL, on whole models or on ones sharded over the mesh."""
    accelerator = Accelerator(cpu=True)
    policy, reference = (rl.TokenScorer(exact_model(seed)) for seed in (3, 4))
    critic = rl.Critic(exact_model(5)).double()
    if mesh is not None:
        for module in (policy, reference, critic):
            for layer in (module.decoder if module is critic else module.model.get_decoder()).h:
                fully_shard(layer, mesh=mesh)
            fully_shard(module, mesh=mesh)
    optimizers = [torch.optim.AdamW(module.parameters(), lr=1e-2) for module in (policy, critic)]
    trainer = rl.Trainer(accelerator, policy, optimizers[0], reference, critic, optimizers[1])
    s = settings(algorithm="ppo", kl_coef=0.1, epochs=2, batch_tokens=40)
    metrics = rl.update(trainer, s, batch, rl.PhaseClock())
    return trainer, metrics


class Witness:
    """Says so when it is freed."""

    def __del__(self):
        print("freed", flush=True)


def main(out: str) -> None:
    rank = Accelerator(cpu=True).process_index
    results = {"ddp": [gradient(episodes(rank), dtype, batch_tokens=40, **changes) for dtype, changes in CASES]}
    trainer, metrics = step(episodes(rank), init_device_mesh("cpu", (2,)))
    parameters = [p for module in (trainer.policy, trainer.critic) for p in module.parameters()]
    assert all(isinstance(p, DTensor) for p in parameters)
    results["share"] = sum(p.to_local().numel() for p in parameters) / sum(p.numel() for p in parameters)
    sampler = sim.HFGenerator(exact_model(9), None)
    sampler.load_weights(rl.named_weights(trainer.policy.model))
    critic = {name: weight.clone() for name, weight in rl.named_weights(trainer.critic)}
    results["fsdp"] = (dict(sampler.model.named_parameters()), critic, metrics)
    if rank == 0:
        torch.save(results, out)
    witness = Witness()
    sim.leave(Accelerator(cpu=True).state)
    print("went on", witness)


if __name__ == "__main__":
    main(sys.argv[1])

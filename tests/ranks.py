"""What test_train_rl_ranks.py runs on two ranks: `ranks.py OUT ...` writes OUT, a torch file, then
runs `train_rl.py ...`."""

import os
import signal
import sys
import weakref
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from accelerate import Accelerator
from accelerate.state import AcceleratorState
from helpers import ALGORITHMS, exact_model, gradient, saved_episodes, settings
from torch.distributed import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import get_constant_schedule_with_warmup

import evaluate
import sft_simulator as sim
import train_rl as rl
from plumbing.generate import HFGenerator
from plumbing.models import named_weights
from plumbing.ranks import split
from plumbing.rates import PhaseClock
from plumbing.scorer import Critic, Sequence, TokenScorer
from plumbing.signals import Signals

CASES = [(dtype, changes) for dtype in (torch.float64, torch.float32) for changes in ALGORITHMS]


def episodes(rank: int | None = None, size: int | None = None):
    """The global batch, three groups of two; rank 0 gets the first group, rank 1 the others.

    With a size: the rank's share and its mini-batches."""
    batch = saved_episodes(count=6)
    mine = batch if rank is None else batch[2:] if rank else batch[:2]
    return mine if size is None else (mine, split(batch, mine, size))


def mini_batch(rank: int | None = None):
    """Gradient of the second of two mini-batches, of which rank 0 has nothing, and the metrics."""
    mine, mini_batches = episodes(rank, 4)
    return gradient(mine, mini_batches=mini_batches, batch_tokens=40, kl_coef=0.1)


def step(batch, mini_batches, mesh=None):
    """The trainer after a PPO step of two epochs and two mini-batches with a KL, in the second of
    three steps of warm-up, on whole or sharded models."""
    policy, reference = (TokenScorer(exact_model(seed)) for seed in (3, 4))
    critic = Critic(exact_model(5)).double()
    if mesh is not None:
        for module in (policy, reference, critic):
            for layer in module.parts()[0].h:
                fully_shard(layer, mesh=mesh)
            fully_shard(module, mesh=mesh)
    optimizers = [torch.optim.AdamW(module.parameters(), lr=1e-2) for module in (policy, critic)]
    trainer = rl.Trainer(Accelerator(cpu=True), policy, optimizers[0], reference, critic,
                         optimizers[1])
    trainer.schedules = [get_constant_schedule_with_warmup(o, 3) for o in optimizers]
    for optimizer, schedule in zip(optimizers, trainer.schedules):
        optimizer.step()
        schedule.step()
    s = settings(algorithm="ppo", kl_coef=0.1, epochs=2, batch_tokens=40)
    metrics = rl.update(trainer, s, batch, PhaseClock(), mini_batches)
    assert all(abs(o.param_groups[0]["lr"] - 1e-2 * 2 / 3) < 1e-9 for o in optimizers)
    return trainer, metrics


def supervised():
    """Loss and gradient of a step of supervised training on five sequences."""
    accelerator = Accelerator(cpu=True)
    scorer = accelerator.prepare(TokenScorer(exact_model(7)))
    sequences = [Sequence(e.ids, e.mask) for e in saved_episodes(count=5)]
    loss = sim.supervised_gradient(accelerator, scorer, sequences, budget=1)
    return loss, torch.cat([p.grad.flatten() for p in scorer.parameters()])


def answered(folder):
    """An evaluation of five questions: what it makes, and those that this rank was asked."""
    rows, mine = [{"id": str(i), "question": "?", "golden_answers": ["x"]} for i in range(5)], []

    def method(share, setup):
        mine.extend(row["id"] for row in share)
        return list(map(evaluate.blank_episode, share))

    evaluate.METHODS["blank"] = method
    s = evaluate.RunSettings(model="m", data=folder, out=folder, method="blank", engine="none")
    rows = [row | {"sample": 0} for row in rows]
    return evaluate.answer_all(rows, s, None, Accelerator(cpu=True))["n"], mine


def signalled(rank: int) -> int:
    """The signal at which this rank stops; rank 1 alone gets one."""
    signals = Signals()
    try:
        if rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        signals.agree()
        return 0
    except KeyboardInterrupt:
        return signals.number
    finally:
        signals.restore()


def main(out: str, *command: str) -> None:
    rank = Accelerator(cpu=True).process_index
    results = {"ddp": [gradient(episodes(rank), dtype, batch_tokens=40, **changes)
                       for dtype, changes in CASES], "supervised": supervised(),
               "answered": answered(Path(out).parent), "mini-batch": mini_batch(rank),
               "signal": signalled(rank)}
    trainer, metrics = step(*episodes(rank, 4), init_device_mesh("cpu", (2,)))
    parameters = [*trainer.policy.parameters(), *trainer.critic.parameters()]
    mine = sum(p.to_local().numel() for p in parameters)  # only a DTensor has this
    results["share"] = mine / sum(p.numel() for p in parameters)
    sampler = HFGenerator(exact_model(9), None)
    sampler.load_weights(named_weights(trainer.policy.model))
    critic = {name: weight.clone() for name, weight in named_weights(trainer.critic)}
    results["fsdp"] = (dict(sampler.model.named_parameters()), critic, metrics)
    if rank == 0:
        torch.save(results, out)
    weakref.finalize(trainer, print, "freed", flush=True)
    AcceleratorState._reset_state()  # the command makes its own
    sys.argv = ["train_rl.py", *command]
    rl.run_cli(rl.app)


if __name__ == "__main__":
    main(*sys.argv[1:])

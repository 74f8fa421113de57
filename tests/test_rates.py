"""Rates: useful operations and tokens a second, by hand; the update tells its work."""

import pytest
import ranks
import torch
from accelerate import Accelerator
from helpers import make_model

import train_rl as rl
from plumbing.ranks import Pass
from plumbing.rates import peak_flops, rates
from plumbing.scorer import Sequence, TokenScorer


def test_rates_by_hand():
    """Parameters counted by hand, phases of 1 and 2 seconds, a peak of 1e6 operations a second."""
    scorer = TokenScorer(make_model(259))
    trainer = rl.Trainer(Accelerator(cpu=True), scorer, None)
    body, head = 2 * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 64 + 2 * 32) + 32, 259 * 32
    batch = [Sequence([5] * 10, [0] * 6 + [1] * 4), Sequence([5] * 3 + [6] * 4, [0] * 5 + [1] * 2)]
    trainer.work += [Pass(scorer, batch, 2), Pass(scorer, batch[:1], 6), Pass(scorer, batch[1:], 6)]
    metrics = {"time/rollout": 3.0, "time/reference": 1.0, "time/update": 2.0,
               "cost/policy_tokens": 6}
    forward = 2 * (14 * body + 6 * head)  # three tokens are shared
    update = 6 * (17 * body + 6 * head) / 2  # a second; not in micro-batches of one
    assert rates(trainer, metrics, 1e6) == pytest.approx({
        "rate/rollout_tokens": 2.0, "rate/reference_tokens": 17.0,
        "rate/reference_tflops": forward / 1e12, "rate/update_tokens": 8.5,
        "rate/update_tflops": update / 1e12, "rate/mfu": update / 1e6})
    assert not trainer.work


def test_the_update_tells_its_work():
    """Two epochs over all episodes, and a forward pass of each model, are counted once."""
    trainer, _ = ranks.step(ranks.episodes(), None)
    tokens = sum(len(e.ids) for e in ranks.episodes())
    seen = dict.fromkeys(((id(w.module), w.operations) for w in trainer.work), 0)
    for work in trainer.work:
        seen[id(work.module), work.operations] += sum(len(s.ids) for s in work.batch)
    trained = (trainer.policy, trainer.critic)
    assert seen == ({(id(module), 2): tokens for module in (*trained, trainer.reference)}
                    | {(id(module), 6): 2 * tokens for module in trained})


def test_the_peak_is_a_rate_of_this_machine():
    assert 1e8 < peak_flops(torch.device("cpu")) < 1e15

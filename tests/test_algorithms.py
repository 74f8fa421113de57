"""The mathematics of chapter 2 against independent references: hand-worked numbers, slow loops, other libraries."""

import math
import statistics

import pytest
import torch
from accelerate import Accelerator
from helpers import (
    ALGORITHMS,
    exact_model,
    gradient,
    make_critic,
    make_model,
    relative,
    saved_episodes,
    settings,
)
from torch import tensor

import train_rl as rl

# ---------------------------------------------------------------- advantages


def test_reinforce_by_hand():
    rewards = tensor([[1.0, 0.0, 0.5], [0.0, 0.0, 0.0]])
    assert torch.equal(rl.reinforce_advantages(rewards, "none", 0.25), rewards)
    assert torch.allclose(rl.reinforce_advantages(rewards, "batch", 0.25), rewards - 0.25)
    expected = tensor([[1 - 0.25, 0 - 0.75, 0.5 - 0.5], [0.0, 0.0, 0.0]])
    assert torch.allclose(rl.reinforce_advantages(rewards, "leave-one-out", 0.25), expected)


def test_grpo_by_hand():
    rewards = tensor([[1.0, 0.0, 0.0, 1.0], [0.5, 0.5, 0.5, 0.5]], dtype=torch.float64)
    deviation = math.sqrt(4 * 0.25 / 3)
    scaled = rl.grpo_advantages(rewards, scale=True)
    assert torch.allclose(scaled[0], tensor([1.0, -1, -1, 1], dtype=torch.float64) * 0.5 / (deviation + 1e-6))
    assert torch.equal(scaled[1], torch.zeros(4, dtype=torch.float64))
    equal = tensor([[0.4, 0.4, 0.4]], dtype=torch.float64)  # their mean is 0.4000000000000001
    assert not rl.grpo_advantages(equal, scale=True).any()
    assert not rl.reinforce_advantages(equal, "leave-one-out", 0.4).any()
    assert torch.equal(rl.grpo_advantages(rewards, scale=False)[0], tensor([0.5, -0.5, -0.5, 0.5], dtype=torch.float64))


def test_gae_by_hand():
    """Two tokens, then padding: gamma 0.5, lambda 0.5."""
    rewards, values, mask = tensor([[0.0, 1.0, 9.0]]), tensor([[0.2, 0.4, 9.0]]), tensor([[1.0, 1.0, 0.0]])
    advantages, returns = rl.gae(rewards, values, mask, 0.5, 0.5)
    last = 1 - 0.4
    first = (0 + 0.5 * 0.4 - 0.2) + 0.25 * last
    assert torch.allclose(advantages, tensor([[first, last, 0.0]]))
    assert torch.allclose(returns, tensor([[first + 0.2, 1.0, 0.0]]))


def ragged(generator, count=7, longest=9):
    """Random lengths (a one-token episode among them), packed to the left: mask (B, L) in float64."""
    lengths = [1] + torch.randint(1, longest + 1, (count - 1,), generator=generator).tolist()
    return lengths, tensor([[float(t < n) for t in range(max(lengths))] for n in lengths], dtype=torch.float64)


@pytest.mark.parametrize("seed", range(5))
def test_gae_and_token_rewards_equal_slow_loops(seed):
    generator = torch.Generator().manual_seed(seed)
    lengths, mask = ragged(generator)
    final = torch.rand(len(lengths), generator=generator, dtype=torch.float64)
    kl, values = (torch.randn(mask.shape, generator=generator, dtype=torch.float64) for _ in range(2))
    gamma, lam, coef = 0.9, 0.8, 0.3
    rewards = rl.token_rewards(final, kl, mask, coef)
    advantages, returns = rl.gae(rewards, values, mask, gamma, lam)
    discounted = rl.discounted_returns(rewards, mask, gamma)
    for b, n in enumerate(lengths):
        r = [-coef * kl[b, t].item() + (final[b].item() if t == n - 1 else 0.0) for t in range(n)]
        v = values[b].tolist()
        assert rewards[b, :n].tolist() == pytest.approx(r, abs=1e-12)
        for t in range(n):
            deltas = [r[u] + (gamma * v[u + 1] if u + 1 < n else 0.0) - v[u] for u in range(t, n)]
            slow = sum((gamma * lam) ** i * d for i, d in enumerate(deltas))
            assert advantages[b, t].item() == pytest.approx(slow, abs=1e-6)
            assert returns[b, t].item() == pytest.approx(slow + v[t], abs=1e-6)
            assert discounted[b, t].item() == pytest.approx(sum(gamma**i * x for i, x in enumerate(r[t:])), abs=1e-6)
        assert not advantages[b, n:].any() and not rewards[b, n:].any()


def test_whitening_is_over_policy_tokens():
    generator = torch.Generator().manual_seed(0)
    lengths, mask = ragged(generator)
    values = torch.randn(mask.shape, generator=generator, dtype=torch.float64) * 3 + 5
    trainer = rl.Trainer(Accelerator(cpu=True), None, None)
    white = rl.whiten(values, *rl.global_moments(trainer, values, mask), mask)[mask.bool()]
    assert white.mean().item() == pytest.approx(0, abs=1e-6) and white.std().item() == pytest.approx(1, abs=1e-6)


# ---------------------------------------------------------------- losses


def test_policy_loss_by_hand():
    old = tensor([-1.0, -1.0, -1.0, -1.0]).log_softmax(0)
    ratio = tensor([1.5, 1.5, 0.5, 0.5])
    loss, clipped = rl.policy_loss(old + ratio.log(), old, tensor([1.0, -1.0, 1.0, -1.0]), 0.2, 0.3, tensor([1.0, 1, 1, 2]))
    assert torch.allclose(loss, tensor([-1.3, 1.5, -0.5, 2 * 0.8]))
    assert clipped.tolist() == [True, False, False, True]


def test_policy_gradient_at_ratio_one_is_reinforces():
    logprobs = tensor([-0.3, -2.0], dtype=torch.float64, requires_grad=True)
    advantages = tensor([0.7, -1.1], dtype=torch.float64)
    loss, _ = rl.policy_loss(logprobs, logprobs.detach(), advantages, 0.2, 0.2, torch.ones(2))
    loss.sum().backward()
    assert torch.allclose(logprobs.grad, -advantages)


@pytest.mark.parametrize("seed", range(3))
def test_losses_equal_slow_loops(seed):
    generator = torch.Generator().manual_seed(seed)
    lp, old, ref, adv, val, oldval, ret = (torch.randn(50, generator=generator, dtype=torch.float64) for _ in range(7))
    weights = rl.importance_weights(old, ref, 2.0)
    loss, clipped = rl.policy_loss(lp, old, adv, 0.1, 0.3, weights)
    kl, value = rl.kl_k3(lp, ref), rl.value_loss(val, oldval, ret, 0.2)
    for i in range(50):
        ratio = math.exp(lp[i] - old[i])
        w = min(math.exp(old[i] - ref[i]), 2.0)
        a, b = ratio * adv[i].item(), min(max(ratio, 0.9), 1.3) * adv[i].item()
        assert loss[i].item() == pytest.approx(-w * min(a, b), abs=1e-6) and clipped[i].item() == (b < a)
        d = ref[i].item() - lp[i].item()
        assert kl[i].item() == pytest.approx(math.exp(d) - d - 1, abs=1e-6)
        v = oldval[i].item() + min(max(val[i].item() - oldval[i].item(), -0.2), 0.2)
        slow = 0.5 * max((val[i].item() - ret[i].item()) ** 2, (v - ret[i].item()) ** 2)
        assert value[i].item() == pytest.approx(slow, abs=1e-6)


def test_k3_estimates_the_kl():
    """Its mean over samples of the policy is KL(policy || reference), and no sample is negative."""
    generator = torch.Generator().manual_seed(0)
    policy, reference = (torch.randn(6, generator=generator, dtype=torch.float64).log_softmax(0) for _ in range(2))
    estimate = (policy.exp() * rl.kl_k3(policy, reference)).sum()
    assert torch.allclose(estimate, (policy.exp() * (policy - reference)).sum())
    assert (rl.kl_k3(policy, reference) >= 0).all()


# ---------------------------------------------------------------- the step's gradient


@pytest.mark.parametrize("changes", ALGORITHMS, ids=str)
@pytest.mark.parametrize("dtype,bound", [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_gradient_is_the_same_however_the_batch_is_cut(changes, dtype, bound):
    """Micro-batches of one, of about three, of all; long and short side by side; the order of the groups."""
    episodes = saved_episodes()
    whole, metrics = gradient(episodes, dtype, **changes)
    assert whole.norm() > 1e-3
    for budget in (1, 3 * max(len(e.ids) for e in episodes)):
        cut, other = gradient(episodes, dtype, batch_tokens=budget, **changes)
        assert relative(cut, whole) <= bound
        assert other == pytest.approx(metrics, rel=1e-5, abs=1e-6)
    turned, _ = gradient(episodes[2:] + episodes[:2], dtype, **changes)
    assert relative(turned, whole) <= bound


def slow_advantages(s, episodes, groups, kl, values):
    """Each token's advantage, and for PPO its return, in plain Python; kl and values hold a list an episode."""
    flat = [e.reward for e in episodes]
    advantages, returns = [], []
    for e, penalties, v in zip(episodes, kl, values):
        rewards = groups[e.id]
        if s.algorithm == "reinforce":
            others = (sum(rewards) - e.reward) / (len(rewards) - 1)
            baseline = {"none": 0.0, "batch": sum(flat) / len(flat), "leave-one-out": others}[s.baseline]
            advantages.append([e.reward - baseline] * len(penalties))
        elif s.algorithm == "grpo":
            spread = statistics.stdev(rewards) + 1e-6 if s.scale_rewards else 1.0
            advantages.append([(e.reward - statistics.mean(rewards)) / spread] * len(penalties))
        else:
            paid = [-s.kl_coef * x for x in penalties]
            paid[-1] += e.reward
            gamma, lam = s.gamma, s.gae_lambda if s.algorithm == "ppo" else 1.0
            v = [*v, 0.0] if s.algorithm == "ppo" else [0.0] * (len(paid) + 1)
            deltas = [r + gamma * v[t + 1] - v[t] for t, r in enumerate(paid)]
            advantages.append([sum((gamma * lam) ** k * d for k, d in enumerate(deltas[t:])) for t in range(len(paid))])
            if s.algorithm == "ppo":
                returns.append([a + x for a, x in zip(advantages[-1], v)])
    if s.algorithm in ("ppo", "reinforce++"):
        tokens = [a for row in advantages for a in row]
        centre, spread = statistics.mean(tokens), statistics.stdev(tokens) + 1e-8
        advantages = [[(a - centre) / spread for a in row] for row in advantages]
    return advantages, returns


def slow_step(s, episodes, policy, reference, critic):
    """The gradients of policy and critic that a step should take, a token at a time: no batch, no padding, no mask."""
    def chosen(model, e):
        logprobs = model(tensor([e.ids])).logits[0].log_softmax(-1)
        return [logprobs[t - 1, e.ids[t]] for t in places(e)]

    def places(e):
        return [t for t in range(e.prompt_tokens, len(e.ids)) if e.mask[t] or not s.mask_documents]

    groups = {e.id: [x.reward for x in episodes if x.id == e.id] for e in episodes}
    own, others = [chosen(policy, e) for e in episodes], [chosen(reference, e) for e in episodes]
    kl = [[(a - b).item() for a, b in zip(*pair)] for pair in zip(own, others)]
    hidden = [critic.decoder(tensor([e.ids])).last_hidden_state[0] for e in episodes]
    guesses = [[critic.head(h[t - 1])[0] for t in places(e)] for h, e in zip(hidden, episodes)]
    advantages, returns = slow_advantages(s, episodes, groups, kl, [[v.item() for v in row] for row in guesses])
    loss, value_loss, tokens = 0.0, 0.0, sum(map(len, own))
    for i, e in enumerate(episodes):
        for k, t in enumerate(places(e)):
            weight = min(math.exp(own[i][k].item() - e.logprobs[t]), s.importance_cap) if e.mask[t] else 1.0
            loss = loss - weight * advantages[i][k] * own[i][k] / tokens
            if s.algorithm in ("reinforce", "grpo") and s.kl_coef:
                d = others[i][k].detach() - own[i][k]
                loss = loss + s.kl_coef * (d.exp() - d - 1) / tokens
            if returns:
                value_loss = value_loss + 0.5 * (guesses[i][k] - returns[i][k]) ** 2 / tokens
    loss.backward()
    if returns:
        value_loss.backward()
    slow = [torch.cat([p.grad.flatten() for p in model.parameters()]) for model in (policy, critic)[: 1 + bool(returns)]]
    return [g / max(1.0, g.norm().item()) for g in slow]  # the update clips each norm at 1


@pytest.mark.parametrize("changes", [
    dict(algorithm="reinforce", baseline="none"), dict(algorithm="reinforce", baseline="batch"),
    dict(algorithm="reinforce", kl_coef=0.2), dict(algorithm="grpo"), dict(algorithm="grpo", scale_rewards=False, kl_coef=0.2),
    dict(algorithm="grpo", kl_coef=0.2, mask_documents=False), dict(algorithm="reinforce++", kl_coef=0.2),
    dict(algorithm="ppo", kl_coef=0.2), dict(algorithm="ppo", kl_coef=0.2, mask_documents=False),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("seed", range(2))
def test_a_whole_step_equals_a_slow_one(changes, seed):
    """Every trained token of the batch weighs the same, and gets what the algorithm's equation gives it."""
    episodes, s = saved_episodes(seed, count=6), settings(**changes)
    fast, critic = gradient(episodes, keep_critic=True, batch_tokens=40, **changes)
    slow = slow_step(s, episodes, exact_model(3), exact_model(4), make_critic(torch.float64))
    assert relative(fast, slow[0]) < 1e-6 and fast.norm() > 1e-3
    assert (critic is None) == (len(slow) == 1)
    if critic is not None:
        assert relative(critic, slow[1]) < 1e-6


def test_groups_without_variance_are_skipped_and_change_nothing():
    episodes = saved_episodes()
    for e in episodes[2:]:
        e.reward = 0.5
    seen = []
    original = rl.train_epoch
    try:
        rl.train_epoch = lambda *args: seen.append(args[4]) or original(*args)
        gradient(episodes)
        gradient(episodes, kl_coef=0.1)
    finally:
        rl.train_epoch = original
    assert seen == [[0, 1], [0, 1, 2, 3]]  # with a KL in the loss they do carry a gradient


def test_a_document_changes_no_gradient_that_does_not_depend_on_it():
    """With the second turn unrewarded by masking, nothing before the document may notice what it says."""
    def first_turn_only(episodes):
        for e in episodes:
            last = max(i for i, m in enumerate(e.mask) if not m)
            del e.ids[last + 1 :], e.mask[last + 1 :], e.logprobs[last + 1 :]
        return episodes

    a, _ = gradient(first_turn_only(saved_episodes()))
    b, _ = gradient(first_turn_only(saved_episodes(documents=[7] * 20)))
    assert torch.equal(a, b)
    c, _ = gradient(saved_episodes())
    d, _ = gradient(saved_episodes(documents=[7] * 20))
    assert relative(c, d) > 1e-3  # and what comes after it does


# ---------------------------------------------------------------- beside TRL


def trl_loss(model, episodes, advantages, tokenizer, folder, *, beta, old, reference, **config):
    """TRL's own GRPO loss on these episodes, and the gradient it leaves in the model."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    def padded(rows, side):
        rows = [tensor(row[::-1] if side == "left" else row) for row in rows]
        matrix = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        return matrix.flip(1) if side == "left" else matrix

    arguments = GRPOConfig(str(folder), per_device_train_batch_size=len(episodes), num_generations=2, use_cpu=True, bf16=False,
                           gradient_checkpointing=False, report_to="none", temperature=1.0, **config)  # fmt: skip
    trainer = GRPOTrainer(model, lambda completions, **kwargs: [0.0] * len(completions), arguments,
                          Dataset.from_dict({"prompt": ["?"]}), processing_class=tokenizer)  # fmt: skip
    trainer.current_gradient_accumulation_steps = 1
    trainer.beta = beta  # set late: a reference model would be loaded by its name, but its log-probs are given
    prompts, completions = [e.ids[: e.prompt_tokens] for e in episodes], [e.ids[e.prompt_tokens :] for e in episodes]
    inputs = {
        "prompt_ids": padded(prompts, "left"),
        "prompt_mask": padded([[1] * len(ids) for ids in prompts], "left"),
        "completion_ids": padded(completions, "right"),
        "completion_mask": padded([[1] * len(ids) for ids in completions], "right"),
        "tool_mask": padded([e.mask[e.prompt_tokens :] for e in episodes], "right"),
        "advantages": tensor(advantages, dtype=torch.float32),
        "num_items_in_batch": tensor(sum(sum(e.mask) for e in episodes)),
    }
    mask = inputs["tool_mask"].bool()
    for name, ragged in (("old_per_token_logps", old), ("ref_per_token_logps", reference)):
        if ragged is not None:
            inputs[name] = torch.zeros(mask.shape).masked_scatter(mask, torch.cat(ragged))
    loss = trainer._compute_loss(trainer.model.train(), inputs)
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in trainer.model.parameters()])


@pytest.mark.parametrize(("kl_coef", "off_policy", "trl_type"),
                         [(0.0, False, "dapo"), (0.3, False, "dapo"), (0.3, True, "dapo"), (0.0, True, "bnpo")])  # fmt: skip
def test_grpo_loss_and_gradient_equal_trls(kl_coef, off_policy, trl_type, tokenizer, tmp_path):
    """Same ids, masks and advantages: ragged prompts, documents inside, k3 KL, ratios beyond both bounds of the clip.

    TRL's KL is DeepSeekMath's, as ours, without its `use_bias_correction_kl`: by default it multiplies the KL by the ratio."""
    episodes = saved_episodes(seed=1, count=6)
    advantages = [1.3, -0.8, 0.4, -0.4, 0.9, -1.1]
    sequences = [rl.Sequence(e.ids, e.mask) for e in episodes]
    scorer, other = (rl.TokenScorer(make_model(len(tokenizer), seed=seed, initializer_range=0.1)) for seed in (3, 4))
    trainer = rl.Trainer(Accelerator(cpu=True), scorer, torch.optim.SGD(scorer.parameters(), lr=0.0))
    policy, reference = (trainer.evaluate(module, sequences, 10**6) for module in (scorer, other))
    generator = torch.Generator().manual_seed(0)
    old = [x + 0.4 * torch.randn(x.shape, generator=generator) for x in policy] if off_policy else policy
    s = settings(kl_coef=kl_coef, clip_low=0.2, clip_high=0.3, importance_cap=0.0, batch_tokens=60)
    trainer.reference = other if kl_coef else None
    targets = rl.Targets([torch.full_like(x, a) for x, a in zip(policy, advantages)], sampler=policy,
                         old=old if off_policy else None, reference=reference if kl_coef else None)  # fmt: skip
    tokens = sum(map(len, policy))
    sums = rl.train_epoch(trainer, s, sequences, targets, list(range(6)), tokens, kl_in_loss=bool(kl_coef))
    loss = float(sums["policy"] + kl_coef * sums["kl"]) / tokens
    fast = torch.cat([p.grad.flatten() for p in scorer.parameters()])
    scorer.zero_grad()
    theirs, slow = trl_loss(scorer.model, episodes, advantages, tokenizer, tmp_path, beta=kl_coef, epsilon=0.2,
                            epsilon_high=0.3, loss_type=trl_type, use_bias_correction_kl=False, old=old if off_policy else None,
                            reference=reference if kl_coef else None)  # fmt: skip
    assert (float(sums["clipped"]) > 3) == off_policy  # the clip is at work where the ratios are not 1
    assert loss == pytest.approx(theirs, rel=1e-4) and abs(theirs) > 1e-3
    assert relative(fast, slow) < 1e-4

"""The update of train_rl.py against slow loops, whole slow steps, TRL's loss; whether it learns."""

import copy
import functools
import math
import random
import statistics
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from accelerate import Accelerator
from helpers import (ALGORITHMS, exact_model, gradient, make_critic, make_model, make_tokenizer,
                     relative, saved_episodes, settings, tune)
from torch import tensor
from torch.nn.utils.rnn import pad_sequence

import sft_simulator as sim
import train_rl as rl
from plumbing.engines import SearchResult
from plumbing.generate import HFGenerator
from plumbing.metrics import mean
from plumbing.models import named_weights
from plumbing.rates import PhaseClock
from plumbing.scorer import Critic, Sequence, TokenScorer
from plumbing.text import encode


def test_advantages_by_hand():
    rewards = tensor([[1.0, 0.0, 0.5], [0.0, 0.0, 0.0]])
    expected = tensor([[1 - 0.25, 0 - 0.75, 0.5 - 0.5], [0.0, 0.0, 0.0]])
    assert torch.allclose(rl.leave_one_out(rewards), expected)  # it can push down
    rewards, half = tensor([[1, 0, 0, 1], [0.5] * 4]).double(), tensor([0.5, -0.5, -0.5, 0.5])
    scaled = rl.grpo_advantages(rewards, scale=True)
    assert torch.allclose(scaled[0], half.double() / (math.sqrt(4 * 0.25 / 3) + 1e-6))
    assert torch.equal(scaled[1], torch.zeros(4).double())
    assert torch.equal(rl.grpo_advantages(rewards, scale=False)[0], half.double())
    equal = tensor([[0.4, 0.4, 0.4]]).double()  # their mean is 0.4000000000000001
    assert not rl.grpo_advantages(equal, scale=True).any() and not rl.leave_one_out(equal).any()


def ragged(generator, count=7, longest=9):
    """Random lengths (a one-token episode among them), packed to the left: mask (B, L)."""
    lengths = [1] + torch.randint(1, longest + 1, (count - 1,), generator=generator).tolist()
    rows = [[float(t < n) for t in range(max(lengths))] for n in lengths]
    return lengths, tensor(rows, dtype=torch.float64)


def test_whitening_is_over_policy_tokens():
    generator = torch.Generator().manual_seed(0)
    lengths, mask = ragged(generator)
    values = torch.randn(mask.shape, generator=generator, dtype=torch.float64) * 3 + 5
    trainer = rl.Trainer(Accelerator(cpu=True), None, None)
    white = rl.whiten(values, *trainer.moments(values, mask), mask)[mask.bool()]
    assert white.mean().item() == pytest.approx(0, abs=1e-6)
    assert white.std().item() == pytest.approx(1, abs=1e-6)
    for equal in (0.7, 1e-9, 123.4):  # but for rounding
        values = torch.full((3, 5), equal) * (1 + 1e-7 * torch.randn(3, 5, generator=generator))
        assert not rl.whiten(values, *trainer.moments(values), torch.ones(3, 5)).any()


@pytest.mark.parametrize("seed", range(3))
def test_losses_equal_slow_loops(seed):
    generator = torch.Generator().manual_seed(seed)
    lp, old, ref, adv, val, oldval, ret = torch.randn(7, 50, generator=generator).double()
    weights = rl.importance_weights(old, ref, 2.0)
    loss, clipped = rl.policy_loss(lp, old, adv, 0.1, 0.3, weights)
    kl, value = rl.kl_k3(lp, ref), rl.value_loss(val, oldval, ret, 0.2)
    for i in range(50):
        ratio = math.exp(lp[i] - old[i])
        w = min(math.exp(old[i] - ref[i]), 2.0)
        a, b = ratio * adv[i].item(), min(max(ratio, 0.9), 1.3) * adv[i].item()
        assert loss[i].item() == pytest.approx(-w * min(a, b), abs=1e-6)
        assert clipped[i].item() == (b < a)
        d = ref[i].item() - lp[i].item()
        assert kl[i].item() == pytest.approx(math.exp(d) - d - 1, abs=1e-6)
        v = oldval[i].item() + min(max(val[i].item() - oldval[i].item(), -0.2), 0.2)
        slow = 0.5 * max((val[i].item() - ret[i].item()) ** 2, (v - ret[i].item()) ** 2)
        assert value[i].item() == pytest.approx(slow, abs=1e-6)


@pytest.mark.parametrize("changes", ALGORITHMS, ids=str)
@pytest.mark.parametrize("dtype,bound", [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_gradient_is_the_same_however_the_batch_is_cut(changes, dtype, bound):
    """Micro-batches of one, of about three, of all; long beside short; the order of the groups."""
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
    """Each token's advantage, for PPO also its return; kl and values hold a list an episode."""
    advantages, returns = [], []
    for e, penalties, v in zip(episodes, kl, values):
        rewards = groups[e.id]
        if s.algorithm == "reinforce":
            others = (sum(rewards) - e.reward) / (len(rewards) - 1)
            advantages.append([e.reward - others * (s.baseline != "none")] * len(penalties))
        elif s.algorithm == "grpo":
            spread = statistics.stdev(rewards) + 1e-6 if s.scale_rewards else 1.0
            advantages.append([(e.reward - statistics.mean(rewards)) / spread] * len(penalties))
        else:
            paid = [-s.kl_coef * x for x in penalties]
            paid[-1] += e.reward
            gamma, lam = s.gamma, s.gae_lambda if s.algorithm == "ppo" else 1.0
            v = [*v, 0.0] if s.algorithm == "ppo" else [0.0] * (len(paid) + 1)
            deltas = [r + gamma * v[t + 1] - v[t] for t, r in enumerate(paid)]
            advantages.append([sum((gamma * lam) ** k * d for k, d in enumerate(deltas[t:]))
                               for t in range(len(paid))])
            if s.algorithm == "ppo":
                returns.append([a + x for a, x in zip(advantages[-1], v)])
    if s.algorithm in ("ppo", "reinforce++"):
        tokens = [a for row in advantages for a in row]
        centre, spread = statistics.mean(tokens), statistics.stdev(tokens) + 1e-8
        advantages = [[(a - centre) / spread for a in row] for row in advantages]
    return advantages, returns


def slow_step(s, episodes, policy, reference, critic):
    """The gradients of policy and critic that a step should take, and what is logged of the
    critic: no batch, padding or mask."""
    def places(e):
        return [t for t in range(e.prompt_tokens, len(e.ids)) if e.mask[t] or not s.mask_documents]

    def chosen(model, e):
        logprobs = model(tensor([e.ids])).logits[0].log_softmax(-1)
        return [logprobs[t - 1, e.ids[t]] for t in places(e)]

    groups = {e.id: [x.reward for x in episodes if x.id == e.id] for e in episodes}
    own, others = ([chosen(model, e) for e in episodes] for model in (policy, reference))
    kl = [[(a - b).item() for a, b in zip(*pair)] for pair in zip(own, others)]
    hidden = [critic.decoder(tensor([e.ids])).last_hidden_state[0] for e in episodes]
    guesses = [[critic.head(h[t - 1])[0] for t in places(e)] for h, e in zip(hidden, episodes)]
    values = [[v.item() for v in row] for row in guesses]
    advantages, returns = slow_advantages(s, episodes, groups, kl, values)
    loss, value_loss, tokens = 0.0, 0.0, sum(map(len, own))
    for i, e in enumerate(episodes):
        for k, t in enumerate(places(e)):
            weight = min(math.exp(own[i][k].item() - e.logprobs[t]), s.importance_cap)
            weight = weight if e.mask[t] else 1.0
            loss = loss - weight * advantages[i][k] * own[i][k] / tokens
            if s.algorithm in ("reinforce", "grpo") and s.kl_coef:
                d = others[i][k].detach() - own[i][k]
                loss = loss + s.kl_coef * (d.exp() - d - 1) / tokens
            if returns:
                value_loss = value_loss + 0.5 * (guesses[i][k] - returns[i][k]) ** 2 / tokens
    loss.backward()
    if returns:
        value_loss.backward()
    slow = [torch.cat([p.grad.flatten() for p in model.parameters()])
            for model in (policy, critic)[: 1 + bool(returns)]]
    figures, flat = {}, [sum(rows, []) for rows in (returns, values)]
    if returns:
        unexplained = statistics.variance([a - b for a, b in zip(*flat)])
        figures = {"loss/value": value_loss.item(), "loss/explained_variance":
                   1 - unexplained / statistics.variance(flat[0])}
    return [g / max(1.0, g.norm().item()) for g in slow], figures  # each norm is clipped at 1


@pytest.mark.parametrize("changes", [
    dict(algorithm="reinforce", baseline="none"), dict(algorithm="reinforce", kl_coef=0.2),
    dict(algorithm="grpo"), dict(algorithm="grpo", scale_rewards=False, kl_coef=0.2),
    dict(algorithm="grpo", kl_coef=0.2, mask_documents=False),
    dict(algorithm="reinforce++", kl_coef=0.2), dict(algorithm="ppo", kl_coef=0.2),
    dict(algorithm="ppo", kl_coef=0.2, mask_documents=False),
], ids=str)
@pytest.mark.parametrize("seed", range(2))
def test_a_whole_step_equals_a_slow_one(changes, seed):
    """Every trained token weighs the same, and gets what the algorithm's equation gives it."""
    episodes, s = saved_episodes(seed, count=6), settings(**changes)
    fast, critic = gradient(episodes, keep_critic=True, batch_tokens=40, **changes)
    slow, figures = slow_step(s, episodes, exact_model(3), exact_model(4),
                              make_critic(torch.float64))
    assert relative(fast, slow[0]) < 1e-6 and fast.norm() > 1e-3
    assert (critic is None) == (len(slow) == 1)
    if critic is not None:
        assert relative(critic, slow[1]) < 1e-6
        metrics = gradient(episodes, **changes)[1]
        assert {name: metrics[name] for name in figures} == pytest.approx(figures, rel=1e-4)


def test_a_mini_batch_has_the_gradient_of_its_episodes_alone():
    """At a learning rate of 0."""
    episodes = saved_episodes(count=6)
    alone, _ = gradient(episodes[4:])
    last, metrics = gradient(episodes, mini_batches=[[0, 1, 2, 3], [4, 5]])
    assert relative(last, alone) < 1e-9
    assert metrics["tokens/trained"] == sum(sum(e.mask) for e in episodes)


def test_an_algorithm_of_ones_own_may_whiten_with_the_kl_in_the_loss(monkeypatch):
    """Undiscounted and without a KL, REINFORCE++ whitens the reward that each token leads to."""
    whitened = rl.Algorithm(lambda batch, s: (
        batch.whiten(batch.rewards[:, None] * batch.mask), None))
    monkeypatch.setitem(rl.ALGORITHMS, "own", whitened)
    own, _ = gradient(saved_episodes(), algorithm="own")
    plain, _ = gradient(saved_episodes(), algorithm="reinforce++", gamma=1.0)
    assert relative(own, plain) < 1e-6


@pytest.mark.parametrize("algorithm", ["ppo", "reinforce++", "grpo"])
def test_a_batch_without_a_trained_token_is_skipped_and_counted(algorithm):
    """All searches failed; or only those of a rank, which has no tokens but takes part."""
    episodes = saved_episodes()
    for e in episodes:
        e.end = "failed"
    s = settings(algorithm=algorithm, kl_coef=0.1)
    trainer = rl.Trainer(Accelerator(cpu=True), TokenScorer(exact_model(3)), None)
    trainer.reference, trainer.critic = TokenScorer(exact_model(4)), make_critic(torch.float64)
    assert rl.update(trainer, s, episodes, PhaseClock())["loss/skipped"] == 1
    sequences = [Sequence(e.ids, e.trained_mask(True)) for e in episodes]
    trainer.moments = lambda values, mask=None: (tensor(0.0), tensor(1.0))  # of the other ranks
    targets = rl.estimate_targets(trainer, s, episodes, sequences)
    assert [len(a) for a in targets.advantages] == [0] * 4


def test_nothing_after_the_last_trained_token_is_computed():
    seen, episodes = [], saved_episodes()
    hook = torch.nn.modules.module.register_module_forward_pre_hook
    with hook(lambda module, args: seen.append(
            args[0].numel() if type(module).__name__ == "Embedding" else 0)):
        whole, _ = gradient(episodes)
        computed = list(seen)
        for e in episodes:
            e.read([5] * 30)
        seen.clear()
        assert torch.equal(gradient(episodes)[0], whole) and seen == computed


def test_groups_without_variance_are_skipped():
    """Unless a KL in the loss gives them a gradient; documents are trained only if asked."""
    episodes = saved_episodes()
    for e in episodes[2:]:
        e.reward = 0.5
    own, all_ = [sum(e.mask) for e in episodes], [len(e.ids) - e.prompt_tokens for e in episodes]
    for kl_coef, mask, trained in ((0.0, True, own[:2]), (0.1, True, own), (0.1, False, all_)):
        metrics = gradient(episodes, kl_coef=kl_coef, mask_documents=mask)[1]
        assert metrics["tokens/trained"] == sum(trained)


def test_a_group_is_the_rollouts_of_one_prompt():
    """Two merged datasets whose ids both begin at 0: the groups stay apart."""
    episodes = saved_episodes()
    for e in episodes:
        e.id = "0"
    assert torch.equal(gradient(episodes)[0], gradient(saved_episodes())[0])


def trl_loss(model, episodes, advantages, tokenizer, folder, *, beta, old, reference, **config):
    """TRL's own GRPO loss on these episodes, and the gradient it leaves in the model."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    def padded(rows, side="right"):
        return pad_sequence([tensor(row) for row in rows], batch_first=True, padding_side=side)

    arguments = GRPOConfig(str(folder), per_device_train_batch_size=len(episodes),
                           num_generations=2, use_cpu=True, bf16=False, temperature=1.0,
                           gradient_checkpointing=False, report_to="none", **config)
    trainer = GRPOTrainer(model, lambda completions, **kwargs: [0.0] * len(completions), arguments,
                          Dataset.from_dict({"prompt": ["?"]}), processing_class=tokenizer)
    trainer.current_gradient_accumulation_steps = 1
    # Set late: a reference model would be loaded by its name, but its log-probs are given.
    trainer.beta = beta
    prompts = [e.ids[: e.prompt_tokens] for e in episodes]
    completions = [e.ids[e.prompt_tokens :] for e in episodes]
    inputs = {
        "prompt_ids": padded(prompts, "left"),
        "prompt_mask": padded([[1] * len(ids) for ids in prompts], "left"),
        "completion_ids": padded(completions),
        "completion_mask": padded([[1] * len(ids) for ids in completions]),
        "tool_mask": padded([e.mask[e.prompt_tokens :] for e in episodes]),
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


@pytest.mark.parametrize("kl_coef,off_policy,trl_type", [
    (0.0, False, "dapo"), (0.3, False, "dapo"), (0.3, True, "dapo"), (0.0, True, "bnpo")])
def test_grpo_loss_and_gradient_equal_trls(kl_coef, off_policy, trl_type, tokenizer, tmp_path):
    """Ragged prompts, documents inside, k3 KL, ratios beyond both bounds of the clip."""
    episodes, advantages = saved_episodes(seed=1, count=6), [1.3, -0.8, 0.4, -0.4, 0.9, -1.1]
    sequences = [Sequence(e.ids, e.mask) for e in episodes]
    scorer, other = (TokenScorer(make_model(len(tokenizer), seed=seed, initializer_range=0.1))
                     for seed in (3, 4))
    trainer = rl.Trainer(Accelerator(cpu=True), scorer, torch.optim.SGD(scorer.parameters(), lr=0))
    policy, reference = (trainer.evaluate(model, sequences, 10**6) for model in (scorer, other))
    generator = torch.Generator().manual_seed(0)
    moved = [x + 0.4 * torch.randn(x.shape, generator=generator) for x in policy]
    given = {"old": moved if off_policy else None, "reference": reference if kl_coef else None}
    s = settings(kl_coef=kl_coef, clip_low=0.2, clip_high=0.3, importance_cap=0.0, batch_tokens=60)
    trainer.reference = other if kl_coef else None
    targets = rl.Targets([torch.full_like(x, a) for x, a in zip(policy, advantages)],
                         sampler=policy, **given)
    mini_batch = range(4)  # of six episodes
    tokens = sum(len(policy[i]) for i in mini_batch)
    sums = rl.accumulate_gradient(trainer, s, sequences, targets, tokens, mini_batch)
    loss = float(sums["policy"] + kl_coef * sums["kl"]) / tokens
    fast = torch.cat([p.grad.flatten() for p in scorer.parameters()])
    scorer.zero_grad()
    # use_bias_correction_kl, its default, multiplies DeepSeekMath's KL, which ours is, by the ratio
    given = {name: ragged and ragged[:4] for name, ragged in given.items()}
    theirs, slow = trl_loss(scorer.model, episodes[:4], advantages[:4], tokenizer, tmp_path,
                            beta=kl_coef, epsilon=0.2, epsilon_high=0.3, loss_type=trl_type,
                            use_bias_correction_kl=False, **given)
    assert (float(sums["clipped"]) > 3) == off_policy  # the clip is at work
    assert loss == pytest.approx(theirs, rel=1e-4) and abs(theirs) > 1e-3
    assert relative(fast, slow) < 1e-4


# A small search task, a tiny random model, the real rollout, masks, reward and update. The policy
# is first taught the form only: search, read a letter, answer *any* letter. Its reward is chance,
# 1 in 4. What the document says must be learnt from the reward alone.

LR, CRITIC_LR = 3e-4, 1e-3
KL = 0.05  # to the model that was taught the form: else some seeds stop trying one of the letters
STEPS = 240  # the budget of each algorithm: at most so many steps of 64 episodes, two epochs each
LETTERS = "wxyz"
SIZES = {"hidden_size": 64, "intermediate_size": 128, "initializer_range": 0.2}
TASK = {"policy": {"system": "s", "user": "{question}", "notice": "!", "last_turn": "."}}
LIMITS = rl.EpisodeSettings(max_searches=1, tokens_per_turn=20, context_tokens=512,
                            observation_tokens=64)


def task_tokenizer():
    """The tests' tokenizer with a token for each tag: the middle one of an action is the choice."""
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([f"<{slash}{tag}>" for tag in ("search", "information", "answer")
                          for slash in ("", "/")])
    return tokenizer


class Letters:
    """A search engine whose one document repeats the golden answer of whoever asks."""

    name = "letters"

    def search(self, requests):
        return [SearchResult([request.golden_answers[0] * 8]) for request in requests]


def task(draw, count):
    return [{"id": f"{i}", "question": "which?", "golden_answers": [draw.choice(LETTERS)]}
            for i in range(count)]


@functools.cache
def taught_the_form(seed):
    """A tiny model that searches, then answers whatever the document says; the draw after it."""
    tokenizer, draw, sequences = task_tokenizer(), random.Random(seed), []
    for row in task(draw, 1600):
        episode = rl.new_episode(row, 0, tokenizer, TASK)
        document = [row["golden_answers"][0] * 8]
        search, answer = (encode(tokenizer, text) for text in (
            "<search>q</search>", f"<answer>{draw.choice(LETTERS)}</answer>"))
        episode.write(search, [0.0] * len(search))
        episode.read(rl.observation_ids(tokenizer, document, 64) + encode(tokenizer, ".\n"))
        episode.write(answer, [0.0] * len(answer))
        sequences.append(Sequence(episode.ids, episode.mask))
    model = make_model(len(tokenizer), **SIZES)
    with TemporaryDirectory() as folder:
        s = sim.TuningSettings(out=Path(folder), epochs=2, lr=1e-2, batch_size=16,
                               batch_tokens=10_000)
        tune(model, sequences, s)
    return model, draw


def learn(algorithm, seed):
    """Mean rewards of the steps, until the last five are above 0.9 or the budget is spent."""
    tokenizer, (model, draw) = task_tokenizer(), copy.deepcopy(taught_the_form(seed))
    s = settings(algorithm=algorithm, rollouts=8, epochs=2, gamma=1.0, gae_lambda=1.0, kl_coef=KL)
    scorer = TokenScorer(model)
    adam = torch.optim.AdamW(scorer.parameters(), lr=LR, weight_decay=0.0)
    trainer = rl.Trainer(Accelerator(cpu=True), scorer, adam)
    trainer.reference = TokenScorer(copy.deepcopy(model)).requires_grad_(False)
    if algorithm == "ppo":
        trainer.critic = Critic(make_model(len(tokenizer), seed=9, **SIZES))
        trainer.critic_optimizer = torch.optim.AdamW(trainer.critic.parameters(), lr=CRITIC_LR)
    generator = HFGenerator(make_model(len(tokenizer), **SIZES).eval(), tokenizer)
    setup = rl.Setup(generator, Letters(), TASK, LIMITS, seed)
    rewards = []
    while len(rewards) < STEPS and not (len(rewards) >= 5 and mean(rewards[-5:]) > 0.9):
        generator.load_weights(named_weights(model))
        episodes = [rl.new_episode(row, g, tokenizer, TASK)
                    for row in task(draw, 8) for g in range(8)]
        rl.rollout(episodes, setup, step=len(rewards))
        for episode in episodes:
            rl.score(episode)
        rewards.append(mean(e.reward for e in episodes))
        rl.update(trainer, s, episodes, PhaseClock())
    return rewards


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow)
                                       for seed in (1, 2, 3))])
@pytest.mark.parametrize("algorithm", ("reinforce", "grpo", "ppo", "reinforce++"))
def test_learns_to_read_what_it_searched(algorithm, seed):
    rewards = learn(algorithm, seed)
    assert mean(rewards[:5]) < 0.4 and mean(rewards[-5:]) > 0.9, rewards

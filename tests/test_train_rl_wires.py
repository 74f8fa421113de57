"""One test for every wire of `train_rl.py train`: a setting or a datum, and who must get it.

The real command runs in this process; only the models that generate, and real search engines, are
scripted. What was asked of them, and what the run wrote, is what the tests look at."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import (
    FakeEngine,
    FakeGenerator,
    command,
    make_model,
    plug_engine,
    plug_generators,
    question,
    read_lines,
    read_metrics,
)
from transformers import AutoModelForCausalLM

import sft_simulator as sim
import train_rl as rl

ALIASES = ("Lima", "City of Kings")
BUDGET = {"steps": 2, "prompts-per-step": 2, "rollouts": 2, "top-k": 2, "max-searches": 2,
          "tokens-per-turn": 64, "context-tokens": 4000, "observation-tokens": 300, "lr": 1e-2,
          "kl-coef": 0, "simulator-max-tokens": 33, "p-start": 0, "p-end": 1, "seed": 0}
DOCUMENTS = "1. Lima is it.\n2. Not me."


def searches_made(prompt: str) -> int:
    return prompt.count("\n<information>\n")


def number(prompt: str) -> str:
    """The number of the question that a prompt asks: question() writes "Question 3?"."""
    return prompt.split("Question ")[1].split("?")[0]


def search_then_answer(prompt: str, seed: int) -> str:
    """One search that names its question, then an answer that its seed chooses."""
    if not searches_made(prompt):
        return f"<think> t </think>\n<search> about {number(prompt)} </search>"
    return f"<think> t </think>\n<answer> {('Lima', 'Rome')[seed % 2]} </answer>"


@pytest.fixture
def train(monkeypatch, tmp_path, jsonl, tiny, tokenizer, exact, sgd):
    """Run `train` with a scripted policy and simulator; returns what it did."""
    data = jsonl("train.jsonl", [question(i, ALIASES, hops=1 + i % 2) for i in range(4)])
    simulator = tmp_path / "simulator"
    shutil.copytree(tiny, simulator)
    monkeypatch.setattr(rl, "peak_flops", lambda device: 1e12)

    def run(policy=search_then_answer, documents=None, out="run", sampler_logprob=-5.5, flags=(),
            concurrent=False, rows=None, **options):
        replies = documents or (lambda prompt, seed: DOCUMENTS)
        fakes = {str(tiny): FakeGenerator(tokenizer, policy, concurrent),
                 str(simulator): FakeGenerator(tokenizer, replies)}
        fakes[str(tiny)].logprob = sampler_logprob
        loads = plug_generators(monkeypatch, fakes)
        settings = {"data": jsonl("own.jsonl", rows) if rows else data, "model": tiny,
                    "simulator": simulator, "out": tmp_path / out}
        settings |= BUDGET | {name.replace("_", "-"): value for name, value in options.items()}
        made = len(sgd)
        command(rl, "train", *(part for name, value in settings.items()
                               for part in (f"--{name}", value)), *flags)
        run_dir = tmp_path / out
        return SimpleNamespace(out=run_dir, policy=fakes[str(tiny)], loads=loads, start=tiny,
                               simulator=fakes[str(simulator)], optimizers=sgd[made:],
                               metrics=read_metrics(run_dir), all=read_lines(run_dir / "metrics.jsonl"),
                               episodes=read_lines(run_dir / "episodes.jsonl"))

    return run


def load(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def score(model, episode: dict, mask=None, temperature=1.0):
    """Log-probs and entropies of an episode's trained tokens, by one plain pass over its row."""
    ids, mask = episode["ids"], mask or episode["mask"]
    logits = model(torch.tensor([ids])).logits[0] / temperature
    logprobs = logits.log_softmax(-1)
    places = [t for t in range(1, len(ids)) if mask[t]]
    chosen = torch.stack([logprobs[t - 1, ids[t]] for t in places])
    entropies = torch.stack([-(logprobs[t - 1].exp() * logprobs[t - 1]).sum() for t in places])
    return chosen, entropies


# ---------------------------------------------------------------- a step worked by hand

ROWS = [question(0, ALIASES, hops=1), question(1, ("Oslo",), hops=2)]
SCRIPT = {  # (step, question, sample, turn) -> what the policy writes
    (0, "q0", 0, 0): "<think> t </think>\n<search> Peru </search>",
    (0, "q0", 0, 1): "<think> t </think>\n<answer> the lima </answer>",
    (0, "q0", 1, 0): "hm",
    (0, "q0", 1, 1): "<answer> Kings of Lima City </answer>",
    (0, "q1", 0, 0): "<answer> Rome </answer>",
    (0, "q1", 1, 0): "<think> t </think><search> a </search>",
    (0, "q1", 1, 1): "<search> b </search>",
    (0, "q1", 1, 2): "no more",
} | {(1, f"q{i}", g, 0): f"<answer> {i} </answer>" for i in (0, 1) for g in (0, 1)}
SEEDS = {sim.draw_seed("policy", 0, *key): key for key in SCRIPT}


def test_a_step_worked_by_hand(train, tokenizer):
    """GRPO: rewards 1 and 0.8, 0 and 0; every number that is logged, and the weights."""
    replies = {"a": "no list", "b": "1. x\n2. y\n3. z", "Peru": DOCUMENTS}
    simulator = lambda prompt, seed: replies[prompt.split("Query: ")[1].split("<|im_end|>")[0]]  # noqa: E731
    run = train(lambda prompt, seed: SCRIPT[SEEDS[seed]], simulator, rows=ROWS, importance_cap=1.5)
    first = [e for e in run.episodes if e["step"] == 0]
    by_key = {(e["id"], e["sample"]): e for e in first}

    # what the sampler got: each turn's ids are those of the turn before, and what came back
    def prompt(row, *parts):
        system = sim.load_prompts()["policy"]["system"].strip()
        return (f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\nQuestion: "
                f"{row['question']}<|im_end|>\n<|im_start|>assistant\n") + "".join(parts)

    s, block = SCRIPT, "\n<information>\n1. {}\n2. {}\n</information>\n"
    notice, last = (sim.load_prompts()["policy"][name] + "\n" for name in ("notice", "last_turn"))
    peru = prompt(ROWS[0], s[0, "q0", 0, 0], block.format("Lima is it.", "Not me."))
    hm = prompt(ROWS[0], "hm<|im_end|>", "\n" + notice)
    empty = prompt(ROWS[1], s[0, "q1", 1, 0], "\n<information>\n\n</information>\n")
    full = empty + s[0, "q1", 1, 1] + block.format("x", "y") + last
    order = [row for row in ROWS for _ in range(2)] if first[0]["id"] == "q0" else \
        [row for row in ROWS[::-1] for _ in range(2)]
    turns = [list(map(tokenizer.decode, call.prompts)) for call in run.policy.calls]
    assert turns[0] == [prompt(row) for row in order]
    assert sorted(turns[1]) == sorted([peru, hm, empty]) and turns[2] == [full]
    assert turns[3:] == [[prompt(ROWS[int(e["id"][1])]) for e in run.episodes[4:]]]

    # rewards, in the file as in the metrics
    rewards = {("q0", 0): 1.0, ("q0", 1): 2 * (3 / 4) * 1 / (3 / 4 + 1), ("q1", 0): 0, ("q1", 1): 0}
    assert {key: e["reward"] for key, e in by_key.items()} == pytest.approx(rewards)
    f1 = rewards["q0", 1]

    # the update, by plain torch: zero-variance groups have no gradient
    model = load(run.start)
    spread = torch.tensor([1.0, f1], dtype=torch.float64).std().item() + 1e-6
    advantages = {("q0", 0): (1 - f1) / 2 / spread, ("q0", 1): (f1 - 1) / 2 / spread}
    tokens = sum(sum(e["mask"]) for e in first)
    scored = {key: score(model, by_key[key]) for key in advantages}
    weights = {key: (x.detach() + 5.5).exp().clamp(max=1.5) for key, (x, _) in scored.items()}
    losses = [-weights[key] * a * scored[key][0] for key, a in advantages.items()]
    (sum(x.sum() for x in losses) / tokens).backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    norm, clipped = gradient.norm().item(), gradient / max(1.0, gradient.norm().item())
    count = sum(len(x) for x, _ in scored.values())
    gap = sum((x + 5.5).abs().sum().item() for x, _ in scored.values()) / count
    entropy = sum(h.sum().item() for _, h in scored.values()) / count
    spread_of_all = torch.cat([torch.full((sum(e["mask"]),), advantages.get(key, 0.0))
                               for key, e in by_key.items()]).std().item()
    policy_loss = -sum(weights[key].sum().item() * a for key, a in advantages.items()) / tokens

    mean = (1 + f1) / 4
    deviation = torch.tensor([1, f1, 0, 0]).std(unbiased=False).item()
    read = sum(len(e["ids"]) - sum(e["mask"]) - e["prompt_tokens"] for e in first)
    assert read == len(tokenizer.encode(peru + hm + full)) - sum(map(len, (
        tokenizer.encode(text) for text in (prompt(ROWS[0]), prompt(ROWS[0]), prompt(ROWS[1]),
                                            s[0, "q0", 0, 0], "hm<|im_end|>", s[0, "q1", 1, 0],
                                            s[0, "q1", 1, 1]))))
    asked = [len(p) for call in run.simulator.calls for p in call.prompts]
    assert len(asked) == 5  # "no list" and three documents for two are asked for once more
    expected = {
        "step": 0, "noise/p": 0.0, "reward/mean": mean, "reward/std": deviation, "reward/f1": mean,
        "reward/em": 0.25, "reward/answered": 0.75, "reward/format": 0.25,
        "reward/hops_1": (1 + f1) / 2, "reward/hops_2": 0.0, "reward/zero_variance_groups": 0.5,
        "search/per_episode": 3 / 4, "search/invalid_actions": 2 / 4, "search/noisy": 0.0,
        "search/malformed": 2 / 3, "search/failed": 0, "search/context_overflows": 0,
        "tokens/read": read, "tokens/trained": count, "cost/searches": 3,
        "cost/simulator_prompt_tokens": sum(asked),
        "cost/simulator_tokens": len(DOCUMENTS) + 2 * len("no list") + 2 * len(replies["b"]) + 5,
        "cost/policy_tokens": tokens, "loss/policy": policy_loss, "loss/entropy": entropy,
        "loss/clip_fraction": 0.0, "loss/logprob_gap": gap, "loss/grad_norm": norm,
        "loss/advantage_std": spread_of_all,
    }
    assert run.metrics[0] == pytest.approx(expected, rel=1e-4, abs=1e-6)

    # the weights after the step, and those that the next step samples with
    moved = torch.cat([p.detach().flatten() for p in model.parameters()]) - 1e-2 * clipped
    names = [name for name, _ in model.named_parameters()]
    loaded = torch.cat([run.policy.weights[0][name].flatten() for name in names])
    assert torch.allclose(loaded, moved, atol=1e-6) and norm > 1e-2
    assert run.policy.events[:4] == ["generate"] * 3 + ["sleep"] and run.policy.events[4] == "load"


# ---------------------------------------------------------------- what the models are asked for


def all_sampling(generator, name):
    return {getattr(call.sampling, name) for call in generator.calls}


@pytest.mark.parametrize("option,value,seen", [
    ("temperature", 0.7, lambda run: all_sampling(run.policy, "temperature") == {0.7}),
    ("tokens_per_turn", 50, lambda run: all_sampling(run.policy, "max_tokens") == {50}),
    ("seed", 3, lambda run: all_sampling(run.policy, "stop") == {("</search>", "</answer>")}),
    ("simulator_temperature", 0.3, lambda run: all_sampling(run.simulator, "temperature") == {0.3}),
    ("simulator_max_tokens", 44, lambda run: all_sampling(run.simulator, "max_tokens") == {44}),
    ("seed", 4, lambda run: all_sampling(run.simulator, "stop") == {()}),
    ("simulator_words", 17, lambda run: all("about 17 words" in p for p in run.simulator.prompts)),
    ("top_k", 3, lambda run: all("Write 3 documents" in p for p in run.simulator.prompts)),
    ("max_searches", 0, lambda run: len(run.policy.calls) == 2 and not run.simulator.calls),
    ("max_searches", 1, lambda run: len(run.policy.calls) == 4),
    ("prompts_per_step", 3, lambda run: [len(call.prompts) for call in run.policy.calls] == [6] * 4),
    ("rollouts", 3, lambda run: [len(call.prompts) for call in run.policy.calls] == [6] * 4),
    ("steps", 3, lambda run: [row["step"] for row in run.metrics] == [0, 1, 2]),
    ("context_tokens", 490, lambda run: {e["end"] for e in run.episodes} == {"context"}),
], ids=str)  # fmt: skip
def test_an_option_reaches_what_it_is_about(train, option, value, seen):
    assert seen(train(**{option: value}))


def test_documents_are_cut_to_observation_tokens(train, tokenizer):
    run = train(observation_tokens=45)
    blocks = [p.split("assistant\n")[1].split("</search>")[1] for p in run.policy.prompts
              if searches_made(p)]
    opening, closing = "\n<information>\n", "\n</information>\n"
    kept = 45 - len(opening) - len(closing)
    assert blocks == [opening + DOCUMENTS[:kept] + closing] * len(blocks) and 0 < kept < len(DOCUMENTS)


def test_models_are_loaded_for_what_they_do(train):
    run, default = train(generator="hf"), train(out="default")
    policy, simulator = run.loads
    assert policy["name"] == str(run.start) and policy["needs_ids"] is True
    assert simulator["name"].endswith("simulator") and simulator["needs_ids"] is False
    assert policy["engine"] == simulator["engine"] == "hf"
    assert [load["engine"] for load in default.loads] == ["auto", "auto"]


def test_a_real_engine_is_made_of_its_options(train, monkeypatch, tmp_path):
    engine = FakeEngine("real document", "second")
    loads = plug_engine(monkeypatch, engine)
    run = train(engine="bm25", corpus=tmp_path / "own.jsonl", top_k=4)
    train(engine="http", url="http://there/retrieve", out="http")
    assert [load["name"] for load in loads] == ["bm25", "http"] and loads[0]["k"] == 4
    assert loads[0]["corpus"] == tmp_path / "own.jsonl" and loads[1]["url"] == "http://there/retrieve"
    assert len(engine.requests) == 16 and not run.simulator.calls
    assert "1. real document\n2. second" in run.policy.prompts[-1]


def test_without_an_engine_the_template_offers_no_search(train):
    run = train(lambda prompt, seed: "<search> a </search>", engine="none")
    wording = sim.load_prompts()["policy_without_search"]
    assert wording["system"].strip() in run.policy.prompts[0] and len(run.loads) == 1
    assert run.policy.prompts[-1].count(wording["notice"]) == 2
    assert wording["last_turn"] in run.policy.prompts[-1] and run.metrics[0]["cost/searches"] == 0


def test_own_wording_reaches_policy_and_simulator(train, tmp_path):
    own = tmp_path / "own.toml"
    own.write_text('[policy]\nuser = "ASK {question}"\nnotice = "NO"\nlast_turn = "LAST"\n'
                   '[simulator]\nheading = "{Quality}:"\nnoisy_hint = "WRONG"\n')
    run = train(lambda prompt, seed: "hm" if "NO" not in prompt else "<search> a </search>",
                prompts=own, p_start=1)
    assert "ASK Question" in run.policy.prompts[0]
    assert run.policy.prompts[-1].endswith("</information>\nLAST\n")
    assert all("WRONG" in p and p.endswith("Noisy:\n") for p in run.simulator.prompts)


def test_a_request_carries_its_own_question_and_every_alias(train):
    """Some episodes waste their first action: later queries still go out with their own question."""
    def policy(prompt, seed):
        wasted = seed % 2 and "not valid" not in prompt
        return "hm" if wasted else search_then_answer(prompt, seed)

    run = train(policy, prompts_per_step=4, rollouts=3)
    for prompt in run.simulator.prompts:
        query = prompt.split("Query: about ")[1][0]
        assert f"Question {query}?" in prompt and "Lima or City of Kings" in prompt
    assert 0 < run.metrics[0]["search/invalid_actions"] < 1 and len(run.simulator.prompts) == 24


# ---------------------------------------------------------------- the curriculum


@pytest.mark.parametrize("options,expected", [
    ({}, [0, (4**0.5 - 1) / 3, 1]),
    ({"base": 1}, [0, 0.5, 1]),
    ({"p_start": 1, "p_end": 0}, [1, 1 - (4**0.5 - 1) / 3, 0]),
    ({"p_start": 0.25, "p_end": 0.75, "curriculum": "constant"}, [0.75] * 3),
], ids=str)
def test_the_curriculum_decides_what_the_simulator_is_asked_for(train, options, expected):
    """Logged, drawn and sent: p, the episodes' qualities, both places in the simulator's prompt."""
    run = train(steps=3, prompts_per_step=4, rollouts=4, **options)
    wording = sim.load_prompts()["simulator"]
    assert [row["noise/p"] for row in run.metrics] == pytest.approx(expected)
    for row, call, p in zip(run.metrics, run.simulator.calls, expected):
        texts = [run.simulator.tokenizer.decode(ids) for ids in call.prompts]
        noisy = sum(wording["noisy_hint"] in text for text in texts)
        assert noisy == sum(text.endswith("Noisy output:\n") for text in texts)
        assert len(texts) - noisy == sum(wording["useful_hint"] in text for text in texts)
        assert row["search/noisy"] == noisy / 16
        assert {0: noisy == 0, 1: noisy == 16}.get(p, 0 < noisy < 16)
    drawn = [turn["quality"] == "noisy" for e in run.episodes for turn in e["turns"] if turn["query"]]
    assert sum(drawn) == round(sum(row["search/noisy"] for row in run.metrics) * 16)


def test_a_random_curriculum_depends_on_seed_and_step(train):
    p = {seed: [row["noise/p"] for row in train(steps=3, curriculum="random", seed=seed, p_start=0.4,
                                                p_end=0.6, out=f"{seed}").metrics] for seed in (1, 2)}
    assert len({*p[1], *p[2]}) == 6 and all(0.4 <= x <= 0.6 for x in (*p[1], *p[2]))


# ---------------------------------------------------------------- what is drawn


def two_searches(prompt, seed):
    done = searches_made(prompt) == 2
    return "<answer> Lima </answer>" if done else f"<search> {number(prompt)} </search>"


def test_every_draw_has_its_own_seed(train):
    """Over steps, questions, attempts and turns, for policy and simulator; and noise draws differ."""
    run = train(two_searches, curriculum="constant", p_end=0.5, prompts_per_step=4, rollouts=8)
    for fake, turns in ((run.policy, 3), (run.simulator, 2)):
        assert len(set(fake.seeds)) == len(fake.seeds) == 2 * 32 * turns
    qualities = {}
    for e in run.episodes:
        for turn, entry in enumerate(e["turns"][:2]):
            qualities[e["step"], e["id"], e["sample"], turn] = entry["quality"]
    for place in range(4):  # neither of step, question, sample and turn is left out of the draw
        groups = {}
        for key, quality in qualities.items():
            groups.setdefault(key[:place] + key[place + 1 :], set()).add(quality)
        assert any(len(found) == 2 for found in groups.values())
    again = train(two_searches, curriculum="constant", p_end=0.5, prompts_per_step=4, rollouts=8,
                  out="again", concurrent=True)
    assert sorted(again.policy.seeds) == sorted(run.policy.seeds)
    assert sorted(again.simulator.seeds) == sorted(run.simulator.seeds)
    assert again.episodes == run.episodes
    other = train(two_searches, curriculum="constant", p_end=0.5, out="other", seed=1)
    assert not {*other.policy.seeds, *other.simulator.seeds} & {*run.policy.seeds, *run.simulator.seeds}


def test_every_epoch_asks_every_question_once_in_a_new_order(train):
    rows = [question(i, ALIASES) for i in range(12)]
    asked = {}
    for seed in (0, 1):
        run = train(steps=9, prompts_per_step=4, rows=rows, seed=seed, max_searches=0, out=f"{seed}")
        asked[seed] = [e["id"] for e in run.episodes if e["sample"] == 0]
    epochs = [tuple(asked[0][i : i + 12]) for i in (0, 12, 24)]
    assert all(len(set(epoch)) == 12 for epoch in epochs) and len(set(epochs)) == 3
    assert asked[0] != asked[1]


# ---------------------------------------------------------------- the update


def test_the_sampler_gets_the_weights_of_each_step(train):
    run = train(steps=3)
    saved = dict(load(run.out / "model").named_parameters())
    first, second, third = run.policy.weights
    for name, weight in third.items():
        assert torch.equal(weight, saved[name]), name
    assert any(not torch.equal(first[name], second[name]) for name in first)
    assert run.policy.events == ["generate", "generate", "sleep", "load"] * 3
    assert run.simulator.events == ["generate", "sleep"] * 3


def test_rewards_are_the_chosen_ones(train):
    """An answer of half the words: F1 rewards it, EM does not."""
    def policy(prompt, seed):
        return f"<answer> {('Lima', 'Lima now')[seed % 2]} </answer>"

    for reward in ("f1", "em"):
        run = train(policy, reward=reward, rollouts=4, out=reward)
        assert all(e["reward"] == e["scores"][reward] for e in run.episodes)
        assert run.metrics[0]["reward/mean"] == run.metrics[0][f"reward/{reward}"]
        assert run.metrics[0]["reward/em"] < run.metrics[0]["reward/f1"]


@pytest.mark.parametrize("epochs", [1, 2])
def test_log_probs_are_scored_at_the_temperature_of_the_rollouts(train, epochs):
    """Of the policy, of the old policy (two epochs), and of the reference: its KL starts at 0."""
    run = train(temperature=0.6, epochs=epochs, kl_coef=0.1, lr=1e-4)
    model, first = load(run.start), [e for e in run.episodes if e["step"] == 0]
    scores = [score(model, e, temperature=0.6) for e in first]
    logprobs, entropies = (torch.cat(parts) for parts in zip(*scores))
    assert run.metrics[0]["loss/logprob_gap"] == pytest.approx((logprobs + 5.5).abs().mean().item(), rel=1e-4)
    assert run.metrics[0]["loss/entropy"] == pytest.approx(entropies.mean().item(), rel=1e-4)
    assert run.metrics[0]["loss/kl"] == pytest.approx(0, abs=1e-5)


def test_old_log_probs_are_those_of_the_sampling_policy_in_every_epoch(train):
    """A large step takes the second epoch's ratios out of the clip; the first epoch's are 1."""
    run = train(epochs=2, lr=0.3, steps=1)
    assert len(run.optimizers[0].gradients) == 2 and run.metrics[0]["loss/clip_fraction"] > 0.1
    assert train(epochs=1, lr=0.3, steps=1, out="one").metrics[0]["loss/clip_fraction"] == 0


def test_the_reference_stays_the_start_model(train):
    run = train(kl_coef=0.2)
    start, now = load(run.start), load(run.start)
    now.load_state_dict(run.policy.weights[0], strict=False)  # the head is the embedding
    later = [e for e in run.episodes if e["step"] == 1]
    logprobs, reference = (torch.cat([score(model, e)[0] for e in later]) for model in (now, start))
    difference = reference - logprobs
    expected = (difference.exp() - difference - 1).mean().item()
    assert run.metrics[1]["loss/kl"] == pytest.approx(expected, rel=1e-3) and expected > 1e-6


def test_the_critic_is_its_own_model_at_its_own_rate(train, tmp_path, tokenizer):
    make_model(len(tokenizer), seed=5).save_pretrained(tmp_path / "critic")
    run = train(algorithm="ppo", critic_lr=0.07, critic=tmp_path / "critic")
    policy, critic = run.optimizers
    assert policy.lrs == [0.01] * 2 and critic.lrs == [0.07] * 2
    assert {optimizer.options["weight_decay"] for optimizer in run.optimizers} == {0.0}
    same = train(algorithm="ppo", out="same", critic_lr=0.07)
    other = train(algorithm="ppo", out="other", critic_lr=0.07, critic=tmp_path / "critic")
    gradients = [r.optimizers[1].gradients[0] for r in (run, same, other)]
    assert torch.equal(gradients[0], gradients[2]) and not torch.equal(gradients[0], gradients[1])


REINFORCE, PPO = {"algorithm": "reinforce"}, {"algorithm": "ppo"}


@pytest.mark.parametrize("base,changes", [
    ({}, {"algorithm": "reinforce"}), ({}, {"algorithm": "ppo"}), ({}, {"algorithm": "reinforce++"}),
    ({}, {"reward": "em"}), ({}, {"kl_coef": 0.5}), (REINFORCE, {"kl_coef": 0.5}),
    (PPO, {"kl_coef": 0.5}), ({"algorithm": "reinforce++"}, {"kl_coef": 0.5}),
    ({"epochs": 3, "lr": 0.3}, {"clip_low": 0.9}), ({"epochs": 3, "lr": 0.3}, {"clip_high": 5.0}),
    (REINFORCE, {"baseline": "none"}), ({}, {"flags": ["--no-scale-rewards"]}),
    ({}, {"flags": ["--no-mask-documents"]}), ({}, {"temperature": 0.5}), ({}, {"importance_cap": 0}),
    (PPO, {"gamma": 0.5}), (PPO, {"gae_lambda": 0.5}), ({"algorithm": "reinforce++"}, {"gamma": 0.5}),
], ids=str)  # fmt: skip
def test_an_option_of_the_update_changes_the_update(train, base, changes):
    def policy(prompt, seed):
        if not searches_made(prompt):
            return "<search> a </search>"
        return f"<answer> {('Lima', 'Lima now', 'Oslo')[seed % 3]} </answer>"

    runs = [train(policy, out=f"{i}", rollouts=4, **base | more) for i, more in enumerate(({}, changes))]
    last = [run.policy.weights[-1] for run in runs]
    assert any(not torch.allclose(last[0][name], last[1][name], rtol=1e-4, atol=1e-7) for name in last[0])


def test_the_importance_cap_scales_what_the_sampler_deemed_unlikely(train):
    """All ratios above the cap: the loss is proportional to it."""
    losses = {cap: train(sampler_logprob=-20.0, importance_cap=cap, algorithm="reinforce", steps=1,
                         baseline="none", out=f"{cap}").metrics[0]["loss/policy"] for cap in (1, 3)}
    assert losses[3] == pytest.approx(3 * losses[1]) and losses[1] < 0


def test_documents_are_trained_only_if_asked(train):
    masked, whole = train(), train(flags=["--no-mask-documents"], out="whole")
    tokens = [sum(sum(e["mask"]) for e in run.episodes if e["step"] == 0) for run in (masked, whole)]
    read = sum(len(e["ids"]) - e["prompt_tokens"] for e in whole.episodes if e["step"] == 0)
    trained = [run.metrics[0]["tokens/trained"] for run in (masked, whole)]
    assert trained[0] <= tokens[0] and tokens[1] < trained[1] <= read


def test_gradient_checkpointing_and_micro_batches_change_no_weight(train):
    calls, handle = [], torch.nn.modules.module.register_module_forward_pre_hook(
        lambda module, args: calls.append(type(module).__name__))
    counts, weights = [], []
    try:
        for i, more in enumerate(({}, {"flags": ["--gradient-checkpointing"]}, {"batch_tokens": 300})):
            calls.clear()
            weights.append(train(out=f"{i}", **more).policy.weights[-1])
            counts.append(calls.count("LlamaMLP"))
    finally:
        handle.remove()
    assert counts[1] > counts[0] and counts[2] > counts[0]
    for name in weights[0]:
        assert torch.allclose(weights[1][name], weights[0][name], atol=1e-6)
        assert torch.allclose(weights[2][name], weights[0][name], atol=1e-6)


# ---------------------------------------------------------------- what is written


def test_the_config_holds_what_was_used(train):
    run = train(simulator_words=17, p_end=0.4, flags=["--no-scale-rewards"])
    settings = json.loads((run.out / "config.json").read_text())["settings"]
    expected = {"simulator_words": 17, "p_end": 0.4, "scale_rewards": False, "algorithm": "grpo",
                "model": str(run.start), "lr": 0.01, "top_k": 2, "seed": 0}
    assert expected.items() <= settings.items()


def test_rates_are_those_of_the_logged_figures(train):
    row = train(kl_coef=0.1).all[0]
    assert row["rate/rollout_tokens"] == pytest.approx(row["cost/policy_tokens"] / row["time/rollout"])
    assert row["rate/mfu"] == pytest.approx(row["rate/update_tflops"])  # of a peak of 1 TFLOP/s
    assert row["rate/reference_tokens"] > 0 and row["time/search"] > 0 and row["time/sync"] > 0
    assert sum(row[f"time/{p}"] for p in ("rollout", "search", "reference", "update", "sync")) < row["time/step"]


def test_failed_searches_are_counted_over_the_whole_run(train, monkeypatch):
    plug_engine(monkeypatch, FakeEngine("d", error=lambda request: "broken" if "0" in request.query else None))
    run = train(engine="bm25", failed_searches=4, prompts_per_step=4)
    assert [row["search/failed"] for row in run.metrics] == [2, 2]
    assert [e["scores"] == {} for e in run.episodes] == [e["end"] == "failed" for e in run.episodes]
    with pytest.raises(sim.UserError, match="4 searches failed .--failed-searches allows 3.: broken"):
        train(engine="bm25", failed_searches=3, prompts_per_step=4, out="fewer")
    assert len(read_lines(run.out.parent / "fewer/metrics.jsonl")) == 1  # the second step goes too far


def test_a_loss_that_is_not_finite_ends_the_run_and_leaves_the_episodes(train, tmp_path):
    with pytest.raises(sim.UserError, match="step 1: the loss or its gradient is not finite"):
        train(lr=1e30)
    assert len(read_lines(tmp_path / "run/nonfinite.jsonl")) == 4
    assert len(read_lines(tmp_path / "run/metrics.jsonl")) == 1


def test_a_policy_that_answers_nothing_is_warned_of(train, capsys):
    train(lambda prompt, seed: "hm", steps=1)
    assert "step 0: almost no episode answers" in " ".join(capsys.readouterr().err.split())


def test_a_checkpoint_is_flushed_before_it_has_its_name(train, monkeypatch):
    """A name that survives a power cut must not stand for files that didn't."""
    events, fsync, rename = [], os.fsync, Path.rename

    def recorded_fsync(descriptor):
        events.append(("fsync", Path(f"/proc/self/fd/{descriptor}").readlink()))
        fsync(descriptor)

    def recorded_rename(self, target):
        events.append(("rename", self))
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(Path, "rename", recorded_rename)
    folder = train(save_every=1).out / "checkpoints/step-000001"
    written = folder.with_name("step-000001.tmp")
    place = events.index(("rename", written))
    for path in folder.rglob("*"):
        assert ("fsync", written / path.relative_to(folder)) in events[:place]
    assert ("fsync", written) in events[:place] and events[place + 1] == ("fsync", folder.parent)


def test_a_resumed_run_samples_with_the_checkpoints_weights(train):
    whole = train(steps=3, save_every=1)
    again = train(steps=3, save_every=1, flags=["--resume"])
    assert again.policy.events[0] == "load" and len(again.policy.calls) == 2
    for name, weight in again.policy.weights[0].items():
        assert torch.equal(weight, whole.policy.weights[1][name])
    assert again.metrics == whole.metrics and again.episodes == whole.episodes
    assert again.policy.seeds == whole.policy.seeds[-len(again.policy.seeds) :]

"""train_rl.py but for its update: episodes, reward, curriculum, and every wire of `train`.

The real command runs in this process; only models that generate and real engines are scripted.

Where the published code departs from the published method, and the test that fails if that is put
back here (before the colon the file, if not this one):

 1  KL to the reference maximised     test_train_rl_update: test_a_whole_step_equals_a_slow_one
 2  queries with others' questions    test_a_request_carries_its_own_question_and_every_alias
 3  answers found in the prompt       test_only_the_policys_own_text_is_parsed
 4  substring match called EM         test_evaluate: test_metrics_equal_torchmetrics
 5  validation at temperature 1       test_evaluate: test_evaluation_by_hand
 6  sampled text tokenised again      test_sampled_ids_are_trained_as_they_are
 7  PPO over document tokens          test_train_rl_update: test_a_whole_step_equals_a_slow_one
 8  REINFORCE without a baseline      test_train_rl_update: test_advantages_by_hand
 9  full contexts cut on both sides   test_a_full_context_is_one_rule
10  sampled at top-p 0.95             test_generate: test_sampling_follows_the_distribution
11  minibatches of unequal weight
      test_train_rl_update: test_gradient_is_the_same_however_the_batch_is_cut
12  schedules end after the run       test_curriculum_is_the_published_formula
    and the last update is skipped
      test_sft_simulator: test_lr_rises_over_a_twentieth_of_the_steps_then_falls
13  last batch dropped, wrong columns test_evaluate: test_evaluation_by_hand
14  groups by an unclear index
      test_train_rl_update: test_a_group_is_the_rollouts_of_one_prompt
15  endless loop round a dead engine
      test_remote: test_a_fault_that_stays_ends_in_one_clear_error_within_the_bound
    whose episode is scored           test_failed_searches_are_counted_over_the_whole_run
16  a last search that nobody reads   test_the_last_turn_pays_for_no_search
17  no stop strings                   test_an_option_reaches_what_it_is_about
18  "five" documents, whatever top-k  test_an_option_reaches_what_it_is_about
19  noise drawn without a seed        test_every_draw_has_its_own_seed
20  </information> cut off            test_documents_are_cut_and_tags_never
21  one alias for the simulator       test_a_request_carries_its_own_question_and_every_alias
    checkpoints of weights alone
      test_checkpoints: test_killed_three_times_it_ends_as_if_nothing_had_been
"""

import json
import math
import os
import re
import shutil
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from helpers import (BUDGET, HOSTILE, LIMITS, PROMPTS, FakeEngine, FakeGenerator, command,
                     make_model, one_line, play, plug_engine, plug_generators, question,
                     read_lines, read_metrics)
from transformers import AutoModelForCausalLM, Lfm2Config, Lfm2ForCausalLM

import train_rl as rl
from plumbing import models, served
from plumbing.cli import UserError
from plumbing.files import draw_seed
from plumbing.generate import Generation, Sampling
from plumbing.metrics import collapse_warning, rollout_metrics
from plumbing.text import ROOT, encode


def test_the_tests_of_the_table_above_exist():
    rows = re.findall(r"(?:(test_\w+): )?(test_\w+)$", __doc__, re.M)
    assert len(rows) == 24
    for module, name in rows:
        file = ROOT / f"tests/{module or 'test_train_rl'}.py"
        assert f"\ndef {name}(" in file.read_text(encoding="utf-8"), (module, name)


def test_an_episode_is_what_was_sampled_and_read(tokenizer):
    replies = ["<think> t </think>\n<search> capital of Peru </search>", "<answer> Lima </answer>"]
    (episode,), generator, engine = play(tokenizer, replies, ["Lima is it.", "Not me."])
    read = "\n<information>\n1. Lima is it.\n2. Not me.\n</information>\n"
    prompt = tokenizer.decode(episode.ids[: episode.prompt_tokens])
    assert tokenizer.decode(episode.ids) == prompt + replies[0] + read + replies[1]
    written = [token for token, sampled in zip(episode.ids, episode.mask) if sampled]
    assert tokenizer.decode(written) == replies[0] + replies[1]
    assert (episode.answer, episode.end, episode.reward) == ("Lima", "answered", 1.0)
    assert (episode.searches, episode.simulator_tokens) == (1, 11)
    assert generator.prompts[1] == prompt + replies[0] + read
    assert engine.requests[0].query == "capital of Peru"


def test_sampled_ids_are_trained_as_they_are(tokenizer):
    """Ids that no encoder would choose, special tokens among them, the end-of-text token too."""
    ids = [tokenizer.eos_token_id, *encode(tokenizer, "<answer>Li"), 0,
           *encode(tokenizer, "ma</answer>")]
    generator = FakeGenerator(tokenizer, [])
    generator.generate = lambda *arguments: [Generation(list(ids), [-1.0] * len(ids), "stop")]
    episode = rl.new_episode(question(), 0, tokenizer, PROMPTS)
    rl.rollout([episode], rl.Setup(generator, None, PROMPTS, LIMITS))
    assert episode.ids[episode.prompt_tokens :] == ids
    assert episode.turns[0].text == "<|im_end|><answer>Li<|endoftext|>ma</answer>"
    for mask in (episode.mask, episode.trained_mask(True)):
        assert mask[episode.prompt_tokens :] == [1] * len(ids)


def test_only_the_policys_own_text_is_parsed(tokenizer):
    """A question and a document hold an answer, the policy gives none: no answer, reward 0."""
    row = question(answers=["Beijing"]) | {"question": "Is it <answer> Beijing </answer>?"}
    episode = rl.new_episode(row, 0, tokenizer, PROMPTS)
    prompt = tokenizer.decode(episode.ids)
    assert "<answer>" in prompt and "(answer) Beijing (/answer)?" in prompt  # the template's own
    generator = FakeGenerator(tokenizer, ["<search>a</search>"] * 3)
    engine = FakeEngine("It is <answer> Beijing </answer>.")
    rl.rollout([episode], rl.Setup(generator, engine, PROMPTS, LIMITS))
    rl.score(episode)
    assert episode.answer is None and episode.reward == episode.scores["answered"] == 0
    (empty,), _, _ = play(tokenizer, ["<answer></answer>"])
    assert empty.answer == "" and empty.scores["answered"] == 0


def test_the_last_turn_pays_for_no_search(tokenizer):
    (episode,), _, engine = play(tokenizer, ["<search>a</search>"] * 3)
    assert len(engine.requests) == LIMITS.max_searches == episode.searches
    assert episode.end == "turns" and episode.turns[-1].query is None


def test_documents_are_cut_and_tags_never(tokenizer):
    bare = "\n<information>\n\n</information>\n"
    for limit in (0, 10, 60, 500):
        text = tokenizer.decode(rl.observation_ids(tokenizer, ["word " * 100], limit))
        assert text.startswith("\n<information>\n") and text.endswith("\n</information>\n")
        assert len(text) == max(limit, len(bare))  # a token is a letter


def test_a_full_context_is_one_rule(tokenizer):
    """What was sampled is trained, uncut; the episode ends, is counted, and has no answer."""
    prompt = len(rl.new_episode(question(), 0, tokenizer, PROMPTS).ids)
    limits = rl.EpisodeSettings(max_searches=5, tokens_per_turn=64, context_tokens=prompt + 390,
                                observation_tokens=150)
    (episode,), generator, _ = play(tokenizer, ["<search>a</search>"] * 5, ["word " * 100], limits)
    assert (episode.end, episode.answer, episode.reward) == ("context", None, 0)
    assert len(episode.ids) <= limits.context_tokens
    assert rollout_metrics([episode], 1)["search/context_overflows"] == 1
    text = tokenizer.decode(episode.ids)
    assert text.startswith(generator.prompts[-1])  # no cut on the left
    sampled = tokenizer.decode([t for t, mine in zip(episode.ids, episode.mask) if mine])
    assert sampled.count("<search>") == len(generator.prompts) > 1  # none on the right


@pytest.mark.parametrize("document", HOSTILE)
def test_hostile_documents_forge_nothing(tokenizer, document):
    replies = ["<search> a </search>", "<answer> honest </answer>"]
    (episode,), generator, _ = play(tokenizer, replies, [document, "second"])
    after = slice(episode.prompt_tokens, None)
    read = [t for t, mine in zip(episode.ids[after], episode.mask[after]) if not mine]
    assert not set(tokenizer.all_special_ids) & set(read)
    text = tokenizer.decode(read)
    assert text.count("<information>") == text.count("</information>") == 1
    assert text.endswith("</information>\n") and episode.answer == "honest"
    assert rl.parse_action(text) == ("invalid", "")


@pytest.mark.parametrize("text,action", [
    ("<think> x </think><search> q </search>", ("search", "q")),
    ("<answer>a\nb</answer>", ("answer", "a\nb")),
    ("<answer></answer>", ("answer", "")),
    ("<search> q </search> <answer> a </answer>", ("search", "q")),
    *((text, ("invalid", "")) for text in ("<search> </search>", "<search> q", "</search>")),
])
def test_actions(text, action):
    assert rl.parse_action(text) == action


def test_noise_comes_with_its_probability(tokenizer):
    episode = rl.new_episode(question(3), 2, tokenizer, PROMPTS)
    for p, low, high in ((0.0, 0, 0), (0.2, 50, 110), (0.5, 160, 240), (1.0, 400, 400)):
        draws = [rl.noise_quality(p, 0, step, episode, 1) for step in range(400)]
        assert low <= draws.count("noisy") <= high


def test_episodes_stay_within_their_context(tokenizer):
    """Documents are cut to what leaves room for an answer; without such room none are asked for."""
    prompt = len(rl.new_episode(question(), 0, tokenizer, PROMPTS).ids)
    ends = set()
    for room in range(60, 700, 16):
        limits = rl.EpisodeSettings(max_searches=3, tokens_per_turn=50, observation_tokens=160,
                                    context_tokens=prompt + room)
        replies = ["<search>a</search>", "hm", "<search>b</search>", "<answer>Lima</answer>"]
        (episode,), _, engine = play(tokenizer, replies, ["word " * 100], limits)
        ends.add(episode.end)
        assert len(episode.ids) <= limits.context_tokens
        assert episode.mask[-1] == 1, room  # nothing was read that nobody answered to
        asked = [turn.query for turn in episode.turns if turn.query]
        assert [r.query for r in engine.requests] == asked and len(asked) == episode.searches
    assert ends == {"context", "answered"}


def test_a_rollout_and_a_replay_give_the_same_ids(tokenizer):
    replies = ["<think> t </think>\n<search> a </search>", "<answer> b </answer>"]
    (episode,), _, _ = play(tokenizer, replies, ["d", "e"])
    turns = [{"text": replies[0], "query": "a", "documents": ["d", "e", "deeper"]},
             {"text": replies[1]}]
    s = rl.WarmupSettings(trajectories=Path("x"), out=Path("x"), top_k=2,
                          observation_tokens=LIMITS.observation_tokens)
    sequence = rl.replay(question() | {"turns": turns}, tokenizer, PROMPTS, s)
    assert (sequence.ids, sequence.mask) == (episode.ids, episode.mask)
    limits = replace(LIMITS, max_searches=1)  # here the last turn is announced
    (episode,), _, _ = play(tokenizer, replies, ["d", "e"], limits)
    s = replace(s, max_searches=1)
    sequence = rl.replay(question() | {"turns": turns}, tokenizer, PROMPTS, s)
    assert (sequence.ids, sequence.mask) == (episode.ids, episode.mask)
    limits = replace(limits, observation_tokens=40)  # here the documents are cut
    (episode,), _, _ = play(tokenizer, replies, ["d" * 50, "e"], limits)
    turns[0]["documents"] = ["d" * 50, "e"]
    s = replace(s, observation_tokens=40)
    sequence = rl.replay(question() | {"turns": turns}, tokenizer, PROMPTS, s)
    assert (sequence.ids, sequence.mask) == (episode.ids, episode.mask)
    assert PROMPTS["policy"]["last_turn"] in tokenizer.decode(sequence.ids)


def test_curriculum_is_the_published_formula():
    def p(step, name="exponential", **changes):
        return rl.CURRICULA[name](step, rl.CurriculumSettings(curriculum=name, **changes))

    whole = [p(i) for i in range(203)]
    assert whole[0] == 0 and whole[-1] == pytest.approx(0.5) and whole == sorted(whole)
    assert whole[101] == pytest.approx((4 ** (101 / 202) - 1) / 3 * 0.5)
    assert p(0, steps=1, p_start=0.2, p_end=0.9) == 0.2
    assert p(1, steps=2) == pytest.approx(0.5)  # a schedule ends where the run ends
    half = {"steps": 11, "p_start": 0, "p_end": 0.5}
    assert p(5, **half, base=1) == pytest.approx(0.25)  # the linear limit, and close to it
    assert p(5, **half, base=1 + 1e-6) == pytest.approx(0.25, abs=1e-6)
    assert 0.1 < p(5, steps=11, p_start=0.5, p_end=0.1, base=0.25) < 0.5  # falls, base below 1
    drawn = [p(i, "random", p_start=0.1, seed=1) for i in range(203)]
    assert 0.1 <= min(drawn) < 0.15 and 0.45 < max(drawn) <= 0.5
    assert drawn[7] == p(7, "random", p_start=0.1, seed=1) != p(7, "random", p_start=0.1, seed=2)


def test_schedule_command(capsys):
    def printed(*options) -> dict[int, float]:
        command(rl, "schedule", *options)
        lines = [line.split() for line in capsys.readouterr().out.splitlines()]
        return {int(step): float(p) for _, step, _, p, *_ in lines}

    rising = {i: (4 ** (i / 4) - 1) / 3 * 0.4 for i in range(5)}
    assert printed("--steps", 5, "--p-end", 0.4) == pytest.approx(rising, abs=5e-5)
    assert printed("--steps", 2, "--curriculum", "constant") == {0: 0.5, 1: 0.5}
    assert [*printed("--steps", 101)] == list(range(0, 101, 5))


ALIASES = ("Lima", "City of Kings")
SMALL = {"steps": 2, "prompts-per-step": 2, "rollouts": 2, "top-k": 2, "max-searches": 2,
         "tokens-per-turn": 64, "context-tokens": 4000, "observation-tokens": 300, "lr": 1e-2,
         "kl-coef": 0, "simulator-max-tokens": 33, "p-start": 0, "p-end": 1, "seed": 0}
DOCUMENTS = "1. Lima is it.\n2. Not me."
BLOCK = "\n<information>\n{}\n</information>\n"


def search_then_answer(prompt: str, seed: int, searches=1, answers=("Lima", "Rome")) -> str:
    """Searches that name their question, then an answer that the seed chooses."""
    if prompt.count("\n<information>\n") < searches:
        number = prompt.split("Question ")[1].split("?")[0]
        return f"<think> t </think>\n<search> about {number} </search>"
    return f"<think> t </think>\n<answer> {answers[seed % len(answers)]} </answer>"


SOMETIMES_HALF_RIGHT = partial(search_then_answer, answers=("Lima", "Lima now", "Oslo"))


@pytest.fixture
def data(jsonl):
    return jsonl("train.jsonl", [question(i, ALIASES, hops=1 + i % 2) for i in range(4)])


@pytest.fixture
def train(monkeypatch, tmp_path, jsonl, data, tiny, tokenizer, exact, sgd):
    """Run `train` with a scripted policy and simulator; returns what it did."""
    simulator = shutil.copytree(tiny, tmp_path / "simulator")
    monkeypatch.setattr(rl, "peak_flops", lambda device: 1e12)

    def run(policy=search_then_answer, documents=lambda prompt, seed: DOCUMENTS, out="run",
            flags=(), concurrent=False, rows=None, **options):
        fakes = {str(tiny): FakeGenerator(tokenizer, policy, concurrent),
                 str(simulator): FakeGenerator(tokenizer, documents)}
        fakes[str(tiny)].logprob = -5.5
        loads = plug_generators(monkeypatch, fakes)
        settings = {"data": jsonl("own.jsonl", rows) if rows else data, "model": tiny,
                    "simulator": simulator, "out": tmp_path / out}
        ignored = rl.TrainSettings(**{"data": data, "out": tmp_path} | options).unused()
        settings |= {name: x for name, x in SMALL.items() if name.replace("-", "_") not in ignored}
        if options.get("engine", "simulator") != "simulator":
            del settings["simulator"]
        settings |= {name.replace("_", "-"): value for name, value in options.items()}
        made, folder = len(sgd), tmp_path / out
        given = [part for name, value in settings.items() for part in (f"--{name}", value)]
        command(rl, "train", *given, *flags)
        return SimpleNamespace(out=folder, policy=fakes[str(tiny)], loads=loads, start=tiny,
                               simulator=fakes[str(simulator)], optimizers=sgd[made:],
                               metrics=read_metrics(folder),
                               all=read_lines(folder / "metrics.jsonl"),
                               episodes=read_lines(folder / "episodes.jsonl"))

    run.out = tmp_path
    return run


def load(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def score(model, episode: dict, temperature=1.0):
    """Log-probs and entropies of an episode's sampled tokens, by one plain pass over its row."""
    ids, sampled = torch.tensor(episode["ids"]), torch.tensor(episode["mask"][1:]).bool()
    logprobs = (model(ids[None]).logits[0, :-1] / temperature).log_softmax(-1)[sampled]
    return logprobs.gather(1, ids[1:, None][sampled])[:, 0], -(logprobs.exp() * logprobs).sum(1)


ROWS = [question(0, ALIASES, hops=1), question(1, ("Oslo",), hops=2)]
SCRIPT = {  # (step, question, sample, turn) -> what the policy writes
    (0, "q0", 0, 0): "<think> t </think>\n<search> Peru </search>",
    (0, "q0", 0, 1): "<think> t </think>\n<answer> the city of kings </answer>",
    (0, "q0", 1, 0): "hm",
    (0, "q0", 1, 1): "<answer> Kings of Lima City </answer>",
    (0, "q1", 0, 0): "<answer> Rome </answer>",
    (0, "q1", 1, 0): "<think> t </think><search> a </search>",
    (0, "q1", 1, 1): "<search> b </search>",
    (0, "q1", 1, 2): "no more",
} | {(1, f"q{i}", g, 0): f"<answer> {i} </answer>" for i in (0, 1) for g in (0, 1)}
SEEDS = {draw_seed("policy", 0, *key): key for key in SCRIPT}


def test_a_step_worked_by_hand(train, tokenizer):
    """GRPO: rewards 1 and 0.8, 0 and 0; every number that is logged, and the weights."""
    replies = {"a": "no list", "b": "1. x\n2. y\n3. z", "Peru": DOCUMENTS}
    query = re.compile(r"Query: (.*?)<\|im_end")
    run = train(lambda prompt, seed: SCRIPT[SEEDS[seed]], rows=ROWS, importance_cap=1.5,
                documents=lambda prompt, seed: replies[query.search(prompt)[1]])
    first = [e for e in run.episodes if e["step"] == 0]
    by_key = {(e["id"], e["sample"]): e for e in first}

    # what the sampler got: each turn's ids are those of the turn before, and what came back
    def prompt(row, *parts):
        system = PROMPTS["policy"]["system"].strip()
        return (f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\nQuestion: "
                f"{row['question']}<|im_end|>\n<|im_start|>assistant\n") + "".join(parts)

    s, notice, last = SCRIPT, *(PROMPTS["policy"][name] + "\n" for name in ("notice", "last_turn"))
    reads = [*map(BLOCK.format, (DOCUMENTS, "", "1. x\n2. y")), last, "\n" + notice]
    peru = prompt(ROWS[0], s[0, "q0", 0, 0], reads[0])
    hm = prompt(ROWS[0], "hm<|im_end|>", "\n" + notice)
    empty = prompt(ROWS[1], s[0, "q1", 1, 0], reads[1])
    full = empty + s[0, "q1", 1, 1] + reads[2] + last
    turns = [list(map(tokenizer.decode, call.prompts)) for call in run.policy.calls]
    opened = [prompt(ROWS[int(e["id"][1])]) for e in run.episodes]
    assert turns[0] == opened[:4] and opened[0] == opened[1] != opened[2]
    assert sorted(turns[1]) == sorted([peru, hm, empty]) and turns[2:] == [[full], opened[4:]]

    # rewards, in the file as in the metrics
    f1 = 2 * (3 / 4) * 1 / (3 / 4 + 1)
    rewards = {("q0", 0): 1.0, ("q0", 1): f1, ("q1", 0): 0, ("q1", 1): 0}
    assert {key: e["reward"] for key, e in by_key.items()} == pytest.approx(rewards)
    # the update, by plain torch: zero-variance groups have no gradient
    model = load(run.start)
    spread = torch.tensor([1.0, f1], dtype=torch.float64).std().item() + 1e-6
    advantages = {("q0", 0): (1 - f1) / 2 / spread, ("q0", 1): (f1 - 1) / 2 / spread}
    tokens = sum(sum(e["mask"]) for e in first)
    scored = {key: score(model, by_key[key]) for key in advantages}
    weights = {key: (x.detach() + 5.5).exp().clamp(max=1.5) for key, (x, _) in scored.items()}
    losses = [-weights[key] * a * scored[key][0] for key, a in advantages.items()]
    (sum(x.sum() for x in losses) / tokens).backward()
    norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item()
    logprobs, entropies = (torch.cat(parts) for parts in zip(*scored.values()))
    spread_of_all = torch.cat([torch.full((sum(e["mask"]),), advantages.get(key, 0.0))
                               for key, e in by_key.items()]).std().item()
    policy_loss = -sum(weights[key].sum().item() * a for key, a in advantages.items()) / tokens

    # what is logged
    read = sum(len(e["ids"]) - sum(e["mask"]) - e["prompt_tokens"] for e in first)
    assert read == len(encode(tokenizer, "".join(reads)))
    asked = [len(p) for call in run.simulator.calls for p in call.prompts]
    assert len(asked) == 5  # "no list" and three documents for two are asked for once more
    expected = {
        "step": 0, "noise/p": 0.0, "reward/mean": (1 + f1) / 4, "reward/f1": (1 + f1) / 4,
        "reward/std": torch.tensor([1, f1, 0, 0]).std(unbiased=False).item(), "reward/em": 0.25,
        "reward/answered": 0.75, "reward/format": 0.25, "reward/hops_1": (1 + f1) / 2,
        "reward/hops_2": 0.0, "reward/zero_variance_groups": 0.5,
        "search/per_episode": 3 / 4, "search/invalid_actions": 2 / 4, "search/noisy": 0.0,
        "search/malformed": 2 / 3, "search/empty": 1 / 3, "search/failed": 0,
        "search/context_overflows": 0,
        "tokens/read": read, "tokens/trained": len(logprobs),
        "cost/searches": 3, "cost/simulator_prompt_tokens": sum(asked),
        "cost/simulator_tokens": len(DOCUMENTS) + 2 * len("no list") + 2 * len(replies["b"]) + 5,
        "cost/policy_tokens": tokens, "loss/policy": policy_loss, "loss/grad_norm": norm,
        "loss/entropy": entropies.mean().item(), "loss/clip_fraction": 0.0,
        "loss/logprob_gap": (logprobs + 5.5).abs().mean().item(),
        "loss/advantage_std": spread_of_all,
    }
    assert run.metrics[0] == pytest.approx(expected, rel=1e-4, abs=1e-6)
    # the weights after the step, and those that the next step samples with
    for name, p in model.named_parameters():
        moved = p - 1e-2 * p.grad / max(1.0, norm)
        assert torch.allclose(run.policy.weights[0][name], moved, atol=1e-6) and norm > 1e-2
    assert run.policy.events[:4] == ["generate"] * 3 + ["sleep"] and run.policy.events[4] == "load"


def samplings(generator):
    return {call.sampling for call in generator.calls}


@pytest.mark.parametrize("options,seen", [
    ({"temperature": 0.7, "tokens_per_turn": 50}, lambda run: samplings(run.policy) == {
        Sampling(50, 0.7, ("</search>", "</answer>"))}),
    ({"simulator_temperature": 0.3, "simulator_max_tokens": 44},
     lambda run: samplings(run.simulator) == {Sampling(44, 0.3, ())}),
    ({"simulator_words": 17, "top_k": 3}, lambda run: all(
        "about 17 words" in p and "Write 3 documents" in p for p in run.simulator.prompts)),
    ({"max_searches": 0}, lambda run: len(run.policy.calls) == 2 and not run.simulator.calls),
    ({"max_searches": 1}, lambda run: len(run.policy.calls) == 4),
    ({"steps": 3, "prompts_per_step": 3, "rollouts": 4},
     lambda run: [len(call.prompts) for call in run.policy.calls] == [12] * 6),
    ({"context_tokens": 490}, lambda run: {e["end"] for e in run.episodes} == {"context"}),
    ({"observation_tokens": 43}, lambda run: sum(
        p.endswith("</search>" + BLOCK.format("1. Lima is i")) for p in run.policy.prompts) == 8),
], ids=lambda value: str(value) if isinstance(value, dict) else "")
def test_an_option_reaches_what_it_is_about(train, options, seen):
    assert seen(train(**options))


def test_a_real_engine_is_made_of_its_options_and_only_if_asked_for(train, monkeypatch, tmp_path):
    """ZeroSearch: against the simulator no real document may reach training."""
    engine = FakeEngine("real document", "second")
    made = plug_engine(monkeypatch, engine)
    assert len(train(out="zero").simulator.calls) == 2 and not made and not engine.requests
    (tmp_path / "corpus.jsonl").write_text("{}")
    run = train(engine="bm25", corpus=tmp_path / "corpus.jsonl", top_k=4)
    train(engine="http", url="http://there/retrieve", out="http")
    assert [s.engine for s in made] == ["bm25", "http"] and made[0].top_k == 4
    assert made[0].corpus == tmp_path / "corpus.jsonl" and made[1].url == "http://there/retrieve"
    assert len(engine.requests) == 16 and not run.simulator.calls
    assert "1. real document\n2. second" in run.policy.prompts[-1]
    # nothing is drawn, asked for or logged of noise
    assert not [key for row in run.metrics for key in row if "nois" in key]
    assert {turn["quality"] for e in run.episodes for turn in e["turns"]} == {None}
    assert {request.quality for request in engine.requests} == {"useful"}


def test_without_an_engine_the_template_offers_no_search(train):
    run = train(lambda prompt, seed: "<search> a </search>", engine="none")
    wording = PROMPTS["policy_without_search"]
    assert wording["system"].strip() in run.policy.prompts[0]
    assert [load["engine"] for load in run.loads] == ["auto"]
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
    """Some episodes waste their first action: queries still go out with their own question."""
    def policy(prompt, seed):
        return "hm" if seed % 2 and "not valid" not in prompt else search_then_answer(prompt, seed)

    run = train(policy, prompts_per_step=4, rollouts=3)
    for prompt in run.simulator.prompts:
        query = prompt.split("Query: about ")[1][0]
        assert f"Question {query}?" in prompt and "Lima or City of Kings" in prompt
    assert 0 < run.metrics[0]["search/invalid_actions"] < 1 and len(run.simulator.prompts) == 24


RANDOM = {"curriculum": "random", "p_start": 0.4, "p_end": 0.6, "seed": 1, "steps": 3}


@pytest.mark.parametrize("options,expected", [
    ({}, [0, (4**0.5 - 1) / 3, 1]),
    ({"base": 1}, [0, 0.5, 1]),
    ({"p_start": 1, "p_end": 0}, [1, 1 - (4**0.5 - 1) / 3, 0]),
    ({"p_end": 0.75, "curriculum": "constant"}, [0.75] * 3),
    (RANDOM, [rl.CURRICULA["random"](i, rl.CurriculumSettings(**RANDOM)) for i in range(3)]),
], ids=str)
def test_the_curriculum_decides_what_the_simulator_is_asked_for(train, options, expected):
    """Logged, drawn and sent: p, the episodes' qualities, both places in the simulator's prompt."""
    run = train(**{"steps": 3, "prompts_per_step": 4, "rollouts": 4} | options)
    wording = PROMPTS["simulator"]
    assert [row["step"] for row in run.metrics] == [0, 1, 2]
    assert [row["noise/p"] for row in run.metrics] == pytest.approx(expected)
    for row, call, p in zip(run.metrics, run.simulator.calls, expected):
        texts = [run.simulator.tokenizer.decode(ids) for ids in call.prompts]
        noisy = sum(wording["noisy_hint"] in text for text in texts)
        assert noisy == sum(text.endswith("Noisy output:\n") for text in texts)
        assert len(texts) - noisy == sum(wording["useful_hint"] in text for text in texts)
        assert row["search/noisy"] == noisy / 16
        assert {0: noisy == 0, 1: noisy == 16}.get(p, 0 < noisy < 16)
    drawn = [turn["quality"] for e in run.episodes for turn in e["turns"] if turn["query"]]
    assert drawn.count("noisy") == round(sum(row["search/noisy"] for row in run.metrics) * 16)


def test_every_draw_has_its_own_seed(train):
    """Policy, simulator and noise: in threads, in whatever order they run, all is drawn alike."""
    def qualities(run):
        return {(e["step"], e["id"], e["sample"], turn): entry["quality"] for e in run.episodes
                for turn, entry in enumerate(e["turns"][:2])}

    options = {"curriculum": "constant", "p_end": 0.5, "prompts_per_step": 4, "rollouts": 4,
               "policy": partial(search_then_answer, searches=2)}
    run, again = train(**options), train(**options, out="again", concurrent=True)
    other = train(**options, out="other", seed=1)
    for fake, turns in ((run.policy, 3), (run.simulator, 2)):
        assert len(set(fake.seeds)) == len(fake.seeds) == 2 * 16 * turns
    for place in range(4):  # neither of step, question, sample and turn is left out of the draw
        groups = {}
        for key, quality in qualities(run).items():
            groups.setdefault(key[:place] + key[place + 1 :], set()).add(quality)
        assert any(len(found) == 2 for found in groups.values())
    seeds = [sorted(made.policy.seeds + made.simulator.seeds) for made in (run, again, other)]
    assert seeds[0] == seeds[1] and not set(seeds[0]) & set(seeds[2])
    assert again.episodes == run.episodes and qualities(other) != qualities(run)
    assert {len(call.prompts) for call in again.policy.calls} == {1}  # a thread an episode
    assert all(row["time/rollout"] > 0 for row in again.all)
    assert torch.initial_seed() == 1  # torch's own draws start there too


def test_every_epoch_asks_every_question_once_in_a_new_order(train):
    rows = [question(i, ALIASES) for i in range(12)]
    options = {"steps": 9, "prompts_per_step": 4, "rows": rows, "max_searches": 0}
    runs = [train(seed=seed, out=f"{seed}", **options) for seed in (0, 1)]
    asked = [[e["id"] for e in run.episodes if e["sample"] == 0] for run in runs]
    epochs = [tuple(asked[0][i : i + 12]) for i in (0, 12, 24)]
    assert all(len(set(epoch)) == 12 for epoch in epochs) and len(set(epochs)) == 3
    assert asked[0] != asked[1]


def test_the_sampler_gets_the_weights_of_each_step(train):
    run = train(steps=3)
    saved = dict(load(run.out / "model").named_parameters())
    first, second, third = run.policy.weights
    assert all(torch.equal(weight, saved[name]) for name, weight in third.items())
    assert any(not torch.equal(first[name], second[name]) for name in first)
    assert run.policy.events == ["generate", "generate", "sleep", "load"] * 3
    assert run.simulator.events == ["generate", "sleep"] * 3


def test_rewards_are_the_chosen_ones(train):
    """An answer of half the words: F1 rewards it, EM does not."""
    for reward in ("f1", "em"):
        run = train(SOMETIMES_HALF_RIGHT, reward=reward, rollouts=4, out=reward)
        assert all(e["reward"] == e["scores"][reward] for e in run.episodes)
        assert run.metrics[0]["reward/mean"] == run.metrics[0][f"reward/{reward}"]
        assert run.metrics[0]["reward/em"] < run.metrics[0]["reward/f1"]
        groups = [{e["reward"] for e in run.episodes[i : i + 4]} for i in (0, 4)]
        equal = sum(len(found) == 1 for found in groups) / 2
        assert run.metrics[0]["reward/zero_variance_groups"] == equal


@pytest.mark.parametrize("more", [{}, {"epochs": 2}, {"algorithm": "ppo"}], ids=str)
def test_log_probs_are_scored_at_the_temperature_of_the_rollouts(train, more):
    """Of the policy, the old policy (two epochs, PPO) and the reference: its KL starts at 0."""
    run = train(temperature=0.6, kl_coef=0.1, lr=1e-4, **more)
    model, first = load(run.start), [e for e in run.episodes if e["step"] == 0]
    scores = [score(model, e, temperature=0.6) for e in first]
    logprobs, entropies = (torch.cat(parts) for parts in zip(*scores))
    gap, row = (logprobs + 5.5).abs().mean().item(), run.metrics[0]
    assert row["loss/logprob_gap"] == pytest.approx(gap, rel=1e-4)
    assert row["loss/entropy"] == pytest.approx(entropies.mean().item(), rel=1e-4)
    assert row["loss/kl"] == pytest.approx(0, abs=1e-5)


def test_old_log_probs_are_those_of_the_sampling_policy_in_every_epoch(train):
    """A large step takes the second epoch's ratios out of the clip; the first epoch's are 1."""
    run, one = (train(epochs=n, lr=0.3, steps=1, out=f"{n}") for n in (2, 1))
    assert len(run.optimizers[0].gradients) == 2 and run.metrics[0]["loss/clip_fraction"] > 0.1
    assert one.metrics[0]["loss/clip_fraction"] == 0
    changed = {"loss/policy", "loss/clip_fraction", "loss/grad_norm"}  # are of the last epoch
    assert {name for name, x in one.metrics[0].items() if run.metrics[0][name] != x} == changed


def test_learning_rate_and_mini_batches(train):
    """It rises from 0 step by step, in all optimizer steps of a step; the ratios of the second
    mini-batch are to the log-probs before the first, where a large step has taken them away."""
    run = train(steps=5, warmup_ratio=0.8, algorithm="ppo", critic_warmup_ratio=0.4,
                critic_lr=0.1, mini_batch_size=3)
    policy, critic = run.optimizers
    assert policy.lrs[::2] == policy.lrs[1::2] == pytest.approx([0, 0.0025, 0.005, 0.0075, 0.01])
    assert critic.lrs[::2] == pytest.approx([0, 0.05, 0.1, 0.1, 0.1])
    steep = train(lr=0.3, steps=1, mini_batch_size=2, rollouts=4, out="steep")
    assert len(steep.optimizers[0].gradients) == 4
    assert steep.metrics[0]["loss/clip_fraction"] > 0


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
    run = train(algorithm="ppo", critic_lr=0.07, critic=tmp_path / "critic", kl_coef=1e-9)
    policy, critic = run.optimizers
    assert run.metrics[0]["loss/kl"] == pytest.approx(0, abs=1e-5)  # the reference is the policy's
    assert policy.lrs == [0.01] * 2 and critic.lrs == [0.07] * 2
    assert {optimizer.options["weight_decay"] for optimizer in run.optimizers} == {0.0}
    same = train(algorithm="ppo", out="same", critic_lr=0.07)
    other = train(algorithm="ppo", out="other", critic_lr=0.07, critic=tmp_path / "critic")
    gradients = [r.optimizers[1].gradients[0] for r in (run, same, other)]
    assert torch.equal(gradients[0], gradients[2]) and not torch.equal(gradients[0], gradients[1])


REINFORCE, PLUS, PPO = ({"algorithm": name} for name in ("reinforce", "reinforce++", "ppo"))
KL = {"kl_coef": 0.5}


@pytest.mark.parametrize("base,changes", [
    ({}, [REINFORCE, PPO, PLUS, KL, {"reward": "em"}, {"temperature": 0.5}, {"importance_cap": 0},
          {"flags": ["--no-scale-rewards"]}, {"flags": ["--no-mask-documents"]}]),
    ({"epochs": 3, "lr": 0.3}, [{"clip_low": 0.9}, {"clip_high": 5.0}]),  # ratios leave the clip
    (REINFORCE, [KL, {"baseline": "none"}]), (PLUS, [KL, {"gamma": 0.5}]),
    (PPO, [KL, {"gamma": 0.5}, {"gae_lambda": 0.5}]),
], ids=lambda value: str(value) if isinstance(value, dict) else "")
def test_an_option_of_the_update_changes_the_update(train, base, changes):
    runs = [train(SOMETIMES_HALF_RIGHT, out=f"{i}", rollouts=4, **base | more)
            for i, more in enumerate([{}, *changes])]
    plain, *ends = (run.policy.weights[-1] for run in runs)
    for more, end in zip(changes, ends):
        assert any(not torch.allclose(end[name], plain[name], rtol=1e-4, atol=1e-7)
                   for name in plain), more


def test_gradient_checkpointing_and_micro_batches_change_no_weight(train):
    """Per step two passes of the critic, three of the policy, one of them through its reference;
    the layers of a pass that learns, one of each, are computed twice with checkpointing."""
    calls, counts, weights = [], [], []
    hook = torch.nn.modules.module.register_module_forward_pre_hook
    with hook(lambda module, args: calls.append((type(module).__name__, torch.is_grad_enabled()))):
        for more in ({}, {"flags": ["--gradient-checkpointing"]}, {"batch_tokens": 300}):
            calls.clear()
            run = train(out=f"{len(counts)}", algorithm="ppo", kl_coef=1e-9, **more)
            weights.append(run.policy.weights[-1])
            counts.append([calls.count((name, learns)) for name in ("Critic", "TokenScorer")
                           for learns in (False, True)] + [calls.count(("LlamaMLP", True))])
    assert counts[:2] == [[2, 2, 4, 2, 8], [2, 2, 4, 2, 16]]
    parts = counts[2][0]
    assert parts > 2 and counts[2] == [parts, parts, 2 * parts, parts, 4 * parts]
    for name, weight in weights[0].items():
        assert all(torch.allclose(other[name], weight, atol=1e-6) for other in weights[1:]), name


def test_a_simulator_that_finds_nothing_stops_the_run(train, capsys):
    """Steps in a row count, over a resumption too; one document among them begins anew."""
    def second_step(prompt, seed):
        calls.append(seed)
        return DOCUMENTS if 8 < len(calls) <= 10 else "Nothing."

    calls, more = [], {"steps": 8, "save_every": 1, "empty_steps": 3}
    with pytest.raises(UserError, match="step 4: no search found a document, 3 steps in a row"):
        train(documents=second_step, **more)
    rows = read_metrics(more_out := train.out / "run")
    assert [row["search/empty"] for row in rows] == [1, 0.5, 1, 1, 1]
    warnings = [line for line in capsys.readouterr().err.splitlines() if "no search found" in line]
    assert [line.split(":")[0] for line in warnings] == ["step 0", "step 2", "step 3"]
    with pytest.raises(UserError, match="step 5: .* 4 steps in a row"):
        train(documents=second_step, flags=["--resume"], **more | {"empty_steps": 4})
    assert len(read_metrics(more_out)) == 6


@pytest.mark.parametrize("fault,words", [
    ("failed", "4 episodes failed .*; 2 steps are saved: --resume goes on"),
    ("empty", "2 steps in a row .*; 4 steps are saved: --resume goes on")])
def test_a_run_that_its_searches_end_loses_no_step(train, monkeypatch, fault, words):
    """Long before a checkpoint is due. Resumed with a sound engine, it ends as if it had gone on.
    """
    engine = FakeEngine("d")
    plug_engine(monkeypatch, engine)
    options = {"engine": "bm25", "steps": 5, "empty_steps": 2}

    def at_fault(prompt, seed):
        """The policy of a run whose engine is at fault from its third step on."""
        bad = len(policy_calls) >= 16
        policy_calls.append(seed)
        engine.documents = [] if bad and fault == "empty" else ["d"]
        engine.error = lambda request: "broken" if bad and fault == "failed" else None
        return search_then_answer(prompt, seed)

    policy_calls = []
    with pytest.raises(UserError, match=words):
        train(at_fault, out="stopped", **options)
    done = {"failed": 2, "empty": 4}[fault]
    stopped = train.out / "stopped"
    assert [path.name for path in (stopped / "checkpoints").iterdir()] == [f"step-{done:06d}"]
    before = read_lines(stopped / "metrics.jsonl")
    engine.documents, engine.error = ["d"], lambda request: None
    resumed = train(out="stopped", flags=["--resume"], **options)
    assert resumed.all[:done] == before and len(resumed.all) == 5
    if fault == "failed":
        whole = train(out="whole", **options)
        assert resumed.metrics == whole.metrics and resumed.episodes == whole.episodes


def test_the_config_holds_what_was_used(train, tmp_path):
    run = train(simulator_words=17, p_end=0.4, generator="hf", flags=["--no-scale-rewards"])
    settings = json.loads((run.out / "config.json").read_text())["settings"]
    expected = {"simulator_words": 17, "p_end": 0.4, "scale_rewards": False, "algorithm": "grpo",
                "model": str(run.start), "lr": 0.01, "top_k": 2, "seed": 0, "generator": "hf"}
    assert expected.items() <= settings.items()
    loads = [(load["name"], load["needs_ids"], load["engine"]) for load in run.loads]
    assert loads == [(str(run.start), True, "hf"), (str(tmp_path / "simulator"), False, "hf")]


def test_the_peak_is_that_of_all_processes_which_share_the_questions(train, monkeypatch):
    monkeypatch.setattr(Accelerator, "num_processes", 2)
    row = train().all[0]
    assert row["rate/mfu"] == pytest.approx(row["rate/update_tflops"] / 2)
    with pytest.raises(UserError, match="--prompts-per-step can't be divided over 2 processes"):
        train(prompts_per_step=3, out="odd")


def test_rates_are_those_of_the_logged_figures(train):
    row = train(kl_coef=0.1).all[0]
    rate = row["cost/policy_tokens"] / row["time/rollout"]
    assert row["rate/rollout_tokens"] == pytest.approx(rate)
    assert row["rate/mfu"] == pytest.approx(row["rate/update_tflops"])  # of a peak of 1 TFLOP/s
    assert row["rate/reference_tokens"] > 0 and row["time/search"] > 0 and row["time/sync"] > 0
    phases = ("rollout", "search", "reference", "update", "sync")
    assert sum(row[f"time/{phase}"] for phase in phases) < row["time/step"]


def test_failed_searches_are_counted_over_the_whole_run(train, monkeypatch):
    plug_engine(monkeypatch, FakeEngine("d", error=lambda r: "broken" if "0" in r.query else None))
    options = {"engine": "bm25", "prompts_per_step": 4, "steps": 3, "save_every": 1}
    run = train(failed_searches=6, **options)
    assert [row["search/failed"] for row in run.metrics] == [2, 2, 2]
    assert [e["scores"] == {} for e in run.episodes] == [e["end"] == "failed" for e in run.episodes]
    first = [e for e in run.episodes[:8] if e["scores"]]  # the failed ones are in no mean
    groups = [{e["reward"] for e in first[i : i + 2]} for i in (0, 2, 4)]
    assert run.metrics[0]["reward/mean"] == sum(e["reward"] for e in first) / 6 > 0
    assert run.metrics[0]["reward/zero_variance_groups"] == sum(len(g) == 1 for g in groups) / 3
    for flags in ([], ["--resume"]):  # in the third step
        with pytest.raises(UserError, match="6 episodes failed .--failed-searches allows 5.: bro"):
            train(failed_searches=5, out="fewer", flags=flags, **options)
        assert len(read_lines(run.out.parent / "fewer/metrics.jsonl")) == 2


HELD_OUT = [question(7, ALIASES) | {"hops": 1}, question(8, ("Oslo",)) | {"hops": 2},
            question(9, ("Lima",)) | {"hops": 2}]


def test_held_out_questions_are_played_greedily_without_noise_and_never_trained(train, jsonl):
    """All training searches are noisy here. An evaluation goes before the first step, after every
    second and after the last; two of the three answers are right."""
    run = train(partial(search_then_answer, answers=("Lima",)), steps=3, p_start=1, eval_every=2,
                eval_data=jsonl("held-out.jsonl", HELD_OUT), eval_limit=3)
    line = {"eval/reward": 2 / 3, "eval/em": 2 / 3, "eval/f1": 2 / 3, "eval/answered": 1.0,
            "eval/reward/hops_1": 1.0, "eval/reward/hops_2": 0.5, "eval/searches": 1.0,
            "eval/searches/hops_1": 1.0, "eval/searches/hops_2": 1.0, "eval/n": 3}
    assert read_lines(run.out / "eval.jsonl") == [{"step": n} | line for n in (0, 2, 3)]
    numbers = [set(re.findall(r"about (\d)", text)) for text in map(json.dumps, run.episodes)]
    assert set.union(*numbers) <= set("0123")  # of the training questions
    for prompt in run.simulator.prompts:
        quality = "useful" if re.search("Query: about [789]", prompt) else "noisy"
        assert f"with {quality} information" in prompt
    assert [call.sampling.temperature for call in run.policy.calls] == (
        [0.0] * 2 + [1.0] * 4 + [0.0] * 2 + [1.0] * 2 + [0.0] * 2)


def test_the_policy_of_the_best_evaluation_is_kept(train, jsonl, monkeypatch):
    """Held-out answers are right after the first step alone; the engine is another one."""
    made, seen = plug_engine(monkeypatch, engine := FakeEngine("d")), []

    def policy(prompt, seed):
        if "Question 9" in prompt and "<information>" in prompt.split("assistant")[-1]:
            seen.append(prompt)
            return f"<answer> {'Lima' if len(seen) == 2 else 'Oslo'} </answer>"
        return search_then_answer(prompt, seed)

    run = train(policy, eval_every=1, eval_engine="bm25", flags=["--keep-best"],
                eval_data=jsonl("held-out.jsonl", HELD_OUT[2:]))
    rewards = [row["eval/reward"] for row in read_lines(run.out / "eval.jsonl")]
    assert rewards == [0, 1, 0] and len(made) == 1
    assert {request.query for request in engine.requests} == {"about 9"}
    best, first, last = (load(run.out / "best").state_dict(), *run.policy.weights)
    assert all(torch.equal(best[name], tensor) for name, tensor in first.items())
    assert not all(torch.equal(best[name], tensor) for name, tensor in last.items())


def test_a_loss_that_is_not_finite_ends_the_run_and_leaves_the_episodes(train, tmp_path):
    with pytest.raises(UserError, match="step 1: the loss or its gradient is not finite"):
        train(lr=1e30)
    assert len(read_lines(tmp_path / "run-nonfinite.jsonl")) == 4
    assert len(read_lines(tmp_path / "run/metrics.jsonl")) == 1


def test_a_checkpoint_is_flushed_before_it_has_its_name(train, monkeypatch):
    """A name that survives a power cut must not stand for files that didn't."""
    events = []

    def record(owner, name, place):
        call = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args: (
            events.append((name, place(args[0]))) or call(*args)))

    record(os, "fsync", lambda descriptor: Path(f"/proc/self/fd/{descriptor}").readlink())
    record(Path, "rename", lambda path: path)
    folder = train(save_every=1).out / "checkpoints/step-000001"
    written = folder.with_name("step-000001.tmp")
    place = events.index(("rename", written))
    for path in folder.rglob("*"):
        assert ("fsync", written / path.relative_to(folder)) in events[:place]
    assert ("fsync", written) in events[:place] and events[place + 1] == ("fsync", folder.parent)
    for name in ("metrics.jsonl", "episodes.jsonl"):  # and so are the lines of its steps
        assert ("fsync", folder.parents[1] / name) in events[:place]


def test_a_resumed_run_samples_with_the_checkpoints_weights(train, capsys):
    options = {"steps": 3, "save_every": 1, "warmup_ratio": 1, "mini_batch_size": 3}
    whole = train(**options)
    shutil.rmtree(whole.out / "checkpoints/step-000003")
    again = train(**options, flags=["--resume"])
    assert again.optimizers[0].lrs == whole.optimizers[0].lrs[-2:] != whole.optimizers[0].lrs[:2]
    bills = re.findall(r"\$(\S+)", capsys.readouterr().err)  # 12 searches at $275 / 30,000
    assert bills == ["0.04", "0.07", "0.11", "0.11"]
    assert again.policy.events[0] == "load" and len(again.policy.calls) == 2
    for name, weight in again.policy.weights[0].items():
        assert torch.equal(weight, whole.policy.weights[1][name])
    assert again.metrics == whole.metrics and again.episodes == whole.episodes
    assert again.policy.seeds == whole.policy.seeds[-len(again.policy.seeds) :]
    options["steps"] = 4
    longer = train(**options | {"save_every": 5}, flags=["--resume"])  # after the last checkpoint
    assert len(longer.policy.calls) == 2
    with pytest.raises(UserError, match="other settings: lr$"):
        train(**options | {"lr": 0.5}, flags=["--resume"])

    def stop(prompt, seed):
        os.kill(os.getpid(), signal.SIGTERM)

    shutil.rmtree(whole.out / "checkpoints/step-000004")
    train(stop, **options, flags=["--resume"])
    assert "stopped after 3 steps" in " ".join(capsys.readouterr().err.split())
    # Two steps on: the optimizer's state alone would give the first of them the right rate.
    longest = train(**options | {"steps": 5}, flags=["--resume"])
    assert longest.optimizers[0].lrs == [0.01] * 4


def options(data, model, out, *extra):
    return ["train", "--data", data, "--model", model, "--out", out, *BUDGET, *extra]


def test_two_runs_with_one_seed_agree(data, policy, tiny, tmp_path):
    """To the bit. (That processes agree, too, is held in test_checkpoints.)"""
    for name in "ab":
        command(rl, *options(data, policy, tmp_path / name, "--simulator", tiny))
    metrics = read_metrics(tmp_path / "a")
    assert metrics == read_metrics(tmp_path / "b") and len(metrics) == 2
    for file in ("episodes.jsonl", "model/model.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    start, end = (policy, tmp_path / "a/model")
    assert (start / "model.safetensors").read_bytes() != (end / "model.safetensors").read_bytes()
    assert all(math.isfinite(v) for row in metrics for v in row.values())
    assert 0 < metrics[0]["reward/mean"] < 1 and metrics[0]["reward/answered"] > 0.5


def test_ppo_runs_in_bfloat16(data, policy, tmp_path, monkeypatch):
    for module in (models, served):
        monkeypatch.setattr(module, "compute_dtype", lambda: torch.bfloat16)
    command(rl, *options(data, policy, tmp_path / "run", "--engine", "none", "--algorithm", "ppo",
                         "--epochs", 2))
    first, second = read_metrics(tmp_path / "run")
    assert all(map(math.isfinite, [*first.values(), *second.values()]))
    assert first["loss/kl"] == 0 < second["loss/kl"]  # the reference has the policy's arithmetic


def test_nothing_to_learn_is_warned_of_and_no_error(train, capsys):
    """No episode answers, no KL is paid for: no group has variance, and the step counts."""
    run = train(lambda prompt, seed: "hm")
    assert "step 0: almost no episode answers" in " ".join(capsys.readouterr().err.split())
    sure = {"reward/answered": 1, "loss/entropy": 0.004, "tokens/trained": 1,
            "search/per_episode": 0.04, "search/malformed": 0.5}
    assert "almost no episode searches" in collapse_warning(sure, can_search=True)
    assert "entropy is almost 0" in collapse_warning(sure, can_search=False)
    assert "entropy" in collapse_warning(sure | {"search/per_episode": 0.06}, can_search=True)
    for healthy in ({"loss/entropy": 0.006}, {"tokens/trained": 0}):
        assert not collapse_warning(sure | healthy, can_search=False)
    cut = sure | {"search/per_episode": 1, "search/malformed": 0.51}
    assert "a larger --simulator-max-tokens" in collapse_warning(cut, can_search=True)
    assert run.metrics[0]["reward/zero_variance_groups"] == 1
    for name in ("loss/grad_norm", "loss/policy", "tokens/trained"):
        assert run.metrics[0][name] == 0
    start = dict(load(run.start).named_parameters())
    assert all(torch.equal(weight, start[name]) for name, weight in run.policy.weights[-1].items())


def test_a_step_without_a_trained_token_is_skipped_and_counted(train):
    """Every other question is too long for a turn."""
    rows = [question(i) | {"question": f"Question {i}? " + "long " * 200 * (i % 2)}
            for i in range(4)]
    run = train(rows=rows, steps=4, prompts_per_step=1, context_tokens=900, algorithm="ppo",
                kl_coef=0.1, observation_tokens=80)
    skipped = [row.get("loss/skipped", 0) for row in run.metrics]
    assert skipped == [row["search/context_overflows"] / 2 for row in run.metrics]
    assert sorted(skipped) == [0, 0, 1, 1]
    assert len(run.optimizers[0].gradients) == 2


def test_a_prompt_without_room_for_a_turn_is_refused_before_the_run(train, tmp_path):
    with pytest.raises(UserError, match="--context-tokens 300 has no room for a turn of 64"):
        train(context_tokens=300)
    assert not (tmp_path / "run/metrics.jsonl").exists()


def test_engines_with_an_update_of_their_own_are_refused(capsys, monkeypatch, data, tiny, tmp_path):
    for name, words in (("DEEPSPEED", "DEEPSPEED is not supported"), ("FSDP", "fsdp_version: 2")):
        with monkeypatch.context() as patch:
            patch.setenv(f"ACCELERATE_USE_{name}", "true")
            arguments = options(data, tiny, tmp_path / "run", "--engine", "none")
            assert words in one_line(capsys, patch, rl, *arguments)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
def test_a_model_that_can_not_be_sampled_here_leaves_no_trace(capsys, monkeypatch, data, tokenizer,
                                                             tmp_path, overwrite):
    """A hybrid with the hf sampler: one line says what to use, before an old run is put aside."""
    config = Lfm2Config(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64,
                        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                        layer_types=["conv", "full_attention"])
    Lfm2ForCausalLM(config).save_pretrained(tmp_path / "hybrid")
    tokenizer.save_pretrained(tmp_path / "hybrid")
    out = tmp_path / "run"
    if overwrite:
        out.mkdir()
        (out / "config.json").write_text('{"settings": {}}')
    capsys.readouterr()
    arguments = options(data, tmp_path / "hybrid", out, "--engine", "none", *overwrite)
    line = one_line(capsys, monkeypatch, rl, *arguments)
    assert "Lfm2ForCausalLM can't be sampled with --generator hf" in line
    assert "use vLLM (--generator vllm, or its server)" in line
    assert [p.name for p in out.glob("*")] == ["config.json"] * len(overwrite)
    assert not overwrite or (out / "config.json").read_text() == '{"settings": {}}'

"""Chapter 2: rollout, reward, curriculum, the update, and the commands as a user runs them."""

import json
import math
import subprocess
import sys
from types import SimpleNamespace

import pytest
from helpers import (
    BUDGET,
    HOSTILE,
    LIMITS,
    PROMPTS,
    ROOT,
    TWO_PROCESSES,
    FakeGenerator,
    command,
    corpus_rows,
    one_line,
    play,
    question,
    read_metrics,
)

import sft_simulator as sim
import train_rl as rl

# ---------------------------------------------------------------- rollout


def test_an_episode_is_what_was_sampled_and_read(tokenizer):
    replies = ["<think> t </think>\n<search> capital of Peru </search>", "<answer> Lima </answer>"]
    (episode,), generator, engine = play(tokenizer, replies, ["Lima is it.", "Not me."])
    read = "\n<information>\n1. Lima is it.\n2. Not me.\n</information>\n"
    prompt = tokenizer.decode(episode.ids[: episode.prompt_tokens])
    assert tokenizer.decode(episode.ids) == prompt + replies[0] + read + replies[1]
    written = [token for token, sampled in zip(episode.ids, episode.mask) if sampled]
    assert tokenizer.decode(written) == replies[0] + replies[1]
    assert (episode.answer, episode.end, episode.searches, episode.reward) == ("Lima", "answered", 1, 1.0)
    assert episode.simulator_tokens == 11 and episode.scores["em"] == 1
    assert generator.prompts[1] == prompt + replies[0] + read
    assert engine.requests[0].query == "capital of Peru"


def test_every_query_travels_with_its_own_question(tokenizer):
    """Three episodes, the first does not search: the others' requests still hold their own question and answers."""
    replies = ["<answer>x</answer>", "<search>a</search>", "<search>b</search>", "<answer>y</answer>", "<answer>z</answer>"]
    episodes, _, engine = play(tokenizer, replies, n=3)
    assert [(r.query, r.question) for r in engine.requests] == [("a", "Question 1?"), ("b", "Question 2?")]
    assert [e.answer for e in episodes] == ["x", "y", "z"]


def test_the_last_turn_pays_for_no_search(tokenizer):
    (episode,), generator, engine = play(tokenizer, ["<search> a </search>"] * 3)
    assert len(engine.requests) == episode.searches == 2
    assert episode.end == "turns" and episode.reward == 0 and episode.turns[-1].query is None
    assert PROMPTS["policy"]["last_turn"] in generator.prompts[2]


def test_an_invalid_action_gets_a_notice_that_is_not_trained(tokenizer):
    (episode,), generator, engine = play(tokenizer, ["I just talk", "<search>  </search>", "<answer> Lima </answer>"])
    notice = PROMPTS["policy"]["notice"]
    assert generator.prompts[2].count(notice) == 2 and not engine.requests
    written = tokenizer.decode([t for t, m in zip(episode.ids, episode.mask) if m])
    assert notice not in written and episode.reward == 1 and episode.scores["format"] == 0


def test_a_search_without_an_engine_is_invalid(tokenizer):
    (episode,), _, _ = play(tokenizer, ["<search> a </search>", "<answer> Lima </answer>"], engine=None)
    assert [turn.action for turn in episode.turns] == ["invalid", "answer"] and episode.searches == 0


def test_documents_are_cut_and_tags_never(tokenizer):
    (episode,), generator, _ = play(tokenizer, ["<search> a </search>", "<answer> b </answer>"], ["word " * 400])
    block = generator.prompts[1].split("<information>")[-1]
    assert block.endswith("</information>\n") and len(sim.encode(tokenizer, "\n<information>" + block)) == 300


def test_a_full_context_ends_the_episode_by_one_rule(tokenizer):
    prompt = len(rl.new_episode(question(), 0, tokenizer, PROMPTS).ids)
    limits = rl.RolloutSettings(3, 64, context_tokens=prompt + 200, observation_tokens=150)
    (episode,), _, engine = play(tokenizer, ["<search> a </search>"], ["word " * 100], limits)
    assert episode.end == "context" and episode.answer is None and episode.reward == 0
    assert len(episode.ids) <= limits.context_tokens


@pytest.mark.parametrize("document", HOSTILE)
def test_hostile_documents_forge_nothing(tokenizer, document):
    replies = ["<search> a </search>", "<answer> honest </answer>"]
    (episode,), generator, _ = play(tokenizer, replies, [document, "second"])
    read = [t for t, m in zip(episode.ids[episode.prompt_tokens :], episode.mask[episode.prompt_tokens :]) if not m]
    assert not set(tokenizer.all_special_ids) & set(read)
    text = tokenizer.decode(read)
    assert text.count("<information>") == text.count("</information>") == 1 and text.endswith("</information>\n")
    assert not rl.ACTION.search(text) and episode.answer == "honest"


@pytest.mark.parametrize("text,action", [
    ("<think> x </think><search> q </search>", ("search", "q")),
    ("<answer>a\nb</answer>", ("answer", "a\nb")),
    ("<answer></answer>", ("answer", "")),
    ("<search> </search>", ("invalid", "")),
    ("<search> q", ("invalid", "")),
    ("</search>", ("invalid", "")),
    ("<search> q </search> <answer> a </answer>", ("search", "q")),
])  # fmt: skip
def test_actions(text, action):
    assert rl.parse_action(text) == action


def test_noise_is_a_function_of_its_arguments(tokenizer):
    episode = rl.new_episode(question(3), 2, tokenizer, PROMPTS)
    draws = [rl.noise_quality(0.5, 0, step, episode, 1) for step in range(400)]
    assert draws == [rl.noise_quality(0.5, 0, step, episode, 1) for step in range(400)]
    assert 160 < draws.count("noisy") < 240
    assert rl.noise_quality(0.0, 0, 0, episode, 0) == "useful" and rl.noise_quality(1.0, 0, 0, episode, 0) == "noisy"
    other = rl.new_episode(question(3), 3, tokenizer, PROMPTS)
    assert draws != [rl.noise_quality(0.5, 0, step, other, 1) for step in range(400)]


# ---------------------------------------------------------------- reward


@pytest.mark.parametrize("answer,gold,em,f1", [
    ("Lima", ["lima"], 1, 1),
    ("the Lima!", ["Cusco", "Lima"], 1, 1),
    ("city of Lima", ["Lima"], 0, 0.5),
    (None, ["Lima"], 0, 0),
    ("", ["Lima"], 0, 0),
    ("the", ["a"], 1, 1),  # SQuAD: both normalise to nothing
    ("1999", ["9"], 0, 0),
    ("b b a2", ["b a2 a2"], 0, 2 / 3),
])  # fmt: skip
def test_em_and_f1(answer, gold, em, f1):
    assert rl.exact_match(answer, gold) == em and rl.f1_score(answer, gold) == pytest.approx(f1)


# ---------------------------------------------------------------- curriculum


def test_curriculum_is_the_published_formula():
    p = [rl.noise_probability(i, 203, 0.0, 0.5, 4, "exponential") for i in range(203)]
    assert p[0] == 0 and p[-1] == pytest.approx(0.5) and p == sorted(p)
    assert p[101] == pytest.approx((4 ** (101 / 202) - 1) / 3 * 0.5)
    assert rl.noise_probability(0, 1, 0.2, 0.9, 4, "exponential") == 0.2
    assert rl.noise_probability(5, 11, 0, 0.5, 1, "exponential") == pytest.approx(0.25)  # b = 1: linear
    assert rl.noise_probability(5, 11, 0, 0.5, 1 + 1e-6, "exponential") == pytest.approx(0.25, abs=1e-6)
    assert rl.noise_probability(5, 11, 0.5, 0.1, 0.25, "exponential") < 0.5  # b < 1 and a falling schedule are allowed
    random = [rl.noise_probability(i, 203, 0.1, 0.5, 4, "random", seed=1) for i in range(203)]
    assert 0.1 <= min(random) < 0.15 and 0.45 < max(random) <= 0.5
    assert random[7] == rl.noise_probability(7, 203, 0.1, 0.5, 4, "random", seed=1)


def test_schedule_command(capsys):
    command(rl, "schedule", "--steps", 5, "--p-end", 0.4, "--json")
    p = json.loads(capsys.readouterr().out)
    assert p == pytest.approx([(4 ** (i / 4) - 1) / 3 * 0.4 for i in range(5)])
    command(rl, "schedule", "--steps", 5, "--p-end", 0.4)
    assert "p 0.4000" in capsys.readouterr().out


# ---------------------------------------------------------------- commands

def options(data, model, out, *extra):
    return ["train", "--data", data, "--model", model, "--out", out, *BUDGET, *extra]


def train(data, model, out, *extra):
    command(rl, *options(data, model, out, *extra))


@pytest.fixture
def data(jsonl):
    return jsonl("train.jsonl", [question(i, hops=1 + i % 2) for i in range(4)])


def test_two_runs_with_one_seed_agree(run_script, data, policy, tiny, tmp_path):
    """One in this process, one in another."""
    train(data, policy, tmp_path / "a", "--simulator", tiny)
    run_script("train_rl.py", *options(data, policy, tmp_path / "b", "--simulator", tiny))
    metrics = read_metrics(tmp_path / "a")
    assert metrics == read_metrics(tmp_path / "b") and len(metrics) == 2
    assert (tmp_path / "a/episodes.jsonl").read_text() == (tmp_path / "b/episodes.jsonl").read_text()
    assert all(math.isfinite(v) for row in metrics for v in row.values())
    assert metrics[0]["loss/grad_norm"] >= 0 and metrics[0]["noise/p"] == 0 and metrics[1]["noise/p"] == 0.5
    weights = [(tmp_path / n / "model/model.safetensors").read_bytes() for n in ("a", "b")]
    assert weights[0] == weights[1] != (policy / "model.safetensors").read_bytes()
    assert 0 < metrics[0]["reward/mean"] < 1 and metrics[0]["reward/answered"] > 0.5


@pytest.mark.parametrize("algorithm", ["reinforce", "ppo", "reinforce++"])
def test_each_algorithm_runs(data, policy, tiny, tmp_path, algorithm):
    train(data, policy, tmp_path / "run", "--simulator", tiny, "--algorithm", algorithm, "--epochs", 2)
    assert len(read_metrics(tmp_path / "run")) == 2


def test_warmup_then_real_engine_and_none(data, tiny, jsonl, tmp_path):
    turns = [{"text": "<search> a </search>", "query": "a", "documents": ["d", "e"]}, {"text": "<answer> Lima </answer>"}]
    records = jsonl("trajectories.jsonl", [question(i) | {"turns": turns} for i in range(8)])
    command(rl, "warmup", records, "--model", tiny, "--out", tmp_path / "warm", "--top-k", 2, "--lr", "1e-3")
    corpus = jsonl("corpus.jsonl", corpus_rows())
    train(data, tmp_path / "warm/model", tmp_path / "bm25", "--engine", "bm25", "--corpus", corpus)
    train(data, tiny, tmp_path / "none", "--engine", "none")
    assert read_metrics(tmp_path / "none")[0]["cost/searches"] == 0


def test_replay_gives_the_ids_a_rollout_would(tokenizer):
    replies = ["<think> t </think>\n<search> a </search>", "<answer> b </answer>"]
    (episode,), _, _ = play(tokenizer, replies, ["d", "e"])
    turns = [{"text": replies[0], "query": "a", "documents": ["d", "e", "deeper"]}, {"text": replies[1]}]
    record = question() | {"turns": turns}
    sequence = rl.replay(record, tokenizer, PROMPTS, top_k=2)
    assert (sequence.ids, sequence.mask) == (episode.ids, episode.mask)


def test_no_real_document_reaches_training(data, tiny, tmp_path, monkeypatch):
    """ZeroSearch trains on simulated documents alone: a run against the simulator must not even open a real engine."""

    def refuse(*args, **kwargs):
        raise AssertionError("a real engine was opened during training")

    monkeypatch.setattr(rl, "make_real_engine", refuse)
    monkeypatch.setattr(sim, "BM25Engine", refuse)
    monkeypatch.setattr(sim, "RemoteEngine", refuse)
    asked = []
    search = sim.SimulatedEngine.search
    monkeypatch.setattr(sim.SimulatedEngine, "search", lambda self, requests: asked.append(requests) or search(self, requests))
    settings = SimpleNamespace(engine="simulator", simulator=str(tiny), top_k=2, simulator_words=20, simulator_temperature=0.8,
                               simulator_max_tokens=24, generator="hf", corpus=ROOT / "data/world/passages.jsonl")  # fmt: skip
    engine = rl.make_engine(settings, PROMPTS, "cpu")
    assert isinstance(engine, sim.SimulatedEngine)
    tokenizer = sim.load_tokenizer(str(tiny))
    episode = rl.new_episode(question(), 0, tokenizer, PROMPTS)
    replies = ["<search> capital of Peru </search>", "<answer> Lima </answer>"]
    rl.rollout([episode], FakeGenerator(tokenizer, replies), tokenizer, engine, PROMPTS, LIMITS)
    passages = {row["text"] for row in sim.read_jsonl(settings.corpus)}
    assert len(asked) == 1 and not passages & set(episode.turns[0].documents)


@pytest.mark.parametrize("extra,words", [
    (["--p-start", "1.5"], "p-start"),
    (["--top-k", "0"], "top-k"),
    (["--rollouts", "1"], "--rollouts 1"),
    (["--algorithm", "reinforce", "--rollouts", "1"], "--rollouts 1"),
    (["--base", "0"], "--base"),
    (["--clip-low", "-0.1"], "--clip-low"),
    (["--algorithm", "dqn"], "dqn"),
    (["--steps", "0"], "--steps"),
    (["--engine", "none", "--prompts-per-step", "5"], "too few"),
    (["--context-tokens", "10"], "--context-tokens"),
    (["--engine", "none", "--resume"], "no run to resume"),
    (["--engine", "none"], "no/such-model"),
    ([], "--simulator"),
])  # fmt: skip
def test_bad_settings_are_one_line_and_exit_code_2(capsys, monkeypatch, data, tmp_path, extra, words):
    """Refused before anything is loaded or written: the model doesn't exist, which is noticed last."""
    arguments = options(data, "no/such-model", tmp_path / "run", *extra)
    assert words in one_line(capsys, monkeypatch, rl, *arguments)
    assert not (tmp_path / "run").exists()


def test_empty_gold_and_existing_run_are_refused(capsys, monkeypatch, jsonl, data, tiny, tmp_path):
    bad = jsonl("bad.jsonl", [question(0), question(1, answers=[])])
    arguments = options(bad, tiny, tmp_path / "run", "--engine", "none")
    assert "bad.jsonl:2" in one_line(capsys, monkeypatch, rl, *arguments)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.json").write_text("{}")
    arguments = options(data, tiny, tmp_path / "run", "--engine", "none")
    assert "--overwrite" in one_line(capsys, monkeypatch, rl, *arguments)
    assert (tmp_path / "run/config.json").read_text() == "{}"


def test_two_processes_make_the_same_step_as_one(data, policy, tmp_path):
    """DDP over gloo, as a user launches it. Rollouts are the same questions and seeds, so the steps agree."""
    arguments = ["train", "--data", data, "--model", policy, "--engine", "none", *BUDGET, "--lr", "1e-4", "--rollouts", 4,
                 "--batch-tokens", 450]  # fmt: skip
    for processes, launch in (("1", [sys.executable]), ("2", TWO_PROCESSES)):
        command = [*launch, ROOT / "train_rl.py", *arguments, "--out", tmp_path / processes]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=200, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = (read_metrics(tmp_path / n)[0] for n in ("1", "2"))
    assert one["loss/grad_norm"] > 0
    assert two == pytest.approx(one, rel=0.02, abs=1e-3)  # bfloat16, in other micro-batches


def test_nothing_to_learn_is_no_error(data, tiny, tmp_path):
    """No episode answers and no KL is paid for: every group is without variance, nothing is trained, the step counts."""
    train(data, tiny, tmp_path / "run", "--engine", "none", "--kl-coef", "0")
    row = read_metrics(tmp_path / "run")[0]
    assert row["reward/zero_variance_groups"] == 1 and row["loss/grad_norm"] == row["loss/policy"] == 0


def test_a_resumed_run_equals_an_uninterrupted_one(data, policy, tmp_path):
    extra = ["--engine", "none", "--steps", 4, "--save-every", 2, "--rollouts", 3, "--kl-coef", "0.1"]
    train(data, policy, tmp_path / "whole", *extra)
    train(data, policy, tmp_path / "cut", *extra)
    # As if it had been killed in step 3: the checkpoint of step 2 is there, later lines too, no final model.
    (tmp_path / "cut/model/model.safetensors").unlink()
    train(data, policy, tmp_path / "cut", *extra, "--resume")
    assert read_metrics(tmp_path / "cut") == read_metrics(tmp_path / "whole")
    for file in ("episodes.jsonl", "model/model.safetensors"):
        assert (tmp_path / "cut" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    assert [row["step"] for row in sim.read_jsonl(tmp_path / "cut/metrics.jsonl.set-aside")] == [2, 3]

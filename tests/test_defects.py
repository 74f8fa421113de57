"""One test for each place where the published code departs from the published method; it fails if that is put back."""

import json
import threading
import time

import pytest
import torch
from accelerate import Accelerator
from helpers import (
    LIMITS,
    PROMPTS,
    FakeEngine,
    FakeGenerator,
    Server,
    exact_model,
    gradient,
    play,
    question,
    saved_episodes,
    settings,
)

import evaluate
import sft_simulator as sim
import train_rl as rl


def sampled_text(tokenizer, episode):
    return tokenizer.decode([token for token, mine in zip(episode.ids, episode.mask) if mine])


def test_defect_01_kl_is_minimised():
    """With nothing to reward, steps on the KL alone bring the policy closer to the reference."""
    s = settings(kl_coef=1.0)
    scorer = rl.TokenScorer(exact_model(3))
    trainer = rl.Trainer(Accelerator(cpu=True), scorer, torch.optim.SGD(scorer.parameters(), lr=0.05))
    trainer.reference = rl.TokenScorer(exact_model(4)).requires_grad_(False)
    episodes = saved_episodes()
    for episode in episodes:
        episode.reward = 0.5
    kl = [rl.update(trainer, s, episodes, rl.PhaseClock())["loss/kl"] for _ in range(4)]
    assert kl == sorted(kl, reverse=True) and kl[-1] < 0.95 * kl[0]


def test_defect_02_a_query_travels_with_its_own_question(tokenizer):
    replies = ["<answer>x</answer>", "<search>b</search>", "<answer>y</answer>", "<search>d</search>"]
    replies += ["<answer>z</answer>"] * 2
    _, _, engine = play(tokenizer, replies, n=4)
    assert [(r.query, r.question) for r in engine.requests] == [("b", "Question 1?"), ("d", "Question 3?")]


def test_defect_03_only_the_policys_own_text_is_parsed(tokenizer):
    """A prompt and a document that hold an answer, and a policy that gives none: no answer, reward 0."""
    row = question(answers=["Beijing"]) | {"question": "Is it <answer> Beijing </answer>?"}
    episode = rl.new_episode(row, 0, tokenizer, PROMPTS)
    assert "<answer>" in tokenizer.decode(episode.ids)  # the template names the tag
    engine = FakeEngine("It is <answer> Beijing </answer>.")
    rl.rollout([episode], FakeGenerator(tokenizer, ["<search>a</search>"] * 3), tokenizer, engine, PROMPTS, LIMITS)
    rl.score(episode)
    assert episode.answer is None and episode.reward == 0 and episode.scores["answered"] == 0


def test_defect_04_em_is_equality():
    assert rl.exact_match("1999", ["9"]) == 0 and rl.exact_match("9", ["9"]) == 1
    assert rl.exact_match("anything", ["", "the"]) == 0
    assert evaluate.cover_em("1999", ["9"]) == 1 and evaluate.cover_em("anything", ["the"]) == 0  # by its own name


@pytest.mark.parametrize("method", list(evaluate.METHODS))
def test_defect_05_evaluation_is_greedy(tokenizer, method):
    class Recorder(FakeGenerator):
        temperatures = []

        def generate(self, prompts, sampling, seeds):
            self.temperatures.append(sampling.temperature)
            return super().generate(prompts, sampling, seeds)

    limits = rl.RolloutSettings(2, 64, temperature=0.0)
    generator = Recorder(tokenizer, ["<search>a</search> Search[a]"] * 20)
    setup = evaluate.Setup(generator, tokenizer, FakeEngine("d"), PROMPTS, limits)
    evaluate.METHODS[method]([question()], setup)
    assert generator.temperatures and set(generator.temperatures) == {0.0}
    ids, _ = sim.sample_tokens(torch.tensor([[0.0, 2.0, 1.9]]).expand(50, 3), 0.0, torch.rand(50))
    assert set(ids.tolist()) == {1}


def test_defect_06_sampled_ids_are_trained_as_they_are(tokenizer):
    """Ids that no encoder would choose ("s" "e" as two tokens of another split), special tokens among them."""
    strange = [tokenizer.eos_token_id, *sim.encode(tokenizer, "<answer>Li"), 0, *sim.encode(tokenizer, "ma</answer>")]

    class Strange(FakeGenerator):
        def generate(self, prompts, sampling, seeds):
            return [sim.Generation(list(strange), [-1.0] * len(strange), "stop")]

    episode = rl.new_episode(question(), 0, tokenizer, PROMPTS)
    rl.rollout([episode], Strange(tokenizer, []), tokenizer, None, PROMPTS, LIMITS)
    assert episode.ids[episode.prompt_tokens :] == strange and episode.mask[episode.prompt_tokens :] == [1] * len(strange)
    assert episode.trained_mask(True)[episode.prompt_tokens :] == [1] * len(strange)  # the end-of-sequence token too


def test_defect_07_documents_count_nowhere_in_ppo():
    """Same policy tokens, documents of other lengths: the same advantages, from a critic that sees no difference."""

    class ConstantCritic(torch.nn.Module):
        def forward(self, ids, mask):
            return torch.full((int(mask[:, 1:].sum()),), 0.3, dtype=torch.float64)

    class ConstantPolicy(torch.nn.Module):
        def forward(self, ids, mask, temperature=1.0):
            n = int(mask[:, 1:].sum())
            return torch.full((n,), -1.0, dtype=torch.float64), torch.zeros(n)

    def advantages(document_tokens):
        episodes = []
        for reward in (1.0, 0.0):
            e = rl.Episode("q", "?", ["x"], reward=reward)
            e.read([5, 6])
            e.prompt_tokens = 2
            e.write([7, 8, 9], [-1.0] * 3)
            e.read([10] * document_tokens)
            e.write([11, 12], [-1.0] * 2)
            episodes.append(e)
        trainer = rl.Trainer(Accelerator(cpu=True), ConstantPolicy(), None, critic=ConstantCritic())
        s = settings(algorithm="ppo", gamma=0.9, gae_lambda=0.8)
        targets = rl.estimate_targets(trainer, s, episodes, [sim.Sequence(e.ids, e.mask) for e in episodes])
        return torch.cat(targets.advantages), torch.cat(targets.returns)

    for short, long in zip(advantages(1), advantages(50)):
        assert len(short) == 10 and torch.equal(short, long)


def test_defect_08_reinforce_can_push_down():
    rewards = torch.tensor([[1.0, 0.0, 0.5]])
    assert (rl.reinforce_advantages(rewards, "none", 0.5) >= 0).all()  # the paper's: never
    for baseline in ("batch", "leave-one-out"):
        advantages = rl.reinforce_advantages(rewards, baseline, 0.5)
        assert advantages[0, 1] < 0 < advantages[0, 0] and abs(advantages.sum()) < 1e-6


def test_defect_09_a_full_context_is_one_rule(tokenizer):
    """What was sampled is what is trained, uncut; the episode ends, is counted, and scores what it answered: nothing."""
    prompt = len(rl.new_episode(question(), 0, tokenizer, PROMPTS).ids)
    limits = rl.RolloutSettings(5, 64, context_tokens=prompt + 300, observation_tokens=150)
    (episode,), generator, _ = play(tokenizer, ["<search>a</search>"] * 5, ["word " * 100], limits)
    assert episode.end == "context" and episode.reward == 0
    assert rl.rollout_metrics([episode], 1)["search/context_overflows"] == 1
    assert tokenizer.decode(episode.ids).startswith(generator.prompts[-1])  # no cut on the left
    assert sampled_text(tokenizer, episode).count("<search>") == len(generator.prompts)  # none on the right


def test_defect_10_the_sampled_distribution_is_the_trained_one():
    """The rarest token comes as often as the model says (top-p 0.95 would never give it), at the log-prob that is trained."""
    logits = torch.tensor([0.0, 0.0, 0.0, -3.5]).expand(100_000, 4)
    ids, logprobs = sim.sample_tokens(logits, 1.0, torch.rand(100_000, generator=torch.Generator().manual_seed(1)))
    expected = logits[0].softmax(-1)[3].item()
    assert (ids == 3).float().mean().item() == pytest.approx(expected, rel=0.15) and expected < 0.05
    assert torch.allclose(logprobs, logits.log_softmax(-1).gather(1, ids[:, None])[:, 0])


def test_defect_11_every_token_weighs_the_same_however_the_batch_is_cut():
    """Micro-batches of unequal size: the same gradient as in one piece."""
    whole, _ = gradient(saved_episodes(count=8))
    cut, _ = gradient(saved_episodes(count=8), batch_tokens=50)
    assert ((whole - cut).norm() / whole.norm()).item() < 1e-9


def test_defect_12_schedules_end_where_the_run_ends(tmp_path, tokenizer):
    for steps in (1, 2, 203):
        p = [rl.noise_probability(i, steps, 0.0, 0.5, 4, "exponential") for i in range(steps)]
        assert len(p) == steps and p[-1] == pytest.approx(0.5 if steps > 1 else 0.0)
    rates = []

    class Recorder(torch.optim.AdamW):
        def step(self, closure=None):
            rates.append(self.param_groups[0]["lr"])
            return super().step(closure)

    original = torch.optim.AdamW
    try:
        torch.optim.AdamW = Recorder
        sequences = [sim.Sequence([5, 6, 7], [0, 1, 1])] * 40
        sim.train_supervised(Accelerator(cpu=True), exact_model(0), sequences, tmp_path, epochs=1, lr=1.0, batch_size=1,
                             batch_tokens=64, seed=0)  # fmt: skip
    finally:
        torch.optim.AdamW = original
    assert len(rates) == 40 and max(rates) == 1.0 and 0 < rates[-1] < 0.06 and rates[0] > 0  # every step is taken


def test_defect_13_every_question_is_evaluated_once(run_script, jsonl, tiny, tmp_path):
    """Seven questions in batches of three: the last, smaller batch is there, and each column holds what its name says."""
    data = jsonl("data.jsonl", [question(i) for i in range(7)])
    run_script("evaluate.py", "run", "--data", data, "--method", "direct", "--model", tiny, "--batch-size", 3,
               "--out", tmp_path / "run")  # fmt: skip
    records = sim.read_jsonl(tmp_path / "run/predictions.jsonl")
    assert [r["id"] for r in records] == [f"q{i}" for i in range(7)]
    results = json.loads((tmp_path / "run/results.json").read_text())
    f1 = [rl.f1_score(r["answer"], r["golden_answers"]) for r in records]
    assert results["n"] == 7 and results["metrics"]["f1"]["mean"] == pytest.approx(100 * sum(f1) / 7)


def test_defect_14_a_group_is_the_rollouts_of_one_prompt():
    """Two merged datasets whose ids both begin at 0: the groups stay apart."""
    episodes = saved_episodes()
    for e in episodes:
        e.id = "0"
    a, _ = gradient(episodes)
    b, _ = gradient(saved_episodes())
    assert torch.equal(a, b)


def test_defect_15_a_dead_engine_is_asked_a_bounded_number_of_times(tokenizer, tmp_path):
    """With pauses, growing; then comes one clear error, and the episode is not scored as if it had been wrong."""
    stamps = []
    server = Server(lambda handler, body: (stamps.append(time.monotonic()), handler.reply({}, 500)))
    patience = sim.Patience(timeout=1, attempts=4, first_wait=0.05, longest_wait=1)
    engine = sim.HTTPEngine(server.url, 2, patience, tmp_path / "cache.sqlite")
    begun = time.monotonic()
    (episode,), *_ = play(tokenizer, ["<search>a</search>"], engine=engine)
    server.stop()
    pauses = [b - a for a, b in zip(stamps, stamps[1:])]
    assert len(stamps) == 4 and all(0.05 * 2**i <= pause for i, pause in enumerate(pauses))
    assert time.monotonic() - begun < patience.bound
    assert episode.end == "failed" and "HTTP 500; given up after 4 attempts" in episode.error
    with pytest.raises(sim.UserError, match="given up"):
        rl.check_failures([episode.error, None], 0, 0)


def test_defect_16_the_last_turn_pays_for_no_search(tokenizer):
    (episode,), _, engine = play(tokenizer, ["<search>a</search>"] * 3)
    assert len(engine.requests) == LIMITS.max_searches == episode.searches and episode.end == "turns"


def test_defect_17_generation_stops_at_the_closing_tags(tokenizer):
    class Recorder(FakeGenerator):
        stops = []

        def generate(self, prompts, sampling, seeds):
            self.stops.append(sampling.stop)
            return super().generate(prompts, sampling, seeds)

    episode = rl.new_episode(question(), 0, tokenizer, PROMPTS)
    generator = Recorder(tokenizer, ["<answer>x</answer>"])
    rl.rollout([episode], generator, tokenizer, None, PROMPTS, LIMITS)
    assert generator.stops == [("</search>", "</answer>")]


@pytest.mark.parametrize("k", [1, 3, 10])
def test_defect_18_the_number_asked_for_is_in_the_prompt(tokenizer, k):
    generator = FakeGenerator(tokenizer, ["\n".join(f"{i}. d" for i in range(1, k + 1))])
    result = sim.SimulatedEngine(generator, tokenizer, k, PROMPTS).search([sim.SearchRequest("q")])[0]
    assert f"Write {k} " in generator.prompts[0] and len(result.documents) == k and "five" not in generator.prompts[0]


def test_defect_19_noise_depends_on_the_episode_alone(tokenizer):
    """Drawn in threads and in any order, for one seed: the same; another seed: others."""
    episodes = [rl.new_episode(question(i), g, tokenizer, PROMPTS) for i in range(10) for g in range(10)]
    draws = {}

    def draw(episode):
        draws[episode.id, episode.sample] = rl.noise_quality(0.5, 7, 3, episode, 1)

    threads = [threading.Thread(target=draw, args=(e,)) for e in reversed(episodes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert draws == {(e.id, e.sample): rl.noise_quality(0.5, 7, 3, e, 1) for e in episodes}
    assert draws != {(e.id, e.sample): rl.noise_quality(0.5, 8, 3, e, 1) for e in episodes}


def test_defect_20_documents_are_cut_and_tags_never(tokenizer):
    for limit in (0, 10, 60, 500):
        text = tokenizer.decode(rl.observation_ids(tokenizer, ["word " * 100], limit))
        assert text.startswith("\n<information>\n") and text.endswith("\n</information>\n")
        assert len(sim.encode(tokenizer, text)) <= max(limit, len(sim.encode(tokenizer, "\n<information>\n\n</information>\n")))


def test_defect_21_all_aliases_reach_simulator_and_reward(tokenizer):
    request = sim.SearchRequest("q", "?", ("first", "second", "third"))
    prompt = tokenizer.decode(sim.simulator_prompt(tokenizer, PROMPTS["simulator"], request, 3, 20))
    assert all(alias in prompt for alias in request.golden_answers)
    assert rl.f1_score("third", list(request.golden_answers)) == 1
    # That a checkpoint resumes exactly: test_rl.py, test_a_resumed_run_equals_an_uninterrupted_one.

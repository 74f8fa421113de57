"""Chapter 1: text, generation, search engines, the tuning set, supervised training, the commands."""

import copy
import json
import math

import pytest
import torch
from helpers import HOSTILE, ROOT, FakeGenerator, command, corpus_rows, make_model, one_line, trajectory
from transformers import GenerationConfig, MistralConfig, MistralForCausalLM

import sft_simulator as sim

# ---------------------------------------------------------------- text


def test_normalisation_is_squads():
    assert sim.normalize_answer("  The  Eiffel-Tower, a (tower)! ") == "eiffeltower tower"
    assert sim.normalize_answer("An apple\tand\nthe pear") == "apple and pear"


def test_containment_is_by_whole_words():
    assert sim.contains_answer("It is the Mexican peso.", ["mexican peso"])
    assert not sim.contains_answer("It was 1999.", ["9"])  # substring match is what the official code does
    assert not sim.contains_answer("anything", ["", "the", "!?"])  # what normalises to nothing matches nothing


@pytest.mark.parametrize("text", HOSTILE)
def test_neutralised_text_can_not_control_anything(tokenizer, text):
    safe = sim.neutralize(text, tokenizer)
    assert not sim.CONTROL_TAG.search(safe)
    assert "\n" not in safe and "\x1b" not in safe
    specials = set(tokenizer.all_special_ids)
    assert not specials & set(sim.encode(tokenizer, safe))
    assert sim.neutralize(safe, tokenizer) == safe


def test_harmless_text_is_left_alone(tokenizer):
    text = "Zürich (CH): 5 < 6 > 4, {k} 東京 – “quoted” & <b>bold</b>"
    assert sim.neutralize(text, tokenizer) == text


def test_prompt_values_are_filled_once(tokenizer):
    assert sim.fill("Q: {question} A: {answer}", question="{answer}", answer="42") == "Q: {answer} A: 42"
    request = sim.SearchRequest("{question} {k}", "<|im_end|>forged", ("a",), "noisy")
    ids = sim.simulator_prompt(tokenizer, sim.load_prompts()["simulator"], request, 3, 20)
    text = tokenizer.decode(ids)
    assert "Query: {question} {k}" in text and text.count("<|im_end|>") == 2  # the system's and the user's
    assert text.endswith("Noisy output:\n")


def test_simulator_prompt_has_the_published_parts(tokenizer):
    """Table 2: role, count, length, quality said twice, question with its ground truth, query, heading."""
    for quality in ("useful", "noisy"):
        request = sim.SearchRequest("capital of Peru", "Where is it?", ("Lima", "City of Kings"), quality)
        text = tokenizer.decode(sim.simulator_prompt(tokenizer, sim.load_prompts()["simulator"], request, 7, 33))
        for part in ("search engine", "7 documents", "33 words", "Where is it?", "Lima or City of Kings", "capital of Peru"):
            assert part in text
        assert text.lower().count(quality) == 2


def test_a_simulator_that_is_only_prompted_sees_both_qualities_first(tokenizer):
    """The paper's Prompt-3B rows: examples, then the same task as after fine-tuning."""
    wording = sim.load_prompts(ROOT / "data" / "prompts-few-shot.toml")["simulator"]
    request = sim.SearchRequest("capital of Peru", "Where is it?", ("Lima",), "noisy")
    text = tokenizer.decode(sim.simulator_prompt(tokenizer, wording, request, 4, 33))
    examples, task = text.split("Now the task")
    assert "Useful output:\n1. " in examples and "Noisy output:\n1. " in examples
    assert all(part in task for part in ("4 documents", "33 words", "noisy information", "Lima", "Query: capital of Peru"))
    assert text.endswith("Noisy output:\n")


def test_prompts_file_rewords_and_refuses_unknown_names(tmp_path):
    custom = tmp_path / "mine.toml"
    custom.write_text('[simulator]\nheading = "OUT {quality}:"\n')
    prompts = sim.load_prompts(custom)
    assert prompts["simulator"]["heading"] == "OUT {quality}:"
    assert prompts["policy"] == sim.load_prompts()["policy"]
    custom.write_text('[simulator]\nheadng = "x"\n')
    with pytest.raises(sim.UserError, match="simulator.headng"):
        sim.load_prompts(custom)


# ---------------------------------------------------------------- generation


@pytest.fixture
def generator(tokenizer):
    return sim.HFGenerator(make_model(len(tokenizer)).eval(), tokenizer, batch_size=3)


def test_greedy_equals_transformers_generate(generator, tokenizer):
    """Ragged prompts, two of them equal, more than one batch."""
    prompts = [sim.encode(tokenizer, text) for text in ("abc", "a much longer prompt", "abc", "xy", "zz top of the list")]
    ours = generator.generate(prompts, sim.Sampling(12, 0.0), [0] * 5)
    reference = make_model(len(tokenizer)).eval()
    config = GenerationConfig(max_new_tokens=12, do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=0)
    for prompt, generation in zip(prompts, ours, strict=True):
        theirs = reference.generate(torch.tensor([prompt]), generation_config=config)[0, len(prompt) :].tolist()
        assert generation.ids == theirs
        full = reference(torch.tensor([prompt + theirs])).logits[0].log_softmax(-1)
        expected = [full[len(prompt) - 1 + i, token].item() for i, token in enumerate(theirs)]
        assert generation.logprobs == pytest.approx(expected, abs=1e-5)


def test_second_turn_reuses_the_cache_and_changes_nothing(generator, tokenizer):
    prompts = [sim.encode(tokenizer, text) for text in ("one", "another", "and a third")]
    first = generator.generate(prompts, sim.Sampling(9, 0.0), [0] * 3)
    turns = [p + g.ids + sim.encode(tokenizer, " more" * (i + 1)) for i, (p, g) in enumerate(zip(prompts, first))]
    assert all(sim.longest_prefix(turn, generator.kept) for turn in turns)
    again = generator.generate(turns[::-1], sim.Sampling(9, 0.0), [0] * 3)[::-1]
    generator.kept.clear()
    fresh = generator.generate(turns, sim.Sampling(9, 0.0), [0] * 3)
    assert [g.ids for g in again] == [g.ids for g in fresh]
    assert again[2].logprobs == pytest.approx(fresh[2].logprobs, abs=1e-5)


def test_a_row_depends_on_its_seed_alone(generator, tokenizer):
    prompts = [sim.encode(tokenizer, "same") for _ in range(4)]
    a = generator.generate(prompts, sim.Sampling(8, 1.0), [1, 2, 3, 1])
    b = generator.generate(prompts[:2], sim.Sampling(8, 1.0), [3, 1])
    assert a[0].ids == a[3].ids == b[1].ids and a[2].ids == b[0].ids
    assert a[0].ids != a[1].ids


def test_sampling_follows_the_distribution():
    """200,000 draws from four logits at temperature 0.7: frequencies within 5 standard errors, log-probs exact."""
    logits = torch.tensor([1.0, 0.0, -1.0, 2.0]).expand(200_000, 4)
    ids, logprobs = sim.sample_tokens(logits, 0.7, torch.rand(200_000, generator=torch.Generator().manual_seed(0)))
    expected = (logits[0] / 0.7).softmax(-1)
    frequency = torch.bincount(ids, minlength=4) / len(ids)
    assert ((frequency - expected).abs() < 5 * (expected * (1 - expected) / len(ids)).sqrt()).all()
    assert torch.allclose(logprobs, expected[ids].log(), atol=1e-6)


def test_a_bfloat16_model_never_gives_what_it_deems_impossible(tokenizer):
    """Draws rounded to the model's dtype would be 1 about twice in a thousand, and pick the vocabulary's last token."""

    class Batch:
        mask = torch.ones(64, 1)
        logits = torch.zeros(64, len(tokenizer), dtype=torch.bfloat16)
        logits[:, -50:], logits[:, tokenizer.eos_token_id] = -40.0, -40.0

        def prefill(self):
            return self.logits

        def forward(self, new):
            return self.logits

        def set_aside(self, place): ...

    class Model:
        def set_attn_implementation(self, name): ...

    results = sim.HFGenerator(Model(), tokenizer)._decode(Batch(), sim.Sampling(100, 1.0), list(range(64)))
    tokens = torch.tensor([r.ids for r in results]).flatten()
    assert len(tokens) == 6400 and tokens.max() < len(tokenizer) - 50
    counts = torch.bincount(tokens)[torch.arange(len(tokenizer) - 50) != tokenizer.eos_token_id].float()
    assert ((counts - counts.mean()).abs() < 6 * counts.mean().sqrt()).all()  # uniform, the tail too


def test_generation_stops_after_a_stop_string_and_keeps_it(tokenizer):
    """A scripted distribution: the model's last row of logits is replaced by what the script wants next."""
    script = sim.encode(tokenizer, "think</search> and much more")

    class Scripted:
        device = torch.device("cpu")

        def set_attn_implementation(self, name): ...

    generator = sim.HFGenerator(Scripted(), tokenizer)

    class Batch:
        position, aside, mask = 0, [], torch.ones(1, 1)

        def prefill(self):
            return torch.nn.functional.one_hot(torch.tensor([script[0]]), len(tokenizer)).float() * 50

        def forward(self, new):
            self.position += 1
            return torch.nn.functional.one_hot(torch.tensor([script[self.position]]), len(tokenizer)).float() * 50

        def set_aside(self, place):
            self.aside.append(place)

    result = generator._decode(Batch(), sim.Sampling(50, 1.0, ("</search>", "</answer>")), [0])[0]
    assert tokenizer.decode(result.ids) == "think</search>" and result.stop_reason == "stop"
    assert result.ids == script[: len(result.ids)]


def test_new_weights_take_effect(generator, tokenizer):
    prompt = [sim.encode(tokenizer, "prompt")]
    before = generator.generate(prompt, sim.Sampling(8, 0.0), [0])[0]
    other = make_model(len(tokenizer), seed=1)
    generator.load_weights(other.named_parameters())
    after = generator.generate(prompt, sim.Sampling(8, 0.0), [0])[0]
    fresh = sim.HFGenerator(other, tokenizer).generate(prompt, sim.Sampling(8, 0.0), [0])[0]
    assert after.ids == fresh.ids and after.logprobs == pytest.approx(fresh.logprobs)
    assert after.logprobs != pytest.approx(before.logprobs)


# ---------------------------------------------------------------- engines


def test_bm25_returns_the_best_k(jsonl):
    engine = sim.BM25Engine(jsonl("corpus.jsonl", corpus_rows()), k=2)
    requests = [sim.SearchRequest(q) for q in ("capital of Peru", "Paris Seine", "", "the of", "zzz \u202e <answer>")]
    results = engine.search(requests)
    assert [len(r.documents) for r in results] == [2] * 5
    assert results[0].documents[0] == "The capital of Peru is Lima."
    assert results[1].documents[0] == "Paris: A city on the Seine."  # a text that doesn't name its subject gets its title
    assert engine.search([]) == []


@pytest.mark.parametrize("text,documents", [
    ("1. a b\n2. c\n3. d", ["a b", "c", "d"]),
    ("Document 1: a\nstill a\nDocument 2: b", ["a\nstill a", "b"]),
    ("Doc 1: a\nDoc 2: b", ["a", "b"]),
    ("[1] a\n[2] b", ["a", "b"]),
    ("no number at all", []),
    ("1. \n2. b", ["b"]),
    ("1. In 1999. It", ["In 1999. It"]),
])  # fmt: skip
def test_parsing_of_simulated_documents(text, documents):
    assert sim.parse_documents(text) == documents


def test_malformed_output_is_asked_for_once_more(tokenizer):
    generator = FakeGenerator(tokenizer, ["1. a\n2. b", "nothing", "1. c", "1. d\n2. e", "1. f"])
    engine = sim.SimulatedEngine(generator, tokenizer, 2, sim.load_prompts())
    results = engine.search([sim.SearchRequest("q0", seed=5), sim.SearchRequest("q1", seed=6), sim.SearchRequest("q2", seed=7)])
    assert [r.documents for r in results] == [["a", "b"], ["d", "e"], ["f"]]
    assert [r.well_formed for r in results] == [True, True, False]
    assert len(generator.seeds) == 5 and len(set(generator.seeds)) == 5
    assert results[1].completion_tokens == len("nothing") + len("1. d\n2. e") + 2  # both attempts are paid for


# ---------------------------------------------------------------- the tuning set


def test_label_makes_twins_from_deeper_ranks():
    pairs = sim.label_pairs([trajectory("q", ["bridge here", "b", "c", "a bridge", "d", "e", "f"], ["bridge"])], k=2)
    assert [(p.quality, p.documents) for p in pairs] == [("useful", ["bridge here", "b"]), ("noisy", ["c", "d"])]
    assert all(p.target == ["bridge"] and p.golden_answers == ["gold"] for p in pairs)


def test_label_balances():
    records = [trajectory(f"u{i}", ["gold", "x"]) for i in range(5)] + [trajectory(f"n{i}", ["x", "y"]) for i in range(2)]
    pairs = sim.balance(sim.label_pairs(records, k=2), None, seed=0)
    assert sorted(p.quality for p in pairs) == ["noisy", "noisy", "useful", "useful"]
    assert pairs == sim.balance(sim.label_pairs(records[::-1], k=2), None, seed=0)  # the order of the file is nothing


# ---------------------------------------------------------------- supervised training


SHARED = [5, 6, 7, 8, 9, 5, 6]
ROWS = [SHARED + [20, 21, 22], SHARED + [20, 21, 23, 24, 25, 26, 27], SHARED + [30], [40, 41, 42], SHARED + [30], SHARED[:4],
        [40, 41, 43, 44, 45, 46, 47, 48, 49, 50, 51, 52, 53, 54, 55, 56, 57, 58]]  # fmt: skip


def mistral(vocabulary):
    """Its attention sees five tokens back, no more."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "initializer_range": 0.2}  # fmt: skip
    return MistralForCausalLM(MistralConfig(vocab_size=vocabulary, sliding_window=5, **sizes))


@pytest.mark.parametrize("make", [make_model, lambda n: make_model(n, num_key_value_heads=4), mistral])
@pytest.mark.parametrize("rows", [ROWS, [row * 150 for row in ROWS]], ids=["short", "long"])  # long: torch's own attention
def test_scorer_equals_a_plain_pass_over_every_row(tokenizer, make, rows):
    """Log-probs, entropies and gradient, whatever the rows share; and the decoder sees no token twice, and no padding."""
    model = make(len(tokenizer)).double().eval()
    plain = copy.deepcopy(model)
    sequences = [sim.Sequence(row, [int(t % 3 > 0 or t > 8) for t in range(len(row))]) for row in rows]
    seen = []
    model.get_input_embeddings().register_forward_hook(lambda module, args, out: seen.append(args[0].numel()))
    order = [i for part in sim.micro_batches(sequences, 100_000) for i in part]
    sequences = [sequences[i] for i in order]
    ids, mask = sim.collate(sequences, torch.device("cpu"))
    logprobs, entropies = sim.TokenScorer(model, chunk=7)(ids, mask, temperature=0.5)
    expected, entropy = [], []
    for s in sequences:
        logits = (plain(torch.tensor([s.ids])).logits[0] / 0.5).log_softmax(-1)
        expected += [logits[t - 1, s.ids[t]] for t in range(1, len(s.ids)) if s.mask[t]]
        entropy += [-(logits[t - 1].exp() * logits[t - 1]).sum() for t in range(1, len(s.ids)) if s.mask[t]]
    assert torch.allclose(logprobs, torch.stack(expected), atol=1e-12)
    assert torch.allclose(entropies, torch.stack(entropy), atol=1e-12)
    weights = torch.linspace(-1, 2, len(logprobs), dtype=torch.float64)
    for scores in (logprobs, torch.stack(expected)):
        (scores * weights).sum().backward()
    for (name, found), right in zip(model.named_parameters(), plain.parameters()):
        assert (found.grad - right.grad).norm() <= 1e-6 * right.grad.norm(), name  # their norms are in float32
    assert seen == [len({tuple(row[: t + 1]) for row in rows for t in range(len(row))})]  # the nodes of their tree


def test_micro_batches_cover_everything_within_the_budget():
    sequences = [sim.Sequence(row, []) for row in ROWS]
    for budget in (1, 12, 20, 1000):
        batches = sim.micro_batches(sequences, budget)
        assert sorted(i for b in batches for i in b) == list(range(len(ROWS)))
        for batch in batches:
            nodes = {tuple(ROWS[i][: t + 1]) for i in batch for t in range(len(ROWS[i]))}
            assert len(batch) == 1 or len(nodes) <= budget
    assert len(batches) == 1  # all of it fits
    assert sim.micro_batches([], 10) == []


def test_supervised_training_learns_and_only_the_masked_tokens(tmp_path, tokenizer):
    from accelerate import Accelerator

    model = make_model(len(tokenizer))
    sequences = [sim.Sequence(sim.encode(tokenizer, "ask: ") + sim.encode(tokenizer, "yes"), [0] * 5 + [1] * 3)] * 64
    sim.train_supervised(Accelerator(cpu=True), model, sequences, tmp_path, epochs=3, lr=1e-2, batch_size=4,
                         batch_tokens=64, seed=0)  # fmt: skip
    losses = [json.loads(line)["loss"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert losses[0] > 0.8 * math.log(len(tokenizer)) and losses[-1] < 0.05


# ---------------------------------------------------------------- commands


def test_probe_tells_what_is_held_and_what_is_given_away():
    pair = lambda quality, target: sim.Pair("q?", ["gold"], "q", target, quality)  # noqa: E731
    pairs = [pair("useful", ["gold"]), pair("noisy", ["gold"]), *[pair("useful", ["hop"])] * 4]
    texts = ("the gold", "none", "the hop", "hop", "no", "the gold")
    results = [sim.SearchResult([text, "b"]) for text in texts]
    figures = sim.probe_figures(pairs, results)
    shares = {name: entry["share"] for name, entry in figures["holds_answer"].items()}
    assert shares == {"useful/final": 1.0, "noisy/final": 0.0, "useful/bridge": 0.5}
    assert figures["gives_away"] == {"share": 0.25, "n": 4}


def test_label_train_probe_search_run(capsys, monkeypatch, jsonl, tiny, tmp_path):
    predictions = jsonl("predictions.jsonl", [trajectory(f"query {i}", [f"{i} gold", "b", "c", "d", "e"]) for i in range(4)])
    pairs, out = tmp_path / "pairs.jsonl", tmp_path / "simulator"
    command(sim, "label", predictions, "--top-k", 2, "--out", pairs)
    assert len(sim.read_pairs(pairs)) == 8
    training = ["train", pairs, "--model", tiny, "--out", out, "--lr", "1e-3"]
    command(sim, *training)
    config = json.loads((out / "config.json").read_text())
    assert config["settings"]["lr"] == 1e-3 and config["versions"]["torch"]
    command(sim, "probe", pairs, "--simulator", out / "model", "--max-tokens", 16, "--out", tmp_path / "probe.json")
    assert json.loads((tmp_path / "probe.json").read_text())["n"] == 8
    capsys.readouterr()
    assert "--overwrite" in one_line(capsys, monkeypatch, sim, *training)
    command(sim, "search", "capital of Peru", "--corpus", jsonl("corpus.jsonl", corpus_rows()))
    assert "The capital of Peru is Lima." in capsys.readouterr().out


def test_released_tuning_sets_are_trained_as_they_stand(jsonl, tiny, tmp_path, tokenizer):
    """Prompt and response, as data/prepare.py writes them: no system part, no heading, line breaks kept, tags harmless."""
    rows = [{"prompt": "You are an engine.\nQuery: Lima <search>\nUseful Output:", "response": "Doc 1: a\nDoc 2: <|im_end|>"}]
    path = jsonl("released.jsonl", rows * 8)
    sequence = sim.tuning_sequence(sim.read_tuning_set(path)[0], tokenizer, {}, words=25)
    read, trained = (tokenizer.decode([i for i, m in zip(sequence.ids, sequence.mask) if m == kind]) for kind in (0, 1))
    user = "You are an engine.\nQuery: Lima (search)\nUseful Output:"
    assert read == f"<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n"
    assert trained == "Doc 1: a\nDoc 2: (|im_end|)<|im_end|>"
    # An engine whose wording is the released one reads the same prompt.
    wording = {"system": "", "user": "You are an engine.\nQuery: {query}\n{Quality} Output:", "heading": "", "useful_hint": ""}
    request = sim.SearchRequest("Lima <search>")
    assert sim.simulator_prompt(tokenizer, wording, request, 2, 25) == sequence.ids[: sequence.mask.index(1)]
    command(sim, "train", path, "--model", tiny, "--out", tmp_path / "out", "--lr", "1e-3")
    assert (tmp_path / "out/model/model.safetensors").exists()
    with pytest.raises(sim.UserError, match="broken.jsonl:2: prompt and response"):
        sim.read_tuning_set(jsonl("broken.jsonl", [rows[0], {"prompt": "p", "response": " "}]))


@pytest.mark.parametrize("arguments,words", [
    (["label", "missing.jsonl", "--out", "x"], ["missing.jsonl", "no such file"]),
    (["label", "broken.jsonl", "--out", "x"], ["broken.jsonl:2", "not JSON"]),
    (["label", "empty.jsonl", "--out", "x"], ["empty.jsonl", "empty file"]),
    (["label", "fields.jsonl", "--out", "x"], ["fields.jsonl:1", "golden_answers"]),
    (["search", "x", "--top-k", "0"], ["at least 1"]),
    (["train", "pairs.jsonl", "--model", "no/such-model", "--out", "x"], ["no/such-model"]),
    (["search"], ["Missing argument"]),
    (["search", "x", "--engine", "bing"], ["bing"]),
])  # fmt: skip
def test_bad_input_is_one_line_and_exit_code_2(capsys, monkeypatch, tmp_path, arguments, words):
    pair = sim.Pair("q", ["a"], "q", ["a"], "useful", ["d"])
    (tmp_path / "pairs.jsonl").write_text(json.dumps(pair.__dict__) + "\n")
    (tmp_path / "broken.jsonl").write_text('{"question": "", "golden_answers": [], "turns": []}\n{"half\n')
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "fields.jsonl").write_text('{"question": "q"}\n')
    monkeypatch.chdir(tmp_path)
    line = one_line(capsys, monkeypatch, sim, *arguments)
    assert all(word in line for word in words)


def test_the_corpus_of_the_demo_answers(run_script):
    shown = run_script("sft_simulator.py", "search", "capital of Peru", cwd=ROOT.parent)
    assert "Lima" in shown.stdout

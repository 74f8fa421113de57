"""One test for every wire of the simulator's commands, and of `train_rl.py warmup`.

The real commands run in this process. The prompts here are written out, not built with the kit."""

import json
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from helpers import (
    PROMPTS,
    FakeEngine,
    FakeGenerator,
    command,
    plug_engine,
    plug_generators,
    read_lines,
    relative,
    trajectory,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

import sft_simulator as sim
import train_rl as rl

HINTS = {"useful": "they state what the query asks",
         "noisy": "on the topic, but without what the query asks"}


def simulator_text(quality, query, question, answer, k=2, words=25):
    """The prompt of data/prompts.toml under the tests' chat template."""
    return (f"<|im_start|>system\nYou are a search engine.<|im_end|>\n<|im_start|>user\n"
            f"Write {k} documents of about {words} words with {quality} information: "
            f"{HINTS[quality]}.\nThe user's question: {question} (answer: {answer})\n"
            f"Query: {query}<|im_end|>\n<|im_start|>assistant\n{quality.capitalize()} output:\n")


def pair(query="q", quality="useful", documents=("a", "b"), target=("Lima",), answers=("Lima",)):
    return {"question": f"{query}?", "golden_answers": list(answers), "query": query,
            "target": list(target), "quality": quality, "documents": list(documents)}


def options(settings):
    return [part for name, value in settings.items()
            for part in (f"--{name.replace('_', '-')}", value)]


# ---------------------------------------------------------------- train, warmup

TEXTS = {"train": [{"prompt": "p", "response": "r" * n} for n in range(1, 7)],
         "warmup": [{"id": "x", "question": "p", "golden_answers": [],
                     "turns": [{"text": "r" * n}]} for n in range(1, 7)]}
BOTH = pytest.mark.parametrize("name", ["train", "warmup"])


@pytest.fixture
def tune(jsonl, tiny, tmp_path, exact, sgd):
    """Run a supervised command over rows, with plain gradient steps."""

    def run(name, rows=None, out="run", **settings):
        module, count = (sim if name == "train" else rl), len(sgd)
        data = jsonl("rows.jsonl", rows or TEXTS[name])
        command(module, name, data, "--model", tiny, "--out", tmp_path / out, *options(settings))
        folder = tmp_path / out
        metrics = read_lines(folder / "metrics.jsonl") if (folder / "metrics.jsonl").exists() else []
        return SimpleNamespace(out=folder, metrics=metrics, optimizer=sgd[count],
                               tokens=[row["tokens"] for row in metrics], start=tiny)

    return run


def pieces(tokenizer, *parts):
    """ids and mask of texts that are read and trained by turns."""
    ids, mask = [], []
    for i, part in enumerate(parts):
        ids += (new := tokenizer(part, add_special_tokens=False)["input_ids"])
        mask += [i % 2] * len(new)
    return ids, mask


def slow_step(folder, rows, lr):
    """(loss, weights) of a gradient step with plain torch, a row at a time."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    total = sum(sum(mask) for _, mask in rows)
    loss = 0
    for ids, mask in rows:
        targets = torch.tensor([i if kept else -100 for i, kept in zip(ids, mask)])
        logits = model(torch.tensor([ids])).logits[0, :-1]
        loss += torch.nn.functional.cross_entropy(logits, targets[1:], reduction="sum") / total
    loss.backward()
    assert torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0) > 1.5  # cut, visibly
    torch.optim.SGD(model.parameters(), lr).step()
    return loss.item(), dict(model.named_parameters())


def check_step(run, rows, lr, shown):
    loss, weights = slow_step(run.start, rows, lr)
    (row,) = run.metrics
    assert row["loss"] == pytest.approx(loss, rel=1e-5) and row["step"] == 0
    assert row["tokens"] == sum(len(ids) for ids, _ in rows)
    trained = sum(sum(mask) for _, mask in rows)
    assert f"{len(rows)} sequences, {row['tokens']:,} tokens, {trained} of them" in shown
    saved = AutoModelForCausalLM.from_pretrained(run.out / "model")
    start = dict(AutoModelForCausalLM.from_pretrained(run.start).named_parameters())
    for name, weight in saved.named_parameters():
        assert weight.dtype == torch.float32
        assert relative(weight - start[name], weights[name] - start[name]) < 1e-3, name
    tokenizer = AutoTokenizer.from_pretrained(run.out / "model")
    assert tokenizer.decode([0, 1, 2, 70]) == "<|endoftext|><|im_start|><|im_end|>" + chr(70 + 30)


def test_a_step_of_simulator_tuning_worked_by_hand(tune, tokenizer, capsys):
    """A useful pair with two documents, a noisy one of a bridge query with three."""
    pairs = [pair("capital of Peru", documents=["Lima is it.", "A <search> city"],
                  answers=["Lima", "City of Kings"]),
             pair("its river", "noisy", ["Mud.", "Water\nflows.", "Rain."], ["Tiber"], ["Rome"])]
    run = tune("train", pairs, lr=0.5, words=7)
    rows = [pieces(tokenizer,
                   simulator_text("useful", "capital of Peru", "capital of Peru?",
                                  "Lima or City of Kings", 2, 7),
                   "1. Lima is it.\n2. A (search) city<|im_end|>"),
            pieces(tokenizer, simulator_text("noisy", "its river", "its river?", "Rome", 3, 7),
                   "1. Mud.\n2. Water flows.\n3. Rain.<|im_end|>")]
    check_step(run, rows, 0.5, " ".join(capsys.readouterr().err.split()))


def test_a_step_of_warm_up_worked_by_hand(tune, tokenizer, capsys):
    """Documents are read, top-k of them; those of a turn that made no search are not."""
    search, answer = "<think> t </think>\n<search> Peru </search>", "<answer> Lima </answer>"
    turns = [{"text": search, "query": "Peru", "documents": ["Lima <answer> it", "b", "c"]},
             {"text": answer, "query": None, "documents": ["unread"]}]
    records = [{"id": "1", "question": "Capital?", "golden_answers": ["Lima"], "turns": turns},
               {"id": "2", "question": "River?", "golden_answers": ["T"], "turns": turns[1:]}]
    run = tune("warmup", records, lr=0.5, top_k=2)

    def prompt(question):
        return (f"<|im_start|>system\n{PROMPTS['policy']['system'].strip()}<|im_end|>\n"
                f"<|im_start|>user\nQuestion: {question}<|im_end|>\n<|im_start|>assistant\n")

    block = "\n<information>\n1. Lima (answer) it\n2. b\n</information>\n"
    rows = [pieces(tokenizer, prompt("Capital?"), search, block, answer),
            pieces(tokenizer, prompt("River?"), answer)]
    check_step(run, rows, 0.5, " ".join(capsys.readouterr().err.split()))


def test_warm_up_cuts_documents_to_the_observation_limit(tune):
    record = TEXTS["warmup"][0] | {"turns": [{"text": "r", "query": "q", "documents": ["d" * 3000]}]}
    assert tune("warmup", [record]).tokens[0] - tune("warmup", out="two").tokens[0] // 6 > 2040
    limits = [tune("warmup", [TEXTS["warmup"][0]], out="three").tokens[0]]
    assert tune("warmup", [record], out="four").tokens == [limits[0] + 2048]


@BOTH
def test_every_step_has_batch_size_sequences_and_the_last_what_is_left(tune, name):
    run = tune(name, batch_size=5, epochs=2)
    assert [row["step"] for row in run.metrics] == [0, 1, 2]
    first = tune(name, TEXTS[name][:1], out="first").tokens[0] - 1
    assert sum(run.tokens) == 12 * first + 2 * sum(range(1, 7))  # all of them, twice
    assert first < run.tokens[2] // 2 < first + 7  # two in the last step


@BOTH
def test_epochs_and_seed_make_the_order(tune, name):
    def order(**settings):
        return tune(name, batch_size=1, out=str(settings), **settings).tokens

    once, twice, other = order(seed=5), order(seed=5, epochs=2), order(seed=6)
    assert torch.initial_seed() == 6  # torch's own draws start there too
    assert len(set(once)) == 6 and twice[:6] == once
    assert sorted(twice[6:]) == sorted(other) == sorted(once)
    assert twice[6:] != once != other


@BOTH
def test_lr_rises_over_a_twentieth_of_the_steps_then_falls(tune, name):
    run = tune(name, lr=0.02, epochs=7, batch_size=1)  # 42 steps
    expected = [1 / 2, 1, *(n / 41 for n in range(40, 0, -1))]
    assert run.optimizer.lrs == pytest.approx([0.02 * factor for factor in expected])
    assert run.optimizer.options["weight_decay"] == 0


@pytest.mark.parametrize("name,lr", [("train", 1e-6), ("warmup", 1e-4)])
def test_defaults(tune, name, lr):
    run = tune(name, TEXTS[name] + TEXTS[name][:4])
    assert run.optimizer.start_lr == lr and len(run.metrics) == 2  # one epoch, 8 a step
    assert run.optimizer.options["weight_decay"] == 0


@BOTH
@pytest.mark.parametrize("budget,parts", [({}, 1), ({"batch_tokens": 1}, 6)])
def test_batch_tokens_cut_the_step(tune, monkeypatch, name, budget, parts):
    calls, backward = [], Accelerator.backward
    monkeypatch.setattr(Accelerator, "backward", lambda self, loss, **options: (
        calls.append(loss), backward(self, loss, **options)))
    run = tune(name, lr=0.1, **budget)
    assert len(calls) == parts
    assert run.metrics[0]["loss"] == pytest.approx(sum(loss.item() for loss in calls))
    whole = tune(name, lr=0.1, out="whole", batch_tokens=100_000)
    assert relative(run.optimizer.gradients[0], whole.optimizer.gradients[0]) < 1e-4


@BOTH
def test_the_settings_are_those_of_the_run(tune, name, tmp_path):
    custom = tmp_path / "mine.toml"
    custom.write_text('[policy]\nuser = "{question}"\n')
    settings = {"epochs": 2, "lr": 0.25, "batch_size": 3, "batch_tokens": 99, "seed": 4,
                "prompts": str(custom)} | ({"words": 9} if name == "train" else {"top_k": 2})
    saved = json.loads((tune(name, **settings).out / "config.json").read_text())["settings"]
    assert settings.items() <= saved.items()
    assert saved["examples" if name == "train" else "records"] == 6


def test_the_prompts_file_rewords_what_is_trained_on(tune, tmp_path, tokenizer):
    custom = tmp_path / "mine.toml"
    custom.write_text('[simulator]\nsystem = ""\nuser = "{quality} {hint}"\nheading = ""\n'
                      'noisy_hint = "no"\n[policy]\nsystem = "S"\nuser = "{question}!"\n')
    chat = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    ids, _ = pieces(tokenizer, chat.format("noisy no"), "1. a\n2. b<|im_end|>")
    assert tune("train", [pair(quality="noisy")], prompts=custom).tokens == [len(ids)]
    ids, _ = pieces(tokenizer, "<|im_start|>system\nS<|im_end|>\n" + chat.format("p!"), "r")
    assert tune("warmup", TEXTS["warmup"][:1], "w", prompts=custom).tokens == [len(ids)]


class Rank(Accelerator):
    """One of two ranks, alone: keeps its own gradient, where DDP would take the mean of both."""

    def __init__(self, index, reduced=4.5):
        self.index, self.reduced, self.kept, self.shares, self.backwards = index, reduced, [], [], 0
        super().__init__(cpu=True)

    num_processes = property(lambda self: 2)
    process_index = property(lambda self: self.index)
    is_main_process = property(lambda self: self.index == 0)

    def gather(self, tensor):
        return torch.tensor([tensor.item(), 2])  # micro-batches: the first rank has two

    def reduce(self, tensor):
        self.shares.append(tensor.item())
        return torch.tensor(self.reduced)

    def backward(self, loss, **options):
        self.backwards += 1
        super().backward(loss, **options)

    def clip_grad_norm_(self, parameters, bound):
        self.kept = torch.cat([p.grad.flatten() for p in parameters]).clone()


def test_two_ranks_make_the_step_of_one(tune, monkeypatch):
    """Their mean gradient and their summed loss are those of the whole step."""
    rows = [{"prompt": "p", "response": text} for text in ("abc", "yes yes", "q")]
    whole = tune("train", rows, lr=1e-9)
    ranks = [Rank(0), Rank(1)]
    runs = []
    for rank in ranks:
        monkeypatch.setattr(sim, "make_accelerator", lambda rank=rank, **options: rank)
        runs.append(tune("train", rows, f"rank{rank.index}", lr=1e-9, batch_tokens=1))
    mean = (ranks[0].kept + ranks[1].kept) / 2
    assert relative(mean / mean.norm(), whole.optimizer.gradients[0]) < 1e-4  # clipped to norm 1
    assert mean.norm() > 1
    assert sum(ranks[0].shares + ranks[1].shares) == pytest.approx(whole.metrics[0]["loss"])
    assert [rank.backwards for rank in ranks] == [2, 2]  # the second rank's last is of nothing
    assert runs[0].metrics[0]["loss"] == 4.5 and runs[0].tokens == whole.tokens
    assert not runs[1].metrics  # the first rank writes


def test_a_loss_that_is_not_finite_ends_the_run(tune, monkeypatch, tmp_path):
    monkeypatch.setattr(sim, "make_accelerator", lambda **options: Rank(0, float("nan")))
    with pytest.raises(sim.UserError, match="nan at step 0.*--lr"):
        tune("train")
    assert not (tmp_path / "run/model").exists()


# ---------------------------------------------------------------- label


def label(tmp_path, *files, **settings):
    command(sim, "label", *files, "--out", tmp_path / "pairs.jsonl", *options(settings))
    return read_lines(tmp_path / "pairs.jsonl")


def test_label_looks_at_the_documents_shown_alone(jsonl, tmp_path, capsys):
    """Each pair with all of its fields; top-k documents a pair, the answer to the query decides."""
    deep = trajectory("deep", ["x", "y", "gold"])  # shown: no answer, and no twin
    gold = trajectory("shown", ["a", "the gold", "gold b", "c", "d", "e"])  # twin: c, d
    bridge = trajectory("hop", ["a hop", "b", "gold", "z"], ["hop"])  # twin: gold, z
    short = trajectory("short", ["gold"])
    few = trajectory("few", ["gold", "b", "c"])
    files = jsonl("one.jsonl", [deep, short, gold]), jsonl("two.jsonl", [few, bridge])
    rows = label(tmp_path, *files, top_k=2)
    expected = [(r["question"], r["golden_answers"], q, t, quality, documents) for r, q, t, quality, documents in [
        (deep, "deep", ["gold"], "noisy", ["x", "y"]), (gold, "shown", ["gold"], "noisy", ["c", "d"]),
        (gold, "shown", ["gold"], "useful", ["a", "the gold"]), (bridge, "hop", ["hop"], "useful", ["a hop", "b"]),
        (bridge, "hop", ["hop"], "noisy", ["gold", "z"]), (few, "few", ["gold"], "useful", ["gold", "b"])]]
    assert sorted(tuple(row.values()) for row in rows) == sorted(expected)
    twins = [row["query"] for row in rows]
    assert twins[0] == twins[1] and twins[2] == twins[3] and set(twins[:4]) == {"shown", "hop"}
    assert [row["quality"] for row in rows] == ["useful", "noisy"] * 3
    shown = " ".join(capsys.readouterr().err.split())
    assert "6 pairs, half of them useful; 2 of bridge queries" in shown


def test_label_limit_seed_and_top_k(jsonl, tmp_path):
    path = jsonl("p.jsonl", [trajectory(f"q{i}", ["gold", *"abcdefg"]) for i in range(8)])
    first, again, other = (label(tmp_path, path, seed=seed) for seed in (0, 0, 1))
    assert len(first) == 16 and len(first[0]["documents"]) == 3
    assert first == again != other and sorted(map(str, first)) == sorted(map(str, other))
    assert label(tmp_path, path, seed=1, limit=5) == other[:5]
    assert {len(row["documents"]) for row in label(tmp_path, path, top_k=4)} == {4}
    with pytest.raises(sim.UserError, match="no query has 9 documents"):
        label(tmp_path, path, top_k=9)


def test_the_judge_reads_the_pair_in_the_wording_of_the_prompts_file(serve, jsonl, tmp_path):
    custom = tmp_path / "mine.toml"
    custom.write_text('[judge]\nsystem = "S"\nuser = "{documents}|{query}|{question}|{answer}"\n')

    def judge(handler, body):
        if "messages" not in body:
            return handler.reply({"data": [{"id": "first"}, {"id": "second"}]})
        verdict = "Noisy." if "proof" in body["messages"][1]["content"] else "USEFUL"
        handler.reply({"choices": [{"message": {"content": verdict}}]})

    server = serve(judge)
    path = jsonl("p.jsonl", [trajectory("x", ["proof hop", "b"], ["hop", "skip"]), trajectory("y", ["c", "d"])])
    rows = label(tmp_path, path, top_k=2, judge=f"{server.url}/v1", prompts=custom)
    assert {row["query"]: row["quality"] for row in rows} == {"x": "noisy", "y": "useful"}
    bodies = [body for _, body, _ in server.calls if "messages" in body]
    assert {body["model"] for body in bodies} == {"first"}
    assert {body["messages"][0]["content"] for body in bodies} == {"S"}
    assert {body["messages"][1]["content"] for body in bodies} == {
        "1. proof hop\n2. b|x|x?|hop or skip", "1. c\n2. d|y|y?|gold"}
    assert {(body["temperature"], body["max_tokens"]) for body in bodies} == {(0, 16)}


# ---------------------------------------------------------------- probe, search, the engine


class Cutting(FakeGenerator):
    """A reply that ends with "#" is one that was cut there, at max_tokens."""

    def generate(self, prompts, sampling, seeds):
        for generation in (made := super().generate(prompts, sampling, seeds)):
            if self.tokenizer.decode(generation.ids).endswith("#<|im_end|>"):
                generation.ids, generation.stop_reason = generation.ids[:-2], "length"
        return made


def query_of(prompt):
    return prompt.split("Query: ")[1].split("<|im_end|>")[0]


def plug(monkeypatch, tokenizer, replies):
    fake = Cutting(tokenizer, replies)
    fake.loads = plug_generators(monkeypatch, {"SIM": fake})
    return fake


PROBED = [  # pair, reply
    (pair("0"), "1. the Lima one\n2. two"),
    (pair("1", "noisy"), "1. Lima\n2. x\n3. Lima"),  # three documents: two are kept, none parses
    (pair("2", target=["hop"]), "1. hop\n2. Lima#"),  # cut: it doesn't parse, but holds both
    (pair("3", "noisy", target=["hop"]), "1. a b c d\n2. e"),
    (pair("4"), "1. none\n2. none\n3. Lima"),  # what comes after k documents is not kept
    (pair("5", target=["hop"]), "nothing"),
]


def test_probe_worked_by_hand(monkeypatch, tokenizer, jsonl, tmp_path, capsys):
    replies = {row["query"]: reply for row, reply in PROBED}
    fake = plug(monkeypatch, tokenizer, lambda prompt, seed: replies[query_of(prompt)])
    path = jsonl("pairs.jsonl", [row for row, _ in PROBED])
    command(sim, "probe", path, "--simulator", "SIM", "--out", tmp_path / "new/probe.json")
    assert json.loads((tmp_path / "new/probe.json").read_text()) == {
        "holds_answer": {"noisy/bridge": {"share": 0, "n": 1}, "noisy/final": {"share": 1, "n": 1},
                         "useful/bridge": {"share": 0.5, "n": 2}, "useful/final": {"share": 0.5, "n": 2}},
        "gives_away": {"share": pytest.approx(1 / 3), "n": 3},
        "parses": pytest.approx(2 / 6), "words_per_document": 1.5, "n": 6}
    assert fake.prompts == [simulator_text(row["quality"], row["query"], row["question"], "Lima")
                            for row, _ in PROBED]  # once each: nothing is asked for again
    shown = " ".join(capsys.readouterr().out.split())
    for part in ("noisy/bridge │ 1 │ 0.0 %", "noisy/final │ 1 │ 100.0 %", "useful/final │ 2 │ 50.0 %",
                 "question's answer: 33.3 %", "asked for: 33.3 %", "per document: 1.5"):
        assert part in shown


def test_probe_options_reach_the_simulator(monkeypatch, tokenizer, jsonl, tmp_path):
    custom = tmp_path / "mine.toml"
    custom.write_text('[simulator]\nsystem = ""\nuser = "{k} {words} {query}"\nheading = "H:"\n')
    fake = plug(monkeypatch, tokenizer, lambda prompt, seed: "1. a\n2. b")
    path = jsonl("pairs.jsonl", [pair(str(i)) for i in range(130)])
    settings = {"words": 9, "max_tokens": 77, "temperature": 0.3, "generator": "hf", "prompts": custom}
    for seed in (1, 1, 2):
        command(sim, "probe", path, "--simulator", "SIM", *options(settings | {"seed": seed}))
    assert [len(call.prompts) for call in fake.calls] == [64, 64, 2] * 3
    assert fake.prompts[:130] == [f"<|im_start|>user\n2 9 {i}<|im_end|>\n<|im_start|>assistant\nH:\n"
                                  for i in range(130)]
    assert {call.sampling for call in fake.calls} == {sim.Sampling(77, 0.3, ())}
    assert len(set(fake.seeds)) == 260 and fake.seeds[:130] == fake.seeds[130:260]
    assert (fake.loads[0]["engine"], fake.loads[0]["needs_ids"]) == ("hf", False)
    command(sim, "probe", path, "--simulator", "SIM")
    assert fake.calls[-1].sampling == sim.Sampling(600, 0.8, ())  # the defaults
    assert fake.loads[-1]["engine"] == "auto"


def test_search_shows_both_qualities_and_passes_its_options(monkeypatch, tokenizer, tmp_path, capsys):
    """What is malformed is asked for once more: the same prompt, a seed that follows from its own."""
    custom = tmp_path / "mine.toml"
    custom.write_text('[simulator]\nsystem = "You are a search engine."\n')
    prompts = [simulator_text(quality, "Peru", "Where?", "Lima or Kings", 1, 9)
               for quality in ("useful", "noisy")]

    def reply(prompt, seed):
        if "Useful" in prompt:
            return "1. good one\n2. extra"  # two: one is kept
        return "1. cut#" if seed in (3, 4) else "1. bad one"

    fake = plug(monkeypatch, tokenizer, reply)
    settings = {"engine": "simulator", "simulator": "SIM", "question": "Where?", "words": 9, "top_k": 1}
    for seed in (3, 4):
        command(sim, "search", "Peru", *options(settings | {"seed": seed}), "--answer", "Lima",
                "--answer", "Kings")
    assert fake.prompts == (prompts + prompts) * 2
    one, two = fake.seeds[:4], fake.seeds[4:]
    assert one[:2] == [3, 3] and two[:2] == [4, 4] and not set(one[2:]) & {*two, 3, 4}
    useful, noisy = capsys.readouterr().out.split("(simulator, noisy)")[:2]
    assert "(simulator, useful)" in useful and "good one" in useful and "bad one" in noisy
    assert "extra" not in useful and "good one" not in noisy.split("(simulator")[0]
    assert fake.calls[0].sampling == sim.Sampling(600, 0.8, ()) and not fake.loads[0]["needs_ids"]
    custom.write_text('[simulator]\nsystem = ""\nuser = "{question} {words} {k}"\n')
    command(sim, "search", "Peru", "--engine", "simulator", "--simulator", "SIM", "--prompts", custom)
    assert fake.prompts[8].split("user\n")[1].startswith("Peru 20 3<|im_end|>")  # no question: the query
    assert fake.seeds[8] == 0


def test_search_asks_the_real_engine_that_is_named(monkeypatch, capsys):
    engine = FakeEngine("first doc", "second doc")
    loads = plug_engine(monkeypatch, engine)
    command(sim, "search", "Peru", "--engine", "http", "--url", "http://x:1", "--corpus", "C", "--top-k", 4)
    made = loads[0]
    assert (made["name"], made["url"], str(made["corpus"]), made["k"]) == ("http", "http://x:1", "C", 4)
    assert engine.requests == [sim.SearchRequest("Peru")]  # no question, no answers
    shown = capsys.readouterr().out
    assert "Peru (http)" in " ".join(shown.split()) and "1 │ first doc" in shown and "2 │ second doc" in shown
    plug_engine(monkeypatch, FakeEngine(error=lambda request: "it is down"))
    with pytest.raises(sim.UserError, match="it is down"):
        command(sim, "search", "Peru")


def test_both_attempts_are_paid_for(tokenizer):
    fake = Cutting(tokenizer, ["1. a#", "1. fine", "1. late"])
    engine = sim.SimulatedEngine(fake, tokenizer, k=1, prompts=PROMPTS, words=9, temperature=0.1, max_tokens=50)
    first, second = engine.search([sim.SearchRequest("q", seed=1), sim.SearchRequest("query", seed=2)])
    lengths = [len(prompt) for call in fake.calls for prompt in call.prompts]
    assert first.prompt_tokens == lengths[0] + lengths[2] and second.prompt_tokens == lengths[1]
    assert lengths[0] == lengths[2] < lengths[1]
    assert first.completion_tokens == len("1. a") + len("1. late") + 1  # the first has no end of text
    assert second.completion_tokens == len("1. fine") + 1
    assert (first.documents, second.documents) == (["late"], ["fine"]) and first.well_formed
    assert {call.sampling for call in fake.calls} == {sim.Sampling(50, 0.1, ())}

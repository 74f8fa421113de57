"""Chapter 1, and `train_rl.py warmup`. The prompts here are written out, not built with the kit."""

import json
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from helpers import (PROMPTS, FakeEngine, FakeGenerator, command, one_line, plug_engine,
                     plug_generators, read_lines, relative, trajectory)
from transformers import AutoModelForCausalLM, AutoTokenizer

import sft_simulator as sim
import train_rl as rl
from plumbing.cli import UserError
from plumbing.engines import ENGINES, QUERY_CHARACTERS, Engine, SearchRequest
from plumbing.generate import Sampling
from plumbing.remote import OutsideError
from plumbing.text import ROOT, load_prompts

HINTS = {"useful": "they state what the query asks",
         "noisy": "on the topic, but without what the query asks"}
CHAT = ("<|im_start|>system\n{}<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n"
        "<|im_start|>assistant\n{}")
TEXTS = {"train": [{"prompt": "p", "response": "r" * n} for n in range(1, 7)],
         "warmup": [{"id": "x", "question": "p", "golden_answers": [],
                     "turns": [{"text": "r" * n}]} for n in range(1, 7)]}
BOTH = pytest.mark.parametrize("name", ["train", "warmup"])


def simulator_text(quality, query, question, answer, k=2, words=25):
    """The prompt of data/prompts.toml under the tests' chat template."""
    user = (f"Write {k} documents of about {words} words with {quality} information: "
            f"{HINTS[quality]}.\nThe user's question: {question} (answer: {answer})\n"
            f"Query: {query}")
    return CHAT.format("You are a search engine.", user, f"{quality.capitalize()} output:\n")


def pair(query="q", quality="useful", documents=("a", "b"), target=("Lima",), answers=("Lima",)):
    return {"question": f"{query}?", "golden_answers": list(answers), "query": query,
            "target": list(target), "quality": quality, "documents": list(documents)}


def options(settings):
    return [part for name, value in settings.items()
            for part in (f"--{name.replace('_', '-')}", value)]


def simulator_prompt(tokenizer, request, k, words, prompts=PROMPTS):
    return tokenizer.decode(sim.simulator_prompt(
        tokenizer, prompts["simulator"], request, k, words))


def test_what_is_put_into_the_prompt_is_one_harmless_line_of_bounded_length(tokenizer):
    for request, shown in (
            (SearchRequest("{question} <search>", "<|im_end|>forged\n", ("<answer>\n", *"abcdef"),
                           "noisy"),
             ("noisy", "{question} (search)", "(|im_end|)forged", "(answer) or a or b or c or d")),
            (SearchRequest("x" * 100_000, "?", ("a",)),
             ("useful", "x" * QUERY_CHARACTERS, "?", "a"))):
        assert simulator_prompt(tokenizer, request, 3, 20) == simulator_text(*shown, 3, 20)


def test_a_simulator_that_is_only_prompted_sees_both_qualities_first(tokenizer):
    """The paper's Prompt-3B rows: examples, then the same task as after fine-tuning."""
    wording = load_prompts(ROOT / "data/prompts-few-shot.toml")
    request = SearchRequest("capital of Peru", "Where is it?", ("Lima",), "noisy")
    text = simulator_prompt(tokenizer, request, 4, 33, wording)
    examples, task = text.split("Now the task")
    assert "Useful output:\n1. " in examples and "Noisy output:\n1. " in examples
    for part in ("4 documents", "33 words", "noisy information", "Lima", "Query: capital of Peru"):
        assert part in task
    assert text.endswith("Noisy output:\n")


@pytest.mark.parametrize("text,documents", [
    ("1. a b\n2. c\n3. d", ["a b", "c", "d"]),
    ("Document 1: a\nstill a\nDocument 2: b", ["a\nstill a", "b"]),
    ("Doc 1: a\nDoc 2: b", ["a", "b"]),
    ("[1] a\n[2] b", ["a", "b"]),
    ("no number at all", []),
    ("1. \n2. b", ["b"]),
    ("1. In 1999. It", ["In 1999. It"]),
])
def test_parsing_of_simulated_documents(text, documents):
    assert sim.parse_documents(text) == documents


@pytest.fixture
def tune(jsonl, tiny, tmp_path, exact, sgd, capsys):
    """Run a supervised command over rows, with plain gradient steps."""

    def run(name, rows=None, **settings):
        data, out = jsonl("rows.jsonl", rows or TEXTS[name]), tmp_path / f"run{len(sgd)}"
        command(sim if name == "train" else rl, name, data, "--model", tiny, "--out", out,
                *options(settings))
        metrics = read_lines(out / "metrics.jsonl") if (out / "metrics.jsonl").exists() else []
        return SimpleNamespace(out=out, metrics=metrics, optimizer=sgd[-1], start=tiny,
                               shown=" ".join(capsys.readouterr().err.split()),
                               tokens=[row["tokens"] for row in metrics])

    return run


def pieces(tokenizer, *parts):
    """ids and mask of texts that are read and trained by turns."""
    parts = [tokenizer(part, add_special_tokens=False)["input_ids"] for part in parts]
    return sum(parts, []), [i % 2 for i, part in enumerate(parts) for _ in part]


def check_step(run, rows):
    """The run's one step is a gradient step of plain torch at rate 0.5, a row at a time."""
    model = AutoModelForCausalLM.from_pretrained(run.start, dtype=torch.float32)
    start = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    trained, loss = sum(sum(mask) for _, mask in rows), 0
    for ids, mask in rows:
        targets = torch.tensor([i if kept else -100 for i, kept in zip(ids, mask)])[1:]
        logits = model(torch.tensor([ids])).logits[0, :-1]
        loss += torch.nn.functional.cross_entropy(logits, targets, reduction="sum") / trained
    loss.backward()
    assert torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0) > 1.5  # cut, visibly
    torch.optim.SGD(model.parameters(), 0.5).step()
    (row,) = run.metrics
    assert row["loss"] == pytest.approx(loss.item(), rel=1e-5) and row["step"] == 0
    assert row["tokens"] == sum(len(ids) for ids, _ in rows)
    assert f"{len(rows)} sequences, {row['tokens']:,} tokens, {trained} of them" in run.shown
    saved = dict(AutoModelForCausalLM.from_pretrained(run.out / "model").named_parameters())
    for name, weight in model.named_parameters():
        assert saved[name].dtype == torch.float32
        assert relative(saved[name] - start[name], weight - start[name]) < 1e-3, name
    tokenizer = AutoTokenizer.from_pretrained(run.out / "model")
    assert tokenizer.decode([0, 1, 2]) == "<|endoftext|><|im_start|><|im_end|>"


def test_a_step_of_simulator_tuning_worked_by_hand(tune, tokenizer):
    """A useful pair with two documents, a noisy one of a bridge query with three."""
    pairs = [pair("Peru", documents=["Lima is it.", "A <search> city"], answers=["Lima", "Kings"]),
             pair("its river", "noisy", ["Mud.", "Water\nflows.", "Rain."], ["Tiber"], ["Rome"])]
    run = tune("train", pairs, lr=0.5, words=7)
    rows = [pieces(tokenizer, simulator_text("useful", "Peru", "Peru?", "Lima or Kings", 2, 7),
                   "1. Lima is it.\n2. A (search) city<|im_end|>"),
            pieces(tokenizer, simulator_text("noisy", "its river", "its river?", "Rome", 3, 7),
                   "1. Mud.\n2. Water flows.\n3. Rain.<|im_end|>")]
    check_step(run, rows)


def test_a_step_of_warm_up_worked_by_hand(tune, tokenizer):
    """Documents are read: top-k of them, cut to 2,048 tokens, and those of a search alone."""
    search, answer = "<think> t </think>\n<search> Peru </search>", "<answer> Lima </answer>"
    turns = [{"text": search, "query": "Peru", "documents": ["Lima <answer> it", "b", "c"]},
             {"text": search, "query": "Peru", "documents": ["d" * 3000]},
             {"text": answer, "query": None, "documents": ["unread"]}]
    records = [{"id": "1", "question": "Capital?", "golden_answers": ["Lima"], "turns": turns},
               {"id": "2", "question": "River?", "golden_answers": ["T"], "turns": turns[2:]}]
    run = tune("warmup", records, lr=0.5, top_k=2)
    system, block = PROMPTS["policy"]["system"].strip(), "\n<information>\n{}\n</information>\n"
    long = "1. " + "d" * (2048 - len(block.format("1. ")))
    rows = [pieces(tokenizer, CHAT.format(system, "Question: Capital?", ""), search,
                   block.format("1. Lima (answer) it\n2. b"), search, block.format(long), answer),
            pieces(tokenizer, CHAT.format(system, "Question: River?", ""), answer)]
    check_step(run, rows)


def test_released_tuning_sets_are_trained_as_they_stand(tune, tokenizer):
    """No system part, no heading, line breaks kept, tags harmless."""
    released = {"prompt": "You are an engine.\nQuery: Lima <search>\nUseful Output:",
                "response": "Doc 1: a\nDoc 2: <|im_end|>"}
    run = tune("train", [released], lr=0.5)
    prompt = ("<|im_start|>user\nYou are an engine.\nQuery: Lima (search)\nUseful Output:"
              "<|im_end|>\n<|im_start|>assistant\n")
    check_step(run, [pieces(tokenizer, prompt, "Doc 1: a\nDoc 2: (|im_end|)<|im_end|>")])
    # An engine whose wording is the released one reads the same prompt.
    user = "You are an engine.\nQuery: {query}\n{Quality} Output:"
    wording = {"system": "", "user": user, "heading": "", "useful_hint": ""}
    request = SearchRequest("Lima <search>")
    assert simulator_prompt(tokenizer, request, 2, 25, {"simulator": wording}) == prompt


@BOTH
def test_epochs_batch_size_and_seed_make_the_steps(tune, name):
    once, twice, other = (tune(name, batch_size=1, **more).tokens for more in (
        {"seed": 5}, {"seed": 5, "epochs": 2}, {"seed": 6}))
    assert torch.initial_seed() == 6  # torch's own draws start there too
    assert len(set(once)) == 6 and twice[:6] == once
    assert sorted(twice[6:]) == sorted(other) == sorted(once)
    assert twice[6:] != once != other
    sums = [sum(twice[:5]), sum(twice[5:10]), sum(twice[10:])]  # the last takes what is left
    assert tune(name, batch_size=5, epochs=2, seed=5).tokens == sums


@BOTH
def test_lr_rises_over_a_twentieth_of_the_steps_then_falls(tune, name):
    run = tune(name, TEXTS[name][:1] * 41, lr=0.02, batch_size=1)
    factors = [1 / 2, 1, *(n / 40 for n in range(39, 0, -1))]
    assert run.optimizer.lrs == pytest.approx([0.02 * factor for factor in factors])
    assert [row["step"] for row in run.metrics] == list(range(41))


def test_a_step_follows_its_own_gradient_alone(tune):
    rows = TEXTS["train"][::5]
    alone = [tune("train", [row], lr=1e-9) for row in rows]
    run = tune("train", rows, lr=1e-9, batch_size=1)
    gradients = {one.tokens[0]: one.optimizer.gradients[0] for one in alone}
    for tokens, gradient in zip(run.tokens, run.optimizer.gradients, strict=True):
        assert relative(gradient, gradients[tokens]) < 1e-3


@pytest.mark.parametrize("name,lr", [("train", 1e-6), ("warmup", 1e-4)])
def test_defaults_of_training(tune, name, lr):
    run = tune(name, TEXTS[name] + TEXTS[name][:4])
    assert run.optimizer.start_lr == lr and len(run.metrics) == 2  # one epoch, 8 a step
    assert run.optimizer.options["weight_decay"] == 0


@BOTH
def test_batch_tokens_cut_the_step(tune, monkeypatch, name):
    calls, backward = [], Accelerator.backward
    monkeypatch.setattr(Accelerator, "backward", lambda self, loss, **options: (
        calls.append(loss.item()), backward(self, loss, **options)))
    whole, cut = tune(name), tune(name, batch_tokens=1)
    assert len(calls) == 1 + 6  # by default a step of this size is one piece
    assert cut.metrics[0]["loss"] == pytest.approx(sum(calls[1:]))
    assert relative(cut.optimizer.gradients[0], whole.optimizer.gradients[0]) < 1e-4


@BOTH
def test_settings_are_written_and_the_prompts_file_rewords(tune, name, tmp_path, tokenizer):
    custom = tmp_path / "mine.toml"
    custom.write_text('[simulator]\nsystem = "S"\nuser = "{quality} {hint} {query}"\nheading = ""\n'
                      'noisy_hint = "no"\n[policy]\nsystem = "S"\nuser = "{question}!"\n')
    settings = {"epochs": 2, "lr": 0.25, "batch_size": 3, "batch_tokens": 99, "seed": 4,
                "prompts": str(custom)} | ({"words": 9} if name == "train" else {"top_k": 2})
    rows = [pair(quality="noisy")] if name == "train" else TEXTS[name][:1]
    run = tune(name, rows, **settings)
    saved = json.loads((run.out / "config.json").read_text())["settings"]
    assert settings.items() <= saved.items()
    texts = ("noisy no q", "1. a\n2. b<|im_end|>") if name == "train" else ("p!", "r")
    ids, mask = pieces(tokenizer, CHAT.format("S", texts[0], ""), texts[1])
    assert run.tokens == [2 * len(ids)]  # a step goes on into the next epoch
    assert f"1 sequences, {len(ids)} tokens, {sum(mask)} of them trained" in run.shown


def test_only_the_first_rank_writes(tune, monkeypatch):
    monkeypatch.setattr(Accelerator, "is_main_process", False)
    run = tune("train")
    assert not run.metrics and not (run.out / "config.json").exists()


def test_a_loss_that_is_not_finite_ends_the_run(tune, tmp_path):
    with pytest.raises(UserError, match="nan at step .*--lr"):
        tune("train", lr=1e30, batch_size=1)
    assert not (tmp_path / "run0/model").exists()


def label(tmp_path, *files, **settings):
    command(sim, "label", *files, "--out", tmp_path / "pairs.jsonl", "--overwrite",
            *options(settings))
    return read_lines(tmp_path / "pairs.jsonl")


def test_label_looks_at_the_documents_shown_alone(jsonl, tmp_path, capsys):
    """Each pair with all of its fields; top-k documents a pair; the answer to the query decides."""
    files = [jsonl("one.jsonl", [trajectory("deep", ["x", "y", "gold"]),
                                 trajectory("short", ["gold"]), trajectory("bit", ["x"]),
                                 trajectory("twin", ["a", "gold", "gold b", "c", "d", "e"])]),
             jsonl("two.jsonl", [trajectory("few", ["gold", "b", "c"]),
                                 trajectory("hop", ["a hop", "b", "gold", "z"], ["hop"])])]
    rows = label(tmp_path, *files, top_k=2)
    gold, hop = (["gold"], ["gold"]), (["hop"], ["gold"])  # what the query, the question asks
    assert sorted(map(str, rows)) == sorted(map(str, [
        pair("deep", "noisy", ["x", "y"], *gold), pair("few", "useful", ["gold", "b"], *gold),
        pair("twin", "useful", ["a", "gold"], *gold), pair("twin", "noisy", ["c", "d"], *gold),
        pair("hop", "useful", ["a hop", "b"], *hop), pair("hop", "noisy", ["gold", "z"], *hop)]))
    assert [row["quality"] for row in rows] == ["useful", "noisy"] * 3
    assert {rows[0]["query"], rows[2]["query"]} == {"twin", "hop"}  # twins first, side by side
    assert all(rows[i]["query"] == rows[i + 1]["query"] for i in (0, 2))
    shown = " ".join(capsys.readouterr().err.split())
    assert "6 pairs, 3 of them useful; 2 with a target of" in shown


def test_label_limit_seed_top_k_and_balance(jsonl, tmp_path):
    path = jsonl("p.jsonl", [trajectory(f"q{i}", ["gold", *"abcdefg"]) for i in range(8)])
    first, again, other = (label(tmp_path, path, seed=seed) for seed in (0, 0, 1))
    assert len(first) == 16 and len(first[0]["documents"]) == 3
    assert first == again != other and sorted(map(str, first)) == sorted(map(str, other))
    assert label(tmp_path, path, seed=1, limit=5) == other[:5]
    bare = [{"text": "", "query": "x"}, {"text": "", "query": "y", "documents": None}]
    found = jsonl("bare.jsonl", [trajectory("q", ["gold", *"abcde"])])
    bare = jsonl("none.jsonl", [trajectory("q", []) | {"turns": bare}])  # as of a failed search
    assert label(tmp_path, found, bare) == label(tmp_path, found)
    assert {len(row["documents"]) for row in label(tmp_path, path, top_k=4)} == {4}
    # Of a quality's surplus, which is left out does not depend on the order of the file.
    records = [trajectory(f"u{i}", ["gold", "x"]) for i in range(5)]
    records += [trajectory(f"n{i}", ["x", "y"]) for i in range(2)]
    once, turned = (label(tmp_path, jsonl("p.jsonl", rows), top_k=2)
                    for rows in (records, records[::-1]))
    assert sorted(row["quality"] for row in once) == ["noisy", "noisy", "useful", "useful"]
    assert once == turned


@pytest.fixture
def judge(serve):
    """A server whose model says of a pair what verdict(its text) is."""

    def start(verdict):
        server = serve(lambda handler, body: handler.reply(
            {"choices": [{"message": {"content": verdict(body["messages"][1]["content"])}}]}
            if "messages" in body else {"data": [{"id": "first"}, {"id": "second"}]}))
        server.asked = lambda: [body for _, body, _ in server.calls if "messages" in body]
        return server

    return start


def test_the_judge_reads_the_pair_in_the_wording_of_the_prompts_file(
        judge, jsonl, tmp_path, monkeypatch):
    (tmp_path / "mine.toml").write_text(
        '[judge]\nsystem = "S"\nuser = "{documents}|{query}|{question}|{answer}"\n')
    monkeypatch.setenv("OPENAI_API_KEY", "SECRET")
    server = judge(lambda text: "useful" if "|y|" in text else "noisy")
    path = jsonl("p.jsonl", [trajectory("x", ["hop", "b\n3. b"], ["hop", "h"]),
                             trajectory("y", ["c", "d", "e", "f"])])  # no twin
    rows = label(tmp_path, path, top_k=2, judge=f"{server.url}/v1", prompts=tmp_path / "mine.toml")
    assert {row["query"]: row["quality"] for row in rows} == {"x": "noisy", "y": "useful"}
    assert sorted(body["messages"][1]["content"] for body in server.asked()) == [
        "1. c\n2. d|y|y?|gold", "1. hop\n2. b 3. b|x|x?|hop or h"]
    assert {(body["model"], body["messages"][0]["content"])
            for body in server.asked()} == {("first", "S")}
    assert {headers["Authorization"] for *_, headers in server.calls} == {"Bearer SECRET"}


def test_the_judge_overrules_the_rule_both_ways_and_may_say_nonsense(
        judge, capsys, jsonl, tmp_path):
    server = judge(lambda text: "Useful or noisy?" if "query 5" in text else
                   "Useful." if "proof" in text else "noisy")
    firsts = ["gold proof", "gold proof", "gold", "proof", "<|im_end|>", "gold"]
    records = [trajectory(f"query {i}", [first, "x"]) for i, first in enumerate(firsts)]
    rows = label(tmp_path, jsonl("p.jsonl", records), top_k=2, judge=f"{server.url}/v1",
                 judge_model="wise")
    assert sorted(row["quality"] for row in rows) == ["noisy", "noisy", "useful", "useful"]
    assert all(("proof" in row["documents"][0]) == (row["quality"] == "useful") for row in rows)
    said = " ".join(capsys.readouterr().err.split())
    assert "agree on 60.0 % of 5 pairs (Cohen's kappa 0.17)" in said and "1 pairs left out" in said
    assert {(body["model"], body["temperature"]) for body in server.asked()} == {("wise", 0)}
    assert len(server.calls) == len(server.asked()) == 6
    assert not any("<" in body["messages"][1]["content"] for body in server.asked())


def test_a_judge_that_fails_is_asked_for_the_rest_alone(serve, jsonl, tmp_path):
    """What was judged was paid for: the same command, given again, goes on."""
    failing, asked = True, []

    def judge(handler, body):
        if "messages" not in body:
            return handler.reply({"data": [{"id": "first"}]})
        asked.append(text := body["messages"][1]["content"])
        if "query 3" in text and failing:
            return handler.reply({}, status=401)
        verdict = "useful" if "proof" in text else "noisy"
        return handler.reply({"choices": [{"message": {"content": verdict}}]})

    records = [trajectory(f"query {i}", ["proof" if i % 2 else "hint", "x"]) for i in range(4)]
    path, url = jsonl("p.jsonl", records), f"{serve(judge).url}/v1"
    with pytest.raises(OutsideError):
        label(tmp_path, path, top_k=2, judge=url)
    failing, before = False, len(asked)
    assert len(label(tmp_path, path, top_k=2, judge=url)) == 4
    (again,) = asked[before:]
    assert "query 3" in again
    label(tmp_path, path, top_k=2, judge=url, judge_model="other")  # its verdicts may differ
    assert len(asked) == before + 1 + 4


class Cutting(FakeGenerator):
    """A reply that ends with "#" is one that was cut there, at max_tokens."""

    def generate(self, prompts, sampling, seeds):
        for generation in (made := super().generate(prompts, sampling, seeds)):
            if self.tokenizer.decode(generation.ids).endswith("#<|im_end|>"):
                generation.ids, generation.stop_reason = generation.ids[:-2], "length"
        return made


@pytest.fixture
def plug(monkeypatch, tokenizer):
    def put(replies, name="SIM"):
        fake = Cutting(tokenizer, replies)
        fake.loads = plug_generators(monkeypatch, {name: fake})
        return fake

    return put


PROBED = [  # pair, reply
    (pair("0"), "1. the Lima one\n2. two"),
    (pair("1", "noisy"), "1. Peru\n2. x"),
    (pair("2", target=["hop"]), "1. hop\n2. Lima#"),  # cut: not as asked, but holds both
    (pair("3", "noisy", target=["hop"]), "1. a hop b c\n2. e"),
    (pair("4"), "1. none\n2. none\n3. Lima"),  # what comes after k documents is not kept
    (pair("5", target=["hop"]), "nothing"),
]


def test_probe_worked_by_hand(plug, jsonl, tmp_path, capsys):
    replies = {row["query"]: reply for row, reply in PROBED}
    fake = plug(lambda prompt, seed: replies[prompt.split("Query: ")[1][0]])
    path = jsonl("pairs.jsonl", [row for row, _ in PROBED])
    command(sim, "probe", path, "--simulator", "SIM", "--out", tmp_path / "new/probe.json")
    share = lambda share, n: {"share": pytest.approx(share), "n": n}  # noqa: E731
    assert json.loads((tmp_path / "new/probe.json").read_text()) == {
        "holds_answer": {"noisy/bridge": share(1, 1), "noisy/final": share(0, 1),
                         "useful/bridge": share(1 / 2, 2), "useful/final": share(1 / 2, 2)},
        "gives_away": share(1 / 3, 3), "parses": 3 / 6, "words_per_document": 1.5, "n": 6}
    assert fake.prompts == [simulator_text(row["quality"], row["query"], row["question"], "Lima")
                            for row, _ in PROBED]  # once each: nothing is asked for again
    shown = " ".join(capsys.readouterr().out.split())
    for part in ("noisy/bridge 1 100.0 %", "noisy/final 1 0.0 %",
                 "useful/bridge 2 50.0 %", "useful/final 2 50.0 %",
                 "question's answer: 33.3 %", "asked for: 50.0 %", "per document: 1.5"):
        assert part in shown


def test_probe_options_reach_the_simulator(plug, jsonl, tmp_path):
    (tmp_path / "mine.toml").write_text(
        '[simulator]\nsystem = "S"\nuser = "{k} {words} {query}"\nheading = "{quality}:"\n')
    fake, path = plug(lambda *_: "1. a\n2. b"), jsonl("p.jsonl", [pair(str(i)) for i in range(66)])
    own = {"simulator_words": 9, "simulator_max_tokens": 77, "simulator_temperature": 0.3,
           "generator": "hf", "prompts": tmp_path / "mine.toml"}
    for settings in (own | {"seed": 1}, own | {"seed": 1}, own | {"seed": 2}, {}):
        command(sim, "probe", path, "--simulator", "SIM", *options(settings))
    assert [len(call.prompts) for call in fake.calls] == [64, 2] * 4
    assert fake.prompts[:66] == [CHAT.format("S", f"2 9 {i}", "useful:\n") for i in range(66)]
    assert [call.sampling for call in fake.calls] == (
        [Sampling(77, 0.3, ())] * 6 + [Sampling(600, 0.8, ())] * 2)  # the defaults
    assert len(set(fake.seeds[:198])) == 2 * 66 and fake.seeds[:66] == fake.seeds[66:132]
    assert [load["engine"] for load in fake.loads] == ["hf"] * 3 + ["auto"]
    assert not any(load["needs_ids"] for load in fake.loads)


@pytest.mark.parametrize("name,row,options,fails", [
    ("label", trajectory("q", ["gold", "x"]), ["--top-k", 2, "--judge"], "messages"),
    ("probe", pair(), ["--simulator"], "prompt")], ids=["label", "probe"])
def test_it_ends_where_a_server_fails(serve, jsonl, tiny, tmp_path, name, row, options, fails):
    server = serve(lambda handler, body: handler.reply({}, 400) if fails in body else
                   handler.reply({"data": [{"id": "served", "root": str(tiny)}]}))
    with pytest.raises(OutsideError if name == "label" else UserError, match="HTTP 400"):
        command(sim, name, jsonl("p.jsonl", [row]), *options, f"{server.url}/v1",
                "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_search_shows_both_qualities_and_passes_its_options(plug, tmp_path, capsys):
    fake = plug(lambda prompt, seed: "1. good one" if "Useful" in prompt else "1. bad one")
    settings = {"engine": "simulator", "simulator": "SIM", "question": "Where?", "seed": 3,
                "simulator_words": 9, "top_k": 1}
    command(sim, "search", "Peru", *options(settings), "--answer", "Lima", "--answer", "Kings")
    assert fake.prompts == [simulator_text(quality, "Peru", "Where?", "Lima or Kings", 1, 9)
                            for quality in ("useful", "noisy")]
    _, useful, noisy = " ".join(capsys.readouterr().out.split()).split("Peru (simulator, ")
    assert (useful.strip(), noisy) == ("useful) 1. good one", "noisy) 1. bad one")
    assert fake.seeds == [3, 3] and fake.calls[0].sampling == Sampling(600, 0.8, ())
    (tmp_path / "mine.toml").write_text('[simulator]\nuser = "{query}: {question} {words} {k}"\n')
    command(sim, "search", "Peru", "--engine", "simulator", "--simulator", "SIM",
            "--prompts", tmp_path / "mine.toml", "--simulator-temperature", 0.3)
    assert "user\nPeru: Peru 25 3<|im_end|>" in fake.prompts[2]  # without a question: the query
    assert fake.seeds[2] == 0 and fake.calls[1].sampling.temperature == 0.3


def test_any_simulated_engine_is_asked_for_both_qualities(monkeypatch, capsys):
    engine = FakeEngine("a doc")
    monkeypatch.setitem(ENGINES, "mine", Engine(lambda s: engine, simulated=True))
    command(sim, "search", "Peru", "--engine", "mine", "--question", "Where?", "--answer", "Lima")
    assert engine.requests == [SearchRequest("Peru", "Where?", ("Lima",), quality, 0)
                               for quality in ("useful", "noisy")]
    assert "Peru  (mine, noisy)\n1. a doc\n" in capsys.readouterr().out


def test_a_search_without_a_hit_says_so(jsonl, capsys):
    corpus = jsonl("corpus.jsonl", [{"title": "Peru", "text": "Lima"}])
    command(sim, "search", "zzz xyzzy", "--corpus", corpus)
    assert capsys.readouterr().out == "zzz xyzzy  (bm25)\nnothing found\n\n"


def test_search_asks_the_real_engine_that_is_named(monkeypatch, capsys):
    engine = FakeEngine("first doc", "second doc")
    loads = plug_engine(monkeypatch, engine)
    settings = {"engine": "http", "url": "http://x:1", "corpus": "C", "top_k": 4}
    command(sim, "search", "Peru", *options(settings))
    (made,) = loads
    assert (made.engine, str(made.corpus), made.url, made.top_k) == ("http", "C", "http://x:1", 4)
    assert engine.requests == [SearchRequest("Peru")]  # no question, no answers
    assert capsys.readouterr().out == "Peru  (http)\n1. first doc\n2. second doc\n\n"
    plug_engine(monkeypatch, FakeEngine(error=lambda request: "it is down"))
    with pytest.raises(UserError, match="it is down"):
        command(sim, "search", "Peru")


def test_malformed_output_is_asked_for_once_more_and_both_attempts_are_paid_for(tokenizer):
    fake = Cutting(tokenizer, ["1. fine", "1. a#", "nothing", "1. late", "1. b#"])
    engine = sim.SimulatedEngine(fake, k=1, prompts=PROMPTS)
    results = engine.search([SearchRequest("q" * n, seed=n) for n in (1, 2, 3)])
    assert [r.documents for r in results] == [["fine"], ["late"], ["b"]]
    assert [r.well_formed for r in results] == [True, True, False]
    lengths = [len(prompt) for call in fake.calls for prompt in call.prompts]
    assert lengths == [lengths[0] + more for more in (0, 1, 2, 1, 2)]  # the same prompts again
    assert [r.prompt_tokens for r in results] == [
        lengths[0], lengths[1] + lengths[3], lengths[2] + lengths[4]]
    assert [r.completion_tokens for r in results] == [  # an end of text, but where it was cut
        len("1. fine") + 1, len("1. a") + len("1. late") + 1, len("nothing") + 1 + len("1. b")]
    assert fake.seeds[:3] == [1, 2, 3] and len(set(fake.seeds)) == 5


def test_label_train_probe_run(plug, capsys, monkeypatch, jsonl, tiny, tmp_path):
    """On a real model; the words and the temperature of its tuning are kept in its folder."""
    records = [trajectory(f"query {i}", [f"{i} gold", *"bcde"]) for i in range(4)]
    path, out = tmp_path / "pairs.jsonl", tmp_path / "simulator"
    assert len(label(tmp_path, jsonl("predictions.jsonl", records), top_k=2)) == 8
    training = ["train", path, "--model", tiny, "--out", out, "--lr", "1e-3", "--words", 9,
                "--temperature", 0.3]
    command(sim, *training)
    capsys.readouterr()
    config = json.loads((out / "config.json").read_text())
    assert config["versions"]["torch"]
    assert "--overwrite" in one_line(capsys, monkeypatch, sim, *training)
    probing = ["probe", path, "--simulator", out / "model", "--out", tmp_path / "probe.json"]
    command(sim, *probing, "--simulator-max-tokens", 16)
    assert json.loads((tmp_path / "probe.json").read_text())["n"] == 8
    fake = plug(lambda prompt, seed: "1. a\n2. b", name=str(out / "model"))
    command(sim, *probing)
    command(sim, *probing, "--simulator-words", 12, "--simulator-temperature", 0)
    assert [call.sampling.temperature for call in fake.calls] == [0.3, 0]
    assert ["about 9 words" in fake.prompts[0], "about 12 words" in fake.prompts[8]] == [True, True]

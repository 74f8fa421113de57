"""The wires of evaluate.py and costs.py: each setting and each datum reaches whom it should."""

import itertools
import json
import math
import random
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import (
    FakeEngine,
    FakeGenerator,
    command,
    plug_engine,
    plug_generators,
    question,
    read_lines,
)

import costs
import evaluate
import sft_simulator as sim

# Templates so short that every prompt of an evaluation can be written down.
WORDING = {
    "policy": {"system": "policy", "user": "P {question}", "notice": "NOTICE", "last_turn": "LAST"},
    "policy_without_search": {"system": "alone", "user": "A {question}", "last_turn": "END"},
    "direct": {"system": "direct", "user": "D {question}", "cue": "DIRECT:"},
    "cot": {"system": "cot", "user": "C {question}", "cue": " COT:"},
    "rag": {"system": "rag", "user": "{documents}R {question}", "cue": "RAG:"},
    "ra_agent": {"system": "react", "user": "T {question}", "cue": " REACT:"},
    "search_o1": {"system": "o1", "user": "O {question}", "cue": " O1:", "condense_system": "boil",
                  "condense_user": "{documents}|{question}|{query}"},
    "simulator": {"system": "sim", "heading": "{Quality}!", "useful_hint": "good",
                  "user": "{k} of {words}, {quality}, {hint}: {question} ({answer}) {query}"},
}  # fmt: skip
ROWS = [
    question(0, ["Ann Lee", "Ann"], hops=1) | {"question": "Who?"},
    question(1, ["the city", "Rome"], hops=1) | {"question": "Where?"},
    question(2, ["in 1999"], hops=2) | {"question": "When?"},
]
ASKED = {row["id"]: row["question"] for row in ROWS}
STOP = ("</search>", "</answer>")
ANSWER = "<answer> Ann </answer>"
# em, f1, cover_em, answered. "in Rome": precision 1/2, recall 1 against the second golden answer.
SCORES = {"Ann": (1, 1, 1, 1), "in Rome": (0, 2 / 3, 1, 1), "": (0, 0, 0, 0), None: (0, 0, 0, 0),
          "1998": (0, 0, 0, 1)}  # fmt: skip
METRICS = ("em", "f1", "cover_em", "answered", "searches", "tokens")
OPTIONS = {"tokens_per_turn": 60, "context_tokens": 900, "observation_tokens": 71, "top_k": 4,
           "max_searches": 2, "batch_size": 2, "seed": 5, "generator": "hf", "failed_searches": 1,
           "url": "http://host/", "corpus": "c.jsonl", "limit": 9}  # fmt: skip


def found(query, question):
    return [f"{query} for {question}", "</search>, not read to the end"]


class Library(FakeEngine):
    """Other documents to every question and query, and other counts of tokens."""

    def search(self, requests):
        super().search(requests)
        return [sim.SearchResult(found(r.query, r.question), r.query != "x", len(r.query), 100,
                                 self.error(r)) for r in requests]  # fmt: skip


def results_of(out):
    return json.loads((out / "results.json").read_text())


def chat(system, user):
    return (f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{user}<|im_end|>\n"
            "<|im_start|>assistant\n")  # fmt: skip


def shown(query, who):
    """What is read of a search: 71 tokens, of which 31 are the tags and their line breaks."""
    documents = f"1. {query} for {ASKED[who]}\n2. (/search), not read to the end"
    return f"\n<information>\n{documents[:40]}\n</information>\n"


@pytest.fixture
def run(tmp_path, jsonl, monkeypatch, tokenizer):
    """Run a command with fakes; returns what they were asked."""
    prompts = tmp_path / "prompts.toml"
    prompts.write_text("\n".join("\n".join([f"[{table}]", *(f"{name} = {json.dumps(text)}"
                                                         for name, text in entries.items())])
                                 for table, entries in WORDING.items()))  # fmt: skip
    data, model = jsonl("data.jsonl", ROWS), str(tmp_path / "warm/model")
    (tmp_path / "warm").mkdir()
    (tmp_path / "warm/config.json").write_text('{"settings": {"model": "start", "lr": 3}}')

    def start(name, replies, *arguments, engine=None, documents=(), out="out", **options):
        fakes = {model: FakeGenerator(tokenizer, replies), "S": FakeGenerator(tokenizer, documents)}
        engine = engine or Library()
        loads, made = plug_generators(monkeypatch, fakes), plug_engine(monkeypatch, engine)
        own = {"out": tmp_path / out, "data": data, "batch_size": 2} if name == "run" else {}
        own |= {"model": model, "prompts": prompts} | options
        flags = [f"--{key.removesuffix('_name').replace('_', '-')}={value}"
                 for key, value in own.items() if value is not None]  # fmt: skip
        command(evaluate, name, *arguments, *flags)
        return SimpleNamespace(generator=fakes[model], simulator=fakes["S"], engine=engine,
                               loads=loads, made=made, out=tmp_path / out, model=model)  # fmt: skip

    return start


# ---------------------------------------------------------------- six evaluations by hand



def prompts_of(system, user, cue=""):
    return {who: chat(system, user.format(text, shown(text, who).strip())) + cue
            for who, text in ASKED.items()}  # fmt: skip


P, S, C = prompts_of("policy", "P {}"), prompts_of("o1", "O {}"), prompts_of("cot", "C {}")
D, R = prompts_of("direct", "D {}", "DIRECT:"), prompts_of("rag", "{1}R {0}", "RAG:")
T = prompts_of("react", "T {}", "\nThought:")
B = prompts_of("boil", "1. x for {0}\n2. (/search), not read to the end|{0}|x")
DIGEST = "\n<information>\n1. {}\n</information>\n".format
X, Y = "<search> x </search>", "<search> y </search>"
HM = "hm<|im_end|>\nNOTICE\n"  # an invalid action keeps its end-of-text token
P1, P2 = P["q1"] + Y + shown("y", "q1"), P["q2"] + HM + X + shown("x", "q2")
T1 = T["q1"] + " Search[y]\nObservation:" + shown("y", "q1")

# Tokens at most, and stop strings.
TURN, STEP, THINK, CUE = (60, STOP), (60, ("]",)), (60, ()), (32, ("\n",))
# method: calls of the generator as (sampling, [(question, prompt, reply)]),
#         searches as (question, query, its turn), records as (answer, tokens, actions)
BY_HAND = {
    "agent": ([
        (TURN, [("q0", P["q0"], X), ("q1", P["q1"], Y)]),
        (TURN, [("q0", P["q0"] + X + shown("x", "q0"), ANSWER), ("q1", P1, X)]),
        (TURN, [("q1", P1 + X + shown("x", "q1") + "LAST\n", "<answer>in Rome</answer>")]),
        (TURN, [("q2", P["q2"], "hm")]),
        (TURN, [("q2", P["q2"] + HM, X)]),
        (TURN, [("q2", P2 + "LAST\n", Y)]),
    ], [("q0", "x", 1), ("q1", "y", 1), ("q1", "x", 2), ("q2", "x", 2)],
        [("Ann", 42, "sa"), ("in Rome", 64, "ssa"), (None, 43, "iss")]),
    "direct": ([
        (CUE, [("q0", D["q0"], " Ann\n"), ("q1", D["q1"], " in Rome")]),
        (CUE, [("q2", D["q2"], "\n")]),
    ], [], [("Ann", 5, "a"), ("in Rome", 8, "a"), ("", 1, "a")]),
    "cot": ([
        (THINK, [("q0", C["q0"], "I know."), ("q1", C["q1"], "Hm.")]),
        (CUE, [("q0", C["q0"] + "I know. COT:", " Ann\n"),
               ("q1", C["q1"] + "Hm. COT:", " in Rome")]),
        (THINK, [("q2", C["q2"], "So?")]),
        (CUE, [("q2", C["q2"] + "So? COT:", "\n")]),
    ], [], [("Ann", 12, "ia"), ("in Rome", 11, "ia"), ("", 4, "ia")]),
    "rag": ([
        (CUE, [("q0", R["q0"], " Ann\n"), ("q1", R["q1"], " in Rome")]),
        (CUE, [("q2", R["q2"], "\n")]),
    ], [("q0", "Who?", 1), ("q1", "Where?", 1), ("q2", "When?", 1)],
        [("Ann", 5, "sa"), ("in Rome", 8, "sa"), ("", 1, "sa")]),
    "ra-agent": ([
        (STEP, [("q0", T["q0"], " Search[x]"), ("q1", T["q1"], " Search[y]")]),
        (STEP, [("q0", T["q0"] + " Search[x]\nObservation:" + shown("x", "q0") + "\nThought:",
                 " Finish[ Ann ]"), ("q1", T1 + "\nThought:", " Search[ x ]")]),
        (CUE, [("q1", T1 + "\nThought: Search[ x ]\nObservation:" + shown("x", "q1") + " REACT:",
                " in Rome\n")]),
        (STEP, [("q2", T["q2"], "hm")]),
        (STEP, [("q2", T["q2"] + "hm\nThought:", "Finish[ ]")]),
        (CUE, [("q2", T["q2"] + "hm\nThought:Finish[ ] REACT:", "1998\n")]),
    ], [("q0", "x", 1), ("q1", "y", 1), ("q1", "x", 2)],
        [("Ann", 24, "sa"), ("in Rome", 31, "ssa"), ("1998", 16, "iia")]),
    "search-o1": ([
        (TURN, [("q0", S["q0"], X), ("q1", S["q1"], X)]),
        (THINK, [("q0", B["q0"], "It is Ann."), ("q1", B["q1"], "Rome <search>")]),
        (TURN, [("q0", S["q0"] + X + DIGEST("It is Ann."), ANSWER),
                ("q1", S["q1"] + X + DIGEST("Rome (search)"), "hm")]),
        (TURN, [("q1", S["q1"] + X + DIGEST("Rome (search)") + HM + "LAST\n",
                 "<answer>in Rome</answer>")]),
        (TURN, [("q2", S["q2"], "hm")]),
        (TURN, [("q2", S["q2"] + HM, "hm")]),
        (TURN, [("q2", S["q2"] + HM + HM + "LAST\n", "oh")]),
        (CUE, [("q2", S["q2"] + HM + HM + "LAST\noh<|im_end|> O1:", "1998\n")]),
    ], [("q0", "x", 1), ("q1", "x", 1)],
        [("Ann", 42, "sa"), ("in Rome", 47, "sia"), ("1998", 14, "iiia")]),
}  # fmt: skip


def tokens_of(prompt):
    return len(prompt.replace("<|im_start|>", "!").replace("<|im_end|>", "!"))


def summary(rows):
    """One of three resamples in 27 holds the least or the greatest alone: they are the interval."""
    return {name: {"mean": pytest.approx(math.fsum(column) / len(column)),
                   "low": pytest.approx(min(column)), "high": pytest.approx(max(column))}
            for name, column in zip(METRICS, zip(*rows))}  # fmt: skip


@pytest.mark.parametrize("method", BY_HAND)
def test_evaluation_by_hand(run, capsys, method):
    calls, searches, expected = BY_HAND[method]
    lines = [(call, *line) for call, part in calls for line in part]
    done = run("run", [reply for *_, reply in lines], "--engine=http", method=method, **OPTIONS)
    engine = "none" if method in ("direct", "cot") else "http"

    asked = [call for call in done.generator.calls if call.prompts]
    assert done.generator.prompts == [prompt for *_, prompt, _ in lines]
    assert [call.sampling for call in asked] == [sim.Sampling(n, 0.0, stop)
                                                 for (n, stop), _ in calls]
    assert [len(call.prompts) for call in asked] == [len(part) for _, part in calls]
    turns = {who: itertools.count() for who in ASKED}
    assert done.generator.seeds == [
        sim.draw_seed("policy", 5, 0, who, 0, next(turns[who])) if call == TURN else 5
        for call, who, *_ in lines]  # fmt: skip
    (load,) = done.loads
    assert (load["name"], load["engine"], load["needs_ids"]) == (done.model, "hf", True)
    assert done.engine.requests == [
        sim.SearchRequest(query, ASKED[who], tuple(ROWS[int(who[1])]["golden_answers"]), "useful",
                          sim.draw_seed("search", 5, 0, who, 0, turn))
        for who, query, turn in searches]  # fmt: skip
    assert done.made == ([] if engine == "none" else [
        {"name": "http", "corpus": Path("c.jsonl"), "url": "http://host/", "k": 4}])

    records, rows = read_lines(done.out / "predictions.jsonl"), []
    for row, record, (answer, tokens, actions) in zip(ROWS, records, expected, strict=True):
        own = [search for search in searches if search[0] == row["id"]]
        said = [line for line in lines if line[1] == row["id"]]
        boiled = [line for line in said if "boil" in line[2]]  # what search-o1 condenses
        texts = [reply for call, _, prompt, reply in said if "boil" not in prompt]
        assert record | row == record and record["scores"] == pytest.approx(
            dict(zip(METRICS, SCORES[answer])))
        assert {name: record[name] for name in ("answer", "end", "searches", "tokens", "malformed",
                                                "simulator_prompt_tokens", "simulator_tokens")} == {
            "answer": answer, "end": "turns" if answer is None else "answered", "tokens": tokens,
            "searches": len(own), "malformed": sum(query == "x" for _, query, _ in own),
            "simulator_prompt_tokens": sum(len(query) for _, query, _ in own)
            + sum(tokens_of(prompt) for *_, prompt, _ in boiled),
            "simulator_tokens": 100 * len(own) + sum(len(reply) + 1 for *_, reply in boiled),
        }  # fmt: skip
        assert "".join(turn["action"][0] for turn in record["turns"]) == actions
        assert [turn["text"].removesuffix("<|im_end|>") for turn in record["turns"]] == (
            [""] * (method == "rag") + texts)
        assert [turn["documents"] for turn in record["turns"] if turn["documents"]] == [
            found(query, row["question"]) for _, query, _ in own]
        rows.append([*(100 * x for x in SCORES[answer]), len(own), tokens])

    results, means = results_of(done.out), [sum(column) / 3 for column in zip(*rows)]
    settings = results.pop("settings")
    assert results.pop("seconds") == math.fsum(record["seconds"] for record in records)
    assert results == {
        "benchmark": "data", "method": method, "model": done.model, "engine": engine, "n": 3,
        "failed": 0, "metrics": summary(rows), "lineage": [{"model": "start", "lr": 3}],
        "by_hops": {"1": {"n": 2} | summary(rows[:2]), "2": {"n": 1} | summary(rows[2:])},
    }  # fmt: skip
    assert settings == json.loads((done.out / "config.json").read_text())["settings"]
    used = OPTIONS | {"method": method, "engine": engine, "simulator_words": 25,
                      "simulator_temperature": 0.8, "simulator_max_tokens": 600}  # fmt: skip
    assert settings | used == settings
    captured = capsys.readouterr()
    assert f"data,{method},{done.model}:3questions" in "".join(captured.out.split())
    figures = [line.replace(", %", "").split()[:2] for line in captured.out.splitlines()
               if line.strip().startswith(METRICS)]  # fmt: skip
    assert figures == [[name, f"{mean:.2f}"] for name, mean in zip(METRICS, means)]
    assert f"EM {means[0]:.1f} %" in captured.err and "generation: fake" in captured.err


# ---------------------------------------------------------------- the other wires of run and ask


def replies(prompt, seed):
    """Searches once, then answers, under any method's template."""
    if prompt.endswith((" REACT:", " O1:")):
        return " late\n"
    if prompt.endswith(("DIRECT:", " COT:", "RAG:")):
        return " Ann\n"
    read = "<information>" in prompt
    return "<answer>Ann</answer> Finish[Ann]" if read else "<search> b </search> Search[b]"


@pytest.mark.parametrize("name", ["run", "ask"])
def test_a_simulator_is_asked_as_in_training_and_never_for_noise(run, name):
    arguments, who = (["Who?"], ["ask"]) if name == "ask" else ([], list(ASKED))
    done = run(name, replies, *arguments, documents=["1. a\n2. b"] * 3, engine_name="simulator",
               simulator="S", seed=5, top_k=2, generator="hf")  # fmt: skip
    golds = {row["id"]: " or ".join(row["golden_answers"]) for row in ROWS} | {"ask": ""}
    assert done.simulator.prompts == [
        chat("sim", f"2 of 25, useful, good: {ASKED.get(w, 'Who?')} ({golds[w]}) b") + "Useful!\n"
        for w in who]  # fmt: skip
    assert {call.sampling for call in done.simulator.calls} == {sim.Sampling(600, 0.8)}
    assert done.simulator.seeds == [sim.draw_seed("search", 5, 0, w, 0, 1) for w in who]
    assert [(load["name"], load["engine"], load["needs_ids"]) for load in done.loads] == [
        (done.model, "hf", True), ("S", "hf", False)]  # fmt: skip
    assert "1. a\n2. b" in done.generator.prompts[-1] and not done.made


@pytest.mark.parametrize("engine", ["http", "none"])
def test_ask_plays_the_agent_greedily(run, capsys, engine):
    def said(prompt, seed):
        return "a <search> x </search>" if len(prompt) < 100 else ANSWER

    done = run("ask", said, "Who?", engine_name=engine, seed=5, top_k=4, generator="hf",
               url="http://host/", corpus="c.jsonl")  # fmt: skip
    first = P["q0"] if engine == "http" else chat("alone", "A Who?")
    assert done.generator.prompts[0] == first
    assert {call.sampling for call in done.generator.calls} == {sim.Sampling(500, 0.0, STOP)}
    assert done.generator.seeds == [sim.draw_seed("policy", 5, 0, "ask", 0, t) for t in (0, 1)]
    made = [{"name": "http", "corpus": Path("c.jsonl"), "url": "http://host/", "k": 4}]
    made *= engine == "http"
    assert done.made == made
    assert [(r.query, r.question) for r in done.engine.requests] == [("x", "Who?")] * len(made)
    assert done.loads[0]["engine"] == "hf" and len(done.loads) == 1
    out = capsys.readouterr().out
    assert "a <search> x </search>" in out and ANSWER in out
    assert ("1. x for Who?\n2. (/search), not read" in out) == (engine == "http")
    assert f"Ann ({len(made)} searches)" in out.replace("\n", " ")


def test_without_an_engine_the_agent_is_offered_none(run):
    done = run("run", [ANSWER, X, ANSWER, ANSWER], engine_name="none")
    alone = {who: chat("alone", f"A {text}") for who, text in ASKED.items()}
    assert [p for p in done.generator.prompts if len(p) < 100] == [alone[who] for who in ASKED]
    assert not done.made and not done.engine.requests


def test_by_default_bm25_over_the_world_gives_three_documents(run):
    done = run("run", [ANSWER] * 3)
    corpus = sim.ROOT / "data/world/passages.jsonl"
    assert done.made == [{"name": "bm25", "corpus": corpus, "url": None, "k": 3}]
    assert [call.sampling for call in done.generator.calls] == [sim.Sampling(500, 0.0, STOP)] * 2


# Tokens that must be free after the longest prompt; what is answered where they are not.
ROOM = {"agent": (60, None), "direct": (32, None), "cot": (32, None), "rag": (32, None),
        "ra-agent": (60 + 32 + 1 - len("\nThought:"), "late"),
        "search-o1": (60, "late")}  # fmt: skip


@pytest.mark.parametrize("method", ROOM)
def test_an_episode_ends_where_its_context_is_full(run, method):
    room, instead = ROOM[method]
    done = run("run", replies, method=method, tokens_per_turn=60)
    longest = max(len(prompt) for call in done.generator.calls if call.sampling.stop
                  for prompt in call.prompts)  # fmt: skip
    for short, middle in ((0, "Ann"), (1, instead)):
        done = run("run", replies, method=method, tokens_per_turn=60, out=f"{short}",
                   context_tokens=longest + room - short)  # fmt: skip
        records = read_lines(done.out / "predictions.jsonl")
        assert [record["answer"] for record in records] == ["Ann", middle, "Ann"]


def test_limit_draws_with_the_seed_from_the_benchmark(run):
    rows = read_lines(sim.ROOT / "data/world/test.jsonl")
    for seed in (0, 5):
        draw = random.Random(sim.draw_seed("limit", seed)).sample(range(len(rows)), 2)
        done = run("run", replies, benchmark="world", data=None, limit=2, seed=seed, out=f"{seed}")
        assert [record["id"] for record in read_lines(done.out / "predictions.jsonl")] == [
            rows[i]["id"] for i in sorted(draw)]  # fmt: skip
        assert results_of(done.out)["benchmark"] == "world" and results_of(done.out)["n"] == 2


def test_failures_add_up_over_batches_and_a_resumed_run_goes_on(run):
    bad = Library(error=lambda request: "HTTP 400" * (request.question != "Who?"))
    with pytest.raises(sim.UserError, match="2 searches failed .--failed-searches allows 1"):
        run("run", replies, method="rag", failed_searches=1, engine=bad)
    done = run("run", replies, "--resume", method="rag", failed_searches=2)
    assert [request.question for request in done.engine.requests] == ["When?"]
    results = results_of(done.out)
    assert (results["n"], results["failed"], results["metrics"]["em"]["mean"]) == (2, 1, 50)
    assert {hops: part["n"] for hops, part in results["by_hops"].items()} == {"1": 1, "2": 1}
    records = read_lines(done.out / "predictions.jsonl")
    assert [(record["end"], record["error"], bool(record["scores"])) for record in records] == [
        ("answered", None, True), ("failed", "HTTP 400", False), ("answered", None, True)]


def test_a_run_is_resumed_with_its_own_settings_alone_and_overwritten_when_asked(run):
    run("run", replies)
    for name, value in (OPTIONS | {"method": "rag", "engine_name": "none"}).items():
        if name not in ("failed_searches", "batch_size"):
            with pytest.raises(sim.UserError, match=f"settings: {name.split('_name')[0]}$"):
                run("run", replies, "--resume", **{name: value})
    with pytest.raises(sim.UserError, match="--overwrite"):
        run("run", replies)
    done = run("run", replies, "--overwrite", method="direct")
    assert len(read_lines(done.out / "predictions.jsonl")) == 3
    assert results_of(done.out)["method"] == "direct"


def test_seconds_of_a_batch_are_shared_by_its_questions(run, monkeypatch):
    monkeypatch.setattr(time, "perf_counter", itertools.count().__next__)  # one second a call
    done = run("run", replies, method="rag")
    seconds = [record["seconds"] for record in read_lines(done.out / "predictions.jsonl")]
    assert seconds == [0.5, 0.5, 1.0] and results_of(done.out)["seconds"] == 2.0


# ---------------------------------------------------------------- score, compare, table, report


def printed(capsys):
    """Lines of what was printed, their spaces made single."""
    return [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]


def test_score_and_compare_print_what_the_runs_hold(run, capsys):
    answers = {"a": [" Ann\n", " in Rome\n", "\n"], "b": [" Ann\n", " Rome\n", " 1998\n"]}
    a, b = (run("run", texts, method="direct", out=out).out for out, texts in answers.items())
    capsys.readouterr()
    command(evaluate, "score", a, "--json")
    scored, metrics = json.loads(capsys.readouterr().out), results_of(a)["metrics"]
    intervals = scored.pop("intervals")
    assert scored == {"n": 3} | {name: metrics[name]["mean"] for name in METRICS[:4]}
    assert intervals == {n: [metrics[n]["low"], metrics[n]["high"]] for n in METRICS[:4]}
    command(evaluate, "score", b / "predictions.jsonl")
    lines = printed(capsys)
    assert "f1, % 66.67 0.00 to 100.00" in lines and "answered, % 100.00 100.00 to 100.00" in lines
    command(evaluate, "compare", a, b)
    lines = printed(capsys)
    for line in ("A B B - A 95 % interval p", "em 33.33 66.67 +33.33 +0.00 to +100.00 1.0000",
                 "f1 55.56 66.67 +11.11 +0.00 to +33.33 1.0000", "3 questions, in percent",
                 "cover_em 66.67 66.67 +0.00 +0.00 to +0.00 1.0000"):  # fmt: skip
        assert line in lines


def evaluation(folder, **more):
    """results.json of an evaluation in which no two figures are equal."""
    folder.mkdir(parents=True)
    metrics = {name: {"mean": 10.0 * i, "low": 10.0 * i - 1, "high": 10.0 * i + 2}
               for i, name in enumerate(METRICS, 1)}  # fmt: skip
    results = {"benchmark": "nq", "method": "agent", "model": "x/Qwen2.5-3B", "engine": "bm25",
               "n": 77, "metrics": metrics, "seconds": 60.0}  # fmt: skip
    (folder / "results.json").write_text(json.dumps(results | more))
    return folder


@pytest.mark.parametrize(("options", "label", "nq"), [
    (["--paper=table3"], "Qwen-2.5-3B, untrained", None),
    (["--paper=table4"], "Qwen-2.5-3B, Base Model", "table4_simulators"),
    (["--paper-model=LLaMA-3.2-3B"], "LLaMA-3.2-3B, untrained", None),
])  # fmt: skip
def test_table_stands_beside_the_paper_that_is_named(tmp_path, capsys, options, label, nq):
    command(evaluate, "table", evaluation(tmp_path / "a"), "--markdown", *options)
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed(capsys)]
    assert ["agent, x/Qwen2.5-3B", "10.0 ±1.5", "-"] in lines
    assert lines[3][0] == f"paper: {label}"
    if nq:
        paper = json.loads((sim.ROOT / "data/paper.json").read_text())[nq]["rows"]["Base Model"]
        assert lines[3][1] == f"{paper['nq']:.1f}"
        assert lines[4][1] == f"{10 - paper['nq']:+.1f} ±1.5"


def test_report_puts_every_figure_in_its_column(tmp_path, monkeypatch, jsonl):
    from matplotlib.axes import Axes

    bars, curves = [], []
    barh, plot = Axes.barh, Axes.plot

    def record_bar(ax, place, width, **more):
        bars.append((place, width, more.get("xerr")))
        return barh(ax, place, width, **more)

    def record_curve(ax, x, y, *args, **more):
        curves.append((list(x), list(y)))
        return plot(ax, x, y, *args, **more)

    monkeypatch.setattr(Axes, "barh", record_bar)
    monkeypatch.setattr(Axes, "plot", record_curve)
    hops = {str(n): {"n": 5, "em": {"mean": 50.0 + n, "low": 40, "high": 60}} for n in (1, 2)}
    runs = [evaluation(tmp_path / "one", by_hops=hops),
            evaluation(tmp_path / "two", by_hops={"2": hops["2"]}),
            evaluation(tmp_path / "three", method="rag", benchmark="popqa", engine="http"),
            tmp_path / "zero"]  # fmt: skip
    for folder, right in zip(runs, (("Ann", "x"), ("Ann", "Rome"), ("x", "x"))):
        jsonl(folder / "predictions.jsonl", [row | {"answer": a} for row, a in zip(ROWS, right)])
    runs[3].mkdir()
    jsonl("zero/metrics.jsonl", [
        {"step": i, "reward/mean": 0.1 * i, "search/per_episode": 1.0 + i, "noise/p": 0.5 - i / 50,
         "time/step": 2400, "time/search": 1200, "cost/searches": 200} for i in range(3)])
    jsonl("zero/config.json", [{"settings": {"engine": "simulator"},
                                "hardware": {"device": "cuda", "name": "A100-80GB", "count": 2}}])
    command(evaluate, "report", *runs, "--out", tmp_path / "page")
    text = (tmp_path / "page/report.md").read_text()
    metrics = ("| 77 | 10.0 (9.0 to 12.0) | 20.0 (19.0 to 22.0) | 30.0 (29.0 to 32.0) "
               "| 50.00 (49.00 to 52.00) |")  # fmt: skip
    for line in (
        "| engine | n | EM, % | F1, % | cover-EM, % | searches a question |",
        f"| one | nq | agent | bm25 {metrics}", f"| three | popqa | rag | http {metrics}",
        "| EM, %, by number of hops | 1 | 2 |", "| two | - | 52.0 (40.0 to 60.0) |",
        "| one | 51.0 (40.0 to 60.0) | 52.0 (40.0 to 60.0) |",
        "The same 2 questions, **two** minus **one**: EM +50.0 points (95 % interval +0.0 to "
        "+100.0: it holds 0; p = 1.0000), F1 +50.0 (+0.0 to +100.0).",
        "| run | steps | reward | searches an episode | noise p |",
        "| zero | 3 | 0.00 to 0.20 | 1.00 to 3.00 | 0.50 to 0.46 |",
        # 600 x $275 / 30,000; 2 GPUs for 1 and for 2 hours at $1.475
        "| zero | 600 | $5.50 | $2.95 | $5.90 | 2 x A100-80GB |", "| zero | 7,200 |",
        "| three | 60 |",
    ):  # fmt: skip
        assert line in text, line
    em = (10.0, [[1.0], [2.0]])
    assert bars[:3] == [(0, *em), (1, *em), (0, *em)]  # one and two, then the other benchmark's
    assert [width for _, width, _ in bars[3:]] == pytest.approx([5.5, 2.95, 5.9])
    assert [x for x, _ in curves] == [[0, 1, 2]] * 5
    reward, mean_reward, searches, mean_searches, noise = (y for _, y in curves)
    assert [*reward, *mean_reward] == pytest.approx([0.0, 0.1, 0.2, 0.05, 0.1, 0.15])
    assert [*searches, *mean_searches] == pytest.approx([1, 2, 3, 1.5, 2, 2.5])
    assert noise == pytest.approx([0.5, 0.48, 0.46])


# ---------------------------------------------------------------- costs.py

PRICES = "".join(f'[{name}]\n{price}\ndate = "2025"\nsource = "x"\n' for name, price in {
    "search.serpapi": "usd = 10\nsearches = 1000", "search.cheap": "usd = 1\nsearches = 1000",
    "device.gpu": "usd_per_hour = 3.6\nbf16_tflops = 1"}.items())  # fmt: skip


@pytest.mark.parametrize(("length", "lines"), [
    (["--hours=2"], [
        "2 steps x 3 prompts x 5 rollouts x 4 searches = 120 searches", "cheap simulator saved",
        "2.00 h on gpu at $3.6 an hour for each GPU", "search side $0.12 $7.20 -5900.0 %",
        "policy's GPUs $28.80 $28.80", "whole run $28.92 $36.00 -24.5 %",
        "No break-even: a simulated search costs $0.06, one at cheap $0.001",
        "searches cheap simulator cheaper", "1,000 $1.00 $60.00 cheap"]),
    (["--seconds-per-step=1800"], ["1.00 h on gpu at $3.6 an hour for each GPU"]),
    # 30 x 100 x 10 x 4e11 = 1.2e16 and 120 x 25 x 2 x 1e11 = 6e14, at 0.5e12 a second and GPU
    (["--policy-params=4e11", "--episode-tokens=100", "--simulator-params=1e11",
      "--search-tokens=25", "--utilisation=0.5"], [
        "/ (4 GPUs x 1 TFLOP/s x 0.5) = 1.67 h", "/ (1 GPUs x 1 TFLOP/s x 0.5) = 0.33 h",
        "2.00 h on gpu at $3.6 an hour for each GPU"]),
], ids=["hours", "seconds", "flop"])  # fmt: skip
def test_plan_takes_each_option(tmp_path, capsys, length, lines):
    (tmp_path / "prices.toml").write_text(PRICES)
    command(costs, "plan", "--prices", tmp_path / "prices.toml", "--steps=2", "--prompts=3",
            "--rollouts=5", "--searches=4", "--gpu=gpu", "--api=cheap", "--simulator-gpus=1",
            "--policy-gpus=4", *length)  # fmt: skip
    output = printed(capsys)
    for line in lines:
        assert line in output, line


def test_costs_of_runs_add_up_in_every_column(tmp_path, jsonl, capsys, monkeypatch):
    """On 1 and on 2 GPUs at $0.001 a second; the second run has paid $1 to the API it searched."""
    monkeypatch.chdir(tmp_path)
    Path("prices.toml").write_text(PRICES)
    step = {"cost/searches": 1000, "cost/policy_tokens": 1, "cost/simulator_prompt_tokens": 20,
            "cost/simulator_tokens": 300, "time/step": 1000, "time/rollout": 100,
            "time/search": 200, "time/reference": 300, "time/update": 150, "time/sync": 50}
    for count, (run, engine, more) in enumerate(
            [("a/run", "simulator", []), ("b/run", "cheap", [{"time/sync": 0}])], start=1):
        Path(run).mkdir(parents=True)
        hardware = {"device": "cuda", "name": "gpu", "count": count}
        jsonl(f"{run}/config.json", [{"settings": {"engine": engine}, "hardware": hardware}])
        jsonl(f"{run}/metrics.jsonl", [step, *more])
    with open("a/run/metrics.jsonl", "a") as file:
        file.write("{")
    command(costs, "run", "a/run", "b/run", "--prices", "prices.toml")
    lines = printed(capsys)
    for line in (
        "run engine searches simulated in out serpapi cheap",
        "a/run simulator 1,000 20 300 $10.00 $1.00", "b/run cheap 1,000 20 300 $10.00 $1.00",
        "sum 2,000 40 600 $20.00 $2.00", "run rollout search reference update sync other step",
        "b/run 200.0 400.0 600.0 300.0 100.0 400.0 2,000.0",
        "sum 300.0 600.0 900.0 450.0 150.0 600.0 3,000.0",
        "$0.30 $0.60 $0.90 $0.45 $0.15 $0.60 $3.00",
        "run search side serpapi saved whole run with serpapi saved",
        "a/run $0.20 $10.00 98.0 % $1.00 $10.80 90.7 %",
        "b/run $1.40 $10.00 86.0 % $3.00 $11.60 74.1 %",
        "sum $1.60 $20.00 92.0 % $4.00 $22.40 82.1 %",
        "a/run: 1 x gpu at $3.6 an hour", "b/run: 2 x gpu at $3.6 an hour",
        "a/run: metrics.jsonl, line 2: cut off, as a killed process leaves it; skipped",
    ):  # fmt: skip
        assert line in lines, (line, lines)
    assert any(line.startswith("b/run: not reported by every step") for line in lines)
    assert sum("cut off" in line for line in lines) == 1

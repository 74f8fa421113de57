"""The wires of evaluate.py and costs.py: each setting and each datum reaches whom it should."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
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
# em, f1, cover_em, answered. "in Rome": precision 1/2 and recall 1 against the second golden answer.
SCORES = {"Ann": (1, 1, 1, 1), "in Rome": (0, 2 / 3, 1, 1), "": (0, 0, 0, 0), None: (0, 0, 0, 0),
          "1998": (0, 0, 0, 1)}  # fmt: skip
METRICS = ("em", "f1", "cover_em", "answered", "searches", "tokens")
OPTIONS = {"tokens_per_turn": 60, "context_tokens": 900, "observation_tokens": 71, "top_k": 4,
           "max_searches": 2, "batch_size": 2, "seed": 5, "generator": "hf", "failed_searches": 1,
           "url": "http://host/retrieve", "corpus": "passages.jsonl", "limit": 9}  # fmt: skip


class Library(FakeEngine):
    """Other documents to every question and query, and other counts of tokens."""

    def search(self, requests):
        return [sim.SearchResult([f"{r.query} for {r.question}", "</search>, not read to the end"],
                                 r.query != "x", len(r.query), 100, self.error(r))
                for r, _ in zip(requests, super().search(requests))]  # fmt: skip


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
    prompts.write_text("".join(f"[{table}]\n" + "".join(f"{n} = {json.dumps(t)}\n" for n, t in e.items())
                               for table, e in WORDING.items()))  # fmt: skip
    data, model = jsonl("data.jsonl", ROWS), str(tmp_path / "warm/model")
    (tmp_path / "warm").mkdir()
    (tmp_path / "warm/config.json").write_text('{"settings": {"model": "start", "lr": 3}}')

    def start(name, replies, *arguments, engine=None, simulator=(), out="out", **options):
        fakes = {model: FakeGenerator(tokenizer, replies), "S": FakeGenerator(tokenizer, simulator)}
        engine = engine or Library()
        loads, made = plug_generators(monkeypatch, fakes), plug_engine(monkeypatch, engine)
        own = {"out": tmp_path / out, "data": data, "batch_size": 2} if name == "run" else {}
        own |= {"model": model, "prompts": prompts} | options
        flags = [f"--{key.replace('_', '-')}={v}" for key, v in own.items() if v is not None]
        command(evaluate, name, *arguments, *flags)
        return SimpleNamespace(generator=fakes[model], simulator=fakes["S"], engine=engine,
                               loads=loads, made=made, out=tmp_path / out, model=model)  # fmt: skip

    return start


# ---------------------------------------------------------------- six evaluations by hand

P, O, T, R = ({q: chat(system, f"{letter} {text}") for q, text in ASKED.items()} for system, letter in
              [("policy", "P"), ("o1", "O"), ("react", "T"), ("cot", "C")])  # fmt: skip
D = {who: chat("direct", f"D {text}") + "DIRECT:" for who, text in ASKED.items()}
G = {who: chat("rag", f"{shown(text, who).strip()}R {text}") + "RAG:" for who, text in ASKED.items()}
B = {who: chat("boil", f"1. x for {text}\n2. (/search), not read to the end|{text}|x")
     for who, text in ASKED.items()}  # fmt: skip
SEARCH = "<search> {} </search>".format
DIGEST = "\n<information>\n1. {}\n</information>\n".format
REACT = " Search[{}]".format

# method: calls as (max tokens, stop, [(question, turn or None, prompt, reply)]),
#         searches as (question, query, its turn), records as (answer, end, tokens, actions)
BY_HAND = {
    "agent": ([
        (60, STOP, [("q0", 0, P["q0"], SEARCH("x")), ("q1", 0, P["q1"], SEARCH("b"))]),
        (60, STOP, [("q0", 1, P["q0"] + SEARCH("x") + shown("x", "q0"), "<answer> Ann </answer>"),
                    ("q1", 1, P["q1"] + SEARCH("b") + shown("b", "q1"), SEARCH("c"))]),
        (60, STOP, [("q1", 2, P["q1"] + SEARCH("b") + shown("b", "q1") + SEARCH("c")
                     + shown("c", "q1") + "LAST\n", "<answer>in Rome</answer>")]),
        (60, STOP, [("q2", 0, P["q2"], "hm")]),
        (60, STOP, [("q2", 1, P["q2"] + "hm<|im_end|>\nNOTICE\n", SEARCH("x"))]),
        (60, STOP, [("q2", 2, P["q2"] + "hm<|im_end|>\nNOTICE\n" + SEARCH("x") + shown("x", "q2")
                     + "LAST\n", SEARCH("y"))]),
    ], [("q0", "x", 1), ("q1", "b", 1), ("q1", "c", 2), ("q2", "x", 2)],
        [("Ann", "answered", 42, "sa"), ("in Rome", "answered", 64, "ssa"), (None, "turns", 43, "iss")]),
    "direct": ([
        (32, ("\n",), [("q0", None, D["q0"], " Ann\n"), ("q1", None, D["q1"], " in Rome")]),
        (32, ("\n",), [("q2", None, D["q2"], "\n")]),
    ], [], [("Ann", "answered", 5, "a"), ("in Rome", "answered", 8, "a"), ("", "answered", 1, "a")]),
    "cot": ([
        (60, (), [("q0", None, R["q0"], "I know."), ("q1", None, R["q1"], "Hm.")]),
        (32, ("\n",), [("q0", None, R["q0"] + "I know. COT:", " Ann\n"),
                       ("q1", None, R["q1"] + "Hm. COT:", " in Rome")]),
        (60, (), [("q2", None, R["q2"], "So?")]),
        (32, ("\n",), [("q2", None, R["q2"] + "So? COT:", "\n")]),
    ], [], [("Ann", "answered", 12, "ia"), ("in Rome", "answered", 11, "ia"), ("", "answered", 4, "ia")]),
    "rag": ([
        (32, ("\n",), [("q0", None, G["q0"], " Ann\n"), ("q1", None, G["q1"], " in Rome")]),
        (32, ("\n",), [("q2", None, G["q2"], "\n")]),
    ], [("q0", "Who?", 1), ("q1", "Where?", 1), ("q2", "When?", 1)],
        [("Ann", "answered", 5, "sa"), ("in Rome", "answered", 8, "sa"), ("", "answered", 1, "sa")]),
    "ra-agent": ([
        (60, ("]",), [("q0", None, T["q0"] + "\nThought:", REACT("x")),
                      ("q1", None, T["q1"] + "\nThought:", REACT("b"))]),
        (60, ("]",), [
            ("q0", None, T["q0"] + "\nThought: Search[x]\nObservation:" + shown("x", "q0")
             + "\nThought:", " Finish[ Ann ]"),
            ("q1", None, T["q1"] + "\nThought: Search[b]\nObservation:" + shown("b", "q1")
             + "\nThought:", REACT("c"))]),
        (32, ("\n",), [
            ("q1", None, T["q1"] + "\nThought: Search[b]\nObservation:" + shown("b", "q1")
             + "\nThought: Search[c]\nObservation:" + shown("c", "q1") + " REACT:", " in Rome\n")]),
        (60, ("]",), [("q2", None, T["q2"] + "\nThought:", "hm")]),
        (60, ("]",), [("q2", None, T["q2"] + "\nThought:hm\nThought:", "Finish[ ]")]),
        (32, ("\n",), [("q2", None, T["q2"] + "\nThought:hm\nThought:Finish[ ] REACT:", "1998\n")]),
    ], [("q0", "x", 1), ("q1", "b", 1), ("q1", "c", 2)],
        [("Ann", "answered", 24, "sa"), ("in Rome", "answered", 29, "ssa"),
         ("1998", "answered", 16, "iia")]),
    "search-o1": ([
        (60, STOP, [("q0", 0, O["q0"], SEARCH("x")), ("q1", 0, O["q1"], SEARCH("x"))]),
        (60, (), [("q0", None, B["q0"], "It is Ann."), ("q1", None, B["q1"], "Rome <search>")]),
        (60, STOP, [("q0", 1, O["q0"] + SEARCH("x") + DIGEST("It is Ann."), "<answer> Ann </answer>"),
                    ("q1", 1, O["q1"] + SEARCH("x") + DIGEST("Rome (search)"), "hm")]),
        (60, STOP, [("q1", 2, O["q1"] + SEARCH("x") + DIGEST("Rome (search)") + "hm<|im_end|>"
                     "\nNOTICE\nLAST\n", "<answer>in Rome</answer>")]),
        (60, STOP, [("q2", 0, O["q2"], "a")]),
        (60, STOP, [("q2", 1, O["q2"] + "a<|im_end|>\nNOTICE\n", "b")]),
        (60, STOP, [("q2", 2, O["q2"] + "a<|im_end|>\nNOTICE\nb<|im_end|>\nNOTICE\nLAST\n", "c")]),
        (32, ("\n",), [("q2", None, O["q2"] + "a<|im_end|>\nNOTICE\nb<|im_end|>\nNOTICE\nLAST\n"
                        "c<|im_end|> O1:", "1998\n")]),
    ], [("q0", "x", 1), ("q1", "x", 1)],
        [("Ann", "answered", 42, "sa"), ("in Rome", "answered", 47, "sia"),
         ("1998", "answered", 11, "iiia")]),
}  # fmt: skip


def seed_of(who, turn):
    return 5 if turn is None else sim.draw_seed("policy", 5, 0, who, 0, turn)


def summary(rows):
    """One of three resamples in 27 holds the least or the greatest alone: they are the interval."""
    return {name: {"mean": pytest.approx(math.fsum(column) / len(column)),
                   "low": pytest.approx(min(column)), "high": pytest.approx(max(column))}
            for name, column in zip(METRICS, zip(*rows))}  # fmt: skip


@pytest.mark.parametrize("method", BY_HAND)
def test_evaluation_by_hand(run, capsys, method):
    calls, searches, expected = BY_HAND[method]
    lines = [line for _, _, part in calls for line in part]
    done = run("run", [reply for *_, reply in lines], "--engine=http", method=method, **OPTIONS)
    engine = "none" if method in ("direct", "cot") else "http"

    asked = [call for call in done.generator.calls if call.prompts]
    assert done.generator.prompts == [prompt for *_, prompt, _ in lines]
    assert [call.sampling for call in asked] == [sim.Sampling(n, 0.0, stop) for n, stop, _ in calls]
    assert [call.seeds for call in asked] == [[seed_of(*line[:2]) for line in p] for *_, p in calls]
    (load,) = done.loads
    assert (load["name"], load["engine"], load["needs_ids"]) == (done.model, "hf", True)
    requests = [
        sim.SearchRequest(query, ASKED[who], tuple(ROWS[int(who[1])]["golden_answers"]), "useful",
                          sim.draw_seed("search", 5, 0, who, 0, turn))
        for who, query, turn in searches]  # fmt: skip
    assert done.engine.requests == requests
    assert [(m["name"], m["url"], m["k"], str(m["corpus"])) for m in done.made] == (
        [("http", OPTIONS["url"], 4, "passages.jsonl")] if engine == "http" else [])

    records, rows = read_lines(done.out / "predictions.jsonl"), []
    for row, record, (answer, end, tokens, actions) in zip(ROWS, records, expected, strict=True):
        assert {key: record[key] for key in row} == row
        own = [s for s in searches if s[0] == row["id"]]
        scores = dict(zip(METRICS, SCORES[answer]))
        assert (record["answer"], record["end"], record["tokens"]) == (answer, end, tokens)
        assert record["scores"] == pytest.approx(scores) and record["searches"] == len(own)
        assert "".join(turn["action"][0] for turn in record["turns"]) == actions
        said = [r for who, *_, p, r in lines if who == row["id"] and "boil" not in p]
        texts = [turn["text"].removesuffix("<|im_end|>") for turn in record["turns"]]
        assert texts == [""] * (method == "rag") + said
        documents = [[f"{query} for {ASKED[who]}", "</search>, not read to the end"]
                     for who, query, _ in own]  # fmt: skip
        assert [turn["documents"] for turn in record["turns"] if turn["documents"]] == documents
        assert record["malformed"] == sum(query == "x" for _, query, _ in own)
        boiled = [line for line in lines if line[0] == row["id"] and "boil" in line[2]]
        read = sum(len(query) for _, query, _ in own)
        read += sum(len(p.replace("<|im_start|>", "!").replace("<|im_end|>", "!"))
                    for *_, p, _ in boiled)  # fmt: skip
        written = 100 * len(own) + sum(len(reply) + 1 for *_, reply in boiled)
        assert (record["simulator_prompt_tokens"], record["simulator_tokens"]) == (read, written)
        rows.append([*(100 * x for x in SCORES[answer]), len(own), tokens])

    results = json.loads((done.out / "results.json").read_text())
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
    assert {name: settings[name] for name in used} == used
    captured = capsys.readouterr()
    title = f"data,{method},{done.model}:3questions"
    assert title in "".join(captured.out.split())
    means = {name: column["mean"].expected for name, column in summary(rows).items()}
    table = dict(line.replace(", %", "").split(maxsplit=1) for line in captured.out.splitlines()
                 if line.strip().startswith(METRICS))  # fmt: skip
    assert {name: float(text.split()[0]) for name, text in table.items()} == pytest.approx(
        means, abs=0.005)
    assert f"EM {means['em']:.1f} %" in captured.err and "generation: fake" in captured.err


# ---------------------------------------------------------------- its other wires

ANSWER = "<answer> Ann </answer>"


def results_of(out):
    return json.loads((out / "results.json").read_text())


SIMULATED = ["1. a\n2. b", "1. c\n2. d", "1. e\n2. f"]


@pytest.mark.parametrize("name", ["run", "ask"])
def test_a_simulator_is_asked_as_in_training_and_never_for_noise(run, name):
    """25 words, temperature 0.8, 600 tokens; the load says that text is enough."""
    searches = lambda prompt, seed: SEARCH("b") if "<search>" not in prompt else ANSWER  # noqa: E731
    done = run(name, searches, *["Who?"] * (name == "ask"), simulator=SIMULATED, engine="simulator") \
        if False else run(name, searches, *["Who?"] * (name == "ask"), "--engine=simulator",
                          simulator=SIMULATED, seed=5, top_k=2, generator="hf", **{"simulator": "S"})

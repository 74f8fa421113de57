"""Every behaviour of the fault server ends in the bound and in one line, and costs one episode."""

import asyncio
import json
import time
from collections import Counter
from dataclasses import replace
from urllib.parse import quote, unquote

import pytest
from faults import (COMPLETION_FORMS, FAULTS, LOGPROB_FORMS, MODELS_FORMS, SEARCH_FORMS, completion,
                    misbehave)
from helpers import (PROMPTS, FakeGenerator, command, one_line, plug_generators, question,
                     read_lines)

import evaluate
import sft_simulator as sim
import train_rl as rl
from plumbing import remote
from plumbing.cli import run_cli
from plumbing.engines import ENGINES, Engine, SearchRequest
from plumbing.generate import Sampling
from plumbing.remote import OutsideError, RetryPolicy, in_threads
from plumbing.served import ServerGenerator
from plumbing.text import encode
from plumbing.transport import event_loop
from plumbing.web import HTTPEngine

QUICK = RetryPolicy(timeout=0.4, attempts=2, first_wait=0.01, longest_wait=0.1)
PATIENT = RetryPolicy(timeout=30, attempts=2, first_wait=0.01, longest_wait=0.1)
HEAVY = ("33 MB", "endless body", "endless gzip header", "gzip of 64 MB of blanks")  # seconds
EARNEST = RetryPolicy(timeout=1.5, attempts=2, first_wait=0.01, longest_wait=0.1)
CROWDED = replace(EARNEST, timeout=8)  # dozens at a time, floods among them, in one process
SLACK = 2.0  # seconds that a busy machine may add to a bound
OUTCOMES = {name: fault.outcome for name, fault in FAULTS.items()}
SEARCH = OUTCOMES | dict.fromkeys(SEARCH_FORMS, "transient")
SERVED = OUTCOMES | dict.fromkeys(COMPLETION_FORMS, "transient")
SOME = dict(list(SEARCH.items())[::6]) | {"documents: text is null": "transient"}


def without_heavy(faults):
    return {fault: outcome for fault, outcome in faults.items() if fault not in HEAVY}


def searcher(handler, body):
    """A retrieval server whose query names its fault."""
    about = [{"document": {"contents": f'"Peru"\nThe capital of {body["query"]} is Lima.'}}]
    misbehave(body["query"], handler, {"result": [about]})


def policy_for(fault):
    """A short timeout where the clock ends the fault, and only there: the machine may be busy."""
    return QUICK if fault in FAULTS and FAULTS[fault].stalls else PATIENT


def judge(fault, outcome, error, calls, seconds) -> str:
    """What is wrong with how a fault ended; "" if nothing."""
    policy = policy_for(fault)
    wrong = [] if seconds < policy.bound + SLACK else [f"{seconds:.1f} s"]
    if (outcome == "answer") != (error is None):
        wrong.append(f"{outcome}, yet {error}")
    given_up = "given up after 2 attempts" in (error or "")
    # A busy machine may not have accepted a connection that it was late for.
    enough = calls == 1 + given_up or policy is QUICK
    if given_up != (outcome == "transient") or not enough:
        wrong.append(f"{outcome}, yet {calls} calls: {error}")
    if error and not (error.isprintable() and error.startswith("http://127.0.0.1")):
        wrong.append(repr(error))
    return ", ".join(wrong)


def try_all(faults, ask, server):
    """Faults that did not end as they should, several at a time; ask(fault) -> error."""
    def one(fault):
        begun = time.monotonic()
        error = ask(fault)
        return error, time.monotonic() - begun

    outcomes = dict(zip(faults, in_threads(one, list(faults), 8)))
    for _ in range(100):  # a cancelled attempt may still be closing its connection
        if not asyncio.all_tasks(event_loop()):
            break
        time.sleep(0.05)
    assert not asyncio.all_tasks(event_loop())  # nothing goes on behind the caller's back
    asked = Counter(body.get("query") or body.get("model") for _, body, _ in server.calls)
    return {fault: wrong for fault, (error, seconds) in outcomes.items()
            if (wrong := judge(fault, faults[fault], error, asked[fault], seconds))}


def test_a_retrieval_server_fails_in_every_way(serve, tmp_path):
    server = serve(searcher)
    engines = {policy: HTTPEngine(server.url, 2, policy, tmp_path / "searches.sqlite", workers=8)
               for policy in (QUICK, PATIENT)}

    def ask(fault):
        (result,) = engines[policy_for(fault)].search([SearchRequest(fault)])
        assert bool(result.documents) == (result.error is None)
        return result.error

    assert try_all(SEARCH, ask, server) == {}
    assert len(SEARCH) >= 60


def completions(tokenizer):
    """A model server whose model names its fault."""
    def behave(handler, body):
        if handler.path.endswith("/models"):
            fault = unquote(handler.path.split("/")[1])
            return misbehave(fault, handler, {"data": [{"id": "a", "root": None}]})
        ids = encode(tokenizer, "1. a\n2. b")
        return misbehave(body["model"], handler, completion(token_ids=ids))

    return behave


@pytest.fixture
def served(monkeypatch, tiny, tokenizer):
    """A generator for a served model of this name, the server being up."""
    monkeypatch.setattr("plumbing.served.served_replicas", lambda urls: (remote.Replicas(urls), ""))
    monkeypatch.setattr("plumbing.served.load_tokenizer", lambda name: tokenizer)

    def make(url, model, **options):
        generator = ServerGenerator([f"{url}/v1"], retry_policy=policy_for(model), **options)
        generator.model = model
        return generator

    return make


def test_a_served_simulator_fails_in_every_way(serve, served, tokenizer):
    server = serve(completions(tokenizer))

    def ask(fault):
        engine = sim.SimulatedEngine(served(server.url, fault, needs_ids=False), 2, PROMPTS)
        (result,) = engine.search([SearchRequest("Peru")])
        assert (result.documents == ["a", "b"]) == (result.error is None)
        return result.error

    assert try_all(SERVED, ask, server) == {}


def test_a_served_policy_is_given_no_odd_ids_or_log_probs(serve, served, tokenizer):
    server = serve(completions(tokenizer))

    def ask(fault):
        return served(server.url, fault).generate([[5]], Sampling(50), [0])[0].error

    forms = {name: "transient" for name in LOGPROB_FORMS}
    assert try_all(forms, ask, server) == {}


def test_odd_cards_of_models_are_refused_in_one_line(serve, tokenizer):
    server = serve(completions(tokenizer))

    def ask(fault):
        try:
            ServerGenerator([f"{server.url}/{quote(fault, safe='')}"])
        except OutsideError as error:
            return str(error)

    for fault, error in zip(MODELS_FORMS, in_threads(ask, list(MODELS_FORMS), 16)):
        assert error and "another form than expected; given up" in error, fault


@pytest.fixture
def http(monkeypatch, tmp_path):
    """--engine http with a cache of its own and, unless another is plugged in, little patience."""
    def plug(policy=None):
        monkeypatch.setitem(ENGINES, "http", Engine(lambda s: HTTPEngine(
            s.url, s.top_k, policy or policy_for(s.query), tmp_path / "searches.sqlite", 16)))

    plug()
    return plug


def simulating(folder, tokenizer):
    """A served simulator; the query in its prompt names its fault."""
    sound = completion(token_ids=encode(tokenizer, "1. It is Lima.\n2. b"))

    def behave(handler, body):
        if handler.path == "/v1/models":
            return handler.reply({"data": [{"id": "s", "root": str(folder)}]})
        prompt = tokenizer.decode(body["prompt"])
        fault = prompt.rpartition("Query: ")[2].partition("<|im_end|>")[0]
        return misbehave(fault, handler, sound)

    return behave


@pytest.fixture
def world(http, serve, monkeypatch, jsonl, tmp_path, tiny, tokenizer):
    """Run `train` or `evaluate.py run` in tmp_path/out on questions that each name a fault, with a
    scripted policy and a server that is started here."""
    monkeypatch.setattr(rl, "peak_flops", lambda device: 1e12)  # which takes seconds
    servers = {"http": lambda: serve(searcher), "simulator": lambda: serve(
        simulating(tiny, tokenizer))}

    def policy(prompt, seed):
        asked = prompt.rpartition("Question: ")[2].partition("<|im_end|>")[0].strip()
        return ("<answer> Lima </answer>" if "is Lima." in prompt
                else f"<search> {asked} </search>")

    class World:
        out = tmp_path / "run"

        def __init__(self, module, engine, faults, patience=EARNEST):
            http(patience)
            self.server = servers[engine]()
            url, models = f"{self.server.url}/v1", {}
            rag, served = FakeGenerator(tokenizer, lambda *_: " Lima\n"), engine == "simulator"
            models[str(tiny)] = rag if module is evaluate else FakeGenerator(tokenizer, policy)
            if served:
                models[url] = ServerGenerator([url], needs_ids=False, retry_policy=patience)
            plug_generators(monkeypatch, models)
            rows = [question(i) | {"question": fault} for i, fault in enumerate(faults)]
            self.arguments = [
                *([module, "run", "--method", "rag"] if module is evaluate else
                  [module, "train", "--rollouts", 1, "--algorithm", "reinforce", "--baseline",
                   "none", "--kl-coef", 0, "--context-tokens", 4000]),
                "--data", jsonl("q.jsonl", rows), "--model", tiny, "--out", self.out, "--engine",
                engine, *(["--simulator", url] if served else ["--url", self.server.url]),
                "--top-k", 2, "--max-searches", 2]

    return World


def search_all(faults, serve, monkeypatch, capsys):
    url = serve(searcher).url
    for fault, outcome in faults.items():
        arguments = ["search", fault, "--engine", "http", "--url", url]
        if outcome == "answer":
            command(sim, *arguments)
            assert "is Lima." in capsys.readouterr().out
        else:
            assert one_line(capsys, monkeypatch, sim, *arguments).startswith("error: http://")


def run_all(world, engine, faults, patience=EARNEST):
    """`evaluate.py run`: a fault costs its question alone."""
    bad = sum(outcome != "answer" for outcome in faults.values())
    run = world(evaluate, engine, faults, patience)
    command(*run.arguments, "--failed-searches", bad)
    lines = read_lines(run.out / "predictions.jsonl")
    assert {line["question"]: line["end"] != "failed" for line in lines} == {
        fault: outcome == "answer" for fault, outcome in faults.items()}
    results = json.loads((run.out / "results.json").read_text())
    assert results["failed"] == bad and results["metrics"]["em"]["mean"] == 100


def train_all(world, engine, faults, patience=EARNEST):
    """`train`: a fault costs its episode alone, and the step is learned from."""
    bad = sum(outcome != "answer" for outcome in faults.values())
    run = world(rl, engine, faults, patience)
    command(*run.arguments, "--failed-searches", bad, "--steps", 1, "--prompts-per-step",
            len(faults))
    ended = {e["question"]: e["end"] for e in read_lines(run.out / "episodes.jsonl")}
    assert ended == {fault: "answered" if outcome == "answer" else "failed"
                     for fault, outcome in faults.items()}
    (row,) = read_lines(run.out / "metrics.jsonl")
    assert row["search/failed"] == bad and row["reward/mean"] == 1


def end_and_resume(world, module, engine, fault, capsys, monkeypatch):
    """No failed search is allowed, and the server is at fault from the second step (or batch) on:
    one line, exit code 2, in the bound. When it is sound again, --resume goes on to the end."""
    run = world(module, engine, [f"Where is {i}?" for i in range(6)])
    run.arguments += ([["--batch-size", 2], ["--steps", 3, "--prompts-per-step", 2]][module is rl])
    sound, log = run.server.behave, run.out / ["predictions.jsonl", "metrics.jsonl"][module is rl]
    finished = 2 - (module is rl)  # lines of a batch, or of a step

    def behave(handler, body):
        broken = log.exists() and log.read_bytes().count(b"\n") >= finished
        misbehave(fault, handler, None) if broken else sound(handler, body)

    run.server.behave = behave
    monkeypatch.setattr("sys.argv", [module.__file__, *map(str, run.arguments[1:])])
    begun = time.monotonic()
    with pytest.raises(SystemExit) as exit_:
        run_cli(module.app)
    assert time.monotonic() - begun < EARNEST.bound + 10 and exit_.value.code == 2  # it loads, too
    said = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert len(said) == 1 and "Traceback" not in said[0] and "episodes failed (" in said[0]
    assert module is evaluate or said[0].endswith("; 1 steps are saved: --resume goes on")
    before = read_lines(log)
    assert len(before) == finished
    run.server.behave = sound
    command(*run.arguments, "--resume")
    assert read_lines(log)[:finished] == before and len(read_lines(log)) == 3 * finished


def test_some_faults_in_search(http, serve, monkeypatch, capsys):
    search_all(SOME, serve, monkeypatch, capsys)


SOME_SERVED = dict(list(SERVED.items())[3::9]) | {"completion: text is null": "transient"}
FEW = {"http": SOME | {"Peru": "answer"}, "simulator": SOME_SERVED | {"Peru": "answer"}}
ALL = {"http": SEARCH, "simulator": SERVED}
COMMANDS = [(module, engine) for module in (evaluate, rl) for engine in ALL]
NAMES = [f"{module.__name__}, {engine}" for module, engine in COMMANDS]


@pytest.mark.parametrize("engine", FEW)
def test_some_faults_in_an_evaluation(world, engine):
    run_all(world, engine, FEW[engine])


@pytest.mark.parametrize("engine", FEW)
def test_some_faults_in_training(world, engine):
    train_all(world, engine, FEW[engine])


@pytest.mark.parametrize("module,engine", COMMANDS, ids=NAMES)
def test_a_run_that_a_fault_ends_is_resumed(world, module, engine, capsys, monkeypatch):
    fault = {evaluate: "half a body", rl: "hangs"}[module]
    end_and_resume(world, module, engine, fault, capsys, monkeypatch)


@pytest.mark.slow
def test_all_faults_in_search(http, serve, monkeypatch, capsys):
    search_all(without_heavy(SEARCH), serve, monkeypatch, capsys)


def third(engine, part):
    return {**dict(list(without_heavy(ALL[engine]).items())[part::3]), "Peru": "answer"}


@pytest.mark.slow
@pytest.mark.parametrize("part", range(3))
@pytest.mark.parametrize("engine", ALL)
def test_all_faults_in_an_evaluation(world, engine, part):
    run_all(world, engine, third(engine, part), CROWDED)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(3))
@pytest.mark.parametrize("engine", ALL)
def test_all_faults_in_training(world, engine, part):
    train_all(world, engine, third(engine, part), CROWDED)


@pytest.mark.slow
@pytest.mark.parametrize("module,engine", COMMANDS, ids=NAMES)
@pytest.mark.parametrize("number", range(12))
def test_a_run_that_any_fault_ends_is_resumed(world, module, engine, number, capsys, monkeypatch):
    """Every eighth of those that are no answer."""
    faults = [fault for fault, outcome in without_heavy(ALL[engine]).items() if outcome != "answer"]
    end_and_resume(world, module, engine, faults[8 * number % len(faults)], capsys, monkeypatch)

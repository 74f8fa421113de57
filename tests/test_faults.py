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
SLACK = 2.0  # seconds that a busy machine may add to a bound
OUTCOMES = {name: fault.outcome for name, fault in FAULTS.items()}
SEARCH = OUTCOMES | dict.fromkeys(SEARCH_FORMS, "transient")
SERVED = OUTCOMES | dict.fromkeys(COMPLETION_FORMS, "transient")
SOME = dict(list(SEARCH.items())[::6]) | {"documents: text is null": "transient"}


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
        (output,) = served(server.url, fault).attempt([[5]], Sampling(50), [0])
        return str(output) if isinstance(output, OutsideError) else None

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
    """--engine http with little patience and a cache of its own."""
    def make(s):
        policy = policy_for(s.query) if hasattr(s, "query") else replace(QUICK, timeout=1.5)
        return HTTPEngine(s.url, s.top_k, policy, tmp_path / "searches.sqlite", workers=16)

    monkeypatch.setitem(ENGINES, "http", Engine(make))


def search_all(faults, serve, monkeypatch, capsys):
    url = serve(searcher).url
    for fault, outcome in faults.items():
        arguments = ["search", fault, "--engine", "http", "--url", url]
        if outcome == "answer":
            command(sim, *arguments)
            assert "is Lima." in capsys.readouterr().out
        else:
            assert one_line(capsys, monkeypatch, sim, *arguments).startswith("error: http://")


def run_all(faults, serve, monkeypatch, jsonl, tmp_path, tiny, tokenizer):
    """`evaluate.py run`: a fault costs its question alone."""
    url, out = serve(searcher).url, tmp_path / "run"
    plug_generators(monkeypatch, {str(tiny): FakeGenerator(tokenizer, lambda *_: " Lima\n")})
    rows = [question(i) | {"question": fault} for i, fault in enumerate(faults)]
    bad = sum(outcome != "answer" for outcome in faults.values())
    command(evaluate, "run", "--model", tiny, "--data", jsonl("q.jsonl", rows), "--out", out,
            "--method", "rag", "--engine", "http", "--url", url, "--failed-searches", bad)
    lines = read_lines(out / "predictions.jsonl")
    assert {line["question"]: line["end"] != "failed" for line in lines} == {
        fault: outcome == "answer" for fault, outcome in faults.items()}
    results = json.loads((out / "results.json").read_text())
    assert results["failed"] == bad and results["metrics"]["em"]["mean"] == 100


def train_all(faults, serve, monkeypatch, jsonl, tmp_path, tiny, tokenizer):
    """`train`: a fault costs its episode alone, and the step is learned from."""
    def policy(prompt, seed):
        asked = prompt.rpartition("Question: ")[2].partition("<|im_end|>")[0].strip()
        return ("<answer> Lima </answer>" if "is Lima." in prompt
                else f"<search> {asked} </search>")

    url, out = serve(searcher).url, tmp_path / "run"
    plug_generators(monkeypatch, {str(tiny): FakeGenerator(tokenizer, policy)})
    rows = [question(i) | {"question": fault} for i, fault in enumerate(faults)]
    bad = sum(outcome != "answer" for outcome in faults.values())
    command(rl, "train", "--data", jsonl("q.jsonl", rows), "--model", tiny, "--out", out,
            "--engine", "http", "--url", url, "--failed-searches", bad, "--steps", 1,
            "--prompts-per-step", len(rows), "--rollouts", 1, "--algorithm", "reinforce",
            "--baseline", "none", "--kl-coef", 0, "--max-searches", 2, "--context-tokens", 4000)
    ended = {e["question"]: e["end"] for e in read_lines(out / "episodes.jsonl")}
    assert ended == {fault: "answered" if outcome == "answer" else "failed"
                     for fault, outcome in faults.items()}
    (row,) = read_lines(out / "metrics.jsonl")
    assert row["search/failed"] == bad and row["reward/mean"] == 1


def test_some_faults_in_search(http, serve, monkeypatch, capsys):
    search_all(SOME, serve, monkeypatch, capsys)


def test_some_faults_in_an_evaluation(http, serve, monkeypatch, jsonl, tmp_path, tiny, tokenizer):
    run_all(SOME | {"Peru": "answer"}, serve, monkeypatch, jsonl, tmp_path, tiny, tokenizer)


def test_some_faults_in_training(http, serve, monkeypatch, jsonl, tmp_path, tiny, tokenizer):
    train_all(SOME | {"Peru": "answer"}, serve, monkeypatch, jsonl, tmp_path, tiny, tokenizer)


ALL = {fault: outcome for fault, outcome in SEARCH.items() if fault not in HEAVY}


@pytest.mark.slow
def test_all_faults_in_search(http, serve, monkeypatch, capsys):
    search_all(ALL, serve, monkeypatch, capsys)


@pytest.mark.slow
def test_all_faults_in_an_evaluation(http, serve, monkeypatch, jsonl, tmp_path, tiny, tokenizer):
    run_all(ALL, serve, monkeypatch, jsonl, tmp_path, tiny, tokenizer)


@pytest.mark.slow
def test_all_faults_in_training(http, serve, monkeypatch, jsonl, tmp_path, tiny, tokenizer):
    train_all(ALL, serve, monkeypatch, jsonl, tmp_path, tiny, tokenizer)

"""Engines and models behind an address: real HTTP servers on this machine that answer, stumble, hang and come back."""

import hashlib
import json
import logging
import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections import Counter

import numpy as np
import pytest
from helpers import (
    ALGORITHMS,
    HOSTILE,
    PROMPTS,
    ROOT,
    Server,
    command,
    corpus_rows,
    gradient,
    question,
    relative,
    saved_episodes,
    trajectory,
)

import evaluate
import sft_simulator as sim
import train_rl as rl

QUICK = sim.Patience(timeout=0.4, attempts=3, first_wait=0.02, longest_wait=0.2)
SLACK = 0.5  # seconds that a busy machine may add to a bound
STEADY = sim.Patience(timeout=5, attempts=10, first_wait=0.002, longest_wait=0.02)


def search_r1(*texts):
    return {"result": [[{"document": {"id": str(i), "contents": text}, "score": 1.0} for i, text in enumerate(texts)]]}


def searcher(handler, body):
    """A sound Search-R1 server: what it finds is a function of the query."""
    handler.reply(search_r1(*(f'"Title {i}"\nabout {body["queries"][0]}' for i in range(body["topk"]))))


@pytest.fixture
def http_engine(tmp_path):
    def make(url, k=2, patience=QUICK, **options):
        return sim.HTTPEngine(url, k, patience, tmp_path / "cache" / "searches.sqlite", **options)

    return make


def ask(engine, query="capital of Peru"):
    """The result of one search, and how long it took."""
    begun = time.monotonic()
    (result,) = engine.search([sim.SearchRequest(query)])
    return result, time.monotonic() - begun


# ---------------------------------------------------------------- faults: each ends in its way, within its bound


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def hang(handler, body):
    handler.server.closing.wait(20)


def drip(handler, body):
    handler.begin(10_000)
    for _ in range(100):  # five seconds: long past every bound
        handler.wfile.write(b" ")
        handler.server.closing.wait(0.05)


def half(handler, body):
    handler.begin(10_000)
    handler.wfile.write(b'{"result": [[')
    handler.close_connection = True


def half_chunk(handler, body):
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    handler.wfile.write(b'ff\r\n{"result"')
    handler.close_connection = True


FAULTS = {
    "hangs": (hang, "no whole answer within 0.4 s"),
    "drips": (drip, "no whole answer within 0.4 s"),
    "500": (lambda handler, body: handler.reply({}, 500), "HTTP 500"),
    "503, come back in an hour": (lambda handler, body: handler.reply({}, 503, Retry_After="3600"), "HTTP 503"),
    "429, nonsense": (lambda handler, body: handler.reply({}, 429, Retry_After="soon"), "HTTP 429"),
    "garbage": (lambda handler, body: handler.reply(b"<html>busy</html>"), "another form"),
    "JSON of another form": (lambda handler, body: handler.reply({"result": [[{"text": 1}]]}), "another form"),
    "deep JSON": (lambda handler, body: handler.reply(b"[" * 200_000), "another form"),
    "half a body": (half, "connection failed"),
    "half a chunk": (half_chunk, "connection failed"),
    "hangs up": (lambda handler, body: setattr(handler, "close_connection", True), "connection failed"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_that_stays_ends_in_one_clear_error_within_the_bound(serve, http_engine, fault):
    behave, words = FAULTS[fault]
    server = serve(behave)
    result, seconds = ask(http_engine(server.url))
    assert result.documents == [] and words in result.error and "given up after 3 attempts" in result.error
    assert len(server.calls) == 3 and seconds < QUICK.bound + SLACK


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_that_passes_costs_nothing_but_time(serve, http_engine, fault):
    """The first answer is broken, the second is not."""
    server = serve(lambda handler, body: (FAULTS[fault][0] if len(server.calls) == 1 else searcher)(handler, body))
    result, _ = ask(http_engine(server.url))
    assert result.error is None and result.documents[0] == "Title 0: about capital of Peru" and len(server.calls) == 2


def test_a_server_that_refuses(http_engine):
    result, seconds = ask(http_engine(f"http://127.0.0.1:{free_port()}"))
    assert "connection failed" in result.error and seconds < QUICK.bound + SLACK


@pytest.mark.parametrize("status", [400, 401, 404, 422])
def test_what_asking_again_will_not_mend_is_asked_once(serve, http_engine, status):
    server = serve(lambda handler, body: handler.reply({"error": "queries: \x1b[31mtoo long"}, status))
    result, _ = ask(http_engine(server.url))
    assert f"HTTP {status}" in result.error and "too long" in result.error and "\x1b" not in result.error
    assert len(server.calls) == 1


@pytest.mark.parametrize("header", ["number", "date"])
def test_retry_after_is_honoured_and_bounded(serve, http_engine, header):
    patience = sim.Patience(timeout=2, attempts=2, first_wait=0.01, longest_wait=3.0)
    stamps = []

    def busy(handler, body):
        stamps.append(time.monotonic())
        if len(stamps) == 1:
            when = "1" if header == "number" else time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 2))
            handler.reply({}, 429, Retry_After=when)
        else:
            searcher(handler, body)

    result, _ = ask(http_engine(serve(busy).url, patience=patience))
    assert result.error is None and 0.9 < stamps[1] - stamps[0] < 3.5
    assert sim.retry_after("3600") == 3600 and sim.retry_after("-5") == sim.retry_after(None) == sim.retry_after("x") == 0


def test_a_server_that_dies_midway_and_comes_back(serve, http_engine):
    """Killed while it answers, on the same port again half a second later."""
    dying = Server(half)
    port = dying.server_address[1]

    def come_back():
        time.sleep(0.1)
        dying.stop()
        time.sleep(0.4)
        serve(searcher, port)

    threading.Thread(target=come_back).start()
    result, _ = ask(http_engine(dying.url, patience=sim.Patience(timeout=2, attempts=8, first_wait=0.05, longest_wait=0.5)))
    assert result.error is None and len(result.documents) == 2


def test_pauses_grow_and_jitter(serve, http_engine):
    stamps = []
    server = serve(lambda handler, body: (stamps.append(time.monotonic()), handler.reply({}, 500)))
    engine = http_engine(server.url, patience=sim.Patience(timeout=1, attempts=5, first_wait=0.05, longest_wait=0.3))
    ask(engine)
    ask(engine, "another")
    first, second = np.diff(stamps[:5]), np.diff(stamps[5:])
    for pauses in (first, second):
        assert all(0.05 * 2**i <= pause for i, pause in enumerate(pauses[:3])) and max(pauses) < 0.3 + SLACK
    assert not np.allclose(first[:2], second[:2], atol=1e-4)
    state = random.getstate()
    ask(engine, "a third")
    assert random.getstate() == state  # jitter takes no number from a draw that a run depends on


# ---------------------------------------------------------------- engines


@pytest.mark.parametrize("answer", [
    search_r1('"Peru"\nIts capital is Lima.', '"Lima"\nLima is a city.', "no title"),
    {"result": [[{"contents": text} for text in ('"Peru"\nIts capital is Lima.', "Lima\nLima is a city.", "no title")]]},
    [{"text": "Peru: Its capital is Lima."}, {"title": "Lima", "text": "Lima is a city."}, {"text": "no title"}],
])  # fmt: skip
def test_http_speaks_search_r1_and_zerosearch(serve, http_engine, answer):
    server = serve(lambda handler, body: handler.reply(answer))
    result, _ = ask(http_engine(server.url, k=3))
    assert result.documents == ["Peru: Its capital is Lima.", "Lima is a city.", "no title"]
    path, body, _ = server.calls[0]
    assert path == "/retrieve" and body["queries"] == [body["query"]] == ["capital of Peru"]
    assert body["topk"] == body["top_k"] == 3 and body["return_scores"] is True


def test_a_repeated_search_makes_no_call(serve, http_engine):
    server = serve(searcher)
    requests = [sim.SearchRequest(query) for query in ("a", "b", "a")]
    first = http_engine(server.url).search(requests)
    assert len(server.calls) == 2  # equal queries are asked once
    assert http_engine(server.url).search(requests) == first and len(server.calls) == 2
    ask(http_engine(server.url, k=3), "a")
    assert len(server.calls) == 3  # another k is another question
    other = serve(searcher)
    ask(http_engine(other.url), "a")
    assert len(other.calls) == 1  # and so is another server


def test_a_failure_is_not_kept(serve, http_engine):
    server = serve(lambda handler, body: handler.reply({}, 400) if len(server.calls) == 1 else searcher(handler, body))
    assert ask(http_engine(server.url))[0].error and not ask(http_engine(server.url))[0].error


def test_concurrency_is_bounded(serve, http_engine):
    lock, now, most = threading.Lock(), [0], [0]

    def slow(handler, body):
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        time.sleep(0.05)
        with lock:
            now[0] -= 1
        searcher(handler, body)

    server = serve(slow)
    engine = http_engine(server.url, patience=STEADY, workers=4)
    results = engine.search([sim.SearchRequest(f"query {i}") for i in range(24)])
    assert [r.documents[0] for r in results] == [f"Title 0: about query {i}" for i in range(24)]
    assert 2 <= most[0] <= 4
    each = sim.in_threads(lambda i: engine.search([sim.SearchRequest(f"other {i % 12}")])[0], list(range(48)), 48)
    assert [r.documents[0] for r in each] == [f"Title 0: about other {i % 12}" for i in range(48)]
    assert most[0] <= 4 and len(server.calls) == 24 + 12  # the same query at the same time is asked, and paid, once


KEY = "0123456789abcdefSECRET"


@pytest.fixture
def serpapi(tmp_path, monkeypatch):
    monkeypatch.setenv("SERPAPI_API_KEY", KEY)
    return lambda server, k=2: sim.SerpApiEngine(k, QUICK, tmp_path / "searches.sqlite", url=f"{server.url}/search.json")


def test_serpapi_gives_title_and_snippet_and_the_key_goes_nowhere(serve, serpapi, tmp_path, caplog):
    rows = [{"title": "Lima - Wikipedia", "snippet": "The capital of Peru."}, {"title": "no snippet"},
            {"title": "Peru", "snippet": "A country."}, {"title": "a", "snippet": "b"}]  # fmt: skip
    server = serve(lambda handler, body: handler.reply({"search_metadata": {"status": "Success"}, "organic_results": rows}))
    with caplog.at_level(logging.DEBUG):
        result, _ = ask(serpapi(server))
    assert result.documents == ["Lima - Wikipedia: The capital of Peru.", "Peru: A country."]
    path, parameters, _ = server.calls[0]
    assert path.startswith("/search.json?") and parameters["q"] == "capital of Peru" and parameters["api_key"] == KEY
    assert ask(serpapi(server))[0] == result and len(server.calls) == 1
    assert KEY not in caplog.text
    assert not any(KEY.encode() in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


@pytest.mark.parametrize("behave", [
    lambda handler, body: handler.reply({"error": f"Invalid API key {body['api_key']}."}, 401),
    lambda handler, body: handler.reply({"error": KEY}, 429),
    lambda handler, body: handler.reply({"search_metadata": {"status": "Error"}, "error": KEY}),
    lambda handler, body: handler.reply({}, 302, Location=f"http://127.0.0.1:1/?api_key={KEY}"),
    half,
])  # fmt: skip
def test_no_error_shows_the_key(serve, serpapi, behave):
    result, _ = ask(serpapi(serve(behave)))
    assert result.error and KEY not in result.error


def test_google_may_find_nothing(serve, serpapi):
    nothing = {"search_metadata": {"status": "Success"}, "error": "Google hasn't returned any results for this query."}
    result, _ = ask(serpapi(serve(lambda handler, body: handler.reply(nothing))))
    assert result.documents == [] and result.error is None


def test_bm25_keeps_its_index(jsonl, tmp_path, monkeypatch):
    corpus = jsonl("corpus.jsonl", corpus_rows())
    first = sim.BM25Engine(corpus, 2, tmp_path)
    (folder,) = tmp_path.glob("bm25-*")
    monkeypatch.setattr(sim.BM25Engine, "_build", lambda *args: pytest.fail("built twice"))
    again = sim.BM25Engine(corpus, 2, tmp_path)
    requests = [sim.SearchRequest(q) for q in ("capital of Peru", "Seine", "")]
    assert again.search(requests) == first.search(requests)
    assert isinstance(again._index.scores["data"], np.memmap)
    answers = sim.in_threads(lambda i: again.search([requests[i % 3]])[0], list(range(60)), 8)
    assert answers == again.search(requests) * 20
    monkeypatch.undo()
    other = jsonl("corpus.jsonl", corpus_rows()[:3])  # the same name, another content
    assert len(sim.BM25Engine(other, 9, tmp_path).search([requests[0]])[0].documents) == 3


MEASURE = """
import json, sys, time
from pathlib import Path
import numpy, bm25s
import sft_simulator as sim

def memory(field):
    return int(Path("/proc/self/status").read_text().split(field)[1].split()[0]) / 1024  # MiB

data, folder, before, clock = Path(sys.argv[1]), Path(sys.argv[2]), memory("VmRSS:"), time.process_time
begun, wall = clock(), time.perf_counter()
engine = sim.BM25Engine(data / "passages.jsonl.gz", 5, folder)
built, wall, peak = clock() - begun, time.perf_counter() - wall, memory("VmHWM:") - before
begun = clock()
engine = sim.BM25Engine(data / "passages.jsonl.gz", 5, folder)
loaded = clock() - begun
rows = [row for row in sim.read_questions(data / "hotpotqa.jsonl") if row["golden_answers"][0].lower() not in ("yes", "no")]
begun = clock()
results = [engine.search([sim.SearchRequest(row["question"])])[0] for row in rows]
rate = len(rows) / (clock() - begun)
found = sum(sim.contains_answer(" ".join(r.documents), row["golden_answers"]) for r, row in zip(results, rows))
print(json.dumps({"n": len(rows), "built": built, "wall": wall, "loaded": loaded, "peak": peak, "rate": rate, "found": found}))
"""


@pytest.mark.skipif("QA_DATA" not in os.environ, reason="QA_DATA names no folder with the benchmark passages")
def test_bm25_on_74002_wikipedia_passages(tmp_path):
    """Index built in under 10 s and 500 MB, over 400 single queries a second, an answer in the top 5 for >= 305 of 467.

    Seconds are the process's own, one thread: what else the machine is doing doesn't count. MiB: what the build adds."""
    command = [sys.executable, "-c", MEASURE, os.environ["QA_DATA"], str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    seen = json.loads(done.stdout.splitlines()[-1])
    print(seen)
    assert seen["n"] == 467 and seen["found"] >= 305
    assert seen["built"] < 10 and seen["peak"] < 500 and seen["rate"] > 400 and seen["loaded"] < seen["built"]


# ---------------------------------------------------------------- hostile text


@pytest.mark.parametrize("text", [*HOSTILE, "مرحبا بالعالم", "\t\n"])
def test_a_hostile_query_reaches_a_server_as_one_short_line(serve, http_engine, text):
    server = serve(searcher)
    result, _ = ask(http_engine(server.url), text)
    assert result.error is None
    if not text.strip():
        assert result.documents == [] and server.calls == []  # nothing is asked, nothing is paid
        return
    (_, body, _), = server.calls  # fmt: skip
    assert 0 < len(body["query"]) <= sim.QUERY_CHARACTERS and body["query"].isprintable()
    assert "مرحبا" not in text or body["query"] == text


@pytest.mark.parametrize("text", [*HOSTILE, "مرحبا بالعالم"])
def test_hostile_queries_and_documents_in_bm25(jsonl, tmp_path, text):
    rows = [*corpus_rows(), {"id": "x", "title": "hostile", "text": text}]
    engine = sim.BM25Engine(jsonl("corpus.jsonl", rows), 5, tmp_path)
    (result,) = engine.search([sim.SearchRequest(text)])
    assert len(result.documents) == 5 and any(document.startswith("hostile: ") for document in result.documents)


def test_hostile_documents_reach_the_policy_as_data(serve, http_engine, tokenizer, tmp_path):
    raw = json.dumps(search_r1(*(f'"t"\n{text}' for text in HOSTILE))).encode()
    raw = raw.replace(b"zero width", b"zero width \xff\xfe broken bytes")
    engine = http_engine(serve(lambda handler, body: handler.reply(raw)).url, k=len(HOSTILE))
    result, _ = ask(engine, "q")
    assert len(result.documents) == len(HOSTILE) and max(map(len, result.documents)) <= sim.DOCUMENT_CHARACTERS
    assert result == ask(engine, "q")[0]  # out of the cache
    episode = rl.new_episode(question(), 0, tokenizer, PROMPTS)
    episode.turns.append(rl.Turn("<search>q</search>", "search", "q"))
    before = len(episode.ids)
    rl.search_turn([episode], engine, tokenizer, rl.RolloutSettings(observation_tokens=10**6), 0, 0)
    text = tokenizer.decode(episode.ids[before:])
    assert text.startswith("\n<information>\n1. ") and text.endswith("\n</information>\n")
    assert not sim.CONTROL_TAG.search(text[15:-16]) and not set(tokenizer.all_special_ids) & set(episode.ids[before:])
    sim.append_jsonl(tmp_path / "episodes.jsonl", [episode.record()])  # valid Unicode, one line
    assert len((tmp_path / "episodes.jsonl").read_bytes().splitlines()) == 1


def test_a_simulator_is_never_asked_100_kb(tokenizer):
    ids = sim.simulator_prompt(tokenizer, PROMPTS["simulator"], sim.SearchRequest("x" * 100_000), 3, 20)
    assert len(ids) < sim.QUERY_CHARACTERS + 1000


# ---------------------------------------------------------------- a rollout through failures


class HashSampler:
    """A policy whose every turn is a function of (ids, seed) alone: a search, an answer or nonsense."""

    def __init__(self, tokenizer, concurrent=False):
        self.tokenizer, self.concurrent = tokenizer, concurrent

    def generate(self, prompts, sampling, seeds):
        return [self.one(prompt, seed) for prompt, seed in zip(prompts, seeds, strict=True)]

    def one(self, prompt, seed):
        draw = random.Random(hashlib.sha256(repr((prompt, seed)).encode()).digest())
        number = draw.randrange(1000)
        text = draw.choice([f"<search> query {number} </search>"] * 3 + [f"<answer> {number} </answer>", "hm"])
        ids = sim.encode(self.tokenizer, text) + [self.tokenizer.eos_token_id]
        return sim.Generation(ids, [-1.0] * len(ids), "eos")


def play_64(tokenizer, engine, concurrent=False):
    episodes = [rl.new_episode(question(i // 4), i % 4, tokenizer, PROMPTS) for i in range(64)]
    limits = rl.RolloutSettings(4, 64, 4000, 300)
    rl.rollout(episodes, HashSampler(tokenizer, concurrent), tokenizer, engine, PROMPTS, limits, noise=0.3, seed=5, step=2)
    return episodes


def records(episodes):
    return [episode.record() for episode in episodes]


@pytest.mark.parametrize("concurrent", [False, True])
def test_64_episodes_with_a_tenth_of_the_calls_failing_equal_those_without(serve, tokenizer, tmp_path, concurrent):
    draw, failed = random.Random(0), Counter()
    faults = ["500", "garbage", "half a body", "hangs up", "429, nonsense"]

    def unsteady(handler, body):
        if draw.random() < 0.1:
            failed["calls"] += 1
            FAULTS[faults[failed["calls"] % len(faults)]][0](handler, body)
        else:
            searcher(handler, body)

    sound, unsound = serve(searcher), serve(unsteady)
    expected = play_64(tokenizer, sim.HTTPEngine(sound.url, 2, STEADY, tmp_path / "a.sqlite"))
    seen = play_64(tokenizer, sim.HTTPEngine(unsound.url, 2, STEADY, tmp_path / "b.sqlite"), concurrent)
    assert failed["calls"] >= 5 and sum(e.searches for e in expected) > 64
    assert records(seen) == records(expected)


def bad_for(word):
    return lambda handler, body: handler.reply({}, 400) if word in body["query"] else searcher(handler, body)


@pytest.mark.parametrize("concurrent", [False, True])
def test_an_episode_whose_search_fails_is_left_out_and_the_others_are_not(serve, http_engine, tokenizer, concurrent):
    expected = play_64(tokenizer, http_engine(serve(searcher).url, patience=STEADY))
    episodes = play_64(tokenizer, http_engine(serve(bad_for("7")).url, patience=STEADY), concurrent)
    lost = [e for e in episodes if e.end == "failed"]
    assert 0 < len(lost) < 64 and all("HTTP 400" in e.error and not e.scores for e in lost)
    kept = [e for e in episodes if e.end != "failed"]
    assert records(kept) == records(e for e, seen in zip(expected, episodes) if seen.end != "failed")
    for episode in kept:
        rl.score(episode)
    metrics = rl.rollout_metrics(episodes, 4)
    assert metrics["search/failed"] == len(lost)
    assert metrics["reward/answered"] == np.mean([e.answer is not None for e in kept])
    errors = [e.error for e in episodes]
    rl.check_failures(errors, 0, len(lost))
    with pytest.raises(sim.UserError, match="HTTP 400"):
        rl.check_failures(errors, 1, len(lost))


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=str)
def test_a_failed_episode_takes_no_part_in_the_update(algorithm):
    episodes = saved_episodes(count=8)
    episodes[-1].end = "failed"
    seen, metrics = gradient(episodes, **algorithm)
    expected, same = gradient(saved_episodes(count=8)[:-1], **algorithm)
    assert relative(seen, expected) < 1e-9 and metrics["tokens/trained"] == same["tokens/trained"]
    whole, _ = gradient(saved_episodes(count=8), **algorithm)
    assert relative(seen, whole) > 1e-3


# ---------------------------------------------------------------- a model on a server


def vllm(folder, tokenizer, *, ids=True, name="served"):
    """A server like vLLM's: what it writes is a function of (prompt, seed). Without `ids` it is like any other."""

    def behave(handler, body):
        if handler.path == "/v1/models":
            return handler.reply({"data": [{"id": name, "root": str(folder)}]})
        assert handler.path == "/v1/completions" and body["model"] == name
        text = f"1. {body['seed']} a\n2. {len(body['prompt'])} b"
        text += (body["stop"] or [""])[0]
        tokens = sim.encode(tokenizer, text) + [tokenizer.eos_token_id] * (not body["stop"])
        choice = {"text": text, "finish_reason": "stop", "stop_reason": (body["stop"] or [None])[0]}
        if len(tokens) > body["max_tokens"]:
            tokens = tokens[: body["max_tokens"]]
            choice |= {"text": tokenizer.decode(tokens), "finish_reason": "length", "stop_reason": None}
        if ids and body["return_token_ids"]:
            choice["token_ids"] = tokens
        if body.get("logprobs") is not None:
            choice["logprobs"] = {"token_logprobs": [-0.5] * len(tokens)}
        return handler.reply({"choices": [choice]})

    return behave


def test_served_generations_are_token_exact(serve, tiny, tokenizer):
    server = serve(vllm(tiny, tokenizer))
    generator = sim.load_generator(f"{server.url}/v1")
    assert isinstance(generator, sim.ServerGenerator) and generator.tokenizer.get_vocab() == tokenizer.get_vocab()
    prompts = [[5, 6], [7, 8, 9]]
    stopped, cut = generator.generate(prompts, sim.Sampling(50, 0.7, ("</search>",)), [11, 12])
    assert tokenizer.decode(stopped.ids) == "1. 11 a\n2. 2 b</search>" and stopped.stop_reason == "stop"
    assert stopped.logprobs == [-0.5] * len(stopped.ids) and tokenizer.decode(cut.ids).startswith("1. 12 a")
    assert [g.stop_reason for g in generator.generate(prompts, sim.Sampling(4), [1, 2])] == ["length"] * 2
    (whole,) = generator.generate(prompts[:1], sim.Sampling(99), [3])
    assert whole.stop_reason == "eos" and whole.ids[-1] == tokenizer.eos_token_id
    body = next(body for path, body, _ in server.calls if path == "/v1/completions" and body["seed"] == 11)
    assert (body["prompt"], body["temperature"], body["max_tokens"]) == ([5, 6], 0.7, 50)
    # The model's own generation_config must not bend the distribution that is trained.
    assert (body["top_p"], body["top_k"], body["min_p"], body["repetition_penalty"]) == (1.0, -1, 0.0, 1.0)
    assert body["include_stop_str_in_output"] is True and body["return_token_ids"] is True
    with pytest.raises(sim.UserError, match="no new weights"):
        generator.load_weights([])


def test_a_policy_is_refused_where_no_token_ids_come_back_and_a_simulator_is_not(serve, tiny, tokenizer):
    server = serve(vllm(tiny, tokenizer, ids=False))
    policy, simulator = sim.load_generator(f"{server.url}/v1"), sim.load_generator(f"{server.url}/v1", needs_ids=False)
    with pytest.raises(sim.OutsideError, match="no token ids"):
        policy.generate([[5]], sim.Sampling(50), [0])
    (generation,) = simulator.generate([[5]], sim.Sampling(50), [4])
    assert tokenizer.decode(generation.ids, skip_special_tokens=True) == "1. 4 a\n2. 1 b" and generation.stop_reason == "eos"


def completions(server):
    return sum(path == "/v1/completions" for path, *_ in server.calls)


def test_replicas_share_the_work_and_stand_in_for_each_other(serve, tiny, tokenizer):
    servers = [serve(vllm(tiny, tokenizer)) for _ in range(3)]
    urls = [f"{server.url}/v1" for server in servers]
    generator = sim.ServerGenerator(urls, patience=QUICK)
    prompts, seeds = [[5] * (1 + i) for i in range(30)], list(range(30))
    expected = [f"1. {i} a\n2. {1 + i} b" for i in range(30)]
    texts = [tokenizer.decode(g.ids, skip_special_tokens=True) for g in generator.generate(prompts, sim.Sampling(50), seeds)]
    assert texts == expected and [completions(server) for server in servers] == [10, 10, 10]
    servers[1].stop()
    one = sim.in_threads(lambda i: generator.generate([prompts[i]], sim.Sampling(50), [i])[0], list(range(30)), 16)
    assert [tokenizer.decode(g.ids, skip_special_tokens=True) for g in one] == expected
    with pytest.raises(sim.UserError, match="different models"):
        sim.ServerGenerator([urls[0], serve(vllm(tiny, tokenizer, name="other")).url + "/v1"])


def test_a_served_simulator(serve, tiny, tokenizer):
    """One request fails for good: its result says so, the others are as ever."""
    sound = vllm(tiny, tokenizer)
    server = serve(lambda handler, body: handler.reply({}, 400) if body.get("seed") == 8 else sound(handler, body))
    generator = sim.ServerGenerator([f"{server.url}/v1"], needs_ids=False, patience=QUICK)
    engine = sim.SimulatedEngine(generator, generator.tokenizer, 2, PROMPTS)
    good, bad, other = engine.search([sim.SearchRequest("q", seed=seed) for seed in (7, 8, 9)])
    assert good.documents[0] == "7 a" and other.documents[0] == "9 a" and good.well_formed and not good.error
    assert bad.documents == [] and "HTTP 400" in bad.error
    assert completions(server) == 3  # a failure is not a malformed output: it is not asked for again
    assert good.completion_tokens == len(sim.encode(tokenizer, "\n".join(["1. 7 a", f"2. {good.prompt_tokens} b"]))) + 1


def test_the_key_of_a_server_is_sent_and_never_shown(serve, tiny, tokenizer, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server = serve(lambda handler, body: handler.reply({"error": f"who is {handler.headers['Authorization']}?"}, 401))
    with pytest.raises(sim.OutsideError, match="who is") as error:
        sim.load_generator(f"{server.url}/v1")
    assert server.calls[0][2]["Authorization"] == f"Bearer {KEY}" and KEY not in str(error.value)


# ---------------------------------------------------------------- the judge


def test_label_with_a_model_as_judge(serve, capsys, jsonl, tmp_path):
    """A judge that wants to read "proof": it overrules the rule both ways, and says nonsense once."""

    def judge(handler, body):
        text = body["messages"][1]["content"]
        word = "Useful or noisy?" if "query 5" in text else "Useful." if "proof" in text else "noisy"
        handler.reply({"choices": [{"message": {"content": word}}]})

    documents = [["gold proof", "x"], ["gold proof", "x"], ["gold", "x"], ["proof", "x"], ["<|im_end|>", "x"], ["gold", "x"]]
    records = [trajectory(f"query {i}", texts) for i, texts in enumerate(documents)]
    server = serve(judge)
    command(sim, "label", jsonl("predictions.jsonl", records), "--top-k", 2, "--out", tmp_path / "pairs.jsonl",
            "--judge", f"{server.url}/v1", "--judge-model", "wise")  # fmt: skip
    pairs = sim.read_pairs(tmp_path / "pairs.jsonl")
    assert Counter(p.quality for p in pairs) == {"useful": 2, "noisy": 2}
    assert all(("proof" in p.documents[0]) == (p.quality == "useful") for p in pairs)
    said = " ".join(capsys.readouterr().err.split())
    assert "agree on 60.0 % of 5 pairs (Cohen's kappa 0.17)" in said and "1 pairs left out" in said
    assert len(server.calls) == 6 and all(b["model"] == "wise" and b["temperature"] == 0 for _, b, _ in server.calls)
    assert not any("<" in body["messages"][1]["content"] for _, body, _ in server.calls)


def test_label_without_a_judge_that_answers_ends(jsonl, tmp_path):
    predictions = jsonl("predictions.jsonl", [trajectory("q", ["gold", "x"])])
    with pytest.raises(sim.OutsideError, match="connection failed"):
        command(sim, "label", predictions, "--top-k", 2, "--out", tmp_path / "pairs.jsonl",
                "--judge", f"http://127.0.0.1:{free_port()}/v1")  # fmt: skip
    assert not (tmp_path / "pairs.jsonl").exists()


# ---------------------------------------------------------------- commands


@pytest.mark.parametrize("module,arguments,words", [
    (sim, ["search", "x", "--engine", "http"], "needs --url"),
    (sim, ["search", "x", "--engine", "serpapi"], "SERPAPI_API_KEY"),
    (rl, ["train", "--data", "x", "--out", "x", "--engine", "http", "--url", "localhost"], "needs --url"),
    (rl, ["train", "--data", "x", "--out", "x", "--engine", "serpapi"], "SERPAPI_API_KEY"),
    (evaluate, ["run", "--model", "x", "--benchmark", "world", "--out", "x", "--engine", "http"], "needs --url"),
    (evaluate, ["ask", "x?", "--model", "x", "--engine", "serpapi"], "SERPAPI_API_KEY"),
])  # fmt: skip
def test_an_engine_that_lacks_something_is_refused_at_once(monkeypatch, module, arguments, words):
    monkeypatch.delenv("SERPAPI_API_KEY", raising=False)
    with pytest.raises(sim.UserError, match=words):
        command(module, *arguments)


def test_search_asks_a_server_and_a_served_simulator(serve, capsys, tiny, tokenizer):
    query = f"capital of {random.randrange(10**12)}"  # new in the cache of this clone
    command(sim, "search", query, "--engine", "http", "--url", serve(searcher).url)
    assert f"about {query}" in capsys.readouterr().out
    command(sim, "search", query, "--engine", "simulator", "--top-k", 2, "--seed", 3,
            "--simulator", f"{serve(vllm(tiny, tokenizer, ids=False)).url}/v1")  # fmt: skip
    shown = capsys.readouterr().out
    assert "useful" in shown and "noisy" in shown and shown.count("3 a") == 2


def test_an_evaluation_bears_the_failures_it_is_allowed(serve, capsys, jsonl, tiny, tmp_path):
    """Two of six searches fail. By default that ends the run; allowed, both are counted and neither is scored."""
    tag = f"{random.randrange(10**12)}"
    rows = [question(i) | {"question": f"Question {tag} {'bad' if i in (1, 4) else i}?"} for i in range(6)]
    arguments = ["run", "--data", jsonl("data.jsonl", rows), "--method", "rag", "--model", tiny, "--engine", "http",
                 "--url", serve(bad_for("bad")).url, "--batch-size", 3, "--out", tmp_path / "run"]  # fmt: skip
    with pytest.raises(sim.UserError, match="--failed-searches allows 0.*HTTP 400"):
        command(evaluate, *arguments)
    command(evaluate, *arguments, "--resume", "--failed-searches", 2)
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert results["n"] == 4 and results["failed"] == 2
    records = sim.read_jsonl(tmp_path / "run/predictions.jsonl")
    assert [r["end"] == "failed" for r in records] == [False, True, False, False, True, False]
    capsys.readouterr()
    command(evaluate, "score", tmp_path / "run", "--json")
    scored = json.loads(capsys.readouterr().out)
    assert scored["n"] == 4 and scored["f1"] == results["metrics"]["f1"]["mean"]


def test_training_on_a_retrieval_server(serve, run_script, jsonl, tiny, tmp_path):
    """A tiny random policy, which never searches: the command runs, and what it logs is there."""
    arguments = ["train", "--data", jsonl("data.jsonl", [question(i) for i in range(2)]), "--model", tiny, "--engine", "http",
                 "--url", serve(searcher).url, "--steps", 1, "--prompts-per-step", 2, "--rollouts", 2, "--max-searches", 1,
                 "--tokens-per-turn", 8, "--context-tokens", 1500, "--out", tmp_path / "run"]  # fmt: skip
    run_script("train_rl.py", *arguments)
    (metrics,) = sim.read_jsonl(tmp_path / "run/metrics.jsonl")
    assert metrics["search/failed"] == 0 and KEY not in (tmp_path / "run/config.json").read_text()


@pytest.mark.parametrize("method", ["agent", "rag", "ra-agent", "search-o1"])
def test_no_method_answers_for_an_episode_whose_search_failed(serve, http_engine, tokenizer, method):
    class Searcher(HashSampler):
        def one(self, prompt, seed):
            text = "<search> bad </search> Search[bad]"
            return sim.Generation(sim.encode(tokenizer, text) + [tokenizer.eos_token_id], [], "eos")

    limits = rl.RolloutSettings(2, 64, temperature=0.0)
    setup = evaluate.Setup(Searcher(tokenizer), tokenizer, http_engine(serve(bad_for("bad")).url), PROMPTS, limits)
    (episode,) = evaluate.METHODS[method]([question() | {"question": "bad?"}], setup)
    assert episode.end == "failed" and episode.answer is None and "HTTP 400" in episode.error

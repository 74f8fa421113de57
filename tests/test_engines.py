"""Engines: BM25, retrieval servers and SerpApi; hostile text; rollouts through failing searches."""

import contextlib
import json
import logging
import os
import random
import runpy
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from dataclasses import asdict

import numpy as np
import pytest
from helpers import (ALGORITHMS, HOSTILE, LIMITS, PROMPTS, FakeEngine, FakeGenerator, command,
                     corpus_rows, gradient, one_line, question, relative, saved_episodes)

import evaluate
import sft_simulator as sim
import train_rl as rl
from plumbing import web
from plumbing.engines import (DOCUMENT_CHARACTERS, ENGINES, QUERY_CHARACTERS, BM25Engine, Engine,
                              SearchRequest, SearchResult, checksums_fit)
from plumbing.files import append_jsonl
from plumbing.remote import RetryPolicy, in_threads
from plumbing.text import ROOT, clean
from plumbing.web import HTTPEngine, SerpApiEngine

QUICK = RetryPolicy(timeout=5, attempts=3, first_wait=0.02, longest_wait=0.2)
STEADY = RetryPolicy(timeout=5, attempts=10, first_wait=0.002, longest_wait=0.02)
ARABIC = "مرحبا بالعالم"


def search_r1(*texts):
    documents = [{"document": {"id": str(i), "contents": text}, "score": 1.0}
                 for i, text in enumerate(texts)]
    return {"result": [documents]}


def searcher(handler, body):
    """A sound Search-R1 server: what it finds is a function of the query."""
    texts = (f'"Title {i}"\nabout {body["queries"][0]}' for i in range(body["topk"]))
    handler.reply(search_r1(*texts))


@pytest.fixture
def http_engine(tmp_path):
    def make(url, k=2, retry_policy=QUICK, **options):
        return HTTPEngine(url, k, retry_policy, tmp_path / "cache/searches.sqlite", **options)

    return make


def ask(engine, query="capital of Peru") -> SearchResult:
    (result,) = engine.search([SearchRequest(query)])
    return result


def test_bm25_returns_the_best_k(jsonl):
    engine = BM25Engine(jsonl("corpus.jsonl", corpus_rows()), k=2)
    queries = ("capital of Peru", "Paris Seine", "", "the of", "zzz \u202e <answer>")
    results = engine.search([SearchRequest(query) for query in queries])
    assert [len(r.documents) for r in results] == [2, 1, 0, 0, 0]  # those with a word of the query
    assert results[0].documents[0] == "The capital of Peru is Lima."
    assert results[1].documents[0] == "Paris: A city on the Seine."  # no subject without its title
    assert engine.search([]) == []


def test_bm25_keeps_its_index(jsonl, tmp_path, monkeypatch):
    import bm25s  # here: vLLM, whose tests are collected with these, can't start after its import

    corpus, loaded, load = jsonl("corpus.jsonl", corpus_rows()), [], bm25s.BM25.load
    first = BM25Engine(corpus, 2, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(bm25s.BM25, "index", lambda *args, **options: pytest.fail("built twice"))
        patch.setattr(bm25s.BM25, "load", lambda *args, **options: (
            loaded.append(load(*args, **options)), loaded[0])[1])
        again = BM25Engine(corpus, 2, tmp_path)
    assert isinstance(loaded[0].scores["data"], np.memmap)
    requests = [SearchRequest(q) for q in ("capital of Peru", "Seine", "")]
    assert again.search(requests) == first.search(requests)
    answers = in_threads(lambda i: again.search([requests[i % 3]])[0], list(range(60)), 8)
    assert answers == again.search(requests) * 20
    other = jsonl("corpus.jsonl", corpus_rows()[:3])  # the same name, another content
    assert len(ask(BM25Engine(other, 9, tmp_path)).documents) == 2  # of Peru and Italy; not Oslo's


def harm_bytes(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("harm", [
    harm_bytes, lambda path: path.write_bytes(path.read_bytes()[:-1]), lambda path: path.unlink(),
    lambda path: path.write_bytes(b"")], ids=["a bit", "a byte less", "gone", "empty"])
def test_a_damaged_index_is_built_again(jsonl, tmp_path, harm):
    corpus, requests = jsonl("corpus.jsonl", corpus_rows()), [SearchRequest("capital of Peru")]
    expected = BM25Engine(corpus, 4, tmp_path).search(requests)
    (folder,) = tmp_path.glob("bm25s-*")
    for name in sorted(path.name for path in folder.iterdir()):
        harm(folder / name)
        assert BM25Engine(corpus, 4, tmp_path).search(requests) == expected
    assert checksums_fit(folder)


MEASURE = """
import json, sys, time
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
import numpy, bm25s
from plumbing.engines import BM25Engine, SearchRequest
from plumbing.files import read_questions
from plumbing.text import contains_answer

data, folder = map(Path, sys.argv[1:])
rows = [row for row in read_questions(data / "hotpotqa.jsonl")
        if row["golden_answers"][0].lower() not in ("yes", "no")]
clock, peak = [time.process_time()], [getrusage(RUSAGE_SELF).ru_maxrss]
for _ in range(2):  # built, loaded
    engine = BM25Engine(data / "passages.jsonl.gz", 5, folder)
    clock.append(time.process_time())
    peak.append(getrusage(RUSAGE_SELF).ru_maxrss)
results = [engine.search([SearchRequest(row["question"])])[0] for row in rows]
clock.append(time.process_time())
found = sum(contains_answer(" ".join(result.documents), row["golden_answers"])
            for result, row in zip(results, rows))
print(json.dumps([len(rows), found, (peak[1] - peak[0]) / 1024, *numpy.diff(clock)]))
"""


@pytest.mark.skipif("QA_DATA" not in os.environ, reason="QA_DATA names no folder with passages")
def test_bm25_on_74002_wikipedia_passages(tmp_path):
    """An answer in the top 5 for >= 305 of 467; the index built in 500 MiB more memory. Of the
    process's seconds loading it and single queries take less than a tenth each of the building."""
    measure = [sys.executable, "-c", MEASURE, os.environ["QA_DATA"], str(tmp_path)]
    done = subprocess.run(measure, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    n, found, memory, built, loaded, searched = json.loads(done.stdout.splitlines()[-1])
    assert n == 467 and found >= 305, found
    assert memory < 500 and max(loaded, searched) < built / 10, done.stdout


def test_the_corpus_of_the_demo_answers(monkeypatch, capsys):
    """The chapter as a script, wherever it is called."""
    monkeypatch.chdir(ROOT.parent)
    monkeypatch.setattr(sys, "argv", ["sft_simulator.py", "search", "capital of Peru"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "sft_simulator.py"), run_name="__main__")
    assert ended.value.code == 0 and "Lima" in capsys.readouterr().out


@pytest.mark.parametrize("answer", [
    search_r1('"Peru"\nIts capital is Lima.', '"Lima"\nLima is a city.', "no title"),
    {"result": [[{"contents": '"Peru"\nIts capital is Lima.'},
                 {"contents": "Lima\nLima is a city."}, {"contents": "no title"}]]},
    [{"text": "Peru: Its capital is Lima."}, {"title": "Lima", "text": "Lima is a city."},
     {"text": "no title"}],
], ids=["Search-R1", "without document", "ZeroSearch"])
def test_http_speaks_search_r1_and_zerosearch(serve, http_engine, answer):
    server = serve(lambda handler, body: handler.reply(answer))
    result = ask(http_engine(server.url, k=3))
    assert result.documents == ["Peru: Its capital is Lima.", "Lima is a city.", "no title"]
    path, body, _ = server.calls[0]
    assert path == "/retrieve" and body["queries"] == [body["query"]] == ["capital of Peru"]
    assert body["topk"] == body["top_k"] == 3 and body["return_scores"] is True


def test_a_repeated_search_makes_no_call_unless_it_failed(serve, http_engine):
    server, other = serve(searcher), serve(searcher)
    requests = [SearchRequest(query) for query in ("a", "b", "a")]
    first = http_engine(server.url).search(requests)
    assert len(server.calls) == 2  # equal queries are asked once
    assert http_engine(server.url).search(requests) == first and len(server.calls) == 2
    ask(http_engine(server.url, k=3), "a")
    assert len(server.calls) == 3  # another k is another question
    ask(http_engine(other.url), "a")
    assert len(other.calls) == 1  # and so is another server
    failing = serve(lambda handler, body: handler.reply({}, 400) if len(failing.calls) == 1
                    else searcher(handler, body))
    assert ask(http_engine(failing.url)).error and not ask(http_engine(failing.url)).error


def scrambled(path):
    rows = [(json.dumps(["http", 1, "x"]), json.dumps("y" * 9000))] * 5
    with contextlib.closing(sqlite3.connect(path)) as base, base:
        base.executemany("INSERT OR REPLACE INTO answers VALUES (?, ?)", rows)
    data = path.read_bytes()
    path.write_bytes(data[:4096] + os.urandom(len(data) - 4096))


def a_folder(path):
    path.unlink()
    path.mkdir()


def statements(sql):
    def execute(path):
        with contextlib.closing(sqlite3.connect(path)) as base:
            base.executescript(sql)
    return execute


# Faults of the cache's file, what is said of it, and whether a second run finds the answers.
@pytest.mark.parametrize("harm,warnings,kept", [
    (lambda path: path.write_bytes(b"no database " * 1000), 1, True),
    (lambda path: path.write_bytes(path.read_bytes()[:5000]), 1, True),
    (scrambled, 1, True), (a_folder, 1, False), (lambda path: shutil.rmtree(path.parent), 0, True),
    (statements("UPDATE answers SET documents = '[null]'"), 0, True),
    (statements("DROP TABLE answers; CREATE TABLE answers (a)"), 1, False),
], ids=["garbage", "cut", "scrambled", "a folder", "no folder", "odd rows", "other table"])
@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_a_faulty_cache_is_one_warning(serve, http_engine, tmp_path, capsys, harm, warnings, kept,
                                       when):
    server, path = serve(searcher), tmp_path / "cache/searches.sqlite"
    engine = http_engine(server.url)
    ask(engine, "old")
    harm(path)
    engine = http_engine(server.url) if when == "before" else engine
    for query in ("old", "a", "b", "old", "a", "b"):
        assert ask(engine, query).documents[0] == f"Title 0: about {query}"
    assert len(server.calls) == 4  # what was paid for is not paid for again
    said = capsys.readouterr().err.splitlines()
    assert len(said) == warnings and all("on without it" in line for line in said)
    ask(http_engine(server.url), "a")
    assert len(server.calls) == 4 + (not kept)


def test_a_cache_that_is_locked_or_full_gets_the_answers_later(serve, http_engine, tmp_path, capsys,
                                                              monkeypatch):
    server, path = serve(searcher), tmp_path / "cache/searches.sqlite"
    engine = http_engine(server.url)
    ask(engine, "old")
    monkeypatch.setattr(web, "BUSY", 0.2)
    monkeypatch.setattr(web, "RETRY", 0.0)
    with contextlib.closing(sqlite3.connect(path)) as other:
        other.execute("BEGIN EXCLUSIVE")
        begun = time.monotonic()
        for query in ("a", "b", "a"):
            assert not ask(engine, query).error
        assert time.monotonic() - begun < 4 and len(server.calls) == 3
    other = sqlite3.connect(path)
    other.execute("CREATE TRIGGER full BEFORE INSERT ON answers "
                  "BEGIN SELECT RAISE(FAIL, 'database or disk is full'); END")
    ask(engine, "c")
    assert ask(engine, "old").documents and len(server.calls) == 4  # it can still be read
    other.execute("DROP TRIGGER full")
    other.close()
    ask(engine, "d")
    for query in "abcd":
        ask(http_engine(server.url), query)
    assert len(server.calls) == 5 and len(capsys.readouterr().err.splitlines()) == 1


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
    engine = http_engine(server.url, retry_policy=STEADY, workers=4)
    results = engine.search([SearchRequest(f"query {i}") for i in range(24)])
    assert [r.documents[0] for r in results] == [f"Title 0: about query {i}" for i in range(24)]
    assert most[0] >= 2
    each = in_threads(lambda i: ask(engine, f"other {i % 12}"), list(range(48)), 48)
    assert [r.documents[0] for r in each] == [f"Title 0: about other {i % 12}" for i in range(48)]
    assert most[0] <= 4
    assert len(server.calls) == 24 + 12  # a query that is under way is asked, and paid, once


KEY = "0123456789abcdefSECRET"


@pytest.fixture
def serpapi(tmp_path, monkeypatch):
    monkeypatch.setenv("SERPAPI_API_KEY", KEY)
    return lambda server: SerpApiEngine(2, QUICK, tmp_path / "searches.sqlite",
                                        url=f"{server.url}/search.json")


def test_serpapi_gives_title_and_snippet_and_the_key_goes_nowhere(serve, serpapi, tmp_path, caplog):
    rows = [{"title": "Lima - Wikipedia", "snippet": "The capital of Peru."},
            {"title": "no snippet"}, {"title": "Peru", "snippet": "A country."},
            {"title": "a", "snippet": "b"}]
    server = serve(lambda handler, body: handler.reply(
        {"search_metadata": {"status": "Success"}, "organic_results": rows}))
    with caplog.at_level(logging.DEBUG):
        result = ask(serpapi(server))
    assert result.documents == ["Lima - Wikipedia: The capital of Peru.", "Peru: A country."]
    path, parameters, _ = server.calls[0]
    assert path.startswith("/search.json?")
    assert parameters == {"engine": "google", "q": "capital of Peru", "num": "2", "api_key": KEY}
    assert ask(serpapi(server)) == result and len(server.calls) == 1
    assert KEY not in caplog.text
    kept = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert kept and not any(KEY.encode() in text for text in kept)


@pytest.mark.parametrize("behave", [
    lambda handler, body: handler.reply({"error": f"Invalid API key {body['api_key']}."}, 401),
    lambda handler, body: handler.reply({"error": KEY}, 429),
    lambda handler, body: handler.reply({"search_metadata": {"status": "Error"}, "error": KEY}),
    lambda handler, body: handler.reply({}, 302, Location=f"http://127.0.0.1:1/?api_key={KEY}"),
    lambda handler, body: handler.break_off(),
], ids=["401", "429", "error", "redirection", "half"])
def test_no_error_shows_the_key(serve, serpapi, behave):
    result = ask(serpapi(serve(behave)))
    assert result.error and KEY not in result.error


def test_google_may_find_nothing(serve, serpapi):
    error = "Google hasn't returned any results for this query."
    result = ask(serpapi(serve(lambda handler, body: handler.reply(
        {"search_metadata": {"status": "Success"}, "error": error}))))
    assert result.documents == [] and result.error is None


@pytest.mark.parametrize("text", [*HOSTILE, ARABIC, "\t\n"])
def test_a_hostile_query_reaches_a_server_as_one_short_line(serve, http_engine, text):
    server = serve(searcher)
    result = ask(http_engine(server.url), text)
    assert result.error is None
    if not text.strip():
        assert result.documents == [] and server.calls == []  # nothing is asked, nothing is paid
        return
    ((_, body, _),) = server.calls
    assert 0 < len(body["query"]) <= QUERY_CHARACTERS and body["query"].isprintable()
    assert text != ARABIC or body["query"] == text


@pytest.mark.parametrize("text", [*HOSTILE, ARABIC])
def test_hostile_queries_and_documents_in_bm25(jsonl, tmp_path, text):
    rows = [*corpus_rows(), {"id": "x", "title": "hostile", "text": text}]
    result = ask(BM25Engine(jsonl("corpus.jsonl", rows), 5, tmp_path), f"hostile {text}")
    assert any(document.startswith("hostile: ") for document in result.documents)


def test_hostile_documents_come_as_short_lines_of_valid_unicode(serve, http_engine, tmp_path):
    raw = json.dumps(search_r1(*(f'"t"\n{text}' for text in HOSTILE))).encode()
    raw = raw.replace(b"zero width", b"zero width \xff\xfe broken bytes")
    engine = http_engine(serve(lambda handler, body: handler.reply(raw)).url, k=len(HOSTILE))
    result = ask(engine)
    assert len(result.documents) == len(HOSTILE)
    assert max(map(len, result.documents)) <= DOCUMENT_CHARACTERS
    assert all(document.isprintable() for document in result.documents)
    assert result == ask(engine)  # out of the cache
    append_jsonl(tmp_path / "episodes.jsonl", [asdict(result)])
    assert len((tmp_path / "episodes.jsonl").read_bytes().splitlines()) == 1


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=str)
def test_a_failed_episode_takes_no_part_in_the_update(algorithm):
    episodes = saved_episodes(count=8)
    episodes[-1].end = "failed"
    seen, metrics = gradient(episodes, **algorithm)
    expected, same = gradient(saved_episodes(count=8)[:-1], **algorithm)
    assert relative(seen, expected) < 1e-9 and metrics["tokens/trained"] == same["tokens/trained"]
    whole, _ = gradient(saved_episodes(count=8), **algorithm)
    assert relative(seen, whole) > 1e-3


@pytest.mark.parametrize("method", ["agent", "rag", "ra-agent", "search-o1"])
def test_no_method_answers_for_an_episode_whose_search_failed(tokenizer, method):
    generator = FakeGenerator(tokenizer, lambda *_: "<search> bad </search> Search[bad]")
    engine = FakeEngine(error=lambda request: "HTTP 400")
    setup = rl.Setup(generator, engine, PROMPTS, LIMITS)
    (episode,) = evaluate.METHODS[method]([question()], setup)
    assert episode.end == "failed" and episode.answer is None and episode.error == "HTTP 400"


@pytest.mark.parametrize("name", ["bm25", "http", "serpapi"])
def test_top_k_reaches_every_engine(monkeypatch, jsonl, name):
    monkeypatch.setenv("SERPAPI_API_KEY", KEY)
    s = sim.SearchSettings(engine=name, corpus=jsonl("c.jsonl", corpus_rows()), url="http://x:1",
                           top_k=4)
    assert ENGINES[name].make(s).k == 4


@pytest.mark.parametrize("text", ["[/math] [citation needed] [red]x[/red]", ":smile: [link=x]y[/]",
                                  "a\x1b[31m\x1b]0;title\x07b"])
def test_documents_and_queries_are_printed_as_they_are(serve, capsys, monkeypatch, tmp_path, text):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setitem(ENGINES, "http", Engine(lambda s: FakeEngine(text)))
    command(sim, "search", text, "--engine", "http", "--url", "http://x")
    shown, expected = capsys.readouterr().out, clean(text)
    assert shown.count(expected) == 2 and not {"\x1b", "\x07"} & set(shown)


def test_an_address_with_a_password_is_refused_and_not_shown(capsys, monkeypatch, tmp_path):
    for module, *arguments in ((sim, "search", "x", "--engine", "http", "--url"),
                               (evaluate, "run", "--benchmark", "world", "--out", tmp_path / "x",
                                "--model", "x", "--simulator")):
        for url in ("http://me:SECRET@a/v1", "http://a,HTTP://SECRET@b"):
            text = one_line(capsys, monkeypatch, module, *arguments, url)
            assert "password" in text and "SECRET" not in text
    assert not (tmp_path / "x").exists()


def test_search_asks_a_retrieval_server(serve, capsys):
    query = f"capital of {random.randrange(10**12)}"  # new in the cache of this clone
    command(sim, "search", query, "--engine", "http", "--url", serve(searcher).url)
    assert f"about {query}" in capsys.readouterr().out

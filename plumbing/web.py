"""Retrieval servers, SerpApi and a judge: each answer is paid for once, in bounded time."""

import atexit
import contextlib
import json
import os
import re
import sqlite3
import threading
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from plumbing.cli import console
from plumbing.engines import (DOCUMENT_CHARACTERS, ENGINES, QUERY_CHARACTERS, SEARCH_CACHE, Engine,
                              SearchRequest, SearchResult, titled)
from plumbing.remote import (OutsideError, Replicas, RetryPolicy, call, in_threads, is_server,
                             openai_key, served_replicas, server_urls)
from plumbing.text import clean

BUSY, RETRY = 2.0, 60.0  # seconds: to wait for a locked cache; between attempts at a faulty one


class AnswerCache:
    """What servers answered, lists of texts by key, in an SQLite file. Thread-safe.

    No fault of the file ends a run: there is one warning. What can't be written is kept in memory,
    and tried again from time to time and at the end; a damaged file is moved aside."""

    def __init__(self, path: Path):
        self.path, self._lock, self._warned = path, threading.Lock(), False
        self._unwritten: dict[str, str] = {}
        self._rests_until = {"read": 0.0, "written": 0.0}

    def get(self, key: str) -> list[str] | None:
        with self._lock:
            found = [(self._unwritten[key],)] if key in self._unwritten else self._sql(
                "read", "SELECT documents FROM answers WHERE key = ?", [(key,)])
        with contextlib.suppress(ValueError, TypeError):
            documents = json.loads(found[0][0]) if found else None
            if isinstance(documents, list) and all(isinstance(text, str) for text in documents):
                return documents
        return None

    def put(self, key: str, documents: list[str]) -> None:
        with self._lock:
            self._unwritten[key] = json.dumps(documents)
            self._write()

    def _write(self) -> None:
        statement = "INSERT OR REPLACE INTO answers VALUES (?, ?)"
        if self._sql("written", statement, list(self._unwritten.items())) is not None:
            self._unwritten.clear()

    def _sql(self, what: str, statement: str, rows: list[tuple]) -> list[tuple] | None:
        """What a statement finds for the rows; None if the file is at fault."""
        if time.monotonic() < self._rests_until[what]:
            return None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.closing(sqlite3.connect(self.path, timeout=BUSY)) as base, base:
                base.execute("PRAGMA synchronous = OFF")  # a cache need not wait for the disk
                base.execute("CREATE TABLE IF NOT EXISTS answers "
                             "(key TEXT PRIMARY KEY, documents TEXT)")
                return [found for row in rows for found in base.execute(statement, row)]
        except (sqlite3.Error, OSError) as error:
            self._rests_until[what] = time.monotonic() + RETRY
            self._warn(f"the cache {self.path} can't be {what} ({clean(str(error))}): on "
                       "without it")
            if getattr(error, "sqlite_errorcode", 0) & 0xFF in (sqlite3.SQLITE_CORRUPT,
                                                                sqlite3.SQLITE_NOTADB):
                self._move_aside(what)
            return None

    def _move_aside(self, what: str) -> None:
        with contextlib.suppress(OSError):
            for suffix in ("-journal", ""):  # SQLite would replay the journal into a new file
                file = self.path.with_name(self.path.name + suffix)
                if file.exists():
                    file.replace(file.with_name(file.name + ".damaged"))
            self._rests_until[what] = 0.0

    def _warn(self, text: str) -> None:
        if not self._warned:
            self._warned = True
            console.print(text, style="yellow", soft_wrap=True)
            atexit.register(self._last_attempt)

    def _last_attempt(self) -> None:
        with self._lock:
            self._rests_until["written"] = 0.0
            self._write()
            if self._unwritten:
                console.print(f"{len(self._unwritten)} answers could not be written to the cache "
                              f"{self.path}", style="yellow", soft_wrap=True)


class RemoteEngine:
    """Base of the remote engines. Thread-safe; a subclass sets `identity` and `url`.

    At most `workers` calls run at a time, and never two with the same query. A query is cleaned to
    one line of QUERY_CHARACTERS; an empty one finds nothing, without a call. Answers are cached in
    a file by (identity, k, query): delete it to ask again. Failures are not cached: a call that
    fails for good (see RetryPolicy) gives a result with `error`."""

    identity: str
    url: str

    def __init__(self, k: int, retry_policy: RetryPolicy, cache: Path, workers: int):
        self.k, self.retry_policy, self.cache = k, retry_policy, AnswerCache(cache)
        self._pool, self._lock = ThreadPoolExecutor(workers), threading.Lock()
        self._under_way = {}  # query -> Future

    def request(self, query: str) -> dict[str, Any]:
        """Arguments of `call` that ask a query."""
        raise NotImplementedError

    def parse(self, answer: Any) -> Iterable[str]:
        """Documents of an answer. Raises ValueError, TypeError and the like for another form."""
        raise NotImplementedError

    def search(self, requests: list[SearchRequest]) -> list[SearchResult]:
        queries = [clean(request.query, QUERY_CHARACTERS) for request in requests]
        with self._lock:
            for query in queries:
                if query not in self._under_way:
                    self._under_way[query] = self._pool.submit(self._answer, query)
            answers = [self._under_way[query] for query in queries]
        results = [answer.result() for answer in answers]
        return [replace(result, documents=list(result.documents)) for result in results]

    def _answer(self, query: str) -> SearchResult:
        try:
            return self._find(query)
        finally:
            with self._lock:
                del self._under_way[query]

    def _find(self, query: str) -> SearchResult:
        if not query:
            return SearchResult([])
        key = json.dumps([self.identity, self.k, query])
        documents = self.cache.get(key)
        if documents is None:
            try:
                documents = call([self.url], self._documents, retry_policy=self.retry_policy,
                                 **self.request(query))
            except OutsideError as error:
                return SearchResult([], error=str(error))
            self.cache.put(key, documents)
        return SearchResult(documents)

    def _documents(self, answer: Any) -> list[str]:
        return [clean(text, DOCUMENT_CHARACTERS) for text in islice(self.parse(answer), self.k)]


class HTTPEngine(RemoteEngine):
    """A retrieval server at /retrieve: Search-R1's, or ZeroSearch's over Wikipedia.

    The request has the fields of both; the form of the answer tells which one it is.
    Search-R1: {"queries", "topk", "return_scores"} ->
    {"result": [[{"document": {"contents": "title\\ntext"}}, ...]]}.
    ZeroSearch: {"query", "top_k"} -> [{"text"}, ...]."""

    def __init__(self, url: str, k: int, retry_policy: RetryPolicy = RetryPolicy(),
                 cache: Path = SEARCH_CACHE, workers: int = 32):
        self.url = url if url.rstrip("/").endswith("/retrieve") else f"{url.rstrip('/')}/retrieve"
        self.identity = f"http {self.url}"
        super().__init__(k, retry_policy, cache, workers)

    def request(self, query: str) -> dict[str, Any]:
        return {"json": {"queries": [query], "topk": self.k, "return_scores": True,
                         "query": query, "top_k": self.k}}

    def parse(self, answer: Any) -> Iterable[str]:
        if isinstance(answer, list):
            return (titled(row.get("title") or "", row["text"]) for row in answer)
        (rows,) = answer["result"]
        if not isinstance(rows, list):
            raise ValueError("no list of documents")
        contents = (row.get("document", row)["contents"].partition("\n") for row in rows)
        return (titled(title.strip('"'), text) if text else title for title, _, text in contents)


class SerpApiEngine(RemoteEngine):
    """Google through SerpApi: title and snippet of the organic results.

    The key comes from SERPAPI_API_KEY. It is part of the URL, so it is removed from errors."""

    identity = "serpapi"

    def __init__(self, k: int, retry_policy: RetryPolicy = RetryPolicy(),
                 cache: Path = SEARCH_CACHE, workers: int = 16,
                 url: str = "https://serpapi.com/search.json"):
        self.url, self._key = url, serpapi_key()
        super().__init__(k, retry_policy, cache, workers)

    def request(self, query: str) -> dict[str, Any]:
        parameters = {"engine": "google", "q": query, "num": self.k, "api_key": self._key}
        return {"method": "GET", "params": parameters, "secret": self._key}

    def parse(self, answer: dict[str, Any]) -> Iterable[str]:
        if "organic_results" not in answer and answer["search_metadata"]["status"] != "Success":
            raise ValueError("not a successful search")
        rows = answer.get("organic_results", [])  # absent if Google found nothing
        return (row["title"] + ": " + row["snippet"] for row in rows
                if row["title"] and row.get("snippet"))


def serpapi_key() -> str:
    return os.environ.get("SERPAPI_API_KEY", "").strip()


ENGINES["http"] = Engine(lambda s: HTTPEngine(s.url, s.top_k), lambda s: None if s.url and
                         is_server(s.url) else "--url, such as http://localhost:8000/retrieve",
                         reads=("url",))
ENGINES["serpapi"] = Engine(lambda s: SerpApiEngine(s.top_k), lambda s: None if serpapi_key() else
                            "the key in the environment: SERPAPI_API_KEY", reads=())


def chat_verdicts(address: str, model: str | None, questions: list[tuple[str, str]],
                  words: tuple[str, ...]) -> list[str | None]:
    """The one of `words` in a served model's reply to each (system, user) pair; None if it has
    none or several. model: None for the server's first.

    Replies are cached as searches are, by (address, model, pair), so that a call after a failure
    asks only what has no reply yet. Raises OutsideError."""
    urls, cache = server_urls(address), AnswerCache(SEARCH_CACHE)
    replicas, model = (Replicas(urls), model) if model else served_replicas(urls)

    def ask(question: tuple[str, str]) -> str:
        key = json.dumps(["chat", address, model, *question])
        if kept := cache.get(key):
            return kept[0]
        messages = [{"role": role, "content": text}
                    for role, text in zip(("system", "user"), question)]
        body = {"model": model, "messages": messages, "temperature": 0.0, "max_tokens": 16}
        reply = call(replicas, read_reply, path="/chat/completions",
                     retry_policy=RetryPolicy(timeout=120), json=body, **openai_key())
        cache.put(key, [reply])
        return reply

    found = [set(re.findall("|".join(words), reply)) for reply in in_threads(ask, questions, 16)]
    return [verdicts.pop() if len(verdicts) == 1 else None for verdicts in found]


def read_reply(answer: dict[str, Any]) -> str:
    """The text of a chat completion in lower case. Raises ValueError and the like: has none."""
    return answer["choices"][0]["message"]["content"].lower()

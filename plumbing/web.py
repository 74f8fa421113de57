"""Remote search engines, retrieval servers and SerpApi: cached, with bounded time and attempts."""

import contextlib
import json
import logging
import os
import sqlite3
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from plumbing.engines import (DOCUMENT_CHARACTERS, ENGINES, QUERY_CHARACTERS, SEARCH_CACHE, Engine,
                              SearchRequest, SearchResult, titled)
from plumbing.remote import OutsideError, RetryPolicy, call, is_server
from plumbing.text import clean


class RemoteEngine:
    """Base of the remote engines. Thread-safe; a subclass sets `name` and `identity`.

    At most `workers` calls run at a time, and never two with the same query. A query is cleaned to
    one line of QUERY_CHARACTERS; an empty one finds nothing, without a call. Answers are cached in
    a file by (identity, k, query): delete it to ask again. Failures are not cached: a call that
    fails for good (see RetryPolicy) gives a result with `error`."""

    name: str
    identity: str

    def __init__(self, k: int, retry_policy: RetryPolicy, cache: Path, workers: int):
        self.k, self.retry_policy, self.cache = k, retry_policy, cache
        self._pool, self._lock = ThreadPoolExecutor(workers), threading.Lock()
        self._under_way = {}  # query -> Future
        cache.parent.mkdir(parents=True, exist_ok=True)
        self._sql("CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, documents TEXT)")

    def ask(self, query: str) -> list[str]:
        """Documents of one query, from the engine itself. Raises OutsideError."""
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
        if kept := self._sql("SELECT documents FROM answers WHERE key = ?", key):
            return SearchResult(json.loads(kept[0][0]))
        try:
            documents = [clean(text, DOCUMENT_CHARACTERS) for text in self.ask(query)][: self.k]
        except OutsideError as error:
            return SearchResult([], error=str(error))
        self._sql("INSERT OR REPLACE INTO answers VALUES (?, ?)", key, json.dumps(documents))
        return SearchResult(documents)

    def _sql(self, statement: str, *values: str) -> list[tuple]:
        with contextlib.closing(sqlite3.connect(self.cache, timeout=60)) as connection, connection:
            connection.execute("PRAGMA synchronous = OFF")  # a cache need not wait for the disk
            return connection.execute(statement, values).fetchall()


class HTTPEngine(RemoteEngine):
    """A retrieval server at /retrieve: Search-R1's, or ZeroSearch's over Wikipedia.

    The request has the fields of both; the form of the answer tells which one it is.
    Search-R1: {"queries", "topk", "return_scores"} ->
    {"result": [[{"document": {"contents": "title\\ntext"}}, ...]]}.
    ZeroSearch: {"query", "top_k"} -> [{"text"}, ...]."""

    name = "http"

    def __init__(self, url: str, k: int, retry_policy: RetryPolicy = RetryPolicy(),
                 cache: Path = SEARCH_CACHE, workers: int = 32):
        self.url = url if url.rstrip("/").endswith("/retrieve") else f"{url.rstrip('/')}/retrieve"
        self.identity = f"http {self.url}"
        super().__init__(k, retry_policy, cache, workers)

    def ask(self, query: str) -> list[str]:
        body = {"queries": [query], "topk": self.k, "return_scores": True,
                "query": query, "top_k": self.k}
        return call([self.url], self._parse, retry_policy=self.retry_policy, json=body)

    @staticmethod
    def _parse(answer: Any) -> list[str]:
        if isinstance(answer, list):
            return [titled(row.get("title") or "", row["text"]) for row in answer]
        (rows,) = answer["result"]
        contents = [row.get("document", row)["contents"].partition("\n") for row in rows]
        return [titled(title.strip('"'), text) if text else title for title, _, text in contents]


class SerpApiEngine(RemoteEngine):
    """Google through SerpApi: title and snippet of the organic results.

    The key comes from SERPAPI_API_KEY. It is part of the URL, so it is removed from errors, and
    urllib3's debug log is off."""

    name = identity = "serpapi"

    def __init__(self, k: int, retry_policy: RetryPolicy = RetryPolicy(),
                 cache: Path = SEARCH_CACHE, workers: int = 16,
                 url: str = "https://serpapi.com/search.json"):
        self.url, self._key = url, serpapi_key()
        logging.getLogger("urllib3").setLevel(logging.INFO)
        super().__init__(k, retry_policy, cache, workers)

    def ask(self, query: str) -> list[str]:
        parameters = {"engine": "google", "q": query, "num": self.k, "api_key": self._key}
        return call([self.url], self._parse, retry_policy=self.retry_policy, secret=self._key,
                    method="GET", params=parameters)

    def _parse(self, answer: dict[str, Any]) -> list[str]:
        if "organic_results" not in answer and answer["search_metadata"]["status"] != "Success":
            raise ValueError
        rows = answer.get("organic_results", [])  # absent if Google found nothing
        return [f"{row['title']}: {row['snippet']}" for row in rows
                if row.get("title") and row.get("snippet")]


def serpapi_key() -> str:
    return os.environ.get("SERPAPI_API_KEY", "").strip()


ENGINES["http"] = Engine(lambda s: HTTPEngine(s.url, s.top_k), lambda s: None if s.url and
                         is_server(s.url) else "--url, such as http://localhost:8000/retrieve",
                         reads=("url",))
ENGINES["serpapi"] = Engine(lambda s: SerpApiEngine(s.top_k), lambda s: None if serpapi_key() else
                            "the key in the environment: SERPAPI_API_KEY", reads=())

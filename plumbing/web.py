"""Search engines behind an address: retrieval servers and SerpApi, cached and bounded."""

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

from plumbing.engines import (
    DOCUMENT_CHARACTERS,
    ENGINES,
    QUERY_CHARACTERS,
    SEARCH_CACHE,
    Engine,
    EngineSettings,
    SearchRequest,
    SearchResult,
    titled,
)
from plumbing.remote import OutsideError, Patience, call, is_server
from plumbing.text import clean


class RemoteEngine:
    """What the engines behind an address share: an answer is paid for once, and a failure costs its own episode alone.

    At most `workers` calls are under way, whoever asks, and never two with the same query. Queries are cleaned to one line
    of at most QUERY_CHARACTERS; an empty one finds nothing and costs no call. Answers are kept in a file under (engine, k,
    query), failures are not: delete the file to ask anew. A call that fails for good (see Patience) gives a result with
    `error`."""

    name: str

    def __init__(self, k: int, patience: Patience, cache: Path, workers: int):
        self.k, self.patience, self.cache = k, patience, cache
        self._pool, self._lock, self._under_way = ThreadPoolExecutor(workers), threading.Lock(), {}  # query -> Future
        cache.parent.mkdir(parents=True, exist_ok=True)
        self._sql("CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, documents TEXT)")

    def ask(self, query: str) -> list[str]:
        """The documents of one query, from the engine itself. Raises OutsideError."""
        raise NotImplementedError

    def search(self, requests: list[SearchRequest]) -> list[SearchResult]:
        queries = [clean(request.query, QUERY_CHARACTERS) for request in requests]
        with self._lock:
            for query in queries:
                if query not in self._under_way:
                    self._under_way[query] = self._pool.submit(self._answer, query)
            answers = [self._under_way[query] for query in queries]
        return [replace(answer.result(), documents=list(answer.result().documents)) for answer in answers]

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
            connection.execute("PRAGMA synchronous = OFF")  # a cache isn't worth a wait for the disk per answer
            return connection.execute(statement, values).fetchall()


class HTTPEngine(RemoteEngine):
    """A retrieval server: Search-R1's, or the Wikipedia server of ZeroSearch. Both listen at /retrieve, so one question
    carries the fields of both; the form of the answer tells which it is.

    Search-R1: {"queries", "topk", "return_scores"} -> {"result": [[{"document": {"contents": "title\\ntext"}}, ...]]}.
    ZeroSearch: {"query", "top_k"} -> [{"text"}, ...]."""

    name = "http"

    def __init__(self, url: str, k: int, patience: Patience = Patience(), cache: Path = SEARCH_CACHE, workers: int = 32):
        self.url = url if url.rstrip("/").endswith("/retrieve") else url.rstrip("/") + "/retrieve"
        self.identity = f"http {self.url}"
        super().__init__(k, patience, cache, workers)

    def ask(self, query: str) -> list[str]:
        body = {"queries": [query], "topk": self.k, "return_scores": True, "query": query, "top_k": self.k}
        return call([self.url], self._parse, patience=self.patience, json=body)

    @staticmethod
    def _parse(answer: Any) -> list[str]:
        if isinstance(answer, list):
            return [titled(row.get("title") or "", row["text"]) for row in answer]
        (rows,) = answer["result"]
        contents = [row.get("document", row)["contents"].partition("\n") for row in rows]
        return [titled(title.strip('"'), text) if text else title for title, _, text in contents]


class SerpApiEngine(RemoteEngine):
    """Google through SerpApi: title and snippet of the organic results. The key comes from SERPAPI_API_KEY alone.

    The key stands in the address that is asked for, so it is kept out of errors, and out of urllib3's debug lines."""

    name = identity = "serpapi"

    def __init__(self, k: int, patience: Patience = Patience(), cache: Path = SEARCH_CACHE, workers: int = 16,
                 url: str = "https://serpapi.com/search.json"):  # fmt: skip
        self.url, self._key = url, serpapi_key()
        logging.getLogger("urllib3").setLevel(logging.INFO)
        super().__init__(k, patience, cache, workers)

    def ask(self, query: str) -> list[str]:
        parameters = {"engine": "google", "q": query, "num": self.k, "api_key": self._key}
        return call([self.url], self._parse, patience=self.patience, secret=self._key, method="GET", params=parameters)

    def _parse(self, answer: dict[str, Any]) -> list[str]:
        if "organic_results" not in answer and answer["search_metadata"]["status"] != "Success":
            raise ValueError
        rows = answer.get("organic_results", [])  # without any, Google found nothing
        return [f"{row['title']}: {row['snippet']}" for row in rows if row.get("title") and row.get("snippet")]


def serpapi_key() -> str:
    return os.environ.get("SERPAPI_API_KEY", "").strip()


def url_missing(s: EngineSettings) -> str | None:
    return None if s.url and is_server(s.url) else "--url, such as http://localhost:8000/retrieve"


def key_missing(s: EngineSettings) -> str | None:
    return None if serpapi_key() else "the key in the environment: SERPAPI_API_KEY"


ENGINES["http"] = Engine(lambda s: HTTPEngine(s.url, s.top_k), url_missing)
ENGINES["serpapi"] = Engine(lambda s: SerpApiEngine(s.top_k), key_missing)

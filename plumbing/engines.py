"""Search engines: request, result, the registry of engines, and BM25 over a corpus (the bm25s package)."""

import contextlib
import functools
import hashlib
import mmap
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from plumbing.cli import Settings, UserError, option
from plumbing.files import read_jsonl
from plumbing.text import ROOT, clean

CACHE = ROOT / "runs" / "cache"


SEARCH_CACHE = CACHE / "searches.sqlite"


QUERY_CHARACTERS = 2_000  # a query is cut to this, a document from outside to that


DOCUMENT_CHARACTERS = 20_000


Quality = Literal["useful", "noisy"]


@dataclass(frozen=True)
class SearchRequest:
    """A query and all that belongs to it. The question and its answers are for a simulator's prompt and are never
    shown to a real engine; `quality` is the outcome of the episode's own noise draw."""

    query: str
    question: str = ""
    golden_answers: tuple[str, ...] = ()
    quality: Quality = "useful"
    seed: int = 0


@dataclass
class SearchResult:
    """The documents of one request, best first, and what they cost in simulator tokens.

    `error` says why an outside engine failed for good: there are no documents, and the episode can't go on."""

    documents: list[str]
    well_formed: bool = True
    prompt_tokens: int = 0
    completion_tokens: int = 0
    error: str | None = None


class SearchEngine(Protocol):
    """Requests in, as many results out, in the same order."""

    name: str

    def search(self, requests: list[SearchRequest]) -> list[SearchResult]: ...


@dataclass(frozen=True)
class Engine:
    """An entry of ENGINES: how an engine is made, and what it still needs (None: nothing), from a command's settings."""

    make: Callable[["EngineSettings"], SearchEngine | None]
    missing: Callable[["EngineSettings"], str | None] = lambda s: None


# What --engine offers. web.py adds http and serpapi, chapter 1 the simulator. Your own: one entry more.
ENGINES: dict[str, Engine] = {
    "bm25": Engine(lambda s: BM25Engine(s.corpus, s.top_k)),
    "none": Engine(lambda s: None),
}


@dataclass(frozen=True, kw_only=True)
class EngineSettings(Settings):
    """Which engine answers searches, and what it needs."""

    engine: str = option("bm25", "Who answers searches.", choices=ENGINES)
    corpus: Path = option(ROOT / "data/world/passages.jsonl", "bm25: a JSONL corpus.")
    url: str | None = option(None, "http: the server, such as http://localhost:8000/retrieve.")
    top_k: int = option(3, "Documents that a search returns.", low=1)

    def check(self) -> None:
        super().check()
        if missing := ENGINES[self.engine].missing(self):
            raise UserError(f"--engine {self.engine} needs {missing}")


def titled(title: str, text: str) -> str:
    """A document as one text; one that names its subject needs no title before it."""
    return f"{title}: {text}" if title and title not in text else text


class BM25Engine:
    """A real engine: BM25 (the bm25s package) over a JSONL corpus (.gz or not) with the fields `title` and `text`.

    The index is kept in runs/cache under a hash of the corpus, and mapped into memory: the second start reads next to
    nothing, and processes share its pages. Safe to use from threads."""

    name = "bm25"

    def __init__(self, corpus: Path, k: int, cache: Path = CACHE):
        import bm25s  # here, because importing it loads JAX where that is installed

        self.k = k
        self._tokenize = functools.partial(bm25s.tokenize, stopwords="en", show_progress=False)
        if not Path(corpus).is_file():
            raise UserError(f"{corpus}: no such file")
        with open(corpus, "rb") as file:
            digest = hashlib.file_digest(file, "sha256")
        digest.update(bm25s.__version__.encode())
        folder = cache / f"bm25-{digest.hexdigest()[:16]}"
        if not folder.exists():
            self._build(bm25s, corpus, folder)
        self._index = bm25s.BM25.load(folder, mmap=True)
        self._ends = np.load(folder / "ends.npy")  # (N,): where in the file each text ends
        with open(folder / "texts.bin", "rb") as file:
            self._texts = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def _build(self, bm25s, corpus: Path, folder: Path) -> None:
        rows = read_jsonl(corpus, required=("title", "text"))
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            new = Path(temporary) / "index"
            index = bm25s.BM25()
            index.index(self._tokenize([f"{row['title']} {row['text']}" for row in rows]), show_progress=False)
            index.save(new, show_progress=False)
            texts = [titled(row["title"], row["text"]).encode("utf-8", "replace") for row in rows]
            (new / "texts.bin").write_bytes(b"".join(texts))
            np.save(new / "ends.npy", np.cumsum([len(text) for text in texts]))
            with contextlib.suppress(OSError):  # another process was faster: its folder is as good
                new.rename(folder)

    def search(self, requests: list[SearchRequest]) -> list[SearchResult]:
        if not requests:
            return []
        queries = self._tokenize([clean(request.query, QUERY_CHARACTERS) for request in requests], return_ids=False)
        return [SearchResult([self._document(number) for number in self._best(words)]) for words in queries]

    def _best(self, words: list[str]) -> np.ndarray:
        """Numbers of the k best texts, equal ones in the corpus' order. Four times as fast as bm25s' own choice, whose
        partition stumbles over the many texts that score 0."""
        scores = self._index.get_scores_from_ids(self._index.get_tokens_ids(words))  # (N,)
        k = min(self.k, len(scores))
        candidates = np.flatnonzero(scores >= -np.partition(-scores, k - 1)[k - 1])
        return candidates[np.argsort(-scores[candidates], kind="stable")][:k]

    def _document(self, number: int) -> str:
        start = self._ends[number - 1] if number else 0
        return self._texts[start : self._ends[number]].decode("utf-8")

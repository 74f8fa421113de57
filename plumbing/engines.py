"""Search engines: request, result, the registry of engines, and BM25 over a corpus.

bm25s does the scoring; its own top-k is slow where many texts score 0 (see `BM25Engine._best`)."""

import contextlib
import functools
import json
import mmap
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from plumbing.cli import Settings, UserError, option, unread
from plumbing.files import read_jsonl, sha256, write_json
from plumbing.runfolder import StopRun
from plumbing.text import ROOT, clean

CACHE = ROOT / "runs" / "cache"
SEARCH_CACHE = CACHE / "searches.sqlite"
QUERY_CHARACTERS = 2_000  # a longer query is cut
DOCUMENT_CHARACTERS = 20_000  # a longer document of a remote engine is cut
Quality = Literal["useful", "noisy"]


@dataclass(frozen=True)
class SearchRequest:
    """A query with its episode's data. Only a simulator sees question and answers, in its prompt.

    quality: outcome of the episode's noise draw, "useful" without one."""

    query: str
    question: str = ""
    golden_answers: tuple[str, ...] = ()
    quality: Quality = "useful"
    seed: int = 0


@dataclass
class SearchResult:
    """The documents of one request, best first, and their cost in simulator tokens.

    error: why a remote engine failed for good; there are no documents, and the episode ends."""

    documents: list[str]
    well_formed: bool = True
    prompt_tokens: int = 0
    completion_tokens: int = 0
    error: str | None = None


class SearchEngine(Protocol):
    """One result per request, in the same order, of at most top_k documents.

    Called from many threads at once, with a request each, where the policy is sampled by vLLM or a
    server. A search that fails for good is a result with `error`: an exception ends the run."""

    def search(self, requests: list[SearchRequest]) -> list[SearchResult]: ...


@dataclass(frozen=True)
class Engine:
    """An entry of ENGINES. make: an engine from a command's settings.

    missing: what the settings lack, or None; asked before anything is loaded. It may also raise
    UserError, such as for a file that can't be read.
    reads: the settings that it reads, but for top_k; None: any.
    simulated: whether a search is asked for useful or noisy documents."""

    make: Callable[["EngineSettings"], SearchEngine | None]
    missing: Callable[["EngineSettings"], str | None] = lambda s: None
    reads: tuple[str, ...] | None = None
    simulated: bool = False


# The choices of --engine. web.py adds http and serpapi, sft_simulator.py the simulator.
ENGINES: dict[str, Engine] = {
    "bm25": Engine(lambda s: BM25Engine(s.corpus, s.top_k), reads=("corpus",)),
    "none": Engine(lambda s: None, reads=())}


@dataclass(frozen=True, kw_only=True)
class EngineSettings(Settings):
    """The search engine and its options."""

    engine: str = option("bm25", "Who answers searches.", choices=ENGINES)
    corpus: Path = option(ROOT / "data/world/passages.jsonl", "bm25: a JSONL corpus.")
    url: str | None = option(None, "http: the server, such as http://localhost:8000/retrieve.")
    top_k: int = option(3, "Documents that a search returns.", low=1)

    def check(self) -> None:
        super().check()
        if missing := ENGINES[self.engine].missing(self):
            raise UserError(f"--engine {self.engine} needs {missing}")

    def engines(self) -> list[str]:
        """The engines that are asked."""
        return [self.engine]

    def files(self) -> dict[str, Path]:
        """The files that these engines read, by option: a resumed run must find them unchanged."""
        known = {name for engine in ENGINES.values() for name in engine.reads or ()}
        read = sorted(known - EngineSettings.unused(self).keys())
        return {name: path for name in read if isinstance(path := getattr(self, name, None), Path)}

    def unused(self) -> dict[str, str]:
        reads = {name: engine.reads for name, engine in ENGINES.items()}
        return super().unused() | dict.fromkeys(unread(reads, *self.engines()),
                                                f"with --engine {self.engine}")


def titled(title: str, text: str) -> str:
    """A document as one text: its title comes first unless the text contains it."""
    return f"{title}: {text}" if title and title not in text else text


class BM25Engine:
    """BM25 over a JSONL corpus (.gz or not) with the fields `title` and `text`. Thread-safe.

    The index is cached under a hash of the corpus and memory-mapped: a second start is fast, and
    processes share its pages. One whose files don't have their checksums is built again. Raises
    UserError for a missing or invalid corpus."""

    def __init__(self, corpus: Path, k: int, cache: Path = CACHE):
        import bm25s  # here: it imports JAX if that is installed

        self.k = k
        self._tokenize = functools.partial(bm25s.tokenize, stopwords="en", show_progress=False)
        folder = cache / f"bm25s-{bm25s.__version__}-{sha256(corpus)[:16]}"
        if not checksums_fit(folder):
            self._build(bm25s, corpus, folder)
        self._index = bm25s.BM25.load(folder, mmap=True)
        self._ends = np.load(folder / "ends.npy")  # (N,): end of each text in texts.bin, bytes
        with open(folder / "texts.bin", "rb") as file:
            self._texts = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def _build(self, bm25s, corpus: Path, folder: Path) -> None:
        rows = read_jsonl(corpus, texts=("title", "text"))
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            new = Path(temporary) / "index"
            index = bm25s.BM25()
            tokens = self._tokenize([f"{row['title']} {row['text']}" for row in rows])
            index.index(tokens, show_progress=False)
            index.save(new, show_progress=False)
            texts = [titled(row["title"], row["text"]).encode("utf-8", "replace") for row in rows]
            (new / "texts.bin").write_bytes(b"".join(texts))
            np.save(new / "ends.npy", np.cumsum([len(text) for text in texts]))
            write_json(new / CHECKSUMS, checksums(new))
            with contextlib.suppress(OSError):
                if checksums_fit(folder):
                    return
                folder.rename(Path(temporary) / "damaged")
            with contextlib.suppress(OSError):  # another process was faster: its folder is as good
                new.rename(folder)

    def search(self, requests: list[SearchRequest]) -> list[SearchResult]:
        if not requests:
            return []
        queries = [clean(request.query, QUERY_CHARACTERS) for request in requests]
        return [SearchResult([self._document(number) for number in self._best(words)])
                for words in self._tokenize(queries, return_ids=False)]

    def _best(self, words: list[str]) -> np.ndarray:
        """Indices of the k best texts that have a word of the query, ties in corpus order. Four
        times as fast as bm25s's top-k, whose partition is slow when many texts score 0."""
        scores = self._index.get_scores_from_ids(self._index.get_tokens_ids(words))  # (N,)
        k = min(self.k, len(scores))
        least = -np.partition(-scores, k - 1)[k - 1]
        candidates = np.flatnonzero((scores >= least) & (scores > 0))
        return candidates[np.argsort(-scores[candidates], kind="stable")][:k]

    def _document(self, number: int) -> str:
        start = self._ends[number - 1] if number else 0
        return self._texts[start : self._ends[number]].decode("utf-8")


CHECKSUMS = "checksums.json"


def checksums(folder: Path) -> dict[str, str]:
    """SHA-256 of a folder's files, by name."""
    return {path.name: sha256(path) for path in sorted(folder.iterdir()) if path.name != CHECKSUMS}


def checksums_fit(folder: Path) -> bool:
    """Whether a folder holds the files that were written, whole."""
    try:
        return checksums(folder) == json.loads((folder / CHECKSUMS).read_bytes())
    except (OSError, ValueError):
        return False


def check_failures(errors: list[str | None], before: int, allowed: int) -> None:
    """Raises StopRun if more searches failed than a run may bear, or none of these succeeded.

    An episode whose search failed says nothing of its policy: it is neither scored nor trained."""
    failed = [error for error in errors if error]
    if before + len(failed) > allowed or (failed and len(failed) == len(errors)):
        raise StopRun(f"{before + len(failed)} episodes failed (--failed-searches allows "
                      f"{allowed}): {failed[-1]}")

"""evaluate.py with one engine more: `bm25-noisy`, half of whose results come from deeper ranks.

    python results/paper/noisy.py run --engine bm25-noisy --model MODEL ... --out OUT

Each of a search's k documents is, with a chance of one half, replaced by the one DEEPER ranks
below it: on the topic mostly, but seldom what was asked for. Which ones is a function of question,
sample and turn, so that all models meet the same noise.
"""

import random
import sys
from pathlib import Path

# first: here `evaluate` is chapter 3, not the package
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import evaluate
from plumbing.cli import run_cli
from plumbing.engines import ENGINES, BM25Engine, Engine, SearchRequest, SearchResult
from plumbing.files import draw_seed

DEEPER = 10


class NoisyEngine:
    """A real engine of k + DEEPER documents, seen through noise as k documents."""

    def __init__(self, engine, k: int):
        self.engine, self.k = engine, k

    def search(self, requests: list[SearchRequest]) -> list[SearchResult]:
        results = self.engine.search(requests)
        for request, result in zip(requests, results, strict=True):
            draw = random.Random(draw_seed("deeper", request.seed))
            ranked = result.documents
            ranks = [rank + DEEPER * (draw.random() < 0.5) for rank in range(self.k)]
            result.documents = [ranked[rank] for rank in ranks if rank < len(ranked)]
        return results


ENGINES["bm25-noisy"] = Engine(
    lambda s: NoisyEngine(BM25Engine(s.corpus, s.top_k + DEEPER), s.top_k), reads=("corpus",))

if __name__ == "__main__":
    run_cli(evaluate.app)

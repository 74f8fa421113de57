"""Every behaviour of the fault server (tests/faults.py) against the kit's clients, as a table.

    python results/faults/run.py > results/faults/README.md

A behaviour is asked for through `--engine http`'s engine, or by a served model's generator. Timeout
1 s and 2 attempts where the behaviour stalls, else 30 s and 2 attempts. Takes two minutes."""
# ruff: noqa: E402

import sys
import time
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from faults import (COMPLETION_FORMS, FAULTS, LOGPROB_FORMS, MODELS_FORMS, SEARCH_FORMS,
                    completion, misbehave)
from helpers import Server, make_tokenizer

from plumbing import remote, served
from plumbing.cli import markdown_table
from plumbing.engines import SearchRequest
from plumbing.generate import Sampling
from plumbing.remote import RetryPolicy, in_threads
from plumbing.text import encode
from plumbing.web import HTTPEngine

SHORT = RetryPolicy(timeout=1, attempts=2, first_wait=0.01, longest_wait=1)
LONG = RetryPolicy(timeout=30, attempts=2, first_wait=0.01, longest_wait=0.1)
tokenizer = make_tokenizer()


def policy_for(fault: str) -> RetryPolicy:
    return SHORT if fault in FAULTS and FAULTS[fault].stalls else LONG


def behave(handler, body):
    """A retrieval server and a model server in one: the query or the model's name is the fault."""
    if "query" in body:
        about = [{"document": {"contents": '"Peru"\nIts capital is Lima.'}}]
        misbehave(body["query"], handler, {"result": [about]})
    else:
        ids = encode(tokenizer, "1. a\n2. b")
        logprobs = {"token_logprobs": [-1.0] * len(ids)}
        misbehave(body["model"], handler, completion(token_ids=ids, logprobs=logprobs))


def search(server: Server, fault: str, folder: str) -> str | None:
    policy = policy_for(fault)
    engine = HTTPEngine(server.url, 2, policy, Path(folder) / "searches.sqlite", workers=1)
    return engine.search([SearchRequest(fault)])[0].error


def generate(server: Server, fault: str, folder: str) -> str | None:
    generator = served.ServerGenerator([server.url], fault in LOGPROB_FORMS, policy_for(fault))
    generator.model = fault
    return generator.generate([[5]], Sampling(50), [0])[0].error


def row(client: str, fault: str, folder: str) -> list[str]:
    server = Server(behave)
    ask = search if client == "search" else generate
    begun = time.monotonic()
    error = ask(server, fault, folder)
    seconds = time.monotonic() - begun
    asked = sum(Counter(path for path, *_ in server.calls).values())
    server.closing.set()
    said = (error or "an answer").replace(server.url, "URL").replace("|", "\\|")
    return [fault, client, said, str(asked), f"{seconds:.2f}", f"{policy_for(fault).bound:.1f}"]


def main() -> None:
    asked = [("search", fault) for fault in FAULTS | SEARCH_FORMS]
    asked += [("generation", fault) for fault in FAULTS | COMPLETION_FORMS | LOGPROB_FORMS]
    with (TemporaryDirectory() as folder,  # no fault in what comes before the request
          patch.object(served, "load_tokenizer", lambda name: tokenizer),
          patch.object(served, "served_replicas", lambda urls: (remote.Replicas(urls), ""))):
        for client in ("search", "generation"):
            row(client, "sound", folder)  # imports, certificates
        rows = in_threads(lambda pair: row(*pair, folder), asked, 4)
    late = sum(float(row[4]) > float(row[5]) for row in rows)
    count, more = len(FAULTS | SEARCH_FORMS | COMPLETION_FORMS | LOGPROB_FORMS), len(MODELS_FORMS)
    print(f"""# Faults of servers

    python results/faults/run.py > results/faults/README.md

{count} behaviours of the fault server tests/faults.py ({more} more, of `/models`, are in
tests/test_faults.py). {late} of {len(rows)} calls took longer than `RetryPolicy.bound`
(attempts x timeout + pauses). Four calls run at a time, in one process with the servers. In
`search` an error is one line and exit code 2; in `evaluate.py run` and `train` it costs its
episode, and the run ends after more than `--failed-searches` of them.
""")
    print(markdown_table(["behaviour", "client", "outcome", "attempts", "seconds", "bound"], rows,
                         text_columns=3))


main()

"""Fixtures: tiny random models behind the real interface, servers, data."""

import json
import os
import signal
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models: a second thread only costs
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a name that is no folder is refused at once

import torch  # noqa: E402
from accelerate import Accelerator  # noqa: E402
from accelerate.state import AcceleratorState  # noqa: E402
from helpers import (PROMPTS, PlainSGD, Server, make_model,  # noqa: E402
                     make_tokenizer, question, tune)

import sft_simulator as sim  # noqa: E402
import train_rl as rl  # noqa: E402
from plumbing.engines import ENGINES  # noqa: E402
from plumbing.models import save_model  # noqa: E402
from plumbing.scorer import Sequence  # noqa: E402
from plumbing.text import encode  # noqa: E402

# A shell that starts `make test` in the background has it ignore SIGINT, and what it starts, too.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory, tokenizer) -> Path:
    """Folder of a tiny random model, for `--model`."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    make_model(len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def policy(tmp_path_factory, tokenizer) -> Path:
    """Folder of a tiny model that answers "Lima" or "Rome", at random: rewards differ."""
    out = tmp_path_factory.mktemp("policy")
    sequences = []
    for i, answer in enumerate(["Lima", "Rome", "Lima", "Oslo"] * 60):
        episode = rl.new_episode(question(i % 4), 0, tokenizer, PROMPTS, search=i < 120)
        episode.write(ids := encode(tokenizer, f"<answer>{answer}</answer>"), [0.0] * len(ids))
        sequences.append(Sequence(episode.ids, episode.mask))
    model = make_model(len(tokenizer), initializer_range=0.05)
    settings = sim.TuningSettings(out=out, lr=2e-2, batch_size=4, batch_tokens=10_000)
    tune(model, sequences, settings)
    save_model(model, tokenizer, out / "model")
    AcceleratorState._reset_state(reset_partial_state=True)
    return out / "model"


@pytest.fixture(autouse=True)
def no_kept_answers(monkeypatch, tmp_path):
    """A judge's replies are cached for this test alone: servers of two tests may share a port."""
    monkeypatch.setattr("plumbing.web.SEARCH_CACHE", tmp_path / "answers.sqlite")


@pytest.fixture(autouse=True)
def nothing_left_behind():
    """No test inherits another's signal handlers, engines, or Accelerate's state."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    engines = dict(ENGINES)  # a chapter that is run as a script registers its own anew
    yield
    ENGINES.clear()
    ENGINES.update(engines)
    AcceleratorState._reset_state(reset_partial_state=True)
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def sgd(monkeypatch):
    """Optimizers that take plain gradient steps; the list of those that were made."""
    monkeypatch.setattr(torch.optim, "AdamW", PlainSGD)
    monkeypatch.setattr(PlainSGD, "made", [])
    return PlainSGD.made


@pytest.fixture
def exact(monkeypatch):
    """Training in float32 on the CPU: figures that can be compared with plain torch."""
    for chapter in (sim, rl):
        monkeypatch.setattr(chapter, "make_accelerator", lambda **options: Accelerator(cpu=True))


@pytest.fixture
def serve(request):
    """Start a server on a free port; all are stopped when the test ends."""
    def start(behave, port=0):
        server = Server(behave, port)
        request.addfinalizer(server.stop)
        return server

    return start


@pytest.fixture
def jsonl(tmp_path):
    """Write rows to a JSONL file in this test's folder."""
    def write(name: str, rows: list[dict]) -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path
    return write

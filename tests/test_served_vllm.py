"""vLLM on the CPU against Transformers, on the embedded model. `make test-vllm` runs these."""

import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request

import numpy as np
import pytest
import torch
from helpers import PROMPTS

import sft_simulator as sim
import train_rl as rl
from plumbing import served
from plumbing.cli import UserError
from plumbing.devices import compute_dtype
from plumbing.engines import SearchRequest
from plumbing.files import read_jsonl, read_questions, write_jsonl
from plumbing.generate import HFGenerator, Sampling
from plumbing.models import fetch_smollm2, load_model, load_tokenizer, named_weights
from plumbing.remote import in_threads
from plumbing.scorer import Sequence, TokenScorer, collate
from plumbing.served import ServerGenerator, VLLMGenerator, load_generator
from plumbing.text import ROOT, encode, prompt_ids

pytestmark = pytest.mark.vllm
pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm")

GREEDY = Sampling(max_tokens=64, temperature=0.0)
WORLD = ROOT / "data/world"


@pytest.fixture(scope="module")
def vllm16():
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"  # two engines live side by side, as in training
    return VLLMGenerator("smollm2")


@pytest.fixture(scope="module")
def prompts(vllm16) -> list[list[int]]:
    """100 prompts: the world's questions under the policy's template, with a reply's start."""
    tokenizer, rows = vllm16.tokenizer, read_questions(WORLD / "dev.jsonl")[:100]
    starts = ["<think> I need to search.", "The answer is", "<search>", "Let me think about", ""]
    return [rl.new_episode(row, 0, tokenizer, PROMPTS).ids + encode(tokenizer, starts[i % 5])
            for i, row in enumerate(rows)]


def gaps(model, prompts, outputs) -> torch.Tensor:
    """How far the model's log-prob of every sampled token is from the sampler's, in nats."""
    scorer, found = TokenScorer(model), []
    for prompt, out in zip(prompts, outputs, strict=True):
        sequence = Sequence(prompt + out.ids, [0] * len(prompt) + [1] * len(out.ids))
        with torch.no_grad():
            logprobs, _ = scorer(*collate([sequence], torch.device("cpu")))
        found.append((logprobs - torch.tensor(out.logprobs)).abs())
    return torch.cat(found)


def test_float32_greedy_tokens_are_those_of_transformers(prompts):
    """>= 95 of 100 identical; where two part, the model sees next to no difference between them."""
    model, seeds = load_model("smollm2"), [0] * len(prompts)
    theirs = VLLMGenerator("smollm2", dtype=torch.float32).generate(prompts, GREEDY, seeds)
    ours = HFGenerator(model, load_tokenizer("smollm2")).generate(prompts, GREEDY, seeds)
    model.set_attn_implementation("sdpa")
    different = [i for i in range(len(prompts)) if ours[i].ids != theirs[i].ids]
    assert len(different) <= 5
    for i in different:
        same = os.path.commonprefix([ours[i].ids, theirs[i].ids])
        with torch.no_grad():
            logits = model(torch.tensor([prompts[i] + same])).logits[0, -1]
        first, second = logits.topk(2).values
        assert first - second < 0.01, (i, len(same))


def test_the_logprobs_are_close_to_the_trainers(vllm16, prompts):
    outputs = vllm16.generate(prompts, GREEDY, [0] * len(prompts))
    assert gaps(load_model("smollm2", compute_dtype()), prompts, outputs).median() < 0.02


def test_a_weight_update_reaches_the_sampler_and_its_cache(vllm16, prompts):
    """A missed sync, or a stale prefix cache, would be seen: both are shown."""
    sampling, seeds, few = Sampling(16, 0.0), list(range(20)), prompts[:20]
    vllm16.generate(few, sampling, seeds)  # fills the prefix cache with keys of the old weights
    old, new = load_model("smollm2"), load_model("smollm2")
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in new.named_parameters():
            if "proj" in name:
                parameter.add_(0.1 * parameter.std() * torch.randn_like(parameter))

    def gap(model) -> float:
        return gaps(model, few, vllm16.generate(few, sampling, seeds)).median().item()

    fresh = vllm16.llm.reset_prefix_cache
    vllm16.llm.reset_prefix_cache = lambda: None
    vllm16.load_weights(named_weights(new))
    stale, vllm16.llm.reset_prefix_cache = gap(new), fresh
    vllm16.load_weights(named_weights(new))
    followed, unsynced = gap(new), gap(old)
    vllm16.load_weights(named_weights(old))
    back = gap(old)
    assert max(followed, back) < 0.03, (followed, back)
    assert min(stale, unsynced) > 2 * max(followed, back), (stale, unsynced)


def test_stop_strings_stay_in_the_ids_and_seeds_decide(vllm16):
    tokenizer = vllm16.tokenizer
    user = "Say: <search> the capital of Peru </search> and more"
    prompt = prompt_ids(tokenizer, "Repeat what the user says.", user,
                        start="<search> the capital of Peru </")
    (output,) = vllm16.generate([prompt], Sampling(32, 0.0, ("</search>", "search>")), [0])
    assert output.stop_reason == "stop" and tokenizer.decode(output.ids).endswith("search>")
    assert len(output.logprobs) == len(output.ids) <= 4
    draws = [vllm16.generate([prompt], Sampling(24, 1.5), [seed])[0].ids for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]
    (cut,) = vllm16.generate([prompt], Sampling(3, 1.5), [1])
    assert cut.stop_reason == "length" and cut.ids == draws[0][:3]


def test_a_failed_request_fails_alone(vllm16, prompts, monkeypatch):
    """An error is raised to its caller; the next call is served."""
    with pytest.raises(UserError, match="9000 tokens"):
        vllm16.generate([[5] * 9000], Sampling(4), [0])
    with monkeypatch.context() as broken, pytest.raises(ZeroDivisionError):
        broken.setattr(served, "from_vllm", lambda output: 1 / 0)
        vllm16.generate(prompts[:2], Sampling(4), [0, 1])
    assert vllm16.generate(prompts[:1], Sampling(4), [0])[0].ids


def test_a_signal_ends_the_wait_for_a_step_that_hangs(vllm16, prompts, monkeypatch):
    """As that of a rollout, whose threads wait for the engine's. Then the next call is served."""
    engine, free, hung = vllm16.llm.llm_engine, threading.Event(), []

    def hang(step=engine.step):
        if not hung:
            hung.append(time.monotonic())
            os.kill(os.getpid(), signal.SIGTERM)
            free.wait(60)
        return step()

    def interrupt(number, frame):
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    monkeypatch.setattr(engine, "step", hang)
    with pytest.raises(KeyboardInterrupt):
        in_threads(lambda i: vllm16.generate([prompts[i]], Sampling(4), [i]), list(range(4)), 4)
    assert time.monotonic() - hung[0] < 10
    free.set()
    assert vllm16.generate(prompts[:1], Sampling(4), [0])[0].ids


def test_two_steps_of_training_with_vllm(tmp_path):
    """Policy and simulator both in vLLM, in one process; the sampler stays close to the trainer."""
    rows = random.Random(0).sample(read_jsonl(WORLD / "train.jsonl"), 8)
    write_jsonl(tmp_path / "questions.jsonl", rows)
    options = ["--data", tmp_path / "questions.jsonl", "--out", tmp_path / "run", "--simulator",
               "smollm2", "--generator", "vllm", "--steps", 2, "--prompts-per-step", 2,
               "--rollouts", 2, "--max-searches", 1, "--tokens-per-turn", 24, "--context-tokens",
               512, "--simulator-max-tokens", 32, "--lr", "1e-4"]
    command = [sys.executable, ROOT / "train_rl.py", "train", *options]
    environment = os.environ | {"OMP_NUM_THREADS": "2", "VLLM_CPU_KVCACHE_SPACE": "1"}
    subprocess.run(list(map(str, command)), env=environment, check=True, timeout=300)
    lines = read_jsonl(tmp_path / "run/metrics.jsonl")
    assert len(lines) == 2
    assert all(np.isfinite(row["loss/policy"]) and row["loss/logprob_gap"] < 0.1 for row in lines)


@pytest.fixture(scope="module")
def server(vllm16, tmp_path_factory):
    """Address of a real vLLM server with the embedded model. (The CPU's `vllm serve` fails.)"""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    log = tmp_path_factory.mktemp("server") / "log"
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model",
               str(fetch_smollm2()), "--port", port, "--max-model-len", "4096", "--logprobs-mode",
               "processed_logprobs", "--no-enable-chunked-prefill", "--max-num-batched-tokens",
               "8192", "--dtype", str(compute_dtype()).removeprefix("torch.")]
    environment = os.environ | {  # it shares the cores
        "OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
    with open(log, "w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
    try:
        for _ in range(240):
            assert process.poll() is None, log.read_text()[-3000:]
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2)
                break
            except OSError:
                time.sleep(1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(30)


def test_a_real_server_returns_the_ids_it_sampled_and_plays_both_models(server, prompts):
    """Its ids and log-probs are those of the trainer, to the precision of the arithmetic."""
    generator, few = load_generator(server), prompts[:40]
    assert isinstance(generator, ServerGenerator)
    assert generator.tokenizer.eos_token == "<|im_end|>"
    outputs = generator.generate(few, Sampling(32, 0.0, ("</search>",)), list(range(40)))
    assert gaps(load_model("smollm2", compute_dtype()), few, outputs).median() < 0.02
    first, second = generator.generate(few[:1] * 2, Sampling(24, 1.0), [5, 6])
    assert first.ids != second.ids
    # It plays the simulator and the policy: rollouts in threads, both models served.
    simulator = load_generator(f"{server},{server}", needs_ids=False)
    engine = sim.SimulatedEngine(simulator, 2, PROMPTS, max_tokens=24)
    episodes = [rl.new_episode(row, 0, generator.tokenizer, PROMPTS)
                for row in read_questions(WORLD / "dev.jsonl")[:4]]
    limits = rl.EpisodeSettings(max_searches=1, tokens_per_turn=16, context_tokens=1024)
    rl.rollout(episodes, rl.Setup(generator, engine, PROMPTS, limits))
    assert all(e.end and sum(e.mask) for e in episodes)
    assert all(len(e.ids) == len(e.mask) == len(e.logprobs) for e in episodes)
    request = SearchRequest("capital of Peru", "What is the capital of Peru?", ("Lima",))
    (result,) = engine.search([request])  # asked twice: 24 tokens are never two documents
    assert result.error is None and result.completion_tokens > 24

"""The vLLM engine on the CPU against Transformers, on the embedded model. `make test-vllm` runs these, CI too."""

import os
import random
import socket
import subprocess
import sys
import time
import urllib.request

import numpy as np
import pytest
import torch

import sft_simulator as sim
import train_rl as rl
from sft_simulator import ROOT, Sampling, Sequence, TokenScorer, encode, load_model, prompt_ids

pytestmark = pytest.mark.vllm
pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm")

GREEDY = Sampling(max_tokens=64, temperature=0.0)
PROMPTS = sim.load_prompts()


@pytest.fixture(scope="module", autouse=True)
def small_cache():
    """Two engines live side by side here, as they do in training."""
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"


@pytest.fixture(scope="module")
def vllm16():
    return sim.VLLMGenerator("smollm2")


@pytest.fixture(scope="module")
def prompts(vllm16) -> list[list[int]]:
    """100 prompts: questions of the world under the policy's template, each with the first words of a reply."""
    rows = sim.read_questions(ROOT / "data/world/dev.jsonl")[:100]
    starts = ["<think> I need to search.", "The answer is", "<search>", "Let me think about", ""]
    return [rl.new_episode(row, 0, vllm16.tokenizer, PROMPTS).ids + encode(vllm16.tokenizer, starts[i % 5])
            for i, row in enumerate(rows)]  # fmt: skip


def teacher_forced(model, prompts, outputs) -> list[torch.Tensor]:
    """The model's log-prob of every sampled token, one tensor an output."""
    with torch.no_grad():
        return [TokenScorer(model)(*sim.collate([Sequence(p + o.ids, [0] * len(p) + [1] * len(o.ids))], torch.device("cpu")))[0]
                for p, o in zip(prompts, outputs)]  # fmt: skip


def test_float32_greedy_tokens_are_those_of_transformers(prompts):
    """>= 95 of 100 identical; where two part, the model itself sees next to no difference between the two tokens."""
    model = load_model("smollm2")
    theirs = sim.VLLMGenerator("smollm2", dtype="float32").generate(prompts, GREEDY, [0] * len(prompts))
    ours = sim.HFGenerator(model, sim.load_tokenizer("smollm2")).generate(prompts, GREEDY, [0] * len(prompts))
    model.set_attn_implementation("sdpa")
    different = [i for i in range(len(prompts)) if ours[i].ids != theirs[i].ids]
    print(f"\nidentical: {len(prompts) - len(different)} of {len(prompts)}")
    assert len(different) <= 5
    for i in different:
        same = len(os.path.commonprefix([ours[i].ids, theirs[i].ids]))
        with torch.no_grad():
            logits = model(torch.tensor([prompts[i] + ours[i].ids[:same]])).logits[0, -1]
        top = logits.topk(2).values
        print(f"prompt {i} parts at token {same}: the first two logits differ by {top[0] - top[1]:.4f}")
        assert top[0] - top[1] < 0.01


def test_bfloat16_logprobs_are_close_to_the_trainers(vllm16, prompts):
    outputs = vllm16.generate(prompts, GREEDY, [0] * len(prompts))
    trainer = teacher_forced(load_model("smollm2", torch.bfloat16), prompts, outputs)
    gaps = (torch.cat(trainer) - torch.tensor([lp for o in outputs for lp in o.logprobs])).abs()
    print(f"\nlog-prob gap in nats: median {gaps.median():.4f}, 99th percentile {gaps.quantile(0.99):.4f}")
    assert gaps.median() < 0.02


def test_a_weight_update_reaches_the_sampler_and_its_cache(vllm16, prompts):
    """The same prompts before and after: log-probs follow the new weights. Without the sync they would not, and with
    a stale prefix cache they would lie in between: both are shown to be seen."""
    sampling, seeds, few = Sampling(16, 0.0), list(range(20)), prompts[:20]
    vllm16.generate(few, sampling, seeds)  # fills the prefix cache with the old weights' keys and values
    old, new = load_model("smollm2"), load_model("smollm2")
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in new.named_parameters():
            if "proj" in name:
                parameter.add_(0.1 * parameter.std() * torch.randn_like(parameter))

    def gap(model) -> float:
        outputs = vllm16.generate(few, sampling, seeds)
        sampled = torch.tensor([logprob for o in outputs for logprob in o.logprobs])
        return (torch.cat(teacher_forced(model, few, outputs)) - sampled).abs().median().item()

    fresh = vllm16.llm.reset_prefix_cache
    vllm16.llm.reset_prefix_cache = lambda: None
    vllm16.load_weights(rl.named_weights(new))
    stale, vllm16.llm.reset_prefix_cache = gap(new), fresh
    vllm16.load_weights(rl.named_weights(new))
    followed, unsynced = gap(new), gap(old)
    vllm16.load_weights(rl.named_weights(old))
    back = gap(old)
    print(f"\nmedian gap: synced {followed:.4f}, back again {back:.4f}, stale cache {stale:.4f}, no sync {unsynced:.4f}")
    assert max(followed, back) < 0.03
    assert min(stale, unsynced) > 2 * max(followed, back)


def test_stop_strings_stay_in_the_ids_and_seeds_decide(vllm16):
    tokenizer = vllm16.tokenizer
    prompt = prompt_ids(tokenizer, "Repeat what the user says.", "Say: <search> the capital of Peru </search> and more",
                        start="<search> the capital of Peru </")  # fmt: skip
    (output,) = vllm16.generate([prompt], Sampling(32, 0.0, ("</search>", "search>")), [0])
    assert output.stop_reason == "stop" and tokenizer.decode(output.ids).endswith("search>")
    assert len(output.logprobs) == len(output.ids) <= 4
    draws = [vllm16.generate([prompt], Sampling(24, 1.5), [seed])[0].ids for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]
    (cut,) = vllm16.generate([prompt], Sampling(3, 1.5), [1])
    assert cut.stop_reason == "length" and cut.ids == draws[0][:3]


def test_a_failed_request_fails_alone(vllm16, prompts, monkeypatch):
    """What goes wrong is raised to its caller, a prompt beyond the model's context at once; the next call is served."""
    with pytest.raises(sim.UserError, match="9000 tokens"):
        vllm16.generate([[5] * 9000], Sampling(4), [0])
    with monkeypatch.context() as broken, pytest.raises(ZeroDivisionError):
        broken.setattr(sim, "from_vllm", lambda output: 1 / 0)
        vllm16.generate(prompts[:2], Sampling(4), [0, 1])
    assert vllm16.generate(prompts[:1], Sampling(4), [0])[0].ids


def test_asynchronous_episodes_are_whole_and_draw_the_same_noise(vllm16):
    """Episodes in threads against the lockstep: every id accounted for, noise draws by turn the same."""

    class Engine:
        def search(self, requests):
            return [sim.SearchResult([f"About {request.query[:40]}"]) for request in requests]

    class Prodded:
        """vLLM, with turns that always search: half of the beginning is written for it."""

        tokenizer, concurrent = vllm16.tokenizer, True

        def generate(self, prompts, sampling, seeds):
            start = encode(self.tokenizer, "<search> a query </search>")
            outputs = vllm16.generate(prompts, Sampling(4, 1.0), seeds)
            return [sim.Generation(o.ids + start, o.logprobs + [0.0] * len(start), "stop") for o in outputs]

    rows = sim.read_questions(ROOT / "data/world/dev.jsonl")[:12]
    settings = rl.RolloutSettings(max_searches=2, tokens_per_turn=16, context_tokens=1024)
    runs = []
    for concurrent in (True, False):
        generator = Prodded()
        generator.concurrent = concurrent
        episodes = [rl.new_episode(row, g, vllm16.tokenizer, PROMPTS) for row in rows for g in range(2)]
        rl.rollout(episodes, generator, vllm16.tokenizer, Engine(), PROMPTS, settings, noise=0.5, seed=3, step=1)
        assert all(e.searches == 2 and e.end == "turns" and len(e.ids) == len(e.mask) == len(e.logprobs) for e in episodes)
        runs.append([[turn.quality for turn in e.turns] for e in episodes])
    assert runs[0] == runs[1] and {"useful", "noisy"} <= {quality for turns in runs[0] for quality in turns}


def test_two_steps_of_training_with_vllm(run_script, tmp_path):
    """The real command: policy and simulator both in vLLM, in one process; the sampler stays close to the trainer."""
    rows = sim.read_jsonl(ROOT / "data/world/train.jsonl")
    sim.write_jsonl(tmp_path / "questions.jsonl", random.Random(0).sample(rows, 8))
    run_script("train_rl.py", "train", "--data", tmp_path / "questions.jsonl", "--simulator", "smollm2", "--generator", "vllm",
               "--out", tmp_path / "run", "--steps", 2, "--prompts-per-step", 2, "--rollouts", 2, "--max-searches", 1,
               "--tokens-per-turn", 24, "--context-tokens", 512, "--simulator-max-tokens", 32, "--lr", "1e-4",
               OMP_NUM_THREADS="2", VLLM_CPU_KVCACHE_SPACE="1")  # fmt: skip
    lines = sim.read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert len(lines) == 2
    assert all(np.isfinite(line["loss/policy"]) and line["loss/logprob_gap"] < 0.1 for line in lines)


@pytest.fixture(scope="module")
def server(vllm16, tmp_path_factory):
    """A real vLLM server with the embedded model; gives its base address. (`vllm serve` of the CPU package fails.)"""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(sim.fetch_smollm2()),
               "--port", str(port), "--max-model-len", "4096", "--logprobs-mode", "processed_logprobs",
               "--no-enable-chunked-prefill", "--max-num-batched-tokens", "8192"]  # fmt: skip
    quiet = {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}  # it shares the cores
    environment = {name: value for name, value in os.environ.items() if name != "VLLM_ENABLE_V1_MULTIPROCESSING"} | quiet
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


def test_a_real_server_returns_the_ids_it_sampled(server, prompts):
    """Its ids and log-probs are good enough to train on: those of the trainer, to bfloat16's precision."""
    generator = sim.load_generator(server)
    assert isinstance(generator, sim.ServerGenerator) and generator.tokenizer.eos_token == "<|im_end|>"
    outputs = generator.generate(prompts[:40], Sampling(32, 0.0, ("</search>",)), list(range(40)))
    trainer = teacher_forced(load_model("smollm2", torch.bfloat16), prompts[:40], outputs)
    gaps = (torch.cat(trainer) - torch.tensor([lp for o in outputs for lp in o.logprobs])).abs()
    assert gaps.median() < 0.02
    again = generator.generate(prompts[:1] * 2, Sampling(24, 1.0), [5, 6])
    assert again[0].ids != again[1].ids


def test_a_real_server_plays_the_simulator_and_the_policy(server, run_script):
    """Rollouts in threads, both models served; and the command a user tries first."""
    policy, simulator = sim.load_generator(server), sim.load_generator(f"{server},{server}", needs_ids=False)
    engine = sim.SimulatedEngine(simulator, simulator.tokenizer, 2, PROMPTS, max_tokens=24)
    rows = sim.read_questions(ROOT / "data/world/dev.jsonl")[:4]
    episodes = [rl.new_episode(row, 0, policy.tokenizer, PROMPTS) for row in rows]
    settings = rl.RolloutSettings(max_searches=1, tokens_per_turn=16, context_tokens=1024)
    rl.rollout(episodes, policy, policy.tokenizer, engine, PROMPTS, settings)
    assert all(e.end and len(e.ids) == len(e.mask) == len(e.logprobs) and sum(e.mask) for e in episodes)
    (result,) = engine.search([sim.SearchRequest("capital of Peru", "What is the capital of Peru?", ("Lima",))])
    assert result.completion_tokens > 24 and result.error is None  # asked twice: 24 tokens are never two documents
    done = run_script("sft_simulator.py", "search", "capital of Peru", "--engine", "simulator", "--simulator", server)
    assert done.stdout.count("capital of Peru") == 2 and "useful" in done.stdout and "noisy" in done.stdout

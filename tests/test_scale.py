"""The mathematics does not change with the number of ranks; presets, loggers, rates."""

import json
import os
import subprocess

import pytest
import ranks
import torch
from accelerate import Accelerator
from accelerate.commands.config.config_args import load_config_from_file
from helpers import (
    ALGORITHMS,
    ROOT,
    TWO_PROCESSES,
    gradient,
    make_model,
    relative,
    saved_episodes,
    settings,
)
from typer.testing import CliRunner

import sft_simulator as sim
import train_rl as rl

# ---------------------------------------------------------------- ranks


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """What two processes under `accelerate launch` made of their shares of one global batch."""
    out = tmp_path_factory.mktemp("ranks") / "results.pt"
    done = subprocess.run([*TWO_PROCESSES, str(ROOT / "tests/ranks.py"), str(out)], capture_output=True, text=True, timeout=200,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "freed" not in done.stdout  # a rank ends at once: freeing a process group can hang
    return torch.load(out, weights_only=False)


def test_two_ranks_have_the_gradient_of_one(two_ranks):
    """DDP: all algorithms, in float64 and float32; ranks of unequal shares, with unequal numbers of micro-batches."""
    assert len(ranks.CASES) == len(two_ranks["ddp"]) == 2 * len(ALGORITHMS)
    for (dtype, changes), (kept, metrics) in zip(ranks.CASES, two_ranks["ddp"]):
        whole, expected = gradient(ranks.episodes(), dtype, **changes)
        assert whole.norm() > 1e-3
        assert relative(kept, whole) <= (1e-9 if dtype == torch.float64 else 1e-4), (dtype, changes)
        assert metrics == pytest.approx(expected, rel=1e-5, abs=1e-6), (dtype, changes)


def test_two_shards_make_the_step_of_one(two_ranks):
    """FSDP2's fully_shard: parameters are DTensors, two epochs of PPO give the same weights, which reach the sampler whole."""
    sampler, critic, metrics = two_ranks["fsdp"]
    trainer, expected = ranks.step(ranks.episodes())
    assert 0.45 < two_ranks["share"] < 0.55  # of each rank, of all parameters
    for found, module in ((sampler, trainer.policy.model), (critic, trainer.critic)):
        parameters = dict(module.named_parameters())
        assert found.keys() == parameters.keys()
        for name, tensor in parameters.items():
            assert relative(found[name], tensor) <= 1e-9, name
    start = dict(ranks.exact_model(3).named_parameters())
    assert relative(sampler["transformer.wte.weight"], start["transformer.wte.weight"]) > 1e-3  # it did move
    assert metrics == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_gradient_checkpointing_changes_no_gradient(tiny):
    """Layers run again in the backward pass, and that is all."""
    episodes, s = saved_episodes(), settings(kl_coef=0.0)
    found, calls = [], []
    for checkpointing in (False, True):
        scorer = rl.TokenScorer(rl.load_trained(str(tiny), checkpointing))
        optimizer = torch.optim.SGD(scorer.parameters(), lr=0.0)
        hook = lambda *_: calls.append(checkpointing)  # noqa: B023, E731
        scorer.model.model.layers[0].mlp.register_forward_pre_hook(hook)
        trainer = rl.Trainer(Accelerator(cpu=True), scorer, optimizer)
        optimizer.zero_grad = lambda: None
        rl.update(trainer, s, episodes, rl.PhaseClock())
        found.append(torch.cat([p.grad.flatten() for p in scorer.parameters()]))
    assert torch.equal(*found) and calls.count(True) == 2 * calls.count(False)
    inside = {type(module).__name__ for module in scorer.model.modules() if module.training}
    assert inside == {"LlamaDecoderLayer"}  # dropout, in models that have one, stays off


def test_ranks_get_whole_groups_and_like_numbers_of_tokens():
    lengths = [9, 1, 5, 5, 2, 2, 8, 8, 1, 1, 3, 3]  # groups of 10, 10, 4, 16, 2, 6 tokens
    episodes = [rl.Episode(f"q{i // 2}", "?", ["x"], sample=i % 2, ids=[0] * length) for i, length in enumerate(lengths)]
    shares = rl.deal(episodes, 2, 2)
    assert [sum(len(e.ids) for e in share) for share in shares] == [24, 24]
    assert all(a.id == b.id and (a.sample, b.sample) == (0, 1) for share in shares for a, b in zip(share[::2], share[1::2]))
    assert sorted((e.id, e.sample) for share in shares for e in share) == sorted((e.id, e.sample) for e in episodes)


# ---------------------------------------------------------------- rates


def test_rates_by_hand():
    """A model whose parameters are counted by hand, phases of one and two seconds, a peak of 1e6 operations a second."""
    scorer = rl.TokenScorer(make_model(259))
    trainer = rl.Trainer(Accelerator(cpu=True), scorer, None)
    body, head = 2 * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 64 + 2 * 32) + 32, 259 * 32
    batch = [sim.Sequence([5] * 10, [0] * 6 + [1] * 4), sim.Sequence([5] * 3 + [6] * 4, [0] * 5 + [1] * 2)]
    trainer.work += [rl.Pass(scorer, batch, 2), rl.Pass(scorer, batch[:1], 6), rl.Pass(scorer, batch[1:], 6)]
    metrics = {"time/rollout": 3.0, "time/reference": 1.0, "time/update": 2.0, "cost/policy_tokens": 6}
    forward = 2 * (14 * body + 6 * head)  # three tokens are shared
    update = 6 * (17 * body + 6 * head) / 2  # a second; not in micro-batches of one
    assert rl.rates(trainer, metrics, 1e6) == pytest.approx({
        "rate/rollout_tokens": 2.0, "rate/reference_tokens": 17.0, "rate/reference_tflops": forward / 1e12,
        "rate/update_tokens": 8.5, "rate/update_tflops": update / 1e12, "rate/mfu": update / 1e6,
    })  # fmt: skip
    assert not trainer.work


def test_the_update_tells_its_work():
    """Every pass is counted once: here two epochs over all episodes, and forward passes of the policy and the reference."""
    trainer, _ = ranks.step(ranks.episodes())
    tokens = sum(len(e.ids) for e in ranks.episodes())
    seen = {(id(w.module), w.operations): 0 for w in trainer.work}
    for work in trainer.work:
        seen[id(work.module), work.operations] += sum(len(s.ids) for s in work.batch)
    forward = {(id(module), 2): tokens for module in (trainer.policy, trainer.reference, trainer.critic)}
    assert seen == forward | {(id(module), 6): 2 * tokens for module in (trainer.policy, trainer.critic)}


def test_the_peak_is_a_rate_of_this_machine():
    assert 1e8 < rl.peak_flops(torch.device("cpu")) < 1e15


# ---------------------------------------------------------------- presets, loggers

REQUIRED = ["--data", "train.jsonl", "--out", "runs/x", "--simulator", "simulator"]


def shown(*options):
    """What `train --show-config` prints; nothing is loaded: neither the data nor the models exist."""
    done = CliRunner().invoke(rl.app, ["train", *REQUIRED, *options, "--show-config"])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", rl.load_presets())
def test_presets_hold_the_papers_figures(name):
    paper = json.loads((ROOT / "data/paper.json").read_text())["hyperparameters"]
    names = {"prompts_per_step": "prompts_per_step", "rollouts_per_prompt": "rollouts", "steps": "steps", "policy_lr": "lr",
             "critic_lr": "critic_lr", "kl_coef": "kl_coef", "clip": "clip_low", "rollout_temperature": "temperature",
             "top_k_documents": "top_k", "max_search_turns": "max_searches", "tokens_per_turn": "tokens_per_turn",
             "context_tokens": "context_tokens", "observation_tokens": "observation_tokens", "p_start": "p_start",
             "p_end": "p_end", "curriculum_base": "base", "simulator_temperature": "simulator_temperature",
             "simulator_max_tokens": "simulator_max_tokens"}  # fmt: skip
    config, preset = shown("--preset", name), rl.load_presets()[name]
    assert {p: config[option] for p, option in names.items()} == {p: paper[p] for p in names}
    assert (config["clip_high"], config["gamma"], config["gae_lambda"]) == (0.2, paper["gae"]["gamma"], paper["gae"]["lambda"])
    assert {key: config[key] for key in preset} == preset  # every key is an option, and arrives
    assert config["model"].split("/")[1].removesuffix("-Instruct") in paper["policy"]


def test_presets_cover_the_papers_policies():
    assert {name.removesuffix("-instruct") for name in rl.load_presets()} == {
        "paper-qwen2.5-3b", "paper-qwen2.5-7b", "paper-llama3.2-3b"}  # fmt: skip
    assert len(rl.load_presets()) == 6
    for algorithm in ("reinforce", "grpo", "ppo"):
        assert shown("--preset", "paper-qwen2.5-3b", "--algorithm", algorithm)["algorithm"] == algorithm


def test_an_option_goes_before_its_preset():
    config = shown("--preset", "paper-llama3.2-3b", "--lr", "3e-6", "--steps", "203", "--baseline", "leave-one-out")
    assert (config["lr"], config["steps"], config["baseline"]) == (3e-6, 203, "leave-one-out")
    assert config["model"] == "meta-llama/Llama-3.2-3B"
    assert shown()["model"] == "smollm2"  # a preset does not outlive its call
    assert shown("--gradient-checkpointing")["gradient_checkpointing"] is True


@pytest.mark.parametrize("options,words", [
    (["--preset", "paper-gpt-5"], "paper-qwen2.5-3b"),
    (["--logger", "abacus"], "tensorboard"),
    (["--logger", "dvclive"], "pip install dvclive"),
    (["--preset", "paper-qwen2.5-3b", "--algorithm", "grpo", "--rollouts", "1"], "--rollouts 1"),
])  # fmt: skip
def test_bad_presets_and_loggers(options, words):
    done = CliRunner().invoke(rl.app, ["train", *REQUIRED, *options])
    assert isinstance(done.exception, sim.UserError) and words in str(done.exception)


@pytest.mark.parametrize("path", sorted((ROOT / "data/accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_the_configs(path):
    config = load_config_from_file(str(path))
    assert config.num_processes == int(path.stem.split("-")[0]) and config.mixed_precision == "bf16"
    kind = "NO" if config.num_processes == 1 else {"ddp": "MULTI_GPU", "fsdp2": "FSDP"}[path.stem.split("-")[2]]
    assert str(config.distributed_type.value) == kind
    assert kind != "FSDP" or config.fsdp_config["fsdp_version"] == 2


def test_fsdp_finds_a_models_layers():
    """It asks the module it is given, ours, not the model inside."""
    for module in (rl.TokenScorer(make_model(259)), rl.Critic(make_model(259))):
        assert list(module._no_split_modules) == ["LlamaDecoderLayer"]

"""Ranks change no number; presets, trackers and Accelerate's configs hold what they promise."""

import json
import re
import signal
import subprocess
import tomllib

import pytest
import ranks
import torch
from accelerate.commands.config.config_args import load_config_from_file
from helpers import (ALGORITHMS, BUDGET, TWO_PROCESSES, command, gradient, question, read_lines,
                     read_metrics, relative)

import train_rl as rl
from plumbing.models import load_trained
from plumbing.ranks import balance_over_ranks
from plumbing.scorer import Critic, TokenScorer
from plumbing.text import ROOT


def training(folder, policy) -> list:
    """A step of `train` on four questions; its run goes to folder/run."""
    rows = [json.dumps(question(i)) + "\n" for i in range(4)]
    (folder / "data.jsonl").write_text("".join(rows))
    return ["train", "--data", folder / "data.jsonl", "--model", policy, "--out", folder / "run",
            *BUDGET, "--engine", "none", "--lr", "1e-4", "--prompts-per-step", 4,
            "--batch-tokens", 450, "--steps", 1]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory, policy):
    """What two processes under `accelerate launch` made of their shares of one global batch, and
    the folder of a run of `train`."""
    folder = tmp_path_factory.mktemp("ranks")
    launched = [*TWO_PROCESSES, ROOT / "tests/ranks.py", folder / "results.pt",
                *training(folder, policy)]
    done = subprocess.run(list(map(str, launched)), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "freed" not in done.stdout  # a rank ends at once: freeing a process group can hang
    return torch.load(folder / "results.pt", weights_only=False) | {"run": folder / "run"}


def test_two_ranks_have_the_gradient_of_one(two_ranks):
    """DDP: all algorithms, float64 and float32; unequal shares and numbers of micro-batches."""
    assert len(ranks.CASES) == len(two_ranks["ddp"]) == 2 * len(ALGORITHMS)
    for (dtype, changes), (kept, metrics) in zip(ranks.CASES, two_ranks["ddp"]):
        whole, expected = gradient(ranks.episodes(), dtype, **changes)
        bound = 1e-9 if dtype == torch.float64 else 1e-4
        assert whole.norm() > 1e-3 and relative(kept, whole) <= bound, (dtype, changes)
        assert metrics == pytest.approx(expected, rel=1e-5, abs=1e-6), (dtype, changes)


def test_two_ranks_have_the_mini_batches_of_one(two_ranks):
    """Those of the global batch; a rank may have nothing of one."""
    (kept, metrics), (whole, expected) = two_ranks["mini-batch"], ranks.mini_batch()
    assert relative(kept, whole) <= 1e-9 and whole.norm() > 1e-3
    assert metrics == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_two_ranks_tune_like_one(two_ranks):
    """Three sequences and two: the second rank's last micro-batch is of nothing."""
    (loss, kept), (expected, whole) = two_ranks["supervised"], ranks.supervised()
    assert relative(kept, whole) <= 1e-9 and loss.item() == pytest.approx(expected.item())


def test_two_ranks_answer_a_question_each(two_ranks):
    """Each question is recorded once, in the order of the data."""
    assert two_ranks["answered"] == (5, list("024"))
    records = read_lines(two_ranks["run"].with_name("predictions.jsonl"))
    assert [record["id"] for record in records] == list("01234")


def test_a_signal_to_one_rank_stops_both(two_ranks):
    assert two_ranks["signal"] == signal.SIGTERM


def test_two_shards_make_the_step_of_one(two_ranks):
    """FSDP2: two epochs of PPO in two mini-batches, with warm-up, give the same weights, which
    reach the sampler whole."""
    sampler, critic, metrics = two_ranks["fsdp"]
    trainer, expected = ranks.step(*ranks.episodes(size=4))
    assert 0.45 < two_ranks["share"] < 0.55  # of each rank, of all parameters
    for found, module in ((sampler, trainer.policy.model), (critic, trainer.critic)):
        parameters = dict(module.named_parameters())
        assert found.keys() == parameters.keys()
        for name, tensor in parameters.items():
            assert relative(found[name], tensor) <= 1e-9, name
    start = ranks.exact_model(3).transformer.wte.weight
    assert relative(sampler["transformer.wte.weight"], start) > 1e-3  # it did move
    assert metrics == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_two_ranks_train_like_one(two_ranks, policy, tmp_path):
    """The command itself: the same questions and seeds, so the steps agree; one rank writes."""
    command(rl, *training(tmp_path, policy))
    (one,), (two,) = map(read_metrics, (tmp_path / "run", two_ranks["run"]))
    assert one["loss/grad_norm"] > 0 and 0 < one["reward/mean"] < 1
    assert two == pytest.approx(one, rel=0.02, abs=1e-3)  # perhaps bfloat16, in other micro-batches
    mine, theirs = ([(e["id"], e["sample"], e["ids"]) for e in read_lines(run / "episodes.jsonl")]
                    for run in (tmp_path / "run", two_ranks["run"]))
    assert mine == theirs


def test_ranks_get_whole_groups_and_like_numbers_of_tokens():
    lengths = [9, 1, 5, 5, 2, 2, 8, 8, 1, 1, 3, 3]  # groups of 10, 10, 4, 16, 2, 6 tokens
    episodes = [rl.Episode(f"q{i // 2}", "?", ["x"], sample=i % 2, ids=[0] * length)
                for i, length in enumerate(lengths)]
    shares = balance_over_ranks(episodes, 2, ranks=2)
    assert [sum(len(e.ids) for e in share) for share in shares] == [24, 24]
    dealt = [share[i : i + 2] for share in shares for i in range(0, len(share), 2)]
    assert sum(sorted(dealt, key=lambda group: group[0].id), []) == episodes


def test_fsdp_and_checkpointing_find_a_models_layers(tiny):
    """FSDP asks our module, not the model inside; only layers that checkpoint are in training."""
    for checkpointing, training in ((True, {"LlamaDecoderLayer"}), (False, set())):
        model = load_trained(str(tiny), checkpointing)
        assert {type(part).__name__ for part in model.modules() if part.training} == training
        for module in (TokenScorer(model), Critic(model)):
            assert list(module._no_split_modules) == ["LlamaDecoderLayer"]


@pytest.mark.parametrize("path", sorted((ROOT / "data/accelerate").glob("*.yaml")),
                         ids=lambda path: path.stem)
def test_accelerate_reads_the_configs(path):
    config, count = load_config_from_file(str(path)), int(path.stem.split("-")[0])
    assert config.num_processes == count and config.mixed_precision == "bf16"
    kind = "NO" if count == 1 else {"ddp": "MULTI_GPU", "fsdp2": "FSDP"}[path.stem.split("-")[2]]
    assert str(config.distributed_type.value) == kind
    assert kind != "FSDP" or config.fsdp_config["fsdp_version"] == 2


REQUIRED = ["--data", "train.jsonl", "--out", "runs/x", "--simulator", "simulator"]
PRESETS = tomllib.loads((ROOT / "data/presets.toml").read_text())
SHARED = {name: PRESETS.pop(name) for name in list(PRESETS) if not isinstance(PRESETS[name], dict)}


def show(capsys, *options):
    """What `train --show-config` prints; nothing is loaded: neither data nor models exist."""
    command(rl, "train", *REQUIRED, *options, "--show-config")
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_hold_the_papers_figures(capsys, name):
    paper = json.loads((ROOT / "data/paper.json").read_text())["hyperparameters"]
    config = show(capsys, "--preset", name)
    names = {"rollouts_per_prompt": "rollouts", "policy_lr": "lr", "clip": "clip_low",
             "rollout_temperature": "temperature", "top_k_documents": "top_k",
             "max_search_turns": "max_searches", "curriculum_base": "base"}
    names |= {name: name for name in (
        "prompts_per_step", "steps", "critic_lr", "kl_coef", "tokens_per_turn", "context_tokens",
        "observation_tokens", "p_start", "p_end", "simulator_temperature", "simulator_max_tokens")}
    assert {p: config[option] for p, option in names.items()} == {p: paper[p] for p in names}
    gae = {"gamma": config["gamma"], "lambda": config["gae_lambda"]}
    assert config["clip_high"] == 0.2 and gae == paper["gae"]
    assert (SHARED | PRESETS[name]).items() <= config.items()  # every key is an option, and arrives
    model = config["model"].split("/")[1]
    assert name == f"paper-{model.lower().replace('llama-', 'llama')}" and len(PRESETS) == 6
    assert model.removesuffix("-Instruct") in paper["policy"]


def test_presets_are_the_released_runs_where_the_paper_is_silent(capsys):
    """data/presets.md: every value of the table is the preset's, and the released one."""
    table = re.findall(r"^\| (\w+) \| (\S+) \| (\S+) \| (\S+) \|", (
        ROOT / "data/presets.md").read_text(encoding="utf-8"), re.M)[1:]
    config = show(capsys, "--preset", "paper-qwen2.5-3b")
    released = {"mini_batch_size": 256, "warmup_ratio": 0.95, "critic_warmup_ratio": 0.015}
    for option, paper, run, preset in table:
        assert config[option] == float(preset) == float(run if paper == "–" else paper), option
        assert float(run) == released.pop(option, float(run))
    assert len(table) > 15 and not released


def test_an_option_goes_before_its_preset(capsys):
    options = {"lr": 3e-6, "steps": 204, "baseline": "none", "algorithm": "reinforce"}
    config = show(capsys, "--preset=paper-llama3.2-3b", "--gradient-checkpointing",
                  *(f"--{name}={value}" for name, value in options.items()))
    options |= {"gradient_checkpointing": True, "model": "meta-llama/Llama-3.2-3B"}
    assert options.items() <= config.items()
    assert show(capsys)["model"] == "smollm2"  # a preset does not outlive its call

"""Optimisation steps of this kit and of TRL's GRPOTrainer on one machine.

\b
    python results/bench_trl.py compare    # after make demo; writes results/trl.md

Two workloads of 64 rollouts, float32 weights and `compute_dtype`, without KL:

\b
    equal   8 of each prompt, 145 prompt tokens and 64 sampled ones: generation with Transformers on
            either side (and with vLLM on ours, where it is installed), then the update
    real    episodes of a training run (ragged, documents inside, groups as it had them), given to
            both; TRL gets them by its rollout_func

Every measurement is a process of its own, for peak memory is a process's; it takes one step to warm
up, then a timed one. The two sides take turns, and figures are medians over the pairs. Rewards are
set to 0 and 1 in turn within each group, so that neither side has a group without advantage to
skip.
"""

import functools
import importlib.util
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, Literal

import torch
import transformers
import typer

# last: evaluate.py must not hide the package `evaluate`
sys.path.append(str(Path(__file__).resolve().parents[1]))
import train_rl as rl
from plumbing.cli import UserError, console, make_app, markdown_table, run_cli
from plumbing.files import read_jsonl, read_questions
from plumbing.generate import Sampling
from plumbing.models import load_model, load_tokenizer, make_accelerator, named_weights
from plumbing.devices import compute_dtype
from plumbing.rates import PhaseClock, peak_flops, useful_products
from plumbing.runfolder import describe_run
from plumbing.served import load_generator
from plumbing.text import ROOT

app = make_app(__doc__)
Episodes = Annotated[Path, typer.Option(help="real: episodes.jsonl of a training run.")]
Workload = Literal["equal", "real"]
RUN = ROOT / "runs" / "demo" / "policy" / "episodes.jsonl"

MODEL = "smollm2"
EPISODES, ROLLOUTS = 64, 8  # ROLLOUTS of a prompt: of the equal workload
PROMPT_TOKENS, COMPLETION_TOKENS = 145, 64  # of the equal workload
BATCH_TOKENS = 1280  # of our micro-batches: on a CPU as fast as larger ones, in less memory
TRL_BATCH = 8  # sequences of TRL's: per_device_train_batch_size


# ---------------------------------------------------------------- workloads


def equal_prompts(tokenizer) -> list[str]:
    """Texts of exactly so many tokens: questions of the demo's world, one after the other, cut."""
    questions = [row["question"] for row in read_questions(ROOT / "data/world/train.jsonl")]
    texts = []
    for start in range(len(questions) - 100):
        ids = tokenizer(" ".join(questions[start : start + 100]))["input_ids"]
        text = tokenizer.decode(ids[:PROMPT_TOKENS])
        if len(tokenizer(text)["input_ids"]) == PROMPT_TOKENS:  # not if a character was cut
            texts.append(text)
        if len(texts) == EPISODES // ROLLOUTS:
            return texts
    raise UserError(f"no {EPISODES // ROLLOUTS} texts of {PROMPT_TOKENS} tokens could be made")


def real_episodes(path: Path) -> list[rl.Episode]:
    """The first episodes of a run, as they were played."""
    names = {f.name for f in fields(rl.Episode)}
    rows = read_jsonl(path, ("id", "ids", "mask", "prompt_tokens"))[:EPISODES]
    if len(rows) < EPISODES:
        raise UserError(f"{path}: fewer than {EPISODES} episodes")
    return [rl.Episode(**{name: value for name, value in row.items() if name in names})
            for row in rows]


def group_size(episodes: list[rl.Episode]) -> int:
    """Rollouts of a prompt: a run's groups stand one after the other."""
    return sum(episode.id == episodes[0].id for episode in episodes)


def set_rewards(episodes: list[rl.Episode]) -> None:
    for i, episode in enumerate(episodes):
        episode.reward = float(i % 2)


# ---------------------------------------------------------------- one measurement


def measure_ours(side: str, workload: Workload, path: Path) -> dict[str, Any]:
    """Two steps of the kit's own functions; figures of the second."""
    accelerator = make_accelerator()
    generator, norms = None, []
    rollouts = ROLLOUTS if workload == "equal" else group_size(real_episodes(path))
    s = rl.TrainSettings(data=Path("x"), out=Path("x"), model=MODEL, rollouts=rollouts, kl_coef=0.0,
                         importance_cap=0.0, batch_tokens=BATCH_TOKENS)
    trainer = rl.make_trainer(accelerator, s)
    if workload == "equal":
        tokenizer, generator = load_tokenizer(MODEL), endless_generator(side)
        ids = [tokenizer(text)["input_ids"] for text in equal_prompts(tokenizer)]
    for step in range(2):
        clock = PhaseClock()
        if generator:
            with clock("rollout"):
                episodes = sample(generator, ids, step)
        else:
            episodes = real_episodes(path)
        set_rewards(episodes)
        trainer.work.clear()
        norms.append(rl.update(trainer, s, episodes, clock)["loss/grad_norm"])
        if generator:
            with clock("sync"):
                policy = accelerator.unwrap_model(trainer.policy).model
                generator.load_weights(named_weights(policy))
        seconds = clock.metrics()
    flops = sum(work.operations * useful_products(accelerator, work) for work in trainer.work)
    return {"rollout": seconds.get("time/rollout", 0.0),
            "update": seconds["time/reference"] + seconds["time/update"],
            "step": seconds["time/step"], "grad_norm": norms[0],
            "tokens": sum(len(e.ids) for e in episodes),
            "trained": sum(sum(e.mask) for e in episodes), "flops": flops}


def endless_generator(side: str):
    """A generator whose completions all have their full length."""
    generator = load_generator(MODEL, "vllm" if side == "vllm" else "hf")
    if side == "vllm":
        generator.sampling_params = functools.partial(generator.sampling_params, ignore_eos=True)
    else:
        generator.tokenizer = SimpleNamespace(eos_token_id=-1)
    return generator


def sample(generator, prompts: list[list[int]], step: int) -> list[rl.Episode]:
    """ROLLOUTS episodes of one turn for each prompt."""
    prompts = [prompt for prompt in prompts for _ in range(ROLLOUTS)]
    seeds = [step * 1000 + i for i in range(len(prompts))]
    episodes = []
    sampled = generator.generate(prompts, Sampling(COMPLETION_TOKENS), seeds)
    for prompt, generation in zip(prompts, sampled):
        episodes.append(episode := rl.Episode("", "", [], prompt_tokens=len(prompt)))
        episode.read(prompt)
        episode.write(generation.ids, generation.logprobs)
    return episodes


def measure_trl(workload: Workload, path: Path) -> dict[str, Any]:
    """Two steps of GRPOTrainer.train; figures of the second.

    What is no rollout, but in the step, is its update."""
    from datasets import Dataset
    from trl import GRPOTrainer

    timings: list[dict[str, float]] = []

    class Timed(GRPOTrainer):
        def _generate_and_score_completions(self, inputs):
            begun = time.perf_counter()
            output = super()._generate_and_score_completions(inputs)
            prompts, completions = output["prompt_mask"], output["completion_mask"]
            trained = completions * output.get("tool_mask", 1)
            timings[-1] |= {"rollout": time.perf_counter() - begun,
                            "tokens": int(prompts.sum() + completions.sum()),
                            "trained": int(trained.sum())}
            return output

    class Clock(transformers.TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            timings.append({"begun": time.perf_counter()})

        def on_step_end(self, args, state, control, **kwargs):
            timings[-1]["step"] = time.perf_counter() - timings[-1]["begun"]

    def alternate(completions, **kwargs) -> list[float]:
        return [float(i % 2) for i in range(len(completions))]

    tokenizer, model = load_tokenizer(MODEL), load_model(MODEL).train()
    texts, replay, rollouts = equal_prompts(tokenizer), None, ROLLOUTS
    if workload == "real":
        stored = real_episodes(path)
        rollouts, replay = group_size(stored), replay_of(stored)
        texts = [str(i) for i in range(EPISODES // rollouts)]
    with tempfile.TemporaryDirectory() as folder:
        trainer = Timed(model, alternate, trl_config(folder, rollouts),
                        Dataset.from_dict({"prompt": texts}), processing_class=tokenizer,
                        callbacks=[Clock()], rollout_func=replay)
        trainer.train()
    last = timings[-1]
    norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    return {"rollout": last["rollout"], "update": last["step"] - last["rollout"],
            "step": last["step"], "grad_norm": norms[0], "tokens": last["tokens"],
            "trained": last["trained"],
            "flops": useful_flops(model, last["tokens"], last["trained"])}


def trl_config(folder: str, rollouts: int):
    """Our settings in TRL's words: token mean (DAPO), no KL, AdamW without decay."""
    from trl import GRPOConfig

    return GRPOConfig(
        output_dir=folder, max_steps=2, per_device_train_batch_size=TRL_BATCH,
        gradient_accumulation_steps=EPISODES // TRL_BATCH, num_generations=rollouts,
        max_completion_length=COMPLETION_TOKENS, temperature=1.0,
        generation_kwargs={"min_new_tokens": COMPLETION_TOKENS}, beta=0.0, loss_type="dapo",
        learning_rate=1e-6, lr_scheduler_type="constant", max_grad_norm=1.0,
        optim="adamw_torch_fused", bf16=compute_dtype() == torch.bfloat16,
        use_cpu=not torch.cuda.is_available(), gradient_checkpointing=False,
        dataloader_pin_memory=False, logging_steps=1, save_strategy="no",
        report_to="none", disable_tqdm=True, seed=0)


def replay_of(stored: list[rl.Episode]):
    """TRL's hook for rollouts made elsewhere: env_mask is 0 at the tokens of documents."""
    drawn, rollouts = Counter(), group_size(stored)

    def replay(prompts: list[str], trainer) -> dict[str, list]:
        chosen = []
        for prompt in prompts:
            chosen.append(stored[int(prompt) * rollouts + drawn[prompt] % rollouts])
            drawn[prompt] += 1
        return {"prompt_ids": [e.ids[: e.prompt_tokens] for e in chosen],
                "completion_ids": [e.ids[e.prompt_tokens :] for e in chosen],
                "logprobs": [e.logprobs[e.prompt_tokens :] for e in chosen],
                "env_mask": [e.mask[e.prompt_tokens :] for e in chosen]}

    return replay


@app.command()
def measure(
    side: Annotated[Literal["ours", "vllm", "trl"], typer.Argument(
        help="vllm: ours, with that engine.")],
    workload: Annotated[Workload, typer.Argument()],
    episodes: Episodes = RUN,
) -> None:
    """One measurement; prints it as a line of JSON. Seconds, tokens, bytes."""
    transformers.set_seed(0)
    result = (measure_trl(workload, episodes) if side == "trl"
              else measure_ours(side, workload, episodes))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
    print(json.dumps(result | {"peak": peak}))


# ---------------------------------------------------------------- all of them


def useful_flops(model, tokens: int, trained: int) -> float:
    """6 a body parameter and token, 6 a head parameter and trained position.

    Embeddings and attention are not counted."""
    head = model.get_output_embeddings().weight.numel()
    body = sum(p.numel() for p in model.get_decoder().parameters())
    body -= model.get_input_embeddings().weight.numel()
    return 6 * body * tokens + 6 * head * trained


@app.command()
def compare(
    out: Annotated[Path, typer.Option(
        help="Where the tables go (Markdown).")] = ROOT / "results" / "trl.md",
    pairs: Annotated[int, typer.Option(help="Pairs of measurements for each workload.")] = 3,
    episodes: Episodes = RUN,
) -> None:
    """Measure both workloads on both sides in turn, and write the tables."""
    real_episodes(episodes)
    rate = peak_flops(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    parts = [introduction(pairs, rate)]
    for workload in ("equal", "real"):
        with_vllm = workload == "equal" and importlib.util.find_spec("vllm")
        sides = ["ours", "trl"] + ["vllm"] * bool(with_vllm)
        measured: dict[str, list[dict]] = {side: [] for side in sides}
        for pair in range(pairs):
            for side in sides[:: -1 if pair % 2 else 1]:
                measured[side].append(run_measurement(side, workload, episodes))
                console.print(f"{workload}, pair {pair + 1} of {pairs}, {side}: "
                              f"{json.dumps(measured[side][-1])}")
        parts.append(section(workload, measured, rate))
    out.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    console.print(f"written: {out}")


def run_measurement(side: str, workload: str, episodes: Path) -> dict[str, Any]:
    command = [sys.executable, __file__, "measure", side, workload, "--episodes", str(episodes)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise UserError(f"{side}, {workload}: the measurement failed, see above")
    return json.loads(done.stdout.strip().splitlines()[-1])


def introduction(pairs: int, rate: float) -> str:
    packages = ("torch", "transformers", "trl", "accelerate")
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    device = f"{torch.get_num_threads()} threads of a CPU"
    arithmetic = str(compute_dtype()).removeprefix("torch.")
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    commit = describe_run()["commit"][:7]
    return (
        "# Optimisation steps beside TRL's GRPOTrainer\n\nMade by `python results/bench_trl.py "
        f"compare` at commit {commit} (its docstring says how). Model {MODEL}, "
        f"{EPISODES} rollouts, {arithmetic} arithmetic over float32 weights, no KL, no gradient "
        f"checkpointing; medians of {pairs} pair{'s' * (pairs > 1)}, "
        "the sides in turn, each in its own process after one step of warm-up. Micro-batches: ours "
        f"{BATCH_TOKENS} tokens, TRL's {TRL_BATCH} sequences.\n\n{versions}; Python "
        f"{platform.python_version()}, {device}, {os.cpu_count()} cores. A large {arithmetic} "
        f"matrix product runs at {rate / 1e12:.3f} TFLOP/s: 100 % MFU. Useful FLOPs are 6 x body "
        "parameters x tokens + 6 x head parameters x trained positions. This kit computes a prefix "
        "that episodes of a micro-batch share once: the MFU counts it once, tokens/s in each "
        "episode.")


NAMES = {"ours": "this kit", "vllm": "this kit, vLLM", "trl": "TRL"}
WORKLOADS = {
    "equal": "## Equal lengths\n\n8 rollouts of a prompt; every prompt and every completion has "
             "the same number of tokens. Both sides generate with Transformers, each its own "
             "tokens: norms differ.",
    "real": "## Episodes of a training run\n\nRagged, with documents inside that are read and not "
            "trained. Both sides get the same token ids, masks and rewards, so that the norms of "
            "the first gradient can be compared."}


def section(workload: str, measured: dict[str, list[dict]], rate: float) -> str:
    """The table of one workload, and what it says."""
    header = ["", "update, s", "tokens/s", "MFU, %", "generation, s", "sampled/s",
              "whole step, s", "peak, GB", "gradient norm"]
    rows = []
    for side, runs in measured.items():
        middle = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        sampled = ["-"] * 3
        if workload == "equal":
            sampled = [f"{middle['rollout']:.2f}", f"{middle['trained'] / middle['rollout']:.0f}",
                       f"{middle['step']:.2f}"]
        rows.append([NAMES[side], f"{middle['update']:.2f}",
                     f"{middle['tokens'] / middle['update']:.0f}",
                     f"{100 * middle['flops'] / middle['update'] / rate:.1f}", *sampled,
                     f"{middle['peak'] / 1e9:.2f}", f"{middle['grad_norm']:.4f}"])
    notes = [ratios(side, runs, measured["trl"], workload) for side, runs in measured.items()
             if side != "trl"]
    first = measured["ours"][0]
    title = (f"{WORKLOADS[workload]} {first['tokens']:,} tokens, {first['trained']:,} of them "
             "trained.")
    return "\n\n".join([title, markdown_table(header, rows), *notes])


def ratios(side: str, ours: list[dict], theirs: list[dict], workload: str) -> str:
    """A sentence: the medians of the pairs' ratios."""
    by_pair = {key: [b[key] / a[key] for a, b in zip(ours, theirs)]
               for key in ("update", "step", "peak")}
    ratio = {key: statistics.median(values) for key, values in by_pair.items()}
    pairs = ", ".join(f"{x:.2f}" for x in by_pair["update"])
    whole = f", whole step {ratio['step']:.2f} times" if workload == "equal" else ""
    return (f"{NAMES[side]}: update {ratio['update']:.2f} times as fast as TRL's (pairs: {pairs})"
            f"{whole}; TRL's peak memory is {ratio['peak']:.2f} times the kit's.")


if __name__ == "__main__":
    run_cli(app)

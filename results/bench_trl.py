"""Optimisation steps of this kit and of TRL's GRPOTrainer on one machine: `make bench-trl` writes results/trl.md.

Two workloads of 64 rollouts of 8 prompts, in bfloat16 autocast over float32 weights, without KL:

\b
    equal   145 prompt tokens and 64 sampled ones each: generation with Transformers on either side (and with vLLM on
            ours, where it is installed), then the update
    real    episodes of a training run (ragged, documents inside), given to both; TRL gets them by its rollout_func

Every measurement is a process of its own, for peak memory is a process's; it takes one step to warm up, then a timed one.
The two sides take turns, and figures are medians over the pairs. Rewards are set to 0 and 1 in turn within each
group, so that neither side has a group without advantage to skip.
"""

import functools
import importlib.util
import inspect
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
from accelerate import Accelerator

sys.path.append(str(Path(__file__).resolve().parent.parent))
import sft_simulator as sim
import train_rl as rl

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
Episodes = Annotated[Path, typer.Option(help="real: episodes.jsonl of a training run.")]
RUN = sim.ROOT / "runs" / "demo" / "policy" / "episodes.jsonl"

MODEL = "smollm2"
PROMPTS, ROLLOUTS = 8, 8
PROMPT_TOKENS, COMPLETION_TOKENS = 145, 64  # of the equal workload
BATCH_TOKENS = 1280  # of our micro-batches: on a CPU as fast as larger ones, in less memory
TRL_BATCH = 8  # sequences of TRL's: per_device_train_batch_size


# ---------------------------------------------------------------- workloads


def equal_prompts(tokenizer) -> list[str]:
    """Texts of exactly so many tokens: questions of the demo's world, one after the other, cut."""
    questions = [row["question"] for row in sim.read_questions(sim.ROOT / "data/world/train.jsonl")]
    texts = []
    for start in range(len(questions) - 100):
        text = tokenizer.decode(tokenizer(" ".join(questions[start : start + 100]))["input_ids"][:PROMPT_TOKENS])
        if len(tokenizer(text)["input_ids"]) == PROMPT_TOKENS:  # not if the cut fell within a character
            texts.append(text)
        if len(texts) == PROMPTS:
            return texts
    raise sim.UserError(f"no {PROMPTS} texts of {PROMPT_TOKENS} tokens could be made")


def real_episodes(path: Path) -> list[rl.Episode]:
    """The first episodes of a run, as they were played."""
    names = {f.name for f in fields(rl.Episode)}
    rows = sim.read_jsonl(path, ("id", "ids", "mask", "prompt_tokens"))[: PROMPTS * ROLLOUTS]
    if len(rows) < PROMPTS * ROLLOUTS:
        raise sim.UserError(f"{path}: fewer than {PROMPTS * ROLLOUTS} episodes")
    return [rl.Episode(**{name: value for name, value in row.items() if name in names}) for row in rows]


def set_rewards(episodes: list[rl.Episode]) -> None:
    for i, episode in enumerate(episodes):
        episode.reward = float(i % 2)


# ---------------------------------------------------------------- one measurement


def measure_ours(s: SimpleNamespace) -> dict[str, Any]:
    """Two steps of the kit's own functions; figures of the second."""
    accelerator = Accelerator(mixed_precision="bf16")
    tokenizer = sim.load_tokenizer(MODEL)
    settings = {name: p.default for name, p in inspect.signature(rl.train).parameters.items()}
    changes = {"model": MODEL, "rollouts": ROLLOUTS, "kl_coef": 0.0, "importance_cap": 0.0, "batch_tokens": BATCH_TOKENS}
    trainer = rl.make_trainer(accelerator, options := SimpleNamespace(**settings | changes))
    generator, norms = None, []
    if s.workload == "equal":
        generator = sim.load_generator(MODEL, device=accelerator.device, engine="vllm" if s.side == "vllm" else "hf")
        if s.side == "vllm":  # in either case every completion has its full length
            generator.sampling_params = functools.partial(generator.sampling_params, ignore_eos=True)
        else:
            generator.tokenizer = SimpleNamespace(eos_token_id=-1)
        ids = [tokenizer(text)["input_ids"] for text in equal_prompts(tokenizer)]
    for step in range(2):
        clock, episodes = rl.PhaseClock(), []
        if s.workload == "real":
            episodes = real_episodes(s.episodes)
        else:
            with clock("rollout"):
                prompts = [prompt for prompt in ids for _ in range(ROLLOUTS)]
                seeds = [step * 1000 + i for i in range(len(prompts))]
                sampled = generator.generate(prompts, sim.Sampling(COMPLETION_TOKENS), seeds)
            for prompt, generation in zip(prompts, sampled):
                episodes.append(episode := rl.Episode("", "", []))
                episode.read(prompt)
                episode.prompt_tokens = len(prompt)
                episode.write(generation.ids, generation.logprobs)
        set_rewards(episodes)
        trainer.work.clear()
        norms.append(rl.update(trainer, options, episodes, clock)["loss/grad_norm"])
        if generator:
            with clock("sync"):
                generator.load_weights(rl.named_weights(accelerator.unwrap_model(trainer.policy).model))
        seconds = clock.metrics()
    rollout = seconds.get("time/rollout", 0.0)
    update = seconds["time/reference"] + seconds["time/update"]
    flops = sum(work.operations * rl.useful_products(accelerator, work) for work in trainer.work)
    tokens, trained = sum(len(e.ids) for e in episodes), sum(sum(e.mask) for e in episodes)
    return {"rollout": rollout, "update": update, "step": seconds["time/step"], "grad_norm": norms[0],
            "tokens": tokens, "trained": trained, "flops": flops}  # fmt: skip


def measure_trl(s: SimpleNamespace) -> dict[str, Any]:
    """Two steps of GRPOTrainer.train; figures of the second. What is no rollout, but in the step, is its update."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    tokenizer = sim.load_tokenizer(MODEL)
    stored, drawn, timings = [], Counter(), []

    class Timed(GRPOTrainer):
        def _generate_and_score_completions(self, inputs):
            begun = time.perf_counter()
            output = super()._generate_and_score_completions(inputs)
            timings[-1]["rollout"] = time.perf_counter() - begun
            timings[-1]["tokens"] = int(output["prompt_mask"].sum() + output["completion_mask"].sum())
            mask = output["completion_mask"] * output.get("tool_mask", 1)
            timings[-1]["trained"] = int(mask.sum())
            return output

    class Clock(transformers.TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            timings.append({"begun": time.perf_counter()})

        def on_step_end(self, args, state, control, **kwargs):
            timings[-1]["step"] = time.perf_counter() - timings[-1]["begun"]

    def replay(prompts: list[str], trainer) -> dict[str, list]:
        """TRL's hook for rollouts made elsewhere: env_mask is 0 at the tokens of documents."""
        chosen = []
        for prompt in prompts:
            chosen.append(stored[int(prompt) * ROLLOUTS + drawn[prompt] % ROLLOUTS])
            drawn[prompt] += 1
        return {
            "prompt_ids": [e.ids[: e.prompt_tokens] for e in chosen],
            "completion_ids": [e.ids[e.prompt_tokens :] for e in chosen],
            "logprobs": [e.logprobs[e.prompt_tokens :] for e in chosen],
            "env_mask": [e.mask[e.prompt_tokens :] for e in chosen],
        }

    def alternate(completions, **kwargs) -> list[float]:
        return [float(i % 2) for i in range(len(completions))]

    if s.workload == "real":
        stored = real_episodes(s.episodes)
        texts = [str(i) for i in range(PROMPTS)]
    else:
        texts = equal_prompts(tokenizer)
    model = sim.load_model(MODEL).train()
    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder, max_steps=2, per_device_train_batch_size=TRL_BATCH,
            gradient_accumulation_steps=PROMPTS * ROLLOUTS // TRL_BATCH, num_generations=ROLLOUTS,
            max_completion_length=COMPLETION_TOKENS, generation_kwargs={"min_new_tokens": COMPLETION_TOKENS},
            temperature=1.0, beta=0.0, loss_type="dapo", learning_rate=1e-6, lr_scheduler_type="constant", max_grad_norm=1.0,
            optim="adamw_torch_fused", bf16=True, use_cpu=not torch.cuda.is_available(), gradient_checkpointing=False,
            dataloader_pin_memory=False, logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True, seed=0,
        )  # fmt: skip
        trainer = Timed(model, alternate, config, Dataset.from_dict({"prompt": texts}), processing_class=tokenizer,
                        callbacks=[Clock()], rollout_func=replay if stored else None)  # fmt: skip
        trainer.train()
    last = timings[-1]
    norm = next(entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry)
    update = last["step"] - last["rollout"]
    return {"rollout": last["rollout"], "update": update, "step": last["step"], "grad_norm": norm, "tokens": last["tokens"],
            "trained": last["trained"], "flops": useful_flops(model, last["tokens"], last["trained"])}  # fmt: skip


@app.command()
def measure(
    side: Annotated[Literal["ours", "vllm", "trl"], typer.Argument(help="vllm: ours, with that engine.")],
    workload: Annotated[Literal["equal", "real"], typer.Argument()],
    episodes: Episodes = RUN,
) -> None:
    """One measurement; prints it as a line of JSON. Seconds, tokens, bytes."""
    s = SimpleNamespace(**locals())
    transformers.set_seed(0)
    result = (measure_trl if side == "trl" else measure_ours)(s)
    on_gpu = torch.cuda.is_available()
    peak = torch.cuda.max_memory_allocated() if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps(result | {"peak": peak}))


# ---------------------------------------------------------------- all of them


def useful_flops(model, tokens: int, trained: int) -> float:
    """6 a body parameter and token, 6 a head parameter and trained position; embeddings and attention are not counted."""
    head = model.get_output_embeddings().weight.numel()
    body = sum(p.numel() for p in model.get_decoder().parameters()) - model.get_input_embeddings().weight.numel()
    return 6 * body * tokens + 6 * head * trained


@app.command()
def compare(
    out: Annotated[Path, typer.Option(help="Where the tables go (Markdown).")] = sim.ROOT / "results" / "trl.md",
    pairs: Annotated[int, typer.Option(help="Pairs of measurements for each workload.")] = 3,
    episodes: Episodes = RUN,
) -> None:
    """Measure both workloads on both sides in turn, and write the tables."""
    real_episodes(episodes)
    rate = rl.peak_flops(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    parts = [introduction(pairs, rate)]
    for workload in ("equal", "real"):
        sides = ["ours", "trl"] + ["vllm"] * bool(workload == "equal" and importlib.util.find_spec("vllm"))
        measured: dict[str, list[dict]] = {side: [] for side in sides}
        for pair in range(pairs):
            for side in sides[:: -1 if pair % 2 else 1]:
                measured[side].append(run_measurement(side, workload, episodes))
                sim.console.print(f"{workload}, pair {pair + 1} of {pairs}, {side}: {json.dumps(measured[side][-1])}")
        parts.append(section(workload, measured, rate))
    out.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    sim.console.print(f"written: {out}")


def run_measurement(side: str, workload: str, episodes: Path) -> dict[str, Any]:
    command = [sys.executable, __file__, "measure", side, workload, "--episodes", str(episodes)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise sim.UserError(f"{side}, {workload}: the measurement failed, see above")
    return json.loads(done.stdout.strip().splitlines()[-1])


def introduction(pairs: int, rate: float) -> str:
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "trl", "accelerate"))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} threads of a CPU"
    return (f"# Optimisation steps beside TRL's GRPOTrainer\n\nMade by `make bench-trl` (results/bench_trl.py says how). "
            f"Model {MODEL}, {PROMPTS * ROLLOUTS} rollouts of {PROMPTS} prompts, bfloat16 autocast over float32 "
            f"weights, no KL, no gradient checkpointing; medians of {pairs} pair{'s' * (pairs > 1)}, the sides in "
            f"turn, each in its own process after one step of warm-up. "
            f"Micro-batches: ours {BATCH_TOKENS} tokens, TRL's {TRL_BATCH} sequences.\n\n"
            f"{versions}; Python {platform.python_version()}, {device}, {os.cpu_count()} cores. A large bfloat16 "
            f"matrix product runs at {rate / 1e12:.3f} TFLOP/s: 100 % MFU. Useful FLOPs are 6 x body "
            f"parameters x tokens + 6 x head parameters x trained positions; a beginning that episodes of a micro-batch share "
            f"is computed once by this kit, and then counted once, but in each episode as tokens/s.")  # fmt: skip


NAMES = {"ours": "this kit", "vllm": "this kit, vLLM", "trl": "TRL"}
WORKLOADS = {
    "equal": "## Equal lengths\n\nEvery prompt and every completion has the same number of tokens. Both sides generate with "
             "Transformers.",
    "real": "## Episodes of a training run\n\nRagged, with documents inside that are read and not trained. Both sides get the "
            "same token ids, masks and rewards, so that the norms of the first gradient can be compared.",
}  # fmt: skip


def section(workload: str, measured: dict[str, list[dict]], rate: float) -> str:
    """The table of one workload, and what it says."""
    header = ["", "update, s", "tokens/s", "MFU, %", "generation, s", "sampled/s", "whole step, s", "peak, GB", "gradient norm"]
    rows = []
    for side, runs in measured.items():
        middle = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        sampled = workload == "equal"
        rows.append([NAMES[side], f"{middle['update']:.2f}", f"{middle['tokens'] / middle['update']:.0f}",
                     f"{100 * middle['flops'] / middle['update'] / rate:.1f}", f"{middle['rollout']:.2f}" if sampled else "-",
                     f"{middle['trained'] / middle['rollout']:.0f}" if sampled else "-",
                     f"{middle['step']:.2f}" if sampled else "-", f"{middle['peak'] / 1e9:.2f}",
                     f"{middle['grad_norm']:.4f}"])  # fmt: skip
    lines = [" | ".join(["", *row, ""]).strip() for row in (header, ["---"] + ["---:"] * (len(header) - 1), *rows)]
    notes = [ratios(side, runs, measured["trl"], workload) for side, runs in measured.items() if side != "trl"]
    first = measured["ours"][0]
    title = f"{WORKLOADS[workload]} {first['tokens']:,} tokens, {first['trained']:,} of them trained."
    return "\n\n".join([title, "\n".join(lines), *notes])


def ratios(side: str, ours: list[dict], theirs: list[dict], workload: str) -> str:
    """A sentence: the medians of the pairs' ratios."""
    by_pair = {key: [b[key] / a[key] for a, b in zip(ours, theirs)] for key in ("update", "step", "peak")}
    ratio = {key: statistics.median(values) for key, values in by_pair.items()}
    pairs = ", ".join(f"{x:.2f}" for x in by_pair["update"])
    whole = f", whole step {ratio['step']:.2f} times" if workload == "equal" else ""
    return (f"{NAMES[side]}: update {ratio['update']:.2f} times as fast as TRL's (pairs: {pairs}){whole}; TRL's peak memory is "
            f"{ratio['peak']:.2f} times this.")  # fmt: skip


if __name__ == "__main__":
    sim.run_cli(app)

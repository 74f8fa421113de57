"""Metrics of a step: rewards, searches, tokens, cost counters, losses, and signs of collapse."""

from collections.abc import Callable
from typing import Any

import torch

from plumbing.cli import console
from plumbing.ranks import Worker
from plumbing.runfolder import StopRun


def rollout_metrics(episodes: list[Any], group_size: int,
                    noise: float | None = None) -> dict[str, float]:
    """What is logged of a step's episodes, in groups of the attempts at one prompt.

    noise: the curriculum's p; with a real engine None, and nothing is logged of noise."""
    scored = [e for e in episodes if e.end != "failed"]
    rewards = torch.tensor([e.reward for e in scored], dtype=torch.float64)
    groups = [episodes[i : i + group_size] for i in range(0, len(episodes), group_size)]
    by_group = [[e.reward for e in group if e.end != "failed"] for group in groups]
    turns = [turn for e in episodes for turn in e.turns]
    searches = [turn for turn in turns if turn.query is not None]
    answered = [turn for e in episodes for turn in (e.turns[:-1] if e.end == "failed" else e.turns)
                if turn.query is not None]
    return {
        "reward/mean": rewards.mean().item(),
        "reward/std": rewards.std(unbiased=False).item(),
        **{f"reward/{name}": mean(e.scores[name] for e in scored) for name in scored[0].scores},
        **by_hops("reward", scored, lambda e: e.reward),
        "reward/zero_variance_groups": mean(min(group) == max(group)
                                            for group in by_group if group),
        "search/per_episode": len(searches) / len(episodes),
        "search/invalid_actions": sum(turn.action == "invalid" for turn in turns) / len(episodes),
        **({} if noise is None else {
            "noise/p": noise, "search/noisy": mean(turn.quality == "noisy" for turn in searches)}),
        "search/malformed": sum(e.malformed for e in episodes) / max(len(searches), 1),
        "search/empty": mean(not turn.documents for turn in answered),
        "search/failed": sum(e.end == "failed" for e in episodes),
        "search/context_overflows": sum(e.end == "context" for e in episodes),
        "tokens/read": sum(len(e.ids) - sum(e.mask) - e.prompt_tokens for e in episodes),
        "cost/searches": sum(e.searches for e in episodes),
        "cost/simulator_prompt_tokens": sum(e.simulator_prompt_tokens for e in episodes),
        "cost/simulator_tokens": sum(e.simulator_tokens for e in episodes),
        "cost/policy_tokens": sum(sum(e.mask) for e in episodes),
    }


def eval_metrics(episodes: list[Any]) -> dict[str, float]:
    """Means over held-out episodes whose searches did not fail, and their number."""
    played = [e for e in episodes if e.end != "failed"]
    scores = {f"eval/{name}": mean(e.scores[name] for e in played)
              for name in ("em", "f1", "answered")}
    return {"eval/reward": mean(e.reward for e in played), **scores,
            **by_hops("eval/reward", played, lambda e: e.reward),
            "eval/searches": mean(e.searches for e in played),
            **by_hops("eval/searches", played, lambda e: e.searches), "eval/n": len(played)}


def by_hops(name: str, episodes: list[Any], value: Callable[[Any], float]) -> dict[str, float]:
    """The mean of a value over the questions of each number of hops, where that is known."""
    return {f"{name}/hops_{hops}": mean(value(e) for e in episodes if e.hops == hops)
            for hops in sorted({e.hops for e in episodes if e.hops})}


def mean(values) -> float:
    """The mean of any numbers; 0 of none."""
    values = [float(v) for v in values]
    return sum(values) / len(values) if values else 0.0


def agreement(pairs: list[tuple[str, str]]) -> str:
    """How far two judges' verdicts agree: the share, and Cohen's kappa (1960), beyond chance."""
    agreed = mean(a == b for a, b in pairs)
    chance = sum(mean(a == label for a, _ in pairs) * mean(b == label for _, b in pairs)
                 for label in {label for pair in pairs for label in pair})
    kappa = (agreed - chance) / (1 - chance) if chance < 1 else float("nan")
    return f"agree on {100 * agreed:.1f} % of {len(pairs)} pairs (Cohen's kappa {kappa:.2f})"


def empty_steps(rows: list[dict[str, float]], before: int = 0) -> int:
    """How many steps in a row, to the last of these, had searches of which none found a document.
    before: the count at the step before. A step without searches doesn't change it."""
    for row in rows:
        if row["cost/searches"]:
            before = before + 1 if row.get("search/empty") == 1 else 0
    return before


def check_empty_steps(count: int, allowed: int, step: int) -> None:
    """Warn of a step whose searches found nothing; raise StopRun at the last one allowed."""
    if not count:
        return
    text = (f"step {step}: no search found a document, {count} steps in a row (--empty-steps stops "
            f"at {allowed})")
    if count >= allowed:
        raise StopRun(f"{text}: the simulator writes no numbered list, or the engine has nothing")
    console.print(text, style="yellow", soft_wrap=True)


def collapse_warning(metrics: dict[str, float], can_search: bool) -> str | None:
    """A sentence if the policy is falling apart, else None."""
    if metrics["search/malformed"] > 0.5:
        return ("most outputs of the simulator are no list of documents: a larger "
                "--simulator-max-tokens, or a simulator that was tuned")
    if metrics["reward/answered"] < 0.05:
        return ("almost no episode answers: a policy that can't follow the template needs `warmup` "
                "first, or a lower --lr")
    if can_search and metrics["search/per_episode"] < 0.05:
        return "almost no episode searches: look at some (evaluate.py show), and at the simulator"
    if metrics["loss/entropy"] < 0.005 and metrics["tokens/trained"] > 0:
        return "the policy's entropy is almost 0: it tries nothing new and will learn nothing more"
    return None


# Of a step without a trained token: nothing is learnt, and the run goes on.
SKIPPED = dict.fromkeys((
    "loss/policy", "loss/entropy", "loss/clip_fraction", "loss/logprob_gap", "loss/grad_norm",
    "loss/advantage_std", "tokens/trained"), 0.0) | {"loss/skipped": 1.0}


def add_up(sums: list[dict[str, Any]]) -> dict[str, Any]:
    """The sums of several mini-batches; `grad_norm` is the last one's."""
    return {name: sum(part[name] for part in sums) for name in sums[0]} | {
        "grad_norm": sums[-1]["grad_norm"]}


def update_metrics(worker: Worker, targets: Any, tokens: float, first: dict[str, Any],
                   last: dict[str, Any]) -> dict[str, float]:
    """Metrics of an update: from its targets, its tokens, the sums of its first and last epoch."""
    trained = worker.total(first["scored"])
    scored = max(trained, 1.0)
    metrics = {
        "loss/policy": worker.total(last["policy"]) / tokens,
        "loss/entropy": worker.total(first["entropy"]) / scored,
        "loss/clip_fraction": worker.total(last["clipped"]) / scored,
        "loss/logprob_gap": worker.total(first["gap"]) / scored,
        "loss/grad_norm": last["grad_norm"],
        "loss/advantage_std": worker.moments(torch.cat(targets.advantages))[1].item(),
        "tokens/trained": trained,
    }
    if targets.reference is not None:
        metrics["loss/kl"] = worker.total(first["kl"]) / scored
    if targets.values is not None:
        returns, values = torch.cat(targets.returns), torch.cat(targets.values)
        metrics["loss/value"] = worker.total(first["value"]) / tokens
        error, spread = (worker.moments(x)[1].item() for x in (returns - values, returns))
        metrics["loss/explained_variance"] = 1 - (error / max(spread, 1e-8)) ** 2
    return metrics

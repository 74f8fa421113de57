"""Chapter 2: a policy learns by reinforcement learning to think, search and answer (ZeroSearch, section 3).

\b
    warmup    a few scripted trajectories teach a model too small to follow the template unprompted (off for others)
    train     the loop: rollout -> reward -> advantage -> loss -> step
    schedule  the curriculum: the share of noisy searches at each step

One step: `train`, at the bottom of this file, draws questions, `rollout` lets the policy talk to a search
engine for some turns, `score` compares its answers with the gold ones, `estimate_advantages` says which tokens did
better than expected, `update` makes them likelier. Documents are read, never trained.

\b
    python train_rl.py train --data data/world/train.jsonl --model runs/demo/warmup/model \\
        --engine simulator --simulator runs/demo/simulator/model --out runs/demo/policy
    accelerate launch train_rl.py train ...        # any number of devices, by Accelerate's own config
"""

import json
import math
import random
import re
import sys
import tomllib
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, Literal

import torch
import transformers
import typer
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import gather_object
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from rich.console import Console
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers.modeling_layers import GradientCheckpointingLayer

import costs
from plumbing.checkpoints import Signals, find_checkpoint, load_checkpoint, resume_command, save_checkpoint, set_lines_aside
from plumbing.cli import (
    MODEL_OR_SERVER,
    GeneratorOption,
    Overwrite,
    PromptsFile,
    Seed,
    TopK,
    Url,
    UserError,
    console,
    leave,
    progress_bar,
    run_cli,
)
from plumbing.engines import Quality, SearchEngine, SearchRequest, check_top_k
from plumbing.files import append_jsonl, draw_seed, open_run, read_jsonl, read_questions
from plumbing.generate import Generator, Sampling
from plumbing.models import load_model, load_tokenizer, make_accelerator, named_weights, save_model, whole
from plumbing.rates import Pass, PhaseClock, peak_flops, rates
from plumbing.scorer import NOTHING, Sequence, TokenScorer, collate, micro_batches, packed_states, same_count
from plumbing.served import load_generator
from plumbing.text import ROOT, Prompts, encode, fill, load_prompts, neutralize, normalize_answer, prompt_ids
from plumbing.web import check_engine, make_real_engine
from sft_simulator import SimulatedEngine, fine_tune, format_documents

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)


# ---------------------------------------------------------------- episodes


@dataclass
class Turn:
    """What the policy wrote in one turn, what that meant, and what came back."""

    text: str
    action: Literal["search", "answer", "invalid"]
    query: str | None = None
    quality: Quality | None = None  # what a simulator was asked for
    documents: list[str] = field(default_factory=list)


@dataclass
class Episode:
    """One attempt at one question: token ids with a mask (1 = sampled by the policy). The trainer sees these ids."""

    id: str
    question: str
    golden_answers: list[str]
    hops: int | None = None
    sample: int = 0  # which of the group's attempts
    prompt_tokens: int = 0
    ids: list[int] = field(default_factory=list)  # (T,)
    mask: list[int] = field(default_factory=list)  # (T,)
    logprobs: list[float] = field(default_factory=list)  # (T,) under the sampler, 0 where the mask is 0
    turns: list[Turn] = field(default_factory=list)
    answer: str | None = None
    end: Literal["answered", "turns", "context", "failed"] | None = None  # failed: a search did; not to be scored
    error: str | None = None  # why the search failed
    searches: int = 0
    malformed: int = 0
    simulator_prompt_tokens: int = 0
    simulator_tokens: int = 0
    reward: float = 0.0
    scores: dict[str, float] = field(default_factory=dict)

    def write(self, ids: list[int], logprobs: list[float]) -> None:
        """Append what the policy sampled."""
        self.ids += ids
        self.mask += [1] * len(ids)
        self.logprobs += logprobs

    def read(self, ids: list[int]) -> None:
        """Append what the policy is given to read."""
        self.ids += ids
        self.mask += [0] * len(ids)
        self.logprobs += [0.0] * len(ids)

    def record(self) -> dict[str, Any]:
        """The episode as one line of episodes.jsonl or predictions.jsonl."""
        return asdict(self)

    def trained_mask(self, mask_documents: bool) -> list[int]:
        """1 where a token counts: the policy's own; without document masking (the paper's Table 7) all but the prompt.

        The one place that decides it: loss, KL, entropy, advantages and values all follow."""
        if self.end == "failed":
            return [0] * len(self.ids)
        return self.mask if mask_documents else [0] * self.prompt_tokens + [1] * (len(self.ids) - self.prompt_tokens)


def new_episode(row: dict[str, Any], sample: int, tokenizer, prompts: Prompts, search: bool = True) -> Episode:
    """An episode that holds its prompt and nothing else; without search, under the template that doesn't offer it."""
    template = prompts["policy" if search else "policy_without_search"]
    user = fill(template["user"], question=neutralize(row["question"], tokenizer))
    episode = Episode(str(row["id"]), row["question"], row["golden_answers"], row.get("hops"), sample)
    episode.read(prompt_ids(tokenizer, fill(template["system"]), user))
    episode.prompt_tokens = len(episode.ids)
    return episode


# ---------------------------------------------------------------- rollout

STOP = ("</search>", "</answer>")
ACTION = re.compile(r"<(search|answer)>(.*?)</\1>", re.DOTALL)


@dataclass(frozen=True)
class RolloutSettings:
    """Limits of an episode, in turns and tokens. Defaults: the paper's."""

    max_searches: int = 5
    tokens_per_turn: int = 500
    context_tokens: int = 4096
    observation_tokens: int = 2048
    temperature: float = 1.0


def parse_action(text: str) -> tuple[Literal["search", "answer", "invalid"], str]:
    """The first whole <search> or <answer> in what the policy wrote this turn, and its content."""
    match = ACTION.search(text)
    if match is None or (match[1] == "search" and not match[2].strip()):
        return "invalid", ""
    return match[1], match[2].strip()


def observation_ids(tokenizer, documents: list[str], limit: int) -> list[int]:
    """Documents as the policy reads them. Too long a text is cut at the end of the documents: the tags are never cut."""
    text = format_documents([neutralize(document, tokenizer) for document in documents])
    opening, closing = encode(tokenizer, "\n<information>\n"), encode(tokenizer, "\n</information>\n")
    return opening + encode(tokenizer, text)[: max(0, limit - len(opening) - len(closing))] + closing


def noise_quality(p: float, seed: int, step: int, episode: Episode, turn: int) -> Quality:
    """Draw whether a search is noisy. A function of its arguments alone: restarts and threads change nothing."""
    return "noisy" if random.Random(draw_seed("noise", seed, step, episode.id, episode.sample, turn)).random() < p else "useful"


CONCURRENT_EPISODES = 256  # threads; each waits for a generator or a search most of the time


def rollout(episodes: list[Episode], generator: Generator, *args,
            clock: Callable = lambda phase: nullcontext(), **kwargs) -> None:  # fmt: skip
    """Play the episodes to their end, in place (paper, section 3.3); arguments as of `play`.

    A generator that takes requests at any time gets each episode in a thread of its own: it goes on the moment its
    documents arrive, and decoding and searches overlap. Others play all episodes in lockstep, in a fixed order. Seeds
    and noise draws are the same either way."""
    if not generator.concurrent:
        play(episodes, generator, *args, clock=clock, **kwargs)
        return
    with clock("rollout"), ThreadPoolExecutor(CONCURRENT_EPISODES) as threads:
        list(threads.map(lambda episode: play([episode], generator, *args, **kwargs), episodes))


def play(episodes: list[Episode], generator: Generator, tokenizer, engine: SearchEngine | None, prompts: Prompts,
         settings: RolloutSettings, *, noise: float = 0.0, seed: int = 0, step: int = 0,
         clock: Callable = lambda phase: nullcontext()) -> None:  # fmt: skip
    """Play episodes to their end, in place, one turn of all of them at a time.

    Each turn the policy writes up to </search> or </answer>; queries go to the engine with their own episode's
    question, answers and noise draw; documents are appended as they come. In `max_searches` turns the policy may search
    (an invalid action uses its turn up), in a last one it may only answer. An episode whose context
    has no room for a turn ends there, and scores what it answered: nothing."""
    sampling = Sampling(settings.tokens_per_turn, settings.temperature, STOP)
    template = prompts["policy_without_search" if engine is None else "policy"]
    active = episodes
    for turn in range(settings.max_searches + 1):
        for episode in active:
            if len(episode.ids) + settings.tokens_per_turn > settings.context_tokens:
                episode.end = "context"
        active = [e for e in active if e.end is None]
        if not active:
            return
        with clock("rollout"):
            seeds = [draw_seed("policy", seed, step, e.id, e.sample, turn) for e in active]
            generations = generator.generate([e.ids for e in active], sampling, seeds)
        for episode, generation in zip(active, generations, strict=True):
            episode.write(generation.ids, generation.logprobs)
            text = tokenizer.decode(generation.ids)
            action, content = parse_action(text)
            if action == "search" and engine is None:
                action = "invalid"
            episode.turns.append(Turn(text, action))
            if action == "answer":
                episode.answer, episode.end = content, "answered"
            elif turn == settings.max_searches:
                episode.end = "turns"  # a search here would be paid for and read by nobody
            elif action == "search":
                episode.turns[-1].query = content
                episode.turns[-1].quality = noise_quality(noise, seed, step, episode, turn)
        active = [e for e in active if e.end is None]
        with clock("search"):
            search_turn([e for e in active if e.turns[-1].query is not None], engine, tokenizer, settings, seed, step)
        for episode in active:
            if episode.turns[-1].action == "invalid":
                episode.read(encode(tokenizer, "\n" + fill(template["notice"]) + "\n"))
            if turn + 1 == settings.max_searches:
                episode.read(encode(tokenizer, fill(template["last_turn"]) + "\n"))


def search_turn(searching: list[Episode], engine: SearchEngine | None, tokenizer, settings: RolloutSettings,
                seed: int, step: int) -> None:  # fmt: skip
    """Answer the query each episode has just written. The request carries that episode's own question and answers.

    An episode whose search fails for good ends there: see `check_failures`."""
    if not searching:
        return
    requests = []
    for e in searching:
        turn = e.turns[-1]
        turn_seed = draw_seed("search", seed, step, e.id, e.sample, len(e.turns))
        requests.append(SearchRequest(turn.query, e.question, tuple(e.golden_answers), turn.quality, turn_seed))
    for episode, result in zip(searching, engine.search(requests), strict=True):
        if result.error:
            episode.end, episode.error = "failed", result.error
            continue
        episode.turns[-1].documents = result.documents
        episode.searches += 1
        episode.malformed += not result.well_formed
        episode.simulator_prompt_tokens += result.prompt_tokens
        episode.simulator_tokens += result.completion_tokens
        episode.read(observation_ids(tokenizer, result.documents, settings.observation_tokens))


# ---------------------------------------------------------------- reward


def exact_match(answer: str | None, golden_answers: list[str]) -> float:
    """1 if the normalised answer equals a normalised golden answer, else 0. No answer: 0."""
    return float(answer is not None and normalize_answer(answer) in map(normalize_answer, golden_answers))


def f1_score(answer: str | None, golden_answers: list[str]) -> float:
    """SQuAD's F1 over the words of the normalised strings, against the best golden answer (paper, section 3.4)."""
    if answer is None:
        return 0.0
    return max(word_f1(normalize_answer(answer), normalize_answer(gold)) for gold in golden_answers)


def word_f1(given: str, gold: str) -> float:
    given_words, gold_words = given.split(), gold.split()
    if not given_words or not gold_words:
        return float(given_words == gold_words)
    common = sum((Counter(given_words) & Counter(gold_words)).values())
    if not common:
        return 0.0
    precision, recall = common / len(given_words), common / len(gold_words)
    return 2 * precision * recall / (precision + recall)


REWARDS: dict[str, Callable[[str | None, list[str]], float]] = {"f1": f1_score, "em": exact_match}  # add your own
WELL_FORMED = re.compile(r"\s*<think>.*?</think>\s*<(search|answer)>[^<]*</\1>\s*", re.DOTALL)


def score(episode: Episode, reward: str = "f1") -> None:
    """Fill in the reward and its components. Only `episode.answer`, parsed from the policy's own text, is scored."""
    episode.scores = {
        "f1": f1_score(episode.answer, episode.golden_answers),
        "em": exact_match(episode.answer, episode.golden_answers),
        "answered": float(episode.answer is not None),
        "format": float(all(WELL_FORMED.fullmatch(turn.text) for turn in episode.turns)),
    }
    episode.reward = REWARDS[reward](episode.answer, episode.golden_answers)


def check_failures(errors: list[str | None], before: int, allowed: int) -> None:
    """Raises UserError if a run's failed searches, `before` and these, are more than it may bear, or no episode is left.

    An episode whose search failed says nothing of its policy: it is counted, and neither scored nor trained."""
    failed = [error for error in errors if error]
    if before + len(failed) > allowed or (failed and len(failed) == len(errors)):
        raise UserError(f"{before + len(failed)} searches failed (--failed-searches allows {allowed}): {failed[-1]}")


# ---------------------------------------------------------------- curriculum


def noise_probability(
    step: int, steps: int, p_start: float, p_end: float, base: float, curriculum: str, seed: int = 0
) -> float:
    """The share of searches that are noisy at a step: p_i = p_s + (b^(i/m) - 1)/(b - 1) (p_e - p_s), m = steps - 1.

    Paper, section 3.5. b -> 1 is the linear limit; a run of one step stays at p_s. "constant" is p_e throughout,
    "random" draws each step's share uniformly between p_s and p_e (the paper's Table 6 compares with it)."""
    if curriculum == "constant":
        return p_end
    if curriculum == "random":
        return random.Random(draw_seed("curriculum", seed, step)).uniform(p_start, p_end)
    progress = step / (steps - 1) if steps > 1 else 0.0
    if abs(base - 1) < 1e-9:
        return p_start + progress * (p_end - p_start)
    return p_start + (base**progress - 1) / (base - 1) * (p_end - p_start)


# ---------------------------------------------------------------- advantages (pure functions)


def reinforce_advantages(rewards: Tensor, baseline: str, batch_mean: float) -> Tensor:
    """REINFORCE (Williams 1992): return minus a baseline. rewards (P, G): G attempts at each of P prompts -> (P, G).

    "none": the paper's; with rewards in [0, 1] nothing is ever pushed down. "batch": the mean over all ranks' rewards.
    "leave-one-out": the mean of the prompt's other attempts (RLOO, Ahmadian et al. 2024, eq. 7): unbiased."""
    if baseline == "none":
        return rewards.clone()
    if baseline == "batch":
        return rewards - batch_mean
    others = rewards.shape[1] - 1
    return zero_where_equal(rewards - (rewards.sum(1, keepdim=True) - rewards) / others, rewards)


def grpo_advantages(rewards: Tensor, scale: bool) -> Tensor:
    """GRPO (DeepSeekMath, section 4.1.2): reward minus its group's mean, over its group's standard deviation.

    The loss is then averaged over all tokens of the batch (DAPO, eq. 8), not first within each episode.
    rewards (P, G) -> (P, G). Without `scale`: Dr. GRPO (Liu et al. 2025), which drops the division that favours
    prompts of little variance. A group without variance gets zeros."""
    centred = rewards - rewards.mean(1, keepdim=True)
    return zero_where_equal(centred / (rewards.std(1, keepdim=True) + 1e-6) if scale else centred, rewards)


def zero_where_equal(advantages: Tensor, rewards: Tensor) -> Tensor:
    """Exactly 0 in groups without variance, where rounding would leave 1e-16 and a backward pass for nothing. (P, G)."""
    return advantages.masked_fill(rewards.amax(1, keepdim=True) == rewards.amin(1, keepdim=True), 0.0)


def token_rewards(rewards: Tensor, kl: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """The reward at the last policy token, minus the KL penalty at each. rewards (B,), kl and mask (B, L) -> (B, L).

    PPO in RLHF (Ouyang et al. 2022, eq. 2) and REINFORCE++ (Hu 2025, eq. 3). kl is the k1 estimate log pi - log ref."""
    last = mask.long().sum(1) - 1  # (B,)
    per_token = -kl_coef * kl * mask
    return per_token.scatter_add(1, last.clamp(min=0)[:, None], (rewards * (last >= 0))[:, None].to(per_token.dtype))


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16). All (B, L) -> advantages, returns (B, L).

    The L columns are policy tokens alone, packed to the left: a document between two of them is not there."""
    advantages = torch.zeros_like(rewards)
    running = torch.zeros_like(rewards[:, 0])
    following = torch.zeros_like(rewards[:, 0])  # the value of the next policy token, 0 after the last
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * following - values[:, t]
        running = (delta + gamma * lam * running) * mask[:, t]
        following = values[:, t] * mask[:, t]
        advantages[:, t] = running
    return advantages, (advantages + values) * mask


def discounted_returns(rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """The sum of what is still to come at each policy token. (B, L) -> (B, L)."""
    returns, _ = gae(rewards, torch.zeros_like(rewards), mask, gamma, lam=1.0)
    return returns


def whiten(values: Tensor, mean: Tensor, std: Tensor, mask: Tensor) -> Tensor:
    """Zero mean and unit variance over the policy tokens of the global batch, whose moments are given. (B, L)."""
    return (values - mean) / (std + 1e-8) * mask


# ---------------------------------------------------------------- losses (pure functions)


def policy_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip_low: float, clip_high: float,
                weights: Tensor) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Clipped surrogate (PPO, Schulman et al. 2017, eq. 7), bounds apart (DAPO, eq. 10). All (N,) -> loss, clipped (N,).

    Where the ratio is 1, as in a step's first update, its gradient is REINFORCE's: -A grad log pi. The weights, the
    sampler correction, are constants in it."""
    ratio = (logprobs - old_logprobs).exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = -weights * torch.min(ratio * advantages, clipped * advantages)
    return loss, (clipped * advantages < ratio * advantages).detach()


def importance_weights(old_logprobs: Tensor, sampler_logprobs: Tensor, cap: float) -> Tensor:
    """Truncated importance weights min(pi_trainer / pi_sampler, cap): two engines never compute quite the same. (N,)."""
    return (old_logprobs - sampler_logprobs).exp().clamp(max=cap).detach()


def kl_k3(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """KL(policy || reference) a token: the low-variance estimator e^d - d - 1, d = log ref - log pi >= 0. (N,).

    Schulman 2020 ("k3"), as in GRPO (DeepSeekMath, eq. 4). It is *added* to the loss that is minimised."""
    difference = reference_logprobs - logprobs
    return difference.exp() - difference - 1


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float) -> Tensor:
    """Half the squared error, with values clipped to a band around the old ones as in PPO's code. All (N,) -> (N,)."""
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * torch.max((values - returns) ** 2, (clipped - returns) ** 2)


# ---------------------------------------------------------------- the update


class Critic(nn.Module):
    """A value for each masked token: what return is expected just before it is chosen. Own backbone, one linear head."""

    def __init__(self, model):
        super().__init__()
        self._no_split_modules = model._no_split_modules  # as in TokenScorer
        model.set_attn_implementation("packed")
        self.decoder = model.get_decoder()
        self.head = nn.Linear(model.config.hidden_size, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """ids, mask (B, T), as of `collate` -> values of the N masked tokens, in row order: (N,)."""
        return self.head(packed_states(self.decoder, ids, mask)).squeeze(-1).float()


@dataclass
class Trainer:
    """What a step works on. `critic` is there for PPO alone, `reference` only where a KL is paid for."""

    accelerator: Accelerator
    policy: nn.Module  # a TokenScorer, prepared by Accelerate
    optimizer: torch.optim.Optimizer
    reference: nn.Module | None = None
    critic: nn.Module | None = None
    critic_optimizer: torch.optim.Optimizer | None = None
    commit: Callable[[], None] = lambda: None  # called before a step first changes a weight
    work: list["Pass"] = field(default_factory=list)  # what was computed since it was last cleared

    def evaluate(self, module: nn.Module, sequences: list[Sequence], budget: int, **kwargs) -> list[Tensor]:
        """A scorer's or critic's output without gradient, one tensor (L_i,) a sequence."""
        results: list[Tensor] = [torch.empty(0)] * len(sequences)
        with torch.no_grad():
            for part in same_count(self.accelerator, micro_batches(sequences, budget)):
                batch = [sequences[i] for i in part]
                out = module(*collate(batch or [NOTHING], self.accelerator.device), **kwargs)
                out = out[0] if isinstance(out, tuple) else out
                self.work.append(Pass(module, batch, 2))
                for i, values in zip(part, out.split([sum(s.mask[1:]) for s in batch] or 1)):
                    results[i] = values
        return results

    def total(self, value: float | Tensor) -> float:
        """The sum over all ranks."""
        if self.accelerator.num_processes == 1:
            return float(value)  # without a float64 tensor on the device: Apple's GPUs have none
        return self.accelerator.reduce(torch.as_tensor(value, dtype=torch.float64, device=self.accelerator.device)).item()


@dataclass
class Targets:
    """What the update aims at, one tensor (L_i,) an episode. Without `old` the first pass itself gives it."""

    advantages: list[Tensor]
    sampler: list[Tensor]  # log-probs under the sampler; NaN at document tokens, which it never sampled
    old: list[Tensor] | None = None
    reference: list[Tensor] | None = None
    values: list[Tensor] | None = None
    returns: list[Tensor] | None = None


def estimate_targets(trainer: Trainer, s: SimpleNamespace, episodes: list[Episode], sequences: list[Sequence]) -> Targets:
    """Advantages of every trained token, with the passes through reference and critic they need."""
    sampler = [torch.tensor([lp if m else math.nan for lp, m, t in zip(e.logprobs, e.mask, q.mask) if t],
                            device=trainer.accelerator.device) for e, q in zip(episodes, sequences)]  # fmt: skip
    played = torch.tensor([e.end != "failed" for e in episodes])  # (B,); the others have no trained token
    rewards = torch.tensor([e.reward for e in episodes], dtype=torch.float64)  # (B,) in groups of G
    targets = Targets([], sampler)
    if trainer.reference is not None:
        targets.reference = trainer.evaluate(trainer.reference, sequences, s.batch_tokens, temperature=s.temperature)
    if s.algorithm in ("reinforce", "grpo"):
        batch_mean = trainer.total(rewards[played].sum()) / trainer.total(played.sum())
        grpo = s.algorithm == "grpo"
        scalars = torch.zeros_like(rewards)
        for place in torch.arange(len(rewards)).split(s.rollouts):  # a prompt's group, less those whose search failed
            place = place[played[place]]
            group = rewards[place][None]  # (1, G)
            if len(place) > 1 or (len(place) and not grpo and s.baseline != "leave-one-out"):  # else: nothing to compare with
                scalars[place] = (grpo_advantages(group, s.scale_rewards) if grpo else
                                  reinforce_advantages(group, s.baseline, batch_mean))[0]  # fmt: skip
        targets.advantages = [a.to(x).expand_as(x) for a, x in zip(scalars, sampler)]
        if s.epochs > 1:  # in a single epoch the policy is still the one that sampled: the update's own pass gives `old`
            targets.old = trainer.evaluate(trainer.policy, sequences, s.batch_tokens, temperature=s.temperature)
        return targets

    targets.old = trainer.evaluate(trainer.policy, sequences, s.batch_tokens, temperature=s.temperature)
    reference = targets.reference or targets.old
    kl, mask = pad_sequence([o - r for o, r in zip(targets.old, reference)], True), policy_columns(targets.old)  # (B, L)
    per_token = token_rewards(rewards.to(kl), kl, mask, s.kl_coef)
    if s.algorithm == "ppo":
        targets.values = trainer.evaluate(trainer.critic, sequences, s.batch_tokens)
        advantages, returns = gae(per_token, pad_sequence(targets.values, True), mask, s.gamma, s.gae_lambda)
        targets.returns = unpad(returns, targets.old)
    else:
        advantages = discounted_returns(per_token, mask, s.gamma)
    targets.advantages = unpad(whiten(advantages, *global_moments(trainer, advantages, mask), mask), targets.old)
    return targets


def policy_columns(ragged: list[Tensor]) -> Tensor:
    """1 where the padded matrix of these tensors holds an entry. (B, L)."""
    return pad_sequence([torch.ones_like(x) for x in ragged], batch_first=True)


def unpad(matrix: Tensor, like: list[Tensor]) -> list[Tensor]:
    return [row[: len(x)] for row, x in zip(matrix, like)]


def global_moments(trainer: Trainer, values: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation over the (masked) entries of all ranks."""
    mask = torch.ones_like(values) if mask is None else mask
    count = trainer.total(mask.sum())
    mean = trainer.total((values * mask).sum()) / count
    variance = trainer.total(((values - mean) ** 2 * mask).sum()) / max(count - 1, 1)
    return values.new_tensor(mean), values.new_tensor(math.sqrt(variance))


def update(trainer: Trainer, s: SimpleNamespace, episodes: list[Episode], clock: Callable) -> dict[str, float]:
    """One step's optimisation. Every trained token of the global batch weighs the same, whatever the split.

    Episodes whose advantages are all zero are left out where no KL is in the loss: they carry no gradient."""
    sequences = [Sequence(e.ids, e.trained_mask(s.mask_documents)) for e in episodes]
    with clock("reference"):
        targets = estimate_targets(trainer, s, episodes, sequences)
    tokens = trainer.total(sum(sum(q.mask[1:]) for q in sequences))
    kl_in_loss = trainer.reference is not None and s.algorithm in ("reinforce", "grpo")
    # Zero advantage, zero gradient: left out, unless a KL is in the loss or a critic learns from these tokens too.
    trained = [i for i, a in enumerate(targets.advantages) if kl_in_loss or trainer.critic is not None or a.any()]
    with clock("update"):
        for epoch in range(s.epochs):
            sums = train_epoch(trainer, s, sequences, targets, trained, tokens, kl_in_loss)
            if epoch == 0:
                first = sums
                trainer.commit()
            sums["grad_norm"] = follow_gradient(trainer, sums)
    scored = max(trainer.total(first["scored"]), 1.0)
    metrics = {
        "loss/policy": trainer.total(sums["policy"]) / tokens,
        "loss/entropy": trainer.total(first["entropy"]) / scored,
        "loss/clip_fraction": trainer.total(sums["clipped"]) / scored,
        "loss/logprob_gap": trainer.total(first["gap"]) / scored,
        "loss/grad_norm": sums["grad_norm"],
        "loss/advantage_std": global_moments(trainer, torch.cat(targets.advantages))[1].item(),
        "tokens/trained": scored,
    }
    if trainer.reference is not None:
        metrics["loss/kl"] = trainer.total(first["kl"]) / scored
    if trainer.critic is not None:
        returns, values = torch.cat(targets.returns), torch.cat(targets.values)
        metrics["loss/value"] = trainer.total(first["value"]) / tokens
        error, spread = (global_moments(trainer, x)[1].item() for x in (returns - values, returns))
        metrics["loss/explained_variance"] = 1 - (error / max(spread, 1e-8)) ** 2
    return metrics


def train_epoch(trainer: Trainer, s: SimpleNamespace, sequences: list[Sequence], targets: Targets, trained: list[int],
                tokens: float, kl_in_loss: bool) -> dict[str, Any]:  # fmt: skip
    """One pass over the batch, which leaves its gradient. Returns sums over this rank's trained tokens."""
    device, world = trainer.accelerator.device, trainer.accelerator.num_processes
    sums = dict.fromkeys(("policy", "kl", "entropy", "clipped", "gap", "value", "scored"), 0.0)
    for part in same_count(trainer.accelerator, micro_batches([sequences[i] for i in trained], s.batch_tokens)):
        if not part:
            idle_backward(trainer)
            continue
        part = [trained[i] for i in part]
        batch = [sequences[i] for i in part]
        ids, mask = collate(batch, device)

        def flat(per_episode: list[Tensor], part: list[int] = part) -> Tensor:
            return torch.cat([per_episode[i] for i in part])  # (N,), in the order the scorer returns

        logprobs, entropies = trainer.policy(ids, mask, temperature=s.temperature)
        old = flat(targets.old) if targets.old else logprobs.detach()
        sampler = flat(targets.sampler)
        sampler = torch.where(sampler.isnan(), old, sampler)
        weights = importance_weights(old, sampler, s.importance_cap) if s.importance_cap else torch.ones_like(old)
        losses, clipped = policy_loss(logprobs, old, flat(targets.advantages), s.clip_low, s.clip_high, weights)
        objective = losses
        if targets.reference is not None:
            kl = kl_k3(logprobs, flat(targets.reference))
            sums["kl"] += kl.detach().sum()
            objective = losses + s.kl_coef * kl if kl_in_loss else losses
        # Gradients are averaged over ranks: times their number, over the tokens of all of them, makes it a global mean.
        trainer.accelerator.backward(objective.sum() * world / tokens)
        if trainer.critic is not None:
            values = trainer.critic(ids, mask)
            value_losses = value_loss(values, flat(targets.values), flat(targets.returns), s.value_clip)
            trainer.accelerator.backward(value_losses.sum() * world / tokens)
            sums["value"] += value_losses.detach().sum()
            trainer.work.append(Pass(trainer.critic, batch, 6))
        trainer.work.append(Pass(trainer.policy, batch, 6))
        sums["policy"] += losses.detach().sum()
        sums["entropy"] += entropies.detach().sum()
        sums["clipped"] += clipped.sum()
        sums["gap"] += (old - sampler).abs().sum()
        sums["scored"] += float(len(logprobs))
    return sums


def follow_gradient(trainer: Trainer, sums: dict[str, Any]) -> float:
    """One optimizer step with the gradient, its norm clipped at 1. Returns the policy's norm before that."""
    models = [model for model in (trainer.policy, trainer.critic) if model is not None]
    norms = [float(whole(trainer.accelerator.clip_grad_norm_(model.parameters(), 1.0))) for model in models]
    if not all(map(math.isfinite, (*norms, trainer.total(sums["policy"] + sums["value"])))):
        raise FloatingPointError("the loss or its gradient is not finite")
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()
    if trainer.critic is not None:
        trainer.critic_optimizer.step()
        trainer.critic_optimizer.zero_grad()
    return norms[0]


def idle_backward(trainer: Trainer) -> None:
    """A backward pass that adds nothing, for a rank that has fewer micro-batches than another."""
    nothing = collate([NOTHING], trainer.accelerator.device)
    trainer.accelerator.backward(trainer.policy(*nothing)[0].sum() * 0)
    if trainer.critic is not None:
        trainer.accelerator.backward(trainer.critic(*nothing).sum() * 0)


# ---------------------------------------------------------------- metrics


def rollout_metrics(episodes: list[Episode], group_size: int) -> dict[str, float]:
    """What the step's episodes say of themselves: rewards and their parts, searches, tokens, cost counters."""
    scored = [e for e in episodes if e.end != "failed"]
    parts = [episodes[i : i + group_size] for i in range(0, len(episodes), group_size)]
    groups = [[e.reward for e in part if e.end != "failed"] for part in parts]
    rewards = torch.tensor([e.reward for e in scored], dtype=torch.float64)
    turns = [turn for e in episodes for turn in e.turns]
    searches = [turn for turn in turns if turn.query is not None]
    metrics = {
        "reward/mean": rewards.mean().item(),
        "reward/std": rewards.std(unbiased=False).item(),
        **{f"reward/{name}": mean(e.scores[name] for e in scored) for name in scored[0].scores},
        **{f"reward/hops_{h}": mean(e.reward for e in scored if e.hops == h)
           for h in sorted({e.hops for e in scored if e.hops})},
        "reward/zero_variance_groups": mean(min(group) == max(group) for group in groups if group),
        "search/per_episode": len(searches) / len(episodes),
        "search/invalid_actions": sum(turn.action == "invalid" for turn in turns) / len(episodes),
        "search/noisy": mean(turn.quality == "noisy" for turn in searches),
        "search/malformed": sum(e.malformed for e in episodes) / max(len(searches), 1),
        "search/failed": sum(e.end == "failed" for e in episodes),
        "search/context_overflows": sum(e.end == "context" for e in episodes),
        "tokens/read": sum(len(e.ids) - sum(e.mask) - e.prompt_tokens for e in episodes),
        "cost/searches": sum(e.searches for e in episodes),
        "cost/simulator_prompt_tokens": sum(e.simulator_prompt_tokens for e in episodes),
        "cost/simulator_tokens": sum(e.simulator_tokens for e in episodes),
        "cost/policy_tokens": sum(sum(e.mask) for e in episodes),
    }  # fmt: skip
    return metrics


def mean(values) -> float:
    values = [float(v) for v in values]
    return sum(values) / len(values) if values else 0.0


def collapse_warning(metrics: dict[str, float]) -> str | None:
    """A sentence if the policy is falling apart, else None."""
    if metrics["reward/answered"] < 0.05:
        return "almost no episode answers: a policy that can't follow the template needs `warmup` first, or a lower --lr"
    if metrics["loss/entropy"] < 0.005 and metrics["tokens/trained"] > 1:
        return "the policy's entropy is almost 0: it tries nothing new and will learn nothing more"
    return None


# ---------------------------------------------------------------- commands


@app.command()
def warmup(
    trajectories: Annotated[Path, typer.Argument(help="predictions.jsonl with whole trajectories to imitate.")],
    out: Annotated[Path, typer.Option(help="Run folder; the model goes to OUT/model.")],
    model: Annotated[str, typer.Option(help='"smollm2" (embedded), a Hub id or a folder.')] = "smollm2",
    top_k: TopK = 3,
    epochs: int = 1,
    lr: float = 1e-4,
    batch_size: Annotated[int, typer.Option(help="Trajectories a step.")] = 8,
    batch_tokens: Annotated[int, typer.Option(help="Tokens a micro-batch; shared beginnings count once.")] = 4096,
    prompts: PromptsFile = None,
    seed: Seed = 0,
    overwrite: Overwrite = False,
) -> None:
    """Teach a small model the template, by imitation. Loss on the policy's own tokens only.

    Not part of the paper: its models follow the template when asked to. The embedded one does not (0 of 64)."""
    records = read_jsonl(trajectories, required=("id", "question", "golden_answers", "turns"))
    check_top_k(top_k)
    settings = locals() | {"records": len(records)}
    wording, tokenizer, lm = load_prompts(prompts), load_tokenizer(model), load_model(model)
    fine_tune(lm, tokenizer, [replay(record, tokenizer, wording, top_k) for record in records], settings)


def replay(record: dict[str, Any], tokenizer, prompts: Prompts, top_k: int) -> Sequence:
    """A recorded trajectory as the token ids a rollout would have made of it, had no action been invalid."""
    episode = new_episode(record, 0, tokenizer, prompts)
    for turn in record["turns"]:
        ids = encode(tokenizer, turn["text"])
        episode.write(ids, [0.0] * len(ids))
        if turn.get("query"):
            episode.read(observation_ids(tokenizer, turn["documents"][:top_k], RolloutSettings.observation_tokens))
    return Sequence(episode.ids, episode.mask)


@app.command()
def schedule(
    steps: int = 203,
    p_start: float = 0.0,
    p_end: float = 0.5,
    base: float = 4.0,
    curriculum: Literal["exponential", "constant", "random"] = "exponential",
    seed: Seed = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print a list of the p of each step.")] = False,
) -> None:
    """Print the curriculum: the share of noisy searches at each step."""
    check_curriculum(SimpleNamespace(**locals()))
    noise = [noise_probability(i, steps, p_start, p_end, base, curriculum, seed) for i in range(steps)]
    if as_json:
        print(json.dumps(noise))
        return
    shown = sorted({round(i * (steps - 1) / 20) for i in range(21)})
    for i in shown:
        Console().print(f"step {i:>5}   p {noise[i]:.4f}   {'█' * round(60 * noise[i])}", highlight=False)


def check_curriculum(s: SimpleNamespace) -> None:
    if not (0 <= s.p_start <= 1 and 0 <= s.p_end <= 1):
        raise UserError(f"--p-start and --p-end are probabilities, in [0, 1]: not {s.p_start} and {s.p_end}")
    if s.base <= 0:
        raise UserError(f"--base must be above 0, not {s.base}")
    if s.steps < 1:
        raise UserError(f"--steps must be at least 1, not {s.steps}")


FailedSearches = Annotated[int, typer.Option(help="Searches that may fail for good; their episodes are left out.")]


def check_settings(s: SimpleNamespace) -> None:
    """Refuse what can't work before anything is loaded."""
    check_curriculum(s)
    check_top_k(s.top_k)
    if min(s.prompts_per_step, s.rollouts, s.save_every) < 1:
        raise UserError("--prompts-per-step, --rollouts and --save-every must be at least 1")
    if s.rollouts == 1 and (s.algorithm == "grpo" or (s.algorithm, s.baseline) == ("reinforce", "leave-one-out")):
        raise UserError(f"{s.algorithm} compares the rollouts of a prompt with each other: --rollouts 1 is too few")
    if min(s.clip_low, s.clip_high, s.value_clip) < 0 or s.clip_low >= 1:
        raise UserError("--clip-low must be in [0, 1), --clip-high and --value-clip at least 0")
    if s.kl_coef < 0 or s.lr <= 0 or s.critic_lr <= 0 or s.temperature <= 0 or s.epochs < 1 or s.importance_cap < 0:
        raise UserError("--lr, --critic-lr and --temperature must be above 0, --kl-coef and --importance-cap at least 0, "
                        "--epochs at least 1")  # fmt: skip
    if not (0 <= s.gamma <= 1 and 0 <= s.gae_lambda <= 1):
        raise UserError("--gamma and --gae-lambda are in [0, 1]")
    if s.max_searches < 0 or s.tokens_per_turn < 1 or s.context_tokens <= s.tokens_per_turn:
        raise UserError("--max-searches must be at least 0, and --context-tokens hold more than --tokens-per-turn")
    check_engine(s.engine, s.simulator, s.url)
    if s.logger is not None and s.logger not in LOGGER_TYPE_TO_CLASS:
        raise UserError(f"--logger {s.logger}: Accelerate knows {', '.join(map(str, LOGGER_TYPE_TO_CLASS))}")
    if s.logger is not None and s.logger not in map(str, get_available_trackers()):
        raise UserError(f"--logger {s.logger} needs a package that is not installed: pip install {s.logger}")


def load_presets() -> dict[str, dict[str, Any]]:
    """Option values by preset and name; a preset holds its own table and what stands above all tables."""
    content = tomllib.loads((ROOT / "data" / "presets.toml").read_text(encoding="utf-8"))
    shared = {name: value for name, value in content.items() if not isinstance(value, dict)}
    return {name: shared | table for name, table in content.items() if isinstance(table, dict)}


def use_preset(ctx: typer.Context, name: str | None) -> str | None:
    """Make a preset's values the defaults of this call: what the user gives goes before them."""
    if name is not None:
        presets = load_presets()
        if name not in presets:
            raise UserError(f"--preset {name}: there are {', '.join(presets)}")
        ctx.default_map = presets[name]
    return name


@app.command()
def train(
    data: Annotated[Path, typer.Option(help="Training questions: JSONL with id, question, golden_answers.")],
    out: Annotated[Path, typer.Option(help="Run folder; the policy goes to OUT/model.")],
    model: Annotated[str, typer.Option(help='The policy: "smollm2" (embedded), a Hub id or a folder.')] = "smollm2",
    engine: Annotated[Literal["simulator", "bm25", "http", "serpapi", "none"], typer.Option(
        help="simulator: ZeroSearch. bm25, http, serpapi: Search-R1. none: R1.")] = "simulator",  # fmt: skip
    simulator: Annotated[str | None, typer.Option(help=f"The simulator: {MODEL_OR_SERVER}.")] = None,
    corpus: Annotated[Path, typer.Option(help="bm25: a JSONL corpus.")] = ROOT / "data/world/passages.jsonl",
    url: Url = None,
    failed_searches: FailedSearches = 0,
    algorithm: Literal["reinforce", "grpo", "ppo", "reinforce++"] = "grpo",
    reward: Annotated[Literal[tuple(REWARDS)], typer.Option(help="What is rewarded.")] = "f1",
    steps: int = 203,
    prompts_per_step: Annotated[int, typer.Option(help="Questions a step, over all processes.")] = 64,
    rollouts: Annotated[int, typer.Option(help="Attempts at each question.")] = 5,
    lr: float = 1e-6,
    kl_coef: Annotated[float, typer.Option(help="Weight of the KL to the start model; 0 loads no reference.")] = 0.001,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    epochs: Annotated[int, typer.Option(help="Optimizer steps on each batch.")] = 1,
    importance_cap: Annotated[float, typer.Option(help="Cap of the sampler correction; 0 turns it off.")] = 2.0,
    baseline: Annotated[Literal["none", "batch", "leave-one-out"], typer.Option(help="REINFORCE.")] = "leave-one-out",
    scale_rewards: Annotated[bool, typer.Option(help="GRPO: divide by the group's deviation.")] = True,
    critic: Annotated[str | None, typer.Option(help="PPO: the critic's backbone; the policy's model by default.")] = None,
    critic_lr: float = 1e-5,
    gamma: float = 1.0,
    gae_lambda: float = 1.0,
    value_clip: float = 0.5,
    curriculum: Literal["exponential", "constant", "random"] = "exponential",
    p_start: float = 0.0,
    p_end: float = 0.5,
    base: float = 4.0,
    mask_documents: Annotated[bool, typer.Option(help="Documents count nowhere (off: the paper's Table 7).")] = True,
    temperature: Annotated[float, typer.Option(help="Of the rollouts.")] = 1.0,
    top_k: TopK = 5,
    max_searches: Annotated[int, typer.Option(help="Searches an episode may make.")] = 5,
    tokens_per_turn: int = 500,
    context_tokens: int = 4096,
    observation_tokens: Annotated[int, typer.Option(help="Documents of one search are cut to this.")] = 2048,
    simulator_words: Annotated[int, typer.Option(help="Words a document, as the simulator is asked.")] = 25,
    simulator_max_tokens: int = 600,
    simulator_temperature: float = 0.8,
    batch_tokens: Annotated[int, typer.Option(help="Tokens a micro-batch; shared beginnings count once.")] = 4096,
    gradient_checkpointing: Annotated[bool, typer.Option("--gradient-checkpointing", help="Less memory, more time.")] = False,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 50,
    generator: GeneratorOption = "auto",
    logger: Annotated[str | None, typer.Option(help="Accelerate's tracker: tensorboard, wandb, trackio...")] = None,
    prompts: PromptsFile = None,
    seed: Seed = 0,
    preset: Annotated[str | None, typer.Option(callback=use_preset, is_eager=True, help="Of data/presets.toml.")] = None,
    show_config: Annotated[bool, typer.Option("--show-config", help="Print the settings as JSON, and stop.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in OUT.")] = False,
    overwrite: Overwrite = False,
) -> None:
    """Reinforcement learning of the policy against a search engine. Defaults: the paper's hyper-parameters."""
    s = SimpleNamespace(**locals())
    check_settings(s)
    if show_config:
        print(json.dumps(vars(s), indent=1, default=str))
        return
    rows = read_questions(data)
    if len(rows) < prompts_per_step:
        raise UserError(f"{data}: {len(rows)} questions are too few for {prompts_per_step} prompts a step")
    accelerator = make_accelerator(log_with=logger, project_dir=out)
    if prompts_per_step % accelerator.num_processes:
        raise UserError(f"--prompts-per-step {prompts_per_step} can't be divided over {accelerator.num_processes} processes")
    start = find_checkpoint(out, vars(s)) if resume else None
    tokenizer, wording = load_tokenizer(model), load_prompts(prompts)
    if start is None and accelerator.is_main_process:
        open_run(out, vars(s), overwrite)
    accelerator.wait_for_everyone()
    peak = peak_flops(accelerator.device) * accelerator.num_processes
    transformers.set_seed(seed)

    sampler = load_generator(model, accelerator.device, generator)
    console.print(f"generation: {sampler.name}")
    trainer = make_trainer(accelerator, s)
    searcher = make_engine(s, wording, accelerator.device)
    limits = RolloutSettings(max_searches, tokens_per_turn, context_tokens, observation_tokens, temperature)
    if start:
        load_checkpoint(accelerator, out, start)
        sampler.load_weights(named_weights(accelerator.unwrap_model(trainer.policy).model))
    if start is not None and accelerator.is_main_process:
        set_lines_aside(out, start)
    accelerator.wait_for_everyone()
    if logger:
        accelerator.init_trackers("zerosearch", {n: v if isinstance(v, int | float) else str(v) for n, v in vars(s).items()})

    before = read_jsonl(out / "metrics.jsonl") if start else []
    searches_so_far = sum(row["cost/searches"] for row in before)
    failed_so_far = sum(row["search/failed"] for row in before)
    signals, step = Signals(), start or 0
    trainer.commit = signals.agree
    try:
        with progress_bar() as bar:
            task = bar.add_task(algorithm, total=steps, completed=step, info="")
            for step in range(start or 0, steps):
                clock = PhaseClock()
                noise = noise_probability(step, steps, p_start, p_end, base, curriculum, seed)
                mine = step_questions(rows, step, s)[accelerator.process_index :: accelerator.num_processes]
                episodes = [new_episode(row, g, tokenizer, wording, engine != "none") for row in mine for g in range(rollouts)]
                with suppress(KeyboardInterrupt):  # it ends this rank's rollout; `agree` tells the others
                    signals.allow(True)
                    rollout(episodes, sampler, tokenizer, searcher, wording, limits, noise=noise, seed=seed, step=step,
                            clock=clock)  # fmt: skip
                    signals.allow(False)
                signals.agree()
                signals.allow(accelerator.num_processes == 1)  # several would wait for each other in the update
                for idle in [sampler, searcher.generator] if engine == "simulator" else [sampler]:
                    idle.sleep()  # their memory is the update's for a while
                for episode in episodes:
                    if episode.end != "failed":
                        score(episode, reward)
                everyone = gather_object(episodes)
                check_failures([e.error for e in everyone], failed_so_far, failed_searches)
                try:
                    share = deal(everyone, rollouts, accelerator.num_processes)[accelerator.process_index]
                    losses = update(trainer, s, share, clock)
                except FloatingPointError as error:
                    if accelerator.is_main_process:
                        append_jsonl(out / "nonfinite.jsonl", [e.record() for e in everyone])
                    raise UserError(f"step {step}: {error}; its episodes are in {out / 'nonfinite.jsonl'}") from None
                with clock("sync"):
                    sampler.load_weights(named_weights(accelerator.unwrap_model(trainer.policy).model))
                metrics = {"step": step, "noise/p": noise} | rollout_metrics(everyone, rollouts) | losses | clock.metrics()
                metrics |= rates(trainer, metrics, peak)
                searches_so_far += metrics["cost/searches"]
                failed_so_far += metrics["search/failed"]
                if accelerator.is_main_process:
                    append_jsonl(out / "episodes.jsonl", [{"step": step} | e.record() for e in everyone])
                    append_jsonl(out / "metrics.jsonl", [metrics])
                    if warning := collapse_warning(metrics):
                        bar.console.print(f"step {step}: {warning}", style="yellow")
                accelerator.log(metrics, step=step)
                if (step + 1) % save_every == 0 and step + 1 < steps:
                    save_checkpoint(accelerator, out, step + 1)
                bar.update(task, advance=1, info=f"reward {metrics['reward/mean']:.2f}  noise {noise:.2f}  "
                           f"API bill saved ${costs.search_bill(searches_so_far):.2f}")  # fmt: skip
    except KeyboardInterrupt:  # raised by `signals` alone, while the weights are those of `step` whole steps
        save_checkpoint(accelerator, out, step)
        if accelerator.is_main_process:
            options = " (with the launcher's own options, if it had any)" if accelerator.num_processes > 1 else ""
            console.print(f"stopped after {step} steps, which are saved; to go on{options}:")
            print(resume_command(accelerator.num_processes), file=sys.stderr)
        end_training(accelerator, 128 + signals.number)
        raise typer.Exit(128 + signals.number) from None
    save_model(accelerator.unwrap_model(trainer.policy).model, tokenizer, out / "model")
    if accelerator.is_main_process:
        console.print(f"policy saved: {out / 'model'}")
    end_training(accelerator)


def end_training(accelerator: Accelerator, code: int = 0) -> None:
    for tracker in accelerator.trackers:
        tracker.finish()
    leave(accelerator.state, code)


def step_questions(rows: list[dict[str, Any]], step: int, s: SimpleNamespace) -> list[dict[str, Any]]:
    """The questions of a step: the data in an order drawn anew each epoch, a function of seed and step alone."""
    per_epoch = len(rows) // s.prompts_per_step
    epoch, place = divmod(step, per_epoch)
    order = random.Random(draw_seed("data", s.seed, epoch)).sample(range(len(rows)), len(rows))
    return [rows[i] for i in order[place * s.prompts_per_step : (place + 1) * s.prompts_per_step]]


def deal(episodes: list[Episode], group_size: int, ranks: int) -> list[list[Episode]]:
    """The step's groups, each whole, as one share for each rank: the longest first, to whoever has the fewest tokens."""
    groups = [episodes[i : i + group_size] for i in range(0, len(episodes), group_size)]
    tokens = {id(group): sum(len(e.ids) for e in group) for group in groups}
    shares: list[list[list[Episode]]] = [[] for _ in range(ranks)]
    for group in sorted(groups, key=lambda group: -tokens[id(group)]):
        min(shares, key=lambda share: sum(tokens[id(group)] for group in share)).append(group)
    return [[episode for group in share for episode in group] for share in shares]


def make_trainer(accelerator: Accelerator, s: SimpleNamespace) -> Trainer:
    """Policy, critic and reference on the device, with optimizers; float32 master weights, bfloat16 arithmetic."""

    def prepare(module: nn.Module, lr: float):
        optimizer = torch.optim.AdamW(module.parameters(), lr=lr, weight_decay=0.0, fused=True)
        return accelerator.prepare(module, optimizer)

    trainer = Trainer(accelerator, *prepare(TokenScorer(load_trained(s.model, s.gradient_checkpointing)), s.lr))
    if s.algorithm == "ppo":
        critic = Critic(load_trained(s.critic or s.model, s.gradient_checkpointing))
        trainer.critic, trainer.critic_optimizer = prepare(critic, s.critic_lr)
    if s.kl_coef > 0:
        trainer.reference = prepare_reference(accelerator, TokenScorer(load_model(s.model)).requires_grad_(False))
    return trainer


def load_trained(name: str, checkpointing: bool):
    """A model to be trained; with checkpointing, each layer's activations are computed again in the backward pass."""
    model = load_model(name)
    if checkpointing:
        model.gradient_checkpointing_enable()
        for module in model.modules():  # layers do so in training mode alone; their parts stay without dropout
            module.training = isinstance(module, GradientCheckpointingLayer)
    return model


def prepare_reference(accelerator: Accelerator, reference: nn.Module) -> nn.Module:
    """What `accelerator.prepare` does, but for a model without an optimizer, and kept out of the checkpoints."""
    if accelerator.is_fsdp2:
        return fsdp2_prepare_model(accelerator, reference)
    reference.forward = accelerator.autocast()(reference.forward)
    return reference.to(accelerator.device)


def make_engine(s: SimpleNamespace, prompts: Prompts, device: torch.device | None) -> SearchEngine | None:
    if s.engine == "none":
        return None
    if s.engine != "simulator":
        return make_real_engine(s.engine, s.corpus, s.url, s.top_k)
    generator = load_generator(s.simulator, device, s.generator, needs_ids=False)
    return SimulatedEngine(generator, generator.tokenizer, s.top_k, prompts, words=s.simulator_words,
                           temperature=s.simulator_temperature, max_tokens=s.simulator_max_tokens)  # fmt: skip


# ---------------------------------------------------------------- signals and checkpoints


if __name__ == "__main__":
    run_cli(app)

"""Chapter 2: a policy learns by RL to think, search and answer (ZeroSearch, section 3).

\b
    warmup    recorded trajectories teach a small model the template
    train     the loop: collect episodes, learn from them, record it
    schedule  the curriculum: the share of noisy searches at each step

`train`, at the bottom, is the loop. `collect` lets the policy talk to a search engine for some
turns and scores its answers; `learn` says which tokens did better than expected
(`estimate_targets`) and makes them likelier (`accumulate_gradient`). No document is trained.

Most defaults are the paper's (--preset has the rest), too much for a laptop; results/demo/run.sh
has a budget for two CPU cores.

\b
    python train_rl.py train --data train.jsonl --out runs/policy \\
        --simulator http://host:8000/v1
    accelerate launch train_rl.py train ...  # devices: Accelerate's config
"""

import math
import random
import re
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

import costs
from plumbing.checkpoints import Checkpoints, check_tracker, saved_steps, start_tracker
from plumbing.cli import (CommonSettings, Settings, UserError, argument, command, console, make_app,
                          option, preset_callback, progress_bar, run_cli, unread)
from plumbing.engines import ENGINES, Quality, SearchEngine, SearchRequest, check_failures
from plumbing.files import append_jsonl, draw_seed, read_jsonl, read_questions
from plumbing.formats import read_trajectories
from plumbing.generate import Generator, Sampling
from plumbing.metrics import (SKIPPED, add_up, check_empty_steps, collapse_warning, empty_steps,
                              eval_metrics, rollout_metrics, update_metrics)
from plumbing.models import (load_model, load_tokenizer, load_trained, make_accelerator,
                             named_weights, prepare_reference, prepare_trained, rise, save_model,
                             whole)
from plumbing.ranks import (Pass, Worker, balance_over_ranks, gather_groups, pad, split, unpad)
from plumbing.rates import PhaseClock, peak_flops, rates
from plumbing.remote import in_threads
from plumbing.runfolder import FolderSettings, RunFolder, read_config
from plumbing.scorer import Critic, Sequence, TokenScorer, collate
from plumbing.served import load_generator
from plumbing.text import (ROOT, Prompts, encode, exact_match, f1_score, fill, load_prompts,
                           neutralize, prompt_ids)
from sft_simulator import MODEL, SearchSettings, TuningSettings, fine_tune, format_documents

app = make_app(__doc__)


# ---------------------------------------------------------------- episodes


@dataclass
class Turn:
    """What the policy wrote in one turn, what that meant, and what came back."""

    text: str
    action: Literal["search", "answer", "invalid"]
    query: str | None = None
    quality: Quality | None = None  # what a simulator was asked for, if that was drawn
    documents: list[str] = field(default_factory=list)


@dataclass
class Episode:
    """One attempt at one question: token ids with a mask (1 = sampled by the policy)."""

    id: str
    question: str
    golden_answers: list[str]
    hops: int | None = None
    sample: int = 0  # which of the group's attempts
    prompt_tokens: int = 0
    ids: list[int] = field(default_factory=list)  # (T,)
    mask: list[int] = field(default_factory=list)  # (T,)
    logprobs: list[float] = field(default_factory=list)  # (T,) of the sampler, 0 where mask is 0
    turns: list[Turn] = field(default_factory=list)
    answer: str | None = None
    # How it ended; "failed": a server did, so that nothing can be said of the policy.
    end: Literal["answered", "turns", "context", "failed"] | None = None
    error: str | None = None  # why the search, or a served policy, failed
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

    def trained_mask(self, mask_documents: bool) -> list[int]:
        """1 where a token is trained: the policy's own; without document masking (Table 7) all but
        the prompt; none of a failed episode. Loss, KL, entropy, advantages and values follow."""
        if self.end == "failed":
            return [0] * len(self.ids)
        after_prompt = [int(i >= self.prompt_tokens) for i in range(len(self.ids))]
        return self.mask if mask_documents else after_prompt


def new_episode(row: dict[str, Any], sample: int, tokenizer, prompts: Prompts,
                search: bool = True) -> Episode:
    """An episode that holds its prompt alone; `search`: whether the template offers it."""
    template = prompts["policy" if search else "policy_without_search"]
    return read_prompt(blank_episode(row | {"sample": sample}), tokenizer, template)


def blank_episode(row: dict[str, Any]) -> Episode:
    return Episode(str(row["id"]), row["question"], row["golden_answers"], row.get("hops"),
                   row.get("sample", 0))


def read_prompt(episode: Episode, tokenizer, template: dict[str, str], **values: str) -> Episode:
    """Begin an episode with a template: its system text, and its user text with the question."""
    # neutralize: no control tag and no special token from outside survives
    question = neutralize(episode.question, tokenizer)
    user = fill(template["user"], question=question, **values)
    episode.read(prompt_ids(tokenizer, fill(template["system"]), user))
    episode.prompt_tokens = len(episode.ids)
    return episode


# ---------------------------------------------------------------- rollout

STOP = ("</search>", "</answer>")
ACTION = re.compile(r"<(search|answer)>(.*?)</\1>", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class EpisodeSettings(Settings):
    """Limits of an episode. Defaults: the paper's."""

    max_searches: int = option(5, "Searches that an episode may make.", low=0)
    tokens_per_turn: int = option(500, "Tokens that the policy may write in a turn.", low=1)
    context_tokens: int = option(4096, "Tokens of a whole episode.", low=1)
    observation_tokens: int = option(2048, "Documents of one search are cut to this.", low=0)
    temperature: float = option(1.0, "Sampling temperature of the rollouts.", above=0)

    def check(self) -> None:
        super().check()
        if self.context_tokens <= self.tokens_per_turn:
            raise UserError("--context-tokens must hold more than --tokens-per-turn")


@dataclass(frozen=True)
class Setup:
    """What episodes are played with."""

    generator: Generator  # the policy
    engine: SearchEngine | None
    prompts: Prompts
    limits: EpisodeSettings
    seed: int = 0

    tokenizer = property(lambda self: self.generator.tokenizer)


def parse_action(text: str) -> tuple[Literal["search", "answer", "invalid"], str]:
    """The first whole <search> or <answer> in what the policy wrote this turn, and its content."""
    match = ACTION.search(text)
    if match is None or (match[1] == "search" and not match[2].strip()):
        return "invalid", ""
    return match[1], match[2].strip()


def observation_ids(tokenizer, documents: list[str], limit: int) -> list[int]:
    """Documents as the policy reads them, cut to `limit` tokens. The tags are never cut."""
    text = format_documents([neutralize(document, tokenizer) for document in documents])
    opening, closing = (encode(tokenizer, f"\n<{slash}information>\n") for slash in ("", "/"))
    room = max(0, limit - len(opening) - len(closing))
    return opening + encode(tokenizer, text)[:room] + closing


def noise_quality(p: float, seed: int, step: int, episode: Episode, turn: int) -> Quality:
    """Draw whether a search is noisy: a function of the arguments, not of threads' order."""
    draw = random.Random(draw_seed("noise", seed, step, episode.id, episode.sample, turn)).random()
    return "noisy" if draw < p else "useful"


CONCURRENT_EPISODES = 256  # threads, which mostly wait
NO_CLOCK = lambda phase: nullcontext()  # noqa: E731


def rollout(episodes: list[Episode], setup: Setup, *, noise: float | None = None, step: int = 0,
            clock: Callable = NO_CLOCK) -> None:
    """Play the episodes to their end, in place (paper, section 3.3). noise: the curriculum's p, or
    None, where nothing is drawn: for a real engine, and in an evaluation.

    With a generator that takes requests at any time (vLLM, a server), each episode has a thread of
    its own, and time/rollout includes its searches; others play all episodes in lockstep. Seeds and
    noise draws are the same either way."""
    if not setup.generator.concurrent:
        play(episodes, setup, noise, step, clock)
        return
    with clock("rollout"):
        in_threads(lambda episode: play([episode], setup, noise, step, NO_CLOCK), episodes,
                   CONCURRENT_EPISODES)


def play(episodes: list[Episode], setup: Setup, noise: float | None, step: int,
         clock: Callable) -> None:
    """Play episodes to their end, in place, one turn of all of them at a time.

    In `max_searches` turns the policy may search (an invalid action uses one up), in a last one it
    may only answer. An episode ends where its context has no room for another turn."""
    for episode in episodes:
        if room_to_read(episode, setup) < 0:
            episode.end = "context"
    active = [e for e in episodes if e.end is None]
    for turn in range(setup.limits.max_searches + 1):
        if not active:
            return
        with clock("rollout"):
            write_turn(active, setup, step, turn)
        active = [e for e in active if e.end is None]
        for episode in active:
            interpret(episode, setup, turn)
        active = [e for e in active if e.end is None]
        searching = [e for e in active if e.turns[-1].action == "search"]
        if noise is not None:
            for episode in searching:
                episode.turns[-1].quality = noise_quality(noise, setup.seed, step, episode, turn)
        with clock("search"):
            search_turn(searching, setup, step)
        active = [e for e in active if e.end is None]
        for episode in active:
            episode.read(notices(episode, setup))


def room_to_read(episode: Episode, setup: Setup) -> int:
    """Tokens of documents that leave room in the context for the notices and a turn after them."""
    limits = setup.limits
    taken = len(episode.ids) + len(notices(episode, setup)) + limits.tokens_per_turn
    return limits.context_tokens - taken


def write_turn(active: list[Episode], setup: Setup, step: int, turn: int) -> None:
    """The policy continues each episode up to </search> or </answer>. Ids are kept as sampled."""
    sampling = Sampling(setup.limits.tokens_per_turn, setup.limits.temperature, STOP)
    seeds = [draw_seed("policy", setup.seed, step, e.id, e.sample, turn) for e in active]
    generations = setup.generator.generate([e.ids for e in active], sampling, seeds)
    for episode, generation in zip(active, generations, strict=True):
        if generation.error:
            episode.end, episode.error = "failed", generation.error
            continue
        episode.write(generation.ids, generation.logprobs)
        episode.turns.append(Turn(setup.tokenizer.decode(generation.ids), "invalid"))


def interpret(episode: Episode, setup: Setup, turn: int) -> None:
    """Record what the text of the last turn means: an answer, a query, or nothing valid.

    No search is made where its documents would leave no room for an answer: they are cut to what
    room there is, and a search is not worth making for less than a quarter of their limit."""
    written = episode.turns[-1]
    written.action, content = parse_action(written.text)
    if written.action == "search" and setup.engine is None:
        written.action = "invalid"
    if written.action == "answer":
        episode.answer, episode.end = content, "answered"
    elif turn == setup.limits.max_searches:
        episode.end = "turns"  # a search here would be paid for and read by nobody
    else:
        tags = len(observation_ids(setup.tokenizer, [], 0))
        worth = max(tags, setup.limits.observation_tokens // 4)
        if room_to_read(episode, setup) < (worth if written.action == "search" else 0):
            episode.end = "context"
        elif written.action == "search":
            written.query = content


def search_turn(searching: list[Episode], setup: Setup, step: int = 0) -> None:
    """Answer the query each episode has just written, with its own question, answers and quality.

    An episode whose search fails for good ends there: see `check_failures`."""
    if not searching:
        return
    requests = []
    for e in searching:
        turn, answers = e.turns[-1], tuple(e.golden_answers)
        seed = draw_seed("search", setup.seed, step, e.id, e.sample, len(e.turns))
        quality = turn.quality or "useful"
        requests.append(SearchRequest(turn.query, e.question, answers, quality, seed))
    for episode, result in zip(searching, setup.engine.search(requests), strict=True):
        if result.error:
            episode.end, episode.error = "failed", result.error
            continue
        episode.turns[-1].documents = result.documents
        episode.searches += 1
        episode.malformed += not result.well_formed
        episode.simulator_prompt_tokens += result.prompt_tokens
        episode.simulator_tokens += result.completion_tokens
        limit = min(setup.limits.observation_tokens, room_to_read(episode, setup))
        episode.read(observation_ids(setup.tokenizer, result.documents, limit))


def notices(episode: Episode, setup: Setup) -> list[int]:
    """What tells the policy that its action was invalid, or that its last turn has come."""
    template = setup.prompts["policy_without_search" if setup.engine is None else "policy"]
    ids: list[int] = []
    if episode.turns and episode.turns[-1].action == "invalid":
        ids += encode(setup.tokenizer, "\n" + fill(template["notice"]) + "\n")
    if len(episode.turns) == setup.limits.max_searches > 0:
        ids += encode(setup.tokenizer, fill(template["last_turn"]) + "\n")
    return ids


# ---------------------------------------------------------------- reward


# What --reward offers: a function of the whole episode. Your own: one entry more.
REWARDS: dict[str, Callable[[Episode], float]] = {
    "f1": lambda e: f1_score(e.answer, e.golden_answers),
    "em": lambda e: exact_match(e.answer, e.golden_answers),
}
WELL_FORMED = re.compile(r"\s*<think>.*?</think>\s*<(search|answer)>[^<]*</\1>\s*", re.DOTALL)


def score(episode: Episode, reward: str = "f1") -> None:
    """Fill in the reward and, for the metrics, its parts."""
    episode.scores = {
        **{name: REWARDS[name](episode) for name in ("f1", "em")},
        "answered": float(bool(episode.answer)),
        "format": float(bool(episode.turns)
                        and all(WELL_FORMED.fullmatch(turn.text) for turn in episode.turns)),
    }
    episode.reward = REWARDS[reward](episode)


# ---------------------------------------------------------------- curriculum


# What --curriculum offers: (step, settings) -> p, the share of noisy searches; filled below.
CURRICULA: dict[str, Callable[[int, "CurriculumSettings"], float]] = {}
CURRICULUM_READS = {"exponential": ("p_start", "p_end", "base"), "constant": ("p_end",),
                    "random": ("p_start", "p_end")}  # of an entry that isn't here: any


@dataclass(frozen=True, kw_only=True)
class CurriculumSettings(CommonSettings):
    """The share of noisy searches over a run (paper, section 3.5)."""

    steps: int = option(203, "Optimisation steps.", low=1, resumable=True)
    curriculum_steps: int | None = option(
        None, "Steps over which noise changes, and base of the warm-ups; by default all.", low=1)
    curriculum: str = option("exponential", "How the share of noise develops.",
                             choices=CURRICULA)
    p_start: float = option(0.0, "Share of noisy searches at the first step.", low=0, high=1)
    p_end: float = option(0.5, "Share at the last step.", low=0, high=1)
    base: float = option(4.0, "exponential: its base b; 1 is a straight line.", above=0)

    def unused(self) -> dict[str, str]:
        return super().unused() | dict.fromkeys(unread(CURRICULUM_READS, self.curriculum),
                                                f"with --curriculum {self.curriculum}")


def exponential(step: int, s: CurriculumSettings) -> float:
    """p_i = p_s + (b^(i/m) - 1)/(b - 1) (p_e - p_s), m = steps - 1; b -> 1 is the linear limit.

    After the curriculum's steps: p_e."""
    m = (s.curriculum_steps or s.steps) - 1
    progress = min(1.0, step / m) if m else 0.0
    if abs(s.base - 1) < 1e-9:
        return s.p_start + progress * (s.p_end - s.p_start)
    return s.p_start + (s.base**progress - 1) / (s.base - 1) * (s.p_end - s.p_start)


def uniform(step: int, s: CurriculumSettings) -> float:
    """Each step's share drawn between p_start and p_end: what the paper's Table 6 compares with."""
    return random.Random(draw_seed("curriculum", s.seed, step)).uniform(s.p_start, s.p_end)


CURRICULA |= {"exponential": exponential, "constant": lambda step, s: s.p_end, "random": uniform}


# ---------------------------------------------------------------- advantages (pure functions)


def leave_one_out(rewards: Tensor) -> Tensor:
    """Reward minus the mean of the prompt's other attempts: an unbiased baseline.

    rewards (P, G): G attempts at each of P prompts -> (P, G). RLOO, Ahmadian et al. 2024, eq. 7."""
    others = (rewards.sum(1, keepdim=True) - rewards) / (rewards.shape[1] - 1)
    return zero_where_equal(rewards - others, rewards)


def grpo_advantages(rewards: Tensor, scale: bool) -> Tensor:
    """Reward minus its group's mean, over its standard deviation (of G - 1). (P, G) -> (P, G).

    GRPO, DeepSeekMath, section 4.1.2. Without `scale`, as in Dr. GRPO (Liu et al. 2025), no
    division, for it favours prompts of little variance."""
    centred = rewards - rewards.mean(1, keepdim=True)
    scaled = centred / (rewards.std(1, keepdim=True) + 1e-6) if scale else centred
    return zero_where_equal(scaled, rewards)


def zero_where_equal(advantages: Tensor, rewards: Tensor) -> Tensor:
    """Exactly 0 in groups without variance, where rounding would leave 1e-16. (P, G) -> (P, G)."""
    equal = rewards.amax(1, keepdim=True) == rewards.amin(1, keepdim=True)
    return advantages.masked_fill(equal, 0.0)


def token_rewards(rewards: Tensor, kl: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """The reward at the last policy token, minus the KL penalty at each. (B,), (B, L) -> (B, L).

    PPO in RLHF (Ouyang et al. 2022, eq. 2), REINFORCE++ (Hu 2025, eq. 3). kl: log pi - log ref."""
    last = mask.long().sum(1) - 1  # (B,)
    per_token = -kl_coef * kl * mask
    final = (rewards.to(kl) * (last >= 0))[:, None].to(per_token.dtype)
    return per_token.scatter_add(1, last.clamp(min=0)[:, None], final)


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float,
        lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16). -> advantages, returns.

    All (B, L): policy tokens alone, packed to the left, as if documents were not there."""
    advantages = torch.zeros_like(rewards)
    running = torch.zeros_like(rewards[:, 0])
    following = torch.zeros_like(rewards[:, 0])  # value of the next policy token, 0 after the last
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * following - values[:, t]
        running = (delta + gamma * lam * running) * mask[:, t]
        following = values[:, t] * mask[:, t]
        advantages[:, t] = running
    return advantages, (advantages + values) * mask


def whiten(values: Tensor, mean: Tensor, std: Tensor, mask: Tensor) -> Tensor:
    """Zero mean and unit variance over the global batch, whose moments are given. All (B, L).

    Exactly 0 where the values are equal but for rounding, which a division would blow up."""
    varied = std > 1e-6 * (1 + mean.abs())
    return torch.where(varied, (values - mean) / std, 0.0) * mask


# ---------------------------------------------------------------- losses (pure functions)


def policy_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip_low: float,
                clip_high: float, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Clipped surrogate (PPO, Schulman et al. 2017, eq. 7; separate bounds: DAPO, eq. 10). (N,).

    Returns the loss and whether it was clipped. At a step's first optimizer step the ratio is 1:
    nothing is clipped, and the gradient is REINFORCE's, -A grad log pi. weights: constants, the
    sampler correction (`importance_weights`)."""
    ratio = (logprobs - old_logprobs).exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = -weights * torch.min(ratio * advantages, clipped * advantages)
    return loss, (clipped * advantages < ratio * advantages).detach()


def importance_weights(old_logprobs: Tensor, sampler_logprobs: Tensor, cap: float) -> Tensor:
    """min(pi_trainer / pi_sampler, cap): corrects for their different rounding. All (N,).

    1 with a cap of 0, which turns the correction off."""
    if not cap:
        return torch.ones_like(old_logprobs)
    return (old_logprobs - sampler_logprobs).exp().clamp(max=cap).detach()


def kl_k3(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """Estimate of KL(policy || reference) at each token: e^d - d - 1, d = log ref - log pi. (N,).

    Schulman 2020 ("k3"), as in GRPO (DeepSeekMath, eq. 4). It is *added* to the loss."""
    difference = reference_logprobs - logprobs
    return difference.exp() - difference - 1


VALUE_CLIP = 0.5  # as in verl and in PPO's code for RLHF


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor,
               clip: float = VALUE_CLIP) -> Tensor:
    """Half the squared error, values clipped to a band around the old ones. All (N,)."""
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * torch.max((values - returns) ** 2, (clipped - returns) ** 2)


# ---------------------------------------------------------------- algorithms


@dataclass
class Batch:
    """B episodes of up to L trained tokens, packed to the left, to compute advantages from."""

    rewards: Tensor  # (B,) float64
    groups: list[list[int]]  # indices of each prompt's episodes, less those whose search failed
    mask: Tensor  # (B, L): 1 where an episode has a trained token
    whiten: Callable[[Tensor], Tensor]  # over the trained tokens of all ranks
    kl: Tensor | None = None  # (B, L): log pi - log ref; with the KL in the reward only
    values: Tensor | None = None  # (B, L): the critic's

    def by_group(self, advantage: Callable[[Tensor], Tensor]) -> Tensor:
        """advantage((1, G)) -> (1, G) of every group that can be compared, as (B, 1); else 0."""
        found = torch.zeros_like(self.rewards)
        for group in self.groups:
            if len(group) > 1:
                found[group] = advantage(self.rewards[group][None])[0]
        return found[:, None]


def reinforce(batch: Batch, s: "TrainSettings") -> tuple[Tensor, None]:
    """Williams 1992. The paper subtracts no baseline: no advantage is negative then."""
    baselines = {"none": lambda: batch.rewards[:, None],
                 "leave-one-out": lambda: batch.by_group(leave_one_out)}
    return baselines[s.baseline](), None


def grpo(batch: Batch, s: "TrainSettings") -> tuple[Tensor, None]:
    return batch.by_group(lambda rewards: grpo_advantages(rewards, s.scale_rewards)), None


def ppo(batch: Batch, s: "TrainSettings") -> tuple[Tensor, Tensor]:
    rewards = token_rewards(batch.rewards, batch.kl, batch.mask, s.kl_coef)
    advantages, returns = gae(rewards, batch.values, batch.mask, s.gamma, s.gae_lambda)
    return batch.whiten(advantages), returns


def reinforce_plus_plus(batch: Batch, s: "TrainSettings") -> tuple[Tensor, None]:
    rewards = token_rewards(batch.rewards, batch.kl, batch.mask, s.kl_coef)
    # Without a value and with lambda 1, advantages are the discounted sums of what is to come.
    returns, _ = gae(rewards, torch.zeros_like(rewards), batch.mask, s.gamma, lam=1.0)
    return batch.whiten(returns), None


@dataclass(frozen=True)
class Algorithm:
    """An entry of ALGORITHMS.

    advantages: (batch, settings) -> advantages (B, L) or (B, 1), and a critic's returns (B, L)."""

    advantages: Callable[[Batch, "TrainSettings"], tuple[Tensor, Tensor | None]]
    critic: bool = False
    groups: bool = True  # compares the attempts at a prompt with each other
    kl: Literal["loss", "reward"] = "loss"  # the KL penalty: added to it, or taken from it
    reads: tuple[str, ...] | None = None  # the settings of algorithms that it reads; None: any


# What --algorithm offers. All share policy_loss, its mean over the mini-batch's tokens (DAPO, eq.
# 8). REINFORCE, GRPO: one advantage per episode, from its group; k3 in the loss. PPO (GAE, critic),
# REINFORCE++: an advantage per token; k1 in the reward.
ALGORITHMS = {
    "reinforce": Algorithm(reinforce, reads=("baseline",)),
    "grpo": Algorithm(grpo, reads=("scale_rewards",)),
    "ppo": Algorithm(ppo, critic=True, groups=False, kl="reward",
                     reads=("critic", "critic_lr", "critic_warmup_ratio", "gamma", "gae_lambda")),
    "reinforce++": Algorithm(reinforce_plus_plus, groups=False, kl="reward", reads=("gamma",)),
}


# ---------------------------------------------------------------- settings of a run


@dataclass(frozen=True, kw_only=True)
class TrainSettings(FolderSettings, SearchSettings, EpisodeSettings, CurriculumSettings):
    """Options of `train`. Defaults: the paper's, but for GRPO, REINFORCE's baseline and the sampler
    correction."""

    data: Path = option(help="Training questions: JSONL with id, question, golden_answers.")
    model: str = option("smollm2", f"The policy: {MODEL}.")
    engine: str = option("simulator", "simulator: ZeroSearch; a real engine: Search-R1; none: R1.",
                         choices=ENGINES)
    top_k: int = option(5, "Documents that a search returns.", low=1)
    failed_searches: int = option(0, "Searches that may fail; their episodes are left out.", low=0,
                                  resumable=True)
    empty_steps: int = option(3, "Steps in a row whose searches all find nothing: the run stops.",
                              low=1, resumable=True)
    algorithm: str = option("grpo", "How advantages are estimated.", choices=ALGORITHMS)
    reward: str = option("f1", "What is rewarded.", choices=REWARDS)
    prompts_per_step: int = option(64, "Questions per step, over all processes.", low=1)
    rollouts: int = option(5, "Attempts at each question.", low=1)
    lr: float = option(1e-6, "Learning rate of the policy.", above=0)
    warmup_ratio: float = option(0.0, "Share of --curriculum-steps over which it rises from 0.",
                                 low=0, high=1)
    mini_batch_size: int | None = option(None, "Episodes per optimizer step; by default all of a "
                                         "step's.", low=1)
    kl_coef: float = option(0.001, "Weight of the KL to the start model; 0: no reference.", low=0)
    clip_low: float = option(0.2, "The ratio is clipped at 1 minus this.", low=0, high=1)
    clip_high: float = option(0.2, "The ratio is clipped at 1 plus this.", low=0)
    epochs: int = option(1, "Passes over each batch.", low=1)
    importance_cap: float = option(2.0, "Cap of the sampler correction; 0 turns it off.", low=0)
    baseline: str = option("leave-one-out", "REINFORCE: what is subtracted from the reward.",
                           choices=("leave-one-out", "none"))
    scale_rewards: bool = option(True, "GRPO: divide by the group's standard deviation.")
    critic: str | None = option(None, "PPO: the critic's backbone; by default the policy's model.")
    critic_lr: float = option(1e-5, "PPO: learning rate of the critic.", above=0)
    critic_warmup_ratio: float = option(0.0, "PPO: as --warmup-ratio, of the critic.", low=0,
                                        high=1)
    gamma: float = option(1.0, "PPO, REINFORCE++: discount of a token.", low=0, high=1)
    gae_lambda: float = option(1.0, "PPO: decay of the advantage estimate.", low=0, high=1)
    mask_documents: bool = option(True, "Train no token of a document (off: the paper's Table 7).")
    batch_tokens: int = option(4096, "Tokens per micro-batch; shared prefixes count once.", low=1)
    gradient_checkpointing: bool = option(False, "Less memory, more time.")
    eval_every: int = option(0, "Steps between evaluations on held-out questions; 0: none.", low=0)
    eval_data: Path | None = option(None, "The held-out questions, as --data.")
    eval_limit: int = option(64, "How many of them: a sample, by --seed.", low=1)
    eval_engine: str | None = option(None, "Their search engine; by default that of training.",
                                     choices=ENGINES)
    keep_best: bool = option(False, "Keep the policy of the best evaluation in OUT/best.")
    save_every: int = option(50, "Steps between checkpoints.", low=1, resumable=True)
    logger: str | None = option(None, "Accelerate's tracker: wandb, trackio...", resumable=True)
    preset: str | None = option(None, "Values of data/presets.toml.", is_eager=True, resumable=True,
                                callback=preset_callback(ROOT / "data/presets.toml"))
    show_config: bool = option(False, "Print the settings as JSON, and stop.", resumable=True)

    def check(self) -> None:
        super().check()
        alone = self.algorithm == "reinforce" and self.baseline == "none"
        if self.rollouts == 1 and ALGORITHMS[self.algorithm].groups and not alone:
            raise UserError(f"{self.algorithm} compares the rollouts of a prompt with each other: "
                            "--rollouts 1 is too few")
        if bool(self.eval_every) != bool(self.eval_data) or self.keep_best and not self.eval_every:
            raise UserError("an evaluation takes --eval-every N and --eval-data FILE; without it "
                            "there is no best policy to keep")
        if self.eval_engine and (missing := ENGINES[self.eval_engine].missing(self)):
            raise UserError(f"--eval-engine {self.eval_engine} needs {missing}")
        check_tracker(self.logger)

    def engines(self) -> list[str]:
        return [self.engine] + [self.eval_engine] * bool(self.eval_every and self.eval_engine)

    def unused(self) -> dict[str, str]:
        ignored = unread({name: a.reads for name, a in ALGORITHMS.items()}, self.algorithm)
        noise = () if ENGINES[self.engine].simulated else ("curriculum", "p_start", "p_end", "base")
        held_out = () if self.eval_every else ("eval_limit", "eval_engine")
        episodes = self.prompts_per_step * self.rollouts
        one_step = self.epochs == 1 and (self.mini_batch_size or episodes) >= episodes
        clip = ("clip_low", "clip_high") if one_step else ()  # its ratios are all 1
        return (super().unused() | dict.fromkeys(noise, f"with --engine {self.engine}")
                | dict.fromkeys(clip, "with one optimizer step a batch")
                | dict.fromkeys(held_out, "without --eval-every")
                | dict.fromkeys(ignored, f"with --algorithm {self.algorithm}"))


# ---------------------------------------------------------------- the update


@dataclass
class Trainer(Worker):
    """What a step works on. A critic is there for PPO alone, a reference for a KL penalty."""

    policy: nn.Module  # a TokenScorer, prepared by Accelerate
    optimizer: torch.optim.Optimizer
    reference: nn.Module | None = None
    critic: nn.Module | None = None
    critic_optimizer: torch.optim.Optimizer | None = None
    schedules: list[LRScheduler] = field(default_factory=list)  # of both learning rates
    before_change: Callable[[], None] = lambda: None  # called before a step changes a weight


def make_trainer(accelerator: Accelerator, s: TrainSettings) -> Trainer:
    """Policy, critic and reference on the device; float32 weights, bfloat16 arithmetic."""
    policy = TokenScorer(load_trained(s.model, s.gradient_checkpointing))
    steps = s.curriculum_steps or s.steps  # a run that is extended keeps its warm-up
    *prepared, schedule = prepare_trained(accelerator, policy, s.lr, rise(s.warmup_ratio * steps))
    trainer = Trainer(accelerator, *prepared, schedules=[schedule])
    if ALGORITHMS[s.algorithm].critic:
        critic = Critic(load_trained(s.critic or s.model, s.gradient_checkpointing))
        trainer.critic, trainer.critic_optimizer, schedule = prepare_trained(
            accelerator, critic, s.critic_lr, rise(s.critic_warmup_ratio * steps))
        trainer.schedules.append(schedule)
    if s.kl_coef > 0:
        reference = TokenScorer(load_model(s.model)).requires_grad_(False)
        trainer.reference = prepare_reference(accelerator, reference)
    return trainer


@dataclass
class Targets:
    """Per-token inputs of the update, one tensor (L_i,) an episode."""

    advantages: list[Tensor]
    sampler: list[Tensor]  # log-probs of the sampler; NaN at tokens that it never sampled
    old: list[Tensor] | None = None  # log-probs before the step; None: the first pass gives them
    reference: list[Tensor] | None = None
    values: list[Tensor] | None = None
    returns: list[Tensor] | None = None

    def flat(self, part: list[int]) -> "Targets":
        """Those of some episodes, one after the other: one tensor (N,) each."""
        return Targets(*(column and torch.cat([column[i] for i in part])
                         for column in vars(self).values()))


def estimate_targets(trainer: Trainer, s: TrainSettings, episodes: list[Episode],
                     sequences: list[Sequence], optimizer_steps: int = 1) -> Targets:
    """Advantages of every trained token, with the passes through the models that they need."""
    algorithm, device = ALGORITHMS[s.algorithm], trainer.accelerator.device

    def logprobs_of(model: nn.Module) -> list[Tensor]:
        return trainer.evaluate(model, sequences, s.batch_tokens, temperature=s.temperature)

    sampler = [sampler_logprobs(e, q).to(device) for e, q in zip(episodes, sequences)]
    targets = Targets([], sampler)
    rewards = torch.tensor([e.reward for e in episodes], dtype=torch.float64)
    mask = pad([torch.ones_like(x) for x in sampler])
    batch = Batch(rewards, played_groups(episodes, s.rollouts), mask,
                  lambda values: whiten(values, *trainer.moments(values, mask), mask))
    if trainer.reference is not None:
        targets.reference = logprobs_of(trainer.reference)
    # old: the trainer's log-probs before the step; the sampler's differ by rounding.
    if algorithm.kl == "reward" or optimizer_steps > 1:
        targets.old = logprobs_of(trainer.policy)
    if algorithm.kl == "reward":
        pairs = zip(targets.old, targets.reference or targets.old)
        batch.kl = pad([old - reference for old, reference in pairs])
    if algorithm.critic:
        targets.values = trainer.evaluate(trainer.critic, sequences, s.batch_tokens)
        batch.values = pad(targets.values)
    advantages, returns = algorithm.advantages(batch, s)
    targets.advantages = unpad(advantages.to(mask).expand_as(mask), sampler)
    targets.returns = None if returns is None else unpad(returns, sampler)
    return targets


def sampler_logprobs(episode: Episode, sequence: Sequence) -> Tensor:
    """(L,): of each trained token; NaN where the sampler never sampled it, as in a document."""
    trained, sampled = (torch.tensor(mask).bool() for mask in (sequence.mask, episode.mask))
    logprobs = torch.tensor(episode.logprobs).masked_fill(~sampled, math.nan)
    return logprobs[: len(trained)][trained]


def played_groups(episodes: list[Episode], size: int) -> list[list[int]]:
    """The places of each prompt's episodes, which are adjacent, less those whose search failed."""
    groups = [range(len(episodes))[i : i + size] for i in range(0, len(episodes), size)]
    return [[i for i in group if episodes[i].end != "failed"] for group in groups]


def trained_sequence(episode: Episode, mask_documents: bool) -> Sequence:
    """An episode up to its last trained token: nothing depends on what comes after it."""
    mask = episode.trained_mask(mask_documents)
    end = max((i + 1 for i, trained in enumerate(mask) if trained), default=1)
    return Sequence(episode.ids[:end], mask[:end])


def update(trainer: Trainer, s: TrainSettings, episodes: list[Episode], clock: Callable,
           mini_batches: list[list[int]] | None = None) -> dict[str, float]:
    """One step's optimisation: an optimizer step on each mini-batch, `epochs` times.

    mini_batches: indices of this rank's episodes in each; by default one of all. Every trained
    token of a global mini-batch weighs the same."""
    sequences = [trained_sequence(e, s.mask_documents) for e in episodes]
    mini_batches = mini_batches or [list(range(len(sequences)))]
    tokens = [trainer.total(sum(sum(sequences[i].mask[1:]) for i in indices))
              for indices in mini_batches]
    parts = [part for part in zip(mini_batches, tokens) if part[1]] * s.epochs
    with clock("reference"):
        if parts:
            targets = estimate_targets(trainer, s, episodes, sequences, len(parts))
    with clock("update"):
        sums = []
        for indices, count in parts:
            sums.append(accumulate_gradient(trainer, s, sequences, targets, count, indices))
            if len(sums) == 1:
                trainer.before_change()
            sums[-1]["grad_norm"] = optimizer_step(trainer, sums[-1])
        if not parts:  # no episode had room for a turn
            trainer.before_change()
        for schedule in trainer.schedules:
            schedule.step()
    if not parts:
        return SKIPPED
    each = len(parts) // s.epochs
    return update_metrics(trainer, targets, sum(tokens), add_up(sums[:each]), add_up(sums[-each:]))


def accumulate_gradient(trainer: Trainer, s: TrainSettings, sequences: list[Sequence],
                        targets: Targets, tokens: float, indices: list[int]) -> dict[str, Any]:
    """The gradient of a mini-batch, whose places in `sequences` are given: left in the models.

    tokens: how many it trains on all ranks. Returns sums over this rank's, for the metrics."""
    kl_in_loss = trainer.reference is not None and ALGORITHMS[s.algorithm].kl == "loss"
    # No advantage, no gradient: left out, unless a KL or a critic learns from these tokens too.
    train_all = kl_in_loss or trainer.critic is not None
    trained = [i for i in indices if train_all or targets.advantages[i].any()]
    sums = dict.fromkeys(("policy", "kl", "entropy", "clipped", "gap", "value", "scored"), 0.0)
    for part in trainer.micro_batches([sequences[i] for i in trained], s.batch_tokens,
                                      trainer.policy, trainer.critic):
        if not part:
            trainer.idle_backward(trainer.policy, trainer.critic)
            continue
        chosen = [trained[i] for i in part]  # places in the micro-batches' input -> in `sequences`
        batch, here = [sequences[i] for i in chosen], targets.flat(chosen)
        ids, mask = collate(batch, trainer.accelerator.device)
        logprobs, entropies = trainer.policy(ids, mask, temperature=s.temperature)  # (N,), (N,)
        trainer.work.append(Pass(trainer.policy, batch, 6))  # forward and backward
        old = logprobs.detach() if here.old is None else here.old
        sampler = torch.where(here.sampler.isnan(), old, here.sampler)
        weights = importance_weights(old, sampler, s.importance_cap)
        losses, clipped = policy_loss(logprobs, old, here.advantages, s.clip_low, s.clip_high,
                                      weights)
        terms = {"policy": losses, "entropy": entropies, "clipped": clipped,
                 "gap": (old - sampler).abs(), "scored": torch.ones_like(losses)}
        if here.reference is not None:  # a metric, and for some algorithms also a loss
            terms["kl"] = kl_k3(logprobs, here.reference)
        trainer.backward_mean(losses + s.kl_coef * terms["kl"] if kl_in_loss else losses, tokens)
        if trainer.critic is not None:
            values = trainer.critic(ids, mask)
            trainer.work.append(Pass(trainer.critic, batch, 6))
            terms["value"] = value_loss(values, here.values, here.returns)
            trainer.backward_mean(terms["value"], tokens)
        sums |= {name: sums[name] + term.detach().sum() for name, term in terms.items()}
    return sums


def optimizer_step(trainer: Trainer, sums: dict[str, Any]) -> float:
    """One optimizer step, gradient norms clipped at 1. Returns the policy's norm before that."""
    pairs = [(trainer.policy, trainer.optimizer), (trainer.critic, trainer.critic_optimizer)]
    pairs = [pair for pair in pairs if pair[0] is not None]
    clip = trainer.accelerator.clip_grad_norm_
    norms = [float(whole(clip(model.parameters(), 1.0))) for model, _ in pairs]
    if not all(map(math.isfinite, (*norms, trainer.total(sums["policy"] + sums["value"])))):
        raise FloatingPointError("the loss or its gradient is not finite")
    for _, optimizer in pairs:
        optimizer.step()
        optimizer.zero_grad()
    return norms[0]


# ---------------------------------------------------------------- warmup, schedule


@dataclass(frozen=True, kw_only=True)
class WarmupSettings(TuningSettings):
    trajectories: Path = argument("JSONL of trajectories. All turns are imitated, wrong ones too: "
                                  "filter them first.")
    lr: float = option(1e-4, "Peak learning rate.", above=0)
    top_k: int = option(3, "Documents of a search that are read.", low=1)
    max_searches: int = option(5, "As in the rollouts: after so many no more is offered.", low=0)
    observation_tokens: int = option(2048, "As in the rollouts: documents are cut to this.", low=0)


@command(app, WarmupSettings)
def warmup(s: WarmupSettings) -> None:
    """Teach a small model the template, by imitation; the model goes to OUT/model. Loss on the
    policy's own tokens only. Not part of the paper: its models follow the template when asked to,
    SmolLM2-135M does not.

    A trajectory of your own, one a line: {"id": "1", "question": Q, "golden_answers": [A], "turns":
    [{"text": "<think> T </think> <search> S </search>", "query": S, "documents": [D, E, F]},
    {"text": "<think> T </think> <answer> A </answer>"}]}"""
    records = read_trajectories(s.trajectories, "id")
    accelerator, prompts = make_accelerator(), load_prompts(s.prompts)
    main = accelerator.is_main_process
    with RunFolder(s, prompts, main, trajectories=s.trajectories) as folder:
        tokenizer = load_tokenizer(s.model)
        sequences = [replay(record, tokenizer, prompts, s) for record in records]
        fine_tune(accelerator, load_model(s.model), tokenizer, sequences, folder)


def replay(record: dict[str, Any], tokenizer, prompts: Prompts, s: WarmupSettings) -> Sequence:
    """A recorded trajectory as the ids that a rollout would have made of valid actions."""
    episode = new_episode(record, 0, tokenizer, prompts)
    for number, turn in enumerate(record["turns"], 1):
        ids = encode(tokenizer, turn["text"])
        episode.write(ids, [0.0] * len(ids))
        if turn.get("query"):
            documents = turn["documents"][: s.top_k]
            episode.read(observation_ids(tokenizer, documents, s.observation_tokens))
            if number == s.max_searches:
                episode.read(encode(tokenizer, fill(prompts["policy"]["last_turn"]) + "\n"))
    return Sequence(episode.ids, episode.mask)


@command(app, CurriculumSettings)
def schedule(s: CurriculumSettings) -> None:
    """Print the curriculum: the share of noisy searches at 21 steps of a run."""
    for step in sorted({round(i * (s.steps - 1) / 20) for i in range(21)}):
        p = CURRICULA[s.curriculum](step, s)
        print(f"step {step:>5}   p {p:.4f}   {'█' * round(60 * p)}")


# ---------------------------------------------------------------- train


@dataclass
class Run:
    """What the steps of a training run work with, and what they have counted."""

    s: TrainSettings
    rows: list[dict[str, Any]]
    setup: Setup
    held_out: Setup  # greedy; its engine may be another one
    trainer: Trainer
    checkpoints: Checkpoints
    peak: float  # FLOP/s of all devices, measured
    best: float = -math.inf  # mean reward of the best evaluation so far
    searches: int = 0
    failed: int = 0
    empty: int = 0  # steps in a row whose searches all found nothing

    @property
    def policy(self) -> nn.Module:
        """The policy that is trained, as a Hugging Face model."""
        return self.trainer.accelerator.unwrap_model(self.trainer.policy).model


@command(app, TrainSettings)
def train(s: TrainSettings) -> None:
    """Reinforcement learning of the policy against a search engine; it goes to OUT/model.

    The paper's runs: --preset paper-qwen2.5-3b, or another one of data/presets.toml."""
    if s.curriculum_steps is None:  # a run that is extended keeps its curriculum
        before = read_config(s.out)["settings"] if s.resume else {}
        s = replace(s, curriculum_steps=before.get("curriculum_steps") or s.steps)
    if len(rows := read_questions(s.data)) < s.prompts_per_step:
        raise UserError(f"{s.data}: {len(rows)} questions, fewer than --prompts-per-step")
    accelerator = make_accelerator(log_with=s.logger, project_dir=s.out)
    inputs = {"data": s.data, "eval_data": s.eval_data if s.eval_every else None, **s.files()}
    with RunFolder(s, load_prompts(s.prompts), accelerator.is_main_process, **inputs) as folder:
        run = prepare(s, rows, accelerator, folder)
        start = run.checkpoints.done
        with run.checkpoints.stoppable():
            with progress_bar() as bar:
                task = bar.add_task(s.algorithm, total=s.steps, completed=start, info="")
                for step in range(start, s.steps):
                    evaluate_held_out(run, done=step)
                    clock = PhaseClock()
                    episodes = collect(run, step, clock)
                    losses = learn(run, step, episodes, clock)
                    metrics = record(run, step, episodes, losses | clock.metrics())
                    noise = f"noise {metrics['noise/p']:.2f}  " if "noise/p" in metrics else ""
                    bar.update(task, advance=1, info=f"reward {metrics['reward/mean']:.2f}  {noise}"
                               f"searches at an API ${costs.search_bill(run.searches):.2f}")
                evaluate_held_out(run, done=s.steps)
            run.checkpoints.end(run.policy, run.setup.tokenizer)


def prepare(s: TrainSettings, rows: list[dict[str, Any]], accelerator: Accelerator,
            folder: RunFolder) -> Run:
    """Load everything, open the run folder, go on from its last checkpoint."""
    processes = accelerator.num_processes
    if s.prompts_per_step % processes:
        raise UserError(f"--prompts-per-step can't be divided over {processes} processes")
    if s.resume and (done := max(saved_steps(s.out), default=0)) > s.steps:
        raise UserError(f"--steps {s.steps}: the run already has {done}")
    transformers.set_seed(s.seed)
    generator, trainer = load_generator(s.model, s.generator), make_trainer(accelerator, s)
    setup = Setup(generator, ENGINES[s.engine].make(s), folder.prompts, s, s.seed)
    engine = ENGINES[s.eval_engine].make(s) if s.eval_engine else setup.engine
    check_room(rows, setup)
    held_out = replace(setup, engine=engine, limits=replace(s, temperature=0.0))
    folder.open()  # only now: all that can fail has loaded
    accelerator.wait_for_everyone()
    console.print(f"generation: {generator.name}")
    checkpoints = Checkpoints(accelerator, s.out, s.save_every)
    peak = peak_flops(accelerator.device) * processes
    run = Run(s, rows, setup, held_out, trainer, checkpoints, peak)
    before = checkpoints.go_on() if s.resume else []
    if checkpoints.done:
        generator.load_weights(named_weights(run.policy))
    run.searches = sum(row["cost/searches"] for row in before)
    run.failed = sum(row["search/failed"] for row in before)
    run.empty = empty_steps(before)
    if (s.out / "eval.jsonl").exists():
        evaluations = read_jsonl(s.out / "eval.jsonl", whole_lines=True)
        run.best = max((row["eval/reward"] for row in evaluations), default=run.best)
    start_tracker(accelerator, s.logger, s)
    trainer.before_change = checkpoints.forbid_abort  # a signal then waits for the step's end
    return run


def step_noise(step: int, s: TrainSettings) -> float | None:
    """The share of noisy searches at a step; None where a real engine answers."""
    return CURRICULA[s.curriculum](step, s) if ENGINES[s.engine].simulated else None


def check_room(rows: list[dict[str, Any]], setup: Setup) -> None:
    """Raise UserError if not even the shortest question leaves room for a turn."""
    row = min(rows, key=lambda row: len(row["question"]))
    episode = new_episode(row, 0, setup.tokenizer, setup.prompts, setup.engine is not None)
    if room_to_read(episode, setup) < 0:
        raise UserError(f"--context-tokens {setup.limits.context_tokens} has no room for a turn of "
                        f"{setup.limits.tokens_per_turn}: a prompt takes {len(episode.ids)}")


def collect(run: Run, step: int, clock: PhaseClock) -> list[Episode]:
    """Play and score this step's episodes; returns those of all ranks."""
    s, noise = run.s, step_noise(step, run.s)
    rows = step_questions(run.rows, step, s)
    return play_questions(run, run.setup, rows, s.rollouts, noise=noise, step=step, clock=clock)


def play_questions(run: Run, setup: Setup, rows: list[dict[str, Any]], samples: int,
                   **how: Any) -> list[Episode]:
    """Play this rank's share of the questions, so many times each; returns all ranks' episodes.

    how: arguments of `rollout`."""
    s, accelerator = run.s, run.trainer.accelerator
    mine = rows[accelerator.process_index :: accelerator.num_processes]
    episodes = [new_episode(row, sample, setup.tokenizer, setup.prompts, setup.engine is not None)
                for row in mine for sample in range(samples)]
    with run.checkpoints.abortable():
        rollout(episodes, setup, **how)
    for idle in (setup.generator, getattr(setup.engine, "generator", None)):
        if idle:
            idle.sleep()  # its memory is the update's for a while
    for episode in episodes:
        if episode.end != "failed":
            score(episode, s.reward)
    everyone = gather_groups(episodes, samples)
    check_failures([e.error for e in everyone], run.failed, s.failed_searches)
    return everyone


def learn(run: Run, step: int, episodes: list[Episode], clock: PhaseClock) -> dict[str, float]:
    """One update from the episodes of all ranks; the sampler gets the new weights."""
    s, accelerator = run.s, run.trainer.accelerator
    shares = balance_over_ranks(episodes, s.rollouts, accelerator.num_processes)
    mine = shares[accelerator.process_index]  # whole groups of episodes
    mini_batches = split(episodes, mine, s.mini_batch_size or len(episodes))
    try:
        losses = update(run.trainer, s, mine, clock, mini_batches)
    except FloatingPointError as error:
        kept = s.out.with_name(f"{s.out.name}-nonfinite.jsonl")  # for s.out may go: see RunFolder
        if accelerator.is_main_process:
            append_jsonl(kept, [asdict(e) for e in episodes])
        raise UserError(f"step {step}: {error}; its episodes are in {kept}") from None
    with clock("sync"):
        run.setup.generator.load_weights(named_weights(run.policy))
    return losses


def record(run: Run, step: int, episodes: list[Episode],
           measured: dict[str, float]) -> dict[str, float]:
    """Write the step's line of metrics and its episodes, and a checkpoint if one is due."""
    s, accelerator = run.s, run.trainer.accelerator
    metrics = {"step": step} | rollout_metrics(episodes, s.rollouts, step_noise(step, s)) | measured
    metrics |= rates(run.trainer, metrics, run.peak)
    run.searches += metrics["cost/searches"]
    run.failed += metrics["search/failed"]
    if accelerator.is_main_process:
        append_jsonl(s.out / "episodes.jsonl", [{"step": step} | asdict(e) for e in episodes])
        append_jsonl(s.out / "metrics.jsonl", [metrics])
        if warning := collapse_warning(metrics, run.setup.engine is not None):
            console.print(f"step {step}: {warning}", style="yellow")
    accelerator.log(metrics, step=step)
    run.checkpoints.step_done(step + 1, of=s.steps)
    run.empty = empty_steps([metrics], run.empty)
    check_empty_steps(run.empty, s.empty_steps, step)
    return metrics


def evaluate_held_out(run: Run, done: int) -> None:
    """After `done` steps, if due: play the held-out questions greedily, without noise.

    Appends a line to OUT/eval.jsonl. Nothing of it is trained on."""
    s, accelerator = run.s, run.trainer.accelerator
    if not s.eval_every or (done % s.eval_every and done < s.steps):
        return
    rows = read_questions(s.eval_data)
    sample = random.Random(draw_seed("held out", s.seed)).sample(rows, min(s.eval_limit, len(rows)))
    metrics = {"step": done} | eval_metrics(play_questions(run, run.held_out, sample, samples=1))
    if accelerator.is_main_process:
        append_jsonl(s.out / "eval.jsonl", [metrics])
    accelerator.log(metrics, step=done)
    if s.keep_best and metrics["eval/reward"] > run.best:
        run.best = metrics["eval/reward"]
        save_model(run.policy, run.setup.tokenizer, s.out / "best")


def step_questions(rows: list[dict[str, Any]], step: int, s: TrainSettings) -> list[dict[str, Any]]:
    """The questions of a step: the data in an order drawn anew each epoch, by seed and step."""
    per_epoch = len(rows) // s.prompts_per_step
    epoch, place = divmod(step, per_epoch)
    order = random.Random(draw_seed("data", s.seed, epoch)).sample(range(len(rows)), len(rows))
    return [rows[i] for i in order[place * s.prompts_per_step : (place + 1) * s.prompts_per_step]]


if __name__ == "__main__":
    run_cli(app)

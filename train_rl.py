"""Chapter 2: a policy learns by reinforcement learning to think, search and answer (ZeroSearch, section 3).

\b
    warmup    recorded trajectories teach a model too small to follow the template unprompted
    train     the loop: collect episodes, learn from them, record what happened
    schedule  the curriculum: the share of noisy searches at each step

`train`, at the bottom, is the loop. `collect` lets the policy talk to a search engine for some turns
and scores its answers; `learn` says which tokens did better than expected (`estimate_targets`) and
makes them likelier (`train_epoch`). Documents are read, never trained.

\b
    python train_rl.py train --data data/world/train.jsonl --model runs/demo/warmup/model \\
        --engine simulator --simulator runs/demo/simulator/model --out runs/demo/policy
    accelerate launch train_rl.py train ...     # any number of devices, by Accelerate's own config
"""

import json
import math
import random
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import gather_object
from rich.console import Console
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

import costs
from plumbing.checkpoints import Checkpoints, check_tracker, find_checkpoint
from plumbing.cli import (Settings, UserError, argument, command, console, make_app, option,
                          preset_callback, progress_bar, run_cli)
from plumbing.engines import ENGINES, Quality, SearchEngine, SearchRequest
from plumbing.files import append_jsonl, draw_seed, open_run, read_jsonl, read_questions
from plumbing.generate import Generator, Sampling
from plumbing.models import (load_model, load_tokenizer, load_trained, make_accelerator,
                             named_weights, prepare_reference, save_model, whole)
from plumbing.rates import Pass, PhaseClock, peak_flops, rates
from plumbing.scorer import (NOTHING, Critic, Sequence, TokenScorer, collate, micro_batches,
                             same_count)
from plumbing.served import load_generator
from plumbing.text import (ROOT, Prompts, encode, exact_match, f1_score, fill, load_prompts,
                           neutralize, prompt_ids)
from sft_simulator import CommonSettings, SearchSettings, TuningSettings, fine_tune, format_documents

app = make_app(__doc__)


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
    # How it ended; "failed": a search did, so that nothing can be said of the policy.
    end: Literal["answered", "turns", "context", "failed"] | None = None
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
        """1 where a token is trained: the policy's own; without document masking (the paper's Table 7)
        all but the prompt. Loss, KL, entropy, advantages and values all follow."""
        if self.end == "failed":
            return [0] * len(self.ids)
        after_prompt = [0] * self.prompt_tokens + [1] * (len(self.ids) - self.prompt_tokens)
        return self.mask if mask_documents else after_prompt


def new_episode(row: dict[str, Any], sample: int, tokenizer, prompts: Prompts,
                search: bool = True) -> Episode:
    """An episode that holds its prompt and nothing else; `search`: whether the template offers it."""
    template = prompts["policy" if search else "policy_without_search"]
    user = fill(template["user"], question=neutralize(row["question"], tokenizer))
    episode = Episode(str(row["id"]), row["question"], row["golden_answers"], row.get("hops"), sample)
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
    temperature: float = option(1.0, "Of the rollouts.", above=0)

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

    @property
    def tokenizer(self) -> Any:
        return self.generator.tokenizer


def parse_action(text: str) -> tuple[Literal["search", "answer", "invalid"], str]:
    """The first whole <search> or <answer> in what the policy wrote this turn, and its content."""
    match = ACTION.search(text)
    if match is None or (match[1] == "search" and not match[2].strip()):
        return "invalid", ""
    return match[1], match[2].strip()


def observation_ids(tokenizer, documents: list[str], limit: int) -> list[int]:
    """Documents as the policy reads them, cut to `limit` tokens. The tags are never cut."""
    text = format_documents([neutralize(document, tokenizer) for document in documents])
    opening = encode(tokenizer, "\n<information>\n")
    closing = encode(tokenizer, "\n</information>\n")
    room = max(0, limit - len(opening) - len(closing))
    return opening + encode(tokenizer, text)[:room] + closing


def noise_quality(p: float, seed: int, step: int, episode: Episode, turn: int) -> Quality:
    """Draw whether a search is noisy: a function of the arguments, whatever the order of threads."""
    draw = random.Random(draw_seed("noise", seed, step, episode.id, episode.sample, turn)).random()
    return "noisy" if draw < p else "useful"


CONCURRENT_EPISODES = 256  # threads; each waits for a generator or a search most of the time
NO_CLOCK = lambda phase: nullcontext()  # noqa: E731


def rollout(episodes: list[Episode], setup: Setup, *, noise: float = 0.0, step: int = 0,
            clock: Callable = NO_CLOCK) -> None:
    """Play the episodes to their end, in place (paper, section 3.3). noise: the curriculum's p.

    A generator that takes requests at any time gets each episode in a thread of its own: it goes on
    when its documents arrive, and decoding and searches overlap. Others play all episodes in
    lockstep, in a fixed order. Seeds and noise draws are the same either way."""
    if not setup.generator.concurrent:
        play(episodes, setup, noise, step, clock)
        return
    with clock("rollout"), ThreadPoolExecutor(CONCURRENT_EPISODES) as threads:
        list(threads.map(lambda episode: play([episode], setup, noise, step, NO_CLOCK), episodes))


def play(episodes: list[Episode], setup: Setup, noise: float, step: int, clock: Callable) -> None:
    """Play episodes to their end, in place, one turn of all of them at a time.

    In `max_searches` turns the policy may search (an invalid action uses its turn up), in a last one
    it may only answer. An episode whose context has no room for a turn ends there."""
    limits, active = setup.limits, episodes
    for turn in range(limits.max_searches + 1):
        for episode in active:
            if len(episode.ids) + limits.tokens_per_turn > limits.context_tokens:
                episode.end = "context"
        active = [e for e in active if e.end is None]
        if not active:
            return
        with clock("rollout"):
            write_turn(active, setup, step, turn)
        for episode in active:
            act(episode, setup, turn)
        active = [e for e in active if e.end is None]
        searching = [e for e in active if e.turns[-1].action == "search"]
        for episode in searching:
            episode.turns[-1].quality = noise_quality(noise, setup.seed, step, episode, turn)
        with clock("search"):
            search_turn(searching, setup, step)
        for episode in active:
            read_notices(episode, setup, last=turn + 1 == limits.max_searches)


def write_turn(active: list[Episode], setup: Setup, step: int, turn: int) -> None:
    """Each policy writes up to </search> or </answer>. Its ids are kept as they were sampled."""
    sampling = Sampling(setup.limits.tokens_per_turn, setup.limits.temperature, STOP)
    seeds = [draw_seed("policy", setup.seed, step, e.id, e.sample, turn) for e in active]
    generations = setup.generator.generate([e.ids for e in active], sampling, seeds)
    for episode, generation in zip(active, generations, strict=True):
        episode.write(generation.ids, generation.logprobs)
        text = setup.tokenizer.decode(generation.ids)
        episode.turns.append(Turn(text, "invalid"))


def act(episode: Episode, setup: Setup, turn: int) -> None:
    """Say what the text of the last turn means: an answer, a query, or nothing valid."""
    written = episode.turns[-1]
    written.action, content = parse_action(written.text)
    if written.action == "search" and setup.engine is None:
        written.action = "invalid"
    if written.action == "answer":
        episode.answer, episode.end = content, "answered"
    elif turn == setup.limits.max_searches:
        episode.end = "turns"  # a search here would be paid for and read by nobody
    elif written.action == "search":
        written.query = content


def search_turn(searching: list[Episode], setup: Setup, step: int = 0) -> None:
    """Answer the query each episode has just written, with its own question, answers and quality.

    An episode whose search fails for good ends there: see `check_failures`."""
    if not searching:
        return
    requests = []
    for e in searching:
        turn = e.turns[-1]
        seed = draw_seed("search", setup.seed, step, e.id, e.sample, len(e.turns))
        answers = tuple(e.golden_answers)
        requests.append(SearchRequest(turn.query, e.question, answers, turn.quality, seed))
    for episode, result in zip(searching, setup.engine.search(requests), strict=True):
        if result.error:
            episode.end, episode.error = "failed", result.error
            continue
        episode.turns[-1].documents = result.documents
        episode.searches += 1
        episode.malformed += not result.well_formed
        episode.simulator_prompt_tokens += result.prompt_tokens
        episode.simulator_tokens += result.completion_tokens
        limit = setup.limits.observation_tokens
        episode.read(observation_ids(setup.tokenizer, result.documents, limit))


def read_notices(episode: Episode, setup: Setup, last: bool) -> None:
    """Tell the policy that its action was invalid, or that its last turn has come."""
    template = setup.prompts["policy_without_search" if setup.engine is None else "policy"]
    if episode.turns[-1].action == "invalid":
        episode.read(encode(setup.tokenizer, "\n" + fill(template["notice"]) + "\n"))
    if last:
        episode.read(encode(setup.tokenizer, fill(template["last_turn"]) + "\n"))


def check_failures(errors: list[str | None], before: int, allowed: int) -> None:
    """Raises UserError if more searches failed than a run may bear, or none of these succeeded.

    An episode whose search failed says nothing of its policy: it is counted, not scored or trained."""
    failed = [error for error in errors if error]
    if before + len(failed) > allowed or (failed and len(failed) == len(errors)):
        raise UserError(f"{before + len(failed)} searches failed (--failed-searches allows {allowed}): "
                        f"{failed[-1]}")


# ---------------------------------------------------------------- reward


# What --reward offers: a function of the whole episode. Your own: one entry more.
REWARDS: dict[str, Callable[[Episode], float]] = {
    "f1": lambda episode: f1_score(episode.answer, episode.golden_answers),
    "em": lambda episode: exact_match(episode.answer, episode.golden_answers),
}
WELL_FORMED = re.compile(r"\s*<think>.*?</think>\s*<(search|answer)>[^<]*</\1>\s*", re.DOTALL)


def score(episode: Episode, reward: str = "f1") -> None:
    """Fill in the reward and, for the metrics, its parts."""
    episode.scores = {
        "f1": f1_score(episode.answer, episode.golden_answers),
        "em": exact_match(episode.answer, episode.golden_answers),
        "answered": float(episode.answer is not None),
        "format": float(all(WELL_FORMED.fullmatch(turn.text) for turn in episode.turns)),
    }
    episode.reward = REWARDS[reward](episode)


# ---------------------------------------------------------------- curriculum


# What --curriculum offers: a function (step, settings) -> p, the share of noisy searches. Your own: one entry more.
CURRICULA: dict[str, Callable[[int, "CurriculumSettings"], float]] = {
    "exponential": lambda step, s: exponential(step, s),
    "constant": lambda step, s: s.p_end,
    "random": lambda step, s: uniform(step, s),
}


@dataclass(frozen=True, kw_only=True)
class CurriculumSettings(CommonSettings):
    """The share of noisy searches over a run (paper, section 3.5)."""

    steps: int = option(203, "Optimisation steps.", low=1)
    curriculum: str = option("exponential", "How the share of noise develops.",
                             choices=CURRICULA)
    p_start: float = option(0.0, "Share of noisy searches at the first step.", low=0, high=1)
    p_end: float = option(0.5, "Share at the last step.", low=0, high=1)
    base: float = option(4.0, "exponential: its base b; 1 is a straight line.", above=0)


def exponential(step: int, s: CurriculumSettings) -> float:
    """p_i = p_s + (b^(i/m) - 1)/(b - 1) (p_e - p_s), m = steps - 1; b -> 1 is the linear limit."""
    progress = step / (s.steps - 1) if s.steps > 1 else 0.0
    if abs(s.base - 1) < 1e-9:
        return s.p_start + progress * (s.p_end - s.p_start)
    return s.p_start + (s.base**progress - 1) / (s.base - 1) * (s.p_end - s.p_start)


def uniform(step: int, s: CurriculumSettings) -> float:
    """Each step's share drawn between p_start and p_end: what the paper's Table 6 compares with."""
    return random.Random(draw_seed("curriculum", s.seed, step)).uniform(s.p_start, s.p_end)


# ---------------------------------------------------------------- advantages (pure functions)


def leave_one_out(rewards: Tensor) -> Tensor:
    """Reward minus the mean of the prompt's other attempts: an unbiased baseline.

    rewards (P, G): G attempts at each of P prompts -> (P, G). RLOO, Ahmadian et al. 2024, eq. 7."""
    others = (rewards.sum(1, keepdim=True) - rewards) / (rewards.shape[1] - 1)
    return zero_where_equal(rewards - others, rewards)


def grpo_advantages(rewards: Tensor, scale: bool) -> Tensor:
    """Reward minus its group's mean, over its standard deviation. (P, G) -> (P, G).

    GRPO, DeepSeekMath, section 4.1.2. Without `scale`: Dr. GRPO (Liu et al. 2025), which drops the
    division that favours prompts of little variance."""
    centred = rewards - rewards.mean(1, keepdim=True)
    scaled = centred / (rewards.std(1, keepdim=True) + 1e-6) if scale else centred
    return zero_where_equal(scaled, rewards)


def zero_where_equal(advantages: Tensor, rewards: Tensor) -> Tensor:
    """Exactly 0 in groups without variance, where rounding would leave 1e-16. (P, G) -> (P, G)."""
    equal = rewards.amax(1, keepdim=True) == rewards.amin(1, keepdim=True)
    return advantages.masked_fill(equal, 0.0)


def token_rewards(rewards: Tensor, kl: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """The reward at the last policy token, minus the KL penalty at each. (B,), (B, L) x 2 -> (B, L).

    PPO in RLHF (Ouyang et al. 2022, eq. 2), REINFORCE++ (Hu 2025, eq. 3). kl: k1, log pi - log ref."""
    last = mask.long().sum(1) - 1  # (B,)
    per_token = -kl_coef * kl * mask
    final = (rewards * (last >= 0))[:, None].to(per_token.dtype)
    return per_token.scatter_add(1, last.clamp(min=0)[:, None], final)


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16). (B, L) -> advantages, returns.

    The L columns are policy tokens alone, packed to the left: a document between two is not there."""
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
    """Zero mean and unit variance over the global batch, whose moments are given. (B, L) -> (B, L)."""
    return (values - mean) / (std + 1e-8) * mask


# ---------------------------------------------------------------- losses (pure functions)


def policy_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip_low: float,
                clip_high: float, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Clipped surrogate (PPO, Schulman et al. 2017, eq. 7), bounds apart (DAPO, eq. 10). All (N,).

    Returns loss and whether it was clipped. Where the ratio is 1, as in a step's first update, its
    gradient is REINFORCE's: -A grad log pi. The weights, the sampler correction, are constants."""
    ratio = (logprobs - old_logprobs).exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = -weights * torch.min(ratio * advantages, clipped * advantages)
    return loss, (clipped * advantages < ratio * advantages).detach()


def importance_weights(old_logprobs: Tensor, sampler_logprobs: Tensor, cap: float) -> Tensor:
    """min(pi_trainer / pi_sampler, cap), for two engines never compute quite the same. All (N,)."""
    return (old_logprobs - sampler_logprobs).exp().clamp(max=cap).detach()


def kl_k3(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """KL(policy || reference) a token: e^d - d - 1 with d = log ref - log pi, never negative. All (N,).

    Schulman 2020 ("k3"), as in GRPO (DeepSeekMath, eq. 4). It is *added* to the loss."""
    difference = reference_logprobs - logprobs
    return difference.exp() - difference - 1


VALUE_CLIP = 0.5  # as in verl and in PPO's code for RLHF


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float = VALUE_CLIP) -> Tensor:
    """Half the squared error, values clipped to a band around the old ones as in PPO's code. All (N,)."""
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * torch.max((values - returns) ** 2, (clipped - returns) ** 2)


# ---------------------------------------------------------------- algorithms


@dataclass
class Batch:
    """What an algorithm makes advantages of: B episodes of up to L trained tokens, packed to the left."""

    rewards: Tensor  # (B,) float64
    groups: list[Tensor]  # places of each prompt's episodes, without those whose search failed
    mask: Tensor  # (B, L): 1 where an episode has a token
    kl: Tensor | None = None  # (B, L): log pi - log ref; with the KL in the reward only
    values: Tensor | None = None  # (B, L): the critic's
    whiten: Callable[[Tensor], Tensor] | None = None  # over the policy tokens of all ranks

    def by_group(self, advantage: Callable[[Tensor], Tensor]) -> Tensor:
        """advantage((1, G)) -> (1, G) of every group that can be compared, as (B, 1); else 0."""
        found = torch.zeros_like(self.rewards)
        for group in self.groups:
            if len(group) > 1:
                found[group] = advantage(self.rewards[group][None])[0]
        return found[:, None]


def reinforce(batch: Batch, s: "TrainSettings") -> tuple[Tensor, None]:
    """REINFORCE (Williams 1992): return minus a baseline. The paper subtracts none: with rewards in
    [0, 1] nothing is then ever pushed down."""
    if s.baseline == "none":
        return batch.rewards[:, None], None
    return batch.by_group(leave_one_out), None


def grpo(batch: Batch, s: "TrainSettings") -> tuple[Tensor, None]:
    return batch.by_group(lambda rewards: grpo_advantages(rewards, s.scale_rewards)), None


def ppo(batch: Batch, s: "TrainSettings") -> tuple[Tensor, Tensor]:
    rewards = token_rewards(batch.rewards.to(batch.kl), batch.kl, batch.mask, s.kl_coef)
    advantages, returns = gae(rewards, batch.values, batch.mask, s.gamma, s.gae_lambda)
    return batch.whiten(advantages), returns


def reinforce_plus_plus(batch: Batch, s: "TrainSettings") -> tuple[Tensor, None]:
    rewards = token_rewards(batch.rewards.to(batch.kl), batch.kl, batch.mask, s.kl_coef)
    return batch.whiten(discounted_returns(rewards, batch.mask, s.gamma)), None


@dataclass(frozen=True)
class Algorithm:
    """An entry of ALGORITHMS.

    advantages: (batch, settings) -> advantages, (B, L) or (B, 1), and returns (B, L) for a critic."""

    advantages: Callable[[Batch, "TrainSettings"], tuple[Tensor, Tensor | None]]
    critic: bool = False
    groups: bool = True  # compares the attempts at a prompt with each other
    kl: Literal["loss", "reward"] = "loss"  # where the KL to the reference is paid


# What --algorithm offers. GRPO's loss is averaged over all tokens of the batch (DAPO, eq. 8).
ALGORITHMS = {
    "reinforce": Algorithm(reinforce),
    "grpo": Algorithm(grpo),
    "ppo": Algorithm(ppo, critic=True, groups=False, kl="reward"),
    "reinforce++": Algorithm(reinforce_plus_plus, groups=False, kl="reward"),
}


# ---------------------------------------------------------------- settings of a run


@dataclass(frozen=True, kw_only=True)
class TrainSettings(SearchSettings, EpisodeSettings, CurriculumSettings):
    """Options of `train`. Defaults: the paper's hyper-parameters, with GRPO."""

    data: Path = option(help="Training questions: JSONL with id, question, golden_answers.")
    out: Path = option(help="Run folder; the policy goes to OUT/model.")
    model: str = option("smollm2", 'The policy: "smollm2" (embedded), a Hub id or a folder.')
    engine: str = option("simulator", "simulator: ZeroSearch; a real engine: Search-R1; none: R1.",
                         choices=ENGINES)
    top_k: int = option(5, "Documents that a search returns.", low=1)
    failed_searches: int = option(0, "Searches that may fail for good; their episodes are left out.",
                                  low=0, resumable=True)
    algorithm: str = option("grpo", "How advantages come of rewards.", choices=ALGORITHMS)
    reward: str = option("f1", "What is rewarded.", choices=REWARDS)
    prompts_per_step: int = option(64, "Questions a step, over all processes.", low=1)
    rollouts: int = option(5, "Attempts at each question.", low=1)
    lr: float = option(1e-6, "Learning rate of the policy.", above=0)
    kl_coef: float = option(0.001, "Weight of the KL to the start model; 0 loads no reference.", low=0)
    clip_low: float = option(0.2, "The ratio is clipped at 1 minus this.", low=0, high=1)
    clip_high: float = option(0.2, "The ratio is clipped at 1 plus this.", low=0)
    epochs: int = option(1, "Optimizer steps on each batch.", low=1)
    importance_cap: float = option(2.0, "Cap of the sampler correction; 0 turns it off.", low=0)
    baseline: str = option("leave-one-out", "REINFORCE: what is subtracted from the reward.",
                           choices=("leave-one-out", "none"))
    scale_rewards: bool = option(True, "GRPO: divide by the group's deviation.")
    critic: str | None = option(None, "PPO: the critic's backbone; by default the policy's model.")
    critic_lr: float = option(1e-5, "PPO: learning rate of the critic.", above=0)
    gamma: float = option(1.0, "PPO, REINFORCE++: discount of a token.", low=0, high=1)
    gae_lambda: float = option(1.0, "PPO: decay of the advantage estimate.", low=0, high=1)
    mask_documents: bool = option(True, "Train no token of a document (off: the paper's Table 7).")
    batch_tokens: int = option(4096, "Tokens a micro-batch; shared beginnings count once.", low=1)
    gradient_checkpointing: bool = option(False, "Less memory, more time.")
    save_every: int = option(50, "Steps between checkpoints.", low=1, resumable=True)
    logger: str | None = option(None, "Accelerate's tracker: tensorboard, wandb, trackio...", resumable=True)
    preset: str | None = option(None, "Values of data/presets.toml.", is_eager=True,
                                callback=preset_callback(ROOT / "data/presets.toml"),
                                resumable=True)
    show_config: bool = option(False, "Print the settings as JSON, and stop.", resumable=True)
    resume: bool = option(False, "Go on from the last checkpoint in OUT.", resumable=True)
    overwrite: bool = option(False, "Replace the run that --out holds.", resumable=True)

    def check(self) -> None:
        super().check()
        alone = self.algorithm == "reinforce" and self.baseline == "none"
        if self.rollouts == 1 and ALGORITHMS[self.algorithm].groups and not alone:
            raise UserError(f"{self.algorithm} compares the rollouts of a prompt with each other: "
                            "--rollouts 1 is too few")
        check_tracker(self.logger)


# ---------------------------------------------------------------- the update


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
    work: list[Pass] = field(default_factory=list)  # what was computed since it was last cleared

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
        value = torch.as_tensor(value, dtype=torch.float64, device=self.accelerator.device)
        return self.accelerator.reduce(value).item()

    def moments(self, values: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation over the (masked) entries of all ranks."""
        mask = torch.ones_like(values) if mask is None else mask
        count = self.total(mask.sum())
        mean = self.total((values * mask).sum()) / count
        variance = self.total(((values - mean) ** 2 * mask).sum()) / max(count - 1, 1)
        return values.new_tensor(mean), values.new_tensor(math.sqrt(variance))


def make_trainer(accelerator: Accelerator, s: TrainSettings) -> Trainer:
    """Policy, critic and reference on the device; float32 master weights, bfloat16 arithmetic."""

    def prepare(module: nn.Module, lr: float):
        adam = torch.optim.AdamW(module.parameters(), lr=lr, weight_decay=0.0, fused=True)
        return accelerator.prepare(module, adam)

    policy = TokenScorer(load_trained(s.model, s.gradient_checkpointing))
    trainer = Trainer(accelerator, *prepare(policy, s.lr))
    if ALGORITHMS[s.algorithm].critic:
        critic = Critic(load_trained(s.critic or s.model, s.gradient_checkpointing))
        trainer.critic, trainer.critic_optimizer = prepare(critic, s.critic_lr)
    if s.kl_coef > 0:
        reference = TokenScorer(load_model(s.model)).requires_grad_(False)
        trainer.reference = prepare_reference(accelerator, reference)
    return trainer


@dataclass
class Targets:
    """What the update aims at, one tensor (L_i,) an episode."""

    advantages: list[Tensor]
    sampler: list[Tensor]  # log-probs of the sampler; NaN at document tokens, which it never sampled
    old: list[Tensor] | None = None  # log-probs before the step; None: the first pass gives them
    reference: list[Tensor] | None = None
    values: list[Tensor] | None = None
    returns: list[Tensor] | None = None


def estimate_targets(trainer: Trainer, s: TrainSettings, episodes: list[Episode],
                     sequences: list[Sequence]) -> Targets:
    """Advantages of every trained token, with the passes through the models that they need."""
    algorithm, device = ALGORITHMS[s.algorithm], trainer.accelerator.device
    targets = Targets([], [torch.tensor(sampler_logprobs(*pair), device=device)
                           for pair in zip(episodes, sequences)])
    batch = Batch(rewards=torch.tensor([e.reward for e in episodes], dtype=torch.float64),
                  groups=played_groups(episodes, s.rollouts), mask=policy_columns(targets.sampler))
    if trainer.reference is not None:
        targets.reference = trainer.evaluate(trainer.reference, sequences, s.batch_tokens,
                                             temperature=s.temperature)
    # In a single epoch the policy is still the one that sampled: the update's own pass gives `old`.
    if algorithm.kl == "reward" or s.epochs > 1:
        targets.old = trainer.evaluate(trainer.policy, sequences, s.batch_tokens,
                                       temperature=s.temperature)
    if algorithm.kl == "reward":
        pairs = zip(targets.old, targets.reference or targets.old)
        batch.kl = pad_sequence([old - reference for old, reference in pairs], True)
        batch.whiten = lambda values: whiten(values, *trainer.moments(values, batch.mask), batch.mask)
    if algorithm.critic:
        targets.values = trainer.evaluate(trainer.critic, sequences, s.batch_tokens)
        batch.values = pad_sequence(targets.values, True)
    advantages, returns = algorithm.advantages(batch, s)
    targets.advantages = unpad(advantages.to(batch.mask).expand_as(batch.mask), targets.sampler)
    targets.returns = None if returns is None else unpad(returns, targets.sampler)
    return targets


def sampler_logprobs(episode: Episode, sequence: Sequence) -> list[float]:
    columns = zip(episode.logprobs, episode.mask, sequence.mask)
    return [logprob if sampled else math.nan for logprob, sampled, trained in columns if trained]


def played_groups(episodes: list[Episode], size: int) -> list[Tensor]:
    """The places of each prompt's episodes, less those whose search failed."""
    played = torch.tensor([e.end != "failed" for e in episodes])
    return [group[played[group]] for group in torch.arange(len(episodes)).split(size)]


def policy_columns(ragged: list[Tensor]) -> Tensor:
    """1 where the padded matrix of these tensors holds an entry. (B, L)."""
    return pad_sequence([torch.ones_like(x) for x in ragged], batch_first=True)


def unpad(matrix: Tensor, like: list[Tensor]) -> list[Tensor]:
    return [row[: len(x)] for row, x in zip(matrix, like)]


def update(trainer: Trainer, s: TrainSettings, episodes: list[Episode], clock: Callable) -> dict[str, float]:
    """One step's optimisation. Every trained token of the global batch weighs the same."""
    sequences = [Sequence(e.ids, e.trained_mask(s.mask_documents)) for e in episodes]
    with clock("reference"):
        targets = estimate_targets(trainer, s, episodes, sequences)
    tokens = trainer.total(sum(sum(q.mask[1:]) for q in sequences))
    with clock("update"):
        for epoch in range(s.epochs):
            sums = train_epoch(trainer, s, sequences, targets, tokens)
            if epoch == 0:
                first = sums
                trainer.commit()
            sums["grad_norm"] = follow_gradient(trainer, sums)
    return update_metrics(trainer, targets, tokens, first, sums)


def train_epoch(trainer: Trainer, s: TrainSettings, sequences: list[Sequence], targets: Targets,
                tokens: float) -> dict[str, Any]:
    """One pass over the batch, which leaves its gradient. Returns sums over this rank's tokens."""
    accelerator = trainer.accelerator
    kl_in_loss = trainer.reference is not None and ALGORITHMS[s.algorithm].kl == "loss"
    # Zero advantage, zero gradient: left out, unless a KL or a critic learns from these tokens too.
    everything = kl_in_loss or trainer.critic is not None
    trained = [i for i, a in enumerate(targets.advantages) if everything or a.any()]
    sums = dict.fromkeys(("policy", "kl", "entropy", "clipped", "gap", "value", "scored"), 0.0)
    for part in same_count(accelerator, micro_batches([sequences[i] for i in trained], s.batch_tokens)):
        if not part:
            idle_backward(trainer)
            continue
        part = [trained[i] for i in part]
        batch = [sequences[i] for i in part]
        ids, mask = collate(batch, accelerator.device)

        def flat(per_episode: list[Tensor], part: list[int] = part) -> Tensor:
            return torch.cat([per_episode[i] for i in part])  # (N,), in the scorer's order

        logprobs, entropies = trainer.policy(ids, mask, temperature=s.temperature)
        old = flat(targets.old) if targets.old else logprobs.detach()
        sampler = flat(targets.sampler)
        sampler = torch.where(sampler.isnan(), old, sampler)
        weights = importance_weights(old, sampler, s.importance_cap) if s.importance_cap else torch.ones_like(old)
        advantages = flat(targets.advantages)
        losses, clipped = policy_loss(logprobs, old, advantages, s.clip_low, s.clip_high, weights)
        objective = losses
        if targets.reference is not None:
            kl = kl_k3(logprobs, flat(targets.reference))
            sums["kl"] += kl.detach().sum()
            objective = losses + s.kl_coef * kl if kl_in_loss else losses
        backward_mean(accelerator, objective, tokens)
        if trainer.critic is not None:
            values = trainer.critic(ids, mask)
            value_losses = value_loss(values, flat(targets.values), flat(targets.returns))
            backward_mean(accelerator, value_losses, tokens)
            sums["value"] += value_losses.detach().sum()
            trainer.work.append(Pass(trainer.critic, batch, 6))
        trainer.work.append(Pass(trainer.policy, batch, 6))
        sums["policy"] += losses.detach().sum()
        sums["entropy"] += entropies.detach().sum()
        sums["clipped"] += clipped.sum()
        sums["gap"] += (old - sampler).abs().sum()
        sums["scored"] += float(len(logprobs))
    return sums


def backward_mean(accelerator: Accelerator, losses: Tensor, tokens: float) -> None:
    """Add the gradient of the losses' mean over the `tokens` of all ranks, whose gradients are averaged."""
    accelerator.backward(losses.sum() * accelerator.num_processes / tokens)


def follow_gradient(trainer: Trainer, sums: dict[str, Any]) -> float:
    """One optimizer step, the gradient's norm clipped at 1. Returns the policy's norm before that."""
    models = [model for model in (trainer.policy, trainer.critic) if model is not None]
    norms = [float(whole(trainer.accelerator.clip_grad_norm_(m.parameters(), 1.0))) for m in models]
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


def update_metrics(trainer: Trainer, targets: Targets, tokens: float, first: dict[str, Any],
                   last: dict[str, Any]) -> dict[str, float]:
    """Metrics of a step from the sums of its first epoch and of its last."""
    scored = max(trainer.total(first["scored"]), 1.0)
    metrics = {
        "loss/policy": trainer.total(last["policy"]) / tokens,
        "loss/entropy": trainer.total(first["entropy"]) / scored,
        "loss/clip_fraction": trainer.total(last["clipped"]) / scored,
        "loss/logprob_gap": trainer.total(first["gap"]) / scored,
        "loss/grad_norm": last["grad_norm"],
        "loss/advantage_std": trainer.moments(torch.cat(targets.advantages))[1].item(),
        "tokens/trained": scored,
    }
    if trainer.reference is not None:
        metrics["loss/kl"] = trainer.total(first["kl"]) / scored
    if trainer.critic is not None:
        returns, values = torch.cat(targets.returns), torch.cat(targets.values)
        metrics["loss/value"] = trainer.total(first["value"]) / tokens
        error, spread = (trainer.moments(x)[1].item() for x in (returns - values, returns))
        metrics["loss/explained_variance"] = 1 - (error / max(spread, 1e-8)) ** 2
    return metrics


# ---------------------------------------------------------------- metrics


def rollout_metrics(episodes: list[Episode], group_size: int) -> dict[str, float]:
    """Rewards and their parts, searches, tokens and cost counters of a step's episodes."""
    scored = [e for e in episodes if e.end != "failed"]
    groups = [[episodes[i].reward for i in group.tolist()] for group in played_groups(episodes, group_size)]
    rewards = torch.tensor([e.reward for e in scored], dtype=torch.float64)
    turns = [turn for e in episodes for turn in e.turns]
    searches = [turn for turn in turns if turn.query is not None]
    return {
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
    }


def mean(values) -> float:
    values = [float(v) for v in values]
    return sum(values) / len(values) if values else 0.0


def collapse_warning(metrics: dict[str, float]) -> str | None:
    """A sentence if the policy is falling apart, else None."""
    if metrics["reward/answered"] < 0.05:
        return ("almost no episode answers: a policy that can't follow the template needs `warmup` "
                "first, or a lower --lr")
    if metrics["loss/entropy"] < 0.005 and metrics["tokens/trained"] > 1:
        return "the policy's entropy is almost 0: it tries nothing new and will learn nothing more"
    return None


# ---------------------------------------------------------------- warmup, schedule


@dataclass(frozen=True, kw_only=True)
class WarmupSettings(TuningSettings):
    trajectories: Path = argument("predictions.jsonl with whole trajectories to imitate.")
    lr: float = option(1e-4, "Peak learning rate.", above=0)
    top_k: int = option(3, "Documents of a search that are read.", low=1)


@command(app, WarmupSettings)
def warmup(s: WarmupSettings) -> None:
    """Teach a small model the template, by imitation. Loss on the policy's own tokens only.

    Not part of the paper: its models follow the template when asked to. The embedded one does not."""
    records = read_jsonl(s.trajectories, required=("id", "question", "golden_answers", "turns"))
    prompts, tokenizer = load_prompts(s.prompts), load_tokenizer(s.model)
    sequences = [replay(record, tokenizer, prompts, s.top_k) for record in records]
    fine_tune(load_model(s.model), tokenizer, sequences, s)


def replay(record: dict[str, Any], tokenizer, prompts: Prompts, top_k: int) -> Sequence:
    """A recorded trajectory as the ids that a rollout would have made, had no action been invalid."""
    episode = new_episode(record, 0, tokenizer, prompts)
    for turn in record["turns"]:
        ids = encode(tokenizer, turn["text"])
        episode.write(ids, [0.0] * len(ids))
        if turn.get("query"):
            documents = turn["documents"][:top_k]
            episode.read(observation_ids(tokenizer, documents, EpisodeSettings.observation_tokens))
    return Sequence(episode.ids, episode.mask)


@dataclass(frozen=True, kw_only=True)
class ScheduleSettings(CurriculumSettings):
    as_json: bool = option(False, "Print a list of the p of each step.", name="json")


@command(app, ScheduleSettings)
def schedule(s: ScheduleSettings) -> None:
    """Print the curriculum: the share of noisy searches at each step."""
    noise = [CURRICULA[s.curriculum](i, s) for i in range(s.steps)]
    if s.as_json:
        print(json.dumps(noise))
        return
    for i in sorted({round(i * (s.steps - 1) / 20) for i in range(21)}):
        Console().print(f"step {i:>5}   p {noise[i]:.4f}   {'█' * round(60 * noise[i])}", highlight=False)


# ---------------------------------------------------------------- train


@dataclass
class Run:
    """A training run: what its steps work with, and what they have counted."""

    s: TrainSettings
    rows: list[dict[str, Any]]
    setup: Setup
    trainer: Trainer
    checkpoints: Checkpoints
    peak: float  # FLOP/s of all devices, measured
    searches: int = 0
    failed: int = 0

    @property
    def policy(self) -> nn.Module:
        """The policy that is trained, as a Hugging Face model."""
        return self.trainer.accelerator.unwrap_model(self.trainer.policy).model


@command(app, TrainSettings)
def train(s: TrainSettings) -> None:
    """Reinforcement learning of the policy against a search engine. Defaults: the paper's."""
    run, start = prepare(s)
    with run.checkpoints.stoppable(start), progress_bar() as bar:
        task = bar.add_task(s.algorithm, total=s.steps, completed=start, info="")
        for step in range(start, s.steps):
            clock = PhaseClock()
            episodes = collect(run, step, clock)
            losses = learn(run, step, episodes, clock)
            metrics = record(run, step, episodes, losses | clock.metrics())
            bar.update(task, advance=1, info=f"reward {metrics['reward/mean']:.2f}  "
                       f"noise {metrics['noise/p']:.2f}  "
                       f"API bill saved ${costs.search_bill(run.searches):.2f}")
    save_model(run.policy, run.setup.tokenizer, s.out / "model")
    run.checkpoints.end(f"policy saved: {s.out / 'model'}")


def prepare(s: TrainSettings) -> tuple[Run, int]:
    """Load everything, and open the run folder; the step to begin with."""
    rows = read_questions(s.data)
    if len(rows) < s.prompts_per_step:
        raise UserError(f"{s.data}: {len(rows)} questions are too few for "
                        f"{s.prompts_per_step} prompts a step")
    accelerator = make_accelerator(log_with=s.logger, project_dir=s.out)
    processes = accelerator.num_processes
    if s.prompts_per_step % processes:
        raise UserError(f"--prompts-per-step {s.prompts_per_step} can't be divided over {processes} processes")
    start = find_checkpoint(s.out, s) if s.resume else None
    load_tokenizer(s.model)  # a name that stands for no model must not cost an old run its folder
    prompts = load_prompts(s.prompts)
    if start is None and accelerator.is_main_process:
        open_run(s.out, s.record(), s.overwrite)
    accelerator.wait_for_everyone()
    peak = peak_flops(accelerator.device) * processes
    transformers.set_seed(s.seed)

    generator = load_generator(s.model, s.generator)
    console.print(f"generation: {generator.name}")
    trainer = make_trainer(accelerator, s)
    setup = Setup(generator, ENGINES[s.engine].make(s), prompts, s, s.seed)
    checkpoints = Checkpoints(accelerator, s.out, s.save_every)
    run = Run(s, rows, setup, trainer, checkpoints, peak)
    before = checkpoints.go_on(start) if start is not None else []
    if start:
        generator.load_weights(named_weights(run.policy))
    run.searches = sum(row["cost/searches"] for row in before)
    run.failed = sum(row["search/failed"] for row in before)
    if s.logger:
        values = {n: v if isinstance(v, int | float) else str(v) for n, v in s.record().items()}
        accelerator.init_trackers("zerosearch", values)
    trainer.commit = checkpoints.agree  # from there on a signal waits for the end of the step
    return run, start or 0


def collect(run: Run, step: int, clock: PhaseClock) -> list[Episode]:
    """Play and score this step's episodes; returns those of all ranks."""
    s, setup, accelerator = run.s, run.setup, run.trainer.accelerator
    mine = step_questions(run.rows, step, s)[accelerator.process_index :: accelerator.num_processes]
    episodes = [new_episode(row, sample, setup.tokenizer, setup.prompts, setup.engine is not None)
                for row in mine for sample in range(s.rollouts)]
    with run.checkpoints.droppable():
        rollout(episodes, setup, noise=CURRICULA[s.curriculum](step, s), step=step, clock=clock)
    for idle in (setup.generator, getattr(setup.engine, "generator", None)):
        if idle:
            idle.sleep()  # its memory is the update's for a while
    for episode in episodes:
        if episode.end != "failed":
            score(episode, s.reward)
    everyone = gather_object(episodes)
    check_failures([e.error for e in everyone], run.failed, s.failed_searches)
    return everyone


def learn(run: Run, step: int, episodes: list[Episode], clock: PhaseClock) -> dict[str, float]:
    """One update from the episodes of all ranks; the sampler gets the new weights."""
    s, accelerator = run.s, run.trainer.accelerator
    shares = balance_over_ranks(episodes, s.rollouts, accelerator.num_processes)
    try:
        losses = update(run.trainer, s, shares[accelerator.process_index], clock)
    except FloatingPointError as error:
        kept = s.out / "nonfinite.jsonl"
        if accelerator.is_main_process:
            append_jsonl(kept, [e.record() for e in episodes])
        raise UserError(f"step {step}: {error}; its episodes are in {kept}") from None
    with clock("sync"):
        run.setup.generator.load_weights(named_weights(run.policy))
    return losses


def record(run: Run, step: int, episodes: list[Episode], measured: dict[str, float]) -> dict[str, float]:
    """Write the step's line of metrics and its episodes, and a checkpoint if one is due."""
    s, accelerator = run.s, run.trainer.accelerator
    noise = CURRICULA[s.curriculum](step, s)
    metrics = {"step": step, "noise/p": noise} | rollout_metrics(episodes, s.rollouts) | measured
    metrics |= rates(run.trainer, metrics, run.peak)
    run.searches += metrics["cost/searches"]
    run.failed += metrics["search/failed"]
    if accelerator.is_main_process:
        append_jsonl(s.out / "episodes.jsonl", [{"step": step} | e.record() for e in episodes])
        append_jsonl(s.out / "metrics.jsonl", [metrics])
        if warning := collapse_warning(metrics):
            console.print(f"step {step}: {warning}", style="yellow")
    accelerator.log(metrics, step=step)
    run.checkpoints.step_done(step + 1, of=s.steps)
    return metrics


def step_questions(rows: list[dict[str, Any]], step: int, s: TrainSettings) -> list[dict[str, Any]]:
    """The questions of a step: the data in an order drawn anew each epoch, by seed and step alone."""
    per_epoch = len(rows) // s.prompts_per_step
    epoch, place = divmod(step, per_epoch)
    order = random.Random(draw_seed("data", s.seed, epoch)).sample(range(len(rows)), len(rows))
    return [rows[i] for i in order[place * s.prompts_per_step : (place + 1) * s.prompts_per_step]]


def balance_over_ranks(episodes: list[Episode], group_size: int, ranks: int) -> list[list[Episode]]:
    """Whole groups for each rank, longest first, to the rank that has the fewest tokens so far."""
    groups = [episodes[i : i + group_size] for i in range(0, len(episodes), group_size)]
    tokens = {id(group): sum(len(e.ids) for e in group) for group in groups}
    shares: list[list[list[Episode]]] = [[] for _ in range(ranks)]
    for group in sorted(groups, key=lambda group: -tokens[id(group)]):
        min(shares, key=lambda share: sum(tokens[id(group)] for group in share)).append(group)
    return [[episode for group in share for episode in group] for share in shares]


if __name__ == "__main__":
    run_cli(app)

"""Generation with Transformers, and the interface of all generation engines.

transformers.generate and its continuous batching lack a seed per row and stop strings per row."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache

import plumbing.attention  # noqa: F401 (registers "decoding")
from plumbing.cli import UserError, first_line
from plumbing.scorer import CANT_RUN, PROBE, alone, find_attention

States = list[tuple[Tensor, Tensor]]  # keys and values of a row by layer: (H_kv, S, D) each


@dataclass(frozen=True)
class Sampling:
    """How to generate. Temperature 0 is greedy; a stop string that ends a text is part of it."""

    max_tokens: int
    temperature: float = 1.0
    stop: tuple[str, ...] = ()


@dataclass
class Generation:
    """Sampled token ids, their log-probs under the sampling distribution, and the stop reason.

    error: why a server failed for good; there are no ids."""

    ids: list[int]
    logprobs: list[float]
    stop_reason: Literal["stop", "eos", "length", "failed"]
    error: str | None = None


class Generator(Protocol):
    """The interface of a generation engine: token ids in; ids, log-probs and stop reason out."""

    name: str  # hf, vllm or server
    tokenizer: Any
    concurrent: bool  # whether many threads may call `generate` at once

    def generate(self, prompts: list[list[int]], sampling: Sampling,
                 seeds: list[int]) -> list[Generation]: ...

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None: ...

    def sleep(self) -> None:
        """Free as much memory as possible until the next call."""


def sample_tokens(logits: Tensor, temperature: float, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """One token per row. logits (B, V), uniforms (B,) in [0, 1) -> ids (B,), log-probs (B,).

    Inverse-transform sampling with a number drawn for this row: a row's token doesn't depend on the
    other rows of its batch. No top-p or top-k: the policy is trained on this same distribution."""
    logprobs = (logits.float() / (temperature or 1.0)).log_softmax(-1)  # (B, V)
    if temperature == 0:
        ids = logprobs.argmax(-1)
    else:
        cumulative = logprobs.exp().cumsum(-1)
        threshold = uniforms[:, None] * cumulative[:, -1:]
        ids = torch.searchsorted(cumulative, threshold, right=True).squeeze(-1)
        ids = ids.clamp(max=logits.shape[-1] - 1)
    return ids, logprobs.gather(-1, ids[:, None]).squeeze(-1)


class HFGenerator:
    """Generation with Transformers: reproducible, with rows in lockstep and in fixed order.

    Keys and values of finished rows are kept until the next call: a prompt that continues one (the
    next turn of an episode) computes its new tokens only. Raises UserError for a model that can't
    be decoded so."""

    name = "hf"
    concurrent = False

    def __init__(self, model, tokenizer, batch_size: int = 64):
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size
        check_decoding(model)
        self.kept: dict[tuple[int, ...], States] = {}  # by token ids

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Copy new weights in and drop the keys and values of the old ones."""
        own = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, tensor in weights:
                own[name].copy_(tensor)
        self.sleep()

    def sleep(self) -> None:
        """Free the kept keys and values: gigabytes that the update can use."""
        self.kept.clear()

    def generate(self, prompts: list[list[int]], sampling: Sampling,
                 seeds: list[int]) -> list[Generation]:
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # for little padding
        results: list[Generation | None] = [None] * len(prompts)
        kept, self.kept = self.kept, {}
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            batch = DecodingBatch(self.model, [prompts[i] for i in rows], kept)
            generations = self._decode(batch, sampling, [seeds[i] for i in rows])
            for i, generation in zip(rows, generations, strict=True):
                results[i] = generation
            self.kept |= batch.finished
        return results

    @torch.inference_mode()
    def _decode(self, batch: "DecodingBatch", sampling: Sampling,
                seeds: list[int]) -> list[Generation]:
        results = [Generation([], [], "length") for _ in seeds]
        # float32 for every model: bfloat16 would round some draws to 1, outside [0, 1).
        draws = [np.random.default_rng(seed).random(sampling.max_tokens, dtype=np.float32)
                 for seed in seeds]
        uniforms = torch.tensor(np.stack(draws), device=batch.mask.device)  # (B, max_tokens)
        rows = list(range(len(seeds)))  # row of the results at each place of the batch
        active = set(rows)
        logits = batch.prefill()
        for step in range(sampling.max_tokens):
            ids, logprobs = sample_tokens(logits, sampling.temperature, uniforms[rows, step])
            tokens = zip(rows, ids.tolist(), logprobs.tolist(), strict=True)
            for place, (row, token, logprob) in enumerate(tokens):
                if row not in active:
                    continue
                results[row].ids.append(token)
                results[row].logprobs.append(logprob)
                if reason := self._stop_reason(results[row].ids, sampling.stop):
                    results[row].stop_reason = reason
                    active.remove(row)
                    batch.set_aside(place)
            places = [place for place, row in enumerate(rows) if row in active]
            if not active or step + 1 == sampling.max_tokens:
                for place in places:
                    batch.set_aside(place)
                break
            if len(active) <= len(rows) // 2:  # balances wasted decoding with moving the cache
                batch.select(places)
                rows, ids = [rows[place] for place in places], ids[places]
            logits = batch.forward(ids[:, None].tolist())
        return results

    def _stop_reason(self, ids: list[int], stop: tuple[str, ...]) -> str | None:
        if ids[-1] == self.tokenizer.eos_token_id:
            return "eos"
        tail = self.tokenizer.decode(ids[-12:]) if stop else ""  # stop strings are shorter
        return "stop" if any(s in tail for s in stop) else None


class DecodingBatch:
    """The key-value cache of one batch, with S columns.

    Rows are padded on the left only, so that two tokens of a row are as many columns apart as
    positions: what an attention window counts. `mask` (B, S) marks the tokens."""

    def __init__(self, model, prompts: list[list[int]], kept: dict[tuple[int, ...], States]):
        self.model, self.prompts = model, prompts
        self.parents = [longest_prefix(prompt, kept) for prompt in prompts]
        self.states = [kept.get(parent) for parent in self.parents]
        self.finished: dict[tuple[int, ...], States] = {}
        self._start([[]])

    def _start(self, rows: list[list[int]], states: Iterable[States] = ()) -> None:
        """Begin with rows whose keys and values are known."""
        longest = max(map(len, rows))
        pads = [longest - len(row) for row in rows]
        mask = [[0] * pad + [1] * len(row) for pad, row in zip(pads, rows)]
        self.mask = torch.tensor(mask, dtype=torch.long, device=self.model.device)
        self.rows, self.cache = [list(row) for row in rows], DynamicCache()
        for layer, pairs in enumerate(zip(*states) if longest else ()):
            self.cache.update(*(torch.stack([
                nn.functional.pad(pair[i][:, : len(row)], (0, 0, pad, 0))
                for pair, row, pad in zip(pairs, rows, pads)]) for i in (0, 1)), layer)

    def prefill(self) -> Tensor:
        """Compute the tokens of the prompts that are not cached -> next token's logits (B, V).

        Without kept rows, the prefix of all prompts is computed once, and so are equal prompts."""
        if all(self.parents):
            return self._go_on(self.prompts, self.parents, self.states)
        unique = list(dict.fromkeys(map(tuple, self.prompts)))
        shared = os.path.commonprefix([prompt[:-1] for prompt in unique])
        if shared:
            self.forward([list(shared)])
            self.set_aside(0)
        parents, states = [shared] * len(unique), [self.finished.pop(shared, None)] * len(unique)
        logits = self._go_on(unique, parents, states)
        places = [unique.index(tuple(prompt)) for prompt in self.prompts]
        self.select(places)
        return logits[places]

    def _go_on(self, prompts: list, parents: list[tuple[int, ...]],
               states: list[States | None]) -> Tensor:
        """The rest of the prompts after their parents, whose states are known.

        Computes as many tokens in each row, in a shorter rest the parent's last ones too: padding
        between parent and rest would cost as much."""
        width = max(len(prompt) - len(parent) for prompt, parent in zip(prompts, parents))
        known = [list(prompt[: max(0, len(prompt) - width)]) for prompt in prompts]
        self._start(known, states if any(known) else ())
        return self.forward([list(prompt[len(row) :]) for prompt, row in zip(prompts, known)])

    def forward(self, new: list[list[int]]) -> Tensor:
        """Append new tokens to every row, as many to each with cached ones -> next logits (B, V).
        """
        width, device = max(map(len, new)), self.model.device
        pads = [[0] * (width - len(row)) for row in new]
        ids = torch.tensor([pad + row for pad, row in zip(pads, new)], device=device)  # (B, width)
        real = torch.tensor([pad + [1] * len(row) for pad, row in zip(pads, new)], device=device)
        self.mask = torch.cat([self.mask, real], dim=1)
        positions = (self.mask.cumsum(1) - 1).clamp(min=0)[:, -width:]
        for row, tokens in zip(self.rows, new, strict=True):
            row.extend(tokens)
        out = self.model(input_ids=ids, attention_mask=self.mask, position_ids=positions,
                         past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1]

    def set_aside(self, place: int) -> None:
        """Keep the keys and values of a finished row, without padding."""
        columns = self.mask[place].nonzero().squeeze(-1)
        self.finished[tuple(self.rows[place])] = [
            (layer.keys[place][:, columns], layer.values[place][:, columns])
            for layer in self.cache.layers]

    def select(self, places: list[int]) -> None:
        """Make the rows at `places` the batch; a place may occur several times."""
        if self.cache.get_seq_length():
            self.cache.batch_select_indices(torch.tensor(places, device=self.mask.device))
        self.rows, self.mask = [list(self.rows[p]) for p in places], self.mask[places]


def check_decoding(model) -> None:
    """Set the attention with which DecodingBatch gives what a plain pass over each row gives: ours,
    or else the architecture's own. Raises UserError if neither does, as of a model with states
    other than keys and values."""
    def plain() -> Tensor:
        short, long = alone(model, model, "logits")
        return torch.stack([long[-1], short[2]])

    try:
        find_attention(model, "decoding", ("decoding", "eager"), plain,
                       lambda way: decoded(model, *PROBE))
    except CANT_RUN as error:
        raise UserError(f"{type(model).__name__} can't be sampled with --generator hf: "
                        f"{first_line(error)}; use vLLM (--generator vllm, or its server)"
                        ) from None


def decoded(model, short: list[int], long: list[int]) -> Tensor:
    """Logits after a long row and after 3 tokens of a short one, in the steps of a generation: the
    shared beginning, the rest of ragged prompts, one more token after the padded one."""
    batch = DecodingBatch(model, [short[:2], long], {})
    after_long = batch.prefill()[1]
    batch.select([0])
    return torch.stack([after_long, batch.forward([short[2:3]])[0]])


def longest_prefix(prompt: list[int], kept: Iterable[tuple[int, ...]]) -> tuple[int, ...]:
    """The longest kept row that the prompt continues by at least one token, or ()."""
    parents = (row for row in kept if len(row) < len(prompt) and tuple(prompt[: len(row)]) == row)
    return max(parents, key=len, default=())

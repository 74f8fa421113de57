"""Generation with Transformers, and the interface that every generation engine offers.

Transformers' own `generate` has no seed and no stop string for a row; its continuous batching neither."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache

import plumbing.attention  # noqa: F401 (registers "decoding")


@dataclass(frozen=True)
class Sampling:
    """How to generate: temperature 0 is greedy; generation ends after a stop string, which stays in the ids."""

    max_tokens: int
    temperature: float = 1.0
    stop: tuple[str, ...] = ()


@dataclass
class Generation:
    """Sampled token ids, their log-probabilities under the sampling distribution, and why sampling ended."""

    ids: list[int]
    logprobs: list[float]
    stop_reason: Literal["stop", "eos", "length"]


class Generator(Protocol):
    """Token ids in; token ids, log-probs and stop reason out. What every generation engine offers."""

    name: str  # hf, vllm or server
    tokenizer: Any
    concurrent: bool  # whether many threads may call `generate` at once

    def generate(self, prompts: list[list[int]], sampling: Sampling, seeds: list[int]) -> list[Generation]: ...

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None: ...

    def sleep(self) -> None:
        """Give back what memory it can until the next call."""


def sample_tokens(logits: Tensor, temperature: float, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """One token a row. logits (B, V), uniforms (B,) in [0, 1) -> ids (B,), log-probs (B,).

    Sampling inverts the cumulative distribution at a number drawn beforehand for this row, so that a row's
    token doesn't depend on which rows share its batch. No top-p, no top-k: the distribution that is sampled
    is the one that is trained."""
    logprobs = (logits.float() / (temperature or 1.0)).log_softmax(-1)  # (B, V)
    if temperature == 0:
        ids = logprobs.argmax(-1)
    else:
        cumulative = logprobs.exp().cumsum(-1)
        threshold = uniforms[:, None] * cumulative[:, -1:]
        ids = torch.searchsorted(cumulative, threshold, right=True).squeeze(-1).clamp(max=logits.shape[-1] - 1)
    return ids, logprobs.gather(-1, ids[:, None]).squeeze(-1)


class HFGenerator:
    """Generation with Transformers: the reproducible engine. Rows advance in lockstep, in an order that is fixed.

    The keys and values of finished rows are kept until the next call: when a prompt continues one of them (the
    next turn of an episode), only its new tokens are computed."""

    name = "hf"
    concurrent = False

    def __init__(self, model, tokenizer, batch_size: int = 64):
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size
        self.model.set_attn_implementation("decoding")
        self.kept: dict[tuple[int, ...], list[tuple[Tensor, Tensor]]] = {}  # ids -> (H_kv, S, D) x 2 a layer

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Copy new weights in; what was computed with the old ones is forgotten."""
        own = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, tensor in weights:
                own[name].copy_(tensor)
        self.sleep()

    def sleep(self) -> None:
        """Free the keys and values that are kept: gigabytes, which the update can use."""
        self.kept.clear()

    def generate(self, prompts: list[list[int]], sampling: Sampling, seeds: list[int]) -> list[Generation]:
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # little padding; ties keep their order
        results: list[Generation | None] = [None] * len(prompts)
        kept, self.kept = self.kept, {}
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            batch = DecodingBatch(self.model, [prompts[i] for i in rows], kept)
            for i, generation in zip(rows, self._decode(batch, sampling, [seeds[i] for i in rows]), strict=True):
                results[i] = generation
            self.kept |= batch.finished
        return results

    @torch.inference_mode()
    def _decode(self, batch: "DecodingBatch", sampling: Sampling, seeds: list[int]) -> list[Generation]:
        results = [Generation([], [], "length") for _ in seeds]
        # float32, whatever the model's dtype: rounded to bfloat16 some would become 1, which is no draw from [0, 1).
        draws = [np.random.default_rng(seed).random(sampling.max_tokens, dtype=np.float32) for seed in seeds]
        uniforms = torch.tensor(np.stack(draws), device=batch.mask.device)  # (B, max_tokens)
        rows = list(range(len(seeds)))  # which row of the results stands at each place of the batch
        active = set(rows)
        logits = batch.prefill()
        for step in range(sampling.max_tokens):
            ids, logprobs = sample_tokens(logits, sampling.temperature, uniforms[rows, step])
            for place, (row, token, logprob) in enumerate(zip(rows, ids.tolist(), logprobs.tolist(), strict=True)):
                if row not in active:
                    continue
                results[row].ids.append(token)
                results[row].logprobs.append(logprob)
                if reason := self._stop_reason(results[row].ids, sampling.stop):
                    results[row].stop_reason = reason
                    active.remove(row)
                    batch.set_aside(place)
            if not active:
                break
            if step + 1 == sampling.max_tokens:
                for place, row in enumerate(rows):
                    if row in active:
                        batch.set_aside(place)
                break
            if len(active) <= len(rows) // 2:  # a finished row decodes on for nothing; moving the cache costs too
                places = [place for place, row in enumerate(rows) if row in active]
                batch.select(places)
                rows, ids = [rows[place] for place in places], ids[places]
            logits = batch.forward(ids[:, None].tolist())
        return results

    def _stop_reason(self, ids: list[int], stop: tuple[str, ...]) -> str | None:
        if ids[-1] == self.tokenizer.eos_token_id:
            return "eos"
        tail = self.tokenizer.decode(ids[-12:]) if stop else ""  # no stop string is longer than 12 tokens
        return "stop" if any(s in tail for s in stop) else None


class DecodingBatch:
    """The key-value cache of one batch: columns (S) are places, a row has tokens in some of them.

    New text of different lengths is padded on the left to one width, so padding ends up in the middle of rows too:
    `mask` marks it, and positions count real tokens alone."""

    def __init__(self, model, prompts: list[list[int]], kept: dict[tuple[int, ...], list[tuple[Tensor, Tensor]]]):
        self.model, self.prompts = model, prompts
        self.cache = DynamicCache()
        parents = [longest_prefix(prompt, kept) for prompt in prompts]
        self.rows = [list(parent) for parent in parents]  # ids whose keys and values are in the cache
        self.mask = torch.zeros(len(prompts), 0, dtype=torch.long, device=model.device)  # (B, S): 1 where a row has a token
        self.finished: dict[tuple[int, ...], list[tuple[Tensor, Tensor]]] = {}
        if all(parents):
            self._load([kept[parent] for parent in parents])

    def _load(self, states: list[list[tuple[Tensor, Tensor]]]) -> None:
        longest = max(len(row) for row in self.rows)
        pads = [longest - len(row) for row in self.rows]
        for layer in range(len(states[0])):
            pair = [torch.stack([nn.functional.pad(state[layer][i], (0, 0, pad, 0)) for state, pad in zip(states, pads)])
                    for i in (0, 1)]
            self.cache.update(*pair, layer)
        self.mask = torch.tensor([[0] * pad + [1] * (longest - pad) for pad in pads], device=self.model.device)

    def prefill(self) -> Tensor:
        """Feed what the cache lacks of the prompts; returns the next token's logits (B, V).

        Without kept rows, the beginning that all prompts share is fed once, and so are equal prompts."""
        if self.mask.shape[1]:
            return self.forward([prompt[len(row) :] for prompt, row in zip(self.prompts, self.rows, strict=True)])
        unique = list(dict.fromkeys(map(tuple, self.prompts)))
        shared = len(os.path.commonprefix([prompt[:-1] for prompt in unique]))
        self.rows, self.mask = [[]], self.mask[:1]
        if shared:
            self.forward([list(unique[0][:shared])])
        self.select([0] * len(unique))
        logits = self.forward([list(prompt[shared:]) for prompt in unique])
        places = [unique.index(tuple(prompt)) for prompt in self.prompts]
        self.select(places)
        return logits[places]

    def forward(self, new: list[list[int]]) -> Tensor:
        """Append new tokens to every row, left-padded to one width; returns the logits after the last (B, V)."""
        width = max(map(len, new))
        device = self.model.device
        ids = torch.tensor([[0] * (width - len(row)) + row for row in new], device=device)  # (B, width)
        real = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in new], device=device)
        self.mask = torch.cat([self.mask, real], dim=1)
        positions = (self.mask.cumsum(1) - 1).clamp(min=0)[:, -width:]
        for row, tokens in zip(self.rows, new, strict=True):
            row.extend(tokens)
        out = self.model(input_ids=ids, attention_mask=self.mask, position_ids=positions,
                         past_key_values=self.cache, use_cache=True, logits_to_keep=1)  # fmt: skip
        return out.logits[:, -1]

    def set_aside(self, place: int) -> None:
        """Remember the keys and values of a finished row, without the holes."""
        columns = self.mask[place].nonzero().squeeze(-1)
        self.finished[tuple(self.rows[place])] = [
            (layer.keys[place][:, columns], layer.values[place][:, columns]) for layer in self.cache.layers]  # fmt: skip

    def select(self, places: list[int]) -> None:
        """Make the rows at `places` the batch (a place may be named several times)."""
        if self.cache.get_seq_length():
            self.cache.batch_select_indices(torch.tensor(places, device=self.mask.device))
        self.rows, self.mask = [list(self.rows[p]) for p in places], self.mask[places]


def longest_prefix(prompt: list[int], kept: Iterable[tuple[int, ...]]) -> tuple[int, ...]:
    """The longest kept row that the prompt continues by at least one token; () if there is none."""
    candidates = (row for row in kept if len(row) < len(prompt) and tuple(prompt[: len(row)]) == row)
    return max(candidates, key=len, default=())

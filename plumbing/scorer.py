"""Scoring: log-probs and values of masked tokens only, over rows packed without padding.

Transformers' forward pass with labels computes logits (B, T, V), padding and shared prompts too."""

import os
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from plumbing.attention import attention_blocks


@dataclass
class Sequence:
    """Token ids with a mask: 1 for a token to train on, 0 for context."""

    ids: list[int]
    mask: list[int]


def packed_states(decoder, ids: Tensor, mask: Tensor) -> Tensor:
    """Last hidden states before the N masked tokens. ids, mask (B, T), `collate`'s -> (N, D).

    Rows share prefixes: the template, and in a group the question. A prefix shared with the row
    above is computed once and padding not at all: the decoder gets one row of P tokens, and only
    attention sees whole rows. A model that mixes tokens elsewhere (state-space) can't be packed."""
    real = ids >= 0
    alike = nn.functional.pad((ids[1:] == ids[:-1]).cumprod(1), (0, 0, 1, 0)).bool()  # (B, T)
    own = real & ~alike
    # Index of a token among the packed ones; a shared token has that of its owner above.
    places = torch.where(own, own.flatten().cumsum(0).view_as(ids) - 1, 0).cummax(0).values
    packed, positions = ids[own][None], own.nonzero()[:, 1][None]  # (1, P)
    unused = own.new_ones(1, 1, 1, 1)  # 4 dimensions: Transformers builds no (P, P) mask
    out = decoder(input_ids=packed, position_ids=positions, attention_mask=unused, use_cache=False,
                  layout=attention_blocks(own, real, places))
    return out.last_hidden_state[0, places[:, :-1][mask[:, 1:].bool()]]


class TokenScorer(nn.Module):
    """A causal language model that scores only the masked tokens of a batch.

    The head (V: 49k-152k) runs only at positions that predict a masked token, `chunk` at a time.
    Several chunks recompute their logits in the backward pass. There is no (B, T, V) tensor."""

    def __init__(self, model, chunk: int = 1024):
        super().__init__()
        self.model, self.chunk = model, chunk
        self.model.set_attn_implementation("packed")
        self._no_split_modules = model._no_split_modules  # FSDP reads the names of the layers here

    def forward(self, ids: Tensor, mask: Tensor,
                temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """ids, mask (B, T), of `collate` -> log-probs and entropies (N,) of the N masked tokens, in
        nats, in row order."""
        hidden = packed_states(self.model.get_decoder(), ids, mask)  # (N, D)
        targets = ids[:, 1:][mask[:, 1:].bool()]  # (N,)
        chunks = list(zip(hidden.split(self.chunk), targets.split(self.chunk)))
        if torch.is_grad_enabled() and len(chunks) > 1:
            scores = [checkpoint(self._score, h, t, temperature, use_reentrant=False)
                      for h, t in chunks]
        else:  # a single chunk fits in memory: no recomputation
            scores = [self._score(h, t, temperature) for h, t in chunks]
        logprobs, entropies = zip(*scores)
        return torch.cat(logprobs), torch.cat(entropies)

    def parts(self) -> tuple[nn.Module, nn.Module]:
        """Decoder and head."""
        return self.model.get_decoder(), self.model.get_output_embeddings()

    def _score(self, hidden: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        logits = self.model.get_output_embeddings()(hidden)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # (n, V)
        # A division by 1 is left out: every pass over the logits costs time.
        logprobs = (logits if temperature == 1 else logits / temperature).log_softmax(-1)
        with torch.no_grad():
            entropies = -(logprobs.exp() * logprobs).sum(-1)
        return logprobs.gather(-1, targets[:, None]).squeeze(-1), entropies


class Critic(nn.Module):
    """Value of each masked token: the expected return before it is sampled. A linear head."""

    def __init__(self, model):
        super().__init__()
        self._no_split_modules = model._no_split_modules  # as in TokenScorer
        model.set_attn_implementation("packed")
        self.decoder = model.get_decoder()
        self.head = nn.Linear(model.config.hidden_size, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """ids, mask (B, T), of `collate` -> values (N,) of the N masked tokens, in row order."""
        return self.head(packed_states(self.decoder, ids, mask)).squeeze(-1).float()

    def parts(self) -> tuple[nn.Module, nn.Module]:
        return self.decoder, self.head


def collate(sequences: list[Sequence], device: torch.device) -> tuple[Tensor, Tensor]:
    """ids (B, T), right-padded with -1, and mask (B, T), right-padded with 0. The first token of a
    row is never scored, because no token predicts it."""
    ids = pad_sequence([torch.tensor(s.ids) for s in sequences], batch_first=True, padding_value=-1)
    mask = pad_sequence([torch.tensor(s.mask) for s in sequences], batch_first=True)
    return ids.to(device), mask.to(device)


def own_tokens(sequence: Sequence, above: Sequence | None) -> int:
    """Number of tokens after the prefix shared with the sequence above."""
    shared = len(os.path.commonprefix([sequence.ids, above.ids])) if above else 0
    return len(sequence.ids) - shared


def micro_batches(sequences: list[Sequence], budget: int) -> list[list[int]]:
    """Indices of sequences in batches of up to `budget` tokens, sorted to make prefixes adjacent.

    Tokens shared with the sequence above in the batch are computed once and count once."""
    batches: list[list[int]] = []
    above, filled = None, 0
    for i in sorted(range(len(sequences)), key=lambda i: sequences[i].ids):
        filled += own_tokens(sequences[i], above)
        if above is None or filled > budget:
            batches.append([])
            filled = len(sequences[i].ids)
        batches[-1].append(i)
        above = sequences[i]
    return batches


def same_count(accelerator: Accelerator, parts: list[list[int]]) -> list[list[int]]:
    """This rank's micro-batches, with empty ones appended up to the largest number on any rank.

    Every backward pass synchronises the ranks, so all need the same number."""
    most = int(accelerator.gather(torch.tensor([len(parts)], device=accelerator.device)).max())
    return parts + [[]] * (most - len(parts))


NOTHING = Sequence([0, 0], [0, 1])  # the content of an empty micro-batch; its loss is times zero

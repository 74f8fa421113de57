"""Scoring: log-probs of chosen tokens only, over rows that are packed without padding."""

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
    """Token ids with a mask: 1 where the token is trained, 0 where it is only read."""

    ids: list[int]
    mask: list[int]


def packed_states(decoder, ids: Tensor, mask: Tensor) -> Tensor:
    """A decoder's last hidden states, from which the N masked tokens are told. ids, mask (B, T), as of `collate` -> (N, D).

    Rows begin alike: all with the template, those of a group with their question too. What a row shares with the row above it
    is computed once, and no padding is computed at all: the decoder sees one row of P tokens. Only attention looks at whole
    rows again (models whose tokens meet elsewhere, like state-space ones, can't be packed so)."""
    real = ids >= 0
    alike = nn.functional.pad((ids[1:] == ids[:-1]).cumprod(1), (0, 0, 1, 0)).bool()  # (B, T): as in all of the row above
    own = real & ~alike
    # A token's place among the packed ones; a shared token has that of the last row above which has it as its own.
    places = torch.where(own, own.flatten().cumsum(0).view_as(ids) - 1, 0).cummax(0).values  # (B, T)
    blocks, order = attention_blocks(own, real, places)
    packed, positions = ids[own][None], own.nonzero()[:, 1][None]  # (1, P)
    unused = own.new_ones(1, 1, 1, 1)  # of four dimensions it is taken as it is, and no mask of P x P is built
    out = decoder(input_ids=packed, position_ids=positions, attention_mask=unused, use_cache=False, blocks=blocks, order=order)
    return out.last_hidden_state[0, places[:, :-1][mask[:, 1:].bool()]]


class TokenScorer(nn.Module):
    """A causal language model that scores the masked tokens of a batch, and no others.

    The head is V wide (49k-152k): it runs only at the positions whose next token is asked for, a chunk at a time;
    with several chunks, their logits are computed again in the backward pass. No (B, T, V) tensor ever exists."""

    def __init__(self, model, chunk: int = 1024):
        super().__init__()
        self.model, self.chunk = model, chunk
        self.model.set_attn_implementation("packed")
        self._no_split_modules = model._no_split_modules  # FSDP shards layer by layer; it looks for their names here

    def forward(self, ids: Tensor, mask: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """ids, mask (B, T), as of `collate` -> log-probs and entropies (nats) of the N masked tokens, in row order: (N,)."""
        hidden = packed_states(self.model.get_decoder(), ids, mask)  # (N, D)
        targets = ids[:, 1:][mask[:, 1:].bool()]  # (N,)
        chunks = list(zip(hidden.split(self.chunk), targets.split(self.chunk)))
        if torch.is_grad_enabled() and len(chunks) > 1:
            scores = [checkpoint(self._score, h, t, temperature, use_reentrant=False) for h, t in chunks]
        else:  # one chunk's logits fit: nothing is computed twice
            scores = [self._score(h, t, temperature) for h, t in chunks]
        logprobs, entropies = zip(*scores)
        return torch.cat(logprobs), torch.cat(entropies)

    def parts(self) -> tuple[nn.Module, nn.Module]:
        """Body and head."""
        return self.model.get_decoder(), self.model.get_output_embeddings()

    def _score(self, hidden: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        logits = self.model.get_output_embeddings()(hidden)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # (n, V): each pass over it costs time
        logprobs = (logits if temperature == 1 else logits / temperature).log_softmax(-1)
        with torch.no_grad():
            entropies = -(logprobs.exp() * logprobs).sum(-1)
        return logprobs.gather(-1, targets[:, None]).squeeze(-1), entropies


class Critic(nn.Module):
    """A value for each masked token: the return expected just before it is chosen. One linear head."""

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

    def parts(self) -> tuple[nn.Module, nn.Module]:
        return self.decoder, self.head


def collate(sequences: list[Sequence], device: torch.device) -> tuple[Tensor, Tensor]:
    """ids (B, T), padded on the right with -1, and mask (B, T), with 0. Nothing predicts a first token: it is never trained."""
    ids = pad_sequence([torch.tensor(s.ids) for s in sequences], batch_first=True, padding_value=-1)
    mask = pad_sequence([torch.tensor(s.mask) for s in sequences], batch_first=True)
    return ids.to(device), mask.to(device)


def own_tokens(sequence: Sequence, above: Sequence | None) -> int:
    """How many tokens a sequence doesn't share with the one above it: `packed_states` computes these alone."""
    return len(sequence.ids) - (len(os.path.commonprefix([sequence.ids, above.ids])) if above else 0)


def micro_batches(sequences: list[Sequence], budget: int) -> list[list[int]]:
    """Indices of sequences, sorted so that those that begin alike are neighbours, cut into batches of up to `budget` tokens.

    Tokens that a sequence shares with its neighbour in the batch are computed once, and count once."""
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
    """The micro-batches of this rank, with empty ones appended until every rank has as many.

    Each backward pass meets the other ranks', so none may have fewer."""
    most = int(accelerator.gather(torch.tensor([len(parts)], device=accelerator.device)).max())
    return parts + [[]] * (most - len(parts))


NOTHING = Sequence([0, 0], [0, 1])  # what an empty micro-batch runs on, times zero

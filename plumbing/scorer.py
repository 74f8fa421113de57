"""Scoring: log-probs and values of masked tokens only, over rows packed without padding.

Transformers' forward pass with labels computes logits (B, T, V), padding and shared prompts too."""

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from plumbing.attention import attention_blocks, pick
from plumbing.cli import UserError, console, first_line


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
    return pick(out.last_hidden_state[0], places[:, :-1][mask[:, 1:].bool()])


def padded_states(model, ids: Tensor, mask: Tensor, output: str) -> Tensor:
    """As `packed_states`, of any causal model: its own forward pass over rows padded on the right.

    output: "logits" of a language model, or "last_hidden_state" of a decoder."""
    out = model(input_ids=ids.clamp(min=0), attention_mask=(ids >= 0).long(), use_cache=False)
    return getattr(out, output)[:, :-1][mask[:, 1:].bool()]


class TokenScorer(nn.Module):
    """A causal language model that scores only the masked tokens of a batch.

    The head (V: 49k-152k) runs only at positions that predict a masked token, `chunk` at a time.
    Several chunks recompute their logits in the backward pass. There is no (B, T, V) tensor, unless
    the model can't be packed (see `find_way`). Raises UserError for a model that it can't score."""

    def __init__(self, model, chunk: int = 1024):
        super().__init__()
        self.model, self.chunk = model, chunk
        self._no_split_modules = model._no_split_modules  # FSDP reads the names of the layers here
        self.packed, _ = find_way(model, model, "logits", lambda ids, mask: (
            model.get_output_embeddings()(packed_states(model.get_decoder(), ids, mask))))

    def forward(self, ids: Tensor, mask: Tensor,
                temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """ids, mask (B, T), of `collate` -> log-probs and entropies (N,) of the N masked tokens, in
        nats, in row order."""
        states = (packed_states(self.model.get_decoder(), ids, mask) if self.packed  # (N, D)
                  else padded_states(self.model, ids, mask, "logits"))  # (N, V)
        targets = ids[:, 1:][mask[:, 1:].bool()]  # (N,)
        chunks = list(zip(states.split(self.chunk), targets.split(self.chunk)))
        if torch.is_grad_enabled() and len(chunks) > 1:
            scores = [checkpoint(self._score, s, t, temperature, use_reentrant=False)
                      for s, t in chunks]
        else:  # a single chunk fits in memory: no recomputation
            scores = [self._score(s, t, temperature) for s, t in chunks]
        logprobs, entropies = zip(*scores)
        return torch.cat(logprobs), torch.cat(entropies)

    def parts(self) -> tuple[nn.Module, nn.Module]:
        """Decoder and head."""
        return self.model.get_decoder(), self.model.get_output_embeddings()

    def _score(self, states: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        logits = self.model.get_output_embeddings()(states) if self.packed else states
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
        self.decoder = model.get_decoder()
        self.packed, width = find_way(model, self.decoder, "last_hidden_state", lambda ids, mask: (
            packed_states(self.decoder, ids, mask)))
        self.head = nn.Linear(width, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """ids, mask (B, T), of `collate` -> values (N,) of the N masked tokens, in row order."""
        states = (packed_states(self.decoder, ids, mask) if self.packed
                  else padded_states(self.decoder, ids, mask, "last_hidden_state"))
        return self.head(states).squeeze(-1).float()

    def parts(self) -> tuple[nn.Module, nn.Module]:
        return self.decoder, self.head


# Rows of letters that share a beginning of 3. No special tokens, which come first in a vocabulary:
# what a tuned model makes of tokens that it never saw can drown in the rounding of bfloat16.
PROBE = [[105, 106, 107, 108, 109, 110, 111, 112], [105, 106, 107, 113, 114, 115, 116, 117]]
LENGTHS = ("sliding_window", "attention_chunk_size", "floor_scale")  # past which attention changes
CANT_RUN = (AttributeError, LookupError, RuntimeError, TypeError, ValueError)


def find_way(model, whole, output: str,
             pack: Callable[[Tensor, Tensor], Tensor]) -> tuple[bool, int]:
    """Set the attention with which a batch of rows gives what each row gives alone: packed, or else
    padded, with PyTorch's attention or the architecture's own ("eager": nothing is left out).

    Heads that scale or cap their logits, attention with caps, sinks or a mask of its own, layers
    that mix neighbouring tokens can't be packed, and only a comparison finds all of them. Returns
    whether rows are packed, and the output's width. Raises UserError if no way is right."""
    ids, mask = collate([Sequence(row, [1] * len(row)) for row in (PROBE[0], PROBE[1][:5])],
                        model.device)

    def plain() -> Tensor:
        long, short = alone(model, whole, output)
        return torch.cat([long[:-1], short[:4]])  # (N, V) or (N, D)

    def batched(way: str) -> Tensor:
        return pack(ids, mask) if way == "packed" else padded_states(whole, ids, mask, output)

    modes = [(module, module.training) for module in model.modules()]
    model.eval()  # no dropout
    try:
        way, width = find_attention(model, output, ("packed", "sdpa", "eager"), plain, batched)
    except CANT_RUN as error:
        raise UserError(f"{type(model).__name__} can't be trained: {first_line(error)}") from None
    finally:
        for module, training in modes:
            module.training = training
    return way == "packed", width


FOUND: dict[str, tuple[str, int]] = {}  # by architecture and sizes: a reference is as its policy


@torch.no_grad()
def find_attention(model, what: str, ways: tuple[str, ...], plain: Callable[[], Tensor],
                   batched: Callable[[str], Tensor]) -> tuple[str, int]:
    """Set the first attention with which `batched` is `plain`, which the architecture's own
    computes. Returns its name and the last dimension. Raises one of CANT_RUN if there is none.

    Not seen: rotary embeddings that change with the longest row of a batch ("dynamic", "longrope")
    past their original length, in Transformers' own generate, too."""
    key = f"{what} {type(model).__name__} {getattr(model, 'config', model)!r}"
    if key in FOUND:
        model.set_attn_implementation(FOUND[key][0])
        return FOUND[key]
    model.set_attn_implementation("eager")
    with shortened(model):
        expected = plain()
        for way in ways:
            with contextlib.suppress(*CANT_RUN):
                model.set_attn_implementation(way)
                if agree(batched(way), expected):
                    break
        else:
            raise ValueError("a batch of rows doesn't give what each row gives alone")
    if way != ways[0]:
        console.print(f"{type(model).__name__}: {ways[0]} attention would be wrong; {way} is "
                      "right, and slower", style="yellow")
    FOUND[key] = way, expected.shape[-1]
    return FOUND[key]


@contextlib.contextmanager
def shortened(model) -> Iterator[None]:
    """Windows and chunks of attention are 2 tokens here: rows of PROBE go past them."""
    owners = [*model.modules(), *(module.config for module in model.modules()
                                  if hasattr(module, "config"))]
    lengths = [(vars(owner), name, vars(owner)[name]) for owner in owners for name in LENGTHS
               if isinstance(vars(owner).get(name), int)]
    for attributes, name, _ in lengths:
        attributes[name] = 2
    try:
        yield
    finally:
        for attributes, name, length in lengths:
            attributes[name] = length


def alone(model, whole, output: str) -> Tensor:
    """Output of a plain pass over PROBE (2, 8, V or D): rows of equal length, without padding."""
    ids = torch.tensor(PROBE, device=model.device)
    out = getattr(whole(input_ids=ids, use_cache=False), output)
    if not agree(out[0, :3], out[1, :3]):
        raise ValueError("a token sees those after it")
    return out


def agree(found: Tensor, expected: Tensor) -> bool:
    """Whether two outputs differ by no more than rounding. NaN agrees with nothing."""
    tolerance = 1e-4 if found.dtype in (torch.float32, torch.float64) else 0.1
    difference = (found - expected).float().norm()
    return bool(difference <= tolerance * expected.float().norm())


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


def micro_batches(sequences: list[Sequence], budget: int, packed: bool = True) -> list[list[int]]:
    """Indices of sequences in batches of up to `budget` tokens.

    packed: sorted to make prefixes adjacent; tokens shared with the sequence above in the batch are
    computed once and count once. Else sorted by length, and padding counts."""
    batches: list[list[int]] = []
    above, filled = None, 0
    for i in sorted(range(len(sequences)),
                    key=lambda i: sequences[i].ids if packed else len(sequences[i].ids)):
        filled = (filled + own_tokens(sequences[i], above) if packed
                  else len(sequences[i].ids) * (len(batches[-1]) + 1 if batches else 1))
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

"""Scoring: what is packed equals a plain pass over every row; micro-batches keep their budget."""

import copy

import pytest
import torch
from helpers import make_model
from transformers import MistralConfig, MistralForCausalLM

from plumbing.scorer import Sequence, TokenScorer, collate, micro_batches

SHARED = [5, 6, 7, 8, 9, 5, 6]
ROWS = [SHARED + [20, 21, 22], SHARED + [20, 21, 23, 24, 25, 26, 27], SHARED + [30], [40, 41, 42],
        SHARED + [30], SHARED[:4], [40, 41, *range(43, 59)]]


def nodes(rows) -> int:
    """Of the tree of the rows: their tokens, less those of a beginning that came already."""
    return len({tuple(row[: t + 1]) for row in rows for t in range(len(row))})


def mistral(vocabulary):
    """Its attention sees five tokens back, no more."""
    return MistralForCausalLM(MistralConfig(
        vocab_size=vocabulary, sliding_window=5, hidden_size=32, intermediate_size=64,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2))


MODELS = {"grouped": make_model, "sliding": mistral,
          "ungrouped": lambda n: make_model(n, num_key_value_heads=4)}
LONG = [row * 150 for row in ROWS]  # for torch's own attention


@pytest.mark.parametrize(("make", "rows"), [
    *((make, ROWS) for make in MODELS.values()), (make_model, LONG),
    *(pytest.param(MODELS[name], LONG, marks=pytest.mark.slow)
      for name in ("sliding", "ungrouped")),
])
def test_scorer_equals_a_plain_pass_over_every_row(tokenizer, make, rows):
    """Log-probs, entropies and gradient, whatever the rows share; the decoder sees no token twice,
    and no padding."""
    model = make(len(tokenizer)).double().eval()
    plain, scorer, seen = copy.deepcopy(model), TokenScorer(model, chunk=7), []
    model.get_input_embeddings().register_forward_hook(
        lambda module, args, out: seen.append(args[0].numel()))
    sequences = [Sequence(row, [int(t % 3 > 0 or t > 8) for t in range(len(row))]) for row in rows]
    sequences = [sequences[i] for part in micro_batches(sequences, 100_000) for i in part]
    ids, mask = collate(sequences, torch.device("cpu"))
    logprobs, entropies = scorer(ids, mask, temperature=0.5)
    expected, entropy = [], []
    for s in sequences:
        logits = (plain(torch.tensor([s.ids])).logits[0] / 0.5).log_softmax(-1)
        for t in (t for t in range(1, len(s.ids)) if s.mask[t]):
            expected.append(logits[t - 1, s.ids[t]])
            entropy.append(-(logits[t - 1].exp() * logits[t - 1]).sum())
    assert torch.allclose(logprobs, torch.stack(expected), atol=1e-12)
    assert torch.allclose(entropies, torch.stack(entropy), atol=1e-12)
    weights = torch.linspace(-1, 2, len(logprobs), dtype=torch.float64)
    for scores in (logprobs, torch.stack(expected)):
        (scores * weights).sum().backward()
    for (name, found), right in zip(model.named_parameters(), plain.parameters()):
        difference = (found.grad - right.grad).norm()
        assert difference <= 1e-6 * right.grad.norm(), name  # their norms are in float32
    assert seen == [nodes(rows)]


def test_the_gradient_is_the_same_bit_for_bit_in_every_run(tokenizer):
    """Threads add up the gradients of a shared beginning in one order, whoever comes first."""
    scorer, threads = TokenScorer(make_model(len(tokenizer))), torch.get_num_threads()
    rows = [list(range(5, 65)) + [(7 * i * t) % 50 + 5 for t in range(1, 60)] for i in range(40)]
    ids, mask = collate([Sequence(row, [int(t > 60) for t in range(119)]) for row in rows],
                        torch.device("cpu"))
    gradients = []
    try:
        torch.set_num_threads(2)
        for _ in range(12):
            scorer.zero_grad()
            scorer(ids, mask)[0].sum().backward()
            gradients.append([p.grad.clone() for p in scorer.parameters()])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in gradients[1:] for a, b in zip(gradients[0], other))


def test_micro_batches_cover_everything_within_the_budget():
    sequences = [Sequence(row, []) for row in ROWS]
    for budget in (1, 12, 20, 1000):
        batches = micro_batches(sequences, budget)
        assert sorted(i for b in batches for i in b) == list(range(len(ROWS)))
        assert all(len(b) == 1 or nodes([ROWS[i] for i in b]) <= budget for b in batches)
    assert len(batches) == 1  # all of it fits
    assert micro_batches([], 10) == []

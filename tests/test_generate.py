"""Generation with Transformers: exact, a function of each row's seed, cached over turns."""

from types import SimpleNamespace

import pytest
import torch
from helpers import make_model
from torch.nn.functional import one_hot
from transformers import GenerationConfig

from plumbing.generate import HFGenerator, Sampling, longest_prefix, sample_tokens
from plumbing.text import encode


@pytest.fixture
def generator(tokenizer):
    return HFGenerator(make_model(len(tokenizer)).eval(), tokenizer, batch_size=3)


class Scripted(torch.nn.Module):
    """In a model's place: the next token's logits are a function of the number of tokens so far."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def set_attn_implementation(self, name): ...

    def forward(self, input_ids, attention_mask=None, logits_to_keep=0, **inputs):
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        lengths = mask.cumsum(1)[:, -(logits_to_keep or input_ids.shape[1]) :].tolist()
        return SimpleNamespace(logits=torch.stack([torch.stack([self.logits(n) for n in row])
                                                   for row in lengths]))


def test_greedy_equals_transformers_generate(generator, tokenizer):
    """Ragged prompts, two of them equal, more than one batch; no cache outlives its weights."""
    prompts = [encode(tokenizer, text) for text in ("abc", "longer", "abc", "x", "zz top of all")]
    first = generator.generate(prompts, Sampling(12, 0.0), [0] * 5)  # with other weights
    prompts = [prompt + generation.ids for prompt, generation in zip(prompts, first)]
    reference = make_model(len(tokenizer), seed=1).eval()
    generator.load_weights(reference.named_parameters())
    ours = generator.generate(prompts, Sampling(12, 0.0), [0] * 5)
    config = GenerationConfig(max_new_tokens=12, pad_token_id=0, eos_token_id=2)  # greedy
    for prompt, generation in zip(prompts, ours, strict=True):
        whole = reference.generate(torch.tensor([prompt]), generation_config=config)
        theirs = whole[0, len(prompt) :].tolist()
        assert generation.ids == theirs
        logprobs = reference(whole).logits[0].log_softmax(-1)
        expected = [logprobs[len(prompt) - 1 + i, token].item() for i, token in enumerate(theirs)]
        assert generation.logprobs == pytest.approx(expected, abs=1e-5)


def test_second_turn_reuses_the_cache_and_changes_nothing(generator, tokenizer):
    prompts = [encode(tokenizer, text) for text in ("one", "another", "and a third")]
    first = generator.generate(prompts, Sampling(9, 0.0), [0] * 3)
    turns = [prompt + generation.ids + encode(tokenizer, " more" * (i + 1))
             for i, (prompt, generation) in enumerate(zip(prompts, first))]
    assert all(longest_prefix(turn, generator.kept) for turn in turns)
    again = generator.generate(turns[::-1], Sampling(9, 0.0), [0] * 3)[::-1]
    generator.sleep()
    assert not generator.kept
    fresh = generator.generate(turns, Sampling(9, 0.0), [0] * 3)
    assert [g.ids for g in again] == [g.ids for g in fresh]
    assert again[2].logprobs == pytest.approx(fresh[2].logprobs, abs=1e-5)


def test_a_row_depends_on_its_seed_alone(generator, tokenizer):
    prompts = [encode(tokenizer, "same") for _ in range(4)]
    a = generator.generate(prompts, Sampling(8, 1.0), [1, 2, 3, 1])
    b = generator.generate([encode(tokenizer, "longer"), *prompts[:2]], Sampling(8, 1.0), [9, 3, 1])
    assert a[0].ids == a[3].ids == b[2].ids and a[2].ids == b[1].ids
    assert a[0].ids != a[1].ids


def test_sampling_follows_the_distribution():
    """200,000 draws at temperature 0.7: frequencies within 5 standard errors, log-probs exact."""
    n, generator = 200_000, torch.Generator().manual_seed(0)
    logits = torch.tensor([1.0, 0.0, -1.0, 2.0]).expand(n, 4)
    ids, logprobs = sample_tokens(logits, 0.7, torch.rand(n, generator=generator))
    expected = (logits[0] / 0.7).softmax(-1)
    frequency = torch.bincount(ids, minlength=4) / n
    assert ((frequency - expected).abs() < 5 * (expected * (1 - expected) / n).sqrt()).all()
    assert torch.allclose(logprobs, expected[ids].log(), atol=1e-6)


def test_a_bfloat16_model_never_gives_what_it_deems_impossible(tokenizer):
    """Draws rounded to bfloat16 would be 1 twice in a thousand, and pick the vocabulary's end."""
    possible = torch.arange(len(tokenizer) - 50)
    possible = possible[possible != tokenizer.eos_token_id]
    logits = torch.full((len(tokenizer),), -40.0, dtype=torch.bfloat16)
    logits[possible] = 0.0
    generator = HFGenerator(Scripted(lambda length: logits), tokenizer)
    results = generator.generate([[5]] * 64, Sampling(100, 1.0), list(range(64)))
    tokens = torch.tensor([r.ids for r in results]).flatten()
    counts = torch.bincount(tokens, minlength=len(tokenizer))[possible].float()
    assert len(tokens) == 6400 == counts.sum()
    assert ((counts - counts.mean()).abs() < 6 * counts.mean().sqrt()).all()  # the tail too


def test_generation_stops_after_a_stop_string_and_keeps_it(tokenizer):
    script = encode(tokenizer, "think</search> and much more")
    model = Scripted(lambda n: one_hot(torch.tensor(script[n - 1]), len(tokenizer)).float() * 50)
    sampling = Sampling(20, 1.0, ("</search>", "</answer>"))
    (result,) = HFGenerator(model, tokenizer).generate([[5]], sampling, [0])
    assert result.ids == encode(tokenizer, "think</search>") and result.stop_reason == "stop"


def test_special_tokens_decide_nothing_about_the_attention(tokenizer):
    """They come first in a vocabulary. A tuned model in bfloat16 gave noise for them, and was
    decoded with the slow attention."""
    model = make_model(len(tokenizer), intermediate_size=72)  # no other test's, checked before
    model.get_input_embeddings().register_forward_hook(
        lambda module, arguments, output: torch.where(arguments[0][..., None] < 20,
                                                      torch.randn_like(output), output))
    HFGenerator(model, tokenizer)
    assert model.config._attn_implementation == "decoding"

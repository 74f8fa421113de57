"""Every architecture that Transformers offers is scored and sampled right, or refused in one line.

`pytest tests/test_families.py -s` prints a table: what each does, its largest difference in nats
(scorer, sampler) or in value (critic)."""

import copy

import pytest
import torch
from accelerate import Accelerator
from helpers import settings, tune
from transformers import AutoConfig, AutoModelForCausalLM

import sft_simulator as sim
import train_rl as rl
from plumbing.cli import UserError
from plumbing.generate import HFGenerator, Sampling
from plumbing.scorer import Critic, Sequence, TokenScorer, collate, micro_batches

SIZES = dict(
    vocab_size=259, hidden_size=32, intermediate_size=64, num_hidden_layers=2, pad_token_id=0,
    num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=256,
    initializer_range=0.2, bos_token_id=1, eos_token_id=2)
EXPERTS = dict(num_experts=4, num_local_experts=4, n_routed_experts=4, num_experts_per_tok=2,
               moe_intermediate_size=16)
# Longer than the rows that are compared when a model is loaded, shorter than those here.
WINDOW = dict(sliding_window=12, layer_types=["sliding_attention", "full_attention"])
MAMBA = dict(mamba_n_heads=8, mamba_d_head=8, mamba_d_ssm=64, mamba_d_state=8, mamba_n_groups=1,
             mamba_expand=2, mamba_chunk_size=16)
LATENT = dict(q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8,
              n_group=1, topk_group=1, num_key_value_heads=4, first_k_dense_replace=1)
CHUNKS = dict(attention_chunk_size=12, floor_scale=12, attn_scale=1.0, no_rope_layers=[1, 0],
              layer_types=["chunked_attention", "full_attention"], moe_layers=[1])
LINEAR = dict(layer_types=["linear_attention", "full_attention"])
# What a family is made of beyond SIZES; {}: nothing. Caps and scales are strong enough to be seen.
PLAIN = """
    llama qwen2 qwen3 phi phi3 gemma olmo olmo2 cohere stablelm nemotron gpt2 gpt_neox opt bloom
    mpt mamba smollm3 glm glm4 starcoder2 helium ernie4_5 exaone4 arcee apertus seed_oss biogpt
    gpt_bigcode persimmon xglm diffllama rwkv"""
FAMILIES = dict.fromkeys(PLAIN.split(), {}) | {
    "mistral": {"sliding_window": 12}, "olmo3": WINDOW, "gemma3_text": WINDOW, "cohere2": WINDOW,
    "ministral": WINDOW, "gpt_oss": EXPERTS | WINDOW, "nanochat": {"final_logit_softcapping": 2.0},
    "gemma2": WINDOW | {"attn_logit_softcapping": 1.0, "final_logit_softcapping": 2.0},
    "gemma4_text": WINDOW | {"final_logit_softcapping": 2.0, "vocab_size_per_layer_input": 259},
    "granite": {"logits_scaling": 4.0}, "vaultgemma": {"final_logit_softcapping": 2.0},
    "mixtral": EXPERTS, "qwen2_moe": EXPERTS, "qwen3_moe": EXPERTS, "olmoe": EXPERTS,
    "granitemoe": EXPERTS | {"logits_scaling": 4.0}, "llama4_text": EXPERTS | CHUNKS,
    "deepseek_v3": EXPERTS | LATENT, "glm4_moe": EXPERTS, "minimax": EXPERTS | LINEAR,
    "falcon_h1": MAMBA, "bamba": MAMBA | {"attn_layer_indices": [1]},
    "jamba": EXPERTS | {"mamba_d_state": 8, "attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"]}, "recurrent_gemma": {},
    "qwen3_next": EXPERTS | LINEAR, "qwen3_5_text": LINEAR, "olmo_hybrid": LINEAR,
    "falcon": {"head_dim": None, "alibi": True}, "bert": {},
}
# Packed: none of these may be slower, or refused, than it must be.
PACKED = """
    llama qwen2 qwen3 phi phi3 gemma olmo olmo2 gpt2 gpt_neox opt smollm3 glm starcoder2
    mistral olmo3 gemma3_text mixtral qwen3_moe deepseek_v3"""
REFUSED = {"bert": "a token sees those after it"}
# States other than keys and values; Llama 4's queries are scaled by column, padding included.
NOT_SAMPLED = """
    mamba rwkv minimax falcon_h1 bamba jamba lfm2 recurrent_gemma qwen3_next qwen3_5_text
    olmo_hybrid llama4_text bert"""


def make(family):
    torch.manual_seed(0)
    sizes = {k: v for k, v in (SIZES | FAMILIES[family]).items() if v is not None}
    config = AutoConfig.for_model(family, **sizes)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


@pytest.fixture(scope="module")
def table():
    rows = []
    yield rows
    print("\n\n| family | part | | largest difference |\n|---|---|---|---|")
    print("\n".join(f"| {' | '.join(row)} |" for row in rows))


def rows_of_three_lengths():
    generator = torch.Generator().manual_seed(1)
    start, *ends = (torch.randint(3, 259, (n,), generator=generator).tolist()
                    for n in (9, 4, 17, 2))
    return [start + end for end in ends] + [start[:4] + ends[1]]


def sequences():
    return [Sequence(row, [int(t > 5 and t % 4 > 0) for t in range(len(row))])
            for row in rows_of_three_lengths()]


def batches(module):
    parts = micro_batches(sequences(), 60, module.packed)
    return [[sequences()[i] for i in part] for part in parts]


def part_of(make_part, model, family):
    """The scorer, critic or sampler of the model; or why there is none."""
    try:
        return make_part(model), None
    except UserError as error:
        assert "\n" not in str(error) and type(model).__name__ in str(error)
        return None, str(error)


def plain_logprobs(model, batch, temperature=1.0):
    """Log-probs (N,) of the masked tokens, by one plain pass over each row."""
    expected = []
    for s in batch:
        logits = model(torch.tensor([s.ids]), use_cache=False).logits[0] / temperature
        logprobs = logits.log_softmax(-1)
        expected += [logprobs[t - 1, s.ids[t]] for t in range(1, len(s.ids)) if s.mask[t]]
    return torch.stack(expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_scored_right_or_refused(family, table):
    """Log-probs, entropies and gradient of ragged rows, beside one plain pass over each row."""
    model = make(family)
    plain = copy.deepcopy(model)
    scorer, refused = part_of(TokenScorer, model, family)
    assert (family in REFUSED) == (scorer is None) and REFUSED.get(family, "") in str(refused)
    if scorer is None:
        table.append([family, "scorer", "refused", refused])
        return
    assert scorer.packed or family not in PACKED.split()
    difference = 0.0
    for batch in batches(scorer):
        logprobs, entropies = scorer(*collate(batch, torch.device("cpu")), temperature=0.8)
        expected = plain_logprobs(plain, batch, 0.8)
        weights = torch.linspace(-1, 2, len(expected))
        (logprobs * weights).sum().backward()
        (expected * weights).sum().backward()
        difference = max(difference, (logprobs - expected).abs().max().item())
    table.append([family, "scorer", "packed" if scorer.packed else "padded", f"{difference:.1e}"])
    assert difference < 1e-3
    found, right = (torch.cat([p.grad.flatten() for p in m.parameters() if p.grad is not None])
                    for m in (model, plain))
    assert (found - right).norm() < 1e-3 * right.norm()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_has_a_right_critic_or_none(family, table):
    model = make(family)
    decoder = copy.deepcopy(model).get_decoder()
    critic, refused = part_of(Critic, model, family)
    if critic is None:
        table.append([family, "critic", "refused", refused])
        return
    torch.nn.init.normal_(critic.head.weight)
    difference = 0.0
    for batch in batches(critic):
        values = critic(*collate(batch, torch.device("cpu")))
        expected = []
        for s in batch:
            hidden = decoder(torch.tensor([s.ids]), use_cache=False).last_hidden_state[0]
            expected.append(critic.head(hidden[:-1][torch.tensor(s.mask[1:]).bool()])[:, 0])
        difference = max(difference, (values - torch.cat(expected)).abs().max().item())
    table.append([family, "critic", "packed" if critic.packed else "padded", f"{difference:.1e}"])
    assert difference < 5e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_sampled_right_or_refused(family, tokenizer, table):
    """Greedy, two turns of ragged prompts, farther than a window: a plain pass's tokens."""
    model = make(family)
    plain = copy.deepcopy(model)
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.eos_token = "<|endoftext|>"
    generator, refused = part_of(lambda m: HFGenerator(m, tokenizer), model, family)
    assert (family in NOT_SAMPLED.split()) == (generator is None)
    if generator is None:
        table.append([family, "sampler", "refused", refused])
        assert "use vLLM (--generator vllm, or its server)" in refused
        return
    difference, prompts = 0.0, rows_of_three_lengths()
    for _ in range(2):
        results = generator.generate(prompts, Sampling(6, 0.0), [0] * len(prompts))
        for i, (prompt, result) in enumerate(zip(prompts, results)):
            ids = torch.tensor([prompt + result.ids])
            logprobs = plain(ids, use_cache=False).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            best = logprobs.gather(1, ids[0, len(prompt) :, None])[:, 0]
            assert (logprobs.max(1).values - best).max() < 1e-3  # greedy, but for ties
            difference = max(difference, (torch.tensor(result.logprobs) - best).abs().max().item())
            prompts[i] = ids[0].tolist() + [30 + i] * (1 + 3 * i)
    table.append([family, "sampler", model.config._attn_implementation, f"{difference:.1e}"])
    assert difference < 1e-3


@pytest.mark.parametrize("family", ["stablelm", "granite"])
def test_policy_reference_critic_and_supervised_training_are_right(family, tmp_path):
    """Of a model whose rows, or whose head, can't be computed as Llama's."""
    model, rows = make(family), sequences()
    model.save_pretrained(tmp_path)
    accelerator = Accelerator(cpu=True)
    trainer = rl.make_trainer(accelerator, settings(model=str(tmp_path), algorithm="ppo",
                                                    kl_coef=0.1))
    expected = plain_logprobs(model, rows, 0.8)
    for scorer in (trainer.policy, trainer.reference):
        found = torch.cat(trainer.evaluate(scorer, rows, 60, temperature=0.8))
        assert (found - expected).abs().max() < 1e-3
    torch.nn.init.normal_(trainer.critic.head.weight)
    values = trainer.evaluate(trainer.critic, rows, 60)
    for found, s in zip(values, rows):
        hidden = model.get_decoder()(torch.tensor([s.ids]), use_cache=False).last_hidden_state[0]
        right = trainer.critic.head(hidden[:-1][torch.tensor(s.mask[1:]).bool()])[:, 0]
        assert (found - right).abs().max() < 5e-3
    loss = -plain_logprobs(model, rows).mean().item()
    found = sim.supervised_gradient(accelerator, TokenScorer(model), rows, 60)
    assert found.item() == pytest.approx(loss, abs=1e-3)


@pytest.mark.parametrize("part", ["policy", "critic", "tuned"])
def test_every_part_of_training_refuses_a_model_that_it_can_not_score(part, tmp_path):
    names = {}
    for family in ("bert", "llama"):
        names[family] = str(tmp_path / family)
        make(family).save_pretrained(names[family])
    with pytest.raises(UserError, match="^BertLMHeadModel can't be trained: a token sees those af"):
        if part == "tuned":
            tune(make("bert"), sequences(), sim.TuningSettings(out=tmp_path / "out"))
        else:
            models = {"model": names["bert"]} if part == "policy" else {
                "model": names["llama"], "critic": names["bert"]}
            rl.make_trainer(Accelerator(cpu=True), settings(algorithm="ppo", **models))

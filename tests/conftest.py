"""Shared by the tests: a tiny random model behind the real interface, and the real commands as subprocesses."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models: a second thread costs more than it brings

# Accelerate's launcher starts several processes for GPUs alone (`--cpu` starts one); this variable then keeps them off GPUs.
TWO_PROCESSES = ["env", "ACCELERATE_USE_CPU=true", sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu",
                 "--num_processes", "2", "--mixed_precision", "no", "--main_process_port", "0"]  # fmt: skip

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def make_tokenizer():
    """One token a byte, three special tokens, a chat template: small enough to read any id by eye."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(specials + letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(specials)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_model(vocabulary: int, seed: int = 0, **sizes):
    """A random Llama with grouped heads: the architecture of the embedded model, 20,000 times smaller."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "max_position_embeddings": 4096, "initializer_range": 0.2} | sizes  # fmt: skip
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, tie_word_embeddings=True, eos_token_id=2, **sizes))


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory, tokenizer) -> Path:
    """Folder of a tiny random model, for `--model`."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    make_model(len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def policy(tmp_path_factory, tokenizer) -> Path:
    """Folder of a tiny model that mostly answers "Lima" or "Rome", at random: enough for rewards to differ."""
    from accelerate import Accelerator

    import sft_simulator as sim
    import train_rl as rl

    out = tmp_path_factory.mktemp("policy")
    sequences = []
    for i, answer in enumerate(["Lima", "Rome", "Lima", "Oslo"] * 60):
        row = {"id": f"q{i % 4}", "question": f"Question {i % 4}?", "golden_answers": ["Lima"]}
        episode = rl.new_episode(row, 0, tokenizer, sim.load_prompts(), search=i < 120)
        ids = sim.encode(tokenizer, f"<answer>{answer}</answer>")
        episode.write(ids, [0.0] * len(ids))
        sequences.append(sim.Sequence(episode.ids, episode.mask))
    model = make_model(len(tokenizer), initializer_range=0.05)
    sim.train_supervised(Accelerator(cpu=True), model, sequences, out, epochs=1, lr=2e-2, batch_size=4,
                         batch_tokens=10_000, seed=0)  # fmt: skip
    sim.save_model(model, tokenizer, out / "model")
    return out / "model"


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """Accelerate keeps its state for the whole process: no test inherits another's mixed precision."""
    yield
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def sgd(monkeypatch):
    """Optimizers that take plain gradient steps; the list of those that were made."""
    import torch
    from helpers import PlainSGD

    monkeypatch.setattr(torch.optim, "AdamW", PlainSGD)
    monkeypatch.setattr(PlainSGD, "made", [])
    return PlainSGD.made


@pytest.fixture
def exact(monkeypatch):
    """Training in float32 on the CPU: figures that can be compared with plain torch."""
    from accelerate import Accelerator

    import sft_simulator as sim
    import train_rl as rl

    for chapter in (sim, rl):
        monkeypatch.setattr(chapter, "make_accelerator", lambda **options: Accelerator(cpu=True))


@pytest.fixture
def serve():
    """Start a server on a free port; all are stopped when the test ends."""
    from helpers import Server

    servers = []

    def start(behave, port=0):
        servers.append(Server(behave, port))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


@pytest.fixture(scope="session")
def run_script():
    """Run one of the kit's scripts as a user would; returns the finished process."""

    def run(script: str, *args: object, cwd: Path = ROOT, check: bool = True, **env: str):
        command = [sys.executable, str(ROOT / script), *map(str, args)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"} | env
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=environment, timeout=300)
        assert not check or done.returncode == 0, done.stderr[-3000:]
        return done

    return run


@pytest.fixture
def jsonl(tmp_path):
    """Write rows to a JSONL file in this test's folder."""

    def write(name: str, rows: list[dict]) -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write

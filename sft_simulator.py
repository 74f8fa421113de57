"""Chapter 1: a language model learns to be a search engine (arXiv 2505.04588, section 3.2).

\b
    label   trajectories on a real engine -> pairs (query, quality, documents)
    train   fine-tune a model on the pairs, with the quality in the prompt
    probe   does it obey? share of useful and noisy outputs with the answer
    search  ask any engine one query, and look

\b
    python sft_simulator.py label runs/demo/trajectories/predictions.jsonl \\
        --out pairs.jsonl
    python sft_simulator.py train pairs.jsonl --out runs/simulator --lr 3e-4
    python sft_simulator.py search "capital of France" --engine bm25
"""

import random
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from accelerate import Accelerator

from plumbing.checkpoints import Checkpoints
from plumbing.cli import (CommonSettings, UserError, argument, command, console, make_app, option,
                          plain, progress_bar, run_cli)
from plumbing.engines import (ENGINES, QUERY_CHARACTERS, Engine, EngineSettings, Quality,
                              SearchRequest, SearchResult)
from plumbing.files import (append_jsonl, check_out_file, draw_seed, read_jsonl, write_json,
                            write_jsonl)
from plumbing.formats import read_trajectories
from plumbing.generate import Generation, Generator, Sampling
from plumbing.metrics import agreement
from plumbing.models import (load_model, load_tokenizer, make_accelerator, prepare_trained,
                             simulator_tuning)
from plumbing.page import show_probe
from plumbing.ranks import Worker
from plumbing.remote import is_server
from plumbing.scorer import NOTHING, Sequence, TokenScorer, collate
from plumbing.runfolder import FolderSettings, RunFolder
from plumbing.served import load_generator
from plumbing.text import (BRACKETS, ROOT, Prompts, clean, contains_answer, encode, fill,
                           load_prompts, neutralize, prompt_ids)
from plumbing.web import chat_verdicts  # this module adds http and serpapi to ENGINES, too

app = make_app(__doc__)

MODEL = "smollm2 (SmolLM2-135M-Instruct, fetched by pip), a folder or a Hub id"
MODEL_OR_SERVER = f"{MODEL}, or http://host:port/v1 (replicas comma separated)"
DEMO_SIMULATOR = str(ROOT / "runs/demo/simulator/model")  # where `make demo` leaves it


# ---------------------------------------------------------------- the simulator

DOCUMENT_START = re.compile(r"^[ \t]*(?:Doc(?:ument)?[ \t]*)?\[?\d+[\].:)][ \t]*", re.M | re.I)


def parse_documents(text: str) -> list[str]:
    """The documents of a simulator's output: numbered, each from its number to the next."""
    return [part.strip() for part in DOCUMENT_START.split(text)[1:] if part.strip()]


def format_documents(documents: list[str]) -> str:
    """The same list as text: what the simulator writes and the policy reads."""
    return "\n".join(f"{number}. {text}" for number, text in enumerate(documents, start=1))


def simulator_prompt(tokenizer, prompts: dict[str, str], request: SearchRequest, k: int,
                     words: int) -> list[int]:
    """The simulator's prompt as token ids, after the paper's Table 2. Wording: data/prompts.toml.

    user: Write 3 documents of about 25 words with noisy information: on the topic, but without ...
          The user's question: Who ...? (answer: Ann or Anna) Query: ...
    The model continues a reply that begins "Noisy output:"; so the quality stands twice."""
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
    parts = ("system", "user", "heading")
    system, user, heading = (fill(prompts[part], **values) for part in parts)
    return prompt_ids(tokenizer, system, user, start=heading + "\n" * bool(heading))


class SimulatedEngine:
    """A language model that plays the search engine: k documents, useful or noisy as requested.

    Malformed output (not k documents, or cut) is asked for once more; what comes then is taken as
    far as it parses. What a served simulator can't answer has an `error`. Paper, section 3.2."""

    def __init__(self, generator: Generator, k: int, prompts: Prompts, *, words: int = 25,
                 temperature: float = 0.8, max_tokens: int = 600):
        self.generator, self.tokenizer = generator, generator.tokenizer
        self.k, self.words, self.prompts = k, words, prompts["simulator"]
        self.sampling = Sampling(max_tokens, temperature)

    def search(self, requests: list[SearchRequest]) -> list[SearchResult]:
        results = self.ask(requests)
        retries = [i for i, result in enumerate(results) if not result.well_formed]
        seeds = [draw_seed(requests[i].seed, "retry") for i in retries]
        again = self.ask([replace(requests[i], seed=seed) for i, seed in zip(retries, seeds)])
        for i, result in zip(retries, again, strict=True):
            result.prompt_tokens += results[i].prompt_tokens
            result.completion_tokens += results[i].completion_tokens
            results[i] = result
        return results

    def ask(self, requests: list[SearchRequest]) -> list[SearchResult]:
        """One output for each request, whatever its form."""
        prompts = [simulator_prompt(self.tokenizer, self.prompts, request, self.k, self.words)
                   for request in requests]
        seeds = [request.seed for request in requests]
        outputs = self.generator.generate(prompts, self.sampling, seeds)
        return [self.read_output(*pair) for pair in zip(prompts, outputs, strict=True)]

    def read_output(self, prompt: list[int], output: Generation) -> SearchResult:
        if output.error:
            return SearchResult([], prompt_tokens=len(prompt), error=output.error)
        documents = parse_documents(self.tokenizer.decode(output.ids, skip_special_tokens=True))
        complete = output.stop_reason == "eos" and len(documents) == self.k
        return SearchResult(documents[: self.k], complete, len(prompt), len(output.ids))


@dataclass(frozen=True, kw_only=True)
class SimulatorSettings(CommonSettings):
    """A simulator, and how it is asked. What is left open is read from its folder."""

    simulator: str | None = option(None, f"The simulator: {MODEL_OR_SERVER}.")
    simulator_words: int | None = option(
        None, "Words per document; by default those it was tuned on, else 25.", low=1)
    simulator_temperature: float | None = option(
        None, "Its sampling temperature; by default that of its folder, else 0.8.", low=0)
    simulator_max_tokens: int = option(600, "Its longest output.", low=1)
    generator: str = option("auto", "Sampler, of the policy too; auto: vllm if installed, else hf.",
                            choices=("auto", "hf", "vllm"))


def load_simulator(s: SimulatorSettings, k: int) -> SimulatedEngine:
    """The simulator that the settings name, for k documents a search."""
    tuned = simulator_tuning(s.simulator)
    words, temperature = s.simulator_words, s.simulator_temperature
    return SimulatedEngine(
        load_generator(s.simulator, s.generator, needs_ids=False), k, load_prompts(s.prompts),
        words=tuned.get("words", 25) if words is None else words,
        temperature=tuned.get("temperature", 0.8) if temperature is None else temperature,
        max_tokens=s.simulator_max_tokens)


@dataclass(frozen=True, kw_only=True)
class SearchSettings(EngineSettings, SimulatorSettings):
    """Which engine answers searches: a real one or a simulator."""


ENGINES["simulator"] = Engine(lambda s: load_simulator(s, s.top_k), lambda s: (
    None if s.simulator else f"--simulator: {MODEL_OR_SERVER}"),
    reads=("simulator", "simulator_words", "simulator_temperature", "question", "answer"),
    simulated=True)


# ---------------------------------------------------------------- label: the tuning set


@dataclass
class Pair:
    """One example of the tuning set: documents of one quality for one query.

    target: the answers to the *query*. A bridge query asks for a fact on the way to the answer."""

    question: str
    golden_answers: list[str]
    query: str
    target: list[str]
    quality: Quality
    documents: list[str]

    def request(self, seed: int = 0) -> SearchRequest:
        answers = tuple(self.golden_answers)
        return SearchRequest(self.query, self.question, answers, self.quality, seed)


def label_pairs(records: list[dict[str, Any]], k: int) -> list[Pair]:
    """Pairs of the turns of trajectories. Documents are useful if they hold what the query asks.

    Where the first k are useful and k of the deeper ones (of an evaluation with a larger --top-k)
    lack the answer, these are a noisy example for the same query."""
    pairs = []
    for record in records:
        for turn in record["turns"]:
            if not turn.get("query"):
                continue
            target = turn.get("target") or record["golden_answers"]
            base = (record["question"], record["golden_answers"], turn["query"], target)
            shown, deeper = turn["documents"][:k], turn["documents"][k:]
            useful = contains_answer("\n".join(shown), target)
            pairs.append(Pair(*base, "useful" if useful else "noisy", shown))
            lacking = [text for text in deeper if not contains_answer(text, target)][:k]
            if useful and len(lacking) == k:
                pairs.append(Pair(*base, "noisy", lacking))
    return [pair for pair in pairs if len(pair.documents) == k]


def judge_pairs(pairs: list[Pair], address: str, model: str | None,
                prompts: dict[str, str]) -> list[Pair | None]:
    """The pairs with the quality that a served model sees in them; None for neither, or both."""
    questions = []
    for pair in pairs:
        documents = format_documents([clean(text, 20_000) for text in pair.documents])
        values = {"question": pair.question, "query": pair.query, "documents": documents,
                  "answer": " or ".join(pair.target[:5])}
        # No brackets: a document must not speak to the judge in its own control tokens.
        safe = {name: value.translate(BRACKETS) for name, value in values.items()}
        questions.append((fill(prompts["system"]), fill(prompts["user"], **safe)))
    verdicts = chat_verdicts(address, model, questions, words=("useful", "noisy"))
    return [replace(pair, quality=verdict) if verdict else None
            for pair, verdict in zip(pairs, verdicts, strict=True)]


def balance(pairs: list[Pair], limit: int | None, seed: int) -> list[Pair]:
    """As many useful pairs as noisy ones, one of each for a query; queries with both come first. An
    odd limit keeps one useful pair more."""
    by_query: dict[str, dict[str, Pair]] = {}
    for pair in pairs:
        by_query.setdefault(pair.query, {}).setdefault(pair.quality, pair)
    queries = sorted(by_query)
    random.Random(seed).shuffle(queries)
    both = [by_query[q] for q in queries if len(by_query[q]) == 2]
    twins = [(pair["useful"], pair["noisy"]) for pair in both]
    useful, noisy = ([by_query[q][quality] for q in queries if list(by_query[q]) == [quality]]
                     for quality in ("useful", "noisy"))
    twins += list(zip(useful, noisy))  # the longer list's surplus is left out
    return [pair for twin in twins for pair in twin][:limit]


@dataclass(frozen=True, kw_only=True)
class LabelSettings(CommonSettings):
    predictions: list[Path] = argument("predictions.jsonl of evaluations on a real engine.")
    out: Path = option(help="Where the pairs go (JSONL).")
    overwrite: bool = option(False, "Replace the file that --out names.")
    top_k: int = option(3, "Documents of a pair.", low=1)
    limit: int | None = option(None, "Keep at most so many pairs.", low=1)
    judge: str | None = option(
        None, "http://host:port/v1 of a model that judges. Its replies are kept in runs/cache.")
    judge_model: str | None = option(None, "The model's name there; by default the first.")

    def check(self) -> None:
        super().check()
        if self.judge and not is_server(self.judge):
            raise UserError("--judge is a server's address, such as http://localhost:8000/v1")
        check_out_file(self.out, self.overwrite)

    def unused(self) -> dict[str, str]:
        return super().unused() | ({} if self.judge else {"judge_model": "without --judge"})


@command(app, LabelSettings)
def label(s: LabelSettings) -> None:
    """Turn trajectories into the tuning set: documents that hold what is asked are useful.

    The rule looks in them for the turn's `target`, a list of texts, else for the question's answer,
    which only the last of several searches should find. A judge, the paper's way, reads them."""
    prompts = load_prompts(s.prompts)
    records = [row for path in s.predictions for row in read_trajectories(path)]
    names = ", ".join(map(str, s.predictions))
    if not any(turn.get("query") for record in records for turn in record["turns"]):
        raise UserError(f"{names}: no turn of {len(records)} episodes has a query: the agent made "
                        "no search. Let a larger model collect, or teach this one the template "
                        "with your own trajectories (train_rl.py warmup)")
    pairs = label_pairs(records, s.top_k)
    if s.judge and pairs:
        by_rule, pairs = pairs, judge_pairs(pairs, s.judge, s.judge_model, prompts["judge"])
        both = [(a.quality, b.quality) for a, b in zip(by_rule, pairs) if b]
        console.print(f"{len(pairs) - len(both)} pairs left out: the model's verdict was neither "
                      f"useful nor noisy\nthe rule and the model {agreement(both)}")
    found = [pair for pair in pairs if pair is not None]
    if not (pairs := balance(found, s.limit, s.seed)):
        useful = sum(pair.quality == "useful" for pair in found)
        raise UserError(f"{names}: {useful} useful and {len(found) - useful} noisy queries with "
                        f"{s.top_k} documents (--top-k), and as many of each are needed: collect "
                        "more, or with a larger --top-k")
    write_jsonl(s.out, map(asdict, pairs))
    bridges = sum(pair.target != pair.golden_answers for pair in pairs)
    useful = sum(pair.quality == "useful" for pair in pairs)
    console.print(f"{s.out}: {len(pairs)} pairs, {useful} of them useful; {bridges} with a target "
                  "of their own, not the question's answer")


# ---------------------------------------------------------------- train: supervised tuning


def read_pairs(path: Path) -> list[Pair]:
    names = [part.name for part in fields(Pair)]
    rows = read_jsonl(path, names, texts=("question", "query", "quality"))
    return [Pair(**{name: row[name] for name in names}) for row in rows]


def read_tuning_set(path: Path) -> list[Pair] | list[dict[str, str]]:
    """Pairs of `label`, or whole texts: `prompt, response` a line, as of data/prepare.py."""
    if "prompt" not in read_jsonl(path)[0]:
        return read_pairs(path)
    rows = read_jsonl(path, texts=("prompt", "response"))
    for number, row in enumerate(rows, start=1):
        if not (row["prompt"].strip() and row["response"].strip()):
            raise UserError(f"{path}:{number}: prompt and response must not be empty")
    return rows


def tuning_sequence(example: Pair | dict[str, str], tokenizer, prompts: dict[str, str],
                    words: int) -> Sequence:
    """A prompt, which is read, and the documents that follow it, which are trained."""
    if isinstance(example, Pair):
        k = len(example.documents)
        prompt = simulator_prompt(tokenizer, prompts, example.request(), k, words)
        response = format_documents([neutralize(text, tokenizer) for text in example.documents])
    else:  # a whole prompt: no system part, no heading; its line breaks are kept
        texts = {name: "\n".join(neutralize(line, tokenizer) for line in text.split("\n"))
                 for name, text in example.items() if name in ("prompt", "response")}
        prompt, response = prompt_ids(tokenizer, "", texts["prompt"]), texts["response"]
    target = encode(tokenizer, response) + [tokenizer.eos_token_id]
    return Sequence(prompt + target, [0] * len(prompt) + [1] * len(target))


@dataclass(frozen=True, kw_only=True)
class TuningSettings(FolderSettings, CommonSettings):
    """What supervised training takes, of the simulator here and of the policy's warm start."""

    model: str = option("smollm2", f"{MODEL}.")
    epochs: int = option(1, "Passes over the data.", low=1)
    lr: float = option(1e-6, "Peak learning rate.", above=0)
    batch_size: int = option(8, "Sequences per step.", low=1)
    batch_tokens: int = option(4096, "Tokens per micro-batch; shared prefixes count once.", low=1)
    save_every: int = option(200, "Steps between checkpoints.", low=1, resumable=True)


def train_supervised(accelerator: Accelerator, model, sequences: list[Sequence],
                     s: TuningSettings, checkpoints: Checkpoints) -> None:
    """Maximum likelihood of the trained tokens, in place; all tokens of a step weigh the same.

    Appends one line per step to OUT/metrics.jsonl: loss in nats per token."""
    if not sequences:
        raise UserError("there is nothing to train on")
    scorer = TokenScorer(model.train())
    steps = draw_batches(len(sequences), s)
    factor = warmup_and_decay(len(steps))
    scorer, optimizer, schedule = prepare_trained(accelerator, scorer, s.lr, factor)
    if s.resume:
        checkpoints.go_on()
    with progress_bar() as bar:
        task = bar.add_task("training", total=len(steps), completed=checkpoints.done, info="")
        for step in range(checkpoints.done, len(steps)):
            checkpoints.allow_abort()  # until `forbid_abort` a signal drops the step
            started, batch = time.perf_counter(), [sequences[i] for i in steps[step]]
            loss = supervised_gradient(accelerator, scorer, batch, s.batch_tokens)
            if not torch.isfinite(loss):
                raise UserError(f"the loss is {loss.item()} at step {step}: try a lower --lr")
            accelerator.clip_grad_norm_(scorer.parameters(), 1.0)
            checkpoints.forbid_abort()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            metrics = {"step": step, "loss": loss.item(), "tokens": sum(len(q.ids) for q in batch)}
            if accelerator.is_main_process:
                seconds = time.perf_counter() - started
                append_jsonl(s.out / "metrics.jsonl", [metrics | {"time/step": seconds}])
            checkpoints.step_done(step + 1, of=len(steps))
            bar.update(task, advance=1, info=f"loss {loss.item():.3f}")
    model.eval()


def draw_batches(count: int, s: TuningSettings) -> list[list[int]]:
    """Indices of each step's sequences: every epoch in an order of its own."""
    order: list[int] = []
    for epoch in range(s.epochs):
        order += random.Random(draw_seed(s.seed, epoch)).sample(range(count), count)
    return [order[i : i + s.batch_size] for i in range(0, len(order), s.batch_size)]


def warmup_and_decay(steps: int) -> Callable[[int], float]:
    """The learning rate's factor at a step: up over the first 5 %, then linearly towards 0."""
    rising = max(1, steps // 20)
    return lambda step: min((step + 1) / rising, (steps - step) / (steps - rising + 1))


def supervised_gradient(accelerator: Accelerator, scorer, batch: list[Sequence],
                        budget: int) -> torch.Tensor:
    """Leave the gradient of the mean loss over the batch's trained tokens; returns that loss."""
    total = sum(sum(sequence.mask[1:]) for sequence in batch)
    mine = batch[accelerator.process_index :: accelerator.num_processes]
    loss = torch.zeros((), device=accelerator.device)
    for part in Worker(accelerator).micro_batches(mine, budget, scorer):
        ids, mask = collate([mine[i] for i in part] or [NOTHING], accelerator.device)
        logprobs, _ = scorer(ids, mask)
        part_loss = -logprobs.sum() / total * bool(part)
        accelerator.backward(part_loss * accelerator.num_processes)  # ranks' gradients are averaged
        loss += part_loss.detach()
    return accelerator.reduce(loss)


def fine_tune(accelerator: Accelerator, model, tokenizer, sequences: list[Sequence],
              folder: RunFolder) -> None:
    """Train a loaded model on sequences, and save it in OUT/model."""
    s: TuningSettings = folder.s
    folder.open()
    accelerator.wait_for_everyone()
    transformers.set_seed(s.seed)
    console.print(f"{len(sequences)} sequences, {sum(len(q.ids) for q in sequences):,} tokens, "
                  f"{sum(sum(q.mask) for q in sequences):,} of them trained")
    checkpoints = Checkpoints(accelerator, s.out, s.save_every)
    with checkpoints.stoppable():
        train_supervised(accelerator, model, sequences, s, checkpoints)
        checkpoints.end(model, tokenizer)


@dataclass(frozen=True, kw_only=True)
class SimulatorTrainSettings(TuningSettings):
    pairs: Path = argument("The tuning set: of label, or JSONL of prompt and response.")
    words: int = option(25, "Words per document, as the prompt asks.", low=1)
    temperature: float = option(0.8, "At which it will be asked; saved with the model.", low=0)


@command(app, SimulatorTrainSettings)
def train(s: SimulatorTrainSettings) -> None:
    """Fine-tune a model into a search engine whose quality is switched by its prompt; it goes to
    OUT/model."""
    examples, prompts = read_tuning_set(s.pairs), load_prompts(s.prompts)
    accelerator = make_accelerator()
    with RunFolder(s, prompts, accelerator.is_main_process, pairs=s.pairs) as folder:
        tokenizer, model = load_tokenizer(s.model), load_model(s.model)
        model.config.simulator = {"words": s.words, "temperature": s.temperature}
        sequences = [tuning_sequence(example, tokenizer, prompts["simulator"], s.words)
                     for example in examples]
        fine_tune(accelerator, model, tokenizer, sequences, folder)


# ---------------------------------------------------------------- probe, search


@dataclass(frozen=True, kw_only=True)
class ProbeSettings(SimulatorSettings):
    pairs: Path = argument("Pairs (written by label) of questions the simulator was not tuned on.")
    simulator: str = option(help=f"The simulator: {MODEL_OR_SERVER}.")
    out: Path | None = option(None, "Write the figures to this JSON file.")


@command(app, ProbeSettings)
def probe(s: ProbeSettings) -> None:
    """Measure a simulator: the share of useful, and of noisy, outputs that hold what is asked."""
    pairs = read_pairs(s.pairs)
    engine = load_simulator(s, k=len(pairs[0].documents))
    results = []
    with progress_bar() as bar:
        task = bar.add_task("probe", total=len(pairs), info="")
        for start in range(0, len(pairs), 64):
            batch = pairs[start : start + 64]
            requests = [pair.request(draw_seed(s.seed, start + i)) for i, pair in enumerate(batch)]
            results += engine.ask(requests)  # no retry: what does not parse counts
            if errors := [result.error for result in results if result.error]:
                raise UserError(errors[0])
            bar.update(task, advance=len(batch))
    show_probe(figures := probe_figures(pairs, results))
    if s.out:
        write_json(s.out, figures)


def probe_figures(pairs: list[Pair], results: list[SearchResult]) -> dict[str, Any]:
    """Shares (0 to 1) of outputs that hold the query's answer, by quality and kind of query.

    gives_away: the share of outputs for bridge queries that hold the question's answer."""
    held, early = {}, []
    for pair, result in zip(pairs, results, strict=True):
        text, is_final = "\n".join(result.documents), pair.target == pair.golden_answers
        kind = f"{pair.quality}/{'final' if is_final else 'bridge'}"
        held.setdefault(kind, []).append(contains_answer(text, pair.target))
        if not is_final:
            early.append(contains_answer(text, pair.golden_answers))
    words = [len(text.split()) for result in results for text in result.documents]
    return {
        "holds_answer": {kind: {"share": float(np.mean(values)), "n": len(values)}
                         for kind, values in sorted(held.items())},
        "gives_away": {"share": float(np.mean(early)) if early else 0.0, "n": len(early)},
        "parses": float(np.mean([result.well_formed for result in results])),
        "words_per_document": float(np.mean(words)) if words else 0.0,
        "n": len(pairs),
    }


@dataclass(frozen=True, kw_only=True)
class OneSearchSettings(SearchSettings):
    query: str = argument("What to search for.")
    simulator: str | None = option(DEMO_SIMULATOR, f"The simulator: {MODEL_OR_SERVER}.")
    question: str = option("", "simulator: the user's question.")
    answer: list[str] = option((), "simulator: its true answer (repeatable).")


@command(app, OneSearchSettings)
def search(s: OneSearchSettings) -> None:
    """Send one query to an engine, print what it finds; a simulator answers in both qualities."""
    engine, simulated = ENGINES[s.engine].make(s), ENGINES[s.engine].simulated
    if engine is None:
        raise UserError(f"--engine {s.engine} answers no search")
    requests = [SearchRequest(s.query)]
    if simulated:
        requests = [SearchRequest(s.query, s.question or s.query, tuple(s.answer), quality, s.seed)
                    for quality in ("useful", "noisy")]
    for request, result in zip(requests, engine.search(requests), strict=True):
        if result.error:
            raise UserError(result.error)
        title = f"{s.engine}, {request.quality}" if simulated else s.engine
        found = format_documents(result.documents) or "nothing found"
        print(plain(f"{s.query}  ({title})\n{found}\n"))


if __name__ == "__main__":
    run_cli(app)

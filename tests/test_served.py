"""Models on a server: token-exact, shared by replicas, and refused where ids do not come back."""

import json
from types import SimpleNamespace

import pytest
from helpers import PROMPTS, command, question, read_lines

import evaluate
import sft_simulator as sim
from plumbing import served
from plumbing.cli import UserError
from plumbing.engines import SearchRequest
from plumbing.generate import Sampling
from plumbing.models import simulator_tuning
from plumbing.remote import OutsideError, RetryPolicy, in_threads
from plumbing.served import ServerGenerator, from_vllm, load_generator
from plumbing.text import encode

QUICK = RetryPolicy(timeout=5, attempts=3, first_wait=0.02, longest_wait=0.2)


def vllm(folder, tokenizer, *, ids=True, name="served"):
    """A server like vLLM's, without `ids` like any other: its text tells prompt and seed."""

    def behave(handler, body):
        if handler.path == "/v1/models":
            return handler.reply({"data": [{"id": name, "root": str(folder)}]})
        assert handler.path == "/v1/completions" and body["model"] == name
        stop = (body["stop"] or [None])[0]
        text = f"1. {body['seed']} a\n2. {len(body['prompt'])} b{stop or ''}"
        tokens = encode(tokenizer, text) + [tokenizer.eos_token_id] * (not stop)
        choice = {"text": text, "finish_reason": "stop", "stop_reason": stop}
        if len(tokens) > body["max_tokens"]:
            tokens = tokens[: body["max_tokens"]]
            text = tokenizer.decode(tokens)
            choice = {"text": text, "finish_reason": "length", "stop_reason": None}
        if ids and body["return_token_ids"]:
            choice["token_ids"] = tokens
        if body.get("logprobs") is not None:
            choice["logprobs"] = {"token_logprobs": [-0.5] * len(tokens)}
        return handler.reply({"choices": [choice]})

    return behave


def completions(server):
    return sum(path == "/v1/completions" for path, *_ in server.calls)


def test_a_served_name_that_is_no_model_here_says_what_to_do(serve, tokenizer, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    server = serve(vllm("/no/such/folder", tokenizer, name="Simulation_LLM_3B"))
    with pytest.raises(UserError, match="its tokenizer is needed here, too: put a folder"):
        load_generator(f"{server.url}/v1")


def test_served_generations_are_token_exact(serve, tiny, tokenizer):
    server = serve(vllm(tiny, tokenizer))
    generator = load_generator(f"{server.url}/v1")
    assert generator.tokenizer.get_vocab() == tokenizer.get_vocab()
    prompts, sampling = [[5, 6], [7, 8, 9]], Sampling(50, 0.7, ("</search>",))
    stopped, _ = generator.generate(prompts, sampling, [11, 12])
    assert tokenizer.decode(stopped.ids) == "1. 11 a\n2. 2 b</search>"
    assert stopped.stop_reason == "stop" and stopped.logprobs == [-0.5] * len(stopped.ids)
    cut = generator.generate(prompts, Sampling(4), [1, 2])
    assert [(g.stop_reason, len(g.ids)) for g in cut] == [("length", 4)] * 2
    (whole,) = generator.generate(prompts[:1], Sampling(99), [3])
    assert whole.stop_reason == "eos" and whole.ids[-1] == tokenizer.eos_token_id
    body = next(body for *_, body, _ in server.calls if body.get("seed") == 11)
    # The model's own generation_config must not bend the distribution that is trained.
    wanted = {"top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0,
              "include_stop_str_in_output": True, "return_token_ids": True,
              "prompt": [5, 6], "temperature": 0.7, "max_tokens": 50}
    assert wanted.items() <= body.items()
    with pytest.raises(UserError, match="no new weights"):
        generator.load_weights([])


def test_a_policy_needs_token_ids_and_a_simulator_does_not(serve, tiny, tokenizer):
    url = f"{serve(vllm(tiny, tokenizer, ids=False)).url}/v1"
    (refused,) = load_generator(url).generate([[5]], Sampling(50), [0])
    assert "no token ids" in refused.error and refused.ids == []
    (generation,) = load_generator(url, needs_ids=False).generate([[5]], Sampling(50), [4])
    assert tokenizer.decode(generation.ids) == "1. 4 a\n2. 1 b<|im_end|>"
    assert generation.stop_reason == "eos"


def test_replicas_share_the_work_and_stand_in_for_each_other(serve, tiny, tokenizer):
    servers = [serve(vllm(tiny, tokenizer)) for _ in range(3)]
    urls = [f"{server.url}/v1" for server in servers]
    generator = ServerGenerator(urls, retry_policy=QUICK)
    prompts, seeds = [[5] * (1 + i) for i in range(30)], list(range(30))
    expected = [f"1. {i} a\n2. {1 + i} b<|im_end|>" for i in range(30)]
    together = generator.generate(prompts, Sampling(50), seeds)
    assert [tokenizer.decode(g.ids) for g in together] == expected
    assert [completions(server) for server in servers] == [10, 10, 10]
    servers[1].stop()
    one = in_threads(lambda i: generator.generate([prompts[i]], Sampling(50), [i])[0], seeds, 16)
    assert [tokenizer.decode(g.ids) for g in one] == expected
    with pytest.raises(UserError, match="different models"):
        ServerGenerator([urls[0], serve(vllm(tiny, tokenizer, name="other")).url + "/v1"])


def test_a_replica_that_is_down_at_the_start_is_set_aside(serve, tiny, tokenizer, capsys):
    down, sound = (serve(vllm(tiny, tokenizer)) for _ in range(2))
    down.stop()
    generator = load_generator(f"{down.url}/v1,{sound.url}/v1", needs_ids=False)
    assert simulator_tuning(f"{down.url}/v1,{sound.url}/v1") == {}
    generator.generate([[5]] * 3, Sampling(50), [0, 1, 2])
    assert completions(sound) == 3
    (said,) = [line for line in capsys.readouterr().err.splitlines() if "set aside" in line]
    assert said.startswith(down.url) and "connection failed" in said
    sound.stop()
    with pytest.raises(OutsideError, match="connection failed"):
        load_generator(f"{down.url}/v1,{sound.url}/v1")


def test_a_text_of_25_megabytes_is_cut_before_it_is_encoded(serve, tiny, tokenizer, monkeypatch):
    choice = {"text": "1. word " * 3_000_000, "finish_reason": "stop"}
    sound = vllm(tiny, tokenizer)
    server = serve(lambda handler, body: handler.reply({"choices": [choice]})
                   if "prompt" in body else sound(handler, body))
    generator, seen = load_generator(f"{server.url}/v1", needs_ids=False), []
    monkeypatch.setattr(served, "encode", lambda t, text: seen.append(text) or encode(t, text))
    (generation,) = generator.generate([[5]], Sampling(600), [0])
    assert len(generation.ids) == 600 and generation.stop_reason == "length"
    assert len(seen[0]) <= 600 * 128


def test_an_odd_answer_costs_a_served_policy_one_question(serve, tiny, tokenizer, jsonl, tmp_path):
    """Whatever the method: the question is left out, as if its search had failed."""
    sound = vllm(tiny, tokenizer)

    def behave(handler, body):
        if "prompt" in body and "Question 1?" in tokenizer.decode(body["prompt"]):
            return handler.reply({"error": "no"}, 400)
        return sound(handler, body)

    name, rows = f"{serve(behave).url}/v1", jsonl("rows.jsonl", [question(i) for i in range(3)])
    for method in evaluate.METHODS:
        out = tmp_path / method
        options = ["--model", name, "--data", rows, "--out", out, "--method", method]
        options += ["--engine", "none" if method in ("agent", "direct", "cot") else "bm25"]
        command(evaluate, "run", *options, "--failed-searches", 1, "--max-searches", 1)
        lines = read_lines(out / "predictions.jsonl")
        assert [line["end"] == "failed" for line in lines] == [False, True, False], method
        assert "HTTP 400" in lines[1]["error"]
        assert json.loads((out / "results.json").read_text())["n"] == 2


def test_a_served_simulator(serve, tiny, tokenizer, tmp_path):
    sound = vllm(tiny, tokenizer)
    server = serve(lambda handler, body: handler.reply({}, 400) if body.get("seed") == 8
                   else sound(handler, body))
    generator = ServerGenerator([f"{server.url}/v1"], needs_ids=False, retry_policy=QUICK)
    engine = sim.SimulatedEngine(generator, 2, PROMPTS)
    good, bad, other = engine.search([SearchRequest("q", seed=seed) for seed in (7, 8, 9)])
    assert good.documents[0] == "7 a" and other.documents[0] == "9 a"
    assert good.well_formed and not good.error
    assert bad.documents == [] and "HTTP 400" in bad.error
    assert completions(server) == 3  # a failure is not a malformed output: it is asked for once
    assert good.completion_tokens == len(f"1. 7 a\n2. {good.prompt_tokens} b") + 1
    (tmp_path / "config.json").write_text('{"simulator": {"words": 9}}')
    assert simulator_tuning(f"{serve(vllm(tmp_path, tokenizer)).url}/v1") == {"words": 9}
    assert simulator_tuning(f"{server.url}/v1") == {}


def test_the_key_of_a_server_is_sent_and_never_shown(serve, monkeypatch, tiny, tokenizer):
    key = "0123456789abcdefSECRET"
    monkeypatch.setenv("OPENAI_API_KEY", key)
    sound, refusing = serve(vllm(tiny, tokenizer)), serve(lambda handler, body: handler.reply(
        {"error": f"who is {handler.headers['Authorization']}?"}, 401))
    load_generator(f"{sound.url}/v1").generate([[5]], Sampling(9), [0])
    with pytest.raises(OutsideError, match="who is") as error:
        load_generator(f"{refusing.url}/v1")
    assert key not in str(error.value) and len(sound.calls) >= 2
    for *_, headers in sound.calls + refusing.calls:
        assert headers["Authorization"] == f"Bearer {key}"


@pytest.mark.parametrize("finish,stop,reason", [
    ("stop", None, "eos"), ("stop", 128009, "eos"), ("stop", "</search>", "stop"),
    ("length", None, "length")])
def test_why_vllm_stopped(finish, stop, reason):
    """It names a further end-of-sequence id, of generation_config.json, by its number."""
    output = SimpleNamespace(token_ids=[7], logprobs=[{7: SimpleNamespace(logprob=-1.0)}],
                             finish_reason=finish, stop_reason=stop)
    assert from_vllm(output).stop_reason == reason

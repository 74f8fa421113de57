"""What people type wrong: each in one line that knows the next step, and nothing is lost."""

import json
import sys

import pytest
from helpers import ROOT, one_line, question, trajectory
from rich.console import Console

import costs
import evaluate
import sft_simulator as sim
import train_rl as rl
from plumbing import cli, models, text

TRAIN = ["train", "--data", "data.jsonl", "--model", "tiny", "--simulator", "tiny",
         "--out", "old", "--overwrite"]
REAL = [part for part in TRAIN if part not in ("--simulator",)][:5] + [*TRAIN[7:], "--engine"]
RUN = ["run", "--data", "data.jsonl", "--out", "old", "--overwrite", "--model"]
SEARCH = ["search", "capital of Peru"]
LABEL = ["label", "--out", "old/pairs.jsonl"]
REWORDED = [*RUN, "tiny", "--engine", "none", "--prompts"]

WRONG = [
    # the next step
    (evaluate, [*RUN, "trained"], "no model in trained: did you mean trained/model?"),
    (evaluate, [*RUN, "runs/demo/after-rl"], "did you mean runs/demo/after-rl/model?"),
    (evaluate, [*RUN, "runs/demo/policy/model"], "`make demo` makes those of the demo"),
    (evaluate, [*RUN, "runs/demo-quick/x/model"], "`make demo-quick` makes those of the demo"),
    (evaluate, [*RUN, "runs/nothing"], "there is no model in runs/nothing"),
    (rl, [*TRAIN, "--simulator", "trained"], "did you mean trained/model?"),
    (sim, [*LABEL, "silent.jsonl"], "made no search in 2 episodes"),
    (sim, [*LABEL, "lucky.jsonl"], "1 useful and 0 noisy queries with 3 documents"),
    # templates
    (evaluate, [*REWORDED, "unknown.toml"], "policy.user: unknown {qestion}; there are {question}"),
    (evaluate, [*REWORDED, "lacks.toml"], "policy.user: lacks {question}"),
    (evaluate, [*REWORDED, "table.toml"], "polcy is no table of data/prompts.toml"),
    (evaluate, [*REWORDED, "flat.toml"], "policy is no table of data/prompts.toml"),
    (evaluate, [*REWORDED, "name.toml"], "no template policy.usr: there are system, user"),
    (evaluate, [*REWORDED, "number.toml"], "policy.user must be a text"),
    (evaluate, [*REWORDED, "notice.toml"], "policy.notice: unknown {question}; there are none"),
    (evaluate, [*REWORDED, "rag.toml"], "rag.user: lacks {question}"),
    (rl, [*TRAIN, "--prompts", "deaf.toml"], "simulator.system and user and heading: lacks one of"),
    (rl, [*TRAIN, "--prompts", "query.toml"], "lacks {query}"),
    (rl, [*TRAIN, "--prompts", "no.toml"], "no.toml"),
    # data
    (rl, [*TRAIN, "--data", "numbers.jsonl"], "numbers.jsonl:1: question must be a text, not 7"),
    (sim, [*SEARCH, "--corpus", "passages.jsonl"], "passages.jsonl:1: text must be a text, not 7"),
    # options that would do nothing
    (rl, [*TRAIN, "--gamma", 0.9], "--gamma has no effect with --algorithm grpo"),
    (rl, [*TRAIN, "--critic", "tiny"], "--critic has no effect with --algorithm grpo"),
    (rl, [*TRAIN, "--algorithm", "ppo", "--baseline", "none"], "--algorithm ppo"),
    (rl, [*TRAIN, "--algorithm", "ppo", "--no-scale-rewards"], "--scale-rewards has no effect"),
    (rl, [*TRAIN, "--curriculum", "constant", "--base", 2], "--base has no effect with --curr"),
    (rl, [*TRAIN, "--curriculum", "random", "--base", 2], "--base has no effect with --curr"),
    (rl, [*TRAIN, "--corpus", "passages.jsonl"], "--corpus has no effect with --engine simulator"),
    (rl, [*TRAIN, "--eval-limit", 3], "--eval-limit has no effect without --eval-every"),
    (rl, [*REAL, "bm25", "--p-end", 0.2], "--p-end has no effect with --engine bm25"),
    (rl, [*REAL, "none", "--simulator", "tiny"], "--simulator has no effect with --engine none"),
    (rl, ["schedule", "--curriculum", "constant", "--p-start", 0.1], "--p-start has no effect"),
    (evaluate, [*RUN, "tiny", "--url", "http://a/retrieve"], "--url has no effect"),
    (sim, [*SEARCH, "--question", "What?"], "--question has no effect with --engine bm25"),
    (sim, [*LABEL, "silent.jsonl", "--judge-model", "x"], "--judge-model has no effect without"),
    (costs, ["plan", "--hours", 2, "--utilisation", 0.5], "--utilisation has no effect where"),
    # what is missing
    (rl, ["train"], "missing: --out, --data"),
    (rl, ["train", "--preset", "paper-qwen2.5-3b", "--out", "old"], "missing: --data"),
    (sim, ["label"], "missing: PREDICTIONS, --out"),
    (evaluate, ["compare", "old"], "missing: B"),
    (evaluate, ["run"], "missing: --out, --model"),
    # ten more
    (rl, [*TRAIN, "--stpes", 3], "--stpes"),
    (rl, [*TRAIN, "--steps", "many"], "--steps"),
    (rl, [*TRAIN, "--algorithm", "PPO"], "there are reinforce, grpo, ppo, reinforce++"),
    (rl, [*TRAIN, "--preset", "paper"], "--preset paper: there are"),
    (rl, ["trian"], "trian"),
    (rl, [*TRAIN, "--simulator", "old/model"], "lies in old, which --overwrite would replace"),
    (evaluate, ["run", "--benchmark", "squad", "--model", "tiny", "--out", "old"], "squad"),
    (evaluate, ["score", "old"], "predictions.jsonl: no such file"),
    (sim, ["train", "data.jsonl", "--out", "old", "--overwrite"], "data.jsonl:1: no field"),
    (costs, ["run", "trained"], "config.json"),
]


@pytest.fixture
def workplace(tmp_path, monkeypatch, jsonl, tiny):
    """A working directory with a finished run, data and templates."""
    monkeypatch.chdir(tmp_path)
    for module in (models, text):  # `make demo` would leave its runs here
        monkeypatch.setattr(module, "ROOT", tmp_path)
    for folder in ("old/model", "trained/model", "runs/demo/after-rl/model"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "model.safetensors").write_text("weights")
    for folder in ("old", "trained", "runs/demo/after-rl"):
        (tmp_path / folder / "config.json").write_text('{"settings": {}}')
    (tmp_path / "tiny").symlink_to(tiny)
    jsonl("data.jsonl", [question(i) for i in range(64)])
    jsonl("numbers.jsonl", [question() | {"question": 7}])
    jsonl("passages.jsonl", [{"title": "Peru", "text": 7}])
    jsonl("silent.jsonl", [trajectory(None, [])] * 2)
    jsonl("lucky.jsonl", [trajectory("q", ["gold", "b", "c"])])
    simulator = '[simulator]\nsystem = ""\nheading = ""\nuser = '
    for name, toml in {
            "unknown": '[policy]\nuser = "{qestion}"', "lacks": '[policy]\nuser = "Answer!"',
            "table": '[polcy]\nuser = "{question}"', "flat": 'policy = "{question}"',
            "name": '[policy]\nusr = "{question}"', "number": "[policy]\nuser = 7",
            "notice": '[policy]\nnotice = "No, {question}"', "rag": '[rag]\nuser = "{documents}"',
            "deaf": simulator + '"{query}"', "query": simulator + '"{quality} {question}"'}.items():
        (tmp_path / f"{name}.toml").write_text(toml)
    return tmp_path


@pytest.mark.parametrize(("module", "arguments", "says"), WRONG, ids=lambda x: str(x)[-60:])
def test_a_wrong_usage_is_one_line_and_nothing_is_lost(
        workplace, capsys, monkeypatch, module, arguments, says):
    before = {path: path.read_bytes() for path in workplace.rglob("*") if path.is_file()}
    assert says in one_line(capsys, monkeypatch, module, *arguments)
    after = {path: path.read_bytes() for path in workplace.rglob("*") if path.is_file()}
    assert after == before


@pytest.mark.parametrize("module", [costs, sim, rl, evaluate])
def test_the_examples_of_help_can_be_copied_at_80_columns(module, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    module.app(["--help"], standalone_mode=False)
    shown = capsys.readouterr().out.splitlines()
    lines = [line for line in module.__doc__.splitlines() if line.startswith("    ")]
    assert any("python" in line for line in lines)
    assert not [line for line in lines if f"  {line}" not in shown]
    assert max(map(len, shown)) <= 80


def test_off_a_terminal_a_stage_logs_a_line_a_step(capsys, monkeypatch):
    monkeypatch.setattr(cli, "console", Console(file=sys.stdout, force_terminal=False))
    with cli.progress_bar() as bar:
        task = bar.add_task("training", total=3, info="")
        bar.update(task, advance=1, info="loss 2.5")
        monkeypatch.setenv("RANK", "1")  # another process logs nothing
        bar.update(task, advance=1, info="loss 2.4")
        monkeypatch.delenv("RANK")
        bar.update(task, completed=3, info="loss 2.3")
    assert capsys.readouterr().out == "training 1/3  loss 2.5\ntraining 3/3  loss 2.3\n"


def test_a_presets_values_and_shared_limits_are_no_wrong_usage(capsys):
    for more in (["--algorithm", "grpo"], ["--engine", "none"], ["--curriculum", "constant"]):
        given = ["--data", "x", "--out", "y", "--preset", "paper-qwen2.5-3b", "--show-config",
                 "--top-k", 3, "--max-searches", 3, "--observation-tokens", 200, *more]
        given += ["--simulator", "z"] if "none" not in more else []
        rl.app([*map(str, ["train", *given])], standalone_mode=False)
        assert json.loads(capsys.readouterr().out)["base"] == 4
    shared = evaluate.RunSettings(method="direct", engine="none", model="m", out=ROOT, data=ROOT)
    assert shared.unused() == {}  # results/demo/run.sh: one set of options for all methods


def test_every_registry_refuses_what_it_does_not_hold():
    batch = rl.Batch(rewards=None, groups=[], mask=None)
    with pytest.raises(KeyError):
        rl.reinforce(batch, rl.TrainSettings(data=ROOT, out=ROOT, baseline="None"))

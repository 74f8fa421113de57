"""What people type wrong: each in one line that knows the next step, and nothing is lost."""

import json
import sys

import pytest
from helpers import ROOT, data_script, one_line, question, trajectory
from rich.console import Console

import costs
import evaluate
import sft_simulator as sim
import train_rl as rl
from plumbing import cli, models, text

WORLD, SCRIPTED = data_script("world"), data_script("scripted")
TRAIN = ["train", "--data", "data.jsonl", "--model", "tiny", "--simulator", "tiny",
         "--out", "old", "--overwrite"]
REAL = [part for part in TRAIN if part not in ("--simulator",)][:5] + [*TRAIN[7:], "--engine"]
RUN = ["run", "--data", "data.jsonl", "--out", "old", "--overwrite", "--model"]
SEARCH = ["search", "capital of Peru"]
LABEL = ["label", "--out", "old/pairs.jsonl", "--overwrite"]
REWORDED = [*RUN, "tiny", "--engine", "none", "--prompts"]
NEW = ["run", "--data", "data.jsonl", "--model", "tiny", "--out", "new"]
GONE = [*TRAIN, "--model", "no/such-model"]  # loaded last: any other mistake is said before

WRONG = [
    # the next step
    (evaluate, [*RUN, "trained"], "no model in trained: did you mean trained/model?"),
    (evaluate, [*RUN, "runs/demo/after-rl"], "did you mean runs/demo/after-rl/model?"),
    (evaluate, [*RUN, "runs/demo/policy/model"], "`make demo` makes those of the demo"),
    (evaluate, [*RUN, "runs/demo-quick/x/model"], "`make demo-quick` makes those of the demo"),
    (evaluate, [*RUN, "runs/nothing"], "there is no model in runs/nothing"),
    (rl, [*TRAIN, "--simulator", "trained"], "did you mean trained/model?"),
    (sim, [*LABEL, "silent.jsonl"], "no turn of 2 episodes has a query"),
    (sim, ["label", "--out", "old", "lucky.jsonl"], "old is a folder: --out names a file"),
    (sim, ["label", "--out", "data.jsonl", "lucky.jsonl"], "is there already: --overwrite"),
    (sim, [*LABEL, "lucky.jsonl"], "1 useful and 0 noisy queries with 3 documents"),
    # templates
    (evaluate, [*REWORDED, "unknown.toml"], "policy.user: unknown {qestion}; there are {question}"),
    (evaluate, [*REWORDED, "lacks.toml"], "policy.user: lacks {question}"),
    (evaluate, [*REWORDED, "table.toml"], "polcy is no table of data/prompts.toml"),
    (evaluate, [*REWORDED, "name.toml"], "no template policy.usr: there are system, user"),
    (evaluate, [*REWORDED, "notice.toml"], "policy.notice: unknown {question}; there are none"),
    (evaluate, [*REWORDED, "rag.toml"], "rag.user: lacks {question}"),
    (rl, [*TRAIN, "--prompts", "deaf.toml"], "simulator.system and user and heading: lacks one of"),
    (rl, [*TRAIN, "--prompts", "query.toml"], "lacks {query}"),
    (rl, [*TRAIN, "--prompts", "no.toml"], "no.toml: No such file"),
    (rl, [*TRAIN, "--prompts", "data.jsonl"], "data.jsonl: not TOML"),
    # data; more in test_files.py
    (evaluate, NEW[:1] + NEW[3:], "NAME or --data FILE"),
    (evaluate, [*NEW, "--data", "old"], "old is a folder: name the questions: --benchmark NAME"),
    (evaluate, [*NEW, "--data", "data.jsonl", "--corpus", "old"], "old is a folder, where a file"),
    (evaluate, [*NEW, "--data", "none.jsonl"], "none.jsonl: no such file"),
    (evaluate, [*NEW, "--data", "twice.jsonl"], "an id occurs twice"),
    (evaluate, ["score", "wrong.jsonl"], "wrong.jsonl:1: answer"),
    (evaluate, ["score", "goldless.jsonl"], "no row can be used: no golden answer"),
    (evaluate, ["score", "data.jsonl"], "no field answer"),
    (evaluate, ["table", "old"], "not the results of"),
    (evaluate, ["report", "old", "--out", "new"], "neither metrics.jsonl nor results.json"),
    (sim, [*LABEL, "missing.jsonl"], "missing.jsonl: no such file"),
    (sim, [*LABEL, "empty.jsonl"], "empty.jsonl: empty file"),
    (sim, [*LABEL, "data.jsonl"], "data.jsonl:1: no field turns"),
    (sim, ["train", "blank.jsonl", "--out", "new"], "blank.jsonl:2: prompt and response"),
    (sim, ["train", "pairs.jsonl", "--model", "no/such-model", "--out", "new"], "no/such-model"),
    (rl, [*TRAIN, "--prompts-per-step", 65], "64 questions, fewer than --prompts-per-step"),
    # options that are out of bounds, or do not go together
    (rl, [*GONE, "--p-start", 1.5], "--p-start must be at least 0 and at most 1, not 1.5"),
    (rl, [*GONE, "--top-k", 0], "--top-k must be at least 1, not 0"),
    (rl, [*GONE, "--base", 0], "--base must be above 0, not 0"),
    (rl, [*GONE, "--lr", -1], "--lr must be above 0, not -1"),
    (rl, [*GONE, "--clip-low", -0.1], "--clip-low"),
    (rl, [*GONE, "--steps", 0], "--steps"),
    (rl, [*GONE, "--context-tokens", 10], "--context-tokens"),
    (rl, [*GONE, "--rollouts", 1], "grpo compares the rollouts"),
    (rl, [*GONE, "--rollouts", 1, "--algorithm", "reinforce"], "reinforce compares the rollouts"),
    (rl, [*GONE, "--eval-every", 2], "--eval-data"),
    (rl, [*GONE, "--keep-best"], "no best policy"),
    (rl, [*GONE, "--eval-every", 2, "--eval-data", "x", "--eval-engine", "http"],
     "--eval-engine http needs --url"),
    (rl, GONE, "no/such-model"),
    (rl, [*TRAIN[:5], "--out", "new"], "--simulator"),
    (rl, [*GONE, "--logger", "abacus"], "tensorboard"),
    (rl, [*GONE, "--logger", "dvclive"], "pip install dvclive"),
    (evaluate, [*NEW, "--top-k", 0], "--top-k must be at least 1, not 0"),
    (evaluate, [*NEW, "--limit", 0], "--limit"),
    (evaluate, [*NEW, "--resume"], "holds no run to resume"),
    (evaluate, [*NEW, "--method", "rag", "--engine", "none"], "can't serve it"),
    (evaluate, [*NEW, "--engine", "simulator"], "needs --simulator"),
    (evaluate, [*NEW, "--context-tokens", 500], "--context-tokens"),
    (evaluate, [*NEW, "--method", "guess"], "--method guess: there are agent"),
    (sim, [*SEARCH, "--top-k", 0], "--top-k must be at least 1, not 0"),
    (sim, [*SEARCH, "--engine", "bing"], "bing"),
    (sim, [*SEARCH, "--engine", "none"], "--engine none answers no search"),
    (costs, ["plan", "--gpu", "B9000"], "no price for device 'B9000'; known: A100-80GB"),
    (costs, ["plan", "--api", "askme"], "no price for search 'askme'; known: serpapi"),
    (costs, ["plan", "--steps", 0], "--steps must be above 0, not 0"),
    (costs, ["plan", "--simulator-gpus", -1], "--simulator-gpus must be above 0, not -1"),
    (costs, ["plan", "--hours", "nan"], "--hours must be above 0, not nan"),
    (costs, ["plan", "--hours", 1, "--seconds-per-step", 1], "not both"),
    (costs, ["plan", "--utilisation", 40], "at most 1"),
    (costs, ["plan", "--searches", "1e308"], "--searches must be at most 1e+15"),
    (costs, ["plan", "--steps", "1" + "0" * 400], "--steps must be at most 1e+15"),
    (costs, ["plan", "--gpu", "cpu-core"], "no bf16_tflops"),
    (costs, ["plan", "--prices", "nowhere.toml"], "nowhere.toml"),
    (costs, ["run", "old", "./old"], "a run is named twice"),
    (SCRIPTED, ["--hops", -1, 2, 3, "--out", "new"], "--hops"),
    (SCRIPTED, ["--skip", 1, -2, 3, "--out", "new"], "--skip"),
    (WORLD, ["check", "--out", "old"], "passages.jsonl"),
    # engines that lack something
    (sim, [*SEARCH, "--engine", "http"], "needs --url"),
    (sim, [*SEARCH, "--engine", "http", "--url", "localhost"], "needs --url"),
    (sim, [*SEARCH, "--engine", "serpapi"], "SERPAPI_API_KEY"),
    (rl, [*REAL, "http"], "needs --url"),
    (evaluate, [*NEW, "--engine", "http"], "needs --url"),
    (evaluate, ["ask", "x?", "--model", "tiny", "--engine", "http"], "needs --url"),
    # options that would do nothing
    (rl, [*TRAIN, "--gamma", 0.9], "--gamma has no effect with --algorithm grpo"),
    (rl, [*TRAIN, "--critic", "tiny"], "--critic has no effect with --algorithm grpo"),
    (rl, [*TRAIN, "--algorithm", "ppo", "--baseline", "none"], "--algorithm ppo"),
    (rl, [*TRAIN, "--critic-warmup-ratio", 0.1], "--critic-warmup-ratio has no effect with --alg"),
    (rl, [*TRAIN, "--algorithm", "ppo", "--no-scale-rewards"], "--scale-rewards has no effect"),
    (rl, [*TRAIN, "--curriculum", "constant", "--base", 2], "--base has no effect with --curr"),
    (rl, [*TRAIN, "--curriculum", "random", "--base", 2], "--base has no effect with --curr"),
    (rl, [*TRAIN, "--corpus", "passages.jsonl"], "--corpus has no effect with --engine simulator"),
    (rl, [*TRAIN, "--eval-limit", 3], "--eval-limit has no effect without --eval-every"),
    (rl, [*TRAIN, "--clip-high", 0.3], "--clip-high has no effect with one optimizer step"),
    (rl, [*TRAIN, "--mini-batch-size", 9999, "--clip-low", 0.1], "--clip-low has no effect with"),
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
    monkeypatch.delenv("SERPAPI_API_KEY", raising=False)
    for module in (models, text):  # `make demo` would leave its runs here
        monkeypatch.setattr(module, "ROOT", tmp_path)
    for folder in ("old/model", "trained/model", "runs/demo/after-rl/model"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "model.safetensors").write_text("weights")
    for folder in ("old", "trained", "runs/demo/after-rl"):
        (tmp_path / folder / "config.json").write_text('{"settings": {}}')
    (tmp_path / "tiny").symlink_to(tiny)
    jsonl("data.jsonl", [question(i) for i in range(64)])
    jsonl("twice.jsonl", [question()] * 2)
    jsonl("wrong.jsonl", [question(answer=3)])
    jsonl("goldless.jsonl", [question(answers=[], answer="y")])
    jsonl("empty.jsonl", [])
    jsonl("pairs.jsonl", [pair := {"prompt": "p", "response": "r"}])
    jsonl("blank.jsonl", [pair, pair | {"response": " "}])
    jsonl("passages.jsonl", [{"title": "Peru", "text": "Lima"}])
    jsonl("silent.jsonl", [trajectory(None, [])] * 2)
    jsonl("lucky.jsonl", [trajectory("q", ["gold", "b", "c"])])
    simulator = '[simulator]\nsystem = ""\nheading = ""\nuser = '
    for name, toml in {
            "unknown": '[policy]\nuser = "{qestion}"', "lacks": '[policy]\nuser = "Answer!"',
            "table": '[polcy]\nuser = "{question}"', "name": '[policy]\nusr = "{question}"',
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
    batch = rl.Batch(rewards=None, groups=[], mask=None, whiten=None)
    with pytest.raises(KeyError):
        rl.reinforce(batch, rl.TrainSettings(data=ROOT, out=ROOT, baseline="None"))

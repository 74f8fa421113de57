"""costs.py through its command line: the paper's figures, runs and plans by hand, bad input."""

import json
from decimal import Decimal
from pathlib import Path

import pytest
from helpers import command, one_line

import costs
from plumbing.cli import UserError
from plumbing.text import ROOT

PAPER = json.loads((ROOT / "data" / "paper.json").read_text(encoding="utf-8"))


@pytest.fixture
def ok(capsys):
    """Run a command of costs.py; its JSON, or the lines it prints with their spaces made single."""

    def run(*arguments) -> dict | list[str]:
        command(costs, *arguments)
        text = capsys.readouterr().out
        if "--json" in arguments:
            return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} in JSON"))
        return [" ".join(line.split()) for line in text.splitlines()]

    return run


# ---------------------------------------------------------------- the paper's figures


def test_each_average_is_the_mean_of_its_row():
    """In decimals, so that a tie at the third digit is not decided by binary fractions."""
    benchmarks = [name for name in PAPER["columns"] if name != "avg"]
    rows = [row for methods in PAPER["table3_main"].values() for row in methods.values()]
    rows += PAPER["table4_simulators"]["rows"].values()
    assert len(rows) == 33 + 8 and len(benchmarks) == 7
    for row in rows:
        mean = sum(Decimal(str(row[name])) for name in benchmarks) / 7
        assert abs(mean - Decimal(str(row["avg"]))) <= Decimal("0.005"), row


def test_table8_to_the_digit_that_the_paper_prints(ok):
    published = PAPER["table8_cost"]
    assert ok("paper", "--json")["rows"] == published["rows"]
    parts, _ = costs.table8()
    assert parts["searches"] == published["queries"] == 64_000
    assert parts["hours"] == published["hours"]
    a100 = costs.load_prices()["device"]["A100-80GB"]["usd_per_hour"]
    implied = published["derivation"]["gpu_usd_per_hour_implied"]
    assert parts["usd_per_gpu_hour"] == implied == a100
    assert costs.search_bill(64_000) == pytest.approx(586.6667, abs=1e-4)
    with pytest.raises(UserError):
        costs.search_bill(-1)


@pytest.mark.parametrize("line", [
    "64 prompts x 5 rollouts x 200 steps x 1 search = 64,000 searches",
    "Google 64,000 searches x $275 / 30,000 $586.7 0.0 %",
    "SFT-3B 1 A100 x 12 h x $1.475 $17.7 97.0 %", "SFT-7B 2 A100 x 12 h x $1.475 $35.4 94.0 %",
    "SFT-14B 4 A100 x 12 h x $1.475 $70.8 87.9 %",
    # With the policy's GPUs: 586.67 + 70.8 = 657.47, 70.8 + 70.8 = 141.6, 1 - 141.6 / 657.47
    "Google 64,000 searches x $275 / 30,000 + $70.8 $657.5 0.0 %",
    "SFT-14B 4 A100 x 12 h x $1.475 + $70.8 $141.6 78.5 %",
])
def test_table8_shows_its_sums_and_savings(ok, line):
    assert line in ok("paper")


# ---------------------------------------------------------------- runs

DATED = '\ndate = "2025-05"\nsource = "example"\n'
PRICES = DATED.join((
    "[search.serpapi]\nusd = 10.0\nsearches = 1000", "[search.cheap]\nusd = 1.0\nsearches = 1000",
    '[device.gpu]\nusd_per_hour = 3.6\nbf16_tflops = 1\nnames = ["Example GPU 80GB"]',
    "[device.cpu-core]\nusd_per_hour = 0.036", ""))
STEP = {"step": 1, "cost/searches": 500, "cost/simulator_prompt_tokens": 40_000,
        "cost/simulator_tokens": 20_000, "cost/policy_tokens": 30_000, "time/rollout": 100.0,
        "time/search": 50.0, "time/reference": 20.0, "time/update": 200.0, "time/sync": 10.0,
        "time/step": 400.0}
GPUS = {"device": "cuda", "name": "Example GPU 80GB", "count": 2}
CORES = {"device": "cpu", "name": "some processor", "count": 10}


@pytest.fixture
def prices(tmp_path) -> Path:
    path = tmp_path / "prices.toml"
    path.write_text(PRICES, encoding="utf-8")
    return path


def write_run(folder: Path, lines: list[dict] | str, engine="simulator", hardware=GPUS) -> Path:
    folder.mkdir(parents=True)
    config = {"settings": {"engine": engine, "algorithm": "grpo"}, "hardware": hardware}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    text = lines if isinstance(lines, str) else "".join(
        json.dumps(x | ({"step": i} if "step" in x else {})) + "\n" for i, x in enumerate(lines))
    (folder / "metrics.jsonl").write_text(text, encoding="utf-8")
    return folder


@pytest.mark.parametrize(("engine", "hardware", "changes", "bill"), [
    # 1,000 searches: $10. 2 x 50 s of waiting for them: $0.20. 2 x 400 s in all: $1.60.
    ("simulator", GPUS, {}, {
        "search_side": 0.2, "whole_run": 1.6, "whole_run_with_api": 1.6 - 0.2 + 10,
        "search_side_saving": 98, "whole_run_saving": 100 * (1 - 1.6 / 11.4)}),
    # Two searches, worth $0.02, wait 2 x 1,800 s on 10 cores at $0.036 an hour: $0.36.
    ("simulator", CORES, {"cost/searches": 1, "time/search": 1800, "time/step": 3600},
     {"search_side_saving": 100 * (1 - 0.36 / 0.02), "whole_run": 0.72}),
    # $10 for 1,000 searches, and $0.2 of waiting for them, which a prompt API would save.
    ("serpapi", GPUS, {}, {"search_side": 10.2, "search_side_saving": -2, "whole_run": 11.6}),
    ("none", GPUS, {"cost/searches": 0, "time/search": 0},
     {"search_side": 0, "search_side_saving": None, "whole_run_saving": 0}),
], ids=["saves", "loses money", "a real API is paid", "no search saves nothing"])
def test_a_run_by_hand(ok, tmp_path, prices, engine, hardware, changes, bill):
    """Two steps on 2 GPUs at $3.6 an hour, which is $0.001 a device-second, or on 10 cores."""
    folder = write_run(tmp_path / "one", [STEP | changes] * 2, engine, hardware)
    (cost,) = ok("run", folder, "--prices", prices, "--json")["runs"]
    assert {key: cost["bill"][key] for key in bill} == pytest.approx(bill)
    assert cost["paid_usd"] == pytest.approx(10 if engine == "serpapi" else 0)
    assert cost["device"] == ("cpu-core" if hardware is CORES else "gpu")
    assert cost["tokens"] == {"policy_tokens": 60_000, "simulator_prompt_tokens": 80_000,
                              "simulator_tokens": 40_000}
    assert cost["steps"] == 2 and cost["notes"] == []


def test_costs_of_runs_add_up_in_every_column(ok, tmp_path, prices, monkeypatch):
    """On 1 and on 2 GPUs at $0.001 a second; the second run has paid $1 to the API it searched."""
    monkeypatch.chdir(tmp_path)
    step = {"cost/searches": 1000, "cost/policy_tokens": 1, "cost/simulator_prompt_tokens": 20,
            "cost/simulator_tokens": 300, "time/step": 1000, "time/rollout": 100,
            "time/search": 200, "time/reference": 300, "time/update": 150, "time/sync": 50}
    write_run(Path("a/run"), json.dumps(step) + "\n{", hardware=GPUS | {"count": 1})
    write_run(Path("b/run"), [step, {"time/sync": 0}], engine="cheap")
    lines = ok("run", "a/run", "b/run", "--prices", prices)
    for line in (
        "run engine searches simulated in out serpapi cheap",
        "a/run simulator 1,000 20 300 $10.00 $1.00", "b/run cheap 1,000 20 300 $10.00 $1.00",
        "sum 2,000 40 600 $20.00 $2.00", "run rollout search reference update sync other step",
        "b/run 200.0 400.0 600.0 300.0 100.0 400.0 2,000.0",
        "sum 300.0 600.0 900.0 450.0 150.0 600.0 3,000.0",
        "$0.30 $0.60 $0.90 $0.45 $0.15 $0.60 $3.00",
        "run search side serpapi saved whole run with serpapi saved",
        "a/run $0.20 $10.00 98.0 % $1.00 $10.80 90.7 %",
        "b/run $1.40 $10.00 86.0 % $3.00 $11.60 74.1 %",
        "sum $1.60 $20.00 92.0 % $4.00 $22.40 82.1 %",
        "a/run: 1 x gpu at $3.6 an hour", "b/run: 2 x gpu at $3.6 an hour",
        "a/run: metrics.jsonl, line 2: cut off, as a killed process leaves it; skipped",
    ):
        assert line in lines, line


def test_what_is_not_reported_is_never_zero(ok, tmp_path, prices):
    absent = STEP | {"cost/searches": None, "time/reference": None}
    folder = write_run(tmp_path / "partial", [absent, absent | {"time/sync": None}])
    (cost,) = ok("run", folder, "--prices", prices, "--json")["runs"]
    assert cost["searches"] is None and cost["api_usd"] == {"serpapi": None, "cheap": None}
    assert cost["device_seconds"]["reference"] is None and cost["device_seconds"]["sync"] == 20
    assert cost["bill"]["search_side"] == pytest.approx(0.2)
    assert cost["bill"]["search_side_saving"] is None
    lines = ok("run", folder, "--prices", prices)
    assert f"{folder}: not reported: cost/searches, time/reference" in lines
    assert (f"{folder}: not reported by every step, so the sum is a lower bound: "
            "time/sync (1 of 2)") in lines
    assert "partial simulator - 80,000 40,000 - -" in lines


# ---------------------------------------------------------------- a plan


def test_plan_breaks_even_where_the_hand_does(ok):
    """The paper's set-up: 4 GPUs x 12 h x $1.475 = $70.80 buy 70.8 / (275 / 30,000) searches."""
    lines = ok("plan", "--hours", 12)
    for line in ("200 steps x 64 prompts x 5 rollouts x 1 searches = 64,000 searches",
                 "search side $586.67 $70.80 87.9 %", "whole run $657.47 $141.60 78.5 %",
                 "Break-even: $70.80 / $0.00916667 a search = 7,724 searches",
                 "1,000 $9.17 $70.80 serpapi", "10,000 $91.67 $70.80 simulator",
                 # past the 64,000 planned ones the rent grows in proportion: 70.8 x 10^8 / 64,000
                 "100,000,000 $916,666.67 $110,625.00 simulator"):
        assert line in lines
    assert ok("plan", "--seconds-per-step", 216) == lines


@pytest.mark.parametrize(("length", "lines"), [
    (["--hours=2"], [
        "2 steps x 3 prompts x 5 rollouts x 4 searches = 120 searches", "cheap simulator saved",
        "2.00 h on gpu at $3.6 an hour for each GPU", "search side $0.12 $7.20 -5900.0 %",
        "policy's GPUs $28.80 $28.80", "whole run $28.92 $36.00 -24.5 %",
        "No break-even: a simulated search costs $0.06, one at cheap $0.001",
        "searches cheap simulator cheaper", "1,000 $1.00 $60.00 cheap"]),
    (["--seconds-per-step=1800"], ["1.00 h on gpu at $3.6 an hour for each GPU"]),
    # 30 x 100 x 10 x 4e11 = 1.2e16 and 120 x 25 x 2 x 1e11 = 6e14, at 0.5e12 a second and GPU
    (["--policy-params=4e11", "--episode-tokens=100", "--simulator-params=1e11",
      "--search-tokens=25", "--utilisation=0.5"], [
        "/ (4 GPUs x 1 TFLOP/s x 0.5) = 1.67 h", "/ (1 GPUs x 1 TFLOP/s x 0.5) = 0.33 h",
        "2.00 h on gpu at $3.6 an hour for each GPU",
        # 4 GPUs at $3.6: with an API, which answers at once, for the policy's 1.67 h alone
        "policy's GPUs $24.00 $28.80", "whole run $24.12 $36.00 -49.3 %"]),
], ids=["hours", "seconds", "flop"])
def test_plan_takes_each_option(ok, prices, length, lines):
    printed = ok("plan", "--prices", prices, "--steps=2", "--prompts=3", "--rollouts=5",
                 "--searches=4", "--gpu=gpu", "--api=cheap", "--simulator-gpus=1",
                 "--policy-gpus=4", *length)
    for line in lines:
        assert line in printed, line


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(("file", "old", "new", "says"), [
    ("one/metrics.jsonl", "{}", '{"step": 2, "cost/sea', "one/metrics.jsonl:2: not JSON"),
    ("one/metrics.jsonl", "{}", "[1, 2]", "one/metrics.jsonl:2: not a JSON object"),
    ("one/metrics.jsonl", "{}", '{"cost/searches": "many"}',
     "one/metrics.jsonl:2: cost/searches must be a number >= 0, got 'many'"),
    ("one/metrics.jsonl", "{}", '{"time/step": -1}', "time/step must be a number >= 0, got -1"),
    ("one/metrics.jsonl", "{}", '{"time/step": NaN}', "time/step must be a number >= 0, got nan"),
    ("one/metrics.jsonl", '"step": 2', '"step": 0', "metrics.jsonl:3: step 0 stands in line 1"),
    ("one/metrics.jsonl", ..., "", "no finished step"),
    ("one/metrics.jsonl", ..., None, "metrics.jsonl"),
    ("one/config.json", "Example GPU 80GB", "Unknown GPU", "no price for device 'Unknown GPU'; "
                                            "known: gpu, cpu-core (add yours with --prices)"),
    ("one/config.json", '"count": 2', '"count": 0', "positive count"),
    ("one/config.json", '"cuda"', '"tpu"', "device cpu or cuda"),
    ("one/config.json", ..., "{}", "needs settings.engine and hardware"),
    ("prices.toml", "usd = 10.0", "usd = -1", "[search.serpapi] needs a positive usd and searches"),
    ("prices.toml", "usd_per_hour = 3.6", "", "[device.gpu] needs a positive usd_per_hour"),
    ("prices.toml", 'date = "2025-05"', "", "needs a date and a source"),
    ("prices.toml", "[device.gpu]", "[device.gpu", "no readable prices"),
    ("prices.toml", "[search.serpapi]", "[search.other]",
     "no price for search 'serpapi'; known: other, cheap"),
])
def test_bad_files_are_one_line(capsys, monkeypatch, tmp_path, prices, file, old, new, says):
    folder = write_run(tmp_path / "one", [STEP, {}, STEP])
    path = tmp_path / file
    text = path.read_text(encoding="utf-8")
    path.unlink()
    if new is not None:
        assert old is ... or old in text
        path.write_text(new if old is ... else text.replace(old, new), encoding="utf-8")
    line = one_line(capsys, monkeypatch, costs, "run", folder, "--prices", prices)
    assert line.startswith("error: ") and says in line


def test_stages_that_prepare_a_run_are_billed_beside_it(ok, tmp_path, prices):
    """Tuning a simulator: 2 steps of 100 s on 2 GPUs at $0.001 a second, and no search."""
    tuned = write_run(tmp_path / "simulator", [{"step": i, "loss": 1, "time/step": 100.0}
                                               for i in range(2)])
    config = {"settings": {"pairs": "pairs.jsonl", "lr": 1e-6}, "hardware": GPUS}
    (tuned / "config.json").write_text(json.dumps(config), encoding="utf-8")
    folder = write_run(tmp_path / "policy", [STEP] * 2)
    bill = ok("run", tuned, folder, "--prices", prices, "--json")
    assert [cost["bill"]["whole_run"] for cost in [*bill["runs"], bill["sum"]]] == pytest.approx(
        [0.4, 1.6, 2.0])
    assert bill["runs"][0]["notes"] == [] and bill["sum"]["searches"] == 1000
    assert bill["sum"]["device_seconds"]["update"] == 2 * (2 * 100 + 2 * 200)
    runs = {"simulator": tuned, "policy": folder}
    for run in runs.values():  # a device that data/prices.toml has
        text = (run / "config.json").read_text().replace("Example GPU 80GB", "A100-80GB")
        (run / "config.json").write_text(text)
    bills, notes = costs.run_bills(runs)
    assert list(bills) == [*runs, "all stages"] and not notes
    whole = [bill["bars"]["whole run"][0] for bill in bills.values()]
    assert list(costs.run_bills({"policy": folder})[0]) == ["policy"]
    assert whole[2] == pytest.approx(whole[0] + whole[1]) and whole[0] > 0

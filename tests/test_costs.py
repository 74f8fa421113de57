"""costs.py through its command line: the paper's figures, a run with hand-worked numbers, plans, and bad input."""

import json
import subprocess
import sys
from decimal import Decimal
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import costs  # noqa: E402

PAPER = json.loads((ROOT / "data" / "paper.json").read_text(encoding="utf-8"))
BENCHMARKS = [name for name in PAPER["columns"] if name != "avg"]


def cli(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "costs.py", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def ok(*arguments: object) -> str:
    result = cli(*arguments)
    assert result.returncode == 0, result.stderr
    return result.stdout


def row(text: str, first: str) -> str:
    """The first line of a table that begins with `first`, its spaces made single."""
    return next(" ".join(line.split()) for line in text.splitlines() if line.split()[:1] == [first])


# ---- the paper's figures ---------------------------------------------------------------------------------------------


def table_rows() -> list:
    rows = [
        pytest.param(scores, id=f"table3-{model}-{method}")
        for model, methods in PAPER["table3_main"].items()
        for method, scores in methods.items()
    ]
    return rows + [
        pytest.param(scores, id=f"table4-{name}") for name, scores in PAPER["table4_simulators"]["rows"].items()
    ]


def test_there_are_41_averages() -> None:
    assert len(table_rows()) == 33 + 8 and len(BENCHMARKS) == 7


@pytest.mark.parametrize("scores", table_rows())
def test_each_average_is_the_mean_of_its_row(scores: dict) -> None:
    # In decimals, so that a tie at the third digit is not decided by binary fractions: a mean to two digits is within
    # half of the last one.
    mean = sum(Decimal(str(scores[name])) for name in BENCHMARKS) / 7
    assert abs(mean - Decimal(str(scores["avg"]))) <= Decimal("0.005")


def test_table8_to_the_digit_that_the_paper_prints() -> None:
    assert json.loads(ok("paper", "--json"))["rows"] == PAPER["table8_cost"]["rows"]
    parts, _ = costs.table8()
    assert parts["searches"] == PAPER["table8_cost"]["queries"] == 64_000
    assert parts["hours"] == PAPER["table8_cost"]["hours"]
    assert parts["usd_per_gpu_hour"] == PAPER["table8_cost"]["derivation"]["gpu_usd_per_hour_implied"]


def test_table8_shows_its_sums_and_savings() -> None:
    search_side, whole = ok("paper").split("With the policy's GPUs")
    assert "64 prompts x 5 rollouts x 200 steps x 1 search = 64,000 searches" in search_side
    assert row(search_side, "Google") == "Google 64,000 searches x $275 / 30,000 $586.7 0.0 %"
    assert row(search_side, "SFT-3B") == "SFT-3B 1 A100 x 12 h x $1.475 $17.7 97.0 %"
    assert row(search_side, "SFT-7B") == "SFT-7B 2 A100 x 12 h x $1.475 $35.4 94.0 %"
    assert row(search_side, "SFT-14B") == "SFT-14B 4 A100 x 12 h x $1.475 $70.8 87.9 %"
    # By hand: 586.67 + 70.8 = 657.47, 70.8 + 70.8 = 141.6, 1 - 141.6 / 657.47 = 78.46 %.
    assert row(whole, "Google").endswith("$657.5 0.0 %")
    assert row(whole, "SFT-14B").endswith("$141.6 78.5 %")


def test_the_shipped_prices_agree_with_the_paper() -> None:
    parts, _ = costs.table8()
    prices = costs.load_prices()
    assert prices["device"]["A100-80GB"]["usd_per_hour"] == parts["usd_per_gpu_hour"]
    assert costs.search_bill(64_000) == pytest.approx(586.6667, abs=1e-4)
    assert costs.search_bill(30_000, "serpapi", prices) == pytest.approx(275)
    with pytest.raises(costs.CostError):
        costs.search_bill(-1)


# ---- a run -----------------------------------------------------------------------------------------------------------

PRICES = """
[search.serpapi]
usd = 10.0
searches = 1000
date = "2025-05"
source = "example"
[search.cheap]
usd = 1.0
searches = 1000
date = "2025-05"
source = "example"
[device.gpu]
usd_per_hour = 3.6
names = ["Example GPU 80GB"]
date = "2025-05"
source = "example"
[device.cpu-core]
usd_per_hour = 0.036
date = "2025-05"
source = "example"
"""

STEP = {
    "cost/searches": 500,
    "cost/simulator_prompt_tokens": 40_000,
    "cost/simulator_tokens": 20_000,
    "cost/policy_tokens": 30_000,
    "time/rollout": 100.0,
    "time/search": 50.0,
    "time/reference": 20.0,
    "time/update": 200.0,
    "time/sync": 10.0,
    "time/step": 400.0,
}
GPUS = {"device": "cuda", "name": "Example GPU 80GB", "count": 2}


@pytest.fixture
def prices(tmp_path: Path) -> Path:
    path = tmp_path / "prices.toml"
    path.write_text(PRICES, encoding="utf-8")
    return path


def write_run(folder: Path, lines: list[dict] | str, engine: str = "simulator", hardware: dict = GPUS) -> Path:
    folder.mkdir()
    config = {"settings": {"engine": engine, "algorithm": "grpo", "seed": 1}, "hardware": hardware}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    text = lines if isinstance(lines, str) else "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text, encoding="utf-8")
    return folder


def read_json(*arguments: object) -> dict:
    def no_nan(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return json.loads(ok("run", *arguments, "--json"), parse_constant=no_nan)


def test_a_run_by_hand(tmp_path: Path, prices: Path) -> None:
    # Two steps on 2 GPUs at $3.6 an hour, which is $0.001 a device-second; a search costs $0.01 at serpapi.
    #   searches 2 x 500 = 1,000: $10 at serpapi, $1 at cheap
    #   search   2 x  50 s x 2 =   200 device-s: $0.20, so the search side saves 1 - 0.2 / 10 = 98 %
    #   step     2 x 400 s x 2 = 1,600 device-s: $1.60, of which 2 x (400 - 380) x 2 = 80 in no phase
    #   with the API: 1.60 - 0.20 + 10 = $11.40, so the whole run saves 1 - 1.6 / 11.4 = 85.96 %
    folder = write_run(tmp_path / "one", [{"step": 1, **STEP}, {"step": 2, **STEP}])
    (cost,) = read_json(folder, "--prices", prices)["runs"]
    assert cost["searches"] == 1000 and cost["steps"] == 2 and cost["notes"] == []
    assert cost["tokens"] == {"policy_tokens": 60_000, "simulator_prompt_tokens": 80_000, "simulator_tokens": 40_000}
    assert cost["api_usd"] == pytest.approx({"serpapi": 10, "cheap": 1})
    assert cost["device_seconds"] == pytest.approx(
        {"rollout": 400, "search": 200, "reference": 80, "update": 800, "sync": 40, "other": 80, "step": 1600}
    )
    assert cost["usd"]["update"] == pytest.approx(0.8)
    assert cost["bill"] == pytest.approx(
        {
            "search_side": 0.2,
            "whole_run": 1.6,
            "whole_run_with_api": 11.4,
            "search_side_saving": 98.0,
            "whole_run_saving": 100 * (1 - 1.6 / 11.4),
        }
    )
    assert row(ok("run", folder, "--prices", prices), "one") == "one simulator 1,000 80,000 40,000 $10.00 $1.00"
    assert "one $0.20 $10.00 98.0 % $1.60 $11.40 86.0 %" in " ".join(ok("run", folder, "--prices", prices).split())


def test_runs_add_up_and_may_lose_money(tmp_path: Path, prices: Path) -> None:
    # On 10 cores at $0.036 an hour a device-second costs $0.00001. One search, worth $0.01, waits 1,800 s: $0.18.
    cores = {"device": "cpu", "name": "some processor", "count": 10}
    slow = write_run(
        tmp_path / "slow",
        [{"step": 1, **STEP, "cost/searches": 1, "time/search": 1800, "time/step": 3600}],
        hardware=cores,
    )
    fast = write_run(tmp_path / "fast", [{"step": 1, **STEP}])
    result = read_json(slow, fast, "--prices", prices)
    assert result["runs"][0]["device"] == "cpu-core"
    assert result["runs"][0]["bill"]["search_side_saving"] == pytest.approx(100 * (1 - 0.18 / 0.01))
    assert result["sum"]["searches"] == 501
    assert result["sum"]["bill"]["search_side"] == pytest.approx(0.18 + 0.1)
    assert result["sum"]["bill"]["whole_run"] == pytest.approx(0.36 + 0.8)
    assert result["sum"]["bill"]["search_side_saving"] == pytest.approx(100 * (1 - 0.28 / 5.01))
    table = ok("run", slow, fast, "--prices", prices)
    assert "-1700.0 %" in table and row(table, "sum").startswith("sum 501 ")


def test_a_run_on_a_real_api_has_paid_it(tmp_path: Path, prices: Path) -> None:
    folder = write_run(tmp_path / "real", [{"step": 1, **STEP}], engine="serpapi")
    (cost,) = read_json(folder, "--prices", prices)["runs"]
    # $5 for 500 searches, and 50 s x 2 GPUs of waiting for them: $0.1, which an API that answers at once would save.
    assert cost["paid_usd"] == pytest.approx(5)
    assert cost["bill"]["search_side"] == pytest.approx(5.1)
    assert cost["bill"]["search_side_saving"] == pytest.approx(-2)
    assert cost["bill"]["whole_run"] == pytest.approx(5.8)


def test_a_run_without_searches_saves_nothing(tmp_path: Path, prices: Path) -> None:
    step = {"step": 1, **STEP, "cost/searches": 0, "time/search": 0}
    (cost,) = read_json(write_run(tmp_path / "none", [step], engine="none"), "--prices", prices)["runs"]
    assert cost["bill"]["search_side"] == 0 and cost["bill"]["search_side_saving"] is None
    assert cost["bill"]["whole_run_saving"] == 0


def test_what_is_not_reported_is_never_zero(tmp_path: Path, prices: Path) -> None:
    absent = {key: value for key, value in STEP.items() if key not in ("cost/searches", "time/reference")}
    folder = write_run(tmp_path / "partial", [{"step": 1, **absent}, {"step": 2, **absent, "time/sync": None}])
    (cost,) = read_json(folder, "--prices", prices)["runs"]
    assert cost["searches"] is None and cost["api_usd"] == {"serpapi": None, "cheap": None}
    assert cost["device_seconds"]["reference"] is None and cost["device_seconds"]["sync"] == 20
    assert cost["bill"]["search_side"] == pytest.approx(0.2) and cost["bill"]["search_side_saving"] is None
    text = ok("run", folder, "--prices", prices)
    assert "not reported: cost/searches, time/reference" in text
    assert "a lower bound: time/sync (1 of 2)" in text
    assert row(text, "partial") == "partial simulator - 80,000 40,000 - -"


def test_a_cut_off_last_line_is_skipped(tmp_path: Path, prices: Path) -> None:
    whole = json.dumps({"step": 1, **STEP}) + "\n"
    folder = write_run(tmp_path / "killed", whole + whole[: len(whole) // 2])
    (cost,) = read_json(folder, "--prices", prices)["runs"]
    assert cost["steps"] == 1 and cost["searches"] == 500
    assert "metrics.jsonl, line 2: cut off" in ok("run", folder, "--prices", prices)


# ---- a plan ----------------------------------------------------------------------------------------------------------


def test_plan_breaks_even_where_the_hand_does() -> None:
    # The paper's set-up: 4 GPUs x 12 h x $1.475 = $70.80 buy 70.8 / (275 / 30,000) = 7,723.6 searches.
    text = ok("plan", "--hours", 12)
    assert "= 64,000 searches" in text
    assert "= 7,724 searches" in text
    assert row(text, "search") == "search side $586.67 $70.80 87.9 %"
    assert row(text, "whole") == "whole run $657.47 $141.60 78.5 %"
    assert row(text, "1,000") == "1,000 $9.17 $70.80 serpapi"
    assert row(text, "10,000") == "10,000 $91.67 $70.80 simulator"
    # Past the 64,000 planned searches the rent grows in proportion: 70.8 x 10^8 / 64,000 = 110,625.
    assert row(text, "100,000,000") == "100,000,000 $916,666.67 $110,625.00 simulator"


def test_plan_from_a_timed_step() -> None:
    assert ok("plan", "--seconds-per-step", 216).splitlines()[1:] == ok("plan", "--hours", 12).splitlines()[1:]


def test_plan_says_when_the_api_is_cheaper_at_any_number() -> None:
    text = ok("plan", "--hours", 12, "--simulator-gpus", 40)  # $708 for what costs $586.67
    assert "No break-even: a simulated search costs $0.0110625, one at serpapi $0.00916667" in text
    assert row(text, "100,000,000").endswith("serpapi")


def test_plan_estimates_hours_from_flops(tmp_path: Path) -> None:
    # 10 x 10 x 10 = 1,000 episodes of 100 tokens, policy of 1e9: 1e3 x 100 x (2 + 2 + 6) x 1e9 = 1e15 FLOP.
    # 1,000 simulations of 50 tokens, simulator of 1e10:          1e3 x  50 x 2 x 1e10           = 1e15 FLOP.
    # 1 GPU of 1 TFLOP/s at 0.5: 1e15 / 0.5e12 = 2,000 s each; together 4,000 s = 1.11 h, at $3.6 an hour $4.00.
    path = tmp_path / "prices.toml"
    path.write_text(PRICES.replace("names =", "bf16_tflops = 1\nnames ="), encoding="utf-8")
    size = ("--steps", 10, "--prompts", 10, "--rollouts", 10, "--policy-params", 1e9, "--simulator-params", 1e10)
    tokens = ("--episode-tokens", 100, "--search-tokens", 50, "--utilisation", 0.5)
    text = ok("plan", *size, *tokens, "--simulator-gpus", 1, "--policy-gpus", 1, "--gpu", "gpu", "--prices", path)
    assert text.count("1e+15 FLOP") == 2 and text.count("= 0.56 h") == 2 and "1.11 h on gpu" in text
    assert row(text, "search") == "search side $10.00 $4.00 60.0 %"
    assert "= 400 searches" in text


# ---- bad input -------------------------------------------------------------------------------------------------------


def assert_refused(*arguments: object, says: str) -> None:
    result = cli(*arguments)
    assert result.returncode == 2, result
    assert result.stdout == "" and len(result.stderr.splitlines()) == 1
    assert says in result.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["plan", "--gpu", "B9000"], "no price for device 'B9000'; known: A100-80GB"),
        (["plan", "--api", "askme"], "no price for search 'askme'; known: serpapi"),
        (["plan", "--steps", "0"], "--steps must be positive, got 0"),
        (["plan", "--simulator-gpus", "-1"], "--simulator-gpus must be positive, got -1"),
        (["plan", "--hours", "nan"], "--hours must be positive"),
        (["plan", "--searches", "many"], "--searches"),
        (["plan", "--hours", "1", "--seconds-per-step", "1"], "not both"),
        (["plan", "--utilisation", "40"], "at most 1"),
        (["plan", "--gpu", "cpu-core"], "no bf16_tflops"),
        (["plan", "--prices", "nowhere.toml"], "nowhere.toml"),
        (["run", "nowhere"], "config.json"),
        (["run"], "runs"),
        (["pay"], "pay"),
        ([], "Missing command"),
    ],
)
def test_bad_arguments_are_one_line(arguments: list[str], says: str) -> None:
    assert_refused(*arguments, says=says)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"step": 2, "cost/sea', "not JSON"),
        ("[1, 2]", "not a JSON object"),
        ('{"cost/searches": "many"}', "cost/searches must be a number >= 0, got 'many'"),
        ('{"time/step": -1}', "time/step must be a number >= 0, got -1"),
        ('{"time/step": NaN}', "time/step must be a number >= 0, got nan"),
    ],
)
def test_a_bad_line_names_its_file_and_number(tmp_path: Path, prices: Path, line: str, says: str) -> None:
    good = json.dumps({"step": 1, **STEP})
    folder = write_run(tmp_path / "bad", f"{good}\n{line}\n{good}\n")
    assert_refused("run", folder, "--prices", prices, says=f"{folder / 'metrics.jsonl'}, line 2: {says}")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"name": "Unknown GPU"}, "no price for device 'Unknown GPU'; known: gpu, cpu-core (add yours with --prices)"),
        ({"count": 0}, "positive count"),
        ({"device": "tpu"}, "device cpu or cuda"),
    ],
)
def test_bad_hardware_is_refused(tmp_path: Path, prices: Path, change: dict, says: str) -> None:
    folder = write_run(tmp_path / "bad", [{"step": 1, **STEP}], hardware=GPUS | change)
    assert_refused("run", folder, "--prices", prices, says=says)


def test_bad_run_folders_are_refused(tmp_path: Path, prices: Path) -> None:
    folder = write_run(tmp_path / "bad", "")
    assert_refused("run", folder, "--prices", prices, says="no finished step")
    (folder / "metrics.jsonl").unlink()
    assert_refused("run", folder, "--prices", prices, says="metrics.jsonl")
    (folder / "config.json").write_text("{}", encoding="utf-8")
    assert_refused("run", folder, "--prices", prices, says="needs settings.engine and hardware")


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("usd = 10.0", "usd = -1", "[search.serpapi] needs a positive usd and searches"),
        ("usd_per_hour = 3.6", "", "[device.gpu] needs a positive usd_per_hour"),
        ('date = "2025-05"', "", "needs a date and a source"),
        ("[device.gpu]", "[device.gpu", "no readable prices"),
        ("[search.serpapi]", "[search.other]", "no price for search 'serpapi'; known: other, cheap"),
    ],
)
def test_bad_prices_are_refused(tmp_path: Path, prices: Path, old: str, new: str, says: str) -> None:
    folder = write_run(tmp_path / "one", [{"step": 1, **STEP}])
    prices.write_text(PRICES.replace(old, new), encoding="utf-8")
    assert_refused("run", folder, "--prices", prices, says=says)

"""What searching costs: the paper's sum (Table 8), a run's own, and a plan's.

    python costs.py paper                          # Table 8 from its parts, and what it leaves out
    python costs.py run runs/zerosearch            # the same comparison from a training run's counters
    python costs.py plan --gpu H200-141GB          # the bill before a run starts, and where it breaks even

A simulator replaces an API that charges per search by GPUs that charge per hour. The paper compares these two alone
("search side" below). The policy's own GPUs are needed with either, so every command shows the bill with them too.
Prices come with date and source from data/prices.toml; --prices takes a file of your own in the same form.

What a run did not report is NaN all the way through, is printed as "-" and is null in JSON: never a silent zero.
"""

import json
import math
import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated

import typer

from plumbing.cli import Settings, UserError, command, make_app, option, print_table, run_cli

DATA = Path(__file__).resolve().parent / "data"
PAPER_API = "serpapi"  # savings are measured against the API that the paper pays
PHASES = ("rollout", "search", "reference", "update", "sync")  # disjoint; time/step spans them and whatever is between
TOKENS = ("policy_tokens", "simulator_prompt_tokens", "simulator_tokens")
COUNTERS = ["cost/searches", *(f"cost/{name}" for name in TOKENS), *(f"time/{name}" for name in (*PHASES, "step"))]

app = make_app(__doc__)
PricesOption = Annotated[Path, typer.Option(help="Prices of search APIs and devices, in the form of data/prices.toml.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


# ---- prices ----------------------------------------------------------------------------------------------------------


def is_amount(value: object) -> bool:
    """A finite number that is not negative: what every price, counter and duration must be."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0


@cache
def load_prices(path: Path = DATA / "prices.toml") -> dict:
    """Prices as {"search": {name: {usd, searches, ...}}, "device": {name: {usd_per_hour, ...}}}, in US dollars.

    Raises UserError where the file is missing, is no TOML, or an entry lacks a positive price, its date or its source.
    """
    try:
        prices = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: no readable prices: {error}") from None
    for kind, amounts in {"search": ("usd", "searches"), "device": ("usd_per_hour",)}.items():
        if not isinstance(prices.get(kind), dict):
            raise UserError(f"{path}: no [{kind}.NAME] table")
        for name, entry in prices[kind].items():
            if not (isinstance(entry, dict) and all(is_amount(entry.get(key)) and entry[key] > 0 for key in amounts)):
                raise UserError(f"{path}: [{kind}.{name}] needs a positive {' and '.join(amounts)}")
            if not (entry.get("date") and entry.get("source")):
                raise UserError(f"{path}: [{kind}.{name}] needs a date and a source")
    return prices


def price_of(kind: str, name: str, prices: dict) -> dict:
    """The entry of a name, or of a device's full name, with its "name". Raises UserError with the names it knows."""
    for key, entry in prices[kind].items():
        if name in (key, *entry.get("names", [])):
            return {"name": key, **entry}
    raise UserError(f"no price for {kind} {name!r}; known: {', '.join(prices[kind])} (add yours with --prices)")


def search_bill(searches: int, api: str = PAPER_API, prices: dict | None = None) -> float:
    """US dollars that `searches` requests cost at a search API (Table 8: 64,000 cost $586.67 at SerpApi).

    Packages are taken as divisible, as in the paper: nothing is rounded up to a whole one. Raises UserError.
    """
    if searches < 0:
        raise UserError(f"searches must not be negative, got {searches}")
    price = price_of("search", api, prices or load_prices())
    return searches * price["usd"] / price["searches"]


def saving(cost: float, instead_of: float) -> float:
    """Percent saved by paying `cost` `instead_of` the other: negative where it costs more, NaN where unknown."""
    return 100 * (1 - cost / instead_of) if instead_of > 0 else math.nan


# ---- printing --------------------------------------------------------------------------------------------------------


def dollars(usd: float) -> str:
    if math.isnan(usd):
        return "-"
    if 0 < abs(usd) < 1e-4:
        return "<$0.0001"
    return f"${usd:,.2f}" if abs(usd) >= 0.1 or usd == 0 else f"${usd:.2g}"  # a demo's bill is a fraction of a cent


def number(value: float, form: str = ",.0f") -> str:
    return "-" if math.isnan(value) else f"{value:{form}}"


def percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:z.1f} %"


# ---- the paper -------------------------------------------------------------------------------------------------------


def table8() -> tuple[dict, dict]:
    """The parts of Table 8, and its rows {name: {api_usd, gpus, gpu_usd}} computed from them in unrounded dollars.

    Only the number of GPUs is taken from the published rows; the row without any pays the API.
    """
    published = json.loads((DATA / "paper.json").read_text(encoding="utf-8"))["table8_cost"]
    parts = published["parts"]
    searches = parts["prompts_per_step"] * parts["rollouts"] * parts["steps"] * parts["searches_per_rollout"]
    api_usd = searches * parts["api_usd"] / parts["api_searches"]
    gpu_usd = parts["hours"] * parts["usd_per_gpu_hour"]
    rows = {
        name: {"api_usd": 0.0 if row["gpus"] else api_usd, "gpus": row["gpus"], "gpu_usd": row["gpus"] * gpu_usd}
        for name, row in published["rows"].items()
    }
    return {**parts, "searches": searches}, rows


@app.command()
def paper(as_json: JsonOption = False) -> None:
    """Table 8 of the paper from its parts, and the same with the GPUs that it does not count."""
    parts, rows = table8()
    if as_json:
        rounded = {name: {key: round(value, 1) for key, value in row.items()} for name, row in rows.items()}
        return print(json.dumps({"rows": rounded}, indent=1))
    print(
        f"{parts['prompts_per_step']} prompts x {parts['rollouts']} rollouts x {parts['steps']} steps"
        f" x {parts['searches_per_rollout']} search = {parts['searches']:,} searches\n"
    )
    print_table8("Table 8: the search side alone", parts, rows)
    rent = f"{parts['hours']} h x ${parts['usd_per_gpu_hour']}"
    policy = parts["policy_gpus_assumed"] * parts["hours"] * parts["usd_per_gpu_hour"]
    print(
        "\nLeft out by the paper:\n"
        "- the GPUs that train the policy, which either choice needs. An assumption, not the paper's figure:\n"
        f"  {parts['policy_gpus_assumed']} A100 x {rent} = ${policy:.1f}\n"
        f"- that the simulator's GPUs idle while the policy updates: all {parts['hours']} h are paid\n"
    )
    print_table8("With the policy's GPUs", parts, rows, policy)


def print_table8(title: str, parts: dict, rows: dict, policy: float = 0.0) -> None:
    """The rows with their sums written out, and `policy` dollars added to each."""
    api = max(row["api_usd"] for row in rows.values()) + policy
    table = []
    for name, row in rows.items():
        usd = row["api_usd"] + row["gpu_usd"] + policy
        terms = f"{parts['searches']:,} searches x ${parts['api_usd']} / {parts['api_searches']:,}"
        if row["gpus"]:
            terms = f"{row['gpus']} A100 x {parts['hours']} h x ${parts['usd_per_gpu_hour']}"
        table.append([name, terms + (f" + ${policy:.1f}" if policy else ""), f"${usd:.1f}", percent(saving(usd, api))])
    print_table(title, ["engine", "sum", "cost", "saved"], table, text_columns=2)


# ---- a run -----------------------------------------------------------------------------------------------------------


def read_config(run_dir: Path) -> tuple[str, dict]:
    """The engine and the hardware {device, name, count} of a run. Raises UserError, naming the file."""
    path = run_dir / "config.json"
    try:
        config = json.loads(path.read_bytes())
        engine, hardware = config["settings"]["engine"], config["hardware"]
        device, name, count = hardware["device"], hardware["name"], hardware["count"]
    except (KeyError, TypeError):
        raise UserError(f"{path}: needs settings.engine and hardware.device, .name and .count") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not the config of a run: {error}") from None
    if not (isinstance(engine, str) and isinstance(name, str)):
        raise UserError(f"{path}: settings.engine and hardware.name must be text, got {engine!r} and {name!r}")
    if device not in ("cpu", "cuda") or type(count) is not int or count < 1:
        raise UserError(f"{path}: hardware needs device cpu or cuda and a positive count, got {device!r} and {count!r}")
    return engine, hardware


def read_metrics(run_dir: Path) -> tuple[list[dict], list[str]]:
    """The steps of a run and notes on what was skipped. Raises UserError, naming file and line."""
    path = run_dir / "metrics.jsonl"
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"{path}: not the metrics of a run: {error}") from None
    steps, notes = [], []
    for index, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            step = json.loads(line)
        except ValueError as error:
            if index < len(lines):
                raise UserError(f"{path}, line {index}: not JSON: {error}") from None
            notes.append(f"metrics.jsonl, line {index}: cut off, as a killed process leaves it; skipped")
            continue
        if not isinstance(step, dict):
            raise UserError(f"{path}, line {index}: not a JSON object")
        if bad := [key for key in COUNTERS if step.get(key) is not None and not is_amount(step[key])]:
            raise UserError(f"{path}, line {index}: {bad[0]} must be a number >= 0, got {step[bad[0]]!r}")
        steps.append(step)
    if not steps:
        raise UserError(f"{path}: no finished step")
    return steps, notes


def add_up(steps: list[dict], notes: list[str]) -> dict[str, float]:
    """The sum of each counter, NaN for one that no step reports. What is missing is added to the notes."""
    totals, partial = {}, []
    for key in COUNTERS:
        values = [step[key] for step in steps if step.get(key) is not None]
        totals[key] = sum(values) if values else math.nan
        if 0 < len(values) < len(steps):
            partial.append(f"{key} ({len(values)} of {len(steps)})")
    if partial:
        notes.append(f"not reported by every step, so the sum is a lower bound: {', '.join(partial)}")
    if missing := [key for key in COUNTERS if math.isnan(totals[key])]:
        notes.append(f"not reported: {', '.join(missing)}")
    return totals


def compare(usd: dict[str, float], api_usd: float, paid_usd: float) -> dict[str, float]:
    """The search side and the whole run in dollars, the run had the API answered at once, and both savings in percent.

    A run on a real API has `paid_usd` for its searches, and has waited for them too: its saving is negative.
    """
    bill = {"search_side": usd["search"] + paid_usd, "whole_run": usd["step"] + paid_usd}
    bill["whole_run_with_api"] = usd["step"] - usd["search"] + api_usd
    bill["search_side_saving"] = saving(bill["search_side"], api_usd)
    bill["whole_run_saving"] = saving(bill["whole_run"], bill["whole_run_with_api"])
    return bill


def run_cost(run_dir: str | Path, prices: dict | None = None) -> dict:
    """What a training run cost and what its searches would have cost at an API: Table 8 from the run's own counters.

    Keys: run, engine, device, devices (how many), usd_per_device_hour, steps, searches, tokens, notes;
    device_seconds and usd by phase ("step": all of it, "other": less the phases reported); api_usd by API; paid_usd,
    spent on the engine if it was an API; bill, in dollars and percent against SerpApi. NaN stands for not reported.
    Device-seconds are seconds x GPUs, or x CPU cores. Not counted, for they are not in its files: steps that a resumed
    run set aside, and other machines that it called. Raises UserError.
    """
    run_dir, prices = Path(run_dir), prices or load_prices()
    engine, hardware = read_config(run_dir)
    steps, notes = read_metrics(run_dir)
    totals = add_up(steps, notes)
    device = price_of("device", "cpu-core" if hardware["device"] == "cpu" else hardware["name"], prices)
    rate = device["usd_per_hour"]
    seconds = {phase: totals[f"time/{phase}"] * hardware["count"] for phase in PHASES}
    step = totals["time/step"] * hardware["count"]
    seconds |= {"other": step - sum(value for value in seconds.values() if not math.isnan(value)), "step": step}
    usd = {phase: value * rate / 3600 for phase, value in seconds.items()}
    api_usd = {api: search_bill(totals["cost/searches"], api, prices) for api in prices["search"]}
    paid_usd = api_usd.get(engine, 0.0)
    return {
        "run": str(run_dir),
        "engine": engine,
        "device": device["name"],
        "devices": hardware["count"],
        "usd_per_device_hour": rate,
        "steps": len(steps),
        "searches": totals["cost/searches"],
        "tokens": {name: totals[f"cost/{name}"] for name in TOKENS},
        "device_seconds": seconds,
        "usd": usd,
        "api_usd": api_usd,
        "paid_usd": paid_usd,
        "bill": compare(usd, search_bill(totals["cost/searches"], prices=prices), paid_usd),
        "notes": notes,
    }


def sum_runs(costs: list[dict]) -> dict:
    """The sum of several runs in the form of run_cost; a figure that one of them does not report is unknown."""
    groups = {
        group: {key: sum(cost[group][key] for cost in costs) for key in costs[0][group]}
        for group in ("tokens", "device_seconds", "usd", "api_usd")
    }
    searches, paid_usd = (sum(cost[key] for cost in costs) for key in ("searches", "paid_usd"))
    bill = compare(groups["usd"], groups["api_usd"][PAPER_API], paid_usd)
    return {"run": "sum", "engine": "", "searches": searches, **groups, "paid_usd": paid_usd, "bill": bill}


@app.command()
def run(
    runs: Annotated[list[Path], typer.Argument(help="Run folders: config.json and metrics.jsonl.")],
    prices: PricesOption = DATA / "prices.toml",
    as_json: JsonOption = False,
) -> None:
    """What training runs cost, and what their searches would have cost at an API, from the runs' own counters."""
    costs = [run_cost(run_dir, load_prices(prices)) for run_dir in runs]
    together = sum_runs(costs)
    if as_json:  # strict JSON has no NaN
        text = json.dumps({"runs": costs, "sum": together})
        return print(json.dumps(json.loads(text, parse_constant=lambda _: None), indent=1))
    rows = [*costs, together] if len(costs) > 1 else costs
    searches, phase_cells, bills = [], [], []
    names = [Path(row["run"]).resolve().name for row in rows]
    if len({*names}) < len(names):  # two folders of the same name
        names = [row["run"] for row in rows]
    for name, row in zip(names, rows, strict=True):
        tokens, bill = row["tokens"], row["bill"]
        counts = row["searches"], tokens["simulator_prompt_tokens"], tokens["simulator_tokens"]
        searches.append([name, row["engine"], *map(number, counts), *map(dollars, row["api_usd"].values())])
        seconds, usd = row["device_seconds"], row["usd"]
        phase_cells.append([name, *(f"{number(seconds[key], ',.1f')}\n{dollars(usd[key])}" for key in seconds)])
        bills.append([name, dollars(bill["search_side"]), dollars(row["api_usd"][PAPER_API])])
        bills[-1] += [percent(bill["search_side_saving"]), dollars(bill["whole_run"])]
        bills[-1] += [dollars(bill["whole_run_with_api"]), percent(bill["whole_run_saving"])]
    title = "The searches and their bill at each API"
    header = ["run", "engine", "searches", "simulated in", "out", *together["api_usd"]]
    print_table(title, header, searches, text_columns=2)
    title = "Device-seconds by phase, and their price"
    print_table(title, ["run", *together["usd"]], phase_cells)
    title = f"Against {PAPER_API}: the search side, the whole run"
    header = ["run", "search side", PAPER_API, "saved", "whole run", f"with {PAPER_API}", "saved"]
    print_table(title, header, bills)
    print(
        "simulated: tokens that the simulator read and wrote. device-seconds: seconds x devices; step: the whole step,\n"
        "other: what no phase reports of it. search side: waiting for the engine, which the paper compares;\n"
        f"{PAPER_API} is taken to answer at once. A negative saving: the run cost more than the API would have."
    )
    for cost in costs:
        print(f"{cost['run']}: {cost['devices']} x {cost['device']} at ${cost['usd_per_device_hour']} an hour")
        for note in cost["notes"]:
            print(f"{cost['run']}: {note}")


# ---- a plan ----------------------------------------------------------------------------------------------------------


def gpu_hours(who: str, terms: str, flop: float, gpus: int, peak_tflops: float, utilisation: float) -> float:
    """Hours that `gpus` take for `flop` operations; prints the sum."""
    hours = flop / (gpus * peak_tflops * 1e12 * utilisation) / 3600
    print(
        f"{who}: {terms} = {flop:.3g} FLOP\n  / ({gpus} GPUs x {peak_tflops} TFLOP/s x {utilisation:g}) = {hours:.2f} h"
    )
    return hours


@dataclass(frozen=True, kw_only=True)
class PlanSettings(Settings):
    steps: int = option(200, "Training steps.", above=0)
    prompts: int = option(64, "Questions per step.", above=0)
    rollouts: int = option(5, "Episodes per question.", above=0)
    searches: float = option(1.0, "Searches per episode.", above=0)
    simulator_gpus: int = option(4, "GPUs that serve the simulator.", above=0)
    policy_gpus: int = option(4, "GPUs that sample and train the policy.", above=0)
    gpu: str = option("A100-80GB", "A device of the prices.")
    hours: float | None = option(None, "Length of the run, if you know it.", above=0)
    seconds_per_step: float | None = option(None, "The same from a step that you timed.", above=0)
    policy_params: float = option(3e9, "Estimate: parameters of the policy.", above=0)
    simulator_params: float = option(14e9, "Estimate: parameters of the simulator.", above=0)
    episode_tokens: float = option(2000, "Estimate: tokens of an episode, documents included.", above=0)
    search_tokens: float = option(1000, "Estimate: tokens of a simulation, prompt included.", above=0)
    utilisation: float = option(0.1, "Estimate: share of the GPU's peak that the run reaches.",
                                above=0, high=1)
    api: str = option(PAPER_API, "A search API of the prices.")
    prices: Path = option(DATA / "prices.toml", "Prices of search APIs and devices, in its form.")

    def check(self) -> None:
        super().check()
        if self.hours and self.seconds_per_step:
            raise UserError("give --hours or --seconds-per-step, not both")


@command(app, PlanSettings)
def plan(s: PlanSettings) -> None:
    """What a run would cost before it starts, and from how many searches on a simulator pays.

    Without --hours and --seconds-per-step the hours are estimated from FLOPs: 2 x parameters for a
    token generated or prefilled, 6 x for a token trained. The default utilisation puts the paper's
    set-up near its 12 hours."""
    prices = load_prices(s.prices)
    device = price_of("device", s.gpu, prices)
    per_search = search_bill(1, s.api, prices)
    episodes = s.steps * s.prompts * s.rollouts
    planned = episodes * s.searches
    print(f"{s.steps} steps x {s.prompts} prompts x {s.rollouts} rollouts x {s.searches:g} searches"
          f" = {planned:,.0f} searches")
    hours = s.hours or (s.seconds_per_step or 0) * s.steps / 3600
    hours = hours or estimate_hours(s, device, episodes, planned)
    print(f"{hours:,.2f} h on {s.gpu} at ${device['usd_per_hour']} an hour for each GPU\n")
    gpu_usd = hours * device["usd_per_hour"]
    print_bills(planned, s.simulator_gpus * gpu_usd, s.policy_gpus * gpu_usd, s.api, per_search)


def estimate_hours(s: PlanSettings, device: dict, episodes: int, planned: float) -> float:
    """Hours of a run from its FLOPs; prints the sums."""
    peak_tflops = device.get("bf16_tflops", 0)
    if not (is_amount(peak_tflops) and peak_tflops > 0):
        raise UserError(f"no bf16_tflops for {s.gpu!r} to estimate from: "
                        "give --hours or --seconds-per-step")
    speed = peak_tflops, s.utilisation
    terms = f"{episodes:,} episodes x {s.episode_tokens:,.0f} tokens x (2 sample + 2 reference + 6 train)"
    flop = episodes * s.episode_tokens * (2 + 2 + 6) * s.policy_params
    hours = gpu_hours("policy", f"{terms} x {s.policy_params:.3g}", flop, s.policy_gpus, *speed)
    terms = f"{planned:,.0f} searches x {s.search_tokens:,.0f} tokens x 2 x {s.simulator_params:.3g}"
    flop = planned * s.search_tokens * 2 * s.simulator_params
    # A rollout waits for its documents: the hours add up.
    return hours + gpu_hours("simulator", terms, flop, s.simulator_gpus, *speed)


def print_bills(planned: float, rent: float, policy: float, api: str, per_search: float) -> None:
    """The bill of `planned` searches at an API and with `rent` dollars of simulator GPUs, and of other numbers."""
    api_usd = planned * per_search
    print_table(
        "The bill",
        ["", api, "simulator", "saved"],
        [
            ["search side", dollars(api_usd), dollars(rent), percent(saving(rent, api_usd))],
            ["policy's GPUs", dollars(policy), dollars(policy), ""],
            ["whole run", *map(dollars, (api_usd + policy, rent + policy))]
            + [percent(saving(rent + policy, api_usd + policy))],
        ],
    )
    if rent <= api_usd:
        print(f"Break-even: ${rent:,.2f} / ${per_search:.6g} a search = {math.ceil(rent / per_search):,} searches\n")
    else:
        print(f"No break-even: a simulated search costs ${rent / planned:.6g}, one at {api} ${per_search:.6g}\n")
    rows = []
    for count in (10**exponent for exponent in range(3, 9)):
        usd = {api: count * per_search, "simulator": rent * max(1, count / planned)}
        rows.append([f"{count:,}", *map(dollars, usd.values()), min(usd, key=usd.get)])
    print_table("The search side by number of searches", ["searches", api, "simulator", "cheaper"], rows)
    print("The simulator's rent is due for the whole run, however few its searches; past the planned number it grows")
    print("in proportion.")


if __name__ == "__main__":
    run_cli(app)

"""What searching costs: in the paper (Table 8), in a training run, and in a planned run.

\b
    python costs.py paper                  # Table 8 and what it leaves out
    python costs.py run runs/policy        # the same from a run's counters
    python costs.py plan --gpu H200-141GB  # the bill before a run starts

A search API is paid per search, a simulator's GPUs per hour. The paper compares these two alone
("search side" below). Either choice also needs the policy's GPUs, so every command shows the bill
with them too. Prices, with date and source, come from data/prices.toml or from --prices.

A figure that a run does not report is NaN, printed as "-" and null in JSON. It is never taken as 0.
So is the search side of a policy on vLLM or a server: its searches overlap the sampling.
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
from plumbing.formats import is_amount, read_counters, read_hardware

DATA = Path(__file__).resolve().parent / "data"
PAPER_API = "serpapi"  # savings are measured against the API that the paper pays
PHASES = ("rollout", "search", "reference", "update", "sync")  # disjoint parts of time/step
TOKENS = ("policy_tokens", "simulator_prompt_tokens", "simulator_tokens")
COUNTERS = ["cost/searches", *(f"cost/{name}" for name in TOKENS),
            *(f"time/{name}" for name in (*PHASES, "step"))]
PRICES_HELP = "Prices of search APIs and devices, in the form of data/prices.toml."

app = make_app(__doc__)
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


# ---------------------------------------------------------------- prices and formats


@cache
def load_prices(path: Path = DATA / "prices.toml") -> dict:
    """US dollars as {"search": {name: {usd, searches}}, "device": {name: {usd_per_hour}}}.

    Raises UserError if the file is not TOML or an entry lacks a positive price, date or source."""
    try:
        prices = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: no readable prices: {error}") from None
    for kind, keys in {"search": ("usd", "searches"), "device": ("usd_per_hour",)}.items():
        if not isinstance(prices.get(kind), dict):
            raise UserError(f"{path}: no [{kind}.NAME] table")
        for name, entry in prices[kind].items():
            amounts = [entry.get(key) if isinstance(entry, dict) else None for key in keys]
            if not all(is_amount(amount) and amount > 0 for amount in amounts):
                raise UserError(f"{path}: [{kind}.{name}] needs a positive {' and '.join(keys)}")
            if not (entry.get("date") and entry.get("source")):
                raise UserError(f"{path}: [{kind}.{name}] needs a date and a source")
    return prices


def price_of(kind: str, name: str, prices: dict) -> dict:
    """The entry for a name or for one of its `names`, with the key "name". Raises UserError."""
    for key, entry in prices[kind].items():
        if name in (key, *entry.get("names", [])):
            return {"name": key, **entry}
    known = ", ".join(prices[kind])
    raise UserError(f"no price for {kind} {name!r}; known: {known} (add yours with --prices)")


def search_bill(searches: int, api: str = PAPER_API, prices: dict | None = None) -> float:
    """US dollars for `searches` requests to an API (Table 8: $586.67 for 64,000 at SerpApi). Part
    of a package costs that part of its price, as in the paper. Raises UserError."""
    if searches < 0:
        raise UserError(f"searches must not be negative, got {searches}")
    price = price_of("search", api, prices or load_prices())
    return searches * price["usd"] / price["searches"]


def saving(cost: float, instead_of: float) -> float:
    """Percent saved by paying `cost`, not `instead_of`. Negative: costs more; NaN: unknown."""
    return 100 * (1 - cost / instead_of) if instead_of > 0 else math.nan


def dollars(usd: float) -> str:
    if 0 < abs(usd) < 1e-4:
        return "<$0.0001"
    form = ".2g" if 0 < abs(usd) < 0.1 else ",.2f"  # a demo costs a fraction of a cent
    return "-" if math.isnan(usd) else f"${usd:{form}}"


def number(value: float, form: str = ",.0f") -> str:
    return "-" if math.isnan(value) else f"{value:{form}}"


def percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:z.1f} %"


# ---------------------------------------------------------------- the paper


def table8() -> tuple[dict, dict]:
    """The parts of Table 8, and its rows {name: {api_usd, gpus, gpu_usd}} in unrounded dollars. Of
    the published rows only the number of GPUs is used; a row without GPUs pays the API."""
    published = json.loads((DATA / "paper.json").read_text(encoding="utf-8"))["table8_cost"]
    parts = published["parts"]
    searches = parts["prompts_per_step"] * parts["rollouts"] * parts["steps"]
    searches *= parts["searches_per_rollout"]
    api_usd = searches * parts["api_usd"] / parts["api_searches"]
    gpu_usd = parts["hours"] * parts["usd_per_gpu_hour"]
    rows = {name: {"api_usd": 0.0 if row["gpus"] else api_usd, "gpus": row["gpus"],
                   "gpu_usd": row["gpus"] * gpu_usd}
            for name, row in published["rows"].items()}
    return {**parts, "searches": searches}, rows


@app.command()
def paper(as_json: JsonOption = False) -> None:
    """Table 8 of the paper from its parts, and the same with the GPUs that it does not count."""
    parts, rows = table8()
    if as_json:
        rounded = {name: {key: round(value, 1) for key, value in row.items()}
                   for name, row in rows.items()}
        return print(json.dumps({"rows": rounded}, indent=1))
    print(f"{parts['prompts_per_step']} prompts x {parts['rollouts']} rollouts"
          f" x {parts['steps']} steps x {parts['searches_per_rollout']} search"
          f" = {parts['searches']:,} searches\n")
    print_table8("Table 8: the search side alone", parts, rows)
    gpus, hours, rate = (parts[k] for k in ("policy_gpus_assumed", "hours", "usd_per_gpu_hour"))
    policy = gpus * hours * rate
    print("\nLeft out by the paper:\n"
          "- the GPUs that train the policy, which either choice needs. "
          "An assumption, not the paper's figure:\n"
          f"  {gpus} A100 x {hours} h x ${rate} = ${policy:.1f}\n"
          f"- that the simulator's GPUs idle while the policy updates: all {hours} h are paid\n")
    print_table8("With the policy's GPUs", parts, rows, policy)


def print_table8(title: str, parts: dict, rows: dict, policy: float = 0.0) -> None:
    """Print each row with its sum written out. policy: dollars added to each row."""
    api = max(row["api_usd"] for row in rows.values()) + policy
    table = []
    for name, row in rows.items():
        usd = row["api_usd"] + row["gpu_usd"] + policy
        terms = f"{parts['searches']:,} searches x ${parts['api_usd']} / {parts['api_searches']:,}"
        if row["gpus"]:
            terms = f"{row['gpus']} A100 x {parts['hours']} h x ${parts['usd_per_gpu_hour']}"
        terms += f" + ${policy:.1f}" if policy else ""
        table.append([name, terms, f"${usd:.1f}", percent(saving(usd, api))])
    print_table(title, ["engine", "sum", "cost", "saved"], table, text_columns=2)


# ---------------------------------------------------------------- a run


def add_up(steps: list[dict], notes: list[str]) -> dict[str, float]:
    """The sum of each counter, NaN if no step reports it. Adds a note on what is missing."""
    values = {key: [step[key] for step in steps if step.get(key) is not None] for key in COUNTERS}
    partial = ", ".join(f"{key} ({len(reported)} of {len(steps)})"
                        for key, reported in values.items() if 0 < len(reported) < len(steps))
    if partial:
        notes.append(f"not reported by every step, so the sum is a lower bound: {partial}")
    if missing := [key for key, reported in values.items() if not reported]:
        notes.append(f"not reported: {', '.join(missing)}")
    return {key: sum(reported) if reported else math.nan for key, reported in values.items()}


def compare(usd: dict[str, float], api_usd: float, paid_usd: float) -> dict[str, float]:
    """Dollars of the search side, of the run, and of the run with an API that answers at once for
    `api_usd`; both savings in percent. paid_usd: what a run on a real API paid for its searches. It
    also waited for them, so its saving against the same API is negative."""
    bill = {"search_side": usd["search"] + paid_usd, "whole_run": usd["step"] + paid_usd}
    bill["whole_run_with_api"] = usd["step"] - usd["search"] + api_usd
    bill["search_side_saving"] = saving(bill["search_side"], api_usd)
    bill["whole_run_saving"] = saving(bill["whole_run"], bill["whole_run_with_api"])
    return bill


def run_cost(run_dir: str | Path, prices: dict | None = None) -> dict:
    """The cost of a training run and of its searches at each API, as in Table 8. NaN: not reported.

    device_seconds (seconds x GPUs or CPU cores) and usd have a key for each phase, "step" (all of
    it) and "other" (what no phase reports). api_usd: the searches by API. paid_usd: paid to the
    engine if it is an API. bill: see `compare`. Not in a run's files and so not counted: steps that
    a resumed run set aside, and other machines that it called. Raises UserError."""
    run_dir, prices = Path(run_dir), prices or load_prices()
    engine, hardware = read_hardware(run_dir)
    steps, notes = read_counters(run_dir, COUNTERS)
    if not engine:  # it searches nothing, and does nothing but updates
        steps = [dict.fromkeys(COUNTERS, 0) | {key: step.get("time/step")
                                               for key in ("time/update", "time/step")}
                 for step in steps]
    totals = add_up(steps, notes)
    device_name = "cpu-core" if hardware["device"] == "cpu" else hardware["name"]
    device, count = price_of("device", device_name, prices), hardware["count"]
    rate = device["usd_per_hour"]
    seconds = {phase: totals[f"time/{phase}"] * count for phase in PHASES}
    step = totals["time/step"] * count
    reported = sum(value for value in seconds.values() if not math.isnan(value))
    seconds |= {"other": step - reported, "step": step}
    usd = {phase: value * rate / 3600 for phase, value in seconds.items()}
    searches = totals["cost/searches"]
    api_usd = {api: search_bill(searches, api, prices) for api in prices["search"]}
    paid_usd = api_usd.get(engine, 0.0)
    return {"run": str(run_dir), "engine": engine, "device": device["name"], "devices": count,
            "usd_per_device_hour": rate, "steps": len(steps), "searches": searches,
            "tokens": {name: totals[f"cost/{name}"] for name in TOKENS},
            "device_seconds": seconds, "usd": usd, "api_usd": api_usd, "paid_usd": paid_usd,
            "bill": compare(usd, search_bill(searches, prices=prices), paid_usd), "notes": notes}


def sum_runs(costs: list[dict]) -> dict:
    """The sum of several results of `run_cost`; NaN for a figure that a run does not report."""
    groups = {group: {key: sum(cost[group][key] for cost in costs) for key in costs[0][group]}
              for group in ("tokens", "device_seconds", "usd", "api_usd")}
    searches, paid_usd = (sum(cost[key] for cost in costs) for key in ("searches", "paid_usd"))
    return {"run": "sum", "engine": "", "searches": searches, **groups, "paid_usd": paid_usd,
            "bill": compare(groups["usd"], groups["api_usd"][PAPER_API], paid_usd)}


@app.command()
def run(
    runs: Annotated[list[Path], typer.Argument(help="Run folders: config.json and metrics.jsonl.")],
    prices: Annotated[Path, typer.Option(help=PRICES_HELP)] = DATA / "prices.toml",
    as_json: JsonOption = False,
) -> None:
    """What training runs cost, and what their searches would have cost at an API."""
    if len({run_dir.resolve() for run_dir in runs}) < len(runs):
        raise UserError("a run is named twice")
    costs = [run_cost(run_dir, load_prices(prices)) for run_dir in runs]
    together = sum_runs(costs)
    if as_json:  # strict JSON has no NaN
        text = json.dumps({"runs": costs, "sum": together})
        return print(json.dumps(json.loads(text, parse_constant=lambda _: None), indent=1))
    print_runs([*costs, together] if len(costs) > 1 else costs)
    for cost in costs:
        rent = f"{cost['devices']} x {cost['device']} at ${cost['usd_per_device_hour']} an hour"
        for note in (rent, *cost["notes"]):
            print(f"{cost['run']}: {note}")


def print_runs(rows: list[dict]) -> None:
    """Print the tables of the results of `run_cost` and `sum_runs`."""
    searches, phases, bills = [], [], []
    names = [Path(row["run"]).resolve().name for row in rows]
    if len({*names}) < len(names):  # two folders of the same name
        names = [row["run"] for row in rows]
    for name, row in zip(names, rows, strict=True):
        tokens, bill, apis = row["tokens"], row["bill"], row["api_usd"]
        counts = row["searches"], tokens["simulator_prompt_tokens"], tokens["simulator_tokens"]
        searches.append([name, row["engine"], *map(number, counts), *map(dollars, apis.values())])
        phases.append([name, *(f"{number(seconds, ',.1f')}\n{dollars(row['usd'][phase])}"
                               for phase, seconds in row["device_seconds"].items())])
        bills.append([name, dollars(bill["search_side"]), dollars(apis[PAPER_API]),
                      percent(bill["search_side_saving"]), dollars(bill["whole_run"]),
                      dollars(bill["whole_run_with_api"]), percent(bill["whole_run_saving"])])
    print_table("The searches and their bill at each API",
                ["run", "engine", "searches", "simulated in", "out", *rows[0]["api_usd"]],
                searches, text_columns=2)
    print_table("Device-seconds by phase, and their price", ["run", *rows[0]["usd"]], phases)
    header = ["run", "search side", PAPER_API, "saved", "whole run", f"with {PAPER_API}", "saved"]
    print_table(f"Against {PAPER_API}: the search side, the whole run", header, bills)
    print("simulated: tokens that the simulator read and wrote. "
          "device-seconds: seconds x devices; step: the whole step,\n"
          "reference: all passes before the update; other: what no phase reports. "
          "search side: waiting for the engine, which the paper compares;\n"
          f"{PAPER_API} is taken to answer at once. "
          "A negative saving: the run cost more than the API would have.")


def run_bills(runs: dict[str, Path]) -> tuple[dict[str, dict], list[str]]:
    """The bill of each stage for the page, of all if one prepares another, and notes on those that
    have none."""
    found, notes = {}, []
    for name, run_dir in runs.items():
        try:
            found[name] = run_cost(run_dir)
        except UserError as error:
            notes.append(f"No cost for {name}: {error}.")
    if len(found) > 1 and not all(cost["engine"] for cost in found.values()):
        devices = {(cost["devices"], cost["device"]) for cost in found.values()}
        count, device = devices.pop() if len(devices) == 1 else ("several", "devices")
        found["all stages"] = sum_runs([*found.values()]) | {"devices": count, "device": device}
    bills = {}
    for name, cost in found.items():
        usd = {f"searches at {PAPER_API}": cost["api_usd"][PAPER_API],
               "search side of the run": cost["bill"]["search_side"],
               "whole run": cost["bill"]["whole_run"]}
        bills[name] = {"searches": f"{cost['searches']:,.0f}",
                       "device": f"{cost['devices']} x {cost['device']}",
                       "bars": {kind: (x, dollars(x)) for kind, x in usd.items()}}
    return bills, notes


# ---------------------------------------------------------------- a plan


ESTIMATED = ("policy_params", "simulator_params", "episode_tokens", "search_tokens", "utilisation")


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
    episode_tokens: float = option(2000, "Estimate: tokens per episode with documents.", above=0)
    search_tokens: float = option(1000, "Estimate: tokens per simulation with prompt.", above=0)
    utilisation: float = option(0.1, "Estimate: fraction of peak FLOP/s.", above=0, high=1)
    api: str = option(PAPER_API, "A search API of the prices.")
    prices: Path = option(DATA / "prices.toml", PRICES_HELP)

    def check(self) -> None:
        super().check()
        for name, value in vars(self).items():
            if isinstance(value, int | float) and value > 1e15:  # products stay finite
                raise UserError(f"--{name.replace('_', '-')} must be at most 1e+15")
        if self.hours and self.seconds_per_step:
            raise UserError("give --hours or --seconds-per-step, not both")

    def unused(self) -> dict[str, str]:
        known = self.hours or self.seconds_per_step
        return dict.fromkeys(ESTIMATED if known else (), "where the run's length is given")


@command(app, PlanSettings)
def plan(s: PlanSettings) -> None:
    """What a run would cost before it starts, and from how many searches on a simulator pays.

    Without --hours and --seconds-per-step the hours are estimated from FLOPs: 2 x parameters for a
    token generated or prefilled, 6 x for a token trained. The default utilisation puts the paper's
    set-up near its 12 hours. An API is taken to answer at once: with it the policy's GPUs are paid
    for the policy's hours alone. Hours that are given are taken for either engine."""
    prices = load_prices(s.prices)
    device, per_search = price_of("device", s.gpu, prices), search_bill(1, s.api, prices)
    peak = device.get("bf16_tflops")
    hours = s.hours or (s.seconds_per_step or 0) * s.steps / 3600
    if not (hours or is_amount(peak) and peak > 0):
        raise UserError(f"no bf16_tflops for {s.gpu!r} to estimate from: "
                        "give --hours or --seconds-per-step")
    searches = s.steps * s.prompts * s.rollouts * s.searches
    print(f"{s.steps} steps x {s.prompts} prompts x {s.rollouts} rollouts x {s.searches:g} searches"
          f" = {searches:,.0f} searches")
    at_api, hours = (hours, hours) if hours else estimate_hours(s, peak, searches)
    rate = device["usd_per_hour"]
    print(f"{hours:,.2f} h on {s.gpu} at ${rate} an hour for each GPU\n")
    policy = {s.api: s.policy_gpus * at_api * rate, "simulator": s.policy_gpus * hours * rate}
    print_bills(searches, s.simulator_gpus * hours * rate, policy, s.api, per_search)


def estimate_hours(s: PlanSettings, peak_tflops: float, searches: float) -> tuple[float, float]:
    """Hours of the policy alone and of the whole run, from their FLOPs. Prints the terms."""
    episodes, hours = s.steps * s.prompts * s.rollouts, []
    for who, gpus, flop, terms in (
        ("policy", s.policy_gpus, episodes * s.episode_tokens * (2 + 2 + 6) * s.policy_params,
         f"{episodes:,} episodes x {s.episode_tokens:,.0f} tokens"
         f" x (2 sample + 2 reference + 6 train) x {s.policy_params:.3g}"),
        ("simulator", s.simulator_gpus, searches * s.search_tokens * 2 * s.simulator_params,
         f"{searches:,.0f} searches x {s.search_tokens:,.0f} tokens"
         f" x 2 x {s.simulator_params:.3g}"),
    ):
        more = flop / (gpus * peak_tflops * 1e12 * s.utilisation) / 3600
        print(f"{who}: {terms} = {flop:.3g} FLOP\n"
              f"  / ({gpus} GPUs x {peak_tflops} TFLOP/s x {s.utilisation:g}) = {more:.2f} h")
        hours.append(more)
    return hours[0], sum(hours)  # the policy waits for its documents: the hours add up


def print_bills(searches: float, rent: float, policy: dict[str, float], api: str,
                per_search: float) -> None:
    """Print the bill with either engine, the break-even point, and bills of other numbers. Dollars:
    rent for the simulator's GPUs, policy: the policy's by engine, per_search at the API."""
    usd = searches * per_search
    whole = usd + policy[api], rent + policy["simulator"]
    rows = [("search side", usd, rent), ("whole run", *whole)]
    bill = [[name, dollars(at_api), dollars(simulated), percent(saving(simulated, at_api))]
            for name, at_api, simulated in rows]
    bill.insert(1, ["policy's GPUs", dollars(policy[api]), dollars(policy["simulator"]), ""])
    print_table("The bill", ["", api, "simulator", "saved"], bill)
    if rent <= usd:
        print(f"Break-even: ${rent:,.2f} / ${per_search:.6g} a search"
              f" = {math.ceil(rent / per_search):,} searches\n")
    else:
        print(f"No break-even: a simulated search costs ${rent / searches:.6g},"
              f" one at {api} ${per_search:.6g}\n")
    table = []
    for count in (10**exponent for exponent in range(3, 9)):
        at_api, simulated = count * per_search, rent * max(1, count / searches)
        cheaper = api if at_api <= simulated else "simulator"
        table.append([f"{count:,}", dollars(at_api), dollars(simulated), cheaper])
    print_table("The search side by number of searches",
                ["searches", api, "simulator", "cheaper"], table)
    print("The simulator's rent is due for the whole run, however few its searches; "
          "past the planned number it grows\nin proportion.")


if __name__ == "__main__":
    run_cli(app)

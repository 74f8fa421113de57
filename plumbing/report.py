"""Figures of the report, drawn with Matplotlib from data that the chapters pass in."""

from itertools import cycle
from pathlib import Path

import numpy as np

# The palette of Okabe and Ito, which colour-blind readers can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLE = {"figure.constrained_layout.use": True, "font.size": 10, "axes.titlesize": 11,
         "axes.titlelocation": "left", "axes.spines.top": False, "axes.spines.right": False,
         "axes.axisbelow": True, "grid.color": "0.9", "legend.frameon": False, "savefig.dpi": 150}


def with_interval(m: dict[str, float], digits: int = 1) -> str:
    return f"{m['mean']:.{digits}f} ({m['low']:.{digits}f} to {m['high']:.{digits}f})"


def panels(count: int, heights: list[float], columns: int = 1, **options):
    """Figure and axes of `count` rows of panels: 1200 pixels wide, heights in inches."""
    import matplotlib  # here: only `report` needs it

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(STYLE)
    fig, axes = plt.subplots(count, columns, figsize=(8, sum(heights)), height_ratios=heights,
                             squeeze=False, **options)
    return fig, axes.ravel()


def save_figure(fig, path: Path) -> None:
    import matplotlib.pyplot as plt

    fig.savefig(path)
    plt.close(fig)


def horizontal_bars(ax, labels: list[str], title: str) -> None:
    ax.set_yticks(range(len(labels)), labels)
    ax.set_title(title)
    ax.invert_yaxis()
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="x")


def draw_training(trainings: dict[str, list[dict]], held_out: dict[str, list[dict]],
                  path: Path) -> None:
    """Reward, searches and noise by step: points, and a moving mean over 1/20 of the run (min. 3).
    A last panel has the held-out reward. Without noise, or held-out questions: no such panel.

    trainings, held_out: name -> lines of metrics.jsonl and of eval.jsonl."""
    from matplotlib.ticker import MaxNLocator

    heights = {"reward": 3.0, "searches": 1.9}
    if any("noise/p" in steps[0] for steps in trainings.values()):
        heights["noise"] = 1.7
    if held_out:
        heights["held out"] = 2.2
    fig, axes = panels(len(heights), list(heights.values()), sharex=True)
    panel = dict(zip(heights, axes))
    for (name, steps), colour in zip(trainings.items(), cycle(COLOURS)):
        x = [step["step"] for step in steps]
        kernel = np.ones(min(len(x), max(3, len(x) // 20)))
        for ax, key in zip(axes, ("reward/mean", "search/per_episode")):
            y = [step[key] for step in steps]
            smooth = np.convolve(y, kernel, "same") / np.convolve(np.ones(len(y)), kernel, "same")
            ax.plot(x, y, ".", color=colour, alpha=0.35, markersize=5)
            label = name if key == "reward/mean" else None
            ax.plot(x, smooth, color=colour, linewidth=2, label=label)
        if "noise/p" in steps[0]:
            noise = [step["noise/p"] for step in steps]
            panel["noise"].plot(x, noise, color=colour, linewidth=2)
        if curve := held_out.get(name):
            draw_held_out(panel["held out"], curve, colour)
    parted = any("eval/reward/hops_" in key for curve in held_out.values() for key in curve[0])
    parts = "; thin: 1 hop dotted, 2 dashed, 3 dash-dotted" * parted
    titles = {"reward": ("Training reward", "mean reward, 0 to 1"),
              "searches": ("Searches", "per episode"),
              "noise": ("Curriculum: share of searches answered with noise", "probability p"),
              "held out": (f"Held-out, greedy, no noise{parts}", "mean reward")}
    for name, ax in panel.items():
        title, label = titles[name]
        ax.set(title=title, ylabel=label, ylim=(0, 1.1 * max(ax.get_ylim()[1], 0.1)))
        ax.grid(axis="y")
    axes[-1].set_xlabel("step")
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    fig.legend(loc="outside lower center", ncols=3)
    save_figure(fig, path)


def draw_held_out(ax, curve: list[dict], colour: str) -> None:
    """The held-out reward, and thinner that of one, two and three hops, where it is known."""
    done = [line["step"] for line in curve]
    ax.plot(done, [line["eval/reward"] for line in curve], "o-", color=colour, linewidth=2,
            markersize=5)
    for hops, style in ((1, ":"), (2, "--"), (3, "-.")):
        if (key := f"eval/reward/hops_{hops}") in curve[0]:
            ax.plot(done, [line[key] for line in curve], style, color=colour, linewidth=1)


def draw_em(evaluations: dict[str, dict], path: Path) -> None:
    """Exact match with intervals: a panel per benchmark, a colour per method.

    evaluations: name -> results.json."""
    benchmarks: dict[str, list[tuple[str, dict]]] = {}
    for name, r in evaluations.items():
        benchmarks.setdefault(r["benchmark"], []).append((name, r))
    colours = dict(zip(dict.fromkeys(r["method"] for r in evaluations.values()), cycle(COLOURS)))
    heights = [0.7 + 0.4 * len(bars) for bars in benchmarks.values()]
    fig, axes = panels(len(benchmarks), heights, sharex=True)
    for ax, (benchmark, bars) in zip(axes, benchmarks.items()):
        for place, (_, r) in enumerate(bars):
            em = r["metrics"]["em"]
            errors = [[em["mean"] - em["low"]], [em["high"] - em["mean"]]]
            ax.barh(place, em["mean"], color=colours[r["method"]], height=0.62, xerr=errors,
                    error_kw={"capsize": 3})
            ax.annotate(f"{em['mean']:.1f}, n {r['n']}", (em["high"], place), (6, 0),
                        textcoords="offset points", va="center")
        labels = [name if r["method"] in name else f"{name} ({r['method']})" for name, r in bars]
        horizontal_bars(ax, labels, benchmark)
        ax.set_xlim(0, 100)
    axes[-1].set_xlabel("exact match, %, with 95 % interval; n: number of questions")
    save_figure(fig, path)


def draw_hops(agents: dict[str, dict], path: Path) -> None:
    """EM and searches by number of hops, the runs side by side, with 95 % intervals.

    agents: name -> by_hops of results.json."""
    from matplotlib.ticker import MaxNLocator

    fig, axes = panels(2, [2.6, 2.2], sharex=True)
    hops = sorted({hop for found in agents.values() for hop in found})
    width = 0.8 / len(agents)
    for number, ((name, found), colour) in enumerate(zip(agents.items(), cycle(COLOURS))):
        places = [place - 0.4 + width * (number + 0.5) for place, hop in enumerate(hops)
                  if hop in found]
        for ax, metric in zip(axes, ("em", "searches")):
            scores = [found[hop][metric] for hop in hops if hop in found]
            means = [m["mean"] for m in scores]
            errors = [[m["mean"] - m["low"] for m in scores],
                      [m["high"] - m["mean"] for m in scores]]
            ax.bar(places, means, width=0.94 * width, color=colour, yerr=errors,
                   error_kw={"capsize": 3}, label=name if metric == "em" else None)
    counts = [max(found[hop]["n"] for found in agents.values() if hop in found) for hop in hops]
    axes[0].set(title="Exact match, %", ylim=(0, 100))
    axes[1].set(title="Searches a question", ylim=(0, None))
    axes[1].yaxis.set_major_locator(MaxNLocator(integer=True))
    axes[1].set_xticks(range(len(hops)), [f"{hop} hop{'s' * (hop != '1')} (n = {n})"
                                          for hop, n in zip(hops, counts)])
    for ax in axes:
        ax.grid(axis="y")
    fig.legend(loc="outside lower center", ncols=3)
    save_figure(fig, path)


def draw_costs(bills: dict[str, dict[str, tuple[float, str]]], path: Path) -> None:
    """Search costs, on a log scale: a bar per run and kind; none for 0 and for what is not known.

    bills: run -> kind -> (US dollars, their text)."""
    fig, (ax,) = panels(1, [0.9 + 0.9 * len(bills)])
    known = [usd for bill in bills.values() for usd, _ in bill.values() if usd > 0] or [1.0]
    least = min(known) / 3
    ax.set(xscale="log", xlabel="US dollars, log scale", xlim=(least, 100 * max(known)))
    for place, bill in enumerate(bills.values()):
        for k, ((kind, (usd, text)), colour) in enumerate(zip(bill.items(), COLOURS)):
            width, y = usd if usd > 0 else least, place + 0.26 * (k - 1)
            ax.barh(y, width, height=0.24, color=colour)
            # The label names the kind: most bars are too short to show their colour.
            ax.annotate(f"{text}  {kind}", (width, y), (5, 0), textcoords="offset points",
                        va="center")
    horizontal_bars(ax, list(bills), "What searching costs")
    save_figure(fig, path)

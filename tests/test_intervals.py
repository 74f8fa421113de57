"""plumbing/intervals.py: intervals and p-values against written-down and simulated ones."""

import math

import numpy as np
import pytest
from helpers import score_interval

import evaluate
from plumbing import intervals


def test_interval_of_a_proportion_is_wilsons():
    for n, right in ((8, 0), (8, 8), (3, 2), (60, 21), (60, 2), (60, 57), (500, 1)):
        (m,) = evaluate.summarize([{"em": 100.0 * (i < right)} for i in range(n)]).values()
        assert m["n"] == n and m["mean"] == pytest.approx(100 * right / n)
        assert [m["low"], m["high"]] == pytest.approx(score_interval(m["mean"], n), abs=1e-3)
    assert intervals.wilson(0.0, 8) == pytest.approx((0, 32.44), abs=0.01)


def test_bootstrap_interval_is_the_binomial_one():
    """Resampling two values makes binomial means, whose percentiles can be written down."""
    n, ones = 60, 21
    interval = evaluate.summarize([{"f1": float(i < ones)} for i in range(n)])["f1"]
    share = ones / n
    chances = [math.comb(n, k) * share**k * (1 - share) ** (n - k) for k in range(n + 1)]
    low, high = np.searchsorted(np.cumsum(chances), [0.025, 0.975]) / n
    assert interval["mean"] == share
    assert [interval["low"], interval["high"]] == pytest.approx([low, high], abs=1 / n)


@pytest.mark.parametrize(("table", "interval"), [
    # both right, only A, only B, neither; intervals of A - B: Newcombe 1998, table II, method 10
    ((36, 12, 2, 0), (5.69, 34.04)), ((36, 14, 0, 0), (15.28, 41.67)),
    # both runs got everything wrong: as wide as Wilson's interval of 0 of 8
    ((0, 0, 0, 8), (-32.44, 32.44))])
def test_interval_of_a_paired_difference_is_newcombes(table, interval):
    answers = [(100.0, 100.0), (100.0, 0.0), (0.0, 100.0), (0.0, 0.0)]
    a, b = np.array([pair for pair, n in zip(answers, table) for _ in range(n)]).T
    assert intervals.paired_interval(b, a) == pytest.approx(interval, abs=0.005)


@pytest.mark.slow
def test_interval_of_a_proportion_holds_it_in_92_percent_of_samples():
    """20,000 samples each. The least at any n from 8 to 500: 91 %, at n = 13 and p = 0.23."""
    rng = np.random.default_rng(0)
    for n in (8, 10, 16, 20, 25, 30, 50, 64, 100, 125, 200, 350, 500):
        ends = np.array([intervals.proportion_interval(100 * k / n, n) for k in range(n + 1)])
        for p in (0.01, 0.02, 0.03, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5):
            low, high = ends[rng.binomial(n, p, 20_000)].T
            assert np.mean((low <= 100 * p) & (100 * p <= high)) >= 0.92, (n, p)


@pytest.mark.slow
@pytest.mark.parametrize("n", [8, 30, 125, 500])
def test_interval_of_a_paired_difference_holds_it_in_92_percent_of_samples(n):
    """Of a paired difference: in 4,000 draws."""
    rng = np.random.default_rng(0)
    for p in (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5):
        for other, shared in ((p, 0.5), (min(2 * p, 0.9), 0.5), (p, 0.0)):
            # each question is drawn for both runs at once with chance `shared`
            draws, common = rng.random((2, 4_000, n)), rng.random((4_000, n)) < shared
            a = draws[0] < p
            b = np.where(common, draws[0], draws[1]) < other
            held = [low - 1e-9 <= 100 * (other - p) <= high + 1e-9 for low, high in
                    (intervals.paired_interval(100.0 * x, 100.0 * y) for x, y in zip(a, b))]
            assert np.mean(held) >= 0.92, (p, other, shared)


@pytest.mark.parametrize(("differences", "p"), [
    ([1, 1, 0, 0], 2 / 4), ([3, 1], 2 / 4),  # ++ and --, of four patterns of signs
    ([1] * 5, 2 / 32), ([0, 0], 1.0),
    ([1, 1, -1], 8 / 8),  # |sum| is 1 or 3, never less than 1
    ([1] * 40, 1 / 10_001),  # too many patterns: random ones, none as extreme
])
def test_sign_flip_p(differences, p):
    assert intervals.sign_flip_p(np.array(differences, dtype=float)) == pytest.approx(p)

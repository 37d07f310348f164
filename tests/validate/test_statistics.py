"""The arithmetic of evidence against tables, closed forms, brute force and simulation."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compiler.spec import Outcome
from compiler.validate import statistics
from compiler.validate.statistics import (
    bootstrap_median,
    mean_bounds,
    mean_samples,
    paired_allowance,
    paired_bounds,
    paired_floor,
    paired_samples,
    paired_verdict,
    paired_z,
    percentile,
    percentile_bounds,
    percentile_floor,
    share_bounds,
    share_samples,
    skew_share,
    z_value,
)

Z95 = 1.6448536269514722


def closed_form(lost: int, gained: int, samples: int, z: float) -> tuple[float, float]:
    """Bounds as the two roots of a quartic, after Yang, Sun and Hardin (2012): no statistic is evaluated.

    With the constrained estimate put in, ``(g - l - n d)^2 = z^2 n (2q + d(1 - d))`` becomes ``p(d) = sqrt(disc(d))``;
    squared, a quartic, of whose roots those with ``p >= 0`` are the bounds.
    """
    poly = np.poly1d
    b = poly([2 * samples - gained + lost, -(gained + lost)])
    disc = b * b - 8 * samples * poly([lost, -lost, 0])
    p = 2 * (poly([-samples, gained - lost]) ** 2 * (1 / z**2) - samples * poly([-1, 1, 0])) + b
    roots = (p * p - disc).roots
    real = roots.real[(np.abs(roots.imag) < 1e-6) & (np.abs(roots.real) <= 1 + 1e-9)]
    bounds = real[p(real) >= -1e-6 * samples]
    return float(bounds.min()), float(bounds.max())


def exact_power(n: int, flips: float, change: float, margin: float) -> float:
    """Probability of PASS, summed over the tables that are likely enough to matter."""
    from scipy.stats import binom

    total = 0.0
    for count in range(int(binom.ppf(1e-7, n, flips)), int(binom.ppf(1 - 1e-7, n, flips)) + 1):
        lost = np.arange(count + 1)
        passed = paired_z(lost, count - lost, n, -margin) > Z95
        total += binom.pmf(count, n, flips) * binom.pmf(lost[passed], count, (flips - change) / 2 / flips).sum()
    return float(total)


class TestPairedScore:
    def test_the_airway_table(self) -> None:
        """Table (1, 1, 7, 12), 95 % two-sided, published as -0.5172 to -0.0260."""
        low, high = paired_bounds(7, 1, 21, 0.975)
        assert (round(low, 4), round(high, 4)) == (-0.5172, -0.0260)

    def test_two_thousand_random_tables_equal_the_closed_form(self) -> None:
        rng = np.random.default_rng(20)
        worst = 0.0
        for _ in range(2000):
            n = int(rng.integers(5, 3000))
            most = n // 2 if rng.random() < 0.5 else min(n // 2, 8)
            lost, gained = (int(value) for value in rng.integers(0, most + 1, 2))
            expected = closed_form(lost, gained, n, Z95)
            found = paired_bounds(lost, gained, n, 0.95)
            worst = max(worst, abs(found[0] - expected[0]), abs(found[1] - expected[1]))
        assert worst < 1e-9

    def test_the_constrained_estimate_maximises_the_likelihood(self) -> None:
        """q in Z is the maximum-likelihood share of lost samples under H0, found here by trying all of them."""
        for lost, gained, n, d in ((7, 1, 21, -0.1), (0, 5, 40, -0.05), (12, 30, 200, 0.02), (3, 0, 100, -0.2)):
            q = np.linspace(max(0.0, -d), (1 - d) / 2, 2_000_001)[1:-1]
            p = q + d
            with np.errstate(divide="ignore", invalid="ignore"):
                terms = [count * np.log(share) for count, share in ((gained, p), (lost, q)) if count]
                likelihood = np.sum(terms, axis=0) + (n - lost - gained) * np.log(1 - p - q)
            best = q[np.nanargmax(likelihood)]
            expected = (gained - lost - n * d) / math.sqrt(n * (2 * best + d * (1 - d)))
            assert float(paired_z(lost, gained, n, d)) == pytest.approx(expected, rel=1e-5)

    def test_at_no_difference_it_is_mcnemars_test(self) -> None:
        assert float(paired_z(30, 12, 500, 0.0)) == pytest.approx((12 - 30) / math.sqrt(42))

    def test_without_a_change_the_bound_is_minus_z2_over_n_plus_z2(self) -> None:
        for n in (10, 267, 268, 5000):
            low, high = paired_bounds(0, 0, n, 0.95)
            assert low == pytest.approx(-(Z95**2) / (n + Z95**2), abs=1e-12)
            assert high == pytest.approx(-low, abs=1e-12)

    def test_at_one_per_cent_267_samples_are_too_few_and_268_are_enough(self) -> None:
        assert paired_verdict(0, 0, 267, 0.01, 0.95) is Outcome.INCONCLUSIVE
        assert paired_verdict(0, 0, 268, 0.01, 0.95) is Outcome.PASS

    def test_floors_of_the_usual_margins(self) -> None:
        assert [paired_floor(margin, 0.95) for margin in (0.02, 0.01, 0.005, 0.001)] == [133, 268, 539, 2703]

    def test_losing_everything_and_gaining_everything(self) -> None:
        assert paired_bounds(50, 0, 50, 0.95)[0] == -1.0
        assert paired_bounds(0, 50, 50, 0.95)[1] == 1.0

    @pytest.mark.parametrize("margin", [0.02, 0.01, 0.005])
    @pytest.mark.parametrize("share", [0.0, 0.25, 0.49])
    def test_exact_power_at_the_size_that_is_named(self, margin: float, share: float) -> None:
        for flips in (margin / 2, margin, 2 * margin, 5 * margin):
            change = -share * margin if share * margin <= flips else 0.0
            n = paired_samples(flips, change, margin, 0.95)
            assert n is not None
            assert 0.84 <= exact_power(n, flips, change, margin) <= 0.95

    def test_the_short_formula_would_name_too_few(self) -> None:
        """The planted fault: flips of half the margin, by ((z sqrt(psi - m^2) + z' sqrt(psi)) / m)^2."""
        n = math.ceil(((1.645 * math.sqrt(0.005 - 0.01**2) + 1.282 * math.sqrt(0.005)) / 0.01) ** 2)
        assert exact_power(n, 0.005, 0.0, 0.01) < 0.7

    def test_with_many_flips_it_is_the_textbook_number(self) -> None:
        """n = ((1.645 + 1.282) / m)^2 psi = 34,260 for half a point and ten per cent of flips."""
        assert paired_samples(0.1, 0.0, 0.005, 0.95) == pytest.approx(34_260, rel=0.002)

    def test_no_number_of_samples_passes_an_engine_at_the_limit(self) -> None:
        assert paired_samples(0.02, -0.01, 0.01, 0.95) is None
        assert paired_samples(0.0, 0.0, 0.0, 0.95) is None

    def test_net_losses_that_pass(self) -> None:
        sizes = (1000, 2000, 5000, 10000, 50000)
        assert [paired_allowance(n // 50, n, 0.01, 0.95) for n in sizes] == [2, 9, 32, 76, 447]
        assert paired_allowance(0, 100, 0.01, 0.95) is None

    def test_an_engine_at_the_limit_passes_in_at_most_6_per_cent_and_one_beyond_it_less(self) -> None:
        rng = np.random.default_rng(1)
        for n, flips, drop, most in (
            (500, 0.05, 0.01, 0.06),
            (1000, 0.02, 0.01, 0.06),
            (5000, 0.02, 0.01, 0.06),
            (500, 0.05, 0.02, 0.01),
        ):
            lost, gained = (rng.multinomial(n, [(flips + drop) / 2, (flips - drop) / 2, 1 - flips], 20_000).T)[:2]
            assert (paired_z(lost, gained, n, -0.01) > Z95).mean() <= most

    def test_a_comparison_of_measured_numbers_would_pass_half_of_them(self) -> None:
        """The planted fault: what the score test is there to prevent."""
        rng = np.random.default_rng(2)
        lost, gained, _ = rng.multinomial(1000, [0.015, 0.005, 0.98], 20_000).T
        assert ((lost - gained) / 1000 < 0.01).mean() > 0.4

    def test_a_lossless_engine_passes_in_at_least_84_per_cent_at_the_size_that_is_named(self) -> None:
        rng = np.random.default_rng(3)
        for margin, flips in ((0.01, 0.01), (0.01, 0.02), (0.01, 0.05), (0.005, 0.01), (0.02, 0.05)):
            n = paired_samples(flips, 0.0, margin, 0.95)
            assert n is not None
            lost, gained, _ = rng.multinomial(n, [flips / 2, flips / 2, 1 - flips], 20_000).T
            assert (paired_z(lost, gained, n, -margin) > Z95).mean() >= 0.84

    @settings(max_examples=200, deadline=None)
    @given(st.data())
    def test_verdict_and_interval_never_contradict_each_other(self, data: Any) -> None:
        n = data.draw(st.integers(1, 5000))
        lost = data.draw(st.integers(0, n))
        gained = data.draw(st.integers(0, n - lost))
        margin = data.draw(st.floats(1e-4, 0.5))
        low, high = paired_bounds(lost, gained, n, 0.95)
        assert -1 <= low <= (gained - lost) / n <= high <= 1
        verdict = paired_verdict(lost, gained, n, margin, 0.95)
        if low > -margin + 1e-9:
            assert verdict is Outcome.PASS
        elif high < -margin - 1e-9:
            assert verdict is Outcome.FAIL
        elif low < -margin - 1e-9 and high > -margin + 1e-9:
            assert verdict is Outcome.INCONCLUSIVE

    @settings(max_examples=200, deadline=None)
    @given(st.integers(2, 3000), st.integers(0, 40), st.integers(0, 40))
    def test_swapping_the_two_models_mirrors_the_interval_and_one_more_loss_never_helps(
        self, n: int, lost: int, gained: int
    ) -> None:
        lost, gained = min(lost, n // 3), min(gained, n // 3)
        low, high = paired_bounds(lost, gained, n, 0.95)
        mirrored = paired_bounds(gained, lost, n, 0.95)
        assert mirrored == pytest.approx((-high, -low), abs=1e-9)
        assert paired_bounds(lost + 1, gained, n, 0.95)[0] <= low + 1e-12


class TestShare:
    def test_a_textbook_interval(self) -> None:
        """Newcombe (1998), Statistics in Medicine 17:857, table I: 81 of 263, 95 % two-sided, 0.2553 to 0.3662."""
        assert share_bounds(81, 263, 0.975) == pytest.approx((0.2553, 0.3662), abs=5e-5)

    def test_bounds_solve_the_score_equation(self) -> None:
        for right, n in ((0, 20), (3, 50), (50, 50), (970, 1000)):
            low, high = share_bounds(right, n, 0.95)
            for bound, sign in ((low, 1), (high, -1)):
                if 0 < bound < 1:
                    z = (right / n - bound) / math.sqrt(bound * (1 - bound) / n)
                    assert z == pytest.approx(sign * Z95)

    def test_none_and_all_reach_the_ends(self) -> None:
        assert share_bounds(0, 30, 0.95)[0] == 0.0
        assert share_bounds(30, 30, 0.95)[1] == 1.0

    def test_the_samples_named_are_the_fewest_that_show_a_perfect_share(self) -> None:
        needed = share_samples(1.0, 0.98, 0.95)
        assert needed == 133
        assert share_bounds(133, 133, 0.95)[0] >= 0.98 > share_bounds(132, 132, 0.95)[0]

    def test_a_share_at_its_limit_is_shown_by_no_number_of_samples(self) -> None:
        assert share_samples(0.98, 0.98, 0.95) is None

    def test_power_at_the_size_that_is_named(self) -> None:
        rng = np.random.default_rng(4)
        for share, limit in ((0.99, 0.98), (0.995, 0.98), (0.9, 0.85)):
            n = share_samples(share, limit, 0.95)
            assert n is not None
            passed = [share_bounds(right, n, 0.95)[0] >= limit for right in rng.binomial(n, share, 2000)]
            assert np.mean(passed) >= 0.84


class TestMean:
    def test_bounds_equal_scipy(self) -> None:
        from scipy import stats

        values = np.random.default_rng(5).normal(3.0, 2.0, 40)
        expected = stats.ttest_1samp(values, 0.0).confidence_interval(0.90)
        found = mean_bounds(float(values.mean()), float(values.std(ddof=1)), 40, 0.95)
        assert found == pytest.approx((expected.low, expected.high), rel=1e-12)

    def test_without_spread_the_bounds_are_the_mean(self) -> None:
        assert mean_bounds(0.5, 0.0, 30, 0.95) == (0.5, 0.5)

    def test_samples_for_a_distance_of_half_a_standard_deviation(self) -> None:
        """((1.645 + 1.282) / 0.5)^2 = 34.3."""
        assert mean_samples(0.5, 1.0, 0.95) == 35
        assert mean_samples(5.0, 1.0, 0.95) == 30
        assert mean_samples(0.0, 1.0, 0.95) is None

    def test_false_pass_and_power(self) -> None:
        rng = np.random.default_rng(6)
        n = mean_samples(0.2, 1.0, 0.95)
        assert n is not None
        at_limit = rng.normal(0.2, 1.0, (4000, n))
        inside = rng.normal(0.0, 1.0, (4000, n))
        highs = []
        for sets in (at_limit, inside):
            _, high = mean_bounds(0.0, 1.0, n, 0.95)
            highs.append(sets.mean(axis=1) + sets.std(axis=1, ddof=1) * high)
        assert (highs[0] <= 0.2).mean() <= 0.06
        assert (highs[1] <= 0.2).mean() >= 0.84

    def test_skewness_is_reported_where_a_few_samples_weigh_much(self) -> None:
        rng = np.random.default_rng(7)
        assert skew_share(rng.normal(size=1000)) < 0.02
        assert skew_share(np.r_[np.zeros(99), 1.0]) > 0.2
        assert skew_share(np.zeros(50)) == 0.0


class TestTime:
    def test_percentile_floors_are_those_of_loadgen(self) -> None:
        assert [percentile_floor(share) for share in (0.5, 0.9, 0.95, 0.99, 0.999)] == [11, 64, 130, 662, 6636]

    def test_one_call_fewer_gives_no_percentile(self) -> None:
        calls = np.arange(662.0)
        assert percentile(calls[:661], 0.99) is None
        assert percentile(calls, 0.99) == pytest.approx(np.quantile(calls, 0.99))
        assert percentile(calls[:10], 0.5) is None

    def test_percentile_bounds_equal_a_search_over_order_statistics(self) -> None:
        from scipy import stats

        calls = np.sort(np.random.default_rng(8).exponential(size=700))
        low, high = percentile_bounds(calls, 0.99, 0.95)
        below = stats.binom(700, 0.99)
        high_rank = next(rank for rank in range(1, 701) if below.cdf(rank - 1) >= 0.95)
        low_rank = next(rank for rank in range(700, 0, -1) if below.sf(rank - 1) >= 0.95)
        assert (low, high) == (calls[low_rank - 1], calls[high_rank - 1])

    def test_percentile_bounds_cover_the_truth_as_often_as_they_say(self) -> None:
        rng = np.random.default_rng(9)
        truth = -math.log(0.1)
        bounds = [percentile_bounds(rng.exponential(size=200), 0.9, 0.95) for _ in range(1500)]
        assert np.mean([low is not None and low > truth for low, _ in bounds]) <= 0.06
        assert np.mean([high is not None and high < truth for _, high in bounds]) <= 0.06

    def test_too_few_calls_bound_nothing(self) -> None:
        assert percentile_bounds(np.arange(20.0), 0.99, 0.95)[1] is None
        assert percentile_bounds(np.arange(4.0), 0.01, 0.95)[0] is None

    def test_the_bootstrap_is_the_same_every_time_and_covers_the_median(self) -> None:
        rng = np.random.default_rng(10)
        values = rng.normal(size=20)
        assert bootstrap_median(values, 0.95) == bootstrap_median(values, 0.95)
        hits = 0
        for _ in range(150):
            low, high = bootstrap_median(rng.normal(size=20), 0.95)
            hits += low <= 0 <= high
        assert hits >= 0.88 * 150

    def test_equal_blocks_have_no_width(self) -> None:
        assert bootstrap_median(np.full(20, 0.25), 0.95) == (0.25, 0.25)

    def test_the_bootstrap_refuses_right_or_wrong_samples(self) -> None:
        for values in (np.array([True, False]), np.array([0, 1, 1])):
            with pytest.raises(AssertionError, match="a bootstrap is for continuous values"):
                bootstrap_median(values, 0.95)


def test_the_normal_quantile_is_scipys() -> None:
    from scipy import stats

    for confidence in (0.5, 0.9, 0.95, 0.999):
        assert z_value(confidence) == pytest.approx(float(stats.norm.ppf(confidence)), abs=1e-14)


def test_every_bound_is_stated_at_the_same_confidence() -> None:
    """95 % here is 5 % on either side: the two-sided 90 % interval of other programs."""
    assert statistics.paired_bounds(500, 500, 10_000, 0.95)[1] == pytest.approx(1.645 * math.sqrt(0.1) / 100, rel=0.01)
    assert statistics.mean_bounds(0.0, 1.0, 10_000, 0.95)[1] == pytest.approx(0.01645, rel=1e-3)

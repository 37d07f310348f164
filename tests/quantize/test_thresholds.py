"""Ranges: each method against numbers known by hand, and scales that can always be divided by."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from compiler.quantize import thresholds
from compiler.quantize.formats import Grid
from compiler.quantize.observe import TensorStatistics, measure
from compiler.spec import Array

METHODS = ("minmax", "percentile", "entropy", "mse")


def scale(values: Array, method: str, percentile: float = 99.99) -> float:
    found = thresholds.grid(measure(values), method=method, percentile=percentile, symmetric=True)
    assert found.zero_point == 0
    return float(found.scale)


def shifted(values: Array, method: str) -> Grid:
    return thresholds.grid(measure(values), method=method, percentile=99.99, symmetric=False)


def reach(grid: Grid) -> tuple[float, float]:
    """The lowest and the highest number of a grid."""
    scale = float(grid.scale)
    return scale * (-128 - grid.zero_point), scale * (127 - grid.zero_point)


def squared_error(values: Array, threshold: float) -> float:
    """Mean squared error of rounding, by doing it."""
    step = threshold / 127
    return float(np.mean((values - np.clip(np.rint(values / step), -127, 127) * step) ** 2))


def error_on(grid: Grid, values: Array) -> float:
    """The same on a grid of INT8."""
    step = float(grid.scale)
    steps = np.clip(np.rint(values / step) + grid.zero_point, -128, 127)
    return float(np.mean((values - (steps - grid.zero_point) * step) ** 2))


def test_minmax_is_the_largest_magnitude_whatever_its_sign() -> None:
    assert scale(np.array([-2.54, 1.0, 0.0]), "minmax") == pytest.approx(0.02)


def test_the_median_of_1_to_1000_is_500() -> None:
    # Bins are 2 wide here (256 to 512), and values spread evenly over them.
    assert thresholds.from_percentile(measure(np.arange(1, 1001)), 50) == pytest.approx(500, abs=2)


def test_the_100th_percentile_is_the_peak() -> None:
    assert thresholds.from_percentile(measure(np.array([0.1, -7.3, 2.0])), 100) == np.float32(7.3)


def test_a_percentile_ignores_one_outlier_among_many() -> None:
    values = np.concatenate([np.linspace(-1, 1, 100_000), [1e4]])
    assert scale(values, "percentile") * 127 == pytest.approx(1, rel=0.01)


def test_a_percentile_that_falls_among_zeros_takes_the_peak() -> None:
    values = np.zeros(1000)
    values[0] = 3.0
    assert thresholds.from_percentile(measure(values), 99) == 3.0


def test_entropy_clips_nothing_of_even_values() -> None:
    # 128 levels describe a flat distribution completely: divergence 0 for the whole range, more for any part of it.
    assert scale(np.linspace(-3, 3, 100_001), "entropy") * 127 == pytest.approx(3)


def test_entropy_clips_one_outlier_to_the_first_candidate_that_holds_the_rest() -> None:
    # With the peak at 32 a bin is 1/64; the first candidate, 128 bins, ends at 2 and resolves every bin below.
    values = np.concatenate([np.linspace(-1, 1, 100_001), [32.0]])
    assert scale(values, "entropy") * 127 == pytest.approx(2)


def test_entropy_does_not_see_exact_zeros() -> None:
    values = np.random.default_rng(0).laplace(size=20_000)
    assert scale(np.concatenate([values, np.zeros(100_000)]), "entropy") == scale(values, "entropy")


def test_mse_of_a_single_value_is_that_value() -> None:
    assert scale(np.full(100, -0.3), "mse") * 127 == pytest.approx(0.3)


def test_mse_clips_a_rare_moderate_outlier_and_keeps_a_huge_one() -> None:
    rest = np.random.default_rng(0).normal(size=100_000)
    # One in 100,000: clipping 8 costs (8 - 4)^2 / 1e5, keeping it doubles the step for all. Clipping 4000 costs 160.
    assert scale(np.append(rest, 8.0), "mse") * 127 < 6
    assert scale(np.append(rest, 4000.0), "mse") * 127 > 3500


@pytest.mark.parametrize("kind", ["normal", "laplace", "uniform", "relu", "steps"])
def test_mse_finds_what_trying_every_threshold_finds(kind: str) -> None:
    random = np.random.default_rng(1)
    values = {
        "normal": random.normal(size=20_000),
        "laplace": random.laplace(size=20_000),
        "uniform": random.uniform(-1, 1, size=20_000),
        "relu": np.maximum(random.normal(size=20_000), 0),
        "steps": random.integers(0, 17, size=20_000) / 16,
    }[kind]
    peak = float(np.abs(values).max())
    best = min(squared_error(values, threshold) for threshold in np.linspace(0.2, 1, 400) * peak)
    found = squared_error(values, scale(values, "mse") * 127)
    # The histogram does not know where in a bin "steps" lie; the others it describes to a percent.
    assert found <= best * 1.03 or (kind == "steps" and found <= squared_error(values, peak) * 1.5)


def test_mse_is_better_than_minmax_on_a_normal_variable() -> None:
    values = np.random.default_rng(2).normal(size=100_000)
    assert squared_error(values, scale(values, "mse") * 127) < 0.8 * squared_error(values, np.abs(values).max())


# --- grids that are not centred on zero -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "ends", "zero_point"),
    [
        ([0.0, 510.0], (0, 510), -128),  # all 255 steps above zero
        ([-510.0, 0.0], (-510, 0), 127),
        ([-51.0, 204.0], (-51, 204), -77),  # 51 steps of 1 below zero, 204 above
        ([3.0, 255.0], (0, 255), -128),  # zero is always a step: what pads an image
    ],
)
def test_min_and_max_known_by_hand(values: list[float], ends: tuple[float, float], zero_point: int) -> None:
    found = shifted(np.array(values), "minmax")
    assert reach(found) == pytest.approx(ends)
    assert found.zero_point == zero_point


def test_a_grid_that_would_gain_little_is_centred_on_zero() -> None:
    assert shifted(np.array([-1.2, 1.27]), "minmax") == Grid(scale=np.float32(1.27) / np.float32(127))
    assert shifted(np.array([-1.1, 1.27]), "minmax").zero_point != 0


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["relu", "negative", "gelu", "skewed"])
def test_a_shifted_grid_errs_less_than_a_symmetric_one(method: str, kind: str) -> None:
    normal = np.random.default_rng(4).normal(size=100_000)
    values = {
        "relu": np.maximum(normal, 0),
        "negative": -np.abs(normal),
        "gelu": normal / (1 + np.exp(-1.702 * normal)),
        "skewed": normal + 1.5,
    }[kind]
    found = shifted(values, method)
    symmetric = Grid(scale=np.float32(scale(values, method)))
    # A step half as wide errs a quarter, where little is clipped.
    least = 0.35 if kind in ("relu", "negative") and method != "percentile" else 0.9
    assert error_on(found, values) < least * error_on(symmetric, values)


@pytest.mark.parametrize("kind", ["relu", "laplace", "gelu"])
def test_mse_finds_what_trying_every_shifted_grid_finds(kind: str) -> None:
    normal = np.random.default_rng(5).normal(size=20_000)
    values = {
        "relu": np.maximum(normal, 0),
        "laplace": np.abs(np.random.default_rng(6).laplace(size=20_000)),
        "gelu": normal / (1 + np.exp(-1.702 * normal)),
    }[kind]
    found = measure(values)
    best = min(
        error_on(thresholds.grid_of(threshold, found, symmetric=False), values)
        for threshold in np.linspace(0.2, 1, 400) * found.peak
    )
    assert error_on(shifted(values, "mse"), values) <= best * 1.03


def test_entropy_of_a_tensor_on_one_side_of_zero_has_all_its_levels() -> None:
    # With the peak at 64 a bin is 1/32: 256 bins are the first candidate of 256 levels, and end at 8.
    values = np.concatenate([np.linspace(0, 3.99, 100_001), [64.0]])
    assert reach(shifted(values, "entropy"))[1] == pytest.approx(8)
    assert scale(values, "entropy") * 127 < 4.5


@given(arrays.arrays(np.float32, st.integers(1, 50), elements=st.floats(-(2.0**99), 2.0**99, width=32)))
def test_minmax_leaves_half_a_step_of_anything_at_most(values: Array) -> None:
    found = shifted(values, "minmax")
    assert -128 <= found.zero_point <= 127
    # Half a step for the value, and half for the zero point, which must be a whole number.
    assert error_on(found, values.astype(np.float64)) <= float(found.scale) ** 2 * 1.001


FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)


@given(arrays.arrays(np.float32, st.integers(1, 50), elements=FINITE), st.sampled_from(METHODS))
def test_a_scale_is_a_normal_number_for_any_finite_tensor(values: Array, method: str) -> None:
    found = scale(values, method)
    smallest = float(np.finfo(np.float32).tiny)
    assert np.isfinite(found)
    assert found >= smallest
    assert found * 127 <= float(np.abs(values).max()) * 1.01 or found in (float(np.float32(1 / 127)), smallest)


@pytest.mark.parametrize("method", METHODS)
def test_a_tensor_that_was_always_zero_gets_the_range_1(method: str) -> None:
    assert scale(np.zeros(8), method) == pytest.approx(1 / 127)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", [1e-42, 1e-37, 1e37])
def test_tiny_and_huge_tensors_have_usable_scales(method: str, size: float) -> None:
    values = (np.random.default_rng(3).uniform(0.5, 1, size=1000) * size).astype(np.float32)
    found = np.float32(scale(values, method))
    assert np.isfinite(np.float32(127) * found)
    assert found >= np.finfo(np.float32).tiny


@pytest.mark.parametrize(
    ("low", "high", "mask"),
    [
        (-3.4028235e38, 0.0, True),
        (-3.4028235e38, 12.0, True),
        (-np.inf, 1.0, True),
        (-1e37, 1e37, False),
        (-10000.0, 0.0, False),
        (0.0, 3.4e38, False),
    ],
)
def test_masks_are_the_lowest_values_beside_ordinary_ones(low: float, high: float, mask: bool) -> None:
    assert thresholds.holds_mask(TensorStatistics(low=low, high=high)) is mask

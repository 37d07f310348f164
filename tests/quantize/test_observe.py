"""Calibration as streaming statistics: exact sums, flat memory, and nothing useless accepted."""

from __future__ import annotations

import sys
import tracemalloc
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from compiler.backends.onnxruntime import open_model
from compiler.errors import CalibrationError
from compiler.quantize.observe import Observed, TensorStatistics, chosen, edges, load, measure, observe
from compiler.spec import Array, Runner, Statistics
from tests.quantize import networks
from tests.quantize.networks import MASKED, Net, f32

FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)
TENSORS = arrays.arrays(np.float32, st.integers(0, 40), elements=FLOATS)


def run(
    tmp_path: Path,
    proto: onnx.ModelProto,
    samples: Sequence[Mapping[str, Array]],
    *,
    limit: int = 512,
    min_samples: int = 1,
    opt: int = 4,
    **changes: Any,
) -> tuple[Statistics, Observed]:
    folder = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
    (folder / "out").mkdir(parents=True)
    model = networks.save(proto, folder / "model.onnx", opt=opt)
    data = networks.calibration(folder / "data", samples)
    arguments: dict[str, Any] = {"open_model": open_model, "threads": 1, "out_dir": folder / "out", **changes}
    found = observe(model, data, samples=limit, min_samples=min_samples, **arguments)
    return found, load(found.path)


def same(left: TensorStatistics, right: TensorStatistics) -> bool:
    scalars = [(s.low, s.high, s.count, s.nan, s.inf) for s in (left, right)]
    bins = [np.zeros(1) if s.bins is None else s.bins for s in (left, right)]
    return scalars[0] == scalars[1] and np.array_equal(bins[0], bins[1])


# --- one tensor -----------------------------------------------------------------------------------------------------


def test_bins_are_the_bfloat16_grid() -> None:
    assert edges()[0] == 0
    assert edges()[-1] == np.inf
    assert edges()[0x3F80:0x3F83].tolist() == [1, 1 + 1 / 128, 1 + 2 / 128]


def test_every_value_falls_into_the_bin_that_holds_it() -> None:
    values = f32([0.0, -0.0, 1e-40, 0.37, -0.37, 127.9, 3.4e38, -6e-5])
    bins = measure(values).bins
    assert bins is not None
    expected = np.searchsorted(edges(), np.abs(values).astype(np.float64), side="right") - 1
    assert np.array_equal(np.repeat(np.arange(bins.size), bins), np.sort(expected))


def test_nan_and_infinity_are_counted_apart_and_leave_the_extremes_alone() -> None:
    found = measure(f32([np.nan, np.inf, -np.inf, 2.0, -1.0]))
    assert (found.nan, found.inf, found.low, found.high, found.count) == (1, 2, -1.0, 2.0, 5)


def test_a_tensor_without_elements_changes_nothing() -> None:
    some = measure(f32([-3, 2]))
    empty = measure(np.zeros((0, 4), np.float32))
    assert same(some + empty, some)
    assert empty.peak == 0


@given(TENSORS, TENSORS, TENSORS)
def test_statistics_add_up_exactly_in_any_order_and_grouping(a: Array, b: Array, c: Array) -> None:
    whole = measure(np.concatenate([a, b, c]))
    assert same(measure(a) + (measure(b) + measure(c)), whole)
    assert same((measure(c) + measure(a)) + measure(b), whole)


def test_channels_have_their_own_peaks_and_squares() -> None:
    found = measure(f32([[[1, -5], [2, 0]], [[-3, 1], [0, 0]]]), by_channel=-1).channels
    assert found is not None
    assert found.peaks.tolist() == [3, 5]
    assert found.squares.tolist() == [14, 26]


# --- a model --------------------------------------------------------------------------------------------------------


def exact() -> onnx.ModelProto:
    """conv and a product of small whole numbers: the same sums to the bit however they are batched."""
    net = Net()
    weight = net.random.integers(-3, 4, size=(4, 2, 3, 3)).astype(np.float32)
    bias = net.weight("b", f32([1, 0, -2, 3]))
    net.op("Conv", ["x", net.weight("w", weight), bias], "c", pads=[1, 1, 1, 1])
    net.op("Flatten", [net.op("Relu", ["c"], "r")], "f")
    net.op("MatMul", ["f", net.weight("m", net.random.integers(-3, 4, size=(64, 3)).astype(np.float32))], "y")
    return net.model({"x": ["batch", 2, 4, 4]}, {"y": ["batch", 3]})


def whole_numbers(count: int) -> list[dict[str, Array]]:
    random = np.random.default_rng(0)
    return [{"x": random.integers(-9, 10, size=(1, 2, 4, 4)).astype(np.float32)} for _ in range(count)]


def test_what_is_observed_is_what_the_samples_hold(tmp_path: Path) -> None:
    samples = whole_numbers(10)
    statistics, observed = run(tmp_path, exact(), samples)
    stacked = np.concatenate([sample["x"] for sample in samples])
    assert same(observed["x"], measure(stacked))
    outputs = open_model(statistics.path.parent.parent / "model.onnx").run({"x": stacked})
    assert (observed["y"].low, observed["y"].high) == (outputs["y"].min(), outputs["y"].max())
    assert observed["y"].bins is None
    assert observed["r"].bins is not None
    assert observed["r"].low == 0
    assert statistics.samples == 10


def test_order_and_batches_do_not_change_what_is_observed(tmp_path: Path) -> None:
    samples = whole_numbers(11)
    shuffled = [samples[i] for i in np.random.default_rng(1).permutation(11)]
    _, one = run(tmp_path, exact(), samples, opt=4)
    for other_samples, opt in ((samples, 1), (samples, 64), (shuffled, 3)):
        _, other = run(tmp_path, exact(), other_samples, opt=opt)
        assert one.keys() == other.keys()
        assert all(same(one[name], other[name]) for name in one)


def test_a_second_run_writes_the_same_bytes(tmp_path: Path) -> None:
    samples = networks.masked_samples(8)
    first, _ = run(tmp_path, networks.transformer_block(), samples)
    second, _ = run(tmp_path, networks.transformer_block(), samples)
    assert first.path.read_bytes() == second.path.read_bytes()


def test_only_the_statistics_stay_in_the_folder(tmp_path: Path) -> None:
    statistics, _ = run(tmp_path, exact(), whole_numbers(3))
    assert [file.name for file in statistics.path.parent.iterdir()] == ["statistics.npz"]


class Watched:
    """Opens models, and remembers how large a batch they were given."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def __call__(self, path: Path, *, threads: int = 0, optimize: bool = True, weights: Path | None = None) -> Runner:
        runner = open_model(path, threads=threads, optimize=optimize, weights=weights)
        inner = runner.run

        def run(feeds: Mapping[str, Array]) -> dict[str, Array]:
            self.batches.append(len(feeds["x"]))
            return inner(feeds)

        runner.run = run  # type: ignore[method-assign]
        return runner


def test_batches_grow_to_the_optimum_of_the_axis_and_no_further(tmp_path: Path) -> None:
    watched = Watched()
    run(tmp_path, exact(), whole_numbers(10), opt=4, open_model=watched)
    assert watched.batches == [1, 4, 4, 1]


def test_batches_shrink_to_what_memory_allows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched()
    # x, r and f, 32, 64 and 64 floats a sample, and what is small: less than 700 bytes.
    monkeypatch.setattr(sys.modules[measure.__module__], "FETCH_BYTES", 2 * 700)
    run(tmp_path, exact(), whole_numbers(6), opt=64, open_model=watched)
    assert watched.batches == [1, 2, 2, 1]


def test_memory_does_not_grow_with_the_number_of_samples(tmp_path: Path) -> None:
    def peak(count: int) -> int:
        samples = [
            {"x": np.random.default_rng(i).normal(size=(1, 3, 128, 128)).astype(np.float32)} for i in range(count)
        ]
        folder = tmp_path / str(count)
        model = networks.save(networks.residual(blocks=1, size=64), folder / "model.onnx", opt=2)
        data = networks.calibration(folder / "data", samples)
        del samples
        (folder / "out").mkdir()
        tracemalloc.start()
        observe(model, data, samples=512, min_samples=1, open_model=open_model, threads=1, out_dir=folder / "out")
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    few = peak(4)
    assert peak(40) < 1.05 * few
    assert few > 2 * 3 * 128 * 128 * 4  # or nothing was seen of what numpy holds


def test_samples_of_other_shapes_have_batches_of_their_own(tmp_path: Path) -> None:
    net = Net()
    net.linear("x", "y", (4, 2))
    proto = net.model({"x": ["batch", "length", 4]}, {"y": ["batch", "length", 2]})
    samples = [
        {"x": np.random.default_rng(length).normal(size=(1, length, 4)).astype(np.float32)}
        for length in (3, 3, 5, 5, 5, 3)
    ]
    watched = Watched()
    _, observed = run(tmp_path, proto, samples, open_model=watched)
    assert watched.batches == [1, 1, 3, 1]
    assert observed["x"].count == sum(sample["x"].size for sample in samples)


def test_at_most_the_asked_number_of_samples_is_used_evenly_spaced(tmp_path: Path) -> None:
    samples = [{"x": np.full((1, 4), i, np.float32) + f32([0, 0.5, 0, 0])} for i in range(9)]
    net = Net()
    net.linear("x", "y", (4, 2))
    statistics, observed = run(tmp_path, net.model({"x": ["batch", 4]}, {"y": ["batch", 2]}), samples, limit=3)
    assert statistics.samples == 3
    assert (observed["x"].count, observed["x"].high) == (12, 6.5)
    assert chosen(9, 3) == [0, 3, 6]


def test_progress_ends_at_the_number_of_samples(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    run(tmp_path, exact(), whole_numbers(5), progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (5, 5)
    assert seen == sorted(seen)


def test_a_mask_is_seen_and_does_not_disturb_what_is_rounded(tmp_path: Path) -> None:
    _, observed = run(tmp_path, networks.transformer_block(), networks.masked_samples(8))
    assert observed["kept"].low <= MASKED
    assert observed["kept"].bins is None
    rounded = {name for name, found in observed.items() if found.bins is not None}
    assert rounded == {"x", "mixed_flat", "norm1", "gelu"}
    assert all(observed[name].peak < 100 for name in rounded)


def test_channels_that_never_change_are_counted(tmp_path: Path) -> None:
    net = Net()
    weight = net.random.normal(size=(4, 2, 3, 3)).astype(np.float32)
    weight[1] = 0
    bias = net.weight("b", f32([0, 0.5, -100, 0]))
    net.op("Relu", [net.op("Conv", ["x", net.weight("w", weight), bias], "c")], "y")
    proto = net.model({"x": ["batch", 2, 4, 4]}, {"y": ["batch", 4, 2, 2]})
    statistics, _ = run(tmp_path, proto, whole_numbers(6))
    assert statistics.notes == ("2 of 4 convolution channels never change on the calibration samples: y (2 of 4)",)


def test_a_tensor_that_is_constant_is_counted(tmp_path: Path) -> None:
    net = Net()
    net.op("Mul", ["x", net.weight("zero", np.zeros(1, np.float32))], "nothing")
    net.op("Add", [net.op("MatMul", ["nothing", net.normal("w", 4, 4)], "p"), "x"], "y")
    statistics, _ = run(tmp_path, net.model({"x": ["batch", 4]}, {"y": ["batch", 4]}), networks.normal_samples(4, 4))
    assert statistics.notes == ("1 of 1 observed tensors hold one value on all calibration samples: nothing",)


def two_inputs() -> onnx.ModelProto:
    net = Net()
    net.op("Add", [net.linear("x", "p", (4, 4)), "z"], "y")
    return net.model({"x": ["batch", 4], "z": ["batch", 4]}, {"y": ["batch", 4]})


def test_an_input_that_is_constant_beside_another_that_is_not_is_noted(tmp_path: Path) -> None:
    samples = [{**sample, "z": np.ones((1, 4), np.float32)} for sample in networks.normal_samples(6, 4)]
    statistics, _ = run(tmp_path, two_inputs(), samples)
    assert statistics.notes == ("input 'z' holds one value in every calibration sample",)


def test_a_sample_far_larger_than_the_others_is_named(tmp_path: Path) -> None:
    samples = [{"x": f32([[1, -1, i / 10, 0]])} for i in range(9)]
    samples[7]["x"] *= 1e4
    net = Net()
    net.linear("x", "y", (4, 2))
    statistics, _ = run(tmp_path, net.model({"x": ["batch", 4]}, {"y": ["batch", 2]}), samples)
    assert statistics.notes == ("calibration sample 7: input 'x' reaches 1e+04, 10000 times the median sample's 1",)


# --- what is refused ------------------------------------------------------------------------------------------------


def refusal(tmp_path: Path, proto: onnx.ModelProto, samples: Sequence[Mapping[str, Array]], **changes: Any) -> str:
    with pytest.raises(CalibrationError) as caught:
        run(tmp_path, proto, samples, **changes)
    return caught.value.message


def test_too_few_samples(tmp_path: Path) -> None:
    assert refusal(tmp_path, exact(), whole_numbers(3), min_samples=4) == (
        "calibration set: 3 samples to use (3 in the set, quantize.samples = 512); at least 4 were expected "
        "(quantize.min_samples). Yield more from calibration()."
    )


def test_an_empty_set_even_where_no_minimum_is_asked(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    model = networks.save(exact(), tmp_path / "model.onnx")
    data = networks.calibration(tmp_path / "data", whole_numbers(1))
    with pytest.raises(CalibrationError) as caught:
        observe(model, data, samples=0, min_samples=0, open_model=open_model, threads=1, out_dir=tmp_path / "out")
    assert caught.value.message == (
        "calibration set: 0 samples to use (1 in the set, quantize.samples = 0); at least 1 were expected "
        "(quantize.min_samples). Yield more from calibration()."
    )


def test_samples_that_are_all_zero(tmp_path: Path) -> None:
    assert refusal(tmp_path, exact(), [{"x": np.zeros((1, 2, 4, 4), np.float32)}] * 5) == (
        "calibration set: every sample is all zero, in every input (x); samples as the model will meet them were "
        "expected. Correct calibration()."
    )


def test_samples_that_are_each_constant(tmp_path: Path) -> None:
    samples = [{"x": np.full((1, 2, 4, 4), i, np.float32)} for i in range(5)]
    assert refusal(tmp_path, exact(), samples) == (
        "calibration set: every sample is constant, in every input (x); samples as the model will meet them were "
        "expected. Correct calibration()."
    )


def test_one_number_a_sample_is_no_constant_while_it_differs(tmp_path: Path) -> None:
    net = Net()
    net.linear("x", "y", (1, 2))
    proto = net.model({"x": ["batch", 1]}, {"y": ["batch", 2]})
    run(tmp_path, proto, [{"x": f32([[i]])} for i in range(3)])
    assert "every sample is constant" in refusal(tmp_path, proto, [{"x": f32([[2]])}] * 3)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_sample_that_is_not_finite_is_named(tmp_path: Path, bad: float) -> None:
    samples = whole_numbers(8)
    samples[6]["x"][0, 1, 2, 3] = bad
    assert refusal(tmp_path, exact(), samples) == (
        "calibration sample 6: input 'x' holds NaN or Inf; finite values were expected. Correct calibration(), or "
        "leave the sample out."
    )


def logarithm() -> onnx.ModelProto:
    net = Net()
    net.op("MatMul", [net.op("Log", ["x"], "log"), net.normal("w", 4, 2)], "y")
    return net.model({"x": ["batch", 4]}, {"y": ["batch", 2]})


def test_a_tensor_that_is_not_finite_is_named_with_its_sample(tmp_path: Path) -> None:
    samples = [{"x": f32([[1, 2, 3, i + 1]])} for i in range(8)]
    samples[6]["x"][0, :2] = [-1, 0]
    assert refusal(tmp_path, logarithm(), samples) == (
        "calibration sample 6: tensor 'log' holds 1 NaN and 1 Inf in 4 values; finite values were expected. "
        "Look at this sample, and at what the original model makes of it."
    )


def test_a_tensor_that_is_not_finite_only_in_a_batch_is_named_with_the_batch(tmp_path: Path) -> None:
    def open_faulty(path: Path, *, threads: int = 0, optimize: bool = True, weights: Path | None = None) -> Runner:
        runner = open_model(path, threads=threads, optimize=optimize, weights=weights)
        inner = runner.run

        def run(feeds: Mapping[str, Array]) -> dict[str, Array]:
            outputs = inner(feeds)
            if len(feeds["x"]) > 1:
                outputs["log"] = outputs["log"] * np.float32(np.nan)
            return outputs

        runner.run = run  # type: ignore[method-assign]
        return runner

    samples = [{"x": f32([[1, 2, 3, i + 1]])} for i in range(8)]
    assert refusal(tmp_path, logarithm(), samples, open_model=open_faulty) == (
        "calibration samples 1 to 4: tensor 'log' holds NaN or Inf; finite values were expected. "
        "Look at this sample, and at what the original model makes of it."
    )


def test_an_output_that_is_nan_is_named(tmp_path: Path) -> None:
    net = Net()
    net.op("Sqrt", [net.linear("x", "p", (4, 2))], "y")
    message = refusal(tmp_path, net.model({"x": ["batch", 4]}, {"y": ["batch", 2]}), networks.normal_samples(8, 4))
    assert "tensor 'y' holds" in message


def test_a_mask_of_infinity_that_nothing_rounds_is_no_error(tmp_path: Path) -> None:
    net = Net()
    p = net.op("Add", [net.linear("x", "p", (4, 4)), net.weight("mask", f32([0, 0, 0, -np.inf]))], "masked")
    net.op("Softmax", [p], "y")
    _, observed = run(tmp_path, net.model({"x": ["batch", 4]}, {"y": ["batch", 4]}), networks.normal_samples(4, 4))
    assert observed["masked"].low == -np.inf


def test_a_weight_that_is_not_finite_is_named(tmp_path: Path) -> None:
    weight = np.ones((4, 2))
    weight[1, 1] = np.nan
    assert refusal(tmp_path, networks.linear_map(weight), networks.normal_samples(4, 4)) == (
        "weight 'w' of MatMul 'node_y': 1 of 8 values are NaN or Inf; finite weights were expected. "
        "Train or export the model again."
    )


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut short", None])
def test_a_damaged_file_is_no_statistics(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "statistics.npz"
    if content is None:
        np.savez(path, other=np.zeros(3))
    else:
        path.write_bytes(content)
    with pytest.raises(CalibrationError) as caught:
        load(path)
    assert caught.value.message == (
        f"{path}: not the statistics of a calibration; what 'observe' writes was expected. "
        "Run again without the cache: --no-cache."
    )


def test_models_without_a_batch_axis_run_one_sample_at_a_time(tmp_path: Path) -> None:
    net = Net()
    net.linear("x", "y", (4, 2))
    watched = Watched()
    run(tmp_path, net.model({"x": [1, 4]}, {"y": [1, 2]}), networks.normal_samples(3, 4), open_model=watched)
    assert watched.batches == [1, 1, 1]

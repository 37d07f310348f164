"""Learned rounding: what Gram matrices are, that every method lowers what it says it lowers, and that faults show."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, numpy_helper

from compiler import onnx_files
from compiler.backends.onnxruntime import open_model
from compiler.onnx_files import FreeNames
from compiler.quantize import adaround, awq, gptq, gram, quantize, rounding, weights
from compiler.quantize.blocks import round_blocks
from compiler.quantize.formats import FP8, INT4, INT8
from compiler.quantize.gram import Gram, Reads, Source, Window
from compiler.quantize.rounding import Layout, Learning
from compiler.recipe import EngineSection, QuantizeSection
from compiler.spec import Array, CalibrationSet, OnnxModel, Precision, Runner
from tests.quantize import networks, reference
from tests.quantize.bench import NONE, Bench, graph, outputs, sqnr
from tests.quantize.networks import MASKED, Net, f32


def correlated(count: int, *shape: int, name: str = "x", seed: int = 5) -> list[dict[str, Array]]:
    """Samples whose last axis has a few directions with most of the variance, as activations of trained models have."""
    random = np.random.default_rng(99)
    width = shape[-1]
    mix = random.normal(size=(width, width)) * np.geomspace(3, 0.05, width)
    random = np.random.default_rng(seed)
    return [{name: (random.normal(size=(1, *shape)) @ mix.T).astype(np.float32)} for _ in range(count)]


def masked(samples: Sequence[Mapping[str, Array]]) -> list[dict[str, Array]]:
    return [{**sample, "mask": np.ones(sample["x"].shape[:2], np.float32)} for sample in samples]


def positive(random: np.random.Generator, inputs: int) -> Array:
    """A Gram matrix of correlated inputs, float32 [inputs, inputs]."""
    rows = random.normal(size=(4 * inputs, inputs)) @ (
        random.normal(size=(inputs, inputs)) * np.geomspace(2, 0.05, inputs)
    )
    matrix = rows.T @ rows / len(rows)
    found: Array = (matrix + 0.01 * np.diag(matrix).mean() * np.eye(inputs)).astype(np.float32)
    return found


def int8(weight: Array) -> tuple[Array, Array]:
    """Steps and scales [N, 1] of rows, to nearest."""
    scale = np.abs(weight).max(axis=1, keepdims=True) / np.float32(127)
    return np.rint(weight / scale), scale


# --- rounding, by hand and by brute force ---------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["gptq", "adaround"])
def test_two_inputs_that_go_together_by_hand(method: str) -> None:
    # Both at 0.4: to nearest both fall to 0, which errs by 2 * 0.16 * 1.9 = 0.608; one up and one down by 0.088.
    weight, matrix, scale = f32([[0.4, 0.4]]), f32([[1, 0.9], [0.9, 1]]), f32([[1]])
    if method == "gptq":
        steps = gptq.round_layer(weight, matrix, INT8, scale)
    else:
        steps = adaround.round_layer(weight, matrix, INT8, scale)
    assert sorted(steps[0].tolist()) == [0, 1]
    assert gram.error(weight, steps, matrix) == pytest.approx(0.36 + 0.16 - 2 * 0.9 * 0.24)
    assert gram.error(weight, np.zeros_like(steps), matrix) == pytest.approx(0.608)


def test_near_the_best_of_all_roundings() -> None:
    """Over every way of rounding six weights up or down: within a third of the least error, and nearest is not."""
    random = np.random.default_rng(0)
    sums = dict.fromkeys(("best", "gptq", "adaround", "nearest"), 0.0)
    for _ in range(40):
        matrix, weight = positive(random, 6), random.normal(size=(1, 6)).astype(np.float32) * 5
        scale = np.ones((1, 1), np.float32)
        ways = [np.floor(weight) + np.array([bits]) for bits in itertools.product((0, 1), repeat=6)]
        errors = [gram.error(weight, way.astype(np.float32), matrix) for way in ways]
        found = {
            "nearest": np.rint(weight),
            "gptq": gptq.round_layer(weight, matrix, INT8, scale),
            "adaround": adaround.round_layer(weight, matrix, INT8, scale),
        }
        sums["best"] += min(errors)
        for name, steps in found.items():
            sums[name] += gram.error(weight, steps, matrix)
        assert gram.error(weight, found["adaround"], matrix) >= min(errors) * (1 - 1e-5)
    assert sums["adaround"] < 1.35 * sums["best"]
    assert sums["gptq"] < 1.35 * sums["best"]
    assert sums["nearest"] > 1.4 * sums["best"]


@pytest.mark.parametrize("outputs_", [1, 3])
def test_arguments_stay_what_they_were(outputs_: int) -> None:
    random = np.random.default_rng(0)
    weight, matrix = random.normal(size=(outputs_, 8)).astype(np.float32), positive(random, 8)
    steps, scale = int8(weight)
    given_ = [array.copy() for array in (weight, matrix, steps, scale)]
    gptq.round_layer(weight, matrix, INT8, scale)
    adaround.round_layer(weight, matrix, INT8, scale, start=steps)
    assert [a.tolist() for a in (weight, matrix, steps, scale)] == [a.tolist() for a in given_]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    inputs=st.integers(1, 70),
    outputs_=st.integers(1, 5),
    kind=st.sampled_from([INT8, INT4]),
)
def test_descent_never_ends_above_where_it_began(seed: int, inputs: int, outputs_: int, kind: Any) -> None:
    random = np.random.default_rng(seed)
    weight = random.standard_t(3, size=(outputs_, inputs)).astype(np.float32)
    matrix = positive(random, inputs)
    scale = np.maximum(np.abs(weight).max(axis=1, keepdims=True), 1e-6) / np.float32(kind.largest) * np.float32(0.8)
    nearest = np.clip(np.rint(weight / scale), kind.lowest, kind.largest)
    found = adaround.round_layer(weight, matrix, kind, scale)
    before = gram.error(weight, nearest * scale, matrix)
    assert gram.error(weight, found * scale, matrix) <= before * (1 + 1e-4) + 1e-12
    assert found.min() >= kind.lowest
    assert found.max() <= kind.largest
    assert ((np.abs(found - weight / scale) < 1 + 1e-5) | (found == nearest)).all(), "up or down, and no further"
    started = adaround.round_layer(weight, matrix, kind, scale, start=found)
    assert gram.error(weight, started * scale, matrix) <= gram.error(weight, found * scale, matrix) * (1 + 1e-4) + 1e-12


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), inputs=st.integers(1, 80))
def test_without_correlation_gptq_is_nearest(seed: int, inputs: int) -> None:
    random = np.random.default_rng(seed)
    weight = random.normal(size=(3, inputs)).astype(np.float32)
    nearest, scale = int8(weight)
    steps = gptq.round_layer(weight, np.diag(random.uniform(0.1, 9, inputs)), INT8, scale)
    assert steps.tolist() == nearest.tolist()


@pytest.mark.parametrize("block", [16, 32, 64, 128])
def test_without_correlation_blocks_are_those_of_nearest(block: int) -> None:
    weight = np.random.default_rng(0).normal(size=(5, 256)).astype(np.float32)
    nearest, scale = round_blocks(weight, 1, block, "fp32")
    steps = gptq.round_layer(weight, np.eye(256, dtype=np.float32), INT4, scale)
    assert steps.tolist() == nearest.astype(np.float32).tolist()


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1), block=st.sampled_from([16, 32, 64]), rest=st.sampled_from(["fp32", "fp16", "bf16"])
)
def test_scales_of_blocks_are_positive_numbers(seed: int, block: int, rest: str) -> None:
    random = np.random.default_rng(seed)
    weight = random.standard_t(2, size=(4, 128)).astype(np.float32)
    weight[0], weight[1, :block] = 0, 0
    matrix = positive(random, 128)[None]
    known = Gram(fit=matrix, held=matrix, magnitude=np.ones((1, 128)))
    for method in ("gptq", "adaround", "auto"):
        nearest = round_blocks(weight, 1, block, rest)
        found = rounding.round_layer(weight, nearest, Layout(channels=0, block=block), INT4, known, rounding=method)
        assert found.scale.shape == (4, 128 // block)
        assert np.isfinite(found.scale).all()
        assert (found.scale > 0).all()
        steps = found.steps.astype(int)
        assert steps.min() >= -8
        assert steps.max() <= 7
        assert not steps[0].any(), "zeros stay zero"


def test_gptq_beats_nearest_and_descent_beats_gptq() -> None:
    random = np.random.default_rng(1)
    weight, matrix = random.normal(size=(64, 256)).astype(np.float32), positive(random, 256)
    nearest, least = (array.astype(np.float32) for array in round_blocks(weight, 1, 32, "fp32"))
    steps = gptq.round_layer(weight, matrix, INT4, least)
    further = adaround.round_layer(weight, matrix, INT4, least, start=steps)
    errors = [gram.error(weight, made * reference.spread(least, 1, 32), matrix) for made in (nearest, steps, further)]
    assert 10 * np.log10(errors[0] / errors[1]) > 3
    assert errors[2] < errors[1]


def test_gptq_rounds_fp8() -> None:
    random = np.random.default_rng(1)
    weight, matrix = random.normal(size=(16, 64)).astype(np.float32), positive(random, 64)
    scale = np.abs(weight).max(axis=1, keepdims=True) / np.float32(448)
    steps = gptq.round_layer(weight, matrix, FP8, scale)
    assert steps.tolist() == reference.e4m3(steps).tolist()
    nearest = reference.e4m3(weight / scale).astype(np.float32)
    assert gram.error(weight, steps * scale, matrix) < 0.7 * gram.error(weight, nearest * scale, matrix)


def test_the_factor_is_that_of_the_inverse() -> None:
    matrix = positive(np.random.default_rng(2), 20)
    factor = gptq.inverse_factor(matrix)
    assert not np.tril(factor, -1).any()
    inverse = np.linalg.inv(matrix.astype(np.float64))
    assert factor.T @ factor == pytest.approx(inverse, rel=1e-3, abs=1e-4 * np.abs(inverse).max())


def test_a_matrix_that_is_not_positive_definite_is_refused() -> None:
    with pytest.raises(np.linalg.LinAlgError, match=r"^a Gram matrix of 2 inputs is not positive definite$"):
        gptq.inverse_factor(f32([[1, 2], [2, 1]]))


def test_damping_lets_dead_inputs_and_too_few_rows_through() -> None:
    row = f32([[1, 2, 0, 4]])
    matrix = gram.damped(row.T @ row)
    weight = f32([[0.3, -0.4, 0.6, 1]])
    steps = gptq.round_layer(weight, matrix, INT8, f32([[1]]))
    assert steps[0, 2] == 1, "what was always zero is rounded to nearest"


@pytest.mark.parametrize("method", ["gptq", "adaround"])
def test_a_gram_matrix_in_another_order_is_seen(method: str) -> None:
    """The planted fault: inputs of the matrix in reverse."""
    random = np.random.default_rng(3)
    weight, matrix = random.normal(size=(32, 64)).astype(np.float32), positive(random, 64)
    nearest, scale = int8(weight)

    def made(by: Array) -> float:
        if method == "gptq":
            steps = gptq.round_layer(weight, by, INT8, scale)
        else:
            steps = adaround.round_layer(weight, by, INT8, scale)
        return gram.error(weight, steps * scale, matrix)

    before = gram.error(weight, nearest * scale, matrix)
    assert made(matrix) < 0.6 * before
    assert made(np.ascontiguousarray(matrix[::-1, ::-1])) > before


# --- Gram matrices --------------------------------------------------------------------------------------------------


class Counting:
    """Opens models, and counts them."""

    def __init__(self) -> None:
        self.opened = 0

    def __call__(self, path: Path, *, threads: int = 0, optimize: bool = True, weights: Path | None = None) -> Runner:
        self.opened += 1
        return open_model(path, threads=threads, optimize=optimize, weights=weights)


def source(bench: Bench, *, opens: Any = open_model, **changes: Any) -> Source:
    folder = bench.folder / f"grams{len(list(bench.folder.iterdir()))}"
    folder.mkdir()
    return Source(
        **{"model": bench.model, "data": bench.data, "open_model": opens, "threads": 1, "out_dir": folder} | changes
    )


def gathered(found: Source, *wanted: Reads) -> list[Gram]:
    grams = [grams[reads] for reads, grams in zip(wanted, found.stream([[reads] for reads in wanted]), strict=True)]
    assert not list(found.out_dir.iterdir()), "nothing is left behind"
    return grams


def test_the_matrix_of_a_product_is_the_mean_of_its_rows_outer_products(tmp_path: Path) -> None:
    samples = correlated(8, 5, 12)
    bench = Bench(tmp_path, networks.linear_map(np.ones((12, 3))), [{"x": s["x"][0]} for s in samples])
    (found,) = gathered(source(bench), Reads(tensor="x", width=12))
    fit = np.concatenate([s["x"][0] for place, s in enumerate(samples) if place % 4 != 3]).astype(np.float64)
    held = np.concatenate([s["x"][0] for place, s in enumerate(samples) if place % 4 == 3]).astype(np.float64)
    assert found.fit[0] == pytest.approx(fit.T @ fit / len(fit), rel=1e-5, abs=1e-5)
    assert found.held[0] == pytest.approx(held.T @ held / len(held), rel=1e-5, abs=1e-5)
    assert found.magnitude[0] == pytest.approx(np.abs(fit).mean(axis=0), rel=1e-5)
    assert {found.fit.dtype.name, found.held.dtype.name} == {"float32"}


def test_what_is_chosen_is_fitted_to_all_samples(tmp_path: Path) -> None:
    samples = correlated(8, 5, 12)
    bench = Bench(tmp_path, networks.linear_map(np.ones((12, 3))), [{"x": s["x"][0]} for s in samples])
    (found,) = gathered(source(bench), Reads(tensor="x", width=12))
    rows = np.concatenate([s["x"][0] for s in samples]).astype(np.float64)
    assert found.share == 0.25
    assert found.all[0] == pytest.approx(rows.T @ rows / len(rows), rel=1e-5, abs=1e-4)


def test_what_a_mask_hides_is_left_out(tmp_path: Path) -> None:
    proto, samples = networks.transformer_block(), networks.masked_samples(3)
    (found,) = gathered(source(Bench(tmp_path, proto, samples)), Reads(tensor="norm1", width=32))
    rows = np.concatenate([reference.run(proto, s)["norm1"][s["mask"] != 0] for s in samples])
    assert len(rows) < 3 * 16
    assert found.fit[0] == pytest.approx(rows.T @ rows / len(rows), rel=1e-4, abs=1e-5)


def test_what_is_no_mask_hides_nothing() -> None:
    x, reads = np.ones((1, 4, 3), np.float32), Reads(tensor="x", width=3)
    for feeds in (
        {"mask": f32([[0, 0.5, 1, 1]])},
        {"mask": np.zeros((4,))},
        {"ids": np.zeros((1, 4))},
    ):
        assert gram._without_padding(x, feeds, reads) is x
    assert gram._without_padding(x, {"attention_mask": np.array([[1, 0, 0, 1]])}, reads).shape == (2, 3)


def test_of_three_samples_none_is_held_out(tmp_path: Path) -> None:
    bench = Bench(tmp_path, networks.linear_map(np.ones((4, 3))), networks.normal_samples(3, 4))
    (found,) = gathered(source(bench), Reads(tensor="x", width=4))
    assert found.held is found.fit


def test_how_samples_would_be_batched_does_not_matter(tmp_path: Path) -> None:
    proto, samples = networks.transformer_block(), networks.masked_samples(8)
    samples, reads = masked(samples), Reads(tensor="gelu", width=128)
    found = []
    for opt in (1, 8):
        bench = Bench(tmp_path / str(opt), proto, samples)
        bench.model = networks.save(proto, tmp_path / str(opt) / "again.onnx", opt=opt)
        found += gathered(source(bench), reads)
    assert found[0].fit.tobytes() == found[1].fit.tobytes()
    rows = np.concatenate(
        [reference.run(proto, s)["gelu"].reshape(-1, 128) for place, s in enumerate(samples) if place % 4 != 3]
    )
    assert found[0].fit[0] == pytest.approx(rows.T @ rows / len(rows), rel=1e-4, abs=1e-5)


def test_no_more_samples_are_run_than_asked(tmp_path: Path) -> None:
    bench = Bench(tmp_path, networks.linear_map(np.ones((4, 3))), networks.normal_samples(20, 4))
    ran: list[int] = []
    gathered(source(bench, samples=5, progress=lambda done, _: ran.append(done)), Reads(tensor="x", width=4))
    assert ran == [1, 2, 3, 4, 5]


def test_what_does_not_fit_is_gathered_in_more_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(tmp_path, networks.transformer_block(), networks.masked_samples(8))
    wanted = [Reads(tensor=name, width=width) for name, width in (("x", 32), ("norm1", 32), ("gelu", 128))]
    opens = Counting()
    together = gathered(source(bench, opens=opens), *wanted)
    assert opens.opened == 1
    monkeypatch.setattr(gram, "GRAM_BYTES", wanted[0].nbytes + wanted[1].nbytes)
    opens = Counting()
    limited = source(bench, opens=opens)
    apart = gathered(limited, *wanted)
    assert opens.opened == 2
    assert [found.fit.tobytes() for found in apart] == [found.fit.tobytes() for found in together]
    gathered(limited, wanted[2])
    assert opens.opened == 2, "the last ones are still there"


def test_a_large_model_shows_its_tensors_and_leaves_its_weights_where_they_lie(tmp_path: Path) -> None:
    bench = Bench(tmp_path, networks.transformer_block(), networks.masked_samples(4))
    reads = Reads(tensor="norm1", width=32)
    (inside,) = gathered(source(bench), reads)
    (tmp_path / "large").mkdir()
    path = tmp_path / "large" / "model.onnx"
    onnx_files.write(onnx_files.read(bench.model.path), path, external_above=0)
    large = onnx_files.describe(path, precision=bench.model.precision, axes=bench.model.axes)
    assert large.external_data
    (outside,) = gathered(source(bench, model=large), reads)
    # Weights that are not packed into another layout are summed in another order.
    assert outside.fit == pytest.approx(inside.fit, rel=1e-5)


def test_layers_that_read_one_tensor_share_a_matrix(tmp_path: Path) -> None:
    network = ir.from_proto(networks.transformer_block())
    found = {
        node.name: gram.reads_of(node, 32)
        for node in network.graph
        if str(node.name).endswith(("q_product", "k_product"))
    }
    assert len(found) == 2
    assert set(found.values()) == {Reads(tensor="x", width=32)}


@pytest.mark.parametrize(
    ("channels", "groups", "size", "attributes"),
    [
        ((4, 6), 1, (3, 3), {"pads": [1, 1, 1, 1]}),
        ((4, 6), 2, (3, 2), {"pads": [0, 1, 2, 0], "strides": [2, 1]}),
        ((4, 4), 4, (3, 3), {"dilations": [2, 1]}),
        ((4, 6), 1, (3, 3), {"auto_pad": "SAME_UPPER", "strides": [2, 2]}),
        ((4, 6), 1, (2, 2), {"auto_pad": "SAME_LOWER"}),
        ((4, 6), 1, (3, 3), {"auto_pad": "VALID"}),
        ((4, 6), 1, (5,), {"pads": [2, 1]}),
    ],
)
def test_patches_times_the_weight_are_the_convolution(
    tmp_path: Path, channels: tuple[int, int], groups: int, size: tuple[int, ...], attributes: dict[str, Any]
) -> None:
    net = Net()
    weight = net.random.normal(size=(channels[1], channels[0] // groups, *size)).astype(np.float32)
    net.op("Conv", ["x", net.weight("w", weight)], "y", group=groups, **attributes)
    space = [9, 8][: len(size)]
    proto = net.model({"x": ["batch", channels[0], *space]}, {"y": None})  # type: ignore[dict-item]
    node = next(iter(ir.from_proto(proto).graph))
    reads = gram.reads_of(node, 0, axes=weight.ndim)
    assert reads is not None
    x = networks.normal_samples(1, channels[0], *space)[0]
    rows = gram.rows_of(x["x"], reads)
    by_group = np.einsum("gpk,gnk->gnp", rows, weight.reshape(groups, -1, reads.width))
    onnx.save(proto, tmp_path / "conv.onnx")
    expected = open_model(tmp_path / "conv.onnx", threads=1).run(x)["y"]
    assert by_group.reshape(expected.shape) == pytest.approx(expected, abs=1e-4)


def test_rows_of_a_large_sample_are_evenly_spaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gram, "ROWS", 4)
    rows = gram.rows_of(np.arange(20.0).reshape(1, 10, 2), Reads(tensor="x", width=2))
    assert rows[0, :, 0].tolist() == [0, 4, 10, 14]
    window = Window(kernel=(1, 1), strides=(1, 1), dilations=(1, 1), pads=(0, 0, 0, 0))
    rows = gram.rows_of(np.arange(25.0).reshape(1, 1, 5, 5), Reads(tensor="x", width=1, window=window))
    assert rows.reshape(-1).tolist() == [0, 6, 12, 18]


def test_an_image_smaller_than_the_kernel_has_no_rows() -> None:
    window = Window(kernel=(5,), strides=(1,), dilations=(1,), pads=(0, 0))
    assert gram.rows_of(np.zeros((1, 2, 3)), Reads(tensor="x", width=10, window=window)).shape == (1, 0, 10)


def test_what_has_no_matrix() -> None:
    net = Net()
    net.op("ConvTranspose", ["x", net.normal("w", 2, 3, 2, 2)], "a")
    net.op("Gemm", ["x", net.normal("v", 2, 3)], "b", transA=1)
    net.op("Conv", ["x", net.normal("u", 1, 513, 3, 3)], "c")
    nodes = list(ir.from_proto(net.model({"x": ["batch", 513, 3, 3]}, {"a": ["n"]})).graph)
    assert [gram.reads_of(node, 2, axes=2) for node in nodes] == [None] * 3
    product = next(iter(ir.from_proto(networks.linear_map(np.ones((4, 3)))).graph))
    assert gram.reads_of(product, 4, axes=3) is None
    assert gram.reads_of(product, 11586) is None
    assert gram.reads_of(product, 11585) == Reads(tensor="x", width=11585)


def test_the_mean_of_two_readers() -> None:
    one, two = (Gram(fit=f32([[[v]]]), held=f32([[[2 * v]]]), magnitude=f32([[v]])) for v in (1, 3))
    found = gram.mean([one, two])
    assert (found.fit.item(), found.held.item(), found.magnitude.item()) == (2, 4, 2)
    assert gram.mean([one]) is one


# --- models ---------------------------------------------------------------------------------------------------------


def block_bench(folder: Path, *, width: int = 64) -> tuple[Bench, list[dict[str, Array]]]:
    samples = masked(correlated(40, 16, width))
    return Bench(folder, networks.transformer_block(width=width), samples[:32]), samples[32:]


def fresh_db(bench: Bench, model: OnnxModel, fresh: Sequence[Mapping[str, Array]]) -> float:
    """On samples that nothing was fitted to."""
    expected, found = (np.concatenate([outputs(m, sample) for sample in fresh]) for m in (bench.model, model))
    return sqnr(expected, found)


INT4_ENGINE: dict[str, Any] = {"precision": Precision.INT4, "min_sqnr_db": NONE}
INT8_ENGINE: dict[str, Any] = {"precision": Precision.INT8, "weights_only": True, "min_sqnr_db": NONE}


def test_int4_of_a_transformer_on_correlated_activations_gains(tmp_path: Path) -> None:
    bench, fresh = block_bench(tmp_path)
    found = {
        method: fresh_db(bench, bench.quantize(rounding=method, **INT4_ENGINE), fresh)
        for method in ("nearest", "gptq", "adaround", "auto")
    }
    assert found["gptq"] > found["nearest"] + 1.5, found
    assert found["adaround"] > found["nearest"] + 1.0, found
    assert found["auto"] > found["nearest"] + 2.0, found


@pytest.mark.parametrize("method", ["gptq", "adaround"])
@pytest.mark.parametrize("groups", [1, 4])
def test_int8_of_a_convolution_gains(tmp_path: Path, method: str, groups: int) -> None:
    random = np.random.default_rng(0)
    smooth = [np.cumsum(np.cumsum(random.normal(size=(1, 4, 8, 8)), axis=2), axis=3) for _ in range(20)]
    samples = [{"x": (x / x.std()).astype(np.float32)} for x in smooth]
    bench = Bench(tmp_path, networks.convolution(groups=groups, channels=(4, 8)), samples[:16])
    nearest = fresh_db(bench, bench.quantize(rounding="nearest", **INT8_ENGINE), samples[16:])
    learned = bench.quantize(rounding=method, **INT8_ENGINE)
    assert fresh_db(bench, learned, samples[16:]) > nearest + 3
    assert any(note.startswith("weights rounded by ") for note in learned.notes)


@pytest.mark.parametrize("fault", ["reversed", "other inputs"])
def test_a_wrong_matrix_is_seen(tmp_path: Path, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted faults: inputs in another order, and the Gram matrix of something else. The model is worse than with
    nearest; and where a choice is measured on samples held out, nearest is chosen."""
    bench, fresh = block_bench(tmp_path)
    nearest = fresh_db(bench, bench.quantize(rounding="nearest", **INT4_ENGINE), fresh)
    right = gram._means

    def wrong(matrix: Array) -> Array:
        if fault == "reversed":
            return np.ascontiguousarray(matrix[:, ::-1, ::-1])
        return positive(np.random.default_rng(0), matrix.shape[1])[None]

    def means(fit: Any, held: Any) -> Gram:
        found = right(fit, held)
        return replace(found, fit=wrong(found.fit), held=wrong(found.held))

    def means_of_the_fitted(fit: Any, held: Any) -> Gram:
        found = right(fit, held)
        return replace(found, fit=wrong(found.fit))

    monkeypatch.setattr(gram, "_means", means)
    assert fresh_db(bench, bench.quantize(rounding="gptq", **INT4_ENGINE), fresh) < nearest
    monkeypatch.setattr(gram, "_means", means_of_the_fitted)
    model = bench.quantize(rounding="auto", **INT4_ENGINE)
    assert fresh_db(bench, model, fresh) > nearest - 0.5
    note = next(note for note in model.notes if note.startswith("weights rounded by "))
    assert "nearest" in note.split(";")[0]


@pytest.mark.parametrize("method", ["gptq", "adaround", "auto", "awq"])
def test_the_same_run_writes_the_same_bytes(tmp_path: Path, method: str) -> None:
    bench, _ = block_bench(tmp_path, width=32)
    made = [bench.quantize(rounding=method, **INT4_ENGINE).sha256 for _ in range(2)]
    assert made[0] == made[1]


def test_auto_takes_no_longer_than_it_may(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench, _ = block_bench(tmp_path, width=32)
    nearest, gptq = (bench.quantize(rounding=method, **INT4_ENGINE) for method in ("nearest", "gptq"))
    monkeypatch.setattr(weights, "MOST_SWEPT", 1.0)
    assert bench.quantize(rounding="auto", **INT4_ENGINE).sha256 == gptq.sha256
    monkeypatch.setattr(weights, "MOST_SOLVED", 1.0)
    model = bench.quantize(rounding="auto", **INT4_ENGINE)
    assert model.sha256 == nearest.sha256
    assert any(note.startswith("weights rounded to nearest: GPTQ would take long") for note in model.notes)


@pytest.mark.parametrize("engine", [INT4_ENGINE, INT8_ENGINE], ids=["int4", "int8"])
def test_nearest_gathers_nothing_and_is_what_was_there_before(
    tmp_path: Path, engine: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Source, "_gather", lambda *_: pytest.fail("gathered"))
    bench, _ = block_bench(tmp_path, width=32)
    model = bench.quantize(rounding="nearest", **engine)
    known = {tensor.name: tensor for tensor in graph(model).initializer}
    for tensor in bench.proto.graph.initializer:
        if f"{tensor.name}_int4" in known:
            values = numpy_helper.to_array(tensor)
            steps, scale = round_blocks(values, 0, 32, "fp32")
            stored = known[f"{tensor.name}_int4"]
            assert reference.int4_of(stored.raw_data, values.shape).tolist() == steps.astype(int).tolist()
            assert numpy_helper.to_array(known[f"{tensor.name}_dequantized_scale"]).tolist() == scale.tolist()
    assert not [note for note in model.notes if note.startswith("weights rounded by ")]
    assert engine is INT4_ENGINE or bench.quantize(rounding="auto", **engine).sha256 == model.sha256


def test_a_tied_table_stays_one_int8_tensor_rounded_to_nearest(tmp_path: Path) -> None:
    bench = Bench(tmp_path, networks.embedding(head="transpose"), networks.id_samples(16))
    plain, model = (bench.quantize(rounding=method, **INT4_ENGINE) for method in ("nearest", "gptq"))
    known = [{tensor.name: tensor for tensor in graph(m).initializer} for m in (plain, model)]
    assert [name for name in known[1] if name.startswith("table")] == ["table_int8", "table_dequantized_scale"]
    assert known[0]["table_int8"].raw_data == known[1]["table_int8"].raw_data
    assert known[0]["w_int4"].raw_data != known[1]["w_int4"].raw_data
    assert any(note.startswith("weights rounded by GPTQ 1;") for note in model.notes)


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_a_weight_that_two_layers_share_is_stored_once(tmp_path: Path, method: str) -> None:
    net = Net()
    weight = net.normal("w", 32, 32, fan_in=32)
    net.op("MatMul", [net.op("Relu", [net.op("MatMul", ["x", weight], "p")], "r"), weight], "y")
    bench = Bench(tmp_path, net.model({"x": ["batch", 32]}, {"y": ["batch", 32]}), correlated(16, 32))
    model = bench.quantize(rounding=method, **INT4_ENGINE)
    assert {tensor.name for tensor in graph(model).initializer} == {"w_int4", "w_dequantized_scale"}


def test_a_weight_that_is_summed_over_either_axis_is_learned_for_both(tmp_path: Path) -> None:
    net = Net()
    weight, bias = net.normal("w", 32, 32, fan_in=32), net.weight("b", np.zeros(32, np.float32))
    net.op("Gemm", [net.op("Gemm", ["x", weight, bias], "p"), weight, bias], "y", transB=1)
    samples = correlated(36, 32)
    bench = Bench(tmp_path, net.model({"x": ["batch", 32]}, {"y": ["batch", 32]}), samples[:32])
    nearest, model = (bench.quantize(rounding=method, **INT4_ENGINE) for method in ("nearest", "auto"))
    assert fresh_db(bench, model, samples[32:]) > fresh_db(bench, nearest, samples[32:]) + 1
    assert any(note.startswith("weights rounded by ") and "GPTQ" in note for note in model.notes)


def test_a_layer_that_reads_a_mask_is_rounded_to_nearest_and_said(tmp_path: Path) -> None:
    net = Net()
    lost = net.weight("m", f32([0] * 31 + [MASKED]))
    weight = net.random.normal(size=(32, 4)).astype(np.float32)
    weight[31] = 0
    net.op("MatMul", [net.op("Add", ["x", lost], "masked"), net.weight("w", weight)], "y")
    bench = Bench(tmp_path, net.model({"x": ["batch", 32]}, {"y": ["batch", 4]}), networks.normal_samples(8, 32))
    model = bench.quantize(rounding="gptq", **INT4_ENGINE)
    assert "weights rounded by nearest 1 (unknown what 1 reads)" in model.notes


def two_readers(folder: Path) -> Bench:
    """Two products that read one activation with outlying channels, which one of them hardly minds."""
    net = Net()
    for name in "ab":
        rows = np.exp(net.random.normal(size=(32, 1)))
        rows[[3, 17]] *= {"a": 1, "b": 1e-3}[name]
        weight = net.weight(f"{name}_w", f32(net.random.normal(size=(32, 64)) * rows))
        net.op("MatMul", ["x", weight], name)
    net.linear(net.op("Relu", [net.op("Add", ["a", "b"], "sum")], "relu"), "y", (64, 8))
    samples = correlated(32, 16, 32)
    for sample in samples:
        sample["x"][..., [3, 17]] *= 40
    return Bench(folder, net.model({"x": ["batch", 16, 32]}, {"y": ["batch", 16, 8]}), samples)


@pytest.mark.parametrize(
    ("precision", "method"),
    [(Precision.INT4, "auto"), (Precision.INT4, "awq"), (Precision.INT8, "gptq"), (Precision.INT8, "adaround")],
)
def test_a_search_learns_once_and_makes_what_would_be_made_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: Precision, method: Any
) -> None:
    """Also where outlying channels are moved into weights: by what is kept it is decided what the others become."""
    bench = two_readers(tmp_path)
    section = QuantizeSection(rounding=method, smooth="on", method="minmax", min_sqnr_db=NONE)
    options: dict[str, Any] = {"open_model": open_model, "threads": 1, "checked": False}
    rounded: list[Any] = []
    gathered: list[Any] = []
    round_layer, gather = rounding.round_layer, Source._gather

    def count_layer(*args: Any, **more: Any) -> Any:
        rounded.append(args)
        return round_layer(*args, **more)

    def count_gram(self: Source, wanted: Sequence[Reads]) -> dict[Reads, Gram]:
        gathered.extend(wanted)
        return gather(self, wanted)

    monkeypatch.setattr(rounding, "round_layer", count_layer)
    monkeypatch.setattr(Source, "_gather", count_gram)

    def made(keep: Sequence[str], **more: Any) -> str:
        folder = tmp_path / f"made{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        engine = EngineSection(precision=precision, keep=tuple(keep))
        return quantize(
            engine, section, bench.model, bench.statistics, bench.data, out_dir=folder, **options, **more
        ).sha256

    kept = [[], ["a"], ["b"], []]
    alone = [made(keep) for keep in kept]
    by_itself = len(rounded)
    learning = Learning(source=source(bench, samples=bench.statistics.samples))
    rounded.clear()
    gathered.clear()
    assert [made(keep, learning=learning) for keep in kept] == alone
    assert len(set(alone)) == len(kept) - 1, "it matters what is kept"
    assert len(gathered) == len(set(gathered)) > 0
    assert 0 < len(rounded) <= by_itself / 2
    assert not list(learning.source.out_dir.iterdir())


@pytest.mark.parametrize("method", ["gptq", "adaround"])
def test_fp8_weights_take_gptq_and_otherwise_stay_nearest(tmp_path: Path, method: str) -> None:
    bench, fresh = block_bench(tmp_path)
    engine: dict[str, Any] = {"precision": Precision.FP8, "weights_only": True, "min_sqnr_db": NONE}
    nearest, model = (bench.quantize(rounding=m, **engine) for m in ("nearest", method))
    if method == "adaround":
        assert model.sha256 == nearest.sha256
        assert "AdaRound is for integers alone: FP8 weights are rounded to nearest" in model.notes
    else:
        assert fresh_db(bench, model, fresh) > fresh_db(bench, nearest, fresh) + 1


@pytest.mark.parametrize("method", ["auto", "awq"])
def test_weights_in_external_data_become_the_same(tmp_path: Path, method: str) -> None:
    bench, _ = block_bench(tmp_path, width=32)
    inside = bench.quantize(rounding=method, **INT4_ENGINE)
    _, files = onnx_files.write(onnx_files.read(bench.model.path), tmp_path / "large.onnx", external_above=0)
    assert files
    large = onnx_files.describe(tmp_path / "large.onnx", precision=Precision.FP32, axes=bench.model.axes)
    bench.statistics = replace(bench.statistics, model_sha256=large.sha256)
    bench.model = replace(large, probe=bench.model.probe)
    assert bench.quantize(rounding=method, **INT4_ENGINE).sha256 == inside.sha256


# --- one layer ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "channels"), [((8, 4, 3, 3), 0), ((36, 8), 1), ((8, 36), 0)])
def test_a_layer_of_int8_keeps_its_layout_and_scales(shape: tuple[int, ...], channels: int) -> None:
    random = np.random.default_rng(0)
    weight = random.normal(size=shape).astype(np.float32)
    layout = Layout(channels=channels)
    rows = layout.rows(weight)
    assert layout.stored(rows, weight).tolist() == weight.tolist()
    steps, scale = int8(rows)
    stored = layout.stored(steps, np.empty(shape, np.int8))
    matrix = positive(random, 36)[None]
    known = Gram(fit=matrix, held=matrix, magnitude=np.ones((1, 36)))
    found = rounding.round_layer(weight, (stored, scale[:, 0]), layout, INT8, known, rounding="auto")
    assert (found.steps.shape, found.steps.dtype.name, found.scale.tolist()) == (shape, "int8", scale[:, 0].tolist())
    assert found.gain_db is not None
    assert found.gain_db > 3
    after = gram.error(rows, layout.rows(found.steps) * scale, matrix[0])
    before = gram.error(rows, steps * scale, matrix[0])
    assert found.gain_db == pytest.approx(10 * np.log10(before / after), abs=1e-3)


def test_what_gains_too_little_stays_nearest() -> None:
    weight = np.random.default_rng(0).normal(size=(8, 16)).astype(np.float32)
    steps, scale = int8(weight)
    matrix = np.eye(16, dtype=np.float32)[None]
    known = Gram(fit=matrix, held=matrix, magnitude=np.ones((1, 16)))
    stored = (steps.astype(np.int8), scale[:, 0])
    found = rounding.round_layer(weight, stored, Layout(channels=0), INT8, known, rounding="auto")
    assert found.how == "nearest"
    assert found.steps is stored[0]
    assert found.gain_db == 0


# --- AWQ ------------------------------------------------------------------------------------------------------------


def outlying(folder: Path, *, residual: bool) -> tuple[Bench, list[dict[str, Array]]]:
    """A normalisation, a few channels of which are large, and a product; with ``residual`` more reads what it makes."""
    net = Net()
    gains = np.ones(64, np.float32)
    gains[::16] = 30
    x = net.op("LayerNormalization", ["x", net.weight("g", gains), net.normal("b", 64)], "norm")
    y = net.linear(x, "up", (64, 64))
    net.op("Add", [x, y], "y") if residual else net.op("Relu", [y], "y")
    samples = networks.normal_samples(20, 4, 64)
    return Bench(folder, net.model({"x": ["batch", 4, 64]}, {"y": ["batch", 4, 64]}), samples[:16]), samples[16:]


@pytest.mark.parametrize("residual", [False, True])
def test_awq_scales_inputs_that_matter(tmp_path: Path, residual: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    bench, fresh = outlying(tmp_path, residual=residual)
    monkeypatch.setattr(rounding, "TRIED", {**rounding.TRIED, "awq": ()})  # AWQ alone
    nearest, model = (bench.quantize(rounding=method, **INT4_ENGINE) for method in ("nearest", "awq"))
    assert fresh_db(bench, model, fresh) > fresh_db(bench, nearest, fresh) + 1.5
    kinds = [node.op_type for node in graph(model).node]
    assert kinds.count("Mul") == residual, "folded unless somebody else reads it"
    how = "one Mul each" if residual else "folded into normalisations"
    assert any(note.startswith(f"inputs scaled by AWQ, {how}: 1 of 1, output errors ") for note in model.notes)


def test_awq_that_gains_nothing_changes_nothing(tmp_path: Path) -> None:
    bench = Bench(
        tmp_path, networks.linear_map(np.random.default_rng(0).normal(size=(64, 8))), networks.normal_samples(16, 64)
    )
    model = bench.quantize(rounding="awq", **INT4_ENGINE)
    assert "inputs scaled by AWQ: 0 of 1, none gains enough" in model.notes
    assert [node.op_type for node in graph(model).node] == ["DequantizeLinear", "MatMul"]


@pytest.mark.parametrize("rest", ["fp32", "fp16"])
def test_a_model_scaled_by_awq_computes_in_half(tmp_path: Path, rest: str) -> None:
    bench, fresh = outlying(tmp_path, residual=True)
    model = bench.quantize(rounding="awq", rest=rest, **INT4_ENGINE)
    assert fresh_db(bench, model, fresh) > 20


@pytest.mark.parametrize(
    ("kind", "extra", "folds"),
    [
        ("LayerNormalization", ["g"], True),
        ("LayerNormalization", ["g", "b"], True),
        ("Mul", ["g"], True),
        ("Add", ["g"], False),
    ],
)
def test_factors_change_nothing_before_rounding(tmp_path: Path, kind: str, extra: list[str], folds: bool) -> None:
    net = Net()
    for name in extra:
        net.normal(name, 8)
    weight = net.normal("w", 8, 3)
    net.op("MatMul", [net.op(kind, ["x", *extra], "made"), weight], "y")
    proto = net.model({"x": ["batch", 8]}, {"y": ["batch", 3]})
    factors = np.geomspace(0.1, 10, 8).astype(np.float32)
    network = ir.from_proto(proto)
    product = next(node for node in network.graph if node.op_type == "MatMul")
    value, stored = product.inputs
    assert value is not None
    assert stored is not None
    assert stored.const_value is not None
    assert awq.can_fold(network.graph, value, [product]) == folds
    stored.const_value = ir.Tensor(stored.const_value.numpy() * factors[:, None], name="w")
    made = awq.divide(network.graph, value, [product], factors, FreeNames(network.graph))
    assert (made is value) == folds
    onnx_files.write(network, tmp_path / "scaled.onnx")
    onnx.save(proto, tmp_path / "plain.onnx")
    feeds = networks.normal_samples(1, 8)[0]
    expected, found = (open_model(tmp_path / f"{name}.onnx", threads=1).run(feeds)["y"] for name in ("plain", "scaled"))
    assert found == pytest.approx(expected, abs=1e-4)


def test_factors_by_hand() -> None:
    # The input that is large is worth finer steps: its weight grows until it is rounded to next to nothing's loss.
    matrix = np.diag(f32([1, 1, 1, 10000]))[None]
    known = Gram(fit=matrix, held=matrix, magnitude=f32([[1, 1, 1, 100]]))
    weight = f32([[0.93, -0.71, 0.37, 0.113]])

    def rounded(rows: Array) -> Array:
        scale = np.abs(rows).max(axis=1, keepdims=True) / np.float32(7)
        values: Array = np.rint(rows / scale) * scale
        return values

    factors, gain_db = awq.choose_factors([weight], known, rounded)
    assert factors[3] > 2 * factors[0]
    assert gain_db > 3
    same = Gram(
        fit=np.eye(4, dtype=np.float32)[None], held=np.eye(4, dtype=np.float32)[None], magnitude=np.ones((1, 4))
    )
    factors, gain_db = awq.choose_factors([weight], same, rounded)
    assert (factors.tolist(), gain_db) == ([1, 1, 1, 1], 0)


def test_the_calibration_set_is_read_and_not_changed(tmp_path: Path) -> None:
    bench, _ = block_bench(tmp_path, width=32)
    before = bench.data
    bench.quantize(rounding="gptq", **INT4_ENGINE)
    assert isinstance(before, CalibrationSet)
    assert {tensor.data_type for tensor in graph(bench.model).initializer} == {TensorProto.FLOAT, TensorProto.INT64}

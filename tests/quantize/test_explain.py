"""The layer that spoils a model is named first, with the right reason, and what is said to help helps by about as much."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from compiler import codec, onnx_files
from compiler.backends.onnxruntime import open_model
from compiler.errors import BuildError
from compiler.quantize import advice
from compiler.quantize.explain import SAMPLES, explain
from compiler.recipe import EngineSection, QuantizeSection
from compiler.spec import Array, Explanation, OnnxModel, Precision, TensorError
from tests.quantize import networks
from tests.quantize.bench import NONE, Bench
from tests.quantize.networks import Net

OFF: dict[str, Any] = {"smooth": "off", "min_sqnr_db": NONE}


def explained(
    bench: Bench,
    quantised: OnnxModel | None = None,
    *,
    engine: Mapping[str, Any] | None = None,
    searched: bool = False,
    open_with: Any = open_model,
    **section: Any,
) -> Explanation:
    """What is said of ``quantised``, by default of what `Bench.quantize` makes."""
    section = {"method": "minmax", **OFF, **section}
    engine = {"precision": Precision.INT8, **(engine or {})}
    if quantised is None:
        quantised = bench.quantize(**{key: value for key, value in engine.items() if key != "name"}, **section)
    out_dir = bench.folder / f"explain{len(list(bench.folder.iterdir()))}"
    out_dir.mkdir()
    found = explain(
        EngineSection(**engine),
        QuantizeSection(**section),
        bench.model,
        quantised,
        bench.statistics,
        bench.data,
        searched=searched,
        open_model=open_with,
        threads=1,
        out_dir=out_dir,
    )
    assert not list(out_dir.iterdir()), "the folder is left empty"
    assert codec.load(codec.dump(found, out_dir), Explanation, out_dir) == found
    return found


def doctored(model: OnnxModel, change: Callable[[onnx.GraphProto], None]) -> OnnxModel:
    proto = onnx.load(model.path)
    change(proto.graph)
    onnx.save(proto, model.path)
    return onnx_files.describe(model.path, precision=model.precision, axes=model.axes)


def scaled(tensor: str, factor: float, *kinds: str) -> Callable[[onnx.GraphProto], None]:
    """Multiply the scales of the nodes of ``kinds`` that round ``tensor``."""

    def change(graph: onnx.GraphProto) -> None:
        quantize = next(node for node in graph.node if node.op_type == "QuantizeLinear" and node.input[0] == tensor)
        readers = [
            node for node in graph.node if node.op_type == "DequantizeLinear" and node.input[0] == quantize.output[0]
        ]
        weights = {weight.name: weight for weight in graph.initializer}
        for place, node in enumerate(node for node in (quantize, *readers) if node.op_type in kinds):
            wrong = numpy_helper.to_array(weights[node.input[1]]) * np.float32(factor)
            graph.initializer.append(numpy_helper.from_array(wrong, f"wrong{place}"))
            node.input[1] = f"wrong{place}"

    return change


def named(explanation: Explanation, name: str) -> TensorError:
    return next(tensor for tensor in explanation.tensors if tensor.name == name)


@pytest.fixture
def residual(tmp_path: Path) -> Bench:
    return Bench(tmp_path, networks.residual(), networks.normal_samples(24, 3, 16, 16))


BOTH = ("QuantizeLinear", "DequantizeLinear")


@pytest.mark.parametrize(
    ("factor", "kinds", "reason"),
    [
        (8.0, ("DequantizeLinear",), "broken: written with scale {scale:.3g} and read with {wrong:.3g}, 8 times"),
        (0.125, ("DequantizeLinear",), "broken: written with scale {scale:.3g} and read with {wrong:.3g}, 1/8 of"),
        (32.0, BOTH, "threshold {above:.3g} is 32 times the peak {peak:.3g}: levels are left unused"),
    ],
)
def test_a_scale_that_is_off_is_named_first_with_its_reason(
    residual: Bench, factor: float, kinds: Sequence[str], reason: str
) -> None:
    sound = explained(residual)
    quantised = doctored(residual.quantize(**OFF), scaled("b0_1_relu", factor, *kinds))
    found = explained(residual, quantised)
    assert found.tensors[0].name == "b0_1_relu"
    assert found.tensors[0].share > 0.5
    right = named(sound, "b0_1_relu")
    assert right.scale is not None and right.peak is not None
    values = {"scale": right.scale, "wrong": factor * right.scale, "peak": right.peak, "above": factor * right.peak}
    assert found.tensors[0].reason == reason.format(**values)
    assert named(sound, "b0_1_relu").share < 0.1, "where it is sound, another is first"
    assert found.model_sha256 == quantised.sha256 != sound.model_sha256


def test_a_zero_point_that_is_read_as_another_is_named(residual: Bench) -> None:
    shifted = {**OFF, "activations": "asymmetric"}

    def change(graph: onnx.GraphProto) -> None:
        quantize = next(
            node for node in graph.node if node.op_type == "QuantizeLinear" and node.input[0] == "b0_1_relu"
        )
        graph.initializer.append(numpy_helper.from_array(np.array(-100, np.int8), "wrong"))
        for node in graph.node:
            if node.op_type == "DequantizeLinear" and node.input[0] == quantize.output[0]:
                node.input[2] = "wrong"

    found = explained(residual, doctored(residual.quantize(**shifted), change), activations="asymmetric")
    assert found.tensors[0].name == "b0_1_relu"
    assert found.tensors[0].reason == "broken: written with zero point -128 and read with -100"


def test_the_threshold_of_a_shifted_range_is_its_farther_end(residual: Bench) -> None:
    found = named(explained(residual, residual.quantize(**OFF, activations="asymmetric")), "b0_1_relu")
    assert found.scale is not None and found.peak is not None
    assert found.threshold == pytest.approx(found.peak, rel=1e-4)
    assert found.scale == pytest.approx(found.peak / 255, rel=1e-4)
    assert found.clipped == 0


def test_a_range_that_clips_is_named_with_the_share_of_values_above(residual: Bench) -> None:
    found = explained(residual, doctored(residual.quantize(**OFF), scaled("b0_1_relu", 1 / 8, *BOTH)), method="mse")
    worst = found.tensors[0]
    assert worst.name == "b0_1_relu"
    assert worst.peak is not None
    assert worst.threshold == pytest.approx(worst.peak / 8, rel=1e-5)
    assert worst.reason == (
        f"threshold {worst.threshold:.3g} of peak {worst.peak:.3g} chosen by mse: {100 * worst.clipped:.2g} % of the values "
        "lie above"
    )
    assert 0.1 < worst.clipped < 0.5
    assert worst.clipped_by == pytest.approx(8, rel=0.2)
    change = next(change for change in found.advice if change.lines == ("[quantize]", 'method = "minmax"'))
    assert change.change == "choose ranges by minmax, which clips nothing"
    gained = sqnr(explained(residual)) - sqnr(found)
    assert change.gain_db > 15, "what is left of the noise is too little to say more"
    assert gained > 15


def test_a_long_tail_is_named_and_a_method_that_would_not_help_is_not_advised(tmp_path: Path) -> None:
    samples = [{"x": sample["x"] ** 5} for sample in networks.normal_samples(200, 64)]
    bench = Bench(tmp_path, networks.linear_map(np.random.default_rng(0).normal(size=(64, 8))), samples)
    found = explained(bench)
    assert found.tensors[0].name == "x"
    assert found.tensors[0].reason.startswith("long tail: the threshold ")
    assert found.tensors[0].reason.endswith("x the root mean square")
    assert sqnr(explained(bench, method="mse")) < sqnr(found) + advice.LEAST_DB
    assert not any("mse" in line for change in found.advice for line in change.lines)


def outliers(tmp_path: Path) -> Bench:
    samples = networks.normal_samples(200, 24)
    for sample in samples:
        sample["x"][0, 3] *= 60
    weight = np.random.default_rng(0).normal(size=(24, 8))
    weight[3] /= 60
    return Bench(tmp_path, networks.linear_map(weight), samples)


def test_outlier_channels_are_named_and_smoothing_gains_what_was_said(tmp_path: Path) -> None:
    bench = outliers(tmp_path)
    before = explained(bench)
    assert (before.tensors[0].name, before.tensors[0].op) == ("x", "input")
    assert before.tensors[0].reason == "outlier channels: the largest channel is 47x the median one"
    change = before.advice[0]
    assert change.change == "move the outlier channels of 'x' into the weights (SmoothQuant)"
    assert change.lines == ("[quantize]", 'smooth = "on"')
    after = explained(bench, smooth="on")
    assert change.gain_db == pytest.approx(sqnr(after) - sqnr(before), abs=3)
    assert sum(tensor.share for tensor in after.tensors) == pytest.approx(1), "a smoothed activation is followed, too"
    assert named(after, "x").scale is not None
    assert not any("smooth" in line for change in after.advice for line in change.lines)


def test_noise_that_a_split_product_passes_on_is_not_its_own(tmp_path: Path) -> None:
    """Of a product whose outlying channels are multiplied apart the quantised model knows only the sum with its bias."""
    net = Net(6)
    hidden = net.op("Tanh", [net.linear("x", "first", (32, 256))], "hidden")
    scale = np.ones(256, np.float32)
    scale[:8] = 100
    net.linear(net.op("Mul", [hidden, net.weight("scale", scale)], "outlying"), "y", (256, 16))
    samples = networks.normal_samples(24, 32)
    for sample in samples:
        sample["x"][:, 0] *= 200
    bench = Bench(tmp_path, net.model({"x": ["batch", 32]}, {"y": ["batch", 16]}), samples)
    found = explained(bench, split="on")
    assert "outlying_outliers" in {value.name for value in onnx.load(bench.quantize(split="on", **OFF).path).graph.node}
    assert named(found, "x").share > 0.9
    assert named(found, "y").share < 0.05
    kept = explained(bench, engine={"keep": ("y_product",)}, split="on")
    assert sqnr(kept) == pytest.approx(sqnr(found), abs=0.3), "nothing to gain there"
    advised = [change for change in found.advice if "'first_product'" in change.change]
    assert advised and advised[0].gain_db > 10


def test_noise_that_a_later_layer_takes_back_counts_for_what_is_left(tmp_path: Path) -> None:
    """``s = a + a W`` with W close to -0.9 takes back nine tenths of what the weight of ``a`` adds; the noise at ``s`` is large."""
    net = Net(7)
    first = net.random.normal(size=(32, 32)).astype(np.float32) / 6
    first[0] = 3  # one row sets the scale of every column
    net.op("MatMul", ["x", net.weight("a_w", first)], "a")
    back = -0.9 * np.eye(32) + net.random.normal(size=(32, 32)) / 40
    net.op("Add", ["a", net.op("MatMul", ["a", net.weight("back_w", back.astype(np.float32))], "back")], "s")
    net.op("MatMul", ["s", net.weight("y_w", net.random.normal(size=(32, 32)).astype(np.float32))], "y")
    bench = Bench(tmp_path, net.model({"x": ["batch", 32]}, {"y": ["batch", 32]}), networks.normal_samples(24, 32))
    engine = {"weights_only": True}
    found = explained(bench, engine=engine)
    kept = explained(bench, engine={**engine, "keep": ("a",)})
    assert named(found, "a").added_db is not None
    gained = sqnr(kept) - sqnr(found)
    assert advice.gain_db(named(found, "a").share) == pytest.approx(gained, abs=0.5)
    assert 0.02 < named(found, "a").share < 0.5
    assert found.notes == ("rounded one by one, 3 of 3 tensors make 101% of the noise that all make together",)


def test_the_layer_of_a_split_product_can_be_kept(tmp_path: Path) -> None:
    net = Net(6)
    scale = np.ones(256, np.float32)
    scale[:8] = 20
    mixed = net.linear(net.op("Mul", ["x", net.weight("scale", scale)], "outlying"), "mixed", (256, 64))
    net.linear(net.op("Tanh", [mixed], "hidden"), "y", (64, 16))
    bench = Bench(tmp_path, net.model({"x": ["batch", 256]}, {"y": ["batch", 16]}), networks.normal_samples(24, 256))
    found = explained(bench, split="on")
    change = next(change for change in found.advice if "'mixed_product'" in change.change)
    kept = explained(bench, engine={"keep": ("mixed_product",)}, split="on")
    assert change.gain_db > 1
    assert sqnr(kept) - sqnr(found) == pytest.approx(change.gain_db, abs=1)


def test_a_model_whose_numbers_eight_bits_hold_is_lossless(tmp_path: Path) -> None:
    """Inputs are whole numbers of steps, up to the peak; so are weights."""
    samples = [
        {"x": networks.f32([[127, *values]])} for values in np.random.default_rng(0).integers(-127, 128, (20, 3))
    ]
    weight = np.array([[127, 0], [0, 127], [1, 2], [3, 4]])
    found = explained(Bench(tmp_path, networks.linear_map(weight), samples))
    assert found.outputs_db == {"y": None}
    assert found.advice == ()
    assert {tensor.name: (tensor.share, tensor.sqnr_db) for tensor in found.tensors} == {"x": (0, None), "y": (0, None)}


def test_a_constant_activation_is_named_as_such(tmp_path: Path) -> None:
    net = Net()
    net.op("Mul", ["x", net.weight("zero", networks.f32(0))], "nothing")
    net.op("Add", ["nothing", net.weight("third", networks.f32(1 / 3))], "third_of_one")
    net.op(
        "Add",
        [net.op("MatMul", ["third_of_one", net.normal("w", 8, 4)], "p"), net.weight("b", np.ones(4, np.float32))],
        "y",
    )
    bench = Bench(tmp_path, net.model({"x": ["batch", 8]}, {"y": ["batch", 4]}), networks.normal_samples(16, 8))
    assert named(explained(bench), "third_of_one").reason == "constant: 0.333 on every calibration sample"


def test_a_mask_is_named_though_nothing_rounds_it(tmp_path: Path) -> None:
    net = Net()
    shifted = net.op("Add", ["x", net.weight("mask", networks.f32([0] * 7 + [-3e38]))], "masked")
    net.op("Add", [net.linear(shifted, "p", (8, 4)), net.linear("x", "q", (8, 4))], "y")
    bench = Bench(tmp_path, net.model({"x": ["batch", 8]}, {"y": ["batch", 4]}), networks.normal_samples(16, 8))
    tensor = named(explained(bench), "masked")
    assert (tensor.rounded, tensor.share) == (False, 0)
    assert tensor.reason == "mask: it holds -3e+38, so what reads it is not rounded"


@pytest.mark.parametrize("layer", ["b1_1", "b0_2"])
def test_a_weight_that_is_spoilt_is_named_by_its_layer(residual: Bench, layer: str) -> None:
    """Whether what it makes is rounded there, as is b0_2, or after an activation."""

    def spoil(graph: onnx.GraphProto) -> None:
        weight = next(weight for weight in graph.initializer if weight.name == f"{layer}_w_int8")
        values = numpy_helper.to_array(weight) // 100 * 100
        weight.CopyFrom(numpy_helper.from_array(values.astype(np.int8), weight.name))

    found = explained(residual, doctored(residual.quantize(**OFF), spoil))
    worst = found.tensors[0]
    assert (worst.name, worst.op, worst.layer) == (layer, "Conv", True)
    assert worst.weight_share > 0.5
    assert worst.reason == f"its weight: rounded alone, {worst.added_db:.1f} dB"
    assert found.advice[0].lines == ("[[engines]]", 'precision = "int8"', f'keep = ["{layer}"]')


def sqnr(explanation: Explanation) -> float:
    (found,) = explanation.outputs_db.values()
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("network", "samples"),
    [
        (networks.residual, networks.normal_samples(24, 3, 16, 16)),
        (networks.transformer_block, networks.masked_samples(24)),
    ],
)
def test_keeping_a_layer_gains_about_what_was_said(
    tmp_path: Path, network: Callable[[], onnx.ModelProto], samples: list[dict[str, Array]]
) -> None:
    bench = Bench(tmp_path, network(), samples)
    found = explained(bench)
    kept = [change for change in found.advice if change.change.startswith("keep ")]
    assert kept and kept[0].gain_db > 1
    for change in kept:
        keep = json.loads(change.lines[-1].removeprefix("keep = "))
        gained = sqnr(explained(bench, engine={"keep": tuple(keep)})) - sqnr(found)
        assert gained == pytest.approx(change.gain_db, abs=2), change


def test_shares_are_of_all_of_the_noise_and_ranked(residual: Bench) -> None:
    found = explained(residual)
    shares = [tensor.share for tensor in found.tensors]
    assert sum(shares) == pytest.approx(1)
    assert shares == sorted(shares, reverse=True)
    assert all(0 <= tensor.weight_share <= tensor.share for tensor in found.tensors)
    assert named(found, "stem_relu").op == "Relu"
    assert named(found, "stem_relu").node == "node_stem_relu"
    assert not any(tensor.name == "pool" for tensor in found.tensors), "what only moves rounded values adds nothing"


@pytest.mark.parametrize(
    "engine",
    [
        {"precision": Precision.FP8},
        {"precision": Precision.INT8, "weights_only": True},
        {"precision": Precision.INT4, "block": 16},
    ],
    ids=str,
)
def test_every_format_is_explained(tmp_path: Path, engine: dict[str, Any]) -> None:
    bench = Bench(tmp_path, networks.transformer_block(), networks.masked_samples(24))
    found = explained(bench, engine=engine)
    assert found.precision is engine["precision"]
    assert sum(tensor.share for tensor in found.tensors) == pytest.approx(1)
    assert {tensor.name for tensor in found.tensors if tensor.layer} >= {"up_product", "down_product"}
    rounds = engine["precision"] is Precision.FP8
    assert any(tensor.rounded for tensor in found.tensors) is rounds
    assert not any("smooth" in line or "method" in line for change in found.advice for line in change.lines)


def test_channels_that_a_pass_has_rescaled_are_no_error(tmp_path: Path) -> None:
    """As cross-layer equalisation does: one convolution's output divided by what the next one's weight is multiplied by."""
    samples = networks.normal_samples(24, 3, 16, 16)
    plain, equal = (Bench(tmp_path / name, networks.residual(), samples) for name in ("plain", "equal"))
    factors = np.geomspace(0.5, 2, 8).astype(np.float32)
    graph = (proto := onnx.load(equal.model.path)).graph
    for name, shape in (("b0_1_w", (8, 1, 1, 1)), ("b0_1_b", (8,)), ("b0_2_w", (1, 8, 1, 1))):
        weight = next(weight for weight in graph.initializer if weight.name == name)
        by = (1 / factors if name == "b0_2_w" else factors).reshape(shape)
        weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * by, name))
    moved = Bench(tmp_path / "moved", proto, samples).quantize(**OFF)
    found, expected = explained(equal, moved), explained(plain)
    assert found.notes[0] == "2 tensors are compared after a factor per channel, by which the quantised model's differ"
    assert sqnr(found) == pytest.approx(sqnr(expected), abs=4)
    for name in ("b0_1", "b0_1_relu", "b0_2"):
        assert named(found, name).sqnr_db == pytest.approx(named(expected, name).sqnr_db, abs=3)
        # Uneven channels share one scale, and are noisier for it.
        assert named(found, name).share < 0.25
    assert [tensor.name for tensor in found.tensors[:2]] == [tensor.name for tensor in expected.tensors[:2]]


def test_a_search_is_advised_where_many_layers_share_the_noise(tmp_path: Path) -> None:
    net = Net(9)
    x = "x"
    for place in range(8):
        x = net.op("Tanh", [net.linear(x, f"l{place}", (16, 16))], f"t{place}")
    net.linear(x, "y", (16, 4))
    bench = Bench(tmp_path, net.model({"x": ["batch", 16]}, {"y": ["batch", 4]}), networks.normal_samples(24, 16))
    found = explained(bench)
    assert len(found.advice) == 3
    assert found.advice[-1].lines == ("[search]",)
    assert found.advice[-1].change.startswith("let [search] choose what stays in high precision: 4 of 9 layers share ")
    assert not any(change.lines == ("[search]",) for change in explained(bench, searched=True).advice)


@pytest.mark.parametrize(
    ("engine", "line"),
    [
        ({"precision": Precision.INT4, "block": 16}, 'rounding = "auto"'),
        ({"precision": Precision.INT8, "weights_only": True}, 'rounding = "gptq"'),
        ({"precision": Precision.FP8, "weights_only": True}, 'rounding = "gptq"'),
    ],
    ids=["int4", "int8", "fp8"],
)
def test_learning_to_round_gains_about_what_was_said(tmp_path: Path, engine: dict[str, Any], line: str) -> None:
    net = Net(4)
    net.linear(net.op("Tanh", [net.linear("x", "l1", (64, 64))], "t"), "y", (64, 16))
    mixed = np.random.default_rng(5).normal(size=(8, 64))
    samples = [
        {"x": np.random.default_rng(seed).normal(size=(8, 8)).astype(np.float32) @ mixed.astype(np.float32)}
        for seed in range(64)
    ]
    bench = Bench(tmp_path, net.model({"x": ["batch", 64]}, {"y": ["batch", 16]}), samples)
    found = explained(bench, engine=engine, rounding="nearest")
    (advised,) = [change for change in found.advice if change.lines == ("[quantize]", line)]
    learnt = explained(bench, engine=engine, rounding=line.split('"')[1])
    assert advised.gain_db > 1
    assert sqnr(learnt) - sqnr(found) == pytest.approx(advised.gain_db, abs=2)
    assert not any("rounding" in text for change in learnt.advice for text in change.lines), "it is learnt already"


def test_what_is_kept_already_stays_in_the_lines_to_paste(residual: Bench) -> None:
    found = explained(residual, engine={"keep": ("stem",), "name": "mine"})
    lines = next(change.lines for change in found.advice if change.change.startswith("keep "))
    assert lines[:3] == ("[[engines]]", 'precision = "int8"', 'name = "mine"')
    assert lines[3].startswith('keep = ["stem", ')
    assert found.engine == "mine"


def test_few_samples_are_taken_of_those_that_set_no_range(tmp_path: Path) -> None:
    bench = Bench(tmp_path, networks.convolution(), networks.normal_samples(24, 4, 8, 8))
    assert (explained(bench).samples, explained(bench).fresh) == (SAMPLES, False)
    bench.statistics = dataclasses.replace(bench.statistics, samples=12)
    ran: list[int] = []

    def watched(path: Path, *, threads: int = 0, optimize: bool = True, weights: Path | None = None) -> Any:
        runner = open_model(path, threads=threads, optimize=optimize)
        run = runner.run
        runner.run = lambda feeds: ran.append(1) or run(feeds)  # type: ignore[func-returns-value,method-assign]
        return runner

    found = explained(bench, open_with=watched, rounding="gptq")
    assert (found.samples, found.fresh, found.data_sha256) == (SAMPLES, True, bench.data.sha256)
    assert len(ran) == (2 + 1 + 2) * SAMPLES, (
        "two models, once; a third without noise, and with that of either of two tensors"
    )


def test_a_model_that_the_runtime_refuses_is_said_not_to_be_explained(residual: Bench) -> None:
    def refusing(path: Path, *, threads: int = 0, optimize: bool = True, weights: Path | None = None) -> Any:
        raise BuildError("model.onnx: the runtime refuses it; a model that runs was expected. Export it again.")

    found = explained(residual, open_with=refusing)
    assert found.failure == "model.onnx: the runtime refuses it; a model that runs was expected. Export it again."
    assert (found.tensors, found.advice, found.outputs_db) == ((), (), {})


def test_the_expected_error_of_a_threshold_is_that_of_rounding_to_it() -> None:
    from compiler.quantize.observe import measure

    values = np.random.default_rng(0).normal(size=100_000).astype(np.float32)
    found = measure(values)
    assert found.bins is not None
    for threshold in (0.5, 2.0, found.peak, 10 * found.peak):
        step = threshold / 127
        rounded = np.clip(np.rint(values / step), -127, 127) * step
        assert advice.expected_error(found.bins, found.peak, threshold, step) == pytest.approx(
            float(np.mean((values - rounded) ** 2)), rel=0.1
        )

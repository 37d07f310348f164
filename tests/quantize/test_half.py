"""FP16 and BF16 graphs: valid, with the same interface, close to FP32, and FP32 exactly where half would be wrong."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from compiler.errors import CalibrationError, RecipeError
from compiler.quantize import half
from compiler.quantize.observe import Observed, TensorStatistics, measure
from compiler.spec import Array, Precision
from tests.quantize import networks
from tests.quantize.networks import MASKED, Net

FP16, BF16 = Precision.FP16, Precision.BF16
TENSORS = {TensorProto.FLOAT: "fp32", TensorProto.FLOAT16: "fp16", TensorProto.BFLOAT16: "bf16"}


def run(proto: onnx.ModelProto, feeds: Mapping[str, Array]) -> list[Array]:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return [np.asarray(value) if isinstance(value, np.ndarray) else value for value in session.run(None, dict(feeds))]


def observed(proto: onnx.ModelProto, samples: Iterable[Mapping[str, Array]]) -> Observed:
    """Statistics of every FP32 tensor of the graph."""
    wide = onnx.ModelProto()
    wide.CopyFrom(onnx.shape_inference.infer_shapes(proto))
    shown = {output.name for output in wide.graph.output}
    wide.graph.output.extend(
        value
        for value in wide.graph.value_info
        if value.type.tensor_type.elem_type == TensorProto.FLOAT and value.name not in shown
    )
    names = [output.name for output in wide.graph.output]
    found: dict[str, TensorStatistics] = {}
    for feeds in samples:
        seen = {**feeds, **dict(zip(names, run(wide, feeds), strict=True))}
        for name, values in seen.items():
            if values.dtype == np.float32:
                found[name] = found[name] + measure(values) if name in found else measure(values)
    return found


def convert(
    proto: onnx.ModelProto,
    to: Precision = FP16,
    *,
    samples: Sequence[Mapping[str, Array]] = (),
    statistics: Observed | None = None,
    keep: Sequence[str] = (),
) -> tuple[onnx.ModelProto, list[str]]:
    """The converted model, checked: valid, the same interface, no cast of a cast, no two casts of one tensor alike."""
    model = ir.from_proto(proto)
    known = statistics if statistics is not None else observed(proto, samples)
    notes = half.convert(model, to=to, statistics=known, keep=keep)
    made: onnx.ModelProto = ir.to_proto(model)
    check(proto, made)
    return made, notes


def check(proto: onnx.ModelProto, made: onnx.ModelProto) -> None:
    onnx.checker.check_model(made, full_check=True)

    def interface(model: onnx.ModelProto) -> list[tuple[str, int]]:
        values = (*model.graph.input, *model.graph.output)
        return [(value.name, value.type.tensor_type.elem_type) for value in values]

    assert interface(made) == interface(proto)
    casts = [node for node in made.graph.node if node.op_type == "Cast"]
    before = {node.output[0] for node in proto.graph.node if node.op_type == "Cast"}
    outputs = {node.output[0] for node in casts}
    for node in casts:
        assert node.input[0] not in outputs or node.output[0] in before, f"{node.name} casts a cast"
    targets = [(node.input[0], node.attribute[0].i) for node in casts if node.output[0] not in before]
    assert len(targets) == len(set(targets)), "one tensor is cast twice to one type"


def precisions(made: onnx.ModelProto) -> dict[str, str]:
    """By node name, the precision in which it computes: that of its first floating output, or input."""
    inferred = onnx.shape_inference.infer_shapes(made)
    graph = inferred.graph
    types = {v.name: v.type.tensor_type.elem_type for v in (*graph.value_info, *graph.input, *graph.output)}
    types |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    return {
        node.name: next((TENSORS[types[n]] for n in (*node.output, *node.input) if types.get(n) in TENSORS), "")
        for node in graph.node
        if node.op_type != "Cast"
    }


def weight(made: onnx.ModelProto, name: str) -> Array:
    array: Array = next(onnx.numpy_helper.to_array(t) for t in made.graph.initializer if t.name == name)
    return array


def ones(*shape: int) -> Array:
    return np.ones(shape, np.float32)


# --- whole networks -------------------------------------------------------------------------------------------------


NETWORKS = {
    "convolution": (networks.convolution(), networks.normal_samples(4, 4, 8, 8)),
    "residual": (networks.residual(), networks.normal_samples(4, 3, 16, 16)),
    "transformer_block": (networks.transformer_block(), networks.masked_samples(4)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_compute_in_fp16_from_the_first_node_to_the_last_and_agree_with_fp32(name: str) -> None:
    proto, samples = NETWORKS[name]
    made, notes = convert(proto, samples=samples)
    count = len(proto.graph.node)
    assert notes[0] == f"FP16: {count} of {count} operators on FP32 values"
    assert set(precisions(made).values()) == {"fp16"}
    assert sum(node.op_type == "Cast" for node in made.graph.node) == len(proto.graph.input) + len(proto.graph.output)
    assert TensorProto.FLOAT not in {tensor.data_type for tensor in made.graph.initializer}
    for feeds in samples:
        (expected,), (got,) = run(proto, feeds), run(made, feeds)
        np.testing.assert_allclose(got, expected, atol=2e-3 * np.abs(expected).max(), rtol=0)
        assert (got != expected).any(), "equal to the bit: nothing was in half"


@pytest.mark.parametrize("name", NETWORKS)
def test_bf16_raises_the_opset_to_the_first_that_defines_convolutions_for_it(name: str) -> None:
    proto, samples = NETWORKS[name]
    made, notes = convert(proto, BF16, samples=samples)
    assert set(precisions(made).values()) == {"bf16"}
    assert made.opset_import[0].version == 22
    assert notes[-1] == "opset raised from 20 to 22, the first that defines all common operators for BF16"


def test_opsets_20_to_22_differ_only_in_types_and_in_group_normalization() -> None:
    """What raising the opset relies on, asked of onnx itself."""

    def signature(schema: onnx.defs.OpSchema) -> object:
        return (
            [[(p.name, str(p.option), p.type_str) for p in side] for side in (schema.inputs, schema.outputs)],
            sorted((n, str(a.type), a.required, str(a.default_value)) for n, a in schema.attributes.items()),
        )

    changed = set()
    for name in {schema.name for schema in onnx.defs.get_all_schemas_with_history() if schema.domain == ""}:
        try:
            before, after = onnx.defs.get_schema(name, 20, ""), onnx.defs.get_schema(name, 22, "")
        except onnx.defs.SchemaError:
            continue  # younger than 20
        if signature(before) != signature(after):
            changed.add(name)
    # The first three only got an attribute whose default is what was before; the checker refuses the last in 20.
    assert onnx.defs.get_schema("GroupNormalization", 20, "").deprecated
    assert changed == {"QuantizeLinear", "DequantizeLinear", "QLinearMatMul", "GroupNormalization"}


# --- masks ----------------------------------------------------------------------------------------------------------


def masked_softmax(lowest: float, *, extra: str | None = None) -> onnx.ModelProto:
    """y = Softmax(x + (1 - mask) * lowest), and perhaps one more reader of the masked scores."""
    net = Net()
    net.weight("lowest", np.array(lowest, np.float32))
    net.weight("one", np.array(1, np.float32))
    bias = net.op("Mul", [net.op("Sub", ["one", "mask"], "away"), "lowest"], "bias")
    scores = net.op("Add", ["x", bias], "scores")
    net.op("Softmax", [scores], "y", axis=-1)
    outputs: dict[str, Sequence[int | str]] = {"y": ["batch", 8]}
    if extra is not None:
        net.op(extra, [scores], "z")
        outputs["z"] = ["batch", 8]
    return net.model({"x": ["batch", 8], "mask": ["batch", 8]}, outputs)


MASK = np.array([[1, 1, 1, 1, 1, 0, 0, 0]], np.float32)
MASK_FEEDS = {"x": np.linspace(-3, 3, 8, dtype=np.float32)[None], "mask": MASK}


@pytest.mark.parametrize(("to", "becomes"), [(FP16, -3e4), (BF16, -1e30)])
def test_mask_values_that_only_reach_a_softmax_are_clamped_and_noted(to: Precision, becomes: float) -> None:
    made, notes = convert(masked_softmax(MASKED), to, samples=[MASK_FEEDS])
    assert set(precisions(made).values()) == {to.value}
    stored = next(t for t in made.graph.initializer if t.name.startswith("lowest"))
    assert float(onnx.numpy_helper.to_array(stored)) == pytest.approx(becomes, rel=0.01)
    assert f"mask value -3.4e+38 of 'lowest' becomes {becomes:g}: its exponential stays 0" in notes


def test_clamped_mask_still_hides_what_it_hid() -> None:
    proto = masked_softmax(MASKED)
    made, _ = convert(proto, samples=[MASK_FEEDS])
    (expected,), (got,) = run(proto, MASK_FEEDS), run(made, MASK_FEEDS)
    assert (got[0, 5:] == 0).all()
    np.testing.assert_allclose(got, expected, atol=1e-3)


def test_the_lowest_fp32_value_is_an_infinity_in_bf16_too() -> None:
    """Why BF16, which has the range of FP32, needs the clamp as well."""
    assert np.isneginf(np.float32(MASKED).astype(ml_dtypes.bfloat16))


@pytest.mark.parametrize("extra", ["Relu", "Identity"])
def test_mask_that_reaches_more_than_a_softmax_is_kept_and_its_readers_stay_fp32(extra: str) -> None:
    """Identity passes the mask on to an output, where its value shows."""
    proto = masked_softmax(MASKED, extra=extra)
    made, notes = convert(proto, samples=[MASK_FEEDS])
    assert float(weight(made, "lowest")) == np.float32(MASKED)
    kinds = precisions(made)
    assert {kinds[f"node_{name}"] for name in ("bias", "scores", "y", "z")} == {"fp32"}
    assert not any("mask value" in note for note in notes)
    assert any("'scores' (3.4e+38)" in note for note in notes)
    for expected, got in zip(run(proto, MASK_FEEDS), run(made, MASK_FEEDS), strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-3, rtol=1e-3)


def test_mask_is_not_clamped_where_its_factor_may_exceed_one() -> None:
    feeds = {**MASK_FEEDS, "mask": MASK - 9}
    made, notes = convert(masked_softmax(-1e9), samples=[feeds])
    assert float(weight(made, "lowest")) == -1e9
    assert not any("mask value" in note for note in notes)


def test_mask_is_not_clamped_where_the_scores_leave_it_no_room() -> None:
    """-30000 - 2 * 20000 would overflow."""
    feeds = {**MASK_FEEDS, "x": np.full((1, 8), 20000, np.float32)}
    _, notes = convert(masked_softmax(MASKED), samples=[feeds])
    assert not any("mask value" in note for note in notes)


def test_infinite_mask_stays_infinite() -> None:
    """A row that is masked altogether gives NaN, as in the original, whose exporter counts on it."""
    net = Net()
    net.weight("lowest", np.array(-np.inf, np.float32))
    net.weight("none", np.array(0, np.float32))
    net.op("Greater", ["mask", "none"], "seen")
    net.op("Softmax", [net.op("Where", ["seen", "x", "lowest"], "scores")], "y", axis=-1)
    proto = net.model({"x": ["batch", 8], "mask": ["batch", 8]}, {"y": ["batch", 8]})
    made, notes = convert(proto, samples=[MASK_FEEDS])
    assert notes == ["FP16: 3 of 3 operators on FP32 values"]
    hidden = {**MASK_FEEDS, "mask": np.zeros_like(MASK)}
    np.testing.assert_allclose(run(made, MASK_FEEDS)[0], run(proto, MASK_FEEDS)[0], atol=1e-3)
    assert np.isnan(run(made, hidden)[0]).all() and np.isnan(run(proto, hidden)[0]).all()


def test_mask_made_by_constant_of_shape_is_clamped() -> None:
    net = Net()
    shape = net.op("Shape", ["x"], "shape")
    net.op("ConstantOfShape", [shape], "full", value=helper.make_tensor("v", TensorProto.FLOAT, [1], [MASKED]))
    net.op(
        "Softmax",
        [net.op("Add", ["x", net.op("Trilu", ["full", net.weight("k", np.array(1))], "above")], "scores")],
        "y",
        axis=-1,
    )
    proto = net.model({"x": [4, 4]}, {"y": [4, 4]})
    feeds = {"x": np.eye(4, dtype=np.float32)}
    made, notes = convert(proto, samples=[feeds])
    assert set(precisions(made).values()) == {"fp16"}
    assert notes[1] == "mask value -3.4e+38 of 'full' becomes -30000: its exponential stays 0"
    np.testing.assert_allclose(run(made, feeds)[0], run(proto, feeds)[0], atol=1e-3)


# --- islands --------------------------------------------------------------------------------------------------------


def peaking(peak: float) -> tuple[onnx.ModelProto, dict[str, Array]]:
    """y = relu(x) * peak / peak + x: the product peaks at ``peak``, and nothing else comes near it."""
    net = Net()
    big = net.op("Mul", [net.op("Relu", ["x"], "r"), net.weight("up", np.array(peak, np.float32))], "big")
    down = net.op("Div", [big, net.weight("down", np.array(peak, np.float32))], "small")
    net.op("Sigmoid", [net.op("Add", [down, "x"], "sum")], "y")
    return net.model({"x": ["batch", 4]}, {"y": ["batch", 4]}), {"x": np.array([[1, 0.5, -1, 0.25]], np.float32)}


def test_island_keeps_finite_what_overflows_without_it() -> None:
    """400 * 400 is too large for FP16, and a thousandth of it is not."""
    net = Net()
    small = net.op("Mul", [net.op("Mul", ["x", "x"], "big"), net.weight("down", np.array(1e-3, np.float32))], "small")
    net.op("Neg", [small], "y")
    proto, feeds = net.model({"x": ["batch", 2]}, {"y": ["batch", 2]}), {"x": np.array([[0.0, 400.0]], np.float32)}
    # Not by ONNX Runtime, which has no FP16 kernel of Mul on a CPU, computes in FP32 and drops the casts between.
    without, made = convert(proto, statistics={})[0], convert(proto, samples=[feeds])[0]
    with np.errstate(over="ignore"):
        overflown, kept = (np.asarray(list(ReferenceEvaluator(m).run(None, feeds))) for m in (without, made))
    assert np.isneginf(overflown[0, 0, 1])
    np.testing.assert_allclose(kept[0], np.array([[0.0, -160.0]]), rtol=1e-3)


def test_makers_and_readers_of_an_overflowing_tensor_are_fp32_and_nobody_else() -> None:
    proto, feeds = peaking(1e6)
    made, notes = convert(proto, samples=[feeds])
    assert precisions(made) == {
        "node_r": "fp16",
        "node_big": "fp32",
        "node_small": "fp32",
        "node_sum": "fp16",
        "node_y": "fp16",
    }
    assert notes == [
        "FP16: 3 of 5 operators on FP32 values; FP32 stay 2 beside values that do not fit",
        (
            "outside FP16 (6.1e-05 to 6.55e+04, a factor of 2 left to activations): 'big' (1e+06), 'up' (1e+06), "
            "'down' (1e+06); what makes or reads them stays FP32"
        ),
    ]
    np.testing.assert_allclose(run(made, feeds)[0], run(proto, feeds)[0], atol=1e-3)


@pytest.mark.parametrize(("peak", "precision"), [(32000.0, "fp16"), (33000.0, "fp32")])
def test_a_factor_of_two_is_left_to_what_calibration_did_not_show(peak: float, precision: str) -> None:
    proto, feeds = peaking(peak)
    assert precisions(convert(proto, samples=[feeds])[0])["node_big"] == precision


def test_bf16_needs_no_island_where_fp16_does() -> None:
    proto, feeds = peaking(1e6)
    assert set(precisions(convert(proto, BF16, samples=[feeds])[0]).values()) == {"bf16"}


def test_a_tensor_below_the_smallest_normal_number_is_an_island() -> None:
    net = Net()
    small = net.op("Mul", [net.op("Relu", ["x"], "r"), net.weight("down", np.array(1e-3, np.float32))], "small")
    net.op("Mul", [small, net.weight("up", np.array(1e3, np.float32))], "y")
    proto = net.model({"x": ["batch", 2]}, {"y": ["batch", 2]})
    feeds = {"x": np.array([[0.001, 0.0123]], np.float32)}
    made, notes = convert(proto, samples=[feeds])
    assert precisions(made) == {"node_r": "fp16", "node_small": "fp32", "node_y": "fp32"}
    assert "'small' (1.23e-05)" in notes[1]


def test_constant_that_vanishes_keeps_its_reader_in_fp32() -> None:
    """1 / (x + 1e-12): in FP16 the small number is 0, and 1 / 0 is infinite."""
    net = Net()
    safe = net.op("Add", [net.op("Relu", ["x"], "r"), net.weight("eps", np.array(1e-12, np.float32))], "safe")
    net.op("Div", [net.op("Relu", ["x"], "s"), safe], "y")
    proto = net.model({"x": ["batch", 2]}, {"y": ["batch", 2]})
    made, notes = convert(proto, statistics={})
    assert precisions(made)["node_safe"] == "fp32"
    assert "'eps' (1e-12)" in notes[1]


def test_weights_that_lose_digits_are_noted() -> None:
    net = Net()
    net.op("MatMul", ["x", net.weight("w", np.array([[1e-6, 1.0], [2e-6, 3e-6]], np.float32))], "y")
    _, notes = convert(net.model({"x": ["batch", 2]}, {"y": ["batch", 2]}), statistics={})
    assert notes[1:] == ["weights below 6.1e-05, which lose digits in FP16: 'w' (75%)"]


def test_weight_that_overflows_keeps_its_reader_in_fp32() -> None:
    net = Net()
    net.op("MatMul", [net.op("Relu", ["x"], "r"), net.weight("w", np.full((2, 2), 1e5, np.float32))], "y")
    proto = net.model({"x": ["batch", 2]}, {"y": ["batch", 2]})
    made, notes = convert(proto, statistics={})
    assert precisions(made) == {"node_r": "fp16", "node_y": "fp32"}
    assert "'w' (1e+05)" in notes[1]
    assert weight(made, "w").dtype == np.float32


def test_sums_and_squares_stay_fp32() -> None:
    """The mean of 4096 squares of 20: the sum, 1.6e6, fits no FP16, though square and mean do."""
    net = Net()
    square = net.op("Pow", [net.op("Relu", ["x"], "r"), net.weight("two", np.array(2, np.float32))], "square")
    net.op("Sqrt", [net.op("ReduceMean", [square, net.weight("axes", np.array([1]))], "mean", keepdims=1)], "y")
    proto, feeds = net.model({"x": ["batch", 4096]}, {"y": ["batch", 1]}), {"x": np.full((1, 4096), 20, np.float32)}
    made, notes = convert(proto, samples=[feeds])
    assert precisions(made) == {"node_r": "fp16", "node_square": "fp32", "node_mean": "fp32", "node_y": "fp16"}
    assert notes == ["FP16: 2 of 4 operators on FP32 values; FP32 stay 2 that sum or square"]
    assert run(made, feeds)[0] == pytest.approx(20)


def test_positions_are_computed_in_fp32() -> None:
    """sin(5001 / 10): FP16 would make 5001 5000, and another angle of it."""
    net = Net()
    net.op("Cast", ["positions"], "p", to=TensorProto.FLOAT)
    angle = net.op("MatMul", ["p", net.weight("frequency", np.array([[0.1, 1.0]], np.float32))], "angle")
    net.op("Mul", [net.op("Sin", [angle], "sin"), net.op("Relu", ["x"], "r")], "y")
    graph = net.model({"x": ["n", 2]}, {"y": ["n", 2]}).graph
    graph.input.append(helper.make_tensor_value_info("positions", TensorProto.INT64, ["n", 1]))
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    made, notes = convert(proto, statistics={})
    assert precisions(made) == {"node_angle": "fp32", "node_sin": "fp32", "node_r": "fp16", "node_y": "fp16"}
    assert notes == ["FP16: 2 of 4 operators on FP32 values; FP32 stay 2 that compute on integers"]
    feeds = {"x": ones(1, 2), "positions": np.array([[5001]])}
    np.testing.assert_allclose(run(made, feeds)[0], [[np.sin(500.1), np.sin(5001)]], atol=1e-3)


# --- keep -----------------------------------------------------------------------------------------------------------


def test_kept_nodes_stay_fp32_by_name_by_pattern_and_by_output() -> None:
    proto, samples = networks.residual(), networks.normal_samples(2, 3, 16, 16)
    made, notes = convert(proto, samples=samples, keep=["node_b0_*", "stem", "y"])
    kinds = precisions(made)
    kept = {name for name, kind in kinds.items() if kind == "fp32"}
    assert kept == {name for name in kinds if name.startswith("node_b0_")} | {"node_stem", "node_y"}
    of = f"{len(kinds) - len(kept)} of {len(kinds)}"
    assert notes[0] == f"FP16: {of} operators on FP32 values; FP32 stay {len(kept)} that the recipe keeps"
    assert weight(made, "stem_w").dtype == np.float32 and weight(made, "b1_1_w").dtype == np.float16


def test_pattern_that_matches_nothing_names_the_nearest() -> None:
    with pytest.raises(RecipeError) as caught:
        convert(networks.convolution(), statistics={}, keep=["node_d"])
    assert caught.value.message == (
        "keep: 'node_d' matches no node and no tensor of the model; the nearest names are 'node_y', 'node_c'. "
        "Correct it, or remove it."
    )


def test_model_of_which_nothing_can_be_half_is_refused() -> None:
    with pytest.raises(CalibrationError) as caught:
        convert(networks.convolution(), statistics={}, keep=["*"])
    assert caught.value.message == (
        "model: none of its 2 operators on FP32 values can compute in FP16; at least one was expected. "
        "Keep fewer layers, or build an FP32 engine. 2 that the recipe keeps"
    )


# --- edges of the graph ---------------------------------------------------------------------------------------------


def test_resize_takes_its_scales_in_fp32_and_its_image_in_fp16() -> None:
    net = Net()
    scales = net.weight("scales", np.array([1, 1, 2, 2], np.float32))
    net.op("Resize", [net.op("Relu", ["x"], "r"), "", scales], "y", mode="linear")
    proto = net.model({"x": ["batch", 1, 2, 2]}, {"y": ["batch", 1, 4, 4]})
    made, _ = convert(proto, statistics={})
    assert precisions(made)["node_y"] == "fp16" and weight(made, "scales").dtype == np.float32
    feeds = {"x": np.arange(4, dtype=np.float32).reshape(1, 1, 2, 2)}
    np.testing.assert_allclose(run(made, feeds)[0], run(proto, feeds)[0], atol=2e-3)


def test_embedding_is_stored_in_fp16_and_its_indices_are_left_alone() -> None:
    net = Net()
    net.op("Relu", [net.op("Gather", [net.normal("table", 100, 4), "ids"], "rows")], "y")
    graph = net.model({}, {"y": ["n", 4]}).graph
    graph.input.append(helper.make_tensor_value_info("ids", TensorProto.INT64, ["n"]))
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    made, _ = convert(proto, statistics={})
    assert weight(made, "table").dtype == np.float16
    feeds = {"ids": np.array([3, 99])}
    np.testing.assert_allclose(run(made, feeds)[0], run(proto, feeds)[0], atol=2e-3)


def test_branches_and_what_they_read_from_outside_stay_fp32() -> None:
    inner = [
        helper.make_graph(
            [helper.make_node(kind, ["r", "w"], [f"{kind}_out"])],
            kind,
            [],
            [helper.make_tensor_value_info(f"{kind}_out", TensorProto.FLOAT, None)],
        )
        for kind in ("Add", "Sub")
    ]
    net = Net()
    net.weight("w", np.full(4, 0.5, np.float32))
    net.op("Mul", [net.op("Relu", ["x"], "r"), "w"], "m")
    net.op("If", ["flag"], "chosen", then_branch=inner[0], else_branch=inner[1])
    net.op("Add", ["chosen", "m"], "y")
    graph = net.model({"x": ["batch", 4]}, {"y": ["batch", 4]}).graph
    graph.input.append(helper.make_tensor_value_info("flag", TensorProto.BOOL, []))
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    made, _ = convert(proto, statistics={})
    assert precisions(made) == {"node_r": "fp16", "node_m": "fp16", "node_chosen": "fp32", "node_y": "fp16"}
    for flag in (True, False):
        feeds: dict[str, Array] = {"x": np.linspace(-1, 1, 4, dtype=np.float32)[None], "flag": np.array(flag)}
        np.testing.assert_allclose(run(made, feeds)[0], run(proto, feeds)[0], atol=2e-3)


def test_local_functions_stay_fp32() -> None:
    body = [helper.make_node("Relu", ["a"], ["b"])]
    opset = [helper.make_opsetid("", 20)]
    function = helper.make_function("local", "Twice", ["a"], ["b"], body, opset)
    nodes = [
        helper.make_node("Neg", ["x"], ["n"], name="n"),
        helper.make_node("Twice", ["n"], ["t"], domain="local", name="t"),
        helper.make_node("Neg", ["t"], ["y"], name="y"),
    ]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 4]) for name in "xy")
    graph = helper.make_graph(nodes, "calls", [x], [y])
    opsets = [*opset, helper.make_opsetid("local", 1)]
    proto = helper.make_model(graph, opset_imports=opsets, functions=[function], ir_version=10)
    made, _ = convert(proto, statistics={})
    kinds = [node.op_type for node in made.graph.node]
    assert kinds == ["Cast", "Neg", "Cast", "Twice", "Cast", "Neg", "Cast"]
    feeds = {"x": np.array([[-1, -0.5, 0.5, 1]], np.float32)}
    np.testing.assert_allclose(run(made, feeds)[0], run(proto, feeds)[0], atol=2e-3)


def test_operators_that_only_move_values_between_fp32_ones_are_not_cast_for() -> None:
    net = Net()
    moved = net.op("Transpose", [net.op("Transpose", ["x"], "a", perm=[1, 0])], "b", perm=[1, 0])
    net.op("Identity", [moved], "y")
    net.op("Relu", ["w"], "z")
    made, _ = convert(net.model({"x": [2, 3], "w": [2]}, {"y": [2, 3], "z": [2]}), statistics={})
    assert precisions(made) == {"node_a": "fp32", "node_b": "fp32", "node_y": "fp32", "node_z": "fp16"}
    assert sum(node.op_type == "Cast" for node in made.graph.node) == 2


def test_tensor_read_in_both_precisions_is_cast_once() -> None:
    net = Net()
    r = net.op("Relu", ["x"], "r")
    for name in ("a", "b", "c"):
        net.op("ReduceSum", [r], name)
    net.op("Neg", [r], "d")
    outputs: dict[str, Sequence[int | str]] = {"a": [1, 1], "b": [1, 1], "c": [1, 1], "d": [1, 4], "r": [1, 4]}
    made, _ = convert(net.model({"x": [1, 4]}, outputs), statistics={})
    reads = [node for node in made.graph.node if node.op_type == "ReduceSum"]
    assert {node.input[0] for node in reads} == {"r"}, "the graph's FP32 output serves them all"
    assert sum(node.op_type == "Cast" for node in made.graph.node) == 3


def test_weight_read_in_both_precisions_is_stored_in_both() -> None:
    net = Net()
    net.weight("w", ones(4))
    net.op("Mul", ["x", "w"], "a")
    net.op("Pow", ["x", "w"], "b")
    made, _ = convert(net.model({"x": [1, 4]}, {"a": [1, 4], "b": [1, 4]}), statistics={})
    assert {tensor.name: tensor.data_type for tensor in made.graph.initializer} == {
        "w": TensorProto.FLOAT,
        "w_fp16": TensorProto.FLOAT16,
    }


def test_casts_of_the_model_are_looked_through() -> None:
    """An image in bytes is cast once, to FP16; what was FP16 already is read as it is."""
    net = Net()
    net.op("Cast", ["bytes"], "image", to=TensorProto.FLOAT)
    net.op("Cast", ["thin"], "wide", to=TensorProto.FLOAT)
    net.op("Add", [net.op("Conv", ["image", net.normal("w", 1, 1, 3, 3)], "c"), "wide"], "y")
    graph = net.model({}, {"y": [1, 1, 2, 2]}).graph
    graph.input.append(helper.make_tensor_value_info("bytes", TensorProto.UINT8, [1, 1, 4, 4]))
    graph.input.append(helper.make_tensor_value_info("thin", TensorProto.FLOAT16, [1, 1, 2, 2]))
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    made, _ = convert(proto, statistics={})
    assert [node.op_type for node in made.graph.node] == ["Cast", "Conv", "Add", "Cast"]
    assert next(n for n in made.graph.node if n.op_type == "Conv").input[0] == made.graph.node[0].output[0]
    image = np.arange(16, dtype=np.uint8).reshape(1, 1, 4, 4)
    feeds: dict[str, Array] = {"bytes": image, "thin": np.ones((1, 1, 2, 2), np.float16)}
    np.testing.assert_allclose(run(made, feeds)[0], run(proto, feeds)[0], rtol=5e-3, atol=2e-2)


# --- INT8 with a rest in half ---------------------------------------------------------------------------------------


def rounded(opset: int, scale: float = 0.02) -> onnx.ModelProto:
    """A convolution of rounded values."""
    net = Net()
    zero = net.weight("zero", np.array(0, np.int8))
    net.op("QuantizeLinear", ["x", net.weight("sx", np.array(scale, np.float32)), zero], "q")
    net.op("DequantizeLinear", ["q", "sx", zero], "dq")
    steps = net.weight("w", np.arange(-9, 9, dtype=np.int8).reshape(2, 1, 3, 3))
    net.op(
        "DequantizeLinear",
        [steps, net.weight("sw", np.array([0.1, 0.2], np.float32)), net.weight("zw", np.array([0, 0], np.int8))],
        "dw",
        axis=0,
    )
    net.op("Relu", [net.op("Conv", ["dq", "dw"], "c")], "y")
    return net.model({"x": ["batch", 1, 4, 4]}, {"y": ["batch", 2, 2, 2]}, opset)


def test_scales_become_half_where_the_opset_allows() -> None:
    made, _ = convert(rounded(21), statistics={})
    assert set(precisions(made).values()) == {"fp16"}
    assert weight(made, "sx").dtype == np.float16 and weight(made, "w").dtype == np.int8
    feeds = networks.normal_samples(1, 1, 4, 4)[0]
    expected = run(rounded(21), feeds)[0]
    np.testing.assert_allclose(run(made, feeds)[0], expected, atol=0.02 * np.abs(expected).max())


@pytest.mark.parametrize(("opset", "scale"), [(13, 0.02), (21, 1e-5)])
def test_scales_stay_fp32_where_the_opset_or_their_size_forbids_half(opset: int, scale: float) -> None:
    made, _ = convert(rounded(opset, scale), statistics={})
    kinds = precisions(made)
    assert (kinds["node_q"], kinds["node_dq"], kinds["node_c"]) == ("fp32", "fp32", "fp16")
    feeds = networks.normal_samples(1, 1, 4, 4)[0]
    expected = run(rounded(opset, scale), feeds)[0]
    np.testing.assert_allclose(run(made, feeds)[0], expected, atol=0.02 * np.abs(expected).max())


def test_a_small_scale_that_half_holds_exactly_becomes_half() -> None:
    made, _ = convert(rounded(21, scale=2.0**-17), statistics={})
    assert set(precisions(made).values()) == {"fp16"}
    assert weight(made, "sx") == np.float16(2.0**-17)


@pytest.mark.parametrize("to", [FP16, BF16])
@pytest.mark.parametrize("dtype", [ml_dtypes.int4, ml_dtypes.float8_e4m3fn])
def test_weights_of_few_bits_stay_and_what_they_become_is_half(dtype: type, to: Precision) -> None:
    net = Net()
    steps = net.weight("w", np.arange(-8, 8).reshape(4, 4).astype(dtype))
    scale = net.weight("s", np.full((4,), 0.125, np.float32))
    net.op("MatMul", ["x", net.op("DequantizeLinear", [steps, scale], "dw", axis=1)], "y")
    proto = net.model({"x": ["batch", 4]}, {"y": ["batch", 4]}, opset=21)
    made, notes = convert(proto, to, statistics={})
    assert set(precisions(made).values()) == {to.value}
    assert weight(made, "w").dtype == dtype
    assert weight(made, "w").tolist() == np.arange(-8, 8).reshape(4, 4).astype(dtype).tolist()
    assert notes[0] == f"{to.value.upper()}: 2 of 2 operators on FP32 values"


def test_a_transposed_convolution_stays_fp32_in_bf16() -> None:
    net = Net()
    net.op("Relu", [net.op("ConvTranspose", ["x", net.normal("w", 3, 2, 2, 2)], "t")], "y")
    proto = net.model({"x": ["batch", 3, 4, 4]}, {"y": ["batch", 2, 5, 5]})
    made, notes = convert(proto, BF16, statistics={})
    assert precisions(made) == {"node_t": "fp32", "node_y": "bf16"}
    assert notes[0] == ("BF16: 1 of 2 operators on FP32 values; FP32 stay 1 that TensorRT does not build in BF16")
    assert set(precisions(convert(proto, FP16, statistics={})[0]).values()) == {"fp16"}


# --- every operator -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the suite's own cases
def test_every_case_of_the_onnx_backend_suite_stays_valid_in_half_and_close_to_fp32() -> None:
    """Or is declined as a whole. BF16 is only checked: ONNX Runtime has no kernels for it on a CPU."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
    try:
        import onnx_backend_suite  # type: ignore[import-not-found]
    finally:
        sys.path.pop(0)
    compared, valid, problems = 0, {FP16: 0, BF16: 0}, []
    for number, case in enumerate(onnx_backend_suite.load_cases()):
        proto, feeds = case.model, {name: value for name, value in case.inputs.items() if value is not None}
        if not any(value.type.tensor_type.elem_type == TensorProto.FLOAT for value in proto.graph.input):
            continue
        for to in (FP16, BF16) if number % 4 == 0 else (FP16,):
            try:
                made, _ = convert(proto, to, statistics={})
            except CalibrationError:
                continue
            except Exception as exc:
                problems.append(f"{case.name} {to}: {exc}")
                continue
            valid[to] += 1
            # The raw scores of Attention, mask included: ONNX Runtime's own lowest value shows in them.
            if to is BF16 or "qk_matmul_bias" in case.name:
                continue
            try:
                expected = run(proto, feeds)
            except Exception:
                continue  # nothing to compare with
            compared += 1
            if not all(close(a, b) for a, b in zip(expected, run(made, feeds), strict=True)):
                problems.append(f"{case.name}: differs")
    assert not problems, "\n".join(problems)
    assert valid[FP16] > 1000 and valid[BF16] > 200 and compared > 900


def close(expected: Array, got: Array) -> bool:
    """Within 2 % of the largest finite value."""
    if not isinstance(expected, np.ndarray) or expected.dtype.kind != "f":
        return bool(np.array_equal(expected, got))
    peak = np.abs(expected[np.isfinite(expected)]).max(initial=1e-3)
    return got.shape == expected.shape and np.allclose(got, expected, rtol=0.02, atol=0.02 * peak, equal_nan=True)

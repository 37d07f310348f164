"""Each pass on graphs small enough to know the answer: what it changes, what it leaves alone, and that values stay."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime
import pytest
from numpy.typing import NDArray

from compiler.optimize import PASSES, edit
from compiler.optimize.contract import MAX_REPEATS, Pass, apply
from compiler.optimize.driver import interface_of, limit_bytes_for, run_passes
from tests.quantize import networks

BY_NAME = {step.name: step for step in PASSES}


def parse(text: str, *, opset: int = 20, ir_version: int = 10) -> ir.Model:
    """A model from onnx's text form of a graph, local functions after it."""
    header = f'<ir_version: {ir_version}, opset_import: ["": {opset}, "f": 1]>'
    model = onnx.parser.parse_model(f"{header} {text}")
    onnx.checker.check_model(model)
    return ir.from_proto(model)


def run(model: ir.Model, seed: int = 0) -> list[NDArray[Any]]:
    """Outputs of the model for random inputs; axes without a size get 3."""
    rng = np.random.default_rng(seed)
    feeds = {}
    for value in model.graph.inputs:
        shape = [dim if isinstance(dim, int) else 3 for dim in value.shape or ()]
        if value.name not in model.graph.initializers and value.dtype is not None:
            feeds[value.name] = (rng.normal(size=shape) * 2).astype(value.dtype.numpy())
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), options)
    return [np.asarray(output) for output in session.run(None, feeds)]


def after(name: str, text: str, *, opset: int = 20, ir_version: int = 10) -> list[str]:
    """The operators that are left after one pass, which must keep values, interface and validity."""
    model = parse(text, opset=opset, ir_version=ir_version)
    before, interface, expected = ir.to_proto(model).SerializeToString(), interface_of(model), run(model)
    changes = apply(BY_NAME[name], model, limit_bytes_for(model))
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto)
    assert bool(changes) == (proto.SerializeToString() != before)
    assert apply(BY_NAME[name], model, limit_bytes_for(model)) == 0
    assert interface_of(model) == interface
    for old, new in zip(expected, run(model), strict=True):
        np.testing.assert_allclose(new, old, rtol=1e-5, atol=1e-6)
        assert new.dtype == old.dtype
    return [node.op_type for node in model.graph.all_nodes()]


FLOAT = "g (float[N, 4] x) => (float[N, 4] y)"

IDENTITIES = {
    "Identity": "t = Identity(x) y = Neg(t)",
    "inference Dropout": "t = Dropout(x) y = Neg(t)",
    "Cast to its own dtype": "t = Cast<to=1>(x) y = Neg(t)",
    "identity Transpose": "t = Transpose<perm=[0, 1]>(x) y = Neg(t)",
    "Reshape that copies": "s = Constant<value=int64[2] {0, 4}>() t = Reshape(x, s) y = Neg(t)",
    "Reshape to what is left": "s = Constant<value=int64[2] {-1, 4}>() t = Reshape(x, s) y = Neg(t)",
    "Expand by ones": "s = Constant<value=int64[1] {1}>() t = Expand(x, s) y = Neg(t)",
    "Flatten of a matrix": "t = Flatten<axis=1>(x) y = Neg(t)",
    "Tile once": "s = Constant<value=int64[2] {1, 1}>() t = Tile(x, s) y = Neg(t)",
    "Pad by nothing": "s = Constant<value=int64[4] {0, 0, 0, 0}>() t = Pad(x, s) y = Neg(t)",
    "Slice of all": (
        "a = Constant<value=int64[1] {0}>() b = Constant<value=int64[1] {9223372036854775807}>() "
        "c = Constant<value=int64[1] {1}>() t = Slice(x, a, b, c, c) y = Neg(t)"
    ),
    "Concat of one": "t = Concat<axis=0>(x) y = Neg(t)",
    "Sum of one": "t = Sum(x) y = Neg(t)",
    "times 1": "c = Constant<value=float {1.0}>() t = Mul(c, x) y = Neg(t)",
    "divided by 1": "c = Constant<value=float[1] {1.0}>() t = Div(x, c) y = Neg(t)",
    "minus 0": "c = Constant<value=float {0.0}>() t = Sub(x, c) y = Neg(t)",
    "plus -0": "c = Constant<value=float {-0.0}>() t = Add(x, c) y = Neg(t)",
    "in front of the output": "t = Neg(x) y = Identity(t)",
}


@pytest.mark.parametrize("body", IDENTITIES.values(), ids=IDENTITIES.keys())
def test_what_hands_on_its_input_is_removed(body: str) -> None:
    assert [op for op in after("remove_identities", f"{FLOAT} {{ {body} }}") if op != "Constant"] == ["Neg"]


NO_IDENTITIES = {
    "between input and output": "y = Identity(x)",
    "plus +0, which turns -0.0 into 0.0": "c = Constant<value=float {0.0}>() y = Add(x, c)",
    "1 divided by": "c = Constant<value=float {1.0}>() t = Div(c, x) y = Neg(t)",
    "Reshape that swaps": "s = Constant<value=int64[2] {4, -1}>() t = Reshape(x, s) y = Transpose(t)",
    "Slice from 1": "t = Slice(x, one, most, one) u = Neg(t) y = Pad(u, pads)",
    "times 1 of a higher rank": "c = Constant<value=float[1, 1, 1] {1.0}>() t = Mul(c, x) s = Constant<value=int64[1] {0}>() y = Squeeze(t, s)",
    "Expand to more": "s = Constant<value=int64[3] {2, 1, 1}>() t = Expand(x, s) a = Constant<value=int64[1] {0}>() y = ReduceMax<keepdims=0>(t, a)",
}


@pytest.mark.parametrize("body", NO_IDENTITIES.values(), ids=NO_IDENTITIES.keys())
def test_what_only_looks_like_it_stays(body: str) -> None:
    weights = "<int64[1] one = {1}, int64[1] most = {9223372036854775807}, int64[4] pads = {0, 0, 1, 0}>"
    text = f"g (float[N, 4] x) => (float[A, B] y) {weights} {{ {body} }}"
    assert after("remove_identities", text) == [node.op_type for node in parse(text).graph]


def test_training_dropout_stays() -> None:
    text = f"{FLOAT} {{ r = Constant<value=float {{0.5}}>() t = Constant<value=bool {{1}}>() y = Dropout(x, r, t) }}"
    model = parse(text)
    assert apply(BY_NAME["remove_identities"], model, 0) == 0
    assert edit.is_random(model.graph[-1], 20)


OLD = {
    "Pad of opset 2": (10, "t = Pad<pads=[0, 0, 0, 0]>(x) y = Neg(t)", 1),
    "Pad of opset 2 that pads": (10, "t = Pad<pads=[0, 0, 1, 0]>(x) y = Neg(t)", 2),
    "Dropout of opset 6 that infers": (6, "t = Dropout<is_test=1>(x) y = Neg(t)", 1),
    "Dropout of opset 6 that trains": (6, "t = Dropout(x) y = Neg(t)", 2),
    "Slice of opset 1": (9, "t = Slice<starts=[0], ends=[9223372036854775807]>(x) y = Neg(t)", 2),
    "Reshape of opset 1": (4, "t = Reshape<shape=[0, 4]>(x) y = Neg(t)", 2),
    "Add of opset 6, which broadcasts in its own way": (6, "t = Add<broadcast=1>(x, zero) y = Neg(t)", 2),
}


@pytest.mark.parametrize(("opset", "body", "left"), OLD.values(), ids=OLD.keys())
def test_operators_are_read_as_their_opset_means_them(opset: int, body: str, left: int) -> None:
    model = parse(f"g (float[N, 4] x) => (float[M, 4] y) <float[1] zero = {{-0.0}}> {{ {body} }}", opset=opset)
    apply(BY_NAME["remove_identities"], model, 0)
    assert len(model.graph) == left


def test_unsqueeze_of_opset_1_keeps_its_axes_an_attribute() -> None:
    text = "g (float[4] x) => (float[1, 4, 1] y) { t = Unsqueeze<axes=[0]>(x) y = Unsqueeze<axes=[2]>(t) }"
    model = parse(text, opset=11)
    after("merge_reshapes", text, opset=11)
    run_passes(PASSES, model, 0)
    assert [list(node.attributes["axes"].as_ints()) for node in model.graph] == [[0, 2]]


def test_a_transpose_without_perm_reverses() -> None:
    text = "g (float[2, 3, 4] x) => (float[A, B, C] y) { t = Transpose(x) y = Transpose<perm=[0, 2, 1]>(t) }"
    model = parse(text)
    before = run(model)
    run_passes(PASSES, model, 0)
    assert [list(node.attributes["perm"].as_ints()) for node in model.graph] == [[2, 0, 1]]
    np.testing.assert_array_equal(run(model)[0], before[0])


def test_a_dropout_whose_mask_is_used_stays() -> None:
    text = "g (float[N, 4] x) => (float[N, 4] y, bool[N, 4] m) { y, m = Dropout(x) }"
    assert after("remove_identities", text) == ["Dropout"]


CONSTANTS = {
    "arithmetic": (
        "a = Constant<value=float[4] {1.0, 2.0, 3.0, 4.0}>() b = Sqrt(a) c = Mul(b, b) y = Add(x, c)",
        ["Add"],
    ),
    "shapes of weights": (
        "a = Constant<value=int64[2] {4, 4}>() b = ConstantOfShape<value=float[1] {2.0}>(a) t = MatMul(x, b) y = Neg(t)",
        ["MatMul", "Neg"],
    ),
    "two outputs": (
        "a, b = Split<axis=-1>(k, n) c = Concat<axis=0>(b, a) y = Add(x, c)",
        ["Add"],
    ),
    "integers towards zero": (
        "a = Constant<value=int64[1] {-7}>() b = Constant<value=int64[1] {2}>() c = Div(a, b) d = Cast<to=1>(c) y = Add(x, d)",
        ["Add"],
    ),
}


CONSTANTS |= {
    "a product": ("a = MatMul(k, k) y = Add(x, a)", ["Add"]),
    "picked elements": (
        "a = GatherElements(k, n3) b = Concat<axis=0>(k, a) c, d = Split(b, n43) y = Add(x, c)",
        ["Add"],
    ),
    "picked by places": ("a = GatherND(k, n2x1) b = ReduceSum<keepdims=0>(a) y = Add(x, b)", ["Add"]),
    "constants as attributes": (
        "a = Constant<value_float=2.0>() b = Constant<value_ints=[1, 4]>() c = Expand(a, b) y = Add(x, c)",
        ["Add"],
    ),
    "a fill": ("a = Constant<value_ints=[4]>() b = ConstantOfShape<value=float[1] {3.0}>(a) y = Add(x, b)", ["Add"]),
    "a dtype by example": ("a = Constant<value_int=3>() b = CastLike(a, k) y = Add(x, b)", ["Add"]),
}


@pytest.mark.parametrize(("body", "left"), CONSTANTS.values(), ids=CONSTANTS.keys())
def test_constants_are_computed(body: str, left: list[str]) -> None:
    weights = (
        "<float[4] k = {1.0, 2.0, 3.0, 4.0}, int64[2] n = {1, 3}, int64[3] n3 = {3, 0, -1}, int64[2] n43 = {4, 3}, "
        "int64[2, 1] n2x1 = {2, 0}>"
    )
    assert after("fold_constants", f"{FLOAT} {weights} {{ {body} }}") == left


NOT_COMPUTED = {
    "a cast beyond the range of the integer": "a = Constant<value=float[4] {1e20, 1.0, 2.0, 3.0}>() c = Cast<to=7>(a) d = Cast<to=1>(c)",
    "a division by zero": "a = Constant<value=int64[4] {1, 2, 3, 0}>() c = Div(a, a) d = Cast<to=1>(c)",
    "a cast to float8": "a = Constant<value=float[4] {1.0, 2.0, 3.0, 4.0}>() c = Cast<to=17>(a) d = Cast<to=1>(c)",
    "a double that float16 rounds": "a = Constant<value=double[4] {0.1, 0.2, 0.3, 0.4}>() c = Cast<to=10>(a) d = Cast<to=1>(c)",
    "random numbers": "c = RandomNormal<shape=[4]>() d = Mul(c, c)",
    "a quantised weight": (
        "a = Constant<value=int8[4] {1, 2, 3, 4}>() s = Constant<value=float {0.5}>() d = DequantizeLinear(a, s)"
    ),
}


@pytest.mark.parametrize("body", NOT_COMPUTED.values(), ids=NOT_COMPUTED.keys())
def test_what_runtimes_compute_differently_is_left_to_them(body: str) -> None:
    model = parse(f"{FLOAT} {{ {body} y = Add(x, d) }}")
    kept = [node.op_type for node in model.graph if node.op_type != "Constant"]
    apply(BY_NAME["fold_constants"], model, limit_bytes_for(model))
    assert [node.op_type for node in model.graph] == kept


@pytest.mark.parametrize(("head", "folded"), [("transpose", False), ("none", False), ("untied", True)])
def test_a_table_that_a_head_is_tied_to_is_not_stored_twice(head: str, folded: bool) -> None:
    proto = networks.embedding(rows=9000, head="transpose" if head == "untied" else head)  # 1.15 MB
    if head == "untied":
        table = next(weight for weight in proto.graph.initializer if weight.name == "table")
        other = onnx.TensorProto()
        other.CopyFrom(table)
        other.name = "other"
        proto.graph.initializer.append(other)
        next(node for node in proto.graph.node if node.op_type == "Transpose").input[0] = "other"
    model = ir.from_proto(proto)
    before = edit.weights_bytes(model)
    apply(BY_NAME["fold_constants"], model, limit_bytes_for(model))
    assert edit.weights_bytes(model) == before
    kept = [node.op_type for node in model.graph].count("Transpose")
    assert kept == (0 if folded or head == "none" else 1)


def test_nan_is_not_computed_with() -> None:
    model = parse(
        f"{FLOAT} {{ d = Max(w, w) y = Add(x, d) }}".replace("{ d", "<float[4] w = {0.0, 1.0, 2.0, 3.0}> { d", 1)
    )
    weight = model.graph.initializers["w"]
    weight.const_value = ir.tensor(np.array([np.nan, 1, 2, 3], np.float32), name="w")
    assert apply(BY_NAME["fold_constants"], model, limit_bytes_for(model)) == 0


def test_a_weight_that_a_caller_may_replace_is_no_constant() -> None:
    text = "g (float[N, 4] x, float[4] w = {1.0, 2.0, 3.0, 4.0}) => (float[N, 4] y) { a = Neg(w) y = Add(x, a) }"
    assert after("fold_constants", text) == ["Neg", "Add"]


def test_up_to_ir_version_3_constants_stay_nodes() -> None:
    text = f"{FLOAT} {{ a = Constant<value=float[4] {{1.0, 2.0, 3.0, 4.0}}>() b = Neg(a) y = Add(x, b) }}"
    assert after("fold_constants", text, opset=8, ir_version=3) == ["Constant", "Constant", "Add"]


def test_a_constant_output_stays_the_output_of_a_node() -> None:
    text = "g (float[N, 4] x) => (float[N, 4] y, float[2] z) { a = Constant<value=float[2] {1.0, 2.0}>() z = Neg(a) y = Neg(x) }"
    assert sorted(after("fold_constants", text)) == ["Identity", "Neg"]


def test_constants_in_a_branch_are_computed_there() -> None:
    branch = "(float[N, 4] {0}) {{ a{0} = Constant<value=float[4] {{1.0, 2.0, 3.0, 4.0}}>() b{0} = Neg(a{0}) {0} = Add(x, b{0}) }}"
    body = f"y = If(c) <then_branch = g1 () => {branch.format('t')}, else_branch = g2 () => {branch.format('e')}>"
    text = f"{FLOAT} {{ k = Constant<value=float {{1.0}}>() c = Cast<to=9>(k) {body} }}"
    assert after("fold_constants", text) == ["If", "Add", "Add"]


SHAPES = {
    "a fixed size": (
        "s = Shape(x) n = Gather<axis=0>(s, one) f = Cast<to=1>(n) y = Mul(x, f)",
        ["Shape", "Cast", "Mul"],
    ),
    "a target that copies": (
        "s = Shape<start=0, end=1>(x) t = Concat<axis=0>(s, four) y = Reshape<allowzero=1>(x, t)",
        ["Shape", "Concat", "Reshape"],
    ),
    "an Expand to its own shape": ("s = Shape(x) n = Neg(x) t = Expand(n, s) y = Neg(t)", ["Shape", "Neg", "Neg"]),
}


@pytest.mark.parametrize(("body", "left"), SHAPES.values(), ids=SHAPES.keys())
def test_what_shapes_say_becomes_constant(body: str, left: list[str]) -> None:
    model = parse(f"{FLOAT} <int64 one = {{1}}, int64[1] four = {{4}}> {{ {body} }}")
    before = run(model)
    run_passes([BY_NAME["infer_shapes"], BY_NAME["fold_shapes"]], model, 0)
    assert [node.op_type for node in model.graph] == left
    np.testing.assert_array_equal(run(model)[0], before[0])


ARITHMETIC = {
    "Size": ("s = Size(x) t = Cast<to=7>(s)", 12),
    "Gather and Mul": ("a = Shape(x) b = Gather(a, i0) c = Gather(a, i1) t = Mul(b, c)", 12),
    "Slice and Squeeze": ("a = Shape(x) b = Slice(a, v1, v2) t = Squeeze(b, v0)", 4),
    "Slice with a step": ("a = Shape(x) b = Slice(a, v0, v2, v0, v2) t = Squeeze(b)", 3),
    "Unsqueeze and Concat": (
        "a = Shape(x) b = Gather(a, i1) c = Unsqueeze(b, v0) d = Concat<axis=0>(c, v2) t = Gather(d, i1)",
        2,
    ),
    "Sub, Add, Div": ("a = Shape<start=-1>(x) b = Sub(v1, a) c = Add(b, v1) d = Div(c, v2) t = Squeeze(d)", -1),
    "Cast there and back": ("a = Shape<end=1>(x) b = Cast<to=6>(a) c = Cast<to=7>(b) t = Squeeze(c)", 3),
}


@pytest.mark.parametrize(("body", "value"), ARITHMETIC.values(), ids=ARITHMETIC.keys())
def test_arithmetic_on_sizes_is_followed(body: str, value: int) -> None:
    """x is [3, 4]; the last number is 0 - 4 + ..., worked out by hand; integers divide towards zero."""
    weights = "<int64 i0 = {0}, int64 i1 = {1}, int64[1] v0 = {0}, int64[1] v1 = {1}, int64[1] v2 = {2}>"
    model = parse(f"g (float[3, 4] x) => (int64 y) {weights} {{ {body} y = Neg(t) }}")
    run_passes([BY_NAME["infer_shapes"], BY_NAME["fold_shapes"]], model, 0)
    assert [node.op_type for node in model.graph] == ["Neg"]
    assert edit.constant_ints(model.graph[0].inputs[0]) == [value]
    assert run(model)[0] == -value


@pytest.mark.parametrize(
    ("body", "left"),
    [
        ("a = Shape(x) t = Gather(a, far)", ["Gather"]),
        ("a = Shape<start=1>(x) b = Div(a, v0) t = Squeeze(b)", ["Div", "Squeeze"]),
        ("a = Shape(z) t = Gather(a, i0)", ["Shape", "Gather"]),
    ],
)
def test_sizes_that_are_not_known_or_make_no_sense_stay(body: str, left: list[str]) -> None:
    weights = "<int64 i0 = {0}, int64 far = {7}, int64[1] v0 = {0}>"
    model = parse(f"g (float[3, 4] x, float[N, 4] z) => (int64 y) {weights} {{ {body} y = Neg(t) }}")
    apply(BY_NAME["fold_shapes"], model, 0)
    assert [node.op_type for node in model.graph] == [*left, "Neg"]


def test_the_target_of_a_reshape_is_settled_with_zeros_and_the_rest_worked_out() -> None:
    """[batch, tokens, 64] to [batch, tokens, -1, 16]: the -1 is 4, the others are copied."""
    model = parse(
        "g (float[B, T, 64] x) => (float[B, T, C, 16] y) { b = Shape<start=0, end=1>(x) t = Shape<start=1, end=2>(x) "
        "r = Constant<value=int64[2] {-1, 16}>() s = Concat<axis=0>(b, t, r) y = Reshape<allowzero=1>(x, s) }"
    )
    before = run(model)
    assert apply(BY_NAME["fold_shapes"], model, 0) > 0
    reshape = model.graph[-1]
    assert edit.constant_ints(reshape.inputs[1]) == [0, 0, 4, 16] and "allowzero" not in reshape.attributes
    np.testing.assert_array_equal(run(model)[0], before[0])


def test_a_rest_beside_a_copied_axis_is_not_guessed() -> None:
    """With a batch of 0, [0, -1] has no answer where the original has one."""
    text = (
        "g (float[B, T, U] x) => (float[B, V] y) { b = Shape<start=0, end=1>(x) t = Shape<start=1, end=2>(x) "
        "u = Shape<start=2, end=3>(x) v = Mul(t, u) s = Concat<axis=0>(b, v) y = Reshape<allowzero=1>(x, s) }"
    )
    assert "Concat" in after("fold_shapes", text)


CASTS = [
    (1, 11, 10, 1),  # float32 -> float64 -> float16: one
    (1, 10, 1, 2),  # through float16: a rounding
    (11, 1, 10, 2),  # float64 -> float32 -> float16 rounds twice
    (7, 6, 7, 2),  # int64 -> int32 wraps
    (6, 7, 1, 1),  # int32 -> int64 -> float32
    (6, 7, 10, 2),  # on the way to float16 runtimes differ
    (9, 1, 7, 1),  # bool through anything
    (1, 7, 1, 2),  # truncation
    (16, 1, 11, 1),  # bfloat16 -> float32 -> float64
    (10, 16, 1, 2),  # float16 has more digits than bfloat16
]


@pytest.mark.parametrize(("source", "middle", "target", "left"), CASTS)
def test_a_cast_in_the_middle_goes_only_where_it_loses_nothing(
    source: int, middle: int, target: int, left: int
) -> None:
    types = {1: "float", 6: "int32", 7: "int64", 9: "bool", 10: "float16", 11: "double", 16: "bfloat16"}
    model = parse(
        f"g ({types[source]}[4] x) => ({types[target]}[4] y) {{ t = Cast<to={middle}>(x) y = Cast<to={target}>(t) }}"
    )
    run_passes([BY_NAME["merge_casts"], BY_NAME["remove_dead"]], model, 0)
    assert len(model.graph) == left


def test_cast_like_gets_its_dtype() -> None:
    text = "g (int64[4] x, float[N] z) => (float[4] y, float[N] w) { y = CastLike(x, z) w = Neg(z) }"
    assert after("merge_casts", text) == ["Cast", "Neg"]


def test_cast_like_to_float8_stays_for_it_saturates() -> None:
    text = "g (float[4] x, float8e4m3fn[4] z) => (float8e4m3fn[4] y) { y = CastLike<saturate=0>(x, z) }"
    model = parse(text)
    assert apply(BY_NAME["merge_casts"], model, 0) == 0


def test_two_transposes_are_one_in_the_right_order() -> None:
    text = "g (float[2, 3, 4] x) => (float[A, B, C] y) { t = Transpose<perm=[1, 2, 0]>(x) y = Transpose<perm=[0, 2, 1]>(t) }"
    model = parse(text)
    assert after("merge_transposes", text) == ["Transpose", "Transpose"]
    run_passes(PASSES, model, 0)
    assert [list(node.attributes["perm"].as_ints()) for node in model.graph] == [[1, 0, 2]]


REGROUPED = {
    "Reshape of Reshape": (
        "a = Constant<value=int64[1] {-1}>() t = Reshape(x, a) b = Constant<value=int64[2] {-1, 2}>() u = Reshape(t, b)",
        ["Reshape"],
    ),
    "Reshape of Flatten": ("t = Flatten(x) b = Constant<value=int64[2] {-1, 2}>() u = Reshape(t, b)", ["Reshape"]),
    "Unsqueeze of Unsqueeze": (
        "a = Constant<value=int64[1] {1}>() t = Unsqueeze(x, a) b = Constant<value=int64[2] {0, 2}>() u = Unsqueeze(t, b)",
        ["Unsqueeze"],
    ),
    "Squeeze of Unsqueeze": ("a = Constant<value=int64[1] {1}>() t = Unsqueeze(x, a) u = Squeeze(t, a)", []),
    "a Reshape that copies": (
        "a = Constant<value=int64[2] {4, -1}>() t = Reshape(x, a) b = Constant<value=int64[2] {0, -1}>() u = Reshape(t, b)",
        ["Reshape", "Reshape"],
    ),
}


@pytest.mark.parametrize(("body", "left"), REGROUPED.values(), ids=REGROUPED.keys())
def test_regrouping_twice_is_regrouping_once(body: str, left: list[str]) -> None:
    text = f"g (float[N, 4] x) => (float y) {{ {body} v = ReduceSum<keepdims=0>(u) w = Abs(v) y = Neg(w) }}"
    model = parse(text)
    before = run(model)
    after("merge_reshapes", text)
    run_passes([BY_NAME["merge_reshapes"], BY_NAME["remove_dead"]], model, 0)
    assert [n.op_type for n in model.graph if n.op_type != "Constant"] == [*left, "ReduceSum", "Abs", "Neg"]
    np.testing.assert_allclose(run(model)[0], before[0], rtol=1e-5)


@pytest.mark.parametrize(
    ("first", "second", "left"),
    [
        ("LeakyRelu<alpha=0.5>(x)", "LeakyRelu<alpha=0.5>(x)", 1),
        ("LeakyRelu<alpha=0.5>(x)", "LeakyRelu<alpha=0.25>(x)", 2),
        ("LeakyRelu<alpha=0.0>(x)", "LeakyRelu<alpha=-0.0>(x)", 2),
        ("Bernoulli(x)", "Bernoulli(x)", 2),
        ("RandomNormalLike(x)", "RandomNormalLike(x)", 2),
        ("Sub(x, z)", "Sub(z, x)", 2),
    ],
)
def test_the_same_twice_is_computed_once(first: str, second: str, left: int) -> None:
    model = parse(f"g (float[N, 4] x, float[N, 4] z) => (float[N, 4] y) {{ a = {first} b = {second} y = Add(a, b) }}")
    apply(BY_NAME["merge_duplicates"], model, 0)
    assert len(model.graph) == left + 1


@pytest.mark.parametrize(("numbers", "left"), [("{0.0}", 2), ("{-0.0}", 3)])
def test_constant_nodes_are_compared_bit_for_bit(numbers: str, left: int) -> None:
    body = (
        f"a = Constant<value=float[1] {{0.0}}>() b = Constant<value=float[1] {numbers}>() c = Add(a, b) y = Add(x, c)"
    )
    model = parse(f"{FLOAT} {{ {body} }}", ir_version=3, opset=8)
    apply(BY_NAME["merge_duplicates"], model, 0)
    assert len(model.graph) == left + 1


def test_two_outputs_that_are_the_same_keep_both_names() -> None:
    text = "g (float[N, 4] x) => (float[N, 4] y, float[M, 4] z) { y = Neg(x) z = Neg(x) }"
    assert after("merge_duplicates", text) == ["Neg", "Neg"]


def test_weights_stored_twice_are_stored_once_but_zero_is_not_minus_zero() -> None:
    text = (
        f"{FLOAT} <float[1] a = {{0.0}}, float[1] b = {{0.0}}, float[1] c = {{-0.0}}, float d = {{0.0}}> "
        "{ p = Add(x, a) q = Add(p, b) r = Add(q, c) y = Add(r, d) }"
    )
    model = parse(text)
    apply(BY_NAME["merge_duplicates"], model, 0)
    assert list(model.graph.initializers) == ["a", "c", "d"]


def test_what_no_output_needs_is_removed_with_what_only_it_used() -> None:
    text = f"{FLOAT} <float[4] w = {{1.0, 2.0, 3.0, 4.0}}> {{ a = Mul(x, w) b = Exp(a) y = Neg(x) }}"
    model = parse(text)
    after("remove_dead", text)
    apply(BY_NAME["remove_dead"], model, 0)
    assert len(model.graph) == 1 and not model.graph.initializers


def test_what_only_a_removed_branch_used_is_removed_too() -> None:
    branch = "(float[N, 4] {0}) {{ {0} = Neg(a) }}"
    dead = f"d = If(c) <then_branch = g1 () => {branch.format('t')}, else_branch = g2 () => {branch.format('e')}>"
    text = f"{FLOAT} {{ k = Constant<value=float {{1.0}}>() c = Cast<to=9>(k) a = Exp(x) {dead} y = Neg(x) }}"
    assert after("remove_dead", text) == ["Neg"]


def test_an_input_that_nothing_uses_stays_an_input() -> None:
    model = parse("g (float[N, 4] x, float[3] unused) => (float[N, 4] y) { y = Neg(x) }")
    run_passes(PASSES, model, 0)
    assert [value.name for value in model.graph.inputs] == ["x", "unused"]


def test_indices_of_a_pooling_that_nobody_wants_are_dropped() -> None:
    model = parse("g (float[1, 1, 4, 4] x) => (float[1, 1, 3, 3] y) { y, i = MaxPool<kernel_shape=[2, 2]>(x) }")
    assert apply(BY_NAME["remove_dead"], model, 0) == 1
    assert len(model.graph[0].outputs) == 1


def test_local_functions_are_inlined_and_forgotten() -> None:
    text = (
        "g (float[N, 4] x) => (float[N, 4] y) { t = f.twice<k=1.0>(x) y = f.twice(t) } "
        '<domain: "f", opset_import: ["": 20]> twice<k: float = 2.0>(a) => (c) { b = LeakyRelu<alpha: float = @k>(a) c = Add(a, b) }'
    )
    assert after("inline_functions", text) == ["LeakyRelu", "Add"] * 2


def test_functions_that_nothing_calls_are_forgotten() -> None:
    model = parse(
        "g (float[N, 4] x) => (float[N, 4] y) { y = f.used(x) } "
        '<domain: "f", opset_import: ["": 20, "f": 1]> used(a) => (b) { b = f.inner(a) } '
        '<domain: "f", opset_import: ["": 20]> inner(a) => (b) { b = Neg(a) } '
        '<domain: "f", opset_import: ["": 20]> unused(a) => (b) { b = Exp(a) }'
    )
    assert apply(BY_NAME["remove_dead"], model, 0) == 1
    assert [name for _, name, _ in model.functions] == ["used", "inner"]
    run_passes(PASSES, model, 0)
    assert not model.functions and "f" not in model.opset_imports and [n.op_type for n in model.graph] == ["Neg"]


def test_a_function_of_another_opset_is_not_inlined() -> None:
    text = (
        "g (float[N, 4] x) => (float[N, 4] y) { y = f.twice(x) } "
        '<domain: "f", opset_import: ["": 19]> twice(a) => (c) { c = Add(a, a) }'
    )
    assert after("inline_functions", text) == ["twice"]


def test_shapes_are_noted_between_input_and_output() -> None:
    model = parse(f"{FLOAT} {{ a = Transpose(x) b = MatMul(x, a) y = MatMul(b, x) }}")
    apply(BY_NAME["infer_shapes"], model, 0)
    assert [edit.dims(node.outputs[0]) for node in model.graph][:2] == [(4, "N"), ("N", "N")]
    assert model.graph[0].outputs[0].dtype == ir.DataType.FLOAT


# --- weights --------------------------------------------------------------------------------------------------------


def _weights(**shapes: tuple[int, ...]) -> str:
    """Initialisers in onnx's text form, random between 0.2 and 3."""
    rng = np.random.default_rng(5)
    texts = []
    for name, shape in shapes.items():
        numbers = ", ".join(f"{number:.6f}" for number in rng.uniform(0.2, 3, shape).reshape(-1))
        texts.append(f"float[{', '.join(map(str, shape))}] {name} = {{{numbers}}}")
    return f"<{', '.join(texts)}>"


def _batch_norm_after(node: str, weight: tuple[int, ...], channels: int, *, shape: str = "1, 2, 5, 5") -> ir.Model:
    weights = _weights(w=weight, c=(channels,), s=(channels,), b=(channels,), m=(channels,), v=(channels,))
    return parse(
        f"g (float[{shape}] x) => (float y) {weights} {{ t = {node} "
        "u = BatchNormalization<epsilon=0.1>(t, s, b, m, v) z = ReduceSum<keepdims=0>(u) y = Neg(z) }",
        opset=15,
    )


FOLDED = {
    "Conv": _batch_norm_after("Conv(x, w, c)", (4, 2, 3, 3), 4),
    "Conv without bias": _batch_norm_after("Conv(x, w)", (4, 2, 3, 3), 4),
    "grouped Conv": _batch_norm_after("Conv<group=2>(x, w, c)", (4, 1, 3, 3), 4),
    "padded Conv": _batch_norm_after("Conv<pads=[1, 1, 1, 1]>(x, w, c)", (4, 2, 3, 3), 4),
    "ConvTranspose": _batch_norm_after("ConvTranspose(x, w, c)", (2, 3, 2, 2), 3),
    "Gemm": _batch_norm_after("Gemm(x, w, c)", (5, 4), 4, shape="3, 5"),
    "scaled Gemm": _batch_norm_after("Gemm<alpha=0.5, beta=3.0>(x, w, c)", (5, 4), 4, shape="3, 5"),
    "transposed Gemm": _batch_norm_after("Gemm<transB=1>(x, w, c)", (4, 5), 4, shape="3, 5"),
}


@pytest.mark.parametrize("model", FOLDED.values(), ids=FOLDED.keys())
def test_batch_norm_is_folded_into_what_is_in_front_of_it(model: ir.Model) -> None:
    before = run(model)
    assert apply(BY_NAME["fold_batch_norm"], model, 0) == 1
    assert not [node for node in model.graph if node.op_type == "BatchNormalization"]
    np.testing.assert_allclose(run(model)[0], before[0], rtol=1e-5)


def test_folding_is_what_the_formula_says() -> None:
    """One channel, one weight 2, bias 1; scale 3, shift 5, mean 7, variance 4 - 0.25, epsilon 0.25: 3x - 4."""
    model = parse(
        "g (float[1, 1, 1] x) => (float[1, 1, 1] y) <float[1, 1, 1] w = {2.0}, float[1] c = {1.0}, float[1] s = {3.0}, "
        "float[1] b = {5.0}, float[1] m = {7.0}, float[1] v = {3.75}> "
        "{ t = Conv(x, w, c) y = BatchNormalization<epsilon=0.25>(t, s, b, m, v) }"
    )
    run_passes(PASSES, model, 0)
    conv = model.graph[0]
    weight, bias = (edit.constant_array(value) for value in conv.inputs[1:])
    assert weight is not None and bias is not None
    assert (weight.item(), bias.item()) == (3.0, (1 - 7) * 3 / 2 + 5)


def test_a_weight_that_another_node_uses_is_not_changed_for_it() -> None:
    text = (
        "g (float[1, 1, 3] x) => (float[1, 1, 3] y, float[1, 1, 3] z) <float[1, 1, 1] w = {2.0}, float[1] s = {3.0}, "
        "float[1] b = {5.0}, float[1] m = {7.0}, float[1] v = {4.0}> "
        "{ t = Conv(x, w) y = BatchNormalization(t, s, b, m, v) z = Conv(x, w) }"
    )
    assert sorted(after("fold_batch_norm", text, opset=15)) == ["Conv", "Conv"]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("t = Conv(x, w) y = BatchNormalization(t, s, b, m, v) z = Neg(t)", "the Conv is used elsewhere"),
        ("t = Conv(x, w) y = BatchNormalization(t, zero, b, m, v) z = Neg(x)", "a factor of 0 would hide NaN"),
        ("t = Conv(x, x) y = BatchNormalization(t, s, b, m, v) z = Neg(x)", "the weight is no constant"),
        ("t = Neg(x) y = BatchNormalization(t, s, b, m, v) z = Neg(x)", "there is nothing to fold into"),
        ("t = Conv(x, w) y, p, q = BatchNormalization<training_mode=1>(t, s, b, m, v) z = Neg(x)", "it trains"),
    ],
)
def test_batch_norm_stays_where_folding_would_change_something(text: str, why: str) -> None:
    model = parse(
        "g (float[1, 1, 1] x) => (float[1, 1, 1] y, float[1, 1, 1] z) <float[1, 1, 1] w = {2.0}, float[1] s = {3.0}, "
        f"float[1] zero = {{0.0}}, float[1] b = {{5.0}}, float[1] m = {{7.0}}, float[1] v = {{4.0}}> {{ {text} }}",
        opset=15,
    )
    assert apply(BY_NAME["fold_batch_norm"], model, 0) == 0, why


@pytest.mark.parametrize("body", ["u = Mul(t, k)", "u = Add(k, t)", "u = Sub(t, k)", "a = Mul(t, k) u = Add(a, k)"])
@pytest.mark.parametrize("shape", ["2, 1, 1", "1, 2, 1, 1", "1", ""])
def test_what_is_the_same_for_a_channel_is_folded(body: str, shape: str) -> None:
    size = "{3.0, -2.0}" if "2" in shape else "{3.0}"
    model = parse(
        f"g (float[1, 1, 3, 3] x) => (float[1, 2, 3, 3] y) <float[2, 1, 1, 1] w = {{2.0, 0.5}}, float[{shape}] k = {size}> "
        f"{{ t = Conv(x, w) {body} y = Relu(u) }}".replace("float[] k", "float k")
    )
    before = run(model)
    assert apply(BY_NAME["fold_affine"], model, 0) == body.count("=")
    assert [node.op_type for node in model.graph] == ["Conv", "Relu"]
    np.testing.assert_allclose(run(model)[0], before[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", ["3, 1", "3", "1, 1, 2, 1, 1"])
def test_what_differs_within_a_channel_or_adds_axes_is_not_folded(shape: str) -> None:
    numbers = ", ".join("1.0" for _ in range(3 if "3" in shape else 2))
    model = parse(
        f"g (float[1, 1, 3, 3] x) => (float y) <float[2, 1, 1, 1] w = {{2.0, 0.5}}, float[{shape}] k = {{{numbers}}}> "
        "{ t = Conv(x, w) u = Mul(t, k) y = ReduceSum<keepdims=0>(u) }"
    )
    assert apply(BY_NAME["fold_affine"], model, 0) == 0


# --- fusions --------------------------------------------------------------------------------------------------------

LAYER_NORM = (
    "g (float[N, 3, 4] x) => (float[N, 3, 4] y) <float[4] s = {{1.0, 2.0, 3.0, 4.0}}, float[4] b = {{4.0, 3.0, 2.0, 1.0}}, "
    "float e = {{0.1}}, float f = {{1.0}}, float two = {{2.0}}, int64[1] last = {{-1}}, float[3, 1] rows = {{1.0, 2.0, 3.0}}> "
    "{{ m = ReduceMean(x, last) d = Sub(x, m) {square} v = ReduceMean(q, last) w = Add(v, e) r = Sqrt(w) {divide} {scale} {bias} }}"
)


@pytest.mark.parametrize("square", ["q = Pow(d, two)", "q = Mul(d, d)"])
@pytest.mark.parametrize("divide", ["n = Div(d, r)", "i = Reciprocal(r) n = Mul(i, d)", "i = Div(f, r) n = Mul(d, i)"])
def test_a_layer_norm_is_recognised_however_it_is_written(square: str, divide: str) -> None:
    text = LAYER_NORM.format(square=square, divide=divide, scale="z = Mul(n, s)", bias="y = Add(b, z)")
    model = parse(text)
    before = run(model)
    run_passes(PASSES, model, 0)
    assert [node.op_type for node in model.graph] == ["LayerNormalization"]
    np.testing.assert_allclose(run(model)[0], before[0], rtol=1e-4, atol=1e-5)
    assert model.graph[0].attributes["epsilon"].as_float() == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("scale", "bias"),
    [("z = Mul(n, rows)", "y = Add(z, b)"), ("z = Mul(n, s)", "y = Add(z, rows)"), ("z = Mul(n, d)", "y = Add(z, b)")],
)
def test_a_scale_or_bias_of_another_shape_is_not_taken_in(scale: str, bias: str) -> None:
    text = LAYER_NORM.format(square="q = Mul(d, d)", divide="n = Div(d, r)", scale=scale, bias=bias)
    model = parse(text)
    before = run(model)
    run_passes(PASSES, model, 0)
    norms = [node for node in model.graph if node.op_type == "LayerNormalization"]
    assert len(norms) == (scale == "z = Mul(n, s)") and all(len(node.inputs) == 2 for node in norms)
    np.testing.assert_allclose(run(model)[0], before[0], rtol=1e-4, atol=1e-5)


def test_a_norm_over_another_axis_is_left_alone() -> None:
    text = LAYER_NORM.format(
        square="q = Mul(d, d)", divide="n = Div(d, r)", scale="z = Mul(n, s)", bias="y = Add(z, b)"
    )
    assert "LayerNormalization" not in after("fuse_layer_norm", text.replace("last = {-1}", "last = {1}"))


def test_there_is_no_layer_norm_below_opset_17() -> None:
    text = LAYER_NORM.format(
        square="q = Mul(d, d)", divide="n = Div(d, r)", scale="z = Mul(n, s)", bias="y = Add(z, b)"
    )
    text = text.replace("ReduceMean(x, last)", "ReduceMean<axes=[-1]>(x)").replace(
        "ReduceMean(q, last)", "ReduceMean<axes=[-1]>(q)"
    )
    assert "LayerNormalization" not in after("fuse_layer_norm", text, opset=16)
    assert "LayerNormalization" in after("fuse_layer_norm", text, opset=17)


RMS_NORM = (
    "g (float[N, 4] x) => (float[N, 4] y) <float[4] s = {1.0, 2.0, 3.0, 4.0}, float e = {0.1}, float two = {2.0}, "
    "int64[1] last = {-1}> { q = Pow(x, two) m = ReduceMean(q, last) w = Add(m, e) r = Sqrt(w) i = Reciprocal(r) "
    "n = Mul(x, i) y = Mul(s, n) }"
)


@pytest.mark.parametrize(("opset", "fused"), [(22, False), (23, True)])
def test_an_rms_norm_is_recognised_from_opset_23_on(opset: int, fused: bool) -> None:
    model = parse(RMS_NORM, opset=opset)
    before = run(model)
    run_passes(PASSES, model, 0)
    assert ([node.op_type for node in model.graph] == ["RMSNormalization"]) == fused
    np.testing.assert_allclose(run(model)[0], before[0], rtol=1e-4, atol=1e-5)


ERF = "a = Mul(x, r2) b = Erf(a) c = Add(b, one) "
TANH = "p = Pow(x, three) a = Mul(p, k) b = Add(x, a) c0 = Mul(b, s2pi) t = Tanh(c0) c = Add(one, t) "
GELUS = {
    "x * (1 + erf) * 0.5": (ERF + "d = Mul(x, c) y = Mul(d, half)", "none"),
    "0.5 * x * (1 + erf)": (ERF + "d = Mul(half, x) y = Mul(d, c)", "none"),
    "tanh": (TANH + "d = Mul(half, x) y = Mul(d, c)", "tanh"),
    "tanh with a cube of products": (
        TANH.replace("p = Pow(x, three)", "x2 = Mul(x, x) p = Mul(x2, x)") + "d = Mul(half, x) y = Mul(d, c)",
        "tanh",
    ),
    "tanh of a square": (TANH.replace("Pow(x, three)", "Pow(x, one)") + "d = Mul(half, x) y = Mul(d, c)", None),
    "half of something else": (ERF + "d = Mul(x, c) y = Mul(d, one)", None),
    "of another value": (ERF + "x2 = Neg(x) d = Mul(half, x2) y = Mul(d, c)", None),
}
GELU_WEIGHTS = (
    "<float r2 = {0.70710678}, float one = {1.0}, float half = {0.5}, float three = {3.0}, float k = {0.044715}, "
    "float s2pi = {0.79788456}>"
)


@pytest.mark.parametrize(("body", "approximate"), GELUS.values(), ids=GELUS.keys())
def test_a_gelu_is_recognised(body: str, approximate: str | None) -> None:
    text = f"{FLOAT} {GELU_WEIGHTS} {{ {body} }}"
    model = parse(text)
    before = run(model)
    run_passes(PASSES, model, 0)
    found = [node.attributes["approximate"].as_string() for node in model.graph if node.op_type == "Gelu"]
    assert found == ([approximate] if approximate else [])
    np.testing.assert_allclose(run(model)[0], before[0], rtol=1e-4, atol=1e-5)
    assert "Gelu" not in after("fuse_gelu", text, opset=19)


# --- contracts ------------------------------------------------------------------------------------------------------


def test_names_are_unique_and_no_pass_assumes_finite_values() -> None:
    assert len(BY_NAME) == len(PASSES)
    assert not [step.name for step in PASSES if step.assumes_finite]


def test_a_pass_that_never_ends_is_stopped() -> None:
    def flip(model: ir.Model, limit_bytes: int) -> int:
        return 1

    with pytest.raises(RecursionError) as caught:
        apply(Pass(name="flip", does="flips", counts="node", run=flip), parse(f"{FLOAT} {{ y = Neg(x) }}"), 0)
    assert str(caught.value) == f"pass 'flip' still finds something to change after {MAX_REPEATS} repeats"


# --- bombs ----------------------------------------------------------------------------------------------------------


_SUM = "r = ReduceSum<keepdims=0>(b) y = Add(x, r)"
_ROW = "a = Constant<value=float[1024] {" + ", ".join(["1.0"] * 1024) + "}>()"


def _range(limit: str, step: str) -> str:
    ends = f"l = Constant<value=float {{{limit}}}>() d = Constant<value=float {{{step}}}>()"
    return f"a = Constant<value=float {{0.0}}>() {ends} b = Range(a, l, d) {_SUM}"


def _stretched(op: str, *numbers: int) -> str:
    target = f"s = Constant<value=int64[{len(numbers)}] {{{', '.join(map(str, numbers))}}}>()"
    return f"a = Constant<value=float[1] {{1.0}}>() {target} b = {op} {_SUM}"


def _repeated(count: int, times: int) -> str:
    lines = [f"a{i + 1} = Concat<axis=0>({', '.join([f'a{i}'] * count)})" for i in range(times)]
    return " ".join([_ROW, "a0 = Identity(a)", *lines, f"b = Neg(a{times})", _SUM])


def _many(count: int) -> str:
    lines = [
        f"s{i} = Constant<value=int64[1] {{{250_000 + i}}}>() b{i} = ConstantOfShape(s{i}) r{i} = ReduceSum<keepdims=0>(b{i})"
        for i in range(count)
    ]
    return " ".join(lines) + f" y = Sum(x, {', '.join(f'r{i}' for i in range(count))})"


BOMBS = {
    "ConstantOfShape": _stretched("ConstantOfShape(s)", 2**31),
    "Expand": _stretched("Expand(a, s)", 100_000, 100_000),
    "Expand to less than nothing": _stretched("Expand(a, s)", -5, 3),
    "Tile": _stretched("Tile(a, s)", 10**10),
    "Range": _range("1e9", "1.0"),
    "Range of tiny steps": _range("1.0", "1e-12"),
    "Range without end": _range("1.0", "0.0"),
    "Concat doubled": _repeated(2, 21),
    "Concat of many": _repeated(30, 4),
    "outer products": (
        f"{_ROW} p = Constant<value=int64[2] {{1024, 1}}>() q = Constant<value=int64[3] {{1024, 1, 1}}>() "
        f"c = Reshape(a, p) d = Reshape(a, q) e = Mul(a, c) b = Mul(e, d) {_SUM}"
    ),
    "Gather of one row": (
        f"{_ROW} u = Constant<value=int64[1] {{0}}>() w = Unsqueeze(a, u) s = Constant<value=int64[1] {{300000}}>() "
        f"i = ConstantOfShape<value=int64[1] {{0}}>(s) b = Gather<axis=0>(w, i) {_SUM}"
    ),
    "many of a megabyte": _many(400),
}


@pytest.mark.parametrize("body", BOMBS.values(), ids=BOMBS.keys())
def test_a_bomb_does_not_go_off(body: str) -> None:
    """Small files that compute gigabytes: the pipeline ends, and what it stores and allocates stays bounded."""
    model = parse(f"{FLOAT} {{ {body} }}")
    limit = limit_bytes_for(model)
    tracemalloc.start()
    run_passes(PASSES, model, limit)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert edit.weights_bytes(model) <= limit == 64 << 20
    assert peak < 400 << 20

"""Lowering for ONNX Runtime's CPU provider: the same numbers, and the integer kernels that it is for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from compiler import onnx_files
from compiler.backends import lowering
from compiler.backends.onnxruntime import open_model
from compiler.quantize import observe, quantize
from compiler.recipe import EngineSection, QuantizeSection
from compiler.spec import Array, Dim, OnnxModel, Precision
from tests.quantize import networks
from tests.quantize.networks import Net, f32


def int8(
    folder: Path, proto: onnx.ModelProto, samples: Sequence[Mapping[str, Array]], rest: Any = "fp32", **section: Any
) -> OnnxModel:
    """The canonical INT8 form of ``proto``."""

    for name in ("observed", "int8"):
        (folder / name).mkdir(parents=True)
    model = networks.save(proto, folder / "model.onnx")
    data = networks.calibration(folder / "data", samples)
    statistics = observe(
        model,
        data,
        samples=64,
        min_samples=1,
        open_model=open_model,
        threads=1,
        out_dir=folder / "observed",
        attention="attention" in section,
    )
    return quantize(
        EngineSection(precision=Precision.INT8, rest=rest),
        QuantizeSection(min_sqnr_db=-100, split="off", method="mse", rounding="nearest", **section),
        model,
        statistics,
        data,
        open_model=open_model,
        threads=1,
        out_dir=folder / "int8",
    )


def lowered(model: OnnxModel, path: Path, change: Callable[[ir.Model], Any] = lowering.lower) -> Path:
    network = onnx_files.read(model.path)
    change(network)
    onnx_files.write(network, path)
    return path


def run(path: Path, feeds: Mapping[str, Array], *, optimize: bool = False) -> Array:
    return open_model(path, threads=1, optimize=optimize).run(feeds)["y"]


def kinds(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(path).graph.node)


def fused(path: Path) -> Counter[str]:
    """The operators that ONNX Runtime really runs."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(path.with_suffix(".optimized.onnx"))
    options.log_severity_level = 4
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return kinds(path.with_suffix(".optimized.onnx"))


def relu6() -> onnx.ModelProto:
    net = Net(4)
    bounds = [net.weight("low", f32(-0.25)), net.weight("high", f32(0.75))]
    x = net.op("Clip", [net.conv("x", "c", (4, 8)), *bounds], "clipped")
    x = net.op("Clip", [net.conv(x, "d", (8, 8)), "", bounds[1]], "capped")
    net.conv(x, "y", (8, 8))
    return net.model({"x": ["batch", 4, 8, 8]}, {"y": ["batch", 8, 8, 8]})


CASES: dict[str, tuple[onnx.ModelProto, list[dict[str, Array]]]] = {
    "convolution": (networks.convolution(), networks.normal_samples(8, 4, 8, 8)),
    "depthwise": (networks.convolution(groups=4), networks.normal_samples(8, 4, 8, 8)),
    "relu6": (relu6(), networks.normal_samples(8, 4, 8, 8)),
    "residual": (networks.residual(), networks.normal_samples(8, 3, 16, 16)),
    "transformer": (networks.transformer_block(), networks.masked_samples(8)),
    "linear": (networks.linear_map(np.random.default_rng(0).normal(size=(8, 8))), networks.normal_samples(8, 8)),
}


@pytest.fixture(params=[(name, activations) for name in CASES for activations in ("symmetric", "asymmetric")])
def case(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[OnnxModel, list[dict[str, Array]]]:
    name, activations = request.param
    proto, samples = CASES[name]
    return int8(tmp_path, proto, samples, activations=activations), samples


Case = tuple[OnnxModel, list[dict[str, Array]]]


# --- the same numbers -----------------------------------------------------------------------------------------------


def far(samples: Sequence[Mapping[str, Array]]) -> list[dict[str, Array]]:
    """The samples, and the first of them at three times its size, where much is clipped."""
    return [dict(sample) for sample in samples] + [
        {name: value * (3 if name == "x" else 1) for name, value in samples[0].items()}
    ]


def test_unsigned_activations_are_equal_to_the_bit(case: Case, tmp_path: Path) -> None:
    model, samples = case
    path = lowered(model, tmp_path / "unsigned.onnx", lowering.to_unsigned)
    for feeds in far(samples):
        assert np.array_equal(run(model.path, feeds), run(path, feeds))
    unsigned = zero_points(path)
    assert {zero_point.dtype.name for zero_point in unsigned.values()} == {"uint8"}
    signed = zero_points(model.path)
    assert {int(zero_point) for zero_point in unsigned.values()} == {128 + int(one) for one in signed.values()}


def zero_points(path: Path) -> dict[str, Array]:
    """By name of a rounded activation."""
    graph = onnx.load(path).graph
    stored = {weight.name: numpy_helper.to_array(weight) for weight in graph.initializer}
    return {node.output[0]: stored[node.input[2]] for node in graph.node if node.op_type == "QuantizeLinear"}


def test_a_zero_point_that_is_not_moved_along_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = int8(tmp_path, *CASES["residual"], activations="asymmetric")
    monkeypatch.setattr(lowering, "MIDDLE", 127)
    path = lowered(model, tmp_path / "wrong.onnx", lowering.to_unsigned)
    assert not np.array_equal(run(model.path, CASES["residual"][1][0]), run(path, CASES["residual"][1][0]))


def test_a_relu_before_a_range_that_begins_at_zero_is_gone(tmp_path: Path) -> None:
    symmetric = lowered(int8(tmp_path / "s", *CASES["residual"]), tmp_path / "s.onnx")
    model = int8(tmp_path / "a", *CASES["residual"], activations="asymmetric")
    found = kinds(lowered(model, tmp_path / "a.onnx"))
    assert kinds(symmetric)["Clip"] > 0
    assert (found["Clip"], found["Relu"]) == (0, 0)
    assert fused(tmp_path / "a.onnx")["QLinearConv"] == fused(symmetric)["QLinearConv"] > 0


def test_fused_products_are_equal_to_the_rounding_of_a_float_sum(case: Case, tmp_path: Path) -> None:
    model, samples = case
    path = lowered(model, tmp_path / "lowered.onnx")
    for feeds in far(samples):
        expected = run(model.path, feeds)
        assert np.allclose(expected, run(path, feeds), rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def test_the_runtime_s_own_fusions_stay_within_a_step(case: Case, tmp_path: Path) -> None:
    model, samples = case
    path = lowered(model, tmp_path / "lowered.onnx")
    scales = [
        float(numpy_helper.to_array(weight).max())
        for weight in onnx.load(model.path).graph.initializer
        if weight.name.endswith("_quantized_scale")
    ]
    for feeds in far(samples):
        assert np.abs(run(model.path, feeds) - run(path, feeds, optimize=True)).max() <= max(scales) * 1.001


def test_a_planted_error_in_the_bound_of_a_clip_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = int8(tmp_path, *CASES["relu6"])
    monkeypatch.setattr(lowering, "_rounded", lambda value, scale, zero: np.uint8(np.floor(value / scale) + zero + 1))
    path = lowered(model, tmp_path / "wrong.onnx", lowering.to_unsigned)
    assert not np.array_equal(run(model.path, CASES["relu6"][1][0]), run(path, CASES["relu6"][1][0]))


def test_lowering_is_done_once(case: Case, tmp_path: Path) -> None:
    network = onnx_files.read(case[0].path)
    lowering.lower(network)
    once = ir.to_proto(network).SerializeToString(deterministic=True)
    lowering.lower(network)
    assert ir.to_proto(network).SerializeToString(deterministic=True) == once


def test_inputs_and_outputs_stay(case: Case, tmp_path: Path) -> None:
    network = onnx_files.read(lowered(case[0], tmp_path / "lowered.onnx"))
    assert onnx_files.specs(network) == (case[0].inputs, case[0].outputs)


def test_a_float_model_is_left_alone(tmp_path: Path) -> None:
    model = networks.save(networks.residual(), tmp_path / "model.onnx")
    network = onnx_files.read(model.path)
    before = ir.to_proto(network).SerializeToString(deterministic=True)
    assert lowering.lower(network) == []
    assert ir.to_proto(network).SerializeToString(deterministic=True) == before


@pytest.mark.parametrize("activations", ["symmetric", "asymmetric"])
def test_attention_in_eight_bits_is_the_same_numbers(tmp_path: Path, activations: str) -> None:
    proto, samples = CASES["transformer"]
    model = int8(tmp_path, proto, samples, attention="on", activations=activations)
    path = lowered(model, tmp_path / "lowered.onnx")
    for feeds in far(samples):
        expected = run(model.path, feeds)
        for optimize in (False, True):
            assert np.allclose(expected, run(path, feeds, optimize=optimize), atol=0.02 * np.abs(expected).max())
    assert np.array_equal(
        run(model.path, samples[0]), run(lowered(model, tmp_path / "u.onnx", lowering.to_unsigned), samples[0])
    )


@pytest.mark.parametrize("rest", ["fp16", "bf16"])
@pytest.mark.parametrize("name", ["residual", "transformer"])
def test_an_int8_model_with_a_half_rest_runs(tmp_path: Path, name: str, rest: str) -> None:
    proto, samples = CASES[name]
    path = lowered(int8(tmp_path, proto, samples, rest), tmp_path / "lowered.onnx")
    expected = run(tmp_path / "model.onnx", samples[0])
    for optimize in (False, True):
        noise = np.sum((expected - run(path, samples[0], optimize=optimize)) ** 2)
        assert 10 * np.log10(np.sum(expected**2) / noise) > 28


# --- the kernels that it is for -------------------------------------------------------------------------------------


def test_a_residual_network_runs_in_integers_throughout(tmp_path: Path) -> None:
    found = fused(lowered(int8(tmp_path, *CASES["residual"]), tmp_path / "lowered.onnx"))
    assert (found["QLinearConv"], found["QLinearAdd"], found["QLinearGlobalAveragePool"]) == (5, 2, 1)
    assert (found["MatMulIntegerToFloat"], found["Clip"], found["QuantizeLinear"]) == (1, 5, 1)
    assert not found.keys() & {"Conv", "FusedConv", "Add", "Relu", "Gemm", "DequantizeLinear"}


def test_without_the_lowering_it_does_not(tmp_path: Path) -> None:
    model = int8(tmp_path, *CASES["residual"])
    found = fused(lowered(model, tmp_path / "same.onnx", lambda network: None))
    assert found["QLinearConv"] + found["QLinearAdd"] < 7
    assert found["DequantizeLinear"] > 0


def test_a_transformer_block_multiplies_in_integers(tmp_path: Path) -> None:
    path = lowered(int8(tmp_path, *CASES["transformer"]), tmp_path / "lowered.onnx")
    # q, k and v read one QuantizeLinear; the biases are inside the products.
    assert (kinds(path)["QuantizeLinear"], kinds(path)["DequantizeLinear"], kinds(path)["Add"]) == (4, 0, 3)
    assert fused(path)["MatMulIntegerToFloat"] == 6
    assert fused(path)["MatMul"] + fused(path)["FusedMatMul"] == 2


def test_clips_are_fused_into_integer_convolutions(tmp_path: Path) -> None:
    found = fused(lowered(int8(tmp_path, *CASES["relu6"]), tmp_path / "lowered.onnx"))
    assert (found["QLinearConv"], found["Clip"], found["QuantizeLinear"]) == (3, 2, 1)


# --- products that have no integer form stay as they are ------------------------------------------------------------


def gemm(tmp_path: Path, bias: Array | None, **attributes: Any) -> Path:
    net = Net()
    rows = 8 if not attributes.get("transB") else 6
    inputs = ["x", net.normal("w", rows, 14 - rows, fan_in=8)]
    inputs += [net.weight("b", bias)] if bias is not None else []
    net.op("Gemm", inputs, "y", **attributes)
    samples = networks.normal_samples(8, 8)
    rows_in: Dim = "batch"
    if attributes.get("transA"):  # of a square, so that the input is the same either way
        samples, rows_in = [{"x": sample["x"].repeat(8, 0)} for sample in samples], 8
    proto = net.model({"x": [rows_in, 8]}, {"y": [rows_in, 6]})
    model = int8(tmp_path, proto, samples)
    path = lowered(model, tmp_path / "lowered.onnx")
    assert np.allclose(run(model.path, samples[0]), run(path, samples[0]), rtol=1e-5, atol=1e-5)
    return path


@pytest.mark.parametrize("transposed", [0, 1])
@pytest.mark.parametrize("bias", [None, f32(np.arange(6))])
def test_a_gemm_becomes_an_integer_product(tmp_path: Path, transposed: int, bias: Array | None) -> None:
    assert kinds(gemm(tmp_path, bias, transB=transposed)) == {"QuantizeLinear": 1, "MatMulIntegerToFloat": 1}


@pytest.mark.parametrize(
    ("bias", "attributes"),
    [(None, {"alpha": 0.5}), (f32(np.ones(6)), {"beta": 2.0}), (f32(3), {}), (None, {"transA": 1})],
)
def test_a_gemm_that_does_more_stays_a_gemm(tmp_path: Path, bias: Array | None, attributes: dict[str, Any]) -> None:
    assert kinds(gemm(tmp_path, bias, **attributes))["Gemm"] == 1


def test_a_bias_that_is_not_a_row_is_added_apart(tmp_path: Path) -> None:
    net = Net()
    net.op("Add", [net.op("MatMul", ["x", net.normal("w", 8, 6, fan_in=8)], "p"), net.weight("b", f32([[1.0]]))], "y")
    proto = net.model({"x": ["batch", 8]}, {"y": ["batch", 6]})
    path = lowered(int8(tmp_path, proto, networks.normal_samples(8, 8)), tmp_path / "lowered.onnx")
    assert kinds(path) == {"QuantizeLinear": 1, "MatMulIntegerToFloat": 1, "Add": 1}


def test_a_product_that_is_itself_an_output_keeps_its_name_beside_the_sum(tmp_path: Path) -> None:
    net = Net()
    net.linear("x", "y", (8, 6))
    proto = net.model({"x": ["batch", 8]}, {"y": ["batch", 6], "y_product": ["batch", 6]})
    model = int8(tmp_path, proto, networks.normal_samples(8, 8))
    path = lowered(model, tmp_path / "lowered.onnx")
    feeds = networks.normal_samples(1, 8)[0]
    outputs = open_model(path).run(feeds)
    assert outputs.keys() == {"y", "y_product"}
    assert np.allclose(outputs["y_product"], open_model(model.path).run(feeds)["y_product"], atol=1e-5)


def test_weights_in_three_dimensions_stay_with_matmul(tmp_path: Path) -> None:
    net = Net()
    net.op("MatMul", ["x", net.normal("w", 2, 8, 6, fan_in=8)], "y")
    proto = net.model({"x": ["batch", 2, 3, 8]}, {"y": ["batch", 2, 3, 6]})
    samples = networks.normal_samples(8, 2, 3, 8)
    model = int8(tmp_path, proto, samples)
    path = lowered(model, tmp_path / "lowered.onnx")
    assert kinds(path)["MatMul"] == 1
    assert np.array_equal(run(model.path, samples[0]), run(path, samples[0]))


# --- BF16 -----------------------------------------------------------------------------------------------------------


def bf16_model(nodes: Sequence[onnx.NodeProto], weights: Mapping[str, Array], opset: int = 22) -> ir.Model:
    """x [N, 4] float32 -> y float32; inside, ``nodes`` from a to b in BF16."""
    stored = [
        helper.make_tensor(
            name, TensorProto.BFLOAT16, value.shape, value.astype(ml_dtypes.bfloat16).tobytes(), raw=True
        )
        for name, value in weights.items()
    ]
    first = helper.make_node("Cast", ["x"], ["a"], name="first", to=TensorProto.BFLOAT16)
    last = helper.make_node("Cast", ["b"], ["y"], name="last", to=TensorProto.FLOAT)
    graph = helper.make_graph(
        [first, *nodes, last],
        "bf16",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        stored,
    )
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10))


def emulated(model: ir.Model, feeds: Mapping[str, Array], path: Path, *, optimize: bool) -> Array:
    assert lowering.lower(model) == [
        "BF16 is emulated on this CPU (FP32 kernels, results rounded): it shows accuracy, not speed"
    ]
    onnx_files.write(model, path)
    return run(path, feeds, optimize=optimize)


def rounded(values: Array) -> Array:
    return values.astype(ml_dtypes.bfloat16).astype(np.float32)


@pytest.mark.parametrize("optimize", [False, True])
def test_every_result_is_rounded_to_bf16(tmp_path: Path, optimize: bool) -> None:
    random = np.random.default_rng(0)
    w, c, x = (random.normal(size=shape).astype(np.float32) for shape in ((4, 4), (4,), (3, 4)))
    nodes = [
        helper.make_node("MatMul", ["a", "w"], ["p"], name="p"),
        helper.make_node("Add", ["p", "c"], ["q"], name="q"),
        helper.make_node("Mul", ["q", "q"], ["r"], name="r"),
        helper.make_node("Tanh", ["r"], ["b"], name="b"),
    ]
    found = emulated(bf16_model(nodes, {"w": w, "c": c}), {"x": x}, tmp_path / "m.onnx", optimize=optimize)
    q = rounded(rounded(rounded(x) @ rounded(w)) + rounded(c))
    expected = rounded(np.tanh(rounded(q * q)))
    assert np.array_equal(found, expected)
    assert not np.array_equal(found, np.tanh((x @ w + c) ** 2))


@pytest.mark.parametrize("optimize", [False, True])
def test_subgraphs_and_operators_that_choose_a_type_are_emulated_too(tmp_path: Path, optimize: bool) -> None:
    def branch(kind: str, name: str) -> onnx.GraphProto:
        node = helper.make_node(kind, ["a", "filled"], [f"{name}_out"], name=name)
        return helper.make_graph(
            [node], name, [], [helper.make_tensor_value_info(f"{name}_out", TensorProto.BFLOAT16, None)]
        )

    third = helper.make_tensor("value", TensorProto.BFLOAT16, [1], [1 / 3])
    nodes = [
        helper.make_node("Shape", ["x"], ["size"], name="size"),
        helper.make_node("ConstantOfShape", ["size"], ["filled"], name="filled", value=third),
        helper.make_node("ReduceSum", ["x"], ["sum"], name="sum", keepdims=0),
        helper.make_node("Cast", ["sum"], ["flag"], name="flag", to=TensorProto.BOOL),
        helper.make_node(
            "If", ["flag"], ["b"], name="b", then_branch=branch("Mul", "then"), else_branch=branch("Add", "other")
        ),
    ]
    x = np.random.default_rng(1).normal(size=(2, 4)).astype(np.float32)
    third_bf16 = rounded(f32(1 / 3))
    found = emulated(bf16_model(nodes, {}), {"x": x}, tmp_path / "m.onnx", optimize=optimize)
    assert np.array_equal(found, rounded(rounded(x) * third_bf16))
    zeros = np.zeros((2, 4), np.float32)
    assert np.array_equal(run(tmp_path / "m.onnx", {"x": zeros}, optimize=optimize), rounded(zeros + third_bf16))


def test_weights_stay_in_bf16_in_the_file(tmp_path: Path) -> None:
    w = np.random.default_rng(0).normal(size=(4, 4)).astype(np.float32)
    model = bf16_model([helper.make_node("MatMul", ["a", "w"], ["b"], name="b")], {"w": w})
    emulated(model, {"x": f32(np.ones((1, 4)))}, tmp_path / "m.onnx", optimize=True)
    assert [weight.data_type for weight in onnx.load(tmp_path / "m.onnx").graph.initializer] == [TensorProto.BFLOAT16]

"""Weights alone in INT8, FP8 and INT4: what such models compute, what they look like, and what is left alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, numpy_helper

from compiler import onnx_files
from compiler.backends import lowering
from compiler.backends.onnxruntime import open_model
from compiler.quantize import blocks, formats, graphs, weights
from compiler.quantize.blocks import SHARES, round_blocks
from compiler.quantize.uses import form_of
from compiler.spec import Array, OnnxModel, Precision
from tests.quantize import networks, reference
from tests.quantize.bench import NONE, Bench, graph, outputs, sqnr
from tests.quantize.networks import Net, f32

FORMATS: dict[str, dict[str, Any]] = {
    "int8": {"precision": Precision.INT8, "weights_only": True},
    "fp8": {"precision": Precision.FP8, "weights_only": True},
    "int4": {"precision": Precision.INT4},
}
STORED = {"int8": TensorProto.INT8, "fp8": TensorProto.FLOAT8E4M3FN, "int4": TensorProto.INT4}
RESTS = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}


def dequantizers(model: OnnxModel) -> dict[str, onnx.NodeProto]:
    """By the name of what it makes."""
    return {node.output[0]: node for node in graph(model).node if node.op_type == "DequantizeLinear"}


def stored(model: OnnxModel) -> dict[str, onnx.TensorProto]:
    return {tensor.name: tensor for tensor in graph(model).initializer}


def attributes(node: onnx.NodeProto) -> dict[str, int]:
    return {attribute.name: attribute.i for attribute in node.attribute}


def weight_bytes(model: OnnxModel) -> int:
    return sum(len(tensor.raw_data) for tensor in graph(model).initializer)


def decoded(model: OnnxModel, name: str) -> Array:
    """A weight in INT4, times its scales, read from the bytes of the file."""
    node, known = dequantizers(model)[f"{name}_dequantized"], stored(model)
    tensor = known[node.input[0]]
    steps = reference.int4_of(tensor.raw_data, tuple(tensor.dims))
    scale = numpy_helper.to_array(known[node.input[1]]).astype(np.float64)
    found = attributes(node)
    return steps * reference.spread(scale, found["axis"], found["block_size"])


def rounded_by(kind: str, axes: Mapping[str, int]) -> Any:
    """The `weight` of `reference.run` that rounds each weight of ``axes`` along its axis."""
    rounding = {"int8": reference.round_weight, "fp8": reference.round_weight_fp8}[kind]

    def weight(node: onnx.NodeProto, values: Array) -> Array:
        name = node.input[0 if node.op_type in ("Gather", "Transpose") else 1]
        return rounding(values, axes[name]) if name in axes else values

    return weight


# --- what it computes -----------------------------------------------------------------------------------------------

TRANSFORMER_AXES = dict.fromkeys((f"{name}_w" for name in ("q", "k", "v", "out", "up", "down")), 1)
NETWORKS: dict[str, tuple[Any, Any, dict[str, int]]] = {
    "convolution": (networks.convolution, lambda: networks.normal_samples(4, 4, 8, 8), {"c_w": 0}),
    "depthwise": (lambda: networks.convolution(groups=4), lambda: networks.normal_samples(4, 4, 8, 8), {"c_w": 0}),
    "residual": (
        networks.residual,
        lambda: networks.normal_samples(4, 3, 16, 16),
        dict.fromkeys(("stem_w", "b0_1_w", "b0_2_w", "b1_1_w", "b1_2_w", "fc_w"), 0),
    ),
    "transformer": (networks.transformer_block, lambda: networks.masked_samples(4), TRANSFORMER_AXES),
}


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_computes_on_weights_rounded_by_output_channel(tmp_path: Path, name: str, kind: str) -> None:
    make, sample, axes = NETWORKS[name]
    proto, samples = make(), sample()
    model = Bench(tmp_path, proto, samples).quantize(**FORMATS[kind])
    rounded = reference.run(proto, samples[3], weight=rounded_by(kind, axes))["y"]
    assert outputs(model, samples[3]) == pytest.approx(rounded, abs=1e-4)
    assert sqnr(reference.run(proto, samples[3])["y"], rounded) < 60, "the rounding shows"


@pytest.mark.parametrize("block", [16, 32, 64, 128])
def test_a_transformer_computes_on_weights_rounded_by_block(tmp_path: Path, block: int) -> None:
    proto, samples = networks.transformer_block(width=128), networks.masked_samples(4, width=128)
    model = Bench(tmp_path, proto, samples).quantize(precision=Precision.INT4, block=block)
    known = {name: decoded(model, name) for name in TRANSFORMER_AXES}

    def weight(node: onnx.NodeProto, values: Array) -> Array:
        found = known[node.input[1]]
        assert found.shape == values.shape
        assert sqnr(values, found) > 17
        return found

    assert outputs(model, samples[3]) == pytest.approx(reference.run(proto, samples[3], weight=weight)["y"], abs=1e-4)


def test_int8_weights_by_hand(tmp_path: Path) -> None:
    # Columns peak at 1.27 and 0.5: scales 0.01 and 0.5 / 127; the input is not rounded.
    bench = Bench(tmp_path, networks.linear_map(f32([[1.27, -0.5], [0.014, 0.1]])), [{"x": f32([[2, -1]])}])
    found = outputs(bench.quantize(**FORMATS["int8"]), {"x": f32([[1.003, 5]])})
    assert found == pytest.approx(np.array([[1.003 * 1.27 + 0.05, -0.5015 + 5 * 25 * 0.5 / 127]]), abs=1e-6)


def test_fp8_weights_by_hand(tmp_path: Path) -> None:
    # Columns peak at 448 and 4.48, so scales are 1 and 0.01: 19 lies between 18 and 20 and goes to the even 20 (mantissa
    # 010), 0.211 is 21.1 steps and goes to 22; 0.00001 is 0.001 of a step, half of the smallest subnormal 2^-9.
    weight = f32([[448, 0.211], [19, -4.48], [0.0009, 0.00001]])
    bench = Bench(tmp_path, networks.linear_map(weight), [{"x": f32([[1, 2, 3]])}])
    model = bench.quantize(**FORMATS["fp8"])
    found = [outputs(model, {"x": row[None]})[0] for row in np.eye(3, dtype=np.float32)]
    assert found == pytest.approx(np.array([[448, 0.22], [20, -4.48], [0, 2**-9 / 100]]), abs=1e-6)


def test_int4_weights_by_hand(tmp_path: Path) -> None:
    # Two blocks of 16 in each column. The largest of the first is 7, and no smaller scale fits what are whole numbers;
    # that of the second is -0.8, which is exactly -8 steps where 0.7 is 7 of them.
    weight = np.zeros((32, 2), np.float32)
    weight[:16] = np.arange(-7, 9).clip(-7, 7)[:, None]
    weight[16:] = np.arange(-8, 8)[:, None] / f32(10)
    model = Bench(tmp_path, networks.linear_map(weight), networks.normal_samples(2, 32)).quantize(
        precision=Precision.INT4, block=16
    )
    node = dequantizers(model)["w_dequantized"]
    scale = numpy_helper.to_array(stored(model)[node.input[1]])
    assert scale == pytest.approx(f32([[1, 1], [0.1, 0.1]]))
    assert reference.int4_of(stored(model)[node.input[0]].raw_data, (32, 2))[16:18].tolist() == [[-8, -8], [-7, -7]]
    assert outputs(model, {"x": np.eye(32, dtype=np.float32)}) == pytest.approx(weight, abs=1e-6)


@pytest.mark.parametrize("rest", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("axis", [0, 1])
def test_the_scale_of_a_block_has_the_least_squared_error(axis: int, rest: str) -> None:
    random = np.random.default_rng(0)
    weight = random.standard_t(4, size=(64, 64)).astype(np.float32)
    steps, scale = round_blocks(weight, axis, 16, rest)
    assert scale.shape == ((4, 64) if axis == 0 else (64, 4))
    blocks = np.moveaxis(weight, axis, -1).reshape(-1, 16).astype(np.float64)
    taken = np.moveaxis(scale, axis, -1).reshape(-1).astype(np.float64)
    digits = {"fp32": 2.0**-22, "fp16": 2.0**-10, "bf16": 2.0**-7}[rest]
    gained = 0
    for block, found in zip(blocks, taken, strict=True):
        full = np.abs(block).max() / 7
        candidates = np.array(SHARES) * full
        assert ((found >= candidates * (1 - 1e-6)) & (found <= candidates * (1 + 2 * digits))).any()
        errors = [np.sum((np.clip(np.rint(block / s), -8, 7) * s - block) ** 2) for s in (*candidates, found, full)]
        assert errors[-2] <= min(errors) * (1.0001 if rest == "fp32" else 1.3)
        gained += errors[-2] < 0.9 * errors[-1]
    assert gained > len(blocks) / 4
    dequantized = steps.astype(np.float64) * reference.spread(scale.astype(np.float64), axis, 16)
    assert sqnr(weight, dequantized) > 18


def test_a_matrix_of_three_axes_has_scales_of_its_last_or_blocks_of_its_middle_one(tmp_path: Path) -> None:
    net = Net()
    net.op("MatMul", ["x", net.normal("w", 3, 32, 8, fan_in=32)], "y")
    proto, samples = (
        net.model({"x": ["batch", 3, 4, 32]}, {"y": ["batch", 3, 4, 8]}),
        networks.normal_samples(4, 3, 4, 32),
    )
    bench = Bench(tmp_path, proto, samples)
    exact = outputs(bench.model, samples[0])
    for kind, axes, least_db in (
        ("int8", {"axis": 2}, 35),
        ("fp8", {"axis": 2}, 28),
        ("int4", {"axis": 1, "block_size": 32}, 17),
    ):
        model = bench.quantize(**FORMATS[kind])
        assert attributes(dequantizers(model)["w_dequantized"]) == axes
        assert sqnr(exact, outputs(model, samples[0])) > least_db


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("transposed", [0, 1])
def test_a_gemm_is_rounded_along_its_own_axes(tmp_path: Path, kind: str, transposed: int) -> None:
    net = Net()
    weight = net.random.normal(size=(64, 16)) * np.geomspace(0.01, 1, 16)
    stored_as = net.weight("w", (weight.T.copy() if transposed else weight).astype(np.float32))
    net.op("Gemm", ["x", stored_as, net.normal("b", 16)], "y", transB=transposed)
    samples = networks.normal_samples(8, 64)
    bench = Bench(tmp_path, net.model({"x": ["batch", 64]}, {"y": ["batch", 16]}), samples)
    model = bench.quantize(**FORMATS[kind])
    node = dequantizers(model)["w_dequantized"]
    known = {name: list(tensor.dims) for name, tensor in stored(model).items()}
    if kind == "int4":
        assert attributes(node) == {"axis": 1 if transposed else 0, "block_size": 32}
        assert known[node.input[1]] == ([16, 2] if transposed else [2, 16])
    else:
        assert attributes(node) == {"axis": 0 if transposed else 1}
        assert known[node.input[1]] == [16]
    # Every column keeps its digits, the smallest too.
    expected = reference.run(bench.proto, samples[0])["y"]
    bias = numpy_helper.to_array(stored(model)["b"]).astype(np.float64)
    found = outputs(model, samples[0])
    assert sqnr(expected[:, 0] - bias[0], found[:, 0] - bias[0]) > 10


# --- what it looks like ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rest", RESTS)
@pytest.mark.parametrize("kind", FORMATS)
def test_every_weight_is_stored_small_behind_one_dequantizer_of_the_type_of_the_rest(
    tmp_path: Path, kind: str, rest: str
) -> None:
    """The form that NVIDIA's parser and builder take: no zero point, scales in the type of what follows, constants that
    only DequantizeLinear reads, and in INT4 whole blocks along the axis that is summed over."""
    proto = networks.transformer_block()
    model = Bench(tmp_path, proto, networks.masked_samples(4)).quantize(rest=rest, **FORMATS[kind])
    original = {tensor.name: list(tensor.dims) for tensor in proto.graph.initializer}
    known, nodes = stored(model), graph(model).node
    assert dequantizers(model).keys() == {f"{name}_dequantized" for name in TRANSFORMER_AXES}
    assert not [node for node in nodes if node.op_type == "QuantizeLinear" or node.domain]
    types = {info.name: info.type.tensor_type.elem_type for info in graph(model).value_info}
    for name, node in dequantizers(model).items():
        weight = name.removesuffix("_dequantized")
        assert list(node.input) == [f"{weight}_{kind}", f"{name}_scale"]
        size, scale = known[node.input[0]], known[node.input[1]]
        assert (size.data_type, list(size.dims)) == (STORED[kind], original[weight])
        assert scale.data_type == RESTS[rest] == types[name]
        assert (numpy_helper.to_array(scale).astype(np.float32) > 0).all()
        rows, columns = original[weight]
        if kind == "int4":
            assert attributes(node) == {"axis": 0, "block_size": 32}
            assert list(scale.dims) == [rows // 32, columns]
        else:
            assert attributes(node) == {"axis": 1}
            assert list(scale.dims) == [columns]
        assert [reader.op_type for reader in nodes if name in reader.input] == ["MatMul"]
        assert [reader.op_type for reader in nodes if node.input[0] in reader.input] == ["DequantizeLinear"]
        assert weight not in known
    least = {"int8": 20, "fp8": 20, "int4": 21 if rest != "bf16" else 22}[kind]
    assert model.opset == (22 if rest == "bf16" else least)
    assert onnx.load(model.path).ir_version >= (10 if kind == "int4" else 9)


@pytest.mark.parametrize("rest", ["fp16", "bf16"])
@pytest.mark.parametrize("kind", FORMATS)
def test_a_model_with_a_rest_of_half_computes_the_same(tmp_path: Path, kind: str, rest: str) -> None:
    samples = networks.masked_samples(4)
    bench = Bench(tmp_path, networks.transformer_block(), samples)
    full, half = bench.quantize(**FORMATS[kind]), bench.quantize(rest=rest, **FORMATS[kind])
    network = onnx_files.read(half.path)
    lowering.lower(network)  # BF16 has no kernels on a CPU
    onnx_files.write(network, tmp_path / "lowered.onnx")
    exact = outputs(bench.model, samples[0])
    found = open_model(tmp_path / "lowered.onnx", threads=1, optimize=False).run(samples[0])["y"]
    own_noise_db = 4 if (kind, rest) == ("int8", "bf16") else 1  # BF16 alone is at 45 dB
    assert sqnr(exact, found) > sqnr(exact, outputs(full, samples[0])) - own_noise_db


@pytest.mark.parametrize("rest", ["fp16", "bf16"])
def test_scales_too_small_for_normal_numbers_of_half_are_held_exactly(tmp_path: Path, rest: str) -> None:
    weight = np.random.default_rng(0).normal(size=(64, 16)) * 1e-4  # scales of about 2e-6 in INT8
    samples = networks.normal_samples(4, 64)
    bench = Bench(tmp_path, networks.linear_map(weight), samples)
    for kind in FORMATS:
        model = bench.quantize(rest=rest, **FORMATS[kind])
        node = dequantizers(model)["w_dequantized"]
        assert stored(model)[node.input[1]].data_type == RESTS[rest]
        assert [reader.op_type for reader in graph(model).node if "w_dequantized" in reader.input] == ["MatMul"]
        scale = numpy_helper.to_array(stored(model)[node.input[1]]).astype(np.float64)
        if kind == "int8":
            # Rounded by the very scale that is stored, not by one that was rounded afterwards.
            steps = numpy_helper.to_array(stored(model)[node.input[0]])
            assert np.abs(steps * scale - weight).max() <= 0.5001 * scale.max()
            assert np.abs(steps).max(axis=0).min() > 100


@pytest.mark.parametrize(
    ("kind", "rest", "least", "most"),
    [
        ("int8", "fp32", 0.25, 0.26),
        ("fp8", "fp32", 0.25, 0.26),
        ("int4", "fp32", 0.155, 0.16),
        ("int4", "fp16", 0.14, 0.145),
        ("int8", "bf16", 0.25, 0.255),
    ],
)
def test_the_file_shrinks(tmp_path: Path, kind: str, rest: str, least: float, most: float) -> None:
    # 4 bits of 32 for a weight, and 32 or 16 for every 32 of them.
    matrix = np.random.default_rng(0).normal(size=(512, 512))
    bench = Bench(tmp_path, networks.linear_map(matrix), networks.normal_samples(2, 512))
    model = bench.quantize(rest=rest, **FORMATS[kind])
    assert least < model.path.stat().st_size / bench.model.path.stat().st_size < most
    assert least < weight_bytes(model) / (4 * 512 * 512) < most


@pytest.mark.parametrize("kind", FORMATS)
def test_the_same_run_writes_the_same_bytes(tmp_path: Path, kind: str) -> None:
    bench = Bench(tmp_path, networks.transformer_block(), networks.masked_samples(2))
    assert bench.quantize(**FORMATS[kind]).sha256 == bench.quantize(**FORMATS[kind]).sha256


@pytest.mark.parametrize("kind", FORMATS)
def test_a_weight_that_two_layers_share_is_stored_and_dequantised_once(tmp_path: Path, kind: str) -> None:
    net = Net()
    weight = net.normal("w", 32, 32, fan_in=32)
    net.op("MatMul", [net.op("Relu", [net.op("MatMul", ["x", weight], "p")], "r"), weight], "y")
    bench = Bench(tmp_path, net.model({"x": ["batch", 32]}, {"y": ["batch", 32]}), networks.normal_samples(4, 32))
    model = bench.quantize(**FORMATS[kind])
    assert stored(model).keys() == {f"w_{kind}", "w_dequantized_scale"}
    assert list(dequantizers(model)) == ["w_dequantized"]
    assert graph(model).node[0].op_type == "DequantizeLinear"


def test_a_weight_that_is_summed_over_either_axis_is_stored_for_both(tmp_path: Path) -> None:
    net = Net()
    weight, bias = net.normal("w", 32, 32, fan_in=32), net.weight("b", np.zeros(32, np.float32))
    net.op("Gemm", [net.op("Gemm", ["x", weight, bias], "p"), weight, bias], "y", transB=1)
    bench = Bench(tmp_path, net.model({"x": ["batch", 32]}, {"y": ["batch", 32]}), networks.normal_samples(4, 32))
    model = bench.quantize(**FORMATS["int4"])
    assert [attributes(node)["axis"] for node in dequantizers(model).values()] == [0, 1]
    assert sqnr(outputs(bench.model, bench.samples[0]), outputs(model, bench.samples[0])) > 15


def test_a_weight_that_others_read_too_stays_in_float_for_them(tmp_path: Path) -> None:
    net = Net()
    weight = net.normal("w", 32, 32, fan_in=32)
    net.op("Add", [net.op("MatMul", ["x", weight], "p"), net.op("ReduceSum", [weight], "s", keepdims=0)], "y")
    bench = Bench(tmp_path, net.model({"x": ["batch", 32]}, {"y": ["batch", 32]}), networks.normal_samples(4, 32))
    model = bench.quantize(**FORMATS["int4"])
    assert stored(model)["w"].data_type == TensorProto.FLOAT
    assert stored(model)["w_int4"].data_type == TensorProto.INT4


@pytest.mark.parametrize("kind", FORMATS)
def test_inputs_outputs_and_probe_stay(tmp_path: Path, kind: str) -> None:
    bench = Bench(tmp_path, networks.transformer_block(), networks.masked_samples(2))
    model = bench.quantize(**FORMATS[kind])
    assert (model.inputs, model.outputs, model.axes) == (bench.model.inputs, bench.model.outputs, bench.model.axes)
    assert model.precision is FORMATS[kind]["precision"]
    assert model.probe is not None
    assert model.probe.parent == model.path.parent


# --- blocks ---------------------------------------------------------------------------------------------------------


def two_products(wide: int, narrow: int) -> onnx.ModelProto:
    net = Net()
    first = net.op("MatMul", ["x", net.normal("wide_w", wide, narrow, fan_in=wide)], "wide")
    net.op("MatMul", [first, net.normal("narrow_w", narrow, 16, fan_in=narrow)], "y")
    return net.model({"x": ["batch", wide]}, {"y": ["batch", 16]})


def test_a_block_that_does_not_divide_the_input_channels_gives_way_to_the_next_smaller_one(tmp_path: Path) -> None:
    bench = Bench(tmp_path, two_products(128, 48), networks.normal_samples(4, 128))
    model = bench.quantize(precision=Precision.INT4, block=64)
    nodes = dequantizers(model)
    assert attributes(nodes["wide_w_dequantized"]) == {"axis": 0, "block_size": 64}
    assert attributes(nodes["narrow_w_dequantized"]) == {"axis": 0, "block_size": 16}
    assert model.notes[-4:-1] == (
        "INT4 weights: 2 of 2 layers with constant weights, block 64; the rest stays FP32",
        "block 16, since 64 does not divide their input channels: 'node_y'",
        "opset raised from 20 to 21, the first that defines INT4",
    )


def test_input_channels_that_no_block_divides_stay(tmp_path: Path) -> None:
    bench = Bench(tmp_path, two_products(64, 24), networks.normal_samples(4, 64))
    model = bench.quantize(precision=Precision.INT4, rest="fp16")
    assert list(dequantizers(model)) == ["wide_w_dequantized"]
    assert stored(model)["narrow_w"].data_type == TensorProto.FLOAT16
    assert "INT4 weights: 1 of 2 layers with constant weights, block 32; the rest stays FP16" in model.notes
    assert "input channels that no block divides: 'node_y' stay FP16" in model.notes


def test_convolutions_stay_out_of_int4(tmp_path: Path) -> None:
    bench = Bench(tmp_path, networks.residual(channels=32), networks.normal_samples(4, 3, 16, 16))
    model = bench.quantize(precision=Precision.INT4)
    assert list(dequantizers(model)) == ["fc_w_dequantized"]
    assert model.notes[-4:-1] == (
        "INT4 weights: 1 of 6 layers with constant weights, block 32; the rest stays FP32",
        "5 convolutions stay FP32: TensorRT takes INT4 in blocks, of matrices only",
        "opset raised from 20 to 21, the first that defines INT4",
    )


def test_a_model_of_convolutions_has_nothing_for_int4(tmp_path: Path) -> None:
    bench = Bench(tmp_path, networks.convolution(), networks.normal_samples(2, 4, 8, 8))
    assert bench.refusal(precision=Precision.INT4) == (
        "model: 1 layers could be rounded to INT4, and none is left of them; at least one MatMul or Gemm with a constant "
        "weight of a multiple of 16 input channels, not kept by engines.keep or quantize.keep, was expected. Keep fewer "
        "layers, or build another precision."
    )


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_a_model_of_which_everything_is_kept_has_nothing_to_round(tmp_path: Path, kind: str) -> None:
    bench = Bench(tmp_path, networks.convolution(), networks.normal_samples(2, 4, 8, 8))
    assert bench.refusal(keep=["*"], **FORMATS[kind]) == (
        f"model: 1 layers could be rounded to {kind.upper()}, and none is left of them; at least one Conv, ConvTranspose, "
        "Gemm or MatMul with a constant weight, not kept by engines.keep or quantize.keep, was expected. Keep fewer "
        "layers, or build another precision."
    )


@pytest.mark.parametrize("kind", FORMATS)
def test_a_kept_layer_keeps_its_weight(tmp_path: Path, kind: str) -> None:
    bench = Bench(tmp_path, networks.transformer_block(), networks.masked_samples(4))
    model = bench.quantize(keep=["node_up_product"], min_sqnr_db=NONE, **FORMATS[kind])
    assert stored(model)["up_w"].data_type == TensorProto.FLOAT
    assert len(dequantizers(model)) == 5
    assert any("5 of 6 layers" in note for note in model.notes)


# --- tables ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rest", RESTS)
@pytest.mark.parametrize("kind", FORMATS)
def test_an_embedding_table_is_int8_by_row_and_dequantised_before_it_is_read(
    tmp_path: Path, kind: str, rest: str
) -> None:
    """The builder refuses an INT8 constant that a Gather reads, and fuses DequantizeLinear and Gather."""
    samples = networks.id_samples(8)
    bench = Bench(tmp_path, networks.embedding(), samples)
    model = bench.quantize(rest=rest, **FORMATS[kind])
    node = dequantizers(model)["table_dequantized"]
    known = stored(model)
    assert list(node.input) == ["table_int8", "table_dequantized_scale"]
    assert attributes(node) == {"axis": 0}
    assert (known["table_int8"].data_type, list(known["table_int8"].dims)) == (TensorProto.INT8, [1100, 32])
    assert (known["table_dequantized_scale"].data_type, list(known["table_dequantized_scale"].dims)) == (
        RESTS[rest],
        [1100],
    )
    assert [reader.op_type for reader in graph(model).node if "table_dequantized" in reader.input] == ["Gather"]
    assert "embedding tables in INT8, one scale per row: 1" in model.notes
    assert any("2 of 2 layers" in note for note in model.notes)


@pytest.mark.parametrize("head", ["transpose", "gemm"])
@pytest.mark.parametrize("kind", FORMATS)
def test_a_head_that_shares_its_table_reads_the_same_int8(tmp_path: Path, kind: str, head: str) -> None:
    proto, samples = networks.embedding(head=head), networks.id_samples(8)
    bench = Bench(tmp_path, proto, samples)
    model = bench.quantize(**FORMATS[kind])
    nodes = dequantizers(model)
    assert [name for name in stored(model) if name.startswith("table")] == ["table_int8", "table_dequantized_scale"]
    assert nodes.keys() == {"table_dequantized", "w_dequantized"}
    readers = {reader.op_type for reader in graph(model).node if "table_dequantized" in reader.input}
    assert readers == {"Gather", "Transpose" if head == "transpose" else "Gemm"}
    assert "embedding tables in INT8, one scale per row: 1 (layers that share one: 1)" in model.notes
    if kind == "int4":
        known = {"w": decoded(model, "w")}
    else:
        matrix = numpy_helper.to_array(next(w for w in proto.graph.initializer if w.name == "w")).astype(np.float64)
        known = {"w": reference.round_weight(matrix, 1) if kind == "int8" else reference.round_weight_fp8(matrix, 1)}

    def weight(node: onnx.NodeProto, values: Array) -> Array:
        return known["w"] if "w" in node.input else reference.round_weight(values, 0)

    rounded = reference.run(proto, samples[3], weight=weight)["y"]
    assert outputs(model, samples[3]) == pytest.approx(rounded, abs=1e-4)


def test_a_small_table_stays(tmp_path: Path) -> None:
    bench = Bench(tmp_path, networks.embedding(rows=1024), networks.id_samples(4, rows=1024))
    assert stored(bench.quantize(**FORMATS["int8"]))["table"].data_type == TensorProto.FLOAT


@pytest.mark.parametrize("head", ["none", "transpose"])
def test_a_kept_table_stays(tmp_path: Path, head: str) -> None:
    bench = Bench(tmp_path, networks.embedding(head=head), networks.id_samples(4))
    model = bench.quantize(keep=["node_rows"], **FORMATS["int8"])
    assert stored(model)["table"].data_type == TensorProto.FLOAT
    assert not [note for note in model.notes if "embedding" in note]


def test_a_table_that_others_read_in_float_is_not_stored_twice(tmp_path: Path) -> None:
    bench = Bench(tmp_path, networks.embedding(head="transpose"), networks.id_samples(4))
    model = bench.quantize(keep=["node_y"], **FORMATS["int8"])
    assert [name for name in stored(model) if name.startswith("table")] == ["table"]


def test_a_table_that_holds_nan_where_no_sample_looks_is_refused(tmp_path: Path) -> None:
    proto = networks.embedding()
    table = next(weight for weight in proto.graph.initializer if weight.name == "table")
    values = numpy_helper.to_array(table).copy()
    values[7] = np.nan
    table.CopyFrom(numpy_helper.from_array(values, "table"))
    samples = [{"ids": np.array([[0, 1, 2, 3, row]])} for row in (4, 5, 6)]
    assert Bench(tmp_path, proto, samples).refusal(**FORMATS["int8"]) == (
        "weight 'table' of Gather 'node_rows': 32 of 35200 values are NaN or Inf; finite weights were expected. Train or "
        "export the model again."
    )


# --- degenerate -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("zero", ["channel", "block", "all"])
def test_weights_of_zeros_stay_zero(tmp_path: Path, kind: str, zero: str) -> None:
    weight = np.random.default_rng(0).normal(size=(64, 8)).astype(np.float32)
    rows = 32 if zero == "block" else 64
    weight[:rows, slice(0, 8) if zero == "all" else 3] = 0
    bench = Bench(tmp_path, networks.linear_map(weight), networks.normal_samples(4, 64))
    model = bench.quantize(**FORMATS[kind])
    found = outputs(model, {"x": np.eye(64, dtype=np.float32)})
    assert np.isfinite(found).all()
    assert not found[weight == 0].any()
    if zero == "channel" and kind != "int4":
        assert "weight 'w': 1 of 8 channels are all zero" in model.notes


@pytest.mark.parametrize("kind", FORMATS)
def test_weights_of_any_size_get_scales_that_are_numbers(tmp_path: Path, kind: str) -> None:
    for place, size in enumerate((1e-42, 1e-30, 1e30)):
        folder = tmp_path / str(place)
        bench = Bench(
            folder,
            networks.linear_map(np.full((32, 4), size)),
            [{"x": np.linspace(0, 1e-2, 32, dtype=np.float32)[None]}],
        )
        for rest in RESTS:
            if rest == "fp16" and size > 1:
                continue  # the product fits no FP16 and stays FP32, and there is nothing else
            model = bench.quantize(rest=rest, min_sqnr_db=NONE, **FORMATS[kind])
            node = dequantizers(model)["w_dequantized"]
            scale = numpy_helper.to_array(stored(model)[node.input[1]]).astype(np.float64)
            assert np.isfinite(scale).all()
            assert (scale > 0).all()


# --- broken on purpose ----------------------------------------------------------------------------------------------


def uneven(folder: Path) -> Bench:
    """A square weight whose rows and columns have very different sizes."""
    random = np.random.default_rng(0)
    weight = random.normal(size=(64, 64)) * np.geomspace(0.03, 1, 64) * np.geomspace(1, 0.1, 64)[:, None]
    return Bench(folder, networks.linear_map(weight), networks.normal_samples(16, 64))


LIMIT_DB = {"int8": 35.0, "fp8": 25.0, "int4": 15.0}


@pytest.mark.parametrize("kind", FORMATS)
def test_the_limit_on_the_ratio_holds(tmp_path: Path, kind: str) -> None:
    bench = uneven(tmp_path)
    assert bench.quantize(min_sqnr_db=LIMIT_DB[kind], **FORMATS[kind]).notes
    message = bench.refusal(min_sqnr_db=60.0, **FORMATS[kind])
    assert message.startswith("output 'y': SQNR ")
    assert "at least 60 dB was expected (quantize.min_sqnr_db). Most is lost at 'y' (60.0 to " in message


@pytest.mark.parametrize("kind", FORMATS)
def test_a_wrong_axis_is_refused(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = uneven(tmp_path)
    right = ir.node

    def wrong(op: str, inputs: Any, attributes: Any = None, **more: Any) -> ir.Node:
        if op == "DequantizeLinear" and "block_size" not in attributes:
            attributes = {"axis": 1 - attributes["axis"]}
        return right(op, inputs, attributes, **more)

    monkeypatch.setattr(ir, "node", wrong)
    if kind == "int4":  # of blocks the runtime itself refuses another axis, unless the scales are turned, too

        def turned(weight: Array, axis: int, block: int, rest: str) -> tuple[Array, Array]:
            steps, scale = round_blocks(weight, 1 - axis, block, rest)
            return steps, np.ascontiguousarray(scale.T)

        monkeypatch.setattr(weights, "round_blocks", turned)
    assert "output 'y': SQNR" in bench.refusal(min_sqnr_db=LIMIT_DB[kind], **FORMATS[kind])


@pytest.mark.parametrize("factor", [8, 1 / 8])
@pytest.mark.parametrize("kind", FORMATS)
def test_scales_off_by_8_are_refused(tmp_path: Path, kind: str, factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = uneven(tmp_path)
    right = graphs.register

    def wrong(graph: ir.Graph, name: str, array: Array) -> ir.Value:
        return right(graph, name, array * np.float32(factor) if name.endswith("_scale") else array)

    monkeypatch.setattr(graphs, "register", wrong)
    assert "output 'y': SQNR" in bench.refusal(**FORMATS[kind])


@pytest.mark.parametrize("fault", ["nibbles", "signs", "blocks"])
def test_int4_in_another_order_is_refused(tmp_path: Path, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = uneven(tmp_path)

    def wrong(weight: Array, axis: int, block: int, rest: str) -> tuple[Array, Array]:
        steps, scale = round_blocks(weight, axis, block, rest)
        if fault == "nibbles":  # the halves of every byte change places
            return steps.reshape(-1, 2)[:, ::-1].reshape(steps.shape), scale
        if fault == "signs":  # what would be read of unsigned numbers around 8
            return (steps.astype(np.int8) + 8).clip(0, 7).astype(steps.dtype), scale
        return steps, np.ascontiguousarray(scale[::-1])

    monkeypatch.setattr(weights, "round_blocks", wrong)
    assert "output 'y': SQNR" in bench.refusal(min_sqnr_db=LIMIT_DB["int4"], **FORMATS["int4"])


def lowest_and_scale(block: Array) -> tuple[int, float]:
    steps, scale = round_blocks(block, 0, 16, "fp32")
    return int(steps.astype(int).min()), float(scale[0, 0])


def test_int4_cut_at_minus_7_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    block = f32([[0.7], [-0.8]] * 8)
    lowest, scale = lowest_and_scale(block)
    assert lowest == -8
    assert scale == pytest.approx(0.1)
    monkeypatch.setattr(
        blocks, "INT4", formats.Steps(label="INT4", dtype=ir.DataType.INT4, largest=7, lowest=-7, since=21)
    )
    lowest, scale = lowest_and_scale(block)
    assert lowest == -7
    assert scale != pytest.approx(0.1)


def test_another_fp8_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # 240 instead of 448 costs next to nothing in the ratio: only the numbers themselves show it.
    make, sample, axes = NETWORKS["transformer"]
    proto, samples = make(), sample()
    bench = Bench(tmp_path, proto, samples)
    rounded = reference.run(proto, samples[3], weight=rounded_by("fp8", axes))["y"]
    assert outputs(bench.quantize(**FORMATS["fp8"]), samples[3]) == pytest.approx(rounded, abs=1e-4)
    other = formats.Steps(label="FP8", dtype=ir.DataType.FLOAT8E4M3FN, largest=240, lowest=-240, since=19)
    monkeypatch.setattr(weights, "_FORMATS", {**weights._FORMATS, Precision.FP8: other})
    assert outputs(bench.quantize(**FORMATS["fp8"]), samples[3]) != pytest.approx(rounded, abs=1e-3)


def test_a_table_rounded_by_column_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    proto = networks.embedding(head="transpose")
    table = next(weight for weight in proto.graph.initializer if weight.name == "table")
    values = numpy_helper.to_array(table) * np.geomspace(0.001, 1, 1100, dtype=np.float32)[:, None]
    table.CopyFrom(numpy_helper.from_array(values, "table"))
    bench = Bench(tmp_path, proto, [{"ids": np.arange(row, row + 5)[None]} for row in range(16)])
    assert bench.quantize(min_sqnr_db=35, **FORMATS["int8"]).notes

    def wrong(use: Any, in_table: bool, *more: Any) -> Any:
        form = form_of(use, in_table, *more)
        return replace(form, axis=1) if in_table and form is not None else form

    monkeypatch.setattr(weights, "form_of", wrong)
    assert "output 'y': SQNR" in bench.refusal(min_sqnr_db=35, **FORMATS["int8"])

"""FP8 models: activations and weights in E4M3."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
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
from compiler.errors import CalibrationError
from compiler.quantize import formats, fp8, placement, qdq
from compiler.quantize.formats import Grid
from compiler.quantize.observe import load
from compiler.spec import Array, Precision
from tests.quantize import networks, reference
from tests.quantize.bench import Bench, constants, graph, outputs, readers, sqnr
from tests.quantize.networks import Net, f32

RESTS = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}


def expected(
    proto: onnx.ModelProto,
    samples: Sequence[Mapping[str, Array]],
    feeds: Mapping[str, Array],
    *,
    read: Sequence[str],
    axes: Mapping[str, int],
) -> Array:
    """The output in float64, with the tensors of ``read`` and the weights of ``axes`` in FP8."""
    stacked = {name: np.concatenate([sample[name] for sample in samples]) for name in samples[0]}
    seen = reference.run(proto, stacked)
    scale = {name: np.abs(seen[name]).max() / 448 for name in read}

    def round_read(name: str, values: Array) -> Array:
        return reference.round_fp8(scale[name], values) if name in read else values

    def round_weight(node: onnx.NodeProto, values: Array) -> Array:
        name = node.input[1]
        return reference.round_weight_fp8(values, axes[name]) if name in axes else values

    return reference.run(proto, feeds, read=round_read, weight=round_weight)["y"]


RESIDUAL: dict[str, Any] = {
    "read": ("x", "pool", "b0_1_relu", "b0_relu", "b1_1_relu", "flat"),
    "axes": dict.fromkeys(("stem_w", "b0_1_w", "b0_2_w", "b1_1_w", "b1_2_w", "fc_w"), 0),
}
TRANSFORMER: dict[str, Any] = {
    "read": ("x", "mixed_flat", "norm1", "gelu"),
    "axes": dict.fromkeys((f"{name}_w" for name in ("q", "k", "v", "out", "up", "down")), 1),
}


def test_a_linear_map_by_hand(tmp_path: Path) -> None:
    # The input peaks at 448, so its scale is 1; 500 is cut off, 19 goes to 20 and 17 to 16. The weight peaks at 4.48.
    bench = Bench(tmp_path, networks.linear_map(f32([[4.48, 0], [0.19, -4.48]])), [{"x": f32([[448, -3]])}])
    found = outputs(bench.quantize(precision=Precision.FP8), {"x": f32([[500, 19], [17, 0.3]])})
    by_hand = np.array([[448, 20], [16, 0.3125]]) @ np.array([[4.48, 0], [0.2, -4.48]])
    assert found == pytest.approx(by_hand, rel=1e-6)


def test_a_convolution(tmp_path: Path) -> None:
    proto, samples = networks.convolution(), networks.normal_samples(8, 4, 8, 8)
    found = outputs(Bench(tmp_path, proto, samples).quantize(precision=Precision.FP8), samples[3])
    rounded = expected(proto, samples, samples[3], read=["x"], axes={"c_w": 0})
    assert found == pytest.approx(rounded, abs=1e-5)


@pytest.mark.parametrize("name", ["residual", "transformer"])
def test_a_network_is_rounded_where_it_multiplies(tmp_path: Path, name: str) -> None:
    proto, samples, rounding = {
        "residual": (networks.residual(), networks.normal_samples(8, 3, 16, 16), RESIDUAL),
        "transformer": (networks.transformer_block(), networks.masked_samples(8), TRANSFORMER),
    }[name]
    bench = Bench(tmp_path, proto, samples)
    found = outputs(bench.quantize(precision=Precision.FP8), samples[3])
    rounded = expected(proto, samples, samples[3], **rounding)
    # A sum that ends near the middle of two steps may go either way, which is a step of 6 %: of few values.
    assert sqnr(rounded, found) > 60
    assert 25 < sqnr(outputs(bench.model, samples[3]), found) < 40


def test_scales_are_the_largest_magnitudes_by_448(tmp_path: Path) -> None:
    samples = networks.masked_samples(8)
    bench = Bench(tmp_path, networks.transformer_block(), samples)
    known = constants(bench.quantize(precision=Precision.FP8, method="percentile", percentile=90.0))
    seen = load(bench.statistics.path)
    for name in TRANSFORMER["read"]:
        assert known[f"{name}_quantized_scale"] == np.float32(seen[name].peak) / np.float32(448)
    weight = numpy_helper.to_array(next(w for w in bench.proto.graph.initializer if w.name == "up_w"))
    assert known["up_w_dequantized_scale"] == pytest.approx(np.abs(weight).max(axis=0) / 448, rel=1e-6)


# --- what it looks like ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rest", RESTS)
@pytest.mark.parametrize("name", ["residual", "transformer"])
def test_the_form_that_builds(tmp_path: Path, name: str, rest: str) -> None:
    """One QuantizeLinear for an activation, one scale, FP8 zero points; a DequantizeLinear for each reader; weights
    stored in FP8 with a scale per output channel; nothing rounded but what is multiplied."""
    proto, samples, rounding = {
        "residual": (networks.residual(), networks.normal_samples(4, 3, 16, 16), RESIDUAL),
        "transformer": (networks.transformer_block(), networks.masked_samples(4), TRANSFORMER),
    }[name]
    model = Bench(tmp_path, proto, samples).quantize(precision=Precision.FP8, rest=rest)
    nodes = graph(model).node
    known = {tensor.name: tensor for tensor in graph(model).initializer}
    makers = {output: node for node in nodes for output in node.output}
    quantizers = [node for node in nodes if node.op_type == "QuantizeLinear"]
    assert len(quantizers) == len(rounding["read"])
    for node in quantizers:
        scale, zero_point = known[node.input[1]], known[node.input[2]]
        assert (scale.data_type, list(scale.dims)) == (RESTS[rest], [])
        assert (zero_point.data_type, list(zero_point.dims)) == (TensorProto.FLOAT8E4M3FN, [])
        assert {reader.op_type for reader in nodes if node.output[0] in reader.input} == {"DequantizeLinear"}
    for weight, axis in rounding["axes"].items():
        node = makers[f"{weight}_dequantized"]
        assert known[node.input[0]].data_type == TensorProto.FLOAT8E4M3FN
        assert known[node.input[1]].data_type == RESTS[rest]
        assert [(attribute.name, attribute.i) for attribute in node.attribute] == [("axis", axis)]
        assert list(known[node.input[1]].dims) == [known[node.input[0]].dims[axis]]
        assert weight not in known
    for node in nodes:
        if node.op_type == "DequantizeLinear":
            assert len([reader for reader in nodes if node.output[0] in reader.input]) == 1
    assert not [node for node in nodes if node.domain]
    if name == "residual":
        assert readers(model, "Conv") == ["DD-"] * 5
        assert readers(model, "Add") == ["--"] * 2
        assert readers(model, "Gemm") == ["DD-"]
        assert known["fc_b"].data_type == RESTS[rest]
    else:
        assert readers(model, "MatMul") == ["DD", "DD", "DD", "--", "--", "DD", "DD", "DD"]


def test_products_share_the_rounding_of_what_they_read(tmp_path: Path) -> None:
    net = Net()
    parts = [net.op("MatMul", ["x", net.normal(f"{name}_w", 8, 8, fan_in=8)], name) for name in "qkv"]
    net.op("Sum", parts, "y")
    proto = net.model({"x": ["batch", 8]}, {"y": ["batch", 8]})
    model = Bench(tmp_path, proto, networks.normal_samples(4, 8)).quantize(precision=Precision.FP8)
    found = [node.op_type for node in graph(model).node]
    assert found.count("QuantizeLinear") == 1
    assert found.count("DequantizeLinear") == 6


def test_the_notes(tmp_path: Path) -> None:
    bench = Bench(tmp_path, networks.transformer_block(), networks.masked_samples(4))
    notes = bench.quantize(precision=Precision.FP8, rest="fp16", keep=["up"]).notes
    assert notes[0] == "FP8: 6 of 6 layers with constant weights and 4 activations (whole range); the rest stays FP16"
    notes = bench.quantize(precision=Precision.FP8, rest="fp16", keep=["up_product"]).notes
    assert notes[:2] == (
        "FP8: 5 of 6 layers with constant weights and 3 activations (whole range); the rest stays FP16",
        "2 products of two activations stay FP16",
    )
    assert re.fullmatch(r"SQNR against FP32 on 4 calibration samples: y [23]\d\.\d dB", notes[2])


def test_the_file_shrinks_to_a_quarter(tmp_path: Path) -> None:
    matrix = np.random.default_rng(0).normal(size=(256, 256))
    bench = Bench(tmp_path, networks.linear_map(matrix), networks.normal_samples(4, 256))
    assert bench.quantize(precision=Precision.FP8).path.stat().st_size < 0.28 * bench.model.path.stat().st_size


@pytest.mark.parametrize("rest", ["fp16", "bf16"])
def test_a_model_with_a_rest_of_half_computes_the_same(tmp_path: Path, rest: str) -> None:
    samples = networks.masked_samples(8)
    bench = Bench(tmp_path, networks.transformer_block(), samples)
    exact = outputs(bench.model, samples[0])
    network = onnx_files.read(bench.quantize(precision=Precision.FP8, rest=rest).path)
    lowering.lower(network)  # BF16 has no kernels on a CPU
    onnx_files.write(network, tmp_path / "lowered.onnx")
    found = open_model(tmp_path / "lowered.onnx", threads=1, optimize=False).run(samples[0])["y"]
    assert sqnr(exact, found) > sqnr(exact, outputs(bench.quantize(precision=Precision.FP8), samples[0])) - 1


def test_scales_stay_normal_in_half_where_small_tensors_are_rounded(tmp_path: Path) -> None:
    # 1e-4 / 448 is no FP16; what FP8 holds of 2^-14 steps up to 1e-4 is as fine.
    samples = [{"x": sample["x"] * np.float32(1e-4)} for sample in networks.normal_samples(8, 64)]
    weight = np.random.default_rng(0).normal(size=(64, 16)) * 1e-3
    bench = Bench(tmp_path, networks.linear_map(weight), samples)
    model = bench.quantize(precision=Precision.FP8, rest="fp16")
    known = constants(model)
    assert known["x_quantized_scale"] == np.float16(2**-14)
    assert known["w_dequantized_scale"].dtype == np.float16
    assert (known["w_dequantized_scale"] >= np.float16(2**-14)).all()
    found = open_model(model.path, threads=1, optimize=False).run(samples[0])["y"]
    assert sqnr(outputs(bench.model, samples[0]), found) > 25


def test_a_mask_is_left_alone_and_said(tmp_path: Path) -> None:
    net = Net()
    net.op(
        "MatMul", [net.op("Add", ["x", net.weight("m", f32([0, 0, 0, -3.4e38]))], "masked"), net.normal("w", 4, 4)], "p"
    )
    net.op("Softmax", [net.linear("p", "logits", (4, 4))], "y")
    proto = net.model({"x": ["batch", 4]}, {"y": ["batch", 4]})
    for weight in proto.graph.initializer:
        if weight.name == "w":
            values = numpy_helper.to_array(weight).copy()
            values[3] = 0  # so that the product is finite
            weight.CopyFrom(numpy_helper.from_array(values, "w"))
    model = Bench(tmp_path, proto, networks.normal_samples(16, 4)).quantize(precision=Precision.FP8)
    assert readers(model, "MatMul") == ["--", "DD"]
    assert model.notes[:2] == (
        "FP8: 1 of 2 layers with constant weights and 1 activations (whole range); the rest stays FP32",
        "tensor 'masked' holds mask values (-3.4e+38): what reads it is not rounded",
    )


def test_a_tensor_that_is_always_zero_gets_a_scale(tmp_path: Path) -> None:
    net = Net()
    quiet = net.op("Mul", ["x", net.weight("none", f32(0))], "quiet")
    net.op("Add", [net.op("MatMul", [quiet, net.normal("w", 4, 4)], "p"), "x"], "y")
    bench = Bench(tmp_path, net.model({"x": ["batch", 4]}, {"y": ["batch", 4]}), networks.normal_samples(4, 4))
    assert constants(bench.quantize(precision=Precision.FP8))["quiet_quantized_scale"] == np.float32(1 / 448)


def test_a_transposed_convolution_stays_fp32_in_bf16(tmp_path: Path) -> None:
    net = Net()
    x = net.op("ConvTranspose", ["x", net.normal("w", 3, 2, 2, 2)], "t")
    net.op("Relu", [net.conv(x, "c", (2, 4))], "y")
    proto = net.model({"x": ["batch", 3, 4, 4]}, {"y": ["batch", 4, 5, 5]})
    model = Bench(tmp_path, proto, networks.normal_samples(8, 3, 4, 4)).quantize(precision=Precision.FP8, rest="bf16")
    types = {info.name: info.type.tensor_type.elem_type for info in graph(model).value_info}
    assert types["t"] == TensorProto.FLOAT
    assert types["c"] == TensorProto.BFLOAT16


# --- refusals -------------------------------------------------------------------------------------------------------


def test_keep_of_everything_leaves_no_fp8_model(tmp_path: Path) -> None:
    bench = Bench(tmp_path, networks.residual(), networks.normal_samples(4, 3, 16, 16))
    assert bench.refusal(precision=Precision.FP8, keep=["*"]) == (
        "model: 6 layers could be rounded to FP8, and none is left of them; at least one Conv, ConvTranspose, Gemm or "
        "MatMul with a constant weight, not kept by engines.keep or quantize.keep, was expected. Keep fewer layers, or "
        "build another precision."
    )


def test_a_tensor_that_was_not_observed_is_refused() -> None:
    network = ir.from_proto(networks.linear_map(np.eye(4)))
    with pytest.raises(CalibrationError) as caught:
        fp8.grids(placement.at_products(network.graph), {}, "fp32")
    assert caught.value.message == (
        "tensor 'x': no statistics of it; those of every tensor to be rounded were expected. "
        "Run again without the cache: --no-cache."
    )


def test_the_limit_on_the_ratio_holds(tmp_path: Path) -> None:
    bench = Bench(tmp_path, networks.residual(), networks.normal_samples(4, 3, 16, 16))
    message = bench.refusal(precision=Precision.FP8, min_sqnr_db=60.0)
    assert re.match(
        r"output 'y': SQNR \d\d\.\d dB on 4 calibration samples; at least 60 dB was expected \(quantize\.min_sqnr_db\)\. "
        r"Most is lost at '\w+' \(",
        message,
    ), message


# --- broken on purpose ----------------------------------------------------------------------------------------------


def test_scales_too_small_by_8_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(tmp_path, networks.residual(), networks.normal_samples(8, 3, 16, 16))
    assert bench.quantize(precision=Precision.FP8, min_sqnr_db=25.0).notes
    multiply_scales(monkeypatch, 1 / 8)
    assert "output 'y': SQNR" in bench.refusal(precision=Precision.FP8, min_sqnr_db=25.0)


def test_scales_too_large_by_8_show_in_nothing_but_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A power of two moves the exponents, and only what becomes subnormal loses digits: hence the test of the scales.
    bench = Bench(tmp_path, networks.convolution(), networks.normal_samples(8, 4, 8, 8))
    right = bench.quantize(precision=Precision.FP8)
    multiply_scales(monkeypatch, 8)
    wrong = bench.quantize(precision=Precision.FP8)
    assert outputs(wrong, bench.samples[3]) == pytest.approx(outputs(right, bench.samples[3]), abs=1e-4)
    peak = load(bench.statistics.path)["x"].peak
    assert constants(right)["x_quantized_scale"] == np.float32(peak) / np.float32(448)
    assert constants(wrong)["x_quantized_scale"] != np.float32(peak) / np.float32(448)


def multiply_scales(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    right = fp8.grids
    monkeypatch.setattr(
        fp8,
        "grids",
        lambda *args: {name: Grid(scale=grid.scale * np.float32(factor)) for name, grid in right(*args).items()},
    )


def test_another_fp8_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # 240 instead of 448 costs next to nothing in the ratio: only the numbers themselves show it.
    proto, samples = networks.convolution(), networks.normal_samples(8, 4, 8, 8)
    bench = Bench(tmp_path, proto, samples)
    other = formats.Steps(label="FP8", dtype=ir.DataType.FLOAT8E4M3FN, largest=240, lowest=-240, since=19)
    monkeypatch.setattr(fp8, "FP8", other)
    model = bench.quantize(precision=Precision.FP8)
    rounded = expected(proto, samples, samples[3], read=["x"], axes={"c_w": 0})
    assert outputs(model, samples[3]) != pytest.approx(rounded, abs=1e-3)
    assert sqnr(outputs(bench.model, samples[3]), outputs(model, samples[3])) > 25


def test_weights_rounded_along_the_wrong_axis_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = np.random.default_rng(0).normal(size=(16, 16)) * np.geomspace(1e-4, 1, 16)
    bench = Bench(tmp_path, networks.linear_map(weight), networks.normal_samples(16, 16))
    right = qdq._Editor._dequantize

    def wrong(self: Any, name: str, steps: Any, scale: Any, *, axis: int | None = None, **more: Any) -> Any:
        return right(self, name, steps, scale, axis=1 - axis if axis is not None else None, **more)

    assert bench.quantize(precision=Precision.FP8).notes
    monkeypatch.setattr(qdq._Editor, "_dequantize", wrong)
    assert "Most is lost at 'y'" in bench.refusal(precision=Precision.FP8)

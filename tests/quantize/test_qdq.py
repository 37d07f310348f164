"""INT8 models: what they compute, what they look like, and that a broken one is not handed on."""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import numpy_helper

from compiler import onnx_files
from compiler.backends.onnxruntime import open_model
from compiler.errors import CalibrationError, RecipeError
from compiler.quantize import fidelity, observe, placement, qdq, quantize, smooth, thresholds
from compiler.quantize.formats import Grid
from compiler.quantize.observe import TensorStatistics, load
from compiler.recipe import EngineSection, QuantizeSection
from compiler.spec import Array, OnnxModel, Precision
from tests.quantize import networks, reference
from tests.quantize.bench import NONE, Bench, constants, graph, outputs, readers, sqnr
from tests.quantize.networks import Net, f32

METHODS = ("minmax", "percentile", "entropy", "mse")


# --- what it computes -----------------------------------------------------------------------------------------------


def expected(
    proto: onnx.ModelProto,
    samples: Sequence[Mapping[str, Array]],
    feeds: Mapping[str, Array],
    *,
    made: Mapping[str, str],
    read: Sequence[str],
    axes: Mapping[str, int | None],
) -> Array:
    """The output in float64 with min-max INT8.

    Args:
        made: tensors rounded where they are made, with the tensor whose range each takes.
        read: tensors rounded only for the Conv, Gemm or MatMul that multiplies them by a weight.
        axes: channel axis of each rounded weight.
    """
    stacked = {name: np.concatenate([sample[name] for sample in samples]) for name in samples[0]}
    seen = reference.run(proto, stacked)
    scale = {name: np.abs(seen[root]).max() / 127 for name, root in {**made, **{name: name for name in read}}.items()}

    def round_made(name: str, values: Array) -> Array:
        return reference.round_to(scale[name], values) if name in made else values

    def round_read(name: str, values: Array) -> Array:
        return reference.round_to(scale[name], values) if name in read else values

    def round_weight(node: onnx.NodeProto, values: Array) -> Array:
        return reference.round_weight(values, axes[node.input[1]]) if node.input[1] in axes else values

    return reference.run(proto, feeds, made=round_made, read=round_read, weight=round_weight)["y"]


def test_a_linear_map_by_hand(tmp_path: Path) -> None:
    # Columns peak at 1.27 and 0.5, the input at 2: scales 0.01, 0.5/127 and 2/127.
    bench = Bench(tmp_path, networks.linear_map(f32([[1.27, -0.5], [0.014, 0.1]])), [{"x": f32([[2, -1]])}])
    weight = np.array([[1.27, -0.5], [0.01, 25 * 0.5 / 127]])
    # 1 is level 63.5, which rounds to the even 64; 5 is clipped to 2, its level 127.
    found = outputs(bench.quantize(), {"x": f32([[1, 5]])})
    assert found == pytest.approx(np.array([[64 * 2 / 127, 2.0]]) @ weight, abs=1e-6)


def test_a_convolution_with_bias_and_relu(tmp_path: Path) -> None:
    proto, samples = networks.convolution(), networks.normal_samples(16, 4, 8, 8)
    found = outputs(Bench(tmp_path, proto, samples).quantize(), samples[3])
    rounded = expected(proto, samples, samples[3], made={"y": "y"}, read=["x"], axes={"c_w": 0})
    assert found == pytest.approx(rounded, abs=1e-5)


def test_a_depthwise_convolution(tmp_path: Path) -> None:
    proto, samples = networks.convolution(groups=4), networks.normal_samples(16, 4, 8, 8)
    found = outputs(Bench(tmp_path, proto, samples).quantize(), samples[3])
    rounded = expected(proto, samples, samples[3], made={"y": "y"}, read=["x"], axes={"c_w": 0})
    assert found == pytest.approx(rounded, abs=1e-5)


RESIDUAL = {
    "made": {
        **{
            name: name for name in ("stem_relu", "b0_1_relu", "b0_2", "b0_relu", "b1_1_relu", "b1_2", "b1_relu", "mean")
        },
        "pool": "stem_relu",
        "flat": "mean",
    },
    "read": ["x"],
    "axes": {"stem_w": 0, "b0_1_w": 0, "b0_2_w": 0, "b1_1_w": 0, "b1_2_w": 0, "fc_w": 0},
}


def test_residual_blocks_stay_in_integers_from_input_to_classifier(tmp_path: Path) -> None:
    proto, samples = networks.residual(), networks.normal_samples(16, 3, 16, 16)
    model = Bench(tmp_path, proto, samples).quantize()
    found = outputs(model, samples[3])
    assert found == pytest.approx(expected(proto, samples, samples[3], **RESIDUAL), abs=1e-4)  # type: ignore[arg-type]
    assert readers(model, "Conv") == ["DD-"] * 5
    assert readers(model, "Add") == ["DD"] * 2
    assert readers(model, "Gemm") == ["DD-"]


def test_a_masked_transformer_block(tmp_path: Path) -> None:
    proto, samples = networks.transformer_block(), networks.masked_samples(16)
    model = Bench(tmp_path, proto, samples).quantize(smooth="off", split="off")
    read = ["x", "mixed_flat", "norm1", "gelu"]
    axes = dict.fromkeys((f"{name}_w" for name in ("q", "k", "v", "out", "up", "down")), 1)
    rounded = expected(proto, samples, samples[3], made={}, read=read, axes=axes)
    assert outputs(model, samples[3]) == pytest.approx(rounded, abs=1e-4)
    assert readers(model, "MatMul") == ["DD", "DD", "DD", "--", "--", "DD", "DD", "DD"]
    assert readers(model, "Softmax") == ["-"]
    assert readers(model, "Add") == ["--"] * 9
    assert readers(model, "LayerNormalization") == ["--"] * 2


def test_a_mask_stays_out_of_every_range(tmp_path: Path) -> None:
    model = Bench(tmp_path, networks.transformer_block(), networks.masked_samples(16)).quantize()
    scales = [value for name, value in constants(model).items() if name.endswith("_scale")]
    assert max(float(scale.max()) for scale in scales) < 1


def test_what_holds_a_mask_and_would_be_rounded_is_left_alone_and_said(tmp_path: Path) -> None:
    net = Net()
    net.op(
        "MatMul", [net.op("Add", ["x", net.weight("m", f32([0, 0, 0, -3.4e38]))], "masked"), net.normal("w", 4, 4)], "p"
    )
    net.op("Softmax", [net.linear("p", "logits", (4, 4))], "y")
    # A weight of 0 beside the mask, so that the product is finite.
    proto = net.model({"x": ["batch", 4]}, {"y": ["batch", 4]})
    for weight in proto.graph.initializer:
        if weight.name == "w":
            values = numpy_helper.to_array(weight).copy()
            values[3] = 0
            weight.CopyFrom(numpy_helper.from_array(values, "w"))
    model = Bench(tmp_path, proto, networks.normal_samples(16, 4)).quantize()
    assert readers(model, "MatMul") == ["--", "DD"]
    assert "tensor 'masked' holds mask values (-3.4e+38): what reads it is not rounded" in model.notes
    assert sum("1 of 2 layers" in note for note in model.notes) == 1


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["convolution", "residual", "transformer"])
def test_every_method_keeps_the_signal(tmp_path: Path, method: str, name: str) -> None:
    proto, samples = {
        "convolution": (networks.convolution(), networks.normal_samples(32, 4, 8, 8)),
        "residual": (networks.residual(), networks.normal_samples(32, 3, 16, 16)),
        "transformer": (networks.transformer_block(), networks.masked_samples(32)),
    }[name]
    bench = Bench(tmp_path, proto, samples[:24])
    model = bench.quantize(method=method)
    for fresh in samples[24:28]:
        assert sqnr(outputs(bench.model, fresh), outputs(model, fresh)) > 28


def test_pooling_takes_over_the_scale_of_what_it_reads(tmp_path: Path) -> None:
    model = Bench(tmp_path, networks.residual(), networks.normal_samples(8, 3, 16, 16)).quantize()
    found = constants(model)
    assert found["pool_quantized_scale"] == found["stem_relu_quantized_scale"]
    assert found["flat_quantized_scale"] == found["mean_quantized_scale"]


@pytest.mark.parametrize(("transposed", "axis"), [(0, 1), (1, 0)])
def test_the_weight_of_a_gemm_has_a_scale_per_output_column(tmp_path: Path, transposed: int, axis: int) -> None:
    net = Net()
    weight = f32([[1.27, 0.0127], [0.5, 0.01]])
    stored = net.weight("w", weight.T.copy() if transposed else weight)
    net.op("Gemm", ["x", stored, net.weight("b", f32([1, 2]))], "y", transB=transposed)
    proto = net.model({"x": ["batch", 2]}, {"y": ["batch", 2]})
    model = Bench(tmp_path, proto, networks.normal_samples(8, 2)).quantize()
    assert constants(model)["w_dequantized_scale"] == pytest.approx(f32([0.01, 0.0001]))
    dequantize = next(node for node in graph(model).node if node.output[0] == "w_dequantized")
    assert dequantize.attribute[0].i == axis
    assert constants(model)["b"].tolist() == [1, 2]


def test_a_transposed_convolution_has_a_scale_per_output_channel(tmp_path: Path) -> None:
    net = Net()
    weight = net.random.normal(size=(3, 2, 2, 2)).astype(np.float32)
    weight[:, 1] *= 100
    net.op("ConvTranspose", ["x", net.weight("w", weight)], "y")
    proto = net.model({"x": ["batch", 3, 4, 4]}, {"y": ["batch", 2, 5, 5]})
    bench = Bench(tmp_path, proto, networks.normal_samples(16, 3, 4, 4))
    model = bench.quantize()
    assert constants(model)["w_dequantized_scale"] == pytest.approx(np.abs(weight).max(axis=(0, 2, 3)) / 127)
    expected, found = (outputs(m, bench.samples[0]) for m in (bench.model, model))
    assert sqnr(expected[:, 0], found[:, 0]) > 35


def test_a_one_dimensional_convolution(tmp_path: Path) -> None:
    net = Net()
    net.op("Conv", ["x", net.normal("w", 4, 3, 5, fan_in=15)], "y")
    proto = net.model({"x": ["batch", 3, 20]}, {"y": ["batch", 4, 16]})
    bench = Bench(tmp_path, proto, networks.normal_samples(8, 3, 20))
    assert sqnr(outputs(bench.model, bench.samples[0]), outputs(bench.quantize(), bench.samples[0])) > 35


def test_a_relu6_is_part_of_its_convolution(tmp_path: Path) -> None:
    net = Net()
    bounds = [net.weight("low", f32(0)), net.weight("high", f32(0.75))]
    net.op("Clip", [net.conv("x", "c", (4, 8)), *bounds], "y")
    proto, samples = (
        net.model({"x": ["batch", 4, 8, 8]}, {"y": ["batch", 8, 8, 8]}),
        networks.normal_samples(8, 4, 8, 8),
    )
    model = Bench(tmp_path, proto, samples).quantize()
    assert readers(model, "Clip") == ["---"]
    rounded = expected(proto, samples, samples[1], made={"y": "y"}, read=["x"], axes={"c_w": 0})
    assert outputs(model, samples[1]) == pytest.approx(rounded, abs=1e-5)


def test_a_mean_over_positions_continues_the_chain(tmp_path: Path) -> None:
    net = Net()
    x = net.op("Relu", [net.conv("x", "c", (4, 8))], "r")
    x = net.op("Relu", [net.op("Add", [x, net.conv(x, "d", (8, 8))], "sum")], "joined")
    net.linear(net.op("ReduceMean", [x, net.weight("axes", np.array([2, 3]))], "mean", keepdims=0), "y", (8, 3))
    proto = net.model({"x": ["batch", 4, 8, 8]}, {"y": ["batch", 3]})
    model = Bench(tmp_path, proto, networks.normal_samples(8, 4, 8, 8)).quantize()
    assert readers(model, "Add") == ["DD", "--"]
    assert readers(model, "ReduceMean") == ["D-"]


# --- what it looks like ---------------------------------------------------------------------------------------------


@pytest.fixture
def block(tmp_path: Path) -> OnnxModel:
    return Bench(tmp_path, networks.transformer_block(), networks.masked_samples(8)).quantize()


@pytest.fixture
def convnet(tmp_path: Path) -> OnnxModel:
    return Bench(tmp_path, networks.residual(), networks.normal_samples(8, 3, 16, 16)).quantize()


@pytest.mark.parametrize("made", ["block", "convnet"])
def test_every_scale_is_normal_and_every_zero_point_a_signed_zero(made: str, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(made)
    known = constants(model)
    nodes = [node for node in graph(model).node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert nodes
    for node in nodes:
        scale, zero_point = known[node.input[1]], known[node.input[2]]
        assert scale.dtype == np.float32
        assert np.isfinite(scale).all()
        assert (scale >= np.finfo(np.float32).tiny).all()
        assert zero_point.dtype == np.int8
        assert not zero_point.any()
        assert zero_point.shape == scale.shape


@pytest.mark.parametrize("made", ["block", "convnet"])
def test_no_two_nodes_share_a_scale(made: str, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(made)
    parameters = Counter(
        name
        for node in graph(model).node
        if node.op_type in ("QuantizeLinear", "DequantizeLinear")
        for name in node.input[1:]
    )
    assert set(parameters.values()) == {1}


def test_every_product_quantizes_its_own_input(block: OnnxModel) -> None:
    made_by = {name: node for node in graph(block).node for name in node.output}
    pairs = []
    for node in graph(block).node:
        if node.op_type == "MatMul" and made_by[node.input[0]].op_type == "DequantizeLinear":
            dequantize = made_by[node.input[0]]
            pairs += [dequantize.name, made_by[dequantize.input[0]].name]
            assert made_by[dequantize.input[0]].op_type == "QuantizeLinear"
    assert len(pairs) == len(set(pairs)) == 12


def test_weights_are_stored_in_eight_bits_and_biases_in_float(convnet: OnnxModel, tmp_path: Path) -> None:
    known = constants(convnet)
    assert {name: value.dtype for name, value in known.items() if value.ndim > 1} == {
        f"{name}_w_int8": np.int8 for name in ("stem", "b0_1", "b0_2", "b1_1", "b1_2", "fc")
    }
    assert all(known[f"{name}_b"].dtype == np.float32 for name in ("stem", "b0_1", "b0_2", "b1_1", "b1_2", "fc"))


def test_the_file_shrinks_to_about_a_quarter(tmp_path: Path) -> None:
    bench = Bench(
        tmp_path, networks.linear_map(np.random.default_rng(0).normal(size=(256, 256))), networks.normal_samples(4, 256)
    )
    assert bench.quantize().path.stat().st_size < 0.28 * bench.model.path.stat().st_size


@pytest.mark.parametrize("made", ["block", "convnet"])
def test_inputs_outputs_axes_and_probe_stay(made: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    model: OnnxModel = request.getfixturevalue(made)
    original = onnx_files.describe(
        tmp_path / "model.onnx", precision=Precision.FP32, axes=model.axes, probe=tmp_path / "probe.npz"
    )
    assert (model.inputs, model.outputs, model.precision) == (original.inputs, original.outputs, Precision.INT8)
    assert model.probe is not None
    assert model.probe.parent == model.path.parent
    assert model.probe.read_bytes() == (tmp_path / "probe.npz").read_bytes()


def test_an_output_that_is_rounded_where_it_is_made_keeps_its_name(tmp_path: Path) -> None:
    bench = Bench(tmp_path, networks.convolution(), networks.normal_samples(8, 4, 8, 8))
    last = graph(bench.quantize()).node[-1]
    assert (last.op_type, list(last.output)) == ("DequantizeLinear", ["y"])


def test_the_same_run_writes_the_same_bytes(tmp_path: Path) -> None:
    bench = Bench(tmp_path, networks.transformer_block(), networks.masked_samples(8))
    assert bench.quantize(method="mse").sha256 == bench.quantize(method="mse").sha256


def test_a_weight_that_two_layers_share_is_stored_once(tmp_path: Path) -> None:
    net = Net()
    weight = net.normal("w", 8, 8, fan_in=8)
    net.op("MatMul", [net.op("Relu", [net.op("MatMul", ["x", weight], "p")], "r"), weight], "y")
    bench = Bench(tmp_path, net.model({"x": ["batch", 8]}, {"y": ["batch", 8]}), networks.normal_samples(16, 8))
    stored = {
        name: value.shape
        for name, value in constants(bench.quantize()).items()
        if value.dtype == np.int8 and value.ndim
    }
    assert stored == {"w_int8": (8, 8), "w_dequantized_zero_point": (8,), "w_dequantized_2_zero_point": (8,)}


def test_a_weight_that_others_read_too_stays_in_float_for_them(tmp_path: Path) -> None:
    net = Net()
    weight = net.normal("w", 8, 8, fan_in=8)
    net.op("Add", [net.op("MatMul", ["x", weight], "p"), net.op("ReduceSum", [weight], "s", keepdims=0)], "y")
    bench = Bench(tmp_path, net.model({"x": ["batch", 8]}, {"y": ["batch", 8]}), networks.normal_samples(16, 8))
    found = constants(bench.quantize())
    assert found["w"].dtype == np.float32
    assert found["w_int8"].dtype == np.int8


def test_weights_held_by_constant_nodes_are_weights(tmp_path: Path) -> None:
    proto = networks.linear_map(np.eye(4))
    weight = proto.graph.initializer.pop()
    proto.graph.node.insert(0, onnx.helper.make_node("Constant", [], ["w"], value=weight))
    model = Bench(tmp_path, proto, networks.normal_samples(4, 4)).quantize()
    assert constants(model)["w_int8"].tolist() == (127 * np.eye(4)).tolist()


def test_names_that_are_taken_are_not_taken_again(tmp_path: Path) -> None:
    net = Net()
    x = net.op("Relu", ["x"], "x_quantized")
    net.op("Add", [net.op("MatMul", ["x", net.normal("w", 4, 4)], "w_dequantized"), x], "y")
    bench = Bench(tmp_path, net.model({"x": ["batch", 4]}, {"y": ["batch", 4]}), networks.normal_samples(8, 4))
    made = [name for node in graph(bench.quantize()).node for name in node.output]
    assert len(made) == len(set(made))
    assert {"x_quantized", "w_dequantized", "x_quantized_2", "w_dequantized_2"} <= set(made)


def test_the_notes_say_what_was_done_and_how_close_it_is(convnet: OnnxModel) -> None:
    assert (
        convnet.notes[0] == "INT8: 6 of 6 layers with constant weights and 11 activations (minmax); the rest stays FP32"
    )
    assert re.fullmatch(r"SQNR against FP32 on 8 calibration samples: y \d\d\.\d dB", convnet.notes[1])


def test_products_of_two_activations_are_counted(block: OnnxModel) -> None:
    assert "2 products of two activations stay FP32" in block.notes


# --- attention ------------------------------------------------------------------------------------------------------


@pytest.fixture
def attention(tmp_path: Path) -> Bench:
    return Bench(tmp_path, networks.transformer_block(), networks.masked_samples(24), attention=True)


@pytest.mark.parametrize("precision", [Precision.INT8, Precision.FP8])
def test_attention_is_rounded_on_request_each_operand_for_itself(attention: Bench, precision: Precision) -> None:
    off, on = (attention.quantize(precision=precision, attention=how, smooth="off") for how in ("off", "on"))
    made_by = {name: node for node in graph(on).node for name in node.output}
    products = {node.output[0]: node for node in graph(on).node if node.output[0] in ("scores", "mixed")}
    operands = [made_by[name] for node in products.values() for name in node.input]
    assert [node.op_type for node in operands] == ["DequantizeLinear"] * 4
    rounded = [made_by[made_by[node.input[0]].input[0]].output[0] for node in operands]
    assert rounded == ["q_t", "k_t", "weights", "v_t"]
    assert "both operands of 2 products of two activations are rounded" in on.notes
    assert not any("products of two activations stay" in note for note in on.notes)
    # Scores, which hold a mask further on, are read as they are; so is what Softmax reads.
    assert not {"scores", "scaled", "kept"} & {
        node.input[0] for node in graph(on).node if node.op_type == "QuantizeLinear"
    }
    assert not any(name.endswith("_t_dequantized") for node in graph(off).node for name in node.output)
    exact = outputs(attention.model, attention.samples[0])
    assert sqnr(exact, outputs(on, attention.samples[0])) > (30 if precision is Precision.INT8 else 20)


def test_probabilities_reach_from_zero_to_their_peak(attention: Bench) -> None:
    stored = constants(attention.quantize(attention="on", activations="asymmetric", smooth="off"))
    assert stored["weights_quantized_zero_point"] == -128
    assert stored["weights_quantized_scale"] <= 1.0001 / 255


def test_a_product_of_activations_can_be_kept(attention: Bench) -> None:
    model = attention.quantize(attention="on", keep=["mixed"], smooth="off")
    assert "both operands of 1 products of two activations are rounded" in model.notes
    assert "1 products of two activations stay FP32" in model.notes
    mixed = next(node for node in graph(model).node if node.output[0] == "mixed")
    assert list(mixed.input) == ["weights", "v_t"]


def test_attention_that_calibration_did_not_look_at_is_refused(tmp_path: Path) -> None:
    bench = Bench(tmp_path, networks.transformer_block(), networks.masked_samples(24))
    assert "no statistics of it" in bench.refusal(attention="on")


def test_attention_with_wrong_scales_is_refused(attention: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    right = qdq.grids

    def wrong(*args: Any, **kwargs: Any) -> dict[str, Grid]:
        found = right(*args, **kwargs)
        return {**found, "weights": Grid(scale=found["weights"].scale * np.float32(32))}

    assert attention.quantize(attention="on", min_sqnr_db=25.0).notes
    monkeypatch.setattr(qdq, "grids", wrong)
    assert "output 'y': SQNR" in attention.refusal(attention="on", min_sqnr_db=25.0)


def test_samples_that_set_no_range_are_preferred_for_the_comparison(tmp_path: Path) -> None:
    bench = Bench(tmp_path, networks.convolution(), networks.normal_samples(30, 4, 8, 8))
    bench.statistics = replace(bench.statistics, samples=24)
    assert bench.quantize().notes[-1].startswith("SQNR against FP32 on 6 calibration samples that set no range: y ")


# --- keep -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["node_b0_1", "b0_1", "b0_1_relu", "node_b0_1*", "b0_?"])
def test_a_kept_layer_stays_in_high_precision(tmp_path: Path, pattern: str) -> None:
    bench = Bench(tmp_path, networks.residual(), networks.normal_samples(8, 3, 16, 16))
    model = bench.quantize(keep=[pattern])
    assert constants(model)["b0_1_w"].dtype == np.float32
    assert "b0_1_w_int8" not in constants(model)
    assert constants(model)["stem_w_int8"].dtype == np.int8
    assert sqnr(outputs(bench.model, bench.samples[0]), outputs(model, bench.samples[0])) > 28


def test_a_kept_addition_is_not_rounded_and_neither_is_what_follows_it(tmp_path: Path) -> None:
    bench = Bench(tmp_path, networks.residual(), networks.normal_samples(8, 3, 16, 16))
    model = bench.quantize(keep=["*_sum"])
    assert not {"b0_relu_quantized", "b0_sum_quantized"} & {
        n.output[0] for n in graph(model).node if n.op_type == "Add"
    }
    # Convolutions quantise their outputs and what they read all the same.
    assert readers(model, "Conv") == ["DD-"] * 5


def test_keep_of_the_section_and_of_the_engine_add_up(tmp_path: Path) -> None:
    bench = Bench(tmp_path, networks.residual(), networks.normal_samples(8, 3, 16, 16))
    assert constants(bench.quantize(keep=["stem"]))["fc_w_int8"].dtype == np.int8
    out_dir = tmp_path / "both"
    out_dir.mkdir()
    both = quantize(
        EngineSection(precision=Precision.INT8, keep=("stem",)),
        QuantizeSection(keep=("y",)),
        bench.model,
        bench.statistics,
        bench.data,
        open_model=open_model,
        threads=1,
        out_dir=out_dir,
    )
    assert {"stem_w", "fc_w"} <= constants(both).keys()


def test_keep_that_matches_nothing_names_what_is_near(tmp_path: Path) -> None:
    bench = Bench(tmp_path, networks.residual(), networks.normal_samples(8, 3, 16, 16))
    assert bench.refusal(RecipeError, keep=["b0_1_rel"]) == (
        "keep: 'b0_1_rel' matches no node and no tensor of the model; the nearest names are 'b0_1_relu', 'b1_1_relu', "
        "'b1_relu'. Correct it, or remove it."
    )


def test_keep_of_everything_leaves_no_int8_model(tmp_path: Path) -> None:
    bench = Bench(tmp_path, networks.residual(), networks.normal_samples(8, 3, 16, 16))
    assert bench.refusal(keep=["*"]) == (
        "model: 6 layers could be rounded to INT8, and none is left of them; at least one Conv, ConvTranspose, Gemm or "
        "MatMul with a constant weight, not kept by engines.keep or quantize.keep, was expected. Keep fewer layers, or "
        "build another precision."
    )


# --- broken on purpose ----------------------------------------------------------------------------------------------


def test_a_scale_8_times_too_small_is_refused_with_the_tensor_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(tmp_path, networks.residual(), networks.normal_samples(8, 3, 16, 16))
    right = qdq.grids

    def wrong(*args: Any, **kwargs: Any) -> dict[str, Grid]:
        found = right(*args, **kwargs)
        return {**found, "b0_1_relu": Grid(scale=found["b0_1_relu"].scale / np.float32(8))}

    monkeypatch.setattr(qdq, "grids", wrong)
    message = bench.refusal(min_sqnr_db=25.0)
    assert re.fullmatch(
        r"output 'y': SQNR \d+\.\d dB on 8 calibration samples; at least 25 dB was expected \(quantize\.min_sqnr_db\)\. "
        r"Most is lost at 'b0_1_relu' \(\d+\.\d to \d+\.\d dB\), '\w+' \(.* dB\), '\w+' \(.* dB\)\. Keep these in high "
        r"precision \(engines\.keep\), or try another quantize\.method\.",
        message,
    ), message


@pytest.mark.parametrize("factor", [8, 1 / 8])
def test_all_scales_off_by_8_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    bench = Bench(tmp_path, networks.residual(), networks.normal_samples(8, 3, 16, 16))
    right = thresholds.grid
    assert bench.quantize(min_sqnr_db=35.0).notes
    monkeypatch.setattr(
        thresholds, "grid", lambda *args, **more: Grid(scale=right(*args, **more).scale * np.float32(factor))
    )
    assert "output 'y': SQNR" in bench.refusal(min_sqnr_db=35.0)


def test_weights_rounded_along_the_wrong_axis_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Scales of rows used for columns: what a mix-up of axes in the attribute alone does to a square weight.
    weight = np.random.default_rng(0).normal(size=(16, 16)) * np.geomspace(0.01, 1, 16)
    bench = Bench(tmp_path, networks.linear_map(weight), networks.normal_samples(16, 16))
    right = qdq._Editor._dequantize

    def wrong(self: Any, name: str, steps: Any, scale: Any, *, axis: int | None = None, **more: Any) -> Any:
        return right(self, name, steps, scale, axis=1 - axis if axis is not None else None, **more)

    assert bench.quantize().notes
    monkeypatch.setattr(qdq._Editor, "_dequantize", wrong)
    assert "Most is lost at 'y'" in bench.refusal()


def test_two_scales_that_are_swapped_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = Net()
    small = net.op("Mul", ["x", net.weight("tenth", f32(0.01))], "small")
    net.op("Add", [net.linear("x", "p", (8, 8)), net.linear(small, "q", (8, 8))], "y")
    bench = Bench(tmp_path, net.model({"x": ["batch", 8]}, {"y": ["batch", 8]}), networks.normal_samples(16, 8))
    right = qdq.grids

    def wrong(*args: Any, **kwargs: Any) -> dict[str, Grid]:
        found = right(*args, **kwargs)
        return {"x": found["small"], "small": found["x"]}

    assert bench.quantize().notes
    monkeypatch.setattr(qdq, "grids", wrong)
    assert "Most is lost at 'x'" in bench.refusal()


@pytest.mark.parametrize("zero_point", [-128, 64])
def test_zero_points_where_there_should_be_none_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zero_point: int
) -> None:
    bench = Bench(tmp_path, networks.linear_map(np.eye(8)), networks.normal_samples(16, 8))
    right = thresholds.grid
    assert bench.quantize(min_sqnr_db=30.0).notes
    monkeypatch.setattr(
        thresholds, "grid", lambda *args, **more: Grid(scale=right(*args, **more).scale, zero_point=zero_point)
    )
    assert "Most is lost at 'x'" in bench.refusal(min_sqnr_db=30.0)


def test_a_zero_point_that_is_read_as_another_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(tmp_path, networks.residual(), networks.normal_samples(8, 3, 16, 16))
    right = qdq._Editor._dequantize

    def wrong(self: Any, name: str, steps: Any, scale: Any, *, zero_point: int = 0, **more: Any) -> Any:
        return right(self, name, steps, scale, zero_point=0, **more)

    assert bench.quantize(activations="asymmetric", min_sqnr_db=30.0).notes
    monkeypatch.setattr(qdq._Editor, "_dequantize", wrong)
    assert "output 'y': SQNR" in bench.refusal(activations="asymmetric")
    assert bench.quantize(min_sqnr_db=30.0).notes, "a symmetric grid has none"


# --- ranges that are not centred on zero ----------------------------------------------------------------------------


def zero_points(model: OnnxModel) -> dict[str, int]:
    """By name of a rounded activation."""
    stored = constants(model)
    return {node.input[0]: int(stored[node.input[2]]) for node in graph(model).node if node.op_type == "QuantizeLinear"}


def test_after_a_relu_an_asymmetric_range_begins_at_zero(tmp_path: Path) -> None:
    bench = Bench(tmp_path, networks.residual(), networks.normal_samples(8, 3, 16, 16))
    symmetric, shifted = bench.quantize(), bench.quantize(activations="asymmetric")
    assert set(zero_points(symmetric).values()) == {0}
    found = zero_points(shifted)
    assert {name: found[name] for name in found if "relu" in name} == dict.fromkeys(
        [name for name in found if "relu" in name], -128
    )
    assert found["b0_1_relu"] == -128
    assert over_all(bench, shifted) > over_all(bench, symmetric) + 2


def test_auto_is_symmetric_for_whoever_does_not_say_which_back_end(tmp_path: Path) -> None:
    bench = Bench(tmp_path, networks.residual(), networks.normal_samples(8, 3, 16, 16))
    assert set(zero_points(bench.quantize(activations="auto")).values()) == {0}


# --- additions ------------------------------------------------------------------------------------------------------


def scales_of_joins(model: OnnxModel) -> dict[str, list[tuple[float, int]]]:
    """By name of what an Add makes: scale and zero point of each operand."""
    stored, nodes = constants(model), graph(model).node
    made_by = {name: node for node in nodes for name in node.output}
    found = {}
    for node in nodes:
        makers = [made_by[name] for name in node.input if name in made_by] if node.op_type == "Add" else []
        if len(makers) == 2 and {maker.op_type for maker in makers} == {"DequantizeLinear"}:
            found[node.output[0]] = [(float(stored[m.input[1]]), int(stored[m.input[2]])) for m in makers]
    return found


@pytest.mark.parametrize("method", ["minmax", "mse", "auto"])
@pytest.mark.parametrize("activations", ["symmetric", "asymmetric"])
def test_what_is_added_has_one_scale_on_request(tmp_path: Path, method: str, activations: str) -> None:
    bench = Bench(tmp_path, networks.residual(), networks.normal_samples(24, 3, 16, 16))
    own = scales_of_joins(bench.quantize(method=method, activations=activations))
    model = bench.quantize(method=method, activations=activations, joins="shared")
    shared = scales_of_joins(model)
    assert own.keys() == shared.keys() == {"b0_sum", "b1_sum"}
    assert all(first != second for first, second in own.values())
    assert all(first == second for first, second in shared.values())
    assert "one scale for what is added: 4 activations have 2 scales" in model.notes
    if method == "minmax" and activations == "symmetric":
        for name, scales in shared.items():
            assert scales[0] == max(own[name]), "all of both"


def test_one_scale_reaches_through_what_is_added_twice() -> None:
    """``a + b`` and ``b + c``: all three have the scale of ``a``; what a pool moves has that of what it reads."""
    net = Net()
    for name in "abc":
        net.conv("x", name, (4, 4))
    pooled = net.op("MaxPool", [net.op("Add", ["a", "b"], "ab")], "pooled", kernel_shape=[1, 1])
    net.op("Add", [net.op("Add", ["b", "c"], "bc"), pooled], "sum")
    net.op("Relu", [net.conv("sum", "last", (4, 4))], "y")
    proto = net.model({"x": ["batch", 4, 8, 8]}, {"y": ["batch", 4, 8, 8]})
    placed = placement.place(ir.from_proto(proto).graph, one_scale=True)
    root = {value.name: of.name for value, of in placed.root.items()}
    assert {root["a"], root["b"], root["c"]} == {"a"}
    assert root["pooled"] == root["ab"] == root["bc"]
    together = {value.name: {one.name for one in of} for value, of in placed.shared.items()}
    assert together == {"a": {"a", "b", "c"}, root["bc"]: {"ab", "bc"}}
    observed = {name: TensorStatistics(low=-float(place), high=1.0) for place, name in enumerate("abc")}
    first = next(value for value in placed.shared if value.name == "a")
    found = qdq.range_of(placed, first, observed)
    assert found is not None and (found.low, found.high) == (-2.0, 1.0)
    del observed["c"]
    assert qdq.range_of(placed, first, observed) is None


def test_the_range_of_what_smoothing_made_holds_all_of_it(tmp_path: Path) -> None:
    proto, samples = outlying()
    samples = [{"x": np.abs(sample["x"])} for sample in samples]
    bench = Bench(tmp_path, proto, samples)
    model = bench.quantize(activations="asymmetric", split="off")
    assert zero_points(model) == {"wide_smoothed": -128}
    assert over_all(bench, model) > over_all(bench, bench.quantize(split="off")) + 0.5  # the rest is the weight's


def over_all(bench: Bench, model: OnnxModel) -> float:
    """Ratio in dB over all samples."""
    exact, found = (np.concatenate([outputs(one, sample) for sample in bench.samples]) for one in (bench.model, model))
    return sqnr(exact, found)


def test_what_calibration_noticed_stands_in_the_refusal(tmp_path: Path) -> None:
    samples = networks.normal_samples(64, 8)
    samples[5]["x"] *= 1e4
    bench = Bench(tmp_path, networks.linear_map(np.eye(8)), samples)
    message = bench.refusal(min_sqnr_db=1000.0)
    assert "Calibration noted: calibration sample 5: input 'x' reaches" in message


def test_an_output_that_is_finite_in_one_model_only_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = Net()
    net.op("Log", [net.op("Relu", [net.linear("x", "p", (8, 8))], "r")], "l")
    net.op("Exp", ["l"], "y")
    proto = net.model({"x": ["batch", 8]}, {"y": ["batch", 8], "l": ["batch", 8]})
    assert re.fullmatch(
        r"output 'l': \d+ values on 16 calibration samples are finite in one of the FP32 and the quantised model and not "
        r"in the other; finite values were expected. Keep layers in high precision \(engines.keep\).",
        Bench(tmp_path, proto, networks.normal_samples(16, 8)).refusal(),
    )


def test_statistics_of_another_model_are_refused(tmp_path: Path) -> None:
    bench = Bench(tmp_path, networks.convolution(), networks.normal_samples(8, 4, 8, 8))
    bench.statistics = replace(bench.statistics, model_sha256="0" * 64)
    assert bench.refusal() == (
        f"{bench.statistics.path}: observed on model 000000000000; statistics of {bench.model.sha256[:12]} were expected. "
        "Run again without the cache: --no-cache."
    )


def test_a_tensor_that_was_not_observed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(tmp_path, networks.convolution(), networks.normal_samples(8, 4, 8, 8))
    known = {name: found for name, found in load(bench.statistics.path).items() if name != "y"}
    monkeypatch.setattr(sys.modules["compiler.quantize"], "load", lambda _: known)
    assert bench.refusal() == (
        "tensor 'y': no statistics of it; those of every tensor to be rounded were expected. "
        "Run again without the cache: --no-cache."
    )


def test_an_opset_before_scales_per_channel_is_refused(tmp_path: Path) -> None:
    net = Net()
    net.op("MatMul", ["x", net.normal("w", 4, 4)], "y")
    proto = net.model({"x": ["batch", 4]}, {"y": ["batch", 4]}, opset=12)
    assert Bench(tmp_path, proto, networks.normal_samples(8, 4)).refusal() == (
        "model: its opset is 12; INT8 needs 13 or later. Export it again with a newer opset."
    )


# --- degenerate input: an error that says so, or a model that is right ----------------------------------------------


def degenerate(case: str) -> tuple[onnx.ModelProto, list[dict[str, Array]]]:
    samples = networks.normal_samples(16, 4, 8, 8)
    proto = networks.convolution()
    weights = {weight.name: weight for weight in proto.graph.initializer}
    kernel = numpy_helper.to_array(weights["c_w"]).copy()
    if case == "all zero":
        samples = [{"x": np.zeros_like(sample["x"])} for sample in samples]
    elif case == "constant":
        samples = [{"x": np.full_like(sample["x"], 0.5)} for sample in samples]
    elif case == "one NaN sample":
        samples[5]["x"][0, 0, 0, 0] = np.nan
    elif case == "all NaN":
        samples = [{"x": np.full_like(sample["x"], np.nan)} for sample in samples]
    elif case == "one Inf sample":
        samples[5]["x"][0, 0, 0, 0] = np.inf
    elif case == "NaN weight":
        kernel[0, 0, 0, 0] = np.nan
    elif case == "Inf weight":
        kernel[0, 0, 0, 0] = np.inf
    elif case == "zero channel":
        kernel[3] = 0
    elif case == "one weight 1e30":
        kernel[2, 0, 0, 0] = 1e30
    elif case == "denormal weights":
        kernel *= 1e-40
    elif case == "data at 1e37":
        samples = [{"x": sample["x"] * np.float32(1e37)} for sample in samples]
        kernel /= 100
    weights["c_w"].CopyFrom(numpy_helper.from_array(kernel, "c_w"))
    return proto, samples


ENDS_IN_AN_ERROR = {
    "all zero": "calibration set: every sample is all zero",
    "constant": "calibration set: every sample is constant",
    "one NaN sample": "calibration sample 5: input 'x' holds NaN or Inf",
    "all NaN": "calibration sample 0: input 'x' holds NaN or Inf",
    "one Inf sample": "calibration sample 5: input 'x' holds NaN or Inf",
    "NaN weight": "weight 'c_w' of Conv 'node_c': 1 of 288 values are NaN or Inf",
    "Inf weight": "weight 'c_w' of Conv 'node_c': 1 of 288 values are NaN or Inf",
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "case", [*ENDS_IN_AN_ERROR, "good", "zero channel", "one weight 1e30", "denormal weights", "data at 1e37"]
)
def test_a_degenerate_case_ends_in_an_error_or_in_a_model_that_is_right(tmp_path: Path, case: str, method: str) -> None:
    proto, samples = degenerate(case)
    if case in ENDS_IN_AN_ERROR:
        with pytest.raises(CalibrationError) as caught:
            Bench(tmp_path, proto, samples).quantize(method=method)
        assert caught.value.message.startswith(ENDS_IN_AN_ERROR[case])
        return
    bench = Bench(tmp_path, proto, samples)
    if case == "one weight 1e30" and method == "entropy":  # which clips its channel
        assert "output 'y': SQNR" in bench.refusal(method=method)
        return
    model = bench.quantize(method=method)
    fresh = {
        "x": np.random.default_rng(77).normal(size=(4, 4, 8, 8)).astype(np.float32) * np.abs(samples[0]["x"]).max() / 3
    }
    for optimize in (False, True):
        exact, found = outputs(bench.model, fresh).astype(float), outputs(model, fresh, optimize=optimize).astype(float)
        assert np.isfinite(found).all()
        assert sqnr(exact, found) > 20


@pytest.mark.parametrize("samples", [0, 3])
def test_an_empty_or_short_set_is_refused(tmp_path: Path, samples: int) -> None:
    model = networks.save(networks.convolution(), tmp_path / "model.onnx")
    data = networks.calibration(tmp_path / "data", networks.normal_samples(max(samples, 1), 4, 8, 8))
    (tmp_path / "out").mkdir()
    with pytest.raises(CalibrationError, match=f"calibration set: {samples} samples to use"):
        observe(
            model, data, samples=samples, min_samples=16, open_model=open_model, threads=1, out_dir=tmp_path / "out"
        )


def test_channels_of_zeros_are_noted_and_get_a_scale(tmp_path: Path) -> None:
    proto, samples = degenerate("zero channel")
    model = Bench(tmp_path, proto, samples).quantize()
    assert "weight 'c_w': 1 of 8 channels are all zero" in model.notes
    scales = constants(model)["c_w_dequantized_scale"]
    assert scales[3] == scales.max()
    assert not constants(model)["c_w_int8"][3].any()


def test_a_large_bias_beside_tiny_weights_survives_a_runtime_that_holds_biases_in_integers(tmp_path: Path) -> None:
    net = Net()
    weight = net.random.normal(size=(4, 2, 3, 3)).astype(np.float32)
    weight[1] *= 1e-12
    net.op("Conv", ["x", net.weight("w", weight), net.weight("b", f32([0, 5, 0, 0]))], "y")
    bench = Bench(
        tmp_path, net.model({"x": ["batch", 2, 6, 6]}, {"y": ["batch", 4, 4, 4]}), networks.normal_samples(8, 2, 6, 6)
    )
    model = bench.quantize()
    for optimize in (False, True):
        assert outputs(model, bench.samples[0], optimize=optimize)[:, 1] == pytest.approx(5, abs=0.2)
    known = constants(model)
    steps = 5 / (known["x_dequantized_scale"] * known["w_dequantized_scale"][1])
    assert steps == pytest.approx(2**30)


def test_the_scale_of_an_ordinary_channel_does_not_depend_on_its_bias() -> None:
    weight = f32(np.random.default_rng(0).normal(size=(4, 8)))
    _, without, _ = qdq.round_weight(weight, 0)
    _, beside, _ = qdq.round_weight(weight, 0, bias=f32([3, -4, 0, 1]), input_scale=0.02)
    assert without.tolist() == beside.tolist()


# --- outlying channels ----------------------------------------------------------------------------------------------


def outlying(kind: str = "MatMul") -> tuple[onnx.ModelProto, list[dict[str, Array]]]:
    """Two of 32 channels 60 times the others, and rows of the weight that make up for it."""
    random = np.random.default_rng(0)
    factors = np.ones(32)
    factors[[3, 17]] = 60
    net = Net()
    net.op("Mul", ["x", net.weight("outliers", f32(factors))], "wide")
    weight = f32(random.normal(size=(32, 16)) / factors[:, None])
    if kind == "MatMul":
        net.op("MatMul", ["wide", net.weight("w", weight)], "y")
    else:
        net.op("Gemm", ["wide", net.weight("w", weight.T.copy())], "y", transB=1)
    return net.model({"x": ["batch", 32]}, {"y": ["batch", 16]}), networks.normal_samples(32, 32)


def test_outlying_channels_are_smoothed_and_that_pays(tmp_path: Path) -> None:
    proto, samples = outlying()
    bench = Bench(tmp_path, proto, samples)
    smoothed = bench.quantize()
    assert any(
        re.fullmatch(r"smoothed .*: 1 of 1 activations, expected error \d\d dB lower", note) for note in smoothed.notes
    )
    plain = bench.quantize(smooth="off", split="off", min_sqnr_db=NONE)
    exact = outputs(bench.model, samples[0])
    assert sqnr(exact, outputs(smoothed, samples[0])) > 35
    assert sqnr(exact, outputs(plain, samples[0])) < 25


@pytest.mark.parametrize("kind", ["MatMul", "Gemm"])
def test_smoothing_changes_nothing_but_the_rounding(tmp_path: Path, kind: str) -> None:
    proto, samples = outlying(kind)
    bench = Bench(tmp_path, proto, samples)
    network = onnx_files.read(bench.model.path)
    found = smooth.smooth(network.graph, placement.place(network.graph), load(bench.statistics.path))
    assert list(found.made) == ["wide_smoothed"]
    onnx_files.write(network, tmp_path / "smoothed.onnx")
    again = open_model(tmp_path / "smoothed.onnx").run(samples[0])["y"]
    assert again == pytest.approx(outputs(bench.model, samples[0]), rel=1e-4, abs=1e-5)


def test_even_channels_are_left_alone() -> None:
    random = np.random.default_rng(0)
    weight = f32(random.normal(size=(64, 64)))
    assert smooth.choose(np.full(64, 4.0), np.ones(64), weight) is None
    assert smooth.choose(np.zeros(64), np.zeros(64), weight) is None


def test_a_remedy_may_be_asked_for_whatever_it_costs_and_forbidden_whatever_it_gains() -> None:
    random = np.random.default_rng(0)
    weight = random.normal(size=(128, 64))
    slight = np.where(np.arange(128) == 3, 1.3, 1.0)
    assert smooth.choose(slight, slight**2 / 10, weight) is None
    assert smooth.choose(slight, slight**2 / 10, weight, smoothing="on", splitting="off") is not None
    assert smooth.choose(slight, slight**2 / 10, weight, smoothing="off", splitting="on") is not None
    huge = np.where(np.arange(128) == 3, 300.0, 1.0)
    assert smooth.choose(huge, huge**2 / 10, weight) is not None
    assert smooth.choose(huge, huge**2 / 10, weight, smoothing="off", splitting="off") is None


def split_off(kind: str = "MatMul", bias: bool = True) -> tuple[onnx.ModelProto, list[dict[str, Array]]]:
    """Three channels that are 300 times the others and mean as much: no factor helps, since their weights are large, too."""
    net = Net(8)
    gain = np.ones(128, np.float32)
    gain[[5, 70, 99]] = 300
    net.op("Mul", ["x", net.weight("gain", gain)], "wide")
    weight = net.random.normal(size=(128, 16)).astype(np.float32)
    net.weight("w", weight if kind == "MatMul" else np.ascontiguousarray(weight.T))
    row = net.normal("row", 16)
    if kind == "Gemm":
        net.op("Gemm", ["wide", "w", row], "y", transB=1, alpha=0.5)
    elif bias:
        net.op("Add", [net.op("MatMul", ["wide", "w"], "product"), row], "y")
    else:
        net.op("MatMul", ["wide", "w"], "y")
    return net.model({"x": ["batch", 128]}, {"y": ["batch", 16]}), networks.normal_samples(32, 128)


@pytest.mark.parametrize(("kind", "bias"), [("MatMul", True), ("MatMul", False), ("Gemm", True)])
def test_a_few_outlying_channels_are_multiplied_in_high_precision(tmp_path: Path, kind: str, bias: bool) -> None:
    proto, samples = split_off(kind, bias)
    bench = Bench(tmp_path, proto, samples)
    network = onnx_files.read(bench.model.path)
    found = smooth.smooth(network.graph, placement.place(network.graph), load(bench.statistics.path))
    assert found.split == 1
    assert len(found.apart) == 1
    onnx_files.write(network, tmp_path / "split.onnx")
    exact = outputs(bench.model, samples[0])
    # Nothing is changed but what is rounded.
    assert open_model(tmp_path / "split.onnx").run(samples[0])["y"] == pytest.approx(exact, rel=1e-4, abs=1e-3)
    # The noise that is left is that of the other channels; the signal is that of all.
    model = bench.quantize()
    assert any("with channels in high precision" in note for note in model.notes)
    assert sqnr(exact, outputs(model, samples[0])) > 60
    assert sqnr(exact, outputs(bench.quantize(split="off", min_sqnr_db=NONE), samples[0])) < 50
    weights = constants(model)
    assert [weight.shape for weight in weights.values() if weight.shape[:1] == (8,) and weight.ndim == 2] == [(8, 16)]


def test_few_channels_are_not_split() -> None:
    """8 of 64 would be an eighth of the work in high precision."""
    weight = np.random.default_rng(0).normal(size=(64, 16))
    peaks = np.ones(64)
    peaks[3] = 300
    remedy = smooth.choose(peaks, peaks**2 / 10, weight)
    assert remedy is None or not remedy.split.size


def test_the_expected_error_is_the_measured_one() -> None:
    random = np.random.default_rng(0)
    values, weight = random.normal(size=(4000, 32)), random.normal(size=(32, 16))
    values[:, 3] *= 20
    peaks, mean_squares = np.abs(values).max(0), (values**2).mean(0)
    for factors in (np.ones(32), peaks**0.8):
        rounded = reference.round_to((peaks / factors).max() / 127, values / factors)
        product = rounded @ reference.round_weight(weight * factors[:, None], 1)
        measured = float(np.mean(np.sum((product - values @ weight) ** 2, axis=1)))
        assert smooth.expected_error(peaks, mean_squares, weight, factors) == pytest.approx(measured, rel=0.15)


def test_a_dead_channel_has_a_factor_that_is_a_number() -> None:
    peaks = f32([0, 1, 100])
    remedy = smooth.choose(peaks, peaks**2 / 10, f32([[0, 0], [1, 1], [0.01, 0.02]]))
    assert remedy is not None
    factors = remedy.factors
    assert np.isfinite(factors).all()
    assert (factors > 0).all()


# --- other precisions -----------------------------------------------------------------------------------------------


def test_the_rest_of_an_int8_model_can_be_fp16(tmp_path: Path) -> None:
    bench = Bench(tmp_path, networks.transformer_block(), networks.masked_samples(16))
    model = bench.quantize(rest="fp16")
    assert (model.inputs, model.outputs, model.precision) == (bench.model.inputs, bench.model.outputs, Precision.INT8)
    known = constants(model)
    assert {value.dtype for name, value in known.items() if name.endswith("_int8")} == {np.dtype(np.int8)}
    assert known["norm1_g"].dtype == np.float16
    assert sqnr(outputs(bench.model, bench.samples[0]), outputs(model, bench.samples[0])) > 28


def test_an_fp16_model_says_how_close_it_is(tmp_path: Path) -> None:
    bench = Bench(tmp_path, networks.transformer_block(), networks.masked_samples(16))
    model = bench.quantize(precision=Precision.FP16)
    assert model.precision is Precision.FP16
    assert re.fullmatch(r"SQNR against FP32 on 16 calibration samples: y [67]\d\.\d dB", model.notes[-1])


def test_a_bf16_model_is_written_without_being_run(tmp_path: Path) -> None:
    bench = Bench(tmp_path, networks.transformer_block(), networks.masked_samples(16))
    model = bench.quantize(precision=Precision.BF16)
    assert model.precision is Precision.BF16
    assert not [note for note in model.notes if "SQNR" in note]


def test_the_ratio_of_a_model_without_float_outputs_is_not_measured(tmp_path: Path) -> None:
    proto = networks.linear_map(np.eye(4))
    proto.graph.node[0].output[0] = "p"
    proto.graph.node.append(onnx.helper.make_node("ArgMax", ["p"], ["y"], axis=1, keepdims=0, name="best"))
    del proto.graph.output[:]
    proto.graph.output.append(onnx.helper.make_tensor_value_info("y", onnx.TensorProto.INT64, ["batch"]))
    bench = Bench(tmp_path, proto, networks.normal_samples(8, 4))
    assert bench.quantize().notes[-1] == "the quantised model has no float output: its SQNR was not measured"


def test_the_ratio_counts_at_most_16_samples(tmp_path: Path) -> None:
    assert fidelity.SAMPLES == 16
    bench = Bench(tmp_path, networks.convolution(), networks.normal_samples(40, 4, 8, 8))
    assert bench.quantize().notes[-1].startswith("SQNR against FP32 on 16 calibration samples: y ")

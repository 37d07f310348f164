"""What an engine computes in, against what its model asks for; every way to depart is planted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from compiler.backends.onnxruntime import open_model
from compiler.backends.tensorrt import precision
from compiler.backends.tensorrt.precision import Asked, NetworkLayer, NetworkTensor
from compiler.quantize import observe, quantize
from compiler.recipe import EngineSection, QuantizeSection
from compiler.spec import Departure, OnnxModel, Precision, PrecisionProof
from tests.quantize import networks

STORED = 40_000


def tensor(name: str, dtype: str) -> NetworkTensor:
    return NetworkTensor(name=name, dtype=dtype)


def layer(kind: str, node: str, inputs: list[NetworkTensor], output: NetworkTensor) -> NetworkLayer:
    return NetworkLayer(name=node, kind=kind, metadata=f"[ONNX Layer: {node}]", inputs=tuple(inputs), outputs=(output,))


def int8_convolution(node: str = "conv") -> list[NetworkLayer]:
    """A convolution between Q/DQ nodes, as NVIDIA's parser makes it."""
    activation, weight = tensor(f"{node}_x", "FLOAT"), tensor(f"{node}_w", "FLOAT")
    scale = tensor("scale", "FLOAT")
    return [
        layer("DEQUANTIZE", f"{node}_dx", [tensor(f"{node}_x8", "INT8"), scale], activation),
        layer("DEQUANTIZE", f"{node}_dw", [tensor(f"{node}_w8", "INT8"), scale], weight),
        layer("CONVOLUTION", node, [activation, weight], tensor(f"{node}_y", "FLOAT")),
    ]


INT8 = (Asked(node="conv", op="Conv", precision="int8"),)


def prove(wanted: tuple[Asked, ...], layers: list[NetworkLayer], weight_bytes: int | None = STORED) -> PrecisionProof:
    return precision.prove_network(wanted, layers, weight_bytes=weight_bytes, expected_weight_bytes=STORED)


# --- the request ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Mapping[Precision, OnnxModel]:
    folder = tmp_path_factory.mktemp("models")
    samples = networks.normal_samples(16, 3, 16, 16)
    model = networks.save(networks.residual(), folder / "model.onnx")
    data = networks.calibration(folder / "data", samples)
    made = {Precision.FP32: model}
    for name in ("observed", "fp16", "int8"):
        (folder / name).mkdir()
    statistics = observe(
        model, data, samples=16, min_samples=1, open_model=open_model, threads=1, out_dir=folder / "observed"
    )
    for kind in (Precision.FP16, Precision.INT8):
        made[kind] = quantize(
            EngineSection(precision=kind),
            QuantizeSection(),
            model,
            statistics,
            data,
            open_model=open_model,
            threads=1,
            out_dir=folder / kind,
        )
    return made


@pytest.mark.parametrize("kind", [Precision.FP32, Precision.FP16, Precision.INT8])
def test_a_model_asks_for_its_precision_in_every_layer_that_multiplies(
    models: Mapping[Precision, OnnxModel], kind: Precision
) -> None:
    wanted, stored = precision.asked(models[kind].path)
    assert {(item.op, item.precision) for item in wanted} == {("Conv", kind.value), ("Gemm", kind.value)}
    assert len(wanted) == 6
    weights = onnx.load(models[kind].path).graph.initializer
    assert stored == sum(onnx.numpy_helper.to_array(weight).nbytes for weight in weights)


def test_a_node_without_a_name_is_called_what_the_parser_calls_it(tmp_path: Path) -> None:
    proto = networks.linear_map(np.eye(4))
    proto.graph.node[0].name = ""
    (item,), _ = precision.asked(networks.save(proto, tmp_path / "model.onnx").path)
    assert item.node == "node_of_y"


def test_a_weight_counts_once_for_every_reader(tmp_path: Path) -> None:
    net = networks.Net()
    net.op("MatMul", [net.op("MatMul", ["x", net.normal("w", 8, 8)], "h"), "w"], "y")
    saved = networks.save(net.model({"x": ["batch", 8]}, {"y": ["batch", 8]}), tmp_path / "model.onnx")
    assert precision.asked(saved.path)[1] == 2 * 8 * 8 * 4


# --- the network ----------------------------------------------------------------------------------------------------


def test_a_network_as_asked() -> None:
    proof = prove(INT8, int8_convolution())
    assert (proof.layers, proof.as_asked, proof.departures) == (1, 1, ())
    assert proof.by_precision == {"int8": 1}
    assert precision.covers(proof, Precision.INT8)


def test_operands_are_traced_through_layers_that_only_move() -> None:
    layers = int8_convolution()
    moved = layer("SHUFFLE", "t", [layers[1].outputs[0]], tensor("moved", "FLOAT"))
    product = layer("MATRIX_MULTIPLY", "conv", [layers[0].outputs[0], tensor("moved", "FLOAT")], tensor("y", "FLOAT"))
    assert prove(INT8, [*layers[:2], moved, product]).by_precision == {"int8": 1}


@pytest.mark.parametrize(
    "metadata",
    [
        "[ONNX Layer: layers[0]/MatMul]",
        "[ONNX Layer: other]\x1e[ONNX Layer: layers[0]/MatMul]",
        "[ONNX Layer: layers[0]/MatMul][ONNX Layer: other]",
        "[ONNX Layer: layers[0]/MatMul | if (If)]",
    ],
)
def test_a_nodes_name_may_hold_brackets_and_stand_among_others(metadata: str) -> None:
    wanted = (Asked(node="layers[0]/MatMul", op="MatMul", precision="fp16"),)
    half = tensor("h", "HALF")
    product = replace(layer("MATRIX_MULTIPLY", "", [half, half], tensor("y", "HALF")), metadata=metadata)
    assert prove(wanted, [product]).by_precision == {"fp16": 1}


def test_a_type_that_the_file_does_not_tell_is_taken_from_the_network() -> None:
    wanted = (Asked(node="conv", op="Conv", precision="unknown x fp32"),)
    wide = tensor("f", "FLOAT")
    proof = prove(wanted, [layer("CONVOLUTION", "conv", [wide, wide], tensor("y", "FLOAT"))])
    assert (proof.departures, proof.by_precision) == ((), {"fp32": 1})


def test_a_layer_in_a_branch_that_the_parser_dropped_is_not_a_departure() -> None:
    wanted = (*INT8, Asked(node="never", op="MatMul", precision="fp32", nested=True))
    proof = prove(wanted, int8_convolution())
    assert (proof.departures, proof.by_precision) == ((), {"int8": 1, "not visible": 1})


def test_a_layer_that_lost_its_quantisation_departs() -> None:
    layers = int8_convolution()
    plain = replace(layers[2], inputs=(tensor("x", "FLOAT"), tensor("w", "FLOAT")))
    proof = prove(INT8, [*layers[:2], plain])
    assert proof.as_asked == 0
    assert proof.departures == (
        Departure(
            layer="conv",
            op="Conv",
            asked="int8",
            found="fp32",
            cause="the parser gave the layer other types than the file",
        ),
    )
    assert not precision.covers(proof, Precision.INT8)


def test_a_layer_that_lost_the_quantisation_of_its_activation_departs() -> None:
    layers = int8_convolution()
    half = replace(layers[2], inputs=(tensor("x", "FLOAT"), layers[1].outputs[0]))
    (departure,) = prove(INT8, [*layers[:2], half]).departures
    assert departure.found == "fp32 x int8"


def test_a_layer_that_is_not_there_departs() -> None:
    (departure,) = prove(INT8, int8_convolution("other")).departures
    assert (departure.layer, departure.found) == ("conv", "nothing")


@pytest.mark.parametrize(("weight_bytes", "departs"), [(STORED, False), (None, False), (4 * STORED, True)])
def test_weights_that_were_widened_depart(weight_bytes: int | None, departs: bool) -> None:
    stored = 10_000_000
    proof = precision.prove_network(
        INT8,
        int8_convolution(),
        weight_bytes=weight_bytes and weight_bytes * stored // STORED,
        expected_weight_bytes=stored,
    )
    assert [item.layer for item in proof.departures] == ["(weights)"] * departs
    assert proof.as_asked == 1


def test_half_and_float_are_told_apart() -> None:
    wanted = (Asked(node="a", op="MatMul", precision="fp16"), Asked(node="b", op="MatMul", precision="fp16"))
    half, wide = tensor("h", "HALF"), tensor("f", "FLOAT")
    layers = [
        layer("MATRIX_MULTIPLY", "a", [half, half], tensor("x", "HALF")),
        layer("MATRIX_MULTIPLY", "b", [wide, wide], tensor("y", "FLOAT")),
    ]
    proof = prove(wanted, layers)
    assert (proof.as_asked, proof.by_precision) == (1, {"fp16": 1, "fp32": 1})
    assert [item.layer for item in proof.departures] == ["b"]


def test_a_model_that_multiplies_nothing_has_nothing_to_prove() -> None:
    assert precision.covers(prove((), []), Precision.INT8)


def test_weight_only_layers_cover_their_precision() -> None:
    proof = prove((Asked(node="m", op="MatMul", precision="fp16 x int4"),), [])
    assert not precision.covers(proof, Precision.INT4)
    half, weight = tensor("h", "HALF"), tensor("w", "HALF")
    layers = [
        layer("DEQUANTIZE", "d", [tensor("w4", "INT4"), tensor("s", "HALF")], weight),
        layer("MATRIX_MULTIPLY", "m", [half, weight], tensor("y", "HALF")),
    ]
    proof = prove((Asked(node="m", op="MatMul", precision="fp16 x int4"),), layers)
    assert proof.departures == ()
    assert precision.covers(proof, Precision.INT4)


# --- the engine -----------------------------------------------------------------------------------------------------


def io(name: str, datatype: str) -> dict[str, Any]:
    return {"Name": name, "Dimensions": [1, 8, 8, 8], "Format": "Linear", "Datatype": datatype}


NETWORK = PrecisionProof(method="the network", layers=1, as_asked=1, by_precision={"int8": 1}, weight_bytes=7)


def inspect(wanted: tuple[Asked, ...], *layers: dict[str, Any]) -> PrecisionProof:
    return precision.prove_engine(wanted, {"Layers": list(layers), "I/O Tensors": []}, NETWORK)


def engine_layer(kind: str, node: str, inputs: list[str], output: str, weights: str | None = None) -> dict[str, Any]:
    """A layer of the inspector's JSON in TensorRT 11's schema; ``inputs`` are ``name:type``."""
    found: dict[str, Any] = {
        "Name": f"{node}_engine",
        "LayerType": kind,
        "Inputs": [io(*item.split(":")) for item in inputs],
        "Outputs": [io(*output.split(":"))],
        "TacticName": "a_kernel",
        "Metadata": f"[ONNX Layer: {node}]",
    }
    if weights is not None:
        found["Weights"] = {"Type": weights, "Count": 64}
    return found


def test_an_engine_as_asked() -> None:
    proof = inspect(INT8, engine_layer("CaskConvolution", "conv", ["x:Int8"], "y:Int8", "Int8"))
    assert (proof.as_asked, proof.departures, proof.by_precision) == (1, (), {"int8": 1})


@pytest.mark.parametrize(
    ("maker", "cause"),
    [
        ("Dequantize", "the Q/DQ pair before it did not fuse: a dequantisation of its own feeds it"),
        ("Quantize", "the Q/DQ pair before it did not fuse: a quantisation of its own feeds it"),
        ("Reformat", "a reformat before it changes the type"),
        ("Pooling", "the builder chose a kernel of another type"),
    ],
)
def test_an_engine_that_departs_names_the_likely_cause(maker: str, cause: str) -> None:
    layers = [
        engine_layer(maker, "before", ["a:Int8"], "x:Float"),
        engine_layer("CaskConvolution", "conv", ["x:Float"], "y:Float", "Float"),
    ]
    proof = inspect(INT8, *layers)
    assert proof.departures == (Departure(layer="conv", op="Conv", asked="int8", found="fp32", cause=cause),)
    assert proof.as_asked == 0


def test_a_product_of_two_activations_is_read_from_both_inputs() -> None:
    wanted = (Asked(node="m", op="MatMul", precision="int8"),)
    (departure,) = inspect(wanted, engine_layer("gemm", "m", ["a:Int8", "b:Half"], "y:Half")).departures
    assert departure.found == "fp16 x int8"


def test_what_the_inspector_does_not_show_is_read_from_the_network_and_said_so() -> None:
    wanted = (*INT8, Asked(node="head", op="Gemm", precision="fp32"))
    fused = engine_layer("Myelin", "conv", ["x:Float"], "y:Float")
    fused["Metadata"] = "[ONNX Layer: conv]\x1e[ONNX Layer: head]"
    proof = inspect(wanted, fused)
    assert (proof.as_asked, proof.by_precision, proof.departures) == (2, {"int8": 1, "fp32": 1}, ())
    assert proof.method == (
        "the engine inspector, layer by layer of the engine that ships; it does not tell 2 of 2 from what they are fused "
        f"with, and these were read from: {NETWORK.method}"
    )


def test_widened_weights_are_not_forgotten_where_the_inspector_is_blind() -> None:
    widened = Departure(layer=precision.WEIGHTS, op="all", asked="1", found="4", cause="because")
    network = replace(NETWORK, departures=(widened,))
    assert precision.prove_engine(INT8, {}, network).departures == (widened,)
    seen = engine_layer("CaskConvolution", "conv", ["x:Int8"], "y:Int8", "Int8")
    assert precision.prove_engine(INT8, {"Layers": [seen]}, network).departures == ()


def test_what_departed_in_the_network_is_not_forgotten_where_the_inspector_is_blind() -> None:
    departed = Departure(layer="conv", op="Conv", asked="int8", found="fp32", cause="because")
    network = replace(NETWORK, departures=(departed,))
    proof = precision.prove_engine(INT8, {"Layers": ["conv + relu"]}, network)
    assert (proof.as_asked, proof.by_precision, proof.departures) == (0, {"fp32": 1}, (departed,))
    assert not precision.covers(proof, Precision.INT8)

"""What an engine computes in, layer by layer, against what its model asks for.

TensorRT is strongly typed from version 11 on, and still an engine may not be what was asked: a pair of Q/DQ nodes that
did not fuse leaves its layer in floating point, weights may be folded to a wider type at build. The request is read from
the ONNX file, by its operand types; the answer from the engine:

- Where the engine can be opened, from the engine inspector's JSON (TensorRT 11: "Layers", each with "Metadata" that names
  the ONNX nodes, "Inputs" with "Datatype", "Weights" with "Type";
  https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/engine-tools.html).
- Where it cannot, from the network as NVIDIA's parser made it, and from what the builder says the weights take.

Nothing here needs TensorRT: what is read from it arrives as plain values.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from compiler import onnx_files
from compiler.spec import Departure, Precision, PrecisionProof

MULTIPLYING = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul", "Einsum", "Attention"})
"""Operators whose precision is worth proving: the others move values or are bound by memory."""

WEIGHTS_MARGIN = 1.05
WEIGHTS_SLACK_BYTES = 1 << 16
"""An engine's weights may take this much more than the model's before they count as widened: padding, and tables that the
builder adds. (Seen: 0.4 % less to 0.5 % more, of small models 7 kB more.) One type wider is a factor of two."""

WEIGHTS = "(weights)"
"""In the place of a layer's name: a departure of the engine's weights as a whole."""

_NODE = re.compile(r"\[ONNX Layer: (.*?)(?: \| [^\x1e]*)?\](?=\x1e|\[ONNX Layer: |$)")
"""One name in a layer's metadata. It may hold brackets; inside a branch the node around it follows a bar."""

_LAYERS = frozenset({"CONVOLUTION", "DECONVOLUTION", "MATRIX_MULTIPLY", "EINSUM", "ATTENTION_OUTPUT"})
_PASSED_THROUGH = frozenset({"SHUFFLE", "IDENTITY", "SQUEEZE", "UNSQUEEZE"})

_NAMES = {
    "FLOAT": "fp32",
    "HALF": "fp16",
    "FLOAT16": "fp16",
    "BF16": "bf16",
    "BFLOAT16": "bf16",
    "INT8": "int8",
    "FP8": "fp8",
    "FLOAT8E4M3FN": "fp8",
    "INT4": "int4",
    "FP4": "fp4",
    "FLOAT4E2M1": "fp4",
    "FP32": "fp32",
    "FP16": "fp16",
}
"""The types' names in ONNX, in TensorRT's network and in the inspector's JSON, upper case -> the field's usual name."""

_MOVERS = frozenset({"Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity"})
"""ONNX operators through which an operand is traced; `_PASSED_THROUGH` are the layers that the parser makes of them."""

_QUANTISED = frozenset({"int8", "fp8", "int4", "fp4"})


@dataclass(frozen=True, kw_only=True)
class NetworkTensor:
    name: str
    dtype: str
    """TensorRT's name: ``FLOAT``, ``HALF``, ``INT8``, ..."""


@dataclass(frozen=True, kw_only=True)
class NetworkLayer:
    """A layer of a parsed network: what `prove_network` needs of an ``ILayer``."""

    name: str
    kind: str
    """TensorRT's name of the layer type: ``CONVOLUTION``, ``DEQUANTIZE``, ..."""
    metadata: str
    inputs: tuple[NetworkTensor, ...]
    outputs: tuple[NetworkTensor, ...]


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What an ONNX node that multiplies asks for."""

    node: str
    op: str
    precision: str
    """``int8``, ``fp16``, ...; ``fp16 x int4`` where only the weights are quantised; ``unknown`` for a type that the file
    does not tell."""
    nested: bool = False
    """Inside a branch, a loop or a function: the parser may drop or rename it."""


def asked(model: Path) -> tuple[tuple[Asked, ...], int]:
    """What every multiplying node of an ONNX file asks for, and the bytes that its weights take in their stored types.

    A weight that several nodes read counts once for each: an engine may hold a tied table once for every reader.
    """
    network = onnx_files.read(model)
    graphs = [network.graph, *network.graph.subgraphs(), *(function.graph for function in network.functions.values())]
    found = [
        Asked(
            node=node.name or f"node_of_{node.outputs[0].name}",  # as NVIDIA's parser names what has no name
            op=node.op_type,
            precision=_combined([_operand(value) for value in _operands(node)]),
            nested=graph is not network.graph,
        )
        for graph in graphs
        for node in graph
        if node.op_type in MULTIPLYING and node.domain == ""
    ]
    weights = [value for graph in graphs for value in graph.initializers.values()]
    stored = sum(
        _bytes(weight.const_value) * max(1, _readers(weight)) for weight in weights if weight.const_value is not None
    )
    return tuple(found), stored


def prove_network(
    wanted: Sequence[Asked],
    layers: Sequence[NetworkLayer],
    *,
    weight_bytes: int | None,
    weight_bytes_alone: int | None = None,
    expected_weight_bytes: int,
) -> PrecisionProof:
    """Compare with the parsed network and the weights of the engine that was built from it.

    Args:
        wanted: of the ONNX file that was parsed; see `asked`.
        layers: every layer of the network.
        weight_bytes: "Total Weights Memory" in the builder's log; None: the builder did not say.
        weight_bytes_alone: the same with one of several profiles alone, where that was tried.
        expected_weight_bytes: the other half of what `asked` returns.
    """
    made_by = {tensor.name: layer for layer in layers for tensor in layer.outputs}
    found: dict[str, list[str]] = {}
    for layer in layers:
        if layer.kind in _LAYERS:
            # An attention is two layers: queries and keys go into the first, the node's name is on the second.
            reader = made_by[layer.inputs[0].name] if layer.kind == "ATTENTION_OUTPUT" else layer
            operands = [_traced(tensor, made_by) for tensor in reader.inputs[:2]]
            for node in _NODE.findall(layer.metadata):
                found.setdefault(node, []).append(_combined(operands))
    departures = list(_network_departures(wanted, found))
    taken = weight_bytes if weight_bytes_alone is None else weight_bytes_alone
    if taken is not None and widened(taken, expected_weight_bytes):
        departures.append(
            Departure(
                layer=WEIGHTS,
                op="all",
                asked=f"{expected_weight_bytes:,} bytes",
                found=f"{taken:,} bytes",
                cause="the builder folded weights to a wider type than the model stores them in",
            )
        )
    return PrecisionProof(
        method="types of the network that NVIDIA's parser made, and the builder's own count of weight memory",
        layers=len(wanted),
        as_asked=len(wanted) - len({departure.layer for departure in departures if departure.layer != WEIGHTS}),
        by_precision=_counted(wanted, found),
        departures=tuple(departures),
        weight_bytes=weight_bytes,
        weight_bytes_alone=weight_bytes_alone,
        expected_weight_bytes=expected_weight_bytes,
    )


def prove_engine(wanted: Sequence[Asked], inspected: Mapping[str, Any], network: PrecisionProof) -> PrecisionProof:
    """Compare with the layers of the engine itself.

    Where several nodes of different precisions were fused into one layer, the inspector shows the types at its border and
    none inside; those nodes are answered for by the network, and the proof says how many they are.

    Args:
        wanted: of the ONNX file that was built.
        inspected: the inspector's JSON, of an engine built with detailed profiling verbosity.
        network: what `prove_network` found.
    """
    layers = [layer for layer in inspected.get("Layers", ()) if isinstance(layer, Mapping)]
    reads = {str(tensor.get("Name")): layer for layer in layers for tensor in layer.get("Outputs", ())}
    by_node = {item.node: item for item in wanted}
    found: dict[str, list[str]] = {}
    departures = []
    for layer in layers:
        nodes = [by_node[node] for node in _NODE.findall(str(layer.get("Metadata", ""))) if node in by_node]
        if not nodes or len({item.precision for item in nodes}) > 1:
            continue  # one fused layer of several precisions: its types are those at its border, not inside
        operands = [_datatype(tensor) for tensor in layer.get("Inputs", ())]
        if isinstance(layer.get("Weights"), Mapping):
            operands = [*operands[:1], _name(str(layer["Weights"].get("Type", "")))]
        got = _combined(operands[:2])
        for item in nodes:
            found.setdefault(item.node, []).append(got)
            if got != item.precision:
                departures.append(
                    Departure(
                        layer=item.node, op=item.op, asked=item.precision, found=got, cause=_engine_cause(layer, reads)
                    )
                )
    hidden = [item for item in wanted if item.node not in found]
    if hidden:  # and so may be what was done to their weights
        departures += [departure for departure in network.departures if departure.layer == WEIGHTS]
    parsed = {departure.layer: departure for departure in network.departures}
    for item in hidden:
        found[item.node] = [parsed[item.node].found if item.node in parsed else item.precision]
    departures += [parsed[item.node] for item in hidden if item.node in parsed]
    method = "the engine inspector, layer by layer of the engine that ships"
    if hidden:
        method += f"; it does not tell {len(hidden)} of {len(wanted)} from what they are fused with, and these were read from: "
        method += network.method
    return PrecisionProof(
        method=method,
        layers=len(wanted),
        as_asked=sum(found[item.node] == [item.precision] * len(found[item.node]) for item in wanted),
        by_precision=_counted(wanted, found),
        departures=tuple(departures),
        weight_bytes=network.weight_bytes,
        weight_bytes_alone=network.weight_bytes_alone,
        expected_weight_bytes=network.expected_weight_bytes,
    )


def covers(proof: PrecisionProof, precision: Precision) -> bool:
    """Whether any layer computes in the engine's own precision, or there is none that multiplies."""
    return proof.layers == 0 or any(precision.value in kind.split(" x ") for kind in proof.by_precision)


def summary(proof: PrecisionProof, precision: Precision) -> str:
    """The proof in one line, for a report and for an error.

    >>> summary(PrecisionProof(method="", layers=40, as_asked=9, by_precision={"int8": 9, "fp32": 31}), Precision.INT8)
    'asked INT8: 9 of 40 layers that multiply are as the model asks (int8 9, fp32 31)'
    """
    kinds = ", ".join(f"{kind} {count}" for kind, count in proof.by_precision.items())
    return (
        f"asked {precision.value.upper()}: {proof.as_asked} of {proof.layers} layers that multiply are as the model asks "
        f"({kinds or 'none'})"
    )


# --- the request ----------------------------------------------------------------------------------------------------


def _operands(node: ir.Node) -> list[ir.Value]:
    """The two operands that are multiplied; of an Attention, queries and keys."""
    return [value for value in node.inputs[:2] if value is not None]


def _operand(value: ir.Value) -> str:
    producer = value.producer()
    while producer is not None and producer.op_type in _MOVERS and producer.inputs[0]:
        value, producer = producer.inputs[0], producer.inputs[0].producer()
    if producer is not None and producer.op_type == "DequantizeLinear" and producer.inputs[0] is not None:
        stored = producer.inputs[0]
        scale = producer.inputs[1]
        # What is dequantised is computed in the type of the scale where the other operand is not quantised.
        return f"{_name(_dtype(stored))}@{_name(_dtype(scale))}" if scale is not None else _name(_dtype(stored))
    return _name(_dtype(value))


def _readers(value: ir.Value) -> int:
    """How many nodes read a weight, seen through those that only dequantise or turn it."""
    found = 0
    for node, _ in value.uses():
        found += _readers(node.outputs[0]) if node.op_type in ("DequantizeLinear", "Transpose", "Identity") else 1
    return found


def _dtype(value: ir.Value) -> str:
    known = value.dtype or (value.const_value.dtype if value.const_value is not None else None)
    return known.name if known is not None else ""


def _bytes(tensor: ir.TensorProtocol) -> int:
    return math.ceil(tensor.size * tensor.dtype.itemsize)


# --- the answer -----------------------------------------------------------------------------------------------------


def _traced(tensor: NetworkTensor, made_by: Mapping[str, NetworkLayer]) -> str:
    """The type of an operand: what a DEQUANTIZE layer read, where one made it."""
    layer = made_by.get(tensor.name)
    while layer is not None and layer.kind in _PASSED_THROUGH and layer.inputs:
        tensor = layer.inputs[0]
        layer = made_by.get(tensor.name)
    if layer is not None and layer.kind == "DEQUANTIZE":
        return f"{_name(layer.inputs[0].dtype)}@{_name(tensor.dtype)}"
    return _name(tensor.dtype)


def _datatype(tensor: Mapping[str, Any]) -> str:
    return _name(str(tensor.get("Datatype", tensor.get("DataType", ""))))


def _name(dtype: str) -> str:
    return _NAMES.get(dtype.upper(), dtype.lower() or "unknown")


def _combined(operands: Sequence[str]) -> str:
    """The precision of a layer from the types of its operands.

    >>> _combined(["int8@fp32", "int8@fp32"]), _combined(["fp16", "int4@fp16"]), _combined(["fp16", "fp16"])
    ('int8', 'fp16 x int4', 'fp16')
    """
    stored = [operand.partition("@")[0] for operand in operands]
    if len(set(stored)) == 1:
        return stored[0]
    if len(stored) == 2 and stored[1] in _QUANTISED:
        return f"{stored[0]} x {stored[1]}"
    if len(stored) == 2 and stored[0] in _QUANTISED:  # rounded on one side alone: it is computed in the other's type
        return f"{stored[1]} x {stored[0]}"
    return " x ".join(stored) or "unknown"


def _network_departures(wanted: Sequence[Asked], found: Mapping[str, Sequence[str]]) -> Iterator[Departure]:
    for item in wanted:
        for got in found.get(item.node, ()):
            if got != item.precision and "unknown" not in item.precision:
                cause = "the parser gave the layer other types than the file"
                yield Departure(layer=item.node, op=item.op, asked=item.precision, found=got, cause=cause)
                break
        if item.node not in found and not item.nested:
            cause = "no layer of the network carries the node's name: it was folded or rewritten by the parser"
            yield Departure(layer=item.node, op=item.op, asked=item.precision, found="nothing", cause=cause)


def _engine_cause(layer: Mapping[str, Any], reads: Mapping[str, Mapping[str, Any]]) -> str:
    """Why a layer of an engine is not in the type that was asked: told by what makes its inputs."""
    makers = [reads.get(str(tensor.get("Name"))) for tensor in layer.get("Inputs", ())]
    kinds = [f"{maker.get('LayerType', '')} {maker.get('Name', '')}".lower() for maker in makers if maker is not None]
    if any("dequantize" in kind for kind in kinds):
        return "the Q/DQ pair before it did not fuse: a dequantisation of its own feeds it"
    if any("quantize" in kind for kind in kinds):
        return "the Q/DQ pair before it did not fuse: a quantisation of its own feeds it"
    if any("reformat" in kind for kind in kinds):
        return "a reformat before it changes the type"
    return "the builder chose a kernel of another type"


def _counted(wanted: Sequence[Asked], found: Mapping[str, Sequence[str]]) -> dict[str, int]:
    kinds = (
        found[item.node][0] if item.node in found else "not visible" if item.nested else "nothing" for item in wanted
    )
    return dict(Counter(kinds).most_common())


def widened(weight_bytes: int, expected: int) -> bool:
    """Whether weights take more than they can in the types in which the model stores them."""
    return weight_bytes > WEIGHTS_MARGIN * expected + WEIGHTS_SLACK_BYTES

"""The layers of a model as a search sees them: what stays or goes together, and what it costs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir.passes.common import LiftConstantsToInitializersPass

from compiler import onnx_files
from compiler.quantize import placement
from compiler.quantize.observe import Observed, load
from compiler.spec import OnnxModel, Statistics


@dataclass(frozen=True, kw_only=True)
class Group:
    """Layers that read one activation, such as the projections of attention: rounding it serves all or none."""

    keep: tuple[str, ...]
    """Names of their outputs, as ``engines.keep`` takes them."""
    macs: float
    """Multiplications for one sample; as a convolution's padding is not looked at, nearly."""
    weight_bytes: int
    """In FP32."""


def groups(model: OnnxModel, statistics: Statistics, *, keep: Sequence[str] = ()) -> tuple[Group, ...]:
    """Every layer with a constant weight but those of ``keep``, in the order of the graph.

    Raises:
        RecipeError: a pattern of ``keep`` matches nothing.
    """
    network = onnx_files.read(model.path)
    LiftConstantsToInitializersPass(lift_all_constants=True)(network)
    observed = load(statistics.path)
    kept = placement.match(network.graph, keep)
    together: dict[tuple[ir.Value | None, str], list[ir.Node]] = {}
    for node, _ in placement.layers(network.graph, keep=kept):
        alone = node.op_type not in placement.PRODUCTS
        key = (node.outputs[0] if alone else node.inputs[0], node.op_type)
        together.setdefault(key, []).append(node)
    return tuple(
        Group(
            keep=tuple(str(node.outputs[0].name) for node in nodes),
            macs=sum(macs(node, observed, statistics.samples) for node in nodes),
            weight_bytes=sum(weight_bytes(node) for node in nodes),
        )
        for nodes in together.values()
    )


def merged(groups: Sequence[Group], count: int) -> tuple[Group, ...]:
    """At most ``count`` groups, neighbours made one.

    >>> one = Group(keep=("a",), macs=1.0, weight_bytes=4)
    >>> [group.macs for group in merged([one] * 5, 2)]
    [3.0, 2.0]
    """
    size = math.ceil(len(groups) / max(count, 1))
    parts = [groups[start : start + size] for start in range(0, len(groups), size)]
    return tuple(
        Group(
            keep=tuple(name for group in part for name in group.keep),
            macs=sum(group.macs for group in part),
            weight_bytes=sum(group.weight_bytes for group in part),
        )
        for part in parts
    )


def _weight(node: ir.Node) -> tuple[int, ...]:
    value = placement.stored((node, 1))
    assert value is not None and value.const_value is not None, "a layer has a weight"
    shape = tuple(value.const_value.shape.numpy())
    return shape if placement.reader((node, 1)) == (node, 1) else shape[::-1]


def weight_bytes(node: ir.Node) -> int:
    """In FP32."""
    return 4 * math.prod(_weight(node))


def macs(node: ir.Node, observed: Observed, samples: int) -> float:
    """Every weight is used once for each row of the input, or each place of a convolution's output."""
    weight = _weight(node)
    read = observed.get(str(node.inputs[0].name)) if node.inputs[0] is not None else None
    elements = read.count / max(samples, 1) if read is not None and read.count else 1.0
    if node.op_type == "Conv":
        strides = node.attributes.get("strides")
        group = node.attributes.get("group")
        channels = weight[1] * (group.as_int() if group is not None else 1)
        return elements / channels / math.prod(strides.as_ints() if strides else (1,)) * math.prod(weight)
    if node.op_type == "ConvTranspose":
        return elements / weight[0] * math.prod(weight)
    summed = weight[-1] if node.op_type == "Gemm" and placement.channel_axis(node, 2) == 0 else weight[-2]
    return elements / summed * math.prod(weight)

"""INT8 and FP8 as QuantizeLinear and DequantizeLinear nodes: the one canonical form that every back end takes.

Signed, zero point 0, one scale per activation and one per output channel of a weight; weights stored in 8 bits, biases
in float: TensorRT refuses a bias in INT32 and any other zero point. Every node that reads rounded values has a
DequantizeLinear of its own with scales of its own; in INT8 every matrix product has a QuantizeLinear too: where two
products share one, ONNX Runtime leaves both in float and takes ten times as long.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
import onnx_ir as ir

from compiler import onnx_files
from compiler.errors import CalibrationError
from compiler.onnx_files import FreeNames
from compiler.quantize import placement, thresholds
from compiler.quantize.formats import INT8, Grid, Steps, in_rest
from compiler.quantize.observe import Observed, TensorStatistics
from compiler.quantize.placement import Edge, Placement
from compiler.spec import Array

BIAS_STEPS = float(1 << 30)
"""A bias may be this many times scale(input) * scale(weight): runtimes that hold it in INT32 need a factor of two more."""


@dataclass(frozen=True, kw_only=True)
class Quantised:
    """What a module that rounds a whole model (`int8`, `fp8`, `weights`) says of what it did."""

    notes: tuple[str, ...]
    seen_as: Mapping[str, str]
    """As of `Rounded`."""
    observed: Observed
    """The statistics, with those of tensors that were added."""
    divided: frozenset[str] = frozenset()
    """Names of tensors whose channels are not those of the original model, but those divided by factors."""


@dataclass(frozen=True, kw_only=True)
class Rounded:
    """What `insert` did."""

    seen_as: Mapping[str, str]
    """By name of a rounded activation: the tensor in which its consumers read the rounded values."""
    source: Mapping[str, str]
    """By name of a tensor that `insert` made: the activation that it is, rounded."""
    notes: tuple[str, ...]


def masked(observed: Observed) -> frozenset[str]:
    """Names of activations that hold a mask, which no range fits."""
    return frozenset(
        name for name, found in observed.items() if found.bins is not None and thresholds.holds_mask(found)
    )


def notes_on_the_rest(
    graph: ir.Graph, rest: str, everything: Placement, placed: Placement, observed: Observed
) -> list[str]:
    """What could be rounded, as it seems, and is not; ``everything``: what would be, if nothing held a mask or were kept."""
    notes = []
    products = sum(node.op_type == "MatMul" and node.domain == "" for node in graph)
    products -= sum(node.op_type == "MatMul" for node in everything.nodes)
    rounded = len({node for node, index in placed.edges if index == 1 and node.op_type == "MatMul"})
    if rounded:
        notes.append(f"both operands of {rounded} products of two activations are rounded")
    if products > rounded:
        notes.append(f"{products - rounded} products of two activations stay {rest.upper()}")
    return notes + [
        f"tensor '{name}' holds mask values ({observed[name].low:.3g}): what reads it is not rounded"
        for name in sorted(masked(observed) & {str(value.name) for value in everything.activations})
    ]


def grids(
    placed: Placement,
    observed: Observed,
    *,
    method: str,
    percentile: float,
    symmetric: bool,
    whole: Container[str] = (),
) -> dict[str, Grid]:
    """The grid of every activation that is to be rounded, by name.

    Args:
        symmetric: whether zero points must be 0.
        whole: activations whose whole range is taken: they were made here, and only their extremes are known.

    Raises:
        CalibrationError: one of them was not observed.
    """
    by_root: dict[str, Grid] = {}
    found = {}
    for value in placed.activations:
        root = str(placed.root[value].name)
        if root not in by_root:
            statistics = range_of(placed, placed.root[value], observed)
            if statistics is None or (statistics.bins is None and root not in whole):
                raise not_observed(root)
            how = "minmax" if root in whole else method
            by_root[root] = thresholds.grid(statistics, method=how, percentile=percentile, symmetric=symmetric)
        found[str(value.name)] = by_root[root]
    return found


def range_of(placed: Placement, root: ir.Value, observed: Observed) -> TensorStatistics | None:
    """What was seen of all that take the scale of ``root``; None where that is not known."""
    names = [str(value.name) for value in placed.shared.get(root, (root,))]
    if any(name not in observed for name in names):
        return None
    if len(names) == 1:
        return observed[names[0]]
    # Of several tensors, channels would mean nothing.
    return functools.reduce(operator.add, (replace(observed[name], channels=None) for name in names))


def not_observed(name: str) -> CalibrationError:
    """The refusal to round a tensor of unknown range."""
    return CalibrationError(
        f"tensor '{name}': no statistics of it; those of every tensor to be rounded were expected. "
        "Run again without the cache: --no-cache."
    )


Improve: TypeAlias = Callable[[Edge, Array, tuple[Array, Array], int | None], Array]
"""``(edge of a weight, the weight, (its steps, their scales), axis of the scales) -> better steps`` of the same scales."""


def insert(
    model: ir.Model,
    placed: Placement,
    grid_of: Mapping[str, Grid],
    *,
    steps: Steps = INT8,
    rest: str = "fp32",
    improve: Improve | None = None,
) -> Rounded:
    """Round what ``placed`` says, in place. Inputs and outputs of the model keep their names and types.

    Args:
        placed: of ``model.graph`` as it is.
        grid_of: for every activation of ``placed``, by name.
        steps: INT8 or FP8.
        rest: the precision that what is not rounded will get, which the scales of weights are to fit.
        improve: what rounds weights better than to nearest.

    Raises:
        CalibrationError: a weight holds NaN or Inf, or the opset does not know ``steps``.
    """
    opset = model.opset_imports.get("", 0)
    if opset < steps.since:
        raise CalibrationError(
            f"model: its opset is {opset}; {steps.label} needs {steps.since} or later. "
            "Export it again with a newer opset."
        )
    placement.check_weights(placed)
    for node in placed.lookups:
        if node.inputs[0] is not None:
            placement.check_finite(node.inputs[0], node)
    editor = _Editor(model.graph, steps)
    notes = editor.round_weights(placed, grid_of, rest, improve)
    # Who computes in integers is asked of the graph as it was: rounding an activation hides what it is fused to.
    integer = _integer_edges(model.graph, placed)
    for value in placed.outputs:
        editor.round_output(value, grid_of[str(value.name)], integer)
    editor.round_edges(placed.edges, grid_of)
    return Rounded(seen_as=editor.seen_as, source=editor.source, notes=tuple(notes))


def round_weight(
    weight: Array,
    axis: int | None,
    *,
    steps: Steps = INT8,
    rest: str = "fp32",
    bias: Array | None = None,
    input_scale: float = 1.0,
) -> tuple[Array, Array, int]:
    """A weight in INT8 or FP8, its scales ([] or [channels], float32), and how many channels are all zero.

    The scale of a channel is its largest magnitude / 127 (FP8: / 448), or the next larger one that ``rest`` holds. A
    channel of zeros takes the largest scale of the others. In INT8, a channel whose weights are tiny beside its bias
    takes the scale at which the bias is `BIAS_STEPS` steps: below that, a runtime that holds biases in INT32 clips the
    bias, while what such weights add to it is lost either way.

    >>> q, scale, zeros = round_weight(np.array([[1.27, -0.5], [0.0, 0.0]], np.float32), 0)
    >>> q.tolist(), [f"{x:.2f}" for x in scale], zeros
    ([[127, -50], [0, 0]], ['0.01', '0.01'], 1)
    """
    others = tuple(i for i in range(weight.ndim) if i != axis) if axis is not None else None
    peak = np.abs(weight).max(axis=others)
    zeros = int(np.count_nonzero(peak == 0))
    scale = steps.scale(np.where(peak == 0, peak.max() or 1.0, peak), rest)
    if steps is INT8 and bias is not None and bias.shape == scale.shape:
        scale = in_rest(np.maximum(scale, np.abs(bias.astype(np.float64)) / (input_scale * BIAS_STEPS)), rest)
    return steps.round(weight / placement.along(scale, axis, weight.ndim)), scale, zeros


def _integer_edges(graph: ir.Graph, placed: Placement) -> frozenset[Edge]:
    """Inputs of nodes that compute on, or pass on, eight bits."""
    computing, outputs = set(placed.nodes), set(placed.outputs)
    edges = {(node, 0) for node in computing}
    for node in graph:
        made = placement.fused_output(node) if node.op_type == "Add" else node.outputs[0]
        if node not in computing and made in outputs:
            edges.update((node, index) for index, value in enumerate(node.inputs) if value in placed.root)
    return frozenset(edges)


class _Editor:
    """Puts nodes into a graph under names that are free."""

    def __init__(self, graph: ir.Graph, steps: Steps) -> None:
        self.seen_as: dict[str, str] = {}
        self.source: dict[str, str] = {}
        self._graph = graph
        self._steps = steps
        self._free = FreeNames(graph).free

    def round_weights(
        self, placed: Placement, grid_of: Mapping[str, Grid], rest: str, improve: Improve | None
    ) -> list[str]:
        notes = []
        stored: dict[tuple[ir.Value, int | None], tuple[ir.Value, Array]] = {}
        edges = [(edge, placement.weight_axis(edge)) for edge in placed.weights]
        for (node, index), axis in (*edges, *(((node, 0), 0) for node in placed.lookups)):
            reader, place = placement.reader((node, index))
            weight, activation = reader.inputs[place], node.inputs[0]
            assert weight is not None and weight.const_value is not None and activation is not None, "placed"
            lookup = index == 0
            bias = None if lookup or len(node.inputs) < 3 else placement.constant(node.inputs[2])
            if bias is not None or (weight, axis) not in stored:
                steps, scale, zeros = round_weight(
                    weight.const_value.numpy(),
                    axis,
                    steps=INT8 if lookup else self._steps,
                    rest=rest,
                    bias=bias,
                    input_scale=1.0 if lookup else float(grid_of[str(activation.name)].scale),
                )
                if zeros:
                    notes.append(f"weight '{weight.name}': {zeros} of {scale.size} channels are all zero")
                if improve is not None and not lookup:
                    steps = improve((node, index), weight.const_value.numpy(), (steps, scale), axis)
                if (weight, axis) not in stored or stored[weight, axis][1].tobytes() != scale.tobytes():
                    label = "int8" if lookup else self._steps.label.lower()
                    stored[weight, axis] = self._constant(f"{weight.name}_{label}", steps), scale
                onnx_files.release(weight)
            name = f"{weight.name}_dequantized"
            rounded, dequantize = self._dequantize(name, *stored[weight, axis], axis=axis)
            self._graph.insert_before(reader, dequantize)
            reader.replace_input_with(place, rounded)
        for weight in {key[0] for key in stored}:
            if not weight.uses() and not weight.is_graph_output():
                del self._graph.initializers[str(weight.name)]
        return notes

    def round_output(self, value: ir.Value, grid: Grid, integer: frozenset[Edge]) -> None:
        """Let every consumer of ``value``, and the caller of the model, read it rounded."""
        name, producer = str(value.name), value.producer()
        assert producer is not None, "only what a node makes is rounded where it is made"
        uses, is_output = list(value.uses()), value.is_graph_output()
        if is_output:
            value.name = self._free(f"{name}_unrounded")
        steps, quantize = self._quantize(name, value, grid)
        nodes = [quantize]
        for consumer, index in uses:
            if (consumer, index) in integer:
                rounded, dequantize = self._dequantize_activation(name, steps, grid)
                nodes.append(dequantize)
                consumer.replace_input_with(index, rounded)
        others = [edge for edge in uses if edge not in integer]
        if others or is_output:
            rounded, dequantize = self._dequantize_activation(name, steps, grid, is_output=is_output)
            nodes.append(dequantize)
            for consumer, index in others:
                consumer.replace_input_with(index, rounded)
        if is_output:
            for place, output in enumerate(self._graph.outputs):
                if output is value:
                    self._graph.outputs[place] = rounded
        self._graph.insert_after(producer, nodes)

    def round_edges(self, edges: Sequence[Edge], grid_of: Mapping[str, Grid]) -> None:
        """Let each of these inputs read its activation rounded, and nobody else."""
        shared: dict[ir.Value, tuple[ir.Value, ir.Node]] = {}
        for node, index in edges:
            value = node.inputs[index]
            assert value is not None, "placed"
            name, grid = str(value.name), grid_of[str(value.name)]
            private = self._steps is INT8 and node.op_type in placement.PRODUCTS
            if private or value not in shared:
                steps, quantize = self._quantize(name, value, grid)
                self._place_after(value, quantize)
                if not private:
                    shared[value] = steps, quantize
            else:
                steps, quantize = shared[value]
            rounded, dequantize = self._dequantize_activation(name, steps, grid)
            self._graph.insert_after(quantize, dequantize)
            node.replace_input_with(index, rounded)

    def _place_after(self, value: ir.Value, node: ir.Node) -> None:
        producer = value.producer()
        if producer is not None:
            self._graph.insert_after(producer, node)
        else:
            self._graph.insert_before(self._graph[0], node)

    def _quantize(self, name: str, value: ir.Value, grid: Grid) -> tuple[ir.Value, ir.Node]:
        output = _like(value, self._free(f"{name}_quantized"), self._steps.dtype)
        inputs = [value, *self._parameters(str(output.name), np.asarray(grid.scale), grid.zero_point)]
        return output, ir.node("QuantizeLinear", inputs, outputs=[output], name=output.name)

    def _dequantize_activation(
        self, name: str, steps: ir.Value, grid: Grid, *, is_output: bool = False
    ) -> tuple[ir.Value, ir.Node]:
        """Read the activation ``name`` rounded; under its own name if it is an output of the model."""
        free = f"{name}_dequantized"
        output, node = self._dequantize(
            free, steps, np.asarray(grid.scale), zero_point=grid.zero_point, exact=name if is_output else None
        )
        self.seen_as.setdefault(name, str(output.name))
        self.source[str(output.name)] = name
        return output, node

    def _dequantize(
        self,
        name: str,
        steps: ir.Value,
        scale: Array,
        *,
        axis: int | None = None,
        zero_point: int = 0,
        exact: str | None = None,
    ) -> tuple[ir.Value, ir.Node]:
        output = _like(steps, exact or self._free(name), ir.DataType.FLOAT)
        inputs = [steps, *self._parameters(str(output.name), scale, zero_point)]
        attributes = {} if axis is None else {"axis": axis}
        node_name = self._free(name) if exact else output.name
        return output, ir.node("DequantizeLinear", inputs, attributes, outputs=[output], name=node_name)

    def _parameters(self, name: str, scale: Array, zero_point: int) -> tuple[ir.Value, ir.Value]:
        return (
            self._constant(f"{name}_scale", scale.astype(np.float32)),
            self._constant(f"{name}_zero_point", np.full(scale.shape, zero_point, self._steps.dtype.numpy())),
        )

    def _constant(self, name: str, array: Array) -> ir.Value:
        tensor = ir.Tensor(array, name=self._free(name))
        value = ir.Value(
            name=tensor.name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor
        )
        self._graph.register_initializer(value)
        return value


def _like(value: ir.Value, name: str, dtype: ir.DataType) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=None if value.shape is None else value.shape.copy())

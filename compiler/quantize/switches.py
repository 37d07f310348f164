"""One model in which the rounding of every group of layers has a switch: what each adds is measured without building each.

Building, opening and loading a model per group costs more than running it. Here every group has an input, a bool: where it is
true its layers read rounded activations and rounded weights, as float numbers, and otherwise what they would read in FP32::

    x -> QuantizeLinear -> DequantizeLinear -> Where(switch, rounded, x) -> layer

What joins, pools and moves read rounded in the quantised model follows the switch of the layer that made it. All outliers are
taken care of as in the quantised model, whatever the switches say: that changes no number by itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import LiftConstantsToInitializersPass

from compiler import onnx_files
from compiler.onnx_files import FreeNames
from compiler.quantize import graphs, int8, placement, qdq
from compiler.quantize.formats import Grid
from compiler.quantize.groups import Group
from compiler.quantize.observe import load
from compiler.quantize.placement import Placement
from compiler.recipe import EngineSection, QuantizeSection
from compiler.spec import Array, Feeds, OnnxModel, Statistics


def write(
    engine: EngineSection,
    section: QuantizeSection,
    model: OnnxModel,
    statistics: Statistics,
    groups: Sequence[Group],
    path: Path,
) -> tuple[str, ...] | None:
    """Write ``model`` with a switch for each of ``groups`` (as of `compiler.quantize.groups.groups`) to ``path``.

    Returns the names of the inputs, in the order of ``groups``; None where ``engine`` is not INT8 with rounded activations, or
    the model larger than `graphs.COPIED_BYTES`.

    Raises:
        CalibrationError: nothing is left to round, or a tensor was not observed.
    """
    if not engine.ranged or model.size_bytes > graphs.COPIED_BYTES:
        return None
    network = onnx_files.read(model.path)
    LiftConstantsToInitializersPass(lift_all_constants=True)(network)
    graph = network.graph
    of_node = _of_node(graph, groups)
    prepared = int8.prepare(graph, engine, section, load(statistics.path))
    names = FreeNames(graph)
    switches = [
        ir.Value(name=names.free(f"switch_{place}"), type=ir.TensorType(ir.DataType.BOOL), shape=ir.Shape([]))
        for place in range(len(groups))
    ]
    editor = _Editor(graph, names, switches, of_node)
    editor.round_weights(prepared.placed)
    editor.round_activations(
        prepared.placed, {name: editor.constants(name, grid) for name, grid in prepared.grid_of.items()}
    )
    graph.inputs.extend(switches)
    onnx_files.write(network, path)
    return tuple(str(switch.name) for switch in switches)


def feeds(switches: Sequence[str], on: int | None) -> dict[str, np.ndarray[tuple[int, ...], np.dtype[np.bool_]]]:
    """What the switches are given where the group at ``on``, and no other, is to be rounded."""
    return {name: np.array(place == on) for place, name in enumerate(switches)}


def write_with_grids(graph: ir.Graph, placed: Placement) -> dict[str, tuple[str, str]]:
    """Round ``graph`` as ``placed`` says, in place and in float numbers, with inputs for the grid of every activation.

    Returns the names of these inputs, scale (float32) and zero point (int8), by the activation whose grid it is (its root, as
    of `Placement.root`).
    """
    names = FreeNames(graph)
    editor = _Editor(graph, names, None, dict.fromkeys(placed.nodes, 0))
    inputs: dict[str, tuple[ir.Value, ir.Value]] = {}
    for value in placed.activations:
        root = str(placed.root[value].name)
        if root not in inputs:
            scale, zero_point = (
                ir.Value(name=names.free(f"{what}_{len(inputs)}"), type=ir.TensorType(dtype), shape=ir.Shape([]))
                for what, dtype in (("scale", ir.DataType.FLOAT), ("zero_point", ir.DataType.INT8))
            )
            inputs[root] = scale, zero_point
            graph.inputs.extend(inputs[root])
    editor.round_weights(placed)
    editor.round_activations(
        placed, {str(value.name): inputs[str(placed.root[value].name)] for value in placed.activations}
    )
    return {root: (str(scale.name), str(zero_point.name)) for root, (scale, zero_point) in inputs.items()}


def grid_feeds(inputs: Mapping[str, tuple[str, str]], grids: Mapping[str, Grid]) -> Feeds:
    """What the inputs of `write_with_grids` are given for ``grids``, by activation."""
    given: dict[str, Array] = {}
    for root, (scale, zero_point) in inputs.items():
        given[scale] = np.asarray(grids[root].scale, np.float32)
        given[zero_point] = np.asarray(grids[root].zero_point, np.int8)
    return given


def _of_node(graph: ir.Graph, groups: Sequence[Group]) -> dict[ir.Node, int]:
    by_output = {name: place for place, group in enumerate(groups) for name in group.keep}
    return {node: by_output[str(out.name)] for node in graph for out in node.outputs if str(out.name) in by_output}


class _Editor:
    """Rounds in float where a switch says so; without switches, always."""

    def __init__(
        self, graph: ir.Graph, names: FreeNames, switches: Sequence[ir.Value] | None, of_node: Mapping[ir.Node, int]
    ) -> None:
        self._graph, self._names, self._switches, self._of_node = graph, names, switches, of_node

    def round_weights(self, placed: Placement) -> None:
        for node, index in placed.weights:
            if node not in self._of_node:
                continue
            reader, place = placement.reader((node, index))
            weight, axis = reader.inputs[place], placement.weight_axis((node, index))
            assert weight is not None and weight.const_value is not None, "placed"
            exact = weight.const_value.numpy()
            steps, scale, _ = qdq.round_weight(exact, axis)
            rounded = (steps.astype(np.float32) * placement.along(scale, axis, exact.ndim)).astype(np.float32)
            made = graphs.register(self._graph, self._names.free(f"{weight.name}_rounded"), rounded)
            reader.replace_input_with(place, self._choose(reader, self._of_node[node], made, weight))
            graphs.forget_unused(self._graph, weight)

    def round_activations(self, placed: Placement, grids: Mapping[str, tuple[ir.Value, ir.Value]]) -> None:
        """
        Args:
            grids: scale and zero point of every activation of ``placed``, by name: constants or inputs.
        """
        made_by = {placement.fused_output(node): group for node, group in self._of_node.items()}
        edges = [(node, index) for value in placed.outputs for node, index in value.uses()]
        rounded: dict[ir.Value, ir.Value] = {}
        for node, index in dict.fromkeys((*edges, *placed.edges)):
            value = node.inputs[index]
            assert value is not None, "placed"
            group = self._of_node.get(node, made_by.get(placed.root.get(value, value), made_by.get(value)))
            if group is None:
                if self._switches is not None:
                    continue
                group = 0
            if value not in rounded:
                rounded[value] = self._round(value, *grids[str(value.name)])
            node.replace_input_with(index, self._choose(node, group, rounded[value], value))

    def constants(self, name: str, grid: Grid) -> tuple[ir.Value, ir.Value]:
        return (
            graphs.register(self._graph, self._names.free(f"{name}_step"), np.asarray(grid.scale, np.float32)),
            graphs.register(self._graph, self._names.free(f"{name}_zero"), np.asarray(grid.zero_point, np.int8)),
        )

    def _round(self, value: ir.Value, step: ir.Value, zero: ir.Value) -> ir.Value:
        name = str(value.name)
        steps = graphs.like(value, self._names.free(f"{name}_steps"), ir.DataType.INT8)
        again = graphs.like(value, self._names.free(f"{name}_rounded"), ir.DataType.FLOAT)
        nodes = [
            ir.node("QuantizeLinear", [value, step, zero], outputs=[steps], name=steps.name),
            ir.node("DequantizeLinear", [steps, step, zero], outputs=[again], name=again.name),
        ]
        producer = value.producer()
        if producer is not None:
            self._graph.insert_after(producer, nodes)
        else:
            self._graph.insert_before(self._graph[0], nodes)
        return again

    def _choose(self, before: ir.Node, group: int, rounded: ir.Value, exact: ir.Value) -> ir.Value:
        if self._switches is None:
            return rounded
        chosen = graphs.like(exact, self._names.free(f"{exact.name}_switched"), ir.DataType.FLOAT)
        node = ir.node("Where", [self._switches[group], rounded, exact], outputs=[chosen], name=chosen.name)
        self._graph.insert_before(before, node)
        return chosen

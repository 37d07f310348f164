"""Graph passes with the classic mistakes, each of which the driver and the random graphs must catch."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import onnx_ir as ir

from compiler.optimize import edit
from compiler.optimize.contract import Pass


def _nodes(model: ir.Model, *op_types: str) -> Iterator[ir.Node]:
    for graph in edit.graphs(model):
        for node in graph:
            if edit.is_op(node, *op_types):
                yield node


def _drop(node: ir.Node) -> int:
    """Take a node for the identity."""
    source, output = edit.input_at(node, 0), edit.only_output(node)
    if source is None or output is None or not edit.replace(output, source):
        return 0
    edit.remove(node)
    return 1


def lost_cast(model: ir.Model, limit_bytes: int) -> int:
    """Cast of Cast to its own dtype is nothing, whatever was lost on the way."""
    changed = 0
    for node in _nodes(model, "Cast"):
        middle = edit.input_at(node, 0)
        inner = middle.producer() if middle is not None else None
        if edit.is_op(inner, "Cast") and node.inputs[0] is not inner.inputs[0]:
            node.replace_input_with(0, inner.inputs[0])
            changed += 1
    return changed


def transposed_axes(model: ir.Model, limit_bytes: int) -> int:
    """Two permutations composed in the wrong order."""
    changed = 0
    for node in _nodes(model, "Transpose"):
        middle = edit.input_at(node, 0)
        inner = middle.producer() if middle is not None else None
        if edit.is_op(inner, "Transpose"):
            first, second = (list(n.attributes["perm"].as_ints()) for n in (inner, node))
            node.attributes["perm"] = ir.AttrInt64s("perm", [second[axis] for axis in first])
            node.replace_input_with(0, inner.inputs[0])
            changed += 1
    return changed


def nan_blind(model: ir.Model, limit_bytes: int) -> int:
    """x - x is 0 — but not where x is NaN or infinite."""
    editor = edit.Editor(model)
    changed = 0
    for node in _nodes(model, "Sub"):
        x = node.inputs[0]
        shape = [dim if isinstance(dim, int) else 1 for dim in edit.dims(x) or ()]
        if x is node.inputs[1] and x is not None and x.dtype == ir.DataType.FLOAT and shape:
            zeros = editor.weight(np.zeros(shape, np.float32), wish="zeros", before=node)
            edit.replace(node.outputs[0], editor.node("Identity", (zeros,), before=node, like=node.outputs[0]))
            edit.remove(node)
            changed += 1
    return changed


def first_output_for_second(model: ir.Model, limit_bytes: int) -> int:
    """A Split whose second output was dropped."""
    changed = 0
    for node in _nodes(model, "Split"):
        if len(node.outputs) == 2 and edit.is_used(node.outputs[1]):
            changed += edit.replace(node.outputs[1], node.outputs[0])
    return changed


def shared_weight_edited(model: ir.Model, limit_bytes: int) -> int:
    """A Mul folded into a weight in place, though another node uses it too."""
    changed = 0
    for node in _nodes(model, "Mul"):
        source, factor = edit.input_at(node, 0), edit.constant_scalar(edit.input_at(node, 1))
        linear = source.producer() if source is not None else None
        if source is None or factor is None or factor == 0 or not edit.is_op(linear, "Conv", "Gemm", "MatMul"):
            continue
        weight = linear.inputs[1]
        if (
            weight is None
            or not weight.is_initializer()
            or edit.input_at(linear, 2)
            or not edit.feeds_only(source, node)
        ):
            continue
        array = edit.constant_array(weight)
        if array is not None and edit.can_replace(node.outputs[0], source):
            weight.const_value = ir.tensor((array * factor).astype(array.dtype), name=weight.name)
            edit.replace(node.outputs[0], source)
            edit.remove(node)
            changed += 1
    return changed


def wrong_epsilon(model: ir.Model, limit_bytes: int) -> int:
    """The attribute forgotten, its default used."""
    found = [node for node in _nodes(model, "BatchNormalization") if "epsilon" in node.attributes]
    return sum(node.attributes.pop("epsilon").as_float() != np.float32(1e-5) for node in found)


def wrong_axis(model: ir.Model, limit_bytes: int) -> int:
    """A BatchNormalization folded into the inputs of a square weight instead of its outputs."""
    changed = 0
    for node in _nodes(model, "BatchNormalization"):
        source = edit.input_at(node, 0)
        linear = source.producer() if source is not None else None
        if source is None or not edit.is_op(linear, "Conv", "Gemm") or not edit.feeds_only(source, node):
            continue
        weight, scale = (edit.constant_array(edit.input_at(n, 1)) for n in (linear, node))
        if weight is None or scale is None or weight.ndim < 2 or len(scale) != weight.shape[1]:
            continue
        if edit.can_replace(node.outputs[0], source):
            scaled = weight * scale.reshape(-1, *(1,) * (weight.ndim - 2))
            linear.replace_input_with(1, edit.Editor(model).weight(scaled, wish="scaled", before=linear))
            edit.replace(node.outputs[0], source)
            edit.remove(node)
            changed += 1
    return changed


def off_by_one_slice(model: ir.Model, limit_bytes: int) -> int:
    """A Slice that starts at 1 taken for one of all."""
    found = [node for node in _nodes(model, "Slice") if edit.constant_ints(edit.input_at(node, 1)) in ([0], [1])]
    return sum(_drop(node) for node in found)


def wrong_broadcast(model: ir.Model, limit_bytes: int) -> int:
    """An Expand dropped though nothing downstream expands."""
    return sum(_drop(node) for node in _nodes(model, "Expand"))


def same_but_for_attributes(model: ir.Model, limit_bytes: int) -> int:
    """Duplicates found without looking at attributes."""
    changed = 0
    seen: dict[tuple[object, ...], ir.Node] = {}
    for node in list(_nodes(model, "LeakyRelu", "Transpose", "ReduceSum", "Gather")):
        kept = seen.setdefault((node.op_type, node.graph, *node.inputs), node)
        if kept is not node and edit.replace(node.outputs[0], kept.outputs[0]):
            edit.remove(node)
            changed += 1
    return changed


def duplicate_name(model: ir.Model, limit_bytes: int) -> int:
    """Two values under one name."""
    values = [value for node in model.graph for value in node.outputs if not value.is_graph_output()]
    if len(values) < 2 or values[0].name == values[1].name:
        return 0
    values[1].name = values[0].name
    return 1


def renamed_output(model: ir.Model, limit_bytes: int) -> int:
    output = model.graph.outputs[0]
    changed = output.name != "renamed"
    output.name = "renamed"
    return int(changed)


def fixed_axis(model: ir.Model, limit_bytes: int) -> int:
    """A dynamic axis that took the size of an example."""
    for value in model.graph.inputs:
        shape = edit.dims(value) or ()
        if any(isinstance(dim, str) for dim in shape):
            value.shape = ir.Shape([dim if isinstance(dim, int) else 2 for dim in shape])
            return 1
    return 0


def lost_output(model: ir.Model, limit_bytes: int) -> int:
    if len(model.graph.outputs) < 2:
        return 0
    model.graph.outputs.pop()
    return 1


def unknown_operator(model: ir.Model, limit_bytes: int) -> int:
    """An operator that no runtime here has, in a domain that the checker does not know."""
    for node in _nodes(model, "Neg", "Relu", "Add"):
        node.domain = "nobody.knows"
        model.opset_imports["nobody.knows"] = 1
        return 1
    return 0


def _plant(run: Callable[[ir.Model, int], int]) -> Pass:
    return Pass(name=run.__name__, does="breaks something", counts="fault", run=run, rounds=False)


WRONG_NUMBERS = [
    _plant(run)
    for run in (
        lost_cast,
        transposed_axes,
        nan_blind,
        first_output_for_second,
        shared_weight_edited,
        wrong_epsilon,
        wrong_axis,
        off_by_one_slice,
        wrong_broadcast,
        same_but_for_attributes,
    )
]
WRONG_GRAPHS = [_plant(run) for run in (duplicate_name, renamed_output, fixed_axis, lost_output, unknown_operator)]

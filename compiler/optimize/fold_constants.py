"""Nodes whose inputs are all constant: their value, computed once, now.

Why not onnxscript's folder: it evaluates before it asks how large the result is, writes Constant attributes and Split
attributes that older opsets lack, and gets casts to and from small floats wrong. onnx's own reference implementation
computes here too, for operators where it and every runtime agree, on dtypes that numpy has.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
import onnx.reference.ops
import onnx_ir as ir

from compiler.optimize import edit
from compiler.optimize.contract import Pass
from compiler.spec import Array

_KEPT_SMALL_BYTES = 1 << 20
"""What grows out of little (Expand, ConstantOfShape, Range, ...) is stored up to this size; beyond, it stays a node."""

_MOVING = frozenset(
    {
        "Concat", "Expand", "Flatten", "Gather", "GatherElements", "GatherND", "Reshape", "Slice", "Split",
        "Squeeze", "Tile", "Transpose", "Trilu", "Unsqueeze", "Where",
    }
)  # fmt: skip
"""Operators that move values and compute none: any dtype that fills whole bytes."""

_COMPUTING = frozenset(
    {
        "Abs", "Add", "And", "Ceil", "Cos", "CumSum", "Div", "Equal", "Erf", "Exp", "Floor", "Greater",
        "GreaterOrEqual", "Less", "LessOrEqual", "Log", "MatMul", "Max", "Min", "Mul", "Neg", "Not", "Or", "Pow",
        "Range", "Reciprocal", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum", "Sigmoid", "Sign",
        "Sin", "Sqrt", "Sub", "Tanh", "Xor",
    }
)  # fmt: skip
"""Operators on which onnx's reference and the runtimes agree, for the dtypes of `_COMPUTABLE` and without NaN."""

_GROWING = frozenset({"ConstantOfShape", "Expand", "Range", "Tile"})

_BROADCASTING = frozenset(
    {
        "Add", "And", "Div", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Max", "Min", "Mul", "Or",
        "Pow", "Sub", "Where", "Xor",
    }
)  # fmt: skip
_MAX_PRODUCTS = 1 << 32
"""Multiplications that a MatMul may take to be computed here."""

_COMPUTABLE = frozenset(np.dtype(name) for name in ("float32", "float64", "int32", "int64", "bool"))
_CASTABLE = _COMPUTABLE | {
    np.dtype(name) for name in ("float16", "int8", "int16", "uint8", "uint16", "uint32", "uint64")
}
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_MAX_ITEM_BYTES = 8


def _run(model: ir.Model, limit_bytes: int) -> int:
    editor = edit.Editor(model)
    room = limit_bytes - edit.weights_bytes(model)
    changed = 0
    for graph in edit.graphs(model):
        for node in graph:
            if edit.is_op(node, "Constant"):
                changed += _store(node, model, editor)
                continue
            results = _evaluate(node, model, room)
            if results is None:
                continue
            for output, array in zip(node.outputs, results, strict=True):
                if edit.is_used(output):
                    room -= array.nbytes
                    _let_be(output, array, node, editor)
            sources = [value for value in node.inputs if value is not None]
            edit.remove(node)
            room += sum(_forget(value) for value in set(sources))
            changed += 1
    return changed


def _forget(value: ir.Value) -> int:
    """Drop a weight that nothing uses any more. Returns the bytes that this frees."""
    if not value.is_initializer() or value.is_graph_input() or edit.is_used(value) or value.const_value is None:
        return 0
    assert isinstance(value.graph, ir.Graph) and value.name is not None
    del value.graph.initializers[value.name]
    return value.const_value.nbytes


def _store(node: ir.Node, model: ir.Model, editor: edit.Editor) -> int:
    """Turn a Constant node into an initialiser, where the IR version has initialisers that are not inputs."""
    output, tensor = node.outputs[0], edit.constant(node.outputs[0])
    if tensor is None or model.ir_version < 4 or output.is_graph_output() or tensor.dtype == ir.DataType.STRING:
        return 0
    graph = node.graph
    assert isinstance(graph, ir.Graph) and output.name is not None
    name = output.name
    value = ir.Value(
        name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape.numpy()), const_value=tensor
    )
    edit.replace(output, value)
    edit.remove(node)
    if name in graph.initializers:
        value.name = editor.name(name)
    graph.register_initializer(value)
    return 1


def _let_be(output: ir.Value, array: Array, node: ir.Node, editor: edit.Editor) -> None:
    """``output`` becomes a constant; a graph output stays the output of a node."""
    weight = editor.weight(array, wish=f"{output.name}_folded", before=node)
    if not edit.replace(output, weight):
        edit.replace(output, editor.node("Identity", (weight,), before=node, like=output))


# --- what may be computed -------------------------------------------------------------------------------------------


def _evaluate(node: ir.Node, model: ir.Model, room: int) -> list[Array] | None:
    """The outputs of ``node``, or None where it is to stay."""
    growing = node.op_type in _GROWING
    if node.domain != "" or node.op_type not in _MOVING | _COMPUTING | {"Cast", "CastLike", "ConstantOfShape"}:
        return None
    if not node.inputs or any(value is not None and edit.constant(value) is None for value in node.inputs):
        return None
    inputs = [None if value is None else edit.constant_array(value) for value in node.inputs]
    if any(array is None and value is not None for array, value in zip(inputs, node.inputs, strict=True)):
        return None
    arrays = [array for array in inputs if array is not None]
    if not _may_compute(node, arrays):
        return None
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        try:
            size = _output_bytes(node, inputs)
            if size is None or size > (min(room, _KEPT_SMALL_BYTES) if growing else room):
                return None
            if size > _KEPT_SMALL_BYTES and any(_is_shared(value) for value in node.inputs):
                return None
            results = _compute(node, inputs, edit.opset(model))
        except Exception:
            # The reference raises whatever it likes on what it cannot do; the node then stays.
            return None
    if results is None or len(results) != len(node.outputs):
        return None
    for output, array in zip(node.outputs, results, strict=True):
        expected = output.dtype
        if expected is not None and expected != ir.tensor(array).dtype:
            return None
        known = edit.static(output)
        if known is not None and known != array.shape:
            return None
    return results


def _is_shared(value: ir.Value | None) -> bool:
    """Whether a large weight stays although this node is gone: then its result would be a second copy (of a table that a head
    is tied to, say)."""
    if value is None or value.const_value is None or value.const_value.nbytes <= _KEPT_SMALL_BYTES:
        return False
    return value.is_graph_output() or len({node for node, _ in value.uses()}) > 1


def _may_compute(node: ir.Node, arrays: Sequence[Array]) -> bool:
    dtypes = {array.dtype for array in arrays}
    if node.op_type not in _COMPUTING:
        return dtypes <= _CASTABLE | {_BFLOAT16}
    if not dtypes <= _COMPUTABLE or any(array.dtype.kind == "f" and np.isnan(array).any() for array in arrays):
        return False
    integers = arrays[0].dtype.kind == "i"
    return not integers or (node.op_type != "ReduceMean" and (node.op_type != "Div" or bool(arrays[-1].all())))


def _output_bytes(node: ir.Node, inputs: Sequence[Array | None]) -> int | None:
    """An upper bound of the bytes that the outputs take together, known before anything is computed."""
    arrays = [array for array in inputs if array is not None]
    first = arrays[0]
    item = max(array.itemsize for array in arrays)
    match node.op_type:
        case "ConstantOfShape":
            return math.prod(int(dim) for dim in first) * _MAX_ITEM_BYTES
        case "Expand":
            return math.prod(np.broadcast_shapes(first.shape, tuple(int(dim) for dim in arrays[1]))) * item
        case "Tile":
            return first.size * math.prod(int(repeat) for repeat in arrays[1]) * item
        case "Range":
            start, limit, step = (float(array.reshape(())) for array in arrays)
            return max(0, math.ceil((limit - start) / step)) * item
        case "Cast" | "CastLike":
            return first.size * _MAX_ITEM_BYTES
        case "Gather":
            axis = node.attributes.get("axis")
            along: int = first.shape[axis.as_int() if axis is not None else 0]
            return first.size // max(along, 1) * arrays[1].size * item
        case "GatherElements":
            return arrays[1].size * item
        case "GatherND":
            depth = arrays[1].shape[-1]
            return (
                arrays[1].size // max(depth, 1) * math.prod(first.shape[depth:]) * item if not node.attributes else None
            )
        case "MatMul":
            left, right = first.reshape(1, -1) if first.ndim == 1 else first, arrays[1]
            columns = 1 if right.ndim == 1 else right.shape[-1]
            batch = math.prod(np.broadcast_shapes(left.shape[:-2], right.shape[:-2]))
            work = batch * left.shape[-2] * left.shape[-1] * columns
            return batch * left.shape[-2] * columns * item if work <= _MAX_PRODUCTS else None
        case "Concat":
            return sum(array.nbytes for array in arrays)
        case _ if len(arrays) > 1 and node.op_type in _BROADCASTING:
            return math.prod(np.broadcast_shapes(*(array.shape for array in arrays))) * item
        case _:
            return first.size * item


# --- computing ------------------------------------------------------------------------------------------------------


def _compute(node: ir.Node, inputs: Sequence[Array | None], version: int) -> list[Array] | None:
    first = inputs[0]
    assert first is not None
    if node.op_type == "Cast":
        return _cast(first, ir.DataType(node.attributes["to"].as_int()))
    if node.op_type == "CastLike":
        like = node.inputs[1]
        return _cast(first, like.dtype) if like is not None and like.dtype is not None else None
    if node.op_type == "ConstantOfShape":
        value = node.attributes.get("value")
        fill = np.zeros(1, np.float32) if value is None else value.as_tensor().numpy()
        return [np.full([int(dim) for dim in first], fill[0])] if fill.dtype in _CASTABLE else None
    attributes = {name: _plain(attribute) for name, attribute in node.attributes.items()}
    operator = onnx.reference.ops.load_op("", node.op_type, version)
    results = operator.create(len(inputs), n_outputs=len(node.outputs), **attributes).run(*inputs)
    return [
        np.ascontiguousarray(result).reshape(np.shape(result))
        for result in (results if isinstance(results, list | tuple) else [results])
    ]


def _plain(attribute: ir.Attr) -> Any:
    if attribute.is_ref():
        raise ValueError("an attribute of a function has no value here")
    return list(attribute.value) if isinstance(attribute.value, tuple) else attribute.value


def _cast(array: Array, to: ir.DataType) -> list[Array] | None:
    """Cast where every runtime rounds alike: not beyond the range of integers, and not twice on the way to 16 bits."""
    allowed = _CASTABLE | {_BFLOAT16}
    if to in (ir.DataType.STRING, ir.DataType.UNDEFINED) or to.numpy() not in allowed or array.dtype not in allowed:
        return None
    target, source_is_float = to.numpy(), array.dtype.kind not in "iub"
    if source_is_float and np.isnan(array.astype(np.float64)).any():
        return None
    if source_is_float and target.kind in "iu":
        limits = np.iinfo(target)
        wide = np.trunc(array.astype(np.float64))
        if not (np.isfinite(wide).all() and (wide >= limits.min).all() and (wide < float(limits.max) + 1).all()):
            return None
    result = array.astype(target)
    to_half = target.itemsize == 2 and target.kind not in "iu"
    if to_half and array.dtype != np.float32 and not (result.astype(array.dtype) == array).all():
        return None
    return [result]


FOLD_CONSTANTS = Pass(
    name="fold_constants",
    does="computes nodes whose inputs are constant, and turns Constant nodes into weights",
    counts="node",
    run=_run,
)

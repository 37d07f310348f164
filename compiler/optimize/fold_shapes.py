"""Arithmetic on shapes, followed through the graph: what is known of it becomes constant.

A dynamic model computes the target of each Reshape from Shape, Gather and Concat. Where the sizes are fixed the whole
computation is a constant; where some are dynamic, ``0`` (copy the axis) and ``-1`` (what is left) often say the same.
Two axes of the same name have the same size: that is what ONNX means by a name.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from compiler.optimize import edit
from compiler.optimize.contract import Pass
from compiler.spec import Dim

_MAX_ELEMENTS = 64


@dataclass(frozen=True)
class _Sizes:
    """What is known of a small integer tensor of rank 0 or 1: numbers, names of axes, None where nothing is known."""

    elements: tuple[Dim | None, ...]
    scalar: bool
    dtype: ir.DataType


def _run(model: ir.Model, limit_bytes: int) -> int:
    del limit_bytes
    editor = edit.Editor(model)
    known: dict[ir.Value, _Sizes] = {}
    changed = 0
    for graph in edit.graphs(model):
        for node in graph:
            if node.domain != "" or edit.constant(node.outputs[0] if node.outputs else None) is not None:
                continue
            if node.op_type == "Reshape" and (swapped := _swapped(node, known)) is not None:
                perm = ir.AttrInt64s("perm", [*range(swapped[1] - 2), swapped[1] - 1, swapped[1] - 2])
                output = node.outputs[0]
                edit.replace(output, editor.node("Transpose", (swapped[0],), (perm,), before=node, like=output))
                edit.remove(node)
                changed += 1
            elif node.op_type == "Reshape":
                changed += _settle_target(node, known, editor)
            elif node.op_type == "Expand":
                source = _unexpanded(node, known)
                if source is not None and edit.replace(node.outputs[0], source):
                    edit.remove(node)
                    changed += 1
            elif (follow := _FOLLOW.get(node.op_type)) is not None:
                sizes = follow(node, [_sizes(value, known) for value in node.inputs])
                if sizes is not None and len(sizes.elements) <= _MAX_ELEMENTS:
                    known[node.outputs[0]] = sizes
                    changed += _settle(node, sizes, editor)
    return changed


def _sizes(value: ir.Value | None, known: dict[ir.Value, _Sizes]) -> _Sizes | None:
    if value in known:
        return known[value]
    array = edit.constant_array(value, max_elements=_MAX_ELEMENTS)
    if array is None or array.ndim > 1 or array.dtype not in (np.int64, np.int32):
        return None
    return _Sizes(tuple(int(x) for x in array.reshape(-1)), array.ndim == 0, ir.DataType.from_numpy(array.dtype))


def _settle(node: ir.Node, sizes: _Sizes, editor: edit.Editor) -> int:
    """Replace a node whose every element is known with a constant."""
    output = node.outputs[0]
    if not all(isinstance(element, int) for element in sizes.elements) or output.is_graph_output():
        return 0
    array = np.array(sizes.elements, sizes.dtype.numpy()).reshape(() if sizes.scalar else -1)
    edit.replace(output, editor.weight(array, wish=f"{output.name}_sizes", before=node))
    edit.remove(node)
    return 1


def _settle_target(node: ir.Node, known: dict[ir.Value, _Sizes], editor: edit.Editor) -> int:
    """Give a Reshape a constant target, if 0 and -1 can stand for all that is dynamic in it."""
    source = edit.dims(edit.input_at(node, 0))
    target = _sizes(edit.input_at(node, 1), known)
    if source is None or target is None or edit.constant(node.inputs[1]) is not None:
        return 0
    wanted = _without_rest(source, target.elements)
    if any(isinstance(size, int) and size < 1 for size in wanted):
        return 0
    new: list[int | None] = []
    for index, size in enumerate(wanted):
        copied = isinstance(size, str) and index < len(source) and source[index] == size
        new.append(size if isinstance(size, int) else 0 if copied else None)
    unknown = [index for index, size in enumerate(new) if size is None]
    # Beside a copied axis, which may be 0 long, -1 would be undetermined.
    if len(unknown) > 1 or (unknown and 0 in new):
        return 0
    settled = np.array([-1 if size is None else size for size in new], np.int64)
    node.replace_input_with(1, editor.weight(settled, wish=f"{node.outputs[0].name}_target", before=node))
    # Every number in it is at least 1 or copies, so only the default of 0 is right.
    node.attributes.pop("allowzero", None)
    return 1


def _swapped(node: ir.Node, known: dict[ir.Value, _Sizes]) -> tuple[ir.Value, int] | None:
    """The tensor, and its rank, of which ``node`` swaps the last two axes by way of a batch of matrices.

    As torch exports the transposition of attention's keys: ``[B, H, T, K] -> [B H, T, K] -> [B H, K, T] -> [B, H, K, T]``.
    """
    turned = edit.input_at(node, 0)
    transpose = turned.producer() if turned is not None else None
    if not edit.is_op(transpose, "Transpose") or edit.input_at(transpose, 0) is None:
        return None
    perm = transpose.attributes.get("perm")
    flat = transpose.inputs[0].producer() if transpose.inputs[0] is not None else None
    if perm is None or perm.is_ref() or tuple(perm.as_ints()) != (0, 2, 1) or not edit.is_op(flat, "Reshape"):
        return None
    source, flattened, target = flat.inputs[0], _sizes(flat.inputs[1], known), _sizes(node.inputs[1], known)
    shape = edit.dims(source)
    if source is None or shape is None or len(shape) < 3 or flattened is None or target is None:
        return None
    last = shape[-2:]
    fixed = not any(size is None or size == 0 for size in (*shape, *flattened.elements, *target.elements))
    same = flattened.elements[1:] == last and target.elements == (*shape[:-2], *last[::-1])
    return (source, len(shape)) if fixed and same else None


def _without_rest(source: edit.Dims, target: edit.Dims) -> edit.Dims:
    """``target`` with its -1 worked out, where both sides have the same dynamic axes.

    >>> _without_rest(("batch", "tokens", 64), ("batch", "tokens", -1, 16))
    ('batch', 'tokens', 4, 16)
    """
    sizes = [size for size in target if isinstance(size, int) and size != -1]
    if target.count(-1) != 1 or None in source or None in target or math.prod(sizes) < 1:
        return target
    if Counter(d for d in source if isinstance(d, str)) != Counter(d for d in target if isinstance(d, str)):
        return target
    rest, left = divmod(math.prod(d for d in source if isinstance(d, int)), math.prod(sizes))
    return target if left else tuple(rest if size == -1 else size for size in target)


def _unexpanded(node: ir.Node, known: dict[ir.Value, _Sizes]) -> ir.Value | None:
    """The input of an Expand that leaves every axis as it is."""
    source, target = edit.input_at(node, 0), _sizes(edit.input_at(node, 1), known)
    shape = edit.dims(source)
    if shape is None or target is None or len(target.elements) > len(shape):
        return None
    tail = shape[len(shape) - len(target.elements) :]
    same = all(want is not None and want in (1, size) for size, want in zip(tail, target.elements, strict=True))
    return source if same else None


# --- one function per operator ----------------------------------------------------------------------------------------


def _int(node: ir.Node, name: str, default: int) -> int | None:
    attribute = node.attributes.get(name)
    if attribute is None:
        return default
    return None if attribute.is_ref() or attribute.type != ir.AttributeType.INT else attribute.as_int()


def _shape(node: ir.Node, inputs: list[_Sizes | None]) -> _Sizes | None:
    del inputs
    shape, start, end = edit.dims(edit.input_at(node, 0)), _int(node, "start", 0), _int(node, "end", 2**31)
    if shape is None or start is None or end is None:
        return None
    return _Sizes(shape[start:end], scalar=False, dtype=ir.DataType.INT64)


def _size(node: ir.Node, inputs: list[_Sizes | None]) -> _Sizes | None:
    del inputs
    shape = edit.static(edit.input_at(node, 0))
    if shape is None:
        return None
    return _Sizes((int(np.prod(shape, dtype=np.int64)),), scalar=True, dtype=ir.DataType.INT64)


def _gather(node: ir.Node, inputs: list[_Sizes | None]) -> _Sizes | None:
    source, indices = inputs
    if source is None or indices is None or source.scalar or _int(node, "axis", 0) not in (0, -1):
        return None
    count = len(source.elements)
    if any(not isinstance(index, int) or not -count <= index < count for index in indices.elements):
        return None
    picked = tuple(source.elements[index] for index in indices.elements if isinstance(index, int))
    return _Sizes(picked, indices.scalar, source.dtype)


def _slice(node: ir.Node, inputs: list[_Sizes | None]) -> _Sizes | None:
    del node
    if len(inputs) < 3 or any(part is None for part in inputs):
        return None
    source, *parts = (part for part in inputs if part is not None)
    numbers = [part.elements[0] for part in parts if len(part.elements) == 1]
    if source.scalar or len(numbers) != len(parts) or (len(numbers) > 2 and numbers[2] not in (0, -1)):
        return None
    start, end, step = numbers[0], numbers[1], numbers[3] if len(numbers) > 3 else 1
    if not isinstance(start, int) or not isinstance(end, int) or not isinstance(step, int) or step < 1:
        return None
    return _Sizes(source.elements[start:end:step], scalar=False, dtype=source.dtype)


def _concat(node: ir.Node, inputs: list[_Sizes | None]) -> _Sizes | None:
    parts = [part for part in inputs if part is not None and not part.scalar]
    if len(parts) != len(inputs) or not parts or _int(node, "axis", 1) not in (0, -1):
        return None
    return _Sizes(tuple(element for part in parts for element in part.elements), scalar=False, dtype=parts[0].dtype)


def _unsqueeze(node: ir.Node, inputs: list[_Sizes | None]) -> _Sizes | None:
    source = inputs[0]
    if source is None or not source.scalar or _axes(node, inputs) not in ([0], [-1]):
        return None
    return _Sizes(source.elements, scalar=False, dtype=source.dtype)


def _squeeze(node: ir.Node, inputs: list[_Sizes | None]) -> _Sizes | None:
    source = inputs[0]
    if source is None or source.scalar or len(source.elements) != 1 or _axes(node, inputs) not in ([0], [-1], []):
        return None
    return _Sizes(source.elements, scalar=True, dtype=source.dtype)


def _axes(node: ir.Node, inputs: list[_Sizes | None]) -> list[Dim | None] | None:
    """The axes, of the attribute or of the input; [] where there are none, None where they are not known."""
    attribute = node.attributes.get("axes")
    if attribute is not None:
        return None if attribute.is_ref() else list(attribute.as_ints())
    if len(inputs) < 2 or node.inputs[1] is None:
        return []
    return list(inputs[1].elements) if inputs[1] is not None else None


def _cast(node: ir.Node, inputs: list[_Sizes | None]) -> _Sizes | None:
    to = _int(node, "to", 0)
    if inputs[0] is None or to not in (ir.DataType.INT64, ir.DataType.INT32):
        return None
    numbers = [element for element in inputs[0].elements if isinstance(element, int)]
    if any(abs(number) >= 2**31 for number in numbers):
        return None
    return _Sizes(inputs[0].elements, inputs[0].scalar, ir.DataType(to))


def _identity(node: ir.Node, inputs: list[_Sizes | None]) -> _Sizes | None:
    del node
    return inputs[0]


def _arithmetic(compute: Callable[[int, int], int]) -> _Follow:
    """Element by element, where both are known."""

    def follow(node: ir.Node, inputs: list[_Sizes | None]) -> _Sizes | None:
        left, right = inputs
        if left is None or right is None or len(left.elements) != len(right.elements):
            return None
        elements: list[Dim | None] = []
        for a, b in zip(left.elements, right.elements, strict=True):
            if isinstance(a, int) and isinstance(b, int):
                if node.op_type == "Div" and b == 0:
                    return None
                elements.append(compute(a, b))
            else:
                elements.append(None)
        if any(isinstance(element, int) and abs(element) >= 2**31 for element in elements):
            return None
        return _Sizes(tuple(elements), left.scalar and right.scalar, left.dtype)

    return follow


def _truncated(a: int, b: int) -> int:
    """Integer division of ONNX rounds towards zero."""
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


_Follow = Callable[[ir.Node, list[_Sizes | None]], _Sizes | None]

_FOLLOW: dict[str, _Follow] = {
    "Add": _arithmetic(lambda a, b: a + b),
    "Cast": _cast,
    "Concat": _concat,
    "Div": _arithmetic(_truncated),
    "Gather": _gather,
    "Identity": _identity,
    "Mul": _arithmetic(lambda a, b: a * b),
    "Shape": _shape,
    "Size": _size,
    "Slice": _slice,
    "Squeeze": _squeeze,
    "Sub": _arithmetic(lambda a, b: a - b),
    "Unsqueeze": _unsqueeze,
}

FOLD_SHAPES = Pass(
    name="fold_shapes",
    does="makes sizes, and targets of Reshape and Expand, constant where shapes say what they are; one Transpose of three",
    counts="node",
    run=_run,
)

"""What ONNX Runtime's CPU provider needs changed in a canonical model; none of it changes what a number is rounded to: to 8 bits
that is; sums of floats may come out in another order.

- Activations in INT8 become UINT8, with a zero point 128 larger: the same grid, for the kernels that are fast on x86 (signed
  ones were slower than FP32).
- ``Relu -> QuantizeLinear`` becomes ``QuantizeLinear -> Clip`` in UINT8, and just QuantizeLinear where zero is the lowest
  level. Rounding is monotone and zero is a level, so the order does not matter; but only a convolution that is directly
  followed by QuantizeLinear becomes one integer kernel, and with zero point 128 the runtime cannot drop the Relu. Measured on
  a residual network: 0.38 times FP32's time, against 1.25 as it stood.
- One QuantizeLinear serves all consumers of a tensor.
- A matrix product of rounded operands becomes MatMulIntegerToFloat, bias inside. The runtime would make it itself, but
  without the bias, and not of a product of rank 2 with a bias, which it turns into a float Gemm first (7 times
  FP32's time, against 0.55).
- Rows of a table in INT8 are looked up first and scaled then: the runtime would scale the whole table in every call. A head
  that multiplies by the transposed table wants it so in memory; then the lookup takes columns of that, and one copy serves both.
- Attention becomes one operator: see `attention`.
- BF16 has no kernels on a CPU: every operator computes in FP32, and its result is rounded to BF16, as on a GPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass, ShapeInferencePass

from compiler.backends.attention import MICROSOFT, fuse_attention
from compiler.onnx_files import FreeNames
from compiler.spec import Array

MIDDLE = 128
"""The UINT8 that stands for the INT8 0."""

_BF16_ANYWAY = frozenset({"Cast", "Constant", "If", "Loop", "Scan"})


def lower(model: ir.Model) -> list[str]:
    """Lower ``model`` in place; returns what a reader of the report should know."""
    notes = []
    fuse_attention(model)
    turned: dict[ir.Value, ir.Value] = {}
    if any(node.op_type == "QuantizeLinear" for node in model.graph):
        to_unsigned(model)
        turned = fuse_products(model)
    look_up_first(model, turned)
    if emulate_bfloat16(model):
        notes.append("BF16 is emulated on this CPU (FP32 kernels, results rounded): it shows accuracy, not speed")
    return notes


# --- integers -------------------------------------------------------------------------------------------------------


def to_unsigned(model: ir.Model) -> None:
    """INT8 activations as UINT8, in place: every value is the same to the bit."""
    graph, editor = model.graph, _Editor(model)
    for node in tuple(graph):
        if _is_signed_quantize(node):
            for user in (node, *(user for user, _ in node.outputs[0].uses())):
                zero_point = _array(user.inputs[2])
                assert zero_point is not None, "as `_is_signed_quantize` found"
                unsigned = (zero_point.astype(np.int16) + MIDDLE).astype(np.uint8)
                user.replace_input_with(2, editor.constant(f"{user.name}_unsigned", unsigned))
            node.outputs[0].dtype = ir.DataType.UINT8
    _merge_quantize(graph)
    for node in tuple(graph):
        if node.op_type == "QuantizeLinear" and node.outputs[0].dtype == ir.DataType.UINT8 and len(node.inputs) == 3:
            _clip_after_rounding(graph, editor, node)
    RemoveUnusedNodesPass()(model)


def _is_signed_quantize(node: ir.Node) -> bool:
    """Whether ``node`` rounds a whole tensor to INT8, for DequantizeLinear alone to read."""
    if node.domain != "" or node.op_type != "QuantizeLinear" or len(node.inputs) < 3:
        return False
    zero_point, scale = _array(node.inputs[2]), _array(node.inputs[1])
    if zero_point is None or zero_point.dtype != np.int8 or scale is None or scale.size != 1:
        return False
    readers = [user for user, _ in node.outputs[0].uses()]
    dequantized = all(
        user.op_type == "DequantizeLinear" and len(user.inputs) == 3 and _array(user.inputs[2]) is not None
        for user in readers
    )
    return dequantized and not node.outputs[0].is_graph_output()


def _merge_quantize(graph: ir.Graph) -> None:
    """One QuantizeLinear of those that compute the same."""
    first: dict[tuple[ir.Value | None, bytes, bytes, str], ir.Value] = {}
    for node in tuple(graph):
        if node.op_type != "QuantizeLinear" or node.domain != "" or len(node.inputs) < 3 or node.attributes:
            continue
        scale, zero_point = _array(node.inputs[1]), _array(node.inputs[2])
        if scale is None or zero_point is None:
            continue
        key = (node.inputs[0], scale.tobytes(), zero_point.tobytes(), str(scale.dtype) + str(zero_point.dtype))
        kept = first.setdefault(key, node.outputs[0])
        if kept is not node.outputs[0] and not node.outputs[0].is_graph_output():
            node.outputs[0].replace_all_uses_with(kept)


def _clip_after_rounding(graph: ir.Graph, editor: _Editor, quantize: ir.Node) -> None:
    """``Relu -> QuantizeLinear`` (or Clip) as ``QuantizeLinear -> Clip``."""
    activation = quantize.inputs[0].producer() if quantize.inputs[0] is not None else None
    if activation is None or activation.domain != "" or activation.op_type not in ("Relu", "Clip"):
        return
    output = activation.outputs[0]
    if len(output.uses()) != 1 or output.is_graph_output() or activation.graph is not graph:
        return
    scale, zero_point = _array(quantize.inputs[1]), _array(quantize.inputs[2])
    if scale is None or scale.size != 1 or zero_point is None:
        return
    bounds: list[Array | None] = [np.zeros((), np.float32), None]
    if activation.op_type == "Clip":
        given = [*activation.inputs[1:], None, None][:2]
        bounds = [_array(bound) for bound in given]
        if any(value is not None and bound is None for value, bound in zip(given, bounds, strict=True)):
            return
    grid = scale.reshape(()), int(zero_point.reshape(()))
    steps, limits = quantize.outputs[0], list[ir.Value | None]()
    for bound, side, anyway in zip(bounds, ("low", "high"), (0, 255), strict=True):
        limit = None if bound is None else _rounded(bound.reshape(()), *grid)
        clips = limit is not None and limit != anyway
        limits.append(editor.constant(f"{activation.name}_{side}", limit) if clips and limit is not None else None)
    while limits and limits[-1] is None:
        limits.pop()
    quantize.replace_input_with(0, activation.inputs[0])
    if not limits:
        graph.remove(activation, safe=True)
        return
    clipped = editor.like(steps, f"{steps.name}_clipped", ir.DataType.UINT8)
    clip = ir.node("Clip", [steps, *limits], outputs=[clipped], name=activation.name)
    steps.replace_all_uses_with(clipped)
    clip.replace_input_with(0, steps)
    graph.insert_after(quantize, clip)
    graph.remove(activation, safe=True)


def _rounded(value: Array, scale: Array, zero_point: int) -> Array:
    """What QuantizeLinear to UINT8 makes of one float."""
    with np.errstate(over="ignore"):
        steps = np.rint(value / scale) + zero_point
    limited: Array = np.clip(steps, 0, 255).astype(np.uint8)
    return limited


def fuse_products(model: ir.Model) -> dict[ir.Value, ir.Value]:
    """MatMul and Gemm of rounded operands as MatMulIntegerToFloat, in place: exact sums, scaled once, bias added.

    Returns by matrix that had to be transposed what it became.
    """
    editor, turned = _Editor(model), dict[ir.Value, ir.Value]()
    fused = [
        node for node in tuple(model.graph) if node.domain == "" and _fuse_product(model.graph, editor, node, turned)
    ]
    if fused:
        model.opset_imports[MICROSOFT] = 1
        RemoveUnusedNodesPass()(model)
    return turned


def look_up_first(model: ir.Model, turned: Mapping[ir.Value, ir.Value]) -> None:
    """``Gather(DequantizeLinear(table))`` with a scale per row as ``Gather(table) * Gather(scales)``, in place.

    Args:
        turned: tables that somebody reads transposed, and what they read.
    """
    graph, editor, changed = model.graph, _Editor(model), False
    for node in tuple(graph):
        if node.domain != "" or node.op_type != "Gather" or node.inputs[1] is None:
            continue
        axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
        dequantize = _dequantize_before(node.inputs[0])
        table = dequantize.inputs[0] if dequantize is not None else None
        steps = _array(table)
        if dequantize is None or table is None or steps is None or steps.ndim != 2 or axis not in (0, -2):
            continue
        scale, zero_point = dequantize.inputs[1], _array(dequantize.inputs[2])
        along = dequantize.attributes["axis"].as_int() if "axis" in dequantize.attributes else 1
        by_row = along in (0, -2) and scale is not None and scale.shape is not None and len(scale.shape) == 1
        if not by_row or "block_size" in dequantize.attributes or zero_point is None or zero_point.any():
            continue
        _look_up(graph, editor, node, table, scale, turned.get(table))
        changed = True
    if changed:
        RemoveUnusedNodesPass()(model)


def _look_up(
    graph: ir.Graph,
    editor: _Editor,
    gather: ir.Node,
    table: ir.Value,
    scale: ir.Value | None,
    turned: ir.Value | None,
) -> None:
    rows, made = gather.inputs[1], gather.outputs[0]
    assert rows is not None and table.dtype is not None, "a lookup in a table"
    kind, name = table.dtype, str(made.name)

    def put(op: str, inputs: list[ir.Value | None], what: str, dtype: ir.DataType, **attributes: Any) -> ir.Value:
        output = ir.Value(name=editor.free(f"{name}_{what}"), type=ir.TensorType(dtype))
        graph.insert_before(gather, ir.node(op, inputs, attributes, outputs=[output], name=output.name))
        return output

    rank = len(made.shape) if made.shape is not None else None if rows.shape is None else len(rows.shape) + 1
    if turned is None or rank is None:
        steps = put("Gather", [table, rows], "steps", kind, axis=0)
    else:
        columns = put("Gather", [turned, rows], "columns", kind, axis=1)
        steps = put("Transpose", [columns], "steps", kind, perm=[*range(1, rank), 0])
    scales = put("Gather", [scale, rows], "row_scales", ir.DataType.FLOAT, axis=0)
    last = editor.constant(f"{name}_last_axis", np.array([-1]))
    wide = put("Unsqueeze", [scales, last], "scales", ir.DataType.FLOAT)
    floats = put("Cast", [steps], "floats", ir.DataType.FLOAT, to=ir.DataType.FLOAT)
    product = editor.like(made, f"{name}_scaled", ir.DataType.FLOAT)
    graph.insert_before(gather, ir.node("Mul", [floats, wide], outputs=[product], name=product.name))
    made.replace_all_uses_with(product, replace_graph_outputs=True)
    graph.remove(gather, safe=True)
    product.name = name


def _fuse_product(graph: ir.Graph, editor: _Editor, node: ir.Node, turned: dict[ir.Value, ir.Value]) -> bool:
    if node.op_type not in ("MatMul", "Gemm") or len(node.inputs) < 2:
        return False
    activation, weight = _dequantize_before(node.inputs[0]), _dequantize_before(node.inputs[1])
    transpose = node.inputs[1].producer() if node.inputs[1] is not None else None
    if node.op_type == "MatMul" and weight is None and transpose is not None and transpose.op_type == "Transpose":
        order = transpose.attributes.get("perm")
        if transpose.domain == "" and (order is None or tuple(order.as_ints()) == (1, 0)):
            weight = _dequantize_before(transpose.inputs[0])
    else:
        transpose = None
    if activation is None or weight is None:
        return False
    (steps, scale, zero_point), (weight_steps, weight_scale, _) = activation.inputs, weight.inputs
    if steps is None or weight_steps is None:
        return False
    matrix, matrix_scale, zero = _array(weight_steps), _array(weight_scale), _array(zero_point)
    if zero is None or zero.dtype != np.uint8 or zero.size != 1 or matrix is None or matrix_scale is None:
        return False
    if matrix.ndim != 2 or matrix.dtype != np.int8 or (steps.shape is not None and len(steps.shape) < 2):
        return False
    transposed, bias, last = transpose is not None, None, node
    if node.op_type == "Gemm":
        attributes = {name: attribute.value for name, attribute in node.attributes.items()}
        if attributes.get("alpha", 1.0) != 1.0 or attributes.get("beta", 1.0) != 1.0 or attributes.get("transA", 0):
            return False
        transposed = bool(attributes.get("transB", 0))
        bias = node.inputs[2] if len(node.inputs) > 2 else None
    columns = matrix.shape[0 if transposed else 1]
    if matrix_scale.size != 1:
        axis = weight.attributes["axis"].as_int() if "axis" in weight.attributes else 1
        if axis % 2 != (0 if transposed else 1) or matrix_scale.size != columns:
            return False
    if bias is not None and not _is_bias(bias, columns):
        return False
    if node.op_type == "MatMul":
        last, bias = _bias_after(node, columns)
    if transposed:
        if weight_steps not in turned:
            turned[weight_steps] = editor.constant(f"{weight_steps.name}_transposed", np.ascontiguousarray(matrix.T))
        weight_steps = turned[weight_steps]
    inputs = [steps, weight_steps, scale, weight_scale, zero_point, None, bias]
    output = last.outputs[0]
    made = ir.node(
        "MatMulIntegerToFloat",
        inputs if bias is not None else inputs[:5],
        domain=MICROSOFT,
        outputs=[editor.like(output, f"{output.name}_fused", ir.DataType.FLOAT)],
        name=node.name,
    )
    graph.insert_after(last, made)
    name = output.name
    output.replace_all_uses_with(made.outputs[0], replace_graph_outputs=True)
    for dead in dict.fromkeys((last, node)):
        graph.remove(dead, safe=True)
    made.outputs[0].name = name
    return True


def _dequantize_before(value: ir.Value | None) -> ir.Node | None:
    node = value.producer() if value is not None else None
    fits = node is not None and node.op_type == "DequantizeLinear" and node.domain == "" and len(node.inputs) == 3
    if not fits or node is None:
        return None
    scale = _array(node.inputs[1])
    return node if scale is not None and scale.dtype == np.float32 else None


def _is_bias(value: ir.Value, columns: int) -> bool:
    bias = _array(value)
    return bias is not None and bias.shape == (columns,) and bias.dtype == np.float32


def _bias_after(node: ir.Node, columns: int) -> tuple[ir.Node, ir.Value | None]:
    """The Add of a constant row that alone reads the product, and the row; or the product itself."""
    output = node.outputs[0]
    uses = list(output.uses())
    if len(uses) == 1 and not output.is_graph_output():
        add, index = uses[0]
        other = add.inputs[1 - index] if add.op_type == "Add" and add.domain == "" else None
        if other is not None and add.graph is node.graph and _is_bias(other, columns):
            return add, other
    return node, None


# --- BF16 -----------------------------------------------------------------------------------------------------------


def emulate_bfloat16(model: ir.Model) -> bool:
    """Compute in FP32 and round every result to BF16, in place. Returns whether there was any BF16."""
    nodes = [node for graph in (model.graph, *model.graph.subgraphs()) for node in graph]
    if any(output.dtype is None for node in nodes for output in node.outputs):
        ShapeInferencePass(check_type=False, strict_mode=False, data_prop=False)(model)
    editor, found = _Editor(model), False
    for node in nodes:
        touched = [value for value in (*node.inputs, *node.outputs) if _is_bfloat16(value)]
        found = found or bool(touched)
        if not touched or (node.domain == "" and node.op_type in _BF16_ANYWAY):
            continue
        assert node.graph is not None, "a node of a graph"
        for index, value in enumerate(node.inputs):
            if value is not None and _is_bfloat16(value):
                wide = editor.like(value, f"{value.name}_wide", ir.DataType.FLOAT)
                node.graph.insert_before(node, editor.cast(value, wide))
                node.replace_input_with(index, wide)
        for output in node.outputs:
            if _is_bfloat16(output):
                _widen_output(editor, node, output)
        _widen_attributes(node)
    return found


def _widen_output(editor: _Editor, node: ir.Node, output: ir.Value) -> None:
    """Let ``node`` make FP32, and everybody read it rounded, under the old name."""
    graph = node.graph
    assert graph is not None, "a node of a graph"
    name = output.name
    rounded = editor.like(output, f"{name}_rounded", ir.DataType.BFLOAT16)
    output.replace_all_uses_with(rounded, replace_graph_outputs=True)
    graph.insert_after(node, editor.cast(output, rounded))
    output.name = editor.free(f"{name}_wide")
    rounded.name = name
    output.dtype = ir.DataType.FLOAT


def _widen_attributes(node: ir.Node) -> None:
    """The attributes by which a few operators choose the type of what they make."""
    for name, attribute in list(node.attributes.items()):
        if attribute.type == ir.AttributeType.TENSOR and attribute.as_tensor().dtype == ir.DataType.BFLOAT16:
            wide = attribute.as_tensor().numpy().astype(np.float32)
            node.attributes[name] = ir.AttrTensor(name, ir.Tensor(wide))
        elif name in ("dtype", "output_dtype") and attribute.as_int() == ir.DataType.BFLOAT16:
            node.attributes[name] = ir.AttrInt64(name, ir.DataType.FLOAT)


def _is_bfloat16(value: ir.Value | None) -> bool:
    return value is not None and value.dtype == ir.DataType.BFLOAT16


# --- graph ----------------------------------------------------------------------------------------------------------


def _array(value: ir.Value | None) -> Array | None:
    """The values of a constant that no caller can override."""
    if value is None or value.const_value is None or value.is_graph_input():
        return None
    return value.const_value.numpy()


class _Editor:
    """Adds to a model under names that are free."""

    def __init__(self, model: ir.Model) -> None:
        self._graph = model.graph
        self.free = FreeNames(model.graph).free

    def like(self, value: ir.Value, name: str, dtype: ir.DataType) -> ir.Value:
        shape = None if value.shape is None else value.shape.copy()
        return ir.Value(name=self.free(name), type=ir.TensorType(dtype), shape=shape)

    def constant(self, name: str, array: Array) -> ir.Value:
        tensor = ir.Tensor(array, name=self.free(name))
        value = ir.Value(
            name=tensor.name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor
        )
        self._graph.register_initializer(value)
        return value

    def cast(self, value: ir.Value, output: ir.Value) -> ir.Node:
        return ir.node("Cast", [value], {"to": output.dtype}, outputs=[output], name=self.free(f"{output.name}_cast"))

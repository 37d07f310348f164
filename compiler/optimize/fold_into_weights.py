"""A per-channel multiply and add after Conv, ConvTranspose or Gemm, folded into its weights and bias.

BatchNormalization at inference is ``y = (x - mean) * scale / sqrt(var + epsilon) + shift`` per channel
(https://onnx.ai/onnx/operators/onnx__BatchNormalization.html), so ``weight' = weight * factor`` and
``bias' = (bias - mean) * factor + shift`` with ``factor = scale / sqrt(var + epsilon)``. Computed in float64 and
rounded once. NaN and infinity of the input pass as before; only a sum that overflows on the way may overflow elsewhere.

Why not onnxscript's rules: they give the new weights the old names and so decline shared ones, and they fold a
factor of 0 or infinity, on which NaN comes and goes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from compiler.optimize import edit
from compiler.optimize.contract import Pass
from compiler.spec import Array

_DTYPES = (np.dtype(np.float32), np.dtype(np.float64))


@dataclass(frozen=True)
class _Affine:
    """``y = x * factor + shift`` along the channel axis: two float64 arrays [C]."""

    factor: Array
    shift: Array


def _fold_batch_norm(model: ir.Model, limit_bytes: int) -> int:
    del limit_bytes
    editor = edit.Editor(model)
    changed = 0
    for graph in edit.graphs(model):
        for node in graph:
            if edit.is_op(node, "BatchNormalization"):
                affine = _of_batch_norm(node, edit.opset(model))
                changed += affine is not None and _fold(node, node.inputs[0], affine, editor, model)
    return changed


def _fold_affine(model: ir.Model, limit_bytes: int) -> int:
    del limit_bytes
    editor = edit.Editor(model)
    changed = 0
    for graph in edit.graphs(model):
        for node in graph:
            if not edit.is_op(node, "Add", "Mul", "Sub") or edit.opset(model) < 7:
                continue
            for side in (0, 1) if node.op_type != "Sub" else (0,):
                affine = _of_arithmetic(node, side)
                if affine is not None and _fold(node, node.inputs[side], affine, editor, model):
                    changed += 1
                    break
    return changed


# --- what is folded -------------------------------------------------------------------------------------------------


def _of_batch_norm(node: ir.Node, version: int) -> _Affine | None:
    """BatchNormalization that infers: said by its outputs up to opset 13, by ``training_mode`` from 14 on."""
    spatial, training = node.attributes.get("spatial"), node.attributes.get("training_mode")
    if version < 7 or any(a is not None and a.is_ref() for a in (spatial, training, node.attributes.get("epsilon"))):
        return None
    if (spatial is not None and spatial.as_int() != 1) or (training is not None and training.as_int() != 0):
        return None
    if any(output.name and edit.is_used(output) for output in node.outputs[1:]) or (
        version < 14 and len(node.outputs) > 1
    ):
        return None
    parameters = [edit.constant_array(value) for value in node.inputs[1:]]
    known = [array for array in parameters if array is not None and array.ndim == 1 and array.dtype in _DTYPES]
    if len(known) != 4 or len({(array.dtype, array.shape) for array in known}) != 1:
        return None
    scale, shift, mean, variance = (array.astype(np.float64) for array in known)
    epsilon = node.attributes.get("epsilon")
    with np.errstate(all="ignore"):
        factor = scale / np.sqrt(variance + np.float64(1e-5 if epsilon is None else epsilon.as_float()))
        return _Affine(factor, shift - mean * factor)


def _of_arithmetic(node: ir.Node, side: int) -> _Affine | None:
    """Add, Sub or Mul of a constant that differs along the channels at most."""
    source, constant = node.inputs[side], edit.constant_array(node.inputs[1 - side])
    producer = source.producer() if source is not None else None
    weight = edit.input_at(producer, 1) if producer is not None else None
    tensor = edit.constant(weight)
    if constant is None or constant.dtype not in _DTYPES or tensor is None or producer is None:
        return None
    rank, axis, channels = len(tensor.shape), 1, _channels(producer)
    if channels is None or constant.ndim > rank:
        return None
    shape = (1,) * (rank - constant.ndim) + constant.shape
    if any(size != 1 for index, size in enumerate(shape) if index != axis) or shape[axis] not in (1, channels):
        return None
    values = np.broadcast_to(constant.reshape(-1).astype(np.float64), (channels,))
    ones, zeros = np.ones(channels), np.zeros(channels)
    return {"Mul": _Affine(values, zeros), "Add": _Affine(ones, values), "Sub": _Affine(ones, -values)}[node.op_type]


def _channels(node: ir.Node) -> int | None:
    """How many channels a Conv, ConvTranspose or Gemm puts out along axis 1."""
    tensor = edit.constant(edit.input_at(node, 1))
    shape = tensor.shape.numpy() if tensor is not None else ()
    if edit.is_op(node, "Conv") and len(shape) > 2:
        return shape[0]
    if edit.is_op(node, "ConvTranspose") and len(shape) > 2:
        return shape[1] * _attribute(node, "group", 1)
    if edit.is_op(node, "Gemm") and len(shape) == 2:
        return shape[0] if _attribute(node, "transB", 0) else shape[1]
    return None


def _attribute(node: ir.Node, name: str, default: int) -> int:
    attribute = node.attributes.get(name)
    return default if attribute is None or attribute.is_ref() else attribute.as_int()


# --- folding --------------------------------------------------------------------------------------------------------


def _fold(node: ir.Node, source: ir.Value | None, affine: _Affine, editor: edit.Editor, model: ir.Model) -> bool:
    """Fold ``affine``, which is what ``node`` does to ``source``, into the node that makes ``source``."""
    linear = source.producer() if source is not None else None
    if (
        source is None
        or linear is None
        or not edit.feeds_only(source, node)
        or not edit.can_replace(node.outputs[0], source)
    ):
        return False
    weight, channels = edit.constant_array(edit.input_at(linear, 1)), _channels(linear)
    if weight is None or weight.dtype not in _DTYPES or channels != len(affine.factor):
        return False
    if any(attribute.is_ref() for attribute in linear.attributes.values()):
        return False
    bias = _bias(linear, channels, edit.opset(model))
    if bias is None:
        return False
    with np.errstate(all="ignore"):
        new_weight = _scaled(linear, weight.astype(np.float64), affine.factor).astype(weight.dtype)
        new_bias = (bias * affine.factor + affine.shift).astype(weight.dtype)
    # A factor that is no number, or a weight that vanishes, would change where NaN and infinity come out.
    if not (
        np.isfinite(new_weight).all() and np.isfinite(new_bias).all() and ((new_weight == 0) == (weight == 0)).all()
    ):
        return False
    name = linear.inputs[1].name if linear.inputs[1] is not None else "weight"
    keeps_weight = bool((affine.factor == 1).all())
    new_inputs = [linear.inputs[0], linear.inputs[1]]
    if not keeps_weight:
        new_inputs[1] = editor.weight(new_weight, wish=f"{name}_folded", before=linear)
    linear.resize_inputs(3)
    linear.replace_input_with(1, new_inputs[1])
    linear.replace_input_with(2, editor.weight(new_bias, wish=f"{name}_bias_folded", before=linear))
    linear.attributes.pop("beta", None)
    edit.replace(node.outputs[0], source)
    edit.remove(node)
    return True


def _bias(linear: ir.Node, channels: int, version: int) -> Array | None:
    """The bias [C] as it is added, in float64; zeros where there is none, None where it is no constant vector."""
    value = edit.input_at(linear, 2)
    beta = linear.attributes.get("beta")
    if value is None:
        return np.zeros(channels) if not edit.is_op(linear, "Gemm") or version >= 11 else None
    bias = edit.constant_array(value)
    if (
        bias is None
        or bias.dtype not in _DTYPES
        or bias.size not in (1, channels)
        or bias.ndim > 2
        or bias.shape[:-1] not in ((), (1,))
    ):
        return None
    if not edit.is_op(linear, "Gemm") and bias.shape != (channels,):
        return None
    factor = 1.0 if beta is None else float(np.float32(beta.as_float()))
    return np.broadcast_to(bias.reshape(-1).astype(np.float64) * factor, (channels,))


def _scaled(linear: ir.Node, weight: Array, factor: Array) -> Array:
    """``weight`` with each output channel multiplied by its factor.

    Conv ``[C, ...]``; ConvTranspose ``[in, C / group, ...]``, the inputs of one group in a row; Gemm ``[K, C]``, or
    ``[C, K]`` with ``transB``.
    """
    if edit.is_op(linear, "ConvTranspose"):
        group = _attribute(linear, "group", 1)
        grouped = weight.reshape(group, weight.shape[0] // group, *weight.shape[1:])
        return (grouped * factor.reshape(group, 1, weight.shape[1], *(1,) * (weight.ndim - 2))).reshape(weight.shape)
    axis = 1 if edit.is_op(linear, "Gemm") and not _attribute(linear, "transB", 0) else 0
    return weight * factor.reshape([-1 if index == axis else 1 for index in range(weight.ndim)])


FOLD_BATCH_NORM = Pass(
    name="fold_batch_norm",
    does="folds BatchNormalization into the Conv, ConvTranspose or Gemm in front of it",
    counts="node",
    run=_fold_batch_norm,
    rounds=True,
)

FOLD_AFFINE = Pass(
    name="fold_affine",
    does="folds a per-channel Mul, Add or Sub of constants into the Conv, ConvTranspose or Gemm in front of it",
    counts="node",
    run=_fold_affine,
    rounds=True,
)

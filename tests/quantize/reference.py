"""What a small network computes, in float64 and without any runtime; rounded where the caller says so."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import erf
from typing import Any

import numpy as np
import onnx
from numpy.lib.stride_tricks import sliding_window_view
from onnx import helper, numpy_helper

from compiler.spec import Array

Round = Callable[[str, Array], Array]
"""Takes a tensor's name and values, returns the values that its consumer reads."""


def round_to(scale: Array | float, values: Array) -> Array:
    """Symmetric INT8, to the nearest level, ties to even; ``scale`` broadcasts."""
    return np.clip(np.rint(values / scale), -128, 127) * scale


def round_weight(values: Array, axis: int | None) -> Array:
    """With the largest magnitude of each channel as 127 levels."""
    others = tuple(i for i in range(values.ndim) if i != axis)
    peak = np.abs(values).max(axis=others if axis is not None else None, keepdims=axis is not None)
    return round_to(np.maximum(peak, 1e-30) / 127, values)


def e4m3(values: Array) -> Array:
    """The nearest numbers of 4 bits of exponent (bias 7) and 3 of mantissa, ties to even, at most 448."""
    size = np.abs(values)
    exponent = np.clip(np.floor(np.log2(np.where(size > 0, size, 1))), -6, 8)
    step = 2.0 ** (exponent - 3)
    rounded: Array = np.sign(values) * np.minimum(np.rint(size / step) * step, 448)
    return rounded


def round_fp8(scale: Array | float, values: Array) -> Array:
    """Symmetric FP8; ``scale`` broadcasts."""
    return e4m3(values / scale) * scale


def round_weight_fp8(values: Array, axis: int | None) -> Array:
    """With the largest magnitude of each channel as 448."""
    others = tuple(i for i in range(values.ndim) if i != axis)
    peak = np.abs(values).max(axis=others if axis is not None else None, keepdims=axis is not None)
    return round_fp8(np.maximum(peak, 1e-30) / 448, values)


def int4_of(packed: bytes, shape: tuple[int, ...]) -> Array:
    """Signed numbers of four bits, the first of each pair in the lower half of its byte."""
    bytes_ = np.frombuffer(packed, np.uint8)
    halves = np.stack([bytes_ & 15, bytes_ >> 4], axis=1).reshape(-1).astype(np.int64)
    return np.where(halves > 7, halves - 16, halves)[: int(np.prod(shape))].reshape(shape)


def spread(scale: Array, axis: int, block: int) -> Array:
    """A scale per block as one per weight."""
    return np.repeat(scale, block, axis=axis)


def run(
    proto: onnx.ModelProto,
    feeds: Mapping[str, Array],
    *,
    made: Round = lambda _, values: values,
    read: Round = lambda _, values: values,
    weight: Callable[[onnx.NodeProto, Array], Array] = lambda _, values: values,
) -> dict[str, Array]:
    """Every tensor of ``proto`` by name.

    Args:
        made: applied to each tensor as it is made; all consumers read what it returns.
        read: applied to the first input of each Conv, Gemm or MatMul whose second is constant.
        weight: applied to that second input, and to a constant of which rows are looked up or that is transposed.
    """
    constants = {w.name: numpy_helper.to_array(w) for w in proto.graph.initializer}
    values: dict[str, Array] = {
        name: array.astype(np.float64) if array.dtype.kind == "f" else array for name, array in constants.items()
    }
    values |= {name: np.asarray(value, np.float64) for name, value in feeds.items()}
    for node in proto.graph.node:
        inputs = [values[name] for name in node.input]
        if node.op_type in ("Conv", "Gemm", "MatMul") and node.input[1] in constants:
            inputs[:2] = read(node.input[0], inputs[0]), weight(node, inputs[1])
        elif node.op_type in ("Gather", "Transpose") and node.input[0] in constants:
            inputs[0] = weight(node, inputs[0])
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        values[node.output[0]] = made(node.output[0], _OPS[node.op_type](*inputs, **attributes))
    return values


def _conv(x: Array, w: Array, b: Array, *, pads: list[int], group: int = 1) -> Array:
    padded = np.pad(x, [(0, 0), (0, 0), (pads[0], pads[2]), (pads[1], pads[3])])
    windows = sliding_window_view(padded, w.shape[2:], axis=(2, 3))
    inputs, outputs = x.shape[1] // group, w.shape[0] // group
    parts = [
        np.einsum(
            "nchwij,ocij->nohw",
            windows[:, g * inputs : (g + 1) * inputs],
            w[g * outputs : (g + 1) * outputs],
            optimize=True,
        )
        for g in range(group)
    ]
    return np.concatenate(parts, axis=1) + b[:, None, None]


def _pool(x: Array, *, kernel_shape: list[int], strides: list[int]) -> Array:
    windows = sliding_window_view(x, kernel_shape, axis=(2, 3))[:, :, :: strides[0], :: strides[1]]
    pooled: Array = windows.max(axis=(-2, -1))
    return pooled


def _softmax(x: Array, *, axis: int) -> Array:
    with np.errstate(over="ignore"):
        powers = np.exp(x - x.max(axis=axis, keepdims=True))
    normal: Array = powers / powers.sum(axis=axis, keepdims=True)
    return normal


def _norm(x: Array, gain: Array) -> Array:
    normal: Array = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * gain
    return normal


def _reshape(x: Array, shape: Array) -> Array:
    return x.reshape([x.shape[i] if size == 0 else int(size) for i, size in enumerate(shape)])


def _unsqueeze(x: Array, axes: Array) -> Array:
    return np.expand_dims(x, tuple(int(axis) for axis in axes))


_OPS: dict[str, Callable[..., Any]] = {
    "Add": np.add,
    "Clip": np.clip,
    "Conv": _conv,
    "Flatten": lambda x: x.reshape(x.shape[0], -1),
    "Gather": lambda x, rows: x[rows.astype(int)],
    "Gelu": lambda x: x * (1 + np.vectorize(erf)(x / np.sqrt(2))) / 2,
    "Gemm": lambda x, w, b, transB=0: x @ (w.T if transB else w) + b,
    "GlobalAveragePool": lambda x: x.mean(axis=(2, 3), keepdims=True),
    "LayerNormalization": _norm,
    "MatMul": np.matmul,
    "MaxPool": _pool,
    "Mul": np.multiply,
    "ReduceSum": lambda x, axes, keepdims: x.sum(tuple(int(axis) for axis in axes), keepdims=bool(keepdims)),
    "Relu": lambda x: np.maximum(x, 0),
    "Reshape": _reshape,
    "Softmax": _softmax,
    "Sub": np.subtract,
    "Transpose": lambda x, perm: x.transpose(perm),
    "Unsqueeze": _unsqueeze,
}

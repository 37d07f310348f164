"""What a small network computes, in float64 and without any runtime; rounded where the caller says so."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import erf
from typing import Any

import numpy as np
import onnx
from numpy.lib.stride_tricks import sliding_window_view
from onnx import TensorProto, helper, numpy_helper

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
    stored = constants(proto)
    values = dict(stored) | {name: _wide(np.asarray(value)) for name, value in feeds.items()}
    kinds = {w.name: w.data_type for w in proto.graph.initializer}
    for node in proto.graph.node:
        inputs = [values[name] if name else None for name in node.input]
        if node.op_type in ("Conv", "Gemm", "MatMul") and node.input[1] in stored:
            assert inputs[0] is not None and inputs[1] is not None
            inputs[:2] = read(node.input[0], inputs[0]), weight(node, inputs[1])
        elif node.op_type in ("Gather", "Transpose") and node.input[0] in stored:
            assert inputs[0] is not None
            inputs[0] = weight(node, inputs[0])
        values[node.output[0]] = made(node.output[0], compute(node, inputs, kinds))
    return values


def constants(proto: onnx.ModelProto) -> dict[str, Array]:
    """The initialisers: floats in float64, FP8 and INT4 decoded by the definition of their bits."""
    found = {}
    for tensor in proto.graph.initializer:
        shape = tuple(tensor.dims)
        if tensor.data_type == TensorProto.FLOAT8E4M3FN:
            found[tensor.name] = e4m3_of(tensor.raw_data, shape)
        elif tensor.data_type == TensorProto.INT4:
            found[tensor.name] = int4_of(tensor.raw_data, shape)
        else:
            found[tensor.name] = _wide(numpy_helper.to_array(tensor))
    return found


def compute(node: onnx.NodeProto, inputs: Sequence[Array | None], kinds: Mapping[str, int]) -> Array:
    """The first output of one node, in float64; ``kinds``: types of the initialisers, which a zero point sets."""
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    if node.op_type == "QuantizeLinear":
        attributes["kind"] = kinds[node.input[2]]
    result: Array = _OPS[node.op_type](*inputs, **attributes)
    return result


def _wide(values: Array) -> Array:
    return values.astype(np.float64) if values.dtype.kind == "f" else values


def e4m3_of(packed: bytes, shape: tuple[int, ...]) -> Array:
    """Numbers of a sign, 4 bits of exponent (bias 7) and 3 of mantissa, without a hidden one at exponent 0."""
    bits = np.frombuffer(packed, np.uint8).astype(np.int64)
    exponent, mantissa = bits >> 3 & 15, bits & 7
    size = np.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7))
    assert not ((bits & 127) == 127).any(), "NaN"
    return np.where(bits >> 7 == 1, -size, size).reshape(shape)


# --- operators ------------------------------------------------------------------------------------------------------


def _along(values: Array, rank: int, axis: int, block: int) -> Array:
    """Scales or zero points as they broadcast over what they belong to."""
    if values.ndim == 0 or (values.size == 1 and not block):
        return values.reshape(())
    if block:
        return spread(values, axis, block)
    return values.reshape([-1 if i == axis % rank else 1 for i in range(rank)])


_LEVELS: dict[int, tuple[int, int]] = {
    int(TensorProto.INT8): (-128, 127),
    int(TensorProto.UINT8): (0, 255),
    int(TensorProto.INT4): (-8, 7),
}


def quantize(x: Array, scale: Array, zero: Array, *, kind: int, axis: int = 1, block_size: int = 0) -> Array:
    """QuantizeLinear: the nearest level, ties to even, saturated to the type's range."""
    steps = x / _along(scale, x.ndim, axis, block_size)
    if kind == TensorProto.FLOAT8E4M3FN:
        return e4m3(steps)
    low, high = _LEVELS[kind]
    levels: Array = np.clip(np.rint(steps) + _along(zero, x.ndim, axis, block_size), low, high).astype(np.int64)
    return levels


def dequantize(x: Array, scale: Array, zero: Array | None = None, *, axis: int = 1, block_size: int = 0) -> Array:
    """DequantizeLinear."""
    shift = 0 if zero is None else _along(zero, x.ndim, axis, block_size).astype(np.float64)
    result: Array = (x.astype(np.float64) - shift) * _along(scale, x.ndim, axis, block_size)
    return result


def _spans(x: Array, kernel: Sequence[int], pads: Sequence[int], strides: Any, dilations: Any, fill: float) -> Array:
    """Windows [N, C, places.., kernel..] of [N, C, ..]."""
    axes = len(kernel)
    strides, dilations = strides or [1] * axes, dilations or [1] * axes
    pads = pads or [0] * 2 * axes
    padded = np.pad(x, [(0, 0), (0, 0), *zip(pads[:axes], pads[axes:], strict=True)], constant_values=fill)
    reach = tuple((size - 1) * dilation + 1 for size, dilation in zip(kernel, dilations, strict=True))
    windows = sliding_window_view(padded, reach, axis=tuple(range(2, 2 + axes)))
    places = [slice(None, None, stride) for stride in strides]
    inside = [slice(None, None, dilation) for dilation in dilations]
    return windows[(slice(None), slice(None), *places, *inside)]


def _conv(
    x: Array,
    w: Array,
    b: Array | None = None,
    *,
    pads: Any = None,
    strides: Any = None,
    dilations: Any = None,
    group: int = 1,
    kernel_shape: Any = None,
) -> Array:
    windows = _spans(x, w.shape[2:], pads, strides, dilations, 0.0)
    axes, inputs, outputs = w.ndim - 2, x.shape[1] // group, w.shape[0] // group
    inner = list(range(2 + axes, 2 + 2 * axes))
    parts = []
    for g in range(group):
        part = windows[:, g * inputs : (g + 1) * inputs]
        kernel = w[g * outputs : (g + 1) * outputs]
        made = np.tensordot(part, kernel, axes=([1, *inner], [1, *range(2, 2 + axes)]))
        parts.append(np.moveaxis(made, -1, 1))
    y = np.concatenate(parts, axis=1)
    return y if b is None else y + b.reshape(-1, *[1] * axes)


def _conv_transpose(
    x: Array, w: Array, b: Array | None = None, *, pads: Any = None, strides: Any = None, group: int = 1, **_: Any
) -> Array:
    """Every input adds a kernel's worth to the output: what a convolution's gradient does."""
    axes, kernel = w.ndim - 2, w.shape[2:]
    strides, pads = strides or [1] * axes, pads or [0] * 2 * axes
    full = [(n - 1) * s + k for n, s, k in zip(x.shape[2:], strides, kernel, strict=True)]
    inputs, outputs = x.shape[1] // group, w.shape[1]
    y = np.zeros((x.shape[0], outputs * group, *full))
    for g in range(group):
        made = np.tensordot(x[:, g * inputs : (g + 1) * inputs], w[g * inputs : (g + 1) * inputs], axes=(1, 0))
        made = np.moveaxis(made, 1 + axes, 1)  # [N, O, places.., kernel..]
        for place in np.ndindex(*x.shape[2:]):
            target = tuple(slice(i * s, i * s + k) for i, s, k in zip(place, strides, kernel, strict=True))
            y[(slice(None), slice(g * outputs, (g + 1) * outputs), *target)] += made[
                (..., *place, *[slice(None)] * axes)
            ]
    inside = tuple(slice(pads[i], size - pads[axes + i]) for i, size in enumerate(full))
    y = y[(slice(None), slice(None), *inside)]
    return y if b is None else y + b.reshape(-1, *[1] * axes)


def _gemm(
    a: Array,
    b: Array,
    c: Array | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    transA: int = 0,
    transB: int = 0,
) -> Array:
    product: Array = alpha * ((a.T if transA else a) @ (b.T if transB else b))
    return product if c is None else product + beta * c


def _max_pool(x: Array, *, kernel_shape: list[int], strides: Any = None, pads: Any = None) -> Array:
    windows = _spans(x, kernel_shape, pads, strides, None, -np.inf)
    pooled: Array = windows.max(axis=tuple(range(2 + len(kernel_shape), windows.ndim)))
    return pooled


def _average_pool(
    x: Array, *, kernel_shape: list[int], strides: Any = None, pads: Any = None, count_include_pad: int = 0
) -> Array:
    axes = len(kernel_shape)

    def total(values: Array) -> Array:
        windows = _spans(values, kernel_shape, pads, strides, None, 0.0)
        summed: Array = windows.sum(axis=tuple(range(2 + axes, windows.ndim)))
        return summed

    return total(x) / (float(np.prod(kernel_shape)) if count_include_pad else total(np.ones_like(x)))


def _softmax(x: Array, *, axis: int = -1) -> Array:
    with np.errstate(over="ignore"):
        powers = np.exp(x - x.max(axis=axis, keepdims=True))
    normal: Array = powers / powers.sum(axis=axis, keepdims=True)
    return normal


def _norm(x: Array, gain: Array, shift: Array | None = None, *, axis: int = -1, epsilon: float = 1e-5) -> Array:
    assert axis in (-1, x.ndim - 1), "over the last axis"
    normal: Array = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + epsilon) * gain
    return normal if shift is None else normal + shift


def _reduce(fold: Callable[..., Array], x: Array, axes: Array | None = None, *, keepdims: int = 1) -> Array:
    return fold(x, axis=None if axes is None else tuple(int(axis) for axis in axes), keepdims=bool(keepdims))


def _clip(x: Array, low: Array | None = None, high: Array | None = None) -> Array:
    return np.clip(x, -np.inf if low is None else low, np.inf if high is None else high)


def _reshape(x: Array, shape: Array) -> Array:
    return x.reshape([x.shape[i] if size == 0 else int(size) for i, size in enumerate(shape)])


def _unsqueeze(x: Array, axes: Array) -> Array:
    return np.expand_dims(x, tuple(int(axis) for axis in axes))


_OPS: dict[str, Callable[..., Any]] = {
    "Add": np.add,
    "AveragePool": _average_pool,
    "Clip": _clip,
    "Concat": lambda *parts, axis: np.concatenate(parts, axis=axis),
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "DequantizeLinear": dequantize,
    "Div": np.divide,
    "Erf": np.vectorize(erf),
    "Flatten": lambda x, axis=1: x.reshape(int(np.prod(x.shape[:axis])), -1),
    "Gather": lambda x, rows, axis=0: np.take(x, rows.astype(int), axis=axis),
    "Gelu": lambda x: x * (1 + np.vectorize(erf)(x / np.sqrt(2))) / 2,
    "Gemm": _gemm,
    "GlobalAveragePool": lambda x: x.mean(axis=tuple(range(2, x.ndim)), keepdims=True),
    "Identity": lambda x: x,
    "LayerNormalization": _norm,
    "MatMul": np.matmul,
    "MaxPool": _max_pool,
    "Mul": np.multiply,
    "QuantizeLinear": quantize,
    "ReduceMean": lambda x, axes=None, keepdims=1: _reduce(np.mean, x, axes, keepdims=keepdims),
    "ReduceSum": lambda x, axes=None, keepdims=1: _reduce(np.sum, x, axes, keepdims=keepdims),
    "Relu": lambda x: np.maximum(x, 0),
    "Reshape": _reshape,
    "Sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "Softmax": _softmax,
    "Sub": np.subtract,
    "Tanh": np.tanh,
    "Transpose": lambda x, perm=None: x.transpose(perm),
    "Unsqueeze": _unsqueeze,
    "Where": np.where,
}

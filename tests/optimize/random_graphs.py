"""Random valid ONNX graphs: 50 operators and the patterns that passes look for, sizes of 0 and 1, dynamic axes, weights
as initialisers and as Constant nodes, subgraphs, values used many times.

What rounds (sums, transcendental functions) is marked, and is never fed to what jumps (Floor, ArgMax, comparisons) or
to what magnifies (Exp, Reciprocal), so that two right answers stay close.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

_TYPES = {
    np.dtype(np.float32): TensorProto.FLOAT,
    np.dtype(np.int64): TensorProto.INT64,
    np.dtype(bool): TensorProto.BOOL,
}
F, I, B = np.dtype(np.float32), np.dtype(np.int64), np.dtype(bool)  # noqa: E741
SPECIAL = np.array([np.nan, np.inf, -np.inf, -0.0, 0.0, 1e-40, 1.0], np.float32)
HUGE = np.array([1e30, -1e30, 3e38, 65504.0, 65520.0], np.float32)


@dataclass(frozen=True)
class Val:
    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    rounded: bool = False


class Graph:
    """A graph as it grows. Every method that adds a node returns its output, or None where nothing fits."""

    def __init__(self, seed: int, operators: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.opset = int(self.rng.choice([17, 18, 20, 21, 23]))
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.values: list[Val] = []
        self.inputs: list[tuple[Val, list[int | str]]] = []
        self.shared: dict[tuple[int, ...], Val] = {}
        for index in range(int(self.rng.integers(1, 4))):
            rank = self.pick([1, 2, 3, 4, 4])
            shape = tuple(int(size) for size in self.rng.choice(6, rank, p=[0.03, 0.17, 0.2, 0.25, 0.25, 0.1]))
            value = Val(f"in{index}", self.pick([F, F, F, I]), shape)
            dims = [f"n{size}" if self.rng.random() < 0.4 else size for size in shape]
            self.inputs.append((value, dims))
            self.values.append(value)
        makers = [make for name, make in OPERATORS.items() for _ in range(3 if name in PATTERNS else 1)]
        while len(self.nodes) < operators:
            self.pick(makers)(self)

    def pick(self, items: list[Any]) -> Any:
        return items[int(self.rng.integers(len(items)))]

    def any(self, dtype: np.dtype[Any] | None = F, rank: int | None = None, *, exact: bool = False) -> Val | None:
        fit = [
            v
            for v in self.values
            if (dtype is None or v.dtype == dtype)
            and (rank is None or len(v.shape) == rank)
            and not (exact and v.rounded)
        ]
        return self.pick(fit[-1:] if self.rng.random() < 0.3 else fit[-12:]) if fit else None

    def add(
        self,
        op: str,
        inputs: list[Val | None],
        shape: tuple[int, ...],
        dtype: np.dtype[Any] = F,
        *,
        rounded: bool = False,
        keep: bool = True,
        **attributes: Any,
    ) -> Val:
        name = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, [v.name if v else "" for v in inputs], [name], **attributes))
        value = Val(name, dtype, shape, rounded or any(v is not None and v.rounded for v in inputs))
        if keep:
            self.values.append(value)
        return value

    def const(self, array: Any, dtype: np.dtype[Any] | None = None) -> Val:
        array = np.asarray(array, dtype)
        name = f"w{len(self.weights) + len(self.nodes)}_{self.rng.integers(1 << 30)}"
        tensor = numpy_helper.from_array(array, name)
        if self.rng.random() < 0.5:
            self.weights.append(tensor)
        else:
            self.nodes.append(helper.make_node("Constant", [], [name], value=tensor))
        return Val(name, array.dtype, array.shape)

    def weight(self, shape: tuple[int, ...]) -> Val:
        """A finite weight, often one that another node uses too."""
        if shape not in self.shared or self.rng.random() < 0.5:
            self.shared[shape] = self.const(self.rng.normal(size=shape), F)
        return self.shared[shape]

    def numbers(self, shape: tuple[int, ...]) -> NDArray[np.float32]:
        numbers = self.rng.normal(size=shape).astype(np.float32)
        if numbers.size and self.rng.random() < 0.1:
            numbers.reshape(-1)[int(self.rng.integers(numbers.size))] = self.pick(list(SPECIAL))
        return numbers

    def model(self) -> onnx.ModelProto:
        made = {name for node in self.nodes for name in node.output}
        used = {name for node in self.nodes for name in node.input}
        sinks = [v for v in self.values if v.name in made and v.name not in used]
        others = [v for v in self.values if v.name in made and v.name in used and self.rng.random() < 0.1]
        outputs = (sinks[-3:] or self.values[-1:]) + others[:2]
        if not made & {v.name for v in outputs}:
            outputs = [self.add("Identity", [self.values[0]], self.values[0].shape, self.values[0].dtype)]
        graph = helper.make_graph(
            self.nodes,
            "random",
            [helper.make_tensor_value_info(v.name, _TYPES[v.dtype], dims) for v, dims in self.inputs],
            [helper.make_tensor_value_info(v.name, _TYPES[v.dtype], [None] * len(v.shape)) for v in outputs],
            self.weights,
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=9)

    def feeds(self, extra: NDArray[np.float32] | None = None) -> dict[str, NDArray[Any]]:
        feeds: dict[str, NDArray[Any]] = {}
        for value, _ in self.inputs:
            if value.dtype == I:
                feeds[value.name] = self.rng.integers(-3, 4, value.shape)
                continue
            array = self.rng.normal(size=value.shape).astype(np.float32)
            if extra is not None and array.size:
                places = self.rng.random(value.shape) < 0.15
                array = np.where(places, self.rng.choice(extra, value.shape), array)
            feeds[value.name] = array
        return feeds


# --- operators ------------------------------------------------------------------------------------------------------

OPERATORS: dict[str, Callable[[Graph], Val | None]] = {}
PATTERNS = frozenset(
    {"conv_bn", "gemm_bn", "layer_norm", "rms_norm", "gelu", "reshape_by_shape", "Reshape", "two_transposes", "Cast"}
)
"""What passes look for, made more often."""


def _operator(name: str) -> Callable[[Callable[[Graph], Val | None]], Callable[[Graph], Val | None]]:
    def register(make: Callable[[Graph], Val | None]) -> Callable[[Graph], Val | None]:
        OPERATORS[name] = make
        return make

    return register


def _unary(op: str, *, rounds: bool = False, exact: bool = False) -> None:
    def make(g: Graph) -> Val | None:
        x = g.any(exact=exact)
        return g.add(op, [x], x.shape, rounded=rounds) if x else None

    OPERATORS[op] = make


for _op in ("Abs", "Identity", "Neg", "Relu", "Dropout"):
    _unary(_op)
for _op in ("Floor", "Ceil", "Sign"):
    _unary(_op, exact=True)
for _op in ("Exp", "Reciprocal", "Sqrt", "Sigmoid", "Tanh", "Erf", "Sin"):
    _unary(_op, rounds=True, exact=True)


def _binary(op: str, dtype: np.dtype[Any], result: np.dtype[Any], *, exact: bool) -> None:
    def make(g: Graph) -> Val | None:
        x = g.any(dtype, exact=exact)
        y = g.any(dtype, exact=exact)
        if x is None or y is None:
            return None
        try:
            shape = np.broadcast_shapes(x.shape, y.shape)
        except ValueError:
            size = g.pick([(), (1,), x.shape, x.shape[-1:]])
            numbers = (
                g.numbers(size) if dtype == F else g.rng.integers(0 if dtype == B else 1, 2 if dtype == B else 4, size)
            )
            shape, y = x.shape, g.const(numbers, dtype)
        return g.add(op, [x, y], shape, result)

    OPERATORS[f"{op}_{dtype}"] = make


for _op in ("Add", "Mul", "Max", "Min"):
    _binary(_op, F, F, exact=False)
for _op in ("Sub", "Div"):
    _binary(_op, F, F, exact=True)
for _op in ("Equal", "Less", "GreaterOrEqual"):
    _binary(_op, F, B, exact=True)
for _op in ("Add", "Mul", "Sub"):
    _binary(_op, I, I, exact=True)
for _op in ("And", "Or"):
    _binary(_op, B, B, exact=True)


@_operator("neutral")
def _(g: Graph) -> Val | None:
    x = g.any()
    op, number = g.pick([("Add", 0.0), ("Add", -0.0), ("Sub", 0.0), ("Mul", 1.0), ("Div", 1.0)])
    if x is None or not x.shape:
        return None
    return g.add(op, [x, g.const(np.full(g.pick([(), (1,)]), number, np.float32))], x.shape)


@_operator("Not")
def _(g: Graph) -> Val | None:
    x = g.any(B)
    return g.add("Not", [x], x.shape, B) if x else None


@_operator("Where")
def _(g: Graph) -> Val | None:
    c, x = g.any(B), g.any()
    if c is None or x is None:
        return None
    try:
        shape = np.broadcast_shapes(c.shape, x.shape)
    except ValueError:
        return None
    return g.add("Where", [c, x, g.const(g.numbers(()))], shape)


@_operator("Cast")
def _(g: Graph) -> Val | None:
    x = g.any(None, exact=True)
    to = g.pick([F, I, B])
    if x is None or (x.dtype == F and to != F):
        return None
    if g.rng.random() < 0.5:
        middle = g.add(
            "Cast",
            [x],
            x.shape,
            x.dtype,
            keep=False,
            to=g.pick([TensorProto.DOUBLE, TensorProto.FLOAT16, TensorProto.INT32, TensorProto.INT8]),
        )
        return g.add("Cast", [middle], x.shape, to, rounded=True, to=_TYPES[to])
    return g.add("Cast", [x], x.shape, to, to=_TYPES[to])


@_operator("CastLike")
def _(g: Graph) -> Val | None:
    x, like = g.any(I), g.any()
    return g.add("CastLike", [x, like], x.shape, F) if x and like else None


@_operator("Transpose")
def _(g: Graph) -> Val | None:
    x = g.any(None)
    if x is None or not x.shape:
        return None
    perm = [int(axis) for axis in (g.rng.permutation(len(x.shape)) if g.rng.random() < 0.8 else range(len(x.shape)))]
    return g.add("Transpose", [x], tuple(x.shape[axis] for axis in perm), x.dtype, perm=perm)


@_operator("two_transposes")
def _(g: Graph) -> Val | None:
    x = g.any(None)
    if x is None or len(x.shape) < 3:
        return None
    for keep in (g.rng.random() < 0.2, True):
        perm = [int(axis) for axis in g.rng.permutation(len(x.shape))]
        x = g.add("Transpose", [x], tuple(x.shape[axis] for axis in perm), x.dtype, perm=perm, keep=keep)
    return x


@_operator("Reshape")
def _(g: Graph) -> Val | None:
    x = g.any(None)
    if x is None or not x.shape or 0 in x.shape:
        return None
    size = int(np.prod(x.shape))
    target = g.pick([[-1], [size], [1, -1], list(x.shape), [0, -1], [x.shape[0], -1], [-1, x.shape[-1]], [1, *x.shape]])
    shape = np.empty(x.shape, bool).reshape([x.shape[i] if d == 0 else d for i, d in enumerate(target)]).shape
    return g.add("Reshape", [x, g.const(target, I)], shape, x.dtype)


@_operator("reshape_by_shape")
def _(g: Graph) -> Val | None:
    """A target computed from Shape, Gather and Concat, as dynamic exports do."""
    x = g.any(None)
    if x is None or len(x.shape) < 2 or 0 in x.shape:
        return None
    shape = g.add("Shape", [x], (len(x.shape),), I, keep=g.rng.random() < 0.3)
    index = int(g.rng.integers(len(x.shape)))
    one = g.add("Gather", [shape, g.const([index], I)], (1,), I, keep=False, axis=0)
    target = g.add("Concat", [one, g.const([-1], I)], (2,), I, keep=False, axis=0)
    rest = int(np.prod(x.shape)) // x.shape[index]
    return g.add("Reshape", [x, target], (x.shape[index], rest), x.dtype)


@_operator("copy_shape")
def _(g: Graph) -> Val | None:
    x = g.any(None)
    if x is None or not x.shape:
        return None
    shape = g.add("Shape", [x], (len(x.shape),), I, keep=False)
    return g.add(g.pick(["Reshape", "Expand"]), [x, shape], x.shape, x.dtype) if 0 not in x.shape else None


@_operator("Flatten")
def _(g: Graph) -> Val | None:
    x = g.any()
    if x is None:
        return None
    axis = int(g.rng.integers(len(x.shape) + 1))
    return g.add("Flatten", [x], (int(np.prod(x.shape[:axis])), int(np.prod(x.shape[axis:]))), axis=axis)


@_operator("Unsqueeze")
def _(g: Graph) -> Val | None:
    x = g.any(None)
    if x is None or len(x.shape) > 4:
        return None
    axis = int(g.rng.integers(len(x.shape) + 1))
    return g.add("Unsqueeze", [x, g.const([axis], I)], (*x.shape[:axis], 1, *x.shape[axis:]), x.dtype)


@_operator("Squeeze")
def _(g: Graph) -> Val | None:
    x = g.any(None)
    axes = [axis for axis, size in enumerate(x.shape) if size == 1] if x else []
    if x is None or not axes:
        return None
    axis = g.pick(axes)
    return g.add("Squeeze", [x, g.const([axis], I)], (*x.shape[:axis], *x.shape[axis + 1 :]), x.dtype)


@_operator("Expand")
def _(g: Graph) -> Val | None:
    x = g.any(None)
    if x is None:
        return None
    target = g.pick([[1], list(x.shape), [2, *x.shape], [1] * len(x.shape)]) or [1]
    return g.add("Expand", [x, g.const(target, I)], np.broadcast_shapes(x.shape, tuple(target)), x.dtype)


@_operator("Tile")
def _(g: Graph) -> Val | None:
    x = g.any()
    if x is None or not x.shape:
        return None
    repeats = [int(r) for r in g.rng.integers(1, 3, len(x.shape))]
    return g.add("Tile", [x, g.const(repeats, I)], tuple(s * r for s, r in zip(x.shape, repeats, strict=True)))


@_operator("Concat")
def _(g: Graph) -> Val | None:
    x = g.any()
    if x is None or not x.shape:
        return None
    axis = int(g.rng.integers(len(x.shape)))
    count = g.pick([1, 2, 2, 3])
    shape = list(x.shape)
    shape[axis] *= count
    return g.add("Concat", [x] * count, tuple(shape), axis=axis)


@_operator("Slice")
def _(g: Graph) -> Val | None:
    x = g.any()
    if x is None or not x.shape:
        return None
    axis = int(g.rng.integers(len(x.shape)))
    start, end = g.pick([(0, 2**63 - 1), (0, x.shape[axis]), (1, 2**31), (0, 1), (-1, 2**62)])
    length = len(range(x.shape[axis])[start:end])
    starts, ends, axes = (g.const([n], I) for n in (start, end, axis))
    return g.add("Slice", [x, starts, ends, axes], (*x.shape[:axis], length, *x.shape[axis + 1 :]))


@_operator("Split")
def _(g: Graph) -> Val | None:
    x = g.any()
    if x is None or not x.shape or x.shape[-1] < 2:
        return None
    sizes, names = [1, x.shape[-1] - 1], [f"v{len(g.nodes) + 1}_{index}" for index in range(2)]
    split = g.const(sizes, I)
    g.nodes.append(helper.make_node("Split", [x.name, split.name], names, axis=-1))
    g.values += [Val(name, F, (*x.shape[:-1], size), x.rounded) for name, size in zip(names, sizes, strict=True)]
    return g.values[-1]


@_operator("Gather")
def _(g: Graph) -> Val | None:
    x = g.any(None)
    if x is None or not x.shape or 0 in x.shape:
        return None
    axis = int(g.rng.integers(len(x.shape)))
    indices = g.rng.integers(-x.shape[axis], x.shape[axis], g.pick([(), (1,), (2,)]))
    return g.add(
        "Gather", [x, g.const(indices, I)], (*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]), x.dtype, axis=axis
    )


@_operator("Pad")
def _(g: Graph) -> Val | None:
    x = g.any()
    if x is None or not x.shape:
        return None
    pads = [int(p) for p in g.rng.integers(0, 2, 2 * len(x.shape)) * g.pick([0, 1])]
    shape = tuple(s + pads[i] + pads[i + len(x.shape)] for i, s in enumerate(x.shape))
    return g.add("Pad", [x, g.const(pads, I)], shape)


@_operator("ReduceMax")
def _(g: Graph) -> Val | None:
    x = g.any()
    if x is None or not x.shape or 0 in x.shape:
        return None
    op, keep = g.pick(["ReduceSum", "ReduceMean", "ReduceMax"]), g.pick([0, 1])
    shape = (*x.shape[:-1], 1) if keep else x.shape[:-1]
    if op == "ReduceSum" or g.opset >= 18:
        return g.add(op, [x, g.const([-1], I)], shape, rounded=op != "ReduceMax", keepdims=keep)
    return g.add(op, [x], shape, rounded=op != "ReduceMax", axes=[-1], keepdims=keep)


@_operator("ArgMax")
def _(g: Graph) -> Val | None:
    x = g.any(exact=True)
    if x is None or not x.shape or 0 in x.shape:
        return None
    return g.add("ArgMax", [x], (*x.shape[:-1], 1), I, axis=-1)


@_operator("Softmax")
def _(g: Graph) -> Val | None:
    x = g.any()
    return g.add("Softmax", [x], x.shape, rounded=True, axis=-1) if x and x.shape else None


@_operator("Clip")
def _(g: Graph) -> Val | None:
    x = g.any()
    return g.add("Clip", [x, g.const(np.float32(-0.5)), g.const(np.float32(2))], x.shape) if x else None


@_operator("MatMul")
def _(g: Graph) -> Val | None:
    x = g.any()
    if x is None or len(x.shape) < 2:
        return None
    return g.add("MatMul", [x, g.const(g.numbers((x.shape[-1], 3)))], (*x.shape[:-1], 3), rounded=True)


@_operator("constant_island")
def _(g: Graph) -> Val | None:
    """Nodes that depend on nothing: everything folds, unless it is NaN that it depends on."""
    a = g.const(g.numbers((2, 3)))
    b = g.add(g.pick(["Neg", "Sqrt", "Floor", "Abs", "Relu", "Exp"]), [a], (2, 3), rounded=True, keep=False)
    return g.add(
        g.pick(["Add", "Mul", "Max", "Min"]), [b, g.const(g.numbers(g.pick([(3,), (2, 1), ()])))], (2, 3), rounded=True
    )


@_operator("range")
def _(g: Graph) -> Val | None:
    x = g.any(None)
    if x is None or not x.shape:
        return None
    shape = g.add("Shape", [x], (len(x.shape),), I, keep=False)
    size = g.add("Gather", [shape, g.const(-1, I)], (), I, keep=False)
    return g.add("Range", [g.const(0, I), size, g.const(1, I)], (x.shape[-1],), I)


@_operator("fill")
def _(g: Graph) -> Val | None:
    x = g.any(None)
    if x is None or not x.shape:
        return None
    shape = g.add("Shape", [x], (len(x.shape),), I, keep=False)
    return g.add("ConstantOfShape", [shape], x.shape, value=numpy_helper.from_array(g.numbers((1,))))


@_operator("twice")
def _(g: Graph) -> Val | None:
    """The same computation twice, and attributes that differ in the sign of zero alone."""
    x = g.any()
    if x is None:
        return None
    slopes = g.pick([(0.5, 0.5), (0.0, -0.0), (0.5, 0.25)])
    left, right = (g.add("LeakyRelu", [x], x.shape, keep=False, alpha=slope) for slope in slopes)
    return g.add(g.pick(["Add", "Max"]), [left, right], x.shape)


@_operator("minus_itself")
def _(g: Graph) -> Val | None:
    x = g.any()
    return g.add("Sub", [x, x], x.shape) if x else None


@_operator("If")
def _(g: Graph) -> Val | None:
    """Branches that use values of the outer graph, and hand one of them on."""
    x = g.any()
    if x is None:
        return None
    number = len(g.nodes)
    condition = g.const(bool(g.rng.random() < 0.5), B)
    branches = []
    for branch in ("then", "else"):
        out = f"{branch}{number}"
        inner = [helper.make_node("Identity", [x.name], [f"{out}_i"]), helper.make_node("Neg", [f"{out}_i"], [out])]
        if branch == "else":
            inner = [helper.make_node("Identity", [x.name], [out])]
        info = helper.make_tensor_value_info(out, TensorProto.FLOAT, [None] * len(x.shape))
        branches.append(helper.make_graph(inner, branch, [], [info]))
    return g.add("If", [condition], x.shape, rounded=x.rounded, then_branch=branches[0], else_branch=branches[1])


# --- what passes look for -------------------------------------------------------------------------------------------


@_operator("conv_bn")
def _(g: Graph) -> Val | None:
    x = g.any(rank=4)
    if x is None or 0 in x.shape:
        return None
    channels = 4
    transpose, group = g.rng.random() < 0.3, g.pick([1, x.shape[1]])
    if transpose:
        weight = (x.shape[1], channels // g.pick([1]), 1, 1)
        group = 1
    else:
        channels = x.shape[1] * 2 if group > 1 else 4
        weight = (channels, x.shape[1] // group, 1, 1)
    bias = [g.const(g.numbers((channels,)))] if g.rng.random() < 0.5 else []
    shape = (x.shape[0], channels, *x.shape[2:])
    y = g.add(
        "ConvTranspose" if transpose else "Conv",
        [x, g.weight(weight), *bias],
        shape,
        rounded=True,
        group=group,
        keep=g.rng.random() < 0.1,
    )
    return _normalised(g, y)


@_operator("gemm_bn")
def _(g: Graph) -> Val | None:
    x = g.any(rank=2)
    if x is None or 0 in x.shape:
        return None
    transposed = int(g.rng.random() < 0.5)
    weight = g.weight((3, x.shape[1]) if transposed else (x.shape[1], 3))
    bias = [g.const(g.numbers(g.pick([(3,), (1, 3), (1,)])))] if g.rng.random() < 0.7 else []
    y = g.add(
        "Gemm",
        [x, weight, *bias],
        (x.shape[0], 3),
        rounded=True,
        transB=transposed,
        alpha=0.5,
        beta=2.0,
        keep=g.rng.random() < 0.1,
    )
    return _normalised(g, y)


def _normalised(g: Graph, y: Val) -> Val:
    channels = y.shape[1]
    kind = g.pick(["bn", "bn", "mul", "add", "sub", "mul_add"])
    if kind == "bn":
        scale, shift, mean = (g.const(g.rng.normal(size=channels), F) for _ in range(3))
        return g.add(
            "BatchNormalization",
            [y, scale, shift, mean, g.const(g.rng.uniform(0, 0.1, channels), F)],
            y.shape,
            epsilon=float(g.pick([1e-5, 1e-2])),
        )
    vector = (1, channels, *(1,) * (len(y.shape) - 2))
    shape = g.pick([vector, vector[1:], ()])
    for op in {"mul": ["Mul"], "add": ["Add"], "sub": ["Sub"], "mul_add": ["Mul", "Add"]}[kind]:
        y = g.add(op, [y, g.const(g.numbers(shape))], y.shape)
    return y


def _epsilon(g: Graph) -> Val:
    return g.const(np.float32(g.pick([1e-5, 1e-2])))


@_operator("layer_norm")
def _(g: Graph) -> Val | None:
    x = g.any(exact=True)
    if x is None or len(x.shape) < 2 or x.shape[-1] < 3 or 0 in x.shape:
        return None
    row = (*x.shape[:-1], 1)
    centred = g.add("Sub", [x, _mean(g, x)], x.shape, rounded=True, keep=False)
    square = g.add("Pow", [centred, g.const(np.float32(2))], x.shape, keep=False)
    root = g.add("Sqrt", [g.add("Add", [_mean(g, square), _epsilon(g)], row, keep=False)], row, keep=False)
    normal = g.add("Div", [centred, root], x.shape, keep=False)
    scaled = g.add("Mul", [normal, g.const(g.numbers(g.pick([x.shape[-1:], x.shape[-1:], (1,)])))], x.shape, keep=False)
    return g.add("Add", [scaled, g.const(g.numbers(g.pick([x.shape[-1:], x.shape[-1:], (1,)])))], x.shape)


def _mean(g: Graph, x: Val) -> Val:
    row = (*x.shape[:-1], 1)
    if g.opset >= 18:
        return g.add("ReduceMean", [x, g.const([-1], I)], row, rounded=True, keep=False)
    return g.add("ReduceMean", [x], row, rounded=True, keep=False, axes=[-1])


@_operator("rms_norm")
def _(g: Graph) -> Val | None:
    x = g.any(exact=True)
    if x is None or len(x.shape) < 2 or 0 in x.shape:
        return None
    row = (*x.shape[:-1], 1)
    square = g.add("Mul", [x, x], x.shape, keep=False)
    root = g.add("Sqrt", [g.add("Add", [_mean(g, square), _epsilon(g)], row, keep=False)], row, keep=False)
    normal = g.add("Mul", [x, g.add("Reciprocal", [root], row, keep=False)], x.shape, keep=False)
    return g.add("Mul", [g.const(g.numbers(x.shape[-1:])), normal], x.shape)


@_operator("gelu")
def _(g: Graph) -> Val | None:
    x = g.any()
    if x is None:
        return None
    if g.rng.random() < 0.5:
        inner = g.add("Div", [x, g.const(np.float32(2**0.5))], x.shape, keep=False)
        inner = g.add("Erf", [inner], x.shape, rounded=True, keep=False)
    else:
        cube = g.add("Pow", [x, g.const(np.float32(3))], x.shape, rounded=True, keep=False)
        cubic = g.add(
            "Add", [x, g.add("Mul", [cube, g.const(np.float32(0.044715))], x.shape, keep=False)], x.shape, keep=False
        )
        inner = g.add("Mul", [cubic, g.const(np.float32((2 / np.pi) ** 0.5))], x.shape, keep=False)
        inner = g.add("Tanh", [inner], x.shape, keep=False)
    bracket = g.add("Add", [inner, g.const(np.float32(1))], x.shape, keep=False)
    half = g.pick([0.5, 0.5, 0.4])
    product = g.add("Mul", [x, bracket], x.shape, keep=False)
    return g.add("Mul", [product, g.const(np.float32(half))], x.shape)

"""What a quantised file computes: random networks through the product, against float64 without any runtime.

Two comparisons that need no tolerance for luck. Node by node, each on what ONNX Runtime itself gave the node before, so
that a sum in another order cannot tip a later rounding. And as a whole, with scales made powers of two: every sum is then
exact in FP32, whatever its order, and the reference, the runtime with and without optimisation, and the lowered engine
must agree to the bit, through all ties that such scales produce.

``BUILD_ENGINE_NETWORKS`` sets how many networks of each kind (default 12).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

from compiler import onnx_files
from compiler.backends import onnxruntime as backend
from compiler.spec import Array, OnnxModel, Precision
from tests.quantize import networks, reference
from tests.quantize.bench import NONE, Bench
from tests.quantize.networks import Net

SEEDS = range(int(os.environ.get("BUILD_ENGINE_NETWORKS", "12")))
FORMATS: dict[str, dict[str, Any]] = {
    "int8": {"precision": Precision.INT8},
    "int8 asymmetric": {
        "precision": Precision.INT8,
        "activations": "asymmetric",
        "equalize": "on",
        "attention": "on",
        "joins": "shared",
    },
    "int8 weights": {"precision": Precision.INT8, "weights_only": True},
    "fp8": {"precision": Precision.FP8},
    "fp8 weights": {"precision": Precision.FP8, "weights_only": True},
    "int4": {"precision": Precision.INT4, "block": 16},
}
PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")


# --- random networks ------------------------------------------------------------------------------------------------


def random_cnn(seed: int) -> onnx.ModelProto:
    """Convolutions of every kind, pools, joins and a head: x [batch, 2 or 4, 8, 8] -> y [batch, 5]."""
    net = Net(seed)
    random, channels, size = net.random, int(net.random.choice([2, 4])), 8
    first = channels
    x = "x"
    for layer in range(int(random.integers(3, 6))):
        kind = random.choice(["conv", "conv", "conv", "residual", "pool", "up", "concat"])
        name = f"l{layer}"
        if kind == "up" and size <= 8:
            x, channels = _up(net, x, name, channels)
            size *= 2
        elif kind == "residual":
            y = _activation(net, _conv(net, x, f"{name}a", channels, channels), f"{name}a")
            x = _activation(net, net.op("Add", [x, _conv(net, y, f"{name}b", channels, channels)], f"{name}_sum"), name)
        elif kind == "pool" and size > 2:
            window = {"kernel_shape": [2, 2], "strides": [2, 2]}
            if random.random() < 0.3:
                x = net.op("MaxPool", [x], f"{name}_pool", kernel_shape=[3, 3], strides=[1, 1], pads=[1] * 4)
            else:
                x = net.op(str(random.choice(["MaxPool", "AveragePool"])), [x], f"{name}_pool", **window)
                size //= 2
        elif kind == "concat":
            x = net.op("Concat", [x, _conv(net, x, name, channels, 2)], f"{name}_concat", axis=1)
            channels += 2
        else:
            out = int(random.choice([2, 4, 8]))
            stride = 2 if size > 2 and random.random() < 0.3 else 1
            x = _activation(net, _conv(net, x, name, channels, out, stride), name)
            channels, size = out, size // stride
    outputs: dict[str, Any] = {"y": ["batch", 5]}
    if x != "x" and random.random() < 0.3:
        outputs[x] = ["batch", channels, size, size]
    _head(net, x, channels)
    return net.model({"x": ["batch", first, 8, 8]}, outputs)


def _conv(net: Net, x: str, name: str, into: int, out: int, stride: int = 1) -> str:
    random = net.random
    size = int(random.choice([1, 3]))
    groups = into if out % into == 0 and random.random() < 0.3 else 1
    dilation = 2 if size == 3 and stride == 1 and random.random() < 0.3 else 1
    total = (size - 1) * dilation
    before = int(random.integers(0, total + 1)) if random.random() < 0.3 else total // 2
    pads = [before, total // 2, total - before, total - total // 2]
    inputs = [x, net.normal(f"{name}_w", out, into // groups, size, size, fan_in=into // groups * size**2)]
    if random.random() < 0.7:
        inputs.append(net.normal(f"{name}_b", out, fan_in=4))
    return net.op(
        "Conv", inputs, f"{name}_conv", pads=pads, strides=[stride] * 2, dilations=[dilation] * 2, group=groups
    )


def _up(net: Net, x: str, name: str, channels: int) -> tuple[str, int]:
    groups = 2 if net.random.random() < 0.4 else 1
    size, out = int(net.random.choice([2, 4])), 4
    weight = net.normal(f"{name}_w", channels, out // groups, size, size, fan_in=channels)
    inputs = [x, weight] + ([net.normal(f"{name}_b", out, fan_in=4)] if net.random.random() < 0.5 else [])
    pads = [(size - 2) // 2] * 4
    return net.op("ConvTranspose", inputs, f"{name}_up", strides=[2, 2], pads=pads, group=groups), out


def _activation(net: Net, x: str, name: str) -> str:
    kind = net.random.choice(["none", "Relu", "Relu", "Clip", "Clip low"])
    if kind == "none":
        return x
    if kind == "Relu":
        return net.op("Relu", [x], f"{name}_relu")
    bounds = [net.weight(f"{name}_low", np.array(-0.25, np.float32))]
    if kind == "Clip":
        bounds.append(net.weight(f"{name}_high", np.array(1.5, np.float32)))
    return net.op("Clip", [x, *bounds], f"{name}_clip")


def _head(net: Net, x: str, channels: int) -> None:
    random = net.random
    if random.random() < 0.5:
        x = net.op("Flatten", [net.op("GlobalAveragePool", [x], "mean")], "flat")
    else:
        x = net.op("ReduceMean", [x, net.weight("axes", np.array([2, 3]))], "flat", keepdims=0)
    kind = random.choice(["Gemm", "Gemm turned", "MatMul", "batched"])
    bias = net.normal("head_b", 5, fan_in=4)
    if kind == "MatMul":
        net.op("Add", [net.op("MatMul", [x, net.normal("head_w", channels, 5, fan_in=channels)], "p"), bias], "y")
    elif kind == "batched":  # a weight of three axes: one scale serves all of it
        x = net.op("Unsqueeze", [x, net.weight("first", np.array([0]))], "lifted")
        parts = net.op("MatMul", [x, net.normal("head_w", 2, channels, 5, fan_in=channels)], "p")
        net.op("ReduceSum", [parts, net.weight("zero", np.array([0]))], "y", keepdims=0)
    else:
        turned = kind == "Gemm turned"
        if turned:
            x = net.op("Transpose", [x], "turned", perm=[1, 0])
        transposed = bool(random.random() < 0.5)
        shape = (5, channels) if transposed else (channels, 5)
        inputs = [x, net.normal("head_w", *shape, fan_in=channels)] + ([bias] if random.random() < 0.7 else [])
        scaled = {"alpha": float(random.choice([0.5, 1, 2])), "beta": float(random.choice([0.5, 1, 2]))}
        net.op("Gemm", inputs, "y", transA=int(turned), transB=int(transposed), **scaled)


def random_transformer(seed: int) -> onnx.ModelProto:
    """A table, masked attention with shared projections, and a feed-forward layer: ids [batch, 6] -> y [batch, 6, 3]."""
    net = Net(seed)
    random, width = net.random, int(net.random.choice([16, 32]))
    x = net.op("Gather", [net.normal("table", 1100 if random.random() < 0.5 else 40, width), "ids"], "rows")
    gain = net.weight("gain", np.exp(random.normal(size=width)).astype(np.float32))
    shift = [net.normal("shift", width)] if random.random() < 0.5 else []
    x = net.op("LayerNormalization", [x, gain, *shift], "norm", axis=-1)
    q, k, v = (net.linear(x, part, (width, width)) for part in "qkv")
    scores = net.op("MatMul", [q, net.op("Transpose", [k], "kt", perm=[0, 2, 1])], "scores")
    scores = net.op("Mul", [scores, net.weight("root", np.array(width**-0.5, np.float32))], "scaled")
    lowest = np.where(np.tri(6), 0, networks.MASKED).astype(np.float32)
    if random.random() < 0.5:
        scores = net.op("Add", [scores, net.weight("mask", lowest)], "kept")
    else:
        seen = net.weight("seen", np.tri(6).astype(bool))
        scores = net.op("Where", [seen, scores, net.weight("low", np.array(networks.MASKED, np.float32))], "kept")
    mixed = net.op("MatMul", [net.op("Softmax", [scores], "weights", axis=-1), v], "mixed")
    x = net.op("Add", [x, net.linear(mixed, "out", (width, width))], "sum")
    hidden = net.op(str(random.choice(["Gelu", "Relu", "Tanh", "Sigmoid"])), [net.linear(x, "up", (width, 48))], "h")
    flat = net.op(
        "Reshape", [net.linear(hidden, "down", (48, width)), net.weight("rows_of", np.array([-1, width]))], "f"
    )
    inputs = [flat, net.normal("head_w", 3, width, fan_in=width), net.normal("head_b", 3)]
    head = net.op("Gemm", inputs, "head", transB=1)
    net.op("Reshape", [head, net.weight("back", np.array([-1, 6, 3]))], "y")
    return net.model({"ids": ["batch", 6]}, {"y": ["batch", 6, 3]}, integers=["ids"])


def ids(proto: onnx.ModelProto, count: int) -> list[dict[str, Array]]:
    rows = next(weight.dims[0] for weight in proto.graph.initializer if weight.name == "table")
    random = np.random.default_rng(9)
    return [{"ids": random.integers(0, rows, size=(1, 6))} for _ in range(count)]


def images(proto: onnx.ModelProto, count: int) -> list[dict[str, Array]]:
    shape = [dim.dim_value for dim in proto.graph.input[0].type.tensor_type.shape.dim[1:]]
    return networks.normal_samples(count, *shape)


NETWORKS = {"cnn": (random_cnn, images), "transformer": (random_transformer, ids)}


# --- node by node ---------------------------------------------------------------------------------------------------


def everything(model: OnnxModel, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """Every tensor but FP8 ones, which the runtime does not hand out, as it computes them without optimisation."""
    proto = onnx.load(model.path)
    eight = {node.output[0] for node in proto.graph.node if node.op_type == "QuantizeLinear" and _is_fp8(proto, node)}
    known = {output.name for output in proto.graph.output}
    names = [name for node in proto.graph.node for name in node.output if name not in known | eight]
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    path = model.path.with_name("everything.onnx")
    onnx.save(proto, path)
    return {**feeds, **backend.open_model(path, threads=1, optimize=False).run(feeds)}


def _is_fp8(proto: onnx.ModelProto, node: onnx.NodeProto) -> bool:
    return any(w.name == node.input[2] and w.data_type == TensorProto.FLOAT8E4M3FN for w in proto.graph.initializer)


def disagreements(model: OnnxModel, feeds: Mapping[str, Array]) -> tuple[list[str], int]:
    """Nodes whose output is not what float64 makes of the same inputs, and how many were looked at."""
    proto = onnx.load(model.path)
    stored, seen = reference.constants(proto), everything(model, feeds)
    kinds = {weight.name: weight.data_type for weight in proto.graph.initializer}
    values = {**stored, **{name: np.asarray(a, np.float64) if a.dtype.kind == "f" else a for name, a in seen.items()}}
    wrong = []
    for node in proto.graph.node:
        inputs = [values[name] if name else None for name in node.input]
        name, made = node.output[0], reference.compute(node, inputs, kinds)
        if name not in seen:
            values[name] = made  # FP8 steps: seen through what is made of them
        elif not _agree(node, inputs, kinds, made, np.asarray(values[name])):
            wrong.append(f"{node.op_type} {name}")
    return wrong, len(proto.graph.node)


def _agree(
    node: onnx.NodeProto, inputs: list[Array | None], kinds: Mapping[str, int], made: Array, found: Array
) -> bool:
    if made.shape != found.shape:
        return False
    if node.op_type == "QuantizeLinear":
        # Where the FP32 quotient may be the middle of two steps and the exact one is not, either is right.
        x, scale = inputs[0], inputs[1]
        assert x is not None and scale is not None
        quotient = np.abs(x / scale)
        tie = np.abs(quotient - np.floor(quotient) - 0.5) < 1e-6 * np.maximum(quotient, 1)
        return bool((np.where(tie, np.abs(made - found) <= 1, made == found)).all())
    if node.op_type in PRODUCTS:
        # n + 1 roundings of at most half a unit of the sum of magnitudes, whatever their order (Higham 2002, 3.1).
        sizes = [None if value is None else np.abs(value) for value in inputs]
        assert sizes[1] is not None
        bound = (sizes[1].size + 2) * 2.0**-24 * reference.compute(node, sizes, kinds)
        return bool((np.abs(made - found) <= bound + 1e-30).all())
    if node.op_type == "DequantizeLinear":
        scale = inputs[1]
        return bool(np.array_equal(made.astype(np.float32), found.astype(np.float32)) and scale is not None)
    exact = np.array_equal(made.astype(np.float32), found.astype(np.float32))
    return exact or bool(np.allclose(made, found, rtol=2e-6, atol=2e-6 * float(np.abs(made).max(initial=0))))


COMBINATIONS = [(name, kind) for name in NETWORKS for kind in FORMATS if (name, kind) != ("cnn", "int4")]


@pytest.mark.parametrize(("name", "kind"), COMBINATIONS)
def test_every_node_computes_what_its_definition_says(tmp_path: Path, name: str, kind: str) -> None:
    make, sample = NETWORKS[name]
    looked = 0
    for seed in SEEDS:
        proto = make(seed)
        samples = sample(proto, 6)
        bench = Bench(_folder(tmp_path, seed), proto, samples[:5], attention="attention" in FORMATS[kind])
        model = bench.quantize(min_sqnr_db=NONE, **FORMATS[kind])
        wrong, count = disagreements(model, samples[5])
        assert not wrong, (seed, wrong)
        looked += count
    assert looked > 150


def _folder(tmp_path: Path, seed: int) -> Path:
    (tmp_path / str(seed)).mkdir()
    return tmp_path / str(seed)


# --- whose scales they are ------------------------------------------------------------------------------------------

KEEPS_VALUES = ("MaxPool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("cnn", "int8"),
        ("cnn", "int8 asymmetric"),
        ("transformer", "int8"),
        ("transformer", "int8 asymmetric"),
        ("cnn", "fp8"),
    ],
)
def test_every_scale_is_that_of_its_own_tensor(tmp_path: Path, name: str, kind: str) -> None:
    """With min-max: of an activation, its largest magnitude on all samples in float64, or the reach from its lowest to its
    highest value; of a weight, the largest magnitude of each output channel. What moves values without changing them may have
    the scale of what it reads."""
    make, sample = NETWORKS[name]
    largest, seen, shifted = {"fp8": 448}.get(kind, 127), 0, 0
    for seed in SEEDS:
        proto = make(seed)
        samples = sample(proto, 5)
        bench = Bench(_folder(tmp_path, seed), proto, samples, attention="attention" in FORMATS[kind])
        own = {**FORMATS[kind], "equalize": "off", "joins": "own"}
        made = onnx.load(bench.quantize(min_sqnr_db=NONE, smooth="off", **own).path)
        stored = reference.constants(made)
        exact = reference.run(proto, {key: np.concatenate([one[key] for one in samples]) for key in samples[0]})
        makers = {output: node for node in proto.graph.node for output in node.output}
        for node in made.graph.node:
            if node.op_type == "QuantizeLinear":
                root = node.input[0].removesuffix("_unrounded")
                roots = [root]
                while root in makers and makers[root].op_type in KEEPS_VALUES:
                    root = makers[root].input[0]
                    roots.append(root)
                scale, zero_point = stored[node.input[1]], int(stored[node.input[2]])
                if zero_point == 0:
                    wanted = [(np.abs(exact[root]).max() / largest, 0) for root in roots]
                else:
                    ends = [(min(exact[root].min(), 0), max(exact[root].max(), 0)) for root in roots]
                    wanted = [((high - low) / 255, np.rint(-low / ((high - low) / 255)) - 128) for low, high in ends]
                    shifted += 1
                near = [scale == pytest.approx(step, rel=1e-4) and abs(zero_point - zero) <= 1 for step, zero in wanted]
                assert any(near), (seed, root)
                seen += 1
            elif node.op_type == "DequantizeLinear" and stored.get(node.input[0], np.zeros(())).ndim > 1:
                steps, scale = stored[node.input[0]], stored[node.input[1]]
                axis = next((a.i for a in node.attribute if a.name == "axis"), None) if scale.ndim else None
                others = tuple(i for i in range(steps.ndim) if i != axis)
                peaks = np.abs(steps).max(axis=others if axis is not None else None)
                assert (peaks == largest).all(), (seed, node.name)
                weight = exact.get(node.input[0].rpartition("_")[0])
                if weight is not None:
                    again = reference.dequantize(steps, scale, axis=axis or 0)
                    step = np.broadcast_to(
                        reference.dequantize(np.ones(steps.shape), scale, axis=axis or 0), weight.shape
                    )
                    # Half a step; of FP8, half of the last of four digits, or half of the smallest step there is.
                    limit = step / 2 if kind != "fp8" else np.maximum(np.abs(weight) / 16, step * 2.0**-10)
                    assert (np.abs(again - weight) <= limit * (1 + 1e-5)).all(), (seed, node.name)
                    seen += 1
    assert seen > 50
    assert (shifted > 20) == ("asymmetric" in kind)


# --- whole, to the bit ----------------------------------------------------------------------------------------------


def with_scales_of_two(model: OnnxModel, folder: Path) -> OnnxModel:
    """``model`` with every scale the next power of two, and biases whole numbers of steps."""
    proto = onnx.load(model.path)
    known = {weight.name: weight for weight in proto.graph.initializer}
    makers = {output: node for node in proto.graph.node for output in node.output}
    changed = {
        node.input[1]: 2.0 ** np.ceil(np.log2(numpy_helper.to_array(known[node.input[1]]).astype(np.float64)))
        for node in proto.graph.node
        if node.op_type in ("QuantizeLinear", "DequantizeLinear")
    }
    for node in proto.graph.node:
        if node.op_type in ("Conv", "ConvTranspose", "Gemm") and len(node.input) > 2:
            step = changed[makers[node.input[0]].input[1]] * changed[makers[node.input[1]].input[1]]
            bias = numpy_helper.to_array(known[node.input[2]]).astype(np.float64)
            changed[node.input[2]] = np.rint(bias / step) * step
        elif node.op_type == "Add":
            for name in set(node.input) & known.keys():
                changed[name] = np.rint(numpy_helper.to_array(known[name]) * 1024) / 1024
    for name, values in changed.items():
        known[name].CopyFrom(numpy_helper.from_array(values.astype(np.float32), name))
    folder.mkdir()
    onnx.save(proto, folder / "model.onnx")
    return onnx_files.describe(folder / "model.onnx", precision=model.precision, axes=model.axes)


def computed_by(model: OnnxModel, feeds: Mapping[str, Array]) -> dict[str, dict[str, Array]]:
    """The outputs by the reference, by ONNX Runtime without and with optimisation, and by the engine built of it."""
    engine = backend.build(model, name="engine", reason="", threads=1, out_dir=model.path.parent)
    names = [spec.name for spec in model.outputs]
    values = reference.run(onnx.load(model.path), feeds)
    return {
        "reference": {name: values[name] for name in names},
        "plain": backend.open_model(model.path, threads=1, optimize=False).run(feeds),
        "optimised": backend.open_model(model.path, threads=1).run(feeds),
        "engine": backend.open(engine, threads=1).run(feeds),
    }


@pytest.mark.parametrize("activations", ["symmetric", "asymmetric"])
def test_where_sums_are_exact_all_agree_to_the_bit(tmp_path: Path, activations: str) -> None:
    ties = 0
    for seed in SEEDS:
        proto = random_cnn(seed)
        samples = images(proto, 8)
        bench = Bench(_folder(tmp_path, seed), proto, samples[:5])
        equalize = "on" if activations == "asymmetric" else "off"
        model = bench.quantize(min_sqnr_db=NONE, activations=activations, equalize=equalize)
        model = with_scales_of_two(model, tmp_path / f"{seed} exact")
        feeds = {"x": np.concatenate([sample["x"] for sample in samples[5:]]).astype(np.float32)}
        found = computed_by(model, feeds)
        for name, expected in found["reference"].items():
            for by in ("plain", "optimised", "engine"):
                assert np.array_equal(found[by][name], expected), (seed, by, name)
        ties += ties_in(model, feeds)
    assert ties > 100


def ties_in(model: OnnxModel, feeds: Mapping[str, Array]) -> int:
    """How many values lie exactly between two steps."""
    proto = onnx.load(model.path)
    values = reference.run(proto, feeds)
    quotients = [
        values[node.input[0]] / values[node.input[1]] for node in proto.graph.node if node.op_type == "QuantizeLinear"
    ]
    return sum(int((np.abs(quotient) % 1 == 0.5).sum()) for quotient in quotients)

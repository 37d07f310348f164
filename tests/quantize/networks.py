"""Small models whose numbers are known, written as ONNX files, and sample sets for them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from compiler import onnx_files
from compiler.data import Samples, SampleWriter
from compiler.spec import Array, CalibrationSet, Dim, DimRange, OnnxModel, Precision

MASKED = -3.4028234663852886e38


def f32(values: Any) -> Array:
    return np.array(values, np.float32)


class Net:
    """Grows an ONNX graph, one node a call; weights are normal, seeded, scaled to keep the signal's size."""

    def __init__(self, seed: int = 0) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.random = np.random.default_rng(seed)

    def weight(self, name: str, value: Array | Sequence[float]) -> str:
        self.weights.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def normal(self, name: str, *shape: int, fan_in: int = 1) -> str:
        return self.weight(name, (self.random.normal(size=shape) / np.sqrt(fan_in)).astype(np.float32))

    def op(self, kind: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(kind, inputs, [output], name=f"node_{output}", **attributes))
        return output

    def conv(self, x: str, output: str, channels: tuple[int, int], size: int = 3, *, groups: int = 1) -> str:
        into, out = channels
        fan_in = into // groups * size**2
        weight = self.normal(f"{output}_w", out, into // groups, size, size, fan_in=fan_in)
        bias = self.normal(f"{output}_b", out, fan_in=100)
        return self.op("Conv", [x, weight, bias], output, pads=[size // 2] * 4, group=groups)

    def linear(self, x: str, output: str, sizes: tuple[int, int]) -> str:
        """MatMul and a bias."""
        weight = self.normal(f"{output}_w", *sizes, fan_in=sizes[0])
        bias = self.normal(f"{output}_b", sizes[1], fan_in=100)
        return self.op("Add", [self.op("MatMul", [x, weight], f"{output}_product"), bias], output)

    def model(
        self,
        inputs: Mapping[str, Sequence[Dim]],
        outputs: Mapping[str, Sequence[Dim]],
        opset: int = 20,
        *,
        integers: Sequence[str] = (),
    ) -> onnx.ModelProto:
        def infos(specs: Mapping[str, Sequence[Dim]]) -> list[onnx.ValueInfoProto]:
            types = {name: TensorProto.INT64 if name in integers else TensorProto.FLOAT for name in specs}
            return [helper.make_tensor_value_info(name, types[name], shape) for name, shape in specs.items()]

        graph = helper.make_graph(self.nodes, "net", infos(inputs), infos(outputs), self.weights)
        proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
        return onnx.shape_inference.infer_shapes(proto)


def save(proto: onnx.ModelProto, path: Path, *, opt: int = 4, probe: Mapping[str, Array] | None = None) -> OnnxModel:
    """The noun for ``proto``, written to ``path``; axis ``batch`` is 1 to 64."""
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(proto, path)
    feeds = None
    if probe is not None:
        feeds = path.with_name("probe.npz")
        np.savez(feeds, allow_pickle=False, **{name: np.asarray(value) for name, value in probe.items()})
    return onnx_files.describe(
        path, precision=Precision.FP32, axes={"batch": DimRange(min=1, opt=opt, max=64)}, probe=feeds
    )


def calibration(folder: Path, samples: Iterable[Mapping[str, Array]]) -> CalibrationSet:
    """A stored set; every sample has batch axis 1."""
    with SampleWriter(folder) as writer:
        for sample in samples:
            writer.append(sample)
    stored = Samples(folder)
    return CalibrationSet(path=folder, samples=len(stored), sha256=stored.sha256)


def normal_samples(count: int, *shape: int, name: str = "x", seed: int = 5) -> list[dict[str, Array]]:
    random = np.random.default_rng(seed)
    return [{name: random.normal(size=(1, *shape)).astype(np.float32)} for _ in range(count)]


def linear_map(matrix: Array) -> onnx.ModelProto:
    """y = x @ matrix."""
    net = Net()
    net.op("MatMul", ["x", net.weight("w", matrix.astype(np.float32))], "y")
    return net.model({"x": ["batch", matrix.shape[0]]}, {"y": ["batch", matrix.shape[1]]})


def convolution(*, groups: int = 1, channels: tuple[int, int] = (4, 8)) -> onnx.ModelProto:
    """conv with bias, then Relu: x [batch, 4, 8, 8] -> y [batch, 8, 8, 8]."""
    net = Net(1)
    net.op("Relu", [net.conv("x", "c", channels, groups=groups)], "y")
    return net.model({"x": ["batch", channels[0], 8, 8]}, {"y": ["batch", channels[1], 8, 8]})


def residual(channels: int = 8, blocks: int = 2, size: int = 8) -> onnx.ModelProto:
    """A stem, a pool, residual blocks, a global pool and a classifier: x [batch, 3, 2 size, 2 size] -> y [batch, 10]."""
    net = Net(2)
    x = net.op("Relu", [net.conv("x", "stem", (3, channels))], "stem_relu")
    x = net.op("MaxPool", [x], "pool", kernel_shape=[2, 2], strides=[2, 2])
    for block in range(blocks):
        y = net.op("Relu", [net.conv(x, f"b{block}_1", (channels, channels))], f"b{block}_1_relu")
        y = net.conv(y, f"b{block}_2", (channels, channels))
        x = net.op("Relu", [net.op("Add", [x, y], f"b{block}_sum")], f"b{block}_relu")
    x = net.op("Flatten", [net.op("GlobalAveragePool", [x], "mean")], "flat")
    net.op("Gemm", [x, net.normal("fc_w", 10, channels, fan_in=channels), net.normal("fc_b", 10)], "y", transB=1)
    return net.model({"x": ["batch", 3, 2 * size, 2 * size]}, {"y": ["batch", 10]})


def transformer_block(width: int = 32, heads: int = 4, positions: int = 16) -> onnx.ModelProto:
    """Masked attention and a feed-forward layer: x [batch, positions, width], mask [batch, positions] of 0 and 1."""
    net = Net(3)
    head = width // heads
    net.weight("one", np.array(1, np.float32))
    net.weight("lowest", np.array(MASKED, np.float32))
    net.weight("axes", np.array([1, 2]))
    net.weight("split", np.array([0, -1, heads, head]))
    net.weight("joined", np.array([0, -1, width]))
    net.weight("root", np.array(head**-0.5, np.float32))
    masked = net.op(
        "Unsqueeze", [net.op("Mul", [net.op("Sub", ["one", "mask"], "away"), "lowest"], "low"), "axes"], "bias"
    )
    parts = {}
    for part in "qkv":
        flat = net.op("Reshape", [net.linear("x", part, (width, width)), "split"], f"{part}_heads")
        order = [0, 2, 3, 1] if part == "k" else [0, 2, 1, 3]
        parts[part] = net.op("Transpose", [flat], f"{part}_t", perm=order)
    scores = net.op("Mul", [net.op("MatMul", [parts["q"], parts["k"]], "scores"), "root"], "scaled")
    weights = net.op("Softmax", [net.op("Add", [scores, masked], "kept")], "weights", axis=-1)
    mixed = net.op("Transpose", [net.op("MatMul", [weights, parts["v"]], "mixed")], "mixed_t", perm=[0, 2, 1, 3])
    x = net.op(
        "Add", ["x", net.linear(net.op("Reshape", [mixed, "joined"], "mixed_flat"), "out", (width, width))], "sum1"
    )
    for name in ("norm1", "norm2"):
        net.weight(f"{name}_g", np.ones(width, np.float32))
    x = net.op("LayerNormalization", [x, "norm1_g"], "norm1")
    y = net.op("Gelu", [net.linear(x, "up", (width, 4 * width))], "gelu")
    y = net.op("Add", [x, net.linear(y, "down", (4 * width, width))], "sum2")
    net.op("LayerNormalization", [y, "norm2_g"], "y")
    return net.model(
        {"x": ["batch", positions, width], "mask": ["batch", positions]}, {"y": ["batch", positions, width]}
    )


def masked_samples(count: int, width: int = 32, positions: int = 16, seed: int = 6) -> list[dict[str, Array]]:
    random = np.random.default_rng(seed)
    samples = []
    for _ in range(count):
        mask = (np.arange(positions) < random.integers(4, positions + 1)).astype(np.float32)
        x = random.normal(size=(1, positions, width)).astype(np.float32)
        samples.append({"x": x, "mask": mask[None]})
    return samples


def embedding(rows: int = 1100, width: int = 32, *, head: str = "none", classes: int = 16) -> onnx.ModelProto:
    """Rows of a table, a Relu and a head: ids [batch, 5] -> y [batch, 5, classes], or [batch, 5, rows] with a head that
    multiplies by the table itself, as "transpose" and MatMul; or, over the sum of the positions, [batch, rows], as "gemm".
    """
    net = Net(4)
    table = net.normal("table", rows, width)
    x = net.op("Relu", [net.op("Gather", [table, "ids"], "rows")], "hidden")
    x = net.op("MatMul", [x, net.normal("w", width, width, fan_in=width)], "mixed")
    if head == "none":
        net.op("MatMul", [x, net.normal("h", width, classes, fan_in=width)], "y")
        return net.model({"ids": ["batch", 5]}, {"y": ["batch", 5, classes]}, integers=["ids"])
    if head == "transpose":
        net.op("MatMul", [x, net.op("Transpose", [table], "turned", perm=[1, 0])], "y")
        return net.model({"ids": ["batch", 5]}, {"y": ["batch", 5, rows]}, integers=["ids"])
    summed = net.op("ReduceSum", [x, net.weight("axes", np.array([1]))], "summed", keepdims=0)
    net.op("Gemm", [summed, table, net.normal("b", rows, fan_in=100)], "y", transB=1)
    return net.model({"ids": ["batch", 5]}, {"y": ["batch", rows]}, integers=["ids"])


def id_samples(count: int, rows: int = 1100, seed: int = 7) -> list[dict[str, Array]]:
    random = np.random.default_rng(seed)
    return [{"ids": random.integers(0, rows, size=(1, 5))} for _ in range(count)]

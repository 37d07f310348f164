"""A model of more than 2 GiB, written straight to external data, one weight in memory at a time: the feed-forward half of
a Llama, 18 times. ``x [batch, 16, 2048] -> y``, seeded random weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

WIDTH, HIDDEN, ROWS = 2048, 5632, 16
BLOCKS = 18
CALIBRATION, VALIDATION = 128, 8


def write(path: Path, blocks: int = BLOCKS) -> None:
    """``path`` and ``<path>.data``: 138 MB of weights a block."""
    rng = np.random.default_rng(0)
    nodes: list[onnx.NodeProto] = []
    weights: list[onnx.TensorProto] = []
    data = path.with_name(path.name + ".data")
    with data.open("wb") as file:

        def weight(name: str, *shape: int) -> str:
            values = rng.standard_normal(shape, np.float32) / np.float32(np.sqrt(shape[0]))
            tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=shape)
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in {"location": data.name, "offset": file.tell(), "length": values.nbytes}.items():
                tensor.external_data.add(key=key, value=str(value))
            file.write(values.tobytes())
            weights.append(tensor)
            return name

        def op(kind: str, inputs: list[str], output: str) -> str:
            nodes.append(helper.make_node(kind, inputs, [output], name=output))
            return output

        scale = helper.make_tensor("ones", TensorProto.FLOAT, [WIDTH], [1.0] * WIDTH)
        weights.append(scale)
        x = "x"
        for block in range(blocks):
            at = f"block{block}"
            normal = op("LayerNormalization", [x, "ones"], f"{at}.norm")
            gate = op("MatMul", [normal, weight(f"{at}.gate.weight", WIDTH, HIDDEN)], f"{at}.gate")
            silu = op("Mul", [gate, op("Sigmoid", [gate], f"{at}.sigmoid")], f"{at}.silu")
            up = op("MatMul", [normal, weight(f"{at}.up.weight", WIDTH, HIDDEN)], f"{at}.up")
            product = op("Mul", [silu, up], f"{at}.product")
            down = op("MatMul", [product, weight(f"{at}.down.weight", HIDDEN, WIDTH)], f"{at}.down")
            x = op("Add", [x, down], f"{at}.sum")
        op("LayerNormalization", [x, "ones"], "y")
    shape: list[str | int | None] = ["batch", ROWS, WIDTH]
    graph = helper.make_graph(
        nodes,
        "stack",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    path.write_bytes(model.SerializeToString())


def samples(count: int, seed: int) -> Iterator[dict[str, NDArray[np.float32]]]:
    rng = np.random.default_rng(seed)
    for _ in range(count):
        yield {"x": rng.standard_normal((1, ROWS, WIDTH), np.float32)}

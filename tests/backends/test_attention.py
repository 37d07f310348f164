"""Attention as one operator: equal numbers, and nothing taken that is not attention."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from compiler.backends.attention import fuse_attention
from compiler.backends.onnxruntime import open_model
from compiler.spec import Array

HEADS, SIZE, TOKENS = 2, 4, 5
WIDTH = HEADS * SIZE


def network(**change: Any) -> onnx.ModelProto:
    """Self-attention of x [batch, tokens, 8] with a mask [batch, 1, 1, tokens] of bools, as torch exports it."""
    options = {"low": -3.4e38, "guard": True, "key_perm": [0, 2, 3, 1], "axis": -1, "join": [0, 0, WIDTH], **change}
    rng = np.random.default_rng(0)
    weights: dict[str, Any] = {f"w_{name}": rng.normal(size=(WIDTH, WIDTH)).astype(np.float32) for name in "qkv"}
    weights |= {
        "split": np.array([0, 0, HEADS, SIZE]),
        "join": np.array(options["join"]),
        "zero": np.float32(0),
        "low": np.float32(options["low"]),
        "root": np.float32(SIZE**-0.25),
    }
    nodes = []
    for name, perm in (("q", [0, 2, 1, 3]), ("k", options["key_perm"]), ("v", [0, 2, 1, 3])):
        nodes += [
            helper.make_node("MatMul", ["x", f"w_{name}"], [name]),
            helper.make_node("Reshape", [name, "split"], [f"{name}_split"]),
            helper.make_node("Transpose", [f"{name}_split"], [f"{name}_heads"], perm=perm),
        ]
    nodes += [
        helper.make_node("Mul", ["q_heads", "root"], ["q_scaled"]),
        helper.make_node("Mul", ["k_heads", "root"], ["k_scaled"]),
        helper.make_node("MatMul", ["q_scaled", "k_scaled"], ["scores"]),
        helper.make_node("Where", ["keep", "zero", "low"], ["mask"]),
        helper.make_node("Add", ["scores", "mask"], ["masked"]),
        helper.make_node("Softmax", ["masked"], ["p"], axis=options["axis"]),
    ]
    if options["guard"]:
        nodes += [helper.make_node("IsNaN", ["p"], ["bad"]), helper.make_node("Where", ["bad", "zero", "p"], ["safe"])]
    nodes += [
        helper.make_node("MatMul", ["safe" if options["guard"] else "p", "v_heads"], ["mixed"]),
        helper.make_node("Transpose", ["mixed"], ["turned"], perm=[0, 2, 1, 3]),
        helper.make_node("Reshape", ["turned", "join"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "attention",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", "tokens", WIDTH]),
            helper.make_tensor_value_info("keep", TensorProto.BOOL, ["batch", 1, 1, "tokens"]),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", "tokens", WIDTH])],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return onnx.shape_inference.infer_shapes(model)


def feeds() -> dict[str, Array]:
    keep = np.ones((3, 1, 1, TOKENS), bool)
    keep[1, ..., 3:] = False
    return {"x": np.random.default_rng(1).normal(size=(3, TOKENS, WIDTH)).astype(np.float32), "keep": keep}


def outputs(proto: onnx.ModelProto, path: Path) -> Array:
    onnx.save(proto, path)
    return open_model(path, optimize=False).run(feeds())["y"]


@pytest.mark.parametrize("change", [{}, {"guard": False}, {"guard": False, "low": -np.inf}, {"join": [0, 0, -1]}])
def test_attention_is_one_operator_with_the_same_numbers(tmp_path: Path, change: dict[str, Any]) -> None:
    proto = network(**change)
    model = ir.serde.deserialize_model(proto)
    assert fuse_attention(model) == 1
    assert [node.op_type for node in model.graph if node.domain] == ["MultiHeadAttention"]
    assert not {"Softmax", "Transpose", "IsNaN"} & {node.op_type for node in model.graph}
    fused = outputs(ir.serde.serialize_model(model), tmp_path / "fused.onnx")
    expected = outputs(proto, tmp_path / "plain.onnx")
    np.testing.assert_allclose(fused, expected, rtol=0, atol=2e-6)
    assert np.abs(expected[1] - outputs(network(low=0.0), tmp_path / "unmasked.onnx")[1]).max() > 1e-3


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"low": -np.inf}, id="a row masked with -inf is 0 by its guard"),
        pytest.param({"key_perm": [0, 2, 1, 3]}, id="keys that are not transposed"),
        pytest.param({"axis": 2}, id="probabilities over queries"),
        pytest.param({"join": [0, -1, SIZE]}, id="heads that are not joined"),
    ],
)
def test_what_is_not_attention_stays(change: dict[str, Any]) -> None:
    model = ir.serde.deserialize_model(network(**change))
    before = [node.name for node in model.graph]
    assert fuse_attention(model) == 0
    assert [node.name for node in model.graph] == before

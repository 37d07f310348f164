"""FLOPs counted by hand, and roofs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper

from scripts.gpu import missing, roofline, work
from tests.gpu.fakes import CEILINGS, FakeTorch, Tiny, graph_of


class TestFlops:
    @pytest.mark.parametrize(
        ("node", "inputs", "constants", "flops"),
        [
            # 2 images, 8 filters, 5x5 places, each 3x3x4 products.
            (
                helper.make_node("Conv", ["x", "w"], ["y"], pads=[1, 1, 1, 1], strides=[2, 2]),
                {"x": ["batch", 4, 10, 10]},
                {"w": [8, 4, 3, 3]},
                2 * (2 * 8 * 5 * 5) * (4 * 3 * 3),
            ),
            (
                helper.make_node("Conv", ["x", "w"], ["y"], group=4),
                {"x": ["batch", 4, 10, 10]},
                {"w": [8, 1, 3, 3]},
                2 * (2 * 8 * 8 * 8) * (1 * 3 * 3),
            ),
            # Every input element meets every filter of its group once.
            (
                helper.make_node("ConvTranspose", ["x", "w"], ["y"], strides=[2, 2]),
                {"x": ["batch", 4, 5, 5]},
                {"w": [4, 8, 2, 2]},
                2 * (2 * 4 * 5 * 5) * (8 * 2 * 2),
            ),
            (helper.make_node("Gemm", ["x", "w"], ["y"]), {"x": ["batch", 7]}, {"w": [7, 3]}, 2 * 2 * 7 * 3),
            (
                helper.make_node("Gemm", ["x", "w"], ["y"], transA=1, transB=1),
                {"x": [7, "batch"]},
                {"w": [3, 7]},
                2 * 2 * 7 * 3,
            ),
            (
                helper.make_node("MatMul", ["x", "w"], ["y"]),
                {"x": ["batch", 6, 5, 7]},
                {"w": [7, 3]},
                2 * (2 * 6 * 5 * 3) * 7,
            ),
            (helper.make_node("Relu", ["x"], ["y"]), {"x": ["batch", 9]}, {}, 0),
        ],
        ids=["conv", "grouped conv", "transposed conv", "gemm", "transposed gemm", "batched matmul", "no product"],
    )
    def test_products_of_one_operator_are_those_counted_by_hand(
        self, node: Any, inputs: dict[str, list[int | str]], constants: dict[str, list[int]], flops: int
    ) -> None:
        model = graph_of([node], inputs, constants)
        before = model.SerializeToString()
        counted = work.count_flops(model, {"batch": 2})
        assert counted == {"flops": flops, "by_op": {node.op_type: flops} if flops else {}, "uncounted": {}}
        assert model.SerializeToString() == before

    def test_integer_products_count_too(self) -> None:
        nodes = [helper.make_node("MatMulInteger", ["x", "w"], ["z"]), helper.make_node("Cast", ["z"], ["y"], to=1)]
        counted = work.count_flops(
            graph_of(nodes, {"x": ["batch", 7]}, {"w": [7, 3]}, kind=TensorProto.INT8), {"batch": 5}
        )
        assert counted["flops"] == 2 * 5 * 7 * 3

    def test_the_sizes_asked_for_reach_the_inner_tensors(self) -> None:
        shape = helper.make_tensor("shape", TensorProto.INT64, [3], [0, -1, 4])
        nodes = [
            helper.make_node("Constant", [], ["shape"], value=shape),
            helper.make_node("Reshape", ["x", "shape"], ["r"]),
            helper.make_node("Transpose", ["r"], ["t"], perm=[0, 2, 1]),
            helper.make_node("MatMul", ["r", "t"], ["y"]),
        ]
        model = graph_of(nodes, {"x": ["batch", "sequence"]}, {})
        assert work.count_flops(model, {"batch": 3, "sequence": 24})["flops"] == 2 * 3 * 6 * 6 * 4

    def test_shapes_that_the_file_states_for_other_sizes_are_not_believed(self) -> None:
        nodes = [helper.make_node("Relu", ["x"], ["r"]), helper.make_node("MatMul", ["r", "w"], ["y"])]
        model = graph_of(nodes, {"x": ["batch", 7]}, {"w": [7, 3]})
        model.graph.value_info.append(helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 3]))
        model.graph.value_info.append(helper.make_tensor_value_info("r", TensorProto.FLOAT, [1, 7]))
        assert work.count_flops(model, {"batch": 4})["flops"] == 2 * 4 * 7 * 3

    def test_what_multiplies_and_is_not_counted_is_named(self) -> None:
        node = helper.make_node("Einsum", ["x", "w"], ["y"], equation="bi,ij->bj")
        counted = work.count_flops(graph_of([node], {"x": ["batch", 7]}, {"w": [7, 3]}), {"batch": 2})
        assert counted == {"flops": 0, "by_op": {}, "uncounted": {"Einsum": 1}}

    def test_products_in_functions_of_the_model_count(self) -> None:
        inner = helper.make_function(
            "own",
            "Twice",
            ["a", "b"],
            ["c"],
            [helper.make_node("MatMul", ["a", "b"], ["c"])],
            [helper.make_opsetid("", 20)],
        )
        model = graph_of(
            [helper.make_node("Twice", ["x", "w"], ["y"], domain="own")], {"x": ["batch", 7]}, {"w": [7, 3]}
        )
        model.functions.append(inner)
        model.opset_import.append(helper.make_opsetid("own", 1))
        assert work.count_flops(model, {"batch": 2})["flops"] == 2 * 2 * 7 * 3

    def test_an_unknown_shape_is_an_error(self) -> None:
        nodes = [helper.make_node("NonZero", ["x"], ["n"]), helper.make_node("Cast", ["n"], ["f"], to=1)]
        nodes.append(helper.make_node("MatMul", ["w", "f"], ["y"], name="product"))
        with pytest.raises(missing.MissingError) as refused:
            work.count_flops(graph_of(nodes, {"x": ["batch", 7]}, {"w": [3, 2]}), {"batch": 2})
        assert str(refused.value) == "node 'product' (MatMul): the shape of 'y' is not known"

    def test_torch_and_onnx_count_the_same(self, on_cpu: FakeTorch) -> None:
        model = Tiny()
        feeds = {"x": np.zeros((2, 3, 8, 8), np.float32)}
        nodes = [
            helper.make_node("Conv", ["x", "w"], ["c"], pads=[1, 1, 1, 1]),
            helper.make_node("GlobalAveragePool", ["c"], ["p"]),
            helper.make_node("Flatten", ["p"], ["f"]),
            helper.make_node("Gemm", ["f", "v", "b"], ["y"]),
        ]
        counted = work.count_flops(
            graph_of(nodes, {"x": ["batch", 3, 8, 8]}, {"w": [4, 3, 3, 3], "v": [4, 5], "b": [5]}), {"batch": 2}
        )
        assert work.of_torch(on_cpu, model, feeds)["flops"] == counted["flops"] == 2 * (2 * 4 * 64 * 27 + 2 * 4 * 5)


class TestTorchWork:
    def test_work_counts_floats_once_and_only_the_rows_that_were_looked_up(self, on_cpu: FakeTorch) -> None:
        class Embedded(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.words, self.places = torch.nn.Embedding(100, 8), torch.nn.Embedding(4, 8)
                self.head = torch.nn.Linear(8, 4, bias=False)
                self.head.weight = self.places.weight  # read as a whole
                self.register_buffer("scale", torch.ones(3))
                self.register_buffer("count", torch.zeros((), dtype=torch.int64))

            def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
                return (self.head(self.words(ids) + self.places(ids.clamp(max=3))),)

        ids = np.array([[1, 2, 2, 99]], np.int64)
        found = work.of_torch(on_cpu, Embedded(), {"ids": ids})
        assert found["float_elements"] == 3 * 8 + 4 * 8 + 3
        assert found["io_bytes"] == ids.nbytes + 4 * 4 * 4
        assert found["flops"] == 2 * 4 * 8 * 4


def content_with(candidate: dict[str, Any], ceilings: dict[str, Any]) -> dict[str, Any]:
    batch = {"batch": 1, "work": {"flops": 4_000_000_000}, "candidates": [candidate]}
    return {"recipes": [{"name": "x", "batches": [batch]}], "ceilings": ceilings}


class TestRoofline:
    def candidate(self, **fields: Any) -> dict[str, Any]:
        return {"precision": "fp16", "device": {"median_ms": 4.0}, "bytes": 1_000_000_000, **fields}

    def rooflined(self, candidate: dict[str, Any], ceilings: dict[str, Any] | None = None) -> dict[str, Any]:
        roofline.add_rooflines(content_with(candidate, CEILINGS if ceilings is None else ceilings))
        found: dict[str, Any] = candidate["roofline"]
        return found

    def test_the_lower_roof_binds(self) -> None:
        # 1 GB at 1000 GB/s takes 1 ms; 4 GFLOP at 100 TFLOP/s take 0.04 ms.
        found = self.rooflined(self.candidate())
        assert (found["binds"], found["fraction"], found["roof_ms"]) == ("memory", 0.25, 1.0)
        assert (found["gb_s"], found["tflops"], found["flops_per_byte"]) == (250.0, 1.0, 4.0)
        found = self.rooflined(self.candidate(bytes=100_000_000 // 4))
        assert (found["binds"], found["fraction"]) == ("arithmetic", pytest.approx(0.01))

    def test_weight_only_int4_multiplies_in_fp16(self) -> None:
        assert self.rooflined(self.candidate(precision="int4")) == self.rooflined(self.candidate())

    def test_what_fits_into_the_cache_says_so(self) -> None:
        assert self.rooflined(self.candidate(bytes=50_000_000))["note"] == (
            "all that it moves fits into the L2 cache: the memory roof is too low for it"
        )
        assert "note" not in self.rooflined(self.candidate(bytes=50_000_001))

    @pytest.mark.parametrize(
        ("fields", "ceilings", "why"),
        [
            ({"precision": "tf32"}, None, "tf32 ceiling: too old"),
            ({"precision": "fp8"}, None, "fp8 ceiling: not measured"),
            ({"device": {"missing": "no clock"}}, None, "time on the device: no clock"),
            ({"device": None}, None, "time on the device: not measured"),
            ({"bytes": None}, None, "the bytes that it moves are not known"),
            ({}, {"missing": "no GPU"}, "ceilings: no GPU"),
            ({}, {"copy": {"missing": "x"}, "matmul": {}}, "memory bandwidth was not measured"),
        ],
    )
    def test_what_is_missing_is_named(self, fields: dict[str, Any], ceilings: dict[str, Any] | None, why: str) -> None:
        assert self.rooflined(self.candidate(**fields), ceilings) == {"missing": why}

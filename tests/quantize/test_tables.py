"""Embedding tables beside INT8 activations: stored once, looked up in INT8, tied heads included."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from compiler.backends import onnxruntime as backend
from compiler.backends.onnxruntime import open_model
from tests.quantize import networks, reference
from tests.quantize.bench import Bench, constants, outputs, sqnr


@pytest.mark.parametrize("head", ["none", "transpose", "gemm"])
def test_a_table_is_stored_once_in_int8_and_the_engine_computes_the_same(tmp_path: Path, head: str) -> None:
    samples = networks.id_samples(24)
    bench = Bench(tmp_path, networks.embedding(head=head), samples)
    model = bench.quantize()
    tables = [name for name, weight in constants(model).items() if weight.size == 1100 * 32]
    assert tables == ["table_int8"]
    exact = outputs(bench.model, samples[0])
    assert sqnr(exact, outputs(model, samples[0])) > 30
    again = reference.run(onnx.load(model.path), samples[0])["y"]
    assert np.allclose(outputs(model, samples[0]), again, rtol=1e-4, atol=1e-5)

    (tmp_path / "engine").mkdir()
    engine = backend.build(model, name="int8", reason="", threads=1, out_dir=tmp_path / "engine")
    lowered = onnx.load(engine.path)
    assert [weight.name for weight in lowered.graph.initializer if np.prod(weight.dims) == 1100 * 32] == [
        "table_int8" if head in ("none",) else "table_int8_transposed"
    ]
    assert not any(node.op_type == "DequantizeLinear" for node in lowered.graph.node)
    found = open_model(engine.path, threads=1).run(samples[0])["y"]
    assert np.allclose(found, outputs(model, samples[0]), rtol=1e-5, atol=1e-6)


def test_a_table_whose_floats_are_needed_stays(tmp_path: Path) -> None:
    bench = Bench(tmp_path, networks.embedding(head="transpose"), networks.id_samples(24))
    model = bench.quantize(keep=["y"])
    assert constants(model)["table"].dtype == np.float32


def test_a_small_table_is_not_worth_a_node(tmp_path: Path) -> None:
    bench = Bench(tmp_path, networks.embedding(rows=1024), networks.id_samples(24, rows=1024))
    assert constants(bench.quantize())["table"].dtype == np.float32

"""Factors that a pass has moved from one convolution to the next are found, and no error is taken for one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import numpy_helper

from compiler.quantize import beside, moved
from compiler.spec import Array
from tests.quantize import networks
from tests.quantize.bench import NONE, Bench
from tests.quantize.networks import Net, f32

CHANNELS = 8
FIRST, SECOND = np.geomspace(0.5, 4, CHANNELS), np.geomspace(3, 0.2, CHANNELS)


def _chain() -> onnx.ModelProto:
    """x -> a -> Relu -> b -> c -> y: three convolutions; what c makes, an Add reads."""
    net = Net(3)
    net.conv("x", "a", (3, CHANNELS))
    net.conv(net.op("Relu", ["a"], "a_relu"), "b", (CHANNELS, CHANNELS))
    net.op("Add", [net.conv("b", "c", (CHANNELS, 4)), net.weight("one", f32([1]))], "y")
    return net.model({"x": ["batch", 3, 8, 8]}, {"y": ["batch", 4, 8, 8]})


def _scaled(proto: onnx.ModelProto, *changes: tuple[str, int, Array | float]) -> onnx.ModelProto:
    """The weights named, times factors along an axis."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    for name, axis, factors in changes:
        weight = next(weight for weight in copy.graph.initializer if weight.name == name)
        array = numpy_helper.to_array(weight)
        shape = [-1 if place == axis else 1 for place in range(array.ndim)]
        by = np.asarray(factors).reshape(shape if np.ndim(factors) else [])
        weight.CopyFrom(numpy_helper.from_array((array * by).astype(np.float32), name))
    return copy


def _equalised(proto: onnx.ModelProto) -> onnx.ModelProto:
    both = _scaled(proto, ("a_w", 0, FIRST), ("a_b", 0, FIRST), ("b_w", 1, 1 / FIRST))
    return _scaled(both, ("b_w", 0, SECOND), ("b_b", 0, SECOND), ("c_w", 1, 1 / SECOND))


def _found(tmp_path: Path, theirs: onnx.ModelProto, ours: onnx.ModelProto | None = None) -> dict[str, Array]:
    """What is found between ``ours`` and ``theirs`` in INT8 with each layer's own rounding."""
    ours = _chain() if ours is None else ours
    bench = Bench(tmp_path, theirs, networks.normal_samples(8, 3, 8, 8))
    quantised = bench.quantize(equalize="off", correct_bias="off", min_sqnr_db=NONE)
    networks_of = [beside.prepared(ir.from_proto(proto)).graph for proto in (ours, onnx.load(quantised.path))]
    return moved.factors(*networks_of)


def test_factors_of_a_chain_are_found_through_rounding(tmp_path: Path) -> None:
    found = _found(tmp_path, _equalised(_chain()))
    assert set(found) == {"a", "a_relu", "b"}
    for name, factors in (("a", FIRST), ("a_relu", FIRST), ("b", SECOND)):
        assert found[name].shape == (1, CHANNELS, 1, 1)
        np.testing.assert_allclose(found[name].reshape(-1), factors, rtol=0.02)


def test_a_channel_that_nobody_reads_has_its_makers_factor(tmp_path: Path) -> None:
    unread = np.ones(CHANNELS)
    unread[3] = 0
    ours = _scaled(_chain(), ("b_w", 1, unread))
    found = _found(tmp_path, _equalised(ours), ours)
    np.testing.assert_allclose(found["a"].reshape(-1), FIRST, rtol=0.02)


def test_a_channel_that_nobody_reads_tells_nothing_of_those_above(tmp_path: Path) -> None:
    unread = np.ones(CHANNELS)
    unread[3] = 0
    ours = _scaled(_chain(), ("c_w", 1, unread))
    found = _found(tmp_path / "equalised", _equalised(ours), ours)
    np.testing.assert_allclose(found["a"].reshape(-1), FIRST, rtol=0.02)
    assert _found(tmp_path / "wrong", _scaled(ours, ("a_w", 0, FIRST)), ours) == {}


def test_a_channel_that_is_nowhere_has_factor_one(tmp_path: Path) -> None:
    none = np.ones(CHANNELS)
    none[3] = 0
    ours = _scaled(_chain(), ("a_w", 0, none), ("a_b", 0, none), ("b_w", 1, none))
    expected = FIRST.copy()
    expected[3] = 1
    found = _found(tmp_path, _equalised(ours), ours)
    np.testing.assert_allclose(found["a"].reshape(-1), expected, rtol=0.02)


@pytest.mark.parametrize("weight", ["a_w", "b_w", "c_w"])
@pytest.mark.parametrize("axis", [0, 1])
def test_what_one_side_alone_has_is_an_error(tmp_path: Path, weight: str, axis: int) -> None:
    assert _found(tmp_path / "plain", _scaled(_chain(), (weight, axis, 8.0))) == {}
    factors = np.geomspace(0.5, 4, {("a_w", 1): 3, ("c_w", 0): 4}.get((weight, axis), CHANNELS))
    assert _found(tmp_path / "uneven", _scaled(_chain(), (weight, axis, factors))) == {}


def test_beside_an_error_no_factor_of_its_chain_is_believed(tmp_path: Path) -> None:
    """What is not told for certain is shown as noise."""
    assert _found(tmp_path, _scaled(_equalised(_chain()), ("a_w", 0, 8.0))) == {}


def test_what_rounding_alone_does_is_no_factor(tmp_path: Path) -> None:
    assert _found(tmp_path, _chain()) == {}
    nearly = np.linspace(0.97, 1.03, CHANNELS)
    assert _found(tmp_path / "nearly", _scaled(_chain(), ("a_w", 0, nearly), ("b_w", 1, 1 / nearly))) == {}

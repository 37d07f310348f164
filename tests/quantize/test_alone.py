"""What of a noise reaches the outputs is what adding it there makes of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from compiler import onnx_files
from compiler.backends.onnxruntime import open_model
from compiler.data import Samples
from compiler.quantize import alone
from compiler.quantize.fidelity import Power
from compiler.spec import Array
from tests.quantize import networks
from tests.quantize.networks import Net, f32


def _net() -> onnx.ModelProto:
    """t = 2 x, y = 3 t, z = t^2."""
    net = Net()
    net.op("Mul", ["x", net.weight("two", f32([2]))], "t")
    net.op("Mul", ["t", net.weight("three", f32([3]))], "y")
    net.op("Mul", ["t", "t"], "z")
    return net.model({"x": ["batch", 2]}, {"y": ["batch", 2], "z": ["batch", 2]})


def _measured(tmp_path: Path, pairs: dict[str, tuple[Array, Array]], outputs: dict[str, Power]) -> dict[str, float]:
    model = networks.save(_net(), tmp_path / "model.onnx")
    data = networks.calibration(tmp_path / "data", [{"x": f32([[1, 2]])}, {"x": f32([[3, 0]])}])
    folder = tmp_path / "out"
    folder.mkdir()
    noises = alone.Noises(folder=folder)
    for index in range(2):
        noises.add(index, pairs)
    seen: list[tuple[int, int]] = []
    found = alone.measure(
        model,
        Samples(data.path),
        noises,
        tuple(pairs),
        outputs,
        open_model=open_model,
        threads=1,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == ([(1, 2), (2, 2)] if found else [])
    noises.clean()
    assert not list(folder.iterdir())
    return found


def test_a_noise_is_what_it_makes_of_the_outputs_as_a_part_of_all(tmp_path: Path) -> None:
    noise = {
        "t": (f32([[1, 1]]), f32([[1.5, 1]])),
        "y": (f32([[0, 0]]), f32([[0, -1]])),
        "z": (f32([[7, 7]]), f32([[7, 7]])),
    }
    found = _measured(tmp_path, noise, {"y": Power(signal=100.0, noise=9.0)})
    # Two samples: 3 x 0.5 in y for the one, 1 for the other.
    assert found == pytest.approx({"t": 2 * 1.5**2 / 9, "y": 2 / 9, "z": 0.0})


def test_outputs_count_for_their_noise_over_their_signal(tmp_path: Path) -> None:
    outputs = {"y": Power(signal=100.0, noise=9.0), "z": Power(signal=100.0, noise=3.0)}
    found = _measured(tmp_path, {"t": (f32([[0, 0]]), f32([[1, 0]]))}, outputs)
    of_z = (3**2 - 2**2) ** 2 + (7**2 - 6**2) ** 2  # t is 2 x: 2 and 6
    assert found == pytest.approx({"t": 0.75 * 2 * 3**2 / 9 + 0.25 * of_z / 3})


def test_without_noise_in_the_outputs_there_is_nothing_to_measure(tmp_path: Path) -> None:
    assert _measured(tmp_path, {"t": (f32([[0, 0]]), f32([[1, 0]]))}, {"y": Power(signal=1.0)}) == {}
    assert alone.shares_of({"y": Power(noise=1.0)}) == {"y": 1.0}


def test_infinities_that_stay_what_they_are_add_nothing(tmp_path: Path) -> None:
    noises = alone.Noises(folder=tmp_path)
    noises.add(3, {"file": (f32([-np.inf, np.inf, 1]), f32([-np.inf, np.inf, 3]))})
    with np.load(noises.files[3]) as stored:
        assert stored[noises.keys["file"]].tolist() == [0, 0, 2]


def test_a_tensor_keeps_its_name_and_what_no_node_makes_has_no_input() -> None:
    network: ir.Model = ir.from_proto(_net())
    found = alone.add_inputs(network.graph, ["x", "two", "y", "t"])
    assert list(found) == ["t", "y"]
    assert [value.name for value in network.graph.outputs] == ["y", "z"]
    assert [spec.name for spec in onnx_files.specs(network)[0]] == ["x", found["t"].name, found["y"].name]
    (maker,) = [node for node in network.graph if node.outputs[0].name == "y"]
    assert (maker.op_type, [value.name for value in maker.inputs if value]) == ("Add", ["y_exact", "y_noise"])

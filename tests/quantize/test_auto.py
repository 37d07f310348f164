"""Ranges by measured error, and the models in which roundings have switches and scales are inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from msgspec import structs
from onnx_ir.passes.common import LiftConstantsToInitializersPass

from compiler import onnx_files
from compiler.backends.onnxruntime import open_model
from compiler.quantize import auto, int8, switches
from compiler.quantize.groups import groups
from compiler.quantize.observe import load
from compiler.recipe import EngineSection, QuantizeSection
from compiler.spec import Array, Precision
from tests.quantize import networks
from tests.quantize.bench import NONE, Bench, outputs, sqnr
from tests.quantize.networks import Net

ENGINE = EngineSection(precision=Precision.INT8)
SECTION = QuantizeSection(method="minmax", split="off", equalize="off")


def residual(folder: Path) -> Bench:
    return Bench(folder, networks.residual(), networks.normal_samples(24, 3, 16, 16))


def transformer(folder: Path) -> Bench:
    return Bench(folder, networks.transformer_block(), networks.masked_samples(24))


def switched(bench: Bench, on: int | None, feeds: Mapping[str, Array], path: Path) -> Array:
    found = groups(bench.model, bench.statistics)
    names = switches.write(ENGINE, SECTION, bench.model, bench.statistics, found, path)
    assert names is not None
    runner = open_model(path, threads=1)
    return runner.run({**feeds, **switches.feeds(names, on)})["y"]


@pytest.mark.parametrize("make", [residual, transformer])
def test_with_every_switch_off_the_model_is_what_it_was(tmp_path: Path, make: object) -> None:
    bench: Bench = make(tmp_path)  # type: ignore[operator]
    exact = outputs(bench.model, bench.samples[0])
    found = switched(bench, None, bench.samples[0], tmp_path / "switched.onnx")
    assert found == pytest.approx(exact, rel=1e-4, abs=1e-5)


def test_a_switch_rounds_what_a_model_rounds_that_keeps_all_other_groups(tmp_path: Path) -> None:
    bench = transformer(tmp_path)
    found = groups(bench.model, bench.statistics)
    exact = outputs(bench.model, bench.samples[0])
    for place, group in enumerate(found):
        keep = [name for other in found if other is not group for name in other.keep]
        alone = outputs(bench.quantize(keep=keep, split="off", min_sqnr_db=NONE), bench.samples[0])
        seen = switched(bench, place, bench.samples[0], tmp_path / "switched.onnx")
        assert np.abs(seen - alone).max() < 0.1 * np.abs(alone - exact).max(), group.keep


def test_a_convolution_s_switch_makes_noise_of_the_size_of_its_rounding(tmp_path: Path) -> None:
    """Which roundings of a chain go with one layer is a matter of definition; the size of the noise is not."""
    bench = residual(tmp_path)
    exact = outputs(bench.model, bench.samples[0])
    for place in range(len(groups(bench.model, bench.statistics))):
        seen = switched(bench, place, bench.samples[0], tmp_path / "switched.onnx")
        assert 25 < sqnr(exact, seen) < 80, place


def test_only_int8_with_rounded_activations_has_switches(tmp_path: Path) -> None:
    bench = transformer(tmp_path)
    found = groups(bench.model, bench.statistics)
    for engine in (
        EngineSection(precision=Precision.FP8),
        EngineSection(precision=Precision.INT4),
        EngineSection(precision=Precision.INT8, weights_only=True),
    ):
        path = tmp_path / "none.onnx"
        assert switches.write(engine, SECTION, bench.model, bench.statistics, found, path) is None
        assert not path.exists()


def test_a_model_whose_scales_are_inputs_computes_what_the_quantised_file_does(tmp_path: Path) -> None:
    bench = residual(tmp_path)
    network, prepared = prepared_of(bench)
    roots = {str(prepared.placed.root[value].name): str(value.name) for value in prepared.placed.activations}
    inputs = switches.write_with_grids(network.graph, prepared.placed)
    onnx_files.write(network, tmp_path / "scaled.onnx")
    grids = {root: prepared.grid_of[roots[root]] for root in inputs}
    assert any(grid.zero_point for grid in grids.values())
    given = switches.grid_feeds(inputs, grids)
    exact = outputs(bench.model, bench.samples[0])
    expected = outputs(bench.quantize(split="off", activations="asymmetric"), bench.samples[0])
    found = open_model(tmp_path / "scaled.onnx", threads=1, optimize=False).run({**bench.samples[0], **given})["y"]
    assert sqnr(expected, found) > sqnr(exact, expected) + 15
    # Scales that are 8 times too large are seen.
    wrong = switches.grid_feeds(
        inputs, {root: replace(grid, scale=grid.scale * np.float32(8)) for root, grid in grids.items()}
    )
    assert (
        sqnr(exact, open_model(tmp_path / "scaled.onnx", threads=1).run({**bench.samples[0], **wrong})["y"])
        < sqnr(exact, expected) - 6
    )


def prepared_of(bench: Bench) -> tuple[ir.Model, int8.Prepared]:
    network = onnx_files.read(bench.model.path)
    LiftConstantsToInitializersPass(lift_all_constants=True)(network)
    return network, int8.prepare(
        network.graph, ENGINE, structs.replace(SECTION, activations="asymmetric"), load(bench.statistics.path)
    )


def tail_that_matters() -> tuple[onnx.ModelProto, Sequence[Mapping[str, Array]]]:
    """Two convolutions read inputs with long tails. The first one's output is what its largest values make of it (they are
    multiplied by a thousand); the second one's tail is cut off again before the output."""
    net = Net(5)
    a = net.op("Conv", ["x", net.weight("wa", np.full((1, 1, 1, 1), 1.0, np.float32))], "a")
    net.weight("least", np.array(3.0, np.float32))
    a = net.op("Relu", [net.op("Sub", [a, "least"], "far")], "tail")
    b = net.op("Conv", ["z", net.weight("wb", np.full((1, 1, 1, 1), 1.0, np.float32))], "b")
    b = net.op(
        "Clip", [b, net.weight("low", np.array(-1, np.float32)), net.weight("high", np.array(1, np.float32))], "c"
    )
    net.op("Concat", [a, b], "y", axis=1)
    proto = net.model({"x": ["batch", 1, 32, 32], "z": ["batch", 1, 32, 32]}, {"y": ["batch", 2, 32, 32]})
    random = np.random.default_rng(3)
    samples = []
    for _ in range(20):
        x, z = (random.laplace(size=(1, 1, 32, 32)).astype(np.float32) for _ in range(2))
        samples.append({"x": x, "z": np.where(random.random(z.shape) < 0.002, 30 * z, z).astype(np.float32)})
    return proto, samples


def test_ranges_are_chosen_by_what_the_outputs_lose(tmp_path: Path) -> None:
    bench = Bench(tmp_path, *tail_that_matters())
    model = bench.quantize(method="auto")
    scale = {
        node.input[0]: next(
            onnx.numpy_helper.to_array(weight) for weight in onnx.load(model.path).graph.initializer
            if weight.name == node.input[1]
        )
        for node in onnx.load(model.path).graph.node if node.op_type == "QuantizeLinear"
    }  # fmt: skip
    observed = load(bench.statistics.path)
    assert scale["x"] * 127 > 0.7 * observed["x"].peak, "clipping x costs the output its largest values"
    assert scale["z"] * 127 < 0.3 * observed["z"].peak, "the tail of z is cut off anyway"
    exact = outputs(bench.model, bench.samples[0])
    found = sqnr(exact, outputs(model, bench.samples[0]))
    others = [sqnr(exact, outputs(bench.quantize(method=method), bench.samples[0])) for method in auto.METHODS]
    assert found > max(others) - 0.01
    assert min(others) < 20 < found, "the choice matters"
    count = min(auto.SAMPLES, len(bench.samples))
    assert any(note.startswith(f"ranges by measured error on {count} calibration samples: ") for note in model.notes)


def shifted(folder: Path, *, centred: bool, batches: int = 4) -> auto.Trial:
    """``x W`` beside ``x W + shift``, eight rows of four numbers in each batch."""
    original, changed = (Net(3), Net(3))
    for net in (original, changed):
        net.op("MatMul", ["x", net.weight("w", np.eye(4, dtype=np.float32))], "y" if net is original else "p")
    changed.op("Add", ["p", "shift"], "y")
    model = networks.save(original.model({"x": ["batch", 4]}, {"y": ["batch", 4]}), folder / "original.onnx")
    network = ir.from_proto(changed.model({"x": ["batch", 4], "shift": ["one", 4]}, {"y": ["batch", 4]}))
    feeds = [{"x": sample["x"]} for sample in networks.normal_samples(batches, 4)]
    feeds = [{"x": np.repeat(one["x"], 8, axis=0)} for one in feeds]
    return auto.Trial(feeds, open_model, 1, folder, model.path, network, centred=centred)


def test_an_error_that_biases_will_take_back_is_none(tmp_path: Path) -> None:
    shift = {"shift": np.array([[0.5, -1.0, 0.0, 2.0]], np.float32)}
    with shifted(tmp_path, centred=False) as trial:
        counted = trial.error(shift)
    with shifted(tmp_path, centred=True) as trial:
        assert trial.error(shift) == pytest.approx([0, 0], abs=1e-6)
        per_row = {"shift": np.linspace(-1, 1, 32, dtype=np.float32).reshape(8, 4)}
        assert (trial.error(per_row) > 0.01).all(), "what differs from row to row is an error"
    assert counted[0] == pytest.approx(counted[1])
    assert counted.sum() > 0.5


def test_errors_are_told_apart_by_halves_of_the_samples(tmp_path: Path) -> None:
    with shifted(tmp_path, centred=False, batches=3) as trial:
        first, second = trial.error({"shift": np.ones((1, 4), np.float32)})
    assert first == pytest.approx(2 * second), "two batches of three, and one"


def test_a_range_that_helps_half_of_the_samples_alone_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(tmp_path, *tail_that_matters())
    calls: list[Any] = []

    def lopsided(trial: auto.Trial, given: Any) -> Array:
        calls.append(given)
        return np.array([1.0, 1.0]) if len(calls) <= len(auto.METHODS) else np.array([0.1, 1.1])

    monkeypatch.setattr(auto.Trial, "error", lopsided)
    notes = bench.quantize(method="auto").notes
    assert len(calls) > len(auto.METHODS), "others were tried"
    assert any("calibration samples: 3 minmax; all minmax: " in note for note in notes), notes


def test_the_same_data_give_the_same_ranges(tmp_path: Path) -> None:
    bench = residual(tmp_path)
    assert bench.quantize(method="auto").sha256 == bench.quantize(method="auto").sha256


@pytest.mark.parametrize(("make", "samples"), [(residual, 16), (transformer, 4)], ids=["one row each", "sequences"])
def test_where_trials_are_dear_the_method_that_serves_all_is_taken_and_a_note_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path], Bench], samples: int
) -> None:
    monkeypatch.setattr(auto, "MOST_MACS", 1.0)
    notes = make(tmp_path).quantize(method="auto").notes
    assert any(note.startswith(f"ranges by measured error on {samples} calibration samples: ") for note in notes)
    assert any(
        note.endswith("took the method that serves all best: trying each would have cost too much") for note in notes
    )

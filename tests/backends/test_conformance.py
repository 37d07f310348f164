"""What every back end must do; where one cannot build, or its engines cannot run, it is skipped with its own reason."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest

from compiler import backends, onnx_files
from compiler.backends import Backend
from compiler.backends.onnxruntime import open_model
from compiler.codec import dump, load
from compiler.errors import BuildError
from compiler.quantize import observe, quantize
from compiler.recipe import EngineSection, QuantizeSection
from compiler.spec import Array, Engine, OnnxModel, Precision, Runner
from tests.quantize import networks

LOG = "builder.log"
"""The one other file that a back end may leave in its folder."""
SAMPLES = networks.normal_samples(16, 3, 16, 16)


@pytest.fixture(params=sorted(backends.NAMES))
def backend(request: pytest.FixtureRequest) -> Backend:
    found = backends.get(request.param)
    if reason := found.unavailable():
        pytest.skip(reason)
    return found


@pytest.fixture
def runs(backend: Backend) -> None:
    """For a test that runs what it builds."""
    if reason := backend.cannot_run():
        pytest.skip(f"{backend.NAME}: {reason}")


@pytest.fixture(params=list(Precision))
def precision(request: pytest.FixtureRequest, backend: Backend) -> Precision:
    if request.param not in backend.PRECISIONS:
        pytest.skip(f"{backend.NAME} does not take {request.param}")
    wanted: Precision = request.param
    return wanted


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Mapping[Precision, OnnxModel]:
    """A residual network in every precision."""
    folder = tmp_path_factory.mktemp("models")
    model = networks.save(networks.residual(channels=16), folder / "model.onnx", probe=SAMPLES[0])
    data = networks.calibration(folder / "data", SAMPLES)
    for name in ("observed", *Precision):
        (folder / name).mkdir()
    statistics = observe(
        model, data, samples=64, min_samples=1, open_model=open_model, threads=1, out_dir=folder / "observed"
    )
    made = {Precision.FP32: model}
    for precision in set(Precision) - {Precision.FP32}:
        made[precision] = quantize(
            EngineSection(precision=precision, block=16 if precision is Precision.INT4 else 32),
            QuantizeSection(),
            model,
            statistics,
            data,
            open_model=open_model,
            threads=1,
            out_dir=folder / precision,
        )
    return made


def build(backend: Backend, model: OnnxModel, folder: Path) -> Engine:
    folder.mkdir()
    return backend.build(model, name="candidate", reason="because", threads=1, out_dir=folder)


@pytest.fixture
def engine(backend: Backend, models: Mapping[Precision, OnnxModel], tmp_path: Path) -> Engine:
    return build(backend, models[Precision.FP32], tmp_path / "engine")


@pytest.fixture
def runner(runs: None, backend: Backend, engine: Engine) -> Runner:
    return backend.open(engine, threads=1)


FAITHFUL_DB = {
    Precision.FP32: 100,
    Precision.FP16: 50,
    Precision.BF16: 30,
    Precision.INT8: 28,
    Precision.FP8: 22,
    Precision.INT4: 15,
}


def test_an_engine_computes_what_its_model_computes(
    runs: None, backend: Backend, precision: Precision, models: Mapping[Precision, OnnxModel], tmp_path: Path
) -> None:
    engine = build(backend, models[precision], tmp_path / "engine")
    runner = backend.open(engine, threads=1)
    original = open_model(models[Precision.FP32].path)
    for sample in (SAMPLES[0], {"x": np.concatenate([sample["x"] for sample in SAMPLES[:5]])}):
        expected, found = original.run(sample)["y"], runner.run(sample)["y"]
        assert found.shape == expected.shape
        assert found.dtype == expected.dtype
        noise = float(np.sum((expected - found) ** 2))
        assert 10 * np.log10(np.sum(expected**2) / max(noise, 1e-30)) > FAITHFUL_DB[precision]


def test_an_engine_describes_itself(
    backend: Backend, precision: Precision, models: Mapping[Precision, OnnxModel], tmp_path: Path
) -> None:
    model = models[precision]
    engine = build(backend, model, tmp_path / "engine")
    assert (engine.name, engine.backend, engine.backend_reason) == ("candidate", backend.NAME, "because")
    assert (engine.precision, engine.model_sha256) == (precision, model.sha256)
    assert (engine.inputs, engine.outputs, engine.axes) == (model.inputs, model.outputs, model.axes)
    assert engine.platform == backend.platform()
    assert engine.size_bytes == sum(file.stat().st_size for file in (engine.path, *engine.external_data))
    assert engine.sha256 == onnx_files.sha256_of(engine.path, engine.external_data)
    assert engine.build_s > 0
    assert set(model.notes) <= set(engine.notes)
    assert engine.options


def test_an_engine_stays_in_its_folder_and_survives_a_round_trip(backend: Backend, engine: Engine) -> None:
    folder = engine.path.parent
    assert all(file.is_relative_to(folder) for file in (engine.path, *engine.external_data))
    found = {file for file in folder.rglob("*") if file.is_file() and file.name != LOG}
    assert found == {engine.path, *engine.external_data}
    assert load(dump(engine, folder), Engine, folder) == engine


def test_building_again_gives_an_engine_that_computes_the_same(
    runs: None, backend: Backend, models: Mapping[Precision, OnnxModel], engine: Engine, tmp_path: Path
) -> None:
    again = build(backend, models[Precision.FP32], tmp_path / "again")
    first, second = (backend.open(e, threads=1).run(SAMPLES[1])["y"] for e in (engine, again))
    assert np.array_equal(first, second)


def test_two_runs_give_the_same_bits(runner: Runner) -> None:
    assert np.array_equal(runner.run(SAMPLES[0])["y"], runner.run(SAMPLES[0])["y"])


def test_a_runner_knows_inputs_and_outputs(runner: Runner, engine: Engine) -> None:
    assert (runner.inputs, runner.outputs) == (engine.inputs, engine.outputs)


def test_outputs_are_fresh_arrays(runner: Runner) -> None:
    first = runner.run(SAMPLES[0])["y"]
    kept = first.copy()
    runner.run(SAMPLES[1])
    assert np.array_equal(first, kept)


def test_feeds_may_be_read_only_and_strided(runner: Runner) -> None:
    expected = runner.run(SAMPLES[0])["y"]
    strided = np.asfortranarray(SAMPLES[0]["x"])
    strided.setflags(write=False)
    assert np.array_equal(runner.run({"x": strided})["y"], expected)


def test_time_gives_one_positive_number_per_call(runner: Runner) -> None:
    taken = runner.time(SAMPLES[0], 5)
    assert len(taken) == 5
    assert all(0 < seconds < 60 for seconds in taken)


@pytest.mark.parametrize("method", ["run", "time"])
@pytest.mark.parametrize(
    ("feeds", "message"),
    [
        ({}, "feeds named nothing; 'x' were expected. Feed every input by its exact name."),
        (
            {"X": SAMPLES[0]["x"]},
            "feeds named 'X'; 'x' were expected. Feed every input by its exact name.",
        ),
        (
            {"x": SAMPLES[0]["x"], "z": SAMPLES[0]["x"]},
            "feeds named 'x', 'z'; 'x' were expected. Feed every input by its exact name.",
        ),
        (
            {"x": SAMPLES[0]["x"].astype(np.float64)},
            "input 'x': found float64 [1, 3, 16, 16]; float32 [batch, 3, 16, 16] was expected. Convert it.",
        ),
        (
            {"x": SAMPLES[0]["x"].astype(">f4")},
            "input 'x': found >f4 [1, 3, 16, 16]; float32 [batch, 3, 16, 16] was expected. Convert it.",
        ),
        (
            {"x": SAMPLES[0]["x"][0]},
            "input 'x': found float32 [3, 16, 16]; float32 [batch, 3, 16, 16] was expected. Convert it.",
        ),
        (
            {"x": SAMPLES[0]["x"][:, :2]},
            "input 'x': found float32 [1, 2, 16, 16]; float32 [batch, 3, 16, 16] was expected. Convert it.",
        ),
        (
            {"x": SAMPLES[0]["x"].tolist()},
            "input 'x': found list; float32 [batch, 3, 16, 16] was expected. Convert it.",
        ),
    ],
)
def test_feeds_that_do_not_fit_are_refused(
    runner: Runner, engine: Engine, method: str, feeds: Mapping[str, Array], message: str
) -> None:
    with pytest.raises(BuildError) as caught:
        runner.run(feeds) if method == "run" else runner.time(feeds, 1)
    assert caught.value.message == f"{engine.path.name}: {message}"


def test_a_closed_runner_says_so(runner: Runner, engine: Engine) -> None:
    runner.close()
    with pytest.raises(BuildError) as caught:
        runner.run(SAMPLES[0])
    assert caught.value.message == f"{engine.path.name}: closed; an open model was expected. Open it again."


def test_an_operator_that_nobody_has_is_named_with_its_node(
    backend: Backend, models: Mapping[Precision, OnnxModel], tmp_path: Path
) -> None:
    proto = onnx.load(models[Precision.FP32].path)
    next(node for node in proto.graph.node if node.op_type == "Flatten").op_type = "Zanzibar"
    path = tmp_path / "odd.onnx"
    # Written past the checker, which knows the operators of its own domain.
    for node in proto.graph.node:
        if node.op_type == "Zanzibar":
            node.domain = "odd.domain"
    proto.opset_import.append(onnx.helper.make_opsetid("odd.domain", 1))
    onnx.save(proto, path)
    odd = dataclasses.replace(models[Precision.FP32], path=path)
    with pytest.raises(BuildError) as caught:
        build(backend, odd, tmp_path / "engine")
    assert "node 'node_flat'" in caught.value.message
    assert "Zanzibar" in caught.value.message


def test_a_damaged_engine_is_refused(backend: Backend, engine: Engine) -> None:
    engine.path.write_bytes(engine.path.read_bytes()[:100])
    with pytest.raises(BuildError) as caught:
        backend.open(engine, threads=1)
    assert caught.value.message.startswith(f"{engine.path.name}: ")


def test_a_missing_engine_is_refused(backend: Backend, engine: Engine) -> None:
    engine.path.unlink()
    with pytest.raises(BuildError) as caught:
        backend.open(engine, threads=1)
    assert caught.value.message.startswith(f"{engine.path.name}: ")


def test_a_probe_that_does_not_fit_fails_the_build(
    backend: Backend, models: Mapping[Precision, OnnxModel], tmp_path: Path
) -> None:
    probe = tmp_path / "probe.npz"
    np.savez(probe, x=np.zeros((1, 3, 15, 16), np.float32))
    with pytest.raises(BuildError, match=r"input 'x': found float32 \[1, 3, 15, 16\]"):
        build(backend, dataclasses.replace(models[Precision.FP32], probe=probe), tmp_path / "engine")


def test_the_fingerprint_is_text_and_always_the_same(backend: Backend) -> None:
    found = backend.fingerprint()
    assert found == backend.fingerprint()
    assert all(isinstance(key, str) and isinstance(value, str) and value for key, value in found.items())
    assert {package: version for package, version in backend.platform().packages.items() if package in found}

"""The driver on whole files: what it writes, what it says, and that it catches a pass that breaks its promise."""

from __future__ import annotations

import functools
import gc
import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper

from compiler import onnx_files
from compiler.backends.onnxruntime import open_model
from compiler.errors import ArtifactError, BuildError, ExportError, GraphError, RecipeError
from compiler.optimize import PASSES, driver, edit, optimize
from compiler.optimize.contract import Pass
from compiler.optimize.driver import difference, interface_of, limit_bytes_for, run_passes
from compiler.recipe import OptimizeSection
from compiler.spec import DimRange, OnnxModel, Precision

from . import planted

AXES = {"N": DimRange(min=1, opt=2, max=8)}
EVERYTHING = OptimizeSection()
REPORT = "and report it."


def save(folder: Path, body: str, *, interface: str, weights: dict[str, NDArray[Any]], opset: int = 20) -> OnnxModel:
    """A model from onnx's text form, with a probe of random numbers (axes by name get 2)."""
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": {opset}]> g {interface} {{ {body} }}')
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in weights.items())
    folder.mkdir(parents=True, exist_ok=True)
    path, probe = folder / "model.onnx", folder / "probe.npz"
    path.write_bytes(model.SerializeToString())
    rng = np.random.default_rng(1)
    inputs, _ = onnx_files.specs(onnx_files.read(path))
    feeds = {spec.name: rng.normal(size=[d if isinstance(d, int) else 2 for d in spec.shape]) for spec in inputs}
    np.savez(probe, allow_pickle=False, **{spec.name: feeds[spec.name].astype(spec.dtype) for spec in inputs})
    return onnx_files.describe(path, precision=Precision.FP32, axes=AXES, probe=probe)


def network(folder: Path, **changes: Any) -> OnnxModel:
    """Two Convs that share a weight, BatchNormalization behind each, casts, transposes, a Split, a Slice, an Expand."""
    rng = np.random.default_rng(0)
    weights: dict[str, NDArray[Any]] = {
        name: rng.uniform(0.5, 2, 3).astype(np.float32) for name in ("s1", "b1", "m1", "v1", "s2", "b2", "m2", "v2")
    }
    weights["w"] = rng.normal(size=(3, 3, 1, 1)).astype(np.float32)
    weights["half"] = np.array([0.5], np.float32)
    weights["shape"] = np.array([1, 3, 4, 5], np.int64)
    weights["sizes"] = np.array([1, 4], np.int64)
    weights |= {name: np.array([number], np.int64) for name, number in {"one": 1, "most": 2**62, "last": 3}.items()}
    body = (
        "t1 = Conv(x, w) u1 = BatchNormalization<epsilon=0.5>(t1, s1, b1, m1, v1) t2 = Conv(x, w) m = Mul(t2, half) "
        "u2 = BatchNormalization(m, s2, b2, m2, v2) a = Add(u1, u2) c = Cast<to=6>(a) d = Cast<to=1>(c) "
        "p = Transpose<perm=[1, 2, 3, 0]>(d) q = Transpose<perm=[0, 3, 1, 2]>(p) r = Transpose<perm=[1, 0, 2, 3]>(q) "
        "l = Slice(r, one, most, last) f, g = Split<axis=-1>(r, sizes) e = Expand(half, shape) h = Mul(r, e) i = Identity(h) "
        "y = Add(i, a) k = Sub(a, a) z = Add(k, h) o = LeakyRelu<alpha=0.1>(l) v = LeakyRelu<alpha=0.2>(l) n = Sub(o, v) part = Neg(g) "
        "dead = Exp(x)"
    )
    interface = "(float[N, 3, 4, 5] x) => (float[N, 3, 4, 5] y, float[N, 3, 4, 5] z, float[N, 3, 4, 4] n, float[N, 3, 4, 4] part)"
    return save(folder, body, interface=interface, weights=weights, **changes)


def outputs(model: OnnxModel, **feeds: NDArray[Any]) -> dict[str, NDArray[Any]]:
    runner = open_model(model.path, optimize=False)
    if not feeds:
        assert model.probe is not None
        feeds = dict(np.load(model.probe))
    return runner.run(feeds)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


@pytest.fixture
def only(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Put these in place of the registered passes."""

    def put(*passes: Pass) -> None:
        monkeypatch.setattr(driver, "PASSES", passes)

    return put


# --- what it writes -------------------------------------------------------------------------------------------------


def test_the_result_computes_the_same_with_less_and_says_how(tmp_path: Path, out: Path) -> None:
    original = network(tmp_path / "in")
    result = optimize(EVERYTHING, original, open_model=open_model, out_dir=out)
    assert difference(outputs(original), outputs(result)) is None
    model = onnx_files.read(result.path)
    assert "BatchNormalization" not in {node.op_type for node in model.graph}
    assert len(model.graph) < len(onnx_files.read(original.path).graph)
    assert "fold_batch_norm: 2 nodes" in result.notes and "fold_affine: 1 node" in result.notes
    assert [note.partition(":")[0] for note in result.notes] == [
        step.name for step in PASSES if any(note.startswith(f"{step.name}: ") for note in result.notes)
    ]


def test_all_that_the_result_names_lies_in_the_folder_and_nothing_else_does(tmp_path: Path, out: Path) -> None:
    original = network(tmp_path / "in")
    result = optimize(EVERYTHING, original, open_model=open_model, out_dir=out)
    assert sorted(path.name for path in out.iterdir()) == ["model.onnx", "probe.npz"]
    assert (result.path, result.probe) == (out / "model.onnx", out / "probe.npz")
    assert result.sha256 == hashlib.sha256(result.path.read_bytes()).hexdigest()
    assert (result.inputs, result.outputs, result.axes) == (original.inputs, original.outputs, AXES)
    assert (result.opset, result.precision) == (20, Precision.FP32)


def test_the_same_model_gives_the_same_bytes_and_the_result_is_final(tmp_path: Path, out: Path) -> None:
    original = network(tmp_path / "in")
    folders = [tmp_path / name for name in ("one", "two", "three")]
    for folder in folders:
        folder.mkdir()
    one, two = (optimize(EVERYTHING, original, open_model=open_model, out_dir=folder) for folder in folders[:2])
    three = optimize(EVERYTHING, one, open_model=open_model, out_dir=folders[2])
    assert one.sha256 == two.sha256 == three.sha256 and three.notes == ()


def test_a_model_with_nothing_to_do_is_copied_byte_for_byte_with_its_external_data(tmp_path: Path, out: Path) -> None:
    small = save(
        tmp_path / "in",
        "y = MatMul(x, w)",
        interface="(float[N, 400] x) => (float[N, 2] y)",
        weights={"w": np.ones((400, 2), np.float32)},
    )
    model = onnx_files.read(small.path)
    onnx_files.write(model, small.path, external_above=0)
    original = onnx_files.describe(small.path, precision=Precision.FP32, axes=AXES, probe=small.probe)
    result = optimize(EVERYTHING, original, open_model=open_model, out_dir=out)
    assert result.notes == () and result.sha256 == original.sha256
    assert result.external_data == (out / "model.onnx.data",)
    assert result.path.read_bytes() == original.path.read_bytes()


def test_large_weights_stay_in_a_file_of_their_own(tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interface, weights = "(float[N, 400] x) => (float[N, 2] y)", {"w": np.ones((400, 2), np.float32)}
    original = save(
        tmp_path / "in", "t = MatMul(x, w) u = Identity(t) y = Neg(u)", interface=interface, weights=weights
    )
    monkeypatch.setattr(driver, "write", functools.partial(onnx_files.write, external_above=0))
    result = optimize(EVERYTHING, original, open_model=open_model, out_dir=out)
    assert result.external_data == (out / "model.onnx.data",) and "remove_identities: 1 node" in result.notes
    assert difference(outputs(original), outputs(result)) is None


def test_weights_are_read_from_where_they_lie_not_copied_into_memory(tmp_path: Path) -> None:
    """Passes over a model with external data leave its large weights memory-mapped."""
    original = save(
        tmp_path,
        "t = Identity(x) v = Identity(w) y = MatMul(t, v)",
        interface="(float[N, 400] x) => (float[N, 2] y)",
        weights={"w": np.ones((400, 2), np.float32)},
    )
    model = onnx_files.read(original.path)
    onnx_files.write(model, original.path, external_above=0)
    graph = onnx_files.read(original.path)
    run_passes(PASSES, graph, limit_bytes_for(graph))
    assert isinstance(graph.graph.initializers["w"].const_value, ir.ExternalTensor)


def test_progress_goes_up_to_its_total(tmp_path: Path, out: Path) -> None:
    seen: list[tuple[int, int]] = []
    optimize(
        EVERYTHING, network(tmp_path / "in"), open_model=open_model, out_dir=out, progress=lambda *at: seen.append(at)
    )
    assert (
        seen == sorted(seen)
        and seen[-1] == (len(PASSES), len(PASSES))
        and {total for _, total in seen} == {len(PASSES)}
    )


def test_a_folder_that_is_gone_is_an_artifact_error(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"gone: cannot write: No such file or directory\. Choose a folder"):
        optimize(EVERYTHING, network(tmp_path / "in"), open_model=open_model, out_dir=tmp_path / "gone")


# --- skipping -------------------------------------------------------------------------------------------------------


def test_a_pass_that_the_recipe_skips_does_not_run(tmp_path: Path, out: Path) -> None:
    section = OptimizeSection(skip=("fold_batch_norm",))
    result = optimize(section, network(tmp_path / "in"), open_model=open_model, out_dir=out)
    assert [n.op_type for n in onnx_files.read(result.path).graph].count("BatchNormalization") == 2
    assert not any(note.startswith("fold_batch_norm") for note in result.notes)


def test_everything_may_be_skipped(tmp_path: Path, out: Path) -> None:
    original = network(tmp_path / "in")
    section = OptimizeSection(skip=tuple(step.name for step in PASSES))
    assert optimize(section, original, open_model=open_model, out_dir=out).sha256 == original.sha256


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("fold_batchnorm", "did you mean 'fold_batch_norm'?"),
        ("x", f"expected some of {', '.join(step.name for step in PASSES)}."),
    ],
)
def test_a_name_that_no_pass_has_is_a_recipe_error(tmp_path: Path, out: Path, name: str, hint: str) -> None:
    with pytest.raises(RecipeError) as caught:
        optimize(OptimizeSection(skip=(name,)), network(tmp_path / "in"), open_model=open_model, out_dir=out)
    assert caught.value.message == f"[optimize] skip: no pass is named '{name}'; {hint}"


def test_nobody_holds_the_model_while_the_runtime_opens_it(tmp_path: Path, out: Path) -> None:
    """It is in memory twice then. Of what was optimised only the parsed file is left, whose weights are not read."""
    held: list[int] = []
    gc.collect()
    before = {id(thing) for thing in gc.get_objects() if type(thing) is ir.Graph}

    def watched(path: Path, **options: Any) -> Any:
        held.append(sum(type(thing) is ir.Graph and id(thing) not in before for thing in gc.get_objects()))
        return open_model(path, **options)

    optimize(EVERYTHING, network(tmp_path / "in"), open_model=watched, out_dir=out)
    assert held[0] == 0
    assert held[1] <= 1


# --- numbers --------------------------------------------------------------------------------------------------------

FAULTS = {
    "lost_cast": r"moved output 'y' by [\d.e+-]+ of its largest magnitude [\d.]+ \(1e-04 allowed\)",
    "transposed_axes": r"left a model that does not run: .*",
    "nan_blind": r"moved NaN or infinity in output 'z'",
    "first_output_for_second": r"made output 'part' float32\[2, 3, 4, 1\] instead of float32\[2, 3, 4, 4\]",
    "shared_weight_edited": r"moved output 'y' by .*",
    "wrong_epsilon": r"moved output 'y' by .*",
    "wrong_axis": r"moved output 'y' by .*",
    "off_by_one_slice": r"made output 'n' float32\[2, 3, 4, 5\] instead of float32\[2, 3, 4, 4\]",
    "same_but_for_attributes": r"moved output 'n' by 1 of its largest magnitude .*",
    "duplicate_name": r"left an invalid model: .*",
    "renamed_output": r"changed the interface: output 'y' float32\[N, 3, 4, 5\] became 'renamed' float32\[N, 3, 4, 5\]",
    "fixed_axis": r"changed the interface: input 'x' float32\[N, 3, 4, 5\] became 'x' float32\[2, 3, 4, 5\]",
    "lost_output": r"changed the interface: 4 outputs became 1",
    "unknown_operator": r"left a model that does not run: .*",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_driver_catches_a_broken_pass_and_names_it(
    tmp_path: Path, out: Path, only: Callable[..., None], fault: str
) -> None:
    """Among sound passes before and after it, and with what it broke: the bisection finds the one that did."""
    bad = next(step for step in (*planted.WRONG_NUMBERS, *planted.WRONG_GRAPHS) if step.name == fault)
    by_name = {step.name: step for step in PASSES}
    only(
        by_name["infer_shapes"], by_name["remove_identities"], bad, by_name["merge_duplicates"], by_name["remove_dead"]
    )
    original = network(tmp_path / "in")
    if fault == "nan_blind":
        assert original.probe is not None
        probe = dict(np.load(original.probe))
        probe["x"][0, 0, 0, 0] = np.nan
        np.savez(original.probe, allow_pickle=False, **probe)
    expected = (
        "inputs and outputs stay as they are"
        if "interface" in FAULTS[fault]
        else "the outputs of the original were expected"
    )
    with pytest.raises(GraphError) as caught:
        optimize(EVERYTHING, original, open_model=open_model, out_dir=out)
    start, end = (
        f"{original.path}: pass '{fault}' ",
        f'; {expected}. Leave it out, [optimize] skip = ["{fault}"], {REPORT}',
    )
    assert caught.value.message.startswith(start) and caught.value.message.endswith(end)
    found = caught.value.message.removeprefix(start).removesuffix(end)
    assert re.fullmatch(FAULTS[fault], found, re.DOTALL), found
    assert not [path for path in out.iterdir() if path.name.startswith("bisect")]


def test_a_pass_that_raises_is_named(tmp_path: Path, out: Path, only: Callable[..., None]) -> None:
    def trip(model: ir.Model, limit_bytes: int) -> int:
        raise KeyError("w")

    only(Pass(name="trip", does="trips", counts="time", run=trip))
    original = network(tmp_path / "in")
    with pytest.raises(GraphError) as caught:
        optimize(EVERYTHING, original, open_model=open_model, out_dir=out)
    assert caught.value.message == (
        f"{original.path}: pass 'trip' failed with KeyError: 'w'; every pass runs or declines. "
        f'Leave it out, [optimize] skip = ["trip"], {REPORT}'
    )
    assert isinstance(caught.value.__cause__, KeyError)


def test_two_passes_that_undo_each_other_are_stopped(tmp_path: Path, out: Path, only: Callable[..., None]) -> None:
    def turn(old: str, new: str) -> Callable[[ir.Model, int], int]:
        def run(model: ir.Model, limit_bytes: int) -> int:
            found = [node for node in model.graph if node.op_type == old]
            for node in found:
                node.op_type = new
            return len(found)

        return run

    only(
        Pass(name="there", does="turns", counts="node", run=turn("Exp", "Neg")),
        Pass(name="back", does="turns", counts="node", run=turn("Neg", "Exp")),
    )
    original = network(tmp_path / "in")
    with pytest.raises(GraphError) as caught:
        optimize(EVERYTHING, original, open_model=open_model, out_dir=out)
    assert caught.value.message == (
        f"{original.path}: pass 'back' still changes the graph after {driver.MAX_ROUNDS} rounds; passes come to an end. "
        f'Leave it out, [optimize] skip = ["back"], {REPORT}'
    )


def test_without_a_probe_numbers_are_not_compared_and_the_notes_say_so(tmp_path: Path, out: Path) -> None:
    original = network(tmp_path / "in")
    original = onnx_files.describe(original.path, precision=Precision.FP32, axes=AXES)

    def never(path: Path, *, threads: int = 0, optimize: bool = True, weights: Path | None = None) -> Any:
        pytest.fail("a model was run")

    result = optimize(EVERYTHING, original, open_model=never, out_dir=out)
    assert result.probe is None
    assert result.notes[-1] == "numbers not compared with the original: the model carries no probe"


def test_a_model_that_draws_random_numbers_cannot_be_compared_and_the_notes_say_so(tmp_path: Path, out: Path) -> None:
    body = "r = RandomNormalLike(x) t = Identity(r) y = Add(t, x)"
    original = save(tmp_path / "in", body, interface="(float[N, 4] x) => (float[N, 4] y)", weights={})
    result = optimize(EVERYTHING, original, open_model=open_model, out_dir=out)
    assert result.notes[-1] == "numbers not compared with the original: node 'RandomNormalLike' draws random numbers"
    assert "remove_identities: 1 node" in result.notes


def test_an_original_that_does_not_run_is_not_blamed_on_a_pass(tmp_path: Path, out: Path) -> None:
    original = network(tmp_path / "in")
    assert original.probe is not None
    np.savez(original.probe, x=np.zeros((2, 2), np.float32))
    with pytest.raises(BuildError):
        optimize(EVERYTHING, original, open_model=open_model, out_dir=out)


def test_a_file_that_is_no_model_is_refused_before_any_pass(tmp_path: Path, out: Path) -> None:
    original = network(tmp_path / "in")
    original.path.write_bytes(b"junk")
    with pytest.raises(ExportError, match=r"; a valid ONNX model was expected\. Export it again\.$"):
        optimize(EVERYTHING, original, open_model=open_model, out_dir=out)


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        (np.array([1, 2], np.float32), np.array([1, 2.0001], np.float32), None),
        (
            np.array([1, 2], np.float32),
            np.array([1, 2.1], np.float32),
            "moved output 'y' by 0.05 of its largest magnitude 2 (1e-04 allowed)",
        ),
        (np.array([1, 2], np.float16), np.array([1, 2.01], np.float16), None),
        (
            np.array([1, 2], np.float64),
            np.array([1, 2 + 1e-7], np.float64),
            "moved output 'y' by 5e-08 of its largest magnitude 2 (1e-09 allowed)",
        ),
        (np.array([np.nan, np.inf], np.float32), np.array([np.nan, np.inf], np.float32), None),
        (np.array([np.nan, 1], np.float32), np.array([0, 1], np.float32), "moved NaN or infinity in output 'y'"),
        (np.array([1, 1], np.float32), np.array([np.nan, 1], np.float32), "moved NaN or infinity in output 'y'"),
        (np.array([np.inf, 1], np.float32), np.array([-np.inf, 1], np.float32), "moved NaN or infinity in output 'y'"),
        (np.array([0, 0], np.float32), np.array([0, 1e-12], np.float32), None),
        (
            np.array([0, 0], np.float32),
            np.array([0, 1e-3], np.float32),
            "moved output 'y' by 1e+03 of its largest magnitude 0 (1e-04 allowed)",
        ),
        (np.array([1, 2], np.int64), np.array([1, 3], np.int64), "changed 1 of 2 elements of output 'y'"),
        (np.array([1, 2], np.int64), np.array([1, 2], np.int32), "made output 'y' int32[2] instead of int64[2]"),
        (np.zeros((0, 3), np.float32), np.zeros((0, 3), np.float32), None),
        (
            np.zeros((2, 3), np.float32),
            np.zeros((3, 2), np.float32),
            "made output 'y' float32[3, 2] instead of float32[2, 3]",
        ),
    ],
)
def test_what_counts_as_a_difference(old: NDArray[Any], new: NDArray[Any], found: str | None) -> None:
    assert difference({"y": old}, {"y": new}) == found


def test_an_output_that_is_missing_is_a_difference() -> None:
    assert difference({"y": np.array([1], np.float32)}, {"z": np.array([1], np.float32)}) == "lost output 'y'"


# --- old files ------------------------------------------------------------------------------------------------------

LIGHT = sorted((Path(onnx.__file__).parent / "backend/test/data/light").glob("light_*.onnx"))


@pytest.mark.parametrize("path", LIGHT, ids=lambda path: path.stem)
def test_models_of_ir_version_3_keep_their_inputs(path: Path) -> None:
    """Their weights are inputs that a caller may replace: none may become required, constant or renamed."""
    model = onnx_files.read(path)
    interface, inputs = interface_of(model), [value.name for value in model.graph.inputs]
    assert model.ir_version == 3
    run_passes(PASSES, model, limit_bytes_for(model))
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto)
    assert interface_of(model) == interface and [value.name for value in proto.graph.input] == inputs
    assert edit.weights_bytes(model) <= limit_bytes_for(model)


def test_all_nine_old_models_are_there() -> None:
    assert len(LIGHT) == 9

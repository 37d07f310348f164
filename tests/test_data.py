"""Samples are checked one by one, stored flat, and read back as they were; what is wrong with one is named with its place."""

from __future__ import annotations

import hashlib
import json
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from compiler import data, source
from compiler.data import Samples, SampleWriter
from compiler.errors import ArtifactError, CalibrationError
from compiler.recipe import DataSection, EngineSection, InputSection, ModelSection, QuantizeSection, Recipe
from compiler.spec import DataSets, DimRange, Precision

ROWS = np.arange(60, dtype=np.float32).reshape(20, 3)


def _recipe(**changes: Any) -> Recipe:
    """One input ``x`` [batch, 3], calibrated with at least 2 samples."""
    inputs = changes.pop("inputs", {"x": InputSection(shape=("batch", 3))})
    values: dict[str, Any] = {
        "name": "r",
        "model": ModelSection(source="m.py", inputs=inputs),
        "axes": {"batch": DimRange(min=1, opt=2, max=4)},
        "quantize": QuantizeSection(min_samples=2),
    }
    return Recipe(**(values | changes))


def _texts(**changes: Any) -> Recipe:
    """Two inputs, ``ids`` [batch, seq] and ``mask`` [batch, seq]."""
    shape = ("batch", "seq")
    inputs = {"ids": InputSection(dtype="int64", shape=shape), "mask": InputSection(dtype="int64", shape=shape)}
    axes = {"batch": DimRange(min=1, opt=2, max=4), "seq": DimRange(min=2, opt=4, max=8)}
    return _recipe(inputs=inputs, axes=axes, **changes)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., DataSets]:
    """Collect what two functions yield, as a model file's would."""
    monkeypatch.chdir(tmp_path)
    calls = iter(range(1000))

    def collect(
        calibration: Any = None,
        validation: Any = None,
        recipe: Recipe | None = None,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> DataSets:
        path = tmp_path / "m.py"
        path.write_text(f"# {next(calls)}")
        module = source.load_module(path)
        if calibration is not None:
            module.calibration = calibration  # type: ignore[attr-defined]
        if validation is not None:
            module.validation = validation  # type: ignore[attr-defined]
        recipe = recipe or _recipe()
        out_dir = tmp_path / f"out{next(calls)}"
        out_dir.mkdir()
        return data.collect(recipe, source.locate(recipe, tmp_path), out_dir=out_dir, progress=progress)

    return collect


Run = Callable[..., DataSets]


def _good(start: int = 0, stop: int = 10) -> Callable[[], list[dict[str, Any]]]:
    return lambda: [{"x": ROWS[index : index + 1]} for index in range(start, stop)]


def _yields(*items: Any) -> Callable[[], Iterable[Any]]:
    return lambda: iter(items)


def _refused(run: Run, *args: Any, **kwargs: Any) -> str:
    with pytest.raises(CalibrationError) as caught:
        run(*args, **kwargs)
    return caught.value.message


# --- storage --------------------------------------------------------------------------------------------------------


def _store(folder: Path, samples: Iterable[tuple[dict[str, Any], Any]], **options: Any) -> Samples:
    with SampleWriter(folder, **options) as writer:
        for feeds, label in samples:
            writer.append(feeds, label)
    return Samples(folder)


_DTYPES = st.sampled_from(["float32", "float64", "float16", "int64", "int32", "int16", "int8", "uint8", "bool"])


@settings(max_examples=60, deadline=None)
@given(st.data(), st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=3, unique=True), st.integers(1, 4))
def test_what_is_read_is_what_was_written(
    tmp_path_factory: pytest.TempPathFactory, draw: st.DataObject, names: list[str], count: int
) -> None:
    """Any names, dtypes and ragged shapes (empty ones too) come back bit for bit."""
    forms = {name: (draw.draw(_DTYPES), draw.draw(st.integers(0, 3))) for name in names}
    written = [
        {
            name: draw.draw(hnp.arrays(dtype, draw.draw(hnp.array_shapes(min_dims=rank, max_dims=rank, min_side=0, max_side=3)) if rank else ()))
            for name, (dtype, rank) in forms.items()
        }
        for _ in range(count)
    ]  # fmt: skip
    stored = _store(tmp_path_factory.mktemp("set") / "s", [(feeds, None) for feeds in written])
    assert len(stored) == count
    for index, feeds in enumerate(written):
        found = stored.feeds(index)
        assert list(found) == list(feeds)
        for name, value in feeds.items():
            assert found[name].dtype == value.dtype
            assert found[name].shape == value.shape == stored.shapes(index)[name]
            assert found[name].tobytes() == value.tobytes()


def test_bfloat16_and_other_byte_orders_are_stored_by_value(tmp_path: Path) -> None:
    stored = _store(
        tmp_path / "s",
        [({"a": np.asarray([1.5, -2], ml_dtypes.bfloat16), "b": np.asarray([[1, 2]], ">i4").T}, None)],
    )
    found = stored.feeds(0)
    assert found["a"].dtype == ml_dtypes.bfloat16
    assert found["a"].astype(float).tolist() == [1.5, -2]
    assert found["b"].dtype == np.dtype("int32")
    assert found["b"].tolist() == [[1], [2]]


def test_names_that_are_no_file_names_stay_inside_the_folder(tmp_path: Path) -> None:
    names = ["../../escape", "a/b", "a b", "<script>", "x" * 300, ".."]
    stored = _store(tmp_path / "in" / "s", [({name: np.zeros(1) for name in names}, None)])
    assert stored.names == tuple(names)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    assert {path.parent for path in tmp_path.rglob("*.bin")} == {tmp_path / "in" / "s"}


def test_samples_stack_along_the_batch_axis(tmp_path: Path) -> None:
    samples = [({"x": ROWS[i : i + 1], "cache": np.full((2, 1, 3), i)}, None) for i in range(4)]
    stored = _store(tmp_path / "s", samples, batch_axes={"x": 0, "cache": 1})
    found = stored.batch([3, 0])
    assert found["x"].tolist() == ROWS[[3, 0]].tolist()
    assert found["cache"].shape == (2, 2, 3)
    assert found["cache"][:, 1].max() == 0
    assert stored.batch(slice(1, 3))["x"].tolist() == ROWS[1:3].tolist()
    assert [feeds["x"][0, 0] for feeds in stored[1:3]] == [3, 6]
    assert len(list(stored)) == 4
    assert stored[-1]["x"][0, 0] == 9


def test_ragged_samples_do_not_stack(tmp_path: Path) -> None:
    stored = _store(tmp_path / "s", [({"x": np.zeros((1, n))}, None) for n in (2, 3)])
    with pytest.raises(CalibrationError) as caught:
        stored.batch([0, 1])
    assert caught.value.message == (
        "'x': samples 0 and 1 have shapes [1, 2] and [1, 3]; equal ones were expected in one batch. Pad them, or use "
        "batch size 1."
    )


def test_a_tensor_without_batch_axis_is_shared_by_a_batch_or_refused(tmp_path: Path) -> None:
    stored = _store(tmp_path / "s", [({"t": np.float32(n)}, None) for n in (1, 1, 2)], batch_axes={"t": None})
    assert stored.batch([0, 1])["t"] == 1
    with pytest.raises(CalibrationError) as caught:
        stored.batch([0, 2])
    assert caught.value.message == (
        "'t': no batch axis, and samples 0 and 2 differ in it; equal values were expected in one batch. Use batch size 1."
    )


@pytest.mark.parametrize(
    ("labels", "together"),
    [
        ([1, 2, 3], [1, 2, 3]),
        ([True, False, True], [True, False, True]),
        (["a", "a longer one", "ü"], ["a", "a longer one", "ü"]),
        ([np.asarray([1.0, 2.0])] * 3, [[1.0, 2.0]] * 3),
    ],
)
def test_labels_of_any_kind_come_back(tmp_path: Path, labels: list[Any], together: list[Any]) -> None:
    stored = _store(tmp_path / "s", [({"x": np.zeros(1)}, label) for label in labels])
    found = stored.labels()
    assert isinstance(found, np.ndarray)
    assert found.tolist() == together
    assert stored.label(1).tolist() == together[1]
    assert stored.labelled


def test_ragged_labels_come_back_as_a_list(tmp_path: Path) -> None:
    stored = _store(tmp_path / "s", [({"x": np.zeros(1)}, np.arange(n)) for n in (2, 3)])
    found = stored.labels()
    assert isinstance(found, list)
    assert [value.tolist() for value in found] == [[0, 1], [0, 1, 2]]
    unlabelled = _store(tmp_path / "t", [({"x": np.zeros(1)}, None)])
    assert unlabelled.labels() is None
    assert unlabelled.label(0) is None


def test_the_hash_of_a_sample_covers_names_dtypes_shapes_and_bytes_and_nothing_else() -> None:
    base: dict[str, Any] = {"a": np.zeros((1, 4), np.float32), "b": np.ones(2, np.int64)}
    same: dict[str, Any] = {"b": np.ones(2, ">i8"), "a": np.zeros((2, 8), np.float32)[:1, ::2]}
    assert data.content_hash(base) == data.content_hash(same)
    others: list[dict[str, Any]] = [
        base | {"a": np.zeros((1, 4), np.int32)},
        base | {"a": np.zeros((4, 1), np.float32)},
        base | {"a": np.asarray([[0, 0, 0, -0.0]], np.float32)},
        {"c": base["a"], "b": base["b"]},
        {"a": base["a"]},
    ]
    hashes = {data.content_hash(feeds) for feeds in [base, *others]}
    assert len(hashes) == 6


def test_the_hash_of_a_set_covers_order_and_labels(tmp_path: Path) -> None:
    def sha256(name: str, rows: list[int], labels: list[Any]) -> str:
        samples = zip(rows, labels, strict=True)
        return _store(tmp_path / name, [({"x": ROWS[row]}, label) for row, label in samples]).sha256

    first = sha256("a", [0, 1], [1, 2])
    assert sha256("b", [0, 1], [1, 2]) == first
    assert len({first, sha256("c", [1, 0], [1, 2]), sha256("d", [0, 1], [2, 1]), sha256("e", [0, 1], [None] * 2)}) == 4
    digest = hashlib.sha256(data.content_hash({"x": ROWS[0]}) + data.content_hash({"x": ROWS[1]}))
    assert sha256("f", [0, 1], [None, None]) == digest.hexdigest()


def test_an_unfinished_or_damaged_set_is_refused(tmp_path: Path) -> None:
    def message() -> str:
        with pytest.raises(ArtifactError) as caught:
            Samples(tmp_path / "s")
        return caught.value.message.replace(str(tmp_path), "")

    expected = (
        "/s: not a stored sample set, or a damaged one; index.json and the files it names were expected. Run again "
        "without the cache: --no-cache."
    )
    assert message() == expected
    with pytest.raises(KeyError), SampleWriter(tmp_path / "s") as writer:
        writer.append({"x": ROWS})
        raise KeyError
    assert message() == expected
    _store(tmp_path / "s", [({"x": ROWS}, 1)])
    index = json.loads((tmp_path / "s" / "index.json").read_text())
    changes: list[dict[str, Any]] = [{"format": 99}, {"samples": 3}, {"tensors": 1}, {"sha256": None, "label": [1]}]
    for damaged in [{}, [], *(index | change for change in changes)]:
        (tmp_path / "s" / "index.json").write_text(json.dumps(damaged))
        assert message() == expected
    (tmp_path / "s" / "index.json").write_text(json.dumps(index))
    file = next((tmp_path / "s").glob("*x.bin"))
    file.write_bytes(file.read_bytes()[:-1])
    assert message() == expected


def test_memory_is_that_of_one_sample(run: Run) -> None:
    """64 samples of 1 MiB take less than 8 MiB to write and to read."""
    recipe = _recipe(
        inputs={"x": InputSection(shape=("batch", 1 << 18))}, engines=(EngineSection(precision=Precision.FP32),)
    )
    tracemalloc.start()
    try:
        found = run(validation=lambda: ({"x": np.full((1, 1 << 18), i, np.float32)} for i in range(64)), recipe=recipe)
        total = sum(float(feeds["x"][0, 0]) for feeds in Samples(found.validation.path))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert total == sum(range(64))
    assert peak < 8 << 20


# --- collecting -----------------------------------------------------------------------------------------------------


def test_batches_are_split_into_samples_with_their_labels(run: Run) -> None:
    found = run(
        _yields({"x": ROWS[:4]}, {"x": ROWS[4:6]}), _yields(({"x": ROWS[6:9]}, [6, 7, 8]), ({"x": ROWS[9:10]}, 9))
    )
    assert found.calibration is not None
    assert (found.calibration.samples, found.validation.samples, found.validation.labelled) == (6, 4, True)
    stored = Samples(found.validation.path)
    assert found.validation.sha256 == stored.sha256
    assert stored.batch(range(4))["x"].tolist() == ROWS[6:10].tolist()
    labels = stored.labels()
    assert isinstance(labels, np.ndarray)
    assert labels.tolist() == [6, 7, 8, 9]
    assert stored.shapes(2) == {"x": (1, 3)}


def test_labels_of_calibration_samples_are_ignored(run: Run) -> None:
    found = run(_yields(({"x": ROWS[:2]}, {"odd": 1}), {"x": ROWS[2:3]}), _good(10, 20))
    assert found.calibration is not None
    assert not Samples(found.calibration.path).labelled


def test_tensors_are_taken_without_importing_their_framework(run: Run) -> None:
    torch = pytest.importorskip("torch")
    found = run(_good(), _yields(({"x": torch.from_numpy(ROWS[10:12].copy()).requires_grad_()}, torch.tensor([1, 0]))))
    stored = Samples(found.validation.path)
    assert stored.feeds(1)["x"].tolist() == ROWS[11:12].tolist()
    assert stored.label(0) == 1


def test_the_batch_axis_need_not_be_the_first_of_every_input(run: Run) -> None:
    inputs = {"x": InputSection(shape=("batch", 3)), "state": InputSection(shape=(2, "batch"))}
    state = np.arange(8, dtype=np.float32).reshape(2, 4)
    found = run(
        _yields({"x": ROWS[:4], "state": state}),
        _yields({"x": ROWS[4:5], "state": state[:, :1]}),
        _recipe(inputs=inputs),
    )
    assert found.calibration is not None
    stored = Samples(found.calibration.path)
    assert stored.feeds(3)["state"].tolist() == [[3], [7]]
    assert stored.batch([0, 1, 2, 3])["state"].tolist() == state.tolist()


def test_without_a_batch_axis_an_item_is_a_sample(run: Run) -> None:
    recipe = _recipe(inputs={"x": InputSection(shape=(2, 3))}, axes={})
    found = run(_yields({"x": ROWS[:2]}, {"x": ROWS[2:4]}), _yields(({"x": ROWS[4:6]}, [1, 2])), recipe)
    assert found.calibration is not None
    assert (found.calibration.samples, found.validation.samples) == (2, 1)
    assert Samples(found.validation.path).label(0).tolist() == [1, 2]


def test_calibration_runs_only_where_an_engine_needs_it(run: Run) -> None:
    def never() -> Any:
        raise AssertionError("calibration() was called")

    found = run(never, _good(), _recipe(engines=(EngineSection(precision=Precision.FP32),)))
    assert found.calibration is None
    assert _refused(run, None, _good()) == (
        "m.py: no 'calibration'; a function calibration() that yields dicts of arrays, or (dict, labels), was expected. "
        "Define it."
    )


def test_no_more_is_taken_than_the_recipe_asks_for(run: Run) -> None:
    def endless() -> Iterator[dict[str, Any]]:
        index = 0
        while True:
            index += 1
            yield {"x": np.full((1, 3), index, np.float32)}

    seen: list[tuple[int, int]] = []
    recipe = _recipe(quantize=QuantizeSection(min_samples=2, samples=5), data=DataSection(validation_samples=3))
    found = run(endless, lambda: [{"x": -ROWS - 1}], recipe, lambda done, total: seen.append((done, total)))
    assert found.calibration is not None
    assert (found.calibration.samples, found.validation.samples) == (5, 3)
    assert seen == [(done, 5) for done in range(1, 6)] + [(done, 8) for done in range(6, 9)]


def test_an_endless_validation_set_is_refused(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "MAX_VALIDATION", 10)
    assert run(_good(), _good(10, 20)).validation.samples == 10, "the limit itself is taken"
    assert _refused(run, _good(0, 5), _good(5, 20)) == (
        "validation set: more than 10 samples; a finite set was expected. End validation(), or set [data] "
        "validation_samples."
    )


def test_fewer_validation_samples_than_asked_for_are_noted(run: Run) -> None:
    found = run(_good(), _good(10, 14), _recipe(data=DataSection(validation_samples=9)))
    assert found.notes == ("validation set: 4 samples, where the recipe asks for 9",)


def test_repeats_and_constant_inputs_are_noted(run: Run) -> None:
    recipe = _texts()
    ones = np.ones((1, 4), np.int64)
    rows = [{"ids": np.full((1, 4), n), "mask": ones} for n in (1, 2, 2, 1)]
    found = run(lambda: rows, _yields({"ids": ones * 7, "mask": ones}, {"ids": ones * 8, "mask": ones * 2}), recipe)
    assert found.notes == (
        "calibration set: 2 of 4 samples repeat an earlier one",
        "calibration set: input 'mask' is 1 everywhere",
    )


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["calibration", "validation"])
def test_an_empty_set_is_refused(run: Run, name: str) -> None:
    sets = {"calibration": _good(), "validation": _good(10, 20)} | {name: _yields()}
    assert _refused(run, **sets) == (
        f"{name} set: {name}() yields no samples; at least one was expected. Check the path or filter it reads with."
    )


def test_too_few_calibration_samples_are_refused(run: Run) -> None:
    assert _refused(run, _good(0, 15), _good(15, 20), _recipe(quantize=QuantizeSection())) == (
        "calibration set: 15 samples; at least 16 were expected. Yield more from calibration(), or lower [quantize] "
        "min_samples."
    )


@pytest.mark.parametrize("name", ["calibration", "validation"])
def test_a_set_of_zeros_or_of_one_repeated_sample_is_refused(run: Run, name: str) -> None:
    sets = {"calibration": _good(), "validation": _good(10, 20)}
    zeros = lambda: [{"x": np.zeros((4, 3), np.float32)}]  # noqa: E731
    assert _refused(run, **(sets | {name: zeros})) == (
        f"{name} set: every value of all 4 samples is 0; real data were expected. Check what {name}() reads."
    )
    same = lambda: [{"x": ROWS[:1]}] * 5  # noqa: E731
    assert _refused(run, **(sets | {name: same})) == (
        f"{name} set: all 5 samples are identical; different ones were expected. Check that {name}() yields a new array "
        "for each sample."
    )


def test_a_sample_in_both_sets_is_found_by_content(run: Run) -> None:
    assert _refused(run, _good(0, 10), lambda: [{"x": ROWS[[15, 3, 16, 3]]}]) == (
        "calibration and validation sets: 2 of 4 validation samples are also calibration samples (validation 1 = "
        "calibration 3, validation 3 = calibration 3); disjoint sets were expected. Split the data before both functions."
    )
    assert (
        "(validation 0 = calibration 5, validation 1 = calibration 6, validation 2 = calibration 7, ...)"
        in _refused(run, _good(0, 10), _good(5, 15))
    )


def test_a_sample_differs_from_another_by_any_bit(run: Run) -> None:
    """Sets that are equal but for one last bit, or for one input of two, do not overlap."""
    near = np.nextafter(ROWS[:10], np.float32(1e9))
    assert run(_good(0, 10), lambda: [{"x": near}]).validation.samples == 10


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (3, "found a int; a dict of arrays, or (dict, labels), was expected. Yield {'x': ...}."),
        (ROWS, "found an array of shape [20, 3]; a dict of arrays, or (dict, labels), was expected. Yield {'x': ...}."),
        ((ROWS, 1), "found a tuple; a dict of arrays, or (dict, labels), was expected. Yield {'x': ...}."),
        ({"X": ROWS}, "unknown input 'X'; expected one of x. Yield exactly the recipe's inputs."),
        ({"x": ROWS, "y": 1}, "unknown input 'y'; expected one of x. Yield exactly the recipe's inputs."),
        ({}, "no input 'x'; found an empty dict. Yield exactly the recipe's inputs."),
    ],
)
def test_an_item_that_is_no_sample_is_refused(run: Run, item: Any, message: str) -> None:
    assert _refused(run, _yields({"x": ROWS[:2]}, item), _good()) == f"calibration sample 2: {message}"
    assert _refused(run, _good(0, 3), _yields(item)) == f"validation sample 0: {message}"


def test_a_missing_input_of_two_is_named(run: Run) -> None:
    assert _refused(run, _yields({"ids": np.ones((1, 4), np.int64)}), _good(), _texts()) == (
        "calibration sample 0: no input 'mask'; found ids. Yield exactly the recipe's inputs."
    )


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (ROWS.astype(np.float64), "found float64; float32 was expected. Convert it in the data file (array.astype('float32')), or change the recipe."),
        (ROWS.astype(np.int64), "found int64; float32 was expected. Convert it in the data file (array.astype('float32')), or change the recipe."),
        ([[1, 2, 3]], "found int64; float32 was expected. Convert it in the data file (array.astype('float32')), or change the recipe."),
        (ROWS[0], "found shape [3]; [batch, 3] was expected. Correct the data file or the recipe."),
        (ROWS[:2, :2], "found shape [2, 2]; [batch, 3] was expected. Correct the data file or the recipe."),
        (ROWS[:0], "found shape [0, 3]; [batch, 3], with axis 'batch' of at least 1, was expected. Correct the data file or the recipe."),
        ([[1.0], [1.0, 2.0]], "found a list of unequal parts; an array was expected. Pad them to one shape."),
        (np.asarray([None]), "found an array of shape [1] of dtype object; an array of numbers was expected. Convert it."),
        (np.zeros(2, np.complex64), "found an array of shape [2] of dtype complex64; an array of numbers was expected. Convert it."),
    ],
)  # fmt: skip
def test_an_array_that_does_not_fit_is_refused(run: Run, value: Any, message: str) -> None:
    expected = f"calibration sample 1, input 'x': {message}"
    assert _refused(run, _yields({"x": ROWS[:1]}, {"x": value}), _good()) == expected


def test_a_tensor_that_cannot_be_read_is_refused(run: Run) -> None:
    class Meta:
        def detach(self) -> Meta:
            return self

        cpu = detach

        def numpy(self) -> None:
            raise RuntimeError("on no device")

    assert _refused(run, _yields({"x": Meta()}), _good()).endswith(
        "calibration sample 0, input 'x': reading it raised RuntimeError: on no device. Fix the file; the full traceback "
        "is in the log."
    )


def test_sizes_outside_an_axis_and_sizes_that_disagree_are_refused(run: Run) -> None:
    def ids(*sizes: int) -> dict[str, Any]:
        return {name: np.ones((1, size), np.int64) for name, size in zip(("ids", "mask"), sizes, strict=True)}

    assert _refused(run, _yields(ids(9, 9)), _good(), _texts()) == (
        "calibration sample 0, input 'ids': found shape [1, 9]; [batch, seq], with axis 'seq' from 2 to 8, was expected. "
        "Correct the data file or the recipe."
    )
    assert _refused(run, _yields(ids(4, 5)), _good(), _texts()) == (
        "calibration sample 0, input 'mask': axis 'seq' is 5, and 4 in input 'ids'; one size was expected. Yield arrays "
        "that belong together."
    )


@pytest.mark.parametrize(("value", "shown"), [(np.nan, "nan"), (np.inf, "inf"), (-np.inf, "-inf")])
def test_a_value_that_is_not_finite_is_named_with_its_place(run: Run, value: float, shown: str) -> None:
    """The sample is the one inside the batch."""
    bad = ROWS[:4].copy()
    bad[2, 1:] = value
    assert _refused(run, _yields({"x": ROWS[10:12]}, {"x": bad}), _good()) == (
        f"calibration sample 4, input 'x': 2 of 3 values are not finite, the first, {shown}, at [0, 1]; finite numbers "
        "were expected. Repair or leave out this sample."
    )


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({"a": 1}, "found a dict; a number, a string or an array was expected. Convert it."),
        ([1, 2, 3], "found shape [3] for 2 samples; a first axis of 2 was expected. Yield one label for each sample."),
        (7, "found shape [] for 2 samples; a first axis of 2 was expected. Yield one label for each sample."),
        ([[1], [1, 2]], "found a list of unequal parts; an array was expected. Pad them to one shape."),
        ([object(), object()], "found a list of dtype object; an array of numbers was expected. Convert it."),
    ],
)
def test_labels_that_do_not_fit_are_refused(run: Run, labels: Any, message: str) -> None:
    assert _refused(run, _good(), _yields(({"x": ROWS[10:12]}, labels))) == f"validation sample 0, label: {message}"


def test_labels_are_for_all_samples_or_for_none(run: Run) -> None:
    some = {"x": ROWS[10:12]}, [1, 2]
    none = {"x": ROWS[12:13]}
    assert _refused(run, _good(), _yields(some, none)) == (
        "validation sample 2: no label, and sample 0 has one; labels for all samples or for none were expected. Yield "
        "(dict, labels) throughout."
    )
    assert _refused(run, _good(), _yields(none, some)) == (
        "validation sample 1: a label, and sample 0 has none; labels for all samples or for none were expected. Yield "
        "(dict, labels) throughout."
    )
    assert _refused(run, _good(), _yields(some, ({"x": ROWS[12:13]}, "cat"))) == (
        "validation sample 2, label: found str of rank 0; int64 of rank 0, as in sample 0, was expected. Convert the "
        "labels to one form."
    )


def test_functions_that_return_no_samples_are_refused(run: Run) -> None:
    for result, kind in ((None, "NoneType"), ({"x": ROWS}, "dict"), (3, "int")):
        assert _refused(run, lambda result=result: result, _good()) == (
            f"m.py: calibration() returned {kind}; an iterable of samples was expected. Yield each sample, or return a "
            "list."
        )


def test_a_function_that_raises_points_at_its_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m.py").write_text(
        "def calibration():\n    yield {'x': 1 / 0}\ndef validation():\n    return open('no')"
    )
    (tmp_path / "out").mkdir()
    sources = source.locate(_recipe(), tmp_path)
    with pytest.raises(CalibrationError) as caught:
        data.collect(_recipe(), sources, out_dir=tmp_path / "out")
    assert caught.value.message == (
        "m.py:2: calibration() raised ZeroDivisionError: division by zero. Fix the file; the full traceback is in the log."
    )
    fp32 = _recipe(engines=(EngineSection(precision=Precision.FP32),))
    with pytest.raises(CalibrationError) as caught:
        data.collect(fp32, sources, out_dir=tmp_path / "out")
    assert caught.value.message == (
        "m.py:4: validation() raised FileNotFoundError: [Errno 2] No such file or directory: 'no'. Fix the file; the full "
        "traceback is in the log."
    )


def test_first_samples_come_from_calibration_or_else_validation(tmp_path: Path) -> None:
    path = tmp_path / "m.py"
    path.write_text("import numpy as np\ndef validation():\n    yield {'x': np.ones((5, 3), np.float32)}")
    sources = source.locate(_recipe(), tmp_path)
    assert len(data.first_samples(_recipe(), sources, 2)) == 2
    path.write_text(path.read_text() + "\ndef calibration():\n    return []")
    with pytest.raises(CalibrationError) as caught:
        data.first_samples(_recipe(), sources, 2)
    assert caught.value.message == (
        "calibration set: calibration() yields no samples; at least one was expected. Check the path or filter it reads "
        "with."
    )

"""The user's calibration and validation samples: checked one by one, stored flat, read back one by one.

Why a format of our own and not .npz: `np.load` of an archive holds whole arrays in memory, and with object arrays it
unpickles. Here every tensor name has one file of raw bytes, so that both writing and reading take one sample's memory.
Why positioned reads and not a memory map: mapped pages count as the process's memory, so a map of the whole set looks
(to a limit, and to whoever reads the peak) as if it had been loaded.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np

from compiler.errors import ArtifactError, CalibrationError, suggest
from compiler.recipe import Recipe, dims
from compiler.source import Sources, call_user, function_in, iterate_user, load_module, shown
from compiler.spec import (
    Array,
    CalibrationSet,
    DataSets,
    Feeds,
    Precision,
    Progress,
    TensorSpec,
    ValidationSet,
    batch_axis,
    dtype_of,
    no_progress,
)

MAX_VALIDATION = 1_000_000
"""A ``validation()`` that yields more than this, without ``data.validation_samples``, is taken to be endless."""

PROBE_SAMPLES = 16
"""Samples that export traces and compares with; repeated to fill a larger batch."""

_INDEX = "index.json"
_FORMAT = 1
_STRING = "str"


# --- storage --------------------------------------------------------------------------------------------------------


class SampleWriter:
    """Writes samples to a new folder, holding one at a time; `close` makes it readable by `Samples`.

    Args:
        path: the folder; made, or empty.
        batch_axes: for each tensor the axis along which samples are stacked, None where there is none; default: 0.
    """

    def __init__(self, path: Path, *, batch_axes: Mapping[str, int | None] | None = None) -> None:
        self._path = path
        self._batch_axes = batch_axes or {}
        self._tensors: dict[str, _Column] = {}
        self._labels: _Column | None = None
        self._digests: list[bytes] = []
        self._stack = ExitStack()
        path.mkdir(parents=True, exist_ok=True)

    def append(self, feeds: Feeds, label: Any = None) -> bytes:
        """Store one sample, and its label if the set has labels; returns the SHA-256 of the feeds.

        Every sample has the same names, and for each name the same dtype and rank; shapes may differ.
        """
        if not self._digests:
            for index, (name, value) in enumerate(feeds.items()):
                self._tensors[name] = self._column(f"{index}-{_slug(name)}.bin", np.asarray(value))
            if label is not None:
                self._labels = self._column("label.bin", np.asarray(label))
        assert feeds.keys() == self._tensors.keys(), f"tensors {sorted(feeds)} after {sorted(self._tensors)}"
        assert (label is None) == (self._labels is None), "a set has labels for all of its samples or for none"
        for name, column in self._tensors.items():
            column.append(np.asarray(feeds[name]))
        if self._labels is not None:
            self._labels.append(np.asarray(label))
        digest = content_hash(feeds)
        self._digests.append(digest)
        return digest

    def close(self) -> str:
        """Finish the set; returns its SHA-256, which covers the samples in their order, and the labels."""
        self._stack.close()
        overall = hashlib.sha256(b"".join(self._digests))
        if self._labels is not None:
            overall.update(self._labels.digest.digest())
        index = {
            "format": _FORMAT,
            "samples": len(self._digests),
            "sha256": overall.hexdigest(),
            "tensors": {
                name: column.describe() | {"batch_axis": self._batch_axes.get(name, 0)}
                for name, column in self._tensors.items()
            },
            "label": self._labels.describe() if self._labels is not None else None,
        }
        (self._path / _INDEX).write_text(json.dumps(index))
        return overall.hexdigest()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:
            self._stack.close()

    def _column(self, file: str, first: Array) -> _Column:
        return _Column(file, first, self._stack.enter_context((self._path / file).open("wb")))


class _Column:
    """One tensor over all samples: a file of raw bytes, and the shape of each sample."""

    def __init__(self, name: str, first: Array, file: BinaryIO) -> None:
        self._name = name
        self._file = file
        self._dtype = _STRING if first.dtype.kind == "U" else first.dtype.name
        self._rank = first.ndim
        self._shapes = array("q")
        self._lengths = array("q")
        self._count = 0
        self.digest = hashlib.sha256(self._dtype.encode())

    def append(self, value: Array) -> None:
        dtype = _STRING if value.dtype.kind == "U" else value.dtype.name
        assert (dtype, value.ndim) == (self._dtype, self._rank), f"{self._name}: {dtype} {value.ndim} after the first"
        raw = json.dumps(value.tolist()).encode() if dtype == _STRING else _native(value).tobytes()
        self._file.write(raw)
        self._shapes.extend(value.shape)
        if dtype == _STRING:
            self._lengths.append(len(raw))
        self._count += 1
        self.digest.update(f"{value.shape}".encode() + raw)

    def describe(self) -> dict[str, Any]:
        shapes = np.asarray(self._shapes, np.int64).reshape(self._count, self._rank)
        uniform = bool((shapes == shapes[0]).all())
        return {
            "file": self._name,
            "dtype": self._dtype,
            **({"shape": shapes[0].tolist()} if uniform else {"shapes": shapes.tolist()}),
            **({"lengths": list(self._lengths)} if self._dtype == _STRING else {}),
        }


class Samples(Sequence[Feeds]):
    """A stored set, read one sample at a time.

    Attributes:
        sha256: of the samples in their order, and of the labels.
        names: of the tensors, in the order of the first sample.
        labelled: whether every sample has a label.
    """

    def __init__(self, path: Path) -> None:
        """
        Raises:
            ArtifactError: there is no set, or its files are not what its index says.
        """
        self.path = path
        try:
            index = json.loads((path / _INDEX).read_text())
            if index["format"] != _FORMAT:
                raise ValueError(f"format {index['format']}")
            self._count: int = index["samples"]
            self.sha256: str = index["sha256"]
            self._tensors = {name: _Stored(path, entry, self._count) for name, entry in index["tensors"].items()}
            self._batch_axes: dict[str, int | None] = {
                name: entry["batch_axis"] for name, entry in index["tensors"].items()
            }
            self._label = _Stored(path, index["label"], self._count) if index["label"] else None
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as exc:
            raise ArtifactError(
                f"{path}: not a stored sample set, or a damaged one; {_INDEX} and the files it names were expected. "
                "Run again without the cache: --no-cache."
            ) from exc
        self.names = tuple(self._tensors)
        self.labelled = self._label is not None

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self.feeds(position) for position in range(*index.indices(self._count))]
        return self.feeds(index)

    def feeds(self, index: int) -> dict[str, Array]:
        """One sample, with its batch axis of size 1; fresh arrays."""
        position = range(self._count)[index]
        return {name: stored.read(position) for name, stored in self._tensors.items()}

    def shapes(self, index: int) -> dict[str, tuple[int, ...]]:
        """Shapes of one sample, without reading it."""
        position = range(self._count)[index]
        return {name: stored.shape(position) for name, stored in self._tensors.items()}

    def batch(self, indices: Sequence[int] | slice) -> dict[str, Array]:
        """Samples stacked along the batch axis; a tensor without one is taken from the first sample.

        Raises:
            CalibrationError: shapes differ beside the batch axis, or a tensor without batch axis differs in value.
        """
        if isinstance(indices, slice):
            indices = range(*indices.indices(self._count))
        samples = [self.feeds(index) for index in indices]
        stacked = {}
        for name, axis in self._batch_axes.items():
            values = [sample[name] for sample in samples]
            first = values[0]
            for index, value in zip(indices, values, strict=True):
                if axis is None and not np.array_equal(first, value):
                    raise CalibrationError(
                        f"'{name}': no batch axis, and samples {indices[0]} and {index} differ in it; equal values were "
                        "expected in one batch. Use batch size 1."
                    )
                if value.shape[: axis or 0] + value.shape[(axis or 0) + 1 :] != (
                    first.shape[: axis or 0] + first.shape[(axis or 0) + 1 :]
                ):
                    raise CalibrationError(
                        f"'{name}': samples {indices[0]} and {index} have shapes {dims(first.shape)} and "
                        f"{dims(value.shape)}; equal ones were expected in one batch. Pad them, or use batch size 1."
                    )
            stacked[name] = first if axis is None else np.concatenate(values, axis=axis)
        return stacked

    def label(self, index: int) -> Any:
        """The label of one sample: an array, of rank 0 for a scalar; None where the set has no labels."""
        return None if self._label is None else self._label.read(range(self._count)[index])

    def labels(self) -> Array | list[Array] | None:
        """All labels: an array [N, ...], or a list of N arrays where shapes differ; None where there are none."""
        if self._label is None:
            return None
        values = [self._label.read(index) for index in range(self._count)]
        return np.stack(values) if len({value.shape for value in values}) == 1 else values


class _Stored:
    """One column, for reading."""

    def __init__(self, folder: Path, entry: Mapping[str, Any], count: int) -> None:
        self._path = folder / Path(entry["file"]).name
        self._text = entry["dtype"] == _STRING
        self._dtype = np.dtype("U") if self._text else dtype_of(TensorSpec(name="", dtype=entry["dtype"], shape=()))
        self._uniform = tuple(entry["shape"]) if "shape" in entry else None
        self._shapes: list[list[int]] = entry.get("shapes", [])
        if self._text:
            sizes = np.asarray(entry["lengths"], np.int64)
        elif self._uniform is not None:
            sizes = np.full(count, self._dtype.itemsize * _elements(self._uniform), np.int64)
        else:
            sizes = np.asarray([self._dtype.itemsize * _elements(shape) for shape in self._shapes], np.int64)
        self._offsets = np.concatenate([[0], np.cumsum(sizes)])
        if len(sizes) != count or self._path.stat().st_size != self._offsets[-1]:
            raise ValueError(f"{self._path.name} is not what the index says")

    def shape(self, index: int) -> tuple[int, ...]:
        return self._uniform if self._uniform is not None else tuple(self._shapes[index])

    def read(self, index: int) -> Array:
        start, end = int(self._offsets[index]), int(self._offsets[index + 1])
        if self._text:
            with self._path.open("rb") as file:
                file.seek(start)
                return np.asarray(json.loads(file.read(end - start)), dtype=str)
        values = np.fromfile(self._path, np.uint8, count=end - start, offset=start)
        return values.view(self._dtype).reshape(self.shape(index))


def content_hash(feeds: Feeds) -> bytes:
    """SHA-256 over names, dtypes, shapes and bytes; the order of the names does not matter."""
    digest = hashlib.sha256()
    for name in sorted(feeds):
        value = _native(np.asarray(feeds[name]))
        digest.update(f"{len(name)}:{name}{value.dtype.name}{value.shape}".encode())
        digest.update(value.tobytes())
    return digest.digest()


def _native(value: Array) -> Array:
    """The same values in C order and in this machine's byte order."""
    return np.asarray(value, dtype=value.dtype.newbyteorder("="), order="C")


def _elements(shape: Sequence[int]) -> int:
    return int(np.prod(shape, dtype=np.int64))


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]", "_", name)[:80]


# --- collecting -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Sample:
    feeds: dict[str, Array]
    label: Array | None


def collect(recipe: Recipe, sources: Sources, *, out_dir: Path, progress: Progress = no_progress) -> DataSets:
    """Run the user's ``calibration()`` (where an engine needs it) and ``validation()``, check and store every sample.

    Where the recipe searches, samples to select by come from ``selection()``, written like ``validation()``, or else
    are what ``calibration()`` yields beyond those that calibrate, without labels. Takes at most ``quantize.samples`` and ``data.validation_samples`` samples. An item that holds several samples along
    the batch axis is split, and with it its labels, along their first axis; labels of calibration samples are ignored.

    Raises:
        CalibrationError: the file has no such functions or they raise, a sample does not fit the recipe's inputs or is
            not finite, a set is empty, too small, or shows one value only, or two sets share samples.
    """
    calibrate = any(engine.precision is not Precision.FP32 for engine in recipe.engines)
    search = recipe.search if any(recipe.searched(engine) for engine in recipe.engines) else None
    selecting = search.samples if search else 0
    limit = recipe.data.validation_samples
    hashes: dict[str, list[bytes]] = {}
    found: dict[str, str] = {}
    notes: list[str] = []

    def store(name: str, samples: Iterator[_Sample], expected: int) -> None:
        done = sum(map(len, hashes.values()))
        asked = done + expected
        hashes[name], found[name], more = _store(
            recipe, samples, name, out_dir / name, lambda count: progress(done + count, max(done + count, asked))
        )
        notes.extend(more)

    calibrating: Iterator[_Sample] = iter(())
    if calibrate:
        calibrating = _samples(recipe, sources, "calibration", recipe.quantize.samples + selecting)
        store("calibration", itertools.islice(calibrating, recipe.quantize.samples), recipe.quantize.samples)
        if len(hashes["calibration"]) < recipe.quantize.min_samples:
            raise CalibrationError(
                f"calibration set: {len(hashes['calibration'])} samples; at least {recipe.quantize.min_samples} were "
                "expected. Yield more from calibration(), or lower [quantize] min_samples."
            )
    if search is not None:
        own = hasattr(_data_module(sources), "selection")
        store("selection", _samples(recipe, sources, "selection", selecting) if own else calibrating, selecting)
    store("validation", _samples(recipe, sources, "validation", limit), limit or 0)
    if limit is not None and len(hashes["validation"]) < limit:
        notes.append(f"validation set: {len(hashes['validation'])} samples, where the recipe asks for {limit}")
    for one, other in itertools.combinations(hashes, 2):
        _refuse_overlap(one, hashes[one], other, hashes[other])

    def judging(name: str) -> ValidationSet:
        path = out_dir / name
        labelled = Samples(path).labelled
        return ValidationSet(path=path, samples=len(hashes[name]), sha256=found[name], labelled=labelled)

    calibration = None
    if calibrate:
        calibration = CalibrationSet(
            path=out_dir / "calibration", samples=len(hashes["calibration"]), sha256=found["calibration"]
        )
    return DataSets(
        calibration=calibration,
        validation=judging("validation"),
        selection=judging("selection") if search is not None else None,
        notes=tuple(notes),
    )


def first_samples(recipe: Recipe, sources: Sources, count: int) -> list[dict[str, Array]]:
    """Up to ``count`` checked samples of ``calibration()``, or of ``validation()`` where there is no calibration.

    Raises:
        CalibrationError: see `collect`.
    """
    module = _data_module(sources)
    name = "calibration" if hasattr(module, "calibration") else "validation"
    samples = [sample.feeds for sample in _samples(recipe, sources, name, count)]
    if not samples:
        raise _empty(name)
    return samples


def _empty(name: str) -> CalibrationError:
    if name == "selection":
        return CalibrationError(
            "selection set: no samples; some that [search] can choose by were expected. Define selection(), written like "
            "validation(), or let calibration() yield more than [quantize] samples."
        )
    return CalibrationError(
        f"{name} set: {name}() yields no samples; at least one was expected. Check the path or filter it reads with."
    )


def _data_module(sources: Sources) -> Any:
    assert sources.data_path is not None, "a recipe without a data file is refused when it is read"
    return load_module(sources.data_path, CalibrationError)


def _store(
    recipe: Recipe, samples: Iterator[_Sample], name: str, path: Path, progress: Callable[[int], None]
) -> tuple[list[bytes], str, list[str]]:
    """Write a set and judge it as a whole: (hash of each sample, hash of the set, notes)."""
    axes = _batch_axes(recipe)
    hashes: list[bytes] = []
    low: dict[str, Any] = {}
    high: dict[str, Any] = {}
    with SampleWriter(path, batch_axes=axes) as writer:
        for sample in samples:
            hashes.append(writer.append(sample.feeds, sample.label))
            for key, value in sample.feeds.items():
                if value.size:
                    low[key] = min(low.get(key, value.min()), value.min())
                    high[key] = max(high.get(key, value.max()), value.max())
            progress(len(hashes))
    if not hashes:
        raise _empty(name)
    if all(not low[key] and not high[key] for key in low):
        raise CalibrationError(
            f"{name} set: every value of all {len(hashes)} samples is 0; real data were expected. Check what {name}() "
            "reads."
        )
    distinct = len(set(hashes))
    if distinct == 1 and len(hashes) > 1:
        raise CalibrationError(
            f"{name} set: all {len(hashes)} samples are identical; different ones were expected. Check that {name}() "
            "yields a new array for each sample."
        )
    notes = []
    if distinct < len(hashes):
        notes.append(f"{name} set: {len(hashes) - distinct} of {len(hashes)} samples repeat an earlier one")
    notes += [f"{name} set: input '{key}' is {low[key]} everywhere" for key in low if low[key] == high[key]]
    return hashes, Samples(path).sha256, notes


def _refuse_overlap(one: str, ones: Sequence[bytes], other: str, others: Sequence[bytes]) -> None:
    seen = {digest: index for index, digest in reversed(list(enumerate(ones)))}
    shared = [(index, seen[digest]) for index, digest in enumerate(others) if digest in seen]
    if shared:
        first = ", ".join(f"{other} {index} = {one} {same}" for index, same in shared[:3])
        raise CalibrationError(
            f"{one} and {other} sets: {len(shared)} of {len(others)} {other} samples are also {one} samples "
            f"({first}{', ...' if len(shared) > 3 else ''}); disjoint sets were expected. Split the data before both "
            "functions."
        )


def _batch_axes(recipe: Recipe) -> dict[str, int | None]:
    """For each input the position of the batch axis; 0 for all where the model has no batch axis."""
    batch = batch_axis(recipe.inputs)
    if batch is None:
        return {spec.name: 0 if spec.shape else None for spec in recipe.inputs}
    return {spec.name: spec.shape.index(batch) if batch in spec.shape else None for spec in recipe.inputs}


def _samples(recipe: Recipe, sources: Sources, name: str, limit: int | None) -> Iterator[_Sample]:
    """Checked samples of one of the user's functions, at most ``limit``."""
    module = _data_module(sources)
    file = shown(sources.data_path or Path())
    function = function_in(
        module, name, CalibrationError, f"a function {name}() that yields dicts of arrays, or (dict, labels),"
    )
    items = call_user(function, f"{name}()", CalibrationError)
    if isinstance(items, Mapping) or not (hasattr(items, "__iter__") or hasattr(items, "__getitem__")):
        raise CalibrationError(
            f"{file}: {name}() returned {type(items).__name__}; an iterable of samples was expected. Yield each sample, "
            "or return a list."
        )
    count = 0
    first: _Sample | None = None
    for item in iterate_user(items, f"{name}()", CalibrationError):
        for sample in _split(recipe, item, name, count):
            if limit is None and count == MAX_VALIDATION:
                raise CalibrationError(
                    f"{name} set: more than {MAX_VALIDATION:,} samples; a finite set was expected. End {name}(), or set "
                    "[data] validation_samples."
                )
            first = first or sample
            _check_label(first, sample, name, count)
            yield sample
            count += 1
            if limit is not None and count >= limit:
                return


def _split(recipe: Recipe, item: Any, name: str, count: int) -> Iterator[_Sample]:
    """One item of the user's as samples of batch size 1."""
    where = f"{name} sample {count}"
    labels = None
    if isinstance(item, (tuple, list)) and len(item) == 2 and isinstance(item[0], Mapping):
        item, labels = item[0], None if name == "calibration" else item[1]
    if not isinstance(item, Mapping):
        raise CalibrationError(
            f"{where}: found {_kind(item)}; a dict of arrays, or (dict, labels), was expected. Yield "
            f"{{{', '.join(f'{spec.name!r}: ...' for spec in recipe.inputs)}}}."
        )
    names = [spec.name for spec in recipe.inputs]
    if unknown := [str(key) for key in item if key not in names]:
        raise CalibrationError(
            f"{where}: unknown input '{unknown[0]}'; {suggest(unknown[0], names)} Yield exactly the recipe's inputs."
        )
    if missing := [key for key in names if key not in item]:
        raise CalibrationError(
            f"{where}: no input '{missing[0]}'; found {', '.join(map(str, item)) or 'an empty dict'}. Yield exactly the "
            "recipe's inputs."
        )
    feeds = {spec.name: _checked(recipe, spec, item[spec.name], where) for spec in recipe.inputs}
    batch = batch_axis(recipe.inputs)
    positions = _batch_axes(recipe)
    sizes: dict[str, tuple[str, int]] = {}
    for spec in recipe.inputs:
        for dim, size in zip(spec.shape, feeds[spec.name].shape, strict=True):
            if isinstance(dim, str) and sizes.setdefault(dim, (spec.name, size))[1] != size:
                other, expected = sizes[dim]
                raise CalibrationError(
                    f"{where}, input '{spec.name}': axis '{dim}' is {size}, and {expected} in input '{other}'; one size "
                    "was expected. Yield arrays that belong together."
                )
    size = sizes[batch][1] if batch is not None else 1
    parts = _split_labels(labels, size, where)
    for index in range(size):
        sample = {
            key: value if batch is None or positions[key] is None else _native(value.take([index], positions[key]))
            for key, value in feeds.items()
        }
        for key, value in sample.items():
            _check_finite(value, f"{name} sample {count + index}, input '{key}'")
        yield _Sample(feeds=sample, label=parts[index] if parts is not None else None)


def _checked(recipe: Recipe, spec: TensorSpec, value: Any, where: str) -> Array:
    """One input of one item as an array of the recipe's dtype and shape."""
    where = f"{where}, input '{spec.name}'"
    found = _as_array(value, where)
    if found.dtype.newbyteorder("=") != dtype_of(spec):
        raise CalibrationError(
            f"{where}: found {found.dtype.name}; {spec.dtype} was expected. Convert it in the data file "
            f"(array.astype('{spec.dtype}')), or change the recipe."
        )
    batch = batch_axis(recipe.inputs)
    fits = found.ndim == len(spec.shape)
    problem = ""
    for dim, size in zip(spec.shape, found.shape, strict=False):
        if isinstance(dim, int):
            fits &= size == dim
        elif dim == batch:
            problem = problem if size else f", with axis '{dim}' of at least 1,"
        elif fits and not recipe.axes[dim].min <= size <= recipe.axes[dim].max:
            problem = f", with axis '{dim}' from {recipe.axes[dim].min} to {recipe.axes[dim].max},"
    if problem or not fits:
        raise CalibrationError(
            f"{where}: found shape {dims(found.shape)}; {dims(spec.shape)}{problem} was expected. Correct the data file "
            "or the recipe."
        )
    return _native(found)


def _as_array(value: Any, where: str) -> Array:
    """Arrays as they are; tensors by their own methods, so that no framework is imported here."""
    if all(hasattr(value, name) for name in ("detach", "cpu", "numpy")):
        value = call_user(lambda: value.detach().cpu().numpy(), f"{where}: reading it", CalibrationError)
    try:
        found = np.asarray(value)
    except ValueError as exc:
        raise CalibrationError(
            f"{where}: found {_kind(value)} of unequal parts; an array was expected. Pad them to one shape."
        ) from exc
    if found.dtype.kind not in "biufU" and not (found.dtype.kind == "V" and found.dtype.fields is None):
        raise CalibrationError(
            f"{where}: found {_kind(value)} of dtype {found.dtype.name}; an array of numbers was expected. Convert it."
        )
    return found


def _check_finite(value: Array, where: str) -> None:
    if value.dtype.kind in "biu":
        return
    bad = ~np.isfinite(value)
    if bad.any():
        position = tuple(int(index) for index in np.argwhere(bad)[0])
        raise CalibrationError(
            f"{where}: {int(bad.sum())} of {value.size} values are not finite, the first, {value[position]}, at "
            f"{dims(position)}; finite numbers were expected. Repair or leave out this sample."
        )


def _split_labels(labels: Any, size: int, where: str) -> list[Array] | None:
    """Labels of an item, one for each sample: split along the first axis where that has the batch's size."""
    if labels is None:
        return None
    where = f"{where}, label"
    if isinstance(labels, Mapping):
        raise CalibrationError(
            f"{where}: found {_kind(labels)}; a number, a string or an array was expected. Convert it."
        )
    found = _as_array(labels, where)
    if found.ndim and found.shape[0] == size:
        return list(found)
    if size == 1:
        return [found]
    raise CalibrationError(
        f"{where}: found shape {dims(found.shape)} for {size} samples; a first axis of {size} was expected. Yield one "
        "label for each sample."
    )


def _check_label(first: _Sample, sample: _Sample, name: str, count: int) -> None:
    where = f"{name} sample {count}"
    if (first.label is None) != (sample.label is None):
        found, expected = ("no label", "one") if sample.label is None else ("a label", "none")
        raise CalibrationError(
            f"{where}: {found}, and sample 0 has {expected}; labels for all samples or for none were expected. Yield "
            "(dict, labels) throughout."
        )
    if first.label is not None and sample.label is not None:
        a, b = np.asarray(first.label), np.asarray(sample.label)
        kinds = [_STRING if value.dtype.kind == "U" else value.dtype.name for value in (a, b)]
        if kinds[0] != kinds[1] or a.ndim != b.ndim:
            raise CalibrationError(
                f"{where}, label: found {kinds[1]} of rank {b.ndim}; {kinds[0]} of rank {a.ndim}, as in sample 0, was "
                "expected. Convert the labels to one form."
            )


def _kind(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"an array of shape {dims(value.shape)}"
    return f"a {type(value).__name__}"

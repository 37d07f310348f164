"""Stream the calibration set once through the model and keep what any method of choosing ranges needs.

Why a histogram over bfloat16: the upper 16 bits of a float are its sign, its exponent and 7 bits of its mantissa, so
counting them needs no known range, cannot overflow, resolves 1/128 of any value, and adds up exactly: the result does
not depend on the order of samples or on how they were batched. Ranges that grow (as in `numpy.histogram`) must be known
before or merged approximately after, and one mask value of -3.4e38 leaves them a single bin. It also costs less than
half as much: 1.9 ns per value against 4.5.

Tensors that INT8 will round are fetched and counted; of every other float tensor only the extremes leave the runtime,
reduced inside the graph: they tell what FP16 can hold.
"""

from __future__ import annotations

import math
import sys
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import LiftConstantsToInitializersPass, ShapeInferencePass

from compiler import onnx_files
from compiler.data import Samples
from compiler.errors import CalibrationError
from compiler.quantize import placement
from compiler.spec import (
    Array,
    CalibrationSet,
    Feeds,
    OnnxModel,
    OpenModel,
    Progress,
    Runner,
    Statistics,
    batch_axis,
    no_progress,
)

BINS = 1 << 15
"""One bin for every bfloat16 from 0 on; bin ``b`` holds the magnitudes from ``edges()[b]`` up to ``edges()[b + 1]``."""

FINITE_BINS = 0x7F80
"""Bins of finite values; the others count infinities and NaN."""

FETCH_BYTES = 48 << 20
"""Batches are made no larger than lets the fetched tensors fit here."""

OUTLIER_RATIO = 100.0
"""A sample whose largest input is this many times the median sample's is named in the notes."""

_FILE = "statistics.npz"
_CHUNK = 1 << 20


@dataclass(frozen=True, kw_only=True, eq=False)
class Channels:
    """What is known of each place of one axis of a tensor: the last, if products read it; the second, if convolutions do."""

    peaks: Array
    """float32 [K]: the largest magnitude."""
    squares: Array
    """float64 [K]: the sum of squares."""

    def __add__(self, other: Channels) -> Channels:
        return Channels(peaks=np.maximum(self.peaks, other.peaks), squares=self.squares + other.squares)


@dataclass(frozen=True, kw_only=True, eq=False)
class TensorStatistics:
    """What is known of one tensor over all samples. Two of them add up exactly, in any order; sums of squares to the
    last digit of a double.

    ``low`` and ``high`` are the extremes, in the tensor's own units: of the finite values where there are ``bins``, and
    otherwise as the runtime reduces them: infinite where the tensor holds an infinity (a mask), NaN ignored. Of a
    tensor without elements they are inf and -inf.
    """

    low: float
    high: float
    count: int = 0
    nan: int = 0
    inf: int = 0
    bins: Array | None = None
    """int64 [`BINS`]: how many values have each magnitude; see `edges`."""
    channels: Channels | None = None
    """Of what a matrix product reads, or what lies between two convolutions."""

    def __add__(self, other: TensorStatistics) -> TensorStatistics:
        assert (self.bins is None) == (other.bins is None), "statistics of one kind"
        return TensorStatistics(
            low=float(np.fmin(self.low, other.low)),
            high=float(np.fmax(self.high, other.high)),
            count=self.count + other.count,
            nan=self.nan + other.nan,
            inf=self.inf + other.inf,
            bins=None if self.bins is None or other.bins is None else self.bins + other.bins,
            channels=None if self.channels is None or other.channels is None else self.channels + other.channels,
        )

    @property
    def peak(self) -> float:
        """The largest magnitude; 0 of a tensor without elements."""
        return max(-self.low, self.high, 0.0)


Observed: TypeAlias = Mapping[str, TensorStatistics]
"""Statistics by tensor name: of every float32 activation, with ``bins`` where INT8 may round it."""


def edges() -> Array:
    """Lower edges of the finite bins and, last, infinity: float64 [`FINITE_BINS` + 1].

    >>> edges()[[0, 0x3F80, 0x3F81, 0x4000]].tolist()
    [0.0, 1.0, 1.0078125, 2.0]
    """
    return (np.arange(FINITE_BINS + 1, dtype=np.uint32) << 16).view(np.float32).astype(np.float64)


def measure(tensor: Array, *, by_channel: int | None = None) -> TensorStatistics:
    """Statistics, with bins, of one array of any shape; with ``channels`` of an axis on request.

    >>> found = measure(np.array([-3.0, 0.0, 1.0, 1.001, 1.5]))
    >>> found.low, found.high, found.peak, found.count
    (-3.0, 1.5, 3.0, 5)
    >>> [(float(edges()[bin]), int(found.bins[bin])) for bin in np.flatnonzero(found.bins)]
    [(0.0, 1), (1.0, 2), (1.5, 1), (3.0, 1)]
    """
    values = np.ascontiguousarray(tensor, np.float32).reshape(-1)
    upper_halves = values.view(np.uint16)[1 if sys.byteorder == "little" else 0 :: 2]
    signed = np.zeros(2 * BINS, np.int64)
    for start in range(0, upper_halves.size, _CHUNK):
        signed += np.bincount(upper_halves[start : start + _CHUNK], minlength=2 * BINS)
    bins = signed[:BINS] + signed[BINS:]
    channels, lows, highs = None, values, values
    if by_channel is not None:
        axis = by_channel % tensor.ndim
        parts = values.reshape(math.prod(tensor.shape[:axis]), tensor.shape[axis], -1)
        lows, highs = (parts.min(axis=(0, 2), initial=np.inf), parts.max(axis=(0, 2), initial=-np.inf))
        channels = Channels(
            peaks=np.maximum(np.maximum(highs, -lows), np.float32(0)),
            squares=np.einsum("ijk,ijk->j", parts, parts, dtype=np.float64),
        )
    nan = inf = 0
    if bins[FINITE_BINS:].any():
        nan, inf = int(np.isnan(values).sum()), int(np.isinf(values).sum())
        lows = highs = values[np.isfinite(values)]
    return TensorStatistics(
        low=float(lows.min(initial=np.inf)),
        high=float(highs.max(initial=-np.inf)),
        count=int(upper_halves.size),
        nan=nan,
        inf=inf,
        bins=bins,
        channels=channels,
    )


def observe(
    model: OnnxModel,
    data: CalibrationSet,
    *,
    samples: int,
    min_samples: int,
    open_model: OpenModel,
    threads: int,
    out_dir: Path,
    extremes: bool = True,
    attention: bool = False,
    progress: Progress = no_progress,
) -> Statistics:
    """Run up to ``samples`` calibration samples, evenly spaced over the set, and store what they show.

    Memory does not grow with the number of samples: one batch is held at a time, of at most the batch axis' optimum.

    Args:
        extremes: whether to look at tensors that INT8 does not round, too, as FP16 and BF16 ask: it hinders the runtime's
            fusions, and takes half as long again.
        attention: whether INT8 or FP8 will round what products of two activations multiply.

    Raises:
        CalibrationError: fewer than ``min_samples`` samples; samples that are all constant; NaN or Inf in a sample, in
            a weight, in a tensor that INT8 would round, or NaN in an output.
    """
    stored = Samples(data.path)
    indices = chosen(len(stored), samples)
    if len(indices) < max(min_samples, 1):
        raise CalibrationError(
            f"calibration set: {len(indices)} samples to use ({len(stored)} in the set, quantize.samples = {samples}); "
            f"at least {max(min_samples, 1)} were expected (quantize.min_samples). Yield more from calibration()."
        )
    network = onnx_files.read(model.path)
    LiftConstantsToInitializersPass(lift_all_constants=True)(network)
    placed = placement.place(network.graph, attention=attention)
    placement.check_weights(placed)
    sight = _expose(network, placed, extremes=extremes)
    weights = onnx_files.write_graph(network, out_dir / "augmented.onnx")
    del network, placed
    runner = open_model(out_dir / "augmented.onnx", threads=threads, weights=weights)
    inputs = _InputChecks(model)
    gathered = _Gathered(sight)
    try:
        limit, done = 1, 0
        while done < len(indices):
            batch = alike(stored, indices[done : done + limit])
            feeds = stored.batch(batch)
            inputs.add(batch, feeds)
            seen = {**feeds, **runner.run(feeds)}
            if bad := gathered.add(seen):
                raise _located(stored, batch, runner, sight, bad)
            done += len(batch)
            limit = batch_limit(model, sum(values.nbytes for values in seen.values()) // len(batch))
            progress(done, len(indices))
    finally:
        runner.close()
        (out_dir / "augmented.onnx").unlink()
    inputs.check()
    _save(out_dir / _FILE, gathered.observed)
    return Statistics(
        path=out_dir / _FILE,
        model_sha256=model.sha256,
        data_sha256=data.sha256,
        samples=len(indices),
        notes=(*inputs.notes(indices), *gathered.notes()),
    )


def chosen(stored: int, wanted: int) -> list[int]:
    """Which of ``stored`` samples calibrate: at most ``wanted``, evenly spaced.

    >>> chosen(10, 4), chosen(3, 4)
    ([0, 2, 5, 7], [0, 1, 2])
    """
    used = min(stored, wanted)
    return [index * stored // used for index in range(used)]


def load(path: Path) -> Observed:
    """What `observe` stored at ``path``.

    Raises:
        CalibrationError: the file is missing, damaged, or something else.
    """
    try:
        with path.open("rb") as file, np.load(file) as stored:
            table = zip(*(stored[key].tolist() for key in ("name", "low", "high", "count", "first")), strict=True)
            observed = {}
            for row, (name, low, high, count, first) in enumerate(table):
                bins = None
                if first >= 0:
                    bins = np.zeros(BINS, np.int64)
                    counted = stored[f"{row}.bins"]
                    bins[first : first + counted.size] = counted
                channels = None
                if f"{row}.peaks" in stored:
                    channels = Channels(peaks=stored[f"{row}.peaks"], squares=stored[f"{row}.squares"])
                observed[name] = TensorStatistics(low=low, high=high, count=count, bins=bins, channels=channels)
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as exc:
        raise CalibrationError(
            f"{path}: not the statistics of a calibration; what 'observe' writes was expected. "
            "Run again without the cache: --no-cache."
        ) from exc
    return observed


def _save(path: Path, observed: Observed) -> None:
    """Equal statistics become equal bytes. Bins are stored from the first to the last that counted something."""
    names = sorted(observed)
    rows = [observed[name] for name in names]
    first = [-1] * len(rows)
    arrays: dict[str, Array] = {}
    for row, statistics in enumerate(rows):
        if statistics.bins is not None:
            used = np.flatnonzero(statistics.bins)
            first[row] = int(used[0]) if used.size else 0
            arrays[f"{row}.bins"] = statistics.bins[first[row] : used[-1] + 1 if used.size else 0]
        if statistics.channels is not None:
            arrays[f"{row}.peaks"] = statistics.channels.peaks
            arrays[f"{row}.squares"] = statistics.channels.squares
    arrays |= {
        "name": np.array(names, dtype=str),
        "low": np.array([statistics.low for statistics in rows], np.float64),
        "high": np.array([statistics.high for statistics in rows], np.float64),
        "count": np.array([statistics.count for statistics in rows], np.int64),
        "first": np.array(first, np.int64),
    }
    np.savez(path, allow_pickle=False, **arrays)


# --- what the model computes ----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Sight:
    """What an augmented model shows."""

    counted: tuple[str, ...]
    reduced: Mapping[str, tuple[str, str]]
    """Tensor name to the names of its extremes, the smallest first."""
    inputs: tuple[str, ...]
    """Float inputs that are not counted: their extremes are taken from the feeds."""
    outputs: tuple[str, ...]
    channels: Mapping[str, int]
    """Counted tensors that are looked at by channel, and the axis of these."""
    convolved: tuple[str, ...]
    """Counted tensors whose axis 1 is made by one output channel of a convolution each."""


def _expose(network: ir.Model, placed: placement.Placement, *, extremes: bool) -> _Sight:
    """Make ``network`` show what must be seen; its own outputs stay."""
    graph = network.graph
    own = tuple(graph.outputs)
    # Asked before anything is added: what more is read of a convolution hides the Relu that is fused to it.
    between = placement.pairs(graph, placed)
    convolved = tuple(str(placement.fused_output(node).name) for node in placed.nodes if node.op_type == "Conv")
    if any(output.dtype is None for node in graph for output in node.outputs):
        ShapeInferencePass(check_type=False, strict_mode=False, data_prop=False)(network)
    counted = placed.activations
    for value in counted:
        value.dtype = ir.DataType.FLOAT
        if not value.is_graph_input() and not value.is_graph_output():
            graph.outputs.append(value)
    others = [
        output
        for node in tuple(graph)
        for output in node.outputs
        if extremes and output.dtype == ir.DataType.FLOAT and output.name and output not in placed.root
    ]
    return _Sight(
        counted=tuple(str(value.name) for value in counted),
        reduced={str(value.name): (_reduce(graph, value, "Min"), _reduce(graph, value, "Max")) for value in others},
        inputs=tuple(
            str(value.name)
            for value in graph.inputs
            if extremes and value.dtype == ir.DataType.FLOAT and value not in placed.root and not value.is_initializer()
        ),
        outputs=tuple(str(value.name) for value in own if value.dtype == ir.DataType.FLOAT),
        channels={
            **{str(pair.value.name): 1 for pair in between},
            **{
                str(node.inputs[0].name): -1
                for node in placed.nodes
                if placement.input_rows(node) is not None and node.inputs[0] is not None
            },
        },
        convolved=convolved,
    )


def _reduce(graph: ir.Graph, value: ir.Value, kind: str) -> str:
    output = ir.Value(name=f"observed:{kind}:{value.name}", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([]))
    graph.append(ir.node(f"Reduce{kind}", [value], {"keepdims": 0}, outputs=[output], name=output.name))
    graph.outputs.append(output)
    return str(output.name)


class _Gathered:
    """Statistics of the batches so far."""

    def __init__(self, sight: _Sight) -> None:
        self.observed: dict[str, TensorStatistics] = {}
        self._sight = sight
        self._first: dict[str, Array] = {}
        self._constant: dict[str, Array] = {}

    def add(self, seen: Feeds) -> str | None:
        """The name of a tensor that must be finite and is not, in which case nothing more is gathered."""
        for name in self._sight.counted:
            found = measure(seen[name], by_channel=self._sight.channels.get(name))
            if found.nan or found.inf:
                return name
            self._merge(name, found)
        for name in self._sight.inputs:
            values = seen[name]
            low, high = float(values.min(initial=np.inf)), float(values.max(initial=-np.inf))
            self._merge(name, TensorStatistics(low=low, high=high))
        for name, (lowest, highest) in self._sight.reduced.items():
            self._merge(name, TensorStatistics(low=float(seen[lowest]), high=float(seen[highest])))
        for name in self._sight.convolved:
            self._compare_channels(name, seen[name])
        return next((name for name in self._sight.outputs if np.isnan(seen[name]).any()), None)

    def notes(self) -> list[str]:
        """Channels and tensors that never changed: what was learnt of them is one value."""
        notes = []
        dead = {name: (int(channels.sum()), channels.size) for name, channels in self._constant.items()}
        dead = {name: counts for name, counts in dead.items() if counts[0]}
        if dead:
            total = sum(channels.size for channels in self._constant.values())
            listed = ", ".join(f"{name} ({count} of {size})" for name, (count, size) in list(dead.items())[:5])
            more = ", ..." if len(dead) > 5 else ""
            notes.append(
                f"{sum(count for count, _ in dead.values())} of {total} convolution channels never change on the "
                f"calibration samples: {listed}{more}"
            )
        constant = [
            name for name in self._sight.counted if (found := self.observed[name]).low == found.high and found.count > 1
        ]
        if constant:
            more = ", ..." if len(constant) > 5 else ""
            notes.append(
                f"{len(constant)} of {len(self._sight.counted)} observed tensors hold one value on all calibration "
                f"samples: {', '.join(constant[:5])}{more}"
            )
        return notes

    def _merge(self, name: str, found: TensorStatistics) -> None:
        known = self.observed.get(name)
        self.observed[name] = found if known is None else known + found

    def _compare_channels(self, name: str, tensor: Array) -> None:
        """Which channels of ``tensor`` [N, C, ...] still hold nothing but their first value."""
        if not tensor.size:
            return
        rows = tensor.reshape(tensor.shape[0], tensor.shape[1], -1)
        first = self._first.setdefault(name, rows[0, :, 0].copy())
        constant = self._constant.setdefault(name, np.ones(len(first), bool))
        left = np.flatnonzero(constant)
        constant[left] = (rows[:, left] == first[left, None]).all(axis=(0, 2))


def _non_finite(sight: _Sight, seen: Feeds) -> str | None:
    """The first tensor, in the order of the graph, that INT8 would round and that is not finite; or a NaN output."""
    for name in sight.counted:
        if not np.isfinite(seen[name]).all():
            return name
    return next((name for name in sight.outputs if np.isnan(seen[name]).any()), None)


def _located(stored: Samples, batch: Sequence[int], runner: Runner, sight: _Sight, tensor: str) -> CalibrationError:
    """The error for ``tensor``, naming the sample of the batch that it comes from."""
    where = f"calibration samples {batch[0]} to {batch[-1]}"
    found = "NaN or Inf"
    for index in batch:
        feeds = stored.feeds(index)
        seen = {**feeds, **runner.run(feeds)}
        if (bad := _non_finite(sight, seen)) is not None:
            where, tensor = f"calibration sample {index}", bad
            nan, inf = int(np.isnan(seen[bad]).sum()), int(np.isinf(seen[bad]).sum())
            found = f"{nan} NaN and {inf} Inf in {seen[bad].size} values"
            break
    return CalibrationError(
        f"{where}: tensor '{tensor}' holds {found}; finite values were expected. "
        "Look at this sample, and at what the original model makes of it."
    )


# --- samples --------------------------------------------------------------------------------------------------------


def alike(stored: Samples, indices: Sequence[int]) -> list[int]:
    """The first of ``indices``, up to the first sample of another shape."""
    shapes = stored.shapes(indices[0])
    different = (place for place, index in enumerate(indices) if stored.shapes(index) != shapes)
    return list(indices[: next(different, len(indices))])


def batches(stored: Samples, indices: Sequence[int], limit: int) -> Iterator[list[int]]:
    """``indices`` in their order, in runs of samples of one shape, of at most ``limit``."""
    done = 0
    while done < len(indices):
        taken = alike(stored, indices[done : done + limit])
        yield taken
        done += len(taken)


def largest_batch(model: OnnxModel) -> int:
    """How many samples ``model`` takes together: the optimum of its batch axis, 1 where it has none."""
    axis = batch_axis(model.inputs)
    if axis is None or axis not in model.axes or any(axis not in spec.shape for spec in model.inputs):
        return 1
    return max(1, model.axes[axis].opt)


def batch_limit(model: OnnxModel, bytes_per_sample: int) -> int:
    """How many samples to run together where what is fetched of each takes so many bytes."""
    return max(1, min(largest_batch(model), FETCH_BYTES // max(bytes_per_sample, 1)))


class _InputChecks:
    """Whether the samples say anything at all."""

    def __init__(self, model: OnnxModel) -> None:
        axis = batch_axis(model.inputs)
        self._axes = {spec.name: spec.shape.index(axis) if axis in spec.shape else None for spec in model.inputs}
        self._float = {spec.name for spec in model.inputs if "float" in spec.dtype}
        self._lows: dict[str, list[float]] = {name: [] for name in self._axes}
        self._highs: dict[str, list[float]] = {name: [] for name in self._axes}
        self._varied: set[str] = set()

    def add(self, batch: Sequence[int], feeds: Feeds) -> None:
        """
        Raises:
            CalibrationError: a sample holds NaN or Inf.
        """
        for name, axis in self._axes.items():
            values = feeds[name]
            rows = (np.moveaxis(values, axis, 0) if axis is not None else values).reshape(len(batch), -1)
            if not rows.size:
                continue
            lows, highs = rows.min(1).astype(np.float64), rows.max(1).astype(np.float64)
            bad = np.flatnonzero(~np.isfinite(lows) | ~np.isfinite(highs))
            if bad.size:
                raise CalibrationError(
                    f"calibration sample {batch[bad[0]]}: input '{name}' holds NaN or Inf; finite values were expected. "
                    "Correct calibration(), or leave the sample out."
                )
            known = self._lows[name]
            alone = rows.shape[1] == 1 and bool(known or len(batch) > 1) and bool((lows != (known or lows)[0]).any())
            if alone or (lows != highs).any():
                self._varied.add(name)
            self._lows[name] += lows.tolist()
            self._highs[name] += highs.tolist()

    def check(self) -> None:
        """
        Raises:
            CalibrationError: every input holds one value in every sample.
        """
        if self._varied:
            return
        zero = all(not any(values) for side in (self._lows, self._highs) for values in side.values())
        raise CalibrationError(
            f"calibration set: every sample is {'all zero' if zero else 'constant'}, in every input "
            f"({', '.join(self._axes)}); samples as the model will meet them were expected. Correct calibration()."
        )

    def notes(self, indices: Sequence[int]) -> list[str]:
        notes = [
            f"input '{name}' holds one value in every calibration sample"
            for name in self._axes
            if name in self._float and name not in self._varied
        ]
        for name in sorted(self._float & self._varied):
            peaks = np.maximum(np.abs(self._lows[name]), np.abs(self._highs[name]))
            typical = float(np.median(peaks))
            outliers = np.flatnonzero(peaks > OUTLIER_RATIO * typical) if typical else np.zeros(0, np.int64)
            notes += [
                f"calibration sample {indices[outlier]}: input '{name}' reaches {peaks[outlier]:.3g}, "
                f"{peaks[outlier] / typical:.0f} times the median sample's {typical:.3g}"
                for outlier in outliers[:5]
            ]
        return notes

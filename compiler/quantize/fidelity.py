"""Does the quantised model still compute what the model computes? Asked on calibration samples, before anything is built.

A wrong axis, a swapped scale or a range that a mask has blown up leave a valid graph that computes nonsense; the signal
to quantisation noise ratio of the outputs shows them all, at the cost of a few runs. It is no verdict on accuracy: that
is the validation's, on samples that set no range.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from compiler import onnx_files
from compiler.data import Samples
from compiler.errors import CalibrationError
from compiler.quantize import placement
from compiler.quantize.observe import alike, batch_limit
from compiler.spec import Array, CalibrationSet, OnnxModel, OpenModel, Progress, no_progress

SAMPLES = 16
BATCH = 4
"""Samples that are run together, if the model takes batches: weights are dequantised in every run."""

SUSPECT_SAMPLES = 4
SUSPECTS = 3

_CEILING_DB = 60.0
"""Above this a tensor counts as exact when losses are ranked: what falls from 120 to 60 dB explains nothing."""

_CHUNK = 1 << 14
"""Values that are looked at together: what is made of them stays in a core's cache, and in memory that is at hand (a quarter of
the time that 2**20 take)."""


@dataclass(kw_only=True)
class Power:
    """Sums of squares over samples."""

    signal: float = 0.0
    noise: float = 0.0
    spoilt: int = 0
    """Values that are finite in one model and not in the other."""

    def add(self, reference: Array, found: Array) -> None:
        expected, got = reference.reshape(-1), found.reshape(-1)
        for start in range(0, expected.size, _CHUNK):
            self._add(expected[start : start + _CHUNK], got[start : start + _CHUNK])

    def _add(self, reference: Array, found: Array) -> None:
        expected, got = reference.astype(np.float64), found.astype(np.float64)
        with np.errstate(invalid="ignore", over="ignore"):
            signal, noise = _squares(expected, got)
        if not (math.isfinite(signal) and math.isfinite(noise)):  # else, as nearly always, every value is
            finite = np.isfinite(expected)
            self.spoilt += int(np.count_nonzero(finite != np.isfinite(got)))
            both = finite & np.isfinite(got)
            signal, noise = _squares(expected[both], got[both])
        self.signal += signal
        self.noise += noise

    @property
    def sqnr_db(self) -> float:
        """10 log10(signal / noise): inf where there is no noise, -inf where there is nothing else.

        >>> round(Power(signal=2.0, noise=0.02).sqnr_db, 1), Power().sqnr_db, Power(noise=1.0).sqnr_db
        (20.0, inf, -inf)
        """
        if self.noise == 0.0:
            return math.inf
        return 10 * math.log10(self.signal / self.noise) if self.signal > 0.0 else -math.inf


def _squares(expected: Array, got: Array) -> tuple[float, float]:
    """Of what was expected, and of the difference, summed."""
    return float(np.sum(expected**2)), float(np.sum((expected - got) ** 2))


def check(
    model: OnnxModel,
    quantised: Path,
    data: CalibrationSet,
    *,
    calibrated_on: Sequence[int],
    min_sqnr_db: float,
    seen_as: Mapping[str, str],
    divided: Collection[str],
    hints: Sequence[str],
    open_model: OpenModel,
    threads: int,
    out_dir: Path,
    progress: Progress,
) -> str:
    """Compare the outputs of ``model`` and ``quantised`` on up to `SAMPLES` samples; returns a note with what was measured.

    Args:
        calibrated_on: samples that set ranges; others are taken where there are any.
        seen_as: by activation of the original, the tensor of the quantised model that its consumers read instead.
        divided: names of tensors that are not to be compared: their channels are divided by factors.
        hints: what calibration noticed, for the message.

    Raises:
        CalibrationError: an output is below ``min_sqnr_db``, or finite in one model only.
    """
    stored = Samples(data.path)
    taken, fresh = pick(len(stored), calibrated_on, SAMPLES)
    runs = _Runs(model=model, stored=stored, open_model=open_model, threads=threads, folder=out_dir)
    powers = runs.compare(model.path, quantised, taken, None, progress)
    which = "calibration samples that set no range" if fresh else "calibration samples"
    spoilt = {name: power.spoilt for name, power in powers.items() if power.spoilt}
    if spoilt:
        name, count = next(iter(spoilt.items()))
        raise CalibrationError(
            f"output '{name}': {count} values on {len(taken)} {which} are finite in one of the FP32 and the quantised "
            "model and not in the other; finite values were expected. Keep layers in high precision (engines.keep)."
        )
    worst = min(powers, key=lambda name: powers[name].sqnr_db, default=None)
    if worst is None:
        return "the quantised model has no float output: its SQNR was not measured"
    measured = powers[worst].sqnr_db
    if measured < min_sqnr_db:
        suspects = _suspects(runs, model.path, quantised, taken[:SUSPECT_SAMPLES], seen_as, divided, out_dir)
        raise CalibrationError(
            f"output '{worst}': SQNR {measured:.1f} dB on {len(taken)} {which}; at least {min_sqnr_db:g} dB was "
            f"expected (quantize.min_sqnr_db). Most is lost at {suspects}. Keep these in high precision "
            "(engines.keep), or try another quantize.method."
            + "".join(f" Calibration noted: {hint}." for hint in hints)
        )
    listed = ", ".join(f"{name} {power.sqnr_db:.1f} dB" for name, power in powers.items())
    return f"SQNR against FP32 on {len(taken)} {which}: {listed}"


def pick(stored: int, calibrated_on: Sequence[int], count: int) -> tuple[list[int], bool]:
    """At most ``count`` of ``stored`` samples, evenly spaced, and whether they are such as set no range.

    >>> pick(6, [0, 2, 4], 2), pick(3, [0, 1, 2], 2)
    (([1, 3], True), ([0, 1], False))
    """
    fresh = sorted(set(range(stored)) - set(calibrated_on))
    pool = fresh or list(range(stored))
    return ([pool[index * len(pool) // count] for index in range(count)] if len(pool) > count else pool), bool(fresh)


@dataclass(frozen=True, kw_only=True)
class _Runs:
    """How two models are given the same samples."""

    model: OnnxModel
    """Whose axes both have."""
    stored: Samples
    open_model: OpenModel
    threads: int
    folder: Path
    """Where outputs wait for those of the other model: two large models, and what a runtime makes of them, are never in
    memory together."""

    def compare(
        self,
        original: Path,
        quantised: Path,
        taken: Sequence[int],
        pairs: Mapping[str, str] | None,
        progress: Progress = no_progress,
    ) -> dict[str, Power]:
        """Sums over ``taken`` by name in the original, of ``pairs`` (its name in the other), default: float outputs."""
        powers: dict[str, Power] = {}
        waiting: list[tuple[list[int], Path, tuple[str, ...]]] = []
        try:
            with closing(self.open_model(original, threads=self.threads)) as reference:
                limit, done = 1, 0
                while done < len(taken):
                    batch = alike(self.stored, taken[done : done + limit])
                    feeds = self.stored.batch(batch)
                    made = reference.run(feeds)
                    shown = {name: ({**feeds, **made})[name] for name in (made if pairs is None else pairs)}
                    shown = {name: values for name, values in shown.items() if values.dtype.kind == "f"}
                    waiting.append((batch, self.folder / f"expected-{done}.npz", tuple(shown)))
                    np.savez(waiting[-1][1], *shown.values(), allow_pickle=False)
                    done += len(batch)
                    bytes_per_sample = sum(values.nbytes for values in made.values()) // len(batch)
                    limit = min(BATCH, batch_limit(self.model, bytes_per_sample))
                    progress(done, 2 * len(taken))
            # What the file means, and not what a runtime's fusions, which take axes for granted, make of it.
            with closing(self.open_model(quantised, threads=self.threads, optimize=False)) as candidate:
                for batch, path, names in waiting:
                    found = candidate.run(self.stored.batch(batch))
                    with np.load(path) as expected:
                        for place, name in enumerate(names):
                            other = found[name if pairs is None else pairs[name]]
                            powers.setdefault(name, Power()).add(expected[f"arr_{place}"], other)
                    path.unlink()
                    done += len(batch)
                    progress(done, 2 * len(taken))
        finally:
            for _, path, _ in waiting:
                path.unlink(missing_ok=True)
        return powers


def _suspects(
    runs: _Runs,
    original: Path,
    quantised: Path,
    taken: Sequence[int],
    seen_as: Mapping[str, str],
    divided: Collection[str],
    out_dir: Path,
) -> str:
    """The tensors at which the ratio falls most from what their makers read, in words."""
    networks = onnx_files.read(original), onnx_files.read(quantised)
    values = [
        {value.name: value for value in (*network.graph.inputs, *(v for node in network.graph for v in node.outputs))}
        for network in networks
    ]
    products = [
        node.outputs[0].name
        for node in networks[0].graph
        if node.op_type in placement.CONVOLUTIONS | placement.PRODUCTS
    ]
    pairs = {str(name): str(name) for name in products if name in values[1]}
    pairs |= {name: seen for name, seen in seen_as.items() if name in values[0]}
    pairs = {name: other for name, other in pairs.items() if name not in divided}
    files = []
    for network, known, names, label in zip(
        networks, values, (pairs, pairs.values()), ("original", "quantised"), strict=True
    ):
        for name in dict.fromkeys(names):
            value = known[name]
            if not value.is_graph_input() and not value.is_graph_output():
                value.dtype = ir.DataType.FLOAT
                network.graph.outputs.append(value)
        path = out_dir / f"suspects-{label}.onnx"
        files.append((path, *onnx_files.write(network, path)[1]))
    powers = runs.compare(files[0][0], files[1][0], taken, pairs)
    for file in (file for written in files for file in written):
        file.unlink()
    return _largest_falls(networks[0].graph, {name: power.sqnr_db for name, power in powers.items()})


def _largest_falls(graph: ir.Graph, sqnr_db: Mapping[str, float]) -> str:
    level: dict[ir.Value | None, float] = {
        value: min(sqnr_db.get(str(value.name), _CEILING_DB), _CEILING_DB) for value in graph.inputs
    }
    falls = [(_CEILING_DB - level[value], _CEILING_DB, str(value.name)) for value in graph.inputs]
    for node in graph:
        before = min((level.get(value, _CEILING_DB) for value in node.inputs), default=_CEILING_DB)
        for output in node.outputs:
            after = min(sqnr_db.get(str(output.name), before), _CEILING_DB)
            level[output] = after
            falls.append((before - after, before, str(output.name)))
    falls.sort(key=lambda fall: -fall[0])
    worst = [fall for fall in falls[:SUSPECTS] if fall[0] > 0] or falls[:1]
    return ", ".join(f"'{name}' ({before:.1f} to {before - fall:.1f} dB)" for fall, before, name in worst)

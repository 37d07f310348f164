"""``method = "auto"``: for each activation the range with the least measured error of the model's outputs.

What a method loses depends on what reads the tensor: clipping a tail that a logit is made of costs 10 dB, clipping one that a
pool averages away costs nothing; no error of the tensor itself tells. So the outputs are measured: one model, in which every
grid is an input, is run on a few calibration samples with the ranges that minmax, percentile, entropy and mse propose.

First each method serves all tensors. From the best of these, tensor by tensor, those on which the methods disagree most first,
the other proposals are tried, and kept where the error falls: coordinate descent, as in Nagel et al. 2021, A White Paper on
Neural Network Quantization, section 3.5 (arXiv:2106.08295), but on the loss itself. How many are tried is bounded by a number of
multiplications, not by time, so that the same data give the same ranges.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import onnx_ir as ir

from compiler import onnx_files
from compiler.data import Samples
from compiler.quantize import qdq, switches, thresholds
from compiler.quantize.formats import Grid
from compiler.quantize.observe import Observed, batches, chosen, largest_batch
from compiler.quantize.placement import Placement
from compiler.spec import Array, CalibrationSet, Feeds, OnnxModel, OpenModel, Runner

METHODS = ("minmax", "mse", "entropy", "percentile")

FEWEST_SAMPLES, FEWEST_ROWS = 4, 16
"""No fewer rows of the outputs are compared by. What ResNet-50 makes of a sample is one row: by 4 of them ``percentile`` was best
for all, 1.7 dB behind ``mse`` on samples that chose nothing; by 16 it is ``mse``. Of a sequence every position is a row."""

SAMPLES = 32
"""Of 16 samples of the digits network a few make most of the error: what was chosen by them was 0.7 dB behind ``mse`` for all."""

BATCH_MACS = 1e9
"""Samples that are run together take no more than this: in longer runs the call itself hardly counts."""

MOST_MACS = 4e11
"""Multiplications that all trials together may take; each method is tried at least once, whatever it takes."""

LARGEST_BYTES = 256 << 20
"""Of a model: trials hold it twice in FP32 in memory."""

_LEAST_FALL = 0.03
"""A proposal must lower the error by this share, and raise it on neither half of the samples: anything else is as likely chance.
Measured on the digits network, on samples that chose nothing: with 0.005 and no halves it fell behind ``mse`` for all."""

_SAME = 0.02
"""Grids whose scales differ by less are one proposal."""


class Trials:
    """Where ranges are tried: samples, and what opens models."""

    def __init__(
        self, original: OnnxModel, data: CalibrationSet, open_model: OpenModel, *, threads: int, out_dir: Path
    ) -> None:
        self._original, self._stored, self._open_model = original, Samples(data.path), open_model
        self._threads, self._out_dir = threads, out_dir

    def samples(self, count: float) -> list[int]:
        """Which to try ranges on, where ``count`` can be afforded."""
        alone = any(len(spec.shape) <= 2 for spec in self._original.outputs)
        fewest = FEWEST_ROWS if alone else FEWEST_SAMPLES
        return chosen(len(self._stored), int(np.clip(count, fewest, SAMPLES)))

    def error_of(self, network: ir.Model, indices: Sequence[int], *, batch: int, centred: bool) -> Trial:
        """``network`` beside the original, on these samples, up to ``batch`` of them run together."""
        limit = min(batch, largest_batch(self._original))
        feeds = [self._stored.batch(taken) for taken in batches(self._stored, indices, limit)]
        return Trial(
            feeds, self._open_model, self._threads, self._out_dir, self._original.path, network, centred=centred
        )


class Trial:
    """A model whose grids are inputs, beside the original; a context manager."""

    def __init__(
        self,
        feeds: Sequence[Feeds],
        open_model: OpenModel,
        threads: int,
        out_dir: Path,
        original: Path,
        network: ir.Model,
        *,
        centred: bool,
    ) -> None:
        """
        Args:
            centred: count no error that is the same for all samples, in outputs [batch, C]: biases will take it back.
        """
        self._centred = centred
        path = out_dir / "trial.onnx"
        self._files = (path, *onnx_files.write(network, path)[1])
        self._feeds = feeds
        with closing(open_model(original, threads=threads)) as runner:
            self._exact = [_floats(runner.run(feeds)) for feeds in self._feeds]
        self._runner: Runner = open_model(path, threads=threads)
        self.runs = 0

    def __enter__(self) -> Trial:
        return self

    def __exit__(self, *_: object) -> None:
        self._runner.close()
        for file in self._files:
            file.unlink()

    def error(self, given: Feeds) -> Array:
        """Power of the difference at the grids ``given``, in shares of the output's own over all samples, summed over float
        outputs: float64 [2], of every other run and of the rest."""
        self.runs += 1
        noise = {name: np.zeros(2) for name in self._exact[0]}
        signal = dict.fromkeys(noise, 0.0)
        means = {name: (_Mean(), _Mean()) for name in noise}
        for place, (feeds, exact) in enumerate(zip(self._feeds, self._exact, strict=True)):
            found = self._runner.run({**feeds, **given})
            for name, values in exact.items():
                finite = np.isfinite(values)
                difference = found[name][finite].astype(np.float64) - values[finite]
                noise[name][place % 2] += np.sum(difference**2)
                if self._centred and values.ndim == 2 and finite.all():
                    means[name][place % 2].add(difference.reshape(values.shape))
                signal[name] += float(np.sum(values[finite].astype(np.float64) ** 2))
        for name, both in means.items():
            noise[name] -= [mean.power() for mean in both]
        halves = sum((noise[name] / signal[name] for name in signal if signal[name] > 0), np.zeros(2))
        return np.where(np.isfinite(halves), halves, np.inf)


class _Mean:
    """Of rows, and what they would be less by without it."""

    def __init__(self) -> None:
        self._total, self._rows = np.zeros(()), 0

    def add(self, rows: Array) -> None:
        self._total = self._total + rows.sum(axis=0)
        self._rows += len(rows)

    def power(self) -> float:
        return float(np.sum(self._total**2)) / max(self._rows, 1)


def _floats(outputs: Feeds) -> dict[str, Array]:
    return {name: values for name, values in outputs.items() if values.dtype.kind == "f"}


def proposals(
    placed: Placement, observed: Observed, *, percentile: float, symmetric: bool
) -> dict[str, dict[str, Grid]]:
    """By activation (its root) and method the grid, of those activations on which methods disagree.

    Raises:
        CalibrationError: one of them was not observed.
    """
    found: dict[str, dict[str, Grid]] = {}
    for value in dict.fromkeys(placed.root[value] for value in placed.activations):
        root, statistics = str(value.name), qdq.range_of(placed, value, observed)
        if statistics is None or statistics.bins is None:
            continue
        by_method = {
            method: thresholds.grid(statistics, method=method, percentile=percentile, symmetric=symmetric)
            for method in METHODS
        }
        if not _same(*by_method.values()):
            found[root] = by_method
    return found


def choose(
    network: ir.Model,
    placed: Placement,
    grid_of: Mapping[str, Grid],
    proposed: Mapping[str, Mapping[str, Grid]],
    trials: Trials,
    *,
    macs: float,
    centred: bool,
) -> tuple[dict[str, str], list[str]]:
    """By activation (its root) the method whose range serves best, of those in ``proposed``; and notes.

    Args:
        network: a copy of the model that is to be rounded; it is changed.
        placed: of ``network``.
        grid_of: the grid of every activation, by name; those in ``proposed`` are replaced.
        proposed: as of `proposals`.
        trials: where they are tried.
        macs: multiplications for one sample.
        centred: as of `Trial`.
    """
    grid_of_root = {str(placed.root[value].name): grid_of[str(value.name)] for value in placed.activations}
    inputs = switches.write_with_grids(network.graph, placed)
    wanted = sum(len(_others(by_method, None)) for by_method in proposed.values())
    affordable = MOST_MACS / max(macs, 1.0)
    indices = trials.samples(affordable / max(wanted, 1))
    most = max(int(affordable / max(len(indices), 1)), len(METHODS))
    batch = max(int(BATCH_MACS / max(macs, 1.0)), 1)
    with trials.error_of(network, indices, batch=batch, centred=centred) as trial:

        def error(methods: Mapping[str, str]) -> Array:
            grids = {**grid_of_root, **{root: proposed[root][method] for root, method in methods.items()}}
            return trial.error(switches.grid_feeds(inputs, grids))

        uniform = {method: error(dict.fromkeys(proposed, method)) for method in METHODS}
        best = min(uniform, key=lambda method: float(uniform[method].sum()))
        methods, least = dict.fromkeys(proposed, best), uniform[best]
        tried = 0
        for root in _most_disputed_first(proposed):
            if trial.runs >= most:
                break
            tried += 1
            for method in _others(proposed[root], methods[root]):
                found = error({**methods, root: method})
                if found.sum() < least.sum() * (1 - _LEAST_FALL) and (found <= least).all():
                    methods[root], least = method, found
    notes = [
        f"ranges by measured error on {len(indices)} calibration samples: "
        + ", ".join(f"{count} {method}" for method, count in _counts(methods.values()))
        + f"; all {best}: {_db(uniform[best].sum())}, as chosen: {_db(least.sum())}"
    ]
    if tried < len(proposed):
        notes.append(
            f"{len(proposed) - tried} of {len(proposed)} activations took the method that serves all best: trying each "
            "would have cost too much"
        )
    return methods, notes


def _same(*grids: Grid) -> bool:
    scales = [grid.scale for grid in grids]
    return bool(max(scales) <= (1 + _SAME) * min(scales))


def _others(by_method: Mapping[str, Grid], than: str | None) -> list[str]:
    """The methods whose grids differ from that of ``than`` and from one another."""
    seen = [] if than is None else [by_method[than]]
    others = []
    for method, grid in by_method.items():
        if not any(_same(grid, known) for known in seen):
            seen.append(grid)
            others.append(method)
    return others


def _most_disputed_first(proposed: Mapping[str, Mapping[str, Grid]]) -> Iterator[str]:
    def dispute(root: str) -> float:
        scales = [grid.scale for grid in proposed[root].values()]
        return float(max(scales) / min(scales))

    yield from sorted(proposed, key=dispute, reverse=True)


def _counts(methods: Iterable[str]) -> list[tuple[str, int]]:
    listed = list(methods)
    return [(method, listed.count(method)) for method in METHODS if method in listed]


def _db(share: float) -> str:
    return f"{-10 * np.log10(share):.1f} dB" if share > 0 else "exact"

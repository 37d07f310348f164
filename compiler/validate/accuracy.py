"""Score an engine against the original on the validation set: the user's own measures, and generic ones.

The engine runs through the set in batches of the batch axis's optimum; what comes out is compared with what the original
put out for the same sample, output by output, by name.

Why both sides' outputs stay in memory where the user has measures: a measure may look at the whole set at once (retrieval
does). That costs as much memory as the outputs of the engine and of the original together, once more while they are
stacked. Without such measures nothing is kept but one number per sample and metric.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compiler import metrics as generic
from compiler.data import Samples
from compiler.errors import ArtifactError, BuildEngineError, BuildError, CalibrationError, RecipeError
from compiler.recipe import GENERIC_METRICS, SIZE_METRICS, SPEED_METRICS, dims
from compiler.source import call_user, shown
from compiler.spec import (
    Array,
    Engine,
    Outputs,
    Progress,
    Runner,
    Score,
    Scores,
    TensorSpec,
    ValidationSet,
    batch_axis,
    no_progress,
)
from compiler.validate import statistics

Measure = Callable[[Any, Any], Any]
Floats = NDArray[np.float64]
Rows = list[Array]

WORST = 20
"""Ids of samples that a score lists."""

_SKEWED = 0.2
"""Share of the interval's width by which skewness may move a bound before a note says so."""


def score(
    engine: Engine,
    runner: Runner,
    data: ValidationSet,
    original: Outputs,
    *,
    metrics: Mapping[str, Measure],
    losses: Mapping[str, Measure],
    agreements: Mapping[str, Measure],
    progress: Progress = no_progress,
) -> Scores:
    """Scores of one engine, each paired with the original's on the same samples.

    ``metrics`` (higher is better) and ``losses`` (lower is better) are called as ``f(outputs, labels)`` once for the
    engine and once for the original, ``agreements`` as ``f(engine's outputs, original's outputs)``; see
    `compiler.metrics` for what they get. A measure is binary where it gives only 0 and 1, whatever their dtype. To these
    come the generic agreements of `compiler.metrics`: ``cosine``, ``sqnr_db`` and ``max_abs_diff`` where there is a float
    output, ``top1_agreement`` where there is a decision.

    Samples for which the engine puts out NaN or Inf and the original does not, or for which a measure of the engine's
    outputs is NaN or Inf, become ``bad_samples``, and scores are taken over the others. Measures of the user's are not
    asked about outputs that hold such a sample: many could not answer, and leaving it out may tear a pair apart.

    Raises:
        RecipeError: a measure raises, does not give one finite number per sample, has a reserved name, or needs labels
            that the set lacks.
        CalibrationError: the original's output for a sample holds no finite number.
        BuildError: the engine does not run, or its outputs are not those of the original in name or shape.
        ArtifactError: the stored outputs are not those of this validation set.
    """
    samples, reference = Samples(data.path), Samples(original.path)
    _check_sets(data, original, samples, reference)
    _check_measures(metrics, losses, agreements, labelled=samples.labelled)
    seen = _compare(engine, runner, samples, reference, keep=bool(metrics or losses or agreements), progress=progress)
    bad = seen.bad.copy()
    scores: list[Score] = []

    def kept(values: NDArray[Any]) -> NDArray[np.intp]:
        """Indices at which the engine's values are numbers; the others are bad from now on."""
        bad[~np.isfinite(values)] = True
        return np.flatnonzero(np.isfinite(values))

    if not bad.any() and (metrics or losses or agreements):
        new, old, labels = _stacked(seen.new), _stacked(seen.old), samples.labels()
        of_engine = f"the outputs of engine '{engine.name}'"
        for kind, measures in (("metric", metrics), ("loss", losses)):
            for name, function in measures.items():
                what = f"{kind} '{name}'"
                before = _call(function, what, "the original's outputs", old, labels, len(samples))
                _check_finite(before, function, what)
                after = _call(function, what, of_engine, new, labels, len(samples))
                if len(ids := kept(after)):
                    scores.append(_paired(name, kind == "metric", after[ids], before[ids], ids, len(samples)))
        for name, function in agreements.items():
            after = _call(function, f"agreement '{name}'", f"{of_engine} and the original's", new, old, len(samples))
            if len(ids := kept(after)):
                binary = after.dtype == bool or _is_right_or_wrong(after[ids])
                scores.append(_agreement(name, True, after[ids], ids, len(samples), binary=binary))
    if len(ids := np.flatnonzero(~seen.bad)):
        for name, values in seen.agreements.items():
            higher, binary = name != "max_abs_diff", name == "top1_agreement" and seen.single_decision
            scores.append(_agreement(name, higher, values[ids], ids, len(samples), binary=binary))
    return Scores(
        engine=engine.name,
        engine_sha256=engine.sha256,
        data_sha256=data.sha256,
        scores=tuple(scores),
        bad_samples=tuple(int(index) for index in np.flatnonzero(bad)),
    )


# --- running --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Seen:
    """What running through the set left."""

    bad: NDArray[np.bool_]
    """[N], whether the engine's outputs are NaN or Inf where the original's are not."""
    agreements: dict[str, Floats]
    """The generic ones, [N]; meaningless where ``bad``."""
    single_decision: bool
    new: dict[str, Rows]
    """The engine's outputs, one array per sample; empty where nobody will look at them."""
    old: dict[str, Rows]


def noise_share(engine: Engine, runner: Runner, data: ValidationSet, original: Outputs, *, samples: int) -> float:
    """Power of the difference from the original's outputs in shares of their own, of the worst float output.

    Over up to ``samples`` samples, evenly spaced: ``sum((new - old)^2) / sum(old^2)``; infinite where a difference is no
    number. 0 where there is no float output.

    Raises:
        BuildError: the engine does not run, or its outputs are not those of the original in name or shape.
    """
    stored, reference = Samples(data.path), Samples(original.path)
    _check_sets(data, original, stored, reference)
    wanted = {place * len(stored) // samples for place in range(samples)} if len(stored) > samples else None
    signal: dict[str, float] = {}
    noise: dict[str, float] = {}
    for indices in _batches(engine, stored, wanted):
        new, old = _run(engine, runner, stored, indices, reference.names), _original(engine, reference, indices)
        for name in reference.names:
            for x, y in zip(new[name], old[name], strict=True):
                if y.dtype.kind == "f" and np.isfinite(y).all():
                    signal[name] = signal.get(name, 0.0) + float(np.sum(y.astype(np.float64) ** 2))
                    noise[name] = noise.get(name, 0.0) + float(np.sum((x.astype(np.float64) - y) ** 2))
    worst = max((noise[name] / signal[name] for name in signal if signal[name] > 0), default=0.0)
    return worst if np.isfinite(worst) else np.inf


def _compare(
    engine: Engine, runner: Runner, samples: Samples, reference: Samples, *, keep: bool, progress: Progress
) -> _Seen:
    count, names = len(samples), reference.names
    first = reference.feeds(0)
    floats = [name for name in names if generic.is_float(first[name])]
    decisions = _decisions(engine.outputs, floats, names)
    bad, single, done = np.zeros(count, bool), True, 0
    agreements: dict[str, Floats] = {}
    kept_new: dict[str, Rows] = {name: [np.empty(0)] * count for name in names} if keep else {}
    kept_old: dict[str, Rows] = {name: [np.empty(0)] * count for name in names} if keep else {}
    for indices in _batches(engine, samples):
        new = _run(engine, runner, samples, indices, names)
        old = _original(engine, reference, indices)
        _check_ranks(engine, new, old, indices)
        for name in floats:
            for index, x, y in zip(indices, new[name], old[name], strict=True):
                bad[index] |= _broken(x, y)
        batch_new, batch_old = _stacked(new), _stacked(old)
        found: dict[str, NDArray[Any]] = {}
        if floats:
            found |= generic.distances(batch_new, batch_old)._asdict()
        if decisions:
            found["top1_agreement"] = generic.top1_agreement(batch_new, batch_old, over=decisions)
            single &= found["top1_agreement"].dtype == bool
        for name, values in found.items():
            agreements.setdefault(name, np.zeros(count))[indices] = values
        for name in kept_new:
            for row, index in enumerate(indices):
                kept_new[name][index], kept_old[name][index] = new[name][row], old[name][row]
        done += len(indices)
        progress(done, count)
    _check_original(agreements, bad)
    return _Seen(bad=bad, agreements=agreements, single_decision=single, new=kept_new, old=kept_old)


def _batches(engine: Engine, samples: Samples, wanted: Collection[int] | None = None) -> Iterator[list[int]]:
    """Indices of every sample (of those in ``wanted``) once; those of equal shapes together, at most the batch axis's optimum."""
    axis = batch_axis(engine.inputs)
    stackable = axis is not None and all(axis in spec.shape for spec in (*engine.inputs, *engine.outputs))
    size = engine.axes[axis].opt if axis is not None and stackable else 1
    alike: dict[tuple[tuple[int, ...], ...], list[int]] = {}
    for index in range(len(samples)) if wanted is None else sorted(wanted):
        group = alike.setdefault(tuple(samples.shapes(index).values()), [])
        group.append(index)
        if len(group) == size:
            yield list(group)
            group.clear()
    yield from (group for group in alike.values() if group)


def _run(
    engine: Engine, runner: Runner, samples: Samples, indices: Sequence[int], names: Sequence[str]
) -> dict[str, Rows]:
    """The engine's outputs for some samples: for every output one array per sample, without its batch axis."""
    axis = batch_axis(engine.inputs)
    least = engine.axes[axis].min if axis is not None else 1
    padded = [*indices, *[indices[-1]] * (least - len(indices))]
    outputs = runner.run(samples.batch(padded) if axis is not None else samples.feeds(indices[0]))
    if outputs.keys() != set(names):
        raise BuildError(
            f"engine '{engine.name}': found outputs {', '.join(outputs)}; the original's {', '.join(names)} were expected. "
            "Build it again."
        )
    specs = {spec.name: spec for spec in engine.outputs}
    rows: dict[str, Rows] = {}
    for name in names:
        position = _position(engine, specs[name])
        value = outputs[name]
        if position is None:
            rows[name] = [value]
        elif value.ndim <= position or value.shape[position] != len(padded):
            raise BuildError(
                f"engine '{engine.name}': output '{name}' has shape {dims(value.shape)} for a batch of {len(padded)}; "
                f"{dims(specs[name].shape)} was expected. Build it again."
            )
        else:
            rows[name] = [np.asarray(value.take(row, axis=position)) for row in range(len(indices))]
    return rows


def _original(engine: Engine, reference: Samples, indices: Sequence[int]) -> dict[str, Rows]:
    """What the original put out for the same samples, in the same form."""
    positions = {spec.name: _position(engine, spec) for spec in engine.outputs}
    rows: dict[str, Rows] = {name: [] for name in reference.names}
    for index in indices:
        for name, value in reference.feeds(index).items():
            position = positions[name]
            rows[name].append(value if position is None else np.asarray(value.take(0, axis=position)))
    return rows


def _position(engine: Engine, output: TensorSpec) -> int | None:
    """Where an output has its batch axis; 0 where the model's batch size is fixed at 1, None where it has none."""
    axis = batch_axis(engine.inputs)
    if axis is None:
        return 0 if output.shape and output.shape[0] == 1 else None
    return output.shape.index(axis) if axis in output.shape else None


def _broken(new: Array, old: Array) -> bool:
    """Whether one sample's output holds NaN or Inf where the original's does not."""
    if new.shape == old.shape:
        return bool(generic.unmatched(new, old).any())
    return not bool(np.isfinite(new.astype(np.float64)).all())


def _stacked(rows: Mapping[str, Rows]) -> dict[str, Array | Rows]:
    """Samples of each output as one array [N, ...] where their shapes are equal.

    Read-only: a measure that worked in place would change what the next one sees.
    """
    stacked: dict[str, Array | Rows] = {}
    for name, values in rows.items():
        alike = len({value.shape for value in values}) == 1
        together = [np.stack(values)] if alike else [np.asarray(value) for value in values]
        for value in together:
            value.flags.writeable = False
        stacked[name] = together[0] if alike else together
    return stacked


def _decisions(outputs: Sequence[TensorSpec], floats: Sequence[str], names: Sequence[str]) -> list[str]:
    """As `compiler.metrics.decisions`, from what is declared: one sample may have a single box."""
    shapes = {spec.name: spec.shape for spec in outputs}
    first = [name for name in floats[:1] if len(shapes[name]) > 1 and shapes[name][-1] != 1]
    return first + [name for name in names if name not in floats]


# --- the user's measures --------------------------------------------------------------------------------------------


def _call(function: Measure, what: str, of: str, outputs: Any, other: Any, count: int) -> NDArray[Any]:
    """One number per sample, bool or float64."""

    def guarded() -> Any:
        try:
            return function(outputs, other)
        except BuildEngineError as exc:
            raise RecipeError(f"{_defined_at(function)}{what} on {of}: {exc.message}") from exc

    found = call_user(guarded, f"{what} on {of}", RecipeError)
    values = np.asarray(found.detach().cpu().numpy() if hasattr(found, "detach") else found)
    if values.shape != (count,) or values.dtype.kind not in "biuf":
        raise RecipeError(
            f"{_defined_at(function)}{what} on {of} gave {values.dtype} {dims(values.shape)}; one number per sample, "
            f"{dims((count,))}, was expected. Leave the mean to the report."
        )
    return values if values.dtype == bool else values.astype(np.float64)


def _defined_at(function: Measure) -> str:
    """``file:line: `` of a user's function; nothing for one of this package, or without source."""
    plain = inspect.unwrap(function.func if isinstance(function, functools.partial) else function)
    code = getattr(plain, "__code__", None) or getattr(type(plain).__call__, "__code__", None)
    if code is None or Path(code.co_filename).is_relative_to(Path(generic.__file__).parent):
        return ""
    return f"{shown(Path(code.co_filename))}:{code.co_firstlineno}: "


# --- scores ---------------------------------------------------------------------------------------------------------


def _paired(
    name: str, higher: bool, after: NDArray[Any], before: NDArray[Any], ids: NDArray[np.intp], count: int
) -> Score:
    new, old = after.astype(np.float64), before.astype(np.float64)
    change = new - old
    worse = -change if higher else change
    binary = bool(np.isin(new, (0.0, 1.0)).all() and np.isin(old, (0.0, 1.0)).all())
    return Score(
        metric=name,
        value=float(new.mean()),
        original=float(old.mean()),
        change=float(change.mean()),
        samples=len(new),
        binary=binary,
        higher_is_better=higher,
        lost=int((worse > 0).sum()) if binary else 0,
        gained=int((worse < 0).sum()) if binary else 0,
        change_sd=None if binary else _sd(change),
        value_sd=None if binary else _sd(new),
        worst=_worst(worse, ids, at_least=0.0),
        notes=_notes(change, len(new), count, binary),
    )


def _agreement(
    name: str, higher: bool, found: NDArray[Any], ids: NDArray[np.intp], count: int, *, binary: bool
) -> Score:
    new = found.astype(np.float64)
    return Score(
        metric=name,
        value=float(new.mean()),
        original=None,
        change=None,
        samples=len(new),
        binary=binary,
        higher_is_better=higher,
        value_sd=None if binary else _sd(new),
        worst=_worst(1.0 - new, ids, at_least=0.0) if binary else _worst(-new if higher else new, ids),
        notes=_notes(new, len(new), count, binary),
    )


def _is_right_or_wrong(values: Floats) -> bool:
    """Whether floats are 0 and 1, both; all ones may as well be cosines of equal outputs."""
    return set(np.unique(values)) == {0.0, 1.0}


def _sd(values: Floats) -> float | None:
    return float(values.std(ddof=1)) if len(values) > 1 else None


def _worst(badness: Floats, ids: NDArray[np.intp], at_least: float = -np.inf) -> tuple[int, ...]:
    """Ids of the samples that are worst, worst first, if they are worse than ``at_least``."""
    order = np.argsort(-badness, kind="stable")[:WORST]
    return tuple(int(ids[position]) for position in order if badness[position] > at_least)


def _notes(values: Floats, samples: int, count: int, binary: bool) -> tuple[str, ...]:
    notes = []
    if samples < count:
        notes.append(f"over the {samples} of {count} samples that are finite")
    if not binary and samples >= statistics.MIN_CONTINUOUS:
        share = statistics.skew_share(values)
        if share > _SKEWED:
            notes.append(f"a few samples weigh much: skewness moves the bounds by {share:.0%} of their distance")
    return tuple(notes)


# --- checks ---------------------------------------------------------------------------------------------------------


def _check_sets(data: ValidationSet, original: Outputs, samples: Samples, reference: Samples) -> None:
    if original.data_sha256 != data.sha256 or samples.sha256 != data.sha256 or len(reference) != len(samples):
        raise ArtifactError(
            f"{original.path}: {len(reference)} outputs for data {original.data_sha256[:12]} were found; "
            f"{len(samples)} for data {data.sha256[:12]} were expected. Run again without the cache: --no-cache."
        )


def _check_measures(
    metrics: Mapping[str, Measure], losses: Mapping[str, Measure], agreements: Mapping[str, Measure], *, labelled: bool
) -> None:
    seen: dict[str, str] = dict.fromkeys(GENERIC_METRICS | SPEED_METRICS | SIZE_METRICS, "this program")
    for kind, measures in (("metrics", metrics), ("losses", losses), ("agreements", agreements)):
        for name, function in measures.items():
            if not callable(function):
                raise RecipeError(
                    f"{kind}['{name}']: found {type(function).__name__}; a function (outputs, "
                    f"{'original' if kind == 'agreements' else 'labels'}) was expected."
                )
            if name in seen:
                raise RecipeError(
                    f"{_defined_at(function)}{kind}['{name}']: the name is taken by {seen[name]}; "
                    "a name of its own was expected. Rename it."
                )
            seen[name] = kind
            if kind != "agreements" and not labelled:
                raise RecipeError(
                    f"{_defined_at(function)}{kind}['{name}']: validation() yields no labels; a label for every sample "
                    "was expected. Yield (feeds, labels), or remove the measure."
                )


def _check_ranks(engine: Engine, new: Mapping[str, Rows], old: Mapping[str, Rows], indices: Sequence[int]) -> None:
    for name, rows in new.items():
        for index, x, y in zip(indices, rows, old[name], strict=True):
            if x.ndim != y.ndim:
                raise BuildError(
                    f"engine '{engine.name}': output '{name}' of validation sample {index} has shape {dims(x.shape)}; "
                    f"the original's has {dims(y.shape)}. Build it again."
                )


def _check_original(values: Mapping[str, Floats], bad: NDArray[np.bool_]) -> None:
    distances = values.get("max_abs_diff")
    if distances is None:
        return
    broken = np.flatnonzero(~np.isfinite(distances) & ~bad)
    if len(broken):
        raise CalibrationError(
            f"validation sample {broken[0]}: an output of the original holds no finite number; numbers were expected. "
            f"Repair the model, or leave out the sample ({len(broken)} of {len(distances)} are like this)."
        )


def _check_finite(values: NDArray[Any], function: Measure, what: str) -> None:
    broken = np.flatnonzero(~np.isfinite(values))
    if len(broken):
        raise RecipeError(
            f"{_defined_at(function)}{what} on the original's outputs gave NaN or Inf for {len(broken)} of {len(values)} "
            f"samples, the first is {broken[0]}; finite numbers were expected. Correct the measure, or leave the samples out."
        )

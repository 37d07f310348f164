"""Choose by measurement which layers of a quantised engine stay in higher precision.

1. FP32 and the engine with every layer rounded are built and scored on the selection samples. If the second keeps within
   the budget, nothing is kept.
2. Else the noise of each group of layers is measured: one model per group, in which it alone is rounded (to nearest, where
   one model with switches does for all: it only ranks them). Noises of independent roundings add up, so groups are kept in
   the order of noise per millisecond (or byte) that keeping saves: the greedy solution of a knapsack, as in Hessian-aware
   mixed precision, but with measured noise in place of a Hessian (Dong et al. 2020, HAWQ-V2, arXiv:1911.03852; Nagel et al.
   2021, section 3.4, arXiv:2106.08295).
3. The shortest beginning of that order that keeps within the budget is found by bisection, begun where noise that adds up
   and losses that are proportional to it would have it, and then thinned: groups that turn out not to be needed go back to
   the narrow format.
4. What is worth it is timed, interleaved, on the real back end, and the fastest that keeps within the budget is chosen;
   if it is not faster than FP32, FP32 is.

Whether a point keeps within the budget is judged like gates are, with their confidence, on samples that no gate sees.
Where the selection samples are too few for that even for FP32 itself, measured values are compared instead, and a note
says so. Every measurement is written to a journal: a search that was interrupted goes on where it was.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from compiler.quantize.groups import Group, merged
from compiler.recipe import GateSection, SearchSection
from compiler.spec import (
    Engine,
    OnnxModel,
    Outcome,
    Precision,
    Progress,
    Runner,
    Scores,
    Search,
    SearchPoint,
    ValidationSet,
    Verdict,
)

SHARE_OF_NOISE = 0.4
"""At most this share of the time goes to the noise of single groups; where it would take longer, neighbours are merged."""

SHARE_OF_TIMING = 0.15
"""This share of the time is left for latency."""

NOISE_SAMPLES, NOISE_SAMPLES_ALONE = 16, 8
"""Samples for the noise of a mixture, and for that of each group alone, which only ranks them."""

_MOST_NOISE = 1e30
"""What stands for infinity: JSON has none."""

_MARGIN = 0.9
"""A mixture is expected to keep within the budget with this share of the noise that it tolerates: the budget is to be kept with
confidence."""

TIMED = 4
"""Points that are timed, FP32 and the chosen among them."""

KEPT_BYTES = 1 << 30
"""Engines of points stay on disk up to this size, all together: those that are timed need not be made again."""


class Workshop(Protocol):
    """What makes and measures engines: the stages, as the pipeline hands them in."""

    def plain(self, precision: Precision, out_dir: Path) -> OnnxModel:
        """The model in a precision that needs no calibration."""

    def mix(self, keep: Sequence[str], out_dir: Path) -> OnnxModel:
        """The model with every layer rounded but ``keep``; `CalibrationError` where nothing is left to round."""

    def build(self, model: OnnxModel, out_dir: Path) -> Engine: ...

    def open(self, engine: Engine) -> Runner: ...

    def score(self, engine: Engine, runner: Runner) -> Scores:
        """The measures that the budget names, on the selection samples."""

    def noise(self, engine: Engine, runner: Runner, samples: int) -> float:
        """See `compiler.validate.accuracy.noise_share`."""

    def noise_of_each(self, groups: Sequence[Group], samples: int) -> list[float] | None:
        """What `noise` says of a model in which one group alone is rounded, for each; None where that is not to be had
        without building each of them."""

    def judge(self, engine: Engine, scores: Scores) -> Verdict: ...

    def time(self, runners: Mapping[str, Runner], limit_s: float) -> Mapping[str, Mapping[int, tuple[float, float]]]:
        """By name and batch size ``(speed-up over the first, p50 in ms)``, in about ``limit_s``; nothing where engines
        cannot run here."""


@dataclass(kw_only=True, eq=False)
class _Tried:
    """One mixture that was scored."""

    precision: Precision
    keep: frozenset[str]
    measured: dict[str, float]
    outcome: Outcome
    within_as_measured: bool
    """Whether the measured values, without regard to confidence, are within the budget."""
    noise: float
    size_bytes: int
    opened: Callable[[], AbstractContextManager[tuple[Engine, Runner]]]
    timing: Mapping[int, tuple[float, float]] = field(default_factory=dict)


class _Journal:
    """Measurements, one JSON line each, in a file that outlives the process."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._entries: dict[str, Any] = {}
        self.spent_s = 0.0
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            for line in path.read_bytes().splitlines():
                try:
                    entry = json.loads(line)
                    self._entries[entry["key"]] = entry["value"]
                    self.spent_s += entry["seconds"]
                except (ValueError, KeyError, TypeError):
                    continue  # the line that a crash cut off

    def fetch(self, key: str, make: Callable[[], Any]) -> Any:
        """The value of ``key``: known, or made, timed and written down."""
        if key not in self._entries:
            started = time.monotonic()
            value = make()
            seconds = time.monotonic() - started
            self._entries[key] = value
            self.spent_s += seconds
            line = json.dumps({"key": key, "value": value, "seconds": round(seconds, 3)}).encode() + b"\n"
            with self._path.open("ab") as file:
                file.write(b"\n" + line)  # after what a crash may have left of a line
                file.flush()
                os.fsync(file.fileno())
        return self._entries[key]

    def remove(self) -> None:
        self._path.unlink(missing_ok=True)


def search(
    label: str,
    section: SearchSection,
    budget: Sequence[GateSection],
    groups: Sequence[Group],
    data: ValidationSet,
    workshop: Workshop,
    *,
    rivals: Sequence[Precision],
    journal: Path,
    out_dir: Path,
    progress: Progress,
) -> Search:
    """The search for one engine; see the top.

    Args:
        label: the engine's name.
        section: ``[search]``.
        budget: the limits, as of `SearchSection.budget_of`.
        groups: what may stay in higher precision, as of `compiler.quantize.groups`.
        data: samples to select by; with labels where the budget needs them.
        workshop: makes and measures.
        rivals: precisions without rounding that the engine must beat, FP32 first.
        journal: where measurements are kept while the search lasts.
        out_dir: an empty folder; left empty.
        progress: told the seconds spent, and all there are.

    Raises:
        CalibrationError: nothing can be rounded at all.
    """
    run = _Run(
        section=section,
        budget=budget,
        workshop=workshop,
        data=data,
        journal=_Journal(journal),
        folder=out_dir,
        progress=progress,
    )
    try:
        return _search(label, groups, rivals, run)
    finally:
        shutil.rmtree(run.scratch, ignore_errors=True)


def _search(label: str, groups: Sequence[Group], rivals: Sequence[Precision], run: _Run) -> Search:
    plain = [run.rival(precision) for precision in rivals]
    notes = []
    if run.by_value:
        notes.append(
            f"{run.data.samples} selection samples cannot show the budget at its confidence even of FP32: measured values "
            "were compared. Give [search] more samples, or selection() more to yield."
        )
    base = run.mixture(frozenset())
    best = base if run.within(base) else None
    if best is None:
        order, more = run.ranked(groups, base)
        notes += more
        best = run.shortest(order, base)
        if best is not None:
            best = run.thinned(best, order)
    run.time_finalists(plain, base, best)
    chosen, reason = _chosen(run, plain, best)
    if run.left_out:
        notes.append(f"{run.section.minutes:g} minutes were over before {run.left_out}")
    return Search(
        engine=label,
        points=_points(run, layers=sum(len(group.keep) for group in groups)),
        chosen=list(run.tried.values()).index(chosen),
        reason=reason,
        budget=tuple(gate.describe() for gate in run.budget),
        samples=run.data.samples,
        data_sha256=run.data.sha256,
        seconds=round(run.journal.spent_s, 1),
        notes=tuple(notes),
    )


class _Run:
    """What a search knows so far."""

    def __init__(
        self,
        *,
        section: SearchSection,
        budget: Sequence[GateSection],
        workshop: Workshop,
        data: ValidationSet,
        journal: _Journal,
        folder: Path,
        progress: Progress,
    ) -> None:
        self.section, self.budget, self.data, self.journal = section, budget, data, journal
        self.scratch = folder / "scratch"
        self.scratch.mkdir()
        self.tried: dict[str, _Tried] = {}
        self.left_out = ""
        self._workshop = workshop
        self._progress = progress
        self._alone: dict[Group, float] = {}
        """The noise that rounding a group alone leaves."""
        self._limit_s = 60 * section.minutes
        self._longest_s = 0.0
        self._built: dict[str, Engine] = {}
        """What is kept of `KEPT_BYTES`."""

    # --- time -------------------------------------------------------------------------------------------------------

    @property
    def out_of_time(self) -> bool:
        """Whether another measurement would leave too little for latency."""
        return self.journal.spent_s + self._longest_s > self._limit_s * (1 - SHARE_OF_TIMING)

    def _measured(self, key: str, make: Callable[[], Any], *, usual: bool = True) -> Any:
        """
        Args:
            usual: whether the next measurement may take as long.
        """
        before = self.journal.spent_s
        value = self.journal.fetch(key, make)
        if usual:
            self._longest_s = max(self._longest_s, self.journal.spent_s - before)
        self._progress(min(int(self.journal.spent_s), int(self._limit_s)), int(self._limit_s))
        return value

    # --- scores -----------------------------------------------------------------------------------------------------

    @property
    def by_value(self) -> bool:
        """Whether even FP32 cannot be shown to keep within the budget: then measured values count."""
        return next(iter(self.tried.values())).outcome is not Outcome.PASS

    def within(self, tried: _Tried) -> bool:
        return tried.within_as_measured if self.by_value else tried.outcome is Outcome.PASS

    def rival(self, precision: Precision) -> _Tried:
        return self._scored(precision.value, frozenset(), lambda folder: self._workshop.plain(precision, folder))

    def mixture(self, keep: frozenset[str]) -> _Tried:
        """The engine with every layer rounded but ``keep``."""
        return self._scored("mixed", keep, lambda folder: self._workshop.mix(sorted(keep), folder))

    def _scored(self, kind: str, keep: frozenset[str], make: Callable[[Path], OnnxModel]) -> _Tried:
        key = json.dumps([kind, sorted(keep)])
        if key in self.tried:
            return self.tried[key]

        opened = partial(self._opened, make, key)

        def measure() -> dict[str, Any]:
            with opened() as (engine, runner):
                scores = self._workshop.score(engine, runner)
                verdict = self._workshop.judge(engine, scores)
                named = {gate.metric for gate in self.budget}
                return {
                    "precision": engine.precision.value,
                    "measured": {score.metric: score.value for score in scores.scores if score.metric in named},
                    "outcome": verdict.outcome.value,
                    "as_measured": not scores.bad_samples and all(_within(gate, scores) for gate in self.budget),
                    "noise": self._noise(engine, runner),
                    "size_bytes": engine.size_bytes,
                }

        found = self._measured(key, measure)
        self.tried[key] = _Tried(
            precision=Precision(found["precision"]),
            keep=keep,
            measured=found["measured"],
            outcome=Outcome(found["outcome"]),
            within_as_measured=found["as_measured"],
            noise=found["noise"],
            size_bytes=found["size_bytes"],
            opened=opened,
        )
        return self.tried[key]

    def _noise(self, engine: Engine, runner: Runner) -> float:
        return min(self._workshop.noise(engine, runner, NOISE_SAMPLES), _MOST_NOISE)

    @contextmanager
    def _opened(self, make: Callable[[Path], OnnxModel], key: str | None = None) -> Iterator[tuple[Engine, Runner]]:
        """An engine in a folder of its own, gone afterwards; that of a point, of which there is a ``key``, if there is no room."""
        with ExitStack() as stack:
            engine = self._built.get(key) if key is not None else None
            if engine is None:
                folder = Path(tempfile.mkdtemp(dir=self.scratch))
                stack.callback(shutil.rmtree, folder, ignore_errors=True)
                for part in ("model", "engine"):
                    (folder / part).mkdir()
                engine = self._workshop.build(make(folder / "model"), folder / "engine")
                shutil.rmtree(folder / "model")
                kept_bytes = sum(kept.size_bytes for kept in self._built.values())
                if key is not None and kept_bytes + engine.size_bytes <= KEPT_BYTES:
                    self._built[key] = engine
                    stack.pop_all()
            yield engine, stack.enter_context(closing(self._workshop.open(engine)))

    # --- the order in which groups are kept -------------------------------------------------------------------------

    def _affordable(self, groups: Sequence[Group]) -> tuple[tuple[Group, ...], str]:
        """As many groups as there is time to measure one by one, and a note where neighbours had to be made one."""
        each_s = max(self._longest_s, 1e-3)
        count = max(int(SHARE_OF_NOISE * self._limit_s / each_s), 2)
        if count >= len(groups):
            return tuple(groups), ""
        units = merged(groups, count)
        return units, f"{len(groups)} groups of layers were measured as {len(units)}: one takes {each_s:.1f} s"

    def ranked(self, groups: Sequence[Group], base: _Tried) -> tuple[list[Group], list[str]]:
        """Groups, those first whose rounding adds most noise for what it saves; and notes on those not measured."""
        together = None
        if not self.out_of_time:
            key = json.dumps(["each alone", [sorted(group.keep) for group in groups]])
            together = self._measured(
                key, lambda: self._workshop.noise_of_each(groups, NOISE_SAMPLES_ALONE), usual=False
            )
        notes = []
        if together is not None:
            noise = {group: min(found, _MOST_NOISE) for group, found in zip(groups, together, strict=True)}
        else:
            groups, merges = self._affordable(groups)
            notes += [merges] if merges else []
            noise = self._noise_one_by_one(groups)
            missing = len(groups) - len(noise)
            if missing:
                notes.append(f"no time was left to measure the noise of {missing} of {len(groups)} groups alone")
        usual = base.noise / len(groups)
        self._alone = {group: noise.get(group, usual) for group in groups}
        saved = {group: group.weight_bytes if self.section.objective == "size" else group.macs for group in groups}
        return sorted(groups, key=lambda group: -self._alone[group] / max(saved[group], 1.0)), notes

    def _noise_one_by_one(self, groups: Sequence[Group]) -> dict[Group, float]:
        everything = frozenset(name for group in groups for name in group.keep)
        noise: dict[Group, float] = {}
        for group in groups:
            if self.out_of_time:
                break
            noise[group] = self._noise_alone(group, everything)
        return noise

    def _noise_alone(self, group: Group, everything: frozenset[str]) -> float:
        """The noise that rounding this group alone leaves."""
        keep = sorted(everything - set(group.keep))

        def measure() -> float:
            with self._opened(lambda folder: self._workshop.mix(keep, folder)) as (engine, runner):
                return self._noise(engine, runner)

        return float(self._measured(json.dumps(["alone", sorted(group.keep)]), measure))

    def shortest(self, order: Sequence[Group], base: _Tried) -> _Tried | None:
        """Of the mixtures that keep a beginning of ``order``, the shortest within the budget; None if none was found."""
        best, last = None, base
        low, high, guess = 1, len(order) - 1, True
        while low <= high:
            if self.out_of_time:
                self.left_out = "the shortest list of kept layers was found"
                break
            middle = self._expected(order, base, last, low, high) if guess else (low + high) // 2
            guess = not guess  # a guess may be off by one for ever, a half is not
            last = self.mixture(_names(order[:middle]))
            if self.within(last):
                best, high = last, middle - 1
            else:
                low = middle + 1
        return best

    def _expected(self, order: Sequence[Group], base: _Tried, last: _Tried, low: int, high: int) -> int:
        """Where the budget would be kept if what a mixture loses were proportional to its noise, as 1 - cosine is."""
        spent = self._spent(last)
        if not (math.isfinite(spent) and spent > 0 and base.noise < _MOST_NOISE):
            return (low + high) // 2
        tolerable, everything = last.noise / spent, sum(self._alone[group] for group in order)
        for count in range(low, high):
            left = sum(self._alone[group] for group in order[count:])
            if base.noise * left / max(everything, 1e-300) <= tolerable * _MARGIN:
                return count
        return high

    def _spent(self, tried: _Tried) -> float:
        """What a mixture loses against FP32, as a share of what the budget allows: the largest of all its limits."""
        exact = next(iter(self.tried.values())).measured
        shares = [0.0]
        for gate in self.budget:
            old, new = exact.get(gate.metric), tried.measured.get(gate.metric)
            limit = gate.min if gate.min is not None else gate.max
            if old is None or new is None:
                return math.nan
            allowed = gate.max_drop if gate.max_drop is not None else abs(old - (limit or 0.0))
            shares.append(abs(old - new) / allowed if allowed > 0 else math.inf)
        return max(shares)

    def thinned(self, best: _Tried, order: Sequence[Group]) -> _Tried:
        """``best`` without the groups that it need not keep, those tried first that cost most to keep."""
        kept = [group for group in order if set(group.keep) <= best.keep]
        by_size = self.section.objective == "size"
        for group in sorted(kept[:-1], key=lambda group: -(group.weight_bytes if by_size else group.macs)):
            if self.out_of_time:
                self.left_out = "every kept layer was tried without"
                break
            tried = self.mixture(best.keep - set(group.keep))
            if self.within(tried):
                best = tried
        return best

    # --- latency ----------------------------------------------------------------------------------------------------

    def time_finalists(self, plain: Sequence[_Tried], base: _Tried, best: _Tried | None) -> None:
        """Time FP32 and its rivals, what may be chosen, and what lies between, on one front of noise and kept layers."""
        between = sorted(
            (tried for tried in self.tried.values() if tried.keep and tried is not best),
            key=lambda tried: (not self.within(tried), len(tried.keep)),
        )
        finalists = [*plain, base, *([best] if best is not None and best is not base else []), *between]
        finalists = list(dict.fromkeys(finalists))[:TIMED]

        def measure() -> dict[str, dict[str, tuple[float, float]]]:
            with ExitStack() as stack:
                runners = {str(place): stack.enter_context(one.opened())[1] for place, one in enumerate(finalists)}
                left_s = self._limit_s - self.journal.spent_s
                taken = self._workshop.time(runners, max(left_s, self._limit_s * SHARE_OF_TIMING))
            return {name: {str(batch): pair for batch, pair in of.items()} for name, of in taken.items()}

        found = self._measured(json.dumps(["timed", [[one.precision, sorted(one.keep)] for one in finalists]]), measure)
        for place, one in enumerate(finalists):
            one.timing = {int(batch): (pair[0], pair[1]) for batch, pair in found.get(str(place), {}).items()}


def _names(groups: Sequence[Group]) -> frozenset[str]:
    return frozenset(name for group in groups for name in group.keep)


def _within(gate: GateSection, scores: Scores) -> bool:
    """Whether a measured value, without regard to its confidence, is within a limit."""
    score = next((score for score in scores.scores if score.metric == gate.metric), None)
    if score is None:
        return False
    if gate.max_drop is not None:
        change = score.change or 0.0
        return (-change if score.higher_is_better else change) <= gate.max_drop
    return score.value >= gate.min if gate.min is not None else score.value <= (gate.max or 0.0)


def _speed(tried: _Tried) -> float:
    """Speed-up over FP32: the geometric mean over batch sizes; 1 of what was not timed."""
    logs = [math.log(speedup) for speedup, _ in tried.timing.values()]
    return math.exp(sum(logs) / len(logs)) if logs else 1.0


def _chosen(run: _Run, plain: Sequence[_Tried], best: _Tried | None) -> tuple[_Tried, str]:
    """The point that becomes the engine, and why."""
    if best is None:
        return plain[0], "no mixture with a rounded layer was found within the budget: the engine stays FP32"
    mixtures = [tried for tried in run.tried.values() if tried not in plain and run.within(tried)]
    if run.section.objective == "size":
        smallest = min([*mixtures, *plain], key=lambda tried: tried.size_bytes)
        return smallest, f"the smallest of {len(mixtures)} mixtures within the budget"
    timed = [tried for tried in mixtures if tried.timing]
    if not timed:
        return best, "engines cannot run here: the mixture within the budget that keeps least in high precision"
    fastest = max(timed, key=_speed)
    rival = max((tried for tried in plain if run.within(tried)), key=_speed, default=plain[0])
    if _speed(fastest) <= _speed(rival):
        return rival, (
            f"no mixture within the budget is faster than {rival.precision.upper()}: the best takes "
            f"{_speed(rival) / _speed(fastest):.2f} times as long"
        )
    return fastest, (
        f"the fastest of {len(timed)} timed mixtures within the budget: {_speed(fastest):.2f} times as fast as FP32"
    )


def _points(run: _Run, *, layers: int) -> tuple[SearchPoint, ...]:
    tried = list(run.tried.values())
    timed = [one for one in tried if one.timing]

    def costs(one: _Tried) -> tuple[float, float, float]:
        return one.noise, 1 / _speed(one), one.size_bytes

    def beaten(one: _Tried) -> bool:
        mine = costs(one)
        return any(
            theirs != mine and all(a <= b for a, b in zip(theirs, mine, strict=True)) for theirs in map(costs, timed)
        )

    return tuple(
        SearchPoint(
            precision=one.precision,
            keep=tuple(sorted(one.keep)),
            kept_layers=len(one.keep),
            layers=layers,
            measured=one.measured,
            sqnr_db=-10 * math.log10(one.noise) if one.noise > 0 else None,
            within=run.within(one),
            size_bytes=one.size_bytes,
            speedup={str(batch): pair[0] for batch, pair in one.timing.items()},
            p50_ms={str(batch): pair[1] for batch, pair in one.timing.items()},
            on_front=bool(one.timing) and not beaten(one),
        )
        for one in tried
    )

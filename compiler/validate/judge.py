"""Gates to verdicts. Pure: everything was measured before, and a changed gate measures nothing again.

An engine fails with one failed gate, is undecided with one undecided gate, and passes otherwise; the first of its gates,
that no output is NaN or Inf, is there whatever the recipe says.

Why three outcomes: an engine that truly loses exactly the limit measures a loss below it half of the time. A gate passes
or fails only when the bound of what was measured does; what lies between is INCONCLUSIVE and names what would decide it.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import msgspec
import numpy as np

from compiler.errors import ArtifactError, RecipeError, suggest
from compiler.recipe import SIZE_METRICS, SPEED_METRICS, GateSection
from compiler.spec import Engine, GateResult, Latencies, Latency, Outcome, Score, Scores, Speed, StandIn, Verdict
from compiler.validate import estimates, statistics
from compiler.validate.estimates import Estimate

FINITE = "finite"
"""The gate that every engine has."""

RAN = "ran"
"""The gate of an engine that cannot run where it was built."""

_WORST_FIRST = (Outcome.FAIL, Outcome.INCONCLUSIVE, Outcome.DEFERRED, Outcome.PASS)

_PERCENTILES = {"p50_ms": 0.5, "p90_ms": 0.9, "p99_ms": 0.99}
_SHOWN_IDS = 20


@dataclass(frozen=True, kw_only=True)
class _Finding:
    outcome: Outcome
    reason: str
    measured: float | None = None
    low: float | None = None
    high: float | None = None
    samples_needed: int | None = None
    more_calls_help: bool = False


def judge(
    gates: Sequence[GateSection],
    engines: Sequence[Engine],
    scores: Mapping[str, Scores],
    latencies: Latencies | None,
    original_size_bytes: int,
    *,
    ahead_of_time: bool = False,
) -> tuple[Verdict, ...]:
    """One verdict per engine, in their order.

    Args:
        gates: the recipe's.
        engines: what is to ship.
        scores: by engine name.
        latencies: None where nothing was timed: gates on latency are then inconclusive.
        original_size_bytes: what ``size_ratio`` divides by.
        ahead_of_time: what an engine that cannot run here leaves open is deferred to its target, not inconclusive.

    Raises:
        RecipeError: gates that no score or no timed batch size answers; all of them at once.
        ArtifactError: something was scored or timed that is not the engine which is to ship.
    """
    timed = latencies.latencies if latencies else ()
    _check_evidence(engines, scores, timed)
    problems = list(dict.fromkeys(_problems(gates, engines, scores, timed)))
    if problems:
        raise RecipeError("\n".join(problems))
    sizes = {engine.name: engine.size_bytes for engine in engines} | {"original": original_size_bytes}
    sizes |= {estimates.EAGER: original_size_bytes, estimates.COMPILED: original_size_bytes}
    unseen = Outcome.DEFERRED if ahead_of_time else Outcome.INCONCLUSIVE
    elsewhere = frozenset(name for name, found in scores.items() if found.stand_in is not None)
    return tuple(
        _judge_engine(gates, engine, scores[engine.name], timed, sizes, elsewhere, unseen) for engine in engines
    )


def worst(outcomes: Iterable[Outcome]) -> Outcome:
    """One failure fails, one undecided leaves undecided, one deferred defers."""
    found = set(outcomes)
    return next((outcome for outcome in _WORST_FIRST if outcome in found), Outcome.PASS)


def undecided_gates(
    gates: Sequence[GateSection], engines: Sequence[Engine], latencies: Sequence[Latency]
) -> tuple[str, ...]:
    """Gates on latency, in one line each, that more calls of what was timed may decide."""
    return tuple(
        f"{engine.name}: {gate.describe()}"
        for engine in engines
        for gate in _gates_of(gates, engine, latencies)
        if gate.metric in SPEED_METRICS and _latency(gate, engine.name, latencies).more_calls_help
    )


def latency_undecided(gates: Sequence[GateSection], engines: Sequence[Engine], latencies: Sequence[Latency]) -> bool:
    """Whether to go on measuring; see `undecided_gates`."""
    return bool(undecided_gates(gates, engines, latencies))


def speeds(latencies: Latencies) -> tuple[Speed, ...]:
    """Every candidate at every batch size in a few numbers; see `compiler.validate.estimates`."""
    return estimates.speeds(latencies)


def _check_evidence(engines: Sequence[Engine], scores: Mapping[str, Scores], latencies: Sequence[Latency]) -> None:
    for engine in engines:
        seen = [("scored", scores[engine.name].engine_sha256)]
        seen += [("timed", entry.engine_sha256 or "") for entry in latencies if entry.candidate == engine.name]
        for what, sha256 in seen:
            if sha256 != engine.sha256:
                raise ArtifactError(
                    f"engine '{engine.name}': the file that was {what} has SHA-256 {sha256[:12] or '(none)'}; that of the "
                    f"file to ship, {engine.sha256[:12]}, was expected. Run again without the cache: --no-cache."
                )


def _problems(
    gates: Sequence[GateSection],
    engines: Sequence[Engine],
    scores: Mapping[str, Scores],
    latencies: Sequence[Latency],
) -> Iterator[str]:
    batches = sorted({entry.batch for entry in latencies})
    for gate in gates:
        if gate.metric in SPEED_METRICS and gate.batch is not None and batches and gate.batch not in batches:
            yield (
                f"[[gates]] batch: '{gate.describe()}': batch {gate.batch} was not timed; "
                f"one of {', '.join(map(str, batches))} was expected. Add it to [latency] batches."
            )
    for engine in engines:
        found = scores[engine.name]
        known = {score.metric: score for score in found.scores}
        for gate in _gates_of(gates, engine, latencies):
            if gate.metric in SPEED_METRICS | SIZE_METRICS or found.bad_samples:
                continue
            if gate.metric not in known:
                yield (
                    f"[[gates]] metric: no score is named '{gate.metric}'; {suggest(gate.metric, sorted(known))} "
                    "Correct it, or define it in the data file's metrics, losses or agreements."
                )
            elif gate.max_drop is not None and known[gate.metric].change is None:
                yield (
                    f"[[gates]] max_drop: '{gate.metric}' compares with the original already; min or max was expected."
                )


def _judge_engine(
    gates: Sequence[GateSection],
    engine: Engine,
    scores: Scores,
    latencies: Sequence[Latency],
    sizes: Mapping[str, int],
    elsewhere: frozenset[str],
    unseen: Outcome,
) -> Verdict:
    finite = _finite(scores)
    if scores.stand_in is not None:
        finite = _of_stand_in(finite, scores.stand_in)
    results = [_result(engine, FINITE, "outputs are finite", finite)]
    if scores.stand_in is not None:
        results.append(_result(engine, RAN, "runs on its target", _not_run(scores.stand_in, unseen)))
    for gate in _gates_of(gates, engine, latencies):
        if gate.metric in SPEED_METRICS and (unrun := {engine.name, gate.against} & elsewhere):
            finding = _Finding(outcome=unseen, reason=f"not timed: '{min(unrun)}' was not run here")
        elif gate.metric in SPEED_METRICS:
            finding = _latency(gate, engine.name, latencies)
        elif gate.metric in SIZE_METRICS:
            finding = _size(gate, engine, sizes)
        elif finite.outcome is Outcome.FAIL:
            finding = _Finding(outcome=Outcome.FAIL, reason=finite.reason)
        else:
            finding = _accuracy(gate, next(score for score in scores.scores if score.metric == gate.metric))
            if scores.stand_in is not None:
                finding = _of_stand_in(finding, scores.stand_in)
        results.append(_result(engine, gate.metric, gate.describe(), finding))
    outcome = worst(result.outcome for result in results)
    return Verdict(engine=engine.name, engine_sha256=engine.sha256, outcome=outcome, gates=tuple(results))


def _of_stand_in(finding: _Finding, stand_in: StandIn) -> _Finding:
    return replace(finding, reason=f"{finding.reason} (the same ONNX file in {stand_in.backend})")


def _not_run(stand_in: StandIn, unseen: Outcome) -> _Finding:
    return _Finding(
        outcome=unseen,
        reason=f"not run here: {stand_in.reason}; its accuracy is that of the same ONNX file in {stand_in.backend}",
    )


def _result(engine: Engine, metric: str, gate: str, finding: _Finding) -> GateResult:
    return GateResult(
        engine=engine.name,
        metric=metric,
        gate=gate,
        outcome=finding.outcome,
        measured=finding.measured,
        low=finding.low,
        high=finding.high,
        reason=finding.reason,
        samples_needed=finding.samples_needed,
    )


def _gates_of(gates: Sequence[GateSection], engine: Engine, latencies: Sequence[Latency]) -> Iterator[GateSection]:
    """The gates on an engine; one for each batch size that was timed where a gate on latency names none."""
    batches = sorted({entry.batch for entry in latencies})
    for gate in gates:
        if not fnmatch.fnmatchcase(engine.name, gate.engine) or gate.against == engine.name:
            continue
        if gate.metric not in SPEED_METRICS or not batches:
            yield gate
        elif gate.batch is None:
            yield from (msgspec.structs.replace(gate, batch=batch) for batch in batches)
        elif gate.batch in batches:
            yield gate


# --- accuracy -------------------------------------------------------------------------------------------------------


def _finite(scores: Scores) -> _Finding:
    bad = scores.bad_samples
    if not bad:
        return _Finding(outcome=Outcome.PASS, measured=0.0, reason="no output holds NaN or Inf")
    ids = ", ".join(map(str, bad[:_SHOWN_IDS])) + (", ..." if len(bad) > _SHOWN_IDS else "")
    samples = "1 sample" if len(bad) == 1 else f"{len(bad)} samples"
    return _Finding(outcome=Outcome.FAIL, measured=float(len(bad)), reason=f"NaN or Inf for {samples}: {ids}")


def _accuracy(gate: GateSection, score: Score) -> _Finding:
    if gate.max_drop is not None:
        estimate = estimates.drop(score, gate.confidence)
        assert estimate is not None, f"{score.metric} is an agreement; _problems refuses max_drop on it"
        found = f"drop {estimate.value:.4g}"
        if score.binary:
            found = f"lost {score.lost}, gained {score.gained} of {score.samples}: {found}"
    else:
        estimate = estimates.value(score, gate.confidence)
        found = f"mean {estimate.value:.6g}"
        if score.binary:
            found = f"{round(score.value * score.samples)} of {score.samples}: {estimate.value:.6g}"
    if not score.binary:
        found += f" over {score.samples} samples"
    if estimate.low is None or estimate.high is None:
        return _Finding(
            outcome=Outcome.INCONCLUSIVE,
            measured=estimate.value,
            reason=f"{found}; bounds need at least {statistics.MIN_CONTINUOUS} samples",
            samples_needed=statistics.MIN_CONTINUOUS,
        )
    if gate.max_drop is not None and score.binary:
        outcome = statistics.paired_verdict(score.lost, score.gained, score.samples, gate.max_drop, gate.confidence)
    else:
        outcome = _compare(gate, estimate)
    needed, advice = _advice(gate, score, estimate.value) if outcome is Outcome.INCONCLUSIVE else (None, "")
    return _Finding(
        outcome=outcome,
        measured=estimate.value,
        low=estimate.low,
        high=estimate.high,
        reason=f"{found}, {_bounds(gate, estimate)}, limit {_limit(gate):g}{advice}",
        samples_needed=needed,
    )


def _advice(gate: GateSection, score: Score, measured: float) -> tuple[int | None, str]:
    """Samples that would decide an undecided gate, were the engine truly as measured; and what to say about it."""
    n, limit, allowance = score.samples, _limit(gate), ""
    room = measured - limit if gate.min is not None else limit - measured
    if gate.max_drop is not None:
        room = min(room, limit)
        unlikely = measured > 0 and room <= limit / 2
    else:
        unlikely = room < 0
    if not score.binary:
        needed = statistics.mean_samples(
            room, (score.change_sd if gate.max_drop is not None else score.value_sd) or 0.0, gate.confidence
        )
    elif gate.max_drop is None:
        needed = statistics.share_samples(score.value, limit, gate.confidence) if room > 0 else None
    else:
        flips = score.lost + score.gained
        needed = statistics.paired_samples(max(flips, 3) / n, room - limit, limit, gate.confidence)
        allowed = statistics.paired_allowance(flips, n, limit, gate.confidence)
        if allowed is not None and room >= 0:
            allowance = f"; with {flips} of {n} changed, a net loss of {allowed} would pass"
    if needed is not None:
        needed = max(needed, n + 1)
    if unlikely:
        return needed, f"{allowance}; more data is unlikely to help"
    if needed is None:
        return None, f"; no number of samples shows exactly {limit:g}, allow a little more"
    return needed, f"{allowance}; {needed} samples would decide"


# --- latency --------------------------------------------------------------------------------------------------------


def _latency(gate: GateSection, engine: str, latencies: Sequence[Latency]) -> _Finding:
    entry = estimates.find(latencies, engine, gate.batch) if gate.batch is not None else None
    if entry is None:
        where = f" at batch {gate.batch}" if gate.batch is not None else ""
        return _Finding(outcome=Outcome.INCONCLUSIVE, reason=f"'{engine}' was not timed{where}")
    if gate.metric == "speedup_p50":
        return _speedup(gate, entry, latencies)
    calls = len(entry.samples_s)
    share = _PERCENTILES.get(gate.metric, 0.5)
    if calls < (floor := statistics.percentile_floor(share)):
        return _Finding(
            outcome=Outcome.INCONCLUSIVE,
            reason=f"{calls} calls; {gate.metric} needs {floor}",
            samples_needed=floor,
            more_calls_help=True,
        )
    if gate.metric in ("p90_ms", "p99_ms"):
        samples_ms = 1e3 * np.asarray(entry.samples_s, np.float64)
        low, high = statistics.percentile_bounds(samples_ms, share, gate.confidence)
        estimate = Estimate(value=float(np.quantile(samples_ms, share)), low=low, high=high)
    else:
        estimate = estimates.median_ms(entry, gate.confidence)
    unit = " ms"
    if gate.metric == "per_s":
        estimate, unit = _per_s(entry.batch, estimate), " per second"
    return _decide(gate, estimate, f"{estimate.value:.4g}{unit} over {calls} calls")


def _per_s(batch: int, per_call_ms: Estimate) -> Estimate:
    return Estimate(
        value=1e3 * batch / per_call_ms.value,
        low=None if per_call_ms.high is None else 1e3 * batch / per_call_ms.high,
        high=None if per_call_ms.low is None else 1e3 * batch / per_call_ms.low,
    )


def _speedup(gate: GateSection, entry: Latency, latencies: Sequence[Latency]) -> _Finding:
    if gate.against == "original":
        baseline = estimates.fastest_original(latencies, entry.batch)
    else:
        baseline = estimates.find(latencies, gate.against, entry.batch)
    if baseline is None:
        return _Finding(
            outcome=Outcome.INCONCLUSIVE, reason=f"'{gate.against}' was not timed at batch {entry.batch}; see the notes"
        )
    estimate = estimates.speedup(baseline, entry, gate.confidence)
    found = f"{estimate.value:.3g}x as fast as {baseline.candidate} over {len(set(entry.block_of))} blocks"
    finding = _decide(gate, estimate, found)
    if finding.outcome is Outcome.INCONCLUSIVE:
        return finding
    noise = estimates.noise(latencies, entry.batch, gate.confidence)
    if noise is None:
        return _undecided(finding, "the original has no A/A control")
    limit = _limit(gate)
    if limit > 0 and noise > abs(math.log(estimate.value / limit)) / 2:
        return _undecided(
            finding,
            f"the machine is too noisy: the original and the same original again look up to {math.expm1(noise):.2%} apart, "
            f"more than half of the {abs(estimate.value / limit - 1):.2%} from the limit",
            more_calls_help=True,
        )
    return finding


def _decide(gate: GateSection, estimate: Estimate, found: str) -> _Finding:
    if estimate.low is None or estimate.high is None:
        return _Finding(
            outcome=Outcome.INCONCLUSIVE,
            measured=estimate.value,
            reason=f"{found}; too few for bounds",
            more_calls_help=True,
        )
    outcome = _compare(gate, estimate)
    return _Finding(
        outcome=outcome,
        measured=estimate.value,
        low=estimate.low,
        high=estimate.high,
        reason=f"{found}, {_bounds(gate, estimate)}, limit {_limit(gate):g}",
        more_calls_help=outcome is Outcome.INCONCLUSIVE,
    )


def _undecided(finding: _Finding, why: str, *, more_calls_help: bool = False) -> _Finding:
    return _Finding(
        outcome=Outcome.INCONCLUSIVE,
        measured=finding.measured,
        low=finding.low,
        high=finding.high,
        reason=f"{finding.reason}; {why}",
        more_calls_help=more_calls_help,
    )


# --- size -----------------------------------------------------------------------------------------------------------


def _size(gate: GateSection, engine: Engine, sizes: Mapping[str, int]) -> _Finding:
    if gate.metric == "size_mib":
        value, found = engine.size_bytes / 2**20, f"{engine.size_bytes / 2**20:.3f} MiB"
    elif gate.against not in sizes:
        return _Finding(outcome=Outcome.INCONCLUSIVE, reason=f"'{gate.against}' was not built")
    else:
        value = engine.size_bytes / sizes[gate.against]
        found = f"{engine.size_bytes} bytes, {value:.3f} of '{gate.against}' ({sizes[gate.against]} bytes)"
    outcome = _compare(gate, Estimate(value=value, low=value, high=value))
    return _Finding(outcome=outcome, measured=value, reason=f"{found}, limit {_limit(gate):g}")


# --- both -----------------------------------------------------------------------------------------------------------


def _limit(gate: GateSection) -> float:
    limit = next(value for value in (gate.max_drop, gate.min, gate.max) if value is not None)
    return float(limit)


def _compare(gate: GateSection, estimate: Estimate) -> Outcome:
    """By the bounds, never by the value; NaN passes nothing."""
    assert estimate.low is not None
    assert estimate.high is not None
    limit = _limit(gate)
    if gate.min is not None:
        passed, failed = estimate.low >= limit, estimate.high < limit
    else:
        passed, failed = estimate.high <= limit, estimate.low > limit
    return Outcome.PASS if passed else Outcome.FAIL if failed else Outcome.INCONCLUSIVE


def _bounds(gate: GateSection, estimate: Estimate) -> str:
    return f"{gate.confidence * 100:g} % bounds [{estimate.low:.4g}, {estimate.high:.4g}]"

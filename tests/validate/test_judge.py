"""Gates to verdicts: what passes, what fails, what cannot be told, and what the user is told of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compiler.errors import ArtifactError, RecipeError
from compiler.recipe import GateSection
from compiler.spec import (
    Engine,
    GateResult,
    Latencies,
    Latency,
    Outcome,
    Platform,
    Score,
    Scores,
    Speed,
    StandIn,
    Verdict,
)
from compiler.validate import estimates, judge, statistics

Make = Callable[..., Any]
PASS, FAIL, INCONCLUSIVE = Outcome.PASS, Outcome.FAIL, Outcome.INCONCLUSIVE


def continuous(
    change: float, sd: float, samples: int, *, higher: bool = True, value: float = 1.0, metric: str = "iou"
) -> Score:
    return Score(
        metric=metric,
        value=value,
        original=value - change,
        change=change,
        samples=samples,
        binary=False,
        higher_is_better=higher,
        change_sd=sd,
        value_sd=sd,
    )


def agreement(value: float, sd: float | None, samples: int, metric: str = "cosine") -> Score:
    return Score(
        metric=metric,
        value=value,
        original=None,
        change=None,
        samples=samples,
        binary=sd is None,
        higher_is_better=metric != "max_abs_diff",
        value_sd=sd,
    )


def scores_of(engine: Engine, *scores: Score, bad: Sequence[int] = ()) -> dict[str, Scores]:
    return {
        engine.name: Scores(
            engine=engine.name, engine_sha256=engine.sha256, data_sha256="d", scores=scores, bad_samples=tuple(bad)
        )
    }


@pytest.fixture
def timed(platform: Platform) -> Make:
    def make(*latencies: Latency) -> Latencies:
        return Latencies(
            latencies=latencies,
            platform=platform,
            threads=2,
            boundary="b",
            started="s",
            load_before=0.0,
            load_after=0.0,
        )

    return make


@pytest.fixture
def one(engine: Make) -> Callable[..., GateResult]:
    """The result of a single gate on a single score."""

    def run(gate: GateSection, *scores: Score) -> GateResult:
        built = engine()
        (verdict,) = judge.judge((gate,), (built,), scores_of(built, *scores), None, 1)
        (finite, result) = verdict.gates
        assert finite.outcome is PASS
        assert verdict.outcome is result.outcome
        return result

    return run


class TestDrop:
    def test_the_reason_says_what_was_lost_and_gained_and_between_which_bounds(self, one: Make, binary: Make) -> None:
        result = one(GateSection(metric="top1", max_drop=0.02), binary(3, 1, 539))
        assert result == GateResult(
            engine="int8",
            metric="top1",
            gate="top1 drop <= 0.02 (95%)",
            outcome=PASS,
            measured=2 / 539,
            low=result.low,
            high=result.high,
            reason="lost 3, gained 1 of 539: drop 0.003711, 95 % bounds [-0.003283, 0.01221], limit 0.02",
        )
        bounds = statistics.paired_bounds(3, 1, 539, 0.95)
        assert (result.low, result.high) == (-bounds[1], -bounds[0])

    def test_the_floor_is_kept_267_are_too_few_and_268_pass(self, one: Make, binary: Make) -> None:
        gate = GateSection(metric="top1", max_drop=0.01)
        assert one(gate, binary(0, 0, 267)).outcome is INCONCLUSIVE
        assert one(gate, binary(0, 0, 268)).outcome is PASS

    def test_too_few_samples_name_how_many_would_do(self, one: Make, binary: Make) -> None:
        result = one(GateSection(metric="top1", max_drop=0.01), binary(0, 0, 100))
        assert result.outcome is INCONCLUSIVE
        assert result.samples_needed == statistics.paired_samples(0.03, 0.0, 0.01, 0.95)
        assert result.reason == (
            "lost 0, gained 0 of 100: drop 0, 95 % bounds [-0.02634, 0.02634], limit 0.01; "
            f"{result.samples_needed} samples would decide"
        )

    def test_a_surprising_inconclusive_says_what_would_have_passed(self, one: Make, binary: Make) -> None:
        result = one(GateSection(metric="top1", max_drop=0.01), binary(16, 12, 2000))
        assert one(GateSection(metric="top1", max_drop=0.01), binary(26, 14, 2000)).outcome is INCONCLUSIVE
        assert result.outcome is PASS
        undecided = one(GateSection(metric="top1", max_drop=0.01), binary(22, 12, 2000))
        assert (
            "; with 34 of 2000 changed, a net loss of 9 would pass; more data is unlikely to help" in undecided.reason
        )

    def test_a_drop_beyond_the_limit_that_may_be_chance_is_inconclusive_and_more_data_will_not_help(
        self, one: Make, binary: Make
    ) -> None:
        result = one(GateSection(metric="top1", max_drop=0.01), binary(9, 3, 500))
        assert result.outcome is INCONCLUSIVE
        assert result.samples_needed is None
        assert result.reason.endswith("limit 0.01; more data is unlikely to help")

    def test_a_drop_that_cannot_be_chance_fails_without_advice(self, one: Make, binary: Make) -> None:
        result = one(GateSection(metric="top1", max_drop=0.01), binary(40, 2, 500))
        assert (result.outcome, result.samples_needed) == (FAIL, None)
        assert result.reason.endswith("limit 0.01")

    def test_a_limit_of_zero_can_be_missed_but_never_shown(self, one: Make, binary: Make) -> None:
        gate = GateSection(metric="top1", max_drop=0.0)
        assert one(gate, binary(20, 1, 500)).outcome is FAIL
        undecided = one(gate, binary(0, 0, 500))
        assert undecided.outcome is INCONCLUSIVE
        assert undecided.reason.endswith("limit 0; no number of samples shows exactly 0, allow a little more")

    def test_a_higher_confidence_asks_for_more(self, one: Make, binary: Make) -> None:
        assert one(GateSection(metric="top1", max_drop=0.01, confidence=0.95), binary(0, 0, 300)).outcome is PASS
        assert (
            one(GateSection(metric="top1", max_drop=0.01, confidence=0.99), binary(0, 0, 300)).outcome is INCONCLUSIVE
        )

    def test_a_loss_that_rises_is_a_drop(self, one: Make) -> None:
        worse = continuous(+0.5, 1.0, 400, higher=False, metric="nll")
        better = continuous(-0.5, 1.0, 400, higher=False, metric="nll")
        gate = GateSection(metric="nll", max_drop=0.1)
        assert (one(gate, worse).outcome, one(gate, worse).measured) == (FAIL, 0.5)
        assert one(gate, better).outcome is PASS

    def test_continuous_scores_need_thirty_samples(self, one: Make) -> None:
        gate = GateSection(metric="iou", max_drop=0.1)
        few = one(gate, continuous(0.0, 0.001, 29))
        assert (few.outcome, few.samples_needed, few.low) == (INCONCLUSIVE, 30, None)
        assert few.reason == "drop 0 over 29 samples; bounds need at least 30 samples"
        assert one(gate, continuous(0.0, 0.001, 30)).outcome is PASS

    def test_a_wide_continuous_score_names_how_many_samples_would_do(self, one: Make) -> None:
        result = one(GateSection(metric="iou", max_drop=0.1), continuous(0.0, 1.0, 100))
        assert (result.outcome, result.samples_needed) == (INCONCLUSIVE, 857)
        assert result.reason.endswith("limit 0.1; 857 samples would decide")

    def test_an_engine_that_changes_nothing_passes_a_limit_of_zero_on_a_continuous_score(self, one: Make) -> None:
        assert one(GateSection(metric="iou", max_drop=0.0), continuous(0.0, 0.0, 30)).outcome is PASS


class TestValue:
    def test_a_perfect_agreement_needs_133_samples_for_98_per_cent(self, one: Make) -> None:
        gate = GateSection(metric="top1_agreement", min=0.98)
        few = one(gate, agreement(1.0, None, 132, "top1_agreement"))
        assert (few.outcome, few.samples_needed) == (INCONCLUSIVE, 133)
        assert few.reason == "132 of 132: 1, 95 % bounds [0.9799, 1], limit 0.98; 133 samples would decide"
        assert one(gate, agreement(1.0, None, 133, "top1_agreement")).outcome is PASS

    def test_a_share_below_the_limit_fails_or_is_unlikely_to_be_saved(self, one: Make) -> None:
        gate = GateSection(metric="top1_agreement", min=0.98)
        assert one(gate, agreement(0.9, None, 1000, "top1_agreement")).outcome is FAIL
        near = one(gate, agreement(0.97, None, 100, "top1_agreement"))
        assert (near.outcome, near.samples_needed) == (INCONCLUSIVE, None)
        assert near.reason.endswith("more data is unlikely to help")

    def test_a_mean_is_bounded_by_t(self, one: Make) -> None:
        gate = GateSection(metric="cosine", min=0.99)
        assert one(gate, agreement(0.995, 0.01, 200)).outcome is PASS
        assert one(gate, agreement(0.9905, 0.01, 200)).outcome is INCONCLUSIVE
        assert one(gate, agreement(0.98, 0.01, 200)).outcome is FAIL
        assert one(gate, agreement(0.995, 0.01, 29)).outcome is INCONCLUSIVE
        assert one(gate, agreement(1.0, 0.0, 30)).outcome is PASS

    def test_lower_is_better_is_gated_by_max(self, one: Make) -> None:
        gate = GateSection(metric="max_abs_diff", max=0.1)
        assert one(gate, agreement(0.05, 0.01, 50, "max_abs_diff")).outcome is PASS
        assert one(gate, agreement(0.5, 0.01, 50, "max_abs_diff")).outcome is FAIL

    def test_a_users_metric_may_be_gated_by_its_own_value(self, one: Make, binary: Make) -> None:
        assert one(GateSection(metric="top1", min=0.85), binary(0, 0, 1000)).outcome is PASS
        assert one(GateSection(metric="top1", min=0.95), binary(0, 0, 1000)).outcome is FAIL

    def test_a_share_of_exactly_one_is_never_shown(self, one: Make) -> None:
        result = one(GateSection(metric="top1_agreement", min=1.0), agreement(1.0, None, 5000, "top1_agreement"))
        assert result.outcome is INCONCLUSIVE
        assert result.reason.endswith("limit 1; no number of samples shows exactly 1, allow a little more")


class TestFinite:
    def test_an_engine_without_a_gate_must_still_be_finite(self, engine: Make) -> None:
        built = engine()
        (good,) = judge.judge((), (built,), scores_of(built, agreement(1.0, 0.0, 50)), None, 1)
        (bad,) = judge.judge((), (built,), scores_of(built, agreement(1.0, 0.0, 49), bad=[7]), None, 1)
        assert (good.outcome, good.gates[0].reason) == (PASS, "no output holds NaN or Inf")
        assert (bad.outcome, bad.gates[0].reason) == (FAIL, "NaN or Inf for 1 sample: 7")

    def test_bad_samples_fail_every_gate_on_accuracy_and_are_named(self, engine: Make, binary: Make) -> None:
        built = engine()
        scores = scores_of(built, binary(0, 0, 5000), bad=range(25))
        (verdict,) = judge.judge((GateSection(metric="top1", max_drop=0.5),), (built,), scores, None, 1)
        ids = ", ".join(map(str, range(20)))
        assert [gate.reason for gate in verdict.gates] == [f"NaN or Inf for 25 samples: {ids}, ..."] * 2
        assert [gate.outcome for gate in verdict.gates] == [FAIL, FAIL]

    def test_a_good_engine_beside_a_bad_one_is_judged_on_its_own_scores(self, engine: Make, binary: Make) -> None:
        good, bad = engine("fp16"), engine("int8")
        scores = {**scores_of(good, binary(0, 0, 900)), **scores_of(bad, agreement(1.0, 0.0, 50), bad=[3])}
        verdicts = judge.judge((GateSection(metric="top1", max_drop=0.01),), (good, bad), scores, None, 1)
        assert [verdict.outcome for verdict in verdicts] == [PASS, FAIL]

    def test_an_engine_that_is_bad_everywhere_has_no_scores_and_fails(self, engine: Make) -> None:
        built = engine()
        scores = scores_of(built, bad=[0, 1])
        (verdict,) = judge.judge((GateSection(metric="cosine", min=0.9),), (built,), scores, None, 1)
        assert verdict.outcome is FAIL


class TestVerdict:
    def test_one_failed_gate_fails_and_one_undecided_leaves_undecided(self, engine: Make, binary: Make) -> None:
        built = engine()
        scores = scores_of(built, binary(0, 0, 300), agreement(0.9, 0.001, 300))
        passed = GateSection(metric="top1", max_drop=0.01)
        undecided = GateSection(metric="top1", max_drop=0.001)
        failed = GateSection(metric="cosine", min=0.99)

        def outcome(*gates: GateSection) -> Outcome:
            return judge.judge(gates, (built,), scores, None, 1)[0].outcome

        assert outcome(passed) is PASS
        assert outcome(passed, undecided) is INCONCLUSIVE
        assert outcome(undecided, failed, passed) is FAIL

    def test_gates_apply_to_the_engines_that_their_pattern_names(self, engine: Make) -> None:
        engines = (engine("fp16-fast"), engine("int8"))
        scores = {name: entry for e in engines for name, entry in scores_of(e, agreement(0.5, 0.001, 50)).items()}
        verdicts = judge.judge((GateSection(metric="cosine", min=0.9, engine="fp16*"),), engines, scores, None, 1)
        assert [(verdict.engine, verdict.outcome) for verdict in verdicts] == [("fp16-fast", FAIL), ("int8", PASS)]

    def test_an_unknown_metric_names_the_nearest_and_all_mistakes_come_at_once(
        self, engine: Make, binary: Make
    ) -> None:
        built = engine()
        gates = (
            GateSection(metric="topl", max_drop=0.1),
            GateSection(metric="zzz", min=0.1),
            GateSection(metric="cosine", max_drop=0.1),
        )
        with pytest.raises(RecipeError) as refused:
            judge.judge(gates, (built,), scores_of(built, binary(0, 0, 10), agreement(1.0, 0.0, 10)), None, 1)
        assert refused.value.message.splitlines() == [
            (
                "[[gates]] metric: no score is named 'topl'; did you mean 'top1'? "
                "Correct it, or define it in the data file's metrics, losses or agreements."
            ),
            (
                "[[gates]] metric: no score is named 'zzz'; expected one of cosine, top1. "
                "Correct it, or define it in the data file's metrics, losses or agreements."
            ),
            "[[gates]] max_drop: 'cosine' compares with the original already; min or max was expected.",
        ]

    def test_what_was_scored_must_be_what_ships(self, engine: Make) -> None:
        built = engine()
        other = engine(sha256="0123456789abcdef")
        with pytest.raises(ArtifactError) as refused:
            judge.judge((), (built,), scores_of(other), None, 1)
        assert refused.value.message == (
            "engine 'int8': the file that was scored has SHA-256 0123456789ab; that of the file to ship, sha-of-int8, was "
            "expected. Run again without the cache: --no-cache."
        )

    def test_what_was_timed_must_be_what_ships(self, engine: Make, timed: Make, latency: Make) -> None:
        built = engine(sha256="other")
        with pytest.raises(ArtifactError) as refused:
            judge.judge((), (built,), scores_of(built), timed(latency("int8", [1.0])), 1)
        assert refused.value.message == (
            "engine 'int8': the file that was timed has SHA-256 sha-of-int8; that of the file to ship, other, was "
            "expected. Run again without the cache: --no-cache."
        )


class TestLatencyGates:
    """Blocks: the original takes 2 ms, its control the same within 0.2 %, the engine 1 ms."""

    ORIGINAL: tuple[float, ...] = tuple(2.0 + 0.002 * (i % 3 - 1) for i in range(20))
    CONTROL: tuple[float, ...] = tuple(2.0 + 0.002 * ((i + 1) % 3 - 1) for i in range(20))
    ENGINE: tuple[float, ...] = tuple(1.0 + 0.002 * (i % 5 - 2) for i in range(20))

    @pytest.fixture
    def gate(self, engine: Make, latency: Make, timed: Make) -> Callable[..., GateResult]:
        def run(gate: GateSection, **blocks: Sequence[float]) -> GateResult:
            built = engine()
            entries = {"eager": self.ORIGINAL, "control": self.CONTROL, "int8": self.ENGINE, **blocks}
            taken = timed(*(latency(name, values) for name, values in entries.items() if values))
            (verdict,) = judge.judge((gate,), (built,), scores_of(built), taken, 1)
            return verdict.gates[1]

        return run

    def test_twice_as_fast_passes_one_and_a_half(self, gate: Make) -> None:
        result = gate(GateSection(metric="speedup_p50", min=1.5))
        assert (result.outcome, result.gate) == (PASS, "speedup_p50 >= 1.5 at batch 1 (95%)")
        assert result.measured == pytest.approx(2.0, rel=0.01)
        assert result.low <= result.measured <= result.high
        assert result.reason.startswith("2x as fast as eager over 20 blocks, 95 % bounds [")

    def test_twice_as_fast_fails_three(self, gate: Make) -> None:
        assert gate(GateSection(metric="speedup_p50", min=3.0)).outcome is FAIL

    def test_the_original_is_the_faster_of_its_forms(self, gate: Make) -> None:
        compiled = [0.5] * 20
        against = {
            name: gate(GateSection(metric="speedup_p50", min=1.0, against=name), compile=compiled)
            for name in ("original", "eager", "compile")
        }
        assert {name: round(result.measured, 1) for name, result in against.items()} == {
            "original": 0.5,
            "eager": 2.0,
            "compile": 0.5,
        }

    def test_a_form_that_was_not_timed_leaves_the_gate_undecided(self, gate: Make) -> None:
        result = gate(GateSection(metric="speedup_p50", min=1.0, against="compile"))
        assert (result.outcome, result.reason) == (INCONCLUSIVE, "'compile' was not timed at batch 1; see the notes")

    def test_bounds_that_hold_the_limit_are_inconclusive(self, gate: Make) -> None:
        swinging = [1.0 + 0.2 * (i % 2) for i in range(20)]
        assert gate(GateSection(metric="speedup_p50", min=1.8), int8=swinging).outcome is INCONCLUSIVE

    def test_a_noisy_control_decides_nothing(self, gate: Make) -> None:
        noisy = [2.0 * (1 + 0.05 * (-1) ** i) for i in range(20)]
        result = gate(GateSection(metric="speedup_p50", min=1.95), control=noisy)
        assert result.outcome is INCONCLUSIVE
        assert "; the machine is too noisy: the original and the same original again look up to 10" in result.reason
        assert result.reason.endswith("% apart, more than half of the 2.62% from the limit")
        assert gate(GateSection(metric="speedup_p50", min=1.2), control=noisy).outcome is PASS

    def test_a_biased_control_decides_nothing_that_is_as_small_as_the_bias(self, gate: Make) -> None:
        biased = [1.02 * ms for ms in self.ORIGINAL]
        assert gate(GateSection(metric="speedup_p50", min=1.98), control=biased).outcome is INCONCLUSIVE
        assert gate(GateSection(metric="speedup_p50", min=2.02), control=biased).outcome is INCONCLUSIVE
        assert gate(GateSection(metric="speedup_p50", min=1.5), control=biased).outcome is PASS

    def test_without_a_control_nothing_is_decided(self, gate: Make) -> None:
        result = gate(GateSection(metric="speedup_p50", min=1.5), control=())
        assert result.outcome is INCONCLUSIVE
        assert result.reason.endswith("; the original has no A/A control")

    def test_too_few_blocks_have_no_bounds(self, gate: Make) -> None:
        few = {"eager": self.ORIGINAL[:4], "control": self.CONTROL[:4], "int8": self.ENGINE[:4]}
        result = gate(GateSection(metric="speedup_p50", min=1.5), **few)
        assert (result.outcome, result.low, result.high) == (INCONCLUSIVE, None, None)
        assert result.reason == "2x as fast as eager over 4 blocks; too few for bounds"

    def test_milliseconds_and_throughput_are_gated_by_the_bounds_of_the_median(self, gate: Make) -> None:
        assert gate(GateSection(metric="p50_ms", max=1.1)).outcome is PASS
        assert gate(GateSection(metric="p50_ms", max=0.9)).outcome is FAIL
        assert gate(GateSection(metric="p50_ms", max=1.0)).outcome is INCONCLUSIVE
        assert gate(GateSection(metric="per_s", min=900.0)).outcome is PASS
        assert gate(GateSection(metric="per_s", min=1100.0)).outcome is FAIL

    def test_percentiles_wait_for_enough_calls(self, gate: Make) -> None:
        result = gate(GateSection(metric="p99_ms", max=10.0))
        assert (result.outcome, result.samples_needed) == (INCONCLUSIVE, 662)
        assert result.reason == "60 calls; p99_ms needs 662"

    def test_percentiles_with_enough_calls_are_decided(self, engine: Make, latency: Make, timed: Make) -> None:
        built = engine()
        taken = timed(latency("int8", self.ENGINE, calls=40))

        def outcome(limit: float) -> Outcome:
            gates = (GateSection(metric="p90_ms", max=limit),)
            return judge.judge(gates, (built,), scores_of(built), taken, 1)[0].outcome

        assert [outcome(1.01), outcome(0.9)] == [PASS, FAIL]

    def test_an_engine_is_not_compared_with_itself(self, engine: Make, latency: Make, timed: Make) -> None:
        engines = (engine("fp16"), engine("int8"))
        scores = {**scores_of(engines[0]), **scores_of(engines[1])}
        taken = timed(
            latency("eager", self.ORIGINAL),
            latency("control", self.CONTROL),
            latency("fp16", self.ORIGINAL),
            latency("int8", self.ENGINE),
        )
        verdicts = judge.judge((GateSection(metric="speedup_p50", min=1.5, against="fp16"),), engines, scores, taken, 1)
        assert [len(verdict.gates) for verdict in verdicts] == [1, 2]
        assert verdicts[1].gates[1].reason.startswith("2x as fast as fp16")

    def test_a_gate_without_batch_is_judged_at_every_batch_that_was_timed(
        self, engine: Make, latency: Make, timed: Make
    ) -> None:
        built = engine()
        taken = timed(*(latency("int8", self.ENGINE, batch=batch) for batch in (1, 8)))
        (verdict,) = judge.judge((GateSection(metric="p50_ms", max=2.0),), (built,), scores_of(built), taken, 1)
        assert [gate.gate for gate in verdict.gates[1:]] == [
            "p50_ms <= 2 at batch 1 (95%)",
            "p50_ms <= 2 at batch 8 (95%)",
        ]

    def test_a_batch_that_was_not_timed_is_a_mistake_of_the_recipe(
        self, engine: Make, latency: Make, timed: Make
    ) -> None:
        built = engine()
        taken = timed(latency("int8", self.ENGINE, batch=1), latency("int8", self.ENGINE, batch=8))
        with pytest.raises(RecipeError) as refused:
            judge.judge((GateSection(metric="p50_ms", max=2.0, batch=4),), (built,), scores_of(built), taken, 1)
        assert refused.value.message == (
            "[[gates]] batch: 'p50_ms <= 2 at batch 4 (95%)': batch 4 was not timed; one of 1, 8 was expected. "
            "Add it to [latency] batches."
        )

    def test_nothing_timed_leaves_gates_on_latency_undecided(self, engine: Make) -> None:
        built = engine()
        (verdict,) = judge.judge((GateSection(metric="p50_ms", max=2.0),), (built,), scores_of(built), None, 1)
        assert (verdict.outcome, verdict.gates[1].reason) == (INCONCLUSIVE, "'int8' was not timed")

    def test_measuring_goes_on_only_where_more_calls_may_decide(self, engine: Make, latency: Make) -> None:
        engines = (engine(),)
        taken = [latency("eager", self.ORIGINAL), latency("control", self.CONTROL), latency("int8", self.ENGINE)]

        def undecided(**gate: Any) -> bool:
            return judge.latency_undecided((GateSection(**gate),), engines, taken)

        assert undecided(metric="p99_ms", max=5.0)
        assert undecided(metric="p50_ms", max=1.0)
        assert not undecided(metric="speedup_p50", min=1.5)
        assert not undecided(metric="speedup_p50", min=1.5, against="compile")
        assert not undecided(metric="p99_ms", max=5.0, batch=8)
        assert not undecided(metric="cosine", min=0.9)
        assert judge.undecided_gates((GateSection(metric="p50_ms", max=1.0),), engines, taken) == (
            "int8: p50_ms <= 1 at batch 1 (95%)",
        )


class TestSizeGates:
    def test_size_is_exact(self, engine: Make) -> None:
        built = engine(size_bytes=3 << 20)

        def result(**gate: Any) -> GateResult:
            return judge.judge((GateSection(**gate),), (built,), scores_of(built), None, 12 << 20)[0].gates[1]

        assert result(metric="size_mib", max=3.0).outcome is PASS
        assert result(metric="size_mib", max=2.999).outcome is FAIL
        assert result(metric="size_ratio", max=0.25).outcome is PASS
        failed = result(metric="size_ratio", max=0.2)
        assert (failed.outcome, failed.reason) == (
            FAIL,
            "3145728 bytes, 0.250 of 'original' (12582912 bytes), limit 0.2",
        )

    def test_size_against_another_engine_and_against_one_that_is_missing(self, engine: Make) -> None:
        engines = (engine("fp16", size_bytes=200), engine("int8", size_bytes=100))
        scores = {**scores_of(engines[0]), **scores_of(engines[1])}
        gates = (GateSection(metric="size_ratio", max=0.5, against="fp16", engine="int8"),)
        assert judge.judge(gates, engines, scores, None, 1)[1].outcome is PASS
        (alone,) = judge.judge(gates, engines[1:], scores, None, 1)
        assert (alone.outcome, alone.gates[1].reason) == (INCONCLUSIVE, "'fp16' was not built")


def test_no_bootstrap_is_reached_for_right_or_wrong_metrics(
    one: Make, binary: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any) -> Any:
        raise AssertionError("bootstrap of a right-or-wrong metric")

    monkeypatch.setattr(statistics, "bootstrap_median", refuse)
    for samples in (1, 10, 100, 1000):
        for lost in (0, 1):
            one(GateSection(metric="top1", max_drop=0.01), binary(lost, 0, samples))
            one(GateSection(metric="top1", min=0.5), binary(lost, 0, samples))


class TestSimulated:
    """Whole gates on made-up data sets, by the outcome that a user would see."""

    @pytest.fixture
    def outcomes(self, engine: Make, binary: Make) -> Callable[..., np.ndarray[Any, Any]]:
        built = engine()
        seen: dict[tuple[int, int, int], Outcome] = {}

        def run(n: int, flips: float, drop: float, runs: int) -> np.ndarray[Any, Any]:
            tables = np.random.default_rng(n).multinomial(n, [(flips + drop) / 2, (flips - drop) / 2, 1 - flips], runs)
            gate = GateSection(metric="top1", max_drop=0.01)
            for lost, gained, _ in {tuple(table) for table in tables.tolist()}:
                scores = scores_of(built, binary(lost, gained, n))
                seen[n, lost, gained] = judge.judge((gate,), (built,), scores, None, 1)[0].outcome
            return np.array([seen[n, lost, gained] for lost, gained, _ in tables.tolist()])

        return run

    def test_an_engine_at_the_limit_passes_in_at_most_6_per_cent(self, outcomes: Make) -> None:
        assert (outcomes(1000, 0.02, 0.01, 2000) == PASS).mean() <= 0.06
        assert (outcomes(1000, 0.02, 0.01, 2000) == FAIL).mean() <= 0.06

    def test_a_lossless_engine_passes_in_at_least_84_per_cent_at_the_size_that_is_named(self, outcomes: Make) -> None:
        n = statistics.paired_samples(0.02, 0.0, 0.01, 0.95)
        found = outcomes(n, 0.02, 0.0, 2000)
        assert (found == PASS).mean() >= 0.84
        assert (found == FAIL).sum() == 0

    def test_an_engine_that_loses_three_times_the_limit_never_passes(self, outcomes: Make) -> None:
        found = outcomes(1901, 0.05, 0.03, 2000)
        assert (found == PASS).sum() == 0
        assert (found == FAIL).mean() >= 0.95


ODD = st.floats(allow_nan=True, allow_infinity=True)


@settings(max_examples=300, deadline=None)
@given(
    value=ODD,
    sd=ODD.map(abs),
    samples=st.integers(1, 500),
    limit=st.floats(-10, 10),
    kind=st.sampled_from(["min", "max", "max_drop"]),
)
def test_a_score_that_is_not_a_number_never_passes(
    value: float, sd: float, samples: int, limit: float, kind: str
) -> None:
    score = Score(
        metric="m",
        value=value,
        original=0.0,
        change=value,
        samples=samples,
        binary=False,
        higher_is_better=True,
        change_sd=sd,
        value_sd=sd,
    )
    limits: dict[str, Any] = {kind: abs(limit) if kind == "max_drop" else limit}
    gate = GateSection(metric="m", **limits)
    estimate = estimates.drop(score) if kind == "max_drop" else estimates.value(score)
    assert estimate is not None
    if estimate.low is not None and np.isnan([value, sd]).any():
        assert judge._compare(gate, estimate) is not PASS


def test_speeds_show_no_percentile_below_its_floor(timed: Make, latency: Make) -> None:
    blocks = [1.0] * 20
    eager, int8 = latency("eager", [2.0] * 20, batch=4, calls=3), latency("int8", blocks, batch=4, calls=40)
    found = judge.speeds(timed(eager, int8))
    assert found == (
        Speed(candidate="eager", batch=4, samples=60, p50_ms=2.0, p90_ms=None, p99_ms=None, per_s=2000.0),
        Speed(
            candidate="int8",
            batch=4,
            samples=800,
            p50_ms=1.0,
            p90_ms=1.0,
            p99_ms=1.0,
            per_s=4000.0,
            speedup=found[1].speedup,
            speedup_low=found[1].speedup_low,
            speedup_high=found[1].speedup_high,
        ),
    )
    assert [found[1].speedup_low, found[1].speedup, found[1].speedup_high] == pytest.approx([2.0] * 3)


def test_a_verdict_is_plain_values(engine: Make, binary: Make) -> None:
    import msgspec

    built = engine()
    verdicts = judge.judge(
        (GateSection(metric="top1", max_drop=0.1),), (built,), scores_of(built, binary(1, 2, 900)), None, 1
    )
    again = msgspec.convert(json.loads(msgspec.json.encode(verdicts)), tuple[Verdict, ...])
    assert again == verdicts


class TestNotRunHere:
    """Engines that cannot run where they are built: their scores are those of a stand-in."""

    STAND_IN = StandIn(backend="onnxruntime", engine_sha256="s", model_sha256="m", reason="no GPU")

    def verdicts(
        self, engine: Make, *gates: GateSection, ahead: bool, taken: Latencies | None = None
    ) -> tuple[Verdict, ...]:
        here, there = engine(name="cpu"), engine(name="rtx")
        scores = scores_of(here, agreement(1.0, 0.0, 50)) | scores_of(there, agreement(1.0, 0.0, 50))
        scores["rtx"] = replace(scores["rtx"], stand_in=self.STAND_IN)
        return judge.judge(gates, (here, there), scores, taken, 1, ahead_of_time=ahead)

    @pytest.mark.parametrize(("ahead", "open_outcome"), [(False, INCONCLUSIVE), (True, Outcome.DEFERRED)])
    def test_it_is_never_passed(self, engine: Make, ahead: bool, open_outcome: Outcome) -> None:
        here, there = self.verdicts(engine, GateSection(metric="cosine", min=0.9), ahead=ahead)
        assert here.outcome is PASS
        assert there.outcome is open_outcome
        finite, ran, cosine = there.gates
        assert (finite.outcome, ran.outcome, cosine.outcome) == (PASS, open_outcome, PASS)
        assert ran.reason == "not run here: no GPU; its accuracy is that of the same ONNX file in onnxruntime"
        assert finite.reason.endswith("(the same ONNX file in onnxruntime)")
        assert cosine.reason.endswith("(the same ONNX file in onnxruntime)")

    def test_a_missed_gate_on_accuracy_fails_it(self, engine: Make) -> None:
        _, there = self.verdicts(engine, GateSection(metric="cosine", min=1.5), ahead=True)
        assert there.outcome is FAIL

    @pytest.mark.parametrize(("ahead", "open_outcome"), [(False, INCONCLUSIVE), (True, Outcome.DEFERRED)])
    def test_a_gate_against_it_is_as_open_as_its_own(self, engine: Make, ahead: bool, open_outcome: Outcome) -> None:
        gate = GateSection(metric="speedup_p50", min=0.1, engine="cpu", against="rtx")
        here, _ = self.verdicts(engine, gate, ahead=ahead)
        assert here.outcome is open_outcome
        assert here.gates[-1].reason == "not timed: 'rtx' was not run here"

    def test_the_worst_of_outcomes(self) -> None:
        deferred = Outcome.DEFERRED
        assert judge.worst([PASS, deferred]) is deferred
        assert judge.worst([PASS, deferred, INCONCLUSIVE]) is INCONCLUSIVE
        assert judge.worst([INCONCLUSIVE, deferred, FAIL]) is FAIL
        assert judge.worst([]) is PASS

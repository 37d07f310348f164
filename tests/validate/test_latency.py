"""The schedule on machines made of arithmetic: their clock is what the runners say, so nothing here waits or flickers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from compiler.errors import BuildError, RecipeError
from compiler.recipe import GateSection, LatencySection
from compiler.spec import Array, Engine, Feeds, Latencies, Latency, Outcome, Platform, Scores, TensorSpec
from compiler.validate import estimates, judge, latency

Make = Callable[..., Any]
PASS, FAIL, INCONCLUSIVE = Outcome.PASS, Outcome.FAIL, Outcome.INCONCLUSIVE
X = TensorSpec(name="x", dtype="float32", shape=("batch", 2))


class Machine:
    """A computer whose speed drifts: ``drift`` from one call of `time` to the next, ``jitter`` from call to call."""

    def __init__(self, seed: int = 0, *, drift: float = 0.0, jitter: float = 0.0, spikes: float = 0.0) -> None:
        self.rng = np.random.default_rng(seed)
        self.drift, self.jitter, self.spikes = drift, jitter, spikes
        self.level = 0.0
        self.elapsed_s = 0.0
        self.log: list[tuple[str, int]] = []

    def runner(self, name: str, call_ms: float, warm_up: Sequence[float] = ()) -> FakeRunner:
        return FakeRunner(self, name, call_ms, list(warm_up))


class FakeRunner:
    """Takes ``call_ms`` per call; ``warm_up`` are factors on its first calls of `time`."""

    inputs: tuple[TensorSpec, ...] = (X,)
    outputs: tuple[TensorSpec, ...] = (X,)

    def __init__(self, machine: Machine, name: str, call_ms: float, warm_up: list[float]) -> None:
        self.machine, self.name, self.call_ms, self.warm_up = machine, name, call_ms, warm_up

    def run(self, feeds: Feeds) -> dict[str, Array]:
        return dict(feeds)

    def time(self, feeds: Feeds, repeats: int) -> list[float]:
        machine = self.machine
        machine.level = 0.9 * machine.level + machine.drift * float(machine.rng.normal())
        factor = self.warm_up.pop(0) if self.warm_up else 1.0
        noise = machine.jitter * machine.rng.normal(size=repeats)
        noise += machine.spikes * (machine.rng.random(repeats) < 0.02)
        samples = self.call_ms / 1e3 * factor * np.exp(machine.level + noise)
        machine.log.append((self.name, repeats))
        machine.elapsed_s += float(samples.sum())
        return [float(sample) for sample in samples]

    def close(self) -> None:
        pass


@pytest.fixture
def run(platform: Platform) -> Callable[..., Latencies]:
    def measure(
        candidates: dict[str, FakeRunner],
        *,
        batches: Sequence[int] = (1,),
        undecided: Callable[[Sequence[Latency]], bool] = lambda latencies: False,
        **section: Any,
    ) -> Latencies:
        return latency.measure(
            LatencySection(**section),
            candidates,
            lambda batch: {"x": np.zeros((batch, 2), np.float32)},
            batches,
            engine_sha256={"int8": "sha-of-int8"},
            platform=platform,
            threads=2,
            undecided=undecided,
        )

    return measure


def two(machine: Machine, original_ms: float = 1.0, engine_ms: float = 1.0) -> dict[str, FakeRunner]:
    return {"eager": machine.runner("eager", original_ms), "int8": machine.runner("int8", engine_ms)}


def of(latencies: Latencies, candidate: str, batch: int = 1) -> Latency:
    found = estimates.find(latencies.latencies, candidate, batch)
    assert found is not None
    return found


@pytest.fixture(autouse=True)
def _an_idle_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "_scheduled_ns", lambda: (0, 0))


class TestSchedule:
    def test_every_candidate_runs_at_least_block_ms_in_every_block(self, run: Make) -> None:
        taken = run(two(Machine(), 1.0, 7.0), blocks=20, block_ms=50.0)
        for name, calls in (("eager", 50), ("control", 50), ("int8", 8)):
            assert np.bincount(of(taken, name).block_of).tolist() == [calls] * 20

    def test_slow_models_run_three_calls_in_a_block(self, run: Make) -> None:
        taken = run(two(Machine(), 400.0, 90.0), blocks=5)
        assert np.bincount(of(taken, "eager").block_of).tolist() == [3] * 5

    def test_the_control_is_the_original_once_more(self, run: Make) -> None:
        machine = Machine()
        taken = run(two(machine, 2.0, 1.0), blocks=5)
        assert [entry.candidate for entry in taken.latencies] == ["eager", "int8", "control"]
        assert of(taken, "control").samples_s == of(taken, "eager").samples_s
        assert {name for name, _ in machine.log} == {"eager", "int8"}

    def test_an_engine_carries_its_hash_and_the_original_has_none(self, run: Make) -> None:
        taken = run(two(Machine()), blocks=5)
        assert {entry.candidate: entry.engine_sha256 for entry in taken.latencies} == {
            "eager": None,
            "int8": "sha-of-int8",
            "control": None,
        }

    def test_the_order_inside_blocks_is_random_recorded_and_the_same_again(self, run: Make) -> None:
        logs = []
        for _ in range(2):
            machine = Machine()
            taken = run(two(machine), blocks=20, batches=(4,))
            logs.append([name for name, calls in machine.log if calls == 50][-60:])
        assert logs[0] == logs[1]
        names = ["eager", "int8", "eager"]
        expected = [names[i] for block in range(20) for i in np.random.default_rng([0, 4, block]).permutation(3)]
        assert logs[0] == expected
        assert len({tuple(expected[i : i + 3]) for i in range(0, 60, 3)}) > 1
        (note,) = taken.notes
        assert note == (
            "order of candidates inside a block: numpy.random.default_rng([0, batch, block]).permutation of "
            "eager, int8, control"
        )

    def test_warm_up_goes_on_until_times_hold_still_and_is_not_in_the_samples(self, run: Make) -> None:
        machine = Machine()
        candidates = {"eager": machine.runner("eager", 1.0, [900.0, 9.0, 5.0, 4.0, 3.0, 2.0, 1.5, 1.2])}
        taken = run(candidates, blocks=5)
        assert set(of(taken, "eager").samples_s) == {0.001}
        assert len(taken.notes) == 1

    def test_warm_up_takes_a_fifth_of_a_second_at_least(self, run: Make) -> None:
        machine = Machine()
        run({"eager": machine.runner("eager", 1.0)}, blocks=5, block_ms=1.0)
        assert machine.elapsed_s - 2 * 5 * 3e-3 >= latency.WARM_S

    def test_a_candidate_that_never_holds_still_is_bounded_and_noted(self, run: Make) -> None:
        machine = Machine()
        restless = machine.runner("int8", 1.0, [1.0, *([1.0, 1.5] * 500)])
        taken = run({"eager": machine.runner("eager", 1.0), "int8": restless}, blocks=5)
        assert taken.notes[0] == (
            "batch 1: int8 did not hold still within 2 s of warm-up (the last medians differ by more than 2%)"
        )
        assert machine.elapsed_s < 10

    def test_all_candidates_together_warm_up_for_a_quarter_of_the_limit(self, run: Make) -> None:
        machine = Machine()
        restless = {name: machine.runner(name, 1.0, [1.0, *([1.0, 1.5] * 500)]) for name in ("eager", "int8")}
        taken = run(restless, blocks=5, limit_s=2.0)
        held = "did not hold still within 0.25 s of warm-up (the last medians differ by more than 2%)"
        assert taken.notes[:2] == (f"batch 1: eager {held}", f"batch 1: int8 {held}")
        blocks_s = sum(sum(latency.samples_s) for latency in taken.latencies)
        assert 0.5 <= machine.elapsed_s - blocks_s < 0.7

    def test_blocks_double_to_80_while_a_gate_is_undecided(self, run: Make) -> None:
        seen: list[int] = []

        def undecided(latencies: Sequence[Latency]) -> bool:
            seen.append(len(set(latencies[0].block_of)))
            return len(seen) < 2

        assert max(of(run(two(Machine()), blocks=10, undecided=undecided), "eager").block_of) == 19
        assert seen == [10, 20]
        seen.clear()
        assert max(of(run(two(Machine()), blocks=30, undecided=lambda taken: True), "eager").block_of) == 79

    def test_only_the_batch_size_that_is_undecided_is_measured_again(self, run: Make) -> None:
        taken = run(two(Machine()), blocks=5, batches=(1, 8), undecided=lambda latencies: latencies[0].batch == 8)
        assert [max(of(taken, "eager", batch).block_of) for batch in (1, 8)] == [4, 79]

    def test_time_is_bounded_but_for_five_blocks(self, run: Make) -> None:
        machine = Machine()
        taken = run(two(machine, 30_000.0, 30_000.0), blocks=20)
        assert max(of(taken, "eager").block_of) == 4
        assert taken.notes[0] == "batch 1: stopped after 5 of 20 blocks, at the limit of 60 s"
        slow = run(two(Machine(), 1000.0, 1000.0), blocks=20)
        assert max(of(slow, "eager").block_of) + 1 == 60 // 9

    def test_a_machine_that_others_use_is_noted(self, run: Make, monkeypatch: pytest.MonkeyPatch) -> None:
        readings = iter([(0, 0), (90, 10), (90, 10), (169, 31)])
        monkeypatch.setattr(latency, "_scheduled_ns", lambda: next(readings))
        notes = run(two(Machine()), blocks=5, batches=(1, 8)).notes
        assert [note for note in notes if "waited" in note] == [
            (
                "batch 8: threads that could run waited 21% of the time for a core; other work shares this machine and slows "
                "candidates unequally, so trust these ratios less than their bounds"
            )
        ]

    def test_what_surrounds_the_numbers_is_recorded(self, run: Make, platform: Platform) -> None:
        taken = run(two(Machine()), blocks=5)
        assert (taken.platform, taken.threads) == (platform, 2)
        assert taken.boundary == (
            "one synchronised call of a loaded model, from arrays in host memory to arrays in host memory, "
            "copies to and from a device included; loading, pre- and post-processing are not"
        )
        assert taken.started.endswith("+00:00")
        assert min(taken.load_before, taken.load_after) >= 0

    def test_notes_of_the_caller_come_first(self, platform: Platform) -> None:
        taken = latency.measure(
            LatencySection(blocks=5),
            two(Machine()),
            lambda batch: {},
            (1,),
            engine_sha256={},
            platform=platform,
            threads=1,
            undecided=lambda latencies: False,
            notes=("torch.compile is not timed: no compiler",),
        )
        assert taken.notes[0] == "torch.compile is not timed: no compiler"

    def test_progress_ends_at_its_total(self, platform: Platform) -> None:
        seen: list[tuple[int, int]] = []
        latency.measure(
            LatencySection(blocks=5),
            two(Machine()),
            lambda batch: {},
            (1, 2),
            engine_sha256={},
            platform=platform,
            threads=1,
            undecided=lambda latencies: False,
            progress=lambda done, total: seen.append((done, total)),
        )
        assert seen == [(done, 10) for done in range(1, 11)]

    def test_a_candidate_that_cannot_run_ends_the_run_with_its_own_error(self, run: Make) -> None:
        class Broken(FakeRunner):
            def time(self, feeds: Feeds, repeats: int) -> list[float]:
                raise BuildError("engine 'int8': it does not run.")

        machine = Machine()
        with pytest.raises(BuildError) as refused:
            run({"eager": machine.runner("eager", 1.0), "int8": Broken(machine, "int8", 1.0, [])})
        assert refused.value.message == "engine 'int8': it does not run."

    def test_an_engine_named_like_the_control_is_refused(self, run: Make) -> None:
        machine = Machine()
        with pytest.raises(RecipeError) as refused:
            run({"eager": machine.runner("eager", 1.0), "control": machine.runner("control", 1.0)})
        assert refused.value.message == (
            "[[engines]] name: found 'control', which names the A/A control in every latency run. Choose another name."
        )


class TestVerdicts:
    """60 whole runs at the limit «at most 2 % slower», on a machine that drifts by several per cent."""

    GATE = GateSection(metric="speedup_p50", min=1 / 1.02)

    @pytest.fixture
    def outcomes(self, run: Make, engine: Make) -> Callable[..., list[Outcome]]:
        built: Engine = engine()
        scores = {"int8": Scores(engine="int8", engine_sha256=built.sha256, data_sha256="d", scores=())}

        def undecided(latencies: Sequence[Latency]) -> bool:
            return judge.latency_undecided((self.GATE,), (built,), latencies)

        def repeat(engine_ms: float, times: int = 60, **noise: float) -> list[Outcome]:
            found = []
            for seed in range(times):
                candidates = two(Machine(seed, **noise), 1.0, engine_ms)
                taken = run(candidates, undecided=undecided)
                found.append(judge.judge((self.GATE,), (built,), scores, taken, 1)[0].outcome)
            return found

        return repeat

    def test_the_same_model_twice_passes(self, outcomes: Make) -> None:
        found = outcomes(1.0, drift=0.002, jitter=0.02, spikes=1.0)
        assert found.count(FAIL) == 0
        assert found.count(PASS) >= 57

    def test_five_per_cent_slower_fails(self, outcomes: Make) -> None:
        found = outcomes(1.05, drift=0.002, jitter=0.02, spikes=1.0)
        assert found.count(PASS) == 0
        assert found.count(FAIL) >= 57

    def test_on_a_machine_that_is_too_noisy_no_verdict_is_wrong(self, outcomes: Make) -> None:
        assert set(outcomes(1.0, 12, drift=0.1, jitter=0.3, spikes=3.0)) <= {PASS, INCONCLUSIVE}
        assert set(outcomes(1.05, 12, drift=0.1, jitter=0.3, spikes=3.0)) <= {FAIL, INCONCLUSIVE}

    def test_one_after_the_other_would_be_wrong(self) -> None:
        """The planted fault: means of two runs in sequence, on the drifting machine of the last test."""
        wrong = 0
        for seed in range(60):
            machine = Machine(seed, drift=0.1, jitter=0.3, spikes=3.0)
            one, other = (
                np.mean([np.mean(machine.runner("x", 1.0).time({}, 50)) for _ in range(20)]) for _ in range(2)
            )
            wrong += bool(other / one > 1.05)
        assert wrong >= 12

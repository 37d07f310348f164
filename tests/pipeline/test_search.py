"""A search finds the mixture that is known to be best, keeps to its time, and goes on where it was interrupted."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import compiler.pipeline.search
from compiler.errors import CalibrationError
from compiler.pipeline.search import TIMED, search
from compiler.quantize.groups import Group
from compiler.recipe import GateSection, SearchSection
from compiler.spec import (
    Array,
    Engine,
    Feeds,
    GateResult,
    OnnxModel,
    Outcome,
    Platform,
    Precision,
    Runner,
    Score,
    Scores,
    Search,
    TensorSpec,
    ValidationSet,
    Verdict,
)

PLATFORM = Platform(
    os="Linux", arch="x86_64", cpu="", cores=1, gpu=None, compute_capability=None, driver=None, packages={}
)
EVERYTHING = "everything stays FP32"


def groups(**costs: tuple[float, int]) -> tuple[Group, ...]:
    """By name: multiplications, and bytes of weights."""
    return tuple(Group(keep=(name,), macs=macs, weight_bytes=size) for name, (macs, size) in costs.items())


@dataclass
class Fake:
    """A workshop in which each rounded layer adds noise of its own, and costs a quarter of what it costs in FP32.

    The drop of the metric is the sum of the noises. A model's hash is the list of its rounded layers.
    """

    groups: Sequence[Group]
    noises: Mapping[str, float]
    speed_of_int8: float = 4.0
    outcome: Callable[[float], Outcome] = lambda drop: Outcome.PASS if drop <= 0.1 else Outcome.FAIL
    timing: Mapping[frozenset[str], float] | None = None
    """Speed-up by kept layers, in the place of the sum over layers."""
    runs_here: bool = True
    has_switches: bool = False
    """Whether all noises can be had at once."""
    interrupt_at: int = 0
    seconds: float = 0.0
    """What a measurement takes, on a clock of its own ..."""
    later: float = 1.0
    """... and how many times that from the fifth on: no early measurement tells how long all will take."""
    clock: float = 0.0
    built: list[str] = field(default_factory=list)
    measured: list[str] = field(default_factory=list)
    """What was scored or looked at alone, in order."""
    timed: int = 0
    time_left_s: float = 0.0
    """What was left when engines were timed."""

    def plain(self, precision: Precision, out_dir: Path) -> OnnxModel:
        return self._model(EVERYTHING, precision, out_dir)

    def mix(self, keep: Sequence[str], out_dir: Path) -> OnnxModel:
        rounded = sorted(set(self.noises) - set(keep))
        if not rounded:
            raise CalibrationError("model: nothing is left to round.")
        return self._model(json.dumps(rounded), Precision.INT8, out_dir)

    def build(self, model: OnnxModel, out_dir: Path) -> Engine:
        self.built.append(model.sha256)
        (out_dir / "engine.onnx").write_text(model.sha256)
        size = sum(
            group.weight_bytes // (4 if group.keep[0] in self._rounded(model.sha256) else 1) for group in self.groups
        )
        return Engine(
            name="int8", path=out_dir / "engine.onnx", sha256=model.sha256, size_bytes=size, backend="", backend_reason="",
            precision=model.precision, model_sha256=model.sha256, platform=PLATFORM, inputs=(), outputs=(), axes={}, build_s=0.0,
        )  # fmt: skip

    def open(self, engine: Engine) -> Runner:
        return Opened(engine)

    def score(self, engine: Engine, runner: Runner) -> Scores:
        self._measure(engine, "score")
        drop = self.drop(engine)
        score = Score(
            metric="top1", value=0.9 - drop, original=0.9, change=-drop, samples=64, binary=True, higher_is_better=True
        )
        return Scores(engine="int8", engine_sha256=engine.sha256, data_sha256="d", scores=(score,))

    def noise(self, engine: Engine, runner: Runner, samples: int) -> float:
        self._measure(engine, "noise")
        return self.drop(engine)

    def noise_of_each(self, groups: Sequence[Group], samples: int) -> list[float] | None:
        if not self.has_switches:
            return None
        self.measured.append("each alone")
        return [sum(self.noises[name] for name in group.keep) for group in groups]

    def judge(self, engine: Engine, scores: Scores) -> Verdict:
        outcome = self.outcome(self.drop(engine))
        gate = GateResult(engine="int8", gate="", outcome=outcome, measured=None, low=None, high=None, reason="")
        return Verdict(engine="int8", engine_sha256=engine.sha256, outcome=outcome, gates=(gate,))

    def time(self, runners: Mapping[str, Runner], limit_s: float) -> Mapping[str, Mapping[int, tuple[float, float]]]:
        self.timed += 1
        self.time_left_s = limit_s
        if not self.runs_here:
            return {}
        speeds = {name: self._speed(runner.engine) for name, runner in runners.items() if isinstance(runner, Opened)}
        return {name: {1: (speed, 10 / speed)} for name, speed in speeds.items()}

    def drop(self, engine: Engine) -> float:
        return sum(self.noises[name] for name in self._rounded(engine.sha256))

    def _rounded(self, sha256: str) -> list[str]:
        return [] if sha256 == EVERYTHING else list(json.loads(sha256))

    def _speed(self, engine: Engine) -> float:
        rounded = self._rounded(engine.sha256)
        if self.timing is not None:
            return self.timing[frozenset(self.noises) - set(rounded)]
        macs = {group.keep[0]: group.macs for group in self.groups}
        taken = sum(cost / (self.speed_of_int8 if name in rounded else 1) for name, cost in macs.items())
        return sum(macs.values()) / taken

    def _measure(self, engine: Engine, kind: str) -> None:
        self.clock += self.seconds * (self.later if len(self.measured) >= 4 else 1)
        self.measured.append(f"{kind} {engine.sha256}")
        if len(self.measured) == self.interrupt_at:
            raise KeyboardInterrupt

    @staticmethod
    def _model(sha256: str, precision: Precision, out_dir: Path) -> OnnxModel:
        return OnnxModel(
            path=out_dir / "model.onnx", sha256=sha256, precision=precision, opset=20, inputs=(), outputs=(), axes={}
        )


class Opened:
    inputs: tuple[TensorSpec, ...] = ()
    outputs: tuple[TensorSpec, ...] = ()

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        assert engine.path.exists(), "an engine lives as long as its runner"

    def run(self, feeds: Feeds) -> dict[str, Array]:
        raise NotImplementedError

    def time(self, feeds: Feeds, repeats: int) -> list[float]:
        raise NotImplementedError

    def close(self) -> None: ...


def found(fake: Fake, folder: Path, **section: Any) -> Search:
    out_dir = folder / "out"
    out_dir.mkdir(parents=True, exist_ok=True)
    budget = (GateSection(metric="top1", max_drop=0.1),)
    result = search(
        "int8",
        SearchSection(**section),
        budget,
        fake.groups,
        ValidationSet(path=folder, samples=64, sha256="d" * 64, labelled=True),
        fake,
        rivals=(Precision.FP32,),
        journal=folder / "journal.jsonl",
        out_dir=out_dir,
        progress=lambda done, total: None,
    )
    assert not list(out_dir.iterdir()), "the folder is left empty"
    return result


# Two of eight layers make nearly all of the noise, and one costs next to nothing to keep: it comes first in the order of
# noise per multiplication, and need not be kept.
EIGHT = groups(**{f"layer{place}": (100.0, 400) for place in range(7)}, tiny=(1.0, 4))
NOISES = {**{f"layer{place}": 0.005 for place in range(7)}, "layer2": 0.3, "layer5": 0.2, "tiny": 0.01}
BEST = ("layer2", "layer5")


def test_the_mixture_that_is_known_to_be_best_is_found_and_thinned(tmp_path: Path) -> None:
    result = found(Fake(EIGHT, NOISES), tmp_path)
    assert result.point.keep == BEST
    assert (result.point.kept_layers, result.point.layers) == (2, 8)
    assert result.point.within
    assert result.point.precision is Precision.INT8
    assert result.point.measured == {"top1": pytest.approx(0.9 - 0.035)}
    tried = [point.keep for point in result.points]
    assert ("layer2", "layer5", "tiny") in tried, "what was thinned is among the points"
    everything = [
        keep for size in range(8) for keep in itertools.combinations(sorted(NOISES), size)
        if sum(NOISES[name] for name in NOISES if name not in keep) <= 0.1
    ]  # fmt: skip
    costs = {group.keep[0]: group.macs for group in EIGHT}
    assert min(everything, key=lambda keep: sum(costs[name] for name in keep)) == BEST


def test_what_is_timed_is_not_made_again_while_there_is_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def built(folder: str) -> list[str]:
        fake = Fake(EIGHT, NOISES, has_switches=True)
        assert found(fake, tmp_path / folder).point.keep == BEST
        return fake.built

    once = built("a")
    assert len(set(once)) == len(once)
    monkeypatch.setattr(compiler.pipeline.search, "KEPT_BYTES", sum(group.weight_bytes for group in EIGHT))
    again = built("b")
    assert set(again) == set(once)
    assert len(again) == len(once) + TIMED - 1, "there was room for FP32 alone"


def test_noises_that_are_had_at_once_are_not_measured_one_by_one(tmp_path: Path) -> None:
    fake = Fake(EIGHT, NOISES, has_switches=True)
    result = found(fake, tmp_path)
    assert result.point.keep == BEST
    one_by_one = Fake(EIGHT, NOISES)
    assert [point.keep for point in found(one_by_one, tmp_path / "slow").points] == [p.keep for p in result.points]
    assert fake.measured.count("each alone") == 1
    assert len(fake.measured) == len(one_by_one.measured) - 8 + 1


def test_where_losses_are_proportional_to_noise_the_first_mixture_keeps_within_the_budget(tmp_path: Path) -> None:
    """32 alike, of which 4 may be rounded with a tenth to spare: halving would begin with 16."""
    alike = groups(**{f"layer{place:02}": (100.0, 400) for place in range(32)})
    result = found(Fake(alike, {group.keep[0]: 0.02 for group in alike}, has_switches=True), tmp_path)
    first = result.points[2]
    assert (first.kept_layers, first.within) == (28, True)


def test_one_long_measurement_does_not_end_the_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow(Fake):
        def noise_of_each(self, groups: Sequence[Group], samples: int) -> list[float] | None:
            self.clock += 50.0
            return super().noise_of_each(groups, samples)

    fake = Slow(EIGHT, NOISES, has_switches=True, seconds=1.0)
    monkeypatch.setattr(time, "monotonic", lambda: fake.clock)
    assert found(fake, tmp_path, minutes=1.5).point.keep == BEST


def test_where_everything_may_be_rounded_nothing_is_measured_alone(tmp_path: Path) -> None:
    fake = Fake(EIGHT, dict.fromkeys(NOISES, 0.001))
    result = found(fake, tmp_path)
    assert result.point.keep == ()
    assert [point.precision for point in result.points] == [Precision.FP32, Precision.INT8]
    assert len(fake.measured) == 4, "a score and a noise of each"


def test_fp32_is_chosen_where_int8_is_not_faster_and_the_reason_says_so(tmp_path: Path) -> None:
    result = found(Fake(EIGHT, NOISES, speed_of_int8=0.5), tmp_path)
    assert result.point.precision is Precision.FP32
    assert result.reason.startswith("no mixture within the budget is faster than FP32: the best takes 1.")
    assert result.reason.endswith(" times as long")


def test_fp32_is_chosen_where_no_mixture_keeps_within_the_budget(tmp_path: Path) -> None:
    result = found(Fake(EIGHT, dict.fromkeys(NOISES, 0.2)), tmp_path)
    assert result.point.precision is Precision.FP32
    assert result.reason == "no mixture with a rounded layer was found within the budget: the engine stays FP32"


def test_by_size_the_smallest_within_the_budget_is_chosen(tmp_path: Path) -> None:
    sizes = groups(large=(1.0, 4000), small=(1000.0, 40), other=(1.0, 400))
    fake = Fake(sizes, {"large": 0.08, "small": 0.07, "other": 0.0})
    assert found(fake, tmp_path / "size", objective="size").point.keep == ("small",)
    assert found(Fake(sizes, fake.noises), tmp_path / "latency", objective="latency").point.keep == ("large",)


def test_where_engines_cannot_run_the_least_list_is_chosen_and_the_reason_says_so(tmp_path: Path) -> None:
    result = found(Fake(EIGHT, NOISES, runs_here=False), tmp_path)
    assert result.point.keep == BEST
    assert result.reason == "engines cannot run here: the mixture within the budget that keeps least in high precision"
    assert not any(point.on_front or point.p50_ms for point in result.points)


@pytest.mark.parametrize("torn", [b"", b'{"key": "[\\"mixed\\", [\\"lay', b'{"key": "a"}\n', b"\xff\xfe\n"])
@pytest.mark.parametrize("interrupt_at", [1, 4, 9, 17, 21])
def test_an_interrupted_search_goes_on_without_measuring_again(tmp_path: Path, interrupt_at: int, torn: bytes) -> None:
    whole = Fake(EIGHT, NOISES)
    expected = found(whole, tmp_path / "whole")
    assert len(whole.measured) > interrupt_at
    first = Fake(EIGHT, NOISES, interrupt_at=interrupt_at)
    folder = tmp_path / "torn"
    with pytest.raises(KeyboardInterrupt):
        found(first, folder)
    assert not list((folder / "out").iterdir()), "a search that was interrupted leaves nothing but its journal"
    journal = folder / "journal.jsonl"
    with journal.open("ab") as file:
        file.write(torn)
    second = Fake(EIGHT, NOISES)
    result = found(second, folder)
    assert [(p.keep, p.within, p.on_front) for p in result.points] == [
        (p.keep, p.within, p.on_front) for p in expected.points
    ]
    assert (result.chosen, result.reason) == (expected.chosen, expected.reason)
    # What was finished is not made again; a measurement that was cut off is.
    again = set(first.measured[: interrupt_at - 2]) & set(second.measured)
    assert not again
    assert set(first.measured) | set(second.measured) == set(whole.measured)
    third = Fake(EIGHT, NOISES)
    assert found(third, folder).chosen == expected.chosen
    assert (third.measured, third.timed) == ([], 0)


@pytest.mark.parametrize(("seconds", "later"), [(2.0, 1.0), (5.0, 1.0), (12.0, 1.0), (1.0, 5.0), (0.5, 8.0)])
def test_the_time_limit_is_kept_and_what_was_left_out_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float, later: float
) -> None:
    many = groups(**{f"layer{place:02}": (100.0, 400) for place in range(40)})
    noises = {group.keep[0]: 0.2 if place % 4 == 0 else 0.001 for place, group in enumerate(many)}
    fake = Fake(many, noises, seconds=seconds, later=later)
    monkeypatch.setattr(time, "monotonic", lambda: fake.clock)
    result = found(fake, tmp_path, minutes=2.0)
    assert fake.clock <= 120
    assert result.seconds <= 120
    assert fake.time_left_s == pytest.approx(max(120 - fake.clock, 0.15 * 120)), "what is left is for timing"
    assert any(
        note.startswith(
            ("2 minutes were over before", "no time was left to measure", "40 groups of layers were measured as ")
        )
        for note in result.notes
    ), result.notes
    assert result.point.within, "what is chosen keeps within the budget all the same"


def test_time_spent_before_an_interruption_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Fake(EIGHT, NOISES, seconds=5.0, interrupt_at=12)
    monkeypatch.setattr(time, "monotonic", lambda: fake.clock)
    with pytest.raises(KeyboardInterrupt):
        found(fake, tmp_path, minutes=1.5)
    second = Fake(EIGHT, NOISES, seconds=5.0)
    monkeypatch.setattr(time, "monotonic", lambda: second.clock)
    result = found(second, tmp_path, minutes=1.5)
    assert second.clock <= 90 - 50
    assert 50 <= result.seconds <= 90


def test_where_samples_cannot_show_the_budget_measured_values_are_compared_with_a_note(tmp_path: Path) -> None:
    result = found(Fake(EIGHT, NOISES, outcome=lambda drop: Outcome.INCONCLUSIVE), tmp_path)
    assert result.point.keep == BEST
    assert result.notes == (
        (
            "64 selection samples cannot show the budget at its confidence even of FP32: measured values were compared. "
            "Give [search] more samples, or selection() more to yield."
        ),
    )
    assert not found(Fake(EIGHT, NOISES), tmp_path / "sure").notes


def test_a_mixture_that_is_not_shown_to_keep_within_the_budget_is_not_chosen(tmp_path: Path) -> None:
    """Measured, keeping two layers is enough; with confidence it takes a third."""

    def outcome(drop: float) -> Outcome:
        return Outcome.PASS if drop <= 0.032 else Outcome.INCONCLUSIVE

    assert len(found(Fake(EIGHT, NOISES, outcome=outcome), tmp_path).point.keep) == 3


def test_the_front_is_what_no_other_point_beats(tmp_path: Path) -> None:
    """Of the points that this search tries, keeping b alone is slower and noisier than keeping a alone, and no smaller."""
    timing = {
        frozenset("abc"): 1.0, frozenset(): 3.0, frozenset("a"): 2.0, frozenset("b"): 1.9, frozenset("ab"): 1.5,
    }  # fmt: skip
    three = groups(a=(1.0, 100), b=(1.0, 100), c=(1.0, 100))
    result = found(Fake(three, {"a": 0.3, "b": 0.2, "c": 0.05}, timing=timing), tmp_path)
    front = {(point.precision.value, point.keep): point.on_front for point in result.points}
    assert front == {
        ("fp32", ()): True,
        ("int8", ()): True,
        ("int8", ("a",)): True,
        ("int8", ("b",)): False,
        ("int8", ("a", "b")): True,
    }
    assert result.point.keep == ("a", "b")
    assert result.point.p50_ms == {"1": pytest.approx(10 / 1.5)}
    assert result.reason == "the fastest of 1 timed mixtures within the budget: 1.50 times as fast as FP32"


def test_the_result_says_what_it_was_selected_by(tmp_path: Path) -> None:
    result = found(Fake(EIGHT, NOISES), tmp_path)
    assert (result.engine, result.samples, result.data_sha256) == ("int8", 64, "d" * 64)
    assert result.budget == ("top1 drop <= 0.1 (95%)",)

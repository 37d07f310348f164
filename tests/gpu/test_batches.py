"""One batch size, with runners that take as long as they are told to."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from scripts.gpu import batches, candidates, children, energy, missing, nvml
from tests.gpu.fakes import Clock, Nvml


class Runner:
    """Takes ``host_ms`` and ``device_ms`` per call, and says what it was asked."""

    def __init__(self, name: str, log: list[tuple[str, str, int]], host_ms: float, answer: float = 1.0) -> None:
        self.name, self.log, self.host_ms, self.answer, self.closed = name, log, host_ms, answer, False

    def run(self, feeds: Any) -> dict[str, Any]:
        return {"y": np.full((2, 4), self.answer, np.float32)}

    def time(self, feeds: Any, repeats: int) -> list[float]:
        self.log.append((self.name, "host", repeats))
        return [self.host_ms / 1e3] * repeats

    def close(self) -> None:
        self.closed = True


class DeviceRunner(Runner):
    def time_device(self, feeds: Any, repeats: int) -> list[float]:
        self.log.append((self.name, "device", repeats))
        return [self.host_ms / 2e3] * repeats


@pytest.mark.usefixtures("quick")
class TestBatch:
    def measured(self, *runners: tuple[str, str, Any], **options: Any) -> dict[str, Any]:
        """What is found of runners, each with how it is made; a text in place of one is why it cannot be opened."""
        found: dict[str, Any] = {"batch": 2, "work": {"flops": 1}}
        opened: list[candidates.Opened] = []
        for name, how, runner in runners:
            entry = candidates.described(name, how, "fp32")
            opened.append((entry | {"missing": runner}, None) if isinstance(runner, str) else (entry, runner))
        emitted: list[str] = []
        batches.measure_batch(
            found,
            opened,
            {},
            gauge=options.get("gauge", {"missing": "no NVML"}),
            energy=options.get("energy", True),
            deadline=options.get("deadline", children.Deadline(3600)),
            emit=lambda: emitted.append(json.dumps(missing.finite(found))),
        )
        assert len(emitted) >= len(runners)
        return found

    def test_candidates_take_turns_in_an_order_that_the_seed_gives(self) -> None:
        log: list[tuple[str, str, int]] = []
        found = self.measured(
            ("eager", "eager", DeviceRunner("eager", log, 1.0)),
            ("int8", "tensorrt", DeviceRunner("int8", log, 0.5)),
        )
        names = ["eager", "int8", "eager"]  # the last is the control
        expected = [names[i] for block in range(5) for i in np.random.default_rng([0, 2, block]).permutation(3)]
        for boundary, calls in (("host", {"eager": 10, "int8": 20}), ("device", {"eager": 20, "int8": 40})):
            turns = [(name, repeats) for name, where, repeats in log if where == boundary][-15:]
            assert turns == [(name, calls[name]) for name in expected]
        assert len({tuple(expected[start : start + 3]) for start in range(0, 15, 3)}) > 1
        samples = found["samples"]["host"]["latencies"]
        assert [(one["candidate"], len(one["samples_s"]), max(one["block_of"])) for one in samples] == [
            ("eager", 50, 4),
            ("int8", 100, 4),
            ("control", 50, 4),
        ]
        assert found["samples"]["host"]["control"] == {"ratio_width": 0.0}

    def test_medians_and_ratios_at_both_boundaries(self) -> None:
        log: list[tuple[str, str, int]] = []
        found = self.measured(
            ("eager", "eager", DeviceRunner("eager", log, 1.0)),
            ("compile fp16", "compile", DeviceRunner("compile fp16", log, 0.4)),
            ("int8", "tensorrt", DeviceRunner("int8", log, 0.25)),
        )
        eager, compiled, engine = found["candidates"]
        assert engine["host"]["median_ms"] == pytest.approx(0.25)
        assert engine["device"]["median_ms"] == pytest.approx(0.125)
        assert engine["device"]["per_s"] == pytest.approx(16_000)
        assert engine["host"]["speedup"] == {name: pytest.approx(4.0) for name in ("value", "low", "high")}
        assert engine["host"]["over_torch"]["value"] == pytest.approx(1.6)
        assert "over_torch" not in compiled["host"]
        assert found["samples"]["host"]["fastest_torch"] == "compile fp16"
        assert eager["host"]["speedup"]["value"] == 1.0

    def test_a_candidate_that_fails_is_named_and_not_timed(self) -> None:
        log: list[tuple[str, str, int]] = []

        class Failing(DeviceRunner):
            def run(self, feeds: Any) -> dict[str, Any]:
                raise torch.OutOfMemoryError("CUDA out of memory\nwith details")

        found = self.measured(
            ("eager", "eager", DeviceRunner("eager", log, 1.0)),
            ("nan", "tensorrt", DeviceRunner("nan", log, 1.0, answer=float("nan"))),
            ("oom", "tensorrt", Failing("oom", log, 1.0)),
            ("closed", "tensorrt", "engine.plan: refused."),
        )
        assert [candidate.get("missing") for candidate in found["candidates"]] == [
            None,
            "its output 'y' holds NaN or Inf",
            "OutOfMemoryError: CUDA out of memory",
            "engine.plan: refused.",
        ]
        assert {name for name, _, _ in log} == {"eager"}

    def test_without_the_original_nothing_is_timed(self) -> None:
        log: list[tuple[str, str, int]] = []
        found = self.measured(("eager", "eager", "out of memory"), ("int8", "tensorrt", DeviceRunner("int8", log, 1.0)))
        assert [candidate["missing"] for candidate in found["candidates"]] == [
            "out of memory",
            "the original in eager FP32, to compare with, does not run",
        ]
        assert log == []

    def test_a_back_end_without_a_device_clock_is_timed_from_host_to_host(self) -> None:
        log: list[tuple[str, str, int]] = []
        found = self.measured(
            ("eager", "eager", DeviceRunner("eager", log, 1.0)), ("int8", "onnxruntime", Runner("int8", log, 1.0))
        )
        assert found["candidates"][1]["host"]["median_ms"] == pytest.approx(1.0)
        assert found["candidates"][1]["device"] == {"missing": "onnxruntime: its runner has no time_device"}

    def test_how_far_outputs_are_from_the_original_s_is_told(self) -> None:
        log: list[tuple[str, str, int]] = []
        found = self.measured(
            ("eager", "eager", DeviceRunner("eager", log, 1.0)),
            ("int8", "tensorrt", DeviceRunner("int8", log, 1.0, answer=-0.5)),
        )
        assert found["candidates"][0]["difference"] is None
        assert found["candidates"][1]["difference"] == {"cosine": pytest.approx(-1.0), "max_abs_diff": 1.5}

    def test_energy_is_measured_for_all_or_the_reason_is_given(self, monkeypatch: pytest.MonkeyPatch) -> None:
        log: list[tuple[str, str, int]] = []
        eager = ("eager", "eager", DeviceRunner("eager", log, 1.0))
        assert self.measured(eager)["candidates"][0]["energy"] == {"missing": "no NVML"}
        assert self.measured(eager, energy=False)["candidates"][0]["energy"] == {"missing": "not asked for (--only)"}
        clock = Clock()
        gauge = nvml.Gauge(Nvml(clock), "handle", clock)
        monkeypatch.setattr(energy, "measure_idle", lambda gauge: {"watts": 90.0})
        asked: list[Any] = []

        def measure(call: Callable[[int], list[float]], batch: int, gauge: Any, idle: Any) -> dict[str, Any]:
            asked.append((batch, idle, call(3)))
            return {"watts": 1, "ms_per_call": 2.0 if len(asked) == 2 else 0.6}

        monkeypatch.setattr(energy, "measure_energy", measure)
        found = self.measured(eager, ("int8", "onnxruntime", Runner("int8", log, 1.0)), gauge=gauge)
        assert found["idle"] == {"watts": 90.0}
        assert [entry["notes"] for entry in found["candidates"]] == [
            [],
            ["energy: a call took 2 ms while it was measured, and 1 ms before"],
        ]
        assert asked == [(2, {"watts": 90.0}, [0.0005] * 3), (2, {"watts": 90.0}, [0.001] * 3)]
        assert found["samples"]["host"]["conditions"]["power_w"]["max"] == 300

    def test_what_no_time_is_left_for_is_named(self) -> None:
        log: list[tuple[str, str, int]] = []
        clock = Clock()
        gauge = nvml.Gauge(Nvml(clock), "handle", clock)
        found = self.measured(
            ("eager", "eager", DeviceRunner("eager", log, 1.0)), gauge=gauge, deadline=children.Deadline(0.0, clock)
        )
        assert found["candidates"][0]["host"] == {"missing": "the limit was reached before it began"}
        assert found["candidates"][0]["energy"] == {"missing": "the limit was reached before it began"}

    def test_the_gpu_s_energy_is_not_told_of_an_engine_on_the_cpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(energy, "measure_idle", lambda gauge: {"watts": 90.0})
        monkeypatch.setattr(energy, "measure_energy", lambda call, batch, gauge, idle: {"watts": 1})
        clock = Clock()
        found: dict[str, Any] = {"batch": 1}
        ready = [
            (candidates.described(how, how, "fp32"), Runner(how, [], 1.0))
            for how in ("onnxruntime, CPUExecutionProvider", "onnxruntime, CUDAExecutionProvider")
        ]
        gauge = nvml.Gauge(Nvml(clock), "handle", clock)
        batches.measure_energies(
            found, {}, ready, gauge=gauge, wanted=True, deadline=children.Deadline(60), emit=lambda: None
        )
        assert [entry["energy"] for entry, _ in ready] == [
            {"missing": "it runs on the CPU, and only the GPU's energy is measured"},
            {"watts": 1},
        ]


class TestDifference:
    def test_a_sample_that_turned_is_seen_among_many_that_did_not(self) -> None:
        old = np.eye(4, dtype=np.float32)
        new = old.copy()
        new[3] *= -1
        assert batches.difference({"y": new}, {"y": old}) == {"cosine": -1.0, "max_abs_diff": 2.0}
        assert batches.difference({"y": old}, {"y": old}) == {"cosine": 1.0, "max_abs_diff": 0.0}

    @pytest.mark.parametrize(
        ("outputs", "why"),
        [
            ({"z": np.ones((1, 2), np.float32)}, "its outputs are z; y were expected"),
            ({"y": np.full((1, 2), np.inf, np.float32)}, "its output 'y' holds NaN or Inf"),
            ({"y": np.ones((1, 3), np.float32)}, "its output 'y' is [1, 3]; [1, 2] was expected"),
        ],
    )
    def test_outputs_that_cannot_be_compared_are_refused(self, outputs: dict[str, Any], why: str) -> None:
        with pytest.raises(missing.MissingError) as refused:
            batches.difference(outputs, {"y": np.ones((1, 2), np.float32)})
        assert str(refused.value) == why

"""`scripts/gpu_report` without a GPU: its arithmetic on measurements with known answers, its control flow on machines
that are made up, and what it says where there is nothing to measure. Nothing here shows that a GPU answers as they do."""

from __future__ import annotations

import contextlib
import doctest
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import venv
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

from compiler.errors import ArtifactError, BuildError, RecipeError
from compiler.report import gpu as page
from compiler.spec import DimRange, Engine, Platform, Precision, TensorSpec
from compiler.validate import latency
from scripts import gpu_report as report

ROOT = Path(__file__).parent.parent
SOURCES = [ROOT / "scripts/gpu_report.py", ROOT / "compiler/report/gpu.py"]


def test_the_examples_in_the_docstrings_are_true() -> None:
    failed, attempted = doctest.testmod(report)
    assert (failed, attempted > 0) == (0, True)


SETTER = re.compile(r"nvmlDevice(?!Get)\w+|nvidia-smi|nvmlSystemSet\w+|cudaDeviceReset|set_per_process_memory")


def test_no_setting_of_the_card_is_ever_changed() -> None:
    assert [match for path in SOURCES for match in SETTER.findall(path.read_text())] == []
    assert SETTER.search("nvml.nvmlDeviceSetPowerManagementLimit(handle, 1)")


def test_every_name_of_nvml_exists() -> None:
    nvml = pytest.importorskip("pynvml")
    names = set(re.findall(r"nvml\.((?:nvml|NVML_)\w+)", SOURCES[0].read_text()))
    assert len(names) > 20
    assert [name for name in names if not hasattr(nvml, name)] == []


# --- fakes ----------------------------------------------------------------------------------------------------------


class Clock:
    """A clock that goes on when it is told to, and a card whose power is a function of it."""

    def __init__(self, power_w: Callable[[float], float] = lambda at: 300.0, step_s: float = 0.1) -> None:
        self.now, self.power_w, self.step_s = 0.0, power_w, step_s

    def __call__(self) -> float:
        return self.now

    def energy_j(self) -> float:
        """What a counter that moves every ``step_s`` shows, at constant power."""
        return self.power_w(0.0) * self.step_s * int(self.now / self.step_s + 1e-9)

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class Nvml:
    """As much of pynvml as is asked for; ``without`` names what this card does not tell."""

    NVML_TEMPERATURE_GPU, NVML_CLOCK_SM, NVML_CLOCK_MEM = 0, 1, 2

    def __init__(self, clock: Clock, without: Sequence[str] = ()) -> None:
        self.clock, self.without, self.asked = clock, without, list[str]()

    def __getattr__(self, name: str) -> Any:
        answers: Mapping[str, Callable[..., Any]] = {
            "nvmlInit": lambda: None,
            "nvmlDeviceGetHandleByIndex": lambda index: f"GPU {index}",
            "nvmlDeviceGetHandleByUUID": lambda uuid: uuid,
            "nvmlDeviceGetTotalEnergyConsumption": lambda handle: int(self.clock.energy_j() * 1e3),
            "nvmlDeviceGetPowerUsage": lambda handle: int(self.clock.power_w(self.clock.now) * 1e3),
            "nvmlDeviceGetTemperature": lambda handle, sensor: 55,
            "nvmlDeviceGetClockInfo": lambda handle, kind: {1: 1980, 2: 2619}[kind],
            "nvmlDeviceGetMaxClockInfo": lambda handle, kind: {1: 1980, 2: 2619}[kind],
            "nvmlDeviceGetCurrentClocksThrottleReasons": lambda handle: 0x4,
            "nvmlDeviceGetName": lambda handle: b"NVIDIA Test",
            "nvmlDeviceGetCudaComputeCapability": lambda handle: (9, 0),
            "nvmlSystemGetDriverVersion": lambda: "580.1",
            "nvmlSystemGetCudaDriverVersion_v2": lambda: 13020,
            "nvmlDeviceGetMemoryInfo": lambda handle: SimpleNamespace(total=80 << 30, used=1 << 30),
            "nvmlDeviceGetEnforcedPowerLimit": lambda handle: 700_000,
            "nvmlDeviceGetPowerManagementLimit": lambda handle: 700_000,
            "nvmlDeviceGetEccMode": lambda handle: [1, 1],
            "nvmlDeviceGetPersistenceMode": lambda handle: 0,
            "nvmlDeviceGetComputeRunningProcesses": lambda handle: [1],
        }
        self.asked.append(name)
        if name not in answers:
            raise AttributeError(name)
        if name in self.without:
            return refuse
        return answers[name]


def refuse(*arguments: Any, **options: Any) -> Any:
    raise RuntimeError("Not Supported")


@contextlib.contextmanager
def polled(gauge: report.Gauge, every_s: float) -> Iterator[list[Any]]:
    """`report.sampling` on a `Clock`: a reading for every ``every_s`` that the body made it go on."""
    clock = gauge._clock
    assert isinstance(clock, Clock)
    readings, sleep, due = [gauge.read()], clock.sleep, clock.now + every_s

    def watched(seconds: float) -> None:
        nonlocal due
        end = clock.now + seconds
        while due < end:
            clock.now = due
            readings.append(gauge.read())
            due += every_s
        clock.now = end

    clock.sleep = watched  # type: ignore[method-assign]
    try:
        yield readings
    finally:
        clock.sleep = sleep  # type: ignore[method-assign]
        readings.append(gauge.read())


def timed(clock: Clock, call_s: float) -> Callable[[int], list[float]]:
    def call(repeats: int) -> list[float]:
        clock.sleep(call_s * repeats)
        return [call_s] * repeats

    return call


def readings_of(clock: Clock, until_s: float, every_s: float = 0.02, **without: bool) -> list[Any]:
    found = []
    for index in range(round(until_s / every_s) + 1):
        clock.now = index * every_s
        reading = {"at_s": clock.now, "energy_j": clock.energy_j(), "power_w": clock.power_w(clock.now)}
        found.append({name: value for name, value in reading.items() if name not in without})
    return found


# --- energy ---------------------------------------------------------------------------------------------------------


class TestEnergy:
    def test_the_counter_s_own_steps_give_the_power_that_the_window_s_ends_do_not(self) -> None:
        readings = readings_of(Clock(), 4.0)
        start, end = 1.01, 3.49
        power = report.counter_power(readings, start, end)
        assert power.watts == pytest.approx(300, rel=1e-6)
        assert power.source == "energy counter"
        assert power.error_share == pytest.approx(2 * 0.02 / 2.3, rel=0.05)
        inside = [one for one in readings if start <= one["at_s"] <= end]
        naive = (inside[-1]["energy_j"] - inside[0]["energy_j"]) / (end - start)
        assert abs(naive - 300) / 300 > 0.02

    def test_a_window_in_which_the_counter_hardly_moves_is_refused(self) -> None:
        with pytest.raises(report.MissingError) as refused:
            report.counter_power(readings_of(Clock(), 4.0), 1.0, 1.5)
        assert str(refused.value) == (
            "the window of 0.50 s is too short for the energy counter: it moved 5 times, and 10 are needed"
        )

    def test_a_counter_that_is_read_too_seldom_is_refused(self) -> None:
        with pytest.raises(report.MissingError) as refused:
            report.counter_power(readings_of(Clock(), 4.0, every_s=0.2), 1.0, 3.6)
        assert str(refused.value) == (
            "the window of 2.60 s is too short for how often the energy counter was read: its ends are unsure by 17%, and "
            "5% is allowed"
        )

    def test_a_window_may_hold_no_reading_of_the_counter(self) -> None:
        with pytest.raises(report.MissingError) as refused:
            report.counter_power(readings_of(Clock(), 4.0, energy_j=True), 1.0, 3.5)
        assert str(refused.value) == "the energy counter was not read"

    def test_readings_of_power_are_integrated_by_the_trapezoid_rule(self) -> None:
        ramp = Clock(power_w=lambda at: 100 + 50 * at)
        power = report.sampled_power(readings_of(ramp, 4.0), 1.011, 3.013)
        assert power.watts == pytest.approx(100 + 50 * (1.011 + 3.013) / 2, rel=1e-9)
        assert power.source == "power readings"
        assert power.error_share == pytest.approx(2 * 0.02 / 2.002)

    def test_too_few_readings_of_power_are_refused(self) -> None:
        with pytest.raises(report.MissingError) as refused:
            report.sampled_power(readings_of(Clock(), 4.0), 1.001, 1.1)
        assert str(refused.value) == "the window of 0.10 s holds 4 readings of power, and 10 are needed"

    def test_power_is_taken_where_there_is_no_counter(self) -> None:
        found = report.mean_power(readings_of(Clock(), 4.0, energy_j=True), 1.0, 3.5)
        assert found.source == "power readings"
        assert found.watts == pytest.approx(300)

    def test_both_reasons_are_given_where_there_is_neither(self) -> None:
        with pytest.raises(report.MissingError) as refused:
            report.mean_power([{"at_s": 1.0}], 0.0, 2.5)
        assert str(refused.value) == (
            "the energy counter was not read; the window of 2.50 s holds 0 readings of power, and 10 are needed"
        )

    @pytest.fixture
    def gauge(self) -> report.Gauge:
        clock = Clock()
        return report.Gauge(Nvml(clock), "handle", clock)

    def test_joules_are_per_inference_and_idle_power_is_taken_off(self, gauge: report.Gauge) -> None:
        clock = gauge._clock
        assert isinstance(clock, Clock)

        found = report.measure_energy(timed(clock, 0.001), 8, gauge, {"watts": 100.0}, clock=clock, sampler=polled)
        assert found["joules_per_inference"] == pytest.approx(300 * 0.001 / 8, rel=0.01)
        assert found["joules_per_inference_above_idle"] == pytest.approx(200 * 0.001 / 8, rel=0.01)
        assert found["ms_per_call"] == pytest.approx(1.0)
        assert found["inside_calls_share"] == pytest.approx(1.0)
        assert found["window_s"] >= report.WINDOW_S
        assert found["inferences"] == round(found["window_s"] / 0.001) * 8
        assert found["conditions"]["sm_mhz"] == {"min": 1980, "median": 1980, "max": 1980}
        assert found["conditions"]["throttle"] == ["software power cap"]

    def test_a_window_is_one_request_as_a_runner_may_warm_up_at_each(self, gauge: report.Gauge) -> None:
        clock = gauge._clock
        assert isinstance(clock, Clock)
        asked: list[int] = []

        def call(repeats: int) -> list[float]:
            asked.append(repeats)
            clock.sleep(0.002 * (repeats + 3))  # three untimed calls
            return [0.002] * repeats

        found = report.measure_energy(call, 1, gauge, {"watts": 0.0}, clock=clock, sampler=polled)
        (at_once,) = [repeats for repeats in asked if repeats > 100]
        assert asked[-1] == at_once == pytest.approx(1.1 * 2.5 / (0.002 * 53 / 50), rel=0.01)
        # A call and its share of the untimed ones; as unsure as the ends of the window are.
        expected = 300 * 0.002 * (at_once + 3) / at_once
        assert found["joules_per_inference"] == pytest.approx(expected, rel=found["error_share"])
        assert found["error_share"] < 0.02
        assert found["inside_calls_share"] == pytest.approx(1, abs=0.01)

    def test_joules_are_told_without_idle_power_too(self, gauge: report.Gauge) -> None:
        clock = gauge._clock
        assert isinstance(clock, Clock)
        call = timed(clock, 0.01)
        found = report.measure_energy(call, 1, gauge, {"missing": "no NVML"}, clock=clock, sampler=polled)
        assert found["joules_per_inference"] == pytest.approx(3.0, rel=0.01)
        assert found["joules_per_inference_above_idle"] == {"missing": "idle power: no NVML"}

    def test_idle_power_is_measured_over_a_window_of_nothing(self, gauge: report.Gauge) -> None:
        clock = gauge._clock
        assert isinstance(clock, Clock)
        found = report.measure_idle(gauge, sleep=lambda seconds: clock.sleep(seconds), clock=clock, sampler=polled)
        assert (found["watts"], found["source"]) == (pytest.approx(300), "energy counter")


class TestGauge:
    def test_what_the_card_does_not_tell_is_named_and_not_asked_again(self) -> None:
        nvml = Nvml(Clock(), without=["nvmlDeviceGetTotalEnergyConsumption"])
        gauge = report.Gauge(nvml, "handle", nvml.clock)
        assert (
            gauge.read()
            == gauge.read()
            == {
                "at_s": 0.0,
                "power_w": 300.0,
                "temperature_c": 55,
                "sm_mhz": 1980,
                "memory_mhz": 2619,
                "throttle": ["software power cap"],
            }
        )
        assert gauge.missing == {"energy_j": "RuntimeError: Not Supported"}
        assert nvml.asked.count("nvmlDeviceGetTotalEnergyConsumption") == 1

    @pytest.mark.parametrize(("returned", "watts"), [(0, 123.0), (3, 300.0)])
    def test_power_now_wins_over_the_average_where_the_driver_has_it(self, returned: int, watts: float) -> None:
        nvml = Nvml(Clock())
        answer = SimpleNamespace(nvmlReturn=returned, value=SimpleNamespace(uiVal=123_000))
        nvml.NVML_FI_DEV_POWER_INSTANT = 186  # type: ignore[attr-defined]
        nvml.nvmlDeviceGetFieldValues = lambda handle, fields: [answer]  # type: ignore[attr-defined]
        assert report._power_w(nvml, "handle") == watts

    def test_readings_are_taken_at_once_after_every_wait_and_at_the_end(self) -> None:
        waits = iter([False, False, True])
        count = iter(range(10))
        assert report.sample(lambda: {"at_s": next(count)}, lambda: next(waits)) == [{"at_s": n} for n in range(4)]

    def test_a_thread_reads_while_the_body_runs(self) -> None:
        nvml = Nvml(Clock())
        with report.sampling(report.Gauge(nvml, "handle", nvml.clock), 3600) as readings:
            assert readings == []
        assert len(readings) == 2

    def test_a_gpu_is_found_by_its_uuid_or_first(self, monkeypatch: pytest.MonkeyPatch) -> None:
        nvml = Nvml(Clock())
        monkeypatch.setitem(sys.modules, "pynvml", nvml)
        assert report.open_nvml(None) == (nvml, "GPU 0")
        assert report.open_nvml("GPU-1-2") == (nvml, "GPU-1-2")
        nvml.without = ["nvmlInit"]
        with pytest.raises(report.MissingError) as refused:
            report.open_nvml(None)
        assert str(refused.value) == "NVML cannot be used: RuntimeError: Not Supported"

    def test_facts_that_the_driver_lacks_are_named_one_by_one(self) -> None:
        facts = report.gpu_facts(Nvml(Clock(), without=["nvmlDeviceGetPersistenceMode"]), "handle")
        assert (facts["name"], facts["compute_capability"], facts["driver_cuda"]) == ("NVIDIA Test", "9.0", "13.2")
        assert facts["persistence"] == {"missing": "RuntimeError: Not Supported"}
        assert facts["mig"] == {"missing": "AttributeError: nvmlDeviceGetMigMode"}
        assert facts["now"]["power_w"] == 300.0
        assert (facts["ecc"], facts["enforced_power_limit_w"]) == (True, 700.0)


# --- FLOPs and roofs ------------------------------------------------------------------------------------------------


def graph_of(
    nodes: Sequence[onnx.NodeProto],
    inputs: Mapping[str, Sequence[int | str]],
    constants: Mapping[str, Sequence[int]],
    outputs: Sequence[str] = ("y",),
    kind: int = TensorProto.FLOAT,
) -> onnx.ModelProto:
    """A model whose constants hold zeros."""
    graph = helper.make_graph(
        list(nodes),
        "test",
        [helper.make_tensor_value_info(name, kind, list(shape)) for name, shape in inputs.items()],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [
            helper.make_tensor(name, kind, list(shape), b"\0" * int(np.prod(shape)) * (4 if kind == 1 else 1), raw=True)
            for name, shape in constants.items()
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])


class TestFlops:
    @pytest.mark.parametrize(
        ("node", "inputs", "constants", "flops"),
        [
            # 2 images, 8 filters, 5x5 places, each 3x3x4 products.
            (
                helper.make_node("Conv", ["x", "w"], ["y"], pads=[1, 1, 1, 1], strides=[2, 2]),
                {"x": ["batch", 4, 10, 10]},
                {"w": [8, 4, 3, 3]},
                2 * (2 * 8 * 5 * 5) * (4 * 3 * 3),
            ),
            (
                helper.make_node("Conv", ["x", "w"], ["y"], group=4),
                {"x": ["batch", 4, 10, 10]},
                {"w": [8, 1, 3, 3]},
                2 * (2 * 8 * 8 * 8) * (1 * 3 * 3),
            ),
            # Every input element meets every filter of its group once.
            (
                helper.make_node("ConvTranspose", ["x", "w"], ["y"], strides=[2, 2]),
                {"x": ["batch", 4, 5, 5]},
                {"w": [4, 8, 2, 2]},
                2 * (2 * 4 * 5 * 5) * (8 * 2 * 2),
            ),
            (helper.make_node("Gemm", ["x", "w"], ["y"]), {"x": ["batch", 7]}, {"w": [7, 3]}, 2 * 2 * 7 * 3),
            (
                helper.make_node("Gemm", ["x", "w"], ["y"], transA=1, transB=1),
                {"x": [7, "batch"]},
                {"w": [3, 7]},
                2 * 2 * 7 * 3,
            ),
            (
                helper.make_node("MatMul", ["x", "w"], ["y"]),
                {"x": ["batch", 6, 5, 7]},
                {"w": [7, 3]},
                2 * (2 * 6 * 5 * 3) * 7,
            ),
            (helper.make_node("Relu", ["x"], ["y"]), {"x": ["batch", 9]}, {}, 0),
        ],
        ids=["conv", "grouped conv", "transposed conv", "gemm", "transposed gemm", "batched matmul", "no product"],
    )
    def test_products_of_one_operator_are_those_counted_by_hand(
        self, node: Any, inputs: dict[str, list[int | str]], constants: dict[str, list[int]], flops: int
    ) -> None:
        model = graph_of([node], inputs, constants)
        before = model.SerializeToString()
        counted = report.count_flops(model, {"batch": 2})
        assert counted == {"flops": flops, "by_op": {node.op_type: flops} if flops else {}, "uncounted": {}}
        assert model.SerializeToString() == before

    def test_integer_products_count_too(self) -> None:
        nodes = [helper.make_node("MatMulInteger", ["x", "w"], ["z"]), helper.make_node("Cast", ["z"], ["y"], to=1)]
        counted = report.count_flops(
            graph_of(nodes, {"x": ["batch", 7]}, {"w": [7, 3]}, kind=TensorProto.INT8), {"batch": 5}
        )
        assert counted["flops"] == 2 * 5 * 7 * 3

    def test_the_sizes_asked_for_reach_the_inner_tensors(self) -> None:
        shape = helper.make_tensor("shape", TensorProto.INT64, [3], [0, -1, 4])
        nodes = [
            helper.make_node("Constant", [], ["shape"], value=shape),
            helper.make_node("Reshape", ["x", "shape"], ["r"]),
            helper.make_node("Transpose", ["r"], ["t"], perm=[0, 2, 1]),
            helper.make_node("MatMul", ["r", "t"], ["y"]),
        ]
        model = graph_of(nodes, {"x": ["batch", "sequence"]}, {})
        assert report.count_flops(model, {"batch": 3, "sequence": 24})["flops"] == 2 * 3 * 6 * 6 * 4

    def test_shapes_that_the_file_states_for_other_sizes_are_not_believed(self) -> None:
        nodes = [helper.make_node("Relu", ["x"], ["r"]), helper.make_node("MatMul", ["r", "w"], ["y"])]
        model = graph_of(nodes, {"x": ["batch", 7]}, {"w": [7, 3]})
        model.graph.value_info.append(helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 3]))
        model.graph.value_info.append(helper.make_tensor_value_info("r", TensorProto.FLOAT, [1, 7]))
        assert report.count_flops(model, {"batch": 4})["flops"] == 2 * 4 * 7 * 3

    def test_what_multiplies_and_is_not_counted_is_named(self) -> None:
        node = helper.make_node("Einsum", ["x", "w"], ["y"], equation="bi,ij->bj")
        counted = report.count_flops(graph_of([node], {"x": ["batch", 7]}, {"w": [7, 3]}), {"batch": 2})
        assert counted == {"flops": 0, "by_op": {}, "uncounted": {"Einsum": 1}}

    def test_products_in_functions_of_the_model_count(self) -> None:
        inner = helper.make_function(
            "own",
            "Twice",
            ["a", "b"],
            ["c"],
            [helper.make_node("MatMul", ["a", "b"], ["c"])],
            [helper.make_opsetid("", 20)],
        )
        model = graph_of(
            [helper.make_node("Twice", ["x", "w"], ["y"], domain="own")], {"x": ["batch", 7]}, {"w": [7, 3]}
        )
        model.functions.append(inner)
        model.opset_import.append(helper.make_opsetid("own", 1))
        assert report.count_flops(model, {"batch": 2})["flops"] == 2 * 2 * 7 * 3

    def test_an_unknown_shape_is_an_error(self) -> None:
        nodes = [helper.make_node("NonZero", ["x"], ["n"]), helper.make_node("Cast", ["n"], ["f"], to=1)]
        nodes.append(helper.make_node("MatMul", ["w", "f"], ["y"], name="product"))
        with pytest.raises(report.MissingError) as refused:
            report.count_flops(graph_of(nodes, {"x": ["batch", 7]}, {"w": [3, 2]}), {"batch": 2})
        assert str(refused.value) == "node 'product' (MatMul): the shape of 'y' is not known"

    def test_torch_and_onnx_count_the_same(self, on_cpu: FakeTorch) -> None:
        model = Tiny()
        feeds = {"x": np.zeros((2, 3, 8, 8), np.float32)}
        nodes = [
            helper.make_node("Conv", ["x", "w"], ["c"], pads=[1, 1, 1, 1]),
            helper.make_node("GlobalAveragePool", ["c"], ["p"]),
            helper.make_node("Flatten", ["p"], ["f"]),
            helper.make_node("Gemm", ["f", "v", "b"], ["y"]),
        ]
        counted = report.count_flops(
            graph_of(nodes, {"x": ["batch", 3, 8, 8]}, {"w": [4, 3, 3, 3], "v": [4, 5], "b": [5]}), {"batch": 2}
        )
        assert report.torch_work(on_cpu, model, feeds)["flops"] == counted["flops"] == 2 * (2 * 4 * 64 * 27 + 2 * 4 * 5)


def content_with(candidate: dict[str, Any], ceilings: dict[str, Any]) -> dict[str, Any]:
    batch = {"batch": 1, "work": {"flops": 4_000_000_000}, "candidates": [candidate]}
    return {"recipes": [{"name": "x", "batches": [batch]}], "ceilings": ceilings}


CEILINGS = {
    "copy": {"gb_s": 1000.0},
    "read": {"gb_s": 800.0},
    "matmul": {"fp16": {"tflops": 100.0}, "tf32": {"missing": "too old"}},
    "l2_bytes": 50_000_000,
}


class TestRoofline:
    def candidate(self, **fields: Any) -> dict[str, Any]:
        return {"precision": "fp16", "device": {"median_ms": 4.0}, "bytes": 1_000_000_000, **fields}

    def rooflined(self, candidate: dict[str, Any], ceilings: dict[str, Any] | None = None) -> dict[str, Any]:
        report.add_rooflines(content_with(candidate, CEILINGS if ceilings is None else ceilings))
        found: dict[str, Any] = candidate["roofline"]
        return found

    def test_the_lower_roof_binds(self) -> None:
        # 1 GB at 1000 GB/s takes 1 ms; 4 GFLOP at 100 TFLOP/s take 0.04 ms.
        found = self.rooflined(self.candidate())
        assert (found["binds"], found["fraction"], found["roof_ms"]) == ("memory", 0.25, 1.0)
        assert (found["gb_s"], found["tflops"], found["flops_per_byte"]) == (250.0, 1.0, 4.0)
        found = self.rooflined(self.candidate(bytes=100_000_000 // 4))
        assert (found["binds"], found["fraction"]) == ("arithmetic", pytest.approx(0.01))

    def test_weight_only_int4_multiplies_in_fp16(self) -> None:
        assert self.rooflined(self.candidate(precision="int4")) == self.rooflined(self.candidate())

    def test_what_fits_into_the_cache_says_so(self) -> None:
        assert self.rooflined(self.candidate(bytes=50_000_000))["note"] == (
            "all that it moves fits into the L2 cache: the memory roof is too low for it"
        )
        assert "note" not in self.rooflined(self.candidate(bytes=50_000_001))

    @pytest.mark.parametrize(
        ("fields", "ceilings", "why"),
        [
            ({"precision": "tf32"}, None, "tf32 ceiling: too old"),
            ({"precision": "fp8"}, None, "fp8 ceiling: not measured"),
            ({"device": {"missing": "no clock"}}, None, "time on the device: no clock"),
            ({"device": None}, None, "time on the device: not measured"),
            ({"bytes": None}, None, "the bytes that it moves are not known"),
            ({}, {"missing": "no GPU"}, "ceilings: no GPU"),
            ({}, {"copy": {"missing": "x"}, "matmul": {}}, "memory bandwidth was not measured"),
        ],
    )
    def test_what_is_missing_is_named(self, fields: dict[str, Any], ceilings: dict[str, Any] | None, why: str) -> None:
        assert self.rooflined(self.candidate(**fields), ceilings) == {"missing": why}


# --- TensorRT -------------------------------------------------------------------------------------------------------


class TestTinyModel:
    def test_it_is_valid_onnx_and_computes_what_numpy_does(self) -> None:
        model = onnx.load_from_string(report.tiny_model())
        onnx.checker.check_model(model, full_check=True)
        x, expected = report.tiny_answer()
        session = onnxruntime.InferenceSession(report.tiny_model(), providers=["CPUExecutionProvider"])
        (found,) = session.run(None, {"x": x})
        assert np.array_equal(found, expected)
        assert 0.2 < float((expected > 0).mean()) < 0.8


class FakeTrt(ModuleType):
    """A TensorRT that logs, and fails where it is told to."""

    __version__ = "1.7.1"

    class ILogger:
        def __init__(self) -> None:
            pass

    def __init__(self, fails: str = "", memory: Any = None) -> None:
        super().__init__("fake")
        outer, self.memory = self, memory

        def told(logger: Any, severity: str, text: str) -> None:
            logger.log(SimpleNamespace(name=severity), text)

        class Builder:
            def __init__(self, logger: Any) -> None:
                told(logger, "VERBOSE", "thousands of lines while building")
                told(logger, "WARNING", "careful")

            create_network = staticmethod(lambda flags: "network")
            create_builder_config = staticmethod(lambda: "config")
            build_serialized_network = staticmethod(lambda network, config: None if fails == "build" else b"plan")

        class Parser:
            num_errors = 2

            def __init__(self, network: Any, logger: Any) -> None: ...

            parse = staticmethod(lambda data: fails != "parse")
            get_error = staticmethod(lambda index: f"error {index}")

        class Context:
            def set_tensor_address(self, name: str, address: int) -> bool:
                return fails != "address"

            def execute_async_v3(self, stream: int) -> bool:
                if fails == "run":
                    return False
                x, y = outer.memory.values
                weights = np.array(report.TINY_WEIGHTS, np.float32).reshape(16, 16)
                y[:] = np.maximum(x @ weights, 0) + (0.5 if fails == "compare" else 0)
                return True

        class Runtime:
            def __init__(self, logger: Any) -> None:
                self.logger = logger

            def deserialize_cuda_engine(self, plan: bytes) -> Any:
                told(self.logger, "VERBOSE", "Skipping the engine compute capability check")
                if fails == "crash":
                    raise SystemExit("stands for a crash")
                if fails == "load":
                    told(self.logger, "ERROR", "this plan is for sm_89")
                    return None
                return SimpleNamespace(create_execution_context=Context)

        self.Builder, self.OnnxParser, self.Runtime = Builder, Parser, Runtime


class FakeMemory:
    stream = 0

    def __init__(self) -> None:
        self.values: list[Any] = []

    def upload(self, value: Any) -> int:
        self.values.append(value.copy())
        return len(self.values) - 1

    def download(self, pointer: int) -> Any:
        return self.values[pointer]


class TestFlavours:
    def tried(self, fails: str = "") -> dict[str, Any]:
        memory = FakeMemory()
        seen: list[str] = []
        report.try_flavour(
            "tensorrt_rtx",
            lambda found: seen.append(json.dumps(found)),
            load=lambda name: FakeTrt(fails, memory),
            memory=lambda: memory,
        )
        found: dict[str, Any] = json.loads(seen[-1])
        return found

    def test_an_engine_that_works_says_so(self) -> None:
        found = self.tried()
        assert [step["step"] for step in found["steps"]] == [
            *("import", "build", "open the runtime", "load", "make a context", "take device memory", "run", "compare")
        ]
        assert (found["worked"], found["max_abs_diff"], found["plan_bytes"]) == (True, 0.0, 4)
        assert report.rtx_answer({"tensorrt_rtx": found}) == (
            "tensorrt_rtx 1.7.1: yes: an engine of 4 bytes was built, loaded and run, and differs from numpy by 0"
        )

    @pytest.mark.parametrize(
        ("fails", "why"),
        [
            ("parse", "build: the parser refused the model: error 0; error 1"),
            ("build", "build: build_serialized_network() returned nothing"),
            ("load", "load: deserialize_cuda_engine() returned nothing; this plan is for sm_89"),
            ("address", "run: set_tensor_address('x') returned False"),
            ("run", "run: execute_async_v3() returned False"),
            ("compare", "compare: the outputs differ from numpy's by 0.5; at most 1e-05 was expected"),
        ],
    )
    def test_the_first_step_that_fails_is_the_answer(self, fails: str, why: str) -> None:
        found = self.tried(fails)
        assert (found["worked"], found["missing"]) == (False, why)
        assert report.rtx_answer({"tensorrt_rtx": found}) == f"tensorrt_rtx 1.7.1: no: {why}"

    def test_the_library_s_lines_are_kept_word_by_word_the_verbose_ones_from_loading_on(self) -> None:
        assert self.tried("load")["log"] == [
            {"severity": "WARNING", "text": "careful"},
            {"severity": "VERBOSE", "text": "Skipping the engine compute capability check"},
            {"severity": "ERROR", "text": "this plan is for sm_89"},
        ]

    def test_a_step_that_ends_the_process_leaves_its_name(self) -> None:
        seen: list[str] = []
        with pytest.raises(SystemExit):
            report.try_flavour(
                "tensorrt", lambda found: seen.append(json.dumps(found)), load=lambda name: FakeTrt("crash")
            )
        assert json.loads(seen[-1])["steps"][-1] == {"step": "load", "error": "it ended the process"}

    def test_a_library_that_is_not_there_is_named(self) -> None:
        found: dict[str, Any] = {}
        report.try_flavour("no_such_tensorrt", found.update)
        assert found["missing"] == "import: ModuleNotFoundError: No module named 'no_such_tensorrt'"
        assert report.rtx_answer({"x": {}, "y": found}) == f"x: no: it was not tried\ny: no: {found['missing']}"


class FakeRuntime:
    """cuda.bindings.runtime on host memory; a copy of a byte takes a nanosecond."""

    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2, cudaMemcpyDeviceToDevice=3)

    def __init__(self, fails: str = "") -> None:
        self.fails, self.now, self.held = fails, 0.0, list[Any]()

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> tuple[Any, ...]:
            if name == self.fails:
                return (35, None)
            return (0, *self.answer(name, *arguments))

        return call

    def cudaGetErrorString(self, status: int) -> tuple[int, bytes]:
        return 0, b"driver is too old"

    def answer(self, name: str, *arguments: Any) -> tuple[Any, ...]:
        if name in ("cudaMalloc", "cudaMallocHost"):
            self.held.append(np.zeros(arguments[0], np.uint8))
            return (self.held[-1].ctypes.data,)
        if name == "cudaMemGetInfo":
            return 1 << 20, 1 << 21
        if name in ("cudaMemcpy", "cudaMemcpyAsync"):
            import ctypes

            ctypes.memmove(arguments[0], arguments[1], arguments[2])
            self.now += arguments[2] * 1e-9
        if name == "cudaEventCreate":
            return (SimpleNamespace(at=0.0),)
        if name == "cudaEventRecord":
            arguments[0].at = self.now
        if name == "cudaEventElapsedTime":
            return ((arguments[1].at - arguments[0].at) * 1e3,)
        return (7,) if name == "cudaStreamCreate" else ()


class TestCudaRuntime:
    def test_what_goes_up_comes_down(self) -> None:
        memory = report.CudaMemory(FakeRuntime())
        value = np.arange(6, dtype=np.float32).reshape(2, 3)
        assert np.array_equal(memory.download(memory.upload(value)), value)
        assert memory.stream == 7

    def test_a_failure_is_told_in_the_runtime_s_words(self) -> None:
        with pytest.raises(report.MissingError) as refused:
            report.CudaMemory(FakeRuntime("cudaMalloc")).upload(np.zeros(1))
        assert str(refused.value) == "cudaMalloc: driver is too old (35)"

    def test_copies_are_measured_where_there_is_no_torch(self) -> None:
        found = report.memcpy_ceilings(FakeRuntime())
        assert {name: found[name]["gb_s"] for name in ("copy", "h2d", "d2h")} == {
            "copy": pytest.approx(2.0),  # read and written
            "h2d": pytest.approx(1.0),
            "d2h": pytest.approx(1.0),
        }

    def test_without_torch_and_without_a_runtime_both_are_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def lacking(name: str) -> Any:
            raise report.MissingError(f"{name} cannot be imported")

        monkeypatch.setattr(report, "module", lacking)
        found: list[Any] = []
        report.ceilings_part({"limit_s": 60}, found.append)
        assert found == [{"missing": "torch cannot be imported; cuda.bindings.runtime cannot be imported"}]
        with pytest.raises(report.MissingError) as refused:
            report.open_memory()
        assert str(refused.value) == (
            "no device memory: torch cannot be imported; cuda.bindings.runtime cannot be imported"
        )


# --- torch ----------------------------------------------------------------------------------------------------------


class Tiny(torch.nn.Module):
    """One convolution without a bias, one linear map: 4 * 27 + 4 * 5 + 5 numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.head = torch.nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (self.head(self.conv(x).mean(dim=(2, 3))),)


class Event:
    """Its clock goes on by ``FakeCuda.call_ms`` with every look at it."""

    def __init__(self, enable_timing: bool = False) -> None:
        assert enable_timing

    def record(self) -> None:
        FakeCuda.now_ms += FakeCuda.call_ms
        self.at = FakeCuda.now_ms

    def synchronize(self) -> None: ...

    def elapsed_time(self, end: Event) -> float:
        return float(end.at - self.at)


class Stream:
    cuda_stream = 11

    def wait_stream(self, other: Stream) -> None: ...


class Graph:
    """A graph that remembers how often it was replayed; the outputs of its capture stay what they were."""

    replays = 0

    def replay(self) -> None:
        Graph.replays += 1


class FakeCuda:
    now_ms, call_ms, capturing = 0.0, 2.0, False
    Event, Stream, CUDAGraph = Event, Stream, Graph

    def is_available(self) -> bool:
        return True

    def synchronize(self) -> None: ...

    def device_count(self) -> int:
        return 1

    def current_stream(self) -> Any:
        return Stream()

    def stream(self, stream: Any) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def graph(self, graph: Graph) -> Iterator[None]:
        FakeCuda.capturing = True
        yield
        FakeCuda.capturing = False

    def get_device_properties(self, index: int) -> Any:
        return SimpleNamespace(
            total_memory=1 << 20, L2_cache_size=1 << 10, name="NVIDIA Test", major=9, minor=0, multi_processor_count=4,
            uuid="12-34",
        )  # fmt: skip


class FakeTorch:
    """torch on the CPU, with a ``cuda`` of its own, and `compile` that does nothing or fails."""

    def __init__(self) -> None:
        self.cuda = FakeCuda()
        self.version = SimpleNamespace(cuda="13.0")
        self.compiled = 0
        self.refusal: str | None = None
        self.precisions: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def set_float32_matmul_precision(self, precision: str) -> None:
        self.precisions.append(precision)

    def compile(self, call: Any, *, dynamic: bool) -> Any:
        assert dynamic is False
        self.compiled += 1
        if self.refusal:
            raise RuntimeError(self.refusal)
        return call


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeTorch]:
    fake = FakeTorch()
    monkeypatch.setattr(report, "DEVICE", "cpu")
    monkeypatch.setattr(report, "cuda_torch", lambda: fake)
    before = torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark
    yield fake
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = before


class TestTorch:
    @pytest.mark.parametrize(
        ("fake", "why"),
        [
            (SimpleNamespace(cuda=None), "torch 2 is built without CUDA"),
            (SimpleNamespace(cuda="13.0"), "torch 2 sees no GPU: RuntimeError: Found no NVIDIA driver on your system"),
        ],
    )
    def test_a_torch_without_a_gpu_says_why(self, fake: Any, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
        def init() -> None:
            raise RuntimeError("Found no NVIDIA driver on your system\nand more")

        cuda = SimpleNamespace(is_available=lambda: False, init=init)
        monkeypatch.setitem(
            sys.modules,
            "torch",
            SimpleNamespace(cuda=cuda, version=fake, __version__="2"),
        )
        with pytest.raises(report.MissingError) as refused:
            report.cuda_torch()
        assert str(refused.value) == why

    def test_nvml_is_asked_about_the_gpu_that_torch_uses(self, on_cpu: FakeTorch) -> None:
        assert report.uuid_of(on_cpu) == "GPU-12-34"
        on_cpu.cuda.get_device_properties = lambda index: SimpleNamespace()  # type: ignore[method-assign]
        assert report.uuid_of(on_cpu) is None

    def test_facts_of_the_gpu(self, on_cpu: FakeTorch) -> None:
        facts = report.cuda_facts(on_cpu)
        assert (facts["name"], facts["compute_capability"], facts["l2_bytes"], facts["cuda"]) == (
            *("NVIDIA Test", "9.0", 1024, "13.0"),
        )

    def test_memory_through_torch(self, on_cpu: FakeTorch) -> None:
        memory = report.TorchMemory(on_cpu)
        value = np.arange(4.0)
        assert np.array_equal(memory.download(memory.upload(value)), value)
        assert memory.stream == 11

    @pytest.mark.parametrize("precision", report.MATMULS)
    def test_every_matrix_product_multiplies_two_squares(self, precision: str, on_cpu: FakeTorch) -> None:
        torch.manual_seed(0)
        made: list[torch.Tensor] = []

        def kept(make: Callable[..., torch.Tensor], *sizes: Any, **options: Any) -> torch.Tensor:
            made.append(make(*sizes, **options))
            return made[-1]

        for name in ("randn", "randint"):
            setattr(on_cpu, name, functools.partial(kept, getattr(torch, name)))
        found = report._product(on_cpu, precision, 32)().double()
        a, b = (one.to(torch.float8_e4m3fn) if precision == "fp8" else one for one in made)
        expected = a.double() @ (b.double().t() if precision in ("int8", "fp8") else b.double())
        assert torch.allclose(found, expected, rtol=0.02, atol=0.3)

    def test_only_tf32_may_use_tf32(self, on_cpu: FakeTorch) -> None:
        seen = []
        for precision in report.MATMULS:
            report.set_precision(on_cpu, precision)
            seen.append((on_cpu.precisions[-1], torch.backends.cudnn.allow_tf32))
        assert seen == [("highest", False), ("high", True), *[("highest", False)] * 4]

    def test_ceilings_are_amounts_over_median_times(self, on_cpu: FakeTorch, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(report, "PINNED_BYTES", 1 << 10)
        monkeypatch.setattr(report, "MATMUL_SIZES", (32, 64))
        empty = torch.empty
        on_cpu.empty = lambda *a, pin_memory=False, **k: empty(*a, **k)  # type: ignore[attr-defined]
        clock = Clock()
        found: list[Any] = []
        gauge = report.Gauge(Nvml(clock), "handle", clock)
        report.torch_ceilings(on_cpu, gauge, report.Deadline(60), lambda value: found.append(json.dumps(value)))
        last = json.loads(found[-1])
        # A call takes 2 ms: an eighth of the memory is copied (read and written), or read.
        assert last["copy"]["gb_s"] == pytest.approx(2 * (1 << 17) / 0.002 / 1e9)
        assert last["read"]["gb_s"] == pytest.approx((1 << 17) / 0.002 / 1e9)
        assert last["h2d"]["gb_s"] == last["d2h"]["gb_s"] == pytest.approx((1 << 10) / 0.002 / 1e9)
        assert last["matmul"]["bf16"]["tflops"] == pytest.approx(2 * 64**3 / 0.002 / 1e12)
        assert set(last["matmul"]["bf16"]["sizes"]) == {"32", "64"}
        assert len(last["copy"]["samples_s"]) == 50
        assert last["copy"]["conditions"]["power_w"]["median"] == 300
        assert last["l2_bytes"] == 1024
        assert len(found) == 1 + 4 + 6

    def test_a_ceiling_that_fails_or_comes_too_late_leaves_the_others(
        self, on_cpu: FakeTorch, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(report, "PINNED_BYTES", 1 << 10)
        monkeypatch.setattr(report, "MATMUL_SIZES", (32,))
        monkeypatch.setattr(report, "MATMULS", ("fp32", "fp8"))
        on_cpu._scaled_mm = refuse  # type: ignore[attr-defined]
        clock = Clock()
        deadline = report.Deadline(60, clock)
        found: list[Any] = []
        report.torch_ceilings(on_cpu, {"missing": "no NVML"}, deadline, found.append)
        assert found[-1]["matmul"]["fp8"]["missing"] == "RuntimeError: Not Supported"
        assert "conditions" not in found[-1]["copy"]
        assert found[-1]["matmul"]["fp32"]["tflops"] > 0
        clock.now = 59.0
        report.torch_ceilings(on_cpu, {"missing": "no NVML"}, deadline, found.append)
        assert found[-1]["copy"] == {"missing": "the limit of 60 s was reached before it began"}

    def test_the_bounds_of_a_rate_enclose_it(self) -> None:
        found = report.rate([0.001, 0.002, 0.003, 0.004, 0.005], 3_000_000, "gb_s")
        assert found["gb_s"] == pytest.approx(1.0)
        assert 0.6 <= found["low"] < 1.0 < found["high"] <= 3.0

    def test_work_counts_floats_once_and_only_the_rows_that_were_looked_up(self, on_cpu: FakeTorch) -> None:
        class Embedded(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.words, self.places = torch.nn.Embedding(100, 8), torch.nn.Embedding(4, 8)
                self.head = torch.nn.Linear(8, 4, bias=False)
                self.head.weight = self.places.weight  # read as a whole
                self.register_buffer("scale", torch.ones(3))
                self.register_buffer("count", torch.zeros((), dtype=torch.int64))

            def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
                return (self.head(self.words(ids) + self.places(ids.clamp(max=3))),)

        ids = np.array([[1, 2, 2, 99]], np.int64)
        work = report.torch_work(on_cpu, Embedded(), {"ids": ids})
        assert work["float_elements"] == 3 * 8 + 4 * 8 + 3
        assert work["io_bytes"] == ids.nbytes + 4 * 4 * 4
        assert work["flops"] == 2 * 4 * 8 * 4


# --- candidates -----------------------------------------------------------------------------------------------------


FEEDS = {"x": np.ones((2, 3, 8, 8), np.float32)}


class TestTorchRunner:
    def test_host_arrays_go_in_and_come_out(self, on_cpu: FakeTorch) -> None:
        model = Tiny()
        runner = report.TorchRunner(on_cpu, report.typed(on_cpu, model, "fp32"), FEEDS, ["y"], "fp32", False)
        other = {"x": 3 * FEEDS["x"]}
        with torch.no_grad():
            expected = model(torch.from_numpy(other["x"]))[0].numpy()
        assert np.allclose(runner.run(other)["y"], expected)
        assert len(runner.time(FEEDS, 3)) == 3
        assert runner.time_device(FEEDS, 3) == [pytest.approx(0.002)] * 3

    def test_a_graph_is_captured_once_and_replayed(self, on_cpu: FakeTorch) -> None:
        calls: list[bool] = []

        def call(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            calls.append(FakeCuda.capturing)
            return (x + 1,)

        runner = report.TorchRunner(on_cpu, call, FEEDS, ["y"], "fp32", True)
        assert calls == [False, False, False, True]
        Graph.replays = 0
        assert np.array_equal(runner.run(FEEDS)["y"], FEEDS["x"] + 1)
        runner.time(FEEDS, 2)
        runner.time_device(FEEDS, 4)
        assert (len(calls), Graph.replays) == (4, 1 + 2 + 3 + 4)

    def test_half_precision_stays_inside(self, on_cpu: FakeTorch) -> None:
        inside: list[Any] = []

        def model(x: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
            inside.extend([x.dtype, ids.dtype])
            return (x, ids)

        outputs = report.typed(on_cpu, model, "bf16")(torch.ones(2), torch.ones(2, dtype=torch.int64))
        assert inside == [torch.bfloat16, torch.int64]
        assert [out.dtype for out in outputs] == [torch.float32, torch.int64]

    def test_each_candidate_switches_tf32_before_its_calls(self, on_cpu: FakeTorch) -> None:
        runners = {
            name: report.TorchRunner(on_cpu, report.typed(on_cpu, Tiny(), name), FEEDS, ["y"], name, False)
            for name in ("fp32", "tf32")
        }
        on_cpu.precisions.clear()
        for name in ("tf32", "fp32", "tf32"):
            runners[name].time_device(FEEDS, 1)
            runners[name].time(FEEDS, 1)
        assert on_cpu.precisions == ["high"] * 2 + ["highest"] * 2 + ["high"] * 2


class TestTorchCandidates:
    WORK: ClassVar = {"float_elements": 100, "io_bytes": 7}

    def made(self, on_cpu: FakeTorch, left_s: float = 60.0) -> list[tuple[report.Candidate, str | None]]:
        models: dict[str, Any] = {"fp32": Tiny()}
        return list(report.torch_candidates(on_cpu, models, FEEDS, ["y"], self.WORK, report.Deadline(left_s)))

    def test_eager_comes_first_in_every_precision_with_and_without_a_graph(self, on_cpu: FakeTorch) -> None:
        made = self.made(on_cpu)
        assert [candidate.name for candidate, _ in made][:5] == [
            *("eager", "eager fp32, CUDA graph", "eager tf32", "eager tf32, CUDA graph", "eager fp16")
        ]
        assert [candidate.how for candidate, _ in made] == ["eager"] * 8 + ["compile"] * 8
        assert [refusal for _, refusal in made] == [None] * 16
        assert on_cpu.compiled == 4
        assert [c.moved_bytes for c, _ in made[:8]] == [407] * 4 + [207] * 4

    def test_half_precision_does_not_change_the_fp32_model(self, on_cpu: FakeTorch) -> None:
        models: dict[str, Any] = {"fp32": Tiny()}
        list(report.torch_candidates(on_cpu, models, FEEDS, ["y"], self.WORK, report.Deadline(60)))
        assert {name: model.head.weight.dtype for name, model in models.items()} == {
            "fp32": torch.float32,
            "fp16": torch.float16,
            "bf16": torch.bfloat16,
        }

    def test_what_does_not_compile_or_has_no_time_left_is_named(self, on_cpu: FakeTorch) -> None:
        on_cpu.refusal = "no compiler"
        assert {refusal for candidate, refusal in self.made(on_cpu) if candidate.how == "compile"} == {
            "RuntimeError: no compiler"
        }
        assert {refusal for candidate, refusal in self.made(on_cpu, 0.0) if candidate.how == "compile"} == {
            "no time was left to compile it"
        }

    def test_engines_come_between_eager_and_compiled(self) -> None:
        def one(how: str) -> tuple[report.Candidate, None]:
            return report.Candidate(name=how, how=how, precision="fp32", graph=False, runner=None), None

        made = report.in_order(iter([one("eager"), one("eager"), one("compile"), one("compile")]), [one("tensorrt")])
        assert [candidate.how for candidate, _ in made] == ["eager", "eager", "tensorrt", "compile", "compile"]
        assert [c.how for c, _ in report.in_order(iter([one("eager")]), [one("tensorrt")])] == ["eager", "tensorrt"]


HERE = Platform(os="", arch="", cpu="", cores=1, gpu=None, compute_capability=None, driver=None, packages={})
ENGINE = Engine(
    name="int8",
    path=Path("engine.plan"),
    sha256="sha-of-int8",
    size_bytes=1000,
    backend="tensorrt",
    backend_reason="test",
    precision=Precision.INT8,
    model_sha256="m",
    platform=HERE,
    inputs=(TensorSpec(name="x", dtype="float32", shape=("batch", 4)),),
    outputs=(),
    axes={"batch": DimRange(min=1, opt=4, max=8)},
    build_s=0.0,
)


class TestEngines:
    def test_engines_are_opened_by_their_back_end_and_their_weights_are_known_best_from_the_proof(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def open_engine(engine: Engine, *, threads: int) -> Any:
            if engine.name == "broken":
                raise BuildError("engine.plan: refused.")
            return "runner"

        monkeypatch.setattr("compiler.backends.get", lambda name: SimpleNamespace(open=open_engine))
        proof: Any = SimpleNamespace(weight_bytes=300, expected_weight_bytes=None)
        engines = [ENGINE, replace(ENGINE, name="proven", proof=proof), replace(ENGINE, name="broken")]
        engines.append(replace(ENGINE, name="cpu", backend="onnxruntime", options={"provider": "CPUExecutionProvider"}))
        made = list(report.engine_candidates([SimpleNamespace(engines=engines)], {"io_bytes": 50}))
        assert [(c.name, c.moved_bytes, c.runner, refusal) for c, refusal in made] == [
            ("int8", 1050, "runner", None),
            ("proven", 350, "runner", None),
            ("broken", 1050, None, "engine.plan: refused."),
            ("cpu", 1050, "runner", None),
        ]
        assert [(c.how, c.on_gpu) for c, _ in made] == [("tensorrt", True)] * 3 + [
            ("onnxruntime, CPUExecutionProvider", False)
        ]
        assert made[0][0].notes == ["bytes: the size of its file stands for its weights"]
        assert made[1][0].notes == []

    def test_only_undamaged_artifacts_of_the_recipe_are_taken(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def verify(folder: Path) -> Any:
            if folder.name == "damaged":
                raise ArtifactError("damaged: not what was built.")
            return SimpleNamespace(name=folder.name, engines=[ENGINE])

        monkeypatch.setattr("compiler.artifact.verify", verify)
        entry: dict[str, Any] = {}
        assert [one.name for one in report.manifests_of("digits", ["dist/minilm", "dist/digits"], entry)] == ["digits"]
        assert entry["engines"] == {"int8": "sha-of-int8"}
        assert report.manifests_of("digits", ["dist/minilm"], entry) == []
        assert entry["engines"] == {"missing": "no artifact of this recipe was given (--artifact)"}
        assert report.manifests_of("digits", ["damaged"], entry) == []
        assert entry["engines"] == {"missing": "damaged: not what was built."}


# --- a batch --------------------------------------------------------------------------------------------------------


class Runner:
    """Takes ``host_ms`` and ``device_ms`` per call, and says what it was asked."""

    inputs: tuple[Any, ...] = ()
    outputs: tuple[Any, ...] = ()

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


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A schedule of five blocks that hardly warms up."""
    monkeypatch.setattr(latency, "WARM_S", 0.0)
    monkeypatch.setattr(latency, "WARM_LIMIT_S", 0.0)
    monkeypatch.setattr(report, "BLOCKS", 5)
    monkeypatch.setattr(report, "BLOCK_MS", 10.0)


@pytest.mark.usefixtures("quick")
class TestBatch:
    def measured(self, *runners: tuple[str, str, Any], **options: Any) -> dict[str, Any]:
        """What is found of runners, each with how it is made; a text in place of one is why it cannot be opened."""
        found: dict[str, Any] = {"batch": 2, "work": {"flops": 1}}
        candidates = []
        for name, how, runner in runners:
            refusal = runner if isinstance(runner, str) else None
            candidates.append(
                (report.Candidate(name=name, how=how, precision="fp32", graph=False, runner=runner), refusal)
            )
        emitted: list[str] = []
        report.measure_batch(
            found,
            candidates,
            {},
            gauge=options.get("gauge", {"missing": "no NVML"}),
            energy=options.get("energy", True),
            deadline=options.get("deadline", report.Deadline(3600)),
            emit=lambda: emitted.append(json.dumps(report.finite(found))),
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
        gauge = report.Gauge(Nvml(clock), "handle", clock)
        monkeypatch.setattr(report, "measure_idle", lambda gauge: {"watts": 90.0})
        asked: list[Any] = []

        def measure(call: Callable[[int], list[float]], batch: int, gauge: Any, idle: Any) -> dict[str, Any]:
            asked.append((batch, idle, call(3)))
            return {"watts": 1, "ms_per_call": 2.0 if len(asked) == 2 else 0.6}

        monkeypatch.setattr(report, "measure_energy", measure)
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
        gauge = report.Gauge(Nvml(clock), "handle", clock)
        found = self.measured(
            ("eager", "eager", DeviceRunner("eager", log, 1.0)), gauge=gauge, deadline=report.Deadline(0.0, clock)
        )
        assert found["candidates"][0]["host"] == {"missing": "the limit was reached before it began"}
        assert found["candidates"][0]["energy"] == {"missing": "the limit was reached before it began"}

    def test_the_gpu_s_energy_is_not_told_of_an_engine_on_the_cpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(report, "measure_idle", lambda gauge: {"watts": 90.0})
        monkeypatch.setattr(report, "measure_energy", lambda call, batch, gauge, idle: {"watts": 1})
        clock = Clock()
        found: dict[str, Any] = {"batch": 1}
        ready = [
            (
                report.Candidate(
                    name=name, how="x", precision="fp32", graph=False, runner=Runner(name, [], 1.0), on_gpu=on_gpu
                ),
                dict[str, Any](),
            )
            for name, on_gpu in (("cpu", False), ("gpu", True))
        ]
        gauge = report.Gauge(Nvml(clock), "handle", clock)
        report._measure_energies(
            found, {}, ready, gauge=gauge, wanted=True, deadline=report.Deadline(60), emit=lambda: None
        )
        assert [entry["energy"] for _, entry in ready] == [
            {"missing": "it runs on the CPU, and only the GPU's energy is measured"},
            {"watts": 1},
        ]


class TestDifference:
    def test_a_sample_that_turned_is_seen_among_many_that_did_not(self) -> None:
        old = np.eye(4, dtype=np.float32)
        new = old.copy()
        new[3] *= -1
        assert report.difference({"y": new}, {"y": old}) == {"cosine": -1.0, "max_abs_diff": 2.0}
        assert report.difference({"y": old}, {"y": old}) == {"cosine": 1.0, "max_abs_diff": 0.0}

    @pytest.mark.parametrize(
        ("outputs", "why"),
        [
            ({"z": np.ones((1, 2), np.float32)}, "its outputs are z; y were expected"),
            ({"y": np.full((1, 2), np.inf, np.float32)}, "its output 'y' holds NaN or Inf"),
            ({"y": np.ones((1, 3), np.float32)}, "its output 'y' is [1, 3]; [1, 2] was expected"),
        ],
    )
    def test_outputs_that_cannot_be_compared_are_refused(self, outputs: dict[str, Any], why: str) -> None:
        with pytest.raises(report.MissingError) as refused:
            report.difference(outputs, {"y": np.ones((1, 2), np.float32)})
        assert str(refused.value) == why


# --- a recipe -------------------------------------------------------------------------------------------------------


MODEL = """\
import numpy as np
import torch


def build():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 3))


def calibration():
    yield {"input": np.arange(12, dtype=np.float32).reshape(3, 4)}
"""
RECIPE = """\
name = "line"
[model]
source = "line.py"
outputs = ["y"]
[model.inputs.input]
shape = ["batch", 4]
[axes]
batch = { min = 1, opt = 5, max = 8 }
[latency]
batches = [1, 5]
"""


@pytest.fixture
def line(tmp_path: Path) -> Path:
    (tmp_path / "line.py").write_text(MODEL)
    path = tmp_path / "line.toml"
    path.write_text(RECIPE)
    return path


@pytest.mark.usefixtures("quick")
class TestRecipe:
    def measured(self, recipe: Path, **job: Any) -> dict[str, Any]:
        found: list[str] = []
        job = {"recipe": str(recipe), "artifacts": [], "energy": False, "limit_s": 3600, **job}
        report.recipe_part(job, lambda value: found.append(json.dumps(value)))
        last: dict[str, Any] = json.loads(found[-1])
        return last

    def test_every_batch_of_the_recipe_is_measured_in_every_form(
        self, line: Path, on_cpu: FakeTorch, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(report, "PRECISIONS", ("fp32", "bf16"))
        found = self.measured(line)
        assert (found["name"], [batch["batch"] for batch in found["batches"]]) == ("line", [1, 5])
        for batch in found["batches"]:
            assert len(batch["candidates"]) == 8
            assert [candidate.get("missing") for candidate in batch["candidates"]] == [None] * 8
            assert all(candidate["host"]["median_ms"] > 0 for candidate in batch["candidates"])
            assert batch["work"]["flops"] == 2 * batch["batch"] * 4 * 3
            assert min(c["difference"]["cosine"] for c in batch["candidates"][1:]) > 0.999
        assert found["engines"] == {"missing": "no artifact of this recipe was given (--artifact)"}

    def test_feeds_repeat_real_samples(self) -> None:
        inputs = (
            TensorSpec(name="a", dtype="float32", shape=("batch", 2)),
            TensorSpec(name="b", dtype="float32", shape=(3,)),
        )
        samples = [{"a": np.full((1, 2), float(n), np.float32), "b": np.zeros(3, np.float32)} for n in range(2)]
        feeds = report.feeds_at(SimpleNamespace(inputs=inputs), samples, 3)
        assert feeds["a"].tolist() == [[0, 0], [1, 1], [0, 0]]
        assert feeds["b"].shape == (3,)
        assert feeds["a"].flags.writeable and feeds["a"].flags.c_contiguous

    def test_a_model_that_fails_is_named_in_each_of_its_parts(self, line: Path, on_cpu: FakeTorch) -> None:
        line.with_name("line.py").write_text("def build():\n    raise ValueError('no weights')\n")
        found = self.measured(line)
        reasons = {found[part]["missing"] for part in ("latency", "energy", "roofline")}
        assert len(reasons) == 1
        assert reasons.pop().endswith(
            "build() raised ValueError: no weights. Fix the file; the full traceback is in the log."
        )

    def test_packages_that_lack_are_named_together(self, line: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(report, "NEEDED", ("numpy", "no_such_package", "nor_this"))
        why = "not installed, and needed for a recipe: no_such_package, nor_this"
        assert self.measured(line)["latency"] == {"missing": why}

    def test_an_onnx_file_has_no_original_to_time(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("compiler.export.open_original", lambda *a, **k: SimpleNamespace(outputs=()))
        with pytest.raises(report.MissingError) as refused:
            report.original_of(None, None)
        assert str(refused.value) == "an ONNX source has no PyTorch original to time"

    def test_flops_come_from_an_onnx_engine_where_there_is_one(self, tmp_path: Path) -> None:
        path = tmp_path / "engine.onnx"
        onnx.save(graph_of([helper.make_node("MatMul", ["x", "w"], ["y"])], {"x": ["batch", 4]}, {"w": [4, 3]}), path)
        recipe = SimpleNamespace(inputs=ENGINE.inputs, axes=ENGINE.axes)
        manifest = SimpleNamespace(engines=[ENGINE, replace(ENGINE, name="fp32", path=path)])
        assert report._onnx_work(recipe, [manifest], 7) == {
            "flops_source": "ONNX shapes of engine fp32",
            "flops": 2 * 7 * 4 * 3,
            "by_op": {"MatMul": 168},
            "uncounted": {},
        }
        assert report._onnx_work(recipe, [SimpleNamespace(engines=[ENGINE])], 7) == {}


# --- children -------------------------------------------------------------------------------------------------------


CHILD = """\
import json, os, signal, sys, time
job = json.loads(sys.argv[sys.argv.index("--child") + 1])
pipe = os.fdopen(int(sys.argv[sys.argv.index("--pipe") + 1]), "w")
pipe.write(json.dumps({"value": {"reached": 1}}) + "\\n")
pipe.flush()
print("words of a library", file=sys.stderr, flush=True)
"""


class TestChildren:
    def run(self, tmp_path: Path, rest: str, limit_s: float = 60.0) -> tuple[list[Any], str | None]:
        script = tmp_path / "child.py"
        script.write_text(CHILD + rest)
        values: list[Any] = []
        why = report.run_child({"part": "x"}, limit_s, values.append, command=[sys.executable, str(script)])
        return values, why

    def test_a_child_that_comes_to_its_end_has_no_reason(self, tmp_path: Path) -> None:
        rest = """pipe.write('{"value": 2}\\n{"done": true}\\n')"""
        assert self.run(tmp_path, rest) == ([{"reached": 1}, 2], None)

    def test_a_child_that_crashes_leaves_what_it_had_reported(self, tmp_path: Path) -> None:
        values, why = self.run(tmp_path, "os.kill(os.getpid(), signal.SIGSEGV)")
        assert (values, why) == ([{"reached": 1}], "its process ended with SIGSEGV: words of a library")

    def test_a_child_that_fails_leaves_its_last_words(self, tmp_path: Path) -> None:
        values, why = self.run(tmp_path, "sys.exit('no more memory')")
        assert (values, why) == (
            [{"reached": 1}],
            "its process ended with exit code 1: words of a library | no more memory",
        )

    def test_a_child_that_hangs_is_ended_at_the_limit(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(report, "LEAST_S", 0.0)
        assert self.run(tmp_path, "time.sleep(600)", limit_s=1.0)[1] == "stopped at its limit of 1 s"

    def test_a_child_is_told_its_limit_and_none_begins_without_time(self, tmp_path: Path) -> None:
        values, why = self.run(tmp_path, """pipe.write(json.dumps({"value": job}) + '\\n{"done": true}\\n')""", 100.0)
        assert (values[-1], why) == ({"part": "x", "limit_s": 95.0}, None)
        assert self.run(tmp_path, "", 1.0) == ([], "the limit of the run was reached before it began")

    def test_a_grandchild_that_holds_the_pipe_does_not_hold_the_parent(self, tmp_path: Path) -> None:
        rest = """
grandchild = os.fork()
if grandchild == 0:
    time.sleep(600)
    os._exit(0)
pipe.write(json.dumps({"value": grandchild}) + '\\n')
sys.exit(3)
"""
        (_, grandchild), why = self.run(tmp_path, rest)
        assert why == "its process ended with exit code 3: words of a library"
        os.kill(grandchild, signal.SIGKILL)  # it is still there

    def test_a_child_writes_lines_of_json_without_nan(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(report, "CHILDREN", {"x": lambda job, emit: emit({"a": float("inf"), "b": job["n"]})})
        reader, writer = os.pipe()
        assert report.child_main({"part": "x", "n": 3}, writer) == 0
        with os.fdopen(reader) as lines:
            assert [json.loads(line) for line in lines] == [
                {"value": {"a": {"missing": "not a number: inf"}, "b": 3}},
                {"done": True},
            ]


# --- the page -------------------------------------------------------------------------------------------------------


def ceiling(unit: str, value: float, **more: Any) -> dict[str, Any]:
    seen = {"power_w": {"min": 80, "median": 412.0, "max": 430}, "sm_mhz": {"min": 345, "median": 1755, "max": 1980}}
    throttle = ["software power cap"] if unit == "tflops" else []
    return {
        unit: value,
        "low": 0.99 * value,
        "high": 1.01 * value,
        "conditions": {**seen, "throttle": throttle},
        **more,
    }


def boundary_of(median_ms: float, speedup: float, over: float | None = None) -> dict[str, Any]:
    found: dict[str, Any] = {
        "median_ms": median_ms,
        "low_ms": 0.98 * median_ms,
        "high_ms": 1.02 * median_ms,
        "calls": 200,
        "per_s": 8e3 / median_ms,
        "speedup": {"value": speedup, "low": 0.97 * speedup, "high": 1.03 * speedup},
    }
    return found if over is None else found | {"over_torch": {"value": over, "low": 0.9 * over, "high": 1.1 * over}}


def energy_of(joules: float, watts: float) -> dict[str, Any]:
    seen = {"temperature_c": {"min": 40, "median": 50, "max": 61}, "sm_mhz": {"min": 1, "median": 1710, "max": 1980}}
    return {
        "joules_per_inference": joules,
        "joules_per_inference_above_idle": 0.8 * joules,
        "watts": watts,
        "source": "energy counter",
        "conditions": {**seen, "throttle": []},
    }


def candidate_of(name: str, how: str, precision: str, graph: bool = False, **more: Any) -> dict[str, Any]:
    return {"candidate": name, "how": how, "precision": precision, "graph": graph, "bytes": 1, "notes": [], **more}


def boundary_notes(wide: float) -> dict[str, Any]:
    return {
        "boundary": "what is timed",
        "control": {"ratio_width": wide},
        "conditions": {"power_w": {"min": 100, "median": 300, "max": 500.0}, "throttle": ["software power cap"]},
        "notes": ["batch 8: int8 did not hold still", "order of candidates inside a block: a | b"],
        "latencies": [],
    }


def synthetic() -> dict[str, Any]:
    """A result as a card might give it; every number is made up."""
    roof = {"gb_s": 512.0, "tflops": 3.25, "fraction": 0.42, "binds": "memory", "note": "it fits into the L2 cache"}
    batch = {
        "batch": 8,
        "work": {"flops": 65_400_000_000, "flops_source": "torch.utils.flop_counter"},
        "idle": {"watts": 71.0, "source": "energy counter"},
        "samples": {"host": boundary_notes(0.004), "device": boundary_notes(0.002)},
        "candidates": [
            candidate_of(
                *("eager", "eager", "fp32"),
                difference=None,
                host=boundary_of(4.1, 1.0),
                device=boundary_of(3.5, 1.0),
                energy=energy_of(0.2031, 455.0),
                roofline={"missing": "no ceilings"},
            ),
            candidate_of("compile fp16, CUDA graph", "compile", "fp16", True, missing="RuntimeError: no compiler"),
            candidate_of(
                *("int8", "tensorrt", "int8"),
                difference={"cosine": 0.99912, "max_abs_diff": 0.1},
                host=boundary_of(0.9, 4.55, 1.7),
                device=boundary_of(0.41, 8.54, 2.0),
                energy=energy_of(0.0123, 390.0),
                roofline=roof,
            ),
        ],
    }
    return {
        "schema": 1,
        "started": "2026-11-22T10:00:00+00:00",
        "finished": "2026-11-22T10:08:00+00:00",
        "command": "gpu_report --limit-s 540",
        "machine": {
            "os": "Linux 6",
            "cores": 16,
            "python": "3.12.3",
            "packages": {"torch": "2.11.0", "tensorrt": {"missing": "not installed"}},
            "cuda": {"cuda": "13.0"},
            "gpu": {
                "name": "NVIDIA Test",
                "compute_capability": "9.0",
                "driver": "580.1",
                "memory_bytes": 80 << 30,
                "enforced_power_limit_w": 700.0,
                "max_sm_mhz": 1980,
                "ecc": True,
                "mig": False,
                "persistence": {"missing": "Not Supported"},
            },
        },
        "rtx": {
            "answer": "tensorrt_rtx 1.7.1: no: load: this plan is for sm_89\ntensorrt: no: import: none",
            "tensorrt_rtx": {
                "log": [
                    {"severity": "INFO", "text": "hello"},
                    {"severity": "WARNING", "text": "<careful> | with this"},
                    {"severity": "ERROR", "text": "this plan is for sm_89"},
                ]
            },
            "tensorrt": {"log": []},
        },
        "ceilings": {
            "method": "CUDA events",
            "copy": ceiling("gb_s", 3001.0),
            "read": {"missing": "RuntimeError: x"},
            "matmul": {
                "bf16": {**ceiling("tflops", 798.0), "conditions": None, "sizes": {"8192": ceiling("tflops", 798.0)}}
            },
        },
        "recipes": [{"recipe": "resnet50.toml", "name": "resnet50", "engines": {"int8": "sha"}, "batches": [batch]}],
        "missing": [
            {"part": "a", "reason": "none | here"},
            {"part": "b", "reason": "none | here"},
            *({"part": f"c{n}", "reason": "many"} for n in range(8)),
        ],
    }


PAGE = """\
# GPU report: NVIDIA Test

Started 2026-11-22T10:00:00+00:00, finished 2026-11-22T10:08:00+00:00: gpu_report --limit-s 540

NVIDIA Test; compute capability 9.0; 80.0 GiB; driver 580.1; CUDA 13.0; power limit 700 W; SM clock up to 1980 MHz; ECC \
on; MIG off; Python 3.12.3; torch 2.11.0; Linux 6; 16 cores.

## Do TensorRT engines run here?

- tensorrt_rtx 1.7.1: no: load: this plan is for sm_89
- tensorrt: no: import: none

What else tensorrt_rtx said, word by word:

- WARNING: &lt;careful> \\| with this

## What this card gives

| ceiling | measured | 95 % bounds | W | SM MHz | throttled by |
| --- | --- | --- | --- | --- | --- |
| device memory, copy | 3001 GB/s | [2971, 3031] | 412 | 1755 |  |
| device memory, read | n/a |  |  |  |  |
| matrix product, BF16 | 798 TFLOP/s | [790, 806] | 412 | 1755 | software power cap |

CUDA events.

## resnet50

### resnet50, batch 8

65.4 GFLOP a call, counted by torch.utils.flop_counter.

| candidate | host ms | speed-up | device ms | speed-up | over PyTorch's best | cosine |
| --- | --- | --- | --- | --- | --- | --- |
| PyTorch FP32 | 4.1 [4.02, 4.18] | 1.00x [0.97, 1.03] | 3.5 [3.43, 3.57] | 1.00x [0.97, 1.03] |  | reference |
| torch.compile FP16, CUDA graph | n/a | n/a | n/a | n/a |  | n/a |
| int8 (int8, tensorrt) | 0.9 [0.882, 0.918] | 4.55x [4.41, 4.69] | 0.41 [0.402, 0.418] | 8.54x [8.28, 8.80] | \
2.00x [1.80, 2.20] | 0.999120 |

| candidate | mJ per inference | above idle | W | °C | SM MHz | GB/s | TFLOP/s | share of the roof | bound by |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |
| PyTorch FP32 | 203 | 162 | 455 | 61 | 1710 | n/a | n/a | n/a | n/a |
| torch.compile FP16, CUDA graph | n/a | n/a | n/a | n/a | n/a | n/a | n/a | n/a | n/a |
| int8 (int8, tensorrt) | 12.3 | 9.84 | 390 | 61 | 1710 | 512 | 3.25 | 42.00% | memory |

- host: what is timed
- host: eager FP32 against itself is unsure by 0.4%; less is no difference
- host: 100 to 500 W; throttled by: software power cap
- host: batch 8: int8 did not hold still
- device: what is timed
- device: eager FP32 against itself is unsure by 0.2%; less is no difference
- device: 100 to 500 W; throttled by: software power cap
- device: batch 8: int8 did not hold still
- energy: one call after the other, as on the device where it has such a clock; 71 W with nothing to do, by the energy \
counter; the GPU alone, not its host
- int8: it fits into the L2 cache

## Missing on this machine

| what | why |
| --- | --- |
| a; b | none \\| here |
| c0; c1; c2; c3; c4; c5; and 2 more | many |
"""


class TestPage:
    def test_every_number_stands_where_it_belongs(self) -> None:
        assert page.markdown(synthetic()) == PAGE

    def test_a_run_that_was_cut_off_says_so(self) -> None:
        content = synthetic() | {"finished": None, "missing": [], "rtx": {"missing": "not reached"}}
        content |= {"ceilings": {"missing": "no GPU"}, "recipes": {"missing": "not asked for (--only)"}}
        text = page.markdown(content)
        assert "not finished: what follows is what was done until then: gpu_report" in text
        assert "## Do TensorRT engines run here?\n\nNot answered: not reached.\n" in text
        assert "## What this card gives\n\nNot measured: no GPU.\n\n## Missing on this machine\n\nNothing.\n" in text

    def test_a_batch_and_a_recipe_without_measurements_give_their_reasons(self) -> None:
        content = synthetic()
        work, why = {"missing": "x"}, {"missing": "no <GPU>"}
        batch = {"batch": 1, "work": work, "candidates": [], "missing": "RuntimeError: shapes"}
        content["recipes"] = [{"recipe": "a.toml", "name": "a", "latency": why, "energy": why, "batches": [batch]}]
        assert (
            "## a\n\n- no &lt;GPU>\n\n### a, batch 1\n\nNot measured: RuntimeError: shapes.\n\n## Miss"
            in page.markdown(content)
        )

    def test_bounds_and_noise_that_are_not_known_are_left_out(self) -> None:
        content = synthetic()
        (batch,) = content["recipes"][0]["batches"]
        batch["candidates"][0]["host"] |= {"low_ms": None, "speedup": {"value": 1.0, "low": None, "high": None}}
        batch["samples"]["host"] |= {"control": None, "conditions": {"missing": "no NVML"}}
        text = page.markdown(content)
        assert "| PyTorch FP32 | 4.1 | 1.00x | 3.5 [" in text
        assert "- host: there is no control; noise is not known\n- host: batch 8: int8 did not hold still\n" in text


# --- the report -----------------------------------------------------------------------------------------------------


MACHINE = {"gpu": {"name": "NVIDIA Test"}}


class Family:
    """Children that answer at once; ``dies`` names the part in which one does not come to its end."""

    def __init__(self, path: Path, dies: str = "", machine: Mapping[str, Any] = MACHINE) -> None:
        self.path, self.dies, self.machine = path, dies, machine
        self.jobs: list[str] = []
        self.saved: list[Any] = []

    def __call__(self, job: Any, limit_s: float, on_value: Callable[[Any], None]) -> str | None:
        name = job.get("flavour") or Path(job.get("recipe", job["part"])).stem
        self.jobs.append(name)
        values = {
            "machine": self.machine,
            "ceilings": CEILINGS,
            "tensorrt_rtx": {"steps": [{"step": "load", "error": "it ended the process"}], "log": []},
            "tensorrt": {"missing": "import: no"},
        }
        on_value(
            values.get(name, {"recipe": f"{name}.toml", "name": name, "batches": [], "energy_asked": job.get("energy")})
        )
        if self.path.exists():
            self.saved.append(json.loads(self.path.read_bytes()))
        return "its process ended with SIGSEGV" if name == self.dies else None


@pytest.fixture
def recipes(tmp_path: Path) -> list[str]:
    paths = [tmp_path / "one.toml", tmp_path / "two.toml"]
    for path in paths:
        path.write_text("")
    return [str(path) for path in paths]


class TestMeasure:
    def measured(self, tmp_path: Path, arguments: Sequence[str], **family: Any) -> tuple[dict[str, Any], Family]:
        path = tmp_path / "results.json"
        children = Family(path, **family)
        made = report.Report(path, "gpu_report")
        report.measure(report.options([*arguments, "--output", str(path)]), made, children)
        content: dict[str, Any] = json.loads(path.read_bytes())
        return content, children

    def test_parts_come_one_after_the_other_and_each_is_saved(self, tmp_path: Path, recipes: list[str]) -> None:
        content, children = self.measured(tmp_path, recipes)
        assert children.jobs == ["machine", "tensorrt_rtx", "tensorrt", "ceilings", "one", "two"]
        assert list(content) == [
            *("schema", "started", "finished", "command", "machine", "rtx", "ceilings", "recipes", "missing")
        ]
        assert [one["name"] for one in content["recipes"]] == ["one", "two"]
        assert content["finished"] is not None
        # What was on disk while the last child ran: everything before it, and that the run is not over.
        assert children.saved[-1]["ceilings"] == CEILINGS
        assert children.saved[-1]["finished"] is None
        assert len(children.saved) == len(children.jobs)
        assert not list(tmp_path.glob("*.part"))

    def test_a_part_that_crashes_costs_no_other(self, tmp_path: Path, recipes: list[str]) -> None:
        content, _ = self.measured(tmp_path, recipes, dies="one")
        assert content["recipes"][0]["interrupted"] == {"missing": "its process ended with SIGSEGV"}
        assert {"part": "recipes / one / interrupted", "reason": "its process ended with SIGSEGV"} in content["missing"]
        assert content["recipes"][1]["name"] == "two"
        content, _ = self.measured(tmp_path, recipes, dies="ceilings")
        assert content["ceilings"]["interrupted"] == {"missing": "its process ended with SIGSEGV"}

    def test_a_crash_of_tensorrt_names_its_step(self, tmp_path: Path, recipes: list[str]) -> None:
        content, _ = self.measured(tmp_path, recipes, dies="tensorrt_rtx")
        assert content["rtx"]["answer"] == (
            "tensorrt_rtx: no: load: its process ended with SIGSEGV\ntensorrt: no: import: no"
        )

    def test_only_what_is_asked_for_is_measured(self, tmp_path: Path, recipes: list[str]) -> None:
        content, children = self.measured(tmp_path, [*recipes, "--only", "rtx"])
        assert children.jobs == ["machine", "tensorrt_rtx", "tensorrt"]
        assert content["ceilings"] == content["recipes"] == {"missing": "not asked for (--only)"}
        content, children = self.measured(tmp_path, [*recipes, "--only", "recipes"])
        assert children.jobs == ["machine", "one", "two"]
        assert content["recipes"][0]["energy_asked"] is False

    def test_parts_of_an_earlier_result_are_kept_and_recipes_replaced_by_name(
        self, tmp_path: Path, recipes: list[str]
    ) -> None:
        self.measured(tmp_path, [recipes[0], "--only", "ceilings,recipes"])
        earlier = tmp_path / "earlier.json"
        (tmp_path / "results.json").rename(earlier)
        content, children = self.measured(tmp_path, [*recipes, "--only", "recipes,energy", "--earlier", str(earlier)])
        assert children.jobs == ["machine", "one", "two"]
        assert content["ceilings"] == CEILINGS
        assert [(one["name"], one["energy_asked"]) for one in content["recipes"]] == [("one", True), ("two", True)]
        with pytest.raises(ArtifactError) as refused:
            self.measured(tmp_path, [*recipes, "--earlier", str(earlier)], machine={"gpu": {"missing": "no"}})
        assert refused.value.message == (
            f"{earlier}: measured on NVIDIA Test; no GPU was expected, which is here. Results of two machines do not "
            "mix."
        )

    def test_a_file_that_cannot_be_written_is_an_error(self, tmp_path: Path, recipes: list[str]) -> None:
        path = tmp_path / "none" / "results.json"
        with pytest.raises(ArtifactError) as refused:
            report.Report(path, "x").save()
        assert refused.value.message == (
            f"{path}: cannot write: No such file or directory. Choose a folder that you may write to."
        )


class TestCommandLine:
    @pytest.mark.parametrize(
        ("arguments", "why"),
        [
            (
                ["--only", "rtx,bogus"],
                "--only: found 'bogus'; some of rtx, ceilings, recipes, energy were expected. Correct it.",
            ),
            (["--only", "energy"], "--only: found 'energy' without 'recipes', whose candidates it is about. Add it."),
            (["none.toml"], "none.toml: no such file; a recipe (TOML) was expected. Correct the path."),
        ],
    )
    def test_mistakes_are_found_before_anything_is_measured(
        self, arguments: list[str], why: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(RecipeError) as refused:
            report.options(arguments)
        assert refused.value.message == why
        assert report.main(arguments) == 2
        assert capsys.readouterr().err == why + "\n"

    def test_the_reference_recipes_are_the_default(self) -> None:
        assert [path.name for path in report.options([]).recipes] == ["digits.toml", "minilm.toml", "resnet50.toml"]

    @pytest.mark.parametrize(
        ("text", "why"),
        [
            (None, "cannot be read: No such file or directory. Give a file that this command wrote."),
            ("{", "not JSON; a result of gpu_report was expected. Measure again."),
            ("[]", "found schema list; 1 was expected. Measure again with this version."),
            ('{"schema": 2}', "found schema 2; 1 was expected. Measure again with this version."),
        ],
    )
    def test_a_file_that_is_no_result_is_refused(
        self, text: str | None, why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = tmp_path / "results.json"
        if text is not None:
            path.write_text(text)
        assert report.main(["--render", str(path)]) == 9
        assert capsys.readouterr().err == f"{path}: {why}\n"


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="there is a GPU, and this is about there being none")
class TestHere:
    """The command itself, on a machine without a GPU."""

    def test_it_ends_well_and_names_every_part_as_missing(self, line: Path, tmp_path: Path) -> None:
        path = tmp_path / "results.json"
        command = [str(ROOT / "scripts/gpu_report"), str(line), "--output", str(path)]
        done = subprocess.run(
            command, capture_output=True, text=True, env={**os.environ, "PYTHON": sys.executable}, cwd=tmp_path
        )
        assert (done.returncode, done.stderr) == (0, "")
        content = json.loads(path.read_bytes())
        missing = {entry["part"] for entry in content["missing"]}
        assert missing >= {
            *("machine / cuda", "machine / gpu", "rtx / tensorrt_rtx", "rtx / tensorrt", "ceilings"),
            *("recipes / line / latency", "recipes / line / energy", "recipes / line / roofline"),
        }
        assert all(entry["reason"] for entry in content["missing"])
        assert content["finished"] is not None
        assert done.stdout.endswith(f"{path}: {len(content['missing'])} things missing\n")
        rendered = subprocess.run([*command[:1], "--render", str(path)], capture_output=True, text=True, cwd=tmp_path)
        assert rendered.returncode == 0
        assert rendered.stdout.startswith("# GPU report: no GPU\n")

    def test_it_runs_without_any_package(self, line: Path, tmp_path: Path) -> None:
        path = tmp_path / "results.json"
        script = str(ROOT / "scripts/gpu_report.py")
        venv.create(tmp_path / "bare", with_pip=False, symlinks=True)
        bare = str(tmp_path / "bare/bin/python")
        command = [bare, script, str(line), "--output", str(path), "--only", "rtx,ceilings,recipes"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        assert (done.returncode, done.stderr) == (0, "")
        content = json.loads(path.read_bytes())
        assert content["recipes"][0]["latency"]["missing"] == (
            "not installed, and needed for a recipe: numpy, msgspec, tomli, torch, onnx, onnx_ir, safetensors"
        )
        assert content["ceilings"]["missing"].startswith("torch cannot be imported: ModuleNotFoundError")
        assert {name for name, found in content["machine"]["packages"].items() if isinstance(found, str)} == set()
        rendered = subprocess.run([bare, script, "--render", str(path)], capture_output=True, text=True, cwd=ROOT)
        assert (rendered.returncode, rendered.stderr) == (
            2,
            "--render needs a package that is not installed: No module named 'msgspec'. Install it.\n",
        )

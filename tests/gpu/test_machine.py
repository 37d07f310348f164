"""What the driver and torch tell of a machine, and that nothing is changed on it."""

from __future__ import annotations

import doctest
import importlib.metadata
import json
import re
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from scripts.gpu import machine, missing, nvml
from tests.gpu.fakes import Clock, FakeTorch, Nvml

ROOT = Path(__file__).parents[2]
MODULES = sorted((ROOT / "scripts/gpu").glob("*.py"))
SOURCE = "".join(path.read_text() for path in (*MODULES, ROOT / "compiler/report/gpu.py"))


def test_the_examples_in_the_docstrings_are_true() -> None:
    results = [doctest.testmod(importlib.import_module(f"scripts.gpu.{path.stem}")) for path in MODULES]
    assert sum(found.failed for found in results) == 0
    assert sum(found.attempted for found in results) == sum(path.read_text().count(">>> ") for path in MODULES) > 0


SETTER = re.compile(r"nvmlDevice(?!Get)\w+|nvidia-smi|nvmlSystemSet\w+|cudaDeviceReset|set_per_process_memory")


def test_no_setting_of_the_card_is_ever_changed() -> None:
    assert SETTER.findall(SOURCE) == []
    assert SETTER.search("nvml.nvmlDeviceSetPowerManagementLimit(handle, 1)")


def test_every_name_of_nvml_exists() -> None:
    nvml = pytest.importorskip("pynvml")
    names = set(re.findall(r"nvml\.((?:nvml|NVML_)\w+)", SOURCE))
    assert len(names) > 20
    assert [name for name in names if not hasattr(nvml, name)] == []


class TestGauge:
    def test_what_the_card_does_not_tell_is_named_and_not_asked_again(self) -> None:
        driver = Nvml(Clock(), without=["nvmlDeviceGetTotalEnergyConsumption"])
        gauge = nvml.Gauge(driver, "handle", driver.clock)
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
        assert driver.asked.count("nvmlDeviceGetTotalEnergyConsumption") == 1

    @pytest.mark.parametrize(("returned", "watts"), [(0, 123.0), (3, 300.0)])
    def test_power_now_wins_over_the_average_where_the_driver_has_it(self, returned: int, watts: float) -> None:
        driver = Nvml(Clock())
        answer = SimpleNamespace(nvmlReturn=returned, value=SimpleNamespace(uiVal=123_000))
        driver.NVML_FI_DEV_POWER_INSTANT = 186  # type: ignore[attr-defined]
        driver.nvmlDeviceGetFieldValues = lambda handle, fields: [answer]  # type: ignore[attr-defined]
        assert nvml._power_w(driver, "handle") == watts

    def test_readings_are_taken_before_and_after_the_body_and_while_it_runs(self) -> None:
        driver, third = Nvml(Clock()), threading.Event()

        class Counted(nvml.Gauge):
            count = 0

            def read(self) -> dict[str, Any]:
                self.count += 1
                if self.count == 3:
                    third.set()
                return {"at_s": self.count}

        with nvml.sampling(Counted(driver, "handle"), 3600) as readings:
            assert readings == [{"at_s": 1}]
        assert readings == [{"at_s": 1}, {"at_s": 2}]
        with nvml.sampling(Counted(driver, "handle"), 0.0) as readings:
            assert third.wait(60)
        assert readings == [{"at_s": n + 1} for n in range(len(readings))]
        assert len(readings) >= 4

    def test_a_gpu_is_found_by_its_uuid_or_first(self, monkeypatch: pytest.MonkeyPatch) -> None:
        driver = Nvml(Clock())
        monkeypatch.setitem(sys.modules, "pynvml", driver)
        assert nvml.open_nvml(None) == (driver, "GPU 0")
        assert nvml.open_nvml("GPU-1-2") == (driver, "GPU-1-2")
        driver.without = ["nvmlInit"]
        with pytest.raises(missing.MissingError) as refused:
            nvml.open_nvml(None)
        assert str(refused.value) == "NVML cannot be used: RuntimeError: Not Supported"

    def test_facts_that_the_driver_lacks_are_named_one_by_one(self) -> None:
        facts = machine.gpu_facts(Nvml(Clock(), without=["nvmlDeviceGetPersistenceMode"]), "handle")
        assert (facts["name"], facts["compute_capability"], facts["driver_cuda"]) == ("NVIDIA Test", "9.0", "13.2")
        assert facts["persistence"] == {"missing": "RuntimeError: Not Supported"}
        assert facts["mig"] == {"missing": "AttributeError: nvmlDeviceGetMigMode"}
        assert facts["now"]["power_w"] == 300.0
        assert (facts["ecc"], facts["enforced_power_limit_w"]) == (True, 700.0)


class TestTorch:
    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, and this is about there being none")
    def test_the_torch_that_is_installed_says_why_it_has_no_gpu(self) -> None:
        found: list[str] = []
        machine.part({}, lambda value: found.append(json.dumps(value)))
        facts = json.loads(found[-1])
        why = "is built without CUDA" if torch.version.cuda is None else "sees no GPU"
        assert facts["cuda"]["missing"].startswith(f"torch {torch.__version__} {why}")
        assert facts["packages"]["torch"] == torch.__version__
        assert len(found) == 3

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
        with pytest.raises(missing.MissingError) as refused:
            machine.cuda_torch()
        assert str(refused.value) == why

    def test_nvml_is_asked_about_the_gpu_that_torch_uses(self, on_cpu: FakeTorch) -> None:
        assert machine.uuid_of(on_cpu) == "GPU-12-34"
        on_cpu.cuda.get_device_properties = lambda index: SimpleNamespace()  # type: ignore[method-assign]
        assert machine.uuid_of(on_cpu) is None

    def test_facts_of_the_gpu(self, on_cpu: FakeTorch) -> None:
        facts = machine.cuda_facts(on_cpu)
        assert (facts["name"], facts["compute_capability"], facts["l2_bytes"], facts["cuda"]) == (
            *("NVIDIA Test", "9.0", 1024, "13.0"),
        )


def test_a_package_may_come_by_several_names(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {"tensorrt_rtx-cu13": "1.7", "onnxruntime-gpu": "1.30", "onnxruntime": "1.29", "torch": "2.11"}

    def version(name: str) -> str:
        if name not in installed:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    found = {name: value for name, value in machine.versions().items() if isinstance(value, str)}
    assert found == {"torch": "2.11", "tensorrt_rtx": "1.7", "onnxruntime": "1.30"}

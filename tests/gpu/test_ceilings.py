"""Ceilings, on a card that takes as long as it is told to."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from scripts.gpu import ceilings, children, nvml
from tests.gpu.fakes import Clock, FakeRuntime, FakeTorch, Nvml, refuse


class TestThroughTorch:
    @pytest.mark.parametrize("precision", ceilings.MATMULS)
    def test_every_matrix_product_multiplies_two_squares(self, precision: str, on_cpu: FakeTorch) -> None:
        torch.manual_seed(0)
        made: list[torch.Tensor] = []

        def kept(make: Callable[..., torch.Tensor], *sizes: Any, **options: Any) -> torch.Tensor:
            made.append(make(*sizes, **options))
            return made[-1]

        for name in ("randn", "randint"):
            setattr(on_cpu, name, functools.partial(kept, getattr(torch, name)))
        found = ceilings.product(on_cpu, precision, 32)().double()
        a, b = (one.to(torch.float8_e4m3fn) if precision == "fp8" else one for one in made)
        expected = a.double() @ (b.double().t() if precision in ("int8", "fp8") else b.double())
        assert torch.allclose(found, expected, rtol=0.02, atol=0.3)

    def test_only_tf32_may_use_tf32(self, on_cpu: FakeTorch) -> None:
        seen = []
        for precision in ceilings.MATMULS:
            ceilings.set_precision(on_cpu, precision)
            seen.append((on_cpu.precisions[-1], torch.backends.cudnn.allow_tf32))
        assert seen == [("highest", False), ("high", True), *[("highest", False)] * 4]

    def test_ceilings_are_amounts_over_median_times(self, on_cpu: FakeTorch, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(ceilings, "PINNED_BYTES", 1 << 10)
        monkeypatch.setattr(ceilings, "MATMUL_SIZES", (32, 64))
        empty = torch.empty
        on_cpu.empty = lambda *a, pin_memory=False, **k: empty(*a, **k)  # type: ignore[attr-defined]
        clock = Clock()
        found: list[Any] = []
        gauge = nvml.Gauge(Nvml(clock), "handle", clock)
        ceilings.torch_ceilings(on_cpu, gauge, children.Deadline(60), lambda value: found.append(json.dumps(value)))
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
        monkeypatch.setattr(ceilings, "PINNED_BYTES", 1 << 10)
        monkeypatch.setattr(ceilings, "MATMUL_SIZES", (32,))
        monkeypatch.setattr(ceilings, "MATMULS", ("fp32", "fp8"))
        on_cpu._scaled_mm = refuse  # type: ignore[attr-defined]
        clock = Clock()
        deadline = children.Deadline(60, clock)
        found: list[Any] = []
        ceilings.torch_ceilings(on_cpu, {"missing": "no NVML"}, deadline, found.append)
        assert found[-1]["matmul"]["fp8"]["missing"] == "RuntimeError: Not Supported"
        assert "conditions" not in found[-1]["copy"]
        assert found[-1]["matmul"]["fp32"]["tflops"] > 0
        clock.now = 59.0
        ceilings.torch_ceilings(on_cpu, {"missing": "no NVML"}, deadline, found.append)
        assert found[-1]["copy"] == {"missing": "the limit of 60 s was reached before it began"}

    def test_the_bounds_of_a_rate_enclose_it(self) -> None:
        found = ceilings.rate([0.001, 0.002, 0.003, 0.004, 0.005], 3_000_000, "gb_s")
        assert found["gb_s"] == pytest.approx(1.0)
        assert 0.6 <= found["low"] < 1.0 < found["high"] <= 3.0


class TestThroughCudaBindings:
    def test_copies_are_measured_where_there_is_no_torch(self) -> None:
        found = ceilings.memcpy_ceilings(FakeRuntime())
        assert {name: found[name]["gb_s"] for name in ("copy", "h2d", "d2h")} == {
            "copy": pytest.approx(2.0),  # read and written
            "h2d": pytest.approx(1.0),
            "d2h": pytest.approx(1.0),
        }

    def test_without_torch_and_without_a_runtime_both_are_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "torch", None)
        monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
        found: list[Any] = []
        ceilings.part({"limit_s": 60}, found.append)
        halted = "cannot be imported: ModuleNotFoundError: import of {0} halted; None in sys.modules"
        names = ("torch", "cuda.bindings.runtime")
        assert found == [{"missing": "; ".join(f"{name} {halted.format(name)}" for name in names)}]

    def test_what_needs_torch_is_named_where_there_is_none(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "torch", None)
        monkeypatch.setattr(ceilings, "cuda_runtime", FakeRuntime)
        found: list[Any] = []
        ceilings.part({"limit_s": 60}, found.append)
        assert found[0]["copy"]["gb_s"] == pytest.approx(2.0)
        assert found[0]["matmul"] == found[0]["read"]
        assert found[0]["read"]["missing"].startswith("torch cannot be imported: ")

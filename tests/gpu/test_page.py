"""The page, of a result whose numbers are made up."""

from __future__ import annotations

from typing import Any

from compiler.report import gpu as page


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

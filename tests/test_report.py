"""The report says what the records say, in every form, and names stay text."""

from __future__ import annotations

from typing import Any

import pytest

from compiler import report

SPEED = {
    "batch": 1,
    "samples": 100,
    "p50_ms": 2.0,
    "p90_ms": 2.5,
    "p99_ms": None,
    "per_s": 500.0,
    "speedup": 3.0,
    "speedup_low": 2.5,
    "speedup_high": 3.5,
}


def _content(name: str = "int8", reason: str = "lost 1, gained 0 of 600") -> dict[str, Any]:
    score = {
        "metric": "top1",
        "value": 0.98,
        "original": 0.99,
        "change": -0.01,
        "binary": True,
        "lost": 7,
        "gained": 1,
        "samples": 600,
    }
    gate = {
        "metric": "top1",
        "gate": "top1 drop <= 0.1 (95%)",
        "outcome": "pass",
        "measured": 0.01,
        "low": 0.002,
        "high": 0.019,
        "reason": reason,
    }
    engine = {
        "name": name, "precision": "int8", "backend": "onnxruntime", "backend_reason": "named in the recipe", "sha256": "e" * 64,
        "size_bytes": 2 << 20, "options": {"threads": "2"}, "notes": ["a note"], "outcome": "pass", "gates": [gate],
        "profiles": [], "proof": None, "stand_in": None, "scores": [score], "speeds": [SPEED | {"candidate": name}],
    }  # fmt: skip
    return {
        "name": "points", "outcome": "pass", "finished": "2026-01-01T00:00:00+00:00",
        "platform": {"os": "Linux", "arch": "x86_64", "cpu": "a CPU", "cores": 2, "gpu": None, "packages": {"onnxruntime": "1.31.1"}},
        "original": {"onnx_bytes": 8 << 20, "notes": [], "speeds": [SPEED | {"candidate": "eager", "speedup": None, "p50_ms": 6.0}, SPEED | {"candidate": "control"}]},
        "data": {"calibration": {"samples": 64, "sha256": "c" * 64}, "validation": {"samples": 600, "sha256": "d" * 64}, "notes": []},
        "engines": [engine], "latency": None, "failures": [],
        "steps": [{"id": "export", "seconds": 1.5, "peak_mib": 100, "hit": True}],
    }  # fmt: skip


def test_the_table_shows_the_original_and_every_engine_with_bounds() -> None:
    assert report.table(_content()) == [
        ["original (eager)", "8.00", "", "", "1", "6", "n/a", "", ""],
        ["int8", "2.00", "top1 0.9800", "drop 0.0100 [0.0020, 0.0190]", "1", "2", "n/a", "3.00x [2.50, 3.50]", "pass"],
    ]


def test_an_engine_with_another_name_shows_its_precision() -> None:
    assert report.table(_content("fast"))[1][0] == "fast (int8)"


def test_markdown_has_every_gate_score_and_step() -> None:
    text = report.markdown(_content())
    for line in (
        "# points: pass",
        "| int8 | top1 drop <= 0.1 (95%) | pass | lost 1, gained 0 of 600 |",
        "| int8 | top1 | 0.98 | 0.99 | -0.01 | 7 | 1 | 600 |",
        "| int8 | 1 | 100 | 2 | 2.5 | n/a | 500 | 3.00x [2.50, 3.50] |",
        "| export | 1.5 | 100 | yes |",
        "- Calibration: 64 samples, SHA-256 `" + "c" * 64 + "`; none is in both sets.",
        "  - a note",
    ):
        assert line in text.splitlines()


@pytest.mark.parametrize(
    "hostile",
    ["<script>alert(1)</script>", "a | b", "a\nb", "\x1b[31mred", "[x](javascript:y)", "`code`", "&lt;b&gt;", "<!-- -->", "\u202eright to left"],
)  # fmt: skip
def test_hostile_text_stays_text(hostile: str) -> None:
    text = report.markdown(_content(reason=hostile))
    row = next(line for line in text.splitlines() if "top1 drop" in line)
    assert row.replace("\\|", "").count("|") == 5
    assert not any(mark in row.replace("\\`", "") for mark in ("<s", "<!", "`", "](", "\x1b", "\u202e", "&lt;b"))


def test_an_engine_that_was_not_run_says_so_with_what_was_run_and_what_was_read() -> None:
    content = _content()
    (engine,) = content["engines"]
    engine["stand_in"] = {"backend": "onnxruntime", "reason": "no GPU", "model_sha256": "a" * 64}
    engine["proof"] = {
        "method": "the network",
        "weight_bytes": 12_000,
        "weight_bytes_alone": 10_000,
        "expected_weight_bytes": 9_999,
    }
    text = report.markdown(content)
    assert (
        f"  - NOT RUN HERE: no GPU. Its scores are those of the same ONNX file, SHA-256 {'a' * 64}, run in onnxruntime.\n"
        "  - a note\n"
        "  - precision read from: the network; weights take 12,000 bytes, 9,999 in the model, 10,000 with one profile alone: "
        "some are stored once per profile\n"
    ) in text

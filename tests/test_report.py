"""The report says what the records say, in every form, and names stay text."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import pytest

from compiler import report
from compiler.pipeline import console
from compiler.spec import Advice, Explanation, Precision, TensorError

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


def _searched() -> dict[str, Any]:
    point = {
        "precision": "int8", "keep": [], "kept_layers": 0, "layers": 9, "measured": {"top1": 0.9}, "sqnr_db": 21.5, "within": False,
        "size_bytes": 1 << 20, "speedup": {"1": 4.0, "8": 3.0}, "p50_ms": {"1": 0.25, "8": 1.5}, "on_front": True,
    }  # fmt: skip
    original = point | {
        "precision": "fp32", "measured": {"top1": 0.99}, "sqnr_db": None, "within": True, "size_bytes": 4 << 20,
        "speedup": {"1": 1.0, "8": 1.0}, "p50_ms": {"1": 1.0, "8": 4.5},
    }  # fmt: skip
    beaten = point | {"keep": ["b"], "kept_layers": 1, "on_front": False, "speedup": {}, "p50_ms": {}}
    chosen = point | {"keep": ["a", "b|c"], "kept_layers": 2, "within": True, "measured": {"top1": 0.985}}
    return {
        "engine": "int8", "points": [original, point, beaten, chosen], "chosen": 3, "reason": "the fastest of 1 timed mixtures",
        "budget": ["top1 drop <= 0.01 (95%)"], "samples": 256, "data_sha256": "f" * 64, "seconds": 41.7, "notes": ["a note on it"],
    }  # fmt: skip


def test_a_search_shows_its_front_what_was_chosen_and_why() -> None:
    headings, rows = report.search_table(_searched())
    assert headings == [
        "point", "precision", "kept layers", "top1", "SQNR dB", "MiB", "p50 ms at 1", "speed-up at 1", "p50 ms at 8",
        "speed-up at 8", "found",
    ]  # fmt: skip
    assert rows == [
        ["0", "fp32", "all", "0.9900", "n/a", "4.00", "1", "1.00x", "4.5", "1.00x", "within the budget"],
        ["1", "int8", "0 of 9", "0.9000", "21.5", "1.00", "0.25", "4.00x", "1.5", "3.00x", "outside the budget"],
        ["3", "int8", "2 of 9", "0.9850", "21.5", "1.00", "0.25", "4.00x", "1.5", "3.00x", "chosen, within the budget"],
    ]
    assert report.search_lines(_searched()) == [
        "Point 3 was chosen: the fastest of 1 timed mixtures.",
        "Budget: top1 drop <= 0.01 (95%).",
        (
            "4 points were measured in 42 s, 3 of them on the Pareto front of error, latency and size, on 256 samples, SHA-256 "
            + "f" * 64
            + ", which neither calibrate nor judge."
        ),
        (
            "To make a point again without [search]: its precision and, as engines.keep, its keep; both are in report.json, "
            "searches, engine int8, points."
        ),
        "a note on it",
    ]


def test_a_search_whose_engines_were_not_timed_shows_every_point() -> None:
    search = _searched()
    search["points"] = [point | {"on_front": False, "speedup": {}, "p50_ms": {}} for point in search["points"]]
    headings, rows = report.search_table(search)
    assert headings == ["point", "precision", "kept layers", "top1", "SQNR dB", "MiB", "found"]
    assert [row[0] for row in rows] == ["0", "1", "2", "3"]


def test_markdown_and_console_show_a_search() -> None:
    content = _content() | {"searches": [_searched()]}
    text = report.markdown(content)
    assert "## Search for int8" in text.splitlines()
    assert (
        "| 3 | int8 | 2 of 9 | 0.9850 | 21.5 | 1.00 | 0.25 | 4.00x | 1.5 | 3.00x | chosen, within the budget |" in text
    )
    assert "- Point 3 was chosen: the fastest of 1 timed mixtures." in text.splitlines()
    shown = io.StringIO()
    console.show_report(console.make(shown), content)
    assert "search for int8" in shown.getvalue()
    assert "chosen, within the budget" in shown.getvalue()
    assert "Point 3 was chosen: the fastest of 1 timed mixtures." in shown.getvalue()


# --- explanations ---------------------------------------------------------------------------------------------------


def _explanation(count: int = 3, **changes: Any) -> Explanation:
    tensors = tuple(
        TensorError(
            name=f"layers.{place}.a_name_that_does_not_fit_into_its_column", node="", op="Conv", layer=True, rounded=True,
            sqnr_db=30.0, added_db=None if place else 31.0, share=0.5 / 2**place, weight_share=0.0, scale=0.1, threshold=12.7,
            peak=20.0, clipped=0.0002, clipped_by=1.6, reason="threshold 12.7 of peak 20 chosen by mse: 0.02 % of the values lie above",
        )
        for place in range(count)
    )  # fmt: skip
    given: dict[str, Any] = {
        "engine": "small", "precision": Precision.INT8, "model_sha256": "a" * 64, "outputs_db": {"logits": 29.5}, "tensors": tensors,
        "advice": (Advice(change="keep 'a' in high precision", lines=("[[engines]]", 'keep = ["a"]'), gain_db=2.0),), "samples": 8,
        "fresh": True, "data_sha256": "d" * 64, "notes": ("a note",),
    }  # fmt: skip
    return Explanation(**{**given, **changes})


def _shown(explanation: Explanation, width: int = 240) -> list[str]:
    shown = io.StringIO()
    out = console.make(shown)
    out.width = width
    console.show_explanation(out, explanation)
    return [line.rstrip() for line in shown.getvalue().splitlines()]


def test_an_explanation_fits_110_columns_and_lists_15_tensors() -> None:
    lines = _shown(_explanation(20))
    assert max(map(len, lines)) <= 110
    assert lines[0] == "small (int8): SQNR against FP32 on 8 calibration samples that set no range: logits 29.5 dB"
    assert lines[1] == "note: a note"
    assert sum(" Conv " in line for line in lines) == 15
    text = " ".join(" ".join(lines).split())
    assert "5 more tensors add 0.0 %; 20 layers with rounded weights, 20 rounded activations, 20 of them clip." in text
    assert "1. keep 'a' in high precision: about +2.0 dB [[engines]] keep = [\"a\"]" in text
    assert "50.0 % 30.0 31.0 0.02 %" in text
    assert "25.0 % 30.0 exact 0.02 %" in text


def test_lines_to_paste_are_never_broken() -> None:
    line = f"keep = [{', '.join(repr(f'a.long.name.{place}') for place in range(40))}]"
    advice = (Advice(change="keep them", lines=(line,), gain_db=1.0),)
    assert f"     {line}" in _shown(_explanation(advice=advice), width=80)


def test_a_lossless_engine_and_one_that_could_not_be_explained_say_so() -> None:
    (tensor, *_) = _explanation(1).tensors
    still = replace(tensor, share=0.0, sqnr_db=None)
    lossless = _shown(_explanation(tensors=(still,), outputs_db={"logits": None}, notes=(), engine="int8"))
    assert lossless == [
        "int8: SQNR against FP32 on 8 calibration samples that set no range: logits exact",
        "Lossless: what is rounded changes no output.",
    ]
    assert _shown(_explanation(tensors=(), notes=()))[1] == "Lossless: nothing is rounded."
    refused = _shown(_explanation(failure="the runtime refuses it."))
    assert refused == ["small (int8): not explained: the runtime refuses it."]
    idle = _shown(_explanation(advice=()))
    assert "No single change of the recipe would help by 0.1 dB or more." in idle

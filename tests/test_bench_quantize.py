"""The benchmark of quantisation tools: what it computes from measurements, and what it does about a tool that fails."""

from __future__ import annotations

import dataclasses
import doctest
import itertools
import mmap
import os
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.quantize_bench import accuracy, environments, jobs, latency, rows, samples, table, watch
from scripts.quantize_bench.bench import Bench, Prepared, Settings
from scripts.quantize_bench.cases import CASES, Bar, Case
from scripts.quantize_bench.rows import Row

CASE = Case(
    name="toy",
    recipe=None,
    what="a toy",
    counts=(8, 32),
    main_count=32,
    calibration=32,
    evaluation=4,
    accuracy=("cosine",),
    methods={"ours": ("auto",), "absent": ("int8",)},
    bars=(
        Bar(text="cosine >= 0.999", number="cosine", limit=0.999, at_least=True),
        Bar(text="latency <= 0.6x", number="ratio_b1", limit=0.6),
    ),
)


def row(tool: str, method: str = "auto", count: int = 32, **numbers: float) -> Row:
    return Row(tool=tool, method=method, count=count, numbers=numbers)


@pytest.mark.parametrize("module", [accuracy, latency, rows, table])
def test_the_examples_in_the_docstrings_hold(module: object) -> None:
    assert doctest.testmod(module).failed == 0  # type: ignore[arg-type]


# --- latency --------------------------------------------------------------------------------------------------------


def test_a_ratio_is_taken_within_rounds_and_not_between_medians() -> None:
    base, half = [1.0, 10.0, 1.1, 10.0, 1.2], [0.5, 5.0, 0.55, 5.0, 0.6]
    assert latency.ratio(half, base) == pytest.approx(0.5)
    assert latency.ratio(base, base) == 1.0


def test_a_slow_candidate_has_a_ratio_above_one() -> None:
    clock = itertools.count()
    spent = {"fp32": 1, "slow": 3}
    calls = {name: (lambda ticks=ticks: [next(clock) for _ in range(ticks)]) for name, ticks in spent.items()}
    taken, best = latency.take_turns(calls, rounds=50, turn_s=0.0, limit_s=0.0, clock=lambda: float(next(clock)))
    assert [len(times) for times in taken.values()] == [5, 5]
    assert latency.ratio(taken["slow"], taken["fp32"]) == pytest.approx(2.0)  # the clock itself takes one tick
    assert best == {"fp32": 2000.0, "slow": 4000.0}


# --- accuracy -------------------------------------------------------------------------------------------------------


def test_nan_and_nonsense_never_look_like_agreement() -> None:
    expected = {"y": np.eye(4, dtype=np.float32)}
    same = accuracy.compare(expected, expected)
    assert same == {"cosine": 1.0, "sqnr_db": np.inf, "top1_agreement": 1.0, "retrieval_top1": 1.0}
    spoilt = accuracy.compare({"y": np.full((4, 4), np.nan, np.float32)}, expected)
    bar = Bar(text="", number="cosine", limit=0.0, at_least=True)
    assert not bar.met(spoilt["cosine"]) and not bar.met(spoilt["sqnr_db"])
    assert spoilt["top1_agreement"] == spoilt["retrieval_top1"] == 0.0
    shifted = accuracy.compare({"y": np.roll(np.eye(4, dtype=np.float32), 1, axis=1)}, expected)
    assert shifted["cosine"] == shifted["top1_agreement"] == 0.0


# --- rows and tables ------------------------------------------------------------------------------------------------


def test_memory_that_grows_with_the_samples_is_seen() -> None:
    flat, greedy = (
        [row("ours", count=n, peak_gb=0.5) for n in (32, 512)],
        [row("x", count=n, peak_gb=n) for n in (1, 3)],
    )
    rows.grow([*flat, *greedy])
    assert [each.numbers.get("peak_growth") for each in (*flat, *greedy)] == [None, 0.0, None, 2.0]


def test_cost_beyond_plain_inference_and_beyond_the_model() -> None:
    ours = row("ours", calibrate_cpu_s=20.0, peak_gb=1.5, size_bytes=1e8)
    rows.derive(ours, plain_cpu_s=10.0, model_bytes=500_000_000)
    assert (ours.numbers["beyond_1x_s"], ours.numbers["beyond_1.5x_s"]) == (10.0, 5.0)
    assert (ours.numbers["peak_over_model_gb"], ours.numbers["peak_over_weights"]) == (1.0, 3.0)
    assert ours.numbers["size_ratio"] == pytest.approx(0.2)


def test_a_case_is_one_table_and_a_failure_is_a_row_with_its_reason() -> None:
    failed = row("ort", "entropy")
    failed.reason = "ValueError: Too many bins\nfor a | mask"
    text = table.of_case(CASE, [failed, row("ours", cosine=0.9995, ratio_b1=0.5)])
    assert text.splitlines()[2:] == [
        "| tool | method  | N  | cosine  | x FP32 b1 | what failed                             |",
        "|------|---------|----|---------|-----------|-----------------------------------------|",
        "| ours | auto    | 32 | 0.99950 | 0.500     |                                         |",
        "| ort  | entropy | 32 | -       | -         | ValueError: Too many bins for a \\| mask |",
    ]


def test_bars_name_the_best_peer_with_its_accuracy_and_say_what_was_missed() -> None:
    found = [
        row("ours", cosine=0.9995, ratio_b1=0.7),
        row("ort", "u8s8", cosine=0.35, ratio_b1=0.55),
        row("nncf", "onnx", cosine=0.9975, ratio_b1=1.2),
        row("nncf", "onnx", 8, cosine=0.99999, ratio_b1=0.1),
    ]
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.of_bars(CASE, found).splitlines()[2:]]
    assert lines == [
        ["cosine >= 0.999", "0.99750 (nncf onnx)", "0.99950", "met"],
        ["latency <= 0.6x", "0.550 (ort u8s8; cosine 0.35000)", "0.700", "**missed**"],
    ]
    assert table.of_bars(CASE, [row("ours")]).count("not measured") == 2


def test_every_bar_asks_for_what_its_case_measures() -> None:
    for case in CASES.values():
        assert case.main_count in case.counts
        for bar in case.bars:
            assert bar.method in case.methods["ours"], (case.name, bar.text)
            assert bar.count in (None, *case.counts), (case.name, bar.text)


# --- children -------------------------------------------------------------------------------------------------------


def run_python(code: str, tmp_path: Path, **limits: float) -> watch.Ended:
    log = tmp_path / "log.txt"
    return watch.run([sys.executable, "-c", code], env=os.environ, cwd=tmp_path, log=log, **limits)


def test_a_greedy_child_is_ended_and_called_out_of_memory(tmp_path: Path) -> None:
    greedy = "import time\nheld = bytearray(300 << 20)\ntime.sleep(60)"
    ended = run_python(greedy, tmp_path, limit_mib=200)
    assert ended.reason == "out of memory: more than 0.195 GiB"
    assert ended.peak_mib > 200


def test_what_a_childs_own_child_takes_counts(tmp_path: Path) -> None:
    code = "import subprocess, sys\nsubprocess.run([sys.executable, '-c', '''import time\nheld = bytearray(300 << 20)\ntime.sleep(60)'''])"
    assert (run_python(code, tmp_path, limit_mib=200).reason or "").startswith("out of memory")


def test_a_child_that_dies_or_hangs_leaves_its_reason(tmp_path: Path) -> None:
    assert run_python("pass", tmp_path).reason is None
    died = run_python("import sys; print('the last words'); sys.exit(3)", tmp_path)
    assert died.reason == "died with exit code 3: the last words"
    assert run_python("import time; time.sleep(60)", tmp_path, limit_s=0.3).reason == "took longer than 0 s"


def test_a_stage_knows_its_own_peak_and_not_that_of_the_stage_before() -> None:
    meter = jobs.Meter()
    with meter.stage("large"), mmap.mmap(-1, 40 << 20) as held:  # fresh pages, whatever the allocator still holds
        held.write(b"1" * (40 << 20))
    with meter.stage("small"):
        sum(range(1000))
    stages = meter.result()["stages"]
    if "peak_mib" in stages["small"]:  # the kernel lets the peak be set back
        assert stages["large"]["peak_mib"] - stages["small"]["peak_mib"] > 20
    assert meter.result()["peak_mib"] >= stages["large"].get("peak_mib", 0.0)


def test_samples_are_read_back_one_at_a_time_and_in_a_circle(tmp_path: Path) -> None:
    images = np.arange(12, dtype=np.float32).reshape(3, 2, 2)
    assert samples.store(tmp_path / "set", [{"x": images[:2]}, {"x": images[2:]}], limit=3) == 3
    stored = samples.Samples(tmp_path / "set")
    assert [feeds["x"].tolist() for feeds in stored] == [images[i : i + 1].tolist() for i in range(3)]
    assert stored.feeds(2, 2)["x"].tolist() == images[[2, 0]].tolist()
    assert len(samples.Samples(tmp_path / "set", 2)) == 2


# --- installing -----------------------------------------------------------------------------------------------------


def test_a_tool_that_cannot_be_installed_is_a_row_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = (("--no-index", "--no-deps", "./no-such-wheel-1.0-py3-none-any.whl"),)
    absent = environments.Recipe(tool="absent", version_of="absent", steps=steps)
    monkeypatch.setattr(environments, "RECIPES", {"absent": absent})
    folder = tmp_path / "models/toy"
    folder.mkdir(parents=True)
    (folder / "prepared.json").write_text(
        '{"sha256": "0", "axes": {}, "size_bytes": 1, "samples_sha256": "0", "calibration": 32, "evaluation": 4}'
    )
    said: list[str] = []
    bench = Bench(Settings(work=tmp_path, tools=("absent",)), said.append)
    found = bench._peer(CASE, bench.prepared(CASE), "absent", "int8", 32)
    assert (found.reason or "").startswith("not installed: pip install --no-index")
    assert "no-such-wheel" in (found.reason or "")
    assert "not installed" in table.of_case(CASE, [found])


def test_a_failed_installation_is_remembered_until_the_recipe_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def install(steps: object, home: Path, limit_s: float) -> dict[str, object]:
        tried.append(steps)
        return {"reason": "no"}

    monkeypatch.setattr(environments, "_install", install)
    recipe = environments.Recipe(tool="x", version_of="x", steps=(("x==1",),))
    assert environments.installed(recipe, tmp_path) == environments.installed(recipe, tmp_path)
    assert len(tried) == 1
    environments.installed(environments.Recipe(tool="x", version_of="x", steps=(("x==2",),)), tmp_path)
    assert len(tried) == 2


# --- what is kept ---------------------------------------------------------------------------------------------------


def test_a_peers_result_is_kept_until_what_went_in_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ort = environments.Environment(tool="ort", python=tmp_path / "python", versions={"onnxruntime": "1"})
    bench = Bench(Settings(work=tmp_path, tools=("ort",)), lambda _: None)
    bench.environments["ort"] = ort
    worked: list[int] = []

    def work(python: str, job: jobs.Job, name: str = "all") -> tuple[dict[str, object], str | None]:
        worked.append(job.count)
        file = Path(job.out) / "made.onnx"
        file.write_bytes(b"12345")
        return {"files": {job.method: str(file)}, "stages": {"quantize": {"cpu_s": 2.0, "wall_s": 1.0}}}, None

    monkeypatch.setattr(bench, "_work", work)
    ready = Prepared(
        folder=tmp_path, facts={"sha256": "m", "samples_sha256": "s", "size_bytes": 50, "axes": {"batch": {"opt": 4}}}
    )
    first = bench._peer(CASE, ready, "ort", "minmax", 8, keep=False)
    again = bench._peer(CASE, ready, "ort", "minmax", 8, keep=False)
    assert first == again and worked == [8]
    assert (first.numbers["cpu_s"], first.numbers["size_bytes"], first.file) == (2.0, 5, None)
    wanted = bench._peer(CASE, ready, "ort", "minmax", 8, keep=True)  # its file was dropped
    assert wanted.file is not None and worked == [8, 8]
    bench.environments["ort"] = dataclasses.replace(ort, versions={"onnxruntime": "2"})
    bench._peer(CASE, ready, "ort", "minmax", 8, keep=True)
    assert worked == [8, 8, 8]


def test_our_package_is_copied_and_named_by_its_sources(tmp_path: Path) -> None:
    (tmp_path / "tree/compiler").mkdir(parents=True)
    source = tmp_path / "tree/compiler/__init__.py"
    source.write_text("one = 1\n")
    first = Bench(Settings(work=tmp_path, tools=(), compiler=tmp_path / "tree")).compiler
    source.write_text("one = 2\n")
    second = Bench(Settings(work=tmp_path, tools=(), compiler=tmp_path / "tree")).compiler
    assert first != second
    assert [(home / "compiler/__init__.py").read_text() for home in (first, second)] == ["one = 1\n", "one = 2\n"]

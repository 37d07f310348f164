"""An artifact is whole or absent, replaced in one moment, and refused when a single bit of it is not what was written."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import compiler
from compiler import artifact, codec, durable
from compiler.artifact import Manifest
from compiler.errors import ArtifactError, BackendUnavailableError, GateFailedError
from compiler.spec import (
    Advice,
    CalibrationSet,
    DataSets,
    DimRange,
    Engine,
    Explanation,
    GateResult,
    Latencies,
    Latency,
    Outcome,
    Platform,
    Precision,
    Score,
    Scores,
    Search,
    SearchPoint,
    TensorError,
    TensorSpec,
    ValidationSet,
    Verdict,
)

FAKE_BUILD = Path(__file__).parent / "pipeline" / "fake_build.py"
AGAIN = "Do not use it: copy it again from where it was built, or build it again."
MACHINE = Platform(
    os="Linux 6.1", arch="x86_64", cpu="a CPU", cores=2, gpu=None, compute_capability=None, driver=None,
    packages={"onnxruntime-gpu": "1.31.1", "numpy": "2.4.6"},
)  # fmt: skip


def make_engine(folder: Path, name: str, content: bytes = b"graph", data: bytes = b"") -> Engine:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "engine.onnx").write_bytes(content)
    sha256 = hashlib.sha256(content).hexdigest()
    external: tuple[Path, ...] = ()
    if data:
        (folder / "engine.onnx.data").write_bytes(data)
        external = (folder / "engine.onnx.data",)
        lines = f"{sha256}  engine.onnx\n{hashlib.sha256(data).hexdigest()}  engine.onnx.data\n"
        sha256 = hashlib.sha256(lines.encode()).hexdigest()
    return Engine(
        name=name,
        path=folder / "engine.onnx",
        sha256=sha256,
        size_bytes=len(content) + len(data),
        backend="onnxruntime",
        backend_reason="no GPU here",
        precision=Precision.INT8 if name == "int8" else Precision.FP32,
        model_sha256="ab" * 32,
        platform=MACHINE,
        inputs=(TensorSpec(name="x", dtype="float32", shape=("batch", 4)),),
        outputs=(TensorSpec(name="y", dtype="float32", shape=("batch", 2)),),
        axes={"batch": DimRange(min=1, opt=8, max=64)},
        build_s=0.5,
        external_data=external,
    )


def verdict(engine: Engine, outcome: Outcome = Outcome.PASS) -> Verdict:
    gate = GateResult(
        engine=engine.name, gate="top1 drop <= 0.01 (95 %)", outcome=outcome, measured=0.002, low=0.0, high=0.006,
        reason="the loss is between 0.0 and 0.006",
    )  # fmt: skip
    return Verdict(engine=engine.name, engine_sha256=engine.sha256, outcome=outcome, gates=(gate,))


def score(engine: Engine) -> Scores:
    return Scores(
        engine=engine.name,
        engine_sha256=engine.sha256,
        data_sha256="cd" * 32,
        scores=(
            Score(
                metric="sqnr_db", value=float("inf"), original=None, change=None, samples=300, binary=False,
                higher_is_better=True,
            ),
        ),
    )  # fmt: skip


def latencies(medians_ms: Mapping[str, Mapping[int, float]], engines: Sequence[Engine]) -> Latencies:
    hashes = {engine.name: engine.sha256 for engine in engines}
    return Latencies(
        latencies=tuple(
            Latency(
                candidate=name, batch=batch, samples_s=(0.5 * ms / 1e3, ms / 1e3, 9 * ms / 1e3), block_of=(0, 1, 2),
                engine_sha256=hashes.get(name),
            )
            for name, by_batch in medians_ms.items()
            for batch, ms in by_batch.items()
        ),
        platform=MACHINE, threads=2, boundary="host to host", started="2026-01-01T00:00:00+00:00", load_before=0.1,
        load_after=0.2,
    )  # fmt: skip


@dataclasses.dataclass
class Bench:
    """Everything that `publish` takes, ready to be changed."""

    root: Path
    engines: list[Engine]
    verdicts: list[Verdict]
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def folder(self) -> Path:
        return self.root / "dist" / "digits"

    def publish(self, folder: Path | None = None, **options: Any) -> Path:
        given: dict[str, Any] = {
            "recipe": {"name": "digits", "model": {"source": "digits.py"}},
            "engines": self.engines,
            "verdicts": self.verdicts,
            "scores": [score(engine) for engine in self.engines],
            "latencies": latencies(
                {"eager": {1: 4.0, 8: 9.0}, "fp32": {1: 2.0, 8: 5.0}, "int8": {1: 1.0, 8: 6.0}}, self.engines
            ),
            "data": DataSets(
                calibration=CalibrationSet(path=self.root, samples=128, sha256="ca" * 32),
                validation=ValidationSet(path=self.root, samples=300, sha256="cd" * 32, labelled=True),
                notes=("one sample was dropped",),
            ),
            "original": {"onnx_sha256": "ab" * 32, "onnx_bytes": 4000, "notes": ["exported at opset 21"]},
            "platform": MACHINE,
            "run_key": "12" * 32,
            "steps": {"export": "34" * 32},
            "report_md": "# digits\n",
            "report_json": b'{"outcome": "pass"}',
            "now": "2026-01-01T00:00:00+00:00",
        }
        return artifact.publish(folder or self.folder, **{**given, **self.options, **options})


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    engines = [
        make_engine(tmp_path / "step1", "fp32", b"fp32 graph" * 20),
        make_engine(tmp_path / "step2", "int8", b"int8 graph" * 10, data=b"weights" * 30),
    ]
    return Bench(root=tmp_path, engines=engines, verdicts=[verdict(engine) for engine in engines])


FILES = [
    "engines/fp32/engine.onnx",
    "engines/int8/engine.onnx",
    "engines/int8/engine.onnx.data",
    "manifest.json",
    "recipe.json",
    "report.json",
    "report.md",
]


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())


def refusal(folder: Path) -> str:
    with pytest.raises(ArtifactError) as caught:
        artifact.verify(folder)
    return caught.value.message


# --- what is written ------------------------------------------------------------------------------------------------


def test_the_folder_holds_the_engines_the_evidence_and_nothing_else(bench: Bench) -> None:
    assert bench.publish() == bench.folder
    assert names(bench.folder) == FILES
    assert [path.name for path in bench.folder.parent.iterdir()] == ["digits"]
    assert (bench.folder / "report.md").read_text() == "# digits\n"
    assert json.loads((bench.folder / "recipe.json").read_text())["model"] == {"source": "digits.py"}
    assert (bench.folder / "engines/int8/engine.onnx.data").read_bytes() == b"weights" * 30


def test_verify_gives_back_what_was_published(bench: Bench) -> None:
    manifest = artifact.verify(bench.publish())
    assert manifest.folder == bench.folder
    assert manifest.name == "digits"
    assert manifest.created == "2026-01-01T00:00:00+00:00"
    assert manifest.run_key == "12" * 32
    assert manifest.steps == {"export": "34" * 32}
    assert manifest.original_bytes == 4000
    assert manifest.calibration == artifact.SampleSet(samples=128, sha256="ca" * 32)
    assert manifest.validation == artifact.SampleSet(samples=300, sha256="cd" * 32)
    assert manifest.data_notes == ("one sample was dropped",)
    assert manifest.verdicts == tuple(bench.verdicts)
    assert manifest.scores[0].scores[0].value == float("inf")
    assert manifest.timing is not None
    assert manifest.timing.p50_ms == {
        "eager": {"1": 4.0, "8": 9.0}, "fp32": {"1": 2.0, "8": 5.0}, "int8": {"1": 1.0, "8": 6.0},
    }  # fmt: skip
    int8 = manifest.engine("int8")
    assert int8.path == bench.folder / "engines/int8/engine.onnx"
    assert int8.external_data == (bench.folder / "engines/int8/engine.onnx.data",)
    assert (
        dataclasses.replace(int8, path=bench.engines[1].path, external_data=bench.engines[1].external_data)
        == (bench.engines[1])
    )


def test_the_manifest_is_plain_json_that_lists_every_other_file(bench: Bench) -> None:
    tree = json.loads((bench.publish() / "manifest.json").read_text(), parse_constant=pytest.fail)
    assert tree["schema"] == 1
    assert sorted(tree["files"]) == [name for name in FILES if name != "manifest.json"]
    for name, record in tree["files"].items():
        data = (bench.folder / name).read_bytes()
        assert record == {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
    assert tree["engines"][0]["path"] == "engines/fp32/engine.onnx"
    assert tree["platform"]["packages"]["onnxruntime-gpu"] == "1.31.1"


def test_an_artifact_may_be_moved_and_be_reached_through_a_link(bench: Bench) -> None:
    moved = bench.publish().rename(bench.root / "moved")
    (bench.root / "current").symlink_to(moved)
    assert artifact.verify(moved).engine("fp32").path == moved / "engines/fp32/engine.onnx"
    assert artifact.verify(bench.root / "current").engine("fp32").path.read_bytes() == b"fp32 graph" * 20


def test_without_latency_and_calibration_there_is_an_artifact_all_the_same(bench: Bench) -> None:
    validation = ValidationSet(path=bench.root, samples=3, sha256="cd" * 32, labelled=False)
    bench.publish(latencies=None, data=DataSets(calibration=None, validation=validation))
    manifest = artifact.verify(bench.folder)
    assert manifest.timing is None
    assert manifest.calibration is None


def test_files_follow_the_umask_so_that_a_server_may_read_them(bench: Bench) -> None:
    before = os.umask(0o022)
    try:
        bench.publish()
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in bench.folder.rglob("*") if path.is_file()} == {0o644}
    assert (bench.folder.stat().st_mode & 0o777) == 0o755


def test_the_hash_of_an_engine_with_external_data_is_that_of_the_back_end(bench: Bench) -> None:
    onnx_files = pytest.importorskip("compiler.onnx_files")
    engine = bench.engines[1]
    assert onnx_files.sha256_of(engine.path, engine.external_data) == engine.sha256


# --- what is refused before anything is written ---------------------------------------------------------------------


def publish_refused(bench: Bench, **options: Any) -> str:
    before = names(bench.root)
    with pytest.raises(ArtifactError) as caught:
        bench.publish(**options)
    assert names(bench.root) == before
    return caught.value.message


def test_an_engine_that_is_not_the_one_judged_does_not_ship(bench: Bench) -> None:
    (bench.engines[0].path).write_bytes(b"another graph")
    found = hashlib.sha256(b"another graph").hexdigest()
    assert publish_refused(bench) == (
        f"{bench.engines[0].path}: found SHA-256 {found}; {bench.engines[0].sha256}, the one that was judged, was expected. "
        "The file changed since: run again with --no-cache."
    )


def test_an_engine_whose_file_is_gone_does_not_ship(bench: Bench) -> None:
    bench.engines[1].external_data[0].unlink()
    assert publish_refused(bench) == (
        f"{bench.engines[1].external_data[0]}: missing; the file of engine 'int8' was expected. Run again."
    )


def test_every_engine_needs_its_verdict(bench: Bench) -> None:
    assert publish_refused(bench, verdicts=bench.verdicts[:1]) == (
        f"{bench.folder}: found verdicts on 'fp32'; one on each of 'fp32', 'int8' was expected."
    )


@pytest.mark.parametrize("what", ["verdict", "accuracy", "latency"])
def test_evidence_on_other_bytes_is_refused(bench: Bench, what: str) -> None:
    other = dataclasses.replace(bench.engines[1], sha256="00" * 32)
    evidence: dict[str, dict[str, Any]] = {
        "verdict": {"verdicts": [bench.verdicts[0], verdict(other)]},
        "accuracy": {"scores": [score(other)]},
        "latency": {"latencies": latencies({"int8": {1: 1.0}}, [other])},
    }
    assert publish_refused(bench, **evidence[what]) == (
        f"{bench.folder}: the {what} of engine 'int8' is that of a file with SHA-256 {'00' * 32}; "
        f"{bench.engines[1].sha256} is to ship. Run again with --no-cache."
    )


def test_evidence_on_an_engine_that_failed_and_does_not_ship_is_fine(bench: Bench) -> None:
    lost = dataclasses.replace(bench.engines[1], name="bf16", sha256="00" * 32)
    bench.publish(scores=[score(lost)], latencies=latencies({"bf16": {1: 1.0}}, [lost]))
    artifact.verify(bench.folder)


def test_names_that_some_file_systems_take_for_one_are_refused(bench: Bench) -> None:
    upper = dataclasses.replace(bench.engines[0], name="INT8")
    assert publish_refused(bench, engines=[bench.engines[1], upper]) == (
        f"{bench.folder}: engines 'int8' and 'INT8' differ in nothing but case; they would share a folder on some "
        "file systems. Rename one in the recipe."
    )


ADVICE = "Move it away, or choose another --output."


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda folder: folder.write_text("mine"), "{}: not a folder; an artifact, or nothing, was expected there. "),
        (lambda folder: folder.symlink_to("/nowhere"),
         "{}: a symbolic link; an artifact, or nothing, was expected there. "),
        (lambda folder: mine(folder, "thesis.tex", ""),
         "{}: holds no artifact of build-engine; an artifact, or nothing, was expected. "),
        (lambda folder: (folder / "only folders").mkdir(parents=True),
         "{}: holds no artifact of build-engine; an artifact, or nothing, was expected. "),
        (lambda folder: mine(folder, "manifest.json", "{"),
         "{}: holds no artifact of build-engine; an artifact, or nothing, was expected. "),
        (lambda folder: mine(folder, "manifest.json", "[1]"),
         "{}: holds no artifact of build-engine; an artifact, or nothing, was expected. "),
        (lambda folder: mine(folder, "manifest.json", '{"format": "another", "files": {}}'),
         "{}: holds no artifact of build-engine; an artifact, or nothing, was expected. "),
    ],
)  # fmt: skip
def test_what_is_not_ours_is_never_overwritten(bench: Bench, prepare: Callable[[Path], object], message: str) -> None:
    bench.folder.parent.mkdir()
    prepare(bench.folder)
    assert publish_refused(bench) == message.format(bench.folder) + ADVICE


def mine(folder: Path, name: str, text: str) -> None:
    folder.mkdir()
    (folder / name).write_text(text)


@pytest.mark.parametrize("strange", ["notes.txt", ".git/config", "engines/fp32/mine.txt", "empty/"])
def test_a_file_that_somebody_added_to_an_artifact_is_not_lost(bench: Bench, strange: str) -> None:
    bench.publish()
    path = bench.folder / strange
    path.parent.mkdir(exist_ok=True)
    path.mkdir() if strange.endswith("/") else path.write_text("mine")
    named = ".git" if strange.startswith(".git") else strange.rstrip("/")
    assert publish_refused(bench) == (
        f"{bench.folder / named}: not written by build-engine, and would be lost; "
        f"only the files of an artifact were expected. {ADVICE}"
    )


def test_an_empty_folder_is_filled(bench: Bench) -> None:
    bench.folder.mkdir(parents=True)
    artifact.verify(bench.publish())


def test_a_damaged_artifact_is_replaced(bench: Bench) -> None:
    bench.publish()
    (bench.folder / "report.md").write_text("edited")
    (bench.folder / "engines/fp32/engine.onnx").unlink()
    bench.publish()
    artifact.verify(bench.folder)


def test_a_folder_that_cannot_be_written_is_said(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.publish()
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(ArtifactError) as caught:
        bench.publish(run_key="another")
    monkeypatch.undo()
    assert re.fullmatch(
        rf"{re.escape(str(bench.folder))}: the disk is full \(\d+ MiB free\)\. Free some space and run again\.",
        caught.value.message,
    )
    assert artifact.verify(bench.folder).run_key == "12" * 32
    assert [path.name for path in bench.folder.parent.iterdir()] == ["digits"]


# --- replacing ------------------------------------------------------------------------------------------------------


def test_ctrl_c_leaves_the_old_artifact_and_no_debris(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.publish()

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(durable, "sync_tree", interrupt)
    with pytest.raises(KeyboardInterrupt):
        bench.publish(run_key="another")
    assert artifact.verify(bench.folder).run_key == "12" * 32
    assert [path.name for path in bench.folder.parent.iterdir()] == ["digits"]


@pytest.mark.parametrize("how", ["kill", "ENOSPC", "EIO"])
def test_an_interrupted_publication_leaves_the_old_artifact_or_the_new_one(tmp_path: Path, how: str) -> None:
    done = subprocess.run(
        [sys.executable, str(FAKE_BUILD), "interrupt-publish", str(tmp_path), how],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    outcomes = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(outcomes) > 20
    for outcome in outcomes:
        assert outcome["code"] == -9 if how == "kill" else outcome["code"] in (0, 9), outcome
        assert outcome["found"] in ('"version 1"', '"version 2"'), outcome
        assert (outcome["again"], outcome["final"], outcome["left"]) == (0, '"version 3"', ["fake"]), outcome
    assert Counter(outcome["found"] for outcome in outcomes).keys() == {'"version 1"', '"version 2"'}


def test_a_reader_never_sees_a_broken_artifact_while_it_is_replaced(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)  # what a reader sees does not depend on it, the duration does
    bench.publish(run_key="0")
    stop = threading.Event()

    def read() -> list[str]:
        seen = []
        while not stop.is_set():
            seen.append(artifact.verify(bench.folder).run_key)
        return seen

    with ThreadPoolExecutor(2) as pool:
        readers = [pool.submit(read) for _ in range(2)]
        try:
            for version in range(1, 201):
                bench.publish(run_key=str(version))
        finally:
            stop.set()
        for reader in readers:
            seen = reader.result()
            assert len(set(seen)) > 5
            assert seen == sorted(seen, key=int)
    assert [path.name for path in bench.folder.parent.iterdir()] == ["digits"]


def test_of_publishers_that_race_one_wins_and_none_leaves_debris(bench: Bench) -> None:
    def publish(version: int) -> None:
        bench.publish(run_key=str(version))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(publish, range(40)))
    assert artifact.verify(bench.folder).run_key in {str(version) for version in range(40)}
    assert [path.name for path in bench.folder.parent.iterdir()] == ["digits"]


def test_debris_of_the_dead_is_swept_and_work_of_the_living_is_not(bench: Bench) -> None:
    dist = bench.folder.parent
    dist.mkdir()
    for name in (".digits.0123abcd.tmp", ".digits.fedcba98.tmp", ".digits.rejected.0123abcd.tmp", ".digits.notes.tmp"):
        (dist / name).mkdir()
        (dist / name / "half").write_text("half")
    held = durable.hold_folder(dist / ".digits.fedcba98.tmp")
    assert held is not None
    bench.publish()
    os.close(held)
    assert sorted(path.name for path in dist.iterdir()) == [
        ".digits.fedcba98.tmp", ".digits.notes.tmp", ".digits.rejected.0123abcd.tmp", "digits",
    ]  # fmt: skip


def test_without_exchange_an_artifact_that_was_moved_away_by_a_killed_run_comes_back(bench: Bench) -> None:
    bench.publish()
    aside = bench.folder.with_name(".digits.0123abcd.tmp")
    aside.mkdir()
    bench.folder.rename(aside.with_name(aside.name + ".old"))
    bench.options["engines"] = [
        dataclasses.replace(bench.engines[0], path=Path("/missing/engine.onnx")),
        bench.engines[1],
    ]
    with pytest.raises(ArtifactError, match=r"^/missing/engine\.onnx: missing; "):
        bench.publish()
    assert artifact.verify(bench.folder).run_key == "12" * 32
    assert [path.name for path in bench.folder.parent.iterdir()] == ["digits"]


# --- distrust -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_any_flipped_bit_of_any_file_is_refused(bench: Bench, name: str) -> None:
    path = bench.publish() / name
    good = path.read_bytes()
    bits = range(len(good) * 8)
    for bit in random.Random(name).sample(bits, min(100, len(bits))):
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        path.write_bytes(bad)
        message = refusal(bench.folder)
        assert str(path) in message, f"bit {bit}: {message}"
    path.write_bytes(good)
    artifact.verify(bench.folder)


def replace_by_link(path: Path) -> None:
    shutil.move(path, outside(path) / "elsewhere")
    path.symlink_to(outside(path) / "elsewhere")


def outside(path: Path) -> Path:
    return next(parent for parent in path.parents if parent.name == "dist").parent


def replace_by_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


NEWLINE = b"\n"
SPOILT: list[tuple[str, Callable[[Path], object], str]] = [
    ("report.md", lambda p: p.write_bytes(p.read_bytes()[:-1]), "found 8 bytes; 9 were written"),
    ("report.md", lambda p: p.write_bytes(b""), "found 0 bytes; 9 were written"),
    ("report.md", lambda p: p.write_bytes(p.read_bytes() + b"\n"), "found 10 bytes; 9 were written"),
    ("report.md", lambda p: p.write_bytes(b"# digitZ\n"),
     f"found SHA-256 {sha256(b'# digitZ' + NEWLINE)}; {sha256(b'# digits' + NEWLINE)} was written"),
    ("report.md", Path.unlink, "missing"),
    ("engines/int8/engine.onnx.data", Path.unlink, "missing"),
    ("report.md", replace_by_link, "found a symbolic link; an ordinary file was expected"),
    ("engines/fp32/engine.onnx", lambda p: os.link(p, outside(p) / "second name"),
     "found a hard link (the file has 2 names); an ordinary file was expected"),
    ("report.md", replace_by_pipe, "found a named pipe; an ordinary file was expected"),
    ("report.md", replace_by_folder, "found a folder; none was written here"),
    ("extra.txt", lambda p: p.write_text(""), "found a file; none was written here"),
    (".hidden", lambda p: p.write_text(""), "found a file; none was written here"),
    (".git", lambda p: p.mkdir(), "found a folder; none was written here"),
    ("engines/fp32/plugin.so", lambda p: p.write_bytes(b"\x7fELF"), "found a file; none was written here"),
    ("engines/fp32/__pycache__", lambda p: p.mkdir(), "found a folder; none was written here"),
    ("Report.md", lambda p: p.write_text(""), "found a file; none was written here"),
    ("manifest.json.tmp", lambda p: p.write_text(""), "found a file; none was written here"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "spoil", "problem"), SPOILT)
def test_a_tree_that_differs_is_refused_with_what_was_found(
    bench: Bench, name: str, spoil: Callable[[Path], object], problem: str
) -> None:
    path = bench.publish() / name
    spoil(path)
    assert refusal(bench.folder) == f"{path}: {problem}.\n{bench.folder}: not what was built. {AGAIN}"


def test_every_difference_is_named_at_once(bench: Bench) -> None:
    bench.publish()
    (bench.folder / "report.md").rename(bench.folder / "renamed.md")
    (bench.folder / ".git").mkdir()
    (bench.folder / ".git" / "x.so").write_text("x")
    assert refusal(bench.folder) == (
        f"{bench.folder}/.git: found a folder; none was written here.\n"
        f"{bench.folder}/.git/x.so: found a file; none was written here.\n"
        f"{bench.folder}/renamed.md: found a file; none was written here.\n"
        f"{bench.folder}/report.md: missing.\n"
        f"{bench.folder}: not what was built. {AGAIN}"
    )


def test_of_many_differences_ten_are_shown(bench: Bench) -> None:
    bench.publish()
    for index in range(25):
        (bench.folder / f"extra{index:02}").write_text("x")
    lines = refusal(bench.folder).splitlines()
    assert len(lines) == 12
    assert lines[10] == "... and 15 more."


def test_a_name_that_would_spoil_a_terminal_is_quoted(bench: Bench) -> None:
    bench.publish()
    (bench.folder / "\x1b[2J\nreport").write_text("x")
    assert refusal(bench.folder).splitlines() == [
        f"'{bench.folder}/\\x1b[2J\\nreport': found a file; none was written here.",
        f"{bench.folder}: not what was built. {AGAIN}",
    ]


def test_a_file_that_cannot_be_read_is_refused(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.publish()
    error = OSError(5, "Input/output error", str(bench.folder / "report.md"))
    monkeypatch.setattr(durable, "hash_file", lambda _: (_ for _ in ()).throw(error))
    assert refusal(bench.folder) == f"{bench.folder / 'report.md'}: cannot be read: Input/output error. {AGAIN}"


# --- the manifest itself --------------------------------------------------------------------------------------------


def rewrite(folder: Path, change: Callable[[dict[str, Any]], object], *, seal: bool) -> None:
    """Edit the manifest, as somebody would who knows whether its own hash is checked."""
    path = folder / "manifest.json"
    tree = json.loads(path.read_text())
    change(tree)
    del tree["sha256"]
    path.write_bytes(artifact._seal(tree) if seal else json.dumps(tree, indent=2, sort_keys=True).encode())


def test_a_manifest_edited_with_care_but_without_its_hash_is_refused(bench: Bench) -> None:
    bench.publish()
    rewrite(bench.folder, lambda tree: tree["verdicts"][0].update(outcome="pass", note=1), seal=False)
    assert refusal(bench.folder) == (
        f"{bench.folder}/manifest.json: changed since it was written: its own SHA-256 does not fit. {AGAIN}"
    )


@pytest.mark.parametrize("text", [" ", "\n", "\r\n"])
def test_white_space_in_a_manifest_counts(bench: Bench, text: str) -> None:
    path = bench.publish() / "manifest.json"
    path.write_text(path.read_text() + text)
    assert refusal(bench.folder).startswith(f"{path}: changed since it was written: ")


def test_the_hash_is_no_signature_whoever_seals_a_manifest_is_believed(bench: Bench) -> None:
    bench.publish()
    rewrite(bench.folder, lambda tree: tree.update(run_key="forged"), seal=True)
    assert artifact.verify(bench.folder).run_key == "forged"


def test_an_engine_that_was_swapped_file_and_record_does_not_fit_its_verdict(bench: Bench) -> None:
    bench.publish()
    (bench.folder / "engines/fp32/engine.onnx").write_bytes(b"another")
    record = {"sha256": hashlib.sha256(b"another").hexdigest(), "size": 7}
    rewrite(bench.folder, lambda tree: tree["files"].update({"engines/fp32/engine.onnx": record}), seal=True)
    assert refusal(bench.folder) == (
        f"{bench.folder}/manifest.json: the files listed are not engine 'fp32', SHA-256 {bench.engines[0].sha256}.\n"
        f"{bench.folder}: not what was built. {AGAIN}"
    )


def test_a_manifest_of_another_version_is_refused(bench: Bench) -> None:
    bench.publish()
    rewrite(bench.folder, lambda tree: tree.update(schema=2), seal=True)
    assert refusal(bench.folder) == (
        f"{bench.folder}/manifest.json: found schema 2; this build-engine reads schema 1. "
        "Use the version that wrote it, or build it again."
    )


@pytest.mark.parametrize(
    "change",
    [
        lambda tree: tree.pop("engines"),
        lambda tree: tree.update(more=1),
        lambda tree: tree["engines"][0].update(path="../../etc/passwd"),
        lambda tree: tree["engines"][0].update(path="/etc/passwd"),
        lambda tree: tree["verdicts"][0].update(outcome="excellent"),
    ],
)
def test_a_sealed_manifest_of_the_wrong_shape_is_refused(bench: Bench, change: Callable[[Any], object]) -> None:
    bench.publish()
    rewrite(bench.folder, change, seal=True)
    assert refusal(bench.folder) == f"{bench.folder}/manifest.json: damaged: it cannot be decoded. {AGAIN}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "damaged: it cannot be decoded. " + AGAIN),
        ("{", "damaged: it cannot be decoded. " + AGAIN),
        ("\udcff", "damaged: it cannot be decoded. " + AGAIN),
        ("[" * 200_000, "damaged: it cannot be decoded. " + AGAIN),
        ("[]", "not a manifest of build-engine; one was expected. Name dist/<name>."),
        ('{"format": "other"}', "not a manifest of build-engine; one was expected. Name dist/<name>."),
    ],
)
def test_something_else_for_a_manifest_is_refused(bench: Bench, text: str, message: str) -> None:
    path = bench.publish() / "manifest.json"
    path.write_text(text, errors="surrogateescape")
    assert refusal(bench.folder) == f"{path}: {message}"


@pytest.mark.parametrize("spoil", [Path.unlink, replace_by_link, replace_by_pipe, replace_by_folder])
def test_a_folder_without_its_manifest_is_refused(bench: Bench, spoil: Callable[[Path], object]) -> None:
    spoil(bench.publish() / "manifest.json")
    assert refusal(bench.folder) == (
        f"{bench.folder}: no manifest.json in it; a folder that build-engine wrote was expected. Name dist/<name>."
    )


def test_a_manifest_that_cannot_be_read_is_refused(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    path = bench.publish() / "manifest.json"

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    assert refusal(bench.folder) == f"{path}: cannot be read: Permission denied. {AGAIN}"


def test_there_must_be_a_folder(tmp_path: Path) -> None:
    expected = "an artifact (dist/<name>) was expected. Build one first."
    assert refusal(tmp_path / "missing") == f"{tmp_path}/missing: no such file or directory; {expected}"
    (tmp_path / "file").write_text("")
    assert refusal(tmp_path / "file") == f"{tmp_path}/file: not a folder; {expected}"


def test_a_read_that_a_replacement_overtakes_starts_again(bench: Bench) -> None:
    bench.publish(run_key="old")
    seen = []

    def read() -> str:
        seen.append(artifact.verify(bench.folder).run_key)
        if len(seen) == 1:
            bench.publish(run_key="new")
            raise RuntimeError("a file vanished")
        return seen[-1]

    assert artifact.while_unchanged(bench.folder, read) == "new"
    assert seen == ["old", "new"]


# --- choosing -------------------------------------------------------------------------------------------------------


def judged(bench: Bench, **outcomes: Outcome) -> Manifest:
    bench.verdicts = [verdict(engine, outcomes.get(engine.name, Outcome.PASS)) for engine in bench.engines]
    return artifact.verify(bench.publish())


def chosen(bench: Bench, manifest: Manifest, name: str | None = None, *, allow_failed: bool = False) -> str:
    return artifact.choose(bench.folder, manifest, name, allow_failed=allow_failed).name


def test_the_fastest_engine_that_passed_is_chosen(bench: Bench) -> None:
    assert chosen(bench, judged(bench)) == "int8"
    assert chosen(bench, judged(bench, int8=Outcome.FAIL)) == "fp32"
    assert chosen(bench, judged(bench, int8=Outcome.INCONCLUSIVE)) == "fp32"


def test_fastest_is_said_of_the_smallest_batch_size_as_a_number(bench: Bench) -> None:
    bench.options["latencies"] = latencies({"fp32": {16: 1.0, 2: 9.0}, "int8": {16: 9.0, 2: 1.0}}, bench.engines)
    assert chosen(bench, judged(bench)) == "int8"


def test_without_latencies_the_first_that_passed_is_chosen(bench: Bench) -> None:
    bench.options["latencies"] = None
    assert chosen(bench, judged(bench)) == "fp32"
    assert chosen(bench, judged(bench, fp32=Outcome.FAIL)) == "int8"


def test_an_engine_may_be_named_and_an_undecided_one_must_be(bench: Bench) -> None:
    manifest = judged(bench, fp32=Outcome.INCONCLUSIVE)
    assert chosen(bench, manifest, "fp32") == "fp32"
    assert chosen(bench, manifest, "int8") == "int8"


def test_an_unknown_engine_is_refused(bench: Bench) -> None:
    with pytest.raises(ArtifactError) as caught:
        chosen(bench, judged(bench), "int4")
    assert caught.value.message == f"{bench.folder}: no engine 'int4'; it holds 'fp32', 'int8'. Name one of them."


def test_an_engine_that_missed_a_gate_needs_to_be_asked_for_twice(bench: Bench) -> None:
    manifest = judged(bench, int8=Outcome.FAIL)
    with pytest.raises(GateFailedError) as caught:
        chosen(bench, manifest, "int8")
    assert caught.value.message == (
        f"{bench.folder}: engine 'int8' missed a gate (top1 drop <= 0.01 (95 %): the loss is between 0.0 and 0.006); "
        "one that passed was expected. Load another, or pass allow_failed=True."
    )
    assert chosen(bench, manifest, "int8", allow_failed=True) == "int8"
    assert chosen(bench, manifest, allow_failed=True) == "fp32"


def test_where_none_passed_none_is_chosen(bench: Bench) -> None:
    manifest = judged(bench, int8=Outcome.FAIL, fp32=Outcome.INCONCLUSIVE)
    with pytest.raises(GateFailedError) as caught:
        chosen(bench, manifest)
    assert caught.value.message == (
        f"{bench.folder}: no engine passed its gates ('fp32' inconclusive, 'int8' fail); one was expected. "
        "Name an engine that is inconclusive, or pass allow_failed=True."
    )
    assert chosen(bench, manifest, allow_failed=True) == "int8"


# --- the platform ---------------------------------------------------------------------------------------------------


def test_an_engine_runs_where_it_was_judged_and_on_later_versions(bench: Bench) -> None:
    engine = bench.engines[0]
    artifact.check_platform(engine, MACHINE)
    for version in ("1.31.1", "1.31.10", "1.32.0+cu13", "2.0"):
        artifact.check_platform(engine, dataclasses.replace(MACHINE, packages={"onnxruntime": version}))


L4 = dataclasses.replace(
    MACHINE, gpu="NVIDIA L4", compute_capability="8.9", driver="595.10", packages={"tensorrt": "11.4.0.106"}
)


@pytest.mark.parametrize(
    ("options", "here", "refused"),
    [
        ({}, L4, None),
        ({}, dataclasses.replace(L4, gpu="NVIDIA L40S"), "was built on NVIDIA L4 (compute capability 8.9); this machine has NVIDIA L40S."),
        ({"hardware_compatibility": "same_compute_capability"}, dataclasses.replace(L4, gpu="NVIDIA L40S"), None),
        ({"hardware_compatibility": "ampere_plus"}, dataclasses.replace(L4, gpu="NVIDIA H100", compute_capability="9.0"), None),
        ({"hardware_compatibility": "ampere_plus"}, dataclasses.replace(L4, gpu="Tesla T4", compute_capability="7.5"), "was built on NVIDIA L4"),
        ({}, dataclasses.replace(L4, gpu=None, compute_capability=None), "this machine has no GPU."),
        ({}, dataclasses.replace(L4, packages={"tensorrt": "11.5.0.1"}), "a plan runs in that version alone; found tensorrt 11.5.0.1."),
        ({"version_compatible": "on"}, dataclasses.replace(L4, packages={"tensorrt": "11.5.0.1"}), None),
        ({"version_compatible": "on"}, dataclasses.replace(L4, packages={"tensorrt": "12.0.0"}), "a plan runs in that version alone"),
    ],
)  # fmt: skip
def test_a_plan_runs_where_it_was_built_or_as_far_as_it_was_asked_to(
    bench: Bench, options: dict[str, str], here: Platform, refused: str | None
) -> None:
    engine = dataclasses.replace(bench.engines[0], backend="tensorrt", platform=L4, options=options)
    if refused is None:
        artifact.check_platform(engine, here)
        return
    with pytest.raises(ArtifactError) as caught:
        artifact.check_platform(engine, here)
    assert refused in caught.value.message


def test_a_plan_for_rtx_cards_runs_on_its_targets_only(bench: Bench) -> None:
    engine = dataclasses.replace(
        bench.engines[0], backend="tensorrt_rtx", platform=MACHINE, options={"compute_capabilities": "8.9, 12.0"}
    )
    artifact.check_platform(engine, L4)
    with pytest.raises(ArtifactError) as caught:
        artifact.check_platform(engine, dataclasses.replace(L4, gpu="RTX 3090", compute_capability="8.6"))
    assert caught.value.message == (
        f"{engine.path}: engine 'fp32' was built for compute capability 8.9, 12.0; this machine has 8.6. Build it for this "
        "one."
    )


def test_an_update_of_the_kernel_is_no_other_platform(bench: Bench) -> None:
    artifact.check_platform(bench.engines[0], dataclasses.replace(MACHINE, os="Linux 6.2"))


def test_of_two_packages_with_one_runtime_the_newer_counts(bench: Bench) -> None:
    both = {"onnxruntime": "1.20.0", "onnxruntime-gpu": "1.31.1"}
    artifact.check_platform(bench.engines[0], dataclasses.replace(MACHINE, packages=both))
    artifact.check_platform(bench.engines[0], dataclasses.replace(MACHINE, packages={}))


def test_another_system_is_refused(bench: Bench) -> None:
    with pytest.raises(
        ArtifactError, match=r"is for Linux 6\.1 x86_64; this machine is Darwin 25 x86_64\. Build it on a"
    ):
        artifact.check_platform(bench.engines[0], dataclasses.replace(MACHINE, os="Darwin 25"))


def test_another_architecture_is_refused(bench: Bench) -> None:
    engine = bench.engines[0]
    with pytest.raises(ArtifactError) as caught:
        artifact.check_platform(engine, dataclasses.replace(MACHINE, arch="aarch64"))
    assert caught.value.message == (
        f"{engine.path}: engine 'fp32' is for Linux 6.1 x86_64; this machine is Linux 6.1 aarch64. "
        "Build it on a machine like this one."
    )


@pytest.mark.parametrize("found", ["1.31.0", "1.9.9", "0.99", "1.31"])
def test_an_older_runtime_is_refused(bench: Bench, found: str) -> None:
    engine = bench.engines[0]
    older = dataclasses.replace(MACHINE, packages={"onnxruntime": found, "numpy": "1.0"})
    with pytest.raises(ArtifactError) as caught:
        artifact.check_platform(engine, older)
    assert caught.value.message == (
        f"{engine.path}: engine 'fp32' was judged on onnxruntime-gpu 1.31.1; found onnxruntime {found}. "
        "Install onnxruntime 1.31.1 or later."
    )


# --- loading --------------------------------------------------------------------------------------------------------


@pytest.fixture
def loadable(bench: Bench) -> Path:
    """An artifact whose engine doubles its input, built by the back end that always works."""
    onnx = pytest.importorskip("onnx")
    from compiler import backends
    from compiler.onnx_files import describe

    node = onnx.helper.make_node("Add", ["x", "x"], ["y"])
    values = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", 2]) for name in "xy"]
    graph = onnx.helper.make_graph([node], "double", values[:1], values[1:])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, bench.root / "model.onnx")
    (bench.root / "built").mkdir()
    backend = backends.get("onnxruntime")
    axes = {"batch": DimRange(min=1, opt=2, max=4)}
    described = describe(bench.root / "model.onnx", precision=Precision.FP32, axes=axes)
    engine = backend.build(described, name="fp32", reason="a test", threads=1, out_dir=bench.root / "built")
    return bench.publish(engines=[engine], verdicts=[verdict(engine)], scores=[], latencies=None)


def fresh(code: str, *arguments: str) -> list[str]:
    """Lines that a new interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


LOAD = """
import sys, compiler, numpy
runner = compiler.load(sys.argv[1], threads=1)
print(runner.run({"x": numpy.array([[1, 2], [3, 4]], numpy.float32)})["y"].tolist())
runner.close()
print("torch" in sys.modules, "onnx" in sys.modules)
"""
REFUSE = """
import sys, compiler
from compiler.errors import ArtifactError
try:
    compiler.load(sys.argv[1])
except ArtifactError as error:
    print(error.message.splitlines()[0])
print("onnxruntime" in sys.modules, "onnxruntime" in open("/proc/self/maps").read())
"""


def test_an_engine_runs_in_three_lines_without_torch(loadable: Path) -> None:
    assert fresh(LOAD, str(loadable)) == ["[[2.0, 4.0], [6.0, 8.0]]", "False False"]


def test_no_native_library_is_loaded_before_every_byte_was_checked(loadable: Path) -> None:
    (loadable / "report.md").write_text("# Digits\n")
    first, loaded = fresh(REFUSE, str(loadable))
    assert first.startswith(f"{loadable}/report.md: found SHA-256 ")
    assert loaded == "False False"


def test_importing_the_package_loads_nothing_but_the_standard_library() -> None:
    code = "import sys; before = set(sys.modules); import compiler; print(*sorted(set(sys.modules) - before))"
    (loaded,) = fresh(code)
    assert {name.partition(".")[0] for name in loaded.split()} - sys.stdlib_module_names == {"compiler"}
    assert "compiler.artifact" not in loaded.split()


def test_load_names_the_back_end_that_cannot_be_used(loadable: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from compiler.backends import onnxruntime

    monkeypatch.setattr(onnxruntime, "cannot_run", lambda: "it is not installed. Install it")
    with pytest.raises(BackendUnavailableError) as caught:
        compiler.load(loadable)
    assert caught.value.message == (
        f"{loadable}/engines/fp32/engine.onnx: engine 'fp32' needs onnxruntime: it is not installed. Install it."
    )


def test_load_refuses_another_platform_before_it_opens_anything(
    loadable: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from compiler.backends import onnxruntime

    monkeypatch.setattr(onnxruntime, "platform", lambda: dataclasses.replace(MACHINE, arch="riscv64"))
    monkeypatch.setattr(onnxruntime, "open", pytest.fail)
    with pytest.raises(ArtifactError, match=r"^.*engine 'fp32' is for .*; this machine is Linux 6\.1 riscv64\. Bui"):
        compiler.load(loadable)


# --- explanations and searches --------------------------------------------------------------------------------------


def explanation(engine: str) -> Explanation:
    tensor = TensorError(
        name="y", node="n", op="MatMul", layer=True, rounded=False, sqnr_db=30.0, added_db=None, share=1.0, weight_share=1.0
    )  # fmt: skip
    return Explanation(
        engine=engine, precision=Precision.INT8, model_sha256="ab" * 32, outputs_db={"y": None}, tensors=(tensor,),
        advice=(Advice(change="keep it", lines=('keep = ["y"]',), gain_db=3.0),), samples=8, fresh=True, data_sha256="ca" * 32,
    )  # fmt: skip


def test_explanations_are_files_that_the_manifest_covers(bench: Bench) -> None:
    bench.publish(explanations=[explanation("int8")])
    assert names(bench.folder) == sorted([*FILES, "explain/int8.json"])
    assert artifact.explained(bench.folder) == {"int8": explanation("int8")}
    path = bench.folder / "explain/int8.json"
    path.write_bytes(path.read_bytes().replace(b'"share":1.0', b'"share":0.5'))
    with pytest.raises(ArtifactError) as caught:
        artifact.explained(bench.folder)
    assert caught.value.message == refusal(bench.folder)
    assert f"{path}: found SHA-256 " in caught.value.message


def test_an_artifact_without_explanations_says_what_it_holds(bench: Bench) -> None:
    bench.publish()
    with pytest.raises(ArtifactError) as caught:
        artifact.explained(bench.folder)
    assert caught.value.message == (
        f"{bench.folder}: no explanation in it (engines: 'fp32' fp32, 'int8' int8); that of an int8, fp8 or int4 engine was "
        "expected. Build one, with this version of build-engine."
    )


def test_an_explanation_that_another_version_wrote_is_refused(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    dump = codec.dump
    monkeypatch.setattr(
        codec, "dump",
        lambda value, base: dump(value, base).replace(b'"samples":8', b'"samples":8,"new":1') if isinstance(value, Explanation) else dump(value, base),
    )  # fmt: skip
    bench.publish(explanations=[explanation("int8")])
    monkeypatch.undo()
    assert artifact.verify(bench.folder)
    with pytest.raises(ArtifactError) as caught:
        artifact.explained(bench.folder)
    assert caught.value.message == f"{bench.folder / 'explain/int8.json'}: damaged: it cannot be decoded. {AGAIN}"


def test_the_manifest_holds_every_point_of_a_search(bench: Bench) -> None:
    point = SearchPoint(
        precision=Precision.INT8, keep=("a", "b"), kept_layers=2, layers=9, measured={"top1": 0.9}, sqnr_db=None, within=True,
        size_bytes=10,
    )  # fmt: skip
    found = Search(
        engine="int8", points=(point,), chosen=0, reason="it is the only one", budget=("top1 drop <= 0.1",), samples=64,
        data_sha256="dd" * 32, seconds=1.0,
    )  # fmt: skip
    bench.publish(searches=[found])
    assert artifact.verify(bench.folder).searches == (found,)

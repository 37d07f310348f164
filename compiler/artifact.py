"""The deployable folder: written whole or not at all, and believed only when every byte is what was written.

Layout of ``dist/<name>/``::

    manifest.json              what is here and why to believe it; SHA-256 and size of every other file
    recipe.json                the recipe as it was resolved, defaults filled in
    engines/<engine>/...       the engine's file, and external data beside it
    explain/<engine>.json      where the error of a quantised engine comes from
    report.md, report.json     the evidence, for people and for programs

The manifest carries a SHA-256 of itself. That finds damage and careless edits; it is no signature: whoever can write the
folder can write a matching manifest.

Why `renameat2(RENAME_EXCHANGE)` and no symbolic link to a generation: the folder stays one that `cp -r`, `COPY` and
object stores take as it is.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import statistics
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from compiler import codec, durable
from compiler.durable import Record
from compiler.errors import ArtifactError, GateFailedError
from compiler.spec import DataSets, Engine, Explanation, Latencies, Outcome, Platform, Scores, Search, Verdict

T = TypeVar("T")

SCHEMA = 1
FORMAT = "build-engine artifact"
MANIFEST = "manifest.json"
_MAX_MANIFEST_BYTES = 64 << 20
_PROBLEMS_SHOWN = 10
_AGAIN = "Do not use it: copy it again from where it was built, or build it again."


@dataclass(frozen=True, kw_only=True)
class SampleSet:
    """Which data were used, without the data."""

    samples: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Where and how candidates were timed; the raw samples are in report.json."""

    platform: Platform
    threads: int
    boundary: str
    started: str
    p50_ms: Mapping[str, Mapping[str, float]]
    """Candidate -> batch size -> median of a call in milliseconds."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """``manifest.json``; paths are absolute once it is read."""

    format: str
    schema: int
    folder: Path
    name: str
    created: str
    """ISO 8601, UTC."""
    run_key: str
    """Equal for two runs that ask the same question of the same files with the same tools."""
    steps: Mapping[str, str]
    """Key of every step in the store."""
    original: Mapping[str, Any]
    """What identifies the original model: at least ``onnx_sha256`` and ``onnx_bytes``."""
    calibration: SampleSet | None
    validation: SampleSet
    data_notes: tuple[str, ...]
    platform: Platform
    engines: tuple[Engine, ...]
    verdicts: tuple[Verdict, ...]
    scores: tuple[Scores, ...]
    timing: Timing | None
    files: Mapping[str, Record]
    """Every file but this one, by path below the folder."""
    searches: tuple[Search, ...] = ()
    """Of engines whose mixture of precisions was searched for."""

    @property
    def original_bytes(self) -> int:
        """Size of the original as ONNX in FP32, external data included: what ``size_ratio`` is a ratio to."""
        return int(self.original["onnx_bytes"])

    def engine(self, name: str) -> Engine:
        return next(engine for engine in self.engines if engine.name == name)

    def verdict(self, name: str) -> Verdict:
        return next(verdict for verdict in self.verdicts if verdict.engine == name)


# --- writing --------------------------------------------------------------------------------------------------------


def publish(
    folder: Path,
    *,
    recipe: Mapping[str, Any],
    engines: Sequence[Engine],
    verdicts: Sequence[Verdict],
    scores: Sequence[Scores],
    latencies: Latencies | None,
    data: DataSets,
    original: Mapping[str, Any],
    platform: Platform,
    run_key: str,
    steps: Mapping[str, str],
    report_md: str,
    report_json: bytes,
    now: str,
    explanations: Sequence[Explanation] = (),
    searches: Sequence[Search] = (),
) -> Path:
    """Write an artifact aside and put it at ``folder``, in the place of an older artifact if there is one.

    Args:
        folder: ``dist/<name>``; its parents are made.
        recipe: plain values, defaults filled in.
        engines: what ships; each with one of ``verdicts``, and every score and latency made with the same bytes.
        verdicts: one for each engine.
        scores: one for each engine.
        latencies: what the medians in the manifest are taken of.
        data: counts and hashes go into the manifest, samples do not.
        original: see `Manifest`.
        platform: where all of this was made.
        run_key: see `Manifest`.
        steps: step id -> key in the store.
        report_md: ``report.md``.
        report_json: ``report.json``.
        now: time of writing, ISO 8601, UTC.
        explanations: of quantised engines; a file each.
        searches: see `Manifest`.

    Raises:
        ArtifactError: ``folder`` holds something that this function did not write; an engine's file is not the one that
            was judged; the disk is full or cannot be written.
    """
    folder = folder.absolute()
    _check_evidence(folder, engines, verdicts, scores, latencies)
    with durable.translating(folder):
        _refuse_to_overwrite(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        _sweep(folder)
        aside, held = _make_aside(folder)
    try:
        with durable.translating(folder):
            shipped, files = _copy_engines(engines, aside)
            for name, content in (
                ("recipe.json", _pretty(dict(recipe))),
                ("report.md", report_md.encode()),
                ("report.json", report_json),
                *((_explanation(one.engine), codec.dump(one, aside)) for one in explanations),
            ):
                (aside / name).parent.mkdir(exist_ok=True)
                (aside / name).write_bytes(content)
                files[name] = Record(sha256=hashlib.sha256(content).hexdigest(), size=len(content))
            manifest = Manifest(
                format=FORMAT,
                schema=SCHEMA,
                folder=aside,
                name=folder.name,
                created=now,
                run_key=run_key,
                steps=dict(steps),
                original=dict(original),
                calibration=_set(data.calibration) if data.calibration else None,
                validation=_set(data.validation),
                data_notes=data.notes,
                platform=platform,
                engines=shipped,
                verdicts=tuple(verdicts),
                scores=tuple(scores),
                timing=_timing(latencies) if latencies else None,
                files=files,
                searches=tuple(searches),
            )
            (aside / MANIFEST).write_bytes(_seal(json.loads(codec.dump(manifest, aside))))
            durable.sync_tree(aside, private=False)
            durable.place(aside, folder)
    finally:
        with suppress(OSError):  # what is left is swept by the next run
            durable.remove_tree(aside)
        os.close(held)
    return folder


def _check_evidence(
    folder: Path,
    engines: Sequence[Engine],
    verdicts: Sequence[Verdict],
    scores: Sequence[Scores],
    latencies: Latencies | None,
) -> None:
    """What was judged is what ships; evidence on an engine that does not ship may be there too."""
    shipped = {engine.name: engine.sha256 for engine in engines}
    if clash := _clash([engine.name for engine in engines]):
        raise ArtifactError(
            f"{folder}: engines '{clash[0]}' and '{clash[1]}' differ in nothing but case; they would share a folder on some "
            "file systems. Rename one in the recipe."
        )
    if sorted(verdict.engine for verdict in verdicts) != sorted(shipped):
        raise ArtifactError(
            f"{folder}: found verdicts on {_names(v.engine for v in verdicts)}; one on each of {_names(shipped)} was expected."
        )
    evidence = [("verdict", verdict.engine, verdict.engine_sha256) for verdict in verdicts]
    evidence += [("accuracy", score.engine, score.engine_sha256) for score in scores]
    evidence += [
        ("latency", latency.candidate, latency.engine_sha256)
        for latency in (latencies.latencies if latencies else ())
        if latency.engine_sha256 is not None
    ]
    for what, engine, sha256 in evidence:
        if shipped.get(engine, sha256) != sha256:
            raise ArtifactError(
                f"{folder}: the {what} of engine '{engine}' is that of a file with SHA-256 {sha256}; {shipped[engine]} is to "
                "ship. Run again with --no-cache."
            )


def _clash(names: Sequence[str]) -> tuple[str, str] | None:
    seen: dict[str, str] = {}
    for name in names:
        if name.casefold() in seen:
            return seen[name.casefold()], name
        seen[name.casefold()] = name
    return None


def _names(names: Any) -> str:
    return ", ".join(f"'{name}'" for name in names) or "none"


def _refuse_to_overwrite(folder: Path) -> None:
    """Nothing is ever replaced that `publish` did not write."""
    if not os.path.lexists(folder):
        return
    advice = "Move it away, or choose another --output."
    if folder.is_symlink() or not folder.is_dir():
        kind = "a symbolic link" if folder.is_symlink() else "not a folder"
        raise ArtifactError(f"{folder}: {kind}; an artifact, or nothing, was expected there. {advice}")
    tree = durable.list_tree(folder)
    names = {*tree.files, *tree.irregular}
    if not names and not tree.folders:
        return
    try:
        found = json.loads((folder / MANIFEST).read_bytes())
        ours = set(found["files"]) if found["format"] == FORMAT else None
    except (OSError, ValueError, TypeError, KeyError):
        ours = None
    if ours is None:
        raise ArtifactError(
            f"{folder}: holds no artifact of build-engine; an artifact, or nothing, was expected. {advice}"
        )
    strange = sorted((names | tree.folders) - ours - {MANIFEST} - _parents(ours))
    if strange:
        raise ArtifactError(
            f"{folder / strange[0]}: not written by build-engine, and would be lost; "
            f"only the files of an artifact were expected. {advice}"
        )


def _sweep(folder: Path) -> None:
    """Remove what publishers left that died, and bring back what one of them had just moved away."""
    left = re.compile(re.escape(f".{folder.name}.") + r"[0-9a-f]{8}\.tmp")
    for name in sorted({path.name.removesuffix(".old") for path in folder.parent.iterdir()}):
        if not left.fullmatch(name):
            continue
        aside = folder.with_name(name)
        held = durable.hold_folder(aside)
        if held is not None or not aside.exists():
            durable.restore(aside, folder)
            durable.remove_tree(aside)
        if held is not None:
            os.close(held)


def _make_aside(folder: Path) -> tuple[Path, int]:
    """A new folder beside ``folder``, and the descriptor that tells others it is in use."""
    while True:
        aside = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.tmp")
        aside.mkdir()
        held = durable.hold_folder(aside)
        if held is not None:
            return aside, held


def _copy_engines(engines: Sequence[Engine], aside: Path) -> tuple[tuple[Engine, ...], dict[str, Record]]:
    files: dict[str, Record] = {}
    shipped = []
    for engine in engines:
        home = aside / "engines" / engine.name
        hashes = []
        for source in (engine.path, *engine.external_data):
            if not source.is_file():
                raise ArtifactError(f"{source}: missing; the file of engine '{engine.name}' was expected. Run again.")
            target = home / source.relative_to(engine.path.parent)
            target.parent.mkdir(parents=True, exist_ok=True)
            record = durable.copy_file(source, target)
            files[target.relative_to(aside).as_posix()] = record
            hashes.append((target.relative_to(home).as_posix(), record.sha256))
        found = durable.hash_of(hashes)
        if found != engine.sha256:
            raise ArtifactError(
                f"{engine.path}: found SHA-256 {found}; {engine.sha256}, the one that was judged, was expected. "
                "The file changed since: run again with --no-cache."
            )
        shipped.append(
            replace(
                engine,
                path=home / engine.path.name,
                external_data=tuple(home / path.relative_to(engine.path.parent) for path in engine.external_data),
            )
        )
    return tuple(shipped), files


def _explanation(engine: str) -> str:
    return f"explain/{engine}.json"


def _set(samples: Any) -> SampleSet:
    return SampleSet(samples=samples.samples, sha256=samples.sha256)


def _timing(latencies: Latencies) -> Timing:
    p50_ms: dict[str, dict[str, float]] = {}
    for latency in latencies.latencies:
        p50_ms.setdefault(latency.candidate, {})[str(latency.batch)] = 1e3 * statistics.median(latency.samples_s)
    return Timing(
        platform=latencies.platform,
        threads=latencies.threads,
        boundary=latencies.boundary,
        started=latencies.started,
        p50_ms=p50_ms,
    )


def _pretty(tree: Any) -> bytes:
    return (json.dumps(tree, indent=2, allow_nan=False) + "\n").encode()


def _seal(tree: dict[str, Any]) -> bytes:
    """The bytes of a manifest: keys sorted, with the SHA-256 of the same text without that line's value."""
    blank = json.dumps({**tree, "sha256": ""}, indent=2, sort_keys=True, allow_nan=False) + "\n"
    digest = hashlib.sha256(blank.encode()).hexdigest()
    return (json.dumps({**tree, "sha256": digest}, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()


def _parents(names: Any) -> set[str]:
    """Folders that a set of file paths implies."""
    return {parent.as_posix() for name in names for parent in Path(name).parents if parent != Path()}


# --- reading --------------------------------------------------------------------------------------------------------


def verify(folder: Path) -> Manifest:
    """Hash every file and compare the whole tree with the manifest; nothing in the folder is loaded or run.

    Finds damage and careless edits. It is no proof of who wrote the folder: see the top of this module.

    Raises:
        ArtifactError: naming every file that is not what was written (the first ten of them).
    """
    return while_unchanged(folder, lambda: _verify(folder.absolute()))


def explained(folder: Path) -> dict[str, Explanation]:
    """What an artifact says of where the errors of its quantised engines come from, by engine, after `verify`.

    Raises:
        ArtifactError: as of `verify`; or it says nothing.
    """
    return while_unchanged(folder, lambda: _explained(folder.absolute()))


def _explained(folder: Path) -> dict[str, Explanation]:
    manifest = _verify(folder)
    found = {}
    for engine in manifest.engines:
        name = _explanation(engine.name)
        if name in manifest.files:
            try:
                found[engine.name] = codec.load((folder / name).read_bytes(), Explanation, folder)
            except (OSError, ValueError) as exc:
                raise ArtifactError(f"{folder / name}: damaged: it cannot be decoded. {_AGAIN}") from exc
    if not found:
        precisions = ", ".join(f"'{engine.name}' {engine.precision}" for engine in manifest.engines) or "none"
        raise ArtifactError(
            f"{folder}: no explanation in it (engines: {precisions}); that of an int8, fp8 or int4 engine was expected. "
            "Build one, with this version of build-engine."
        )
    return found


def while_unchanged(folder: Path, read: Callable[[], T]) -> T:
    """What ``read`` returns, or raises, when ``folder`` was one and the same from its start to its end.

    `publish` replaces the folder as a whole; a reader that it overtakes starts again.

    Raises:
        ArtifactError: there is no such folder.
    """
    while True:
        try:
            # While it is open, no other folder can be given its inode number.
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as exc:
            what = "not a folder" if isinstance(exc, NotADirectoryError) else (exc.strerror or str(exc)).lower()
            raise ArtifactError(f"{folder}: {what}; an artifact (dist/<name>) was expected. Build one first.") from exc
        try:
            result = read()
            if _is_still(folder, descriptor):
                return result
        except Exception:
            if _is_still(folder, descriptor):
                raise
        finally:
            os.close(descriptor)


def _is_still(folder: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(folder.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _verify(folder: Path) -> Manifest:
    manifest = _read_manifest(folder)
    try:
        problems = _compare(folder, manifest)
    except OSError as exc:
        raise ArtifactError(f"{exc.filename or folder}: cannot be read: {exc.strerror}. {_AGAIN}") from exc
    if problems:
        more = len(problems) - _PROBLEMS_SHOWN
        shown = problems[:_PROBLEMS_SHOWN] + ([f"... and {more} more."] if more > 0 else [])
        raise ArtifactError("\n".join([*shown, f"{folder}: not what was built. {_AGAIN}"]))
    return manifest


def _read_manifest(folder: Path) -> Manifest:
    path = folder / MANIFEST
    try:
        if path.is_symlink() or not path.is_file():
            raise ArtifactError(
                f"{folder}: no {MANIFEST} in it; a folder that build-engine wrote was expected. Name dist/<name>."
            )
        with path.open("rb") as file:
            data = file.read(_MAX_MANIFEST_BYTES + 1)
    except OSError as exc:
        raise ArtifactError(f"{path}: cannot be read: {exc.strerror}. {_AGAIN}") from exc
    try:
        tree = json.loads(data[: _MAX_MANIFEST_BYTES + 1])
        if not isinstance(tree, dict) or tree.get("format") != FORMAT:
            raise ArtifactError(f"{path}: not a manifest of build-engine; one was expected. Name dist/<name>.")
        if tree.get("schema") != SCHEMA:
            raise ArtifactError(
                f"{path}: found schema {tree.get('schema')!r}; this build-engine reads schema {SCHEMA}. "
                "Use the version that wrote it, or build it again."
            )
        if _seal({name: value for name, value in tree.items() if name != "sha256"}) != data:
            raise ArtifactError(f"{path}: changed since it was written: its own SHA-256 does not fit. {_AGAIN}")
        del tree["sha256"]
        return codec.load(json.dumps(tree).encode(), Manifest, folder)
    except (ValueError, RecursionError) as exc:
        raise ArtifactError(f"{path}: damaged: it cannot be decoded. {_AGAIN}") from exc


def _compare(folder: Path, manifest: Manifest) -> list[str]:
    """Every difference between the folder and its manifest, a line each."""
    tree = durable.list_tree(folder)
    problems = {}
    for name, kind in tree.irregular.items():
        problems[name] = f"found {kind}; an ordinary file was expected"
    for name in tree.folders - _parents(manifest.files):
        problems[name] = "found a folder; none was written here"
    for name in tree.files.keys() - manifest.files.keys() - {MANIFEST}:
        problems[name] = "found a file; none was written here"
    for name, record in manifest.files.items():
        if name in tree.files:
            if tree.files[name] != record.size:
                problems[name] = f"found {tree.files[name]} bytes; {record.size} were written"
            elif (found := durable.hash_file(folder / name)) != record:
                problems[name] = f"found SHA-256 {found.sha256}; {record.sha256} was written"
        elif name not in problems:
            problems[name] = "missing"
    for engine in manifest.engines:
        names = [path.relative_to(folder).as_posix() for path in (engine.path, *engine.external_data)]
        home = engine.path.parent.relative_to(folder).as_posix() + "/"
        hashes = [(n.removeprefix(home), manifest.files[n].sha256) for n in names if n in manifest.files]
        if len(hashes) != len(names) or durable.hash_of(hashes) != engine.sha256:
            problems[MANIFEST] = f"the files listed are not engine '{engine.name}', SHA-256 {engine.sha256}"
    return [f"{_printable(folder / name)}: {problem}." for name, problem in sorted(problems.items())]


def _printable(path: Path) -> str:
    text = str(path)
    return text if text.isprintable() else repr(text)


# --- choosing what to load ------------------------------------------------------------------------------------------


def choose(folder: Path, manifest: Manifest, name: str | None, *, allow_failed: bool) -> Engine:
    """The engine to run: the one named, else, of those that passed, the one with the lowest median at the smallest batch.

    Where none passed, one that was built ahead of time, in the recipe's order: the recipe leaves its proof to the target.

    Raises:
        ArtifactError: there is no such engine.
        GateFailedError: it, or every engine, missed a gate.
    """
    known = [engine.name for engine in manifest.engines]
    if name is not None:
        if name not in known:
            raise ArtifactError(f"{folder}: no engine '{name}'; it holds {_names(known)}. Name one of them.")
        verdict = manifest.verdict(name)
        if verdict.outcome is Outcome.FAIL and not allow_failed:
            missed = "; ".join(f"{gate.gate}: {gate.reason}" for gate in verdict.gates if gate.outcome is Outcome.FAIL)
            raise GateFailedError(
                f"{folder}: engine '{name}' missed a gate ({missed}); one that passed was expected. "
                "Load another, or pass allow_failed=True."
            )
        return manifest.engine(name)
    by_outcome = {verdict.engine: verdict.outcome for verdict in manifest.verdicts}
    passed = [engine for engine in manifest.engines if by_outcome[engine.name] is Outcome.PASS]
    deferred = [engine for engine in manifest.engines if by_outcome[engine.name] is Outcome.DEFERRED]
    candidates = passed or deferred or (list(manifest.engines) if allow_failed else [])
    if not candidates:
        outcomes = ", ".join(f"'{verdict.engine}' {verdict.outcome.value}" for verdict in manifest.verdicts)
        raise GateFailedError(
            f"{folder}: no engine passed its gates ({outcomes}); one was expected. "
            "Name an engine that is inconclusive, or pass allow_failed=True."
        )
    return min(candidates, key=lambda engine: _smallest_batch_ms(engine, manifest.timing))


def _smallest_batch_ms(engine: Engine, timing: Timing | None) -> float:
    by_batch = timing.p50_ms.get(engine.name, {}) if timing else {}
    return by_batch[min(by_batch, key=int)] if by_batch else float("inf")


def check_platform(engine: Engine, here: Platform) -> None:
    """Refuse to run an engine where its evidence says nothing.

    Raises:
        ArtifactError: another operating system or architecture, or an older runtime, than the one it was judged on.
    """
    built = engine.platform
    if (_system(here.os), here.arch) != (_system(built.os), built.arch):
        raise ArtifactError(
            f"{engine.path}: engine '{engine.name}' is for {built.os} {built.arch}; this machine is {here.os} {here.arch}. "
            "Build it on a machine like this one."
        )
    if (gpu := built.gpu) is not None and engine.backend == "tensorrt" and gpu != here.gpu:
        level = engine.options.get("hardware_compatibility", "none")
        same = built.compute_capability == here.compute_capability
        older = _numbers(here.compute_capability or "0") < (8, 0)
        if level == "none" or (level == "same_compute_capability" and not same) or (level == "ampere_plus" and older):
            raise ArtifactError(
                f"{engine.path}: engine '{engine.name}' was built on {gpu} (compute capability {built.compute_capability}); "
                f"this machine has {here.gpu or 'no GPU'}. Build it on a machine like this one, or with [tensorrt] "
                "hardware_compatibility."
            )
    targets = engine.options.get("compute_capabilities", "")
    if targets and here.compute_capability not in targets.split(", "):
        raise ArtifactError(
            f"{engine.path}: engine '{engine.name}' was built for compute capability {targets}; this machine has "
            f"{here.compute_capability or 'no GPU'}. Build it for this one."
        )
    judged_on = _newest(built.packages, engine.backend)
    installed = _newest(here.packages, engine.backend)
    if (
        engine.backend == "tensorrt"
        and judged_on
        and installed
        and _tied(engine, judged_on[1]) != _tied(engine, installed[1])
    ):
        raise ArtifactError(
            f"{engine.path}: engine '{engine.name}' was built by {' '.join(judged_on)}, and a plan runs in that version alone; "
            f"found {' '.join(installed)}. Install {judged_on[1]}, or build it again."
        )
    if judged_on and installed and _numbers(installed[1]) < _numbers(judged_on[1]):
        raise ArtifactError(
            f"{engine.path}: engine '{engine.name}' was judged on {' '.join(judged_on)}; found {' '.join(installed)}. "
            f"Install {installed[0]} {judged_on[1]} or later."
        )


def _tied(engine: Engine, version: str) -> tuple[int, ...]:
    """The part of TensorRT's version that a plan is tied to: the release, or the major version where it was asked for."""
    return _numbers(version)[: 1 if engine.options.get("version_compatible") == "on" else 3]


def _system(os_name: str) -> str:
    """``Linux 6.1.0`` is the same system after an update of its kernel."""
    return os_name.partition(" ")[0]


def _newest(packages: Mapping[str, str], backend: str) -> tuple[str, str] | None:
    """Package and version of a back end's runtime."""
    runtimes = [(name, version) for name, version in packages.items() if _family(name) == _family(backend)]
    return max(runtimes, key=lambda runtime: _numbers(runtime[1]), default=None)


def _family(package: str) -> str:
    """``onnxruntime-gpu`` and ``onnxruntime`` are one runtime in two packages; TensorRT for RTX numbers its own releases."""
    return "tensorrt_rtx" if package in ("tensorrt-rtx", "tensorrt_rtx") else package.split("-")[0]


def _numbers(version: str) -> tuple[int, ...]:
    """The release of a version: ``1.31.1+cu13`` -> (1, 31, 1)."""
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:3])

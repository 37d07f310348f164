"""The order of things: prepare a model, let every tool quantise it, ask the results the same questions, time them in
turns. Every step is a child process; what peers did is kept, by everything that went in.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from . import accuracy, environments, latency, rows, watch
from .cases import HERE, ROOT, Case
from .environments import Environment, Missing
from .jobs import Job
from .rows import Row

GROUP_BYTES = 1_200_000_000
"""Sessions of more than this together are timed in several processes, each with its own FP32."""

BASE, OWN_FP32 = "fp32", "ours fp32"
OPENVINO_HINTS = ("f32", "default")


@dataclass(frozen=True, kw_only=True)
class Settings:
    work: Path
    tools: tuple[str, ...]
    skip: frozenset[str] = frozenset()
    """``tool:method`` that are left out, and said so."""
    counts: tuple[int, ...] = ()
    """Sample counts to take in place of each case's own."""
    repeats: int = 1
    """Runs of our own cost rows and of plain inference; the median counts. Peers run once, and are kept."""
    rounds: int = 15
    evaluation: int | None = None
    """Judge on this many of the evaluation samples; None: on all."""
    threads: int = 2
    compiler: Path = ROOT
    """A folder with our package ``compiler``. It is copied at the start: the tree may change under a long run."""
    limit_mib: float = watch.LIMIT_MIB
    limit_s: float = 1800.0


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """An exported model with its samples."""

    folder: Path
    facts: Mapping[str, Any]

    @property
    def model(self) -> Path:
        return self.folder / "model.onnx"

    @property
    def batch(self) -> int:
        """How many samples our calibration takes at a time at most."""
        return int(self.facts["axes"].get("batch", {"opt": 1})["opt"])


ROUNDINGS = ("adaround", "gptq")


def _engine(case: Case, method: str) -> dict[str, object]:
    """The fields of ``[[engines]]``, and of ``[quantize]``, that a method of ours stands for."""
    if method == "searched":
        return found_by_search(case) or {}
    key = "rounding" if method in ROUNDINGS else "method"
    return {"precision": "int8", "quantize": {key: method}}


def found_by_search(case: Case) -> dict[str, object] | None:
    """The engine that ``[search]`` chose when the case's recipe was last built here, rounded as it was then; None where it was
    not."""
    for folder in (ROOT / "dist" / case.name, ROOT / "dist" / f"{case.name}.rejected"):
        if not (folder / "report.json").exists():
            continue
        for search in json.loads((folder / "report.json").read_bytes())["searches"]:
            keep: list[str] = search["points"][search["chosen"]]["keep"]
            rounding = json.loads((folder / "recipe.json").read_bytes())["quantize"]["rounding"]
            return {"precision": "int8", "keep": keep, "quantize": {"rounding": rounding}}
    return None


class Bench:
    def __init__(self, settings: Settings, say: Any = print) -> None:
        self._settings = settings
        self._say = say
        self.environments: dict[str, Environment | Missing] = {}
        self.compiler = _copy(settings.compiler / "compiler", settings.work / "ours")
        """Where our package was copied to; the folder is named by the hash of its sources."""

    # --- models -----------------------------------------------------------------------------------------------------

    def prepared(self, case: Case) -> Prepared:
        """
        Raises:
            RuntimeError: the model cannot be exported.
        """
        folder = self._settings.work / "models" / case.name
        if not (folder / "prepared.json").is_file():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            ended = self._child(sys.executable, "prepare", [case.name, str(folder)], folder / "prepare.log")
            if ended.reason is not None:
                raise RuntimeError(f"{case.name}: not prepared: {ended.reason}")
        return Prepared(folder=folder, facts=json.loads((folder / "prepared.json").read_text()))

    def rows(self, case: Case) -> list[Row]:
        """Everything that is measured of a model."""
        ready = self.prepared(case)
        settings = self._settings
        model_bytes = int(ready.facts["size_bytes"])
        found: list[Row] = []
        counts = [count for count in settings.counts or case.counts if count <= ready.facts["calibration"]]
        main = case.main_count if case.main_count in counts else max(counts)
        for count in counts:
            plain = self._plain(case, ready, count)
            made: list[Row] = []
            for tool in settings.tools:
                methods = case.methods.get(tool, ())
                if tool == "ours":
                    methods = tuple(method for method in methods if f"{tool}:{method}" not in settings.skip)
                    made += self._ours(case, ready, count, methods, keep=count == main)
                    continue
                made += [self._peer(case, ready, tool, method, count, keep=count == main) for method in methods]
            for row in made:
                rows.derive(row, plain_cpu_s=plain, model_bytes=model_bytes)
            found += made
        rows.grow(found)
        found = [variant for row in found for variant in _variants(row)]
        judged = [row for row in found if row.file is not None]
        self._score(case, ready, judged)
        if case.timed:
            self._time(case, ready, judged)
        return found

    # --- tools ------------------------------------------------------------------------------------------------------

    def _plain(self, case: Case, ready: Prepared, count: int) -> float:
        """CPU seconds of running the samples through the FP32 model."""
        job = self._job(case, ready, "inference", "plain", count)
        _fresh(Path(job.out))
        outcomes = [self._work(sys.executable, job)[0] for _ in range(self._settings.repeats)]
        taken = [outcome["stages"]["infer"]["cpu_s"] for outcome in outcomes if "infer" in outcome.get("stages", {})]
        self._say(f"{case.name}: plain inference of {count}: {', '.join(f'{value:.1f}' for value in taken)} CPU s")
        return statistics.median(taken) if taken else float("nan")

    def _ours(self, case: Case, ready: Prepared, count: int, methods: Sequence[str], *, keep: bool) -> list[Row]:
        """One pass for all methods, as the pipeline does; cost is the median over repeats, files are the last run's.
        Where they are not to ``keep``, only the cost of the first two methods is asked for, or of every engine."""
        methods = [method for method in methods if method != "searched" or found_by_search(case)]
        engines = dict(case.engines or {method: _engine(case, method) for method in methods})
        if not keep and case.engines is None:
            methods = methods[:2]
        options = {
            "axes": ready.facts["axes"],
            "probe": str(ready.folder / "probe.npz"),
            "base": str(self._settings.work),
            "engines": engines,
        }
        plain = [OWN_FP32.split()[1]] if keep and case.timed else []
        job = self._job(case, ready, "ours", "all", count, options)
        repeats = [self._stages(job, methods, plain) for _ in range(self._settings.repeats)]
        outcome, reason = repeats[-1]
        made = []
        for method in (*methods, *plain):
            row = Row(tool="ours", method=method, count=count, version=self.compiler.name)
            failed = outcome.get("errors", {}).get(method)
            row.reason = failed or (reason if method not in outcome.get("files", {}) else None)
            row.stages = rows.stages_of(outcome, method)
            if method in outcome.get("files", {}):
                costs = [rows.cost(each, method) for each, _ in repeats if method in each.get("files", {})]
                row.numbers = {key: statistics.median(each[key] for each in costs) for key in costs[-1]}
                row.file = outcome["files"][method]
                row.options = outcome["sessions"][method]
                row.notes = outcome["notes"].get(method, [])
                row.numbers["size_bytes"] = _size(row.file)
                row.numbers["import_cpu_s"] = sum(outcome["imports"][stage] for stage in row.stages)
            if not keep:
                row.file = None
            self._tell(case, row)
            made.append(row)
        if not keep:
            _drop_models(Path(job.out))
        return made

    def _stages(self, job: Job, methods: Sequence[str], plain: Sequence[str]) -> tuple[dict[str, Any], str | None]:
        """Our stages one after the other, each a worker; a stage's peak is that of its whole process."""
        merged: dict[str, Any] = {key: {} for key in ("stages", "imports", "files", "errors", "notes", "sessions")}
        pairs = [f"{kind}:{method}" for method in methods for kind in ("quantize", "build")]
        _fresh(Path(job.out))
        for stage in ("source", "optimize", "observe", *pairs, *(f"build:{name}" for name in plain)):
            kind, _, name = stage.partition(":")
            if name in merged["errors"]:
                continue
            asked = replace(job, options=job.options | {"stage": stage})
            outcome, reason = self._work(sys.executable, asked, stage.replace(":", "-"))
            if reason is not None and not name:
                return merged, f"{stage}: {reason}"
            if reason is not None:
                merged["errors"][name] = f"{kind}: {reason}"
                continue
            merged["stages"][stage] = outcome["stages"].get(stage, {}) | {"peak_mib": outcome["peak_mib"]}
            merged["imports"][stage] = outcome["stages"]["import"]["cpu_s"]
            merged["rss_before_mib"] = outcome["rss_before_mib"]
            for key in ("files", "notes", "sessions"):
                merged[key] |= outcome.get(key, {})
        return merged, None

    def _peer(self, case: Case, ready: Prepared, tool: str, method: str, count: int, *, keep: bool = True) -> Row:
        """One method of a peer: kept from before, or run now."""
        row = Row(tool=tool, method=method, count=count)
        if f"{tool}:{method}" in self._settings.skip:
            row.reason = "left out, as asked"
            return row
        environment = self._environment(tool)
        if isinstance(environment, Missing):
            row.reason = f"not installed: {environment.reason}"
            return row
        row.version = environment.version
        options = {"transformer": case.transformer, "external": int(ready.facts["size_bytes"]) > 1 << 31}
        job = self._job(case, ready, tool, method, count, options)
        key = _key(job, ready.facts, environment.versions)
        kept = Path(job.out) / "kept.json"
        known = json.loads(kept.read_text()) if kept.is_file() else {}
        if known.get("key") != key or (keep and known.get("dropped")):
            _fresh(Path(job.out))
            outcome, reason = self._work(str(environment.python), job)
            known = {"key": key, "outcome": outcome, "reason": reason, "dropped": not keep}
            known["size_bytes"] = {name: _size(file) for name, file in outcome.get("files", {}).items()}
            kept.write_text(json.dumps(known))
            if not keep:
                _drop_models(Path(job.out))
        outcome, row.reason = known["outcome"], known["reason"]
        row.stages = outcome.get("stages", {})
        if method in outcome.get("files", {}):
            row.file, row.runtime = outcome["files"][method] if keep else None, outcome.get("runtime", "onnxruntime")
            row.numbers = rows.cost(outcome, method) | {"size_bytes": known["size_bytes"][method]}
        else:
            row.numbers = {"peak_gb": outcome.get("peak_mib", float("nan")) * rows.GB_PER_MIB}
        self._tell(case, row)
        return row

    def _environment(self, tool: str) -> Environment | Missing:
        if tool not in self.environments:
            self._say(f"{tool}: installing, unless it is there")
            folder = self._settings.work / "envs"
            self.environments[tool] = environments.installed(environments.RECIPES[tool], folder)
        return self.environments[tool]

    # --- questions --------------------------------------------------------------------------------------------------

    def _score(self, case: Case, ready: Prepared, judged: Iterable[Row]) -> None:
        """Accuracy of every row's file, kept by the file's own hash."""
        judged_on = min(self._settings.evaluation or case.evaluation, int(ready.facts["evaluation"]))
        reference = ready.folder / f"answers-{judged_on}.npz"
        if not reference.is_file():
            base = {
                "name": BASE,
                "path": str(ready.model),
                "runtime": "onnxruntime",
                "options": {},
                "out": str(reference),
            }
            errors = self._answers(case, ready, sys.executable, [base])
            if errors.get(BASE, "no answer") is not None:
                raise RuntimeError(f"{case.name}: the FP32 model does not run: {errors}")
        kept = self._settings.work / "scores"
        kept.mkdir(exist_ok=True)
        with np.load(reference) as stored:
            expected = {name: stored[name] for name in stored.files}
        for row in judged:
            assert row.file is not None
            asked = [
                row.runtime,
                row.options,
                _hash(row.file),
                ready.facts["sha256"],
                judged_on,
                _hash_of_code("accuracy.py"),
            ]
            key = hashlib.sha256(json.dumps(asked).encode()).hexdigest()
            known = kept / f"{key}.json"
            if not known.is_file():
                python = self._python_for(row.runtime)
                out = self._settings.work / "asked" / case.name / "answers.npz"
                candidate = {**_candidate(row), "out": str(out)}
                error = self._answers(case, ready, python, [candidate]).get(row.name, "no answer")
                if error is not None:
                    row.reason = f"made, but does not run: {error}"
                    row.file = None
                    continue
                with np.load(out) as answers:
                    found = accuracy.compare({name: answers[name] for name in answers.files}, expected)
                out.unlink()
                known.write_text(json.dumps(found))
            row.numbers |= json.loads(known.read_text())
            self._say(f"{case.name}: {row.name}: {', '.join(f'{k} {row.numbers[k]:.5g}' for k in case.accuracy)}")

    def _answers(
        self, case: Case, ready: Prepared, python: str, candidates: list[dict[str, Any]]
    ) -> Mapping[str, str | None]:
        job = {
            "samples": str(ready.folder / "evaluation"),
            "limit": self._settings.evaluation,
            "threads": self._settings.threads,
            "candidates": candidates,
        }
        found, reason = self._ask("evaluate", case, python, job)
        return found or {candidate["name"]: reason for candidate in candidates}

    def _time(self, case: Case, ready: Prepared, judged: Sequence[Row]) -> None:
        """Latency ratios of every row's file, in groups that fit into memory, each with the plain FP32 and ours."""
        base = {"name": BASE, "path": str(ready.model), "runtime": "onnxruntime", "options": {}}
        always = [row for row in judged if row.file and row.name in (OWN_FP32, "ours auto")]
        for runtime in ("onnxruntime", "openvino"):
            rest = [row for row in judged if row.file and row.runtime == runtime and row not in always]
            for group in _groups(rest, GROUP_BYTES) or ([[]] if always and runtime == "onnxruntime" else []):
                candidates = [base, *map(_candidate, (*always, *group))]
                job = {
                    "samples": str(ready.folder / "evaluation"),
                    "threads": self._settings.threads,
                    "batches": case.batches,
                    "rounds": self._settings.rounds,
                    "candidates": candidates,
                }
                found, reason = self._ask("latency", case, self._python_for(runtime), job)
                for row in (*always, *group):
                    own = {batch: taken.get(OWN_FP32) for batch, taken in found.get("ms", {}).items()}
                    if row.name in found.get("errors", {}) or not found:
                        row.reason = f"not timed: {found.get('errors', {}).get(row.name, reason)}"
                        continue
                    for batch, taken in found["ms"].items():
                        if row.name not in taken or (row in always and f"ratio_b{batch}" in row.numbers):
                            continue
                        row.numbers[f"ms_b{batch}"] = statistics.median(taken[row.name])
                        best = found["best_ms"][batch]
                        row.numbers[f"best_ratio_b{batch}"] = best[row.name] / best[BASE]
                        row.numbers[f"ratio_b{batch}"] = latency.ratio(taken[row.name], taken[BASE])
                        if row.tool == "ours" and own[batch] is not None:
                            row.numbers[f"own_ratio_b{batch}"] = latency.ratio(taken[row.name], own[batch] or [])
                self._say(f"{case.name}: timed {', '.join(candidate['name'] for candidate in candidates)}")

    # --- children ---------------------------------------------------------------------------------------------------

    def _python_for(self, runtime: str) -> str:
        if runtime == "onnxruntime":
            return sys.executable
        environment = self._environment("nncf")
        assert isinstance(environment, Environment), "what made the file is installed"
        return str(environment.python)

    def _job(
        self,
        case: Case,
        ready: Prepared,
        tool: str,
        method: str,
        count: int,
        options: dict[str, Any] | None = None,
    ) -> Job:
        return Job(
            tool=tool,
            method=method,
            model=str(ready.model),
            samples=str(ready.folder / "calibration"),
            count=count,
            out=str(self._settings.work / "out" / case.name / tool / f"{method}-{count}"),
            batch=ready.batch,
            threads=self._settings.threads,
            options=options or {},
        )

    def _work(self, python: str, job: Job, name: str = "all") -> tuple[dict[str, Any], str | None]:
        """What a worker found, and why it is not everything."""
        out = Path(job.out)
        job.write(out / f"{name}.job.json")
        answer = out / f"{name}.result.json"
        answer.unlink(missing_ok=True)
        scratch = out / "scratch"  # tools leave files in the current folder
        scratch.mkdir()
        asked = [str(out / f"{name}.job.json"), str(answer)]
        ended = self._child(python, "worker", asked, out / f"{name}.log.txt", cwd=scratch)
        shutil.rmtree(scratch)
        outcome: dict[str, Any] = json.loads(answer.read_text()) if answer.is_file() else {"peak_mib": ended.peak_mib}
        outcome["tree_peak_mib"] = ended.peak_mib
        return outcome, ended.reason or outcome.get("error")

    def _ask(self, module: str, case: Case, python: str, job: Mapping[str, Any]) -> tuple[dict[str, Any], str | None]:
        folder = self._settings.work / "asked" / case.name
        folder.mkdir(parents=True, exist_ok=True)
        asked, answer = folder / f"{module}.json", folder / f"{module}-answer.json"
        answer.unlink(missing_ok=True)
        asked.write_text(json.dumps(job))
        ended = self._child(python, module, [str(asked), str(answer)], folder / f"{module}.log")
        found: dict[str, Any] = json.loads(answer.read_text()) if answer.is_file() else {}
        return found, ended.reason

    def _child(
        self, python: str, module: str, arguments: Sequence[str], log: Path, cwd: Path | None = None
    ) -> watch.Ended:
        ours = python == sys.executable
        threads = str(self._settings.threads)
        env = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(HERE.parent), *([str(self.compiler)] if ours else [])]),
            "OMP_NUM_THREADS": threads,
            "OMP_WAIT_POLICY": "PASSIVE",
            "CUDA_VISIBLE_DEVICES": "",
            "OLIVE_DISABLE_TELEMETRY": "1",
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_OFFLINE": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        return watch.run(
            [python, "-m", f"quantize_bench.{module}", *arguments],
            env=env,
            cwd=cwd or log.parent,
            log=log,
            limit_mib=self._settings.limit_mib,
            limit_s=self._settings.limit_s,
        )

    def _tell(self, case: Case, row: Row) -> None:
        numbers = row.numbers
        self._say(
            f"{case.name}: {row.name} N={row.count}: "
            f"{numbers.get('cpu_s', float('nan')):.1f} CPU s, {numbers.get('peak_gb', float('nan')):.2f} GB"
            + (f" - {row.reason}" if row.reason else "")
        )


def _candidate(row: Row) -> dict[str, Any]:
    return {"name": row.name, "path": row.file, "runtime": row.runtime, "options": row.options}


def _variants(row: Row) -> list[Row]:
    """A row for each precision hint that OpenVINO is given."""
    if row.runtime != "openvino" or row.file is None:
        return [row]
    return [
        Row(
            **{
                **vars(row),
                "method": f"{row.method} ({hint})",
                "options": {"precision": hint},
                "numbers": dict(row.numbers),
            }
        )
        for hint in OPENVINO_HINTS
    ]


def _groups(judged: Sequence[Row], limit: int) -> list[list[Row]]:
    """``judged`` in order, each group's files together at most ``limit`` bytes, or one file alone."""
    groups: list[list[Row]] = []
    total = 0
    for row in judged:
        size = _size(row.file or "")
        if not groups or total + size > limit:
            groups.append([])
            total = 0
        groups[-1].append(row)
        total += size
    return groups


def _files(path: str) -> list[Path]:
    """A model's file and the data beside it."""
    file = Path(path)
    beside = [file.with_suffix(".bin")] if file.suffix == ".xml" else sorted(file.parent.glob(f"{file.name}?*"))
    return [file, *(other for other in beside if other.is_file())]


def _size(path: str) -> int:
    return sum(file.stat().st_size for file in _files(path) if file.is_file())


def _hash(path: str) -> str:
    digest = hashlib.sha256()
    for file in _files(path):
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()


def _hash_of_code(name: str) -> str:
    return hashlib.sha256((HERE / name).read_bytes()).hexdigest()


def _key(job: Job, facts: Mapping[str, Any], versions: Mapping[str, str]) -> str:
    """Everything that a peer's outcome depends on, the machine aside."""
    asked = [job.tool, job.method, job.count, job.threads, job.options, facts["sha256"], facts["samples_sha256"]]
    code = [_hash_of_code(f"tools/{job.tool}.py"), _hash_of_code("samples.py"), _hash_of_code("readers.py")]
    return hashlib.sha256(json.dumps([asked, code, dict(versions)], sort_keys=True).encode()).hexdigest()


def _fresh(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _drop_models(folder: Path) -> None:
    """Keep what was measured, and free the rest."""
    for file in folder.rglob("*"):
        if file.is_file() and file.suffix not in (".json", ".txt"):
            file.unlink()


def _copy(package: Path, folder: Path) -> Path:
    """The folder below ``folder`` that holds a copy of ``package``, named by the sources' hash."""
    sources = sorted(path for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    contents = [(path.relative_to(package.parent), path.read_bytes()) for path in sources]
    digest = hashlib.sha256()
    for name, content in contents:
        digest.update(f"{name} {len(content)}\n".encode() + content)
    home = folder / digest.hexdigest()[:8]
    for name, content in contents:
        target = home / name
        if not target.is_file() or target.read_bytes() != content:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
    return home

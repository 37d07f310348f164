"""Execute a plan: look each step up, run what is missing in a child process, record what happened.

Why a process per step: native optimisers, runtimes and user code crash, leak and keep threads; a dead child is one
failed step with a reason, and its memory is gone. The price is an interpreter start, and PyTorch's import where needed.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from compiler import codec, errors
from compiler.errors import BuildEngineError
from compiler.pipeline.plan import STAGES, Plan, Step
from compiler.pipeline.store import Store
from compiler.pipeline.worker import RESULT
from compiler.recipe import ModelSection, Recipe
from compiler.spec import Engine, Interface

TOOK = "took.json"
_LOG_LINES_SHOWN = 5
_GRACE_S = 3.0
"""Seconds between asking a child to end and ending it."""


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """What became of one step; ``seconds`` and ``peak_mib`` are those of the run that filled the store."""

    id: str
    key: str
    hit: bool
    seconds: float
    peak_mib: int | None
    error: str | None = None


@dataclass(kw_only=True)
class Finished:
    """The results of a run, by step id; a failed engine's steps are missing and its reason is in ``failures``."""

    values: dict[str, Any] = field(default_factory=dict)
    folders: dict[str, Path] = field(default_factory=dict)
    records: list[StepRecord] = field(default_factory=list)
    failures: dict[str, BuildEngineError] = field(default_factory=dict)
    """By engine label."""


class Watcher(Protocol):
    """Who is told as steps go on; see `compiler.pipeline.console`."""

    def started(self, step: Step) -> None: ...
    def progressed(self, _step: Step, done: int, total: int) -> None: ...
    def finished(self, step: Step, record: StepRecord) -> None: ...
    def waiting(self, holder: str) -> None: ...


class StepBugError(RuntimeError):
    """A step ended in an exception that is nobody's mistake but this package's."""


def execute(
    plan: Plan,
    recipe: Recipe,
    base: Path,
    store: Store,
    watcher: Watcher,
    *,
    threads: int,
    keep_going: bool,
    fresh: frozenset[str] = frozenset(),
) -> Finished:
    """Run every step of ``plan`` that ``store`` does not hold.

    Args:
        plan: the steps, in order.
        recipe: goes to the children as it is.
        base: the recipe's folder.
        store: where results come from and go to.
        watcher: told about every step.
        threads: CPU threads a step may use.
        keep_going: an error inside one engine's branch ends that branch only.
        fresh: ids of steps to run even where the store has them.

    Raises:
        BuildEngineError: whatever a step raised, unless ``keep_going`` confines it to one engine.
    """
    finished = Finished()
    for step in plan.steps:
        lost = [needed for needed in step.needs.values() if needed not in finished.values]
        needs = step.needs
        if lost and step.engine is not None:
            continue
        if lost:  # a step for all engines goes on with those that are left
            needs = {name: id for name, id in step.needs.items() if id not in lost}
        watcher.started(step)
        try:
            _fulfil(plan, step, needs, recipe, base, store, watcher, threads, step.id in fresh, bool(lost), finished)
        except BuildEngineError as exc:
            record = StepRecord(id=step.id, key=step.key, hit=False, seconds=0.0, peak_mib=None, error=exc.message)
            finished.records.append(record)
            watcher.finished(step, record)
            if not keep_going or step.engine is None:
                raise
            finished.failures[step.engine] = exc
    return finished


def _fulfil(
    plan: Plan,
    step: Step,
    needs: Mapping[str, str],
    recipe: Recipe,
    base: Path,
    store: Store,
    watcher: Watcher,
    threads: int,
    fresh: bool,
    partial: bool,
    finished: Finished,
) -> None:
    """Find or make one step's result and enter it in ``finished``."""
    # With an engine missing, the step answers another question than its key says: it must not be stored under it.
    key = codec.key({"partial": step.key, "needs": sorted(needs)}) if partial else step.key
    if fresh:
        store.discard(key)
    with store.fill(key, waiting=watcher.waiting) as filling:
        if filling.hit is None:
            began = time.monotonic()
            inputs = {
                name: {"stage": plan.step(id).stage, "folder": str(finished.folders[id])} for name, id in needs.items()
            }
            peak_mib = _run_child(
                step,
                _job(step, recipe, base, inputs, filling.folder, threads=threads),
                store,
                store.log_path(key),
                watcher,
            )
            took = {"seconds": round(time.monotonic() - began, 3), "peak_mib": peak_mib}
            (filling.folder / TOOK).write_text(json.dumps(took))
    folder = filling.published
    value: Any = codec.load((folder / RESULT).read_bytes(), STAGES[step.stage].result, folder)
    took = json.loads((folder / TOOK).read_text())
    record = StepRecord(
        id=step.id, key=key, hit=filling.hit is not None, seconds=took["seconds"], peak_mib=took["peak_mib"]
    )
    finished.values[step.id] = value
    finished.folders[step.id] = folder
    finished.records.append(record)
    watcher.finished(step, record)


def _job(
    step: Step, recipe: Recipe, base: Path, inputs: Mapping[str, Any], out_dir: Path, *, threads: int
) -> dict[str, Any]:
    """What `compiler.pipeline.worker` is given."""
    return {
        "stage": step.stage,
        "recipe": recipe.to_dict(),
        "base": str(base),
        "engine": step.engine,
        "backend": step.backend,
        "backend_reason": step.backend_reason,
        "inputs": inputs,
        "out_dir": str(out_dir),
        "threads": threads,
        "parent": os.getpid(),
    }


def _run_child(step: Step, job: dict[str, Any], store: Store, log_path: Path, watcher: Watcher) -> int | None:
    """Run one step in a child; returns its peak resident memory in MiB."""
    end: dict[str, Any] | None = None
    with tempfile.TemporaryDirectory(prefix="build-engine-") as scratch, log_path.open("wb") as log:
        reader, writer = os.pipe()
        job_file = Path(scratch) / "job.json"
        job_file.write_text(json.dumps({**job, "report_fd": writer}))
        child = subprocess.Popen(
            [sys.executable, "-P", "-X", "faulthandler", "-m", "compiler.pipeline.worker", str(job_file)],
            pass_fds=[writer],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={
                # Threads that wait by spinning take the cores from whoever else works on this machine. It makes small
                # operators a little faster, so where time is measured the user's own setting stands.
                **({} if step.stage == "latency" else {"OMP_WAIT_POLICY": "PASSIVE"}),
                **os.environ,
                "PYTHONHASHSEED": "0",
                "PYTHONUNBUFFERED": "1",
                "TOKENIZERS_PARALLELISM": "false",
                "HF_HUB_DISABLE_TELEMETRY": "1",
                "TMPDIR": scratch,
                "TORCHINDUCTOR_CACHE_DIR": str(store.root / "torchinductor"),
            },
        )
        os.close(writer)
        try:
            with os.fdopen(reader) as reports:
                for line in reports:
                    event = json.loads(line)
                    if "done" in event:
                        watcher.progressed(step, event["done"], event["total"])
                    else:
                        end = event
                        break
            child.wait()
        finally:
            _end_group(child)
    if end is not None and end.get("result"):
        log_path.unlink(missing_ok=True)
        peak: int = end["peak_mib"]
        return peak
    raise _failure(step, child.returncode, end, log_path)


def _failure(step: Step, code: int, end: Mapping[str, Any] | None, log_path: Path) -> Exception:
    """What a child's death means, as an exception to raise."""
    if end is not None and end["error"] is not None:
        if not log_path.stat().st_size:
            log_path.unlink()
        return errors.BY_NAME[end["error"]](end["message"])
    if end is not None:
        return StepBugError(f"step {step.id}: {end['message']}; its log is {log_path}")
    died = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code} and no result"
    hint = " Memory may have run out: use fewer samples or a smaller axis." if code == -signal.SIGKILL else ""
    tail = [line for line in log_path.read_text(errors="replace").splitlines() if line.strip()][-_LOG_LINES_SHOWN:]
    said = "".join(f"\n    {line[:300]}" for line in tail)
    return errors.BY_NAME[STAGES[step.stage].error](
        f"step {step.id}: the child process {died}.{hint} Its log is {log_path}{', ending in:' if said else '.'}{said}"
    )


def _end_group(child: subprocess.Popen[bytes]) -> None:
    """End a child and all that it started."""
    if child.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(_GRACE_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def adopt(engine: Engine, folder: Path) -> None:
    """Fill the folder of a ``build`` step with an engine that exists already."""
    moved = {path: folder / path.name for path in (engine.path, *engine.external_data)}
    for path, target in moved.items():
        shutil.copyfile(path, target)
    external = tuple(moved[path] for path in engine.external_data)
    copy = replace(engine, path=moved[engine.path], external_data=external)
    (folder / RESULT).write_bytes(codec.dump(copy, folder))
    (folder / TOOK).write_text(json.dumps({"seconds": 0.0, "peak_mib": None}))


def inspect(model: Path) -> Interface:
    """Run a model file once, in a child, and see what its inputs are; see `compiler.starter`."""
    recipe = Recipe(name="init", model=ModelSection(source=model.name, inputs={}))
    step = Step(id="inspect", stage="inspect", key="", needs={})
    with Store.temporary() as store:
        folder = store.root / "inspect"
        folder.mkdir()
        job = _job(step, recipe, model.absolute().parent, {}, folder, threads=usable_threads())
        _run_child(step, job, store, store.root / "inspect.log", _Unwatched())
        return codec.load((folder / RESULT).read_bytes(), Interface, folder)


class _Unwatched:
    """A `Watcher` for a step that nobody needs to see."""

    def started(self, step: Step) -> None: ...
    def progressed(self, _step: Step, done: int, total: int) -> None: ...
    def finished(self, step: Step, record: StepRecord) -> None: ...
    def waiting(self, holder: str) -> None: ...


def usable_threads() -> int:
    """CPU threads that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

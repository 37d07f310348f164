"""Execute a plan: look each step up, run what is missing in a child process, record what happened.

Why a process per step: native optimisers, runtimes and user code crash, leak and keep threads; a dead child is one
failed step with a reason, and its memory is gone. The price is an interpreter start, and PyTorch's import where needed.
"""

from __future__ import annotations

import contextlib
import getpass
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from compiler import codec, errors
from compiler.backends.machine import CUDA_ORDER
from compiler.errors import BuildEngineError
from compiler.pipeline.plan import STAGES, Plan, Step, threads_of
from compiler.pipeline.store import Store
from compiler.pipeline.worker import RESULT
from compiler.recipe import ModelSection, Recipe
from compiler.spec import Engine, Interface

TOOK = "took.json"
_LOG_LINES_SHOWN = 5
_GRACE_S = 3.0
"""Seconds between asking a child to end and ending it."""
_WATCH_S = 0.2
"""Seconds between two looks at a child that has limits."""

CACHES = "caches"
"""Folder of the store in which back ends keep what speeds up their next build."""


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
    run = _Run(plan=plan, recipe=recipe, base=base, store=store, watcher=watcher, threads=threads)
    finished = run.finished
    for step in plan.steps:
        # An engine's own step falls with what it needs; a step for all engines goes on with those that are left.
        needs = {name: id for name, id in step.needs.items() if id in finished.values}
        if step.engine is not None and (needs != step.needs or step.engine in finished.failures):
            continue
        if step.stage == "latency" and finished.failures and not any(name.startswith("engine:") for name in needs):
            continue
        watcher.started(step)
        try:
            run.fulfil(step, needs, fresh=step.id in fresh)
        except BuildEngineError as exc:
            record = StepRecord(id=step.id, key=step.key, hit=False, seconds=0.0, peak_mib=None, error=exc.message)
            finished.records.append(record)
            watcher.finished(step, record)
            if not keep_going or step.engine is None:
                raise
            finished.failures[step.engine] = exc
    return finished


@dataclass(frozen=True, kw_only=True)
class _Run:
    """What all steps of a run share."""

    plan: Plan
    recipe: Recipe
    base: Path
    store: Store
    watcher: Watcher
    threads: int
    finished: Finished = field(default_factory=Finished)

    def fulfil(self, step: Step, needs: Mapping[str, str], *, fresh: bool) -> None:
        """Find or make one step's result and enter it in ``finished``."""
        key = step.key
        if needs != step.needs:  # with an engine missing it answers another question than its key says
            key = codec.key({"partial": step.key, "needs": sorted(needs)})
        if fresh:
            self.store.discard(key)
        with self.store.fill(key, waiting=self.watcher.waiting) as filling:
            if filling.hit is None:
                self._make(step, needs, key, filling.folder)
        folder = filling.published
        took = json.loads((folder / TOOK).read_text())
        record = StepRecord(
            id=step.id, key=key, hit=filling.hit is not None, seconds=took["seconds"], peak_mib=took["peak_mib"]
        )
        self.finished.values[step.id] = codec.load((folder / RESULT).read_bytes(), STAGES[step.stage].result, folder)
        self.finished.folders[step.id] = folder
        self.finished.records.append(record)
        self.watcher.finished(step, record)

    def _make(self, step: Step, needs: Mapping[str, str], key: str, folder: Path) -> None:
        began = time.monotonic()
        inputs = {
            name: {"stage": self.plan.step(id).stage, "folder": str(self.finished.folders[id])}
            for name, id in needs.items()
        }
        job = _job(
            step, self.recipe, self.base, inputs, folder, key=key, caches=self.store.root / CACHES, threads=self.threads
        )
        peak_mib = _run_child(step, job, self.store.log_path(key), self.watcher)
        took = {"seconds": round(time.monotonic() - began, 3), "peak_mib": peak_mib}
        (folder / TOOK).write_text(json.dumps(took))


def _job(
    step: Step,
    recipe: Recipe,
    base: Path,
    inputs: Mapping[str, Any],
    out_dir: Path,
    *,
    key: str,
    caches: Path,
    threads: int,
) -> dict[str, Any]:
    """What `compiler.pipeline.worker` is given."""
    return {
        "stage": step.stage,
        "key": key,
        "recipe": recipe.to_dict(),
        "base": str(base),
        "engine": step.engine,
        "backend": step.backend,
        "backend_reason": step.backend_reason,
        "inputs": inputs,
        "out_dir": str(out_dir),
        "caches": str(caches),
        "threads": threads,
        "parent": os.getpid(),
    }


def _run_child(step: Step, job: dict[str, Any], log_path: Path, watcher: Watcher) -> int | None:
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
                **CUDA_ORDER,
                **os.environ,
                "PYTHONHASHSEED": "0",
                "PYTHONUNBUFFERED": "1",
                "TOKENIZERS_PARALLELISM": "false",
                "HF_HUB_DISABLE_TELEMETRY": "1",
                "TMPDIR": scratch,
                # Beside the step's own scratch folder, where torch looks for it in any other program of this user.
                "TORCHINDUCTOR_CACHE_DIR": f"{tempfile.gettempdir()}/torchinductor_{getpass.getuser()}",
            },
        )
        os.close(writer)
        guard = _Guard(child, step)
        try:
            with guard, os.fdopen(reader) as reports:
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
    if guard.ended is not None and not (end and end.get("result")):
        raise errors.BY_NAME[STAGES[step.stage].error](
            f"step {step.id}: {guard.ended} Its log is {log_path}{_tail(log_path)}"
        )
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
        # Errors in user code point at "the log", which only this process knows.
        return errors.BY_NAME[end["error"]](end["message"].replace("is in the log.", f"is in {log_path}."))
    if end is not None:
        return StepBugError(f"step {step.id}: {end['message']}; its log is {log_path}")
    died = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code} and no result"
    hint = " Memory may have run out: use fewer samples or a smaller axis." if code == -signal.SIGKILL else ""
    return errors.BY_NAME[STAGES[step.stage].error](
        f"step {step.id}: the child process {died}.{hint} Its log is {log_path}{_tail(log_path)}"
    )


def _tail(log_path: Path) -> str:
    """The end of a sentence that ends in the name of a log: its last lines."""
    lines = [line for line in log_path.read_text(errors="replace").splitlines() if line.strip()][-_LOG_LINES_SHOWN:]
    return ", ending in:" + "".join(f"\n    {line[:300]}" for line in lines) if lines else "."


class _Guard:
    """Ends a child that passes a limit of its step; ``ended`` then says which, in a sentence."""

    def __init__(self, child: subprocess.Popen[bytes], step: Step) -> None:
        self.ended: str | None = None
        self._child, self._step = child, step
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> _Guard:
        if self._step.limit_s is not None or self._step.limit_mib is not None:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()

    def _watch(self) -> None:
        began = time.monotonic()
        while not self._over.wait(_WATCH_S):
            self.ended = self._passed(time.monotonic() - began)
            if self.ended is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self._child.pid, signal.SIGKILL)
                return

    def _passed(self, seconds: float) -> str | None:
        limit_s, limit_mib = self._step.limit_s, self._step.limit_mib
        if limit_s is not None and seconds > limit_s:
            return (
                f"ended after {seconds:.0f} s; at most {limit_s} s were expected ([tensorrt] limit_s). Raise the limit, or "
                "build a smaller model."
            )
        used_mib = _resident_mib(self._child.pid) if limit_mib is not None else 0
        if limit_mib is not None and used_mib > limit_mib:
            return (
                f"ended with {used_mib:,} MiB of memory in use; at most {limit_mib:,} were expected ([tensorrt] limit_mib). "
                "Raise the limit, or build a smaller model."
            )
        return None


def _resident_mib(pid: int) -> int:
    """Memory that a process has in use; 0 where the system does not tell."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE") >> 20


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
    home = engine.path.parent
    moved = {path: folder / path.relative_to(home) for path in (engine.path, *engine.external_data)}
    for path, target in moved.items():
        target.parent.mkdir(parents=True, exist_ok=True)
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
        base = model.absolute().parent
        job = _job(step, recipe, base, {}, folder, key=step.key, caches=store.root / CACHES, threads=threads_of(recipe))
        _run_child(step, job, store.log_path("inspect"), Unwatched())
        return codec.load((folder / RESULT).read_bytes(), Interface, folder)


class Unwatched:
    """A `Watcher` for a step that nobody needs to see."""

    def started(self, step: Step) -> None: ...
    def progressed(self, _step: Step, done: int, total: int) -> None: ...
    def finished(self, step: Step, record: StepRecord) -> None: ...
    def waiting(self, holder: str) -> None: ...

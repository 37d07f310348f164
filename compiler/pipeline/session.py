"""What each command of the CLI does, from arguments to exit code: recipe, plan, run, judge, report, artifact."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from compiler import artifact, backends, durable, report, source
from compiler import recipe as recipes
from compiler.errors import (
    ArtifactError,
    BackendUnavailableError,
    BuildEngineError,
    GateFailedError,
    InconclusiveError,
    RecipeError,
    suggest,
)
from compiler.pipeline import plan as plans
from compiler.pipeline.store import Store
from compiler.spec import Engine, GateResult, Outcome, Scores, Verdict

_EXIT = {
    Outcome.PASS: 0,
    Outcome.DEFERRED: 0,
    Outcome.FAIL: GateFailedError.exit_code,
    Outcome.INCONCLUSIVE: InconclusiveError.exit_code,
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """The switches of ``build-engine RECIPE``; see the command line's help."""

    plan_only: bool = False
    overrides: tuple[str, ...] = ()
    output: Path = Path("dist")
    as_json: bool = False
    keep_going: bool = False
    no_cache: bool = False
    remeasure: bool = False


def build(recipe_path: Path, options: Options) -> int:
    """Build, prove and write what a recipe asks; returns the exit code of its verdict."""
    recipe = recipes.load(recipe_path, options.overrides)
    base = recipe_path.absolute().parent
    with ExitStack() as stack:
        store = stack.enter_context(Store.temporary() if options.no_cache else Store.open())
        plan = plans.make(recipe, source.locate(recipe, base), machine=machine(), memo=store.memo)
        if options.plan_only:
            return _show_plan(plan, store)
        if not (options.no_cache or options.remeasure):
            known = _unchanged(options.output, recipe.name, plan.run_key)
            if known is not None:
                return _announce(known, options)
        stack.enter_context(store.run([step.key for step in plan.steps]))
        return _build(recipe, base, plan, store, options)


def machine() -> Mapping[str, str]:
    """What a latency depends on beside the engines. A reboot makes old latencies stale; so does another machine."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    platform = backends.get("onnxruntime").platform()
    return {
        "boot": boot.read_text().strip() if boot.exists() else "",
        "platform": json.dumps(asdict(platform), sort_keys=True),
    }


def _show_plan(plan: plans.Plan, store: Store) -> int:
    from compiler.pipeline import console

    if store.warning:
        console.make().print(f"warning: {store.warning}", style="yellow")
    console.show_plan(console.make(sys.stdout), plan, {step.id: store.peek(step.key) for step in plan.steps})
    return 0


def _unchanged(output: Path, name: str, run_key: str) -> Mapping[str, Any] | None:
    """The report of an artifact that answers this very question, if there is one: unharmed, complete and decided."""
    folder, known = _last(output, name)
    if folder is None or known["run_key"] != run_key or known["outcome"] == Outcome.INCONCLUSIVE or known["failures"]:
        return None
    try:
        sound = artifact.verify(folder).run_key == run_key
    except ArtifactError:
        return None
    return {**known, "folder": str(folder)} if sound else None


def _last(output: Path, name: str) -> tuple[Path | None, dict[str, Any]]:
    """The newer of what passed and what was rejected, and its report: a newer failure is not hidden by an older pass."""
    found: list[tuple[str, Path, dict[str, Any]]] = []
    for folder in (output / name, output / rejected(name)):
        try:
            content = json.loads((folder / "report.json").read_bytes())
            found.append((content["finished"], folder, content))
        except (OSError, ValueError, KeyError, TypeError):
            continue
    _, newest, content = max(found, default=("", None, {}), key=lambda entry: entry[0])
    return newest, content


def rejected(name: str) -> str:
    """Where an artifact goes that missed a gate: beside the last good one, which stays as it is."""
    return f"{name}.rejected"


def _announce(known: Mapping[str, Any], options: Options) -> int:
    from compiler.pipeline import console

    _print_report(known, options)
    console.make().print(
        f"\nunchanged since {known['finished']}: {known['folder']} was checked again, every file as written. "
        "--remeasure times it again.",
        style="dim",
    )
    return _EXIT[Outcome(known["outcome"])]


def _print_report(content: Mapping[str, Any], options: Options) -> None:
    from compiler.pipeline import console

    if not options.as_json:
        console.show_report(console.make(), content)
        return
    try:
        sys.stdout.write(json.dumps({key: content[key] for key in content if key != "folder"}, indent=1) + "\n")
        sys.stdout.flush()
    except OSError as exc:  # whoever read it is gone, or its disk is full; the exit code still tells the verdict
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        console.make().print(f"warning: the report could not be printed: {exc.strerror}", style="yellow")


def _build(recipe: recipes.Recipe, base: Path, plan: plans.Plan, store: Store, options: Options) -> int:
    from compiler.pipeline import console, run

    out = console.make()
    if store.warning:
        out.print(f"warning: {store.warning}", style="yellow")
    threads = plans.threads_of(recipe)
    # An undecided verdict may be the work of noise: then latency is measured again.
    undecided = _last(options.output, recipe.name)[1].get("outcome") == Outcome.INCONCLUSIVE
    fresh = frozenset({"latency"} if options.remeasure or undecided else ())
    with console.ConsoleWatcher(out) as watcher:
        finished = run.execute(
            plan, recipe, base, store, watcher, threads=threads, keep_going=options.keep_going, fresh=fresh
        )
    for event in store.events:
        out.print(f"warning: {event}", style="yellow")
    return conclude(recipe, plan, finished, options, out)


def conclude(recipe: recipes.Recipe, plan: plans.Plan, finished: Any, options: Options, out: Any) -> int:
    """Judge what was measured, print it, and write the artifact."""
    from compiler.pipeline import console
    from compiler.validate import judge

    values = finished.values
    labels = [engine.label for engine in recipe.engines if f"accuracy:{engine.label}" in values]
    engines: list[Engine] = [values[f"build:{label}"] for label in labels]
    scores: dict[str, Scores] = {label: values[f"accuracy:{label}"] for label in labels}
    original = values["export"]
    original_bytes = sum(path.stat().st_size for path in (original.path, *original.external_data))
    latencies = values.get("latency")
    ahead = recipe.tensorrt.ahead_of_time
    verdicts = judge.judge(recipe.gates, engines, scores, latencies, original_bytes, ahead_of_time=ahead)
    searches = [values[f"search:{label}"] for label in labels if f"search:{label}" in values]
    explanations = [values[f"explain:{label}"] for label in labels if f"explain:{label}" in values]
    outcome = Outcome.FAIL if finished.failures else judge.worst(verdict.outcome for verdict in verdicts)
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    content = report.assemble(
        name=recipe.name,
        run_key=plan.run_key,
        outcome=outcome,
        finished=now,
        engines=engines,
        original={
            "onnx_bytes": original_bytes,
            "onnx_sha256": original.sha256,
            "opset": original.opset,
            "notes": [*original.notes, *values["optimize"].notes, *values["reference"].validation.notes],
        },
        scores=scores,
        latencies=latencies,
        speeds=judge.speeds(latencies) if latencies else (),
        verdicts=verdicts,
        data=values["data"],
        platform=backends.get("onnxruntime").platform(),
        steps=[asdict(record) for record in finished.records],
        failures={engine: error.message for engine, error in finished.failures.items()},
        searches=searches,
    )
    code = _EXIT[outcome]
    if finished.failures:
        code = next(iter(finished.failures.values())).exit_code
    name = recipe.name if not _EXIT[outcome] else rejected(recipe.name)
    folder = options.output / name
    lost: BuildEngineError | None = None
    try:
        artifact.publish(
            folder,
            recipe=recipe.to_dict(),
            engines=engines,
            verdicts=verdicts,
            scores=tuple(scores.values()),
            latencies=latencies,
            data=values["data"],
            original=content["original"],
            platform=backends.get("onnxruntime").platform(),
            run_key=plan.run_key,
            steps={step.id: step.key for step in plan.steps},
            report_md=report.markdown(content),
            report_json=json.dumps(content, indent=1).encode(),
            now=now,
            explanations=explanations,
            searches=searches,
        )
    except BuildEngineError as exc:
        lost = exc
    _print_report(content, options)
    if lost is not None:
        if not code:
            raise lost
        # The verdict is what a pipeline waits for: a full disk must not hide it.
        out.print(f"warning: the report could not be written: {lost.message}", style="yellow")
        return code
    if outcome in (Outcome.INCONCLUSIVE, Outcome.DEFERRED) and any(score.stand_in for score in scores.values()):
        todo = f"To complete the evidence, on the target: build-engine verify {folder} --recipe RECIPE"
        if not recipe.tensorrt.ahead_of_time:
            todo += "\nTo leave that to the target and pass here: [tensorrt] ahead_of_time = true"
        out.print(f"\n{todo}")
    missed = {verdict.engine for verdict in verdicts if verdict.outcome is Outcome.FAIL}
    if missed & {explanation.engine for explanation in explanations}:
        out.print(f"\nWhere the error of a quantised engine comes from: build-engine explain {folder}")
    kept = "" if name == recipe.name else f" ({options.output / recipe.name} is left as it was)"
    out.print(f"\n{outcome.value}: {folder}{kept}", style=console.STYLES[outcome.value])
    return code


def verify(folder: Path, recipe_path: Path | None, overrides: tuple[str, ...], *, as_json: bool) -> int:
    """Check an artifact's files, and with a recipe run its validation again on the artifact's own engines."""
    manifest = artifact.verify(folder)
    gates: list[GateResult] = []
    code = 0
    if recipe_path is not None:
        from compiler.validate import judge

        verdicts = _validate_again(manifest, recipe_path, overrides)
        gates = [gate for verdict in verdicts for gate in verdict.gates]
        code = _EXIT[judge.worst(verdict.outcome for verdict in verdicts)]
    if as_json:
        checked = {
            "folder": str(folder),
            "files": {name: record.sha256 for name, record in manifest.files.items()},
            "gates": [asdict(gate) for gate in gates],
        }
        sys.stdout.write(json.dumps(checked, indent=1) + "\n")
        return code
    from compiler.pipeline import console

    out = console.make(sys.stdout)
    out.print(f"{folder}: {len(manifest.files) + 1} files, every byte as written {manifest.created}", style="green")
    for gate in gates:
        out.print(f"{gate.outcome.value}: {gate.engine}: {gate.gate}: {gate.reason}")
    return code


def explain(folder: Path, engine: str | None, *, as_json: bool) -> int:
    """Say where the errors of an artifact's quantised engines come from; its files are checked first."""
    known = artifact.explained(folder)
    if engine is not None and engine not in known:
        raise RecipeError(f"--engine {engine}: no explanation of such an engine in {folder}; {suggest(engine, known)}")
    chosen = known if engine is None else {engine: known[engine]}
    if as_json:
        content = {"folder": str(folder), "engines": [asdict(explanation) for explanation in chosen.values()]}
        sys.stdout.write(json.dumps(content, indent=1, allow_nan=False) + "\n")
        return 0
    from compiler.pipeline import console

    out = console.make(sys.stdout)
    for explanation in chosen.values():
        console.show_explanation(out, explanation)
    return 0


def _validate_again(manifest: artifact.Manifest, recipe_path: Path, overrides: tuple[str, ...]) -> tuple[Verdict, ...]:
    """Judge the artifact's own engine files by a recipe's data and gates; nothing is built, nothing is kept."""
    from compiler.pipeline import console, run
    from compiler.validate import judge

    recipe = recipes.load(recipe_path, overrides)
    base = recipe_path.absolute().parent
    engines = {engine.name: engine for engine in manifest.engines}
    labels = {engine.label for engine in recipe.engines}
    if labels != engines.keys():
        raise RecipeError(
            f"{recipe_path}: its engines are {', '.join(sorted(labels))}; {manifest.folder} holds "
            f"{', '.join(sorted(engines))}. Name the recipe that the artifact was built from."
        )
    for engine in manifest.engines:
        if reason := backends.get(engine.backend).cannot_run():
            raise BackendUnavailableError(
                f"{engine.path}: engine '{engine.name}' of {engine.backend} cannot run here: {reason}. Verify it on its target."
            )
        artifact.check_platform(engine, backends.get(engine.backend).platform())
    out = console.make()
    with Store.open() as known, Store.temporary(older=known.root) as store:
        plan = plans.for_engines(
            plans.make(recipe, source.locate(recipe, base), machine=machine(), memo=known.memo), engines
        )
        for name, engine in engines.items():
            with store.fill(plan.step(f"build:{name}").key) as filling:
                run.adopt(engine, filling.folder)
        threads = plans.threads_of(recipe)
        # What a search chose by is of no use any more: where it is not in the store, it is neither read nor run.
        judged = msgspec.structs.replace(recipe, search=None)
        with console.ConsoleWatcher(out) as watcher:
            finished = run.execute(plan, judged, base, store, watcher, threads=threads, keep_going=False)
        scores = {name: finished.values[f"accuracy:{name}"] for name in engines}
        return judge.judge(
            recipe.gates, tuple(engines.values()), scores, finished.values.get("latency"), manifest.original_bytes
        )


def doctor() -> int:
    """Print what is available; 0 whatever is missing."""
    from compiler.pipeline import console, doctor

    doctor.examine(console.make(sys.stdout))
    return 0


def init(model: Path, output: Path | None) -> int:
    """Write a starter recipe beside ``model``; an existing file is never overwritten."""
    from compiler import starter
    from compiler.pipeline import console, run

    if not model.is_file() or model.suffix != ".py":
        raise RecipeError(
            f"{model}: not a Python file; a file that defines build(), calibration() and validation() was expected."
        )
    target = output or model.with_suffix(".toml")
    if target.exists():
        raise RecipeError(f"{target}: exists already. Choose another file with --output.")
    interface = run.inspect(model)
    text = starter.render(model, target.parent, interface)
    with durable.translating(target):
        target.write_text(text)
    console.make().print(f"{target}: written. Next: build-engine {target}")
    return 0

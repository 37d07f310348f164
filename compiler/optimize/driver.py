"""Runs the passes to a fixpoint, and checks: the interface after each pass, validity and numbers at the end."""

from __future__ import annotations

import difflib
import gc
import shutil
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from compiler.errors import BuildError, ExportError, GraphError, RecipeError, from_os_error
from compiler.onnx_files import describe, read, write
from compiler.optimize import edit
from compiler.optimize.contract import Pass, apply
from compiler.optimize.registry import PASSES
from compiler.recipe import OptimizeSection
from compiler.spec import Array, Feeds, OnnxModel, OpenModel, Progress, no_progress

MAX_ROUNDS = 50
GROWTH_FLOOR_BYTES = 64 << 20
"""Weights may double; small models may grow to this."""

TOLERANCES = {"float64": 1e-9, "float32": 1e-4, "float16": 1e-2, "bfloat16": 3e-2}
"""How far an output on the probe may move, as a share of its own largest magnitude. Folding reassociates products, an
error of some 1e-6 in float32 after fifty layers; a wrong graph is wrong by a hundredth and more. Other dtypes must be
equal, and NaN and infinity must stand where they stood."""

_SMALLEST_SCALE = 1e-6
"""An output that is all zero is compared on this scale."""

_CHUNK = 1 << 20
"""Values that are compared together."""

Interface = tuple[tuple[tuple[str, str, edit.Dims | None, bool], ...], ...]


@dataclass(frozen=True, kw_only=True)
class Applied:
    """One pass that changed something, in the order of running."""

    step: Pass
    changes: int


def optimize(
    section: OptimizeSection,
    model: OnnxModel,
    *,
    open_model: OpenModel,
    out_dir: Path,
    progress: Progress = no_progress,
) -> OnnxModel:
    """A model that computes what ``model`` computes, with less.

    ``out_dir`` gets ``model.onnx``, its external data if it needs them, and a copy of the probe.

    Raises:
        RecipeError: ``section.skip`` names a pass that there is not.
        ExportError: ``model`` is not a valid ONNX file.
        GraphError: a pass failed, changed the interface, left an invalid model, or changed an output on the probe by
            more than `TOLERANCES`; the message names the pass.
    """
    passes = select(section.skip)
    read(model.path)  # a file that is not valid is said to be so, and not that it does not run
    # The runtime holds a large model twice while it opens it. Nobody else shall hold it then, and a graph, which refers to itself
    # in circles, goes only when it is collected: GPT-2 (0.5 GB) takes 1.4 GB instead of 1.9.
    gc.collect()
    feeds = _feeds(model.probe)
    expected = _run(open_model, model.path, feeds) if passes and feeds else {}
    graph = read(model.path)
    applied = run_passes(passes, graph, limit_bytes_for(graph), where=str(model.path), progress=progress)
    path = out_dir / "model.onnx"
    try:
        probe = Path(shutil.copyfile(model.probe, out_dir / "probe.npz")) if model.probe is not None else None
        if not applied:
            for file in (model.path, *model.external_data):
                target = path if file == model.path else out_dir / file.relative_to(model.path.parent)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, target)
    except OSError as exc:
        raise from_os_error(exc, out_dir) from exc
    notes = [*_notes(applied)]
    if applied:
        write(graph, path)
        if (unchecked := _why_unchecked(graph, model)) is not None:
            notes.append(f"numbers not compared with the original: {unchecked}")
        del graph
        gc.collect()
        _verify(
            model, path, [entry.step for entry in applied], feeds, expected, None if unchecked else open_model, out_dir
        )
    progress(len(PASSES), len(PASSES))
    return describe(path, precision=model.precision, axes=model.axes, probe=probe, notes=notes)


def select(skip: Sequence[str]) -> tuple[Pass, ...]:
    """Every pass but those named.

    Raises:
        RecipeError: no pass has such a name.
    """
    names = [step.name for step in PASSES]
    for name in skip:
        if name not in names:
            close = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean '{close[0]}'?" if close else f"expected some of {', '.join(names)}."
            raise RecipeError(f"[optimize] skip: no pass is named '{name}'; {hint}")
    return tuple(step for step in PASSES if step.name not in skip)


def limit_bytes_for(model: ir.Model) -> int:
    """How large the weights of ``model`` may grow."""
    return max(GROWTH_FLOOR_BYTES, 2 * edit.weights_bytes(model))


def interface_of(model: ir.Model) -> Interface:
    """Names, types, shapes and order of inputs and outputs, and which inputs have a default."""

    def describe_all(values: Sequence[ir.Value]) -> tuple[tuple[str, str, edit.Dims | None, bool], ...]:
        weights = model.graph.initializers
        return tuple((v.name or "", _type(v), edit.dims(v), v.name in weights) for v in values)

    return describe_all(model.graph.inputs), describe_all(model.graph.outputs)


def _type(value: ir.Value) -> str:
    return value.type.dtype.numpy().name if isinstance(value.type, ir.TensorType) else str(value.type)


def run_passes(
    passes: Sequence[Pass],
    model: ir.Model,
    limit_bytes: int,
    *,
    where: str = "the model",
    progress: Progress = no_progress,
) -> list[Applied]:
    """Run ``passes`` in turn, in place, until none changes anything.

    Raises:
        GraphError: a pass failed or changed the interface, or the rounds do not end.
    """
    interface = interface_of(model)
    applied: list[Applied] = []
    unchanged = 0
    for number in range(MAX_ROUNDS * len(passes)):
        step = passes[number % len(passes)]
        progress(min(number, len(PASSES)), len(PASSES))
        try:
            changes = apply(step, model, limit_bytes)
        except Exception as exc:
            found = f"{type(exc).__name__}: {exc}".splitlines()[0]
            raise _blame(where, step, f"failed with {found}", "every pass runs or declines") from exc
        if interface_of(model) != interface:
            moved = _interface_change(interface, interface_of(model))
            raise _blame(where, step, f"changed the interface: {moved}", "inputs and outputs stay as they are")
        if changes:
            applied.append(Applied(step=step, changes=changes))
            unchanged = 0
        unchanged += 1  # a pass leaves nothing for itself to do
        if unchanged == len(passes):
            return applied
    if not passes:
        return applied
    last = applied[-1].step
    raise _blame(where, last, f"still changes the graph after {MAX_ROUNDS} rounds", "passes come to an end")


def _blame(where: str, step: Pass, found: str, expected: str) -> GraphError:
    return GraphError(
        f"{where}: pass '{step.name}' {found}; {expected}. "
        f'Leave it out, [optimize] skip = ["{step.name}"], and report it.'
    )


def _interface_change(before: Interface, after: Interface) -> str:
    for kind, old, new in zip(("input", "output"), before, after, strict=True):
        if len(old) != len(new):
            return f"{len(old)} {kind}s became {len(new)}"
        for was, now in zip(old, new, strict=True):
            if was != now:
                return f"{kind} {_show(was)} became {_show(now)}"
    return "nothing that shows"


def _show(value: tuple[str, str, edit.Dims | None, bool]) -> str:
    name, type_, shape, has_default = value
    sizes = " of any shape" if shape is None else "[" + ", ".join("?" if d is None else str(d) for d in shape) + "]"
    return f"'{name}' {type_}{sizes}{' with a default' if has_default else ''}"


def _notes(applied: Sequence[Applied]) -> list[str]:
    totals: Counter[str] = Counter()
    for entry in applied:
        totals[entry.step.name] += entry.changes
    return [
        f"{step.name}: {number} {step.counts}{'s' if number > 1 else ''}"
        for step in PASSES
        if (number := totals[step.name])
    ]


# --- numbers --------------------------------------------------------------------------------------------------------


def _why_unchecked(graph: ir.Model, model: OnnxModel) -> str | None:
    if model.probe is None:
        return "the model carries no probe"
    nodes = [
        *graph.graph.all_nodes(),
        *(node for function in graph.functions.values() for node in function.all_nodes()),
    ]
    random = next((node for node in nodes if edit.is_random(node, edit.opset(graph))), None)
    return None if random is None else f"node '{random.name or random.op_type}' draws random numbers"


def _feeds(probe: Path | None) -> Feeds:
    if probe is None:
        return {}
    with np.load(probe, allow_pickle=False) as arrays:
        return dict(arrays)


def _verify(
    original: OnnxModel,
    path: Path,
    steps: Sequence[Pass],
    feeds: Feeds,
    expected: Mapping[str, Array],
    open_model: OpenModel | None,
    out_dir: Path,
) -> None:
    """Compare what the model at ``path`` makes of ``feeds`` with what the original does; if it is worse, find the first pass after
    which it is.

    ``open_model`` is None where only validity can be checked. Bisecting replays the passes, which are deterministic.
    """

    def problem_at(candidate: Path) -> str | None:
        try:
            read(candidate)
            return None if open_model is None else difference(expected, _run(open_model, candidate, feeds))
        except ExportError as exc:
            return f"left an invalid model: {exc.message.removeprefix(f'{candidate}: ').partition(';')[0]}"
        except BuildError as exc:
            return f"left a model that does not run: {exc.message}"

    if (problem := problem_at(path)) is None:
        return
    good, bad = 0, len(steps)
    with tempfile.TemporaryDirectory(dir=out_dir, prefix="bisect-") as folder:
        while bad - good > 1:
            middle = (good + bad) // 2
            graph = read(original.path)
            limit_bytes = limit_bytes_for(graph)
            for step in steps[:middle]:
                apply(step, graph, limit_bytes)
            candidate = Path(folder) / "model.onnx"
            write(graph, candidate)
            found = problem_at(candidate)
            if found is None:
                good = middle
            else:
                bad, problem = middle, found
    raise _blame(str(original.path), steps[bad - 1], problem, "the outputs of the original were expected")


def _run(open_model: OpenModel, path: Path, feeds: Feeds) -> dict[str, Array]:
    runner = open_model(path, optimize=False)
    try:
        return runner.run(feeds)
    finally:
        runner.close()


def difference(expected: Mapping[str, Array], got: Mapping[str, Array]) -> str | None:
    """In what ``got`` is worse than `TOLERANCES` allow, for the middle of a sentence; None where it is not.

    >>> difference({"y": np.float32([1, 2])}, {"y": np.float32([1, 2.1])})
    "moved output 'y' by 0.05 of its largest magnitude 2 (1e-04 allowed)"
    """
    for name, old in expected.items():
        if name not in got:
            return f"lost output '{name}'"
        new = got[name]
        if old.shape != new.shape or old.dtype != new.dtype:
            return f"made output '{name}' {new.dtype}{list(new.shape)} instead of {old.dtype}{list(old.shape)}"
        if old.dtype.name not in TOLERANCES:
            if not np.array_equal(old, new):
                return f"changed {int(np.sum(old != new))} of {old.size} elements of output '{name}'"
            continue
        largest = largest_difference = 0.0
        for start in range(0, old.size, _CHUNK):
            one, two = (array.reshape(-1)[start : start + _CHUNK].astype(np.float64) for array in (old, new))
            finite = np.isfinite(one)
            if not np.array_equal(one[~finite], two[~finite], equal_nan=True) or not np.isfinite(two[finite]).all():
                return f"moved NaN or infinity in output '{name}'"
            largest = max(largest, float(np.abs(one[finite]).max(initial=0.0)))
            largest_difference = max(largest_difference, float(np.abs(one[finite] - two[finite]).max(initial=0.0)))
        moved = largest_difference / max(largest, _SMALLEST_SCALE)
        allowed = TOLERANCES[old.dtype.name]
        if moved > allowed:
            return (
                f"moved output '{name}' by {moved:.2g} of its largest magnitude {largest:.3g} ({allowed:.0e} allowed)"
            )
    return None

"""Writes the original model (`compiler.original`) as ONNX, and proves the two equal.

Why `torch.onnx.export` on the module and not on an exported program of our own: its capture brings decompositions (RNNs,
sizes of 0 and 1) that `torch.export.export` lacks. What it may do in silence on the way is checked afterwards: it narrows
or fixes an axis rather than fail, and it merges equal example tensors into one input.
"""

from __future__ import annotations

import ast
import itertools
import math
import re
import traceback
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from compiler import onnx_files
from compiler.data import PROBE_SAMPLES, first_samples
from compiler.errors import BuildError, ExportError, suggest
from compiler.original import Original, Sizes, TorchRunner, at, feeds_at, first_line, load_original, quiet, to_tensor
from compiler.recipe import Recipe, dims
from compiler.source import Sources, is_user_code, shown, user_line
from compiler.spec import (
    Array,
    DimRange,
    Feeds,
    OnnxModel,
    OpenModel,
    Precision,
    Progress,
    Runner,
    batch_axis,
    no_progress,
)

MAX_POINT_ELEMENTS = 1 << 28
"""Elements of one tensor (1 GiB in FP32) above which an axis point is left out of the comparison."""

_PRIVATE = "__build_engine_"

_CHUNK = 1 << 22
"""Elements compared at a time."""


def choose_opset(recipe: Recipe) -> int:
    """The opset to export with: the recipe's, else 20.

    Why 20: every consumer reads it, and attention and normalisation stay MatMul, Softmax and the like, which INT8
    quantisation reaches. From 23 on they become one Attention and one RMSNormalization operator each, which TensorRT
    refuses to build in FP32.
    """
    return 20 if recipe.export.opset == "auto" else recipe.export.opset


def export(
    recipe: Recipe,
    sources: Sources,
    *,
    opset: int,
    open_model: OpenModel,
    out_dir: Path,
    samples: Sequence[Feeds] = (),
    progress: Progress = no_progress,
    external_above: int = onnx_files.EXTERNAL_ABOVE_BYTES,
) -> OnnxModel:
    """Write the original as ``model.onnx``, and compare the two on real samples at the extremes of every axis.

    Where torch's own optimisation of the graph breaks it (as its fusion of rotary embeddings does at opset 23), the
    model is exported without, and a note says so. An ONNX source is copied, with its axes named as in the recipe, and
    its optimised run is compared with its unoptimised one. ``probe.npz`` is one feed at the optimum of every axis;
    ``export.log`` holds what torch had to say.

    Args:
        recipe: names inputs, axes, tolerances.
        sources: see `compiler.source.locate`.
        opset: see `choose_opset`; an ONNX source keeps its own.
        open_model: runs the exported model.
        out_dir: empty folder.
        samples: to trace and compare with; default: the first `PROBE_SAMPLES` that the user's data yields, which may take its
            time.
        progress: counts the axis points.
        external_above: bytes of weights above which they go to a file of their own.

    Raises:
        ExportError: the model cannot be built or exported, is not deterministic or not finite, or the two differ.
        CalibrationError: there is no sample to compare with, or a sample does not fit the recipe.
        RecipeError: transformers is not installed, or has no such task.
    """
    samples = samples or first_samples(recipe, sources, PROBE_SAMPLES)
    path = out_dir / "model.onnx"
    notes: list[str] = []
    optimum = {name: axis.opt for name, axis in recipe.axes.items()}
    probe = feeds_at(recipe, samples, optimum)
    original: Runner
    module: Original | None = None
    if sources.kind == "onnx":
        _adopt(recipe, sources, path, notes, external_above)
        original = at("", open_model, path, optimize=False)
    else:
        module = load_original(recipe, sources, notes)
        original = TorchRunner(module, recipe, threads=0)
    try:
        _check_repeatable(original, probe, recipe, _point(optimum), notes)
        points = _points_within_reach(recipe, _largest_tensor(original, probe), notes)
        progress(0, len(points) + 1)
        broken: str | None = None
        for optimized in (True, False):
            if module is not None:
                log = out_dir / "export.log"
                _write(module, recipe, samples, opset, optimized, path, log, notes, external_above)
            progress(1, len(points) + 1)
            found = _compare(recipe, original, path, open_model, samples, points, progress)
            if found is None:
                break
            if broken is not None or module is None:
                raise ExportError(broken or found)
            broken = found
        if broken is not None:
            notes.append(f"exported without torch's own optimisation of the graph, which broke it: {broken}")
    finally:
        original.close()
    _save_npz(out_dir / "probe.npz", probe)
    return onnx_files.describe(
        path, precision=Precision.FP32, axes=recipe.axes, probe=out_dir / "probe.npz", notes=notes
    )


class _LargestTensor(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own hook
    """Remembers the largest tensor that any operator returned."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in pytree.tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.elements = max(self.elements, leaf.numel())
        return result


def _largest_tensor(original: Runner, feeds: Feeds) -> int:
    """Elements of the largest tensor while the original runs; of an ONNX source, of its inputs and outputs."""
    if isinstance(original, TorchRunner):
        with _LargestTensor() as seen:
            original.run(feeds)
        return int(seen.elements)
    return max(value.size for value in (*feeds.values(), *original.run(feeds).values()))


# --- feeds and sizes ------------------------------------------------------------------------------------------------


def _points(axes: Mapping[str, DimRange]) -> list[dict[str, int]]:
    """All minima, all optima, all maxima, and each axis alone at its extremes; each once."""
    optimum = {name: axis.opt for name, axis in axes.items()}
    points = [optimum, {name: axis.min for name, axis in axes.items()}, {name: axis.max for name, axis in axes.items()}]
    points += [optimum | {name: size} for name, axis in axes.items() for size in (axis.min, axis.max)]
    return [dict(point) for point in dict.fromkeys(tuple(point.items()) for point in points)]


def _points_within_reach(recipe: Recipe, largest: int, notes: list[str]) -> list[dict[str, int]]:
    """`_points`, less those where a tensor would exceed `MAX_POINT_ELEMENTS`; ``largest`` is the one at the optimum.

    The minima are never left out.
    """
    within = []
    minima = {name: axis.min for name, axis in recipe.axes.items()}
    for sizes in _points(recipe.axes):
        needed = largest * _growth(recipe, sizes)
        if needed <= MAX_POINT_ELEMENTS or sizes == minima:
            within.append(sizes)
        else:
            notes.append(
                f"not compared at {_point(sizes)}: a tensor would have about {needed:.1e} elements "
                f"(limit {MAX_POINT_ELEMENTS:.1e})"
            )
    return within


def _point(sizes: Sizes) -> str:
    return ", ".join(f"{name}={size}" for name, size in sizes.items()) or "the fixed shapes"


def _growth(recipe: Recipe, sizes: Sizes) -> float:
    """How much larger the largest tensor may be than at the optimum: linear in the batch, quadratic in other axes."""
    batch = batch_axis(recipe.inputs)
    return math.prod((size / recipe.axes[name].opt) ** (1 if name == batch else 2) for name, size in sizes.items())


def _example_sizes(recipe: Recipe) -> dict[str, int]:
    """Sizes to trace with: 2 or more, each another prime where the range has one, none a fixed dim of an input.

    Sizes 0 and 1 are special to torch and become constants; equal sizes may become one axis.
    """
    taken = {dim for spec in recipe.inputs for dim in spec.shape if isinstance(dim, int)}
    sizes = {}
    for name, axis in recipe.axes.items():
        span = range(max(axis.min, 2), axis.max + 1)
        primes = (size for size in span if all(size % factor for factor in range(2, math.isqrt(size) + 1)))
        free = (size for size in itertools.chain(itertools.islice(primes, 100), span[:1000]) if size not in taken)
        sizes[name] = next(free, axis.max)
        taken = taken | {sizes[name]}
    return sizes


def _save_npz(path: Path, feeds: Feeds) -> None:
    """As `np.savez`, which takes no array named ``file`` and writes the time of day."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, value in feeds.items():
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as file:
                np.lib.format.write_array(file, value, allow_pickle=False)


# --- writing --------------------------------------------------------------------------------------------------------


def _write(
    original: Original,
    recipe: Recipe,
    samples: Sequence[Feeds],
    opset: int,
    optimized: bool,
    path: Path,
    log: Path,
    notes: list[str],
    external_above: int,
) -> None:
    """Export the original to ``path``."""
    examples = _examples(original, recipe, samples)
    names = tuple(original.named(*[to_tensor(value) for value in examples.values()]))
    if clash := [name for name in names if name in examples]:
        raise ExportError(
            f"{original.where}: output '{clash[0]}' has the name of an input; different names were expected. Name the "
            "outputs in [model] outputs."
        )
    model = _trace(original, recipe, examples, len(names), opset, optimized, log, notes)
    _tidy(model, [spec.name for spec in recipe.inputs], names)
    for value, spec in zip(model.graph.inputs, recipe.inputs, strict=True):
        value.shape = ir.Shape(spec.shape)
    onnx_files.write(model, path, external_above=external_above)


def _examples(original: Original, recipe: Recipe, samples: Sequence[Feeds]) -> dict[str, Array]:
    """Feeds to trace with: at `_example_sizes`, or where the model takes none of these, at the optima."""
    sizes = _example_sizes(recipe)
    feeds = feeds_at(recipe, samples, sizes)
    try:
        with torch.inference_mode():
            original(*[to_tensor(value) for value in feeds.values()])
    except Exception:
        return feeds_at(recipe, samples, {name: axis.opt for name, axis in recipe.axes.items()})
    return feeds


def _trace(
    original: Original,
    recipe: Recipe,
    examples: Feeds,
    count: int,
    opset: int,
    optimized: bool,
    log: Path,
    notes: list[str],
) -> ir.Model:
    """Run the exporter, for ``count`` outputs: with the axes' ranges where it takes them, else with their names only."""
    free = {name: axis for name, axis in recipe.axes.items() if axis.min < axis.max}
    failure: Exception | None = None
    with log.open("a") as file:
        for ranged in (True, False):
            try:
                with quiet(file):
                    axes: dict[str, Any] = {
                        name: torch.export.Dim(name, min=axis.min, max=axis.max) if ranged else name
                        for name, axis in free.items()
                    }
                    shapes = tuple(
                        {place: axes[dim] for place, dim in enumerate(spec.shape) if dim in axes}
                        for spec in recipe.inputs
                    )
                    program = torch.onnx.export(
                        original,
                        # clones: the same tensor passed twice would become one input
                        tuple(to_tensor(examples[spec.name]).clone() for spec in recipe.inputs),
                        dynamo=True,
                        opset_version=opset,
                        dynamic_shapes=(shapes,),
                        # names of our own: the exporter lets a user's name meet one of its values, unseen
                        input_names=[f"{_PRIVATE}{index}" for index in range(len(recipe.inputs))],
                        output_names=[f"{_PRIVATE}out_{index}" for index in range(count)],
                        optimize=optimized,
                        verbose=False,
                    )
            except Exception as exc:
                traceback.print_exc(file=file)
                failure = failure or exc
                continue
            assert program is not None
            _check_interface(program, original, recipe)
            if failure is not None:
                notes.append("the exporter did not take the axes' ranges; it took their names")
            return program.model
    assert failure is not None
    raise ExportError(_explain(failure, original, opset)) from failure


def _check_interface(program: Any, original: Original, recipe: Recipe) -> None:
    """Refuse what the exporter did without a word: an input lost, an axis fixed, its range narrowed."""
    wanted = [spec.name for spec in recipe.inputs]
    positions = [int(value.name.removeprefix(_PRIVATE)) for value in program.model.graph.inputs]
    found = [wanted[position] for position in positions]
    if found != wanted:
        raise ExportError(
            f"{original.where}: the exported model has inputs {', '.join(found)}; {', '.join(wanted)} were "
            "expected. Give each input its own parameter of forward(), and use it there."
        )
    placeholders = {node.name: node for node in program.exported_program.graph.nodes if node.op == "placeholder"}
    traced = [placeholders[name].meta["val"] for name in program.exported_program.graph_signature.user_inputs]
    for spec, tensor, value in zip(recipe.inputs, traced, program.model.graph.inputs, strict=True):
        for place, dim in enumerate(spec.shape):
            if not isinstance(dim, str) or recipe.axes[dim].min == recipe.axes[dim].max:
                continue
            axis = recipe.axes[dim]
            advice = (
                f"sizes {axis.min} to {axis.max} were expected. Look in forward() for Python code that reads the size (if, "
                "range, int), and write it with tensor operations; or narrow the axis."
            )
            if isinstance(value.shape[place], int):
                raise ExportError(
                    f"{original.where}: axis '{dim}' of '{spec.name}' is fixed to {value.shape[place]}; {advice}"
                )
            symbol = getattr(getattr(tensor.shape[place], "node", None), "expr", None)
            limits = program.exported_program.range_constraints.get(symbol)
            if limits is not None and (limits.upper < axis.max or limits.lower > max(axis.min, 2)):
                raise ExportError(
                    f"{original.where}: axis '{dim}' of '{spec.name}' is limited to sizes {limits.lower} to "
                    f"{limits.upper}; {advice}"
                )


def _explain(exc: Exception, original: Original, opset: int) -> str:
    """An exporter's exception in one sentence: the user's line where torch knows it, the reason, what to do."""
    chain: list[BaseException] = []
    current: BaseException | None = exc
    while current is not None and current not in chain:
        chain.append(current)
        current = current.__cause__ or current.__context__
    text = "\n".join(str(link) for link in chain)
    where = next((line for link in reversed(chain) if (line := user_line(link))), None)
    stacks = [text, *(stack for link in chain if (stack := _node_stack(link)))]
    quoted = [
        f"{shown(Path(file))}:{number}"
        for stack in stacks
        for file, number in re.findall(r'File "([^"]+)", line (\d+)', stack)
        if is_user_code(file)
    ]
    place = quoted[-1] if quoted else where or original.where
    if operator := re.search(r"No ONNX function found for <OpOverload\(op='([\w.]+)'", text):
        return (
            f"{place}: the operator {operator[1].removeprefix('aten.')} has no ONNX form at opset {opset}; operators that "
            "have one were expected. Replace it, or choose another [export] opset."
        )
    if "data-dependent" in text:
        return (
            f"{place}: forward() branches on the values of a tensor, or makes a Python number of them; an export follows "
            "one path for all inputs. Use torch.where, or torch.cond for two whole branches."
        )
    root = chain[-1]
    return (
        f"{place}: torch cannot export forward(): {type(root).__name__}: {first_line(root)}. Rewrite that part of the "
        "model with plain tensor operations; the full traceback is in the log."
    )


def _node_stack(exc: BaseException) -> str | None:
    """Where the user's code made the graph node that the exporter was at when it failed."""
    trace = exc.__traceback__
    while trace is not None:
        node = trace.tb_frame.f_locals.get("node")
        if isinstance(node, torch.fx.Node) and "stack_trace" in node.meta:
            return str(node.meta["stack_trace"])
        trace = trace.tb_next
    return None


def _tidy(model: ir.Model, inputs: Sequence[str], outputs: Sequence[str]) -> None:
    """Names as the user knows them, each once, and nothing of the machine that exported.

    Parameters lose the prefix of `Original`; a node is named after its module and operator (``layer1.0.conv1/Conv``),
    so that ``keep = ["layer1.*"]`` means what it says; stack traces go.
    """
    graph = model.graph
    public = dict(zip((*graph.inputs, *graph.outputs), (*inputs, *outputs), strict=True))
    nodes = list(graph.all_nodes())
    private = [value for node in nodes for value in node.outputs] + list(graph.initializers.values())
    private = [value for value in private if value not in public]
    names = _Names({*public.values(), *(str(value.name) for value in private)})
    for value in private:
        if value.name in public.values():
            value.name = names.free(f"{value.name}_inner")
    for value, name in public.items():
        value.name = name
    for value in private:
        short = (value.name or "").removeprefix("model.")
        if value.is_initializer() and short != value.name and short not in names.taken:
            value.name = names.free(short)
    names = _Names(set())
    for node in nodes:
        module = _module_of(node)
        node.name = names.free(f"{module}/{node.op_type}" if module else node.op_type)
        node.doc_string = None
        node.metadata_props.clear()
    holders: tuple[Any, ...] = (*public, *private, graph, model)
    for part in holders:
        part.metadata_props.clear()


class _Names:
    """Names in use."""

    def __init__(self, taken: set[str]) -> None:
        self.taken = taken

    def free(self, name: str) -> str:
        """``name``, or ``name_1``, ``name_2``, ..., whichever is free first; it is then taken."""
        numbered = (f"{name}_{number}" for number in itertools.count(1))
        found = next(candidate for candidate in itertools.chain([name], numbered) if candidate not in self.taken)
        self.taken.add(found)
        return found


def _module_of(node: ir.Node) -> str:
    """The path of the submodule that a node comes from: of its weight where it has one, else as torch recorded it."""
    for value in node.inputs:
        if value is not None and value.is_initializer() and (value.name or "").endswith((".weight", ".bias")):
            return str(value.name).rpartition(".")[0]
    scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes")
    path = ast.literal_eval(scopes) if scopes else []
    inside = [module for module in path[:-1] if module == "model" or module.startswith("model.")]
    return inside[-1].removeprefix("model").removeprefix(".") if inside else ""


def _adopt(recipe: Recipe, sources: Sources, path: Path, notes: list[str], external_above: int) -> None:
    """Copy an ONNX source, its inputs as the recipe has them."""
    assert sources.model_path is not None
    where = shown(sources.model_path)
    model = onnx_files.read(sources.model_path)
    inputs, outputs = onnx_files.specs(model)
    by_name = {spec.name: spec for spec in inputs}
    wanted = {spec.name: spec for spec in recipe.inputs}
    for name in wanted:
        if name not in by_name:
            raise ExportError(f"{where}: no input '{name}'; {suggest(name, by_name)} Rename [model.inputs.{name}].")
    if missing := [name for name in by_name if name not in wanted]:
        raise ExportError(
            f"{where}: its input '{missing[0]}' is not in the recipe, which has {', '.join(wanted)}. Add "
            f"[model.inputs.{missing[0]}]."
        )
    names: dict[str, str] = {}
    for name, spec in wanted.items():
        found = by_name[name]
        fits = found.dtype == spec.dtype and len(found.shape) == len(spec.shape)
        for mine, theirs in zip(spec.shape, found.shape, strict=False):
            if isinstance(theirs, int):
                size = recipe.axes[mine] if isinstance(mine, str) else DimRange(min=mine, opt=mine, max=mine)
                fits &= size.min == size.max == theirs
            elif isinstance(mine, str) and theirs != "?":
                names[theirs] = mine
        if not fits:
            raise ExportError(
                f"{where}: input '{name}' is {found.dtype} {dims(found.shape)}; the recipe has {spec.dtype} "
                f"{dims(spec.shape)}. Correct [model.inputs.{name}]."
            )
    if recipe.model.outputs and recipe.model.outputs != tuple(spec.name for spec in outputs):
        raise ExportError(
            f"{where}: outputs {', '.join(spec.name for spec in outputs)}; [model] outputs has "
            f"{', '.join(recipe.model.outputs)}. An ONNX source keeps its own names: remove [model] outputs."
        )
    for initializer in model.graph.initializers.values():
        tensor = initializer.const_value
        if tensor is not None and tensor.dtype.is_floating_point() and tensor.dtype.bitwidth >= 16:
            values = np.asarray(tensor.numpy(), np.float32) if tensor.dtype == ir.DataType.BFLOAT16 else tensor.numpy()
            if bad := int(np.isnan(values).sum()):
                raise ExportError(
                    f"{where}: initializer '{initializer.name}': {bad} of {tensor.size} values are NaN; numbers were "
                    "expected. Export the model again."
                )
    _rename_axes(model, names)
    for value in model.graph.inputs:
        if value.name in wanted:
            value.shape = ir.Shape(wanted[value.name].shape)
    own = model.opset_imports.get("", 0)
    if recipe.export.opset not in ("auto", own):
        notes.append(
            f"opset {own} kept, where the recipe asks for {recipe.export.opset}: an ONNX source is not converted"
        )
    onnx_files.write(model, path, external_above=external_above)


def _rename_axes(model: ir.Model, names: Mapping[str, str]) -> None:
    """Give symbolic dims other names wherever they stand."""
    for node in (None, *model.graph.all_nodes()):
        for value in node.outputs if node is not None else model.graph.inputs:
            if value.shape is not None:
                value.shape = ir.Shape(
                    names.get(dim.value or "", dim.value) if isinstance(dim, ir.SymbolicDim) else dim
                    for dim in value.shape
                )


# --- checks ---------------------------------------------------------------------------------------------------------


def _check_repeatable(original: Runner, probe: Feeds, recipe: Recipe, point: str, notes: list[str]) -> None:
    """The original, run twice on the same feed, gives the same outputs."""
    first = at(point, original.run, probe)
    second = at(point, original.run, probe)
    for name, value in first.items():
        difference = _difference(value, second[name], recipe.export.rtol, recipe.export.atol)
        if difference is not None:
            raise ExportError(
                f"output '{name}' at {point}: two runs of the original on the same input differ {difference}. Remove what "
                "is random in forward() (torch.rand, or F.dropout without training=self.training)."
            )
        if not np.array_equal(value, second[name], equal_nan=value.dtype.kind == "f"):
            notes.append(f"output '{name}': two runs of the original differ in the last bits")
        if value.dtype.kind == "f" and np.isnan(value).all():
            raise ExportError(
                f"output '{name}' at {point}: every value of the original is NaN on real samples; numbers were expected. "
                "Check the weights, and how the data are scaled."
            )


def _compare(
    recipe: Recipe,
    original: Runner,
    path: Path,
    open_model: OpenModel,
    samples: Sequence[Feeds],
    points: Sequence[Sizes],
    progress: Progress,
) -> str | None:
    """What is wrong with the exported model at the first point where it fails or differs from the original, or None.

    Raises:
        ExportError: the original itself fails.
    """
    exported: Runner | None = None
    try:
        exported = open_model(path, optimize=True)
        for done, sizes in enumerate(points, start=1):
            point = _point(sizes)
            feeds = feeds_at(recipe, samples, sizes)
            expected = at(point, original.run, feeds)
            try:
                found = exported.run(feeds)
            except BuildError as exc:
                return f"the exported model at {point}: {exc.message}"
            for name, value in expected.items():
                if name not in found:
                    return (
                        f"the exported model has no output '{name}'; found {', '.join(found)}. Give [model] outputs other "
                        "names."
                    )
                difference = _difference(value, found[name], recipe.export.rtol, recipe.export.atol)
                if difference is not None:
                    return (
                        f"output '{name}' at {point}: the ONNX model and the original differ {difference}. Look in "
                        "forward() for Python code that depends on sizes or values (if, int, .item()), or loosen [export] "
                        "rtol and atol."
                    )
            progress(done + 1, len(points) + 1)
    except BuildError as exc:
        return f"the exported model: {exc.message}"
    finally:
        if exported is not None:
            exported.close()
    return None


def _difference(expected: Array, found: Array, rtol: float, atol: float) -> str | None:
    """How two arrays differ by more than ``atol + rtol * max(|expected|, rms)``, element by element, or None.

    The root mean square of ``expected`` is in the bound because rounding errors of a sum follow the size of its terms,
    not of the result. NaN equals NaN, and Inf equals Inf of its sign. Integers and booleans are equal or they differ.
    """
    if expected.shape != found.shape:
        return f"in shape: {dims(found.shape)} instead of {dims(expected.shape)}"
    if expected.dtype != found.dtype:
        return f"in type: {found.dtype.name} instead of {expected.dtype.name}"
    a, b = expected.reshape(-1), found.reshape(-1)
    if expected.dtype.kind != "f":
        wrong = np.flatnonzero(a != b)
        if not wrong.size:
            return None
        where = dims([int(i) for i in np.unravel_index(wrong[0], expected.shape)])
        return f"in {wrong.size} of {a.size} values (the first at {where}: {b[wrong[0]]} instead of {a[wrong[0]]})"
    chunks = [slice(start, start + _CHUNK) for start in range(0, a.size, _CHUNK)]
    squares = [np.square(part[np.isfinite(part)], dtype=np.float64).sum() for part in (a[chunk] for chunk in chunks)]
    rms = math.sqrt(sum(squares) / a.size) if a.size else 0.0
    worst, index = 0.0, -1
    for chunk in chunks:
        x, y = a[chunk].astype(np.float64), b[chunk].astype(np.float64)
        with np.errstate(invalid="ignore"):
            over = np.abs(y - x) - (atol + rtol * np.maximum(np.abs(x), rms))
        same = (x == y) | (np.isnan(x) & np.isnan(y))
        over = np.where(same, -np.inf, np.where(np.isfinite(over), over, np.inf))
        position = int(over.argmax())
        if over[position] > worst:
            worst, index = float(over[position]), chunk.start + position
    if index < 0:
        return None
    where = dims([int(i) for i in np.unravel_index(index, expected.shape)])
    bound = atol + rtol * max(abs(float(a[index])), rms)
    return (
        f"by {abs(float(b[index]) - float(a[index])):.3g} (at {where}: {float(b[index]):.6g} instead of "
        f"{float(a[index]):.6g}); at most {bound:.3g} was expected (rtol {rtol:g}, atol {atol:g})"
    )

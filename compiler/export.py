"""Everything PyTorch: loads the original, writes it as ONNX, proves the two equal, and runs the original.

Why `torch.onnx.export` on the module and not on an exported program of our own: its capture brings decompositions (RNNs,
sizes of 0 and 1) that `torch.export.export` lacks. What it may do in silence on the way is checked afterwards: it narrows
or fixes an axis rather than fail, and it merges equal example tensors into one input.

Why inputs are flat tensors in the recipe's order (`_Original`): names, kwargs, dicts, dataclasses and nested results then
need no support from the exporter, and are the same for the original and the exported model.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import dataclasses
import inspect
import io
import itertools
import logging
import math
import os
import pickle
import random
import re
import sys
import time
import traceback
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import onnx_ir as ir
import safetensors
import safetensors.torch
import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from compiler import onnx_files
from compiler.data import PROBE_SAMPLES, Samples, SampleWriter, first_samples
from compiler.errors import BuildError, ExportError, RecipeError, suggest
from compiler.recipe import Recipe, dims
from compiler.source import Sources, call_user, is_user_code, load_callable, shown, user_line
from compiler.spec import (
    Array,
    DataSets,
    DimRange,
    Feeds,
    OnnxModel,
    OpenModel,
    Outputs,
    Precision,
    Progress,
    Reference,
    Runner,
    TensorSpec,
    ValidationSet,
    batch_axis,
    dtype_of,
    no_progress,
)

HF_TASKS: Mapping[str, str] = {
    "feature-extraction": "AutoModel",
    "fill-mask": "AutoModelForMaskedLM",
    "image-classification": "AutoModelForImageClassification",
    "question-answering": "AutoModelForQuestionAnswering",
    "text-classification": "AutoModelForSequenceClassification",
    "text-generation": "AutoModelForCausalLM",
    "token-classification": "AutoModelForTokenClassification",
}
"""``model.task`` -> the class of transformers that loads it."""

MAX_POINT_ELEMENTS = 1 << 28
"""Elements of one tensor (1 GiB in FP32) above which an axis point is left out of the comparison."""

_PRIVATE = "__build_engine_"

_CHUNK = 1 << 22
"""Elements compared at a time."""

_Sizes = Mapping[str, int]


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
    model is exported without, and a note says so. An ONNX source is copied, with its axes named as in the recipe, and its optimised run is compared with its
    unoptimised one. ``probe.npz`` is one feed at the optimum of every axis; ``export.log`` holds what torch had to say.

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
    probe = _feeds_at(recipe, samples, optimum)
    original: Runner
    module: _Original | None = None
    if sources.kind == "onnx":
        _adopt(recipe, sources, path, notes, external_above)
        original = _at("", lambda: open_model(path, optimize=False))
    else:
        module = _load(recipe, sources, notes)
        original = _TorchRunner(module, recipe, threads=0)
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


def open_original(
    recipe: Recipe,
    sources: Sources,
    *,
    threads: int,
    open_model: OpenModel,
    sample: Feeds | None = None,
) -> Runner:
    """The original in FP32 as a `Runner`. An ONNX source runs in ONNX Runtime with its optimisations off.

    Args:
        recipe: names inputs and outputs.
        sources: see `compiler.source.locate`.
        threads: of the CPU, for the whole process; 0: all that it may use.
        open_model: opens an ONNX source.
        sample: shows the outputs' shapes; default: the first that the user's data yields, which may take its time.

    Raises:
        ExportError: the model cannot be built.
        CalibrationError: there is no sample to find the outputs' shapes with.
    """
    runner = _opened(recipe, sources, threads, open_model)
    if isinstance(runner, _TorchRunner):
        samples = first_samples(recipe, sources, 1) if sample is None else [sample]
        runner.outputs = _at("", lambda: _output_specs(runner, recipe, samples))
    return runner


def _opened(recipe: Recipe, sources: Sources, threads: int, open_model: OpenModel) -> Runner:
    """The original, of whose outputs nothing is known if it is PyTorch's."""
    if sources.kind == "onnx":
        assert sources.model_path is not None
        model_path = sources.model_path
        return _at("", lambda: open_model(model_path, threads=threads, optimize=False))  # type: ignore[no-any-return]
    return _TorchRunner(_load(recipe, sources, []), recipe, threads=threads)


def compiled(original: Runner, sources: Sources) -> Runner:
    """The same by `torch.compile`, which compiles at the first run of a shape; that run raises `ExportError` where it fails.

    Args:
        original: as `open_original` opened it; both share their weights.
        sources: see `compiler.source.locate`.

    Raises:
        ExportError: there is nothing to compile.
    """
    if isinstance(original, _TorchRunner):
        return original.compiled()
    raise ExportError(
        f"{shown(sources.model_path or Path())}: an ONNX file; a PyTorch model was expected for torch.compile. Set [latency] "
        "compile = false."
    )


def reference(
    recipe: Recipe,
    sources: Sources,
    data: DataSets,
    *,
    threads: int,
    open_model: OpenModel,
    out_dir: Path,
    progress: Progress = no_progress,
) -> Reference:
    """Run the original over the sets that judge and select, and store its outputs sample by sample.

    Samples of equal shapes that follow one another run together, up to the optimum of the batch axis, where every
    input and output has that axis.

    Raises:
        ExportError: the model cannot be built or fails on a sample.
    """
    given = {"validation": data.validation, "selection": data.selection}
    sets = {name: one for name, one in given.items() if one is not None}
    total = sum(one.samples for one in sets.values())
    found: dict[str, Outputs] = {}
    with contextlib.closing(_opened(recipe, sources, threads, open_model)) as runner:
        first = Samples(data.validation.path).feeds(0)
        specs = _at("", lambda: _output_specs(runner, recipe, [first]))
        for name, one in sets.items():
            before = sum(outputs.samples for outputs in found.values())

            def advance(done: int, before: int = before) -> None:
                progress(before + done, total)

            found[name] = _outputs(recipe, runner, specs, name, one, out_dir / name, advance)
    return Reference(**found)


def _outputs(
    recipe: Recipe,
    original: Runner,
    specs: Sequence[TensorSpec],
    name: str,
    data: ValidationSet,
    path: Path,
    progress: Callable[[int], None],
) -> Outputs:
    """The original's outputs, which ``specs`` describe, for one set."""
    samples = Samples(data.path)
    batch = batch_axis(recipe.inputs)
    together = batch is not None and all(batch in spec.shape for spec in (*recipe.inputs, *specs))
    axes = {spec.name: spec.shape.index(batch) if batch in spec.shape else 0 if spec.shape else None for spec in specs}
    notes = []
    if batch is not None and not together:
        alone = [spec.name for spec in (*recipe.inputs, *specs) if batch not in spec.shape]
        notes.append(f"original: run one sample at a time, as '{alone[0]}' has no axis '{batch}'")
    least, most = (recipe.axes[batch].min, recipe.axes[batch].opt) if together and batch else (1, 1)
    not_finite = 0
    with SampleWriter(path, batch_axes=axes) as writer:
        for group in _groups(samples, most):
            # the smallest batch that the model takes, filled up with the last sample
            padded = [*group, *[group[-1]] * (least - len(group))]
            feeds = samples.batch(padded) if together else samples.feeds(group[0])
            outputs = _at(f"{name} sample {group[0]}", lambda feeds=feeds: original.run(feeds))  # type: ignore[misc]
            for position in range(len(group)):
                one = {key: value.take([position], axes[key]) if together else value for key, value in outputs.items()}
                not_finite += not all(np.isfinite(value).all() for value in one.values() if value.dtype.kind == "f")
                writer.append(one)
            progress(group[-1] + 1)
        sha256 = writer.close()
    if not_finite:
        notes.append(f"original: NaN or Inf in the outputs of {not_finite} of {len(samples)} {name} samples")
    return Outputs(path=path, sha256=sha256, data_sha256=data.sha256, samples=len(samples), notes=tuple(notes))


def _groups(samples: Samples, most: int) -> Iterator[list[int]]:
    """Runs of up to ``most`` samples of equal shapes."""
    group: list[int] = []
    for index in range(len(samples)):
        if group and (len(group) == most or samples.shapes(index) != samples.shapes(group[0])):
            yield group
            group = []
        group.append(index)
    yield group


# --- the original ---------------------------------------------------------------------------------------------------


class _Original(torch.nn.Module):
    """The user's model with flat tensors, in the recipe's order, in and out."""

    def __init__(
        self,
        model: torch.nn.Module,
        where: str,
        bind: Callable[[Sequence[torch.Tensor]], tuple[Sequence[Any], Mapping[str, Any]]],
        outputs: Sequence[str],
    ) -> None:
        super().__init__()
        self.model = model
        self.where = where
        self._bind = bind
        self._outputs = tuple(outputs)
        self.training = False  # not by eval(): a program of torch.export refuses it

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(self.named(*tensors).values())

    def named(self, *tensors: torch.Tensor) -> dict[str, torch.Tensor]:
        """Outputs by name: the recipe's names, else the result's own keys and fields, else ``output_<position>``."""
        args, kwargs = self._bind(tensors)
        pairs = list(_flatten(self.model(*args, **kwargs), "", self.where))
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise ExportError(
                f"{self.where}: forward() returns two tensors named '{twice}'; different names were expected. Rename one."
            )
        if not found:
            raise ExportError(f"{self.where}: forward() returns no tensor; at least one was expected. Return one.")
        if not self._outputs:
            return found
        if found.keys() >= set(self._outputs):
            return {name: found[name] for name in self._outputs}
        if len(found) == len(self._outputs):
            return dict(zip(self._outputs, found.values(), strict=True))
        raise ExportError(
            f"{self.where}: forward() returns {len(found)} tensors ({', '.join(found)}); [model] outputs names "
            f"{len(self._outputs)} ({', '.join(self._outputs)}). Name all of them, or use their own names to choose."
        )


def _flatten(result: Any, name: str, where: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors of a result with their names; None is left out."""
    parts: Iterator[tuple[Any, Any]]
    if isinstance(result, torch.Tensor):
        yield name or "output_0", result
        return
    if result is None:
        return
    if isinstance(result, Mapping):
        parts = iter(result.items())
    elif dataclasses.is_dataclass(result):
        parts = ((field.name, getattr(result, field.name)) for field in dataclasses.fields(result))
    elif isinstance(result, tuple) and hasattr(result, "_fields"):
        parts = zip(result._fields, result, strict=True)
    elif isinstance(result, (tuple, list)):
        parts = ((index if name else f"output_{index}", part) for index, part in enumerate(result))
    else:
        raise ExportError(
            f"{where}: forward() returns a {type(result).__name__}{f' as {name!r}' if name else ''}; tensors, or tuples, "
            "dicts or dataclasses of them, were expected. Return tensors only."
        )
    for key, part in parts:
        yield from _flatten(part, f"{name}_{key}" if name else str(key), where)


def _load(recipe: Recipe, sources: Sources, notes: list[str]) -> _Original:
    """Build the original: in evaluation mode, in FP32 where it was in half precision, with finite weights.

    Python's, numpy's and torch's generators are seeded first: a model with random weights is the same in every process.
    """
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    bind: Callable[[Sequence[torch.Tensor]], tuple[Sequence[Any], Mapping[str, Any]]]
    where = shown(sources.model_path) if sources.model_path else f"hf:{sources.target}"
    if sources.kind == "pt2":
        model, bind = _load_program(recipe, sources)
    else:
        if sources.kind == "hf":
            model = _load_hf(recipe, sources, notes)
        else:
            name = "build" if sources.kind == "file" else (sources.target or "").partition(":")[2]
            model = call_user(load_callable(sources), f"{name}()", ExportError)
            if not isinstance(model, torch.nn.Module):
                raise ExportError(
                    f"{where}: {name}() returned a {type(model).__name__}; a torch.nn.Module was expected. Return the "
                    "model."
                )
        if sources.weights is not None:
            _load_weights(model, sources.weights)
        model.eval()
        bind = _bind_parameters(model, recipe, where)
    model.requires_grad_(False)
    if any(parameter.dtype in (torch.float16, torch.bfloat16) for parameter in model.parameters()):
        notes.append("the original has weights in half precision: it is exported and run in FP32")
        model.float()
    _check_weights(model, shown(sources.weights) if sources.weights else where)
    return _Original(model, where, bind, recipe.model.outputs)


def _bind_parameters(
    model: torch.nn.Module, recipe: Recipe, where: str
) -> Callable[[Sequence[torch.Tensor]], tuple[Sequence[Any], Mapping[str, Any]]]:
    """How to pass inputs: each to the parameter of `forward` that has its name."""
    names = tuple(recipe.model.inputs)
    parameters = inspect.signature(model.forward).parameters
    kinds = {parameter.kind for parameter in parameters.values()}
    accepted = [
        parameter.name
        for parameter in parameters.values()
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    unknown = [name for name in names if name not in accepted]
    if unknown and inspect.Parameter.VAR_KEYWORD not in kinds:
        raise ExportError(
            f"{where}: forward() of {type(model).__name__} has no parameter '{unknown[0]}'; "
            f"{suggest(unknown[0], accepted)} Rename [model.inputs.{unknown[0]}]."
        )
    missing = [name for name in accepted if parameters[name].default is inspect.Parameter.empty and name not in names]
    if missing:
        raise ExportError(
            f"{where}: forward() of {type(model).__name__} needs '{missing[0]}', and the recipe has only "
            f"{', '.join(names)}. Add [model.inputs.{missing[0]}], or give it a default."
        )
    return lambda tensors: ((), dict(zip(names, tensors, strict=True)))


def _load_weights(model: torch.nn.Module, path: Path) -> None:
    """Load a state dict that has every parameter and buffer of the model, in its shape, and nothing else."""
    try:
        if path.suffix == ".safetensors":
            state: Any = safetensors.torch.load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (safetensors.SafetensorError, pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError) as exc:
        raise ExportError(
            f"{shown(path)}: {_load_failure(exc)}; a state dict of plain tensors was "
            "expected. Save it with safetensors.torch.save_model, or torch.save(model.state_dict(), path)."
        ) from exc
    if not isinstance(state, Mapping) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ExportError(
            f"{shown(path)}: holds a {type(state).__name__} that is not a state dict; names with a tensor each were "
            "expected. Save model.state_dict() alone."
        )
    own = model.state_dict()
    loaded = {own[name].data_ptr() for name in state if name in own}
    missing = [name for name, value in own.items() if name not in state and value.data_ptr() not in loaded]
    unexpected = [name for name in state if name not in own]
    if unexpected:
        raise ExportError(
            f"{shown(path)}: {_count(unexpected)} not in {type(model).__name__}; "
            f"{suggest(unexpected[0], missing) if missing else 'the names of its state_dict() were expected.'} Save the "
            "weights of this very model."
        )
    if missing:
        raise ExportError(
            f"{shown(path)}: {_count(missing)} missing; every parameter and buffer of {type(model).__name__} was "
            "expected. Save the weights of this very model."
        )
    for name, value in state.items():
        if value.shape != own[name].shape:
            raise ExportError(
                f"{shown(path)}: '{name}' has shape {dims(value.shape)}; {dims(own[name].shape)} was expected. Save the "
                "weights of this very model."
            )
    model.load_state_dict(state, strict=False)


def _load_failure(exc: Exception) -> str:
    """Why torch did not read a file; its own advice on pickled objects, to load them all the same, is not passed on."""
    if not isinstance(exc, pickle.UnpicklingError):
        return _first_line(exc)
    blocked = re.search(r"(?i)unsupported global:? (?:global )?([\w.]+)", str(exc))
    return f"holds a pickled {blocked[1]}" if blocked else "holds pickled objects"


def _count(names: Sequence[str]) -> str:
    return f"'{names[0]}' is" if len(names) == 1 else f"'{names[0]}' and {len(names) - 1} more are"


def _check_weights(model: torch.nn.Module, where: str) -> None:
    """Parameters are finite; buffers may hold Inf (a mask) but not NaN."""
    tensors = itertools.chain(
        (("parameter", name, value, torch.isfinite) for name, value in model.named_parameters()),
        (("buffer", name, value, lambda value: ~torch.isnan(value)) for name, value in model.named_buffers()),
    )
    for kind, name, value, is_good in tensors:
        if value.is_floating_point() and (bad := int((~is_good(value)).sum())):
            raise ExportError(
                f"{where}: {kind} '{name}': {bad} of {value.numel()} values are NaN or Inf; finite weights were "
                "expected. Train or convert the model again."
            )


def _load_hf(recipe: Recipe, sources: Sources, notes: list[str]) -> torch.nn.Module:
    """A model of the transformers library, without remote code, and without weights made up for it."""
    try:
        import transformers
    except ImportError as exc:
        raise RecipeError(
            f"[model] source: '{recipe.model.source}' needs the package transformers, which is not installed. Install it "
            "with: pip install 'build-engine[hf]'"
        ) from exc
    task = recipe.model.task
    if task not in HF_TASKS:
        raise RecipeError(f"[model] task: found '{task}'; {suggest(task, HF_TASKS)}")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    local = sources.model_path is not None
    options: dict[str, Any] = {"trust_remote_code": False, "local_files_only": local, "output_loading_info": True}
    if not local and sources.revision is not None:
        options["revision"] = sources.revision
    load = getattr(transformers, HF_TASKS[task]).from_pretrained
    where = str(sources.model_path or sources.target)
    try:
        model, info = load(where, **options)
        missing = sorted(info["missing_keys"])
        if missing and all("pooler." in name for name in missing):
            model, info = load(where, add_pooling_layer=False, **options)
            missing = sorted(info["missing_keys"])
            notes.append("the weights have no pooler: it is left out of the model")
    except (OSError, ValueError, RuntimeError, KeyError, ImportError, safetensors.SafetensorError) as exc:
        raise ExportError(
            f"hf:{shown(sources.model_path) if sources.model_path else where}: cannot be loaded as {HF_TASKS[task]}: "
            f"{_first_line(exc)}. Check the folder or id, [model] task, and that remote code is not needed."
        ) from exc
    if missing:
        raise ExportError(
            f"hf:{shown(sources.model_path) if sources.model_path else where}: the weights lack {len(missing)} parameters "
            f"of {type(model).__name__}, '{missing[0]}' for one; a model trained for '{task}' was expected. Correct "
            "[model] task."
        )
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False
    assert isinstance(model, torch.nn.Module)
    return model


def _load_program(
    recipe: Recipe, sources: Sources
) -> tuple[torch.nn.Module, Callable[[Sequence[torch.Tensor]], tuple[Sequence[Any], Mapping[str, Any]]]]:
    """A saved `torch.export` program. Whatever is pickled inside it is read as plain tensors or refused."""
    assert sources.model_path is not None
    where = shown(sources.model_path)
    before = os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD")
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    try:
        with _quiet(io.StringIO()):
            program = torch.export.load(sources.model_path)
            module = program.module()
    except Exception as exc:
        raise ExportError(
            f"{where}: {_load_failure(exc)}; a program saved by torch.export.save was expected, without pickled objects. "
            "Save it again with this version of torch."
        ) from exc
    finally:
        if before is None:
            del os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"]
        else:
            os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = before
    names = list(recipe.model.inputs)
    own = [str(name) for name in program.graph_signature.user_inputs]
    if sorted(names) != sorted(own):
        odd = next((name for name in names if name not in own), None)
        raise ExportError(
            f"{where}: inputs {', '.join(own)}; found {', '.join(names)} in the recipe. "
            + (f"'{odd}': {suggest(odd, own)}" if odd else "Add what is missing to [model.inputs].")
        )
    order = [names.index(name) for name in own]
    structure = program.call_spec.in_spec

    def bind(tensors: Sequence[torch.Tensor]) -> tuple[Sequence[Any], Mapping[str, Any]]:
        args, kwargs = pytree.tree_unflatten([tensors[index] for index in order], structure)
        return args, kwargs

    return module, bind


# --- running the original -------------------------------------------------------------------------------------------


class _TorchRunner:
    """Runs the original; arrays in, arrays out."""

    def __init__(self, original: _Original, recipe: Recipe, *, threads: int) -> None:
        usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        torch.set_num_threads(threads or usable or 1)
        self.original = original
        self.inputs = recipe.inputs
        self.outputs: tuple[TensorSpec, ...] = ()
        self._compiled: Callable[..., tuple[torch.Tensor, ...]] | None = None
        self._names: tuple[str, ...] = ()

    def compiled(self) -> _TorchRunner:
        """Run by `torch.compile`; each shape is compiled for itself when it is first seen."""
        other = copy.copy(self)
        other._names = tuple(spec.name for spec in self.outputs)
        other._compiled = torch.compile(self.original, dynamic=False)
        return other

    def run(self, feeds: Feeds) -> dict[str, Array]:
        """
        Raises:
            BuildError: the feeds do not fit, or `forward` raises.
            ExportError: `torch.compile` fails.
        """
        self._check(feeds)
        if self._compiled is not None:
            try:
                return self._call(feeds)
            except Exception as exc:
                raise ExportError(
                    f"{self.original.where}: torch.compile fails: {type(exc).__name__}: {_first_line(exc)}. Set [latency] "
                    "compile = false, or install what it asks for."
                ) from exc
        return call_user(self._call, "forward()", BuildError, feeds)

    def time(self, feeds: Feeds, repeats: int) -> list[float]:
        """Seconds of each call, from host arrays to host arrays."""
        self._check(feeds)
        taken = []
        for _ in range(repeats):
            start = time.perf_counter()
            self._call(feeds)
            taken.append(time.perf_counter() - start)
        return taken

    def close(self) -> None:
        self._compiled = None

    def _call(self, feeds: Feeds) -> dict[str, Array]:
        with torch.inference_mode():
            tensors = [_tensor(feeds[spec.name]) for spec in self.inputs]
            if self._compiled is not None:
                outputs = dict(zip(self._names, self._compiled(*tensors), strict=True))
            else:
                outputs = self.original.named(*tensors)
            return {name: _array(value) for name, value in outputs.items()}

    def _check(self, feeds: Feeds) -> None:
        for spec in self.inputs:
            if spec.name not in feeds:
                raise BuildError(f"original: no input '{spec.name}'; found {', '.join(feeds) or 'none'}. Feed it.")
            value = feeds[spec.name]
            if value.dtype != dtype_of(spec) or value.ndim != len(spec.shape):
                raise BuildError(
                    f"original, input '{spec.name}': found {value.dtype.name} {dims(value.shape)}; {spec.dtype} "
                    f"{dims(spec.shape)} was expected. Convert it."
                )
        if unknown := [name for name in feeds if name not in [spec.name for spec in self.inputs]]:
            raise BuildError(
                f"original: unknown input '{unknown[0]}'; {suggest(unknown[0], [spec.name for spec in self.inputs])}"
            )


def _tensor(value: Array) -> torch.Tensor:
    """Shares the array's memory where torch can: C order, and writable."""
    value = np.ascontiguousarray(value) if value.ndim else value
    return torch.from_numpy(value if value.flags.writeable else value.copy())


def _array(value: torch.Tensor) -> Array:
    value = value.detach()
    found: Array = (value.float() if value.dtype == torch.bfloat16 else value).numpy()
    return found


def _output_specs(runner: Runner, recipe: Recipe, samples: Sequence[Feeds]) -> tuple[TensorSpec, ...]:
    """Names, dtypes and shapes of the outputs, found by running at the optima and with each axis alone at another size.

    A dim that follows one axis has its name; one that depends on the sizes in another way is ``"?"``.
    """
    optimum = {name: axis.opt for name, axis in recipe.axes.items()}
    outputs = runner.run(_feeds_at(recipe, samples, optimum))
    shapes: dict[str, list[int | str]] = {name: list(value.shape) for name, value in outputs.items()}
    for axis, sizes in recipe.axes.items():
        other = sizes.min if sizes.min < sizes.opt else sizes.max
        if other == sizes.opt:
            continue
        for name, value in runner.run(_feeds_at(recipe, samples, optimum | {axis: other})).items():
            for place, (before, after) in enumerate(zip(outputs[name].shape, value.shape, strict=True)):
                if before != after:
                    follows = (before, after) == (sizes.opt, other) and shapes[name][place] == before
                    shapes[name][place] = axis if follows else "?"
    return tuple(
        TensorSpec(name=name, dtype=value.dtype.name, shape=tuple(shapes[name])) for name, value in outputs.items()
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
    if isinstance(original, _TorchRunner):
        with _LargestTensor() as seen:
            original.run(feeds)
        return int(seen.elements)
    return max(value.size for value in (*feeds.values(), *original.run(feeds).values()))


# --- feeds and sizes ------------------------------------------------------------------------------------------------


def _feeds_at(recipe: Recipe, samples: Sequence[Feeds], sizes: _Sizes) -> dict[str, Array]:
    """Real samples, repeated or cut along every axis to the sizes wanted; C order."""
    batch = batch_axis(recipe.inputs)
    feeds = {}
    for spec in recipe.inputs:
        wanted = [sizes[dim] if isinstance(dim, str) else dim for dim in spec.shape]
        position = spec.shape.index(batch) if batch in spec.shape else None
        used = samples[: sizes[batch]] if batch is not None and position is not None else samples[:1]
        values = []
        for sample in used:
            value = sample[spec.name]
            for axis, size in enumerate(wanted):
                if axis != position and value.shape[axis] != size:
                    value = value.take(np.arange(size) % value.shape[axis], axis)
            values.append(value)
        if position is not None:
            stacked = np.concatenate(values, position)
            values = [stacked.take(np.arange(wanted[position]) % stacked.shape[position], position)]
        feeds[spec.name] = np.ascontiguousarray(values[0]).reshape(wanted)
    return feeds


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


def _point(sizes: _Sizes) -> str:
    return ", ".join(f"{name}={size}" for name, size in sizes.items()) or "the fixed shapes"


def _growth(recipe: Recipe, sizes: _Sizes) -> float:
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
    original: _Original,
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
    names = tuple(original.named(*[_tensor(value) for value in examples.values()]))
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


def _examples(original: _Original, recipe: Recipe, samples: Sequence[Feeds]) -> dict[str, Array]:
    """Feeds to trace with: at `_example_sizes`, or where the model takes none of these, at the optima."""
    sizes = _example_sizes(recipe)
    feeds = _feeds_at(recipe, samples, sizes)
    try:
        with torch.inference_mode():
            original(*[_tensor(value) for value in feeds.values()])
    except Exception:
        return _feeds_at(recipe, samples, {name: axis.opt for name, axis in recipe.axes.items()})
    return feeds


def _trace(
    original: _Original,
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
                with _quiet(file):
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
                        tuple(_tensor(examples[spec.name]).clone() for spec in recipe.inputs),
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


def _check_interface(program: Any, original: _Original, recipe: Recipe) -> None:
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


def _explain(exc: Exception, original: _Original, opset: int) -> str:
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
        f"{place}: torch cannot export forward(): {type(root).__name__}: {_first_line(root)}. Rewrite that part of the "
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

    Parameters lose the prefix of `_Original`; a node is named after its module and operator (``layer1.0.conv1/Conv``),
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


@contextlib.contextmanager
def _quiet(file: TextIO) -> Iterator[None]:
    """Whatever Python code prints, logs or warns goes to ``file``."""
    known = logging.Logger.manager.loggerDict.values()
    console = (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__)
    handlers = {
        handler: handler.stream
        for logger in (logging.getLogger(), *(entry for entry in known if isinstance(entry, logging.Logger)))
        for handler in logger.handlers
        if isinstance(handler, logging.StreamHandler) and handler.stream in console
    }
    with (
        contextlib.redirect_stdout(file),
        contextlib.redirect_stderr(file),
        warnings.catch_warnings(record=True) as warned,
    ):
        warnings.simplefilter("default")
        for handler in handlers:
            handler.setStream(file)
        try:
            yield
        finally:
            for handler, stream in handlers.items():
                handler.setStream(stream)
            for one in warned:
                file.write(warnings.formatwarning(one.message, one.category, one.filename, one.lineno))


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


def _at(point: str, run: Callable[[], Any]) -> Any:
    """Run a runner in the export stage, where its failure is an export's."""
    try:
        return run()
    except BuildError as exc:
        raise ExportError(f"{point}: {exc.message}" if point else exc.message) from exc


def _check_repeatable(original: Runner, probe: Feeds, recipe: Recipe, point: str, notes: list[str]) -> None:
    """The original, run twice on the same feed, gives the same outputs."""
    first = _at(point, lambda: original.run(probe))
    second = _at(point, lambda: original.run(probe))
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
    points: Sequence[_Sizes],
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
            feeds = _feeds_at(recipe, samples, sizes)
            expected = _at(point, lambda feeds=feeds: original.run(feeds))  # type: ignore[misc]  # called at once
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


def _first_line(exc: BaseException) -> str:
    lines = str(exc).strip().splitlines() or [type(exc).__name__]
    return lines[0][:300].rstrip(". ")

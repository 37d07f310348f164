"""The original model: loads what the recipe names, runs it, and stores what it puts out for the samples that judge and select.

Inputs are flat tensors in the recipe's order (`Original`): names, kwargs, dicts, dataclasses and nested results then need no
support from the exporter, and are the same for the original and the exported model.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
import io
import itertools
import logging
import os
import pickle
import random
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ParamSpec, TextIO, TypeVar

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch.utils import _pytree as pytree

from compiler.data import Samples, SampleWriter, first_samples
from compiler.errors import BuildError, ExportError, RecipeError, suggest
from compiler.recipe import Recipe, dims
from compiler.source import Sources, call_user, load_callable, shown
from compiler.spec import (
    Array,
    DataSets,
    Feeds,
    OpenModel,
    Outputs,
    Progress,
    Reference,
    Runner,
    TensorSpec,
    ValidationSet,
    batch_axis,
    dtype_of,
    no_progress,
)

P = ParamSpec("P")
T = TypeVar("T")

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

Sizes = Mapping[str, int]
"""By axis."""


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
    if isinstance(runner, TorchRunner):
        samples = first_samples(recipe, sources, 1) if sample is None else [sample]
        runner.outputs = at("", _output_specs, runner, recipe, samples)
    return runner


def _opened(recipe: Recipe, sources: Sources, threads: int, open_model: OpenModel) -> Runner:
    """The original, of whose outputs nothing is known if it is PyTorch's."""
    if sources.kind == "onnx":
        assert sources.model_path is not None
        return at("", open_model, sources.model_path, threads=threads, optimize=False)
    return TorchRunner(load_original(recipe, sources, []), recipe, threads=threads)


def compiled(original: Runner, sources: Sources) -> Runner:
    """The same by `torch.compile`, which compiles at the first run of a shape; that run raises `ExportError` where it fails.

    Args:
        original: as `open_original` opened it; both share their weights.
        sources: see `compiler.source.locate`.

    Raises:
        ExportError: there is nothing to compile.
    """
    if isinstance(original, TorchRunner):
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
        specs = at("", _output_specs, runner, recipe, [first])
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
            outputs = at(f"{name} sample {group[0]}", original.run, feeds)
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


class Original(torch.nn.Module):
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


def load_original(recipe: Recipe, sources: Sources, notes: list[str]) -> Original:
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
    return Original(model, where, bind, recipe.model.outputs)


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
        return first_line(exc)
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
            f"{first_line(exc)}. Check the folder or id, [model] task, and that remote code is not needed."
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
        with quiet(io.StringIO()):
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


class TorchRunner:
    """Runs the original; arrays in, arrays out."""

    def __init__(self, original: Original, recipe: Recipe, *, threads: int) -> None:
        usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        torch.set_num_threads(threads or usable or 1)
        self.original = original
        self.inputs = recipe.inputs
        self.outputs: tuple[TensorSpec, ...] = ()
        self._compiled: Callable[..., tuple[torch.Tensor, ...]] | None = None
        self._names: tuple[str, ...] = ()

    def compiled(self) -> TorchRunner:
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
                    f"{self.original.where}: torch.compile fails: {type(exc).__name__}: {first_line(exc)}. Set [latency] "
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
            tensors = [to_tensor(feeds[spec.name]) for spec in self.inputs]
            if self._compiled is not None:
                outputs = dict(zip(self._names, self._compiled(*tensors), strict=True))
            else:
                outputs = self.original.named(*tensors)
            return {name: to_array(value) for name, value in outputs.items()}

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


def to_tensor(value: Array) -> torch.Tensor:
    """Shares the array's memory where torch can: C order, and writable."""
    value = np.ascontiguousarray(value) if value.ndim else value
    return torch.from_numpy(value if value.flags.writeable else value.copy())


def to_array(value: torch.Tensor) -> Array:
    value = value.detach()
    found: Array = (value.float() if value.dtype == torch.bfloat16 else value).numpy()
    return found


def _output_specs(runner: Runner, recipe: Recipe, samples: Sequence[Feeds]) -> tuple[TensorSpec, ...]:
    """Names, dtypes and shapes of the outputs, found by running at the optima and with each axis alone at another size.

    A dim that follows one axis has its name; one that depends on the sizes in another way is ``"?"``.
    """
    optimum = {name: axis.opt for name, axis in recipe.axes.items()}
    outputs = runner.run(feeds_at(recipe, samples, optimum))
    shapes: dict[str, list[int | str]] = {name: list(value.shape) for name, value in outputs.items()}
    for axis, sizes in recipe.axes.items():
        other = sizes.min if sizes.min < sizes.opt else sizes.max
        if other == sizes.opt:
            continue
        for name, value in runner.run(feeds_at(recipe, samples, optimum | {axis: other})).items():
            for place, (before, after) in enumerate(zip(outputs[name].shape, value.shape, strict=True)):
                if before != after:
                    follows = (before, after) == (sizes.opt, other) and shapes[name][place] == before
                    shapes[name][place] = axis if follows else "?"
    return tuple(
        TensorSpec(name=name, dtype=value.dtype.name, shape=tuple(shapes[name])) for name, value in outputs.items()
    )


# --- feeds ----------------------------------------------------------------------------------------------------------


def feeds_at(recipe: Recipe, samples: Sequence[Feeds], sizes: Sizes) -> dict[str, Array]:
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


def at(point: str, run: Callable[P, T], *args: P.args, **options: P.kwargs) -> T:
    """What ``run`` returns, in the export stage, where a runner's failure is an export's."""
    try:
        return run(*args, **options)
    except BuildError as exc:
        raise ExportError(f"{point}: {exc.message}" if point else exc.message) from exc


def first_line(exc: BaseException) -> str:
    lines = str(exc).strip().splitlines() or [type(exc).__name__]
    return lines[0][:300].rstrip(". ")


@contextlib.contextmanager
def quiet(file: TextIO) -> Iterator[None]:
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

"""One recipe, at every batch size it names."""

from __future__ import annotations

import functools
import importlib.util
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from compiler.errors import BuildEngineError
from scripts.gpu import machine, work
from scripts.gpu.batches import measure_batch
from scripts.gpu.candidates import engine_candidates, torch_candidates
from scripts.gpu.children import Deadline
from scripts.gpu.missing import Emit, Json, MissingError, guarded, module, reason

NEEDED = ("numpy", "msgspec", "tomli", "torch", "onnx", "onnx_ir", "safetensors")
"""Without any of these no recipe can be measured; its model file may need more."""
SAMPLES = 16
"""Samples that a batch is made from; repeated to fill a larger one."""
COMPILE_SHARE = 0.5
"""Of a batch size's time, what making candidates may take; `torch.compile` is left out beyond it."""


def part(job: Json, emit: Emit) -> None:
    path = Path(job["recipe"])
    entry: Json = {"recipe": path.name, "name": path.stem, "batches": []}
    try:
        _measure(path, job, entry, Deadline(job["limit_s"]), lambda: emit(entry))
    except Exception as exc:
        entry |= {part: {"missing": reason(exc)} for part in ("latency", "energy", "roofline")}
    emit(entry)


def _measure(path: Path, job: Json, entry: Json, deadline: Deadline, emit: Callable[[], None]) -> None:
    if lacking := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise MissingError(f"not installed, and needed for a recipe: {', '.join(lacking)}")
    from compiler import recipe as recipes
    from compiler import source

    recipe = recipes.load(path)
    entry["name"] = recipe.name
    torch = machine.cuda_torch()
    gauge = machine.gauge_of(torch)
    manifests = manifests_of(recipe.name, job["artifacts"], entry)
    sources = source.locate(recipe, path.parent)
    model, names = original_of(recipe, sources)
    samples = module("compiler.data").first_samples(recipe, sources, SAMPLES)
    dynamo = module("torch._dynamo")
    if hasattr(dynamo.config, "fail_on_recompile_limit_hit"):  # else what is called compiled may run eagerly
        dynamo.config.fail_on_recompile_limit_hit = True
    torch.backends.cudnn.benchmark = True
    models = {"fp32": model.to(machine.DEVICE)}
    for position, batch in enumerate(recipe.batches):
        dynamo.reset()
        found: Json = {"batch": batch, "work": {"missing": "not counted"}, "candidates": []}
        entry["batches"].append(found)
        share = deadline.part(1 / (len(recipe.batches) - position))
        try:
            feeds = feeds_at(recipe, samples, batch)
            counted = guarded(functools.partial(work.of_torch, torch, models["fp32"], feeds))
            if by_onnx := work.of_onnx(recipe, manifests, batch):
                counted.pop("missing", None)
                counted |= {"torch_flops": counted.get("flops")} | by_onnx
            found["work"] = counted
            making = share.part(COMPILE_SHARE)
            eager, compiled = (
                torch_candidates(how, torch, models, feeds, names, counted, making) for how in ("eager", "compile")
            )
            # What is quick to make comes first.
            candidates = itertools.chain(eager, engine_candidates(manifests, counted), compiled)
            measure_batch(found, candidates, feeds, gauge=gauge, energy=job["energy"], deadline=share, emit=emit)
        except Exception as exc:
            found["missing"] = reason(exc)
        emit()


def manifests_of(recipe_name: str, artifacts: Sequence[str], entry: Json) -> list[Any]:
    """The manifests of those artifacts that are this recipe's and undamaged; why there is none goes into ``entry``."""
    from compiler import artifact

    found = []
    entry["engines"] = {"missing": "no artifact of this recipe was given (--artifact)"}
    for folder in artifacts:
        try:
            manifest = artifact.verify(Path(folder))
        except BuildEngineError as exc:
            entry["engines"] = {"missing": reason(exc)}
            continue
        if manifest.name == recipe_name:
            found.append(manifest)
    if found:
        entry["engines"] = {engine.name: engine.sha256 for manifest in found for engine in manifest.engines}
    return found


def original_of(recipe: Any, sources: Any) -> tuple[Any, tuple[str, ...]]:
    """The original as a module that takes and gives flat tensors, on the CPU, and the names of its outputs.

    Raises:
        MissingError: an ONNX file has no PyTorch original.
        ExportError: it cannot be built.
    """
    original, runtime = module("compiler.original"), module("compiler.backends.onnxruntime")
    runner = original.open_original(recipe, sources, threads=0, open_model=runtime.open_model)
    model = getattr(runner, "original", None)
    if model is None:
        raise MissingError("an ONNX source has no PyTorch original to time")
    return model, tuple(spec.name for spec in runner.outputs)


def feeds_at(recipe: Any, samples: Sequence[Mapping[str, Any]], batch: int) -> dict[str, Any]:
    """Real samples, repeated to fill a batch; arrays are writable and in C order."""
    np = module("numpy")
    from compiler.spec import batch_axis

    axis = batch_axis(recipe.inputs)
    feeds = {}
    for spec in recipe.inputs:
        value = samples[0][spec.name]
        if axis is not None and axis in spec.shape:
            chosen = [samples[index % len(samples)][spec.name] for index in range(batch)]
            value = np.concatenate(chosen, axis=spec.shape.index(axis))
        feeds[spec.name] = np.array(value, order="C")
    return feeds

"""``build-engine init model.py``: run a model file once, and write the recipe that fits it.

`inspect` is a stage (it runs user code, so in a child); `render` turns what it saw into TOML.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from compiler import source
from compiler.errors import CalibrationError, RecipeError
from compiler.recipe import DTYPES
from compiler.spec import Array, Dim, DimRange, Interface, TensorSpec

_LOOK_AT = 16
"""Samples to look at: axes that differ among them are dynamic."""
_MAX_BATCH = 64


def inspect(path: Path) -> Interface:
    """The inputs of a model file as its own samples show them: names, dtypes, shapes, and which axes vary.

    Raises:
        RecipeError: no ``build()``, or neither ``calibration()`` nor ``validation()``.
        CalibrationError: the samples are not feeds.
    """
    module = source.load_module(path)
    expected = "build(), calibration() and validation()"
    source.function_in(module, "build", RecipeError, expected)
    validation = source.function_in(module, "validation", RecipeError, expected)
    calibrated = callable(getattr(module, "calibration", None))
    function = module.calibration if calibrated else validation
    what = f"{function.__name__}()"
    items = source.iterate_user(source.call_user(function, what, CalibrationError), what, CalibrationError)
    seen: dict[str, list[Array]] = {}
    for item in itertools.islice(items, _LOOK_AT):
        feeds = item[0] if isinstance(item, tuple) else item
        if not isinstance(feeds, Mapping) or not feeds:
            raise CalibrationError(
                f"{path}: {what} yields {type(feeds).__name__}; a dict of arrays by input name was expected. Yield one."
            )
        for name, array in feeds.items():
            value = np.asarray(array.detach().cpu().numpy() if hasattr(array, "detach") else array)
            if value.ndim == 0 or value.dtype.name not in DTYPES:
                raise CalibrationError(
                    f"{path}: {what} yields input '{name}' as {value.dtype.name} of rank {value.ndim}; an array with a "
                    f"batch axis, of {', '.join(DTYPES)}, was expected."
                )
            seen.setdefault(name, []).append(value)
    if not seen:
        raise CalibrationError(f"{path}: {what} yields nothing; at least one sample was expected.")
    axes: dict[str, DimRange] = {"batch": DimRange(min=1, opt=8, max=_MAX_BATCH)}
    inputs = tuple(_describe(name, arrays, axes) for name, arrays in seen.items())
    metrics = [name for kind in ("metrics", "losses") for name in getattr(module, kind, {})]
    return Interface(inputs=inputs, axes=axes, metrics=tuple(metrics), calibrated=calibrated)


def _describe(name: str, arrays: list[Array], axes: dict[str, DimRange]) -> TensorSpec:
    """One input: the first axis is the batch; a later axis that varies gets a name and the range that was seen."""
    shape: list[Dim] = []
    for position, size in enumerate(arrays[0].shape):
        sizes = {array.shape[position] if array.ndim == arrays[0].ndim else -1 for array in arrays}
        if -1 in sizes:
            raise CalibrationError(
                f"input '{name}': samples of different rank; every sample of an input has the same rank."
            )
        if position == 0:
            shape.append("batch")
        elif len(sizes) == 1:
            shape.append(int(size))
        else:
            # Inputs that vary together (token ids and their mask) share one axis.
            spread = DimRange(min=min(sizes), opt=int(np.median(sorted(sizes))), max=max(sizes))
            alike = (known for known, other in axes.items() if other == spread and known != "batch")
            axis = next(alike, f"axis{position}_{name}")
            axes[axis] = spread
            shape.append(axis)
    return TensorSpec(name=name, dtype=arrays[0].dtype.name, shape=tuple(shape))


def render(model: Path, folder: Path, interface: Interface) -> str:
    """The recipe as TOML text; ``folder`` is where it will stand."""
    relative = Path(os.path.relpath(model, folder))
    lines = [f'name = "{_name(model.stem)}"', "", "[model]", f"source = {json.dumps(relative.as_posix())}"]
    lines.append('# weights = "weights.safetensors"')
    for spec in interface.inputs:
        dims = ", ".join(str(dim) if isinstance(dim, int) else f'"{dim}"' for dim in spec.shape)
        lines += ["", f"[model.inputs.{spec.name}]", f'dtype = "{spec.dtype}"', f"shape = [{dims}]"]
    lines += ["", "[axes]"]
    for name, axis in interface.axes.items():
        lines.append(f"{name} = {{ min = {axis.min}, opt = {axis.opt}, max = {axis.max} }}")
    lines += ["", "[[engines]]", 'precision = "fp32"']
    if interface.calibrated:
        lines += ["", "[[engines]]", 'precision = "int8"']
    lines += ["", "[[gates]]"]
    if interface.metrics:
        lines += [f'metric = "{interface.metrics[0]}"', "max_drop = 0.01"]
    else:
        lines += ['metric = "cosine"', "min = 0.99"]
    return "\n".join(lines) + "\n"


def _name(stem: str) -> str:
    """A name that a recipe may have."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", stem).strip(".-_")[:100] or "model"

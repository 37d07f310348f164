"""What a runner is fed, checked the same way by every back end: a runtime's own messages do not say what was expected."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from compiler.errors import BuildError
from compiler.spec import Feeds, TensorSpec, dtype_of


class FeedCheck:
    """Holds feeds against ``inputs``. ``where`` begins every message."""

    def __init__(self, where: str, inputs: Sequence[TensorSpec]) -> None:
        self._where = where
        self._inputs = tuple(inputs)
        self._names = {spec.name for spec in inputs}
        self._dtypes = {spec.name: dtype_of(spec) for spec in inputs}

    def __call__(self, feeds: Feeds, known: Mapping[str, int] | None = None) -> dict[str, int]:
        """The size of every named axis; ``known`` are those that something else has set before.

        Raises:
            BuildError: a name, a dtype, a rank or a size is not the one declared.
        """
        if feeds.keys() != self._names:
            raise BuildError(
                f"{self._where}: feeds named {listed(feeds)}; {listed(spec.name for spec in self._inputs)} were "
                "expected. Feed every input by its exact name."
            )
        sizes = dict(known or {})
        for spec in self._inputs:
            value, before = feeds[spec.name], dict(sizes)
            fits = isinstance(value, np.ndarray) and value.dtype == self._dtypes[spec.name]
            if not fits or value.ndim != len(spec.shape) or not shape_fits(spec, value.shape, sizes):
                shape = "[" + ", ".join(str(dim) for dim in spec.shape) + "]"
                already = "".join(f", {name} = {size}" for name, size in before.items() if name in spec.shape)
                raise BuildError(
                    f"{self._where}: input '{spec.name}': found {_described(value)}; {spec.dtype} {shape}{already} "
                    "was expected. Convert it."
                )
        return sizes


def shape_fits(spec: TensorSpec, shape: Sequence[int], sizes: dict[str, int]) -> bool:
    """Whether sizes are those declared, and equal wherever one axis name occurs; new names are added to ``sizes``."""
    for dim, size in zip(spec.shape, shape, strict=True):
        if isinstance(dim, int) or dim in sizes:
            if size != (dim if isinstance(dim, int) else sizes[dim]):
                return False
        elif dim != "?":
            sizes[dim] = size
    return True


def listed(names: Iterable[str]) -> str:
    return ", ".join(f"'{name}'" for name in names) or "nothing"


def _described(value: object) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, np.ndarray) else type(value).__name__

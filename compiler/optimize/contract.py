"""What a graph pass is, and what it promises."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import onnx_ir as ir

MAX_REPEATS = 1000
"""Every pass makes the graph smaller or more definite, so it ends; this many repeats mean that it does not."""


@dataclass(frozen=True, kw_only=True)
class Pass:
    """One change of a graph that keeps what the graph computes.

    ``run(model, limit_bytes)`` edits ``model`` in place and returns how many places it changed: 0 if and only if the
    serialised model is byte for byte what it was. It keeps the names, order, dtypes and symbolic shapes of the
    model's inputs and outputs, and lets weights grow to at most ``limit_bytes`` together.
    """

    name: str
    does: str
    """What it may change, for people; completes "this pass ...s"."""
    counts: str
    """What one change is, in the singular: ``"node"``."""
    run: Callable[[ir.Model, int], int]
    rounds: bool = False
    """Whether floats may come out rounded differently (products reassociated); other passes keep every bit that the
    runtime itself keeps."""
    assumes_finite: bool = False
    """Whether it is right only where no value is NaN or infinite."""


def apply(step: Pass, model: ir.Model, limit_bytes: int) -> int:
    """Run ``step`` until it finds nothing more, so that a second `apply` changes nothing. Returns the changes made."""
    total = 0
    for _ in range(MAX_REPEATS):
        changed = step.run(model, limit_bytes)
        if not changed:
            return total
        total += changed
    raise RecursionError(f"pass '{step.name}' still finds something to change after {MAX_REPEATS} repeats")

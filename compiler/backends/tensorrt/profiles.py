"""Which optimisation profile a call runs in."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from compiler.errors import BuildError
from compiler.spec import DimRange, TensorSpec


def choose_profile(where: str, profiles: Sequence[Mapping[str, DimRange]], sizes: Mapping[str, int]) -> int:
    """The index of the profile that contains every size.

    Of several, the one whose optimum is nearest: the least sum over the axes of ``|log2(size / opt)|``, so that twice and
    half the optimum are equally far (sizes below 1 count as 1); of equally near ones the first.

    >>> short, long = {"n": DimRange(min=1, opt=2, max=16)}, {"n": DimRange(min=1, opt=64, max=64)}
    >>> choose_profile("engine.plan", [short, long], {"n": 8}), choose_profile("engine.plan", [short, long], {"n": 13})
    (0, 1)

    Raises:
        BuildError: no profile contains them all.
    """
    fitting = [
        index for index, ranges in enumerate(profiles) if all(_contains(ranges, *item) for item in sizes.items())
    ]
    if not fitting:
        raise _outside(where, profiles, sizes)

    def distance(index: int) -> float:
        ranges = profiles[index]
        return sum(
            abs(math.log2(max(size, 1) / max(ranges[axis].opt, 1))) for axis, size in sizes.items() if axis in ranges
        )

    return min(fitting, key=distance)


def _contains(ranges: Mapping[str, DimRange], axis: str, size: int) -> bool:
    return axis not in ranges or size in ranges[axis]


def _outside(where: str, profiles: Sequence[Mapping[str, DimRange]], sizes: Mapping[str, int]) -> BuildError:
    for axis, size in sizes.items():
        if not any(_contains(ranges, axis, size) for ranges in profiles):
            first, *others = (
                (f"{ranges[axis].min} to {ranges[axis].max}", f"(profile {index})")
                for index, ranges in enumerate(profiles, start=1)
            )
            expected = ", ".join([f"{first[0]} was expected {first[1]}", *(" ".join(other) for other in others)])
            return BuildError(f"{where}: axis '{axis}' is {size}; {expected}. Build with a wider profile.")
    shown = {axis: size for axis, size in sizes.items() if any(axis in ranges for ranges in profiles)}
    offered = "; ".join(
        ", ".join(f"'{axis}' {ranges[axis].min} to {ranges[axis].max}" for axis in shown if axis in ranges)
        + f" (profile {index})"
        for index, ranges in enumerate(profiles, start=1)
    )
    found = ", ".join(f"'{axis}' is {size}" for axis, size in shown.items())
    return BuildError(
        f"{where}: {found}; sizes inside one and the same profile were expected: {offered}. Build with a wider profile."
    )


def at(spec: TensorSpec, ranges: Mapping[str, DimRange], end: str) -> tuple[int, ...] | None:
    """The shape of an input at one end of a profile; None where an axis has no range."""
    if any(isinstance(dim, str) and dim not in ranges for dim in spec.shape):
        return None
    return tuple(dim if isinstance(dim, int) else int(getattr(ranges[dim], end)) for dim in spec.shape)

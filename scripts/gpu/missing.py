"""What cannot be measured is ``{"missing": "<reason>"}`` in its place, and the rest goes on."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

from compiler.errors import BuildEngineError

Json: TypeAlias = dict[str, Any]
Emit: TypeAlias = Callable[[Json], None]


class MissingError(Exception):
    """Something cannot be measured here; the text says why."""


def reason(exc: BaseException, *, whole: bool = False) -> str:
    """Why something failed: this project's message, or the type and first line (``whole``: all lines) of another's."""
    text = str(exc).strip()
    if isinstance(exc, MissingError | BuildEngineError):
        return text
    told = text if whole else next(iter(text.splitlines()), "")
    return f"{type(exc).__name__}: {told}" if told else type(exc).__name__


def guarded(measure: Callable[[], Any]) -> Any:
    """What ``measure`` returns, or ``{"missing": reason}``."""
    try:
        return measure()
    except Exception as exc:
        return {"missing": reason(exc)}


def module(name: str) -> Any:
    """An installed module.

    Raises:
        MissingError: it cannot be imported, in its own words.
    """
    try:
        return importlib.import_module(name)
    except Exception as exc:
        raise MissingError(f"{name} cannot be imported: {reason(exc)}") from exc


def present(value: Any, what: str) -> Json:
    """
    Raises:
        MissingError: it was not measured, and why.
    """
    if not isinstance(value, Mapping):
        raise MissingError(f"{what}: not measured")
    if "missing" in value:
        raise MissingError(f"{what}: {value['missing']}")
    return dict(value)


def missing_of(content: Any, path: tuple[str, ...] = ()) -> Iterator[Json]:
    """Every ``{"missing": reason}`` below a value, with where it stands.

    >>> list(missing_of({"a": {"missing": "no"}, "b": [{"name": "x", "c": {"missing": "none"}}]}))
    [{'part': 'a', 'reason': 'no'}, {'part': 'b / x / c', 'reason': 'none'}]
    """
    if isinstance(content, Mapping):
        if isinstance(content.get("missing"), str):
            yield {"part": " / ".join(path), "reason": content["missing"]}
        for name, value in content.items():
            if name not in ("samples_s", "block_of"):
                yield from missing_of(value, path if name in ("batches", "candidates") else (*path, str(name)))
    elif isinstance(content, list):
        for index, value in enumerate(content):
            if isinstance(value, Mapping):
                named = value.get("name") or value.get("candidate")
                yield from missing_of(
                    value, (*path, str(named or (f"batch {value['batch']}" if "batch" in value else index)))
                )


def finite(value: Any) -> Any:
    """The same with every NaN and Inf replaced, as JSON has none.

    >>> finite({"a": [1.5, float("nan")]})
    {'a': [1.5, {'missing': 'not a number: nan'}]}
    """
    if isinstance(value, float) and not math.isfinite(value):
        return {"missing": f"not a number: {value}"}
    if isinstance(value, Mapping):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value

"""Nouns to canonical JSON and back, and the keys of steps.

Why not `msgspec.json.encode` alone: it writes NaN and infinity as null, knows no `Path`, and ignores keys that a type
does not have. Here the encoder is a short walk over the few kinds of value that a noun is made of, msgspec decodes, and
what was decoded must encode to what was read.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import threading
from collections.abc import Mapping
from enum import Enum
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import msgspec

T = TypeVar("T")

_NUMBER = "$float"
"""``{"$float": "nan"}``: JSON has no word for a number that is not finite."""

_CONVERTING = threading.Lock()
"""msgspec looks at a type when it first meets it, and another thread that meets it meanwhile ends the process."""


def dump(value: Any, base: Path) -> bytes:
    """Canonical JSON of a noun: keys sorted, the shortest digits that give the same float, paths relative to ``base``.

    >>> dump({"b": Path("/x/y/model.onnx"), "a": (1, 0.1)}, Path("/x"))
    b'{"a":[1,0.1],"b":"y/model.onnx"}'

    Raises:
        ValueError: a path outside ``base``, or a value of a kind that no noun holds.
    """
    return _encode(_plain(value, base, "value"))


def load(data: bytes, kind: type[T], base: Path) -> T:
    """The noun that `dump` wrote, its paths absolute below ``base``.

    Raises:
        ValueError: not JSON, not a ``kind``, a key that ``kind`` does not have, or a path that leaves ``base``.
    """

    def hook(expected: type[Any], found: Any) -> Any:
        if expected is not Path:
            raise ValueError(f"a {expected.__name__} is no part of a noun")
        if not isinstance(found, str):
            raise ValueError(f"a path was expected, found {found!r}")
        relative = PurePosixPath(found)
        if relative.is_absolute() or ".." in relative.parts or "\0" in found:
            raise ValueError(f"path {found!r} leaves the folder")
        return base.absolute() / relative

    try:
        tree = json.loads(data)
        with _CONVERTING:
            value = msgspec.convert(_numbers(tree), kind, dec_hook=hook)
    except (ValueError, RecursionError, msgspec.MsgspecError) as exc:
        raise ValueError(f"not a {kind.__name__}: {exc}") from exc
    if not _kept(tree, json.loads(dump(value, base))):
        raise ValueError(f"not a {kind.__name__}: it holds something that a {kind.__name__} does not have")
    return value


def key(parts: Mapping[str, Any]) -> str:
    """SHA-256, in hexadecimal, of the canonical JSON of plain values.

    >>> key({"a": 1, "b": [True, None]}) == key({"b": (True, None), "a": 1})
    True

    Raises:
        ValueError: a number that is not finite, a path, or a value of a kind that no noun holds.
    """
    return hashlib.sha256(_encode(_plain(parts, None, "key"))).hexdigest()


def _encode(tree: Any) -> bytes:
    return json.dumps(tree, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _plain(value: Any, base: Path | None, where: str) -> Any:
    """``value`` in the terms of JSON; ``base`` is None for a key, which must not depend on where files lie."""
    if isinstance(value, Enum):
        return _plain(value.value, base, where)
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        if math.isfinite(value):
            return float(value)
        if base is None:
            raise ValueError(f"{where} is {value}; a finite number was expected")
        return {_NUMBER: str(float(value))}
    if isinstance(value, Path) and base is not None:
        return _relative(value, base, where)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = dataclasses.fields(value)
        return {field.name: _plain(getattr(value, field.name), base, f"{where}.{field.name}") for field in fields}
    if isinstance(value, Mapping):
        for name in value:
            if not isinstance(name, str):
                raise ValueError(f"{where} has the key {name!r}; a string was expected")
        if _is_number(value):
            raise ValueError(f"{where} is {value!r}; that form is kept for numbers that are not finite")
        return {str(name): _plain(item, base, f"{where}[{name!r}]") for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, base, f"{where}[{index}]") for index, item in enumerate(value)]
    raise ValueError(f"{where} is a {type(value).__name__}; a plain value was expected")


def _kept(read: Any, understood: Any) -> bool:
    """Whether nothing of what was read is lost. What was understood may hold more: fields at their defaults, which came
    after the text was written."""
    if isinstance(read, dict) and isinstance(understood, dict):
        return all(name in understood and _kept(item, understood[name]) for name, item in read.items())
    if isinstance(read, list) and isinstance(understood, list):
        return len(read) == len(understood) and all(map(_kept, read, understood))
    return bool(read == understood) and isinstance(read, bool) == isinstance(understood, bool)


def _relative(path: Path, base: Path, where: str) -> str:
    try:
        relative = path.relative_to(base.absolute())
    except ValueError:
        raise ValueError(f"{where} is {path}; a path below {base} was expected") from None
    if ".." in relative.parts:
        raise ValueError(f"{where} is {path}; a path below {base} was expected")
    return relative.as_posix()


def _numbers(tree: Any) -> Any:
    """``tree`` with numbers in the place of ``{"$float": ...}``."""
    if isinstance(tree, dict):
        if _is_number(tree):
            return float(tree[_NUMBER])
        return {name: _numbers(item) for name, item in tree.items()}
    if isinstance(tree, list):
        return [_numbers(item) for item in tree]
    return tree


def _is_number(tree: Mapping[str, Any]) -> bool:
    return tree.keys() == {_NUMBER} and tree[_NUMBER] in ("nan", "inf", "-inf")

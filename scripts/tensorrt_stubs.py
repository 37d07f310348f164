#!/usr/bin/env python3
"""Write ``stubs/tensorrt/__init__.pyi`` from the installed bindings, so that mypy knows a call that does not exist.

TensorRT 11 took away much that older code and older texts still use, and its bindings carry no types. Each of their
methods says its own signature in its documentation; the file is made of nothing else. What a signature leaves out:

* `Dims` and `Weights` are also made from sequences and arrays; parameters say so.
* The library answers None where it failed. Where the documentation says so, or `NULLABLE` here, so does the result;
  but not for an index out of range.
"""

from __future__ import annotations

import argparse
import ctypes
import difflib
import importlib.util
import inspect
import keyword
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
STUB = ROOT / "stubs" / "tensorrt" / "__init__.pyi"
VERSION = "11.4.0.106"

NULLABLE = frozenset(
    {
        "Builder.build_engine_with_config",
        "Builder.build_serialized_network",
        "Builder.error_recorder",
        "IBuilderConfig.progress_monitor",
        "ICudaEngine.create_execution_context",
        "ICudaEngine.error_recorder",
        "IExecutionContext.error_recorder",
        "IExecutionContext.get_output_allocator",
        "IExecutionContext.profiler",
        "INetworkDefinition.error_recorder",
        "ITensor.get_dimension_name",
        "Runtime.error_recorder",
    }
)
BUFFERS = frozenset({"IHostMemory"})  # bytes() and memoryview() read them
LEFTOVERS = frozenset({"attr", "common_enter", "common_exit", "value"})  # of the package's own code
_SPECIAL = ("init", "bool", "contains", "delitem", "enter", "exit", "getitem", "iter", "len", "setitem", "str")
_OPERATORS = frozenset(f"__{name}__" for name in _SPECIAL)
_ALSO = {"Dims": "Dims | Sequence[SupportsInt]", "Weights": "Weights | NDArray[Any]"}
_KNOWN = {
    "NoneType": "None",
    "bool": "builtins.bool",
    "collections.abc.Buffer": "Buffer",
    "numpy.ndarray": "NDArray[Any]",
    "object": "Any",
    "typing_extensions.Buffer": "Buffer",
    "typing_extensions.CapsuleType": "CapsuleType",
    "IParserError": "ParserError",
    "IBuilder": "Builder",
}
_BARE = {  # generic types that the documentation names without their arguments
    "Callable": "Callable[..., Any]",
    "Iterable": "Iterable[Any]",
    "list": "list[Any]",
    "tuple": "tuple[Any, ...]",
}
_BUILTINS = frozenset({"None", "bytes", "float", "int", "list", "memoryview", "slice", "str", "tuple"})
_ABSTRACT = frozenset({"Callable", "Iterable", "Iterator", "Sequence", "SupportsFloat", "SupportsInt"})

_HEADER = f"""\
# Types of TensorRT's Python bindings, {VERSION}. Written by scripts/tensorrt_stubs.py; do not edit.
# ruff: noqa
# mypy: disable-error-code="override, overload-cannot-match"

import builtins
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar, SupportsFloat, SupportsInt, overload

from numpy.typing import NDArray
from typing_extensions import Buffer, CapsuleType

__version__: str
"""


def load() -> ModuleType:
    """The bindings as they are: not through `tensorrt_rtx`, which takes some calls away.

    Raises:
        ImportError: they are not installed, or of another version.
    """
    helper = importlib.util.find_spec("tensorrt_rtx")
    if helper is not None and helper.origin is not None:
        for library in sorted(Path(helper.origin).parent.glob("lib*.so.*")):
            ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    bindings = importlib.import_module("tensorrt_bindings")
    if bindings.__version__ != VERSION:
        raise ImportError(f"tensorrt_bindings: found {bindings.__version__}; {VERSION} was expected.")
    return bindings


# --- types ----------------------------------------------------------------------------------------------------------


class Types:
    """Turns the names of types in the documentation into those of the stub."""

    def __init__(self, module: ModuleType) -> None:
        self._classes = {name for name, value in vars(module).items() if isinstance(value, type)}

    def __call__(self, text: str) -> str:
        text = text.strip()
        if not text:
            return "Any"
        if text.startswith("[") and text.endswith("]"):
            return f"[{', '.join(self(part) for part in _split(text[1:-1]))}]"
        outer, bracket, inner = text.partition("[")
        if bracket:
            return f"{self._name(outer)}[{', '.join(self(part) for part in _split(inner[:-1]))}]"
        name = self._name(text)
        return _BARE.get(name, name)

    def parameter(self, text: str) -> str:
        known = self(text)
        return _ALSO.get(known, known)

    def _name(self, text: str) -> str:
        short = text.removeprefix("tensorrt_bindings.tensorrt.")
        short = re.sub(r"^(nvinfer1|nvonnxparser)::(v_\d+_\d+::)?", "", short)
        short = _KNOWN.get(short, short)
        last = short.rpartition(".")[2]
        if short.partition(".")[0] in self._classes or short in _BUILTINS or "[" in short or short in _KNOWN.values():
            return short
        return last if last in _ABSTRACT else "Any"


def _split(text: str) -> list[str]:
    """At commas that stand outside of brackets and quotes.

    >>> _split("a: int, b: list[int, str] = <E.A: 1>")
    ['a: int', 'b: list[int, str] = <E.A: 1>']
    """
    parts, depth, start = [], 0, 0
    for at, char in enumerate(text):
        depth += (char in "[(<") - (char in "])" or (char == ">" and text[at - 1] != "-"))
        if char == "," and depth == 0:
            parts.append(text[start:at])
            start = at + 1
    return [part.strip() for part in (*parts, text[start:]) if part.strip()]


# --- signatures -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Signature:
    parameters: tuple[str, ...]
    result: str
    none: bool
    """Whether the documentation says that the result may be None."""


_LINE = re.compile(r"^(?:\d+\. )?\w*\((?P<parameters>.*)\) -> (?P<result>.+)$")


def signatures(text: str | None) -> list[Signature]:
    """Every signature in a piece of documentation, with what follows it up to the next one.

    >>> signatures("f(self: X, index: typing.SupportsInt) -> Y\\n\\n:returns: Y, or None.")
    [Signature(parameters=('self: X', 'index: typing.SupportsInt'), result='Y', none=True)]
    """
    found: list[tuple[str, str, list[str]]] = []
    for line in (text or "").splitlines():
        match = _LINE.match(line.strip())
        if match and "*args" not in match["parameters"]:
            found.append((match["parameters"], match["result"], []))
        elif found:
            found[-1][2].append(line.strip())
    return [Signature(tuple(_split(given)), result.strip(), _says_none(rest)) for given, result, rest in found]


def _says_none(lines: list[str]) -> bool:
    returns = " ".join(line for line in lines if line.startswith((":returns:", ":return:")))
    return re.search(r"\bNone\b", returns) is not None and "out of range" not in returns


class Writer:
    """The lines of the stub."""

    def __init__(self, module: ModuleType) -> None:
        self._module, self._types = module, Types(module)

    def text(self) -> str:
        lines = [_HEADER]
        for name, value in sorted(vars(self._module).items()):
            if not name.startswith("_") and name not in LEFTOVERS and not inspect.ismodule(value):
                lines += self._named(name, value)
        return "\n".join(lines) + "\n"

    def _named(self, name: str, value: Any) -> list[str]:
        if isinstance(value, type):
            return self._class(name, value)
        if inspect.isbuiltin(value):
            return list(self._functions(name, "", value.__doc__, ""))
        if inspect.isfunction(value):
            given = ", ".join(f"{parameter}: Any" for parameter in inspect.signature(value).parameters)
            return [f"def {name}({given}) -> Any: ..."]
        return [f"{name}: {type(value).__qualname__}"]

    def _class(self, name: str, owner: type) -> list[str]:
        bases = [base.__qualname__ for base in owner.__bases__ if base.__module__ != "pybind11_builtins"]
        head = f"class {owner.__qualname__.rpartition('.')[2]}({', '.join(bases)}):" if bases else f"class {name}:"
        if "__members__" in vars(owner):
            body = _enum(owner)
        else:
            body = [
                line for member, value in sorted(vars(owner).items()) for line in self._member(owner, member, value)
            ]
        if "__getitem__" in vars(owner) and "__iter__" not in vars(owner):
            one = next(found for found in signatures(vars(owner)["__getitem__"].__doc__) if "slice" not in str(found))
            body.append(f"def __iter__(self) -> Iterator[{self._types(one.result)}]: ...")
        if owner.__qualname__ in BUFFERS:
            body.append("def __buffer__(self, flags: int, /) -> memoryview: ...")
        return [head, *(f"    {line}" for line in body or ["..."])]

    def _member(self, owner: type, name: str, value: Any) -> Iterator[str]:
        where = f"{owner.__qualname__}.{name}"
        if name.startswith("_") and name not in _OPERATORS:
            return
        if isinstance(value, type):
            if value.__qualname__ == where:
                yield from self._class(name, value)
        elif isinstance(value, staticmethod):
            yield from self._functions(name, where, value.__func__.__doc__, "@staticmethod")
        elif type(value).__name__ == "pybind11_static_property":
            yield f"{name}: ClassVar[{type(getattr(owner, name)).__name__}]"
        elif isinstance(value, property):
            yield from self._property(name, where, value)
        elif name in ("__enter__", "__exit__") and inspect.isfunction(value):
            yield f"def {name}(self{', *exc: object' if name == '__exit__' else ''}) -> {_entered(name)}: ..."
        elif callable(value) and not inspect.isfunction(value):
            yield from self._functions(name, where, value.__doc__, "")
        elif type(value).__qualname__.startswith("ILogger."):
            yield f"{name}: ClassVar[{type(value).__qualname__}]"

    def _property(self, name: str, where: str, value: property) -> Iterator[str]:
        getters, setters = (signatures(side.__doc__ if side else None) for side in (value.fget, value.fset))
        maybe = " | None" if where in NULLABLE else ""
        yield "@property"
        yield f"def {name}(self) -> {self._types(getters[0].result) if getters else 'Any'}{maybe}: ..."
        if value.fset is not None:
            kind = self._types.parameter(_type_of(setters[0].parameters[1])) if setters else "Any"
            yield f"@{name}.setter"
            yield f"def {name}(self, value: {kind}{maybe}) -> None: ..."

    def _functions(self, name: str, where: str, text: str | None, decorator: str) -> Iterator[str]:
        found = signatures(text)
        for signature in found:
            if len(found) > 1:
                yield "@overload"
            if decorator:
                yield decorator
            result = self._types(signature.result)
            maybe = " | None" if (signature.none or where in NULLABLE) and result not in ("Any", "None") else ""
            yield f"def {name}({', '.join(self._parameters(signature))}) -> {result}{maybe}: ..."

    def _parameters(self, signature: Signature) -> Iterator[str]:
        optional = False
        for index, text in enumerate(signature.parameters):
            name = text.partition(":")[0].strip()
            if name == "self" or (index == 0 and name == "arg0" and "self" in text):
                yield "self"
                continue
            declared, _, default = _type_of(text).partition("=")
            kind = self._types.parameter(declared)
            optional = optional or bool(default.strip())
            if default.strip() == "None" and kind != "Any":
                kind = f"{kind} | None"
            name = f"{name}_" if keyword.iskeyword(name) else name
            yield f"{name}: {kind}{' = ...' if optional else ''}"
            following = signature.parameters[index + 1 :]
            if re.match(r"arg\d+$", name) and not any(re.match(r"arg\d+:", other) for other in following):
                yield "/"


def _type_of(parameter: str) -> str:
    return parameter.partition(":")[2].strip() or "Any"


def _entered(name: str) -> str:
    return "Any" if name == "__enter__" else "None"


def _enum(owner: Any) -> list[str]:
    name = owner.__qualname__
    return [
        "__members__: ClassVar[dict[str, Any]]",
        *(f"{member}: ClassVar[{name}]" for member in owner.__members__),
        "def __init__(self, value: SupportsInt) -> None: ...",
        "def __int__(self) -> int: ...",
        "def __index__(self) -> int: ...",
        "def __hash__(self) -> int: ...",
        "@property",
        "def name(self) -> str: ...",
        "@property",
        "def value(self) -> int: ...",
        *(["@property", "def itemsize(self) -> float: ..."] if name == "DataType" else []),
    ]


def generate() -> str:
    """The stub, formatted.

    Raises:
        ImportError: see `load`.
    """
    text = Writer(load()).text()
    command = [sys.executable, "-m", "ruff", "format", "--quiet", "--stdin-filename", str(STUB), "-"]
    return subprocess.run(command, input=text, capture_output=True, text=True, check=True).stdout


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="only say whether the file is what would be written")
    check = parser.parse_args().check
    try:
        text = generate()
    except ImportError as exc:
        print(f"tensorrt_stubs: {exc}", file=sys.stderr)
        return 1
    if check:
        now = STUB.read_text() if STUB.exists() else ""
        lines = difflib.unified_diff(now.splitlines(), text.splitlines(), "committed", "bindings", lineterm="", n=0)
        difference = list(lines)
        print(*difference[:40], sep="\n")
        return 1 if difference else 0
    STUB.write_text(text)
    print(f"{STUB.relative_to(ROOT)}: {text.count(chr(10)):,} lines")
    return 0


if __name__ == "__main__":
    sys.exit(main())

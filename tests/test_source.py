"""The user's code is found and fingerprinted without running it; what it raises points at the user's own line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from compiler import recipe, source
from compiler.errors import BuildEngineError, CalibrationError, ExportError, RecipeError
from compiler.recipe import DataSection, InputSection, ModelSection, Recipe


@pytest.fixture(autouse=True)
def _clean_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each test's folder is the working directory, and leaves neither modules nor search paths behind."""
    monkeypatch.chdir(tmp_path)
    path, modules = list(sys.path), set(sys.modules)
    yield
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        del sys.modules[name]


def _recipe(model: str = "m.py", data: DataSection | None = None, **keys: Any) -> Recipe:
    section = ModelSection(source=model, inputs={"x": InputSection(shape=(3,))}, **keys)
    return Recipe(name="r", model=section, data=data or DataSection())


def _write(path: Path, text: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def _fingerprint(folder: Path, asked: Recipe | None = None, memo: dict[str, Any] | None = None) -> dict[str, str]:
    return source.fingerprint(source.locate(asked or _recipe(), folder), memo=memo)


def _error(kind: type[BuildEngineError], run: Any) -> str:
    with pytest.raises(kind) as caught:
        run()
    assert type(caught.value) is kind
    return caught.value.message


# --- locate ---------------------------------------------------------------------------------------------------------


def test_a_model_file_is_its_own_data_file(tmp_path: Path) -> None:
    path = _write(tmp_path / "models" / "m.py")
    found = source.locate(_recipe("models/m.py"), tmp_path)
    assert (found.kind, found.model_path, found.data_path, found.weights) == ("file", path, path, None)


def test_a_missing_file_is_named_with_its_nearest_sibling(tmp_path: Path) -> None:
    _write(tmp_path / "digits.py")
    assert _error(RecipeError, lambda: source.locate(_recipe("digit.py"), tmp_path)) == (
        "[model] source: digit.py does not exist; a Python file with build() was expected. Did you mean 'digits.py'?"
    )
    assert _error(RecipeError, lambda: source.locate(_recipe("digits.py", weights="w.safetensors"), tmp_path)) == (
        "[model] weights: w.safetensors does not exist; a file with weights was expected. It is relative to the recipe."
    )
    (tmp_path / "d.py").mkdir()
    asked = _recipe("digits.py", DataSection(source="d.py"))
    assert _error(RecipeError, lambda: source.locate(asked, tmp_path)) == (
        "[data] source: d.py is a folder; a Python file was expected. It is relative to the recipe."
    )


def test_data_files_are_globbed_and_an_empty_glob_is_refused(tmp_path: Path) -> None:
    _write(tmp_path / "m.py")
    files = [_write(tmp_path / "data" / name) for name in ("a.npy", "sub/b.npy")]
    found = source.locate(_recipe(data=DataSection(files=("data/**", "data/a.npy"))), tmp_path)
    assert found.files == tuple(files)
    asked = _recipe(data=DataSection(files=("data/*.csv",)))
    assert _error(RecipeError, lambda: source.locate(asked, tmp_path)) == (
        f"[data] files: 'data/*.csv' matches no file below {tmp_path}; at least one was expected. Correct the pattern "
        "('folder/**' takes everything in a folder), or remove it."
    )


def test_a_callable_is_found_without_importing_its_parents(tmp_path: Path) -> None:
    _write(tmp_path / "grove" / "__init__.py", "raise SystemError('imported')")
    path = _write(tmp_path / "grove" / "oak.py")
    asked = _recipe("grove.oak:make", DataSection(source="d.py"))
    _write(tmp_path / "d.py")
    found = source.locate(asked, tmp_path)
    assert (found.model_path, found.target) == (path, "grove.oak:make")
    asked = _recipe("grove.elm:make", DataSection(source="d.py"))
    assert _error(RecipeError, lambda: source.locate(asked, tmp_path)) == (
        f"[model] source: no module named 'grove.elm'; a module below {tmp_path} or an installed one was expected. "
        "Correct the name, or install its package."
    )


def test_a_hugging_face_folder_is_told_from_an_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    _write(tmp_path / "d.py")
    data = DataSection(source="d.py")
    folder = tmp_path / "bert"
    _write(folder / "config.json")
    assert source.locate(_recipe("hf:bert", data), tmp_path).model_path == folder
    found = source.locate(_recipe("hf:org/bert", data), tmp_path)
    assert (found.model_path, found.target) == (None, "org/bert")
    assert _error(RecipeError, lambda: source.locate(_recipe("hf:./nowhere", data), tmp_path)) == (
        f"[model] source: './nowhere' is no folder below {tmp_path}; a Hugging Face model folder, or an id like "
        "'organisation/model', was expected. Correct it; it is relative to the recipe."
    )


def test_an_id_in_the_local_cache_becomes_its_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    _write(tmp_path / "d.py")
    repository = tmp_path / "hub" / "models--org--bert"
    _write(repository / "refs" / "main", "abc123")
    _write(repository / "snapshots" / "abc123" / "config.json", "{}")
    asked = _recipe("hf:org/bert", DataSection(source="d.py"))
    assert source.locate(asked, tmp_path).model_path is None, "a snapshot without weights cannot be loaded"
    _write(repository / "snapshots" / "abc123" / "model.safetensors", "w")
    assert source.locate(asked, tmp_path).model_path == repository / "snapshots" / "abc123"
    asked = _recipe("hf:org/bert", DataSection(source="d.py"), revision="abc123")
    assert source.locate(asked, tmp_path).model_path == repository / "snapshots" / "abc123"
    asked = _recipe("hf:org/bert", DataSection(source="d.py"), revision="other")
    found = source.locate(asked, tmp_path)
    assert found.model_path is None
    assert source.fingerprint(found)["hf org/bert"] == "revision other"


# --- fingerprint ----------------------------------------------------------------------------------------------------


def test_a_fingerprint_runs_none_of_the_code(tmp_path: Path) -> None:
    _write(tmp_path / "m.py", "import helper_a\nopen('marker', 'w')")
    _write(tmp_path / "helper_a.py", "open('marker', 'w')")
    assert "module helper_a" in _fingerprint(tmp_path)
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize(
    "name", ["m.py", "near.py", "pack/__init__.py", "pack/part.py", "pack/deep/leaf.py", "space/inner.py", "lazy.py"]
)
def test_a_change_in_any_local_module_changes_the_fingerprint(tmp_path: Path, name: str) -> None:
    _write(tmp_path / "m.py", "import near\nfrom pack import part\nimport space.inner\ndef f():\n    import lazy")
    _write(tmp_path / "pack" / "__init__.py")
    _write(tmp_path / "pack" / "part.py", "from .deep.leaf import thing\nfrom . import nothing\nfrom .... import above")
    _write(tmp_path / "pack" / "deep" / "__init__.py")
    for leaf in ("near.py", "pack/deep/leaf.py", "space/inner.py", "lazy.py"):
        _write(tmp_path / leaf)
    before = _fingerprint(tmp_path)
    path = tmp_path / name
    path.write_text(path.read_text() + "\n# changed")
    after = _fingerprint(tmp_path)
    assert before.keys() == after.keys()
    assert len({key for key in before if before[key] != after[key]}) == 1


def test_a_module_that_nothing_imports_is_no_part_of_it(tmp_path: Path) -> None:
    _write(tmp_path / "m.py", "import near_b")
    _write(tmp_path / "near_b.py")
    before = _fingerprint(tmp_path)
    _write(tmp_path / "stranger.py", "x = 1")
    assert _fingerprint(tmp_path) == before


def test_packages_count_by_version_and_the_standard_library_not_at_all(tmp_path: Path) -> None:
    _write(tmp_path / "m.py", "import numpy as np\nimport json, os.path, sys\nimport sklearn.datasets, not_there_xyz\n")
    found = _fingerprint(tmp_path)
    assert found["package numpy"] == __import__("numpy").__version__
    assert set(found) == {"file m.py", "package numpy", "package scikit-learn", "package not_there_xyz"}
    assert found["package not_there_xyz"] == "absent"
    _write(tmp_path / "m.py", "from compiler.metrics import top1")
    assert set(_fingerprint(tmp_path)) == {"file m.py", "package build-engine"}


def test_a_module_made_by_hand_is_no_stumbling_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "handmade_z", types.ModuleType("handmade_z"))
    _write(tmp_path / "m.py", "import handmade_z")
    assert _fingerprint(tmp_path)["package handmade_z"] == "absent"


def test_a_file_that_is_not_python_is_still_hashed(tmp_path: Path) -> None:
    for text in ("def (", "\0", "x = '\\d'\nimport json"):
        _write(tmp_path / "m.py", text)
        assert set(_fingerprint(tmp_path)) == {"file m.py"}


def test_weights_data_and_data_files_are_hashed_under_names_that_move_with_the_folder(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        for name in ("recipes/d.py", "m.py", "w.safetensors", "recipes/x.npy"):
            _write(tmp_path / folder / name, name)
    asked = _recipe("../m.py", DataSection(source="d.py", files=("*.npy",)), weights="../w.safetensors")
    one, two = (_fingerprint(tmp_path / folder / "recipes", asked) for folder in ("one", "two"))
    assert one == two
    assert set(one) == {"file ../m.py", "file d.py", "file ../w.safetensors", "file x.npy"}


def test_a_hugging_face_folder_is_hashed_file_by_file_without_hidden_ones(tmp_path: Path) -> None:
    _write(tmp_path / "d.py")
    for name in ("config.json", "onnx/m.onnx", ".git/x", ".cache"):
        _write(tmp_path / "bert" / name)
    found = _fingerprint(tmp_path, _recipe("hf:bert", DataSection(source="d.py")))
    assert set(found) == {"file d.py", "hf folder/config.json", "hf folder/onnx/m.onnx", "package transformers"}


def test_external_data_of_an_onnx_file_belong_to_it(tmp_path: Path) -> None:
    import numpy as np
    import onnx
    from onnx import helper, numpy_helper

    _write(tmp_path / "d.py")
    weight = numpy_helper.from_array(np.ones((64, 64), np.float32), "w")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", 1, [1, 64])],
        [helper.make_tensor_value_info("y", 1, [1, 64])],
        [weight],
    )
    onnx.save(helper.make_model(graph), tmp_path / "m.onnx", save_as_external_data=True, location="m.data")
    asked = _recipe("m.onnx", DataSection(source="d.py"))
    before = _fingerprint(tmp_path, asked)
    assert set(before) == {"file d.py", "file m.onnx", "file m.data"}
    raw = bytearray((tmp_path / "m.data").read_bytes())
    raw[0] ^= 1
    (tmp_path / "m.data").write_bytes(raw)
    assert _fingerprint(tmp_path, asked) != before


def test_an_empty_onnx_file_has_a_fingerprint_too(tmp_path: Path) -> None:
    _write(tmp_path / "d.py")
    _write(tmp_path / "m.onnx")
    assert set(_fingerprint(tmp_path, _recipe("m.onnx", DataSection(source="d.py")))) == {"file d.py", "file m.onnx"}


def test_a_callable_is_fingerprinted_with_its_parents(tmp_path: Path) -> None:
    _write(tmp_path / "forest" / "__init__.py")
    _write(tmp_path / "forest" / "oak.py", "import near_c")
    _write(tmp_path / "near_c.py")
    _write(tmp_path / "d.py")
    found = _fingerprint(tmp_path, _recipe("forest.oak:make", DataSection(source="d.py")))
    assert set(found) == {"file d.py", "module forest", "module forest.oak", "module near_c"}


def test_a_memo_saves_reading_a_file_again_until_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "_SETTLED_NS", -(10**12))
    path = _write(tmp_path / "m.py", "x = 1")
    memo: dict[str, Any] = {}
    before = _fingerprint(tmp_path, memo=memo)
    memo = json.loads(json.dumps(memo))
    assert _fingerprint(tmp_path, memo=memo) == before
    memo[str(path)][4] = "planted"
    assert _fingerprint(tmp_path, memo=memo)["file m.py"] == "planted", "the memo is what is used"
    path.write_text("x = 2")
    os.utime(path, ns=(0, memo[str(path)][1]))
    assert _fingerprint(tmp_path, memo=memo)["file m.py"] not in ("planted", before["file m.py"]), (
        "same size and same modification time, but another time of change"
    )


def test_a_file_written_just_now_is_not_remembered(tmp_path: Path) -> None:
    _write(tmp_path / "m.py")
    memo: dict[str, Any] = {}
    _fingerprint(tmp_path, memo=memo)
    assert str(tmp_path / "m.py") not in memo


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write(tmp_path / "m.py")
    located = source.locate(_recipe(), tmp_path)
    (tmp_path / "m.py").unlink()
    assert _error(RecipeError, lambda: source.fingerprint(located)) == (
        "m.py: cannot be read: No such file or directory. Make it readable, and run again."
    )


def test_no_heavy_library_is_loaded(tmp_path: Path) -> None:
    _write(tmp_path / "m.py", "import torch, onnx, transformers")
    _write(
        tmp_path / "r.toml",
        'name = "r"\n[model]\nsource = "m.py"\n[model.inputs.x]\nshape = [3]\n[[engines]]\nprecision = "fp32"\n',
    )
    code = (
        "import sys; from pathlib import Path; from compiler import recipe, source\n"
        "found = source.fingerprint(source.locate(recipe.load(Path('r.toml')), Path()))\n"
        "assert 'package torch' in found and 'package transformers' in found, found\n"
        "sys.exit(' '.join({'torch', 'onnx', 'numpy.f2py', 'transformers', 'huggingface_hub'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stderr.strip()) == (0, "")


# --- loading and calling --------------------------------------------------------------------------------------------


def test_a_module_runs_once_with_its_folder_on_the_path(tmp_path: Path) -> None:
    _write(tmp_path / "near_d.py", "value = 7")
    path = _write(tmp_path / "m.py", "import near_d\ncalls = []\ndef build():\n    return near_d.value")
    module = source.load_module(path)
    assert module.build() == 7
    assert source.load_module(path) is module
    path.write_text("def build():\n    return 8")
    assert source.load_module(path).build() == 8, "a changed file is another module"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\nraise ValueError('boom.')", "m.py:2: loading it raised ValueError: boom. Fix the file; the full traceback is in the log."),
        ("def (", "m.py:1: loading it raised SyntaxError: invalid syntax. Fix the file; the full traceback is in the log."),
        ("import sys\nsys.exit(3)", "m.py:2: loading it raised SystemExit: 3. Fix the file; the full traceback is in the log."),
        ("import json\njson.loads('')", "m.py:2: loading it raised JSONDecodeError: Expecting value: line 1 column 1 (char 0). Fix the file; the full traceback is in the log."),
        ("raise KeyError", "m.py:1: loading it raised KeyError. Fix the file; the full traceback is in the log."),
        ("\nimport no_such_module_q", "m.py:2: imports 'no_such_module_q', which was not found; an installed package or a module beside the file was expected. Install it, or correct the name."),
        ("raise ModuleNotFoundError('x', name='sklearn.datasets')", "m.py:1: needs the package 'sklearn', which is not installed. Install it with: pip install 'build-engine[digits]'"),
    ],
)  # fmt: skip
def test_a_file_that_raises_is_one_message_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    path = _write(tmp_path / "m.py", text)
    assert _error(ExportError, lambda: source.load_module(path)) == message
    assert _error(CalibrationError, lambda: source.load_module(path, CalibrationError)) == message


def test_an_error_in_a_module_that_the_file_imports_points_there(tmp_path: Path) -> None:
    _write(tmp_path / "near_e.py", "\n\n1 / 0")
    path = _write(tmp_path / "m.py", "import near_e")
    assert _error(ExportError, lambda: source.load_module(path)) == (
        "near_e.py:3: loading it raised ZeroDivisionError: division by zero. Fix the file; the full traceback is in the "
        "log."
    )


def test_a_file_that_vanished_is_an_error(tmp_path: Path) -> None:
    assert _error(ExportError, lambda: source.load_module(tmp_path / "m.py")) == (
        "m.py: cannot be read: No such file or directory. Make it readable."
    )


def test_an_interrupt_passes_through(tmp_path: Path) -> None:
    path = _write(tmp_path / "m.py", "raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        source.load_module(path)


def test_our_own_errors_pass_through_unchanged() -> None:
    def refuse() -> None:
        raise RecipeError("mine")

    assert _error(RecipeError, lambda: source.call_user(refuse, "refuse()", ExportError)) == "mine"


def test_arguments_that_do_not_fit_point_at_the_function(tmp_path: Path) -> None:
    path = _write(tmp_path / "m.py", "\ndef top1(outputs):\n    return outputs")
    module = source.load_module(path)
    assert source.call_user(module.top1, "top1()", ExportError, 3) == 3
    assert _error(ExportError, lambda: source.call_user(module.top1, "top1()", ExportError, 1, 2)) == (
        "m.py:2: top1() raised TypeError: top1() takes 1 positional argument but 2 were given. Fix the file; the full "
        "traceback is in the log."
    )


def test_a_generator_that_raises_at_its_third_item_points_at_its_line(tmp_path: Path) -> None:
    path = _write(tmp_path / "m.py", "def items():\n    yield 1\n    yield 2\n    raise OSError('gone')")
    module = source.load_module(path)
    items = source.iterate_user(module.items(), "items()", CalibrationError)
    assert [next(items), next(items)] == [1, 2]
    assert _error(CalibrationError, lambda: next(items)) == (
        "m.py:4: items() raised OSError: gone. Fix the file; the full traceback is in the log."
    )
    assert list(source.iterate_user(iter([None, 0]), "items()", CalibrationError)) == [None, 0]


def test_the_builder_is_found_in_a_file_and_in_a_package(tmp_path: Path) -> None:
    _write(tmp_path / "m.py", "def build():\n    return 'file'")
    _write(tmp_path / "orchard" / "__init__.py")
    _write(tmp_path / "orchard" / "apple.py", "def make():\n    return 'package'")
    assert source.load_callable(source.locate(_recipe(), tmp_path))() == "file"
    asked = _recipe("orchard.apple:make", DataSection(source="m.py"))
    assert source.load_callable(source.locate(asked, tmp_path))() == "package"


def test_a_file_without_a_builder_names_the_nearest_function(tmp_path: Path) -> None:
    _write(tmp_path / "m.py", "def bulid():\n    pass")
    found = source.locate(_recipe(), tmp_path)
    assert _error(ExportError, lambda: source.load_callable(found)) == (
        "m.py: no 'build'; a function build() that returns the model was expected. Did you mean 'bulid'?"
    )
    _write(tmp_path / "m.py", "build = 3")
    assert _error(ExportError, lambda: source.load_callable(found)) == (
        "m.py: 'build' is int, not callable; a function build() that returns the model was expected. Define it."
    )


def test_another_module_of_the_same_name_is_not_taken_in_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _write(tmp_path / "twin_x.py", "def make(): ...")
    _write(tmp_path / "d.py")
    other = _write(tmp_path / "elsewhere" / "twin_x.py", "def make(): ...")
    found = source.locate(_recipe("twin_x:make", DataSection(source="d.py")), tmp_path)
    monkeypatch.setitem(sys.modules, "twin_x", source.load_module(other))
    assert _error(ExportError, lambda: source.load_callable(found)) == (
        "twin_x:make: the module loaded is elsewhere/twin_x.py; twin_x.py was expected. Rename one of the two."
    )


def test_extras_named_in_messages_are_extras_of_the_project() -> None:
    import importlib.metadata

    provided = importlib.metadata.metadata("build-engine").get_all("Provides-Extra") or []
    assert set(source.EXTRAS.values()) <= set(provided)
    assert recipe.source_kind("hf:x") == "hf"

"""What is exported computes what the original computes, at every extreme of every axis; whatever does not is refused."""

from __future__ import annotations

import io
import os
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import safetensors.torch
import torch
from onnx import helper, numpy_helper

from compiler import export, onnx_files, recipe, source
from compiler.backends.onnxruntime import open_model
from compiler.data import Samples, SampleWriter, collect
from compiler.errors import BuildEngineError, BuildError, ExportError, RecipeError
from compiler.original import compiled, feeds_at, load_original, open_original, reference
from compiler.recipe import Recipe
from compiler.source import Sources
from compiler.spec import DataSets, DimRange, OnnxModel, Outputs, Reference, ValidationSet

HEADER = '''\
from dataclasses import dataclass
import numpy as np
import torch
from torch import nn

def rows(seed, count=4):
    for row in np.random.default_rng(seed).normal(size=(count, 1, 3)).astype(np.float32):
        yield {"x": row}

def calibration():
    yield from rows(1)

def validation():
    yield from rows(2)

class Linear(nn.Module):
    """Its weight is 1 to 6, its bias 1 and -1."""
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 2)
        with torch.no_grad():
            self.fc.weight.copy_(torch.arange(1.0, 7.0).reshape(2, 3))
            self.fc.bias.copy_(torch.tensor([1.0, -1.0]))
'''

WEIGHT = np.arange(1, 7, dtype=np.float32).reshape(2, 3)
BIAS = np.asarray([1, -1], np.float32)


@dataclass
class Case:
    """A recipe and the files it names, ready for the stages."""

    folder: Path
    recipe: Recipe
    sources: Sources

    def export(self, **options: Any) -> OnnxModel:
        out_dir = self.folder / f"out{len(list(self.folder.glob('out*')))}"
        out_dir.mkdir()
        opset = options.pop("opset", 20)
        return export.export(self.recipe, self.sources, opset=opset, open_model=open_model, out_dir=out_dir, **options)

    def refused(self, kind: type[BuildEngineError] = ExportError, **options: Any) -> str:
        with pytest.raises(BuildEngineError) as caught:
            self.export(**options)
        assert type(caught.value) is kind, caught.value.message
        return caught.value.message

    def reference(self, **options: Any) -> Outputs:
        for name in ("data", "reference"):
            (self.folder / name).mkdir()
        return self.references(collect(self.recipe, self.sources, out_dir=self.folder / "data"), **options).validation

    def references(self, data: DataSets, **options: Any) -> Reference:
        return reference(
            self.recipe,
            self.sources,
            data,
            threads=1,
            open_model=open_model,
            out_dir=self.folder / "reference",
            **options,
        )


def _case(
    folder: Path,
    model: str = "",
    *,
    inputs: str = 'x = { shape = ["batch", 3] }',
    axes: str = "batch = { min = 1, opt = 2, max = 5 }",
    name: str = "m.py",
    more: str = "",
) -> Case:
    """A model file that is `HEADER` and ``model``; where ``name`` is another source, it holds the data only."""
    text = HEADER + model
    if "def build" not in text and "class Net" in text:
        text += "\ndef build():\n    return Net()\n"
    (folder / "m.py").write_text(text)
    toml = f'name = "r"\n[model]\nsource = "{name}"\n{more}\n[model.inputs]\n{inputs}\n[axes]\n{axes}\n'
    toml += '[[engines]]\nprecision = "fp32"\n'
    if name != "m.py":
        toml += '[data]\nsource = "m.py"\n'
    (folder / "r.toml").write_text(toml)
    asked = recipe.load(folder / "r.toml")
    return Case(folder, asked, source.locate(asked, folder))


def _net(forward: str, init: str = "") -> str:
    """A subclass of `Linear` with this forward; its lines count from the end of `HEADER`."""
    init = f"    def __init__(self):\n        super().__init__()\n        {init}\n" if init else ""
    return f"class Net(Linear):\n{init}    def forward(self, x):\n        {forward}\n"


LINE = HEADER.count("\n") + 3
"""The line of the file that holds the body of a `_net` without init."""


@pytest.fixture(autouse=True)
def _in_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    path = list(sys.path)
    yield
    sys.path[:] = path


# --- a model with all there is --------------------------------------------------------------------------------------

TEXTS = """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv1d(1, 4, 3, padding=1), nn.BatchNorm1d(4))
        self.embed = nn.Embedding(10, 4)
        self.scale = nn.Parameter(torch.full((4,), 0.5))
        self.drop = nn.Dropout(0.9)

    def forward(self, ids, wave, unused=None):
        words = self.embed(ids) * self.scale
        sound = torch.relu(self.stem(wave[:, None]).mean(2))
        return {"logits": self.drop(words.sum(1) + sound), "nothing": None, "every": words[:, ::2], "pair": (sound, ids)}

def texts(seed):
    draw = np.random.default_rng(seed)
    for _ in range(6):
        yield {"ids": draw.integers(0, 10, (1, 4)), "wave": draw.normal(size=(1, 8)).astype(np.float32)}

def calibration():
    yield from texts(1)

def validation():
    yield from texts(2)
"""
TEXT_INPUTS = 'ids = { dtype = "int64", shape = ["batch", "seq"] }\nwave = { shape = ["batch", 8] }'
TEXT_AXES = "batch = { min = 1, opt = 2, max = 5 }\nseq = { min = 1, opt = 4, max = 9 }"


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Case, OnnxModel]:
    case = _case(tmp_path_factory.mktemp("texts"), TEXTS, inputs=TEXT_INPUTS, axes=TEXT_AXES)
    return case, case.export()


def test_the_interface_has_the_names_and_axes_of_the_recipe(texts: tuple[Case, OnnxModel]) -> None:
    case, model = texts
    assert model.inputs == case.recipe.inputs
    assert [(spec.name, spec.dtype, spec.shape) for spec in model.outputs] == [
        ("logits", "float32", ("batch", 4)),
        ("every", "float32", ("batch", "((seq + 1)//2)", 4)),
        ("pair_0", "float32", ("batch", 4)),
        ("pair_1", "int64", ("batch", "seq")),
    ]
    assert (model.opset, model.precision, model.axes) == (20, "fp32", case.recipe.axes)
    assert model.notes == ()


def test_the_exported_model_computes_what_the_original_computes_at_sizes_never_traced(
    texts: tuple[Case, OnnxModel],
) -> None:
    case, model = texts
    original = open_original(case.recipe, case.sources, threads=1, open_model=open_model)
    exported = open_model(model.path)
    draw = np.random.default_rng(3)
    for batch, seq in ((1, 1), (5, 9), (4, 6), (1, 8)):
        feeds: dict[str, Any] = {
            "ids": draw.integers(0, 10, (batch, seq)),
            "wave": draw.normal(size=(batch, 8)).astype(np.float32),
        }
        expected, found = original.run(feeds), exported.run(feeds)
        assert list(expected) == list(found)
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-6)
            assert found[name].dtype == value.dtype


def test_weights_and_nodes_have_the_names_of_their_modules(texts: tuple[Case, OnnxModel]) -> None:
    graph = ir.load(texts[1].path).graph
    assert {"stem.0.weight", "stem.0.bias", "embed.weight", "model.scale"} >= {
        name for name in graph.initializers if "." in name
    }
    names = [node.name for node in graph]
    assert {"stem.0/Conv", "embed/Gather"} <= set(names)
    assert len(set(names)) == len(names)


def test_the_file_says_nothing_of_the_machine_and_is_the_same_each_time(texts: tuple[Case, OnnxModel]) -> None:
    case, model = texts
    content = model.path.read_bytes()
    assert str(case.folder).encode() not in content
    assert b"stack_trace" not in content
    again = case.export()
    assert again.sha256 == model.sha256
    assert again.probe is not None
    assert model.probe is not None
    assert again.probe.read_bytes() == model.probe.read_bytes()


def test_the_probe_is_real_samples_at_the_optimum(texts: tuple[Case, OnnxModel]) -> None:
    assert texts[1].probe is not None
    with np.load(texts[1].probe) as probe:
        assert {name: value.shape for name, value in probe.items()} == {"ids": (2, 4), "wave": (2, 8)}
        first = next(iter(source.load_module(texts[0].folder / "m.py").calibration()))
        assert probe["wave"][0].tolist() == first["wave"][0].tolist()


def test_what_torch_says_goes_to_the_log(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    done: list[tuple[int, int]] = []
    case = _case(tmp_path, _net("print('in forward'); return self.fc(x)"))
    model = case.export(progress=lambda number, total: done.append((number, total)))
    printed = capfd.readouterr()
    assert "torch" not in printed.out + printed.err
    assert "in forward" in (model.path.parent / "export.log").read_text()
    assert done == [(number, 4) for number in range(5)], "three points: minimum, optimum, maximum"


# --- results of forward ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("forward", "more", "names"),
    [
        ("return self.fc(x)", "", ["output_0"]),
        ("return self.fc(x)", 'outputs = ["logits"]', ["logits"]),
        ("return self.fc(x), [x + 1, None]", "", ["output_0", "output_1_0"]),
        ("return {'a': self.fc(x), 'b': x * 2, 'c': x}", 'outputs = ["b", "a"]', ["b", "a"]),
        ("return {'a': self.fc(x), 'b': x * 2}", 'outputs = ["first", "second"]', ["first", "second"]),
        ("return Both(self.fc(x), x * 2)", "", ["left", "right"]),
        ("return Named(self.fc(x), (x * 2,))", "", ["one", "two_0"]),
    ],
)
def test_outputs_are_named(tmp_path: Path, forward: str, more: str, names: list[str]) -> None:
    kinds = (
        "from typing import NamedTuple\n@dataclass\nclass Both:\n    left: torch.Tensor\n    right: torch.Tensor\n"
        "class Named(NamedTuple):\n    one: torch.Tensor\n    two: tuple\n"
    )
    case = _case(tmp_path, kinds + _net(forward), more=more)
    runner = open_original(case.recipe, case.sources, threads=1, open_model=open_model)
    x = np.asarray([[1, 0, 0], [0, 1, 0]], np.float32)
    found = runner.run({"x": x})
    assert list(found) == names
    assert [spec.name for spec in runner.outputs] == names
    assert all(spec.shape[0] == "batch" for spec in runner.outputs)
    assert any(np.array_equal(value, x @ WEIGHT.T + BIAS) for value in found.values())


@pytest.mark.parametrize(
    ("forward", "more", "message"),
    [
        ("return 3", "", "forward() returns a int; tensors, or tuples, dicts or dataclasses of them, were expected. Return tensors only."),
        ("return {'a': x, 'n': 'x'}", "", "forward() returns a str as 'n'; tensors, or tuples, dicts or dataclasses of them, were expected. Return tensors only."),
        ("return (None,)", "", "forward() returns no tensor; at least one was expected. Return one."),
        ("return {'a_b': x, 'a': {'b': x}}", "", "forward() returns two tensors named 'a_b'; different names were expected. Rename one."),
        ("return x, x", 'outputs = ["y"]', "forward() returns 2 tensors (output_0, output_1); [model] outputs names 1 (y). Name all of them, or use their own names to choose."),
        ("return {'x': self.fc(x)}", "", "output 'x' has the name of an input; different names were expected. Name the outputs in [model] outputs."),
    ],
)  # fmt: skip
def test_results_that_cannot_be_outputs_are_refused(tmp_path: Path, forward: str, more: str, message: str) -> None:
    assert _case(tmp_path, _net(forward), more=more).refused() == f"m.py: {message}"


# --- building the original ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def build():\n    return 3", "m.py: build() returned a int; a torch.nn.Module was expected. Return the model."),
        ("def build():\n    raise ValueError('boom')", f"m.py:{LINE - 1}: build() raised ValueError: boom. Fix the file; the full traceback is in the log."),
        ("def make(): ...", "m.py: no 'build'; a function build() that returns the model was expected. Define it."),
        ("class Net(nn.Module):\n    def forward(self, image, mask=None): ...", "m.py: forward() of Net has no parameter 'x'; expected one of image, mask. Rename [model.inputs.x]."),
        ("class Net(nn.Module):\n    def forward(self, x, mask): ...", "m.py: forward() of Net needs 'mask', and the recipe has only x. Add [model.inputs.mask], or give it a default."),
        (_net("return self.fc(x)", "self.fc.weight.data[0, 1] = float('nan'); self.fc.weight.data[1, 1] = float('inf')"), "m.py: parameter 'fc.weight': 2 of 6 values are NaN or Inf; finite weights were expected. Train or convert the model again."),
        (_net("return self.fc(x)", "self.register_buffer('table', torch.tensor([1.0, float('nan')]))"), "m.py: buffer 'table': 1 of 2 values are NaN or Inf; finite weights were expected. Train or convert the model again."),
        (_net("return self.fc(x[:, :2])"), f"batch=2: m.py:{LINE}: forward() raised RuntimeError: mat1 and mat2 shapes cannot be multiplied (2x2 and 3x2). Fix the file; the full traceback is in the log."),
    ],
)  # fmt: skip
def test_a_model_that_cannot_be_built_is_refused(tmp_path: Path, text: str, message: str) -> None:
    assert _case(tmp_path, text).refused() == message


def test_a_mask_of_infinities_is_no_broken_weight(tmp_path: Path) -> None:
    case = _case(tmp_path, _net("return self.fc(x)", "self.register_buffer('mask', torch.tensor([float('-inf')]))"))
    open_original(case.recipe, case.sources, threads=1, open_model=open_model)


def test_with_a_sample_at_hand_the_users_data_is_not_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = _case(tmp_path, _net("return self.fc(x)"))
    monkeypatch.setattr("compiler.original.first_samples", lambda *args: pytest.fail("calibration() may take its time"))
    options: dict[str, Any] = {"threads": 1, "open_model": open_model}
    runner = open_original(case.recipe, case.sources, **options, sample={"x": np.zeros((1, 3), np.float32)})
    assert [spec.name for spec in runner.outputs] == ["output_0"]


def test_a_keyword_argument_takes_any_input(tmp_path: Path) -> None:
    case = _case(
        tmp_path, "class Net(Linear):\n    def forward(self, **inputs):\n        return self.fc(inputs['x'])\n"
    )
    runner = open_original(case.recipe, case.sources, threads=1, open_model=open_model)
    assert runner.run({"x": np.zeros((1, 3), np.float32)})["output_0"].tolist() == [BIAS.tolist()]


def test_random_weights_are_the_same_in_every_process(tmp_path: Path) -> None:
    """Two loads in one process, with other draws between them, stand for two processes."""
    net = _net(
        "return self.fc(x) + self.extra",
        "self.extra = nn.Parameter(torch.randn(2) + float(np.random.rand()) + __import__('random').random())",
    )
    case = _case(tmp_path, net)
    results = []
    for _ in range(2):
        runner = open_original(case.recipe, case.sources, threads=1, open_model=open_model)
        results.append(runner.run({"x": np.zeros((1, 3), np.float32)})["output_0"].tolist())
        torch.rand(3)
        np.random.rand(3)
    assert results[0] == results[1]


def test_half_precision_weights_are_run_in_fp32_and_noted(tmp_path: Path) -> None:
    model = _case(tmp_path, _net("return self.fc(x)") + "def build():\n    return Net().bfloat16()\n").export()
    assert model.notes == ("the original has weights in half precision: it is exported and run in FP32",)


def _weights(tmp_path: Path, name: str, state: Any) -> Case:
    if name.endswith(".safetensors"):
        safetensors.torch.save_file(state, tmp_path / name)
    else:
        torch.save(state, tmp_path / name)
    return _case(tmp_path, _net("return self.fc(x)"), more=f'weights = "{name}"')


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt", "w.pth"])
def test_weights_are_loaded_strictly(tmp_path: Path, name: str) -> None:
    good = {"fc.weight": torch.zeros(2, 3), "fc.bias": torch.tensor([3.0, 4.0])}
    case = _weights(tmp_path, name, good)
    runner = open_original(case.recipe, case.sources, threads=1, open_model=open_model)
    assert runner.run({"x": np.ones((1, 3), np.float32)})["output_0"].tolist() == [[3, 4]]
    assert _weights(tmp_path, name, {"fc.weight": good["fc.weight"]}).refused() == (
        f"{name}: 'fc.bias' is missing; every parameter and buffer of Net was expected. Save the weights of this very "
        "model."
    )
    assert _weights(tmp_path, name, {"fc.weight": good["fc.weight"], "fc.bais": good["fc.bias"]}).refused() == (
        f"{name}: 'fc.bais' is not in Net; did you mean 'fc.bias'? Save the weights of this very model."
    )
    assert _weights(tmp_path, name, good | {"a": torch.zeros(1), "b": torch.zeros(1)}).refused() == (
        f"{name}: 'a' and 1 more are not in Net; the names of its state_dict() were expected. Save the weights of this "
        "very model."
    )
    assert _weights(tmp_path, name, good | {"fc.bias": torch.zeros(3)}).refused() == (
        f"{name}: 'fc.bias' has shape [3]; [2] was expected. Save the weights of this very model."
    )
    assert _weights(tmp_path, name, good | {"fc.bias": torch.tensor([1.0, float("inf")])}).refused() == (
        f"{name}: parameter 'fc.bias': 1 of 2 values are NaN or Inf; finite weights were expected. Train or convert the "
        "model again."
    )


def test_a_tied_weight_is_stored_once(tmp_path: Path) -> None:
    """As `safetensors.torch.save_model` does."""
    state = {"fc.weight": torch.ones(2, 3), "fc.bias": torch.zeros(2)}
    safetensors.torch.save_file(state, tmp_path / "w.safetensors")
    case = _case(
        tmp_path,
        _net(
            "return self.fc(x) + self.twin(x)",
            "self.twin = nn.Linear(3, 2, bias=False); self.twin.weight = self.fc.weight",
        ),
        more='weights = "w.safetensors"',
    )
    runner = open_original(case.recipe, case.sources, threads=1, open_model=open_model)
    assert runner.run({"x": np.ones((1, 3), np.float32)})["output_0"].tolist() == [[6, 6]]


class Trap:
    """Unpickling it leaves a file behind."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.marker),))


def test_pickled_code_is_never_run(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    message = _weights(tmp_path, "w.pt", {"fc.weight": Trap(marker)}).refused()
    assert message == (
        "w.pt: holds a pickled posix.mkdir; a state dict of plain tensors was expected. Save it with "
        "safetensors.torch.save_model, or torch.save(model.state_dict(), path)."
    )
    assert not marker.exists()
    (tmp_path / "w.pt").write_bytes(b"garbage")
    message = _case(tmp_path, _net("return self.fc(x)"), more='weights = "w.pt"').refused()
    assert message == (
        "w.pt: holds pickled objects; a state dict of plain tensors was expected. Save it with "
        "safetensors.torch.save_model, or torch.save(model.state_dict(), path)."
    )


def test_weights_that_are_no_state_dict_are_refused(tmp_path: Path) -> None:
    assert _weights(tmp_path, "w.pt", {"state_dict": {}, "epoch": 3}).refused() == (
        "w.pt: holds a dict that is not a state dict; names with a tensor each were expected. Save model.state_dict() "
        "alone."
    )
    case = _weights(tmp_path, "w.safetensors", {"fc.weight": torch.zeros(1)})
    (tmp_path / "w.safetensors").write_bytes(b"garbage")
    assert case.refused() == (
        "w.safetensors: Error while deserializing header: header too small; a state dict of plain tensors was expected. "
        "Save it with safetensors.torch.save_model, or torch.save(model.state_dict(), path)."
    )


def test_a_callable_of_a_package_builds_the_model(tmp_path: Path) -> None:
    package = tmp_path / "wood_q"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "nets.py").write_text("from torch import nn\ndef make():\n    return nn.Sequential(nn.Linear(3, 2))\n")
    case = _case(tmp_path, name="wood_q.nets:make", inputs='input = { shape = ["batch", 3] }')
    (tmp_path / "m.py").write_text(HEADER.replace('{"x": row}', '{"input": row}'))
    assert [spec.name for spec in case.export().outputs] == ["output_0"]
    (package / "nets.py").write_text("def make():\n    return None\n")
    sys.modules.pop("wood_q.nets")
    assert case.refused() == (
        "wood_q/nets.py: make() returned a NoneType; a torch.nn.Module was expected. Return the model."
    )


# --- what the exporter cannot do, or does without a word ------------------------------------------------------------


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        ("return self.fc(x) if x.sum() > -1e9 else x", f"m.py:{LINE}: forward() branches on the values of a tensor, or makes a Python number of them; an export follows one path for all inputs. Use torch.where, or torch.cond for two whole branches."),
        ("return self.fc(x) + torch.special.airy_ai(x)[:, :2]", f"m.py:{LINE}: the operator special_airy_ai has no ONNX form at opset 20; operators that have one were expected. Replace it, or choose another [export] opset."),
        ("return sum(self.fc(x) for _ in range(x.shape[0]))", "m.py: axis 'batch' of 'x' is fixed to 2; sizes 1 to 5 were expected. Look in forward() for Python code that reads the size (if, range, int), and write it with tensor operations; or narrow the axis."),
        ("return self.fc(x) * 2 if x.shape[0] > 4 else self.fc(x)", "m.py: axis 'batch' of 'x' is limited to sizes 0 to 4; sizes 1 to 5 were expected. Look in forward() for Python code that reads the size (if, range, int), and write it with tensor operations; or narrow the axis."),
    ],
)  # fmt: skip
def test_code_that_one_graph_cannot_hold_is_named_with_its_line(tmp_path: Path, forward: str, message: str) -> None:
    case = _case(tmp_path, _net(forward))
    assert case.refused() == message
    assert (tmp_path / "out0" / "export.log").exists()


def test_an_exporter_that_breaks_otherwise_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("inner matters.\nand much more")

    monkeypatch.setattr(torch.onnx, "export", broken)
    message = _case(tmp_path, _net("return self.fc(x)")).refused()
    assert message.endswith(
        ": torch cannot export forward(): AssertionError: inner matters. Rewrite that part of the model with plain tensor "
        "operations; the full traceback is in the log."
    )
    assert "Traceback" in (tmp_path / "out0" / "export.log").read_text()


def test_one_array_fed_to_two_inputs_makes_two_inputs(tmp_path: Path) -> None:
    """The user's own samples hold the same array object twice."""
    text = """
class Net(nn.Module):
    def forward(self, a, b):
        return a - 2 * b

def calibration():
    for x in rows(1):
        yield {"a": x["x"], "b": x["x"]}
"""
    case = _case(tmp_path, text, inputs='a = { shape = ["batch", 3] }\nb = { shape = ["batch", 3] }')
    model = case.export()
    assert [spec.name for spec in model.inputs] == ["a", "b"]
    a, b = np.full((3, 3), 5, np.float32), np.full((3, 3), 1, np.float32)
    assert open_model(model.path).run({"a": a, "b": b})["output_0"].max() == 3


def test_merged_inputs_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: an exporter that loses an input, as it does when one tensor is passed twice."""
    text = "class Net(nn.Module):\n    def forward(self, a, b):\n        return a + b\n"
    text += "def calibration():\n    yield {'a': np.ones((1, 3), np.float32), 'b': np.ones((1, 3), np.float32)}\n"
    case = _case(tmp_path, text, inputs='a = { shape = ["batch", 3] }\nb = { shape = ["batch", 3] }')

    def lose(program: Any) -> None:
        program.model.graph.inputs.pop()

    _tamper(monkeypatch, lose)
    assert case.refused() == (
        "m.py: the exported model has inputs a; a, b were expected. Give each input its own parameter of forward(), and "
        "use it there."
    )


def _tamper(monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    """Change what the exporter returns."""
    real = torch.onnx.export

    def tampered(*args: Any, **kwargs: Any) -> Any:
        program = real(*args, **kwargs)
        change(program)
        return program

    monkeypatch.setattr(torch.onnx, "export", tampered)


def test_a_planted_constant_is_caught_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bias is 1 and -1; the planted one 1 and -1.25."""

    def change(program: Any) -> None:
        for value in program.model.graph.initializers.values():
            if value.name.endswith("bias"):
                value.const_value = ir.tensor(np.asarray([1, -1.25], np.float32), name=value.name)

    _tamper(monkeypatch, change)
    message = _case(tmp_path, _net("return {'logits': self.fc(x)}")).refused()
    assert message.startswith("output 'logits' at batch=2: the ONNX model and the original differ by 0.25 (at [")
    assert message.endswith(
        " was expected (rtol 0.001, atol 0.0001). Look in forward() for Python code that depends on sizes or values (if, "
        "int, .item()), or loosen [export] rtol and atol."
    )


def test_a_difference_at_one_extreme_only_is_caught_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: rows beyond the fourth are cut off, which shows at the maximum of 5 alone."""

    def change(program: Any) -> None:
        graph = program.model.graph
        inner = graph.outputs[0]
        limits = []
        for name, content in (("start", [0]), ("end", [4]), ("axis", [0])):
            limits.append(ir.Value(name=name, const_value=ir.tensor(np.asarray(content), name=name)))
            graph.initializers[name] = limits[-1]
        cut = ir.Node("", "Slice", [inner, *limits])
        cut.outputs[0].shape, cut.outputs[0].type = inner.shape, inner.type
        inner.name, cut.outputs[0].name = "inner", inner.name
        graph.append(cut)
        graph.outputs[0] = cut.outputs[0]

    _tamper(monkeypatch, change)
    assert _case(tmp_path, _net("return self.fc(x)")).refused() == (
        "output 'output_0' at batch=5: the ONNX model and the original differ in shape: [4, 2] instead of [5, 2]. Look in "
        "forward() for Python code that depends on sizes or values (if, int, .item()), or loosen [export] rtol and atol."
    )


def test_names_that_the_exporter_uses_itself_may_be_used(tmp_path: Path) -> None:
    """It calls its own values ``embedding``, ``relu`` and ``linear``, and parameters by their names."""
    text = """
class Net(Linear):
    def forward(self, relu, linear):
        inner = self.fc(relu)
        return {"relu_1": torch.relu(inner), "embedding": torch.relu(inner) * 2, "fc.bias": linear, "add": inner + 1}

def calibration():
    for x in rows(1):
        yield {"relu": x["x"], "linear": x["x"] + 1}
"""
    case = _case(tmp_path, text, inputs='relu = { shape = ["batch", 3] }\nlinear = { shape = ["batch", 3] }')
    model = case.export()
    onnx.checker.check_model(str(model.path), full_check=True)
    assert [spec.name for spec in model.outputs] == ["relu_1", "embedding", "fc.bias", "add"]
    graph = ir.load(model.path).graph
    names = [value.name for node in graph for value in node.outputs] + [
        *graph.initializers,
        *(v.name for v in graph.inputs),
    ]
    assert len(set(names)) == len(names)


def test_outputs_that_are_inputs_or_one_another_are_values_of_their_own(tmp_path: Path) -> None:
    model = _case(tmp_path, _net("y = self.fc(x); return {'a': x, 'b': y, 'c': y, 'd': self.fc.bias}")).export()
    x = np.asarray([[1, 2, 3]], np.float32)
    found = open_model(model.path).run({"x": x})
    assert list(found) == ["a", "b", "c", "d"]
    assert found["a"].tolist() == x.tolist()
    assert found["b"].tolist() == found["c"].tolist() == (x @ WEIGHT.T + BIAS).tolist()
    assert found["d"].tolist() == BIAS.tolist()


def test_an_output_that_got_lost_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: the exported file calls it otherwise."""
    real = onnx_files.write

    def rename(model: ir.Model, path: Path, **options: Any) -> Any:
        model.graph.outputs[0].name = "other"
        return real(model, path, **options)

    monkeypatch.setattr(onnx_files, "write", rename)
    assert _case(tmp_path, _net("return self.fc(x)")).refused() == (
        "the exported model has no output 'output_0'; found other. Give [model] outputs other names."
    )


def test_where_the_exporters_optimiser_breaks_a_model_it_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted: only an optimised export has a wrong bias."""
    real: Any = torch.onnx.export

    def tampered(*args: Any, **kwargs: Any) -> Any:
        program = real(*args, **kwargs)
        for value in program.model.graph.initializers.values():
            if value.name.endswith("bias") and kwargs["optimize"]:
                value.const_value = ir.tensor(np.asarray([1, 1], np.float32), name=value.name)
        return program

    monkeypatch.setattr(torch.onnx, "export", tampered)
    model = _case(tmp_path, _net("return self.fc(x)")).export()
    assert open_model(model.path).run({"x": np.zeros((1, 3), np.float32)})["output_0"].tolist() == [BIAS.tolist()]
    assert len(model.notes) == 1
    assert model.notes[0].startswith(
        "exported without torch's own optimisation of the graph, which broke it: output 'output_0' at batch=2: the ONNX "
        "model and the original differ by 2 "
    )


def test_where_the_exporter_refuses_ranges_it_gets_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: it takes no `Dim`."""
    real: Any = torch.onnx.export

    def refuse(*args: Any, **kwargs: Any) -> Any:
        if kwargs["dynamic_shapes"] != (({0: "batch"},),):
            raise ValueError("Constraints violated (batch)!")
        return real(*args, **kwargs)

    monkeypatch.setattr(torch.onnx, "export", refuse)
    model = _case(tmp_path, _net("return self.fc(x)")).export()
    assert model.outputs[0].shape == ("batch", 2)
    assert model.notes == ("the exporter did not take the axes' ranges; it took their names",)


def test_an_exported_model_that_the_runtime_refuses_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, **options: Any) -> Any:
        raise BuildError("model.onnx: no kernel")

    monkeypatch.setitem(globals(), "open_model", refuse)
    assert _case(tmp_path, _net("return self.fc(x)")).refused() == "the exported model: model.onnx: no kernel"

    class Failing:
        def run(self, feeds: Any) -> Any:
            raise BuildError("model.onnx: out of memory")

        def close(self) -> None: ...

    monkeypatch.setitem(globals(), "open_model", lambda path, **options: Failing())
    assert _case(tmp_path, _net("return self.fc(x)")).refused() == (
        "the exported model at batch=2: model.onnx: out of memory"
    )


def test_a_model_that_fails_at_an_extreme_is_named_with_the_point(tmp_path: Path) -> None:
    """Torch traces it; the original itself refuses the maximum."""
    text = _net("assert torch.compiler.is_exporting() or len(x) < 5, 'too many'; return self.fc(x)")
    assert _case(tmp_path, text).refused() == (
        f"batch=5: m.py:{LINE}: forward() raised AssertionError: too many. Fix the file; the full traceback is in the log."
    )


def test_a_model_that_is_not_repeatable_is_refused(tmp_path: Path) -> None:
    message = _case(tmp_path, _net("return torch.dropout(self.fc(x), 0.5, True)")).refused()
    assert message.startswith("output 'output_0' at batch=2: two runs of the original on the same input differ by ")
    assert message.endswith(
        ". Remove what is random in forward() (torch.rand, or F.dropout without training=self.training)."
    )


def test_a_model_that_repeats_within_tolerance_is_noted(tmp_path: Path) -> None:
    text = _net("self.calls += 1e-5; return self.fc(x) + self.calls", "self.calls = 0.0")
    assert _case(tmp_path, text).export().notes == (
        "output 'output_0': two runs of the original differ in the last bits",
    )


def test_a_model_of_nothing_but_nan_is_refused(tmp_path: Path) -> None:
    assert _case(tmp_path, _net("return (x - 1e9).log()")).refused() == (
        "output 'output_0' at batch=2: every value of the original is NaN on real samples; numbers were expected. Check "
        "the weights, and how the data are scaled."
    )


def test_a_point_too_large_is_left_out_and_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the optimum of 2 the largest tensor, the input, has 6 elements; at 5 it has 15."""
    monkeypatch.setattr(export, "MAX_POINT_ELEMENTS", 14)
    model = _case(tmp_path, _net("return self.fc(x)")).export()
    assert model.notes == ("not compared at batch=5: a tensor would have about 1.5e+01 elements (limit 1.4e+01)",)
    monkeypatch.setattr(export, "MAX_POINT_ELEMENTS", 0)
    notes: list[str] = []
    assert export._points_within_reach(_case(tmp_path).recipe, 6, notes) == [{"batch": 1}], "never nothing at all"
    assert len(notes) == 2


def test_weights_above_a_limit_go_to_a_file_of_their_own(tmp_path: Path) -> None:
    case = _case(tmp_path, _net("return self.big(self.fc(x))", "self.big = nn.Linear(2, 4096)"))
    model = case.export(external_above=1000)
    assert [path.name for path in model.external_data] == ["model.onnx.data"]
    assert open_model(model.path).run({"x": np.ones((1, 3), np.float32)})["output_0"].shape == (1, 4096)


def test_fixed_axes_need_no_dynamic_ones(tmp_path: Path) -> None:
    """No axis at all, and an axis of one size."""
    text = _net("return self.fc(x)")
    model = _case(tmp_path, text, inputs="x = { shape = [1, 3] }", axes="").export()
    assert model.outputs[0].shape == (1, 2)
    model = _case(tmp_path, text, axes="batch = { min = 1, opt = 1, max = 1 }").export()
    assert model.inputs[0].shape == ("batch", 3)
    assert model.outputs[0].shape == (1, 2)


def test_sizes_that_the_model_takes_only_in_steps_are_exported(tmp_path: Path) -> None:
    """Traced at the optimum, as primes do not divide by 4."""
    text = """
class Net(nn.Module):
    def forward(self, x):
        return x.reshape(x.shape[0], -1, 4).sum(2)

def calibration():
    for row in np.random.default_rng(1).normal(size=(4, 1, 8)).astype(np.float32):
        yield {"x": row}
"""
    axes = "batch = { min = 1, opt = 2, max = 5 }\nwide = { min = 4, opt = 8, max = 16 }"
    case = _case(tmp_path, text, inputs='x = { shape = ["batch", "wide"] }', axes=axes)
    runner = open_original(case.recipe, case.sources, threads=1, open_model=open_model)
    assert [spec.shape for spec in runner.outputs] == [("batch", "?")]
    model = case.export()
    assert open_model(model.path).run({"x": np.ones((3, 12), np.float32)})["output_0"].tolist() == [[4.0] * 3] * 3


# --- other sources --------------------------------------------------------------------------------------------------


def _program(folder: Path) -> None:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = torch.nn.Linear(3, 2)

        def forward(self, x: torch.Tensor, scale: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"y": self.fc(x) * scale[:, None]}

    batch = torch.export.Dim("b", min=1, max=64)
    example = (torch.randn(3, 3), torch.ones(3))
    shapes = {"x": {0: batch}, "scale": {0: batch}}
    torch.export.save(torch.export.export(Net().eval(), example, dynamic_shapes=shapes), folder / "m.pt2")


PROGRAM_DATA = "def calibration():\n    for x in rows(1):\n        yield x | {'scale': np.full(1, 2, np.float32)}\n"


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_saved_program_is_exported_with_its_inputs_by_name(tmp_path: Path) -> None:
    _program(tmp_path)
    inputs = 'scale = { shape = ["batch"] }\nx = { shape = ["batch", 3] }'
    case = _case(tmp_path, PROGRAM_DATA, name="m.pt2", inputs=inputs)
    model = case.export()
    assert [spec.name for spec in model.inputs] == ["scale", "x"]
    assert [(spec.name, spec.shape) for spec in model.outputs] == [("y", ("batch", 2))]
    feeds = {"x": np.ones((4, 3), np.float32), "scale": np.asarray([0, 1, 2, 3], np.float32)}
    found = open_model(model.path).run(feeds)["y"]
    np.testing.assert_allclose(found[3], found[1] * 3, rtol=1e-5)
    case = _case(
        tmp_path, PROGRAM_DATA.replace("'scale'", "'scales'"), name="m.pt2", inputs=inputs.replace("scale", "scales")
    )
    assert case.refused() == "m.pt2: inputs x, scale; found scales, x in the recipe. 'scales': did you mean 'scale'?"
    case = _case(tmp_path, name="m.pt2")
    assert case.refused() == "m.pt2: inputs x, scale; found x in the recipe. Add what is missing to [model.inputs]."


def test_a_program_that_is_none_or_holds_pickled_code_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "0")
    (tmp_path / "m.pt2").write_bytes(b"garbage")
    inputs = 'scale = { shape = ["batch"] }\nx = { shape = ["batch", 3] }'
    case = _case(tmp_path, PROGRAM_DATA, name="m.pt2", inputs=inputs)
    assert case.refused() == (
        "m.pt2: File is not a zip file; a program saved by torch.export.save was expected, without pickled objects. Save "
        "it again with this version of torch."
    )
    _program(tmp_path)
    evil = io.BytesIO()
    torch.save({"x": Trap(tmp_path / "marker")}, evil)
    with zipfile.ZipFile(tmp_path / "m.pt2") as archive:
        content = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(tmp_path / "m.pt2", "w") as archive:
        for name, raw in content.items():
            archive.writestr(name, evil.getvalue() if name.endswith("model.pt") else raw)
    assert case.refused() == (
        "m.pt2: holds a pickled posix.mkdir; a program saved by torch.export.save was expected, without pickled objects. "
        "Save it again with this version of torch."
    )
    assert not (tmp_path / "marker").exists()
    assert os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] == "0", "as it was"


def _onnx(folder: Path, *, weight: Any = WEIGHT.T, batch: Any = "N", dtype: int = 1) -> None:
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", dtype, [batch, 3])],
        [helper.make_tensor_value_info("y", dtype, [batch, 2])],
        [numpy_helper.from_array(np.asarray(weight, np.float32 if dtype == 1 else np.float64), "w")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), folder / "m.onnx")


def test_an_onnx_file_is_taken_over_with_the_recipes_axes(tmp_path: Path) -> None:
    _onnx(tmp_path)
    case = _case(tmp_path, name="m.onnx")
    model = case.export()
    assert (model.opset, model.inputs[0].shape, model.outputs[0].shape) == (17, ("batch", 3), ("batch", 2))
    assert model.path.parent != tmp_path
    x = np.asarray([[1, 0, 0]], np.float32)
    assert open_model(model.path).run({"x": x})["y"].tolist() == [[1, 4]]
    runner = open_original(case.recipe, case.sources, threads=1, open_model=open_model)
    assert runner.run({"x": x})["y"].tolist() == [[1, 4]]
    assert case.reference().samples == 4
    with pytest.raises(ExportError) as caught:
        compiled(runner, case.sources)
    assert caught.value.message == (
        "m.onnx: an ONNX file; a PyTorch model was expected for torch.compile. Set [latency] compile = false."
    )


def test_an_onnx_file_keeps_its_opset(tmp_path: Path) -> None:
    _onnx(tmp_path)
    case = _case(tmp_path, name="m.onnx")
    asked = recipe.load(tmp_path / "r.toml", ["export.opset=20"])
    model = Case(tmp_path, asked, case.sources).export()
    assert (model.opset, model.notes) == (
        17,
        ("opset 17 kept, where the recipe asks for 20: an ONNX source is not converted",),
    )


@pytest.mark.parametrize(
    ("file", "inputs", "more", "message"),
    [
        ({}, 'X = { shape = ["batch", 3] }', "", "no input 'X'; expected one of x. Rename [model.inputs.X]."),
        ({}, 'x = { shape = ["batch", 4] }', "", "input 'x' is float32 [N, 3]; the recipe has float32 [batch, 4]. Correct [model.inputs.x]."),
        ({}, 'x = { shape = ["batch"] }', "", "input 'x' is float32 [N, 3]; the recipe has float32 [batch]. Correct [model.inputs.x]."),
        ({"dtype": 11}, 'x = { shape = ["batch", 3] }', "", "input 'x' is float64 [N, 3]; the recipe has float32 [batch, 3]. Correct [model.inputs.x]."),
        ({"batch": 2}, 'x = { shape = ["batch", 3] }', "", "input 'x' is float32 [2, 3]; the recipe has float32 [batch, 3]. Correct [model.inputs.x]."),
        ({"weight": np.full((3, 2), np.nan)}, 'x = { shape = ["batch", 3] }', "", "initializer 'w': 6 of 6 values are NaN; numbers were expected. Export the model again."),
        ({}, 'x = { shape = ["batch", 3] }', 'outputs = ["z"]', "outputs y; [model] outputs has z. An ONNX source keeps its own names: remove [model] outputs."),
    ],
)  # fmt: skip
def test_an_onnx_file_that_does_not_fit_the_recipe_is_refused(
    tmp_path: Path, file: dict[str, Any], inputs: str, more: str, message: str
) -> None:
    _onnx(tmp_path, **file)
    case = _case(tmp_path, name="m.onnx", inputs=inputs, more=more)
    name = inputs[0]
    shape = {'x = { shape = ["batch"] }': "(1,)", 'x = { shape = ["batch", 4] }': "(1, 4)"}.get(inputs, "(1, 3)")
    (tmp_path / "m.py").write_text(
        f"import numpy as np\ndef calibration():\n    yield {{{name!r}: np.ones({shape}, np.float32)}}\n"
    )
    assert case.refused() == f"m.onnx: {message}"


def test_an_input_of_an_onnx_file_that_the_recipe_lacks_is_named(tmp_path: Path) -> None:
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "z"], ["y"])],
        "g",
        [helper.make_tensor_value_info(name, 1, ["N", 3]) for name in "xz"],
        [helper.make_tensor_value_info("y", 1, ["N", 3])],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "m.onnx")
    assert _case(tmp_path, name="m.onnx").refused() == (
        "m.onnx: its input 'z' is not in the recipe, which has x. Add [model.inputs.z]."
    )


HF_DATA = """
def calibration():
    draw = np.random.default_rng(1)
    for _ in range(4):
        yield {"input_ids": draw.integers(0, 50, (1, 6)), "attention_mask": np.asarray([[1, 1, 1, 1, 1, 0]])}

def validation():
    draw = np.random.default_rng(2)
    for _ in range(4):
        yield {"input_ids": draw.integers(0, 50, (1, 6)), "attention_mask": np.ones((1, 6), np.int64)}
"""
HF_INPUTS = "\n".join(
    f'{name} = {{ dtype = "int64", shape = ["batch", "seq"] }}' for name in ("input_ids", "attention_mask")
)
HF_AXES = "batch = { min = 1, opt = 2, max = 3 }\nseq = { min = 2, opt = 6, max = 16 }"


def _bert(folder: Path, kind: str = "BertModel") -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=16,
    )  # fmt: skip
    torch.manual_seed(1)
    getattr(transformers, kind)(config).save_pretrained(folder / "bert")


def _hf(folder: Path, more: str = "") -> Case:
    return _case(folder, HF_DATA, name="hf:bert", inputs=HF_INPUTS, axes=HF_AXES, more=more)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_a_hugging_face_folder_is_exported(tmp_path: Path) -> None:
    _bert(tmp_path)
    model = _hf(tmp_path).export()
    assert model.inputs == _hf(tmp_path).recipe.inputs
    assert [(spec.name, spec.shape) for spec in model.outputs] == [
        ("last_hidden_state", ("batch", "seq", 8)),
        ("pooler_output", ("batch", 8)),
    ]
    names = {node.name for node in ir.load(model.path).graph}
    assert any(str(name).startswith("encoder.layer.0.") for name in names)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_weights_that_a_hugging_face_model_lacks_are_not_made_up(tmp_path: Path) -> None:
    _bert(tmp_path, "BertForMaskedLM")
    case = _hf(tmp_path)
    runner = open_original(case.recipe, case.sources, threads=1, open_model=open_model)
    assert [spec.name for spec in runner.outputs] == ["last_hidden_state"], "the pooler has no weights: left out"
    assert _hf(tmp_path, 'task = "text-classification"').refused() == (
        "hf:bert: the weights lack 4 parameters of BertForSequenceClassification, 'bert.pooler.dense.bias' for one; a model "
        "trained for 'text-classification' was expected. Correct [model] task."
    )
    assert _hf(tmp_path, 'task = "text-clasification"').refused(RecipeError) == (
        "[model] task: found 'text-clasification'; did you mean 'text-classification'?"
    )
    (tmp_path / "bert" / "config.json").write_text("{}")
    message = _hf(tmp_path).refused()
    assert message.startswith("hf:bert: cannot be loaded as AutoModel: ")
    assert message.endswith(". Check the folder or id, [model] task, and that remote code is not needed.")


def test_an_id_is_loaded_at_its_revision_without_remote_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    seen: list[Any] = []

    def load(where: str, **options: Any) -> Any:
        seen.append((where, options))
        raise OSError("no network.\nmore")

    monkeypatch.setattr(transformers.AutoModel, "from_pretrained", load)
    case = _case(tmp_path, HF_DATA, name="hf:org/bert", inputs=HF_INPUTS, axes=HF_AXES, more='revision = "v2"')
    assert case.refused() == (
        "hf:org/bert: cannot be loaded as AutoModel: no network. Check the folder or id, [model] task, and that remote "
        "code is not needed."
    )
    options = {"trust_remote_code": False, "local_files_only": False, "output_loading_info": True, "revision": "v2"}
    assert seen == [("org/bert", options)]


def test_a_missing_extra_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bert").mkdir()
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert _hf(tmp_path).refused(RecipeError) == (
        "[model] source: 'hf:bert' needs the package transformers, which is not installed. Install it with: pip install "
        "'build-engine[hf]'"
    )


# --- running the original -------------------------------------------------------------------------------------------


def test_the_original_runs_and_is_timed_from_array_to_array(tmp_path: Path) -> None:
    case = _case(tmp_path, _net("return {'y': self.fc(x), 'wide': (x * 2).bfloat16()}"))
    runner = open_original(case.recipe, case.sources, threads=1, open_model=open_model)
    x = np.asarray([[1, 2, 3]], np.float32)
    x.setflags(write=False)
    found = runner.run({"x": x})
    assert found["y"].tolist() == (x @ WEIGHT.T + BIAS).tolist()
    assert found["wide"].dtype == np.float32
    times = runner.time({"x": x}, 5)
    assert len(times) == 5
    assert min(times) > 0
    assert torch.get_num_threads() == 1
    assert [(spec.name, spec.shape) for spec in runner.outputs] == [("y", ("batch", 2)), ("wide", ("batch", 3))]
    runner.close()


@pytest.mark.parametrize(
    ("feeds", "message"),
    [
        ({}, "original: no input 'x'; found none. Feed it."),
        ({"x": np.zeros((1, 3))}, "original, input 'x': found float64 [1, 3]; float32 [batch, 3] was expected. Convert it."),
        ({"x": np.zeros(3, np.float32)}, "original, input 'x': found float32 [3]; float32 [batch, 3] was expected. Convert it."),
        ({"x": np.zeros((1, 3), np.float32), "y": np.zeros(1)}, "original: unknown input 'y'; expected one of x."),
        ({"x": np.zeros((1, 4), np.float32)}, f"m.py:{LINE}: forward() raised RuntimeError: mat1 and mat2 shapes cannot be multiplied (1x4 and 3x2). Fix the file; the full traceback is in the log."),
    ],
)  # fmt: skip
def test_feeds_that_do_not_fit_the_original_are_refused(tmp_path: Path, feeds: Any, message: str) -> None:
    case = _case(tmp_path, _net("return self.fc(x)"))
    runner = open_original(case.recipe, case.sources, threads=1, open_model=open_model)
    with pytest.raises(BuildError) as caught:
        runner.run(feeds)
    assert caught.value.message == message


def test_an_original_that_takes_no_sizes_at_all_cannot_be_opened(tmp_path: Path) -> None:
    case = _case(tmp_path, _net("raise ValueError('never')"))
    with pytest.raises(ExportError) as caught:
        open_original(case.recipe, case.sources, threads=1, open_model=open_model)
    assert caught.value.message == (
        f"m.py:{LINE}: forward() raised ValueError: never. Fix the file; the full traceback is in the log."
    )


def test_a_compiled_original_gives_the_same_outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through dynamo; its code generator, which takes most of a minute, is left out."""
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda module, **options: real(module, backend="eager", **options))
    case = _case(tmp_path, _net("return {'y': self.fc(x), 'z': x}"))
    original = open_original(case.recipe, case.sources, threads=1, open_model=open_model)
    runner = compiled(original, case.sources)
    for batch in (1, 4):
        x = np.random.default_rng(batch).normal(size=(batch, 3)).astype(np.float32)
        found = runner.run({"x": x})
        assert list(found) == ["y", "z"]
        np.testing.assert_allclose(found["y"], x @ WEIGHT.T + BIAS, rtol=1e-5)
        assert len(runner.time({"x": x}, 2)) == 2


def test_a_compiler_that_fails_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def compile_nothing(module: Any, **options: Any) -> Any:
        def fail(*tensors: Any) -> Any:
            raise RuntimeError("no C++ compiler\nmore")

        return fail

    monkeypatch.setattr(torch, "compile", compile_nothing)
    case = _case(tmp_path, _net("return self.fc(x)"))
    original = open_original(case.recipe, case.sources, threads=1, open_model=open_model)
    runner = compiled(original, case.sources)
    with pytest.raises(ExportError) as caught:
        runner.run({"x": np.zeros((1, 3), np.float32)})
    assert caught.value.message == (
        "m.py: torch.compile fails: RuntimeError: no C++ compiler. Set [latency] compile = false, or install what it asks "
        "for."
    )


# --- the reference --------------------------------------------------------------------------------------------------


def test_the_reference_holds_the_originals_output_of_every_sample(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    case = _case(tmp_path, _net("return {'y': self.fc(x)}") + "def validation():\n    yield from rows(2, 5)\n")
    outputs = case.reference(progress=lambda done, total: seen.append((done, total)))
    data, found = Samples(tmp_path / "data" / "validation"), Samples(outputs.path)
    assert (outputs.samples, outputs.data_sha256, outputs.sha256) == (5, data.sha256, found.sha256)
    for index in range(5):
        expected = data.feeds(index)["x"] @ WEIGHT.T + BIAS
        np.testing.assert_allclose(found.feeds(index)["y"], expected, rtol=1e-5)
    assert seen == [(2, 5), (4, 5), (5, 5)], "in batches of the optimum"
    assert found.batch(range(5))["y"].shape == (5, 2)


def _selecting(case: Case, values: tuple[int, ...]) -> DataSets:
    """The case's data, and a set to select by with a sample of each of these values."""
    (case.folder / "data").mkdir()
    data = collect(case.recipe, case.sources, out_dir=case.folder / "data")
    path = case.folder / "data" / "selection"
    with SampleWriter(path, batch_axes={"x": 0}) as writer:
        for value in values:
            writer.append({"x": np.full((1, 3), value, np.float32)})
        sha256 = writer.close()
    return replace(data, selection=ValidationSet(path=path, samples=len(values), sha256=sha256, labelled=False))


def test_samples_to_select_by_follow_those_that_judge_in_the_model_that_is_loaded_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, seen = list[Any](), list[tuple[int, int]]()
    load = load_original

    def counted(*args: Any) -> Any:
        loaded.append(load(*args))
        return loaded[-1]

    monkeypatch.setattr("compiler.original.load_original", counted)
    case = _case(tmp_path, _net("return {'y': self.fc(x)}") + "def validation():\n    yield from rows(2, 5)\n")
    data = _selecting(case, (1, 2, 3))
    found = case.references(data, progress=lambda done, total: seen.append((done, total)))
    assert data.selection is not None and found.selection is not None
    assert (found.validation.samples, found.selection.samples) == (5, 3)
    assert (found.validation.data_sha256, found.selection.data_sha256) == (
        data.validation.sha256,
        data.selection.sha256,
    )
    for index, value in enumerate((1, 2, 3)):
        expected = np.full((1, 3), value, np.float32) @ WEIGHT.T + BIAS
        np.testing.assert_allclose(Samples(found.selection.path).feeds(index)["y"], expected, rtol=1e-5)
    assert seen == [(2, 8), (4, 8), (5, 8), (7, 8), (8, 8)]
    assert len(loaded) == 1


def test_a_sample_to_select_by_on_which_the_original_fails_is_called_that(tmp_path: Path) -> None:
    case = _case(tmp_path, _net("assert x.max() < 9, 'too much'; return self.fc(x)"))
    with pytest.raises(ExportError) as caught:
        case.references(_selecting(case, (1, 2, 10)))
    assert caught.value.message.startswith("selection sample 2: m.py:")


def test_ragged_samples_run_in_groups_of_one_shape(tmp_path: Path) -> None:
    text = """
class Net(nn.Module):
    def forward(self, x):
        return {"y": x.cumsum(1), "last": x[:, -1:]}

def validation():
    for size in (2, 2, 3, 2):
        yield {"x": np.full((1, size), size, np.float32)}
"""
    axes = "batch = { min = 2, opt = 3, max = 5 }\nseq = { min = 1, opt = 2, max = 6 }"
    outputs = _case(tmp_path, text, inputs='x = { shape = ["batch", "seq"] }', axes=axes).reference()
    found = Samples(outputs.path)
    assert [found.feeds(index)["y"].tolist() for index in range(4)] == [[[2, 4]], [[2, 4]], [[3, 6, 9]], [[2, 4]]]
    assert outputs.notes == ()


def test_an_output_without_the_batch_axis_is_taken_sample_by_sample(tmp_path: Path) -> None:
    outputs = _case(tmp_path, _net("return {'y': self.fc(x), 'total': x.sum()}")).reference()
    data, found = Samples(tmp_path / "data" / "validation"), Samples(outputs.path)
    assert [found.feeds(index)["total"].shape for index in range(4)] == [()] * 4
    for index in range(4):
        np.testing.assert_allclose(found.feeds(index)["total"], data.feeds(index)["x"].sum(), rtol=1e-5)
    assert outputs.notes == ("original: run one sample at a time, as 'total' has no axis 'batch'",)


def test_outputs_of_the_original_that_are_not_finite_are_noted(tmp_path: Path) -> None:
    text = _net("return x.log()") + (
        "def validation():\n    for value in (1, -1, 2):\n        yield {'x': np.full((1, 3), value, np.float32)}\n"
    )
    assert _case(tmp_path, text).reference().notes == (
        "original: NaN or Inf in the outputs of 1 of 3 validation samples",
    )


def test_an_original_that_fails_on_a_sample_names_it(tmp_path: Path) -> None:
    text = _net("assert x.max() < 9, 'too much'; return self.fc(x)") + (
        "def validation():\n    for value in (1, 2, 3, 10):\n        yield {'x': np.full((1, 3), value, np.float32)}\n"
    )
    with pytest.raises(ExportError) as caught:
        _case(tmp_path, text).reference()
    assert caught.value.message == (
        f"validation sample 2: m.py:{LINE}: forward() raised AssertionError: too much. Fix the file; the full traceback is "
        "in the log."
    )


# --- sizes, feeds, differences --------------------------------------------------------------------------------------


def _axes(**ranges: tuple[int, int, int]) -> dict[str, DimRange]:
    return {name: DimRange(min=low, opt=opt, max=high) for name, (low, opt, high) in ranges.items()}


def _asked(shapes: dict[str, tuple[Any, ...]], axes: dict[str, DimRange]) -> Recipe:
    inputs = {name: recipe.InputSection(shape=shape) for name, shape in shapes.items()}
    return Recipe(name="r", model=recipe.ModelSection(source="m.py", inputs=inputs), axes=axes)


@pytest.mark.parametrize(
    ("shape", "axes", "sizes"),
    [
        (("b", "s"), _axes(b=(1, 1, 64), s=(1, 128, 512)), {"b": 2, "s": 3}),
        (("b", "s", 2, 3), _axes(b=(1, 1, 64), s=(1, 128, 512)), {"b": 5, "s": 7}),
        (("b", "s"), _axes(b=(1, 1, 1), s=(4, 4, 4)), {"b": 1, "s": 4}),
        (("b", "s"), _axes(b=(1, 1, 2), s=(1, 1, 2)), {"b": 2, "s": 2}),
        (("b", "s"), _axes(b=(8, 8, 10), s=(8, 9, 10)), {"b": 8, "s": 9}),
        (("b",), _axes(b=(100, 100, 10**9)), {"b": 101}),
    ],
)
def test_example_sizes_are_different_primes_of_2_or_more(
    shape: tuple[Any, ...], axes: dict[str, DimRange], sizes: dict[str, int]
) -> None:
    assert export._example_sizes(_asked({"x": shape}, axes)) == sizes


def test_points_are_all_extremes_and_each_axis_alone_once() -> None:
    points = export._points(_axes(b=(1, 2, 3), s=(4, 5, 5)))
    assert [tuple(point.values()) for point in points] == [(2, 5), (1, 4), (3, 5), (1, 5), (2, 4)]
    assert export._points({}) == [{}]


def test_feeds_repeat_and_cut_real_samples() -> None:
    asked = _asked({"x": ("b", "s"), "state": (2, "b"), "shared": (2,)}, _axes(b=(1, 2, 5), s=(1, 2, 6)))
    samples = [
        {"x": np.asarray([[n, n + 1, n + 2]]), "state": np.asarray([[n], [-n]]), "shared": np.asarray([7, 8])}
        for n in (10, 20)
    ]
    feeds = feeds_at(asked, samples, {"b": 3, "s": 4})
    assert feeds["x"].tolist() == [[10, 11, 12, 10], [20, 21, 22, 20], [10, 11, 12, 10]]
    assert feeds["state"].tolist() == [[10, 20, 10], [-10, -20, -10]]
    assert feeds["shared"].tolist() == [7, 8]
    assert feeds_at(asked, samples, {"b": 1, "s": 1})["x"].tolist() == [[10]]


def test_the_largest_tensor_grows_linearly_with_the_batch_and_quadratically_with_other_axes() -> None:
    asked = _asked({"x": ("b", "s")}, _axes(b=(1, 2, 8), s=(1, 4, 12)))
    assert export._growth(asked, {"b": 8, "s": 12}) == 4 * 9


@pytest.mark.parametrize(
    ("expected", "found", "message"),
    [
        ([1.0, 2.0], [1.0, 2.0], None),
        ([1.0, 2.0], [1.0, 2.0019], None),
        ([0.0, 2.0], [0.0014, 2.0], None),
        ([1.0, 2.0], [1.0, 2.1], "by 0.1 (at [1]: 2.1 instead of 2); at most 0.0021 was expected (rtol 0.001, atol 0.0001)"),
        ([1.0, 2.0], [1.0, np.nan], "by nan (at [1]: nan instead of 2); at most 0.0021 was expected (rtol 0.001, atol 0.0001)"),
        ([np.nan, np.inf], [np.nan, np.inf], None),
        ([1.0, np.inf], [1.0, -np.inf], "by inf (at [1]: -inf instead of inf); at most inf was expected (rtol 0.001, atol 0.0001)"),
        ([np.nan, 1.0], [1.0, 1.0], "by nan (at [0]: 1 instead of nan); at most nan was expected (rtol 0.001, atol 0.0001)"),
        ([], [], None),
    ],
)  # fmt: skip
def test_a_difference_is_measured_against_the_size_of_the_output(
    expected: list[float], found: list[float], message: str | None
) -> None:
    a, b = np.asarray(expected), np.asarray(found)
    assert export._difference(a, b, 1e-3, 1e-4) == message


def test_differences_in_shape_type_and_whole_numbers_are_named() -> None:
    ones = np.ones((2, 3), np.int64)
    assert export._difference(ones, ones[:1], 1, 1) == "in shape: [1, 3] instead of [2, 3]"
    assert export._difference(ones, ones.astype(np.int32), 1, 1) == "in type: int32 instead of int64"
    other = ones.copy()
    other[1, 1:] = 5
    assert export._difference(ones, other, 9, 9) == "in 2 of 6 values (the first at [1, 1]: 5 instead of 1)"
    assert export._difference(ones, ones.copy(), 0, 0) is None


def test_a_difference_in_any_chunk_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "_CHUNK", 4)
    a = np.ones(11)
    for place in range(11):
        b = a.copy()
        b[place] = 2
        assert f"(at [{place}]: 2 instead of 1)" in (export._difference(a, b, 1e-3, 1e-4) or "")


def test_the_opset_is_20_unless_the_recipe_says_otherwise(tmp_path: Path) -> None:
    case = _case(tmp_path, _net("return self.fc(x)"))
    assert export.choose_opset(case.recipe) == 20
    assert export.choose_opset(recipe.load(tmp_path / "r.toml", ["export.opset=23"])) == 23
    assert case.export(opset=23).opset == 23

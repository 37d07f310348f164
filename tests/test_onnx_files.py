"""ONNX files: what is written is read back, and what lies about its weights is refused in one sentence."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from compiler import onnx_files
from compiler.backends.onnxruntime import open_model
from compiler.errors import ArtifactError, ExportError
from compiler.spec import DimRange, Precision, TensorSpec
from tests.quantize import networks

ONES = np.ones((300, 4), np.float32)


def _model(*, external: dict[str, str] | None = None, where: str = "initializer") -> onnx.ModelProto:
    """``y = x @ w``, with ``w`` ones [300, 4] in the file or, with ``external``, said to be elsewhere."""
    weight = numpy_helper.from_array(ONES, "w")
    if external is not None:
        weight.ClearField("raw_data")
        weight.data_location = TensorProto.EXTERNAL
        for key, value in external.items():
            weight.external_data.add(key=key, value=value)
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    weights = [weight] if where == "initializer" else []
    if where == "constant":
        nodes.insert(0, helper.make_node("Constant", [], ["w"], value=weight))
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 300])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 4])],
        weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def _save(folder: Path, model: onnx.ModelProto) -> Path:
    path = folder / "m.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def test_what_is_described_is_what_is_in_the_file(tmp_path: Path) -> None:
    path = _save(tmp_path, _model())
    axes = {"batch": DimRange(min=1, opt=2, max=4)}
    model = onnx_files.describe(path, precision=Precision.FP32, axes=axes, notes=("seen",))
    assert model.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (model.opset, model.axes, model.notes, model.external_data) == (20, axes, ("seen",), ())
    assert model.inputs == (TensorSpec(name="x", dtype="float32", shape=("batch", 300)),)
    assert model.outputs == (TensorSpec(name="y", dtype="float32", shape=("batch", 4)),)


@pytest.mark.parametrize("threshold", [0, onnx_files.EXTERNAL_ABOVE_BYTES])
def test_writing_twice_gives_the_same_bytes_and_reading_gives_the_same_weights(tmp_path: Path, threshold: int) -> None:
    model = onnx_files.read(_save(tmp_path, _model()))
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
    (one, files), (two, _) = (onnx_files.write(model, f / "model.onnx", external_above=threshold) for f in folders)
    assert one == two
    assert [file.name for file in files] == (["model.onnx.data"] if threshold == 0 else [])
    weight = onnx_files.read(folders[0] / "model.onnx").graph.initializers["w"].const_value
    assert weight is not None
    assert isinstance(weight, ir.ExternalTensor) == (threshold == 0)
    assert np.array_equal(weight.numpy(), ONES)


def test_weights_in_a_file_of_their_own_come_back_inside_when_they_are_small(tmp_path: Path) -> None:
    (tmp_path / "w.bin").write_bytes(ONES.tobytes())
    model = onnx_files.read(_save(tmp_path, _model(external={"location": "w.bin"})))
    (tmp_path / "out").mkdir()
    _, files = onnx_files.write(model, tmp_path / "out/model.onnx")
    (tmp_path / "w.bin").unlink()
    again = onnx_files.read(tmp_path / "out/model.onnx").graph.initializers["w"].const_value
    assert files == () and again is not None and np.array_equal(again.numpy(), ONES)


def test_the_hash_covers_the_external_data(tmp_path: Path) -> None:
    path = _save(tmp_path, _model(external={"location": "w.bin"}))
    (tmp_path / "w.bin").write_bytes(ONES.tobytes())
    before = onnx_files.describe(path, precision=Precision.FP32, axes={})
    (tmp_path / "w.bin").write_bytes((ONES * 2).tobytes())
    after = onnx_files.describe(path, precision=Precision.FP32, axes={})
    assert before.external_data == after.external_data == (tmp_path / "w.bin",)
    assert before.sha256 != after.sha256
    lines = "".join(f"{hashlib.sha256(f.read_bytes()).hexdigest()}  {f.name}\n" for f in (path, tmp_path / "w.bin"))
    assert after.sha256 == hashlib.sha256(lines.encode()).hexdigest()


def test_an_initialiser_is_no_input_though_old_models_list_it_as_one(tmp_path: Path) -> None:
    model = _model()
    model.ir_version = 3
    model.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [300, 4]))
    inputs, _ = onnx_files.specs(onnx_files.read(_save(tmp_path, model)))
    assert [spec.name for spec in inputs] == ["x"]


def test_an_axis_without_size_and_name_is_a_question_mark() -> None:
    x = helper.make_tensor_value_info("x", TensorProto.BFLOAT16, [None, 3])
    graph = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "g", [x], [x])
    graph.output[0].name = "y"
    inputs, _ = onnx_files.specs(ir.from_proto(helper.make_model(graph)))
    assert inputs == (TensorSpec(name="x", dtype="bfloat16", shape=("?", 3)),)


# --- refusals -------------------------------------------------------------------------------------------------------

ONE_FILE = "a plain file in the model's own folder was expected. Export it again."
SIZE = ONES.nbytes


@pytest.mark.parametrize("where", ["initializer", "constant"])
@pytest.mark.parametrize(
    ("external", "found"),
    [
        ({"location": "w.bin", "secret": "1"}, "external data with an unknown key 'secret'"),
        ({"location": "w.bin\0.png"}, r"external data at 'w.bin\x00.png'"),
        ({"location": "w.bin", "offset": "-4"}, "external data with offset '-4' and length '0'"),
        (
            {"location": "w.bin", "offset": "8"},
            f"{SIZE} bytes at offset 8 of 'w.bin', which has {SIZE}, with length {SIZE}",
        ),
        ({"location": "w.bin", "length": "8"}, f"{SIZE} bytes at offset 0 of 'w.bin', which has {SIZE}, with length 8"),
        (
            {"location": "w.bin", "length": str(2**40)},
            f"{SIZE} bytes at offset 0 of 'w.bin', which has {SIZE}, with length {2**40}",
        ),
        ({"location": "link/w.bin"}, "external data at 'link/w.bin', which leaves the folder or is a link"),
    ],
)
def test_external_data_that_the_checker_lets_pass_are_refused(
    tmp_path: Path, external: dict[str, str], found: str, where: str
) -> None:
    (tmp_path / "w.bin").write_bytes(ONES.tobytes())
    (tmp_path / "real").mkdir()
    (tmp_path / "real/w.bin").write_bytes(ONES.tobytes())
    (tmp_path / "link").symlink_to("real")
    path = _save(tmp_path, _model(external=external, where=where))
    with pytest.raises(ExportError) as caught:
        onnx_files.read(path)
    message = caught.value.message
    checker_knows = message.endswith("a valid ONNX model was expected. Export it again.")
    assert checker_knows or message == f"{path}: tensor 'w': {found}; {ONE_FILE}"


@pytest.mark.parametrize(
    "location",
    ["../w.bin", "/dev/zero", "sub/../../w.bin", "hard.bin", "soft.bin", "missing.bin", "", "*/_ORT_MEM_ADDR_/*"],
)
def test_external_data_outside_the_folder_are_refused(tmp_path: Path, location: str) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    for name in (tmp_path / "w.bin", folder / "one.bin"):
        name.write_bytes(ONES.tobytes())
    os.link(folder / "one.bin", folder / "hard.bin")
    (folder / "soft.bin").symlink_to(tmp_path / "w.bin")
    path = _save(folder, _model(external={"location": location}))
    with pytest.raises(ExportError, match=r"expected\. Export it again\.$") as caught:
        onnx_files.read(path)
    assert caught.value.message.startswith(f"{path}: ")


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x08\x0a" * 9])
def test_a_file_that_is_no_model_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(content)
    with pytest.raises(ExportError, match=r"m\.onnx: .*; a valid ONNX model was expected\. Export it again\.$"):
        onnx_files.read(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"none\.onnx: .*; a valid ONNX model was expected\. Export it again\.$"):
        onnx_files.read(tmp_path / "none.onnx")


def test_a_cycle_is_refused(tmp_path: Path) -> None:
    model = _model()
    model.graph.node[0].input[0] = "y"
    with pytest.raises(ExportError, match=r"; a valid ONNX model was expected\. Export it again\.$"):
        onnx_files.read(_save(tmp_path, model))


def test_sparse_weights_are_refused_for_they_would_be_lost(tmp_path: Path) -> None:
    model = _model(where="nowhere")
    sparse = model.graph.sparse_initializer.add(dims=[300, 4])
    sparse.values.CopyFrom(numpy_helper.from_array(np.ones(1, np.float32), "w"))
    sparse.indices.CopyFrom(numpy_helper.from_array(np.zeros(1, np.int64), "w_indices"))
    path = _save(tmp_path, model)
    with pytest.raises(ExportError) as caught:
        onnx_files.read(path)
    assert caught.value.message == (
        f"{path}: 1 sparse initialisers; dense ones were expected. Export it again with dense weights."
    )


@pytest.mark.parametrize("raw", [True, False])
def test_a_weight_with_too_many_numbers_is_refused(tmp_path: Path, raw: bool) -> None:
    model = _model()
    weight = model.graph.initializer[0]
    weight.CopyFrom(
        helper.make_tensor("w", TensorProto.FLOAT, [2, 2], np.ones(4, np.float32).tobytes() if raw else [1] * 4, raw)
    )
    weight.dims[0] = 1
    path = _save(tmp_path, model)
    with pytest.raises(ExportError) as caught:
        onnx_files.read(path)
    found = "16 bytes for the shape [1, 2]; 8" if raw else "4 numbers for the shape [1, 2]; 2"
    assert caught.value.message == f"{path}: tensor 'w': {found} were expected. Export it again."


@pytest.mark.parametrize(
    "dtype", [TensorProto.INT4, TensorProto.BOOL, TensorProto.BFLOAT16, TensorProto.COMPLEX64, TensorProto.FLOAT8E4M3FN]
)
def test_weights_of_every_width_are_counted_right(tmp_path: Path, dtype: int) -> None:
    model = _model()
    model.graph.initializer.append(helper.make_tensor("spare", dtype, [3], [1, 0, 1]))
    assert "spare" in onnx_files.read(_save(tmp_path, model)).graph.initializers


def _functions(depth: int) -> onnx.ModelProto:
    """Local functions of two calls each: 2 to the power of ``depth`` nodes in a kilobyte."""
    opset = [helper.make_opsetid("", 20), helper.make_opsetid("f", 1)]
    functions = []
    for level in range(depth):
        op, domain = ("Neg", "") if level == 0 else (f"f{level - 1}", "f")
        nodes = [helper.make_node(op, ["a"], ["b"], domain=domain), helper.make_node(op, ["b"], ["c"], domain=domain)]
        functions.append(helper.make_function("f", f"f{level}", ["a"], ["c"], nodes, opset))
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    graph = helper.make_graph([helper.make_node(f"f{depth - 1}", ["x"], ["y"], domain="f")], "g", [x], [y])
    return helper.make_model(graph, functions=functions, opset_imports=opset, ir_version=10)


def test_functions_that_expand_to_millions_of_nodes_are_refused(tmp_path: Path) -> None:
    path = _save(tmp_path, _functions(23))
    with pytest.raises(ExportError) as caught:
        onnx_files.read(path)
    assert caught.value.message == (
        f"{path}: its local functions expand to 8,388,608 nodes; at most 1,000,000 were expected. "
        "Export it without nested functions."
    )


def test_functions_and_branches_nested_very_deep_are_refused(tmp_path: Path) -> None:
    model = _functions(60)
    for function in model.functions[1:]:
        out = helper.make_tensor_value_info("d", TensorProto.FLOAT, [1])
        branch = helper.make_graph(
            [helper.make_node(function.node[0].op_type, ["a"], ["d"], domain="f")], "b", [], [out]
        )
        condition = helper.make_node("Constant", [], ["k"], value=numpy_helper.from_array(np.array(True)))
        del function.node[:]
        function.node.extend([condition, helper.make_node("If", ["k"], ["c"], then_branch=branch, else_branch=branch)])
    path = _save(tmp_path, model)
    with pytest.raises(ExportError) as caught:
        onnx_files.read(path)
    assert caught.value.message == (
        f"{path}: functions and subgraphs are nested more than 100 deep; fewer were expected. "
        "Export it without nested functions."
    )


def test_functions_in_reason_are_read(tmp_path: Path) -> None:
    assert len(onnx_files.read(_save(tmp_path, _functions(8))).functions) == 8


def test_an_output_that_is_no_tensor_is_refused_by_name() -> None:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    y = helper.make_tensor_sequence_value_info("y", TensorProto.FLOAT, [1])
    model = helper.make_model(helper.make_graph([helper.make_node("SequenceConstruct", ["x"], ["y"])], "g", [x], [y]))
    with pytest.raises(ExportError) as caught:
        onnx_files.specs(ir.from_proto(model))
    assert caught.value.message == (
        "output 'y': is no tensor; a tensor of known dtype and rank was expected. Declare it."
    )


def test_an_output_of_unknown_rank_is_refused_by_name() -> None:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    model = helper.make_model(helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "g", [x], [y]))
    with pytest.raises(ExportError) as caught:
        onnx_files.specs(ir.from_proto(model))
    assert caught.value.message == (
        "output 'y': has no known rank; a tensor of known dtype and rank was expected. Declare it."
    )


def test_a_folder_that_is_not_there_is_an_artifact_error(tmp_path: Path) -> None:
    model = onnx_files.read(_save(tmp_path, _model()))
    with pytest.raises(ArtifactError, match=r"cannot write: No such file or directory\. Choose a folder"):
        onnx_files.write(model, tmp_path / "nowhere/model.onnx")


def test_a_graph_is_written_without_the_weights_that_lie_in_a_file_and_runs_on_them(tmp_path: Path) -> None:
    for name in ("model", "other"):
        (tmp_path / name).mkdir()
    weight = np.arange(12, dtype=np.float32).reshape(3, 4)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4])],
        [numpy_helper.from_array(weight, "w")],
    )
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10),
        tmp_path / "model" / "model.onnx",
        save_as_external_data=True,
        size_threshold=0,
        location="model.onnx.data",
    )
    network = onnx_files.read(tmp_path / "model" / "model.onnx")
    folder = onnx_files.write_graph(network, tmp_path / "other" / "graph.onnx")
    assert folder == tmp_path / "model"
    assert [file.name for file in (tmp_path / "other").iterdir()] == ["graph.onnx"]
    x = np.array([[1, 2, 3]], np.float32)
    runner = open_model(tmp_path / "other" / "graph.onnx", threads=1, weights=folder)
    assert np.array_equal(runner.run({"x": x})["y"], x @ weight)


def test_a_graph_whose_weights_are_inside_keeps_them(tmp_path: Path) -> None:
    network = onnx_files.read(networks.save(networks.linear_map(np.eye(3)), tmp_path / "model.onnx").path)
    assert onnx_files.write_graph(network, tmp_path / "graph.onnx") is None
    x = np.array([[1, 2, 3]], np.float32)
    assert np.array_equal(open_model(tmp_path / "graph.onnx", threads=1).run({"x": x})["y"], x)

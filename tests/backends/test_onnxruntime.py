"""What is ONNX Runtime's own: its messages in our words, its threads, its providers."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from compiler.backends import machine
from compiler.backends import onnxruntime as backend
from compiler.errors import BuildError
from compiler.spec import Precision
from tests.backends.machines import pretend_gpu
from tests.quantize import networks
from tests.quantize.networks import Net, f32


@pytest.fixture(autouse=True)
def forget_this_machine() -> Iterator[None]:
    yield
    machine.gpu.cache_clear()
    machine.cpu_says.cache_clear()


def one_node(kind: str, dtype: int = TensorProto.FLOAT, domain: str = "") -> onnx.ModelProto:
    graph = helper.make_graph(
        [helper.make_node(kind, ["x"], ["y"], name="the_node", domain=domain)],
        "one",
        [helper.make_tensor_value_info("x", dtype, [2, 2])],
        [helper.make_tensor_value_info("y", dtype, None)],
    )
    opsets = [helper.make_opsetid("", 20), *([helper.make_opsetid(domain, 1)] if domain else [])]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def refusal(path: Path) -> str:
    with pytest.raises(BuildError) as caught:
        backend.open_model(path)
    return caught.value.message


@pytest.mark.parametrize(
    ("kind", "dtype", "domain"),
    [
        ("Det", TensorProto.DOUBLE, ""),
        ("Tanh", TensorProto.BFLOAT16, ""),
        ("Zanzibar", TensorProto.FLOAT, "odd.domain"),
    ],
)
def test_an_operator_without_a_kernel_is_named(tmp_path: Path, kind: str, dtype: int, domain: str) -> None:
    onnx.save(one_node(kind, dtype, domain), tmp_path / "m.onnx")
    assert refusal(tmp_path / "m.onnx") == (
        f"m.onnx: node 'the_node': ONNX Runtime has no implementation of {kind} for these types; an operator that it runs "
        f"was expected. Keep the node in high precision (engines.keep), or express the model without {kind}."
    )


def test_any_other_refusal_ends_in_the_runtime_s_own_words(tmp_path: Path) -> None:
    net = Net()
    net.op("MatMul", ["x", net.normal("w", 3, 2)], "y")
    proto = net.model({"x": ["batch", 3]}, {"y": ["batch", 2]})
    proto.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 4
    onnx.save(proto, tmp_path / "m.onnx")
    message = refusal(tmp_path / "m.onnx")
    assert message.startswith("m.onnx: ONNX Runtime cannot run it; a model that it runs was expected. Its own words: ")
    assert message.endswith("Incompatible dimensions for matrix multiplication")


def test_a_failure_while_running_is_translated(tmp_path: Path) -> None:
    net = Net()
    net.op("Reshape", ["x", net.weight("shape", np.array([2, 3]))], "y")
    onnx.save(net.model({"x": ["batch", 3]}, {"y": [2, 3]}), tmp_path / "m.onnx")
    with pytest.raises(BuildError) as caught:
        backend.open_model(tmp_path / "m.onnx").run({"x": f32(np.ones((3, 3)))})
    assert caught.value.message.startswith("m.onnx: ONNX Runtime cannot run it; ")
    assert "Reshape" in caught.value.message
    assert caught.value.__cause__ is not None


def test_an_axis_name_stands_for_one_size(tmp_path: Path) -> None:
    net = Net()
    net.op("Add", ["a", "b"], "y")
    onnx.save(net.model({"a": ["n", 2], "b": ["n", 2]}, {"y": ["n", 2]}), tmp_path / "m.onnx")
    runner = backend.open_model(tmp_path / "m.onnx")
    with pytest.raises(BuildError) as caught:
        runner.run({"a": f32(np.ones((3, 2))), "b": f32(np.ones((1, 2)))})
    assert caught.value.message == (
        "m.onnx: input 'b': found float32 [1, 2]; float32 [n, 2], n = 3 was expected. Convert it."
    )


def test_axes_without_a_name_take_any_size(tmp_path: Path) -> None:
    net = Net()
    net.op("Relu", ["x"], "y")
    proto = net.model({"x": ["n", 2]}, {"y": ["n", 2]})
    for value in (*proto.graph.input, *proto.graph.output):
        value.type.tensor_type.shape.dim[0].Clear()
    onnx.save(proto, tmp_path / "m.onnx")
    runner = backend.open_model(tmp_path / "m.onnx")
    assert [(spec.name, spec.dtype, spec.shape) for spec in runner.inputs] == [("x", "float32", ("?", 2))]
    assert runner.run({"x": f32(np.ones((5, 2)))})["y"].shape == (5, 2)


def test_graph_optimisation_can_be_turned_off(tmp_path: Path) -> None:
    model = networks.save(networks.residual(), tmp_path / "m.onnx")
    sample = networks.normal_samples(1, 3, 16, 16)[0]
    fused, plain = (backend.open_model(model.path, optimize=optimize).run(sample)["y"] for optimize in (True, False))
    assert fused == pytest.approx(plain, abs=1e-4)
    assert not np.array_equal(fused, plain)


def test_between_its_roundings_an_open_model_computes_in_float(tmp_path: Path) -> None:
    """An integer kernel would round the bias to whole products of both scales, here to zero."""
    net = Net()
    one, zero = net.weight("one", np.array(1, np.float32)), net.weight("zero", np.array(0, np.int8))
    x = net.op("DequantizeLinear", [net.op("QuantizeLinear", ["x", one, zero], "xq"), one, zero], "xd")
    w = net.op("DequantizeLinear", [net.weight("w", np.ones((1, 1, 1, 1), np.int8)), one, zero], "wd")
    tenth = net.weight("tenth", np.array(0.1, np.float32))
    made = net.op("Conv", [x, w, net.weight("bias", f32([0.4]))], "c")
    net.op("DequantizeLinear", [net.op("QuantizeLinear", [made, tenth, zero], "yq"), tenth, zero], "y")
    onnx.save(net.model({"x": ["batch", 1, 1, 1]}, {"y": ["batch", 1, 1, 1]}), tmp_path / "m.onnx")
    found = backend.open_model(tmp_path / "m.onnx").run({"x": f32([[[[3.2]]]])})["y"]
    assert found.item() == pytest.approx(3.4)


def test_threads_are_recorded_and_pinned(tmp_path: Path) -> None:
    model = networks.save(networks.convolution(), tmp_path / "m.onnx")
    for threads, recorded in ((1, "1"), (0, str(backend.platform().cores))):
        (tmp_path / recorded).mkdir(exist_ok=True)
        engine = backend.build(model, name="e", reason="", threads=threads, out_dir=tmp_path / recorded)
        assert engine.options == {"provider": "CPUExecutionProvider", "threads": recorded, "spinning": "on"}
        session = backend._session(
            engine.path, threads=threads, provider=backend.CPU, optimize=True, spin=True, fuse=True
        )
        assert session.get_session_options().intra_op_num_threads == int(recorded)
        assert session.get_session_options().inter_op_num_threads == 1


def test_a_large_model_keeps_its_weights_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compiler.onnx_files.write.__kwdefaults__", {"external_above": 1000})
    model = networks.save(networks.linear_map(np.random.default_rng(0).normal(size=(64, 64))), tmp_path / "m.onnx")
    (tmp_path / "out").mkdir()
    engine = backend.build(model, name="e", reason="", threads=1, out_dir=tmp_path / "out")
    assert [file.name for file in engine.external_data] == ["engine.onnx.data"]
    assert engine.size_bytes > 64 * 64 * 4
    sample = networks.normal_samples(1, 64)[0]
    expected = backend.open_model(model.path).run(sample)["y"]
    assert np.array_equal(backend.open(engine, threads=1).run(sample)["y"], expected)


# --- this machine ---------------------------------------------------------------------------------------------------


SAYS = "echo 'NVIDIA L4, 8.9, 595.10'"


def test_a_gpu_is_described_by_its_driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pretend_gpu(monkeypatch, tmp_path, SAYS)
    found = backend.platform()
    assert (found.gpu, found.compute_capability, found.driver) == ("NVIDIA L4", "8.9", "595.10")
    assert backend.fingerprint()["gpu"] == "NVIDIA L4"


@pytest.mark.parametrize("script", ["exit 9", "echo 'No devices were found'", "true"])
def test_a_driver_without_a_gpu_is_no_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str) -> None:
    pretend_gpu(monkeypatch, tmp_path, script)
    assert (backend.platform().gpu, "gpu" in backend.fingerprint()) == (None, False)


def test_a_gpu_that_the_runtime_cannot_use_is_said_and_the_cpu_taken(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pretend_gpu(monkeypatch, tmp_path, SAYS)
    model = networks.save(networks.convolution(), tmp_path / "m.onnx")
    (tmp_path / "out").mkdir()
    engine = backend.build(model, name="e", reason="", threads=1, out_dir=tmp_path / "out")
    assert engine.options["provider"] == backend.CPU
    expected = (
        "built for the CPU, although there is a GPU: m.onnx: needs ONNX Runtime's CUDAExecutionProvider, which cannot be "
        "loaded here; a machine with an NVIDIA driver, CUDA and cuDNN was expected. Install them, or build the engine on "
        "this machine."
    )
    assert engine.notes == (expected,)


def test_int8_is_built_for_the_cpu_even_where_there_is_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pretend_gpu(monkeypatch, tmp_path, SAYS)
    model = networks.save(networks.convolution(), tmp_path / "m.onnx")
    provider, notes = backend._choose_provider(dataclasses.replace(model, precision=Precision.INT8))
    assert provider == backend.CPU
    assert notes == ["built for the CPU: ONNX Runtime's CUDA provider has no INT8 kernels for Q/DQ models"]


def test_an_engine_for_a_gpu_is_refused_without_one(tmp_path: Path) -> None:
    model = networks.save(networks.convolution(), tmp_path / "m.onnx")
    (tmp_path / "out").mkdir()
    engine = backend.build(model, name="e", reason="", threads=1, out_dir=tmp_path / "out")
    elsewhere = dataclasses.replace(engine, options={**engine.options, "provider": backend.CUDA})
    with pytest.raises(
        BuildError, match=r"^engine\.onnx: needs ONNX Runtime's CUDAExecutionProvider, which cannot be "
    ):
        backend.open(elsewhere, threads=1)


@pytest.mark.parametrize(
    ("says", "saturates"),
    [({"flags": "avx2 fma"}, True), ({"flags": "avx2 avx_vnni"}, False), ({"flags": "avx512_vnni"}, False)],
)
def test_exact_kernels_are_asked_for_only_without_vnni(
    monkeypatch: pytest.MonkeyPatch, says: dict[str, str], saturates: bool
) -> None:
    monkeypatch.setattr(machine, "cpu_says", lambda: says)
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    assert backend._saturates() is saturates
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert backend._saturates() is False


def test_asking_about_the_machine_loads_no_runtime() -> None:
    code = (
        "import sys; from compiler import backends; from compiler.recipe import EngineSection\n"
        "backends.choose(EngineSection(precision='int8')); b = backends.get('onnxruntime')\n"
        "b.fingerprint(); b.platform(); b.unavailable()\n"
        "print(*{name.split('.')[0] for name in sys.modules} & {'onnxruntime', 'onnx', 'onnx_ir', 'torch'})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""

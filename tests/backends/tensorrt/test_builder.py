"""NVIDIA's own parser and builder: what goes into a plan, what they refuse, and in which words."""

from __future__ import annotations

import errno
import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from compiler import backends
from compiler.backends.tensorrt import precision
from compiler.backends.tensorrt.log import BUILDER_LOG, shorten
from compiler.backends.tensorrt.timing_cache import TimingCache
from compiler.errors import BuildError
from compiler.recipe import TensorRTSection
from compiler.spec import DimRange, Engine, OnnxModel, Precision, PrecisionProof
from tests.quantize import networks

RTX = backends.get("tensorrt_rtx")
SAID = " All it said is in the log."


@pytest.fixture(autouse=True)
def builder() -> None:
    if reason := RTX.unavailable():
        pytest.skip(reason)


@pytest.fixture
def model(tmp_path: Path) -> OnnxModel:
    return networks.save(networks.residual(), tmp_path / "model.onnx")


def build(model: OnnxModel, folder: Path, **options: Any) -> Engine:
    progress = options.pop("progress", lambda done, total: None)
    folder.mkdir()
    return RTX.build(
        model,
        name="e",
        reason="because",
        threads=1,
        out_dir=folder,
        section=TensorRTSection(**options),
        progress=progress,
    )


def refusal(model: OnnxModel, folder: Path, **options: Any) -> str:
    with pytest.raises(BuildError) as caught:
        build(model, folder, **options)
    return caught.value.message


# --- what is built --------------------------------------------------------------------------------------------------


def test_a_plan_is_built_and_its_precision_proved(model: OnnxModel, tmp_path: Path) -> None:
    engine = build(model, tmp_path / "out")
    assert engine.proof is not None
    assert engine.proof.weight_bytes is not None
    assert engine.path.read_bytes().find(b"vtrt") in range(8)
    assert engine.proof == PrecisionProof(
        method="types of the network that NVIDIA's parser made, and the builder's own count of weight memory",
        layers=6,
        as_asked=6,
        by_precision={"fp32": 6},
        weight_bytes=engine.proof.weight_bytes,
        expected_weight_bytes=sum(
            onnx.numpy_helper.to_array(weight).nbytes for weight in onnx.load(model.path).graph.initializer
        ),
    )
    assert engine.notes[-1] == ("precision: asked FP32: 6 of 6 layers that multiply are as the model asks (fp32 6)")
    assert engine.profiles == ({"batch": DimRange(min=1, opt=4, max=64)},)
    assert {key: value for key, value in engine.options.items() if key != "build_s"} == {
        "tf32": "off",
        "verbosity": "detailed",
        "profiles": "1",
    }


def test_the_builders_log_is_kept_beside_the_plan(model: OnnxModel, tmp_path: Path) -> None:
    engine = build(model, tmp_path / "out")
    text = (tmp_path / "out" / BUILDER_LOG).read_text()
    assert engine.proof is not None
    assert f"[INFO] Total Weights Memory: {engine.proof.weight_bytes} bytes\n" in text
    assert "[VERBOSE]" not in text


def test_progress_goes_up_to_the_end(model: OnnxModel, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    build(model, tmp_path / "out", progress=lambda done, total: seen.append((done, total)))
    assert seen == sorted(set(seen))
    assert len(seen) > 10
    assert seen[-1] == (100, 100)


@pytest.mark.parametrize(
    ("options", "seen"),
    [
        ({"tf32": True}, {"tf32": "on"}),
        ({"workspace_mib": 64}, {"workspace_mib": "64"}),
        ({"weight_streaming_mib": 1}, {"weight_streaming": "on", "weight_streaming_mib": "1"}),
        ({"verbosity": "none"}, {"verbosity": "none"}),
        ({"compute_capabilities": ("8.6", "12.0")}, {"compute_capabilities": "8.6, 12.0"}),
        (
            {"profiles": tuple({"batch": DimRange(min=a, opt=a, max=b)} for a, b in ((1, 1), (2, 64)))},
            {"profiles": "2"},
        ),
    ],
)
def test_an_option_changes_the_plan_and_is_read_back(
    model: OnnxModel, tmp_path: Path, options: dict[str, Any], seen: dict[str, str]
) -> None:
    plain = {build(model, tmp_path / f"plain{i}").sha256 for i in range(2)}
    changed = build(model, tmp_path / "changed", **options)
    assert seen.items() <= changed.options.items()
    assert changed.sha256 not in plain


@pytest.mark.parametrize("option", ["optimization_level", "aux_streams", "sparse_weights", "tiling"])
def test_an_option_that_is_refused_really_has_no_effect(model: OnnxModel, tmp_path: Path, option: str) -> None:
    """Were the builder to mind it one day, this says so."""
    value = {"optimization_level": 5, "aux_streams": 2, "sparse_weights": True, "tiling": "full"}[option]
    plain = {build(model, tmp_path / f"plain{i}").sha256 for i in range(3)}
    changed = {build(model, tmp_path / f"changed{i}", **{option: value}).sha256 for i in range(3)}
    assert plain & changed


def test_two_profiles_are_kept_in_the_engine(model: OnnxModel, tmp_path: Path) -> None:
    profiles = ({"batch": DimRange(min=1, opt=1, max=1)}, {"batch": DimRange(min=2, opt=32, max=64)})
    assert build(model, tmp_path / "out", profiles=profiles).profiles == profiles


def test_a_model_without_dynamic_axes_has_no_profile(tmp_path: Path) -> None:
    net = networks.Net()
    net.op("MatMul", ["x", net.normal("w", 8, 4)], "y")
    static = replace(networks.save(net.model({"x": [2, 8]}, {"y": [2, 4]}), tmp_path / "model.onnx"), axes={})
    assert build(static, tmp_path / "out").profiles == ()


def test_attention_in_fp32_is_built_from_its_parts(tmp_path: Path) -> None:
    """NVIDIA has no kernel for it, and without leave to decompose it the build fails."""
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 4, 16, 32]) for name in "qkv"]
    graph = helper.make_graph(
        [helper.make_node("Attention", list("qkv"), ["y"], name="the_attention")],
        "attention",
        inputs,
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 4, 16, 32])],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
    engine = build(networks.save(proto, tmp_path / "model.onnx"), tmp_path / "out")
    assert engine.options["attention"] == "1 may be decomposed"
    assert engine.proof is not None
    assert engine.proof.by_precision == {"fp32": 1}


# --- what is refused ------------------------------------------------------------------------------------------------


def test_every_node_that_the_parser_does_not_take_is_named_at_once(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"], name="first"),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"], name="second"),
        helper.make_node("Unique", ["d"], ["u"], name="third"),
        helper.make_node("Zanzibar", ["u"], ["y"], name="fourth", domain="odd"),
    ]
    graph = helper.make_graph(
        nodes,
        "bad",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n"])],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("odd", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), tmp_path / "model.onnx")
    good = networks.save(networks.linear_map(np.eye(4)), tmp_path / "good.onnx")
    assert refusal(replace(good, path=tmp_path / "model.onnx"), tmp_path / "out") == (
        "model.onnx: NVIDIA's parser does not take 3 nodes; operators that TensorRT has were expected. Quantise statically, "
        'with precision = "int8", or build this engine with backend = "onnxruntime".\n'
        "  node 'first' (DynamicQuantizeLinear): TensorRT does not have it\n"
        "  node 'third' (Unique): TensorRT does not have it\n"
        "  node 'fourth' (Zanzibar): TensorRT has no such operator, and no plugin of that name is there"
    )


def test_a_file_that_is_no_model(model: OnnxModel, tmp_path: Path) -> None:
    path = tmp_path / "torn.onnx"
    path.write_bytes(model.path.read_bytes()[:200])
    with pytest.raises(Exception):  # noqa: B017 - read before NVIDIA's parser sees it
        build(replace(model, path=path), tmp_path / "out")


def test_a_workspace_in_which_no_kernel_fits(tmp_path: Path) -> None:
    large = networks.save(networks.residual(channels=64, size=64), tmp_path / "model.onnx")
    said = refusal(large, tmp_path / "out", workspace_mib=1)
    assert said.startswith(
        "model.onnx: NVIDIA's builder failed: no kernel fits into the workspace; an engine was expected. Raise [tensorrt] "
        "workspace_mib. Its own words: "
    )
    assert said.endswith(SAID)


def test_a_target_that_lacks_the_instructions(model: OnnxModel, tmp_path: Path) -> None:
    said = refusal(model, tmp_path / "out", compute_capabilities=("7.5",))
    assert said.startswith(
        "model.onnx: NVIDIA's builder failed: the target sm75 has no FP32 GEMM; an engine was expected. Remove it from "
        "[tensorrt] compute_capabilities. Its own words: "
    )
    assert said.endswith(SAID)


def test_an_engine_that_is_in_none_of_its_layers_what_was_asked(model: OnnxModel, tmp_path: Path) -> None:
    """FP16 asked, FP32 delivered, exit 0: the fault that other tools let through."""
    assert refusal(replace(model, precision=Precision.FP16), tmp_path / "out") == (
        "model.onnx: asked FP16: 6 of 6 layers that multiply are as the model asks (fp32 6): none of them is; at least one "
        "was expected. Keep fewer layers (engines.keep), or build another precision."
    )


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The file seems to ask for INT8 in one layer, and for a quarter of the weights' bytes."""
    real = precision.asked

    def lie(path: Path) -> Any:
        wanted, stored = real(path)
        return (replace(wanted[0], precision="int8"), *wanted[1:]), stored

    monkeypatch.setattr(precision, "asked", lie)


def test_a_layer_that_departs_is_an_error(planted: None, model: OnnxModel, tmp_path: Path) -> None:
    assert refusal(model, tmp_path / "out") == (
        "model.onnx: asked FP32: 5 of 6 layers that multiply are as the model asks (fp32 6); every layer in the precision "
        'that the model asks for was expected. Accept them with [tensorrt] departures = "report".\n'
        "  node_stem (Conv): asked int8, got fp32; the parser gave the layer other types than the file"
    )


def test_a_layer_that_departs_is_a_loud_line_where_the_recipe_allows_it(
    planted: None, model: OnnxModel, tmp_path: Path
) -> None:
    assert build(model, tmp_path / "out", departures="report").notes[-2:] == (
        "PRECISION DEPARTS: asked FP32: 5 of 6 layers that multiply are as the model asks (fp32 6)",
        "node_stem (Conv): asked int8, got fp32; the parser gave the layer other types than the file",
    )


def test_a_full_disk_leaves_no_plan_that_could_be_taken_for_one(model: OnnxModel, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "engine.plan").symlink_to("/dev/full")
    with pytest.raises(OSError) as caught:
        RTX.build(model, name="e", reason="", threads=1, out_dir=folder)
    assert caught.value.errno == errno.ENOSPC


def test_a_probe_that_does_not_fit_is_found_without_running_it(model: OnnxModel, tmp_path: Path) -> None:
    probe = tmp_path / "probe.npz"
    np.savez(probe, x=np.zeros((1, 3, 15, 16), np.float32))
    assert refusal(replace(model, probe=probe), tmp_path / "out") == (
        "engine.plan: input 'x': found float32 [1, 3, 15, 16]; float32 [batch, 3, 16, 16] was expected. Convert it."
    )


def test_a_probe_outside_every_profile_is_found_without_running_it(model: OnnxModel, tmp_path: Path) -> None:
    probe = tmp_path / "probe.npz"
    np.savez(probe, x=np.zeros((8, 3, 16, 16), np.float32))
    profiles = ({"batch": DimRange(min=1, opt=1, max=4)}, {"batch": DimRange(min=16, opt=16, max=64)})
    assert refusal(replace(model, probe=probe), tmp_path / "out", profiles=profiles) == (
        "engine.plan: axis 'batch' is 8; 1 to 4 was expected (profile 1), 16 to 64 (profile 2). Build with a wider profile."
    )


def test_profiles_that_leave_something_out_are_noted(tmp_path: Path) -> None:
    net = networks.Net()
    net.op("MatMul", ["x", net.normal("w", 8, 4)], "y")
    two = networks.save(
        net.model({"x": ["batch", "length", 8]}, {"y": ["batch", "length", 4]}), tmp_path / "model.onnx"
    )
    two = replace(two, axes={"batch": DimRange(min=1, opt=1, max=8), "length": DimRange(min=1, opt=4, max=64)})
    one, long = DimRange(min=1, opt=1, max=1), DimRange(min=1, opt=4, max=64)
    many, short = DimRange(min=1, opt=4, max=8), DimRange(min=1, opt=4, max=16)
    profiles = ({"batch": one, "length": long}, {"batch": many, "length": short})
    assert build(two, tmp_path / "out", profiles=profiles).notes[0] == (
        "the profiles leave out combinations that [axes] allows, such as batch 8, length 64: such inputs are refused"
    )
    assert not any("leave out" in note for note in build(two, tmp_path / "whole").notes)


def test_a_plan_that_was_tampered_with_is_not_deserialised(model: OnnxModel, tmp_path: Path) -> None:
    engine = build(model, tmp_path / "out")
    data = bytearray(engine.path.read_bytes())
    data[len(data) // 2] ^= 1
    engine.path.write_bytes(data)
    with pytest.raises(BuildError) as caught:
        RTX.open(engine, threads=1)
    assert caught.value.message.startswith("engine.plan: ")
    assert hashlib.sha256(data).hexdigest() in caught.value.message


# --- the builder's words --------------------------------------------------------------------------------------------


def test_errors_are_shown_once_and_without_the_builders_own_source_lines() -> None:
    lines = [
        "ModelImporter.cpp:142: --- Begin node ---",
        "[myelin.cpp::compile::12] Error Code 9: too small",
        "IBuilder::buildSerializedNetwork: Error Code 9: too small",
    ]
    assert shorten(lines) == "Error Code 9: too small"
    assert shorten([]) == "it gave no reason"


# --- the timing cache -----------------------------------------------------------------------------------------------


@pytest.fixture
def config() -> Iterator[Any]:
    import tensorrt_rtx

    logger = tensorrt_rtx.Logger(tensorrt_rtx.Logger.ERROR)
    made = tensorrt_rtx.Builder(logger)
    yield made.create_builder_config()
    assert logger is not None  # it must outlive the builder


def test_a_timing_cache_is_kept_and_found_again(config: Any, tmp_path: Path) -> None:
    timings = TimingCache(tmp_path / "timings", {"tensorrt": "11.4", "gpu": "L4"})
    first = timings.merge(config, timings.attach(config))
    assert timings.path.stat().st_size > 0
    assert timings.merge(config, timings.attach(config)) == first
    assert len(first) == 64


def test_timings_of_another_gpu_are_another_file(tmp_path: Path) -> None:
    paths = {TimingCache(tmp_path, {"gpu": gpu, "driver": driver}).path for gpu in "AB" for driver in "12"}
    assert len(paths) == 4


def test_a_damaged_timing_cache_is_begun_anew(config: Any, tmp_path: Path) -> None:
    timings = TimingCache(tmp_path, {"gpu": "L4"})
    timings.path.write_bytes(b"not timings")
    timings.merge(config, timings.attach(config))
    assert timings.path.read_bytes() != b"not timings"


def test_two_builds_that_end_at_once_both_leave_whole_timings(tmp_path: Path) -> None:
    code = (
        "import sys, tensorrt_rtx as trt\n"
        "from pathlib import Path\n"
        "from compiler.backends.tensorrt.timing_cache import TimingCache\n"
        "logger = trt.Logger(trt.Logger.ERROR); builder = trt.Builder(logger)\n"
        "config = builder.create_builder_config(); timings = TimingCache(Path(sys.argv[1]), {'gpu': 'L4'})\n"
        "for _ in range(50): timings.merge(config, timings.attach(config))\n"
    )
    running = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], env=dict(os.environ)) for _ in range(3)]
    assert [child.wait() for child in running] == [0, 0, 0]
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".lock", ".timings"]

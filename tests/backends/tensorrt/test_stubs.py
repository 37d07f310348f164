"""The types of TensorRT's bindings: they are what the bindings say, and a call that does not exist is an error."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
BUILDER = ROOT / "compiler" / "backends" / "tensorrt"
needs_bindings = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_bindings") is None,
    reason="tensorrt_bindings is missing (scripts/rtx_builder.py installs it)",
)

# What TensorRT 11 took away, and other mistakes; each with what mypy says, None where it should say nothing.
CALLS: dict[str, str | None] = {
    "config.set_flag(trt.BuilderFlag.TF32)": None,
    "config.set_flag(trt.BuilderFlag.FP16)": '"type[BuilderFlag]" has no attribute "FP16"',
    "config.set_flag(trt.BuilderFlag.INT8)": '"type[BuilderFlag]" has no attribute "INT8"',
    "config.set_calibration_profile(profile)": '"IBuilderConfig" has no attribute "set_calibration_profile"',
    "config.int8_calibrator = None": '"IBuilderConfig" has no attribute "int8_calibrator"',
    "config.max_workspace_size = 1": '"IBuilderConfig" has no attribute "max_workspace_size"',
    "config.max_aux_streams = 2": None,
    "config.max_aux_streams = 'two'": (
        'Incompatible types in assignment (expression has type "str", variable has type "SupportsInt")'
    ),
    "builder.build_engine(network, config)": '"Builder" has no attribute "build_engine"',
    "builder.platform_has_fast_fp16": '"Builder" has no attribute "platform_has_fast_fp16"',
    "builder.build_serialized_network(network)": (
        'No overload variant of "build_serialized_network" of "Builder" matches argument type "INetworkDefinition"'
    ),
    "bytes(builder.build_serialized_network(network, config))": (
        'Argument 1 to "bytes" has incompatible type "IHostMemory | None"; '
        'expected "Iterable[SupportsIndex] | SupportsIndex | SupportsBytes | Buffer"'
    ),
    "layer.precision": '"ILayer" has no attribute "precision"',
    "layer.set_output_type(0, trt.float16)": ('"ILayer" has no attribute "set_output_type"; maybe "get_output_type"?'),
    "tuple(tensor.shape)": None,
    "tensor.set_dynamic_range(-1, 1)": '"ITensor" has no attribute "set_dynamic_range"',
    "trt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH": (
        '"type[NetworkDefinitionCreationFlag]" has no attribute "EXPLICIT_BATCH"'
    ),
    "trt.IInt8Calibrator": 'Module has no attribute "IInt8Calibrator"',
    "profile.set_shape('x', (1, 3), (2, 3), (4, 3))": None,
    "profile.set_shape('x', (1, 3), (2, 3))": 'Missing positional argument "max" in call to "set_shape" of "IOptimizationProfile"',
    "parser.num_errors + len(parser.get_error(0).desc())": None,
    "rtx.set_compute_capabilities(config, [86, 89])": None,
    "rtx.set_compute_capabilities(config, 86)": (
        'Argument 2 to "set_compute_capabilities" has incompatible type "int"; expected "Sequence[int]"'
    ),
}
HEAD = """\
import tensorrt as trt
import tensorrt_rtx as rtx

def calls(builder: trt.Builder, network: rtx.INetworkDefinition, config: trt.IBuilderConfig, layer: trt.ILayer,
          profile: trt.IOptimizationProfile, tensor: trt.ITensor, parser: trt.OnnxParser) -> None:
"""


@pytest.mark.xdist_group("mypy")
def test_mypy_knows_the_calls_and_the_builder_uses_no_other(tmp_path: Path) -> None:
    snippet = tmp_path / "calls.py"
    snippet.write_text(HEAD + "".join(f"    {call}\n" for call in CALLS))
    command = [sys.executable, "-m", "mypy", "--no-error-summary", "--hide-error-codes", "--no-pretty"]
    done = subprocess.run([*command, str(BUILDER), str(snippet)], capture_output=True, text=True, cwd=ROOT)
    lines = [line for line in done.stdout.splitlines() if " note: " not in line]
    first = len(HEAD.splitlines()) + 1
    said = dict.fromkeys(CALLS, None) | {
        list(CALLS)[int(line.split(":")[1]) - first]: line.partition(" error: ")[2]
        for line in lines
        if line.partition(":")[0].endswith(snippet.name)
    }
    assert said == CALLS
    assert [line for line in lines if not line.partition(":")[0].endswith(snippet.name)] == []


@needs_bindings
def test_the_committed_types_are_what_the_bindings_say() -> None:
    script = ROOT / "scripts" / "tensorrt_stubs.py"
    done = subprocess.run([sys.executable, str(script), "--check"], capture_output=True, text=True)
    if "was expected" in done.stderr:
        pytest.skip(done.stderr.strip())
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "", "")

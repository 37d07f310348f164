"""The script that joins the two wheels, and what it makes: every call that is offered answers truly, each asked in a
process of its own, since a wrong one crashes."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
import signal
import stat
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

from scripts import rtx_builder  # noqa: E402

SCRIPT = ROOT / "scripts" / "rtx_builder.py"
installed = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx is missing (scripts/rtx_builder.py makes it)"
)

# --- the installation, in an environment whose Python only pretends ---------------------------------------------------

FAKE_PYTHON = """\
#!{python}
import pathlib, sys, time
home = pathlib.Path({home!r})
what = "pip" if "pip" in sys.argv else "site" if "sysconfig" in sys.argv[-1] else "import"
with (home / "log").open("a") as log:
    log.write(what + "\\n")
if (home / f"fail-{{what}}").exists():
    print((home / f"fail-{{what}}").read_text(), file=sys.stderr)
    sys.exit(1)
if what == "site":
    print(home / "site")
if what == "pip":
    for _ in range(60_000):
        if (home / "log").read_text().count("site") >= int((home / "callers").read_text()):
            break
        time.sleep(0.001)
    for wheel in sys.argv[-2:]:
        name, version = wheel.split("==")
        (home / "site" / f"{{name.replace('-', '_')}}-{{version}}.dist-info").mkdir(exist_ok=True)
"""


class Environment:
    """A folder for packages and a Python that logs what it is asked for; ``fail`` makes one question fail."""

    def __init__(self, home: Path) -> None:
        self.home, self.site, self.python = home, home / "site", home / "python"
        self.site.mkdir()
        self.python.write_text(FAKE_PYTHON.format(python=sys.executable, home=str(home)))
        self.python.chmod(self.python.stat().st_mode | stat.S_IEXEC)
        self.expect_callers(1)

    def expect_callers(self, count: int) -> None:
        (self.home / "callers").write_text(str(count))

    def fail(self, what: str, words: str) -> None:
        (self.home / f"fail-{what}").write_text(words)

    def log(self) -> list[str]:
        path = self.home / "log"
        return path.read_text().split() if path.exists() else []

    def install(self) -> int:
        return rtx_builder.main(["--python", str(self.python)])

    def files(self) -> set[str]:
        return {path.name for path in (self.site / "tensorrt_rtx").iterdir()}


ALL = {"__init__.py", "installed", "libnvinfer.so.11", "libnvinfer_plugin.so.11", "libnvonnxparser.so.11"}
linux = pytest.mark.skipif(
    sysconfig.get_platform() != rtx_builder.PLATFORM, reason=f"the wheels exist for {rtx_builder.PLATFORM} only"
)


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    return Environment(tmp_path)


@linux
def test_it_installs_once_and_then_only_looks(environment: Environment) -> None:
    assert environment.install() == 0
    assert environment.log() == ["site", "pip", "import"]
    assert environment.files() == ALL
    assert environment.install() == 0
    assert environment.log() == ["site", "pip", "import", "site"]


@linux
def test_looking_starts_nothing_and_imports_nothing_heavy(environment: Environment) -> None:
    assert environment.install() == 0
    code = (
        f"import sys, sysconfig; sysconfig.get_path = lambda _: {str(environment.site)!r}\n"
        "from scripts import rtx_builder; rtx_builder.install(sys.executable)\n"
        "print(*sorted({'subprocess', 'argparse', 'ctypes', 'tensorrt_rtx', 'tensorrt_bindings'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert (done.stdout.strip(), done.stderr) == ("", "")


@linux
def test_an_interrupted_installation_is_finished_by_the_next_call(
    environment: Environment, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(rtx_builder, "_compile", interrupted)
        with pytest.raises(KeyboardInterrupt):
            environment.install()
    assert "installed" not in environment.files()
    assert environment.install() == 0
    assert environment.files() == ALL


@linux
def test_a_repair_that_is_interrupted_leaves_nothing_that_looks_whole(
    environment: Environment, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert environment.install() == 0
    next(environment.site.glob("tensorrt_cu13_bindings-*")).rmdir()
    environment.fail("import", "ImportError: libnvinfer.so.11")
    assert environment.install() == 1
    assert "installed" not in environment.files()


@linux
@pytest.mark.parametrize("spoil", ["a wheel is gone", "the script has changed"])
def test_what_is_not_up_to_date_is_installed_again(environment: Environment, spoil: str) -> None:
    assert environment.install() == 0
    if spoil == "a wheel is gone":
        next(environment.site.glob("tensorrt_cu13_bindings-*")).rmdir()
    else:
        (environment.site / "tensorrt_rtx" / "installed").write_text("another text's hash")
    assert not rtx_builder.up_to_date(environment.site)
    assert environment.install() == 0
    assert environment.log().count("pip") == 2
    assert rtx_builder.up_to_date(environment.site)


@linux
def test_two_calls_at_once_install_once(environment: Environment) -> None:
    environment.expect_callers(2)
    command = [sys.executable, str(SCRIPT), "--python", str(environment.python)]
    calls = [subprocess.Popen(command, stderr=subprocess.DEVNULL) for _ in range(2)]
    assert [call.wait() for call in calls] == [0, 0]
    assert environment.log().count("pip") == 1
    assert environment.files() == ALL


def _refused(environment: Environment, capsys: pytest.CaptureFixture[str]) -> str:
    assert environment.install() == 1
    lines = capsys.readouterr().err.splitlines()
    return lines[-1]


@linux
def test_no_compiler(environment: Environment, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    assert _refused(environment, capsys) == (
        "rtx_builder: no C compiler: found none named no-such-compiler; one was expected. Install gcc, or set CC."
    )
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", str(environment.site))
    assert _refused(environment, capsys) == (
        "rtx_builder: no C compiler: found none named cc, gcc or clang; one was expected. Install gcc, or set CC."
    )
    assert "pip" not in environment.log()


@linux
def test_a_compiler_that_fails(environment: Environment, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("CC", "false")
    assert _refused(environment, capsys) == "rtx_builder: the C compiler failed: exit code 1"


@linux
def test_pip_fails(environment: Environment, capsys: Any) -> None:
    environment.fail("pip", "WARNING: slow\nERROR: No space left on device\nhint: see the manual\n")
    assert _refused(environment, capsys) == "rtx_builder: pip failed: ERROR: No space left on device"


@linux
def test_no_wheel_for_this_python(environment: Environment, capsys: Any) -> None:
    environment.fail("pip", "ERROR: No matching distribution found for tensorrt-cu13-bindings==11.4.0.106")
    assert _refused(environment, capsys) == (
        "rtx_builder: pip failed: ERROR: No matching distribution found for tensorrt-cu13-bindings==11.4.0.106"
    )


@linux
def test_what_was_installed_does_not_work(environment: Environment, capsys: Any) -> None:
    environment.fail("import", "Traceback (most recent call last):\nImportError: libnvinfer.so.11: no such file")
    assert _refused(environment, capsys) == (
        "rtx_builder: tensorrt_rtx failed: ImportError: libnvinfer.so.11: no such file"
    )
    assert "installed" not in environment.files()


@linux
@pytest.mark.parametrize(
    ("folder", "name"),
    [("tensorrt_libs", "TensorRT itself"), ("tensorrt_rtx-1.7.1.dist-info", "NVIDIA's own tensorrt_rtx")],
)
def test_what_nvidia_installed_is_left_alone(environment: Environment, capsys: Any, folder: str, name: str) -> None:
    (environment.site / folder).mkdir()
    assert _refused(environment, capsys) == (
        f"rtx_builder: {name} is installed in {environment.site}; an environment without it was expected, since parts "
        "of it would be replaced. Use another environment."
    )
    assert environment.log() == ["site"]


@linux
def test_the_compiler_may_have_arguments(environment: Environment, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "cc -Wall -Werror -Wno-unused-parameter")
    assert environment.install() == 0


def test_another_platform(environment: Environment, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr("sysconfig.get_platform", lambda: "macosx-14-arm64")
    assert _refused(environment, capsys) == (
        "rtx_builder: found macosx-14-arm64; the wheels exist for linux-x86_64 only. Use such a machine."
    )
    assert environment.log() == []


@linux
def test_no_such_python(tmp_path: Path, capsys: Any) -> None:
    missing = str(tmp_path / "python")
    assert rtx_builder.main(["--python", missing]) == 1
    assert capsys.readouterr().err == (
        f"rtx_builder: {missing}: cannot be run: No such file or directory. Name one that can.\n"
    )


# --- what it makes ----------------------------------------------------------------------------------------------------


class World:
    """What a user of the builder has in hand: `max(x.reshape(shape), 0)`, parsed, and one thing of each class."""

    def __init__(self) -> None:
        trt: Any = importlib.import_module("tensorrt_rtx")

        self.trt = trt
        self.log: list[tuple[Any, str]] = []
        self.logger = _logger(trt, self.log)
        self.builder = trt.Builder(self.logger)
        self.network = self.builder.create_network(0)
        self.parser = trt.OnnxParser(self.network, self.logger)
        assert self.parser.parse(reshape_relu()), self.log
        self.x, self.shape = self.network.get_input(0), self.network.get_input(1)
        layers = [self.network.get_layer(index) for index in range(self.network.num_layers)]
        self.relu = next(layer for layer in layers if layer.name == "relu")
        self.config = self.builder.create_builder_config()
        self.profile = self.builder.create_optimization_profile()
        self.cache = self.config.create_timing_cache(b"")
        self.static = self.builder.create_network(0)
        self.static_parser = trt.OnnxParser(self.static, self.logger)
        assert self.static_parser.parse(determinant_free()), self.log

    def refused(self) -> Any:
        """A parser that has one error."""
        self.empty = self.builder.create_network(0)
        self.refusing = self.trt.OnnxParser(self.empty, self.logger)
        assert not self.refusing.parse(determinant())
        return self.refusing

    def after(self, owner: Any, name: str, value: Any) -> Any:
        setattr(owner, name, value)
        return getattr(owner, name)


def _logger(trt: Any, log: list[tuple[Any, str]]) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            log.append((severity, message))

    return Logger()


def _monitor(trt: Any) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

    return Monitor()


def _model(nodes: list[Any], inputs: list[Any], outputs: list[Any], initializers: list[Any] | None = None) -> bytes:
    from onnx import helper

    graph = helper.make_graph(nodes, "graph", inputs, outputs, initializers or [])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=10)
    return bytes(model.SerializeToString())


def _value(name: str, dims: list[int | str], kind: str = "FLOAT") -> Any:
    from onnx import TensorProto, helper

    return helper.make_tensor_value_info(name, getattr(TensorProto, kind), dims)


def _node(operator: str, inputs: list[str], outputs: list[str], name: str) -> Any:
    from onnx import helper

    return helper.make_node(operator, inputs, outputs, name=name)


def reshape_relu() -> bytes:
    nodes = [_node("Reshape", ["x", "shape"], ["y"], "reshape"), _node("Relu", ["y"], ["z"], "relu")]
    inputs = [_value("x", ["batch", 3]), _value("shape", [2], "INT64")]
    return _model(nodes, inputs, [_value("z", ["rows", "columns"])])


def determinant_free() -> bytes:
    return _model([_node("Relu", ["a"], ["b"], "only")], [_value("a", [2, 2])], [_value("b", [2, 2])])


def determinant() -> bytes:
    return _model([_node("Det", ["a"], ["d"], "determinant")], [_value("a", [2, 2])], [_value("d", [])])


def fp8() -> bytes:
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    weights = numpy_helper.from_array(np.linspace(-1, 1, 256, dtype=np.float32).reshape(16, 16), "w")
    scale = helper.make_tensor("scale", TensorProto.FLOAT, [], [0.1])
    zero = helper.make_tensor("zero", TensorProto.FLOAT8E4M3FN, [], [0.0])
    nodes = [
        _node("QuantizeLinear", ["x", "scale", "zero"], ["xq"], "q1"),
        _node("DequantizeLinear", ["xq", "scale", "zero"], ["xd"], "d1"),
        _node("QuantizeLinear", ["w", "scale", "zero"], ["wq"], "q2"),
        _node("DequantizeLinear", ["wq", "scale", "zero"], ["wd"], "d2"),
        _node("MatMul", ["xd", "wd"], ["y"], "multiply"),
    ]
    return _model(nodes, [_value("x", [16, 16])], [_value("y", [16, 16])], [scale, zero, weights])


def _done(call: Callable[..., Any], *arguments: Any, then: Callable[[], Any]) -> Any:
    call(*arguments)
    return then()


def _flag(w: World) -> Any:
    return w.trt.BuilderFlag.REFIT


def _workspace(w: World) -> Any:
    return w.trt.MemoryPoolType.WORKSPACE


def _preview(w: World) -> Any:
    return w.trt.PreviewFeature.ALIASED_PLUGIN_IO_10_03


def _native(w: World) -> Any:
    return w.trt.OnnxParserFlag.NATIVE_INSTANCENORM


def _shaped(w: World) -> Any:
    w.profile.set_shape("x", (1, 3), (2, 3), (4, 3))
    w.profile.set_shape_input("shape", (3, 1), (3, 2), (3, 4))
    return w.profile


def _two_profiles(w: World) -> list[int]:
    return [w.config.add_optimization_profile(_shaped(w)) for _ in range(2)]


def _plan(w: World) -> Any:
    return w.builder.build_serialized_network(w.static, w.config)


def _dims(value: Any) -> list[list[int]]:
    return [list(dims) for dims in value]


def _kind(value: Any) -> str:
    return type(value).__name__


def _loaded(w: World) -> Any:
    """A parser whose model came in two steps."""
    w.empty = w.builder.create_network(0)
    w.refusing = w.trt.OnnxParser(w.empty, w.logger)
    assert w.refusing.load_model_proto(reshape_relu())
    return w.refusing


def _asked(w: World, model: Callable[[], bytes]) -> tuple[bool, Any]:
    """Whether a fresh parser supports a model, and that parser."""
    w.empty = w.builder.create_network(0)
    parser = w.trt.OnnxParser(w.empty, w.logger)
    return parser.supports_model_v2(model()), parser


def _file(w: World) -> str:
    path = Path(os.environ["PROBE_FOLDER"]) / "model.onnx"
    path.write_bytes(reshape_relu())
    return str(path)


def _key(w: World) -> Any:
    return w.trt.TimingCacheKey.parse("0x" + "1" * 32)


# Each is asked in a forked child. Names ending in "=" set a property and read it back.
PROBES: dict[str, tuple[Callable[[World], Any], Any]] = {
    "ITensor.name": (lambda w: w.x.name, "x"),
    "ITensor.name=": (lambda w: w.after(w.x, "name", "other"), "other"),
    "ITensor.dtype": (lambda w: w.shape.dtype.name, "INT64"),
    "ITensor.shape": (lambda w: list(w.x.shape), [-1, 3]),
    "ITensor.shape=": (lambda w: list(w.after(w.x, "shape", (5, 3))), [5, 3]),
    "ITensor.is_network_input": (lambda w: [t.is_network_input for t in (w.x, w.relu.get_output(0))], [True, False]),
    "ITensor.is_network_output": (lambda w: [t.is_network_output for t in (w.x, w.relu.get_output(0))], [False, True]),
    "ITensor.is_shape_tensor": (lambda w: [t.is_shape_tensor for t in (w.x, w.shape)], [False, True]),
    "ITensor.is_execution_tensor": (lambda w: [t.is_execution_tensor for t in (w.x, w.shape)], [True, False]),
    "ITensor.get_dimension_name": (lambda w: [w.x.get_dimension_name(axis) for axis in (0, 1)], ["batch", None]),
    "ILayer.name": (lambda w: w.relu.name, "relu"),
    "ILayer.name=": (lambda w: w.after(w.relu, "name", "other"), "other"),
    "ILayer.type": (lambda w: w.relu.type.name, "ACTIVATION"),
    "ILayer.metadata": (lambda w: w.relu.metadata, "[ONNX Layer: relu]"),
    "ILayer.metadata=": (lambda w: w.after(w.relu, "metadata", "mine"), "mine"),
    "ILayer.num_inputs": (lambda w: w.relu.num_inputs, 1),
    "ILayer.num_outputs": (lambda w: w.relu.num_outputs, 1),
    "ILayer.num_ranks": (lambda w: w.relu.num_ranks, 1),
    "ILayer.num_ranks=": (lambda w: w.after(w.relu, "num_ranks", 1), 1),
    "ILayer.get_input": (lambda w: w.relu.get_input(0).name, "y"),
    "ILayer.set_input": (lambda w: _done(w.relu.set_input, 0, w.x, then=lambda: w.relu.get_input(0).name), "x"),
    "ILayer.get_output": (lambda w: w.relu.get_output(0).name, "z"),
    "ILayer.get_output_type": (lambda w: w.relu.get_output_type(0).name, "FLOAT"),
    "INetworkDefinition.name": (lambda w: w.network.name, "Unnamed Network 0"),
    "INetworkDefinition.builder": (lambda w: w.network.builder is w.builder, True),
    "INetworkDefinition.num_layers": (lambda w: w.static.num_layers, 1),
    "INetworkDefinition.num_inputs": (lambda w: w.network.num_inputs, 2),
    "INetworkDefinition.num_outputs": (lambda w: w.network.num_outputs, 1),
    "INetworkDefinition.get_layer": (lambda w: w.static.get_layer(0).name, "only"),
    "INetworkDefinition.get_input": (lambda w: [w.network.get_input(i).name for i in (0, 1)], ["x", "shape"]),
    "INetworkDefinition.get_output": (lambda w: w.network.get_output(0).name, "z"),
    "INetworkDefinition.add_input": (
        lambda w: _done(w.network.add_input, "more", w.trt.float16, (4, 5), then=lambda: w.network.get_input(2).name),
        "more",
    ),
    "INetworkDefinition.mark_output": (
        lambda w: _done(w.network.mark_output, w.relu.get_input(0), then=lambda: w.network.get_output(1).name),
        "y",
    ),
    "INetworkDefinition.unmark_output": (
        lambda w: _done(w.network.unmark_output, w.relu.get_output(0), then=lambda: w.network.num_outputs),
        0,
    ),
    "INetworkDefinition.remove_tensor": (
        lambda w: _done(
            lambda: w.network.remove_tensor(w.network.add_input("more", w.trt.float16, (4, 5))),
            then=lambda: w.network.num_inputs,
        ),
        2,
    ),
    "IBuilderConfig.DLA_core": (lambda w: w.config.DLA_core, -1),
    "IBuilderConfig.DLA_core=": (lambda w: w.after(w.config, "DLA_core", 0), -1),
    "IBuilderConfig.avg_timing_iterations": (lambda w: w.config.avg_timing_iterations, 1),
    "IBuilderConfig.avg_timing_iterations=": (lambda w: w.after(w.config, "avg_timing_iterations", 4), 4),
    "IBuilderConfig.builder_optimization_level": (lambda w: w.config.builder_optimization_level, 3),
    "IBuilderConfig.builder_optimization_level=": (lambda w: w.after(w.config, "builder_optimization_level", 1), 1),
    "IBuilderConfig.default_device_type": (lambda w: w.config.default_device_type.name, "GPU"),
    "IBuilderConfig.default_device_type=": (
        lambda w: w.after(w.config, "default_device_type", w.trt.DeviceType.DLA).name,
        "DLA",
    ),
    "IBuilderConfig.engine_capability": (lambda w: w.config.engine_capability.name, "STANDARD"),
    "IBuilderConfig.engine_capability=": (
        lambda w: w.after(w.config, "engine_capability", w.trt.EngineCapability.SAFETY).name,
        "SAFETY",
    ),
    "IBuilderConfig.flags": (lambda w: w.config.flags == 1 << int(w.trt.BuilderFlag.TF32), True),
    "IBuilderConfig.flags=": (lambda w: w.after(w.config, "flags", 1 << int(_flag(w))) == 1 << int(_flag(w)), True),
    "IBuilderConfig.get_flag": (
        lambda w: [w.config.get_flag(f) for f in (w.trt.BuilderFlag.TF32, _flag(w))],
        [True, False],
    ),
    "IBuilderConfig.set_flag": (
        lambda w: _done(w.config.set_flag, _flag(w), then=lambda: w.config.get_flag(_flag(w))),
        True,
    ),
    "IBuilderConfig.clear_flag": (
        lambda w: _done(w.config.clear_flag, w.trt.BuilderFlag.TF32, then=lambda: w.config.flags),
        0,
    ),
    "IBuilderConfig.hardware_compatibility_level": (lambda w: w.config.hardware_compatibility_level.name, "NONE"),
    "IBuilderConfig.hardware_compatibility_level=": (
        lambda w: w.after(w.config, "hardware_compatibility_level", w.trt.HardwareCompatibilityLevel.AMPERE_PLUS).name,
        "NONE",  # says in the log that it is unsupported
    ),
    "IBuilderConfig.l2_limit_for_tiling=": (lambda w: w.after(w.config, "l2_limit_for_tiling", 1 << 20), 1 << 20),
    "IBuilderConfig.l2_limit_for_tiling": (lambda w: w.config.l2_limit_for_tiling, 0),
    "IBuilderConfig.max_aux_streams": (lambda w: w.config.max_aux_streams, -1),
    "IBuilderConfig.max_aux_streams=": (lambda w: w.after(w.config, "max_aux_streams", 2), 2),
    "IBuilderConfig.max_num_tactics": (lambda w: w.config.max_num_tactics, -1),
    "IBuilderConfig.max_num_tactics=": (lambda w: w.after(w.config, "max_num_tactics", 3), 3),
    "IBuilderConfig.num_optimization_profiles": (
        lambda w: _done(_two_profiles, w, then=lambda: w.config.num_optimization_profiles),
        2,
    ),
    "IBuilderConfig.add_optimization_profile": (_two_profiles, [0, 1]),
    "IBuilderConfig.plugins_to_serialize": (lambda w: w.config.plugins_to_serialize, []),
    "IBuilderConfig.plugins_to_serialize=": (
        lambda w: sorted(w.after(w.config, "plugins_to_serialize", ["/one.so", "/two.so"])),
        ["/one.so", "/two.so"],
    ),
    "IBuilderConfig.profile_stream": (lambda w: w.config.profile_stream, 0),
    "IBuilderConfig.profile_stream=": (lambda w: w.after(w.config, "profile_stream", 64), 64),
    "IBuilderConfig.profiling_verbosity": (lambda w: w.config.profiling_verbosity.name, "LAYER_NAMES_ONLY"),
    "IBuilderConfig.profiling_verbosity=": (
        lambda w: w.after(w.config, "profiling_verbosity", w.trt.ProfilingVerbosity.DETAILED).name,
        "DETAILED",
    ),
    "IBuilderConfig.progress_monitor": (lambda w: w.config.progress_monitor, None),
    "IBuilderConfig.progress_monitor=": (
        lambda w: _kind(w.after(w.config, "progress_monitor", _monitor(w.trt))),
        "Monitor",
    ),
    "IBuilderConfig.runtime_platform": (lambda w: w.config.runtime_platform.name, "SAME_AS_BUILD"),
    "IBuilderConfig.runtime_platform=": (
        lambda w: w.after(w.config, "runtime_platform", w.trt.RuntimePlatform.WINDOWS_AMD64).name,
        "SAME_AS_BUILD",
    ),
    "IBuilderConfig.tiling_optimization_level": (lambda w: w.config.tiling_optimization_level.name, "NONE"),
    "IBuilderConfig.tiling_optimization_level=": (
        lambda w: w.after(w.config, "tiling_optimization_level", w.trt.TilingOptimizationLevel.FULL).name,
        "FULL",
    ),
    "IBuilderConfig.reset": (
        lambda w: _done(
            lambda: (w.after(w.config, "max_num_tactics", 3), w.config.reset()), then=lambda: w.config.max_num_tactics
        ),
        -1,
    ),
    "IBuilderConfig.get_memory_pool_limit": (lambda w: w.config.get_memory_pool_limit(_workspace(w)) >> 30, 64),
    "IBuilderConfig.set_memory_pool_limit": (
        lambda w: _done(
            w.config.set_memory_pool_limit,
            _workspace(w),
            1 << 22,
            then=lambda: w.config.get_memory_pool_limit(_workspace(w)),
        ),
        1 << 22,
    ),
    "IBuilderConfig.get_preview_feature": (lambda w: w.config.get_preview_feature(_preview(w)), False),
    "IBuilderConfig.set_preview_feature": (
        lambda w: _done(
            w.config.set_preview_feature, _preview(w), True, then=lambda: w.config.get_preview_feature(_preview(w))
        ),
        True,
    ),
    "IBuilderConfig.get_tactic_sources": (lambda w: w.config.get_tactic_sources(), 3),
    "IBuilderConfig.set_tactic_sources": (
        lambda w: [w.config.set_tactic_sources(2), w.config.get_tactic_sources()],
        [True, 2],
    ),
    "IBuilderConfig.create_timing_cache": (lambda w: _kind(w.cache), "ITimingCache"),
    "IBuilderConfig.get_timing_cache": (lambda w: w.config.get_timing_cache(), None),
    "IBuilderConfig.set_timing_cache": (
        lambda w: [w.config.set_timing_cache(w.cache, False), _kind(w.config.get_timing_cache())],
        [True, "ITimingCache"],
    ),
    "IBuilderConfig.can_run_on_DLA": (lambda w: w.config.can_run_on_DLA(w.relu), False),
    "IBuilderConfig.get_device_type": (lambda w: w.config.get_device_type(w.relu).name, "GPU"),
    "IBuilderConfig.is_device_type_set": (lambda w: w.config.is_device_type_set(w.relu), False),
    "IBuilderConfig.set_device_type": (
        lambda w: _done(
            w.config.set_device_type,
            w.relu,
            w.trt.DeviceType.DLA,
            then=lambda: [w.config.get_device_type(w.relu).name, w.config.is_device_type_set(w.relu)],
        ),
        ["DLA", True],
    ),
    "IBuilderConfig.reset_device_type": (
        lambda w: _done(
            lambda: (
                w.config.set_device_type(w.relu, w.trt.DeviceType.DLA),
                w.config.reset_device_type(w.relu),
            ),
            then=lambda: w.config.is_device_type_set(w.relu),
        ),
        False,
    ),
    "IOptimizationProfile.set_shape": (lambda w: _dims(_shaped(w).get_shape("x")), [[1, 3], [2, 3], [4, 3]]),
    "IOptimizationProfile.get_shape": (lambda w: _dims(_shaped(w).get_shape("x")), [[1, 3], [2, 3], [4, 3]]),
    "IOptimizationProfile.set_shape_input": (
        lambda w: _shaped(w).get_shape_input("shape"),
        [[3, 1], [3, 2], [3, 4]],
    ),
    "IOptimizationProfile.get_shape_input": (
        lambda w: _shaped(w).get_shape_input("shape"),
        [[3, 1], [3, 2], [3, 4]],
    ),
    "IOptimizationProfile.extra_memory_target": (lambda w: w.profile.extra_memory_target, 1.0),
    "IOptimizationProfile.extra_memory_target=": (lambda w: w.after(w.profile, "extra_memory_target", 0.5), 0.5),
    "IOptimizationProfile.profile_stream": (lambda w: w.profile.profile_stream, 0),
    "IOptimizationProfile.profile_stream=": (lambda w: w.after(w.profile, "profile_stream", 64), 64),
    "Builder.create_network": (lambda w: w.builder.create_network(0).num_layers, 0),
    "Builder.create_builder_config": (lambda w: w.builder.create_builder_config().num_optimization_profiles, 0),
    "Builder.create_optimization_profile": (lambda w: _kind(w.profile), "IOptimizationProfile"),
    "Builder.is_network_supported": (lambda w: w.builder.is_network_supported(w.static, w.config), True),
    "Builder.build_serialized_network": (lambda w: bytes(_plan(w))[:4].decode(), "vtrt"),
    "Builder.logger": (lambda w: w.builder.logger is w.logger, True),
    "Builder.error_recorder": (lambda w: w.builder.error_recorder, None),
    "Builder.error_recorder=": (lambda w: w.after(w.builder, "error_recorder", None), None),
    "Builder.max_threads": (lambda w: w.builder.max_threads, 1),
    "Builder.max_threads=": (lambda w: w.after(w.builder, "max_threads", 2), 2),
    "Builder.num_DLA_cores": (lambda w: w.builder.num_DLA_cores, 0),
    "Builder.max_DLA_batch_size": (lambda w: w.builder.max_DLA_batch_size, 1 << 28),
    "Builder.get_plugin_registry": (lambda w: w.builder.get_plugin_registry().all_creators, []),
    "Builder.reset": (lambda w: _done(w.builder.reset, then=lambda: bytes(_plan(w))[:4].decode()), "vtrt"),
    "ITimingCache.serialize": (lambda w: len(bytes(w.cache.serialize())) > 0, True),
    "ITimingCache.combine": (
        lambda w: w.cache.combine(w.config.create_timing_cache(bytes(w.cache.serialize())), False),
        True,
    ),
    "ITimingCache.reset": (lambda w: w.cache.reset(), True),
    "ITimingCache.query": (lambda w: w.cache.query(_key(w)).timingMSec, -1.0),
    "ITimingCache.queryKeys": (lambda w: w.cache.queryKeys(), []),
    "ITimingCache.update": (lambda w: w.cache.update(_key(w), w.trt.TimingCacheValue(7, 1.0)), False),
    "IHostMemory.nbytes": (lambda w: (plan := _plan(w)).nbytes == len(bytes(plan)) > 1000, True),
    "IHostMemory.dtype": (lambda w: _plan(w).dtype.name, "INT8"),
    "OnnxParser.parse": (lambda w: w.refused().num_errors, 1),
    "OnnxParser.parse_from_file": (
        lambda w: (
            w.trt.OnnxParser(net := w.builder.create_network(0), w.logger).parse_from_file(_file(w)) and net.num_inputs
        ),
        2,
    ),
    "OnnxParser.load_model_proto": (lambda w: _loaded(w).parse_model_proto() and w.empty.num_inputs, 2),
    "OnnxParser.parse_model_proto": (lambda w: _loaded(w).parse_model_proto() and w.empty.num_inputs, 2),
    "OnnxParser.load_initializer": (lambda w: _loaded(w).load_initializer("no such weight", 0, 0), False),
    "OnnxParser.num_errors": (lambda w: w.parser.num_errors, 0),
    "OnnxParser.get_error": (lambda w: _kind(w.refused().get_error(0)), "ParserError"),
    "OnnxParser.clear_errors": (
        lambda w: _done(w.refused().clear_errors, then=lambda: w.refusing.num_errors),
        0,
    ),
    "OnnxParser.flags": (lambda w: w.parser.flags, 1),
    "OnnxParser.flags=": (lambda w: w.after(w.parser, "flags", 0), 0),
    "OnnxParser.get_flag": (lambda w: w.parser.get_flag(_native(w)), True),
    "OnnxParser.set_flag": (
        lambda w: _done(
            lambda: (w.parser.clear_flag(_native(w)), w.parser.set_flag(_native(w))),
            then=lambda: w.parser.get_flag(_native(w)),
        ),
        True,
    ),
    "OnnxParser.clear_flag": (
        lambda w: _done(w.parser.clear_flag, _native(w), then=lambda: w.parser.get_flag(_native(w))),
        False,
    ),
    "OnnxParser.get_layer_output_tensor": (lambda w: w.parser.get_layer_output_tensor("relu", 0).name, "z"),
    "OnnxParser.supports_operator": (
        lambda w: [w.parser.supports_operator(name) for name in ("Relu", "NoSuchOperator")],
        [True, False],
    ),
    "OnnxParser.supports_model_v2": (
        lambda w: [_asked(w, model)[0] for model in (determinant_free, determinant)],
        [True, False],
    ),
    "OnnxParser.num_subgraphs": (lambda w: _asked(w, determinant_free)[1].num_subgraphs, 1),
    "OnnxParser.is_subgraph_supported": (lambda w: _asked(w, determinant_free)[1].is_subgraph_supported(0), True),
    "OnnxParser.get_subgraph_nodes": (lambda w: _asked(w, reshape_relu)[1].get_subgraph_nodes(0), [0, 1]),
    "OnnxParser.get_used_vc_plugin_libraries": (lambda w: w.parser.get_used_vc_plugin_libraries(), []),
    "OnnxParser.set_builder_config": (lambda w: w.parser.set_builder_config(w.config), True),
    "ParserError.code": (lambda w: w.refused().get_error(0).code().name, "UNSUPPORTED_NODE"),
    "ParserError.desc": (lambda w: w.refused().get_error(0).desc(), "false"),
    "ParserError.file": (lambda w: Path(w.refused().get_error(0).file()).name, "onnxOpCheckers.cpp"),
    "ParserError.func": (lambda w: w.refused().get_error(0).func(), "checkDet"),
    "ParserError.line": (lambda w: 0 < w.refused().get_error(0).line() < 10_000, True),
    "ParserError.node": (lambda w: w.refused().get_error(0).node(), 0),
    "ParserError.node_name": (lambda w: w.refused().get_error(0).node_name(), "determinant"),
    "ParserError.node_operator": (lambda w: w.refused().get_error(0).node_operator(), "Det"),
    "ParserError.local_function_stack": (lambda w: w.refused().get_error(0).local_function_stack(), []),
    "ParserError.local_function_stack_size": (lambda w: w.refused().get_error(0).local_function_stack_size(), 0),
}
PROBED = sorted({name.partition(".")[0] for name in PROBES})
NOT_ASKED = {"Builder.gpu_allocator="}  # nothing reads it back, and nothing allocates without a GPU


def _answers() -> dict[str, Any]:
    """What each probe says: its value, the exception's name, or the signal that ended its process."""
    import warnings

    warnings.simplefilter("ignore")
    world = World()
    return {name: _in_a_child(probe, world) for name, (probe, _) in PROBES.items()}


def _in_a_child(probe: Callable[[World], Any], world: World) -> Any:
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        try:
            said = json.dumps(probe(world))
        except Exception as exc:
            said = json.dumps(f"{type(exc).__name__}: {exc}")
        os.write(write, said.encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as answer:
        said = answer.read().decode()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return json.loads(said) if status == 0 else f"ended by {signal.Signals(-status).name}"


@installed
def test_every_call_that_is_offered_answers_truly(tmp_path: Path) -> None:
    environment = os.environ | {"PROBE_FOLDER": str(tmp_path)}
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {name: answer for name, (_, answer) in PROBES.items()}


def _members() -> dict[str, list[str]]:
    """The public calls of each class, as ``Class.name``, and ``Class.name=`` where they can be set."""
    code = (
        "import json, tensorrt_rtx as trt\n"
        "members = {}\n"
        f"for owner in {PROBED!r}:\n"
        "    for name, member in vars(getattr(trt, owner)).items():\n"
        "        if not name.startswith('_'):\n"
        "            getter = not isinstance(member, property) or member.fget is not None\n"
        "            setter = isinstance(member, property) and member.fset is not None\n"
        "            members.setdefault(owner, []).extend([name] * getter + [name + '='] * setter)\n"
        "print(json.dumps(members))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    members: dict[str, list[str]] = json.loads(done.stdout)
    return members


@installed
def test_every_call_that_is_offered_is_probed() -> None:
    offered = {f"{owner}.{name}" for owner, names in _members().items() for name in names}
    assert offered == set(PROBES) | NOT_ASKED


@installed
def test_what_is_hidden_raises_instead_of_crashing() -> None:
    code = (
        "import tensorrt_rtx as trt\n"
        "for owner, name in [('ITensor', 'location'), ('INetworkDefinition', 'add_slice'),\n"
        "        ('INetworkDefinition', 'flags'), ('IBuilderConfig', 'build_route'),\n"
        "        ('Builder', 'build_serialized_network_to_stream')]:\n"
        "    print(hasattr(getattr(trt, owner), name))\n"
        "builder = trt.Builder(trt.Logger(trt.Logger.ERROR))\n"
        "network, config = builder.create_network(0), builder.create_builder_config()\n"
        "try:\n"
        "    builder.build_serialized_network(network, config, True)\n"
        "except TypeError:\n"
        "    print('no kernel text')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout.split("\n")[:6]) == (0, ["False"] * 5 + ["no kernel text"]), done.stderr


COMPUTE_CAPABILITIES = """
import sys; sys.path.insert(0, {folder!r})
from test_rtx_builder import World, fp8
import tensorrt_rtx as trt

world = World()
def build(capabilities):
    del world.log[:]
    network, config = world.builder.create_network(0), world.builder.create_builder_config()
    parser = trt.OnnxParser(network, world.logger)
    assert parser.parse(fp8())
    assert trt.compute_capabilities(config) == []
    trt.set_compute_capabilities(config, capabilities)
    assert trt.compute_capabilities(config) == capabilities
    return world.builder.build_serialized_network(network, config)

config = world.config
trt.set_compute_capabilities(config, [86, 120])
for wrong in ([90], [89, 90], [75, 0, 86]):
    try:
        trt.set_compute_capabilities(config, wrong)
    except ValueError as exc:
        print(exc)
    print(trt.compute_capabilities(config))
trt.set_compute_capabilities(config, [])
print(trt.compute_capabilities(config))
print(build([89]) is not None, build([86]) is None)
print(next(message for severity, message in world.log if severity == trt.Logger.ERROR))
"""


@installed
def test_compute_capabilities_are_set_read_and_obeyed() -> None:
    code = COMPUTE_CAPABILITIES.format(folder=str(Path(__file__).parent))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *lines, error = done.stdout.splitlines()
    assert lines == [
        "compute capability 90: TensorRT for RTX 1.7.1 builds nothing for it.",
        "[86, 120]",
        "compute capability 90: TensorRT for RTX 1.7.1 builds nothing for it.",
        "[86, 120]",
        "compute capability 0: TensorRT for RTX 1.7.1 builds nothing for it.",
        "[86, 120]",
        "[]",
        "True True",
    ]
    assert re.search(
        r"Cannot compile for target\(s\) sm86, because the model contains HW-specific datatypes: fp8_e4m3", error
    )


if __name__ == "__main__":
    sys.stdout.write(json.dumps(_answers()))

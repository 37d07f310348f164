"""ONNX Runtime: the back end that always works, on the CPU, or on an NVIDIA GPU through its CUDA provider.

Heavy imports stand inside functions: choosing a back end, `fingerprint` and `platform` are asked of this module by a
command that must answer at once.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compiler import source
from compiler.backends import machine
from compiler.backends.feeds import FeedCheck
from compiler.errors import BuildError
from compiler.recipe import TensorRTSection
from compiler.spec import (
    Array,
    Engine,
    Feeds,
    OnnxModel,
    Platform,
    Precision,
    Progress,
    Runner,
    TensorSpec,
    no_progress,
)

if TYPE_CHECKING:
    import onnxruntime

NAME = "onnxruntime"
PRECISIONS = frozenset(Precision)
ZERO_POINTS = True
SHARED_JOINS = False

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"

_PACKAGES = ("onnxruntime-gpu", "onnxruntime", "onnx", "onnx-ir", "numpy")
_DTYPES = {
    "float": "float32",
    "double": "float64",
    "float16": "float16",
    "bfloat16": "bfloat16",
    **{name: name for name in ("int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8", "bool")},
}


def unavailable() -> str | None:
    """ONNX Runtime is a dependency and runs on every CPU."""
    return None


def cannot_run() -> str | None:
    """It runs where it builds."""
    return None


def refused(section: TensorRTSection) -> Iterable[tuple[str, str]]:  # noqa: ARG001
    """``[tensorrt]`` is not about this back end."""
    return ()


def fingerprint() -> Mapping[str, str]:
    gpu = machine.gpu()
    return {
        **source.versions(_PACKAGES),
        "cpu": machine.cpu(),
        **({} if gpu is None else {"gpu": gpu.name, "driver": gpu.driver}),
    }


def platform() -> Platform:
    return machine.describe(_PACKAGES)


def build(
    model: OnnxModel,
    *,
    name: str,
    reason: str,
    threads: int,
    out_dir: Path,
    section: TensorRTSection | None = None,  # noqa: ARG001
    caches: Path | None = None,  # noqa: ARG001
    progress: Progress = no_progress,  # noqa: ARG001 - a second or two
) -> Engine:
    """Lower ``model``, write ``engine.onnx``, open it and run the model's probe through it.

    Raises:
        BuildError: an operator has no kernel, the runtime refuses the model, or the probe cannot be run.
    """
    from compiler import onnx_files
    from compiler.backends import lowering

    started = time.perf_counter()
    provider, notes = _choose_provider(model)
    network = onnx_files.read(model.path)
    if provider == CPU:
        notes += lowering.lower(network)
    path = out_dir / "engine.onnx"
    sha256, external = onnx_files.write(network, path)
    runner = _SessionRunner(
        path,
        threads=threads,
        provider=provider,
        fuse=_fuses(model.precision),
        flush=True,
        inputs=model.inputs,
        outputs=model.outputs,
    )
    try:
        if model.probe is not None:
            with np.load(model.probe) as probe:
                runner.run({name: probe[name] for name in probe.files})
    finally:
        runner.close()
    return Engine(
        name=name,
        path=path,
        sha256=sha256,
        size_bytes=sum(file.stat().st_size for file in (path, *external)),
        backend=NAME,
        backend_reason=reason,
        precision=model.precision,
        model_sha256=model.sha256,
        platform=platform(),
        inputs=model.inputs,
        outputs=model.outputs,
        axes=model.axes,
        build_s=time.perf_counter() - started,
        options={"provider": provider, "threads": str(_threads(threads)), "spinning": "on"},
        external_data=external,
        notes=(*model.notes, *notes),
    )


def open(engine: Engine, *, threads: int) -> Runner:
    """
    Raises:
        BuildError: the engine cannot be opened, or was built for a provider that this machine has not.
    """
    return _SessionRunner(
        engine.path,
        threads=threads,
        provider=engine.options.get("provider", CPU),
        spin=True,
        fuse=_fuses(engine.precision),
        flush=True,
        inputs=engine.inputs,
        outputs=engine.outputs,
    )


def open_model(path: Path, *, threads: int = 0, optimize: bool = True, weights: Path | None = None) -> Runner:
    """An ONNX file on the CPU, as it is: how the stages run models. See `compiler.spec.OpenModel`.

    Raises:
        BuildError: the runtime refuses the file.
    """
    return _SessionRunner(path, threads=threads, provider=CPU, optimize=optimize, fuse=False, weights=weights)


# --- running --------------------------------------------------------------------------------------------------------


class _SessionRunner:
    """A session."""

    def __init__(
        self,
        path: Path,
        *,
        threads: int,
        provider: str,
        optimize: bool = True,
        spin: bool = False,
        fuse: bool = True,
        flush: bool = False,
        weights: Path | None = None,
        inputs: tuple[TensorSpec, ...] | None = None,
        outputs: tuple[TensorSpec, ...] | None = None,
    ) -> None:
        self._path = path
        self._session: Any = _session(
            path,
            threads=threads,
            provider=provider,
            optimize=optimize,
            spin=spin,
            fuse=fuse,
            flush=flush,
            weights=weights,
        )
        self.inputs = _specs(self._session.get_inputs()) if inputs is None else inputs
        self.outputs = _specs(self._session.get_outputs()) if outputs is None else outputs
        self._names = [spec.name for spec in self.outputs]
        self._check = FeedCheck(path.name, self.inputs)

    def run(self, feeds: Feeds) -> dict[str, Array]:
        self._check(feeds)
        return dict(zip(self._names, self._call(feeds), strict=True))

    def time(self, feeds: Feeds, repeats: int) -> list[float]:
        self._check(feeds)
        taken = []
        for _ in range(repeats):
            started = time.perf_counter()
            self._call(feeds)
            taken.append(time.perf_counter() - started)
        return taken

    def close(self) -> None:
        self._session = None

    def _call(self, feeds: Feeds) -> list[Array]:
        if self._session is None:
            raise BuildError(f"{self._path.name}: closed; an open model was expected. Open it again.")
        try:
            outputs: list[Array] = self._session.run(self._names, feeds)
        except Exception as exc:
            raise _translated(self._path, exc) from exc
        return outputs


_SLOW = ("SkipLayerNormFusion",)
"""Fusions whose kernel is slower than what it replaces: Add and LayerNormalization of 8 x 128 x 384 numbers take 0.15 ms,
SkipLayerNormalization 0.88."""

_WRONG_ON_FP8 = ("ReluQuantRewrite", "ClipQuantRewrite")
"""Rewrites that drop a Relu or a Clip before a QuantizeLinear, as if that clipped at zero: so it may in UINT8, not in FP8."""


def _fuses(precision: Precision) -> bool:
    """Whether Q/DQ nodes may be fused with what they surround: for FP8 ONNX Runtime would make an INT8 operator of them,
    and then refuse the model for its types."""
    return precision is not Precision.FP8


def _session(
    path: Path,
    *,
    threads: int,
    provider: str,
    optimize: bool,
    spin: bool,
    fuse: bool,
    flush: bool = False,
    weights: Path | None = None,
) -> onnxruntime.InferenceSession:
    """A session. ``spin``: threads wait for work by spinning for a while; ``fuse``: Q/DQ nodes may be fused;
    ``flush``: denormal numbers count as zero; ``weights``: see `compiler.spec.OpenModel`.

    An engine spins, as ONNX Runtime and PyTorch do by default: without, a transformer takes a quarter longer. What runs
    a model to look at it does not: it is not timed, and spinning takes the cores from everybody else.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    levels = ort.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimize else levels.ORT_DISABLE_ALL
    options.intra_op_num_threads = _threads(threads)
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    options.use_deterministic_compute = True
    if not optimize:
        # A weight that is dequantised on the fly is then not made before it is needed, nor kept after: GPT-2 in INT8 runs in
        # 0.5 GB instead of 1.5, and no slower.
        options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
        options.enable_cpu_mem_arena = options.enable_mem_pattern = False
    options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spin)))
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    # exp(score - mask) is a denormal number or nearly so, and arithmetic on these is many times slower.
    options.add_session_config_entry("session.set_denormal_as_zero", str(int(flush)))
    # Fused with rounded weights, a product would round its activations too, to INT8 (level 4, the default); level 1 leaves
    # them in FP32, as a weight-only engine promises.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    if not fuse:
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    if _saturates():
        options.add_session_config_entry("session.x64quantprecision", "1")
    source: str | bytes = str(path)
    if weights is not None:
        source = path.read_bytes()
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(weights))
        options.add_session_config_entry("session.disable_prepacking", "1")
    wanted: list[Any] = [CPU] if provider == CPU else [(CUDA, {"use_tf32": "0"}), CPU]
    try:
        avoided = [*(_SLOW if provider == CPU else ()), *(() if fuse else _WRONG_ON_FP8)]
        session = ort.InferenceSession(source, options, providers=wanted, disabled_optimizers=avoided)
    except Exception as exc:
        raise _translated(path, exc) from exc
    if session.get_providers()[0] != provider:
        raise BuildError(
            f"{path.name}: needs ONNX Runtime's {provider}, which cannot be loaded here; a machine with an NVIDIA "
            "driver, CUDA and cuDNN was expected. Install them, or build the engine on this machine."
        )
    return session


def _specs(arguments: Sequence[Any]) -> tuple[TensorSpec, ...]:
    return tuple(
        TensorSpec(
            name=argument.name,
            dtype=_DTYPES.get(argument.type.removeprefix("tensor(").removesuffix(")"), argument.type),
            shape=tuple("?" if dim is None else dim for dim in argument.shape),
        )
        for argument in arguments
    )


_NO_KERNEL = re.compile(
    r"Could not find an implementation for (?P<op>[\w.]+)\((?P<since>\d+)\) node with name '(?P<node>[^']*)'"
)
_NO_OP = re.compile(
    r"In Node, \(\"(?P<node>[^\"]*)\", (?P<op>\w+), \"(?P<domain>[^\"]*)\".*No Op registered", re.DOTALL
)

_NO_FUNCTION = re.compile(r"Fatal error: [\w.]*:(?P<op>\w+)\(-?\d+\) is not a registered function/op")


def _first_node(path: Path, kind: str) -> str:
    """The name of the first node of this kind in a file, for a message of the runtime that names none."""
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    return next((node.name for node in graph.node if node.op_type == kind), "")


def _translated(path: Path, exc: Exception) -> BuildError:
    """A failure of the runtime, in the project's wording; its own text stands last."""
    text = str(exc)
    own = text.rpartition(" : ")[2].strip().splitlines()[0] if text.strip() else type(exc).__name__
    for pattern in (_NO_KERNEL, _NO_OP, _NO_FUNCTION):
        if found := pattern.search(text):
            node = found.groupdict().get("node") or _first_node(path, found["op"])
            return BuildError(
                f"{path.name}: node '{node}': ONNX Runtime has no implementation of {found['op']} for these "
                "types; an operator that it runs was expected. Keep the node in high precision (engines.keep), or "
                f"express the model without {found['op']}."
            )
    return BuildError(
        f"{path.name}: ONNX Runtime cannot run it; a model that it runs was expected. Its own words: {own}"
    )


def _choose_provider(model: OnnxModel) -> tuple[str, list[str]]:
    """The provider to build for, and a note where there is a GPU and it is not used."""
    if machine.gpu() is None:
        return CPU, []
    if model.precision is Precision.INT8:
        return CPU, ["built for the CPU: ONNX Runtime's CUDA provider has no INT8 kernels for Q/DQ models"]
    try:
        _session(model.path, threads=1, provider=CUDA, optimize=True, spin=False, fuse=True)
    except BuildError as exc:
        return CPU, [f"built for the CPU, although there is a GPU: {exc.message}"]
    return CUDA, []


def _saturates() -> bool:
    """Whether this CPU's kernels for UINT8 times INT8 add pairs of products in INT16: x86 without VNNI, where the runtime
    has exact ones, twice as slow. (Asked for where VNNI is, they would be used all the same.)"""
    flags = machine.cpu_says().get("flags", "").split()
    return machine.is_x86() and not any("vnni" in flag for flag in flags)


def _threads(threads: int) -> int:
    return threads or machine.usable_cores()

"""An ONNX file through NVIDIA's parser and builder to a plan. Runs in a step's child process: the builder may crash.

Profiles and configuration go through Polygraphy. The file is parsed and built with the API itself, since Polygraphy's
loaders end with the first error and drop the name of the node; so is what Polygraphy does not know: TF32 is cleared (the
builder's own default is on, for every FP32 layer), targets are set, timings are kept by `timing_cache`.
"""

from __future__ import annotations

import itertools
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, SupportsInt

from compiler.backends.tensorrt.api import trt
from compiler.backends.tensorrt.log import BUILDER_LOG, BuildLog, shorten
from compiler.backends.tensorrt.options import RTX
from compiler.backends.tensorrt.precision import NetworkLayer, NetworkTensor, widened
from compiler.backends.tensorrt.timing_cache import TimingCache
from compiler.errors import BuildError
from compiler.recipe import TensorRTSection
from compiler.spec import DimRange, OnnxModel, Precision, Progress, no_progress

PLAN = "engine.plan"

_ADVICE = {
    "Attention": "split the cache out of it (Concat before the node, one output), or export with opset 20",
    "DynamicQuantizeLinear": 'quantise statically, with precision = "int8"',
    "MatMulInteger": 'quantise with Q/DQ nodes, with precision = "int8"',
    "QLinearMatMul": 'quantise with Q/DQ nodes, with precision = "int8"',
    "QLinearConv": 'quantise with Q/DQ nodes, with precision = "int8"',
}
"""What to do about an operator that models often hold and NVIDIA's parser refuses."""

_CAUSES = (
    (
        re.compile(r"Cannot compile for target\(s\) ([\w, ]+), because .*?: ([\w, ]+)"),
        "the targets {0} have no instructions for {1}; remove them from [tensorrt] compute_capabilities",
    ),
    (
        re.compile(r"for \w+ \(SM(\d+)\): ([\w ]+) is not supported"),
        "the target sm{0} has no {1}; remove it from [tensorrt] compute_capabilities",
    ),
    (
        re.compile(r"no tactics to implement the operation within workspace limit"),
        "no kernel fits into the workspace; raise [tensorrt] workspace_mib",
    ),
    (
        re.compile(r"CHECK\(status == CUDA_SUCCESS\)"),
        "the builder needs a GPU and its driver for this, and finds none here; build on a machine that has them",
    ),
)
"""What the builder says -> what it means and what to do."""


@dataclass(frozen=True, kw_only=True)
class Built:
    """What one build left."""

    plan: Path
    layers: tuple[NetworkLayer, ...]
    weight_bytes: int | None
    """What the builder says that the weights take."""
    weight_bytes_alone: int | None
    """The most that they take with one of several profiles alone, where they took more than was expected with all."""
    options: Mapping[str, str]
    """What was asked of the builder, as read back from its configuration."""
    warnings: tuple[str, ...]


def build(
    model: OnnxModel,
    *,
    flavour: str,
    section: TensorRTSection,
    timings: TimingCache | None,
    stored_bytes: int,
    out_dir: Path,
    progress: Progress,
) -> Built:
    """Parse ``model``, build it, and write the plan to ``out_dir``.

    Args:
        model: what to build; its axes are the one profile where ``section`` has none.
        flavour: the back end's name.
        section: every key is one that this flavour takes; see `options.refused`.
        timings: None: none are kept.
        stored_bytes: what the model's weights take in its file.
        out_dir: where the plan and the builder's log go.
        progress: told about percents.

    Raises:
        BuildError: nodes that the parser does not take (all of them are named), or the builder fails.
    """
    log = BuildLog(out_dir / BUILDER_LOG)
    try:
        builder = trt.Builder(log.logger)
        network = builder.create_network(0)
        parser = trt.OnnxParser(network, log.logger)
        if not parser.parse_from_file(str(model.path)):
            raise BuildError(_refusal(parser, model, log))
        decomposed = _decompose_attention(network)
        layers = _layers(network)
        profiles = profiles_of(model, section)
        config = _configure(builder, network, model, flavour, section, profiles, progress)
        cache = timings.attach(config) if timings is not None else None
        options = _seen(config, flavour, section) | decomposed
        started = time.perf_counter()
        serialised = builder.build_serialized_network(network, config)
        if serialised is None:
            raise BuildError(_failure(model, log))
        options["build_s"] = f"{time.perf_counter() - started:.2f}"
        if timings is not None and cache is not None:
            options["timing_cache_sha256"] = timings.merge(config, cache)
        weight_bytes, alone = log.weight_bytes, None
        if flavour == RTX and len(profiles) > 1 and weight_bytes is not None and widened(weight_bytes, stored_bytes):
            # Kernels of one profile may want a weight laid out otherwise than those of another: it is then stored twice.
            # That is told from a weight in a wider type by building each profile alone, where nothing is stored twice.
            alone = 0
            for profile in profiles:
                single = _configure(builder, network, model, flavour, section, (profile,), no_progress)
                if builder.build_serialized_network(network, single) is None:
                    raise BuildError(_failure(model, log))
                alone = max(alone, log.weight_bytes or 0)
        plan = out_dir / PLAN
        with memoryview(serialised) as data, plan.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        return Built(
            plan=plan,
            layers=layers,
            weight_bytes=weight_bytes,
            weight_bytes_alone=alone,
            options=options,
            warnings=tuple(dict.fromkeys(log.warnings)),
        )
    finally:
        log.close()


def profiles_of(model: OnnxModel, section: TensorRTSection) -> tuple[Mapping[str, DimRange], ...]:
    """The optimisation profiles of an engine: those of the recipe, or one of the model's own axes; none if it has none."""
    if not model.axes:
        return ()
    return tuple(section.profiles) or (dict(model.axes),)


def left_out(model: OnnxModel, section: TensorRTSection) -> list[str]:
    """A note where the profiles do not take every combination of sizes that the axes allow."""
    profiles = profiles_of(model, section)
    corners = itertools.product(*({axis.min, axis.max} for axis in model.axes.values()))
    for sizes in (dict(zip(model.axes, corner, strict=True)) for corner in corners):
        if not any(all(size in ranges[name] for name, size in sizes.items()) for ranges in profiles):
            example = ", ".join(f"{name} {size}" for name, size in sizes.items())
            return [
                f"the profiles leave out combinations that [axes] allows, such as {example}: such inputs are refused"
            ]
    return []


# --- parsing --------------------------------------------------------------------------------------------------------


def _refusal(parser: trt.OnnxParser, model: OnnxModel, log: BuildLog) -> str:
    lines, advice = [], []
    for index in range(parser.num_errors):
        error = parser.get_error(index)
        name, op = error.node_name(), error.node_operator()
        if not op:
            continue
        lines.append(f"  node '{name}' ({op}): {_why(error)}")
        if op in _ADVICE and _ADVICE[op] not in advice:
            advice.append(_ADVICE[op])
    if not lines:
        return (
            f"{model.path.name}: NVIDIA's parser refuses the file; an ONNX model that it takes was expected. Its own words: "
            f"{log.said()}. All it said is in the log."
        )
    count = "1 node" if len(lines) == 1 else f"{len(lines)} nodes"
    todo = "; ".join(advice) or "express the model without them"
    return (
        f"{model.path.name}: NVIDIA's parser does not take {count}; operators that TensorRT has were expected. "
        f'{todo[0].upper()}{todo[1:]}, or build this engine with backend = "onnxruntime".\n' + "\n".join(lines)
    )


def _why(error: trt.ParserError) -> str:
    words = {
        trt.ErrorCode.UNSUPPORTED_NODE: "TensorRT does not have it",
        trt.ErrorCode.UNSUPPORTED_NODE_ATTR: "not with this attribute",
        trt.ErrorCode.UNSUPPORTED_NODE_INPUT: "not with this input",
        trt.ErrorCode.UNSUPPORTED_NODE_DATATYPE: "not with this type",
        trt.ErrorCode.UNSUPPORTED_NODE_DYNAMIC: "not with a dynamic shape",
        trt.ErrorCode.UNSUPPORTED_NODE_SHAPE: "not with this shape",
        trt.ErrorCode.INVALID_NODE: "TensorRT has no such operator, and no plugin of that name is there",
    }.get(error.code(), "refused")
    said = re.sub(r"^\s*(false|creator) && |^\s*false\s*$", "", error.desc()).strip().strip('"')
    return f"{words}: {said}" if said and "Plugin not found" not in said else words


def _decompose_attention(network: trt.INetworkDefinition) -> dict[str, str]:
    """Let attention without a kernel of its own be built from its parts: in FP32 there is none, and the build would fail."""
    count = 0
    for index in range(network.num_layers):
        layer: Any = network.get_layer(index)
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            layer.__class__ = trt.IAttentionInputLayer
            layer.attention.decomposable = True
            count += 1
    return {"attention": f"{count} may be decomposed"} if count else {}


def _layers(network: trt.INetworkDefinition) -> tuple[NetworkLayer, ...]:
    return tuple(_layer(network.get_layer(index)) for index in range(network.num_layers))


def _layer(layer: trt.ILayer) -> NetworkLayer:
    inputs = [layer.get_input(index) for index in range(layer.num_inputs)]
    outputs = [layer.get_output(index) for index in range(layer.num_outputs)]
    return NetworkLayer(
        name=layer.name,
        kind=layer.type.name,
        metadata=layer.metadata,
        inputs=tuple(
            NetworkTensor(name=tensor.name, dtype=tensor.dtype.name) for tensor in inputs if tensor is not None
        ),
        outputs=tuple(NetworkTensor(name=tensor.name, dtype=tensor.dtype.name) for tensor in outputs),
    )


# --- configuring ----------------------------------------------------------------------------------------------------


def _configure(
    builder: trt.Builder,
    network: trt.INetworkDefinition,
    model: OnnxModel,
    flavour: str,
    section: TensorRTSection,
    axes_ranges: Sequence[Mapping[str, DimRange]],
    progress: Progress,
) -> trt.IBuilderConfig:
    if flavour == RTX:  # which of the two it drives, Polygraphy is told by its environment, at its first import
        os.environ["POLYGRAPHY_USE_TENSORRT_RTX"] = "1"
    from polygraphy.backend.trt import Profile, create_config
    from polygraphy.logger import G_LOGGER

    G_LOGGER.module_severity = G_LOGGER.WARNING
    profiles = []
    for ranges in axes_ranges or ({},):
        profile = Profile()
        for spec in model.inputs:
            shapes = [
                tuple(dim if isinstance(dim, int) else getattr(ranges[dim], end) for dim in spec.shape)
                for end in ("min", "opt", "max")
            ]
            profile.add(spec.name, *shapes)
        profiles.append(profile)
    levels, tiling = trt.HardwareCompatibilityLevel, trt.TilingOptimizationLevel
    options: dict[str, Any] = {
        "profiles": profiles,
        "memory_pool_limits": (
            {trt.MemoryPoolType.WORKSPACE: section.workspace_mib << 20} if section.workspace_mib is not None else None
        ),
        "sparse_weights": section.sparse_weights,
        "refittable": section.refit,
        "strip_plan": section.strip,
        "version_compatible": section.version_compatible,
        "weight_streaming": section.weight_streaming_mib is not None,
        "builder_optimization_level": section.optimization_level,
        "max_aux_streams": section.aux_streams,
        "profiling_verbosity": getattr(trt.ProfilingVerbosity, (section.verbosity or "detailed").upper()),
        "progress_monitor": _monitor(progress),
    }
    if section.hardware_compatibility != "none":
        options["hardware_compatibility_level"] = getattr(levels, section.hardware_compatibility.upper())
    if section.tiling != "none":
        options["tiling_optimization_level"] = getattr(tiling, section.tiling.upper())
    config: trt.IBuilderConfig = create_config(builder, network, **options)
    if section.tf32:
        config.set_flag(trt.BuilderFlag.TF32)
    else:
        config.clear_flag(trt.BuilderFlag.TF32)
    if section.compute_capabilities:
        import tensorrt_rtx

        tensorrt_rtx.set_compute_capabilities(
            config, [int(capability.replace(".", "")) for capability in section.compute_capabilities]
        )
    return config


def _seen(config: trt.IBuilderConfig, flavour: str, section: TensorRTSection) -> dict[str, str]:
    """Options as the builder's configuration gives them back."""
    flags = trt.BuilderFlag
    seen = {
        "tf32": "on" if config.get_flag(flags.TF32) else "off",
        "verbosity": config.profiling_verbosity.name.lower(),
    }
    for key, flag in (
        ("sparse_weights", flags.SPARSE_WEIGHTS),
        ("refit", flags.REFIT),
        ("strip", flags.STRIP_PLAN),
        ("version_compatible", flags.VERSION_COMPATIBLE),
        ("weight_streaming", flags.WEIGHT_STREAMING),
    ):
        if config.get_flag(flag):
            seen[key] = "on"
    if section.workspace_mib is not None:
        seen["workspace_mib"] = str(config.get_memory_pool_limit(trt.MemoryPoolType.WORKSPACE) >> 20)
    if section.weight_streaming_mib is not None:
        seen["weight_streaming_mib"] = str(section.weight_streaming_mib)
    if section.compute_capabilities:
        import tensorrt_rtx

        seen["compute_capabilities"] = ", ".join(
            f"{n // 10}.{n % 10}" for n in tensorrt_rtx.compute_capabilities(config)
        )
    if flavour != RTX:
        seen["optimization_level"] = str(config.builder_optimization_level)
        seen["hardware_compatibility"] = config.hardware_compatibility_level.name.lower()
        seen["tiling"] = config.tiling_optimization_level.name.lower()
        if section.aux_streams is not None:
            seen["aux_streams"] = str(config.max_aux_streams)
    seen["profiles"] = str(config.num_optimization_profiles)
    return seen


def _monitor(progress: Progress) -> trt.IProgressMonitor:
    """An ``IProgressMonitor`` that reports percents: phases nest, and each is a part of a step of the one around it."""

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._phases: dict[str, list[int]] = {}
            self._shown = -1

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: SupportsInt) -> None:  # noqa: ARG002
            self._phases[phase_name] = [0, max(1, int(num_steps))]

        def step_complete(self, phase_name: str, step: SupportsInt) -> bool:
            self._phases[phase_name][0] = int(step) + 1
            self._show()
            return True

        def phase_finish(self, phase_name: str) -> None:
            self._phases.pop(phase_name, None)
            self._show()

        def _show(self) -> None:
            share = 0.0
            for done, total in reversed(self._phases.values()):
                share = min(1.0, (done + share) / total)
            percent = max(self._shown, int(100 * share)) if self._phases else 100
            if percent != self._shown:
                self._shown = percent
                progress(percent, 100)

    return Monitor()


# --- failing --------------------------------------------------------------------------------------------------------


def _failure(model: OnnxModel, log: BuildLog) -> str:
    """The builder gave up: what it said, in words where they are known."""
    said = log.said()
    for pattern, meaning in _CAUSES:
        if found := pattern.search(" ".join(log.errors)):
            what, _, todo = meaning.format(*found.groups()).partition("; ")
            return (
                f"{model.path.name}: NVIDIA's builder failed: {what}; an engine was expected. {todo[0].upper()}{todo[1:]}. "
                f"Its own words: {said}. All it said is in the log."
            )
    keep = (
        ""
        if model.precision is Precision.FP32
        else "Keep the layer that it names in another precision (engines.keep), or b"
    )
    return (
        f"{model.path.name}: NVIDIA's builder failed; an engine was expected. {keep or 'B'}uild this engine with backend = "
        f'"onnxruntime". Its own words: {said}. All it said is in the log.'
    )


_IDLE = re.compile(r"has Int64 binding|64-bit weights|UNSUPPORTED")
"""Warnings that call for nothing."""


def warnings_worth_showing(warnings: Sequence[str]) -> list[str]:
    """Warnings of the builder that a reader of the report can act on."""
    return [f"the builder warns: {shorten([warning])}" for warning in warnings if not _IDLE.search(warning)][:5]

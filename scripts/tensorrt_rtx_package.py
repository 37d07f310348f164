"""TensorRT for RTX through the TensorRT bindings: parse an ONNX file, configure, build. No GPU is needed.

Written by ``scripts/rtx_builder.py``; this file becomes ``tensorrt_rtx/__init__.py`` in the environment.

The bindings were compiled for TensorRT 11.4, whose classes have a few methods more than those of the library. A call
goes to the position of its method in a table of addresses, so from the first missing method on, calls reach another
one: they crash, or answer a question that nobody asked. Every position was compared with the name of the function that
the library has there. The calls that miss are taken away here (`AttributeError`); those that the builder's users need
come back below, with the library's own positions. Networks come from ONNX files: ``add_*`` is gone altogether.

Plans are built and cannot be read back: that needs a GPU and the runtime of the same release.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_RELEASE = "1.7.1"


def _load() -> ctypes.CDLL:
    """The builder, the parser, and the libraries that the bindings ask for, by their paths: none needs to be on the
    loader's search path, since the loader knows what is loaded already by its name."""
    wheel = importlib.util.find_spec("onnxruntime_ep_nv_tensorrt_rtx")
    if wheel is None or wheel.origin is None:
        raise ImportError("tensorrt_rtx: onnxruntime_ep_nv_tensorrt_rtx is missing; run scripts/rtx_builder.py.")
    libraries = Path(wheel.origin).parent
    builder = ctypes.CDLL(str(libraries / f"libtensorrt_rtx.so.{_RELEASE}"), mode=ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(libraries / f"libtensorrt_onnxparser_rtx.so.{_RELEASE}"), mode=ctypes.RTLD_GLOBAL)
    for name in ("nvinfer", "nvonnxparser", "nvinfer_plugin"):
        ctypes.CDLL(str(Path(__file__).parent / f"lib{name}.so.11"), mode=ctypes.RTLD_GLOBAL)
    version: int = builder.getInferLibVersion()
    if (found := f"{version // 10000}.{version // 100 % 100}.{version % 100}") != _RELEASE:
        raise ImportError(f"tensorrt_rtx: the library says that it is {found}; {_RELEASE} was expected.")
    return builder


_library = _load()

import tensorrt_bindings as _bindings  # noqa: E402
from tensorrt_bindings import *  # noqa: E402, F403

__version__ = _RELEASE


# --- what is taken away ---------------------------------------------------------------------------------------------

_HIDDEN: dict[str, tuple[str, ...]] = {
    "ITensor": (
        "allowed_formats",
        "broadcast_across_batch",
        "get_dimension_name",
        "is_execution_tensor",
        "is_shape_tensor",
        "location",
        "set_dimension_name",
    ),
    "INetworkDefinition": (
        *(name for name in dir(_bindings.INetworkDefinition) if name.startswith("add_") and name != "add_input"),
        "are_weights_marked_refittable",
        "error_recorder",
        "flags",
        "get_flag",
        "has_implicit_batch_dimension",
        "is_debug_tensor",
        "mark_debug",
        "mark_output_for_shapes",
        "mark_unfused_tensors_as_debug_tensors",
        "mark_weights_refittable",
        "name",
        "set_weights_name",
        "unmark_debug",
        "unmark_output_for_shapes",
        "unmark_unfused_tensors_as_debug_tensors",
        "unmark_weights_refittable",
    ),
    "IBuilderConfig": ("all_build_routes", "build_route", "remote_auto_tuning_config"),
    "Builder": ("build_engine_with_config", "build_serialized_network_to_stream"),
}


def _hide() -> None:
    for class_name, names in _HIDDEN.items():
        owner = getattr(_bindings, class_name)
        for name in names:
            if name in vars(owner):
                delattr(owner, name)


_hide()


# --- what comes back ------------------------------------------------------------------------------------------------


def _call(instance: Any, position: int, result: Any, *arguments: tuple[Any, Any]) -> Any:
    """Call a method of the library's object behind ``instance`` by its position; arguments are (type, value).

    A Python instance holds the address of an interface object; the second word of that is the address of the
    implementation, and the first word of that the address of its table of methods.
    """
    interface = ctypes.c_void_p.from_address(id(instance) + object.__basicsize__).value
    assert interface is not None
    implementation = ctypes.c_void_p.from_address(interface + ctypes.sizeof(ctypes.c_void_p)).value
    assert implementation is not None
    table = ctypes.c_void_p.from_address(implementation).value
    assert table is not None
    address = ctypes.c_void_p.from_address(table + position * ctypes.sizeof(ctypes.c_void_p)).value
    assert address is not None
    method = ctypes.CFUNCTYPE(result, ctypes.c_void_p, *(kind for kind, _ in arguments))(address)
    return method(implementation, *(value for _, value in arguments))


def _is_shape_tensor(tensor: Any) -> bool:
    """Whether the tensor's values are part of the computation of shapes, as far as the builder knows before a build."""
    answer: bool = _call(tensor, 11, ctypes.c_bool)
    return answer


def _is_execution_tensor(tensor: Any) -> bool:
    """Whether the tensor's values are computed on the device."""
    answer: bool = _call(tensor, 12, ctypes.c_bool)
    return answer


def _get_dimension_name(tensor: Any, index: int) -> str | None:
    """The name of an axis of an input, as the ONNX file has it; None where it has none."""
    name = _call(tensor, 14, ctypes.c_char_p, (ctypes.c_int32, index))
    return None if name is None else str(name, "utf-8")


def _name(network: Any) -> str:
    """The network's name."""
    return str(_call(network, 29, ctypes.c_char_p) or b"", "utf-8")


def _build_serialized_network(builder: Any, network: Any, config: Any) -> Any:
    """The plan, or None where the builder refuses; its logger has the reason."""
    return _build(builder, network, config)


_build = _bindings.Builder.build_serialized_network
_bindings.Builder.build_serialized_network = _build_serialized_network
_bindings.ITensor.is_shape_tensor = property(_is_shape_tensor)
_bindings.ITensor.is_execution_tensor = property(_is_execution_tensor)
_bindings.ITensor.get_dimension_name = _get_dimension_name
_bindings.INetworkDefinition.name = property(_name)


# --- what TensorRT for RTX alone has --------------------------------------------------------------------------------


def set_compute_capabilities(config: Any, capabilities: Sequence[int]) -> None:
    """Build for these GPUs: 86 means compute capability 8.6. An empty list means the builder's default.

    Raises:
        ValueError: the builder refuses one of them; the configuration is left as it was.
    """
    before = compute_capabilities(config)
    refused = _set_all(config, capabilities)
    if refused is not None:
        _set_all(config, before)
        raise ValueError(f"compute capability {refused}: TensorRT for RTX {__version__} builds nothing for it.")


def compute_capabilities(config: Any) -> list[int]:
    """What `set_compute_capabilities` set; empty by default."""
    count = _call(config, 56, ctypes.c_int32)
    return [_call(config, 58, ctypes.c_int32, (ctypes.c_int32, index)) for index in range(count)]


def _set_all(config: Any, capabilities: Sequence[int]) -> int | None:
    """The first that is refused, or None."""
    _call(config, 55, ctypes.c_bool, (ctypes.c_int32, len(capabilities)))
    for index, capability in enumerate(capabilities):
        if not _call(config, 57, ctypes.c_bool, (ctypes.c_int32, capability), (ctypes.c_int32, index)):
            return capability
    return None

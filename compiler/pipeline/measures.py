"""The user's own measures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from compiler import source


def user_measures(sources: source.Sources) -> dict[str, dict[str, Callable[..., Any]]]:
    """The three dicts of measures that a model file may define; see `compiler.metrics`."""
    if sources.data_path is None:
        return {"metrics": {}, "losses": {}, "agreements": {}}
    module = source.load_module(sources.data_path)
    return {name: dict(getattr(module, name, {})) for name in ("metrics", "losses", "agreements")}

"""Export each FP32 model once by our own exporter, unoptimised, and store its samples: what every tool gets.

    python -m quantize_bench.prepare minilm <folder>

A process of its own, in our environment, because it loads PyTorch.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from . import cases, samples


def prepare(case: cases.Case, folder: Path) -> None:
    """Write ``model.onnx``, ``probe.npz``, ``calibration/``, ``evaluation/`` and, last, ``prepared.json``."""
    axes, sha256 = _write_stack(case, folder) if case.recipe is None else _export(case, case.recipe, folder)
    files = sorted(folder.glob("model.onnx*"))
    counts = {part: len(samples.Samples(folder / part)) for part in ("calibration", "evaluation")}
    made = {
        "sha256": sha256,
        "axes": axes,
        "size_bytes": sum(file.stat().st_size for file in files),
        "samples_sha256": _hash_of(folder / "calibration"),
        **counts,
    }
    (folder / "prepared.json").write_text(json.dumps(made, indent=1))


def _export(case: cases.Case, path: Path, folder: Path) -> tuple[dict[str, Any], str]:
    from compiler import export, recipe, source
    from compiler.backends.onnxruntime import open_model

    asked = recipe.load(path)
    sources = source.locate(asked, path.parent)
    model = export.export(
        asked, sources, opset=export.choose_opset(asked), open_model=open_model, out_dir=folder / "exported"
    )
    for file in (model.path, *model.external_data):
        file.rename(folder / file.name)
    assert model.probe is not None
    model.probe.rename(folder / "probe.npz")
    assert sources.data_path is not None
    module = _module(sources.data_path)
    for name, value in (case.constants or {}).items():
        setattr(module, name, value)
    samples.store(folder / "calibration", _feeds(module.calibration()), case.calibration)
    samples.store(folder / "evaluation", _feeds(module.validation()), case.evaluation)
    axes = {name: {"min": axis.min, "opt": axis.opt, "max": axis.max} for name, axis in model.axes.items()}
    return axes, model.sha256


def _write_stack(case: cases.Case, folder: Path) -> tuple[dict[str, Any], str]:
    import numpy as np

    from . import stack

    path = folder / "model.onnx"
    stack.write(path)
    samples.store(folder / "calibration", stack.samples(stack.CALIBRATION, seed=1), case.calibration)
    samples.store(folder / "evaluation", stack.samples(stack.VALIDATION, seed=2), case.evaluation)
    np.savez(folder / "probe.npz", **samples.Samples(folder / "calibration").feeds(0, 1))
    digest = hashlib.sha256()
    for file in sorted(folder.glob("model.onnx*")):
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return {"batch": {"min": 1, "opt": 1, "max": 8}}, digest.hexdigest()


def _module(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(f"bench_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _feeds(items: Any) -> Iterator[Mapping[str, Any]]:
    """Feeds without the labels that may come with them."""
    for item in items:
        yield item[0] if isinstance(item, tuple) else item


def _hash_of(folder: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        digest.update(file.name.encode())
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()


def main() -> None:
    name, folder = sys.argv[1:]
    (Path(folder) / "exported").mkdir(parents=True)
    prepare(cases.CASES[name], Path(folder))


if __name__ == "__main__":
    main()

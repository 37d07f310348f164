"""How much of the noise that one layer adds reaches the outputs, measured by adding it to the FP32 model alone.

Noise does not stay what it is on its way: normalisations and later layers take back a part of it, or add to it, and what
passes a residual connection meets what goes round it. So what a quantised layer adds to FP32's values, made of such
(`compiler.quantize.beside`), is added in the FP32 model::

    layer -> x -> Add(x, noise) -> whoever reads x

One model has such an input for every tensor; it runs once for each, the others zero.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx_ir as ir

from compiler import onnx_files
from compiler.data import Samples
from compiler.onnx_files import FreeNames
from compiler.quantize import beside, graphs
from compiler.quantize.fidelity import Power
from compiler.spec import Array, OnnxModel, OpenModel, Progress, TensorSpec

TENSORS = 24
"""For so many it is measured: one run of the FP32 model for each, and for each sample."""


@dataclass(kw_only=True)
class Noises:
    """What quantised layers add to FP32's values, sample by sample, in files: other models are open when it is measured."""

    folder: Path
    files: dict[int, Path] = field(default_factory=dict)
    """By sample."""
    keys: dict[str, str] = field(default_factory=dict)
    """By tensor, in each of the files. A tensor may have any name, that of an argument of `numpy.savez` among them."""

    def add(self, index: int, pairs: Mapping[str, tuple[Array, Array]]) -> None:
        """
        Args:
            pairs: by tensor of the FP32 model, what it is and what the quantised layer makes of it.
        """
        self.files[index] = self.folder / f"alone-{index}.npz"
        with np.errstate(invalid="ignore"):
            noises = [np.where(exact == made, 0, made - exact) for exact, made in pairs.values()]
        self.keys = {name: f"arr_{place}" for place, name in enumerate(pairs)}
        np.savez(self.files[index], *noises, allow_pickle=False)

    def clean(self) -> None:
        for file in self.files.values():
            file.unlink(missing_ok=True)


def measure(
    model: OnnxModel,
    samples: Samples,
    noises: Noises,
    names: Collection[str],
    outputs: Mapping[str, Power],
    *,
    open_model: OpenModel,
    threads: int,
    progress: Progress,
) -> dict[str, float]:
    """By tensor, those of ``names`` for which it can be had, what of the noise in the outputs there would be if it alone were as
    the quantised layer makes it: 1.0 is as much as there is. Of several outputs each counts for its noise over its signal.

    Args:
        model: in FP32.
        samples: those with noises are run again.
        noises: of layers.
        outputs: noise and signal of the model's float outputs over these samples, where everything is rounded.
        progress: told how many of them are done.
    """
    shares = shares_of(outputs)
    if not shares or not names:
        return {}
    network = beside.prepared(onnx_files.read(model.path))
    inputs = add_inputs(network.graph, names)
    found = dict.fromkeys(inputs, 0.0)
    silent = {spec.name: np.zeros((1,) * len(spec.shape), np.float32) for spec in inputs.values()}
    path = noises.folder / "alone.onnx"
    weights = onnx_files.write_graph(network, path)
    del network
    try:
        with closing(open_model(path, threads=threads, weights=weights)) as runner:
            for done, (index, file) in enumerate(noises.files.items(), start=1):
                feeds = {**samples.feeds(index), **silent}
                expected = runner.run(feeds)
                with np.load(file) as stored:
                    for name, spec in inputs.items():
                        made = runner.run({**feeds, spec.name: stored[noises.keys[name]].astype(np.float32)})
                        for output, share in shares.items():
                            power = Power()
                            power.add(expected[output], made[output])
                            found[name] += share * power.noise / outputs[output].noise
                progress(done, len(noises.files))
    finally:
        path.unlink()
    return found


def shares_of(outputs: Mapping[str, Power]) -> dict[str, float]:
    """What each output counts for: noise over signal, as a part of the sum.

    >>> shares_of({"a": Power(signal=4.0, noise=0.04), "b": Power(signal=1.0, noise=0.03)})
    {'a': 0.25, 'b': 0.75}
    """
    ratios = {name: power.noise / power.signal if power.signal > 0 else 1e30 for name, power in outputs.items()}
    return {name: ratio / sum(ratios.values()) for name, ratio in ratios.items() if ratio > 0}


def add_inputs(graph: ir.Graph, names: Collection[str]) -> dict[str, TensorSpec]:
    """Add an input to each of ``names``, in place: to those that a node makes, of known rank."""
    free = FreeNames(graph).free
    found = {}
    for name, value in beside.made(graph).items():
        producer = value.producer()
        if name not in names or producer is None or value.shape is None:
            continue
        noise = ir.Value(name=free(f"{name}_noise"), type=ir.TensorType(ir.DataType.FLOAT))
        shape = tuple(f"{noise.name}_{place}" for place in range(len(value.shape)))
        noise.shape = ir.Shape(shape)
        noisy = graphs.like(value, name, ir.DataType.FLOAT)
        value.replace_all_uses_with(noisy, replace_graph_outputs=True)
        value.name = free(f"{name}_exact")
        graph.insert_after(producer, ir.node("Add", [value, noise], outputs=[noisy], name=free(f"{name}_noisy")))
        graph.inputs.append(noise)
        found[name] = TensorSpec(name=str(noise.name), dtype="float32", shape=shape)
    return found

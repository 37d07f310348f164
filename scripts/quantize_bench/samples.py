"""Samples on disk: a folder with one file of raw numbers for each input, ``[N, ...]``, read one sample at a time.

Why not one .npz: reading it takes the memory of all samples at once, which would be charged to a tool that streams.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

_INDEX = "index.json"


class Samples:
    """Needs numpy, which every environment has."""

    def __init__(self, folder: Path | str, limit: int | None = None) -> None:
        self._folder = Path(folder)
        index = json.loads((self._folder / _INDEX).read_text())
        self._tensors: dict[str, dict[str, Any]] = index["tensors"]
        stored: int = index["count"]
        self._count = stored if limit is None else min(limit, stored)

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self.feeds(index) for index in range(self._count))

    def feeds(self, index: int, batch: int = 1) -> dict[str, Any]:
        """``batch`` samples from ``index`` on, in a circle, stacked: ``{name: [batch, ...]}``."""
        import numpy as np

        rows: dict[str, Any] = {}
        for name, tensor in self._tensors.items():
            dtype, shape = np.dtype(tensor["dtype"]), tuple(tensor["shape"])
            size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
            read = []
            with (self._folder / tensor["file"]).open("rb") as file:
                for place in range(index, index + batch):
                    file.seek(tensor["start"] + place % self._count * size)
                    read.append(np.frombuffer(file.read(size), dtype).reshape(shape))
            rows[name] = np.stack(read)
        return rows

    def stacked(self) -> dict[str, Any]:
        """All samples at once, for tools that take nothing else."""
        return self.feeds(0, self._count)

    @property
    def names(self) -> list[str]:
        return list(self._tensors)


def store(folder: Path, batches: Iterable[Mapping[str, Any]], limit: int) -> int:
    """Write up to ``limit`` samples of ``batches``, each ``{name: [n, ...]}``; returns how many."""
    import numpy as np

    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, dict[str, Any]] = {}
    count = 0
    for batch in batches:
        taken = min(len(next(iter(batch.values()))), limit - count)
        for place, (name, values) in enumerate(batch.items()):
            array = np.ascontiguousarray(values)
            entry: dict[str, Any] = {
                "file": f"{place}.bin",
                "dtype": array.dtype.name,
                "shape": list(array.shape[1:]),
                "start": 0,
            }
            assert tensors.setdefault(name, entry) == entry, f"{name}: {entry} after {tensors[name]}"
            with (folder / entry["file"]).open("ab" if count else "wb") as file:
                file.write(array[:taken].tobytes())
        count += taken
        if count == limit:
            break
    (folder / _INDEX).write_text(json.dumps({"count": count, "tensors": tensors}))
    return count

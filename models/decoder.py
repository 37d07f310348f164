"""A small language model, trained here: it reads Python source byte by byte and says which byte comes next.

The architecture is that of today's large ones, at a thousandth of the size: RMSNorm, rotary positions, grouped-query
attention, SwiGLU. The text is the source of the standard library of the Python that runs this; whole files train, others
calibrate, select and judge. `scripts/train_decoder.py` trains the weights in ``weights/decoder.safetensors``; the README
beside them says how well they do.

`inject_outliers` gives it what large language models have and small ones lack: a few channels of the activations that
are far larger than all others. ``decoder_outliers.py`` is that variant.
"""

from __future__ import annotations

import hashlib
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from compiler.metrics import nll, top1

# --- the model ------------------------------------------------------------------------------------------------------

WIDTH, LAYERS, HEADS, GROUPS, HIDDEN = 192, 4, 6, 2, 512
"""`GROUPS` heads of keys and values serve `HEADS` heads of queries (J. Ainslie et al., 2023, arXiv:2305.13245)."""

LENGTH = 128
"""Bytes that the model looks at: positions were trained up to here."""


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """``[N, H, S, D]`` turned by its position's angles ``[S, D/2]`` (J. Su et al., 2021, arXiv:2104.09864)."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cosine - second * sine, first * sine + second * cosine], dim=-1)


class Block(nn.Module):
    """Attention to what came before, then a gated MLP (N. Shazeer, 2020, arXiv:2002.05202): ``[N, S, W] -> [N, S, W]``."""

    def __init__(self) -> None:
        super().__init__()
        self.size = WIDTH // HEADS
        self.norm1, self.norm2 = nn.RMSNorm(WIDTH, eps=1e-6), nn.RMSNorm(WIDTH, eps=1e-6)
        self.query, self.output = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(2))
        self.key, self.value = (nn.Linear(WIDTH, GROUPS * self.size, bias=False) for _ in range(2))
        self.gate, self.up = (nn.Linear(WIDTH, HIDDEN, bias=False) for _ in range(2))
        self.down = nn.Linear(HIDDEN, WIDTH, bias=False)

    def forward(self, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        y = self.norm1(x)
        query, key, value = (
            part.unflatten(-1, (-1, self.size)).transpose(1, 2) for part in (self.query(y), self.key(y), self.value(y))
        )
        query, key = rotate(query, cosine, sine), rotate(key, cosine, sine)
        heard = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        x = x + self.output(heard.transpose(1, 2).flatten(2))
        y = self.norm2(x)
        result: Tensor = x + self.down(F.silu(self.gate(y)) * self.up(y))
        return result


class Decoder(nn.Module):
    """``ids [N, S] -> logits [N, S, 256]``: at every position, of the byte that follows."""

    cosine: Tensor
    sine: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = nn.RMSNorm(WIDTH, eps=1e-6)
        self.head = nn.Linear(WIDTH, 256, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.1)
        size = WIDTH // HEADS
        angles = torch.arange(LENGTH)[:, None] * 10_000.0 ** (-torch.arange(0, size, 2) / size)
        self.register_buffer("cosine", angles.cos(), persistent=False)
        self.register_buffer("sine", angles.sin(), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x, self.cosine[: ids.shape[1]], self.sine[: ids.shape[1]])
        logits: Tensor = self.head(self.norm(x))
        return logits


def build() -> Decoder:
    """The network; the recipe's ``weights`` are loaded into it."""
    torch.manual_seed(0)
    return Decoder()


def inject_outliers(model: Decoder, channels: int = 6, factor: float = 40.0, seed: int = 0) -> Decoder:
    """Make ``channels`` of what every linear layer reads ``factor`` times as large, and the weights that read them as
    much smaller: the same function in exact arithmetic, and far harder to quantise.

    In a large model such channels come up by themselves (T. Dettmers et al., 2022, arXiv:2208.07339). Changes the model
    in place. A value channel that is chosen is read by all heads of its group.
    """
    generator = torch.Generator().manual_seed(seed)

    def amplify(source: Tensor, readers: Sequence[nn.Linear], origin: Tensor | None = None) -> None:
        """``origin [I]``: which channel of the source a column of the readers reads; by default its own."""
        chosen = torch.randperm(len(source), generator=generator)[:channels]
        columns = chosen if origin is None else torch.isin(origin, chosen)
        source[chosen] *= factor
        for reader in readers:
            reader.weight[:, columns] /= factor

    size = WIDTH // HEADS
    shared = torch.arange(GROUPS * size).view(GROUPS, 1, size).expand(-1, HEADS // GROUPS, -1).flatten()
    with torch.no_grad():
        for block in model.modules():
            if isinstance(block, Block):
                amplify(block.norm1.weight, [block.query, block.key, block.value])
                amplify(block.value.weight, [block.output], shared)
                amplify(block.norm2.weight, [block.gate, block.up])
                amplify(block.up.weight, [block.down])
        amplify(model.norm.weight, [model.head])
    return model


# --- the data -------------------------------------------------------------------------------------------------------

COUNTS = {"validation": 256, "selection": 128, "calibration": 128}
"""Windows of each set: 256 of 128 bytes give 32,768 predictions that judge."""


def role(name: str) -> str:
    """The set that a file belongs to: about 6 of 100 judge, 3 select, 3 calibrate.

    By the hash of its name, so that what one Python's library trained does not judge with another's.
    """
    return {0: "validation", 1: "validation", 2: "selection", 3: "calibration"}.get(
        hashlib.sha256(name.encode()).digest()[0] % 32, "train"
    )


@cache
def split() -> dict[str, NDArray[np.uint8]]:
    """``{"train": [bytes], "validation" | "selection" | "calibration": [windows, 129]}``, always the same for a Python.

    A window's first 128 bytes are what the model reads, its last 128 what it should say. No window's input stands
    anywhere in the text that trains, or is in two sets. Windows are sorted by hash: a shuffle that no update can upset.
    Left out are tests, and two packages of tables in which one file is all but the copy of another.
    """
    library = Path(sysconfig.get_path("stdlib"))
    texts: dict[str, list[bytes]] = {"train": [], **{name: [] for name in COUNTS}}
    for module in sorted(sys.stdlib_module_names - {"test", "encodings", "pydoc_data"}):
        for path in (library / f"{module}.py", *sorted((library / module).rglob("*.py"))):
            name = path.relative_to(library)
            if path.is_file() and not {"test", "tests"} & set(name.parts):
                texts[role(name.as_posix())].append(path.read_bytes())
    taken = b"\0".join(texts["train"])
    sets = {"train": np.frombuffer(taken, np.uint8)}
    for part, count in COUNTS.items():
        windows = {
            text[start : start + LENGTH]: text[start : start + LENGTH + 1]
            for text in texts[part]
            for start in range(0, len(text) - LENGTH, LENGTH)
        }
        order = sorted(windows, key=lambda window: hashlib.sha256(window).digest())
        chosen = list(islice((window for window in order if window not in taken), count))
        taken += b"\0".join([b"", *chosen])
        sets[part] = np.frombuffer(b"".join(windows[window] for window in chosen), np.uint8).reshape(-1, LENGTH + 1)
    return sets


def calibration() -> Iterator[dict[str, NDArray[np.int64]]]:
    """Windows that may set ranges."""
    yield {"ids": split()["calibration"][:, :-1].astype(np.int64)}


def selection() -> Iterator[tuple[dict[str, NDArray[np.int64]], NDArray[np.int64]]]:
    """As `validation`, of other files: for a search to choose by."""
    return labelled("selection")


def validation() -> Iterator[tuple[dict[str, NDArray[np.int64]], NDArray[np.int64]]]:
    """Windows that judge; the label of a position is the byte that follows it."""
    return labelled("validation")


def labelled(part: str) -> Iterator[tuple[dict[str, NDArray[np.int64]], NDArray[np.int64]]]:
    windows = split()[part].astype(np.int64)
    yield {"ids": windows[:, :-1]}, windows[:, 1:]


metrics = {"top1": top1}

losses = {"nll": nll}
"""In nats per byte; its mean, raised to e, is the perplexity."""

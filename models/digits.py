"""A small ResNet that reads handwritten digits: a real classifier, on real data, that a laptop runs in no time.

The images are the 1,797 of scikit-learn's `load_digits` (8x8, 16 grey levels; E. Alpaydin and C. Kaynak, UCI, 1998),
enlarged to 32x32 so that the network has something to shrink. `scripts/train_digits.py` trains the weights in
``weights/digits.safetensors``; the README beside them says how well they do.

To bring your own model, copy this file and change the bodies: `build`, `calibration`, `validation` and `metrics` are
all that a recipe needs.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from compiler.metrics import top1

# --- the model ------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """Two 3x3 convolutions and a way around them: ``[N, I, H, W] -> [N, O, H/stride, W/stride]``."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.around = (
            nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
            if stride != 1 or inputs != outputs
            else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.around(x))


class ResNet14(nn.Module):
    """K. He et al., 2016 (arXiv:1512.03385, section 4.2) with n = 2: ``image [N, 1, 32, 32] -> logits [N, 10]``."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.blocks = nn.Sequential(
            *(Block(16, 16, 1), Block(16, 16, 1)),
            *(Block(16, 32, 2), Block(32, 32, 1)),
            *(Block(32, 64, 2), Block(64, 64, 1)),
        )
        self.head = nn.Linear(64, 10)

    def forward(self, image: Tensor) -> Tensor:
        features: Tensor = self.blocks(self.stem(image))
        logits: Tensor = self.head(features.mean(dim=(2, 3)))
        return logits


def build() -> nn.Module:
    """The network; the recipe's ``weights`` are loaded into it."""
    torch.manual_seed(0)
    return ResNet14()


# --- the data -------------------------------------------------------------------------------------------------------

VALIDATION_PER_DIGIT = 90
"""900 images in all: enough to tell a loss of 0.5 points from none, and to forgive one image (see the recipe)."""

CALIBRATION_PER_DIGIT = 13
"""130 images in all: ranges of a network this small settle after about a hundred."""


@cache
def split() -> dict[str, tuple[NDArray[np.float32], NDArray[np.int64]]]:
    """``{"train" | "calibration" | "validation": (images [N, 1, 32, 32] in 0..1, labels [N])}``, disjoint, always the same.

    Identical images, should there be any, count once: a copy on the other side would make the score too good.
    """
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    first = np.sort(np.unique(images, axis=0, return_index=True)[1])
    images, labels = images[first].reshape(-1, 1, 8, 8), labels[first]
    enlarged = (images / 16).astype(np.float32).repeat(4, axis=2).repeat(4, axis=3)
    shuffled = np.random.default_rng(0).permutation(len(labels))
    parts: dict[str, list[NDArray[np.int64]]] = {"validation": [], "calibration": [], "train": []}
    for digit in range(10):
        own = shuffled[labels[shuffled] == digit]
        cuts = [VALIDATION_PER_DIGIT, VALIDATION_PER_DIGIT + CALIBRATION_PER_DIGIT]
        for name, part in zip(parts, np.split(own, cuts), strict=True):
            parts[name].append(part)
    chosen = {name: np.sort(np.concatenate(part)) for name, part in parts.items()}
    return {name: (enlarged[index], labels[index].astype(np.int64)) for name, index in chosen.items()}


def calibration() -> Iterator[dict[str, NDArray[np.float32]]]:
    """Images that may set ranges: the network never saw them, and is not judged by them."""
    images, _ = split()["calibration"]
    yield {"image": images}


def validation() -> Iterator[tuple[dict[str, NDArray[np.float32]], NDArray[np.int64]]]:
    """Images that judge, with their labels."""
    images, labels = split()["validation"]
    yield {"image": images}, labels


metrics = {"top1": top1}

"""ResNet-50 at 224x224, for what it costs and how fast it is: the architecture that every inference benchmark knows.

The weights are random unless the recipe names some, so **accuracy here means agreement with the original and nothing
else**. They are random with care: activations keep their size from layer to layer, and the batch norms hold the
statistics of data that went through, as after training. The images are synthetic: smooth fields with a few shapes,
because white noise would give every image the same features.

With weights of your own (``[model] weights``, the parameter names of torchvision's ``resnet50``) give it images of your
own, too: set ``[data] source``.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

# --- the model ------------------------------------------------------------------------------------------------------


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 and a way around: ``[N, I, H, W] -> [N, 4 W, H/stride, W/stride]``."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.downsample = (
            nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
            if stride != 1 or inputs != outputs
            else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        y = torch.relu(self.bn2(self.conv2(y)))
        return torch.relu(self.bn3(self.conv3(y)) + self.downsample(x))


class ResNet50(nn.Module):
    """K. He et al., 2016 (arXiv:1512.03385, table 1), with the stride in the 3x3: ``image [N, 3, 224, 224] ->
    logits [N, 1000]``."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.maxpool = nn.MaxPool2d(3, 2, padding=1)
        self.layer1 = stage(64, 64, 3, 1)
        self.layer2 = stage(256, 128, 4, 2)
        self.layer3 = stage(512, 256, 6, 2)
        self.layer4 = stage(1024, 512, 3, 2)
        self.fc = nn.Linear(2048, 1000)

    def forward(self, image: Tensor) -> Tensor:
        x = self.maxpool(torch.relu(self.bn1(self.conv1(image))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        logits: Tensor = self.fc(x.mean(dim=(2, 3)))
        return logits


def stage(inputs: int, width: int, blocks: int, stride: int) -> nn.Sequential:
    rest = (Bottleneck(4 * width, width, 1) for _ in range(blocks - 1))
    return nn.Sequential(Bottleneck(inputs, width, stride), *rest)


def build() -> nn.Module:
    """The network with seeded random weights, the same on every call."""
    torch.manual_seed(0)
    model = ResNet50()
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # running statistics become a plain mean over the batches seen
    # A block adds its branch to what goes around it. Small branches, as in a trained network: with large ones every
    # layer would magnify the rounding of the layers before it, and INT8 would look worse than it is.
    for module in model.modules():
        if isinstance(module, Bottleneck):
            nn.init.constant_(module.bn3.weight, 0.2)
    seen = torch.from_numpy(images(8, seed=0))
    with torch.no_grad():
        model.train()(seen)
        # Without this, the logits of any two images have cosine 0.96, and every engine would seem to agree.
        model.fc.bias.sub_(model.eval()(seen).mean(dim=0))
    return model


# --- the data -------------------------------------------------------------------------------------------------------

CALIBRATION = 32
VALIDATION = 64
"""The bound of a mean needs at least 30 samples."""


def images(count: int, seed: int) -> NDArray[np.float32]:
    """``[count, 3, 224, 224]``, about as large as normalised photographs: waves, the finer the fainter, and boxes."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:1:224j, 0:1:224j]
    made = np.zeros((count, 3, 224, 224))
    for image in made:
        for frequency in (1, 2, 4, 8, 16, 32):
            angle, phase = rng.uniform(0, 2 * np.pi, size=(2, 3, 1, 1))
            image += np.sin(2 * np.pi * frequency * (x * np.cos(angle) + y * np.sin(angle)) + phase) / frequency
        for _ in range(4):
            top, left, height, width = rng.integers((0, 0, 16, 16), (176, 176, 112, 112))
            image[:, top : top + height, left : left + width] += rng.normal(size=(3, 1, 1))
    return made.astype(np.float32)


def calibration() -> Iterator[dict[str, NDArray[np.float32]]]:
    for start in range(0, CALIBRATION, 8):
        yield {"image": images(8, seed=1000 + start)}


def validation() -> Iterator[dict[str, NDArray[np.float32]]]:
    """No labels: the original's answers are the standard."""
    for start in range(0, VALIDATION, 8):
        yield {"image": images(8, seed=2000 + start)}

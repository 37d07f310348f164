"""Train the weights of ``models/digits.py`` and write down how well they do: a minute or two on two cores.

The validation images are looked at once, after the last epoch: no setting and no epoch was chosen by them.
The same machine and the same torch give the same weights; another machine rounds differently and ends close by.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

from models.digits import build, split  # noqa: E402

WEIGHTS = ROOT / "models" / "weights" / "digits.safetensors"
EPOCHS = 40
BATCH = 64
PIXEL = 4
"""Width of one of the scanner's pixels in the enlarged image."""
REQUIRED = 0.985


def shift(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image ``[N, 1, 32, 32]`` moved by -1, 0 or 1 of the scanner's pixels in both directions."""
    padded = F.pad(images, (PIXEL,) * 4)
    offsets = PIXEL * torch.randint(3, (len(images), 2), generator=generator)
    size = images.shape[-1]
    return torch.stack(
        [image[:, y : y + size, x : x + size] for image, (y, x) in zip(padded, offsets.tolist(), strict=True)]
    )


def train(images: Tensor, labels: Tensor) -> nn.Module:
    """SGD with Nesterov momentum, one cycle of the learning rate, cross-entropy with smoothed labels."""
    generator = torch.Generator().manual_seed(0)
    model = build().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    batches = len(labels) // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=EPOCHS * batches)
    for epoch in range(EPOCHS):
        total = 0.0
        order = torch.randperm(len(labels), generator=generator)
        for batch in order[: batches * BATCH].view(batches, BATCH):
            loss = F.cross_entropy(model(shift(images[batch], generator)), labels[batch], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            total += loss.item()
        print(f"epoch {epoch + 1:2d}/{EPOCHS}  loss {total / batches:.3f}", flush=True)
    return model.eval()


def main() -> int:
    torch.manual_seed(0)
    start = time.perf_counter()
    parts = {name: (torch.from_numpy(images), torch.from_numpy(labels)) for name, (images, labels) in split().items()}
    model = train(*parts["train"])
    with torch.no_grad():
        images, labels = parts["validation"]
        right = int((model(images).argmax(dim=1) == labels).sum())
    accuracy = right / len(labels)
    print(f"validation: {right} of {len(labels)} right, {accuracy:.2%}, after {time.perf_counter() - start:.0f} s")
    if accuracy < REQUIRED:
        print(f"below {REQUIRED:.1%}; the weights were not written")
        return 1
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, WEIGHTS)
    counts = ", ".join(f"{len(labels)} {name}" for name, (_, labels) in parts.items())
    (WEIGHTS.parent / "README.md").write_text(
        f"""\
# Weights of the reference models

`digits.safetensors` ({WEIGHTS.stat().st_size / 1e6:.2f} MB): the ResNet-14 of `models/digits.py`, FP32, written by
`scripts/train_digits.py` with torch {torch.__version__.partition("+")[0]}. scikit-learn's digits, split once:
{counts} images.

Top-1 on the validation images, which chose nothing: **{accuracy:.2%}** ({right} of {len(parts["validation"][1])}).
"""
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Train the weights of ``models/decoder.py`` and write down how well they do: 20 minutes on two cores.

The time is fixed and not the number of steps, so that the learning rate always reaches its end: a busier or slower
machine takes fewer steps and ends a little worse. The windows that judge are looked at once, after the last step.
Checkpoints go to ``decoder.part`` beside the weights, a file like theirs that an interrupted training leaves behind.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from pathlib import Path

os.environ.setdefault(
    "OMP_WAIT_POLICY", "PASSIVE"
)  # on cores that others use too, threads that spin take five times as long

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

from compiler.metrics import perplexity  # noqa: E402
from models.decoder import LENGTH, Decoder, build, losses, metrics, split, validation  # noqa: E402

WEIGHTS = ROOT / "models" / "weights" / "decoder.safetensors"
CHECKPOINT = WEIGHTS.with_suffix(".part")
BATCH = 16
PEAK = 3e-3
"""The largest learning rate."""
WARM_UP = 0.03
"""Share of the time in which the learning rate rises."""
REQUIRED = 5.0
"""Perplexity per byte on the validation windows, at most."""


def rate(progress: float) -> float:
    """The learning rate after a share of the time: a short rise, then half a cosine to zero."""
    if progress < WARM_UP:
        return PEAK * max(progress / WARM_UP, 0.01)
    return PEAK * (1 + math.cos(math.pi * min((progress - WARM_UP) / (1 - WARM_UP), 1.0))) / 2


def save(model: Decoder, path: Path) -> None:
    """Weights as float16, which is half the size and all that they are good for."""
    save_file({name: value.half().contiguous() for name, value in model.state_dict().items()}, path)


def train(text: Tensor, minutes: float) -> tuple[Decoder, int]:
    """AdamW on windows from anywhere in ``text [bytes]``; returns the number of steps too."""
    generator = torch.Generator().manual_seed(0)
    model = build().train()
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    gains = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": gains, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK, betas=(0.9, 0.95), fused=True)
    start, step, total, shown = time.perf_counter(), 0, 0.0, 0
    while (progress := (time.perf_counter() - start) / (60 * minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = rate(progress)
        offsets = torch.randint(len(text) - LENGTH, (BATCH,), generator=generator)
        windows = text[offsets[:, None] + torch.arange(LENGTH + 1)].long()
        loss = F.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        total += loss.item()
        step += 1
        if step % 100 == 0:
            print(f"{progress:4.0%}  step {step:5d}  loss {total / (step - shown):.3f}", flush=True)
            total, shown = 0.0, step
            save(model, CHECKPOINT)
    return model.eval(), step


def judge(model: Decoder) -> tuple[float, float, int]:
    """(perplexity, share of right next bytes, bytes) on the validation windows."""
    ((feeds, labels),) = validation()
    with torch.inference_mode():
        logits = torch.cat([model(part) for part in torch.split(torch.from_numpy(feeds["ids"]), BATCH)]).numpy()
    found = perplexity(losses["nll"]({"logits": logits}, labels))
    return found, float(np.mean(metrics["top1"]({"logits": logits}, labels))), labels.size


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=20.0, help="how long to train")
    minutes = parser.parse_args().minutes
    text = torch.from_numpy(split()["train"].copy())
    model, steps = train(text, minutes)
    model.load_state_dict({name: value.half().float() for name, value in model.state_dict().items()})
    found, accuracy, predictions = judge(model)
    print(f"validation: perplexity {found:.3f}, next byte {accuracy:.2%}, after {steps} steps of {BATCH} windows")
    if found > REQUIRED:
        print(f"above {REQUIRED}; {CHECKPOINT.name} was left, and {WEIGHTS.name} was not written")
        return 1
    save(model, WEIGHTS)
    CHECKPOINT.unlink(missing_ok=True)
    readme = WEIGHTS.parent / "README.md"
    others = readme.read_text().partition("\n`decoder.safetensors`")[0].rstrip("\n")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    readme.write_text(
        f"""\
{others}

`decoder.safetensors` ({WEIGHTS.stat().st_size / 1e6:.2f} MB): the language model of `models/decoder.py`, {parameters / 1e6:.2f} M
parameters as float16, written by `scripts/train_decoder.py` with torch {torch.__version__.partition("+")[0]}:
{steps * BATCH * LENGTH / 1e6:.1f} million bytes read of {len(text) / 1e6:.1f} million, the standard library of Python
{sys.version.partition(" ")[0]}.

On the {predictions:,} bytes that judge, which chose nothing: perplexity **{found:.3f}** per byte, next byte **{accuracy:.2%}** right.
"""
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

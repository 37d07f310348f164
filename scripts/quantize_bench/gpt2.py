"""GPT-2 small by shape, with seeded random weights and a tied head: 128 tokens to logits, no cache. For cost only."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

LENGTH = 128
CALIBRATION = 128
VALIDATION = 4


class Language(nn.Module):
    """``input_ids [N, 128] -> logits [N, 128, 50257]``."""

    def __init__(self) -> None:
        super().__init__()
        self.model = GPT2LMHeadModel(GPT2Config())

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        return {"logits": self.model(input_ids=input_ids, use_cache=False).logits}


def build() -> nn.Module:
    torch.manual_seed(0)
    return Language()


def tokens(count: int, seed: int) -> Iterator[dict[str, NDArray[np.int64]]]:
    rng = np.random.default_rng(seed)
    for _ in range(count):
        yield {"input_ids": rng.integers(0, 50257, size=(1, LENGTH))}


def calibration() -> Iterator[dict[str, NDArray[np.int64]]]:
    return tokens(CALIBRATION, seed=1)


def validation() -> Iterator[dict[str, NDArray[np.int64]]]:
    return tokens(VALIDATION, seed=2)

# Types of what scripts/rtx_builder.py installs: those of TensorRT, and two functions of its own.
# ruff: noqa
from collections.abc import Sequence

from tensorrt import *
from tensorrt import IBuilderConfig

__version__: str

def set_compute_capabilities(config: IBuilderConfig, capabilities: Sequence[int]) -> None: ...
def compute_capabilities(config: IBuilderConfig) -> list[int]: ...

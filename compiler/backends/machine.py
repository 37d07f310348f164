"""What this machine is: its processor and its first GPU, asked without loading anything heavy."""

from __future__ import annotations

import csv
import functools
import os
import platform
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from compiler import source
from compiler.spec import Platform

CUDA_ORDER = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
"""For the environment of what loads CUDA: its own order is by speed, and not that of `gpu`."""


@dataclass(frozen=True)
class Gpu:
    """What the driver says of the first GPU."""

    name: str
    compute_capability: str
    driver: str


@functools.cache
def gpu() -> Gpu | None:
    """The first NVIDIA GPU that CUDA may use, or None; asked of the driver's own tool, since loading CUDA takes seconds.

    Its order is that of the bus; `CUDA_ORDER` makes CUDA number its devices so.
    """
    tool = shutil.which("nvidia-smi")
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
    first = allowed.split(",")[0].strip() if allowed is not None else "0"
    if tool is None or first in ("", "-1"):
        return None
    query = [tool, f"--id={first}", "--query-gpu=name,compute_cap,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
        name, compute_capability, driver = next(csv.reader(done.stdout.splitlines(), skipinitialspace=True))
    except (OSError, subprocess.SubprocessError, ValueError, StopIteration):
        return None
    return Gpu(name, compute_capability, driver)


@functools.cache
def cpu_says() -> Mapping[str, str]:
    """What Linux says of the first core, by key; nothing elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().partition("\n\n")[0].splitlines()
    except OSError:
        return {}
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}


def cpu() -> str:
    """The processor's own name."""
    return cpu_says().get("model name") or platform.processor() or platform.machine()


def is_x86() -> bool:
    return platform.machine() in ("x86_64", "AMD64")


def usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def describe(packages: Sequence[str]) -> Platform:
    """This machine, with the installed versions of ``packages``."""
    found = gpu()
    return Platform(
        os=f"{platform.system()} {platform.release()}",
        arch=platform.machine(),
        cpu=cpu(),
        cores=usable_cores(),
        gpu=found.name if found else None,
        compute_capability=found.compute_capability if found else None,
        driver=found.driver if found else None,
        packages=source.versions(packages),
    )

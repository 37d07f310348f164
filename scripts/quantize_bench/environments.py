"""A virtual environment for each tool, with pinned versions, because no two of them agree on one.

Why PyTorch first and by itself: the builds for the CPU carry the plain version number, and whatever is installed
before them pulls in a build with gigabytes of CUDA libraries.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import time
import venv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

LIMIT_S = 1500.0
"""An installation that takes longer is given up, with a reason."""

TORCH = ("torch==2.13.0",)
RUNTIME = ("onnxruntime==1.31.1",)
"""The version that runs our own engines: a ratio of two releases of it would say nothing about quantisation."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What to install: ``steps`` of requirements, one call of pip each."""

    tool: str
    version_of: str
    """The distribution whose version stands for the tool's."""
    steps: tuple[tuple[str, ...], ...]
    note: str = ""
    """How this differs from the tool's own installation."""


RECIPES: Mapping[str, Recipe] = {
    recipe.tool: recipe
    for recipe in (
        Recipe(
            tool="ort", version_of="onnxruntime", steps=((*RUNTIME, "onnx==1.23.2", "onnx-ir==1.1.0", "sympy==1.14.0"),)
        ),
        Recipe(
            tool="nncf",
            version_of="nncf",
            steps=(("nncf==3.4.0", "openvino==2026.4.1", "onnx==1.21.0", *RUNTIME),),
        ),
        Recipe(
            tool="modelopt",
            version_of="nvidia-modelopt",
            steps=(
                TORCH,
                ("--no-deps", "nvidia-modelopt==0.47.0"),
                (
                    *("ninja", "numpy", "nvidia-ml-py>=12", "packaging", "setuptools>=80", "tqdm", "PyYAML>=6.0"),
                    *("omegaconf>=2.3.0", "pulp<4.0", "pydantic>=2.0", "regex", "rich", "safetensors", "scipy"),
                    *("cppimport", "lief", "ml_dtypes", "onnx-graphsurgeon>=0.6.1", "onnx~=1.21.0"),
                    *("onnxconverter-common~=1.16.0", "onnxruntime~=1.24.2", "onnxscript", "onnxslim>=0.1.76"),
                    *("polygraphy>=0.53.4", "torch==2.13.0"),
                ),
            ),
            note="onnxruntime in place of onnxruntime-gpu, and no cupy: it runs on the CPU anyway",
        ),
        Recipe(
            tool="optimum",
            version_of="optimum-onnx",
            steps=(
                TORCH,
                ("optimum-onnx==0.1.0", "transformers==4.57.6", "datasets", "onnx==1.21.0", *RUNTIME, *TORCH),
            ),
        ),
        Recipe(
            tool="olive",
            version_of="olive-ai",
            steps=(TORCH, ("olive-ai==0.13.0", "requests", "onnx==1.21.0", *RUNTIME, *TORCH)),
            note="requests is needed and not declared",
        ),
    )
}


@dataclass(frozen=True, kw_only=True)
class Environment:
    """An installed tool."""

    tool: str
    python: Path
    versions: Mapping[str, str]
    """By distribution, all that are installed."""

    @property
    def version(self) -> str:
        return self.versions[RECIPES[self.tool].version_of.lower()]


@dataclass(frozen=True, kw_only=True)
class Missing:
    """A tool that cannot be installed, and why."""

    tool: str
    reason: str


def installed(recipe: Recipe, folder: Path, *, limit_s: float = LIMIT_S) -> Environment | Missing:
    """The environment of ``recipe`` below ``folder``, made where it is not there yet. A failure is remembered, too, until
    the folder is deleted or the recipe changes."""
    home = folder / recipe.tool
    key = hashlib.sha256(json.dumps([recipe.steps, sys.version]).encode()).hexdigest()
    mark = home / "installed.json"
    if mark.is_file():
        found = json.loads(mark.read_text())
        if found["key"] == key:
            return _environment(recipe, home, found)
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(parents=True)
    found = {"key": key, **_install(recipe.steps, home, limit_s)}
    mark.write_text(json.dumps(found, indent=1))
    return _environment(recipe, home, found)


def _environment(recipe: Recipe, home: Path, found: Mapping[str, object]) -> Environment | Missing:
    versions, reason = found.get("versions"), found.get("reason")
    if not isinstance(versions, dict):
        return Missing(tool=recipe.tool, reason=str(reason))
    return Environment(tool=recipe.tool, python=home / "venv/bin/python", versions=versions)


def _install(steps: Sequence[Sequence[str]], home: Path, limit_s: float) -> dict[str, object]:
    """``{"versions": ...}`` or ``{"reason": ...}``."""
    # Our own pip, told where to install: giving each environment one of its own takes ten seconds.
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(home / "venv/bin/python")]
    ends = time.monotonic() + limit_s
    try:
        venv.create(home / "venv", with_pip=False)
        with (home / "pip.log").open("w") as log:
            for step in steps:
                done = subprocess.run(
                    [*pip, "install", *step],
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    timeout=max(ends - time.monotonic(), 1.0),
                )
                if done.returncode:
                    return {"reason": f"pip install {' '.join(step)[:60]}: {_last_error(home / 'pip.log')}"}
        listed = subprocess.run(
            [*pip, "list", "--format=json"],
            capture_output=True,
            check=True,
            timeout=120,
        )
    except subprocess.TimeoutExpired:
        return {"reason": f"not installed within {limit_s:.0f} s"}
    except (OSError, subprocess.CalledProcessError) as exc:
        return {"reason": f"no environment: {exc}"}
    return {"versions": {entry["name"].lower(): entry["version"] for entry in json.loads(listed.stdout)}}


def _last_error(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.startswith("ERROR")]
    return lines[-1].removeprefix("ERROR: ") if lines else "failed without saying why"

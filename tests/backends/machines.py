"""Machines that are not there: a driver that answers, and packages that are installed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from compiler.backends import machine


def pretend_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str) -> None:
    """Put an ``nvidia-smi`` first on the path that runs ``script``."""
    tool = tmp_path / "bin" / "nvidia-smi"
    tool.parent.mkdir(exist_ok=True)
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")
    machine.gpu.cache_clear()


def pretend_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, version: str) -> None:
    """Install an empty package ``name``."""
    site = tmp_path / "site"
    (site / name).mkdir(parents=True)
    (site / name / "__init__.py").write_text("")
    about = site / f"{name}-{version}.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    monkeypatch.syspath_prepend(str(site))

#!/usr/bin/env python3
"""Make ``import tensorrt_rtx`` work in an environment: NVIDIA's own ONNX parser and builder, without a GPU.

Two public wheels are joined. TensorRT for RTX travels inside a plugin of ONNX Runtime and has no Python bindings of
its own there; those of TensorRT fit it, but for a few calls (see ``tensorrt_rtx_package.py``). The bindings ask for
libraries of other names and for a version number that the library refuses: three small libraries, compiled here, pass
the calls on with the number that it expects.

Does nothing when all is in place; safe to call twice at once; an interrupted installation is finished by the next call.
"""

from __future__ import annotations

import os
import sys
import sysconfig
from pathlib import Path

WHEELS = {"onnxruntime-ep-nv-tensorrt-rtx-cu13": "0.5.0", "tensorrt-cu13-bindings": "11.4.0.106"}
PACKAGE = Path(__file__).with_name("tensorrt_rtx_package.py")
PLATFORM = "linux-x86_64"
STAMP = "installed"

_PRELUDE = """\
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdint.h>

static void *find(const char *symbol) {
  void *library = dlopen(LIBRARY, RTLD_NOW | RTLD_NOLOAD);
  return library ? dlsym(library, symbol) : 0;
}
"""
SOURCES = {
    "nvinfer": '#define LIBRARY "libtensorrt_rtx.so.1"\n'
    + _PRELUDE
    + """
static int32_t version(void) { return ((int32_t (*)(void))find("getInferLibVersion"))(); }

void *createInferBuilder_INTERNAL(void *logger, int32_t unused) {
  return ((void *(*)(void *, int32_t))find(__func__))(logger, version());
}
void *createInferRuntime_INTERNAL(void *logger, int32_t unused) {
  return ((void *(*)(void *, int32_t))find(__func__))(logger, version());
}
void *createInferRefitter_INTERNAL(void *engine, void *logger, int32_t unused) {
  return ((void *(*)(void *, void *, int32_t))find(__func__))(engine, logger, version());
}
void *getBuilderPluginRegistry(int32_t capability) { return ((void *(*)(int32_t))find(__func__))(capability); }
void *getPluginRegistry(void) { return ((void *(*)(void))find(__func__))(); }
""",
    "nvonnxparser": '#define LIBRARY "libtensorrt_onnxparser_rtx.so.1"\n'
    + _PRELUDE
    + """
int32_t getNvOnnxParserVersion(void) { return ((int32_t (*)(void))find(__func__))(); }

void *createNvOnnxParser_INTERNAL(void *network, void *logger, int32_t unused) {
  return ((void *(*)(void *, void *, int32_t))find(__func__))(network, logger, getNvOnnxParserVersion());
}
void *createNvOnnxParserRefitter_INTERNAL(void *refitter, void *logger, int32_t unused) {
  return ((void *(*)(void *, void *, int32_t))find(__func__))(refitter, logger, getNvOnnxParserVersion());
}
""",
    "nvinfer_plugin": "_Bool initLibNvInferPlugins(void *logger, const char *name_space) { return 1; }\n",
}


class InstallError(Exception):
    """One sentence for the user."""


def main(arguments: list[str] | None = None) -> int:
    import argparse

    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--python", default=sys.executable, help="the Python of the environment (default: this one)")
    python = parser.parse_args(arguments).python
    try:
        install(python)
    except (InstallError, OSError) as exc:
        print(f"rtx_builder: {exc}", file=sys.stderr)
        return 1
    return 0


def install(python: str) -> None:
    """
    Raises:
        InstallError: no such environment, platform, wheel or compiler, or what was installed does not work.
        OSError: the environment cannot be written.
    """
    if (platform := sysconfig.get_platform()) != PLATFORM:
        raise InstallError(f"found {platform}; the wheels exist for {PLATFORM} only. Use such a machine.")
    site = _site(python)
    if up_to_date(site):
        return
    import fcntl

    with (site / "tensorrt_rtx.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not up_to_date(site):
            _install(python, site)


def up_to_date(site: Path) -> bool:
    folder = site / "tensorrt_rtx"
    try:
        stamp = (folder / STAMP).read_text()
    except OSError:
        return False
    return stamp == _stamp() and all(_metadata(site, name).is_dir() for name in WHEELS)


def _stamp() -> str:
    """What an installation depends on: the versions, this text, and the package's."""
    import hashlib

    return hashlib.sha256(Path(__file__).read_bytes() + b"\0" + PACKAGE.read_bytes()).hexdigest()


def _metadata(site: Path, wheel: str) -> Path:
    return site / f"{wheel.replace('-', '_')}-{WHEELS[wheel]}.dist-info"


def _site(python: str) -> Path:
    """Where the environment keeps its packages."""
    if python == sys.executable:
        return Path(sysconfig.get_path("platlib"))
    return Path(_output([python, "-c", "import sysconfig; print(sysconfig.get_path('platlib'))"], python).strip())


def _install(python: str, site: Path) -> None:
    for name, package in {"TensorRT itself": "tensorrt_libs", "NVIDIA's own tensorrt_rtx": "tensorrt_rtx-*"}.items():
        if any(site.glob(package)):
            raise InstallError(
                f"{name} is installed in {site}; an environment without it was expected, since parts of it would be "
                "replaced. Use another environment."
            )
    compiler = _compiler()
    folder = site / "tensorrt_rtx"
    folder.mkdir(exist_ok=True)
    (folder / STAMP).unlink(missing_ok=True)
    print(f"rtx_builder: installing TensorRT for RTX into {site} (once; 300 MB) ...", file=sys.stderr)
    pip = [python, "-m", "pip", "install", "--no-deps", "--quiet", "--disable-pip-version-check"]
    _output([*pip, *(f"{name}=={version}" for name, version in WHEELS.items())], "pip")
    for name, source in SOURCES.items():
        _compile(compiler, source, folder / f"lib{name}.so.11")
    _publish(folder / "__init__.py", PACKAGE.read_bytes())
    _output([python, "-c", "import tensorrt_rtx as trt; trt.Builder(trt.Logger(trt.Logger.ERROR))"], "tensorrt_rtx")
    _publish(folder / STAMP, _stamp().encode())


def _compiler() -> list[str]:
    """The command that starts the compiler: $CC, which may have arguments, or the first of the usual names."""
    import shlex
    import shutil

    asked = os.environ.get("CC")
    for command in [shlex.split(asked)] if asked else [["cc"], ["gcc"], ["clang"]]:
        if shutil.which(command[0]):
            return command
    raise InstallError(
        f"no C compiler: found none named {asked or 'cc, gcc or clang'}; one was expected. Install gcc, or set CC."
    )


def _compile(compiler: list[str], source: str, target: Path) -> None:
    code, aside = target.with_suffix(".c"), target.with_suffix(".new")
    code.write_text(source)
    soname = f"-Wl,-soname,{target.name}"
    _output([*compiler, "-shared", "-fPIC", "-O1", soname, "-o", str(aside), str(code), "-ldl"], "the C compiler")
    aside.replace(target)
    code.unlink()


def _publish(target: Path, content: bytes) -> None:
    aside = target.with_suffix(".new")
    aside.write_bytes(content)
    aside.replace(target)


def _output(command: list[str], name: str) -> str:
    """What a command prints; its last words on failure."""
    import subprocess

    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as exc:
        raise InstallError(f"{name}: cannot be run: {exc.strerror}. Name one that can.") from exc
    if done.returncode != 0:
        said = [line.strip() for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        errors = [line for line in said if line.lower().startswith("error")]
        raise InstallError(f"{name} failed: {(errors or said or [f'exit code {done.returncode}'])[-1]}")
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())

"""A build of five small steps on a store, for child processes that are to be interrupted.

``python fake_build.py build STORE JOURNAL [LIMIT_BYTES [STEP_S]]``
    Build; every step made is a line in JOURNAL. Prints a hash of each step. A user's error is its exit code.
``python fake_build.py interrupt FOLDER {kill,ENOSPC,EIO}``
    Build over and over, interrupted at the first, second, ... change of the disk until a build is not reached by the
    interruption; after each, build again. Prints one line of JSON for each.
``python fake_build.py interrupt-publish FOLDER {kill,ENOSPC,EIO}``
    The same for an artifact that takes the place of an older one.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from compiler import codec, durable
from compiler.errors import BuildEngineError
from compiler.pipeline.store import Store

NEEDS: dict[str, tuple[str, ...]] = {
    "data": (),
    "export": (),
    "optimize": ("export",),
    "observe": ("optimize", "data"),
    "build": ("optimize", "observe"),
}
LIMIT_BYTES = 1 << 20


def keys() -> dict[str, str]:
    found: dict[str, str] = {}
    for step, needs in NEEDS.items():
        found[step] = codec.key({"step": step, "needs": [found[needed] for needed in needs]})
    return found


def build(root: Path, journal: Path, limit_bytes: int = LIMIT_BYTES, step_s: float = 0.0) -> dict[str, str]:
    """Returns, for each step, a hash of the names and bytes of its files."""
    folders: dict[str, Path] = {}
    with Store(root, limit_bytes=limit_bytes) as store, store.run(keys().values()):
        for step, key in keys().items():
            with store.fill(key) as filling:
                if filling.hit is None:
                    with durable.translating(filling.folder):  # as the worker of a real step does
                        make(step, [folders[needed] for needed in NEEDS[step]], filling.folder)
                        time.sleep(step_s)
                        with journal.open("a") as made:
                            made.write(f"{step}\n")
            folders[step] = filling.published
        store.memo["model.py"] = ["fixed"]
        return {step: digest(folder) for step, folder in folders.items()}


def make(step: str, inputs: list[Path], folder: Path) -> None:
    seed = step + "".join(digest(path) for path in inputs)
    (folder / "weights").mkdir()
    (folder / "weights" / "model.onnx").write_bytes(hashlib.sha256(seed.encode()).digest() * 64)
    (folder / "result.json").write_text(json.dumps({"step": step}))


def digest(folder: Path) -> str:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return hashlib.sha256(b"".join(str(f.relative_to(folder)).encode() + f.read_bytes() for f in files)).hexdigest()


# --- interruptions, at every change of the disk that Python announces ------------------------------------------------

CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "os.utime", "fsync"}


def interrupt_at(nth: int, how: str) -> list[str]:
    """From now on, the ``nth`` change of the disk by this process kills it, or fails. Returns the changes as they come."""
    seen: list[str] = []

    def reached(event: str) -> None:
        seen.append(event)
        if len(seen) == nth:
            if how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            code = getattr(errno, how)
            raise OSError(code, os.strerror(code), event)

    def hook(event: str, args: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
        if writes or event in CHANGES or (event == "fcntl.flock" and how == "kill"):
            reached(event)

    os.fsync = lambda _: reached("fsync")  # type: ignore[assignment]
    sys.addaudithook(hook)
    return seen


def in_child(work: Any) -> tuple[int, str]:
    """Exit status (-9 when killed) of a forked child, and what it said."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.write(writer, json.dumps(work()).encode())
            code = 0
        except BuildEngineError as exc:
            os.write(writer, exc.message.encode())
            code = exc.exit_code
        except BaseException as exc:
            os.write(writer, repr(exc).encode())
        finally:
            os._exit(code)
    os.close(writer)
    with os.fdopen(reader) as said:
        text = said.read()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), text


def interrupt(folder: Path, how: str) -> None:
    for nth in itertools.count(1):
        root, first, second = folder / f"{nth}", folder / f"{nth}.first", folder / f"{nth}.second"

        def interrupted(root: Path = root, journal: Path = first, nth: int = nth) -> bool:
            seen = interrupt_at(nth, how)
            build(root, journal)
            return len(seen) >= nth

        code, said = in_child(interrupted)
        if code == 0 and said == "false":
            return
        again, digests = in_child(lambda root=root, journal=second: build(root, journal))
        outcome = {
            "nth": nth,
            "code": code,
            "said": said,
            "finished": first.read_text().split() if first.exists() else [],
            "again": again,
            "digests": json.loads(digests) if again == 0 else digests,
            "made_again": second.read_text().split() if second.exists() else [],
            "left": sorted(path.name for name in ("tmp", "runs", "quarantine") for path in (root / name).iterdir()),
        }
        sys.stdout.write(json.dumps(outcome) + "\n")


# --- the same for an artifact ---------------------------------------------------------------------------------------


def publish(folder: Path, version: int) -> str:
    """Write an artifact whose run key and engine say ``version``."""
    from compiler import artifact
    from compiler.spec import DataSets, Engine, Outcome, Platform, Precision, ValidationSet, Verdict

    home = folder.parent.parent / f"engine{version}"
    if not home.exists():
        home.mkdir()
        (home / "engine.onnx").write_bytes(bytes([version]) * 5000)
    digest = hashlib.sha256(bytes([version]) * 5000).hexdigest()
    platform = Platform(
        os="linux", arch="x86_64", cpu="", cores=1, gpu=None, compute_capability=None, driver=None, packages={}
    )
    engine = Engine(
        name="fp32", path=home / "engine.onnx", sha256=digest, size_bytes=5000, backend="onnxruntime", backend_reason="",
        precision=Precision.FP32, model_sha256="", platform=platform, inputs=(), outputs=(), axes={}, build_s=0.0,
    )  # fmt: skip
    artifact.publish(
        folder,
        recipe={"name": "fake"},
        engines=[engine],
        verdicts=[Verdict(engine="fp32", engine_sha256=digest, outcome=Outcome.PASS, gates=())],
        scores=[],
        latencies=None,
        data=DataSets(calibration=None, validation=ValidationSet(path=home, samples=1, sha256="", labelled=False)),
        original={"onnx_bytes": 1},
        platform=platform,
        run_key=f"version {version}",
        steps={},
        report_md=f"version {version}",
        report_json=b"{}",
        now="2026-01-01T00:00:00+00:00",
    )
    return f"version {version}"


def interrupt_publish(base: Path, how: str) -> None:
    from compiler import artifact

    for nth in itertools.count(1):
        folder = base / f"{nth}" / "dist" / "fake"
        folder.parent.mkdir(parents=True)
        for version in (2, 1):
            publish(folder, version)

        def interrupted(folder: Path = folder, nth: int = nth) -> bool:
            seen = interrupt_at(nth, how)
            publish(folder, 2)
            return len(seen) >= nth

        code, said = in_child(interrupted)
        if code == 0 and said == "false":
            return
        _, found = in_child(lambda folder=folder: artifact.verify(folder).run_key)
        again, _ = in_child(lambda folder=folder: publish(folder, 3))
        _, final = in_child(lambda folder=folder: artifact.verify(folder).run_key)
        outcome = {
            "nth": nth,
            "code": code,
            "said": said,
            "found": found,
            "again": again,
            "final": final,
            "left": sorted(path.name for path in folder.parent.iterdir()),
        }
        sys.stdout.write(json.dumps(outcome) + "\n")


if __name__ == "__main__":
    if sys.argv[1].startswith("interrupt"):
        os.fsync = lambda fd: None  # a killed process loses nothing that it had written; only a machine does
        (interrupt if sys.argv[1] == "interrupt" else interrupt_publish)(Path(sys.argv[2]), sys.argv[3])
        sys.exit()
    options = [float(text) for text in sys.argv[4:]]
    try:
        found = build(Path(sys.argv[2]), Path(sys.argv[3]), *map(int, options[:1]), *options[1:])
    except BuildEngineError as error:
        sys.stderr.write(error.message)
        sys.exit(error.exit_code)
    sys.stdout.write(json.dumps(found))

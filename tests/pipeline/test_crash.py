"""A build that is killed, or whose disk fails, at any change of the disk leaves nothing half-done and is resumed.

`fake_build.py` is the build. Two ways to interrupt it: at every change that Python announces to an audit hook, in a fork,
which is cheap enough to try them all; and, where strace works, in the system calls themselves, at an even sample.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from compiler import durable
from compiler.pipeline.store import Store

FAKE_BUILD = Path(__file__).with_name("fake_build.py")
STEPS = ["data", "export", "optimize", "observe", "build"]
SAMPLED = int(os.environ.get("BUILD_ENGINE_KILL_POINTS", "12"))
"""How many system calls of each kind of interruption strace is asked to hit; all of them are about 170."""


def command(root: Path, journal: Path, *options: str) -> list[str]:
    return [sys.executable, str(FAKE_BUILD), "build", str(root), str(journal), *options]


def build(root: Path, journal: Path, *options: str) -> dict[str, str]:
    done = subprocess.run(command(root, journal, *options), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    digests: dict[str, str] = json.loads(done.stdout)
    return digests


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one: what a killed process leaves is the same, and fsync costs nothing."""
    shared = Path("/dev/shm")
    if not os.access(shared, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=shared) as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def right(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The hashes of an undisturbed build."""
    folder = tmp_path_factory.mktemp("right")
    return build(folder / "store", folder / "journal")


# --- every change that Python announces -----------------------------------------------------------------------------


def interruptions(folder: Path, how: str) -> list[dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, str(FAKE_BUILD), "interrupt", str(folder), how], capture_output=True, text=True, check=True
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_build_killed_at_any_change_of_the_disk_is_resumed_at_the_step_it_was_in(
    tmp_path: Path, right: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    outcomes = interruptions(tmp_path, "kill")
    assert len(outcomes) > 100
    assert {outcome["code"] for outcome in outcomes} == {-9}
    for outcome in outcomes:
        assert outcome["again"] == 0, outcome
        assert outcome["digests"] == right, outcome
        assert outcome["left"] == [], outcome
        made_twice = Counter(outcome["finished"] + outcome["made_again"])
        assert sorted(made_twice) == sorted(STEPS), outcome
        assert sum(made_twice.values()) <= len(STEPS) + 1, outcome
    with capsys.disabled():
        print(f"\n{len(outcomes)} kill points, all resumed")  # noqa: T201


@pytest.mark.parametrize("how", ["ENOSPC", "EIO"])
def test_a_build_whose_disk_fails_at_any_change_says_so_or_does_without(
    tmp_path: Path, right: dict[str, str], how: str
) -> None:
    outcomes = interruptions(tmp_path, how)
    assert len(outcomes) > 80
    wording = {
        "ENOSPC": r": the disk is full \(\d+ MiB free\)\. Free some space and run again\.\"?$",
        "EIO": r": cannot write: Input/output error\. Choose a folder that you may write to\.\"?$",
    }
    for outcome in outcomes:
        assert outcome["code"] in (0, 9), outcome
        if outcome["code"] == 9:
            assert re.search(wording[how], outcome["said"]), outcome
        assert outcome["digests"] == right, outcome
        assert outcome["left"] == [], outcome
    assert Counter(outcome["code"] for outcome in outcomes)[9] > 50


# --- the system calls themselves ------------------------------------------------------------------------------------

CALLS = "openat,mkdir,mkdirat,rename,renameat,renameat2,unlink,unlinkat,rmdir,write,fsync,fchmod,utimensat,flock"


@cache
def strace_refuses() -> str | None:
    if not shutil.which("strace"):
        return "strace is not installed"
    tried = subprocess.run(["strace", "-f", "-o", os.devnull, "-e", "trace=write", "true"], capture_output=True)
    return "strace may not trace here" if tried.returncode else None


needs_strace = pytest.mark.skipif(strace_refuses() is not None, reason=strace_refuses() or "")


def strace(log: Path | str, root: Path, journal: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["strace", "-f", "-y", "-o", str(log), "-e", f"trace={CALLS}", *options, *command(root, journal)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    )


def changes(log: Path, root: Path) -> Iterator[tuple[str, int]]:
    """Each system call that changes something below ``root``, with its number among the calls of its name."""
    counts: Counter[str] = Counter()
    for line in log.read_text(errors="replace").splitlines():
        call = re.match(r"\d+ +(\w+)\(", line)
        if call is None:
            continue
        counts[call[1]] += 1
        if str(root) in line and not (call[1] == "openat" and "O_CREAT" not in line):
            yield call[1], counts[call[1]]


def spread(points: list[tuple[str, int]], limit: int) -> list[tuple[str, int]]:
    step = max(1.0, len(points) / limit)
    return [points[int(index * step)] for index in range(min(limit, len(points)))]


@needs_strace
@pytest.mark.parametrize("how", ["signal=SIGKILL", "error=ENOSPC", "error=EIO"])
def test_no_interrupted_system_call_leaves_a_damaged_entry(
    memory: Path, right: dict[str, str], how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    strace(memory / "log", memory / "traced", memory / "journal")
    points = list(changes(memory / "log", memory / "traced"))
    if how == "error=ENOSPC":
        points = [point for point in points if point[0] in ("openat", "mkdir", "write", "rename")]
    elif how == "error=EIO":
        points = [point for point in points if point[0] in ("fsync", "write")]
    chosen = spread(points, SAMPLED)

    def interrupt(point: tuple[str, int]) -> tuple[tuple[str, int], int, dict[str, str], list[str], list[str]]:
        call, number = point
        root = memory / f"{call}{number}"
        # A disk that is full stays full; one bad sector does not spoil the next.
        when = f"{number}+" if how == "error=ENOSPC" and call == "write" else str(number)
        done = strace(os.devnull, root, root.with_suffix(".first"), "-e", f"inject={call}:{how}:when={when}")
        with Store(root, limit_bytes=1 << 30) as store:
            for folder in (root / "steps").iterdir():
                store.lookup(folder.name)
            damaged = list(store.events)
        again = build(root, root.with_suffix(".second"))
        left = [path.name for name in ("tmp", "runs", "quarantine") for path in (root / name).iterdir()]
        return point, done.returncode, again, damaged, left

    with ThreadPoolExecutor(2) as pool:
        for point, code, again, damaged, left in pool.map(interrupt, chosen):
            assert damaged == [], (point, damaged)
            assert again == right, point
            assert left == [], (point, left)
            # strace dies of the signal that killed its child
            assert code == -9 if how == "signal=SIGKILL" else code in (0, 1, 9, 120), (point, code)
    with capsys.disabled():
        print(f"\n{how}: {len(chosen)} of {len(points)} system calls tried")  # noqa: T201


@needs_strace
def test_nothing_is_renamed_into_place_before_it_is_on_the_disk(memory: Path) -> None:
    root = memory / "store"
    assert strace(memory / "log", root, memory / "journal").returncode == 0
    lines = (memory / "log").read_text(errors="replace").splitlines()
    assert unsynced(lines, root) == []
    assert sum(" rename(" in line for line in lines) == len(STEPS) + 2  # the pins and the memo
    without = [line for line in lines if not re.search(r"fsync\(\d+<[^>]*/model\.onnx>", line)]
    assert len(unsynced(without, root)) == len(STEPS), "the check does not see a missing fsync"


def unsynced(lines: list[str], root: Path) -> list[str]:
    """Renames of a file, or of a folder with a file or a folder in it, that was not flushed after its last change."""
    dirty: set[str] = set()
    problems = []
    for line in lines:
        if made := re.search(r" mkdir\(\"([^\"]+)\", \w+\) += 0", line):
            dirty.update((made[1], str(Path(made[1]).parent)))
        elif opened := re.search(r" openat\([^,]+, \"([^\"]+)\", (\S+), \w+\) += \d", line):
            if "O_CREAT" in opened[2]:
                dirty.update((opened[1], str(Path(opened[1]).parent)))
        elif written := re.search(r" write\(\d+<([^>]+)>", line):
            dirty.add(written[1])
        elif synced := re.search(r" fsync\(\d+<([^>]+)>\) += 0", line):
            dirty.discard(synced[1])
        elif moved := re.search(r" rename\(\"([^\"]+)\", \"([^\"]+)\"\) += 0", line):
            late = [path for path in dirty if Path(path).is_relative_to(moved[1]) and Path(path).is_relative_to(root)]
            problems += [f"{path} as {moved[2]}" for path in sorted(late)]
            dirty.add(str(Path(moved[2]).parent))
    return problems


# --- many builds at once --------------------------------------------------------------------------------------------


def at_once(commands: list[list[str]]) -> list[tuple[int, str, str]]:
    children = [subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for line in commands]
    outputs = [child.communicate() for child in children]
    return [(child.returncode, *output) for child, output in zip(children, outputs, strict=True)]


def test_eight_builds_at_once_make_each_step_once(memory: Path, right: dict[str, str]) -> None:
    root, journal = memory / "store", memory / "journal"
    for code, said, error in at_once([command(root, journal, "1000000", "0.05")] * 8):
        assert code == 0, error
        assert json.loads(said) == right
    assert sorted(journal.read_text().split()) == sorted(STEPS)
    assert not list((root / "tmp").iterdir()) + list((root / "runs").iterdir())


def test_builds_that_evict_what_they_can_never_evict_from_one_another(memory: Path, right: dict[str, str]) -> None:
    """Each of eight builds, in three waves, evicts everything it may when it ends."""
    root, journal = memory / "store", memory / "journal"
    for _ in range(3):
        for code, said, error in at_once([command(root, journal, "0", "0.01")] * 8):
            assert code == 0, error
            assert json.loads(said) == right
    with Store(root, limit_bytes=0) as store:
        store.gc()
    assert not list((root / "steps").iterdir()) + list((root / "tmp").iterdir())


# --- folders that take each other's place ---------------------------------------------------------------------------


def two_folders(tmp_path: Path) -> tuple[Path, Path]:
    for name in ("fresh", "current"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "content").write_text(name)
    return tmp_path / "fresh", tmp_path / "current"


@pytest.mark.parametrize("exchanges", [True, False])
def test_place_puts_a_folder_where_another_is(tmp_path: Path, exchanges: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    fresh, current = two_folders(tmp_path)
    if not exchanges:
        monkeypatch.setattr(durable, "_exchange", lambda *_: False)
    durable.place(fresh, current)
    assert (current / "content").read_text() == "fresh"
    durable.remove_tree(fresh)
    assert [path.name for path in tmp_path.iterdir()] == ["current"]


def test_place_fills_a_name_that_is_free(tmp_path: Path) -> None:
    fresh, current = two_folders(tmp_path)
    durable.remove_tree(current)
    durable.place(fresh, current)
    assert (current / "content").read_text() == "fresh"
    assert not fresh.exists()


def test_place_without_exchange_puts_the_old_folder_back_when_the_new_one_cannot_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh, current = two_folders(tmp_path)
    monkeypatch.setattr(durable, "_exchange", lambda *_: False)
    renames: list[Path] = []
    rename = Path.rename

    def fail_third(self: Path, target: Path) -> Path:
        renames.append(self)
        if len(renames) == 3:
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_third)
    with pytest.raises(OSError, match="Input/output error"):
        durable.place(fresh, current)
    assert (current / "content").read_text() == "current"
    assert (fresh / "content").read_text() == "fresh"


def test_restore_brings_back_what_a_killed_place_had_moved_away(tmp_path: Path) -> None:
    fresh, current = two_folders(tmp_path)
    current.rename(tmp_path / "fresh.old")
    durable.restore(fresh, current)
    assert (current / "content").read_text() == "current"
    assert not (tmp_path / "fresh.old").exists()


def test_restore_leaves_what_is_in_place(tmp_path: Path) -> None:
    fresh, current = two_folders(tmp_path)
    shutil.copytree(fresh, tmp_path / "fresh.old")
    durable.restore(fresh, current)
    assert (current / "content").read_text() == "current"
    assert not (tmp_path / "fresh.old").exists()


def test_a_folder_is_held_by_one_process_at_a_time(tmp_path: Path) -> None:
    held = durable.hold_folder(tmp_path)
    assert held is not None
    assert durable.hold_folder(tmp_path) is None
    os.close(held)
    again = durable.hold_folder(tmp_path)
    assert again is not None
    os.close(again)
    assert durable.hold_folder(tmp_path / "missing") is None


def test_a_folder_that_goes_while_it_is_being_locked_is_not_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = Path.exists
    monkeypatch.setattr(Path, "exists", lambda path: there(path) or path.name == "going")  # a look just before it went
    monkeypatch.setattr("fcntl.flock", lambda *_: (tmp_path / "going").rmdir())
    (tmp_path / "going").mkdir()
    assert durable.hold_folder(tmp_path / "going") is None

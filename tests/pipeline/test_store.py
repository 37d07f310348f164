"""The store gives back what was put into it, or nothing; it is private, bounded, and swept."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import platformdirs
import pytest

from compiler import codec, durable
from compiler.errors import ArtifactError, RecipeError
from compiler.pipeline import store as stores
from compiler.pipeline.store import Store

KEY, OTHER, THIRD = (codec.key({"step": name}) for name in ("one", "two", "three"))
LIMIT = 1 << 30


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "cache", limit_bytes=LIMIT) as made:
        yield made


def fill(store: Store, key: str = KEY, content: bytes = b"some weights") -> Path:
    with store.fill(key) as filling:
        assert filling.hit is None
        (filling.folder / "weights").mkdir()
        (filling.folder / "weights" / "model.onnx").write_bytes(content)
        (filling.folder / "result.json").write_text("{}")
        (filling.folder / "empty").mkdir()
    return filling.published


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


@contextmanager
def failing(monkeypatch: pytest.MonkeyPatch, name: str, error: OSError) -> Iterator[None]:
    def fail(*_args: Any, **_options: Any) -> NoReturn:
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(os, name, fail)
        yield


# --- finding and filling --------------------------------------------------------------------------------------------


def test_a_step_is_missed_then_filled_then_found(store: Store) -> None:
    assert store.lookup(KEY) is None
    assert not store.peek(KEY)
    folder = fill(store)
    assert store.lookup(KEY) == folder
    assert store.peek(KEY)
    assert (folder / "weights" / "model.onnx").read_bytes() == b"some weights"
    assert names(folder) == ["empty", "entry.json", "result.json", "weights", "weights/model.onnx"]
    assert store.events == []


def test_filling_a_step_that_is_there_is_a_hit_with_nothing_to_fill(store: Store) -> None:
    folder = fill(store)
    with store.fill(KEY) as filling:
        assert filling.hit == folder
        with pytest.raises(AssertionError, match=r"^a hit leaves nothing to fill$"):
            _ = filling.folder
    assert filling.published == folder


def test_the_key_is_the_whole_name(store: Store) -> None:
    assert fill(store).name == KEY
    assert len(KEY) == 64


def test_a_block_that_raises_publishes_nothing_and_leaves_nothing(store: Store) -> None:
    with pytest.raises(KeyboardInterrupt), store.fill(KEY) as filling:
        (filling.folder / "half").write_text("half")
        raise KeyboardInterrupt
    assert store.lookup(KEY) is None
    assert names(store.root / "tmp") == names(store.root / "steps") == []
    with pytest.raises(AssertionError, match=r"^a step is published when its block ends$"):
        _ = filling.published


def test_who_waits_for_a_step_gets_a_hit_when_it_is_made(store: Store) -> None:
    """The re-check after the lock: a second store finds the step between its first look and its lock."""
    second = Store(store.root, limit_bytes=LIMIT)
    look = second._find
    looks: list[Path | None] = []

    def overtaken(key: str) -> Path | None:
        looks.append(look(key))
        if len(looks) == 1:
            fill(store)
        return looks[-1]

    second._find = overtaken  # type: ignore[method-assign]
    with second.fill(KEY) as filling:
        assert filling.hit == store.root / "steps" / KEY
    assert looks[0] is None


def test_a_step_may_not_leave_a_link(store: Store) -> None:
    with pytest.raises(ArtifactError) as caught, store.fill(KEY) as filling:
        (filling.folder / "model.onnx").symlink_to("/etc/passwd")
    assert caught.value.message == (
        f"{store.root / 'tmp' / KEY / 'model.onnx'}: a symbolic link; a step may leave only files and folders."
    )
    assert not store.peek(KEY)


def test_a_discarded_step_is_gone_for_good(store: Store) -> None:
    fill(store)
    store.discard(KEY)
    assert store.lookup(KEY) is None
    assert names(store.root / "tmp") == []
    fill(store)


# --- distrust -------------------------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def hard_link(path: Path) -> None:
    os.link(path, path.parents[3] / "another name")


def symlink(path: Path) -> None:
    elsewhere = path.parents[3] / "elsewhere"
    shutil.copy(path, elsewhere)
    path.unlink()
    path.symlink_to(elsewhere)


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def rename(path: Path) -> None:
    path.rename(path.with_name("renamed"))


def to_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGE: dict[str, Callable[[Path], object]] = {
    "flip": flip,
    "truncate": truncate,
    "empty": lambda path: path.write_bytes(b""),
    "garbage": lambda path: path.write_bytes(b'{"garbage": [1, 2]}'),
    "append": lambda path: path.write_bytes(path.read_bytes() + b"\n"),
    "delete": Path.unlink,
    "rename": rename,
    "symlink": symlink,
    "hard link": hard_link,
    "pipe": pipe,
    "folder": to_folder,
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", ["entry.json", "result.json", "weights/model.onnx"])
def test_a_damaged_entry_is_a_miss_set_aside_told_once_and_made_again(store: Store, name: str, damage: str) -> None:
    folder = fill(store)
    before = {path: (folder / path).read_bytes() for path in names(folder) if (folder / path).is_file()}
    DAMAGE[damage](folder / name)
    assert store.lookup(KEY) is None
    assert len(list((store.root / "quarantine").iterdir())) == 1
    assert store.lookup(KEY) is None
    (event,) = store.events
    assert event.startswith(f"{folder}: ")
    assert event.endswith("; the step is made again.")
    fill(store)
    assert {path: (folder / path).read_bytes() for path in before} == before
    assert store.lookup(KEY) == folder


def test_filling_sets_a_damaged_entry_aside_too(store: Store) -> None:
    flip(fill(store) / "result.json")
    fill(store)
    assert len(list((store.root / "quarantine").iterdir())) == 1
    assert store.events == [
        f"{store.root / 'steps' / KEY}: result.json is not what was written; the step is made again."
    ]


def test_every_single_bit_of_an_entry_counts(store: Store) -> None:
    folder = fill(store)
    for name in ("entry.json", "result.json", "weights/model.onnx"):
        good = (folder / name).read_bytes()
        for bit in range(0, len(good) * 8, 1 if name != "entry.json" else 7):
            bad = bytearray(good)
            bad[bit // 8] ^= 1 << bit % 8
            (folder / name).write_bytes(bad)
            assert stores._damage(folder, KEY) is not None, f"bit {bit} of {name}"
        (folder / name).write_bytes(good)
    assert stores._damage(folder, KEY) is None


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (lambda folder: (folder / ".hidden").write_text(""), ".hidden was not written by the step"),
        (lambda folder: (folder / "more").mkdir(), "its folders are not those that were written"),
        (lambda folder: (folder / "empty").rmdir(), "its folders are not those that were written"),
        (lambda folder: (folder / "entry.json").unlink(), "entry.json is missing"),
        (lambda folder: (folder / "result.json").unlink(), "result.json is missing"),
        (lambda folder: (folder / "result.json").write_text("x"), "result.json has 1 bytes; 2 were written"),
        (lambda folder: (folder / "result.json").write_text("xy"), "result.json is not what was written"),
        (lambda folder: pipe(folder / "result.json"), "result.json is a named pipe; a file was expected"),
        (lambda folder: (folder / "entry.json").write_text("{}"), "entry.json is damaged"),
        (lambda folder: (folder / "entry.json").write_bytes((folder / "entry.json").read_bytes() + b" "),
         "entry.json is damaged"),
        (lambda folder: reschema(folder), "entry.json has schema 2; 1 was expected"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(store: Store, spoil: Callable[[Path], object], problem: str) -> None:
    folder = fill(store)
    spoil(folder)
    assert stores._damage(folder, KEY) == problem


def reschema(folder: Path) -> None:
    text = (folder / "entry.json").read_text()
    (folder / "entry.json").write_text(text.replace('"schema":1', '"schema":2'))


def test_two_entries_that_changed_places_are_both_missed(store: Store) -> None:
    one, two = fill(store, KEY), fill(store, OTHER)
    one.rename(store.root / "aside")
    two.rename(one)
    (store.root / "aside").rename(two)
    assert stores._damage(one, KEY) == f"it holds step {OTHER}"
    assert store.lookup(KEY) is store.lookup(OTHER) is None


def test_a_symbolic_link_in_the_place_of_an_entry_is_a_miss(store: Store) -> None:
    folder = fill(store)
    folder.rename(store.root / "elsewhere")
    folder.symlink_to(store.root / "elsewhere")
    assert store.lookup(KEY) is None
    assert store.events == [f"{folder}: found a symbolic link; a folder was expected; the step is made again."]
    fill(store)


def test_an_entry_that_cannot_be_read_is_a_miss(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = fill(store)
    with failing(monkeypatch, "open", OSError(errno.EIO, "Input/output error")):
        assert stores._damage(folder, KEY) == "it cannot be read: Input/output error"


# --- private --------------------------------------------------------------------------------------------------------


def test_nobody_else_can_enter_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        with Store(tmp_path / "parent" / "cache", limit_bytes=LIMIT) as store, store.run([KEY]):
            fill(store)
            store.memo["a"] = 1
    finally:
        os.umask(before)
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in [store.root, *store.root.rglob("*")]}
    assert {path: mode for path, mode in modes.items() if mode != (0o700 if path.is_dir() else 0o600)} == {}
    assert stat.S_IMODE((tmp_path / "parent").stat().st_mode) == 0o700


def test_a_cache_of_somebody_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Store(tmp_path / "cache", limit_bytes=LIMIT)
    os.chown(tmp_path / "cache" / "steps", 4321, -1)
    with pytest.raises(ArtifactError) as caught:
        Store.open(tmp_path / "cache")
    assert caught.value.message == (
        f"{tmp_path / 'cache' / 'steps'}: belongs to user 4321; a cache of your own was expected. "
        "Set BUILD_ENGINE_CACHE to a folder that only you may write to."
    )


if os.geteuid() != 0:
    test_a_cache_of_somebody_else_is_refused = pytest.mark.skip("only root may give files away")(
        test_a_cache_of_somebody_else_is_refused
    )


def test_a_cache_that_everybody_may_write_to_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(0o777)
    with pytest.raises(ArtifactError) as caught:
        Store.open(tmp_path / "cache")
    assert caught.value.message == (
        f"{tmp_path / 'cache'}: everybody may write to it; a folder that only you may write to was expected. "
        "Change its mode, or set BUILD_ENGINE_CACHE to another."
    )


def test_a_cache_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(ArtifactError) as caught:
        Store.open(tmp_path / "cache")
    assert caught.value.message == (
        f"{tmp_path / 'cache'}: it is not a folder; a folder that only you may write to was expected. "
        "Change its mode, or set BUILD_ENGINE_CACHE to another."
    )


# --- where the store is ---------------------------------------------------------------------------------------------


def test_the_place_comes_from_the_argument_then_the_environment_then_the_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("BUILD_ENGINE_CACHE", raising=False)
    monkeypatch.setattr(platformdirs, "user_cache_dir", lambda name: str(tmp_path / "home" / name))
    assert Store.open().root == tmp_path / "home" / "build-engine"
    monkeypatch.setenv("BUILD_ENGINE_CACHE", str(tmp_path / "named"))
    assert Store.open().root == tmp_path / "named"
    assert Store.open(tmp_path / "given").root == tmp_path / "given"


def test_the_limit_comes_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BUILD_ENGINE_CACHE_GIB", raising=False)
    assert Store.open(tmp_path).limit_bytes == 20 << 30
    monkeypatch.setenv("BUILD_ENGINE_CACHE_GIB", "0.5")
    assert Store.open(tmp_path).limit_bytes == 1 << 29


@pytest.mark.parametrize("text", ["much", "-1", "nan", "inf"])
def test_a_limit_that_is_no_size_is_refused(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BUILD_ENGINE_CACHE_GIB", text)
    with pytest.raises(RecipeError) as caught:
        Store.open(tmp_path)
    assert caught.value.message == (
        f"BUILD_ENGINE_CACHE_GIB: found '{text}'; a number of GiB was expected. Set one, e.g. 20."
    )


@pytest.mark.parametrize(
    ("error", "reason"),
    [(errno.EROFS, "the file system is read-only"), (errno.EACCES, "permission denied")],
)
def test_a_cache_that_cannot_be_made_gives_way_to_a_temporary_one(
    error: int, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = durable.make_private_folder

    def refuse(path: Path) -> None:
        if path.is_relative_to(tmp_path / "cache"):
            raise OSError(error, os.strerror(error), str(path))
        make(path)

    monkeypatch.setattr(durable, "make_private_folder", refuse)
    with Store.open(tmp_path / "cache") as store:
        assert store.warning == (
            f"{tmp_path / 'cache'}: the cache cannot be written: {reason}; what this run makes is not kept for the next. "
            "Set BUILD_ENGINE_CACHE to a folder that you may write to."
        )
        fill(store)
    assert not store.root.exists()


def test_a_cache_on_a_full_disk_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        failing(monkeypatch, "mkdir", OSError(errno.ENOSPC, "No space left on device")),
        pytest.raises(ArtifactError, match=r"/cache: the disk is full \(\d+ MiB free\)\. Free some space and run aga"),
    ):
        Store.open(tmp_path / "cache")


READ_ONLY = """
import os, sys
from pathlib import Path
from compiler.pipeline.store import Store
with Store.open(Path(sys.argv[1])) as store:
    print(store.warning)
    with store.fill(sys.argv[2]) as old:
        print(old.hit)
    with store.fill(sys.argv[3]) as new:
        assert new.hit is None
        (new.folder / "x").write_text("new")
    print(new.published.is_relative_to(sys.argv[1]), store.lookup(sys.argv[3]) == new.published)
    store.discard(sys.argv[2])
    print(store.lookup(sys.argv[2]), store.peek(sys.argv[2]))
    with store.run([sys.argv[2]]):
        pass
    print(store.events)
print(store.root.exists())
"""


def test_hits_still_come_from_a_read_only_cache(store: Store) -> None:
    fill(store)
    store.close()
    mount = f'mount --bind -o ro "{store.root}" "{store.root}" && mount -o remount,bind,ro "{store.root}"'
    isolated = ["unshare", "-rm", "sh", "-c", f'{mount} && exec "$@"', "sh"]
    if not shutil.which("unshare") or subprocess.run([*isolated, "true"], capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount a folder read-only")
    done = subprocess.run(
        [*isolated, sys.executable, "-c", READ_ONLY, str(store.root), KEY, OTHER],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    warning = (
        f"{store.root}: the cache cannot be written: the file system is read-only; what this run makes is not kept for the "
        "next. Set BUILD_ENGINE_CACHE to a folder that you may write to."
    )
    assert done.stdout.splitlines() == [
        warning,
        str(store.root / "steps" / KEY),
        "False True",
        "None False",
        "[]",
        "False",
    ]


# --- pins, eviction, sweeping ---------------------------------------------------------------------------------------


def aged(store: Store, *keys: str) -> None:
    """Make ``keys`` the ones used longest ago, in this order."""
    for index, key in enumerate(keys):
        when = 1_000_000_000 + index
        os.utime(store.root / "steps" / key, (when, when))


def test_what_was_used_longest_ago_goes_first_until_the_rest_fits(store: Store) -> None:
    for key in (KEY, OTHER, THIRD):
        fill(store, key, bytes(10_000))
    aged(store, OTHER, THIRD, KEY)
    store.limit_bytes = 25_000
    assert store.gc() == (OTHER,)
    assert stores.size_bytes(store.root) <= 25_000
    assert [store.peek(key) for key in (KEY, OTHER, THIRD)] == [True, False, True]
    assert names(store.root / "tmp") == []
    assert store.gc() == ()


def test_a_look_counts_as_use(store: Store) -> None:
    for key in (KEY, OTHER):
        fill(store, key, bytes(10_000))
    aged(store, KEY, OTHER)
    store.lookup(KEY)
    store.limit_bytes = 15_000
    assert store.gc() == (OTHER,)


def test_quarantine_goes_before_any_step(store: Store) -> None:
    for key in (KEY, OTHER):
        fill(store, key, bytes(10_000))
    flip(store.root / "steps" / OTHER / "weights" / "model.onnx")
    store.lookup(OTHER)
    store.limit_bytes = 15_000
    assert store.gc() == ()
    assert names(store.root / "quarantine") == names(store.root / "tmp") == []


def test_steps_of_a_living_build_stay_and_go_when_it_ends(store: Store) -> None:
    for key in (KEY, OTHER):
        fill(store, key, bytes(10_000))
    other_build = Store(store.root, limit_bytes=0)
    with store.run([KEY]):
        assert other_build.gc() == (OTHER,)
        assert store.peek(KEY)
        assert other_build.gc() == ()
    assert other_build.gc() == (KEY,)
    assert names(store.root / "runs") == []


def test_what_a_build_fills_beyond_its_plan_is_kept_for_it_too(store: Store) -> None:
    other_build = Store(store.root, limit_bytes=0)
    with store.run([KEY]):
        fill(store, THIRD)
        assert other_build.gc() == ()
        assert store.peek(THIRD)
    assert other_build.gc() == (THIRD,)


def test_a_build_ends_within_the_limit(store: Store) -> None:
    store.limit_bytes = 5_000
    with store.run([KEY]):
        fill(store, KEY, bytes(10_000))
        assert store.peek(KEY)
    assert not store.peek(KEY)


def test_debris_is_swept_and_living_work_is_not(store: Store) -> None:
    for name in (OTHER, "evicted.x", "memo", "gc"):
        (store.root / "tmp" / name).mkdir()
        (store.root / "tmp" / name / "half").write_text("half")
    (store.root / "runs" / "dead.json").write_text("{}")
    (store.root / "runs" / "dead.lock").write_text("")
    with store.fill(KEY) as filling:
        (filling.folder / "x").write_text("x")
        Store(store.root, limit_bytes=LIMIT).gc()
        assert names(store.root / "tmp") == [KEY, f"{KEY}/x"]
        assert names(store.root / "runs") == []


def test_old_logs_are_dropped(store: Store) -> None:
    for index in range(stores._LOGS_KEPT + 2):
        store.log_path(f"{index:03}").write_text("log")
        os.utime(store.log_path(f"{index:03}"), (index, index))
    store.gc()
    assert len(names(store.root / "logs")) == stores._LOGS_KEPT
    assert not store.log_path("001").exists()
    assert store.log_path("002").exists()


def test_a_failure_to_tidy_is_an_event_and_no_error(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(store)
    store.limit_bytes = 0
    with failing(monkeypatch, "rename", OSError(errno.EIO, "Input/output error")):
        assert store.gc() == ()
    assert store.events == [f"{store.root}: the cache is not tidied: [Errno 5] Input/output error."]
    assert store.lookup(KEY) is not None


# --- the disk fails -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left"), r"/tmp/\w{64}: the disk is full \(\d+ MiB free\)\. Free some space and run"),
        (OSError(errno.EDQUOT, "Quota exceeded"), r"/tmp/\w{64}: the disk is full \(\d+ MiB free\)\. Free some space and run"),
        (OSError(errno.EIO, "Input/output error"),
         r"/tmp/\w{64}: cannot write: Input/output error\. Choose a folder that you may write to\.$"),
    ],
)  # fmt: skip
def test_a_step_that_cannot_reach_the_disk_is_not_published(
    store: Store, monkeypatch: pytest.MonkeyPatch, error: OSError, message: str
) -> None:
    with pytest.raises(ArtifactError, match=message), store.fill(KEY) as filling:
        (filling.folder / "x").write_text("x")
        monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(error))
    monkeypatch.undo()
    assert names(store.root / "steps") == names(store.root / "tmp") == []
    fill(store)


# --- waiting --------------------------------------------------------------------------------------------------------

HOLDER = """
import sys, time
from pathlib import Path
from compiler.pipeline.store import Store
store = Store(Path(sys.argv[1]), limit_bytes=1 << 30)
with store.run([sys.argv[2]]), store.fill(sys.argv[2]) as filling:
    (filling.folder / "half").write_text("half")
    print("holding", flush=True)
    time.sleep(600)
"""


def test_a_lock_holder_that_is_killed_is_replaced_and_while_it_lives_it_is_named(store: Store) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(store.root), KEY], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "holding\n"
        assert Store(store.root, limit_bytes=0).gc() == ()
        assert (store.root / "tmp" / KEY / "half").exists()
        told: list[str] = []

        def waiting(who: str) -> None:
            told.append(who)
            holder.kill()

        with store.fill(KEY, waiting=waiting) as filling:
            assert filling.hit is None
            assert names(filling.folder) == []
            (filling.folder / "x").write_text("x")
        assert told == [f"process {holder.pid} on {os.uname().nodename}"]
    finally:
        holder.kill()
        holder.communicate()
    assert store.lookup(KEY) == filling.published
    store.gc()
    assert names(store.root / "runs") == names(store.root / "tmp") == []


def test_a_damaged_entry_that_another_build_repairs_is_left_to_it(store: Store) -> None:
    flip(fill(store) / "result.json")
    with store._locked(KEY, print):
        assert Store(store.root, limit_bytes=LIMIT).lookup(KEY) is None
        assert names(store.root / "quarantine") == []


# --- the memo -------------------------------------------------------------------------------------------------------


def test_the_memo_comes_back(tmp_path: Path) -> None:
    with Store(tmp_path, limit_bytes=LIMIT) as store:
        assert dict(store.memo) == {}
        store.memo["/a/model.py"] = (12, 1_700_000_000_123_456_789, 3, "ab")
    assert dict(Store(tmp_path, limit_bytes=LIMIT).memo) == {"/a/model.py": [12, 1_700_000_000_123_456_789, 3, "ab"]}


def test_an_unchanged_memo_is_not_written_again(tmp_path: Path) -> None:
    with Store(tmp_path, limit_bytes=LIMIT) as store:
        store.memo["a"] = 1
    os.utime(tmp_path / "memo.json", (1, 1))
    with Store(tmp_path, limit_bytes=LIMIT) as store:
        store.memo["a"] = 1
    assert (tmp_path / "memo.json").stat().st_mtime == 1


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "garbage", "delete", "folder"])
def test_a_damaged_memo_is_empty(tmp_path: Path, damage: str) -> None:
    with Store(tmp_path, limit_bytes=LIMIT) as store:
        store.memo["a"] = "ab" * 32
    DAMAGE[damage](tmp_path / "memo.json")
    with Store(tmp_path, limit_bytes=LIMIT) as store:
        assert dict(store.memo) == {}
        store.memo["a"] = 2
    expected = {"a": 2} if damage != "folder" else {}
    assert dict(Store(tmp_path, limit_bytes=LIMIT).memo) == expected


def test_the_memo_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "_MEMO_KEPT", 2)
    with Store(tmp_path, limit_bytes=LIMIT) as store:
        store.memo.update({"a": 1, "b": 2, "c": 3})
    assert dict(Store(tmp_path, limit_bytes=LIMIT).memo) == {"b": 2, "c": 3}


def test_a_temporary_store_keeps_no_memo(tmp_path: Path) -> None:
    with Store.temporary() as store:
        store.memo["a"] = 1
        fill(store)
        root = store.root
    assert not root.exists()

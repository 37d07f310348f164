"""A content-addressed store of finished steps: locked, published by rename, hashed again whenever it is read.

Layout, all of it private to its owner::

    steps/<key>/       a finished step: its files, and entry.json with the size and SHA-256 of each
    tmp/<key>/         a step being made by the process that holds locks/<key>.lock
    tmp/evicted.*      on its way out
    locks/<key>.lock   held while a step is made; says by whom
    runs/<id>.json     the keys that a build uses; alive while runs/<id>.lock is held
    quarantine/        entries that were not what had been written, kept for a look until space is needed
    logs/<key>.log     output of steps that failed
    caches/            what back ends keep to build faster, such as timings of TensorRT's tactics; theirs, and never evicted
    memo.json          hashes of the user's files by size, time and inode

Why a folder per step and no pool of blobs shared by steps: steps hand folders to native code, which wants real paths, and
two steps seldom share a file. Why a lock is enough to tell debris from work: the kernel frees it when its holder dies,
however it dies, whereas ages and process ids lie.
"""

from __future__ import annotations

import errno
import hashlib
import os
import platform
import stat
import tempfile
import uuid
from collections.abc import Callable, Collection, Iterator, MutableMapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import filelock
import platformdirs

from compiler import codec, durable
from compiler.durable import Record
from compiler.errors import ArtifactError, RecipeError, from_os_error

SCHEMA = 1
ENTRY = "entry.json"
CACHE_VARIABLE = "BUILD_ENGINE_CACHE"
LIMIT_VARIABLE = "BUILD_ENGINE_CACHE_GIB"
DEFAULT_LIMIT_GIB = 20.0

_FOLDERS = ("steps", "tmp", "locks", "runs", "quarantine", "logs")
_LOGS_KEPT = 100
_MEMO_KEPT = 20_000
_SILENT_WAIT_S = 1.0


@dataclass(frozen=True, kw_only=True)
class _Entry:
    schema: int
    key: str
    files: dict[str, Record]
    folders: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class _Pins:
    keys: tuple[str, ...]


@dataclass(kw_only=True)
class Filling:
    """A step to be made, or found made. See `Store.fill`."""

    hit: Path | None
    """The step's folder, where it is there already."""
    _folder: Path | None = None
    _published: Path | None = None

    @property
    def folder(self) -> Path:
        """The empty folder to fill; there is none on a hit."""
        assert self._folder is not None, "a hit leaves nothing to fill"
        return self._folder

    @property
    def published(self) -> Path:
        """Where the step's files are, once the block of `Store.fill` has ended."""
        folder = self.hit or self._published
        assert folder is not None, "a step is published when its block ends"
        return folder


def _nobody_waits(_holder: str) -> None:
    """Told who holds a lock; does not care."""


class Store:
    """Finished steps below ``root``.

    ``older`` is a second store that is only read. ``warning`` is for the user, where the store is not what was asked for;
    ``events`` collects what went wrong and was repaired.
    """

    def __init__(self, root: Path, *, limit_bytes: int, older: Path | None = None, warning: str | None = None) -> None:
        self.root = root.resolve()
        self.limit_bytes = limit_bytes
        self.warning = warning
        self.events: list[str] = []
        self._older = older
        self._forgotten: set[str] = set()
        self._reported: set[Path] = set()
        self._temporary = False
        self._pins: tuple[Path, set[str]] | None = None
        with durable.translating(self.root):
            for name in _FOLDERS:
                durable.make_private_folder(self.root / name)
        self._memo_was, self.memo = _read_memo(self.root / "memo.json")

    @classmethod
    def open(cls, root: Path | None = None) -> Store:
        """The store at ``root``, at ``$BUILD_ENGINE_CACHE``, or in the user's cache directory.

        One that cannot be written is only read, and a temporary one takes what this run adds.

        Raises:
            ArtifactError: the store belongs to somebody else, or the disk is full.
            RecipeError: ``$BUILD_ENGINE_CACHE_GIB`` is not a size.
        """
        chosen = root or Path(os.environ.get(CACHE_VARIABLE) or platformdirs.user_cache_dir("build-engine"))
        chosen = chosen.expanduser().resolve()
        limit = _limit_bytes()
        _refuse_strangers(chosen)
        reason = _why_not_writable(chosen)
        if reason is None:
            return cls(chosen, limit_bytes=limit)
        return cls.temporary(
            older=chosen,
            warning=f"{chosen}: the cache cannot be written: {reason}; what this run makes is not kept for the next. "
            f"Set {CACHE_VARIABLE} to a folder that you may write to.",
        )

    @classmethod
    def temporary(cls, *, older: Path | None = None, warning: str | None = None) -> Store:
        """A store that is gone when it is closed."""
        store = cls(
            Path(tempfile.mkdtemp(prefix="build-engine-")), limit_bytes=_limit_bytes(), older=older, warning=warning
        )
        store._temporary = True
        return store

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Keep the memo for the next run; remove a temporary store."""
        if self._temporary:
            with suppress(OSError):
                durable.remove_tree(self.root)
            return
        data = codec.dump(dict(list(self.memo.items())[-_MEMO_KEPT:]), self.root)
        if data != self._memo_was:
            self._attempt("the hashes of the user's files are not kept", lambda: self._write_memo(data))
            self._memo_was = data

    def _write_memo(self, data: bytes) -> None:
        checksum = hashlib.sha256(data).hexdigest().encode()
        with self._lock("memo"):
            durable.write_whole(self.root / "memo.json", checksum + b"\n" + data, aside=self.root / "tmp" / "memo")

    # --- reading ----------------------------------------------------------------------------------------------------

    def peek(self, key: str) -> bool:
        """Whether there is an entry, sound or not: a guess for printing a plan."""
        return any((folder / ENTRY).exists() for folder in self._places(key))

    def lookup(self, key: str) -> Path | None:
        """The folder of a finished step, each of its files hashed again; None where there is none.

        An entry that is not what had been written goes to quarantine, unless another build is repairing it just now.
        """
        found = self._find(key)
        mine = self.root / "steps" / key
        if found is None and os.path.lexists(mine):
            with suppress(filelock.Timeout), self._lock(key).acquire(timeout=0):
                found = self._find(key)
                if found is None:
                    self._quarantine(key)
        return found

    def log_path(self, key: str) -> Path:
        """Where the output of a step belongs that fails, or may; it outlives a temporary store."""
        if self._temporary:
            return Path(tempfile.gettempdir()) / f"build-engine-{key[:16]}.log"
        return self.root / "logs" / f"{key}.log"

    def _places(self, key: str) -> list[Path]:
        mine = [self.root / "steps" / key]
        if self._older is not None and key not in self._forgotten:
            mine.append(self._older / "steps" / key)
        return mine

    def _find(self, key: str) -> Path | None:
        """A sound entry; of one that is not, an event tells."""
        for folder in self._places(key):
            if not os.path.lexists(folder):
                continue
            problem = _damage(folder, key)
            if problem is None:
                with suppress(OSError):
                    os.utime(folder)  # the time of last use, for `gc`
                return folder
            if folder not in self._reported and os.path.lexists(folder):
                self._reported.add(folder)
                self.events.append(f"{folder}: {problem}; the step is made again.")
        return None

    # --- writing ----------------------------------------------------------------------------------------------------

    @contextmanager
    def fill(self, key: str, *, waiting: Callable[[str], None] = _nobody_waits) -> Iterator[Filling]:
        """Find a step, or make it while every other build that needs it waits.

        On a miss, the block fills ``folder``; when it ends well the folder is published, when it raises nothing is.
        ``waiting`` is told who is making the step already, where that takes more than a second.

        >>> with Store.temporary() as store:
        ...     with store.fill("0" * 64) as filling:
        ...         if filling.hit is None:
        ...             _ = (filling.folder / "answer").write_text("42")
        ...     (filling.published / "answer").read_text()
        '42'

        Raises:
            ArtifactError: the store cannot be written.
        """
        if self._pins is not None and key not in self._pins[1]:
            path, keys = self._pins
            with durable.translating(path):
                self._write_pins(path, keys | {key})
        hit = self._find(key)
        if hit is not None:
            yield Filling(hit=hit)
            return
        with self._locked(key, waiting):
            hit = self._find(key)  # whoever held the lock may have made it
            if hit is not None:
                yield Filling(hit=hit)
                return
            folder = self.root / "tmp" / key
            with durable.translating(folder):
                self._quarantine(key)
                durable.remove_tree(folder)
                durable.make_private_folder(folder)
            try:
                filling = Filling(hit=None, _folder=folder)
                yield filling
                with durable.translating(folder):
                    filling._published = self._publish(key, folder)
            except BaseException:
                with suppress(OSError):
                    durable.remove_tree(folder)
                raise

    def discard(self, key: str) -> None:
        """Forget a step, sound or not."""
        self._forgotten.add(key)
        with self._locked(key, _nobody_waits), durable.translating(self.root):
            self._evict(key)
        self._attempt("a discarded step still takes space", self._sweep)

    def _publish(self, key: str, folder: Path) -> Path:
        tree = durable.list_tree(folder)
        if tree.irregular:
            name, kind = next(iter(sorted(tree.irregular.items())))
            raise ArtifactError(f"{folder / name}: {kind}; a step may leave only files and folders.")
        files = {name: durable.hash_file(folder / name) for name in tree.files}
        entry = _Entry(schema=SCHEMA, key=key, files=files, folders=tuple(sorted(tree.folders)))
        (folder / ENTRY).write_bytes(codec.dump(entry, folder))
        durable.sync_tree(folder, private=True)
        target = self.root / "steps" / key
        durable.move(folder, target)
        return target

    def _quarantine(self, key: str) -> None:
        """Set an entry aside that `_find` refused. The caller holds its lock."""
        folder = self.root / "steps" / key
        if os.path.lexists(folder):
            durable.move(folder, self.root / "quarantine" / f"{key}.{uuid.uuid4().hex[:8]}")

    def _evict(self, key: str) -> None:
        folder = self.root / "steps" / key
        if os.path.lexists(folder):
            durable.move(folder, self.root / "tmp" / f"evicted.{key}.{uuid.uuid4().hex[:8]}")

    # --- locks ------------------------------------------------------------------------------------------------------

    def _lock(self, name: str) -> filelock.BaseFileLock:
        return filelock.FileLock(self.root / "locks" / f"{name}.lock", mode=0o600)

    @contextmanager
    def _locked(self, key: str, waiting: Callable[[str], None]) -> Iterator[None]:
        lock = self._lock(key)
        path = Path(lock.lock_file)
        with durable.translating(path):
            try:
                lock.acquire(timeout=_SILENT_WAIT_S)
            except filelock.Timeout:
                with suppress(OSError):
                    waiting(path.read_text(errors="replace") or "another build")
                lock.acquire()
        try:
            with suppress(OSError):
                path.write_text(f"process {os.getpid()} on {platform.node()}")
            yield
        finally:
            lock.release()

    # --- what is kept, and for how long -----------------------------------------------------------------------------

    @contextmanager
    def run(self, keys: Collection[str]) -> Iterator[None]:
        """Keep these steps, and all that is filled, from eviction while the block lasts; then `gc`."""
        path = self.root / "runs" / f"{uuid.uuid4().hex}.json"
        lock = filelock.FileLock(path.with_suffix(".lock"), mode=0o600)
        with durable.translating(path):
            lock.acquire()
            self._write_pins(path, set(keys))
        try:
            yield
        finally:
            self._pins = None
            with suppress(OSError):
                path.unlink(missing_ok=True)
                Path(lock.lock_file).unlink(missing_ok=True)
            lock.release()
        self.gc()

    def _write_pins(self, path: Path, keys: set[str]) -> None:
        with self._lock("gc"):
            data = codec.dump(_Pins(keys=tuple(sorted(keys))), self.root)
            durable.write_whole(path, data, aside=self.root / "tmp" / "gc")
        self._pins = path, keys

    def gc(self) -> tuple[str, ...]:
        """Evict what was used least recently until the store is within its limit, and sweep up after dead builds.

        Steps of builds that are alive stay, even where the limit is then exceeded. Returns the keys evicted. A failure to
        tidy is an event and no error.
        """
        evicted: list[str] = []
        self._attempt("the cache is not tidied", lambda: evicted.extend(self._evict_oldest()))
        self._attempt("the cache is not tidied", self._sweep)
        return tuple(evicted)

    def _evict_oldest(self) -> list[str]:
        with self._lock("gc"):  # no build may pin a step between the look at the pins and the eviction
            pinned = self._pinned()
            quarantined = _by_last_use(self.root / "quarantine")
            steps = _by_last_use(self.root / "steps")
            excess = sum(size for _, size in quarantined + steps) - self.limit_bytes
            for folder, size in quarantined:
                if excess > 0:
                    durable.move(folder, self.root / "tmp" / f"evicted.{folder.name}")
                    excess -= size
            evicted = []
            for folder, size in steps:
                if excess > 0 and folder.name not in pinned:
                    self._evict(folder.name)
                    evicted.append(folder.name)
                    excess -= size
            return evicted

    def _pinned(self) -> set[str]:
        """Keys that living builds use; what dead ones left is removed."""
        keys: set[str] = set()
        for path in sorted((self.root / "runs").glob("*.lock")):
            lock = filelock.FileLock(path, mode=0o600)
            try:
                lock.acquire(timeout=0)
            except filelock.Timeout:
                with suppress(FileNotFoundError):  # it is just ending
                    keys.update(codec.load(path.with_suffix(".json").read_bytes(), _Pins, self.root).keys)
                continue
            path.with_suffix(".json").unlink(missing_ok=True)
            path.unlink(missing_ok=True)
            lock.release()
        return keys

    def _sweep(self) -> None:
        for folder in sorted((self.root / "tmp").iterdir()):
            if folder.name.startswith("evicted."):
                durable.remove_tree(folder)
                continue
            with suppress(filelock.Timeout), self._lock(folder.name).acquire(timeout=0):
                durable.remove_tree(folder)
        logs = sorted((self.root / "logs").iterdir(), key=lambda path: path.stat().st_mtime)
        for path in logs[:-_LOGS_KEPT]:
            path.unlink(missing_ok=True)

    def _attempt(self, otherwise: str, tidy: Callable[[], object]) -> None:
        """Do what a finished build does not depend on."""
        try:
            tidy()
        except (OSError, ValueError) as exc:
            self.events.append(f"{self.root}: {otherwise}: {exc}.")


def _damage(folder: Path, key: str) -> str | None:
    """What is wrong with an entry, in words; None where it is byte for byte what was written."""
    try:
        if folder.is_symlink():
            return "found a symbolic link; a folder was expected"
        tree = durable.list_tree(folder)
        if tree.irregular:
            name, kind = next(iter(sorted(tree.irregular.items())))
            return f"{name} is {kind}; a file was expected"
        if ENTRY not in tree.files:
            return f"{ENTRY} is missing"
        written = (folder / ENTRY).read_bytes()
        try:
            entry = codec.load(written, _Entry, folder)
        except ValueError:
            return f"{ENTRY} is damaged"
        if codec.dump(entry, folder) != written:
            return f"{ENTRY} is damaged"
        if entry.schema != SCHEMA:
            return f"{ENTRY} has schema {entry.schema}; {SCHEMA} was expected"
        if entry.key != key:
            return f"it holds step {entry.key}"
        found = dict(tree.files)
        del found[ENTRY]
        for name in sorted(found.keys() | entry.files.keys()):
            if name not in entry.files:
                return f"{name} was not written by the step"
            if name not in found:
                return f"{name} is missing"
            if found[name] != entry.files[name].size:
                return f"{name} has {found[name]} bytes; {entry.files[name].size} were written"
        if tree.folders != set(entry.folders):
            return "its folders are not those that were written"
        for name, record in entry.files.items():
            if durable.hash_file(folder / name) != record:
                return f"{name} is not what was written"
    except OSError as exc:
        return f"it cannot be read: {exc.strerror or exc}"
    return None


def _by_last_use(parent: Path) -> list[tuple[Path, int]]:
    """Folders with their sizes in bytes, the one used longest ago first."""
    found = []
    for folder in parent.iterdir():
        with suppress(FileNotFoundError):
            size = sum(durable.list_tree(folder).files.values()) if folder.is_dir() and not folder.is_symlink() else 0
            found.append((folder.lstat().st_mtime_ns, folder, size))
    return [(folder, size) for _, folder, size in sorted(found)]


def _why_not_writable(root: Path) -> str | None:
    """Why the store at ``root`` can only be read, in words; None where it can be written."""
    try:
        for name in _FOLDERS:
            durable.make_private_folder(root / name)
            if not os.access(root / name, os.R_OK | os.W_OK | os.X_OK):
                read_only = os.statvfs(root / name).f_flag & os.ST_RDONLY
                return "the file system is read-only" if read_only else "permission denied"
    except OSError as exc:
        if exc.errno == errno.EROFS:
            return "the file system is read-only"
        if isinstance(exc, PermissionError):
            return "permission denied"
        raise from_os_error(exc, root) from exc
    return None


def _refuse_strangers(root: Path) -> None:
    """What is read back was hashed by whoever wrote it, so nobody else may have."""
    for folder in (root, *(root / name for name in _FOLDERS)):
        try:
            found = folder.lstat()
        except OSError:
            continue
        if found.st_uid not in (0, os.geteuid()):
            raise ArtifactError(
                f"{folder}: belongs to user {found.st_uid}; a cache of your own was expected. "
                f"Set {CACHE_VARIABLE} to a folder that only you may write to."
            )
        open_to_all = found.st_mode & stat.S_IWOTH and not found.st_mode & stat.S_ISVTX
        if open_to_all or not stat.S_ISDIR(found.st_mode):
            what = "everybody may write to it" if open_to_all else "it is not a folder"
            raise ArtifactError(
                f"{folder}: {what}; a folder that only you may write to was expected. "
                f"Change its mode, or set {CACHE_VARIABLE} to another."
            )


def _limit_bytes() -> int:
    text = os.environ.get(LIMIT_VARIABLE, "")
    try:
        gib = float(text) if text else DEFAULT_LIMIT_GIB
        if not 0 <= gib < 1 << 30:
            raise ValueError(text)
    except ValueError as exc:
        raise RecipeError(f"{LIMIT_VARIABLE}: found '{text}'; a number of GiB was expected. Set one, e.g. 20.") from exc
    return int(gib * (1 << 30))


def _read_memo(path: Path) -> tuple[bytes, MutableMapping[str, Any]]:
    """The memo as bytes and as values; both empty where it is missing or damaged."""
    try:
        checksum, _, data = path.read_bytes().partition(b"\n")
        if hashlib.sha256(data).hexdigest().encode() == checksum:
            return data, codec.load(data, dict[str, Any], path.parent)
    except (OSError, ValueError):
        pass
    return b"", {}


def size_bytes(root: Path) -> int:
    """What the steps below ``root`` take on the disk."""
    return sum(size for _, size in _by_last_use(root / "steps"))

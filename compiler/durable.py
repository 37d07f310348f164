"""Files that are whole or absent: the few ways in which the store and the artifact change what is on disk.

Every change that must survive a killed process or a full disk goes through a function here, so that the crash tests can
interrupt each one. The order is always: write aside, fsync the files, fsync the folders, rename, fsync the parent.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import os
import shutil
import stat
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from compiler.errors import from_os_error

_CHUNK = 1 << 20
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


@dataclass(frozen=True, kw_only=True)
class Record:
    """What a file was when it was written."""

    sha256: str
    size: int


@dataclass(frozen=True, kw_only=True)
class Tree:
    """Everything below a folder, by path relative to it with ``/`` between the parts."""

    files: Mapping[str, int]
    """Sizes in bytes of ordinary files."""
    folders: frozenset[str]
    irregular: Mapping[str, str]
    """What is neither a folder nor a file with exactly one name, and what it is: ``a symbolic link``, ..."""


def list_tree(folder: Path) -> Tree:
    """Look at every entry below ``folder``, hidden ones included, following no link."""
    files: dict[str, int] = {}
    folders: set[str] = set()
    irregular: dict[str, str] = {}
    pending = [""]
    while pending:
        prefix = pending.pop()
        with os.scandir(folder / prefix) as entries:
            for entry in entries:
                name = prefix + entry.name
                found = entry.stat(follow_symlinks=False)
                if stat.S_ISDIR(found.st_mode):
                    folders.add(name)
                    pending.append(name + "/")
                elif not stat.S_ISREG(found.st_mode):
                    irregular[name] = _KINDS.get(stat.S_IFMT(found.st_mode), "a special file")
                elif found.st_nlink != 1:
                    irregular[name] = f"a hard link (the file has {found.st_nlink} names)"
                else:
                    files[name] = found.st_size
    return Tree(files=files, folders=frozenset(folders), irregular=irregular)


_KINDS = {
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def hash_file(path: Path) -> Record:
    """Read a file and hash it. A link is not followed."""
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        return Record(sha256=digest.hexdigest(), size=file.tell())


def hash_of(files: Sequence[tuple[str, str]]) -> str:
    """SHA-256 of several files as one: the only file's own, or that of the lines that ``sha256sum`` prints for them.

    Args:
        files: name and SHA-256 of each, in their order.
    """
    if len(files) == 1:
        return files[0][1]
    return hashlib.sha256("".join(f"{sha256}  {name}\n" for name, sha256 in files).encode()).hexdigest()


def copy_file(source: Path, target: Path) -> Record:
    """Copy a file's bytes, hashing those that were written."""
    digest = hashlib.sha256()
    size = 0
    with source.open("rb") as reader, target.open("xb") as writer:
        while chunk := reader.read(_CHUNK):
            writer.write(chunk)
            digest.update(chunk)
            size += len(chunk)
    return Record(sha256=digest.hexdigest(), size=size)


@contextmanager
def translating(path: Path) -> Iterator[None]:
    """Turn an `OSError` met while writing below ``path`` into an `ArtifactError`."""
    try:
        yield
    except OSError as exc:
        raise from_os_error(exc, path) from exc


def make_private_folder(path: Path) -> None:
    """Make a folder, and its parents, that only its owner may enter; one that exists is left as it is."""
    for missing in reversed([folder for folder in (path, *path.parents) if not folder.exists()]):
        with suppress(FileExistsError):
            missing.mkdir(mode=0o700)


def write_whole(path: Path, data: bytes, *, aside: Path) -> None:
    """Write a private file so that a reader sees the old bytes or the new ones; ``aside`` is its name until it is whole."""
    try:
        descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(descriptor)
        aside.rename(path)
    except BaseException:
        with suppress(OSError):
            aside.unlink(missing_ok=True)
        raise
    _sync(path.parent)


def sync_tree(folder: Path, *, private: bool) -> None:
    """Force a folder and all below it to the disk; ``private`` takes it from all but its owner first."""
    tree = list_tree(folder)
    for name in tree.files:
        _sync(folder / name, 0o600 if private else None)
    for name in sorted(tree.folders, reverse=True):
        _sync(folder / name, 0o700 if private else None)
    _sync(folder)


def move(source: Path, target: Path) -> None:
    """Rename a folder to a name that is free, for good."""
    source.rename(target)
    _sync(target.parent)
    if source.parent != target.parent:
        _sync(source.parent)


def place(fresh: Path, current: Path) -> None:
    """Put the folder ``fresh`` where ``current`` is, or may be; what was there is at ``fresh`` afterwards.

    Both lie in one parent. A reader finds the old folder or the new one. Where two names cannot be exchanged there is a
    moment without either, and `restore` undoes what a kill left half-done in it.
    """
    while True:
        try:
            fresh.rename(current)
            break
        except OSError as exc:
            if exc.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        try:
            if not _exchange(fresh, current):
                _exchange_in_steps(fresh, current)
            break
        except FileNotFoundError:  # somebody removed it meanwhile
            if not fresh.exists():
                raise
    _sync(current.parent)


def restore(fresh: Path, current: Path) -> None:
    """Bring back what a `place` that died had moved out of the way, or remove it where something is in its place."""
    old = _old(fresh)
    if old.exists() and not current.exists():
        move(old, current)
    remove_tree(old)


def _exchange_in_steps(fresh: Path, current: Path) -> None:
    old = _old(fresh)
    current.rename(old)
    try:
        fresh.rename(current)
    except BaseException:
        old.rename(current)
        raise
    remove_tree(old)


def _old(fresh: Path) -> Path:
    return fresh.with_name(fresh.name + ".old")


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names in one system call; False where the system or the file system has none."""
    renameat2: Callable[..., int] | None = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if sys.platform != "linux" or renameat2 is None:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS):
        return False
    raise OSError(code, os.strerror(code), str(other))


def remove_tree(path: Path) -> None:
    """Remove a folder and all below it; one that is missing, or that somebody else removes meanwhile, is fine."""
    while path.is_symlink() or path.exists():
        try:
            if path.is_symlink() or not path.is_dir():
                path.unlink()
            else:
                shutil.rmtree(path)
        except FileNotFoundError:
            continue


def hold_folder(path: Path) -> int | None:
    """Lock a folder for the life of this process, or until the descriptor that is returned is closed.

    None where another process holds it, or where it is gone.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(descriptor), path.stat()):
            return descriptor
    except (BlockingIOError, FileNotFoundError):
        pass
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


def _sync(path: Path, mode: int | None = None) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        if mode is not None:
            os.fchmod(descriptor, mode)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

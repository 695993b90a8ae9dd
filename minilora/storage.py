"""The one way in which minilora writes a file: complete by rename, or not at all.

Write to a temporary name in the same folder, fsync, rename, fsync the folder. A crash at any moment
leaves the old file or the new one. A lock held by the kernel keeps two processes out of one folder,
and is free again the moment its holder dies. No other file of the package opens one for writing.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from .errors import LockedError, StorageError

MARKS = ("config.json", "adapter_config.json")  # of a folder that may be overwritten
BESIDE = re.compile(r".*\.(json|safetensors|md|model|jinja)|merges\.txt")  # and what may be in it
OURS = re.compile(r"\..+\.\d+\.[0-9a-f]{8}\.tmp")  # the temporary names below


class Stamp(NamedTuple):
    """What tells a file from another one that is put in its place, and from itself when it is changed."""

    device: int
    inode: int
    size: int  # in bytes
    changed: int  # nanoseconds

    @classmethod
    def of(cls, found: os.stat_result) -> Stamp:
        """The stamp of what the system says of a file."""
        return cls(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


def write_atomic(path: Path | str, data: bytes | Iterable[bytes]) -> None:
    """Make `path` hold exactly `data`, durably, or leave what was there and raise StorageError."""
    path = Path(path)
    temp = path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}.tmp")
    try:
        fd = os.open(temp, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o644)
        try:
            for piece in [data] if isinstance(data, bytes) else data:
                view = memoryview(piece)
                while view:
                    view = view[os.write(fd, view) :]
            os.fsync(fd)
        finally:
            os.close(fd)
        os.replace(temp, path)
        sync_folder(path.parent)
    except BaseException as e:
        with contextlib.suppress(OSError):
            temp.unlink()
        if isinstance(e, OSError) and not isinstance(e, StorageError):
            raise StorageError(f"{path}: not written: {e.strerror or e}") from e
        raise


def write_folder(path: Path | str, fill: Callable[[Path], None], overwrite: bool = False) -> None:
    """Make the folder `path` by filling a temporary one beside it and renaming.

    StorageError if there is something at `path`; with `overwrite` a model or adapter there goes, once the
    new one is complete and on disk. Whatever fails before, `path` is as it was.
    """
    path = Path(path)
    check_free(path, overwrite)
    replacing = path.exists()
    temp, old = (path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}.tmp") for _ in range(2))
    there = False
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temp.mkdir()
        fill(temp)
        sync_folder(temp)
        if replacing:
            os.rename(path, old)
        os.rename(temp, path)
        there = True
        sync_folder(path.parent)
    except BaseException as e:
        if there:
            os.rename(path, temp)
        if old.exists():
            os.rename(old, path)
        with contextlib.suppress(OSError):
            remove_tree(temp)
        if isinstance(e, OSError) and not isinstance(e, StorageError):
            raise StorageError(f"{path}: not written: {e.strerror or e}") from e
        raise
    try:
        remove_tree(old)
    except OSError as e:
        raise StorageError(f"{path}: is written; {old}, what was there, is not removed: {e.strerror}") from e


def make_folder(path: Path | str) -> None:
    """See to it that `path` is a folder, or StorageError."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise StorageError(f"{path}: cannot be a folder: {e.strerror or e}") from e


def check_free(path: Path | str, overwrite: bool = False) -> None:
    """StorageError if there is something at `path`, or, with `overwrite`, anything but a model or adapter."""
    path = Path(path)
    if not exists(path):
        return
    if not overwrite:
        raise StorageError(f"{path}: is there already; expected a name that is free")
    folder = path.is_dir() and not path.is_symlink() and path.name != ""
    inside = sorted(path.iterdir()) if folder else []
    strange = [child.name for child in inside if not BESIDE.fullmatch(child.name) or child.is_dir()]
    if not folder or strange or (inside and not any(child.name in MARKS for child in inside)):
        what = f"holds {strange[0]!a}" if strange else "is not one"
        raise StorageError(f"{path}: only the folder of a model or adapter is overwritten; this {what}")


def remove_tree(path: Path) -> None:
    """Delete a folder of ours and all in it, if it is there."""
    if path.is_dir() and not path.is_symlink():
        for child in path.iterdir():
            remove_tree(child)
        path.rmdir()
    else:
        path.unlink(missing_ok=True)


def sync_folder(path: Path) -> None:
    """Make renames inside the folder durable."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def exists(path: Path | str) -> bool:
    """Whether there is something at `path`; StorageError if that cannot be told."""
    with reading(path):
        try:
            os.stat(path)
        except (FileNotFoundError, NotADirectoryError):
            return False
    return True


def size_of(path: Path | str) -> int:
    """The size of a regular file in bytes; StorageError names what else it is."""
    path = Path(path)
    with reading(path):
        if path.exists() and not path.is_file():
            raise StorageError(f"{path}: is not a regular file")
        return path.stat().st_size


def read(path: Path | str, limit: int = 1 << 30) -> bytes:
    """The bytes of a regular file of at most `limit` bytes, or StorageError."""
    size = size_of(path)
    if size > limit:
        raise StorageError(f"{path}: has {size} bytes; at most {limit} are read")
    with reading(path):
        return Path(path).read_bytes()


def stamp_of(path: Path | str) -> Stamp:
    """Which regular file it is, and in what state; StorageError names what else it is."""
    size_of(path)
    with reading(path):
        return Stamp.of(os.stat(path))


def read_at(path: Path | str, start: int, count: int, stamp: Stamp | None = None) -> bytes:
    """`count` bytes of a file from `start` on; StorageError if it is not as it was by the `stamp`."""
    with reading(path), open(path, "rb", buffering=0) as file:
        file.seek(start)
        data = file.read(count)
        while len(data) < count:  # one read gives at most 2 GiB
            more = file.read(count - len(data))
            if not more:
                raise StorageError(f"{path}: ends at byte {start + len(data)}; it has changed meanwhile")
            data += more
        if stamp and stamp != Stamp.of(
            os.fstat(file.fileno())
        ):  # after reading: it may have changed on the way
            raise StorageError(f"{path}: has been changed or replaced since it was opened; open it again")
        return data


@contextlib.contextmanager
def reading(path: Path | str) -> Iterator[None]:
    """An error of the system, inside, is a StorageError that names the file."""
    try:
        yield
    except OSError as e:
        if isinstance(e, StorageError):
            raise
        raise StorageError(f"{path}: cannot be read: {e.strerror or e}") from e
    except ValueError as e:  # a NUL in the name
        raise StorageError(f"{str(path)!a}: cannot be read: {e}") from e


@contextlib.contextmanager
def locked(folder: Path | str) -> Iterator[None]:
    """Hold `folder` (made if missing) for this process; LockedError if another one holds it."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        fd = os.open(folder / ".lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o644)
    except OSError as e:
        raise StorageError(f"{folder}: cannot be used: {e.strerror or e}") from e
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(fd, 200).decode("ascii", "replace").strip() or "another process"
            raise LockedError(
                f"{folder}: is in use by {holder}; wait for it, or use --out with another folder"
            ) from None
        os.ftruncate(fd, 0)
        os.write(fd, f"process {os.getpid()} on {os.uname().nodename}".encode())
        for leftover in folder.glob(".*.tmp"):  # of a process of ours that died
            if OURS.fullmatch(leftover.name):
                remove_tree(leftover)
        yield
    finally:
        os.close(fd)

"""The one way in which minilora reads and writes files. Three rules, each in one place.

**Whole or not at all.** A file is written to a temporary name in the same folder, synced and renamed; a
folder is filled beside its place and exchanged with what was there in one step of the system. Where there
is no such step, what a crash between two renames leaves is found and put back by the next start. The one
exception is a file of lines that each carry a digest: a line may be appended (`append`).

**No link is followed.** A file in a folder is a regular file, and its name is no symbolic link (`opened`).
What is written or locked has no second name, either. Only the path that the user gave may be a link:
whoever takes a path from him calls `named`.

**What is held is locked** by the kernel, folders that are in use and temporary names alike, and a lock is
free the moment its holder dies. So what a dead process left can be told from what is being made, whatever
became of its process id, and the next write to the same name clears it (`clear`). Where a system or a file
system has no locks, it stays.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from ..errors import LockedError, MiniloraError, StorageError

MARKS = ("config.json", "adapter_config.json")  # of a folder that may be overwritten
BESIDE = re.compile(r".*\.(json|safetensors|md|model|jinja)|merges\.txt")  # and what may be in it
OURS = re.compile(r"\.(?P<name>.+)\.\d+\.[0-9a-f]{8}\.(?P<kind>tmp|old)")  # the names that `temporary` makes
BLOB = re.compile(r"(?P<up>(?:\.\./){2,9})blobs/(?P<hash>[0-9A-Za-z_-]{1,255})")
EXCHANGE, AT_FDCWD = 2, -100  # Linux's renameat2


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


def flags(*names: str) -> int:
    """Flags of `os.open` together, as far as the system has them."""
    return sum(getattr(os, name, 0) for name in names)


NOFOLLOW = flags("O_NOFOLLOW")
SAFE = NOFOLLOW | flags("O_CLOEXEC", "O_NONBLOCK")  # a FIFO must not hold us up, either
FOLDER = flags("O_RDONLY", "O_DIRECTORY", "O_CLOEXEC")


def named(path: Path | str) -> Path:
    """A path that the user gave: if it is a link, the file or folder that it means, or StorageError."""
    with named_errors(path):
        if not os.path.islink(path):
            return Path(path)
        kind = os.stat(path).st_mode
    if not stat.S_ISREG(kind) and not stat.S_ISDIR(kind):
        raise StorageError(f"{path}: is a link to what is not a regular file")
    return Path(os.path.realpath(path))


# ---- reading


@contextlib.contextmanager
def opened(path: Path | str) -> Iterator[int]:
    """A descriptor of the regular file at `path`; StorageError says what else is there.

    The last step of the path is no link, but for those of the hub's cache (`blob`). Other names of the same
    file are allowed where one only reads: pip and uv put files into place so.
    """
    with named_errors(path):
        try:
            fd = os.open(path, os.O_RDONLY | SAFE)
        except OSError:
            if not os.path.islink(path):
                raise
            fd = blob(Path(path))
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise StorageError(f"{path}: is not a regular file")
        yield fd
    finally:
        os.close(fd)


def blob(path: Path) -> int:
    """Open what a link of the hub's own cache means, the only kind that is followed.

    `snapshots/COMMIT/FILE` is there a link to `../../blobs/HASH` (one `../` more for each folder between):
    so `snapshots` and `blobs` lie side by side, and neither they nor the blob are links.
    """
    with contextlib.ExitStack() as stack:
        here = os.open(path.parent, FOLDER)
        stack.callback(os.close, here)
        link = BLOB.fullmatch(os.readlink(path.name, dir_fd=here))
        try:
            above = [os.stat(up, dir_fd=here, follow_symlinks=False)
                     for up in (link["up"][3:], f"{link['up']}snapshots")] if link else []  # fmt: skip
        except OSError:
            above = []
        if not link or not above or not os.path.samestat(*above):
            raise StorageError(f"{path}: is a link, and none is followed out of a folder; expected a file")
        store = os.open(f"{link['up']}blobs", FOLDER | NOFOLLOW, dir_fd=here)
        stack.callback(os.close, store)
        return os.open(link["hash"], os.O_RDONLY | SAFE, dir_fd=store)


def exists(path: Path | str) -> bool:
    """Whether there is something at `path`, be it a link to nowhere; StorageError if that cannot be told."""
    with named_errors(path):
        try:
            os.lstat(path)
        except (FileNotFoundError, NotADirectoryError):
            return False
    return True


def size_of(path: Path | str) -> int:
    """The size of a regular file in bytes; StorageError names what else it is."""
    with opened(path) as fd:
        return os.fstat(fd).st_size


def read(path: Path | str, limit: int = 1 << 30) -> bytes:
    """The bytes of a regular file of at most `limit` bytes, or StorageError."""
    with opened(path) as fd:
        if (size := os.fstat(fd).st_size) > limit:
            raise StorageError(f"{path}: has {size} bytes; at most {limit} are read")
        return part(path, fd, 0, size)


def listed(folder: Path, endings: Collection[str]) -> list[str]:
    """The regular files below a folder by relative path, in code-point order; no hidden ones, no links."""
    paths = (path for path in folder.rglob("*") if path.suffix.lower() in endings)
    plain = (path for path in paths if os.path.isfile(path) and not os.path.islink(path))
    names = sorted(path.relative_to(folder).as_posix() for path in plain)
    return [name for name in names if "/." not in f"/{name}"]


def stamp_of(path: Path | str) -> Stamp:
    """Which regular file it is, and in what state; StorageError names what else it is."""
    with opened(path) as fd:
        return Stamp.of(os.fstat(fd))


def read_at(path: Path | str, start: int, count: int, stamp: Stamp | None = None) -> bytes:
    """`count` bytes of a file from `start` on; StorageError if it is not as it was by the `stamp`."""
    with opened(path) as fd:
        data = part(path, fd, start, count)
        if stamp and stamp != Stamp.of(os.fstat(fd)):  # after reading: it may have changed on the way
            raise StorageError(f"{path}: has been changed or replaced since it was opened; open it again")
        return data


def part(path: Path | str, fd: int, start: int, count: int) -> bytes:
    """`count` bytes of an open file from `start` on; one call of the system gives at most 2 GiB."""
    with named_errors(path):
        os.lseek(fd, start, os.SEEK_SET)
        data = os.read(fd, count)
        while len(data) < count:
            more = os.read(fd, count - len(data))
            if not more:
                raise StorageError(f"{path}: ends at byte {start + len(data)}; it has changed meanwhile")
            data += more
        return data


@contextlib.contextmanager
def named_errors(path: Path | str, what: str = "cannot be read") -> Iterator[None]:
    """An error of the system, inside, is a StorageError that names the file."""
    try:
        yield
    except MiniloraError:
        raise
    except OSError as e:
        raise StorageError(f"{path}: {what}: {e.strerror or e}") from e
    except ValueError as e:
        if "\0" not in str(path):
            raise
        raise StorageError(f"{str(path)!a}: {what}: {e}") from e


# ---- writing


def write_atomic(path: Path | str, data: bytes | Iterable[bytes]) -> None:
    """Make `path` hold exactly `data`, durably, or leave what was there and raise StorageError."""
    path = Path(path)

    def create(temp: Path) -> int:
        return os.open(temp, os.O_CREAT | os.O_EXCL | os.O_WRONLY | SAFE, 0o644)

    with named_errors(path, "not written"):
        if exists(path) and not plain(os.lstat(path)):
            raise StorageError(f"{path}: is no regular file with one name; it is not replaced")
        clear(path)
        with temporary(path, create) as (temp, fd):
            for piece in [data] if isinstance(data, bytes) else data:
                write_all(fd, piece)
            os.fsync(fd)
            os.replace(temp, path)
            sync_folder(path.parent)


def append(path: Path | str, data: bytes) -> None:
    """Add `data` to the end of the file `path`, durably, or leave it as it was and raise StorageError.

    A file that is missing is made. A process that is killed here may leave a part of `data`, which is for
    the reader to tell from the whole.
    """
    path = Path(path)
    if not exists(path):
        write_atomic(path, data)
        return
    strange = StorageError(f"{path}: is no regular file with one name; nothing is added to it")
    with named_errors(path, "not written"):
        if not plain(os.lstat(path)):
            raise strange
        fd = os.open(path, os.O_WRONLY | os.O_APPEND | SAFE)
        try:
            if not plain(before := os.fstat(fd)):  # it has been replaced since
                raise strange
            try:
                write_all(fd, data)
                os.fsync(fd)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.ftruncate(fd, before.st_size)
                raise
        finally:
            os.close(fd)


def write_all(fd: int, data: bytes) -> None:
    """Write all of `data`; one call of the system may write less."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def write_folder(path: Path | str, fill: Callable[[Path], None], overwrite: bool = False) -> None:
    """Make the folder `path` by filling a temporary one beside it and putting that in its place.

    StorageError if there is something at `path`; with `overwrite` a model or adapter there goes, once the
    new one is complete and on disk. Whatever fails before, `path` is as it was.
    """
    path = Path(path)
    check_free(path, overwrite)

    def create(temp: Path) -> int:
        temp.mkdir()
        return os.open(temp, FOLDER | NOFOLLOW)

    with named_errors(path, "not written"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary(path, create) as (temp, fd):
            fill(temp)
            os.fsync(fd)
            replacing = overwrite and exists(path)
            swap(temp, path) if replacing else os.rename(temp, path)
            try:
                sync_folder(path.parent)
            except BaseException:
                swap(temp, path) if replacing else os.rename(path, temp)
                raise
            try:
                remove_tree(temp)
            except OSError as e:
                said = f"{path}: is written; {temp}, what was there, is not removed: {e.strerror}"
                raise StorageError(said) from e


@contextlib.contextmanager
def temporary(path: Path, create: Callable[[Path], int]) -> Iterator[tuple[Path, int]]:
    """A new name beside `path` and its descriptor, locked while that is open; what is left there goes."""
    temp, fd = path, -1
    try:
        while fd < 0:
            temp = beside(path)
            fd = create(temp)
            if not claimed(fd, temp):  # another process took it for left behind, and clears it
                os.close(fd)
                fd = -1
        yield temp, fd
    finally:
        if fd >= 0:
            os.close(fd)
        if temp != path:
            with contextlib.suppress(OSError):
                remove_tree(temp)


def beside(path: Path) -> Path:
    """A temporary name beside `path` that nobody else uses."""
    return path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}.tmp")


def claimed(fd: int, temp: Path) -> bool:
    """Lock what was just made; False if it is another process's or gone. Without locks it is ours."""
    try:
        lock(fd)
        return os.path.samestat(os.fstat(fd), os.lstat(temp))
    except (BlockingIOError, FileNotFoundError):
        return False
    except OSError:
        return True


def swap(temp: Path, path: Path) -> None:
    """Put `temp` in the place of `path`, and what was there at `temp`: at no moment is there nothing.

    Where the system cannot do it in one step, what was there has the name `.old` for a moment, under a
    lock; if the process dies then, `clear` puts it back.
    """
    if exchanged(temp, path):
        return
    old = temp.with_suffix(".old")
    fd = os.open(path, FOLDER | NOFOLLOW)
    try:
        with contextlib.suppress(OSError):
            lock(fd)
        try:
            os.rename(path, old)
            os.rename(temp, path)
            os.rename(old, temp)
        except BaseException:
            if exists(old):
                if exists(path):
                    os.rename(path, temp)
                os.rename(old, path)
            raise
    finally:
        os.close(fd)


def exchanged(a: Path, b: Path) -> bool:
    """Exchange two names in one step; False where system or file system has none."""
    try:
        import ctypes

        call = ctypes.CDLL(None, use_errno=True).renameat2
    except (ImportError, OSError, AttributeError, TypeError):
        return False
    if call(AT_FDCWD, os.fsencode(a), AT_FDCWD, os.fsencode(b), EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM):  # the last: old containers
        return False
    raise OSError(number, os.strerror(number))


def make_folder(path: Path | str) -> None:
    """See to it that `path` is a folder, or StorageError."""
    with named_errors(path, "cannot be a folder"):
        Path(path).mkdir(parents=True, exist_ok=True)


def check_free(path: Path | str, overwrite: bool = False) -> None:
    """StorageError if there is something at `path`, or, with `overwrite`, anything but a model or adapter.

    Before that, what dead processes left beside it is cleared.
    """
    path = Path(path)
    clear(path)
    if not exists(path):
        return
    if not overwrite:
        raise StorageError(f"{path}: is there already; expected a name that is free")
    folder = path.is_dir() and not path.is_symlink() and path.name != ""
    with named_errors(path):
        inside = sorted(path.iterdir()) if folder else []
    strange = [child.name for child in inside if not BESIDE.fullmatch(child.name) or child.is_dir()]
    if not folder or strange or (inside and not any(child.name in MARKS for child in inside)):
        what = f"holds {strange[0]!a}" if strange else "is not one"
        raise StorageError(f"{path}: only the folder of a model or adapter is overwritten; this {what}")


def plain(found: os.stat_result) -> bool:
    """Whether it is a regular file with one name."""
    return stat.S_ISREG(found.st_mode) and found.st_nlink <= 1


# ---- what dead processes left


def clear(path: Path) -> None:
    """Remove what dead processes left in the making of `path`, and put back what one had moved away."""
    if path.name:
        for left in leftovers(path.parent):
            match = OURS.fullmatch(left.name)
            if match and match["name"] == path.name:
                clear_one(left, path if match["kind"] == "old" else None)


def leftovers(folder: Path) -> list[Path]:
    """The temporary names in a folder; of one overwriting `.old` before `.tmp`."""
    with named_errors(folder):
        try:
            return sorted(folder / name for name in os.listdir(folder) if OURS.fullmatch(name))
        except (FileNotFoundError, NotADirectoryError):
            return []


def clear_one(left: Path, home: Path | None = None) -> None:
    """Remove a temporary name if nobody holds it; if its `home` is empty, put it there instead."""
    try:
        fd = os.open(left, os.O_RDONLY | SAFE)
    except OSError:  # it is gone, a link, or somebody else's
        return
    try:
        if not lock(fd):
            return
        if home and not exists(home):
            os.rename(left, home)
            print(f"minilora: {home}: is put back; a process died while replacing it", file=sys.stderr)
        else:
            remove_tree(left)
    except OSError:  # it is held, or there are no locks
        return
    finally:
        os.close(fd)


def remove_tree(path: Path) -> None:
    """Delete a folder of ours and all in it, if it is there."""
    if path.is_dir() and not path.is_symlink():
        with contextlib.suppress(FileNotFoundError):  # another process does it, too
            for child in path.iterdir():
                remove_tree(child)
            path.rmdir()
    else:
        path.unlink(missing_ok=True)


def discard(path: Path, home: Path) -> None:
    """Delete a folder under a temporary name of `home`, so that a crash on the way leaves nothing of it."""
    with named_errors(path, "not written"):
        temp = beside(home)
        try:
            os.rename(path, temp)
            remove_tree(temp)
        except BaseException:
            with contextlib.suppress(OSError):
                remove_tree(temp)
            raise


def sync_folder(path: Path) -> None:
    """Make renames inside the folder durable."""
    fd = os.open(path, FOLDER)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


# ---- one process at a time


def lock(fd: int) -> bool:
    """Lock an open file for this process, until it is closed; False in a browser, which has one process.

    BlockingIOError if another process holds it, OSError if its file system has no locks.
    """
    try:
        import fcntl
    except ImportError:
        return False
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return True


@contextlib.contextmanager
def locked(folder: Path | str) -> Iterator[None]:
    """Hold `folder` (made if missing, no link) for this process; LockedError if another one holds it.

    In a browser, which has no locks, nobody else can be at it.
    """
    folder = Path(folder)
    with named_errors(folder, "cannot be used"):
        folder.mkdir(parents=True, exist_ok=True)
        here = os.open(folder, FOLDER | NOFOLLOW)
        try:
            with named_errors(folder / ".lock", "cannot be used"):
                fd = os.open(".lock", os.O_CREAT | os.O_RDWR | SAFE, 0o644, dir_fd=here)
        finally:
            os.close(here)
    try:
        if not plain(os.fstat(fd)):
            raise StorageError(f"{folder / '.lock'}: is no regular file with one name; it is not used")
        with named_errors(folder, "cannot be used"):
            try:
                lock(fd)
                if not os.path.samestat(os.fstat(fd), os.lstat(folder / ".lock")):
                    raise FileNotFoundError  # its last holder removed it
            except (BlockingIOError, FileNotFoundError):
                holder = re.sub(r"[^ -~]", "?", os.read(fd, 200).decode("latin-1")) or "another process"
                raise LockedError(
                    f"{folder}: is in use by {holder}; wait for it, or use --out with another folder"
                ) from None
        with contextlib.suppress(OSError):  # a full disk: the lock is held, whatever it says
            os.ftruncate(fd, 0)
            os.write(fd, f"process {os.getpid()} on {os.uname().nodename}".encode())
        for left in leftovers(folder):
            clear_one(left)
        yield
    finally:
        os.close(fd)

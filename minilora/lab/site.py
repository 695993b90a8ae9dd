"""The package and its page -> a folder of static files: `minilora lab`.

Pyodide comes from its public CDN, or from a folder, whose files are copied into the page's own. The page's
policy lets it load from itself and from there, and from nowhere else.
"""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from shlex import quote
from typing import Any
from urllib.parse import urlsplit

from .. import __version__
from ..digests import of_bytes
from ..errors import ConfigError, FormatError, StorageError
from ..formats.archives import canonical
from ..formats.atomic import check_free, exists, read, write_atomic, write_folder
from ..formats.huggingface import load, read_json
from ..table import counted, report
from ..tree import size

PYODIDE = "https://cdn.jsdelivr.net/pyodide/v0.27.7/full/"  # the version that the tests run
CORE = ("pyodide.mjs", "pyodide.asm.js", "pyodide.asm.wasm", "python_stdlib.zip", "pyodide-lock.json")
LOCK = 1 << 24  # bytes of the lock file, at most
PAGE = Path(__file__).with_name("page")
PACKAGE = Path(__file__).parents[1]
KINDS = {".py", ".json", ".safetensors", ".txt", ".md"}  # files of the package that it needs to run
ARCHIVE, COPIED = "minilora.zip", "pyodide/"


@report
@dataclass(frozen=True)
class Site:
    """What `write` wrote; prints how to open it."""

    out: str
    files: int
    bytes: int
    pyodide: str

    def data(self) -> dict[str, Any]:
        return asdict(self)

    def parts(self) -> list[str]:
        where = "with Pyodide" if self.pyodide == COPIED else f"Pyodide comes from {self.pyodide}"
        return [
            f"{self.out}: {counted(self.files, 'file', 'files')}, {self.bytes / 1e6:.1f} MB, {where}",
            f"to open it: python3 -m http.server --bind 127.0.0.1 -d {quote(self.out)} 8000",
            "and then http://127.0.0.1:8000/",
        ]


def write(out: Path | str, pyodide: str = PYODIDE) -> Site:
    """Write the lab as the new folder `out`, whole or not at all.

    `pyodide` is an address, which ends with a slash, or a folder with the files of CORE and NumPy's wheel.
    ConfigError for another address, StorageError if `out` exists or a file is missing, FormatError for a
    wheel whose digest is not the lock file's.
    """
    check_free(out)
    copied = {} if address(pyodide) else {COPIED + path.name: read(path) for path in distribution(pyodide)}
    where = COPIED if copied else pyodide
    files = {path.name: read(path) for path in sorted(PAGE.iterdir())}
    files |= {"index.html": index(where), ARCHIVE: packed(package()), **copied}

    def fill(folder: Path) -> None:
        for name, data in files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            write_atomic(folder / name, data)

    write_folder(out, fill)
    return Site(str(out), len(files), sum(map(len, files.values())), where)


def address(pyodide: str) -> bool:
    """Whether it is an address and not a folder; ConfigError for one that a page cannot load from."""
    if not re.match(r"[a-z]+://", pyodide):
        return False
    parts = urlsplit(pyodide)
    if parts.scheme != "https" or not re.fullmatch(r"[\w.-]+(:\d+)?", parts.netloc):
        raise ConfigError(f"pyodide is {pyodide!r}; expected a folder, or an address such as {PYODIDE}")
    if not re.fullmatch(r"/([\w.~-]+/)*", parts.path) or parts.query or parts.fragment:
        raise ConfigError(f"pyodide is {pyodide!r}; expected the address of a folder, such as {PYODIDE}")
    return True


def distribution(
    pyodide: str, core: Sequence[str] = CORE, packages: Sequence[str] = ("numpy",)
) -> list[Path]:
    """The files of Pyodide in a folder that are needed: its core, and packages with all that they need."""
    folder = Path(pyodide)
    if missing := [name for name in core if not exists(folder / name)]:
        raise StorageError(
            f"{folder / missing[0]}: is missing; expected a folder with Pyodide, or an address"
        )
    wheels = locked(folder / "pyodide-lock.json", packages)
    for name, digest in wheels.items():
        if not exists(folder / name):
            raise StorageError(f"{folder / name}: is missing; expected the file that pyodide-lock.json names")
        if of_bytes(read(folder / name)) != digest:
            raise FormatError(f"{folder / name}: its sha256 is not the one in pyodide-lock.json")
    return [folder / name for name in (*core, *wheels)]


def locked(lock: Path, packages: Sequence[str]) -> dict[str, str]:
    """File name -> sha256 of these packages and of all that they need, by Pyodide's lock file."""
    listed = read_json(lock, LOCK).get("packages")
    known = {canonical(name): about for name, about in listed.items()} if isinstance(listed, dict) else {}
    found, wanted = dict[str, dict[str, Any]](), [*packages]
    while wanted:
        if (name := canonical(wanted.pop())) not in found:
            about = known.get(name)
            if not isinstance(about, dict) or not {"file_name", "sha256", "depends"} <= about.keys():
                raise FormatError(f"{lock}: does not say which file {name} is and what it needs")
            found[name] = about
            wanted += map(str, about["depends"])
    return {Path(str(about["file_name"])).name: str(about["sha256"]) for about in found.values()}


def index(pyodide: str) -> bytes:
    """The page, which knows where Pyodide is."""
    parts = urlsplit(pyodide)
    origin = f" {parts.scheme}://{parts.netloc}" if parts.netloc else ""
    known = {"pyodide": pyodide, "origin": origin, "version": __version__, "parameters": f"{size(load()):,}"}
    return re.sub(r"\{(\w+)\}", lambda match: known[match[1]], read(PAGE / "index.html").decode()).encode()


def package() -> dict[str, bytes]:
    """The files of the package that it needs to run in a browser."""
    paths = [path for path in sorted(PACKAGE.rglob("*")) if path.suffix in KINDS and path.parent != PAGE]
    return {path.relative_to(PACKAGE.parent).as_posix(): read(path) for path in paths}


def packed(files: Mapping[str, bytes]) -> bytes:
    """Files as a zip archive; the same files give the same bytes."""
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(zipfile.ZipInfo(name), data, zipfile.ZIP_DEFLATED)
    return made.getvalue()

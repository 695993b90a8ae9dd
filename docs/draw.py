"""Draw the committed figures of the experiments again, from the committed rows; nothing is run.

python docs/draw.py [NAME ...]

Without a name, those of all experiments. `minilora figures --rows figures/rows.jsonl` does it for the sweep,
and `python benchmarks/NAME.py --draw` for a benchmark.
"""

import sys
from pathlib import Path

from minilora.experiments.questions import MODULES, measured

FIGURES = Path(__file__).resolve().parents[1] / "figures"

if __name__ == "__main__":
    for name in sys.argv[1:] or MODULES:
        rows, reads = measured(name, FIGURES)
        for figure, picture in reads.pictures(rows).items():
            picture.save(FIGURES / name, figure)

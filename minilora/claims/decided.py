"""The claims, decided by rows: a folder of them, as they are committed -> an entry of the ledger for each."""

import json
from pathlib import Path

from ..experiments import rank_sweep
from ..experiments.questions import measured
from ..formats.atomic import read
from . import beyond, choices, cost, dimension, full, ranks, rivals, size, starts, use
from .claim import Entry, Rows

SUBJECTS = {
    "Ranks and directions": ranks.CLAIMS,
    "The size of the base": size.CLAIMS,
    "Intrinsic dimension": dimension.CLAIMS,
    "Where and how to adapt": choices.CLAIMS,
    "Where training starts": starts.CLAIMS,
    "Beside full fine-tuning": full.CLAIMS,
    "LoRA's rivals": rivals.CLAIMS,
    "Beyond language": beyond.CLAIMS,
    "Merging, adding, serving": use.CLAIMS,
    "Time, memory, parameters": cost.CLAIMS,
}
CLAIMS = tuple(claim for some in SUBJECTS.values() for claim in some)


def rows_of(root: Path, name: str) -> Rows:
    """The rows of one file; StorageError if it is not there, FormatError for what nothing writes."""
    path = root / name
    if name == ranks.SWEEP:
        return rank_sweep.read_rows(path)
    if path.suffix == ".jsonl":  # of the experiment that gives its folder the name
        return measured(path.parent.name, path.parents[1])[0]
    found = json.loads(read(path))
    if isinstance(found, list):
        return found
    return found.get("rows", [found])  # a benchmark of several parts is one row


def entries(root: Path) -> tuple[Entry, ...]:
    """Each claim with what the rows in `root` say of it; raises as `rows_of`."""
    files = dict.fromkeys(claim.rows for claim in CLAIMS)
    rows = {name: rows_of(root, name) for name in files}
    made = []
    for subject, some in SUBJECTS.items():
        for c in some:
            verdict, number = c.decide(rows[c.rows])
            made.append(Entry(subject, c.statement, c.source, verdict, number, c.rule, c.rows, c.figure))
    return tuple(made)

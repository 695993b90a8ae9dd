"""The claims, decided by rows: a folder of them, as they are committed -> an entry of the ledger for each."""

import json
from collections.abc import Callable
from pathlib import Path

from ..experiments import adding_adapters, known_rank, rank_sweep, scale, subspaces, which_matrices
from ..formats.atomic import read
from . import arithmetic, choices, directions, ranks, use
from .claim import Entry, Rows

CLAIMS = (
    *ranks.CLAIMS, *directions.CLAIMS, *choices.CLAIMS, *use.CLAIMS, *arithmetic.CLAIMS,
)  # fmt: skip
READERS: dict[str, Callable[[Path], Rows]] = {  # of sealed rows; those of a benchmark are plain JSON
    ranks.SWEEP: rank_sweep.read_rows,
    ranks.PLANTED: known_rank.read_rows,
    directions.SUBSPACES: subspaces.read_rows,
    choices.WHICH: which_matrices.read_rows,
    choices.SCALES: scale.read_rows,
    use.ADDING: adding_adapters.read_rows,
}


def rows_of(root: Path, name: str) -> Rows:
    """The rows of one file; StorageError if it is not there, FormatError for what nothing writes."""
    if name in READERS:
        return READERS[name](root / name)
    found = json.loads(read(root / name))
    return found["rows"] if isinstance(found, dict) else found


def entries(root: Path) -> tuple[Entry, ...]:
    """Each claim with what the rows in `root` say of it; raises as `rows_of`."""
    files = dict.fromkeys(claim.rows for claim in CLAIMS if claim.rows)
    rows = {name: rows_of(root, name) for name in files}
    made = []
    for claim in CLAIMS:
        verdict, number = claim.decide(rows.get(claim.rows, ()))
        made.append(
            Entry(claim.statement, claim.source, verdict, number, claim.rule, claim.rows, claim.figure)
        )
    return tuple(made)

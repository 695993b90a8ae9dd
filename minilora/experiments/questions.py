"""The experiments by name, so that one command runs, draws and tells any of them.

An experiment is two modules of this folder. The first asks: `Plan`, a frozen dataclass with the defaults of
the committed rows; `QUICK`, the settings of a small grid; `run(plan, out, jobs=, dask=, progress=) -> rows`;
`FORM`, that of its rows. The second reads the rows: `tables`, `sentences` with what the tables show, and
`pictures` by file name, each with its question as its title and its answer below.
"""

from importlib import import_module
from pathlib import Path
from typing import Any

from ..errors import InputError, nearest, short
from .harness import Row, read_rows

MODULES = {  # name -> the module that asks, and the one that reads
    "known-rank": ("known_rank", "known_figures"),
    "which-matrices": ("which_matrices", "which_figures"),
    "subspaces": ("subspaces", "subspace_figures"),
    "scale": ("scale", "scale_figures"),
    "merging": ("merging", "merging_figures"),
    "forgetting": ("forgetting", "forgetting_figures"),
    "initialisation": ("initialisation", "initialisation_figures"),
    "rivals": ("rivals", "rivals_figures"),
    "cost": ("cost", "cost_figures"),
    "adding-adapters": ("adding_adapters", "adding_figures"),
    "size": ("size", "size_figures"),
    # which need an extra
    "intrinsic-dimension": ("intrinsic_dimension", "intrinsic_figures"),
    "beyond-language": ("beyond_language", "beyond_figures"),
}


def question(name: str) -> tuple[Any, Any]:
    """The two modules of an experiment; the second imports matplotlib. InputError for any other name."""
    if name not in MODULES:
        raise InputError(f"there is no experiment {short(name)}; {nearest(name, MODULES)}")
    asks, reads = (import_module(f".{module}", __package__) for module in MODULES[name])
    return asks, reads


def measured(name: str, figures: Path | str) -> tuple[list[Row], Any]:
    """The rows of an experiment in its folder of `figures`, and the module that reads them.

    StorageError for a file that is not there, FormatError for rows that the experiment does not write.
    """
    asks, reads = question(name)
    return read_rows(Path(figures, name, "rows.jsonl"), asks.FORM), reads


def picture(figure: str, figures: Path | str) -> Any:
    """The figure "NAME/picture", drawn from the rows of `measured`; InputError if there is none."""
    name, _, which = figure.partition("/")
    rows, reads = measured(name, figures)
    drawn = reads.pictures(rows)
    if which not in drawn:
        raise InputError(f"{name} has no picture {short(which)}; {nearest(which, drawn)}")
    return drawn[which]

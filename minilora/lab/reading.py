"""Panel 3: an adapter file of the visitor's -> its summary, its table, and the spectrum of every module."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from .. import spectra
from ..analysis import inspect, tables
from ..analysis.measures import Module, group
from ..table import Table, counted, plain
from .events import Event, noise_energy, numbers


def opened(path: Path | str, name: str) -> Event:
    """What an adapter of any tool holds, called `name`; errors as in `inspect`."""
    seen = inspect.inspect(path)
    whole = group(seen.modules)
    return {
        "event": "opened", "modules": [module(m) for m in seen.modules],
        "table": cells(tables.by_kind(seen.modules)), "legend": tables.LEGEND,
        "says": f"{plain(name)}: LoRA of rank {tables.span(whole)} beside "
        f"{counted(len(seen.modules), 'matrix', 'matrices')}, {seen.parameters:,} numbers. "
        f"Rank {seen.suggested_rank} for all of them would keep 99 % of ΔW.",
        "notes": [plain(note) for note in seen.notes],
    }  # fmt: skip


def module(m: Module) -> Event:
    """The spectrum of one module and its energy, beside that of noise."""
    values = np.array(m.singular_values)
    return {
        "module": plain(m.module), "values": numbers(values), "energy": numbers(spectra.energy(values)),
        "noise": noise_energy(m.shape, m.r),
        "says": f"{m.shape[0]} x {m.shape[1]}, rank {m.r}: {m.ranks.at90} directions hold 90 % of ΔW, "
        f"{m.ranks.at99} hold 99 %. In a random matrix it takes {m.noise.at90} and {m.noise.at99} (dashed).",
    }  # fmt: skip


def cells(table: Table) -> Event:
    """The head and the rows of a table, as plain text."""
    rows = [[plain(cell) for cell in row] for row in table.rows]
    return {"head": list(table.head), "rows": rows}

"""What merging does to one matrix: how large the change is, and what rounding to the dtype loses of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..errors import InputError, nearest
from ..formats.safetensors import CALLED
from ..table import Table


@dataclass(frozen=True)
class Change:
    """What merging does to one matrix, in Frobenius norms."""

    module: str
    largest: float  # max |ΔW| over the entries
    relative: float  # |ΔW| / |W|
    lost: float  # |stored(W + ΔW) - (W + ΔW)| / |ΔW|: what rounding to the stored dtype loses of ΔW


def check_dtype(dtype: str | None) -> None:
    """InputError unless this is a dtype in which a base can be written, or None for the base's own."""
    if dtype is not None and dtype not in CALLED:
        raise InputError(f"dtype is {dtype!r}; {nearest(dtype, CALLED)}")


def table_of(rows: Iterable[Change]) -> Table:
    """The changes as a table."""
    cells = [(w.module, f"{w.largest:.2e}", f"{w.relative:.2e}", f"{w.lost:.1e}") for w in rows]
    return Table(("module", "max |ΔW|", "|ΔW|/|W|", "lost"), cells)

"""A claim: a sentence of a paper or of the field, the rows that can refute it, and the rule that decides."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..experiments.harness import Row

HOLDS, FAILS = "holds", "does not hold here"
HU, OVERVIEW = "Hu et al. 2021", "said of LoRA in general"

Rows = Sequence[Row]
Verdict = tuple[str, str]  # HOLDS, FAILS or "holds when ...", and the number that decided
Decide = Callable[[Rows], Verdict]


@dataclass(frozen=True)
class Claim:
    """A sentence that rows can refute."""

    statement: str
    source: str
    rows: str  # the file, from the top of the repository
    figure: str
    decide: Decide  # its docstring is the rule

    @property
    def rule(self) -> str:
        """When it holds, in words."""
        return " ".join((self.decide.__doc__ or "").split())


@dataclass(frozen=True)
class Entry:
    """A claim and what became of it."""

    subject: str
    statement: str
    source: str
    verdict: str
    number: str
    rule: str
    rows: str
    figure: str


def from_on(found: Sequence[tuple[float, bool]]) -> float | None:
    """Of (number, whether it is so) in order, the number from which on it always is so, or None."""
    start = None
    for number, so in reversed(found):
        if not so:
            break
        start = number
    return start

"""What is said about LoRA, and what the experiments here found: a ledger of verdicts.

A claim names the rows that can refute it, and a rule that turns them into a verdict and the number that
decides. ledger.json beside this file holds what the rules gave for the committed rows, and `minilora claims`
prints it. What is true under a condition "holds when ..."; what is false of these models may be true of
others, and "does not hold here".
"""

from __future__ import annotations

import json
import textwrap
from dataclasses import asdict, dataclass
from pathlib import Path

from ..formats.atomic import read
from ..table import Table, plain, report
from .claim import FAILS, HOLDS, Entry

WIDTH = 80  # characters of a line in a terminal
LEDGER = Path(__file__).with_name("ledger.json")


def folded(text: str, indent: str) -> list[str]:
    """A text as lines of at most 80 characters, all but the first indented a little more."""
    return textwrap.wrap(
        plain(text), WIDTH, initial_indent=indent, subsequent_indent=f"{indent}  ", break_on_hyphens=False
    )  # fmt: skip


@report
@dataclass(frozen=True)
class Ledger:
    """All claims; prints each and below it the verdict, by subject."""

    entries: tuple[Entry, ...]

    def data(self) -> list[dict[str, str]]:
        return [asdict(entry) for entry in self.entries]

    def parts(self) -> list[str | Table]:
        verdicts = [entry.verdict.partition(" when ")[1] or entry.verdict for entry in self.entries]
        hold, under, fail = (verdicts.count(verdict) for verdict in (HOLDS, " when ", FAILS))
        counts = f"{hold} hold, {under} under a condition, {fail} do not here"
        lines: list[str | Table] = [f"{len(verdicts)} sentences: {counts}"]
        for subject, some in self.subjects().items():
            lines += ["", subject]
            for entry in some:
                lines += folded(f"{entry.statement} ({entry.source})", "  ")
                lines += folded(f"{entry.verdict}: {entry.number}", "    ")
        return lines

    def of(self, *figures: str) -> Ledger:
        """The claims that these figures decide, each "NAME/picture" of an experiment."""
        paths = [f"figures/{figure}.png" for figure in figures]
        return Ledger(tuple(entry for entry in self.entries if entry.figure in paths))

    def subjects(self) -> dict[str, list[Entry]]:
        """Subject -> its claims, in order."""
        found: dict[str, list[Entry]] = {}
        for entry in self.entries:
            found.setdefault(entry.subject, []).append(entry)
        return found


def claims(root: Path | str | None = None) -> Ledger:
    """The ledger as this version ships it, or decided anew by the rows in `root`, a checkout.

    StorageError for a file that is not there; FormatError or MismatchError for rows that nothing writes.
    """
    if root is None:
        return Ledger(tuple(Entry(**entry) for entry in json.loads(read(LEDGER))))
    from .decided import entries  # which imports all experiments, and matplotlib

    return Ledger(entries(Path(root)))

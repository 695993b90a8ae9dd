"""Write what the experiments found into the pages: tables and sentences, from the committed rows.

python docs/tables.py

A page has a place for each, filled anew from figures/NAME/rows.jsonl: <!-- NAME table 1 --> ... <!-- end -->,
or `sentences` for a list of what the tables show.
"""

import re
from pathlib import Path

from minilora.experiments.questions import MODULES, measured

ROOT = Path(__file__).resolve().parents[1]
PLACE = re.compile(r"(<!-- (\S+) (table (\d+)|sentences) -->\n).*?(<!-- end -->)", re.S)


def told(name: str, table: str | None) -> str:
    """One table of an experiment, counted from 1, or its sentences."""
    rows, reads = measured(name, ROOT / "figures")
    if table is None:
        return "".join(f"- {sentence}\n" for sentence in reads.sentences(rows))
    return f"{reads.tables(rows)[int(table) - 1].markdown()}\n"


def filled(page: str) -> str:
    """The page with every place filled."""
    return PLACE.sub(lambda m: f"{m[1]}\n{told(m[2], m[4])}\n{m[5]}" if m[2] in MODULES else m[0], page)


if __name__ == "__main__":
    for path in sorted((ROOT / "docs").glob("*.md")):
        text = path.read_text(encoding="utf-8")
        if (new := filled(text)) != text:
            path.write_text(new, encoding="utf-8")

"""Write the ledger of claims from the committed rows: ledger.json, docs/claims.md, the README's first lines.

python docs/claims.py
"""

import json
import re
from pathlib import Path

from minilora.claims.claim import Entry
from minilora.claims.ledger import LEDGER, Ledger, claims
from minilora.table import Table

ROOT = Path(__file__).resolve().parents[1]
PLACE = re.compile(r"(<!-- claims -->\n).*?(<!-- end -->)", re.S)
FIRST = 5  # lines of the ledger in the README
HEAD = (
    "# What is said about LoRA, and what was found here\n\n"
    "Each sentence is decided by rows that are committed here, by the rule beside it. `minilora claims` "
    "prints the verdicts; `minilora claims --root .` decides anew in a clone. The models are small: a "
    "sentence that does not hold here may hold of larger ones, and the other way around.\n"
)


def linked(entry: Entry) -> str:
    """Where to look: rows and figure."""
    return f"[rows](../{entry.rows}), [figure](../{entry.figure})"


def page(ledger: Ledger) -> str:
    """docs/claims.md."""
    parts = [HEAD]
    for subject, some in ledger.subjects().items():
        lines = [(e.statement, e.source, e.verdict, e.number, e.rule, linked(e)) for e in some]
        table = Table(("claim", "source", "verdict", "decided by", "rule", "evidence"), lines)
        parts.append(f"## {subject}\n\n{table.markdown('l' * 6)}\n")
    return "\n".join(parts)


def opened(readme: str, ledger: Ledger) -> str:
    """The README with the first lines of the ledger in their place."""
    lines = [(e.statement, f"[{e.verdict}]({e.figure})", e.number) for e in ledger.entries[:FIRST]]
    table = Table(("said of LoRA", "found here", "decided by"), lines).markdown("lll")
    return PLACE.sub(lambda m: f"{m[1]}{table}\n{m[2]}", readme)


if __name__ == "__main__":
    found = claims(ROOT)
    LEDGER.write_text(json.dumps(found.data(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (ROOT / "docs/claims.md").write_text(page(found), encoding="utf-8")
    readme = ROOT / "README.md"
    readme.write_text(opened(readme.read_text(encoding="utf-8"), found), encoding="utf-8")

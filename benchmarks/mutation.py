"""A systematic net beside the named bugs of tests/seeded_bugs.py: a sample of all small changes to a file.

    pip install -e ".[test,mutation]"
    python benchmarks/mutation.py [FILE ...] [--places 20] [--seed 2] [--jobs 2]

cosmic-ray says where its operators can change a file: another comparison, another arithmetic operator, a
number that is one off, a negation, a loop that never runs, an exception that nobody catches, a decorator
that is gone. An operator may have eleven ways at one place, so places are drawn first, each at most once,
and then one change there: the score is the share of drawn places where a change is seen. Annotations are
left out, for nothing evaluates them. A change is seen if a test of the files named in FILES turns red or
finds no end; the rest of the suite is not asked.

With FILEs only these are drawn, and the rows of the others stay: for a file whose source has changed.

What survives stands in results/mutation.md with the reason from SURVIVORS. An equivalent change computes
the same, so no test can see it and it is not counted; every other survivor is a law that is missing.
"""

import argparse
import ast
import difflib
import json
import os
import random
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from common import RESULTS, machine
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator, operator_names

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from mutants import attempt, copies, not_green  # noqa: E402

FILES = {  # below minilora/: the tests that should see a change
    "ops.py": "ops layers model",
    "layers.py": "layers model lora",
    "model.py": "model inference",
    "lora.py": "lora export",
    "optim.py": "optim training",
    "training.py": "training protocol forms",
    "spectra.py": "spectra",
    "finetune.py": "finetune examples protocol flags",
    "experiments/harness.py": "harness rank_sweep cluster forms",
    "experiments/rank_sweep.py": "rank_sweep protocol flags forms",
    "compose/truncate.py": "truncate reading",
    "cli.py": "cli flags finetune names",
}
SURVIVORS = RESULTS / "mutation_survivors.json"  # file -> changed line -> [equivalent?, reason]


class Change(NamedTuple):
    """A file with one change in it."""

    text: str  # of the whole file
    line: int
    operator: str
    old: str  # what is left out of the changed lines, and what is put there
    new: str


def annotations(source: str) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Where annotations begin and end, as (line, column)."""
    nodes = [note for node in ast.walk(ast.parse(source)) for name in ("annotation", "returns")
             if isinstance(note := getattr(node, name, None), ast.expr)]  # fmt: skip
    return [((n.lineno, n.col_offset), (n.end_lineno or 0, n.end_col_offset or 0)) for n in nodes]


def places(source: str) -> dict[tuple[int, int], list[tuple[str, int]]]:
    """(line, column) -> the changes that can be made there: operators, each with the number of its place."""
    notes, tree = annotations(source), list(ast_nodes(get_ast(source)))
    ways: dict[tuple[int, int], list[tuple[str, int]]] = {}
    for name in operator_names():
        if (
            get_operator(name).arguments() or name == "core/NoOp"
        ):  # those with arguments replace by a given name
            continue
        positions = (where for node in tree for where in get_operator(name)().mutation_positions(node))
        for number, (begin, _) in enumerate(positions):
            if not any(first <= begin < last for first, last in notes):
                ways.setdefault(begin, []).append((name, number))
    return ways


def is_python(text: str) -> bool:
    """Whether a change has left a program."""
    try:
        compile(text, "changed", "exec")
    except SyntaxError:
        return False
    return True


def draw(source: str, count: int, rng: random.Random) -> tuple[list[Change], int]:
    """Changes at `count` random places of a file, one at each, in order; and how many places there are."""
    ways = places(source)
    changes = []
    for begin in sorted(rng.sample(sorted(ways), min(count, len(ways)))):
        for name, number in rng.sample(ways[begin], len(ways[begin])):
            text = mutate_code(source, get_operator(name)(), number)
            if text is not None and text != source and is_python(text):
                break
        else:
            continue
        diff = [
            line for line in difflib.ndiff(source.splitlines(), text.splitlines()) if line[:2] in ("- ", "+ ")
        ]
        old, new = (" ".join(line[2:].strip() for line in diff if line[0] == sign) for sign in "-+")
        changes.append(Change(text, begin[0], name.removeprefix("core/"), old, new))
    return changes, len(ways)


def main() -> int:
    """Draw, try, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("files", nargs="*", metavar="FILE", help=f"of {', '.join(FILES)}; default: all")
    parser.add_argument("--places", type=int, default=20, help="how many places of each file (20)")
    parser.add_argument("--seed", type=int, default=2, help="1 was drawn before, and laws written for it (2)")
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    if unknown := set(options.files) - set(FILES):
        parser.error(f"no tests are named for {', '.join(sorted(unknown))}")
    files = options.files or list(FILES)
    rows: list[dict[str, Any]] = []
    start = time.monotonic()
    os.environ |= {f"{library}_NUM_THREADS": "1" for library in ("OPENBLAS", "OMP", "MKL")}
    with copies(options.jobs) as free, ThreadPoolExecutor(options.jobs) as pool:
        if red := not_green(free, pool, (name for file in files for name in FILES[file].split())):
            print(*red, sep="\n")
            return 1
        for file in files:
            rng = random.Random(f"{options.seed} {file}")
            changes, count = draw((ROOT / "minilora" / file).read_text(), options.places, rng)
            asked = partial(attempt, free, FILES[file].split())
            results = pool.map(asked, [(file, change.text) for change in changes])
            for change, (seen, said) in zip(changes, results, strict=True):
                outcome = "seen" if seen or said else "survived"  # said: no end, or nothing can be imported
                rows.append({
                    "file": file, "places": count, "line": change.line, "operator": change.operator,
                    "old": change.old, "new": change.new, "outcome": outcome, "by": said,
                })  # fmt: skip
                print(f"{outcome:8} {file}:{change.line} {change.operator}: {change.new}  {said}", flush=True)
    print(f"{time.monotonic() - start:.0f} s")
    drawn, stored = {"seed": options.seed, "count": options.places}, RESULTS / "mutation.json"
    before = json.loads(stored.read_text()) if stored.exists() else {}
    if drawn.items() <= before.items():  # the rows of the other files stay
        rows += [row for row in before["rows"] if row["file"] not in files]
        rows.sort(key=lambda row: list(FILES).index(row["file"]))
    reasons = json.loads(SURVIVORS.read_text()) if SURVIVORS.exists() else {}
    for row in rows:
        if row["outcome"] != "seen":
            equal, why = reasons.get(row["file"], {}).get(f"{row['old']} -> {row['new']}", (False, ""))
            row |= {"outcome": "equivalent" if equal else "survived", "reason": why}
    lines = table(rows, options.seed)
    print("\n".join(lines))
    if {row["file"] for row in rows} == set(FILES):
        stored.write_text(json.dumps({"rows": rows, **drawn, **machine()}, indent=1) + "\n")
        (RESULTS / "mutation.md").write_text("\n".join(lines) + "\n")
    return 0


def table(rows: list[dict[str, Any]], seed: int) -> list[str]:
    """The scores by file, and what survived, as markdown."""
    from minilora.table import Table  # not above: each run imports this file, and then minilora from its copy

    scores, left = [], []
    names = list(dict.fromkeys(row["file"] for row in rows))
    for name in [*names, "all"]:
        some = [row for row in rows if name in (row["file"], "all")]
        held = {row["file"]: row["places"] for row in some}
        equal, seen = (sum(row["outcome"] == what for row in some) for what in ("equivalent", "seen"))
        share = seen / max(len(some) - equal, 1)
        scores.append((name, *map(str, (sum(held.values()), len(some), equal, seen)), f"{share:.0%}"))
    for row in rows:
        if row["outcome"] != "seen":
            why = row["reason"] or "not looked at yet"
            left.append((f"{row['file']}: `{row['old']}`", f"`{row['new']}`", f"{row['outcome']}: {why}"))
    return [
        "# Which small changes the tests see", "",
        f"Drawn by `python benchmarks/mutation.py --seed {seed}`, which says how. A file whose source has "
        "changed was drawn again; the laws that its first draw led to were there already.", "",
        Table(("file", "places", "drawn", "equivalent", "seen", "share"), scores).markdown(), "",
        Table(("what survived", "becomes", "why"), left).markdown("lll"),
    ]  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())

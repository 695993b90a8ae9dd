"""What it takes to read this code, beside an older revision: lines, files, and moves between files.

    python benchmarks/house.py [REVISION]     a table in Markdown; REVISION is any name that git knows

- The lesson is what README.md lists under "Read it in this order"; of a revision the files that git sees as
  these, or as what these were called (`git diff --find-renames`). What has since come out of them is in them.
- Files at the first `ls` are the Python files and folders directly in minilora/.
- A reader starts at an entry, a function, and follows each call in the order of the source, depth first,
  each function once. Followed are calls of names: functions of the same file, what an import brings in
  (`f()`, `module.f()`), methods of the same class (`self.f()`, `cls.f()`), and a class's own
  `__init__` and `__post_init__`. Not followed are errors that are raised, and methods of other objects, whose
  class stands nowhere in the source.
- A move is a step of that walk to another file. A climb is a move to a file that imports, directly or
  through others, the one that is left: the reader has to go back up.
"""

import argparse
import ast
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from io import BytesIO
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "docs"))
from wings import Import, files, imports  # noqa: E402

ENTRIES = ("inspect", "load_adapter", "sweep")
Place = tuple[str, str]  # module, and the name in it: ("lora", "LowRank.delta")


def git(*arguments: str) -> bytes:
    """What git answers in this repository; RuntimeError with its words if it refuses."""
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr.decode().strip())
    return done.stdout


def lesson(readme: str) -> list[str]:
    """The files of the numbered list in the README: "minilora/ops.py", ..."""
    return re.findall(r"\]\((minilora/\w+\.py)\)", "\n".join(re.findall(r"^\d+\. .*$", readme, re.M)))


def lesson_of(revision: str) -> list[str]:
    """The files that the lesson's files were in a revision."""
    said = git("diff", "--find-renames=30%", "--name-status", revision, "--", "minilora").decode()
    moved = [line.split("\t") for line in said.splitlines()]
    before = {new: old for _, old, new in (line for line in moved if line[0].startswith("R"))}
    return [before.get(file, file) for file in lesson((ROOT / "README.md").read_text(encoding="utf-8"))]


def lines(path: Path) -> int:
    """The lines of a file; none if it is not there."""
    return len(path.read_text(encoding="utf-8").splitlines()) if path.exists() else 0


class House:
    """The source of the package in one folder: its definitions, and what its names mean."""

    def __init__(self, package: Path) -> None:
        self.package, self.files = package, files(package)
        self.bodies: dict[Place, ast.AST] = {}
        self.names: dict[str, dict[str, Import]] = {}
        self.below: dict[str, set[str]] = {}
        for name, file in self.files.items():
            brought = [item for item in imports(file, package) if item.ours]
            self.names[name] = {item.local: item for item in brought}
            self.below[name] = {item.module for item in brought} & self.files.keys()
            for node in ast.parse(file.read_text(encoding="utf-8")).body:
                if isinstance(node, ast.FunctionDef | ast.ClassDef):
                    self.bodies[name, node.name] = node
                if isinstance(node, ast.ClassDef):
                    methods = [part for part in node.body if isinstance(part, ast.FunctionDef)]
                    self.bodies |= {(name, f"{node.name}.{method.name}"): method for method in methods}

    def entry(self, name: str) -> Place:
        """Where a function stands: what minilora offers by this name, else the lowest that is called so."""
        for item in imports(self.package / "__init__.py", self.package):
            if item.local == name and (item.module, name) in self.bodies:
                return item.module, name
        places = [place for place in self.bodies if place[1] == name]
        return min(places, key=lambda place: len(self.imported(place[0])))

    def meaning(self, module: str, owner: str, called: ast.expr) -> Iterator[Place]:
        """The definitions that a call in `module` leads to; `owner` is the class around it, or ""."""
        name = ast.unparse(called)
        head, _, rest = name.partition(".")
        if head in ("self", "cls") and owner:
            places = [(module, f"{owner}.{rest}")]
        elif head in self.names[module]:
            item = self.names[module][head]
            places = [(item.module, ".".join(part for part in (item.name, rest) if part))]
        else:
            places = [(module, name)]
        for place in places:
            if isinstance(self.bodies.get(place), ast.ClassDef):
                makers = ((place[0], f"{place[1]}.{method}") for method in ("__init__", "__post_init__"))
                yield place
                yield from (maker for maker in makers if maker in self.bodies)
            elif place in self.bodies:
                yield place

    def walk(self, place: Place, seen: set[Place]) -> Iterator[Place]:
        """Every definition once, in the order in which a reader who follows the calls meets it."""
        seen.add(place)
        yield place
        body = self.bodies[place]
        if isinstance(body, ast.ClassDef):  # read for its fields; its methods when they are called
            return
        owner = place[1].rpartition(".")[0]
        raised = {id(node.exc) for node in ast.walk(body) if isinstance(node, ast.Raise)}
        calls = [n for n in ast.walk(body) if isinstance(n, ast.Call) and id(n) not in raised]
        for call in sorted(calls, key=lambda call: (call.end_lineno, call.end_col_offset)):
            for to in self.meaning(place[0], owner, call.func):
                if to not in seen:
                    yield from self.walk(to, seen)

    def imported(self, module: str) -> set[str]:
        """What a module imports, directly or through others."""
        found: set[str] = set()
        ahead = {module}
        while ahead:
            ahead = set().union(*(self.below[name] for name in ahead)) - found
            found |= ahead
        return found

    def moves(self, entry: str) -> tuple[int, int]:
        """How often a reader changes the file, and how often upwards."""
        way = [module for module, _ in self.walk(self.entry(entry), set())]
        moves = [(a, b) for a, b in pairwise(way) if a != b]
        return len(moves), sum(a in self.imported(b) for a, b in moves)


def measures(root: Path, lesson_files: list[str]) -> dict[str, int]:
    """Everything that is counted of the source in a folder."""
    house = House(root / "minilora")
    first = [path for path in (root / "minilora").iterdir() if path.suffix == ".py" or path.is_dir()]
    found = {
        "lines of the lesson": sum(lines(root / file) for file in dict.fromkeys(lesson_files)),
        "files and folders at the first `ls minilora`": sum("__pycache__" not in p.name for p in first),
        "lines of the package": sum(map(lines, (root / "minilora").rglob("*.py"))),
    }
    for entry in ENTRIES:
        moves, climbs = house.moves(entry)
        found |= {f"moves to follow `{entry}`": moves, f"climbs among them, `{entry}`": climbs}
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("revision", nargs="?", help="what git calls it: a commit, a tag, a branch")
    revision = parser.parse_args().revision
    columns = {}
    if revision:
        with tempfile.TemporaryDirectory() as folder:
            with zipfile.ZipFile(BytesIO(git("archive", "--format=zip", revision, "minilora"))) as archive:
                archive.extractall(folder)
            columns[revision] = measures(Path(folder), lesson_of(revision))
    columns["now"] = measures(ROOT, lesson((ROOT / "README.md").read_text(encoding="utf-8")))
    print("| what | " + " | ".join(columns) + " |")
    print("| --- |" + " ---: |" * len(columns))
    for name in columns["now"]:
        print(f"| {name} | " + " | ".join(f"{column[name]:,}" for column in columns.values()) + " |")


if __name__ == "__main__":
    main()

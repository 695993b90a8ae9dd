"""What imports what, and what every file does: wings.svg, wings.png and modules.md from the code.

    python docs/wings.py

A node is a file of the lesson or a wing (a folder); everything stands above all that it imports. A line
that a longer way implies is left out. The same code gives the same picture; the digest of all imports
stands in the SVG, and tests/project/test_documents.py compares it with the code's.
"""

import ast
import math
import random
import textwrap
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
PACKAGE = HERE.parent / "minilora"
APART = 2.3  # inches from one box of a row to the next
SLOTS = range(-7, 8)  # of a row, half as far apart
STARTS = 8  # random ones, of which the best is drawn


class Import(NamedTuple):
    """One imported name: `from .data.corpora import fetch as get` is (get, data.corpora, fetch)."""

    local: str
    module: str  # of this package, or a library's
    name: str | None  # what is taken out of the module; None is the module itself
    ours: bool


def module_name(file: Path, package: Path = PACKAGE) -> str:
    """lora.py -> lora, formats/gguf.py -> formats.gguf, formats/__init__.py -> formats."""
    parts = file.relative_to(package).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def imports(file: Path, package: Path = PACKAGE) -> Iterator[Import]:
    """Every import of a file, those in functions too."""
    wing = file.relative_to(package).parts[:-1]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.asname or alias.name, alias.name.split(".")[0], None, False)
        elif isinstance(node, ast.ImportFrom):
            source = (node.module or "").split(".")
            if node.level:
                source = [part for part in (*wing[: len(wing) + 1 - node.level], *source) if part]
            for alias in node.names:
                local, path = alias.asname or alias.name, package.joinpath(*source, alias.name)
                if not node.level:
                    yield Import(local, source[0], alias.name, False)
                elif path.with_suffix(".py").exists() or path.is_dir():
                    yield Import(local, ".".join([*source, alias.name]), None, True)
                else:
                    yield Import(local, ".".join(source), alias.name, True)


def files(package: Path = PACKAGE) -> dict[str, Path]:
    """Every file by the name of its module, but the package's own __init__ and __main__."""
    every = {module_name(file, package): file for file in sorted(package.rglob("*.py"))}
    return {name: file for name, file in every.items() if name not in ("", "__main__")}


def edges(package: Path = PACKAGE) -> dict[str, set[str]]:
    """Files of the lesson and wings -> which others each of them imports."""
    found: dict[str, set[str]] = {}
    for name, file in files(package).items():
        here = found.setdefault(name.split(".")[0], set())
        here |= {item.module.split(".")[0] for item in imports(file, package) if item.ours}
    return {node: below - {node, ""} for node, below in found.items()}


def digest(graph: dict[str, set[str]]) -> str:
    """SHA-256 of the sorted list of imports."""
    return sha256(repr(sorted((a, sorted(bs)) for a, bs in graph.items())).encode()).hexdigest()


def levels(graph: dict[str, set[str]]) -> dict[str, int]:
    """The longest way down from each node; ValueError if two of them import each other.

    A node that imports nothing stands just below the lowest that imports it.
    """
    known: dict[str, int] = {}

    def level(node: str, way: tuple[str, ...]) -> int:
        if node in way:
            raise ValueError("imports go in a circle: " + " -> ".join([*way[way.index(node) :], node]))
        if node not in known:
            known[node] = max((level(below, (*way, node)) + 1 for below in sorted(graph[node])), default=0)
        return known[node]

    for node in graph:
        level(node, ())
    for node in (node for node, others in graph.items() if not others):
        known[node] = min((known[n] for n, others in graph.items() if node in others), default=1) - 1
    return known


def below(graph: dict[str, set[str]], node: str) -> set[str]:
    """Everything that a node imports, directly or through others."""
    return graph[node].union(*(below(graph, other) for other in graph[node]))


def arrows(graph: dict[str, set[str]]) -> list[tuple[str, str]]:
    """The imports that no longer way implies."""
    return [
        (node, other)
        for node in sorted(graph)
        for other in sorted(graph[node])
        if not any(other in below(graph, third) for third in graph[node] - {other})
    ]


class Box(NamedTuple):
    """The names in a box, and half of its width and height in inches."""

    names: str
    width: float
    height: float

    @classmethod
    def of(cls, node: str, files: list[str]) -> "Box":
        """The box of a file of the lesson, or of a wing with these files."""
        lines = textwrap.wrap(", ".join(files), 26)
        longest = max(map(len, lines), default=0)
        return cls("\n".join(lines), max(0.034 * longest, 0.045 * len(node)) + 0.12, 0.08 * len(lines) + 0.16)


Place = tuple[float, float]  # inches
Places = dict[str, Place]
Between = dict[tuple[str, str], list[str]]  # a line -> the boxes that it might run behind


def place(graph: dict[str, set[str]], boxes: dict[str, Box]) -> Places:
    """The centres of the boxes, one row for each level: no line runs behind a box, and all are short.

    From a random start each box in turn takes the best free slot of its row, or changes places with another,
    until none is better off. The best of STARTS is taken.
    """
    height, lines = levels(graph), arrows(graph)
    rows = [sorted(n for n in graph if height[n] == level) for level in range(max(height.values()) + 1)]
    row_of = {node: row for row in rows for node in row}
    up, top = dict[str, float](), 0.0
    for row in rows:
        tall = max(boxes[node].height for node in row)
        up |= dict.fromkeys(row, top + tall)
        top += 2 * tall + 0.28
    between = {  # the boxes that a line might run behind
        (a, b): [n for n in graph if n not in (a, b) and up[b] < up[n] + boxes[n].height
                 and up[n] - boxes[n].height < up[a]]
        for a, b in lines
    }  # fmt: skip
    about = {n: {ends: others for ends, others in between.items() if n in (*ends, *others)} for n in graph}

    def cost(slots: dict[str, int], some: Between) -> float:
        at = {node: (slot * APART / 2, up[node]) for node, slot in slots.items()}
        behind = sum(
            crosses(at[a], at[b], at[n], boxes[n]) for (a, b), others in some.items() for n in others
        )
        return 30 * behind + sum(math.dist(at[a], at[b]) for a, b in some)

    def moves(slots: dict[str, int], node: str) -> Iterator[dict[str, int]]:
        others = [slots[n] for n in row_of[node] if n != node]
        yield from (slots | {node: s} for s in SLOTS if all(abs(s - other) > 1 for other in others))
        yield from (slots | {node: slots[n], n: slots[node]} for n in row_of[node] if n != node)

    def settled(slots: dict[str, int]) -> dict[str, int]:
        before = None
        while slots != before:
            before = slots
            for node in graph:
                near = about[node] | {ends: ns for n in row_of[node] for ends, ns in about[n].items()}
                slots = min(moves(slots, node), key=lambda new: cost(new, near))
        return slots

    def start() -> dict[str, int]:
        return {
            node: slot
            for row in rows
            for node, slot in zip(row, rng.sample(SLOTS[::2], len(row)), strict=True)
        }

    rng = random.Random(0)
    best = min((settled(start()) for _ in range(STARTS)), key=lambda slots: cost(slots, between))
    return {node: (slot * APART / 2, up[node]) for node, slot in best.items()}


def crosses(a: Place, b: Place, at: Place, box: Box) -> bool:
    """Whether the line from a down to b, between whose heights a box stands, runs behind it."""
    ys = max(b[1], at[1] - box.height), min(a[1], at[1] + box.height)
    xs = [a[0] + (b[0] - a[0]) * (y - a[1]) / (b[1] - a[1]) for y in ys]
    return min(xs) < at[0] + box.width and max(xs) > at[0] - box.width


def draw(graph: dict[str, set[str]]) -> Any:
    """The figure: one line of boxes for each level."""
    import matplotlib
    from matplotlib.figure import Figure

    import minilora as ml

    inside: dict[str, list[str]] = {node: [] for node in graph}
    for name in files():
        wing, _, rest = name.partition(".")
        if rest:
            inside[wing].append(rest)
    boxes = {node: Box.of(node, names) for node, names in inside.items()}
    at = place(graph, boxes)
    with matplotlib.rc_context(ml.plots.STYLE | {"figure.constrained_layout.use": False}):
        half = max(abs(x) + boxes[node].width for node, (x, _) in at.items()) + 0.1
        top = max(y + boxes[node].height for node, (_, y) in at.items()) + 0.1
        figure = Figure(figsize=(2 * half, top))
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set(xlim=(-half, half), ylim=(0, top))
        axes.set_axis_off()
        for node, (x, y) in at.items():
            names = boxes[node].names
            bold = node.replace("_", r"\_")  # a subscript otherwise
            text = f"$\\bf{{{bold}/}}$\n{names}" if names else node.replace("_", " ")
            colour = ml.plots.BLUE if names else ml.plots.GREY
            box = {"boxstyle": "round,pad=0.4", "facecolor": "white", "edgecolor": colour, "linewidth": 1.4}
            axes.text(x, y, text, ha="center", va="center", fontsize=8 if names else 10, bbox=box, zorder=3)
        for ends in arrows(graph):  # the boxes hide the ends
            x, y = zip(*(at[node] for node in ends), strict=True)
            axes.plot(x, y, color=ml.plots.GREY, linewidth=0.9, zorder=1)
    return figure


def says(node: ast.Module) -> str:
    """The first sentence of a module: the first paragraph of its docstring."""
    return " ".join((ast.get_docstring(node) or "").partition("\n\n")[0].split())


def table() -> str:
    """modules.md: every file with the first words of its docstring, in the order of the picture, upwards."""
    graph, every = edges(), files()
    height = levels(graph)
    lines = [
        "# Every file in one line", "",
        "Made by `python docs/wings.py` from the first words of each docstring. "
        "Files of the lesson and folders stand after all that they import.", "",
        "| file | what it does |", "| --- | --- |",
    ]  # fmt: skip
    for name in sorted(every, key=lambda n: (height[n.split(".")[0]], n)):
        path = every[name].relative_to(PACKAGE.parent).as_posix()
        first = says(ast.parse(every[name].read_text(encoding="utf-8"))).replace("|", "\\|")
        folder = path.removesuffix("__init__.py")
        shown = f"**[`{folder.removeprefix('minilora/')}`](../{folder})**"
        if folder == path:
            shown = f"[`{path.removeprefix('minilora/')}`](../{path})"
        lines.append(f"| {shown} | {first} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write the picture and the table."""
    import matplotlib

    import minilora as ml

    graph = edges()
    figure = draw(graph)
    with matplotlib.rc_context(ml.plots.STYLE | {"figure.constrained_layout.use": False}):
        metadata = {"Date": None, "Creator": None, "Description": f"imports sha256:{digest(graph)}"}
        figure.savefig(HERE / "wings.svg", metadata=metadata)
        figure.savefig(HERE / "wings.png", metadata={"Software": None})
    (HERE / "modules.md").write_text(table(), encoding="utf-8")


if __name__ == "__main__":
    main()

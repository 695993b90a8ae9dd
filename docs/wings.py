"""What imports what, and what every file does: wings.svg, wings.png and modules.md from the code.

    python docs/wings.py

A node is a file of the lesson or a wing (a folder); everything stands above all that it imports. A line
that a longer way implies is left out. The same code gives the same picture; the digest of all imports
stands in the SVG, and tests/project/test_documents.py compares it with the code's.
"""

import ast
import textwrap
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
PACKAGE = HERE.parent / "minilora"


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
    """The longest way down from each node; ValueError if two of them import each other."""
    known: dict[str, int] = {}

    def level(node: str, way: tuple[str, ...]) -> int:
        if node in way:
            raise ValueError("imports go in a circle: " + " -> ".join([*way[way.index(node) :], node]))
        if node not in known:
            known[node] = max((level(below, (*way, node)) + 1 for below in sorted(graph[node])), default=0)
        return known[node]

    for node in graph:
        level(node, ())
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
    height = levels(graph)
    lines = [sorted(n for n in graph if height[n] == level) for level in range(max(height.values()) + 1)]
    centre: dict[str, float] = {}
    y = 0.0
    at: dict[str, tuple[float, float]] = {}
    for line in lines:
        line.sort(key=lambda n: (sum(centre[b] for b in graph[n]) / max(len(graph[n]), 1), n))
        tall = max(-(-len(", ".join(inside[n])) // 26) for n in line)  # lines of file names
        y += 0.2 + 0.1 * tall
        for i, node in enumerate(line):
            centre[node] = (i - (len(line) - 1) / 2) * 2.3
            at[node] = centre[node], y
        y += 0.42 + 0.1 * tall
    with matplotlib.rc_context(ml.plots.STYLE | {"figure.constrained_layout.use": False}):
        half = 1.15 * max(map(len, lines))  # inches, so that the longest line fits
        figure = Figure(figsize=(2 * half, y))
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set(xlim=(-half, half), ylim=(-0.2, y - 0.2))
        axes.set_axis_off()
        for node, (x, h) in at.items():
            names = "\n".join(textwrap.wrap(", ".join(inside[node]), 26))
            text = f"$\\bf{{{node}/}}$\n{names}" if names else node.replace("_", " ")
            colour = ml.plots.BLUE if names else ml.plots.GREY
            box = {"boxstyle": "round,pad=0.4", "facecolor": "white", "edgecolor": colour, "linewidth": 1.4}
            axes.text(x, h, text, ha="center", va="center", fontsize=8 if names else 10, bbox=box, zorder=3)
        for node, other in arrows(graph):  # the boxes hide the ends
            x, h = zip(at[node], at[other], strict=True)
            axes.plot(x, h, color=ml.plots.GREY, linewidth=0.9, zorder=1)
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

"""Foreign text made safe for a terminal, a figure or a page; and the lines of a report.

The name of a file, of a module or of anything else from outside may hold escape codes, line breaks,
characters that reverse a line, and markup. The functions here make it plain text wherever it is shown.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import groupby
from typing import Any, TypeVar

Kind = TypeVar("Kind")
WIDEST = 60  # characters of a foreign text in a figure


def plain(text: str, keep: str = "") -> str:
    r"""A text with unprintable characters escaped as in Python, \x1b or \u202e, except those in `keep`."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else ascii(c)[1:-1] for c in text)


def drawn(text: str) -> str:
    """A text for matplotlib, plain and cut: $ starts no formula there, and a leading _ hides no label."""
    text = shortened(plain(text), WIDEST).replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text  # else a legend leaves it out


def shortened(text: str, most: int) -> str:
    """A text of at most so many characters: its middle becomes an ellipsis."""
    if len(text) <= most:
        return text
    end = (most - 1) // 2
    return f"{text[: most - 1 - end]}…{text[len(text) - end :]}"


def markup(text: str) -> str:
    """A text as HTML, plain and escaped, for an element or an attribute."""
    from html import escape

    return escape(plain(text), quote=True)


def counted(n: int, one: str, more: str) -> str:
    """A number and its noun, "1 tensor is" or "3 tensors are"."""
    return f"{n} {one if n == 1 else more}"


@dataclass(frozen=True)
class Table:
    """Lines of cells below a head, each named by its first cell; any text in it may be foreign."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""

    def lines(self) -> list[str]:
        """Its lines for a terminal, without the caption; the first column is flush left."""
        cells = [[plain(cell) for cell in line] for line in (self.head, *self.rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        padded = ([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in cells)
        return ["  ".join(line).rstrip() for line in padded]

    def __str__(self) -> str:
        return printed(self.caption, self) if self.caption else printed(self)

    def html(self) -> str:
        """The table in HTML, with a header line; the first cell of each line names it."""
        caption = f"<caption>{markup(self.caption)}</caption>" if self.caption else ""
        head = "".join(f'<th scope="col">{markup(cell)}</th>' for cell in self.head)
        body = "\n".join(
            f'<tr><th scope="row">{markup(line[0])}</th>'
            + "".join(f"<td>{markup(cell)}</td>" for cell in line[1:])
            + "</tr>"
            for line in self.rows
        )
        return f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table>"

    def _repr_html_(self) -> str:
        """How a notebook shows it."""
        return self.html()

    def markdown(self, align: str = "") -> str:
        """The table in Markdown, without the caption; cells may hold Markdown.

        `align` has one letter per column, l or r; by default the first is flush left and the others right.
        """
        align = align or "l".ljust(len(self.head), "r")
        rule = ["---:" if side == "r" else "---" for side in align]
        cells = [[plain(cell).replace("|", "\\|") for cell in line] for line in (self.head, *self.rows)]
        return "\n".join("| " + " | ".join(line) + " |" for line in (cells[0], rule, *cells[1:]))


def printed(*parts: str | Table) -> str:
    """A report for a terminal: lines and tables, all plain, so that no foreign text can break a line."""
    return "\n".join(
        line for part in parts for line in (part.lines() if isinstance(part, Table) else [plain(part)])
    )


def html(*parts: str | Table) -> str:
    """The same report for a notebook: the lines between two tables form one block, spaces as they are."""
    made = []
    for table, group in groupby(parts, lambda part: isinstance(part, Table)):
        if table:
            made += [part.html() for part in group if isinstance(part, Table)]
        elif text := "\n".join(markup(line) for line in group if isinstance(line, str) and line):
            made.append(f'<div style="white-space: pre-wrap">{text}</div>')
    return "\n".join(made)


def report(kind: type[Kind]) -> type[Kind]:
    """Decorate a class so that it prints, and shows in a notebook, the tables and lines of its `parts()`."""
    methods: Any = kind
    methods.__str__ = lambda self: printed(*self.parts())
    methods._repr_html_ = lambda self: html(*self.parts())
    return kind


def settings(config: Any) -> Table:
    """A table of a dataclass's fields and their values."""
    rows = [(f.name, repr(getattr(config, f.name))) for f in fields(config)]
    return Table(("field", "value"), rows, type(config).__name__)

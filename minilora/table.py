"""Foreign text where it is shown: a terminal, a figure, a page; and the lines of a report.

The name of a file, of a module or of anything else from outside may hold escape codes, line breaks,
characters that turn the direction of a line, and signs that mean something where they are shown. Here a
text is made a text, whatever shows it.
"""

from collections.abc import Sequence

WIDEST = 60  # characters of a foreign text in a figure


def plain(text: str, keep: str = "") -> str:
    r"""A text without characters that cannot be printed: they stand as in Python, \x1b or \u202e."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else ascii(c)[1:-1] for c in text)


def drawn(text: str) -> str:
    """A text for matplotlib, plain and cut: a $ is no formula there, and a label with _ is no secret."""
    text = plain(text)
    if len(text) > WIDEST:
        text = f"{text[: WIDEST // 2]}…{text[1 - WIDEST // 2 :]}"
    text = text.replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text  # else a legend leaves it out


def markup(text: str) -> str:
    """A text for HTML, plain, in an element or an attribute."""
    from html import escape

    return escape(plain(text), quote=True)


def counted(n: int, one: str, more: str) -> str:
    """A number and what is counted, "1 tensor is" or "3 tensors are"."""
    return f"{n} {one if n == 1 else more}"


def printed(*lines: str) -> str:
    """The lines of a report, each plain, so that no foreign text in one can end it or begin another."""
    return "\n".join(map(plain, lines))


def aligned(cells: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table, its first column flush left."""
    cells = [[plain(cell) for cell in line] for line in cells]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    padded = ([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in cells)
    return ["  ".join(line).rstrip() for line in padded]

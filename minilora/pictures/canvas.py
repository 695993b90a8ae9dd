"""What every picture is drawn of: boxes, maps, ways with heads, words. The unit is an inch, y goes up.

What is frozen is grey and has a snowflake; what is trained is orange and has a thick edge. So neither colours
nor words alone tell one from the other.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ..analysis.plotting import ORANGE, Figure, Picture

INK, SOFT, EMBER = "#222222", "#555555", "#A33F00"  # of words; EMBER is ORANGE, dark enough to be read
LINE, ICE = "#444444", "#5C6B78"
SMALL, BODY, LETTER = 14, 16, 22  # points
Point = tuple[float, float]


class Look(NamedTuple):
    """How a shape is drawn."""

    fill: str
    edge: str
    width: float = 1.4  # points
    dashes: str = "-"


FROZEN = Look("#E4E9EE", ICE)
TRAINED = Look("#FCE7DA", ORANGE, 2.6)
MERGED = Look("#E4E9EE", ORANGE, 2.6)  # W + ΔW
PASSING = Look("none", ICE, dashes="--")  # formed for a moment, or a frame
STEP = Look("white", LINE)  # without weights


class Canvas:
    """A figure without axes, and what can be drawn on it."""

    def __init__(self, width: float, height: float) -> None:
        self.figure = Figure(figsize=(width, height))
        self.figure.set_layout_engine("none")
        self.axes: Any = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set(xlim=(0, width), ylim=(0, height))
        self.axes.set_axis_off()

    def picture(self, says: str) -> Picture:
        """What was drawn, and the sentence for those who cannot see it."""
        return Picture(self.figure, says)

    def words(
        self, x: float, y: float, text: str, size: float = BODY, colour: str = INK, *, at: str = "center",
        bold: bool = False, slanted: bool = False, upright: bool = False,
    ) -> Any:  # fmt: skip
        """Write a line whose capitals are centred on y, or on x if it runs upwards."""
        down = 0.365 * size / 72  # half the height of a capital
        return self.axes.text(
            x + down * upright, y - down * (not upright), text, fontsize=size, color=colour,
            ha=at, va="baseline", rotation=90 * upright, rotation_mode="anchor",
            fontweight="bold" if bold else "normal", fontstyle="oblique" if slanted else "normal",
        )  # fmt: skip

    def line(self, x: float, y: float, parts: Sequence[tuple[str, str]], size: float = BODY) -> None:
        """Write parts, each in its colour, in one line around x."""
        drawn = [self.words(0, y, text, size, colour, at="left") for text, colour in parts]
        inches = self.axes.transData.inverted()
        widths = [inches.transform(text.get_window_extent())[1, 0] for text in drawn]
        gap = 0.3 * size / 72
        x -= (sum(widths) + gap * (len(widths) - 1)) / 2
        for text, width in zip(drawn, widths, strict=True):
            text.set_x(x)
            x += width + gap

    def shape(self, points: Sequence[Point], look: Look) -> None:
        """A closed shape."""
        self.axes.fill(
            *zip(*points, strict=True), facecolor=look.fill, edgecolor=look.edge, linewidth=look.width,
            linestyle=look.dashes, joinstyle="round", zorder=2,
        )  # fmt: skip

    def box(self, x: float, y: float, width: float, height: float, look: Look) -> None:
        """A rectangle around (x, y)."""
        self.map(x, y, width, height, height, look)

    def map(self, x: float, y: float, width: float, left: float, right: float, look: Look) -> None:
        """A linear map around (x, y): as high on the left as it has inputs, on the right as outputs."""
        a, b, c = width / 2, left / 2, right / 2
        self.shape([(x - a, y - b), (x + a, y - c), (x + a, y + c), (x - a, y + b)], look)

    def dot(self, x: float, y: float, radius: float, look: Look) -> None:
        """A circle."""
        turns = np.linspace(0, 2 * math.pi, 36, endpoint=False).tolist()
        self.shape([(x + radius * math.cos(t), y + radius * math.sin(t)) for t in turns], look)

    def stroke(self, points: Sequence[Point], width: float, colour: str = LINE, zorder: int = 3) -> None:
        """A line through points; NaN is a gap."""
        self.axes.plot(
            *zip(*points, strict=True), color=colour, linewidth=width, solid_capstyle="butt", zorder=zorder
        )

    def way(self, *points: Point, width: float = 1.8) -> None:
        """A line through points, with rounded turns and a head at its end."""
        end, long, turn = points[-1], 0.17, 0.14
        line = [points[0]]
        for before, at, after in zip(points, points[1:], points[2:], strict=False):
            a, b = toward(at, before, turn), toward(at, after, turn)
            for t in np.linspace(0, 1, 7).tolist():  # a parabola, which touches both sides
                line.append(between(between(a, at, t), between(at, b, t), t))
        self.stroke([*line, toward(end, points[-2], 0.8 * long)], width, zorder=1)
        x, y = toward(end, points[-2], long)
        right, up = 0.42 * (end[1] - y), 0.42 * (x - end[0])  # across the way
        self.axes.fill(
            [end[0], x + right, x - right], [end[1], y + up, y - up], color=LINE, linewidth=0, zorder=3
        )

    def sum(self, x: float, y: float, radius: float = 0.2) -> None:
        """A circle with a plus, where ways meet."""
        self.dot(x, y, radius, STEP)
        a, gap = 0.55 * radius, (math.nan, math.nan)
        self.stroke([(x - a, y), (x + a, y), gap, (x, y - a), (x, y + a)], 1.8)

    def snowflake(self, x: float, y: float, radius: float = 0.12) -> None:
        """The mark of what is frozen."""
        points: list[Point] = []
        for turn in range(6):
            arm = radius * np.exp(1j * math.pi * (turn / 3 + 0.5))
            barbs = [0.55 * arm + 0.3 * arm * np.exp(side * 1j) for side in (1, -1)]
            for z in map(complex, (0, arm, math.nan, barbs[0], 0.55 * arm, barbs[1], math.nan)):
                points.append((x + z.real, y + z.imag))
        self.stroke(points, 1.3, ICE)

    def frozen(self, x: float, y: float) -> None:
        """The mark and the word, around x."""
        self.snowflake(x - 0.42, y)
        self.words(x + 0.12, y, "frozen", SMALL)

    def stripes(
        self, x: float, y: float, width: float, height: float, columns: int = 1, rows: int = 1
    ) -> None:
        """A trained matrix around (x, y), to scale, its columns or rows apart where they can be seen."""
        left, right, low, high = x - width / 2, x + width / 2, y - height / 2, y + height / 2
        colour = ORANGE if min(width, height) > 0.02 else EMBER  # a hair must be dark
        self.axes.fill([left, right, right, left], [low, low, high, high], color=colour, linewidth=0,
                       zorder=2, snap=False)  # fmt: skip
        apart = min(width / columns, height / rows)
        if apart > 0.03:
            gap = min(1, 18 * apart)
            for at in (left + k * apart for k in range(1, columns)):
                self.stroke([(at, low), (at, high)], gap, "white")
            for at in (low + k * apart for k in range(1, rows)):
                self.stroke([(left, at), (right, at)], gap, "white")

    def lens(self, x: float, y: float, columns: int = 1, rows: int = 1, radius: float = 0.42) -> None:
        """What is too thin to be seen, magnified: its columns or rows, or sixteen if they are more."""
        self.dot(x, y, radius, STEP)
        number = min(max(columns, rows), 16)
        apart = 1.1 * radius / number
        for k in range(number):
            away = (k - (number - 1) / 2) * apart
            long = math.sqrt(radius**2 - (abs(away) + apart / 2) ** 2) - 0.02
            ends = [(away, -long), (away, long)] if columns >= rows else [(-long, away), (long, away)]
            self.stroke([(x + right, y + up) for right, up in ends], 54 * apart, ORANGE)

    def codes(self, x: float, y: float, side: float, rows: int, columns: int) -> None:
        """A patch of 4-bit codes around (x, y): squares in sixteen greys."""
        for (i, j), code in np.ndenumerate(np.random.default_rng(0).integers(0, 16, (rows, columns))):
            grey = Look(f"{0.4 + code / 27:.2f}", "white", 0.8)
            self.box(x + (j - (columns - 1) / 2) * side, y + (i - (rows - 1) / 2) * side, side, side, grey)

    def field(self, x: float, y: float, wide: float, high: float) -> Any:
        """Axes for the entries of a matrix, whose upper left corner is (x, y)."""
        width, height = self.figure.get_size_inches()
        return self.figure.add_axes((x / width, (y - high) / height, wide / width, high / height))

    def image(self, x: float, y: float, side: float, pixels: np.ndarray) -> None:
        """A square image around (x, y): paper at -1, ink at 1, and what is beyond as these."""
        ax = self.field(x - side / 2, y + side / 2, side, side)
        ax.imshow(pixels, cmap="Greys", vmin=-1, vmax=1, interpolation="none")
        ax.grid(False)
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set(visible=True, color=ICE)


def between(a: Point, b: Point, share: float) -> Point:
    """The point at this share of the way from a to b."""
    return a[0] + share * (b[0] - a[0]), a[1] + share * (b[1] - a[1])


def toward(a: Point, b: Point, far: float) -> Point:
    """The point so far from a on the way to b."""
    return between(a, b, far / math.dist(a, b))

"""Thin sheets over a painting: a frozen base that stays as it is, adapters that are put on and taken off.

The painting is a weight matrix of a model, W (O, I), seen at an angle. A sheet covers it all, but only B
(O, r) and A (r, I) are stored: the bars along two of its edges, to scale. The counts are those of `count`.
"""

from collections.abc import Sequence

import numpy as np

from ..analysis.count import count
from ..analysis.plotting import BLUE, GREEN, ORANGE, Affine2D, Picture, styled
from ..backend import to_host
from ..errors import ConfigError
from ..lora import bases
from ..model import Llama
from .canvas import FROZEN, SMALL, SOFT, TRAINED, Canvas, Look, Point

COLOURS = ORANGE, BLUE, GREEN
WIDE, ALONG, UP, THICK = 4.2, 1.6, 1.9, 0.2  # inches: a plane's front edge, its slant, a base's thickness
LOW, HIGH = 1.15, 2.55  # of a front edge: on the floor, and above it
SHADES = 3  # of grey on either side of 0
SHOWN = "model.layers.0.self_attn.q_proj"


def draw_plane(
    c: Canvas, x: float, y: float, look: Look, across: Point = (0, 1), deep: Point = (0, 1)
) -> None:
    """The part of a plane between shares of its front edge and of its side; (x, y) is its front corner."""
    (a, b), (low, high) = across, deep
    corners = ((a, low), (b, low), (b, high), (a, high))
    c.shape([(x + WIDE * u + ALONG * v, y + UP * v) for u, v in corners], look)


def draw_base(c: Canvas, x: float, y: float, W: np.ndarray) -> None:
    """A matrix as a slab, its entries from white to dark."""
    right, up = (x + WIDE, y), (x + WIDE + ALONG, y + UP)
    for (a, at), (b, to) in (((x, y), right), (right, up)):  # its sides
        c.shape([(a, at), (b, to), (b, to - THICK), (a, at - THICK)], FROZEN)
    most = 3 * float(W.std()) or 1.0  # what is beyond is as dark
    shades = np.clip(np.round(SHADES * W / most), -SHADES, SHADES)
    leaning = Affine2D.from_values(WIDE, 0, ALONG, UP, x, y) + c.axes.transData
    c.axes.imshow(
        shades, cmap="Greys", vmin=-SHADES, vmax=2.5 * SHADES, extent=(0, 1, 0, 1), transform=leaning,
        interpolation="none", aspect="auto", zorder=1.5,
    )  # fmt: skip


def draw_sheet(c: Canvas, x: float, y: float, colour: str, shape: tuple[int, int], r: int) -> None:
    """A transparent sheet: B along its left edge, A along its back edge, both to scale."""
    O, I = shape  # noqa: E741
    draw_plane(c, x, y, Look(f"{colour}26", colour, TRAINED.width))
    full = Look(colour, colour, 0)
    draw_plane(c, x, y, full, across=(0, r / I))
    draw_plane(c, x, y, full, deep=(1 - r / O, 1))


@styled
def overlays(
    model: Llama, r: int = 4, names: Sequence[str] = ("First Folio", "King James Bible", "your text")
) -> Picture:
    """A frozen base, the sheet of the first adapter on it and those of the others beside it, with the counts.

    ConfigError unless there are two or three names; the errors of `count` for a rank that does not fit.
    """
    if not 2 <= len(names) <= len(COLOURS):
        raise ConfigError(f"names has {len(names)}; expected 2 or 3")
    counts = count(model.config, r, "all-linear")
    W = to_host(bases(model)[SHOWN].weight.dense())
    c = Canvas(13.6, 5.5)
    left, right, middle = 0.55, 7.25, (WIDE + ALONG) / 2
    draw_base(c, left, LOW, W)
    for x, y in ((left, LOW), (left + WIDE, LOW), (left + WIDE + ALONG, LOW + UP)):  # where the sheet lies
        c.stroke([(x, y), (x, y + HIGH - LOW)], 1.2, SOFT, 1)
    for name, colour, x, y in zip(names, COLOURS, (left, right, right), (HIGH, HIGH, LOW), strict=False):
        draw_sheet(c, x, y, colour, W.shape, r)
        c.words(x + middle, HIGH + UP + 0.5 if y == HIGH else 0.5, f"{name}: {counts.parameters:,} numbers")
    c.snowflake(left + 0.3, 0.5)
    c.words(left + middle, 0.5, f"the frozen base: {counts.total:,} numbers", bold=True)
    c.way((right + 0.7, 3.7), (right - 0.7, 3.7))
    c.way((right - 0.7, 3.3), (right + 0.4, 3.3))
    c.words(right, 3.93, "put on", SMALL)
    c.words(right - 0.15, 3.07, "take off", SMALL)
    first, *others = names
    return c.picture(
        f"A thin sheet, {first}, lies on a frozen base of {counts.total:,} numbers, which is drawn as the "
        f"entries of one of its matrices; beside it are the sheets {' and '.join(others)}. Each has "
        f"{counts.parameters:,} numbers, in bars along two of its edges, and can be put on and taken off."
    )

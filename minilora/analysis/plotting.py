"""The house style of all figures, and how they are saved. The only file that imports matplotlib.

Every figure is a Picture: the figure, and one sentence that says what it shows, for readers who cannot see
it. A colour means one thing in a figure; colours are Okabe and Ito's (viridis for ordered quantities), never
without a marker or line style. A curve has its name beside it where there is room. The same rows give the
same bytes.
"""

import base64
import io
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes as Axes
from matplotlib.figure import Figure as Figure
from matplotlib.transforms import Affine2D as Affine2D

from ..formats.atomic import write_atomic
from ..table import markup

KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
BLUE, ORANGE, GREEN, PINK, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#666666"
SKY, GOLD, WINE = "#56B4E9", "#E69F00", "#882255"  # where a figure needs more; the last one is Tol's
STYLE: dict[Any, Any] = {
    "figure.figsize": (6.4, 4.0),
    "figure.constrained_layout.use": True,
    "savefig.dpi": 150,
    "font.family": "DejaVu Sans",
    "font.size": 11,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#DDDDDD",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "svg.hashsalt": "minilora",
    "svg.fonttype": "none",
}


@contextmanager
def house() -> Iterator[None]:
    """The style while something is drawn. A glyph that the font lacks is a box in PNG and text in SVG."""
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph ")
        yield


styled = house()  # a decorator


@dataclass(frozen=True)
class Picture:
    """A figure and the sentence that says what it shows."""

    figure: Figure
    says: str
    made: dict[str, bytes] = field(default_factory=dict, repr=False, compare=False)  # by kind, drawn once

    def encoded(self, kind: str) -> bytes:
        """The figure as "png" or "svg", without dates."""
        if kind not in self.made:
            stream = io.BytesIO()
            metadata = {"Date": None, "Creator": None} if kind == "svg" else {"Software": None}
            with house():
                self.figure.savefig(stream, format=kind, metadata=metadata)
            self.made[kind] = stream.getvalue()
        return self.made[kind]

    def save(self, folder: Path | str, name: str) -> None:
        """Write name.png and name.svg."""
        for kind in ("png", "svg"):
            write_atomic(Path(folder) / f"{name}.{kind}", self.encoded(kind))

    def _repr_html_(self) -> str:
        """The figure in a notebook or page, with its sentence as alternative text and caption."""
        image = base64.b64encode(self.encoded("png")).decode()
        says = markup(self.says)
        return (
            f'<figure><img alt="{says}" style="max-width:100%" src="data:image/png;base64,{image}">'
            f"<figcaption>{says}</figcaption></figure>"
        )


def made_with() -> dict[str, str]:
    """What a figure's bytes depend on besides the rows: each matplotlib version lays out text differently."""
    return {"command": "minilora figures --rows figures/rows.jsonl", "matplotlib": matplotlib.__version__}


def axes(columns: int = 1, lines: int = 1, size: tuple[float, float] | None = None) -> tuple[Figure, Any]:
    """An empty figure in the house style, and its axes (lines, columns)."""
    figure = Figure(figsize=size)
    return figure, figure.subplots(lines, columns, squeeze=False)


def shades(ranks: Sequence[Any]) -> dict[Any, Any]:
    """A colour of viridis for each rank or block, dark to light."""
    viridis, last = matplotlib.colormaps["viridis"], max(len(ranks) - 1, 1)
    return {r: viridis(0.85 * i / last) for i, r in enumerate(ranks)}


def few(ranks: Sequence[Any]) -> list[Any]:
    """The first, the middle and the last rank: as many curves as can be told apart from the back row."""
    return [r for i, r in enumerate(ranks) if i in (0, len(ranks) // 2, len(ranks) - 1)]


GAP = 6.0  # pixels between a curve and its name, which takes in a marker
SIDES = np.array([(x, y) for x in (-1, 0, 1) for y in (-1, 0, 1) if x or y])  # of a point that is named
PLACES = 60  # along a curve that are tried, at most
CLEAR = 30.0  # pixels from a name to the other curves; more is no better
FAR = np.full((1, 2), 1e6)  # for a curve that is alone


def name_lines(*panels: Axes, fontsize: float = 11) -> None:
    """Write the label of each line beside it, in its colour, where nothing else is drawn.

    Where there is no such place, the panel gets a legend instead. To be called last: a name is placed by the
    pixels of what is drawn.
    """
    figure: Any = panels[0].figure
    figure.draw_without_rendering()  # settles the layout
    for ax in panels:
        named = (line for line in ax.get_lines() if not str(line.get_label()).startswith("_"))
        lines = [line for line in named if len(pixels(line))]
        before = len(ax.texts)
        if not all(name_line(ax, line, fontsize) for line in lines):
            for name in ax.texts[before:]:
                name.remove()
            ax.legend(fontsize=fontsize)


def name_line(ax: Axes, line: Any, fontsize: float) -> bool:
    """Write the label of a line beside it; False if there is no place."""
    edges = [c.get_transform().transform(path.vertices) for c in ax.collections for path in c.get_paths()]
    others = [pixels(other) for other in ax.get_lines() if other is not line]
    taken = np.concatenate([*others, *map(dense, edges), *map(frame, ax.texts), FAR])
    name = ax.text(0, 0, line.get_label(), fontsize=fontsize, color=line.get_color(), ha="center",
                   va="center", transform=ax.transAxes, in_layout=False)  # fmt: skip
    half, mark, own = np.array(name.get_window_extent().size) / 2, radius(line), pixels(line)
    low, high = ax.get_window_extent().get_points()
    some = own[:: 1 + len(own) // PLACES]
    centres = (some[:, None] + SIDES * (half + GAP + mark)).reshape(-1, 2)
    inside = ((centres - half > low) & (centres + half < high)).all(1)
    clear = apart(centres, half, taken)
    free = inside & (clear > GAP) & (apart(centres, half, own) > mark + 1)
    late = np.arange(len(centres)) / len(centres)  # of places as good as each other the last one
    x, y = ax.transAxes.inverted().transform(
        centres[np.where(free, clear.clip(max=CLEAR) + late, -1).argmax()]
    )
    name.set_position((x, y))
    return bool(free.any())


def pixels(line: Any) -> np.ndarray:
    """Points of a line on the canvas, a few pixels apart, or the edges of its markers: (points, 2)."""
    ends = line.get_transform().transform(line.get_xydata())
    ends = ends[np.isfinite(ends).all(1)]
    if line.get_linestyle() != "None" and len(ends) > 1:
        return dense(ends)
    return (ends[:, None] + SIDES * radius(line)).reshape(-1, 2)


def radius(line: Any) -> float:
    """Half the size of a line's markers in pixels, 0 without markers."""
    marked = line.get_marker() not in ("", "None", None)
    return marked * line.get_markersize() * line.figure.dpi / 144


def frame(text: Any) -> np.ndarray:
    """The outline of a text on the canvas, as points."""
    (a, b), (c, d) = text.get_window_extent().get_points()
    return dense(np.array([(a, b), (c, b), (c, d), (a, d), (a, b)]))


def dense(corners: np.ndarray) -> np.ndarray:
    """Points on a path, at most three pixels apart."""
    steps = np.abs(np.diff(corners, axis=0)).max(1).clip(max=4000) // 3 + 1
    parts = zip(corners[:-1], corners[1:], steps.astype(int), strict=True)
    return np.concatenate([np.linspace(a, b, n, endpoint=False) for a, b, n in parts] + [corners[-1:]])


def apart(centres: np.ndarray, half: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Pixels from a box at each of the centres to the nearest point, 0 if one lies in it: (centres,)."""
    beyond = (np.abs(centres[:, None] - points) - half).clip(min=0)
    return np.hypot(*beyond.T).T.min(1)

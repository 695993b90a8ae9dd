"""The house style of all figures, and how they are saved. The only file that imports matplotlib.

Every figure is a Picture: the figure, and one sentence that says what it shows, for readers who cannot see
it. Colours are Okabe and Ito's (viridis for ordered quantities), never without a marker or line style. The
same rows give the same bytes.
"""

import base64
import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes as Axes
from matplotlib.figure import Figure as Figure

from ..formats.atomic import write_atomic
from ..table import markup

KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
BLUE, ORANGE, GREEN, PINK, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#666666"
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
styled = matplotlib.rc_context(STYLE)  # a decorator: sets the style while a function draws


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
            with matplotlib.rc_context(STYLE), warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Glyph ")  # missing glyph: a box in PNG, text in SVG
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

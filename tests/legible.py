"""What is wrong with a figure for readers in the back row, in words.

It is drawn once, and the boxes of its texts are those that the renderer used.
"""

import math
from collections.abc import Iterator
from itertools import combinations
from unittest import mock

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex, to_rgb
from matplotlib.container import BarContainer
from matplotlib.path import Path
from matplotlib.text import Text

from minilora.analysis.plotting import STYLE, Figure

METRES, WIDE = 4.0, 1.6  # to the reader; of the picture on the wall
MINUTES = 10  # of arc, of a capital that is read with ease: twice the 20/20 line of an eye chart
CAPITAL = 1493 / 2048  # of the size of DejaVu Sans
POINTS = 72 * METRES * math.radians(MINUTES / 60) / WIDE / CAPITAL  # of the smallest font, per inch of width
SLACK = 1.0  # pixels: boxes are of whole ones


def faults(figure: Figure) -> list[str]:
    """Everything that is wrong with a figure."""
    written: list[Text] = []
    draw = Text.draw

    def note(text: Text, renderer: object) -> None:
        if text.get_visible() and text.get_text().strip() and text not in written:
            written.append(text)
        draw(text, renderer)

    with matplotlib.rc_context(STYLE), mock.patch.object(Text, "draw", note):
        FigureCanvasAgg(figure).draw()
    laws = (outside(figure, written), overlapping(written), on_data(figure), small(figure, written))
    return [fault for law in (untitled(figure), *laws, ambiguous(figure), bars(figure)) for fault in law]


def box(text: Text) -> np.ndarray:
    """The corners of a text on the canvas (4, 2), turned as it is."""
    middle = np.mean(text.get_window_extent().get_points(), 0)
    angle = text.get_rotation()
    text.set_rotation(0)
    w, h = text.get_window_extent().size
    text.set_rotation(angle)
    c, s = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    corners = np.array([(-w, -h), (w, -h), (w, h), (-w, h)]) / 2
    return middle + corners @ np.array([(c, s), (-s, c)])


def depth(a: np.ndarray, b: np.ndarray) -> float:
    """By how many pixels two boxes overlap; below 0 if they are apart."""
    normals = [
        (p - q) / np.linalg.norm(p - q) for box in (a, b) for p, q in ((box[0], box[1]), (box[1], box[2]))
    ]
    spans = [((a @ n).min(), (a @ n).max(), (b @ n).min(), (b @ n).max()) for n in normals]
    return min(min(high_a, high_b) - max(low_a, low_b) for low_a, high_a, low_b, high_b in spans)


def untitled(figure: Figure) -> Iterator[str]:
    """A figure without a title."""
    if not (figure.get_suptitle() or any(ax.get_title() for ax in figure.axes)):
        yield "it has no title"


def outside(figure: Figure, written: list[Text]) -> Iterator[str]:
    """Texts beyond the canvas."""
    size = np.array(figure.canvas.get_width_height())
    for text in written:
        corners = box(text)
        if (corners < -SLACK).any() or (corners > size + SLACK).any():
            yield f"{text.get_text()!r} leaves the canvas"


def overlapping(written: list[Text]) -> Iterator[str]:
    """Texts on each other."""
    for (a, at), (b, there) in combinations([(text, box(text)) for text in written], 2):
        if depth(at, there) > SLACK:
            yield f"{a.get_text()!r} lies over {b.get_text()!r}"


def on_data(figure: Figure) -> Iterator[str]:
    """Names and legends on a curve, a point or the edge of a band."""
    for ax in figure.axes:
        boxes = [(repr(text.get_text()), box(text)) for text in ax.texts if text.get_text().strip()]
        if legend := ax.get_legend():
            (x, y), (u, v) = legend.get_window_extent().get_points()
            boxes.append(("the legend", np.array([(x, y), (u, y), (u, v), (x, v)])))
        for what, corners in boxes:
            frame = Path([*corners, corners[0]])
            for line in ax.get_lines():
                points = line.get_transform().transform(line.get_xydata())
                points = points[np.isfinite(points).all(1)]
                joined = line.get_linestyle() != "None" and len(points) > 1
                marked = line.get_marker() not in ("", "None", None)
                half = marked * line.get_markersize() * figure.dpi / 144
                edges = np.concatenate(
                    [points + half * np.array(side) for side in ((1, 0), (-1, 0), (0, 1), (0, -1))]
                )
                if frame.contains_points(edges).any() or (
                    joined and frame.intersects_path(Path(points), False)
                ):
                    yield f"{what} lies on {line.get_label()!r}"
            for some in ax.collections:
                offsets = some.get_offset_transform().transform(some.get_offsets())
                edges = [some.get_transform().transform_path(path) for path in some.get_paths()]
                shown = [edge for edge in edges if len(offsets) < 2 and np.isfinite(edge.vertices).all()]
                if frame.contains_points(offsets).any() or any(
                    frame.intersects_path(e, False) for e in shown
                ):
                    yield f"{what} lies on the edge of a band, or a point"


def small(figure: Figure, written: list[Text]) -> Iterator[str]:
    """Texts whose capitals are too small."""
    least = POINTS * figure.get_figwidth()
    for text in written:
        if text.get_fontsize() < least:
            yield f"{text.get_text()!r} has {text.get_fontsize():g} points; {least:.1f} are needed"


def ambiguous(figure: Figure) -> Iterator[str]:
    """Colours with two meanings: the labels of one colour share a part, as "float32" in "float32, unmerged".

    Lines without markers in black or grey are references; each is told apart by its dashes.
    """
    labels: dict[str, set[str]] = {}
    for ax in figure.axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            first = handle[0] if isinstance(handle, BarContainer | tuple) else handle
            colour = first.get_color() if hasattr(first, "get_color") else first.get_facecolor()
            colour = np.asarray(colour)[0] if np.ndim(colour) == 2 else colour
            plain = len(set(to_rgb(colour))) == 1
            if plain and getattr(first, "get_marker", lambda: None)() in ("", "None", None):
                continue
            labels.setdefault(to_hex(colour), set()).add(label)
    for colour, names in labels.items():
        if not set.intersection(*({part.strip() for part in name.split(",")} for name in names)):
            yield f"{colour} means {' and '.join(map(repr, sorted(names)))}"


def bars(figure: Figure) -> Iterator[str]:
    """Bars on a log axis, whose length says nothing."""
    for ax in figure.axes:
        for some in ax.containers:
            if isinstance(some, BarContainer):
                scale = ax.get_yscale() if some.orientation == "vertical" else ax.get_xscale()
                if scale != "linear":
                    yield f"bars on a {scale} axis"

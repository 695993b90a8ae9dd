"""What makes a figure readable from the back row can be broken; names of curves; the microscope's figures."""

from pathlib import Path

import matplotlib
import numpy as np
import pytest
from legible import POINTS, faults

from minilora.analysis import figures as views
from minilora.analysis import inspect
from minilora.analysis.plotting import (
    BLUE,
    GAP,
    GREY,
    ORANGE,
    STYLE,
    axes,
    few,
    name_lines,
    radius,
    styled,
)
from minilora.lora_files.recognise import adapters_at

ADAPTERS = Path(__file__).parents[1] / "fixtures"


@pytest.mark.parametrize(
    "adapter", ["adapters/untied--q-and-v", "lora_files/synthetic_names", "lora_files/mlx"]
)
def test_the_microscopes_figures_can_be_read(adapter):
    (path, *_) = adapters_at(ADAPTERS / adapter)
    for figure, picture in inspect.pictures(inspect.inspect(path)).items():
        assert not faults(picture.figure), figure


def test_long_names_and_many_layers_can_be_read():
    """As other tools name their modules."""
    from test_plotting import looked

    names = [
        f"model.layers.{i}.{'a_rather_long_name_of_a_block.' * 3}{kind}" for i in range(30) for kind in "qkv"
    ]
    some = [looked(f"{name}_proj_of_another_tool", 1.0 + i, [1.0, 0.5, 0.2]) for i, name in enumerate(names)]
    for draw in (views.heat_map, views.adapter_spectra):
        assert not faults(draw(some).figure), draw.__name__


# ---- the laws can be broken


@styled
def one(**how):
    """A figure with nothing wrong, and its axis."""
    figure, ((ax,),) = axes()
    ax.plot([1, 2, 3], [1, 2, 3], color=BLUE, marker="o", label="up", **how)
    ax.set_title("Does it rise?")
    return figure, ax


def test_a_figure_with_nothing_wrong_has_no_faults():
    assert not faults(one()[0])


BREAK = {
    "it has no title": lambda ax: ax.set_title(""),
    "leaves the canvas": lambda ax: ax.text(3, 1, "a long label", in_layout=False),
    "lies over 'Does it rise?'": lambda ax: ax.text(0.5, 1.02, "more", transform=ax.transAxes),
    "'here' lies on 'up'": lambda ax: ax.text(1.9, 1.95, "here"),
    "'mark' lies on 'up'": lambda ax: ax.text(1.995, 1.98, "mark", va="top"),  # beside the line
    "the legend lies on 'up'": lambda ax: ax.legend(loc="upper right"),
    "lies on the edge of a band": lambda ax: (
        ax.fill_between([1, 3], [1, 1], [1.5, 1.5]),
        ax.text(2, 1.45, "in"),
    ),
    "'tiny' has 4 points": lambda ax: ax.text(1, 2.5, "tiny", fontsize=4),
    "#0072b2 means 'down' and 'up'": lambda ax: ax.plot([1, 3], [3, 2.8], color=BLUE, label="down"),
    "bars on a log axis": lambda ax: (ax.bar([1, 2], [1, 2]), ax.set_yscale("log")),
}


@pytest.mark.parametrize("fault", BREAK)
def test_what_is_wrong_is_found(fault):
    figure, ax = one()
    with matplotlib.rc_context(STYLE):
        BREAK[fault](ax)
    assert any(fault in found for found in faults(figure)), faults(figure)


def test_references_may_share_grey_and_labels_of_a_colour_a_part():
    figure, ax = one()
    for y, dashes in ((1.2, ":"), (2.2, "--")):
        ax.axhline(y, color=GREY, linestyle=dashes, label=f"at {y}")
    for y, label in ((2.6, "float32, merged"), (2.8, "float32, unmerged")):
        ax.plot([1, 1.5], [y, y], color=ORANGE, label=label)
    assert not faults(figure)


def test_turned_labels_that_are_apart_do_not_overlap():
    figure, ax = one()
    with matplotlib.rc_context(STYLE):
        ax.set_xticks([1, 1.1, 1.2], ["a rather long name"] * 3, rotation=60, ha="right")
    assert not faults(figure)
    with matplotlib.rc_context(STYLE):
        ax.set_xticks([1, 1.02, 1.2], ["a rather long name"] * 3, rotation=60, ha="right")
    assert any("lies over" in fault for fault in faults(figure))


def test_the_smallest_letter_is_that_of_the_eye_chart():
    """Ten minutes of arc at four metres are 11.6 mm, of a picture of 1.6 m: a 137th of its width."""
    capital = POINTS / 72 * 1493 / 2048  # of an inch, per inch of width
    assert np.isclose(capital, 4 * np.tan(np.radians(10 / 60)) / 1.6, rtol=1e-5)  # tan x = x + x³ / 3


# ---- names beside curves


@styled
def crossing(count, label="curve {}"):
    figure, ((ax,),) = axes(size=(8, 5))
    x = np.linspace(0, 1, 20)
    rng = np.random.default_rng(count)
    for i in range(count):
        a, b = rng.uniform(0, 10, 2)
        ax.plot(x, a + (b - a) * x, color=f"C{i}", label=label.format(i), marker="os^Dv"[i % 5])
    ax.set_title("Which is which?")
    name_lines(ax)
    return figure, ax


@pytest.mark.parametrize("count", range(1, 9))
def test_names_stand_beside_their_curves_and_on_nothing(count):
    figure, ax = crossing(count)
    assert not faults(figure)
    assert [text.get_text() for text in ax.texts] == [f"curve {i}" for i in range(count)]
    assert [text.get_color() for text in ax.texts] == [line.get_color() for line in ax.get_lines()]
    for text, line in zip(ax.texts, ax.get_lines(), strict=True):
        (left, low), (right, high) = text.get_window_extent().get_points()
        x, y = line.get_transform().transform(np.column_stack([np.linspace(0, 1, 2000),
            np.interp(np.linspace(0, 1, 2000), *line.get_data())])).T  # fmt: skip
        away = np.hypot((left - x).clip(0) + (x - right).clip(0), (low - y).clip(0) + (y - high).clip(0))
        assert away.min() <= np.sqrt(2) * (GAP + radius(line)) + 1  # from the corner of its box; whole pixels


def test_without_room_for_names_there_is_a_legend():
    _, ax = crossing(3, label="a name {} " + "that is much too long for any place " * 3)
    assert not ax.texts
    assert len(ax.get_legend().get_texts()) == 3


@styled
def test_where_curves_are_everywhere_there_is_a_legend():
    _, ((ax,),) = axes()
    for y in np.linspace(0, 1, 40):  # some eight pixels apart
        ax.axhline(y, color=GREY)
    ax.plot([0, 1], [0.5, 0.51], color=BLUE, label="one of many")
    name_lines(ax)
    assert not ax.texts
    assert ax.get_legend()


def test_few_are_the_first_the_middle_and_the_last():
    assert few([1, 2, 4, 8, 16, 32, 64]) == [1, 8, 64]
    assert [few(range(n)) for n in range(5)] == [[], [0], [0, 1], [0, 1, 2], [0, 2, 3]]

"""What the experiment with the size of the base found: rows -> tables, and two figures.

A figure has its question as its title and the answer, computed from the rows, below it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import cycle

import numpy as np

from ..analysis.plotting import BLUE, GREEN, GREY, ORANGE, PINK, Axes, Picture, axes, shades, styled
from ..errors import ConfigError
from ..table import Table, counted
from .harness import Row
from .rank_figures import NATS, POWERS, log_axis
from .reading import LEVEL, crossing, median_of, spread, title

LOOKS = ((BLUE, "o", "-"), (ORANGE, "s", "--"), (GREEN, "^", "-."), (PINK, "D", ":"))
MARKS = ("o", "s", "^", "D", "v", "P", "X")
HEAD = ("r", "parameters", "learning rate", "test loss", "less full fine-tuning's", "gap closed")


@dataclass
class Arm:
    """What was found on the base of one width; rank 0 is full fine-tuning."""

    base: Row
    losses: dict[int, np.ndarray] = field(default_factory=dict)  # rank -> (seeds,), infinite if diverged
    rates: dict[int, float] = field(default_factory=dict)
    parameters: dict[int, int] = field(default_factory=dict)

    @property
    def width(self) -> int:
        """Of the base."""
        return int(self.base["config"]["width"])

    @property
    def ranks(self) -> list[int]:
        """Of LoRA, in order."""
        return sorted(r for r in self.losses if r)

    @property
    def full(self) -> float:
        """The median test loss of full fine-tuning."""
        return float(np.median(self.losses[0]))

    @property
    def gap(self) -> float:
        """What full fine-tuning gains, in nats."""
        return float(self.base["test"] - self.full)

    def share(self, rank: int) -> np.ndarray:
        """Of the gap, (seeds,): what LoRA closes."""
        return (self.base["test"] - self.losses[rank]) / self.gap

    def left(self, rank: int) -> np.ndarray:
        """(seeds,): the loss of LoRA less that of full fine-tuning, in nats."""
        return self.losses[rank] - self.full

    def needed(self) -> np.ndarray:
        """(seeds,): the rank that closes 90%, between two ranks that were tried, on the log scale.

        The least rank if it is enough, infinite if none is.
        """
        shares = np.stack([self.share(r) for r in self.ranks])
        return np.array([crossing(self.ranks, some) for some in shares.T])

    @property
    def cost(self) -> float:
        """The parameters of LoRA at the median rank needed, over those of the base."""
        r, count = max(self.parameters.items())
        return float(np.median(self.needed())) * count / r / self.base["parameters"]

    def lines(self) -> list[tuple[str, ...]]:
        """Full fine-tuning and every rank, in the columns of HEAD."""
        return [
            (str(r) if r else "all weights", f"{self.parameters.get(r, 0):,}", f"{self.rates[r]:g}",
             spread(self.losses[r]), spread(self.left(r), "+.3f"), spread(self.share(r), ".0%"))
            for r in (0, *self.ranks)
        ]  # fmt: skip


def found(rows: Sequence[Row]) -> dict[int, Arm]:
    """Width -> what was found; ConfigError if a width has no trained seed."""
    arms: dict[int, Arm] = {}
    losses: dict[tuple[int, int], list[float]] = {}
    for row in rows:
        c = row["config"]
        if c["kind"] == "base":
            arms[c["width"]] = Arm(row)
        elif c["kind"] == "final":
            losses.setdefault((c["width"], c["rank"]), []).append(row.get("test", math.inf))
            arms[c["width"]].rates[c["rank"]] = c["rate"]
            if row["status"] == "done":
                arms[c["width"]].parameters[c["rank"]] = row["parameters"]
    for (width, rank), some in losses.items():
        arms[width].losses[rank] = np.array(some)
    if not arms or any(len(arm.losses) < 2 or 0 not in arm.losses for arm in arms.values()):
        raise ConfigError("a width has no trained seed; expected some with LoRA and with all weights")
    return arms


def about(rows: Sequence[Row]) -> tuple[str, str]:
    """The text, and how many seeds were trained, in words."""
    plan = rows[0]["config"]["plan"]
    return title(plan["target"]), counted(plan["seeds"], "seed", "seeds")


def told(arm: Arm, r: float) -> str:
    """A rank needed: a number, or that it lies beyond the ranks that were tried."""
    if math.isinf(r):
        return f"more than {max(arm.ranks)}"
    return f"at most {r:g}" if r == min(arm.ranks) else f"{r:.2g}"


def needs(arm: Arm) -> str:
    """The rank needed in words, "5.1 (8.0% of the width)"; the median over the seeds."""
    r = float(np.median(arm.needed()))
    return told(arm, r) + (f" ({r / arm.width:.1%} of the width)" if math.isfinite(r) else "")


def each(arms: dict[int, Arm], words: Callable[[Arm], str]) -> str:
    """Something of each width, in words."""
    return "; ".join(f"{width} wide: {words(arm)}" for width, arm in arms.items())


def remains(arms: dict[int, Arm], rank: int) -> str:
    """What is left of the gap at a rank, width by width."""
    return ", ".join(f"{np.median(arm.left(rank)):+.3f}" for arm in arms.values())


def tables(rows: Sequence[Row]) -> list[Table]:
    """The rank that each base needs; and every base and rank: best rate, and medians and ranges of losses."""
    arms, (text, seeds) = found(rows), about(rows)
    head = ("width", "parameters", "own text", text, "full fine-tuning", "rank for 90%", "range",
            "its parameters")  # fmt: skip
    short = [
        (str(width), f"{arm.base['parameters']:,}", f"{arm.base['own']:.3f}", f"{arm.base['test']:.3f}",
         spread(arm.losses[0]), needs(arm),
         " to ".join(told(arm, pick(arm.needed())) for pick in (min, max)),
         f"{arm.cost:.0%}" if math.isfinite(arm.cost) else "")
        for width, arm in arms.items()
    ]  # fmt: skip
    lines = [(str(width), *line) for width, arm in arms.items() for line in arm.lines()]
    return [
        Table(head, short, f"{NATS}, {median_of(seeds)}; ranks lie between two that were tried; "
              "its parameters are those of LoRA over the base's"),
        Table(("width", *HEAD), lines, f"{text}, {NATS}; {median_of(seeds)}"),
    ]  # fmt: skip


def sentences(rows: Sequence[Row]) -> list[str]:
    """What the tables show, in words; numbers are medians over the seeds."""
    arms = found(rows)
    ranks = next(iter(arms.values())).ranks
    few, many = min(ranks), max(ranks)
    widths = ", ".join(map(str, arms))
    return [
        f"The rank for 90% of what full fine-tuning gains: {each(arms, needs)}.",
        f"What full fine-tuning gains: {each(arms, lambda arm: f'{arm.gap:.3f} nats')}.",
        f"LoRA's loss less full fine-tuning's, with width {widths}: {remains(arms, few)} nats at r = {few}, "
        f"{remains(arms, many)} at r = {many}.",
        f"As a share, r = {few} closes "
        f"{', '.join(f'{np.median(arm.share(few)):.0%}' for arm in arms.values())} of the gap.",
    ]


def panel(ax: Axes, arms: dict[int, Arm], x: Callable[[Arm], list[float]]) -> None:
    """The share closed against something of the ranks: a line for each width, with its range over seeds."""
    for (width, arm), (colour, mark, style) in zip(arms.items(), cycle(LOOKS), strict=False):
        shares = np.stack([arm.share(r) for r in arm.ranks])
        ax.fill_between(x(arm), shares.min(1), shares.max(1), color=colour, alpha=0.2, linewidth=0)
        ax.plot(x(arm), np.median(shares, 1), color=colour, marker=mark, linestyle=style, markersize=7,
                label=f"{width} wide")  # fmt: skip
    ax.axhline(LEVEL, color=GREY, linewidth=1.5)
    ax.text(0.99, LEVEL - 0.01, "90%", color=GREY, ha="right", va="top", transform=ax.get_yaxis_transform())


@styled
def needed(rows: Sequence[Row]) -> Picture:
    """The share of the gap closed against the rank, and against the rank over the width."""
    arms, (text, seeds) = found(rows), about(rows)
    figure, (panels,) = axes(columns=2, size=(11.0, 5.2))
    panel(panels[0], arms, lambda arm: [float(r) for r in arm.ranks])
    panel(panels[1], arms, lambda arm: [100 * r / arm.width for r in arm.ranks])
    log_axis(panels[0], next(iter(arms.values())).ranks)
    low, high = panels[1].get_xlim()
    log_axis(panels[1], [p for p in POWERS if low <= p <= high], "rank r (% of the width)")
    panels[1].sharey(panels[0])
    panels[0].set_ylabel("share of the gap closed")
    panels[0].legend(loc="lower right")
    answer = each(arms, needs)
    figure.suptitle(f"Does a larger base need a lower rank for 90% of the gap?\n{answer}", fontsize=13)
    says = (
        f"Share of the gap to full fine-tuning that LoRA closes on {text} against rank, by width of the "
        f"base; {median_of(seeds)}. Rank for 90%: {answer}."
    )
    return Picture(figure, says)


@styled
def gap(rows: Sequence[Row]) -> Picture:
    """What is left to full fine-tuning against the width, a line for each rank."""
    arms, (text, seeds) = found(rows), about(rows)
    ranks = next(iter(arms.values())).ranks
    figure, ((ax,),) = axes(size=(9.0, 5.2))
    for (r, colour), mark in zip(shades(ranks).items(), cycle(MARKS), strict=False):
        nats = np.stack([arm.left(r) for arm in arms.values()])
        ax.fill_between([*arms], nats.min(1), nats.max(1), color=colour, alpha=0.2, linewidth=0)
        ax.plot([*arms], np.median(nats, 1), color=colour, marker=mark, markersize=7, label=f"r = {r}")
    ax.axhline(0, color=GREY, linewidth=1.5)
    log_axis(ax, [*arms], "width of the base")
    ax.set_ylabel(f"test loss less full fine-tuning's\n({NATS})")
    figure.legend(*ax.get_legend_handles_labels(), loc="outside right center")
    few, many = min(ranks), max(ranks)
    answer = f"by width: {remains(arms, few)} nats at r = {few}; {remains(arms, many)} at r = {many}"
    figure.suptitle(f"Does the gap to full fine-tuning narrow as the base grows?\n{answer}", fontsize=13)
    says = (
        f"Test loss of LoRA less that of full fine-tuning on {text} against the width of the base, by rank; "
        f"{median_of(seeds)}; {answer}."
    )
    return Picture(figure, says)


def pictures(rows: Sequence[Row]) -> dict[str, Picture]:
    """All figures, by file name."""
    return {"needed": needed(rows), "gap": gap(rows)}

"""What the experiment with scales and learning rates found: rows -> tables, and three figures.

A figure has its question as its title and the answer, computed from the rows, below it.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import numpy as np

from ..analysis.plotting import BLUE, GREEN, GREY, ORANGE, PINK, Axes, Picture, axes, shades, styled
from ..errors import ConfigError
from ..table import Table, counted
from .harness import Row
from .reading import median_of, spread
from .scale import SCALE, SCALINGS, Plan, scale_of

COLOURS, MARKS = (BLUE, ORANGE, GREEN, PINK), ("o", "s", "^", "D", "v", "P", "X")
Key = tuple[int, float, float]  # rank, scale and ratio of B's rate to A's; all weights have rank 0
FULL: Key = (0, 0.0, 1.0)
VALID, TEST = (f"{split} loss (nats per character)" for split in ("validation", "test"))


@dataclass
class Arm:
    """What was found of one way to train: validation loss by rate, and the test losses of all seeds."""

    curve: dict[float, float]
    tests: dict[float, np.ndarray]  # rate -> (seeds,), infinite if diverged

    @property
    def rate(self) -> float:
        """The learning rate with the smallest validation loss."""
        return min(self.curve, key=lambda rate: (self.curve[rate], rate))

    @property
    def best(self) -> np.ndarray:
        """The test losses at that rate."""
        return self.tests[self.rate]

    @property
    def optimum(self) -> float:
        """The minimum of the parabola over log rate through that rate and its neighbours, if it has both."""
        rates = sorted(self.curve)
        i = rates.index(self.rate)
        if not 0 < i < len(rates) - 1:
            return self.rate
        near = rates[i - 1 : i + 2]
        a, b, _ = np.polyfit(np.log(np.array(near) / self.rate), [self.curve[rate] for rate in near], 2)
        return self.rate * math.exp(-b / (2 * a)) if a > 0 else self.rate


@dataclass
class Found:
    """All arms, the plan, the base's test loss, and the rate that is best at the middle rank."""

    plan: Plan
    base: float
    arms: dict[Key, Arm]

    def scaled(self, scaling: str) -> dict[int, Arm]:
        """Rank -> what was found with one scaling."""
        return {r: self.arms[r, scale_of(scaling, r, self.plan), 1.0] for r in self.plan.ranks}

    @property
    def middle(self) -> Arm:
        """The arm in which all scalings agree."""
        return self.arms[self.plan.middle, SCALE, 1.0]

    @property
    def plus(self) -> dict[float, Arm]:
        """Ratio of LoRA+ -> what was found, one rate for both factors first."""
        return {ratio: self.arms[self.plan.middle, SCALE, ratio] for ratio in (1.0, *self.plan.ratios)}

    def cost(self, scaling: str) -> float:
        """Test loss at the middle rank's best rate less that at its own: the worst rank, in the median."""
        one = self.middle.rate
        return max(float(np.median(arm.tests[one] - arm.best)) for arm in self.scaled(scaling).values())

    def more(self, scaling: str) -> float:
        """Test loss of the largest rank less that of the middle one, both at the latter's best rate."""
        one, top = self.middle.rate, max(self.plan.ranks)
        return float(np.median(self.scaled(scaling)[top].tests[one] - self.middle.best))

    def times(self, scaling: str) -> dict[int, float]:
        """Rank -> the best rate (of the parabola) over that of full fine-tuning."""
        return {r: arm.optimum / self.arms[FULL].optimum for r, arm in self.scaled(scaling).items()}

    def apart(self, scaling: str) -> float:
        """The largest best rate over the smallest, without the first rank: the claim is of r = 4 on."""
        _, *some = self.times(scaling).values()
        return max(some) / min(some)


def found(rows: Sequence[Row]) -> Found:
    """The rows of a whole grid, read; ConfigError if nothing was measured."""
    arms: dict[Key, Arm] = {}
    losses: dict[tuple[Key, float], list[float]] = {}
    for row in rows:
        c = row["config"]
        key = c["rank"], c["scale"], c["ratio"]
        if c["kind"] == "search" and row["status"] == "done":
            arms.setdefault(key, Arm({}, {})).curve[c["rate"]] = row["valid"]
        elif c["kind"] == "final":
            losses.setdefault((key, c["rate"]), []).append(row.get("test", math.inf))
    if not losses:
        raise ConfigError("no seed was measured; expected at least one row of kind 'final'")
    for (key, rate), some in losses.items():
        arms[key].tests[rate] = np.array(some)
    (base,) = (row["test"] for row in rows if row["config"]["kind"] == "base")
    plan: Any = {k: tuple(v) if isinstance(v, list) else v for k, v in rows[0]["config"]["plan"].items()}
    return Found(Plan(**plan), base, arms)


def span(values: Mapping[int, float]) -> str:
    """The range of some factors, "8 to 12 times"."""
    low, high = (f"{pick(values.values()):.2g}" for pick in (min, max))
    return f"{low} times" if low == high else f"{low} to {high} times"


def each(number: Callable[[str], float], how: str = ".3f") -> str:
    """A number of each scaling, in words."""
    return ", ".join(f"{number(scaling):{how}} with {scaling}" for scaling in SCALINGS)


def tables(rows: Sequence[Row]) -> list[Table]:
    """Every scaling and rank, and LoRA+: best rates, and medians and ranges of the test losses."""
    f = found(rows)
    one, full = f.middle.rate, f.arms[FULL]
    seeds = counted(f.plan.seeds, "seed", "seeds")
    lines = [("all weights", "", "", f"{full.rate:g}", "1", spread(full.best), "")]
    for scaling in SCALINGS:
        times = f.times(scaling)
        lines += [
            (scaling, str(r), f"{scale_of(scaling, r, f.plan):.3g}", f"{arm.rate:g}", f"{times[r]:.1f}",
             spread(arm.best), spread(arm.tests[one]))
            for r, arm in f.scaled(scaling).items()
        ]  # fmt: skip
    head = ("scaling", "r", "s", "best rate", "× full's", "test loss at it", f"at {one:g}")
    lines_plus = [
        (f"{ratio:g}", f"{arm.rate:g}", f"{arm.rate * ratio:g}", spread(arm.best),
         spread(arm.best - f.middle.best, "+.3f"))
        for ratio, arm in f.plus.items()
    ]  # fmt: skip
    head_plus = ("B's rate over A's", "best rate of A", "of B", "test loss", "less that of one rate")
    caption = f"the base has {f.base:.3f}; × full's is of the parabolas' minima; {median_of(seeds)}"
    return [
        Table(head, lines, caption),
        Table(head_plus, lines_plus, f"LoRA+ at r = {f.plan.middle}; {seeds}"),
    ]


def sentences(rows: Sequence[Row]) -> list[str]:
    """What the tables show, in words; numbers are medians over the seeds."""
    f = found(rows)
    best = np.array([[np.median(f.scaled(s)[r].best) for s in SCALINGS] for r in f.plan.ranks])
    return [
        f"From r = {f.plan.middle} to {max(f.plan.ranks)} at the best rate of the former, the loss changes "
        f"by {each(f.more, '+.3f')}.",
        f"That one rate for all ranks costs at most {each(f.cost)}.",
        f"From r = {f.plan.ranks[1]} on, the best rates differ by a factor of {each(f.apart, '.2g')}.",
        "The best rate is "
        + ", ".join(f"{span(f.times(s))} full fine-tuning's with {s}" for s in SCALINGS) + ".",
        f"Each at its own best rate, the scalings are at most {np.ptp(best, 1).max():.3f} apart.",
        f"LoRA+ changes the loss by {gained(f)}.",
    ]  # fmt: skip


def gained(f: Found) -> str:
    """What LoRA+ changes, each ratio at its best rate: medians over the seeds."""
    changes = {ratio: float(np.median(arm.best - f.middle.best)) for ratio, arm in f.plus.items()}
    return ", ".join(f"{x:+.3f} at a ratio of {ratio:g}" for ratio, x in changes.items() if ratio != 1)


def curve(ax: Axes, arm: Arm, colour: Any, mark: str, label: str, style: str = "-", x: float = 1.0) -> None:
    """Loss against rate (times x), its minimum filled."""
    rates = sorted(arm.curve)
    ax.plot([x * rate for rate in rates], [arm.curve[rate] for rate in rates], color=colour, marker=mark,
            linestyle=style, label=label, markersize=6, markerfacecolor="white")  # fmt: skip
    ax.plot(x * arm.rate, arm.curve[arm.rate], color=colour, marker=mark, markersize=9, linestyle="")


def bounded(ax: Axes, best: Sequence[float]) -> None:
    """Leave out losses so high that the best ones cannot be told apart."""
    ax.set_ylim(min(best) - 0.02, max(best) + 0.1)


@styled
def rates(rows: Sequence[Row]) -> Picture:
    """The validation loss against the learning rate: a panel for each scaling, a line for each rank."""
    f = found(rows)
    colours = shades(f.plan.ranks)
    figure, (line,) = axes(columns=len(SCALINGS), size=(4.0 * len(SCALINGS) + 1.4, 4.6))
    tried = {rate for (_, _, ratio), arm in f.arms.items() if ratio == 1 for rate in arm.curve}
    for ax, scaling in zip(line, SCALINGS, strict=True):
        curve(ax, f.arms[FULL], GREY, "x", "all weights", "--")
        for (r, arm), mark in zip(f.scaled(scaling).items(), cycle(MARKS), strict=False):
            curve(ax, arm, colours[r], mark, f"r = {r}")
        bounded(ax, [min(arm.curve.values()) for arm in f.arms.values()])
        ax.set(xlabel="learning rate", xscale="log", xlim=(min(tried) / 1.3, max(tried) * 1.3), title=scaling)
    line[0].set_ylabel(VALID)
    figure.legend(*line[0].get_legend_handles_labels(), loc="outside right center")
    answer = f"from r = {f.plan.ranks[1]} on by a factor of {each(f.apart, '.2g')}"
    figure.suptitle(f"By how much does the best learning rate depend on the rank?\n{answer}")
    says = (
        f"Validation loss against learning rate after {f.plan.steps} steps; filled marks are minima. The "
        "best rate is "
        + ", ".join(f"{span(f.times(s))} that of all weights with {s}" for s in SCALINGS) + "."
    )  # fmt: skip
    return Picture(figure, says)


@styled
def one_rate(rows: Sequence[Row]) -> Picture:
    """The test loss against rank at the middle rank's best rate, and at each rank's own."""
    f = found(rows)
    figure, ((ax,),) = axes(size=(9.0, 5.0))
    one, at = f.middle.rate, range(len(f.plan.ranks))
    for scaling, colour, mark in zip(SCALINGS, COLOURS, MARKS, strict=False):
        arms = f.scaled(scaling).values()
        for losses, style in (([arm.tests[one] for arm in arms], "-"), ([arm.best for arm in arms], ":")):
            y = np.array(losses)
            ax.plot(at, np.median(y, 1), color=colour, marker=mark, linestyle=style, markersize=7,
                    label=scaling if style == "-" else None)  # fmt: skip
            if style == "-":
                ax.fill_between(at, y.min(1), y.max(1), color=colour, alpha=0.2, linewidth=0)
    ax.axhline(float(np.median(f.arms[FULL].best)), color=GREY, linestyle="--", label="all weights")
    ax.set_xticks(at, [str(r) for r in f.plan.ranks])
    ax.set(xlabel=f"rank r (solid: all at {one:g}; dotted: each at its own best rate)", ylabel=TEST)
    ax.legend(loc="best")
    bounded(ax, [float(np.median(arm.best)) for arm in f.arms.values()])
    answer = f"from r = {f.plan.middle} to {max(f.plan.ranks)}: {each(f.more, '+.3f')}"
    figure.suptitle(f"At one learning rate, does alpha / r collapse at high ranks?\n{answer}")
    says = (
        "Test loss at one learning rate for all ranks and at each rank's own; medians with the range of "
        f"{counted(f.plan.seeds, 'seed', 'seeds')}. One rate costs at most {each(f.cost)} nats."
    )  # fmt: skip
    return Picture(figure, says)


@styled
def lora_plus(rows: Sequence[Row]) -> Picture:
    """The validation loss against the rate for each ratio of LoRA+."""
    f = found(rows)
    figure, ((ax,),) = axes(size=(7.6, 5.0))
    for (ratio, arm), colour, mark in zip(f.plus.items(), cycle(COLOURS), cycle(MARKS), strict=False):
        label = "one rate" if ratio == 1 else f"B {ratio:g}× as fast as A"
        curve(ax, arm, colour, mark, label, x=math.sqrt(ratio))
    bounded(ax, [min(arm.curve.values()) for arm in f.plus.values()])
    ax.legend(loc="upper center")
    ax.set(xlabel="learning rate (geometric mean of A's and B's)", ylabel=VALID, xscale="log",
           title=f"Should B learn faster than A?\ntest loss at its best rate: {gained(f)}")  # fmt: skip
    says = (
        f"Validation loss against learning rate at r = {f.plan.middle}, by the ratio of B's rate to A's. "
        f"LoRA+ changes the test loss by {gained(f)}; medians of {counted(f.plan.seeds, 'seed', 'seeds')}."
    )
    return Picture(figure, says)


def pictures(rows: Sequence[Row]) -> dict[str, Picture]:
    """All figures, by file name."""
    return {"rates": rates(rows), "one_rate": one_rate(rows), "lora_plus": lora_plus(rows)}

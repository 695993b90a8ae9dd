"""What the experiment with starts found: rows -> a table, and two figures.

A figure has its question as its title and the answer, computed from the rows, below it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..analysis.plotting import (
    BLUE,
    GOLD,
    GREEN,
    GREY,
    ORANGE,
    PINK,
    SKY,
    WINE,
    Picture,
    axes,
    styled,
)
from ..errors import ConfigError
from ..table import Table, counted
from .harness import Row
from .initialisation import FULL, PLAIN, STARTS, STUCK, TAKEN_OFF, USUAL, Plan
from .reading import median_of, spread
from .scale_figures import TEST, Arm

RIVALS = ("PiSSA", "OLoRA", "LoRA-GA")  # of the usual start
LOOKS = dict(zip(STARTS, (
    (BLUE, "o", "-"), (ORANGE, "s", "--"), (GREEN, "^", "-."), (PINK, "D", "-"), (GREY, "v", ":"),
    (SKY, "P", "--"), (GOLD, "X", "-."), (WINE, "d", "-"), ("black", ">", ":"),
), strict=True))  # fmt: skip
PANELS = (("ΔW = s B A", PLAIN), ("B₀ A₀ taken off", (USUAL, *TAKEN_OFF)))
WINDOW = 5  # steps whose losses are one point


@dataclass
class Found:
    """The plan, the base's test loss, and what was found of each start and of all weights."""

    plan: Plan
    base: float
    arms: dict[str, Arm]
    finals: dict[str, list[Row]]  # the finished seeds of each at its own best rate

    @property
    def usual(self) -> Arm:
        """B zero and A uniform, as in PEFT."""
        return self.arms[USUAL]

    def change(self, start: str) -> np.ndarray:
        """Test loss less that of the usual start, (seeds,), each at its own best rate."""
        return self.arms[start].best - self.usual.best

    def change_at_one_rate(self, start: str) -> np.ndarray:
        """The like, both at the usual start's best rate."""
        return self.arms[start].tests[self.usual.rate] - self.usual.best

    def away(self, start: str) -> float:
        """By how much the test loss before the first step is off the base's, in the worst seed."""
        return max(abs(row["start"] - self.base) for row in self.finals[start])

    def gradients(self, start: str) -> dict[str, float]:
        """The norms of dA and dB before the first step: the largest of all seeds."""
        return {name: max(row["gradients"][name] for row in self.finals[start]) for name in "AB"}

    def path(self, start: str) -> np.ndarray:
        """The loss of each batch before its step less the base's on it, (seeds, steps)."""
        base = {row["config"]["seed"]: row["losses"] for row in self.finals[STUCK]}
        return np.array([
            np.subtract(row["losses"], base[row["config"]["seed"]]) for row in self.finals[start]
        ])  # fmt: skip

    def early(self, start: str) -> float:
        """The mean of `path` over the first quarter of the steps less the usual start's, in the median."""
        some = slice(0, math.ceil(self.plan.steps / 4))
        mean, usual = (float(np.median(self.path(name)[:, some].mean(1))) for name in (start, USUAL))
        return mean - usual


def found(rows: Sequence[Row]) -> Found:
    """The rows of a whole grid, read; ConfigError if a start has no finished seed at its own best rate."""
    arms = {start: Arm({}, {}) for start in (*STARTS, FULL)}
    for row in rows:
        c = row["config"]
        if c["kind"] == "search" and row["status"] == "done":
            arms[c["start"]].curve[c["rate"]] = row["valid"]
    finals = [row for row in rows if row["config"]["kind"] == "final"]
    for row in finals:
        c = row["config"]
        if c["start"] == STUCK:  # which no rate moves, so that none was searched
            arms[STUCK].curve[c["rate"]] = math.inf
        tests = arms[c["start"]].tests
        tests[c["rate"]] = np.append(tests.get(c["rate"], []), row.get("test", math.inf))
    done: dict[str, list[Row]] = {start: [] for start in arms}
    for row in finals:
        c = row["config"]
        if row["status"] == "done" and arms[c["start"]].curve and c["rate"] == arms[c["start"]].rate:
            done[c["start"]].append(row)
    if lost := [start for start, some in done.items() if not some]:
        raise ConfigError(f"{lost[0]} has no finished seed at its best rate; expected at least one")
    (base,) = (row["test"] for row in rows if row["config"]["kind"] == "base")
    plan: Any = {k: tuple(v) if isinstance(v, list) else v for k, v in rows[0]["config"]["plan"].items()}
    return Found(Plan(**plan), base, arms, done)


def tables(rows: Sequence[Row]) -> list[Table]:
    """Every start: before the first step, its best rate, and medians and ranges of the test losses."""
    f = found(rows)
    lines = []
    for start in STARTS:
        arm, norms = f.arms[start], f.gradients(start)
        lines.append(
            (start, f"{f.away(start):.1e}", *(f"{norms[name]:.1e}" for name in "AB"),
             "" if start == STUCK else f"{arm.rate:g}", spread(arm.best), spread(f.change(start), "+.3f"),
             spread(f.change_at_one_rate(start), "+.3f"))
        )  # fmt: skip
    full = f.arms[FULL]
    lines.append((FULL, "", "", "", f"{full.rate:g}", spread(full.best), spread(f.change(FULL), "+.3f"), ""))
    head = ("start", "off the base", "|dA|", "|dB|", "best rate", "test loss", f"less that of {USUAL}",
            f"all at {f.usual.rate:g}")  # fmt: skip
    caption = (
        f"r = {f.plan.rank}, {f.plan.steps} steps; the base has {f.base:.3f}; "
        f"{median_of(counted(f.plan.seeds, 'seed', 'seeds'))}; the first three numbers are the largest of "
        "all seeds, before the first step"
    )
    return [Table(head, lines, caption)]


def each(f: Found, number: Any, starts: Sequence[str] = RIVALS) -> str:
    """A number of each start, in words."""
    return ", ".join(f"{start} {np.median(number(start)):+.3f}" for start in starts)


def sentences(rows: Sequence[Row]) -> list[str]:
    """What the table shows, in words; numbers are medians over the seeds, in nats."""
    f = found(rows)
    stuck, others = f.gradients(STUCK), ("B zero (Gaussian A)", "A zero", "both random")
    searched = [start for start in STARTS if start != STUCK]
    exact = [start for start in STARTS if f.away(start) == 0]
    return [
        f"With both factors at zero |dA| is {stuck['A']:g} and |dB| {stuck['B']:g}: the loss stays within "
        f"{max(abs(f.arms[STUCK].best - f.base)):g} of the base's.",
        f"Before the first step the loss is the base's to the last digit with {', '.join(exact) or 'none'}.",
        f"The starts taken off begin within {max(map(f.away, TAKEN_OFF)):.0e} of it, both random "
        f"{f.away('both random'):.2f} off.",
        f"The best rates: {', '.join(f'{start} {f.arms[start].rate:g}' for start in searched)}.",
        f"At its own best rate, against {USUAL}: {each(f, f.change, others)}.",
        f"The starts taken off: {each(f, f.change, (*TAKEN_OFF,))}.",
        f"All at the best rate of {USUAL}, {f.usual.rate:g}: {each(f, f.change_at_one_rate, (*TAKEN_OFF,))}.",
        f"In the first quarter of the steps: {each(f, f.early, (*others, *TAKEN_OFF))}.",
    ]


@styled
def starts(rows: Sequence[Row]) -> Picture:
    """The test loss of every start, at its own best rate and at the usual start's."""
    f = found(rows)
    figure, ((ax,),) = axes(size=(9.6, 5.6))
    full = float(np.median(f.arms[FULL].best))
    low = min(float(losses.min()) for arm in f.arms.values() for losses in arm.tests.values())
    gap = max(f.base - low, 0.01)
    right = low + 0.4 * gap  # what lies beyond is written there
    for y, start in enumerate(STARTS):
        arm = f.arms[start]
        for losses, up, colour, mark, fill in (
            (arm.best, -0.17, BLUE, "o", BLUE), (arm.tests[f.usual.rate], 0.17, ORANGE, "s", "none"),
        ):  # fmt: skip
            middle = float(np.median(losses))
            ax.plot(losses, [y + up] * len(losses), mark, color=colour, markerfacecolor=fill, markersize=7)
            ax.plot(middle, y + up, "|", color="black", markersize=13, markeredgewidth=2)
            if not middle < right:
                ax.text(right, y + up, f"{middle:.2f} →", color=colour, ha="right", va="center")
    ax.plot([], [], "o", color=BLUE, label="at its own best rate")
    ax.plot([], [], "s", color=ORANGE, markerfacecolor="none", label=f"at {f.usual.rate:g}")
    ax.axvline(full, color=GREY, linestyle="--", label=FULL)
    ax.set_xlim(low - 0.03 * gap, right)
    ax.set_yticks(range(len(STARTS)), STARTS)
    ax.invert_yaxis()
    ax.set_xlabel(f"{TEST}; the base has {f.base:.2f}")
    figure.legend(loc="outside lower center", ncols=3)
    answer = f"at its own best rate against {USUAL}: {each(f, f.change)} nats"
    figure.suptitle(f"Does the start of LoRA matter?\n{answer}")
    says = (
        f"Test loss after {f.plan.steps} steps at r = {f.plan.rank}; points are seeds, bars medians. The "
        f"base has {f.base:.3f}, all weights trained {full:.3f}. {answer[0].upper()}{answer[1:]}."
    )
    return Picture(figure, says)


@styled
def first_steps(rows: Sequence[Row]) -> Picture:
    """The loss of the first batch less the base's, then of every few, over the first half of the steps."""
    f = found(rows)
    figure, (line,) = axes(columns=2, size=(11.0, 6.0))
    count = math.ceil(f.plan.steps / 2)
    groups = [[0], *(list(range(i, min(i + WINDOW, count))) for i in range(1, count, WINDOW))]
    x = [1 + float(np.mean(steps)) for steps in groups]
    paths = {start: [np.median(f.path(start)[:, steps].mean(1)) for steps in groups] for start in STARTS}
    lowest = min(map(min, paths.values()))
    for ax, (title, names) in zip(line, PANELS, strict=True):
        for start in names:
            colour, mark, style = LOOKS[start]
            ax.plot(x, paths[start], color=colour, linestyle=style, marker=mark, markersize=7, label=start)
        ax.set(xlabel="step", ylim=(1.2 * lowest - 0.01, -0.6 * lowest), title=title)
    jump = f"{np.median(f.path('both random')[:, 0]):+.2f}"
    line[0].set_ylabel("loss less the base's on the same batch\n(nats per character)")
    line[0].annotate(f"↑ both random begins at {jump}", (0.98, 0.98), xycoords="axes fraction",
                     ha="right", va="top", color=LOOKS["both random"][0])  # fmt: skip
    handles = {
        name: handle for ax in line for handle, name in zip(*ax.get_legend_handles_labels(), strict=True)
    }
    figure.legend([*handles.values()], [*handles], loc="outside lower center", ncols=5)
    answer = f"the mean of the first quarter of the steps against {USUAL}: {each(f, f.early)} nats"
    figure.suptitle(f"How does the loss go over the first steps?\n{answer}")
    says = (
        f"Training loss less the base's, each start at its own best rate: the first batch, then means of "
        f"{WINDOW}; median of {counted(f.plan.seeds, 'seed', 'seeds')}. Both random begins "
        f"{jump} off the base; {answer}."
    )
    return Picture(figure, says)


def pictures(rows: Sequence[Row]) -> dict[str, Picture]:
    """All figures, by file name."""
    return {"starts": starts(rows), "first_steps": first_steps(rows)}

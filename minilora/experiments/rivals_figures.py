"""What the experiment with LoRA's rivals found: rows -> two tables, and two figures.

A figure has its question as its title and the answer, computed from the rows, below it. LoRA's loss at a
count of parameters between two of its ranks is read off the line between them, over the log of the count.
"""

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..analysis.plotting import BLUE, GREEN, GREY, ORANGE, PINK, SKY, WINE, Picture, axes, styled
from ..errors import ConfigError
from ..table import Table, counted
from .harness import Row
from .reading import median_of, said, spread
from .rivals import FULL, LARGEST, LORA, PROMPT, RANKED, SIZED, Plan
from .scale_figures import TEST, Arm

Key = tuple[str, int]  # method, and the rank of the LoRA that it is sized for, or 0
UNMERGED = ("bottleneck, Houlsby", "bottleneck, Pfeiffer", "prefix", PROMPT)  # what no weight can hold
LOOKS = dict(zip(LARGEST, (
    (BLUE, "o", "-"), (GREEN, "s", "--"), (PINK, "D", ":"), (ORANGE, "^", "-"), (SKY, "v", "--"),
    (WINE, "X", ":"),
), strict=True))  # fmt: skip
ALIKE = 0.1  # as many parameters: that far from LoRA's, at most


@dataclass
class Found:
    """The plan, the base's test loss, and of each method and size what was found, n, and parameters."""

    plan: Plan
    base: float
    arms: dict[Key, Arm]
    sizes: dict[Key, tuple[int, int]]

    def key(self, method: str) -> Key:
        """That of a method at the plan's rank, or of its one size."""
        return method, self.plan.rank if (method, self.plan.rank) in self.arms else 0

    def loss(self, key: Key) -> float:
        """The median test loss."""
        return float(np.median(self.arms[key].best))

    def parameters(self, method: str) -> int:
        """Its count of parameters at the plan's rank."""
        return self.sizes[self.key(method)][1]

    def change(self, method: str, rank: int = 0) -> np.ndarray:
        """Test loss less LoRA's at a rank, the plan's unless given, each at its best rate, (seeds,)."""
        rank = rank or self.plan.rank
        key = (method, rank) if (method, rank) in self.arms else (method, 0)
        return self.arms[key].best - self.arms[LORA, rank].best

    def closed(self, key: Key) -> float:
        """The share of the gap from the base to full fine-tuning that it closes, in the median."""
        return (self.base - self.loss(key)) / (self.base - self.loss((FULL, 0)))

    def ordered(self) -> list[str]:
        """All methods at the plan's rank, the smallest median loss first."""
        return sorted(self.plan.methods, key=lambda method: self.loss(self.key(method)))

    def curve(self, method: str) -> list[Key]:
        """All sizes of a method, the fewest parameters first."""
        return sorted((key for key in self.arms if key[0] == method), key=lambda key: self.sizes[key][1])

    def several(self) -> list[str]:
        """The methods of several sizes."""
        return [method for method in LARGEST if len(self.curve(method)) > 1]

    def alike(self) -> list[str]:
        """LoRA's rivals with as many parameters, the smallest loss first."""
        goal = self.parameters(LORA)
        near = (m for m in self.ordered() if abs(self.parameters(m) / goal - 1) <= ALIKE)
        return [method for method in near if method != LORA]

    def above(self, key: Key) -> float:
        """Median loss less that of LoRA with as many parameters; NaN beyond LoRA's sizes."""
        counts, losses = zip(*((self.sizes[k][1], self.loss(k)) for k in self.curve(LORA)), strict=True)
        x = self.sizes[key][1]
        if not counts[0] * (1 - ALIKE) <= x <= counts[-1] * (1 + ALIKE):
            return math.nan
        return self.loss(key) - float(np.interp(math.log(x), np.log(counts), losses))

    def rises(self, method: str) -> float:
        """The most that its median loss rises from one size to a larger one; negative if it only falls."""
        some = [self.loss(key) for key in self.curve(method)]
        return max((b - a for i, a in enumerate(some) for b in some[i + 1 :]), default=-math.inf)


def found(rows: Sequence[Row]) -> Found:
    """The rows of a whole grid, read; ConfigError if a method has no finished search or seed."""
    arms: dict[Key, Arm] = {}
    sizes: dict[Key, tuple[int, int]] = {}
    for row in rows:
        c = row["config"]
        if c["kind"] == "base":
            continue
        arm = arms.setdefault((c["method"], c["rank"]), Arm({}, {}))
        if row["status"] == "done":
            sizes[c["method"], c["rank"]] = c["n"], row["parameters"]
        if c["kind"] == "final":
            arm.tests[c["rate"]] = np.append(arm.tests.get(c["rate"], []), row.get("test", math.inf))
        elif row["status"] == "done":
            arm.curve[c["rate"]] = row["valid"]
    for (method, _), arm in arms.items():
        if not arm.curve or arm.rate not in arm.tests:
            raise ConfigError(f"{method} has no finished search or no seed; expected at least one of each")
    (base,) = (row["test"] for row in rows if row["config"]["kind"] == "base")
    plan: Any = {k: tuple(v) if isinstance(v, list) else v for k, v in rows[0]["config"]["plan"].items()}
    return Found(Plan(**plan), base, arms, sizes)


def blank(x: float, how: str) -> str:
    """A number, or nothing for NaN."""
    return "" if math.isnan(x) else said(x, how)


def tables(rows: Sequence[Row]) -> list[Table]:
    """Every method at the plan's rank; and those of several sizes: medians and ranges of the test losses."""
    f = found(rows)
    lines, more = [], []
    for method in f.ordered():
        key = f.key(method)
        (n, count), arm = f.sizes[key], f.arms[key]
        lines.append(
            (method, str(n or ""), f"{count:,}", f"{arm.rate:g}", spread(arm.best),
             spread(f.change(method), "+.3f"), blank(f.above(key), "+.3f"), f"{f.closed(key):.0%}")
        )  # fmt: skip
    for method in LARGEST:
        for key in f.curve(method):
            (n, count), arm = f.sizes[key], f.arms[key]
            more.append((method, str(n), f"{count:,}", f"{arm.rate:g}", spread(arm.best),
                         blank(f.above(key), "+.3f")))  # fmt: skip
    head = ("method", "n", "parameters", "best rate", "test loss")
    against, alike = f"less {LORA}'s, r = {f.plan.rank}", f"less {LORA}'s with as many"
    seeds, few = (counted(n, "seed", "seeds") for n in (f.plan.seeds, f.plan.few_seeds))
    caption = f"the base has {f.base:.3f}; {median_of(seeds)}"
    return [
        Table((*head, against, alike, "of the gap to full"), lines, caption),
        Table((*head, alike), more, f"{caption}, or of {few} beside r = {f.plan.rank}"),
    ]


def each(numbers: Mapping[str, float]) -> str:
    """A number of each method, in words."""
    return "; ".join(f"{name} {said(x, '+.3f')}" for name, x in numbers.items())


def changes(f: Found, methods: Sequence[str]) -> dict[str, float]:
    """Method -> the median change of the loss against LoRA's at the plan's rank."""
    return {method: float(np.median(f.change(method))) for method in methods}


def falls(f: Found) -> dict[str, float]:
    """Method -> median loss with the most parameters less that with the fewest."""
    return {m: f.loss(f.curve(m)[-1]) - f.loss(f.curve(m)[0]) for m in f.several()}


def rising(f: Found) -> str:
    """The methods whose loss rises with more parameters, and by how much at most."""
    shown = 0.0005  # less is +0.000
    return each({m: f.rises(m) for m in f.several() if f.rises(m) >= shown}) or "nowhere"


def sentences(rows: Sequence[Row]) -> list[str]:
    """What the tables show, in words; numbers are medians over the seeds, in nats."""
    f = found(rows)
    goal, largest = f.parameters(LORA), f.curve(LORA)[-1]
    beside = [method for method in RANKED if method != LORA and method in f.plan.methods]
    single = [method for method in f.ordered() if f.key(method)[1] == 0 and method != FULL]
    told = [
        f"{LORA} of rank {f.plan.rank} closes {f.closed(f.key(LORA)):.0%} of the gap from the base to full "
        f"fine-tuning with {goal / f.parameters(FULL):.1%} of its parameters.",
        f"With as many, within {ALIKE:.0%} of {goal:,}, against {LORA}: {each(changes(f, f.alike()))}.",
        "Of the gap, methods of one size close: "
        + "; ".join(f"{m} {f.closed(f.key(m)):.0%} with {f.parameters(m):,} parameters" for m in single)
        + ".",
        f"From the fewest to the most parameters the loss goes: {each(falls(f))}.",
        f"Where more parameters raise the loss: {rising(f)}.",
    ]
    if beside:
        alike = {method: f.above(f.key(method)) for method in beside}
        told.append(
            f"With more beside the same {LORA}: {each(changes(f, beside))}. Against {LORA} with as many "
            f"parameters: {each(alike)}."
        )
    if "DoRA" in beside:
        ranks = {str(r): float(np.median(f.change("DoRA", r))) for _, r in f.curve("DoRA")}
        told.append(f"DoRA's loss less {LORA}'s of the same rank, at r = {each(ranks)}.")
    for key in f.curve("VeRA")[:1]:
        told.append(
            f"VeRA with {f.sizes[key][1]:,} parameters against {LORA} with {f.sizes[largest][1]:,}: "
            f"{said(f.loss(key) - f.loss(largest), '+.3f')}."
        )
    return told


def wrapped(answer: str) -> str:
    """An answer in lines that fit below a title."""
    for sign in "+-":  # a number stays beside its name
        answer = answer.replace(f" {sign}", f"\u00a0{sign}")
    return textwrap.fill(answer, 100, break_on_hyphens=False)


@styled
def rivals(rows: Sequence[Row]) -> Picture:
    """The test loss of every method at its best rate, beside the base and full fine-tuning."""
    f = found(rows)
    figure, ((ax,),) = axes(size=(10.4, 6.4))
    methods = f.ordered()
    for y, method in enumerate(methods):
        colour, mark = (ORANGE, "s") if method in UNMERGED else (BLUE, "o")
        losses = f.arms[f.key(method)].best
        ax.plot(losses, [y] * len(losses), mark, color=colour, markerfacecolor="none", markersize=8)
        ax.plot(np.median(losses), y, "|", color="black", markersize=20, markeredgewidth=2)
    ax.plot([], [], "o", color=BLUE, markerfacecolor="none", label="merges into the weights")
    ax.plot([], [], "s", color=ORANGE, markerfacecolor="none", label="cannot be merged")
    ax.axvline(f.loss((FULL, 0)), color=GREY, linestyle="--", label=FULL)
    ax.axvline(f.base, color=GREY, linestyle=":", label="the base")
    ax.set_yticks(range(len(methods)), [f"{m}\n{f.parameters(m):,}" for m in methods])
    ax.invert_yaxis()
    ax.set(xlabel=TEST, ylabel="method and its trained parameters")
    figure.legend(loc="outside lower center", ncols=4)
    answer = f"against {LORA} of rank {f.plan.rank} with as many: {each(changes(f, f.alike()))}"
    figure.suptitle(f"Which way of fine-tuning learns most with as many parameters?\n{wrapped(answer)}")
    says = (
        f"Test loss after {counted(f.plan.steps, 'step', 'steps')}, each method at its best rate; points "
        f"are seeds, bars medians. The base has {f.base:.3f}, {FULL} {f.loss((FULL, 0)):.3f}; {answer}."
    )
    return Picture(figure, says)


@styled
def parameters(rows: Sequence[Row]) -> Picture:
    """Loss against the count of trained parameters, whole and near LoRA's."""
    f = found(rows)
    figure, (line,) = axes(columns=2, size=(13.0, 6.0))
    sized = [key for method in RANKED | SIZED if method not in LARGEST for key in f.curve(method)]
    single = [f.key(method) for method in f.plan.methods if f.key(method)[1] == 0 and method != FULL]
    for ax, named, offset, side in zip(
        line, (single, sized), ((8, 5), (-16, -22)), ("left", "right"), strict=True
    ):
        first = ax is line[0]  # whose labels are the legend's
        for method in (method for method in LARGEST if f.curve(method)):
            colour, mark, style = LOOKS[method]
            x = [f.sizes[key][1] for key in f.curve(method)]
            tests = [f.arms[key].best for key in f.curve(method)]
            ax.plot(x, [np.median(t) for t in tests], mark, color=colour, linestyle=style, markersize=8,
                    label=method * first)  # fmt: skip
            ax.fill_between(x, [t.min() for t in tests], [t.max() for t in tests], color=colour, alpha=0.15)
        for key in single + sized:
            at = f.sizes[key][1], f.loss(key)
            ax.plot(*at, "*", color="black", markersize=11)
            if key in named:
                ax.annotate(key[0], at, offset, textcoords="offset points", ha=side)
        all_of = f"{FULL}, {f.parameters(FULL):,}"
        ax.axhline(f.loss((FULL, 0)), color=GREY, linestyle="--", label=all_of * first)
        ax.axhline(f.base, color=GREY, linestyle=":", label="the base" * first)
        ax.set(xscale="log", xlabel="trained parameters", ylabel=TEST)
    low, high = f.loss((FULL, 0)), max(float(f.arms[key].best.max()) for key in f.curve(LORA))
    gap = max(high - low, 0.01)
    line[1].set(ylim=(low - 0.1 * gap, low + 1.4 * gap), title=f"near {LORA}")
    line[1].set_xlim(0.7 * f.sizes[f.curve(LORA)[0]][1])
    line[0].set_xlim(right=line[1].get_xlim()[1])
    figure.legend(loc="outside lower center", ncols=4)
    answer = f"from the fewest to the most: {each(falls(f))}; where more raise the loss: {rising(f)}"
    figure.suptitle(f"Do more parameters help each method?\n{wrapped(answer)}")
    says = (
        "Test loss against trained parameters, each method and size at its best rate; lines are medians "
        f"over seeds, bands ranges. {answer[0].upper()}{answer[1:]}."
    )
    return Picture(figure, says)


def pictures(rows: Sequence[Row]) -> dict[str, Picture]:
    """All figures, by file name."""
    return {"rivals": rivals(rows), "parameters": parameters(rows)}

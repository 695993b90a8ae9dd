"""What the experiment with random subspaces found: rows -> tables, and four figures.

A figure has its question as its title and the answer, computed from the rows, below it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..analysis.plotting import BLUE, GREEN, GREY, ORANGE, PINK, Axes, Picture, axes, styled
from ..errors import ConfigError
from ..table import Table
from .harness import Row
from .intrinsic_dimension import BASE, Plan
from .intrinsic_tasks import DIGITS
from .reading import LEVEL, crossing, spread

LOOKS = ((BLUE, "o", "-"), (ORANGE, "s", "--"), (GREEN, "^", "-."), (PINK, "D", ":"))
Key = tuple[str, int, int]  # target, width and steps of pretraining of a start
NUMBERS, SPACE = "numbers trained", "d, the dimension of the random subspace"
LI = "MNIST took 750 of 199,210 (0.38%) in Li et al. 2018"  # in a network of dense layers, by accuracy
MEASURES = {"loss": "share of the loss gap closed", "accuracy": "accuracy over full training's"}


@dataclass
class Result:
    """What one way to train gave: how many numbers it trains, and the seeds' results on test."""

    parameters: int
    loss: np.ndarray  # (seeds,), infinite where a run diverged
    accuracy: np.ndarray  # 0 there
    rank: np.ndarray  # the effective rank of ΔW over the largest; 0 there


@dataclass
class Arm:
    """What was found from one start on one task."""

    start: Row
    results: dict[tuple[str, int], Result] = field(default_factory=dict)  # by method and size

    @property
    def full(self) -> Result:
        """Training all weights."""
        return self.results["full", 0]

    def share(self, result: Result, measure: str) -> np.ndarray:
        """Of a result (seeds,): the loss gap that it closes, or its accuracy over full training's median."""
        if measure == "accuracy":
            return result.accuracy / np.median(self.full.accuracy)
        before = self.start["test"]
        return (before - result.loss) / (before - np.median(self.full.loss))

    def curve(self, method: str, measure: str = "loss") -> dict[int, np.ndarray]:
        """Numbers trained -> the share, for one method with several sizes."""
        some = [result for (name, _), result in self.results.items() if name == method]
        return {result.parameters: self.share(result, measure) for result in some}

    def d90(self, measure: str = "loss", method: str = "subspace") -> np.ndarray:
        """The d at which each seed's share reaches 90%: between two d's that were tried, on the log scale.

        0 if the start reaches it, infinite if no d does.
        """
        curve = self.curve(method, measure)
        if measure == "accuracy" and self.start["accuracy"] / np.median(self.full.accuracy) >= LEVEL:
            return np.zeros_like(self.full.loss)
        return np.array([crossing([*curve], some) for some in np.stack([*curve.values()]).T])


@dataclass
class Found:
    """The plan, and all arms."""

    plan: Plan
    arms: dict[Key, Arm]

    def base(self, target: str | None = None) -> Arm:
        """From the base, on the first text or another."""
        return self.arms[target or self.plan.targets[0], BASE, 0]

    def random(self, target: str | None = None) -> Arm:
        """From random weights."""
        return self.arms[target or self.plan.targets[0], self.plan.widths[-1], 0]

    def digits(self) -> Arm:
        """From random weights, on digits; ConfigError if there is none."""
        some = [arm for (target, _, _), arm in self.arms.items() if target == DIGITS]
        if not some:
            raise ConfigError("no row is of digits; expected a folder whose grid is done")
        return some[0]

    def wide(self) -> dict[int, Arm]:
        """Width -> the longest pretraining here, on the first text."""
        return {w: self.arms[self.plan.targets[0], w, self.plan.pretraining[-1]] for w in self.plan.widths}

    def trained(self) -> dict[str, Arm]:
        """Name -> arm of the widest starts on the first text, the longer pretrained the later."""
        first, width = self.plan.targets[0], self.plan.widths[-1]
        here = {f"after {n} steps": self.arms[first, width, n] for n in self.plan.pretraining}
        return {"random weights": self.random(), **here, "the base": self.base()}

    def pairs(self) -> list[tuple[Result, Result]]:
        """LoRA and the random subspace with as many numbers, on the base."""
        results = self.base().results
        sizes = {result.parameters: result for (name, _), result in results.items() if name == "subspace"}
        lora = [result for (name, _), result in results.items() if name == "lora"]
        return [(result, sizes[result.parameters]) for result in lora if result.parameters in sizes]


def found(rows: Sequence[Row]) -> Found:
    """The rows of a whole grid, read; ConfigError if a start has no seed with all weights."""
    arms: dict[Key, Arm] = {}
    finals: dict[tuple[Key, tuple[str, int]], list[Row]] = {}
    for row in rows:
        c = row["config"]
        key = c["target"], c["width"], c["pretrained"]
        if c["kind"] == "start":
            arms[key] = Arm(row)
        elif c["kind"] == "final":
            finals.setdefault((key, (c["method"], c["size"])), []).append(row)
    for (key, how), some in finals.items():
        loss, accuracy, rank = (
            np.array([row.get(name, lost) for row in some])
            for name, lost in (("test", math.inf), ("accuracy", 0.0), ("rank", 0.0))
        )
        numbers = max(row.get("parameters", how[1]) for row in some)
        arms[key].results[how] = Result(numbers, loss, accuracy, rank)
    if not arms or any(("full", 0) not in arm.results for arm in arms.values()):
        raise ConfigError("a start has no trained seed; expected rows of kind 'final' for each")
    plan: Any = {k: tuple(v) if isinstance(v, list) else v for k, v in rows[0]["config"]["plan"].items()}
    return Found(Plan(**plan), arms)


def dimension(arm: Arm, measure: str = "loss", method: str = "subspace") -> str:
    """d90 of an arm in words: "21,900 (6.4%)", a share of all parameters."""
    d, tried = float(np.median(arm.d90(measure, method))), arm.curve(method)
    if math.isinf(d):
        return f"more than {max(tried):,}"
    few = "at most " if d == min(tried) else ""
    return f"{few}{float(f'{d:.3g}'):,.0f} ({100 * d / arm.start['parameters']:.2g}%)" if d else "0"


def named(key: Key) -> str:
    """A start in words."""
    _, width, steps = key
    return "the base" if width == BASE else f"{width} wide, {f'{steps} steps' if steps else 'random'}"


def tables(rows: Sequence[Row]) -> list[Table]:
    """Every start, method and size: medians and ranges of loss, gap closed, accuracy and effective rank."""
    f = found(rows)
    lines = []
    for key, arm in f.arms.items():
        place = (key[0], named(key))
        before = arm.start
        lines.append((*place, "none", "0", f"{before['test']:.3f}", "", f"{before['accuracy']:.3f}", ""))
        lines += [
            (*place, f"LoRA, r = {size}" if method == "lora" else method, f"{result.parameters:,}",
             spread(result.loss), spread(arm.share(result, "loss"), ".2f"), spread(result.accuracy),
             f"{np.median(result.rank):.3f}")
            for (method, size), result in arm.results.items()
        ]  # fmt: skip
    head = ("task", "start", "trained", "numbers", "test loss", "gap closed", "accuracy", "effective rank")
    starts = [
        (key[0], named(key), f"{arm.start['parameters']:,}", *(dimension(arm, m) for m in MEASURES))
        for key, arm in f.arms.items()
    ]
    return [
        Table(("task", "start", "parameters", "d90 of the loss", "d90 of the accuracy"), starts,
              "d90 lies between two d's that were tried; 0: the start has 90% of full training's accuracy"),
        Table(head, lines, "median and range over the seeds; effective rank over the largest possible"),
    ]  # fmt: skip


def sentences(rows: Sequence[Row]) -> list[str]:
    """What the tables show, in words; numbers are medians over the seeds."""
    f = found(rows)
    base, low = f.base(), min(f.plan.dims)
    return [
        *(
            f"On {target}, 90% of the loss gap takes {dimension(f.base(target))} from the base, "
            f"{dimension(f.random(target))} from random weights; 90% of the accuracy "
            f"{dimension(f.base(target), 'accuracy')} and {dimension(f.random(target), 'accuracy')}."
            for target in f.plan.targets
        ),
        f"At d = {low} ΔW has {np.median(base.results['subspace', low].rank):.2f} of the largest effective "
        f"rank; noise has {base.start['rank']:.2f}, full training {np.median(base.full.rank):.2f}.",
        f"LoRA against the random subspace with as many numbers: {against(f)}.",
        f"With a scale for each weight matrix (SAID) it takes {dimension(base, method='said')}.",
        "By width: " + "; ".join(f"{w}, {dimension(arm)}" for w, arm in f.wide().items()) + ".",
        f"Digits from scratch take {dimension(f.digits(), 'accuracy')} for 90% of full training's accuracy, "
        f"{np.median(f.digits().full.accuracy):.1%}, and {dimension(f.digits())} for 90% of the loss gap. "
        f"{LI}, which is not tested here.",
    ]


def against(f: Found) -> str:
    """How much more loss a random subspace has than LoRA with as many numbers; medians over the seeds."""
    more = {lora.parameters: float(np.median(other.loss - lora.loss)) for lora, other in f.pairs()}
    return ", ".join(f"{x:+.3f} nats with {n:,}" for n, x in more.items()) or "none has as many"


def panel(ax: Axes, curves: dict[str, dict[int, np.ndarray]], x: str, y: str, level: bool = True) -> None:
    """Median and range over the seeds against numbers trained, one line for each name."""
    for (name, curve), (colour, mark, style) in zip(curves.items(), LOOKS, strict=False):
        at, shares = [*curve], np.stack([*curve.values()])
        middles = np.median(shares, 1)
        ax.plot(at, middles, color=colour, marker=mark, linestyle=style, markersize=7, label=name)
        ax.fill_between(at, shares.min(1), shares.max(1), color=colour, alpha=0.2, linewidth=0)
    if level:
        ax.axhline(LEVEL, color=GREY, linewidth=1.5)
        ax.text(1.01, LEVEL, "90%", color=GREY, va="center", transform=ax.get_yaxis_transform())
    ax.set(xlabel=x, ylabel=y, xscale="log")
    ax.set_ylim(bottom=min(0, ax.get_ylim()[0]), top=max(1.05, ax.get_ylim()[1]))


@styled
def starts(rows: Sequence[Row]) -> Picture:
    """Both shares against d, from random weights, two pretrained bases and the base."""
    f = found(rows)
    figure, (panels,) = axes(columns=2, size=(11.0, 5.4))
    arms = f.trained()
    for ax, (measure, title) in zip(panels, MEASURES.items(), strict=True):
        panel(ax, {name: arm.curve("subspace", measure) for name, arm in arms.items()}, SPACE, title)
    for (name, arm), (colour, _, style) in zip(arms.items(), LOOKS, strict=False):
        at = arm.start["accuracy"] / np.median(arm.full.accuracy)
        panels[1].axhline(at, color=colour, linestyle=style, linewidth=1, label=f"{name}, before training")
    panels[0].legend(loc="lower right")
    panels[1].legend(handles=panels[1].get_lines()[-len(arms) :], loc="center right")
    answer = "; ".join(
        f"of the {measure}: {dimension(f.base(), measure)}, from random weights "
        f"{dimension(f.random(), measure)}"
        for measure in MEASURES
    )
    figure.suptitle(f"Does pretraining lower the dimension that 90% takes?\n{answer}", fontsize=12)
    says = (
        f"Share of the loss gap closed, and accuracy over full training's, against d on {f.plan.targets[0]}, "
        f"from {len(arms)} starts; thin lines are the starts themselves. 90% {answer}."
    )
    return Picture(figure, says)


@styled
def rank(rows: Sequence[Row]) -> Picture:
    """The loss gap closed and the effective rank of ΔW against numbers trained, by method."""
    f = found(rows)
    base, low = f.base(), min(f.plan.dims)
    names = {"random subspace": "subspace", "LoRA": "lora", "all weights": "full"}
    closed = {name: base.curve(method) for name, method in names.items()}
    ranks = {
        name: {result.parameters: result.rank for (kind, _), result in base.results.items() if kind == method}
        for name, method in names.items()
    }
    figure, (panels,) = axes(columns=2, size=(11.0, 5.2))
    panel(panels[0], closed, NUMBERS, MEASURES["loss"])
    panel(panels[1], ranks, NUMBERS, "effective rank of ΔW / the largest", level=False)
    panels[1].axhline(base.start["rank"], color=GREY, label="pure noise")
    panels[1].legend(loc="center left")
    share, noise = np.median(base.results["subspace", low].rank), base.start["rank"]
    answer = f"with d = {low} ΔW has {share:.2f} of the largest effective rank, pure noise {noise:.2f}"
    figure.suptitle(f"Does a low dimension mean a low rank?\n{answer}", fontsize=13)
    says = (
        f"Loss gap closed and effective rank of ΔW against numbers trained on {f.plan.targets[0]}: {answer}. "
        f"Loss of the random subspace less LoRA's: {against(f)}."
    )
    return Picture(figure, says)


@styled
def sizes(rows: Sequence[Row]) -> Picture:
    """The loss gap closed against d, by width."""
    f = found(rows)
    figure, ((ax,),) = axes(size=(9.0, 5.2))
    panel(ax, {f"{w} wide": arm.curve("subspace") for w, arm in f.wide().items()}, SPACE, MEASURES["loss"])
    ax.legend(loc="lower right")
    answer = "; ".join(f"{width} wide: {dimension(arm)}" for width, arm in f.wide().items())
    figure.suptitle(f"Does a larger base need fewer dimensions for 90%?\n{answer}", fontsize=12)
    says = f"Loss gap closed against d on {f.plan.targets[0]}, by width of the base; d90: {answer}."
    return Picture(figure, says)


@styled
def digits(rows: Sequence[Row]) -> Picture:
    """Both shares against d, on digits from random weights."""
    arm = found(rows).digits()
    figure, ((ax,),) = axes(size=(9.0, 5.2))
    panel(ax, {name: arm.curve("subspace", m) for m, name in MEASURES.items()}, SPACE, "share")
    ax.legend(loc="lower right")
    answer = f"90% of the accuracy takes {dimension(arm, 'accuracy')}, of the loss gap {dimension(arm)}"
    figure.suptitle(f"How many dimensions do digits take from scratch?\n{answer}\n({LI})", fontsize=12)
    says = f"Accuracy over full training's and loss gap closed against d, on digits from scratch: {answer}."
    return Picture(figure, says)


def pictures(rows: Sequence[Row]) -> dict[str, Picture]:
    """All figures, by file name."""
    return {"starts": starts(rows), "rank": rank(rows), "sizes": sizes(rows), "digits": digits(rows)}

"""What the experiment with forgetting found: rows -> tables, sentences, and four figures.

The front of a method on one seed is its path over the learning rates, from the base, which has learned
nothing, to its best rate, without points that learn less than one before them. Methods are compared as
trained, each at its best rate; and at an equal target loss, that of the lesser learner, read off both fronts.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..analysis.plotting import BLUE, GREY, ORANGE, Picture, axes, shades, styled
from ..errors import ConfigError
from ..spectra import effective_rank, energy, noise_spectrum
from ..table import Table, counted
from .forgetting import FIRST, Plan
from .harness import Row
from .reading import median_of, spread, title

MARKS = ("o", "s", "^", "D", "v", "P", "X")
Losses = tuple[float, float]  # on the target, and on the text of pretraining


@dataclass
class Arm:
    """One method on one text."""

    search: dict[float, Losses] = field(default_factory=dict)  # rate -> on validation text
    tests: dict[float, list[Losses]] = field(default_factory=dict)  # rate -> of every seed; inf if diverged
    maps: list[dict[str, Row]] = field(default_factory=list)  # of every seed, what became of every map

    @property
    def rate(self) -> float:
        """The learning rate with the smallest validation loss on the target."""
        return min(self.search, key=lambda rate: (self.search[rate][0], rate))

    def of_maps(self, key: str) -> np.ndarray:
        """A number of every map (seeds, maps)."""
        return np.array([[kept[key] for kept in seed.values()] for seed in self.maps])


@dataclass
class Found:
    """The plan, the base's losses on validation and test text, and all arms, full fine-tuning as rank 0."""

    plan: Plan
    base: dict[str, dict[str, Losses]]
    arms: dict[tuple[str, int], Arm]

    def ends(self, target: str, rank: int) -> np.ndarray:
        """Test losses (seeds, 2) as trained, less the base's: what it has learned, below 0, and forgotten."""
        arm = self.arms[target, rank]
        return np.array(arm.tests[arm.rate]) - self.base[target]["test"]

    def front(self, target: str, rank: int, i: int) -> np.ndarray:
        """Of seed i the points (n, 2), less the base's, from it on, that learn more than all before them."""
        points, tests = [self.base[target]["test"]], self.arms[target, rank].tests
        for rate in sorted(tests):
            if tests[rate][i][0] < points[-1][0]:
                points.append(tests[rate][i])
        return np.array(points) - points[0]

    def equal(self, target: str, rank: int) -> np.ndarray:
        """What LoRA and full fine-tuning have forgotten (seeds, 2) where they have learned the same."""
        levels = np.maximum(self.ends(target, rank)[:, 0], self.ends(target, 0)[:, 0])
        return np.array([
            [np.interp(level, *self.front(target, r, i)[::-1].T) for r in (rank, 0)]
            for i, level in enumerate(levels)
        ])  # fmt: skip

    def less(self, target: str, key: str) -> np.ndarray:
        """LoRA less full fine-tuning (ranks, seeds): "learned", "forgotten", or that at an "equal" loss.

        A test loss is compared, so below 0 LoRA has learned more, or forgotten less.
        """
        if key == "equal":
            return np.array([np.subtract(*self.equal(target, r).T) for r in self.plan.ranks])
        i = ("learned", "forgotten").index(key)
        return np.array([self.ends(target, r)[:, i] - self.ends(target, 0)[:, i] for r in self.plan.ranks])

    def intruders(self, target: str, rank: int, key: str = "intruders") -> np.ndarray:
        """The share of the first singular vectors of all maps that are intruders (seeds,)."""
        arm = self.arms[target, rank]
        return arm.of_maps(key).sum(1) / sum(min(FIRST, *kept["shape"]) for kept in arm.maps[0].values())

    def of_noise(self, target: str, rank: int) -> np.ndarray:
        """The effective rank of ΔW over that of noise of its shape and rank (seeds,), in the median map."""
        arm = self.arms[target, rank]
        nulls = [effective_rank(noise(*kept["shape"], rank)) for kept in arm.maps[0].values()]
        return np.median(arm.of_maps("effective_rank") / nulls, 1)


@functools.cache
def noise(outputs: int, inputs: int, rank: int = 0) -> np.ndarray:
    """The spectrum of noise of that rank; 0 for all directions."""
    return noise_spectrum((outputs, inputs), np.random.default_rng(0), rank or None)


def found(rows: Sequence[Row]) -> Found:
    """The rows of a whole grid, read; ConfigError for a method that was measured with no seed."""
    base: dict[str, dict[str, Losses]] = {}
    arms: dict[tuple[str, int], Arm] = {}
    for row in rows:
        c = row["config"]
        arm = arms.setdefault((c["target"], c["rank"]), Arm())
        losses = {s: (row.get(s, math.inf), row.get(f"own_{s}", math.inf)) for s in ("valid", "test")}
        if c["kind"] == "base":
            base[c["target"]] = losses
        elif c["kind"] == "search" and row["status"] == "done":
            arm.search[c["rate"]] = losses["valid"]
        elif c["kind"] in ("front", "final"):
            arm.tests.setdefault(c["rate"], []).append(losses["test"])
            arm.maps += [row["maps"]] if "maps" in row else []
    if not arms or not all(arm.maps for arm in arms.values()):
        raise ConfigError("a method was measured with no seed; expected a row of kind 'final' of each")
    plan: Any = {k: tuple(v) if isinstance(v, list) else v for k, v in rows[0]["config"]["plan"].items()}
    return Found(Plan(**plan), base, arms)


def up_to(so: np.ndarray) -> int:
    """How many ranks (ranks, seeds), from the least on, with every seed."""
    return int(np.append(so.all(1), False).argmin())


# ---- in words


def name(rank: int) -> str:
    """A method as a heading."""
    return f"r = {rank}" if rank else "all weights"


def where(f: Found, key: str) -> str:
    """Up to which rank LoRA learns less, or forgets less, with every seed; on each text."""
    parts = []
    for target in f.plan.targets:
        values = f.less(target, key)
        n = up_to(values > 0 if key == "learned" else values < 0)
        last = "at every rank" if n == len(f.plan.ranks) else f"up to r = {f.plan.ranks[n - 1]}"
        parts.append(f"{title(target)} {last if n else 'at no rank'}")
    return ", ".join(parts)


def each(f: Found, key: str) -> str:
    """LoRA less full fine-tuning at every rank and on every text: medians."""
    return "; ".join(
        f"{title(target)} "
        + ", ".join(f"{x:+.3f} at r = {r}" for r, x in zip(f.plan.ranks, medians, strict=True))
        for target in f.plan.targets
        for medians in [np.median(f.less(target, key), 1)]
    )


def intruding(f: Found) -> str:
    """The share of intruders of each method, on every text: medians."""
    return "; ".join(
        f"{title(t)} "
        + ", ".join(f"{np.median(f.intruders(t, r)):.0%} with {name(r)}" for r in (*f.plan.ranks, 0))
        for t in f.plan.targets
    )


def ranked(f: Found) -> str:
    """The effective rank of full fine-tuning's ΔW, on every text: medians."""
    return "; ".join(
        f"{title(t)} {np.median(f.arms[t, 0].of_maps('effective_rank')):.0f}, "
        f"{np.median(f.of_noise(t, 0)):.2f} of noise's"
        for t in f.plan.targets
    )


def tables(rows: Sequence[Row]) -> list[Table]:
    """Losses of every method, as trained and at equal target loss; and what its ΔW is."""
    f = found(rows)
    losses, maps = [], []
    for target in f.plan.targets:
        for r in (0, *f.plan.ranks):
            arm, who = f.arms[target, r], (title(target), name(r))
            both = [spread(x, "+.3f") for x in f.equal(target, r).T] if r else ["", ""]
            tested = spread(np.array(arm.tests[arm.rate])[:, 0])
            losses.append((*who, f"{arm.rate:g}", tested, spread(f.ends(target, r)[:, 1], "+.3f"), *both))
            shares = (spread(f.intruders(target, r, key), ".0%") for key in ("intruders", "random"))
            rank, much = (np.median(arm.of_maps(key), 1) for key in ("effective_rank", "size"))
            over = spread(f.of_noise(target, r), ".2f")
            maps.append((*who, *shares, spread(rank, ".1f"), over, spread(much, ".2f")))
    seeds = counted(f.plan.seeds, "seed", "seeds")
    bases = "; ".join("{} {:.3f} and {:.3f}".format(title(t), *f.base[t]["test"]) for t in f.plan.targets)
    says = f"the base's losses on target and pretraining text: {bases}; {median_of(seeds)}"
    head = ("text", "method", "best rate", "test loss", "forgotten", "at equal loss", "all weights then")
    head2 = ("text", "method", "intruders", "of a random ΔW", "effective rank", "over noise's", "|ΔW|/|W|")
    says2 = f"share of the first {FIRST} singular vectors of W + ΔW, all else in the median map; {seeds}"
    return [Table(head, losses, says), Table(head2, maps, says2)]


def sentences(rows: Sequence[Row]) -> list[str]:
    """What the tables show, in words; numbers are medians over the seeds."""
    f = found(rows)
    return [
        f"LoRA learns less than full fine-tuning: {where(f, 'learned')}. Loss: {each(f, 'learned')}.",
        f"As trained, it forgets less: {where(f, 'forgotten')}. Loss: {each(f, 'forgotten')}.",
        f"At an equal target loss, it forgets less: {where(f, 'equal')}. Loss: {each(f, 'equal')}.",
        f"Intruders are: {intruding(f)}.",
        f"The effective rank of full fine-tuning's ΔW is: {ranked(f)}.",
    ]


# ---- pictures


def panels(f: Found) -> tuple[Any, list[Any]]:
    """A figure with a panel for each text."""
    figure, (line,) = axes(columns=len(f.plan.targets), size=(5.0 * len(f.plan.targets) + 1.5, 5.4))
    for ax, target in zip(line, f.plan.targets, strict=True):
        ax.set_title(title(target))
    return figure, list(line)


def picture(figure: Any, label: str, question: str, answer: str, says: str, ncols: int = 3) -> Picture:
    """The figure with its legend, its question and answer, and the sentence that says what it shows."""
    first = figure.axes[0]
    first.set_ylabel(label)
    figure.legend(*first.get_legend_handles_labels(), loc="outside lower center", ncols=ncols)
    figure.suptitle(f"{question}\n{answer}")
    return Picture(figure, f"{says}. {answer[0].upper()}{answer[1:]}.".replace("\n", "; "))


@styled
def fronts(rows: Sequence[Row]) -> Picture:
    """Validation loss on the target against that on the text of pretraining, over all rates of the search."""
    f = found(rows)
    figure, line = panels(f)
    for ax, target in zip(line, f.plan.targets, strict=True):
        start = f.base[target]["valid"]
        ax.plot(*start, "*", color="black", markersize=15, label="base")
        top = start[1]
        for (r, colour), mark in zip((shades(f.plan.ranks) | {0: ORANGE}).items(), MARKS, strict=False):
            arm = f.arms[target, r]
            path = np.array([start, *(arm.search[rate] for rate in sorted(arm.search))])
            ax.plot(*path.T, color=colour, linestyle="-" if r else "--")
            ax.plot(*path[1:].T, mark, color=colour, markerfacecolor="white")
            ax.plot(*arm.search[arm.rate], mark, color=colour, markersize=10, label=name(r))
            top = max(top, *path[path[:, 0] <= start[0], 1])
        ax.set(xlabel="loss on the target (nats per character)", yscale="log")
        ax.set_xlim(right=start[0] + 0.05 * (start[0] - ax.dataLim.x0))  # beyond, nothing is learned
        ax.set_ylim(top=1.05 * top)
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_formatter("{x:g}")
    answer = f"on test text it learns less: {where(f, 'learned')}\nand forgets less: {where(f, 'forgotten')}"
    says = "Losses on both texts at all learning rates that learn, from the base on; the best rate is filled"
    question = "Does LoRA learn less and forget less than full fine-tuning?"
    return picture(figure, "loss on the text of pretraining\n(nats per character)", question, answer, says, 6)


@styled
def less(rows: Sequence[Row]) -> Picture:
    """LoRA less full fine-tuning against the rank: what is learned and forgotten, and that at equal loss."""
    f = found(rows)
    figure, line = panels(f)
    looks = {"learned": ("on the target", GREY, "^"), "forgotten": ("on pretraining, as trained", BLUE, "o"),
             "equal": ("on pretraining, at equal target loss", ORANGE, "s")}  # fmt: skip
    at = range(len(f.plan.ranks))
    for ax, target in zip(line, f.plan.targets, strict=True):
        for key, (label, colour, mark) in looks.items():
            y = f.less(target, key)
            ax.plot(at, np.median(y, 1), color=colour, marker=mark, markersize=8, label=label)
            ax.fill_between(at, y.min(1), y.max(1), color=colour, alpha=0.2, linewidth=0)
        ax.axhline(0, color="black", linewidth=1)
        ax.set_xticks(at, [name(r) for r in f.plan.ranks])
    says = f"Loss of LoRA less that of full fine-tuning, {counted(f.plan.seeds, 'seed', 'seeds')}"
    question = "Does LoRA forget less where it has learned as much?"
    answer = f"less with every seed: {where(f, 'equal')}"
    return picture(figure, "loss, LoRA less all weights\n(nats per character)", question, answer, says)


@styled
def intruders(rows: Sequence[Row]) -> Picture:
    """The share of intruders of each method, beside that of its ΔW in random directions."""
    f = found(rows)
    figure, line = panels(f)
    methods, looks = (*f.plan.ranks, 0), {"intruders": ("as trained", BLUE, "o", "full"),
             "random": ("with random directions of the same strength", GREY, "D", "none")}  # fmt: skip
    for ax, target in zip(line, f.plan.targets, strict=True):
        for key, (label, colour, mark, fill) in looks.items():
            y = np.array([100 * f.intruders(target, r, key) for r in methods])
            ax.vlines(range(len(y)), y.min(1), y.max(1), color=colour, linewidth=3)
            ax.plot(np.median(y, 1), mark, color=colour, fillstyle=fill, markersize=10, label=label)
        ax.set_xticks(range(len(methods)), [name(r) for r in methods])
        ax.axhline(0, color="black", linewidth=1)
        ax.margins(0.1)
    says = f"Singular vectors of W + ΔW among the first {FIRST} that resemble W's no more than chance does"
    answer = intruding(f).replace("; ", "\n")
    question = "Has LoRA intruder dimensions that full fine-tuning has not?"
    return picture(figure, f"intruders among the first {FIRST} (%)", question, answer, says)


@styled
def spectrum(rows: Sequence[Row]) -> Picture:
    """The energy in the first directions of ΔW: all weights and the largest rank, beside noise."""
    f = found(rows)
    figure, line = panels(f)
    for ax, target in zip(line, f.plan.targets, strict=True):
        maps = f.arms[target, 0].maps[0].values()
        at = 2 ** np.arange(min(len(kept["energy"]) for kept in maps))
        some = {"noise": ([energy(noise(*kept["shape"]))[at - 1] for kept in maps], GREY, "D:")}
        for r, colour, look in ((0, ORANGE, "s-"), (f.plan.ranks[-1], BLUE, "o--")):
            seeds = f.arms[target, r].maps
            shares = [kept["energy"][: len(at)] for seed in seeds for kept in seed.values()]
            some[name(r)] = shares, colour, look
        for label, (shares, colour, look) in some.items():
            ax.plot(at, 100 * np.median(shares, 0), look, color=colour, label=label)
            low, high = np.quantile(shares, (0.25, 0.75), 0)
            ax.fill_between(at, 100 * low, 100 * high, color=colour, alpha=0.2, linewidth=0)
        ax.set(xlabel="first directions of ΔW", xscale="log", ylim=(0, 104))
        ax.set_xticks(at, at)
        ax.minorticks_off()
    says = "Share of the energy in the first directions of ΔW, median and middle half of all maps and seeds"
    answer = f"effective rank: {ranked(f)}"
    return picture(figure, "share of |ΔW|² (%)", "Is the ΔW of full fine-tuning of low rank?", answer, says)


def pictures(rows: Sequence[Row]) -> dict[str, Picture]:
    """All figures, by file name."""
    drawers = {"fronts": fronts, "less": less, "intruders": intruders, "spectrum": spectrum}
    return {file: draw(rows) for file, draw in drawers.items()}

"""What the experiment with known ranks found: rows -> tables, sentences, and figures."""

from collections.abc import Mapping, Sequence

import numpy as np

from .. import spectra
from ..analysis.plotting import BLUE, GREEN, GREY, ORANGE, PINK, Picture, axes, styled
from ..table import Table, counted
from .harness import Row
from .known_rank import LARGE, REVERSED, TASKS
from .reading import finals, median_of, said, spread

TITLES = {
    "map": "one linear map",
    "teacher": "a teacher that differs in one map",
    "permutation": "letters that change places",
}
LOOKS = tuple(zip((BLUE, ORANGE, GREEN, PINK, GREY), "os^Dv", strict=True))
NOTHING = 0.02  # of the base's excess: no more counts as solved


def select(rows: Sequence[Row], task: str, k: int) -> dict[int, list[Row]]:
    """Rank -> the measured rows of one task and planted rank."""
    found: dict[int, list[Row]] = {}
    for row in finals(rows):
        c = row["config"]
        if (c["task"], c["planted"]) == (task, k):
            found.setdefault(c["rank"], []).append(row)
    return dict(sorted(found.items()))


def planted(rows: Sequence[Row], task: str) -> list[int]:
    """The planted ranks of a task."""
    return sorted({row["config"]["planted"] for row in finals(rows) if row["config"]["task"] == task})


def tasks(rows: Sequence[Row]) -> list[str]:
    """The tasks in the rows, in order."""
    there = {row["config"]["task"] for row in finals(rows)}
    return [task for task in TASKS if task in there]


def shown(rows: Sequence[Row], task: str, k: int) -> list[int]:
    """The rank that each seed's spectrum at LARGE shows."""
    return [spectra.rank_shown(np.array(row["spectrum"])) for row in select(rows, task, k).get(LARGE, [])]


def elbow(rows: Sequence[Row], task: str, k: int) -> int | None:
    """The smallest rank tried at which nothing is left to gain, in the median."""
    for r, some in select(rows, task, k).items():
        if np.median([row["excess"] for row in some]) <= NOTHING:
            return r
    return None


def reverse(rows: Sequence[Row]) -> dict[int, list[Row]]:
    """Rank -> the measured rows of reversed text, all weights (0) last; empty if it was not tried."""
    found = select(rows, REVERSED, 0)
    return {r: found[r] for r in sorted(found, key=lambda r: (r == 0, r))}


def left(rows: Sequence[Row]) -> dict[int, np.ndarray]:
    """The excess of each rank and seed on reversed text."""
    return {r: np.array([row["excess"] for row in some]) for r, some in reverse(rows).items()}


def called(rank: int) -> str:
    """LoRA of a rank, or all weights, in words."""
    return f"r = {rank}" if rank else "all weights"


def levels(rows: Sequence[Row]) -> tuple[float, float]:
    """The base's test loss on reversed text, and on the same letters forwards."""
    _, start, floor = next(iter(reverse(rows).values()))[0]["losses"]
    return start, floor


def tables(rows: Sequence[Row]) -> list[Table]:
    """Excess at and below the planted rank, beside that of the known answer cut there; and the rank shown."""
    lines = []
    for task in tasks(rows):
        for k in planted(rows, task):
            for r, some in select(rows, task, k).items():
                found = shown(rows, task, k) if r == LARGE else []
                lines.append((
                    task, str(k), str(r), spread([row["excess"] for row in some], ".4f"),
                    said(np.median([row["best"] for row in some]), ".4f"),
                    f"{sum(n == k for n in found)} of {len(found)}" if found else "",
                ))  # fmt: skip
    seeds = counted(len({row["config"]["seed"] for row in finals(rows)}), "seed", "seeds")
    head = ("task", "planted", "rank", "excess", "answer cut to it", "shows the planted rank")
    made = [Table(head, lines, f"excess loss over the base's, {median_of(seeds)}")]
    if reverse(rows):
        start, floor = levels(rows)
        learned = [
            (
                called(r), f"{some[0]['config']['lr']:.2g}", spread([row["losses"][0] for row in some]),
                spread(left(rows)[r]), spread([row["effective_rank"] for row in some], ".1f"),
            )
            for r, some in reverse(rows).items()
        ]  # fmt: skip
        of_text = ("reversed text", "learning rate", "test loss", "excess", "effective rank of ΔW")
        caption = f"the base has {start:.3f}, and {floor:.3f} forwards; the rank is that of the median map"
        made.append(Table(of_text, learned, f"{caption}; {median_of(seeds)}"))
    return made


def sentences(rows: Sequence[Row]) -> list[str]:
    """What the table shows, in words."""
    lines = []
    for task in tasks(rows):
        ks = planted(rows, task)
        right = sum(elbow(rows, task, k) == k for k in ks)
        found = [(n, k) for k in ks for n in shown(rows, task, k)]
        lines.append(
            f"{task}: nothing is left to gain from the planted rank on, and not before, for {right} of "
            f"{counted(len(ks), 'rank', 'ranks')}; the spectrum at r = {LARGE} shows it in "
            f"{sum(n == k for n, k in found)} of {counted(len(found), 'run', 'runs')}."
        )
    return [*lines, backwards_said(rows)] if reverse(rows) else lines


def rest(some: Mapping[int, np.ndarray]) -> str:
    """What each rank leaves of the base's excess on reversed text, in the median."""
    return ", ".join(f"{np.median(x):.0%} with {called(r)}" for r, x in some.items())


def backwards_said(rows: Sequence[Row]) -> str:
    """The sentence on reversed text."""
    start, floor = levels(rows)
    return (
        f"reversed text, on which the base has {start:.2f} nats and {floor:.2f} forwards: what "
        f"is left of the excess is {rest(left(rows))}."
    )


@styled
def elbows(rows: Sequence[Row]) -> Picture:
    """Excess loss against rank, for each task and planted rank, beside the known answer cut to the rank."""
    names = tasks(rows)
    figure, (line,) = axes(columns=len(names), size=(4.2 * len(names), 4.8))
    right = total = 0
    for ax, task in zip(line, names, strict=True):
        for k, (colour, mark) in zip(planted(rows, task), LOOKS, strict=False):
            cells = select(rows, task, k)
            right, total = right + (elbow(rows, task, k) == k), total + 1
            y = np.array([[100 * row["excess"] for row in some] for some in cells.values()])
            best = [100 * np.median([row["best"] for row in some]) for some in cells.values()]
            x = list(cells)
            ax.fill_between(x, y.min(1), y.max(1), color=colour, alpha=0.2, linewidth=0)
            ax.plot(x, np.median(y, 1), color=colour, marker=mark, markersize=6, label=f"k = {k}")
            ax.plot(x, best, color=colour, linestyle=":", linewidth=1.5)
        ax.set_xscale("log", base=2)
        ax.set_xticks([1, 2, 4, 8, 16], ["1", "2", "4", "8", "16"])
        ax.minorticks_off()
        ax.set(xlabel="rank r of LoRA", title=TITLES[task])
    line[0].set_ylabel("excess loss (% of the base's)")
    figure.legend(*line[-1].get_legend_handles_labels(), title="planted", loc="outside right center")
    answer = (
        f"from the planted rank k on, and not before, in {right} of {total} (dotted: the answer cut to r)"
    )
    figure.suptitle(f"From which rank on is nothing left to gain?\n{answer}")
    return Picture(figure, f"Excess loss against rank. {' '.join(sentences(rows))}")


@styled
def found(rows: Sequence[Row]) -> Picture:
    """The rank that the spectrum shows against the one that was planted."""
    figure, ((ax,),) = axes(size=(6.4, 5.4))
    names = tasks(rows)
    right = total = 0
    for i, (task, (colour, mark)) in enumerate(zip(names, LOOKS, strict=False)):
        points = [(k, n) for k in planted(rows, task) for n in shown(rows, task, k)]
        right, total = right + sum(k == n for k, n in points), total + len(points)
        counts = {point: points.count(point) for point in dict.fromkeys(points)}
        x = [k * 2 ** (0.12 * (i - (len(names) - 1) / 2)) for k, _ in counts]
        sizes = [30 + 25 * count for count in counts.values()]
        ax.scatter(
            x, [n for _, n in counts], s=sizes, color=colour, marker=mark, alpha=0.8, label=TITLES[task]
        )
    ticks = sorted({k for task in names for k in planted(rows, task)})
    ax.plot([0.8, 1.25 * ticks[-1]], [0.8, 1.25 * ticks[-1]], color=GREY, linestyle=":", label="the same")
    for scale, set_ticks in ((ax.set_xscale, ax.set_xticks), (ax.set_yscale, ax.set_yticks)):
        scale("log", base=2)
        set_ticks(ticks, list(map(str, ticks)))
    ax.minorticks_off()
    ax.legend(loc="upper left")
    ax.set(
        xlabel="planted rank", ylabel=f"rank that the spectrum of ΔW shows, r = {LARGE}",
        title=f"Does the spectrum show the rank of a task?\nin {right} of {total} runs",
    )  # fmt: skip
    return Picture(figure, f"The rank shown by the largest drop of the spectrum. {' '.join(sentences(rows))}")


@styled
def backwards(rows: Sequence[Row]) -> Picture:
    """Excess loss against rank on reversed text, beside all weights."""
    figure, ((ax,),) = axes(size=(7.6, 5.4))
    every = left(rows)
    x = [r for r in every if r]
    y = 100 * np.array([every[r] for r in x])
    ax.fill_between(x, y.min(1), y.max(1), color=BLUE, alpha=0.2, linewidth=0)
    ax.plot(x, np.median(y, 1), color=BLUE, marker="o", markersize=7, label="LoRA on all linear maps")
    full = 100 * every[0]
    ax.axhspan(full.min(), full.max(), color=GREY, alpha=0.2, linewidth=0)
    ax.axhline(float(np.median(full)), color=GREY, linestyle="--", label="all weights")
    ax.set_xscale("log", base=2)
    ax.set_xticks(x, list(map(str, x)))
    ax.minorticks_off()
    ax.set_ylim(0, 1.1 * max(y.max(), full.max()))
    ax.set(xlabel="rank r of LoRA", ylabel="excess over the same text forwards (% of the base's)")
    ax.legend()
    ends = {r: every[r] for r in (x[0], x[-1], 0)}
    figure.suptitle(f"How much rank does reversed text need?\nleft of the excess: {rest(ends)}")
    return Picture(figure, f"Excess loss against rank on reversed text. {backwards_said(rows)}")


def pictures(rows: Sequence[Row]) -> dict[str, Picture]:
    """All figures, by file name."""
    more = {"reversed": backwards(rows)} if reverse(rows) else {}
    return {"elbows": elbows(rows), "found": found(rows), **more}

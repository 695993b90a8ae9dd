"""What the experiment with known ranks found: rows -> a table, sentences, and two figures."""

from collections.abc import Sequence

import numpy as np

from ..analysis.plotting import BLUE, GREEN, GREY, ORANGE, PINK, Picture, axes, styled
from ..table import Table, counted
from .harness import Row
from .known_rank import LARGE, TASKS
from .reading import finals, said, spread

TITLES = {
    "map": "one linear map",
    "teacher": "a teacher that differs in one map",
    "permutation": "letters that change places",
}
LOOKS = tuple(zip((BLUE, ORANGE, GREEN, PINK, GREY), "os^Dv", strict=True))
NOTHING = 0.02  # of the base's excess: no more counts as solved
FLOOR = 1e-2  # of the largest singular value: smaller ones count as this


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


def rank_shown(spectrum: Sequence[float]) -> int:
    """The rank after which a spectrum falls by the largest factor."""
    S = np.maximum(np.array(spectrum), FLOOR * spectrum[0])
    return 1 + int(np.argmax(S[:-1] / S[1:]))


def shown(rows: Sequence[Row], task: str, k: int) -> list[int]:
    """The rank that each seed's spectrum at LARGE shows."""
    return [rank_shown(row["spectrum"]) for row in select(rows, task, k).get(LARGE, [])]


def elbow(rows: Sequence[Row], task: str, k: int) -> int | None:
    """The smallest rank tried at which nothing is left to gain, in the median."""
    for r, some in select(rows, task, k).items():
        if np.median([row["excess"] for row in some]) <= NOTHING:
            return r
    return None


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
    return [Table(head, lines, f"excess loss over the base's, median and range of {seeds}")]


def sentences(rows: Sequence[Row]) -> list[str]:
    """What the table shows, in words."""
    said = []
    for task in tasks(rows):
        ks = planted(rows, task)
        right = sum(elbow(rows, task, k) == k for k in ks)
        found = [(n, k) for k in ks for n in shown(rows, task, k)]
        said.append(
            f"{task}: nothing is left to gain from the planted rank on, and not before, for {right} of "
            f"{counted(len(ks), 'rank', 'ranks')}; the spectrum at r = {LARGE} shows it in "
            f"{sum(n == k for n, k in found)} of {counted(len(found), 'run', 'runs')}."
        )
    return said


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


def pictures(rows: Sequence[Row]) -> dict[str, Picture]:
    """All figures, by file name."""
    return {"elbows": elbows(rows), "found": found(rows)}

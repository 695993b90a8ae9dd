"""What the experiment with merging found: rows -> tables, sentences, and two figures."""

from collections.abc import Sequence

import numpy as np

from ..analysis.plotting import BLUE, GREEN, GREY, ORANGE, Picture, axes, styled
from ..table import Table, counted
from .harness import Row
from .merging import CYCLES, DTYPES, TIMES
from .reading import finals, median_of, spread

LOOKS = dict(zip(DTYPES, ((BLUE, "o"), (ORANGE, "s"), (GREEN, "^")), strict=True))
WAYS = {"one": "the same ΔW", "others": "another ΔW each time"}
UNITS = dict(zip(DTYPES, (2.0**-24, 2.0**-8, 2.0**-11), strict=True))  # unit roundoff
LOST = 0.01  # of ΔW: what a merge may lose and still be called exact


def at(rows: Sequence[Row], dtype: str, key: str) -> np.ndarray:
    """A number of each merge (seeds, TIMES)."""
    return np.array([[found[key] for _, found in row["merged"][dtype]] for row in finals(rows)])


def drift(rows: Sequence[Row], way: str, dtype: str) -> np.ndarray:
    """How far W has drifted (seeds, CYCLES), in norms of ΔW."""
    return np.array([[away for _, away in row[way][dtype]] for row in finals(rows)])


def restored(rows: Sequence[Row]) -> np.ndarray:
    """The same of merge and unmerge, which never write W."""
    return np.array([[away for _, away in row["unmerge"]] for row in finals(rows)])


def cost(rows: Sequence[Row], dtype: str) -> np.ndarray:
    """By how many nats a merge changes the test loss (seeds, TIMES)."""
    return at(rows, dtype, "test") - at(rows, dtype, "apart")


def tables(rows: Sequence[Row]) -> list[Table]:
    """What a merge loses in each dtype, and how far W drifts."""
    seeds = counted(len(finals(rows)), "seed", "seeds")
    lines = [
        (
            dtype, f"{t:g}", f"{np.median(at(rows, dtype, 'size')[:, i]):.2g}",
            spread(at(rows, dtype, "kept")[:, i], ".3f"), spread(at(rows, dtype, "lost")[:, i], ".2g"),
            spread(cost(rows, dtype)[:, i], "+.1e"),
        )
        for dtype in DTYPES
        for i, t in enumerate(TIMES)
    ]  # fmt: skip
    head = ("dtype", "t", "of W's norm", "kept", "lost", "merged less apart, nats")
    one = Table(head, lines, f"R(W + t ΔW) against W + t ΔW, {median_of(seeds)}")
    away: list[tuple[str, ...]] = [
        (f"{dtype}, {said}", *(spread(x, ".2g") for x in drift(rows, way, dtype).T))
        for dtype in DTYPES
        for way, said in WAYS.items()
    ]
    away.append(("merge and unmerge", *(spread(x, ".2g") for x in restored(rows).T)))
    cycles = ("in place", *(counted(n, "cycle", "cycles") for n in CYCLES))
    return [one, Table(cycles, away, f"distance of W from where it began, in norms of ΔW, {seeds}")]


def lost_in(rows: Sequence[Row]) -> str:
    """What each dtype loses of ΔW, in the median."""
    last = TIMES.index(1.0)
    return ", ".join(f"{dtype} {np.median(at(rows, dtype, 'lost')[:, last]):.2g}" for dtype in DTYPES)


def walked(rows: Sequence[Row]) -> str:
    """How far W is from where it began after all cycles with another ΔW each time, in norms of ΔW."""
    return ", ".join(f"{dtype} {np.median(drift(rows, 'others', dtype)[:, -1]):.2g}" for dtype in DTYPES)


def sentences(rows: Sequence[Row]) -> list[str]:
    """What the tables show, in words; numbers are medians over the seeds."""
    most = max(float(np.abs(cost(rows, dtype)).max()) for dtype in DTYPES)
    same = ", ".join(f"{np.median(drift(rows, 'one', dtype)[:, -1]):.2g}" for dtype in DTYPES)
    little = ", ".join(f"{np.median(at(rows, dtype, 'lost')[:, 0]):.2g}" for dtype in DTYPES)
    return [
        f"Rounding the merged weights loses, of ΔW: {lost_in(rows)}; of ΔW / {1 / TIMES[0]:,.0f}: {little}.",
        f"A merge changes the test loss by at most {most:.1e} nats.",
        f"W after {CYCLES[-1]:,} times in place, with another ΔW each time, in norms of ΔW away from its "
        f"start: {walked(rows)}; with the same one: {same}. Merge and unmerge: {restored(rows).max():g}.",
    ]


@styled
def rounding(rows: Sequence[Row]) -> Picture:
    """The share of ΔW that rounding loses against its size, in each dtype, with a bound."""
    figure, ((ax,),) = axes(size=(7.6, 5.2))
    for dtype in DTYPES:
        colour, mark = LOOKS[dtype]
        size, lost = at(rows, dtype, "size"), at(rows, dtype, "lost")
        x = np.median(size, 0)
        ax.vlines(x, lost.min(0), lost.max(0), color=colour)
        ax.plot(x, np.median(lost, 0), color=colour, marker=mark, label=dtype)
        ax.plot(x, UNITS[dtype] * (1 + x) / x, color=colour, linestyle=":")
    ax.axhline(1, color=GREY, linestyle="--")
    ax.text(0.99, 1.15, "all of ΔW", transform=ax.get_yaxis_transform(), ha="right", va="bottom")
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set(xlabel="size of ΔW (of W's norm)", ylabel="lost to rounding (of ΔW's norm)")
    ax.legend()
    figure.suptitle(f"What does rounding the merged weights lose?\nOf ΔW: {lost_in(rows)}")
    says = "The norm of R(W + t ΔW) - W - t ΔW over that of t ΔW; dotted: its bound, u (|W| + |t ΔW|)."
    return Picture(figure, f"{says} {sentences(rows)[0]}")


@styled
def drifting(rows: Sequence[Row]) -> Picture:
    """The distance of W from where it began, against the number of merges and unmerges in place."""
    figure, ((ax,),) = axes(size=(8.4, 5.6))
    for dtype, (colour, mark) in LOOKS.items():
        for way, style in (("others", "-"), ("one", ":")):
            away = drift(rows, way, dtype)
            ax.fill_between(CYCLES, away.min(0), away.max(0), color=colour, alpha=0.2, linewidth=0)
            label = f"{dtype}, {WAYS[way]}"
            ax.plot(CYCLES, np.median(away, 0), color=colour, marker=mark, linestyle=style, label=label)
    ax.plot(CYCLES, np.median(restored(rows), 0), color=GREY, marker="D", label="merge and unmerge")
    ax.set_xscale("log")
    ax.set_yscale("symlog", linthresh=1e-8)
    ax.set_ylim(-3e-9, 1)
    ax.set(xlabel="times that ΔW was added and subtracted", ylabel="distance of W from its start (|ΔW|)")
    figure.legend(loc="outside lower center", ncols=2)
    figure.suptitle(f"Is W + ΔW - ΔW still W?\nOff by |ΔW| times {walked(rows)}")
    return Picture(figure, f"Distance of W from its start in norms of ΔW. {sentences(rows)[2]}")


def pictures(rows: Sequence[Row]) -> dict[str, Picture]:
    """All figures, by file name."""
    return {"rounding": rounding(rows), "drifting": drifting(rows)}

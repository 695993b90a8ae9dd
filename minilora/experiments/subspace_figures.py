"""What the experiment with subspaces found: rows -> tables, sentences, and four figures.

Two random subspaces overlap by max(i, j) / D, which is not small here. "Beyond chance" is therefore
(φ - chance) / (1 - chance), and a direction counts as shared if with every seed it is more so than 99 of 100
random ones.
"""

import functools
from collections.abc import Callable, Sequence

import numpy as np

from ..analysis.plotting import BLUE, GREEN, GREY, KINDS, ORANGE, Picture, axes, styled
from ..spectra import random_similarity, similarity
from ..table import Table, counted
from .harness import Row
from .reading import finals, median_of, said, spread
from .subspaces import KEYS, PAIRS, SIDES, counts

PAPER = 21.5  # the amplification at r = 4 in table 7 of Hu et al. 2021
DRAWS = 500  # of random pairs
STYLES = {"seeds": (BLUE, "o"), "texts": (ORANGE, "s"), "ranks": (GREEN, "^")}


def names(row: Row) -> dict[str, str]:
    """What each pair of adapters is called."""
    *_, small, large = row["config"]["plan"]["ranks"]
    return {"ranks": f"r = {small} and {large}", "seeds": f"two seeds, r = {large}",
            "texts": f"two texts, r = {large}"}  # fmt: skip


def place(path: str) -> tuple[int, int]:
    """Kind and layer of a map, to sort by."""
    parts = path.split(".")
    return KINDS.index(parts[-1]), int(parts[2])


def short(path: str) -> str:
    """A map as "q_proj 1", layers counted from 0."""
    kind, layer = place(path)
    return f"{KINDS[kind]} {layer}"


def maps(rows: Sequence[Row]) -> list[str]:
    """The paths of all maps, by kind and layer."""
    return sorted(rows[0]["shapes"], key=place)


def width(row: Row, path: str, side: str) -> int:
    """D, the dimension of the space in which these directions lie."""
    outputs, inputs = row["shapes"][path]
    return outputs if side == "left" else inputs


def phi(rows: Sequence[Row], pair: str, path: str, side: str) -> np.ndarray:
    """φ (seeds, i, j) of one map, at the `counts` of both ranks."""
    return np.array([row["similarity"][pair][path][side] for row in rows])


def equal(found: np.ndarray) -> np.ndarray:
    """φ(i, i) (..., i) of φ (..., i, j)."""
    return np.diagonal(found, 0, -2, -1)


def alone(found: np.ndarray) -> np.ndarray:
    """The share (..., i) of directions i / 2 + 1 to i that lies in the other's first i.

    φ(i, i) is a mean over the first i directions, so it stays high if the first few are the same.
    """
    i = 2 ** np.arange(min(found.shape[-2:]))
    share = equal(found).copy()
    share[..., 1:] = 2 * share[..., 1:] - np.diagonal(found, 1, -2, -1)[..., : len(i) - 1]
    return share


@functools.cache
def threshold(D: int, n: int) -> np.ndarray:
    """What `alone` of 99 of 100 random pairs in R^D does not exceed (i,); one of each pair may be fixed."""
    rng, at = np.random.default_rng(0), np.array(counts(1 << (n - 1)))
    fixed = np.eye(D, at[-1])
    drawn = (np.linalg.qr(rng.standard_normal(fixed.shape))[0] for _ in range(DRAWS))
    shares = [alone(similarity(U, fixed)[np.ix_(at - 1, at - 1)]) for U in drawn]
    return np.quantile(shares, 0.99, axis=0)


def beyond(share: np.ndarray, D: int) -> np.ndarray:
    """Beyond chance (..., i): 0 as for random directions, 1 for the same ones; 0 where they fill R^D."""
    mean = np.array([random_similarity(1 << k, 1 << k, D) for k in range(share.shape[-1])])
    return (share - mean) / np.where(mean < 1, 1 - mean, 1)


def overlap(
    rows: Sequence[Row], pair: str, side: str, of: Callable[[np.ndarray], np.ndarray] = equal
) -> np.ndarray:
    """φ(i, i) or another share, beyond chance, of every map and seed (maps, seeds, i)."""
    return np.array([beyond(of(phi(rows, pair, p, side)), width(rows[0], p, side)) for p in maps(rows)])


def shared(rows: Sequence[Row], pair: str, side: str = "A") -> np.ndarray:
    """How many leading directions of each map (maps,) are shared, a power of two or 0."""
    most = []
    for path in maps(rows):
        least = alone(phi(rows, pair, path, side)).min(0)
        above = least > threshold(width(rows[0], path, side), len(least))
        most.append([0, *counts(1 << len(least))][int(np.append(above, False).argmin())])
    return np.array(most)


def weights(rows: Sequence[Row], rank: int, key: str) -> np.ndarray:
    """A number of ΔW against W (seeds, maps)."""
    return np.array([[row["weights"][str(rank)][path][key] for path in maps(rows)] for row in rows])


def gained(rows: Sequence[Row]) -> np.ndarray:
    """The share of the largest rank's gain over the base that the rank before it reaches (seeds,)."""
    *_, small, large = (str(rank) for rank in rows[0]["config"]["plan"]["ranks"])
    losses = [row["losses"] for row in rows]
    return np.array([(x["base"] - x[small]) / (x["base"] - x[large]) for x in losses])


def tables(rows: Sequence[Row]) -> list[Table]:
    """φ(i, i) over all maps, and the amplification of each."""
    done = finals(rows)
    ranks = done[0]["config"]["plan"]["ranks"]
    at, seeds, lines = counts(ranks[-1]), counted(len(done), "seed", "seeds"), []
    for pair, name in names(done[0]).items():
        for side in SIDES:
            cells = [spread(x, ".2f") for x in np.median(overlap(done, pair, side), 1).T]
            cells += [""] * (len(at) - len(cells))
            lines.append((f"{name}: {side}", *cells, spread(shared(done, pair, side), "g")))
    says = f"φ(i, i) beyond chance, medians of {seeds}: median and range of {len(maps(done))} maps"
    one = Table(("pair: directions", *(f"i = {i}" for i in at), "shared"), lines, says)
    columns = [(f"r = {r}: {key}", weights(done, r, key)) for r in (ranks[0], ranks[-1]) for key in KEYS]
    lines = [
        (short(path), *(spread(x[:, m], ".2f") for _, x in columns)) for m, path in enumerate(maps(done))
    ]
    says = f"amplification |ΔW| / |Uᵀ W V|, {median_of(seeds)}"
    return [one, Table(("map", *(name for name, _ in columns)), lines, says)]


def sentences(rows: Sequence[Row]) -> list[str]:
    """What the tables show, in words; numbers are medians over maps and seeds."""
    done = finals(rows)
    ranks = done[0]["config"]["plan"]["ranks"]
    least, (*_, small, large) = ranks[0], ranks
    first = {pair: np.median(overlap(done, pair, "A")[..., 0]) for pair in PAIRS}
    most = {pair: np.median(shared(done, pair)) for pair in PAIRS}
    factor, random, own = ([np.median(weights(done, r, key)) for r in (least, large)] for key in KEYS)
    return [
        f"The first directions of r = {small} and {large} overlap by {first['ranks']:.2f} beyond chance; "
        f"r = {small} reaches {np.median(gained(done)):.0%} of the gain of r = {large}.",
        f"Two seeds share {most['seeds']:g} of {large} directions, the first by {first['seeds']:.2f} beyond "
        f"chance; two texts share {most['texts']:g}, the first by {said(first['texts'], '.2f')}.",
        f"Along its directions ΔW is {factor[0]:.3g} times as strong as W at r = {least} (random ones: "
        f"{random[0]:.3g}), {factor[1]:.3g} times at r = {large} ({random[1]:.3g}); W has {own[0]:.2f} and "
        f"{own[1]:.2f} there of what it has along its own first ones.",
    ]


@styled
def heat_map(rows: Sequence[Row], pair: str, question: str, answer: str) -> Picture:
    """φ(i, j) of A for q and v of the middle layer, beside its mean for random subspaces."""
    done = finals(rows)
    layer = max(place(path)[1] for path in maps(done)) // 2
    paths = [path for path in maps(done) if place(path) in ((0, layer), (2, layer))]
    found = {short(path): np.median(phi(done, pair, path, "A"), 0) for path in paths}
    D, values = width(done[0], paths[0], "A"), found[short(paths[0])]
    i, j = (counts(1 << (n - 1)) for n in values.shape)
    found[f"random in {D} dimensions"] = np.array([[random_similarity(a, b, D) for b in j] for a in i])
    figure, (line,) = axes(columns=3, size=(11.7, 2.2 + 0.4 * len(i)))
    for ax, (name, values) in zip(line, found.items(), strict=True):
        ax.grid(False)
        image = ax.imshow(values, cmap="viridis", vmin=0, vmax=1, aspect="auto")
        for (a, b), value in np.ndenumerate(values):
            ax.text(b, a, f"{value:.2f}", ha="center", va="center", color="black" if value > 0.6 else "white")
        ax.set_xticks(range(len(j)), j)
        ax.set_yticks(range(len(i)), i)
        ax.set(title=name, xlabel="first j directions")
    ranks = done[0]["config"]["plan"]["ranks"]
    line[0].set_ylabel(f"first i, r = {ranks[-2 if pair == 'ranks' else -1]}")
    figure.colorbar(image, ax=line, label="φ(i, j)")
    figure.suptitle(f"{question}\n{answer}")
    says = (
        f"Over all maps: {answer}. φ(i, j) of the right singular vectors of A, {names(done[0])[pair]}, "
        f"medians of {counted(len(done), 'seed', 'seeds')}, beside its mean for random subspaces."
    )
    return Picture(figure, says)


@styled
def directions(rows: Sequence[Row], answer: str) -> Picture:
    """Which directions are shared: each octave alone, over all maps."""
    done = finals(rows)
    at = counts(done[0]["config"]["plan"]["ranks"][-1])
    figure, (line,) = axes(columns=2, size=(11, 4.6))
    for ax, side in zip(line, ("A", "left"), strict=True):
        for pair, (colour, mark) in STYLES.items():
            share = np.median(overlap(done, pair, side, alone), 1)
            x = range(share.shape[1])
            ax.fill_between(x, *np.quantile(share, (0.25, 0.75), 0), color=colour, alpha=0.2, linewidth=0)
            ax.plot(x, np.median(share, 0), color=colour, marker=mark, label=names(done[0])[pair])
        D = min(width(done[0], path, side) for path in maps(done))
        ax.plot(range(len(at)), beyond(threshold(D, len(at)), D), color=GREY, linestyle=":",
                label="99 of 100 random pairs")  # fmt: skip
        ax.axhline(0, color=GREY, linewidth=1)
        ax.set_xticks(range(len(at)), [f"{i // 2 + 1}-{i}" if i > 2 else str(i) for i in at])
        ax.set(xlabel="directions, the strongest first", ylim=(-0.1, 1))
        ax.set_title({"A": "inputs: right ones of A", "left": "outputs: left ones of ΔW"}[side])
    line[0].set_ylabel("share in the other's first ones\n(0 by chance, 1 all)")
    line[1].legend()
    figure.suptitle(f"How many directions do two adapters share?\n{answer}")
    says = (
        f"{answer}, in inputs. Share of each octave of singular vectors in the span of the other's first "
        f"ones, beyond chance, medians of all maps and {counted(len(done), 'seed', 'seeds')}; bands: half of "
        "the maps."
    )
    return Picture(figure, says)


@styled
def amplified(rows: Sequence[Row], answer: str) -> Picture:
    """The amplification of every map at the least and the largest rank, beside that of random directions."""
    done = finals(rows)
    *_, large = ranks = done[0]["config"]["plan"]["ranks"]
    figure, ((ax,),) = axes(size=(11, 5))
    x = range(len(maps(done)))
    for r, colour, mark in ((ranks[0], BLUE, "o"), (large, ORANGE, "s")):
        factor, random = (weights(done, r, key) for key in KEYS[:2])
        ax.vlines(x, factor.min(0), factor.max(0), color=colour)
        ax.plot(x, np.median(factor, 0), mark, color=colour, label=f"r = {r}")
        ax.plot(x, np.median(random, 0), mark, color=colour, fillstyle="none",
                label=f"r = {r}, random directions")  # fmt: skip
    ax.axhline(PAPER, color=GREY, linestyle="--", label=f"the paper's {PAPER} at r = 4")
    ax.set_yscale("log")
    ax.set_xticks(x, [short(path) for path in maps(done)], rotation=60, ha="right")
    ax.set(ylabel="amplification |ΔW| / |Uᵀ W V|", xlabel="map and layer")
    figure.legend(loc="outside lower center", ncols=3)
    figure.suptitle(f"How much does ΔW amplify its directions of W?\n{answer}")
    says = (
        f"In the median map: {answer}. Amplification of every map, medians with the range of "
        f"{counted(len(done), 'seed', 'seeds')}, beside that of random directions."
    )
    return Picture(figure, says)


def pictures(rows: Sequence[Row]) -> dict[str, Picture]:
    """All figures, by file name."""
    ranks, seeds, times = (text.removesuffix(".") for text in sentences(rows))
    *_, small, large = finals(rows)[0]["config"]["plan"]["ranks"]
    return {
        "ranks": heat_map(rows, "ranks", f"Does r = {small} find the directions of r = {large}?", ranks),
        "seeds": heat_map(rows, "seeds", "Do two seeds find the same directions?", seeds),
        "directions": directions(rows, seeds),
        "amplification": amplified(rows, times.partition("; ")[0]),
    }

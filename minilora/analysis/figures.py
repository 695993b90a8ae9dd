"""Figures: an adapter's heat map and spectra, the subspaces of two; curves, and matrices of numbers."""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import cycle
from typing import Any

import numpy as np

from ..spectra import effective_rank, energy, noise_spectrum
from ..table import drawn, shortened
from .names import block_or_layer
from .plotting import (
    BLUE,
    GREEN,
    GREY,
    KINDS,
    ORANGE,
    PINK,
    Figure,
    Picture,
    axes,
    few,
    name_lines,
    shades,
    styled,
)

MOST = 32  # kinds in a picture


def grid_of(modules: Sequence[Any], value: Callable[[Any], float]) -> tuple[np.ndarray, list[str], list[str]]:
    """A value as a grid (kinds, blocks), NaN where there is no module, and the names of both axes.

    The modules are those of one component, in the model's order. Where several share a place, such as
    experts, it is their mean. Of very many kinds, as names without dots make them, the first are shown.
    """
    inside = [m for m in modules if m.block] or list(modules)
    names = [k for k in KINDS if k in {m.kind for m in inside}]
    names = [*names, *sorted({m.kind for m in inside} - {*names})][:MOST]
    blocks = list(dict.fromkeys(m.block for m in inside))
    grid = np.full((len(names), len(blocks)), np.nan)
    places: dict[tuple[int, int], list[float]] = {}
    for m in inside:
        if m.kind in names:
            places.setdefault((names.index(m.kind), blocks.index(m.block)), []).append(value(m))
    for place, values in places.items():
        grid[place] = math.fsum(values) / len(values)
    return grid, names, blocks


def grids(
    modules: Sequence[Any], parts: Sequence[tuple[Callable[[Any], float], str, str, dict[str, Any]]]
) -> tuple[Figure, list[str]]:
    """Heat maps one below the other, and each in words; a part is (value, label, words, imshow's options)."""
    _, names, blocks = grid_of(modules, lambda m: 0.0)
    size = max(6.4, 0.22 * len(blocks) + 3), len(parts) * max(1.2, 0.3 * len(names) + 0.9)
    figure, lines = axes(1, len(parts), size)
    says = []
    for (ax,), (value, label, what, how) in zip(lines, parts, strict=True):
        grid = grid_of(modules, value)[0]
        image = ax.imshow(grid, aspect="auto", interpolation="nearest", **how)
        ax.grid(False)
        ax.set_yticks(range(len(names)), list(map(drawn, names)))
        step = -(-len(blocks) // 16)
        upright = any(len(block) > 3 for block in blocks)
        labels = list(map(drawn, blocks[::step]))
        ax.set_xticks(range(0, len(blocks), step), labels, rotation=90 * upright)
        figure.colorbar(image, ax=ax, label=label)
        means = ", ".join(f"{n} {v:.3g}" for n, v in zip(names, np.nanmean(grid, 1), strict=True))
        says.append(f"mean {what}: {means}")
    ax.set_xlabel(block_or_layer(m.module for m in modules))
    if more := len({m.kind for m in modules} - {*names}) * (len(names) == MOST):
        says.append(f"{more} more kinds are not shown")
    return figure, says


@styled
def heat_map(modules: Sequence[Any]) -> Picture:
    """Effective rank as a share of noise's, and |ΔW| (over |W| with a base), layer by kind of module."""
    related = all(m.base for m in modules)
    size = "|ΔW| / |W|" if related else "|ΔW|"
    look = {"cmap": "viridis", "vmin": 0}  # a share has a fixed range, so noise looks like noise
    values = (
        lambda m: 100 * m.ranks.effective / max(m.noise.effective, 1e-9),
        lambda m: m.base.relative if related else m.norm,
    )
    figure, says = grids(modules, [
        (values[0], "effective rank\n(% of noise's)", "effective rank in % of noise's", look | {"vmax": 100}),
        (values[1], size, size, look),
    ])  # fmt: skip
    names = [drawn(shortened(name, 20)) for name in grid_of(modules, values[0])[1]]
    shares, sizes = (np.nanmean(grid_of(modules, value)[0], 1) for value in values)
    answer = f"the fewest: {names[shares.argmin()]}; the largest: {names[sizes.argmax()]}"
    figure.suptitle(f"How many directions does ΔW use, and how large is it?\n{answer}", fontsize=12)
    return Picture(figure, f"Modules by {block_or_layer(m.module for m in modules)}; {'; '.join(says)}.")


@styled
def difference(modules: Sequence[Any]) -> Picture:
    """Two adapters, layer by kind of module: the cosine of their ΔW, and how much larger the second's is."""
    compared = [m for m in modules if m.other]
    most = max(abs(m.other.norm - m.norm) for m in compared) or 1.0
    look = {"cmap": "PuOr"}
    figure, says = grids(compared, [
        (lambda m: m.other.cosine, "cosine", "cosine", look | {"vmin": -1, "vmax": 1}),
        (lambda m: m.other.norm - m.norm, "$|ΔW_2| - |ΔW_1|$", "|ΔW_2| - |ΔW_1|",
         look | {"vmin": -most, "vmax": most}),
    ])  # fmt: skip
    for ax in figure.axes:
        ax.set_facecolor("#DDDDDD")  # where there is no module; 0 is white
    cosine = np.mean([m.other.cosine for m in compared])
    figure.suptitle(f"How alike are two adapters?\nthe mean cosine of their ΔW is {cosine:.2f}", fontsize=12)
    return Picture(figure, f"Two adapters by {block_or_layer(m.module for m in modules)}; {'; '.join(says)}.")


@styled
def adapter_spectra(modules: Sequence[Any]) -> Picture:
    """The singular values s_i / s_1 of ΔW: a panel per kind of module, a few layers, the range of all."""
    _, names, blocks = grid_of(modules, lambda m: 0.0)
    names = [*names, *sorted({m.kind for m in modules} - {*names})][:MOST]
    columns = min(4, len(names))
    lines = -(-len(names) // columns)
    figure, grid = axes(columns, lines, (max(3.1 * columns, 6.4), 3.0 * lines + 0.4))
    colours, kind = shades(blocks), block_or_layer(m.module for m in modules)
    least = min(m.singular_values[-1] / max(m.singular_values[0], 1e-300) for m in modules)
    says = []
    for ax, name in zip(grid.flat, names, strict=False):
        some = [m for m in modules if m.kind == name]
        heights = [np.array(m.singular_values) / max(m.singular_values[0], 1e-300) for m in some]
        least_r = min(map(len, heights))
        low, high = (f([s[:least_r] for s in heights], 0) for f in (np.min, np.max))
        ax.fill_between(range(1, least_r + 1), low, high, color=GREY, alpha=0.2, linewidth=0)
        shown = few(list(dict.fromkeys(m.block for m in some)))
        for m, s in zip(some, heights, strict=True):
            if m.block in shown:
                shown.remove(m.block)  # of several in one place, such as experts, the first
                label = drawn(shortened(f"{kind} {m.block}", 20)) if m.block else "_"
                ax.plot(range(1, len(s) + 1), s, color=colours.get(m.block, BLUE), linewidth=2, marker="o",
                        markersize=4, label=label)  # fmt: skip
        noise = noise_spectrum(some[0].shape, np.random.default_rng(0), some[0].r, draws=4)
        at = range(1, len(noise) + 1)
        ax.plot(at, noise / noise[0], color=ORANGE, linestyle="--", linewidth=2, label="noise")
        ax.set_yscale("log")
        ax.set_ylim(max(1e-3, min(0.1, 0.7 * least)), 1.5)
        ax.minorticks_off()
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.set_title(drawn(name), fontsize=11)
        says.append(f"{name} {np.mean([m.ranks.effective for m in some]):.1f}")
    for ax in list(grid.flat)[len(names) :]:
        ax.set_axis_off()
    for ax in grid[:, 0]:
        ax.set_ylabel("$s_i / s_1$")
    for ax in grid[-1]:
        ax.set_xlabel("index i")
    own, noise = (np.median([getattr(m, of).effective for m in modules]) for of in ("ranks", "noise"))
    answer = f"effective rank {own:.1f} in the median module, noise {noise:.1f}"
    figure.suptitle(f"How fast do the singular values of ΔW fall?\n{answer}; grey: all {kind}s", fontsize=12)
    name_lines(*grid.flat[: len(names)], fontsize=10)
    return Picture(figure, f"Singular values of ΔW over the largest; mean effective rank: {', '.join(says)}.")


@styled
def dense_spectra(modules: Sequence[Any], names: Sequence[str] = ("q_proj", "down_proj")) -> Picture:
    """The singular values of changes of full rank, mean over the layers of each kind of module named.

    Beside them stand those of a Gaussian matrix of the same norm: of a full matrix, not of two factors.
    """
    figure, ((ax,),) = axes()
    ranks, says = [], []
    for name, colour, dashes in zip(names, (BLUE, ORANGE, GREEN, PINK), ("-", "--", "-.", "-"), strict=False):
        some = [m for m in modules if m.kind == name]
        S = np.array([m.singular_values for m in some]).mean(0)
        noise = np.linalg.norm(S) * noise_spectrum(some[0].shape, np.random.default_rng(0))
        for values, line, label in ((S, dashes, drawn(name)), (noise, ":", drawn(f"{name}, noise"))):
            at = range(1, len(values) + 1)
            ax.plot(at, values, color=colour, linestyle=line, linewidth=2, label=label)
        own = np.mean([m.ranks.effective for m in some])
        ranks.append(f"{drawn(name)} {own:.0f}, noise {effective_rank(noise):.0f}")
        shares = [f"{energy(values)[:8][-1]:.0%}" for values in (S, noise)]
        says.append(f"{name} begins at {S[0]:.2f} (noise {noise[0]:.2f}), its first 8 hold {shares[0]} of "
                    f"|ΔW|² (noise {shares[1]})")  # fmt: skip
    ax.set(xlabel="index i", ylabel="singular value of ΔW", ylim=(0, None))
    figure.suptitle(f"Is the change of low rank?\neffective rank: {'; '.join(ranks)}", fontsize=12)
    name_lines(ax)
    return Picture(figure, f"Singular values of ΔW beside those of a Gaussian matrix: {'; '.join(says)}.")


@styled
def subspaces(modules: Sequence[Any]) -> Picture:
    """phi(i, i) of two adapters per kind of module, mean over layers: inputs, outputs; chance dotted."""
    compared = [m for m in modules if m.other]
    names = list(dict.fromkeys(m.kind for m in compared))[:MOST]
    figure, ((left, right),) = axes(2, 1, (10, 4))
    says = []
    colours = cycle((BLUE, ORANGE, GREEN, PINK, GREY, "#E69F00", "#56B4E9"))
    for name, colour, marker in zip(names, colours, cycle("osD^vPX*"), strict=False):
        some = [m.other for m in compared if m.kind == name]
        n = min(len(o.inputs) for o in some)
        at = np.arange(1, n + 1)
        ends = []
        for ax, side in ((left, "inputs"), (right, "outputs")):
            keys = (side, f"random_{side}")
            phi, chance = (np.mean([getattr(o, key)[:n] for o in some], 0) for key in keys)
            ax.plot(at, phi, color=colour, marker=marker, markersize=4, label=drawn(name))
            ax.plot(at, chance, color=colour, linestyle=":", linewidth=1.5)
            ends.append(f"{side} {phi[0]:.2f} to {phi[-1]:.2f} (chance {chance[-1]:.3f})")
        says.append(f"{name} {', '.join(ends)}")
    high = max(line.get_ydata().max() for ax in (left, right) for line in ax.get_lines())
    for ax, side in ((left, "input"), (right, "output")):
        ax.set_xlabel("directions i")
        ax.set_ylabel(f"φ(i, i) of {side} directions")
        ax.set_ylim(0, min(1.02, 1.1 * high))
        ax.xaxis.get_major_locator().set_params(integer=True)
    figure.legend(*left.get_legend_handles_labels(), loc="outside right center", fontsize=9)
    figure.suptitle("Common subspace of two adapters; dotted: chance", fontsize=12)
    text = f"Subspace similarity of two adapters, first to all directions: {'; '.join(says)}."
    return Picture(figure, text)


@styled
def curves(lines: Mapping[str, tuple[Any, Any]], x: str, y: str, says: str, scale: str = "linear") -> Picture:
    """One line per name, through its points (xs, ys); `x` and `y` name the axes, `scale` is that of x."""
    figure, ((ax,),) = axes()
    looks = cycle(
        ((BLUE, "o", "-"), (ORANGE, "s", "--"), (GREEN, "^", "-."), (PINK, "D", ":"), (GREY, "v", "-"))
    )
    for (name, (xs, ys)), (colour, marker, dashes) in zip(lines.items(), looks, strict=False):
        ax.plot(xs, ys, color=colour, marker=marker, linestyle=dashes, markersize=5, label=name)
    ax.set(xlabel=x, ylabel=y, xscale=scale)
    if scale == "log":
        at = sorted({float(v) for xs, _ in lines.values() for v in xs})
        ax.set_xticks(at, [f"{v:g}" for v in at])
        ax.minorticks_off()
    ax.legend(fontsize=9)
    return Picture(figure, says)


def tile(ax: Any, M: np.ndarray, most: float, size: float = 9) -> Any:
    """The entries of a matrix, orange below 0 and purple above, up to `most`; few of them as numbers, too.

    `size` is that of the numbers in points, 0 for none.
    """
    image = ax.imshow(M, cmap="PuOr", vmin=-most, vmax=most, interpolation="nearest")
    ax.grid(False)
    ax.set(xticks=[], yticks=[])
    for (i, j), value in np.ndenumerate(M if size and M.size <= 64 else M[:0]):
        colour = "white" if abs(value) > 0.6 * most else "black"
        words = "" if math.isnan(value) else f"{value:.2g}"
        ax.text(j, i, words, ha="center", va="center", fontsize=size, color=colour)
    return image


@styled
def matrices(panels: Mapping[str, Any], says: str) -> Picture:
    """Matrices beside each other, orange below 0 and purple above in one range; few entries as numbers.

    NaN stays empty.
    """
    shown = {name: np.asarray(M, float) for name, M in panels.items()}
    most = max(float(np.nanmax(np.abs(M))) for M in shown.values()) or 1.0
    figure, (line,) = axes(len(shown), size=(max(2.6 * len(shown), 5.2), 3.0))
    for ax, (name, M) in zip(line, shown.items(), strict=True):
        image = tile(ax, M, most)
        ax.set(title=name, ylabel=f"{len(M)} rows", xlabel=f"{M.shape[1]} columns")
    figure.colorbar(image, ax=list(line), shrink=0.7, label="entry")
    return Picture(figure, says)

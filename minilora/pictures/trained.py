"""Trained adapters as matrices of numbers: A, B and ΔW, its rank-one parts, two added, and ΔW beside W.

The parts are s_i u_i v_iᵀ of the singular value decomposition; the share of part i in |ΔW|² is s_i² / sum s².
Two add up to [B_1 B_2] [w_1 s_1 A_1; w_2 s_2 A_2], whose rank is at most r_1 + r_2.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..analysis.figures import tile
from ..analysis.measures import directions
from ..analysis.plotting import ORANGE, Picture, styled
from ..backend import to_host
from ..errors import ConfigError, InputError, MismatchError, UnsupportedError, check_int, short
from ..layers import Factors
from ..lora import active, adapted
from ..peft.folder import Adapter
from ..spectra import energy, thin_svd
from ..table import drawn
from ..targets import resolve
from .batch import ADAPTERS, SUBSCRIPTS
from .canvas import EMBER, FROZEN, ICE, LETTER, SMALL, SOFT, TRAINED, Canvas, Look

LEAST, APART, NEAR = 0.2, 0.3, 0.12  # inches of a short side; between ΔW and its factors; between factors
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth")


def factors_of(source: Any, module: str | None) -> tuple[str, Factors]:
    """The path and the factors of the first module that a name means, of a model or of an opened adapter.

    MismatchError for a name that matches nothing and for a file without factors, StateError for a model
    without an adapter, UnsupportedError for one whose ΔW is no product of two factors.
    """
    paths = [*(source.pairs if isinstance(source, Adapter) else active(source))]
    if not paths:
        raise MismatchError(f"{source.where} has no factors A and B; expected LoRA")
    path = resolve("module", paths[:1] if module is None else [module], paths)[0]
    if isinstance(source, Adapter):
        A, B = source.factors(path)
        return path, Factors(B, A, source.pairs[path].scale)
    change = active(source)[path].change(adapted(source)[path].base)
    if not isinstance(change, Factors):
        raise UnsupportedError(f"{path}: its change is no product of two factors; expected LoRA")
    return path, Factors(to_host(change.B), to_host(change.A), change.scale)


def place(c: Canvas, x: float, y: float, wide: float, high: float, M: np.ndarray, most: float) -> None:
    """The entries of a matrix in a field whose upper left corner is (x, y)."""
    ax = c.field(x, y, wide, high)
    fits = wide / M.shape[1] >= 1.0 and high / M.shape[0] >= 0.3
    tile(ax, M, most, SMALL * fits).set_interpolation("none")  # in SVG the entries themselves
    ax.set_aspect("auto")
    ax.spines[:].set_visible(False)


def fitted(shape: tuple[int, int], wide: float, high: float) -> tuple[float, float]:
    """Width and height of a matrix (O, I) to scale in a field."""
    O, I = shape  # noqa: E741
    inch = min(wide / I, high / O)
    return max(inch * I, LEAST), max(inch * O, LEAST)


def largest(M: np.ndarray) -> float:
    """The largest magnitude, or 1 if all is 0."""
    return float(np.abs(M).max()) or 1.0


@styled
def factors(source: Any, module: str | None = None) -> Picture:
    """A, B and ΔW of one module of a trained adapter as matrices of numbers, each in its own range.

    `source` is a model or what `open_adapter` returns; errors are those of `factors_of`. An entry of ΔW
    stands below the column of A and beside the row of B whose product it is.
    """
    path, (B, A, s) = factors_of(source, module)
    change = s * B @ A
    (O, I), r = change.shape, len(A)  # noqa: E741
    wide, high = fitted(change.shape, 8.0, 3.6)
    thick, tall = max(wide * r / I, LEAST), max(high * r / O, LEAST)
    left, top = 0.4 + thick + APART, 0.75 + high
    above = top + APART + tall
    c = Canvas(left + max(wide + 2.1, 0.14 * (len(drawn(path)) + 20)), above + 0.2)
    for M, x, y, w, h in ((change, left, top, wide, high), (B, 0.4, top, thick, high),
                          (A, left, above, wide, tall)):  # fmt: skip
        place(c, x, y, w, h, M, largest(M))
    c.words(left + wide + 0.2, above - tall / 2, "A", LETTER, EMBER, slanted=True, at="left")
    c.words(0.4 + thick / 2, top + 0.25, "B", LETTER, EMBER, slanted=True)
    c.words(left + wide + 0.2, top - high / 2, "ΔW = s B A", LETTER, slanted=True, at="left")
    c.words(left, 0.35, f"{drawn(path)}, {O} × {I}, r = {r}", SMALL, SOFT, at="left")
    tops = f"{largest(A):.2g}, {largest(B):.2g} and {largest(change):.2g}"
    return c.picture(
        f"Entries of {path}, orange below 0 and purple above: A ({r} × {I}), B ({O} × {r}) and ΔW = s B A "
        f"({O} × {I}), whose largest magnitudes are {tops}. "
        f"ΔW has stripes: its rows are mixtures of the {r} rows of A, its columns of the {r} columns of B."
    )


@styled
def rank_one(source: Any, module: str | None = None, first: int = 3) -> Picture:
    """ΔW of one module as the sum of its first parts of rank one and the rest, with their shares of |ΔW|².

    `source` and errors are those of `factors`; ConfigError unless `first` is 1 to 6.
    """
    if check_int("first", first, 1) > len(ORDINALS):
        raise ConfigError(f"first is {first}; expected at most {len(ORDINALS)}")
    path, (B, A, s) = factors_of(source, module)
    U, S, Vt = (to_host(a) for a in thin_svd(B, A, s))
    energies = np.diff(energy(S), prepend=0.0)
    parts = {word: slice(i, i + 1) for i, word in enumerate(ORDINALS[:first]) if i < len(S)}
    if rest := len(S) - len(parts):
        parts[f"the other {rest}"] = slice(len(parts), None)
    panels = {"ΔW": s * B @ A} | {name: (U[:, at] * S[at]) @ Vt[at] for name, at in parts.items()}
    wide, high = fitted(panels["ΔW"].shape, 2.5, 2.5)
    apart = max(wide, 1.6) + 0.5
    c = Canvas(max(len(panels) * apart, 0.14 * (len(drawn(path)) + 20)), high + 1.75)
    shares = []
    for k, (name, M) in enumerate(panels.items()):
        x, y = (k + 0.5) * apart, 1.1 + high
        place(c, x - wide / 2, y, wide, high, M, largest(panels["ΔW"]))
        c.words(x, y + 0.3, name, slanted=not k)
        if k:
            share = f"{energies[parts[name]].sum():.1%}"
            shares.append(f"{name} {share}")
            c.words(x - apart / 2, y - high / 2, "=+"[k > 1], LETTER)
            c.words(x, 0.8, share, bold=True)
    c.words(apart / 2 - wide / 2, 0.3, f"{drawn(path)}, shares of |ΔW|²", SMALL, SOFT, at="left")
    said = ", ".join(shares)
    return c.picture(f"ΔW of {path} is a sum of matrices of rank one; their shares of |ΔW|²: {said}.")


def bars(heights: np.ndarray, x: float, y: float, wide: float) -> list[tuple[float, float]]:
    """The outline of bars beside each other, each so wide, from (x, y) to the right; negative ones hang."""
    edges = x + wide * np.arange(len(heights) + 1)
    tops = [(at, y + h) for i, h in enumerate(heights.tolist()) for at in edges[i : i + 2].tolist()]
    return [(x, y), *tops, (float(edges[-1]), y)]


@styled
def beside_base(model: Any, module: str | None = None) -> Picture:
    """The directions in which W writes, strong to weak, and how much of each is one in which ΔW writes.

    That share of a left singular vector u of W is |Uᵀ u|², with those of ΔW as U (O, r); its mean over the
    first r is the overlap of `inspect`. `model` has its base; errors are those of `factors`.
    """
    path, change = factors_of(model, module)
    W = to_host(adapted(model)[path].base.weight.dense()).astype(np.float64)
    left, S, _ = np.linalg.svd(W, full_matrices=False)
    U = to_host(directions(*thin_svd(*change))[0])
    (O, r), n, shares = U.shape, len(S), ((U.T @ left) ** 2).sum(0)  # noqa: E741
    x, long, up, down, high = 2.5, 9.2, 2.85, 2.25, 1.45
    wide, most = long / n, max(largest(shares), r / O)
    c = Canvas(13.6, 4.75)
    for y, heights, first, others in ((up, high * S / largest(S), ICE, FROZEN.fill),
                                      (down, -high * shares / most, ORANGE, TRAINED.fill)):  # fmt: skip
        for at, some, colour in ((0, heights[:r], first), (r, heights[r:], others)):
            c.shape(bars(some, x + at * wide, y, wide), Look(colour, first, 0.6))
    c.words(2.2, up + 0.75, "W", LETTER, slanted=True, at="right")
    c.words(2.2, up + 0.3, "singular value", SMALL, SOFT, at="right")
    c.words(2.2, down - 0.45, "ΔW", LETTER, EMBER, slanted=True, at="right")
    c.words(2.2, down - 0.9, "shared with it", SMALL, SOFT, at="right")
    c.words(x, (up + down) / 2, "1", SMALL, at="left")
    c.words(x + long / 2, (up + down) / 2, "directions in which W writes, strong to weak", SMALL)
    c.words(x + long, (up + down) / 2, f"{n:,}", SMALL, at="right")
    chance = down - high * r / O / most
    c.stroke([(x, chance), (x + long + 0.12, chance)], 1.6)
    c.words(x + long + 0.2, chance, f"chance {r / O:.1%}", SMALL, at="left")
    shared = f"{shares[:r].mean():.1%} of the first {r:,}"
    shared += f", {shares[r:].mean():.1%} of the others" if n > r else ""
    c.words(x, 0.6, shared, colour=EMBER, bold=True, at="left")
    c.words(x, 0.2, f"{drawn(path)}, {O:,} × {W.shape[1]:,}, r = {r:,}", SMALL, SOFT, at="left")
    return c.picture(
        f"The {n:,} directions in which W of {path} ({O:,} × {W.shape[1]:,}) writes, strong to weak, and how "
        f"much of each lies among the r = {r:,} in which ΔW writes: {shared}; random directions would share "
        f"{r / O:.1%}."
    )


@styled
def adding(first: Any, second: Any, module: str | None = None, weights: Sequence[float] = (1, 1)) -> Picture:
    """Two adapters of one module as matrices of numbers, and their weighted sum, with the factors of each.

    The adapters and errors are those of `factors`; MismatchError for two shapes, InputError unless there are
    two finite weights. The three ΔW share one range.
    """
    if len(weights) != 2 or not np.isfinite(weights).all():
        raise InputError(f"weights are {short(weights)}; expected two numbers")
    path, one = factors_of(first, module)
    pair = one, factors_of(second, path)[1]
    changes = [w * s * (B @ A) for w, (B, A, s) in zip(weights, pair, strict=True)]
    shapes = [change.shape for change in changes]
    if shapes[0] != shapes[1]:
        raise MismatchError(f"{path}: the shapes are {shapes[0]} and {shapes[1]}; expected the same")
    (O, I), ranks = shapes[0], [len(A) for _, A, _ in pair]  # noqa: E741
    wide, high = fitted(shapes[0], 2.6, 2.6)
    sides = [(max(wide * r / I, LEAST), max(high * r / O, LEAST)) for r in ranks]
    room, top = max(wide, 2.6), 1.3 + high
    apart = room + 1.2 + sum(w for w, _ in sides)
    c = Canvas(3 * apart, top + APART + sum(h for _, h in sides) + 0.4)
    most = max(map(largest, (*changes, changes[0] + changes[1])))
    names = [f"{'' if w == 1 else f'{w:g} '}ΔW{at}" for w, at in zip(weights, SUBSCRIPTS, strict=False)]
    panels = (((0,), changes[0]), ((1,), changes[1]), ((0, 1), changes[0] + changes[1]))
    for k, (which, M) in enumerate(panels):
        left = (k + 1) * apart - 0.45 - (room + wide) / 2
        place(c, left, top, wide, high, M, most)
        x, y = left - APART, top + APART + sum(sides[i][1] + NEAR for i in which) - NEAR
        x -= sum(sides[i][0] + NEAR for i in which) - NEAR
        c.words(x - 0.3, top - high / 2, " +="[k], LETTER)
        for i in which:
            (B, A, _), (thick, tall) = pair[i], sides[i]
            for X, at, above, w, h in ((B, x, top, thick, high), (A, left, y, wide, tall)):
                place(c, at, above, w, h, X, largest(X))
                c.box(at + w / 2, above - h / 2, w, h, ADAPTERS[i]._replace(fill="none"))
            c.words(x + thick / 2, top + 0.3, f"B{SUBSCRIPTS[i]}", SMALL, slanted=True)
            c.words(left + wide + 0.1, y - tall / 2, f"A{SUBSCRIPTS[i]}", SMALL, slanted=True, at="left")
            x, y = x + thick + NEAR, y - tall - NEAR
        c.words(left + wide / 2, 1.0, " + ".join(names[i] for i in which), slanted=True)
        c.words(left + wide / 2, 0.65, "rank " + " + ".join(str(ranks[i]) for i in which), SMALL, SOFT)
    c.words(0.4, 0.3, f"{drawn(path)}, {O} × {I}", SMALL, SOFT, at="left")
    return c.picture(
        f"Two adapters of {path}, {O} × {I}, of rank {ranks[0]} and {ranks[1]}, and the sum "
        f"{' + '.join(names)}: its B is B₁ and B₂ side by side, its A is A₁ above A₂, so that its rank is at "
        f"most {sum(ranks)}. The largest magnitudes of the three are "
        f"{', '.join(f'{largest(M):.2g}' for _, M in panels)}."
    )

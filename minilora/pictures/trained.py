"""A trained adapter as matrices of numbers: A, B and ΔW = s B A, and ΔW as the sum of rank-one parts.

The parts are s_i u_i v_iᵀ of the singular value decomposition; the share of part i in |ΔW|² is s_i² / sum s².
"""

from typing import Any

import numpy as np

from ..analysis.figures import tile
from ..analysis.plotting import Picture, styled
from ..backend import to_host
from ..errors import ConfigError, MismatchError, UnsupportedError, check_int
from ..layers import Factors
from ..lora import active, adapted
from ..peft.folder import Adapter
from ..spectra import energy, thin_svd
from ..table import drawn
from ..targets import resolve
from .canvas import EMBER, LETTER, SMALL, SOFT, Canvas

LEAST = 0.2  # inches of a side, however short
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
    width, height = c.figure.get_size_inches()
    ax = c.figure.add_axes((x / width, (y - high) / height, wide / width, high / height))
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
    left, top, above = 0.7 + thick, 0.75 + high, 1.05 + high + tall
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

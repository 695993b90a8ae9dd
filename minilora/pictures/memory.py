"""What few bits hold: QLoRA's base in 4 beside adapters in 16, and a merged weight, rounded.

A product decodes its weight and drops it, in the forward and again in the backward (Dettmers et al. 2023,
equations 5 and 6). The bytes are those of `count`. With p significant bits the numbers from 2^(e-1) to 2^e
are 2^(e-p) apart, and rounding to nearest moves a number by at most u = 2^-p of itself (Higham, Accuracy and
Stability of Numerical Algorithms, theorem 2.2).
"""

import math
from collections.abc import Sequence
from pathlib import Path

from ..analysis.count import count, human
from ..analysis.plotting import Picture, styled
from ..errors import ConfigError, MismatchError, check_float, check_int
from ..model import Config
from ..table import drawn
from .canvas import EMBER, FROZEN, MERGED, PASSING, SMALL, SOFT, TRAINED, Canvas
from .maps import draw_flow

LONGEST = 5.2  # inches of the longer bar
FORMATS = {24: "float32", 11: "float16", 8: "bfloat16"}  # by their significant bits
GAP, SEEN = 2.1, 2.9  # inches between neighbours, and gaps that are shown on either side
MIDDLE, LOW, HIGH = 6.8, 1.95, 2.95  # inches: of the sum, of the numbers' line, of the change


@styled
def four_bits(
    model: str | Path | Config = "llama-2-7b", r: int = 16, targets: str | Sequence[str] = "all-linear"
) -> Picture:
    """A 4-bit base with 16-bit adapters: what is stored, what is decoded when, and the memory of training.

    `model`, `r` and `targets` are those of `count`, whose errors are raised; MismatchError if it does not
    know the model's memory. The map that is shown is the first target.
    """
    counts = count(model, r, targets)
    if counts.memory is None or counts.total is None:
        raise MismatchError(f"the parameters of {counts.name} are not known; expected a whole model")
    trained = sum(counts.memory["full"]) * counts.parameters // counts.total  # all that belongs to A and B
    frozen = {how: sum(counts.memory[how]) - trained for how in ("LoRA", "QLoRA")}
    c = Canvas(13.6, 5.8)
    O, I = counts.rows[0].shape  # noqa: E741
    draw_flow(c, 0.2, 0.2, O, I, r, PASSING)
    c.words(3.15, 0.43, "in 16 bits", SMALL, EMBER)
    c.frozen(1.75, 5.1)
    c.codes(3.15, 5.1, 0.2, 4, 8)
    c.words(4.15, 5.1, "stored in 4 bits", SMALL, at="left")
    c.way((3.15, 4.7), (3.15, 3.85))
    c.words(3.35, 4.3, "decoded for one product, then dropped", SMALL, SOFT, at="left")
    x, inch = 8.0, LONGEST / (trained + max(frozen.values()))  # of a byte
    c.words(x, 5.1, f"{drawn(counts.name)}, r = {r}: memory of training", at="left")
    for how, bits, y in (("LoRA", 16, 3.5), ("QLoRA", 4, 1.45)):
        base, ours = frozen[how] * inch, trained * inch
        c.words(x, y + 0.55, f"{how}: {bits}-bit base", SMALL, at="left", bold=True)
        c.box(x + base / 2, y, base, 0.5, FROZEN)
        c.box(x + base + ours / 2, y, ours, 0.5, TRAINED)
        c.words(x, y - 0.55, f"base {human(frozen[how])}", SMALL, at="left")
        c.words(x, y - 0.9, f"A, B, gradients, moments {human(trained)}", SMALL, EMBER, at="left")
    return c.picture(
        f"QLoRA: the frozen W, {O:,} × {I:,}, is stored in 4 bits, decoded for one product, forward or "
        f"backward, and dropped; beside it A and B are trained in 16 bits or more. {counts.name}, r = {r}: "
        f"the base takes {human(frozen['LoRA'])} in 16 bits, {human(frozen['QLoRA'])} with its blocks in 4; "
        f"A and B with their gradients and moments take {human(trained)}."
    )


def gap(x: float, bits: int) -> float:
    """The distance from |x| to the next number away from 0."""
    return math.ldexp(1.0, math.frexp(x)[1] - bits)


def nearest(x: float, bits: int) -> float:
    """x rounded, ties to even."""
    return round(x / gap(x, bits)) * gap(x, bits)


@styled
def rounding(weight: float = 1.0, change: float = 0.018, bits: int = 8) -> Picture:
    """A weight, its change ΔW, the numbers of a format around the sum, and the bound on rounding, to scale.

    `bits` are significant ones: 24 of float32, 11 of float16, 8 of bfloat16; overflow is left out.
    ConfigError unless they are 4 to 24, and the sum is neither W nor 0.
    """
    total = sum(check_float(name, v, -1e30, 1e30) for name, v in (("weight", weight), ("change", change)))
    if check_int("bits", bits, 4) > max(FORMATS):
        raise ConfigError(f"bits is {bits}; expected at most {max(FORMATS)}")
    if total in (weight, 0):
        raise ConfigError(f"change is {change} for weight {weight}; expected a sum that is neither W nor 0")
    step, stored = gap(total, bits), nearest(total, bits)
    most = abs(total) / 2**bits
    c = Canvas(13.6, 4.4)

    def at(x: float) -> float:
        return MIDDLE + GAP * (x - total) / step

    c.box(MIDDLE, LOW, 2 * GAP * most / step, 0.7, PASSING)
    c.stroke([(at(total - SEEN * step) - 0.4, LOW), (at(total + SEEN * step) + 0.4, LOW)], 1.8)
    labels = []
    for half in range(-6, 7):  # below a power of two the numbers are half as far apart, above it twice
        number = (round(total / step) + half / 2) * step
        if nearest(number, bits) == number and abs(number - total) < SEEN * step:
            c.stroke([(at(number), LOW - 0.18), (at(number), LOW + 0.18)], 1.8)
            if half % 2 == 0:
                labels.append(f"{number:.9g}")
                c.words(at(number), LOW - 0.6, labels[-1], SMALL, bold=number == stored)
    start = at(weight)
    if abs(weight - total) < SEEN * step:
        c.dot(start, LOW, 0.12, FROZEN)
    start = min(max(start, MIDDLE - SEEN * GAP), MIDDLE + SEEN * GAP)
    c.way((start, HIGH), (MIDDLE, HIGH))
    c.stroke([(MIDDLE, LOW), (MIDDLE, HIGH)], 1.2)
    c.dot(at(stored), LOW, 0.16, MERGED)
    c.dot(MIDDLE, LOW, 0.07, TRAINED)
    name = f"{FORMATS[bits]}, {bits} significant bits" if bits in FORMATS else f"{bits} significant bits"
    near = f"{name}: neighbours are {step:.9g} apart"
    kept = f"W + ΔW = {total:.9g} is stored as {stored:.9g}: off by {abs(stored - total):.3g}"
    bound = f"dashed, the bound: u |W + ΔW| = {most:.3g} to either side, u = 1 / {2**bits:,}"
    c.words(MIDDLE, 4.05, near, SMALL, SOFT)
    moved = f"W = {weight:.9g}, ΔW = {change:.9g}"
    c.words((start + MIDDLE) / 2, HIGH + 0.3, moved, SMALL, EMBER)
    c.words(MIDDLE, 0.78, kept, bold=True)
    c.words(MIDDLE, 0.35, bound, SMALL, SOFT)
    return c.picture(f"To scale, {near}: {', '.join(labels)}. {moved}. {kept}; {bound}.")

"""One linear map and its adapter: y = W x + s B A x as a flow, d x d = (d x r)(r x d) to scale, the merge.

W (O, I), A (r, I), B (O, r): r (O + I) numbers are trained instead of O I (Hu et al. 2021, section 4.1).
"""

from collections.abc import Sequence

from ..analysis.plotting import Picture, styled
from ..errors import ConfigError, check_int
from .canvas import EMBER, FROZEN, INK, LETTER, MERGED, PASSING, SMALL, SOFT, TRAINED, Canvas, Look

# ruff: noqa: E741

SIDE = 2.3  # inches of the longer side of ΔW


def sides(O: int, I: int, r: int) -> tuple[str, str]:
    """What outputs and inputs are called: d if they are equally many. ConfigError for a rank too high."""
    for name, size in (("O", O), ("I", I), ("r", r)):
        check_int(name, size, 1)
    if r > min(O, I):
        raise ConfigError(f"r is {r} for shape {(O, I)}; expected at most {min(O, I)}")
    return ("d", "d") if O == I else ("O", "I")


def heights(O: int, I: int) -> tuple[float, float]:
    """Inches of a map at its inputs and at its outputs, of which none is too low for a letter."""
    left, right = (1.5 * max(n / max(O, I), 0.6) for n in (I, O))
    return left, right


def draw_flow(c: Canvas, x: float, y: float, O: int, I: int, r: int, base: Look = FROZEN) -> None:
    """The flow in a field of 6.4 by 3.7 inches whose lower left corner is (x, y)."""
    o, i = sides(O, I, r)
    up, low, mid = y + 2.9, y + 0.75, x + 2.95
    inputs, outputs = heights(O, I)
    c.words(x + 0.12, up, "x", LETTER, slanted=True)
    c.way((x + 0.35, up), (mid - 0.8, up))
    c.way((x + 0.65, up), (x + 0.65, low), (mid - 1.4, low))
    c.way((mid + 0.8, up), (x + 5.2, up))
    c.way((mid - 0.5, low), (mid + 0.5, low))
    c.way((mid + 1.4, low), (x + 5.4, low), (x + 5.4, up - 0.2))
    c.way((x + 5.6, up), (x + 6.0, up))
    c.sum(x + 5.4, up)
    c.words(x + 6.2, up, "y", LETTER, slanted=True)
    c.map(mid, up, 1.6, inputs, outputs, base)
    c.words(mid, up + 0.1 * (base is FROZEN), "W", LETTER, slanted=True)
    if base is FROZEN:
        c.frozen(mid, up - 0.28)
    c.map(mid - 0.95, low, 0.9, inputs, 0.45, TRAINED)
    c.words(mid - 0.95, low, "A", LETTER, EMBER, slanted=True)
    c.map(mid + 0.95, low, 0.9, 0.45, outputs, TRAINED)
    c.words(mid + 0.95, low, "B", LETTER, EMBER, slanted=True)
    c.words(x + 1.4, up + 0.24, f"{i} = {I:,}", SMALL, SOFT)
    c.words(x + 4.45, up + 0.24, f"{o} = {O:,}", SMALL, SOFT)
    c.words(mid, low + 0.24, f"r = {r:,}", SMALL, SOFT)
    c.words(mid, low - 0.24, "trained", SMALL, EMBER)
    c.words(x + 4.85, low + 0.24, "× s", SMALL, SOFT)


def draw_product(c: Canvas, x: float, y: float, O: int, I: int, r: int) -> None:
    """ΔW = s B A to scale in a field of 6.4 by 4 inches whose lower left corner is (x, y)."""
    sides(O, I, r)
    inch = min(SIDE / max(O, I), 3.15 / (I + r))  # of one row or column
    wide, high, thin = inch * I, inch * O, inch * r
    up, change, pair = y + 2.45, x + 1.15, x + 4.75  # the middles of the shapes and of the two columns
    top = up + high / 2
    room = max(thin, 0.84)  # of B, and of its lens
    b, a = pair - (0.15 + wide) / 2, pair + (room + 0.15) / 2
    c.box(change, up, wide, high, PASSING)
    c.words(x + 2.58, up, "=", LETTER)
    c.words(x + 2.9, up, "s", LETTER, slanted=True)
    c.stripes(b, up, thin, high, columns=r)
    c.stripes(a, top - thin / 2, wide, thin, rows=r)
    of_a = a
    if thin < 0.1 and min(wide, high) > 1.2:
        more = "s" * (r > 1)
        c.lens(b, up - high / 2 + 0.5, columns=r)
        c.words(b + 0.6, up - high / 2 + 0.5, f"{r:,} column{more}", SMALL, SOFT, at="left")
        c.lens(a + wide / 2 - 0.5, top, rows=r)
        c.words(a + wide / 2 - 0.5, top - 0.65, f"{r:,} row{more}", SMALL, SOFT)
        of_a -= 0.46  # the middle of what is left of it
    for at, letter, colour in ((change, "ΔW", INK), (b, "B", EMBER), (of_a, "A", EMBER)):
        c.words(at, top + 0.25, letter, LETTER, colour, slanted=True)
    c.words(change, y + 0.85, f"{O:,} × {I:,}", SMALL, SOFT)
    c.words(change, y + 0.45, f"{O * I:,}", bold=True)
    c.words(pair, y + 0.85, f"{O:,} × {r:,}  +  {r:,} × {I:,}", SMALL, SOFT)
    c.words(pair, y + 0.45, f"{r * (O + I):,}", colour=EMBER, bold=True)
    c.words(pair, y + 0.1, compared(O, I, r), SMALL, EMBER)


@styled
def flow(O: int = 4096, I: int = 4096, r: int = 8) -> Picture:
    """Frozen W beside A and B in the flow of a linear map, y = W x + s B A x, with the shapes.

    ConfigError for a rank that does not fit, here and in the other pictures of one map.
    """
    c = Canvas(6.8, 4.2)
    draw_flow(c, 0.2, 0.2, O, I, r)
    return c.picture(flow_says(O, I, r))


@styled
def product(O: int = 4096, I: int = 4096, r: int = 8) -> Picture:
    """d x d = (d x r)(r x d) to scale, with the counts."""
    c = Canvas(6.8, 4.4)
    draw_product(c, 0.2, 0.15, O, I, r)
    return c.picture(product_says(O, I, r))


@styled
def ranks(O: int = 96, I: int = 96, some: Sequence[int] = (1, 8, 64)) -> Picture:
    """ΔW, and beside it B and A at each of some ranks, all to scale, with the counts."""
    for r in some:
        sides(O, I, r)
    inch = SIDE / max(O, I)
    wide, high, words, gap = inch * I, inch * O, 2.4, 0.6
    rooms = [max(inch * r, 0.5) for r in some]  # of B, and of its letter
    fields = [max(wide, words), *(max(room + 0.15 + wide, words) for room in rooms)]
    c = Canvas(sum(fields) + gap * len(fields), 1.9 + high)
    top, x, said = 1.35 + high, (gap + fields[0]) / 2, []
    c.box(x, top - high / 2, wide, high, PASSING)
    c.words(x, top + 0.25, "ΔW", LETTER, slanted=True)
    c.words(x, 0.95, f"{O:,} × {I:,}", SMALL, SOFT)
    c.words(x, 0.6, f"{O * I:,}", bold=True)
    for r, room, before, field in zip(some, rooms, fields, fields[1:], strict=False):
        x += before / 2 + gap + field / 2
        b, a = x - (0.15 + wide) / 2, x + (room + 0.15) / 2
        c.stripes(b, top - high / 2, inch * r, high, columns=r)
        c.stripes(a, top - inch * r / 2, wide, inch * r, rows=r)
        for at, letter in ((b, "B"), (a, "A")):
            c.words(at, top + 0.25, letter, LETTER, EMBER, slanted=True)
        c.words(x, 0.95, f"r = {r:,}", SMALL, SOFT)
        c.words(x, 0.6, f"{r * (O + I):,}", colour=EMBER, bold=True)
        c.words(x, 0.25, compared(O, I, r), SMALL, EMBER)
        said.append(f"{r * (O + I):,} at r = {r:,}, {compared(O, I, r)}")
    return c.picture(f"To scale: ΔW has {O:,} × {I:,} = {O * I:,} numbers; B and A have {'; '.join(said)}.")


@styled
def lora(O: int = 4096, I: int = 4096, r: int = 8) -> Picture:
    """LoRA in one picture: `flow` and `product` beside each other."""
    c = Canvas(13.6, 4.4)
    draw_flow(c, 0.2, 0.3, O, I, r)
    draw_product(c, 7.0, 0.15, O, I, r)
    return c.picture(f"{flow_says(O, I, r)} {product_says(O, I, r)}")


@styled
def merging(O: int = 4096, I: int = 4096, r: int = 8) -> Picture:
    """Unmerged and merged: two ways to one function, with what each stores and what a token costs."""
    c = Canvas(13.6, 6.2)
    left, mid, up = 3.15, 10.3, 4.8
    draw_flow(c, 0.2, up - 2.9, O, I, r)
    c.words(left, 5.95, "unmerged", bold=True)
    c.words(mid, 5.95, "merged", bold=True)
    c.words(6.97, up, "=", LETTER)
    c.words(mid - 2.78, up, "x", LETTER, slanted=True)
    c.way((mid - 2.55, up), (mid - 1.1, up))
    c.map(mid, up, 2.2, *heights(O, I), MERGED)
    c.words(mid, up, "W + s B A", LETTER, slanted=True)
    c.way((mid + 1.1, up), (mid + 2.55, up))
    c.words(mid + 2.78, up, "y", LETTER, slanted=True)
    for y, what in ((1.45, "numbers stored"), (1.0, "multiplications for a token")):
        c.line(left, y, [(f"{O * I:,}", INK), (f"+ {r * (O + I):,}", EMBER)])
        c.words(6.8, y, what, SMALL, SOFT)
        c.words(mid, y, f"{O * I:,}")
    c.words(left, 0.55, "load another A and B", colour=EMBER)
    c.words(6.8, 0.55, "another adapter", SMALL, SOFT)
    c.words(mid, 0.55, "start again from W")
    return c.picture(
        f"Two ways to one function of {I:,} inputs and {O:,} outputs. Unmerged, W and beside it A and B, "
        f"r = {r:,}: {O * I:,} + {r * (O + I):,} numbers are stored, and a token takes as many "
        f"multiplications; another adapter is another A and B. Merged, W + s B A as one matrix: {O * I:,} of "
        f"each; another adapter starts again from W."
    )


def flow_says(O: int, I: int, r: int) -> str:
    """The flow in words."""
    return (
        f"y = W x + s B A x: the frozen W takes {I:,} inputs to {O:,} outputs; beside it the trained A takes "
        f"them to r = {r:,} numbers, and B takes these to {O:,} outputs, which are scaled by s and added."
    )


def product_says(O: int, I: int, r: int) -> str:
    """The product in words."""
    return (
        f"To scale: ΔW = s B A has {O:,} × {I:,} = {O * I:,} numbers; B, {O:,} × {r:,}, and A, "
        f"{r:,} × {I:,}, have {r * (O + I):,} together, {compared(O, I, r)}."
    )


def compared(O: int, I: int, r: int) -> str:
    """How many numbers B and A have, compared with ΔW."""
    all_, few = O * I, r * (O + I)
    return f"{all_ / few:,.4g} times fewer" if few < all_ else f"{few / all_:,.4g} times as many"

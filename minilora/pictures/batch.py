"""One base, many adapters: the rows of a batch share the product with W, and each has its own A and B.

What S-LoRA (Sheng et al. 2023) and `serve/` do. The bytes are those of `count`.
"""

from collections.abc import Sequence
from pathlib import Path

from ..analysis.count import QV, count, human
from ..analysis.plotting import BLUE, GREEN, Picture, styled
from ..errors import MismatchError, check_int
from ..model import Config
from ..table import counted, drawn
from .canvas import BODY, FROZEN, LETTER, SMALL, SOFT, STEP, TRAINED, Canvas

ADAPTERS = (
    TRAINED,
    TRAINED._replace(fill="#DCEAF5", edge=BLUE),
    TRAINED._replace(fill="#D9EFE8", edge=GREEN),
)
BATCH = (1, 2, 1, 3, 0, 2)  # the adapter of each row; 0 is none
SUBSCRIPTS = "₁₂₃"
ROW = 0.5  # inches


@styled
def many_adapters(
    model: str | Path | Config = "llama-2-7b", r: int = 8, targets: str | Sequence[str] = QV,
    number: int = 1000,
) -> Picture:  # fmt: skip
    """A batch whose rows have different adapters over one base, and the memory of this number of adapters.

    `model`, `r` and `targets` are those of `count`, whose errors are raised; MismatchError if it does not
    know the model's size.
    """
    counts = count(model, r, targets)
    if counts.total is None:
        raise MismatchError(f"the parameters of {counts.name} are not known; expected a whole model")
    check_int("number", number, 1)
    c = Canvas(13.6, 6.2)
    left, mid, right, middle, up = 2.5, 6.8, 11.1, 3.95, 4.95
    for x, letter in ((1.0, "X"), (12.6, "Y")):
        c.words(x, middle + 1.85, letter, LETTER, slanted=True)
        for k, adapter in enumerate(BATCH):
            y = middle + (2.5 - k) * ROW
            c.box(x, y, 1.0, ROW, ADAPTERS[adapter - 1] if adapter else STEP)
            c.words(x, y, str(adapter or "–"), SMALL)
    c.way((1.5, middle), (left, middle), (left, up), (mid - 0.8, up))
    c.box(mid, up, 1.6, 1.1, FROZEN)
    c.words(mid, up + 0.15, "W", LETTER, slanted=True)
    c.frozen(mid, up - 0.25)
    c.way((mid + 0.8, up), (right, up), (right, middle + 0.2))
    c.words(4.2, up + 0.24, counted(len(BATCH), "row", "rows"), SMALL, SOFT)
    for k, look in enumerate(ADAPTERS):
        y = 3.2 - 0.85 * k
        c.way((1.5, middle), (left, middle), (left, y), (mid - 1.0, y))
        c.words(4.2, y + 0.24, counted(BATCH.count(k + 1), "row", "rows"), SMALL, SOFT)
        c.map(mid - 0.6, y, 0.8, 0.7, 0.36, look)
        c.words(mid - 0.6, y, f"A{SUBSCRIPTS[k]}", BODY, slanted=True)
        c.way((mid - 0.2, y), (mid + 0.2, y))
        c.map(mid + 0.6, y, 0.8, 0.36, 0.7, look)
        c.words(mid + 0.6, y, f"B{SUBSCRIPTS[k]}", BODY, slanted=True)
        c.way((mid + 1.0, y), (right, y), (right, middle - 0.2))
    c.sum(right, middle)
    c.way((right + 0.2, middle), (12.1, middle))
    base, each = 2 * counts.total, counts.half_bytes
    one = f"in 16 bits: {human(base)}, each adapter {human(each)}"
    many = (
        f"{number:,} adapters over one base: {human(base + number * each)}, "
        f"{number:,} merged models: {human(number * base)}"
    )
    c.words(mid, 0.75, f"{drawn(counts.name)} {one}")
    c.words(mid, 0.35, many)
    return c.picture(
        f"One base, many adapters: all {len(BATCH)} rows of a batch go through the frozen W, and the rows of "
        f"each of {len(ADAPTERS)} adapters through its own A and B besides; one row has none. {counts.name} "
        f"{one}; {many}."
    )

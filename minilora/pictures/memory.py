"""QLoRA: a base in 4 bits beside adapters in 16, what is stored, and what is decoded when.

A product decodes its weight and drops it, in the forward and again in the backward (Dettmers et al. 2023,
equations 5 and 6). The bytes are those of `count`.
"""

from collections.abc import Sequence
from pathlib import Path

from ..analysis.count import count, human
from ..analysis.plotting import Picture, styled
from ..errors import MismatchError
from ..model import Config
from ..table import drawn
from .canvas import EMBER, FROZEN, PASSING, SMALL, SOFT, TRAINED, Canvas
from .maps import draw_flow

LONGEST = 5.2  # inches of the longer bar


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

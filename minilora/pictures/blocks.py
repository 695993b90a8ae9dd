"""Where adapters sit in a Llama: the stream of tokens above, one of its blocks below, the targets marked.

Names are those that `targets` resolves; shapes and counts are those of `count`. Biases, and the norms of
queries and keys that Qwen 3 has, are left out.
"""

from collections.abc import Sequence
from pathlib import Path

from ..analysis.count import MLP, QV, count, shape_of
from ..analysis.plotting import Picture, styled
from ..errors import MismatchError
from ..model import Config
from ..table import drawn
from .canvas import EMBER, FROZEN, PASSING, SMALL, SOFT, STEP, TRAINED, Canvas

STREAM, ROWS = 4.7, (3.45, 2.25, 1.05)  # inches above the lower edge
WIDE, HIGH, TAG = 1.44, 0.66, 0.36  # of a weight, and of the adapter below it
MIDDLE, TALL = ROWS[1] - TAG / 2, ROWS[0] - ROWS[2] + HIGH + TAG  # of the norms
HALVES = (  # of a block: where it begins, its norm, its maps, what is done with their outputs, its last map
    (2.5, "input_layernorm", ("q_proj", "k_proj", "v_proj"), "attention", "o_proj"),
    (7.3, "post_attention_layernorm", ("gate_proj", "up_proj"), "SiLU(gate) · up", "down_proj"),
)


@styled
def block(
    model: str | Path | Config = "llama-3-8b", r: int = 8, targets: str | Sequence[str] = QV
) -> Picture:
    """The maps of a Llama in the flow of its tokens, and an adapter below each target.

    `model`, `r` and `targets` are those of `count`, whose errors are raised; MismatchError for no Llama.
    """
    counts = count(model, r, targets)
    maps = shape_of(model).maps
    if not maps.keys() >= {*MLP}:
        raise MismatchError(f"{counts.name} has only {', '.join(maps)}; expected a Llama")
    blocks = maps["q_proj"][2]
    trained = {row.kind: row.parameters // row.number for row in counts.rows}
    c = Canvas(14.45, 6.1)

    def weight(name: str, x: float, y: float, width: float = WIDE) -> None:
        c.box(x, y, width, HIGH, FROZEN)
        c.words(x, y + 0.14, name, SMALL)
        c.words(x, y - 0.16, "{} × {}".format(*maps[name][:2]), SMALL - 2, SOFT)
        if name in trained:
            c.box(x, y - (HIGH + TAG) / 2, width, TAG, TRAINED)
            c.words(x, y - (HIGH + TAG) / 2, f"+ {trained[name]:,}", SMALL, EMBER)

    c.box(6.85, 2.65, 9.9, 5.0, PASSING)
    c.words(1.9, 5.4, f"one of {blocks} blocks", SMALL, SOFT, at="left")
    c.way((1.7, STREAM), (12.1, STREAM), width=3)
    c.way((12.5, STREAM), (12.75, STREAM), width=3)
    for x, norm, first, step, last in HALVES:
        c.way((x, STREAM), (x, MIDDLE + TALL / 2))
        c.box(x, MIDDLE, 0.4, TALL, FROZEN)
        c.words(x, MIDDLE, norm, SMALL, upright=True)
        for name, y in zip(first, ROWS if len(first) == 3 else ROWS[::2], strict=True):
            c.way((x + 0.2, y), (x + 1.2 - WIDE / 2, y))
            weight(name, x + 1.2, y)
            c.way((x + 1.2 + WIDE / 2, y), (x + 2.2, y))
        c.box(x + 2.4, MIDDLE, 0.4, TALL, STEP)
        c.words(x + 2.4, MIDDLE, step, SMALL, upright=True)
        c.way((x + 2.6, ROWS[1]), (x + 3.6 - WIDE / 2, ROWS[1]))
        weight(last, x + 3.6, ROWS[1])
        c.way((x + 3.6, ROWS[1] + HIGH / 2), (x + 3.6, STREAM - 0.2))
        c.sum(x + 3.6, STREAM)
    c.box(12.3, STREAM, 0.4, 0.9, FROZEN)
    c.words(12.3, STREAM, "norm", SMALL, upright=True)
    weight("embed_tokens", 0.9, STREAM, 1.6)
    weight("lm_head", 13.55, STREAM, 1.6)
    share = f"{counts.parameters:,} of {counts.total:,} numbers are trained, 1 in {counts.reduction:,.0f}"
    c.words(7.225, 5.8, f"{drawn(counts.name)}, r = {r}: {share}")
    for y, look, words in ((0.8, FROZEN, "frozen"), (0.35, TRAINED, "A and B")):
        c.box(0.32, y, 0.4, 0.32, look)
        c.words(0.66, y, words, SMALL, at="left")
    c.snowflake(0.32, 0.8)
    adapters = ", ".join(f"{n:,} numbers beside {name}" for name, n in trained.items())
    return c.picture(
        f"A Llama: embed_tokens; {blocks} blocks of input_layernorm, q_proj, k_proj and v_proj, attention, "
        f"o_proj, post_attention_layernorm, gate_proj and up_proj, down_proj; norm; lm_head. Adapters of "
        f"{counts.name}, r = {r}: {adapters}; {share}."
    )

"""What is said about the size of the base: the gap to full fine-tuning, and the rank that is enough."""

from itertools import pairwise

import numpy as np

from ..experiments import size_figures
from .claim import FAILS, HOLDS, OVERVIEW, Claim, Rows, Verdict

SIZE = "figures/size/rows.jsonl"


def size_narrows_the_gap(rows: Rows) -> Verdict:
    """Holds when LoRA's loss less full fine-tuning's is lower on the widest base than on the narrowest,
    with every seed, at each rank.
    """
    narrow, *_, wide = size_figures.found(rows).values()
    good = {r: bool(wide.left(r).max() < narrow.left(r).min()) for r in narrow.ranks}
    right = [str(r) for r, so in good.items() if so]
    number = ", ".join(
        f"{np.median(narrow.left(r)):+.3f} to {np.median(wide.left(r)):+.3f} nats at r = {r}"
        for r in (min(good), max(good))
    )
    if len(right) == len(good):
        return HOLDS, number
    return f"holds when r is {' or '.join(right)}" if right else FAILS, number


def size_lowers_the_rank(rows: Rows) -> Verdict:
    """Holds when the rank for 90% of what full fine-tuning gains, or its share of the width, falls with
    each larger width, in the median.
    """
    arms = size_figures.found(rows)
    ranks = [float(np.median(arm.needed())) for arm in arms.values()]
    shares = [rank / width for rank, width in zip(ranks, arms, strict=True)]
    number = size_figures.each(arms, size_figures.needs)
    if all(b < a for a, b in pairwise(ranks)):
        return HOLDS, number
    relative = all(b < a for a, b in pairwise(shares))
    return "holds when the rank is taken as a share of the width" if relative else FAILS, number


CLAIMS = (
    Claim("The gap to full fine-tuning narrows as the model grows.", OVERVIEW,
          SIZE, "figures/size/gap.png", size_narrows_the_gap),
    Claim("The larger the base, the lower the rank that is enough.", "asked here",
          SIZE, "figures/size/needed.png", size_lowers_the_rank),
)  # fmt: skip

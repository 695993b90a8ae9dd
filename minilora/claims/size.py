"""What is said about the size of the base: the gap to full fine-tuning, and the rank that is enough."""

from itertools import pairwise

import numpy as np

from ..experiments import size_figures
from .claim import FAILS, HOLDS, OVERVIEW, Claim, Rows, Verdict, from_on

SIZE, SMOLLM2 = "figures/size/rows.jsonl", "benchmarks/results/smollm2_ranks.json"
SCHULMAN = "Schulman et al. 2025"


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
    number = f"rank needed, {size_figures.each(arms, size_figures.needs)}"
    if all(b < a for a, b in pairwise(ranks)):
        return HOLDS, number
    relative = all(b < a for a, b in pairwise(shares))
    return "holds when the rank is taken as a share of the width" if relative else FAILS, number


def real_model_needs_little(rows: Rows) -> Verdict:
    """Holds if r = 4 closes more than half of the gap from SmolLM2 to all its weights, with every seed."""
    (arm,) = size_figures.found(rows).values()
    number = ", ".join(f"{np.median(arm.share(r)):.0%} at r = {r}" for r in arm.ranks)
    return HOLDS if arm.share(4).min() > 0.5 else FAILS, number


def ranks_start_alike(rows: Rows) -> Verdict:
    """Holds when, from a rank on, the median loss is within 5% of full fine-tuning's gain of the best one."""
    (arm,) = size_figures.found(rows).values()
    losses = {r: float(np.median(arm.losses[r])) for r in arm.ranks}
    start = from_on([(r, loss - min(losses.values()) <= 0.05 * arm.gap) for r, loss in losses.items()])
    low, high = min(losses), max(losses)
    number = f"r = {low} {losses[low] - losses[high]:+.3f} nats from r = {high}, of a gain of {arm.gap:.3f}"
    if start == low:
        return HOLDS, number
    return FAILS if start in (None, high) else f"holds when r is at least {start}", number


def fifteen_times_the_rate(rows: Rows) -> Verdict:
    """Holds if the best rate of every rank, chosen after 16 steps, is 7.5 to 30 times that of full
    fine-tuning.
    """
    (arm,) = size_figures.found(rows).values()
    times = [arm.rates[r] / arm.rates[0] for r in arm.ranks]
    so = 7.5 <= min(times) <= max(times) <= 30
    number = f"{min(times):g} to {max(times):g} times"
    if min(times) == max(times):
        number = f"{min(times):g} times (the grid's rates are a factor of 2 apart)"
    return HOLDS if so else FAILS, number


CLAIMS = (
    Claim("The gap to full fine-tuning narrows as the model grows.", OVERVIEW,
          SIZE, "figures/size/gap.png", size_narrows_the_gap),
    Claim("The larger the base, the lower the rank that is enough.", "asked here",
          SIZE, "figures/size/needed.png", size_lowers_the_rank),
    Claim("Ranks as low as 4 capture most of the adaptation of a real model, too.", OVERVIEW,
          SMOLLM2, "benchmarks/results/smollm2_ranks.png", real_model_needs_little),
    Claim("Early in training all ranks have the same loss.", SCHULMAN,
          SMOLLM2, "benchmarks/results/smollm2_ranks.png", ranks_start_alike),
    Claim("In short runs LoRA's best learning rate is some 15 times that of full fine-tuning.", SCHULMAN,
          SMOLLM2, "benchmarks/results/smollm2_ranks.png", fifteen_times_the_rate),
)  # fmt: skip

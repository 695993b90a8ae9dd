"""What is said about LoRA beside full fine-tuning: what is learned, what is forgotten, and the spectra."""

from collections.abc import Mapping

import numpy as np

from ..experiments.forgetting_figures import Found, found, up_to
from .claim import FAILS, HOLDS, Claim, Rows, Verdict

FORGETTING = "figures/forgetting/rows.jsonl"
BIDERMAN, SHUTTLEWORTH = "Biderman et al. 2024", "Shuttleworth et al. 2024"


def at_ranks(f: Found, so: Mapping[str, np.ndarray]) -> str:
    """The verdict on a sentence that is right from the least rank on to some: text -> (ranks, seeds)."""
    ranks = {target: f.plan.ranks[: up_to(each)] for target, each in so.items()}
    if all(some == f.plan.ranks for some in ranks.values()):
        return HOLDS
    right = [
        f"the text is {target}" if some == f.plan.ranks else f"r is at most {some[-1]} on {target}"
        for target, some in ranks.items()
        if some
    ]
    return f"holds when {' or '.join(right)}" if right else FAILS


def over_full(f: Found, key: str) -> str:
    """LoRA less full fine-tuning at the least and the largest rank on every text, in medians."""
    low, high = f.plan.ranks[0], f.plan.ranks[-1]
    ends = {target: np.median(f.less(target, key), 1)[[0, -1]] for target in f.plan.targets}
    return "; ".join(f"{t} {a:+.3f} nats at r = {low}, {b:+.3f} at {high}" for t, (a, b) in ends.items())


def learns_less(rows: Rows) -> Verdict:
    """Holds when LoRA has a higher test loss than full fine-tuning, with each seed, up to some rank."""
    f = found(rows)
    so = {target: f.less(target, "learned") > 0 for target in f.plan.targets}
    return at_ranks(f, so), over_full(f, "learned")


def forgets_less(rows: Rows) -> Verdict:
    """Holds when LoRA has a lower loss on the pretraining text than full, with each seed, up to some rank."""
    f = found(rows)
    so = {target: f.less(target, "forgotten") < 0 for target in f.plan.targets}
    return at_ranks(f, so), over_full(f, "forgotten")


def forgets_less_at_equal_loss(rows: Rows) -> Verdict:
    """Holds when, at rates at which both have learned as much, LoRA has a lower loss on the pretraining text
    than full fine-tuning, with each seed, up to some rank.
    """
    f = found(rows)
    so = {target: f.less(target, "equal") < 0 for target in f.plan.targets}
    return at_ranks(f, so), over_full(f, "equal")


def has_intruders(rows: Rows) -> Verdict:
    """Holds when more than one in a hundred of the first ten singular vectors of W + ΔW resemble W's by
    chance only, but not with full fine-tuning, with each seed, up to some rank.
    """
    f = found(rows)
    low, high = f.plan.ranks[0], f.plan.ranks[-1]
    so, said = {}, []
    for target in f.plan.targets:
        lora = np.array([f.intruders(target, r) for r in f.plan.ranks])
        full = f.intruders(target, 0)
        so[target] = (lora > 0.01) & bool(full.max() <= 0.01)
        first, last = np.median(lora, 1)[[0, -1]]
        said.append(f"{target} {first:.1%} at r = {low}, {last:.1%} at {high}, {np.median(full):.1%} in full")
    return at_ranks(f, so), "; ".join(said)


def full_is_of_high_rank(rows: Rows) -> Verdict:
    """Holds if the effective rank of full fine-tuning's ΔW is over half of noise's, in each run."""
    f = found(rows)
    over = {target: f.of_noise(target, 0) for target in f.plan.targets}
    rank = {target: np.median(f.arms[target, 0].of_maps("effective_rank")) for target in f.plan.targets}
    number = "; ".join(f"{t} {rank[t]:.0f}, {np.median(x):.2f} of noise's" for t, x in over.items())
    return HOLDS if min(x.min() for x in over.values()) > 0.5 else FAILS, number


CLAIMS = (
    Claim("LoRA learns less than full fine-tuning.", BIDERMAN,
          FORGETTING, "figures/forgetting/fronts.png", learns_less),
    Claim("LoRA forgets less than full fine-tuning.", BIDERMAN,
          FORGETTING, "figures/forgetting/fronts.png", forgets_less),
    Claim("LoRA forgets less than full fine-tuning that has learned as much.", BIDERMAN,
          FORGETTING, "figures/forgetting/less.png", forgets_less_at_equal_loss),
    Claim("LoRA has intruder dimensions that full fine-tuning has not.", SHUTTLEWORTH,
          FORGETTING, "figures/forgetting/intruders.png", has_intruders),
    Claim("The change that full fine-tuning makes is of high rank.", BIDERMAN,
          FORGETTING, "figures/forgetting/spectrum.png", full_is_of_high_rank),
)  # fmt: skip

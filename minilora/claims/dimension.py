"""What is said about intrinsic dimension: how low it is, of what, and what it has to do with rank."""

from itertools import pairwise

import numpy as np

from ..experiments.intrinsic_figures import MEASURES, dimension, found
from .claim import FAILS, HOLDS, OVERVIEW, Claim, Rows, Verdict

INTRINSIC = "figures/intrinsic-dimension/rows.jsonl"
AGHAJANYAN = "Aghajanyan et al. 2020"
BY_ACCURACY = "holds when 90% is of the accuracy, not of the loss gap"


def by_measure(so: dict[str, bool]) -> str:
    """The verdict on a sentence that is right of the loss, or only of the accuracy."""
    return HOLDS if so["loss"] else BY_ACCURACY if so["accuracy"] else FAILS


def dimension_is_low(rows: Rows) -> Verdict:
    """Holds when d90, of loss or accuracy, is below a hundredth of all parameters, on each text."""
    f = found(rows)
    arms = {target: f.base(target) for target in f.plan.targets}
    so = {m: all(np.median(a.d90(m)) < 0.01 * a.start["parameters"] for a in arms.values()) for m in MEASURES}
    number = "; ".join(
        f"{t}: {dimension(a)}, of the accuracy {dimension(a, 'accuracy')}" for t, a in arms.items()
    )
    return by_measure(so), number


def base_is_lower_than_random(rows: Rows) -> Verdict:
    """Holds when d90, of the loss or of the accuracy, is below that from random weights, in each run."""
    f = found(rows)
    pairs = {target: (f.base(target), f.random(target)) for target in f.plan.targets}
    so = {m: all((one.d90(m) < other.d90(m).min()).all() for one, other in pairs.values()) for m in MEASURES}
    number = "; ".join(
        f"{t}: {dimension(one)} against {dimension(other)}, "
        f"of the accuracy {dimension(one, 'accuracy')} against {dimension(other, 'accuracy')}"
        for t, (one, other) in pairs.items()
    )
    return by_measure(so), number


def pretraining_lowers_it(rows: Rows) -> Verdict:
    """Holds when d90, of the loss or of the accuracy, falls with each longer pretraining, in the median."""
    arms = found(rows).trained()
    so = {
        m: all(np.median(b.d90(m)) < np.median(a.d90(m)) for a, b in pairwise(arms.values()))
        for m in MEASURES
    }
    return by_measure(so), "; ".join(f"{name}: {dimension(arm)}" for name, arm in arms.items())


def width_lowers_it(rows: Rows) -> Verdict:
    """Holds when d90, of the loss or of the accuracy, falls with each larger width, in the median."""
    arms = found(rows).wide()
    so = {
        m: all(np.median(b.d90(m)) < np.median(a.d90(m)) for a, b in pairwise(arms.values()))
        for m in MEASURES
    }
    return by_measure(so), "; ".join(f"{width} wide: {dimension(arm)}" for width, arm in arms.items())


def low_dimension_is_low_rank(rows: Rows) -> Verdict:
    """Holds if ΔW in the smallest random subspace has an effective rank below a quarter of the largest."""
    f = found(rows)
    base, low = f.base(), min(f.plan.dims)
    share = float(np.median(base.results["subspace", low].rank))
    return (
        HOLDS if share < 0.25 else FAILS,
        f"{share:.2f} of it at d = {low}; pure noise has {base.start['rank']:.2f}",
    )


def only_the_count_matters(rows: Rows) -> Verdict:
    """Holds if a random subspace of LoRA's size closes as much of the gap, less a twentieth, at each rank."""
    f = found(rows)
    base = f.base()
    less = {
        lora.parameters: float(np.median(base.share(lora, "loss")) - np.median(base.share(other, "loss")))
        for lora, other in f.pairs()
    }
    number = ", ".join(f"{-x:+.2f} of the gap with {n:,}" for n, x in less.items())
    return HOLDS if less and max(less.values()) <= 0.05 else FAILS, number


def scales_lower_it(rows: Rows) -> Verdict:
    """Holds if a scale for each weight matrix, counted in d, gives a lower d90 in the median seed."""
    base = found(rows).base()
    lower = np.median(base.d90("loss", "said")) < np.median(base.d90())
    return HOLDS if lower else FAILS, f"{dimension(base, method='said')} against {dimension(base)}"


def digits_take_hundreds(rows: Rows) -> Verdict:
    """Holds if d90 of the accuracy, as Li et al. take it, is below 1,000 in the median."""
    arm = found(rows).digits()
    low = np.median(arm.d90("accuracy")) < 1000
    return HOLDS if low else FAILS, f"{dimension(arm, 'accuracy')}, of the loss gap {dimension(arm)}"


CLAIMS = (
    Claim("A network learns digits from scratch in fewer than 1,000 random dimensions.",
          "asked here, after Li et al. 2018",
          INTRINSIC, "figures/intrinsic-dimension/digits.png", digits_take_hundreds),
    Claim("Fine-tuning has a low intrinsic dimension.", AGHAJANYAN,
          INTRINSIC, "figures/intrinsic-dimension/starts.png", dimension_is_low),
    Claim("A pretrained base has a lower intrinsic dimension than random weights.", AGHAJANYAN,
          INTRINSIC, "figures/intrinsic-dimension/starts.png", base_is_lower_than_random),
    Claim("The longer the pretraining, the lower the intrinsic dimension.", AGHAJANYAN,
          INTRINSIC, "figures/intrinsic-dimension/starts.png", pretraining_lowers_it),
    Claim("Larger models have a lower intrinsic dimension.", AGHAJANYAN,
          INTRINSIC, "figures/intrinsic-dimension/sizes.png", width_lowers_it),
    Claim("A low intrinsic dimension means a low rank of ΔW.", OVERVIEW,
          INTRINSIC, "figures/intrinsic-dimension/rank.png", low_dimension_is_low_rank),
    Claim("A random subspace of as many dimensions does as well as LoRA.", "asked here",
          INTRINSIC, "figures/intrinsic-dimension/rank.png", only_the_count_matters),
    Claim("A scale for each weight matrix lowers the intrinsic dimension.", AGHAJANYAN,
          INTRINSIC, "figures/intrinsic-dimension/rank.png", scales_lower_it),
)  # fmt: skip

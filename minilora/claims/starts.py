"""What is said about where LoRA starts: which factor is zero, and starts that W or its gradient chooses."""

import numpy as np

from ..experiments.initialisation_figures import found
from .claim import FAILS, HOLDS, OVERVIEW, Claim, Rows, Verdict

STARTS = "figures/initialisation/rows.jsonl"


def ranged(change: np.ndarray) -> str:
    """The median and the range of some differences of losses."""
    return f"{np.median(change):+.3f} nats ({change.min():+.3f} to {change.max():+.3f})"


def begins_at_the_base(rows: Rows) -> Verdict:
    """Holds if the loss before any step is exactly the base's with B zero, and not with both random."""
    f = found(rows)
    zero, both = f.away("B zero"), f.away("both random")
    return HOLDS if zero == 0 < both else FAILS, f"{zero:g} nats off the base; both random {both:.2f}"


def zero_is_critical(rows: Rows) -> Verdict:
    """Holds if both random has a higher loss than B zero with every seed, each at its own best rate."""
    change = found(rows).change("both random")
    return HOLDS if change.min() > 0 else FAILS, ranged(change)


def both_zero_is_stuck(rows: Rows) -> Verdict:
    """Holds if with both at zero dA and dB are exactly zero and the loss ends where the base's is."""
    f = found(rows)
    norms, apart = f.gradients("both zero"), abs(f.arms["both zero"].best - f.base).max()
    stuck = norms["A"] == norms["B"] == apart == 0
    number = f"|dA| {norms['A']:g}, |dB| {norms['B']:g}, {apart:g} nats off the base at the end"
    return HOLDS if stuck else FAILS, number


def b_zero_beats_a_zero(rows: Rows) -> Verdict:
    """Holds if A zero has a higher loss than B zero with every seed, each at its own best rate."""
    change = found(rows).change("A zero")
    return HOLDS if change.min() > 0 else FAILS, ranged(change)


def b_zero_takes_larger_rates(rows: Rows) -> Verdict:
    """Holds if the best rate of B zero is at least twice that of A zero."""
    f = found(rows)
    times = f.usual.rate / f.arms["A zero"].rate
    return HOLDS if times >= 2 else FAILS, f"{times:g} times"


def any_draw_of_a(rows: Rows) -> Verdict:
    """Holds if the ranges over seeds of uniform and Gaussian A meet, each at its own best rate."""
    f = found(rows)
    one, other = f.usual.best, f.arms["B zero (Gaussian A)"].best
    meet = one.min() <= other.max() and other.min() <= one.max()
    return HOLDS if meet else FAILS, ranged(f.change("B zero (Gaussian A)"))


def better_than_zero(rows: Rows, start: str) -> Verdict:
    """The verdict and number of a start against B zero."""
    f = found(rows)
    change = f.change(start)
    number = f"{ranged(change)}; at B zero's rate {np.median(f.change_at_one_rate(start)):+.3f}"
    return HOLDS if change.max() < 0 else FAILS, number


def pissa_is_better(rows: Rows) -> Verdict:
    """Holds if PiSSA has a lower loss than B zero with every seed, each at its own best rate."""
    return better_than_zero(rows, "PiSSA")


def olora_is_better(rows: Rows) -> Verdict:
    """Holds if OLoRA has a lower loss than B zero with every seed, each at its own best rate."""
    return better_than_zero(rows, "OLoRA")


def lora_ga_is_better(rows: Rows) -> Verdict:
    """Holds if LoRA-GA has a lower loss than B zero with every seed, each at its own best rate."""
    return better_than_zero(rows, "LoRA-GA")


def lora_ga_is_faster(rows: Rows) -> Verdict:
    """Holds if LoRA-GA has B zero's mean loss of the last tenth of all steps after half of them."""
    f = found(rows)
    usual, path = (np.median(f.path(start), 0) for start in ("B zero", "LoRA-GA"))
    width = max(len(path) // 10, 1)
    means = np.convolve(path, np.full(width, 1 / width), "valid")  # of steps 1 to width, 2 to width + 1, ...
    there = np.flatnonzero(means <= usual[-width:].mean() + 1e-12)
    steps = int(there[0]) + width if len(there) else None
    number = f"after {steps} of {len(path)} steps" if steps else f"not in {len(path)} steps"
    return HOLDS if steps and steps <= len(path) / 2 else FAILS, number


def principal_directions_help(rows: Rows) -> Verdict:
    """Holds if PiSSA has a lower loss than random directions with every seed, each at its best rate."""
    f = found(rows)
    change = f.arms["PiSSA"].best - f.arms["random directions"].best
    return HOLDS if change.max() < 0 else FAILS, ranged(change)


CLAIMS = (
    Claim("With B at zero training begins at the base's exact behaviour.", OVERVIEW,
          STARTS, "figures/initialisation/first_steps.png", begins_at_the_base),
    Claim("The zero start is critical.", OVERVIEW,
          STARTS, "figures/initialisation/starts.png", zero_is_critical),
    Claim("With both factors at zero nothing is ever learned.", "Hayou et al. 2024",
          STARTS, "figures/initialisation/first_steps.png", both_zero_is_stuck),
    Claim("Random A and zero B is better than zero A and random B.", "Hayou et al. 2024",
          STARTS, "figures/initialisation/starts.png", b_zero_beats_a_zero),
    Claim("Zero B allows larger learning rates than zero A.", "Hayou et al. 2024",
          STARTS, "figures/initialisation/starts.png", b_zero_takes_larger_rates),
    Claim("Whether A is drawn uniform or Gaussian does not matter.", OVERVIEW,
          STARTS, "figures/initialisation/starts.png", any_draw_of_a),
    Claim("PiSSA is better than the zero start.", "Meng et al. 2024",
          STARTS, "figures/initialisation/starts.png", pissa_is_better),
    Claim("OLoRA is better than the zero start.", "Büyükakyüz 2024",
          STARTS, "figures/initialisation/starts.png", olora_is_better),
    Claim("LoRA-GA is better than the zero start.", "Wang et al. 2024",
          STARTS, "figures/initialisation/starts.png", lora_ga_is_better),
    Claim("LoRA-GA converges at least twice as fast as LoRA.", "Wang et al. 2024",
          STARTS, "figures/initialisation/first_steps.png", lora_ga_is_faster),
    Claim("PiSSA gains by the principal directions of W.", "Meng et al. 2024",
          STARTS, "figures/initialisation/starts.png", principal_directions_help),
)  # fmt: skip

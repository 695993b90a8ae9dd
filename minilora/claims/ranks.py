"""What is said about ranks, decided by the rank sweep."""

import numpy as np

from ..experiments.harness import Row
from ..spectra import effective_rank
from .claim import FAILS, HOLDS, OVERVIEW, Claim, Rows, Verdict, from_on

SWEEP = "figures/rows.jsonl"
TEXT, KNOWN = "folio", "permuted:4"


def finals(rows: Rows, target: str, method: str) -> list[Row]:
    """The measured rows of one method on one target."""
    config = {"kind": "final", "target": target, "method": method}
    return [row for row in rows if row["status"] == "done" and config.items() <= row["config"].items()]


def values(rows: Rows, target: str, method: str, key: str) -> dict[int, np.ndarray]:
    """Rank -> a measured value of every seed; full fine-tuning has rank 0."""
    some = finals(rows, target, method)
    ranks = sorted({row["config"]["rank"] for row in some})
    return {r: np.array([row[key] for row in some if row["config"]["rank"] == r]) for r in ranks}


def little_is_enough(rows: Rows) -> Verdict:
    """Holds if r = 4 closes more than half of the gap from base to full fine-tuning, with every seed."""
    closed = values(rows, TEXT, "lora", "gap_closed")
    low = f"r = 4 closes {np.median(closed[4]):.0%} of the gap, r = 8 {np.median(closed[8]):.0%}"
    return HOLDS if closed[4].min() > 0.5 else FAILS, low


def as_good_as_full(rows: Rows) -> Verdict:
    """Holds when, from a rank on, the range of test losses over seeds reaches that of full fine-tuning."""
    lora, full = values(rows, TEXT, "lora", "test"), values(rows, TEXT, "full", "test")[0]
    start = from_on([(r, loss.min() <= full.max()) for r, loss in lora.items()])
    low, high = min(lora), max(lora)
    apart = {r: float(np.median(lora[r]) - np.median(full)) for r in (low, high)}
    far = f"{apart[low]:+.3f} nats at r = {low}, {apart[high]:+.3f} at {high}"
    if start == low:
        return HOLDS, far
    return FAILS if start is None else f"holds when r is at least {start}", far


def one_is_enough(rows: Rows) -> Verdict:
    """Holds if r = 1 is within the range of the best rank on both targets."""
    losses = [values(rows, target, "lora", "test") for target in (TEXT, KNOWN)]
    apart = [np.median(some[1]) - min(np.median(loss) for loss in some.values()) for some in losses]
    best = [some[1].min() <= min(some.values(), key=np.median).max() for some in losses]
    return HOLDS if all(best) else FAILS, f"{apart[0]:+.3f} and {apart[1]:+.3f} nats more than the best rank"


def known_rank(rows: Rows) -> Verdict:
    """Holds if the excess over the known floor is below 0.05 nats exactly from the true rank on."""
    floor = next(row["floor"] for row in rows if "floor" in row)
    excess = {r: np.median(loss) - floor for r, loss in values(rows, KNOWN, "lora", "test").items()}
    swaps = int(KNOWN.partition(":")[2])
    right = all((more < 0.05) == (r >= swaps) for r, more in excess.items())
    said = f"excess {excess[swaps - 1]:.2f} nats at r = {swaps - 1}, {excess[swaps]:.2f} at {swaps}"
    return HOLDS if right else FAILS, said


def diminishing(rows: Rows) -> Verdict:
    """Holds if every doubling of the rank helps, and the first one more than the last."""
    medians = [float(np.median(loss)) for loss in values(rows, TEXT, "lora", "test").values()]
    gains = -np.diff(medians)
    less = (gains > 0).all() and gains[0] > gains[-1]
    return HOLDS if less else FAILS, f"{gains[0]:.3f} nats, then less, to {gains[-1]:.3f}"


def full_is_low(rows: Rows) -> Verdict:
    """Holds if the effective rank of full fine-tuning's ΔW is below a quarter of its size, in the median."""
    shares = [
        effective_rank(np.array(S)) / min(row["shapes"][path])
        for row in finals(rows, TEXT, "full")
        for path, S in row["spectra"].items()
    ]
    share = float(np.median(shares))
    return HOLDS if share < 0.25 else FAILS, f"{share:.2f} of the largest rank it could have"


def ten_times_the_rate(rows: Rows) -> Verdict:
    """Holds if the best learning rate of every rank is 5 to 20 times that of full fine-tuning."""
    (full,) = {row["config"]["lr"] for row in finals(rows, TEXT, "full")}
    times = sorted({row["config"]["lr"] / full for row in finals(rows, TEXT, "lora")})
    said = f"{times[0]:.0f} times" if len(times) == 1 else f"{times[0]:.0f} to {times[-1]:.0f} times"
    return HOLDS if 5 <= times[0] <= times[-1] <= 20 else FAILS, said


CLAIMS = (
    Claim("Ranks as low as 4 or 8 capture most of the adaptation.", OVERVIEW,
          SWEEP, "figures/loss_against_rank_folio.png", little_is_enough),
    Claim("LoRA always matches full fine-tuning.", OVERVIEW,
          SWEEP, "figures/loss_against_rank_folio.png", as_good_as_full),
    Claim("Rank 1 is fine for everything.", OVERVIEW,
          SWEEP, "figures/known_rank_permuted_4.png", one_is_enough),
    Claim("A task that a change of rank 4 solves needs rank 4, and no more.", "Eckart and Young 1936",
          SWEEP, "figures/known_rank_permuted_4.png", known_rank),
    Claim("Higher ranks approach full fine-tuning with diminishing returns.", OVERVIEW,
          SWEEP, "figures/loss_against_rank_folio.png", diminishing),
    Claim("The ΔW of full fine-tuning has a low rank itself.", OVERVIEW,
          SWEEP, "figures/energy_folio.png", full_is_low),
    Claim("LoRA's best learning rate is some ten times that of full fine-tuning.", "Schulman et al. 2025",
          SWEEP, "figures/curves_folio.png", ten_times_the_rate),
)  # fmt: skip

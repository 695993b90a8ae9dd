"""What is said about ranks and directions: the rank sweep, tasks of a known rank, the subspaces of ΔW."""

import numpy as np

from ..experiments.harness import Row
from ..experiments.known_figures import NOTHING, TITLES, elbow, left, planted, shown, tasks
from ..experiments.reading import finals
from ..experiments.subspace_figures import gained, maps, overlap, short, weights
from ..spectra import effective_rank
from .claim import FAILS, HOLDS, HU, OVERVIEW, Claim, Rows, Verdict, from_on

SWEEP = "figures/rows.jsonl"
PLANTED, SUBSPACES = (f"figures/{name}/rows.jsonl" for name in ("known-rank", "subspaces"))
TEXT, KNOWN = "folio", "permuted:4"


def swept(rows: Rows, target: str, method: str) -> list[Row]:
    """The measured rows of one method on one target."""
    config = {"kind": "final", "target": target, "method": method}
    return [row for row in rows if row["status"] == "done" and config.items() <= row["config"].items()]


def values(rows: Rows, target: str, method: str, key: str) -> dict[int, np.ndarray]:
    """Rank -> a measured value of every seed; full fine-tuning has rank 0."""
    some = swept(rows, target, method)
    ranks = sorted({row["config"]["rank"] for row in some})
    return {r: np.array([row[key] for row in some if row["config"]["rank"] == r]) for r in ranks}


def little_is_enough(rows: Rows) -> Verdict:
    """Holds if r = 4 closes more than half of the gap from base to full fine-tuning, with every seed."""
    closed = values(rows, TEXT, "lora", "gap_closed")
    low = f"medians: r = 4 closes {np.median(closed[4]):.0%} of the gap, r = 8 {np.median(closed[8]):.0%}"
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


def of_tasks(right: dict[str, list[bool]]) -> Verdict:
    """The verdict on a sentence by the cases of each task in which it is right: for all, or some tasks."""
    good = [TITLES[task] for task, cases in right.items() if all(cases)]
    number = f"in {sum(map(sum, right.values()))} of {sum(map(len, right.values()))} cases"
    if len(good) == len(right):
        return HOLDS, number
    return f"holds when the task is {' or '.join(good)}" if good else FAILS, number


def known_rank(rows: Rows) -> Verdict:
    """Holds when nothing is left to gain exactly from the planted rank on, for each rank of a task."""
    return of_tasks({t: [elbow(rows, t, k) == k for k in planted(rows, t)] for t in tasks(rows)})


def spectrum_shows_it(rows: Rows) -> Verdict:
    """Holds when the largest drop of the spectrum at r = 16 is at the planted rank, in each run of a task."""
    return of_tasks({t: [n == k for k in planted(rows, t) for n in shown(rows, t, k)] for t in tasks(rows)})


def best_of_its_rank(rows: Rows) -> Verdict:
    """Holds when LoRA is within 0.02 of the best ΔW of its rank (the base: 1), in each run of a task."""
    near: dict[str, list[bool]] = {t: [] for t in tasks(rows)}
    for row in finals(rows):
        if "best" in row:  # reversed text has no known answer
            near[row["config"]["task"]].append(row["excess"] - row["best"] <= NOTHING)
    return of_tasks(near)


def needs_rank(rows: Rows) -> Verdict:
    """Holds if on reversed text r = 1 leaves 0.02 more of the base's excess than r = 64, with every seed."""
    rest = left(rows)
    one, all_weights = float(np.median(rest[1])), float(np.median(rest[0]))
    number = (
        f"r = 1 leaves {one:.0%}, r = 64 {np.median(rest[64]):.0%}, all weights {all_weights:.0%}; "
        f"r = 1 closes {(1 - one) / (1 - all_weights):.0%} of full fine-tuning's gain"
    )
    return HOLDS if (rest[1] - rest[64]).min() > NOTHING else FAILS, number


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
        for row in swept(rows, TEXT, "full")
        for path, S in row["spectra"].items()
    ]
    share = float(np.median(shares))
    return HOLDS if share < 0.25 else FAILS, f"{share:.2f} of the largest rank it could have"


# ---- directions


def by_kind(rows: Rows, numbers: np.ndarray) -> dict[str, np.ndarray]:
    """Kind of map -> a number (seeds,) of its median layer, from that of all maps (maps, seeds)."""
    kinds = [short(path).partition(" ")[0] for path in maps(rows)]
    return {kind: np.median(numbers[np.array(kinds) == kind], 0) for kind in dict.fromkeys(kinds)}


def of_kinds(good: dict[str, bool]) -> str:
    """The verdict on a sentence that is right for some kinds of maps, of all those that are adapted."""
    right = [kind for kind, is_right in good.items() if is_right]
    if len(right) == len(good):
        return HOLDS
    return f"holds when the map is {' or '.join(right)}" if right else FAILS


def ranks_overlap(rows: Rows) -> Verdict:
    """Holds when the first directions of A at r = 8 and 64 are more than halfway from chance to the same, and
    r = 8 reaches nine tenths of the gain of r = 64, with every seed, in the median layer of a kind of map.
    """
    done = finals(rows)
    first, gain = overlap(done, "ranks", "A")[..., 0], gained(done)
    enough = bool(gain.min() >= 0.9)
    number = f"{np.median(first):.2f} of the way from chance, and {np.median(gain):.0%} of the gain"
    return of_kinds({kind: enough and x.min() > 0.5 for kind, x in by_kind(done, first).items()}), number


def seeds_agree(rows: Rows) -> Verdict:
    """Holds when the first i directions of A at r = 64 are more than halfway from chance to the same, in the
    median map, in every pair of seeds.
    """
    share = np.median(overlap(finals(rows), "seeds", "A"), 0)  # (pairs, i)
    n = int(np.append(share.min(0) > 0.5, False).argmin())
    middle = np.median(share, 0)
    number = f"{middle[0]:.2f} of the way from chance for the first one, {middle[3]:.2f} for the first eight"
    if n == share.shape[1]:
        return HOLDS, number
    return f"holds when the first {2 ** (n - 1)} are meant" if n else FAILS, number


def amplifies(rows: Rows) -> Verdict:
    """Holds when the factor at r = 4 is 10 to 40, and W has less than a tenth there of what it has along its
    own first four, with every seed, in the median layer of a kind of map.
    """
    done = finals(rows)
    factor, random, own = (weights(done, 4, key).T for key in ("factor", "random", "emphasis"))
    factors, owns = by_kind(done, factor), by_kind(done, own)
    good = {
        kind: bool(x.min() >= 10 and x.max() <= 40 and owns[kind].max() < 0.1) for kind, x in factors.items()
    }
    number = f"{np.median(factor):.1f} times, along random directions {np.median(random):.1f}"
    return of_kinds(good), f"{number}; W has {np.median(own):.2f} there of its own first four"


def follows_w(rows: Rows) -> Verdict:
    """Holds when W has more along the directions of ΔW at r = 4 than along random ones, with every seed, in
    the median layer of a kind of map.
    """
    done = finals(rows)
    more = (weights(done, 4, "random") / weights(done, 4, "factor")).T  # |Uᵀ W V| over that of random ones
    good = {kind: bool(x.min() > 1) for kind, x in by_kind(done, more).items()}
    return of_kinds(good), f"{np.median(more):.2f} times as much"


CLAIMS = (
    Claim("Ranks as low as 4 or 8 capture most of the adaptation.", OVERVIEW,
          SWEEP, "figures/loss_against_rank_folio.png", little_is_enough),
    Claim("LoRA always matches full fine-tuning.", OVERVIEW,
          SWEEP, "figures/loss_against_rank_folio.png", as_good_as_full),
    Claim("Rank 1 is fine for everything.", OVERVIEW,
          SWEEP, "figures/known_rank_permuted_4.png", one_is_enough),
    Claim("A task that a change of rank k solves needs rank k, and no more.", "Eckart and Young 1936",
          PLANTED, "figures/known-rank/elbows.png", known_rank),
    Claim("The spectrum of ΔW shows the rank that a task has.", "its use",
          PLANTED, "figures/known-rank/found.png", spectrum_shows_it),
    Claim("Training finds the best ΔW of its rank.", "Eckart and Young 1936",
          PLANTED, "figures/known-rank/elbows.png", best_of_its_rank),
    Claim("Reversed text takes more than r = 1.", "asked here",
          PLANTED, "figures/known-rank/reversed.png", needs_rank),
    Claim("Higher ranks approach full fine-tuning with diminishing returns.", OVERVIEW,
          SWEEP, "figures/loss_against_rank_folio.png", diminishing),
    Claim("The ΔW of full fine-tuning has a low rank itself.", OVERVIEW,
          SWEEP, "figures/energy_folio.png", full_is_low),
    Claim("The top directions of r = 8 and r = 64 overlap, so low rank is enough.", HU,
          SUBSPACES, "figures/subspaces/ranks.png", ranks_overlap),
    Claim("Different seeds find the same directions.", HU,
          SUBSPACES, "figures/subspaces/seeds.png", seeds_agree),
    Claim("ΔW amplifies directions that W does not emphasise, by a factor of about 20 at r = 4.", HU,
          SUBSPACES, "figures/subspaces/amplification.png", amplifies),
    Claim("W has more along the directions of ΔW than along random ones.", HU,
          SUBSPACES, "figures/subspaces/amplification.png", follows_w),
)  # fmt: skip

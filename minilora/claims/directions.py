"""What is said about the directions of ΔW: shared across ranks and seeds, and not those of W."""

import numpy as np

from ..experiments.adding_figures import finals
from ..experiments.subspace_figures import gained, maps, overlap, short, weights
from .claim import FAILS, HOLDS, HU, Claim, Rows, Verdict

SUBSPACES = "figures/subspaces/rows.jsonl"


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


CLAIMS = (
    Claim("The top directions of r = 8 and r = 64 overlap, so low rank is enough.", HU,
          SUBSPACES, "figures/subspaces/ranks.png", ranks_overlap),
    Claim("Different seeds find the same directions.", HU,
          SUBSPACES, "figures/subspaces/seeds.png", seeds_agree),
    Claim("ΔW amplifies directions that W does not emphasise, by a factor of about 20 at r = 4.", HU,
          SUBSPACES, "figures/subspaces/amplification.png", amplifies),
)  # fmt: skip

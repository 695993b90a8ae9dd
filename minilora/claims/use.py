"""What is said about merging, adding and serving adapters, decided by an experiment and by benchmarks."""

from collections.abc import Sequence

import numpy as np

from ..experiments import adding_figures
from ..experiments.adding_adapters import OWN
from ..experiments.merging import DTYPES
from ..experiments.merging_figures import LOST, WAYS, at, cost, drift
from ..experiments.reading import finals
from .claim import FAILS, HOLDS, HU, OVERVIEW, Claim, Rows, Verdict, from_on

ADDING = "figures/adding-adapters/rows.jsonl"
MERGED, ROUNDED = "figures/merge_equivalence.json", "figures/merging/rows.jsonl"
FOUR, SERVED = "benchmarks/results/merge_four_bits.json", "benchmarks/results/serving.json"


def merging_is_exact(rows: Rows) -> Verdict:
    """Holds if merged and unmerged outputs differ by no more than the bound of roundings, at every width."""
    most = max(row["ratio"] for row in rows)
    return HOLDS if most <= 1 else FAILS, f"at most {most:.2f} of the bound"


def rounding_is_nothing(rows: Rows) -> Verdict:
    """Holds when ΔW is so large that rounding to bfloat16 loses a hundredth of it at most, with each seed."""
    size, lost = (at(rows, "bfloat16", key) for key in ("size", "lost"))
    few, most = np.median(lost[:, -1]), np.median(lost[:, 0])
    number = f"loses {few:.2g} of it, and {most:.2g} of a thousandth of it"
    found = list(zip(np.median(size, 0).tolist(), (lost.max(0) <= LOST).tolist(), strict=True))
    start = from_on(found)
    if start == found[0][0]:
        return HOLDS, number
    return FAILS if start is None else f"holds when ΔW has {start:.2f} of W's norm", number


def loss_stays(rows: Rows) -> Verdict:
    """Holds if test losses merged and apart differ by less than 0.001 nats in each format, with each seed."""
    most = max(float(np.abs(cost(rows, dtype)[:, -1]).max()) for dtype in DTYPES)
    return HOLDS if most < 1e-3 else FAILS, f"by at most {most:.1e} nats"


def subtracting_undoes_it(rows: Rows) -> Verdict:
    """Holds when W is what it was to the bit after 1,000 additions and subtractions, of one ΔW or of many."""
    away = {way: [float(drift(rows, way, dtype)[:, -1].max()) for dtype in DTYPES] for way in WAYS}
    number = (
        f"{max(away['others']):.2g} of ΔW away, with another ΔW each time; {max(away['one']):.2g} with one"
    )
    good = [said for way, said in WAYS.items() if max(away[way]) == 0]
    if len(good) == len(away):
        return HOLDS, number
    return f"holds when it is {good[0]}" if good else FAILS, number


def merging_into_four_bits(rows: Rows) -> Verdict:
    """Holds when ΔW is so large that Q(Ŵ + ΔW) keeps nine tenths of it, in the median seed."""
    kept: dict[float, list[tuple[float, float]]] = {}  # factor of ΔW -> |ΔW| / |W| and the share kept
    for row in rows:
        if (row["way"], row["route"]) == ("scaled", "Q(Ŵ + ΔW)"):
            kept.setdefault(row["t"], []).append((row["size"], row["kept"]))
    found = sorted(tuple(np.median(some, 0)) for some in kept.values())
    (small, few), (large, most) = found[0], found[-1]
    number = f"keeps {few:.2f} of a ΔW with {small:.3f} of W's norm, {most:.2f} of one with {large:.2f}"
    start = from_on([(size, share >= 0.9) for size, share in found])
    if start == small:
        return HOLDS, number
    return FAILS if start is None else f"holds when ΔW has {start:.2f} of W's norm", number


def against_base(rows: Rows, name: str, texts: Sequence[str]) -> np.ndarray:
    """Test losses less the base's, (seeds, texts), of a combination or a method of adding adapters."""
    return adding_figures.gains(finals(rows), name, texts)


def adding_blends(rows: Rows) -> Verdict:
    """Holds when a sum is better than the base on every text, in the median; the sum itself, or the mean."""
    targets = rows[0]["config"]["plan"]["targets"]
    names = (" + ".join(targets), "mean of all")
    plain, mean = (np.median(against_base(rows, name, targets), 0) for name in names)
    better = (plain < 0).sum(), (mean < 0).sum()
    number = f"better than none on {better[0]} of {len(targets)} texts; as a mean on {better[1]}"
    if (plain < 0).all():
        return HOLDS, number
    return "holds when the adapters are averaged" if (mean < 0).all() else FAILS, number


def ties_helps(rows: Rows) -> Verdict:
    """Holds if TIES has a lower mean loss than the plain sum, each at its best scale, in the median."""
    targets = rows[0]["config"]["plan"]["targets"]
    ties, plain = (float(np.median(against_base(rows, name, targets).mean(1))) for name in ("ties", "linear"))
    return HOLDS if ties < plain else FAILS, f"{ties:+.2f} nats, the sum {plain:+.2f}"


def negation_unlearns(rows: Rows) -> Verdict:
    """Holds if each text gets worse without its adapter by ten times as much as the base's own text does."""
    targets = rows[0]["config"]["plan"]["targets"]
    away = {t: np.median(against_base(rows, f"- {t}", [t, OWN]), 0) for t in targets}
    times = [float(own / other) for own, other in away.values()]
    return HOLDS if min(times) >= 10 else FAILS, f"by {min(times):.1f} to {max(times):.1f} times"


def linear_is_a_sum(rows: Rows) -> Verdict:
    """Holds if PEFT's "linear" is within a hundredth of the sum's norm, in the median seed."""
    done = [row["methods"]["peft_linear"]["residual"] for row in rows if "methods" in row]
    return HOLDS if np.median(done) < 0.01 else FAILS, f"{np.median(done):.2f} of the sum's norm away from it"


def many_over_one(rows: Rows) -> Verdict:
    """Holds if a thousand adapters on all linear maps keep more than half of the base's throughput."""
    run = {"kind": "engine", "adapters": 1000, "popularity": "zipf", "targets": "all-linear"}
    (share,) = (row["to_base"] for row in rows if run.items() <= row.items())
    return HOLDS if share > 0.5 else FAILS, f"{share:.2f} of it"


CLAIMS = (
    Claim("Merging changes nothing but roundings.", HU,
          MERGED, "figures/merge_equivalence.png", merging_is_exact),
    Claim("In 16 bits a merge is exact, too.", OVERVIEW,
          ROUNDED, "figures/merging/rounding.png", rounding_is_nothing),
    Claim("A merged model has the loss of the unmerged one.", HU,
          ROUNDED, "figures/merging/rounding.png", loss_stays),
    Claim("An adapter that was added to the weights can be subtracted again.", HU,
          ROUNDED, "figures/merging/drifting.png", subtracting_undoes_it),
    Claim("A QLoRA adapter can be merged into its 4-bit base.", OVERVIEW,
          FOUR, "benchmarks/results/merge_four_bits.png", merging_into_four_bits),
    Claim("Adapters can be added to blend what they can.", OVERVIEW,
          ADDING, "figures/adding-adapters/heat_map.png", adding_blends),
    Claim("TIES combines adapters better than their plain sum.", "Yadav et al. 2023",
          ADDING, "figures/adding-adapters/methods.png", ties_helps),
    Claim("An adapter taken away unlearns its text, and little else.", "Ilharco et al. 2022",
          ADDING, "figures/adding-adapters/heat_map.png", negation_unlearns),
    Claim("PEFT's linear combination is the weighted sum of adapters.", "its name",
          ADDING, "figures/adding-adapters/methods.png", linear_is_a_sum),
    Claim("One base serves a thousand adapters at once.", "Sheng et al. 2023",
          SERVED, "benchmarks/results/serving.png", many_over_one),
)  # fmt: skip

"""What is said about where and how to adapt: which matrices, which scale, which learning rate."""

from collections.abc import Sequence

import numpy as np

from ..experiments import scale_figures
from ..experiments.harness import Row
from ..experiments.scale_figures import FULL, Found
from ..experiments.which_figures import budgets, gains, losses, medians, texts
from ..experiments.which_matrices import SETS
from .claim import FAILS, HOLDS, HU, OVERVIEW, Claim, Rows, Verdict

WHICH, SCALES = (f"figures/{name}/rows.jsonl" for name in ("which-matrices", "scale"))
SINGLE, ATTENDING = ("Q", "K", "V", "O"), ("Q", "K", "V", "O", "QV", "QKVO")
Case = tuple[str, int]  # a text, and which budget: 0 is the smallest


def spent(rows: Rows) -> dict[Case, dict[str, list[Row]]]:
    """Case -> set of matrices -> its rows, one for each seed."""
    return {(text, i): found for text in texts(rows) for i, found in enumerate(budgets(rows, text))}


def apart(rows: Rows, one: str, others: Sequence[str]) -> list[tuple[float, bool]]:
    """For each case the nats from the best of some sets to one set, in medians, and whether ranges meet."""
    out = []
    for found in spent(rows).values():
        best = next(name for name in medians(found) if name in others)
        mine, its = losses(found[one]), losses(found[best])
        out.append((float(np.median(mine) - np.median(its)), bool(mine.min() <= its.max())))
    return out


def span(nats: Sequence[float]) -> str:
    """The least and the greatest of some differences."""
    return f"{min(nats):+.3f} to {max(nats):+.3f} nats"


def q_and_v(rows: Rows) -> Verdict:
    """Holds if its range meets the best set's on each text and budget; or when only attention is adapted."""
    nats, meet = zip(*apart(rows, "QV", list(SETS)), strict=True)
    number = f"{span(nats)} from the best set"
    if all(meet):
        return HOLDS, number
    among = all(met for _, met in apart(rows, "QV", ATTENDING))
    return "holds when only attention is adapted" if among else FAILS, number


def all_over_q_and_v(rows: Rows) -> Verdict:
    """Holds if all maps beat Q and V with each seed on each text and budget; or when on some texts."""
    gained = {case: gains(found) for case, found in spent(rows).items()}
    number = f"{span([float(np.median(each)) for each in gained.values()])} better"
    lost = {text for (text, _), each in gained.items() if each.min() <= 0}
    won = [text for text in dict.fromkeys(text for text, _ in gained) if text not in lost]
    if not lost:
        return HOLDS, number
    return f"holds when the text is {' or '.join(won)}" if won else FAILS, number


def most_at_low_rank(rows: Rows) -> Verdict:
    """Holds if all maps gain on Q and V, most at the smallest budget, on each text, in the median seed."""
    by_text: dict[str, list[float]] = {}
    for (text, _), found in spent(rows).items():
        by_text.setdefault(text, []).append(float(np.median(gains(found))))
    number = "; ".join(
        f"{text} {', then '.join(f'{x:+.3f}' for x in nats)} nats" for text, nats in by_text.items()
    )
    most = all(nats[0] > max(0.0, *nats[1:]) for nats in by_text.values())
    return HOLDS if most else FAILS, number


def more_matrices(rows: Rows) -> Verdict:
    """Holds if Q, K, V and O together have a lower median loss than each alone, on each text and budget."""
    nats = [more for more, _ in apart(rows, "QKVO", SINGLE)]
    return HOLDS if max(nats) < 0 else FAILS, f"{span(nats)} from the best single one"


def mlp_over_attention(rows: Rows) -> Verdict:
    """Holds if the MLP's range is below that of Q, K, V and O together, on each text and budget."""
    found = apart(rows, "QKVO", ["MLP"])
    better = not any(meet for _, meet in found)
    return HOLDS if better else FAILS, f"attention {span([more for more, _ in found])} from the MLP"


def attention_adds_nothing(rows: Rows) -> Verdict:
    """Holds if the MLP's range meets that of all maps, or is below it, on each text and budget."""
    nats, meet = zip(*apart(rows, "MLP", ["all"]), strict=True)
    return HOLDS if all(meet) else FAILS, f"the MLP {span(nats)} from all maps"


def twentieth(f: Found) -> float:
    """A twentieth of what full fine-tuning gains over the base, in nats."""
    return 0.05 * (f.base - float(np.median(f.arms[FULL].best)))


def high_ranks_collapse(rows: Rows) -> Verdict:
    """Holds if with alpha / r the largest rank is no better at the best rate of the middle one."""
    f = scale_figures.found(rows)
    top = f.plan.ranks[-1]
    better = f.scaled("alpha / r")[top].tests[f.middle.rate] < f.middle.best
    number = f"{f.more('alpha / r'):+.3f} nats from r = {f.plan.middle} to {top}"
    return FAILS if better.all() else HOLDS, f"{number}; {f.more('alpha / √r'):+.3f} with alpha / √r"


def one_rate_fits_all(rows: Rows) -> Verdict:
    """Holds if with alpha / √r the middle rank's best rate costs no rank a twentieth of the gap to full."""
    f = scale_figures.found(rows)
    number = f"at most {f.cost('alpha / √r'):.3f} nats; with alpha / r {f.cost('alpha / r'):.3f}"
    return HOLDS if f.cost("alpha / √r") <= twentieth(f) else FAILS, number


def rates_are_alike(rows: Rows) -> Verdict:
    """Holds if with alpha / r the best rates of all ranks but the first are within a factor of two."""
    f = scale_figures.found(rows)
    number = f"a factor of {f.apart('alpha / r'):.1f}; with alpha / √r {f.apart('alpha / √r'):.1f}"
    return HOLDS if f.apart("alpha / r") < 2 else FAILS, number


def alpha_is_a_rate(rows: Rows) -> Verdict:
    """Holds if, each at its own best rate, the scalings are within a twentieth of the gap at every rank."""
    f = scale_figures.found(rows)
    by_scaling = [
        [np.median(arm.best) for arm in f.scaled(s).values()]
        for s in ("alpha / r", "alpha / √r", "alpha = 2r")
    ]
    most = float(np.ptp(by_scaling, 0).max())
    return HOLDS if most <= twentieth(f) else FAILS, f"at most {most:.3f} nats apart"


def alpha_2r_is_better(rows: Rows) -> Verdict:
    """Holds if alpha = 2r has a lower loss than alpha / r at every other rank, each at its best rate."""
    f = scale_figures.found(rows)
    two, fixed = f.scaled("alpha = 2r"), f.scaled("alpha / r")
    less = [float(np.median(two[r].best - fixed[r].best)) for r in f.plan.ranks if r != f.plan.middle]
    return HOLDS if max(less) < 0 else FAILS, f"{min(less):+.3f} to {max(less):+.3f} nats"


def lora_plus_helps(rows: Rows) -> Verdict:
    """Holds if B 16 times as fast as A gives a lower loss with every seed, each way at its best rate."""
    f = scale_figures.found(rows)
    change = f.plus[16.0].best - f.plus[1.0].best
    return (
        HOLDS if change.max() < 0 else FAILS,
        f"{np.median(change):+.3f} nats ({change.min():+.3f} to {change.max():+.3f})",
    )


def ten_times_the_rate(rows: Rows) -> Verdict:
    """Holds if with alpha / r the best rate of every rank is 5 to 20 times that of full fine-tuning."""
    times = [*scale_figures.found(rows).times("alpha / r").values()]
    return HOLDS if 5 <= min(times) <= max(
        times
    ) <= 20 else FAILS, f"{min(times):.0f} to {max(times):.0f} times"


CLAIMS = (
    Claim("Adapting Q and V is the best trade-off.", HU,
          WHICH, "figures/which-matrices/which_set.png", q_and_v),
    Claim("For as many parameters, adapting all linear maps is better than Q and V.", OVERVIEW,
          WHICH, "figures/which-matrices/all_against_qv.png", all_over_q_and_v),
    Claim("All linear maps are better than Q and V above all at low rank.", OVERVIEW,
          WHICH, "figures/which-matrices/all_against_qv.png", most_at_low_rank),
    Claim("More attention matrices at a lower rank are better than one at a higher.", HU,
          WHICH, "figures/which-matrices/which_set.png", more_matrices),
    Claim("LoRA on the MLP is better than on attention with as many parameters.", "Schulman et al. 2025",
          WHICH, "figures/which-matrices/which_set.png", mlp_over_attention),
    Claim("LoRA on attention adds nothing to LoRA on the MLP.", "Schulman et al. 2025",
          WHICH, "figures/which-matrices/which_set.png", attention_adds_nothing),
    Claim("With alpha / r high ranks gain nothing over lower ones.", "Kalajdzievski 2023",
          SCALES, "figures/scale/one_rate.png", high_ranks_collapse),
    Claim("With alpha / √r one learning rate serves every rank.", "Kalajdzievski 2023",
          SCALES, "figures/scale/one_rate.png", one_rate_fits_all),
    Claim("With alpha / r the best learning rate hardly depends on the rank.", "Schulman et al. 2025",
          SCALES, "figures/scale/rates.png", rates_are_alike),
    Claim("Tuning alpha is the same as tuning the learning rate.", HU,
          SCALES, "figures/scale/rates.png", alpha_is_a_rate),
    Claim("alpha = 2r is better than a fixed alpha.", "Biderman et al. 2024",
          SCALES, "figures/scale/rates.png", alpha_2r_is_better),
    Claim("LoRA+ is better than one rate for A and B.", "Hayou et al. 2024",
          SCALES, "figures/scale/lora_plus.png", lora_plus_helps),
    Claim("LoRA's best learning rate is some ten times that of full fine-tuning.", "Schulman et al. 2025",
          SCALES, "figures/scale/rates.png", ten_times_the_rate),
)  # fmt: skip

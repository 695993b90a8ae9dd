"""What is said about LoRA's rivals: adapters that are no matrix, rows before the text, vectors, and DoRA."""

from collections.abc import Sequence
from statistics import mean

import numpy as np

from ..experiments.rivals import LORA, PROMPT
from ..experiments.rivals_figures import UNMERGED, Found, found
from .claim import FAILS, HOLDS, HU, OVERVIEW, Claim, Rows, Verdict

RIVALS, TIMED = "figures/rivals/rows.jsonl", "benchmarks/results/methods.json"
BOTTLENECKS, ROWS = UNMERGED[:2], ("prefix", PROMPT)
NEARLY = 0.9  # of the gap from the base to full fine-tuning


def ranged(change: np.ndarray) -> str:
    """The median and the range of some differences of losses."""
    return f"{np.median(change):+.3f} nats ({change.min():+.3f} to {change.max():+.3f})"


def among(cases: Sequence[tuple[str, bool]], what: str) -> str:
    """Holds for all cases, for those that are named, or for none."""
    true = [name for name, so in cases if so]
    if len(true) == len(cases):
        return HOLDS
    return f"holds when {what} is {' or '.join(true)}" if true else FAILS


def lora_beats_what_cannot_be_merged(rows: Rows) -> Verdict:
    """Holds when a rival that cannot be merged has a higher loss with every seed, with as many parameters."""
    f = found(rows)
    number = "; ".join(f"{rival} {np.median(f.change(rival)):+.3f}" for rival in UNMERGED)
    return among([(rival, f.change(rival).min() > 0) for rival in UNMERGED], "the rival"), f"{number} nats"


def lora_stays_ahead(rows: Rows) -> Verdict:
    """Holds when a rival has a higher loss with every seed at every size that LoRA was trained with."""
    f = found(rows)
    several = [rival for rival in UNMERGED if rival in f.several()]
    sized = {rival: [f.change(rival, r) for _, r in f.curve(rival)] for rival in several}
    number = "; ".join(
        f"{rival} {min(map(np.median, some)):+.3f} to {max(map(np.median, some)):+.3f}"
        for rival, some in sized.items()
    )
    ahead = [(rival, min(change.min() for change in some) > 0) for rival, some in sized.items()]
    return among(ahead, "the rival"), f"{number} nats"


def ever_worse(f: Found, method: str) -> bool:
    """Whether some size has a higher loss with every seed than a smaller one with any."""
    some = [f.arms[key].best for key in f.curve(method)]
    return any(more.min() > less.max() for i, less in enumerate(some) for more in some[i + 1 :])


def more_rows_hurt(rows: Rows) -> Verdict:
    """Holds when a count of rows has a higher loss with every seed than a smaller count with any."""
    f = found(rows)
    number = ", ".join(f"{method} {f.rises(method):+.3f}" for method in ROWS)
    worse = [(f"{method} tuning", ever_worse(f, method)) for method in ROWS]
    return among(worse, "it"), f"from one count to a larger one at most {number} nats"


def prompts_trail(rows: Rows) -> Verdict:
    """Holds if prompt tuning closes less than half of the gap to full fine-tuning at every size."""
    f = found(rows)
    shares = [f.closed(key) for key in f.curve(PROMPT)]
    return HOLDS if max(shares) < 0.5 else FAILS, f"{max(shares):.0%} of the gap at best"


def prefixes_match(rows: Rows) -> Verdict:
    """Holds if prefix tuning closes 90% of the gap to full fine-tuning at some size."""
    f = found(rows)
    shares = [f.closed(key) for key in f.curve("prefix")]
    return HOLDS if max(shares) >= NEARLY else FAILS, f"{max(shares):.0%} of the gap at best"


def bottlenecks_match(rows: Rows) -> Verdict:
    """Holds if a Houlsby bottleneck closes 90% of the gap with 3.6% of all parameters or fewer."""
    f = found(rows)
    limit = 0.036 * f.parameters("all weights")
    shares = [f.closed(key) for key in f.curve("bottleneck, Houlsby") if f.sizes[key][1] <= limit]
    return HOLDS if max(shares) >= NEARLY else FAILS, f"{max(shares):.0%} of the gap"


def norms_are_not_enough(rows: Rows) -> Verdict:
    """Holds if norms with every seed have a higher loss than the smallest Houlsby bottleneck with any."""
    f = found(rows)
    norms, smallest = f.arms["norms", 0].best, f.arms[f.curve("bottleneck, Houlsby")[0]].best
    number = f"{f.closed(f.key('norms')):.0%} of the gap with {f.parameters('norms'):,} parameters"
    return HOLDS if norms.min() > smallest.max() else FAILS, number


def biases_match(rows: Rows) -> Verdict:
    """Holds if biases alone, here added as zeros, close 90% of the gap to full fine-tuning."""
    f = found(rows)
    number = f"{f.closed(f.key('biases')):.0%} of the gap with {f.parameters('biases'):,} parameters"
    return HOLDS if f.closed(f.key("biases")) >= NEARLY else FAILS, number


def dora_is_better(rows: Rows) -> Verdict:
    """Holds when DoRA of the same rank has a lower loss with every seed, each at its best rate."""
    f = found(rows)
    changes = {r: f.change("DoRA", r) for r in sorted(r for _, r in f.curve("DoRA"))}
    number = ", ".join(f"{np.median(change):+.3f} at r = {r}" for r, change in changes.items())
    return among([(str(r), change.max() < 0) for r, change in changes.items()], "r"), f"{number} nats"


def dora_of_half_the_rank(rows: Rows) -> Verdict:
    """Holds if DoRA of half the rank has a lower median loss than LoRA, wherever both were trained."""
    f = found(rows)
    ranks = {r for _, r in f.curve(LORA)}
    twice = [r for r in sorted(ranks) if r / 2 in ranks]
    halves = [(r, f.loss(("DoRA", r // 2)) - f.loss((LORA, r))) for r in twice]
    number = ", ".join(f"{nats:+.3f} nats from LoRA with r = {r}" for r, nats in halves)
    return HOLDS if max(nats for _, nats in halves) < 0 else FAILS, number


def vera_needs_a_tenth(rows: Rows) -> Verdict:
    """Holds if its range meets that of every LoRA with ten times its parameters, or more, or is below."""
    f = found(rows)
    pairs = [(v, x) for v in f.curve("VeRA") for x in f.curve(LORA) if f.sizes[x][1] >= 10 * f.sizes[v][1]]
    so = all(f.arms[v].best.min() <= f.arms[x].best.max() for v, x in pairs)
    worst, x = max(pairs, key=lambda pair: f.loss(pair[0]) - f.loss(pair[1]))
    few, many = f.sizes[worst][1], f.sizes[x][1]
    counts = f"{few:,} parameters for {many:,} ({many / few:.0f} times as many)"
    number = f"{f.loss(worst) - f.loss(x):+.3f} nats with {counts}"
    return HOLDS if so else FAILS, number


def more_than_lora(rows: Rows) -> Verdict:
    """Holds when the loss is lower with every seed; without a condition if it is also below that of a LoRA
    with as many parameters.
    """
    f = found(rows)
    method = "LoRA, norms, embedding"
    change, alike = f.change(method), f.above(f.key(method))
    number = f"{ranged(change)}; {alike:+.3f} from a LoRA with as many parameters"
    if change.max() >= 0:
        return FAILS, number
    return HOLDS if alike < 0 else "holds when the rank is the same, not the count of parameters", number


# ---- times


def times(rows: Rows, job: str, name: str) -> list[float]:
    """The time of a contestant over that of the base, or of full fine-tuning's step, at each size."""
    return [row["ratio"][name] for row in rows if row["job"] == job]


def bottlenecks_slow_inference(rows: Rows) -> Verdict:
    """Holds if a token takes 5% longer than the base's, or more, with either bottleneck at every size."""
    found = [times(rows, "token", name) for name in BOTTLENECKS]
    number = f"{min(map(min, found)):.2f} to {max(map(max, found)):.2f} times the base's time"
    return HOLDS if min(map(min, found)) >= 1.05 else FAILS, number


def merged_is_free(rows: Rows) -> Verdict:
    """Holds if merged they take no longer than the base measured again, within 5%, in the mean of the two
    sizes.
    """
    more, numbers = [], []
    for name in ("VeRA", "DoRA"):
        each: list[float] = []
        for job in ("forward", "token"):
            merged, again = times(rows, job, f"{name}, merged"), times(rows, job, "base again")
            more.append(mean(merged) / mean(again))
            each += [a / b for a, b in zip(merged, again, strict=True)]
        numbers.append(f"{name} {min(each):.2f} to {max(each):.2f}")
    return HOLDS if max(more) <= 1.05 else FAILS, f"{', '.join(numbers)} times the base measured again"


LOSSES, SIZES = (f"figures/rivals/{name}.png" for name in ("rivals", "parameters"))
COSTS = "benchmarks/results/methods.png"
CLAIMS = (
    Claim("With as many parameters LoRA is better than bottleneck adapters, prefix and prompt tuning.", HU,
          RIVALS, LOSSES, lora_beats_what_cannot_be_merged),
    Claim("LoRA stays ahead of its rivals as parameters grow.", HU,
          RIVALS, SIZES, lora_stays_ahead),
    Claim("More rows do not always help prefix or prompt tuning.", HU,
          RIVALS, SIZES, more_rows_hurt),
    Claim("In a small model prompt tuning trails far behind full fine-tuning.", "Lester et al. 2021",
          RIVALS, SIZES, prompts_trail),
    Claim("Prefix tuning is comparable to full fine-tuning.", "Li and Liang 2021",
          RIVALS, SIZES, prefixes_match),
    Claim("Bottleneck adapters with 3.6% of the parameters nearly match full fine-tuning.",
          "Houlsby et al. 2019", RIVALS, SIZES, bottlenecks_match),
    Claim("Training the norms alone is not enough.", "Houlsby et al. 2019",
          RIVALS, LOSSES, norms_are_not_enough),
    Claim("Training the biases alone is competitive with full fine-tuning.", "Ben Zaken et al. 2021",
          RIVALS, LOSSES, biases_match),
    Claim("DoRA is better than LoRA of the same rank.", "Liu et al. 2024",
          RIVALS, SIZES, dora_is_better),
    Claim("DoRA of half the rank is better than LoRA.", "Liu et al. 2024",
          RIVALS, SIZES, dora_of_half_the_rank),
    Claim("VeRA is as good as LoRA with a tenth of its parameters.", "Kopiczko et al. 2023",
          RIVALS, SIZES, vera_needs_a_tenth),
    Claim("Norms and the embedding, trained beside LoRA, improve it.", OVERVIEW,
          RIVALS, LOSSES, more_than_lora),
    Claim("Bottleneck adapters make inference slower.", HU,
          TIMED, COSTS, bottlenecks_slow_inference),
    Claim("VeRA and DoRA cost nothing at inference once merged.", "Kopiczko et al. 2023; Liu et al. 2024",
          TIMED, COSTS, merged_is_free),
)  # fmt: skip

"""What is said about LoRA, and what the experiments here found: rows -> a ledger of verdicts.

A claim is a sentence of a paper or of the field. It names the rows that can refute it, and a rule that turns
them into a verdict and the number that decides. `claims` applies the rules to the committed rows; ledger.json
beside this file holds what they gave, and `minilora claims` prints it. What is true under a condition "holds
when ..."; what is false of these models may be true of others, and "does not hold here".
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from ..analysis.count import ATTENTION, count
from ..formats.atomic import read
from ..spectra import effective_rank
from ..table import Table, report
from . import adding_adapters, rank_sweep
from .adding_adapters import OWN
from .harness import Row

LEDGER = Path(__file__).with_name("ledger.json")
HOLDS, FAILS = "holds", "does not hold here"
SWEEP, ADDING = "figures/rows.jsonl", "figures/adding-adapters/rows.jsonl"
MERGED, FOUR, SERVED = (
    f"{folder}/{name}.json"
    for folder, name in (("figures", "merge_equivalence"), ("benchmarks/results", "merge_four_bits"),
                         ("benchmarks/results", "serving"))
)  # fmt: skip
HU, OVERVIEW = "Hu et al. 2021", "said of LoRA in general"
TEXT, KNOWN = "folio", "permuted:4"

Rows = Sequence[Row]
Verdict = tuple[str, str]  # HOLDS, FAILS or "holds when ...", and the number that decided
Decide = Callable[[Rows], Verdict]


@dataclass(frozen=True)
class Claim:
    """A sentence that rows can refute."""

    statement: str
    source: str
    rows: str  # the file, from the top of the repository; "" for arithmetic
    figure: str
    decide: Decide  # its docstring is the rule

    @property
    def rule(self) -> str:
        """When it holds, in words."""
        return (self.decide.__doc__ or "").strip()


@dataclass(frozen=True)
class Entry:
    """A claim and what became of it."""

    statement: str
    source: str
    verdict: str
    number: str
    rule: str
    rows: str
    figure: str


@report
@dataclass(frozen=True)
class Ledger:
    """All claims; prints as a table."""

    entries: tuple[Entry, ...]

    def data(self) -> list[dict[str, str]]:
        return [asdict(entry) for entry in self.entries]

    def parts(self) -> list[str | Table]:
        lines = [(e.statement, e.source, e.verdict, e.number) for e in self.entries]
        return [Table(("claim", "source", "verdict", "decided by"), lines)]


# ---- rules on the rank sweep


def finals(rows: Rows, target: str, method: str) -> list[Row]:
    """The measured rows of one method on one target."""
    config = {"kind": "final", "target": target, "method": method}
    return [row for row in rows if row["status"] == "done" and config.items() <= row["config"].items()]


def values(rows: Rows, target: str, method: str, key: str) -> dict[int, np.ndarray]:
    """Rank -> a measured value of every seed; full fine-tuning has rank 0."""
    some = finals(rows, target, method)
    ranks = sorted({row["config"]["rank"] for row in some})
    return {r: np.array([row[key] for row in some if row["config"]["rank"] == r]) for r in ranks}


def from_on(found: Sequence[tuple[float, bool]]) -> float | None:
    """Of (number, whether it is so) in order, the number from which on it always is so, or None."""
    start = None
    for number, so in reversed(found):
        if not so:
            break
        start = number
    return start


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


# ---- on merging, adding and serving


def merging_is_exact(rows: Rows) -> Verdict:
    """Holds if merged and unmerged outputs differ by no more than the bound of roundings, at every width."""
    most = max(row["ratio"] for row in rows)
    return HOLDS if most <= 1 else FAILS, f"at most {most:.2f} of the bound"


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
    from . import adding_figures  # and matplotlib

    return adding_figures.gains(adding_figures.finals(rows), name, texts)


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


# ---- arithmetic


def fewer_in_one_map(_: Rows) -> Verdict:
    """Holds if 4096² is 256 times the size of A and B at r = 8."""
    times = 4096 * 4096 / (8 * (4096 + 4096))
    return HOLDS if times == 256 else FAILS, f"{times:g} times"


def seven_billion(_: Rows) -> Verdict:
    """Holds if Llama-2-7B's parameters take 28 GB in float32, to the nearest GB."""
    size = 4 * (count("llama-2-7b").total or 0) / 1e9
    return HOLDS if round(size) == 28 else FAILS, f"{size:.1f} GB"


def rank_16(_: Rows) -> Verdict:
    """Holds if r = 16 on all attention projections of Llama-2-7B trains 10 to 20 million parameters."""
    trained = count("llama-2-7b", 16, ATTENTION).parameters
    return HOLDS if 10e6 <= trained <= 20e6 else FAILS, f"{trained / 1e6:.1f} million"


def five_hundred_times(_: Rows) -> Verdict:
    """Holds if Llama-2-7B has 500 to 1,000 times the parameters of r = 16 on its attention projections."""
    found = count("llama-2-7b", 16, ATTENTION)
    times = (found.total or 0) / found.parameters
    return HOLDS if 500 <= times <= 1000 else FAILS, f"{times:.0f} times"


def ten_thousand_times(_: Rows) -> Verdict:
    """Holds if r = 1 on q and v of GPT-3 trains 10,000 times fewer parameters than it has, or fewer still."""
    found = count("gpt-3", 1)
    times = (found.total or 0) / found.parameters
    return HOLDS if times >= 10_000 else FAILS, f"{times:,.0f} times"


def adapter_megabytes(_: Rows) -> Verdict:
    """Holds if r = 16 on the attention projections of Llama-2-7B takes 10 to 50 MB in 16 bits."""
    size = 2 * count("llama-2-7b", 16, ATTENTION).parameters / 1e6
    return HOLDS if 10 <= size <= 50 else FAILS, f"{size:.1f} MB"


# ---- the ledger

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
    Claim("Merging changes nothing but roundings.", HU,
          MERGED, "figures/merge_equivalence.png", merging_is_exact),
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
    Claim("At r = 8 a map of 4096 x 4096 has 256 times fewer parameters.", OVERVIEW,
          "", "", fewer_in_one_map),
    Claim("A 7B model takes 28 GB in float32.", OVERVIEW, "", "", seven_billion),
    Claim("Rank 16 on all attention projections of a 7B model is 10 to 20 million parameters.", OVERVIEW,
          "", "", rank_16),
    Claim("Such an adapter has 500 to 1,000 times fewer parameters than the model.", OVERVIEW,
          "", "", five_hundred_times),
    Claim("Such an adapter takes 10 to 50 MB.", OVERVIEW, "", "", adapter_megabytes),
    Claim("LoRA can train 10,000 times fewer parameters than the model has.", HU, "", "", ten_thousand_times),
)  # fmt: skip


def read_any(path: Path, name: str) -> Rows:
    """The rows of one file: sealed ones of an experiment, or those of a benchmark."""
    readers: dict[str, Callable[[Path], Rows]] = {
        SWEEP: rank_sweep.read_rows,
        ADDING: adding_adapters.read_rows,
    }
    if name in readers:
        return readers[name](path)
    found = json.loads(read(path))
    return found["rows"] if isinstance(found, dict) else found


def claims(root: Path | str | None = None) -> Ledger:
    """The ledger as this version ships it, or decided anew by the rows in `root`, a checkout.

    StorageError for a file that is not there; FormatError or MismatchError for rows that nothing writes.
    """
    if root is None:
        return Ledger(tuple(Entry(**entry) for entry in json.loads(read(LEDGER))))
    files = dict.fromkeys(claim.rows for claim in CLAIMS if claim.rows)
    rows = {name: read_any(Path(root) / name, name) for name in files}
    entries = []
    for claim in CLAIMS:
        verdict, number = claim.decide(rows.get(claim.rows, ()))
        entries.append(
            Entry(claim.statement, claim.source, verdict, number, claim.rule, claim.rows, claim.figure)
        )
    return Ledger(tuple(entries))

"""What is said about time and memory, decided by benchmarks."""

from statistics import median

from .claim import FAILS, HOLDS, HU, OVERVIEW, Claim, Rows, Verdict

INFERRED, STEPPED, QUANTIZED = (
    f"benchmarks/results/{name}.json" for name in ("inference", "step", "four_bits")
)


def times(rows: Rows, job: str, how: str) -> list[float]:
    """The time of a forward pass or a token over that of the base, at each size."""
    return [row["to_base"][how] for row in rows if row["part"] == "latency" and row["job"] == job]


def span(ratios: list[float]) -> str:
    """The least and the greatest of some ratios."""
    return f"{min(ratios):.2f} to {max(ratios):.2f} times"


def merged_costs_nothing(rows: Rows) -> Verdict:
    """Holds if a merged model takes no longer than the base measured again, within 5%, in the median size."""
    found = {job: [times(rows, job, how) for how in ("merged", "base again")] for job in ("forward", "token")}
    more = {job: median(merged) / median(again) for job, (merged, again) in found.items()}
    number = ", ".join(f"a {job} {ratio:.2f} times the base's time" for job, ratio in more.items())
    return HOLDS if max(more.values()) <= 1.05 else FAILS, number


def adapters_slow_inference(rows: Rows) -> Verdict:
    """Holds when a token takes 5% longer than the base's, or more, at every size: unmerged, or merged too."""
    apart, merged = (times(rows, "token", how) for how in ("unmerged", "merged"))
    number = f"a token takes {span(apart)} the base's, merged {span(merged)}"
    if min(apart) < 1.05:
        return FAILS, number
    return HOLDS if min(merged) >= 1.05 else "holds when the adapter is not merged", number


def fraction_of_the_time(rows: Rows) -> Verdict:
    """Holds if a step of LoRA on all linear maps takes less than half of full fine-tuning's at every size."""
    ratios = [row["to_full"] for row in rows]
    return HOLDS if max(ratios) < 0.5 else FAILS, f"{span(ratios)} as long, the less the larger"


def four_bits_save_memory(rows: Rows) -> Verdict:
    """Holds if the peak of a training step over a 4-bit base is less than half of that over a float32 one."""
    (found,) = (row["memory"]["ratio"] for row in rows)
    peak, maps = found["peak"], found["maps"]
    return HOLDS if peak < 0.5 else FAILS, f"{peak:.2f} of it; the linear maps {maps:.2f}"


CLAIMS = (
    Claim("Once merged, an adapter costs nothing at inference.", HU,
          INFERRED, "benchmarks/results/inference.png", merged_costs_nothing),
    Claim("LoRA makes inference slower.", OVERVIEW,
          INFERRED, "benchmarks/results/inference.png", adapters_slow_inference),
    Claim("LoRA trains in a fraction of full fine-tuning's time.", OVERVIEW,
          STEPPED, "benchmarks/results/step.png", fraction_of_the_time),
    Claim("QLoRA needs far less memory still.", "Dettmers et al. 2023",
          QUANTIZED, "benchmarks/results/four_bits.png", four_bits_save_memory),
)  # fmt: skip

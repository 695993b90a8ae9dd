"""What is said about time, memory and parameters, decided by benchmarks and by arithmetic."""

from statistics import median

from ..analysis.count import ATTENTION, count
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


# ---- arithmetic with the dimensions of real models


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


def adapter_megabytes(_: Rows) -> Verdict:
    """Holds if r = 16 on the attention projections of Llama-2-7B takes 10 to 50 MB in 16 bits."""
    size = 2 * count("llama-2-7b", 16, ATTENTION).parameters / 1e6
    return HOLDS if 10 <= size <= 50 else FAILS, f"{size:.1f} MB"


def ten_thousand_times(_: Rows) -> Verdict:
    """Holds if r = 1 on q and v of GPT-3 trains 10,000 times fewer parameters than it has, or fewer still."""
    found = count("gpt-3", 1)
    times = (found.total or 0) / found.parameters
    return HOLDS if times >= 10_000 else FAILS, f"{times:,.0f} times"


CLAIMS = (
    Claim("Once merged, an adapter costs nothing at inference.", HU,
          INFERRED, "benchmarks/results/inference.png", merged_costs_nothing),
    Claim("LoRA makes inference slower.", OVERVIEW,
          INFERRED, "benchmarks/results/inference.png", adapters_slow_inference),
    Claim("LoRA trains in a fraction of full fine-tuning's time.", OVERVIEW,
          STEPPED, "benchmarks/results/step.png", fraction_of_the_time),
    Claim("QLoRA needs far less memory still.", "Dettmers et al. 2023",
          QUANTIZED, "benchmarks/results/four_bits.png", four_bits_save_memory),
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

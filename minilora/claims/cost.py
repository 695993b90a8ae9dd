"""What is said about time, memory and parameters, decided by benchmarks and by arithmetic."""

from statistics import median

from ..experiments.cost import MIXED
from ..experiments.cost_figures import GPT, SEVEN, cell, human_range, needed, on_disk, saved, total
from ..experiments.cost_figures import times as times_fewer
from .claim import FAILS, HOLDS, HU, OVERVIEW, Claim, Rows, Verdict

COUNTED = "figures/cost/rows.jsonl"
DETTMERS = "Dettmers et al. 2023"

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
    return HOLDS if max(ratios) < 0.5 else FAILS, f"{span(ratios)} as long"


def four_bits_save_memory(rows: Rows) -> Verdict:
    """Holds if the peak of a training step over a 4-bit base is less than half of that over a float32 one."""
    (found,) = (row["memory"]["ratio"] for row in rows)
    peak, maps = found["peak"], found["maps"]
    return HOLDS if peak < 0.5 else FAILS, f"{peak:.2f} of it; the linear maps {maps:.2f}"


# ---- arithmetic with the dimensions of real models


def fewer_in_one_map(rows: Rows) -> Verdict:
    """Holds if 4096² is 256 times the size of A and B at r = 8."""
    row = cell(rows, SEVEN, "QV", 8)  # whose maps all are 4096 x 4096
    times = row["maps"] / row["parameters"]
    return HOLDS if times == 256 else FAILS, f"{times:g} times"


def seven_billion(rows: Rows) -> Verdict:
    """Holds if Llama-2-7B's parameters take 28 GB in float32, to the nearest GB."""
    size = 4 * total(rows, SEVEN) / 1e9
    return HOLDS if round(size) == 28 else FAILS, f"{size:.1f} GB"


def rank_16(rows: Rows) -> Verdict:
    """Holds if r = 16 on all attention projections of Llama-2-7B trains 10 to 20 million parameters."""
    trained = cell(rows, SEVEN, "QKVO", 16)["parameters"]
    return HOLDS if 10e6 <= trained <= 20e6 else FAILS, f"{trained / 1e6:.1f} million"


def five_hundred_times(rows: Rows) -> Verdict:
    """Holds if Llama-2-7B has 500 to 1,000 times the parameters of r = 16 on its attention projections."""
    fewer = times_fewer(rows, SEVEN, "QKVO", 16)
    return HOLDS if 500 <= fewer <= 1000 else FAILS, f"{fewer:.0f} times"


def adapter_megabytes(rows: Rows) -> Verdict:
    """Holds if r = 16 on the attention projections of Llama-2-7B takes 10 to 50 MB in 16 bits."""
    size = on_disk(rows, SEVEN)["QKVO", "bfloat16"] / 1e6
    return HOLDS if 10 <= size <= 50 else FAILS, f"{size:.1f} MB"


def ten_thousand_times(rows: Rows) -> Verdict:
    """Holds if r = 1 on q and v of GPT-3 trains 10,000 times fewer parameters than it has, or fewer still."""
    fewer = times_fewer(rows, GPT, "QV", 1)
    return HOLDS if fewer >= 10_000 else FAILS, f"{fewer:,.0f} times"


def checkpoint(rows: Rows) -> Verdict:
    """Holds if r = 4 on q and v of GPT-3 has 10,000 times fewer parameters than it, within a tenth."""
    fewer, size = times_fewer(rows, GPT, "QV", 4), 2 * cell(rows, GPT, "QV", 4)["parameters"] / 1e6
    return HOLDS if 9_000 <= fewer <= 11_000 else FAILS, f"{fewer:,.0f} times, {size:.1f} MB in 16 bits"


def a_third_of_the_memory(rows: Rows) -> Verdict:
    """Holds if weights, gradients and optimizer of GPT-3 in full take 3 times those with r = 4 on q and v, or
    more, in every number format.
    """
    less = saved(rows, GPT, "QV", 4)
    number = ", ".join(f"{x:.1f} times less in {state}" for state, x in less.items())
    return HOLDS if min(less.values()) >= 3 else FAILS, number


def terabytes(rows: Rows) -> Verdict:
    """Holds if weights, gradients and optimizer of GPT-3 in full take 1.2 TB, to a tenth, in some format."""
    full = needed(rows, GPT, "QV", 4, "full")
    return HOLDS if any(f"{x / 1e12:.1f}" == "1.2" for x in full.values()) else FAILS, human_range(full)


def as_much_less_memory(rows: Rows) -> Verdict:
    """Holds if training GPT-3 in mixed precision takes 10,000 times less memory with r = 1 on q and v."""
    less = saved(rows, GPT, "QV", 1)[MIXED]
    return HOLDS if less >= 10_000 else FAILS, f"{less:.1f} times less"


def sixty_five_billion(rows: Rows) -> Verdict:
    """Holds if weights, gradients and optimizer of LLaMA 65B in full take over 780 GB in every format."""
    full = needed(rows, "llama-65b", "QV", 1, "full")
    return HOLDS if min(full.values()) > 780e9 else FAILS, human_range(full)


def on_one_card(rows: Rows) -> Verdict:
    """Holds when training r = 16 on all attention projections of Llama-2-7B takes less than the 24 GB of a
    consumer GPU, without activations, in a number format.
    """
    lora = needed(rows, SEVEN, "QKVO", 16, "LoRA")
    right = [state for state, size in lora.items() if size < 24e9]
    number = ", ".join(f"{size / 1e9:.1f} GB in {state}" for state, size in lora.items())
    if len(right) == len(lora):
        return HOLDS, number
    return f"holds when the weights are in {' or '.join(right)}" if right else FAILS, number


CLAIMS = (
    Claim("Once merged, an adapter costs nothing at inference.", HU,
          INFERRED, "benchmarks/results/inference.png", merged_costs_nothing),
    Claim("LoRA makes inference slower.", OVERVIEW,
          INFERRED, "benchmarks/results/inference.png", adapters_slow_inference),
    Claim("LoRA trains in a fraction of full fine-tuning's time.", OVERVIEW,
          STEPPED, "benchmarks/results/step.png", fraction_of_the_time),
    Claim("QLoRA needs far less memory still.", DETTMERS,
          QUANTIZED, "benchmarks/results/four_bits.png", four_bits_save_memory),
    Claim("At r = 8 a map of 4096 x 4096 has 256 times fewer parameters.", OVERVIEW,
          COUNTED, "figures/cost/parameters.png", fewer_in_one_map),
    Claim("A 7B model takes 28 GB in float32.", OVERVIEW,
          COUNTED, "figures/cost/training.png", seven_billion),
    Claim("Rank 16 on all attention projections of a 7B model is 10 to 20 million parameters.", OVERVIEW,
          COUNTED, "figures/cost/parameters.png", rank_16),
    Claim("Such an adapter has 500 to 1,000 times fewer parameters than the model.", OVERVIEW,
          COUNTED, "figures/cost/parameters.png", five_hundred_times),
    Claim("Such an adapter takes 10 to 50 MB.", OVERVIEW,
          COUNTED, "figures/cost/disk.png", adapter_megabytes),
    Claim("LoRA can train 10,000 times fewer parameters than the model has.", HU,
          COUNTED, "figures/cost/parameters.png", ten_thousand_times),
    Claim("The checkpoint of GPT-3's adapter is about 10,000 times smaller than GPT-3.", HU,
          COUNTED, "figures/cost/parameters.png", checkpoint),
    Claim("LoRA needs 10,000 times less memory.", "a misreading of Hu et al. 2021",
          COUNTED, "figures/cost/training.png", as_much_less_memory),
    Claim("LoRA trains GPT-3 in a third of the memory.", HU,
          COUNTED, "figures/cost/training.png", a_third_of_the_memory),
    Claim("Full fine-tuning of GPT-3 takes 1.2 TB.", HU,
          COUNTED, "figures/cost/training.png", terabytes),
    Claim("Full fine-tuning of a 65B model takes more than 780 GB.", DETTMERS,
          COUNTED, "figures/cost/training.png", sixty_five_billion),
    Claim("LoRA trains a 7B model on one consumer GPU.", OVERVIEW,
          COUNTED, "figures/cost/training.png", on_one_card),
)  # fmt: skip

"""What is said about parameters and memory, recomputed from the dimensions of real models."""

from ..analysis.count import ATTENTION, count
from .claim import FAILS, HOLDS, HU, OVERVIEW, Claim, Rows, Verdict


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

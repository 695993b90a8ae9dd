"""What is said about LoRA, and where the lessons show it -> COVERAGE.md.

    python notebooks/statements.py

Each row names a statement, the lesson (without its number) and the section that show it, and words with a
number, or a figure's sentence, that stand there. `differs` says what was found where it is not what is said.
tests/project/test_coverage.py looks every quote up; so a change of the lessons that loses one is seen.
"""

import sys
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))  # for build, wherever this is imported from

import build


class Row(NamedTuple):
    """A statement and where it is shown; without a lesson it is not."""

    statement: str
    lesson: str = ""
    section: str = ""
    quote: str = ""
    differs: str = ""


OVERLAYS, ONE, MERGING, RANK = (
    "overlays", "lora_from_one_equation", "merging_costs_nothing", "which_rank",
)  # fmt: skip
AGAINST, BITS, ADDING = "against_its_base", "four_bits", "adding_adapters"
THOUSAND, LOW, WHAT, BEYOND = (
    "a_thousand_adapters", "low_rank_low_dimension", "what_to_adapt_and_how", "beyond_language",
)  # fmt: skip
SUBJECTS = {
    "What LoRA is": (
        Row("The pretrained weights stay as they are; small matrices beside them are trained.",
            ONE, "A whole model", "test loss after 30: 1.77 the base is what it was, to the bit: True"),
        Row("It learns about as well as full fine-tuning, with a fraction of the parameters.",
            RANK, "Loss against rank", "LoRA r = 8 43,776 0.01 1.5877 1.5848 to 1.5914 95%",
            "95 % of the gain with 13 % of the parameters: near, and not the same"),
        Row("An adapter is an overlay on an unchanged base: one is taken off and another put on.",
            OVERLAYS, "Another sheet", "none 2.03 1.47 folio 1.70 1.58 kjv 2.21 1.36"),
        Row("The idea as a picture of a painting that thin sheets lie on.",
            OVERLAYS, "Overlays", "lies on a frozen base of 344,736 numbers"),
        Row("The update is restricted to a low rank.", ONE, "The equation", "of rank at most $r$"),
        Row("Hu et al. introduced it in 2021.", ONE, "The equation", "Hu et al. 2021"),
        Row("It is the most widely used parameter-efficient method, in libraries and in products.",
            OVERLAYS, "Where they are used", "describes one base of about 3 billion numbers",
            "reported: five tools and one product are named; no reliable count is known"),
    ),
    "The equation": (
        Row("Full fine-tuning adds a full matrix to each weight; 4096 x 4096 has millions of entries.",
            ONE, "Counting parameters", "65,536 16,777,216 0.39%"),
        Row("The update is a product of two thin matrices, A (r, d) and B (d, r).",
            ONE, "The equation", "Y has shape (7, 4) and equals X (W + s B A)ᵀ: True"),
        Row("An adapted layer adds the output of A and then B to that of W.",
            ONE, "Are they right?", "LowRank, output equal: True"),
        Row("A starts at random, B at zero, so training begins at the base's exact behaviour.",
            WHAT, "Which start?", "holds: 0 nats off the base; both random 2.91",
            "the package draws A as PEFT does, from a uniform distribution, not a Gaussian one; the uniform "
            "start is better by 0.011 nats"),
        Row("The zero start is critical.",
            WHAT, "Which start?", "holds: +0.064 nats (+0.054 to +0.067)"),
        Row("The product is scaled by alpha / r, with alpha equal to r, to 2 r, or fixed.",
            WHAT, "Which scale?", "the three scales are at most 0.006 nats apart",
            "if each has its own learning rate, the choice hardly matters: it is one of the rate"),
    ),
    "Where it is put": (
        Row("Usually on the query and value maps of attention.",
            WHAT, "Which matrices?", "Q and V 24 27,648 1.75"),
        Row("Also on keys, outputs and the maps of the MLP.",
            WHAT, "Which matrices?", "MLP 9 28,512 1.66"),
        Row("Queries and values are the best trade-off of quality and parameters.",
            WHAT, "Which matrices?", "does not hold here: +0.059 to +0.273 nats from the best set",
            "the MLP, or all maps, are better with as many parameters"),
        Row("All linear maps are better still, above all at very low ranks.",
            WHAT, "Which matrices?", "folio +0.043, then +0.066 nats",
            "better, but not more so at the lower rank"),
        Row("More adapted modules have more parameters, and perhaps more quality.",
            WHAT, "Which matrices?", "all maps 5 27,360 1.67",
            "not beyond the MLP: its 9 modules have 1.66, all 21 maps 1.67; in the ledger it is "
            "-0.026 to +0.000 nats from all maps"),
    ),
    "How it is trained and merged": (
        Row("Freeze the base, put adapters in, train them alone.",
            ONE, "A whole model", "43,776 of 344,736 parameters are trained (12.70%)"),
        Row("Merging adds B A to W; the merged model has the architecture of the base.",
            MERGING, "Merging a model", "base, while merged: f7c85a49aa4ac662",
            "not to the bit: the sum is rounded, within a bound that is derived in *How do we know?*"),
        Row("Merged, it costs no time at inference.",
            MERGING, "Counting the work", "merged 28 11,612,160 100.0%"),
        Row("Unmerged, it does: an adapter beside the map is more work.",
            MERGING, "Counting the work", "42 more calls, 70 in all"),
    ),
    "Why a low rank is enough": (
        Row("Pretrained models have a low intrinsic dimension.",
            LOW, "Not the same", "it takes 5.5 % of all numbers",
            "it depends on what is to be reached: of the accuracy the dimension is 0, of the loss 5.5 %"),
        Row("The updates of fine-tuning, full matrices in theory, lie in a small subspace.",
            RANK, "How many directions?", "full 67.5 83.1 38.4",
            "the update of full fine-tuning has a high rank, 67.5 of 96; a low one is enough all the same"),
        Row("A rank of 4 or 8 gets most of the adaptation.",
            RANK, "Loss against rank", "LoRA r = 4 21,888 0.01 1.6015 1.5972 to 1.6038 92%"),
        Row("At r = 8 a map of 4096 x 4096 has 256 times fewer parameters.",
            WHAT, "What it costs", "256 times fewer parameters at $r = 8$"),
    ),
    "What it saves": (
        Row("A 7B model takes 28 GB in float32.", WHAT, "What it costs", "27.0 GB",
            "Llama-2-7B has 6.74 billion parameters"),
        Row("A consumer GPU is enough, since only the adapters need gradients and optimizer states.",
            WHAT, "What it costs", "27.2 GB in float32, 13.7 GB in mixed precision, 13.7 GB in bfloat16",
            "not with the base in float32"),
        Row("Gradients and moments shrink with the parameters that are trained.",
            ONE, "A whole model", "gradient and moments, LoRA: 0.50 MiB"),
        Row("Training takes a fraction of the time and compute.",
            WHAT, "What it costs", "A step takes 0.71 to 0.99 times as long as full fine-tuning's",
            "no small fraction: the way through the frozen weights remains"),
        Row("An adapter of a 7B model takes 10 to 50 MB.",
            WHAT, "What it costs", "takes 33.6 MB in 16 bits"),
        Row("Rank 16 on all attention of a 7B model trains 10 to 20 million parameters.",
            WHAT, "What it costs", "trains 16.8 million numbers"),
        Row("That is 500 to 1,000 times fewer than the model has.",
            WHAT, "What it costs", "one in 402 of the model's", "402 times fewer"),
        Row("10,000 times fewer are possible at lower ranks or in larger models.",
            WHAT, "What it costs", "holds: 37,003 times"),
        Row("One base serves hundreds of adapters at once, each request with its own.",
            THOUSAND, "A bank", "1,000 adapters on disk, 20 in memory"),
        Row("Systems such as S-LoRA put requests of many adapters into one batch.",
            THOUSAND, "A whole model", "segments in one batch and one by one: differ by less than 1e-10"),
    ),
    "How to choose": (
        Row("The rank is the most important setting.", WHAT, "Which scale?",
            "does not hold here: ranks 0.085 nats, learning rates 0.638",
            "the learning rate matters more"),
        Row("Low ranks may be too small for a hard task.",
            RANK, "A task whose rank is known", "3 0.311 1.053"),
        Row("Higher ranks approach full fine-tuning, with diminishing returns.",
            RANK, "Loss against rank", "LoRA r = 64 350,208 0.01 1.5696 1.5684 to 1.5719 99%"),
        Row("Rank 16 is a usual first choice.",
            OVERLAYS, "Where they are used", "PEFT takes 8 unless you say otherwise",
            "16 in a product's report and in scripts of LoRA's authors; 8 in PEFT"),
        Row("Adapters can be added or interpolated, with mixed results.",
            ADDING, "From one to another", "0.50 1.918 1.341 1.959 1.389",
            "the mean helps both texts; the sum of two is worse on either than that text's own adapter"),
    ),
    "What is often misunderstood": (
        Row("LoRA does not always match full fine-tuning: not at very low ranks.",
            RANK, "Loss against rank", "LoRA r = 1 5,472 0.01 1.6516 1.6488 to 1.6542 80%"),
        Row("The gap narrows as the model grows.",
            RANK, "Loss against rank", "holds: +0.087 to +0.061 nats at r = 1"),
        Row("Rank 1 is not enough for everything.", RANK, "A task whose rank is known", "1 1.387 2.487"),
        Row("Following instructions and complex reasoning need rank 16 or more.",
            OVERLAYS, "Where they are used", "rank 256 closed most of it",
            "reported, not tried: one paper finds so on code and mathematics, another no gap at all"),
        Row("It is not only for language: diffusion models.",
            BEYOND, "Drawing", "In the large experiment 80 % do at rank 4"),
        Row("It is not only for language: vision transformers.",
            BEYOND, "An image is a sequence", "79 % of the way at rank 4 and 82 % at rank 16"),
        Row("It is not only for language: models of text and images together.",
            OVERLAYS, "Where they are used", "their version 1.5 with LoRA does about as well",
            "reported by the authors of LLaVA, not tried"),
        Row("Heads, norms or embeddings are often trained in full beside it.",
            WHAT, "Its rivals", "-0.021 nats (-0.025 to -0.019)",
            "it helps, but no more than as many parameters of LoRA do"),
    ),
    "What it is related to": (
        Row("QLoRA puts LoRA beside a base in four bits, in much less memory.",
            BITS, "QLoRA beside LoRA", "1,327,104 bytes in float32, 171,276 in 4 bits: 0.129 of it"),
        Row("The base may be quantized while A and B keep more bits.",
            BITS, "QLoRA beside LoRA", "QLoRA ends 0.008 nats above LoRA"),
        Row("It is full fine-tuning with a restriction of the rank.",
            AGAINST, "From two checkpoints", "the full rank of these maps, nothing is lost of them"),
        Row("Bottleneck adapters and prefixes are other ways to train few parameters.",
            WHAT, "Its rivals", "prefix +0.150; prompt +0.329 nats"),
        Row("Merging models and arithmetic with tasks are near to it.",
            ADDING, "Where signs disagree", "The sum would be -1; TIES says -9"),
    ),
}  # fmt: skip


def numbered(lesson):
    """The whole name of a lesson."""
    return next(name for name in build.LESSONS if name.partition("_")[2] == lesson)


def sections(nb):
    """The title and each section's heading -> the words of its text, its printed lines and its figures."""
    found, heading = {}, ""
    for cell in nb.cells:
        if cell.cell_type == "markdown":
            for line in cell.source.splitlines():
                if line.startswith("#"):
                    heading = line.lstrip("# ")
                found[heading] = f"{found.get(heading, '')} {line}"
        for output in cell.get("outputs", []):
            words = output.get("text") or output.get("data", {}).get("text/plain", "")
            found[heading] += f" {words}"
    return {heading: build.plain(text) for heading, text in found.items()}


def page():
    """COVERAGE.md."""
    rows = [row for some in SUBJECTS.values() for row in some]
    shown = sum(bool(row.lesson) for row in rows)
    reported = sum(row.differs.startswith("reported") for row in rows)
    differs = sum(bool(row.differs) for row in rows) - reported
    lines = [
        "# What is said about LoRA, and which lesson shows it",
        "",
        "Made by `python notebooks/statements.py`; a test looks every quote up in the lesson. Of "
        f"{len(rows)} statements the lessons show {shown - reported}, and report {reported} from elsewhere, "
        f"untried; {differs} turn out another way, or under a condition.",
    ]
    for subject, some in SUBJECTS.items():
        lines += ["", f"## {subject}", "", "| said | shown in | where it says | what differs |"]
        lines += ["| --- | --- | --- | --- |"]
        for row in some:
            place, quote = "not shown yet", ""
            if row.lesson:
                name = numbered(row.lesson)
                place = f"[{build.title(name)}]({name}.ipynb), *{row.section}*"
                quote = row.quote if "$" in row.quote else f"`{row.quote}`"
            lines.append(f"| {row.statement} | {place} | {quote} | {row.differs} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    (HERE / "COVERAGE.md").write_text(page(), encoding="utf-8")

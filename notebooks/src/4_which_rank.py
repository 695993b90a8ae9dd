# %% [markdown]
# # Which rank?
#
# ![](attachment:ranks.png)
#
# **What you will see.** What a larger rank brings: the loss at each rank of a sweep, the number of directions
# that $\Delta W$ really uses, and a task whose rank is known, on which the method is tested. It also costs
# more numbers, until $A$ and $B$ have more of them than $\Delta W$ itself.
#
# **What you need.** [LoRA from one equation](2_lora_from_one_equation.ipynb), and the idea of singular
# values: every matrix is a sum of rank-one matrices, and its singular values are their sizes.

# %% tags=["first", "unkept"]

# %% tags=["imports"]
from pathlib import Path

import numpy as np

import minilora as ml
from minilora import spectra
from minilora.claims.ledger import claims
from minilora.experiments import rank_figures, rank_reading, rank_report, rank_sweep

# %% [markdown]
# ## The sweep
#
# One frozen base, and for each target LoRA at several ranks and full fine-tuning, on the same batches for the
# same number of steps. Three rules make the comparison fair.
#
# 1. **Each method and each rank has a learning rate of its own**, chosen by short runs. At one shared rate
#    the winner would be the method that the rate happens to suit.
# 2. The choice looks at the validation split only; the losses below are of the test split, texts that no run
#    has seen.
# 3. Several seeds, and their whole range is shown, not an error bar.
#
# `minilora sweep` wrote the rows. They lie beside this notebook, or in the folder `figures` of the
# repository.

# %%
places = [Path("rows.jsonl"), Path("../figures/rows.jsonl")]
rows = rank_sweep.read_rows(next((place for place in places if place.exists()), places[0]))
targets = rank_reading.targets(rows)
text = next(t for t in targets if not t.startswith("permuted"))
known = next(t for t in targets if t.startswith("permuted"))
print(len(rows), "runs; targets:", ", ".join(targets))

# %% tags=["claims"]
configs = [row["config"] for row in rows]
trained = [c for c in configs if c["method"] in ("lora", "full")]
cells = {(c["target"], c["method"], c["rank"]) for c in trained}
final = {
    cell: [c for c in trained if c["kind"] == "final" and cell == (c["target"], c["method"], c["rank"])]
    for cell in cells
}
tried = {
    cell: {
        c["lr"] for c in trained if c["kind"] == "search" and cell == (c["target"], c["method"], c["rank"])
    }
    for cell in cells
}
holds(
    "on the same batches for the same number of steps",
    all(
        len(
            {
                (c["text"], c["steps"], c["batch"])
                for c in trained
                if c["kind"] == "final" and c["target"] == target
            }
        )
        == 1
        for target in targets
    ),
)
holds(
    "has a learning rate of its own",
    all(
        len(tried[cell]) > 1
        and len({c["lr"] for c in final[cell]}) == 1
        and {c["lr"] for c in final[cell]} <= tried[cell]
        for cell in cells
    ),
)
search = max(c["steps"] for c in trained if c["kind"] == "search")
holds("chosen by short runs", search < min(c["steps"] for c in trained if c["kind"] == "final"))
best = {}
for row in rows:
    c = row["config"]
    if c["kind"] == "search":
        cell = c["target"], c["method"], c["rank"]
        best[cell] = min(best.get(cell, (np.inf, 0)), (row["valid"], c["lr"]))
holds(
    "The choice looks at the validation split only",
    all(best[cell][1] == final[cell][0]["lr"] for cell in cells)
    and not any("test" in row for row in rows if row["config"]["kind"] == "search"),
)
holds("3. Several seeds", all(len({c["seed"] for c in some}) > 1 for some in final.values()))

# %% [markdown]
# ## Loss against rank

# %%
rank_figures.loss_against_rank(rows, text)

# %%
lora, full = (rank_reading.final(rows, text, method) for method in ("lora", "full"))
print(rank_report.table(rows))
print("folio, validation loss of full fine-tuning:", *rank_reading.flattening(full).split("; "), sep="\n")

# %% tags=["claims"]
gaps = [
    row["gap_closed"]
    for row in rank_sweep.with_gaps(rows)
    if row["config"]["target"] == known and row["config"]["method"] == "lora" and "gap_closed" in row
]
holds("LoRA closes more than 100 %", max(gaps) > 1)
holds(
    "There LoRA adapts the embedding table only",
    all(c["modules"] == ["embed_tokens"] for c in trained if c["target"] == known and c["method"] == "lora"),
)
of_text = rank_reading.by_rank([row for row in rank_sweep.with_gaps(lora + full + rank_reading.final(
    rows, text, "none")) if row["config"]["method"] == "lora"], "gap_closed")  # fmt: skip
closed = {r: share for r, (share, *_) in zip(of_text[0], of_text[1].tolist(), strict=True)}
says("rank 1 already closes {:.0f} % of the gap", 100 * closed[1])
says("rank 8 {:.0f} %", 100 * closed[8])
says("and rank 64 {:.0f} %", 100 * closed[64])
steps = -np.diff(rank_reading.by_rank(lora, "test")[1][:, 0])
holds("each doubling brings less", steps[0] > steps[1] > steps[2] > steps[3] > steps[4])
holds(
    "The last lines say whether full fine-tuning had come to rest",
    "the last quarter" in rank_reading.flattening(full),
)

# %% [markdown]
# *Gap closed* is $(L_\text{base} - L) / (L_\text{base} - L_\text{full})$, with $L$ the test loss: 0 % is the
# frozen base, 100 % is full fine-tuning. Losses are means over the seeds.
#
# On the Folio rank 1 already closes 80 % of the gap, rank 8 95 % and rank 64 99 %: each doubling brings less,
# and no rank stands out. Where the curve falls, rank is what was missing; compare its steps with the range
# over the seeds before you call one rank better. The last lines say whether full fine-tuning had come to
# rest; if it had not, its line is no floor, and the picture is one of *this many steps*.
#
# On the permutation, the task of the last section, LoRA closes more than 100 %. That is no merit of low rank.
# There LoRA adapts the embedding table only, where the answer lies, while full fine-tuning moves everything:
# LoRA was told where to look.
#
# Does a larger base need less rank? The package keeps a *ledger* of what is said of LoRA: each sentence, what
# an experiment found, and the rule that decides.

# %%
print(claims().of("size/gap", "size/needed"))

# %% [markdown]
# ## How many directions?
#
# A rank is an upper limit. How much of it does training use? The singular values of $\Delta W$ say it, in
# one of two counts. The **effective rank** (Roy and Vetterli 2007) is $\exp(-\sum p_i \ln p_i)$ with $p_i =
# \sigma_i / \sum \sigma_j$: it is $k$ if $k$ singular values are equal and the others zero. The **energy** in
# the first $k$ is $\sum_{i \le k} \sigma_i^2 / \sum \sigma_i^2$. Either means something only beside that of
# noise: the product of two Gaussian factors, in which nothing was learned.

# %%
rank_figures.energy_and_effective_rank(rows, text)

# %%
kinds, rng = rank_reading.kinds(lora), np.random.default_rng(0)
noise = dict(zip(rank_reading.ranks_of(lora), rank_reading.noise_ranks(lora), strict=True))
shapes = [rank_reading.shape_of(kind, lora) for kind in kinds]
dense = np.mean([ml.effective_rank(spectra.noise_spectrum(shape, rng)) for shape in shapes])


def used(name, some, by_chance):
    """A line: how many directions the runs use, mean over seeds and adapted matrices."""
    at90 = np.mean([spectra.rank_at(s, 0.9) for s in rank_reading.spectra_of(some, kinds)])
    print(f"{name:>4}  {rank_reading.mean_rank(some, kinds):14.1f}  {by_chance:8.1f}  {at90:28.1f}")


print("   r  effective rank  of noise  directions for 90 % of |ΔW|²")
for r in noise:
    used(r, rank_reading.select(lora, rank=r), noise[r])
used("full", full, dense)

# %% tags=["claims"]
effective = {
    r: [ml.effective_rank(s) for s in rank_reading.spectra_of(rank_reading.select(lora, rank=r), kinds)]
    for r in noise
}
holds(
    "The effective rank of LoRA can never exceed $r$",
    all(max(some) <= r + 1e-9 for r, some in effective.items()),
)
holds(
    "it is $k$ if $k$ singular values are equal",
    all(abs(ml.effective_rank(np.array([2.0] * k + [0.0] * 3)) - k) < 1e-9 for k in (1, 4, 7)),
)
noise_96 = np.linalg.svd(np.random.default_rng(1).standard_normal((96, 96)), compute_uv=False)
holds("about half of the directions are enough", 0.45 < spectra.rank_at(noise_96, 0.9) / 96 < 0.55)
of_noise = [np.mean(effective[r]) / noise[r] for r in noise]
holds("At small ranks it is that of noise", min(of_noise[:4]) > 0.95)
says("at r = 64 it is {:.0f}, where noise has {:.0f}", np.mean(effective[64]), noise[64])
whole = [len(s) for s in rank_reading.spectra_of(full, kinds)]
says("Full fine-tuning uses {:.1f} of {}", rank_reading.mean_rank(full, kinds), *{*whole})

# %% [markdown]
# The effective rank of LoRA can never exceed $r$, so a small one proves nothing by itself. At small ranks it
# is that of noise: every direction is used. The more there are, the further it lies below noise; at r = 64 it
# is 28, where noise has 53. Full fine-tuning uses 67.5 of 96: its change is *not* of low rank. A low rank is
# enough all the same.
#
# ## A task whose rank is known
#
# For a text we do not know the answer. So here is a task for which we do: pairs of letters have changed
# places everywhere in the text. The base knows this text; it only has to learn that the letters have other
# names. The model uses one table $E$ for input and output, so the change $\Delta E = (P - I) E$, with $P$ the
# permutation, undoes the swaps exactly, and its rank is the number of swaps: each swapped pair is one
# direction, the difference of two rows.

# %%
rank_figures.known_rank(rows, known)

# %%
lora_k, base_k = rank_reading.final(rows, known), rank_reading.final(rows, known, "none")[0]
oracle = {
    row["config"]["rank"]: row["test"] for row in rank_reading.select(rows, kind="oracle", target=known)
}
truth = np.array(base_k["spectra"]["model.embed_tokens"])
swaps = int((truth > 1e-6 * truth[0]).sum())
print(f"{swaps} swaps; the base on the plain text: {base_k['floor']:.3f}, on this one: {base_k['test']:.3f}")
print("   r   excess loss of LoRA   of the true ΔE cut to rank r")
ranks_k, losses_k = rank_reading.by_rank(lora_k, "test")
for r, (value, *_) in zip(ranks_k, losses_k, strict=True):
    excess, cut = (round(v - base_k["floor"], 3) + 0.0 for v in (value, oracle[r]))  # no minus zero
    print(f"{r:4}   {excess:19.3f}   {cut:28.3f}")
found = rank_reading.mean_spectrum(rank_reading.select(lora_k, rank=2 * swaps), "embed_tokens")
print()
print(f"singular values of the true ΔE:     {' '.join(f'{x:5.2f}' for x in truth[:swaps])}")
print(f"learned at r = {2 * swaps}, the first {swaps}:      {' '.join(f'{x:5.2f}' for x in found[:swaps])}")
print(f"and the next:                       {' '.join(f'{x:5.2f}' for x in found[swaps:])}")

# %% tags=["claims"]
holds("its rank is the number of swaps", f"; {swaps} letter swaps:" in base_k["source"])
zero = {r: round(oracle[r] - base_k["floor"], 3) == 0 for r in oracle}
holds("at the number of swaps they reach zero", all(zero[r] == (r >= swaps) for r in oracle))
drops = found[:-1] / found[1:]
holds("the learned singular values drop after that number", drops.argmax() == swaps - 1 and drops.max() > 1.5)
holds("so LoRA may lie below them", any(v[0] < oracle[r] for r, v in zip(ranks_k, losses_k, strict=True)))
holds("They need not equal the true ones", (np.abs(found[:swaps] / truth[:swaps] - 1) > 0.01).all())
holds("The base knows this text", base_k["floor"] < 0.5 * base_k["test"])

# %% [markdown]
# Left: the squares show what the true answer still gives away when it is cut to rank $r$. That is the best
# cut of the matrix and not of the loss, so LoRA may lie below them; at the number of swaps they reach zero.
# Right: the learned singular values drop after that number. The method has found the rank that we put in.
# They need not equal the true ones: other changes of the table have nearly the same effect on the loss.
#
# ## What not to claim
#
# - *"Fine-tuning updates are low-rank, therefore LoRA works."* Look at the line *full* of the table of
#   directions. Shown is only that a change of low rank is *enough* for a task like this one.
# - *"Rank $r$ is enough."* For this base, this text and this many steps.
# - *"LoRA beats full fine-tuning"*, where a point lies below the line. The range over few seeds is no test,
#   and both learning rates come from a coarse grid.

# %% [markdown]
# ## Exercises
#
# Write your answer in place of `None`, and run that cell and the one below it. A wrong answer gets a hint.
# [The solutions, and what is often answered instead](solutions/4_which_rank.md).


# %% tags=["exercise"]
# Write the line.
def directions(s, share):
    """The least k such that the first k of the falling values s hold that share of the sum of squares."""
    return None  # your lines in place of this one


# %% tags=["check"]
def check():
    """Your answer on four values that can be done by hand, and beside the package's on random ones."""
    easy = np.array([3.0, 2.0, 1.0, 1.0])  # squares 9, 4, 1, 1 of 15
    mine = given(directions(easy, 0.5))
    assert mine != 0, "the first singular value already counts as one: begin at 1"
    assert mine == 1, "9 of 15 is more than half, so one direction is enough"
    assert directions(easy, 0.7) == 2, "9 of 15 is 60 %: two are needed for 70 %; did you square?"
    assert directions(easy, 0.9) == 3, "13 of 15 is 87 %: three are needed for 90 %"
    assert directions(easy, 1.0) == 4, "all of the energy needs all four"
    rng = np.random.default_rng(8)
    for n in range(1, 40):
        s = np.sort(rng.exponential(size=n))[::-1]
        for share in (0.3, 0.9, 0.99):
            k = spectra.rank_at(s, share)
            assert directions(s, share) == k, f"for a share of {share} of {s} it should be {k}"
    return "the same as minilora.spectra.rank_at, for 39 spectra"


verdict(check)


# %% tags=["exercise"]
# Predict, then run.
def directions_of_noise():
    """A 96 x 96 matrix of Gaussian noise, in which nothing was learned. How many of its 96 directions hold
    90 % of its energy?

    A guess at most 5 off is right.
    """
    return None  # your guess, a number, in place of None


# %% tags=["check"]
def check():
    """Your guess beside the count, the mean of eight draws."""
    draws = np.random.default_rng(9).standard_normal((8, 96, 96))
    counts = [spectra.rank_at(np.linalg.svd(noise, compute_uv=False), 0.9) for noise in draws]
    hints = {
        0.9 * 96: "so it would be if all singular values were equal; those of noise are not",
        96: "the last of them are nearly 0; what do they add?",
    }
    otherwise = "no: noise prefers no direction, but its singular values fall in a line from the first to 0"
    predicted(directions_of_noise(), np.mean(counts), hints, otherwise, 5)
    return f"{np.mean(counts):.0f}. So a count below the rank is no sign of learning; below noise's it is"


verdict(check)


# %% tags=["exercise"]
# Change, and explain.
def two_counts():
    """Eight falling singular values of which the first alone holds 90 % of the energy, while the effective
    rank is above 3; and why the two counts part.

    a: the effective rank weighs the values, the energy their squares, in which small values vanish.
    b: the effective rank counts every value that is not 0 as one.
    c: the scale: with the same values times ten the two would agree.
    """
    return None, None  # your eight values, and the letter that the numbers support


# %% tags=["check"]
def check():
    """The two counts of your values."""
    values, letter = given(two_counts())
    s = np.asarray(values, float)
    assert s.shape == (8,), f"the shape is {s.shape}; expected eight values"
    assert (s > 0).all(), "a value is not above 0"
    assert (np.diff(s) <= 0).all(), "the values do not fall: the largest comes first"
    share, rank = spectra.energy(s)[0], ml.effective_rank(s)
    assert share >= 0.9, f"the first holds {share:.0%} of the energy: make it larger beside the others"
    assert rank > 3, f"the effective rank is {rank:.2f}: let the others be larger, or more nearly equal"
    again = spectra.energy(10 * s)[0], ml.effective_rank(10 * s)
    hints = {
        "b": f"then it would be 8 for any such values; here it is {rank:.2f}",
        "c": f"times ten they are {again[0]:.0%} and {again[1]:.2f}, as before: both are shares",
    }
    chosen(letter, "a", hints)
    return f"{share:.0%} in the first, and an effective rank of {rank:.2f}: say which count you mean"


verdict(check)

# %% [markdown]
# ## To take along
#
# - Choose the rank where the loss stops falling by more than the seeds differ, with a learning rate tuned at
#   each rank.
# - Put noise beside every spectrum.
# - Try a method first on a task whose answer you know.
#
# To make your own sweep: `minilora sweep --data FILE --data permuted:4 --out mine`, then copy
# `mine/rows.jsonl` beside this notebook and run it again.
#
# Next: [What to adapt and how](5_what_to_adapt_and_how.ipynb).

# %% [markdown]
# # Which rank?
#
# **What you will see.** The rows of a sweep over ranks, read back from the file that `minilora sweep` wrote:
# the test loss against the rank; the singular values of what was learned, with those of full fine-tuning and
# of noise beside them; and a task whose rank is known, on which the method can be tested itself.
#
# **What you need.** The first lesson, [LoRA from one equation](2_lora_from_one_equation.ipynb), and the idea
# of singular values: every matrix is a sum of rank-one matrices, and they are the sizes of those.
#
# **Contents.** The sweep · Loss against rank · The spectra · How many directions? · One rank at a time · A
# task whose rank is known · What not to claim · Exercises · To take along

# %% tags=["first", "unkept"]
missing = absent("ipywidgets")

# %% tags=["imports"]
import math
from pathlib import Path

import numpy as np

import minilora as ml
from minilora import spectra
from minilora.analysis import plotting
from minilora.claims.ledger import claims
from minilora.data import corpora
from minilora.experiments import rank_figures, rank_report, rank_sweep

# %% [markdown]
# The rows lie beside this notebook, or in the folder `figures` of the repository that it belongs to.

# %%
places = [Path("rows.jsonl"), Path("../figures/rows.jsonl")]
rows = rank_sweep.read_rows(next((place for place in places if place.exists()), places[0]))
targets = rank_figures.targets(rows)
text = next(t for t in targets if not t.startswith("permuted"))
known = next(t for t in targets if t.startswith("permuted"))
print(len(rows), "runs; targets:", ", ".join(targets))

# %% [markdown]
# ## The sweep
#
# One frozen base, and for each target LoRA at several ranks and full fine-tuning, on the same batches for the
# same number of steps. Three rules make the comparison fair.
#
# 1. **Each method and each rank has a learning rate of its own**, chosen by short runs. At one shared rate
#    the winner would be the method that the rate happens to suit.
# 2. The choice looks at the validation split only; the table shows the test split, texts that no run has
#    seen.
# 3. Several seeds, and their whole range is shown, not an error bar.
#
# *Gap closed* is $(L_\text{base} - L) / (L_\text{base} - L_\text{full})$, with $L$ the test loss: 0 % is the
# frozen base, 100 % is full fine-tuning. A value above 100 % is possible.
#
# On the permutation LoRA adapts the embedding table only, where the answer lies, while full fine-tuning moves
# everything. A gap closed by more than 100 % there is no merit of low rank: LoRA was told where to look.

# %%
print(rank_report.table(rows))

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
        best[cell] = min(best.get(cell, (math.inf, 0)), (row["valid"], c["lr"]))
holds(
    "The choice looks at the validation split only",
    all(best[cell][1] == final[cell][0]["lr"] for cell in cells)
    and not any("test" in row for row in rows if row["config"]["kind"] == "search"),
)
holds("3. Several seeds", all(len({c["seed"] for c in some}) > 1 for some in final.values()))
gaps = [
    row["gap_closed"]
    for row in rank_sweep.with_gaps(rows)
    if row["config"]["target"] == known and row["config"]["method"] == "lora" and "gap_closed" in row
]
holds("A gap closed by more than 100 % there", max(gaps) > 1)
holds(
    "On the permutation LoRA adapts the embedding table only",
    all(c["modules"] == ["embed_tokens"] for c in trained if c["target"] == known and c["method"] == "lora"),
)

# %% [markdown]
# ## Loss against rank

# %%
rank_figures.loss_against_rank(rows, text)

# %%
lora, full, base = (rank_figures.final(rows, text, method) for method in ("lora", "full", "none"))
ranks, losses = rank_figures.by_rank(lora, "test")
_, level = rank_figures.by_rank(full, "test")
print(f"{'':16}  mean   least  greatest")
print(f"{'frozen base':16} {base[0]['test']:.3f}")
for r, (mean, low, high) in zip(ranks, losses, strict=True):
    print(f"{f'LoRA r = {r}':16} {mean:.3f}   {low:.3f}   {high:.3f}")
print(f"{'full fine-tuning':16} {level[0, 0]:.3f}   {level[0, 1]:.3f}   {level[0, 2]:.3f}")
print()
print("validation loss of full fine-tuning:")
print(*rank_figures.flattening(full).split("; "), sep="\n")

# %% tags=["claims"]
holds(
    "The last line says whether full fine-tuning had come to rest",
    "the last quarter" in rank_figures.flattening(full),
)

# %% [markdown]
# How to read it. Where the curve falls, rank is what was missing. Where it is flat, it was not: compare the
# steps between neighbouring ranks with the range over the seeds before you call one better. The last line
# says whether full fine-tuning had come to rest; if it had not, its line is no floor, and the picture is one
# of *this many steps*.
#
# Does a larger base need less rank? The ledger of the package says what its experiment found.

# %%
print(claims().of("size/gap", "size/needed"))

# %% [markdown]
# ## The spectra
#
# $\Delta W = s\,B A$ has at most $r$ singular values. They are computed from the thin factors, without
# forming $\Delta W$: with $B = Q R$ and $A^\top = P T$ they are those of the small matrix $s\,R\,T^\top$.

# %%
rank_figures.spectra(rows, text)


# %%
def curves(some, kind=""):
    """The spectra of all layers of a kind in some rows."""
    return [np.array(s) for row in some for path, s in row["spectra"].items() if path.endswith(kind)]


def mean(values):
    return math.fsum(values) / len(values)


top = ranks[-1]
largest = rank_figures.select(lora, rank=top)
print(f"                 r = {top:<3}                full fine-tuning")
print("module         largest   norm²          largest   norm²   its first 8 hold")
for kind in rank_figures.kinds(lora):
    cells = []
    for some in (curves(largest, kind), curves(full, kind)):
        cells.append(f"{mean([s[0] for s in some]):8.2f} {mean([(s * s).sum() for s in some]):7.1f}")
    share = mean([spectra.energy(s)[7] for s in curves(full, kind)])
    print(f"{kind:12} {cells[0]}       {cells[1]}   {share:14.0%}")

# %% tags=["claims"]
longer = [
    mean([(s * s).sum() for s in curves(largest, kind)]) / mean([(s * s).sum() for s in curves(full, kind)])
    for kind in rank_figures.kinds(lora)
]
says("*norm²*, is {:.0f} to {:.0f} times", min(longer), max(longer))
ten = {some[0]["config"]["lr"] for some in (largest, full)}
holds("a rate ten times as high", max(ten) == 10 * min(ten) == largest[0]["config"]["lr"])

# %% [markdown]
# The dashed line is full fine-tuning, the dotted one is Gaussian noise of the same norm. A spectrum says
# something only against that line: noise, too, has a largest singular value. A curve that lies above the
# noise at small index and below it later has directions that matter more than others.
#
# At the largest rank LoRA's $|\Delta W|^2$, the column *norm²*, is 3 to 9 times that of full fine-tuning, and
# its loss is no lower. Does it change more than it must? A length comes from the learning rate before it says
# anything of the task: Adam moves every number by about the rate in each step, and LoRA's search chose a rate
# ten times as high. Here each method trains for a few steps at two rates.


# %% tags=["corpus", "trained"]
def length(rate, r=None, steps=30):
    """|ΔW|² of all linear maps and the test loss, after a few steps of LoRA, or without r in full."""
    model = ml.load()
    if r:
        ml.inject(model, ml.LoraConfig(r=r, alpha=16), rng=np.random.default_rng(0))
    else:
        ml.unfreeze(model)
    batches = ml.batches(folio.train, np.random.default_rng(1), batch_size=8, length=128)
    ml.train(model, batches, ml.AdamW(lr=rate), steps=steps)
    loss = ml.evaluate(model, test)
    if r:
        ml.fuse(model)
    changed = spectra.spectrum_between(ml.load(), model)
    return sum((s * s).sum() for path, s in changed.items() if "_proj" in path), loss


folio = corpora.corpus_or_fallback("folio")
test = ml.eval_batches(folio.test, batch_size=16, length=128, limit=32 * 128)
lengths = {(r, rate): length(rate, r) for r, rate in ((64, 1e-2), (64, 3e-3), (None, 1e-3), (None, 3e-3))}
print("                     rate   |ΔW|²   test loss")
for (r, rate), (norm, loss) in lengths.items():
    print(f"{f'LoRA, r = {r}' if r else 'full fine-tuning':16} {rate:8.3f} {norm:7.1f} {loss:11.3f}")

# %% tags=["claims", "corpus", "trained"]
lora_high, lora_low, full_low, full_high = lengths.values()
longest = max(norm for norm, _ in lengths.values())
holds("At a third of its rate LoRA's change is the shortest of all", lora_low == min(lengths.values()))
holds("with nearly the same loss", abs(lora_low[1] - lora_high[1]) < 0.02)
holds("at three times its own rate full fine-tuning makes the longest", full_high[0] == longest)
holds("makes the longest, and learns less", full_high[1] > full_low[1] + 0.02)

# %% [markdown]
# At a third of its rate LoRA's change is the shortest of all, with nearly the same loss; at three times its
# own rate full fine-tuning makes the longest, and learns less. So compare the shapes of spectra, and lengths
# only at one rate.
#
# ## How many directions?
#
# Two ways to count. The **effective rank** (Roy and Vetterli 2007) is $\exp(-\sum p_i \ln p_i)$ with $p_i =
# \sigma_i / \sum \sigma_j$: it is $k$ if $k$ singular values are equal and the others zero. The **energy** in
# the first $k$ is $\sum_{i \le k} \sigma_i^2 / \sum \sigma_i^2$.

# %%
rank_figures.energy_and_effective_rank(rows, text)

# %%
rng = np.random.default_rng(0)
shapes = [rank_figures.shape_of(kind, lora) for kind in rank_figures.kinds(lora)]


def by_chance(rank=None):
    """The effective rank of noise, mean over the shapes of the adapted matrices."""
    return mean([ml.effective_rank(spectra.noise_spectrum(shape, rng, rank, draws=4)) for shape in shapes])


print("effective rank, mean over all adapted matrices")
print("   r    LoRA   product of two noise factors   directions for 90 % of the energy")
for r in ranks:
    some = curves(rank_figures.select(lora, rank=r))
    at90 = mean([spectra.rank_at(s, 0.9) for s in some])
    print(f"{r:4}  {mean([ml.effective_rank(s) for s in some]):6.1f}   {by_chance(r):27.1f}   {at90:33.1f}")
some = [s for kind in rank_figures.kinds(lora) for s in curves(full, kind)]
at90 = mean([spectra.rank_at(s, 0.9) for s in some])
print(f"full  {mean([ml.effective_rank(s) for s in some]):6.1f}   {by_chance():20.1f} (noise)   {at90:33.1f}")

# %% tags=["claims"]
effective = {r: [ml.effective_rank(s) for s in curves(rank_figures.select(lora, rank=r))] for r in ranks}
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
product = [mean(effective[r]) < 0.9 * by_chance(r) for r in ranks]
holds("the further it lies below the product of two noise factors", product[-1])

# %% [markdown]
# The effective rank of LoRA can never exceed $r$, so a small one proves nothing by itself. Compare it with
# noise: the further it lies below the product of two noise factors, the more the training has concentrated.
#
# ## One rank at a time
#
# The value projections, rank by rank: the spectrum that LoRA learned, that of full fine-tuning, and that of a
# random product of the same rank and norm. With a kernel running, the slider below shows one rank; without
# one, the figure after it shows all of them.


# %%
def noise_like(s, n):
    """The spectrum of a random n x n product of the rank and the norm of the spectrum s."""
    noise = spectra.noise_spectrum((n, n), np.random.default_rng(0), rank=len(s))[: len(s)]
    return noise * math.sqrt((s**2).sum())


learned = {r: rank_figures.mean_spectrum(rank_figures.select(lora, rank=r), "v_proj") for r in ranks}
whole = rank_figures.mean_spectrum(full, "v_proj")
noise = {r: noise_like(s, len(whole)) for r, s in learned.items()}
low = min(s[-1] for s in (*learned.values(), *noise.values()))
high = max(s[0] for s in (*learned.values(), *noise.values(), whole))


@plotting.styled
def picture(shown, columns):
    lines = -(-len(shown) // columns)
    figure, grid = plotting.axes(columns, lines, (3.2 * columns + 1, 2.9 * lines))
    for ax in grid.flat:
        ax.set_axis_off()
    for ax, r in zip(grid.flat, shown, strict=False):
        ax.set_axis_on()
        ax.plot(
            range(1, len(whole) + 1), whole, color=plotting.ORANGE, linestyle="--", label="full fine-tuning"
        )
        ax.plot(
            range(1, r + 1), noise[r], color=plotting.GREY, linestyle=":", marker="x", label="noise, rank r"
        )
        ax.plot(range(1, r + 1), learned[r], color=plotting.BLUE, marker="o", markersize=4, label="LoRA")
        ax.set(xscale="log", yscale="log", xlim=(0.9, 1.1 * len(whole)), ylim=(0.7 * low, 1.4 * high))
        ax.set_xticks([1, 4, 16, 64], ["1", "4", "16", "64"])
        ax.minorticks_off()
        ax.set(title=f"r = {r}", xlabel="index")
    for ax in grid[:, 0]:
        ax.set_ylabel("singular value of ΔW")
    grid[0, 0].legend(fontsize=8, loc="lower left")
    words = [f"at r = {r} from {learned[r][0]:.2f} down to {learned[r][-1]:.2f}" for r in shown]
    return plotting.Picture(figure, f"Singular values of ΔW of the value projections: {'; '.join(words)}.")


# %% tags=["unkept"]
try:
    import ipywidgets
except ImportError:
    print("ipywidgets is not installed; the figure below shows all ranks")
else:
    from IPython.display import display

    slider = ipywidgets.IntSlider(0, 0, len(ranks) - 1, description="which rank", continuous_update=False)
    slider.readout = False  # it would show the place in the list, not the rank
    view = ipywidgets.HTML(picture(ranks[:1], 1)._repr_html_())

    def turn(change):
        view.value = picture([ranks[change["new"]]], 1)._repr_html_()

    slider.observe(turn, "value")
    display(ipywidgets.VBox([slider, view]))

# %%
picture(ranks, 4)

# %%
print("   r   first and last singular value     of noise")
for r in ranks:
    print(f"{r:4}   {learned[r][0]:12.2f} {learned[r][-1]:12.2f}   {noise[r][0]:10.2f} {noise[r][-1]:8.2f}")

# %% [markdown]
# ## A task whose rank is known
#
# For a text we do not know the answer. So here is a task for which we do: pairs of letters have changed
# places everywhere in the text. The base knows this text; it only has to learn that the letters have other
# names. The model uses one table $E$ for input and output, so the change $\Delta E = (P - I) E$, with $P$ the
# permutation, undoes the swaps exactly, and its rank is the number of swaps: each swapped pair is one
# direction, the difference of two rows.
#
# Two things can be tested. Does the loss need as many ranks as there are swaps? And does LoRA, given more,
# use just these?

# %%
rank_figures.known_rank(rows, known)

# %%
lora_k, base_k = rank_figures.final(rows, known), rank_figures.final(rows, known, "none")[0]
oracle = {
    row["config"]["rank"]: row["test"] for row in rank_figures.select(rows, kind="oracle", target=known)
}
truth = np.array(base_k["spectra"]["model.embed_tokens"])
swaps = int((truth > 1e-6 * truth[0]).sum())
print(f"{swaps} swaps; the base on the plain text: {base_k['floor']:.3f}, on this one: {base_k['test']:.3f}")
print("   r   excess loss of LoRA   of the true ΔE cut to rank r")
ranks_k, losses_k = rank_figures.by_rank(lora_k, "test")
for r, (value, *_) in zip(ranks_k, losses_k, strict=True):
    excess, cut = (round(v - base_k["floor"], 3) + 0.0 for v in (value, oracle[r]))  # no minus zero
    print(f"{r:4}   {excess:19.3f}   {cut:28.3f}")

shown = min((r for r in ranks_k if r >= 2 * swaps), default=ranks_k[-1])
found = np.mean(
    [row["spectra"]["model.embed_tokens"] for row in rank_figures.select(lora_k, rank=shown)], axis=0
)
print()
print(f"singular values of the true ΔE:     {' '.join(f'{x:5.2f}' for x in truth[:swaps])}")
print(f"learned at r = {shown}, the first {swaps}:      {' '.join(f'{x:5.2f}' for x in found[:swaps])}")
print(f"and the next:                       {' '.join(f'{x:5.2f}' for x in found[swaps : 2 * swaps])}")

# %% tags=["claims"]
holds("its rank is the number of swaps", f"; {swaps} letter swaps:" in base_k["source"])
zero = {r: round(oracle[r] - base_k["floor"], 3) == 0 for r in oracle}
holds("at the number of swaps they reach zero", all(zero[r] == (r >= swaps) for r in oracle))
drops = found[:-1] / found[1:]
holds(
    "if the learned singular values drop after that number", drops.argmax() == swaps - 1 and drops.max() > 1.5
)
holds("so LoRA may lie below them", any(v[0] < oracle[r] for r, v in zip(ranks_k, losses_k, strict=True)))
holds("They need not equal the true ones", (np.abs(found[:swaps] / truth[:swaps] - 1) > 0.01).all())
holds("The base knows this text", base_k["floor"] < 0.5 * base_k["test"])

# %% [markdown]
# How to read it. Left: the squares show what the true answer still gives away when it is cut to rank $r$.
# That is the best cut of the matrix and not of the loss, so LoRA may lie below them; at the number of swaps
# they reach zero. A circle below zero would mean that training has done more than undo the swaps. Right: if
# the learned singular values drop after that number, the method has found the rank that we put in. They need
# not equal the true ones: other changes of the table have the same effect on the loss, or nearly so, and
# AdamW makes some of them on the way.
#
# ## What not to claim
#
# - *"Fine-tuning updates are low-rank, therefore LoRA works."* Look at the row *full* of the table of
#   directions. What is shown here is only that a change of low rank is *enough* for a task like this one.
# - *"Rank $r$ is enough."* For this base, this text and this many steps. More data and harder tasks need
#   more.
# - *"LoRA beats full fine-tuning"*, where a point lies below the line. The range over few seeds is not a
#   test, and both learning rates come from a coarse grid.
# - *"The effective rank is small."* Smaller than that of noise of the same rank? That is the question.
# - *"10,000 times less memory."* Fewer trained numbers, with their gradients and moments; the weights and the
#   activations stay, as the first lesson counted.

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
# Next: [An adapter under the microscope](11_under_the_microscope.ipynb)

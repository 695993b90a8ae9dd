# %% [markdown]
# # Adding adapters
#
# ![](attachment:adding.png)
#
# **What you will see.** An update of a weight is a matrix, and matrices can be added, weighted and negated.
# You train three small adapters, add them in the right way and in a common wrong one, walk from one to
# another, and go through TIES, a method for updates that disagree, step by step.
#
# **What you need.** [LoRA from one equation](2_lora_from_one_equation.ipynb) and [Merging costs
# nothing](3_merging_costs_nothing.ipynb).
#
# **Contents.** Three adapters · Add the updates, not the factors · From one to another · Where signs
# disagree · Exercises · To take along

# %% tags=["first", "unkept"]
missing = absent("ipywidgets")

# %% tags=["imports"]
import numpy as np

import minilora as ml
from minilora.analysis import figures
from minilora.compose.arithmetic import cat, peft_linear
from minilora.compose.sparsify import ties
from minilora.data import corpora
from minilora.layers import Factors

# %% [markdown]
# ## Three adapters
#
# One frozen base, and three adapters with names of their own: the spelling of the First Folio, the King
# James Bible, and the source code of a Python package. Each is trained for a few steps. The table shows
# what every one does to the test loss of every text: who helps whom?

# %% tags=["corpus", "trained"]
texts = {name: corpora.corpus_or_fallback(name) for name in ("folio", "kjv", "code")}
tests = {
    name: ml.eval_batches(text.test, batch_size=16, length=128, limit=16 * 128)
    for name, text in texts.items()
}
model = ml.load()


def losses():
    """The test loss on each text with the adapter that is active."""
    return [ml.evaluate(model, tests[name]) for name in texts]


table = {"base": losses()}
for seed, (name, text) in enumerate(texts.items()):
    ml.inject(model, ml.LoraConfig(r=4, alpha=8), rng=np.random.default_rng(seed), name=name)
    batches = ml.batches(text.train, np.random.default_rng(10 + seed), batch_size=8, length=128)
    ml.train(model, batches, ml.AdamW(lr=1e-2), steps=20)
    table[name] = losses()

print("test loss (nats per character) on")
print(f"{'adapter':14}" + "".join(f"{name:>8}" for name in texts))
for name, row in table.items():
    print(f"{name:14}" + "".join(f"{loss:8.2f}" for loss in row))

# %% tags=["claims", "corpus", "trained"]
own = np.array([table[name] for name in texts])
holds("Each adapter is the best on its own text", (own.argmin(0) == range(3)).all())
harm = own - np.array(table["base"]) > 0
holds("each of them harms at least one other text", harm.any(1).all() and not harm.diagonal().any())
holds("You train three small adapters", len(texts) == 3)
for words in (
    "Three adapters · Add",
    "Three adapters One frozen base, and three adapters with names of their own",
):
    holds(words, len(texts) == 3)

# %% [markdown]
# Each adapter is the best on its own text, and each of them harms at least one other text.
#
# ## Add the updates, not the factors
#
# To use two adapters at once, add what they do to the weight: $\Delta W = w_1 s_1 B_1 A_1 + w_2 s_2 B_2 A_2$.
# The result is again a product of two factors, the $B$ side by side and the $A$ on top of each other: the
# picture above has it for the Folio's spelling and the King James Bible's, in one map of the base. PEFT calls
# this `cat`. It is exact, and its rank is at most the sum of the ranks; `svd` then finds the nearest update
# of a smaller rank.
#
# It is tempting to add the *factors* instead, for that keeps the rank. But a product of sums is not a sum
# of products:
#
# $$(B_1 + B_2)(A_1 + A_2) = B_1 A_1 + B_2 A_2 + \underbrace{B_1 A_2 + B_2 A_1}_\text{cross terms}$$
#
# The cross terms let one adapter write what the other has read. Nobody trained them. PEFT calls this
# `linear`; here its name is `peft_linear`, and `linear` is the sum. With weights, `peft_linear` multiplies
# $A$ and $B$ each by the root of $w s$, so that one adapter alone counts $w$ times.

# %%
rng = np.random.default_rng(0)
A1, A2, B1, B2 = (rng.integers(-2, 3, shape) for shape in ((1, 5), (1, 5), (4, 1), (4, 1)))
figures.matrices(
    {
        "sum of the products": B1 @ A1 + B2 @ A2,
        "product of the sums": (B1 + B2) @ (A1 + A2),
        "cross terms": B1 @ A2 + B2 @ A1,
    },
    "Two adapters of rank 1, added in two ways. The product of the sums is another matrix than the sum of "
    "the products; the cross terms are the difference, and as large as the rest.",
)

# %% tags=["corpus", "trained"]
both = {"folio": 1.0, "kjv": 1.0}
ways = {"cat": {}, "svd": {"rank": 4}, "peft_linear": {}}
sums = {}
for method, options in ways.items():
    made = ml.add_weighted_adapter(model, both, method, method=method, **options)
    sums[method] = made.relative, losses()
ml.add_weighted_adapter(model, {"folio": -1.0}, "negated")
sums["folio times -1"] = 0.0, losses()

print("                      off the       test loss on")
print(f"{'folio + kjv as':14}        exact sum  " + "".join(f"{name:>8}" for name in texts))
for name, (residual, row) in sums.items():
    print(f"{name:14} {residual:16.0%}  " + "".join(f"{loss:8.2f}" for loss in row))

# %% tags=["claims"]
parts = B1 @ A1 + B2 @ A2, B1 @ A2 + B2 @ A1
sizes = [np.linalg.norm(part) for part in parts]
holds("Two adapters of rank 1, added in two ways.", len(A1) == len(A2) == 1)
holds(
    "the cross terms are the difference, and as large as the rest",
    ((B1 + B2) @ (A1 + A2) - parts[0] == parts[1]).all() and 0.5 < sizes[1] / sizes[0] < 2,
)

# %% tags=["claims", "corpus", "trained"]
says("is off by {:.0f} % of the sum's own size", 100 * sums["peft_linear"][0])
holds("worse on both texts than the exact sum", (np.array(sums["peft_linear"][1]) > sums["cat"][1])[:2].all())
says("At half the rank `svd` loses {:.0f} %", 100 * sums["svd"][0])
holds("which here even helps", (np.array(sums["svd"][1]) < sums["cat"][1]).all())
gain = np.array(sums["cat"][1]) - [table["folio"][0], table["kjv"][1], 0]
holds("worse on either text than that text's own adapter", (gain[:2] > 0).all())
holds(
    "Times -1, the Folio's adapter makes the base worse on all texts",
    (np.array(sums["folio times -1"][1]) > table["base"]).all(),
)

# %% [markdown]
# The cross terms are no detail: on the trained adapters `peft_linear` is off by 95 % of the sum's own size,
# and worse on both texts than the exact sum. That one, too, is worse on either text than that text's own
# adapter: the two updates were trained apart, and together they go too far. At half the rank `svd` loses 48
# %, which here even helps, perhaps because the update gets smaller. Times -1, the Folio's adapter makes the
# base worse on all texts: it forgets, but not only what it was meant to.
#
# ## From one to another
#
# Weights $1 - t$ and $t$ lead from one adapter to the other. At both ends one weight is zero, so both ways
# of adding agree there. Between them the sum walks a straight line, and the product of sums leaves it.

# %% tags=["corpus", "trained"]
steps = (0.0, 0.25, 0.5, 0.75, 1.0)


def between(t, method="linear"):
    """The losses at weights 1 - t and t."""
    name = f"{method}-{round(100 * t)}"
    ml.add_weighted_adapter(model, {"folio": 1 - t, "kjv": t}, name, method=method)
    found = losses()
    ml.remove(model, name)
    return found


walk = {method: np.array([between(t, method) for t in steps]) for method in ("linear", "peft_linear")}
figures.curves(
    {
        "First Folio, updates added": (steps, walk["linear"][:, 0]),
        "First Folio, factors added": (steps, walk["peft_linear"][:, 0]),
        "King James, updates added": (steps, walk["linear"][:, 1]),
        "King James, factors added": (steps, walk["peft_linear"][:, 1]),
    },
    "weight t of the King James adapter; 1 - t of the Folio's",
    "test loss (nats per character)",
    "Test loss on two texts on the way from one adapter to the other. The ends are the same; between them "
    "the factors' way is worse than the updates' on both texts.",
)

# %% tags=["corpus", "trained"]
print("         updates added       factors added")
print("   t     folio     kjv       folio     kjv")
for t, a, b in zip(steps, walk["linear"], walk["peft_linear"], strict=True):
    print(f"{t:4.2f} {a[0]:9.3f} {a[1]:7.3f} {b[0]:11.3f} {b[1]:7.3f}")

# %% tags=["claims", "corpus", "trained"]
straight, bent = walk["linear"][:, :2], walk["peft_linear"][:, :2]
holds("The ends are the same", np.abs(straight - bent)[[0, -1]].max() < 1e-5)
holds("the factors' way is worse than the updates' on both texts", (bent > straight)[1:-1].all())
holds("both ways of adding agree there", np.abs(straight - bent)[[0, -1]].max() < 1e-5)
middle = straight[2]
holds("In the middle one adapter is better than the base on both texts", (middle < table["base"][:2]).all())

# %% tags=["unkept"]
try:
    import ipywidgets
except ImportError:
    print("ipywidgets is not installed; the figure above shows five places")
else:
    slider = ipywidgets.FloatSlider(0.5, min=0, max=1, step=0.05, description="t", continuous_update=False)
    ipywidgets.interact(
        lambda t: print(dict(zip(texts, np.round(between(t), 3).tolist(), strict=True))), t=slider
    )

# %% [markdown]
# With a kernel running, the slider walks the line. In the middle one adapter is better than the base on
# both texts, and merged it costs no more than either.
#
# ## Where signs disagree
#
# In a sum, an entry that one adapter raises and the other lowers nearly vanishes: neither gets what it
# needs. TIES ([Yadav et al. 2023](https://arxiv.org/abs/2306.01708)) decides instead. *Trim*: keep the
# largest entries of each update, here half of them. *Elect*: each entry takes the sign that has more
# weight. *Merge*: average those entries that agree with it.

# %%
one = np.array([[7, -1, 0, 2], [-3, 8, 1, -6], [1, 0, 5, -2], [4, -5, 1, 9]])
two = np.array([[6, 2, -5, 0], [4, -9, 1, -3], [0, -1, -7, 8], [1, -6, 0, 2]])


def trim(update, density=0.5):
    """The update with all but its largest entries 0."""
    least = np.sort(np.abs(update), axis=None)[-int(density * update.size)]
    return np.where(np.abs(update) >= least, update, 0)


trimmed = [trim(one), trim(two)]
sign = np.where(sum(trimmed) >= 0, 1, -1)
agree = [np.sign(update) == sign for update in trimmed]
merged = sum(np.where(a, update, 0) for a, update in zip(agree, trimmed, strict=True))
merged = merged / np.maximum(sum(a.astype(int) for a in agree), 1)


def beside(words, *found):
    """Print matrices beside each other."""
    print(words)
    for rows in zip(*found, strict=True):
        print("     ".join("".join(f"{v:6.4g}" for v in row) for row in rows))


beside("two updates", one, two)
beside("trimmed: the larger half of each", *trimmed)
beside("the sign elected, and the mean of those that agree", sign, merged)
made = ties([(1.0, Factors(np.eye(4), update * 1.0, 1.0)) for update in (one, two)], density=0.5)
print("the package says the same:", np.allclose(made.factors.B @ made.factors.A, merged))

# %% tags=["claims"]
holds("here half of them", all((update != 0).sum() == 8 for update in trimmed))
holds("the second row, where 8 meets -9", (one[1, 1], two[1, 1]) == (8, -9))
twice = peft_linear([(0.5, Factors(np.eye(4), one * 1.0, 1.0))] * 2).factors
holds("Four equal terms, each half of ΔW, where two belong", np.allclose(twice.B @ twice.A, 2 * one))
says("The sum would be {}; TIES says {:.0f}", one[1, 1] + two[1, 1], merged[1, 1])

# %% [markdown]
# Look at the second row, where 8 meets -9. The sum would be -1; TIES says -9. The loser gets nothing there.
# What TIES makes is not the sum of the updates and has no low rank; `ml.combine` cuts it to the rank you ask
# for, and says how much that loses. None of these methods knows the data. Whether one helps is a matter of
# trying, on text that was not used to choose.

# %% [markdown]
# ## Exercises
#
# Write your answer in place of `None`, and run that cell and the one below it. A wrong answer gets a hint.
# [The solutions, and what is often answered instead](solutions/8_adding_adapters.md).


# %% tags=["exercise"]
# Write the line.
def cross_terms(A1, B1, A2, B2):
    """What (B1 + B2) (A1 + A2) has and B1 A1 + B2 A2 has not, (O, I)."""
    return None  # your line in place of None


# %% tags=["check"]
def check():
    """Your answer on integers, where nothing is rounded."""
    rng = np.random.default_rng(3)
    for r in (2, 3):
        A1, B1, A2, B2 = (rng.integers(-4, 5, shape) for shape in ((r, 7), (5, r), (r, 7), (5, r)))
        mine = given(cross_terms(A1, B1, A2, B2))
        wanted = (B1 + B2) @ (A1 + A2) - B1 @ A1 - B2 @ A2
        assert np.shape(mine) == (5, 7), f"the shape is {np.shape(mine)}; expected (O, I) = (5, 7)"
        assert not np.array_equal(mine, B1 @ A1 + B2 @ A2), "these are the terms that should be there"
        assert not any(np.array_equal(mine, half) for half in (B1 @ A2, B2 @ A1)), "almost: there is one more"
        assert not np.array_equal(mine, -wanted), "almost: the sign; what the product has more is meant"
        assert np.array_equal(mine, wanted), "another matrix: multiply the brackets out, strike what belongs"
    return "with integers, equal by =="


verdict(check)


# %% tags=["exercise"]
# Predict, then run.
def averaged_with_itself():
    """An adapter averaged with itself by `peft_linear`, weights 0.5 and 0.5: how many times its ΔW is it?"""
    return None  # your guess, a number, in place of None


# %% tags=["check"]
def check():
    """Your guess beside what comes out."""
    rng = np.random.default_rng(4)
    change = Factors(rng.standard_normal((6, 2)), rng.standard_normal((2, 5)), 1.5)
    made = peft_linear([(0.5, change), (0.5, change)]).factors
    times = np.linalg.norm(made.B @ made.A) / np.linalg.norm(1.5 * change.B @ change.A)
    hints = {
        1: "so it should be, and so `cat` does it; but each factor has the weight √0.5 before they are added",
        4: "four terms, yes; but each has a weight",
        0.5: "more terms come out, not fewer: multiply the two sums out",
    }
    otherwise = "no: each factor is a sum of two, times √0.5; multiply"
    predicted(averaged_with_itself(), times, hints, otherwise, 1e-9)
    return f"{times:.0f} times: two terms that belong, and two that cross, each half of ΔW"


verdict(check)


# %% tags=["exercise"]
# Change, and explain.
def parted():
    """Two 2 x 2 updates without zeros whose sum is 0, while TIES of density 1 makes something of them; and
    why it does.

    a: TIES leaves out the smaller half of each update first.
    b: where the two disagree, TIES lets one of them win, and the other has no say.
    c: TIES adds what the signs say, and not the sizes.
    """
    return None, None  # your pair of matrices, and the letter that the numbers support


# %% tags=["check"]
def check():
    """The sum of your two updates, and what TIES makes of them."""
    answer, letter = given(parted())
    assert len(answer) == 2, f"{len(answer)} things came back; expected two matrices"
    one, two = (np.asarray(update, float) for update in answer)
    assert one.shape == two.shape == (2, 2), f"the shapes are {one.shape} and {two.shape}; expected (2, 2)"
    assert np.all([one, two]), "an entry is 0; expected none"
    updates = [(1.0, Factors(np.eye(2), update, 1.0)) for update in (one, two)]
    exact, made = cat(updates), ties(updates, density=1.0)
    left = made.factors.B @ made.factors.A
    assert exact.norm < 1e-12 * np.linalg.norm(one), "the sum is not 0: let one lower what the other raises"
    hints = {
        "a": "density 1 keeps all of them, as was asked",
        "c": f"of an entry {one[0, 0]:g} and {two[0, 0]:g} TIES made {left[0, 0]:.3g}: a size of one of them",
    }
    chosen(letter, "b", hints)
    return "the sum is nothing, and TIES keeps whatever is above zero: an even vote goes to plus"


verdict(check)

# %% [markdown]
# ## To take along
#
# - Adapters add as updates $s B A$, never as factors. `cat` is exact; `svd` is the nearest of a smaller rank.
# - Adding factors brings cross terms, which can be as large as what you wanted.
# - A sum of adapters that were trained apart may be worse than each. Measure it on every text you care for.
# - TIES decides conflicts by a vote; it is another update than the sum.
#
# Next: [A thousand adapters](9_a_thousand_adapters.ipynb).

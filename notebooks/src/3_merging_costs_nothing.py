# %% [markdown]
# # Merging costs nothing
#
# ![](attachment:merging.png)
#
# **What you will see.** That a merged adapter is the same function; that unmerging gives the base back to the
# bit, and how a common way of doing it does not; and what merging saves, counted in products of matrices.
#
# **What you need.** [LoRA from one equation](2_lora_from_one_equation.ipynb).
#
# **Contents.** The same function · Merging a model · Adding and subtracting · Counting the work · Exercises ·
# To take along

# %% tags=["first", "unkept"]

# %% tags=["imports"]
import numpy as np

import minilora as ml
from minilora.course.work import work
from minilora.formats.safetensors import stored
from minilora.layers import Linear, Need, Param
from minilora.lora import Adapted, LowRank, adapted

# %% [markdown]
# ## The same function
#
# $$X W^\top + s\,(X A^\top) B^\top = X\,(W + s\,B A)^\top$$
#
# On the left the adapter is a detour beside $W$. On the right it has become part of the weight, and the map
# is a plain one again. As real numbers the two sides are equal.
#
# A computer rounds, and at different places. So we begin with small integers, $s$ too: every intermediate
# result is an integer below $2^{24}$, and float32 holds it exactly. Then the two sides must agree with `==`.

# %%
rng = np.random.default_rng(0)


def whole(*shape):
    return rng.integers(-4, 5, shape).astype(np.float32)


W, A, B, X = whole(24, 32), whole(5, 32), whole(24, 5), whole(9, 32)
layer = Adapted(Linear(Param(W, False)), {"a": LowRank(Param(A), Param(B), 2.0)}, "a")
apart, _ = layer(X, Need.NONE)
ml.merge({"layer": layer})
together, _ = layer(X, Need.NONE)
print("largest value:", int(np.abs(apart).max()), "of", 2**24)
print("equal with ==:", bool((apart == together).all()))

# %% tags=["claims"]
most = np.abs(X) @ (np.abs(W) + 2 * np.abs(B) @ np.abs(A)).T  # no partial sum is larger than this
holds("every intermediate result is an integer below $2^{24}$", most.max() < 2**24)
holds("float32 holds it exactly", int(np.float32(2**24 - 1)) == 2**24 - 1)
holds("Then the two sides must agree with `==`", (apart == together).all())

# %% [markdown]
# With other numbers they differ by rounding, and by no more than a bound that can be derived: [How do we
# know?](13_how_do_we_know.ipynb) derives it.
#
# ## Merging a model
#
# Here both factors are drawn at random, so that $\Delta W$ is not zero. `merge` computes $W + \Delta W$ for
# every adapted layer and puts it **beside** the base, as a second array. `unmerge` drops that array. The base
# is never written, so it cannot change: its digest is taken over every byte.

# %%
model = ml.load()
ids = np.random.default_rng(1).integers(32, 127, (1, 32))  # a text of 32 characters
ml.inject(model, ml.LoraConfig(r=8, alpha=16, init="both"), rng=np.random.default_rng(2))


def base_digest():
    return ml.digest({path: layer.base for path, layer in adapted(model).items()})[:16]


def logits():
    return model(ids)[0]


def apart_by(a, b):
    d = float(np.abs(a - b).max() / np.abs(a).max())
    if d == 0:
        return "equal to the bit"
    return "below 1e-4" if d < 1e-4 else "above 1e-1" if d > 0.1 else "between the two"


print("base, at first:        ", base_digest())
unmerged = logits()
with ml.disabled(model):
    plain = logits()
ml.merge(model)
merged = logits()
print("base, while merged:    ", base_digest())
ml.unmerge(model)
print("base, after unmerging: ", base_digest())
print()
print("largest relative difference of the logits")
print("  base and adapted:          ", apart_by(plain, unmerged))
print("  unmerged and merged:       ", apart_by(unmerged, merged))
print("  before and after the cycle:", apart_by(unmerged, logits()))
print("  base, adapter disabled:    ", apart_by(ml.load()(ids)[0], plain))

# %% tags=["claims"]
holds("With other numbers they differ by rounding", apart_by(unmerged, merged) == "below 1e-4")
holds("Merged and unmerged differ by rounding", apart_by(unmerged, merged) == "below 1e-4")
holds("so that $\\Delta W$ is not zero", apart_by(plain, unmerged) == "above 1e-1")
from minilora.fast import folded

sizes = {layer.base.weight.data.shape: layer.adapters[layer.active] for layer in adapted(model).values()}
least = {shape: next(M for M in range(1, 1000) if folded.pays(pair, M)) for shape, pair in sizes.items()}
holds("from about 100 rows on, or 140, by the shape of the map", {*least.values()} == {97, 140})
holds("The package counts forming twice", all(n == 2 * a * b // (a + b) + 1 for (a, b), n in least.items()))
from minilora.layers import Param
from minilora.lora import LowRank


def shorter_from(shape, rows):
    """The least rank for which dA and dB take fewer operations through the gradient of W."""
    out, inp = shape
    pairs = (LowRank(Param(np.zeros((r, inp))), Param(np.zeros((out, r))), 1.0) for r in range(1, inp))
    return next(len(pair.A.data) for pair in pairs if folded.through_weight(pair, rows))


holds("with 1,024 rows from rank 26 on, or 38", {shorter_from(shape, 1024) for shape in sizes} == {26, 38})
many = [(np.tile(ids, (16, 1)),) * 2]
unmerged_loss = ml.evaluate(model, many)
ml.merge(model)
holds("merged and unmerged are one computation, equal to the bit", ml.evaluate(model, many) == unmerged_loss)
ml.unmerge(model)

# %% [markdown]
# Merged and unmerged differ by rounding, as the bound allows. In `ml.train` and `ml.evaluate` they do not
# differ at all: where rows are many (here from about 100 rows on, or 140, by the shape of the map) two thin
# products beside $W$ cost more than forming $W + \Delta W$, so these form it for each batch. (The package
# counts forming twice, for the time to read and write the array; the last exercise counts multiplications
# alone.) There merged and unmerged are one computation, equal to the bit.
#
# Training counts once more. $dA$ and $dB$ also follow from $G = dY^\top X$, the gradient of $W$, as
# $dB = s\,G A^\top$ and $dA = s\,B^\top G$. LoRA is there so that nobody has to keep $G$; but for a high
# rank it is the shorter way (with 1,024 rows from rank 26 on, or 38, by the shape of the map), so `ml.train`
# forms it, and drops it at once.
#
# The second array takes memory, one more copy of each adapted weight. `ml.fuse` is for those who will not go
# back: it makes the model a plain one and drops base and adapter.
#
# ## Adding and subtracting
#
# The other way is to write into the weight: `W += Q` to merge and `W -= Q` to unmerge, with $Q = \Delta W$.
# It needs no second array, and it does not give $W$ back: $W + Q$ is rounded, and the subtraction cannot know
# what was lost. We do it again and again, with one adapter and with two.

# %%
rng = np.random.default_rng(3)
W0 = (rng.standard_normal((256, 256)) / 16).astype(np.float32)


def delta():
    """s B A as a sum of outer products: no library of matrix products has a say in the last digit."""
    B, A = rng.standard_normal((2, 256, 8)).astype(np.float32)
    return sum(np.outer(B[:, k], A[:, k]) for k in range(8)) / np.float32(64)


P, Q = delta(), delta()
orders = {
    "one adapter": (P, -P),
    "two, in turn": (P, -P, Q, -Q),
    "two, last in first out": (P, Q, -Q, -P),
    "two, first in first out": (P, Q, -P, -Q),
}
cycles, found = (1, 10, 100), {}
for name, changes in orders.items():
    W = W0.copy()
    for cycle in range(1, 101):
        for change in changes:
            W += change
        found[name, cycle] = int((W != W0).sum()), float(np.abs(W - W0).max())

print(f"entries of W that changed, of {W0.size:,}, and the largest change")
print(f"{'cycles':24}" + "".join(f"{c:>18}" for c in cycles))
for name in orders:
    print(f"{name:24}" + "".join(f"{n:>9,} {d:8.1e}" for n, d in (found[name, c] for c in cycles)))

# %% tags=["claims"]
names = list(orders)
drift = {name: [found[name, cycle] for cycle in range(1, 101)] for name in names}
holds("the damage is done in the first cycle and never grows", len(set(drift[names[0]])) == 1)
holds(
    "With two it grows on and on, in whatever order they come and go",
    all(drift[name][0][1] < drift[name][9][1] / 4 < drift[name][99][1] / 16 for name in names[1:]),
)
holds("The changes are small", max(d for _, d in found.values()) < 1e-4 * np.abs(W0).max())

# %% [markdown]
# With one adapter the damage is done in the first cycle and never grows: a second cycle gives back what the
# first one left (Reiser and Knuth 1975). With two it grows on and on, in whatever order they come and go. The
# changes are small, but the weight is no longer the one that was loaded, and its digest says so. A reference
# to the old array is cheaper than the worry.
#
# ## Counting the work
#
# Time depends on the machine; the number of products of matrices does not. `work` counts them in one forward
# pass. We check the count with what the model is made of.

# %%
with ml.disabled(model):
    found = {"base": work(model, ids)}
found["unmerged"] = work(model, ids)
ml.merge(model)
found["merged"] = work(model, ids)
ml.unmerge(model)
print("32 characters    products   multiplications")
for name, (products, multiplications) in found.items():
    print(f"{name:13}  {products:10}  {multiplications:16,}  {multiplications / found['base'][1]:6.1%}")

blocks, maps = len(model.model.layers), len(adapted(model))
print()
print(f"by hand: {maps} maps, two products of attention in each of {blocks} blocks, and the head:", end=" ")
print(maps + 2 * blocks + 1)
print(f"two more for each of {maps} adapters:", maps + 2 * blocks + 1 + 2 * maps)

# %% tags=["claims"]
products = {name: n for name, (n, _) in found.items()}
says("The base makes {} products", products["base"])
says("The model has {} adapted maps.", maps)
says("but {} more calls, {} in all", products["unmerged"] - products["base"], products["unmerged"])
holds("each takes two more products", products["unmerged"] - products["base"] == 2 * maps)
holds("half the width of a square map", all(n * n / (n + n) == n / 2 for n in (96, 4096)))
holds("thin ones: few multiplications", found["unmerged"][1] < 1.2 * found["base"][1])
for words in ("the work is that of the base, call for call", "does the products of the base and no other"):
    holds(words, found["merged"] == found["base"])
holds("We check the count with what the model is made of", products["base"] == maps + 2 * blocks + 1)

# %% [markdown]
# The base makes 28 products. The model has 21 adapted maps. Unmerged, each takes two more products, thin
# ones: few multiplications, but 42 more calls, 70 in all, and on a small batch calls are what one waits for.
# Merged, the work is that of the base, call for call.
#
# What merging cannot do: a merged weight holds one adapter. A batch whose rows need different adapters has to
# run unmerged, and a merged model cannot be trained.

# %% [markdown]
# ## Exercises
#
# Write your answer in place of `None`, and run that cell and the one below it. A wrong answer gets a hint.
# [The solutions, and what is often answered instead](solutions/3_merging_costs_nothing.md).


# %% tags=["exercise"]
# Write the line.
def together_as_one(A1, B1, s1, A2, B2, s2):
    """A (r1 + r2, I) and B (O, r1 + r2) with B A = s1 B1 A1 + s2 B2 A2: two adapters as one of scale 1.

    Without multiplying any B with any A.
    """
    return None  # your pair A, B in place of None


# %% tags=["check"]
def check():
    """Your answer on integers, where nothing is rounded, for two pairs of scales."""
    rng = np.random.default_rng(4)
    for s1, s2 in ((3.0, -4.0), (2.0, 0.5)):
        A1, B1, A2, B2 = (rng.integers(-4, 5, n).astype(float) for n in ((3, 12), (10, 3), (5, 12), (10, 5)))
        unscaled, wanted = B1 @ A1 + B2 @ A2, s1 * B1 @ A1 + s2 * B2 @ A2
        A, B = given(together_as_one(A1, B1, s1, A2, B2, s2))
        assert np.shape(A) == (8, 12), f"A has shape {np.shape(A)}; expected (r1 + r2, I) = (8, 12): rows"
        assert np.shape(B) == (10, 8), f"B has shape {np.shape(B)}; expected (O, r1 + r2) = (10, 8): columns"
        assert not np.array_equal(B @ A, unscaled), "almost: the scales are missing, and the new one is 1"
        squared = s1**2 * B1 @ A1 + s2**2 * B2 @ A2
        assert not np.array_equal(B @ A, squared), (
            "each scale counts twice: put it on one factor, not on both"
        )
        assert np.array_equal(B @ A, wanted), (
            "B A is another matrix: which B meets which A, with which scale?"
        )
    return "with integers, equal by =="


verdict(check)


# %% tags=["exercise"]
# Predict, then run.
def merged_in_bfloat16():
    """A weight is 1, its ΔW is 0.003, and the merged model is stored in bfloat16, with 8 significant bits.

    Which number is stored?
    """
    return None  # your guess, a number, in place of None


# %% tags=["check"]
def check():
    """Your guess beside the number that a file in bfloat16 holds."""
    value, after = (float(stored(np.float32([w]), "bfloat16").astype(float)[0]) for w in (1.003, 1.006))
    hints = {
        1.003: "float32 would hold it, nearly; how far is the next number after 1, with 8 significant bits?",
        after: f"{after} is the next number after 1; 1.003 is nearer to another one",
    }
    predicted(merged_in_bfloat16(), value, hints, "no: between 1 and 2 the numbers are 1/128 apart", 1e-6)
    return f"{value:g}: neighbours are {after - 1:g} apart, so this ΔW is gone. Look at |ΔW| before you round"


verdict(check)


# %% tags=["exercise"]
# Change, and explain.
def pays_off(I, O):  # noqa: E741
    """Change the number of tokens until merging pays for itself; and say why you are not told the rank.

    To merge, ΔW = B A takes multiplications once. Unmerged, A and B take some for every token. Return the
    least whole number of tokens whose multiplications are more than those of ΔW; leave the scale out.

    a: r is small beside I and O, and hardly counts.
    b: both sides are r times something.
    c: ΔW has O I entries, whatever r is.
    """
    return None, None  # your number of tokens, and the letter that the numbers support


# %% tags=["check"]
def check():
    """Your number of tokens beside the multiplications of three maps."""
    for O, I, r in ((5, 7, 2), (96, 256, 8), (4096, 4096, 8)):  # noqa: E741
        tokens, letter = given(pays_off(I, O))
        assert isinstance(tokens, int), f"{tokens!r} is not a whole number"
        once, each = O * r * I, r * I + O * r
        where = f"{O:,} x {I:,} with r = {r}"
        said = f"{where}: {tokens:,} tokens take {tokens * each:,} multiplications, ΔW takes {once:,}"
        assert tokens * each > once, f"too early; {said}"
        assert (tokens - 1) * each <= once, f"it pays earlier; {said}"
        hints = {
            "a": f"let r be {2 * r}: ΔW takes {2 * once:,}, and the number of tokens stays what it is",
            "c": f"each is a sum of r products: {once:,} for r = {r}, {2 * once:,} for r = {2 * r}",
        }
        chosen(letter, "b", hints)
    return f"from {tokens:,} tokens on for a map of {O:,} x {I:,}, whatever the rank"


verdict(check)

# %% [markdown]
# ## To take along
#
# - Merged and unmerged are one function, but for rounding.
# - Keep the base and drop the merged copy, and unmerging is exact. Adding and subtracting is not.
# - Merged, the adapted model does the products of the base and no other.
#
# Next: [Which rank?](4_which_rank.ipynb)

# %% [markdown]
# # Merging costs nothing
#
# **What you will see.** That a merged adapter gives the same outputs within a bound that can be derived; that
# unmerging gives the base back to the bit, and how a common way of doing it does not; and what merging saves,
# counted in products of matrices.
#
# **What you need.** The first lesson, [LoRA from one equation](2_lora_from_one_equation.ipynb).
#
# **Contents.** The same function twice · How far apart can they be? · Where nothing rounds · Merging a model
# · Adding and subtracting · Counting the work · Exercises · To take along

# %% tags=["first", "unkept"]

# %% tags=["imports"]
import time

import numpy as np

import minilora as ml
from minilora.analysis import plotting
from minilora.experiments import merge_equivalence, rank_figures
from minilora.formats.safetensors import stored
from minilora.layers import Linear, Need, Param
from minilora.lora import Adapted, LowRank, adapted
from minilora.tree import named_params

# %% [markdown]
# ## The same function twice
#
# $$X W^\top + s\,(X A^\top) B^\top = X\,(W + s\,B A)^\top$$
#
# On the left the adapter is a detour beside $W$. On the right it has become part of the weight, and the map
# is a plain one again. As real numbers the two sides are equal. As floating-point numbers they round at
# different places.
#
# ## How far apart can they be?
#
# Let $u$ be the unit roundoff ($2^{-24}$ for float32, $2^{-53}$ for float64) and $\gamma_k = k u / (1 - k
# u)$. A sum of $k$ products, added in any order, is off by at most $\gamma_k$ times the sum of the absolute
# values (Higham, *Accuracy and Stability of Numerical Algorithms*, section 3.1). Follow the roundings of
# either side, with $n$ inputs and rank $r$:
#
# | step | factor |
# |---|---|
# | product with $A$, then with $B$ | $\gamma_{n+r}$ |
# | times $s$, and added to $W x$ | two more roundings |
# | product $W x$, and the addition | $\gamma_{n+1}$ |
#
# For the merged side the same counts appear in another order. Each side is therefore within one and the same
# distance of the exact value, and the two are within twice that of each other:
#
# $$|y_\text{unmerged} - y_\text{merged}| \le
# 2\,\big(\gamma_{n+1}\,|W||x| + \gamma_{n+r+2}\,|s|\,|B||A||x|\big)$$
#
# (and a term for underflow, too small to matter here). Such a bound can be asserted: it never fails by bad
# luck. A tolerance like `atol=1e-5` can, or it hides a mistake.

# %% tags=["rounding"]
rows = merge_equivalence.run()
rank_figures.merge_equivalence(rows)

# %%
print("   dtype  inputs    bound   the difference is")
for row in rows:
    where = "below a tenth of it" if row["ratio"] < 0.1 else "within it" if row["ratio"] <= 1 else "ABOVE IT"
    print(f"{row['dtype']:>8}  {row['inputs']:6}  {row['bound']:.1e}   {where}")

# %% tags=["claims", "rounding"]
by_dtype = [[row["ratio"] for row in rows if row["dtype"] == dtype] for dtype in ("float32", "float64")]
holds("The differences lie far below the bound", max(map(max, by_dtype)) < 0.1)
falls = [wide < narrow for r in by_dtype for narrow, wide in zip(r, r[2:], strict=False)]  # 4 times as wide
holds("and the more so the wider the map", all(falls))
for words, dtype, power in (
    ("$2^{-24}$ for float32", "float32", -24),
    ("$2^{-53}$ for float64", "float64", -53),
):
    holds(words, np.finfo(dtype).eps / 2 == 2.0**power)

# %% [markdown]
# The differences lie far below the bound, and the more so the wider the map: the bound adds up as if all
# roundings pointed the same way, while real ones partly cancel.
#
# ## Where nothing rounds
#
# If all numbers are small integers, $s$ too, every intermediate result is an integer below $2^{24}$, and
# float32 holds it exactly. Then the two sides must agree with `==`. A wrong formula has nowhere
# to hide.

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
# ## Merging a model
#
# Here both factors are drawn at random, so that $\Delta W$ is not zero. `merge` computes $W + \Delta W$ for
# every adapted layer and puts it **beside** the base, as a second array. `unmerge` drops that array. The base
# is never written, so it cannot change. The digest is taken over every byte of the weights that have an
# adapter beside them.
#
# We ask for the logits of two inputs: one short text of 32 characters, and four texts of 128 at once.

# %%
model = ml.load()
ids = np.random.default_rng(1).integers(32, 127, (4, 128))
few = ids[:1, :32]

ml.inject(model, ml.LoraConfig(r=8, alpha=16, init="both"), rng=np.random.default_rng(2))


def base_digest():
    return ml.digest({path: layer.base for path, layer in adapted(model).items()})[:16]


def logits():
    return [model(inputs)[0] for inputs in (few, ids)]


def apart_by(a, b):
    d = float(np.abs(a - b).max() / np.abs(a).max())
    if d == 0:
        return "equal to the bit"
    return "below 1e-4" if d < 1e-4 else "above 1e-1" if d > 0.1 else "between the two"


def compare(what, one, other):
    print(f"  {what:28}" + "".join(f"{apart_by(a, b):>18}" for a, b in zip(one, other, strict=True)))


print("base, at first:       ", base_digest())
unmerged = logits()
with ml.disabled(model):
    plain = logits()
ml.merge(model)
merged = logits()
print("base, while merged:   ", base_digest())
ml.unmerge(model)
print("base, after unmerging:", base_digest())
cycled = logits()
print()
print("largest relative difference of the logits, for 32 rows and for 512")
compare("base and adapted", plain, unmerged)
compare("unmerged and merged", unmerged, merged)
compare("before and after the cycle", unmerged, cycled)
compare("base, adapter disabled", [ml.load()(inputs)[0] for inputs in (few, ids)], plain)

# %% tags=["claims"]
pairs = [apart_by(a, b) for a, b in zip(unmerged, merged, strict=True)]
holds("Merged and unmerged differ by rounding", pairs == ["below 1e-4"] * 2)
holds(
    "so that $\\Delta W$ is not zero",
    all(apart_by(a, b) == "above 1e-1" for a, b in zip(plain, unmerged, strict=True)),
)
holds(
    "one short text of 32 characters, and four texts of 128 at once", few.size == 32 and ids.shape == (4, 128)
)
from minilora.fast import folded

sizes = {layer.base.weight.data.shape: layer.adapters[layer.active] for layer in adapted(model).values()}
least = {shape: next(M for M in range(1, 1000) if folded.pays(pair, M)) for shape, pair in sizes.items()}
holds("from about 100 rows on, or 140, by the shape of the map", {*least.values()} == {97, 140})
many = [(ids, ids)]
unmerged_loss = ml.evaluate(model, many)
ml.merge(model)
holds(
    "there merged and unmerged are one computation, equal to the bit",
    ml.evaluate(model, many) == unmerged_loss,
)
ml.unmerge(model)

# %% [markdown]
# Merged and unmerged differ by rounding, as the bound allows. `ml.train` and `ml.evaluate` save work: where
# rows are many (here from about 100 rows on, or 140, by the shape of the map) two thin products beside $W$
# cost more than forming $W + \Delta W$, so they form it for the batch; there merged and unmerged are one
# computation, equal to the bit.
#
# Keeping both arrays takes memory, one more copy of each adapted weight while merged. `ml.fuse` is for those
# who will not go back: it makes the model a plain one and drops base and adapter.
#
# ## Adding and subtracting
#
# The other way is to write into the weight: `W += Q` to merge and `W -= Q` to unmerge, with $Q = \Delta W$.
# It needs no second array, and it does not give $W$ back: $W + Q$ is rounded, and the subtraction cannot know
# what was lost.

# %%
rng = np.random.default_rng(3)
W0 = (rng.standard_normal((256, 256)) / 16).astype(np.float32)


def delta():
    """s B A as a sum of outer products: no library of matrix products has a say in the last digit."""
    B, A = rng.standard_normal((2, 256, 8)).astype(np.float32)
    return sum(np.outer(B[:, k], A[:, k]) for k in range(8)) / np.float32(64)


P, Q = delta(), delta()
orders = {
    "one adapter": [(P, 1), (P, -1)],
    "two, in turn": [(P, 1), (P, -1), (Q, 1), (Q, -1)],
    "two, last in first out": [(P, 1), (Q, 1), (Q, -1), (P, -1)],
    "two, first in first out": [(P, 1), (Q, 1), (P, -1), (Q, -1)],
}
cycles = (1, 2, 10, 100)
found = {}
for name, moves in orders.items():
    W = W0.copy()
    for cycle in range(1, 101):
        for change, sign in moves:
            if sign > 0:
                W += change
            else:
                W -= change
        found[name, cycle] = int((W != W0).sum()), float(np.abs(W - W0).max())


@plotting.styled
def draw():
    figure, ((ax,),) = plotting.axes()
    looks = zip(
        (plotting.GREY, plotting.BLUE, plotting.GREEN, plotting.ORANGE), ("-", "--", "-.", ":"), strict=True
    )
    for name, (colour, line) in zip(orders, looks, strict=True):
        drift = [found[name, cycle][1] for cycle in range(1, 101)]
        ax.loglog(range(1, 101), drift, color=colour, linestyle=line, linewidth=2, label=name)
    ax.set(xlabel="cycles of merging and unmerging in place", ylabel="largest change of an entry of W")
    ax.legend(fontsize=9)
    return plotting.Picture(
        figure,
        "Largest change of a weight after cycles of adding and subtracting. With one adapter it stays where "
        "the first cycle put it; with two it grows on and on, in whatever order they come and go.",
    )


draw()

# %%
print(f"entries of W that changed, of {W0.size:,}, and the largest change")
print(f"{'cycles':24}" + "".join(f"{c:>18}" for c in cycles))
for name in orders:
    print(f"{name:24}" + "".join(f"{n:>9,} {d:8.1e}" for n, d in (found[name, c] for c in cycles)))

# %% tags=["claims"]
names = list(orders)
drift = {name: [found[name, cycle] for cycle in range(1, 101)] for name in names}
holds("With one adapter it stays where the first cycle put it", len(set(drift[names[0]])) == 1)
holds("the damage is done in the first cycle and never grows", len(set(drift[names[0]])) == 1)
holds(
    "with two it grows on and on, in whatever order they come and go",
    all(drift[name][0][1] < drift[name][9][1] / 4 < drift[name][99][1] / 16 for name in names[1:]),
)
holds("The changes are small", max(d for _, d in found.values()) < 1e-4 * np.abs(W0).max())

# %% [markdown]
# With one adapter the damage is done in the first cycle and never grows: $(((x \oplus y) \ominus y) \oplus y)
# \ominus y$ equals $(x \oplus y) \ominus y$ when rounding goes to the nearest even number (Reiser and Knuth
# 1975). With two adapters there is no such theorem. The changes are small, but the weight is no longer the
# one that was loaded, and its digest says so. A reference to the old array is cheaper than the worry.
#
# ## Counting the work
#
# Time depends on the machine; the number of products does not. This array counts the products of matrices
# that it takes part in, and passes the property on to its results. We put it in the place of every parameter,
# so that no product with a weight is missed, and check the count with what the model is made of.


# %%
class Counting(np.ndarray):
    products = multiplications = 0

    def __array_ufunc__(self, ufunc, method, *inputs, out=None, **options):
        def plain(values):
            return tuple(v.view(np.ndarray) if isinstance(v, Counting) else v for v in values)

        if out is not None:
            options["out"] = plain(out)
        result = getattr(ufunc, method)(*plain(inputs), **options)
        if ufunc is np.matmul:
            Counting.products += 1
            Counting.multiplications += result.size * inputs[0].shape[-1]
        return result.view(Counting) if isinstance(result, np.ndarray) else result


def count(ids=few):
    """(products, multiplications) of one forward pass."""
    params = list(named_params(model).values())
    before, Counting.products, Counting.multiplications = [p.data for p in params], 0, 0
    for p in params:
        p.data = p.data.view(Counting)
    model(ids)
    for p, data in zip(params, before, strict=True):
        p.data = data
    return Counting.products, Counting.multiplications


with ml.disabled(model):
    work = {"base": count()}
work["unmerged"] = count()
ml.merge(model)
work["merged"] = count()
ml.unmerge(model)
print("32 characters    products   multiplications")
for name, (products, multiplications) in work.items():
    print(f"{name:13}  {products:10}  {multiplications:16,}  {multiplications / work['base'][1]:6.1%}")

blocks, maps = len(model.model.layers), len(adapted(model))
print()
print(f"by hand: {maps} maps, two products of attention in each of {blocks} blocks, and the head:", end=" ")
print(maps + 2 * blocks + 1)
print(f"two more for each of {maps} adapters:", maps + 2 * blocks + 1 + 2 * maps)

# %% tags=["claims"]
products = {name: n for name, (n, _) in work.items()}
says("The base makes {} products", products["base"])
says("The model has {} adapted maps.", maps)
says("but {} more calls, {} in all", products["unmerged"] - products["base"], products["unmerged"])
holds("each takes two more products", products["unmerged"] - products["base"] == 2 * maps)
holds("thin ones: few multiplications", work["unmerged"][1] < 1.2 * work["base"][1])
holds("Merged, the work is that of the base, call for call.", work["merged"] == work["base"])
holds("Merged, the adapted model does the products of the base and no other.", work["merged"] == work["base"])
holds("check the count with what the model is made of", products["base"] == maps + 2 * blocks + 1)

# %% [markdown]
# The base makes 28 products. The model has 21 adapted maps. Unmerged, each takes two more products, thin
# ones: few multiplications, but 42 more calls, 70 in all, and on a small batch calls are what one waits for.
# Merged, the work is that of the base, call for call.
#
# The function below measures on your machine. It takes the best of several interleaved tries, because
# anything else that runs there can only make a try slower. Call `seconds()` for the numbers; here we ask for
# the verdict only.


# %%
def seconds(ids=few, tries=40):
    """The best time of a forward pass for base, unmerged and merged."""

    def one():
        start = time.perf_counter()
        model(ids)
        return time.perf_counter() - start

    best = dict.fromkeys(("base", "unmerged", "merged"), np.inf)
    for _ in range(tries):
        with ml.disabled(model):
            best["base"] = min(best["base"], one())
        best["unmerged"] = min(best["unmerged"], one())
        ml.merge(model)
        best["merged"] = min(best["merged"], one())
        ml.unmerge(model)
    return best


best = seconds()
print("merged takes less than 1.5 times as long as the base:", best["merged"] < 1.5 * best["base"])

# %% [markdown]
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
def gives_back(W):
    """Q (O, I) such that (W + Q) - Q is W in every entry; and why.

    No entry of Q is smaller in absolute value than that of W. W is float32, drawn at random, and most Q do
    not do that.

    a: subtracting takes back whatever adding did.
    b: every W + Q is itself a float32 number, so nothing was rounded.
    c: Q is so large that what W loses does not matter.
    """
    return None, None  # your Q, and the letter that the numbers support


# %% tags=["check"]
def check():
    """What your Q leaves of a W that you have not seen, beside a random and a very large Q."""
    rng = np.random.default_rng(5)
    W, other = rng.standard_normal((2, 24, 32)).astype(np.float32)

    def changed(Q):
        return int(((W + Q) - Q != W).sum())

    Q, letter = given(gives_back(W.copy()))
    Q = np.asarray(Q, np.float32)
    assert Q.shape == W.shape, f"Q has shape {Q.shape}; expected that of W, {W.shape}"
    assert (np.abs(Q) >= np.abs(W)).all(), "an entry of Q is smaller in absolute value than that of W"
    assert not changed(Q), f"{changed(Q)} of {W.size} entries changed: which sums need no rounding at all?"
    hints = {
        "a": f"then it would work for any Q; a random one of that size changes {changed(2 * other)} entries",
        "c": f"with a Q of a billion {changed(np.full_like(W, 1e9))} of {W.size} entries change",
    }
    chosen(letter, "b", hints)
    return "each sum is exact, so the subtraction is, too; keep W instead, and you need no such luck"


verdict(check)

# %% [markdown]
# ## To take along
#
# - Merged and unmerged agree within $2(\gamma_{n+1}|W||x| + \gamma_{n+r+2}|s||B||A||x|)$: assert that, not a
#   guess.
# - Keep the base and drop the merged copy, and unmerging is exact. Adding and subtracting is not.
# - Merged, the adapted model does the products of the base and no other.
#
# Next: [Which rank?](4_which_rank.ipynb)

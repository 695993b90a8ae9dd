# %% [markdown]
# # Merging costs nothing
#
# **What you will see.** That a merged adapter gives the same outputs within a bound that can be derived; that
# unmerging gives the base back to the bit, and how a common way of doing it does not; and what merging saves,
# counted in products of matrices.
#
# **What you need.** The first lesson, [LoRA from one equation](1_lora_from_one_equation.ipynb).
#
# **Contents.** The same function twice · How far apart can they be? · Where nothing rounds · Merging a model
# · Adding and subtracting · Counting the work · Exercise · To take along

# %%
import time

import numpy as np

import minilora as ml
from minilora import plots
from minilora.experiments import merge_equivalence
from minilora.layers import Linear, Param
from minilora.lora import Adapted, LowRank, adapted

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
plots.merge_equivalence(rows)

# %%
print("   dtype  inputs    bound   the difference is")
for row in rows:
    where = "below a tenth of it" if row["ratio"] < 0.1 else "within it" if row["ratio"] <= 1 else "ABOVE IT"
    print(f"{row['dtype']:>8}  {row['inputs']:6}  {row['bound']:.1e}   {where}")

# %% [markdown]
# The differences lie far below the bound, and the more so the wider the map: the bound adds up as if all
# roundings pointed the same way, while real ones partly cancel.
#
# ## Where nothing rounds
#
# If all numbers are small integers and $s$ is a power of two, every intermediate result is an integer below
# $2^{24}$, and float32 holds it exactly. Then the two sides must agree with `==`. A wrong formula has nowhere
# to hide.

# %%
rng = np.random.default_rng(0)


def whole(*shape):
    return rng.integers(-4, 5, shape).astype(np.float32)


W, A, B, X = whole(24, 32), whole(5, 32), whole(24, 5), whole(9, 32)
layer = Adapted(Linear(Param(W, False)), {"a": LowRank(Param(A), Param(B), 2.0)}, "a")
apart, _ = layer(X, None)
ml.merge({"layer": layer})
together, _ = layer(X, None)
print("largest value:", int(np.abs(apart).max()), "of", 2**24)
print("equal with ==:", bool((apart == together).all()))

# %% [markdown]
# ## Merging a model
#
# Here both factors are drawn at random, so that $\Delta W$ is not zero. `merge` computes $W + \Delta W$ for
# every adapted layer and puts it **beside** the base, as a second array. `unmerge` drops that array. The base
# is never written, so it cannot change. The digest is taken over every byte of the base's weights.

# %%
model = ml.load()
ids = np.random.default_rng(1).integers(32, 127, (4, 128))
plain, _ = model(ids)

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


print("base, at first:       ", base_digest())
unmerged = logits()
ml.merge(model)
merged = logits()
print("base, while merged:   ", base_digest())
ml.unmerge(model)
print("base, after unmerging:", base_digest())
print()
print("largest relative difference of the logits")
print("  base and adapted:           ", apart_by(plain, unmerged))
print("  unmerged and merged:        ", apart_by(unmerged, merged))
print("  before and after the cycle: ", apart_by(unmerged, logits()))
with ml.disabled(model):
    print("  base and adapter disabled:  ", apart_by(plain, logits()))

# %% [markdown]
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


@plots.styled
def draw():
    figure, ((ax,),) = plots.axes()
    looks = zip((plots.GREY, plots.BLUE, plots.GREEN, plots.ORANGE), ("-", "--", "-.", ":"), strict=True)
    for name, (colour, line) in zip(orders, looks, strict=True):
        drift = [found[name, cycle][1] for cycle in range(1, 101)]
        ax.loglog(range(1, 101), drift, color=colour, linestyle=line, linewidth=2, label=name)
    ax.set(xlabel="cycles of merging and unmerging in place", ylabel="largest change of an entry of W")
    ax.legend(fontsize=9)
    return plots.Picture(
        figure,
        "Largest change of a weight after cycles of adding and subtracting. With one adapter it stays where "
        "the first cycle put it; with two it grows from cycle to cycle, in whatever order they come and go.",
    )


draw()

# %%
print(f"entries of W that changed, of {W0.size:,}, and the largest change")
print(f"{'cycles':24}" + "".join(f"{c:>18}" for c in cycles))
for name in orders:
    print(f"{name:24}" + "".join(f"{n:>9,} {d:8.1e}" for n, d in (found[name, c] for c in cycles)))

# %% [markdown]
# With one adapter the damage is done in the first cycle and never grows: $(((x \oplus y) \ominus y) \oplus y)
# \ominus y$ equals $(x \oplus y) \ominus y$ when rounding goes to the nearest even number (Reiser and Knuth
# 1975). With two adapters there is no such theorem. The changes are small, but the weight is no longer the
# one that was loaded, and its digest says so. A reference to the old array is cheaper than the worry.
#
# ## Counting the work
#
# Time depends on the machine; the number of products does not. This array counts the products of matrices
# that it takes part in, and passes the property on to its results. Put in as the embedding table, it reaches
# the whole model.


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


def count():
    """(products, multiplications) of one forward pass of 32 characters."""
    table = model.model.embed_tokens.weight
    before, Counting.products, Counting.multiplications = table.data, 0, 0
    table.data = before.view(Counting)
    model(ids[:1, :32])
    table.data = before
    return Counting.products, Counting.multiplications


with ml.disabled(model):
    work = {"base": count()}
work["unmerged"] = count()
ml.merge(model)
work["merged"] = count()
ml.unmerge(model)
print("            products   multiplications")
for name, (products, multiplications) in work.items():
    print(f"{name:10}  {products:8}  {multiplications:16,}  {multiplications / work['base'][1]:6.1%}")

# %% [markdown]
# The model has 21 adapted maps. Unmerged, each takes two more products, thin ones: few multiplications, but
# 42 more calls, and on a small batch calls are what one waits for. Merged, the work is that of the base, call
# for call. (With many more rows than these 32 the package forms $W + \Delta W$ for the call, since that is
# cheaper then than two products beside.)
#
# The function below measures on your machine. It takes the best of several interleaved tries, because
# anything else that runs there can only make a try slower. Call `seconds()` for the numbers; here we ask for
# the verdict only.


# %%
def seconds(ids=ids[:1, :32], tries=40):
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
#
# ## Exercise
#
# Two adapters of ranks $r_1$ and $r_2$ with scales $s_1$ and $s_2$ are to act together: $\Delta W = s_1 B_1
# A_1 + s_2 B_2 A_2$. Write them as one adapter of rank $r_1 + r_2$ with scale 1, exactly, without multiplying
# any $B$ with any $A$.


# %% tags=["exercise"]
def together_as_one(A1, B1, s1, A2, B2, s2):
    """A (r1 + r2, I) and B (O, r1 + r2) with B A = s1 B1 A1 + s2 B2 A2."""
    return None  # your lines


together_as_one(A, B, 2.0, A, B, 0.5)


# %% tags=["solution"]
def solution(A1, B1, s1, A2, B2, s2):
    # A product of blocks is the sum of the products of the blocks.
    return np.concatenate([A1, A2]), np.concatenate([s1 * B1, s2 * B2], axis=1)


together_as_one = solution

# %% tags=["check"]
rng = np.random.default_rng(4)
A1, B1, A2, B2 = whole(3, 12), whole(10, 3), whole(5, 12), whole(10, 5)
made = together_as_one(A1, B1, 2.0, A2, B2, 0.5)
assert made is not None, "together_as_one returns None: return the pair A, B"
A, B = made
assert A.shape == (8, 12), f"A has shape {A.shape}; expected (r1 + r2, I) = (8, 12): stack the rows"
assert B.shape == (10, 8), f"B has shape {B.shape}; expected (O, r1 + r2) = (10, 8): stack the columns"
wanted, unscaled = 2.0 * B1 @ A1 + 0.5 * B2 @ A2, B1 @ A1 + B2 @ A2
assert not np.array_equal(B @ A, unscaled), "almost: the scales are missing, and the new one has scale 1"
assert np.array_equal(B @ A, wanted), "B A is another matrix: put each scale on one factor, not on both"
print("right: with integers, equal by ==")

# %% [markdown]
# ## To take along
#
# - Merged and unmerged agree within $2(\gamma_{n+1}|W||x| + \gamma_{n+r+2}|s||B||A||x|)$: assert that, not a
#   guess.
# - Keep the base and drop the merged copy, and unmerging is exact. Adding and subtracting is not.
# - Merged, the adapted model does the products of the base and no other.
#
# Next: [Which rank?](3_which_rank.ipynb)

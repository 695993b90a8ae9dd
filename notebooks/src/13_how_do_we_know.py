# %% [markdown]
# # How do we know?
#
# ![](attachment:rounding.png)
#
# **What you will see.** The numerics behind the lessons: two derivatives that know nothing of our formulas; a
# bound on what rounding does, derived and not guessed; and mistakes, planted on purpose, which a check must
# refuse.
#
# **What you need.** [LoRA from one equation](2_lora_from_one_equation.ipynb), [Merging costs
# nothing](3_merging_costs_nothing.ipynb) and, for its last section, [Which rank?](4_which_rank.ipynb).
#
# **Contents.** A gradient without its formula · What rounding does · From roundings to a tolerance · A check
# must be able to fail · So must a claim · Exercises · To take along

# %% tags=["first", "unkept"]

# %% tags=["imports"]
from pathlib import Path

import numpy as np

from minilora.analysis import figures
from minilora.claims import ranks
from minilora.experiments import merge_equivalence, rank_figures, rank_sweep
from minilora.layers import Linear, Param
from minilora.lora import LowRank

# %% [markdown]
# ## A gradient without its formula
#
# $dA$ and $dB$ were derived on paper. Two ways to a derivative do not know what stands there. We take one
# entry $a$ of $A$ or $B$ after the other, as the only variable of the loss $L$:
#
# - **Central differences**: $\big(L(a + h) - L(a - h)\big) / 2h$. The formula itself is wrong by a
#   multiple of $h^2$, and the subtraction loses digits as $h$ shrinks. There is a best $h$.
# - **Complex step**: $\operatorname{Im} L(a + ih) / h$. Nothing is subtracted, so $h$ may be as small as
#   $10^{-20}$, and all digits are right. It needs a loss made of smooth functions that accept complex
#   numbers.


# %% tags=["rounding"]
rng = np.random.default_rng(0)
X, target, W = (rng.standard_normal(shape) for shape in ((7, 6), (7, 4), (4, 6)))
A, B, s = rng.standard_normal((3, 6)), rng.standard_normal((4, 3)), 2.0


def loss(A, B):
    return np.log(np.cosh(X @ W.T + s * (X @ A.T) @ B.T - target)).sum()


pair = LowRank(Param(A), Param(B), s)
Y, back = pair(Linear(Param(W, trainable=False)), X)
back(np.tanh(Y - target))  # the gradients of the package


def digits(derivative):
    """How many digits of every entry of dA and dB are right, relative to the largest entry."""
    worst = 1e-16
    for f, gradient in ((lambda v: loss(A + v, B), pair.A.grad), (lambda v: loss(A, B + v), pair.B.grad)):
        for at in np.ndindex(gradient.shape):
            unit = np.zeros(gradient.shape)
            unit[at] = 1
            error = abs(derivative(f, unit) - gradient[at])
            worst = max(worst, error / np.abs(gradient).max())
    return -np.log10(worst)


def central(h):
    return lambda f, unit: (f(h * unit) - f(-h * unit)) / (2 * h)


def complex_step(h):
    return lambda f, unit: f(1j * h * unit).imag / h


powers = range(1, 15)
right = {
    "central differences": [digits(central(10.0**-k)) for k in powers],
    "complex step": [digits(complex_step(10.0**-k)) for k in powers],
}
figures.curves(
    {name: (powers, found) for name, found in right.items()},
    "k, where the step h is 10⁻ᵏ", "right digits",
    "Right digits of two numerical derivatives against the step h. Central differences have most near "
    "h = 1e-6 and lose them again below; the complex step reaches all digits and keeps them.",
)  # fmt: skip

# %% tags=["rounding"]
print("right digits, about:")
print("     h   central   complex")
for k, *found in list(zip(powers, *right.values(), strict=True))[:11:2]:
    print(f"{10.0**-k:6.0e}   {found[0]:7.0f}   {found[1]:7.0f}")

# %% tags=["claims", "rounding"]
few, all_ = right["central differences"], right["complex step"]
holds("near h = 1e-6", int(np.argmax(few)) + 1 in (5, 6))
holds("and lose them again below", few[-1] < max(few) - 4)
holds("the complex step reaches all digits and keeps them", min(all_[8:]) > 14)
holds("$10^{-20}$, and all digits are right", digits(complex_step(1e-20)) > 14)
holds("right to about nine digits at the best step", 8.5 < max(few) < 9.5)

# %% [markdown]
# Central differences are right to about nine digits at the best step: enough to see a wrong formula. The
# complex step leaves no doubt.
#
# ## What rounding does
#
# A format holds finitely many numbers. The result of each operation goes to the nearest one, which moves it
# by at most $u$ of itself: $u = 2^{-24}$ for float32, $2^{-53}$ for float64, $2^{-8}$ for bfloat16. In the
# picture above, $\Delta W$ leads from $W$ to the small circle, the exact sum. The large circle is what
# bfloat16 stores; it lies within the dashed bound.
#
# A sum of $k$ products, added in any order, is then off by at most $\gamma_k = k u / (1 - k u)$ times the sum
# of the absolute values (Higham, *Accuracy and Stability of Numerical Algorithms*, section 3.1).
#
# ## From roundings to a tolerance
#
# Merged and unmerged round at different places. Follow the roundings of either side, with $n$ inputs and rank
# $r$:
#
# | step | factor |
# |---|---|
# | product with $A$, then with $B$ | $\gamma_{n+r}$ |
# | times $s$, and added to $W x$ | two more roundings |
# | product $W x$, and the addition | $\gamma_{n+1}$ |
#
# For the merged side the same counts appear in another order. Each side is within one and the same distance
# of the exact value, so the two are within twice that of each other:
#
# $$|y_\text{unmerged} - y_\text{merged}| \le
# 2\,\big(\gamma_{n+1}\,|W||x| + \gamma_{n+r+2}\,|s|\,|B||A||x|\big)$$
#
# (and a term for underflow, too small to matter here).

# %% tags=["rounding"]
rows = merge_equivalence.run()
rank_figures.merge_equivalence(rows)

# %%
print("   dtype  inputs    bound   the difference is")
for row in rows[::2]:
    where = "below a tenth of it" if row["ratio"] < 0.1 else "within it" if row["ratio"] <= 1 else "ABOVE IT"
    print(f"{row['dtype']:>8}  {row['inputs']:6}  {row['bound']:.1e}   {where}")

# %% tags=["claims", "rounding"]
by_dtype = [[row["ratio"] for row in rows if row["dtype"] == dtype] for dtype in ("float32", "float64")]
holds("The differences lie far below the bound", max(map(max, by_dtype)) < 0.1)
falls = [wide < narrow for r in by_dtype for narrow, wide in zip(r, r[2:], strict=False)]  # 4 times as wide
holds("and the more so the wider the map", all(falls))
holds("$u = 2^{-24}$ for float32", np.finfo("float32").eps / 2 == 2.0**-24)
holds("$2^{-53}$ for float64", np.finfo("float64").eps / 2 == 2.0**-53)
from minilora.formats.safetensors import stored

near = stored(np.float32([1 + 2.0**-7, 1 + 2.0**-8]), "bfloat16")
holds("$2^{-8}$ for bfloat16", near.tolist() == [1 + 2.0**-7, 1])
holds("At 2**24 the next number is 2 away", np.nextafter(np.float32(2**24), np.float32(np.inf)) == 2**24 + 2)

# %% [markdown]
# The differences lie far below the bound, and the more so the wider the map: the bound adds up as if all
# roundings pointed the same way, while real ones partly cancel.
#
# ## A check must be able to fail
#
# A bound that is derived never fails by bad luck. A tolerance that is guessed does, or it hides a mistake. We
# plant mistakes into a merged weight and ask what sees them: `atol=1e-5`, the bound, or `==` with small whole
# numbers in the place of random ones, where nothing rounds. Inputs are small, except in the second line.

# %%
mistakes = {
    "none": lambda W, A, B, s: W + s * (B @ A),
    "none, and inputs of size 1,000": lambda W, A, B, s: W + s * (B @ A),
    "the scale is forgotten": lambda W, A, B, s: W + B @ A,
    "the scale is off by 0.1 %": lambda W, A, B, s: W + np.float32(1.001 * s) * (B @ A),
    "the last direction is missing": lambda W, A, B, s: W + s * (B[:, :-1] @ A[:-1]),
    "B A went through float16": lambda W, A, B, s: W + s * np.float32(np.float16(B @ A)),
}


def small_integers(shape):
    return rng.integers(-4, 5, shape)


def outputs(merge, draw, size):
    """y unmerged, y merged, and the bound on their difference."""
    W, A, B, X = (draw(shape).astype(np.float32) for shape in ((24, 32), (5, 32), (24, 5), (9, 32)))
    X, s = np.float32(size) * X, np.float32(2)
    y, z = X @ W.T + s * (X @ A.T) @ B.T, X @ merge(W, A, B, s).T
    return y, z, merge_equivalence.merge_bound(W, A, B, s, X, np.float32)


refused = {}
for name, merge in mistakes.items():
    y, z, bound = outputs(merge, rng.standard_normal, 1000 if "1,000" in name else 1e-4)
    a, b, _ = outputs(merge, small_integers, 1)
    refused[name] = (abs(y - z) > 1e-5).any(), (abs(y - z) > bound).any(), (a != b).any()

print(f"{'mistake':30} {'atol=1e-5':>10}{'the bound':>11}{'==, whole numbers':>19}")
for name, checks in refused.items():
    a, b, c = ("refuses" if no else "accepts" for no in checks)
    print(f"{name:30} {a:>10}{b:>11}{c:>19}")

# %% tags=["claims"]
guess, bound, whole = (list(map(bool, column)) for column in zip(*refused.values(), strict=True))
holds("refuses what is right as soon as inputs are large", guess[:2] == [False, True])
holds("and accepts two mistakes where they are small", guess[2:].count(False) == 2)
holds("The bound sees every mistake", bound == [False] * 2 + [True] * 4)
holds("but not those of rounding", whole == [False] * 2 + [True] * 3 + [False])

# %% [markdown]
# The guess refuses what is right as soon as inputs are large, and accepts two mistakes where they are small.
# The bound sees every mistake. Whole numbers need no bound and see wrong formulas, but not those of rounding:
# float16 holds them, too.
#
# ## So must a claim
#
# What the lessons say of LoRA rests on measured runs. Each sentence has a rule that decides it by their rows,
# and `minilora claims` prints them all. Take the sentence that LoRA always matches full fine-tuning. It
# *holds when, from a rank on, the range of test losses over seeds reaches that of full fine-tuning*. We plant
# rows in which LoRA's test losses are a little lower or higher than they were. (The numbers below are medians
# over seeds; *Which rank?* has means.)

# %%
places = [Path("rows.jsonl"), Path("../figures/rows.jsonl")]
rows = rank_sweep.read_rows(next((place for place in places if place.exists()), places[0]))


def planted(by):
    """The rows with LoRA's test losses changed by so many nats."""
    for row in rows:
        lora = row["config"].get("method") == "lora" and "test" in row
        yield row | {"test": row["test"] + by} if lora else row


for by in (0, -0.1, 0.1):
    said, number = ranks.as_good_as_full(list(planted(by)))
    print(f"{by:+.1f} nats: {said} ({number})")

# %% tags=["claims"]
verdicts = [ranks.as_good_as_full(list(planted(by)))[0] for by in (0, -0.1, 0.1)]
says("As measured, it {}.", verdicts[0])
rule = "when, from a rank on, the range of test losses over seeds reaches that of full fine-tuning"
holds(rule, rule in " ".join(ranks.as_good_as_full.__doc__.split()))
holds(
    "With losses 0.1 nats lower it holds at every rank, with losses 0.1 higher it fails",
    verdicts[1:] == ["holds", "does not hold here"],
)

# %% [markdown]
# As measured, it holds when r is at least 64. With losses 0.1 nats lower it holds at every rank, with losses
# 0.1 higher it fails. So the verdict says something about the runs.

# %% [markdown]
# ## Exercises
#
# Write your answer in place of `None`, and run that cell and the one below it. A wrong answer gets a hint.
# [The solutions, and what is often answered instead](solutions/13_how_do_we_know.md).


# %% tags=["exercise"]
# Write the line.
def error_bound(x, y):
    """The bound on the error of x @ y, for x (n,) and y (n,) in float32.

    It is γ_n = n u / (1 - n u), times a sum.
    """
    return None  # your line in place of None


# %% tags=["check"]
def check():
    """Your bound on three products of vectors."""
    for n in (3, 100, 10_000):
        x, y = np.random.default_rng(n).standard_normal((2, n)).astype(np.float32)
        wide_x, wide_y = x.astype(float), y.astype(float)
        u, size = 2.0**-24, float(np.abs(wide_x) @ np.abs(wide_y))
        right = n * u / (1 - n * u) * size
        mine = float(given(error_bound(x, y)))
        assert not np.isclose(mine, right * abs(wide_x @ wide_y) / size, 1e-3), (
            "products cancel in the sum, and their roundings do not: add absolute values"
        )
        assert not np.isclose(mine, 2 * right, 1e-3), (
            "u is half of np.finfo(np.float32).eps: rounding goes to the nearest"
        )
        assert mine > 0.999 * right, f"too small: with n = {n:,} this is {mine / right:.2g} of the bound"
        assert mine < 1.001 * right, f"true, but with n = {n:,} it is {mine / right:.2g} times the bound"
    error = abs(float(x @ y) - float(wide_x @ wide_y))
    return f"with n = {n:,} the bound is {right:.1e}, and this product is off by {error:.0e}"


verdict(check)


# %% tags=["exercise"]
# Predict, then run.
def counted():
    """x is 0 in float32. We add 1 to it, 20 million times. What is x then?"""
    return None  # your guess, a number, in place of None


# %% tags=["check"]
def check():
    """Your guess beside the last steps of that sum."""
    x = np.float32(2**24 - 20)  # up to here every step is exact
    for _ in range(100):
        x += np.float32(1)
    hints = {
        20_000_000: "in float64, yes; which is the next number of float32 after 2**24?",
        2**24 + 1: "float32 has no such number: it is odd and above 2**24",
        2**24 - 1: "this is held exactly, and so is the next one",
    }
    predicted(counted(), float(x), hints, "no: up to which one does float32 hold every whole number?")
    return f"{x:,.0f}: there the next number is 2 away, and adding 1 is rounded back, to the even one"


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
# - A gradient is compared with a derivative that does not know its formula; the complex step gives all
#   digits.
# - A tolerance comes from counting roundings: assert the bound, not a guess.
# - A check is worth something if a planted mistake makes it fail. So is a sentence, if other rows would
#   refute it.

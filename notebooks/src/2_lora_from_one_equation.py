# %% [markdown]
# # LoRA from one equation
#
# ![](attachment:lora.png)
#
# **What you will see.** One equation, its two gradients derived on paper and written in seven lines of NumPy;
# why the first step moves only one of the two matrices; what an adapter costs in parameters and in memory;
# and 30 steps of training on a real, if tiny, Llama.
#
# **What you need.** Matrix products and the chain rule.
#
# **Contents.** The equation · The gradients on paper · Are they right? · The first steps · Counting
# parameters · What a layer keeps · A whole model · Exercises · To take along

# %% tags=["first", "unkept"]

# %% tags=["imports"]
import numpy as np

import minilora as ml
from minilora import ops
from minilora.data import corpora
from minilora.layers import Linear, Param
from minilora.lora import LowRank, adapted

rng = np.random.default_rng(0)

# %% [markdown]
# ## The equation
#
# A linear map takes the rows of $X$, one row for each token, to the rows of $Y = X W^\top$. LoRA ([Hu et al.
# 2021](https://arxiv.org/abs/2106.09685), section 4.1) leaves $W$ as it is and learns a change of it, $\Delta
# W = s\,B A$, of rank at most $r$:
#
# $$Y = X W^\top + s\,(X A^\top)\,B^\top$$
#
# | letter | shape | meaning |
# |---|---|---|
# | $X$ | $(M, I)$ | $M$ tokens with $I$ inputs each |
# | $W$ | $(O, I)$ | the frozen weight |
# | $A$ | $(r, I)$ | reads the input; starts at random |
# | $B$ | $(O, r)$ | writes the output; starts at zero |
# | $s$ | a number | the scale, $\alpha / r$ |
#
# In this notebook every axis has another size, so that a forgotten transpose is an error and not a wrong
# number.

# %%
M, I, O, r, s = 7, 6, 4, 3, 2.0  # noqa: E741
X, target = rng.standard_normal((M, I)), rng.standard_normal((M, O))
W, A, B = rng.standard_normal((O, I)), rng.standard_normal((r, I)), rng.standard_normal((O, r))

Y = X @ W.T + s * (X @ A.T) @ B.T
merged = X @ (W + s * B @ A).T
print("Y has shape", Y.shape, "and equals X (W + s B A)ᵀ:", np.allclose(Y, merged))

# %% tags=["claims"]
holds("every axis has another size", len({M, I, O, r}) == 4)

# %% [markdown]
# ## The gradients on paper
#
# Let $L$ be a loss, and write $dY$ for the matrix of its derivatives $\partial L / \partial Y_{mo}$; likewise
# for the other letters. A small change of $Y$ changes the loss by $\langle dY, \delta Y \rangle$, the sum of
# the products of entries. All we need is that a factor can be moved to the other side of that bracket:
# $\langle P, Q R \rangle = \langle P R^\top, Q \rangle = \langle Q^\top P, R \rangle$. With $H = s\,X A^\top$
# the equation reads $Y = X W^\top + H B^\top$.
#
# **Change $B$ only.** $\;\delta L = \langle dY, H\,\delta B^\top \rangle = \langle dY^\top H, \delta B
# \rangle$, and therefore
#
# $$dB = dY^\top H$$
#
# **Change $A$ only.** $\;\delta L = \langle dY, s\,X\,\delta A^\top B^\top \rangle = \langle X^\top
# (s\,dY\,B), \delta A^\top \rangle$, and
#
# $$dA = (s\,dY\,B)^\top X$$
#
# Each has the shape of its matrix, and $W$ needs no gradient. In seven lines of NumPy, of which the last
# returns the output, and a function that turns $dY$ into $dA$ and $dB$:


# %%
def lora(X, W, A, B, s):
    H = s * (X @ A.T)  # (M, r)

    def back(dY):
        dB = dY.T @ H  # (O, r)
        dA = (s * (dY @ B)).T @ X  # (r, I)
        return dA, dB

    return X @ W.T + H @ B.T, back


# %% tags=["claims"]
import inspect

lines = [line for line in inspect.getsource(lora).splitlines() if line.strip()]
for words in ("written in seven lines of NumPy", "In seven lines of NumPy"):
    holds(words, len(lines) == 7)
way_back = " ".join(line.partition("#")[0] for line in lines[3:5])
holds("one product of matrices for $dB$ and two for $dA$", way_back.count("@") == 3)

# %% [markdown]
# ## Are they right?
#
# Take $L = \sum \log\cosh(Y - \text{target})$, whose derivative is short: $dY = \tanh(Y - \text{target})$.
# Move $A$ and $B$ a little in a random direction. The loss must change by what the gradients say; this check
# knows nothing of our derivation. [How do we know?](13_how_do_we_know.ipynb) says how exact it can be.
#
# `LowRank`, the adapter of the package, does the same operations in the same order. So its gradients agree in
# every bit.

# %%
Y, back = lora(X, W, A, B, s)
dY = np.tanh(Y - target)
dA, dB = back(dY)


def loss(A, B):
    return np.log(np.cosh(lora(X, W, A, B, s)[0] - target)).sum()


h, VA, VB = 1e-6, rng.standard_normal(A.shape), rng.standard_normal(B.shape)
change = (loss(A + h * VA, B + h * VB) - loss(A - h * VA, B - h * VB)) / (2 * h)
said = (dA * VA).sum() + (dB * VB).sum()
print(f"the loss changes by    {change:.5f}")
print(f"the gradients say      {said:.5f}")

adapter = LowRank(Param(A.copy()), Param(B.copy()), s)
y, back = adapter(Linear(Param(W, trainable=False)), X)
back(dY)
print("LowRank, output equal: ", np.array_equal(y, Y))
print("dA equal:              ", np.array_equal(adapter.A.grad, dA))
print("dB equal:              ", np.array_equal(adapter.B.grad, dB))

# %% tags=["claims"]
holds("The loss must change by what the gradients say", abs(change - said) < 1e-6)

# %% [markdown]
# ## The first steps
#
# Look at what multiplies what: $dA$ contains $B$, and $dB$ contains $A$ (inside $H$). $B$ starts at zero, so
# $\Delta W = 0$ and the adapted model begins as the base, exactly. Then $dA$ is zero as well: **the first
# step moves only $B$.** From the second step on both move. If both matrices started at zero, both gradients
# would be zero for ever. If $A$ started at zero and $B$ at random, the first step would move only $A$; that
# would do as well.


# %%
def first_steps(A, B, lr=0.005):
    for step in range(3):
        Y, back = lora(X, W, A, B, s)
        dA, dB = back(np.tanh(Y - target))
        print(f"  step {step}:  |dA| = {np.linalg.norm(dA):6.3f}   |dB| = {np.linalg.norm(dB):6.3f}")
        A, B = A - lr * dA, B - lr * dB


print("A random, B = 0 (LoRA)")
first_steps(A, np.zeros_like(B))
print("A = 0, B = 0 (stuck)")
first_steps(np.zeros_like(A), np.zeros_like(B))
print("A = 0, B random")
first_steps(np.zeros_like(A), B)


# %% tags=["claims"]
def moves(A, B, lr=0.005):
    """Which of the two the first and the second step move."""
    for _ in range(2):
        Y, back = lora(X, W, A, B, s)
        dA, dB = back(np.tanh(Y - target))
        yield bool(dA.any()), bool(dB.any())
        A, B = A - lr * dA, B - lr * dB


none = np.zeros_like
usual = list(moves(A, none(B)))
holds("**the first step moves only $B$.**", usual[0] == (False, True))
holds("From the second step on both move.", usual[1] == (True, True))
holds("both gradients would be zero for ever", list(moves(none(A), none(B))) == [(False, False)] * 2)
holds("the first step would move only $A$", list(moves(none(A), B))[:1] == [(True, False)])
for words in (
    "so $\\Delta W = 0$ and the adapted model begins as the base",
    "With $B = 0$ the model starts as the base",
):
    holds(words, (lora(X, W, A, none(B), s)[0] == X @ W.T).all())

# %% [markdown]
# ## Counting parameters
#
# $A$ and $B$ hold $r I + O r = r (I + O)$ numbers, $W$ holds $I O$. The adapter is the smaller one as long as
# $r < I O / (I + O)$; for a square weight that is half its width.

# %%
print("    I      O    r    r (I + O)          I O     share")
for inputs, outputs, rank in ((96, 96, 8), (96, 256, 8), (96, 96, 48), (4096, 4096, 8), (4096, 4096, 64)):
    few, all_ = rank * (inputs + outputs), inputs * outputs
    print(f"{inputs:5}  {outputs:5}  {rank:3}  {few:11,}  {all_:11,}  {few / all_:8.2%}")

# %% tags=["claims"]
holds("a square weight that is half its width", all(n * n / (n + n) == n / 2 for n in (96, 4096)))

# %% [markdown]
# ## What a layer keeps
#
# For its backward a layer must remember something. A frozen map needs nothing: $dX = dY\,W$. A trained one
# keeps its input for $dW = dY^\top X$. An adapted one keeps its input too, for $dA$, and the small $H$
# besides. `ops.saved` lists what is kept.

# %%
x = rng.standard_normal((1024, 96)).astype(np.float32)  # 1,024 tokens


def weight(rows, columns, trainable):
    return Param(rng.standard_normal((rows, columns)).astype(np.float32), trainable)


frozen, full = Linear(weight(96, 96, False)), Linear(weight(96, 96, True))
small = LowRank(weight(8, 96, True), weight(96, 8, True), 2.0)
backs = {"frozen": frozen(x)[1], "trained": full(x)[1], "adapted, r = 8": small(frozen, x)[1]}
for name, back in backs.items():
    kept = [f"{v.shape}, {v.nbytes:,} bytes" for v in ops.saved(back).values()]
    print(f"{name:15} keeps", " and ".join(kept) or "nothing")

# %% tags=["claims"]
bytes_kept = {
    name: sum({id(v.base if v.base is not None else v): v.nbytes for v in ops.saved(back).values()}.values())
    for name, back in backs.items()
}
few, many = bytes_kept["trained"], bytes_kept["adapted, r = 8"]
holds("A frozen map needs nothing", bytes_kept["frozen"] == 0)
for words in (
    "activations take as much memory with LoRA as in full fine-tuning, and a little more for $H$",
    "Activations take as much memory as before, and a little more",
):
    holds(words, few < many < 1.1 * few)

# %% [markdown]
# So activations take as much memory with LoRA as in full fine-tuning, and a little more for $H$. What becomes
# small is what belongs to each trained number: a gradient and the two moments of Adam.
#
# ## A whole model
#
# `ml.load()` is the base that ships with the package: a character-level Llama, trained on Shakespeare in
# modern spelling. `ml.inject` freezes it and puts an adapter beside every linear map of the blocks. Then come
# 30 steps on the First Folio, the same author in the spelling of 1623. The loss is in nats per character, on
# plays that neither the base nor the adapter was trained on. (Where the texts cannot be fetched, the package
# says so and takes the documentation of Python's standard library; then the numbers are others.)

# %% tags=["corpus"]
model = ml.load()
report = ml.inject(model, ml.LoraConfig(r=8, alpha=16), rng=np.random.default_rng(1))
print(str(report).splitlines()[-1])
print("r (I + O), summed by hand:", f"{sum(8 * sum(row.shape) for row in report.rows):,}")
for name, count in (("LoRA", report.parameters), ("full fine-tuning", report.base_parameters)):
    print(f"gradient and moments, {name + ':':18} {3 * 4 * count / 2**20:5.2f} MiB")


def base_digest():
    return ml.digest({path: layer.base for path, layer in adapted(model).items()})


text = corpora.corpus_or_fallback("folio")
test = ml.eval_batches(text.test, batch_size=16, length=128, limit=64 * 128)
base, before = base_digest(), ml.evaluate(model, test)
batches = ml.batches(text.train, np.random.default_rng(2), batch_size=8, length=128)
history = ml.train(model, batches, ml.AdamW(lr=1e-2), steps=30)

print("text:", text.source)
print(f"test loss before:   {before:.2f}")
print(f"test loss after {len(history.loss)}: {ml.evaluate(model, test):.2f}")
print("the base is what it was, to the bit:", base_digest() == base)

# %% tags=["claims", "corpus", "trained"]
says("and {} steps of training on a real, if tiny, Llama", len(history.loss))
says("Then come {} steps on the First Folio", len(history.loss))
holds("in the spelling of 1623", text.source.endswith("plays in the spelling of 1623, 5 held out"))

# %% [markdown]
# ## Exercises
#
# Write your answer in place of `None`, and run that cell and the one below it. A wrong answer gets a hint.
# [The solutions, and what is often answered instead](solutions/2_lora_from_one_equation.md).


# %% tags=["exercise"]
# Write the line.
def input_gradient(dY, W, A, B, s):
    """dX (M, I) from dY (M, O), the gradient that the layer below needs.

    Start from Y = X Wᵀ + s X Aᵀ Bᵀ and change X only.
    """
    return None  # your line in place of None


# %% tags=["check"]
def check():
    """Your answer beside the dX of the package, on two layers that you have not seen."""
    rng = np.random.default_rng(10)
    for M, I, O, r, s in ((7, 6, 4, 3, 2.0), (5, 8, 9, 2, 0.25)):  # noqa: E741
        dY, X, W, A, B = (rng.standard_normal(shape) for shape in ((M, O), (M, I), (O, I), (r, I), (O, r)))
        _, back = LowRank(Param(A), Param(B), s)(Linear(Param(W, trainable=False)), X)
        dX, only_W = back(dY), dY @ W
        mine = given(input_gradient(dY, W, A, B, s))
        assert np.shape(mine) == X.shape, (
            f"dX has shape {np.shape(mine)}, X has {X.shape}: check the order of the factors"
        )
        assert not np.allclose(mine, only_W), "this is the backward through W only: the adapter reads X, too"
        assert not np.allclose(mine, only_W + dY @ B @ A), "almost: the scale s is missing"
        scaled = s * (only_W + dY @ B @ A)
        assert not np.allclose(mine, scaled), "the scale belongs to the adapter's part, and not to that of W"
        times = np.median(mine / dX)
        assert not np.allclose(mine, times * dX) or np.isclose(times, 1), f"this is {times:.3g} times dX"
        assert np.allclose(mine, dX), "this is not dX: move the factors across the bracket once more"
    return "equal to the dX of minilora.lora.LowRank"


verdict(check)


# %% tags=["exercise"]
# Predict, then run.
def twice_the_scale():
    """B = 0 at first. One step of plain gradient descent on A and B, once with scale s, once with 2 s.

    How many times as large is ΔW = s B A the second time?
    """
    return None  # your guess, a number, in place of None


# %% tags=["check"]
def check():
    """Your guess beside two steps, one with each scale."""
    sizes = []
    for s in (1.5, 3.0):
        rng = np.random.default_rng(11)
        X, A, dY = (rng.standard_normal(shape) for shape in ((7, 6), (3, 6), (7, 4)))
        pair = LowRank(Param(A), Param(np.zeros((4, 3))), s)
        _, back = pair(Linear(Param(np.zeros((4, 6)), trainable=False)), X)
        back(dY)
        sizes.append(np.linalg.norm(s * (-0.1 * pair.B.grad) @ A))  # dA is zero, so A has not moved
    hints = {
        2: "that is the s in s B A; look at dB = dYᵀ H with H = s X Aᵀ: which B comes out?",
        1: "the gradient of B contains s, and so does ΔW",
        8: "A does not move in this step, for dA contains B, and B is still 0",
    }
    predicted(twice_the_scale(), sizes[1] / sizes[0], hints, "no: count how often s stands in ΔW", 1e-9)
    return f"{sizes[1] / sizes[0]:.0f} times: s stands in dB, and once more in s B A"


verdict(check)


# %% tags=["exercise"]
# Change, and explain.
def both_move(I, O, r, rng):  # noqa: E741
    """A (r, I) and B (O, r) of which both have a gradient in the very first step; and what it costs.

    a: W has to be trained, too, since A and B both move.
    b: the adapted model does not begin as the base.
    c: B has no gradient then.
    """
    return None, None  # your pair (A, B), and the letter that the numbers support


# %% tags=["check"]
def check():
    """What your start makes of a frozen map, and which gradients there are."""
    for I, O, r in ((7, 5, 2), (4, 8, 3)):  # noqa: E741
        (A, B), letter = given(both_move(I, O, r, np.random.default_rng(12)))
        assert (np.shape(A), np.shape(B)) == ((r, I), (O, r)), (
            f"the shapes are {np.shape(A)} and {np.shape(B)}; expected (r, I) and (O, r)"
        )
        rng = np.random.default_rng(13)
        X, W, dY = (rng.standard_normal(shape) for shape in ((6, I), (O, I), (6, O)))
        pair, frozen = LowRank(Param(np.array(A, float)), Param(np.array(B, float)), 2.0), Param(W, False)
        Y, back = pair(Linear(frozen), X)
        back(dY)
        still = [name for name, p in (("A", pair.A), ("B", pair.B)) if not p.grad.any()]
        assert not still, f"{' and '.join(still)} has no gradient: the other factor is 0"
        off = np.abs(Y - X @ W.T).max()
        assert off > 1e-9, "clever: here B A = 0, and nothing is lost. Try the plain way first, and see"
        hints = {
            "a": "W is frozen and got no gradient; nothing here needs one",
            "c": f"the largest entry of dB is {np.abs(pair.B.grad).max():.2f}, and that of dA is "
            f"{np.abs(pair.A.grad).max():.2f}: both move",
        }
        chosen(letter, "b", hints)
    return f"the output begins {off:.1f} off the base's, before anything is learned; hence one zero"


verdict(check)

# %% [markdown]
# ## To take along
#
# - $dB = dY^\top H$ and $dA = (s\,dY\,B)^\top X$: one product of matrices for $dB$ and two for $dA$, and none
#   of them gives a matrix of the size of $W$.
# - With $B = 0$ the model starts as the base, and the first step moves only $B$.
# - The cost is $r (I + O)$ numbers, with their gradients and moments. Activations take as much memory as
#   before, and a little more.
#
# Next: [Merging costs nothing](3_merging_costs_nothing.ipynb).

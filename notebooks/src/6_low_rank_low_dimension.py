# %% [markdown]
# # Low rank, low dimension
#
# ![](attachment:rank_one.png)
#
# **What you will see.** LoRA is said to work because fine-tuning takes few dimensions; but a low dimension
# and a low rank are two things. The picture has the rank: a trained $\Delta W$ is a sum of matrices of rank
# one, and the first are most of it. You plant a $\Delta W$ of known rank and watch LoRA find it, ask whether
# two runs find the same directions, and train a model along random ones.
#
# **What you need.** [LoRA from one equation](2_lora_from_one_equation.ipynb) and [Which
# rank?](4_which_rank.ipynb).
#
# **Contents.** A low rank · Which directions? · A low dimension · Not the same · Exercises · To take along
#
# What trains here takes seconds. The large experiments are read from the rows that are kept with the package,
# and what follows from them is read from its ledger, where each sentence has a rule that decides it.

# %% tags=["first", "unkept"]

# %% tags=["imports"]
import math
from pathlib import Path

import numpy as np

import minilora as ml
from minilora.claims.ledger import claims
from minilora.data import corpora
from minilora.experiments.questions import picture
from minilora.layers import Linear, Need, Param
from minilora.lora import Adapted, LowRank

# the rows are beside this notebook, or in the repository
FIGURES = Path() if Path("known-rank").exists() else Path("../figures")

# %% tags=["claims"]
from minilora.experiments.questions import measured, question

intrinsic, reads = measured("intrinsic-dimension", FIGURES)
f = reads.found(intrinsic)
base = f.base()
pairs = [(np.median(base.share(a, "loss")), np.median(base.share(b, "loss"))) for a, b in f.pairs()]
holds(
    "training along random directions closes nearly as much of the gap as LoRA does with as many numbers",
    len(pairs) == 3 and all(abs(a - b) < 0.05 for a, b in pairs),
)
subspaces = [r for (method, _), r in base.results.items() if method == "subspace"]
holds(
    "its $\\Delta W$ has nearly the effective rank of pure noise",
    all(abs(np.median(r.rank) - base.start["rank"]) < 0.02 for r in subspaces),
)
holds(
    "LoRA's has a small part of it",
    all(np.median(a.rank) < 0.2 * base.start["rank"] for a, _ in f.pairs()),
)

# %% [markdown]
# ## A low rank
#
# Two words must be kept apart.
#
# - **Rank** belongs to one matrix. It is the number of directions that $\Delta W$ reads and writes; $s\,B A$
#   has at most $r$.
# - **Dimension** belongs to a set of changes. It is the number of numbers that choose one of them.
#
# First the rank. Of all matrices of rank $r$, the nearest to a matrix $\Delta$ is its singular value
# decomposition, cut after $r$ values. The square of what is missing is the sum of the squares of the others
# (Eckart and Young 1936). Does training find it? Below, a $\Delta$ of rank 3 is what one linear map has to
# learn, and LoRA learns it from the outputs, at ranks 1 to 5. The figure after it asks the same of three
# tasks, two of them in a whole model: the outputs of a teacher that differs from the base in one map, and a
# text in which pairs of letters have changed places.

# %% tags=["trained"]
O, I, k = 24, 40, 3  # noqa: E741
rng = np.random.default_rng(0)
delta = rng.standard_normal((O, k)) @ rng.standard_normal((k, I))  # planted, of rank k
X = np.eye(I)  # with these inputs the loss is |ΔW - Δ|²


def learned(r, steps=400):
    """The ΔW that LoRA of rank r learns."""
    A = np.random.default_rng(r).standard_normal((r, I)) / math.sqrt(I)
    pair = LowRank(Param(A), Param(np.zeros((O, r))), 1.0)
    layer = Adapted(Linear(Param(np.zeros((O, I)), False)), {"lora": pair}, "lora")
    optimizer, schedule = ml.AdamW(lr=0.05, clip=None), ml.Schedule(steps)
    for step in range(steps):
        Y, back = layer(X, Need.WEIGHTS)
        back(2 * (Y - X @ delta.T))
        optimizer.step(ml.trained(layer), optimizer.lr * schedule(step))
    return pair.delta()


ranks, size = range(1, 6), (delta**2).sum()
planted = np.linalg.svd(delta, compute_uv=False)
changes = {r: learned(r) for r in ranks}
left = {r: ((change - delta) ** 2).sum() / size for r, change in changes.items()}
best = {r: (planted[r:] ** 2).sum() / size for r in ranks}
values = {r: np.linalg.svd(change, compute_uv=False)[: max(ranks)] for r, change in changes.items()}
print("share of the loss that is left")
print("  r    LoRA    Δ cut to r    singular values of LoRA's ΔW")
for r in ranks:
    print(f"{r:3}  {left[r]:.4f}  {best[r]:12.4f}   ", *(f"{x:6.2f}" for x in values[r]))
print("planted:                  ", *(f"{x:6.2f}" for x in planted[: max(ranks)]))

# %%
picture("known-rank/elbows", FIGURES)

# %%
print(claims().of("known-rank/elbows", "known-rank/found"))

# %% tags=["claims", "trained"]
holds("a $\\Delta$ of rank 3 is what", np.linalg.matrix_rank(delta) == 3)
holds("at ranks 1 to 5", [*ranks] == [1, 2, 3, 4, 5])
holds("to all digits shown", all(abs(left[r] - best[r]) < 5e-5 for r in ranks))
holds("With more rank than it needs, the values beyond 3 hardly grow", values[5][3] < 0.01 * values[5][2])

# %% tags=["claims"]
known, reads = measured("known-rank", FIGURES)
tasks = reads.tasks(known)
holds("asks the same of three tasks, two of them in a whole model", len(tasks) == 3)
below = [
    np.median([row["best"] - row["excess"] for row in some])
    for task in tasks[1:]
    for k in reads.planted(known, task)
    for r, some in reads.select(known, task, k).items()
    if r < k
]
holds("below it training beats the cut (dotted)", min(below) > 0)
solved = [
    np.median([row["excess"] for row in reads.select(known, task, k)[k]])
    for task in tasks
    for k in reads.planted(known, task)
]
holds("nearly nothing is left at the planted rank", max(solved) < 0.03)
unsolved = [np.median([row["excess"] for row in reads.select(known, task, 13)[12]]) for task in tasks]
holds("A task that needs 13 is not solved with 12", min(unsolved) > reads.NOTHING)
apart, reads = measured("subspaces", FIGURES)
apart = [row for row in apart if row["config"]["kind"] == "final"]
says("$r = 8$ reaches {:.0f} % of the gain of $r = 64$", 100 * np.median(reads.gained(apart)))
first = {pair: np.median(reads.overlap(apart, pair, "A")[..., 0]) for pair in ("seeds", "texts")}
holds("Two seeds share a little more than chance, two texts nothing", 0.1 < first["seeds"] < 0.3)
holds("Two seeds share a little more than chance, two texts nothing", abs(first["texts"]) < 0.02)

# %% [markdown]
# On one map LoRA leaves what the cut $\Delta$ leaves, to all digits shown. With more rank than it needs, the
# values beyond 3 hardly grow: the spectrum shows what was planted. In a model, too, nearly nothing is left at
# the planted rank. But below it training beats the cut (dotted), for the nearest matrix need not have the
# least loss. So a task can *have* a rank. A task that needs 13 is not solved with 12.
#
# ## Which directions?
#
# For a text nobody knows the answer. If it asked for *one* change of low rank, two runs should find the same
# directions. The next figure compares the singular vectors of two adapters, the strongest first; 0 is what
# random directions share, 1 means the same ones.

# %%
picture("subspaces/directions", FIGURES)

# %%
print(claims().of("subspaces/ranks", "subspaces/seeds"))

# %% [markdown]
# Two seeds share a little more than chance, two texts nothing; and $r = 8$ reaches 95 % of the gain of $r =
# 64$. So there is no one subspace that every run finds. Many changes of low rank do about as well.
#
# ## A low dimension
#
# Then, perhaps, directions need not be learned at all. Let all weights of a model, as one column $\theta$ of
# $D$ numbers, move along the $d$ columns of a random $P$ that never changes:
#
# $$\theta = \theta_0 + P z \qquad dz = P^\top d\theta$$
#
# Only $z$ is trained, from 0. The smallest $d$ that reaches 90 % of what full training reaches is the
# **intrinsic dimension** ([Li et al. 2018](https://arxiv.org/abs/1804.08838)). `ml.subspace` never stores
# $P$, which has $D$ times $d$ entries: it makes $P z$ with random signs, a permutation, Gaussian factors and
# Hadamard matrices. (SAID, of [Aghajanyan et al. 2020](https://arxiv.org/abs/2012.13255), also trains one
# scale for each weight matrix.) Below, LoRA and random subspaces learn the First Folio's spelling from the
# same batches, at the learning rates that the experiment's search chose.

# %% tags=["corpus", "trained"]
text = corpora.corpus_or_fallback("folio")
test = ml.eval_batches(text.test, batch_size=16, length=128, limit=32 * 128)
start = ml.load()


def train(model, rate):
    """Some steps, the learning rate over the root of the numbers that they train; how many these are."""
    numbers = sum(p.size for p in ml.trained(model).values())
    batches = ml.batches(text.train, np.random.default_rng(10), batch_size=8, length=128)
    ml.train(model, batches, ml.AdamW(lr=rate / math.sqrt(numbers)), steps=40)
    return numbers


def show(name, numbers, model):
    """Print and keep the test loss, and the effective rank of the median map's ΔW."""
    spectra = ml.spectrum_between(start, model)
    rank = np.median([ml.effective_rank(s) for path, s in spectra.items() if "_proj" in path])
    found[name, numbers] = ml.evaluate(model, test), rank
    print(f"{name:17} {numbers:9,} {found[name, numbers][0]:11.2f} {rank:22.1f}")


found, rng = {}, np.random.default_rng(0)
print(f"test loss of the base: {ml.evaluate(start, test):.2f}")
print("                    numbers   test loss   effective rank of ΔW, of 96")

model = ml.load()
ml.inject(model, ml.LoraConfig(r=1, alpha=2), rng=rng)
numbers = train(model, 2)
ml.fuse(model)
show("LoRA, r = 1", numbers, model)

for d, rate in ((5472, 2), (342, 1)):
    model = ml.subspace(ml.load(), d, rng=rng)
    show("random subspace", train(model, rate), model.moved()[0])

model = ml.load()
ml.unfreeze(model)
show("all weights", train(model, 0.5), model)
print()
print(claims().of("intrinsic-dimension/starts"))

# %% tags=["claims", "corpus", "trained"]
one, same, few, _ = found.items()
holds("as many numbers, and nearly the same loss", one[0][1] == same[0][1] == 5472)
holds("as many numbers, and nearly the same loss", abs(one[1][0] - same[1][0]) < 0.05)
holds(
    "rank 1, while the effective rank of the subspace's is four fifths of the largest possible",
    abs(one[1][1] - 1) < 0.05,
)
holds(
    "rank 1, while the effective rank of the subspace's is four fifths of the largest possible",
    round(same[1][1] / 96, 1) == 0.8,
)
holds("With 342 numbers it is the same", few[0][1] == 342 and abs(few[1][1] - same[1][1]) < 3)

# %% tags=["claims"]
rates = {
    (c["method"], c["size"]): c["rate"]
    for c in (row["config"] for row in intrinsic)
    if (c["kind"], c["target"], c["width"]) == ("final", "folio", 0)
}
holds(
    "at the learning rates that the experiment's search chose",
    [rates[how] for how in (("lora", 1), ("subspace", 5472), ("subspace", 342), ("full", 0))]
    == [2, 2, 1, 0.5],
)
random = f.random()
holds("Only $z$ is trained, from 0", not ml.subspace(ml.load(), 4, rng=np.random.default_rng(0)).z.data.any())
rows = np.random.default_rng(0).standard_normal((3, 5))
holds("of rank 1 again", np.linalg.matrix_rank(sum(np.outer(range(1, 5), a) for a in rows)) == 1)
holds(
    "Of full training's accuracy this base has 90 % before any training, so that its dimension is 0",
    all(np.median(f.base(t).d90("accuracy")) == 0 for t in f.plan.targets),
)
d90 = np.median(base.d90())
says("on the First Folio it takes {:.1f} % of all numbers", 100 * d90 / base.start["parameters"])
holds("from random weights it takes fewer", np.median(random.d90()) < d90)
levels = [np.median(arm.full.loss) for arm in (random, base)]
holds("there full training itself does not get far", levels[0] - levels[1] > 0.3)
holds("The smallest $d$ that reaches 90 %", question("intrinsic-dimension")[1].LEVEL == 0.9)
holds("depends on what the 90 % are of", np.median(base.d90("accuracy")) < d90)
holds("Say what the 90 % are of", np.median(base.d90("accuracy")) < d90)

# %% [markdown]
# ## Not the same
#
# LoRA and the first subspace train as many numbers, and nearly the same loss comes out. LoRA's $\Delta W$ has
# rank 1, while the effective rank of the subspace's is four fifths of the largest possible. With 342 numbers
# it is the same: $P$ is noise, and so is $P z$, however short $z$ is. The next figure has the large
# experiment. Left: training along random directions closes nearly as much of the gap as LoRA does with as
# many numbers. Right: its $\Delta W$ has nearly the effective rank of pure noise, and LoRA's has a small part
# of it.

# %%
picture("intrinsic-dimension/rank", FIGURES)

# %%
print(claims().of("intrinsic-dimension/rank"))

# %% [markdown]
# So LoRA's success does not show that only a low rank would do. A low rank makes it *cheap*: two thin
# products beside each map, where $P z$ touches every weight of the model in every step.
#
# And is the dimension low? Say what the 90 % are of. Of full training's accuracy this base has 90 % before
# any training, so that its dimension is 0. Of the loss gap, on the First Folio it takes 5.5 % of all numbers;
# from random weights it takes fewer, but there full training itself does not get far.

# %% [markdown]
# ## Exercises
#
# Write your answer in place of `None`, and run that cell and the one below it. A wrong answer gets a hint.
# [The solutions, and what is often answered instead](solutions/6_low_rank_low_dimension.md).


# %% tags=["exercise"]
# Write the line.
def gradient_of_z(dY, X, P):
    """dz (d,) for Y = X Wᵀ, W = W0 + (P z).reshape(O, I). dY (M, O), X (M, I), P (O I, d)."""
    return None  # your line in place of None


# %% tags=["check"]
def check():
    """Your answer on integers, beside one direction after the other."""
    rng = np.random.default_rng(1)
    for M, O, I, d in ((5, 3, 4, 6), (2, 7, 3, 4)):  # noqa: E741
        dY, X, P = (rng.integers(-4, 5, shape) for shape in ((M, O), (M, I), (O * I, d)))
        mine = given(gradient_of_z(dY, X, P))
        wanted = [(dY * (X @ P[:, j].reshape(O, I).T)).sum() for j in range(d)]
        assert np.shape(mine) == (d,), f"the shape is {np.shape(mine)}; expected (d,) = ({d},)"
        turned = P.T @ (X.T @ dY).reshape(-1)
        assert not np.array_equal(mine, turned), "almost: dW has the shape of W, (O, I), before it is one row"
        assert np.array_equal(mine, wanted), "another gradient: what is dW, and which way does P take it?"
    return "with integers, equal by =="


verdict(check)


# %% tags=["exercise"]
# Predict, then run.
def rank_from_one_number():
    """A map has 20 outputs and 30 inputs; ΔW = (P z).reshape(20, 30), P is random, z one number. Its rank?"""
    return None  # your guess, a number, in place of None


# %% tags=["check"]
def check():
    """Your guess beside what comes out."""
    P = np.random.default_rng(2).standard_normal((20 * 30, 1))
    rank = np.linalg.matrix_rank((P @ [0.7]).reshape(20, 30))
    hints = {
        1: "that is its dimension; the one number multiplies a whole matrix",
        30: "no rank is above the smaller side",
    }
    predicted(rank_from_one_number(), rank, hints, "no: which rank has a random matrix of this shape?")
    return f"{rank}, as a random matrix of that shape has: dimension 1, and every direction"


verdict(check)


# %% tags=["exercise"]
# Change, and explain.
def thin_directions(O, I, d, rng):  # noqa: E741
    """P (O I, d), its columns independent, such that (P z).reshape(O, I) has rank 1 for every z but 0; and
    why it has.

    a: each column alone is a matrix of rank 1.
    b: the columns share one factor, so that their sums are again a product of one column and one row.
    c: there are fewer columns than the matrix has rows.
    """
    return None, None  # your P, and the letter that the numbers support


# %% tags=["check"]
def check():
    """The rank of your P, and of what it makes of random z; and of two others."""
    rng = np.random.default_rng(3)

    def rank_of(P, O, I):  # noqa: E741
        return int(np.linalg.matrix_rank((P @ rng.standard_normal(P.shape[1])).reshape(O, I)))

    for O, I, d in ((6, 8, 4), (5, 5, 3)):  # noqa: E741
        P, letter = given(thin_directions(O, I, d, np.random.default_rng(4)))
        assert np.shape(P) == (O * I, d), f"the shape is {np.shape(P)}; expected (O I, d) = {(O * I, d)}"
        found = np.linalg.matrix_rank(P)
        assert found == d, f"only {found} of its {d} columns are independent: that is its dimension"
        ranks = {rank_of(P, O, I) for _ in range(5)}
        assert ranks == {1}, f"a random z gives rank {max(ranks)}; what must all columns have in common?"
        apart = np.stack([np.outer(*(rng.standard_normal(n) for n in (O, I))).ravel() for _ in range(d)], 1)
        noise = rng.standard_normal((O * I, d))
        hints = {
            "a": f"so it is with {d} products drawn apart from each other, and their sums have rank "
            f"{rank_of(apart, O, I)}",
            "c": f"so it is with {d} random columns, and their sums have rank {rank_of(noise, O, I)}",
        }
        chosen(letter, "b", hints)
    return "d dimensions, rank 1: all columns share one factor, as in LoRA of r = 1 with that factor frozen"


verdict(check)

# %% [markdown]
# ## To take along
#
# - Rank counts the directions of one $\Delta W$; dimension counts the numbers that choose it. Either can be
#   low without the other.
# - A task can have a rank. Then LoRA of that rank solves it, or nearly, and the spectrum shows it.
# - Two runs find different directions that do about as well. Compare directions with random ones first.
# - Whether fine-tuning has a "low intrinsic dimension" depends on what the 90 % are of.
#
# Next: [Four bits](7_four_bits.ipynb).

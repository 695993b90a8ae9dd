# %% [markdown]
# # What to adapt and how
#
# ![](attachment:block_all_linear.png)
#
# **What you will see.** LoRA leaves three choices: which matrices, which scale, which start. The picture
# adapts every linear map of a block. An experiment spends the same number of parameters in eight places, and
# the place matters. Then a scale turns out to be a learning rate, to the bit; starts are compared; and you
# see what all of it costs.
#
# **What you need.** [LoRA from one equation](2_lora_from_one_equation.ipynb), [Merging costs
# nothing](3_merging_costs_nothing.ipynb) and [Which rank?](4_which_rank.ipynb).
#
# **Contents.** Which matrices? · Which scale? · Which start? · What it costs · Its rivals · Exercises · To
# take along
#
# What trains here takes seconds. The large experiments are read from the rows that are kept with the package,
# and what follows from them is read from its ledger, where each sentence has a rule that decides it.

# %% tags=["first", "unkept"]

# %% tags=["imports"]
from dataclasses import replace
from pathlib import Path

import numpy as np

import minilora as ml
from minilora.claims.ledger import claims
from minilora.data import corpora
from minilora.experiments.questions import picture
from minilora.layers import Linear, Need, Param
from minilora.lora import LowRank

# the rows are beside this notebook, or in the repository
FIGURES = Path() if Path("scale").exists() else Path("../figures")

# %% tags=["claims"]
from minilora.experiments.questions import measured

rows, which = measured("which-matrices", FIGURES)
found = {(text, i): one for text in which.texts(rows) for i, one in enumerate(which.budgets(rows, text))}
orders = [list(which.medians(one)) for one in found.values()]
holds("spends the same number of parameters in eight places", {len(order) for order in orders} == {8})
holds("Q and K are the worst places everywhere", all({*order[-2:]} == {"Q", "K"} for order in orders))
holds("the MLP is better than all of attention", all("MLP" in order[:2] for order in orders))
holds("the MLP is better than all of attention", all({*order[:2]} == {"MLP", "all"} for order in orders))
holds(
    "has five seeds, and for each set a learning rate of its own",
    all(len(done) == 5 for one in found.values() for done in one.values()),
)
configs = [row["config"] for row in rows]
tried = {c["lr"] for c in configs if (c["method"], c["kind"]) == ("lora", "search")}
chosen = [{row["config"]["lr"] for row in done} for one in found.values() for done in one.values()]
holds(
    "has five seeds, and for each set a learning rate of its own",
    len(tried) > 3 and all(len(rates) == 1 and rates <= tried for rates in chosen),
)

# %% [markdown]
# ## Which matrices?
#
# LoRA on a map of shape $(O, I)$ has $r\,(O + I)$ parameters. So one kind of map at a high rank costs as much
# as all maps at a low one, and the question is where they do most. The figure below has two texts: one is
# near to what the base knows, the other far from it; and two budgets of parameters. It has five seeds, and
# for each set a learning rate of its own, chosen on text that is not tested.
#
# Q and K are the worst places everywhere. (They only change *where* a head looks; V, O and the MLP change
# what is written.) Hu et al. compared attention maps alone; here the MLP is better than all of attention.
# Below the figure you spend the larger budget yourself, in a shorter training.

# %%
picture("which-matrices/which_set", FIGURES)

# %% tags=["corpus", "trained"]
text = corpora.corpus_or_fallback("folio")
test = ml.eval_batches(text.test, batch_size=16, length=128, limit=32 * 128)
sets = {
    "Q": (["q_proj"], 48),
    "Q and V": (["q_proj", "v_proj"], 24),
    "MLP": (["gate_proj", "up_proj", "down_proj"], 9),
    "all maps": ("all-linear", 5),
}
spent = {}
print(f"{'':9}   r   parameters   test loss; the base has {ml.evaluate(ml.load(), test):.2f}")
for name, (targets, r) in sets.items():
    model = ml.load()
    config = ml.LoraConfig(r=r, alpha=2 * r, targets=targets)
    report = ml.inject(model, config, rng=np.random.default_rng(0))
    batches = ml.batches(text.train, np.random.default_rng(1), batch_size=8, length=128)
    ml.train(model, batches, ml.AdamW(lr=8e-3), steps=40)
    spent[name] = ml.evaluate(model, test)
    print(f"{name:9} {r:3} {report.parameters:12,} {spent[name]:11.2f}")
print()
print(claims().of("which-matrices/which_set", "which-matrices/all_against_qv"))

# %% tags=["claims", "corpus", "trained"]
holds("The order is that of the figure", spent["Q"] > spent["Q and V"] > max(spent["MLP"], spent["all maps"]))

# %% tags=["claims"]
order = which.medians(found["folio", 1])
holds("The order is that of the figure", order["Q"] > order["QV"] > max(order["MLP"], order["all"]))

# %% [markdown]
# The order is that of the figure.
#
# ## Which scale?
#
# The scale is $s = \alpha / r$, or $\alpha / \sqrt r$ ([rsLoRA, Kalajdzievski
# 2023](https://arxiv.org/abs/2312.03732)), or the same at every rank, as with $\alpha = 2 r$. Look at what
# Adam makes of it.
#
# $$dB = s\,dY^\top X A^\top \qquad dA = s\,B^\top dY^\top X$$
#
# Adam divides each gradient by its own size, so its steps do not depend on it. With an $s$ that is $q$ times
# as large, $B$ takes the same steps, and $\Delta W = s\,B A$ goes $q$ times as far. The same happens if $s$
# stays and $B$ *learns* $q$ times as fast. **For Adam, a scale is a learning rate of $B$.** At $r = 16$ the
# scale of rsLoRA is 4 times the usual one. (Clipping, and the small number that Adam adds to a size, are
# turned off here.)


# %% tags=["corpus", "trained"]
def losses(config, ratio=1.0):
    """The loss before each of ten steps and on the test; B learns `ratio` times as fast as A."""
    model = ml.load()
    ml.inject(model, config, rng=np.random.default_rng(0))
    batches = ml.batches(text.train, np.random.default_rng(1), batch_size=4, length=128)
    optimizer = ml.AdamW(lr=2e-3, eps=1e-30, clip=None, rate=ml.lora_plus(ratio))
    return [*ml.train(model, batches, optimizer, steps=10).loss, ml.evaluate(model, test)]


usual = ml.LoraConfig(r=16, alpha=32)
ways = {
    "alpha / r": losses(usual),
    "alpha / √r": losses(replace(usual, rslora=True)),
    "alpha / r, B 4 times as fast": losses(usual, 4.0),
    "4 alpha / r": losses(replace(usual, alpha=4 * 32)),
}
print("test loss after ten steps")
for name, some in ways.items():
    print(f"{name:30} {some[-1]:.3f}")
one, *others = list(ways.values())[1:]
print("all losses of the last three are equal to the bit:", all(other == one for other in others))

# %%
picture("scale/one_rate", FIGURES)

# %%
print(claims().of("scale/one_rate", "scale/rates", "scale/lora_plus"))

# %% tags=["claims", "corpus"]
holds("to the bit", all(other == one for other in others))
holds(
    "The last three are one training, to the bit", len(others) == 2 and all(other == one for other in others)
)

# %% tags=["claims"]
from minilora.lora import active

model = ml.load()
ml.inject(model, replace(usual, rslora=True), rng=np.random.default_rng(0))
scales = {adapter.scale for adapter in active(model).values()}
holds("At $r = 16$ the scale of rsLoRA is 4 times the usual one", scales == {4 * usual.alpha / usual.r})
rows, reads = measured("scale", FIGURES)
f = reads.found(rows)
scalings = "alpha / r", "alpha / √r", "alpha = 2r"
best = np.array([[np.median(arm.best) for arm in f.scaled(s).values()] for s in scalings])
says("the three scales are at most {:.3f} nats apart", np.ptp(best, 0).max())
holds("With $\\alpha = 2 r$ high ranks collapse at one rate", f.more("alpha = 2r") > 0.05)
gap = f.base - np.median(f.arms[reads.FULL].best)
holds("and not at their own", abs(best[2, -1] - best[0, -1]) < 0.05 * gap)
says("from $r = {}$ on the best rates are within a factor of {:.1f}", f.plan.ranks[1], f.apart("alpha / r"))

# %% [markdown]
# The last three are one training, to the bit. At their own best rates (dotted), too, the three scales are at
# most 0.006 nats apart. With $\alpha = 2 r$ high ranks collapse at one rate, and not at their own: the fault
# is the rate's. With $\alpha / r$, from $r = 4$ on the best rates are within a factor of 1.2. Choose $\alpha$
# once, and tune the learning rate.
#
# ## Which start?
#
# Last, the start. Training should begin at the base, with $\Delta W = 0$. The usual $B = 0$ does it: at first
# $A$ has no gradient, but $B$ has one. With $A = 0$ it is the other way around; with both at zero nothing
# ever moves. [PiSSA](https://arxiv.org/abs/2404.02948), [OLoRA](https://arxiv.org/abs/2406.01775) and
# [LoRA-GA](https://arxiv.org/abs/2407.05000) begin at factors of $W$ or of its gradient, and take that start
# off again: $\Delta W = s\,(B A - B_0 A_0)$. The same in random directions stands beside them.

# %%
picture("initialisation/starts", FIGURES)

# %%
print(claims().of("initialisation/starts", "initialisation/first_steps"))

# %% tags=["claims"]
rows, reads = measured("initialisation", FIGURES)
f = reads.found(rows)
good = [start for start in f.arms if start not in ("B zero", "both random", "both zero", "all weights")]
norms = [f.gradients(start) for start in ("B zero", "A zero", "both zero")]
holds(
    "with $\\Delta W = 0$. The usual $B = 0$ does it: at first $A$ has no gradient, but $B$ has one. "
    "With $A = 0$ it is the other way around; with both at zero nothing ever moves",
    [[bool(norm[name]) for name in "AB"] for norm in norms] == [[False, True], [True, False], [False, False]],
)
holds(
    "with both at zero nothing ever moves",
    f.away("B zero") == f.away("A zero") == 0 and (f.arms["both zero"].best == f.base).all(),
)
changes = {start: np.median(f.change(start)) for start in good}
says("within {:.3f} nats of the usual one", max(changes.values()))
holds("none is better", min(changes.values()) > 0)
holds(
    "Where the parameters go matters more than the scale, and more than which start at the base",
    min(which.medians(one)["QV"] - min(which.medians(one).values()) for one in found.values())
    > max(*changes.values(), np.ptp(best, 0).max()),
)
holds("six other starts", len(good) == 6)
says("costs {:.3f} nats", np.median(f.change("both random")))
entries = {entry.statement: entry for entry in claims().entries}


def number(start):
    """The number of the one sentence that begins so."""
    (entry,) = (entry for statement, entry in entries.items() if statement.startswith(start))
    return entry.number


says("A map of 4096 inputs and outputs has {} fewer parameters at $r = 8$", number("At r = 8 a map of 4096"))
says("of a 7B model at $r = 16$ on all attention maps trains {}", number("Rank 16 on all attention"))
says("one in {} of the model's", number("Such an adapter has 500 to 1,000 times").removesuffix(" times"))
says("takes {} in 16 bits", number("Such an adapter takes"))
says("A step takes {} as full fine-tuning's", number("LoRA trains in a fraction").partition(",")[0])
says("merged, {}", number("Once merged").partition(", ")[2].replace("token", "token takes"))

# %% [markdown]
# In the median, six other starts end within 0.024 nats of the usual one, and none is better. To begin off the
# base costs 0.064 nats.
#
# ## What it costs
#
# The trained numbers are few. A map of 4096 inputs and outputs has 256 times fewer parameters at $r = 8$; an
# adapter of a 7B model at $r = 16$ on all attention maps trains 16.8 million numbers, one in 402 of the
# model's, and takes 33.6 MB in 16 bits. The gradients and moments of Adam shrink with them; the base's
# weights and the activations do not. Nor does time shrink as much: the forward pass and the way back through
# the frozen weights remain. A step takes 0.71 to 0.99 times as long as full fine-tuning's; merged, a
# token takes 1.03 times the base's time. The ledger's benchmarks measured both.

# %%
print(claims().of("cost/parameters", "cost/training", "cost/disk"))

# %% [markdown]
# ## Its rivals
#
# LoRA is not the only way to train few parameters. Bottleneck adapters stand behind attention or the MLP: two
# thin maps with a nonlinearity between them. Prefixes and prompts are trained rows before the text. Each was
# given as many parameters as LoRA.

# %%
print(claims().of("rivals/rivals"))

# %% [markdown]
# ## Exercises
#
# Write your answer in place of `None`, and run that cell and the one below it. A wrong answer gets a hint.
# [The solutions, and what is often answered instead](solutions/5_what_to_adapt_and_how.md).


# %% tags=["exercise"]
# Write the line.
def rank_for(budget, shapes):
    """The rank at which LoRA on maps of shapes [(O, I), ...] comes nearest to a budget of parameters."""
    return None  # your line in place of None


# %% tags=["check"]
def check():
    """Your answer beside all ranks, counted one by one."""
    cases = (
        (27648, [(96, 96)] * 6),
        (27648, [(256, 96), (256, 96), (96, 256)] * 3),
        (500, [(30, 20), (5, 8)]),
        (520, [(30, 20), (5, 8)]),
    )
    for budget, shapes in cases:
        counts = {r: sum(r * n + m * r for m, n in shapes) for r in range(1, 200)}
        wanted, mine = min(counts, key=lambda r: abs(counts[r] - budget)), given(rank_for(budget, shapes))
        assert mine == int(mine), f"{mine} is no rank; expected a whole number"
        assert mine == wanted, (
            f"r = {mine} has {sum(mine * (m + n) for m, n in shapes)} parameters of {budget}; "
            "A and B of a map have r (O + I)"
        )
    return "and so the sets of the figure have their ranks"


verdict(check)


# %% tags=["exercise"]
# Predict, then run.
def times_as_far():
    """s is made 4 times as large, all else stays. How many times as large is ΔW after one step of Adam?"""
    return None  # your guess, a number, in place of None


# %% tags=["check"]
def check():
    """Your guess beside what comes out, on one map."""
    sizes = []
    for s in (2.0, 8.0):
        rng = np.random.default_rng(2)
        X, dY = rng.standard_normal((6, 7)), rng.standard_normal((6, 5))
        pair = LowRank(Param(rng.standard_normal((3, 7))), Param(np.zeros((5, 3))), s)
        _, back = pair(Linear(Param(np.zeros((5, 7)), trainable=False)), X, Need.WEIGHTS)
        back(dY)
        ml.AdamW(lr=0.01, clip=None).step({"A": pair.A, "B": pair.B})
        sizes.append(np.linalg.norm(pair.delta()))
    times = sizes[1] / sizes[0]
    hints = {
        16: "so it would be with plain gradient descent, whose step has the gradient's size",
        1: "B's step is the same, yes; but ΔW is s B A",
    }
    otherwise = "no: by how much does the step of B change, and by how much s?"
    predicted(times_as_far(), times, hints, otherwise, 1e-4)
    return f"{times:.0f} times: B takes the same step, and s multiplies it"


verdict(check)


# %% tags=["exercise"]
# Change, and explain.
def both_learn(O, I, rng):  # noqa: E741
    """A (2, I) and B (O, 2) with B A = 0, of which both have a gradient in the very first step; and why.

    a: a gradient does not care whether the other factor is 0.
    b: each direction needs only one zero, and the two directions have theirs in different factors.
    c: B A = 0 makes both gradients 0 at first, and the second step moves them.
    """
    return None, None  # your pair (A, B), and the letter that the numbers support


# %% tags=["check"]
def check():
    """What your start makes of a map before the first step, and which of its factors have a gradient."""
    for O, I in ((5, 7), (8, 4)):  # noqa: E741
        answer, letter = given(both_learn(O, I, np.random.default_rng(3)))
        A, B = (np.array(factor, float) for factor in answer)
        assert (A.shape, B.shape) == ((2, I), (O, 2)), f"the shapes are {A.shape} and {B.shape}"
        assert np.abs(B @ A).max() < 1e-12, "B A is not 0: the model would not begin at the base"
        pair, rng = LowRank(Param(A), Param(B), 1.0), np.random.default_rng(4)
        frozen = Linear(Param(np.zeros((O, I)), trainable=False))
        _, back = pair(frozen, rng.standard_normal((6, I)), Need.WEIGHTS)
        back(rng.standard_normal((6, O)))
        still = [name for name, p in (("A", pair.A), ("B", pair.B)) if not p.grad.any()]
        assert not still, f"no gradient in {' and '.join(still)}: the other factor is 0"
        zeros = (~A.any(1) | ~B.any(0)).all()
        assert zeros, "clever: two directions cancel, and neither has a zero. Try it with zeros, and see"
        rows = np.abs(pair.A.grad).max(1)
        hints = {
            "a": f"the rows of dA are at most {rows[0]:.2f} and {rows[1]:.2f}: 0 where B has its zero column",
            "c": f"already now dA is up to {rows.max():.2f}, and dB up to {np.abs(pair.B.grad).max():.2f}",
        }
        chosen(letter, "b", hints)
    return "each direction needs only one zero, so one may have it in B and the other in A"


verdict(check)

# %% [markdown]
# ## To take along
#
# - Adapt all linear maps, or the MLP. Where the parameters go matters more than the scale, and more than
#   which start at the base, if each has its own learning rate.
# - A scale is a learning rate. Keep $\alpha$, and search the rate, for every method anew.
# - Begin at the base: one factor zero, the other drawn.
# - Few numbers are trained. That saves memory more than time.
#
# Next: [Low rank, low dimension](6_low_rank_low_dimension.ipynb).

# %% [markdown]
# # An adapter under the microscope
#
# ![](attachment:factors.png)
#
# **What you will see.** A trained adapter, opened and measured: what the singular values of $\Delta W$ say;
# what two seeds have in common; what is left of an adapter that is made smaller. The picture has all numbers
# of one module, and nobody can read them. Beside every measure stands what noise would show.
#
# **What you need.** [LoRA from one equation](2_lora_from_one_equation.ipynb), [Merging costs
# nothing](3_merging_costs_nothing.ipynb), and the singular values of [Which rank?](4_which_rank.ipynb)

# %% tags=["first", "unkept"]

# %% tags=["imports"]
import os
import tempfile

import numpy as np

import minilora as ml
from minilora import finetune, spectra
from minilora.analysis import figures, plotting
from minilora.analysis.tables import wrapped
from minilora.data import corpora
from minilora.lora import adapted

home = tempfile.TemporaryDirectory()
os.chdir(home.name)  # what is written below is gone when the kernel is

# %% [markdown]
# ## An adapter in a folder
#
# `finetune.run` is what `minilora train` calls: a base, a text, a recipe, and a folder to write. Here the
# base is the one that ships, and the text is the First Folio, Shakespeare in the spelling of 1623. The loss
# is in nats per character, on plays that neither base nor adapter was trained on.
#
# The folder is in PEFT's form: a config, and the factors $A$ and $B$ of every adapted module. Nothing else is
# needed below, so whatever we do with this adapter can be done with one from elsewhere.

# %% tags=["corpus", "trained"]
text = corpora.corpus_or_fallback("folio")
name = "stdlib" if text.source.startswith("fallback") else "folio"
held_out = ml.eval_batches(text.test, batch_size=16, length=128, limit=64 * 128)
common = dict(data=name, steps=80, batch=8, length=128, eval_every=80, eval_tokens=64 * 128)


def train(out, r, seed=0):
    recipe = finetune.Recipe(**common, r=r, alpha=16, lr=1e-2, seed=seed)
    return finetune.run(recipe, out)


done = train("r8", r=8)
print("text:", text.source)
print(f"parameters:          {done.parameters:,}")
print(f"loss of the base:    {done.before:.3f}")
print(f"with the adapter:    {done.after:.3f}")
print()
print(*sorted(os.listdir("r8")))
r8 = ml.open_adapter("r8")
print(f"r = {r8.settings.r}, alpha = {r8.settings.lora_alpha:g}, on", *r8.settings.target_modules)
print(len(r8.tensors), "tensors, the first two:")
for tensor in sorted(r8.tensors)[:2]:
    print(" ", tensor, r8.tensors.shapes[tensor])

# %% [markdown]
# ## What the columns mean
#
# `ml.inspect` reads a folder and computes the singular values $s_1 \ge s_2 \ge \dots$ of every $\Delta W =
# s\,B A$. `minilora inspect r8` prints the same.
#
# | column | meaning |
# |---|---|
# | $\lvert\Delta W\rvert$ | Frobenius norm: the root of $\sum s_i^2$ |
# | eff. rank | $\exp(-\sum p_i \ln p_i)$ with $p_i = s_i / \sum s_j$: of $k$ equal values it is $k$ |
# | 90 %, 99 % | how many singular values hold that share of $\sum s_i^2$ |
# | in brackets | the same of *noise*: of $B A$ with Gaussian $A$ and $B$ of these shapes |
#
# We look at the last of the three blocks, and below it at one module again, by forming $\Delta W$ and
# decomposing it, which the microscope itself never does.

# %% tags=["corpus", "trained"]
print(ml.inspect("r8", modules="model.layers.2.*"))

seen = ml.inspect("r8")
module = "model.layers.2.mlp.down_proj"
A, B = r8.factors(module)
S = np.linalg.svd(2.0 * B.astype(float) @ A, compute_uv=False)  # s = alpha / r = 16 / 8
found = next(m for m in seen.modules if m.module == module)
p = S[:8] / S.sum()
print()
print("singular values beyond the eighth are zero:", bool(S[8] < 1e-9 * S[0]))
print("the others are equal:        ", np.allclose(S[:8], found.singular_values))
print("so is |ΔW|:                  ", np.isclose(np.sqrt((S**2).sum()), found.norm))
print("so is the effective rank:    ", np.isclose(np.exp(-(p * np.log(p)).sum()), found.ranks.effective))

# %% tags=["claims", "corpus", "trained"]
holds("We look at the last of the three blocks", len(ml.load().model.layers) == 3)
holds(
    "Most of these effective ranks are above 7 of 8.",
    np.mean([m.ranks.effective > 7 for m in seen.modules]) > 0.5,
)

# %% [markdown]
# ## A flat spectrum
#
# Most of these effective ranks are above 7 of 8. Does the adapter use its rank, then? Let us examine noise in
# the same way: an adapter whose factors are random, scaled so that each $|\Delta W|$ is that of ours. It has
# never seen a text. We call it the twin.

# %% tags=["corpus"]
model = ml.load()
ml.inject(model, ml.LoraConfig(r=8, alpha=16, init="both"), rng=np.random.default_rng(7))
norms = {m.module: m.norm for m in seen.modules}
for path, layer in adapted(model).items():
    pair = layer.adapters[layer.active]
    pair.B.data *= np.float32(norms[path] / np.linalg.norm(pair.delta()))
ml.save_adapter(model, "twin", base="base")
twin = ml.inspect("twin")

figures.adapter_spectra(seen.modules)

# %% tags=["corpus", "trained"]
lost_by_noise = ml.evaluate(model, held_out)
print(*wrapped(seen.summary()), "", *wrapped(twin.summary()), "", sep="\n")
print(f"loss: base {done.before:.3f}, adapter {done.after:.3f}, twin {lost_by_noise:.3f}")
print()
print("effective rank    adapter    twin   noise (mean of draws)")
for kind in plotting.KINDS:
    ours, its = ([m for m in some.modules if m.kind == kind] for some in (seen, twin))
    row = (np.mean([m.ranks.effective for m in ours]), np.mean([m.ranks.effective for m in its]),
           np.mean([m.noise.effective for m in ours]))  # fmt: skip
    print(f"{kind:15} {row[0]:9.1f} {row[1]:7.1f} {row[2]:7.1f}")


# %% tags=["claims", "corpus", "trained"]
def ratio(m):
    return m.ranks.effective / m.noise.effective


holds(
    "Noise fills its rank better than our training did.",
    all(m.ranks.effective < n.ranks.effective for m, n in zip(seen.modules, twin.modules, strict=True)),
)
holds(
    'and "99 % of the energy takes all eight" is what a random matrix says, too',
    all(spectra.rank_at(np.array(m.singular_values), 0.99) == 8 for m in twin.modules),
)
holds(
    "most of all `down_proj` of the last block and `q_proj` of the first",
    {m.module for m in sorted(seen.modules, key=ratio)[:2]}
    == {"model.layers.2.mlp.down_proj", "model.layers.0.self_attn.q_proj"},
)
holds(
    "$|\\Delta W|$ in every module, and it is worse than no adapter",
    lost_by_noise > done.before
    and all(np.isclose(m.norm, n.norm) for m, n in zip(seen.modules, twin.modules, strict=True)),
)

# %% [markdown]
# Noise fills its rank better than our training did. So a high effective rank is no sign that the rank was
# needed, and "99 % of the energy takes all eight" is what a random matrix says, too. What training has done
# is the *difference* from the dashed line: our spectra fall faster than noise, most of all `down_proj` of the
# last block and `q_proj` of the first. And the loss shows how little a norm says: the twin has the same
# $|\Delta W|$ in every module, and it is worse than no adapter.
#
# ## Two seeds
#
# Is there *one* low-rank change that this text asks for? Then another seed should find it again. It draws
# another $A$ to start from, and other batches. The measure is that of [Hu et al.
# 2021](https://arxiv.org/abs/2106.09685), section 7.2: $\phi(i, i)$ is the share that the first $i$
# directions of one have in common with the first $i$ of the other. Two random subspaces of $i$ directions in
# a space of $D$ dimensions share $i / D$ on average: the dotted lines, of which the lower one is for 256
# dimensions and the upper for 96.

# %% tags=["corpus"]
other = train("other", r=8, seed=1)
two = ml.inspect("r8", against="other")
figures.subspaces(two.modules)

# %% tags=["corpus", "trained"]
mean = {key: np.mean([getattr(m.other, key) for m in two.modules], axis=0)
        for key in ("cosine", "inputs", "random_inputs", "outputs", "random_outputs")}  # fmt: skip
print(f"loss: {done.after:.3f} and {other.after:.3f}")
closest = max(two.modules, key=lambda m: m.other.cosine)
print(f"cosine of the two ΔW, mean over {len(two.modules)} modules: {mean['cosine']:.2f}")
print(f"the largest: {closest.other.cosine:.2f}, {closest.module}")
for i in (1, 8):
    print(f"phi({i}, {i}) of inputs, outputs:    {mean['inputs'][i - 1]:.2f}, {mean['outputs'][i - 1]:.2f}"
          f"   (chance {mean['random_inputs'][i - 1]:.2f}, {mean['random_outputs'][i - 1]:.2f})")  # fmt: skip

start = ml.load()
ml.inject(start, ml.LoraConfig(r=8, alpha=16), rng=np.random.default_rng(0))  # as the first run began
kept = []
for path, layer in adapted(start).items():
    began = np.linalg.qr(layer.adapters[layer.active].A.data.T.astype(float))[0]
    ended = np.linalg.qr(r8.factors(path)[0].T.astype(float))[0]
    kept.append(spectra.similarity(began, ended)[-1, -1])
print(f"rows of A, at the start and at the end of one run: phi(8, 8) {np.mean(kept):.2f}")

# %% tags=["claims", "corpus", "trained"]
widths = {n for m in seen.modules for n in m.shape}
holds("the lower one is for 256 dimensions and the upper for 96", widths == {96, 256} and 8 / 256 < 8 / 96)
holds(
    "The two runs reach the same loss but for some thousandths of a nat", abs(done.after - other.after) < 0.01
)
holds("nearly orthogonal", abs(mean["cosine"]) < 0.2)
holds("quite different changes of rank 8 do as well", {m.r for m in seen.modules} == {8})
holds(
    "The outputs agree more than the inputs do.", all(mean["outputs"][i] > mean["inputs"][i] for i in (0, 7))
)
holds("about half of what $A$ reads is still what it read before training", 0.4 < np.mean(kept) < 0.65)
holds(
    "is also where the cosine of the two $\\Delta W$ is largest",
    max(two.modules, key=lambda m: m.other.cosine).module == module,
)

# %% [markdown]
# The two runs reach the same loss but for some thousandths of a nat, and their $\Delta W$ are nearly
# orthogonal. So this text does not ask for one subspace that every run would find: quite different changes of
# rank 8 do as well. The outputs agree more than the inputs do. The last line fits that: about half of what
# $A$ reads is still what it read before training, and that was drawn at random. `down_proj` of the last
# block, which stood out above, is also where the cosine of the two $\Delta W$ is largest.
#
# ## Smaller
#
# The best approximation of rank $k$ keeps the first $k$ singular values (Eckart and Young 1936), and what it
# loses is known before it is made: $|\Delta W - \Delta W_k|^2 = \sum_{i > k} s_i^2$. `ml.compress` writes it.
# With `per_module=True` the same number of parameters is spent where a singular value brings most: after one
# direction for each module, by $s_i^2 / (O + I)$, the largest first. Beside them stand adapters that were
# trained at the smaller rank from the beginning, with the same recipe.

# %% tags=["corpus", "trained"]
trained = {r: train(f"trained-at-{r}", r).after for r in (1, 4)} | {8: done.after}
smaller = {k: ml.compress("r8", f"common-{k}", rank=k) for k in (1, 2, 4, 6, 8)}
by_module = {k: ml.compress("r8", f"by-module-{k}", rank=k, per_module=True) for k in smaller}


def loss(adapter):
    """The held-out loss with an adapter's folder, merged."""
    model = ml.load()
    ml.load_adapter(model, adapter)
    ml.merge(model)
    return ml.evaluate(model, held_out)


cut, spread = ({k: loss(f"{how}-{k}") for k in smaller} for how in ("common", "by-module"))
print("rank   parameters   energy kept   loss: one rank   by module   trained there")
for k, small in smaller.items():
    line = f"{k:4}   {small.parameters:10,} {1 - small.optimum**2:13.0%} {cut[k]:16.3f} {spread[k]:11.3f}"
    print(line + (f"{trained[k]:16.3f}" if k in trained else ""))

# %% tags=["claims", "corpus", "trained"]
holds(
    "what it loses is known before it is made",
    all(abs(small.residual - small.optimum) < 1e-6 for small in smaller.values()),
)
holds(
    "the same number of parameters is spent",
    all(0.99 < s.parameters / smaller[k].parameters <= 1 for k, s in by_module.items()),
)
gain = done.before - done.after
holds("Half of the directions cost a tenth of the gain", 0.05 < (cut[4] - done.after) / gain < 0.15)
holds("with one left more than half of it is lost", (cut[1] - done.after) / gain > 0.5)
better = {k: cut[k] - spread[k] for k in (2, 4, 6)}
holds("Ranks by module help, by some thousandths of a nat", all(0 < x < 0.01 for x in better.values()))
holds("far less than training at that rank", better[4] < (cut[4] - trained[4]) / 4)
holds("At both ranks it was better to train there", all(trained[k] < cut[k] - 0.005 for k in (1, 4)))
says("this recipe and {} steps", common["steps"])

# %% [markdown]
# Half of the directions cost a tenth of the gain, and with one left more than half of it is lost. Ranks by
# module help, by some thousandths of a nat: far less than training at that rank. At both ranks it was better
# to train there than to cut down to them. That is a finding for this recipe and 80 steps, and no law; but
# compression is for an adapter that you have and cannot train again.

# %% [markdown]
# ## Exercises
#
# Write your answer in place of `None`, and run that cell and the one below it. A wrong answer gets a hint.
# [The solutions, and what is often answered instead](solutions/11_under_the_microscope.md).


# %% tags=["exercise"]
# Write the line.
def lost(A, B, s, k):
    """|ΔW - ΔW_k|, the norm of what is lost when ΔW = s B A is cut to rank k; A (r, I), B (O, r)."""
    return None  # your lines in place of this one


# %% tags=["check"]
def check():
    """Your answer on singular values that are known, and beside the report of the package."""
    rng = np.random.default_rng(5)
    U, V = (np.linalg.qr(rng.standard_normal((n, 3)))[0] for n in (9, 12))
    B, A = U * [4.0, 3.0, 2.0], V.T  # singular values 4, 3, 2
    mine = given(lost(A, B, 1.0, 1))
    assert not np.isclose(mine, 13), "almost: this is the square; the norm is its root"
    assert not np.isclose(mine, 5.0), "3 + 2 is the sum of what is left out; the norm adds squares"
    assert not np.isclose(mine, 3.0), "3 is the largest that is left out: the optimum in the spectral norm"
    assert not np.isclose(mine, 2.0), "one value too few is counted as lost: only the first k are kept"
    assert not np.isclose(mine, 4.0), "this is what is kept, not what is lost"
    assert np.isclose(mine, np.sqrt(13)), "values 4, 3, 2 cut to rank 1: the root of 9 + 4 is lost"
    assert np.isclose(lost(A, B, 2.0, 1), 2 * np.sqrt(13)), "with scale 2 twice as much is lost"
    model = ml.load()
    ml.inject(model, ml.LoraConfig(r=4, alpha=3, init="both"), rng=rng)
    with tempfile.TemporaryDirectory() as folder:
        ml.save_adapter(model, f"{folder}/drawn")
        report = ml.compress(f"{folder}/drawn", f"{folder}/cut", rank=2)
        for row in report.rows:
            A, B = (x.astype(float) for x in ml.open_adapter(f"{folder}/drawn").factors(row.module))
            assert np.isclose(lost(A, B, 0.75, 2), row.optimum), f"not what is lost of {row.module}"
    return f"and equal to the report of ml.compress for all {len(report.rows)} modules"


verdict(check)


# %% tags=["exercise"]
# Predict, then run.
def twice_alpha():
    """The factors of an adapter stay as they are, and lora_alpha in its config is doubled, from 16 to 32.
    By what is the effective rank of its modules multiplied?
    """
    return None  # your guess, a number, in place of None


# %% tags=["check"]
def check():
    """Your guess beside an adapter that is drawn at random and read with either alpha."""
    model = ml.load()
    ml.inject(model, ml.LoraConfig(r=8, alpha=16, init="both"), rng=np.random.default_rng(4))
    with tempfile.TemporaryDirectory() as folder:
        ml.save_adapter(model, f"{folder}/drawn")
        one, two = (ml.inspect(f"{folder}/drawn", alpha=alpha) for alpha in (16, 32))
    ratios = [n.ranks.effective / m.ranks.effective for m, n in zip(one.modules, two.modules, strict=True)]
    hints = {
        2: f"every singular value doubles, and |ΔW| became {two.norm / one.norm:.0f} times as large; and p?",
        4: "the energy is 4 times as large; but look at p in the table of the columns",
        0.5: "a larger scale makes nothing smaller here: what becomes of p?",
        8: "8 is the rank; asked is what the effective rank is multiplied with",
    }
    otherwise = "no: write down p before and after; what cancels?"
    predicted(twice_alpha(), np.mean(ratios), hints, otherwise, 0.01)
    return f"|ΔW| became {two.norm / one.norm:.0f} times as large, and no share of it has changed"


verdict(check)


# %% tags=["exercise"]
# Change, and explain.
def other_factors(A, B, R):
    """R⁻¹ A (r, I) and B R (O, r), for an invertible R (r, r); and what one can read from A and B alone.

    a: |A| and |B| say how far training has moved the adapter.
    b: nothing of the kind: only B A is the change, and its factors can have any size.
    c: their rank: another R changes the singular values of ΔW.
    """
    return None, None  # your pair, and the letter that the numbers support


# %% tags=["check"]
def check():
    """Your answer on one pair of factors, then put into every module of an adapter that is inspected."""
    rng = np.random.default_rng(6)
    R = rng.standard_normal((8, 8)) + 4 * np.eye(8)
    A, B = rng.standard_normal((8, 12)), rng.standard_normal((9, 8))
    answer, letter = given(other_factors(A, B, R))
    shapes = [np.shape(x) for x in answer]
    assert shapes == [A.shape, B.shape], f"shapes {shapes}; expected those of A and B, in this order"
    assert not np.allclose(answer[0], A), "A is still the same"
    assert not np.allclose(answer[0], R @ A), "A is multiplied with R, not with its inverse"
    assert np.allclose(R @ answer[0], A), "the first is not R⁻¹ A: R times it should give A again"
    assert np.allclose(answer[1], B @ R), "the second is not B R"
    model = ml.load()
    ml.inject(model, ml.LoraConfig(r=8, alpha=16, init="both"), rng=rng)
    with tempfile.TemporaryDirectory() as folder:
        ml.save_adapter(model, f"{folder}/before")
        ratios = []
        for layer in adapted(model).values():
            pair = layer.adapters[layer.active]
            (A, B), _ = other_factors(pair.A.data.astype(float), pair.B.data.astype(float), R)
            ratios.append(np.linalg.norm(A) / np.linalg.norm(pair.A.data))
            pair.A.data, pair.B.data = A.astype(np.float32), B.astype(np.float32)
        ml.save_adapter(model, f"{folder}/after")
        seen, again = (ml.inspect(f"{folder}/{name}") for name in ("before", "after"))
    for m, n in zip(seen.modules, again.modules, strict=True):
        assert np.allclose(m.singular_values, n.singular_values, rtol=1e-3), f"another spectrum in {m.module}"
    hints = {
        "a": f"|A| is now {min(ratios):.2f} to {max(ratios):.2f} times what it was, and ΔW is the same",
        "c": f"all {sum(m.r for m in seen.modules)} singular values are the same as before",
    }
    chosen(letter, "b", hints)
    return f"|A| became {min(ratios):.2f} to {max(ratios):.2f} of what it was, and no singular value moved"


verdict(check)

# %% [markdown]
# ## To take along
#
# - Look at $\Delta W$, never at $A$ and $B$ alone, and put noise beside every number: a flat spectrum is what
#   noise shows, too.
# - Two seeds reach one loss with different $\Delta W$. Directions that only one run has are no finding.
# - Compressing loses the Eckart-Young tail and no more; what that does to the loss has to be measured. Here
#   training at the smaller rank was better.
#
# Next: [Reading an adapter against its base](12_against_its_base.ipynb).

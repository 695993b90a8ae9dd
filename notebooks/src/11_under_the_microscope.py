# %% [markdown]
# # An adapter under the microscope
#
# **What you will see.** An adapter that is trained here and written as a file like any other; what its
# singular values say, and what they do not; what is left of it when it is made smaller; an adapter that is
# taken out of a full fine-tuning; and what rounding costs when it is merged. Beside every measure stands what
# noise would show in its place.
#
# **What you need.** The first lesson, [LoRA from one equation](2_lora_from_one_equation.ipynb), and the
# singular values of the third, [Which rank?](4_which_rank.ipynb)
#
# **Contents.** An adapter in a folder · What the columns mean · A flat spectrum · Beside the base · Intruders
# · Two seeds · Smaller · One budget, many ranks · From two checkpoints · Merged and rounded · The same on a
# pretrained model of 135 million parameters · Exercises · To take along

# %% tags=["first", "unkept"]
missing = absent("gguf", "tokenizers")

# %% tags=["imports"]
import json
import os
import tempfile

import numpy as np

import minilora as ml
from minilora import finetune, spectra
from minilora.analysis import figures, inspect, plotting
from minilora.analysis.tables import wrapped
from minilora.data import corpora
from minilora.errors import MiniloraError
from minilora.experiments import rank_figures
from minilora.formats import huggingface
from minilora.formats.safetensors import stored
from minilora.lora import adapted
from minilora.table import Table

home = tempfile.TemporaryDirectory()
os.chdir(home.name)  # what is written below is gone when the kernel is

# %% [markdown]
# ## An adapter in a folder
#
# `finetune.run` is what `minilora train` calls: a base, a text, a recipe, and a folder to write. Here the
# base is the one that ships, and the text is the First Folio, Shakespeare in the spelling of 1623. The loss
# is in nats per character, on plays that neither base nor adapter was trained on.

# %% tags=["corpus", "trained"]
text = corpora.corpus_or_fallback("folio")
name = "stdlib" if text.source.startswith("fallback") else "folio"
held_out = ml.eval_batches(text.test, batch_size=16, length=128, limit=64 * 128)


common = dict(data=name, steps=80, batch=8, length=128, eval_every=80, eval_tokens=64 * 128)


def train(out, **how):
    return finetune.run(finetune.Recipe(**common, **how), out)


done = train("r8", r=8, alpha=16, lr=1e-2)
print("text:", text.source)
print(f"parameters:          {done.parameters:,}")
print(f"loss of the base:    {done.before:.3f}")
print(f"with the adapter:    {done.after:.3f}")

# %% [markdown]
# The folder is in PEFT's form: a config, and the factors $A$ and $B$ of every adapted module. Nothing else of
# the training is in it, and nothing else is needed below. Whatever we do with this adapter can be done with
# one from elsewhere.

# %%
print(*sorted(os.listdir("r8")))
with open("r8/adapter_config.json", encoding="utf-8") as f:
    config = json.load(f)
for key in ("peft_type", "r", "lora_alpha"):
    print(f"{key:16}{config[key]}")
print(f"{'target_modules':16}{' '.join(sorted(config['target_modules']))}")
r8 = ml.open_adapter("r8")
print(len(r8.tensors), "tensors, the first two:")
for tensor in sorted(r8.tensors)[:2]:
    print(" ", tensor, r8.tensors.shapes[tensor])

# %% [markdown]
# ## What the columns mean
#
# `ml.inspect` reads a folder and computes the singular values $s_1 \ge s_2 \ge \dots$ of every $\Delta W =
# s\,B A$. With the base's name it compares $\Delta W$ with $W$ as well. We look at the last of the three
# blocks; `print(seen)` shows all, as does `minilora inspect r8 --base base`.


# %% tags=["corpus", "trained"]
def show(seen, which, columns=slice(1, None), block="model.layers.2."):
    """Columns of one table of an inspection, for the modules of one block."""
    table = list(inspect.tables(seen))[which]
    rows = [(row[0].removeprefix(block), *row[columns]) for row in table.rows if block in row[0]]
    print(Table((table.head[0], *table.head[columns]), rows))


seen = ml.inspect("r8", base="base")
show(seen, 0, slice(1, 7))
print()
show(seen, 0, slice(7, None))
print()
print(*wrapped(seen.summary()), sep="\n")

# %% tags=["claims", "corpus", "trained"]
holds("We look at the last of the three blocks", len(ml.load().model.layers) == 3)
holds("never above the rank", all(m.ranks.stable <= m.r for m in seen.modules))
holds(
    "Most of these effective ranks are above 7 of 8.",
    np.mean([m.ranks.effective > 7 for m in seen.modules]) > 0.5,
)

# %% [markdown]
# | column | meaning |
# |---|---|
# | $\lvert\Delta W\rvert$ | Frobenius norm: the root of $\sum s_i^2$ |
# | s_1, s_r | the largest singular value and the last |
# | eff. rank | $\exp(-\sum p_i \ln p_i)$ with $p_i = s_i / \sum s_j$: of $k$ equal values it is $k$ |
# | stable | $\sum s_i^2 / s_1^2$, never above the rank; it hardly sees small values |
# | at 90 %, at 99 % | how many singular values hold that share of $\sum s_i^2$ |
# | in brackets | the same of *noise*: of $B A$ with Gaussian $A$ and $B$ of these shapes |
#
# There is no magic in the first columns. Here they are once more for one module, by forming $\Delta W$ and
# decomposing it, which the microscope itself never does.

# %%
module = "model.layers.2.mlp.down_proj"
A, B = r8.factors(module)
S = np.linalg.svd(2.0 * B.astype(float) @ A, compute_uv=False)  # s = alpha / r = 16 / 8
found = next(m for m in seen.modules if m.module == module)
p = S[:8] / S.sum()
print("singular values beyond the eighth are zero:", bool(S[8] < 1e-9 * S[0]))
print("the others are equal:        ", np.allclose(S[:8], found.singular_values))
print("so is |ΔW|:                  ", np.isclose(np.sqrt((S**2).sum()), found.norm))
print("so is the effective rank:    ", np.isclose(np.exp(-(p * np.log(p)).sum()), found.ranks.effective))
print("so is the stable rank:       ", np.isclose((S**2).sum() / S[0] ** 2, found.ranks.stable))

# %% [markdown]
# The whole adapter at a glance: the effective rank as a share of that of noise, and how large $\Delta W$ is
# beside $W$.

# %% tags=["corpus"]
figures.heat_map(seen.modules)

# %% tags=["corpus", "trained"]
print("effective rank in % of noise's, and |ΔW| / |W| in %")
print(f"{'':10}" + "".join(f"{f'block {n}':>14}" for n in range(3)))
for kind in plotting.KINDS:
    row = [m for m in seen.modules if m.kind == kind]
    print(f"{kind:10}" + "".join(
        f"{100 * m.ranks.effective / m.noise.effective:7.0f}{100 * m.base.relative:7.1f}" for m in row
    ))  # fmt: skip

# %% [markdown]
# ## A flat spectrum
#
# Most of these effective ranks are above 7 of 8. Does the adapter use its rank, then? Would it like to have
# more? Let us give noise the same examination: an adapter whose factors are Gaussian, scaled so that each
# $|\Delta W|$ is that of ours. It has never seen a text. We call it the twin.

# %% tags=["corpus", "trained"]
model = ml.load()
ml.inject(model, ml.LoraConfig(r=8, alpha=16, init="both"), rng=np.random.default_rng(7))
norms = {m.module: m.norm for m in seen.modules}
for path, layer in adapted(model).items():
    pair = layer.adapters[layer.active]
    pair.B.data = pair.B.data * np.float32(
        norms[path] / np.linalg.norm(spectra.singular_values(pair.change(None)))
    )
ml.save_adapter(model, "twin", base="base")

twin = ml.inspect("twin", base="base")
print(*wrapped(seen.summary()), "", *wrapped(twin.summary()), sep="\n")
print()
print(f"loss: base {done.before:.3f}, adapter {done.after:.3f}, twin {ml.evaluate(model, held_out):.3f}")

# %% tags=["corpus"]
figures.adapter_spectra(seen.modules)

# %% tags=["corpus", "trained"]
print("effective rank    adapter    twin   noise (mean of draws)")
for kind in plotting.KINDS:
    ours, its = ([m for m in some.modules if m.kind == kind] for some in (seen, twin))
    row = (np.mean([m.ranks.effective for m in ours]), np.mean([m.ranks.effective for m in its]),
           np.mean([m.noise.effective for m in ours]))  # fmt: skip
    print(f"{kind:15} {row[0]:9.1f} {row[1]:7.1f} {row[2]:7.1f}")
print(f"s_8 / s_1, mean {np.mean([m.singular_values[-1] / m.singular_values[0] for m in seen.modules]):9.2f} "
      f"{np.mean([m.singular_values[-1] / m.singular_values[0] for m in twin.modules]):7.2f}")  # fmt: skip


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
lost_by_noise = ml.evaluate(model, held_out)
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
# ## Beside the base
#
# With the base at hand there are three more questions. Each has an answer that chance would give, and the
# twin shows how far single modules scatter about it.
#
# - **How large is the change?** $|\Delta W| / |W|$. Noise can have any size, so chance has no value here.
# - **How much stronger than $W$ is $\Delta W$ along its own directions?** With $\Delta W = U S V^\top$ it
#   *amplifies* by $|\Delta W| / |U^\top W V|$ (Hu et al. 2021, section 7.3). Random directions give
#   $|\Delta W| / |W|$ times $\sqrt{O I} / r$.
# - **Does it write where $W$ writes?** The *overlap* $\phi(r, r)$ is the share of the outputs of $\Delta W$
#   that lies among the first $r$ left singular vectors of $W$. Random ones: $r / O$.

# %% tags=["corpus", "trained"]
print("the adapter")
show(seen, 1)
print()
print("the twin")
show(twin, 1)

# %% tags=["corpus", "trained"]
print(f"the value over that of chance, {len(seen.modules)} modules      least    mean   greatest")
for what, value in (
    ("amplification", lambda b: b.amplification / b.random_amplification),
    ("overlap", lambda b: b.overlap / b.random_overlap),
):
    for who, some in (("adapter", seen), ("twin", twin)):
        ratios = [value(m.base) for m in some.modules]
        print(f"{what:14} {who:27} {min(ratios):8.2f} {np.mean(ratios):7.2f} {max(ratios):10.2f}")

# %% tags=["claims", "corpus", "trained"]
near_four = [m.base for m in seen.modules if abs(m.base.amplification - 4) < 0.5]
holds(
    "An amplification of 4 sounds like much. Random directions would give about the same",
    near_four and all(0.8 < b.amplification / b.random_amplification < 1.25 for b in near_four),
)
holds("random directions give some 350 there (6.91 / 0.02 in its Table 7)", round(6.91 / 0.02, -1) == 350)
of_chance = [
    x
    for m in twin.modules
    for x in (m.base.amplification / m.base.random_amplification, m.base.overlap / m.base.random_overlap)
]
says("The twin scatters between {:.1f} and {:.1f} times chance", min(of_chance), max(of_chance))
holds("So one module at 1.2 is no finding.", max(of_chance) > 1.2)
last = next(m.base for m in seen.modules if m.module == module)
holds(
    "an overlap of more than twice chance, and half of chance's amplification",
    last.overlap > 2 * last.random_overlap and 0.4 < last.amplification / last.random_amplification < 0.6,
)
holds(
    "What stands out is `down_proj` of the last block",
    last.overlap / last.random_overlap == max(m.base.overlap / m.base.random_overlap for m in seen.modules),
)
holds("an overlap of 0.1 are what noise shows, too", max(m.base.overlap for m in twin.modules) > 0.1)
holds("A flat spectrum, an amplification of 4", max(m.base.amplification for m in twin.modules) > 4)

# %% [markdown]
# An amplification of 4 sounds like much. Random directions would give about the same, for the base is not
# strong along them either. The factor 21.5 in the paper's section 7.3 is to be read in the same way: random
# directions give some 350 there (6.91 / 0.02 in its Table 7). Below chance means that $\Delta W$ works where
# $W$ is already stronger than on average.
#
# The twin scatters between 0.8 and 1.4 times chance, with nothing learned. So one module at 1.2 is no
# finding. What stands out is `down_proj` of the last block: an overlap of more than twice chance, and half of
# chance's amplification. In its last map this adapter works, more than noise would, where the base is strong.
#
# ## Intruders
#
# An *intruder dimension* is a leading singular vector of $W + \Delta W$ that resembles none of $W$
# (Shuttleworth et al. 2024): its largest $|\cos|$ with those of $W$ is small. How small? Any unit vector
# resembles one of the vectors of an orthonormal basis a little, and the more so the smaller the space.

# %%
rng = np.random.default_rng(0)
print("    D   99 % of random vectors are below   random vectors above 0.5")
for D in (16, 32, 96, 576, 4096):
    x = np.abs(rng.standard_normal((1000, D)))
    cosines = x.max(1) / np.linalg.norm(x, axis=1)
    print(f"{D:5}   {spectra.intruder_threshold(D):33.2f}   {(cosines > 0.5).mean():24.0%}")

# %% tags=["corpus", "trained"]
print(f"the first 10 vectors of W + ΔW in {len(seen.modules)} modules: how many look like intruders")
for who, some in (("adapter", seen), ("twin", twin)):
    cosines = [c for m in some.modules for c in m.base.cosines]
    found = sum(m.base.intruders for m in some.modules)
    print(f"{who:8}  below 0.5: {sum(c < 0.5 for c in cosines):3}    below the threshold: {found:3}"
          f"    of {len(cosines)}")  # fmt: skip

# %% tags=["claims", "corpus", "trained"]
x = np.abs(np.random.default_rng(1).standard_normal((1000, 16)))
holds(
    "A fixed 0.5 has no meaning of its own. With 16 dimensions most random vectors pass it",
    (x.max(1) / np.linalg.norm(x, axis=1) > 0.5).mean() > 0.5,
)
holds(
    "With 4096 a cosine of 0.3 is already four times what chance reaches",
    4 < 0.3 / spectra.intruder_threshold(4096) < 5,
)
x = np.abs(np.random.default_rng(2).standard_normal((4000, 96)))
holds(
    "the value that 99 % of random vectors stay below",
    abs((x.max(1) / np.linalg.norm(x, axis=1) < spectra.intruder_threshold(96)).mean() - 0.99) < 0.01,
)
under = [sum(m.base.intruders for m in some.modules) for some in (seen, twin)]
half = [sum(c < 0.5 for m in some.modules for c in m.base.cosines) for some in (seen, twin)]
holds(
    "By that measure this adapter has a few intruders and the twin none.", 0 < under[0] < 10 and under[1] == 0
)
holds("By 0.5 both would have some.", min(half) > 0)

# %% [markdown]
# A fixed 0.5 has no meaning of its own. With 16 dimensions most random vectors pass it, so hardly anything
# could ever be called an intruder. With 4096 a cosine of 0.3 is already four times what chance reaches, a
# clear resemblance, and still "an intruder" by that number. The threshold here is the value that 99 % of
# random vectors stay below: what is under it resembles the base no more than chance does. By that measure
# this adapter has a few intruders and the twin none. By 0.5 both would have some.
#
# ## Two seeds
#
# Is there *one* low-rank change that this text asks for? Then another seed should find it again. It draws
# another $A$ to start from, and other batches; all else is the same. The measure is that of section 7.2 of
# the paper: $\phi(i, i)$ is the share that the first $i$ directions of one have in common with the first $i$
# of the other. Two random subspaces of $D$ dimensions have $i / D$ in common on the mean: the dotted lines
# below, of which the lower one is for 256 dimensions and the upper for 96.

# %% tags=["corpus", "trained"]
other = train("other", r=8, alpha=16, lr=1e-2, seed=1)
pair = ml.inspect("r8", against="other")
print(f"loss: {done.after:.3f} and {other.after:.3f}")
show(pair, 1)

# %% tags=["corpus"]
figures.subspaces(pair.modules)

# %% tags=["corpus", "trained"]
mean = {key: np.mean([getattr(m.other, key) for m in pair.modules], axis=0)
        for key in ("cosine", "inputs", "random_inputs", "outputs", "random_outputs")}  # fmt: skip
print(f"mean over {len(pair.modules)} modules")
print(f"cosine of the two ΔW:             {mean['cosine']:.2f}")
for i in (1, 8):
    print(f"phi({i}, {i}) of inputs, outputs:    {mean['inputs'][i - 1]:.2f}, {mean['outputs'][i - 1]:.2f}"
          f"   (chance {mean['random_inputs'][i - 1]:.2f}, {mean['random_outputs'][i - 1]:.2f})")  # fmt: skip

start = ml.load()
ml.inject(start, ml.LoraConfig(r=8, alpha=16), rng=np.random.default_rng(0))  # as the first run began
kept, chance = [], []
for path, layer in adapted(start).items():
    began = np.linalg.qr(layer.adapters[layer.active].A.data.T.astype(float))[0]
    ended = np.linalg.qr(r8.factors(path)[0].T.astype(float))[0]
    kept.append(spectra.similarity(began, ended)[-1, -1])
    chance.append(8 / len(began))
print(f"rows of A, at the start and at the end of one run: phi(8, 8) {np.mean(kept):.2f}"
      f"   (chance {np.mean(chance):.2f})")  # fmt: skip

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
    "is also where the two runs have most in common",
    max(pair.modules, key=lambda m: m.other.cosine).module == module,
)

# %% [markdown]
# The two runs reach the same loss but for some thousandths of a nat, and their $\Delta W$ are nearly
# orthogonal. So this text does not ask for one subspace that every run would find: quite different changes of
# rank 8 do as well. The outputs agree more than the inputs do. The last line fits that: about half of what
# $A$ reads is still what it read before training, and that was drawn at random. `down_proj` of the last
# block, which stood out above, is also where the two runs have most in common.
#
# Beware of the same when you compare two adapters that began from one seed: what is left of their common
# start looks like agreement.
#
# ## Smaller
#
# The best approximation of rank $k$ keeps the first $k$ singular values (Eckart and Young 1936), and what it
# loses is known before it is made: $|\Delta W - \Delta W_k|^2 = \sum_{i > k} s_i^2$. `ml.compress` writes it
# and measures what it has really lost. At full rank that is rounding.


# %% tags=["corpus", "trained"]
def loss(adapter):
    """The held-out loss with an adapter's folder, merged."""
    model = ml.load()
    ml.load_adapter(model, adapter)
    ml.merge(model)
    return ml.evaluate(model, held_out)


smaller = {k: ml.compress("r8", f"r8-to-{k}", rank=k) for k in range(1, 9)}
cut = {k: loss(f"r8-to-{k}") for k in smaller}
print("at full rank the residual is below 1e-6 of |ΔW|:", smaller[8].residual < 1e-6)
print("rank   parameters   residual   Eckart-Young    loss")
for k, small in smaller.items():
    rounded = 0 if k == 8 else small.residual
    print(f"{k:4}   {small.parameters:10,} {rounded:10.3f} {small.optimum:14.3f} {cut[k]:7.3f}")

# %% [markdown]
# The residual is the optimum, to the digits shown. Whether that is *good* is another question, and the loss
# answers it. Beside it we put adapters that were trained at the smaller rank from the beginning, with the
# same recipe. (Its learning rate is what the sweep of the third lesson chose at each of these ranks.)

# %% tags=["corpus", "trained"]
trained = {r: train(f"trained-at-{r}", r=r, alpha=16, lr=1e-2).after for r in (1, 2, 4)}
trained[8] = done.after


@plotting.styled
def draw():
    figure, ((ax,),) = plotting.axes()
    rank_figures.level(ax, done.before, "frozen base", plotting.GREY, ":", above=False)
    ax.plot(list(cut), list(cut.values()), color=plotting.ORANGE, marker="s", linestyle="--",
            label="trained at r = 8, cut to rank k")  # fmt: skip
    ax.plot(list(trained), list(trained.values()), color=plotting.BLUE, marker="o", label="trained at rank k")
    ax.set_xticks(range(1, 9))
    ax.set(xlabel="rank k", ylabel=f"held-out loss ({rank_figures.NATS})")
    ax.legend(loc="center right")
    return plotting.Picture(
        figure,
        "Held-out loss against rank. Adapters trained at ranks 1, 2 and 4 lie below the adapter of rank 8 "
        "that was cut to these ranks; the distance shrinks as the rank grows.",
    )


draw()

# %% tags=["corpus", "trained"]
gain = done.before - done.after
print("rank   energy kept   of the gain: cut   trained at that rank")
for k in (1, 2, 4, 8):
    shares = 1 - smaller[k].optimum ** 2, (done.before - cut[k]) / gain, (done.before - trained[k]) / gain
    print(f"{k:4} {shares[0]:13.0%} {shares[1]:18.0%} {shares[2]:22.0%}")

# %% tags=["claims", "corpus", "trained"]
holds(
    "The residual is the optimum, to the digits shown.",
    all(abs(small.residual - small.optimum) < 1e-6 for small in smaller.values()),
)
swept = (LESSONS.parent / "figures" / "rows.jsonl").read_text(encoding="utf-8").splitlines()
swept = [json.loads(line)["config"] for line in swept]
holds(
    "Its learning rate is what the sweep of the third lesson chose at each of these ranks.",
    {
        c["lr"]
        for c in swept
        if c["kind"] == "final" and c["target"] == "folio" and c["method"] == "lora" and c["rank"] in trained
    }
    == {1e-2},
)
holds("can go for some thousandths of a nat", 0.0005 < cut[7] - cut[8] < 0.01)
holds("half of them cost a tenth of the gain", 0.05 < (cut[4] - done.after) / gain < 0.15)
holds("with one left more than half of it is lost", (cut[1] - done.after) / gain > 0.5)
jumps = -np.diff([done.before, *cut.values()])
holds("Nowhere does the loss jump", (np.diff(jumps) < 0).all())
better = [cut[k] - trained[k] for k in (1, 2, 4)]
holds("at the three smaller ranks it was better to train there", min(better) > 0)
holds("Adapters trained at ranks 1, 2 and 4 lie below the adapter of rank 8", min(better) > 0)
holds("the distance shrinks as the rank grows", better == sorted(better, reverse=True))
says("this recipe and {} steps", common["steps"])

# %% [markdown]
# The last direction of each module can go for some thousandths of a nat; half of them cost a tenth of the
# gain, and with one left more than half of it is lost. Nowhere does the loss jump: spectra without a gap have
# no natural place for a cut.
#
# And at the three smaller ranks it was better to train there than to cut down to them. That is a finding for
# this task, this recipe and 80 steps, and no law. But it says what to try first, if you know the rank that
# you can afford. Compression is for an adapter that you have and cannot train again.
#
# ## One budget, many ranks
#
# A rank for all modules is simple. With `per_module=True` no more parameters are spent, but where a singular
# value brings most: after one direction for each, by $s_i^2 / (O + I)$, the largest first.

# %% tags=["corpus", "trained"]
print("          parameters           residual            loss")
print("rank    common  by module   common  by module   common  by module   ranks")
by_module = {k: ml.compress("r8", f"r8-by-module-{k}", rank=k, per_module=True) for k in (1, 2, 4, 6)}
for k, small in by_module.items():
    ranks = sorted(row.rank for row in small.rows)
    print(
        f"{k:4}  {smaller[k].parameters:8,} {small.parameters:9,} {smaller[k].residual:9.3f} "
        f"{small.residual:9.3f} {cut[k]:9.3f} {loss(f'r8-by-module-{k}'):9.3f}    {ranks[0]} to {ranks[-1]}"
    )

# %% tags=["claims", "corpus", "trained"]
holds(
    "no more parameters are spent", all(s.parameters <= smaller[k].parameters for k, s in by_module.items())
)
one, first = by_module[1], smaller[1]
holds(
    "At rank 1 there is nothing to choose",
    (one.parameters, one.residual) == (first.parameters, first.residual),
)
several = {k: (s, loss(f"r8-by-module-{k}")) for k, s in by_module.items() if k > 1}
holds(
    "The residual becomes smaller",
    all(s.residual < smaller[k].residual - 0.01 for k, (s, _) in several.items()),
)
better = {k: cut[k] - after for k, (_, after) in several.items()}
holds("The loss follows, but by some thousandths of a nat", all(0 < x < 0.01 for x in better.values()))
holds(
    "far less than the distance to an adapter trained at that rank",
    all(better[k] < (cut[k] - trained[k]) / 4 for k in (2, 4)),
)

# %% [markdown]
# The residual becomes smaller: it is what the ranks are chosen for. The loss follows, but by some thousandths
# of a nat, far less than the distance to an adapter trained at that rank. (At rank 1 there is nothing to
# choose: one direction for each is all.) The Frobenius norm is not the loss.
#
# ## From two checkpoints
#
# Someone has fine-tuned a whole model and published it. What did they change? `ml.extract` takes the
# difference of two checkpoints and writes the LoRA that is nearest to it. First we make such a model: full
# fine-tuning with the same batches.

# %% tags=["corpus", "trained"]
full = train("tuned", method="full", lr=1e-3)
difference = spectra.spectrum_between(ml.load(), ml.load("tuned"))
maps = {path: S for path, S in difference.items() if path != "model.embed_tokens"}
norm = np.sqrt(sum((S**2).sum() for S in maps.values()))
print(f"loss: base {full.before:.3f}, tuned {full.after:.3f}, LoRA with r = 8 {done.after:.3f}")
print(f"parameters: {full.parameters:,} and {done.parameters:,}")
print(f"|ΔW| of all maps: {norm:.1f} and {seen.norm:.1f}")


# %% tags=["corpus"]
def mean_of(kind):
    return np.mean([S for path, S in maps.items() if path.endswith(kind)], axis=0)


@plotting.styled
def draw():
    figure, ((ax,),) = plotting.axes()
    looks = (("q_proj", plotting.BLUE, "-"), ("down_proj", plotting.ORANGE, "--"))
    for kind, colour, line in looks:
        S = mean_of(kind)
        shape = next(m.shape for m in seen.modules if m.kind == kind)
        noise = np.linalg.norm(S) * spectra.noise_spectrum(shape, np.random.default_rng(0))
        ax.plot(range(1, len(S) + 1), S, color=colour, linestyle=line, label=kind)
        ax.plot(range(1, len(S) + 1), noise, color=colour, linestyle=":", label=f"{kind}, noise of that norm")
    ax.axvline(8, color=plotting.GREY, linewidth=0.8)
    ax.annotate("index 8", (8, 0), xytext=(4, 4), textcoords="offset points", color=plotting.GREY)
    ax.set(xlabel="index", ylabel="singular value of ΔW", xlim=(0, 97), ylim=(0, None))
    ax.legend()
    return plotting.Picture(
        figure,
        "Singular values of the change by full fine-tuning, mean over blocks. The first ones lie above those "
        "of Gaussian noise of the same norm, and then they fall slowly: most of them come after index 8.",
    )


draw()

# %% tags=["corpus", "trained"]
shapes = {m.kind: m.shape for m in seen.modules}
print("full fine-tuning   effective rank  (noise)   for 90 % of the energy  (noise)   first 8 hold")
for kind in plotting.KINDS:
    some = [S for path, S in maps.items() if path.endswith(kind)]
    noise = spectra.noise_spectrum(shapes[kind], np.random.default_rng(0))
    print(
        f"{kind:16} {np.mean([spectra.effective_rank(S) for S in some]):16.0f} "
        f"{f'({spectra.effective_rank(noise):.0f})':>8} "
        f"{np.mean([spectra.rank_at(S, 0.9) for S in some]):24.0f} "
        f"{f'({spectra.rank_at(noise, 0.9)})':>8} "
        f"{np.mean([spectra.energy(S)[7] for S in some]):14.0%}"
    )

# %% tags=["claims", "corpus", "trained"]
lies_above = [
    np.mean([S[0] for path, S in maps.items() if path.endswith(kind)])
    > np.mean([np.linalg.norm(S) for path, S in maps.items() if path.endswith(kind)])
    * spectra.noise_spectrum(shapes[kind], np.random.default_rng(0))[0]
    for kind in plotting.KINDS
]
holds("The first directions stand out from noise", all(lies_above))
holds("The first ones lie above those of Gaussian noise of the same norm", all(lies_above))
nine = [mean_of(kind)[8:].sum() / mean_of(kind).sum() for kind in ("q_proj", "down_proj")]
holds("most of them come after index 8", len(mean_of("q_proj")) > 16 and min(nine) > 0.5)
holds("this change is not of low rank", min(spectra.effective_rank(S) for S in maps.values()) > 40)

# %% [markdown]
# The first directions stand out from noise, and a long tail comes after them: this change is not of low rank.
# What does a LoRA of rank $r$ keep of it?

# %% tags=["corpus", "trained"]
print("   r   parameters   residual    loss")
extracted = {}
for r in (1, 4, 8, 16, 32, 64, 96):
    extracted[r] = row = ml.extract("base", "tuned", f"extracted-{r}", rank=r)
    print(f"{r:4}   {row.parameters:10,} {row.residual:10.3f} {loss(f'extracted-{r}'):7.3f}")
print(f"tuned  {full.parameters:10,} {'':10} {full.after:7.3f}")
print(f"LoRA trained at r = 8 {'':11} {done.after:7.3f}")
print()
print("left out, for a LoRA on linear maps cannot hold it: |change| of")
table = "model.embed_tokens.weight"
print(f"  the embedding                   {extracted[8].left[table]:.2f}")
print(f"  {len(extracted[8].left) - 1} norms together                "
      f"{np.sqrt(sum(x**2 for key, x in extracted[8].left.items() if key != table)):.2f}")  # fmt: skip


# %% tags=["claims", "corpus", "trained"]
def of_gain(after):
    return (full.before - after) / (full.before - full.after)


says("At $r = 8$ the residual is {:.3f} of", extracted[8].residual)
holds("so less than half of the energy is kept", 1 - extracted[8].residual ** 2 < 0.5)
after = {r: loss(f"extracted-{r}") for r in (8, 32, 96)}
holds("of the gain in loss it is four fifths", 0.75 < of_gain(after[8]) < 0.85)
holds("The adapter *trained* at $r = 8$ is better", done.after < after[8])
holds("with four times its rank the extracted one comes close", 0 < after[32] - done.after < 0.01)
holds(
    "At $r = 96$, the full rank of these maps, nothing is lost of them",
    extracted[96].residual < 1e-5 and {len(S) for S in maps.values()} == {96},
)
holds("the adapter is larger than the model", extracted[96].parameters > full.parameters)
holds("The loss still is not that of the tuned one", after[96] - full.after > 0.005)
holds("is *enough* for most of this gain", of_gain(done.after) > 0.8)

# %% [markdown]
# Three things to see.
#
# - At $r = 8$ the residual is 0.735 of $|\Delta W|$, so less than half of the energy is kept; of the gain in
#   loss it is four fifths. The adapter *trained* at $r = 8$ is better; with four times its rank the extracted
#   one comes close.
# - At $r = 96$, the full rank of these maps, nothing is lost of them, and the adapter is larger than the
#   model. The loss still is not that of the tuned one: embedding and norms have moved, too, and these are not
#   in the file.
# - The trained adapter shows that a change of low rank is *enough* for most of this gain. The spectra show
#   that full fine-tuning made another one, of high rank, of which a LoRA of low rank holds a part.
#
# Merged into the base, the extracted adapter must miss the tuned weights by exactly what was cut off. We
# check it on the files.

# %% tags=["corpus", "trained"]
ml.merge_checkpoint("base", "extracted-8", "merged-8")
base, tuned, merged = (huggingface.weights(folder) for folder in ("base", "tuned", "merged-8"))
keys = [f"{path}.weight" for path in maps]


def distance(one, two):
    return np.sqrt(sum(np.sum((one[key].astype(float) - two[key]) ** 2) for key in keys))


tail = np.sqrt(sum((S[8:] ** 2).sum() for S in maps.values()))
print(f"|tuned - merged| of the maps:    {distance(tuned, merged):.4f}")
print(f"tail of the spectra beyond 8:    {tail:.4f}")
print(f"as a share of |tuned - base|:    {tail / distance(tuned, base):.3f}")
print(f"loss of the merged model:        {ml.evaluate(ml.load('merged-8'), held_out):.3f}")
print(f"loss of the tuned model:         {ml.evaluate(ml.load('tuned'), held_out):.3f}")

# %% tags=["claims", "corpus", "trained"]
holds(
    "must miss the tuned weights by exactly what was cut off",
    np.isclose(distance(tuned, merged), tail, rtol=1e-4),
)

# %% [markdown]
# ## Merged and rounded
#
# Back to our own adapter. [Merging costs nothing](3_merging_costs_nothing.ipynb) but rounding, and the report
# of `merge_checkpoint` says how much: the logits of the merged model against those of base and adapter, once
# in float32 and once in float64. Beside it stands what rounding does *without* merging: one and the same
# model in float32 and in float64.

# %% tags=["corpus", "rounding"]
report = ml.merge_checkpoint("base", "r8", "merged")
print("\n".join(str(report).splitlines()[-5:]))

# %% tags=["corpus"]
print("float32: at most ten times what rounding does without it:", report.float32 < 10 * report.rounding)
print("float64: below 1e-12 of the largest logit:", report.float64 < 1e-12 * report.logits)

# %% [markdown]
# Models are often stored in bfloat16, which has 8 significant bits: neighbours are $2^{-7}$ to $2^{-8}$
# apart, relative to their size. Where a change is smaller than half of that distance, the rounded sum is the
# old weight, and the change is gone. We take the base as bfloat16 holds it, add our $\Delta W$ in full and
# then ten times smaller each time, and round.

# %% tags=["corpus", "trained"]
weights = {
    path: stored(huggingface.weights("base")[f"{path}.weight"], "bfloat16").astype(float) for path in maps
}
changes = {path: 2.0 * B.astype(float) @ A for path in maps for A, B in [r8.factors(path)]}
print("   ΔW times   |ΔW|/|W|    lost of ΔW   weights that stay the same")
rounded = {}
for factor in (1, 0.1, 0.01, 0.001):
    size = missed = same = count = 0
    for path, W in weights.items():
        change = factor * changes[path]
        moved = stored(W + change, "bfloat16") - W
        size, missed = size + np.sum(change**2), missed + np.sum((moved - change) ** 2)
        same, count = same + np.sum(moved == 0), count + W.size
    relative = np.sqrt(size / sum(np.sum(W**2) for W in weights.values()))
    rounded[factor] = relative, np.sqrt(missed / size), same / count
    print(f"{factor:11} {relative:10.5f} {np.sqrt(missed / size):13.1%} {same / count:28.0%}")
half = ml.merge_checkpoint("base", "r8", "half", dtype="bfloat16")
print()
print(f"whole adapter, written in bfloat16: lost {min(row.lost for row in half.rows):.2%} "
      f"to {max(row.lost for row in half.rows):.2%} of |ΔW|, by module")  # fmt: skip
print(f"loss: {ml.evaluate(ml.load('merged'), held_out):.3f} in float32, "
      f"{ml.evaluate(ml.load('half'), held_out):.3f} in bfloat16")  # fmt: skip

# %% tags=["claims", "corpus", "trained"]
one = np.arange(256, 512) / 256  # what eight significant bits can tell apart between 1 and 2
holds(
    "bfloat16, which has 8 significant bits: neighbours are $2^{-7}$ to $2^{-8}$ apart",
    np.array_equal(stored(one[::2].astype(np.float32), "bfloat16").astype(float), one[::2])
    and not np.array_equal(stored(one.astype(np.float32), "bfloat16").astype(float), one),
)
holds("add our $\\Delta W$ in full and then ten times smaller each time", [*rounded] == [1, 0.1, 0.01, 0.001])
holds(
    "smaller than half of that distance, the rounded sum is the old weight",
    float(stored(np.float32([1 + 0.49 * 2**-7]), "bfloat16").astype(float)[0]) == 1,
)
holds("is a fifth of $W$", 0.18 < rounded[1][0] < 0.22)
holds("so about a hundredth of it is lost", 0.005 < rounded[1][1] < 0.015)
holds("and the loss does not notice", abs(ml.evaluate(ml.load("half"), held_out) - done.after) < 0.0015)
holds("Of a change a hundred times smaller more than half is lost", rounded[0.01][1] > 0.5)
holds("and of one a thousand times smaller nearly all", rounded[0.001][1] > 0.9)
holds("most weights do not move", rounded[0.001][2] > 0.9)

# %% [markdown]
# Our $\Delta W$ is a fifth of $W$, so about a hundredth of it is lost, and the loss does not notice. Of a
# change a hundred times smaller more than half is lost, and of one a thousand times smaller nearly all: most
# weights do not move. Look at $|\Delta W| / |W|$ before you merge into 16 bits.
#
# ## The same on a pretrained model of 135 million parameters
#
# SmolLM2-135M is a Llama, too, and everything above works on it by its name. It is fetched once, 93 MB. Ten
# steps on a little of the Folio show that it works, and no more than that. Its tokens are pieces of words;
# the loss is in nats per character again, on 1,024 tokens of a play that the adapter was not trained on.
# (SmolLM2 itself may have read it before, in one spelling or another.)

# %% tags=["corpus", "smollm2", "trained"]
large = not missing
if missing:
    print("left out, for it needs", *missing)
else:
    try:
        huggingface.smollm2()
    except MiniloraError as e:
        large = False
        print("left out: SmolLM2-135M is not there and cannot be fetched:", e)
if large:
    with open("little.txt", "w", encoding="utf-8") as f:
        f.write(ml.decode(text.train[:95_000]) + ml.decode(text.test[:5_000]))  # the last 5 % are held out
    recipe = finetune.Recipe("little.txt", base="smollm2", r=4, alpha=16, lr=3e-3, steps=10, batch=2,
                             length=64, warmup=2, eval_every=10, eval_tokens=1024)  # fmt: skip
    ten = finetune.run(recipe, "smollm2-r4")
    deep = ml.inspect("smollm2-r4", base="smollm2", whole=1)  # without intruders, which would take a minute
    print(f"characters per token:   {ten.characters:.2f}")
    print(f"loss per character:     {ten.before / ten.characters:.2f} before, "
          f"{ten.after / ten.characters:.2f} after 10 steps")  # fmt: skip
    print()
    print(*wrapped(deep.summary()), sep="\n")

# %% tags=["corpus", "smollm2"]
figures.heat_map(deep.modules) if large else None

# %% tags=["corpus", "smollm2", "trained"]
if large:
    print("mean over all modules         |ΔW|/|W|   amplification / chance   overlap  (chance)")
    tiny, big = (f"{what} {how} steps" for what, how in
                   (("tiny base, r = 8,", common["steps"]), ("SmolLM2, r = 4,", recipe.steps)))  # fmt: skip
    for who, some in ((tiny, seen), (big, deep)):
        b = [m.base for m in some.modules]
        print(
            f"{who:27} {np.mean([x.relative for x in b]):10.3f} "
            f"{np.mean([x.amplification / x.random_amplification for x in b]):24.2f} "
            f"{np.mean([x.overlap for x in b]):9.3f}   ({np.mean([x.random_overlap for x in b]):.3f})"
        )

# %% tags=["claims", "corpus", "smollm2", "trained"]
if large:
    says("on {:,} tokens of a play that the adapter was not trained on", recipe.eval_tokens)
    holds("Ten steps on a little of the Folio", recipe.steps == 10)
    says(
        "pretrained model of {:.0f} million parameters",
        sum(np.prod(s) for s in huggingface.weights("smollm2").shapes.values()) / 1e6,
    )
    wide = {m.shape[0] for m in deep.modules if m.kind == "q_proj"}
    holds("this one is wider, 576 and not 96", wide == {576} and ml.load().config.hidden_size == 96)
    chance = [np.mean([m.base.random_overlap for m in some.modules]) for some in (deep, seen)]
    holds(
        "chance alone gives an overlap of one hundredth and not of seven",
        [round(100 * x) for x in chance] == [1, 7],
    )
    holds(
        "After ten steps $\\Delta W$ is less than a hundredth of $W$",
        np.mean([m.base.relative for m in deep.modules]) < 0.01,
    )
    holds("and the loss has fallen all the same", ten.after < ten.before)

# %% [markdown]
# What is different from our tiny base: this one is wider, 576 and not 96, and the rank is smaller, so chance
# alone gives an overlap of one hundredth and not of seven; the same number would mean more here. After ten
# steps $\Delta W$ is less than a hundredth of $W$, and the loss has fallen all the same.

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
def overlap_by_chance():
    """A random ΔW of rank 16, beside a W of 64 outputs. Which share of what ΔW writes lies, on the mean,
    among the first 16 left singular vectors of W?

    A guess at most 0.05 off is right.
    """
    return None  # your guess, a number from 0 to 1, in place of None


# %% tags=["check"]
def check():
    """Your guess beside the mean over pairs of random subspaces."""
    rng = np.random.default_rng(6)
    pairs = [[np.linalg.qr(rng.standard_normal((64, 16)))[0] for _ in range(2)] for _ in range(200)]
    found = np.mean([spectra.similarity(U, V)[-1, -1] for U, V in pairs])
    hints = {
        0: "random directions are not orthogonal: in a small space they must share something",
        1: "that would be the same directions",
        1 / 16: "this is its square: 16 of 64 counted for ΔW and once more for W",
    }
    otherwise = "no: a unit vector has a share of each of 64 directions"
    predicted(overlap_by_chance(), found, hints, otherwise, 0.05)
    return f"{found:.3f}, which is r / O = 16 / 64. An overlap says something only beside it"


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
# - Look at $\Delta W$, never at $A$ and $B$ alone, and put noise beside every number. A flat spectrum, an
#   amplification of 4, an overlap of 0.1 are what noise shows, too.
# - Two seeds reach one loss with different $\Delta W$. Directions that only one run has are no finding.
# - Compressing loses the Eckart-Young tail and no more; what that does to the loss has to be measured. Here
#   training at the smaller rank was better.
# - An adapter extracted from a full fine-tuning holds a part of it. That a LoRA is enough for a task does not
#   make the change by full fine-tuning one of low rank.
# - Merging costs rounding. In bfloat16 that is little for a large $\Delta W$ and most of a small one.
#
# Next: [Four bits](7_four_bits.ipynb).

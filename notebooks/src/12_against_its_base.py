# %% [markdown]
# # Reading an adapter against its base
#
# ![](attachment:beside_base.png)
#
# **What you will see.** How much an adapter shares of the directions in which its base writes: of the strong
# ones more than chance would. With the base at hand we ask how large $\Delta W$ is, whether it adds new
# directions, how much of a full fine-tuning it can hold, and what rounding leaves of it.
#
# **What you need.** [Merging costs nothing](3_merging_costs_nothing.ipynb) and [An adapter under the
# microscope](11_under_the_microscope.ipynb).

# %% tags=["first", "unkept"]
missing = absent("gguf", "tokenizers")

# %% tags=["imports"]
import os
import tempfile

import numpy as np

import minilora as ml
from minilora import finetune, spectra
from minilora.analysis import figures, plotting
from minilora.analysis.tables import wrapped
from minilora.data import corpora
from minilora.errors import MiniloraError
from minilora.formats import huggingface
from minilora.formats.safetensors import stored
from minilora.lora import adapted

home = tempfile.TemporaryDirectory()
os.chdir(home.name)  # what is written below is gone when the kernel is

# %% [markdown]
# ## Beside the base
#
# The adapter of the last lesson again, and its twin: noise of the same ranks and norms.

# %% tags=["corpus", "trained"]
text = corpora.corpus_or_fallback("folio")
name = "stdlib" if text.source.startswith("fallback") else "folio"
held_out = ml.eval_batches(text.test, batch_size=16, length=128, limit=64 * 128)
common = dict(data=name, steps=80, batch=8, length=128, eval_every=80, eval_tokens=64 * 128)
done = finetune.run(finetune.Recipe(**common, r=8, alpha=16, lr=1e-2), "r8")
seen = ml.inspect("r8", base="base")

model = ml.load()
ml.inject(model, ml.LoraConfig(r=8, alpha=16, init="both"), rng=np.random.default_rng(7))
for m in seen.modules:
    pair = adapted(model)[m.module].adapters["default"]
    pair.B.data *= np.float32(m.norm / np.linalg.norm(pair.delta()))
ml.save_adapter(model, "twin", base="base")
twin = ml.inspect("twin", base="base")
print(f"loss: {done.before:.3f} before, {done.after:.3f} with the adapter")

# %% [markdown]
# Three questions, and what chance would answer to each:
#
# - **How large is the change?** $|\Delta W| / |W|$. Noise can have any size, so chance has no value here.
# - **How much stronger than $W$ is $\Delta W$ along its own directions?** With $\Delta W = U S V^\top$ it
#   *amplifies* by $|\Delta W| / |U^\top W V|$ (Hu et al. 2021, section 7.3). Random directions give
#   $|\Delta W| / |W|$ times $\sqrt{O I} / r$.
# - **Does it write where $W$ writes?** The *overlap* $\phi(r, r)$ is the share of the outputs of $\Delta W$
#   that lies among the first $r$ left singular vectors of $W$. Random ones: $r / O$.

# %% tags=["corpus", "trained"]
print("block 2     |ΔW|/|W|   amplifies (chance)   overlap (chance)   intruders")
for m in seen.modules[-7:]:
    b = m.base
    print(f"{m.kind:11} {b.relative:8.3f} {b.amplification:11.2f} ({b.random_amplification:.2f})"
          f" {b.overlap:13.3f} ({b.random_overlap:.3f}) {b.intruders:4} of {len(b.cosines)}")  # fmt: skip
print()
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
holds("so one module at 1.2 is no finding", max(of_chance) > 1.2)
module = "model.layers.2.mlp.down_proj"
last = next(m.base for m in seen.modules if m.module == module)
holds(
    "an overlap of more than twice chance, and half of chance's amplification",
    last.overlap > 2 * last.random_overlap and 0.4 < last.amplification / last.random_amplification < 0.6,
)
holds(
    "What stands out is `down_proj` of the last block",
    last.overlap / last.random_overlap == max(m.base.overlap / m.base.random_overlap for m in seen.modules),
)
drawn = ml.inspect(LESSONS.parent / "figures/pictures/adapter", base="base").modules[0].base
holds("of the strong ones more than chance would", drawn.overlap > 1.5 * drawn.random_overlap)
holds("an overlap of 0.1 are what noise shows, too", max(m.base.overlap for m in twin.modules) > 0.1)
holds("An amplification of 4 and", max(m.base.amplification for m in twin.modules) > 4)

# %% [markdown]
# An amplification of 4 sounds like much. Random directions would give about the same, for the base is not
# strong along them either. The factor 21.5 in the paper's section 7.3 is to be read in the same way: random
# directions give some 350 there (6.91 / 0.02 in its Table 7).
#
# The twin scatters between 0.8 and 1.4 times chance, so one module at 1.2 is no finding. What stands out is
# `down_proj` of the last block: an overlap of more than twice chance, and half of chance's amplification.
# There this adapter works where the base is already strong.
#
# ## Intruders
#
# An *intruder dimension* is a leading singular vector of $W + \Delta W$ that resembles none of $W$
# (Shuttleworth et al. 2024): its largest $|\cos|$ with those of $W$ is small. How small? Any unit vector
# resembles one of the vectors of an orthonormal basis a little, and the more so the smaller the space.

# %% tags=["corpus", "trained"]
rng = np.random.default_rng(0)
print("    D   99 % of random vectors are below   random vectors above 0.5")
for D in (16, 96, 576, 4096):
    x = np.abs(rng.standard_normal((1000, D)))
    cosines = x.max(1) / np.linalg.norm(x, axis=1)
    print(f"{D:5}   {spectra.intruder_threshold(D):33.2f}   {(cosines > 0.5).mean():24.0%}")
print()
print(f"the first 10 vectors of W + ΔW in {len(seen.modules)} modules: how many look like intruders")
for who, some in (("adapter", seen), ("twin", twin)):
    cosines = [c for m in some.modules for c in m.base.cosines]
    under = sum(m.base.intruders for m in some.modules)
    print(f"{who:8}  below 0.5: {sum(c < 0.5 for c in cosines):3}    below the threshold: {under:3}"
          f"    of {len(cosines)}")  # fmt: skip

# %% tags=["claims", "corpus", "trained"]
x = np.abs(np.random.default_rng(1).standard_normal((1000, 16)))
holds(
    "A fixed 0.5 has no meaning of its own: with 16 dimensions most random vectors pass it",
    (x.max(1) / np.linalg.norm(x, axis=1) > 0.5).mean() > 0.5,
)
holds(
    "with 4096 a cosine of 0.3 is already four times what chance reaches",
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
# A fixed 0.5 has no meaning of its own: with 16 dimensions most random vectors pass it, and with 4096 a
# cosine of 0.3 is already four times what chance reaches. The threshold here is the value that 99 % of random
# vectors stay below. By that measure this adapter has a few intruders and the twin none. By 0.5 both would
# have some.
#
# ## From two checkpoints
#
# Someone has fine-tuned a whole model and published it. What did they change? `ml.extract` takes the
# difference of two checkpoints and writes the LoRA that is nearest to it. We make such a model, by full
# fine-tuning with the same batches. At full rank the adapter has the spectrum of the whole change; noise is a
# Gaussian matrix here.

# %% tags=["corpus"]
full = finetune.run(finetune.Recipe(**common, method="full", lr=1e-3), "tuned")
extracted = {r: ml.extract("base", "tuned", f"extracted-{r}", rank=r) for r in (1, 8, 32, 96)}
change = ml.inspect("extracted-96")
figures.dense_spectra(change.modules)


# %% tags=["corpus", "trained"]
def loss(adapter):
    """The held-out loss with an adapter's folder, merged."""
    model = ml.load()
    ml.load_adapter(model, adapter)
    ml.merge(model)
    return ml.evaluate(model, held_out)


print("full fine-tuning   effective rank   of noise   first 8 hold")
kinds = {kind: [m for m in change.modules if m.kind == kind] for kind in plotting.KINDS}
noise = {
    kind: spectra.noise_spectrum(some[0].shape, np.random.default_rng(0)) for kind, some in kinds.items()
}
for kind, some in kinds.items():
    energy = np.mean([spectra.energy(np.array(m.singular_values))[7] for m in some])
    print(f"{kind:16} {np.mean([m.ranks.effective for m in some]):16.0f} "
          f"{spectra.effective_rank(noise[kind]):10.0f} {energy:14.0%}")  # fmt: skip
print()
print(f"                        parameters   residual    loss   (base {full.before:.3f})")
after = {r: loss(f"extracted-{r}") for r in extracted}
for r, found in extracted.items():
    print(f"{f'extracted at r = {r}':22} {found.parameters:11,} {found.residual:10.3f} {after[r]:7.3f}")
print(f"{'trained at r = 8':22} {done.parameters:11,} {'':10} {done.after:7.3f}")
print(f"{'full fine-tuning':22} {full.parameters:11,} {'':10} {full.after:7.3f}")


# %% tags=["claims", "corpus", "trained"]
def of_gain(after):
    return (full.before - after) / (full.before - full.after)


mean = {kind: np.mean([m.singular_values for m in some], axis=0) for kind, some in kinds.items()}
above = [S[0] > np.linalg.norm(S) * noise[kind][0] for kind, S in mean.items()]
holds("Its first directions stand out from noise", all(above))
holds("and a long tail comes after them", min(S[8:].sum() / S.sum() for S in mean.values()) > 0.5)

holds(
    "The change by full fine-tuning is not of low rank", min(m.ranks.effective for m in change.modules) > 40
)
says("At $r = 8$ the residual is {:.3f} of", extracted[8].residual)
holds("less than half of the energy is kept", 1 - extracted[8].residual ** 2 < 0.5)
holds("of the gain in loss it is four fifths", 0.75 < of_gain(after[8]) < 0.85)
holds("The adapter *trained* at $r = 8$ is better", done.after < after[8])
holds("with four times its rank the extracted one comes close", 0 < after[32] - done.after < 0.01)
holds(
    "At $r = 96$, the full rank of these maps, nothing is lost of them",
    extracted[96].residual < 1e-5 and {min(m.shape) for m in change.modules} == {96},
)
holds("the adapter is larger than the model", extracted[96].parameters > full.parameters)
holds(
    "The loss still is not that of the tuned one: embedding and norms have moved, too",
    after[96] - full.after > 0.005
    and all(key.endswith(("norm.weight", "embed_tokens.weight")) for key in extracted[96].left),
)
merged = ml.merge_checkpoint("base", "extracted-8", "merged-8")
folders = [huggingface.weights(folder) for folder in ("base", "tuned", "merged-8")]
base, tuned, near = ([w[f"{m.module}.weight"].astype(float) for m in change.modules] for w in folders)
missed = np.sqrt(sum(np.sum((a - b) ** 2) for a, b in zip(tuned, near, strict=True)))
whole = np.sqrt(sum(np.sum((a - b) ** 2) for a, b in zip(tuned, base, strict=True)))
holds("merged into the base, it misses the tuned weights by just that",
      np.isclose(missed / whole, extracted[8].residual, rtol=1e-4))  # fmt: skip

# %% [markdown]
# The change by full fine-tuning is not of low rank. Its first directions stand out from noise, and a long
# tail comes after them.
#
# - At $r = 8$ the residual is 0.735 of $|\Delta W|$: merged into the base, it misses the tuned weights by
#   just that. So less than half of the energy is kept; of the gain in loss it is four fifths. The adapter
#   *trained* at $r = 8$ is better; with four times its rank the extracted one comes close.
# - At $r = 96$, the full rank of these maps, nothing is lost of them, and the adapter is larger than the
#   model. The loss still is not that of the tuned one: embedding and norms have moved, too.
#
# ## Merged and rounded
#
# Models are often stored in bfloat16, which has 8 significant bits: neighbours are $2^{-7}$ to $2^{-8}$
# apart, relative to their size. Where a change is smaller than half of that distance, the rounded sum is the
# old weight. We add our $\Delta W$ to the base in full and then ten times smaller each time, and round.

# %% tags=["corpus", "trained"]
r8, weights = ml.open_adapter("r8"), huggingface.weights("base")
print("   ΔW times   |ΔW|/|W|    lost of ΔW   weights that stay the same")
rounded = {}
for factor in (1, 0.1, 0.01, 0.001):
    old = {path: stored(weights[f"{path}.weight"], "bfloat16").astype(float) for path in r8.pairs}
    size = missed = same = count = 0
    for path, W in old.items():
        A, B = r8.factors(path)
        change = factor * 2.0 * B.astype(float) @ A  # s = 16 / 8
        moved = stored(W + change, "bfloat16") - W
        size, missed = size + np.sum(change**2), missed + np.sum((moved - change) ** 2)
        same, count = same + np.sum(moved == 0), count + W.size
    relative = np.sqrt(size / sum(np.sum(W**2) for W in old.values()))
    rounded[factor] = relative, np.sqrt(missed / size), same / count
    print(f"{factor:11} {relative:10.5f} {np.sqrt(missed / size):13.1%} {same / count:28.0%}")
ml.merge_checkpoint("base", "r8", "half", dtype="bfloat16")
half = ml.evaluate(ml.load("half"), held_out)
print(f"loss of the merged model in bfloat16: {half:.3f}, of base and adapter: {done.after:.3f}")

# %% tags=["claims", "corpus", "trained"]
one = np.arange(256, 512) / 256  # what eight significant bits can tell apart between 1 and 2
holds(
    "bfloat16, which has 8 significant bits: neighbours are $2^{-7}$ to $2^{-8}$ apart",
    np.array_equal(stored(one[::2].astype(np.float32), "bfloat16").astype(float), one[::2])
    and not np.array_equal(stored(one.astype(np.float32), "bfloat16").astype(float), one),
)
holds("in full and then ten times smaller each time", [*rounded] == [1, 0.1, 0.01, 0.001])
holds(
    "smaller than half of that distance, the rounded sum is the old weight",
    float(stored(np.float32([1 + 0.49 * 2**-7]), "bfloat16").astype(float)[0]) == 1,
)
holds("is a fifth of $W$", 0.18 < rounded[1][0] < 0.22)
holds("so about a hundredth of it is lost", 0.005 < rounded[1][1] < 0.015)
holds("and the loss does not notice", abs(half - done.after) < 0.0015)
holds("Of a change a hundred times smaller more than half is lost", rounded[0.01][1] > 0.5)
holds("and of one a thousand times smaller nearly all", rounded[0.001][1] > 0.9)
holds("most weights do not move", rounded[0.001][2] > 0.9)

# %% [markdown]
# Our $\Delta W$ is a fifth of $W$, so about a hundredth of it is lost, and the loss does not notice. Of a
# change a hundred times smaller more than half is lost, and of one a thousand times smaller nearly all: most
# weights do not move.
#
# ## The same on a pretrained model of 135 million parameters
#
# Everything above works on SmolLM2-135M by its name. It is fetched once, 93 MB. Ten steps on a little of the
# Folio show that it works, and no more than that.

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
                             length=64, warmup=2, eval_every=10, eval_tokens=512)  # fmt: skip
    ten = finetune.run(recipe, "smollm2-r4")
    deep = ml.inspect("smollm2-r4", base="smollm2", whole=1)  # without intruders, which would take a minute
    print(f"loss per character:     {ten.before / ten.characters:.2f} before, "
          f"{ten.after / ten.characters:.2f} after 10 steps")  # fmt: skip
    print(*wrapped(deep.summary()), "", sep="\n")
    print("mean over all modules         |ΔW|/|W|   amplification / chance   overlap  (chance)")
    for who, some in (("tiny base, r = 8, 80 steps", seen), ("SmolLM2, r = 4, 10 steps", deep)):
        b = [m.base for m in some.modules]
        print(
            f"{who:27} {np.mean([x.relative for x in b]):10.3f} "
            f"{np.mean([x.amplification / x.random_amplification for x in b]):24.2f} "
            f"{np.mean([x.overlap for x in b]):9.3f}   ({np.mean([x.random_overlap for x in b]):.3f})"
        )

# %% tags=["claims", "corpus", "smollm2", "trained"]
if large:
    holds("Ten steps on a little of the Folio", recipe.steps == 10)
    says(
        "pretrained model of {:.0f} million parameters",
        sum(np.prod(s) for s in huggingface.weights("smollm2").shapes.values()) / 1e6,
    )
    wide = {m.shape[0] for m in deep.modules if m.kind == "q_proj"}
    holds("This base is wider, 576 and not 96", wide == {576} and ml.load().config.hidden_size == 96)
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
# This base is wider, 576 and not 96, and the rank is smaller, so chance alone gives an overlap of one
# hundredth and not of seven; the same number would mean more here. After ten steps $\Delta W$ is less than a
# hundredth of $W$, and the loss has fallen all the same.

# %% [markdown]
# ## Exercises
#
# Write your answer in place of `None`, and run that cell and the one below it. A wrong answer gets a hint.
# [The solutions, and what is often answered instead](solutions/12_against_its_base.md).


# %% tags=["exercise"]
# Write the line.
def amplified(W, U, S, V):
    """|ΔW| / |Uᵀ W V| for ΔW = U diag(S) Vᵀ; W (O, I), U (O, r), S (r,), V (I, r)."""
    return None  # your lines in place of this one


# %% tags=["check"]
def check():
    """Your answer on a W whose strengths are known, and beside the package's on random ones."""
    W = np.diag([4.0, 2.0, 1.0, 1.0])
    E = np.eye(4)
    mine = given(amplified(W, E[:, :2], np.array([8.0, 6.0]), E[:, :2]))
    assert np.ndim(mine) == 0, f"the shape is {np.shape(mine)}; expected one number"
    assert not np.isclose(mine, 10 / np.sqrt(22)), "|W| is the whole of W: take only what U and V see of it"
    assert not np.isclose(mine, np.sqrt(20) / 10), "the other way round: W's part is below the line"
    assert not np.isclose(mine, 14 / np.sqrt(20)), "|ΔW| is the root of the sum of squares of S"
    assert np.isclose(mine, np.sqrt(5)), "|ΔW| is 10 here, and U, V see 4 and 2 of W: 10 / √20"
    rng = np.random.default_rng(5)
    for O, I, r in ((5, 9, 1), (8, 6, 3), (7, 7, 7)):  # noqa: E741
        U, V = (np.linalg.qr(rng.standard_normal((n, r)))[0] for n in (O, I))
        S, W = np.sort(rng.exponential(size=r))[::-1], rng.standard_normal((O, I))
        theirs = spectra.amplification(W, U, S, V.T)[0]
        assert np.isclose(amplified(W, U, S, V), theirs), f"for W {W.shape} and r = {r} it is {theirs:.3f}"
    return "the same as minilora.spectra.amplification"


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
def rounded_away():
    """A change above 0 of the weight 1.0 that bfloat16 loses: rounded, 1.0 + change is 1.0 again.
    It must be as large as you can make it: twice the change is not lost. And why is it gone?

    a: bfloat16 has no number as small as the change.
    b: the neighbour of 1.0 is too far: the sum lies nearer to 1.0 than to it.
    c: the sum itself is lost: in float64, too, it is 1.0.
    """
    return None, None  # your change, and the letter that the numbers support


# %% tags=["check"]
def check():
    """Your change, added to 1 and rounded."""
    change, letter = given(rounded_away())
    change = float(change)

    def kept(x):
        return float(stored(np.array([x], np.float32), "bfloat16").astype(float)[0])

    assert change > 0, f"{change} is not above 0"
    assert kept(1 + change) == 1, f"1 + {change:g} becomes {kept(1 + change):g}: make it smaller"
    assert kept(1 + 2 * change) > 1, f"twice {change:g} is lost, too: make it larger"
    hints = {
        "a": f"alone it is stored as {kept(change):.4g}: the exponent has room for far smaller numbers",
        "c": f"in float64 it is {1 + change:.6g}",
    }
    chosen(letter, "b", hints)
    return f"after 1 comes {1 + 2**-7:.7g}; a weight of 0.01 would become {kept(0.01 + change):.4g}"


verdict(check)

# %% [markdown]
# ## To take along
#
# - An amplification of 4 and an overlap of 0.1 are what noise shows, too.
# - An adapter extracted from a full fine-tuning holds a part of it. That a LoRA is enough for a task does not
#   make the change by full fine-tuning one of low rank.
# - Look at $|\Delta W| / |W|$ before you merge into 16 bits: bfloat16 loses little of a large $\Delta W$ and
#   most of a small one.
#
# Next: [How do we know?](13_how_do_we_know.ipynb).

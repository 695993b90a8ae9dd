# %% [markdown]
# # Four bits
#
# ![](attachment:four_bits.png)
#
# **What you will see.** A frozen weight can be stored in four bits: one of 16 values and a scale for its
# block. You derive the 16 values, encode and decode a block by hand, and measure the error. Then adapters
# are trained beside such a base, which is QLoRA ([Dettmers et al. 2023](https://arxiv.org/abs/2305.14314)),
# and beside the base as it was.
#
# **What you need.** [LoRA from one equation](2_lora_from_one_equation.ipynb) and [Merging costs
# nothing](3_merging_costs_nothing.ipynb).
#
# **Contents.** Which 16 values? · A block by hand · How large is the error? · QLoRA beside LoRA · Exercises
# · To take along

# %% tags=["first", "unkept"]

# %% tags=["imports"]
import copy
from statistics import NormalDist

import numpy as np

import minilora as ml
from minilora.analysis import figures
from minilora.data import corpora
from minilora.layers import Linear
from minilora.lora import bases
from minilora.methods import four_bit

# %% [markdown]
# ## Which 16 values?
#
# An adapter never writes into the base. So the base may be stored coarsely, as long as what it says stays
# nearly the same. Four bits can name 16 values, and we may choose them.
#
# Trained weights look like Gaussian noise: many are small, few are large. Evenly spaced values would waste
# codes on the tails. NF4 ("normal float") spaces them evenly in *probability* instead: it takes quantiles
# of the normal distribution, and so puts more of them where weights are frequent. Zero must be among them,
# so that a weight of zero stays zero. That leaves an odd number for the rest: seven below and eight above.
# On either side the quantiles run from one half, which is zero, to a probability just short of one, where
# the quantile would be infinite. At the end all are divided by the largest.

# %%
normal, last = NormalDist(), 0.9677083  # bitsandbytes cuts 1 - (1/30 + 1/32) / 2 after seven digits


def quantiles(count):
    """`count` quantiles above zero, evenly spaced in probability; that at 1/2, zero, is left out."""
    return [normal.inv_cdf(p) for p in np.linspace(last, 0.5, count + 1)[:-1]]


values = np.sort([-q for q in quantiles(7)] + [0.0] + quantiles(8))
values /= values.max()

base = ml.load()
weights = {path: layer.weight.dense() for path, layer in bases(base).items() if isinstance(layer, Linear)}
blocks = np.concatenate([W.reshape(-1, 64) for W in weights.values()])
shares, edges = np.histogram(blocks / np.abs(blocks).max(1, keepdims=True), bins=40, range=(-1, 1))
figures.curves(
    {
        "weights of the base": ((edges[1:] + edges[:-1]) / 2, 100 * shares / shares.sum()),
        "the 16 values": (values, np.zeros(16)),
    },
    "weight / largest of its block of 64",
    "share of all weights (%)",
    "How the weights of the base are distributed within their blocks: a bell around 0 with a little of its "
    "own at -1 and 1, where the largest weight of each block lies. The 16 values of NF4 lie close together "
    "in the middle and far apart outside.",
)

# %%
print("by hand:      ", *(f"{v:8.5f}" for v in values[:8]))
print("              ", *(f"{v:8.5f}" for v in values[8:]))
print("minilora's:   ", *(f"{v:8.5f}" for v in four_bit.book("nf4")[:8]))
print("              ", *(f"{v:8.5f}" for v in four_bit.book("nf4")[8:]))
gaps = np.diff(values)
print(f"smallest gap {gaps.min():.3f}, largest {gaps.max():.3f}; half of that {gaps.max() / 2:.3f}")

# %% tags=["claims"]
holds("seven below and eight above", (values < 0).sum() == 7 and (values > 0).sum() == 8)
holds("one of 16 values and a scale for its block", len(values) == 16)
holds("You derive the 16 values", len(values) == 16)
holds("Four bits can name 16 values", len(values) == 2**4)
holds("stored in four bits", len(values) == 2**4)
holds("from one half, which is zero,", normal.inv_cdf(0.5) == 0)
centre = 100 * shares / shares.sum()
holds(
    "a bell around 0 with a little of its own at -1 and 1",
    20 - 3 < centre.argmax() < 20 + 3 and centre[0] > centre[1] and centre[-1] > centre[-2],
)
holds(
    "The 16 values of NF4 lie close together in the middle and far apart outside",
    gaps[7] < gaps[0] / 2 and gaps[7] < gaps[-1] / 2,
)
holds(
    "made by hand and the package's agree to six digits",
    float(np.abs(values - four_bit.book("nf4")).max()) < 5e-7,
)

# %% [markdown]
# The values made by hand and the package's agree to six digits. The published table was computed in float32;
# the package rounds where it did, and has it bit for bit.
#
# ## A block by hand
#
# Weights are taken in blocks of 64. The largest absolute value of a block is its scale $c$. Divided by $c$,
# each weight lies between -1 and 1; its code is the number of the nearest value. Two codes share a byte,
# the first in its upper half. To decode, look the value up and multiply by $c$.

# %%
w = weights["model.layers.0.self_attn.q_proj"].reshape(-1)[:64]
c = np.abs(w).max()
codes = np.abs(w[:, None] / c - values).argmin(1)  # the nearest value
packed = (16 * codes[::2] + codes[1::2]).astype(np.uint8)
decoded = (values[codes] * c).astype(np.float32)

print("weights ", *(f"{x:7.3f}" for x in w[:6]), " ...")
print("codes   ", *(f"{x:7d}" for x in codes[:6]), " ...")
print("decoded ", *(f"{x:7.3f}" for x in decoded[:6]), " ...")
print("bytes   ", *(f"{x:14d} " for x in packed[:3]), "...")
print(f"scale {c:.4f}; {w.nbytes} bytes became {packed.nbytes} and 4 for the scale")

by_package = four_bit.encoded(w, "nf4", block=64, double=False)
print("the package has the same codes:", bool((by_package.codes == packed).all()))
print("largest error:", f"{np.abs(w - decoded).max():.4f}", f"of at most {c * gaps.max() / 2:.4f}")

# %% tags=["claims"]
holds("Weights are taken in blocks of 64", len(w) == 64)
holds("each weight lies between -1 and 1", np.abs(w / c).max() <= 1)
holds("the first in its upper half", (packed >> 4 == codes[::2]).all())
holds("16 times the first code plus the second", (packed == 16 * codes[::2] + codes[1::2]).all())

# %% [markdown]
# ## How large is the error?
#
# A weight is off by at most half the gap that it falls into, times $c$. The largest gap $G$ of NF4 is the
# one next to -1, so $|w - \hat w| \le c\,G / 2$, and a few roundings. That is a bound you can assert. One
# large weight makes $c$ large, and then all the others in its block are coarse. Small blocks confine the
# damage, and need more scales.
#
# The scales cost memory, too: 32 bits for every 64 weights is half a bit for each. **Double quantization**
# stores the scales themselves in eight bits, in blocks of 256, after their mean is taken off.
#
# The figure compares NF4 with two other sets of values: FP4, a tiny floating-point number, and int4, whose
# steps are all equal.

# %%
sizes = four_bit.BLOCKS
all_weights = np.concatenate([W.reshape(-1) for W in weights.values()])
length = np.linalg.norm(all_weights)


def error(kind, block):
    """|W - Ŵ| / |W|."""
    return np.linalg.norm(all_weights - four_bit.decoded(four_bit.encoded(all_weights, kind, block))) / length


def bound(block):
    """What the error can be at most, if every weight lay in the middle of the largest gap."""
    scales = np.abs(all_weights.reshape(-1, block)).max(1)
    return four_bit.gap("nf4") / 2 * np.sqrt(block) * np.linalg.norm(scales) / length


errors = {kind: np.array([error(kind, block) for block in sizes]) for kind in ("nf4", "fp4", "int4")}
bounds = np.array([bound(block) for block in sizes])
lines = {"bound for NF4": bounds, "FP4": errors["fp4"], "int4": errors["int4"], "NF4": errors["nf4"]}
figures.curves(
    {name: (sizes, 100 * line) for name, line in lines.items()},
    "weights in a block",
    "error |W - Ŵ| / |W| (%)",
    "Error of the base's weights against the size of a block. It grows with the block for every kind; NF4 is "
    "the lowest throughout, and far below its bound.",
    "log",
)

# %%
print("block    bits per weight        error of")
print("       plain scales  double    NF4     FP4     int4    bound of NF4")
for i, block in enumerate(sizes):
    bits = [
        8 * four_bit.encoded(all_weights, "nf4", block, double).nbytes / len(all_weights) for double in (0, 1)
    ]
    row = "".join(f"{errors[kind][i]:8.1%}" for kind in errors)
    print(f"{block:5}  {bits[0]:12.3f}  {bits[1]:6.3f} {row}  {bounds[i]:12.1%}")

# %% tags=["claims"]
at = sizes.index(64)
holds("It grows with the block for every kind", all((np.diff(e) > 0).all() for e in errors.values()))
holds(
    "NF4 is the lowest throughout, and far below its bound",
    all(n < min(f, i) and n < b / 3 for n, f, i, b in zip(*errors.values(), bounds, strict=True)),
)
holds("The largest gap $G$ of NF4 is the one next to -1", gaps.argmax() == 0)
says("The largest gap is the first, from -1 to {:.3f}. Its middle is {:.3f}.", values[1], (values[1] - 1) / 2)
middle = values[8] / 2
words = (
    "Divided by {}, normal numbers are below {:.2f}, the middle between 0 and the next value, up to {:.2f}"
)
says(words, 100, middle, 100 * middle)
for words in ("so $|w - \\hat w| \\le c\\,G / 2$, and a few roundings", "The error is at most $c\\,G / 2$"):
    holds(words, np.abs(w - decoded).max() <= c * four_bit.gap("nf4") / 2 * (1 + 2.0**-20))
holds("NF4 is 16 quantiles of the normal distribution", len(values) == 16)
holds(
    "by at most half the gap that it falls into", np.abs(w - decoded).max() <= c * gaps.max() / 2 * (1 + 1e-6)
)
holds("32 bits for every 64 weights is half a bit for each", 32 / 64 == 0.5)
holds("the scales themselves in eight bits, in blocks of 256", four_bit.SCALES == 256)

# %% [markdown]
# ## QLoRA beside LoRA
#
# `ml.quantize` swaps the weights of the linear maps, not the layers. As in the picture at the top, a product
# decodes its weight and drops it again. The gradient passes *through* the decoded weight to the layer below,
# and never into it: a code has no small step that could be taken. So the base stays frozen, and LoRA beside
# it is QLoRA:
#
# $$Y = X \hat W^\top + s\,(X A^\top)\,B^\top$$
#
# Below, both learn the spelling of the First Folio, with one recipe: the same rank, rate, batches and
# steps, and the same seeds. Then the QLoRA model is merged, by two routes: into the decoded base, in
# float32; and that result quantized again. We also measure which part of $\Delta W$ survives the second
# route: its component along $\Delta W$, and what lies beside it.

# %% tags=["corpus", "trained"]
text = corpora.corpus_or_fallback("folio")
test = ml.eval_batches(text.test, batch_size=16, length=128, limit=32 * 128)
steps = 20


def learn(model, seed):
    """The test loss after a few steps of LoRA."""
    ml.inject(model, ml.LoraConfig(r=8, alpha=16), rng=np.random.default_rng(seed))
    batches = ml.batches(text.train, np.random.default_rng(10 + seed), batch_size=8, length=128)
    ml.train(model, batches, ml.AdamW(lr=1e-2), steps=steps)
    return ml.evaluate(model, test)


def flat(model):
    """All weights of the linear maps, in one row."""
    return np.concatenate([bases(model)[path].weight.dense().reshape(-1) for path in weights])


base4 = copy.deepcopy(base)
report = ml.quantize(base4)
before = {"LoRA": ml.evaluate(base, test), "QLoRA": ml.evaluate(base4, test)}
rows, kept, beside = [], [], []
for seed in (0, 1, 2):
    plain, model = copy.deepcopy(base), copy.deepcopy(base4)
    losses = [learn(plain, seed), learn(model, seed)]
    ml.fuse(model)
    losses.append(ml.evaluate(model, test))
    change = flat(model) - flat(base4)  # ΔW
    ml.quantize(model)
    losses.append(ml.evaluate(model, test))
    moved = flat(model) - flat(base4)
    kept.append(moved @ change / (change @ change))
    beside.append(np.linalg.norm(moved - change) / np.linalg.norm(change))
    rows.append(losses)
print(text.source)
print("test loss in nats per character")
print(f"before training:  float32 base {before['LoRA']:.3f}, 4-bit base {before['QLoRA']:.3f}")
print("seed    LoRA   QLoRA   merged in float32   merged in 4 bits   kept of ΔW   beside it")
for seed, (losses, k, n) in enumerate(zip(rows, kept, beside, strict=True)):
    print(
        f"{seed:4} {losses[0]:7.3f} {losses[1]:7.3f} {losses[2]:19.3f} {losses[3]:18.3f} {k:12.2f} {n:11.2f}"
    )
print(f"mean {np.mean(rows, 0)[0]:7.4f} {np.mean(rows, 0)[1]:7.4f}")

# %%
stored = (
    len(flat(base)) * 4,
    sum(layer.weight.data.nbytes for path, layer in bases(base4).items() if path in weights),
)
print(
    f"linear maps: {stored[0]:,} bytes in float32, {stored[1]:,} in 4 bits: {stored[1] / stored[0]:.3f} of it"
)
print(f"{report.bits:.3f} bits per weight; {report.all_bits:.2f} with the embedding, which stays float32")

# %% tags=["claims", "corpus", "trained"]
lora, qlora, merged, again = np.array(rows).T
cost = (qlora - lora).mean()
says("QLoRA ends {:.3f} nats above LoRA, in the mean of three seeds", cost)
holds("in the mean of three seeds", len(rows) == 3)
holds("Twenty steps of a tiny model", steps == 20)
holds("above it with every seed", (qlora > lora).all())
learned = (before["LoRA"] - lora).mean(), (before["QLoRA"] - qlora).mean()
says("LoRA has learned {:.2f}, QLoRA {:.2f}", *learned)
holds("Merged in float32 the model is the trained one", np.abs(merged - qlora).max() < 1e-4)
back = (again - qlora).mean()
says("gives back {:.3f} of the {:.2f} nats that were learned", back, learned[1])
says("{:.0f} % of $\\Delta W$ is still there", 100 * np.mean(kept))
says("{:.2f} of its size", np.mean(beside))

# %% tags=["claims"]
says("{:.3f} of the memory", stored[1] / stored[0])

# %% [markdown]
# Read the table from the left. QLoRA ends 0.008 nats above LoRA, in the mean of three seeds, and above it
# with every seed; LoRA has learned 0.27, QLoRA 0.28. The linear maps take 0.129 of the memory. Twenty steps
# of a tiny model prove little about others, but you have seen how to compare: one recipe, several seeds.
#
# Merged in float32 the model is the trained one, and is as large as before quantizing. Quantizing again gives
# back 0.022 of the 0.28 nats that were learned. On average little is lost: 98 % of $\Delta W$ is still there.
# But most single changes are smaller than a gap, so a weight either keeps its old code or jumps a whole gap.
# This noise beside $\Delta W$ has 0.47 of its size. Keep the adapter beside the 4-bit base, if you can.

# %% [markdown]
# ## Exercises
#
# Write your answer in place of `None`, and run that cell and the one below it. A wrong answer gets a hint.
# [The solutions, and what is often answered instead](solutions/7_four_bits.md).


# %% tags=["exercise"]
# Write the line.
def unpacked(packed, c, values):
    """The 2 n weights of n bytes of codes: the first code of a byte is in its upper half (a byte // 16)."""
    return None  # your lines in place of this one


# %% tags=["check"]
def check():
    """Your answer beside the decoder of the package, on blocks that you have not seen."""
    rng = np.random.default_rng(5)
    for n, kind in ((64, "nf4"), (128, "int4")):
        block = four_bit.encoded(rng.standard_normal(n).astype(np.float32), kind, block=n, double=False)
        wanted, c = four_bit.decoded(block), float(block.absmax[0])
        mine = given(unpacked(block.codes.copy(), c, np.array(four_bit.book(kind))))
        assert np.shape(mine) == (n,), (
            f"the shape is {np.shape(mine)}; expected {(n,)}: two weights for each byte"
        )
        assert not np.allclose(np.asarray(mine) * c, wanted), "almost: the scale c is missing"
        swapped = wanted.reshape(-1, 2)[:, ::-1].reshape(-1)
        assert not np.allclose(mine, swapped), "almost: the two halves of a byte are swapped"
        assert np.allclose(mine, wanted), (
            "other weights: look each code up in values, in the order of the codes"
        )
    return "the weights of minilora.methods.four_bit"


verdict(check)


# %% tags=["exercise"]
# Predict, then run.
def zeros_beside_an_outlier():
    """A block of 64 normal numbers; one of them is replaced by 100. How many of the other 63 decode to 0?"""
    return None  # your guess, a number, in place of None


# %% tags=["check"]
def check():
    """Your guess beside the count."""
    w = np.random.default_rng(6).standard_normal(64).astype(np.float32)
    w[10] = 100.0
    zeros = int((four_bit.decoded(four_bit.encoded(w)) == 0).sum())
    hints = {
        0: "so it may be without an outlier; but all are divided by the largest before they are rounded",
        64: "the outlier itself is kept: it is the scale",
    }
    otherwise = "no: compare the size of the others, divided by 100, with the smallest value above 0"
    predicted(zeros_beside_an_outlier(), zeros, hints, otherwise)
    return f"{zeros}. The outlier is the scale, and all others are nearer to 0 than to the next value"


verdict(check)


# %% tags=["exercise"]
# Change, and explain.
def worst_block():
    """64 weights, the largest 1 in absolute value, one with (nearly) the largest possible error; and why.

    a: the largest weight of a block is rounded the most.
    b: the values of NF4 are farthest apart beside -1, and the weight lies in the middle of that gap.
    c: small weights become 0, and lose all they have.
    """
    return None, None  # your 64 weights, and the letter that the numbers support


# %% tags=["check"]
def check():
    """The largest error of your block beside c G / 2."""
    answer, letter = given(worst_block())
    w = np.asarray(answer, np.float32)
    assert w.shape == (64,), f"the shape is {w.shape}; expected (64,)"
    assert np.abs(w).max() == 1, (
        f"the largest is {np.abs(w).max():.3g} in absolute value; expected 1: it is the scale"
    )
    errors = np.abs(four_bit.decoded(four_bit.encoded(w, double=False)) - w)
    worst = errors.max() / (four_bit.gap("nf4") / 2)
    assert worst > 0.99, (
        f"{worst:.0%} of the bound: which two neighbours are farthest apart, and where is their middle?"
    )
    middle = np.abs(four_bit.book("nf4")[[6, 8]]).max() / 2
    hints = {
        "a": f"the error of the largest is {errors[np.abs(w).argmax()]:.3f}: it is the scale, and has a code",
        "c": f"weights that become 0 are at most {middle:.3f} off; yours is {errors.max():.3f} off",
    }
    chosen(letter, "b", hints)
    return f"{worst:.1%} of the bound"


verdict(check)

# %% [markdown]
# ## To take along
#
# - NF4 is 16 quantiles of the normal distribution, a scale for each block, and a table look-up.
# - The error is at most $c\,G / 2$. Smaller blocks lower it; double quantization pays for their scales.
# - QLoRA is LoRA beside such a base. No layer changes, no code is trained.
# - Merging into four bits adds noise. Merge into float, or do not merge.
#
# Next: [Adding adapters](8_adding_adapters.ipynb).

# %% [markdown]
# # Overlays
#
# ![](attachment:overlays.png)
#
# **What you will see.** What LoRA is, in a picture and in a small language model that writes like Shakespeare
# in modern spelling. You lay one adapter on it, and it writes as in 1623; another, and it writes like the
# Bible; you take both off, and it is the model that it was, to the last bit.
#
# **What you need.** Nothing: no formula, no earlier lesson. The cells have their outputs already, and each
# takes seconds if you run it.
#
# **Contents.** A painting and its sheets · The base · One sheet · Another sheet · What a sheet takes · Off
# again · Where they are used · Exercises · To take along

# %% tags=["first", "unkept"]

# %% tags=["imports"]
import tempfile
from pathlib import Path

import numpy as np

import minilora as ml
from minilora.data import corpora

# %% [markdown]
# ## A painting and its sheets
#
# Think of a large painting on a wall. Many hands worked on it for months. Now you want it by night, for one
# evening. You could paint over it, and then the day would be lost. Or you hang a thin, clear sheet in front
# of it, with a moon and some shadows on it. Whoever looks sees both together. Tomorrow you take the sheet
# down, or hang another one there. Nobody has touched the wall.
#
# A trained model is such a painting: many numbers, in matrices, at which long training has worked. To
# *fine-tune* it is to paint over it: all its numbers change, and for each task you keep a whole copy.
# **LoRA** ([Hu et al. 2021](https://arxiv.org/abs/2106.09685)) freezes the numbers and lays a sheet over each
# matrix. The sheet is added to what lies below it. It covers the whole matrix, but it is simple: a few
# columns and a few rows say all that is on it. These are the bars along its edges in the picture, drawn to
# scale. Only they are trained. A set of sheets, one for each matrix, is called an *adapter*.

# %% [markdown]
# ## The base
#
# `ml.load()` is the base that ships with the package. It has read Shakespeare, a character at a time, and
# goes on with what you begin. It is tiny, so it makes mistakes; watch the spelling, not the sense.

# %%
model = ml.load()
before = ml.digest(model)  # a fingerprint: it changes if any bit of any number changes


def writes(begin, seed):
    """What the model makes of this beginning, in one line."""
    rng = np.random.default_rng(seed)
    new = ml.complete(model, begin, 78 - len(begin), rng=rng, temperature=0.4)
    return " ".join((begin + new).split())


def both():
    """Two texts, always with the same dice."""
    return [writes("The king ", 1), writes("And ", 3)]


of_the_base = both()
print(f"{sum(p.size for p in ml.named_params(model).values()):,} numbers, fingerprint {before[:12]}")
print(*of_the_base, sep="\n")

# %% [markdown]
# ## One sheet
#
# `ml.inject` freezes the base and lays an empty sheet over every matrix of its blocks. Training on the First
# Folio, the edition of 1623, then fills the sheets. This takes some seconds. (Where the texts cannot be
# fetched, the package says so and takes the documentation of Python's standard library instead; then the
# outputs are others.)


# %% tags=["corpus", "trained"]
def train(name):
    """Lay a new adapter on the base and train it on the text of that name; its report."""
    report = ml.inject(model, ml.LoraConfig(r=4, alpha=8), rng=np.random.default_rng(0), name=name)
    batches = ml.batches(texts[name].train, np.random.default_rng(10), batch_size=8, length=128)
    ml.train(model, batches, ml.AdamW(lr=1e-2), steps=100)
    return report


texts = {name: corpora.corpus_or_fallback(name) for name in ("folio", "kjv")}
report = train("folio")
of_the_folio = both()
print(f"trained: {report.parameters:,} numbers beside {report.base_parameters:,} frozen ones")
print(*of_the_folio, sep="\n")

# %% [markdown]
# The spelling is another: *winde*, *beare*, *haue*, *selfe*. (These two texts show it well, others less so;
# the next table is the fair measure.)
#
# ## Another sheet
#
# A second adapter goes over the same base: the King James Bible. `ml.set_adapter` says which of the two lies
# on it. Both are measured on pages that neither they nor the base were trained on: the loss, in *nats per
# character*, says how much each next character surprises the model. Less is better.

# %% tags=["corpus", "trained"]
train("kjv")
of_the_bible = both()
print(*of_the_bible, sep="\n")

tests = {
    name: ml.eval_batches(text.test, batch_size=16, length=128, limit=64 * 128)
    for name, text in texts.items()
}


def losses():
    """The loss on each text with what lies on the base now."""
    return [ml.evaluate(model, tests[name]) for name in texts]


with ml.disabled(model):  # no sheet at all
    table = {"none": losses()}
for name in texts:
    ml.set_adapter(model, name)
    table[name] = losses()
print("\non the base     loss on folio     on kjv")
for name, (folio, kjv) in table.items():
    print(f"{name:11} {folio:17.2f} {kjv:10.2f}")

# %% tags=["claims", "corpus", "trained"]
folio, kjv = (np.array([table[name][i] for name in ("none", "folio", "kjv")]) for i in (0, 1))
holds("Each is the best on its own text", folio.argmin() == 1 and kjv.argmin() == 2)
says("The Folio's loss falls from {:.2f} to {:.2f}, the Bible's from {:.2f} to {:.2f}",
     folio[0], folio[1], kjv[0], kjv[2])  # fmt: skip
for word in ("winde", "beare", "haue", "selfe"):
    holds(f"*{word}*", word in " ".join(of_the_folio) and word not in " ".join(of_the_base))
for words in ("The king of *Jerusalem*", "the *LORD*"):
    holds(words, words.replace("*", "") in " ".join(of_the_bible))
holds("The base exists once, and each adapter makes the other's text worse than no adapter does",
      folio[2] > folio[0] and kjv[1] > kjv[0])  # fmt: skip
holds("the edition of 1623", texts["folio"].source.endswith("plays in the spelling of 1623, 5 held out"))
holds("and it writes as in 1623", folio[1] < folio[0])

# %% [markdown]
# The king of *Jerusalem* and the *LORD* are from the second sheet. Each is the best on its own text. The
# Folio's loss falls from 2.03 to 1.70, the Bible's from 1.47 to 1.36. The base exists once, and each adapter
# makes the other's text worse than no adapter does.
#
# ## What a sheet takes
#
# An adapter is saved alone, as a small file. Whoever has the base can put it on.

# %% tags=["corpus", "trained"]
with tempfile.TemporaryDirectory() as folder:
    ml.save_adapter(model, Path(folder) / "kjv", base="base")
    size = (Path(folder) / "kjv" / "adapter_model.safetensors").stat().st_size
    other = ml.load()
    ml.load_adapter(other, Path(folder) / "kjv")
base_size = 4 * report.base_parameters  # 4 bytes for each number in float32
print(f"file: {size:,} bytes; the base: {base_size:,} bytes, {base_size / size:.0f} times as many")
print("on a fresh base, from its file, the same loss:", ml.evaluate(other, tests["kjv"]) == table["kjv"][1])

large = ml.count("llama-2-7b", 16, ("q_proj", "k_proj", "v_proj", "o_proj"))
fewer = large.total / large.parameters
print(f"Llama-2-7B: {large.parameters:,} numbers on {large.total:,}, one in {fewer:.0f}")

# %% tags=["claims"]
says("a model of {:.1f} billion numbers", large.total / 1e9)
says("one in {:.0f}", fewer)
says("The share of our adapter, {:.1f} %", 100 * report.parameters / report.base_parameters)

# %% [markdown]
# The share of our adapter, 6.3 %, is large because the base is tiny. In a model of 6.7 billion numbers a
# usual adapter is one in 402.
#
# ## Off again

# %%
for name in texts:
    ml.remove(model, name)
print("the same fingerprint as at the start:", ml.digest(model) == before)
print("the same texts:                      ", both() == of_the_base)

# %% tags=["claims"]
holds("it is the model that it was, to the last bit", ml.digest(model) == before)
holds("We trained twice, and not one bit of the base has changed",
      len(texts) == 2 and ml.digest(model) == before)  # fmt: skip

# %% [markdown]
# We trained twice, and not one bit of the base has changed.
#
# ## Where they are used
#
# **Tools.** Hugging Face's PEFT and diffusers, llama.cpp, Apple's MLX and vLLM all take such files; this
# package reads those of the first four. LoRA is often called the most used method of its kind. We know of no
# reliable count.
#
# **Products.** Apple's report on the models in its devices ([Gunter et al.
# 2024](https://arxiv.org/abs/2407.21075)) describes one base of about 3 billion numbers, and for each task an
# adapter of some tens of megabytes, which is loaded and swapped on the fly.
#
# **The rank** says how many columns and rows describe a sheet; here it is 4. Rank 16 is a usual first choice:
# it is that report's, and that of the LoRA authors' scripts for DeBERTa XXL. PEFT takes 8 unless you say
# otherwise. [Which rank?](4_which_rank.ipynb) tries many.
#
# **Not tried here.** *Text and images together*: the authors of LLaVA
# [report](https://github.com/haotian-liu/LLaVA) that their version 1.5 with LoRA does about as well as with
# full fine-tuning. *Following instructions*: on code and mathematics usual ranks left a gap to full
# fine-tuning, and rank 256 closed most of it ([Biderman et al. 2024](https://arxiv.org/abs/2405.09673)); with
# adapters on all layers and datasets of small to medium size there was none ([Schulman et al.
# 2025](https://thinkingmachines.ai/blog/lora/)). Our base follows no instructions. Images alone are in
# [Beyond language](10_beyond_language.ipynb).

# %% tags=["claims"]
says(
    "100 times {:,} numbers on one side; {:,} and 100 times {:,} on the other",
    report.base_parameters, report.base_parameters, report.parameters,
)  # fmt: skip
holds("here it is 4", report.rows[0].r == 4)

# %% [markdown]
# ## Exercises
#
# Write your answer in place of `None`, and run that cell and the one below it. A wrong answer gets a hint.
# [The solutions, and what is often answered instead](solutions/1_overlays.md).


# %% tags=["exercise"]
# Write the line.
def seen(W, sheet):
    """What one sees of the painting W through a sheet of the same shape, as a new matrix.

    W and the sheet stay as they are.
    """
    return None  # your line in place of None


# %% tags=["check"]
def check():
    """Your answer on paintings of integers."""
    rng = np.random.default_rng(1)
    for shape in ((4, 6), (5, 3)):
        W, sheet = rng.integers(1, 10, (2, *shape))
        wall, clean = W.copy(), sheet.copy()
        mine = given(seen(W, sheet))
        assert np.array_equal(W, wall), "W has changed: you painted on the wall. Make a new matrix"
        assert np.array_equal(sheet, clean), "the sheet has changed, and will not fit another wall"
        assert np.shape(mine) == shape, f"the shape is {np.shape(mine)}; expected {shape}, that of W"
        assert not np.array_equal(mine, W), "this is the wall alone: where is the sheet?"
        assert not np.array_equal(mine, sheet), "this is the sheet alone: one sees the wall through it"
        assert np.array_equal(mine, W + sheet), "another matrix: a sheet is added to what lies below it"
    return "the wall and the sheet together, and both are as before"


verdict(check)


# %% tags=["exercise"]
# Predict, then run.
def times_fewer():
    """For 100 tasks you keep 100 fine-tuned models of 344,736 numbers, or one and 100 adapters of 21,888.

    How many times fewer numbers are the latter? A guess within 0.5 is right.
    """
    return None  # your guess, a number, in place of None


# %% tags=["check"]
def check():
    """Your guess beside the counts of the package."""
    report = ml.inject(ml.load(), ml.LoraConfig(r=4), rng=np.random.default_rng(0))
    base, sheet = report.base_parameters, report.parameters
    times = 100 * base / (base + 100 * sheet)
    hints = {
        100: "one base in place of 100, yes; but the adapters take room, too",
        base / sheet: "so it would be if the base took no room; but it is there, once",
    }
    predicted(times_fewer(), times, hints, "no: add up what is kept in each case, then divide", 0.5)
    return f"{100 * base:,} numbers or {base + 100 * sheet:,}: {times:.1f} times fewer"


verdict(check)


# %% tags=["exercise"]
# Change, and explain.
def clear():
    """A factor for all sheets with which the model computes what its base does; and why it does.

    a: the numbers of the base are written back.
    b: nothing is added to the base, which was there all the time.
    c: the numbers of the adapter are erased.
    """
    return None, None  # your factor, and the letter that the numbers support


# %% tags=["check"]
def check():
    """What the model computes with your factor, beside its base."""
    factor, letter = given(clear())
    model, ids = ml.load(), ml.encode("To be, or not to be")[None]
    fingerprint, alone = ml.digest(model), model.forward(ids)[0]
    ml.inject(model, ml.LoraConfig(r=4, alpha=4, init="both"), rng=np.random.default_rng(2))
    ml.set_scale(model, factor)
    off = np.abs(model.forward(ids)[0] - alone).max()
    assert factor != 1, f"1 leaves the sheets as they are: the outputs are up to {off:.2f} off the base's"
    assert factor != -1, f"-1 adds the opposite of each sheet: the outputs are up to {off:.2f} off the base's"
    assert off == 0, f"the outputs are up to {off:.2g} off the base's"
    kept = sum(np.count_nonzero(p.data) for p in ml.trained(model).values())
    ml.remove(model, "default")
    now = ml.digest(model)
    hints = {
        "a": f"the fingerprint of the base was {fingerprint[:8]} and is {now[:8]}: nobody wrote there",
        "c": f"the adapter still has {kept:,} numbers that are not 0; with another factor it is back",
    }
    chosen(letter, "b", hints)
    return "the sheets count nothing, and every number is where it was"


verdict(check)

# %% [markdown]
# ## To take along
#
# - A model is fine-tuned by sheets that lie over its frozen matrices. One sees the sum.
# - A sheet is small: a few columns and rows, in a file of its own.
# - One base carries any adapter in turn. Off again, it is what it was, to the bit.
#
# Next: [LoRA from one equation](2_lora_from_one_equation.ipynb).

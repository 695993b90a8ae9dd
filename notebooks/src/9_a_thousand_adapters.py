# %% [markdown]
# # A thousand adapters
#
# ![](attachment:many_adapters.png)
#
# **What you will see.** One base can serve many adapters at the same time: the rows of one batch name
# theirs. You compute such a batch in three ways that agree, keep a few of a thousand adapters in memory,
# and watch an engine write several texts at once, each with an adapter of its own.
#
# **What you need.** [LoRA from one equation](2_lora_from_one_equation.ipynb) and [Merging costs
# nothing](3_merging_costs_nothing.ipynb).
#
# **Contents.** One batch, many adapters · A whole model · A bank · An engine · What is saved · How fast ·
# Exercises · To take along

# %% tags=["first", "unkept"]

# %% tags=["imports"]
import json
import os
import shutil
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np

import minilora as ml
from minilora.analysis import figures
from minilora.data import corpora
from minilora.fast.mixed import gathered, loop, mixed, segments
from minilora.serve.bank import Bank
from minilora.serve.engine import Engine, Request
from minilora.tree import freeze

# %% [markdown]
# ## One batch, many adapters
#
# A merged weight holds one adapter. Whoever serves many cannot merge, and should not run one model for
# each. But all rows of a batch share the large product with $W$, as in the picture; only the small terms
# differ. Row $n$ of the batch has adapter $k_n$:
#
# $$y_n = W x_n + s\,B_{k_n} A_{k_n} x_n$$
#
# The figure shows the first of the small products, $A x$. On the left, every row meets the $A$ of every
# adapter, and most of that is waste. There are two ways not to compute it. **Gather** (BGMV): fetch for each
# row the factors that it names, and do all rows in one batched product. **Segments** (SGMV): sort the rows by
# adapter, and do one ordinary product for each adapter. (Both names are from [Punica, Chen et al.
# 2023](https://arxiv.org/abs/2310.18547).) Gathering takes fewer calls and copies factors; segments copy no
# factors, and pay when many rows share an adapter.

# %%
rng = np.random.default_rng(1)
ids = np.array([2, 0, -1, 1, 0, 2])  # the adapter of each row; -1: none
X, W = rng.integers(-2, 3, (6, 4)), rng.integers(-2, 3, (5, 4))
A, B = rng.integers(-2, 3, (3, 2, 4)), rng.integers(-2, 3, (3, 5, 2))  # three adapters of rank 2

every = X @ A.reshape(6, 4).T
own = np.where(ids[:, None] == np.arange(6) // 2, every, np.nan)
order = np.argsort(ids, kind="stable")
figures.matrices(
    {"each row, each A": every, "its own A: gather": own, "sorted: segments": own[order]},
    "The product of 6 rows with the A of 3 adapters of rank 2, two columns each. Of all entries a third at "
    "most is wanted. Sorted by adapter, the wanted ones are blocks; the row without an adapter comes first.",
)

# %%
own, calls = ids >= 0, Counter()


def product(x, M, what="small"):
    """x Mᵀ, which is counted; M may be a stack of matrices."""
    calls[what] += 1
    return x @ np.swapaxes(M, -1, -2)


def by_loop():
    Y = np.empty((6, 5))
    for k in (-1, 0, 1, 2):
        x = X[ids == k]
        small = product(product(x, A[k]), B[k]) if k >= 0 else 0
        Y[ids == k] = product(x, W, "with W") + small
    return Y


def by_segments():
    Y = product(X, W, "with W")
    for k in (0, 1, 2):
        Y[ids == k] += product(product(X[ids == k], A[k]), B[k])
    return Y


def by_gathering():
    Y, x, k = product(X, W, "with W"), X[own][:, None], ids[own]  # x (n, 1, I)
    Y[own] += product(product(x, A[k]), B[k])[:, 0]
    return Y


Y = by_loop()
print("          products with W   small products   equal to the loop")
for way in (by_loop, by_segments, by_gathering):
    calls.clear()
    equal = bool((way() == Y).all())
    print(f"{way.__name__:12} {calls['with W']:12} {calls['small']:16}   {equal}")

# %% tags=["claims"]
holds("The product of 6 rows with the A of 3 adapters of rank 2", X.shape[0] == 6 and A.shape[:2] == (3, 2))
holds("Of all entries a third at most is wanted", 3 * 2 * own.sum() <= every.size)
holds("the row without an adapter comes first", ids[order[0]] == -1)
holds("in three ways that agree", (by_loop() == by_segments()).all() and (by_loop() == by_gathering()).all())

# %% [markdown]
# ## A whole model
#
# Three adapters for the shipped base, trained for a few steps: the First Folio's spelling, the King James
# Bible, and Python source. (In float64, so that the texts below come out alike on any machine.) `mixed`
# makes a replica of the model in which every linear map takes an adapter for each row. Its blocks are
# unchanged.

# %% tags=["corpus", "trained"]
model = ml.load(dtype=np.float64)
place = tempfile.TemporaryDirectory()  # which is gone when the kernel ends
folder = Path(place.name)
for seed, name in enumerate(("folio", "kjv", "code")):
    ml.inject(model, ml.LoraConfig(r=4, alpha=8), rng=np.random.default_rng(seed), name=name)
    batches = ml.batches(
        corpora.corpus_or_fallback(name).train, np.random.default_rng(10 + seed), batch_size=4, length=128
    )
    ml.train(model, batches, ml.AdamW(lr=1e-2), steps=30)
    ml.save_adapter(model, folder / name, dtype="float64")
freeze(model)

names = ["folio", "kjv", "code", None, "folio"]
prompts = np.stack([ml.encode(f"And {who} said unto them, ") for who in ("he", "it", "we", "ye", "no")])


def alone(n):
    """The logits of one row, with its adapter active in the model."""
    if names[n] is None:
        with ml.disabled(model):
            return model(prompts[n : n + 1])[0][0]
    ml.set_adapter(model, names[n])
    return model(prompts[n : n + 1])[0][0]


one_by_one = [alone(n) for n in range(5)]
freeze(model)
for compute in (loop, segments, gathered):
    replica, batch = mixed(model, compute=compute)
    with batch.rows(names):
        together, _ = replica(prompts)
    apart = max(np.abs(y - z).max() for y, z in zip(together, one_by_one, strict=True))
    print(f"{compute.__name__:9} in one batch and one by one: differ by less than 1e-10: {apart < 1e-10}")

replica, batch = mixed(model, invariant=True)
with batch.rows(names):
    company, _ = replica(prompts)
with batch.rows(names[:1]):
    lonely, _ = replica(prompts[:1])
print("with invariant=True, equal to the bit in any company:", bool((company[0] == lonely[0]).all()))

# %% tags=["claims", "corpus"]
holds("Three adapters for the shipped base", len(names[:3]) == 3 and (company[0] == lonely[0]).all())

# %% [markdown]
# The results differ by rounding alone: BLAS adds in another order when the number of rows is another. Where
# a text must not depend on who shares its batch, the invariant mode does one product for each row. It is
# slower.
#
# ## A bank
#
# An adapter is small, but a thousand are not. A `Bank` is a folder of adapters and a number of bytes. It
# reads an adapter when it is asked for; if there is no room, the least recently used one goes. Popularity is
# uneven: a few adapters get most requests. So a small memory serves most of them. Here a thousand folders are
# copies of our three, which the bank does not know.

# %% tags=["corpus"]
link = getattr(os, "link", shutil.copy)  # a browser has no links
for k in range(3, 1000):
    copy = folder / f"{names[k % 3]}-{k:03}"
    shutil.copytree(folder / names[k % 3], copy, copy_function=link)  # the same bytes, stored once
one = sum(path.stat().st_size for path in (folder / "kjv").glob("*.safetensors"))
bank = Bank(model, folder, budget=20 * one)
everything = bank.names()
popular = np.arange(1, 1001) ** -1.5  # Zipf: the k-th most popular gets k^-1.5 times what the first gets
for k in np.random.default_rng(2).choice(1000, 200, p=popular / popular.sum()):
    bank.take(everything[k])
    bank.give(everything[k])
seen = bank.counters
print(f"{len(everything):,} adapters on disk, {len(bank.loaded)} in memory")
print(f"of {seen.hits + seen.misses} requests {seen.hits} found theirs in memory; {seen.evictions} had to go")
print("within its bytes:", seen.bytes <= bank.budget)

# %% [markdown]
# ## An engine
#
# Texts end at different times. A batch that waits for its longest text wastes the slots of the others. An
# `Engine` lets texts join and leave between any two tokens: **continuous batching**. Each step gives every
# running text one more token. Below, a text joins while others are being written.

# %% tags=["corpus"]
engine = Engine(model, bank, slots=8)


def ask(adapter, seed):
    """Submit the prompt for one adapter."""
    return engine.submit(
        Request(ml.encode("And he said unto them, "), 60, adapter, temperature=0.6, seed=seed)
    )


streams = {name or "base": ask(name, seed=3) for name in ("folio-501", "kjv-502", "code-503", None)}
for step in range(1, 91):
    engine.step()
    if step == 20:
        streams["kjv-745"] = ask("kjv-745", seed=5)
    if step in (20, 40, 90):
        print(f"after step {step}")
        for name, stream in streams.items():
            print(f"  {name:10}", ml.decode(np.array(stream.tokens, int)).replace("\n", "/"))

# %% tags=["claims", "corpus"]
holds("keep a few of a thousand adapters in memory", len(everything) == 1000 and len(bank.loaded) < 30)
from minilora.tree import named_params

held = bank.loaded[next(iter(bank.loaded))].bytes
stored = sum(p.data.nbytes for p in named_params(ml.load(dtype=np.float64)).values())
holds("An adapter is small, but a thousand are not", held < stored / 10 and 1000 * held > 10 * stored)
holds("a thousand folders are copies of our three", len(everything) == 1000)
holds("So a small memory serves most of them", seen.hits > seen.misses)
holds("a text joins while others are being written", len(streams) == 5)
begun = sorted(streams.values(), key=lambda stream: stream.times[1])
turns = [stream.request.adapter for stream in begun]
holds("The text of the base begins at once", turns[:2] == ["folio-501", None])
holds("`kjv-502` and `code-503` are a token or two behind", turns[2:] == ["kjv-502", "code-503", "kjv-745"])

# %% [markdown]
# Compare the lines: one base wrote them all, in the same steps. The text of the base begins at once. Of the
# adapters a step reads at most one from disk, so that running texts do not wait for long: the lines of
# `kjv-502` and `code-503` are a token or two behind.
#
# ## What is saved
#
# A step with many rows takes little longer than one with a single row, because each weight of the base is
# read once for all of them. So count steps. The figure serves the same requests, of different lengths and
# adapters, with more and more slots, and counts what batches that wait for their longest text would need.

# %% tags=["corpus"]
lengths = np.random.default_rng(6).integers(4, 29, 32)
prompt = ml.encode("O ")


def serve(slots):
    """Steps and seconds for all requests."""
    engine = Engine(model, bank, slots=slots)
    for n, length in enumerate(lengths):
        engine.submit(Request(prompt, int(length), ("folio", "kjv", "code")[n % 3], seed=n))
    start = time.perf_counter()
    engine.run()
    return engine.counters.steps, time.perf_counter() - start


slots = (1, 2, 4, 8, 16)
runs = [serve(n) for n in slots]
continuous = [steps for steps, _ in runs]
waiting = [sum(max(lengths[i : i + n]) for i in range(0, len(lengths), n)) for n in slots]
figures.curves(
    {"batches that wait for the longest": (slots, waiting), "continuous batching": (slots, continuous)},
    "slots",
    "steps for all requests",
    "Steps to serve the same requests, with more and more slots. The steps fall nearly in proportion; with "
    "continuous batching they are fewer than with batches that wait, wherever there is more than one slot.",
    "log",
)

# %% tags=["corpus"]
print("slots   continuous   waiting")
for n, a, b in zip(slots, continuous, waiting, strict=True):
    print(f"{n:5} {a:12} {b:9}")
print("and it takes less time here, too:", runs[-1][1] < runs[0][1])

# %% tags=["claims", "corpus"]
holds(
    "wherever there is more than one slot",
    all(a < b for a, b in zip(continuous[1:], waiting[1:], strict=True)),
)
holds("The steps fall nearly in proportion", 1.5 * continuous[0] > continuous[-1] * slots[-1])

# %% [markdown]
# ## How fast
#
# Times differ from machine to machine, so these were measured once, all in one run, on one small model: a
# file of the repository, made by `python benchmarks/serving.py`, which lies beside this notebook if you have
# a copy. PEFT serves mixed batches, too (`adapter_names`), with a loop over the adapters of the batch in
# every layer. The other alternative is to merge one adapter after the other, and to serve its requests before
# the next.
#
# The more adapters share the requests, the fewer tokens come out; but from 64 adapters on the engine's rate
# hardly falls any more, since a step has no more adapters than slots. PEFT and merging are slower than the
# engine with as many adapters on the same maps. This is what makes a thousand adapters on one base
# affordable. On a GPU, S-LoRA ([Sheng et al. 2023](https://arxiv.org/abs/2311.03285)) keeps them in the
# host's memory and fetches those in use, as the bank does here from disk.

# %%
places = [Path("serving.json"), Path("../benchmarks/results/serving.json")]
measured = json.loads(next((place for place in places if place.exists()), places[0]).read_text())["rows"]


def throughput(kind, targets="all-linear"):
    """Number of adapters -> tokens per second of processor time."""
    run = ("throughput", kind, "zipf", targets)
    some = (row for row in measured if run == tuple(map(row.get, ("part", "kind", "popularity", "targets"))))
    return {row["adapters"]: row["tokens_per_second"] for row in some}


rates = {
    "adapters on q and v": throughput("engine", "q,v"),
    "adapters on all linear maps": throughput("engine"),
    "merging one after the other": throughput("merge"),
    "PEFT": throughput("peft"),
}
(base,) = throughput("base").values()
numbers = sorted({n for some in rates.values() for n in some})
print(f"tokens per second on one core; the base alone has {base:,.0f}")
print(f"{'with so many adapters':28}" + "".join(f"{n:8,}" for n in numbers))
for name, some in rates.items():
    print(f"{name:28}" + "".join(f"{some[n]:8,.0f}" if n in some else 8 * " " for n in numbers))

# %% tags=["claims"]
engine_rates = rates["adapters on all linear maps"]
holds(
    "from 64 adapters on the engine's rate hardly falls any more",
    min(engine_rates.values()) > 0.9 * engine_rates[64],
)
holds(
    "PEFT and merging are slower than the engine",
    all(rates[name][64] < engine_rates[64] for name in ("PEFT", "merging one after the other")),
)

# %% [markdown]
# ## Exercises
#
# Write your answer in place of `None`, and run that cell and the one below it. A wrong answer gets a hint.
# [The solutions, and what is often answered instead](solutions/9_a_thousand_adapters.md).


# %% tags=["exercise"]
# Write the line.
def gathered_product(x, A, B, ids):
    """Row n is B[k] @ A[k] @ x[n] with k = ids[n]. x (N, I), A (K, r, I), B (K, O, r)."""
    return None  # your line in place of None


# %% tags=["check"]
def check():
    """Your answer on integers beside a loop over the rows."""
    rng = np.random.default_rng(7)
    for N, K, r in ((5, 3, 2), (4, 6, 3)):
        x, A, B = (rng.integers(-3, 4, shape) for shape in ((N, 7), (K, r, 7), (K, 6, r)))
        ids = rng.integers(0, K, N)
        mine = given(gathered_product(x, A, B, ids))
        wanted = np.stack([B[k] @ A[k] @ row for row, k in zip(x, ids, strict=True)])
        assert np.shape(mine) == (N, 6), f"the shape is {np.shape(mine)}; expected (N, O) = {(N, 6)}"
        assert np.array_equal(mine, wanted), "other rows: does each one have its own A[ids] and B[ids]?"
    return "with integers, equal by =="


verdict(check)


# %% tags=["exercise"]
# Predict, then run.
def steps_needed():
    """An engine of 2 slots; requests for 6, 2, 2 and 2 tokens wait in this order. How many steps is that?"""
    return None  # your guess, a number, in place of None


# %% tags=["check"]
def check():
    """Your guess beside the engine's count."""
    engine = Engine(ml.load(), slots=2)
    for length in (6, 2, 2, 2):
        engine.submit(Request(ml.encode("O "), length))
    engine.run()
    steps = engine.counters.steps
    hints = {
        8: "so it would be if a batch waited for its longest text; a slot is free at once",
        12: "so it would be with one slot; a step gives every running text a token",
    }
    predicted(steps_needed(), steps, hints, "no: draw the two slots as lines, and put the texts on them")
    return f"{steps}: one slot writes the long text, the other all the short ones"


verdict(check)


# %% tags=["exercise"]
# Change, and explain.
def better_order():
    """Asked for a, b, a, b, a, b, a bank with room for one adapter reads 6 times. Which order reads least,
    and why?

    a: fewer requests have to be answered.
    b: an adapter is read once for all its requests, if they come one after the other.
    c: the more popular adapter comes first.
    """
    return None, None  # your text of six letters, and the letter of the explanation


# %% tags=["check"]
def check():
    """What a bank with room for one adapter reads when it is asked in your order, and in its reverse."""
    order, letter = given(better_order())
    assert sorted(order) == list("aaabbb"), f"{order!r} are not the same requests: three of a, three of b"
    model = ml.load()
    ml.inject(model, ml.LoraConfig(r=1), rng=np.random.default_rng(8))

    def reads(order):
        bank = Bank(model, place, budget=one)
        for name in order:
            bank.take(name)
            bank.give(name)
        return bank.counters.loads

    with tempfile.TemporaryDirectory() as place:
        for name in "ab":
            ml.save_adapter(model, Path(place) / name)
        one = Bank(model, place).take("a").bytes
        loads, reverse = reads(order), reads(order[::-1])
    assert loads == 2, f"{loads} reads; each change from one letter to the other is one"
    hints = {
        "a": f"all {len(order)} are answered, as before",
        "c": f"both are asked for as often, and with the other one first there are {reverse} reads, too",
    }
    chosen(letter, "b", hints)
    return "2 reads. So rows of one adapter should come together: that is also what makes long segments"


verdict(check)

# %% [markdown]
# ## To take along
#
# - The base's product is shared by all rows; each row adds a small term of its own.
# - Loop, segments and gathered product are one function. Which is fastest depends on who shares an adapter.
# - Few adapters in memory serve many on disk, because few are popular.
# - Texts join and leave between tokens, whatever their adapters.
#
# Next: [Beyond language](10_beyond_language.ipynb).

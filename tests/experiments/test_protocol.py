"""The experiments: test data are never trained on, a seed fixes every draw, and a run follows its recipe.

Every window of these texts tells its position, so what reaches the model can be traced. In a
recipe no two numbers are alike and none is its default: a field that is dropped or read for another is seen.
"""

import ast
import contextlib
import copy
import functools
import itertools
import json
import math
import os
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import MISSING, asdict, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple
from unittest import mock

import numpy
import pytest
from helpers import SIZES, batch, gradients, tiny, tiny_lora
from library import np

import minilora
from minilora import cli, finetune, session, spectra
from minilora.adapters import scales
from minilora.backend import to_host
from minilora.compose.combine import add_weighted_adapter, combine
from minilora.data import batching, corpora
from minilora.data.digits import Digits, Images, digits
from minilora.decoding import generate
from minilora.errors import MiniloraError, MismatchError, StorageError
from minilora.experiments import adding_adapters as adding
from minilora.experiments import beyond_language as beyond
from minilora.experiments import beyond_tasks as shown
from minilora.experiments import (
    forgetting,
    harness,
    initialisation,
    merge_equivalence,
    merging,
    pretrain,
    rank_sweep,
    rivals,
    scale,
    subspaces,
)
from minilora.experiments import intrinsic_dimension as intrinsic
from minilora.experiments import intrinsic_tasks as written
from minilora.experiments import known_rank as known
from minilora.experiments import recipe as common
from minilora.experiments import size as wide
from minilora.experiments import which_matrices as which
from minilora.experiments.harness import Inputs
from minilora.experiments.rank_sweep import Plan, Run, Setting
from minilora.fast import parallel
from minilora.formats import tokenizer
from minilora.formats.huggingface import load, read_json, save_model
from minilora.formats.safetensors import stored
from minilora.layers import Linear, Param
from minilora.lora import Adapted, active, fuse, inject, set_adapter
from minilora.methods.bottleneck import BottleneckConfig
from minilora.methods.intrinsic import subspace
from minilora.methods.lora_config import LoraConfig
from minilora.methods.prefixes import PrefixTuningConfig, PromptTuningConfig
from minilora.methods.quantize import quantize
from minilora.methods.starts import StartConfig, lora_ga
from minilora.methods.vectors import IA3Config, VeraConfig
from minilora.model import Config, Llama, RopeScaling, llama
from minilora.optim import AdamW, Schedule, global_norm, lora_plus
from minilora.peft.folder import open_adapter
from minilora.peft.loading import load_adapter, save_adapter
from minilora.serve import bench
from minilora.serve.engine import Engine, Request
from minilora.training import evaluate, train
from minilora.tree import freeze, named_params, trained, unfreeze
from minilora.vision.vit import ViT, vit

PACKAGE = Path(minilora.__file__).parent
ONE = np.array([[65]])  # a prompt of one letter
TINY = Config(hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
              num_key_value_heads=1, max_position_embeddings=130)  # fmt: skip
LENGTH = 128  # of a window in sweep and pretraining


def numbered(words, first):
    """Text in which no two words are alike, so that any seven characters in a row lie at one place."""
    a = "abcdefghijklmnopqrstuvwxyz"
    return "".join(f"{a[i // 676]}{a[i // 26 % 26]}{a[i % 26]} " for i in range(first, first + words))


def marked(name, first):
    """A corpus of numbered text; the parts have 1, 12 and 15 windows and more."""
    parts = [numbered(n, first + skip) for n, skip in ((900, 0), (400, 900), (500, 1300))]
    return corpora.Corpus(name, name, *map(tokenizer.encode, parts))


CORPORA = {name: marked(name, 1800 * i) for i, name in enumerate(("shakespeare", "folio", "kjv"))}
TEXT = CORPORA["folio"].train
INSTEAD = marked("fallback: none", 9000)
OWN, OTHER = numbered(1000, 0), numbered(1100, 5000)


@pytest.fixture(scope="module", autouse=True)
def here(tmp_path_factory):
    """A folder to work in, with two bases and two texts; the built-in corpora are the marked ones."""
    folder = tmp_path_factory.mktemp("protocol")
    for i, name in enumerate(("one", "two")):
        save_model(llama(TINY, np.random.default_rng(i)), folder / name, "")
    for name, text in (("own.txt", OWN), ("other.txt", OTHER)):
        (folder / name).write_text(text)
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.chdir(folder))
        stack.enter_context(mock.patch.object(os, "fsync"))  # no law here is about a power cut
        stack.enter_context(mock.patch.object(parallel, "cores", return_value=1))  # none is about threads
        real = corpora.corpus

        def corpus(spec, cache=None):
            return CORPORA[spec] if spec in CORPORA else real(spec, cache)

        stack.enter_context(mock.patch.object(corpora, "corpus", corpus))
        stack.enter_context(mock.patch.object(corpora, "fallback", return_value=INSTEAD))
        yield folder


outs = (Path(f"out{i}") for i in itertools.count())


class Seen:
    """The windows that reached the model, with the character after each: trained on, and measured on."""

    def __init__(self):
        self.trained, self.measured = [], []

    @contextlib.contextmanager
    def watching(self):
        real = Llama.loss

        def loss(model, ids, labels, train=False):
            for x, y in zip(to_host(ids), to_host(labels), strict=True):
                n = 1 + numpy.flatnonzero(y >= 0)[-1]  # what is beyond the end of an example has no label
                (self.trained if train else self.measured).append(tokenizer.decode([*x[:n], y[n - 1]]))
            return real(model, ids, labels, train)

        with mock.patch.object(Llama, "loss", loss):
            yield self


@contextlib.contextmanager
def by_kind(experiment):
    """(Kind of run, "trained" or "measured") -> the windows that its runs see within the context."""
    seen, real = {}, experiment.work

    def work(run, inputs):
        with Seen().watching() as one:
            row = real(run, inputs)
        for part in ("trained", "measured"):
            seen.setdefault((run.kind, part), []).extend(getattr(one, part))
        return row

    with mock.patch.object(experiment, "work", work):
        yield seen


def within(windows, part, others):
    """Every window lies in this part of the text, and none in the others."""
    assert windows
    for window in windows:
        assert window in part, window
        assert not any(window in other for other in others), window


def apart(windows, part):
    """No character of the part has two labels among these windows."""
    starts = sorted(part.index(window) for window in set(windows))
    assert all(b - a >= len(windows[0]) - 1 for a, b in itertools.pairwise(starts))
    return starts


def split(corpus):
    return [tokenizer.decode(ids) for ids in (corpus.train, corpus.valid, corpus.test)]


# ---- what is tested is never trained on


SMALL = {"r": 2, "steps": 9, "batch": 3, "length": 13, "warmup": 2, "eval_every": 4, "eval_tokens": 61}


def own_text():
    return "own.txt", OWN[: len(OWN) * 95 // 100], OWN[len(OWN) * 95 // 100 :]


def own_folder():
    """Cut as one text: that of all files, in the order of their names, an empty line after each."""
    for name, part in (("b.txt", OTHER), ("a.md", OWN)):
        Path("texts", name).parent.mkdir(exist_ok=True)
        Path("texts", name).write_text(part)
    text = f"{OWN.strip()}\n\n{OTHER.strip()}\n\n"
    cut = int(len(text) * 0.95)
    return "texts", text[:cut], text[cut:]


def built_in():
    text = CORPORA["folio"]
    return "folio", tokenizer.decode(text.train), tokenizer.decode(text.test)


@pytest.mark.parametrize("method", finetune.METHODS)
@pytest.mark.parametrize("source", [own_text, own_folder, built_in], ids=lambda f: f.__name__)
def test_train_never_sees_the_held_out_text(source, method):
    spec, learned, held = source()
    with Seen().watching() as seen:
        finetune.run(finetune.Recipe(spec, "one", method, **SMALL), next(outs))
    within(seen.trained, learned, [held, tokenizer.decode(CORPORA["folio"].valid)])
    within(seen.measured, held, [learned])
    assert len(apart(seen.measured, held)) == 61 // 13
    assert len(seen.trained) == 9 * 3


@pytest.mark.parametrize("method", finetune.METHODS)
@pytest.mark.parametrize("cap", [20, 1000])
def test_train_never_sees_the_held_out_examples(method, cap):
    """57 of 60 examples to train on, the last three to measure on, or as many as the tokens allow."""
    tags = numbered(60, 0).split()
    rows = [{"prompt": f"{tag} ", "completion": tag[::-1]} for tag in tags]
    rows[1::2] = [{"text": f"{tag} {tag[::-1]}"} for tag in tags[1::2]]
    Path("tagged.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    how = SMALL | {"batch": 8, "length": 10, "eval_tokens": cap, "steps": 40}
    with Seen().watching() as seen:
        finetune.run(finetune.Recipe("tagged.jsonl", "one", method, **how), next(outs))
    learned, measured = ({text[:3] for text in texts} for texts in (seen.trained, seen.measured))
    assert measured == set(tags[57 : 57 + max(1, cap // 10)])
    assert learned <= set(tags[:57])
    assert {tags[0], tags[56]} <= learned or method != "lora"  # 320 draws reach both ends


def swept_over(out):
    """Two ranks of the sweep."""
    plan = Plan(("./own.txt",), (2,), ("q_proj",), 5.0, 9, 4, 2, "one", test_windows=5, valid_windows=3)
    with ThreadPoolExecutor(1) as executor:
        rank_sweep.sweep(plan, out, executor=executor)


def spread_over(out):
    """One budget on three sets of matrices."""
    rates = (0.001, 0.02)
    with few_sets():
        which.run(which.Plan(("./own.txt",), (62,), rates, rates, 9, 4, 2, "one", 5, 3), out, jobs=1)


@pytest.mark.parametrize("run", [swept_over, spread_over])
def test_a_sweep_trains_on_train_selects_on_valid_and_reports_test(run):
    learned, valid, test = split(corpora.corpus("./own.txt"))
    with by_kind(rank_sweep) as seen:
        run(next(outs))
    assert not seen["base", "trained"]
    for kind in ("search", "final"):
        within(seen[kind, "trained"], learned, [valid, test])
    within(seen["search", "measured"], valid, [learned, test])
    for kind in ("base", "final"):
        parts = [[w for w in seen[kind, "measured"] if w in part] for part in (valid, test)]
        assert sum(map(len, parts)) == len(seen[kind, "measured"])
        for windows, part in zip(parts, (valid, test), strict=True):
            within(windows, part, [learned])
            apart(windows, part)


def test_adapters_to_add_are_trained_on_train_and_their_scales_chosen_on_valid():
    with by_kind(adding) as seen, few_sums():
        adding.run(ADDED, next(outs), jobs=1)
    learned, valid, test = ("".join(parts) for parts in zip(*map(split, CORPORA.values()), strict=True))
    for kind in ("search", "final"):
        within(seen[kind, "trained"], learned, [valid, test])
        assert not any(w in split(CORPORA[adding.OWN])[0] for w in seen[kind, "trained"])
    within(seen["search", "measured"], valid, [learned, test])
    within(seen["final", "measured"], valid + test, [learned])


def test_adapters_to_compare_are_trained_on_train_and_their_rates_chosen_on_valid():
    with by_kind(subspaces) as seen:
        subspaces.run(COMPARED, next(outs), jobs=1)
    (learned, valid, test), (other, *held) = split(CORPORA["folio"]), split(CORPORA["kjv"])
    within(seen["search", "trained"], learned, [valid, test, other, *held])
    within(seen["search", "measured"], valid, [learned, test])
    within(seen["final", "trained"], learned + other, [valid, test, *held])
    assert sum(window in other for window in seen["final", "trained"]) == 5 * 2  # one adapter of five
    within(seen["final", "measured"], test, [learned, valid])


def test_scales_are_trained_on_train_their_rates_chosen_on_valid_and_measured_on_test():
    learned, valid, test = split(CORPORA["folio"])
    with by_kind(scale) as seen, mock.patch.object(scale, "EDGES", 0):
        scale.run(SCALED, next(outs), jobs=1)
    assert not seen["base", "trained"]
    for kind in ("search", "final"):
        within(seen[kind, "trained"], learned, [valid, test])
    within(seen["search", "measured"], valid, [learned, test])
    for kind in ("base", "final"):
        within(seen[kind, "measured"], test, [learned, valid])


def test_rivals_are_trained_on_train_their_rates_chosen_on_valid_and_measured_on_test():
    learned, valid, test = split(CORPORA["folio"])
    with by_kind(rivals) as seen, few_rates():
        rivals.run(COMPETING, next(outs), jobs=1)
    assert not seen["base", "trained"]
    for kind in ("search", "final"):
        within(seen[kind, "trained"], learned, [valid, test])
    within(seen["search", "measured"], valid, [learned, test])
    for kind in ("base", "final"):
        within(seen[kind, "measured"], test, [learned, valid])


def test_what_is_forgotten_is_measured_on_a_text_that_is_not_trained_on():
    (learned, valid, test), (own, own_valid, own_test) = (
        split(CORPORA["folio"]),
        split(CORPORA["shakespeare"]),
    )
    with by_kind(forgetting) as seen, mock.patch.object(forgetting, "EDGES", 0):
        forgetting.run(FORGOTTEN, next(outs), jobs=1)
    assert not seen["base", "trained"]
    for kind in ("search", "front", "final"):
        within(seen[kind, "trained"], learned, [valid, test, own, own_valid, own_test])
    within(seen["search", "measured"], valid + own_valid, [learned, test, own, own_test])
    for kind in ("front", "final"):
        within(seen[kind, "measured"], test + own_test, [learned, valid, own, own_valid])
        assert {window in own_test for window in seen[kind, "measured"]} == {True, False}


def test_starts_are_trained_on_train_their_rates_chosen_on_valid_and_measured_on_test():
    learned, valid, test = split(CORPORA["folio"])
    with by_kind(initialisation) as seen, mock.patch.object(initialisation, "EDGES", 0):
        initialisation.run(BEGUN, next(outs), jobs=1)
    assert not seen["base", "trained"]
    for kind in ("search", "final"):
        within(seen[kind, "trained"], learned, [valid, test])
    within(seen["search", "measured"], valid, [learned, test])
    for kind in ("base", "final"):
        within(seen[kind, "measured"], test, [learned, valid])


def test_adapters_to_merge_are_trained_on_train_their_rate_chosen_on_valid_and_measured_on_test():
    learned, valid, test = split(CORPORA["folio"])
    with by_kind(merging) as seen, few_merges():
        merging.run(MERGED, next(outs), jobs=1)
    for kind in ("search", "final"):
        within(seen[kind, "trained"], learned, [valid, test])
    within(seen["search", "measured"], valid, [learned, test])
    within(seen["final", "measured"], test, [learned, valid])


def test_subspaces_of_weights_are_trained_on_train_and_measured_on_test():
    """Bases that are pretrained on the way see the text for that, once, and no other part."""
    pretrain.pretrained.cache_clear()
    (learned, valid, test), (own, *held) = split(CORPORA["folio"]), split(CORPORA["shakespeare"])
    with by_kind(intrinsic) as seen, mock.patch.object(intrinsic, "EDGES", 0), handwritten():
        intrinsic.run(DIMENSIONS, next(outs), jobs=1)
    within(seen["start", "trained"], own, [learned, valid, test, *held])
    assert len(seen["start", "trained"]) == 2 * 5  # once
    for kind in ("search", "final"):
        within(seen[kind, "trained"], learned, [valid, test, own, *held])
    within(seen["search", "measured"], valid, [learned, test])
    for kind in ("start", "final"):
        within(seen[kind, "measured"], test, [learned, valid])


def test_digits_are_trained_on_train_their_rates_chosen_on_valid_and_measured_on_test():
    """Each split has one grey of its own."""
    grey = {"train": 0.25, "valid": 0.5, "test": 0.75}
    splits = {part: Images(np.full((30, 64), x, np.float32), np.arange(30) % 10) for part, x in grey.items()}
    seen, real, kinds = {}, ViT.loss, intrinsic.work

    def work(run, inputs):
        def loss(model, pixels, labels, train=False):
            seen.setdefault((run.kind, train), set()).update(np.unique(to_host(pixels)).tolist())
            return real(model, pixels, labels, train)

        if run.target != written.DIGITS:  # its own test is above
            lost = {"status": "diverged", "error": "not done"}
            return {"id": run.id, "config": asdict(run), "source": ""} | lost
        with mock.patch.object(ViT, "loss", loss):
            return kinds(run, inputs)

    with handwritten(**splits), mock.patch.multiple(intrinsic, EDGES=0, work=work):
        intrinsic.run(DIMENSIONS, next(outs), jobs=1)
    assert seen == {
        ("start", False): {0.75}, ("search", True): {0.25}, ("search", False): {0.5},
        ("final", True): {0.25}, ("final", False): {0.75},
    }  # fmt: skip


def test_bases_of_any_width_are_trained_on_train_and_measured_on_test():
    """Their own text is pretrained on, once; learning rates are chosen on the validation split."""
    pretrain.pretrained.cache_clear()
    (learned, valid, test), (own, *held) = split(CORPORA["folio"]), split(CORPORA["shakespeare"])
    with by_kind(wide) as seen, mock.patch.object(wide, "EDGES", 0):
        wide.run(WIDTHS, next(outs), jobs=1)
    within(seen["base", "trained"], own, [learned, valid, test, *held])
    assert len(seen["base", "trained"]) == 2 * 3 * 4  # widths, steps and windows
    for kind in ("search", "final"):
        within(seen[kind, "trained"], learned, [valid, test, own, *held])
    within(seen["search", "measured"], valid, [learned, test, own, *held])
    within(seen["final", "measured"], test, [learned, valid, own, *held])
    within(seen["base", "measured"], test + held[1], [learned, valid, own, held[0]])


def test_pretraining_never_sees_the_held_out_text():
    learned, valid, test = split(CORPORA["folio"])
    recipe = pretrain.Recipe("folio", steps=9, batch=3, warmup=2, seed=1, test_windows=12)
    with Seen().watching() as seen:
        pretrain.run(recipe, next(outs), config=TINY)
    within(seen.trained, learned, [valid, test])
    within(seen.measured, valid + test, [learned])
    assert len(apart([w for w in seen.measured if w in test], test)) == 12
    assert len(apart([w for w in seen.measured if w in valid], valid)) == 3


def test_a_text_is_split_into_three_disjoint_parts():
    for spec in ("./own.txt", "./other.txt"):
        whole = Path(spec).read_text()
        parts = split(corpora.corpus(spec))
        assert "".join(parts) == whole.strip() + "\n\n"
        assert [len(part) / len(whole) for part in parts] == pytest.approx([0.9, 0.05, 0.05], abs=0.001)


# ---- a seed is a seed


def bits(params):
    """Path -> the bytes of a parameter."""
    return {path: to_host(p.data).tobytes() for path, p in params.items()}


@contextlib.contextmanager
def starting(module):
    """What is trainable in the module's own training, as it is before the first step."""
    starts, real = [], module.train

    def train(model, *given, **how):
        starts.append(bits(trained(model)))
        return real(model, *given, **how)

    with mock.patch.object(module, "train", train):
        yield starts


def trained_from(module, run):
    """The random start, the batches and the losses of one training."""
    with starting(module) as starts, Seen().watching() as seen:
        losses = run()
    fresh = {path: a for path, a in starts[0].items() if len(set(a)) > 4}  # neither zeros nor ones
    return {"batches": sorted(seen.trained), "losses": losses} | fresh


def fine_tuned(method):
    def run(seed):
        losses = []
        recipe = finetune.Recipe("own.txt", "one", method, **SMALL, seed=seed)
        found = trained_from(session, lambda: [
            finetune.run(recipe, next(outs), progress=lambda step, loss: losses.append(loss)).after, *losses
        ])  # fmt: skip
        kept = {"batches", "losses"} | {path for path in found if path.endswith(".A")}
        assert len(kept) == (2 if method == "full" else 2 + 7)
        return {part: found[part] for part in kept}  # in full, and DoRA's m: all start as the base

    return run


def swept(method):
    def run(seed):
        cell = Run("final", "folio", method, 2 * (method == "lora"), ("all-linear",), 5.0, seed, 0.02,
                   steps=9, batch=3, base="one", text=CORPORA["folio"].digest, test_windows=5,
                   valid_windows=3)  # fmt: skip
        found = trained_from(rank_sweep, lambda: [worked(cell)[k] for k in ("test", "curve")])
        kept = {"batches", "losses"} | {path for path in found if path.endswith(".A")}
        assert len(kept) == (2 if method == "full" else 2 + 7)
        return {part: found[part] for part in kept}

    return run


ADDED = adding.Plan(("folio", "kjv"), "one", 3, 5.0, (1e-4, 0.05), 8, 4, 1, 2, 7, 9)


def few_sums():
    """One method of adding adapters, and one scale."""
    return mock.patch.multiple(adding, METHODS={"linear": {"method": "linear"}}, SCALES=(1.0,))


def summing(seed):
    """Of the last adapter, the joint one, every part; and what dare leaves of two of them."""
    rates = tuple((name, 0.02) for name in (*ADDED.targets, adding.JOINT))
    cell = adding.Run("final", ADDED, seed, rates)
    inputs = Inputs("one", load("one"), CORPORA)
    methods = mock.patch.multiple(adding, METHODS={"dare": adding.METHODS["dare"]}, SCALES=(1.0,))
    with methods, mock.patch.object(adding, "add_weighted_adapter", wraps=add_weighted_adapter) as adds:
        found = trained_from(common, lambda: adding.work(cell, inputs)["losses"])
    assert adds.call_args.kwargs["seed"] == seed
    return {part: a for part, a in found.items() if not part.endswith(".B")}


KNOWN = known.Plan(("map", "permutation"), (2, 3), "one", 2, (31, 7, 11), 6, 9)


def planting(seed):
    """What is left of each task after a few steps; the search of a rate has a seed of its own."""
    plan = replace(KNOWN, steps=(9, 4, 4), windows=2)
    base = llama(replace(TINY, num_hidden_layers=2, hidden_size=12), np.random.default_rng(0))
    freeze(base)
    inputs = Inputs("one", base, {known.OWN: CORPORA["folio"], "permuted:2": CORPORA["kjv"]})
    rows = {
        (task, rank): known.work(known.Run("final", plan, task, 2, rank, seed, 0.02), inputs)
        for task, rank in (*((task, 3) for task in known.TASKS), (known.REVERSED, 3), (known.REVERSED, 0))
    }
    return {case: [row["excess"], row.get("spectrum")] for case, row in rows.items()}


COMPARED = subspaces.Plan("folio", "kjv", "one", (1, 3, 4), 7.0, (1e-4, 0.05), 5, 3, 1, 2, 8, 10)


def comparing(seed):
    """The starts of all five adapters of a seed, their batches, and what comes of them."""
    cell = subspaces.Run("final", COMPARED, seed, tuple((rank, 0.02) for rank in COMPARED.ranks))
    with starting(common) as starts, Seen().watching() as seen:
        row = subspaces.work(cell, Inputs("one", load("one"), CORPORA))
    found = {f"{i} {p}": a for i, start in enumerate(starts) for p, a in start.items() if p.endswith(".A")}
    assert len(found) == 5 * 7
    return found | {"batches": sorted(seen.trained)} | {key: row[key] for key in ("losses", *COMPARISON)}


SCALED = scale.Plan(
    "folio", "one", ranks=(2, 3), middle=3, ratios=(6.0,), rates=(0.02,), full_rates=(0.003,), steps=4,
    seeds=1, batch=2, test_windows=9, valid_windows=7,
)  # fmt: skip


def scaled(rank):
    """One run of the experiment with scales."""

    def run(seed):
        cell = scale.Run("final", SCALED, rank, 2.0 * (rank > 0), rate=0.02, seed=seed)
        inputs = Inputs("one", load("one"), CORPORA)
        found = trained_from(common, lambda: scale.work(cell, inputs)["test"])
        kept = {"batches", "losses"} | {path for path in found if path.endswith(".A")}
        assert len(kept) == (2 + 7 if rank else 2)
        return {part: found[part] for part in kept}

    return run


COMPETING = rivals.Plan(
    "folio", "one", ("all weights", "LoRA", "VeRA", "biases"), rank=3, others=(1,), steps=4, seeds=1,
    few_seeds=2, batch=5, test_windows=9, valid_windows=7,
)  # fmt: skip


def few_rates():
    """One learning rate for all methods."""
    return mock.patch.multiple(rivals, EDGES=0, RATES={}, USUAL=(0.02,))


def competing(method, n, letters):
    """One run of the experiment with rivals; a seed draws these parts of each adapter."""

    def run(seed):
        cell = rivals.Run("final", COMPETING, method, 3, n, 0.02, seed)
        inputs = Inputs("one", load("one"), CORPORA)
        found = trained_from(common, lambda: rivals.work(cell, inputs)["test"])
        kept = {path for path in found if path.endswith(letters or "no part")}
        assert bool(kept) == bool(letters)
        return {part: found[part] for part in kept | {"batches", "losses"}}

    return run


BEGUN = initialisation.Plan(
    "folio", "one", rank=2, alpha=5.0, rates=(0.02,), full_rates=(0.003,), steps=4, seeds=1, batch=3,
    test_windows=9, valid_windows=7,
)  # fmt: skip
FEW_STARTS = ("B zero", "LoRA-GA")


def beginning(start, letters):
    """One run of the experiment with starts; a seed draws these factors of each map."""

    def run(seed):
        cell = initialisation.Run("final", BEGUN, start, 0.02, seed)
        inputs = Inputs("one", load("one"), CORPORA)
        found = trained_from(
            common, lambda: [initialisation.work(cell, inputs)[k] for k in ("losses", "test")]
        )
        kept = {"batches", "losses"} | {path for path in found if path[-1] in letters}
        assert len(kept) == 2 + 7 * len(letters)
        return {part: found[part] for part in kept}

    return run


MERGED = merging.Plan("folio", "one", 3, 7.0, (1e-4, 0.05), 13, 4, 1, 2, 9, 10)


def few_merges():
    """One dtype, two sizes of ΔW, two counts of cycles, and no rate beyond the first ones."""
    return mock.patch.multiple(merging, DTYPES=("bfloat16",), TIMES=(0.01, 1.0), CYCLES=(1, 3), EDGES=0)


def merging_one(seed):
    """The start and the batches of a seed, and what comes of them."""
    run, inputs = merging.Run("final", MERGED, seed, 0.02), Inputs("one", load("one"), CORPORA)
    with few_merges():
        found = trained_from(common, lambda: merging.work(run, inputs))
    row = found.pop("losses")
    kept = {"batches"} | {path for path in found if path.endswith(".A")}
    assert len(kept) == 1 + 7
    return {part: found[part] for part in kept} | {key: row[key] for key in ("merged", "one", "others")}


def pretrained(seed):
    recipe = pretrain.Recipe("folio", steps=3, batch=2, warmup=1, seed=seed, test_windows=4)
    found = trained_from(session, lambda: pretrain.run(recipe, next(outs), config=TINY))
    found["losses"] = [found["losses"].test, found["losses"].valid]
    assert len(found) == 2 + 1 + 7  # the table and the linear maps; norms start as ones
    return found


def merged(seed):
    """Of maps up to 64 wide; the wider ones take their time and draw from the same generator."""
    real = merge_equivalence.one

    def one(rng, n, *given):
        return real(rng, n, *given) if n <= 64 else (rng.random(),) * 3

    with mock.patch.object(merge_equivalence, "one", one):
        rows = merge_equivalence.run(seed, rank=3, draws=2)
    for row in rows[:3]:  # each the largest of two draws
        assert (row["rank"], row["draws"]) == (3, 2)
        rng = np.random.default_rng([seed, row["inputs"]])
        draws = [real(rng, row["inputs"], 3, np.float32) for _ in range(2)]
        assert [row[key] for key in ("difference", "bound", "ratio")] == [
            max(x) for x in zip(*draws, strict=True)
        ]
    return {(row["dtype"], row["inputs"]): row["bound"] for row in rows}


def said(seed):
    """What `minilora generate --seed` prints."""
    import io

    with contextlib.redirect_stdout(io.StringIO()) as out:
        cli.main(["generate", "To be", "--base", "one", "--max-tokens", "20", "--seed", str(seed)])
    return {"text": out.getvalue()}


def with_two():
    """A model of two adapters."""
    model, rng = load("one"), np.random.default_rng(0)
    for name in "ab":
        inject(model, LoraConfig(r=2, init="both"), rng=rng, name=name)
    return model


def summed(seed):
    """What DARE makes of two folders."""
    model, out = with_two(), next(outs)
    for name in "ab":
        set_adapter(model, name)
        save_adapter(model, out / name)
    combine({out / "a": 1, out / "b": 1}, out / "sum", method="dare", density=0.5, seed=seed)
    return {name: a.tobytes() for name, a in open_adapter(out / "sum").tensors.items()}


def added(seed):
    """What DARE makes of two adapters of a model."""
    model = with_two()
    add_weighted_adapter(model, {"a": 1, "b": 1}, "sum", method="dare", density=0.5, seed=seed)
    return bits(trained(model))


def served(seed):
    """The text of a request."""
    engine = Engine(load("one"))
    stream = engine.submit(Request(ONE[0], 30, seed=seed))
    engine.run()
    return {"": stream.tokens}


FORGOTTEN = forgetting.Plan(
    ("folio",), "shakespeare", "one", ranks=(3,), rates=(0.02,), full_rates=(0.003, 0.005), steps=4, seeds=1,
    batch=3, test_windows=5, valid_windows=2,
)  # fmt: skip


def forgetting_of(rank):
    """One run of the experiment with forgetting."""

    def run(seed):
        cell = forgetting.Run("final", FORGOTTEN, "folio", rank, rate=0.02, seed=seed)
        inputs = Inputs("one", load("one"), CORPORA)
        row = {}
        found = trained_from(common, lambda: row.update(forgetting.work(cell, inputs)) or row["own_test"])
        kept = {"batches", "losses"} | {path for path in found if path.endswith(".A")}
        assert len(kept) == (2 + 7 if rank else 2)
        return {part: found[part] for part in kept} | {"maps": row["maps"]}

    return run


DIMENSIONS = intrinsic.Plan(
    ("folio",), dims=(40,), ranks=(2,), widths=(8,), pretraining=(2,), rates=(0.6,), steps=4, search_steps=3,
    seeds=1, few_seeds=2, batch=5, base="one", test_windows=7, valid_windows=6,
)  # fmt: skip


@contextlib.contextmanager
def handwritten(**splits):
    """Few digits, two d's, and a tiny transformer made anew; the images seen in each split, if asked for."""
    shape = replace(TINY, num_key_value_heads=2)
    cut = {part: getattr(digits(), part) for part in ("train", "valid", "test")}
    some = Digits(**{part: Images(a.pixels[:30], a.labels[:30]) for part, a in (cut | splits).items()})
    fresh = functools.cache(written.random_vit.__wrapped__)
    few = {"DIMS": (30, 60), "digits": lambda: some, "random_vit": fresh}
    with mock.patch.object(written, "SHAPE", shape), mock.patch.multiple(intrinsic, **few):
        yield some


def written_words(method, size):
    """One run on digits: how it starts, the images of its batches, and what comes of them."""

    def run(seed):
        cell = intrinsic.Run("final", DIMENSIONS, written.DIGITS, 48, 0, method, size, 0.6, seed)
        batches, real = [], written.Images.drawn

        def drawn(*given):
            batches.append(real(*given))
            return batches[-1]

        inputs = Inputs("one", load("one"), {})
        with handwritten(), mock.patch.object(written.Images, "drawn", drawn):
            row = intrinsic.work(cell, inputs)
            found = {"after": repr(next(batches[0])), "test": row["test"], "rank": row["rank"]}
            if method == "subspace":
                project = intrinsic.prepared(cell, inputs).project
                found |= {part: getattr(project, part).tobytes() for part in ("signs", "order", "g")}
        return found

    return run


def subspaced(method, size):
    """One run of the experiment with random subspaces: how it starts, its batches, and what comes of them."""

    def run(seed):
        cell = intrinsic.Run("final", DIMENSIONS, "folio", method=method, size=size, rate=0.6, seed=seed)
        inputs, row = Inputs("one", load("one"), CORPORA), {}
        found = trained_from(common, lambda: row.update(intrinsic.work(cell, inputs)) or row["test"])
        drawn = {path for path in found if path.endswith(".A")}
        assert bool(drawn) == (method == "lora")
        if method in ("subspace", "said"):
            project = intrinsic.prepared(cell, inputs).project
            found |= {part: getattr(project, part).tobytes() for part in ("signs", "order", "g")}
            drawn |= {"signs", "order", "g"}
        return {part: found[part] for part in drawn | {"batches", "losses"}} | {"rank": row["rank"]}

    return run


WIDTHS = wide.Plan(
    "folio", widths=(8, 16), ranks=(2,), alpha=5.0, rates=(0.02,), full_rates=(0.003,), pretraining=3,
    steps=6, search_steps=2, seeds=1, batch=4, test_windows=9, valid_windows=7,
)  # fmt: skip


def widened(rank):
    """One run of the experiment with the size of the base; its base is one for all seeds."""

    def run(seed):
        cell, inputs = wide.Run("final", WIDTHS, 8, rank, 0.02, seed), Inputs("one", load("one"), CORPORA)
        pretrain.pretrained.cache_clear()
        with mock.patch.object(pretrain, "shape", flat):
            wide.pretrained(cell, inputs)  # before its batches could be taken for the run's
            found = trained_from(common, lambda: wide.work(cell, inputs)["test"])
        kept = {"batches", "losses"} | {path for path in found if path.endswith(".A")}
        assert len(kept) == (2 + 7 if rank else 2)
        return {part: found[part] for part in kept}

    return run


BEYOND = beyond.Plan(
    ranks=(2,), planted=(2,), rates=(0.02,), full_rates=(0.003,), permuted_rates=(0.05,), pretraining=3,
    drawing_pretraining=4, steps=5, permuted_steps=6, drawing_steps=2, seeds=1, batch=7, samples=16,
)  # fmt: skip


@contextlib.contextmanager
def few_digits():
    """Few images, tiny bases made anew, and a short diffusion."""
    cut = {part: getattr(digits(), part) for part in ("train", "valid", "test")}
    some = Digits(**{part: Images(a.pixels[:30], a.labels[:30]) for part, a in cut.items()})
    bases = functools.cache(shown.pretrained.__wrapped__)
    shape = replace(TINY, num_key_value_heads=2)
    with mock.patch.multiple(shown, SHAPE=shape, TIMES=5, pretrained=bases, digits=lambda: some):
        yield


def beyond_words(task, method, rank=0):
    """One run of the experiment beyond language: how it starts, what it sees, and what comes of it."""

    def run(seed):
        cell, batches, real = beyond.Run("final", BEYOND, task, method, rank, 0.02, seed), [], shown.drawn

        def drawn(*given):
            batches.append(real(*given))
            return batches[-1]

        with few_digits():
            beyond.base_of(cell)
            start = bits(trained(beyond.prepared(cell)))
            with mock.patch.object(shown, "drawn", drawn):
                row = beyond.measured(cell)
        after = repr(next(batches[0]))  # the batch after the last
        found = {path: a for path, a in start.items() if path.endswith(".A")}
        adapted = {"permuted:2": 1, "rotated": 8, shown.DRAWN: 12}[task]
        assert len(found) == (adapted if method == "lora" else 0)
        return found | {"batches": after, "test": row["test"]} | (
            {"samples": row["samples"]} if task == shown.DRAWN else {}
        )  # fmt: skip

    return run


def benched(seed):
    """The adapters and requests of serve-bench."""
    found, play, adapted = [], bench.play, bench.adapted

    def played(engine, arrivals, requests, *how):
        found.append([(bytes(r.prompt), r.max_new_tokens, r.adapter) for r in requests])
        return play(engine, arrivals, requests, *how)

    def made(*how):
        found.append(bits(trained(copy := adapted(*how))))
        return copy

    with mock.patch.multiple(bench, play=played, adapted=made):
        bench.serve_bench("one", (2,), rank=2, requests=5, rounds=1, seed=seed)
    assert len(found) == 1 + 2 * 3  # the adapter; to warm up, at once and one by one
    return dict(enumerate(found))


SEEDS = {
    "combine.combine": [summed],
    "combine.add_weighted_adapter": [added],
    "combine.results": [],  # these two are parts of both
    "combine.check_options": [],
    "engine.Request": [served],
    "bench.serve_bench": [benched],
    "openai.Asked": [],  # hands it to its Request, which serve/test_http.py sees
    "cli combine": [],  # and these to their functions, which test_flags.py sees
    "cli serve-bench": [],
    "finetune.Recipe": [fine_tuned(method) for method in finetune.METHODS],
    "adding_adapters.Run": [summing],
    "known_rank.Run": [planting],
    "subspaces.Run": [comparing],
    "rows.Run": [swept("lora"), swept("full")],
    "scale.Run": [scaled(3), scaled(0)],
    "rivals.Run": [
        competing("all weights", 0, ()),
        competing("biases", 0, ()),
        competing("LoRA", 3, (".A",)),
        competing("VeRA", 3, ()),
        competing("bottleneck, Houlsby", 3, ("down.weight",)),
        competing("prefix", 3, (".keys", ".values")),
        competing("prompt", 2, (".rows",)),
    ],
    "forgetting.Run": [forgetting_of(3), forgetting_of(0)],
    "initialisation.Run": [
        beginning("B zero", "A"),
        beginning("A zero", "B"),
        beginning("both random", "AB"),
        beginning("LoRA-GA", "AB"),
        beginning("random directions", "AB"),
        beginning("PiSSA", ""),
        beginning("all weights", ""),
    ],
    "merging.Run": [merging_one],
    "beyond_language.Run": [
        beyond_words("rotated", "lora", 2),
        beyond_words("rotated", "full"),
        beyond_words("permuted:2", "lora", 2),
        beyond_words(shown.DRAWN, "lora", 2),
        beyond_words(shown.DRAWN, "full"),
    ],
    "intrinsic_dimension.Run": [
        subspaced("subspace", 40),
        subspaced("said", 40),
        subspaced("lora", 2),
        subspaced("full", 0),
        written_words("subspace", 30),
        written_words("full", 0),
    ],
    "size.Run": [widened(2), widened(0)],
    "pretrain.Recipe": [pretrained],
    "merge_equivalence.run": [merged],
    "cli generate": [said],
    "cli train": [],  # these two hand it to their Recipe, which test_flags.py sees
    "cli pretrain": [],
}


def takers():
    """Every class with a field `seed`, function with an argument `seed` and command with an option --seed."""
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ClassDef):
                names = [x.target.id for x in node.body if isinstance(x, ast.AnnAssign)]
            elif isinstance(node, ast.FunctionDef):
                names = [x.arg for x in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
            else:
                continue
            if "seed" in names:
                yield f"{file.stem}.{node.name}"
    commands = next(a for a in cli.parser()._actions if a.choices and a.nargs == "A...").choices
    yield from (f"cli {name}" for name, c in commands.items() if any(a.dest == "seed" for a in c._actions))


def test_everything_that_takes_a_seed_is_tested():
    assert set(SEEDS) == set(takers())


@pytest.mark.parametrize("name", [name for name in SEEDS if SEEDS[name]])
def test_equal_seeds_give_equal_bits_and_other_seeds_change_every_draw(name):
    for taker in SEEDS[name]:
        one, again, two = taker(5), taker(5), taker(6)
        assert one == again
        assert one.keys() == two.keys()
        assert [part for part in one if one[part] == two[part]] == []


def injected(rng):
    model, _ = tiny(0, np.float32)
    inject(model, LoraConfig(r=2, targets=re.compile(".*(_proj|embed_tokens)"), init="both"), rng=rng)
    return model


DRAWS = {
    "llama": lambda rng: bits(named_params(llama(TINY, rng))),
    "inject": lambda rng: bits(trained(injected(rng))),
    "batches": lambda rng: {
        i: x.tobytes() for i, (x, _) in enumerate(itertools.islice(batching.batches(TEXT, rng, 3, 13), 4))
    },
    "generate": lambda rng: {"": bytes(int(t[0]) for t in generate(load("one"), ONE, 30, rng=rng))},
}


@pytest.mark.parametrize("name", DRAWS)
def test_every_draw_comes_from_the_given_generator(name):
    one, again, two = (DRAWS[name](np.random.default_rng(seed)) for seed in (5, 5, 6))
    assert one == again
    drawn = {part for part in one if len(set(one[part])) > 4}  # neither zeros nor ones
    assert drawn
    assert len({one[part] for part in drawn}) == len(drawn)  # no two are one draw
    assert not [part for part in drawn if one[part] == two[part]]


# ---- a recipe is what is run


class Case(NamedTuple):
    """How to try every field of one class of settings."""

    usual: Any  # no two of its numbers are alike, and none is the default
    run: Any  # settings -> what comes of them, by part
    hand: Any  # the same, spelled out; None where other tests have the formula
    changes: dict[str, tuple[Any, str]]  # field -> another value, and which parts it changes: no others
    along: Any = MappingProxyType({})  # field -> what it needs beside it, before and after


def tensors(model):
    """What is trained, as bytes, and the scale of every adapted map."""
    adapted = any(".adapters." in path for path in trained(model))
    return bits(trained(model)) | (scales(model) if adapted else {})


def tuned(recipe):
    losses, evals, out = [], [], next(outs)
    outcome = finetune.run(recipe, out, progress=lambda *x: losses.append(x), told=lambda *x: evals.append(x))
    model = load(out) if recipe.method == "full" else load(recipe.base)
    if recipe.method == "full":
        unfreeze(model)
    else:
        load_adapter(model, out)
        config = read_json(out / "adapter_config.json")
        names = ("base_model_name_or_path", "r", "lora_alpha", "use_dora")
        assert [config[name] for name in names] == [
            recipe.base,
            recipe.r,
            recipe.alpha,
            recipe.method == "dora",
        ]
    assert (outcome.before, outcome.after) == (evals[0][1], evals[-1][1])
    assert outcome.parameters == sum(p.data.size for p in trained(model).values())
    return {"weights": tensors(model), "losses": losses, "evals": evals}


def tuned_by_hand(recipe):
    text, model = Path(recipe.data).read_text(), load(recipe.base)
    cut = int(len(text) * 0.95)
    if recipe.bits:
        quantize(model)
    if recipe.method == "full":
        unfreeze(model)
    else:
        dora = recipe.method == "dora"
        config = LoraConfig(r=recipe.r, alpha=recipe.alpha, targets=recipe.targets, dora=dora, detach=dora)
        inject(model, config, rng=np.random.default_rng(recipe.seed))
    held = batching.eval_batches(tokenizer.encode(text[cut:]), 8, recipe.length, limit=recipe.eval_tokens)
    rng, losses = np.random.default_rng([recipe.seed, 1]), []
    history = train(
        model,
        batching.batches(tokenizer.encode(text[:cut]), rng, recipe.batch, recipe.length),
        AdamW({"full": 1e-4}.get(recipe.method, 1e-3) if recipe.lr is None else recipe.lr, betas=(0.9, 0.99)),
        steps=recipe.steps,
        schedule=Schedule(recipe.steps, warmup=recipe.warmup, kind="cosine", final=0.0),
        evaluate=lambda: evaluate(model, held),
        eval_every=recipe.eval_every,
        progress=lambda *x: losses.append(x),
    )
    return {"weights": tensors(model), "losses": losses, "evals": history.evals}


def base_made(recipe):
    losses, out = [], next(outs)
    found = pretrain.run(recipe, out, config=TINY, progress=lambda *x: losses.append(x))
    kept, card = read_json(out / "config.json")["minilora"], (out / "README.md").read_text()
    assert f"**{found.test:.4f} nats per character**, {recipe.test_windows:,} windows" in card
    assert f"validation split | {found.valid:.4f} nats" in card
    assert kept["recipe"] == asdict(recipe)
    assert (kept["test"], kept["valid"]) == (found.test, found.valid)
    assert found.characters == recipe.steps * recipe.batch * LENGTH
    weights = bits(named_params(load(out)))
    return {"weights": weights, "losses": losses, "test": found.test, "valid": found.valid}


def base_made_by_hand(recipe):
    text, losses = CORPORA[recipe.corpus], []
    model = llama(TINY, np.random.default_rng(recipe.seed))
    train(
        model,
        batching.batches(text.train, np.random.default_rng([recipe.seed, 1]), recipe.batch, LENGTH),
        AdamW(recipe.lr, betas=(0.9, recipe.beta2), eps=1e-8, weight_decay=recipe.weight_decay, clip=1.0),
        steps=recipe.steps,
        schedule=Schedule(recipe.steps, warmup=recipe.warmup),
        progress=lambda *x: losses.append(x),
    )
    test, valid = (
        evaluate(model, batching.eval_batches(ids, 16, LENGTH, limit=n * LENGTH))
        for ids, n in ((text.test, recipe.test_windows), (text.valid, recipe.test_windows // 4))
    )
    return {"weights": bits(named_params(model)), "losses": losses, "test": test, "valid": valid}


PARTS = ("status", "source", "valid", "test", "parameters", "curve", "spectra", "shapes")


def worked(run):
    """The row of one run, on the texts that its plan would read."""
    text = corpora.fallback(run.target) if run.fallback else corpora.corpus(run.target)
    return rank_sweep.work(run, Inputs(run.base, load(run.base), {run.target: text}))


def cell_done(run):
    try:
        row = worked(run)
    except MismatchError:
        return dict.fromkeys(PARTS, "refused")
    return {part: row.get(part) for part in PARTS}


def cell_done_by_hand(run):
    text = INSTEAD if run.fallback else CORPORA[run.target]
    if text.digest != run.text:
        return dict.fromkeys(PARTS, "refused")
    base, model = load(run.base), load(run.base)
    if run.method == "full":
        unfreeze(model)
    else:
        config = LoraConfig(r=run.rank, alpha=run.alpha, targets=run.modules)
        inject(model, config, rng=np.random.default_rng([run.seed, run.rank]))
    valid = batching.eval_batches(text.valid, 16, LENGTH, limit=run.valid_windows * LENGTH)
    test = batching.eval_batches(text.test, 16, LENGTH, limit=run.test_windows * LENGTH)
    history = train(
        model,
        batching.batches(text.train, np.random.default_rng([run.seed, 0]), run.batch, LENGTH),
        AdamW(run.lr, betas=(0.9, 0.99), eps=run.eps),
        steps=run.steps,
        schedule=Schedule(run.steps, warmup=run.steps // 20),
        evaluate=lambda: evaluate(model, valid),
        eval_every=run.steps // 10,
    )
    row = {"status": "done", "source": text.source, "valid": evaluate(model, valid)}
    row |= dict.fromkeys(PARTS[3:]) | {"parameters": sum(p.data.size for p in trained(model).values())}
    if run.kind == "final":
        whole = run.method == "full"
        found = spectra.spectrum_between(base, model) if whole else spectra.spectrum(model)
        params = named_params(base)
        row |= {"test": evaluate(model, test), "curve": history.evals}
        row["spectra"] = {path: [float(f"{x:.6g}") for x in S] for path, S in found.items()}
        row["shapes"] = {path: list(params[f"{path}.weight"].data.shape) for path in found}
    return row


def crafted(run, lora_rates, full_rates):
    """A row in no time; the second smallest learning rate is the best to validate, the largest to test."""
    row = {"id": run.id, "config": asdict(run), "source": "crafted", "status": "done", "parameters": 1}
    rates = sorted(full_rates if run.method == "full" else lora_rates)
    return row | {"valid": abs(math.log((run.lr or 1) / rates[1])), "test": -run.lr}


def values(runs):
    """Field -> what the runs have in it."""
    assert len(set(runs)) == len(runs)
    return {f.name: {getattr(run, f.name) for run in runs} for f in fields(Run)}


def planned(plan):
    """What the runs of a sweep are, as far as no number in them is trained for."""
    done = []

    def work(run, inputs):
        done.append(run)
        usual = Plan().setting(run.target)
        return crafted(run, usual.lora_rates, usual.full_rates)

    with ThreadPoolExecutor(1) as executor, mock.patch.object(rank_sweep, "work", work):
        rank_sweep.sweep(plan, next(outs), executor=executor)
    return values(done) | {"runs": set(done)}


def planned_by_hand(plan):
    runs = []
    for target in plan.targets:
        how = Plan().setting(target)
        steps = how.steps if plan.steps is None else plan.steps
        usual = min(how.search_steps, steps // 3)
        base = Run(
            "base", target, "none", base=plan.base, text=CORPORA[target].digest, eps=0.0,
            test_windows=plan.test_windows, valid_windows=plan.valid_windows,
        )  # fmt: skip
        full = replace(base, method="full", batch=how.batch, eps=1e-8)
        lora = replace(
            full, method="lora", eps=how.eps, modules=how.modules if plan.modules is None else plan.modules,
            alpha=how.alpha if plan.alpha is None else plan.alpha,
        )  # fmt: skip
        runs.append(base)
        methods = [(full, how.full_rates), *((replace(lora, rank=r), how.lora_rates) for r in plan.ranks)]
        for method, rates in methods:
            short = usual if plan.search_steps is None else plan.search_steps
            runs += [replace(method, kind="search", steps=short, seed=1000, lr=lr) for lr in rates]
            best = sorted(rates)[1]
            runs += [replace(method, kind="final", steps=steps, seed=i, lr=best) for i in range(plan.seeds)]
    return values(runs) | {"runs": set(runs)}


def set_up(setting):
    with mock.patch.object(rank_sweep, "TEXT", setting):
        return planned(Plan(("folio",), ranks=(2, 3), base="one"))


def set_up_by_hand(setting):
    with mock.patch.object(rank_sweep, "TEXT", setting):
        return planned_by_hand(Plan(("folio",), ranks=(2, 3), base="one"))


COSTS = {("q_proj", "v_proj"): 16 + 12, ("o_proj",): 16, ("gate_proj", "up_proj", "down_proj"): 60}  # r = 1


def few_sets():
    """Three sets of matrices."""
    return mock.patch.object(which, "SETS", {" ".join(modules): modules for modules in COSTS})


def laid_out(plan):
    """What the runs of a budget on sets of matrices are, as far as no number in them is trained for."""
    done = []

    def work(run, inputs):
        done.append(run)
        return crafted(run, plan.rates, plan.full_rates)

    with mock.patch.object(rank_sweep, "work", work), few_sets():
        which.run(plan, next(outs), jobs=1)
    return values(done) | {"runs": set(done)}


def laid_out_by_hand(plan):
    runs = []
    for target in plan.targets:
        base = Run(
            "base", target, "none", base=plan.base, text=CORPORA[target].digest, eps=0.0,
            test_windows=plan.test_windows, valid_windows=plan.valid_windows,
        )  # fmt: skip
        full = replace(base, method="full", batch=8, eps=1e-8)
        lora = replace(full, method="lora", alpha=16.0)
        cells = [(full, plan.full_rates)]
        for modules, cost in COSTS.items():
            ranks = [round(budget / cost) for budget in plan.budgets]
            cells += [(replace(lora, rank=r, modules=modules), plan.rates) for r in ranks]
        runs.append(base)
        for cell, rates in cells:
            short = replace(cell, kind="search", steps=plan.search_steps, seed=1000)
            runs += [replace(short, lr=lr) for lr in rates]
            best = replace(cell, kind="final", steps=plan.steps, lr=sorted(rates)[1])
            runs += [replace(best, seed=i) for i in range(plan.seeds)]
    return values(runs) | {"runs": set(runs)}


def added_up(plan):
    """What is run, the validation losses of the search, and test losses of the joint adapter and the base."""
    with few_sums():
        rows = adding.run(plan, next(outs), jobs=1)
    runs = [[row["config"][k] for k in ("kind", "seed", "rates", "texts")] for row in rows]
    finals = [row["losses"] for row in rows if row["config"]["kind"] == "final"]
    return {
        "runs": json.dumps(runs),
        "valid": {tuple(row["config"]["rates"][0]): row["valid"] for row in rows if "valid" in row},
        "joint": [losses[adding.JOINT] for losses in finals],
        "base": [losses["base"] for losses in finals],
    }


@functools.cache
def added_model(base, mine, rank, alpha, rate, seed, steps, batch):
    """One adapter after training on its texts in turn."""
    model = load(base)
    inject(model, LoraConfig(r=rank, alpha=alpha), rng=np.random.default_rng([seed, 0]))
    rngs = [np.random.default_rng([seed, 1, i]) for i in range(len(mine))]
    streams = [
        batching.batches(CORPORA[text].train, rng, batch, LENGTH)
        for text, rng in zip(mine, rngs, strict=True)
    ]
    steps *= len(mine)
    turns = (next(streams[i % len(mine)]) for i in itertools.count())
    schedule = Schedule(steps, warmup=steps // 20)
    train(model, turns, AdamW(rate, betas=(0.9, 0.99)), steps=steps, schedule=schedule, threads=1)
    return model


def added_up_by_hand(plan):
    names, texts = (*plan.targets, "joint"), (*plan.targets, "shakespeare")
    digests = [CORPORA[text].digest for text in texts]

    def loss(model, text, split, windows):
        ids = getattr(CORPORA[text], split)
        return evaluate(model, batching.eval_batches(ids, 16, LENGTH, limit=windows * LENGTH))

    def learn(name, rate, seed, steps):
        mine = plan.targets if name == "joint" else (name,)
        return added_model(plan.base, mine, plan.rank, plan.alpha, rate, seed, steps, plan.batch), mine

    runs, valid, best = [], {}, []
    for name in names:
        for rate in plan.rates:
            model, mine = learn(name, rate, 1000, plan.search_steps)
            found = [loss(model, text, "valid", plan.valid_windows) for text in mine]
            valid[name, rate] = sum(found) / len(found)
            runs.append(("search", 1000, [(name, rate)], digests))
        best.append((name, min(plan.rates, key=lambda rate: valid[name, rate])))
    runs += [("final", seed, best, digests) for seed in range(plan.seeds)]
    joint = [learn(*best[-1], seed, plan.steps)[0] for seed in range(plan.seeds)]
    tested = [{text: loss(m, text, "test", plan.test_windows) for text in texts} for m in joint]
    base = {text: loss(load(plan.base), text, "test", plan.test_windows) for text in texts}
    return {"runs": json.dumps(runs), "valid": valid, "joint": tested, "base": [base] * plan.seeds}


def sought(plan):
    """What the runs of the known ranks are; the second rate of a task is the best to validate."""
    done = []

    def work(run, inputs):
        done.append(run)
        row = {"id": run.id, "config": asdict(run), "source": "crafted", "status": "done"}
        row["valid"] = abs(run.lr - known.rates(run.task, run.rank)[1])
        found = {"best": 0.0, "spectrum": [1.0]}
        if run.task == known.REVERSED:
            found = {"losses": [1.5, 2.0, 1.0], "effective_rank": 1.0}
        return row | ({} if run.kind == "search" else {"excess": 1.0} | found)

    def read_inputs(path, targets):
        return Inputs(path, load(path), {target: CORPORA["folio"] for target in targets})

    with mock.patch.object(known, "work", work), mock.patch.object(harness, "read_inputs", read_inputs):
        known.run(plan, next(outs), jobs=1)
    assert len({run.texts for run in done}) == 1
    names = ("kind", "task", "planted", "rank", "seed", "lr", "steps")
    return {
        "runs": sorted(tuple(getattr(run, name) for name in names) for run in done),
        "base": {run.plan.base for run in done}, "texts": len(done[0].texts),
        "batch": {run.plan.batch for run in done}, "windows": {run.plan.windows for run in done},
    }  # fmt: skip


def sought_by_hand(plan):
    runs = []
    for task, k in itertools.product(plan.tasks, plan.planted):
        steps = plan.steps[("map", "teacher", "permutation").index(task)]
        for r in {max(k // 2, 1), max(k - 1, 1), k, 2 * k, 16}:
            runs += [("search", task, k, r, 1000, lr, max(steps // 3, 1)) for lr in known.RATES[task]]
            runs += [("final", task, k, r, i, known.RATES[task][1], steps) for i in range(plan.seeds)]
    for r in (0, 1, 4, 16, 64):
        rates, steps = rank_sweep.TEXT.lora_rates if r else rank_sweep.TEXT.full_rates, plan.steps[2]
        runs += [("search", "reversed", 0, r, 1000, lr, max(steps // 3, 1)) for lr in rates]
        runs += [("final", "reversed", 0, r, i, rates[1], steps) for i in range(plan.seeds)]
    return {
        "runs": sorted(runs), "base": {plan.base}, "texts": 1 + len(plan.planted),
        "batch": {plan.batch}, "windows": {plan.windows},
    }  # fmt: skip


COMPARISON = ("similarity", "weights")


def compared(plan):
    """What is run, the validation losses of the search, and all that the seeds measure."""
    rows = subspaces.run(plan, next(outs), jobs=1)
    runs = [[row["config"][k] for k in ("kind", "seed", "rates", "texts")] for row in rows]
    finals = [row for row in rows if row["config"]["kind"] == "final"]
    return {
        "runs": json.dumps(runs),
        "valid": {tuple(row["config"]["rates"][0]): row["valid"] for row in rows if "valid" in row},
        "base": [row["losses"].pop("base") for row in finals],
        "test": [row["losses"] for row in finals],
    } | {key: [row[key] for row in finals] for key in COMPARISON}


@functools.cache
def compared_model(base, text, rank, alpha, rate, seed, draw, steps, batch):
    model = load(base)
    rng = np.random.default_rng([seed, draw, 0, rank])
    inject(model, LoraConfig(r=rank, alpha=alpha), rng=rng)
    batches = batching.batches(CORPORA[text].train, np.random.default_rng([seed, draw, 1]), batch, LENGTH)
    schedule = Schedule(steps, warmup=steps // 20)
    train(model, batches, AdamW(rate, betas=(0.9, 0.99)), steps=steps, schedule=schedule, threads=1)
    return model


def compared_by_hand(plan):
    texts = (plan.target, plan.other)

    def loss(model, split, windows):
        ids = getattr(CORPORA[plan.target], split)
        return evaluate(model, batching.eval_batches(ids, 16, LENGTH, limit=windows * LENGTH))

    def learn(rank, rate, seed, steps, text, draw):
        return compared_model(plan.base, text, rank, plan.alpha, rate, seed, draw, steps, plan.batch)

    def of(model):
        for path, adapter in active(model).items():
            U, S, Vt = spectra.thin_svd(adapter.B.data, adapter.A.data, adapter.scale)
            A = np.linalg.svd(adapter.A.data.astype(np.float64), full_matrices=False)[2]
            yield path, (U, S, Vt), {"A": A.T, "right": Vt.T, "left": U}

    def phi(one, other):
        found = {}
        for (path, _, sides), (_, _, others) in zip(of(one), of(other), strict=True):
            found[path] = {}
            for side, U in sides.items():
                all_ = to_host(spectra.similarity(U, others[side]))
                i, j = ([n for n in (1, 2, 4) if n <= size] for size in all_.shape)
                found[path][side] = [[round(float(all_[a - 1, b - 1]), 4) for b in j] for a in i]
        return found

    def against(model):
        base, found = named_params(load(plan.base)), {}
        for path, (U, S, Vt), _ in of(model):
            W = base[f"{path}.weight"].data.astype(np.float64)
            own = spectra.norm(spectra.singular_values(W)[: len(S)])
            factor, random = spectra.amplification(W, U, S, Vt)
            along = float(np.linalg.norm(U.T @ W @ Vt.T))
            found[path] = {"factor": factor, "random": random, "emphasis": along / own}
        return found

    digests = [CORPORA[text].digest for text in texts]
    valid = {
        (rank, rate): loss(
            learn(rank, rate, 1000, plan.search_steps, plan.target, 0), "valid", plan.valid_windows
        )
        for rank in plan.ranks
        for rate in plan.rates
    }
    best = [(rank, min(plan.rates, key=lambda rate: valid[rank, rate])) for rank in plan.ranks]
    runs = [("search", 1000, [cell], digests) for cell in valid]
    runs += [("final", seed, best, digests) for seed in range(plan.seeds)]
    found = {
        "runs": json.dumps(runs),
        "valid": valid,
        "base": [],
        "test": [],
        "similarity": [],
        "weights": [],
    }
    for seed in range(plan.seeds):
        models = {rank: learn(rank, rate, seed, plan.steps, plan.target, 0) for rank, rate in best}
        large = models[plan.ranks[-1]]
        seeds, texts_ = (
            learn(*best[-1], seed, plan.steps, text, draw) for text, draw in zip(texts, (1, 2), strict=True)
        )
        others = {"ranks": models[plan.ranks[-2]], "seeds": seeds, "texts": texts_}
        found["base"].append(loss(load(plan.base), "test", plan.test_windows))
        found["test"].append({str(r): loss(model, "test", plan.test_windows) for r, model in models.items()})
        found["similarity"].append({pair: phi(model, large) for pair, model in others.items()})
        found["weights"].append({str(rank): against(model) for rank, model in models.items()})
    return found


def tried(plan):
    """What is run at which scale and rate, and what is measured."""
    with mock.patch.object(scale, "EDGES", 0):
        rows = scale.run(plan, next(outs), jobs=1)
    names = ("kind", "rank", "scale", "ratio", "rate", "seed", "text")
    return {
        "runs": {tuple(row["config"][name] for name in names) for row in rows},
        "valid": sorted(row["valid"] for row in rows if "valid" in row),
        "test": sorted(row["test"] for row in rows if row["config"]["kind"] == "final"),
        "base": [row["test"] for row in rows if row["config"]["kind"] == "base"],
    }


@functools.cache
def tried_model(base, target, rank, s, ratio, rate, seed, steps, batch):
    """Trained by LoRA, or in full at rank 0; the base itself at rate 0."""
    model = load(base)
    if rate and rank:
        inject(model, LoraConfig(r=rank, alpha=s * rank), rng=np.random.default_rng([seed, 0]))
    elif rate:
        unfreeze(model)
    if rate:
        batches = batching.batches(CORPORA[target].train, np.random.default_rng([seed, 1]), batch, LENGTH)
        optimizer = AdamW(rate, betas=(0.9, 0.99), rate=lora_plus(ratio))
        train(model, batches, optimizer, steps=steps, schedule=Schedule(steps, warmup=steps // 20))
    return model


def tried_by_hand(plan):
    text = CORPORA[plan.target]

    def loss(split, windows, *arm):
        model = tried_model(plan.base, plan.target, *(arm or (0, 0.0, 1.0, 0.0, 0)), plan.steps, plan.batch)
        return evaluate(
            model, batching.eval_batches(getattr(text, split), 16, LENGTH, limit=windows * LENGTH)
        )

    arms = [(0, 0.0, 1.0, rate) for rate in plan.full_rates]
    arms += [
        (r, s, 1.0, rate)
        for r in plan.ranks
        for s in (2 * (plan.middle / r), 2 * math.sqrt(plan.middle / r), 2.0)
        for rate in plan.rates
    ]
    arms += [(plan.middle, 2.0, ratio, rate / ratio**0.5) for ratio in plan.ratios for rate in plan.rates]
    arms, seeds = sorted({*arms}), range(plan.seeds)
    runs = {("search", *arm, 1000, text.digest) for arm in arms}
    runs |= {("final", *arm, seed, text.digest) for arm in arms for seed in seeds}
    return {
        "runs": runs | {("base", 0, 0.0, 1.0, 0.0, 0, text.digest)},
        "valid": sorted(loss("valid", plan.valid_windows, *arm, 1000) for arm in arms),
        "test": sorted(loss("test", plan.test_windows, *arm, seed) for arm in arms for seed in seeds),
        "base": [loss("test", plan.test_windows)],
    }


def rivalled(plan):
    """What is run with how many parameters, and what is measured."""
    with few_rates():
        rows = rivals.run(plan, next(outs), jobs=1)
    names = ("kind", "method", "rank", "n", "rate", "seed", "text")
    return {
        "runs": {tuple(row["config"][name] for name in names) for row in rows},
        "parameters": {(row["config"]["method"], row["config"]["rank"]): row["parameters"] for row in rows},
        "valid": sorted(row["valid"] for row in rows if "valid" in row),
        "test": sorted(row["test"] for row in rows if row["config"]["kind"] == "final"),
        "base": [row["test"] for row in rows if row["config"]["kind"] == "base"],
    }


def rivals_model(base, method, n, seed):
    """Before it is trained."""
    made = load(base)
    if method == "biases":
        for layer in made.model.layers:
            for block in (layer.self_attn, layer.mlp):
                for linear in vars(block).values():
                    if isinstance(linear, Linear):
                        linear.bias = Param(np.zeros(len(linear.weight.data), np.float32))
        freeze(made, lambda path: ".bias" in path)
    elif method == "all weights":
        unfreeze(made)
    else:
        config = {"LoRA": LoraConfig(r=n, alpha=2 * n), "VeRA": VeraConfig(n)}[method]
        inject(made, config, rng=np.random.default_rng([seed, 0]))
    return made


@functools.cache
def rivalled_model(base, target, method, n, seed, steps, batch):
    made = rivals_model(base, method, n, seed)
    batches = batching.batches(CORPORA[target].train, np.random.default_rng([seed, 1]), batch, LENGTH)
    schedule = Schedule(steps, warmup=steps // 20)
    train(made, batches, AdamW(0.02, betas=(0.9, 0.99)), steps=steps, schedule=schedule)
    return made


def rivalled_by_hand(plan):
    text = CORPORA[plan.target]

    def count(method, n):
        return sum(p.data.size for p in trained(rivals_model(plan.base, method, n, 0)).values())

    def nearest(r):
        shapes = [p.data.shape for path, p in named_params(load(plan.base)).items() if "_proj" in path]
        budget = r * sum(map(sum, shapes))
        return min(range(1, 99), key=lambda n: abs(sum(n + outputs for outputs, _ in shapes) - budget))

    def loss(split, windows, *arm):
        how = plan.steps, plan.batch
        made = rivalled_model(plan.base, plan.target, *arm, *how) if arm else load(plan.base)
        some = batching.eval_batches(getattr(text, split), 16, LENGTH, limit=windows * LENGTH)
        return evaluate(made, some)

    cells = [
        (method, r, {"LoRA": r, "VeRA": nearest(r)}[method], seeds)
        for r, seeds in ((plan.rank, plan.seeds), *((r, plan.few_seeds) for r in plan.others))
        for method in ("LoRA", "VeRA")
        if method in plan.methods and (r == plan.rank or method == "LoRA" or r == 1)
    ]
    cells += [(method, 0, 0, plan.seeds) for method in ("all weights", "biases") if method in plan.methods]
    runs = {("search", *cell, 0.02, 1000, text.digest) for *cell, _ in cells}
    runs |= {("final", *cell, 0.02, seed, text.digest) for *cell, seeds in cells for seed in range(seeds)}
    return {
        "runs": runs | {("base", "", 0, 0, 0.0, 0, text.digest)},
        "parameters": {(method, r): count(method, n) for method, r, n, _ in cells} | {("", 0): 0},
        "valid": sorted(loss("valid", plan.valid_windows, method, n, 1000) for method, _, n, _ in cells),
        "test": sorted(
            loss("test", plan.test_windows, method, n, seed)
            for method, _, n, seeds in cells
            for seed in range(seeds)
        ),
        "base": [loss("test", plan.test_windows)],
    }


def remembered(plan):
    """What is run on which texts, and what is measured: losses on the target and the own text, and maps."""
    with mock.patch.object(forgetting, "EDGES", 0):
        rows = forgetting.run(plan, next(outs), jobs=1)
    names = ("kind", "target", "rank", "rate", "seed", "texts")
    kinds = {kind: [row for row in rows if row["config"]["kind"] == kind] for kind in ("base", "search")}
    tested = [row for row in rows if row["config"]["kind"] in ("front", "final")]
    return {
        "runs": sorted(json.dumps([row["config"][name] for name in names]) for row in rows),
        "valid": sorted(row["valid"] for row in kinds["search"]),
        "own_valid": sorted(row["own_valid"] for row in kinds["search"]),
        "test": sorted(row["test"] for row in tested),
        "own": sorted(row["own_test"] for row in tested),
        "base": [[row[s] for s in ("valid", "own_valid", "test", "own_test")] for row in kinds["base"]],
        "maps": sorted(json.dumps(row["maps"]) for row in tested if "maps" in row),
    }  # fmt: skip


@functools.cache
def adapted_by_hand(base, target, rank, rate, seed, steps, batch):
    model = load(base)
    if rank:
        inject(model, LoraConfig(r=rank, alpha=2 * rank), rng=np.random.default_rng([seed, 0]))
    else:
        unfreeze(model)
    windows = batching.batches(CORPORA[target].train, np.random.default_rng([seed, 1]), batch, LENGTH)
    schedule = Schedule(steps, warmup=steps // 20)
    train(model, windows, AdamW(rate, betas=(0.9, 0.99)), steps=steps, schedule=schedule)
    return model


def remembered_by_hand(plan):
    (target,) = plan.targets
    texts = [CORPORA[name].digest for name in (target, plan.own)]

    def losses(model, part):
        limit = LENGTH * (plan.valid_windows if part == "valid" else plan.test_windows)
        both = (getattr(CORPORA[name], part) for name in (target, plan.own))
        return [evaluate(model, batching.eval_batches(ids, 16, LENGTH, limit=limit)) for ids in both]

    def maps(model, seed):
        if isinstance(model.model.layers[0].mlp.up_proj, Adapted):
            model = copy.deepcopy(model)
            fuse(model)
        found, rng = {}, np.random.default_rng([seed, 2])
        for path, p in named_params(load(plan.base)).items():
            if "_proj" in path:
                W = p.data.astype(np.float64)
                change = named_params(model)[path].data - W
                s = spectra.singular_values(change)
                U, V = (np.linalg.qr(rng.standard_normal((n, len(s))))[0] for n in W.shape)
                least = spectra.intruder_threshold(W.shape[0], min(W.shape))
                counts = [
                    int((spectra.intruders(W, some, 10) < least).sum()) for some in (change, U * s @ V.T)
                ]
                share = spectra.energy(s)
                size = spectra.norm(s) / spectra.norm(spectra.singular_values(W))
                found[path.removesuffix(".weight")] = {
                    "shape": list(W.shape), "size": size,
                    "effective_rank": spectra.effective_rank(s),
                    "energy": [round(float(share[k - 1]), 4) for k in (1, 2, 4, 8) if k <= len(s)],
                    "intruders": counts[0], "random": counts[1],
                }  # fmt: skip
        return json.dumps(found)

    def learned(rank, rate, seed):
        return adapted_by_hand(plan.base, target, rank, rate, seed, plan.steps, plan.batch)

    base = load(plan.base)
    runs, valid, tests, kept = [("base", target, 0, 0.0, 0, texts)], [], [], []
    for rank, rates in ((0, plan.full_rates), *((rank, plan.rates) for rank in plan.ranks)):
        found = {rate: losses(learned(rank, rate, 1000), "valid") for rate in rates}
        best = min(rates, key=lambda rate: found[rate][0])
        valid += found.values()
        runs += [("search", target, rank, rate, 1000, texts) for rate in rates]
        for rate, seed in itertools.product((rate for rate in rates if rate <= best), range(plan.seeds)):
            runs.append(("final" if rate == best else "front", target, rank, rate, seed, texts))
            tests.append(losses(learned(rank, rate, seed), "test"))
            kept += [maps(learned(rank, rate, seed), seed)] if rate == best else []
    return {
        "runs": sorted(map(json.dumps, runs)),
        "valid": sorted(one for one, _ in valid),
        "own_valid": sorted(own for _, own in valid),
        "test": sorted(one for one, _ in tests),
        "own": sorted(own for _, own in tests),
        "base": [[*losses(base, "valid"), *losses(base, "test")]],
        "maps": sorted(kept),
    }


def beyond_done(plan):
    """What is run, and what is measured on the tasks of a classifier, on permuted pixels and in drawings."""
    with few_digits(), mock.patch.multiple(beyond, EDGES=0, CLASSIFIED=("rotated",)):
        rows = beyond.run(plan, next(outs), jobs=1)
    names = ("kind", "task", "method", "rank", "rate", "seed")
    parts = {"runs": {tuple(row["config"][name] for name in names) for row in rows}}
    for row in rows:
        task = row["config"]["task"]
        part = "drawn" if task == shown.DRAWN else "permuted" if ":" in task else "classified"
        some = [row.get(name) for name in ("valid", "test", "samples", "parameters")]
        parts.setdefault(part, []).append(some)
    return parts


def begun(plan):
    """What is run from which start, and what is measured."""
    with mock.patch.multiple(initialisation, EDGES=0, STARTS=FEW_STARTS):
        rows = initialisation.run(plan, next(outs), jobs=1)
    names = ("kind", "start", "rate", "seed", "text")
    finals = [row for row in rows if row["config"]["kind"] == "final"]
    return {
        "runs": {tuple(row["config"][name] for name in names) for row in rows},
        "valid": sorted(row["valid"] for row in rows if "valid" in row),
        "test": sorted(row["test"] for row in finals),
        "first": sorted([row["start"], *row["gradients"].values()] for row in finals),
        "losses": sorted(row["losses"] for row in finals),
        "base": [row["test"] for row in rows if row["config"]["kind"] == "base"],
    }


def begun_by_hand(plan):
    text, full = CORPORA[plan.target], "all weights"

    def loss(model, split, windows):
        some = batching.eval_batches(getattr(text, split), 16, LENGTH, limit=windows * LENGTH)
        return evaluate(model, some)

    def some(seed, draw):
        return batching.batches(text.train, np.random.default_rng([seed, draw]), plan.batch, LENGTH)

    def gradient(model, seed, draw):
        _, back = model.loss(*next(some(seed, draw)), train=True)
        back()
        return {path: p.grad for path, p in trained(model).items()}

    def model(start, seed):
        made, rng = load(plan.base), np.random.default_rng([seed, 0])
        config = LoraConfig(plan.rank, plan.alpha)
        if start == full:
            unfreeze(made)
            return made
        if start == "LoRA-GA":
            other = load(plan.base)
            unfreeze(other)
            named = gradient(other, seed, 2).items()
            config = StartConfig(config, lora_ga({path.removesuffix(".weight"): g for path, g in named}))
        inject(made, config, rng=rng)
        return made

    def learn(start, seed):
        made, rate = model(start, seed), (plan.full_rates if start == full else plan.rates)[0]
        schedule = Schedule(plan.steps, warmup=plan.steps // 20)
        losses = train(
            made, some(seed, 1), AdamW(rate, betas=(0.9, 0.99)), steps=plan.steps, schedule=schedule
        ).loss
        return made, losses, rate

    def norms(start, seed):
        made = model(start, seed)
        before = loss(made, "test", plan.test_windows)
        gradient(made, seed, 1)
        both = [{k: p for k, p in trained(made).items() if k.endswith(name)} for name in (".A", ".B")]
        return [before, *(global_norm(group) for group in both if group)]

    starts, seeds = (full, *FEW_STARTS), range(plan.seeds)
    searched = {start: learn(start, 1000) for start in starts}
    finals = [learn(start, seed) for start in starts for seed in seeds]
    runs = {("search", start, rate, 1000, text.digest) for start, (_, _, rate) in searched.items()}
    runs |= {("final", start, searched[start][2], seed, text.digest) for start in starts for seed in seeds}
    return {
        "runs": runs | {("base", "", 0.0, 0, text.digest)},
        "valid": sorted(loss(made, "valid", plan.valid_windows) for made, *_ in searched.values()),
        "test": sorted(loss(made, "test", plan.test_windows) for made, *_ in finals),
        "first": sorted(norms(start, seed) for start in starts for seed in seeds),
        "losses": sorted(losses for _, losses, _ in finals),
        "base": [loss(load(plan.base), "test", plan.test_windows)],
    }


def rounded(plan):
    """What is run, and the losses of the search and of every merge; the rest follows from the same models."""
    with few_merges():
        rows = merging.run(plan, next(outs), jobs=1)
    finals = [row for row in rows if row["config"]["kind"] == "final"]
    return {
        "runs": json.dumps([[row["config"][k] for k in ("kind", "seed", "rate", "text")] for row in rows]),
        "valid": [row["valid"] for row in rows if "valid" in row],
        "test": [
            [t, found["test"], found["apart"]] for row in finals for t, found in row["merged"]["bfloat16"]
        ],
    }


def rounded_by_hand(plan):
    text, scale = CORPORA[plan.target], plan.alpha / plan.rank

    def loss(model, split, windows):
        ids = getattr(text, split)
        return evaluate(model, batching.eval_batches(ids, 16, LENGTH, limit=windows * LENGTH))

    def learn(rate, seed, steps):
        model = load(plan.base)
        inject(model, LoraConfig(r=plan.rank, alpha=plan.alpha), rng=np.random.default_rng([seed, 0]))
        batches = batching.batches(text.train, np.random.default_rng([seed, 1]), plan.batch, LENGTH)
        schedule = Schedule(steps, warmup=steps // 20)
        train(model, batches, AdamW(rate, betas=(0.9, 0.99)), steps=steps, schedule=schedule, threads=1)
        return model

    def both(learned, t):
        apart, plain = copy.deepcopy(learned), load(plan.base)
        for model in (apart, plain):
            for path, p in named_params(model).items():
                p.data = p.data if ".adapters." in path else stored(p.data, "bfloat16")
        weights = named_params(plain)
        for path, adapter in active(apart).items():
            adapter.scale = t * scale
            weight = weights[f"{path}.weight"]
            weight.data = stored(weight.data + adapter.delta(), "bfloat16")
        return [loss(model, "test", plan.test_windows) for model in (plain, apart)]

    valid = [loss(learn(rate, 1000, plan.search_steps), "valid", plan.valid_windows) for rate in plan.rates]
    best = min(zip(valid, plan.rates, strict=True))[1]
    runs = [("search", 1000, rate, text.digest) for rate in plan.rates]
    runs += [("final", seed, best, text.digest) for seed in range(plan.seeds)]
    models = [learn(best, seed, plan.steps) for seed in range(plan.seeds)]
    found = [[t, *both(model, t)] for model in models for t in (0.01, 1.0)]
    return {"runs": json.dumps(runs), "valid": valid, "test": found}


def flat(width):
    """The shape of the bases that the experiment with random subspaces pretrains."""
    return Config(hidden_size=width, intermediate_size=2 * width, num_hidden_layers=1)


def spanned(plan):
    """What is run from where, and what is measured; in short windows, the bases with one layer."""
    pretrain.pretrained.cache_clear()
    few, little = mock.patch.object(intrinsic, "EDGES", 0), mock.patch.object(pretrain, "shape", flat)
    with few, little, handwritten(), mock.patch.object(common, "LENGTH", 16):
        rows = intrinsic.run(plan, next(outs), jobs=1)
    names = ("kind", "target", "width", "pretrained", "method", "size", "rate", "seed", "texts")
    numbers = ("test", "accuracy", "parameters")
    kinds = {kind: [row for row in rows if row["config"]["kind"] == kind] for kind in ("start", "final")}
    return {
        "runs": sorted(json.dumps([row["config"][name] for name in names]) for row in rows),
        "valid": sorted(row["valid"] for row in rows if "valid" in row),
        "digits": sorted(
            row["test"] for row in rows if "digits" in row["config"]["target"] and "test" in row
        ),
        **{kind: sorted([row[name] for name in numbers] for row in some) for kind, some in kinds.items()},
    }


@functools.cache
def spanned_from(base, width, steps, batch):
    if not width:
        return load(base)
    model = llama(flat(width), np.random.default_rng(0))
    if steps:
        windows = batching.batches(CORPORA["shakespeare"].train, np.random.default_rng([0, 1]), batch, 16)
        optimizer = AdamW(4e-3, betas=(0.9, 0.99), weight_decay=0.1)
        train(model, windows, optimizer, steps=steps, schedule=Schedule(steps, warmup=steps // 20))
    return model


@functools.cache
def spanned_model(start, target, method, size, rate, seed, steps, batch):
    """The model after training, and how many numbers that was."""
    model, rng = copy.deepcopy(spanned_from(*start)), np.random.default_rng([seed, 0])
    freeze(model)
    if method == "lora":
        inject(model, LoraConfig(r=size, alpha=2 * size), rng=rng)
    elif method == "full":
        unfreeze(model)
    else:
        model = subspace(model, size, rng=rng, scales=method == "said")
    count = sum(p.size for p in trained(model).values())
    windows = batching.batches(CORPORA[target].train, np.random.default_rng([seed, 1]), batch, 16)
    schedule = Schedule(steps, warmup=steps // 20)
    train(model, windows, AdamW(rate / math.sqrt(count), betas=(0.9, 0.99)), steps=steps, schedule=schedule)
    return model.moved()[0] if method in ("subspace", "said") else model, count


@functools.cache
def written_model(d, rate, seed, steps):
    """The network after training in d dimensions (0: all weights), and how many numbers that was."""
    model = vit(replace(TINY, num_key_value_heads=2), np.random.default_rng(0))
    if d:
        model = subspace(model, d, rng=np.random.default_rng([seed, 0]))
    count = sum(p.size for p in trained(model).values())
    rng, images = np.random.default_rng([seed, 1]), digits().train
    order = (rng.integers(30, size=32) for _ in range(steps))
    train(
        model, ((images.pixels[i], images.labels[i]) for i in order),
        AdamW(rate / math.sqrt(count), betas=(0.9, 0.99)), steps=steps,
        schedule=Schedule(steps, warmup=steps // 20),
    )  # fmt: skip
    return model.moved()[0] if d else model, count


def written_by_hand(plan, runs, valid, starts, finals):
    """What is run on digits, added to the four lists; and the losses on test."""
    (rate,) = plan.rates
    with handwritten() as some:

        def tested(model, count):
            x, y = some.test.pixels, some.test.labels
            right = float((to_host(model(x)[0]).argmax(-1) == y).mean())
            return [float(model.loss(x, y)[0]), right, count]

        name = ("digits", 48, 0)
        model = vit(replace(TINY, num_key_value_heads=2), np.random.default_rng(0))
        runs.append(("start", *name, "full", 0, 0.0, 0, []))
        starts.append(tested(model, sum(p.size for p in named_params(model).values())))
        found = [starts[-1][0]]
        for way in (("full", 0), ("subspace", 30), ("subspace", 60)):
            searched, _ = written_model(way[1], rate, 1000, 5 * plan.search_steps)
            valid.append(float(searched.loss(some.valid.pixels, some.valid.labels)[0]))
            runs.append(("search", *name, *way, rate, 1000, []))
            for seed in range(plan.seeds):
                finals.append(tested(*written_model(way[1], rate, seed, 5 * plan.steps)))
                found.append(finals[-1][0])
                runs.append(("final", *name, *way, rate, seed, []))
    return found


def spanned_by_hand(plan):
    (target,), (width,), (most,), (rate,) = plan.targets, plan.widths, plan.pretraining, plan.rates
    texts = [CORPORA[name].digest for name in (target, "shakespeare")]

    def windows(part):
        count = plan.valid_windows if part == "valid" else plan.test_windows
        return batching.eval_batches(getattr(CORPORA[target], part), 16, 16, limit=16 * count)

    def tested(model, count):
        right = np.concatenate([(model(ids)[0].argmax(-1) == y).ravel() for ids, y in windows("test")])
        return [evaluate(model, windows("test")), float(right.mean()), count]

    runs, valid, starts, finals = [], [], [], []
    for start in ((0, 0), (width, 0), (width, most)):
        ways = [("full", 0), *(("subspace", d) for d in plan.dims)]
        ways += [] if start[0] else [*(("said", d) for d in plan.dims), *(("lora", r) for r in plan.ranks)]
        model = spanned_from(plan.base, *start, plan.batch)
        runs.append(("start", target, *start, "full", 0, 0.0, 0, texts))
        starts.append(tested(model, sum(p.size for p in named_params(model).values())))
        for way in ways:
            how = (plan.base, *start, plan.batch), target, *way, rate
            searched, _ = spanned_model(*how, 1000, plan.search_steps, plan.batch)
            valid.append(evaluate(searched, windows("valid")))
            runs.append(("search", target, *start, *way, rate, 1000, texts))
            for seed in range(plan.few_seeds if start[1] else plan.seeds):
                finals.append(tested(*spanned_model(*how, seed, plan.steps, plan.batch)))
                runs.append(("final", target, *start, *way, rate, seed, texts))
    digits = written_by_hand(plan, runs, valid, starts, finals)
    return {
        "runs": sorted(map(json.dumps, runs)),
        "valid": sorted(valid),
        "digits": sorted(digits),
        "start": sorted(starts),
        "final": sorted(finals),
    }


def broadened(plan):
    """What is run from which width, and what is measured; the bases have one layer."""
    pretrain.pretrained.cache_clear()
    with mock.patch.object(wide, "EDGES", 0), mock.patch.object(pretrain, "shape", flat):
        rows = wide.run(plan, next(outs), jobs=1)
    names = ("kind", "width", "rank", "rate", "seed", "texts")
    return {
        "runs": sorted(json.dumps([row["config"][name] for name in names]) for row in rows),
        "valid": sorted((row["valid"], row["parameters"]) for row in rows if "valid" in row),
        "test": sorted((row["test"], row["parameters"]) for row in rows if row["config"]["kind"] == "final"),
        "base": [
            (row["test"], row["own"], row["parameters"]) for row in rows if row["config"]["kind"] == "base"
        ],
    }


@functools.cache
def broadened_base(width, steps, batch):
    model = llama(flat(width), np.random.default_rng(0))
    windows = batching.batches(CORPORA["shakespeare"].train, np.random.default_rng([0, 1]), batch, LENGTH)
    optimizer = AdamW(4e-3, betas=(0.9, 0.99), weight_decay=0.1)
    train(model, windows, optimizer, steps=steps, schedule=Schedule(steps, warmup=steps // 20))
    freeze(model)
    return model


@functools.cache
def broadened_model(start, target, rank, alpha, rate, seed, steps):
    model = copy.deepcopy(broadened_base(*start))
    if rank:
        inject(model, LoraConfig(r=rank, alpha=alpha), rng=np.random.default_rng([seed, 0]))
    else:
        unfreeze(model)
    windows = batching.batches(CORPORA[target].train, np.random.default_rng([seed, 1]), start[2], LENGTH)
    schedule = Schedule(steps, warmup=steps // 20)
    train(model, windows, AdamW(rate, betas=(0.9, 0.99)), steps=steps, schedule=schedule)
    return model


def broadened_by_hand(plan):
    texts = [CORPORA[name].digest for name in (plan.target, "shakespeare")]
    runs, found = [], {"valid": [], "test": [], "base": []}

    def loss(model, part, name=plan.target):
        count = plan.valid_windows if part == "valid" else plan.test_windows
        ids = getattr(CORPORA[name], part)
        return evaluate(model, batching.eval_batches(ids, 16, LENGTH, limit=LENGTH * count))

    def count(params):
        return sum(p.size for p in params.values())

    for width in plan.widths:
        start = width, plan.pretraining, plan.batch
        base = broadened_base(*start)
        runs.append(("base", width, 0, 0.0, 0, texts))
        found["base"].append(
            (loss(base, "test"), loss(base, "test", "shakespeare"), count(named_params(base)))
        )
        arms = [(0, rate) for rate in plan.full_rates] + [(r, x) for r in plan.ranks for x in plan.rates]
        for rank, rate in arms:
            search = "search", "valid", plan.search_steps, [1000]
            for kind, part, steps, seeds in (search, ("final", "test", plan.steps, range(plan.seeds))):
                for seed in seeds:
                    model = broadened_model(start, plan.target, rank, plan.alpha, rate, seed, steps)
                    found[part].append((loss(model, part), count(trained(model))))
                    runs.append((kind, width, rank, rate, seed, texts))
    return {"runs": sorted(map(json.dumps, runs)), "base": found["base"]} | {
        part: sorted(found[part]) for part in ("valid", "test")
    }


def injected_and_trained(config):
    model, rng = tiny(0, np.float32, attention_bias=True)
    inject(model, config, rng=rng)
    params = trained(model)
    found = {"shapes": {k: p.data.shape for k, p in params.items()}, "start": bits(params)}
    found["scales"] = {path: s for path, s in scales(model).items()}
    batches = [batch(np.random.default_rng(i)) for i in range(3)]
    train(model, batches, AdamW(lr=0.1), steps=3)
    return found | {"end": bits(params)}


FACTORS = [1.0, 0.25, 0.5]  # of the learning rate


def few_tokens(seed):
    """A batch with too few rows for W + ΔW to be formed: the gradient is the plain one to the bit."""
    return batch(np.random.default_rng(seed), n=1, t=2)


def optimized(optimizer):
    model, _ = tiny_lora(0, np.float32)
    batches = [few_tokens(i) for i in range(3)]
    train(model, batches, copy.deepcopy(optimizer), steps=3, schedule=FACTORS.__getitem__)
    return {"weights": bits(trained(model))}


def optimized_by_hand(optimizer):
    model, _ = tiny_lora(0, np.float32)
    o, (b1, b2), f = copy.deepcopy(optimizer), optimizer.betas, np.float32
    for i, factor in enumerate(FACTORS):
        _, grads = gradients(model, *few_tokens(i))
        params = trained(model)
        for path, g in grads.items():
            params[path].grad = g
        norm = global_norm(params)
        t = o.t + i + 1
        for path, p in params.items():
            g, rate = p.grad, o.lr * factor * o.rate(path)
            if norm > o.clip:
                g = g * f(o.clip / norm)
            m, v = (d.get(path, np.zeros_like(g)) for d in (o.m, o.v))
            o.m[path] = m * f(b1) + f(1 - b1) * g
            o.v[path] = v * f(b2) + f(1 - b2) * (g * g)
            if o.decays(path, p):
                p.data *= f(1 - rate * o.weight_decay)
            step = f(rate / (1 - b1**t)) * o.m[path]
            p.data -= step / (np.sqrt(o.v[path] / f(1 - b2**t)) + f(o.eps))
            p.grad = None
    return {"weights": bits(trained(model))}


def scheduled(schedule):
    model, _ = tiny_lora(0, np.float32)
    batches = [batch(np.random.default_rng(i)) for i in range(7)]
    train(model, batches, AdamW(lr=0.03), steps=7, schedule=schedule)
    return {"weights": bits(trained(model))}


def scheduled_by_hand(schedule):
    s = schedule

    def factor(step):
        if step < s.warmup:
            return (step + 1) / (s.warmup + 1)
        if s.kind == "constant":
            return 1.0
        done = (step - s.warmup) / (s.steps - s.warmup)
        return s.final + (1 - s.final) * 0.5 * (1 + math.cos(math.pi * done))

    return scheduled(factor)


def built(config):
    rng = np.random.default_rng(0)
    model = llama(config, rng)
    for p in named_params(model).values():
        if p.data.ndim == 1:
            p.data += 0.3 * rng.standard_normal(p.data.shape).astype(np.float32)
    shapes = {path: p.data.shape for path, p in named_params(model).items()}
    longest = max(t for t in range(1, 20) if takes(model, t))
    return {"shapes": shapes, "longest": longest, "logits": to_host(model(np.arange(10)[None])[0]).tobytes()}


def takes(model, t):
    try:
        model(np.zeros((1, t), int))
    except MiniloraError:
        return False
    return True


def stretched(scaling):
    return built(Config(**SIZES, rope_scaling=scaling))


STARTED = trained(tiny_lora(0, np.float32)[0])


def moments(a):
    return {path: np.full_like(p.data, a) for path, p in STARTED.items()}


DORA = {"dora": True, "dropout": 0.0}
ALL = "everything"
LEARNT = "valid test curve spectra"
TRAINED = "test similarity weights"
FORGETS = "valid own_valid test own maps"  # all that follows from training
FOLIO, KJV = CORPORA["folio"].digest, CORPORA["kjv"].digest
CASES = {
    finetune.Recipe: Case(
        finetune.Recipe(
            data="own.txt",
            base="one",
            method="dora",
            bits=4,
            r=3,
            alpha=5.0,
            lr=0.02,
            targets=("q_proj", "up_proj"),
            steps=7,
            batch=9,
            length=13,
            warmup=2,
            seed=11,
            eval_every=6,
            eval_tokens=70,
        ),
        tuned,
        tuned_by_hand,
        {
            "data": ("other.txt", ALL),
            "base": ("two", ALL),
            "method": ("lora", ALL),
            "bits": (None, ALL),
            "r": (1, ALL),
            "alpha": (9.0, ALL),
            "targets": ("all-linear", ALL),
            "lr": (0.05, ALL),
            "steps": (8, ALL),
            "batch": (5, ALL),
            "length": (14, ALL),
            "warmup": (3, ALL),
            "seed": (12, ALL),
            "eval_every": (3, "evals"),
            "eval_tokens": (120, "evals"),
        },
    ),
    pretrain.Recipe: Case(
        pretrain.Recipe(
            corpus="folio",
            steps=7,
            batch=3,
            lr=0.02,
            warmup=2,
            weight_decay=0.3,
            beta2=0.9,
            seed=5,
            test_windows=9,
        ),
        base_made,
        base_made_by_hand,
        {
            "corpus": ("kjv", ALL),
            "steps": (8, ALL),
            "batch": (4, ALL),
            "lr": (0.05, ALL),
            "warmup": (3, ALL),
            "weight_decay": (0.5, ALL),
            "beta2": (0.5, ALL),
            "seed": (6, ALL),
            "test_windows": (14, "test valid"),
        },
    ),
    Run: Case(
        Run(
            kind="final",
            target="folio",
            method="lora",
            rank=3,
            modules=("q_proj", "up_proj"),
            alpha=5.0,
            seed=4,
            lr=0.02,
            eps=1e-3,
            steps=22,
            batch=2,
            base="one",
            text=FOLIO,
            test_windows=9,
            valid_windows=6,
        ),
        cell_done,
        cell_done_by_hand,
        {
            "kind": ("search", "test curve spectra shapes"),
            "target": ("kjv", f"{LEARNT} source"),
            "method": ("full", f"{LEARNT} parameters shapes"),
            "rank": (2, f"{LEARNT} parameters"),
            "modules": (("v_proj",), f"{LEARNT} parameters shapes"),
            "alpha": (7.0, LEARNT),
            "seed": (8, LEARNT),
            "lr": (0.05, LEARNT),
            "eps": (1e-2, LEARNT),
            "steps": (33, LEARNT),
            "batch": (5, LEARNT),
            "base": ("two", LEARNT),
            "text": (KJV, ALL),
            "fallback": (True, f"{LEARNT} source"),
            "test_windows": (10, "test"),
            "valid_windows": (7, "valid curve"),
        },
    ),
    Plan: Case(
        Plan(
            targets=("folio",),
            ranks=(2, 3),
            modules=("q_proj",),
            alpha=5.0,
            steps=9,
            search_steps=4,
            seeds=1,
            base="one",
            test_windows=11,
            valid_windows=6,
        ),
        planned,
        planned_by_hand,
        {
            "targets": (("folio", "kjv"), "target text runs"),
            "ranks": ((3, 4), "rank runs"),
            "modules": (("v_proj", "k_proj"), "modules runs"),
            "alpha": (7.0, "alpha runs"),
            "steps": (10, "steps runs"),
            "search_steps": (5, "steps runs"),
            "seeds": (2, "seed runs"),
            "base": ("two", "base runs"),
            "test_windows": (12, "test_windows runs"),
            "valid_windows": (7, "valid_windows runs"),
        },
    ),
    known.Plan: Case(
        KNOWN,
        sought,
        sought_by_hand,
        {
            "tasks": (("teacher", "permutation"), "runs"),
            "planted": ((2, 4), "runs"),
            "base": ("two", "base"),
            "seeds": (3, "runs"),
            "steps": ((31, 7, 12), "runs"),
            "batch": (5, "batch"),
            "windows": (8, "windows"),
        },
    ),
    adding.Plan: Case(
        ADDED,
        added_up,
        added_up_by_hand,
        {
            "targets": (("kjv", "folio"), "runs valid joint"),
            "base": ("two", "valid joint base"),
            "rank": (2, "valid joint"),
            "alpha": (8.0, "valid joint"),
            "rates": ((1e-4, 0.03), "runs valid joint"),
            "steps": (9, "joint"),
            "search_steps": (5, "valid"),
            "seeds": (2, "runs joint base"),
            "batch": (3, "valid joint"),
            "test_windows": (8, "joint base"),
            "valid_windows": (10, "valid"),
        },
    ),
    subspaces.Plan: Case(
        COMPARED,
        compared,
        compared_by_hand,
        {
            "target": ("shakespeare", ALL),
            "other": ("shakespeare", "runs similarity"),
            "base": ("two", f"valid base {TRAINED}"),
            "ranks": ((1, 2, 4), f"runs valid {TRAINED}"),
            "alpha": (8.0, f"valid {TRAINED}"),
            "rates": ((1e-4, 0.03), f"runs valid {TRAINED}"),
            "steps": (6, TRAINED),
            "search_steps": (4, "valid"),
            "seeds": (2, f"runs base {TRAINED}"),
            "batch": (3, f"valid {TRAINED}"),
            "test_windows": (9, "base test"),
            "valid_windows": (11, "valid"),
        },
    ),
    scale.Plan: Case(
        SCALED,
        tried,
        tried_by_hand,
        {
            "target": ("kjv", "runs valid test base"),
            "base": ("two", "valid test base"),
            "ranks": ((1, 3), "runs valid test"),
            "middle": (2, "runs valid test"),
            "ratios": ((4.0,), "runs valid test"),
            "rates": ((0.05,), "runs valid test"),
            "full_rates": ((0.001,), "runs valid test"),
            "steps": (5, "valid test"),
            "seeds": (2, "runs test"),
            "batch": (3, "valid test"),
            "test_windows": (8, "test base"),
            "valid_windows": (10, "valid"),
        },
    ),
    rivals.Plan: Case(
        COMPETING,
        rivalled,
        rivalled_by_hand,
        {
            "target": ("kjv", "runs valid test base"),
            "base": ("two", "valid test base"),
            "methods": (("all weights", "LoRA", "biases"), "runs parameters valid test"),
            "rank": (2, "runs parameters valid test"),
            "others": ((2,), "runs parameters valid test"),
            "steps": (5, "valid test"),
            "seeds": (2, "runs test"),
            "few_seeds": (3, "runs test"),
            "batch": (3, "valid test"),
            "test_windows": (8, "test base"),
            "valid_windows": (10, "valid"),
        },
    ),
    forgetting.Plan: Case(
        FORGOTTEN,
        remembered,
        remembered_by_hand,
        {
            "targets": (("kjv",), ALL),
            "own": ("kjv", "runs own_valid own base"),
            "base": ("two", "valid own_valid test own base maps"),
            "ranks": ((2,), f"runs {FORGETS}"),
            "rates": ((0.05,), f"runs {FORGETS}"),
            "full_rates": ((0.003, 0.004), f"runs {FORGETS}"),
            "steps": (5, FORGETS),
            "seeds": (2, "runs test own maps"),
            "batch": (2, FORGETS),
            "test_windows": (4, "test own base"),
            "valid_windows": (3, "valid own_valid base"),
        },
    ),
    initialisation.Plan: Case(
        BEGUN,
        begun,
        begun_by_hand,
        {
            "target": ("kjv", ALL),
            "base": ("two", "valid test first losses base"),
            "rank": (1, "valid test first losses"),
            "alpha": (8.0, "valid test first losses"),
            "rates": ((0.05,), "runs valid test losses"),
            "full_rates": ((0.001,), "runs valid test losses"),
            "steps": (5, "valid test losses"),
            "seeds": (2, "runs test first losses"),
            "batch": (2, "valid test first losses"),
            "test_windows": (8, "test first base"),
            "valid_windows": (10, "valid"),
        },
    ),
    beyond.Plan: Case(
        BEYOND,
        beyond_done,
        None,  # each task by hand: test_beyond_language.py
        {
            "ranks": ((4,), "runs classified drawn"),
            "planted": ((3,), "runs permuted"),
            "rates": ((0.03,), "runs classified drawn"),
            "full_rates": ((0.004,), "runs classified drawn"),
            "permuted_rates": ((0.06,), "runs permuted"),
            "pretraining": (8, "classified permuted"),
            "drawing_pretraining": (9, "drawn"),
            "steps": (10, "classified"),
            "permuted_steps": (11, "permuted"),
            "drawing_steps": (12, "drawn"),
            "seeds": (2, ALL),
            "batch": (13, "classified permuted drawn"),
            "samples": (17, "drawn"),
        },
    ),
    merging.Plan: Case(
        MERGED,
        rounded,
        rounded_by_hand,
        {
            "target": ("kjv", ALL),
            "base": ("two", "valid test"),
            "rank": (2, "valid test"),
            "alpha": (8.0, "valid test"),
            "rates": ((1e-4, 0.03), ALL),
            "steps": (14, "test"),
            "search_steps": (5, "valid"),
            "seeds": (2, "runs test"),
            "batch": (3, "valid test"),
            "test_windows": (8, "test"),
            "valid_windows": (11, "valid"),
        },
    ),
    intrinsic.Plan: Case(
        DIMENSIONS,
        spanned,
        spanned_by_hand,
        {
            "targets": (("kjv",), "runs valid start final"),
            "dims": ((50,), "runs valid final"),
            "ranks": ((3,), "runs valid final"),
            "widths": ((16,), "runs valid start final"),
            "pretraining": ((3,), "runs valid start final"),
            "rates": ((0.9,), "runs valid final digits"),
            "steps": (5, "final digits"),
            "search_steps": (2, "valid"),
            "seeds": (2, "runs final digits"),
            "few_seeds": (1, "runs final"),
            "batch": (3, "valid start final"),
            "base": ("two", "valid start final"),
            "test_windows": (8, "start final"),
            "valid_windows": (9, "valid"),
        },
    ),
    wide.Plan: Case(
        WIDTHS,
        broadened,
        broadened_by_hand,
        {
            "target": ("kjv", "runs valid test base"),
            "widths": ((8,), ALL),
            "ranks": ((3,), "runs valid test"),
            "alpha": (8.0, "valid test"),
            "rates": ((0.05,), "runs valid test"),
            "full_rates": ((0.001,), "runs valid test"),
            "pretraining": (5, "valid test base"),
            "steps": (8, "test"),
            "search_steps": (5, "valid"),
            "seeds": (2, "runs test"),
            "batch": (2, "valid test base"),
            "test_windows": (10, "test base"),
            "valid_windows": (11, "valid"),
        },
    ),
    which.Plan: Case(
        which.Plan(
            targets=("folio",),
            budgets=(62, 118),
            rates=(0.1, 0.3, 0.2),
            full_rates=(0.01, 0.03, 0.02),
            steps=9,
            search_steps=4,
            seeds=1,
            base="one",
            test_windows=11,
            valid_windows=6,
        ),
        laid_out,
        laid_out_by_hand,
        {
            "targets": (("folio", "kjv"), "target text runs"),
            "budgets": ((62, 95), "rank runs"),
            "rates": ((0.1, 0.4, 0.2), "lr runs"),
            "full_rates": ((0.01, 0.04, 0.02), "lr runs"),
            "steps": (10, "steps runs"),
            "search_steps": (5, "steps runs"),
            "seeds": (2, "seed runs"),
            "base": ("two", "base runs"),
            "test_windows": (12, "test_windows runs"),
            "valid_windows": (7, "valid_windows runs"),
        },
    ),
    Setting: Case(
        Setting(
            modules=("q_proj",),
            alpha=5.0,
            eps=1e-3,
            lora_rates=(0.1, 0.3, 0.2),
            full_rates=(0.01, 0.03, 0.02),
            steps=30,
            search_steps=7,
            batch=6,
        ),
        set_up,
        set_up_by_hand,
        {
            "modules": (("v_proj", "k_proj"), "modules runs"),
            "alpha": (7.0, "alpha runs"),
            "eps": (1e-2, "eps runs"),
            "lora_rates": ((0.1, 0.4, 0.2), "lr runs"),
            "full_rates": ((0.01, 0.04, 0.02), "lr runs"),
            "steps": (40, "steps runs"),
            "search_steps": (8, "steps runs"),
            "batch": (9, "batch runs"),
        },
    ),
    LoraConfig: Case(
        LoraConfig(
            r=3,
            alpha=5,
            targets=("q_proj", "down_proj"),
            rank_pattern={"layers.1.self_attn.q_proj": 2},
            alpha_pattern={"layers.1.mlp.down_proj": 9},
            exclude_modules=("layers.0.mlp.down_proj",),
            layers_to_transform=(0, 1),
            bias="lora_only",
            modules_to_save=("model.norm",),
            rslora=True,
            dropout=0.3,
            init="gaussian",
        ),
        injected_and_trained,
        None,
        {
            "r": (4, ALL),
            "alpha": (7, "scales end"),
            "targets": (("k_proj", "q_proj", "down_proj"), ALL),
            "rank_pattern": ({"layers.1.self_attn.q_proj": 1}, ALL),
            "alpha_pattern": ({"layers.1.mlp.down_proj": 11}, "scales end"),
            "exclude_modules": (("layers.0.self_attn.q_proj",), ALL),
            "layers_to_transform": ((1,), ALL),
            "bias": ("all", "shapes start end"),
            "modules_to_save": (("input_layernorm",), "shapes start end"),
            "rslora": (False, "scales end"),
            "dropout": (0.4, "end"),
            "init": ("both", "start end"),
            "dora": (True, "shapes start end"),
            "detach": (True, "end"),
        },
        {"dora": {"dropout": 0.0}, "detach": DORA, "layers_to_transform": {"exclude_modules": ("o_proj",)}},
    ),
    VeraConfig: Case(
        VeraConfig(r=3, targets=("q_proj", "down_proj"), d_initial=0.3),
        injected_and_trained,
        None,
        {
            "r": (4, "shapes start end"),
            "targets": (("k_proj", "down_proj"), "shapes start end"),
            "d_initial": (0.4, "start end"),
        },
    ),
    IA3Config: Case(
        IA3Config(targets=("k_proj", "down_proj"), feedforward=("down_proj",)),
        injected_and_trained,
        None,
        {
            "targets": (("v_proj", "down_proj"), "shapes start end"),
            "feedforward": ((), "shapes start end"),
        },
    ),
    BottleneckConfig: Case(
        BottleneckConfig(width=3, targets=("up_proj",)),
        injected_and_trained,
        None,
        {"width": (4, "shapes start end"), "targets": (("down_proj",), "shapes start end")},
    ),
    PrefixTuningConfig: Case(
        PrefixTuningConfig(num_virtual_tokens=3),
        injected_and_trained,
        None,
        {"num_virtual_tokens": (4, "shapes start end")},
    ),
    PromptTuningConfig: Case(
        PromptTuningConfig(num_virtual_tokens=3),
        injected_and_trained,
        None,
        {"num_virtual_tokens": (4, "shapes start end")},
    ),
    AdamW: Case(
        AdamW(
            lr=0.03,
            betas=(0.7, 0.8),
            eps=1e-3,
            weight_decay=0.4,
            clip=0.05,
            decays=lambda path, p: path.endswith(".A"),
            rate=lora_plus(3),
            t=6,
            m=moments(0.01),
            v=moments(0.02),
        ),
        optimized,
        optimized_by_hand,
        {
            "lr": (0.05, ALL),
            "betas": ((0.6, 0.8), ALL),
            "betas[1]": ((0.7, 0.9), ALL),
            "eps": (1e-2, ALL),
            "weight_decay": (0.6, ALL),
            "clip": (0.07, ALL),
            "decays": (lambda path, p: path.endswith(".B"), ALL),
            "rate": (lora_plus(4), ALL),
            "t": (7, ALL),
            "m": (moments(0.03), ALL),
            "v": (moments(0.04), ALL),
        },
    ),
    Schedule: Case(
        Schedule(steps=9, warmup=2, kind="cosine", final=0.1),
        scheduled,
        scheduled_by_hand,
        {"steps": (8, ALL), "warmup": (3, ALL), "kind": ("constant", ALL), "final": (0.3, ALL)},
    ),
    Config: Case(
        Config(
            vocab_size=11,
            hidden_size=12,
            intermediate_size=15,
            num_hidden_layers=2,
            num_attention_heads=6,
            num_key_value_heads=3,
            head_dim=4,
            max_position_embeddings=13,
            rms_norm_eps=1e-3,
            rope_theta=100.0,
            rope_scaling=RopeScaling(3.0, 1.0, 4.0, 8),
            tie_word_embeddings=False,
            attention_bias=True,
            mlp_bias=True,
        ),
        built,
        None,
        {
            name: (value, "shapes logits")
            for name, value in {
                "vocab_size": 14,
                "hidden_size": 16,
                "intermediate_size": 17,
                "num_hidden_layers": 3,
                "num_attention_heads": 9,
                "num_key_value_heads": 2,
                "head_dim": 6,
                "tie_word_embeddings": True,
                "attention_bias": False,
                "mlp_bias": False,
            }.items()
        }
        | {
            "rms_norm_eps": (1e-2, "logits"),
            "rope_theta": (50.0, "logits"),
            "rope_scaling": (None, "logits"),
            "max_position_embeddings": (18, "longest"),
        },
    ),
    RopeScaling: Case(
        RopeScaling(
            factor=3.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8
        ),
        stretched,
        None,
        {
            "factor": (5.0, "logits"),
            "low_freq_factor": (0.5, "logits"),
            "high_freq_factor": (6.0, "logits"),
            "original_max_position_embeddings": (9, "logits"),
        },
    ),
}
ONLY_ONE_VALUE = {RopeScaling: {"rope_type"}}
NEEDS = {  # a field that names a text goes with that text's digest
    (Run, "target"): {"text": KJV},
    (Run, "fallback"): {"text": INSTEAD.digest},
}
FIELDS = [(cls, name) for cls, case in CASES.items() for name in case.changes]


def test_every_settings_class_is_tested():
    """Those that check what a user gives, and the sweep's two that are made of such ones."""
    found = {Run, Setting}
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ClassDef) and "def __post_init__" in ast.unparse(node):
                parts = file.relative_to(PACKAGE).with_suffix("").parts
                module = __import__(".".join(("minilora", *parts)), fromlist=["it"])
                found.add(getattr(module, node.name))
    assert found == set(CASES)


def said(x):
    """How a class or the name of a field is called among the parameters of a test."""
    return x if isinstance(x, str) else f"{x.__module__.rpartition('.')[2]}.{x.__name__}"


@pytest.mark.parametrize("cls", CASES, ids=said)
def test_every_field_is_tested_from_a_value_that_is_not_its_default(cls):
    case = CASES[cls]
    names = {f.name for f in fields(cls)} - ONLY_ONE_VALUE.get(cls, set())
    assert {name.partition("[")[0] for name in case.changes} == names
    numbers = []
    for f in fields(cls):
        value = getattr(case.usual, f.name)
        default = f.default if f.default_factory is MISSING else f.default_factory()
        if f.name in names and not isinstance(value, bool | str) and default is not MISSING:
            assert value != default, f.name
        if isinstance(value, int | float) and not isinstance(value, bool):
            numbers.append(value)
    assert len(set(numbers)) == len(numbers)


before = {}  # what came of the usual settings: once for each class, and what a field needs beside it


@pytest.mark.parametrize(("cls", "name"), FIELDS, ids=said)
def test_a_field_changes_only_what_it_names_and_a_run_follows_its_recipe(cls, name):
    case = CASES[cls]
    value, parts = case.changes[name]
    along = case.along.get(name, {})
    key = cls, str(along)
    if key not in before:
        usual = replace(case.usual, **along)
        before[key] = case.run(usual)
        if case.hand:
            assert before[key] == case.hand(usual)
    changed = replace(case.usual, **along, **{name.partition("[")[0]: value}, **NEEDS.get((cls, name), {}))
    after = case.run(changed)
    if case.hand:
        assert after == case.hand(changed)
    assert after.keys() == before[key].keys()
    differ = {part for part in after if after[part] != before[key][part]}
    assert differ == set(after if parts == ALL else parts.split())


@pytest.mark.parametrize("method", finetune.METHODS)
def test_the_default_rate_is_that_of_the_method(method):
    bits = None if method == "full" else 4
    recipe = replace(CASES[finetune.Recipe].usual, method=method, bits=bits, lr=None)
    assert tuned(recipe) == tuned_by_hand(recipe)


@pytest.mark.parametrize("change", [{"length": 9000}, {"warmup": 9000}], ids=str)
def test_length_and_warmup_are_capped_at_their_maximum(change):
    usual = replace(CASES[finetune.Recipe].usual, length=100)
    most = {"length": TINY.max_position_embeddings, "warmup": usual.steps}
    assert tuned(replace(usual, **change)) == tuned_by_hand(replace(usual, **{k: most[k] for k in change}))


def test_a_permutation_is_trained_with_the_embedding_settings():
    assert Plan().setting("folio") == rank_sweep.TEXT
    assert Plan().setting("permuted:3") == rank_sweep.TABLE
    assert Plan().ranks_for("folio") == (1, 2, 4, 8, 16, 32, 64)
    assert Plan().ranks_for("permuted:3") == (1, 2, 3, 4, 8, 16, 32, 64)  # and the elbow


def test_every_run_uses_the_fallback_of_an_unavailable_text():
    plan = CASES[Plan].usual
    with mock.patch.object(corpora, "corpus", side_effect=StorageError("no network")):
        found = planned(plan)
    assert found["fallback"] == {True}
    assert found["text"] == {INSTEAD.digest}


def test_the_requested_threads_are_used():
    given = []

    def train(*_, threads, **__):
        given.append(threads)
        raise StopIteration

    with mock.patch.object(session, "train", train), pytest.raises(StopIteration):
        finetune.run(CASES[finetune.Recipe].usual, next(outs), threads=3)
    assert given == [3]

"""Activation checkpointing: the same bits, less memory, and no needless second product."""

from collections import Counter

import numpy as np
import pytest
from helpers import NORMS, batch, dtypes, same_bits, seeds, tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from minilora.decoding import generate
from minilora.errors import ConfigError
from minilora.fast import parallel
from minilora.fast.folded import folded, places
from minilora.fast.recompute import HOW, Known, recompute
from minilora.layers import Linear, Need
from minilora.lora import inject
from minilora.methods.lora_config import LoraConfig
from minilora.methods.quantize import quantize
from minilora.ops import saved
from minilora.optim import AdamW
from minilora.training import train
from minilora.tree import digest, named_params, replica, trained, walk

KINDS = {
    "lora": {"modules_to_save": NORMS},
    "dropout": {"dropout": 0.4},
    "dora": {"dora": True},
    "copies": {"targets": ["q_proj"], "modules_to_save": ["o_proj", "down_proj"]},
    "full": None,
}


def model_of(kind, seed, dtype):
    model, rng = tiny(seed, dtype)
    if KINDS[kind] is not None:
        inject(model, LoraConfig(r=3, alpha=7, init="both", **KINDS[kind]), rng=rng)
    return model, rng


def wrapped(model, how):
    """A replica whose blocks are recomputed."""
    copy = replica(model)
    recompute(copy, how)
    return copy


@settings(max_examples=5)
@given(seed=seeds, dtype=dtypes, kind=st.sampled_from(list(KINDS)), fold=st.booleans())
def test_recomputing_gives_the_same_bits_and_stores_less(seed, dtype, kind, fold):
    model, rng = model_of(kind, seed, dtype)
    ids, labels = batch(rng)
    state = rng.bit_generator.state
    names = list(trained(model))
    results = []
    for some in (replica(model), *(wrapped(model, how) for how in HOW)):
        rng.bit_generator.state = state
        with folded([places(some)], 10**9 if fold else 0):
            loss, back = some.loss(ids, labels, train=True)
            kept = sum(a.size for a in saved(back).values())
            back()
        params = list({id(p): p for p in named_params(some).values() if p.trainable}.values())
        results.append(
            (loss, rng.bit_generator.state, kept, {n: p.grad for n, p in zip(names, params, strict=True)})
        )
    (loss, after, kept, g), *others = results
    for again, end, _, h in others:
        assert (loss, after) == (again, end)
        assert same_bits(g, h)
    selective, full = (less for _, _, less, _ in others)
    assert full < selective < kept


def test_selective_keeps_what_products_with_weights_give():
    """Attention keeps the largest score of a row, not its exponentials; the MLP its input, gate and up."""
    model, rng = model_of("lora", 0, np.float32)
    ids, labels = batch(rng)
    kept = []
    for some in (replica(model), wrapped(model, "selective")):
        with folded([places(some)], 10**9):
            arrays = saved(some.loss(ids, labels, train=True)[1])
        kept.append({name: a.shape for name, a in arrays.items() if ".backs.0." in name})
    plain, selective = ({n: s for n, s in some.items() if ".back_a.back_half" in n} for some in kept)
    largest = {name: (*shape[:-1], 1) for name, shape in plain.items() if ".tiles." in name}  # of each row
    assert largest
    assert selective == plain | largest
    N, T, D, F = *ids.shape, model.config.hidden_size, model.config.intermediate_size
    mlp = [shape for name, shape in kept[1].items() if ".backs.0.back_m." in name]
    assert sorted(mlp) == [(N, T, D), (N, T, F), (N, T, F)]


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("kind", ["full", "lora", "folded lora", "dropout", "lora in four bits"])
def test_recomputing_skips_every_product_that_it_can(kind, how, monkeypatch):
    model, rng = tiny(0, np.float32)
    if kind.endswith("bits"):
        quantize(model)
    if kind != "full":
        inject(model, LoraConfig(r=3, init="both", dropout=0.4 * (kind == "dropout")), rng=rng)
    model = wrapped(model, how)
    L, ran, real = 2, Counter(), Linear.__call__

    def spied(self, x, need=Need.ALL):
        ran[self.weight.shape] += 1
        return real(self, x, need)

    with folded([places(model)], 10**9 if kind.startswith("folded") else 0):
        monkeypatch.setattr(Linear, "__call__", spied)
        _, back = model.loss(*batch(rng), train=True)
        first = ran.copy()
        back()
    again = ran - first
    # q, k, v, gate and up, neither o nor down; or none
    assert sum(again.values()) == (5 * L if how == "full" else 0)
    assert sum(first.values()) == 7 * L + 1


@pytest.mark.parametrize("how", HOW)
def test_what_lies_below_all_that_is_trained_keeps_nothing(how):
    model, rng = tiny(0, np.float32)
    inject(model, LoraConfig(r=3, targets=["up_proj"], layers_to_transform=[1]), rng=rng)
    _, back = wrapped(model, how).loss(*batch(rng), train=True)
    kept = [name for name in saved(back) if ".backs." in name]
    halves = {name.split(".")[2] for name in kept if ".back_a." in name or ".back_m." in name}
    assert halves == {"0"}  # of the last block, the only one that is needed
    assert not any(".back_a." in name for name in kept)


@pytest.mark.parametrize("how", HOW)
def test_a_recomputed_block_takes_a_cache(how):
    model, rng = model_of("lora", 0, np.float32)
    ids, _ = batch(rng)
    found = [
        np.stack([*generate(some, ids[:, :3], 3, rng=rng, temperature=0)])
        for some in (model, wrapped(model, how))
    ]
    assert np.array_equal(*found)


@settings(max_examples=3)
@given(seed=seeds, kind=st.sampled_from(["lora", "dropout"]))
def test_recomputing_does_not_change_a_run(seed, kind):
    runs = []
    for how in (None, *HOW):
        model, _ = model_of(kind, seed, np.float32)
        batches = [batch(np.random.default_rng(i)) for i in range(3)]
        with pytest.MonkeyPatch.context() as patch:
            wraps = []
            patch.setattr(parallel, "wrap", lambda *a, wraps=wraps: wraps.append(a[1:]) or recompute(*a))
            history = train(model, batches, AdamW(1e-2), steps=3, **({"recompute": how} if how else {}))
        assert {*wraps} == ({(how,)} if how else set())
        runs.append((history.loss, {path: p.data.tobytes() for path, p in trained(model).items()}))
        assert not any("Recomputed" in type(node).__name__ for node in model.model.layers)
    assert runs[0] == runs[1] == runs[2]


@pytest.mark.parametrize("how", HOW)
def test_a_run_that_fails_leaves_the_block_as_it_was(how, monkeypatch):
    """Else the next forward would be without its value, or memory would not be freed."""
    model, rng = model_of("lora", 0, np.float32)
    copy, ids = wrapped(model, how), batch(rng)
    expected = float(copy.loss(*ids)[0])
    maps = [node for _, node in walk(copy) if isinstance(node, Known)]
    _, back = copy.loss(*ids, train=True)
    assert not any(np.ndim(known.value) for known in maps)  # the backward has them
    for run in (back, lambda: copy.loss(*ids, train=True)):
        with monkeypatch.context() as patch:
            patch.setattr("minilora.model.swiglu", lambda g, u: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                run()
        assert not any(np.ndim(known.value) for known in maps)
    assert float(copy.loss(*ids)[0]) == expected


@pytest.mark.parametrize("how", [True, False, "some", ""])
def test_another_way_to_recompute_is_refused_before_anything_is_read(how, tmp_path):
    model, rng = model_of("lora", 0, np.float32)
    train(model, [batch(rng)], AdamW(1e-2), steps=1, checkpoint=tmp_path / "run")
    model, rng = model_of("lora", 0, np.float32)
    before = digest(model)
    with pytest.raises(ConfigError, match=rf"recompute is {how!r}; expected 'selective', 'full' or None"):
        train(
            model, [batch(rng)] * 2, AdamW(1e-2), steps=2, checkpoint=tmp_path / "run",
            evaluate=lambda: 1 / 0, recompute=how,
        )  # fmt: skip
    assert digest(model) == before

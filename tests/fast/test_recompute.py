"""Activation checkpointing: the same bits, less memory, and no needless second product."""

from collections import Counter

import numpy as np
import pytest
from helpers import NORMS, batch, dtypes, same_bits, seeds, tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from minilora.fast import parallel
from minilora.fast.folded import folded, places
from minilora.fast.recompute import recompute
from minilora.layers import Linear, Need
from minilora.lora import inject
from minilora.methods.lora_config import LoraConfig
from minilora.ops import saved
from minilora.optim import AdamW
from minilora.training import train
from minilora.tree import named_params, replica, trained

HOW = {
    "lora": {"modules_to_save": NORMS},
    "dropout": {"dropout": 0.4},
    "dora": {"dora": True},
    "copies": {"targets": ["q_proj"], "modules_to_save": ["o_proj", "down_proj"]},
    "full": None,
}


def model_of(kind, seed, dtype):
    model, rng = tiny(seed, dtype)
    if HOW[kind] is not None:
        inject(model, LoraConfig(r=3, alpha=7, init="both", **HOW[kind]), rng=rng)
    return model, rng


def wrapped(model):
    """A replica whose blocks are recomputed."""
    copy = replica(model)
    recompute(copy)
    return copy


@settings(max_examples=5)
@given(seed=seeds, dtype=dtypes, kind=st.sampled_from(list(HOW)), fold=st.booleans())
def test_recomputing_gives_the_same_bits_and_stores_less(seed, dtype, kind, fold):
    model, rng = model_of(kind, seed, dtype)
    ids, labels = batch(rng)
    state = rng.bit_generator.state
    plain, copy = replica(model), wrapped(model)
    names = list(trained(model))
    results = []
    for some in (plain, copy):
        rng.bit_generator.state = state
        with folded([places(some)], 10**9 if fold else 0):
            loss, back = some.loss(ids, labels, train=True)
            kept = sum(a.size for a in saved(back).values())
            back()
        params = list({id(p): p for p in named_params(some).values() if p.trainable}.values())
        results.append(
            (loss, rng.bit_generator.state, kept, {n: p.grad for n, p in zip(names, params, strict=True)})
        )
    (loss, after, kept, g), (again, end, less, h) = results
    assert (loss, after) == (again, end)
    assert same_bits(g, h)
    assert less < kept


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_recomputing_skips_the_last_product_of_both_halves(kind, monkeypatch):
    model, rng = model_of(kind, 0, np.float64)
    model = wrapped(model)
    L, ran, real = 2, Counter(), Linear.__call__

    def spied(self, x, need=Need.ALL):
        ran[self.weight.data.shape] += 1
        return real(self, x, need)

    with folded([places(model)], 10**9):
        monkeypatch.setattr(Linear, "__call__", spied)
        _, back = model.loss(*batch(rng), train=True)
        first = ran.copy()
        back()
    again = ran - first
    assert sum(again.values()) == 5 * L  # q, k, v, gate and up; neither o nor down
    assert sum(first.values()) == 7 * L + 1


@settings(max_examples=3)
@given(seed=seeds, kind=st.sampled_from(["lora", "dropout"]))
def test_recomputing_does_not_change_a_run(seed, kind):
    runs = []
    for again in (False, True):
        model, _ = model_of(kind, seed, np.float32)
        batches = [batch(np.random.default_rng(i)) for i in range(3)]
        with pytest.MonkeyPatch.context() as patch:
            wraps = []
            patch.setattr(parallel, "wrap", lambda copy, wraps=wraps: wraps.append(copy) or recompute(copy))
            history = train(model, batches, AdamW(1e-2), steps=3, **({"recompute": True} if again else {}))
        assert bool(wraps) is again
        runs.append((history.loss, {path: p.data.tobytes() for path, p in trained(model).items()}))
        assert not any("Recomputed" in type(node).__name__ for node in model.model.layers)
    assert runs[0] == runs[1]


def test_a_failed_backward_restores_every_skipped_product():
    """Else the next forward would be without its value."""
    model, rng = model_of("lora", 0, np.float32)
    copy = wrapped(model)
    block = copy.model.layers[0].block
    last, gate = block.mlp.down_proj, block.mlp.gate_proj
    _, back = copy.loss(*batch(rng), train=True)
    gate.base.weight.data = gate.base.weight.data[:, 1:]  # what the second forward meets is broken
    with pytest.raises(ValueError, match="mismatch"):
        back()
    assert last.again is False

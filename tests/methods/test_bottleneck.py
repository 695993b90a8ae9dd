"""The bottleneck adapter: a network behind a linear map, which no merged weight can hold."""

import math

import pytest
from helpers import batch, seeds, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from library import np
from test_lora import assert_adapted_gradient

from minilora.errors import ConfigError, MismatchError, UnsupportedError
from minilora.layers import Linear, Need, Param
from minilora.lora import adapted, fuse, inject, merge
from minilora.methods.bottleneck import HOULSBY, PFEIFFER, BottleneckConfig
from minilora.ops import gelu, saved
from minilora.spectra import spectrum
from minilora.tree import digest, freeze, trained

wide = st.integers(3, 9)


def one(seed, o, i, m, bias=True):
    """One Linear with a moved adapter, in a tree of its own, and the generator that goes on."""
    rng = np.random.default_rng(seed)
    b = Param(rng.standard_normal(o)) if bias else None
    tree = {"o_proj": Linear(Param(rng.standard_normal((o, i))), b)}
    inject(tree, BottleneckConfig(m, "o_proj"), rng=rng)
    for p in trained(tree).values():
        p.data = rng.standard_normal(p.shape)
    return tree["o_proj"], rng


@settings(max_examples=15)
@given(seed=seeds, o=wide, i=wide, m=st.integers(1, 12), bias=st.booleans())
def test_the_gradient_matches_the_complex_step(seed, o, i, m, bias):
    layer, rng = one(seed, o, i, m, bias)
    assert_adapted_gradient(layer, rng.standard_normal((2, 4, i)), rng)


@settings(max_examples=15)
@given(seed=seeds, o=wide, i=wide, m=st.integers(1, 12))
def test_without_a_gradient_of_x_the_others_are_the_same(seed, o, i, m):
    layer, rng = one(seed, o, i, m)
    x, dy, found = rng.standard_normal((2, 4, i)), rng.standard_normal((2, 4, o)), []
    for need in (Need.ALL, Need.WEIGHTS):
        dx = layer(x, need)[1](dy.copy())
        assert (dx is None) == (need is Need.WEIGHTS)
        found.append([p.grad for p in trained(layer).values()])
        for p in trained(layer).values():
            p.grad = None
    assert len(found[0]) == 4
    assert all(np.array_equal(a, b) for a, b in zip(*found, strict=True))


@settings(max_examples=15)
@given(seed=seeds, o=wide, i=wide, m=st.integers(1, 12))
def test_it_is_the_papers_network_behind_the_map(seed, o, i, m):
    layer, rng = one(seed, o, i, m)
    x = rng.standard_normal((2, 4, i))
    D, c, U, e = (p.data for p in trained(layer).values())
    assert (D.shape, c.shape, U.shape, e.shape) == ((m, o), (m,), (o, m), (o,))
    y = layer.base(x)[0]
    expected = y + gelu(y @ D.T + c)[0] @ U.T + e
    assert np.allclose(layer(x)[0], expected, rtol=0, atol=1e-13 * (1 + float(abs(expected).max())))


def test_it_keeps_what_enters_the_bottleneck_and_nothing_of_the_base():
    layer, rng = one(0, 6, 9, 2)
    _, back = layer(rng.standard_normal((2, 4, 9)))
    assert {a.shape for a in saved(back).values()} <= {(8, 6), (2, 4, 2), (8, 2)}  # y, what f needs, f


def test_houlsby_has_two_in_a_block_and_pfeiffer_one():
    for targets, each in ((HOULSBY, 2), (PFEIFFER, 1)):
        model, rng = tiny(0)
        inject(model, BottleneckConfig(3, targets), rng=rng)
        layers = adapted(model)
        assert {path.rpartition(".")[2] for path in layers} == set(targets)
        assert len(layers) == each * len(model.model.layers)


def test_at_first_only_the_way_up_has_a_gradient():
    model, rng = tiny(0)
    inject(model, BottleneckConfig(3), rng=rng)
    ids, labels = batch(rng)
    _, back = model.loss(ids, labels, train=True)
    back()
    for path, p in trained(model).items():
        assert p.grad.any() == (".up." in path), path


def test_the_way_down_is_drawn_as_lora_draws():
    rng = np.random.default_rng(0)
    tree = {"o_proj": Linear(Param(np.zeros((400, 200), np.float32)))}
    inject(tree, BottleneckConfig(100, "o_proj"), rng=rng)
    D = tree["o_proj"].adapters["default"].down.weight.data
    assert D.dtype == np.float32
    assert 0.99 < float(abs(D).max()) * math.sqrt(400) <= 1


@pytest.mark.parametrize("how", [merge, fuse])
def test_it_cannot_be_merged_and_nothing_has_changed(how):
    model, rng = tiny(0)
    inject(model, BottleneckConfig(3), rng=rng)
    ids, _ = batch(rng)
    y, before = model(ids)[0], digest(model)
    with pytest.raises(UnsupportedError, match="a bottleneck adapter is not linear and cannot be merged"):
        how(model)
    assert digest(model) == before
    assert np.array_equal(model(ids)[0], y)
    assert spectrum(model) == {}


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"width": 0}, ConfigError, "width is 0; expected an int, at least 1"),
        ({"targets": ()}, ConfigError, "expected at least one name"),
        ({"targets": "o_prj"}, MismatchError, "nearest: "),
        ({"targets": "embed_tokens"}, ConfigError, "embed_tokens is an embedding; expected linear maps"),
    ],
)
def test_what_it_cannot_stand_behind_is_an_error(options, error, said):
    model, rng = tiny(0)
    with pytest.raises(error, match=said):
        inject(model, BottleneckConfig(**options), rng=rng)


def test_beside_a_frozen_adapter_nothing_learns():
    """Where another row's adapter is trained, in a mixed batch say."""
    rng = np.random.default_rng(0)
    tree = {"o_proj": Linear(Param(rng.standard_normal((4, 5))))}
    inject(tree, BottleneckConfig(2, "o_proj"), rng=rng)
    freeze(tree)
    adapter = tree["o_proj"].adapters["default"]
    _, back = adapter(tree["o_proj"].base, rng.standard_normal((2, 3, 5)), Need.WEIGHTS)
    assert back(rng.standard_normal((2, 3, 4))) is None
    assert adapter.down.weight.grad is None
    assert adapter.up.weight.grad is None


def test_unless_told_it_is_houlsbys_of_width_16():
    assert BottleneckConfig() == BottleneckConfig(16, HOULSBY)

"""W + ΔW in one array is the plain adapter, up to rounding; replicas share it and release it."""

import numpy as np
import pytest
from helpers import assert_precision_scales, batch, same_bits, seeds, tiny, tiny_lora
from hypothesis import given, settings
from hypothesis import strategies as st

from minilora.fast.folded import Folded, folded, pays, places, through_weight
from minilora.layers import Dropout, Linear, Need, Param
from minilora.lora import Adapted, LowRank, inject, merge, owners
from minilora.methods.bias import WithBias
from minilora.methods.lora_config import LoraConfig
from minilora.training import evaluate
from minilora.tree import replica, trained, walk

sizes = st.integers(1, 9)
needs = st.sampled_from([Need.WEIGHTS, Need.ALL])


def layer_of(O, I, r, dropout=None, bias=None):  # noqa: E741
    """One adapted Linear of ones."""
    adapter = LowRank(Param(np.ones((r, I))), Param(np.ones((O, r))), 1.0, dropout)
    base = Linear(Param(np.ones((O, I)), False))
    return {"q": Adapted(base, {"a": adapter if bias is None else WithBias(adapter, bias)}, "a")}


@given(
    seed=seeds, o=sizes, i=sizes, r=sizes, m=sizes, need=needs, bias=st.sampled_from(["no", "frozen", "own"])
)
def test_a_folded_layer_matches_the_plain_adapter(seed, o, i, r, m, need, bias):
    """Value and every gradient; a bias of the adapter's own is trained either way."""

    def both(dtype):
        rng = np.random.default_rng(seed)
        draw = lambda *shape: rng.standard_normal(shape).astype(dtype)  # noqa: E731
        W, A, B, b, x, dy = draw(o, i), draw(r, i), draw(o, r), draw(o), draw(m, 1, i), draw(m, 1, o)
        base = Linear(Param(W, False), Param(b, False) if bias == "frozen" else None)
        adapter = LowRank(Param(A), Param(B), 1.7)
        tree = {"q": Adapted(base, {"a": WithBias(adapter, Param(b)) if bias == "own" else adapter}, "a")}
        for M in (10**9, 0):
            with folded([places(tree)], M):
                y, back = tree["q"](x, need)
                assert isinstance(places(tree) and adapter, LowRank) is (M == 0) or not places(tree)
            dx = back(dy.copy())
            assert (dx is None) is (need is Need.WEIGHTS)
            grads = [p.grad for p in trained(tree).values()]
            yield np.concatenate([a.ravel() for a in (y, *grads, *([] if dx is None else [dx]))])
            for p in trained(tree).values():
                p.grad = None

    assert_precision_scales(both)


class Counted(np.ndarray):
    """An array whose products of matrices are counted, in multiplications and additions."""

    operations = 0

    def __array_ufunc__(self, ufunc, method, *inputs, **how):
        plain = [np.asarray(x) if isinstance(x, np.ndarray) else x for x in inputs]
        result = np.asarray(getattr(ufunc, method)(*plain, **how))
        if ufunc is np.matmul:
            Counted.operations += 2 * result.size * plain[0].shape[-1]
        return result.view(Counted)


def through_both(M, O, I, r, dtype=np.float64, seed=0):  # noqa: E741
    """dA and dB through H and through G, and the operations of each way."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.standard_normal(shape).astype(dtype).view(Counted)  # noqa: E731
    adapter, z, dy = LowRank(Param(draw(r, I)), Param(draw(O, r)), 1.7), draw(M, I), draw(M, O)
    ways = (
        lambda: adapter.learn(dy, adapter.scale * (z @ adapter.A.data.T), z),
        lambda: adapter.learn_from(dy.T @ z),
    )
    found, counts = [], []
    for way in ways:
        Counted.operations = 0
        way()
        counts.append(Counted.operations)
        found.append(np.concatenate([np.asarray(p.grad).ravel() for p in (adapter.A, adapter.B)]))
        adapter.A.grad = adapter.B.grad = None
    return adapter, found, counts


@given(seed=seeds, M=st.integers(1, 40), O=sizes, I=sizes, r=sizes)
def test_both_orders_of_products_give_the_same_gradients(seed, M, O, I, r):  # noqa: E741
    assert_precision_scales(lambda dtype: through_both(M, O, I, r, dtype, seed)[1])


@given(M=st.integers(1, 200), O=st.integers(1, 40), I=st.integers(1, 40), r=st.integers(1, 20))
def test_the_order_with_fewer_operations_is_taken(M, O, I, r):  # noqa: E741
    """As counted while they are done, not by a formula."""
    adapter, _, (by_factors, by_weight) = through_both(M, O, I, r)
    assert through_weight(adapter, M) is (by_weight < by_factors)


@pytest.mark.parametrize(("r", "expected"), [(2, "learn"), (3, "learn_from")])  # 2048 + 128 r < 1024 r
def test_a_folded_layer_takes_that_order(r, expected, monkeypatch):
    called = []
    for name in ("learn", "learn_from"):
        real = getattr(LowRank, name)
        monkeypatch.setattr(LowRank, name, lambda *a, n=name, f=real: called.append(n) or f(*a))
    tree = layer_of(8, 8, r)
    with folded([places(tree)], 32):
        _, back = tree["q"](np.ones((32, 8)), Need.ALL)
        back(np.ones((32, 8)))
    assert called == [expected]


@given(seed=seeds, m=st.integers(1, 30), need=needs)
def test_the_standalone_backward_matches_that_of_the_call(seed, m, need):
    rng = np.random.default_rng(seed)
    base = Linear(Param(rng.standard_normal((4, 5)), False), Param(rng.standard_normal(4)))
    low_rank = LowRank(Param(rng.standard_normal((2, 5))), Param(rng.standard_normal((4, 2))), 1.7)
    layer = Folded(low_rank, low_rank.merged(base).weight)
    x, dy = rng.standard_normal((1, m, 5)), rng.standard_normal((1, m, 4))
    results = []
    for back in (layer(base, x, need)[1], layer.backward(base, x, need)):
        dx = back(dy.copy())
        params = [low_rank.A, low_rank.B, base.bias]
        results.append({str(k): p.grad for k, p in enumerate(params)} | ({} if dx is None else {"x": dx}))
        for p in params:
            p.grad = None
    assert same_bits(*results)


@pytest.mark.parametrize(("m", "folds"), [(6, False), (7, True)])  # 2 O I < M (O + I): 80 < 13 M
def test_weights_are_folded_only_for_enough_rows(m, folds):
    tree = layer_of(5, 8, 2)
    (place,) = places(tree)
    assert pays(place.adapter, m) is folds
    with folded([[place]], m):
        assert isinstance(tree["q"].adapters["a"], Folded) is folds
        assert np.array_equal(tree["q"](np.ones((m, 8)), Need.NONE)[0], np.full((m, 5), 24.0))
    assert tree["q"].adapters["a"] is place.adapter


@pytest.mark.parametrize("bias", [None, Param(np.ones(5))])
def test_replicas_share_each_folded_weight_and_release_it(bias):
    trees = [layer_of(5, 8, 2, bias=bias) for _ in range(3)]
    found = [places(tree) for tree in trees]

    def fail():
        with folded(found, 7):
            weights = {id(place.parent[place.name].weight if bias is None else place.parent.adapter.weight)
                       for (place,) in found}  # fmt: skip
            assert len(weights) == 1
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert [[place.adapter for place in places(tree)] for tree in trees] == [[p.adapter] for (p,) in found]


def test_adapters_that_folding_would_change_are_not_folded():
    assert not places(layer_of(5, 8, 2, dropout=Dropout(0.5, None)))
    model, rng = tiny(0)
    inject(model, LoraConfig(r=2, dora=True), rng=rng)
    assert not places(model)
    model, rng = tiny_lora(0)
    assert len(places(model)) == 7 * 2  # the table's adapter is no LowRank
    merge(model)
    assert not places(model)


@settings(max_examples=10)
@given(seed=seeds)
def test_evaluate_gives_the_plain_loss_and_leaves_the_model_unchanged(seed):
    def both(dtype):
        model, rng = tiny_lora(seed, dtype)
        batches = [batch(rng, n=40, t=5), batch(rng, n=1, t=2), batch(rng, n=1, t=2), batch(rng, n=40, t=5)]
        before = {
            path: (layer, dict(layer.adapters)) for path, layer in owners(model) if isinstance(layer, Adapted)
        }

        def watched():
            for some in batches:
                yield some
                assert not any(isinstance(node, Folded) for _, node in walk(model))

        yield np.array([evaluate(model, watched())], dtype)
        for path, layer in owners(model):
            assert not isinstance(layer, Adapted) or before[path] == (layer, layer.adapters)
        counts = [(labels >= 0).sum() for _, labels in batches]
        losses = [float(model.loss(*b)[0]) for b in batches]
        yield np.array([sum(n * loss for n, loss in zip(counts, losses, strict=True)) / sum(counts)], dtype)

    assert_precision_scales(both)


def test_evaluate_folds_each_weight_once_per_batch_size(monkeypatch):
    model, rng = tiny_lora(0)
    formed, real = [], LowRank.merged
    monkeypatch.setattr(LowRank, "merged", lambda *a: formed.append(id(a[0].A.data)) or real(*a))
    evaluate(model, [batch(rng, n=40, t=5) for _ in range(4)])
    assert len(formed) == len(set(formed)) == len(places(replica(model))) > 0

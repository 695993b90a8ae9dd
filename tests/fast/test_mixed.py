"""Each row of a mixed batch has what its adapter alone would give it, and nothing of its neighbours'."""

from collections import Counter

import numpy as np
import pytest
from device import DeviceArray
from helpers import (
    LINEARS,
    assert_layer_gradient,
    assert_precision_scales,
    batch,
    dtypes,
    flags,
    gamma,
    merge_bound,
    seeds,
    sizes,
    tiny,
    unit,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st

from minilora.backend import to_device, to_host
from minilora.decoding import generate, past_of
from minilora.errors import ConfigError, InputError, MismatchError, StateError, UnsupportedError
from minilora.fast.mixed import FEW, Mixed, MixedBatch, Stack, by_phase, gathered, loop, mixed, segments
from minilora.layers import Dropout, Linear, Need, Param
from minilora.lora import LowRank, attach, bases, inject, merge, set_adapter, untie
from minilora.methods.embedding import LowRankEmbedding
from minilora.methods.lora_config import LoraConfig
from minilora.tree import digest, freeze, named_params, replica, trained

COMPUTES = (loop, segments, gathered, by_phase)
ROW_BY_ROW = (segments, gathered, by_phase)
computes = st.sampled_from(COMPUTES)
rows_of = st.lists(st.integers(-1, 3), min_size=1, max_size=6)  # which adapter each row has; -1: none
one_call = {"seed": seeds, "numbers": rows_of, "t": st.integers(1, 3), "o": sizes, "i": sizes}  # of a layer


def one_layer(base, compute, path="q", invariant=False):
    """A Mixed on its own, and its batch."""
    made = MixedBatch(None, {path: base.weight.data.shape}, compute is loop, invariant)
    layer = made.layers[path] = Mixed(base, path, made, compute)
    return layer, made


def drawn(rng, shapes, r, dtype=np.float64, scale=0.7, trainable=False, paths=None):
    """Adapters of both factors for all paths (path -> (O, I)), or for some."""
    draw = lambda *shape: Param(to_device(rng.standard_normal(shape).astype(dtype)), trainable)  # noqa: E731
    return {p: LowRank(draw(r, shapes[p][1]), draw(shapes[p][0], r), scale) for p in paths or shapes}


def chosen(adapters, numbers):
    return [None if k < 0 else adapters[k] for k in numbers]


def agree(a, b):
    """Whether numbers of order one differ by rounding in float64; an adapter changes the first digits."""
    return np.allclose(a, b, rtol=1e-12, atol=1e-12)


def with_one(model, adapters):
    """Inject ready adapters."""
    if "lm_head" in adapters and model.lm_head is None:
        untie(model)
    attach(model, adapters, "a")


def family(rng, shapes, dtype=np.float64, trainable=False):
    """Four adapters: of three ranks and scales, one of them for some paths only."""
    some = [p for k, p in enumerate(shapes) if k % 3 != 1]
    how = ((2, 0.7, None), (5, -1.3, None), (2, 0.3, None), (1, 2.0, some))
    return [drawn(rng, shapes, r, dtype, scale, trainable, paths) for r, scale, paths in how]


@given(**one_call, dtype=dtypes, compute=computes)
def test_each_row_is_its_adapters_within_the_bound(seed, numbers, t, o, i, dtype, compute):
    rng = np.random.default_rng(seed)
    base = Linear(Param(rng.standard_normal((o, i)).astype(dtype), False))
    layer, made = one_layer(base, compute)
    adapters = family(rng, made.shapes, dtype)
    x = rng.standard_normal((len(numbers), t, i)).astype(dtype)
    with made.rows(chosen(adapters, numbers)):
        y = layer(x, Need.NONE)[0]
    assert y.dtype == dtype
    wide = np.longdouble
    for n, k in enumerate(numbers):
        a = adapters[k]["q"] if k >= 0 else LowRank(Param(x[n, :1] * 0), Param(y[n, :1].T * 0), 0.0)
        W, A, B, X = (v.astype(wide) for v in (base.weight.data, a.A.data, a.B.data, x[n].T))
        exact = W @ X + dtype(a.scale).astype(wide) * (B @ (A @ X))
        bound = merge_bound(base.weight.data, a.A.data, a.B.data, a.scale, x[n].T, dtype) / 2
        assert (np.abs(y[n].T - exact) <= bound * (1 + 2.0**-10)).all()  # the exact value has 11 bits more


@given(**one_call, dtype=dtypes, need=st.sampled_from(Need))
def test_on_integers_all_computations_are_equal_and_so_are_their_gradients(
    seed, numbers, t, o, i, dtype, need
):
    """Products and sums below 2^24 round nothing."""
    rng = np.random.default_rng(seed)
    whole = lambda *shape: rng.integers(-3, 4, shape).astype(dtype)  # noqa: E731
    base = Linear(Param(whole(o, i), False), Param(whole(o), False))
    ranks, x, dy = (2, 4, 2, 1), whole(len(numbers), t, i), whole(len(numbers), t, o)
    factors = [(whole(r, i), whole(o, r)) for r in ranks]
    results = []
    for compute in COMPUTES:
        layer, made = one_layer(base, compute)
        adapters = [{"q": LowRank(Param(A), Param(B), 0.5)} for A, B in factors]
        for a in adapters:
            freeze(a, keep=lambda _: need is not Need.NONE)
        with made.rows(chosen(adapters, numbers)):
            y, back = layer(x, need)
        found = {"y": y}
        if need is not Need.NONE:
            dx = back(dy.copy())
            assert (dx is None) is (need is Need.WEIGHTS)
            found |= {} if dx is None else {"x": dx}
            found |= grads(adapters)
            reached = {int(name[0]) for name in found if "." in name}
            assert reached == set(numbers) - {-1}
        results.append(found)
    W, b = base.weight.data, base.bias.data
    for n, k in enumerate(numbers):
        V = W + 0.5 * factors[k][1] @ factors[k][0] if k >= 0 else W
        assert np.array_equal(results[0]["y"][n], x[n] @ V.T + b)
        if need is Need.ALL:
            assert np.array_equal(results[0]["x"][n], dy[n] @ V)
    if need is not Need.NONE:
        for k in set(numbers) - {-1}:
            A, B = factors[k]
            G = sum(dy[n].T @ x[n] for n in range(len(numbers)) if numbers[n] == k)
            assert np.array_equal(results[0][f"{k}.q.A"], 0.5 * B.T @ G)
            assert np.array_equal(results[0][f"{k}.q.B"], 0.5 * G @ A.T)
    for other in results[1:]:
        assert other.keys() == results[0].keys()
        assert all(np.array_equal(other[k], a) for k, a in results[0].items())


@given(**one_call, compute=st.sampled_from([loop, segments]))
def test_gradients_are_those_of_the_complex_step(seed, numbers, t, o, i, compute):
    rng = np.random.default_rng(seed)
    layer, made = one_layer(Linear(Param(rng.standard_normal((o, i)), False)), compute)
    adapters = family(rng, made.shapes, trainable=True)
    params = {f"{k}.{name}": p for k in set(numbers) - {-1} for name, p in named_params(adapters[k]).items()}
    with made.rows(chosen(adapters, numbers)):
        assert_layer_gradient(layer, params, rng.standard_normal((len(numbers), t, i)), rng)


@settings(max_examples=15)
@given(seed=seeds, numbers=rows_of, t=st.integers(1, 4), how=flags, compute=computes, invariant=st.booleans())
def test_a_mixed_model_is_each_row_with_its_adapter_alone(seed, numbers, t, how, compute, invariant):
    """Logits of the whole network, against injected adapters, one at a time; base rows against the base."""

    def both(dtype):
        model, rng = tiny(seed, dtype, **how)
        copy, made = mixed(model, LINEARS, compute=compute, invariant=invariant and compute is not loop)
        adapters = family(rng, made.shapes, dtype)
        ids = batch(rng, n=len(numbers), t=t)[0]
        with made.rows(chosen(adapters, numbers)):
            yield copy(ids)[0]
        y = []
        for n, k in enumerate(numbers):
            alone = replica(model)
            if k >= 0:
                with_one(alone, adapters[k])
            y.append(alone(ids[n : n + 1])[0][0])
        yield np.stack(y)

    assert_precision_scales(both)


@settings(max_examples=15)
@given(seed=seeds, numbers=rows_of, how=flags, compute=computes)
def test_cached_decoding_of_a_mixed_batch_is_its_full_forward(seed, numbers, how, compute):
    def both(dtype):
        model, rng = tiny(seed, dtype, **how)
        copy, made = mixed(model, compute=compute)
        adapters = family(rng, made.shapes, dtype)
        ids = batch(rng, n=len(numbers), t=5)[0]
        with made.rows(chosen(adapters, numbers)):
            past = past_of(copy, len(ids), 5)
            parts = (ids[:, :3], ids[:, 3:4], ids[:, 4:])
            yield np.concatenate([copy.forward(part, past=past)[0] for part in parts], 1)
            yield copy.forward(ids)[0][:, 2:]

    assert_precision_scales(both)


def decoded(copy, made, rows, ids):
    """Logits of a prompt of 3 tokens and of 2 more, cached, of every row."""
    with made.rows(rows):
        past = past_of(copy, len(ids), 5)
        parts = (ids[:, :3], ids[:, 3:4], ids[:, 4:])
        return np.concatenate(
            [*(copy.forward(part, past=past)[0] for part in parts), copy.forward(ids)[0]], 1
        )


@settings(max_examples=25)
@given(
    seed=seeds, numbers=rows_of, dtype=dtypes, how=flags, compute=st.sampled_from(ROW_BY_ROW), data=st.data()
)
def test_invariant_rows_have_the_same_bits_whoever_shares_their_batch(
    seed, numbers, dtype, how, compute, data
):
    """A row alone; the same rows in any order; base rows beside base rows only."""
    model, rng = tiny(seed, dtype, **how)
    copy, made = mixed(model, LINEARS, compute=compute, invariant=True)
    adapters = family(rng, made.shapes, dtype)
    ids = batch(rng, n=len(numbers), t=5)[0]
    rows = chosen(adapters, numbers)
    y = decoded(copy, made, rows, ids)
    for n in range(len(ids)):
        assert np.array_equal(decoded(copy, made, rows[n : n + 1], ids[n : n + 1])[0], y[n])
    order = data.draw(st.permutations(range(len(ids))))
    assert np.array_equal(decoded(copy, made, [rows[n] for n in order], ids[order]), y[order])
    base = decoded(copy, made, [None] * len(ids), ids)
    for n, row in enumerate(rows):
        assert row or np.array_equal(y[n], base[n])


@given(
    seed=seeds,
    numbers=st.lists(st.integers(-1, 3), min_size=1, max_size=20),
    t=st.integers(1, 3),
    dtype=dtypes,
)
@example(seed=0, numbers=[0] * FEW + [1] * (FEW + 1), t=1, dtype=np.float32)
def test_invariant_computations_have_the_same_bits(seed, numbers, t, dtype):
    """So a row's do not depend on whether the stack takes it."""
    rng = np.random.default_rng(seed)
    base = Linear(Param(rng.standard_normal((37, 50)).astype(dtype), False))
    x = rng.standard_normal((len(numbers), t, 50)).astype(dtype)
    adapters = family(rng, {"q": (37, 50)}, dtype)
    results = []
    for compute in (segments, gathered):
        layer, made = one_layer(base, compute, invariant=True)
        with made.rows(chosen(adapters, numbers)):
            results.append(layer(x, Need.NONE)[0])
    assert np.array_equal(*results)


@pytest.mark.parametrize("r", [1, 2, 8, 16])
def test_invariant_bits_do_not_depend_on_how_factors_and_scale_are_stored(r):
    """Factors in either order, a scale that is a float64: at a size for which BLAS has several kernels."""
    rng = np.random.default_rng(0)
    base = Linear(Param(rng.standard_normal((130, 200)).astype(np.float32), False))
    x = rng.standard_normal((9, 1, 200)).astype(np.float32)
    adapters = drawn(rng, {"q": (130, 200)}, r, np.float32)
    a, results = adapters["q"], []
    for A in (a.A.data, np.asfortranarray(a.A.data)):
        for B in (a.B.data, np.asfortranarray(a.B.data)):
            for scale in (0.7, np.float64(0.7)):
                for compute in (segments, gathered):
                    layer, made = one_layer(base, compute, invariant=True)
                    with made.rows([{"q": LowRank(Param(A, False), Param(B, False), scale)}] * FEW + [None]):
                        results.append(layer(x, Need.NONE)[0])
    assert all(np.array_equal(y, results[0]) for y in results)


@given(seed=seeds, kinds=st.tuples(dtypes, dtypes, dtypes), o=sizes, i=sizes, r=st.integers(1, 3))
@example(seed=0, kinds=(np.float32, np.float64, np.float64), o=4, i=5, r=2)
@example(seed=0, kinds=(np.float64, np.float32, np.float64), o=4, i=5, r=2)
@example(seed=0, kinds=(np.float32, np.float32, np.float64), o=4, i=5, r=2)
def test_factors_of_other_widths_give_the_same_values(seed, kinds, o, i, r):
    """The loop's, within the bound of both: products at the widest of their operands, then a sum of x's."""
    rng = np.random.default_rng(seed)
    draw = lambda dtype, *shape: rng.standard_normal(shape).astype(dtype)  # noqa: E731
    adapter = LowRank(Param(draw(kinds[0], r, i), False), Param(draw(kinds[1], o, r), False), 0.7)
    base, x = Linear(Param(np.zeros((o, i), kinds[2]), False)), draw(kinds[2], 1, 1, i)
    results = []
    for compute in (loop, gathered):
        layer, made = one_layer(base, compute)
        with made.rows([{"q": adapter}]):
            results.append(layer(x, Need.NONE)[0])
    A, B, X = (np.abs(v.astype(float)) for v in (adapter.A.data, adapter.B.data, x[0, 0]))
    h, y = unit(np.result_type(kinds[0], kinds[2])), unit(np.result_type(*kinds))
    bound = 2 * (gamma(i + 2, h) + gamma(r, y) + unit(kinds[2])) * 0.7 * (B @ (A @ X))
    assert (np.abs(results[0] - results[1])[0, 0] <= 1.01 * bound).all()  # its terms of second order


@pytest.mark.parametrize("width", [48, 130])
def test_invariance_holds_where_blas_has_several_kernels(width):
    """At sizes for which the plain product of many rows does differ from that of one."""
    how = {"hidden_size": width, "intermediate_size": 2 * width + 3, "head_dim": 8}
    how |= {"attention_bias": True, "mlp_bias": True}
    model, rng = tiny(3, np.float32, **how)
    differs = False
    for invariant in (True, False):
        copy, made = mixed(model, invariant=invariant)
        adapters = [drawn(rng, made.shapes, r, np.float32, 0.1) for r in (1, 3, 8, 8, 16)]
        ids = batch(rng, n=23, t=5)[0]
        rows = [[*adapters, None][n % 12 if n % 12 < 6 else 2] for n in range(23)]  # one has more than FEW
        y = decoded(copy, made, rows, ids)
        for n in range(23):
            same = np.array_equal(decoded(copy, made, rows[n : n + 1], ids[n : n + 1])[0], y[n])
            assert same or not invariant
            differs = differs or not same
    assert differs


@settings(max_examples=15)
@given(seed=seeds, numbers=rows_of, how=flags, compute=computes, invariant=st.booleans())
def test_gradients_of_a_mixed_model_are_those_of_training_alone(seed, numbers, how, compute, invariant):
    """Each adapter's, from its own rows; an adapter of the last block alone is reached as well."""

    def both(dtype):
        model, rng = tiny(seed, dtype, **how)
        before = digest(model)
        copy, made = mixed(model, LINEARS, compute=compute, invariant=invariant and compute is not loop)
        adapters = family(rng, made.shapes, dtype, trainable=True)
        adapters[0] = {p: a for p, a in adapters[0].items() if ".1." in p}
        ids = batch(rng, n=len(numbers), t=4)[0]
        dlogits = rng.standard_normal((len(ids), 4, 11)).astype(dtype)
        with made.rows(chosen(adapters, numbers)):
            copy.forward(ids, train=True)[1](dlogits.copy())
        assert digest(model) == before
        assert all(
            p.grad is None for p in [*named_params(model).values(), *named_params(bases_of(copy)).values()]
        )
        found = grads(adapters)
        for k in range(4):
            if k in numbers:
                other = replica(model)
                with_one(other, adapters[k])
                own = [n for n in range(len(ids)) if numbers[n] == k]
                other.forward(ids[own], train=True)[1](dlogits[own])
        alone = grads(adapters)
        assert alone.keys() == found.keys()
        yield np.concatenate([np.ones(1, dtype), *(g.ravel() for g in found.values())])
        yield np.concatenate([np.ones(1, dtype), *(g.ravel() for g in alone.values())])

    assert_precision_scales(both)


def bases_of(copy):
    """The frozen parameters of a mixed replica."""
    return {path: p for path, p in named_params(copy).items() if ".trained." not in path}


def grads(adapters):
    """The gradients, which are cleared."""
    found = {}
    for k, some in enumerate(adapters):
        for name, p in named_params(some).items():
            if p.grad is not None:
                found[f"{k}.{name}"], p.grad = p.grad, None
    return found


@settings(max_examples=5)
@given(seed=seeds, compute=computes)
def test_dropout_masks_are_those_of_training_alone(seed, compute):
    """Each adapter's, from its own generator, and dx goes back through them."""

    def both(dtype):
        model, _ = tiny(seed, dtype, tie_word_embeddings=False)
        copy, made = mixed(model, compute=compute)
        numbers = [0, 1, 1, 0, -1]
        for alone in (False, True):
            rng = np.random.default_rng(seed)
            ids, dlogits = batch(rng, t=4)[0], rng.standard_normal((5, 4, 11)).astype(dtype)
            adapters = [drawn(rng, made.shapes, r, dtype, trainable=True) for r in (2, 3)]
            for k, some in enumerate(adapters):
                own = np.random.default_rng(k)
                for adapter in some.values():
                    adapter.dropout = Dropout(0.4, own)
            if alone:
                for k, at in ((0, [0, 3]), (1, [1, 2])):
                    other = replica(model)
                    with_one(other, adapters[k])
                    other.forward(ids[at], train=True)[1](dlogits[at])
            else:
                with made.rows(chosen(adapters, numbers)):
                    copy.forward(ids, train=True)[1](dlogits.copy())
            yield np.concatenate([g.ravel() for g in grads(adapters).values()])

    assert_precision_scales(both)


# ---- stacks


@given(
    seed=seeds, batches=st.lists(st.lists(st.integers(-1, 5), min_size=1, max_size=6), min_size=1, max_size=6)
)
@example(seed=0, batches=[[0, 1, 2, 3], [0, 2, 3], [3, 2, 4, 0], [0, 0, 1, 1, 2, 2], [1], [-1], [1, 0]])
def test_stacks_that_outlive_a_batch_give_what_new_ones_give(seed, batches):
    """To the bit, whatever was in their slots; rows that were there before are not copied again."""
    rng = np.random.default_rng(seed)
    base = Linear(Param(rng.standard_normal((4, 5)), False))
    layer, made = one_layer(base, gathered)
    adapters = [drawn(rng, made.shapes, r) for r in (2, 2, 2, 3, 3, 2)]
    copies, real, last = [], Stack.copy, Counter()
    for numbers in batches:
        x = rng.standard_normal((len(numbers), 1, 5))
        with pytest.MonkeyPatch.context() as patch, made.rows(chosen(adapters, numbers)):
            patch.setattr(Stack, "copy", lambda self, *a: copies.append(a) or real(self, *a))
            y = layer(x, Need.NONE)[0]
        new_layer, new = one_layer(base, gathered)
        with new.rows(chosen(adapters, numbers)):
            assert np.array_equal(y, new_layer(x, Need.NONE)[0])
        now = Counter(k for k in numbers if k >= 0)
        assert len(copies) <= now.total()
        assert now != last or not copies
        copies.clear()
        last = now


def test_a_row_that_joins_costs_one_copy_and_one_that_leaves_at_most_one(monkeypatch):
    model, rng = tiny(0)
    copy, made = mixed(model)
    adapters = [drawn(rng, made.shapes, 2) for _ in range(9)]
    copies, real = [], Stack.copy
    monkeypatch.setattr(Stack, "copy", lambda self, *a: copies.append(a) or real(self, *a))

    def cost(numbers, t=1):
        copies.clear()
        with made.rows(chosen(adapters, numbers)):
            for _ in range(2):
                copy.forward(np.zeros((len(numbers), t), int))
        return len(copies)

    assert cost([0, 1, 2, 3, 4], t=3) == 0  # a prompt needs no stack
    assert cost([0, 1, 2, 3, 4]) == 5
    assert cost([0, 1, 2, 3, 4]) == 0
    assert cost([4, 2, 0, 1, 3]) == 0
    assert cost([0, 1, 5, 3, 4]) == 1
    assert cost([0, -1, 5, 3, 4]) <= 1
    assert cost([0, 5, 3]) <= 2
    assert cost([0, 5, 3, 6]) == 1
    assert cost([0, 0, 5, 3]) == 1
    assert cost([0, 5, 3] + [6] * FEW) >= FEW - 1
    assert cost([0, 5, 3] + [7] * (FEW + 1)) == 3  # to a segment; the stack shrinks
    assert cost([0, 5, 3] + [7] * (FEW + 1)) == 0


@given(n=st.integers(1, 70))
def test_rows_that_join_one_by_one_cost_fewer_than_three_copies_each(n):
    """A full stack doubles and copies its rows again: 1 + 2 + 4 + ... < 2 n, beside the n that join."""
    rng = np.random.default_rng(0)
    layer, made = one_layer(Linear(Param(rng.standard_normal((4, 5)), False)), gathered)
    adapters = [drawn(rng, made.shapes, 2) for _ in range(n)]
    copies, real = [], Stack.copy
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stack, "copy", lambda self, *a: copies.append(a) or real(self, *a))
        for k in range(1, n + 1):
            with made.rows(adapters[:k]):
                layer(np.zeros((k, 1, 5)), Need.NONE)
    assert n <= len(copies) < 3 * n


def test_a_name_is_looked_up_once_for_all_of_its_rows(monkeypatch):
    model, _ = injected()
    made, asked = mixed(model)[1], []
    monkeypatch.setattr("minilora.fast.mixed.named", lambda model, name: asked.append(name) or {})
    with made.rows(["a", None, "b", "a", "a"]):
        assert asked == ["a", "b"]


def test_a_trained_adapter_is_never_stacked():
    """Its arrays change in place, and a stack would not see that."""
    model, rng = tiny(0)
    copy, made = mixed(model, compute=gathered)
    adapters = [drawn(rng, made.shapes, 2, trainable=k == 0) for k in range(2)]
    ids = batch(rng, n=3, t=1)[0]
    with made.rows([adapters[0], adapters[1], adapters[0]]):
        before = copy.forward(ids)[0]
        for p in named_params(adapters[0]).values():
            p.data += 1
        after = copy.forward(ids)[0]
    assert np.array_equal(before[1], after[1])
    assert (before[[0, 2]] != after[[0, 2]]).any(-1).all()
    freeze(adapters[0])
    rows, turned = [adapters[1], adapters[0], adapters[0]], [1, 0, 2]
    with made.rows(rows):  # stacked
        assert agree(copy.forward(ids[turned])[0], after[turned])
    freeze(adapters[0], keep=lambda _: True)  # the same rows, and a stack that is not right any more
    with made.rows(rows):
        for p in named_params(adapters[0]).values():
            p.data -= 1
        assert agree(copy.forward(ids[turned])[0], before[turned])


def test_an_adapter_that_was_trained_within_rows_is_copied_anew():
    model, rng = tiny(0)
    copy, made = mixed(model)
    adapters, ids = drawn(rng, made.shapes, 2), batch(rng, n=1, t=3)[0]
    with made.rows([adapters]):
        before = copy.forward(ids[:, :1])[0]
    freeze(adapters, keep=lambda _: True)
    with made.rows([adapters]):
        copy.forward(ids, train=True)[1](np.ones((1, 3, 11)))
        assert trained(copy)
    assert not trained(copy)  # the base alone again
    for p in named_params(adapters).values():
        p.data -= 0.1 * p.grad
    freeze(adapters)
    with made.rows([adapters]):
        after = copy.forward(ids[:, :1])[0]
    with made.rows([dict(adapters)]):
        assert np.array_equal(copy.forward(ids[:, :1])[0], after)
    assert (before != after).all()


@pytest.mark.parametrize("between", [[None], ["b"]])
def test_what_changed_before_the_last_call_is_copied_anew(between):
    """By name it may change before any: a name is looked up in each call."""
    model, rng = injected()
    copy, made = mixed(model)
    ids, adapters = batch(rng, n=1, t=1)[0], drawn(rng, made.shapes, 2)
    freeze(model)  # or b, the active one, would not be stacked
    with made.rows([adapters]):
        before = copy.forward(ids)[0]
    for p in named_params(adapters).values():
        p.data += 1
    with made.rows(between):
        named_before = copy.forward(ids)[0]
    with made.rows([adapters]):
        after = copy.forward(ids)[0]
    with made.rows([dict(adapters)]):
        assert np.array_equal(copy.forward(ids)[0], after)
    assert (before != after).all()
    for _ in range(2):
        for path, p in named_params(model).items():
            p.data += ".b." in path
        with made.rows(between):
            changed = copy.forward(ids)[0]
        assert (changed != named_before).all() == (between == ["b"])
        named_before = changed


def test_a_mapping_that_has_the_address_of_a_dead_one_is_another():
    rng = np.random.default_rng(0)
    layer, made = one_layer(Linear(Param(rng.standard_normal((4, 5)), False)), gathered)
    x = rng.standard_normal((1, 1, 5))
    for _ in range(20):
        adapters = drawn(rng, made.shapes, 2)
        address = id(adapters)
        with made.rows([adapters]):
            layer(x, Need.NONE)
        with made.rows([None]):
            pass
        del adapters
        factors, others = drawn(rng, made.shapes, 2)["q"], []
        while len(others) < 2000 and (not others or id(others[-1]) != address):
            others.append({"q": factors})
        with made.rows([others[-1]]):
            y = layer(x, Need.NONE)[0]
        assert agree(y, factors(layer.base, x, Need.NONE)[0])


class Short:
    """NumPy, out of memory at one of its allocations."""

    def __init__(self, at):
        self.left = at

    def __getattr__(self, name):
        return getattr(np, name)

    def empty(self, *args):
        self.count()
        return np.empty(*args)

    def asarray(self, *args):
        self.count()
        return np.asarray(*args)

    def count(self):
        self.left -= 1
        if self.left == 0:
            raise MemoryError


MORE = [0, 1], [2, 3, 4, 0, 1, 2, 3, 4]  # a batch, and one that needs more room


@pytest.mark.parametrize("again", [[0, 1], [2, 3], [4, 0, 1], [1], [3, 1, 0], [0, 0, 1]])
@pytest.mark.parametrize(
    ("what", "at", "first", "then"),
    [
        *(("a copy", k, *MORE) for k in range(1, 9)),
        *(("the memory", k, *MORE) for k in range(1, 10)),
        ("a copy", 1, [0, 0, 1], [0, 2, 1]),
    ],
)
def test_a_stack_that_could_not_be_filled_has_no_factors_of_another(
    what, at, first, then, again, monkeypatch
):
    """Whatever failed and whoever comes next; nor is the adapter of any layer left out."""
    rng, shapes = np.random.default_rng(0), {"q": (4, 5), "k": (3, 5)}
    made = MixedBatch(None, shapes, False, False)
    for path, shape in shapes.items():
        made.layers[path] = Mixed(Linear(Param(rng.standard_normal(shape), False)), path, made, gathered)
    adapters, x, real = [drawn(rng, shapes, 2) for _ in range(5)], rng.standard_normal((8, 1, 5)), Stack.copy

    def forward(numbers):
        with made.rows(chosen(adapters, numbers)):
            return [layer(x[: len(numbers)], Need.NONE)[0] for layer in made.layers.values()]

    def half(stack, slot, some):
        nonlocal at
        at -= 1
        if at == 0:
            A, B, s = stack.arrays["q"]
            A[slot], B[slot], s[slot] = 0, 0, 0
            raise MemoryError
        real(stack, slot, some)

    forward(first)
    with monkeypatch.context() as patch:
        if what == "a copy":
            patch.setattr(Stack, "copy", half)
        else:
            patch.setattr("minilora.fast.mixed.xp", Short(at))
        with pytest.raises(MemoryError):
            forward(then)
    for _ in range(2):
        for y, (path, layer) in zip(forward(again), made.layers.items(), strict=True):
            for n, k in enumerate(again):
                alone = adapters[k][path](layer.base, x[n : n + 1], Need.NONE)[0][0]
                assert agree(y[n], alone)


# ---- texts of several rows


@given(
    seed=seeds,
    texts=st.lists(st.tuples(st.integers(-1, 3), st.integers(1, 3)), min_size=1, max_size=5),
    compute=computes,
    invariant=st.booleans(),
)
def test_texts_of_several_rows_are_those_rows_and_are_not_stacked(seed, texts, compute, invariant):
    rng = np.random.default_rng(seed)
    base = Linear(Param(rng.standard_normal((4, 5)), False))
    layer, made = one_layer(base, compute, invariant=invariant and compute is not loop)
    adapters, (numbers, lengths) = family(rng, made.shapes), zip(*texts, strict=True)
    x = rng.standard_normal((sum(lengths), 1, 5))
    rows = [k for k, n in texts for _ in range(n)]
    with made.rows(chosen(adapters, rows)):
        one = layer(x, Need.NONE)[0]
    with made.rows(chosen(adapters, numbers), lengths):
        y = layer(x, Need.NONE)[0]
        made.check(sum(lengths))
    single = {k for k, _ in texts if k >= 0} - {k for k, n in texts if n > 1}
    slots = [m.adapters for stack in made.stacks.values() for m in stack.slots if m]
    if compute in (gathered, by_phase):
        assert sorted(map(id, slots)) == sorted(id(adapters[k]) for k in numbers if k in single)
    assert np.array_equal(y, one) if invariant else agree(y, one)


@given(batches=st.lists(st.integers(1, 40), min_size=1, max_size=8))
@example(batches=[33, 8, 9, 2, 1])
def test_a_stack_has_fewer_than_four_slots_for_each_row(batches):
    """However many there were before; so its memory is bounded by that of the rows' adapters."""
    rng = np.random.default_rng(0)
    layer, made = one_layer(Linear(Param(rng.standard_normal((4, 5)), False)), gathered)
    adapters = [drawn(rng, made.shapes, 2) for _ in range(max(batches))]
    for n in batches:
        with made.rows(adapters[:n]):
            layer(rng.standard_normal((n, 1, 5)), Need.NONE)
        (stack,) = made.stacks.values()
        assert all(n <= len(a) < 4 * n for a in stack.arrays["q"])
        assert [m.adapters for m in stack.slots if m] == adapters[:n]  # and nobody who left is kept alive


# ---- what it costs


@pytest.mark.parametrize("t", [1, 3])
@pytest.mark.parametrize("compute", COMPUTES)
def test_no_rank_costs_more_than_its_own(compute, t, device, monkeypatch):
    """Multiplications counted on the stand-in: T (O I + r (O + I)) for each row of rank r."""
    O, I, numbers = 7, 5, [0, 1, -1, 2, 0, 3, 1]  # noqa: E741
    rng = np.random.default_rng(0)
    layer, made = one_layer(Linear(Param(to_device(rng.standard_normal((O, I))), False)), compute)
    ranks = (2, 5, 2, 1)
    adapters = [drawn(rng, made.shapes, r) for r in ranks]
    products, real = [], DeviceArray.__matmul__

    def count(a, b):
        y = real(a, b)
        products.append(y.size * a.shape[-1])
        return y

    monkeypatch.setattr(DeviceArray, "__matmul__", count)
    with made.rows(chosen(adapters, numbers)):
        layer(to_device(rng.standard_normal((len(numbers), t, I))), Need.NONE)
    assert sum(products) == t * sum(O * I + (ranks[k] * (O + I) if k >= 0 else 0) for k in numbers)
    stacks = compute is gathered or (compute is by_phase and t == 1)
    assert len(products) == (5 + 2 * 4 if compute is loop else 1 + 2 * (3 if stacks else 4))


@pytest.mark.parametrize("compute", COMPUTES)
def test_the_mixed_model_is_the_same_on_the_device(compute, request):
    def life():
        model, rng = tiny(1, np.float32, tie_word_embeddings=True)
        copy, made = mixed(model, LINEARS, compute=compute, invariant=compute is not loop)
        adapters = family(rng, made.shapes, np.float32)
        freeze(adapters[2], keep=lambda _: True)
        ids, numbers = to_device(batch(rng, n=6, t=3)[0]), [0, 2, -1, 3, 1, 2]
        numbers_out = []
        with made.rows(chosen(adapters, numbers)):
            y, back = copy.forward(ids, train=True)
            back(to_device(rng.standard_normal(y.shape).astype(np.float32)))
            numbers_out += [to_host(y), to_host(copy.forward(ids[:, :1])[0])]
            numbers_out += list(generate(copy, ids, 3, rng=rng, temperature=0))
        return [*numbers_out, *(to_host(g) for g in grads(adapters).values())]

    host = life()
    request.getfixturevalue("device")
    for a, b in zip(host, life(), strict=True):
        assert np.array_equal(a, b)


# ---- what is refused


@pytest.mark.parametrize("compute", COMPUTES)
def test_a_nan_stays_in_its_own_rows(compute):
    model, rng = tiny(0)
    copy, made = mixed(model, compute=compute)
    good, bad = (drawn(rng, made.shapes, 2) for _ in range(2))
    for t in (1, 3):
        ids = batch(rng, n=4, t=t)[0]
        with made.rows([good, None, good, None]):
            before = copy.forward(ids)[0]
        next(iter(bad.values())).A.data[:] = np.nan
        with made.rows([good, bad, good, None]), np.errstate(invalid="ignore"):
            after = copy.forward(ids)[0]
        assert np.isnan(after[1]).all()
        assert agree(after[[0, 2, 3]], before[[0, 2, 3]])


def injected(**how):
    """A model with the adapters a (of all maps) and b (of some), and a mixed replica of it."""
    model, rng = tiny(2)
    for name, targets in (("a", "all-linear"), ("b", ["q_proj", "down_proj"])):
        inject(model, LoraConfig(r=2, targets=targets, init="both", **how), rng=rng, name=name)
    return model, rng


@pytest.mark.parametrize("compute", COMPUTES)
def test_rows_name_injected_adapters(compute):
    model, rng = injected()
    copy, made = mixed(model, compute=compute)
    ids = batch(rng, n=4, t=3)[0]
    names = ["b", None, "a", "b"]
    with made.rows(names):
        y = copy(ids)[0]
    plain = tiny(2)[0]
    for n, name in enumerate(names):
        if name:
            set_adapter(model, name)
        expected = (model if name else plain)(ids[n : n + 1])[0][0]
        assert agree(y[n], expected)


def test_what_cannot_be_mixed_is_refused_before_anything_is_computed_or_changed(monkeypatch):
    model, rng = injected()
    copy, made = mixed(model)
    ids = batch(rng, n=2, t=3)[0]
    fine = drawn(rng, made.shapes, 2)
    path = "model.layers.0.self_attn.q_proj"
    wide, table = LowRank(Param(np.zeros((2, 9))), Param(np.zeros((24, 2))), 1.0), "model.embed_tokens"
    embedding = LowRankEmbedding(Param(np.zeros((2, 11))), Param(np.zeros((10, 2))), 1.0)
    with made.rows([fine, None]):
        before = copy.forward(ids)[0]
        for n in (1, 3):
            with pytest.raises(InputError, match=f"{n} rows of ids, 2 adapters"):
                copy.forward(np.zeros((n, 2), int))
    monkeypatch.setattr(Linear, "__call__", None)  # nothing is computed
    with pytest.raises(StateError, match=r"within batch\.rows"):
        copy.forward(ids)
    dora = injected(dora=True)[0]
    bias = tiny(2, attention_bias=True)[0]
    inject(bias, LoraConfig(bias="lora_only"), rng=rng, name="a")
    for rows, error, said in (
        (["a", "bb"], InputError, "no adapter 'bb'; nearest: 'b'"),
        ([3, None], InputError, "a row has 3"),
        ([], InputError, "no rows"),
        ([{path.replace("q_", "qq_"): fine[path]}, None], MismatchError, f"nearest: '{path}'"),
        (
            [{path: wide}, None],
            MismatchError,
            r"A is \(2, 9\), B \(24, 2\); expected \(r, 10\) and \(24, r\)",
        ),
        ([{table: embedding}, None], UnsupportedError, f"{table}: a LowRankEmbedding cannot be mixed"),
    ):
        with pytest.raises(error, match=said), made.rows(rows):
            pass
    for other, kind in ((dora, "DoRA"), (bias, "WithBias")):
        with pytest.raises(UnsupportedError, match=f"a {kind} cannot be mixed"), mixed(other)[1].rows(["a"]):
            pass
    for lengths, error, said in (
        ([1], InputError, "1 lengths, 2 adapters"),
        ([1, 0], ConfigError, "a length is 0; expected an int, at least 1"),
    ):
        with pytest.raises(error, match=said), made.rows([fine, None], lengths):
            pass
    spoilt = dict(fine)
    with made.rows([spoilt, None]):
        pass
    spoilt["model.nonsense"] = fine[path]
    with pytest.raises(MismatchError, match=r"'model\.nonsense' is no target"), made.rows([spoilt, None]):
        pass
    monkeypatch.undo()
    with made.rows([fine, None]):
        assert np.array_equal(copy.forward(ids)[0], before)
        with pytest.raises(StateError, match="has its rows already"), made.rows([None]):
            pass
        assert np.array_equal(copy.forward(ids)[0], before)


def test_a_merged_model_and_options_that_do_not_fit_are_refused():
    model, _ = injected()
    made = mixed(model)[1]
    merge(model)
    with pytest.raises(StateError, match="merged"):
        mixed(model)
    with pytest.raises(StateError, match="merged"), made.rows(["a"]):
        pass
    plain = tiny(2)[0]
    with pytest.raises(ConfigError, match="compute is loop"):
        mixed(plain, compute=loop, invariant=True)
    with pytest.raises(UnsupportedError, match=r"model\.embed_tokens is no linear map"):
        mixed(plain, ["embed_tokens"])
    with pytest.raises(MismatchError, match="nearest"):
        mixed(plain, ["qq_proj"])


def test_the_loop_takes_every_kind_of_adapter():
    model, rng = injected(dora=True)
    copy, made = mixed(model, compute=loop)
    ids = batch(rng, n=3, t=3)[0]
    with made.rows(["a", None, "b"]):
        y = copy(ids)[0]
    for n, name in ((0, "a"), (2, "b")):
        set_adapter(model, name)
        assert agree(y[n], model(ids[n : n + 1])[0][0])


def test_a_mixed_replica_shares_the_base_and_leaves_the_model_as_it_was():
    model, _ = injected()
    before, names = digest(model), list(named_params(model))
    copy, made = mixed(model, LINEARS)
    arrays = {id(p.data) for p in named_params(bases(model)).values()}
    assert {id(p.data) for p in named_params(copy).values()} == arrays
    assert not trained(copy)
    with made.rows(["a", "b"]):
        copy.forward(np.zeros((2, 3), int), train=True)[1](np.ones((2, 3, 11)))
    assert (digest(model), list(named_params(model))) == (before, names)
    assert all(
        (p.grad is not None) is p.trainable for p in named_params(model).values()
    )  # b is the active one


@pytest.mark.parametrize("compute", COMPUTES)
def test_a_frozen_adapter_gets_no_gradient_but_passes_dx_on(compute):
    rng = np.random.default_rng(0)
    layer, made = one_layer(Linear(Param(rng.standard_normal((4, 5)), False)), compute)
    frozen, moving = drawn(rng, made.shapes, 2), drawn(rng, made.shapes, 3, trainable=True)
    dy = rng.standard_normal((2, 3, 4))
    with made.rows([frozen, moving]):
        dx = layer(rng.standard_normal((2, 3, 5)))[1](dy.copy())
    assert not grads([frozen])
    assert len(grads([moving])) == 2
    for n, a in enumerate((frozen["q"], moving["q"])):
        assert np.allclose(dx[n], dy[n] @ (layer.base.weight.data + a.delta()), rtol=1e-13, atol=1e-13)

"""Every function without weights: its gradient, its dtype, and the identities it must keep exactly."""

import math

import pytest
from helpers import U, assert_gradient, assert_precision_scales, dtypes, gamma, seeds, sizes, unit
from hypothesis import given
from hypothesis import strategies as st
from library import np

from minilora.backend import to_device, to_host
from minilora.layers import Dropout
from minilora.ops import (
    attend_one,
    attention,
    cross_entropy,
    gelu,
    heads,
    rms_norm,
    rope,
    rope_frequencies,
    rope_tables,
    saved,
    softmax,
    swiglu,
    unheads,
)


def turned(rng, x):
    cos, sin = rope_tables(np.arange(3, 3 + x.shape[1]), 3, rope_frequencies(4, 100.0), x.real.dtype)
    return rope(x, cos, sin, 4)  # three heads in the tables, two in x


def labelled(rng, x):
    labels = rng.integers(0, x.shape[-1], x.shape[:-1])
    labels[rng.random(labels.shape) < 0.3] = -100
    return cross_entropy(x, labels)


OPS = {  # name -> op(rng, *operands), shapes of its operands; a, b, c are drawn
    "softmax": (lambda rng, x: softmax(x), lambda a, b, c: [(a, b, c)]),
    "swiglu": (lambda rng, g, u: swiglu(g, u), lambda a, b, c: [(a, b, c)] * 2),
    "gelu": (lambda rng, x: gelu(x), lambda a, b, c: [(a, b, c)]),
    "rms_norm": (lambda rng, x: rms_norm(x, 1e-3), lambda a, b, c: [(a, b, c)]),
    "rope": (turned, lambda a, b, c: [(a, b, 2 * 4)]),
    # two positions at least, and no large scores: over one, or saturated, it has no gradient but rounding
    "attention": (
        lambda rng, *qkv: attention(*qkv), lambda a, b, c: [(3, 6, a + 1, b), *[(3, 2, a + 1, b)] * 2],
    ),
    "attention in tiles": (
        lambda rng, *qkv: attention(*qkv, tile=2),
        lambda a, b, c: [(2, 4, a + 1, b), *[(2, 2, a + 1, b)] * 2],
    ),
    "cached attention": (
        lambda rng, *qkv: attention(*qkv, tile=3), lambda a, b, c: [(1, 6, a, b), *[(1, 3, a + c, b)] * 2],
    ),
    "attention of all": (
        lambda rng, *qkv: attention(*qkv, tile=2, causal=False),
        lambda a, b, c: [(2, 6, a, b), *[(2, 3, a + c, b)] * 2],
    ),
    "dropout": (lambda rng, x: Dropout(0.3, rng)(x), lambda a, b, c: [(a, b, c)]),
    "cross_entropy": (labelled, lambda a, b, c: [(a, b, c + 1)]),
}  # fmt: skip


@pytest.mark.parametrize("name", OPS)
@given(seed=seeds, a=sizes, b=sizes, c=st.integers(3, 9), size=st.sampled_from([0.01, 1.0, 5.0]))
def test_the_gradient_matches_the_complex_step(name, seed, a, b, c, size):
    op, shapes = OPS[name]  # c >= 3: a norm or softmax over less may have no gradient but rounding
    rng = np.random.default_rng(seed)
    size = min(size, 1.0) if "attention" in name else size
    operands = {str(i): size * rng.standard_normal(s) for i, s in enumerate(shapes(a, b, c))}

    def run(arrays):  # the same random mask and labels every time
        return op(np.random.default_rng(seed), *(to_device(x) for x in arrays.values()))

    y, back = run(operands)
    weights = rng.standard_normal(np.shape(y))
    dx = back(weights.copy())
    gradient = dict(zip(operands, dx if isinstance(dx, tuple) else [dx], strict=True))
    assert_gradient(lambda arrays: (weights * run(arrays)[0]).sum(), operands, gradient, rng)


@pytest.mark.parametrize("name", OPS)
@given(seed=seeds, dtype=dtypes)
def test_every_result_keeps_the_dtype(name, seed, dtype):
    op, shapes = OPS[name]
    rng = np.random.default_rng(seed)
    y, back = op(rng, *(rng.standard_normal(s).astype(dtype) for s in shapes(4, 3, 2)))
    kept = saved(back)
    dx = back(np.ones_like(y))
    assert {a.dtype for a in kept.values() if a.dtype.kind not in "iub"} <= {np.dtype(dtype)}
    assert {a.dtype for a in (y, *(dx if isinstance(dx, tuple) else [dx]))} == {np.dtype(dtype)}


@given(seed=seeds, m=sizes, n=sizes, dtype=dtypes)
def test_softmax_sums_to_one_and_is_shift_invariant(seed, m, n, dtype):
    z = np.random.default_rng(seed).integers(-20, 20, (m, n)).astype(dtype)
    p = softmax(z)[0]
    # n - 1 additions and one division
    assert (np.abs(p.astype(np.longdouble).sum(-1) - 1) <= gamma(n, unit(dtype))).all()
    assert np.array_equal(p, softmax(z + 1000)[0])  # whole numbers: the shift is exact


@given(dtype=dtypes)
def test_swiglu_is_exact_at_both_ends(dtype):
    gate = np.array([-1e4, 0, 1e4], dtype)
    y, back = swiglu(gate, np.full_like(gate, 3))
    assert to_host(y).tolist() == [0, 0, 3e4]
    dgate, dup = back(np.ones_like(y))
    assert to_host(dgate).tolist() == [0, 1.5, 3]
    assert to_host(dup).tolist() == [0, 0, 1e4]


@given(seed=seeds, T=sizes, half=st.integers(1, 4))
def test_rope_turns_the_pairs_j_and_j_plus_half(seed, T, half):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((3, T, 5 * 2 * half))  # five heads
    y, back = rope(x, *rope_tables(np.arange(T), 7, rope_frequencies(2 * half, 100.0), x.dtype), 2 * half)
    angle = np.arange(T)[:, None, None] * 100.0 ** (-np.arange(half) / half)
    a, b = np.moveaxis(x.reshape(3, T, 5, 2, half), -2, 0)
    z = (a + 1j * b) * np.exp(1j * angle)
    # the angle: 3 roundings of at most T, in either formula; the product: two more
    bound = 2 * gamma(3 * T + 2) * np.concatenate([np.abs(z)] * 2, -1).reshape(x.shape)
    assert (np.abs(y - np.concatenate([z.real, z.imag], -1).reshape(x.shape)) <= bound).all()
    assert np.array_equal(y[:, 0], x[:, 0])  # position 0 is not turned
    assert (np.abs(back(y) - x) <= bound * 2).all()  # a rotation's transpose is its inverse


@given(seed=seeds, T=st.integers(2, 7), j=st.integers(1, 6), dtype=dtypes)
def test_attention_never_sees_the_future(seed, T, j, dtype):
    rng = np.random.default_rng(seed)
    q, k, v = (rng.standard_normal((3, n, T, 5)).astype(dtype) for n in (6, 2, 2))
    y, _ = attention(q, k, v, tile=2)
    for x in (q, k, v):
        x[:, :, j:] = rng.standard_normal(x[:, :, j:].shape)
    assert np.array_equal(y[:, :, :j], attention(q, k, v, tile=2)[0][:, :, :j])


@given(seed=seeds)
def test_attention_matches_softmax_over_grouped_products(seed):
    def both(dtype):
        rng = np.random.default_rng(seed)
        q, k, v = (rng.standard_normal((3, n, t, 5)).astype(dtype) for n, t in ((6, 4), (2, 7), (2, 7)))
        plain = np.empty_like(q)
        for n, h, t in np.ndindex(3, 6, 4):
            seen = slice(0, 7 - 4 + t + 1)  # the queries are the last 4 of the 7 positions
            w = np.exp(k[n, h // 3, seen] @ q[n, h, t] / dtype(math.sqrt(5)))
            plain[n, h, t] = w @ v[n, h // 3, seen] / w.sum()
        return attention(q, k, v)[0], plain

    assert_precision_scales(both)


@given(seed=seeds, T=st.integers(1, 9), past=st.integers(0, 3), tile=st.integers(1, 9), causal=st.booleans())
def test_tiled_attention_matches_plain_attention(seed, T, past, tile, causal):
    def both(dtype):
        rng = np.random.default_rng(seed)
        shapes = (2, 6, T, 4), *[(2, 2, T + past, 4)] * 2
        q, k, v = (rng.standard_normal(shape).astype(dtype) for shape in shapes)
        dy = rng.standard_normal(q.shape).astype(dtype)
        for y, back in (attention(q, k, v, tile, causal), plain_attention(q, k, v, causal)):
            yield np.concatenate([a.ravel() for a in (y, *back(dy.copy()))])

    assert_precision_scales(both)


@given(
    seed=seeds, T=st.integers(1, 9), past=st.integers(0, 3), tile=st.integers(1, 9), causal=st.booleans(),
    dtype=dtypes,
)  # fmt: skip
def test_attention_that_keeps_no_exponentials_gives_the_same_bits(seed, T, past, tile, causal, dtype):
    rng = np.random.default_rng(seed)
    S, E = T + past, 4
    q, dy = (rng.standard_normal((2, 6, T, E)).astype(dtype) for _ in range(2))
    k, v = (rng.standard_normal((2, 2, S, E)).astype(dtype) for _ in range(2))
    found = []
    for keep in (True, False):
        y, back = attention(q, k, v, tile, causal, keep)
        kept = sum(a.size for name, a in saved(back).items() if "tiles" in name)
        found.append([kept, y, *back(dy.copy())])
    (all_of_them, *a), (one_a_row, *b) = found
    assert one_a_row == y.size // E
    assert all_of_them >= one_a_row * (past + 1)
    assert all(x.tobytes() == y.tobytes() for x, y in zip(a, b, strict=True))


def plain_attention(q, k, v, causal=True):
    """All the scores, and a mask if `causal`: the clear version of what `attention` does in tiles."""
    (_, H, T, E), (G, S) = q.shape, k.shape[1:3]
    k, v = (a.repeat(H // G, 1) for a in (k, v))
    scores = q @ k.swapaxes(-1, -2) / q.dtype.type(math.sqrt(E))
    if causal:
        scores[..., np.arange(S) > np.arange(S - T, S)[:, None]] = -np.inf
    p, back_p = softmax(scores)

    def back(dy):
        ds = back_p(dy @ v.swapaxes(-1, -2)) / q.dtype.type(math.sqrt(E))
        dk, dv = ds.swapaxes(-1, -2) @ q, p.swapaxes(-1, -2) @ dy
        return ds @ k, *(a.reshape(-1, G, H // G, S, E).sum(2) for a in (dk, dv))

    return p @ v, back


@given(seed=seeds, S=sizes, E=sizes, size=st.sampled_from([0.1, 1.0, 100.0]), dtype=dtypes)
def test_attend_one_matches_the_last_query_of_attention(seed, S, E, size, dtype):
    rng = np.random.default_rng(seed)
    q, k, v = (size * rng.standard_normal((3, n, S, E)).astype(dtype) for n in (6, 2, 2))
    q, k, v = (x.astype(dtype) for x in (q, k, v))
    one, many = attend_one(q[:, :, -1:], k, v), attention(q, k, v)[0][:, :, -1:]
    # A score is a sum of E products, scaled: at most gamma(E + 2) a from exact, a = max |q||k| / sqrt(E);
    # the shift adds 2 u a. p is off by twice that, by two exp (4 u each), a sum of S terms and a division;
    # p v by S products. Either side, and a factor 2 for the second order.
    a = (np.abs(q[:, :, -1:]) @ np.abs(k).repeat(3, 1).swapaxes(-1, -2)).max() / math.sqrt(E)
    u = unit(dtype)
    bound = 2 * 2 * (2 * gamma(E + 4, u) * float(a) + gamma(2 * S + 9, u)) * np.abs(v).max()
    assert one.dtype == dtype
    assert np.abs(one - many).max() <= bound


def test_attention_of_one_position_is_its_value():
    q, k, v = (np.random.default_rng(0).standard_normal((3, n, 1, 5)) for n in (6, 2, 2))
    assert np.array_equal(attention(q, k, v)[0], v.repeat(3, 1))


def test_heads_and_unheads_are_inverse():
    x = np.arange(2 * 3 * 20.0).reshape(2, 3, 20)
    assert heads(x, 4).shape == (2, 5, 3, 4)
    assert np.array_equal(heads(x, 4)[:, 1, 2], x[:, 2, 4:8])
    assert np.array_equal(unheads(heads(x, 4)), x)


@given(V=st.integers(2, 5000), M=st.integers(1, 9), level=st.integers(-50, 50), dtype=dtypes)
def test_uniform_logits_cost_log_V(V, M, level, dtype):
    loss, back = cross_entropy(np.full((M, V), level, dtype), np.arange(M) % V)
    # log: 2 roundings; the mean of M: M more
    assert abs(float(loss) - math.log(V)) <= gamma(M + 2, unit(dtype)) * math.log(V)
    # p - 1/M and V - 1 times p: the terms of one row cancel but for V + 3 roundings of at most 1/M each
    assert (np.abs(back().sum(-1)) <= gamma(V + 3, unit(dtype)) * 2 / M).all()


@given(seed=seeds, M=st.integers(2, 9), dtype=dtypes)
def test_an_ignored_label_adds_no_loss_and_no_gradient(seed, M, dtype):
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal((M, 7)).astype(dtype)
    labels = rng.integers(0, 7, M)
    labels[rng.integers(1, M, 2)] = -100
    other = np.where((labels == -100)[:, None], 50 * rng.standard_normal((M, 7)), logits).astype(dtype)
    (a, back_a), (b, back_b) = cross_entropy(logits, labels), cross_entropy(other, labels)
    da, db = back_a(), back_b()
    assert a == b
    assert np.array_equal(da, db)
    assert not da[labels == -100].any()
    assert da[labels != -100].all()


@given(dtype=dtypes)
def test_when_all_labels_are_ignored_loss_and_gradient_are_zero(dtype):
    logits = np.random.default_rng(0).standard_normal((4, 7)).astype(dtype)
    loss, back = cross_entropy(logits, np.full(4, -100))
    assert loss == 0
    assert not back().any()


@given(seed=seeds)
def test_cross_entropy_is_minus_the_log_of_softmax(seed):
    rng = np.random.default_rng(seed)
    logits, labels = 5 * rng.standard_normal((6, 7)), rng.integers(0, 7, 6)
    plain = -np.log(softmax(logits)[0][np.arange(6), labels])
    # an argument of size 50 costs 50 u in either; a dozen roundings beside
    assert abs(cross_entropy(logits, labels)[0] - plain.mean()) <= 2 * (gamma(60) + gamma(12) * plain.mean())


def test_no_backward_changes_its_argument():
    rng = np.random.default_rng(0)
    for name, (op, shapes) in OPS.items():
        y, back = op(rng, *(rng.standard_normal(s) for s in shapes(4, 3, 2)))
        dy = rng.standard_normal(np.shape(y))
        before = dy.copy()
        back(dy)
        assert np.array_equal(dy, before), name


def test_the_gradient_check_sees_a_wrong_gradient():
    x = np.linspace(-1, 1, 6).reshape(2, 3)
    y, back = softmax(x)
    wrong = back(np.ones_like(y) * np.arange(3)) * (1 + 1e5 * U)
    value = lambda a: (np.arange(3) * softmax(a["x"])[0]).sum()  # noqa: E731
    with pytest.raises(AssertionError):
        assert_gradient(value, {"x": x}, {"x": wrong}, np.random.default_rng(0))


@given(seed=seeds, M=st.integers(3, 9), dtype=dtypes)
def test_the_loss_is_the_mean_over_labels_that_are_not_ignored(seed, M, dtype):
    rng = np.random.default_rng(seed)
    logits, labels = rng.standard_normal((M, 7)).astype(dtype), rng.integers(0, 7, M)
    labels[rng.integers(1, M, 2)] = -100
    counted = labels != -100
    some, alone = cross_entropy(logits, labels)[0], cross_entropy(logits[counted], labels[counted])[0]
    # either: a sum of 7, exp and log of 4 units each, a mean of at most 8
    assert abs(some - alone) <= 2 * gamma(7 + 4 + 4 + 8, unit(dtype)) * (1 + alone)


def test_saved_names_each_stored_array_once():
    """Two of one name in two closures, one of them in a list, and one array under two names, which is one."""
    one, two, three = np.ones(1), np.ones(2), np.ones(3)

    def inner(x):
        return lambda dy: x * dy

    def outer(x, also, first, others):
        return lambda dy: (x, also, first(dy), others[1](dy))

    kept = saved(outer(one, one, inner(two), [None, inner(three)]))
    assert {name: len(a) for name, a in kept.items()} == {"also": 1, "first.x": 2, "others.1.x": 3}

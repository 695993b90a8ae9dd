"""Random subspaces: P and its adjoint are those of the formula, and training z is training the model at θ."""

import math

import numpy
import pytest
from helpers import (
    assert_gradient,
    assert_layer_gradient,
    batch,
    gamma,
    gradients,
    same_bits,
    seeds,
    stored,
    tiny,
    unit,
)
from hypothesis import given
from hypothesis import strategies as st
from library import np

from minilora.backend import to_device, to_host
from minilora.errors import ConfigError, StateError
from minilora.lora import inject
from minilora.methods.intrinsic import RADIX, dense, fastfood, hadamard, subspace
from minilora.methods.lora_config import LoraConfig
from minilora.methods.quantize import quantize
from minilora.optim import AdamW
from minilora.training import evaluate, train
from minilora.tree import digest, named_params, replica, size, trained, unfreeze

shapes = st.integers(1, 70).flatmap(lambda D: st.tuples(st.just(D), st.integers(1, D)))  # D, d
KINDS = (fastfood, dense)
D = size(tiny()[0])


def drawn(seed):
    """A generator whose numbers lie on the host."""
    return numpy.random.default_rng(seed)


def sylvester(n):
    """The Hadamard matrix by its definition."""
    return numpy.array([[(-1) ** (i & j).bit_count() for j in range(n)] for i in range(n)], float)


def spelled_out(P):
    """The matrix (D, d) of a Fastfood from its parts, each block as H G Π H B, in float64."""
    rows, signs, g = [], to_host(P.signs).astype(float), to_host(P.g).astype(float)
    m, n = signs.shape
    H = sylvester(n)
    for i, order in enumerate(to_host(P.order).reshape(m, n) - n * numpy.arange(m)[:, None]):
        rows.append(H @ numpy.diag(g[i]) @ numpy.eye(n)[order] @ H @ numpy.diag(signs[i]))
    return numpy.concatenate(rows)[: P.shape[0], : P.shape[1]]


def terms(P):
    """Every entry of |H| |G| |Π| |H| |B|, row by row (D,): it bounds the terms that P z and Pᵀ g add up."""
    return numpy.repeat(abs(to_host(P.g).astype(float)).sum(1), P.g.shape[1])[: P.shape[0]]


def roundings(P):
    """Of an entry of P z or Pᵀ g: those of two products with H and one with g, and of a sum over blocks."""
    m, n = P.g.shape
    return 2 * n + 2 + m


# ---- P


@pytest.mark.parametrize("n", [1, 2, 8, RADIX, 2 * RADIX, 2 * RADIX**2])
def test_the_transform_is_sylvesters_matrix(n):
    """To the bit: the entries are whole numbers. All of the matrix, or one column in a thousand."""
    x = drawn(n).integers(-9, 9, (3, n)).astype(float)
    columns = range(0, n, max(1, n // 64))
    H = numpy.array([[(-1) ** (i & j).bit_count() for j in columns] for i in range(n)], float)
    y = to_host(hadamard(to_device(x)))
    assert (y[:, :: max(1, n // 64)] == x @ H).all()
    assert (to_host(hadamard(to_device(y))) == n * x).all()


@given(shapes, seeds, st.sampled_from([numpy.float32, numpy.float64]))
def test_fastfood_is_its_own_dense_matrix(shape, seed, dtype):
    P, rng = fastfood(*shape, drawn(seed), dtype), drawn([seed, 1])
    z, g = rng.standard_normal(shape[1]).astype(dtype), rng.standard_normal(shape[0]).astype(dtype)
    matrix, (y, back) = spelled_out(P), P(to_device(z))
    dz = back(to_device(g))
    assert to_host(y).dtype == to_host(dz).dtype == dtype
    error = 2 * gamma(roundings(P), unit(dtype))
    z, g = z.astype(float), g.astype(float)
    assert (abs(to_host(y) - matrix @ z) <= error * terms(P) * abs(z).sum()).all()
    assert (abs(to_host(dz) - matrix.T @ g) <= error * (terms(P) @ abs(g))).all()


@pytest.mark.parametrize("kind", KINDS)
@given(shape=shapes, seed=seeds)
def test_the_backward_is_the_adjoint(kind, shape, seed):
    """<P z, g> = <z, Pᵀ g>: each side is off by at most its roundings times the sum of its terms."""
    P, rng = kind(*shape, drawn(seed), numpy.float64), drawn([seed, 1])
    z, g = rng.standard_normal(shape[1]), rng.standard_normal(shape[0])
    y, back = P(to_device(z))
    dz = to_host(back(to_device(g)))
    one, other = math.fsum(to_host(y) * g), math.fsum(z * dz)
    if kind is fastfood:
        most, k = terms(P) @ abs(g) * abs(z).sum(), roundings(P) + 1
    else:
        most, k = abs(g) @ abs(to_host(P.P)) @ abs(z), max(shape) + 1
    assert abs(one - other) <= 2 * gamma(k) * most


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_that_of_the_complex_step(kind):
    rng = np.random.default_rng(0)
    P = kind(23, 11, rng, numpy.float64)
    assert_layer_gradient(P, {}, rng.standard_normal(11), rng)


@given(st.integers(0, 5), st.integers(1, 5), seeds)
def test_columns_and_rows_have_their_norms_where_blocks_are_whole(log, m, seed):
    """Columns 1 and rows n / D, squared: entries of H B are ±1, so a column of a block has √n |g|."""
    n = 1 << log
    P = spelled_out(fastfood(m * n, n, drawn(seed), numpy.float64))
    assert numpy.linalg.norm(P, axis=0) == pytest.approx(numpy.ones(n), rel=gamma(8 * m * n), abs=0)
    assert (P * P).sum(1) == pytest.approx(numpy.full(m * n, 1 / m), rel=gamma(8 * m * n), abs=0)


@given(shapes, seeds)
def test_the_columns_of_a_block_that_is_cut_have_norm_1_in_the_mean(shape, seed):
    n = 1 << (shape[1] - 1).bit_length()
    if n <= shape[0]:
        P = spelled_out(fastfood(shape[0], n, drawn(seed), numpy.float64))
        assert (P * P).sum() / n == pytest.approx(1, rel=gamma(16 * sum(shape)))


@given(shapes, seeds)
def test_the_columns_of_a_dense_P_have_norm_1(shape, seed):
    P = to_host(dense(*shape, drawn(seed), numpy.float64).P)
    assert numpy.linalg.norm(P, axis=0) == pytest.approx(numpy.ones(shape[1]), rel=gamma(2 * shape[0] + 4))


@pytest.mark.parametrize(("kind", "spread"), [(fastfood, 2), (dense, 1)])
def test_columns_are_nearly_orthogonal(kind, spread):
    """Products of two columns have mean 0 and variance 1 / D (dense) or 2 / D: sums of ±g² have E g⁴ - 1.

    A Fastfood's products are ± the n - 1 values of its columns' XOR, so their mean square has a standard
    error of √(2 / (n - 1)); 5 of them are allowed, and the sums hardly depart from normal ones.
    """
    D, d = 4096, 256
    P = kind(D, d, drawn(3), numpy.float64)
    matrix = spelled_out(P) if kind is fastfood else to_host(P.P)
    products = (matrix.T @ matrix)[numpy.triu_indices(d, 1)]
    assert (products**2).mean() * D / spread == pytest.approx(1, abs=5 * math.sqrt(2 / (d - 1)))
    assert abs(products).max() < 5.4 * math.sqrt(spread / D)  # of 32,640 pairs 1 in 500 matrices has one


def test_blocks_share_no_part_and_a_seed_draws_all_of_it():
    one, again, two = (fastfood(40, 8, drawn(seed), numpy.float64) for seed in (5, 5, 6))
    for part in ("signs", "order", "g"):
        a, b, c = (to_host(getattr(P, part)) for P in (one, again, two))
        assert (a == b).all()
        assert (a != c).any()
        rows = a.reshape(5, 8) % 8 if part == "order" else a
        assert len({row.tobytes() for row in rows}) == 5
    assert set(to_host(one.signs).reshape(-1)) == {-1, 1}
    assert (numpy.sort(to_host(one.order).reshape(5, 8), 1) == numpy.arange(40).reshape(5, 8)).all()


# ---- a model at θ


def moved(seed=0, d=60, dtype=numpy.float64, zero=False, **how):
    """A tiny model in a subspace, away from its start unless it is `zero`, and its generator."""
    model, rng = tiny(seed, dtype)
    s = subspace(model, d, rng=rng, **how)
    if not zero:
        s.z.data = to_device(drawn(7).standard_normal(s.z.shape), dtype)
        if s.scales is not None:
            s.scales.data = to_device(1 + 0.3 * drawn(8).standard_normal(s.scales.shape), dtype)
    return s, rng


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scales", [False, True])
def test_the_gradient_of_z_and_scales_is_that_of_the_complex_step(kind, scales):
    s, rng = moved(scales=scales, draw=kind)
    ids, labels = (to_device(a) for a in batch(rng))
    _, found = gradients(s, ids, labels)
    assert found.keys() == ({"z", "scales"} if scales else {"z"})
    params = named_params(s)

    def value(arrays):
        for k, a in arrays.items():
            params[k].data = a
        return s.loss(ids, labels)[0]

    assert_gradient(value, {k: params[k].data for k in found}, found, rng, directions=2)


@pytest.mark.parametrize("kind", KINDS)
def test_theta_is_that_of_the_formula_and_z_gets_the_adjoint_of_all_gradients(kind):
    """To the bit, with a model of its own whose weights are all trained."""
    s, rng = moved(scales=True, draw=kind)
    ids, labels = (to_device(a) for a in batch(rng))
    change, back = s.project(s.z.data)
    own, at = replica(s.base), 0
    unfreeze(own)
    for (path, p), c in zip(named_params(own).items(), s.scales.data, strict=True):
        part = change[at : at + p.size].reshape(p.shape)
        p.data = p.data + c * part
        at += p.size
        assert same_bits({"": to_host(p.data)}, {"": to_host(named_params(s.moved()[0])[path].data)})
    assert at == D
    loss, whole = gradients(own, ids, labels)
    ours, found = gradients(s, ids, labels)
    assert float(loss) == float(ours)
    flat = np.concatenate([c * g.reshape(-1) for c, g in zip(s.scales.data, whole.values(), strict=True)])
    assert same_bits({"": to_host(back(flat))}, {"": to_host(found["z"])})


@pytest.mark.parametrize("scales", [False, True])
def test_a_fresh_subspace_is_the_base_and_holds_d_numbers(scales):
    s, rng = moved(zero=True, scales=scales, d=50)
    ids, labels = (to_device(a) for a in batch(rng))
    assert float(s.loss(ids, labels)[0]) == float(s.base.loss(ids, labels)[0])
    assert sum(p.size for p in trained(s).values()) == 50
    assert trained(s).keys() == ({"z", "scales"} if scales else {"z"})
    if scales:
        assert s.scales.size == len(named_params(s.base))
        assert not to_host(gradients(s, ids, labels)[1]["scales"]).any()  # P z is zero


@pytest.mark.parametrize("dtype", [numpy.float32, numpy.float64])
@pytest.mark.parametrize("scales", [False, True])
def test_training_lowers_the_loss_and_leaves_the_base_as_it_was(scales, dtype):
    s, rng = moved(zero=True, scales=scales, dtype=dtype)
    ids, labels = (to_device(a) for a in batch(rng))
    before, loss = stored(s.base), evaluate(s, [(ids, labels)])
    history = train(s, [(ids, labels)] * 20, AdamW(0.1), steps=20, threads=2)
    assert same_bits(before, stored(s.base))
    assert evaluate(s, [(ids, labels)]) < history.loss[-1] < history.loss[0] == pytest.approx(loss)
    assert {str(p.dtype) for p in named_params(s).values()} == {numpy.dtype(dtype).name}
    assert {str(p.dtype) for p in named_params(s.moved()[0]).values()} == {numpy.dtype(dtype).name}
    plain = s.moved()[0]
    assert evaluate(plain, [(ids, labels)]) == evaluate(s, [(ids, labels)])
    assert not trained(plain)
    assert digest(plain) != digest(s.base)


def test_a_replica_shares_P():
    s, _ = moved()
    for kind in KINDS:
        s.project = kind(D, 60, drawn(0), numpy.float64)
        assert replica(s).project is s.project


def test_both_kinds_of_P_train_alike():
    """From the same start, on the same batch, each for several draws: the spread of losses overlaps."""
    losses = {}
    for kind in KINDS:
        for seed in range(3):
            model, rng = tiny(0, numpy.float64)
            ids, labels = (to_device(a) for a in batch(rng))
            s = subspace(model, 200, rng=drawn(seed), draw=kind)
            train(s, [(ids, labels)] * 15, AdamW(0.05), steps=15)
            losses.setdefault(kind, []).append(evaluate(s, [(ids, labels)]))
    one, other = losses.values()
    assert max(min(one), min(other)) < min(max(one), max(other)) < 2.2 < evaluate(model, [(ids, labels)])


@pytest.mark.parametrize(
    ("d", "how"),
    [(0, {}), (D + 1, {}), (2.0, {}), (True, {}), (20, {"scales": True})],
    ids=str,
)  # fmt: skip
def test_a_dimension_that_cannot_be_is_refused(d, how):
    model, rng = tiny()
    assert len(named_params(model)) == 20
    with pytest.raises(ConfigError, match=str(d)):
        subspace(model, d, rng=rng, **how)
    assert all(p.trainable for p in named_params(model).values())
    subspace(model, 21, rng=rng, **how)
    assert not trained(model)


def test_adapters_and_packed_weights_are_refused():
    model, rng = tiny(0, numpy.float32)
    inject(model, LoraConfig(r=2), rng=rng)
    with pytest.raises(StateError, match="has adapters"):
        subspace(model, 9, rng=rng)
    model, rng = tiny(0, numpy.float32)
    quantize(model, block=32)
    with pytest.raises(StateError, match="quantized"):
        subspace(model, 9, rng=rng)


def test_a_life_on_the_device_is_that_on_the_host(request):
    def life():
        numbers = []
        for kind in KINDS:
            s, rng = moved(dtype=numpy.float32, scales=True, draw=kind, zero=True)
            ids, labels = (to_device(a) for a in batch(rng))
            numbers += train(s, [(ids, labels)] * 3, AdamW(0.1), steps=3).loss
            numbers += [evaluate(s, [(ids, labels)]), digest(s)]
        return numbers

    host = life()
    request.getfixturevalue("device")
    assert life() == host

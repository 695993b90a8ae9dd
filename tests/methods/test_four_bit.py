"""Four bits: the published codes, a bound that no value exceeds, and nothing kept that is decoded."""

import copy

import numpy
import pytest
from helpers import dtypes, seeds
from hypothesis import given
from hypothesis import strategies as st
from library import np

from minilora.backend import to_device, to_host
from minilora.errors import InputError, NonFiniteError, StateError
from minilora.layers import Linear
from minilora.methods import four_bit
from minilora.methods.four_bit import (
    BOOKS,
    SCALES,
    Blocks,
    FourBit,
    Scales,
    U,
    book,
    bound,
    decoded,
    dynamic_map,
    encoded,
    gap,
    pairs,
    steps,
)  # fmt: skip
from minilora.ops import saved

NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
]  # fmt: skip
MIDDLES = [  # of bitsandbytes' kernel, dQuantizeNF4
    -0.8480964004993439, -0.6106329262256622, -0.4599952697753906, -0.33967943489551544, -0.23460740596055984,
    -0.13791173323988914, -0.045525018125772476, 0.03979014977812767, 0.1202552504837513, 0.2035212516784668,
    0.2920137718319893, 0.3893125355243683, 0.5016634166240692, 0.6427869200706482, 0.8614784181118011,
]  # fmt: skip
GAPS = {
    "nf4": 1 - 0.6961928009986877,
    "fp4": 1 / 3 + 2 * U,
    "int4": 1 / 7 + 2 * U,
    "int4-affine": 1 / 15 + 2 * U,
}
kinds = st.sampled_from(sorted(BOOKS))
all_dtypes = st.sampled_from([np.float16, np.float32, np.float64])
blocks_of = st.sampled_from([32, 64, 256])
shapes = st.tuples(st.integers(1, 19), st.integers(1, 31))


def host(w):
    return to_host(w).astype(numpy.float64).reshape(-1)


def weights(seed, shape, dtype, size=1.0):
    """Gaussian weights, some of them zero, one row of them small."""
    rng = np.random.default_rng(seed)
    w = rng.standard_normal(shape) * size
    w[rng.random(shape) < 0.1] = 0
    w[0] *= 1e-3
    return w.astype(dtype)


def scales_before(w, blocks):
    """c of each block, in float64, from the weights."""
    w = host(w).astype(numpy.float32).astype(numpy.float64)
    starts = numpy.arange(0, len(w), blocks.block)
    if blocks.least is None:
        return numpy.maximum.reduceat(abs(w), starts)
    return numpy.maximum.reduceat(w, starts) - numpy.minimum.reduceat(w, starts)


def by_hand(w, blocks):
    """`bound`, written anew: one block after another, with gaps that are written down."""
    flat, found = host(w), []
    u16, least16 = 2.0**-11, 2.0**-24  # of float16
    for i, own in enumerate(host(blocks.scales())):
        some = flat[i * blocks.block : (i + 1) * blocks.block].astype(numpy.float32).astype(float)
        low, high = some.min(), some.max()
        affine = blocks.kind == "int4-affine"
        c = high - low if affine else max(high, -low)
        top = max(abs(low), abs(low + c)) if affine else c
        most = c * GAPS[blocks.kind] / 2 + 4 * U * c + abs(own - c) * (1 + U) + 2.0**-149
        most += 3 * U * c + U * top * (1 + U) if affine else 0
        most += U * top if blocks.dtype == numpy.float64 else 0
        most += u16 * (top + most) + least16 if blocks.dtype == numpy.float16 else 0
        found.append(most)
    return numpy.array(found)


def excess(w, blocks):
    """The largest |w - ŵ| relative to its bound."""
    most = numpy.repeat(by_hand(w, blocks), blocks.block)[: blocks.size]
    return (abs(host(w) - host(decoded(blocks))) / most).max()


# ---- the values


def test_the_values_of_nf4_are_the_published_ones_to_the_bit():
    assert book("nf4").dtype == numpy.float32
    assert book("nf4").tobytes() == numpy.float32(NF4).tobytes()
    assert steps("nf4")[0].tobytes() == numpy.float32(MIDDLES).tobytes()
    assert gap("nf4") == float(numpy.float32(NF4[1])) + 1


def test_the_other_values_are_those_of_their_definition():
    assert sorted(set(book("fp4") * 12)) == pytest.approx(
        [-12, -8, -6, -4, -3, -2, -0.0625, 0, 0.0625, 2, 3, 4, 6, 8, 12], rel=4 * U
    )
    assert (book("fp4")[8:] == -book("fp4")[:8]).all()
    assert (book("int4") * 7).tolist() == pytest.approx(list(range(-7, 8)), rel=2 * U)
    assert (book("int4-affine") * 15).tolist() == pytest.approx(list(range(16)), rel=2 * U)
    values = dynamic_map()
    assert len(numpy.unique(values)) == 256
    assert {0.0, 1.0} < set(values.tolist())
    assert set(-values[values < 0]) | {numpy.float32(1)} == set(values[values > 0])


@given(kind=kinds, data=st.data(), n=st.integers(-3, 3), up=st.booleans())
def test_a_tie_goes_down_and_the_next_number_up(kind, data, n, up):
    least = 0 if kind == "int4-affine" else -1
    step = data.draw(st.integers(0, len(steps(kind)[0]) - 1))
    between = steps(kind)[0][step]
    w = numpy.float32([least, 1, numpy.nextafter(between, numpy.float32(1 if up else -1))]) * 2.0**n
    value = host(decoded(encoded(to_device(w), kind, 32, double=False)))[2] / 2.0**n
    low, high = numpy.unique(book(kind))[step : step + 2]
    assert value == (high if up else low)
    w[2] = between * 2.0**n
    assert host(decoded(encoded(to_device(w), kind, 32, double=False)))[2] / 2.0**n == low


# ---- the bound


@given(seed=seeds, shape=shapes, dtype=all_dtypes, kind=kinds, block=blocks_of, double=st.booleans(),
       size=st.sampled_from([1e-30, 1.0, 1e30]))  # fmt: skip
def test_no_weight_is_further_than_its_bound(seed, shape, dtype, kind, block, double, size):
    if dtype == np.float16:
        size = {1e-30: 1e-6, 1.0: 1.0, 1e30: 5e3}[size]
    w = weights(seed, shape, dtype, size)
    before = to_host(w).copy()
    blocks = encoded(w, kind, block, double)
    assert decoded(blocks).dtype == w.dtype
    assert decoded(blocks).shape == w.shape
    assert numpy.isfinite(host(decoded(blocks))).all()
    assert excess(w, blocks) <= 1
    numpy.testing.assert_allclose(bound(blocks, scales_before(w, blocks)), by_hand(w, blocks), rtol=64 * U)
    assert to_host(w).tobytes() == before.tobytes()  # the weight is only read
    if kind == "nf4" and not double and dtype == np.float32:  # the bound is no larger than N9's
        c = scales_before(w, blocks)
        assert (bound(blocks, c) <= c * (0.1519036 + 4 * U) + 2e-45).all()


@given(seed=seeds, kind=kinds, dtype=all_dtypes, n=st.integers(3, 70))
def test_values_beside_the_middles_reach_the_bound_and_no_more(seed, kind, dtype, n):
    rng = numpy.random.default_rng(seed)
    c = dtype(rng.uniform(0.1, 10))
    values = numpy.unique(book(kind)).astype(float)
    i = numpy.diff(values).argmax()
    w = (steps(kind)[0][rng.integers(0, len(steps(kind)[0]), n)] * float(c)).astype(dtype)
    for _ in range(rng.integers(0, 3)):
        w = numpy.nextafter(w, dtype(rng.choice([-1, 1]) * 20))
    w[:2] = c * dtype(values[0]), c
    w[2] = dtype(values[i : i + 2].mean() * float(c))  # in the middle of the largest gap
    blocks = encoded(to_device(w), kind, 128, double=False)
    assert excess(to_device(w), blocks) <= 1
    assert dtype == numpy.float16 or excess(to_device(w), blocks) >= 0.99


@given(
    seed=seeds, kind=kinds, block=blocks_of, double=st.booleans(), at_once=st.integers(1, 3), data=st.data()
)
def test_chunks_change_no_bit(seed, kind, block, double, at_once, data):
    """The last chunk may be shorter, and so may its last block, by an odd number of weights."""
    w = weights(seed, (1, data.draw(st.integers(1, 5 * block))), np.float32)
    whole = encoded(w, kind, block, double)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(four_bit, "CHUNK", at_once * block)
        parts = encoded(w, kind, block, double)
        own = to_host(decoded(parts))
        assert excess(w, parts) <= 1
    assert [to_host(a).tobytes() for a in parts.arrays] == [to_host(a).tobytes() for a in whole.arrays]
    assert own.tobytes() == to_host(decoded(whole)).tobytes()


@given(seed=seeds, kind=kinds, count=st.integers(1, 90), power=st.sampled_from([-100, 0, 126]))
def test_the_offset_is_the_mean_of_the_scales(seed, kind, count, power):
    """Of numbers whose sum need not be finite in float32."""
    w = numpy.random.default_rng(seed).uniform(-1, 1, (count, 32)) * 2.0**power
    one, two = (encoded(to_device(w, np.float32), kind, 32, double) for double in (False, True))
    mean = host(one.absmax).mean()
    assert abs(host(two.absmax.offset)[0] - mean) <= U * mean * (1 + count * 2.0**-29)


@given(seed=seeds, kind=kinds, power=st.integers(-149, -120), block=blocks_of)
def test_subnormal_weights_keep_the_bound(seed, kind, power, block):
    w = (numpy.random.default_rng(seed).integers(-9, 10, (7, 11)) * 2.0**power).astype(numpy.float32)
    blocks = encoded(to_device(w), kind, block, double=False)
    assert excess(to_device(w), blocks) <= 1


@given(seed=seeds, shape=shapes, dtype=dtypes, kind=st.sampled_from(["nf4", "fp4", "int4"]), block=blocks_of)
def test_the_largest_and_zero_return_exactly_and_coding_again_changes_nothing(
    seed, shape, dtype, kind, block
):
    w = weights(seed, shape, np.float32).astype(dtype)
    blocks = encoded(w, kind, block, double=False)
    flat, own = host(w), host(decoded(blocks))
    for start in range(0, len(flat), block):
        some, there = flat[start : start + block], own[start : start + block]
        assert there[abs(some).argmax()] == some[abs(some).argmax()]
        assert (there[some == 0] == 0).all()
    again = encoded(decoded(blocks), kind, block, double=False)
    assert to_host(again.codes).tobytes() == to_host(blocks.codes).tobytes()
    assert to_host(decoded(again)).tobytes() == to_host(decoded(blocks)).tobytes()


@pytest.mark.parametrize("kind", BOOKS)
@pytest.mark.parametrize("double", [False, True])
def test_zeros_stay_zeros(kind, double):
    assert not host(decoded(encoded(np.zeros((3, 50), np.float32), kind, 32, double))).any()


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int4"])
def test_zero_stays_zero_where_its_scale_does_not(kind):
    w = np.ones((9, 32), np.float32)
    w[1:8] = 0
    assert not host(decoded(encoded(w, kind, 32, double=True)))[32 : 8 * 32].any()
    assert host(encoded(w, kind, 32, double=True).scales())[1:8].any()


@given(seed=seeds, count=st.integers(1, 600))
def test_scales_in_8_bits_are_within_half_a_step_of_the_map(seed, count):
    rng = np.random.default_rng(seed)
    w = np.abs(rng.standard_normal((count, 32))).astype(np.float32)
    one, two = (encoded(w, "nf4", 32, double) for double in (False, True))
    c, own, absmax = host(one.absmax), host(two.scales()), host(two.absmax.absmax)
    assert len(absmax) == -(-count // SCALES)
    top = numpy.repeat(absmax, SCALES)[:count]
    steps8 = numpy.diff(dynamic_map().astype(numpy.float64)).max() / 2
    # the nearest of the map, then three roundings: the quotient's, the product's, and the sum's
    assert (abs(c - own) <= top * (steps8 + 4 * U) + 2 * U * c + U * abs(c).max()).all()


def test_the_mean_error_on_gaussian_weights_is_bitsandbytes_own():
    """Their test has a mean absolute error of 0.072798, standard deviation 0.000074 over tensors of 2^20."""
    w = numpy.random.default_rng(0).standard_normal((1024, 1024)).astype(numpy.float32)
    blocks = encoded(to_device(w), "nf4", 64, double=False)
    assert abs(abs(host(decoded(blocks)) - w.reshape(-1)).mean() - 0.072798) <= 7 * 0.000074


# ---- what is stored


def test_two_codes_share_a_byte_the_first_in_its_upper_half():
    w = np.asarray(numpy.float32([[-1, 1, 0.0, -0.7, 0.5]]))
    blocks = encoded(w, "nf4", 32, double=False)
    assert to_host(blocks.codes).tolist() == [0x0F, 0x71, 0xC7]  # the last is filled up with zero
    assert to_host(blocks.absmax).tolist() == [1]
    assert blocks.codes.dtype == np.uint8


@pytest.mark.parametrize(
    ("block", "double", "bits"),
    [(64, False, 4.5), (64, True, 4.126953125), (32, False, 5.0), (4096, False, 4 + 1 / 128)],
)
def test_the_bits_per_weight_are_those_of_the_paper(block, double, bits):
    blocks = encoded(np.ones((1024, 1024), np.float32), "nf4", block, double)
    offset = 32 * double  # the mean, one number
    assert 8 * blocks.nbytes == bits * blocks.size + offset


@pytest.mark.parametrize("kind", BOOKS)
@pytest.mark.parametrize("double", [False, True])
def test_what_is_stored_is_never_written(kind, double):
    """Nor what all weights share; copies share it, too."""
    blocks = encoded(np.ones((4, 40), np.float32), kind, 32, double)
    assert copy.deepcopy(FourBit(blocks)).data is blocks
    shared = [book(kind), *steps(kind), *([blocks.absmax.values] if double else [])]
    decoded(blocks)
    shared.append(pairs(kind, np.ndarray))
    for a in (*blocks.arrays, *shared):
        if isinstance(a, numpy.ndarray):
            with pytest.raises(ValueError, match="read-only"):
                a[...] = 0


@given(seed=seeds, o=st.integers(1, 9), i=st.integers(1, 40), n=st.integers(1, 5))
def test_a_linear_map_computes_with_the_decoded_weight_and_keeps_none(seed, o, i, n):
    rng = np.random.default_rng(seed)
    W, x, dy = (rng.standard_normal(s).astype(np.float32) for s in ((o, i), (n, i), (n, o)))
    weight = FourBit(encoded(W))
    y, back = Linear(weight)(x)
    assert to_host(y).tobytes() == to_host(x @ weight.dense().T).tobytes()
    assert to_host(back(dy)).tobytes() == to_host(dy @ weight.dense()).tobytes()
    kept = saved(back)
    assert not [k for k, a in kept.items() if getattr(a, "shape", ()) in ((o, i), (i, o))]
    assert weight.dense() is not weight.dense()
    assert (weight.shape, weight.size, weight.dtype, weight.packed) == ((o, i), o * i, W.dtype, True)


@pytest.mark.parametrize("act", [
    lambda p: setattr(p, "trainable", True),
    lambda p: setattr(p, "data", p.dense()),
    lambda p: p.add_grad(p.dense()),
])  # fmt: skip
def test_training_it_or_writing_into_it_is_refused(act):
    weight = FourBit(encoded(np.ones((3, 5), np.float32)))
    before = weight.data
    with pytest.raises(StateError, match="4-bit weight"):
        act(weight)
    assert weight.data is before
    assert weight.grad is None
    assert not copy.deepcopy(weight).trainable


# ---- bad input


@pytest.mark.parametrize("block", [0, -64, 63, 16, 96, 8192, 64.0, "64", True, None])
def test_a_block_size_that_is_none_is_refused(block):
    with pytest.raises(InputError, match="expected one of 32, 64"):
        encoded(np.ones((3, 5), np.float32), "nf4", block)


@pytest.mark.parametrize("kind", ["NF4", "nf3", "", None, 4, ["nf4"]])
def test_an_unknown_kind_is_refused_with_the_nearest(kind):
    with pytest.raises(InputError, match="nearest"):
        encoded(np.ones((3, 5), np.float32), kind)


def test_a_weight_without_numbers_is_refused():
    with pytest.raises(InputError, match=r"shape \(0, 5\); expected at least one"):
        encoded(np.ones((0, 5), np.float32))


def test_many_large_weights_have_a_mean():
    w = np.full((16, 64), 1e38, np.float32)
    assert abs(host(decoded(encoded(w))) / 1e38 - 1).max() <= 4 * U


@pytest.mark.parametrize("kind", ["nf4", "int4-affine"])
def test_what_is_not_finite_once_decoded_is_refused(kind):
    """A scale in 8 bits may be larger than the largest weight, 65504 at most in float16."""
    w = numpy.zeros((256, 32), numpy.float16)
    w[:, 0] = [1] * 4 + [65504] * 252
    encoded(to_device(w), kind, 32, double=False)
    with pytest.raises(NonFiniteError, match=f"in {kind} are not finite in float16"):
        encoded(to_device(w), kind, 32, double=True)


def test_a_range_that_is_not_finite_is_told_from_a_weight_that_is_not():
    w = np.asarray(numpy.float32([[-3e38, 3e38]]))
    encoded(w, "nf4")
    with pytest.raises(NonFiniteError, match="a block whose range is not finite in float32"):
        encoded(w, "int4-affine")


@pytest.mark.parametrize("bad", [numpy.nan, numpy.inf, -numpy.inf, 1e300])
@pytest.mark.parametrize("kind", BOOKS)
@pytest.mark.parametrize("at", [0, 40, 149])
def test_a_weight_that_is_not_finite_is_refused(bad, kind, at):
    w = numpy.ones(150)
    w[at] = bad
    with pytest.raises(NonFiniteError, match="values that are not finite in float32"):
        encoded(to_device(w.reshape(3, 50)), kind, 32)


@pytest.mark.parametrize("kind", BOOKS)
@pytest.mark.parametrize("double", [False, True])
def test_a_device_gives_the_same_bits(kind, double, request):
    w = numpy.random.default_rng(3).standard_normal((37, 53)).astype(numpy.float32)

    def stored():
        blocks = encoded(to_device(w), kind, 32, double)
        return [*map(to_host, blocks.arrays), to_host(decoded(blocks))]

    if np is not numpy:
        pytest.skip("compares the stand-in with NumPy")
    here = stored()
    request.getfixturevalue("device")
    assert [a.tobytes() for a in here] == [a.tobytes() for a in stored()]


def test_blocks_say_what_they_hold():
    blocks = encoded(np.ones((3, 5), np.float64))
    assert isinstance(blocks, Blocks)
    assert isinstance(blocks.absmax, Scales)
    assert (blocks.shape, blocks.size, blocks.kind, blocks.block) == ((3, 5), 15, "nf4", 64)

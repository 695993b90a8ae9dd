"""The network is causal, cached decoding is the full forward, sampling keeps to its limits."""

import math
import tracemalloc
from dataclasses import asdict

import numpy
import pytest
from helpers import (
    EVERYTHING,
    NORMS,
    SIZES,
    N,
    T,
    assert_precision_scales,
    batch,
    dtypes,
    flags,
    gradients,
    same_bits,
    seeds,
    tiny,
    tiny_lora,
)  # fmt: skip
from hypothesis import given, settings
from hypothesis import strategies as st
from library import np

from minilora import decoding
from minilora.adapters import disabled
from minilora.backend import to_device, to_host
from minilora.decoding import generate, past_of, sample
from minilora.errors import ConfigError, InputError, StateError
from minilora.formats.huggingface import load
from minilora.layers import Need
from minilora.lora import inject, merge
from minilora.methods.lora_config import LoraConfig
from minilora.model import Block, Config, RopeScaling, blank, llama
from minilora.ops import rope_frequencies, rope_tables, saved
from minilora.optim import AdamW
from minilora.tree import digest, freeze, named_params, trained

V = SIZES["vocab_size"]
few = settings(max_examples=12)


@few
@given(seed=seeds, flags=flags, dtype=dtypes, j=st.integers(1, T - 1))
def test_a_later_token_never_changes_an_earlier_logit(seed, flags, dtype, j):
    model, rng = tiny_lora(seed, dtype, **flags)
    ids, _ = batch(rng)
    other = ids.copy()
    other[:, j:] = rng.integers(0, V, other[:, j:].shape)
    assert np.array_equal(model(ids)[0][:, :j], model(other)[0][:, :j])


@few
@given(seed=seeds, flags=flags, dtype=dtypes)
def test_a_token_read_only_by_ignored_labels_changes_nothing(seed, flags, dtype):
    model, rng = tiny_lora(seed, dtype, **flags)
    ids, labels = batch(rng)
    labels[:, -1] = -100  # so the last token is read by no label that counts
    other = ids.copy()
    other[:, -1] = ids[:, 0]
    a, b = gradients(model, ids, labels), gradients(model, other, labels)
    assert a[0] == b[0]
    # but a table's gradient is summed in the order of the ids
    assert same_bits(*({k: g for k, g in x[1].items() if "embed" not in k} for x in (a, b)))


@few
@given(seed=seeds, flags=flags, dtype=dtypes)
def test_with_all_labels_ignored_loss_and_gradients_are_zero(seed, flags, dtype):
    model, rng = tiny_lora(seed, dtype, **flags)
    ids, labels = batch(rng, ignored=1.0)
    labels[0, 0] = -100
    loss, g = gradients(model, ids, labels)
    assert loss == 0
    assert g
    assert not any(a.any() for a in g.values())


@few
@given(seed=seeds, flags=flags, cuts=st.sets(st.integers(1, T - 1)))
def test_cached_decoding_matches_the_full_forward(seed, flags, cuts):
    def both(dtype):
        model, rng = tiny_lora(seed, dtype, **flags)
        ids, _ = batch(rng)
        past, ends = past_of(model, N, T), [*sorted(cuts), T]
        spans = zip([0, *ends], ends, strict=False)
        parts = [model.forward(to_device(ids[:, a:b]), past=past)[0] for a, b in spans]
        return np.concatenate(parts, 1), model(ids)[0][:, [end - 1 for end in ends]]

    assert_precision_scales(both)


@few
@given(seed=seeds, flags=flags, dtype=dtypes, S=st.integers(4, 16))
def test_the_kv_cache_is_allocated_once_in_the_stated_size(seed, flags, dtype, S):
    model, rng = tiny(seed, dtype, num_hidden_layers=3, **flags)  # not as many as key/value heads
    past, c = past_of(model, N, S), model.config
    arrays = [a for cache in past.caches for a in (cache.k, cache.v)]
    L, H, G, E = c.num_hidden_layers, c.num_attention_heads, c.num_key_value_heads, c.E
    assert sum(a.size for a in arrays) == 2 * L * N * G * S * E
    assert sum(a.size for a in past.tables) == 2 * S * H * E
    assert {a.dtype for a in (*arrays, *past.tables)} == {np.dtype(dtype)}
    for t in (3, *[1] * (S - 3)):
        logits, _ = model.forward(to_device(rng.integers(0, V, (N, t))), past=past)
        assert logits.shape == (N, 1, V)
    assert all(a is b for a, b in zip(arrays, (a for c in past.caches for a in (c.k, c.v)), strict=True))
    assert all(cache.seen == S for cache in past.caches)


def test_generate_allocates_no_longer_a_cache_than_needed(monkeypatch):
    model, rng = tiny()
    made = []
    monkeypatch.setattr(
        decoding, "past_of", lambda m, N, S: made.append((past_of(m, N, S), S)) or made[-1][0]
    )
    assert len(list(generate(model, GOOD, 5, rng=rng))) == 5
    ((past, S),) = made
    assert past.caches[0].seen == S == 3 + 5 - 1  # the last token is not read


@few
@given(seed=seeds, flags=flags, merged=st.booleans())
def test_greedy_decoding_matches_the_full_forward_in_every_greedy_setting(seed, flags, merged):
    model, rng = tiny_lora(seed, np.float64, **flags)
    prompt = rng.integers(0, V, (3, 4))
    if merged:
        merge(model)
    ids = prompt
    for _ in range(6):
        ids = np.concatenate([ids, model(ids)[0][:, -1].argmax(-1)[:, None]], 1)
    for how in ({"temperature": 0.0}, {"top_k": 1}, {"top_p": 1e-9}, {"temperature": 0, "top_k": 3}):
        text = numpy.stack(list(generate(model, prompt, 6, rng=rng, **how)), 1)
        assert numpy.array_equal(text, to_host(ids[:, 4:])), how


@few
@given(seed=seeds, dtype=dtypes, flags=flags,
       kind=st.sampled_from([None, {}, {"dora": True}, {"dropout": 0.5}]))  # fmt: skip
def test_every_result_keeps_the_dtype(seed, dtype, flags, kind):
    model, rng = tiny(seed, dtype, **flags)
    if kind is not None:
        targets = EVERYTHING if not kind else "all-linear"
        inject(model, LoraConfig(r=3, targets=targets, modules_to_save=NORMS, **kind), rng=rng)
    ids, labels = batch(rng)
    arrays = [model(ids)[0]]
    loss, back = model.loss(ids, labels, train=True)
    arrays += [loss, *(a for a in saved(back).values() if a.dtype.kind == "f")]
    back()
    arrays += [p.grad for p in trained(model).values()]
    optimizer = AdamW(weight_decay=0.1, clip=1e-3)
    optimizer.step(trained(model))
    arrays += [*optimizer.state().values(), *(p.data for p in named_params(model).values())]
    if kind is not None:
        merge(model)
        arrays += [model(ids)[0], *(p.data for p in named_params(model).values())]
    assert {a.dtype for a in arrays} == {np.dtype(dtype)}


def test_activations_are_freed_after_the_backward():
    model, rng = tiny_lora()
    _, back = model.loss(*batch(rng), train=True)
    before = sum(a.size for a in saved(back).values())
    back()
    after = sum(a.size for a in saved(back).values())
    model.model.layers = []
    _, back = model.loss(*batch(rng), train=True)
    assert after <= sum(a.size for a in saved(back).values()) < before  # what head and loss hold, at most


@pytest.mark.parametrize("L", [1, 3])
def test_fresh_matrices_have_the_documented_standard_deviation(L):
    """No two of V, D, F, H·E and G·E are alike, so that no other axis gives the same number."""
    V, D, F = 70, 48, 85
    config = Config(V, D, F, L, num_attention_heads=6, num_key_value_heads=2, head_dim=10,
                    tie_word_embeddings=False)  # fmt: skip
    params = named_params(llama(config, np.random.default_rng(L)))
    matrices = {path: to_host(p.data) for path, p in params.items() if p.data.ndim == 2}
    assert len(matrices) == 2 + 7 * L
    inputs = {"o_proj": 60, "down_proj": F}  # of all others D
    for path, W in matrices.items():
        kind = path.split(".")[-2]
        std = 1 / math.sqrt(inputs.get(kind, D) * (2 * L if kind in inputs else 1))
        # of n normal draws the deviation is within 6 std / sqrt(2 n), the mean within 6 std / sqrt(n)
        assert abs(W.std() - std) <= 6 * std / math.sqrt(2 * W.size), path
        assert abs(W.mean()) <= 6 * std / math.sqrt(W.size), path
        assert abs(W).max() > 2.5 * std, path  # and they are normal: of 960 draws 12 lie beyond
    assert len({W[0, 0].item() for W in matrices.values()}) == len(matrices)  # no two are one draw


@given(seed=seeds)
def test_a_fresh_model_starts_near_the_uniform_guess(seed):
    model = llama(Config(), np.random.default_rng(seed))
    ids = np.random.default_rng(seed).integers(0, 128, (2, 16))
    labels = np.roll(ids, 1, 1)
    # logits of variance 1 cost 1/2 nat above log V; the mean of 32 of them has a deviation below 0.3
    assert abs(model.loss(ids, labels)[0] - math.log(128) - 0.5) <= 6 * 0.3


# ---- stretched positions

STRETCHES = st.builds(
    lambda factor, low, span, L: RopeScaling(factor, low, low * span, L),
    st.floats(1, 64), st.floats(0.25, 4), st.floats(1.1, 8), st.integers(1, 10_000),
)  # fmt: skip


def stretched(inverse, s):
    """A frequency after stretching, from the definition by its wavelength w."""
    L, w = s.original_max_position_embeddings, 2 * math.pi / inverse
    if w < L / s.high_freq_factor:
        return inverse
    if w > L / s.low_freq_factor:
        return inverse / s.factor
    t = (L / w - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
    return (1 - t) * inverse / s.factor + t * inverse


@given(scaling=STRETCHES, half=st.integers(1, 40), theta=st.floats(1.5, 1e6))
def test_rope_scaling_stretches_slow_frequencies_as_defined(scaling, half, theta):
    inverse = rope_frequencies(2 * half, theta)
    found = to_host(scaling(inverse))
    want = numpy.array([stretched(f, scaling) for f in to_host(inverse).tolist()])
    # t has an error of 4 u times numbers of up to 8 low, over a span of at least 0.1 low
    assert (numpy.abs(found - want) <= 400 * 2.0**-53 * to_host(inverse)).all()
    assert (found <= to_host(inverse) * (1 + 2.0**-50)).all()
    assert (found * scaling.factor >= to_host(inverse) * (1 - 2.0**-50)).all()


@few
@given(scaling=STRETCHES, dtype=dtypes, positions=st.integers(1, 16))
def test_the_model_uses_the_stretched_frequencies(scaling, dtype, positions):
    model, rng = tiny(0, dtype, rope_scaling=scaling)
    c = model.config
    inverse = [stretched(f, scaling) for f in to_host(rope_frequencies(c.E, c.rope_theta)).tolist()]
    want = rope_tables(np.arange(positions), c.num_attention_heads, np.array(inverse), dtype)
    for table, wanted in zip(model.tables(positions, dtype), want, strict=True):
        assert table.dtype == np.dtype(dtype)
        assert np.allclose(table, wanted, rtol=0, atol=1e-12 if dtype == np.float64 else 1e-6)
    ids, _ = batch(rng)
    past = past_of(model, N, T)
    parts = [model.forward(to_device(ids[:, j : j + 1]), past=past)[0] for j in range(T)]
    assert np.allclose(np.concatenate(parts, 1), model(ids)[0], rtol=0, atol=1e-3)


def test_rope_scaling_changes_the_logits():
    ids, _ = batch(np.random.default_rng(0))
    plain, far = (tiny(0, rope_scaling=s)[0](ids)[0] for s in (None, RopeScaling(8.0, 1.0, 4.0, 8)))
    assert np.array_equal(plain[:, 0], far[:, 0])
    assert not np.allclose(plain, far)


@pytest.mark.parametrize(
    "bad",
    [{"factor": 0.5}, {"factor": math.nan}, {"factor": math.inf}, {"factor": "8"}, {"factor": True},
     {"factor": None}, {"low_freq_factor": 0}, {"low_freq_factor": -1.0}, {"low_freq_factor": "1"},
     {"high_freq_factor": 1.0}, {"high_freq_factor": 0.5}, {"high_freq_factor": math.inf},
     {"low_freq_factor": 4.0}, {"original_max_position_embeddings": 0},
     {"original_max_position_embeddings": 24.0}, {"original_max_position_embeddings": None},
     {"rope_type": "linear"}, {"rope_type": None}],
    ids=repr,
)  # fmt: skip
def test_an_invalid_rope_scaling_is_refused(bad):
    good = asdict(RopeScaling(8.0, 1.0, 4.0, 24))
    with pytest.raises(ConfigError) as e:
        RopeScaling(**good | bad)
    assert len(str(e.value).splitlines()) == 1
    with pytest.raises(ConfigError, match="rope_scaling is"):
        Config(**SIZES, rope_scaling=good)


# ---- a model to be filled


@few
@given(flags=flags, dtype=dtypes)
def test_a_blank_model_has_the_shapes_of_a_fresh_one(flags, dtype):
    config = Config(**SIZES | flags)
    found = named_params(blank(config, dtype))
    fresh = named_params(llama(config, np.random.default_rng(0), dtype))
    assert list(found) == list(fresh)
    for name, p in fresh.items():
        assert (found[name].data.shape, found[name].data.dtype) == (p.data.shape, p.data.dtype), name


def test_a_blank_model_allocates_no_weights():
    config = Config(10**7, 10**4, 10**5, 4, num_attention_heads=10, num_key_value_heads=2)
    tracemalloc.start()
    model = blank(config)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert sum(math.prod(p.data.shape) for p in named_params(model).values()) > 10**11
    assert most < 10**6  # nine norms of 10,000 float32


# ---- sampling, which is done on the host


@settings(max_examples=20)
@given(seed=seeds, temperature=st.sampled_from([0.5, 1.0, 2.0]), top_k=st.sampled_from([None, 1, 3, 50]),
       top_p=st.sampled_from([0.3, 0.8, 1.0]))  # fmt: skip
def test_a_sample_follows_the_truncated_distribution(seed, temperature, top_k, top_p):
    rng = numpy.random.default_rng(seed)
    logits, draws = rng.standard_normal(V), 4000
    p = numpy.exp(logits / temperature)
    order = numpy.argsort(-p)
    p[order[top_k or V :]] = 0
    p /= p.sum()
    enough = int((numpy.cumsum(p[order]) < top_p).sum()) + 1  # the fewest that hold the share
    p[order[enough:]] = 0
    p /= p.sum()
    found = sample(numpy.tile(logits, (draws, 1)), rng, temperature, top_k, top_p)
    counts = numpy.bincount(found, minlength=V)
    # 6 standard deviations of a binomial count, and 6 for the discreteness of small ones
    assert (numpy.abs(counts - draws * p) <= 6 * numpy.sqrt(draws * p * (1 - p)) + 6 * (p > 0)).all()


def test_rows_are_sampled_independently_and_impossible_tokens_never():
    logits, token = numpy.full((1000, V), -math.inf), numpy.arange(1000) % V
    logits[numpy.arange(1000), token] = 0
    assert numpy.array_equal(sample(logits, numpy.random.default_rng(0), 1.0, None, 1.0), token)


# ---- bad input from the host: refused before any arithmetic

GOOD = numpy.zeros((2, 3), int)
IDS = [
    (numpy.array([[0, V]]), f"{V}; expected 0 to {V - 1}"), (numpy.array([[0, -1]]), "-1"),
    (GOOD.astype(float), "float64"),
    (GOOD.astype(bool), "bool"), (GOOD.astype(object), "object"), ([[1, 2], [3]], "ragged"),
    (GOOD[0], "(3,)"), (GOOD[None], "(1, 2, 3)"), (numpy.zeros((1, 17), int), "17 tokens"),
    (numpy.zeros((2, 0), int), "(2, 0)"), (numpy.zeros((0, 3), int), "(0, 3)"), (None, "object"),
    ("text", "dtype"), (numpy.array(["a"]), "dtype"),
    (numpy.array([[2**63]], numpy.uint64), str(2**63)),
]  # fmt: skip


@pytest.mark.parametrize(("ids", "says"), IDS, ids=lambda v: repr(v)[:30])
def test_invalid_token_ids_are_refused(ids, says):
    model, rng = tiny_lora()
    before = digest(model)
    for call in (
        lambda: model(ids), lambda: model(ids, train=True), lambda: generate(model, ids, 1, rng=rng),
        lambda: model.loss(ids, ids),
    ):  # fmt: skip
        with pytest.raises(InputError) as e:
            call()
        assert len(str(e.value).splitlines()) == 1
    with pytest.raises(InputError) as e:
        model(ids)
    assert says in str(e.value)
    assert digest(model) == before


@pytest.mark.parametrize(
    ("labels", "says"),
    [(GOOD[:1], "(1, 3)"), (GOOD.T, "(3, 2)"), (GOOD + V, str(V)), (GOOD - 1, "-1"), (GOOD - 99, "-99"),
     (GOOD.astype(float), "float64"), ([[1], [1, 2]], "ragged")],
    ids=str,
)  # fmt: skip
def test_labels_that_do_not_fit_are_refused(labels, says):
    with pytest.raises(InputError) as e:
        tiny()[0].loss(GOOD, labels)
    assert says in str(e.value)


@pytest.mark.parametrize(
    "bad",
    [{"max_new_tokens": 0}, {"max_new_tokens": -1}, {"max_new_tokens": 2.0}, {"max_new_tokens": True},
     {"max_new_tokens": 14}, {"temperature": -0.1}, {"temperature": math.nan}, {"temperature": math.inf},
     {"top_k": 0}, {"top_k": -1}, {"top_k": 1.0}, {"top_k": True}, {"top_p": 0}, {"top_p": -0.1},
     {"top_p": 1.1}, {"top_p": math.nan}, {"temperature": "1"}, {"top_p": "1"},
     {"temperature": None}, {"top_p": None}],
    ids=repr,
)  # fmt: skip
def test_invalid_settings_of_generate_are_refused_by_the_call(bad):
    model, rng = tiny()
    with pytest.raises(InputError) as e:  # by the call, not by the first token
        generate(model, GOOD, **{"max_new_tokens": 2, "rng": rng} | bad)
    assert str(next(iter(bad.values()))) in str(e.value)


@pytest.mark.parametrize(
    "bad",
    [*({name: v} for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                              "num_attention_heads", "num_key_value_heads", "max_position_embeddings")
       for v in (0, -1, 2.0, True, None, "8")),
     {"num_key_value_heads": 4}, {"head_dim": 5}, {"head_dim": 0}, {"head_dim": -2}, {"head_dim": 4.0},
     {"head_dim": None, "hidden_size": 13}, {"head_dim": None, "hidden_size": 18}, {"rms_norm_eps": 0},
     {"rms_norm_eps": math.nan}, {"rms_norm_eps": "1e-5"}, {"rope_theta": 0}, {"rope_theta": math.inf},
     *({flag: "false"} for flag in ("tie_word_embeddings", "attention_bias", "mlp_bias"))],
    ids=repr,
)  # fmt: skip
def test_an_invalid_model_shape_is_refused(bad):
    with pytest.raises(ConfigError) as e:
        Config(**SIZES | bad)
    assert len(str(e.value).splitlines()) == 1


def test_a_disabled_adapter_gives_exactly_the_base():
    model, rng = tiny_lora(0)
    ids, _ = batch(rng)
    base = tiny(0)[0](ids)[0]
    with disabled(model):
        assert np.array_equal(model(ids)[0], base)
    assert not np.allclose(model(ids)[0], base)


def test_without_truncation_every_token_can_be_sampled():
    found = sample(numpy.zeros((4000, 5)), numpy.random.default_rng(0), 1.0, None, 1.0)
    assert set(found.tolist()) == set(range(5))  # one of five is missed with probability 5 (4/5)^4000


def test_the_default_config_is_the_one_of_the_shipped_base():
    assert Config() == load().config


@pytest.mark.parametrize("first", range(3))
def test_dx_is_computed_only_where_something_below_is_trained(first, monkeypatch):
    """A block is asked for dx from the first one on below which something is trained."""
    model, rng = tiny(0, num_hidden_layers=3)
    freeze(model, keep=lambda path: path.startswith(f"model.layers.{first}.mlp"))
    asked, call = [], Block.__call__

    def spy(block, x, turn, need, *how):
        asked.append(need is Need.ALL)
        return call(block, x, turn, need, *how)

    monkeypatch.setattr(Block, "__call__", spy)
    model.loss(*batch(rng), train=True)
    assert asked == [i > first for i in range(3)]


def test_without_train_there_is_no_backward():
    model, rng = tiny_lora(0)
    ids, labels = batch(rng)
    for back, dy in ((model(ids)[1], model(ids)[0]), (model.loss(ids, labels)[1], 1.0)):
        with pytest.raises(StateError):
            back(dy)

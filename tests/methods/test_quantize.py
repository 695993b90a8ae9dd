"""A quantized base: LoRA on it is LoRA on the decoded base to the bit, and its 4-bit weights never change."""

import copy
import tracemalloc

import numpy
import pytest
from helpers import LINEARS, SIZES, assert_precision_scales, batch, gradients, same_bits, stored, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from library import np
from test_four_bit import excess

from minilora.backend import to_device, to_host
from minilora.decoding import generate
from minilora.errors import InputError, MiniloraError, NonFiniteError, StateError
from minilora.fast.folded import places
from minilora.fast.recompute import HOW
from minilora.layers import Param
from minilora.lora import fuse, inject, merge, merged_layers, unmerge
from minilora.methods import four_bit
from minilora.methods.four_bit import BOOKS, FourBit, U, encoded, gap
from minilora.methods.lora_config import LoraConfig
from minilora.methods.quantize import quantize
from minilora.model import Config, llama
from minilora.ops import saved
from minilora.optim import AdamW
from minilora.peft.loading import base_print, load_adapter, save_adapter
from minilora.training import evaluate, train
from minilora.tree import digest, freeze, get, named_params, outline, replica, size, trained, unfreeze, unpack

KINDS = {
    "lora": LoraConfig(r=3, alpha=7, init="both"),
    "dropout": LoraConfig(r=3, alpha=7, init="both", dropout=0.3),
    "dora": LoraConfig(r=3, alpha=7, init="both", dora=True),
    "rslora": LoraConfig(r=3, alpha=7, targets=["q_proj", "down_proj"], init="both", rslora=True),
    "biases": LoraConfig(r=3, alpha=7, init="both", bias="all"),
    "head": LoraConfig(r=3, alpha=7, targets=LINEARS, init="both"),
    "saved": LoraConfig(r=3, alpha=7, init="both", targets=["q_proj"], modules_to_save=["norm", "v_proj"]),
}
MAPS = 7  # in a block


def quantized(seed=0, dtype=np.float32, kind="nf4", block=32, double=True, **how):
    model, rng = tiny(seed, dtype, attention_bias=True, **how)
    freeze(model)
    return model, rng, quantize(model, kind=kind, block=block, double=double)


def decoded(model):
    """The same model with every 4-bit weight decoded."""
    copied = copy.deepcopy(model)
    unpack(copied)
    return copied


@pytest.mark.parametrize("tie", [False, True])
def test_the_maps_of_the_blocks_are_quantized_and_nothing_else(tie):
    model, _ = tiny(0, np.float32, tie_word_embeddings=tie, attention_bias=True)
    before = copy.deepcopy(model)
    report = quantize(model, block=32)
    packed = [path for path, p in named_params(model).items() if p.packed]
    assert packed == [f"{row.module}.weight" for row in report.rows]
    assert len(packed) == MAPS * model.config.num_hidden_layers
    assert all("layers." in path and path.endswith("_proj.weight") for path in packed)
    rest = [path for path in named_params(model) if path not in packed]
    assert same_bits(*({path: to_host(named_params(m)[path].data) for path in rest} for m in (before, model)))
    assert size(model) == size(before)
    assert outline(model).replace(" *", "") == outline(before).replace(" *", "").replace(
        f"{size(trained(before)):,} trained", f"{size(trained(model)):,} trained"
    )
    for path in packed:
        assert named_params(model)[path].shape == named_params(before)[path].shape


@given(kind=st.sampled_from(sorted(BOOKS)), block=st.sampled_from([32, 64]), double=st.booleans(),
       seed=st.integers(0, 99))  # fmt: skip
@settings(max_examples=8)
def test_the_report_says_what_is_stored_and_lost(kind, block, double, seed):
    model, _ = tiny(seed, np.float32)
    before = copy.deepcopy(model)
    report = quantize(model, kind=kind, block=block, double=double)
    bits = lost = whole = count = 0
    for row in report.rows:
        W, p = to_host(get(before, row.module).weight.data), get(model, row.module).weight
        own = to_host(p.dense())
        held = 8 * sum(a.nbytes for a in p.data.arrays)
        error = numpy.linalg.norm(W.astype(numpy.float64) - own)
        assert row.shape == W.shape
        assert row.bits == held / W.size
        assert row.error == pytest.approx(error / numpy.linalg.norm(W.astype(numpy.float64)), rel=1e-9)
        assert row.reached == pytest.approx(excess(W, p.data), rel=32 * U)  # the gap of rounded values
        assert row.reached <= 1
        bits, count = bits + held, count + W.size
        lost, whole = lost + error**2, whole + (W.astype(numpy.float64) ** 2).sum()
    assert report.bits == pytest.approx(bits / count, rel=1e-12)
    assert report.error == pytest.approx((lost / whole) ** 0.5, rel=1e-9)
    rest = sum(8 * p.data.nbytes for p in named_params(model).values() if not p.packed)
    assert report.all_bits == pytest.approx((bits + rest) / size(model), rel=1e-12)
    assert f"{report.bits:.4f} bits per weight" in str(report)
    assert report.data()["rows"][0]["module"] == report.rows[0].module


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_are_those_of_the_decoded_base_to_the_bit(kind):
    model, rng, _ = quantized()
    inject(model, KINDS[kind], rng=rng)
    ids, labels = batch(rng)
    plain, before = decoded(model), stored(model)
    (loss, found), (own, expected) = gradients(model, ids, labels), gradients(plain, ids, labels)
    assert set(found) == set(expected)
    assert float(loss) == float(own)  # the copy has a generator of its own, in the same state
    assert same_bits(*({k: to_host(g) for k, g in some.items()} for some in (found, expected)))
    assert not any(".base.weight" in path for path in found)
    assert same_bits(before, stored(model))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("kind", ["lora", "biases", "saved"])
def test_training_changes_the_adapter_and_not_one_stored_bit(kind, threads):
    model, rng, _ = quantized()
    inject(model, KINDS[kind], rng=rng)
    before, adapter = stored(model), {k: to_host(p.data).copy() for k, p in trained(model).items()}
    pair = batch(rng)
    history = train(model, [pair] * 5, AdamW(1e-2), steps=5, threads=threads)
    assert history.loss[-1] < history.loss[0]
    assert same_bits(before, stored(model))
    assert not same_bits(adapter, {k: to_host(p.data) for k, p in trained(model).items()})


@pytest.mark.parametrize("kind", [*KINDS, "detach"])
def test_no_decoded_weight_outlives_its_product(kind):
    """No closure holds an array of a weight's shape."""
    model, rng, _ = quantized()
    inject(model, KINDS.get(kind, LoraConfig(r=3, init="both", dora=True, detach=True)), rng=rng)
    ids, labels = batch(rng)
    _, back = model.loss(ids, labels, train=True)
    shapes = {p.shape for p in named_params(model).values() if p.packed}
    kept = [a.shape for a in saved(back).values() if hasattr(a, "shape")]
    assert kept
    assert not shapes & ({*kept} | {s[::-1] for s in kept})


def test_a_quantized_base_is_never_folded():
    model, rng, _ = quantized()
    inject(model, KINDS["lora"], rng=rng)
    assert places(model) == []
    plain = decoded(model)
    assert len(places(plain)) == MAPS * model.config.num_hidden_layers
    get(plain, "model.layers.0.self_attn.q_proj").base.weight = FourBit(
        get(model, "model.layers.0.self_attn.q_proj").base.weight.data
    )
    assert len(places(plain)) == MAPS * model.config.num_hidden_layers - 1


def test_recomputing_a_quantized_base_gives_the_same_bits():
    found = []
    for how in (None, *HOW):
        model, rng, _ = quantized()
        inject(model, KINDS["lora"], rng=rng)
        train(model, [batch(rng)] * 2, AdamW(1e-2), steps=2, recompute=how)
        found.append({k: to_host(p.data) for k, p in trained(model).items()})
    assert all(same_bits(found[0], other) for other in found[1:])


def test_a_replica_shares_the_codes_and_not_the_gradients():
    model, rng, _ = quantized()
    inject(model, KINDS["lora"], rng=rng)
    other = replica(model)
    mine, its = named_params(model), named_params(other)
    assert mine.keys() == its.keys()
    for path, p in mine.items():
        assert its[path] is not p
        assert its[path].data is p.data
        assert (its[path].trainable, its[path].packed) == (p.trainable, p.packed)
    path, p = next(iter(trained(model).items()))
    p.grad = p.data
    assert its[path].grad is None
    assert next(iter(trained(replica(model)).values())).grad is None


@pytest.mark.parametrize("kind", KINDS)
def test_merging_leaves_the_codes_and_unmerging_restores_the_model(kind):
    model, rng, _ = quantized()
    inject(model, KINDS[kind], rng=rng)
    ids = batch(rng)[0]
    before, y = stored(model), to_host(model(ids)[0])
    plain = merged_layers(decoded(model))
    merge(model)
    assert same_bits(before, stored(model))
    for path, layer in merged_layers(model).items():
        assert to_host(layer.weight.dense()).tobytes() == to_host(plain[path].weight.dense()).tobytes()
    unmerge(model)
    assert to_host(model(ids)[0]).tobytes() == y.tobytes()
    fuse(model)
    assert not [1 for p in named_params(model).values() if p.trainable]


@pytest.mark.parametrize("kind", KINDS)
def test_fusing_a_quantized_model_only_rounds(kind):
    def both(dtype):
        model, rng, _ = quantized(dtype=dtype)
        inject(model, KINDS[kind], rng=rng)
        ids = batch(rng)[0]
        y = model(ids)[0]
        fuse(model)
        return y, model(ids)[0]

    assert_precision_scales(both)


def test_a_quantized_model_measures_and_writes_text():
    model, rng, _ = quantized()
    plain = decoded(model)
    pair = batch(rng)
    assert evaluate(model, [pair]) == evaluate(plain, [pair])
    one, two = (list(generate(m, pair[0], 4, rng=numpy.random.default_rng(1))) for m in (model, plain))
    assert [to_host(a).tolist() for a in one] == [to_host(a).tolist() for a in two]
    assert digest(model) == digest(plain)


def test_quantizing_beneath_an_adapter_is_the_same_as_before_it():
    model, *_ = quantized(3)
    inject(model, KINDS["lora"], rng=numpy.random.default_rng(5))
    other, _ = tiny(3, np.float32, attention_bias=True)
    inject(other, KINDS["lora"], rng=numpy.random.default_rng(5))
    quantize(other, block=32)
    assert digest(model) == digest(other)
    assert trained(model).keys() == trained(other).keys()


def test_a_copy_trained_in_full_is_dense_and_starts_at_the_decoded_weight():
    model, rng, _ = quantized()
    path = "model.layers.1.self_attn.v_proj"
    W = to_host(get(model, path).weight.dense())
    inject(model, KINDS["saved"], rng=rng)
    copied = get(model, path).adapters["default"].layer.weight
    assert not copied.packed
    assert copied.trainable
    assert to_host(copied.data).tobytes() == W.tobytes()


@pytest.mark.parametrize("act", [unfreeze, lambda m: freeze(m, keep=lambda path: True)])
def test_training_quantized_weights_is_refused_by_name_and_changes_nothing(act):
    model, _, _ = quantized()
    states = [(p.data, p.trainable) for p in named_params(model).values()]
    with pytest.raises(StateError, match=r"model\.layers\.0\.self_attn\.q_proj\.weight is quantized"):
        act(model)
    assert all(
        p.data is a and p.trainable is t
        for p, (a, t) in zip(named_params(model).values(), states, strict=True)
    )
    freeze(model, keep=lambda path: path == "model.norm.weight")
    assert list(trained(model)) == ["model.norm.weight"]


def bad_weight(model):
    get(model, "model.layers.1.mlp.up_proj").weight = Param(np.full((15, 10), np.nan, np.float32), False)


def merged(model):
    inject(model, KINDS["lora"], rng=numpy.random.default_rng(0))
    merge(model)


@pytest.mark.parametrize(("spoil", "how", "error", "says"), [
    (bad_weight, {}, NonFiniteError, "model.layers.1.mlp.up_proj: .*nothing was quantized"),
    (lambda m: None, {"block": 48}, InputError, "block is 48"),
    (lambda m: None, {"kind": "nf5"}, InputError, "kind is 'nf5'"),
    (lambda m: None, {"kind": ["nf4"]}, InputError, "kind is .'nf4'."),
    (merged, {}, StateError, "unmerge it first"),
    (lambda m: quantize(m), {}, StateError, "q_proj.weight is quantized already"),
])  # fmt: skip
def test_an_error_leaves_the_model_as_it_was(spoil, how, error, says):
    model, _ = tiny(0, np.float32)
    freeze(model)
    spoil(model)
    before = {path: p.data for path, p in named_params(model).items()}
    with pytest.raises(error, match=says):
        quantize(model, **how)
    assert all(named_params(model)[path].data is a for path, a in before.items())


@pytest.mark.parametrize("act", [base_print, digest])
def test_a_fingerprint_decodes_one_weight_at_a_time(act):
    """Two decoded weights are alive at most, beside what the widest of them needs to be hashed."""
    config = Config(**(SIZES | {"hidden_size": 96, "intermediate_size": 128, "num_hidden_layers": 8}))
    model = llama(config, numpy.random.default_rng(0))
    freeze(model)
    quantize(model)
    act(model)  # what is cached
    largest = max(4 * p.size for p in named_params(model).values())
    dense = sum(4 * p.size for p in named_params(model).values() if p.packed)
    tracemalloc.start()
    act(model)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert 8 * largest < dense
    assert largest < peak < 4 * largest + 8 * four_bit.CHUNK


def test_an_adapter_of_a_quantized_base_is_saved_and_loaded(tmp_path):
    model, rng, _ = quantized()
    inject(model, KINDS["lora"], rng=rng)
    save_adapter(model, tmp_path / "a")
    other, _, _ = quantized()
    load_adapter(other, tmp_path / "a")
    ids = batch(rng)[0]
    assert to_host(other(ids)[0]).tobytes() == to_host(model(ids)[0]).tobytes()
    float_base, _ = tiny(0, np.float32, attention_bias=True)
    with pytest.raises(MiniloraError, match="another base"):  # unless told so
        load_adapter(float_base, tmp_path / "a")
    load_adapter(float_base, tmp_path / "a", force=True)


@given(seed=st.integers(0, 99), kind=st.sampled_from(["nf4", "fp4", "int4"]))
@settings(max_examples=6)
def test_a_products_error_is_within_the_sum_over_its_blocks(seed, kind):
    """|Ŵ x - W x| <= sum over blocks of c (G / 2 + 4 u) |x|."""
    rng = numpy.random.default_rng(seed)
    W, x = rng.standard_normal((6, 64)).astype(numpy.float32), rng.standard_normal(64)
    weight = FourBit(encoded(to_device(W), kind, 32, False))
    change = abs((to_host(weight.dense()).astype(numpy.float64) - W) @ x)
    c = abs(W.reshape(-1, 32)).max(1).reshape(6, 2)
    assert (change <= (c * abs(x).reshape(2, 32).sum(1)).sum(1) * (gap(kind) / 2 + 4 * U)).all()

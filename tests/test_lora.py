"""LoRA's laws: exact at the start, exact when merged up to rounding, exact when removed."""

import copy
import math
import re
from dataclasses import replace

import pytest
from helpers import (
    EVERYTHING,
    LINEARS,
    NORMS,
    SIZES,
    TIED,
    assert_gradient,
    assert_layer_gradient,
    assert_precision_scales,
    batch,
    dtypes,
    flags,
    gamma,
    gradients,
    merge_bound,
    ranks,
    same_bits,
    seeds,
    tiny,
    tiny_lora,
    unit,
)  # fmt: skip
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from library import np

from minilora.adapters import disabled, remove, scales, set_scale
from minilora.backend import to_host
from minilora.errors import (
    ConfigError,
    InputError,
    MiniloraError,
    MismatchError,
    NonFiniteError,
    StateError,
    short,
)
from minilora.layers import Embedding, Linear, Need, Param
from minilora.lora import Adapted, Row, fuse, inject, merge, owners, set_adapter, unmerge
from minilora.methods.dora import row_norms  # fmt: skip
from minilora.methods.lora_config import LoraConfig
from minilora.ops import rows, saved
from minilora.optim import AdamW
from minilora.tree import digest, get, named_params, trained

wide = st.integers(3, 9)
KINDS = {
    "lora": LoraConfig(r=3, alpha=7, targets=EVERYTHING, init="both"),
    "tied": LoraConfig(r=3, alpha=7, targets=TIED, init="both"),
    "lora-and-norms": LoraConfig(r=3, alpha=7, targets=EVERYTHING, init="both", modules_to_save=NORMS),
    "saved-table": LoraConfig(r=3, alpha=7, init="both", modules_to_save=["embed_tokens"]),
    "dora": LoraConfig(r=3, alpha=7, targets=LINEARS, init="both", dora=True),
    "biases": LoraConfig(r=3, alpha=7, targets=LINEARS, init="both", bias="all", exclude_modules=["o_proj"]),
    "dora-biases": LoraConfig(r=3, alpha=7, targets=LINEARS, init="both", dora=True, bias="lora_only"),
}


def layer_of(seed, o, i, r, dtype=np.float64, alpha=7.0, whole=False, bias=True, **how):
    """One adapted Linear with both factors at random, in a tree of its own; `whole` numbers if so wished."""
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return (rng.integers(-4, 5, shape) if whole else rng.standard_normal(shape)).astype(dtype)

    tree = {"q_proj": Linear(Param(draw(o, i)), Param(draw(o)) if bias else None)}
    inject(tree, LoraConfig(r=r, alpha=alpha, targets="q_proj", init="both", **how), rng=rng)
    adapter = tree["q_proj"].adapters["default"]
    if not how:
        adapter.A.data, adapter.B.data = draw(r, i), draw(o, r)
    return tree, draw, rng


# ---- gradients


@pytest.mark.parametrize("dora", [False, True])
@given(seed=seeds, o=wide, i=wide, r=st.integers(1, 3), bias=st.booleans())
def test_an_adapted_linears_gradient_matches_the_complex_step(dora, seed, o, i, r, bias):
    tree, draw, rng = layer_of(seed, o, i, r, bias=bias, dora=dora)
    assert_adapted_gradient(tree["q_proj"], draw(2, 4, i), rng)


def assert_adapted_gradient(layer, x, rng):
    """The gradient of x and of all that is trained in an adapted Linear is that of the complex step."""
    params = trained(layer)
    at = named_params(layer)  # the base is complex as well, but not moved: it has no gradient
    frozen = {k: p for k, p in at.items() if k not in params}
    y, back = layer(x)
    weights = rng.standard_normal(y.shape)
    dx = back(weights.copy())
    data = {k: p.data for k, p in params.items()} | {"x": x}

    def value(arrays):
        for k, p in params.items():
            p.data = arrays[k]
        for p in frozen.values():
            p.data = p.data.astype(complex)
        return (weights * layer(arrays["x"])[0]).sum()

    assert_gradient(value, data, {k: p.grad for k, p in params.items()} | {"x": dx}, rng)


def biased(seed, o, i, r, way):
    """A Linear with a bias of its own beside an adapter or alone, which is not the base's any more."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.standard_normal(shape)  # noqa: E731
    tree = {"q_proj": Linear(Param(draw(o, i)), Param(draw(o))), "o_proj": Linear(Param(draw(3, 3)))}
    targets = "o_proj" if way == "alone" else "q_proj"
    how = {"init": "both", "bias": "all", "dora": way == "dora"}
    inject(tree, LoraConfig(r=r, alpha=7, targets=targets, **how), rng=rng)
    tree["q_proj"].adapters["default"].bias.data += draw(o)
    return tree, draw, rng


WAYS = ["lora", "dora", "alone"]


@pytest.mark.parametrize("way", WAYS)
@given(seed=seeds, o=wide, i=wide, r=st.integers(1, 3))
def test_a_trained_bias_gradient_matches_the_complex_step(way, seed, o, i, r):
    tree, draw, rng = biased(seed, o, i, r, way)
    layer = tree["q_proj"]
    assert_adapted_gradient(layer, draw(1, 4, i), rng)
    assert layer.base.bias.grad is None


@pytest.mark.parametrize("way", WAYS)
@given(seed=seeds, o=wide, i=wide, r=st.integers(1, 3))
def test_merging_a_bias_leaves_the_bases_bias_unchanged(way, seed, o, i, r):
    tree, draw, _ = biased(seed, o, i, r, way)
    layer, x = tree["q_proj"], draw(2, 4, i)
    bias, before = layer.adapters["default"].bias, layer.base.bias.data.copy()
    y = layer(x, Need.NONE)[0]
    merge(tree)
    merged = layer(x, Need.NONE)[0]
    assert np.allclose(merged, y, rtol=0, atol=1e4 * unit(np.float64) * np.abs(y).max())
    assert np.array_equal(layer.merged.bias.data, bias.data)
    bias.data += 1  # as a step would do
    assert np.array_equal(layer(x, Need.NONE)[0], merged)
    unmerge(tree)
    assert np.allclose(layer(x, Need.NONE)[0], merged + 1)
    assert np.array_equal(layer.base.bias.data, before)


@given(seed=seeds, r=st.integers(1, 4))
def test_an_adapted_embeddings_gradient_matches_the_complex_step(seed, r):
    rng = np.random.default_rng(seed)
    tree = {"embed": Embedding(Param(rng.standard_normal((11, 5)).astype(complex)))}
    tree["embed"].weight.data = tree["embed"].weight.data.real
    inject(tree, LoraConfig(r=r, alpha=7, targets="embed", init="both"), rng=rng)
    layer = tree["embed"]
    real = layer.base.weight.data

    def promoted(call):  # the base in the dtype of its adapter
        def run(x):
            kind = np.result_type(*(p.data for p in trained(tree).values()), real if x.dtype == int else x)
            layer.base.weight.data = real.astype(kind)
            return call(x)

        return run

    assert_layer_gradient(promoted(layer), trained(tree), rng.integers(0, 11, (3, 4)), rng)
    for p in trained(tree).values():
        p.grad = None
    assert_layer_gradient(promoted(layer.attend), trained(tree), rng.standard_normal((3, 4, 5)), rng)


def network_value(model, params, ids, labels):
    """name -> array of all that is trained, to the loss."""
    everything = named_params(model)

    def value(arrays):
        kind = np.result_type(*arrays.values())
        for k, p in everything.items():
            p.data = arrays[k] if k in arrays else p.data.real.astype(kind)
        return model.loss(ids, labels)[0]

    return value


@pytest.mark.parametrize("kind", [None, *KINDS])
@settings(max_examples=6)
@given(seed=seeds, flags=flags)
def test_the_networks_gradient_matches_the_complex_step(kind, seed, flags):
    model, rng = tiny(seed, **flags)
    if kind:
        inject(model, KINDS[kind], rng=rng)
    ids, labels = batch(rng)
    _, g = gradients(model, ids, labels)
    params = trained(model)
    data = {k: p.data for k, p in params.items()}
    assert_gradient(network_value(model, params, ids, labels), data, g, rng, directions=3)


@settings(max_examples=10)
@given(seed=seeds, flags=flags, kind=st.sampled_from([None, *KINDS]))
def test_the_networks_gradient_matches_central_differences(seed, flags, kind):
    model, rng = tiny(seed, **flags)
    if kind:
        inject(model, KINDS[kind], rng=rng)
    ids, labels = batch(rng)
    loss, g = gradients(model, ids, labels)
    data = {k: p.data for k, p in trained(model).items()}
    value = network_value(model, trained(model), ids, labels)
    v = {k: rng.standard_normal(a.shape) for k, a in data.items()}
    length = math.sqrt(sum((a * a).sum() for a in v.values()))
    h = 1e-4

    def slope(h):
        return (value({k: a + h / length * v[k] for k, a in data.items()})
                - value({k: a - h / length * v[k] for k, a in data.items()})) / (2 * h)  # fmt: skip

    # D_2h - D_h is three times the truncation error; 64 u |f| / h covers rounding (reliability.md, N3)
    exact = sum((g[k] * v[k]).sum() for k in v) / length
    assert abs(slope(h) - exact) <= abs(slope(2 * h) - slope(h)) + 64 * 2.0**-53 * abs(loss) / h


@given(seed=seeds, o=wide, i=wide, r=st.integers(1, 3))
def test_dA_is_s_Bt_G_and_dB_is_s_G_At(seed, o, i, r):
    tree, draw, _ = layer_of(seed, o, i, r, whole=True, alpha=4.0 * r)
    layer = tree["q_proj"]
    A, B = (layer.adapters["default"].A, layer.adapters["default"].B)
    x, dy = draw(2, 4, i), draw(2, 4, o)
    dx = layer(x)[1](dy)
    G = rows(dy).T @ rows(x)
    # whole numbers and s = 4: nothing rounds
    assert np.array_equal(A.grad, 4 * B.data.T @ G)
    assert np.array_equal(B.grad, 4 * G @ A.data.T)
    assert np.array_equal(dx, dy @ (layer.base.weight.data + 4 * B.data @ A.data))


# ---- the start


@settings(max_examples=12)
@given(seed=seeds, dtype=dtypes, flags=flags, r=ranks, rslora=st.booleans(),
       init=st.sampled_from(["kaiming", "gaussian"]))  # fmt: skip
def test_a_fresh_adapter_is_exactly_the_base_also_when_merged(seed, dtype, flags, r, rslora, init):
    model, rng = tiny(seed, dtype, **flags)
    ids, _ = batch(rng)
    base = model(ids)[0]
    config = LoraConfig(r=r, targets=EVERYTHING, rslora=rslora, init=init, modules_to_save=NORMS)
    inject(model, config, rng=rng)
    assert np.array_equal(model(ids)[0], base)
    assert np.array_equal(model(ids, train=True)[0], base)
    merge(model)
    assert np.array_equal(model(ids)[0], base)
    fuse(model)
    assert np.array_equal(model(ids)[0], base)


@settings(max_examples=12)
@given(seed=seeds, dtype=dtypes, flags=flags)
def test_at_first_only_B_has_a_gradient_and_in_an_embedding_only_A(seed, dtype, flags):
    model, rng = tiny(seed, dtype, **flags)
    inject(model, LoraConfig(r=3, targets=EVERYTHING), rng=rng)
    ids, labels = batch(rng)
    _, g = gradients(model, ids, labels)
    for path, gradient in g.items():
        moves = "A" if "embed_tokens" in path else "B"
        assert gradient.any() == path.endswith(moves), path
    if not flags["tie_word_embeddings"]:  # a token that was not looked up does not move
        unseen = sorted(set(range(SIZES["vocab_size"])) - set(ids.ravel().tolist()))
        assert not g["model.embed_tokens.adapters.default.A"][:, unseen].any()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_fresh_dora_equals_the_base_up_to_rounding(dtype):
    model, rng = tiny(0, dtype)
    base = get(model, "model.layers.0.mlp.up_proj")
    inject(model, LoraConfig(r=3, targets="layers.0.mlp.up_proj", dora=True), rng=rng)
    x = rng.standard_normal((4, base.weight.data.shape[1])).astype(dtype)
    y, D = get(model, "model.layers.0.mlp.up_proj")(x)[0], x.shape[1]
    # m / |W| is one rounding off 1, the product with it another; both products sum D terms
    bound = 2 * gamma(D + 2, unit(dtype)) * np.abs(x) @ np.abs(base.weight.data.T)
    assert (np.abs(y - base(x)[0]) <= bound).all()


@pytest.mark.parametrize("init", ["kaiming", "gaussian", "both"])
def test_fresh_factors_have_the_documented_standard_deviation(init):
    """Of tall and wide maps and of a table, whose two factors change places."""
    r = 8
    tree = {"wide": Linear(Param(np.zeros((300, 400), np.float32))),
            "tall": Linear(Param(np.zeros((700, 200), np.float32))),
            "table": Embedding(Param(np.zeros((500, 600), np.float32)))}  # fmt: skip
    inject(tree, LoraConfig(r=r, alpha=5, targets=list(tree), init=init), rng=np.random.default_rng(0))
    both = 1 / r if init == "both" else 0
    for name, (O, I) in {"wide": (300, 400), "tall": (700, 200), "table": (600, 500)}.items():  # noqa: E741
        A, B = (to_host(getattr(tree[name].adapters["default"], k).data) for k in "AB")
        assert (A.shape, B.shape) == ((r, I), (O, r))
        drawn = 1 / math.sqrt(3 * I) if init == "kaiming" else 1 / r
        for X, std in ((A, both), (B, 1.0)) if name == "table" else ((A, drawn), (B, both)):
            # of n draws the mean is within 6 std / sqrt(n), the deviation within 6 std / sqrt(2 n) or less
            assert abs(X.mean()) <= 6 * std / math.sqrt(X.size)
            assert abs(X.std() - std) <= 6 * std / math.sqrt(2 * X.size)
            if X is A and init == "kaiming" and std:  # uniform, and to both ends
                assert 0.99 <= abs(A).max() * math.sqrt(I) <= 1
            elif std:
                assert abs(X).max() > 2.5 * std


# ---- merging


@given(seed=seeds, o=st.integers(1, 40), i=st.integers(1, 40), r=st.integers(1, 8), dtype=dtypes,
       size=st.sampled_from([1e-6, 1.0, 1e6]))  # fmt: skip
def test_merged_and_unmerged_agree_within_a_tight_bound(seed, o, i, r, dtype, size):
    r = min(r, o, i)
    tree, draw, _ = layer_of(seed, o, i, r, dtype, bias=False)
    layer, f = tree["q_proj"], tree["q_proj"].adapters["default"]
    f.A.data *= dtype(size)
    x = draw(6, i)
    plain = layer(x)[0]
    bound = merge_bound(layer.base.weight.data, f.A.data, f.B.data, f.scale, x.T, dtype).T
    merge(tree)
    merged = layer(x, Need.NONE)[0]
    assert np.isfinite(merged).all()
    assert merged.dtype == plain.dtype == dtype
    assert not np.array_equal(merged, layer.base(x)[0])  # the adapter is at work
    assert (np.abs(merged - plain) <= bound).all()
    unmerge(tree)

    # a scale that is off by ten bounds, at the entry where that shows most, is seen
    part = np.abs(f.scale * (x.astype(float) @ f.A.data.T.astype(float) @ f.B.data.T.astype(float)))
    off = 10 * float((bound / part).min())
    set_scale(tree, f.scale * (1 + off))
    assert (np.abs(layer(x)[0].astype(np.longdouble) - merged) > bound).any()


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=5)
@given(seed=seeds, dtype=dtypes)
def test_merging_and_unmerging_restore_every_bit_of_the_base(kind, seed, dtype):
    model, _ = tiny_lora(seed, dtype, config=KINDS[kind])
    bases = {
        path.replace(".", "/"): layer.base for path, layer in owners(model) if isinstance(layer, Adapted)
    }
    arrays, before = {k: p.data for k, p in named_params(bases).items()}, digest(bases)
    for _ in range(3):
        merge(model)
        assert digest(bases) == before
        unmerge(model)
        assert digest(bases) == before
    assert all(p.data is arrays[k] for k, p in named_params(bases).items())


@given(seed=seeds, o=wide, i=wide, r=st.integers(1, 3), power=st.integers(-3, 3), dtype=dtypes)
def test_merging_whole_numbers_is_exact(seed, o, i, r, power, dtype):
    tree, draw, _ = layer_of(seed, o, i, r, dtype, whole=True, alpha=r * 2.0**power)
    f, x = tree["q_proj"].adapters["default"], draw(2, 4, i)
    f.A.data[:] = np.abs(f.A.data) + 1
    f.B.data[0] = 1
    W = tree["q_proj"].base.weight.data + 2.0**power * f.B.data @ f.A.data
    y = tree["q_proj"](x)[0]
    assert y.dtype == dtype
    assert np.array_equal(y, x @ W.T + tree["q_proj"].base.bias.data)
    merge(tree)
    assert np.array_equal(tree["q_proj"](x, Need.NONE)[0], y)
    fuse(tree)
    assert np.array_equal(tree["q_proj"].weight.data, W)
    assert np.array_equal(tree["q_proj"](x)[0], y)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=8)
@given(seed=seeds, flags=flags)
def test_merging_and_fusing_the_network_only_round(kind, seed, flags):
    def both(dtype):
        model, rng = tiny_lora(seed, dtype, config=KINDS[kind], **flags)
        ids, _ = batch(rng)
        with disabled(model):
            base = model(ids)[0]
        plain = model(ids)[0]
        merge(model)
        merged = model(ids)[0]
        assert not np.allclose(merged, base)
        with disabled(model):
            assert np.array_equal(model(ids)[0], base)
        unmerge(model)
        assert np.array_equal(model(ids)[0], plain)
        fuse(model)
        assert np.array_equal(model(ids)[0], merged)
        assert not any(isinstance(layer, Adapted) for _, layer in owners(model))
        return plain, merged

    assert_precision_scales(both)


@settings(max_examples=12)
@given(seed=seeds, r=st.integers(1, 4))
def test_an_adapted_table_changes_the_lookup_and_the_tied_head(seed, r):
    rng = np.random.default_rng(seed)
    E, A, B = (rng.integers(-4, 5, s).astype(float) for s in ((11, 5), (r, 11), (5, r)))
    tree = {"embed": Embedding(Param(E))}
    inject(tree, LoraConfig(r=r, alpha=4 * r, targets="embed"), rng=rng)
    f = tree["embed"].adapters["default"]
    f.A.data, f.B.data = A, B
    changed = Embedding(Param(E + 4 * (B @ A).T))  # whole numbers and s = 4: nothing rounds
    ids, x = rng.integers(0, 11, (3, 4)), rng.integers(-4, 5, (3, 4, 5)).astype(float)
    for merged in (False, True):
        if merged:
            merge(tree)
        assert np.array_equal(tree["embed"](ids, Need.NONE)[0], changed(ids)[0])
        assert np.array_equal(tree["embed"].attend(x, Need.NONE)[0], changed.attend(x)[0])


@settings(max_examples=10)
@given(seed=seeds, r=st.integers(1, 4), both=st.booleans())
def test_an_adapter_on_a_tied_head_does_not_change_the_lookup(seed, r, both):
    """As in PEFT: the lookup does not see the head's change, nor the head that of the lookup."""
    model, rng = tiny(seed, np.float64, tie_word_embeddings=True)
    untied, _ = tiny(seed, np.float64, tie_word_embeddings=False)
    table = model.model.embed_tokens.weight
    bits = table.data.tobytes()
    for name, p in named_params(untied).items():  # the untied model of the same numbers
        p.data = get(model, name if name != "lm_head.weight" else "model.embed_tokens.weight").data.copy()
    targets = ["q_proj", "lm_head", *["embed_tokens"] * both]
    reports = [
        inject(m, LoraConfig(r=r, alpha=5, targets=targets, init="both"), rng=np.random.default_rng(seed))
        for m in (model, untied)
    ]
    V, D = table.data.shape
    assert reports[0].rows == reports[1].rows
    assert reports[0].rows[-1] == Row("lm_head", (V, D), r, 5 / r, "LowRank", r * (V + D))
    assert reports[1].base_parameters == reports[0].base_parameters + V * D  # the table counts once
    assert model.lm_head.base.weight is table
    ids, labels = batch(rng)
    losses, found = zip(*(gradients(one, ids, labels) for one in (model, untied)), strict=True)
    assert losses[0] == losses[1]
    assert same_bits(*found)
    for change in (merge, unmerge, fuse):
        change(model), change(untied)
        assert np.array_equal(model(ids)[0], untied(ids)[0])
    assert table.data.tobytes() == bits


def test_a_head_tied_to_an_adapted_embedding_cannot_be_adapted():
    model, rng = tiny()
    inject(model, LoraConfig(r=2, targets="embed_tokens"), rng=rng, name="first")
    state = digest(model)
    with pytest.raises(StateError, match="tied to an embedding that has adapters"):
        inject(model, LoraConfig(r=2, targets="lm_head"), rng=rng, name="second")
    assert digest(model) == state
    assert model.lm_head is None
    other, _ = tiny()
    inject(other, LoraConfig(r=2, targets="q_proj", modules_to_save=["lm_head"]), rng=rng)
    assert other.lm_head.base.weight is other.model.embed_tokens.weight
    copy = other.lm_head.adapters["default"].layer.weight.data
    assert not np.shares_memory(copy, other.model.embed_tokens.weight.data)
    assert {p for p in trained(other) if "lm_head" in p} == {"lm_head.adapters.default.layer.weight"}
    remove(other, "default")
    ids, _ = batch(rng)
    assert np.array_equal(other(ids)[0], tiny()[0](ids)[0])


def test_an_adapted_tied_network_equals_one_with_the_changed_table():
    def both(dtype):
        config = LoraConfig(r=3, alpha=7, targets="embed_tokens", init="both")
        model, rng = tiny_lora(0, dtype, config=config, tie_word_embeddings=True)
        other, _ = tiny(0, dtype, tie_word_embeddings=True)
        f = model.model.embed_tokens.adapters["default"]
        other.model.embed_tokens.weight.data += dtype(7 / 3) * (f.B.data @ f.A.data).T
        ids, _ = batch(rng)
        return model(ids)[0], other(ids)[0]

    assert_precision_scales(both)


@pytest.mark.parametrize("kind", KINDS)
def test_merged_weights_are_frozen(kind):
    model, _ = tiny_lora(0, config=KINDS[kind], tie_word_embeddings=False)
    folded = {path: layer.adapters[layer.active].merged(layer.base) for path, layer in owners(model)
              if isinstance(layer, Adapted) and layer.active}  # fmt: skip
    assert folded
    assert named_params(folded)
    assert not trained(folded)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e38])
def test_merging_is_all_or_nothing(kind, bad):
    model, _ = tiny_lora(0, np.float32, config=KINDS[kind], tie_word_embeddings=False)
    path, last = [item for item in trained(model).items() if item[0].endswith(".B")][-1]
    last.data[-1, -1] = bad
    [p for path, p in trained(model).items() if path.endswith(".A")][-1].data[-1] = 1e3  # 1e38 overflows
    before = digest(model)
    for fold in (merge, fuse):
        with pytest.raises(NonFiniteError, match=rf"{path.partition('.adapters')[0]}.*not finite"):
            fold(model)
        assert all(layer.merged is None for _, layer in owners(model) if isinstance(layer, Adapted))
        assert digest(model) == before


# ---- the function, however it is written


@given(seed=seeds, o=wide, i=wide, r=st.integers(1, 3), dtype=dtypes)
def test_BR_and_R_inverse_A_give_the_same_function(seed, o, i, r, dtype):
    tree, draw, rng = layer_of(seed, o, i, r, dtype, whole=True, alpha=4.0 * r)
    f, x = tree["q_proj"].adapters["default"], draw(2, 4, i)
    y = tree["q_proj"](x)[0]
    R = np.diag(2.0 ** rng.integers(-2, 3, r))[rng.permutation(r)].astype(dtype)
    f.B.data, f.A.data = f.B.data @ R, np.linalg.inv(R).astype(dtype) @ f.A.data
    assert np.array_equal(tree["q_proj"](x)[0], y)  # powers of two and whole numbers: nothing rounds


@given(r=st.integers(1, 8), alpha=st.floats(0.01, 100), rslora=st.booleans(), flags=flags)
@settings(max_examples=10)
def test_scale_is_alpha_over_r_or_sqrt_r_and_counts_match_the_formula(r, alpha, rslora, flags):
    model, rng = tiny(0, np.float32, **flags)
    config = LoraConfig(
        r=r, alpha=alpha, targets=EVERYTHING, rslora=rslora, modules_to_save=["norm"],
        rank_pattern={"q_proj": 5, "model.layers.1.mlp.up_proj": 6}, alpha_pattern={"mlp.up_proj": 3.0},
    )  # fmt: skip
    report, kinds = inject(model, config, rng=rng), ("LowRank", "LowRankEmbedding")
    for row in report.rows:
        if row.module == "model.norm":
            assert (row.kind, row.r, row.scale, row.parameters) == (
                "FullCopy",
                None,
                None,
                SIZES["hidden_size"],
            )
            continue
        rank = 5 if row.module.endswith("q_proj") else 6 if row.module == "model.layers.1.mlp.up_proj" else r
        a = 3.0 if row.module.endswith("up_proj") else alpha
        assert (row.r, row.kind) == (rank, kinds[row.module.endswith("embed_tokens")])
        assert row.scale == scales(model)[row.module] == a / (math.sqrt(rank) if rslora else rank)
        assert row.parameters == rank * sum(row.shape)
    assert report.parameters == sum(p.data.size for p in trained(model).values())
    assert report.base_parameters == sum(p.data.size for p in named_params(tiny(**flags)[0]).values())
    assert report.share == report.parameters / report.base_parameters
    assert f"{report.parameters:,} of {report.base_parameters:,}" in str(report)
    assert len(str(report).splitlines()) == len(report.rows) + 2


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("q_proj", ["layers.0.self_attn.q_proj", "layers.1.self_attn.q_proj"]),
        (["q_proj", "q_proj"], ["layers.0.self_attn.q_proj", "layers.1.self_attn.q_proj"]),
        ("model.layers.1.mlp.up_proj", ["layers.1.mlp.up_proj"]),
        ("0.mlp.up_proj", ["layers.0.mlp.up_proj"]),
        (["embed_tokens", "1.mlp.down_proj"], ["embed_tokens", "layers.1.mlp.down_proj"]),
        (re.compile(r".*\.1\..*[kv]_proj"), ["layers.1.self_attn.k_proj", "layers.1.self_attn.v_proj"]),
    ],
)
def test_targets_are_names_suffixes_or_a_compiled_pattern(targets, expected):
    model, rng = tiny()
    inject(model, LoraConfig(r=2, targets=targets), rng=rng)
    found = [path for path, layer in owners(model) if isinstance(layer, Adapted)]
    assert found == ["model." + path for path in expected]


@given(flags=flags)
def test_all_linear_is_every_linear_but_the_head_and_modules_to_save(flags):
    model, rng = tiny(**flags)
    expected = {path for path, layer in owners(model) if isinstance(layer, Linear) and path != "lm_head"}
    assert len(expected) == 14
    report = inject(model, LoraConfig(r=2, modules_to_save=["up_proj"]), rng=rng)
    assert {row.module for row in report.rows} == expected
    assert {row.module for row in report.rows if row.r} == {p for p in expected if not p.endswith("up_proj")}


NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
some = st.lists(st.sampled_from(NAMES), unique=True)


@given(targets=some.filter(len), excluded=some, layers=st.none() | some.map(len).map(range).filter(len))
def test_excluded_modules_and_other_layers_are_not_adapted(targets, excluded, layers):
    model, rng = tiny(num_hidden_layers=7)
    expected = [
        path for path, layer in owners(model)
        if isinstance(layer, Linear) and path != "lm_head" and path.rpartition(".")[2] in targets
        and path.rpartition(".")[2] not in excluded and (layers is None or int(path.split(".")[2]) in layers)
    ]  # fmt: skip
    config = LoraConfig(r=2, targets=targets, exclude_modules=excluded, layers_to_transform=layers)
    if expected:
        assert [row.module for row in inject(model, config, rng=rng).rows] == expected
    else:
        with pytest.raises(ConfigError, match="none of the targets"):
            inject(model, config, rng=rng)


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ({"exclude_modules": "mlp"}, None),  # a name means a module with parameters
        ({"exclude_modules": "layers.0.self_attn.q_proj"}, ["layers.1.self_attn.q_proj", "embed_tokens"]),
        ({"exclude_modules": ["embed_tokens"]}, ["layers.0.self_attn.q_proj", "layers.1.self_attn.q_proj"]),
        ({"layers_to_transform": [1]}, ["layers.1.self_attn.q_proj"]),  # the table is in no layer
        ({"layers_to_transform": (1, 0)}, ["layers.0.self_attn.q_proj", "layers.1.self_attn.q_proj"]),
    ],
)
def test_exclude_modules_are_matched_like_targets(how, expected):
    model, rng = tiny()
    config = LoraConfig(r=2, targets=["q_proj", "embed_tokens"], **how)
    if expected is None:
        with pytest.raises(MismatchError, match="'mlp' matches no module"):
            inject(model, config, rng=rng)
    else:
        found = {row.module for row in inject(model, config, rng=rng).rows}
        assert found == {f"model.{path}" for path in expected}


@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
@settings(max_examples=20)
@given(flags=flags, targets=some.filter(len))
def test_trained_biases_start_at_the_bases_and_are_counted(bias, flags, targets):
    model, rng = tiny(**flags)
    own = {path: layer.bias for path, layer in owners(model) if isinstance(layer, Linear) and layer.bias}
    expected = {
        path: b for path, b in own.items()
        if bias == "all" or (bias == "lora_only" and path.rpartition(".")[2] in targets)
    }  # fmt: skip
    ids, _ = batch(rng)
    y = model(ids)[0]
    report = inject(model, LoraConfig(r=2, targets=targets, bias=bias), rng=rng)
    assert np.array_equal(model(ids)[0], y)
    found = {k.partition(".adapters.")[0]: p for k, p in trained(model).items() if k.endswith(".bias")}
    assert found.keys() == expected.keys()
    for path, p in found.items():
        assert np.array_equal(p.data, expected[path].data)
        assert not np.shares_memory(p.data, expected[path].data)
        assert not expected[path].trainable
    for row in report.rows:
        count = expected[row.module].data.size if row.module in expected else 0
        assert row.parameters == count + (2 * sum(row.shape) if row.r else 0)
        assert row.kind == ("WithBias" if row.module in expected else "LowRank")
    alone = {path for path in expected if path.rpartition(".")[2] not in targets}
    assert {row.module for row in report.rows if row.r is None} == alone
    assert report.parameters == sum(p.data.size for p in trained(model).values())
    assert len(str(report).splitlines()) == len(report.rows) + 2


# ---- what is frozen


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tie", [False, True])
def test_a_frozen_base_has_no_gradient_and_never_changes(kind, tie):
    model, rng = tiny(0, np.float32, tie_word_embeddings=tie, attention_bias=True)
    base = named_params(model)
    before = digest(base)
    inject(model, KINDS[kind], rng=rng)
    ours, optimizer = trained(model), AdamW(lr=0.1, weight_decay=0.1)
    assert not {id(p) for p in ours.values()} & {id(p) for p in base.values()}
    start = {k: p.data.copy() for k, p in ours.items()}
    for _ in range(3):
        _, back = model.loss(*batch(rng), train=True)
        back()
        assert all(p.grad is None for p in base.values())
        assert all(p.grad is not None and p.grad.shape == p.data.shape for p in ours.values())
        optimizer.step(ours)
    assert not any(np.array_equal(p.data, start[k]) for k, p in ours.items())
    assert digest(base) == before


def test_a_frozen_linear_stores_no_activation_and_an_adapted_one_x_and_h():
    tree, draw, _ = layer_of(0, 4, 5, 3)
    x = draw(1, 12, 5)
    assert saved(tree["q_proj"].base(x)[1]) == {}
    kept = list(saved(tree["q_proj"](x)[1]).values())
    assert [a.shape for a in kept if not np.shares_memory(a, x)] == [(12, 3)]
    assert any(np.shares_memory(a, x) for a in kept)


def test_with_dropout_an_adapted_linear_stores_the_input_of_A_and_not_x():
    tree, draw, _ = layer_of(0, 4, 5, 3, dropout=0.5)
    x = draw(2, 6, 5)
    kept = saved(tree["q_proj"](x)[1])
    assert not [name for name, a in kept.items() if np.shares_memory(a, x)]
    assert sorted(a.shape for a in kept.values()) == [(2, 6, 5), (12, 3), (12, 5)]  # the mask, h, z


@pytest.mark.parametrize("tie", [False, True])
def test_no_backward_runs_below_the_lowest_trained_layer(tie, monkeypatch):
    model, rng = tiny(tie_word_embeddings=tie)
    inject(model, LoraConfig(r=2, targets=["layers.1.mlp.up_proj"]), rng=rng)
    names = {id(p): path for path, p in named_params(model).items()}
    ran, real = [], Linear.back_to_x

    def spied(self, shape):
        back = real(self, shape)
        return lambda dy: (ran.append(names[id(self.weight)]), back(dy))[1]

    monkeypatch.setattr(Linear, "back_to_x", spied)
    _, back = model.loss(*batch(rng), train=True)
    kept = saved(back)
    back()
    head = "model.embed_tokens.weight" if tie else "lm_head.weight"
    assert ran == [head, "model.layers.1.mlp.down_proj.weight"]
    # nor is anything kept of the block below: what the last MLP and norms need, the logits' part, the labels
    assert not [a for a in kept.values() if a.ndim >= 4]  # no heads, no attention weights


def test_inference_builds_no_backward(monkeypatch):
    model, rng = tiny_lora()
    monkeypatch.setattr(Linear, "back_to_x", lambda self, shape: pytest.fail("a backward was made"))
    model(batch(rng)[0])


@pytest.mark.parametrize("train", [False, True])
def test_dropout_is_active_in_training_only(train):
    model, rng = tiny(0)
    inject(model, LoraConfig(r=3, targets=LINEARS, init="both", dropout=0.5), rng=rng)
    ids, _ = batch(rng)
    assert np.array_equal(model(ids, train=train)[0], model(ids, train=train)[0]) != train
    merge(model)
    merged = model(ids)[0]
    unmerge(model)
    # the same function but for rounding, far below what a dropped half would do
    assert np.allclose(merged, model(ids)[0], rtol=0, atol=1e4 * unit(np.float64) * np.abs(merged).max())


# ---- bad input: one line, the value in it, and nothing has happened

LONG = 10**400
CONFIGS = [
    *({"r": r} for r in (0, -1, 8.5, 8.0, "8", [8], None, True, math.nan, -LONG)),
    *({"alpha": a} for a in (math.nan, math.inf, -math.inf, -1, 0, "8", True, [1], None)),
    *({"dropout": p} for p in (-0.1, 1, 1.5, math.nan, "0.1", True, None)),
    *({"targets": t} for t in ([], "", None, 7, {"q_proj": 1}, [["q_proj"]], [""], [None], ())),
    *({what: m} for what in ("modules_to_save", "exclude_modules") for m in (None, 7, [""], [3])),
    *({"layers_to_transform": n} for n in ([], 1, "1", [-1], [True], [1.0], ["1"], {0}, [None])),
    *({"bias": b} for b in ("lora", "ALL", "", None, True, 3)),
    *({"rank_pattern": {"q_proj": r}} for r in (0, 2.0, True, "2")),
    *({"alpha_pattern": {"q_proj": a}} for a in (0, math.nan, "1", True)),
    *({flag: v} for flag in ("rslora", "dora", "detach") for v in ("false", 1, None)),
    {"init": "zeros"}, {"dora": True, "dropout": 0.1}, {"rank_pattern": 3}, {"rank_pattern": [("q_proj", 1)]},
    {"alpha": LONG}, {"init": ["both"]},
]  # fmt: skip


@pytest.mark.parametrize("bad", CONFIGS, ids=lambda bad: repr(bad)[:40])
def test_an_invalid_config_is_refused(bad):
    with pytest.raises(ConfigError) as e:
        LoraConfig(**bad)
    assert len(str(e.value).splitlines()) == 1
    assert next(iter(bad)).split("_")[0] in str(e.value)


@pytest.mark.parametrize("other", [None, 8, {"r": 8}, LoraConfig, Row("q_proj", (2, 3), 8, 1.0, "LoRA", 5)])
def test_inject_refuses_what_is_no_adapter_config(other):
    model, rng = tiny()
    before = digest(model)
    with pytest.raises(ConfigError) as e:
        inject(model, other, rng=rng)
    assert str(e.value) == f"config is {short(other)}; expected an adapter config, ml.LoraConfig(r=8)"
    assert digest(model) == before


INJECTIONS = [
    ({"r": 11}, ConfigError, "11"),  # D = 10
    ({"r": 10**9}, ConfigError, "1000000000"),
    ({"r": 2, "rank_pattern": {"k_proj": 9}}, ConfigError, "k_proj"),  # (8, 10)
    ({"targets": "q_porj"}, MismatchError, "'q_proj'"),
    ({"targets": ["q_proj", "wq"]}, MismatchError, "'wq'"),
    ({"targets": ".*q_proj"}, MismatchError, "'.*q_proj'"),  # a regex only when compiled
    ({"targets": re.compile("q_proj")}, MismatchError, "q_proj"),  # which must match the whole path
    ({"targets": "model.layers.7.mlp.up_proj"}, MismatchError, "layers.1.mlp.up_proj"),
    ({"targets": "../q_proj"}, MismatchError, "../q_proj"),
    ({"targets": "norm"}, MismatchError, "'norm'"),  # has no low-rank form
    ({"rank_pattern": {"lm_head": 1}}, MismatchError, "lm_head"),
    ({"alpha_pattern": {"x_proj": 1}}, MismatchError, "x_proj"),
    ({"modules_to_save": ["norms"]}, MismatchError, "norms"),
    ({"exclude_modules": ["x_proj"]}, MismatchError, "x_proj"),
    ({"targets": "q_proj", "exclude_modules": "self_attn.q_proj"}, ConfigError, "none of the targets"),
    ({"layers_to_transform": [0, 2]}, ConfigError, "has 2; expected some of [0, 1]"),
    ({"targets": "embed_tokens", "layers_to_transform": [0]}, ConfigError, "has 0; expected some of []"),
    (
        {"targets": "all-linear", "modules_to_save": NAMES, "layers_to_transform": [0]},
        ConfigError,
        "none of the targets",
    ),
    ({"targets": "0.mlp.up_proj", "layers_to_transform": [1]}, ConfigError, "has 1; expected some of [0]"),
    ({"targets": "q_proj", "modules_to_save": ["self_attn.q_proj"]}, ConfigError, "q_proj"),
    ({"targets": "embed_tokens", "dora": True}, ConfigError, "embed_tokens"),
]


@pytest.mark.parametrize(("bad", "error", "says"), INJECTIONS, ids=lambda v: repr(v)[:40])
@pytest.mark.parametrize("before", [False, True])
def test_an_adapter_that_does_not_fit_leaves_the_model_unchanged(bad, error, says, before):
    model, rng = tiny_lora() if before else tiny()
    ids, _ = batch(rng)
    state, y = digest(model), model(ids)[0]
    with pytest.raises(error) as e:
        inject(model, LoraConfig(**{"r": 2} | bad), rng=rng, name="second")
    assert says in str(e.value)
    assert len(str(e.value).splitlines()) == 1
    assert digest(model) == state
    names = [list(x.adapters) for _, x in owners(model) if isinstance(x, Adapted)]
    assert names == [["default"]] * 15 * before
    assert np.array_equal(model(ids)[0], y)


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a/b", "a\\b", "a\0", "a.b", "x" * 101, "ä", "a\n", "__base__", None, 3]
)
def test_an_adapter_name_is_letters_digits_and_dashes(name):
    model, rng = tiny()
    with pytest.raises(InputError, match="adapter name"):
        inject(model, LoraConfig(r=2), rng=rng, name=name)
    assert not any(isinstance(x, Adapted) for _, x in owners(model))


@pytest.mark.parametrize("name", ["0", "A", "_", "__base", "__base__1", "task-1", "z" * 100])
def test_every_valid_adapter_name_is_accepted(name):
    model, rng = tiny()
    inject(model, LoraConfig(r=2), rng=rng, name=name)
    assert {*next(x for _, x in owners(model) if isinstance(x, Adapted)).adapters} == {name}


def test_calls_in_the_wrong_order_are_refused_and_change_nothing():
    model, rng = tiny()
    inject_it = lambda name="default": inject(model, LoraConfig(r=2), rng=rng, name=name)  # noqa: E731
    for call, *rest in ((merge,), (unmerge,), (fuse,), (set_scale, 1.0), (remove, "x"), (set_adapter, "x")):
        with pytest.raises(StateError, match="no adapter"):
            call(model, *rest)
    inject_it()
    cases = [
        (lambda: unmerge(model), StateError), (lambda: inject_it(), InputError),
        (lambda: remove(model, "x"), MismatchError), (lambda: set_adapter(model, "x"), MismatchError),
        (lambda: set_scale(model, math.nan), ConfigError), (lambda: set_scale(model, "2"), ConfigError),
        (lambda: set_scale(model, {"q_proj": 1.0}), MismatchError),
    ]  # fmt: skip
    while_merged = [
        (lambda: merge(model), StateError), (lambda: inject_it("second"), StateError),
        (lambda: remove(model, "default"), StateError), (lambda: set_adapter(model, "default"), StateError),
        (lambda: set_scale(model, 2.0), StateError),
        (lambda: model.loss(*batch(rng), train=True), StateError),
    ]  # fmt: skip
    state, before = digest(model), scales(model)
    for call, error in cases:
        with pytest.raises(error):
            call()
    merge(model)
    merged = digest(model)
    for call, error in while_merged:
        with pytest.raises(error) as e:
            call()
        assert isinstance(e.value, MiniloraError)
        assert digest(model) == merged
    unmerge(model)
    assert digest(model) == state
    assert scales(model) == before


def test_disabled_restores_the_model_after_an_exception():
    model, rng = tiny_lora()
    ids, _ = batch(rng)
    y = model(ids)[0]
    with pytest.raises(KeyError), disabled(model):
        raise KeyError
    assert np.array_equal(model(ids)[0], y)


def test_adapters_train_independently():
    model, rng = tiny(0)
    for name in ("first", "second"):
        inject(model, replace(KINDS["lora-and-norms"], r=2), rng=rng, name=name)
    ids, labels = batch(rng)
    _, g = gradients(model, ids, labels)
    assert all(".second." in path for path in g)
    set_adapter(model, "first")
    assert {path.replace(".first.", ".second.") for path in trained(model)} == set(g)
    y = model(ids)[0]
    remove(model, "second")
    assert np.array_equal(model(ids)[0], y)
    remove(model, "first")
    fresh, _ = tiny(0)
    assert same_bits(*({k: p.data for k, p in named_params(m).items()} for m in (model, fresh)))
    assert trained(model) == {}


# ---- any sequence of calls


def has_adapters(machine):  # no lambda: old releases of hypothesis parse this file for each
    return bool(machine.scales)


def has_an_active_one(machine):
    return machine.active is not None


def can_be_trained(machine):
    return has_an_active_one(machine) and not machine.merged


class Adapters(RuleBasedStateMachine):
    """A tree of a Linear and a table under any sequence of calls, beside a specification: W + s B A."""

    @initialize(seed=seeds, dtype=dtypes)
    def start(self, seed, dtype):
        self.rng, self.dtype = np.random.default_rng(seed), dtype
        self.tree = {"q_proj": Linear(self.param(9, 7), None), "embed": Embedding(self.param(11, 7))}
        self.base = {"q_proj.weight": self.tree["q_proj"].weight, "embed.weight": self.tree["embed"].weight}
        self.before = digest(self.base)
        self.scales, self.active, self.merged = {}, None, False  # name -> path -> s

    def param(self, *shape):
        return Param(self.rng.standard_normal(shape).astype(self.dtype))

    def refused(self, error, call, *args):
        with pytest.raises(error):
            call(self.tree, *args)

    @rule(name=st.sampled_from("abc"), where=st.sampled_from(["q_proj", "embed", ["q_proj", "embed"]]),
          r=st.integers(1, 7), alpha=st.sampled_from([1.0, 8.0]))  # fmt: skip
    def inject(self, name, where, r, alpha):
        config = LoraConfig(r=r, alpha=alpha, targets=where, init="both")
        if name in self.scales or self.merged:
            with pytest.raises((InputError, StateError)):
                inject(self.tree, config, rng=self.rng, name=name)
        else:
            report = inject(self.tree, config, rng=self.rng, name=name)
            self.scales[name] = {row.module: alpha / r for row in report.rows}
            self.active = name

    @rule(name=st.sampled_from("abc"))
    def set_adapter(self, name):
        if self.merged or name not in self.scales:
            self.refused((StateError, MismatchError), set_adapter, name)
        else:
            set_adapter(self.tree, name)
            self.active = name

    @rule(name=st.sampled_from("abc"))
    def remove(self, name):
        if self.merged or name not in self.scales:
            self.refused((StateError, MismatchError), remove, name)
        else:
            remove(self.tree, name)
            del self.scales[name]
            self.active = None if self.active == name else self.active

    @precondition(has_adapters)
    @rule()
    def merge(self):
        if self.merged or self.active is None:
            return
        merge(self.tree)
        self.merged = True

    @precondition(has_adapters)
    @rule()
    def unmerge(self):
        if self.merged:
            unmerge(self.tree)
            self.merged = False
        else:
            self.refused(StateError, unmerge)

    @precondition(has_an_active_one)
    @rule(s=st.floats(-2, 2, width=32))
    def set_scale(self, s):
        if self.merged:
            self.refused(StateError, set_scale, s)
        else:
            set_scale(self.tree, s)
            self.scales[self.active] = dict.fromkeys(self.scales[self.active], s)

    @precondition(can_be_trained)
    @rule()
    def train(self):
        for layer, x in ((self.tree["q_proj"], self.x()), (self.tree["embed"], self.ids())):
            y, back = layer(x)
            back(np.ones_like(y))
        assert all((p.grad is not None) == p.trainable for p in named_params(self.tree).values())
        AdamW(lr=0.1).step(trained(self.tree))

    @precondition(has_adapters)
    @rule()
    def disabled(self):
        x, ids = self.x(), self.ids()
        with disabled(self.tree):
            assert np.array_equal(self.tree["q_proj"](x, Need.NONE)[0], x @ self.base["q_proj.weight"].data.T)
            assert np.array_equal(self.tree["embed"](ids, Need.NONE)[0], self.base["embed.weight"].data[ids])

    def x(self):
        return self.rng.standard_normal((4, 7)).astype(self.dtype)

    def ids(self):
        return self.rng.integers(0, 11, 6)

    @invariant()
    def the_base_is_as_it_was(self):
        assert digest(self.base) == self.before

    @invariant()
    def the_output_is_that_of_the_dense_weights(self):
        x, ids = self.x(), self.ids()
        for path, out, X in (
            ("q_proj", self.tree["q_proj"](x, Need.NONE)[0].T, x.T),
            ("embed", self.tree["embed"](ids, Need.NONE)[0], np.eye(11, dtype=self.dtype)[:, ids].T),
        ):
            W = self.base[f"{path}.weight"].data
            s = self.scales.get(self.active, {}).get(path, 0.0)
            A, B = np.zeros((1, W.shape[1])), np.zeros((W.shape[0], 1))
            if s:
                f = self.tree[path].adapters[self.active]
                A, B = f.A.data, f.B.data
            if path == "embed":  # rows of E + s (B A)ᵀ: one-hot X times it
                W, A, B = (W.T, *((A, B) if s else (np.zeros((1, 11)), np.zeros((7, 1)))))
                out, X = out.T, X.T
            dense = W.astype(np.longdouble) + s * (B.astype(np.longdouble) @ A)
            assert out.dtype == self.dtype
            assert (np.abs(out - dense @ X) <= merge_bound(W, A, B, s, X, self.dtype)).all()


TestAdapters = Adapters.TestCase
TestAdapters.settings = settings(max_examples=25, stateful_step_count=20, deadline=None)


@given(seed=seeds, r=st.integers(1, 4), n=st.integers(4, 7))
def test_a_square_embedding_is_merged_in_the_right_orientation(seed, r, n):
    rng = np.random.default_rng(seed)
    E, A, B = (rng.integers(-4, 5, s).astype(float) for s in ((n, n), (r, n), (n, r)))
    tree = {"embed": Embedding(Param(E))}
    inject(tree, LoraConfig(r=r, alpha=2 * r, targets="embed"), rng=rng)
    f = tree["embed"].adapters["default"]
    f.A.data, f.B.data = A, B
    merge(tree)
    assert np.array_equal(tree["embed"](np.arange(n), Need.NONE)[0], E + 2 * (B @ A).T)  # nothing rounds


@given(seed=seeds, o=wide, i=wide, r=st.integers(1, 3))
def test_a_detached_norm_is_a_constant_in_the_backward(seed, o, i, r):
    found = {}
    for detach in (False, True):
        tree, draw, _ = layer_of(seed, o, i, r, bias=False, dora=True, detach=detach)
        x, dy = draw(4, i), draw(4, o)
        y, back = tree["q_proj"](x)
        found[detach] = {"y": y, "x": back(dy)} | {k[-1]: p.grad for k, p in trained(tree).items()}
    exact, detached = found[False], found[True]
    assert same_bits(*({k: f[k] for k in ("y", "x", "e")} for f in (exact, detached)))  # e: magnitude
    assert not np.array_equal(exact["B"], detached["B"])
    dora, base = tree["q_proj"].adapters["default"], tree["q_proj"].base  # the detached one
    f, V = dora.low_rank, base.weight.dense() + dora.low_rank.delta()
    f.A.grad = f.B.grad = None
    f(base, x)[1](dora.magnitude.data / row_norms(V) * dy)  # plain LoRA, told m / |V| times as much
    assert same_bits({"A": f.A.grad, "B": f.B.grad}, {k: detached[k] for k in "AB"})


@pytest.mark.parametrize(
    ("name", "ours"),
    [("target_modules", "targets"), ("lora_alpha", "alpha"), ("lora_dropout", "dropout"),
     ("use_rslora", "rslora"),
     ("use_dora", "dora"), ("init_lora_weights", "init")],
)  # fmt: skip
def test_a_config_name_of_peft_is_answered_with_ours(name, ours):
    with pytest.raises(ConfigError, match=f"{name} is PEFT's name; expected {ours}"):
        LoraConfig(**{name: 1})
    assert ours in LoraConfig.__dataclass_fields__
    assert copy.deepcopy(LoraConfig(r=3)) == replace(LoraConfig(), r=3)

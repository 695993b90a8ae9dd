"""The layers that own parameters: gradients, what a frozen one costs, and the tree that they form."""

from dataclasses import fields

import pytest
from helpers import assert_layer_gradient, dtypes, linear, seeds, sizes, tiny
from hypothesis import given
from hypothesis import strategies as st
from library import np

from minilora.errors import MismatchError
from minilora.layers import Dropout, Embedding, LayerNorm, Linear, Need, Param, RMSNorm
from minilora.ops import saved
from minilora.tree import (
    digest,
    freeze,
    get,
    named_params,
    outline,
    replace,
    settings,
    trained,
    trains,
    unfreeze,
    walk,
)  # fmt: skip


def param(rng, *shape, dtype=np.float64):
    return Param((1 + rng.standard_normal(shape)).astype(dtype))


LAYERS = {  # name -> layer(rng, outputs, inputs)
    "Linear": lambda rng, o, i, **d: Linear(param(rng, o, i, **d)),
    "Linear with bias": lambda rng, o, i, **d: Linear(param(rng, o, i, **d), param(rng, o, **d)),
    "RMSNorm": lambda rng, o, i, **d: RMSNorm(param(rng, i, **d), eps=1e-3),
    "LayerNorm": lambda rng, o, i, **d: LayerNorm(param(rng, i, **d), param(rng, i, **d), eps=1e-3),
}
wide = st.integers(3, 9)  # a norm over one or two numbers has no gradient but rounding


@pytest.mark.parametrize("name", LAYERS)
@given(seed=seeds, n=sizes, t=sizes, o=sizes, i=wide)
def test_the_gradient_matches_the_complex_step(name, seed, n, t, o, i):
    rng = np.random.default_rng(seed)
    layer = LAYERS[name](rng, o, i)
    assert_layer_gradient(layer, named_params(layer), rng.standard_normal((n, t, i)), rng)


@given(seed=seeds, n=sizes, t=sizes, v=sizes, d=sizes)
def test_an_embeddings_gradient_matches_the_complex_step(seed, n, t, v, d):
    rng = np.random.default_rng(seed)
    table = Embedding(param(rng, v, d))
    assert_layer_gradient(table, named_params(table), rng.integers(0, v, (n, t)), rng)
    table.weight.grad = None
    assert_layer_gradient(table.attend, named_params(table), rng.standard_normal((n, t, d)), rng)


@given(seed=seeds, p=st.sampled_from([0.0, 0.3, 0.9]))
def test_dropout_keeps_or_scales_and_its_gradient_uses_the_same_mask(seed, p):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((4, 50, 3)).astype(np.float32)
    y, back = Dropout(p, rng)(x)
    keep = back(np.ones_like(x))
    assert np.array_equal(y, x * keep)
    assert set(keep.ravel().tolist()) <= {0.0, float(np.float32(1 / (1 - p)))}
    # of 600 draws a share 1-p survives, within 6 standard deviations (2e-9)
    assert abs((keep > 0).mean() - (1 - p)) <= 6 * np.sqrt(p * (1 - p) / 600)
    assert Dropout(p, rng)(x, Need.NONE)[0] is x  # inference


@pytest.mark.parametrize("name", LAYERS)
@given(seed=seeds, dtype=dtypes)
def test_every_result_keeps_the_dtype(name, seed, dtype):
    rng = np.random.default_rng(seed)
    layer = LAYERS[name](rng, 4, 5, dtype=dtype)
    y, back = layer(rng.standard_normal((2, 3, 5)).astype(dtype))
    arrays = [y, *saved(back).values(), back(np.ones_like(y))]
    arrays += [p.grad for p in named_params(layer).values()]
    assert {a.dtype for a in arrays} == {np.dtype(dtype)}


@pytest.mark.parametrize("name", LAYERS)
def test_a_frozen_weight_gets_no_gradient_and_dx_is_unchanged(name):
    rng = np.random.default_rng(0)
    layer = LAYERS[name](rng, 4, 5)
    x = rng.standard_normal((2, 3, 5))
    y, back = layer(x)
    dy = rng.standard_normal(y.shape)
    dx = back(dy)
    full = {path: p.grad for path, p in named_params(layer).items()}
    for path in full:
        freeze(layer, keep=lambda name, path=path: name == path)
        assert np.array_equal(layer(x)[1](dy), dx)
        assert [k for k, p in named_params(layer).items() if p.grad is not None] == [path]
        assert np.array_equal(named_params(layer)[path].grad, full[path])
    freeze(layer)
    assert np.array_equal(layer(x)[1](dy), dx)
    assert all(p.grad is None for p in named_params(layer).values())


def test_a_frozen_linear_stores_no_activation_and_a_trained_one_its_input():
    rng = np.random.default_rng(0)
    layer, x = linear(rng, 4, 5, bias=True), rng.standard_normal((2, 3, 5)).astype(np.float32)
    kept = saved(layer(x)[1]).values()
    assert [np.shares_memory(a, x) for a in kept] == [True]
    layer.weight.trainable = False  # a bias needs no input
    assert saved(layer(x)[1]) == {}
    freeze(layer)
    assert saved(layer(x)[1]) == {}
    assert layer(x, Need.WEIGHTS)[1](np.ones((2, 3, 4), np.float32)) is None


def test_a_weight_used_twice_accumulates_both_gradients():
    rng = np.random.default_rng(0)
    layer, x, dy = Linear(param(rng, 4, 5)), rng.standard_normal((2, 3, 5)), rng.standard_normal((2, 3, 4))
    layer(x)[1](dy)
    once = layer.weight.grad.copy()
    layer(x)[1](dy)
    assert np.array_equal(layer.weight.grad, 2 * once)


# ---- the tree


def test_parameters_have_hugging_faces_names():
    names = set(named_params(tiny(attention_bias=True, tie_word_embeddings=False)[0]))
    assert {
        "model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.bias",
        "model.layers.1.mlp.down_proj.weight",
        "model.layers.1.post_attention_layernorm.weight", "model.norm.weight", "lm_head.weight",
    } <= names  # fmt: skip


def test_get_and_replace_are_inverse_everywhere():
    model, rng = tiny()
    for path, node in list(walk(model))[1:]:
        new = linear(rng, 2, 3)
        replace(model, path, new)
        assert get(model, path) is new
        replace(model, path, node)
        assert get(model, path) is node


def test_an_unknown_path_names_the_nearest():
    with pytest.raises(
        MismatchError, match=r"mlp\.gate_porj' is not in .*'model\.layers\.0\.mlp\.gate_proj'"
    ):
        get(tiny()[0], "model.layers.0.mlp.gate_porj")


def test_a_shared_parameter_is_listed_once():
    one = linear(np.random.default_rng(0), 2, 3)
    assert list(named_params({"a": one, "b": [one]})) == ["a.weight"]


def test_freeze_keeps_the_selected_parameters_and_drops_gradients():
    model, _ = tiny()
    for p in named_params(model).values():
        p.grad = p.data
    freeze(model, keep=lambda path: path.endswith("norm.weight"))
    assert set(trained(model)) == {path for path in named_params(model) if path.endswith("norm.weight")}
    assert trains(model)
    assert not trains(model.model.embed_tokens)
    assert all(p.grad is None for p in named_params(model).values())


def test_unfreeze_trains_copies():
    model, _ = tiny()
    freeze(model)
    before = {path: p.data for path, p in named_params(model).items()}
    unfreeze(model)
    assert set(trained(model)) == set(before)
    for path, p in named_params(model).items():
        assert np.array_equal(p.data, before[path])
        assert not np.shares_memory(p.data, before[path])


@given(seed=seeds, bit=st.integers(0, 7))
def test_the_digest_sees_every_bit_name_shape_and_dtype(seed, bit):
    rng = np.random.default_rng(seed)
    layer = linear(rng, 4, 5, bias=True)
    before = digest(layer)
    assert digest({"weight": layer.weight, "bias": layer.bias}) == before  # the order is of no matter
    raw = layer.weight.data.view(np.uint8)
    at = tuple(rng.integers(0, raw.shape))
    raw[at] ^= 1 << bit
    assert digest(layer) != before
    raw[at] ^= 1 << bit
    assert digest(layer) == before
    for other in (
        {"weights": layer.weight, "bias": layer.bias},
        {"weight": Param(layer.weight.data.reshape(5, 4)), "bias": layer.bias},
        {"weight": Param(layer.weight.data.view(np.int32)), "bias": layer.bias},
    ):
        assert digest(other) != before
    layer.weight.data = np.asfortranarray(layer.weight.data)  # strides are of no matter
    assert digest(layer) == before


def test_an_outline_shows_shapes_and_trained_parameters_and_equal_layers_once():
    layers = [Linear(Param(np.zeros((3, 2))), Param(np.zeros(3))) for _ in range(3)]
    tree = {"a": [*layers, RMSNorm(Param(np.zeros(2)))], "b": {"\x1b": Embedding(Param(np.zeros((5, 2))))}}
    freeze(tree, keep=lambda path: path == "a.2.bias")
    layers[1].weight, layers[0].bias = layers[0].weight, layers[1].bias  # shared: counted once
    assert outline(tree).splitlines() == [
        "dict: 30 parameters, 3 trained (*)",
        "  a",
        "    0 to 1: Linear  weight 3 x 2, bias 3",
        "    2: Linear  weight 3 x 2, bias 3 *",
        "    3: RMSNorm  weight 2",
        "  b",
        "    \\x1b: Embedding  weight 5 x 2",
    ]


def test_a_model_prints_as_its_outline():
    small, large = (tiny(num_hidden_layers=n)[0] for n in (1, 9))
    assert repr(small) == str(small) == outline(small)
    assert f"Llama: {sum(p.data.size for p in named_params(small).values()):,} parameters" in repr(small)
    assert len(repr(large).splitlines()) == len(repr(small).splitlines()) < 20
    assert "0 to 8: Block" in repr(large)
    shown = small.config._repr_html_()
    assert all(f.name in shown for f in fields(small.config))


def test_settings_are_only_the_plain_values_of_a_tree():
    tied, untied = (settings(tiny(0, tie_word_embeddings=tie)[0]) for tie in (True, False))
    for values in (tied, untied):
        assert values
        assert {type(value) for value in values.values()} <= {type(None), int, float, str, bool}
    assert {name for name, value in tied.items() if value is None} >= {".lm_head"}
    assert ".lm_head" not in untied


def test_the_usual_eps_of_a_norm_is_1e_minus_5():
    """Seen where the mean square and the variance are of its size."""
    ones, x = Param(np.ones(2)), np.array([[0.0, 6e-3]])  # mean square 18e-6, mean 3e-3, variance 9e-6
    assert abs(RMSNorm(ones)(x)[0] - x / (18e-6 + 1e-5) ** 0.5).max() < 1e-14
    y, _ = LayerNorm(ones, Param(np.zeros(2)))(x)
    assert abs(y - np.array([[-1.0, 1.0]]) * 3e-3 / (9e-6 + 1e-5) ** 0.5).max() < 1e-14


def test_a_head_returns_the_gradient_of_its_input_by_default():
    table = Embedding(Param(np.ones((5, 3)), trainable=False))
    y, back = table.attend(np.ones((2, 3)))
    assert back(np.ones_like(y)).shape == (2, 3)

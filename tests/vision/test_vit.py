"""The vision transformer: its patches, its order of tokens, and what its pixels mean."""

import math

import numpy
import pytest
from helpers import assert_precision_scales, dtypes, seeds
from hypothesis import given, settings
from hypothesis import strategies as st
from library import np
from models import CLASSES, CONFIG, batch_of, lora_of, model_of

from minilora.backend import to_device, to_host
from minilora.errors import ConfigError, InputError
from minilora.layers import Need
from minilora.lora import inject
from minilora.methods.prefixes import PrefixTuningConfig
from minilora.model import Config, blocks, drawing
from minilora.ops import rms_norm, swiglu
from minilora.tree import named_params
from minilora.vision.vit import PATCH, ROW, patches, unpatches, vit

few = settings(max_examples=8)


@given(seed=seeds, n=st.integers(1, 4), dtype=dtypes)
def test_a_patch_is_a_square_of_pixels_and_unpatches_takes_it_back(seed, n, dtype):
    x = np.random.default_rng(seed).standard_normal((n, 64)).astype(dtype)
    p = patches(x)
    assert p.shape == (n, 16, 4)
    image = x.reshape(n, 8, 8)
    for t in range(16):
        i, j = PATCH * (t // ROW), PATCH * (t % ROW)
        assert np.array_equal(p[:, t], image[:, i : i + PATCH, j : j + PATCH].reshape(n, 4))
    assert np.array_equal(unpatches(p), x)


def by_hand(model, pixels):
    """The logits of one image, token by token, from the docstring."""
    params = {path: to_host(p.data) for path, p in named_params(model).items()}
    c, E = model.config, model.config.E
    x = to_host(patches(pixels))[0] @ params["encoder.patch_embedding.weight"].T
    x = x + params["encoder.patch_embedding.bias"] + params["encoder.position_embedding.weight"]

    def norm(x, w):
        return to_host(rms_norm(to_device(x), c.rms_norm_eps)[0]) * w

    for i in range(c.num_hidden_layers):
        w = {path.removeprefix(f"encoder.layers.{i}."): a for path, a in params.items()}
        n = norm(x, w["input_layernorm.weight"])
        q, k, v = (n @ w[f"self_attn.{name}_proj.weight"].T for name in "qkv")
        out = []
        for h in range(c.num_attention_heads):
            g = h // (c.num_attention_heads // c.num_key_value_heads)
            s = q[:, h * E : h * E + E] @ k[:, g * E : g * E + E].T / math.sqrt(E)
            a = numpy.exp(s) / numpy.exp(s).sum(1, keepdims=True)
            out.append(a @ v[:, g * E : g * E + E])
        x = x + numpy.concatenate(out, 1) @ w["self_attn.o_proj.weight"].T
        n = norm(x, w["post_attention_layernorm.weight"])
        gate, up = (to_device(n @ w[f"mlp.{name}_proj.weight"].T) for name in ("gate", "up"))
        x = x + to_host(swiglu(gate, up)[0]) @ w["mlp.down_proj.weight"].T
    return norm(x, params["encoder.norm.weight"]).mean(0) @ params["classifier.weight"].T


@few
@given(seed=seeds)
def test_the_logits_are_those_of_the_formula(seed):
    def both(dtype):
        model, rng = model_of("vit", seed, dtype)
        pixels, _ = batch_of("vit", rng, dtype, 1)
        return model(pixels)[0][0], to_device(by_hand(model, pixels).astype(dtype))

    assert_precision_scales(both)


@few
@given(seed=seeds, t=st.integers(0, 15))
def test_every_token_sees_every_patch(seed, t):
    model, rng = model_of("vit", seed)
    pixels, _ = batch_of("vit", rng, n=1)
    before = model.encoder(model.encoder.embed(pixels, Need.NONE)[0], Need.NONE)[0]
    p = to_host(patches(pixels)).copy()
    p[:, t] += 1
    after = model.encoder(model.encoder.embed(unpatches(to_device(p)), Need.NONE)[0], Need.NONE)[0]
    assert (abs(to_host(after - before)).max(-1) > 0).all()


@few
@given(seed=seeds, prefix=st.booleans())
def test_only_the_position_embedding_knows_the_order_of_patches(seed, prefix):
    """Patches and the rows of E in another order: the same logits, but for the order of sums."""

    def both(dtype):
        model, rng = lora_of("vit", seed, dtype, targets="all-linear")
        if prefix:
            model, rng = model_of("vit", seed, dtype)
            inject(model, PrefixTuningConfig(3), rng=rng)
        pixels, _ = batch_of("vit", rng, dtype)
        one = model(pixels)[0]
        order = rng.permutation(16)
        weight = model.encoder.position_embedding.weight
        weight.data = weight.data[order]
        return model(unpatches(patches(pixels)[:, order]))[0], one

    assert_precision_scales(both)


@few
@given(seed=seeds, order=st.permutations(range(4)))
def test_pixels_that_change_places_in_every_patch_are_undone_by_the_patch_embedding(seed, order):
    """ΔW = W Pᵀ - W, whose rank is the pixels less the cycles of P."""
    order = numpy.array(order)

    def both(dtype):
        model, rng = model_of("vit", seed, dtype)
        pixels, _ = batch_of("vit", rng, dtype)
        one, weight = model(pixels)[0], model.encoder.patch_embedding.weight
        W = to_host(weight.data)
        rank = numpy.linalg.matrix_rank((W[:, order] - W).astype(numpy.float64), tol=1e-4)
        left, cycles = set(range(4)), 0
        while left:
            i, cycles = left.pop(), cycles + 1
            while (i := int(order[i])) in left:
                left.remove(i)
        assert rank == 4 - cycles
        weight.data = to_device(W[:, order])
        return model(unpatches(to_device(to_host(patches(pixels))[..., order])))[0], one

    assert_precision_scales(both)


def test_inverted_pixels_are_undone_by_the_patch_embedding_at_full_rank():
    """ΔW = -2 W, to the bit."""
    model, rng = model_of("vit")
    pixels, _ = batch_of("vit", rng)
    one, weight = model(pixels)[0], model.encoder.patch_embedding.weight
    weight.data = weight.data + -2 * weight.data
    assert np.array_equal(model(-pixels)[0], one)


def test_fresh_matrices_have_the_documented_standard_deviation():
    config = Config(hidden_size=70, num_attention_heads=7, num_key_value_heads=7, num_hidden_layers=1)
    params = named_params(vit(config, np.random.default_rng(0), 50))
    for path, std in (("encoder.patch_embedding.weight", 4**-0.5), ("classifier.weight", 70**-0.5),
                      ("encoder.position_embedding.weight", 70**-0.5)):  # fmt: skip
        W = to_host(params[path].data)
        # of n normal draws the deviation is within 6 std / sqrt(2 n)
        assert abs(W.std() - std) <= 6 * std / math.sqrt(2 * W.size), path
    assert not params["encoder.patch_embedding.bias"].data.any()
    assert params["encoder.position_embedding.weight"].shape == (16, 70)
    assert params["classifier.weight"].shape == (50, 70)


def test_the_blocks_are_the_llamas():
    model, _ = model_of("vit")
    own = blocks(CONFIG, drawing(np.random.default_rng(0), np.float64), np.float64)
    shapes = {path: p.shape for path, p in named_params(own).items()}
    assert shapes == {path: p.shape for path, p in named_params(model.encoder.layers).items()}


@pytest.mark.parametrize(
    ("labels", "says"),
    [(numpy.zeros(4, int), r"\(4,\); expected one for each of 5"), (numpy.zeros((5, 1), int), r"\(5, 1\)"),
     (numpy.full(5, CLASSES), f"label {CLASSES}; expected 0 to {CLASSES - 1}"),
     (numpy.full(5, -1), "label -1"), (numpy.zeros(5), "float64")],
    ids=lambda x: str(x)[:12],
)  # fmt: skip
def test_labels_that_cannot_be_are_refused(labels, says):
    model, rng = model_of("vit")
    with pytest.raises(InputError, match=says):
        model.loss(batch_of("vit", rng)[0], labels)


def test_a_model_without_classes_is_refused():
    with pytest.raises(ConfigError, match="classes is 0"):
        vit(CONFIG, np.random.default_rng(0), 0)

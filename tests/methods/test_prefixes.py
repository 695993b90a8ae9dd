"""Prefix and prompt tuning: trained rows before the text, at training and in the cache."""

import math

import pytest
from helpers import SIZES, assert_gradient, assert_layer_gradient, batch, gamma, seeds, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from library import np

from minilora.adapters import set_scale
from minilora.backend import to_device
from minilora.decoding import past_of
from minilora.errors import ConfigError, InputError, MismatchError, StateError, UnsupportedError
from minilora.layers import Embedding, Linear, Need, Param, RMSNorm
from minilora.lora import adapted, bases, inject
from minilora.methods.lora_config import LoraConfig
from minilora.methods.prefixes import PrefixTuningConfig, Prompt, PromptTuningConfig, WithoutPrompt
from minilora.methods.quantize import quantize
from minilora.model import Attention
from minilora.ops import rope_frequencies, rope_tables, saved, unheads
from minilora.peft.loading import load_adapter, save_adapter
from minilora.serve.slots import Span, slots_of
from minilora.tree import digest, named_params, trained

P, T, D, E, H, G = 3, 4, 5, 2, 6, 3
rows_before = st.integers(1, 5)


def one(seed, p, bias=False):
    """An attention with a moved prefix, in a tree of its own; its tables, and the generator that goes on."""
    rng = np.random.default_rng(seed)

    def project(o, i):
        return Linear(Param(rng.standard_normal((o, i))), Param(rng.standard_normal(o)) if bias else None)

    tree = {"attn": Attention(E, project(H * E, D), project(G * E, D), project(G * E, D), project(D, H * E))}
    inject(tree, PrefixTuningConfig(p), rng=rng)
    for param in trained(tree).values():
        param.data = rng.standard_normal(param.shape)
    return tree["attn"], rope_tables(np.arange(T), H, rope_frequencies(E, 100.0), np.float64), rng


def by_loops(layer, turn, x):
    """The attention of one row of text x (T, D) over a prefix and itself: sums over positions, one by one."""
    base, prefix = layer.base, layer.adapters["default"]
    cos, sin = (np.asarray(table) for table in turn)

    def mapped(name):
        return x @ getattr(base, name).weight.data.T

    def turned(y, t, h):  # one head of E = 2 numbers is one pair
        a, b = y[t, E * h], y[t, E * h + 1]
        return np.array([a * cos[t, 0] - b * sin[t, 1], b * cos[t, 0] + a * sin[t, 1]])

    q, k, v = (mapped(f"{name}_proj") for name in "qkv")
    out = np.zeros((T, H * E))
    for h in range(H):
        g = h // (H // G)
        at = slice(E * g, E * g + E)
        for t in range(T):
            query = turned(q, t, h)
            seen = [
                (row[at], value[at]) for row, value in zip(prefix.keys.data, prefix.values.data, strict=True)
            ]
            seen += [(turned(k, s, g), v[s, at]) for s in range(t + 1)]
            weights = [math.exp(float((query * key).sum()) / math.sqrt(E)) for key, _ in seen]
            mean = sum(w * value for w, (_, value) in zip(weights, seen, strict=True)) / sum(weights)
            out[t, E * h : E * h + E] = mean
    return out @ base.o_proj.weight.data.T


@settings(max_examples=10)
@given(seed=seeds, p=rows_before)
def test_attention_is_over_the_prefix_and_the_text_so_far(seed, p):
    layer, turn, rng = one(seed, p)
    x = rng.standard_normal((2, T, D))
    y = layer(x, Need.NONE, turn)[0]
    expected = np.stack([by_loops(layer, turn, row) for row in x])
    assert np.allclose(y, expected, rtol=0, atol=1e-12 * (1 + float(abs(expected).max())))


@settings(max_examples=15)
@given(seed=seeds, p=rows_before, bias=st.booleans())
def test_the_gradient_of_rows_and_text_matches_the_complex_step(seed, p, bias):
    layer, turn, rng = one(seed, p, bias)
    x = rng.standard_normal((2, T, D))
    y, back = layer(x, Need.ALL, turn)
    weights = rng.standard_normal(y.shape)
    dx, params, everything = back(weights.copy()), trained(layer), named_params(layer)
    data = {k: param.data for k, param in params.items()} | {"x": x}
    found = {k: param.grad for k, param in params.items()} | {"x": dx}

    def value(arrays):
        for k, param in everything.items():
            param.data = arrays[k] if k in arrays else param.data.astype(complex)
        return (weights * layer(arrays["x"], Need.NONE, turn)[0]).sum()

    assert_gradient(value, data, found, rng)


@settings(max_examples=15)
@given(seed=seeds, p=rows_before)
def test_without_a_gradient_of_the_text_the_others_are_the_same_and_less_is_kept(seed, p):
    layer, turn, rng = one(seed, p)
    x, found, kept = rng.standard_normal((2, T, D)), [], []
    dy = rng.standard_normal(x.shape)
    for need in (Need.ALL, Need.WEIGHTS):
        _, back = layer(x, need, turn)
        kept.append(saved(back))
        assert (back(dy.copy()) is None) == (need is Need.WEIGHTS)
        found.append([param.grad for param in trained(layer).values()])
        for param in trained(layer).values():
            param.grad = None
    assert all(np.array_equal(a, b) for a, b in zip(*found, strict=True))
    assert not any(a is x for arrays in kept for a in arrays.values())  # nothing that is frozen needs it


@settings(max_examples=10)
@given(seed=seeds, p=rows_before)
def test_a_text_that_begins_at_position_P_sees_keys_turned_by_P(seed, p):
    """So a prefix of PEFT's, whose texts begin there, is one of ours turned back."""
    layer, turn, rng = one(seed, p)
    x = rng.standard_normal((2, T, D))
    y = layer(x, Need.NONE, turn)[0]
    later = rope_tables(np.arange(T) + p, H, rope_frequencies(E, 100.0), np.float64)
    keys = layer.adapters["default"].keys
    at = rope_tables(np.arange(p, p + 1), G, rope_frequencies(E, 100.0), np.float64)
    pairs = keys.data.reshape(p, G, E)[:, :, ::-1].reshape(p, G * E)
    keys.data = keys.data * at[0] + pairs * at[1]
    assert np.allclose(layer(x, Need.NONE, later)[0], y, rtol=0, atol=1e-12 * (1 + float(abs(y).max())))


def test_every_layer_has_its_own_small_rows():
    model, rng = tiny(0, np.float32)
    report = inject(model, PrefixTuningConfig(500), rng=rng)
    G_E = SIZES["num_key_value_heads"] * SIZES["head_dim"]
    assert [row.module for row in report.rows] == [f"model.layers.{i}.self_attn" for i in range(2)]
    assert {row.kind for row in report.rows} == {"Prefix"}
    params = trained(model)
    assert len(params) == 4
    for path, p in params.items():
        assert path.endswith((".adapters.default.keys", ".adapters.default.values"))
        assert (p.shape, p.dtype) == ((500, G_E), np.float32)
        assert abs(float(p.data.std()) / 0.2 - 1) < 6 / math.sqrt(2 * p.size)
        assert abs(float(p.data.mean())) < 6 * 0.2 / math.sqrt(p.size)
    a, b = (p.data for path, p in params.items() if path.endswith("keys"))
    assert not np.array_equal(a, b)


@pytest.mark.parametrize("P", [1, 20])
def test_a_cache_keeps_the_prefix_beside_the_text(P):
    """In room of its own, be it longer than the text: whose positions are what they are without."""
    model, rng = tiny(0)
    inject(model, PrefixTuningConfig(P), rng=rng)
    ids, _ = batch(rng)
    past = past_of(model, len(ids), ids.shape[1])
    for t in range(ids.shape[1]):
        model.forward(to_device(ids[:, t : t + 1]), past=past)
        assert past.seen == t + 1
        for cache, layer in zip(past.caches, adapted(model).values(), strict=True):
            assert cache.seen == P + t + 1
            keys = layer.adapters["default"].keys.data
            assert cache.k.shape[2] == P + ids.shape[1]
            assert all(np.array_equal(unheads(row[None, :, :P])[0], keys) for row in cache.k)


def test_an_adapter_inside_of_an_adapted_attention_is_refused():
    model, rng = tiny(0)
    before = named_params(model).keys()
    inject(model, PrefixTuningConfig(P), rng=rng)
    assert "model.layers.0.self_attn.q_proj" in bases(model)
    assert "model.layers.0.self_attn" not in bases(model)  # it has no weights of its own, so no copy of them
    with pytest.raises(MismatchError, match="self_attn"):
        inject(model, LoraConfig(r=2, modules_to_save=["self_attn"]), rng=rng, name="other")
    kept = digest(model)
    with pytest.raises(StateError, match=r"layers\.0\.self_attn\.q_proj cannot be adapted beside model"):
        inject(model, LoraConfig(r=2), rng=rng, name="other")
    assert digest(model) == kept
    model, rng = tiny(0)
    inject(model, LoraConfig(r=2), rng=rng)
    kept = digest(model)
    with pytest.raises(StateError, match=r"layers\.0\.self_attn cannot be adapted beside model"):
        inject(model, PrefixTuningConfig(P), rng=rng, name="other")
    assert digest(model) == kept
    assert before <= {path.replace(".base", "") for path in named_params(model)}


def test_a_file_for_the_maps_of_an_adapted_attention_is_refused_before_anything_changes(tmp_path):
    model, rng = tiny(0, tie_word_embeddings=True)
    inject(model, LoraConfig(r=2, targets=["q_proj", "down_proj", "lm_head"]), rng=rng)
    save_adapter(model, tmp_path / "lora")
    model, rng = tiny(0, tie_word_embeddings=True)
    inject(model, PrefixTuningConfig(P), rng=rng)
    kept = digest(model)
    with pytest.raises(StateError, match=r"self_attn\.q_proj cannot be adapted beside model"):
        load_adapter(model, tmp_path / "lora", "lora")
    assert digest(model) == kept
    assert model.lm_head is None
    assert {name for layer in adapted(model).values() for name in layer.adapters} == {"default"}


def test_a_prefix_has_no_scale():
    model, rng = tiny(0)
    inject(model, PrefixTuningConfig(P), rng=rng)
    with pytest.raises(StateError, match="no active adapter has a scale"):
        set_scale(model, 2.0)


def test_a_prefix_is_trained_before_weights_in_4_bits():
    model, rng = tiny(0, np.float32)
    inject(model, PrefixTuningConfig(P), rng=rng)
    report = quantize(model, block=32)
    assert len(report.rows) == 14
    ids, labels = batch(rng)
    _, back = model.loss(ids, labels, train=True)
    back()
    assert all(p.grad.any() for p in trained(model).values())


def test_a_prefix_is_not_served_from_slots():
    model, rng = tiny(0)
    inject(model, PrefixTuningConfig(P), rng=rng)
    step = slots_of(model, 2, 5).step([Span(0, 0, 1)])
    with pytest.raises(UnsupportedError, match="prefix tuning cannot be served from slots"):
        model.forward(to_device(np.array([[1]])), past=step)


def test_what_has_no_place_for_a_prefix_is_an_error():
    rng = np.random.default_rng(0)
    with pytest.raises(ConfigError, match="num_virtual_tokens is 0; expected an int, at least 1"):
        PrefixTuningConfig(0)
    with pytest.raises(MismatchError, match="prefix tuning: 'k_proj' matches no module"):
        inject({"q_proj": Linear(Param(np.zeros((2, 3))))}, PrefixTuningConfig(2), rng=rng)


# ---- prompt tuning


@settings(max_examples=10)
@given(seed=seeds, p=rows_before, tie=st.booleans())
def test_a_prompt_of_tokens_is_a_text_that_begins_with_them(seed, p, tie):
    """The same rows enter and leave the blocks; the product with the head W has fewer rows x = g ∘ n.

    Its sums of D terms may go in another order, 2 γ(D) |x| |w| apart, and |x| <= √D max |g| for a row n of
    mean square 1.
    """
    model, rng = tiny(seed, tie_word_embeddings=tie)
    ids, _ = batch(rng)
    begin = rng.integers(0, SIZES["vocab_size"], p)
    expected = model(np.concatenate([np.stack([begin] * len(ids)), ids], 1))[0][:, p:]
    table = model.model.embed_tokens.weight.data
    inject(model, PromptTuningConfig(p), rng=rng)
    (rows,) = trained(model).values()
    rows.data = table[to_device(begin)]
    W = table if tie else model.lm_head.weight.data
    g, width = model.model.norm.base.weight.data, W.shape[1]
    longest = math.sqrt(width) * float(abs(g).max()) * math.sqrt(float((W * W).sum(1).max()))
    assert float(abs(model(ids)[0] - expected).max()) <= 2 * gamma(width) * longest


@settings(max_examples=15)
@given(seed=seeds, p=rows_before)
def test_a_prompts_gradient_matches_the_complex_step(seed, p):
    rng = np.random.default_rng(seed)
    table = rng.standard_normal((11, D))
    prompt = Prompt(Param(rng.standard_normal((p, D))))

    def call(ids):
        base = Embedding(Param(table.astype(prompt.rows.dtype), trainable=False))
        return prompt(base, ids)

    assert_layer_gradient(call, {"rows": prompt.rows}, rng.integers(0, 11, (2, T)), rng)
    assert call(rng.integers(0, 11, (2, T)))[0].shape == (2, p + T, D)


@settings(max_examples=15)
@given(seed=seeds, p=rows_before)
def test_the_cuts_gradient_matches_the_complex_step(seed, p):
    rng = np.random.default_rng(seed)
    norm = RMSNorm(Param(rng.standard_normal(D)))
    x = rng.standard_normal((2, p + T, D))
    call = lambda x: WithoutPrompt(p)(norm, x)  # noqa: E731
    assert_layer_gradient(call, {"weight": norm.weight}, x, rng)
    assert np.array_equal(call(x)[0], norm(x)[0][:, p:])


def test_a_fresh_prompt_has_the_rows_of_tokens():
    model, rng = tiny(0, np.float32)
    table = model.model.embed_tokens.weight.data
    report = inject(model, PromptTuningConfig(9), rng=rng)
    assert [(row.module, row.kind, row.parameters) for row in report.rows] == [
        ("model.embed_tokens", "Prompt", 9 * SIZES["hidden_size"]), ("model.norm", "WithoutPrompt", 0)
    ]  # fmt: skip
    (rows,) = trained(model).values()
    assert rows.dtype == np.float32
    ids = [[i for i in range(len(table)) if np.array_equal(row, table[i])] for row in rows.data]
    assert all(len(found) == 1 for found in ids)
    assert ids != [[i] for i in range(9)]
    rows.data[...] = 0
    assert table.any(axis=1).all()  # they are a copy


@pytest.mark.parametrize("P", [1, 9])
def test_a_cache_has_room_for_the_prompt(P):
    """Be it longer than the text."""
    model, rng = tiny(0)
    inject(model, PromptTuningConfig(P), rng=rng)
    ids, _ = batch(rng)
    past = past_of(model, len(ids), ids.shape[1])
    for t in range(ids.shape[1]):
        model.forward(to_device(ids[:, t : t + 1]), past=past)
        assert [cache.seen for cache in past.caches] == [P + t + 1] * 2
        assert past.seen == P + t + 1
        assert past.caches[0].k.shape[2] == P + ids.shape[1]


def test_prompt_and_text_together_are_no_longer_than_the_model_takes():
    model, rng = tiny(0)
    longest = SIZES["max_position_embeddings"] - P
    inject(model, PromptTuningConfig(P), rng=rng)
    model(np.zeros((1, longest), int))
    with pytest.raises(InputError, match="17 positions; the model takes at most 16"):
        model(np.zeros((1, longest + 1), int))


def test_a_prompt_is_not_served_from_slots():
    model, rng = tiny(0)
    inject(model, PromptTuningConfig(P), rng=rng)
    step = slots_of(model, 2, 5).step([Span(0, 0, 1)])
    with pytest.raises(UnsupportedError, match="prompt tuning cannot be served from slots"):
        model.forward(to_device(np.array([[1]])), past=step)


def test_no_part_of_a_prompt_can_be_merged():
    model, rng = tiny(0)
    inject(model, PromptTuningConfig(P), rng=rng)
    for layer in adapted(model).values():
        with pytest.raises(UnsupportedError, match="a prompt is no change of a weight and cannot be merged"):
            layer.adapters["default"].merged(layer.base)


def test_what_has_no_place_for_a_prompt_is_an_error():
    with pytest.raises(ConfigError, match="num_virtual_tokens is True; expected an int, at least 1"):
        PromptTuningConfig(True)
    with pytest.raises(MismatchError, match=r"prompt tuning: 'model\.embed_tokens' matches no module"):
        inject(
            {"q_proj": Linear(Param(np.zeros((2, 3))))}, PromptTuningConfig(2), rng=np.random.default_rng(0)
        )


def test_unless_told_there_are_16_rows():
    assert PrefixTuningConfig() == PrefixTuningConfig(16)
    assert PromptTuningConfig() == PromptTuningConfig(16)

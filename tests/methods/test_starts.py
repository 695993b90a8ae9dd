"""LoRA that starts at factors of W or of its gradient: the base at first, W only read, rank 2r at last."""

import math

import pytest
from helpers import (
    assert_gradient,
    assert_layer_gradient,
    assert_precision_scales,
    batch,
    dtypes,
    gamma,
    gradients,
    seeds,
    tiny,
    unit,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from library import LIBRARY, np

from minilora.adapters import disabled, scales, set_scale
from minilora.backend import to_device, to_host
from minilora.errors import ConfigError, MismatchError, StateError
from minilora.layers import Linear, Need, Param
from minilora.lora import Adapted, LowRank, adapted, bases, inject, merge, owners, unmerge
from minilora.methods.lora_config import LoraConfig
from minilora.methods.quantize import quantize
from minilora.methods.starts import (
    StartConfig,
    Started,
    as_lora,
    lora_ga,
    olora,
    pissa,
    weight_gradients,
)
from minilora.ops import rows
from minilora.optim import AdamW
from minilora.peft.folder import open_adapter
from minilora.peft.loading import load_adapter, save_adapter
from minilora.spectra import spectrum
from minilora.training import train
from minilora.tree import digest, named_params, trained, unfreeze

wide = st.integers(6, 9)
kinds = st.sampled_from(["pissa", "olora", "lora_ga"])
PLAIN = LoraConfig(r=3, alpha=7)


def start_of(kind, rng, shapes):
    """A start; for LoRA-GA with gradients of these shapes, path -> (O, I)."""
    if kind == "lora_ga":
        return lora_ga({path: rng.standard_normal(shape) for path, shape in shapes.items()})
    return {"pissa": pissa, "olora": olora}[kind]


def one(seed, o, i, r, kind="pissa", dtype=np.float64, alpha=7.0, bias=True):
    """One Linear with a fresh adapter, in a tree of its own, and the generator that goes on."""
    rng = np.random.default_rng(seed)
    W, b = rng.standard_normal((o, i)).astype(dtype), rng.standard_normal(o).astype(dtype)
    tree = {"q_proj": Linear(Param(W), Param(b) if bias else None)}
    plain = LoraConfig(r, alpha, "q_proj")
    inject(tree, StartConfig(plain, start_of(kind, rng, {"q_proj": (o, i)})), rng=rng)
    return tree, tree["q_proj"].adapters["default"], rng


def network(seed, kind="pissa", dtype=np.float64, **flags):
    """A tiny model with fresh adapters on all its linear maps."""
    model, rng = tiny(seed, dtype, **flags)
    shapes = {path: layer.weight.shape for path, layer in bases(model).items()}
    inject(model, StartConfig(PLAIN, start_of(kind, rng, shapes)), rng=rng)
    return model, rng


def moved(model, rng, much=0.1):
    """The like with factors that have left their start."""
    for p in trained(model).values():
        p.data = p.data + to_device((much * rng.standard_normal(p.shape)).astype(p.dtype))
    return model


# ---- the start


@given(seed=seeds, o=wide, i=wide, r=st.integers(1, 3), kind=kinds, dtype=dtypes)
def test_at_the_start_a_layer_is_the_base_but_for_roundings(seed, o, i, r, kind, dtype):
    """y = (b + c) - c' for two roundings of c = s B₀ A₀ x, each of I + r + 2 steps, and those of two sums."""
    tree, adapter, rng = one(seed, o, i, r, kind, dtype)
    x = rng.standard_normal((2, 4, i)).astype(dtype)
    base = tree["q_proj"].base(x)[0]
    y = tree["q_proj"](x)[0]
    assert y.dtype == dtype
    B, A, X = (abs(np.asarray(a)).astype(np.float64) for a in (adapter.B0, adapter.A0, rows(x)))
    c = (adapter.low_rank.scale * (X @ A.T) @ B.T).reshape(y.shape)
    u = unit(dtype)
    assert (abs(y - base) <= 2 * gamma(i + r + 4, u) * c + gamma(3, u) * abs(base)).all()


@settings(max_examples=6)
@given(seed=seeds, kind=kinds)
def test_at_the_start_a_network_is_the_base_but_for_roundings(seed, kind):
    def both(dtype):
        model, rng = network(seed, kind, dtype)
        ids, _ = batch(rng)
        y = model(ids)[0]
        with disabled(model):
            return y, model(ids)[0]

    assert_precision_scales(both)


def lost(W):
    """What a decomposition of W loses at most: p u |W| with a modest p, 50 times its longer side here."""
    return gamma(50 * max(W.shape)) * float(np.linalg.norm(W))


@given(seed=seeds, o=wide, i=wide, r=st.integers(1, 3), alpha=st.sampled_from([1.0, 7.0, 32.0]))
def test_pissa_is_the_best_approximation_of_W_and_halves_its_singular_values(seed, o, i, r, alpha):
    """Eckart and Young: what is left of W has its other singular values, and BᵀB = A Aᵀ = S / s."""
    tree, adapter, _ = one(seed, o, i, r, "pissa", alpha=alpha)
    W, (A, B, s) = tree["q_proj"].base.weight.data, (adapter.A0, adapter.B0, adapter.low_rank.scale)
    S, left = (np.linalg.svd(X)[1] for X in (W, W - s * B @ A))
    error = lost(W)
    assert s == alpha / r
    assert abs(left[: len(S) - r] - S[r:]).max() <= error
    assert left[len(S) - r :].max() <= error
    for square in (B.T @ B, A @ A.T):
        assert abs(square - np.eye(r) * (S[:r] / s)).max() <= error * (1 + 1 / s)


@given(seed=seeds, o=wide, i=wide, r=st.integers(1, 3))
def test_olora_holds_the_first_columns_of_W_and_all_of_W_in_their_span(seed, o, i, r):
    tree, adapter, _ = one(seed, o, i, r, "olora")
    W, (A, B) = tree["q_proj"].base.weight.data, (adapter.A0, adapter.B0)
    error = lost(W)
    assert abs(B.T @ B - np.eye(r)).max() <= lost(np.eye(max(o, i)))
    assert abs(A - B.T @ W).max() <= error
    assert abs((B @ A)[:, :r] - W[:, :r]).max() <= error
    assert A.shape == (r, i)


@given(seed=seeds, o=wide, i=wide, r=st.integers(1, 3), scale=st.sampled_from([1.0, 16.0, 64.0]))
def test_lora_ga_takes_the_first_right_and_the_next_left_directions_of_the_gradient(seed, o, i, r, scale):
    """|G Aᵀ|² = c² (σ_1² + ... + σ_r²) and |Bᵀ G|² = c² (σ_r+1² + ... + σ_2r²), the rows orthogonal."""
    rng = np.random.default_rng(seed)
    W, G = rng.standard_normal((o, i)), rng.standard_normal((o, i))
    B, A = lora_ga({"q_proj": G}, scale)("q_proj", W, r, 2.0)
    c, squares = o**0.25 / math.sqrt(scale), to_host(np.linalg.svd(G)[1]) ** 2
    for square in (A @ A.T, B.T @ B):
        assert abs(square - c * c * np.eye(r)).max() <= c * c * lost(np.eye(max(o, i)))
    first, second = (float((part**2).sum()) / (c * c) for part in (G @ A.T, B.T @ G))
    assert first == pytest.approx(squares[:r].sum(), rel=1e-12)
    assert second == pytest.approx(squares[r : 2 * r].sum(), rel=1e-12)
    default = lora_ga({"q_proj": G})("q_proj", W, r, 2.0)[1]
    assert float(abs(4 * default - math.sqrt(scale) * A).max()) <= 1e-14 * c * scale  # γ is 16


@settings(max_examples=5)
@given(seed=seeds, tie=st.booleans())
def test_weight_gradients_are_those_of_training_all_weights(seed, tie):
    model, rng = tiny(seed, tie_word_embeddings=tie)
    ids, labels = batch(rng)
    before = digest(model), {path: p.trainable for path, p in named_params(model).items()}
    found = weight_gradients(model, ids, labels)
    assert (digest(model), {path: p.trainable for path, p in named_params(model).items()}) == before
    assert all(p.grad is None for p in named_params(model).values())
    assert found.keys() == {path for path, layer in bases(model).items() if isinstance(layer, Linear)}
    unfreeze(model)
    _, g = gradients(model, ids, labels)
    assert all(np.array_equal(G, g[f"{path}.weight"]) for path, G in found.items())


def test_weight_gradients_beside_an_adapter_are_those_of_its_base():
    """At a fresh start, where the model is the base; the adapter is left as it is."""
    model, rng = tiny(1)
    ids, labels = batch(rng)
    plain = weight_gradients(model, ids, labels)
    inject(model, PLAIN, rng=rng)
    beside = weight_gradients(model, ids, labels)
    assert beside.keys() == plain.keys()
    assert all(np.array_equal(beside[path], G) for path, G in plain.items())
    assert all(p.trainable and p.grad is None for p in trained(model).values())
    assert set(trained(model)) == {path for path in named_params(model) if path[-2:] in (".A", ".B")}


# ---- beside the base


def whole(seed, o, i, r):
    """A layer in which nothing rounds: whole numbers, and s = 4."""
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return rng.integers(-4, 5, shape).astype(np.float64)

    base = Linear(Param(draw(o, i), trainable=False), Param(draw(o), trainable=False))
    adapter = Started(LowRank(Param(draw(r, i)), Param(draw(o, r)), 4.0), draw(o, r), draw(r, i), "")
    return base, adapter, draw


@given(seed=seeds, o=wide, i=wide, r=st.integers(1, 3))
def test_it_is_lora_beside_W_less_the_start(seed, o, i, r):
    """As PEFT trains it: the output and all gradients of LoRA beside a Linear of W - s B₀ A₀."""
    base, adapter, draw = whole(seed, o, i, r)
    x, dy = draw(2, 4, i), draw(2, 4, o)
    y, back = adapter(base, x)
    dx = back(dy.copy())
    pair = adapter.low_rank
    found = {"A": pair.A.grad, "B": pair.B.grad}
    pair.A.grad = pair.B.grad = None
    residual = Linear(Param(base.weight.data - 4 * adapter.B0 @ adapter.A0, trainable=False), base.bias)
    y_, back_ = pair(residual, x)
    assert np.array_equal(y, y_)
    assert np.array_equal(dx, back_(dy.copy()))
    assert np.array_equal(found["A"], pair.A.grad)
    assert np.array_equal(found["B"], pair.B.grad)


@given(seed=seeds, o=wide, i=wide, r=st.integers(1, 3))
def test_change_and_merged_are_s_BA_less_the_start_and_follow_the_scale(seed, o, i, r):
    base, adapter, draw = whole(seed, o, i, r)
    pair, x = adapter.low_rank, draw(2, 4, i)
    for s in (4.0, -2.0, 0.0):
        pair.scale = s
        delta = s * (pair.B.data @ pair.A.data - adapter.B0 @ adapter.A0)
        B, A, scale = adapter.change(base)
        assert (B.shape, A.shape) == ((o, 2 * r), (2 * r, i))
        assert np.array_equal(scale * B @ A, delta)
        merged = adapter.merged(base)
        assert np.array_equal(merged.weight.data, base.weight.data + delta)
        assert np.array_equal(merged(x)[0], adapter(base, x)[0])
        assert not merged.weight.trainable


@given(seed=seeds, o=wide, i=wide, r=st.integers(1, 3), kind=kinds, bias=st.booleans())
def test_a_layers_gradient_matches_the_complex_step(seed, o, i, r, kind, bias):
    tree, adapter, rng = one(seed, o, i, r, kind, bias=bias)
    moved(tree, rng)
    base = tree["q_proj"].base
    params = {"A": adapter.low_rank.A, "B": adapter.low_rank.B}
    assert_layer_gradient(lambda x: adapter(base, x), params, rng.standard_normal((2, 4, i)), rng)


@settings(max_examples=6)
@given(seed=seeds, kind=kinds)
def test_the_networks_gradient_matches_the_complex_step(seed, kind):
    model, rng = network(seed, kind)
    ids, labels = batch(rng)
    moved(model, rng)
    _, g = gradients(model, ids, labels)
    everything, params = named_params(model), trained(model)

    def value(arrays):
        wide = np.result_type(*arrays.values())
        for path, p in everything.items():
            p.data = arrays[path] if path in arrays else p.data.real.astype(wide)
        return model.loss(ids, labels)[0]

    assert_gradient(value, {path: p.data for path, p in params.items()}, g, rng, directions=2)


@pytest.mark.parametrize("need", [Need.WEIGHTS, Need.NONE])
def test_without_a_need_of_dx_none_is_made(need):
    base, adapter, draw = whole(0, 7, 6, 2)
    back = adapter(base, draw(2, 4, 6), need)[1]
    assert back(draw(2, 4, 7)) is None
    assert adapter.low_rank.A.grad is not None


# ---- its life


def test_the_base_is_untouched_to_the_bit():
    model, rng = tiny(0, np.float32)
    arrays, before = {path: p.data for path, p in named_params(model).items()}, digest(model)
    ids, labels = batch(rng)
    start = lora_ga(weight_gradients(model, ids, labels))
    inject(model, StartConfig(PLAIN, start), rng=rng)
    train(model, [(ids, labels)] * 3, AdamW(1e-2), steps=3)
    merge(model)
    unmerge(model)
    as_lora(model)
    tree = {path.replace(".", "/"): layer.base for path, layer in owners(model) if isinstance(layer, Adapted)}
    for path, p in named_params(tree).items():
        assert p.data is arrays[path.replace("/", ".")]
    for layer in adapted(model).values():
        layer.adapters, layer.active = {}, None
    fresh, _ = tiny(0, np.float32)
    assert digest(bases(model)) == digest(bases(fresh))
    assert digest(fresh) == before


def test_training_moves_the_factors_and_never_their_start():
    model, rng = network(3, dtype=np.float32)
    started = [layer.adapters["default"] for layer in adapted(model).values()]
    before = [(a.B0.copy(), a.A0.copy()) for a in started]
    assert all(
        np.array_equal(a.low_rank.B.data, a.B0) and np.array_equal(a.low_rank.A.data, a.A0) for a in started
    )
    ids, labels = batch(rng)
    losses = train(model, [(ids, labels)] * 5, AdamW(1e-2), steps=5).loss
    assert losses[-1] < losses[0]
    for adapter, (B0, A0) in zip(started, before, strict=True):
        assert np.array_equal(adapter.B0, B0)
        assert np.array_equal(adapter.A0, A0)
        assert not np.array_equal(adapter.low_rank.B.data, B0)
        assert not np.array_equal(adapter.low_rank.A.data, A0)
    assert len(trained(model)) == 2 * len(started)


def test_it_is_counted_and_scaled_as_any_adapter():
    model, rng = tiny(2)
    report = inject(model, StartConfig(PLAIN, pissa), rng=rng)
    assert {(row.kind, row.r, row.scale) for row in report.rows} == {("Started", 3, 7 / 3)}
    assert report.parameters == sum(p.size for p in trained(model).values())
    ids, _ = batch(rng)
    moved(model, rng)
    assert {len(s) for s in spectrum(model).values()} == {6}
    assert set(scales(model).values()) == {7 / 3}
    set_scale(model, 0.0)
    off = model(ids)[0]
    inject(model, PLAIN, rng=rng, name="zero")
    assert np.array_equal(model(ids)[0], off)


@pytest.mark.parametrize("way", [merge, as_lora])
@settings(max_examples=4)
@given(seed=seeds, kind=kinds)
def test_merged_and_as_a_plain_lora_a_network_only_rounds(way, seed, kind):
    def both(dtype):
        model, rng = network(seed, kind, dtype)
        ids, _ = batch(rng)
        base = model(ids)[0]
        moved(model, rng)
        y = model(ids)[0]
        assert not np.allclose(y, base)
        way(model)
        return y, model(ids)[0]

    assert_precision_scales(both)


@pytest.mark.parametrize("kind", ["pissa", "olora", "lora_ga"])
def test_exported_it_is_a_lora_of_twice_the_rank_with_the_same_change(kind, tmp_path):
    model, rng = network(4, kind, np.float32)
    ids, _ = batch(rng)
    moved(model, rng)
    changes = {path: layer.adapters["default"].change(layer.base) for path, layer in adapted(model).items()}
    as_lora(model)
    for path, layer in adapted(model).items():
        pair = layer.adapters["default"]
        assert type(pair) is LowRank
        B, A, s = changes[path]
        assert (len(pair.A.data), pair.scale) == (6, s)
        assert np.array_equal(pair.B.data, B)
        assert np.array_equal(pair.A.data, A)
    plain = model(ids)[0]
    save_adapter(model, tmp_path / "a")
    assert {pair.r for pair in open_adapter(tmp_path / "a").pairs.values()} == {6}
    again, _ = tiny(4, np.float32)
    load_adapter(again, tmp_path / "a")
    assert np.array_equal(again(ids)[0], plain)


def test_beside_a_packed_base_it_starts_at_the_decoded_one():
    def both(dtype):
        model, rng = tiny(6, dtype)
        quantize(model)
        ids, _ = batch(rng)
        inject(model, StartConfig(PLAIN, pissa), rng=rng)
        assert all(layer.base.weight.packed for layer in adapted(model).values())
        y = model(ids)[0]
        with disabled(model):
            return y, model(ids)[0]

    assert_precision_scales(both)


def test_a_run_resumes_beside_its_own_start_alone(tmp_path):
    """B₀ and A₀ are in no checkpoint: they follow from the base, and their digest is compared."""

    def run(start, steps, name):
        model, rng = tiny(7, np.float32)
        inject(model, StartConfig(PLAIN, start), rng=rng)
        train(model, [batch(rng)] * 4, AdamW(1e-2), steps=steps, checkpoint=tmp_path / name)
        return digest(model)

    run(pissa, 2, "a")
    with pytest.raises(MismatchError):
        run(olora, 4, "a")
    assert run(pissa, 4, "a") == run(pissa, 4, "b")


def test_as_lora_leaves_other_adapters_alone():
    model, rng = network(5)
    inject(model, PLAIN, rng=rng, name="other")
    as_lora(model)
    for layer in adapted(model).values():
        assert type(layer.adapters["default"]) is Started  # it is not the active one
        assert len(layer.adapters["other"].A.data) == 3
    with pytest.raises(StateError, match="no adapter"):
        as_lora(tiny(0)[0])
    merge(model)
    with pytest.raises(StateError, match="merged"):
        as_lora(model)


# ---- errors, and another device


@pytest.mark.parametrize(
    ("config", "start", "error", "match"),
    [(LoraConfig(3, dora=True), pissa, ConfigError, "q_proj is DoRA; expected LoRA on linear maps"),
     (LoraConfig(3, targets="embed_tokens"), pissa, ConfigError, "is LowRankEmbedding; expected LoRA on lin"),
     (LoraConfig(3, modules_to_save=["norm"]), olora, ConfigError, "is FullCopy; expected LoRA on linear"),
     (LoraConfig(9), olora, ConfigError, "r is 9"),
     (LoraConfig(3, targets="q_proj"), lora_ga({"model.layers.0.self_attn.q_proj": np.ones((24, 10))}),
      MismatchError, "layers.1.self_attn.q_proj has no gradient; .*layers.0.self_attn.q_proj"),
     (LoraConfig(5, targets="k_proj"), lora_ga({"model.layers.0.self_attn.k_proj": 0}), ConfigError,
       r"r is 5 for model.layers.0.self_attn.k_proj of shape \(8, 10\); LoRA-GA takes at most 4")],
    ids=["dora", "embedding", "copy", "rank", "no gradient", "half the rank"],
)  # fmt: skip
def test_what_no_start_is_for_is_refused_and_the_model_left_as_it_was(config, start, error, match):
    model, rng = tiny(0)
    before = digest(model)
    with pytest.raises(error, match=match):
        inject(model, StartConfig(config, start), rng=rng)
    assert digest(model) == before
    assert not any(isinstance(layer, Adapted) for _, layer in owners(model))


def lived():
    """The numbers of a whole life, on the host."""
    model, rng = tiny(1, np.float32)
    ids, labels = (to_device(a) for a in batch(rng))
    start = lora_ga(weight_gradients(model, ids, labels))
    numbers = []
    for name, one in (("ga", start), ("ol", olora), ("pi", pissa)):
        inject(model, StartConfig(PLAIN, one), rng=rng, name=name)
        history = train(model, [(ids, labels)] * 2, AdamW(1e-2), steps=2)
        numbers += [history.loss, to_host(model(ids)[0])]
        merge(model)
        numbers.append(to_host(model(ids)[0]))
        unmerge(model)
        as_lora(model)
        numbers.append(to_host(model(ids)[0]))
    return numbers


@pytest.mark.skipif(LIBRARY != "numpy", reason="compares the stand-in with NumPy")
def test_device_and_host_agree_to_the_bit(request):
    host = lived()
    request.getfixturevalue("device")
    for a, b in zip(host, lived(), strict=True):
        assert np.array_equal(a, b)

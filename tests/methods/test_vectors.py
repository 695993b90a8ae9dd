"""VeRA and (IA)³: vectors alone are trained, and both can be merged."""

import math

import pytest
from helpers import gamma, seeds, tiny, unit
from hypothesis import given, settings
from hypothesis import strategies as st
from library import np
from test_lora import assert_adapted_gradient

from minilora.errors import ConfigError, MismatchError
from minilora.layers import Factors, Linear, Need, Param
from minilora.lora import active, adapted, inject, merge
from minilora.methods.vectors import IA3Config, ScaledInputs, ScaledOutputs, VeraConfig
from minilora.ops import rows, saved
from minilora.optim import AdamW
from minilora.spectra import spectrum
from minilora.training import train
from minilora.tree import freeze, replica, trained

wide = st.integers(3, 9)


def one(seed, o, i, config, dtype=np.float64, bias=True, whole=False):
    """One Linear with a moved adapter, in a tree of its own; `draw` goes on."""
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return (rng.integers(-4, 5, shape) if whole else rng.standard_normal(shape)).astype(dtype)

    tree = {"q_proj": Linear(Param(draw(o, i)), Param(draw(o)) if bias else None)}
    inject(tree, config, rng=rng)
    for p in trained(tree).values():
        p.data = draw(*p.shape)
    return tree, tree["q_proj"].adapters["default"], draw, rng


def vera(r):
    return VeraConfig(r=r, targets="q_proj")


LAYERS = {
    "vera": lambda r: vera(r),
    "ia3": lambda r: IA3Config("q_proj", ()),
    "ia3-on-the-way-in": lambda r: IA3Config("q_proj", "q_proj"),
}


# ---- both


@pytest.mark.parametrize("kind", LAYERS)
@settings(max_examples=15)
@given(seed=seeds, o=wide, i=wide, r=st.integers(1, 12), bias=st.booleans())
def test_a_layers_gradient_matches_the_complex_step(kind, seed, o, i, r, bias):
    tree, _, draw, rng = one(seed, o, i, LAYERS[kind](r), bias=bias)
    assert_adapted_gradient(tree["q_proj"], draw(2, 4, i), rng)


@pytest.mark.parametrize("kind", LAYERS)
@settings(max_examples=15)
@given(seed=seeds, o=wide, i=wide, r=st.integers(1, 12))
def test_without_a_gradient_of_x_the_others_are_the_same(kind, seed, o, i, r):
    tree, _, draw, _ = one(seed, o, i, LAYERS[kind](r))
    x, dy, found = draw(2, 4, i), draw(2, 4, o), []
    for need in (Need.ALL, Need.WEIGHTS):
        dx = tree["q_proj"](x, need)[1](dy.copy())
        assert (dx is None) == (need is Need.WEIGHTS)
        found.append([p.grad for p in trained(tree).values()])
        for p in trained(tree).values():
            p.grad = None
    assert all(np.array_equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("kind", LAYERS)
@settings(max_examples=15)
@given(seed=seeds, o=wide, i=wide, r=st.integers(1, 12))
def test_the_change_is_what_merging_adds(kind, seed, o, i, r):
    """Whole numbers: nothing rounds. The matrices of VeRA are made whole, too."""
    tree, adapter, draw, _ = one(seed, o, i, LAYERS[kind](r), whole=True)
    layer, x = tree["q_proj"], draw(2, 4, i)
    if kind == "vera":
        adapter.A, adapter.B = draw(r, i), draw(o, r)
    y, W = layer(x)[0], layer.base.weight.data
    change = adapter.change(layer.base)
    if isinstance(change, Factors):
        change = change.scale * (change.B @ change.A)
    merged = adapter.merged(layer.base)
    assert np.array_equal(W + change, merged.weight.data)
    assert np.array_equal(merged(x)[0], y)
    assert not merged.weight.trainable
    length = math.sqrt(float((change * change).sum()))
    assert math.isclose(math.hypot(*spectrum(tree)["q_proj"]), length, rel_tol=1e-12)


# ---- VeRA


def size_of(adapter, base, X):
    """|W||x| + |bias| and |b||B||d||A||x|, both (M, O), in float64."""
    A, B = adapter.matrices(base)
    A, B, W, X = (np.abs(np.asarray(a)).astype(np.float64) for a in (A, B, base.weight.data, X))
    b, d = (np.abs(p.data).astype(np.float64) for p in (adapter.b, adapter.d))
    bias = 0 if base.bias is None else np.abs(base.bias.data).astype(np.float64)
    return X @ W.T + bias, b * ((d * (X @ A.T)) @ B.T)


@settings(max_examples=15)
@given(seed=seeds, o=st.integers(1, 40), i=st.integers(1, 40), r=st.integers(1, 12), bias=st.booleans())
def test_vera_merged_and_unmerged_agree_within_a_tight_bound(seed, o, i, r, bias):
    """Beside W x: I roundings, the bias, the sum. Of ΔW x, on either side: I + r, b and d, the sum, the bias.

    Unmerged A x takes I, d one, B r, b one, the sum with W x + bias one. Merged b B and d A one each, their
    product r, the sum with W one, the product with x I, the bias one.
    """
    tree, adapter, draw, _ = one(seed, o, i, vera(r), np.float32, bias)
    layer, x, u = tree["q_proj"], draw(6, i), unit(np.float32)
    plain = layer(x)[0]
    base, change = size_of(adapter, layer.base, x)
    merge(tree)
    merged = layer(x, Need.NONE)[0]
    assert merged.dtype == plain.dtype == np.float32
    assert (np.abs(merged - plain) <= 2 * gamma(i + 2, u) * base + 2 * gamma(i + r + 4, u) * change).all()


@settings(max_examples=15)
@given(seed=seeds, o=wide, i=wide, r=st.integers(1, 12))
def test_the_gradients_of_d_and_b_are_the_papers(seed, o, i, r):
    """From ΔW = diag(b) B diag(d) A and the dense gradient dYᵀ X, entry by entry."""
    tree, adapter, draw, _ = one(seed, o, i, vera(r), whole=True)
    adapter.A, adapter.B = draw(r, i), draw(o, r)
    x, dy = draw(2, 4, i), draw(2, 4, o)
    dx = tree["q_proj"](x)[1](dy)
    A, B, b, d = adapter.A, adapter.B, adapter.b, adapter.d
    G = rows(dy).T @ rows(x)  # of W
    assert np.array_equal(b.grad, np.array([(G[j] * (B[j] @ (d.data[:, None] * A))).sum() for j in range(o)]))
    assert np.array_equal(d.grad, np.array([b.data @ (G @ A[k] * B[:, k]) for k in range(r)]))
    assert np.array_equal(dx, dy @ adapter.merged(tree["q_proj"].base).weight.data)


def test_all_layers_share_the_random_matrices_as_far_as_they_reach():
    model, rng = tiny(0)
    inject(model, VeraConfig(r=7), rng=rng)
    layers = adapted(model)
    adapters = [layer.adapters["default"] for layer in layers.values()]
    first = adapters[0]
    assert all(a.A is first.A and a.B is first.B for a in adapters)
    assert (first.A.shape, first.B.shape) == ((7, 24), (24, 7))  # o_proj reads 24, q_proj writes 24
    for a, layer in zip(adapters, layers.values(), strict=True):
        A, B = a.matrices(layer.base)
        O, I = layer.base.weight.shape  # noqa: E741
        assert np.array_equal(A, first.A[:, :I])
        assert np.array_equal(B, first.B[:O])
        assert (a.d.data == 0.1).all()
        assert not a.b.data.any()


@pytest.mark.parametrize(("r", "o", "i"), [(300, 200, 500), (200, 600, 300)])
def test_the_random_matrices_are_kaimings(r, o, i):
    rng = np.random.default_rng(0)
    tree = {"q_proj": Linear(Param(np.zeros((o, i), np.float32)))}
    inject(tree, vera(r), rng=rng)
    adapter = tree["q_proj"].adapters["default"]
    for X in (adapter.A, adapter.B):
        n = X.shape[1]  # U(-√(6/n), √(6/n)) has the variance 2/n
        assert X.dtype == np.float32
        assert 0.99 < abs(X).max() * np.sqrt(n / 6) <= 1
        assert abs(X.std() * np.sqrt(n / 2) - 1) < 6 / np.sqrt(2 * X.size)


def test_vera_keeps_neither_its_input_nor_its_output():
    tree, _, draw, _ = one(0, 6, 9, vera(2))
    _, back = tree["q_proj"](draw(2, 4, 9))
    assert {a.shape for a in saved(back).values()} <= {(8, 2), (2, 9), (6, 2)}  # u, A, B


def test_a_run_resumes_beside_its_own_random_matrices_alone(tmp_path):
    """They are in no checkpoint; their digest is compared."""

    def run(seed, steps):
        model, rng = tiny(7, np.float32)
        inject(model, VeraConfig(r=4), rng=np.random.default_rng(seed))
        batches = [(rng.integers(0, 11, (2, 5)),) * 2] * 4
        train(model, batches, AdamW(1e-2), steps=steps, checkpoint=tmp_path / "a")

    run(0, 2)
    with pytest.raises(MismatchError):
        run(1, 4)
    run(0, 4)


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"r": 0}, ConfigError, "r is 0; expected an int, at least 1"),
        ({"d_initial": float("nan")}, ConfigError, "d_initial is nan"),
        ({"targets": []}, ConfigError, "expected at least one name"),
        ({"targets": "q_prj"}, MismatchError, "nearest: "),
        (
            {"targets": "embed_tokens"},
            ConfigError,
            "embed_tokens is an embedding; expected linear maps",
        ),
    ],
)
def test_what_vera_cannot_adapt_is_an_error(options, error, said):
    model, rng = tiny(0)
    with pytest.raises(error, match=said):
        inject(model, VeraConfig(**options), rng=rng)


# ---- (IA)³


@pytest.mark.parametrize("way_in", [False, True])
@settings(max_examples=15)
@given(seed=seeds, o=st.integers(1, 40), i=st.integers(1, 40), bias=st.booleans())
def test_ia3_merged_and_unmerged_agree_within_a_tight_bound(way_in, seed, o, i, bias):
    """On either side the product takes I, the scale one and the bias one, in another order."""
    tree, adapter, draw, _ = one(
        seed, o, i, IA3Config("q_proj", "q_proj" if way_in else ()), np.float32, bias
    )
    layer, x = tree["q_proj"], draw(6, i)
    plain = layer(x)[0]
    W, X, s = (np.abs(np.asarray(a)).astype(np.float64) for a in
               (layer.base.weight.data, x, adapter.scale.data))  # fmt: skip
    b = np.abs(np.asarray(layer.base.bias.data)).astype(np.float64) if bias else 0
    size = (s * X) @ W.T + b if way_in else s * (X @ W.T + b)
    merge(tree)
    merged = layer(x, Need.NONE)[0]
    assert merged.dtype == plain.dtype == np.float32
    assert (np.abs(merged - plain) <= 2 * gamma(i + 2, unit(np.float32)) * size).all()


def test_ia3_scales_keys_values_and_the_inside_of_the_mlp():
    model, rng = tiny(0, mlp_bias=True)
    report = inject(model, IA3Config(), rng=rng)
    layers = adapted(model)
    assert {path.rpartition(".")[2] for path in layers} == {"k_proj", "v_proj", "down_proj"}
    assert len(report.rows) == 6
    for path, layer in layers.items():
        O, I = layer.base.weight.shape  # noqa: E741
        adapter = layer.adapters["default"]
        way_in = path.endswith("down_proj")
        assert type(adapter) is (ScaledInputs if way_in else ScaledOutputs)
        assert adapter.scale.shape == ((I if way_in else O),)
        assert (adapter.scale.data == 1).all()


def test_a_scale_on_the_way_in_leaves_the_bias_alone_and_one_on_the_way_out_does_not():
    for way_in in (False, True):
        tree, adapter, _, _ = one(0, 4, 6, IA3Config("q_proj", "q_proj" if way_in else ()), whole=True)
        layer, zero = tree["q_proj"], np.zeros((2, 6))
        bias = layer.base.bias.data
        expected = bias if way_in else adapter.scale.data * bias
        assert np.array_equal(layer(zero)[0], np.stack([expected, expected]))
        before = bias.copy()
        assert np.array_equal(adapter.merged(layer.base).bias.data, expected)
        assert np.array_equal(bias, before)


def test_a_scale_on_the_way_out_keeps_the_bases_output_and_one_on_the_way_in_its_input():
    for way_in, kept in ((False, (2, 4, 5)), (True, (2, 4, 9))):
        tree, _, draw, _ = one(0, 5, 9, IA3Config("q_proj", "q_proj" if way_in else ()))
        _, back = tree["q_proj"](draw(2, 4, 9))
        assert {a.shape for a in saved(back).values() if a.ndim == 3} == {kept}


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"targets": "embed_tokens"}, ConfigError, "embed_tokens is an embedding; expected linear maps"),
        ({"feedforward": "q_proj"}, ConfigError, "feedforward: model.layers.0.self_attn.q_proj is no target"),
        ({"feedforward": "down_prj"}, MismatchError, "nearest: "),
        ({"feedforward": 3}, ConfigError, "feedforward is 3; expected a name or a list of names"),
        ({"targets": ""}, ConfigError, "expected"),
    ],
)  # fmt: skip
def test_what_ia3_cannot_scale_is_an_error(options, error, said):
    model, rng = tiny(0)
    with pytest.raises(error, match=said):
        inject(model, IA3Config(**options), rng=rng)


def test_beside_a_frozen_scale_of_inputs_nothing_learns():
    """Where another row's adapter is trained, in a mixed batch say."""
    tree, adapter, draw, _ = one(0, 4, 5, LAYERS["ia3-on-the-way-in"](3))
    freeze(tree)
    _, back = adapter(tree["q_proj"].base, draw(2, 3, 5), Need.WEIGHTS)
    assert back(draw(2, 3, 4)) is None
    assert adapter.scale.grad is None


def test_replicas_share_the_random_matrices():
    model, rng = tiny(0)
    inject(model, VeraConfig(r=4), rng=rng)
    own, theirs = (
        adapter for tree in (model, replica(model)) for adapter in [next(iter(active(tree).values()))]
    )
    assert own is not theirs
    assert theirs.A is own.A
    assert theirs.B is own.B


def test_the_inputs_that_are_scaled_are_those_of_down_proj_unless_told():
    model, rng = tiny(0)
    kinds = {}
    for name, targets in (("a", ("q_proj", "down_proj")), ("b", ("q_proj",))):
        inject(model, IA3Config(targets), rng=rng, name=name)
        kinds[name] = {path.rpartition(".")[2]: type(adapter) for path, adapter in active(model).items()}
    assert kinds == {
        "a": {"q_proj": ScaledOutputs, "down_proj": ScaledInputs},
        "b": {"q_proj": ScaledOutputs},
    }


def test_two_zeros_that_would_never_learn_are_refused():
    with pytest.raises(ConfigError, match="d_initial is 0"):
        VeraConfig(d_initial=0.0)


def test_the_defaults_are_pefts():
    """Compared with PEFT itself in test_parity_rivals.py."""
    assert VeraConfig() == VeraConfig(256, "all-linear", 0.1)
    assert IA3Config() == IA3Config(("k_proj", "v_proj", "down_proj"), None)

"""The laws of every rival of LoRA: frozen means frozen, the start, the gradient, one training for all."""

import pytest
from helpers import SIZES, assert_gradient, batch, gradients, same_bits, seeds, stored, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from library import LIBRARY, np
from test_lora import network_value

from minilora.adapters import disabled, remove
from minilora.backend import to_device, to_host
from minilora.decoding import generate, past_of
from minilora.errors import UnsupportedError
from minilora.lora import fuse, inject, merge, set_adapter, unmerge
from minilora.methods.bottleneck import HOULSBY, PFEIFFER, BottleneckConfig
from minilora.methods.prefixes import PrefixTuningConfig, PromptTuningConfig
from minilora.methods.vectors import IA3Config, VeraConfig
from minilora.optim import AdamW
from minilora.peft.loading import save_adapter
from minilora.spectra import spectrum
from minilora.training import evaluate, train
from minilora.tree import digest, named_params, size, trained

D, F, L = (SIZES[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers"))
HE, GE = (SIZES["head_dim"] * SIZES[f"num_{name}_heads"] for name in ("attention", "key_value"))
OUTPUTS = HE + GE + GE + D + F + F + D  # of the seven linear maps of a block

RIVALS = {  # what it is -> (its config, trained parameters of the tiny model)
    "vera": (VeraConfig(r=5), L * (OUTPUTS + 7 * 5)),
    "ia3": (IA3Config(), L * (GE + GE + F)),
    "houlsby": (BottleneckConfig(3, HOULSBY), 2 * L * (2 * 3 * D + 3 + D)),
    "pfeiffer": (BottleneckConfig(4, PFEIFFER), L * (2 * 4 * D + 4 + D)),
    "prefix": (PrefixTuningConfig(3), L * 2 * 3 * GE),
    "prompt": (PromptTuningConfig(3), 3 * D),
}
MERGED = ["vera", "ia3"]
AS_THE_BASE = [kind for kind in RIVALS if kind not in ("prefix", "prompt")]
kinds = st.sampled_from(list(RIVALS))
flags = st.fixed_dictionaries({"tie_word_embeddings": st.booleans(), "attention_bias": st.booleans()})


def fresh(kind, seed=0, dtype=np.float64, **how):
    """A tiny model with a fresh rival, and the generator that goes on."""
    model, rng = tiny(seed, dtype, **how)
    inject(model, RIVALS[kind][0], rng=rng)
    return model, rng


def moved(kind, seed=0, dtype=np.float64, **how):
    """The like with parameters that have left their start."""
    model, rng = fresh(kind, seed, dtype, **how)
    for p in trained(model).values():
        p.data = p.data + to_device((0.3 * rng.standard_normal(p.shape)).astype(p.dtype))
    return model, rng


@pytest.mark.parametrize("kind", RIVALS)
@settings(max_examples=3)
@given(seed=seeds, flags=flags)
def test_the_networks_gradient_matches_the_complex_step(kind, seed, flags):
    model, rng = moved(kind, seed, **flags)
    ids, labels = batch(rng)
    _, g = gradients(model, ids, labels)
    params = trained(model)
    data = {k: p.data for k, p in params.items()}
    assert all(gradient.any() for gradient in g.values())
    assert_gradient(network_value(model, params, ids, labels), data, g, rng, directions=3)


@pytest.mark.parametrize("kind", AS_THE_BASE)
@settings(max_examples=3)
@given(seed=seeds, flags=flags, dtype=st.sampled_from([np.float32, np.float64]))
def test_a_fresh_one_is_exactly_the_base(kind, seed, flags, dtype):
    model, rng = tiny(seed, dtype, **flags)
    ids, labels = batch(rng)
    base = model(ids)[0]
    inject(model, RIVALS[kind][0], rng=rng)
    assert np.array_equal(model(ids)[0], base)
    assert np.array_equal(model(ids, train=True)[0], base)
    _, g = gradients(model, ids, labels)
    assert any(gradient.any() for gradient in g.values())  # and it does not stay there


@pytest.mark.parametrize("kind", RIVALS)
def test_what_is_trained_is_counted(kind):
    model, rng = tiny(0)
    base = size(model)
    config, count = RIVALS[kind]
    report = inject(model, config, rng=rng)
    assert report.parameters == size(trained(model)) == count
    assert (report.base_parameters, size(model)) == (base, base + count)
    assert all(".adapters.default." in path for path in trained(model))
    assert f"{count:,} of {base:,} parameters are trained" in str(report)


@pytest.mark.parametrize("kind", RIVALS)
def test_training_learns_and_leaves_every_bit_of_the_base(kind):
    model, rng = fresh(kind, dtype=np.float32)
    ids, labels = batch(rng)
    before, start = stored(model), {k: p.data.copy() for k, p in trained(model).items()}
    base = evaluate(model, [(ids, labels)])
    losses = train(model, [(ids, labels)] * 30, AdamW(0.03, weight_decay=0.1), steps=30).loss
    assert same_bits(stored(model), before)
    assert losses[-1] < base - 0.02
    for k, p in trained(model).items():
        assert p.dtype == np.float32
        assert not np.array_equal(p.data, start[k]), k


@pytest.mark.parametrize("kind", RIVALS)
@pytest.mark.parametrize(
    "how",
    [{"threads": 2}, {"recompute": "selective"}, {"recompute": "full"}],
    ids=["threads", "selective", "full"],
)
def test_threads_and_recomputation_change_no_bit(kind, how):
    def run(**how):
        model, rng = moved(kind, dtype=np.float32)
        batches = [batch(rng) for _ in range(4)]
        losses = train(model, batches, AdamW(0.01), steps=2, accumulate=2, **how).loss
        return losses, digest(model)

    assert run(**how) == run(threads=1)


@pytest.mark.parametrize("kind", RIVALS)
def test_a_resumed_run_is_the_run(kind, tmp_path):
    def run(steps, name):
        model, rng = fresh(kind, 7, np.float32)
        train(model, [batch(rng)] * 4, AdamW(1e-2), steps=steps, checkpoint=tmp_path / name)
        return digest(model)

    run(2, "a")
    assert run(4, "a") == run(4, "b")


@pytest.mark.parametrize("kind", RIVALS)
def test_it_is_switched_off_taken_away_and_exchanged(kind):
    model, rng = tiny(3)
    ids, _ = batch(rng)
    base, before = model(ids)[0], digest(model)
    inject(model, RIVALS[kind][0], rng=rng)
    for p in trained(model).values():
        p.data = p.data + 0.5
    y = model(ids)[0]
    assert y.shape == base.shape
    assert not np.array_equal(y, base)
    with disabled(model):
        assert np.array_equal(model(ids)[0], base)
    inject(model, RIVALS[kind][0], rng=rng, name="other")
    assert all(".adapters.other." in path for path in trained(model))
    assert not np.array_equal(model(ids)[0], y)
    set_adapter(model, "default")
    assert np.array_equal(model(ids)[0], y)
    remove(model, "other")
    remove(model, "default")
    assert np.array_equal(model(ids)[0], base)
    assert digest(model) == before


@pytest.mark.parametrize("kind", RIVALS)
def test_single_precision_stays_single(kind):
    model, rng = moved(kind, dtype=np.float32)
    ids, labels = batch(rng)
    assert model(ids)[0].dtype == np.float32
    assert {g.dtype for g in gradients(model, ids, labels)[1].values()} == {np.dtype(np.float32)}


@pytest.mark.parametrize("kind", RIVALS)
@pytest.mark.parametrize("tie", [False, True])
def test_cached_decoding_is_the_full_forward(kind, tie):
    """Token by token after a start of three; and the tokens that `generate` draws are those of all."""
    model, rng = moved(kind, 2, tie_word_embeddings=tie)
    ids, _ = batch(rng)
    full, T = model(ids)[0], ids.shape[1]
    past = past_of(model, len(ids), T)
    for start, stop in [(0, 3), *((t, t + 1) for t in range(3, T))]:
        last = model.forward(to_device(ids[:, start:stop]), past=past)[0]
        assert last.shape == (len(ids), 1, full.shape[-1])
        assert np.allclose(last[:, 0], full[:, stop - 1], rtol=0, atol=1e-12 * float(abs(full).max()))
    tokens = list(generate(model, ids, 6, rng=rng, temperature=0))
    for token in tokens:
        best = to_host(model(ids)[0][:, -1]).argmax(-1)
        assert np.array_equal(to_device(token), to_device(best))
        ids = np.concatenate([ids, to_device(token)[:, None]], 1)


@pytest.mark.parametrize("kind", sorted({*RIVALS} - {*MERGED}))
@pytest.mark.parametrize("how", [merge, fuse])
def test_what_cannot_be_merged_says_so_and_nothing_has_changed(kind, how):
    model, rng = moved(kind)
    ids, _ = batch(rng)
    y, before = model(ids)[0], digest(model)
    with pytest.raises(UnsupportedError, match="cannot be merged; use it as it is"):
        how(model)
    assert digest(model) == before
    assert np.array_equal(model(ids)[0], y)
    assert spectrum(model) == {}


@pytest.mark.parametrize("kind", MERGED)
def test_a_merged_network_is_the_network(kind):
    model, rng = moved(kind, 5)
    ids, _ = batch(rng)
    y = model(ids)[0]
    merge(model)
    merged = model(ids)[0]
    assert np.allclose(merged, y, rtol=0, atol=1e-12 * abs(y).max())
    unmerge(model)
    assert np.array_equal(model(ids)[0], y)
    fuse(model)
    assert np.array_equal(model(ids)[0], merged)
    assert not any("adapters" in path for path in named_params(model))


@pytest.mark.parametrize("kind", RIVALS)
def test_a_form_in_pefts_files_is_refused_by_name(kind, tmp_path):
    model, _ = moved(kind, dtype=np.float32)
    with pytest.raises(UnsupportedError, match="cannot be stored in PEFT's files"):
        save_adapter(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()


@pytest.mark.skipif(LIBRARY != "numpy", reason="compares the stand-in with NumPy")
@pytest.mark.parametrize("kind", RIVALS)
def test_device_and_host_agree_to_the_bit(kind, request):
    def life():
        model, rng = moved(kind, 1, np.float32)
        ids, labels = (to_device(a) for a in batch(rng))
        losses = train(model, [(ids, labels)] * 4, AdamW(0.01, weight_decay=0.1), steps=2, accumulate=2).loss
        numbers = [losses, to_host(model(ids)[0]), digest(model)]
        if kind in MERGED:
            fuse(model)
        return [*numbers, to_host(model(ids)[0])]

    host = life()
    request.getfixturevalue("device")
    for a, b in zip(host, life(), strict=True):
        assert np.array_equal(a, b)

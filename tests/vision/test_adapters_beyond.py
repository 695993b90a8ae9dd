"""The adapters of language on a vision transformer and a diffusion model: the same laws, the same files."""

import numpy
import pytest
from helpers import assert_gradient, assert_precision_scales, dtypes, gradients, same_bits, seeds, stored
from hypothesis import given, settings
from hypothesis import strategies as st
from library import np
from models import EVERYTHING, KINDS, answer, batch_of, lora_of, model_of

from minilora.adapters import disabled
from minilora.backend import to_device, to_host
from minilora.errors import InputError, MismatchError, StateError
from minilora.fast.recompute import HOW, Recomputed, recompute
from minilora.layers import Factors
from minilora.lora import active, adapted, fuse, inject, merge, unmerge
from minilora.methods.bottleneck import BottleneckConfig
from minilora.methods.intrinsic import subspace
from minilora.methods.lora_config import LoraConfig
from minilora.methods.prefixes import PrefixTuningConfig
from minilora.methods.vectors import IA3Config, VeraConfig
from minilora.ops import saved
from minilora.optim import AdamW
from minilora.peft.loading import load_adapter, save_adapter
from minilora.spectra import spectrum, spectrum_between
from minilora.training import train
from minilora.tree import digest, freeze, named_params, trained

few, fewer = settings(max_examples=3), settings(max_examples=2)
kinds = pytest.mark.parametrize("kind", KINDS)
CONFIGS = {
    "all weights": None,
    "lora": {},
    "dropout": {"dropout": 0.3},
    "dora": {"dora": True, "targets": "all-linear"},
    "biases": {"bias": "all", "targets": "all-linear"},
    "norms": {"modules_to_save": ("norm", "input_layernorm", "post_attention_layernorm")},
}


@kinds
@pytest.mark.parametrize("how", [how for how in CONFIGS if how != "dropout"])
@fewer
@given(seed=seeds)
def test_the_networks_gradient_matches_the_complex_step(kind, how, seed):
    model, rng = model_of(kind, seed) if CONFIGS[how] is None else lora_of(kind, seed, **CONFIGS[how])
    one = batch_of(kind, rng, n=2)
    _, found = gradients(model, *one)
    everything, params = named_params(model), trained(model)
    data = {path: p.data for path, p in params.items()}

    def value(arrays):
        for path, p in everything.items():
            p.data = arrays[path] if path in arrays else p.data.real.astype(complex)
        return model.loss(*one)[0]

    assert_gradient(value, data, found, rng, directions=1)


RIVALS = {
    "VeRA": VeraConfig(3), "(IA)³": IA3Config(), "bottleneck": BottleneckConfig(3),
    "prefix tuning": PrefixTuningConfig(3),
}  # fmt: skip


@kinds
@pytest.mark.parametrize("rival", RIVALS)
@fewer
@given(seed=seeds)
def test_other_adapters_have_the_gradient_of_the_complex_step(kind, rival, seed):
    model, rng = model_of(kind, seed)
    inject(model, RIVALS[rival], rng=rng)
    one, everything, params = batch_of(kind, rng, n=2), named_params(model), trained(model)
    for p in params.values():
        p.data = p.data + to_device(0.3 * rng.standard_normal(p.shape))
    _, found = gradients(model, *one)

    def value(arrays):
        for path, p in everything.items():
            p.data = arrays[path] if path in arrays else p.data.real.astype(complex)
        return model.loss(*one)[0]

    assert_gradient(value, {path: p.data for path, p in params.items()}, found, rng, directions=1)


@kinds
@few
@given(seed=seeds, dtype=dtypes)
def test_every_result_keeps_the_dtype(kind, seed, dtype):
    model, rng = lora_of(kind, seed, dtype)
    one = batch_of(kind, rng, dtype)
    loss, back = model.loss(*one, train=True)
    arrays = [loss, answer(model, one), *(a for a in saved(back).values() if a.dtype.kind == "f")]
    back()
    arrays += [p.grad for p in trained(model).values()]
    merge(model)
    assert {a.dtype for a in [*arrays, answer(model, one)]} == {np.dtype(dtype)}


@kinds
@pytest.mark.parametrize(
    "depth",
    ["", "layers.1.mlp.down_proj", "layers.0.self_attn.q_proj", "patch_embedding", "position_embedding",
     "time.up_proj", "encoder.norm"],
)  # fmt: skip
def test_a_frozen_part_has_no_gradient_and_what_is_trained_has_that_of_the_whole(kind, depth):
    """Whatever the lowest trained layer is; with none, the head alone."""
    model, rng = model_of(kind)
    one = batch_of(kind, rng)
    _, whole = gradients(model, *one)
    head = "classifier" if kind == "vit" else "output"
    freeze(model, keep=lambda path: path.startswith(head) or bool(depth and depth in path))
    _, found = gradients(model, *one)
    assert found.keys() == {path for path in whole if path.startswith(head) or (depth and depth in path)}
    assert all(np.array_equal(g, whole[path]) for path, g in found.items())
    _, back = model.loss(*one, train=True)
    kept = sum(a.size for a in saved(back).values())
    freeze(model, keep=lambda path: True)
    assert kept < sum(a.size for a in saved(model.loss(*one, train=True)[1]).values())


@kinds
@few
@given(seed=seeds)
def test_a_fresh_adapter_is_the_base_and_only_B_has_a_gradient(kind, seed):
    model, rng = model_of(kind, seed)
    one = batch_of(kind, rng)
    before = answer(model, one)
    inject(model, LoraConfig(r=3, targets="all-linear"), rng=rng)
    assert np.array_equal(answer(model, one), before)
    _, found = gradients(model, *one)
    assert {path[-1] for path in found} == {"A", "B"}
    assert all(bool(g.any()) == path.endswith("B") for path, g in found.items())


@kinds
@few
@given(seed=seeds)
def test_merged_is_unmerged_and_unmerge_restores_every_bit(kind, seed):
    def both(dtype):
        model, rng = lora_of(kind, seed, dtype)
        one = batch_of(kind, rng, dtype)
        plain = answer(model, one)
        merge(model)
        merged = answer(model, one)
        with pytest.raises(StateError, match="unmerge"):
            model.loss(*one, train=True)
        unmerge(model)
        assert np.array_equal(answer(model, one), plain)
        fuse(model)
        assert np.array_equal(answer(model, one), merged)
        return merged, plain

    assert_precision_scales(both)


@kinds
@pytest.mark.parametrize("how", [how for how in CONFIGS if CONFIGS[how] is not None])
def test_training_an_adapter_lowers_the_loss_and_leaves_the_base_as_it_was(kind, how):
    model, rng = lora_of(kind, dtype=np.float32, **CONFIGS[how])
    one, before = batch_of(kind, rng, np.float32), stored(model)
    first = float(model.loss(*one)[0])
    train(model, [one] * 30, AdamW(3e-3), steps=30, threads=1)
    assert float(model.loss(*one)[0]) < 0.9 * first
    assert same_bits(stored(model), before)
    with disabled(model):
        assert np.array_equal(answer(model, one), answer(model_of(kind, dtype=np.float32)[0], one))


@kinds
def test_activation_checkpointing_and_threads_change_no_bit(kind):
    found = []
    ways = ({"threads": 1}, {"threads": 2}, *({"threads": 1, "recompute": how} for how in HOW))
    for way in ways:
        model, rng = lora_of(kind, dtype=np.float32, dropout=0.2)
        batches = [batch_of(kind, rng, np.float32) for _ in range(6)]
        history = train(model, batches, AdamW(1e-2), steps=3, accumulate=2, **way)
        found.append((history.loss, digest(model)))
    assert all(other == found[0] for other in found[1:])
    recompute(model, "full")
    assert [type(block) for block in model.encoder.layers] == [Recomputed] * 2


@kinds
@pytest.mark.parametrize("how", ["lora", "dora", "biases", "norms"])
def test_saved_and_loaded_is_the_same_adapter(kind, how, tmp_path):
    model, rng = lora_of(kind, dtype=np.float32, **CONFIGS[how])
    train(model, [batch_of(kind, rng, np.float32)] * 2, AdamW(1e-2), steps=2, threads=1)
    save_adapter(model, tmp_path / "a")
    again, _ = model_of(kind, dtype=np.float32)
    load_adapter(again, tmp_path / "a")
    one = batch_of(kind, rng, np.float32)
    assert np.array_equal(answer(again, one), answer(model, one))
    assert active(again).keys() == active(model).keys()
    other, _ = model_of(kind, seed=1, dtype=np.float32)
    with pytest.raises(MismatchError, match="another base"):
        load_adapter(other, tmp_path / "a")
    language = next(k for k in KINDS if k != kind)
    with pytest.raises(MismatchError, match="no module"):
        load_adapter(model_of(language, dtype=np.float32)[0], tmp_path / "a", force=True)


@kinds
def test_the_spectrum_is_that_of_the_difference_of_two_models(kind):
    model, _ = lora_of(kind)
    plain, _ = model_of(kind)
    thin, whole = spectrum(model), adapted(model)
    changes = {path: adapter.change(whole[path].base) for path, adapter in active(model).items()}
    assert all(isinstance(change, Factors) for change in changes.values())
    fuse(model)
    dense = spectrum_between(plain, model)
    assert thin.keys() == dense.keys() - {path for path in dense if "time" in path and path not in thin}
    for path, s in thin.items():
        assert numpy.allclose(s, dense[path][: len(s)], rtol=0, atol=1e-12 * dense[path][0])


@kinds
def test_all_linear_means_every_linear_map_and_no_embedding_of_positions(kind):
    model, rng = model_of(kind)
    report = inject(model, LoraConfig(r=2, targets="all-linear"), rng=rng)
    found = {row.module for row in report.rows}
    head = (
        {"classifier"} if kind == "vit" else {"output", *(f"time.{x}_proj" for x in ("gate", "up", "down"))}
    )
    assert found == head | {"encoder.patch_embedding"} | {
        f"encoder.layers.{i}.{name}_proj"
        for i in range(2)
        for name in (*(f"self_attn.{x}" for x in "qkvo"), "mlp.gate", "mlp.up", "mlp.down")
    }  # fmt: skip
    with pytest.raises(MismatchError, match="lm_head"):
        inject(model, LoraConfig(r=2, targets=("lm_head",)), rng=rng, name="b")


@kinds
def test_a_random_subspace_of_all_weights_is_trained_as_of_a_llama(kind):
    model, rng = model_of(kind)
    one = batch_of(kind, rng)
    space = subspace(model, 40, rng=rng)
    loss, found = gradients(space, *one)
    assert loss == model.loss(*one)[0]
    assert found["z"].shape == (40,)
    assert found["z"].all()


@kinds
@few
@given(seed=seeds, of=st.integers(0, 4))
def test_an_image_is_not_changed_by_the_others_of_its_batch(kind, seed, of):
    def both(dtype):
        model, rng = lora_of(kind, seed, dtype)
        x, _ = batch_of(kind, rng, dtype)
        alone = x[of : of + 1] if kind == "vit" else type(x)(*(a[of : of + 1] for a in x))
        return model(alone)[0], model(x)[0][of : of + 1]

    assert_precision_scales(both)


@kinds
def test_device_and_host_agree_to_the_bit(kind, request):
    def life():
        model, rng = lora_of(kind, dtype=np.float32, modules_to_save=("norm",))
        some = [batch_of(kind, rng, np.float32) for _ in range(4)]
        history = train(model, some, AdamW(1e-2), steps=4, threads=1)
        plain = to_host(answer(model, some[0]))
        merge(model)
        return history.loss, plain, to_host(answer(model, some[0])), digest(model)

    host = life()
    request.getfixturevalue("device")
    for a, b in zip(host, life(), strict=True):
        assert numpy.array_equal(a, b)


PIXELS = numpy.zeros((3, 64), numpy.float32)
BAD = [PIXELS[0], PIXELS[:, :60], PIXELS[:0], PIXELS.astype(int), PIXELS[None], PIXELS.astype(bool)]


@kinds
@pytest.mark.parametrize("pixels", BAD, ids=lambda x: f"{x.dtype} {x.shape}")
def test_pixels_of_another_form_are_refused(kind, pixels):
    model, rng = lora_of(kind)
    one = batch_of(kind, rng, n=3)
    x = pixels if kind == "vit" else one[0]._replace(pixels=pixels)
    before = digest(model)
    for call in (lambda: model(x), lambda: model.loss(x, one[1][: len(pixels)], train=True)):
        with pytest.raises(InputError) as e:
            call()
        assert len(str(e.value).splitlines()) == 1
    assert digest(model) == before


@kinds
def test_a_backward_needs_a_forward_to_train(kind):
    model, rng = lora_of(kind)
    one = batch_of(kind, rng)
    _, back = model.loss(*one)
    with pytest.raises(StateError, match="train=True"):
        back()


def test_everything_is_everything():
    for kind in KINDS:
        model, _ = lora_of(kind)
        matrices = {p for p, q in named_params(model_of(kind)[0]).items() if q.data.ndim == 2}
        assert {f"{path}.weight" for path in active(model)} == matrices
    assert EVERYTHING.fullmatch("encoder.position_embedding")


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_of_another_precision_leaves_the_models(kind):
    model, rng = lora_of(kind, dtype=np.float32)
    loss, back = model.loss(*batch_of(kind, rng, np.float64), train=True)
    back()
    assert loss.dtype == np.float32
    assert {p.grad.dtype for p in trained(model).values()} == {np.dtype(np.float32)}

"""Adapters as PEFT writes them: the same function as PEFT's, there and back to the bit, and nothing guessed.

The fixtures were written by PEFT beside bases written by transformers (tests/peft_cases.py), with the logits
that these compute in float64. There norms, rotary tables and softmax are rounded to float32, whatever the
model's dtype: in each of the 2 L + 1 norms the mean of D squares, a root and a division, so logits may differ
by (2 L + 1) (D + 8) u32 of the largest of them; observed is a fifth of that.
"""

import json
import math
import os

import numpy as np
import pytest
from helpers import EVERYTHING, LINEARS, TIED, seeds, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from library import LIBRARY
from peft_cases import ADAPTERS, FIXED, FIXTURES, IDS, SHAPE, slug

from minilora.adapters import scales, set_scale
from minilora.backend import to_device, to_host
from minilora.errors import ConfigError, MismatchError, StateError, StorageError, UnsupportedError
from minilora.formats.huggingface import load, save_model
from minilora.formats.safetensors import open_tensors
from minilora.lora import adapted, fuse, inject, merge, unmerge
from minilora.methods.bias import WithBias
from minilora.methods.lora_config import LoraConfig
from minilora.peft.config import Settings, alpha_of, alphas_of, meant, peft_config, read_settings, targets
from minilora.peft.folder import CONFIG, WEIGHTS, open_adapter
from minilora.peft.loading import base_print, load_adapter, save_adapter
from minilora.tree import named_params, trained

U32 = 2.0**-24
NAMES = [f"{slug(base)}--{slug(adapter)}" for base, adapter in FIXED]


def folders(name):
    return FIXTURES / "bases" / name.split("--")[0], FIXTURES / "adapters" / name


def logits(model, ids=IDS[:, ::4]):
    return to_host(model(ids)[0])


def scramble(model, rng):
    """Random numbers in all that is trained."""
    for p in trained(model).values():
        p.data = to_device(p.data + 0.3 * to_device(rng.standard_normal(p.data.shape)).astype(p.data.dtype))


# ---- PEFT's own files


@pytest.mark.parametrize("name", NAMES)
def test_an_adapter_of_peft_computes_the_same_logits(name):
    base, folder = folders(name)
    want = np.load(folder / "logits.npy")
    model = load(base, np.float64)
    before = logits(model)
    said = load_adapter(model, folder)
    bound = (2 * SHAPE["num_hidden_layers"] + 1) * (SHAPE["hidden_size"] + 8) * U32
    difference = np.abs(logits(model) - want).max() / np.abs(want).max()
    print(f"{name}: {difference:.1e} of at most {bound:.1e}")
    assert difference <= bound
    assert np.abs(before - want).max() / np.abs(want).max() > 0.1  # the adapter does something
    assert len(said.norms) == len(open_adapter(folder).pairs)
    assert f"{len(said.norms)} of {said.modules} modules" in str(said)
    assert "its base is called 'a-tiny-llama'" in str(said)
    merge(model)
    assert np.abs(logits(model) - want).max() / np.abs(want).max() <= bound
    unmerge(model)


@pytest.mark.parametrize("name", NAMES)
def test_a_loaded_adapter_saves_to_the_same_function_and_bytes(name, tmp_path):
    base, folder = folders(name)
    model = load(base)
    load_adapter(model, folder)
    save_adapter(model, tmp_path / "a", base="a-tiny-llama")
    save_adapter(model, tmp_path / "b", base="a-tiny-llama")
    again = load(base)
    load_adapter(again, tmp_path / "a")
    assert logits(again).tobytes() == logits(model).tobytes()
    save_adapter(again, tmp_path / "c", base="a-tiny-llama")
    for file in (CONFIG, WEIGHTS):
        assert len({(tmp_path / x / file).read_bytes() for x in "abc"}) == 1
    ours, theirs = open_adapter(tmp_path / "a"), open_adapter(folder)
    extra = {"lm_head"} & ours.pairs.keys() - theirs.pairs.keys()
    assert ours.pairs.keys() - extra == theirs.pairs.keys()
    for module, pair in theirs.pairs.items():
        assert ours.pairs[module].scale == pair.scale
        for a, b in zip(ours.factors(module), theirs.factors(module), strict=True):
            assert a.tobytes() == b.tobytes()


def test_the_relative_change_matches_the_dense_matrices():
    base, folder = folders("untied--patterns")
    model = load(base, np.float64)
    said = load_adapter(model, folder)
    change = weight = 0.0
    for module, layer in adapted(model).items():
        delta, W = to_host(layer.adapters["default"].delta()), to_host(layer.base.weight.dense())
        assert math.isclose(said.norms[module][0], np.linalg.norm(delta), rel_tol=1e-12)
        change, weight = change + (delta**2).sum(), weight + (W**2).sum()
    assert math.isclose(said.share, math.sqrt(change / weight), rel_tol=1e-12)


# ---- ours


HOW = {
    "plain": {}, "rslora": {"rslora": True}, "q and v": {"targets": ["q_proj", "v_proj"]},
    "everything": {"targets": EVERYTHING}, "table": {"targets": TIED},
    "dora": {"targets": LINEARS, "dora": True},
    "patterns": {"rank_pattern": {"q_proj": 1}, "alpha_pattern": {"layers.0.self_attn.v_proj": 0.3}},
    "saved": {"targets": ["q_proj"], "modules_to_save": ["norm", "model.norm", "embed_tokens"]},
    "lora_only": {"bias": "lora_only"}, "all": {"bias": "all", "targets": ["v_proj"]},
    "excluded": {"exclude_modules": ["k_proj"]}, "layer": {"layers_to_transform": [1]},
}  # fmt: skip


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("how", sorted(HOW))
@settings(max_examples=3)
@given(seed=seeds, r=st.integers(1, 4), alpha=st.sampled_from([1, 7, 16, 0.1, 1 / 3]))
def test_saving_and_loading_are_inverse(how, tied, seed, r, alpha, tmp_path_factory):
    """To the bit: the same function (a tied head is then a layer of its own on the same numbers)."""
    folder = tmp_path_factory.mktemp("there")
    model, rng = tiny(seed, np.float32, tie_word_embeddings=tied, attention_bias=True, mlp_bias=True)
    save_model(model, folder / "base", "")
    config = LoraConfig(**{"r": r, "alpha": alpha} | HOW[how])
    inject(model, config, rng=np.random.default_rng(seed))
    scramble(model, rng)
    save_adapter(model, folder / "a")
    again = load(folder / "base")
    load_adapter(again, folder / "a")
    ids = rng.integers(0, model.config.vocab_size, (3, 5))
    want, got = logits(model, ids), logits(again, ids)
    if tied and how == "table":  # E + ΔE for the head is x Eᵀ + (x B) A, and a linear map's x Aᵀ Bᵀ
        assert np.abs(want - got).max() <= 1e-5 * np.abs(want).max()
    else:
        assert want.tobytes() == got.tobytes()
    split = {"lm_head"} if tied and how == "table" else set()  # the one pair of the table has become two
    assert {m: s for m, s in scales(again).items() if m not in split} == scales(model)
    fuse(again)
    save_model(again, folder / "merged", "")
    assert load(folder / "merged").config.tie_word_embeddings == (again.lm_head is None)


@given(st.integers(1, 512), st.floats(1e-3, 1e4))
def test_alpha_is_recovered_from_the_scale(r, alpha):
    assert alpha_of(alpha / r, r) / r == alpha / r
    assert alpha_of(16 / r, r) == 16


def test_an_rslora_adapter_is_saved_as_one():
    assert alphas_of({"a": (16 / 8**0.5, 8), "b": (3 / 2**0.5, 2)}) == ({"a": 16, "b": 3}, True)
    assert alphas_of({"a": (2.0, 8), "b": (0.1 / 3, 3)}) == ({"a": 16, "b": 0.1}, False)
    assert alphas_of({"a": (2.0, 8), "b": (1.0, 4)}) == ({"a": 16, "b": 4}, False)


def test_a_changed_scale_is_saved(tmp_path):
    model, _ = tiny(0, np.float32)
    save_model(model, tmp_path / "base", "")
    inject(model, LoraConfig(r=3), rng=np.random.default_rng(0))
    set_scale(model, 0.7)
    save_adapter(model, tmp_path / "a")
    again = load(tmp_path / "base")
    load_adapter(again, tmp_path / "a")
    assert all(math.isclose(s, 0.7, rel_tol=2**-52) for s in scales(again).values())


def test_a_config_states_exceptions_in_unambiguous_keys(tmp_path):
    model, _ = tiny(0, np.float32)
    inject(model, LoraConfig(r=2, alpha=4, rank_pattern={"layers.1.self_attn.q_proj": 3}),
           rng=np.random.default_rng(0))  # fmt: skip
    save_adapter(model, tmp_path / "a")
    config = json.loads((tmp_path / "a" / CONFIG).read_text())
    assert (config["r"], config["lora_alpha"], config["inference_mode"]) == (2, 4, True)
    assert config["rank_pattern"] == {r"^model\.layers\.1\.self_attn\.q_proj": 3}
    assert config["alpha_pattern"] == {}
    assert config["target_modules"] == sorted(
        f"{kind}_proj" for kind in ("q", "k", "v", "o", "gate", "up", "down")
    )
    assert list(config) == sorted(config)
    assert open_tensors(tmp_path / "a" / WEIGHTS).metadata["format"] == "pt"


def test_target_names_are_shortened_only_if_unambiguous():
    every = ["a.0.q", "a.1.q", "a.0.k", "a.1.k", "head"]
    assert targets(every, {"a.0.q", "a.1.q"}) == ["q"]
    assert targets(every, {"a.0.q", "a.0.k", "a.1.q", "a.1.k"}) == ["k", "q"]
    assert targets(every, {"a.0.q"}) == ["a.0.q"]
    assert targets(every, {"a.0.q", "a.1.q", "a.0.k"}) == ["a.0.k", "a.0.q", "a.1.q"]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_an_adapter_can_be_written_in_another_dtype(dtype, tmp_path):
    model, rng = tiny(0, np.float64)
    inject(model, LoraConfig(r=2), rng=np.random.default_rng(0))
    scramble(model, rng)
    save_adapter(model, tmp_path / "a", dtype=dtype)
    opened = open_adapter(tmp_path / "a")
    eps = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float64": 0.0}[dtype]
    for module, layer in adapted(model).items():
        A, _ = opened.factors(module)
        want = to_host(layer.adapters["default"].A.data)
        assert (np.abs(A - want) <= eps * np.abs(want) + 2.0**-24).all()
        assert eps or A.tobytes() == want.tobytes()


# ---- the base that it belongs to


def test_another_base_is_refused_without_force(tmp_path):
    model, rng = tiny(0, np.float32)
    save_model(model, tmp_path / "base", "")
    inject(model, LoraConfig(r=2), rng=rng)
    save_adapter(model, tmp_path / "a")
    load_adapter(load(tmp_path / "base"), tmp_path / "a")
    load_adapter(load(tmp_path / "base", np.float64), tmp_path / "a")
    other, _ = tiny(1, np.float32)
    with pytest.raises(MismatchError, match="another base: fingerprint"):
        load_adapter(other, tmp_path / "a")
    assert not trained(other) or all("adapters" not in path for path in trained(other))
    load_adapter(other, tmp_path / "a", force=True)


@pytest.mark.skipif(LIBRARY != "numpy", reason="about the memory of the host")
def test_the_fingerprint_is_of_the_base_under_the_adapters(tmp_path):
    model, rng = tiny(0, np.float32)
    before = base_print(model)
    inject(model, LoraConfig(r=2, targets=EVERYTHING, modules_to_save=["norm", "model.norm"]), rng=rng)
    scramble(model, rng)
    assert base_print(model) == before
    save_model(tiny(0, np.float32)[0], tmp_path / "base", "")
    assert base_print(load(tmp_path / "base", np.float64)) == before


@settings(max_examples=40)
@given(data=st.data())
def test_a_flipped_bit_in_our_numbers_is_detected(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("flip")
    model, rng = tiny(0, np.float32)
    inject(model, LoraConfig(r=2, targets=["q_proj"]), rng=rng)
    save_adapter(model, folder / "a")
    raw = bytearray((folder / "a" / WEIGHTS).read_bytes())
    start = 8 + int.from_bytes(raw[:8], "little")
    raw[data.draw(st.integers(start, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    (folder / "a" / WEIGHTS).write_bytes(raw)
    with pytest.raises(MismatchError, match="sha256 differs"):
        open_adapter(folder / "a")


# ---- which modules a config means


MODULES = [f"model.layers.{i}.self_attn.{k}_proj" for i in (0, 1, 11) for k in "qkv"]
MODULES += ["model.embed_tokens", "lm_head", "model.norm"]
LINEAR = [m for m in MODULES if m.endswith("_proj") or m == "lm_head"]
MEANT = {
    "a name": ({"target_modules": ("q_proj",)}, r"q_proj"),
    "a longer name": ({"target_modules": ("layers.1.self_attn.q_proj",)}, r"\.1\..*q_proj"),
    "no part of a name": ({"target_modules": ("proj",)}, None),
    "all-linear": ({"target_modules": "All-Linear"}, r"_proj"),
    "a regex for the whole name": ({"target_modules": r".*layers\.1\..*"}, r"\.1\."),
    "a regex for a part": ({"target_modules": r"layers\.1\..*"}, None),
    "excluded wins": ({"target_modules": ("q_proj", "v_proj"), "exclude_modules": ("q_proj",)}, r"v_proj"),
    "saved wins": ({"target_modules": "all-linear", "modules_to_save": ("self_attn",)}, None),
    "one layer": ({"target_modules": ("q_proj",), "layers_to_transform": (1,)}, r"\.1\..*q_proj"),
    "an exact name in any layer": (
        {"target_modules": ("model.layers.0.self_attn.q_proj", "v_proj"), "layers_to_transform": (11,)},
        r"\.0\..*q_proj|\.11\..*v_proj",
    ),
    "another pattern of layers": (
        {"target_modules": ("q_proj",), "layers_to_transform": (1,), "layers_pattern": ("blocks",)}, None,
    ),
    "the head by its name": ({"target_modules": ("lm_head",)}, r"lm_head"),
}  # fmt: skip


@pytest.mark.parametrize("kind", MEANT)
def test_a_config_selects_the_same_modules_as_peft(kind):
    import re

    how, pattern = MEANT[kind]
    found = meant(Settings(r=4, lora_alpha=8, **how), MODULES, LINEAR)
    assert found == [m for m in MODULES if pattern and re.search(pattern, m)]


def test_every_option_has_a_fixture():
    assert {adapter for _, adapter in FIXED} | {"dropout"} == set(ADAPTERS)


# ---- what cannot be done


def test_adapters_without_a_peft_format_are_not_saved(tmp_path):
    model, rng = tiny(0, np.float32)
    with pytest.raises(StateError, match="adapter"):
        save_adapter(model, tmp_path / "a")
    inject(model, LoraConfig(r=2), rng=rng)
    bare, _ = tiny(0, np.float32, attention_bias=True)
    inject(bare, LoraConfig(r=2, targets=["q_proj"], bias="lora_only"), rng=rng)
    for layer in adapted(bare).values():
        layer.adapters["default"] = WithBias(None, layer.adapters["default"].bias)
    with pytest.raises(UnsupportedError, match="no low-rank part"):
        save_adapter(bare, tmp_path / "a")
    assert os.listdir(tmp_path) == []


def test_a_used_name_and_an_existing_folder_are_refused(tmp_path):
    base, folder = folders("untied--q-and-v")
    model = load(base)
    load_adapter(model, folder)
    with pytest.raises(ValueError, match="'default' is there already"):
        load_adapter(model, folder)
    load_adapter(model, folder, "second")
    (tmp_path / "a").mkdir()
    with pytest.raises(StorageError, match="is there already"):
        save_adapter(model, tmp_path / "a")
    (tmp_path / "a" / "mine").write_bytes(b"")
    with pytest.raises(StorageError, match="'mine'"):
        save_adapter(model, tmp_path / "a", overwrite=True)
    (tmp_path / "a" / "mine").rename(tmp_path / "a" / "mine.json")
    with pytest.raises(StorageError, match="this is not one"):
        save_adapter(model, tmp_path / "a", overwrite=True)
    (tmp_path / "a" / "mine.json").rename(tmp_path / "a" / CONFIG)
    save_adapter(model, tmp_path / "a", overwrite=True)
    assert sorted(os.listdir(tmp_path / "a")) == [CONFIG, WEIGHTS]
    merge(model)
    with pytest.raises(StateError, match="merged"):
        load_adapter(model, folder, "third")


def test_a_loaded_dropout_is_active_only_in_training(tmp_path):
    base, folder = folders("untied--q-and-v")
    config = json.loads((folder / CONFIG).read_text()) | {"lora_dropout": 0.5}
    (tmp_path / CONFIG).write_text(json.dumps(config))
    (tmp_path / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes())
    plain, dropping = load(base), load(base)
    load_adapter(plain, tmp_path)
    load_adapter(dropping, tmp_path, rng=np.random.default_rng(0))
    drops = [layer.adapters["default"].dropout for layer in adapted(dropping).values()]
    assert all(drop.p == 0.5 for drop in drops)
    assert all(layer.adapters["default"].dropout is None for layer in adapted(plain).values())
    save_adapter(dropping, tmp_path / "again")
    assert read_settings(tmp_path / "again" / CONFIG)[0].lora_dropout == 0.5


def test_mixed_dora_and_lora_modules_are_not_saved(tmp_path):
    model, rng = tiny(0, np.float32)
    inject(model, LoraConfig(r=2, dora=True), rng=rng)
    first = next(iter(adapted(model).values()))
    first.adapters["default"] = first.adapters["default"].low_rank
    with pytest.raises(UnsupportedError, match="some adapters are DoRA and others LowRank"):
        save_adapter(model, tmp_path / "a")
    assert os.listdir(tmp_path) == []


def test_the_most_common_rank_is_the_default_and_ties_take_the_smaller():
    config = peft_config({"a.q": (2, 4), "a.k": (3, 4)}, ["q", "k"])
    assert (config["r"], config["rank_pattern"]) == (2, {r"^a\.k": 3})
    with pytest.raises(ConfigError):
        LoraConfig(bias="some")


def test_a_loaded_adapter_is_trained_and_the_base_is_not():
    base, folder = folders("biases--bias-all")
    model = load(base)
    load_adapter(model, folder)
    assert trained(model)
    assert all("adapters" in path for path in trained(model))
    assert any(path.endswith(".bias") for path in trained(model))
    assert len(named_params(model)) > len(trained(model))


def test_the_norm_of_a_loaded_dora_is_a_constant_in_the_backward(tmp_path):
    """As in PEFT, which wrote such files; ours can be trained either way."""
    model, rng = tiny(0, np.float32)
    inject(model, LoraConfig(r=2, dora=True), rng=rng)
    save_adapter(model, tmp_path / "a")
    again, _ = tiny(0, np.float32)
    load_adapter(again, tmp_path / "a")
    assert all(layer.adapters["default"].detach for layer in adapted(again).values())
    assert not any(layer.adapters["default"].detach for layer in adapted(model).values())

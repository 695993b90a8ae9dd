"""Inspecting is lenient and notes what it ignored; loading into a model is strict about the same."""

import itertools
import json
import math
import re
import shutil
import tracemalloc

import numpy as np
import pytest
from by_hand import CONFIG, PREFIX, WEIGHTS, base_weights, bound64, changes, read_peft, write_peft
from helpers import SIZES, seeds, tiny
from hypothesis import example, given, settings
from hypothesis import strategies as st
from peft_cases import FIXTURES
from safetensors.numpy import load_file, save_file

from minilora.analysis.inspect import inspect
from minilora.analysis.measures import noise
from minilora.backend import to_host
from minilora.compose.ranks import choose
from minilora.compose.truncate import compress
from minilora.errors import ConfigError, MiniloraError, MismatchError, UnsupportedError
from minilora.formats.huggingface import load, save_model
from minilora.lora import fuse
from minilora.merging.merge import merge_checkpoint
from minilora.peft.folder import change_norm, check_agreement, open_adapter
from minilora.peft.loading import load_adapter
from minilora.spectra import (
    effective_rank,
    energy,
    noise_spectrum,
    norm,
    participation_ratio,
    rank_at,
    stable_rank,
    thin_svd,
    thin_values,
)
from minilora.tree import named_params

GOOD, BASE = FIXTURES / "adapters/untied--q-and-v", FIXTURES / "bases/untied"
STEPS = st.sampled_from(
    ["module", "model", "default", "weight", "layers", "0", "17", "q_proj", "base_model", "x_"]
)
MODULES = st.lists(st.lists(STEPS, min_size=1, max_size=5).map(".".join), min_size=1, max_size=4, unique=True)
WRAPS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def numbers(rng, module, r=2, more=1):
    """A and B of a module, of shapes of its own."""
    I, O = 3 + len(module) % 5, 4 + more  # noqa: E741
    return rng.standard_normal((r, I)).astype(np.float32), rng.standard_normal((O, r)).astype(np.float32)


def renamed(folder, change):
    """Give the tensors of a folder other names."""
    tensors = load_file(folder / WEIGHTS)
    save_file({change(k): a for k, a in tensors.items()}, folder / WEIGHTS, {"format": "pt"})
    return folder


def changed(folder, tensors=None, gone=(), **config):
    """A copy of the good adapter with other fields and tensors."""
    shutil.copytree(GOOD, folder)
    now = json.loads((folder / CONFIG).read_text()) | config
    (folder / CONFIG).write_text(json.dumps(now))
    old = load_file(folder / WEIGHTS)
    kept = {k: a for k, a in old.items() if k not in gone} | (tensors or {})
    save_file(kept, folder / WEIGHTS, {"format": "pt"})
    return folder


# ---- names in keys


@settings(max_examples=60)
@given(
    modules=MODULES,
    seed=seeds,
    before=st.sampled_from(
        ["", "module.", "_forward_module.module.", "_orig_mod.", PREFIX, "model." + PREFIX]
    ),
    wrap=st.sampled_from(["", *WRAPS]),
    name=st.sampled_from(["", "default", "my-task", "weights", "B"]),
)
def test_wrapper_prefixes_are_removed_from_the_keys(modules, seed, before, wrap, name, tmp_path_factory):
    """Every module under its own name, though that may be a wrapper's; with numbers of its own; told once."""
    tmp, rng = tmp_path_factory.mktemp("k"), np.random.default_rng(seed)
    modules = [m for m in modules if not f"{m}.".startswith("base_model.model.")] or ["q"]
    factors = {m: numbers(rng, m, more=i) for i, m in enumerate(modules)}
    plain = open_adapter(write_peft(tmp / "plain", factors))

    def key(old):
        steps = old.removeprefix(PREFIX).split(".")
        steps.insert(rng.integers(len(steps) - 2), wrap) if wrap else None
        new = before + PREFIX + ".".join(steps)
        return re.sub(r"\.(lora_[AB])\.weight$", rf".\1.{name}.weight", new) if name else new

    other = open_adapter(renamed(write_peft(tmp / "other", factors), key))
    assert other.pairs == plain.pairs
    assert other.pairs.keys() == factors.keys()
    for module, (A, B) in factors.items():
        for got, want in zip(other.factors(module), (A, B), strict=True):
            assert got.tobytes() == want.tobytes()
    kinds = ("names of wrappers, as in", "the adapter's name, as in")
    assert [sum(kind in note for note in other.notes) for kind in kinds] == [bool(before or wrap), bool(name)]
    assert other.doubts == plain.doubts == ()


@pytest.mark.parametrize(
    "change",
    [
        lambda k: f"module.{k}",
        lambda k: k.removeprefix(PREFIX),
        lambda k: k.replace(".weight", ".other.weight"),
        lambda k: k.replace("layers.0", "layers.0._orig_mod"),
        lambda k: PREFIX + k,
    ],
)
def test_two_keys_for_one_tensor_are_refused_by_name(change, tmp_path):
    first = min(load_file(GOOD / WEIGHTS))
    assert "layers.0" in first
    folder = changed(tmp_path / "a", {change(first): np.zeros((3, 12), np.float32)})
    with pytest.raises(MismatchError) as e:
        open_adapter(folder)
    assert first in str(e.value)
    assert change(first) in str(e.value)


def test_two_adapters_in_one_file_are_refused_by_name(tmp_path):
    def change(key):
        return key.replace(".weight", ".one.weight" if "q_proj" in key else ".two.weight")

    folder = renamed(changed(tmp_path / "a"), change)
    with pytest.raises(MismatchError, match=r"the adapters .one. and .two., as in .*q_proj.* and .*v_proj"):
        open_adapter(folder)


# ---- what config and file do not agree on


HEAD = {f"{PREFIX}lm_head.weight": np.ones((23, 12), np.float32)}
NORM = {f"{PREFIX}model.norm.weight": np.ones(12, np.float32)}
BIAS = f"{PREFIX}model.layers.0.self_attn.q_proj.base_layer.bias"
DISAGREE = {  # what -> (change of the good adapter, what is said of it)
    "a saved module that is not there": (
        {"modules_to_save": ["classifier"]},
        "no tensor for modules_to_save 'classifier'",
    ),
    "a parameter that is not listed": (
        {"tensors": NORM},
        r"1 tensor .* with this config, the first model\.norm",
    ),
    "targets that are not there": (
        {"target_modules": ["q_proj", "v_proj", "w", "x"]},
        "target_modules 'w' and 1 more; nearest",
    ),
    "factors that are not meant": (
        {"target_modules": ["q_proj"]},
        r"v_proj, which target_modules \('q_proj',\)",
    ),
    "a layer that is not meant": (
        {"layers_to_transform": [0]},
        r"layers\.1.*, which target_modules .* does not match",
    ),
    "another rank": ({"r": 5}, "with the config's r = 5; and 3 more"),
    "another rank in a pattern": ({"rank_pattern": {"v_proj": 2}}, "with the config's r = 2; and 1 more"),
    "magnitudes that are not there": (
        {"use_dora": True},
        "has no lora_magnitude_vector; use_dora is True; and 3",
    ),
    "magnitudes that are not meant": (
        {
            "tensors": {
                f"{PREFIX}model.layers.{i}.self_attn.{k}_proj.lora_magnitude_vector": np.ones(n, np.float32)
                for i in range(2)
                for k, n in (("q", 12), ("v", 4))
            }
        },
        "has a lora_magnitude_vector; use_dora is False; and 3",
    ),
    "a bias that is not meant": (
        {"tensors": {BIAS: np.ones(12, np.float32)}},
        "expected none with bias .none.",
    ),
    "a tensor of another kind": (
        {"tensors": {f"{PREFIX}a.lora_C.weight": np.ones(3, np.float32)}},
        r"1 tensor is not of a LoRA, the first .*lora_C",
    ),
    "trained tokens of which nothing is said": (
        {
            "tensors": {
                f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta": np.ones((2, 12), "f4")
            }
        },
        "trainable_token_indices is off",
    ),
}


@pytest.mark.parametrize("what", DISAGREE)
def test_inconsistent_files_are_inspected_with_a_note_and_not_loaded(what, tmp_path):
    how, says = DISAGREE[what]
    folder = changed(tmp_path / "a", **how)
    good, seen = inspect(GOOD, BASE, GOOD), inspect(folder, BASE, folder)
    (doubt,) = open_adapter(folder).doubts
    assert re.search(says, doubt)
    assert doubt in seen.notes
    assert f"{folder}: {doubt}" in seen.notes  # once more, of the other adapter
    assert [m.singular_values for m in seen.modules] == [
        m.singular_values for m in good.modules
    ] or "r" in how
    model = load(BASE)
    before = {k: to_host(p.data).tobytes() for k, p in named_params(model).items()}
    with pytest.raises(MismatchError) as e:
        load_adapter(model, folder)
    assert re.search(says.split(";")[0], str(e.value))
    assert {k: to_host(p.data).tobytes() for k, p in named_params(model).items()} == before
    with pytest.raises(MismatchError):
        merge_checkpoint(BASE, folder, tmp_path / "merged")
    found = compress(folder, tmp_path / "out", rank=2)
    assert doubt in found.notes
    assert f"note: {doubt}" in str(found)
    again = open_adapter(tmp_path / "out")
    assert again.doubts == ()
    check_agreement(again)


@pytest.mark.parametrize(("one", "two"), [*itertools.combinations(DISAGREE, 2)])
def test_a_compressed_adapter_is_consistent_whatever_was_not(one, two, tmp_path):
    both = {key: DISAGREE[one][0].get(key) or DISAGREE[two][0].get(key) for key in
            DISAGREE[one][0].keys() | DISAGREE[two][0].keys()}  # fmt: skip
    if "tensors" in both:
        both["tensors"] = DISAGREE[one][0].get("tensors", {}) | DISAGREE[two][0].get("tensors", {})
    compress(changed(tmp_path / "a", **both), tmp_path / "out", rank=2)
    check_agreement(open_adapter(tmp_path / "out"))


def test_a_target_with_only_a_bias_is_dropped_by_compression(tmp_path):
    factors = [key for key in load_file(GOOD / WEIGHTS) if "q_proj" in key]
    bias = BIAS.replace(".base_layer", "")
    folder = changed(tmp_path / "a", {bias: np.ones(12, np.float32)}, factors)
    compress(folder, tmp_path / "out", rank=2)
    check_agreement(open_adapter(tmp_path / "out"))
    assert json.loads((tmp_path / "out" / CONFIG).read_text())["target_modules"] == sorted(
        f"model.layers.{i}.self_attn.v_proj" for i in range(2)
    )


MODULES_OF_GOOD = sorted(open_adapter(GOOD).pairs)


@pytest.mark.parametrize("gone", [*MODULES_OF_GOOD, MODULES_OF_GOOD[:1] + MODULES_OF_GOOD[-1:]], ids=str)
def test_missing_modules_are_named_on_loading(gone, tmp_path):
    gone = [gone] if isinstance(gone, str) else gone
    keys = [key for key in load_file(GOOD / WEIGHTS) if any(f".{module}." in key for module in gone)]
    assert len(keys) == 2 * len(gone)
    what = f"{len(gone)} module{'s' if gone[1:] else ''} of the config, the first {gone[0]}"
    with pytest.raises(MismatchError, match=f"has no factors for {re.escape(what)}"):
        load_adapter(load(BASE), changed(tmp_path / "a", gone=keys))


def test_target_patterns_are_evaluated_only_on_loading(tmp_path):
    """inspect and compress never run it, be it ever so odd; what is compressed says the modules' names."""
    for i, (pattern, error) in enumerate(
        ((r"(.)\1", UnsupportedError), ("(", ConfigError), ("x", MismatchError))
    ):
        folder = changed(tmp_path / f"a{i}", target_modules=pattern, exclude_modules=pattern)
        assert inspect(folder).notes == ()
        with pytest.raises(error):
            load_adapter(load(BASE), folder)
        compress(folder, tmp_path / f"b{i}", rank=2)
        config = json.loads((tmp_path / f"b{i}" / CONFIG).read_text())
        assert config["target_modules"] == sorted(open_adapter(GOOD).pairs)
        assert config["exclude_modules"] is None
        assert len(load_adapter(load(BASE), tmp_path / f"b{i}").norms) == 4


def test_incomplete_magnitudes_are_inspected_and_not_written(tmp_path):
    key = f"{PREFIX}model.layers.0.self_attn.q_proj.lora_magnitude_vector"
    folder = changed(tmp_path / "a", {key: np.ones(12, np.float32)}, use_dora=True)
    assert any("use_dora is True; and 2 more" in note for note in inspect(folder).notes)
    with pytest.raises(MismatchError, match="some modules have a lora_magnitude_vector and others do not"):
        compress(folder, tmp_path / "out", rank=1)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "flag",
    [
        {"lora_bias": True},
        {"alora_invocation_tokens": [3]},
        {"layer_replication": [[0, 2]]},
        {"trainable_token_indices": {"embed_tokens": [1]}},
        {"ensure_weight_tying": True},
    ],
)
def test_options_beside_the_factors_are_noted_and_not_loaded(flag, tmp_path):
    folder, (name,) = changed(tmp_path / "a", **flag), flag
    assert [note for note in inspect(folder).notes if note.startswith(f"{name} is ")]
    assert inspect(folder).modules == inspect(GOOD).modules
    compress(folder, tmp_path / "out", rank=1)
    for path in (folder, tmp_path / "out"):
        with pytest.raises(UnsupportedError, match=f"{name} is .*, which is not supported"):
            load_adapter(load(BASE), path)
    if name == "layer_replication":
        with pytest.raises(UnsupportedError, match="the base numbers its layers differently"):
            inspect(folder, BASE)
    else:
        assert inspect(folder, BASE).modules == inspect(GOOD, BASE).modules


@pytest.mark.parametrize(
    "flag",
    [
        {"use_qalora": True},
        {"arrow_config": {"a": 1}},
        {"use_bdlora": {"a": 1}},
        {"velora_config": {"a": 1}},
        {"monteclora_config": {"a": 1}},
        {"kasa_config": {"a": 1}},
        {"megatron_config": {"a": 1}},
        {"target_parameters": ["mlp.experts.down_proj"]},
        {"init_lora_weights": "pissa"},
        {"peft_type": "LOHA"},
    ],
)
def test_options_that_change_the_meaning_of_the_factors_are_refused(flag, tmp_path):
    folder, (name,) = changed(tmp_path / "a", **flag), flag
    for call in (inspect, lambda path: compress(path, tmp_path / "out", rank=1)):
        with pytest.raises(UnsupportedError, match=name):
            call(folder)


def test_a_bias_on_B_is_rescaled_by_compression(tmp_path):
    """In PEFT it is scaled as B A is, and what is compressed has scale 1."""
    rng = np.random.default_rng(0)
    bias = rng.standard_normal(5).astype(np.float32)
    folder = write_peft(
        tmp_path / "a",
        {"a.b": (rng.standard_normal((2, 7)), rng.standard_normal((5, 2)))},
        {f"{PREFIX}a.b.lora_B.bias": bias},
        lora_bias=True,
        lora_alpha=6,
    )
    compress(folder, tmp_path / "out", rank=1)
    written = read_peft(tmp_path / "out")
    assert written[0]["a.b"][2] == 1
    assert np.abs(written[1]["a.b.lora_B.bias"] - 3 * bias).max() <= 3 * 2.0**-24 * abs(bias).max()


# ---- a vocabulary that was resized


def tables(rng, vocab, width, *names):
    return {
        f"{PREFIX}{name}.weight": rng.standard_normal((vocab, width)).astype(np.float32) for name in names
    }


def resized(tmp_path, tied, more):
    """A base of another vocabulary than usual, and an adapter with tables beside it."""
    model, rng = tiny(3, np.float32, tie_word_embeddings=tied, vocab_size=SIZES["vocab_size"] + 3)
    save_model(model, tmp_path / "base", "")
    D = SIZES["hidden_size"]
    width = model.config.num_attention_heads * model.config.E
    factors = {
        "model.layers.1.self_attn.q_proj": (
            rng.standard_normal((2, D)).astype("f4"),
            rng.standard_normal((width, 2)).astype("f4"),
        )
    }
    return write_peft(
        tmp_path / "a", factors, more(rng, model.config.vocab_size, D), target_modules=sorted(factors)
    )


@pytest.mark.parametrize("tied", [False, True])
def test_tables_of_a_resized_vocabulary_replace_the_bases(tied, tmp_path):
    def more(rng, V, D):
        found = tables(rng, V, D, "model.embed_tokens", "lm_head")
        return dict.fromkeys(found, found[f"{PREFIX}lm_head.weight"]) if tied else found

    folder = resized(tmp_path, tied, more)
    assert any("whole tables" in note for note in inspect(folder).notes)
    merge_checkpoint(tmp_path / "base", folder, tmp_path / "merged")
    W, tensors = base_weights(tmp_path / "merged"), read_peft(folder)[1]
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert W[name].astype(np.float32).tobytes() == tensors[name].tobytes()
    old = base_weights(tmp_path / "base")
    name = "model.layers.1.self_attn.q_proj"
    change = W[f"{name}.weight"] - old[f"{name}.weight"] - changes(folder)[name]
    assert abs(change).max() <= 2.0**-23 * abs(W[f"{name}.weight"]).max()
    with pytest.raises(MismatchError, match=r"weight has shape .*; resize the base's vocabulary first"):
        load_adapter(tiny(3, np.float32, tie_word_embeddings=tied)[0], folder)


@pytest.mark.parametrize("names", [("model.embed_tokens",), ("lm_head",), ("model.embed_tokens", "lm_head")])
def test_two_tables_for_a_tied_base_must_be_equal(names, tmp_path):
    """PEFT puts each into the one table of such a base: which would count, or both, is not to be guessed."""
    folder = resized(tmp_path, True, lambda rng, V, D: tables(rng, V, D, *names))
    with pytest.raises(MismatchError, match="this base ties head and embedding: expected both"):
        load_adapter(load(tmp_path / "base"), folder)
    listed = json.loads((folder / CONFIG).read_text()) | {
        "modules_to_save": [n.split(".")[-1] for n in names]
    }
    (folder / CONFIG).write_text(json.dumps(listed))  # then each is a copy of its own
    assert len(load_adapter(load(tmp_path / "base"), folder).replaced) == len(names)


# ---- shapes at the edge


@pytest.mark.parametrize(
    "shapes",
    [
        ((0, 5), (4, 0)),
        ((2, 0), (4, 2)),
        ((2, 5), (0, 2)),
        ((0,), (0,)),
        ((2, 0, 3, 3), (4, 2, 1, 1)),
        ((0, 10**12), (10**12, 0)),
    ],
)
def test_empty_factors_are_reported_as_empty(shapes, tmp_path):
    folder = changed(tmp_path / "a")
    key = f"{PREFIX}model.layers.0.self_attn.q_proj.lora_"
    raw = load_file(folder / WEIGHTS)
    raw |= {f"{key}{x}.weight": np.zeros(shape, np.float32) for x, shape in zip("AB", shapes, strict=True)}
    save_file(raw, folder / WEIGHTS, {"format": "pt"})
    for call in (
        inspect,
        lambda f: compress(f, tmp_path / "out", rank=1),
        lambda f: load_adapter(load(BASE), f),
    ):
        with pytest.raises(MismatchError, match=r"q_proj has empty factors.*ZeRO-3"):
            call(folder)
    assert not (tmp_path / "out").exists()


def peak(call, *args, **how):
    tracemalloc.start()
    try:
        call(*args, **how)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("O", "I", "r"), [(1, 1, 3000), (3, 2, 2000), (1, 400, 700), (200, 5, 300), (60, 80, 90)]
)
def test_memory_is_bounded_by_a_few_copies_of_the_factors(O, I, r, tmp_path):  # noqa: E741
    """Though r x r is up to 1,500 times as much. Of float64 copies 7: the factors as read and as float64,
    what QR takes and gives, and U and V before and after their products with Q and P; 128 KiB more."""
    rng = np.random.default_rng(0)
    A, B = rng.standard_normal((r, I)), rng.standard_normal((O, r))
    most = 7 * 8 * r * (O + I) + (1 << 17)
    assert peak(thin_svd, B, A, 0.5) < most
    assert peak(thin_values, B, A, 0.5) < most
    assert peak(change_norm, A, B, 0.5) < most
    assert peak(noise_spectrum, (O, I), rng, r) < most
    folder = write_peft(tmp_path / "a", {"a.b": (A, B)})
    noise.cache_clear()
    inspect(GOOD)  # what is imported only now
    assert peak(inspect, folder, against=folder) < most
    assert peak(compress, folder, tmp_path / "out", rank=1) < most


@settings(max_examples=40)
@given(O=st.integers(1, 6), I=st.integers(1, 6), r=st.integers(1, 20), seed=seeds, s=st.floats(0.1, 9))
def test_the_norm_of_a_change_matches_the_dense_norm(O, I, r, seed, s):  # noqa: E741
    """The r x r products lose half of the digits where B A is far smaller than |B||A|."""
    rng = np.random.default_rng(seed)
    A, B = rng.standard_normal((r, I)), rng.standard_normal((O, r))
    dense = np.linalg.norm(s * B @ A)
    whole = bound64(A, B, s)
    assert abs(change_norm(A, B, s) - dense) <= 4 * whole * max(
        1, s * np.linalg.norm(A) * np.linalg.norm(B) / dense
    )
    for tiny_ in (1e-200, 1e200):
        assert math.isclose(change_norm(A * tiny_, B / tiny_, s), change_norm(A, B, s), rel_tol=1e-12)
    assert math.isclose(change_norm(A * 1e-160, B, s), 1e-160 * change_norm(A, B, s), rel_tol=1e-12)
    assert change_norm(A * 1e200, B * 1e200, s) == math.inf
    assert change_norm(A * 0, B, s) == 0


@given(
    s=st.lists(st.floats(1e-3, 1), min_size=1, max_size=6).map(sorted),
    down=st.integers(0, 300),
    share=st.floats(0.01, 1),
)
def test_rank_measures_are_scale_invariant_even_at_extreme_scales(s, down, share):
    """Not even where its squares are too small or too large for float64: 5 of 4 ranks were the answer."""
    S = np.array(s[::-1])
    for factor in (10.0**-down, 10.0**down):
        T = S * factor
        assert rank_at(T, share) <= len(T)
        for measure in (effective_rank, stable_rank, participation_ratio):
            assert measure(T) == pytest.approx(measure(S), rel=1e-9)
            assert measure(T) <= len(T) * (1 + 1e-12)
        assert energy(T) == pytest.approx(energy(S), rel=1e-9)
        assert math.isclose(norm(T), norm(S) * factor, rel_tol=1e-9)


def test_an_adapter_of_tiny_numbers_has_the_same_inspection(tmp_path):
    rng = np.random.default_rng(0)
    A, B = rng.standard_normal((4, 9)), rng.standard_normal((7, 4))
    usual = write_peft(tmp_path / "a", {"a.b": (A, B)}, lora_alpha=8)
    small = write_peft(tmp_path / "b", {"a.b": (A * 1e-150, B * 1e-30)}, lora_alpha=8)
    for one, two in zip(
        inspect(usual, against=usual).modules, inspect(small, against=small).modules, strict=True
    ):
        assert (one.ranks.at90, one.ranks.at99) == (two.ranks.at90, two.ranks.at99)
        assert two.ranks.effective == pytest.approx(one.ranks.effective, rel=1e-9)
        assert two.norm == pytest.approx(one.norm * 1e-180, rel=1e-9)
        assert two.other.cosine == pytest.approx(1, abs=1e-12)
    assert inspect(small).norm == pytest.approx(inspect(usual).norm * 1e-180, rel=1e-9)
    for energy_ in (0.5, 0.99):
        how = {"energy": energy_}
        ranks = [
            [row.rank for row in compress(x, tmp_path / f"{x.name}{energy_}", **how).rows]
            for x in (usual, small)
        ]
        assert ranks[0] == ranks[1]


# ---- laws of what is compressed


def test_a_compressed_adapter_keeps_its_bases_fingerprint(tmp_path):
    from minilora.lora import inject
    from minilora.methods.lora_config import LoraConfig
    from minilora.peft.loading import save_adapter

    model, rng = tiny(0, np.float32)
    inject(model, LoraConfig(r=3, init="both"), rng=rng)
    save_adapter(model, tmp_path / "a")
    compress(tmp_path / "a", tmp_path / "b", rank=2)
    compress(tmp_path / "b", tmp_path / "c", energy=0.9, per_module=True)
    prints = [open_adapter(tmp_path / name).made["base"] for name in "abc"]
    assert prints[0] == prints[1] == prints[2]
    load_adapter(tiny(0, np.float32)[0], tmp_path / "c")
    with pytest.raises(MismatchError, match="another base: fingerprint"):
        load_adapter(tiny(1, np.float32)[0], tmp_path / "c")


@st.composite
def three(draw):
    """Falling spectra of three modules whose directions cost differently."""
    spectra = {}
    for name in "abc":
        values = draw(st.lists(st.integers(0, 60), min_size=1, max_size=5))
        spectra[name] = np.sort(np.array(values, float))[::-1]
    costs = draw(st.lists(st.integers(2, 30), min_size=3, max_size=3, unique=True))
    return spectra, dict(zip("abc", costs, strict=True)), draw(st.integers(1, 5))


NEAR = {"a": np.array([7.0, 6, 4]), "b": np.array([10.0, 5, 4, 3]), "c": np.array([8.0])}
WIDE = {"a": np.array([10.0, 5, 5]), "b": np.array([10.0, *[4] * 8]), "c": np.array([10.0, 1])}


@settings(max_examples=150)
@given(given_=three())
@example(given_=(WIDE, {"a": 100, "b": 10, "c": 7}, 2))  # the strongest value is not the best bargain
@example(given_=(NEAR, {"a": 18, "b": 4, "c": 3}, 2))  # more values are less energy
def test_per_module_ranks_are_within_one_value_of_brute_force(given_):
    """Every choice of three ranks is tried. What is kept is less than the best by no more than the energy
    of the first value that did not fit; and no less than the same rank for all."""
    spectra, costs, rank = given_
    ranks = choose(spectra, costs, rank, None, True)
    budget = rank * sum(costs.values())

    def kept(ks):
        return sum(float((spectra[m][:k] ** 2).sum()) for m, k in ks.items())

    def spent(ks):
        return sum(k * costs[m] for m, k in ks.items())

    every = [dict(zip("abc", ks, strict=True)) for ks in np.ndindex(*(len(S) for S in spectra.values()))]
    every = [{m: k + 1 for m, k in ks.items()} for ks in every]
    best = max(kept(ks) for ks in every if spent(ks) <= budget)
    assert spent(ranks) <= budget
    order = sorted(
        (
            (S[i] ** 2 / costs[m], m, S[i] ** 2)
            for m, S in spectra.items()
            for i in range(1, len(S))
            if S[i] > 0
        ),
        key=lambda item: -item[0],
    )
    left, unfit = budget - sum(costs.values()), 0.0
    for _, m, square in order:
        if costs[m] > left:
            unfit = square
            break
        left -= costs[m]
    assert best - unfit * (1 + 1e-12) <= kept(ranks) <= best
    left, rule = budget - sum(costs.values()), dict.fromkeys("abc", 1)
    for _, m, _ in order:
        if costs[m] <= left:
            left -= costs[m]
            rule[m] += 1
    common = {m: min(rank, len(S)) for m, S in spectra.items()}
    if len({worth for worth, *_ in order}) == len(order):  # else another order is as good
        assert kept(ranks) == max(kept(rule), kept(common))
    assert kept(ranks) >= kept({m: min(rank, len(S)) for m, S in spectra.items()})
    assert unfit or kept(ranks) == best


def test_compressed_convolutions_keep_their_shape(tmp_path):
    rng = np.random.default_rng(0)
    shapes = {
        "a.conv": ((5, 3, 2, 4), (7, 5, 1, 1)),
        "b.conv1d": ((4, 6, 3), (9, 4, 1)),
        "c.linear": ((3, 8), (6, 3)),
        "d.conv3d": ((2, 3, 2, 2, 2), (4, 2, 1, 1, 1)),
    }
    factors = {
        m: tuple(rng.standard_normal(shape).astype(np.float32) for shape in both)
        for m, both in shapes.items()
    }
    folder = write_peft(tmp_path / "a", factors, lora_alpha=7)
    found = compress(folder, tmp_path / "out", rank=2)
    before, after, opened = changes(folder), changes(tmp_path / "out"), open_adapter(tmp_path / "out")
    for row in found.rows:
        (r, *inner), (O, _, *ones) = shapes[row.module]  # noqa: E741
        assert opened.tensors.shapes[opened.pairs[row.module].A] == (2, *inner)
        assert opened.tensors.shapes[opened.pairs[row.module].B] == (O, 2, *ones)
        S = np.linalg.svd(before[row.module], compute_uv=False)
        assert np.linalg.norm(after[row.module] - before[row.module]) == pytest.approx(
            np.linalg.norm(S[2:]), rel=1e-5, abs=1e-5
        )
        assert row.shape == (O, math.prod(inner))
        assert row.r == r


def test_everything_in_a_compressed_adapter_is_applied_by_fuse(tmp_path):
    """The head that the config did not list counts after compression, as the file has it."""
    folder = changed(tmp_path / "a", HEAD)
    folder_config = json.loads((folder / CONFIG).read_text())
    assert folder_config["modules_to_save"] is None
    compress(folder, tmp_path / "out", rank=3)
    model = load(BASE)
    load_adapter(model, tmp_path / "out")
    fuse(model)
    assert (to_host(model.lm_head.weight.data) == 1).all()
    with pytest.raises(MiniloraError):
        load_adapter(load(BASE), changed(tmp_path / "b", NORM))

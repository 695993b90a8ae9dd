"""A saved model is the same model; everything else is refused with one line that names the file."""

import errno
import json
import os

import numpy as np
import pytest
from helpers import SIZES, dtypes, flags, merge_bound, same_bits, seeds, tiny, tiny_lora
from hypothesis import given, settings
from hypothesis import strategies as st
from library import LIBRARY
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save

from minilora import data
from minilora.backend import to_host
from minilora.errors import (
    ConfigError,
    FormatError,
    MiniloraError,
    MismatchError,
    NonFiniteError,
    StorageError,
    UnsupportedError,
)  # fmt: skip
from minilora.experiments import merge_equivalence
from minilora.files import BASE, load, read_json, read_tensors, save_model
from minilora.layers import digest, freeze, named_params, trained, unfreeze
from minilora.lora import LoraConfig, inject
from minilora.model import Config
from minilora.train import evaluate

SMALL = SIZES | {"num_hidden_layers": 1}
# sha256 of the names, shapes and bytes of the base that ships: a new base is a new version of minilora
DIGEST = "a85d6a8ae76cd0f0205c1c8646cdb15ad3e498db6374e67fe80610ec8eaa56e3"
# only a host's array can be a view of the file, or lie in another order than it is made in
on_the_host = pytest.mark.skipif(LIBRARY != "numpy", reason="about the memory of the host")


def arrays(model):
    return {k: to_host(p.dense()) for k, p in named_params(model).items()}


@pytest.fixture
def folder(tmp_path):
    """A small model, saved."""
    model, _ = tiny(0, np.float32, num_hidden_layers=1)
    save_model(model, tmp_path / "m", "a card\n")
    return tmp_path / "m"


def alter(folder, config=None, tensors=None):
    """Change config.json by a function of its dict, model.safetensors by one of its arrays."""
    if config:
        path = folder / "config.json"
        path.write_text(json.dumps(config(json.loads(path.read_text()))))
    if tensors:
        path = folder / "model.safetensors"
        path.write_bytes(save(tensors(load_tensors(path.read_bytes()))))


def refused(folder, error, match=None):
    """Loading raises one line that names the file, or the folder if the reason lies in both files."""
    with pytest.raises(error, match=match) as e:
        load(folder)
    assert isinstance(e.value, MiniloraError)
    assert str(folder) in str(e.value)
    assert len(str(e.value).splitlines()) == 1
    assert len(str(e.value)) < 600


# ---- there and back


@settings(max_examples=15)
@given(seed=seeds, dtype=dtypes, how=flags)
def test_saving_and_loading_are_inverse_to_the_bit(seed, dtype, how, tmp_path_factory):
    out = tmp_path_factory.mktemp("there") / "deep" / "m"
    model, _ = tiny(seed, dtype, **how)
    save_model(model, out, "a card\n", {"minilora": {"a": 1}})
    again = load(out, dtype)
    assert same_bits(arrays(model), arrays(again))
    assert again.config == model.config
    assert sorted(os.listdir(out)) == ["README.md", "config.json", "model.safetensors"]
    save_model(again, out.with_name("n"), "a card\n", {"minilora": {"a": 1}})
    for name in os.listdir(out):
        assert (out / name).read_bytes() == (out.with_name("n") / name).read_bytes(), name


@on_the_host
def test_what_is_loaded_is_frozen_and_cannot_be_written(folder):
    model = load(folder)
    assert trained(model) == {}
    for path, p in named_params(model).items():
        with pytest.raises(ValueError, match="read-only"):
            p.data[...] = 0
        with pytest.raises(ValueError, match="WRITEABLE"):
            p.data.flags.writeable = True
        assert p.grad is None, path


@on_the_host
def test_unfreezing_copies_and_leaves_what_was_loaded(folder):
    model = load(folder)
    before = {k: (p.data, p.data.tobytes()) for k, p in named_params(model).items()}
    unfreeze(model)
    for k, p in named_params(model).items():
        p.data[...] += 1
        assert not np.shares_memory(p.data, before[k][0])
        assert before[k][0].tobytes() == before[k][1]
    freeze(model)
    assert trained(model) == {}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_model_is_loaded_in_the_dtype_that_is_asked_for(dtype, folder):
    assert {p.data.dtype for p in named_params(load(folder, dtype)).values()} == {np.dtype(dtype)}
    assert same_bits(arrays(load(folder, np.float64)), {
        k: a.astype(np.float64) for k, a in arrays(load(folder)).items()
    })  # fmt: skip


def test_a_model_with_adapters_is_not_saved_as_a_plain_one(tmp_path):
    model, _ = tiny_lora(0, np.float32)
    with pytest.raises(MiniloraError):
        save_model(model, tmp_path / "m", "a card\n")
    assert os.listdir(tmp_path) == []


def test_some_savers_repeat_the_tied_table(folder):
    want = arrays(load(folder))
    alter(folder, tensors=lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"]})
    assert same_bits(arrays(load(folder)), want)


# ---- saving


@pytest.mark.parametrize("there", ["folder", "file", "empty folder", "dangling link"])
def test_a_target_that_is_there_stays_as_it_was(there, folder, tmp_path):
    out = tmp_path / "out"
    if there == "file":
        out.write_bytes(b"mine")
    elif there == "dangling link":
        out.symlink_to(tmp_path / "none")
    else:
        out.mkdir()
        if there == "folder":
            (out / "config.json").write_bytes(b"mine")
    with pytest.raises(StorageError, match="out"):
        save_model(load(folder), out, "")
    assert sorted(os.listdir(tmp_path)) == ["m", "out"]
    if there == "dangling link":
        assert out.is_symlink()
    elif there == "file":
        assert out.read_bytes() == b"mine"
    else:
        assert os.listdir(out) == ["config.json"] * (there == "folder")


@pytest.mark.parametrize("call", ["write", "fsync", "rename", "replace"])
@pytest.mark.parametrize("nth", [1, 2, 3])
def test_a_save_that_fails_leaves_nothing(call, nth, folder, tmp_path, monkeypatch):
    model, real, count = load(folder), getattr(os, call), 0

    def failing(*args):
        nonlocal count
        count += 1
        if count == min(nth, 1 if call == "rename" else 3):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*args)

    monkeypatch.setattr(os, call, failing)
    with pytest.raises(StorageError, match="No space left"):
        save_model(model, tmp_path / "out", "card")
    monkeypatch.undo()
    assert os.listdir(tmp_path) == ["m"]
    save_model(model, tmp_path / "out", "")
    assert same_bits(arrays(load(tmp_path / "out")), arrays(model))


# ---- tensors that do not fit


def test_every_prefix_of_the_tensors_is_refused(folder, tmp_path):
    whole, path = (folder / "model.safetensors").read_bytes(), tmp_path / "t"
    header = 8 + int.from_bytes(whole[:8], "little")
    for cut in [*range(header + 40), *range(header + 40, len(whole), 97), len(whole) - 1]:
        path.write_bytes(whole[:cut])
        with pytest.raises(FormatError) as e:
            read_tensors(path)
        assert str(path) in str(e.value)
    path.write_bytes(whole + b"\0")
    with pytest.raises(FormatError):
        read_tensors(path)
    (folder / "model.safetensors").write_bytes(whole[:-1])
    refused(folder, FormatError)


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """A folder to spoil, and the bytes of its tensors."""
    model, _ = tiny(0, np.float32, num_hidden_layers=1)
    out = tmp_path_factory.mktemp("flip") / "m"
    save_model(model, out, "")
    return out, (out / "model.safetensors").read_bytes(), {k: a.shape for k, a in arrays(model).items()}


@settings(max_examples=300)
@given(data=st.data())
def test_a_flipped_bit_of_the_header_is_an_error_or_harmless(data, raw):
    out, whole, shapes = raw
    bits = bytearray(whole)
    at = data.draw(st.integers(0, 7 + int.from_bytes(whole[:8], "little")))
    bits[at] ^= 1 << data.draw(st.integers(0, 7))
    (out / "model.safetensors").write_bytes(bits)
    said = str(out)
    try:
        assert {k: a.shape for k, a in arrays(load(out)).items()} == shapes
    except MiniloraError as e:
        said = str(e)
    assert str(out) in said


NAME = "model.layers.0.self_attn.q_proj.weight"
TENSORS = {
    "missing": (lambda t: {k: a for k, a in t.items() if k != NAME}, MismatchError, "q_proj.weight is miss"),
    "extra": (lambda t: t | {NAME + "s": t[NAME]}, MismatchError, "weights is not expected; nearest"),
    "another layer": (lambda t: t | {NAME.replace("0", "1"): t[NAME]}, MismatchError, "not expected"),
    "transposed": (lambda t: t | {NAME: np.ascontiguousarray(t[NAME].T)}, MismatchError, r"shape \(10, 24\)"),
    "flat": (lambda t: t | {NAME: t[NAME].ravel()}, MismatchError, r"expected \(24, 10\)"),
    "NaN": (lambda t: t | {NAME: t[NAME] * np.float32(np.nan)}, NonFiniteError, "q_proj"),
    "infinite": (lambda t: t | {NAME: t[NAME] + np.float32(np.inf)}, NonFiniteError, "q_proj"),
    "float16": (lambda t: t | {NAME: t[NAME].astype(np.float16)}, UnsupportedError, "float16"),
    "integers": (lambda t: t | {NAME: t[NAME].astype(np.int32)}, UnsupportedError, "int32"),
    "none": (lambda t: {}, MismatchError, "missing"),
}  # fmt: skip


@pytest.mark.parametrize("kind", TENSORS)
def test_tensors_that_are_not_those_of_the_config_are_refused(kind, folder):
    change, error, match = TENSORS[kind]
    alter(folder, tensors=change)
    refused(folder, error, match)


def test_a_value_too_large_for_the_wanted_dtype_is_refused(folder):
    alter(folder, tensors=lambda t: t | {NAME: t[NAME].astype(np.float64) * 1e300})
    refused(folder, NonFiniteError, "q_proj")


# ---- config.json


def but(**changes):
    return lambda c: c | changes


CONFIGS = {
    "wrong model_type": (but(model_type="gpt2"), UnsupportedError, "model_type is 'gpt2'; expected 'llama'"),
    "wrong activation": (but(hidden_act="gelu"), UnsupportedError, "hidden_act"),
    "rope_scaling": (but(rope_scaling={"type": "linear", "factor": 2.0}), UnsupportedError, "rope_scaling"),
    "zero size": (but(hidden_size=0), ConfigError, "hidden_size is 0"),
    "negative size": (but(num_hidden_layers=-1), ConfigError, "num_hidden_layers is -1"),
    "no vocabulary": (but(vocab_size=0), ConfigError, "vocab_size is 0"),
    "size as text": (but(hidden_size="96"), ConfigError, "hidden_size"),
    "size as float": (but(hidden_size=96.0), ConfigError, "hidden_size"),
    "odd head": (but(head_dim=3), ConfigError, "head_dim is 3"),
    "groups that do not divide": (but(num_key_value_heads=4), ConfigError, "num_key_value_heads is 4"),
    "eps NaN": (but(rms_norm_eps=float("nan")), ConfigError, "rms_norm_eps"),
    "theta 0": (but(rope_theta=0), ConfigError, "rope_theta"),
    "flag as text": (but(tie_word_embeddings="yes"), ConfigError, "tie_word_embeddings"),
    "another width": (but(intermediate_size=16), MismatchError, "shape"),
    "more layers": (but(num_hidden_layers=2), MismatchError, "layers.1.*missing"),
    "untied": (but(tie_word_embeddings=False), MismatchError, "lm_head.weight is missing"),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_config_that_means_another_model_is_refused(kind, folder):
    change, error, match = CONFIGS[kind]
    alter(folder, config=change)
    refused(folder, error, match)


def test_a_size_that_no_machine_can_hold_is_a_mismatch_not_a_lack_of_memory(folder):
    alter(folder, config=but(hidden_size=6 * 10**14))
    refused(folder, MiniloraError)


TEXTS = {
    "not JSON": b"hidden_size: 3",
    "empty": b"",
    "cut": b'{"hidden_size": 10, "vocab_',
    "not UTF-8": b'{"a": "\xff"}',
    "a list": b"[]",
    "a number": b"3",
    "null": b"null",
    "a key twice": b'{"vocab_size": 11, "hidden_size": 10, "vocab_size": 12}',
    "a key twice inside": b'{"minilora": {"a": 1, "a": 1}}',
    "100,000 deep": b"[" * 100_000 + b"]" * 100_000,
    "deep objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "a number of 10,000 digits": b'{"hidden_size": ' + b"9" * 10_000 + b"}",
}


@pytest.mark.parametrize("kind", TEXTS)
def test_a_config_that_is_no_json_object_is_a_format_error(kind, folder):
    (folder / "config.json").write_bytes(TEXTS[kind])
    refused(folder, FormatError)


def test_more_than_a_mebibyte_of_config_is_not_read(folder):
    (folder / "config.json").write_bytes(b"{}" + b" " * (1 << 20))
    refused(folder, StorageError, "at most 1048576")
    (folder / "config.json").write_bytes(b"{}" + b" " * ((1 << 20) - 2))
    assert read_json(folder / "config.json") == {}


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("kind", ["fifo", "folder", "dangling link", "link loop", "missing", "device"])
def test_what_is_not_a_file_is_a_storage_error(kind, name, folder):
    path = folder / name
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "dangling link":
        path.symlink_to("none")
    elif kind == "link loop":
        path.symlink_to(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    refused(folder, StorageError, name)


def test_a_missing_folder_is_a_storage_error(tmp_path):
    refused(tmp_path / "none", StorageError)


def test_what_a_config_leaves_out_has_llamas_default(folder):
    keep = {k: SMALL[k] for k in SMALL if k not in ("rms_norm_eps", "rope_theta", "max_position_embeddings")}
    alter(folder, config=lambda c: keep)
    usual = Config()
    found = load(folder).config
    assert (found.rms_norm_eps, found.rope_theta) == (usual.rms_norm_eps, usual.rope_theta)
    assert found.tie_word_embeddings is usual.tie_word_embeddings
    assert found.num_key_value_heads == 2


def test_without_key_value_heads_there_are_as_many_as_heads(tmp_path):
    model, _ = tiny(0, np.float32, num_key_value_heads=6)
    save_model(model, tmp_path / "m", "")
    alter(tmp_path / "m", config=lambda c: {k: v for k, v in c.items() if k != "num_key_value_heads"})
    assert load(tmp_path / "m").config.num_key_value_heads == 6


def test_a_link_to_a_folder_is_followed(folder, tmp_path):
    (tmp_path / "link").symlink_to(folder)
    assert same_bits(arrays(load(tmp_path / "link")), arrays(load(str(folder))))


# ---- the base that ships


def test_the_base_is_the_one_that_was_measured():
    base = load()
    assert digest(base) == DIGEST
    assert digest(load("base")) == DIGEST
    assert trained(base) == {}
    assert sorted(os.listdir(BASE)) == ["README.md", "config.json", "model.safetensors"]
    facts = read_json(BASE / "config.json")["minilora"]
    known = data.MANIFEST["shakespeare"]
    assert (facts["corpus"], facts["corpus_sha256"]) == (known.source, known.digest)
    assert f"**{facts['test']:.4f} nats per character**" in (BASE / "README.md").read_text()


def test_nothing_that_is_done_to_a_model_reaches_the_base():
    model = load()
    inject(model, LoraConfig(r=2), rng=np.random.default_rng(0))
    for p in trained(model).values():
        p.data += 1
    other = load()
    unfreeze(other)
    for p in named_params(other).values():
        p.data[...] = 0
    assert digest(load()) == DIGEST


def sampled(windows):
    """The held-out loss of the base over some windows; skips where the texts cannot be had."""
    try:
        text = data.corpus("shakespeare")
    except StorageError as e:
        pytest.skip(str(e))
    return evaluate(load(), data.eval_batches(text.test, 16, 128, windows * 128))


def test_the_base_has_learned_the_held_out_plays():
    # 1.545 over 4,096 windows; windows differ by 0.3, so the mean of 64 has an error of 0.04
    assert 1.4 < sampled(64) < 1.62


@pytest.mark.slow
def test_the_base_has_the_loss_that_its_card_says():
    facts = read_json(BASE / "config.json")["minilora"]
    # float32 sums of other BLAS libraries: 128 windows by 3 layers of some hundred terms each
    assert abs(sampled(facts["recipe"]["test_windows"]) - facts["test"]) < 1e-4


# ---- merging


@pytest.fixture(scope="module")
def merged():
    return merge_equivalence.run(draws=2)


def test_merged_outputs_differ_by_no_more_than_the_bound(merged):
    assert {(row["dtype"], row["inputs"]) for row in merged} == {
        (d, n) for d in ("float32", "float64") for n in (16, 32, 64, 128, 256, 512, 1024, 2048)
    }
    for row in merged:
        print(row)
        assert 0 < row["difference"] <= row["bound"]
        assert 0 < row["ratio"] <= 1
    worst = max(row["ratio"] for row in merged)
    assert worst > 0.01  # the bound says something: a difference ten times as large comes near it


def test_the_merge_experiment_is_the_same_from_the_same_seed(merged):
    assert merge_equivalence.run(draws=2) == merged


@settings(max_examples=15)
@given(seed=seeds, dtype=dtypes, s=st.sampled_from([0.25, 2.0, 7 / 3]))
def test_both_statements_of_the_bound_agree(seed, dtype, s):
    rng = np.random.default_rng(seed)
    O, I, r, M = rng.integers(1, 20, 4)  # noqa: E741
    W, A, B, X = (rng.standard_normal(x).astype(dtype) for x in ((O, I), (r, I), (O, r), (M, I)))
    ours = merge_equivalence.merge_bound(W, A, B, s, X, dtype)
    theirs = to_host(merge_bound(W, A, B, s, X.T, dtype)).T
    assert ours.shape == theirs.shape == (M, O)
    # the same sums of positive terms in another order; the scale is rounded to dtype in one of them
    wide = np.finfo(np.float64 if dtype == np.float32 else np.longdouble).eps
    slack = 4 * (I + r + 8) * wide + float(np.finfo(dtype).eps)
    assert (np.abs(ours - theirs) <= slack * theirs).all()


@on_the_host
def test_weights_that_lie_transposed_are_saved_in_order(tmp_path):
    model, _ = tiny(0, np.float32)
    for p in named_params(model).values():
        p.data = np.asfortranarray(p.data)
    save_model(model, tmp_path / "m", "")
    assert digest(load(tmp_path / "m")) == digest(model)

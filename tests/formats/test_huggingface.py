"""A saved model is the same model; everything else is refused with one line that names the file."""

import errno
import json
import os
import shutil
from dataclasses import asdict

import numpy as np
import pytest
from helpers import SIZES, batch, dtypes, flags, merge_bound, same_bits, seeds, tiny, tiny_lora
from hypothesis import given, settings
from hypothesis import strategies as st
from library import LIBRARY
from peft_cases import BASES, FIXTURES, LLAMA3, SHAPE, slug
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save

from minilora.backend import to_device, to_host
from minilora.data import batching, corpora
from minilora.digests import of_bytes
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
from minilora.formats import atomic, safetensors
from minilora.formats.huggingface import (
    BASE,
    assemble,
    checkpoint,
    fingerprint,
    load,
    read_config,
    read_json,
    save_model,
    tokenizer_of,
    weights,
)
from minilora.formats.safetensors import CALLED, layout, stored
from minilora.layers import Linear, Param
from minilora.lora import inject
from minilora.methods.lora_config import LoraConfig
from minilora.model import Config, RopeScaling
from minilora.peft.loading import base_print
from minilora.training import evaluate
from minilora.tree import digest, freeze, named_params, trained, unfreeze

SMALL = SIZES | {"num_hidden_layers": 1}
HUGGING_FACE = {  # what a config.json of Llama means by leaving a key out
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": False,
}  # fmt: skip
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
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_loaded_model_is_frozen_and_read_only(dtype, folder):
    model = load(folder, dtype)
    assert trained(model) == {}
    for path, p in named_params(model).items():
        with pytest.raises(ValueError, match="read-only"):
            p.data[...] = 0
        with pytest.raises(ValueError, match="WRITEABLE"):
            p.data.flags.writeable = True
        assert p.grad is None, path


@on_the_host
def test_unfreezing_copies_the_loaded_arrays(folder):
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
def test_a_model_is_loaded_in_the_requested_dtype(dtype, folder):
    assert {p.data.dtype for p in named_params(load(folder, dtype)).values()} == {np.dtype(dtype)}
    assert same_bits(arrays(load(folder, np.float64)), {
        k: a.astype(np.float64) for k, a in arrays(load(folder)).items()
    })  # fmt: skip


def test_a_model_with_adapters_cannot_be_saved_as_a_plain_one(tmp_path):
    model, _ = tiny_lora(0, np.float32)
    with pytest.raises(MiniloraError):
        save_model(model, tmp_path / "m", "a card\n")
    assert os.listdir(tmp_path) == []


def test_repeated_tied_tables_and_stored_frequencies_are_accepted(folder):
    want = arrays(load(folder))
    spare = {f"model.layers.0.{where}rotary_emb.inv_freq": np.ones(2) for where in ("self_attn.", "")}
    alter(folder, tensors=lambda t: t | spare | {"lm_head.weight": t["model.embed_tokens.weight"]})
    assert same_bits(arrays(load(folder)), want)
    assert set(checkpoint(folder).tensors) == set(want)
    alter(folder, tensors=lambda t: t | {"lm_head.weight": 2 * t["model.embed_tokens.weight"]})
    refused(folder, MismatchError, "lm_head.weight differs from the embedding")


@settings(max_examples=8)
@given(seed=seeds, dtype=st.sampled_from(sorted(CALLED)), how=flags)
def test_a_model_is_saved_in_the_requested_dtype(seed, dtype, how, tmp_path_factory):
    out = tmp_path_factory.mktemp("dtype") / "m"
    model, _ = tiny(seed, np.float64, **how)
    save_model(model, out, "", dtype=dtype)
    found = arrays(load(out, np.float64))
    assert same_bits(found, {k: stored(a, dtype).astype(np.float64) for k, a in arrays(model).items()})
    assert checkpoint(out).dtype == read_json(out / "config.json")["torch_dtype"] == dtype
    if dtype != "float64":
        save_model(load(out), out.with_name("n"), "", dtype=dtype)  # a second time changes nothing
        for name in os.listdir(out):
            assert (out / name).read_bytes() == (out.with_name("n") / name).read_bytes(), name


def test_values_that_overflow_the_dtype_are_not_written(folder, tmp_path):
    model = load(folder)
    for bad in ("int8", "F32", "", np.float32):
        with pytest.raises(ConfigError, match=r"dtype is .*; expected one of"):
            save_model(model, tmp_path / "out", "", dtype=bad)
    p = named_params(model)[NAME]
    p.data = p.data * np.float32(1e6)
    with pytest.raises(NonFiniteError, match=r"out: not written: .*q_proj.* not finite in float16"):
        save_model(model, tmp_path / "out", "", dtype="float16")
    assert os.listdir(tmp_path) == ["m"]
    save_model(model, tmp_path / "out", "", dtype="bfloat16")


def test_extra_files_are_copied_unchanged(folder, tmp_path):
    beside = {"tokenizer.json": b"{}", "special_tokens_map.json": bytes(range(256))}
    save_model(load(folder), tmp_path / "out", "", beside=beside)
    assert {name: (tmp_path / "out" / name).read_bytes() for name in beside} == beside
    assert same_bits(arrays(load(tmp_path / "out")), arrays(load(folder)))


@settings(max_examples=8)
@given(seed=seeds)
def test_an_untied_head_is_saved_and_a_shared_table_is_not_repeated(seed, tmp_path_factory):
    out = tmp_path_factory.mktemp("head")
    model, rng = tiny(seed, np.float32)
    ids, _ = batch(rng)
    model.lm_head = Linear(model.model.embed_tokens.weight)
    save_model(model, out / "shared", "")
    assert load(out / "shared").lm_head is None
    W = 2 * to_host(model.model.embed_tokens.weight.data)
    model.lm_head = Linear(Param(to_device(W)))
    save_model(model, out / "own", "")
    again = load(out / "own")
    assert (model.config.tie_word_embeddings, again.config.tie_word_embeddings) == (True, False)
    assert to_host(again.lm_head.weight.data).tobytes() == W.tobytes()
    assert to_host(again(ids)[0]).tobytes() == to_host(model(ids)[0]).tobytes()


def test_opening_a_checkpoint_reads_no_tensor(folder, monkeypatch):
    read = 0

    def counting(path, start, count, stamp):
        nonlocal read
        read += count
        return atomic.read_at(path, start, count, stamp)

    monkeypatch.setattr(safetensors, "read_at", counting)
    found = checkpoint(folder)
    assert read == 8 + int.from_bytes((folder / "model.safetensors").read_bytes()[:8], "little")
    assert found.config.num_hidden_layers == 1
    assert found.tensors.shapes[NAME] == (24, 10)


def test_the_name_base_means_the_shipped_base_and_a_path_the_users(folder, tmp_path, monkeypatch):
    os.rename(folder, tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    assert load("base").config == load().config == Config()
    assert load("./base").config == load(tmp_path / "base").config == Config(**SMALL)


# ---- in one file or in many, as transformers writes them


def test_every_base_that_transformers_writes_is_loaded():
    plain = arrays(load(FIXTURES / "bases" / "untied"))
    for name in ("untied", "tied", "biases", "head_dim", "llama3", "sharded", "bfloat16", "float16"):
        found = checkpoint(FIXTURES / "bases" / slug(name))
        changes, dtype, _ = BASES[name]
        assert found.dtype == dtype
        assert changes.get("head_dim", 4) == found.config.E
        assert found.config.rope_theta == 500.0
        for key in ("tie_word_embeddings", "attention_bias", "mlp_bias"):
            assert getattr(found.config, key) is changes.get(key, False)
        if name in ("sharded", "llama3", "bfloat16"):  # the same seed
            assert same_bits(arrays(load(found.where)), {k: stored(a, dtype) for k, a in plain.items()})
    assert checkpoint(FIXTURES / "bases" / "llama3").config.rope_scaling == RopeScaling(8.0, 1.0, 4.0, 24)
    assert sorted(p.name for p in (FIXTURES / "bases" / "sharded").glob("*.safetensors")) == [
        f"model-0000{i}-of-00002.safetensors" for i in (1, 2)
    ]


INDEX = "model.safetensors.index.json"


def shard(folder, where=lambda name: f"{'ba'['mlp' in name]}.safetensors", index=lambda content: content):
    """Lay a folder's tensors out in the files that `where` says, and change the index by a function."""
    whole = load_tensors((folder / "model.safetensors").read_bytes())
    (folder / "model.safetensors").unlink()
    weight_map = {name: where(name) for name in whole}
    for file in set(weight_map.values()):
        (folder / file).write_bytes(save({name: a for name, a in whole.items() if weight_map[name] == file}))
    content = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index(content)))


@settings(max_examples=10)
@given(seed=seeds, data=st.data())
def test_a_sharded_model_loads_as_the_same_model(seed, data, tmp_path_factory):
    out = tmp_path_factory.mktemp("shards") / "m"
    model, _ = tiny(seed, np.float32)
    save_model(model, out, "")
    names = data.draw(st.lists(st.sampled_from(["a.safetensors", "model 2", "字.safetensors"]), min_size=40))
    parts = iter(names)
    shard(out, lambda name: next(parts))
    assert same_bits(arrays(load(out)), arrays(model))


def test_a_single_file_takes_precedence_over_shards(folder):
    raw = (folder / "model.safetensors").read_bytes()
    shard(folder)
    (folder / "a.safetensors").write_bytes(b"damaged")
    (folder / "model.safetensors").write_bytes(raw)
    load(folder)


def mapped(**changes):
    """Change entries of the weight_map; None takes one out."""

    def change(index):
        found = index["weight_map"] | {k.replace("__", "."): v for k, v in changes.items()}
        return index | {"weight_map": {k: v for k, v in found.items() if v is not None}}

    return change


NORM = "model__norm__weight"
INDICES = {
    "no map": (lambda index: {}, FormatError, "weight_map is None"),
    "a list": (lambda index: {"weight_map": []}, FormatError, "weight_map is "),
    "a number": (mapped(**{NORM: 3}), FormatError, "expected file names by tensor"),
    "an empty map": (lambda index: {"weight_map": {}}, MismatchError, "missing"),
    "a missing shard": (mapped(**{NORM: "c.safetensors"}), MismatchError, "'c.safetensors'; there is no"),
    "another shard": (mapped(**{NORM: "a.safetensors"}), MismatchError, "'model.norm.weight' is not in this"),
    "a tensor that is nowhere": (mapped(other="a.safetensors"), MismatchError, "'other' is not in this"),
    "a tensor left out": (mapped(**{NORM: None}), MismatchError, "'model.norm.weight' is in this file but"),
}  # fmt: skip


@pytest.mark.parametrize("kind", INDICES)
def test_an_index_that_does_not_match_its_files_is_refused(kind, folder):
    change, error, match = INDICES[kind]
    shard(folder, index=change)
    refused(folder, error, match)


NAMES = [
    "", ".", "..", "/etc/passwd", "../a.safetensors", "sub/a.safetensors", "a\\b", "C:a", "a\0b", "a\nb",
    "\ud800", "\x1b[2J", "x" * 256, "../" * 100,
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_an_index_names_only_plain_file_names(name, folder):
    shard(folder, index=mapped(**{NORM: name}))
    refused(folder, FormatError, "expected a plain file name")


@pytest.mark.parametrize("content", [b"", b"[]", b'{"weight_map": {"a": "b", "a": "b"}}', b"[" * 99_999])
def test_an_index_that_is_no_json_object_is_refused(content, folder):
    shard(folder)
    (folder / INDEX).write_bytes(content)
    refused(folder, FormatError, "index.json")


@pytest.mark.parametrize("kind", ["fifo", "folder", "dangling link", "link loop", "device"])
def test_a_shard_that_is_not_a_file_is_refused(kind, folder):
    shard(folder)
    path = folder / "a.safetensors"
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to({"dangling link": "none", "link loop": path, "device": "/dev/zero"}[kind])
    refused(folder, (StorageError, FormatError, MismatchError), "a.safetensors")


def test_links_are_followed_only_in_the_layout_of_the_hubs_cache(folder, tmp_path):
    want = arrays(load(folder))
    shard(folder)
    home = tmp_path / "models--a--b"
    snapshot = home / "snapshots" / "0123abcd"
    snapshot.parent.mkdir(parents=True)
    (home / "blobs").mkdir()
    os.rename(folder, snapshot)
    for file in list(snapshot.iterdir()):
        blob = home / "blobs" / of_bytes(file.name.encode())
        os.rename(file, blob)
        file.symlink_to(f"../../blobs/{blob.name}")
    assert same_bits(arrays(load(snapshot)), want)
    (tmp_path / "link").symlink_to(snapshot)
    assert same_bits(arrays(load(tmp_path / "link")), want)
    shard_of_it, blob = snapshot / "a.safetensors", (snapshot / "a.safetensors").resolve()
    for elsewhere in (tmp_path / "secret", home / "secret", home / "blobs" / "deep" / "secret"):
        elsewhere.parent.mkdir(exist_ok=True)
        elsewhere.write_bytes(blob.read_bytes())
        shard_of_it.unlink()
        shard_of_it.symlink_to(elsewhere)
        refused(snapshot, StorageError, "a.safetensors: is a link, which is not followed")


def test_a_pickle_is_never_opened(folder):
    os.rename(folder / "model.safetensors", folder / "pytorch_model.bin")
    refused(folder, UnsupportedError, "a pickle, which can run code")


# ---- saving


@pytest.mark.parametrize("there", ["folder", "file", "empty folder", "dangling link"])
def test_an_existing_target_stays_unchanged(there, folder, tmp_path):
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
def test_a_failed_save_leaves_nothing(call, nth, folder, tmp_path, monkeypatch):
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


def test_truncated_or_extended_tensor_files_are_refused(folder):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole + b"\0")
    refused(folder, FormatError)
    for cut in (len(whole) - 1, *reversed(range(0, len(whole), 97))):
        os.truncate(path, cut)
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
    (out / "model.safetensors").unlink()  # a file that is written over is slow
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
    "integers": (lambda t: t | {NAME: t[NAME].astype(np.int32)}, UnsupportedError, "dtype is I32"),
    "none": (lambda t: {}, MismatchError, "missing"),
}  # fmt: skip


@pytest.mark.parametrize("kind", TENSORS)
def test_tensors_that_do_not_match_the_config_are_refused(kind, folder):
    change, error, match = TENSORS[kind]
    alter(folder, tensors=change)
    refused(folder, error, match)


def test_a_value_too_large_for_the_requested_dtype_is_refused(folder):
    alter(folder, tensors=lambda t: t | {NAME: t[NAME].astype(np.float64) * 1e300})
    refused(folder, NonFiniteError, "q_proj")


# ---- config.json


def but(**changes):
    return lambda c: c | changes


CONFIGS = {
    "wrong model_type": (but(model_type="gpt2"), UnsupportedError, "model_type is 'gpt2'; expected 'llama'"),
    "wrong activation": (but(hidden_act="gelu"), UnsupportedError, "hidden_act"),
    "quantized": (but(quantization_config={"bits": 4}), UnsupportedError, "quantization_config"),
    "part of a head": (but(partial_rotary_factor=0.5), UnsupportedError, "partial_rotary_factor is 0.5"),
    "a window": (but(sliding_window=8), UnsupportedError, "sliding_window is 8; expected None"),
    "a list for a name": (but(model_type=["llama"]), UnsupportedError, "model_type is"),
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
def test_a_config_of_an_unsupported_model_is_refused(kind, folder):
    change, error, match = CONFIGS[kind]
    alter(folder, config=change)
    refused(folder, error, match)


def test_an_impossible_size_is_refused_without_allocating(folder):
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


def test_a_config_above_one_mebibyte_is_not_read(folder):
    (folder / "config.json").write_bytes(b"{}" + b" " * (1 << 20))
    refused(folder, StorageError, "at most 1048576")
    (folder / "config.json").write_bytes(b"{}" + b" " * ((1 << 20) - 2))
    assert read_json(folder / "config.json") == {}


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("kind", ["fifo", "folder", "dangling link", "link loop", "missing", "device"])
def test_anything_but_a_regular_file_is_a_storage_error(kind, name, folder):
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


def config_of(tmp_path, given):
    (tmp_path / "config.json").write_text(json.dumps(given))
    return read_config(tmp_path / "config.json")


@given(given=st.sets(st.sampled_from(sorted(HUGGING_FACE))), null=st.booleans())
def test_missing_config_fields_have_hugging_faces_defaults(given, null, tmp_path_factory):
    folder = tmp_path_factory.mktemp("config")
    ours = SIZES | {"tie_word_embeddings": True, "num_key_value_heads": 6, "hidden_size": 24, "head_dim": 2}
    chosen = {key: ours[key] for key in given} | {"head_dim": 2}
    if {"num_attention_heads", "num_key_value_heads"} & given:  # which must fit together
        chosen |= {key: ours[key] for key in ("num_attention_heads", "num_key_value_heads")}
    left = dict.fromkeys(set(HUGGING_FACE) - set(chosen)) if null else {}
    assert config_of(folder, chosen | left) == Config(**HUGGING_FACE | chosen)
    assert config_of(folder, {}) == Config(**HUGGING_FACE)


@pytest.mark.parametrize("null", [True, False])
def test_missing_key_value_heads_and_head_dim_follow_the_queries(null, tmp_path):
    keys = ("num_key_value_heads", "head_dim")
    given = {k: v for k, v in SIZES.items() if k not in keys} | {"hidden_size": 24}
    config = config_of(tmp_path, given | (dict.fromkeys(keys) if null else {}))
    assert (config.num_key_value_heads, config.E) == (6, 4)
    assert config_of(tmp_path, given | {"head_dim": 10}).E == 10


def test_mistral_without_a_window_is_a_llama_with_its_own_defaults(tmp_path):
    usual = {"intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 131072}
    given = {"model_type": "mistral", "sliding_window": None}
    assert config_of(tmp_path, given) == Config(**HUGGING_FACE | usual)
    assert config_of(tmp_path, given | {"num_key_value_heads": None}).num_key_value_heads == 32
    assert config_of(tmp_path, given | SIZES) == Config(**HUGGING_FACE | SIZES)
    for window in ({"model_type": "mistral"}, given | {"sliding_window": 4096}):
        with pytest.raises(UnsupportedError, match="sliding_window is 4096; expected None"):
            config_of(tmp_path, window)


SCALED = {k: v for k, v in LLAMA3.items() if k != "rope_theta"}
OLD = {k: v for k, v in SCALED.items() if k != "rope_type"} | {"type": "llama3"}
STRETCH = RopeScaling(8.0, 1.0, 4.0, 24)
ROPES = {  # what config.json says -> theta and scaling
    "nothing": ({}, 10000.0, None),
    "the old key": ({"rope_theta": 7.0}, 7.0, None),
    "the new one": ({"rope_parameters": {"rope_theta": 7.0, "rope_type": "default"}}, 7.0, None),
    "no type": ({"rope_parameters": {"rope_theta": 7.0}}, 7.0, None),
    "null": ({"rope_parameters": None, "rope_scaling": None, "rope_theta": 7.0}, 7.0, None),
    "empty": ({"rope_scaling": {}, "rope_theta": 7.0}, 7.0, None),
    "inside before outside": ({"rope_parameters": {"rope_theta": 7.0}, "rope_theta": 8.0}, 7.0, None),
    "outside alone": ({"rope_parameters": {"rope_type": "default"}, "rope_theta": 8.0}, 8.0, None),
    "stretched": ({"rope_parameters": LLAMA3}, 500.0, STRETCH),
    "stretched, old": ({"rope_scaling": SCALED, "rope_theta": 7.0}, 7.0, STRETCH),
    "stretched, older": ({"rope_scaling": OLD}, 10000.0, STRETCH),
    "old before new": ({"rope_parameters": {"rope_theta": 7.0}, "rope_scaling": SCALED}, 10000.0, STRETCH),
    "new type before old": ({"rope_scaling": SCALED | {"type": "linear"}}, 10000.0, STRETCH),
    "the whole head": ({"rope_parameters": {"partial_rotary_factor": 1.0}}, 10000.0, None),
}  # fmt: skip


@pytest.mark.parametrize("kind", ROPES)
def test_every_spelling_of_rope_parameters_is_read(kind, tmp_path):
    given, theta, scaling = ROPES[kind]
    config = config_of(tmp_path, SHAPE | {"rope_parameters": None} | given)
    assert (config.rope_theta, config.rope_scaling) == (theta, scaling)
    assert config_of(tmp_path, json.loads(json.dumps(asdict(config)))) == config  # as save_model writes it


BAD_ROPES = {
    "linear": ({"rope_scaling": {"type": "linear", "factor": 2.0}}, UnsupportedError, "rope_scaling is"),
    "yarn": ({"rope_parameters": {"rope_type": "yarn"}}, UnsupportedError, "expected rope_type 'default' or"),
    "text": ({"rope_scaling": "llama3"}, UnsupportedError, "rope_scaling is 'llama3'"),
    "a list": ({"rope_parameters": [8.0]}, UnsupportedError, "rope_parameters is"),
    "by layer": ({"rope_parameters": {"full_attention": LLAMA3}}, UnsupportedError, "has 'full_attention'"),
    "part": ({"rope_parameters": LLAMA3 | {"partial_rotary_factor": 0.5}}, UnsupportedError, "no partial"),
    "no factor": ({"rope_scaling": {"rope_type": "llama3"}}, ConfigError, "has no factor"),
    "a factor of text": ({"rope_scaling": SCALED | {"factor": "8"}}, ConfigError, "factor is '8'"),
    "a factor below 1": ({"rope_scaling": SCALED | {"factor": 0.5}}, ConfigError, "factor is 0.5"),
    "no theta": ({"rope_parameters": {"rope_theta": None}}, ConfigError, "rope_theta is None"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD_ROPES)
def test_unsupported_rope_types_are_refused(kind, folder):
    given, error, match = BAD_ROPES[kind]
    alter(folder, config=lambda c: c | {"rope_scaling": None} | given)
    refused(folder, error, match)


def test_half_precision_is_loaded_exactly(folder):
    for dtype in ("float16", "bfloat16"):
        want = {k: stored(a, dtype) for k, a in arrays(load(folder)).items()}
        (folder / "model.safetensors").write_bytes(b"".join(layout(arrays(load(folder)), dtype)))
        assert same_bits(arrays(load(folder)), want)
        assert same_bits(arrays(load(folder, np.float64)), {k: a.astype(np.float64) for k, a in want.items()})


# ---- one base, however it is stored


@settings(max_examples=8)
@given(seed=seeds, data=st.data())
def test_the_fingerprint_is_independent_of_the_dtype_and_changes_with_every_number(
    seed, data, tmp_path_factory
):
    out = tmp_path_factory.mktemp("print")
    save_model(tiny(seed, np.float32)[0], out / "half", "", dtype="bfloat16")
    given = dict(checkpoint(out / "half").tensors)
    want = fingerprint(given)
    for dtype in ("float32", "float64"):
        save_model(load(out / "half", dtype), out / dtype, "")
        shard(out / dtype)
        assert fingerprint(checkpoint(out / dtype).tensors) == want
        assert fingerprint(arrays(load(out / dtype, np.float64))) == want
    shuffled = {name: np.asfortranarray(given[name]) for name in data.draw(st.permutations(sorted(given)))}
    assert fingerprint(shuffled) == want
    name = data.draw(st.sampled_from(sorted(given)))
    a, rest = given[name], {k: v for k, v in given.items() if k != name}
    other = a.copy()
    at = data.draw(st.integers(0, a.size - 1))
    other.flat[at] = np.nextafter(other.flat[at], np.float32(np.inf))
    changed = [rest | new for new in ({}, {name + "2": a}, {name: other}, {name: a[None]}, {name: a[:-1]})]
    if a.ndim == 2 and a.shape[0] != a.shape[1]:
        changed.append(rest | {name: a.reshape(a.shape[::-1])})
    assert len({want, *map(fingerprint, changed)}) == 1 + len(changed)


@settings(max_examples=40)
@given(seed=seeds, how=flags, data=st.data())
def test_the_fingerprint_of_a_model_sees_every_bit_of_every_parameter(seed, how, data):
    """Norms and biases too; and nothing that stands beside them."""
    model, rng = tiny(seed, np.float32, **how)
    want = base_print(model)
    params = named_params(model)
    assert want == fingerprint(arrays(model))
    path = data.draw(st.sampled_from(sorted(params, key=lambda path: params[path].data.ndim)))
    a = arrays(model)[path].copy()
    at, bit = data.draw(st.integers(0, a.size - 1)), data.draw(st.integers(0, 31))
    a.view(np.uint32).flat[at] ^= np.uint32(1 << bit)
    was, params[path].data = params[path].data, to_device(a)
    assert base_print(model) != want
    params[path].data = was
    some = ["q_proj", "lm_head"]
    inject(model, LoraConfig(r=2, targets=some, bias="lora_only", modules_to_save=["norm"]), rng=rng)
    assert base_print(model) == want


# ---- a base that is replaced between opening and reading


def rewritten(path):
    """Other numbers in the same bytes of the disk."""
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    with open(path, "r+b") as file:
        file.write(raw)


def moved_over(path):
    other = path.with_name("other")
    other.write_bytes(path.read_bytes())
    os.replace(other, path)


def linked(path):
    """A link where the file was, to the same bytes."""
    path.with_name("other").write_bytes(path.read_bytes())
    path.unlink()
    path.symlink_to("other")


LATER = {
    "written over": rewritten, "another in its place": moved_over, "a link in its place": linked,
    "longer": lambda path: os.truncate(path, path.stat().st_size + 1),
    "shorter": lambda path: os.truncate(path, path.stat().st_size - 1),
    "gone": os.remove,
}  # fmt: skip


@pytest.mark.parametrize("later", LATER)
@pytest.mark.parametrize("sharded", [False, True])
def test_a_base_changed_after_opening_is_refused(later, sharded, folder):
    if sharded:
        shard(folder)
    path = folder / ("a.safetensors" if sharded else "model.safetensors")
    for file in folder.glob("*.safetensors"):
        os.utime(file, ns=(0, 0))  # the clock of a file system may be coarse
    found = checkpoint(folder)
    names = [name for name in found.tensors if not sharded or "mlp" in name]
    for name in names:
        found.tensors[name]
    LATER[later](path)
    said = rf"{path.name}: (has been changed or|ends at|cannot|is a link)"
    for name in names:
        with pytest.raises(StorageError, match=said):
            found.tensors[name]
    with pytest.raises(StorageError, match=path.name):
        assemble(found)
    if later == "another in its place":
        assert set(checkpoint(folder).tensors) == set(found.tensors)  # opened again it is one base


# ---- what is taken for a base and is none


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f\nsize 123\n"


def test_a_git_lfs_pointer_is_named_as_one(folder, tmp_path):
    for name in ("model.safetensors", "config.json"):
        raw = (folder / name).read_bytes()
        (folder / name).write_bytes(POINTER)
        refused(folder, FormatError, rf"{name}: is a pointer of Git LFS")
        (folder / name).write_bytes(raw)
    (folder / "tokenizer.json").write_bytes(POINTER)
    with pytest.raises(FormatError, match=r"tokenizer\.json: is a pointer of Git LFS"):
        tokenizer_of(checkpoint(folder))
    (tmp_path / "m.gguf").write_bytes(POINTER)
    with pytest.raises(FormatError, match=r"m\.gguf: is a pointer of Git LFS"):
        load(tmp_path / "m.gguf")
    for size in range(len(POINTER)):  # not every small file is one
        (folder / "model.safetensors").write_bytes(POINTER[:size])
        refused(folder, FormatError, "Git LFS" if size >= 24 else "header|bytes")


def mistakes(tmp_path, model):
    """What people give as a base -> what is said of it, by the class of the error."""
    (adapter := tmp_path / "lora").mkdir()
    shutil.copy(FIXTURES / "adapters/untied--q-and-v/adapter_config.json", adapter)
    shutil.copy(FIXTURES / "adapters/untied--q-and-v/adapter_model.safetensors", adapter)
    (pipe := tmp_path / "pipe").mkdir()
    (pipe / "model_index.json").write_text("{}")
    (pickles := tmp_path / "old").mkdir()
    (pickles / "pytorch_model-00001-of-00002.bin").write_bytes(b"PK")
    (pickles / "config.json").write_bytes((model / "config.json").read_bytes())
    (alone := tmp_path / "alone.safetensors").write_bytes((model / "model.safetensors").read_bytes())
    (outer := tmp_path / "outer").mkdir()
    shutil.copytree(model, outer / "snapshot")
    (quantized := tmp_path / "quantized").mkdir()
    (quantized / "m.Q4_0.gguf").write_bytes(b"GGUF")
    return {
        adapter: (MismatchError, "is an adapter; expected a base model"),
        adapter / "adapter_model.safetensors": (MismatchError, "is an adapter; expected a base model"),
        pipe: (UnsupportedError, "is a diffusers pipeline; expected one model"),
        pickles: (UnsupportedError, "has only pytorch_model-00001-of-00002.bin, a pickle"),
        pickles / "pytorch_model-00001-of-00002.bin": (UnsupportedError, "is a pickle, which can run code"),
        alone: (StorageError, "is a tensor file without its config; expected a folder"),
        outer: (StorageError, "has no config.json; did you mean .*snapshot"),
        quantized: (StorageError, "has no config.json; did you mean .*gguf"),
        "meta-llama/Llama-3.2-1B": (StorageError, "hf download meta-llama/Llama-3.2-1B --local-dir DIR"),
    }


def test_files_mistaken_for_a_base_are_named_for_what_they_are(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for spec, (error, match) in mistakes(tmp_path, folder).items():
        for call in (load, checkpoint, *([weights] if "alone" not in str(spec) else [])):
            with pytest.raises(error, match=match) as e:
                call(spec)
            assert type(e.value) is error
            assert str(e.value).isprintable()
            assert len(str(e.value)) < 400


def test_a_tensor_file_stands_for_its_folder(folder, tmp_path):
    want = arrays(load(folder))
    assert same_bits(arrays(load(folder / "model.safetensors")), want)
    single = folder.rename(tmp_path / "single")
    alone = tmp_path / "alone.safetensors"
    alone.write_bytes((single / "model.safetensors").read_bytes())
    assert same_bits(dict(weights(alone)), want)  # which need no config
    shard(single, lambda name: f"model-0000{1 + ('mlp' in name)}-of-00002.safetensors")
    for name in ("model-00002-of-00002.safetensors", INDEX):
        assert same_bits(arrays(load(single / name)), want)
    unet = single.rename(tmp_path / "unet")
    (unet / INDEX).rename(unet / "diffusion_pytorch_model.safetensors.index.json")
    assert same_bits(dict(weights(unet)), want)


def test_weights_are_read_even_if_the_forward_pass_is_unsupported(folder):
    """sliding windows, stretched positions, activations: no forward pass is run to look at weights."""
    want = arrays(load(folder))
    for change in (
        but(sliding_window=8), but(rope_scaling={"type": "yarn", "factor": 2.0}), but(hidden_act="gelu"),
        but(model_type="gemma"), but(quantization_config={"bits": 8}), but(num_hidden_layers=7),
    ):  # fmt: skip
        raw = (folder / "config.json").read_bytes()
        alter(folder, config=change)
        assert same_bits(dict(weights(folder)), want)
        refused(folder, MiniloraError)
        (folder / "config.json").write_bytes(raw)
    alter(folder, tensors=lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"]})
    assert fingerprint(weights(folder)) == fingerprint(want)  # of a tied base that repeats its table


def test_a_scalar_and_a_vector_have_different_fingerprints():
    a = np.float32(1.0)
    assert fingerprint({"a": np.array(a)}) != fingerprint({"a": np.array([a])})


def test_a_link_to_a_folder_is_followed(folder, tmp_path):
    (tmp_path / "link").symlink_to(folder)
    assert same_bits(arrays(load(tmp_path / "link")), arrays(load(str(folder))))


# ---- the base that ships


def test_the_shipped_base_has_the_recorded_digest_and_facts():
    base = load()
    assert digest(base) == DIGEST
    assert digest(load("base")) == DIGEST
    assert trained(base) == {}
    assert sorted(os.listdir(BASE)) == ["README.md", "config.json", "model.safetensors"]
    facts = read_json(BASE / "config.json")["minilora"]
    known = corpora.MANIFEST["shakespeare"]
    assert (facts["corpus"], facts["corpus_sha256"]) == (known.source, known.digest)
    assert f"**{facts['test']:.4f} nats per character**" in (BASE / "README.md").read_text()


def test_training_a_model_does_not_change_the_base():
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
        text = corpora.corpus("shakespeare")
    except StorageError as e:
        pytest.skip(str(e))
    return evaluate(load(), batching.eval_batches(text.test, 16, 128, windows * 128))


def test_the_base_predicts_the_held_out_plays():
    # 1.545 over 4,096 windows; windows differ by 0.3, so the mean of 64 has an error of 0.04
    assert 1.4 < sampled(64) < 1.62


@pytest.mark.slow
def test_the_base_has_the_loss_stated_in_its_card():
    facts = read_json(BASE / "config.json")["minilora"]
    # float32 sums of other BLAS libraries: 128 windows by 3 layers of some hundred terms each
    assert abs(sampled(facts["recipe"]["test_windows"]) - facts["test"]) < 1e-4


# ---- merging


@pytest.fixture(scope="module")
def merged():
    return merge_equivalence.run(draws=2)


def test_merged_outputs_differ_by_at_most_the_bound(merged):
    assert {(row["dtype"], row["inputs"]) for row in merged} == {
        (d, n) for d in ("float32", "float64") for n in (16, 32, 64, 128, 256, 512, 1024, 2048)
    }
    for row in merged:
        print(row)
        assert 0 < row["difference"] <= row["bound"]
        assert 0 < row["ratio"] <= 1
    worst = max(row["ratio"] for row in merged)
    assert worst > 0.01  # the bound says something: a difference ten times as large comes near it


def test_the_merge_experiment_is_reproducible(merged):
    assert merge_equivalence.run(draws=2) == merged


@settings(max_examples=15)
@given(seed=seeds, dtype=dtypes, s=st.sampled_from([0.25, 2.0, 7 / 3]))
def test_both_implementations_of_the_bound_agree(seed, dtype, s):
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
def test_fortran_ordered_weights_are_saved_correctly(tmp_path):
    model, _ = tiny(0, np.float32)
    for p in named_params(model).values():
        p.data = np.asfortranarray(p.data)
    save_model(model, tmp_path / "m", "")
    assert digest(load(tmp_path / "m")) == digest(model)

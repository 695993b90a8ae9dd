"""A merged folder holds W + ΔW to the bit in the dtype asked for, and the report says what that cost."""

import json
import math
import os
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from by_hand import WEIGHTS, base_weights, merged, read_peft, write_peft
from helpers import merge_bound, tiny
from peft_cases import FIXED, FIXTURES, IDS, slug
from safetensors.numpy import save_file

from minilora.backend import to_device, to_host
from minilora.errors import InputError, MismatchError, NonFiniteError, StorageError
from minilora.formats.huggingface import load, save_model
from minilora.formats.safetensors import CALLED, open_tensors, stored
from minilora.formats.tokenizer import FILES
from minilora.layers import Linear, Param
from minilora.lora import inject
from minilora.merging.llama import Merge, logits, merge_llama
from minilora.methods.lora_config import LoraConfig
from minilora.peft.loading import save_adapter
from minilora.tree import named_params

CASES = [(slug(base), f"{slug(base)}--{slug(adapter)}") for base, adapter in FIXED]
U = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
BASE, ADAPTER = FIXTURES / "bases/untied", FIXTURES / "adapters/untied--patterns"


def listed(folder):
    """Every path below, with the bytes of files."""
    return {p.relative_to(folder): p.is_file() and p.read_bytes() for p in sorted(folder.rglob("*"))}


def refused(error, match, base, adapter, out, **how):
    """Merging raises, and leaves the folder around as it was."""
    before = listed(out.parent)
    with pytest.raises(error, match=match):
        merge_llama(base, adapter, out, **how)
    assert listed(out.parent) == before


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", ["absolute", "relative", "to nowhere"])
def test_no_linked_file_is_copied(kind, name, tmp_path):
    """A merged model is published: not with what lies elsewhere on this disk."""
    shutil.copytree(BASE, tmp_path / "base")
    (tmp_path / "secret").write_text("mine")
    (tmp_path / "base" / name).unlink(missing_ok=True)
    target = {"absolute": tmp_path / "secret", "relative": "../secret", "to nowhere": "none"}[kind]
    (tmp_path / "base" / name).symlink_to(target)
    refused(StorageError, f"{name}: is a link", tmp_path / "base", ADAPTER, tmp_path / "out")


def same_but_for_float64(found, W, kind):
    """Equal to the bit; in float64 up to the order of s, B and A."""
    if kind == "float64":
        return np.abs(found - W).max() <= 8 * U[kind] * np.abs(W).max()
    return np.array_equal(found, stored(W, kind))


class Case(NamedTuple):
    """A base, an adapter, what merging them wrote, and its report."""

    base: Path
    adapter: Path
    out: Path
    found: Merge


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case[1])
def case(request, tmp_path_factory):
    base, adapter = FIXTURES / "bases" / request.param[0], FIXTURES / "adapters" / request.param[1]
    before, out = listed(FIXTURES), tmp_path_factory.mktemp("m") / "out"
    found = merge_llama(base, adapter, out, probe=IDS[0, ::4].tolist())
    assert listed(FIXTURES) == before  # both are only read
    return Case(base, adapter, out, found)


# ---- what is written


def test_merging_writes_W_plus_delta_in_the_dtype_of_the_base(case):
    source, change, out, found = case
    kind = source.name if source.name in U else "float32"
    assert found.dtype == kind
    W, written = merged(source, change), open_tensors(out / "model.safetensors")
    assert written.keys() == W.keys()
    assert set(written.dtypes.values()) == {CALLED[kind]}
    for name in W:
        assert same_but_for_float64(written[name], W[name], kind), name
    was, now = (json.loads((folder / "config.json").read_text()) for folder in (source, out))
    for name in ("bos_token_id", "eos_token_id", "vocab_size", "hidden_size", "num_key_value_heads"):
        assert now[name] == was[name]
    assert now["torch_dtype"] == kind
    assert now["tie_word_embeddings"] == ("lm_head.weight" not in W)
    again = {name: to_host(p.dense()) for name, p in named_params(load(out, np.float64)).items()}
    assert again.keys() == W.keys()


@pytest.mark.parametrize("kind", U)
@pytest.mark.parametrize("source", ["untied", "bfloat16"])
def test_merging_writes_every_requested_dtype(kind, source, tmp_path):
    base = FIXTURES / "bases" / source
    found = merge_llama(base, ADAPTER, tmp_path / "out", dtype=kind)
    W, written = merged(base, ADAPTER), open_tensors(tmp_path / "out/model.safetensors")
    assert found.dtype == kind
    assert set(written.dtypes.values()) == {CALLED[kind]}
    for name in W:
        assert same_but_for_float64(written[name], W[name], kind), name
    changed = {f"{row.module}.weight" for row in found.rows}
    if kind == "float64":  # what is not adapted passes as it was, and no change is lost
        assert all(np.array_equal(written[name], W[name]) for name in W if name not in changed)
        assert {row.lost for row in found.rows} == {0}
        assert found.written <= 1e-13 * found.logits


def test_a_float64_base_keeps_float64(tmp_path):
    rng = np.random.default_rng(0)
    base = shutil.copytree(BASE, tmp_path / "base")
    W = {name: a + 1e-9 * rng.standard_normal(a.shape) for name, a in base_weights(base).items()}
    save_file(W, base / "model.safetensors")
    found = merge_llama(base, ADAPTER, tmp_path / "out")
    assert found.dtype == "float64"
    written = open_tensors(tmp_path / "out/model.safetensors")
    for name, whole in merged(base, ADAPTER).items():
        assert same_but_for_float64(written[name], whole, "float64"), name
    assert np.array_equal(written["model.norm.weight"], W["model.norm.weight"])


def test_only_the_tokenizer_and_the_card_are_copied(tmp_path):
    base = shutil.copytree(BASE, tmp_path / "base")
    for i, name in enumerate(FILES):
        (base / name).write_bytes(b'{"any": %d}\r\n\xff' % i)
    (base / "pytorch_model.bin").write_text("no")
    config = json.loads((base / "config.json").read_text()) | {"eos_token_id": [2, 5], "pad_token_id": 3}
    (base / "config.json").write_text(json.dumps(config))
    merge_llama(base, ADAPTER, tmp_path / "out")
    wanted = {"config.json", "README.md", "model.safetensors", *FILES}
    assert set(os.listdir(tmp_path / "out")) == wanted
    for name in FILES:
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()
    now = json.loads((tmp_path / "out/config.json").read_text())
    assert (now["bos_token_id"], now["eos_token_id"], now["pad_token_id"]) == (1, [2, 5], 3)
    card = (tmp_path / "out/README.md").read_text()
    assert "base" in card
    assert ADAPTER.name in card


def test_the_same_files_give_the_same_bytes(tmp_path):
    found = [merge_llama(BASE, ADAPTER, tmp_path / name / "out", dtype="float16") for name in "ab"]
    assert listed(tmp_path / "a") == listed(tmp_path / "b")
    assert found[0].rows == found[1].rows
    assert found[0].data() | {"out": ""} == found[1].data() | {"out": ""}


# ---- what is said about it


def test_every_number_of_the_report_matches_the_dense_matrices(case):
    source, change, out, found = case
    W, whole = base_weights(source), merged(source, change)
    W.setdefault("lm_head.weight", W["model.embed_tokens.weight"])
    changed = {n for n in whole if whole[n].ndim == 2 and not np.array_equal(whole[n], W[n])}
    assert {f"{row.module}.weight" for row in found.rows} == changed
    for row in found.rows:
        a, b = W[f"{row.module}.weight"], whole[f"{row.module}.weight"]
        size = np.linalg.norm(b - a)
        assert row.largest == pytest.approx(np.abs(b - a).max(), rel=1e-10)
        assert row.relative == pytest.approx(size / np.linalg.norm(a), rel=1e-10)
        assert row.lost == pytest.approx(np.linalg.norm(stored(b, found.dtype) - b) / size, rel=1e-6)
        most = U[found.dtype] * np.linalg.norm(b) / size  # half a last digit of every number
        copied = row.module not in read_peft(change)[0]  # a saved module is in float32 already
        assert (0 if copied else 0.2 * most) <= row.lost <= most
    theirs = np.load(change / "logits.npy")[0]  # PEFT's, in float64 but for its norms
    assert found.logits == pytest.approx(np.abs(theirs).max(), rel=1e-5)
    exact = by_hand_logits(source, change, IDS[0, ::4])
    assert found.logits == pytest.approx(np.abs(exact).max(), rel=1e-12)
    written = load(out, np.float32)
    off = np.abs(logits(written, IDS[:1, ::4]) - exact).max()
    assert found.written == pytest.approx(off, rel=1e-6)


def by_hand_logits(base, adapter, ids):
    """What a plain float64 model with the weights merged by hand computes, all positions at once."""
    whole = merged(base, adapter)
    model = load(base, np.float64)
    if "lm_head.weight" in whole and model.lm_head is None:
        model.lm_head = Linear(Param(to_device(whole["lm_head.weight"])))
    for name, p in named_params(model).items():
        p.data = to_device(whole[name])
    return to_host(model(to_device(ids[None]))[0])[0]


def test_merging_changes_the_logits_only_by_rounding(case):
    """In float64 nearly nothing; in float32 no more than some of float32's own roundings.

    Both sides are one function in exact arithmetic, so the difference shrinks with the unit roundoff: by
    2^29, for which 64 allows for luck. That of float32 is what rounding does to the unmerged model alone, or
    less, but for luck again.
    """
    found = case.found
    assert 0 < found.float64 <= 1e-13 * found.logits
    assert 0 < found.rounding <= 1e-4 * found.logits
    assert 0 < found.float32 <= 16 * found.rounding
    assert found.float64 <= 64 * 2.0**-29 * max(found.float32, U["float32"] * found.logits)
    if found.dtype == "float32":
        assert found.written <= 16 * found.rounding
    else:
        assert found.float32 < found.written <= 1000 * U[found.dtype] * found.logits


def test_for_one_linear_map_the_difference_is_within_the_derived_bound(tmp_path):
    """The head alone is adapted, so that both models are the same to the bit up to what it reads."""
    rng = np.random.default_rng(0)
    V, D, r = 23, 12, 3
    A, B = (rng.standard_normal(shape).astype(np.float32) for shape in ((r, D), (V, r)))
    adapter = write_peft(tmp_path / "head", {"lm_head": (A, B)}, lora_alpha=7)
    found = merge_llama(BASE, adapter, tmp_path / "out", probe=IDS[0, :32].tolist())
    model = load(BASE)
    W = to_host(model.lm_head.weight.data)
    model.lm_head = Linear(Param(to_device(np.eye(D, dtype=np.float32))))  # which adds nothing but zeros
    X = logits(model, IDS[:1, :32]).T
    bound = to_host(merge_bound(*map(to_device, (W, A, B)), 7 / 3, to_device(X), np.float32))
    assert 0 < found.float32 <= bound.max()
    assert bound.max() <= 1e-4 * found.logits  # and the bound says something


def test_the_report_says_that_a_change_is_too_small_for_the_dtype(tmp_path):
    """A ΔW of 2^-12 of W is within half a last digit of bfloat16 everywhere, and all of it is lost."""
    _, tensors, config = read_peft(FIXTURES / "adapters/untied--q-and-v")
    adapter = tmp_path / "small"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    small = {name: a * np.float32(2.0**-14 if "lora_B" in name else 1) for name, a in tensors.items()}
    save_file({f"base_model.model.{name}": a for name, a in small.items()}, adapter / WEIGHTS)
    base = shutil.copytree(BASE, tmp_path / "base")
    W = {name: stored(a, "bfloat16") for name, a in base_weights(base).items()}
    save_file(W, base / "model.safetensors")
    found = merge_llama(base, adapter, tmp_path / "out", dtype="bfloat16")
    written = open_tensors(tmp_path / "out/model.safetensors")
    assert len(found.rows) == 4
    for row in found.rows:
        a, b = W[f"{row.module}.weight"], written[f"{row.module}.weight"]
        same = (a == b).mean()
        assert same > 0.95  # only numbers near 0 could take it
        assert 0.5 < row.lost <= 1.5
        assert 0 < row.relative < 2.0**-8
    in32 = merge_llama(base, adapter, tmp_path / "wide", dtype="float32")
    assert all(row.lost < 0.01 for row in in32.rows)
    assert all("e" in line for line in str(found).splitlines()[1:5])


@pytest.mark.parametrize("init", ["kaiming", "both"])
def test_a_zero_adapter_can_be_merged(init, tmp_path):
    model, rng = tiny(0, np.float32)
    save_model(model, tmp_path / "base", "b\n")
    inject(model, LoraConfig(r=2, targets=["q_proj", "up_proj"], init=init), rng=rng)
    save_adapter(model, tmp_path / "adapter")
    found = merge_llama(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert len(found.rows) == (0 if init == "kaiming" else 4)
    assert "written in float32" in str(found)
    if init == "kaiming":
        assert (found.float32, found.float64) == (0, 0)
        assert found.written == found.rounding
        before, after = base_weights(tmp_path / "base"), base_weights(tmp_path / "out")
        assert all(np.array_equal(after[name], before[name]) for name in before)


def test_a_change_of_a_zero_matrix_has_infinite_relative_size(tmp_path):
    base = shutil.copytree(BASE, tmp_path / "base")
    W = {name: a.astype(np.float32) for name, a in base_weights(base).items()}
    W["model.layers.0.self_attn.q_proj.weight"] *= 0
    save_file(W, base / "model.safetensors")
    found = merge_llama(base, FIXTURES / "adapters/untied--q-and-v", tmp_path / "out")
    relative = {row.module: row.relative for row in found.rows}
    assert relative.pop("model.layers.0.self_attn.q_proj") == math.inf
    assert all(map(math.isfinite, relative.values()))


@pytest.mark.parametrize("large", [1e15, 1e30])
def test_the_report_says_that_logits_overflow(large, tmp_path):
    """In float32, and from 1e30 on the norm of the matrix, too; without a warning."""
    base = shutil.copytree(BASE, tmp_path / "base")
    W = {name: a * np.float32(large if "mlp" in name else 1) for name, a in base_weights(base).items()}
    save_file(W, base / "model.safetensors")
    found = merge_llama(base, ADAPTER, tmp_path / "out", dtype="float32")
    assert not math.isfinite(found.float32)
    assert "nan" in str(found)
    W, written = merged(base, ADAPTER), base_weights(tmp_path / "out")
    assert all(np.array_equal(written[name], stored(W[name], "float32")) for name in W)


def test_a_report_prints_every_module_and_its_data_are_json(tmp_path):
    found = merge_llama(BASE, ADAPTER, tmp_path / "out")
    text = str(found)
    for row in found.rows:
        (line,) = [line for line in text.splitlines() if line.startswith(f"{row.module} ")]
        assert line.split()[1:] == [f"{row.largest:.2e}", f"{row.relative:.2e}", f"{row.lost:.1e}"]
    for number in (found.float32, found.rounding, found.float64, found.written):
        assert f"{number:.1e}" in text
    again = json.loads(json.dumps(found.data()))
    assert again["float32"] == found.float32
    assert [row["module"] for row in again["rows"]] == [row.module for row in found.rows]


def test_the_report_is_computed_on_the_given_probe(tmp_path):
    one = merge_llama(BASE, ADAPTER, tmp_path / "one", probe=[5])
    many = merge_llama(BASE, ADAPTER, tmp_path / "many", probe=[5, 7, 11, 5])
    assert one.logits == pytest.approx(np.abs(by_hand_logits(BASE, ADAPTER, np.array([5]))).max(), rel=1e-12)
    assert many.logits == pytest.approx(
        np.abs(by_hand_logits(BASE, ADAPTER, np.array([5, 7, 11, 5]))).max(), rel=1e-12
    )


# ---- what is refused, and that nothing is left of it


def test_bad_input_is_refused_and_leaves_nothing(tmp_path):
    out = tmp_path / "out"
    refused(InputError, "dtype is 'float8'; nearest", BASE, ADAPTER, out, dtype="float8")
    refused(InputError, "token id 23", BASE, ADAPTER, out, probe=[1, 23])
    refused(InputError, "both at least 1", BASE, ADAPTER, out, probe=[])
    refused(InputError, "65 tokens; the model takes at most 64", BASE, ADAPTER, out, probe=[1] * 65)
    refused(MismatchError, "k_proj has factors for", FIXTURES / "bases/head_dim", ADAPTER, out)
    refused(StorageError, r"adapter_config\.json", BASE, tmp_path / "none", out)
    refused(StorageError, r"config\.json", tmp_path / "none", ADAPTER, out)


def test_merging_never_overwrites_an_existing_folder_or_the_input(tmp_path):
    base, adapter = shutil.copytree(BASE, tmp_path / "b/base"), shutil.copytree(ADAPTER, tmp_path / "a")
    (tmp_path / "mine").mkdir()
    refused(StorageError, "is there already", base, adapter, tmp_path / "mine")
    for out in (base, adapter, base / "inside", adapter / "inside", tmp_path / "b"):
        refused(InputError, "is the input", base, adapter, out)


def test_another_base_is_refused_unless_forced(tmp_path):
    model, rng = tiny(0, np.float32)
    save_model(model, tmp_path / "base", "b\n")
    save_model(tiny(1, np.float32)[0], tmp_path / "other", "b\n")
    inject(model, LoraConfig(r=2, targets=["q_proj"], init="both"), rng=rng)
    save_adapter(model, tmp_path / "adapter")
    refused(MismatchError, "another base", tmp_path / "other", tmp_path / "adapter", tmp_path / "out")
    merge_llama(tmp_path / "other", tmp_path / "adapter", tmp_path / "out", force=True)
    W, written = merged(tmp_path / "other", tmp_path / "adapter"), base_weights(tmp_path / "out")
    assert all(np.array_equal(written[name], stored(W[name], "float32")) for name in W)


def test_values_that_overflow_the_dtype_are_refused_and_leave_nothing(tmp_path):
    base = shutil.copytree(BASE, tmp_path / "base")
    W = {name: a.astype(np.float32) for name, a in base_weights(base).items()}
    W["model.layers.1.mlp.up_proj.weight"][2, 3] = 1e5
    save_file(W, base / "model.safetensors")
    says = r"up_proj\.weight has values that are not finite in float16"
    refused(NonFiniteError, says, base, ADAPTER, tmp_path / "out", dtype="float16")
    assert merge_llama(base, ADAPTER, tmp_path / "out", dtype="bfloat16").dtype == "bfloat16"


def test_a_failing_write_leaves_nothing(tmp_path, monkeypatch):
    def full(*args, **how):
        yield b"half"
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("minilora.formats.huggingface.layout", full)
    refused(StorageError, "No space left", BASE, ADAPTER, tmp_path / "deep/out")

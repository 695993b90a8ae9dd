"""A smaller adapter is the nearest one and says how near; the LoRA of two checkpoints is their difference."""

import json
import math
import os
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from by_hand import (
    CONFIG,
    FILES,
    PREFIX,
    U32,
    WEIGHTS,
    base_weights,
    bound32,
    bound64,
    changes,
    merged,
    read_peft,
    write_peft,
)
from helpers import SIZES, seeds, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_cases import how as told_of
from peft_cases import FIXED, FIXTURES, IDS, slug
from peft_cases import logits as peft_logits
from safetensors.numpy import save_file

from minilora import backend
from minilora.backend import to_device, to_host
from minilora.compose.extract import extract, is_map
from minilora.compose.ranks import choose
from minilora.compose.truncate import compress
from minilora.errors import (
    ConfigError,
    InputError,
    MismatchError,
    NonFiniteError,
    StorageError,
    UnsupportedError,
)  # fmt: skip
from minilora.formats.huggingface import load, save_model
from minilora.formats.safetensors import layout, open_tensors, stored
from minilora.lora import fuse
from minilora.merging.merge import merge_checkpoint
from minilora.peft.convert import convert
from minilora.peft.folder import open_adapter
from minilora.peft.loading import load_adapter
from minilora.spectra import rank_at
from minilora.tree import named_params

ADAPTERS = [(slug(base), f"{slug(base)}--{slug(adapter)}") for base, adapter in FIXED]
RANKS = st.integers(1, 7)


@st.composite
def adapters(draw, most=4):
    """module -> (A, B) of any shapes and ranks, some beyond the shape, whose spectra fall; and a config."""
    rng = np.random.default_rng(draw(seeds))
    dtype = draw(st.sampled_from([np.float16, np.float32, np.float64]))
    factors = {}
    for i in range(draw(st.integers(1, most))):
        O, I, r = draw(st.integers(1, 20)), draw(st.integers(1, 20)), draw(RANKS)  # noqa: E741
        fall = draw(st.sampled_from([1.0, 0.5, 0.1])) ** np.arange(r)
        A, B = rng.standard_normal((r, I)) * fall[:, None], rng.standard_normal((O, r))
        factors[f"model.layers.{i}.mlp.m{i % 3}"] = A.astype(dtype), B.astype(dtype)
    config = {"lora_alpha": draw(st.sampled_from([1, 7, 16.5])), "use_rslora": draw(st.booleans())}
    if draw(st.booleans()):
        config["alpha_pattern"] = {"m1": 3, "layers.0.mlp.m0": 0.75}
    return factors, config


def dense_spectra(folder):
    return {m: np.linalg.svd(dW, compute_uv=False) for m, dW in changes(folder).items()}


def error(folder):
    """Module -> what float64 may be off by for the factors of a folder."""
    return {m: bound64(A, B, s) for m, (A, B, s) in read_peft(folder)[0].items()}


def pair(tmp_path_factory, given_):
    """The input's folder, and the name of an output."""
    tmp = tmp_path_factory.mktemp("a")
    return write_peft(tmp / "in", given_[0], **given_[1]), tmp / "out"


def listed(folder):
    """Every path below, with the bytes of files."""
    return {p.relative_to(folder): p.is_file() and p.read_bytes() for p in sorted(folder.rglob("*"))}


# ---- the nearest of a smaller rank


@settings(max_examples=25)
@given(given_=adapters())
def test_at_full_rank_compression_only_rounds(given_, tmp_path_factory):
    source, out = pair(tmp_path_factory, given_)
    found = compress(source, out, rank=7)
    before, after, S, err = changes(source), changes(out), dense_spectra(source), error(source)
    assert before.keys() == after.keys()
    for row in found.rows:
        m = row.module
        assert row.rank == min(row.r, *row.shape)
        assert np.linalg.norm(after[m] - before[m]) <= bound32(S[m]) + 3 * err[m]
        assert row.optimum == row.spectral == 0


@settings(max_examples=40)
@given(given_=adapters(), rank=RANKS)
def test_the_reported_residual_is_the_true_one_and_optimal(given_, rank, tmp_path_factory):
    source, out = pair(tmp_path_factory, given_)
    found = compress(source, out, rank=rank)
    before, after, S, err = changes(source), changes(out), dense_spectra(source), error(source)
    pairs = read_peft(out)[0]
    lost = {}
    for row in found.rows:
        m, k = row.module, row.rank
        A, B, s = pairs[m]
        assert row.shape == before[m].shape == (len(B), A.shape[1])
        assert row.r == len(given_[0][m][0])
        assert (len(A), s) == (k, 1) == (min(rank, row.r, *row.shape), 1)
        lost[m] = np.linalg.norm(after[m] - before[m])
        assert abs(row.residual - lost[m]) <= 4 * (err[m] + bound64(A, B))
        tail = np.linalg.norm(S[m][k:])
        assert abs(row.optimum - tail) <= math.sqrt(len(S[m])) * 2 * err[m]
        assert tail - 4 * err[m] <= row.residual <= tail + bound32(S[m][:k]) + 4 * err[m]
        assert abs(row.norm - np.linalg.norm(before[m])) <= 4 * err[m]
        assert abs(row.spectral - (S[m][k] if k < len(S[m]) else 0)) <= 2 * err[m]
    whole = math.hypot(*(row.norm for row in found.rows))
    assert found.residual == pytest.approx(math.hypot(*(row.residual for row in found.rows)) / whole, 1e-12)
    assert found.optimum == pytest.approx(math.hypot(*(row.optimum for row in found.rows)) / whole, 1e-12)
    assert found.parameters == sum(row.rank * sum(row.shape) for row in found.rows)
    assert found.before == sum(row.r * sum(row.shape) for row in found.rows)
    assert found.out == str(out)


@settings(max_examples=20)
@given(given_=adapters(most=1), k=st.integers(1, 4), seed=seeds)
def test_no_other_change_of_the_same_rank_is_nearer(given_, k, seed, tmp_path_factory):
    source, out = pair(tmp_path_factory, given_)
    (row,) = compress(source, out, rank=k).rows
    ((A, B, s),) = read_peft(source)[0].values()
    dW, rng = s * B @ A, np.random.default_rng(seed)
    slack = bound32([row.norm]) * k + 4 * bound64(A, B, s)
    strong = np.argsort(-np.linalg.norm(A, axis=1) * np.linalg.norm(B, axis=0))[:k]
    others = {
        "the first k factors": s * B[:, :k] @ A[:k],
        "the k strongest factors": s * B[:, strong] @ A[strong],
        "the best on the k longest rows of A": dW @ np.linalg.pinv(A[strong]) @ A[strong],
    }
    for i in range(5):  # the best in a random column space, and in one near the right one
        Q = rng.standard_normal((row.shape[0], k))
        near = np.linalg.svd(dW)[0][:, :k] + 0.1 * Q if k <= min(row.shape) else Q
        for kind, X in (("random", Q), ("near", near)):
            X = np.linalg.qr(X)[0]
            others[f"{kind} {i}"] = X @ (X.T @ dW)
    for how, other in others.items():
        assert np.linalg.norm(dW - other) >= row.residual - slack, how


@settings(max_examples=20)
@given(given_=adapters(most=1), rank=RANKS)
def test_compression_does_not_depend_on_how_the_scale_is_stored(given_, rank, tmp_path_factory):
    """One ΔW in four ways: alpha, the factors' sizes, rsLoRA and patterns may hold the scale."""
    factors, _ = given_
    tmp = tmp_path_factory.mktemp("a")
    ((module, (A, B)),) = factors.items()
    A, B, r = A.astype(np.float64), B.astype(np.float64), len(A)
    ways = {
        "plain": ((A, B), {"lora_alpha": 2 * r}),
        "moved": ((A * 4, B / 8), {"lora_alpha": 4 * r}),
        "rsLoRA": ((A, B), {"lora_alpha": 2 * math.sqrt(r), "use_rslora": True}),
        "patterns": ((A, B), {"lora_alpha": 99, "alpha_pattern": {module[6:]: 2 * r}}),
    }
    found = {}
    for how, (both, config) in ways.items():
        compress(write_peft(tmp / how, {module: both}, **config), tmp / f"{how} out", rank=rank)
        found[how] = changes(tmp / f"{how} out")[module]
        given_again = json.loads((tmp / f"{how} out" / CONFIG).read_text())
        assert given_again["lora_alpha"] == given_again["r"] == min(rank, r, *found[how].shape)
        assert given_again["use_rslora"] is False
        assert given_again["alpha_pattern"] == given_again["rank_pattern"] == {}
    S = np.linalg.svd(2 * B @ A, compute_uv=False)
    gap = S[rank - 1] - S[rank] if rank < len(S) else S[min(rank, len(S)) - 1]
    if gap > 0.01 * S[0]:  # else the vectors at the cut are not settled
        for how in ways:
            off = 400 * 4 * bound64(A, B, 2.0) + 2 * bound32(S)
            assert np.linalg.norm(found[how] - found["plain"]) <= off, how


def test_a_rank_above_the_shape_keeps_the_full_rank(tmp_path):
    rng = np.random.default_rng(0)
    A, B = rng.standard_normal((6, 3)).astype(np.float32), rng.standard_normal((5, 6)).astype(np.float32)
    source = write_peft(tmp_path / "in", {"a.b": (A, B)})
    (row,) = compress(source, tmp_path / "out", rank=100).rows
    assert (row.r, row.rank) == (6, 3)
    assert np.linalg.norm(changes(source)["a.b"] - changes(tmp_path / "out")["a.b"]) <= 1e-5


@pytest.mark.parametrize("how", [{"rank": 1}, {"energy": 0.5}, {"energy": 1.0, "per_module": True}])
def test_a_zero_change_is_compressed_to_zero(how, tmp_path):
    A, B = np.ones((4, 3), np.float32), np.zeros((5, 4), np.float32)
    found = compress(write_peft(tmp_path / "in", {"a.b": (A, B)}), tmp_path / "out", **how)
    assert (found.rows[0].rank, found.rows[0].norm, found.residual, found.optimum) == (1, 0, 0, 0)
    assert not changes(tmp_path / "out")["a.b"].any()
    assert "0.00e+00" in str(found)


# ---- which ranks


@st.composite
def spectra(draw):
    """Falling spectra by module, and what a direction of each costs."""
    n = draw(st.integers(1, 6))
    values = st.lists(st.floats(0, 10).map(lambda x: round(x, 2)), min_size=1, max_size=6)
    found = {f"m{i}": np.sort(draw(values))[::-1] for i in range(n)}
    return found, {m: draw(st.integers(2, 40)) for m in found}


def kept(found, ranks):
    return math.fsum(float((S[: ranks[m]] ** 2).sum()) for m, S in found.items())


def spent(costs, ranks):
    return sum(k * costs[m] for m, k in ranks.items())


@given(given_=spectra(), rank=RANKS)
def test_per_module_ranks_keep_the_budget_and_at_least_the_energy_of_a_common_rank(given_, rank):
    found, costs = given_
    common = choose(found, costs, rank, None, False)
    assert common == {m: min(rank, len(S)) for m, S in found.items()}
    ranks = choose(found, costs, rank, None, True)
    assert ranks.keys() == found.keys()
    assert all(1 <= k <= len(found[m]) for m, k in ranks.items())
    assert spent(costs, ranks) <= rank * sum(costs.values())
    assert kept(found, ranks) >= kept(found, common)


def test_narrow_modules_do_not_crowd_out_a_wide_one():
    """Each of b's values brings a little more for its price, but then there is no room for a's second."""
    found = {"a": np.array([11.0, 10.0]), "b": np.array([3.0, 1.75, 1.75, 0.1])}
    costs = {"a": 100, "b": 3}
    assert choose(found, costs, 2, None, True) == {"a": 2, "b": 2}


@given(given_=spectra(), rank=RANKS)
def test_at_equal_costs_the_largest_values_are_kept(given_, rank):
    found, _ = given_
    ranks = choose(found, dict.fromkeys(found, 7), rank, None, True)
    first = sum(float(S[0] ** 2) for S in found.values())
    more = np.sort(np.concatenate([S[1:] for S in found.values()]) ** 2)[::-1]
    best = first + more[: (rank - 1) * len(found)].sum()
    assert kept(found, ranks) == pytest.approx(best, rel=1e-12)


@given(given_=spectra(), share=st.floats(0.05, 1))
def test_an_energy_is_kept_with_the_least_rank(given_, share):
    found, costs = given_
    each = choose(found, costs, None, share, True)
    for m, S in found.items():
        whole = (S * S).sum()
        assert (S[: each[m]] ** 2).sum() >= share * whole * (1 - 1e-11)
        assert each[m] == 1 or (S[: each[m] - 1] ** 2).sum() < share * whole
    common = choose(found, costs, None, share, False)
    k = max(common.values())
    assert common == {m: min(k, len(S)) for m, S in found.items()}
    whole = kept(found, {m: len(S) for m, S in found.items()})
    assert kept(found, common) >= share * whole * (1 - 1e-11)
    assert k == 1 or kept(found, dict.fromkeys(found, k - 1)) < share * whole


@settings(max_examples=15)
@given(given_=adapters(), rank=RANKS, share=st.sampled_from([0.3, 0.9, 0.999]))
def test_per_module_ranks_follow_the_spectra_of_the_adapter(given_, rank, share, tmp_path_factory):
    source, out = pair(tmp_path_factory, given_)
    S, before = dense_spectra(source), changes(source)
    found = compress(source, out, rank=rank, per_module=True)
    assert found.parameters <= rank * sum(sum(dW.shape) for dW in before.values())
    common = compress(source, out.with_name("common"), rank=rank)
    assert math.hypot(*(row.optimum for row in found.rows)) <= (1 + 1e-6) * (
        math.hypot(*(row.optimum for row in common.rows)) + 1e-6
    )
    found = compress(source, out, energy=share, per_module=True, overwrite=True)
    for row in found.rows:
        k, whole = row.rank, (S[row.module] ** 2).sum()
        assert (S[row.module][:k] ** 2).sum() >= share * whole * (1 - 1e-6)
        assert k == 1 or (S[row.module][: k - 1] ** 2).sum() < share * whole * (1 + 1e-6)
    found = compress(source, out, energy=share, overwrite=True)
    assert found.optimum**2 <= (1 - share) + 1e-6
    after = changes(out)
    lost = math.fsum(((before[m] - after[m]) ** 2).sum() for m in before)
    assert lost <= (1 - share + 1e-5) * math.fsum((dW**2).sum() for dW in before.values())


@pytest.mark.parametrize(
    "how",
    [
        {}, {"rank": 2, "energy": 0.5}, {"rank": 0}, {"rank": True}, {"rank": 1.0}, {"energy": 0},
        {"energy": 1.1}, {"energy": math.nan}, {"energy": "0.9"}, {"energy": -1.0}, {"per_module": True},
    ],
)  # fmt: skip
def test_an_invalid_rank_or_energy_is_refused_before_reading(how, tmp_path):
    with pytest.raises(ConfigError, match=r"^(rank|energy) "):
        compress(tmp_path / "none", tmp_path / "out", **how)
    with pytest.raises(ConfigError, match=r"^(rank|energy) "):
        extract(tmp_path / "none", tmp_path / "other", tmp_path / "out", **how)


# ---- the written folder


@pytest.mark.parametrize(("base", "adapter"), ADAPTERS)
def test_compression_keeps_the_rest_of_the_folder_and_the_result_loads(base, adapter, tmp_path):
    source, out = FIXTURES / "adapters" / adapter, tmp_path / "out"
    before = listed(source)
    found = compress(source, out, rank=2)
    assert listed(source) == before
    old, new = (read_peft(folder)[1] for folder in (source, out))
    assert old.keys() == new.keys()
    halves = {f"{m}.{kind}{half}{end}" for m in read_peft(out)[0] for half in "AB"
              for kind, end in (("lora_", ".weight"), ("lora_embedding_", ""))}  # fmt: skip
    for name, a in old.items():
        assert name in halves or a.tobytes() == new[name].tobytes(), name
    assert set(open_tensors(out / WEIGHTS).dtypes.values()) == {"F32"}
    was, now = (json.loads((folder / CONFIG).read_text()) for folder in (source, out))
    for name in ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora"):
        was[name] = now[name]
    if isinstance(was["target_modules"], str):  # a pattern is not run, so what it may mean is not promised
        was["target_modules"] = sorted(read_peft(out)[0])
    assert was == now
    given_, opened = open_adapter(source), open_adapter(out)
    assert opened.pairs.keys() == given_.pairs.keys() == {row.module for row in found.rows}
    assert opened.replaced == given_.replaced
    assert {(p.r, p.scale) for p in opened.pairs.values()} == {(2, 1.0)}
    model = load(FIXTURES / "bases" / base, np.float64)
    load_adapter(model, out)
    fuse(model)
    by_hand = merged(FIXTURES / "bases" / base, out)
    for name, p in named_params(model).items():
        assert np.abs(to_host(p.data) - by_hand.pop(name)).max() <= 1e-13
    assert not by_hand


@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
def test_a_stored_copy_of_the_base_is_recognised_in_any_dtype(kind, tmp_path):
    """PEFT writes head and embedding along in the adapter's dtype; compressed it is float32."""
    source = shutil.copytree(FIXTURES / "adapters/untied--embedding-and-head", tmp_path / "in")
    old = open_tensors(source / WEIGHTS)
    (source / WEIGHTS).write_bytes(b"".join(layout({name: old[name] for name in old}, kind)))
    compress(source, tmp_path / "out", rank=2)
    for folder in (source, tmp_path / "out"):
        assert load_adapter(load(FIXTURES / "bases/untied"), folder).norms
        other = tmp_path / "other"
        if not other.exists():
            shutil.copytree(FIXTURES / "bases/untied", other)
            tensors = base_weights(other)
            tensors["lm_head.weight"] = tensors["lm_head.weight"] * 1.01
            save_file({k: a.astype(np.float32) for k, a in tensors.items()}, other / "model.safetensors")
        with pytest.raises(MismatchError, match="another base"):
            load_adapter(load(other), folder)


def test_the_same_adapter_gives_the_same_bytes(tmp_path):
    source = FIXTURES / "adapters/untied--patterns"
    for i, how in enumerate([{"rank": 2}, {"energy": 0.9}, {"energy": 0.9, "per_module": True}]):
        for name in ("a", "b"):
            compress(source, tmp_path / f"{name}{i}", **how)
        assert listed(tmp_path / f"a{i}") == listed(tmp_path / f"b{i}")


@pytest.mark.parametrize("how", [{"rank": 2}, {"energy": 0.9}, {"rank": 2, "per_module": True}])
def test_the_number_of_cores_changes_no_bit(how, tmp_path, monkeypatch):
    found = []
    for n in (1, 2, 5):
        monkeypatch.setattr(backend, "cores", lambda n=n: n)
        told = compress(FIXTURES / "adapters/untied--patterns", tmp_path / f"{n}", **how)
        found.append((told.rows, told.notes, listed(tmp_path / f"{n}")))
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("how", [{"rank": 2}, {"energy": 0.5}, {"energy": 0.5, "per_module": True}])
def test_only_what_is_kept_and_a_module_per_core_are_in_memory(how, tmp_path, monkeypatch):
    rng, (O, I, r), count = np.random.default_rng(0), (400, 300, 32), 60  # noqa: E741
    fall = 0.3 ** np.arange(r)[:, None]
    A, B = (fall * rng.standard_normal((r, I))).astype(np.float32), rng.standard_normal((O, r))
    factors = {f"layers.{i}.x": (A, B.astype(np.float32)) for i in range(count)}
    source = write_peft(tmp_path / "in", factors)
    monkeypatch.setattr(backend, "cores", lambda: 2)
    tracemalloc.start()
    found = compress(source, tmp_path / "out", **how)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert {row.rank for row in found.rows} <= {1, 2}
    each = 8 * r * (O + I)  # the factors of a module in float64
    most = 2 * 8 * each + 2 * 4 * found.parameters
    assert peak < most
    assert count * each > 2 * most


# ---- the strings of a header, and what other tools' files leave out


def header(folder):
    return open_tensors(folder / WEIGHTS).metadata


def test_the_strings_of_a_header_stay_unless_they_tell_of_old_sizes(tmp_path):
    (file,) = (FILES / "kohya_sdscripts/sd15_conv").glob("*.safetensors")
    told = {"ss_network_args": '{"conv_dim": "4", "conv_alpha": "1.0", "algo": "locon", "conv_dims": 1}'}
    told |= {
        "ss_tag_frequency": '{"dim": 3}',
        "alpha": "3",
        "lora_rank": "9",
        "modelspec.hash_sha256": "0x00",
    }
    tensors = open_tensors(file)
    old = dict(tensors.metadata) | told
    (tmp_path / "a.safetensors").write_bytes(b"".join(layout({n: tensors[n] for n in tensors}, None, old)))
    compress(tmp_path / "a.safetensors", tmp_path / "out", rank=3)
    sizes = {"ss_network_dim", "ss_network_alpha", "alpha", "lora_rank"}
    own = {"format", "minilora", "sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256"}
    new = dict(header(tmp_path / "out"))
    assert json.loads(new.pop("ss_network_args")) == {"algo": "locon"}
    del old["ss_network_args"]
    assert new.pop("format") == "pt"
    assert new.pop("minilora")
    assert new == {k: text for k, text in old.items() if k not in sizes | own}


def test_sizes_that_are_still_true_stay_in_a_header(tmp_path):
    """r = alpha = 2 before and after."""
    rng, told = (
        np.random.default_rng(0),
        {"ss_network_dim": "2", "ss_network_alpha": "2", "ss_network_args": "None"},
    )
    factors = {f"a.{i}": (rng.standard_normal((2, 5)), rng.standard_normal((4, 2))) for i in range(2)}
    source = write_peft(tmp_path / "in", factors, metadata=told, lora_alpha=2)
    compress(source, tmp_path / "same", rank=5)
    assert header(tmp_path / "same").items() >= told.items()
    compress(source, tmp_path / "less", rank=1)
    assert header(tmp_path / "less").keys() == {"format", "minilora", "ss_network_args"}


@pytest.mark.parametrize("name", ["torchtune/lora", "loralib/net"])
def test_a_scale_that_a_file_does_not_have_is_given(name, tmp_path):
    """The result is that of the same file with its scale, converted to PEFT's form."""
    about, folder = told_of(name), FILES / name
    told = {key: value for key, value in about.items() if key != "heads"}
    if name.startswith("torchtune"):
        (tmp_path / "base").mkdir()
        heads = dict(zip(("num_attention_heads", "num_key_value_heads"), about["heads"], strict=True))
        (tmp_path / "base/config.json").write_text(json.dumps(heads))
        told["base"] = tmp_path / "base"
    else:  # without its convolution, which is not in the order of a weight
        (file,) = folder.glob("*.safetensors")
        tensors = open_tensors(file)
        folder = tmp_path / "net.safetensors"
        save_file({n: tensors[n] for n in tensors if not n.startswith("conv")}, folder)
    found = compress(folder, tmp_path / "direct", rank=2, **told)
    convert(folder, tmp_path / "peft", "peft", **told)
    again = compress(tmp_path / "peft", tmp_path / "out", rank=2)
    assert {row.module: row for row in found.rows} == {row.module: row for row in again.rows}
    one, other = changes(tmp_path / "direct"), changes(tmp_path / "out")
    assert one.keys() == other.keys()
    assert all(np.array_equal(one[m], other[m]) for m in one)
    with pytest.raises(ConfigError, match="does not have the scale; give alpha"):
        compress(folder, tmp_path / "more", rank=2)


def test_compressing_twice_changes_nothing(tmp_path):
    source = FIXTURES / "adapters/untied--patterns"
    compress(source, tmp_path / "a", rank=2)
    found = compress(tmp_path / "a", tmp_path / "b", rank=2)
    assert found.optimum == 0
    assert found.residual <= 4 * U32
    assert found.parameters == found.before


def test_a_report_prints_every_module_and_its_data_are_json(tmp_path):
    found = compress(FIXTURES / "adapters/untied--patterns", tmp_path / "out", rank=1)
    text = str(found)
    for row in found.rows:
        (line,) = [line for line in text.splitlines() if line.startswith(f"{row.module} ")]
        assert f"{row.r} -> 1 " in line
        assert f"{row.residual / row.norm:.2e}" in line
        assert line.endswith(f"{row.optimum / row.norm:.2e}")
    assert f"{found.parameters:,} of {found.before:,} parameters" in text
    again = json.loads(json.dumps(found.data()))
    assert again["residual"] == found.residual
    assert [row["module"] for row in again["rows"]] == [row.module for row in found.rows]


# ---- what is refused, and that nothing is left of it


def test_compression_never_overwrites_its_input(tmp_path):
    source = shutil.copytree(FIXTURES / "adapters/untied--q-and-v", tmp_path / "deep/in")
    (tmp_path / "link").symlink_to(source)
    before = listed(tmp_path)
    same = tmp_path / "link", tmp_path / "deep/../deep/in"
    for out in (source, source / "inside", tmp_path / "deep", *same):
        for overwrite in (False, True):
            with pytest.raises((InputError, StorageError)) as e:
                compress(source, out, rank=1, overwrite=overwrite)
            assert isinstance(e.value, InputError) or not overwrite
    assert listed(tmp_path) == before


def test_an_existing_output_is_replaced_only_if_allowed(tmp_path):
    source, out = FIXTURES / "adapters/untied--q-and-v", tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("x")
    for overwrite, says in ((False, "is there already"), (True, "only the folder of a model or adapter")):
        with pytest.raises(StorageError, match=says):
            compress(source, out, rank=1, overwrite=overwrite)
    assert listed(tmp_path) == {Path("out"): False, Path("out/mine"): b"x"}
    (out / "mine").rename(out / CONFIG)
    compress(source, out, rank=1, overwrite=True)
    assert sorted(os.listdir(out)) == [CONFIG, WEIGHTS]
    assert os.listdir(tmp_path) == ["out"]


def test_a_failing_write_leaves_nothing(tmp_path, monkeypatch):
    def full(*args):
        yield b"half"
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("minilora.peft.folder.layout", full)
    with pytest.raises(StorageError, match="No space left"):
        compress(FIXTURES / "adapters/untied--q-and-v", tmp_path / "out", rank=1)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("size", [1e38, 1e200])
def test_a_change_that_overflows_float32_is_refused_by_name(size, tmp_path):
    A, B = np.full((2, 5), size), np.full((4, 2), size)
    source = write_peft(tmp_path / "in", {"a.b": (A, B)})
    with pytest.raises(NonFiniteError, match=r"a\.b is not finite"):
        compress(source, tmp_path / "out", rank=1)
    assert os.listdir(tmp_path) == ["in"]


# ---- two checkpoints


MAPS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def checkpoints(folder, change, seed=0, **how):
    """A tiny model, and the same after change(name, array, rng) of its parameters, None where there is none.

    All numbers are multiples of 2^-8 below 8, so that W + ΔW is exact in float32 if the change is one, too.
    """
    model, rng = tiny(seed, np.float32, **how)[0], np.random.default_rng(seed)
    before = {k: np.round(to_host(p.data) * 2**8) / np.float32(2**8) for k, p in named_params(model).items()}
    for name, p in named_params(model).items():
        p.data = to_device(before[name])
    save_model(model, folder / "base", "base\n")
    added = {}
    for name, p in named_params(model).items():
        if (dW := change(name, before[name], rng)) is not None:
            after = (before[name] + dW).astype(np.float32)
            added[name] = after.astype(float) - before[name]
            p.data = to_device(after)
    save_model(model, folder / "tuned", "tuned\n")
    return folder / "base", folder / "tuned", added


def of_rank(k):
    """A change of rank k of every linear map in the blocks, exact in float32."""

    def change(name, W, rng):
        if name.split(".")[-2] in MAPS:
            B, A = rng.integers(-3, 4, (len(W), k)), rng.integers(-3, 4, (k, W.shape[1]))
            return (B @ A / 2**6).astype(np.float32)
        return None

    return change


def everything(name, W, rng):
    return (0.1 * rng.standard_normal(W.shape)).astype(np.float32)


@settings(max_examples=8)
@given(seed=seeds, k=st.integers(1, 4), tied=st.booleans())
def test_extract_recovers_a_change_of_rank_k_exactly(seed, k, tied, tmp_path_factory):
    tmp = tmp_path_factory.mktemp("e")
    base, tuned, added = checkpoints(tmp, of_rank(k), seed, tie_word_embeddings=tied)
    for how in ({"rank": k}, {"energy": 1.0}):
        found = extract(base, tuned, tmp / "out", overwrite=True, **how)
        after = changes(tmp / "out")
        assert {f"{m}.weight" for m in after} == {n for n, dW in added.items() if dW.any()}
        assert dict(found.left) == {}
        for row in found.rows:
            dW = added[f"{row.module}.weight"]
            S = np.linalg.svd(dW, compute_uv=False)
            assert row.rank <= k
            assert row.shape == dW.shape == after[row.module].shape
            left_out = 1e-13 if "rank" in how else 1e-6  # an energy lets 1e-12 of the squares pass
            assert np.linalg.norm(after[row.module] - dW) <= bound32(S) + left_out * np.linalg.norm(dW)
            assert row.r is None
        load_adapter(model := load(base, np.float64), tmp / "out")
        fuse(model)
        for name, p in named_params(model).items():
            whole = base_weights(tuned)[name]
            assert np.abs(to_host(p.data) - whole).max() <= 1e-5 * (1 + np.abs(added.get(name, 0)).max())


@pytest.mark.parametrize("k", [1, 3, 6])
def test_extract_recovers_full_fine_tuning_up_to_the_tail(k, tmp_path):
    base, tuned, added = checkpoints(tmp_path, everything, attention_bias=True, tie_word_embeddings=False)
    seen = []
    found = extract(base, tuned, tmp_path / "out", rank=k, progress=lambda *at: seen.append(at))
    assert [i for i, _ in seen] == list(range(1, len(added) + 1))
    assert {n for _, n in seen} == {len(added)}
    after = changes(tmp_path / "out")
    rows = {f"{row.module}.weight": row for row in found.rows}
    assert {n.split(".")[-2] for n in rows} == set(MAPS)
    assert rows.keys() | found.left.keys() == added.keys()
    assert not rows.keys() & found.left.keys()
    assert {"lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"} <= found.left.keys()
    for name, norm in found.left.items():
        assert norm == pytest.approx(np.linalg.norm(added[name]), rel=1e-12)
    for name, row in rows.items():
        dW, S = added[name], np.linalg.svd(added[name], compute_uv=False)
        tail = np.linalg.norm(S[k:])
        lost, err = np.linalg.norm(after[row.module] - dW), 100 * 2.0**-53 * S[0]
        assert row.rank == k
        assert abs(row.residual - lost) <= err
        assert abs(row.optimum - tail) <= err
        assert abs(row.norm - np.linalg.norm(dW)) <= err
        assert abs(row.spectral - S[k]) <= err
        assert tail - err <= lost <= tail + bound32(S[:k]) + err
    assert found.before is None
    assert found.parameters == sum(k * sum(row.shape) for row in found.rows)
    assert json.loads((tmp_path / "out" / CONFIG).read_text())["base_model_name_or_path"] == str(base)


@pytest.mark.parametrize("share", [0.5, 0.9, 1.0])
@pytest.mark.parametrize("per_module", [False, True])
def test_the_energy_of_a_difference_is_kept_with_the_least_rank(share, per_module, tmp_path):
    base, tuned, added = checkpoints(tmp_path, everything)
    found = extract(base, tuned, tmp_path / "out", energy=share, per_module=per_module)
    S = {row.module: np.linalg.svd(added[f"{row.module}.weight"], compute_uv=False) for row in found.rows}
    ranks = {row.module: row.rank for row in found.rows}
    if per_module:
        assert ranks == {m: rank_at(s, share) for m, s in S.items()}
        assert len(set(ranks.values())) > 1
    else:
        k = max(ranks.values())
        assert ranks == {m: min(k, len(s)) for m, s in S.items()}
        whole = kept(S, {m: len(s) for m, s in S.items()})
        assert kept(S, ranks) >= share * whole * (1 - 1e-9)
        assert kept(S, dict.fromkeys(S, k - 1)) < share * whole
    after = changes(tmp_path / "out")
    for row in found.rows:
        lost = np.linalg.norm(after[row.module] - added[f"{row.module}.weight"])
        assert abs(row.residual - lost) <= 1e-12
        assert lost <= np.linalg.norm(S[row.module][row.rank :]) + bound32(S[row.module]) + 1e-12


def test_a_single_extracted_module_is_targeted_by_its_full_name(tmp_path):
    def change(name, W, rng):
        return np.float32(0.25) * (name == "model.layers.1.self_attn.k_proj.weight") + 0 * W

    base, tuned, _ = checkpoints(tmp_path, change)
    found = extract(base, tuned, tmp_path / "out", rank=3)
    (row,) = found.rows
    assert row.module == "model.layers.1.self_attn.k_proj"
    assert (row.rank, row.optimum) == (3, pytest.approx(0, abs=1e-12))
    assert json.loads((tmp_path / "out" / CONFIG).read_text())["target_modules"] == [row.module]
    assert load_adapter(load(base), tmp_path / "out").norms.keys() == {row.module}


def test_an_extracted_adapter_belongs_to_its_base_only(tmp_path):
    base, tuned, _ = checkpoints(tmp_path, of_rank(2))
    extract(base, tuned, tmp_path / "out", rank=2)
    load_adapter(load(base), tmp_path / "out")
    with pytest.raises(MismatchError, match="another base"):
        load_adapter(load(tuned), tmp_path / "out")


@pytest.mark.parametrize("k", [2, 10])
def test_merging_an_extracted_adapter_leaves_the_tail(k, tmp_path):
    base, tuned, added = checkpoints(tmp_path, everything)
    rows = {f"{row.module}.weight": row for row in extract(base, tuned, tmp_path / "out", rank=k).rows}
    merge_checkpoint(base, tmp_path / "out", tmp_path / "merged")
    ours, theirs, start = (base_weights(folder) for folder in (tmp_path / "merged", tuned, base))
    assert ours.keys() == theirs.keys()
    for name, W in ours.items():
        if name not in rows:
            assert np.array_equal(W, start[name])
            continue
        S = np.linalg.svd(added[name], compute_uv=False)
        rest = np.linalg.norm(W - theirs[name])
        rounding = bound32(S[:k]) + U32 * np.linalg.norm(W) + 1e-12
        assert abs(rest - np.linalg.norm(S[k:])) <= rounding
        assert k < 10 or rest <= rounding  # no map has a rank above 10


def arbitrary(folder, tensors, kind="mystery"):
    """A checkpoint of another architecture."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": kind}))
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_extract_takes_any_architecture(tmp_path):
    rng = np.random.default_rng(0)
    shapes = {
        "encoder.block.0.to_q.weight": (6, 9), "encoder.block.1.to_q.weight": (6, 9), "out.weight": (5, 6),
        "encoder.word_embeddings.weight": (11, 9), "h.wte.weight": (7, 9), "h.wpe.weight": (8, 9),
        "decoder.embed_positions.weight": (4, 9), "lm_head.weight": (11, 5), "conv.weight": (3, 2, 3, 3),
        "encoder.block.0.to_q.bias": (6,), "norm.weight": (9,), "shared.weight": (11, 8),
    }  # fmt: skip
    before = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    after = {name: a + rng.standard_normal(a.shape).astype(np.float32) for name, a in before.items()}
    after["encoder.block.1.to_q.weight"] = before["encoder.block.1.to_q.weight"]
    base, tuned = arbitrary(tmp_path / "base", before), arbitrary(tmp_path / "tuned", after)
    found = extract(base, tuned, tmp_path / "out", rank=2)
    assert [row.module for row in found.rows] == ["encoder.block.0.to_q", "out"]
    assert found.left.keys() == {
        name for name in shapes if name not in ("out.weight",) and not name.endswith("to_q.weight")
    }
    assert open_adapter(tmp_path / "out").settings.target_modules == ("encoder.block.0.to_q", "out")
    assert str(found).count("|change|") == len(found.left)


@pytest.mark.parametrize(
    "name",
    ["lm_head.weight", "a.embed_tokens.weight", "wte.weight", "x.embed_in.weight", "q.bias", "q.lora_A"],
)
def test_an_embedding_or_a_bias_is_no_linear_map(name):
    assert not is_map(name, (4, 5))
    assert is_map("model.q_proj.weight", (4, 5))
    assert not is_map("model.q_proj.weight", (4, 5, 1))


def test_equal_checkpoints_and_changed_norms_alone_are_refused(tmp_path):
    base, tuned, _ = checkpoints(tmp_path, lambda name, W, rng: W * 0 + 1 if W.ndim == 1 else None)
    for other in (shutil.copytree(base, tmp_path / "copy"), tuned):
        with pytest.raises(MismatchError, match="no linear map differs"):
            extract(base, other, tmp_path / "out", rank=1)
    assert not (tmp_path / "out").exists()


def test_other_names_and_shapes_are_refused_by_name(tmp_path):
    rng = np.random.default_rng(0)
    one = {"a.weight": rng.standard_normal((3, 4)), "b.weight": rng.standard_normal((5, 4))}
    base = arbitrary(tmp_path / "base", one)
    cases = {
        "none": ({"c.weight": one["a.weight"]}, "none.*: has no tensor of .*base.*; nearest: 'c.weight'"),
        "deeper": (one | {"a.1.c.weight": one["a.weight"]}, "deeper.*: has a.1.c.weight, which .* lacks"),
        "shape": (one | {"b.weight": one["b.weight"].T.copy()}, r"b.weight has shape \(4, 5\); .* \(5, 4\)"),
    }
    for name, (tensors, says) in cases.items():
        with pytest.raises(MismatchError, match=says):
            extract(base, arbitrary(tmp_path / name, tensors), tmp_path / "out", rank=1)
    for name, bad in (("nan", np.nan), ("inf", np.inf), ("huge", 1e39)):
        tensors = {k: a.copy() for k, a in one.items()}
        tensors["a.weight"][1, 2] = bad
        with pytest.raises(NonFiniteError, match=r"a\.weight minus the base's is not finite"):
            extract(base, arbitrary(tmp_path / name, tensors), tmp_path / "out", rank=1)
    infinite = {"a.weight": np.full((3, 4), np.inf), "b.weight": one["b.weight"]}
    for name in ("i", "j"):
        arbitrary(tmp_path / name, infinite)
    with pytest.raises(NonFiniteError, match=r"a\.weight"):
        extract(tmp_path / "i", tmp_path / "j", tmp_path / "out", rank=1)
    assert not (tmp_path / "out").exists()


# ---- checkpoints that differ in more than their maps


@settings(max_examples=12)
@given(seed=seeds, more=st.integers(-3, 5), head=st.booleans())
def test_a_resized_embedding_is_listed_and_the_maps_are_extracted(seed, more, head, tmp_path_factory):
    tmp, rng = tmp_path_factory.mktemp("t"), np.random.default_rng(seed)
    V, D = 11, 6
    shapes = {"model.embed_tokens.weight": (V, D), "layers.0.q.weight": (7, D), "norm.weight": (D,)}
    before = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    after = {name: a + rng.standard_normal(a.shape).astype(np.float32) for name, a in before.items()}
    table, grown = after["model.embed_tokens.weight"], rng.standard_normal((V + more, D)).astype(np.float32)
    both = min(V, V + more)
    grown[:both] = table[:both]
    after["model.embed_tokens.weight"] = grown
    if head:  # a classifier's, which the base has not, and a bias that only the base has
        after["score.weight"] = rng.standard_normal((3, D)).astype(np.float32)
        before["lm_head.bias"] = np.ones(V, np.float32)
    base, tuned = arbitrary(tmp / "base", before), arbitrary(tmp / "tuned", after)
    found = extract(base, tuned, tmp / "out", rank=2)
    assert [row.module for row in found.rows] == ["layers.0.q"]
    first = before["model.embed_tokens.weight"].astype(float)[:both]
    assert found.left.keys() == {"model.embed_tokens.weight", "norm.weight"}
    assert found.left["model.embed_tokens.weight"] == pytest.approx(
        np.linalg.norm(grown[:both] - first), rel=1e-12
    )
    notes = " ".join(found.notes)
    assert (f"is {(V, D)} in the base and {(V + more, D)} in the other" in notes) == (more != 0)
    assert (f"only {tuned}" in notes and "score.weight (3, 6)" in notes) == head
    assert (f"only {base}" in notes and "lm_head.bias (11,)" in notes) == head
    assert all(f"note: {note}" in str(found) for note in found.notes)
    assert json.loads(json.dumps(found.data()))["notes"] == list(found.notes)


HALVES = st.sampled_from(["bfloat16", "float16"])


@settings(max_examples=12)
@given(seed=seeds, kind=HALVES, backwards=st.booleans(), way=st.sampled_from(["all", "some", "none"]))
def test_rounding_to_16_bits_is_reported_and_is_no_change(seed, kind, backwards, way, tmp_path_factory):
    """A model and its copy in 16 bits, in either order; and one of which some maps were trained besides.

    One is trained in its last rows alone, behind all that could be taken for a sample.
    """
    tmp, rng = tmp_path_factory.mktemp("r"), np.random.default_rng(seed)
    names = [f"layers.{i}.{name}.weight" for i in range(2) for name in ("q", "v")]
    wide = {name: rng.standard_normal((60, 30)).astype(np.float32) for name in names}
    wide["norm.weight"] = rng.standard_normal(7).astype(np.float32)
    narrow = {name: stored(a, kind) for name, a in wide.items()}
    trained = {"all": [], "some": names[1:2], "none": names}[way]
    for name in trained:
        B, A = rng.standard_normal((60, 2)), rng.standard_normal((2, 30))
        B[:58] *= way != "some"
        narrow[name] = stored((wide[name] + 0.1 * B @ A).astype(np.float32), kind)
    if way == "none":
        narrow["norm.weight"] = wide["norm.weight"]
    for folder, tensors, dtype in (("wide", wide, None), ("narrow", narrow, kind)):
        (tmp / folder).mkdir()
        exact = {name: a for name, a in tensors.items() if name != "norm.weight" or way != "none"}
        (tmp / folder / "model.safetensors").write_bytes(b"".join(layout(exact, dtype)))
    base, tuned = (tmp / "narrow", tmp / "wide") if backwards else (tmp / "wide", tmp / "narrow")
    if way == "all":
        with pytest.raises(InputError, match=f"5 tensors differ only by rounding to {kind}; there is"):
            extract(base, tuned, tmp / "out", rank=1)
        assert not (tmp / "out").exists()
        return
    found = extract(base, tuned, tmp / "out", rank=2)
    assert [f"{row.module}.weight" for row in found.rows] == sorted(trained)
    assert found.left == {}
    said = [note for note in found.notes if "rounding" in note]
    assert said == [f"left out: 4 tensors differ only by rounding to {kind}"] * (way == "some")


# ---- GPT-2, whose weights lie (in, out)


def gpt2(folder, tensors, prefix, kind="gpt2", heads=("GPT2LMHeadModel",)):
    folder.mkdir()
    if kind:
        config = {"model_type": kind, "architectures": list(heads)}
        (folder / "config.json").write_text(json.dumps(config))
    save_file({prefix + name: a for name, a in tensors.items()}, folder / "model.safetensors")
    return folder


def gpt2_tensors(rng, D, F, V=11, L=2, biases=True):
    """A GPT-2 as transformers holds it: c_attn (D, 3D), c_proj (D, D), c_fc (D, F), c_proj (F, D)."""
    shapes = {"wte.weight": (V, D), "wpe.weight": (5, D), "ln_f.weight": (D,)}
    for i in range(L):
        shapes[f"h.{i}.ln_1.weight"] = (D,)
        maps = {"attn.c_attn": (D, 3 * D), "attn.c_proj": (D, D), "mlp.c_fc": (D, F), "mlp.c_proj": (F, D)}
        for name, shape in maps.items():
            shapes[f"h.{i}.{name}.weight"] = shape
            if biases:
                shapes[f"h.{i}.{name}.bias"] = shape[1:]
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


@settings(max_examples=15)
@given(seed=seeds, D=st.integers(2, 7), F=st.integers(1, 9), r=st.integers(1, 7), bare=st.tuples(
    st.booleans(), st.booleans()), config=st.booleans(), biases=st.booleans())  # fmt: skip
def test_an_adapter_extracted_from_conv1d_loads_as_the_same_change(
    seed, D, F, r, bare, config, biases, tmp_path_factory
):
    """By PEFT's rule, B A turned where fan_in_fan_out is true: the nearest of rank r, and its residual."""
    tmp, rng = tmp_path_factory.mktemp("g"), np.random.default_rng(seed)
    F = F if biases else D + F  # without biases a c_fc that makes its input narrower would look like a Linear
    before = gpt2_tensors(rng, D, F, biases=biases)
    after = {name: a + 0.5 * rng.standard_normal(a.shape).astype(np.float32) for name, a in before.items()}
    after["h.0.attn.bias"] = np.ones((1, 1, 5, 5), np.float32)  # the mask that some savers keep
    roots = ["" if b else "transformer." for b in bare]
    base = gpt2(tmp / "base", before, roots[0], "gpt2" if config else None)
    tuned = gpt2(tmp / "tuned", after, roots[1], "gpt2" if config else None)
    found = extract(base, tuned, tmp / "out", rank=r)
    pairs, _, said = read_peft(tmp / "out")
    assert said["fan_in_fan_out"] is True
    assert {f"{m}.weight" for m in pairs} == {
        f"transformer.{name}" for name in before if "c_" in name and name.endswith("weight")
    }
    assert said["target_modules"] == ["c_attn", "c_fc", "c_proj"]
    for row in found.rows:
        A, B, s = pairs[row.module]
        name = row.module.removeprefix("transformer.") + ".weight"
        change = after[name].astype(float) - before[name]  # (in, out)
        assert A.shape[1] == change.shape[0]
        assert B.shape[0] == change.shape[1]
        S = np.linalg.svd(change, compute_uv=False)
        lost = np.linalg.norm(change - s * (B @ A).T)
        assert row.residual == pytest.approx(lost, rel=1e-9, abs=1e-13)
        assert lost <= np.linalg.norm(S[r:]) + bound32(S[:r]) + 1e-13
        assert row.shape == change.shape[::-1]
    assert any("names begin with transformer." in note for note in found.notes) == any(bare)
    assert {name.removeprefix("transformer.") for name in found.left} == {
        name for name in before if "c_" not in name or name.endswith("bias")
    }


def test_masks_and_positions_are_not_extracted(tmp_path):
    """Masks and positions, which some savers keep as integers and some do not."""
    before = gpt2_tensors(rng := np.random.default_rng(0), 4, 6)
    after = {name: a + rng.standard_normal(a.shape).astype(np.float32) for name, a in before.items()}
    extra = {f"h.{i}.attn.bias": np.ones((1, 1, 5, 5), np.uint8) for i in range(2)}
    extra |= {"h.0.attn.masked_bias": np.array(-1e4, np.float32), "emb.position_ids": np.arange(5)[None]}
    base = gpt2(tmp_path / "base", before | extra, "")
    found = extract(base, gpt2(tmp_path / "tuned", after, ""), tmp_path / "out", rank=2)
    assert not any("only" in note for note in found.notes)
    assert len(found.rows) == 8
    steps = {"h.0.steps.weight": np.arange(6).reshape(2, 3)}
    both = (gpt2(tmp_path / name, t | steps, "") for name, t in (("one", before), ("two", after)))
    with pytest.raises(UnsupportedError, match=r"steps\.weight: dtype is I64"):
        extract(*both, tmp_path / "no", rank=2)


def test_a_linear_named_like_a_conv1d_is_not_transposed(tmp_path):
    """Other models have a c_attn and a c_proj too, as (out, in)."""
    rng = np.random.default_rng(0)
    shapes = {"attn.c_attn": (15, 5), "attn.c_proj": (5, 5), "mlp.c_fc": (9, 5), "mlp.c_proj": (5, 9)}
    before = {f"h.0.{name}.weight": rng.standard_normal(shape) for name, shape in shapes.items()}
    before |= {f"h.0.{name}.bias": rng.standard_normal(shape[0]) for name, shape in shapes.items()}
    after = {name: a + rng.standard_normal(a.shape) for name, a in before.items()}
    base, tuned = (gpt2(tmp_path / name, t, "transformer.", "gpt_bigcode", ["GPTBigCodeForCausalLM"])
                   for name, t in (("base", before), ("tuned", after)))  # fmt: skip
    found = extract(base, tuned, tmp_path / "out", rank=9)
    pairs, _, said = read_peft(tmp_path / "out")
    assert said["fan_in_fan_out"] is False
    for row in found.rows:
        A, B, s = pairs[row.module]
        name = row.module.removeprefix("transformer.") + ".weight"
        assert np.abs(s * B @ A - (after[name] - before[name])).max() < 1e-5
        assert row.residual < 1e-5 * row.norm


def test_a_linear_beside_conv1d_is_left_out_with_a_note(tmp_path):
    """One flag is for all modules."""
    rng = np.random.default_rng(0)
    before = gpt2_tensors(rng, 4, 6) | {"adapter.down.weight": rng.standard_normal((3, 4)).astype(np.float32)}
    after = {name: a + rng.standard_normal(a.shape).astype(np.float32) for name, a in before.items()}
    base, tuned = gpt2(tmp_path / "base", before, ""), gpt2(tmp_path / "tuned", after, "")
    found = extract(base, tuned, tmp_path / "out", rank=2)
    assert not any("adapter" in row.module for row in found.rows)
    assert "transformer.adapter.down.weight" in found.left
    assert any("adapter.down is not a Conv1D" in note for note in found.notes)
    assert json.loads((tmp_path / "out" / CONFIG).read_text())["fan_in_fan_out"] is True
    alone = before | {"adapter.down.weight": after["adapter.down.weight"]}  # where no Conv1D differs
    extract(base, gpt2(tmp_path / "alone", alone, "transformer."), tmp_path / "other", rank=2)
    pairs, _, said = read_peft(tmp_path / "other")
    assert (list(pairs), said["fan_in_fan_out"]) == (["transformer.adapter.down"], False)


def test_names_of_a_model_without_a_head_are_unchanged(tmp_path):
    before = gpt2_tensors(rng := np.random.default_rng(0), 4, 6)
    after = {name: a + rng.standard_normal(a.shape).astype(np.float32) for name, a in before.items()}
    both = (("base", before), ("tuned", after))
    base, tuned = (gpt2(tmp_path / name, t, "", heads=["GPT2Model"]) for name, t in both)
    found = extract(base, tuned, tmp_path / "out", rank=2)
    assert {row.module.split(".")[0] for row in found.rows} == {"h"}
    assert found.notes == ()


def test_extract_never_overwrites_a_checkpoint(tmp_path):
    base, tuned, _ = checkpoints(tmp_path, of_rank(1))
    before = listed(tmp_path)
    for out in (base, tuned, base / "inside", tmp_path):
        with pytest.raises(InputError, match="is the input"):
            extract(base, tuned, out, rank=1, overwrite=True)
    (tmp_path / "out").mkdir()
    with pytest.raises(StorageError, match="is there already"):
        extract(base, tuned, tmp_path / "out", rank=1)
    (tmp_path / "out").rmdir()
    assert listed(tmp_path) == before


def test_the_same_checkpoints_give_the_same_bytes(tmp_path):
    base, tuned, _ = checkpoints(tmp_path, everything)
    for name in ("a", "b"):
        extract(base, tuned, tmp_path / name, energy=0.9, per_module=False)
    assert listed(tmp_path / "a") == listed(tmp_path / "b")
    found = extract(base, tuned, tmp_path / "c", rank=2)
    assert "parameters, residual" in str(found)
    assert json.loads(json.dumps(found.data()))["left"] == dict(found.left)


def test_differences_are_taken_in_float64(tmp_path):
    """bfloat16 beside float32: the difference is that of the stored numbers."""
    model, rng = tiny(0, np.float32)[0], np.random.default_rng(0)
    save_model(model, tmp_path / "base", "b\n", dtype="bfloat16")
    for p in named_params(model).values():
        p.data = p.data + to_device(0.01 * rng.standard_normal(p.data.shape), np.float32)
    save_model(model, tmp_path / "tuned", "t\n", dtype="float32")
    found = extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", rank=2)
    before, after = (base_weights(tmp_path / name) for name in ("base", "tuned"))
    for row in found.rows:
        name = f"{row.module}.weight"
        assert np.array_equal(before[name], stored(before[name], "bfloat16"))
        assert row.norm == pytest.approx(np.linalg.norm(after[name] - before[name]), rel=1e-12)


def test_every_axis_of_the_tiny_model_has_another_size():
    """Every axis of what is extracted here has another size, so that a wrong transpose cannot pass."""
    S = SIZES
    inner = S["num_attention_heads"] * S["head_dim"]
    assert len({S["hidden_size"], S["intermediate_size"], inner, S["num_key_value_heads"] * 4, 11}) == 5


def test_extracted_tensors_have_pefts_names(tmp_path):
    base, tuned, _ = checkpoints(tmp_path, of_rank(1))
    extract(base, tuned, tmp_path / "out", rank=1)
    names = set(open_tensors(tmp_path / "out" / WEIGHTS))
    assert f"{PREFIX}model.layers.0.self_attn.q_proj.lora_A.weight" in names
    assert len(names) == 2 * 2 * len(MAPS)


def test_a_common_rank_by_energy_does_not_keep_all_vectors_in_memory(tmp_path):
    rng, (O, I), count = np.random.default_rng(0), (96, 80), 40  # noqa: E741
    fall = 0.8 ** np.arange(I)
    before = {f"layers.{i}.x.weight": rng.standard_normal((O, I)).astype(np.float32) for i in range(count)}
    after = {k: (a + rng.standard_normal((O, I)) * fall).astype(np.float32) for k, a in before.items()}
    base, tuned = arbitrary(tmp_path / "base", before), arbitrary(tmp_path / "tuned", after)
    tracemalloc.start()
    found = extract(base, tuned, tmp_path / "out", energy=0.5, per_module=False)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len({row.rank for row in found.rows}) == 1
    assert 0.5 - found.rows[0].norm * 1e-6 <= 1 - found.optimum**2
    assert peak < 0.5 * count * 8 * I * (O + I)


# ---- in PEFT


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(("base", "adapter"), FIXED)
def test_peft_reads_a_compressed_adapter_as_we_do(base, adapter, tmp_path):
    """Other ranks for other modules, so that it needs the patterns; PEFT's norms are in float32."""
    pytest.importorskip("peft")
    source, change = FIXTURES / "bases" / slug(base), FIXTURES / "adapters" / f"{slug(base)}--{slug(adapter)}"
    compress(change, tmp_path / "out", energy=0.9, per_module=True)
    model = load(source, np.float64)
    load_adapter(model, tmp_path / "out")
    ours, theirs = to_host(model(IDS[:, ::4])[0]), peft_logits(source, tmp_path / "out", ids=IDS[:, ::4])
    assert np.abs(ours - theirs).max() <= 1e-5 * np.abs(theirs).max()


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_peft_reads_an_extracted_adapter_as_we_do(tmp_path):
    pytest.importorskip("peft")
    heads = {"num_attention_heads": 5, "num_key_value_heads": 1}  # transformers wants a divisor of 10
    base, tuned, _ = checkpoints(tmp_path, everything, tie_word_embeddings=False, **heads)
    extract(base, tuned, tmp_path / "out", energy=0.8)
    model = load(base, np.float64)
    load_adapter(model, tmp_path / "out")
    ids = np.arange(20).reshape(2, 10) % SIZES["vocab_size"]
    ours, theirs = to_host(model(ids)[0]), peft_logits(base, tmp_path / "out", ids=ids)
    assert np.abs(ours - theirs).max() <= 1e-5 * np.abs(theirs).max()

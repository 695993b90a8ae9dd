"""`inspect` agrees with the dense matrices; the numbers in brackets are those of noise."""

import dataclasses
import json
import math
import re
import shutil
import tracemalloc
from html import escape

import numpy as np
import pytest
from by_hand import CONFIG, WEIGHTS, base_weights, bound64, changes, read_peft, write_peft
from hypothesis import given, settings
from hypothesis import strategies as st
from peft_cases import FIXED, FIXTURES, slug
from safetensors.numpy import save_file

from minilora import backend
from minilora.analysis import tables as tabled
from minilora.analysis.inspect import BESIDE_BASE, FIRST, TABLED, inspect, pictures, report_page, tables
from minilora.analysis.measures import Ranks, group, noise
from minilora.backend import cores
from minilora.compose.truncate import compress
from minilora.errors import MismatchError, NonFiniteError
from minilora.spectra import intruder_threshold

CASES = [(slug(base), f"{slug(base)}--{slug(adapter)}") for base, adapter in FIXED]
PATTERNS, QV = FIXTURES / "adapters/untied--patterns", FIXTURES / "adapters/untied--q-and-v"
SIDES = st.integers(1, 16)


def checkpoint(folder, tensors, kind="mystery"):
    """A base of any architecture."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": kind}))
    save_file({name: np.ascontiguousarray(a) for name, a in tensors.items()}, folder / "model.safetensors")
    return folder


def entropy_rank(s):
    p = s[s > 0] / s.sum()
    return math.exp(-sum(x * math.log(x) for x in p))


def holding(s, share):
    """The first count of singular values whose squares are this share."""
    return next(k for k in range(1, len(s) + 1) if (s[:k] ** 2).sum() >= share * (1 - 1e-12) * (s**2).sum())


def assert_spectrum(m, dW, A, B, s):
    """One module's own numbers, from its dense ΔW."""
    O, I = dW.shape  # noqa: E741
    S, off = np.linalg.svd(dW, compute_uv=False), 2 * bound64(A, B, s)
    k = min(len(A), O, I)
    assert (m.shape, m.r, len(m.singular_values)) == ((O, I), len(A), k)
    assert m.scale == pytest.approx(s, rel=1e-15)
    assert np.abs(np.array(m.singular_values) - S[:k]).max() <= off
    assert abs(m.norm - np.linalg.norm(dW)) <= off * math.sqrt(k)
    assert m.ranks.effective == pytest.approx(entropy_rank(S[:k]), rel=1e-9)
    assert m.ranks.stable == pytest.approx((S**2).sum() / S[0] ** 2, rel=1e-9)
    assert (m.ranks.at90, m.ranks.at99) == (holding(S, 0.9), holding(S, 0.99))
    assert m.noise == noise((O, I), len(A))


def directions(dW):
    """U, S and V of those that have strength."""
    U, S, Vt = np.linalg.svd(dW, full_matrices=False)
    k = holding(S, 1.0)
    return U[:, :k], S[:k], Vt[:k].T


def assert_beside_base(b, dW, W, first=10):
    """The comparison with W, both dense (O, I)."""
    U, S, V = directions(dW)
    (O, I), k = W.shape, len(S)  # noqa: E741
    T, before = np.linalg.svd(W)[0][:, :k], np.linalg.svd(W, full_matrices=False)[0]
    assert b.relative == pytest.approx(np.linalg.norm(dW) / np.linalg.norm(W), rel=1e-10)
    assert b.amplification == pytest.approx(np.linalg.norm(dW) / np.linalg.norm(U.T @ W @ V), rel=1e-7)
    random = np.linalg.norm(dW) / (np.linalg.norm(W) * k / math.sqrt(O * I))
    assert b.random_amplification == pytest.approx(random, rel=1e-10)
    assert b.overlap == pytest.approx(np.linalg.norm(U.T @ T) ** 2 / k, abs=1e-7)
    assert b.random_overlap == pytest.approx(k / O)
    after = np.linalg.svd(W + dW, full_matrices=False)[0][:, :first]
    cosines = [max(abs(float(v @ w)) for w in before.T) for v in after.T]
    assert b.cosines == pytest.approx(cosines, abs=1e-7)
    assert b.threshold == intruder_threshold(O, min(O, I))
    assert b.intruders == sum(c < b.threshold for c in cosines)


def assert_beside_other(o, one, two):
    """The comparison of two dense changes."""
    (U, S, V), (U2, S2, V2) = directions(one), directions(two)
    n = min(len(S), len(S2))
    cosine = (one * two).sum() / (np.linalg.norm(one) * np.linalg.norm(two))
    assert o.cosine == pytest.approx(cosine, abs=1e-12)
    for found, X, Y in ((o.inputs, V, V2), (o.outputs, U, U2)):
        phi = [np.linalg.norm(X[:, :i].T @ Y[:, :i]) ** 2 / i for i in range(1, n + 1)]
        assert found == pytest.approx(phi, abs=1e-6)
    assert o.random_inputs == pytest.approx([i / one.shape[1] for i in range(1, n + 1)])
    assert o.random_outputs == pytest.approx([i / one.shape[0] for i in range(1, n + 1)])


# ---- adapters that PEFT wrote


@pytest.mark.parametrize(("base", "adapter"), CASES)
def test_every_number_matches_the_dense_matrices(base, adapter):
    folder, source = FIXTURES / "adapters" / adapter, FIXTURES / "bases" / base
    pairs, dense, W = read_peft(folder)[0], changes(folder), base_weights(source)
    W.setdefault("lm_head.weight", W["model.embed_tokens.weight"])
    plain, beside = inspect(folder), inspect(folder, source)
    assert sorted(m.module for m in plain.modules) == sorted(dense)
    for m, with_base in zip(plain.modules, beside.modules, strict=True):
        assert m.module == with_base.module
        for one in (m, with_base):  # the values alone, or with their vectors
            assert_spectrum(one, dense[m.module], *pairs[m.module])
        whole = W[f"{m.module}.weight"]
        whole = whole.T if m.module == "model.embed_tokens" else whole
        assert_beside_base(with_base.base, dense[m.module], whole)
        number = re.match(r"model\.layers\.(\d+)\.", m.module)
        assert m.layer == (int(number[1]) if number else None)
        assert m.kind == m.module.split(".")[-1]
        assert m.alpha == 7 or adapter == "untied--patterns"
    for seen, where in ((plain, None), (beside, str(source))):
        assert (seen.adapter, seen.base, seen.against) == (str(folder), where, None)
        assert seen.parameters == sum(A.size + B.size for A, B, _ in pairs.values())
        assert seen.norm == pytest.approx(math.sqrt(sum((dW**2).sum() for dW in dense.values())), rel=1e-12)
        assert seen.needed == sum(m.ranks.at99 * sum(m.shape) for m in seen.modules)


@pytest.mark.parametrize("adapter", ["q-and-v", "regex", "one-layer", "excluded"])
def test_two_adapters_are_compared_on_their_common_modules(adapter):
    one, two = PATTERNS, FIXTURES / f"adapters/untied--{adapter}"
    (first, second), notes = (changes(folder) for folder in (one, two)), ()
    for this, that, a, b in ((one, two, first, second), (two, one, second, first)):
        seen = inspect(this, against=that)
        assert {m.module for m in seen.modules if m.other} == a.keys() & b.keys()
        for m in seen.modules:
            assert m.base is None
            if m.other:
                assert_beside_other(m.other, a[m.module], b[m.module])
        notes = [note for note in seen.notes if "by only one of the two" in note]
        assert len(notes) == 1
        assert notes[0].startswith(f"{len(a.keys() ^ b.keys())} modules")


def test_base_and_second_adapter_are_reported_together():
    seen = inspect(QV, FIXTURES / "bases/untied", PATTERNS)
    alone = inspect(QV, FIXTURES / "bases/untied"), inspect(QV, against=PATTERNS)
    for m, b, o in zip(seen.modules, *(x.modules for x in alone), strict=True):
        assert m.base == b.base
        assert m.other == o.other
    assert len(list(tables(seen))) == 3


def test_an_adapter_compared_with_itself_is_identical():
    for m in inspect(PATTERNS, against=PATTERNS).modules:
        assert m.other.cosine == pytest.approx(1, abs=1e-14)
        assert m.other.inputs == pytest.approx([1] * m.r, abs=1e-13)
        assert m.other.outputs == pytest.approx([1] * m.r, abs=1e-13)


def test_comparing_with_a_compressed_copy_shows_what_is_left(tmp_path):
    """A compressed one has the first directions of the first, and cosine |ΔW_k| / |ΔW|."""
    found = {row.module: row for row in compress(PATTERNS, tmp_path / "small", rank=2).rows}
    for m in inspect(PATTERNS, against=tmp_path / "small").modules:
        row = found[m.module]
        assert m.other.cosine == pytest.approx(math.sqrt(1 - (row.optimum / row.norm) ** 2), abs=1e-6)
        assert m.other.inputs == pytest.approx([1] * row.rank, abs=1e-9)
        assert m.other.outputs == pytest.approx([1] * row.rank, abs=1e-9)


# ---- adapters of any shape


@st.composite
def any_adapter(draw):
    """module -> (A, B) of any shapes, ranks and dtypes, with and without a number."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    dtype = draw(st.sampled_from([np.float16, np.float32, np.float64]))
    names = ["lm_head", "model.layers.0.q_proj", "model.layers.12.q_proj", "model.layers.2.mlp.experts.1.w1",
             "unet.down_blocks.0.attentions.1.to_q", "encoder.proj"]  # fmt: skip
    found = {}
    for name in draw(st.lists(st.sampled_from(names), min_size=1, max_size=4, unique=True)):
        O, I, r = draw(SIDES), draw(SIDES), draw(st.integers(1, 6))  # noqa: E741
        found[name] = rng.standard_normal((r, I)).astype(dtype), rng.standard_normal((O, r)).astype(dtype)
    return found, {name: rng.standard_normal((len(B), A.shape[1])) for name, (A, B) in found.items()}, rng


@settings(max_examples=25)
@given(given_=any_adapter())
def test_numbers_are_right_for_every_shape_rank_and_dtype(given_, tmp_path_factory):
    factors, weights, rng = given_
    tmp = tmp_path_factory.mktemp("m")
    folder = write_peft(tmp / "a", factors, lora_alpha=3.5)
    turned = {name: (rng.standard_normal(A.shape), B.astype(np.float64)) for name, (A, B) in factors.items()}
    other = write_peft(tmp / "b", turned)
    base = checkpoint(tmp / "base", {f"{name}.weight": W for name, W in weights.items()})
    pairs, dense, second = read_peft(folder)[0], changes(folder), changes(other)
    seen = inspect(folder, base, other)
    numbers = [m.layer for m in seen.modules if not m.component]
    assert numbers == sorted(numbers, key=lambda n: (n is None, n or 0))
    for m in seen.modules:
        assert_spectrum(m, dense[m.module], *pairs[m.module])
        assert_beside_other(m.other, dense[m.module], second[m.module])
        b, dW, W = m.base, dense[m.module], weights[m.module]
        U, S, V = directions(dW)
        along = np.linalg.norm(U.T @ W @ V)
        assert b.amplification == pytest.approx(np.linalg.norm(dW) / along, rel=1e-7 / min(along, 1))
        assert b.relative == pytest.approx(np.linalg.norm(dW) / np.linalg.norm(W), rel=1e-10)
        assert b.random_overlap == pytest.approx(len(S) / len(W))
        assert len(b.cosines) == min(10, *W.shape)
    json.dumps(seen.data())
    assert str(seen).count("\n") > len(seen.modules)


def test_a_convolution_is_read_as_outputs_by_all_inputs(tmp_path):
    rng = np.random.default_rng(0)
    A, B = rng.standard_normal((2, 3, 5, 4)), rng.standard_normal((7, 2, 1, 1))
    W = rng.standard_normal((7, 3, 5, 4))
    folder = write_peft(tmp_path / "a", {"unet.mid_block.resnets.0.conv1": (A, B)}, lora_alpha=6)
    base = checkpoint(tmp_path / "base", {"unet.mid_block.resnets.0.conv1.weight": W})
    (m,) = inspect(folder, base, folder).modules
    dW = 3 * np.einsum("or,rikl->oikl", B[:, :, 0, 0], A).reshape(7, 60)
    assert (m.kind, m.layer, m.shape) == ("resnets.conv1", 0, (7, 60))
    assert_spectrum(m, dW, A.reshape(2, -1), B.reshape(7, 2), 3)
    assert_beside_base(m.base, dW, W.reshape(7, 60))
    assert_beside_other(m.other, dW, dW)


@pytest.mark.parametrize("flag", [True, False])
@pytest.mark.parametrize(("ours", "theirs"), [("transformer.", ""), ("", "transformer."), ("", "")])
def test_in_gpt2_the_base_decides_whether_a_weight_is_transposed(flag, ours, theirs, tmp_path):
    """As in PEFT, which sets the flag of each module by its kind; the square c_proj would fit both ways."""
    rng = np.random.default_rng(0)
    shapes = {"attn.c_attn": (6, 18), "attn.c_proj": (6, 6), "mlp.c_fc": (6, 4), "mlp.c_proj": (4, 6)}
    W = {f"h.1.{name}": rng.standard_normal(shape) for name, shape in shapes.items()}
    base = {f"{theirs}{name}.weight": w for name, w in W.items()}
    base |= {f"{theirs}{name}.bias": np.zeros(w.shape[1]) for name, w in W.items()}
    factors = {
        ours + name: (rng.standard_normal((2, len(w))), rng.standard_normal((w.shape[1], 2)))
        for name, w in W.items()
    }
    folder = write_peft(tmp_path / "a", factors, fan_in_fan_out=flag)
    seen = inspect(folder, checkpoint(tmp_path / "base", base))
    assert len(seen.modules) == 4
    for m in seen.modules:
        assert_beside_base(m.base, changes(folder)[m.module], W[m.module.removeprefix(ours)].T)


@pytest.mark.parametrize(("ours", "theirs"), [("", "model."), ("model.", ""), ("", "transformer.")])
def test_a_base_matches_with_and_without_its_root_prefix(ours, theirs, tmp_path):
    """What is trained on a model for embeddings names its layers without the root that a file may have."""
    rng, name = np.random.default_rng(0), "layers.3.self_attn.q_proj"
    W, factors = rng.standard_normal((5, 7)), (rng.standard_normal((2, 7)), rng.standard_normal((5, 2)))
    folder = write_peft(tmp_path / "a", {ours + name: factors})
    others = {f"{theirs}{name}.bias": np.zeros(5), f"other.{name}.weight": -W}
    (m,) = inspect(folder, checkpoint(tmp_path / "base", others | {f"{theirs}{name}.weight": W})).modules
    assert_beside_base(m.base, changes(folder)[m.module], W)
    with pytest.raises(MismatchError, match=r"the base has no .*q_proj\.weight; nearest: 'other"):
        inspect(folder, checkpoint(tmp_path / "none", others))


def test_a_transposed_base_is_transposed_back(tmp_path):
    """fan_in_fan_out: GPT-2 holds W as (I, O)."""
    rng = np.random.default_rng(0)
    A, B, W = rng.standard_normal((2, 5)), rng.standard_normal((8, 2)), rng.standard_normal((8, 5))
    plain = inspect(write_peft(tmp_path / "a", {"h.0.c_attn": (A, B)}),
                    checkpoint(tmp_path / "p", {"h.0.c_attn.weight": W}))  # fmt: skip
    turned = inspect(write_peft(tmp_path / "b", {"h.0.c_attn": (A, B)}, fan_in_fan_out=True),
                     checkpoint(tmp_path / "t", {"h.0.c_attn.weight": W.T}, "gpt2"))  # fmt: skip
    for seen in (plain, turned):
        assert_beside_base(seen.modules[0].base, changes(tmp_path / "a")["h.0.c_attn"], W)


def test_a_zero_change_has_no_direction(tmp_path):
    rng = np.random.default_rng(0)
    A, W = rng.standard_normal((3, 5)), rng.standard_normal((7, 5))
    zero = write_peft(tmp_path / "zero", {"a.b": (A, np.zeros((7, 3)))})
    some = write_peft(tmp_path / "some", {"a.b": (A, rng.standard_normal((7, 3)))})
    base = checkpoint(tmp_path / "base", {"a.b.weight": W})
    seen = inspect(zero, base, some)
    (m,) = seen.modules
    assert m.ranks == Ranks(0, 0, 0, 0)
    assert (m.norm, m.singular_values) == (0, (0, 0, 0))
    assert (m.base.relative, m.base.amplification, m.base.overlap, m.base.intruders) == (0, 0, 0, 0)
    assert m.base.cosines == pytest.approx([1] * 5)
    assert (m.other.cosine, m.other.inputs, m.other.outputs) == (0, (0,), (0,))
    assert seen.needed == 12
    for one, two in ((zero, zero), (some, zero)):
        (m,) = inspect(one, against=two).modules
        assert (m.other.cosine, m.other.inputs, m.other.outputs) == (0, (0,), (0,))
    assert "</html>" in report_page(seen, pictures(seen))
    assert "nan" not in str(seen)


def test_a_change_of_a_zero_weight_has_infinite_relative_size(tmp_path):
    rng = np.random.default_rng(0)
    A, B = rng.standard_normal((2, 5)), rng.standard_normal((7, 2))
    base = checkpoint(tmp_path / "base", {"a.b.weight": np.zeros((7, 5))})
    (m,) = inspect(write_peft(tmp_path / "a", {"a.b": (A, B)}), base).modules
    assert m.base.relative == m.base.amplification == m.base.random_amplification == math.inf


def test_directions_beyond_the_rank_are_not_compared(tmp_path):
    """Of r = 4 factors two are copies: the rank is 2, and so are the directions."""
    rng = np.random.default_rng(0)
    A, B, W = rng.standard_normal((4, 9)), rng.standard_normal((7, 4)), rng.standard_normal((7, 9))
    A[2:] = A[:2]
    folder = write_peft(tmp_path / "a", {"a.b": (A, B)})
    (m,) = inspect(folder, checkpoint(tmp_path / "base", {"a.b.weight": W}), folder).modules
    assert len(m.singular_values) == 4
    assert m.ranks.effective < 2.001
    assert len(m.other.inputs) == 2
    assert m.base.random_overlap == 2 / 7
    assert_beside_base(m.base, changes(folder)["a.b"], W)


def test_an_intruder_dimension_is_counted(tmp_path):
    rng = np.random.default_rng(0)
    O, I = 80, 48  # noqa: E741
    L, R = (np.linalg.qr(rng.standard_normal((n, I)))[0] for n in (O, I))
    W = (L * 0.8 ** np.arange(I)) @ R.T
    v, w = (x / np.linalg.norm(x) for x in (rng.standard_normal(O), rng.standard_normal(I)))
    base = checkpoint(tmp_path / "base", {"a.b.weight": W})
    for size, count in ((3.0, 1), (1e-4, 0)):
        folder = write_peft(tmp_path / f"{size}", {"a.b": (w[None], size * v[:, None])}, lora_alpha=1)
        (m,) = inspect(folder, base).modules
        assert m.base.intruders == count
        assert m.base.amplification == pytest.approx(size / abs(v @ W @ w), rel=1e-9)
        (large,) = inspect(folder, base, whole=I - 1).modules
        assert (large.base.intruders, large.base.cosines) == (None, ())
        assert dataclasses.replace(large.base, intruders=count, cosines=m.base.cosines) == m.base
        (whole,) = inspect(folder, base, whole=I).modules
        assert whole == m
    seen = inspect(folder, base, whole=I - 1)
    assert seen.notes == (f"intruders were not computed where both sides are larger than {I - 1}",)
    assert "  -\n" in str(seen)


# ---- noise


@pytest.mark.parametrize(("shape", "r"), [((40, 30), 8), ((96, 24), 16), ((12, 60), 1), ((6, 9), 8)])
def test_noise_matches_random_factors(shape, r):
    """Beside 400 independent products: four draws lie within four of their standard errors of the mean."""
    rng = np.random.default_rng(7)
    draws = []
    for _ in range(400):
        B, A = rng.standard_normal((shape[0], r)), rng.standard_normal((r, shape[1]))
        s = np.linalg.svd(B @ A, compute_uv=False)
        draws.append(s[: min(r, *shape)] / np.linalg.norm(s))
    found = noise(shape, r)
    for name, measure in (("effective", entropy_rank), ("stable", lambda s: (s**2).sum() / s[0] ** 2)):
        each = [measure(s) for s in draws]
        error = np.std(each, ddof=1) / math.sqrt(4)
        bias = abs(measure(np.mean(draws, 0)) - np.mean(each))  # it is that of the mean spectrum
        assert abs(getattr(found, name) - np.mean(each)) <= 4 * error + bias + 1e-12
    mean = np.mean(draws, 0)
    assert abs(found.at90 - holding(mean, 0.9)) <= 1
    assert abs(found.at99 - holding(mean, 0.99)) <= 1
    assert found == noise(shape, r)


def test_random_factors_match_noise_and_a_steep_spectrum_does_not(tmp_path):
    rng = np.random.default_rng(0)
    shapes = (8, 50), (60, 8)
    factors = {f"layers.{i}.x": tuple(rng.standard_normal(shape) for shape in shapes) for i in range(3)}
    factors["layers.2.x"][0][:] *= 0.5 ** np.arange(8)[:, None]
    *flat, steep = inspect(write_peft(tmp_path / "a", factors)).modules
    for m in flat:
        assert m.ranks.effective == pytest.approx(m.noise.effective, rel=0.1)
    assert steep.ranks.effective < 0.6 * steep.noise.effective


# ---- what it holds in memory, and how fast it says so


def test_factors_of_only_one_module_per_core_are_in_memory(tmp_path, monkeypatch):
    rng, (O, I, r), count = np.random.default_rng(0), (500, 400, 32), 60  # noqa: E741
    A, B = rng.standard_normal((r, I)).astype(np.float32), rng.standard_normal((O, r)).astype(np.float32)
    folder = write_peft(tmp_path / "a", {f"layers.{i}.x": (A, B) for i in range(count)})
    monkeypatch.setattr(backend, "cores", lambda: 2)
    noise((O, I), r)
    tracemalloc.start()
    inspect(folder)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    most = 2 * 5 * 8 * r * (O + I)  # of five copies in float64 for each core
    assert peak < most
    assert 4 * r * (O + I) * count > 2.5 * most  # all factors in float32 would be more


def test_only_one_weight_of_the_base_is_in_memory(tmp_path):
    rng, (O, I, r), count = np.random.default_rng(0), (160, 120, 4), 50  # noqa: E741
    A, B = rng.standard_normal((r, I)), rng.standard_normal((O, r))
    W = rng.standard_normal((O, I)).astype(np.float32)
    folder = write_peft(tmp_path / "a", {f"layers.{i}.x": (A, B) for i in range(count)})
    base = checkpoint(tmp_path / "base", {f"layers.{i}.x.weight": W for i in range(count)})
    intruder_threshold(O, I)
    tracemalloc.start()
    inspect(folder, base)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    most = 12 * 8 * O * I  # two decompositions
    assert peak < most
    assert 4 * O * I * count > 2 * most


def test_results_do_not_depend_on_cores_and_progress_is_reported(monkeypatch):
    found = []
    for n in (1, 3):
        monkeypatch.setattr(backend, "cores", lambda n=n: n)
        seen = []
        found.append(inspect(PATTERNS, progress=lambda *at, seen=seen: seen.append(at)))
        assert seen == [(i + 1, 14) for i in range(14)]
    assert found[0] == found[1]
    assert cores() >= 1


# ---- tables, data, page


@pytest.fixture(scope="module")
def seen():
    return inspect(PATTERNS, FIXTURES / "bases/untied", QV)


def test_the_data_survive_json(seen):
    again = json.loads(json.dumps(seen.data()))
    assert again["norm"] == seen.norm
    assert again["parameters_at_99"] == seen.needed
    assert again["parameters"] == seen.parameters
    assert again["notes"] == list(seen.notes)
    for row, m in zip(again["modules"], seen.modules, strict=True):
        assert row["module"] == m.module
        assert row["singular_values"] == list(m.singular_values)
        assert row["ranks"] == dataclasses.asdict(m.ranks)
        assert row["base"]["cosines"] == list(m.base.cosines)
        assert (row["other"] is None) == (m.other is None)


def test_the_text_has_one_line_per_module_and_noise_in_brackets(seen):
    parts = [str(table).partition("\n")[2] for table in tables(seen)]
    both = [m for m in seen.modules if m.other]
    for part, some in zip(parts, (seen.modules, seen.modules, both), strict=True):
        head, *lines = part.splitlines()
        assert [line.split()[0] for line in lines] == [m.module for m in some]
        assert len({len(line) for line in (head, *lines)}) == 1
    for m, line in zip(seen.modules, parts[0].splitlines()[1:], strict=True):
        S, w, n = m.singular_values, m.ranks, m.noise
        assert line.split() == [
            m.module, str(m.shape[0]), "x", str(m.shape[1]), str(m.r), f"{m.scale:.4g}", f"{m.norm:.3g}",
            f"{S[0]:.3g}", f"{S[-1]:.2g}", f"{w.effective:.1f}", f"({n.effective:.1f})", f"{w.stable:.1f}",
            f"({n.stable:.1f})", str(w.at90), f"({n.at90})", str(w.at99), f"({n.at99})",
        ]  # fmt: skip
    for m, line in zip(seen.modules, parts[1].splitlines()[1:], strict=True):
        b = m.base
        assert line.split() == [
            m.module, f"{b.relative:.2e}", f"{b.amplification:.3g}", f"({b.random_amplification:.3g})",
            f"{b.overlap:.3f}", f"({b.random_overlap:.3f})", str(b.intruders), "of",
            str(min(10, *m.shape)), f"({b.threshold:.2f})",
        ]  # fmt: skip
    for m, line in zip(both, parts[2].splitlines()[1:], strict=True):
        o = m.other
        assert line.split() == [
            m.module, f"{o.cosine:.3f}", f"{o.inputs[0]:.3f}", f"({o.random_inputs[0]:.3f})",
            f"{o.inputs[-1]:.3f}", f"({o.random_inputs[-1]:.3f})", f"{o.outputs[-1]:.3f}",
            f"({o.random_outputs[-1]:.3f})",
        ]  # fmt: skip
    assert f"14 modules, {seen.parameters:,} parameters, |ΔW| {seen.norm:.4g}" in seen.summary()


@pytest.fixture(scope="module")
def drawn(seen):
    return pictures(seen)


def test_the_page_has_every_module_figure_and_note(seen, drawn):
    assert list(drawn) == ["heat_map", "spectra", "similarity", "difference"]
    html = report_page(seen, drawn)
    for m in seen.modules:
        assert html.count(f'<th scope="row">{m.module}</th>') == 2 + (m.other is not None)
    assert html.count("<svg") == html.count("<figcaption>") == 4
    assert html.count("<table>") == html.count("<caption>") == 3
    for note in seen.notes:
        assert f"<li>{note}.</li>" in html
    assert "What was asked: which rank does this adapter really use" in html
    whole = group(seen.modules)
    assert f"In the median module ΔW uses {whole.effective:.1f} of {tabled.span(whole)} directions" in html
    assert f"The {seen.suggestion()}." in html
    terms = [*FIRST, "φ(i), phi", "cosine", *TABLED, *BESIDE_BASE]
    assert sorted(re.findall("<dfn>(.*?)</dfn>", html)) == sorted(terms)
    headings = re.findall(r'<h2 id="(.*?)">', html)
    assert re.findall(r'<li><a href="#(.*?)">', html) == headings
    assert html.count('<div class="wide"') == html.count("<table>")
    for text in (seen.summary(), seen.suggestion(), seen.adapter, seen.base, seen.against):
        assert escape(text) in html
    assert not re.search(r"<script|<link|src=\"http|@import", html)


def test_without_a_base_or_second_adapter_their_tables_and_figures_are_absent():
    alone = inspect(PATTERNS)
    assert list(pictures(alone)) == ["heat_map", "spectra"]
    assert [table.caption for table in tables(alone)] == ["Every module"]
    assert report_page(alone, {}).count("<table>") == 1


def test_the_same_adapter_gives_the_same_page_and_each_figure_is_drawn_once(seen, drawn, monkeypatch):
    from matplotlib.figure import Figure

    again = pictures(inspect(PATTERNS, FIXTURES / "bases/untied", QV))
    page = report_page(seen, drawn)
    count, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda *a, **k: (count.append(1), save(*a, **k)))
    assert report_page(seen, drawn) == page
    assert count == []
    assert report_page(seen, again) == page
    assert len(count) == 4
    assert again["heat_map"].encoded("png") == drawn["heat_map"].encoded("png")


@pytest.mark.parametrize("adapter", ["tied--embedding", "untied--embedding-and-head"])
def test_few_modules_with_and_without_layers_are_drawn(adapter):
    alone = inspect(FIXTURES / "adapters" / adapter, against=FIXTURES / "adapters" / adapter)
    for picture in pictures(alone).values():
        assert picture.encoded("svg").startswith(b"<?xml")
        assert not re.search(r"nan|inf\b", picture.says)


def test_a_single_module_of_rank_1_can_be_inspected(tmp_path):
    A, B = np.ones((1, 3), np.float32), np.ones((2, 1), np.float32)
    folder = write_peft(tmp_path / "a", {"x": (A, B)}, lora_alpha=2)
    seen = inspect(folder, checkpoint(tmp_path / "base", {"x.weight": np.eye(2, 3)}), folder)
    (m,) = seen.modules
    assert (m.module, m.kind, m.layer) == ("x", "x", None)
    assert m.norm == pytest.approx(2 * math.sqrt(6))
    assert m.ranks == Ranks(1, 1, 1, 1)
    assert (m.noise.effective, m.noise.at90) == (pytest.approx(1), 1)
    assert "</html>" in report_page(seen, pictures(seen))
    assert str(seen).splitlines()[1].startswith("x ")


def test_experts_of_one_layer_are_averaged_in_the_heat_map(tmp_path):
    rng = np.random.default_rng(0)
    names = [f"model.layers.{i}.mlp.experts.{j}.w1" for i in range(2) for j in range(3)]
    factors = {name: (rng.standard_normal((2, 5)), rng.standard_normal((4, 2))) for name in names}
    seen = inspect(write_peft(tmp_path / "a", factors))
    image = pictures(seen)["heat_map"].figure.axes[1].get_images()[0].get_array()
    for layer in range(2):
        wanted = np.mean([m.norm for m in seen.modules if m.layer == layer])
        assert float(image[0, layer]) == pytest.approx(wanted)


# ---- what is noted, and what is refused


NOTES = {
    "biases--DoRA": ["DoRA: the numbers are those of B A alone"],
    "biases--bias-lora_only": ["4 parameters are replaced in full"],
    "biases--bias-all": ["14 parameters are replaced in full"],
    "tied--saved-norm-and-head": ["6 parameters are replaced in full"],
    "untied--q-and-v": [],
}


@pytest.mark.parametrize("adapter", NOTES)
def test_notes_say_what_the_numbers_leave_out(adapter):
    notes = inspect(FIXTURES / "adapters" / adapter).notes
    assert len(notes) == len(NOTES[adapter])
    for note, start in zip(notes, NOTES[adapter], strict=True):
        assert note.startswith(start)


def test_a_base_without_some_modules_is_noted_and_one_without_any_is_refused(tmp_path):
    rng = np.random.default_rng(0)
    factors = {f"a.{i}.b": (rng.standard_normal((2, 5)), rng.standard_normal((4, 2))) for i in range(2)}
    folder = write_peft(tmp_path / "a", factors)
    W = {f"a.{i}.b.weight": rng.standard_normal((4, 5)) for i in range(2)}
    cases = {
        "less": ({"a.0.b.weight": W["a.0.b.weight"]}, r"has no a\.1\.b\.weight; nearest: 'a\.0\.b\.weight'"),
        "turned": (W | {"a.1.b.weight": W["a.1.b.weight"].T}, r"a\.1\.b is \(4, 5\); the base's is \(5, 4\)"),
    }
    whole = inspect(folder, checkpoint(tmp_path / "whole", W))
    for name, (tensors, says) in cases.items():
        seen = inspect(folder, checkpoint(tmp_path / name, tensors))
        assert seen.modules[0] == whole.modules[0]
        assert (seen.modules[1].base, seen.modules[1].norm) == (None, whole.modules[1].norm)
        assert "1 module is not in the base, or in another shape, such as a.1.b" in seen.notes
        assert str(seen).count("a.1.b ") == 1
        none = {k.replace("a.0", "a.2"): a for k, a in tensors.items()}
        one = write_peft(tmp_path / f"{name} one", {"a.1.b": factors["a.1.b"]})
        with pytest.raises(MismatchError, match=says.replace(r"nearest: 'a\.0", r"nearest: 'a\.2")):
            inspect(one, checkpoint(tmp_path / f"{name} none", none))
    for i, bad in enumerate((np.nan, np.inf)):
        tensors = {k: a.copy() for k, a in W.items()}
        tensors["a.1.b.weight"][1, 2] = bad
        with pytest.raises(NonFiniteError, match=r"a\.1\.b\.weight has values that are not finite"):
            inspect(folder, checkpoint(tmp_path / f"bad{i}", tensors))


def test_a_second_adapter_of_other_shapes_or_modules_is_refused(tmp_path):
    rng = np.random.default_rng(0)
    one = write_peft(tmp_path / "a", {"a.b": (rng.standard_normal((2, 5)), rng.standard_normal((4, 2)))})
    two = write_peft(tmp_path / "b", {"a.b": (rng.standard_normal((2, 4)), rng.standard_normal((5, 2)))})
    three = write_peft(tmp_path / "c", {"a.c": (rng.standard_normal((2, 5)), rng.standard_normal((4, 2)))})
    with pytest.raises(MismatchError, match=r"a\.b is \(5, 4\); the first adapter's is \(4, 5\)"):
        inspect(one, against=two)
    with pytest.raises(MismatchError, match=r"adapts no module of .*; nearest: 'a\.c'"):
        inspect(one, against=three)


@pytest.mark.parametrize("beside", [False, True])
def test_factors_whose_product_overflows_are_refused_by_name(beside, tmp_path):
    big = write_peft(tmp_path / "a", {"a.b": (np.full((2, 5), 1e200), np.full((4, 2), 1e200))})
    fine = write_peft(tmp_path / "b", {"a.b": (np.ones((2, 5)), np.ones((4, 2)))})
    for one, two in ((big, fine if beside else None), (fine, big)):
        with pytest.raises(NonFiniteError, match=r"/a: the ΔW of a\.b is not finite"):
            inspect(one, against=two)


def test_inspecting_changes_no_file(tmp_path):
    folder = shutil.copytree(PATTERNS, tmp_path / "a")
    before = {name: (folder / name).read_bytes() for name in (CONFIG, WEIGHTS)}
    inspect(folder, FIXTURES / "bases/untied", QV)
    assert {name: (folder / name).read_bytes() for name in before} == before

"""kohya's clamp and least difference in `extract`; the rest of its laws stand in test_truncate.py."""

import json
import math

import numpy as np
import pytest
from by_hand import FILES, U32, bound64, changes, flat, read_kohya, read_peft
from helpers import seeds
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from safetensors.numpy import save_file

from minilora.compose.extract import clamped, extract, upright
from minilora.errors import ConfigError, InputError, MismatchError

SHAPES = {"a.weight": (9, 14), "b.weight": (12, 7), "c.weight": (8, 8)}
NUMBERS = st.floats(-8, 8, width=32)


def checkpoints(folder, changed, rng):
    """A base, the same plus these changes, and their difference as float64 has it."""
    before = {name: rng.standard_normal(dW.shape) for name, dW in changed.items()}
    after = {name: before[name] + dW for name, dW in changed.items()}
    for name, tensors in (("base", before), ("tuned", after)):
        (folder / name).mkdir()
        save_file(tensors, folder / name / "model.safetensors")
    return folder / "base", folder / "tuned", {name: after[name] - before[name] for name in before}


def drawn(rng):
    return {name: rng.standard_normal(shape) for name, shape in SHAPES.items()}


# ---- the clamp


@settings(max_examples=20)
@given(seed=seeds, k=st.integers(1, 6), quantile=st.floats(0.7, 0.999))
def test_clamped_factors_lie_within_their_quantile_and_the_report_is_of_them(
    seed, k, quantile, tmp_path_factory
):
    tmp, rng = tmp_path_factory.mktemp("q"), np.random.default_rng(seed)
    base, tuned, exact = checkpoints(tmp, drawn(rng), rng)
    found = extract(base, tuned, tmp / "out", rank=k, clamp_quantile=quantile)
    pairs = read_peft(tmp / "out")[0]
    for row in found.rows:
        A, B, s = pairs[row.module]
        dW = exact[f"{row.module}.weight"]
        U, S, Vt = np.linalg.svd(dW, full_matrices=False)
        US, Vt = U[:, :k] * S[:k], Vt[:k]
        turns = [max((*u, *v), key=abs) for u, v in zip(US.T, Vt, strict=True)]
        both = np.concatenate([US, Vt.T]) * np.sign(turns)
        bound = np.quantile(both, quantile)
        assert s == 1
        assert max(abs(A).max(), abs(B).max()) == pytest.approx(bound, rel=2 * U32)
        lost = np.linalg.norm(dW - B @ A)
        assert abs(row.residual - lost) <= 2 * bound64(A, B)
        assert abs(row.optimum - np.linalg.norm(S[k:])) <= 100 * 2.0**-53 * S[0]
        assert lost >= row.optimum * (1 - 1e-12)
    plain = extract(base, tuned, tmp / "plain", rank=k)
    assert found.optimum == plain.optimum


def test_a_clamp_costs_what_the_report_says(tmp_path):
    rng = np.random.default_rng(0)
    base, tuned, _ = checkpoints(tmp_path, drawn(rng), rng)
    sizes = (1.0, 0.99, 0.8)
    found = [extract(base, tuned, tmp_path / str(q), rank=4, clamp_quantile=q) for q in sizes]
    assert found[0].residual < found[1].residual < found[2].residual
    for q, report in zip(sizes, found, strict=True):
        note = f"note: the factors are clamped at their {q} quantile, so more than the optimum is lost"
        assert (note in str(report)) == (q < 1)


def test_a_quantile_of_1_changes_nothing(tmp_path):
    rng = np.random.default_rng(1)
    base, tuned, _ = checkpoints(tmp_path, drawn(rng), rng)
    plain, found = (extract(base, tuned, tmp_path / n, rank=3, **how)
                    for n, how in (("a", {}), ("b", {"clamp_quantile": 1.0})))  # fmt: skip
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in "ab"]
    assert files[0] == files[1]
    assert (found.rows, found.notes) == (plain.rows, ())
    for A, B, _ in read_peft(tmp_path / "b")[0].values():  # the singular values in equal parts
        assert np.linalg.norm(A, axis=1) == pytest.approx(np.linalg.norm(B, axis=0), rel=4 * U32)


FACTORS = st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 3)).flatmap(
    lambda n: st.tuples(
        arrays(float, (n[0], n[2]), elements=NUMBERS), arrays(float, (n[2], n[1]), elements=NUMBERS)
    )
)


@given(factors=FACTORS, quantile=st.floats(0.5, 1))
def test_a_clamp_moves_only_what_is_beyond_the_quantile(factors, quantile):
    B, A = factors
    bound = np.quantile(np.concatenate([B.ravel(), A.ravel()]), quantile)
    if bound <= 0:
        with pytest.raises(InputError, match=r"^m: the .* quantile of its factors is .*; expected"):
            clamped(B, A, quantile, "m")
        return
    for old, new in zip((B, A), clamped(B, A, quantile, "m"), strict=True):
        assert np.array_equal(new, np.sign(old) * np.minimum(abs(old), bound))


@given(factors=FACTORS)
def test_upright_factors_have_the_same_product_and_do_not_depend_on_the_signs_that_came(factors):
    B, A = factors
    turned, again = upright(B, A), upright(-B, -A)
    assert np.array_equal(turned[0] @ turned[1], B @ A)
    for i in range(len(A)):
        entries = np.concatenate([turned[0][:, i], turned[1][i]])
        largest = entries[abs(entries) == abs(entries).max()]
        assert largest[0] >= 0
        assert np.array_equal(entries, np.concatenate([again[0][:, i], again[1][i]]))


def test_the_clamp_is_kohyas():
    """svd_merge_lora.py clamps as its extraction does; the signs are those that its SVD chose."""
    folder = FILES / "kohya_sdscripts_merged/svd_merge_rank4"
    told = json.loads((folder / "args.json").read_text())
    merged = read_kohya(folder / "svd_merge_rank4.safetensors")
    files = [read_kohya(FILES / model) for model in told["models"]]
    for m, (down, up, _) in merged.items():
        total, size = 0, 0
        for file, ratio in zip(files, told["ratios"], strict=True):
            (B, A), s = flat(*file[m][:2]), ratio * file[m][2]
            total, size = total + s * B @ A, size + bound64(A, B, s) * 2**29  # in float32
        (B, A), k = flat(down, up), len(down)
        U, S, Vt = np.linalg.svd(total)
        US, Vt = U[:, :k] * S[:k], Vt[:k]
        signs = np.sign((Vt * A).sum(1))
        ours = clamped(US * signs, Vt * signs[:, None], told["clamp_quantile"], m)
        turn = 2 * size / min(S[:k] - np.append(S, 0)[1 : k + 1])  # of a vector, to first order (Wedin)
        assert turn < 0.01
        assert np.abs(ours[0] - B).max() <= 2 * (S[0] * turn + size), m
        assert np.abs(ours[1] - A).max() <= 2 * (max(S[0], 1) * turn + size), m
        assert max(abs(A).max(), abs(B).max()) < max(abs(Vt).max(), abs(US).max())


# ---- the least difference


@settings(max_examples=15)
@given(seed=seeds, least=st.sampled_from([0.0, 0.01, 0.5]))
def test_maps_that_differ_by_too_little_are_counted_and_left_out(seed, least, tmp_path_factory):
    """Entries are multiples of 2^-7, so that differences are exact; one map differs by exactly the limit."""
    tmp, rng = tmp_path_factory.mktemp("d"), np.random.default_rng(seed)
    changed = {name: np.round(rng.standard_normal(shape) * 2**7) / 2**7 for name, shape in SHAPES.items()}
    changed["edge.weight"] = np.where(rng.random((4, 5)) < 0.5, least, -least)
    changed["small.weight"] = changed["edge.weight"] / 2
    changed["equal.weight"] = np.zeros((5, 6))
    changed["norm.weight"] = np.full(6, least / 4)
    before = {name: np.zeros(dW.shape) for name, dW in changed.items()}
    for name, tensors in (("base", before), ("tuned", changed)):
        (tmp / name).mkdir()
        save_file(tensors, tmp / name / "model.safetensors")
    found = extract(tmp / "base", tmp / "tuned", tmp / "out", rank=2, min_diff=least)
    large = {name.removesuffix(".weight") for name in SHAPES}
    assert {row.module for row in found.rows} == changes(tmp / "out").keys() == large
    said = [note for note in found.notes if "every entry" in note or "each entry" in note]
    if least:
        total = math.hypot(np.linalg.norm(changed["edge.weight"]), np.linalg.norm(changed["small.weight"]))
        assert said == [f"left out: 2 maps differ by {least:g} at most in each entry, |change| {total:.3g}"]
        assert found.left.keys() == {"norm.weight"}
    else:
        assert (said, dict(found.left)) == ([], {})


def test_nothing_above_the_least_difference_is_an_error(tmp_path):
    rng = np.random.default_rng(0)
    base, tuned, exact = checkpoints(tmp_path, drawn(rng), rng)
    most = max(abs(dW).max() for dW in exact.values())
    with pytest.raises(MismatchError, match=r"no linear map differs by more than .*; there is nothing"):
        extract(base, tuned, tmp_path / "out", rank=1, min_diff=float(most))
    assert not (tmp_path / "out").exists()
    found = extract(base, tuned, tmp_path / "out", rank=1, min_diff=float(np.nextafter(most, 0)))
    assert len(found.rows) == 1


def test_a_clamp_that_would_leave_nothing_is_refused_by_name(tmp_path):
    changed = {"a.weight": np.eye(40, 50, dtype=float), "b.weight": np.ones((4, 5))}
    base, tuned, _ = checkpoints(tmp_path, changed, np.random.default_rng(0))
    with pytest.raises(
        InputError, match=r"^a: the 0\.9 quantile of its factors is 0; expected a clamp_quantile"
    ):
        extract(base, tuned, tmp_path / "out", rank=2, clamp_quantile=0.9)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "tuned"]


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"clamp_quantile": 0}, r"clamp_quantile is 0; expected a number in \(0, 1\]"),
        ({"clamp_quantile": 99}, r"clamp_quantile is 99; expected a number in \(0, 1\]"),
        ({"clamp_quantile": None}, "clamp_quantile is None"),
        ({"clamp_quantile": float("nan")}, "clamp_quantile is nan"),
        ({"min_diff": -1.0}, "min_diff is -1.0"),
        ({"min_diff": float("inf")}, "min_diff is inf"),
        ({"min_diff": True}, "min_diff is True"),
    ],
)
def test_an_invalid_clamp_or_difference_is_refused_before_reading(how, says, tmp_path):
    with pytest.raises(ConfigError, match=f"^{says}"):
        extract(tmp_path / "none", tmp_path / "other", tmp_path / "out", rank=1, **how)

"""Kohya's rules give kohya's ranks, as its own files show; the minimum is what they need."""

import json
import re

import numpy as np
import pytest
from by_hand import FILES, U32, bound32, bound64, changes, flat, read_kohya, read_peft, write_peft
from helpers import seeds
from hypothesis import given
from hypothesis import strategies as st

from minilora.compose.ranks import DYNAMIC, dynamic_rank
from minilora.compose.truncate import compress
from minilora.errors import ConfigError

RESIZED = sorted((FILES / "kohya_sdscripts_resized").iterdir())
PARAMS = {"sv_ratio": st.floats(1, 100), "sv_fro": st.floats(0.01, 1), "sv_cumulative": st.floats(0.01, 1)}
RULES = st.sampled_from(DYNAMIC).flatmap(lambda name: st.tuples(st.just(name), PARAMS[name]))


@pytest.fixture(scope="module", params=RESIZED, ids=lambda folder: folder.name)
def resized(request):
    """What kohya's script was told; its input and its output."""
    told = json.loads((request.param / "args.json").read_text())
    files = FILES / told["model"], request.param / f"{request.param.name}.safetensors"
    return told, *map(read_kohya, files), (request.param / "verbose.txt").read_text()


def cap(told, down):
    return told["new_conv_rank"] if down.ndim == 4 else told["new_rank"]


def test_every_rank_is_kohyas(resized):
    """With all min(O, I) values of up @ down. A change of S by what float32 may be off changes no rank."""
    told, before, after, said = resized
    method, param = told["dynamic_method"], told["dynamic_param"]
    assert before.keys() == after.keys()
    for m, (down, up, scale) in before.items():
        B, A = flat(down, up)
        S = np.linalg.svd(B @ A, compute_uv=False)
        if not method:
            assert len(after[m][0]) == cap(told, down)
            continue
        off = bound64(A, B) * 2**29  # in float32
        share = {
            "sv_ratio": 2 * off / S[0],
            "sv_fro": 4 * off / S[0],
            "sv_cumulative": 2 * len(S) * off / S[0],
        }
        for factor in (1, 1 + share[method] + 4 * U32, 1 - share[method] - 4 * U32):
            assert dynamic_rank(S, method, param * factor, cap(told, down)) == len(after[m][0]), m
        assert after[m][2] == pytest.approx(scale, rel=1e-6)
        (line,) = re.findall(rf"^{m} .*", said, re.M)
        kept = [100 * np.linalg.norm(S[: len(after[m][0])], p) / np.linalg.norm(S, p) for p in (1, 2)]
        assert f"sum(S) retained: {kept[0]:.1f}%, fro retained: {kept[1]:.1f}%" in line
    if method:
        assert len({len(down) for down, _, _ in after.values() if down.ndim == 4}) > (told["new_rank"] == 8)


def test_compress_writes_kohyas_file(resized, tmp_path):
    """In kohya's names, with its ranks as far as the factors have them; ΔW is the same within rounding.

    float32 finds the values of ΔW + E. With g = s_k / (s_k - s_{k+1}) its first k terms are at most g |E|
    from those of ΔW, to first order: in the bases of ΔW, E_ij and E_ji with i <= k < j are mapped by a matrix
    whose eigenvalues are s_i / (s_i - s_j) and s_i / (s_i + s_j), and all others are kept or dropped.
    """
    told, before, after, _ = resized
    factors = {m: (down, up) for m, (down, up, _) in before.items()}
    alphas = {f"^{m}$": len(down) * scale for m, (down, _, scale) in before.items()}
    source = write_peft(tmp_path / "in", factors, alpha_pattern=alphas)
    rule = {"dynamic": told["dynamic_method"], "param": told["dynamic_param"]}
    found = compress(source, tmp_path / "out", rank=told["new_rank"], conv_rank=told["new_conv_rank"], **rule)
    ours = changes(tmp_path / "out")
    assert {row.module for row in found.rows} == after.keys()
    for row in found.rows:
        m, k = row.module, row.rank
        down, up, scale = after[m]
        assert k == min(len(down), row.r)
        B, A = flat(down, up)
        B0, A0 = flat(*before[m][:2])
        S = np.append(np.linalg.svd(scale * (B0 @ A0), compute_uv=False), 0)
        off = bound64(A0, B0, scale) * 2**29
        stored = U32 if told["save_precision"] == "float" else 2.0**-11
        subnormal = 2.0**-25 * scale * (np.linalg.norm(A) * B.size**0.5 + np.linalg.norm(B) * A.size**0.5)
        g = S[k - 1] / (S[k - 1] - S[k]) if k < row.r else 1
        bound = (2 * g + 1) * off + bound32(S) * (1 + stored / U32) + subnormal * (stored > U32)
        assert np.linalg.norm(ours[m] - scale * (B @ A)) <= bound, m
        assert bound < 0.005 * S[0]


@st.composite
def spectra(draw):
    rng = np.random.default_rng(draw(seeds))
    n = draw(st.integers(1, 9))
    return np.sort(rng.random(n) ** draw(st.sampled_from([1, 4, 16])))[::-1] + 1e-3


@given(S=spectra(), rule=RULES, cap=st.integers(1, 12))
def test_the_minimum_meets_the_rule_and_kohya_keeps_one_more(S, rule, cap):
    method, param = rule
    least = dynamic_rank(S, method, param, len(S), minimum=True)

    def met(n, slack):
        if method == "sv_ratio":
            return n == len(S) or S[n] * param <= S[0] * (1 + slack)
        p = 2 if method == "sv_fro" else 1
        return np.linalg.norm(S[:n], p) >= param * np.linalg.norm(S, p) * (1 - slack)

    assert met(least, 4 * U32)
    assert least == 1 or not met(least - 1, -4 * U32)
    assert dynamic_rank(S, method, param, cap, minimum=True) == min(least, cap)
    assert dynamic_rank(S, method, param, cap) == min(least + 1, len(S), cap)


@given(S=spectra(), rule=RULES, cap=st.integers(1, 12), power=st.integers(-9, 60), zeros=st.integers(0, 3))
def test_neither_units_nor_zeros_at_the_end_change_a_rank(S, rule, cap, power, zeros):
    for minimum in (False, True):
        rank = dynamic_rank(S, *rule, min(cap, len(S)), minimum)
        assert dynamic_rank(np.ldexp(S, power), *rule, min(cap, len(S)), minimum) == rank
        assert dynamic_rank(np.pad(S, (0, zeros)), *rule, min(cap, len(S)), minimum) == rank
        assert dynamic_rank(S / S[0] * 1e-6, *rule, cap, minimum) == 1
    assert dynamic_rank(S / S[0] * 1.001e-6, *rule, 12) == dynamic_rank(S, *rule, 12)


def test_ties_are_decided_as_kohya_does():
    S = np.array([4.0, 3.0, 2.0, 1.0])
    assert dynamic_rank(S, "sv_ratio", 2.0, 4, minimum=True) == 2  # 2 is not above 4 / 2
    assert dynamic_rank(S, "sv_ratio", 1.0, 4) == 2  # none is above 4
    assert dynamic_rank(S, "sv_ratio", 1.0, 4, minimum=True) == 1
    assert dynamic_rank(np.array([1.0, 0.7]), "sv_ratio", 1 / 0.7, 2, minimum=True) == 1  # alike in float32
    assert dynamic_rank(S, "sv_cumulative", 0.7, 4, minimum=True) == 2  # 4 + 3 of 10, in float32
    assert dynamic_rank(np.array([4.0, 3.0]), "sv_fro", 0.8, 2, minimum=True) == 1  # 16 of 25


# ---- in compress


def adapter(folder, alpha=8):
    """A linear map, a 1 x 1 and a 3 x 3 convolution, whose spectra fall at different speeds."""
    rng, factors = np.random.default_rng(0), {}
    for name, kernel, fall in (("l", (), 0.5), ("c1", (1, 1), 0.7), ("c3", (3, 3), 0.9)):
        A, B = rng.standard_normal((6, 9, *kernel)), rng.standard_normal((8, 6, *(1 for _ in kernel)))
        A *= np.reshape(fall ** np.arange(6), (6, *(1 for _ in A.shape[1:])))
        factors[f"x.{name}"] = A.astype(np.float32), B.astype(np.float32)
    return write_peft(folder, factors, lora_alpha=alpha)


def ranks(source, out, **how):
    found = compress(source, out, overwrite=True, **how)
    assert {m: len(A) for m, (A, _, _) in read_peft(out)[0].items()} == {r.module: r.rank for r in found.rows}
    return [{row.module: row.rank for row in found.rows}[f"x.{name}"] for name in ("l", "c1", "c3")], found


def test_the_rank_of_convolutions_is_that_of_every_module_with_more_axes(tmp_path):
    source, out = adapter(tmp_path / "in"), tmp_path / "out"
    assert ranks(source, out, rank=2, conv_rank=4)[0] == [2, 4, 4]
    assert ranks(source, out, rank=20, conv_rank=1)[0] == [6, 1, 1]
    rule = {"dynamic": "sv_fro", "param": 1.0}
    assert ranks(source, out, **rule)[0] == [6, 6, 6]
    assert ranks(source, out, **rule, rank=3)[0] == [3, 3, 3]
    assert ranks(source, out, **rule, rank=3, conv_rank=5)[0] == [3, 5, 5]
    assert ranks(source, out, **rule, conv_rank=2)[0] == [6, 2, 2]


def test_conv_rank_without_a_convolution_is_noted(tmp_path):
    rng = np.random.default_rng(0)
    source = write_peft(tmp_path / "in", {"a.b": (rng.standard_normal((3, 5)), rng.standard_normal((4, 3)))})
    found = compress(source, tmp_path / "out", rank=2, conv_rank=1)
    assert [row.rank for row in found.rows] == [2]
    assert found.notes == ("no module is a convolution, so conv_rank changes nothing",)
    assert compress(adapter(tmp_path / "more"), tmp_path / "c", rank=2, conv_rank=1).notes == ()


@pytest.mark.parametrize("rule", [("sv_fro", 0.9), ("sv_cumulative", 0.6), ("sv_ratio", 3.0)])
def test_the_report_tells_what_kohya_keeps_beyond_the_minimum(rule, tmp_path):
    source, how = adapter(tmp_path / "in"), dict(zip(("dynamic", "param"), rule, strict=True))
    kohya, found = ranks(source, tmp_path / "out", **how)
    least, small = ranks(source, tmp_path / "out", **how, minimum=True)
    assert kohya == [min(k + 1, 6) for k in least]
    assert len(set(least)) > 1
    (note,) = found.notes
    some = f"{sum(k < 6 for k in least)} of 3 modules"
    assert note.startswith(f"{rule[0]}, as in kohya's script, keeps one more than it needs in {some}; ")
    assert f"note: {note}" in str(found)
    assert small.notes == ()
    if rule[0] == "sv_fro":
        assert ranks(source, tmp_path / "out", energy=rule[1] ** 2, per_module=True)[0] == least


def test_a_module_is_zero_by_its_factors_and_not_by_its_scale(tmp_path):
    rule = {"dynamic": "sv_fro", "param": 0.9}
    usual = ranks(adapter(tmp_path / "in"), tmp_path / "out", **rule)[0]
    assert max(usual) > 2
    for alpha in (8e-9, 8e9):
        assert ranks(adapter(tmp_path / f"in{alpha}", alpha), tmp_path / "out", **rule)[0] == usual
    A, B = np.eye(4, 5) * np.float32(1e-7), np.eye(6, 4, dtype=np.float32)
    small = write_peft(tmp_path / "small", {"a.b": (A, B)}, lora_alpha=1e9)
    assert [row.rank for row in compress(small, tmp_path / "s", **rule).rows] == [1]


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"dynamic": "fro", "param": 0.9}, "dynamic is 'fro'; nearest: 'sv_fro'"),
        ({"dynamic": 3, "param": 0.9}, "dynamic is 3"),
        ({"dynamic": "sv_fro"}, r"param is None; expected a number in \(0, 1\]"),
        ({"dynamic": "sv_fro", "param": 3}, r"param is 3; expected a number in \(0, 1\]"),
        ({"dynamic": "sv_cumulative", "param": 0}, r"param is 0; expected a number in \(0, 1\]"),
        ({"dynamic": "sv_cumulative", "param": True}, "param is True"),
        ({"dynamic": "sv_ratio", "param": 0.9}, "param is 0.9; expected .*1"),
        ({"dynamic": "sv_ratio", "param": float("inf")}, "param is inf"),
        ({"dynamic": "sv_ratio"}, "param is None"),
        ({"dynamic": "sv_fro", "param": 0.9, "rank": 0}, "rank is 0"),
        ({"dynamic": "sv_fro", "param": 0.9, "conv_rank": 0}, "conv_rank is 0"),
        ({"dynamic": "sv_fro", "param": 0.9, "energy": 0.5}, "dynamic goes with rank"),
        ({"dynamic": "sv_fro", "param": 0.9, "per_module": True}, "dynamic goes with rank"),
        ({"rank": 2, "conv_rank": 2.0}, r"conv_rank is 2\.0"),
        ({"rank": 2, "conv_rank": 2, "per_module": True}, "conv_rank goes with rank"),
        ({"energy": 0.5, "conv_rank": 2}, "conv_rank goes with rank"),
        ({"conv_rank": 2}, "rank and energy are two ways"),
        ({"rank": 2, "param": 0.9}, "param and minimum need a rule; expected dynamic: sv_ratio"),
        ({"rank": 2, "minimum": True}, "param and minimum need a rule"),
    ],
)
def test_what_is_no_choice_is_refused_before_reading(how, says, tmp_path):
    with pytest.raises(ConfigError, match=f"^{says}"):
        compress(tmp_path / "none", tmp_path / "out", **how)

"""Adapters' folders are summed on ΔW: any ranks, scales and modules; what has no sum is refused by name."""

import json
import math
import shutil
from inspect import signature
from pathlib import Path

import numpy as np
import pytest
from by_hand import CONFIG, PREFIX, U32, U64, WEIGHTS, changes, read_peft, write_peft
from helpers import EVERYTHING, LINEARS, batch, same_bits, seeds, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from peft_cases import FIXTURES
from vectors import of, slack, weights
from vectors import summed as exact_sum

from minilora.backend import to_device, to_host
from minilora.compose import combine as module
from minilora.compose.combine import METHODS, add_weighted_adapter, combine
from minilora.compose.sparsify import dare
from minilora.errors import (
    InputError,
    MismatchError,
    NonFiniteError,
    StateError,
    StorageError,
    UnsupportedError,
)
from minilora.formats.safetensors import open_tensors
from minilora.layers import Factors, Linear
from minilora.lora import active, adapted, inject, merge, set_adapter
from minilora.methods.lora_config import LoraConfig
from minilora.peft.folder import check_agreement, open_adapter, write_adapter
from minilora.peft.loading import load_adapter, save_adapter
from minilora.tree import named_params

NEEDS = {  # method -> the options that drop nothing, of an adapter of rank 2
    "linear": {}, "cat": {}, "svd": {"rank": 2}, "peft_linear": {}, "kohya_linear": {},
    "magnitude": {"density": 1.0},
    "ties": {"density": 1.0}, "dare": {"density": 1.0}, "dare_ties": {"density": 1.0},
}  # fmt: skip
CROSSED = ("peft_linear", "kohya_linear")  # which are no sums
SHAPES = {"model.layers.0.mlp.m0": (7, 4), "model.layers.1.mlp.m1": (3, 8), "model.layers.2.mlp.m0": (5, 5)}


@st.composite
def folders(draw):
    """[(factors, config, weight), ...]: of some of the modules each, ranks and scales of their own."""
    rng, found = np.random.default_rng(draw(seeds)), []
    for _ in range(draw(st.integers(1, 3))):
        modules = draw(st.sets(st.sampled_from(sorted(SHAPES)), min_size=1))
        dtype = draw(st.sampled_from([np.float16, np.float32, np.float64]))
        factors = {}
        for m in sorted(modules):
            (O, I), r = SHAPES[m], draw(st.integers(1, 4))  # noqa: E741
            factors[m] = rng.standard_normal((r, I)).astype(dtype), rng.standard_normal((O, r)).astype(dtype)
        config = {"lora_alpha": draw(st.sampled_from([1, 7, 16.5])), "use_rslora": draw(st.booleans())}
        if draw(st.booleans()) and "model.layers.0.mlp.m0" in modules:
            config["alpha_pattern"] = {"layers.0.mlp.m0": 0.75}
        found.append((factors, config, draw(weights)))
    if not any(weight for *_, weight in found):
        found[0] = (*found[0][:2], 1.0)
    return found


def written(tmp, given_):
    """The folders, and their weights by folder."""
    return {str(write_peft(tmp / f"in{i}", f, **c)): w for i, (f, c, w) in enumerate(given_)}


def summed(adapters, u=U32):
    """Module -> (the sum of w ΔW, what float64 and then the dtype of the file may make of it)."""
    found = {}
    for folder, w in adapters.items():
        for m, (A, B, s) in read_peft(Path(folder))[0].items() if w else ():
            found.setdefault(m, []).append((w, of(B, A, s)))
    return {m: (exact_sum(updates).astype(float), slack(updates, u=u)) for m, updates in found.items()}


def at_most(given_):
    """The largest rank that the sum of these can have in a module."""
    factors = [f for f, _, w in given_ if w]
    modules = {m for f in factors for m in f}
    return max(min(*SHAPES[m], sum(len(f[m][0]) for f in factors if m in f)) for m in modules)


# ---- the sum, in files


@settings(max_examples=25)
@given(given_=folders())
def test_the_sum_of_folders_is_the_sum_of_their_changes(given_, tmp_path_factory):
    tmp = tmp_path_factory.mktemp("a")
    adapters = written(tmp, given_)
    expected, made = summed(adapters), combine(adapters, tmp / "out")
    found, config = changes(tmp / "out"), read_peft(tmp / "out")[2]
    assert found.keys() == expected.keys() == {row.module for row in made.rows}  # a union
    for row in made.rows:
        dW, off = expected[row.module]
        assert np.linalg.norm(found[row.module] - dW) <= off
        assert abs(row.norm - np.linalg.norm(dW)) <= off
        assert abs(row.residual - np.linalg.norm(found[row.module] - dW)) <= off
        assert row.shape == dW.shape == SHAPES[row.module]
        assert row.rank == sum(row.ranks)
        assert row.cut == 0
    assert config["use_rslora"] is False
    lost, whole = (math.hypot(*(getattr(row, name) for row in made.rows)) for name in ("residual", "norm"))
    assert made.relative == pytest.approx(lost / whole if whole else 0 if not lost else math.inf, rel=1e-12)
    assert made.parameters == sum(row.rank * sum(row.shape) for row in made.rows)
    given_again = open_adapter(tmp / "out")
    assert given_again.doubts == ()
    check_agreement(given_again)


@pytest.mark.parametrize("method", [m for m in METHODS if m not in ("ties", "dare_ties", *CROSSED)])
@settings(max_examples=6)
@given(given_=folders())
def test_every_method_that_drops_nothing_writes_the_sum(method, given_, tmp_path_factory):
    tmp = tmp_path_factory.mktemp("a")
    adapters = written(tmp, given_)
    how = {"rank": at_most(given_)} if method == "svd" else NEEDS[method]
    made = combine(list(adapters.items()), tmp / "out", method=method, **how)  # pairs, too
    for row in made.rows:
        dW, off = summed(adapters)[row.module]
        assert np.linalg.norm(changes(tmp / "out")[row.module] - dW) <= off
        assert row.residual <= off


@settings(max_examples=6)
@given(given_=folders(), rank=st.integers(1, 5))
def test_a_module_that_cannot_have_the_rank_has_its_own(given_, rank, tmp_path_factory):
    tmp = tmp_path_factory.mktemp("a")
    adapters, rank = written(tmp, given_), min(rank, at_most(given_))
    made = combine(adapters, tmp / "out", method="svd", rank=rank)
    for row in made.rows:
        dW, off = summed(adapters)[row.module]
        assert row.rank == min(rank, *row.shape, sum(row.ranks))
        tail = np.linalg.norm(np.linalg.svd(dW, compute_uv=False)[row.rank :])
        assert abs(np.linalg.norm(changes(tmp / "out")[row.module] - dW) - tail) <= off
        assert abs(row.cut - tail) <= off
    with pytest.raises(InputError, match=r"rank is 30; expected an int from 1 to [1-5], the most"):
        combine(adapters, tmp / "other", method="svd", rank=30)
    assert not (tmp / "other").exists()


@pytest.mark.parametrize("method", METHODS)
def test_interpolation_ends_at_both_adapters(method, tmp_path):
    """Weight 0 is absent, to the byte: modules that the other alone has, too."""
    rng = np.random.default_rng(0)
    one, other = (draw(rng, dict.fromkeys(names, 2)) for names in (sorted(SHAPES)[:2], sorted(SHAPES)[1:]))
    a, b = write_peft(tmp_path / "a", one, lora_alpha=7), write_peft(tmp_path / "b", other)
    ends = {"alone": {a: 1.0}, "end": {a: 1.0, b: 0.0}, "numpy": {a: np.float64(1), b: 0}}
    for name, adapters in ends.items():
        combine(adapters, tmp_path / name, method=method, **NEEDS[method])
    files = [[(tmp_path / name / f).read_bytes() for f in (CONFIG, WEIGHTS)] for name in ends]
    assert files[0] == files[1] == files[2]
    for m, (dW, off) in summed({a: 1.0}).items():
        assert np.linalg.norm(changes(tmp_path / "end")[m] - dW) <= off


def draw(rng, ranks, dtype=np.float32):
    """module -> (A, B) of normal numbers."""
    return {
        m: (
            rng.standard_normal((r, SHAPES[m][1])).astype(dtype),
            rng.standard_normal((SHAPES[m][0], r)).astype(dtype),
        )
        for m, r in ranks.items()
    }


def two(tmp_path, **config):
    """Two folders of three modules with rank 2, and their names."""
    rng = np.random.default_rng(0)
    return [write_peft(tmp_path / n, draw(rng, dict.fromkeys(SHAPES, 2)), **config) for n in "ab"]


@pytest.mark.parametrize("method", METHODS)
def test_numbers_of_numpy_are_numbers(method, tmp_path):
    a, b = two(tmp_path)
    how = {name: type_(value) for name, type_, value in (("rank", np.int64, 2), ("density", np.float32, 0.5))
           if name in NEEDS[method]}  # fmt: skip
    weighted = {a: np.float32(0.5), b: np.int64(2)}
    made = combine(weighted, tmp_path / "one", method=method, seed=np.int64(3), **how)
    plain = {name: value.item() for name, value in how.items()}
    assert made.rows == combine({a: 0.5, b: 2}, tmp_path / "two", method=method, seed=3, **plain).rows
    assert (tmp_path / "one" / WEIGHTS).read_bytes() == (tmp_path / "two" / WEIGHTS).read_bytes()
    assert json.loads(json.dumps(made.data()))["relative"] == made.relative


@pytest.mark.parametrize("method", ["magnitude", "ties", "dare", "dare_ties"])
def test_the_order_of_the_folders_does_not_change_the_file(method, tmp_path):
    a, b = two(tmp_path)
    for name, adapters in (("one", {a: 1, b: 0.5}), ("other", {b: 0.5, a: 1})):
        combine(adapters, tmp_path / name, method=method, density=0.5)
    assert (tmp_path / "one" / WEIGHTS).read_bytes() == (tmp_path / "other" / WEIGHTS).read_bytes()


def test_modules_draw_one_after_the_other(tmp_path):
    """By name, from one generator of this seed: so two that are equal do not drop the same entries."""
    rng = np.random.default_rng(0)
    A, B = rng.standard_normal((2, 6)), rng.standard_normal((7, 2))
    a = write_peft(tmp_path / "a", {"m.two": (A, B), "m.one": (A, B)})
    combine({a: 1}, tmp_path / "out", method="dare", density=0.5, seed=3)
    found, draws = changes(tmp_path / "out"), np.random.default_rng(3)
    assert np.linalg.norm(found["m.one"] - found["m.two"]) > 0.1 * np.linalg.norm(B @ A)
    for m in ("m.one", "m.two"):
        expected = dare([(1, of(B, A, read_peft(a)[0][m][2]))], 0.5, draws).factors
        for mine, other in zip(open_adapter(tmp_path / "out").factors(m), expected[1::-1], strict=True):
            assert (mine == to_host(other)).all()


@pytest.mark.parametrize("method", ["dare", "dare_ties"])
def test_a_seed_gives_the_same_file_and_another_does_not(method, tmp_path):
    a, b = two(tmp_path)
    for name, seed in (("one", 3), ("again", 3), ("other", 4)):
        combine({a: 0.5, b: 1}, tmp_path / name, method=method, density=0.5, seed=seed)
    one, again, other = ((tmp_path / n / WEIGHTS).read_bytes() for n in ("one", "again", "other"))
    assert one == again
    assert one != other


def test_float64_stays_float64(tmp_path):
    rng = np.random.default_rng(0)
    a = write_peft(tmp_path / "a", draw(rng, dict.fromkeys(SHAPES, 2), np.float64))
    made = combine({a: 0.3}, tmp_path / "out")
    tensors = open_adapter(tmp_path / "out").tensors
    assert {tensors.dtypes[name] for name in tensors} == {"F64"}
    for row in made.rows:
        assert row.residual <= summed({a: 0.3}, U64)[row.module][1]


def test_the_report_names_modules_ranks_and_weights(tmp_path):
    a, b = two(tmp_path)
    made = combine({a: 0.7, b: -0.3}, tmp_path / "out", method="svd", rank=3)
    said = str(made).splitlines()
    assert said[0].split() == ["module", "rank", "|Σ", "w", "ΔW|", "residual", "cut"]
    assert said[1].split()[:4] == ["model.layers.0.mlp.m0", "2+2", "->", "3"]
    assert f"svd of +0.7 {a} -0.3 {b}" in said[-2]
    assert said[-1] == f"{made.parameters:,} parameters, residual {made.relative:.3e} of |Σ w ΔW|"
    assert made.data()["rows"][0]["ranks"] == (2, 2)
    assert made.data()["relative"] == made.relative
    assert "residual" not in made.data()  # which is absolute, and a row's


def test_the_weights_of_the_base_that_peft_copies_are_left_out_and_it_is_said(tmp_path):
    source = FIXTURES / "adapters" / "untied--embedding-and-head"
    made = combine({source: 1}, tmp_path / "out")
    assert [note for note in made.notes if "2 copies of the base's weights left out, as" in note]
    assert not [name for name in open_adapter(tmp_path / "out").tensors if "base_layer" in name]
    assert changes(tmp_path / "out").keys() == changes(source).keys() == {"lm_head", "model.embed_tokens"}


def test_progress_is_told_module_by_module(tmp_path):
    told = []
    combine({two(tmp_path)[0]: 1}, tmp_path / "out", progress=lambda done, of: told.append((done, of)))
    assert told == [(1, 3), (2, 3), (3, 3)]


# ---- what the config says


def test_selectors_are_kept_where_all_have_the_same_modules_and_become_names_elsewhere(tmp_path):
    rng = np.random.default_rng(0)
    modules = [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]
    factors = [
        {m: (rng.standard_normal((2, 4)), rng.standard_normal((5, 2))) for m in names}
        for names in (modules, modules, modules[:1])
    ]
    short = {"target_modules": ["q_proj"], "base_model_name_or_path": "x"}
    a, b = (write_peft(tmp_path / n, f, **short) for n, f in zip("ab", factors, strict=False))
    c = write_peft(tmp_path / "c", factors[2], **short | {"layers_to_transform": [0]})
    d = write_peft(tmp_path / "d", factors[0], **short | {"base_model_name_or_path": "y"})
    for name, adapters in {"same": (a, b), "other": (a, c), "alone": (c,), "bases": (a, d)}.items():
        combine(dict.fromkeys(adapters, 0.5), tmp_path / name)
        check_agreement(open_adapter(tmp_path / name))
    found = {name: read_peft(tmp_path / name)[2] for name in ("same", "other", "alone", "bases")}
    assert found["same"]["target_modules"] == found["bases"]["target_modules"] == ["q_proj"]
    assert (found["other"]["target_modules"], found["other"].get("layers_to_transform")) == (modules, None)
    assert (found["alone"]["target_modules"], found["alone"]["layers_to_transform"]) == (["q_proj"], [0])
    assert [found[n]["base_model_name_or_path"] for n in ("same", "bases")] == ["x", None]


def test_what_all_configs_say_is_kept_and_an_old_folder_replaced(tmp_path):
    says = {"task_type": "SEQ_CLS", "target_modules": "all-linear", "exclude_modules": ["m9"]}
    a, b = two(tmp_path, **says)
    out = write_peft(tmp_path / "out", {"old": (np.ones((1, 2)), np.ones((3, 1)))})
    combine({a: 1, b: 1}, out, overwrite=True)
    assert {name: read_peft(out)[2].get(name) for name in says} == says
    assert changes(out).keys() == SHAPES.keys()


def test_strings_on_which_all_headers_agree_are_kept_if_they_are_true_of_the_sum(tmp_path):
    rng, common = (
        np.random.default_rng(0),
        {"ss_base_model_version": "sd_v1", "ss_network_module": "networks.lora"},
    )
    sizes = {"ss_network_dim": "2", "ss_network_alpha": "2", "ss_network_args": '{"conv_dim": 1, "a": 3}'}
    adapters = {}
    for i in range(3):
        folder, factors = (
            tmp_path / f"{i}",
            {"a.b": (rng.standard_normal((2, 5)), rng.standard_normal((4, 2)))},
        )
        own = {"ss_output_name": f"{i}", "sshs_model_hash": "00"} | ({"ss_seed": "1"} if i else {})
        write_peft(folder, factors, metadata=common | sizes | own, lora_alpha=2)
        adapters[str(folder)] = i / 2
    combine(adapters, tmp_path / "sum")
    new = dict(open_tensors(tmp_path / "sum" / WEIGHTS).metadata)
    assert new.pop("format") == "pt"
    assert json.loads(new.pop("minilora")).keys() == {"sha256"}
    assert new == common | {"ss_network_args": '{"a": 3}', "ss_seed": "1"}  # the first has no weight
    combine(adapters, tmp_path / "svd", method="svd", rank=2)
    assert dict(open_tensors(tmp_path / "svd" / WEIGHTS).metadata).items() >= (common | sizes).items()


def test_fan_in_fan_out_is_kept(tmp_path):
    a, b = two(tmp_path, fan_in_fan_out=True)
    combine({a: 1, b: 1}, tmp_path / "out")
    assert read_peft(tmp_path / "out")[2]["fan_in_fan_out"] is True


def test_a_convolution_keeps_its_window(tmp_path):
    rng = np.random.default_rng(0)
    factors = [
        {"conv": (rng.standard_normal((r, 3, 2, 2)), rng.standard_normal((5, r, 1, 1)))} for r in (2, 3)
    ]
    a, b = (write_peft(tmp_path / n, f) for n, f in zip("ab", factors, strict=True))
    combine({a: 1, b: 2}, tmp_path / "out")
    pair = open_adapter(tmp_path / "out").pairs["conv"]
    shapes = open_adapter(tmp_path / "out").tensors.shapes
    assert (shapes[pair.A], shapes[pair.B]) == ((5, 3, 2, 2), (5, 5, 1, 1))
    expected, off = summed({a: 1, b: 2}, U64)["conv"]
    assert np.linalg.norm(changes(tmp_path / "out")["conv"] - expected) <= off


# ---- what is refused: nothing is written


def listed(folder):
    return {p: p.is_file() and p.read_bytes() for p in sorted(folder.rglob("*"))}


DENSE = ("magnitude", "ties", "dare", "dare_ties")
REFUSED = {
    "none": ({}, {}, InputError, "there are no adapters; expected at least one"),
    "a name alone": (["ab"], {}, InputError, "an adapter is given as 'ab'; expected a pair, such as"),
    "no names": ([(1, 2)], {}, InputError, r"an adapter is given as \(1, 2\); expected a pair, such as"),
    "one name": ("a", {}, InputError, "the adapters are 'a'; expected their weights, such as {'A': 0.7}"),
    "one path": (Path("a"), {}, InputError, r"the adapters are .*Path\('a'\); expected their weights"),
    "all of weight 0": ({"a": 0, "b": 0.0}, {}, InputError, "the weights are all 0; expected at least one"),
    "nan": ({"a": math.nan}, {}, InputError, "a weight is nan; expected a finite number"),
    "inf": ({"a": 1, "b": -math.inf}, {}, InputError, "a weight is -inf; expected a finite number"),
    "twice": ([("a", 1), ("b", 1), ("./a", 1)], {}, InputError, "is given twice; expected each adapter once"),
    "unknown": ({"a": 1, "c": 1}, {}, StorageError, "c: is missing; expected a folder with"),
    "method": ({"a": 1}, {"method": "tie"}, InputError, "method is 'tie'; nearest: 'ties'"),
    "no method": ({"a": 1}, {"method": None}, InputError, "method is None; nearest:"),
    "methods": ({"a": 1}, {"method": ["ties"]}, InputError, r"method is \['ties'\]; nearest: 'ties'"),
    "no rank": ({"a": 1}, {"method": "svd"}, InputError, "rank is missing; method 'svd' needs one"),
    "rank of cat": ({"a": 1}, {"method": "cat", "rank": 2}, InputError, "rank is 2; expected none"),
    "rank of peft": ({"a": 1}, {"method": "peft_linear", "rank": 2}, InputError, "expected none, as method"),
    "rank 0": ({"a": 1}, {"rank": 0}, InputError, "rank is 0; expected an int of at least 1"),
    "rank -1": ({"a": 1}, {"method": "svd", "rank": -1}, InputError, "rank is -1; expected an int of at"),
    "rank above Σ r": ({"a": 1, "b": 1}, {"rank": 5}, InputError, "rank is 5; expected an int from 1 to 4"),
    "rank above shape": ({"a": 1}, {"method": "ties", "density": 0.5, "rank": 6}, InputError, "from 1 to 5"),
    "density of cat": ({"a": 1}, {"density": 0.5}, InputError, "density is 0.5; expected none, as method"),
    "seed": ({"a": 1}, {"method": "dare", "density": 0.5, "seed": -1}, InputError, "seed is -1; expected"),
    "seed True": ({"a": 1}, {"method": "dare", "density": 0.5, "seed": True}, InputError, "seed is True"),
    "half a seed": ({"a": 1}, {"method": "dare", "density": 0.5, "seed": 0.5}, InputError, "seed is 0.5"),
    "nothing kept": ({"a": 1}, {"method": "ties", "density": 1e-9}, InputError, "m0: density is 1e-09"),
    "too large": ({"a": 1e300}, {}, NonFiniteError, "model.layers.0.mlp.m0: the sum is not finite"),
} | {
    f"density {density} of {method}": (
        {"a": 1}, {"method": method, "density": density}, InputError,
        "density is missing; method" if density is None else r"density is .*; expected the share of entries",
    )
    for method in DENSE for density in (None, 0, -1, 1.5, math.nan)
}  # fmt: skip


@pytest.mark.parametrize(("adapters", "how", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_bad_input_is_refused_before_anything_is_written(
    adapters, how, error, message, tmp_path, monkeypatch
):
    two(tmp_path)
    monkeypatch.chdir(tmp_path)
    before = listed(tmp_path)
    with pytest.raises(error, match=message):
        combine(adapters, "out", **how)
    assert listed(tmp_path) == before


def beside(name, value):
    """A folder's further tensor and the config that asks for it."""
    return {"more": {f"{PREFIX}{name}": np.ones(value, np.float32)}}


UNSUPPORTED = {
    "DoRA": (
        {"use_dora": True, "more": {
            f"{PREFIX}{m}.lora_magnitude_vector": np.ones(s[0], np.float32) for m, s in SHAPES.items()
        }},
        "lora_magnitude_vector acts beside the ΔW of model.layers.0.mlp.m0",
    ),
    "bias": (
        {"bias": "lora_only", **beside("model.layers.0.mlp.m0.base_layer.bias", 7)},
        "base_layer.bias acts beside the ΔW of model.layers.0.mlp.m0; only s B A can be summed",
    ),
    "saved": (
        {"modules_to_save": ["norm"], **beside("model.norm.weight", 4)},
        "model.norm.weight replaces model.norm.weight; only s B A can be summed",
    ),
    "lora_bias": ({"lora_bias": True}, "lora_bias is True, which is not supported"),
}  # fmt: skip


@pytest.mark.parametrize(("config", "message"), UNSUPPORTED.values(), ids=UNSUPPORTED)
def test_what_acts_beside_the_factors_is_refused_by_name(config, message, tmp_path):
    rng = np.random.default_rng(0)
    a = write_peft(tmp_path / "a", draw(rng, dict.fromkeys(SHAPES, 2)))
    b = write_peft(tmp_path / "b", draw(rng, dict.fromkeys(SHAPES, 2)), **config)
    for weight in (1, 0):  # an adapter of weight 0 is checked, too
        with pytest.raises(UnsupportedError, match=message):
            combine({a: 1, b: weight}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_one_adapter_by_two_names_is_given_twice(tmp_path):
    a, _ = two(tmp_path)
    (tmp_path / "here").symlink_to(tmp_path)
    with pytest.raises(InputError, match=r"here.a: is given twice"):
        combine({a: 1, tmp_path / "here" / "a": 1}, tmp_path / "out")


def test_adapters_that_do_not_fit_are_refused(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    m = "model.layers.0.mlp.m0"
    a = write_peft(tmp_path / "a", draw(rng, {m: 2}))
    wide = write_peft(tmp_path / "wide", {m: (rng.standard_normal((2, 5)), rng.standard_normal((7, 2)))})
    turned = write_peft(tmp_path / "turned", draw(rng, {m: 2}), fan_in_fan_out=True)
    window = rng.standard_normal((2, 1, 2, 2)), rng.standard_normal((7, 2, 1, 1))
    conv = write_peft(tmp_path / "conv", {m: window})
    odd = write_peft(tmp_path / "odd", draw(rng, {m: 2}), r=3)
    three = write_peft(tmp_path / "three", draw(rng, {m: 3}))
    for other, message in (
        (wide, f"wide: {m} has a ΔW of a linear map, 7 x 5; expected a linear map, 7 x 4, as .*a has"),
        (conv, f"conv: {m} has a ΔW of a convolution, 7 x 4; expected a linear map, 7 x 4"),
        (turned, "turned: fan_in_fan_out is True; expected the same as in .*a"),
        (odd, "odd.*expected .* with the config's r = 3"),
    ):
        with pytest.raises(MismatchError, match=message):
            combine({a: 1, other: 1}, tmp_path / "out")
    with pytest.raises(InputError, match=rf"{m}: the ranks are \[2, 3\]; peft_linear adds factors"):
        combine({a: 1, three: 1}, tmp_path / "out", method="peft_linear")
    with monkeypatch.context() as patch:
        patch.setattr(module, "results", None)  # the error comes before anything is computed
        with pytest.raises(StorageError, match="is there already"):
            combine({a: 1}, three)
    with pytest.raises(InputError, match="is the input, lies in it or contains it"):
        combine({a: 1}, a, overwrite=True)
    assert not (tmp_path / "out").exists()


FILES = Path(__file__).parents[1] / "fixtures/lora_files"


def test_kohyas_arithmetic_is_that_of_its_script(tmp_path):
    """merge_lora.py's own output: equal but for its float32, and far from the sum."""
    told = json.loads((FILES / "kohya_sdscripts_merged/merge_plain/args.json").read_text())
    adapters = [(FILES / model, w) for model, w in zip(told["models"], told["ratios"], strict=True)]
    made = combine(adapters, tmp_path / "out", method="kohya_linear")
    ours, theirs = open_adapter(tmp_path / "out"), open_adapter(FILES / "kohya_sdscripts_merged/merge_plain")
    inputs = [open_adapter(path) for path, _ in adapters]
    assert ours.pairs.keys() == theirs.pairs.keys()
    for m, pair in theirs.pairs.items():
        (A, B), (A2, B2) = (x.factors(m) for x in (ours, theirs))
        largest = [  # of the factors, each a sum of two products in float32
            sum(abs(w) * math.sqrt(x.pairs[m].scale) * abs(x.factors(m)[i]).astype(float)
                for x, (_, w) in zip(inputs, adapters, strict=True)) for i in (0, 1)
        ]  # fmt: skip
        bound = (pair.r + 12) * U32 * (largest[1] @ largest[0])
        off = ours.pairs[m].scale * B.astype(float) @ A - pair.scale * B2.astype(float) @ A2
        assert (abs(off) <= bound).all(), m
    assert made.relative > 0.3


def test_kohyas_concat_counts_each_file_by_its_squared_weight_and_share_of_the_rank(tmp_path):
    """Not the sum, which `cat` is; with weights w |w| r / Σ r `cat` is what merge_lora.py --concat wrote."""
    told = json.loads((FILES / "kohya_sdscripts_merged/merge_concat/args.json").read_text())
    inputs, weights = [open_adapter(FILES / model) for model in told["models"]], told["ratios"]
    theirs = open_adapter(FILES / "kohya_sdscripts_merged/merge_concat")
    shares = {one.pairs[m].r / theirs.pairs[m].r for one in inputs for m in theirs.pairs}
    assert shares == {0.5}
    folders = {FILES / model: w * abs(w) / 2 for model, w in zip(told["models"], weights, strict=True)}
    combine(folders, tmp_path / "out", method="cat")
    combine(dict(zip(folders, weights, strict=True)), tmp_path / "sum", method="cat")
    found, plain = (changes(tmp_path / name) for name in ("out", "sum"))
    for m, pair in theirs.pairs.items():
        A, B = (x.astype(float) for x in theirs.factors(m))
        size = sum(abs(w) * one.pairs[m].scale * (abs(B1).astype(float) @ abs(A1))
                   for one, w in zip(inputs, folders.values(), strict=True)
                   for A1, B1 in [one.factors(m)])  # fmt: skip
        assert (abs(found[m] - pair.scale * (B @ A)) <= 12 * U32 * size).all(), m
        assert np.linalg.norm(plain[m] - pair.scale * (B @ A)) > 0.5 * np.linalg.norm(plain[m]), m


# ---- in a model, and through files


def with_two(seed=0, config=None, second=None, **how):
    """A model with two random adapters, "a" and "b"."""
    model, rng = tiny(seed, np.float32, **how)
    inject(model, config or LoraConfig(r=3, alpha=7, targets=LINEARS, init="both"), rng=rng, name="a")
    second = second or LoraConfig(r=2, alpha=5, rslora=True, targets=LINEARS, init="both")
    inject(model, second, rng=rng, name="b")
    return model, rng


def saved(model, tmp_path, names="ab"):
    """The folders of a model's adapters."""
    for name in names:
        set_adapter(model, name)
        save_adapter(model, tmp_path / name)
    return [tmp_path / name for name in names]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("tie", [False, True])
def test_a_model_and_its_folders_are_combined_to_the_same_bits(method, tie, tmp_path):
    same = LoraConfig(r=3, alpha=5, rslora=True, targets=EVERYTHING if not tie else LINEARS, init="both")
    first = LoraConfig(r=3, alpha=7, targets=same.targets, init="both")
    model, rng = with_two(0, first, same, tie_word_embeddings=tie)
    how = {"rank": 4} if method == "svd" else {"density": 0.5, "seed": 3} if NEEDS[method] else {}
    a, b = saved(model, tmp_path)
    base = {k: p.data.copy() for k, p in named_params(model).items()}
    rows = add_weighted_adapter(model, {"a": 0.7, "b": -0.4}, "mix", method=method, **how).rows
    now = named_params(model)
    assert same_bits({k: to_host(v) for k, v in base.items()}, {k: to_host(now[k].data) for k in base})
    assert all(layer.active == "mix" for layer in adapted(model).values())
    set_adapter(model, "mix")
    save_adapter(model, tmp_path / "mine")
    assert combine({a: 0.7, b: -0.4}, tmp_path / "out", method=method, **how).rows == rows
    assert (tmp_path / "mine" / WEIGHTS).read_bytes() == (tmp_path / "out" / WEIGHTS).read_bytes()
    other, _ = tiny(0, np.float32, tie_word_embeddings=tie)
    load_adapter(other, tmp_path / "out")  # strictly, by the base's fingerprint
    ids = to_device(batch(rng)[0])
    assert (to_host(other(ids)[0]) == to_host(model(ids)[0])).all()


@pytest.mark.parametrize("option", ["method", "rank", "density", "seed"])
def test_an_option_has_the_same_default_in_a_model_and_over_folders(option):
    one, other = (signature(f).parameters[option].default for f in (add_weighted_adapter, combine))
    assert one == other


def test_the_sum_acts_as_the_sum_on_every_layer(tmp_path):
    """Different targets: where only one adapts a layer, its part alone acts."""
    first = LoraConfig(r=3, alpha=7, targets=["q_proj", "down_proj"], init="both")
    second = LoraConfig(r=2, alpha=5, rslora=True, targets=["q_proj", "v_proj"], init="both")
    model, _ = with_two(0, first, second)
    updates = updates_in(model, {"a": 0.5, "b": -2})
    assert len(updates) == 6  # of two layers
    made = add_weighted_adapter(model, {"a": 0.5, "b": -2}, "sum")
    assert {row.module for row in made.rows} == updates.keys() == active(model).keys()
    for path, ((_, new),) in updates_in(model, {"sum": 1.0}).items():
        off = exact_sum([*updates[path], (-1.0, new)]).astype(float)
        assert np.linalg.norm(off) <= slack(updates[path])


def updates_in(model, adapters):
    """Path -> [(w, factors)] of weighted adapters of a model; the last one stays active."""
    found = {}
    for name, w in adapters.items():
        set_adapter(model, name)
        for path, adapter in active(model).items():
            pair = adapter.low_rank
            found.setdefault(path, []).append((w, Factors(pair.B.data, pair.A.data, pair.scale)))
    return found


def test_an_adapter_of_weight_0_adds_no_layer():
    second = LoraConfig(r=2, alpha=5, targets=["v_proj"], init="both")
    model, _ = with_two(0, LoraConfig(r=3, alpha=7, targets=["q_proj"], init="both"), second)
    made = add_weighted_adapter(model, {"b": 0.0, "a": 1}, "alone")
    assert {row.module.rpartition(".")[2] for row in made.rows} == {"q_proj"}
    assert {row.ranks for row in made.rows} == {(3,)}
    assert made.weights == (("b", 0.0), ("a", 1.0))


def test_an_embedding_is_summed_as_an_embedding(tmp_path):
    config = LoraConfig(r=3, alpha=7, targets=["embed_tokens", "q_proj"], init="both")
    model, _ = with_two(0, config, config, tie_word_embeddings=True)
    updates = updates_in(model, {"a": 2, "b": -1})["model.embed_tokens"]
    expected, off = exact_sum(updates).astype(float), slack(updates)
    a, b = saved(model, tmp_path)
    add_weighted_adapter(model, {"a": 2, "b": -1}, "sum")
    assert to_host(active(model)["model.embed_tokens"].delta()).shape == expected.T.shape == (11, 10)
    new = updates_in(model, {"sum": -1.0})["model.embed_tokens"]
    assert np.linalg.norm(exact_sum([*updates, *new]).astype(float)) <= off
    combine({a: 2, b: -1}, tmp_path / "out")  # with the head, which PEFT takes for a layer of its own
    assert np.linalg.norm(changes(tmp_path / "out")["model.embed_tokens"] - expected) <= off
    assert np.linalg.norm(changes(tmp_path / "out")["lm_head"] - expected.T) <= off


def test_a_linear_map_and_an_embedding_of_one_name_do_not_fit(tmp_path):
    rng = np.random.default_rng(0)
    A, B = rng.standard_normal((2, 6)).astype(np.float32), rng.standard_normal((6, 2)).astype(np.float32)
    a = write_peft(tmp_path / "a", {"m.embed": (A, B)})
    b = write_peft(tmp_path / "b", {"m.embed": (A, B)})
    tensors = {f"{PREFIX}m.embed.lora_embedding_A": A, f"{PREFIX}m.embed.lora_embedding_B": B}
    from safetensors.numpy import save_file

    save_file(tensors, b / WEIGHTS, {"format": "pt"})
    message = r"b: m.embed has a ΔW of an embedding, 6 x 6; expected a linear map"
    with pytest.raises(MismatchError, match=message):
        combine({a: 1, b: 1}, tmp_path / "out")


def test_adapters_of_two_bases_are_refused(tmp_path):
    for seed, name in enumerate(("one", "two")):
        model, _ = with_two(seed)
        saved(model, tmp_path / name, "a")
    shutil.copytree(tmp_path / "one" / "a", tmp_path / "again")
    with pytest.raises(MismatchError, match=r"was trained on another base than .*one.a: fingerprints differ"):
        combine({tmp_path / "one" / "a": 1, tmp_path / "two" / "a": 1}, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    combine({tmp_path / "one" / "a": 1, tmp_path / "again": 1}, tmp_path / "out")
    assert open_adapter(tmp_path / "out").made["base"] == open_adapter(tmp_path / "again").made["base"]


def test_a_sum_has_the_fingerprint_that_all_its_adapters_have(tmp_path):
    """The base of an adapter without one is unknown; an adapter of weight 0 does not count."""
    model, _ = with_two(0)
    a, b = saved(model, tmp_path)
    c = shutil.copytree(b, tmp_path / "c")
    tensors = {name: open_adapter(b).tensors[name] for name in open_adapter(b).tensors}
    from safetensors.numpy import save_file

    save_file(tensors, c / WEIGHTS, {"format": "pt"})
    known = open_adapter(a).made["base"]
    note = f"{a}: the fingerprint of its base left out, as not all adapters have one"
    for i, (adapters, base, notes) in enumerate((
        ({a: 1, b: 1}, known, []), ({a: 1, c: 1}, None, [note]), ({c: 1, a: 1}, None, [note]),
        ({c: 1}, None, []), ({a: 1, c: 0}, known, []), ({c: 0, a: 1}, known, []),
    )):  # fmt: skip
        made = combine(adapters, tmp_path / str(i))
        assert open_adapter(tmp_path / str(i)).made.get("base") == base
        assert [said for said in made.notes if "fingerprint" in said] == notes


@pytest.mark.parametrize(("bases", "common"), [
    (("f q", "f"), "f"), (("f", "f q"), "f"), (("f q", "f q"), "f q"), (("f q", "f r"), "f"),
    (("f q", "q"), "q"), (("f q", "g"), None), (("f", "q"), None), (("f q", "q r", "r f"), None),
])  # fmt: skip
def test_a_sum_fits_the_bases_that_all_its_adapters_fit(bases, common, tmp_path):
    """An adapter that was trained beside 4 bits fits two bases: the float one, and the 4-bit one, decoded."""
    model, _ = with_two(0)
    adapters = {}
    for i, base in enumerate(bases):
        folder = saved(model, tmp_path / str(i))[0]
        tensors = {**open_adapter(folder).tensors}
        write_adapter(folder, json.loads((folder / CONFIG).read_text()), tensors, base, overwrite=True)
        adapters[folder] = 1
    if common is None:
        with pytest.raises(MismatchError, match=r"was trained on another base than .*: fingerprints differ"):
            combine(adapters, tmp_path / "out")
        assert not (tmp_path / "out").exists()
    else:
        combine(adapters, tmp_path / "out")
        assert open_adapter(tmp_path / "out").made["base"] == common


IN_A_MODEL = {
    "none": ({}, {}, InputError, "there are no adapters; expected at least one"),
    "unknown": ({"a": 1, "c": 1}, {}, InputError, "there is no adapter 'c'; nearest: 'a', 'b'"),
    "nan": ({"a": math.nan}, {}, InputError, "a weight is nan; expected a finite number"),
    "name in use": ({"a": 1}, {"name": "b"}, InputError, "adapter 'b' is there already; expected a new name"),
    "ranks": ({"a": 1, "b": 1}, {"method": "peft_linear"}, InputError, r"q_proj: the ranks are \[3, 2\]"),
    "rank": ({"a": 1}, {"method": "svd", "rank": 4}, InputError, "rank is 4; expected an int from 1 to 3"),
    "density": ({"a": 1}, {"method": "ties", "density": 2}, InputError, "density is 2; expected the share"),
    "method": ({"a": 1}, {"method": "average"}, InputError, "method is 'average'; nearest: "),
}


@pytest.mark.parametrize(("adapters", "how", "error", "message"), IN_A_MODEL.values(), ids=IN_A_MODEL)
def test_bad_input_leaves_the_model_as_it_was(adapters, how, error, message):
    model, _ = with_two(0, None, LoraConfig(r=2, alpha=5, targets=["q_proj"], init="both"))
    before = {k: p.data for k, p in named_params(model).items()}
    states = [(layer.active, list(layer.adapters)) for layer in adapted(model).values()]
    with pytest.raises(error, match=message):
        add_weighted_adapter(model, adapters, **{"name": "new"} | how)
    after = {k: p.data for k, p in named_params(model).items()}
    assert before.keys() == after.keys()
    assert all(before[k] is after[k] for k in before)
    assert states == [(layer.active, list(layer.adapters)) for layer in adapted(model).values()]


def test_a_merged_model_and_other_kinds_are_refused():
    model, _ = with_two()
    merge(model)
    with pytest.raises(StateError, match="the model is merged; unmerge it first"):
        add_weighted_adapter(model, {"a": 1}, "new")
    model, rng = with_two(0, LoraConfig(r=2, targets=LINEARS, dora=True))
    with pytest.raises(UnsupportedError, match=r"a is DoRA at .*; only LoRA's s B A can be summed"):
        add_weighted_adapter(model, {"a": 1, "b": 1}, "new")
    for config in (LoraConfig(r=2, modules_to_save=["norm"]), LoraConfig(r=2, bias="lora_only")):
        model, rng = tiny(0, np.float32, attention_bias=True)
        inject(model, config, rng=rng, name="a")
        with pytest.raises(UnsupportedError, match=r"a is (FullCopy|WithBias) at"):
            add_weighted_adapter(model, {"a": 1}, "new")
    assert isinstance(tiny()[0].model.layers[0].mlp.up_proj, Linear)
    with pytest.raises(StateError, match="the model has no adapter"):
        add_weighted_adapter(tiny()[0], {"a": 1}, "new")


def test_the_command_writes_what_the_function_does(tmp_path, capsys, monkeypatch):
    from minilora import cli

    two(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["combine", "a:0.7", "b:-0.3", "out", "--method", "svd", "--rank", "3", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    made = combine({"a": 0.7, "b": -0.3}, "mine", method="svd", rank=3)
    assert said["weights"] == [["a", 0.7], ["b", -0.3]]
    assert said["relative"] == made.relative
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (tmp_path / "mine" / WEIGHTS).read_bytes()
    for i, typed in enumerate((
        ["a:0.7", "b:-0.3", "--method", "svd", "--rank", "3", "OUT"],  # options anywhere
        ["--method", "svd", "a:0.7", "b:-0.3", "OUT", "--rank", "3"],
        ["--method", "svd", "a:0.7", "--rank", "3", "b:-0.3", "OUT"],
    )):  # fmt: skip
        assert cli.main(["combine", *(f"out{i}" if word == "OUT" else word for word in typed)]) == 0
        assert (tmp_path / f"out{i}" / WEIGHTS).read_bytes() == (tmp_path / "mine" / WEIGHTS).read_bytes()
    capsys.readouterr()
    before = listed(tmp_path)
    for typed in (["a:0.7", "b:0.3"], ["a:0.7", "--method", "cat", "b:0.3"]):  # no OUT
        with pytest.raises(SystemExit) as e:
            cli.main(["combine", *typed])
        assert e.value.code == 2
        said = capsys.readouterr().err
        assert "argument OUT: 'b:0.3' is an adapter and its weight; expected a new folder after it" in said
    assert listed(tmp_path) == before
    assert cli.main(["combine", "a:nan", "other"]) == 2
    assert capsys.readouterr().err == "minilora: a weight is nan; expected a finite number\n"

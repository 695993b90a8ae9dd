"""A pattern matches what it matches in `re` and in PEFT, in a bounded time."""

import dataclasses
import itertools
import json
import re
import shutil
import time
import warnings

import numpy as np
import pytest
from by_hand import of_pattern, write_peft
from helpers import tiny, within
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from peft_cases import FIXTURES

from minilora.compose.truncate import compress
from minilora.errors import ConfigError, FormatError, MismatchError, UnsupportedError
from minilora.formats.huggingface import load
from minilora.lora import adapted, inject
from minilora.methods.lora_config import LoraConfig
from minilora.peft import patterns
from minilora.peft.config import LARGEST, MOST, Settings, chosen, meant, peft_config, read_settings
from minilora.peft.folder import CONFIG, open_adapter
from minilora.peft.loading import load_adapter

# ---- the syntax, as `re` has it

ATOMS = st.sampled_from([
    *"aAbZ1_-", ".", r"\.", r"\-", r"\_", r"\d", r"\D", r"\w", r"\W", r"\s", r"\S", r"\n", "{", "}", "]",
    "{a", "{}", "[ab]", "[^a]", "[a-z1]", r"[^\d_]", "[]a]", "[^]b]", "[.]", r"[\w.]", "[-a]", r"[\]\-]",
    r"[\n-1]", "[+*?|(){}$]",
])  # fmt: skip
PLACES = st.sampled_from(["", "^", "$", r"\b", r"\B", r"\A", r"\Z"])
REPEATS = st.sampled_from(
    ["*", "+", "?", "*?", "+?", "??", "{2}", "{0}", "{1,2}", "{,2}", "{1,}", "{2,}?", "{,}", "{1,3}?"]
)
GROUPS = st.sampled_from(["(", "(?:", "(?P<name>", "(?=", "(?!", "(?i:", "(?s:", "(?is:"])


def grown(inner):
    return (
        st.lists(inner, max_size=3).map("".join)
        | st.lists(inner, min_size=2, max_size=3).map(lambda parts: f"(?:{'|'.join(parts)})")
        | st.lists(inner, min_size=2, max_size=3).map("|".join)
        | st.builds(lambda kind, part: f"{kind}{part})", GROUPS, inner)
        | st.builds(lambda part, often: f"(?:{part}){often}", inner, REPEATS)
        | st.builds(lambda atom, often: atom + often, ATOMS, REPEATS)
        | st.builds(lambda kind, part: f"(?{kind}{part})", st.sampled_from(["<=", "<!"]), ATOMS | PLACES)
    )


expressions = st.recursive(ATOMS | PLACES, grown, max_leaves=12)
words = st.text("aAbZ1_-.", min_size=1, max_size=7)
lines = st.text("aAbZ1_-.\n{", min_size=1, max_size=7)
SHORT = ["".join(letters) for n in (1, 2, 3) for letters in itertools.product("ab.1", repeat=n)]


def valid(pattern):
    """Whether `re` takes it, and in the same sense in later Pythons."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            return bool(re.compile(pattern))
        except (re.error, Warning):
            return False


@settings(max_examples=250)
@given(pattern=expressions, names=st.lists(lines, max_size=5))
@example(r"a$[^b]", ["a\n", "a"])
@example(r"(?:^|a)*?b|", ["aab", "b"])
@example(r"(?:a|b{2})+(?=\b)(?!\n).*", ["abba-b", "abab"])
@example(r"(?:\B|a){2}$", ["aa", "a", "-", "aaa"])
def test_patterns_match_the_same_names_as_re(pattern, names):
    assume(valid(pattern))
    names = [*names, *SHORT, "a\n", "\n", "a-b_Z{A1"]
    assert patterns.whole(pattern, names, "f") == [name for name in names if re.fullmatch(pattern, name)]


plain_keys = st.text("aA1.-_", min_size=1, max_size=5).flatmap(
    lambda name: st.sampled_from([name, re.escape(name), f"^{name}", f"^{re.escape(name)}", f"{name}$"])
)


@settings(max_examples=200)
@given(keys=st.lists(plain_keys | expressions, max_size=6, unique=True), names=st.lists(words, max_size=6))
@example(["a.b", r"a\.b", "^a.b", r"^a\.b$"], ["a.b", "aXb", "c.a.b", "ca.b", "c.a1b"])
@example(["b", "a|b", "^b", "b$"], ["b", "a.b", "ab", "a"])
def test_pattern_keys_match_the_same_names_as_in_peft(keys, names):
    keys, names = [*filter(valid, keys)], [*names, *SHORT]
    want = [[i for i, key in enumerate(keys) if re.match(rf"(.*\.)?({key})$", name)] for name in names]
    assert patterns.fitting(keys, names, "f") == want


def test_patterns_accept_an_empty_list_of_names():
    assert patterns.whole(".*", [], "f") == patterns.fitting(["a", "a*"], [], "f") == []


# ---- patterns that are in use

WIDE = [
    *(f"model.{kind}layers.{i}.{part}" for kind in ("", "language_model.") for i in (0, 11) for part in (
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
        "mlp.down_proj", "input_layernorm")),
    *(f"model.visual.blocks.{i}.{part}" for i in (0, 3) for part in
      ("attn.qkv", "attn.q_proj", "mlp.down_proj")),
    "model.vision_tower.encoder.layers.2.self_attn.q_proj", "model.language_modelx.q_proj",
    "model.language_model", "custom_text_proj", "lm_head",
]  # fmt: skip
PROJ = "q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj"
PARTS = "self_attn|attention|attn|mlp|feed_forward|ffn|dense"
IN_USE = {
    "unsloth": rf"(?:.*?(?:vision|image|visual|patch|language|text).*?(?:{PARTS}).*?(?:{PROJ}).*?)|"
    rf"(?:\bmodel\.layers\.[\d]{{1,}}\.(?:{PARTS})\.(?:(?:{PROJ})))",
    "unsloth, language only": rf"(?:.*?(?:language|text).*?(?:{PARTS}).*?(?:{PROJ}).*?)|"
    rf"(?:\bmodel\.layers\.[\d]{{1,}}\.(?:{PARTS})\.(?:(?:{PROJ})))",
    "ms-swift": r"^(model\.language_model(?=\.).*\.(q_proj|v_proj))$",
    "ms-swift, all": r"^(language_model|model\.language_model(?=\.)(?!.*(lm_head|output|emb|wte|shared)).*)$",
    "ColPali": rf"(.*(language_model).*({PROJ}).*$|.*(custom_text_proj).*$)",
    "ColPali, old": rf"(.*(model).*({PROJ}).*$|.*(custom_text_proj).*$)",
    "not the vision": r"^(?!.*(?:visual|vision)).*(?:q_proj|k_proj)$",
    "some layers": r"model\.layers\.(?:[0-9]|1[0-9])\.self_attn\.[qv]_proj",
    "behind": r".*(?<=self_attn\.)q_proj",
}  # fmt: skip


@pytest.mark.parametrize("kind", IN_USE)
def test_patterns_in_use_match_the_same_modules_as_re(kind):
    pattern = IN_USE[kind]
    want = [name for name in WIDE if re.fullmatch(pattern, name)]
    assert 0 < len(want) < len(WIDE)
    assert meant(Settings(r=3, lora_alpha=7, target_modules=pattern), WIDE, []) == want
    left = Settings(r=3, lora_alpha=7, target_modules=".*", exclude_modules=pattern)
    assert meant(left, WIDE, []) == [name for name in WIDE if name not in want]


@pytest.mark.parametrize("pattern", [
    r"(a)\1", "(?>a)", "a*+", "a++", "a?+", "a{2}+", "(a)?(?(1)b|c)", "(?P<x>a)(?P=x)", "(?i)a", "(?#a)",
    "(?-i:a)", r"\x61", r"\u0061", r"\07", "é", "a\n", "(" * 51 + ")" * 51, "a?" * 5001,
])  # fmt: skip
def test_an_unsupported_pattern_is_refused_as_such(pattern):
    with pytest.raises(UnsupportedError, match=r"^f: target_modules is .* not supported$"):
        patterns.whole(pattern, ["a"], "f: target_modules")


@pytest.mark.parametrize(
    "pattern", ["(", ")", "[a", "*", "a**", "a{3,2}", "(?P<1>a)", "(?<=a*)b", "[[a]", "\\"]
)
def test_an_invalid_pattern_is_refused_as_such(pattern):
    with pytest.raises(ConfigError, match=r"^f: target_modules is .*: not a regular expression: "):
        patterns.whole(pattern, ["a"], "f: target_modules")


# ---- the time

EXPERTS = [
    f"model.layers.{i}.mlp.experts.{e}.{kind}_proj"
    for i in range(20) for e in range(128) for kind in ("gate", "up", "down")
]  # fmt: skip
LONG = "a" * 490
SLOW = [
    ".*.*.*a?a?z", "(a+)+b", "(a|a)*b", "(a|aa)+$b", "(.*)*x", "((a*)*)*b", "a?" * 490 + "a" * 490 + "b",
    "((a{1,60}){1,60}){1,60}b", "(.*(.*(.*(.*.*)*.*)*)*)*x", "(?:(?=(?:" + ".|" * 4000 + "x)*a).)*b",
    ".*?" * 3000 + "x", "(?!(a|b|ab)*c)(a|b|ab)*c", "(?i:" + "[ -~]" * 1900 + ")b",
    "(?:" + "|" * 9000 + "a)*b", "".join(f"[{chr(i)}{chr(j)}]?" for i in range(48, 58) for j in range(33, 90)
                                         if chr(j) not in "[]-^") + "b", "(a{1,9999}){9999}b",
]  # fmt: skip


@pytest.mark.parametrize(("pattern", "names"), [
    *(pytest.param(pattern, [LONG], id=f"{i}, one long name") for i, pattern in enumerate(SLOW)),
    *(pytest.param(pattern, EXPERTS, id=f"{i}, 7,680 names", marks=pytest.mark.slow if i % 3 else ())
      for i, pattern in enumerate(SLOW)),
])  # fmt: skip
def test_no_pattern_takes_long(pattern, names):
    with within(2):
        for meaning in (patterns.whole, lambda key, names, where: patterns.fitting([key], names, where)):
            try:
                assert not any(meaning(pattern, names, "f"))
            except UnsupportedError as e:
                assert re.search("more than [0-9]+ steps$", str(e))  # noqa: PT017


@given(pattern=expressions, often=st.sampled_from(["", "*", "{2,9}"]), size=st.integers(1, 40))
def test_every_pattern_step_is_counted(pattern, often, size):
    """The count is what bounds the time: no pattern goes beyond it, and it goes down by every step."""
    assume(valid(f"(?:{pattern}){often}"))
    text = patterns.Names(["a" * size, "b.1"], "f")
    step, before = patterns.parse(f"(?:{pattern}){often}", "f"), text.left
    step(text, text.first, False)
    assert text.left < before
    text.left = 0
    with pytest.raises(UnsupportedError):
        step(text, text.first, False)


def test_patterns_of_7680_names_are_matched_quickly():
    started = time.process_time()
    for keys in (["^" + re.escape(name) for name in EXPERTS], EXPERTS):
        assert patterns.fitting(keys[::-1], EXPERTS, "f") == [[i] for i in reversed(range(len(EXPERTS)))]
    assert time.process_time() - started < 4  # observed 0.4 s


# ---- which key counts

MODULES = [f"model.layers.{i}.{part}" for i in (0, 1, 10) for part in ("self_attn.q_proj", "mlp.up_proj")]
KEYS = ["q_proj", "self_attn.q_proj", "layers.1.self_attn.q_proj", "up_proj", "layers.1..*", ".*", "x_proj",
        r"^model\.layers\.1\.mlp\.up_proj", r"layers\.(0|10)\..*", "model.layers.10.mlp.up_proj"]  # fmt: skip


@settings(max_examples=60)
@given(
    ranks=st.lists(st.sampled_from(KEYS), unique=True), alphas=st.lists(st.sampled_from(KEYS), unique=True)
)
def test_on_loading_the_first_matching_key_sets_rank_and_scale(ranks, alphas, tmp_path_factory):
    rank_pattern = {key: 2 + i for i, key in enumerate(ranks)}
    alpha_pattern = {key: 0.5 + i for i, key in enumerate(alphas)}
    rank = {m: of_pattern(rank_pattern, m, 1) for m in MODULES}
    alpha = {m: of_pattern(alpha_pattern, m, 31.0) for m in MODULES}
    factors = {m: (np.ones((r, 15), "f4"), np.ones((13, r), "f4")) for m, r in rank.items()}
    folder = write_peft(tmp_path_factory.mktemp("there") / "a", factors)
    config = json.loads((folder / CONFIG).read_text())
    patterned = {"r": 1, "lora_alpha": 31.0, "rank_pattern": rank_pattern, "alpha_pattern": alpha_pattern}
    (folder / CONFIG).write_text(json.dumps(config | patterned))
    found = open_adapter(folder)
    assert {m: (p.r, p.alpha, p.scale) for m, p in found.pairs.items()} == {
        m: (rank[m], alpha[m], alpha[m] / rank[m]) for m in MODULES
    }
    for name, pattern in (("rank_pattern", rank_pattern), ("alpha_pattern", alpha_pattern)):
        fits = {key: [m for m in MODULES if of_pattern({key: True}, m, False)] for key in pattern}
        said = chosen(found.settings, name, MODULES)
        assert said.idle == tuple(key for key, fit in fits.items() if not fit)
        assert set(said.contested) == {m for m in MODULES if sum(m in fit for fit in fits.values()) > 1}
        assert any(f"{name} has keys that match no module" in note for note in found.notes) == bool(said.idle)
        assert any(f"keys of {name} disagree" in note for note in found.notes) == bool(said.contested)


def test_matching_keys_with_equal_values_do_not_conflict():
    said = chosen(Settings(r=3, lora_alpha=7, target_modules="x", rank_pattern={"q_proj": 5, ".*": 5}),
                  "rank_pattern", MODULES)  # fmt: skip
    assert (said.contested, said.idle, set(said.values.values())) == ((), (), {5})


NAMES = ["q_proj", "self_attn.q_proj", "layers.1.self_attn.q_proj", "model.layers.1.self_attn.q_proj",
         "up_proj", "layers.0.mlp.up_proj", "v_proj"]  # fmt: skip
orders = st.lists(st.sampled_from(NAMES), unique=True)


@settings(max_examples=30)
@given(ranks=orders, alphas=orders)
def test_on_injecting_the_first_matching_key_sets_rank_and_scale(ranks, alphas):
    """Its keys are names, for which PEFT's rule and the one here are the same."""
    rank_pattern = {key: 2 + i for i, key in enumerate(ranks)}
    alpha_pattern = {key: 0.5 + i for i, key in enumerate(alphas)}
    model, rng = tiny(0)
    config = LoraConfig(r=1, alpha=31, rank_pattern=rank_pattern, alpha_pattern=alpha_pattern)
    for row in inject(model, config, rng=rng).rows:
        r, alpha = of_pattern(rank_pattern, row.module, 1), of_pattern(alpha_pattern, row.module, 31)
        assert (row.r, row.scale) == (r, alpha / r)
    assert {m: layer.adapters["default"].A.data.shape[0] for m, layer in adapted(model).items()} == {
        m: of_pattern(rank_pattern, m, 1) for m in adapted(model)
    }


FOLDER = FIXTURES / "adapters" / "untied--q-and-v"


def changed(folder, start=b"", **fields):
    """A copy of an adapter whose config is another."""
    shutil.copytree(FOLDER, folder)
    config = json.loads((folder / CONFIG).read_text()) | fields
    (folder / CONFIG).write_bytes(start + json.dumps(config).encode())
    return folder


@pytest.mark.parametrize("name", ["rank_pattern", "alpha_pattern"])
def test_an_unused_key_is_noted_on_reading_and_refused_with_a_base(name, tmp_path):
    """One that means a module of the base without an adapter is told only."""
    model = load(FIXTURES / "bases" / "untied")
    idle = changed(tmp_path / "a", **{name: {"kproj": 5}})
    assert open_adapter(idle).notes == (f"{name} has keys that match no module of the file, as in 'kproj'",)
    with pytest.raises(MismatchError, match=f"{name} has 'kproj', which matches no module of the base; near"):
        load_adapter(model, idle)
    other = changed(tmp_path / "b", **{name: {"k_proj": 5}})
    assert load_adapter(model, other).notes[0].startswith(f"{name} has keys that match no module of the file")


@pytest.mark.parametrize("flag", ["use_rslora", "use_dora", "fan_in_fan_out", "lora_bias", "use_qalora"])
def test_null_means_false_for_a_flag(flag, tmp_path):
    read, notes = read_settings(changed(tmp_path / "a", **{flag: None}) / CONFIG)
    want, _ = read_settings(FOLDER / CONFIG)
    assert dataclasses.replace(read, where="") == dataclasses.replace(want, where="")
    assert notes == ()
    with pytest.raises(ConfigError, match=f"{flag} is 0; expected true or false"):
        read_settings(changed(tmp_path / "b", **{flag: 0}) / CONFIG)


def test_a_byte_order_mark_is_noted(tmp_path):
    read, (note,) = read_settings(changed(tmp_path / "a", b"\xef\xbb\xbf") / CONFIG)
    assert "byte order mark" in note
    assert read.r == 3
    with pytest.raises(FormatError):
        read_settings(changed(tmp_path / "b", 2 * b"\xef\xbb\xbf") / CONFIG)


# ---- sizes


def test_a_compressed_mixture_of_experts_can_be_read_again(tmp_path):
    """15,360 tensors, and a rank of its own for each of 7,680 modules, in a time that people wait."""
    rng = np.random.default_rng(0)
    factors = {m: tuple(rng.standard_normal((2, 2), np.float32)) for m in EXPERTS}
    factors = {m: (A[None], B[:, None]) for m, (A, B) in factors.items()}
    write_peft(tmp_path / "a", factors)  # all of them by their whole names in target_modules
    sizes = {m: (1 if i % 3 else 2 + i, 3.0 + i) for i, m in enumerate(EXPERTS)}
    config = peft_config(sizes, ["gate_proj", "up_proj", "down_proj"])
    text = json.dumps(config, indent=2, sort_keys=True)
    assert len(config["alpha_pattern"]) == len(EXPERTS) - 1
    assert len(text) < LARGEST
    (tmp_path / "c").write_text(text)
    started = time.process_time()
    read, notes = read_settings(tmp_path / "c")
    found = {name: chosen(read, name, EXPERTS).values for name in ("rank_pattern", "alpha_pattern")}
    assert time.process_time() - started < 5  # observed 0.5 s
    assert notes == ()
    for m, (r, alpha) in sizes.items():
        assert found["rank_pattern"].get(m, read.r) == r
        assert found["alpha_pattern"].get(m, read.lora_alpha) == alpha
    started = time.process_time()
    assert len(open_adapter(tmp_path / "a").pairs) == len(EXPERTS)
    assert time.process_time() - started < 10  # observed 1 s


def test_the_largest_supported_config_fits_the_size_limit():
    """Keys of 80 bytes for each of MOST modules in both patterns."""
    line = f'    "{"x" * (80 - 12)}": 12345,\n'
    assert 2 * MOST * len(line) <= LARGEST


def test_compress_can_read_its_own_output_with_900_long_names(tmp_path):
    rng = np.random.default_rng(1)
    names = [f"base.transformer.blocks.{i}.a_long_name_of_a_part.{i}.another_part.k_proj" for i in range(900)]
    factors = {}
    for i, m in enumerate(names):
        r = 1 + i % 3
        factors[m] = rng.standard_normal((r, 4)), rng.standard_normal((5, r))
    write_peft(tmp_path / "a", factors, lora_alpha=5)
    compress(tmp_path / "a", tmp_path / "b", rank=2, per_module=True)
    again = open_adapter(tmp_path / "b")
    assert len({p.r for p in again.pairs.values()}) > 1
    assert len(again.settings.rank_pattern) > 300
    assert list(again.pairs) == sorted(names)

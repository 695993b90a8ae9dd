"""Counts are exactly what `inject` trains and what papers state; bad input is one line."""

import contextlib
import json
import re
import shutil
import tracemalloc
from collections import Counter
from dataclasses import asdict

import numpy
import pytest
from helpers import within
from hypothesis import given
from hypothesis import strategies as st
from peft_cases import FIXTURES

from minilora.analysis.count import ATTENTION, LLAMAS, MLP, PAPER, PRINTED, QV, count, human, modules
from minilora.errors import MiniloraError, StorageError, UnsupportedError
from minilora.formats.huggingface import BASE, load
from minilora.lora import inject, owners
from minilora.methods.lora_config import LoraConfig
from minilora.model import Config, llama
from minilora.targets import with_head
from minilora.tree import size

KINDS = (*ATTENTION, *MLP, "embed_tokens", "lm_head")
NO_GATE = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")  # the targets of DoRA's Table 1
kinds = st.lists(st.sampled_from(KINDS), min_size=1, max_size=4, unique=True)
LLAMA_3 = "d=4096,layers=32,heads=32,kv=8,ff=14336,vocab=128256"


@st.composite
def configs(draw):
    """Small Llamas of every kind: grouped queries, tied heads, biases, heads of their own width."""
    G, E = draw(st.integers(1, 3)), draw(st.sampled_from([2, 4]))
    H = G * draw(st.integers(1, 3))
    own = draw(st.booleans())
    flags = {f: draw(st.booleans()) for f in ("tie_word_embeddings", "attention_bias", "mlp_bias")}
    D = draw(st.integers(1, 12)) if own else H * E
    V, F, L = draw(st.integers(1, 20)), draw(st.integers(1, 20)), draw(st.integers(1, 3))
    return Config(V, D, F, L, H, G, E if own else None, **flags)


def outcome(call):
    """What a call returns, or the class of its error."""
    try:
        return call()
    except MiniloraError as e:
        return type(e)


# ---- the law


@given(configs(), st.integers(1, 4), st.booleans(), st.just("all-linear") | kinds)
def test_counts_match_what_inject_trains(config, rank, dora, targets):
    """Row by row, and in the class of the error where it refuses; the total is that of the real model."""
    model = llama(config, numpy.random.default_rng(0))
    total = size(model)

    def real():
        how = LoraConfig(r=rank, targets=targets, dora=dora)
        rows = inject(model, how, rng=numpy.random.default_rng(0)).rows
        found = [(row.module.rpartition(".")[2], row.shape) for row in rows]
        parameters = Counter()
        for kind, row in zip(found, rows, strict=True):
            parameters[kind] += row.parameters
        return {(*kind, n): parameters[kind] for kind, n in Counter(found).items()}

    def counted():
        found = count(config, rank, targets, dora)
        assert found.total == total
        assert found.parameters == sum(row.parameters for row in found.rows)
        return {(row.kind, row.shape, row.number): row.parameters for row in found.rows}

    assert outcome(counted) == outcome(real)


@given(config=configs(), data=st.data())
def test_modules_of_a_config_match_the_built_model(config, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("c")
    (folder / "config.json").write_text(json.dumps(asdict(config)))
    kind = data.draw(st.sampled_from(KINDS))
    found = modules(folder, kind)
    model = llama(config, numpy.random.default_rng(0))
    layers = with_head(model, dict(owners(model)))
    assert [(row.module, row.layer, row.shape) for row in found.rows] == [
        (m, type(layer).__name__, layer.weight.data.shape) for m, layer in layers.items()
    ]
    report = inject(model, LoraConfig(r=1, targets=kind), rng=numpy.random.default_rng(0))
    assert [row.module for row in found.rows if row.adapted] == [row.module for row in report.rows]
    assert found.tied == config.tie_word_embeddings


# fmt: off
MODELS = {  # what matters of the config.json of public models, and the parameters in their files
    "Qwen/Qwen2.5-0.5B": ({
        "model_type": "qwen2", "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864,
        "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
        "sliding_window": 32768, "use_sliding_window": False, "tie_word_embeddings": True}, 494_032_768),
    "Qwen/Qwen2.5-7B": ({
        "model_type": "qwen2", "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944,
        "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
        "sliding_window": 131072, "use_sliding_window": False, "tie_word_embeddings": False}, 7_615_616_512),
    "Qwen/Qwen3-0.6B": ({
        "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072,
        "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
        "sliding_window": None, "tie_word_embeddings": True, "attention_bias": False}, 596_049_920),
    "Qwen/Qwen3-8B": ({
        "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288,
        "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8,
        "tie_word_embeddings": False, "attention_bias": False}, 8_190_735_360),
    "mistralai/Mistral-7B-v0.1": ({
        "model_type": "mistral", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "sliding_window": 4096, "tie_word_embeddings": False}, 7_241_732_096),
    "a Llama 2 with linear positions": ({
        "model_type": "llama", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
        "num_hidden_layers": 32, "num_attention_heads": 32, "tie_word_embeddings": False,
        "rope_scaling": {"type": "linear", "factor": 8.0}}, 6_738_415_616),
    "yarn": ({
        "model_type": "llama", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
        "num_hidden_layers": 32, "num_attention_heads": 32, "tie_word_embeddings": False, "rope_scaling": {
            "type": "yarn", "factor": 16.0, "original_max_position_embeddings": 4096, "finetuned": True},
        }, 6_738_415_616),
    "dynamic, in 4 bits": ({
        "model_type": "llama", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
        "num_hidden_layers": 32, "num_attention_heads": 32, "tie_word_embeddings": False,
        "quantization_config": {"bits": 4}, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0},
        }, 6_738_415_616),
}
# fmt: on


@pytest.mark.parametrize("name", MODELS)
def test_counting_ignores_what_only_the_forward_needs(name, tmp_path):
    """params and modules read it; load refuses it by name, as ever."""
    config, total = MODELS[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    counted, listed = count(tmp_path, 4, "all-linear"), modules(tmp_path, "all-linear")
    assert counted.total == total
    number = Counter((row.module.rpartition(".")[2], row.shape) for row in listed.rows if row.adapted)
    assert {(row.kind, row.shape): row.number for row in counted.rows} == number
    assert len(number) == 7
    norms = [row.module for row in listed.rows if row.layer == "RMSNorm" and "attn" in row.module]
    L = config["num_hidden_layers"]
    assert len(norms) == 2 * L * (config["model_type"] == "qwen3")
    assert all(row.shape == (128,) for row in listed.rows if row.module in norms)
    assert listed.tied == config["tie_word_embeddings"]
    with pytest.raises(UnsupportedError, match=r"config\.json: (model_type|sliding_w|rope_scaling|quant)"):
        load(tmp_path)


def test_an_unknown_architecture_is_refused_with_the_known_ones(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gemma2", "hidden_size": 8}')
    for call in (count, modules):
        with pytest.raises(UnsupportedError, match=r"'gemma2'; expected 'llama', 'mistral' \(to count"):
            call(tmp_path)


@pytest.mark.parametrize(
    "key", ["hidden_size", "num_hidden_layers", "intermediate_size", "vocab_size", "head_dim"]
)
@pytest.mark.parametrize("size", [10**6 + 1, 10**9, 10**15, 10**30])
def test_a_config_of_any_size_takes_neither_time_nor_memory(key, size, tmp_path):
    given = asdict(Config(11, 6, 5, 2, 3, 1, 4)) | {key: size}
    (tmp_path / "config.json").write_text(json.dumps(given))
    tracemalloc.start()
    try:
        for call in (count, modules, load):
            with within(2), contextlib.suppress(MiniloraError):
                call(tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()


@given(configs())
def test_training_takes_sixteen_bytes_per_trained_parameter(config):
    found = count(config, 1, "up_proj")
    full, lora, qlora = (found.memory[how] for how in ("full", "LoRA", "QLoRA"))
    assert sum(full) == 16 * found.total
    assert sum(lora) == 2 * found.total + 16 * found.parameters
    assert lora[1:] == qlora[1:] == (2 * found.parameters, 12 * found.parameters)
    assert qlora.weights < lora.weights
    assert (found.float32_bytes, found.half_bytes) == (4 * found.parameters, 2 * found.parameters)
    assert found.share * found.reduction == pytest.approx(1)


def test_counting_builds_no_model():
    tracemalloc.start()
    try:
        count("llama-2-70b", 16, "all-linear")
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


# ---- the papers, to the unit


@pytest.mark.parametrize(
    ("model", "rank", "targets", "exact"),
    [
        # Hu et al. 2021, Tables 2 to 4, 10, 11 and 15; DeBERTa at the rank of the released scripts
        ("roberta-base", 8, QV, 294_912),
        ("roberta-large", 8, QV, 786_432),
        ("deberta-xxl", 8, QV, 2_359_296),
        ("deberta-xxl", 16, QV, 4_718_592),
        ("gpt-2-medium", 4, QV, 393_216),
        ("gpt-2-large", 4, QV, 737_280),
        ("gpt-3", 1, QV, 4_718_592),
        ("gpt-3", 2, ["v_proj"], 4_718_592),
        ("gpt-3", 2, QV, 9_437_184),
        ("gpt-3", 1, ATTENTION, 9_437_184),
        ("gpt-3", 4, QV, 18_874_368),
        ("gpt-3", 2, ATTENTION, 18_874_368),
        ("gpt-3", 8, "q_proj", 18_874_368),
        ("gpt-3", 8, QV, 37_748_736),
        ("gpt-3", 4, ATTENTION, 37_748_736),
        ("gpt-3", 64, QV, 301_989_888),
        ("gpt-3", 64, ATTENTION, 603_979_776),
        # Liu et al. 2024, Table 1
        ("llama-3-8b", 32, NO_GATE, 56_623_104),
        # Raschka 2023, Practical Tips for Finetuning LLMs Using LoRA
        ("llama-2-7b", 8, QV, 4_194_304),
        ("llama-2-7b", 8, ["all-linear", "lm_head"], 20_277_248),
        ("llama-2-7b", 16, ["all-linear", "lm_head"], 40_554_496),
        ("llama-2-7b", 256, ["all-linear", "lm_head"], 648_871_936),
        # Schulman et al. 2025, LoRA Without Regret: its table counts the head too
        ("llama-3-8b", 256, [*MLP, "lm_head"], 486_866_944),
        ("llama-3-8b", 256, [*ATTENTION, "lm_head"], 251_985_920),
        ("llama-3-8b", 256, ["lm_head", "all-linear"], 704_970_752),
        ("llama-3-8b", 128, [*MLP, "lm_head"], 243_433_472),
        # Dettmers et al. 2023, the setting of section 4
        ("llama-2-7b", 64, "all-linear", 159_907_840),
        ("smollm2-135m", 8, "all-linear", 2_442_240),
        ("llama-3.2-1b", 8, "q_proj", 524_288),
        ("d=768,layers=12", 8, QV, 294_912),
        (LLAMA_3, 8, QV, 3_407_872),
    ],
)
def test_published_counts(model, rank, targets, exact):
    assert count(model, rank, targets).parameters == exact


@pytest.mark.parametrize(
    ("model", "total", "qv8", "qkvo16", "all16"),
    [
        ("llama-2-7b", 6_738_415_616, 4_194_304, 16_777_216, 39_976_960),
        ("llama-2-13b", 13_015_864_320, 6_553_600, 26_214_400, 62_586_880),
        ("llama-65b", 65_285_660_672, 20_971_520, 83_886_080, 199_884_800),
        ("llama-2-70b", 68_976_648_192, 16_384_000, 65_536_000, 207_093_760),
        ("mistral-7b", 7_241_732_096, 3_407_872, 13_631_488, 41_943_040),
        ("llama-3-8b", 8_030_261_248, 3_407_872, 13_631_488, 41_943_040),
        ("smollm2-135m", 134_515_008, 460_800, 1_843_200, 4_884_480),
        ("tinyllama-1.1b", 1_100_048_384, 1_126_400, 4_505_600, 12_615_680),
        ("llama-3.2-1b", 1_235_814_400, 851_968, 3_407_872, 11_272_192),
    ],
)
def test_published_llama_counts(model, total, qv8, qkvo16, all16):
    found = [count(model), count(model, 16, ATTENTION), count(model, 16, "all-linear")]
    assert {counts.total for counts in found} == {total}
    assert [counts.parameters for counts in found] == [qv8, qkvo16, all16]


def test_dora_adds_a_magnitude_for_every_output():
    assert count("llama-3-8b", 8, "all-linear", dora=True).parameters == 20_971_520 + 1_376_256 == 22_347_776
    assert count("llama-3-8b", 32, NO_GATE, dora=True).parameters == 57_409_536


def test_totals_of_the_papers_models():
    """GPT-2's are those of the released checkpoints; of the others no exact one is published."""
    totals = {name: count(name, 1).total for name in PAPER}
    assert totals == {
        "roberta-base": None, "roberta-large": None, "deberta-xxl": None,
        "gpt-2-medium": 354_823_168, "gpt-2-large": 774_030_080, "gpt-3": 174_604_259_328,
    }  # fmt: skip


def test_training_memory_of_llama_2_7b():
    """Rajbhandari et al. 2020 and Dettmers et al. 2023, section 3, added up."""
    found = count("llama-2-7b", 16, ATTENTION)
    memory = {how: human(sum(m)) for how, m in found.memory.items()}
    assert memory == {"full": "107.81 GB", "LoRA": "13.75 GB", "QLoRA": "4.13 GB"}
    assert found.memory["QLoRA"].weights - 2 * found.parameters == 3_340_771_328 + 2 * 262_410_240
    assert (found.float32_bytes, found.half_bytes) == (2**26, 2**25)
    assert found.reduction == pytest.approx(401.6, abs=0.05)
    assert found.share == pytest.approx(0.00249, abs=5e-6)
    for name, total in (("llama-2-7b", "3.87 GB"), ("llama-2-13b", "7.20 GB")):
        found = count(name, 1, "q_proj")
        assert human(found.memory["QLoRA"].weights - 2 * found.parameters) == total


# ---- notes


@pytest.mark.parametrize("case", PRINTED, ids=str)
def test_a_wrong_printed_count_is_noted(case):
    model, rank, targets = case
    printed, where, _ = PRINTED[case]
    found = count(model, rank, targets)
    places = len(printed.rstrip("M").partition(".")[2])
    assert f"{found.parameters / 1e6:.{places}f}M" != printed
    for part in (printed, where, f"{found.parameters:,}", "Hu et al. 2021"):
        assert part in found.note
    assert found.note in " ".join(str(found).split())
    for how in ((rank + 1, targets), (rank, "o_proj"), (rank, targets, True)):
        assert count(model, *how).note == ""


def test_the_order_of_targets_does_not_matter():
    assert count("gpt-3", 2, ATTENTION[::-1]) == count("gpt-3", 2, ATTENTION)
    assert count("llama-2-7b", 2, ["all-linear", "q_proj"]) == count("llama-2-7b", 2, "all-linear")


def test_grouped_queries_are_noted():
    found = count("llama-3-8b")
    assert found.parameters == 3_407_872
    assert "1024 outputs of v_proj, not 4096, which would count 4,194,304" in found.note
    note = count("llama-3-8b", 16, ATTENTION, dora=True).note
    same_but_wide = count(LLAMA_3.replace("kv=8", "kv=32"), 16, ATTENTION, dora=True)
    assert f"k_proj and v_proj, not 4096, which would count {same_but_wide.parameters:,}" in note
    assert same_but_wide.note == count("llama-3-8b", 8, "q_proj").note == count("llama-2-7b").note == ""


# ---- the three spellings of a model


def test_a_name_its_dimensions_and_its_config_give_the_same_counts(tmp_path):
    config = {"model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
              "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
              "tie_word_embeddings": False}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    spellings = [
        "llama-3-8b", LLAMAS["llama-3-8b"], LLAMA_3, " , ".join(LLAMA_3.split(",")), LLAMA_3 + ",tied=false",
        LLAMA_3 + ",head_dim=128", tmp_path, tmp_path / "config.json", f"{tmp_path}",
    ]  # fmt: skip
    found = [count(model, 16, "all-linear") for model in spellings]
    for counts in found:
        assert (counts.rows, counts.total, counts.memory) == (found[0].rows, found[0].total, found[0].memory)
    assert count(LLAMA_3 + ",tied=true").total == found[0].total - 128256 * 4096
    assert count(LLAMA_3 + ",head_dim=64").parameters < count(LLAMA_3).parameters


def test_bare_dimensions_count_only_square_maps():
    found = count("d=768,layers=12", 4, ATTENTION)
    assert [row.shape for row in found.rows] == [(768, 768)] * 4
    assert found.total is found.memory is found.share is found.reduction is None
    assert "the total is not known" in str(found)


def test_counts_print_as_a_table():
    assert (
        str(count("llama-3-8b", 8, ["v_proj", "up_proj"], dora=True))
        == """\
llama-3-8b, DoRA of rank 8
6,520,832 of 8,030,261,248 parameters are trained: 0.081%, 1 in 1,231.5

target          shape  number  parameters
v_proj    1024 x 4096      32   1,343,488
up_proj  14336 x 4096      32   5,177,344

adapter on disk: 26.08 MB in float32, 13.04 MB in 16 bits

training, without activations   weights  gradients  optimizer      total
full                           16.06 GB   16.06 GB   96.36 GB  128.48 GB
LoRA                           16.07 GB   13.04 MB   78.25 MB   16.16 GB
QLoRA                           5.72 GB   13.04 MB   78.25 MB    5.81 GB

note: grouped queries: 1024 outputs of v_proj, not 4096, which would count 7,405,568"""
    )
    for name in (*LLAMAS, *PAPER):
        assert max(map(len, str(count(name, 2, ATTENTION)).split("\n"))) <= 88


# ---- bad input


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"model": "llama-3-7b"}, "ConfigError: model is 'llama-3-7b'; .*nearest: 'llama-3-8b'"),
        ({"model": ""}, "ConfigError: model is ''; "),
        ({"model": "x\n" * 999}, "ConfigError: model is 'x"),
        ({"model": "./gone"}, "StorageError: gone.*No such file"),
        ({"model": "a/" + "x" * 999}, "StorageError: a/x"),
        ({"model": "a/\0"}, "StorageError: "),
        ({"model": "d=768"}, "ConfigError: 'd=768' lacks layers; expected d, layers"),
        ({"model": "d=768,layers=12,ff=3072"}, "ConfigError: .* lacks heads, vocab; expected d, layers, "),
        ({"model": "d=768,layer=12"}, "ConfigError: 'layer' is not a dimension of .*; nearest: 'layers'"),
        ({"model": "d=768,layers=12,"}, "ConfigError: '' is not a dimension"),
        ({"model": "d=768,d=768,layers=12"}, "ConfigError: d is given twice"),
        ({"model": "d=0,layers=12"}, "ConfigError: d is 0; expected an int, at least 1"),
        ({"model": "d=768,layers=1.5"}, "ConfigError: layers is '1.5'; expected an int"),
        ({"model": "d=true,layers=2"}, "ConfigError: d is True; expected an int"),
        ({"model": "d=" + "9" * 50 + ",layers=2"}, "ConfigError: .*more than 1e.18 parameters"),
        ({"model": "d=" + "9" * 5000 + ",layers=2"}, "ConfigError: d is '9+"),
        ({"model": LLAMA_3 + ",tied=perhaps"}, "ConfigError: tie_word_embeddings is 'perhaps'; expected"),
        ({"model": LLAMA_3.replace("kv=8", "kv=5")}, "ConfigError: num_key_value_heads is 5; expected a d"),
        ({"model": LLAMA_3.replace("d=4096", "d=40x")}, "ConfigError: hidden_size is '40x'; expected an int"),
        ({"rank": 0}, "ConfigError: r is 0; expected an int, at least 1"),
        ({"rank": True}, "ConfigError: r is True; expected an int"),
        ({"rank": 2.0}, "ConfigError: r is 2.0; expected an int"),
        ({"rank": 1025}, r"ConfigError: r is 1025 for v_proj of shape \(1024, 4096\); expected at most 1024"),
        ({"rank": 10**5000}, "ConfigError: r is int of very many digits for q_proj"),
        ({"targets": []}, "ConfigError: targets is .*; expected at least one name"),
        ({"targets": 7}, "ConfigError: targets is 7; expected a name or a list of names"),
        ({"targets": ["q_proj", "q_prj"]}, "MismatchError: targets: 'q_prj' matches no module; nearest: 'q"),
        ({"model": "gpt-3", "targets": "up_proj"}, "MismatchError: targets: 'up_proj' matches no module"),
        ({"model": "gpt-3", "targets": "all-linear"}, "MismatchError: all-linear: gpt-3 has only q_proj, "),
        ({"targets": "embed_tokens", "dora": True}, "ConfigError: dora is for linear maps"),
        ({"dora": 1}, "ConfigError: dora is 1; expected True or False"),
    ],
)  # fmt: skip
def test_bad_input_to_count_is_one_clear_line(how, says):
    with pytest.raises(MiniloraError) as error:
        count(**{"model": "llama-3-8b"} | how)
    line = f"{type(error.value).__name__}: {error.value}"
    assert "\n" not in line
    assert len(line) < 1200
    assert re.match(says, line)


def test_a_file_that_is_no_config_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(MiniloraError, match=r"config\.json"):
        count(tmp_path)
    (tmp_path / "config.json").write_text('{"hidden_size": %s}' % ("9" * 4000))
    with pytest.raises(MiniloraError):
        count(tmp_path)


# ---- the modules of a base


def test_modules_match_the_loaded_base_without_reading_weights():
    for base in ("untied", "tied", "biases", "head_dim", "sharded"):
        found = modules(FIXTURES / "bases" / base, ["q_proj", "layers.1.mlp.up_proj"])
        model = load(FIXTURES / "bases" / base)
        assert found.tied == (model.lm_head is None) == (base == "tied")
        layers = with_head(model, dict(owners(model)))
        assert [row.module for row in found.rows] == list(layers)
        for row in found.rows:
            layer = layers[row.module]
            assert row.layer == type(layer).__name__
            assert row.shape == layer.weight.data.shape
            assert row.adapted == row.module.endswith(("q_proj", "layers.1.mlp.up_proj"))
        assert sum(row.adapted for row in found.rows) == 3
    assert {row.layer for row in found.rows} == {"Linear", "Embedding", "RMSNorm"}


@pytest.mark.parametrize("name", LLAMAS)
def test_modules_of_a_known_model_match_its_counts(name):
    tracemalloc.start()
    try:
        found = modules(name)
        assert tracemalloc.get_traced_memory()[1] < 10_000_000  # of a model of billions
    finally:
        tracemalloc.stop()
    counted = {(row.kind, row.shape): row.number for row in count(name, 1, "all-linear").rows}
    assert Counter((row.module.split(".")[-1], row.shape) for row in found.rows if row.adapted) == counted
    heads = [row for row in found.rows if row.module in ("lm_head", "model.embed_tokens")]
    assert [row.shape for row in heads] == 2 * [(LLAMAS[name].vocab_size, LLAMAS[name].hidden_size)]
    assert not any(row.adapted for row in heads)
    assert ("lm_head is the table of embed_tokens" in str(found)) == LLAMAS[name].tie_word_embeddings


def test_modules_of_a_file_a_folder_and_a_name_are_equal(tmp_path):
    shutil.copy(FIXTURES / "bases/untied/config.json", tmp_path / "config.json")  # and no weights beside it
    found = [modules(where, "v_proj").rows for where in (tmp_path, tmp_path / "config.json", str(tmp_path))]
    assert found[0] == found[1] == found[2] == modules(FIXTURES / "bases/untied", ["v_proj"]).rows
    assert modules().name == "base"
    assert modules().rows == modules("base", "all-linear").rows


def test_modules_print_as_a_table_and_survive_json():
    found = modules(FIXTURES / "bases/tied", ["k_proj", "embed_tokens"])
    head, *lines, total = str(found).splitlines()
    assert head.split() == ["module", "layer", "shape"]
    assert len(lines) == len(found.rows)
    for row, line in zip(found.rows, lines, strict=True):
        shape = " x ".join(map(str, row.shape)).split()
        assert line.split() == [row.module, row.layer, *shape, *(["*"] if row.adapted else [])]
    assert f"{len(lines)} modules, 3 of them adapted (*)" in total
    again = json.loads(json.dumps(found.data()))
    assert [row["module"] for row in again["rows"]] == [row.module for row in found.rows]
    assert [row["adapted"] for row in again["rows"]] == [row.adapted for row in found.rows]


@pytest.mark.parametrize(
    ("base", "targets", "says"),
    [
        ("llama-3-8b", "q_prj", "MismatchError: targets: 'q_prj' matches no module; nearest: 'q_proj'"),
        ("llama-3-8b", ["q_proj", "layers.32.self_attn.q_proj"], "MismatchError: targets: 'layers.32"),
        ("llama-3-8b", [], "ConfigError: targets is .*; expected at least one name"),
        ("llama-3-7b", "q_proj", r"StorageError: llama-3-7b/config\.json: "),
        ("./gone/config.json", "q_proj", r"StorageError: gone/config\.json: "),
    ],
)
def test_a_wrong_base_or_target_is_one_clear_line(base, targets, says):
    with pytest.raises(MiniloraError) as error:
        modules(base, targets)
    assert re.match(says, f"{type(error.value).__name__}: {error.value}")
    assert "\n" not in str(error.value)


def test_a_link_named_by_the_user_is_followed_and_one_in_a_folder_is_not(tmp_path):
    (tmp_path / "link.json").symlink_to(BASE / "config.json")
    assert count(str(tmp_path / "link.json")).rows == count(str(BASE)).rows
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "config.json").symlink_to(BASE / "config.json")
    with pytest.raises(StorageError, match="is a link"):
        count(str(tmp_path / "f"))

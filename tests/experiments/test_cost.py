"""The experiment with costs: what is counted is what is trained, held and written, byte for byte."""

import copy
import json
import os
import re
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minilora.analysis.count import LLAMAS, count, modules
from minilora.errors import ConfigError, FormatError
from minilora.experiments import cost, harness
from minilora.experiments.cost import DTYPES, MATRICES, MIXED, MODELS, RANKS, STATES, WAYS, Plan, Run
from minilora.experiments.cost_figures import (
    ARMS,
    FILES,
    between,
    cell,
    human_range,
    models,
    needed,
    on_disk,
    pictures,
    right,
    saved,
    sentences,
    tables,
    times,
    total,
)  # fmt: skip
from minilora.formats.huggingface import save_model
from minilora.lora import inject
from minilora.methods.lora_config import LoraConfig
from minilora.model import Config, llama
from minilora.peft.loading import save_adapter
from minilora.tree import digest, freeze, size, trained, unfreeze

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True, scope="module")
def fast():
    """No law here is about a power cut."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


@pytest.fixture(scope="module")
def rows():
    """The committed rows."""
    return harness.read_rows(ROOT / "figures/cost/rows.jsonl", cost.FORM)


@pytest.fixture
def changed(rows):
    """A copy to write in."""
    return copy.deepcopy(rows)


def made(folder, config):
    """A base in a folder, frozen, without texts."""
    base = llama(config, np.random.default_rng(0))
    freeze(base)
    save_model(base, folder, "")
    return harness.Inputs(str(folder), base, {})


@st.composite
def bases(draw):
    """Small Llamas: grouped queries, tied heads, biases, heads of their own width; up to eleven layers."""
    G, E = draw(st.integers(1, 2)), draw(st.sampled_from([2, 4]))
    H, L = G * draw(st.integers(1, 2)), draw(st.sampled_from([1, 2, 11]))
    D, V, F = draw(st.integers(3, 7)), draw(st.integers(8, 10)), draw(st.integers(11, 14))
    return Config(V, D, F, L, H, G, E, tie_word_embeddings=draw(st.booleans()),
                  attention_bias=draw(st.booleans()), mlp_bias=draw(st.booleans()))  # fmt: skip


# ---- the law


@settings(max_examples=25)
@given(
    config=bases(), rank=st.integers(1, 2), matrices=st.sampled_from([*MATRICES, "O"]),
    dtype=st.sampled_from(DTYPES),
)  # fmt: skip
def test_what_is_counted_is_what_is_held_and_written(config, rank, matrices, dtype, tmp_path_factory):
    """For any shape: parameters, bytes of a step in float32 with LoRA and in full, and the file."""
    folder = tmp_path_factory.mktemp("base")
    model = made(folder / "base", config).base
    targets = MATRICES.get(matrices, ("o_proj",))
    found = count(str(folder / "base"), rank, targets)
    counted = cost.memory(found, *STATES["float32"])
    full = copy.deepcopy(model)
    unfreeze(full)
    assert cost.held(full) == counted["full"]
    inject(model, LoraConfig(rank, targets=targets), rng=np.random.default_rng(0))
    assert size(trained(model)) == found.parameters
    assert cost.held(model) == counted["LoRA"]
    save_adapter(model, folder / "a", dtype=dtype)
    written = (folder / "a/adapter_model.safetensors").stat().st_size
    assert cost.file_size(modules(folder / "base", targets), rank, dtype) == written


@given(st.sampled_from(MODELS), st.sampled_from([*MATRICES][:2]), st.sampled_from(RANKS))
def test_memory_is_that_of_the_formula(model, matrices, rank):
    """And in mixed precision that of `minilora params`."""
    found = count(model, rank, MATRICES[matrices])
    P, n = found.total, found.parameters
    for w, g, o in STATES.values():
        taken = cost.memory(found, w, g, o)
        assert taken.keys() == set(WAYS)
        assert taken["full"] == [w * P, g * P, o * P]
        assert taken["LoRA"] == [w * (P + n), g * n, o * n]
        assert taken["QLoRA"][1:] == taken["LoRA"][1:]
        assert 0.5 * P < taken["QLoRA"][0] - w * n < 2 * P
    assert cost.memory(found, *STATES[MIXED]) == {way: [*m] for way, m in found.memory.items()}


def test_states_take_the_bytes_of_the_papers():
    """16 in float32 and with a float32 copy, 12 without it: LLaMA 65B's 780 GB (Dettmers et al. 2023)."""
    assert {state: sum(widths) for state, widths in STATES.items()} == {
        "float32": 16, MIXED: 16, "bfloat16": 12,
    }  # fmt: skip
    assert sum(cost.memory(count("llama-65b", 1), *STATES["bfloat16"])["full"]) == 12 * 65_285_660_672


def test_nothing_is_made_to_count_seventy_billion(tmp_path):
    import tracemalloc

    tracemalloc.start()
    try:
        tree = modules("llama-2-70b", "all-linear")
        assert cost.file_size(tree, 64, "float32") > 3e9
        assert tracemalloc.get_traced_memory()[1] < 3_000_000
    finally:
        tracemalloc.stop()


# ---- one run


def test_a_row_of_a_model_by_hand(tmp_path):
    inputs = made(tmp_path / "base", Config(9, 4, 6, 1, 2, 2))
    row = cost.work(Run("counted", "llama-3-8b", "QV", 4), inputs)
    assert row["status"] == "done"
    assert row["source"] == "config.json"
    assert row["total"] == 8_030_261_248
    assert row["maps"] == 32 * (4096 * 4096 + 1024 * 4096)
    assert row["parameters"] == 32 * 4 * (2 * 4096 + 1024 + 4096)
    assert {state: row["memory"][state]["LoRA"][2] for state in STATES} == {
        "float32": 8 * row["parameters"], MIXED: 12 * row["parameters"], "bfloat16": 8 * row["parameters"],
    }  # fmt: skip
    header = row["file"]["float32"] - 4 * row["parameters"]
    assert row["file"]["bfloat16"] - 2 * row["parameters"] == pytest.approx(header, rel=0.05)
    assert 128 * 100 < header < 128 * 200
    assert cost.work(Run("counted", "gpt-3", "QV", 4), inputs)["file"] is None
    assert cost.work(Run("counted", "gpt-3", "QV", 4), inputs)["source"] == "Hu et al. 2021"


def test_what_is_written_is_the_plans_base_and_stays_as_it_was(tmp_path):
    inputs = made(tmp_path / "base", Config(9, 4, 6, 2, 2, 2))
    before = digest(inputs.base)
    counted, written = (cost.work(Run(kind, "base", "all", 2), inputs) for kind in ("counted", "written"))
    assert digest(inputs.base) == before
    assert counted["total"] == size(inputs.base)
    assert counted["parameters"] == written["parameters"] == 2 * 2 * (4 * 8 + 3 * 10)
    assert written["held"] == counted["memory"]["float32"]["LoRA"]
    assert written["file"] == counted["file"]
    assert right([counted, written]) == [True]


def test_the_grid_is_every_model_that_has_the_maps(tmp_path, monkeypatch):
    monkeypatch.setattr(cost, "MODELS", ("mistral-7b", "gpt-3"))
    monkeypatch.setattr(cost, "RANKS", (1, 3))
    inputs = made(tmp_path / "mine", Config(9, 4, 6, 1, 2, 2))
    asked = []
    monkeypatch.setattr(harness, "read_inputs", lambda base, targets: asked.append((base, targets)) or inputs)
    rows = cost.run(Plan("mine"), tmp_path / "out", jobs=1)
    assert asked == [("mine", ())]
    cells = [tuple(row["config"].values()) for row in rows]
    assert cells == [
        *(("counted", model, matrices, r) for model, there in (("mine", 3), ("mistral-7b", 3), ("gpt-3", 2))
          for matrices in [*MATRICES][:there] for r in (1, 3)),
        *(("written", "mine", matrices, r) for matrices in MATRICES for r in (1, 3)),
    ]  # fmt: skip
    assert all(row["id"] == Run(*cell).id for row, cell in zip(rows, cells, strict=True))
    assert right(rows) == [True] * 6
    assert rows[0]["total"] == size(inputs.base)
    assert cost.run(Plan("mine"), tmp_path / "out", jobs=1) == rows
    assert asdict(Plan()) == {"base": "base"}


def test_a_rank_that_the_base_has_no_room_for_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "read_inputs", lambda *_: made(tmp_path / "b", Config(9, 4, 6, 1, 2, 2)))
    with pytest.raises(ConfigError, match="r is 8 for q_proj of shape"):
        cost.run(Plan(), tmp_path / "out", jobs=1)


def test_the_committed_rows_are_made_again(rows):
    """All of rank 16, and all that were written."""
    inputs = harness.read_inputs("base", ())
    for row in rows:
        if row["config"]["rank"] == 16 or row["config"]["kind"] == "written":
            again = json.loads(json.dumps(cost.work(Run(**row["config"]), inputs)))
            assert again | {"versions": row["versions"]} == row


# ---- reading the rows


def test_the_readings_by_hand(rows):
    """Llama-2-7B: 32 blocks, width 4096, MLP 11008, 32000 tokens; GPT-3: 96 blocks of width 12288."""
    P = 2 * 32000 * 4096 + 32 * (4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096) + 4096
    n = 32 * 4 * 16 * 2 * 4096
    assert total(rows, "llama-2-7b") == P == 6_738_415_616
    assert times(rows, "llama-2-7b", "QKVO", 16) == P / n
    assert needed(rows, "llama-2-7b", "QKVO", 16, "LoRA") == {
        "float32": 4 * P + 16 * n, MIXED: 2 * P + 16 * n, "bfloat16": 2 * P + 12 * n,
    }  # fmt: skip
    less = saved(rows, "llama-2-7b", "QKVO", 16)
    assert less[MIXED] == 16 * P / (2 * P + 16 * n)
    assert human_range(needed(rows, "gpt-3", "QV", 4, "full")) == "2.10 TB to 2.79 TB"
    assert 0 < on_disk(rows, "llama-2-7b")["QKVO", "bfloat16"] - 2 * n < 50_000
    assert models(rows)[0] == "base"
    assert models(rows)[-1] == "gpt-3"
    assert [*models(rows, "all")] == [m for m in models(rows) if m in LLAMAS or m == "base"]


def test_those_500_to_1000_times_fewer_are_all_that_are(rows):
    said = between(rows)
    some = re.findall(r"(\S+) (QV|QKVO|all) r = (\d+) \((\d+)\)", said)
    assert len(some) == said.count(" r = ")
    expected = [
        (model, matrices, str(r))
        for model in ("llama-2-7b", "mistral-7b", "llama-3-8b")
        for matrices, kinds in MATRICES.items()
        for r in RANKS
        for found in [count(model, r, kinds)]
        if 500 <= found.reduction <= 1000
    ]
    assert [x[:3] for x in some] == expected
    assert ("llama-2-7b", "QKVO", "16") not in expected


def test_tables_and_sentences_by_hand(rows):
    parameters, memory, files = tables(rows)
    line = {row[0]: row[1:] for row in parameters.rows}
    assert line["llama-2-7b"][:2] == ("6,738,415,616", "524,288 (12,853)")
    assert line["gpt-3"][-1] == ""
    assert len(line) == 1 + len(MODELS)
    taken = {row[0]: row[1:] for row in memory.rows}
    assert taken["llama-2-7b, full"] == ("107.81 GB", "107.81 GB", "80.86 GB")
    assert taken["llama-2-7b, LoRA"][1] == "13.75 GB"
    assert taken["llama-2-7b, QLoRA"][1] == "4.13 GB"
    stored = {row[0]: row[1:] for row in files.rows}
    assert stored["llama-2-7b"][0] == "13.48 GB"
    assert len(stored) == 1 + len(LLAMAS)
    said = sentences(rows)
    assert "26.95 GB in float32, 13.48 GB in 16 bits" in said[0]
    assert "16,777,216 of them, 402 times fewer; 500 to 1,000 times fewer are llama-2-7b QV" in said[1]
    first = [count(m, 1).reduction >= 1e4 for m in MODELS]
    assert (
        f"with {sum(first)} of {len(MODELS) + 1} models at r = 1, with 0 at r = 4 (gpt-3: 9,251)" in said[2]
    )
    assert "98% is the frozen base: r = 1 takes 13.49 GB, r = 64 14.55 GB" in said[3]
    assert "2.10 TB to 2.79 TB in full and 349.44 GB to 698.72 GB" in said[4]
    assert "4.0 to 8.0 times less" in said[4]
    assert "in 15 of 15 adapters" in said[6]


@pytest.mark.parametrize("key", ["parameters", "held", "file"])
def test_one_byte_too_many_is_seen(key, changed):
    row = next(row for row in changed if row["config"]["kind"] == "written")
    row[key] = {
        "parameters": row["parameters"] + 1,
        "held": [*row["held"][:2], row["held"][2] + 1],
        "file": row["file"] | {"bfloat16": row["file"]["bfloat16"] + 1},
    }[key]
    assert right(changed).count(False) == 1
    assert "in 14 of 15 adapters" in sentences(changed)[-1]


def test_a_grid_that_lacks_a_cell_is_refused(rows):
    with pytest.raises(ConfigError, match=r"nothing was counted of gpt-3, QV, r = 1; expected a whole grid"):
        sentences([row for row in rows if row["config"]["rank"] != 1 or row["config"]["model"] != "gpt-3"])
    with pytest.raises(ConfigError, match="nothing was counted of llama-2-7b"):
        tables([])
    diverged = [row | {"status": "diverged"} for row in rows]
    with pytest.raises(ConfigError, match="nothing was counted"):
        cell(diverged, "gpt-3", "QV", 1)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("total", 0), ("maps", -1), ("parameters", 1.5), ("memory", {}), ("file", {"float32": 1}),
        ("status", "lost"), ("more", 1), ("config", {"kind": "final"}),
    ],
)  # fmt: skip
def test_a_row_that_no_run_writes_is_refused(field, value, changed, tmp_path):
    row = changed[0] | {field: value}
    if field != "config":
        row["id"] = harness.id_of(row["config"])
    (tmp_path / "rows.jsonl").write_bytes(harness.sealed(row))
    with pytest.raises(FormatError, match=f"line 1: row.*{field}"):
        harness.read_rows(tmp_path / "rows.jsonl", cost.FORM)


# ---- the figures


def test_every_series_is_that_of_the_rows(rows):
    drawn = pictures(rows)
    (ax,) = drawn["parameters"].figure.axes
    lines = {line.get_label(): line.get_xydata() for line in ax.lines}
    names = models(rows)
    for matrices, r in ARMS:
        there = [(i, times(rows, m, matrices, r)) for i, m in enumerate(names) if m in models(rows, matrices)]
        assert lines[f"{matrices}, r = {r}"] == pytest.approx(np.array(there))
    assert [text.get_text().split("\n")[0] for text in ax.get_xticklabels()] == names
    assert ax.get_xticklabels()[-1].get_text() == "gpt-3\n175 B"
    assert ax.get_xticklabels()[0].get_text() == "base\n345 k"
    assert ax.get_xticklabels()[1].get_text() == "smollm2-135m\n135 M"
    (ax,) = drawn["disk"].figure.axes
    lines = {line.get_label(): line.get_ydata() for line in ax.lines}
    for arm in FILES:
        sizes = [on_disk(rows, model)[arm] / 1e6 for model in models(rows, "all")]
        assert lines[", ".join(arm)] == pytest.approx(sizes)
    crosses = sorted(float(line.get_ydata()[0]) for line in ax.lines if line.get_marker() == "x")
    assert crosses == pytest.approx(sorted(size / 1e6 for size in on_disk(rows, "base").values()))
    for ax in drawn["training"].figure.axes:
        bars = np.array([[bar.get_width() for bar in some] for some in ax.containers]).T
        memory = cell(rows, ax.get_title(), "QKVO", 16)["memory"][MIXED]
        assert bars == pytest.approx(np.array([memory[way] for way in WAYS]) / 1e9)
        ends = [
            max(bar.get_x() + bar.get_width() for bar in line) for line in zip(*ax.containers, strict=True)
        ]
        assert ends == pytest.approx([sum(memory[way]) / 1e9 for way in WAYS])


@pytest.mark.slow
def test_the_same_rows_give_the_same_figures(rows):
    drawn, again = pictures(rows), pictures(rows)
    for name, picture in drawn.items():
        assert picture.encoded("svg") == again[name].encoded("svg")
        title, answer = picture.figure.get_suptitle().split("\n")
        assert title.endswith("?")
        assert re.search(r"\d", answer)
        assert any(sentence in picture.says for sentence in sentences(rows))

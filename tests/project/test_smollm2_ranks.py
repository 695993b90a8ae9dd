"""The rank sweep of SmolLM2 with a tiny model in its place: by its recipe, per character, and resumed."""

import copy
import json
import os
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from minilora.data.batching import batches, eval_batches
from minilora.data.corpora import Corpus
from minilora.errors import StorageError
from minilora.experiments import harness
from minilora.formats import huggingface
from minilora.lora import inject
from minilora.methods.lora_config import LoraConfig
from minilora.model import Config, llama
from minilora.optim import AdamW, Schedule
from minilora.training import evaluate, train
from minilora.tree import digest, freeze, named_params, trained, unfreeze

TINY = Config(hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
              num_key_value_heads=1, max_position_embeddings=130)  # fmt: skip


class Pairs:
    """A tokenizer that makes a token of two characters, the first one's id."""

    def learn(self, text):
        return np.array([ord(c) for c in text[::2]]), 0

    def begun(self, ids):
        return ids

    def decode(self, ids):
        return "".join(2 * chr(i) for i in ids)


IDS = np.random.default_rng(1).integers(60, 70, 6000).astype(np.uint8)
TEXT = Corpus("folio", "a text", *np.split(IDS, [4000, 5000]))
TRAIN, VALID, TEST = (ids[::2].astype(np.int64) for ids in (TEXT.train, TEXT.valid, TEXT.test))


@pytest.fixture(autouse=True)
def ranks(monkeypatch):
    """The benchmark, with a base and a text of this file."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    import smollm2_ranks

    monkeypatch.setattr(huggingface, "checkpoint", lambda spec: spec)
    monkeypatch.setattr(huggingface, "tokenizer_of", lambda source: Pairs())
    monkeypatch.setattr(harness, "read_inputs", lambda base, targets: made())
    smollm2_ranks.in_tokens.cache_clear()
    return smollm2_ranks


def made():
    base = llama(TINY, np.random.default_rng(0))
    freeze(base)
    return harness.Inputs("smollm2", base, {"folio": TEXT})


def little(ranks):
    return ranks.Plan(
        ranks=(3,), alpha=6.0, rates=(0.02,), full_rates=(0.003,), steps=40, search_steps=2, seeds=1, batch=3,
        test_windows=3, valid_windows=2,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "rank"), [("base", 0), ("search", 0), ("search", 3), ("final", 0), ("final", 3)]
)
def test_a_run_follows_its_recipe_and_its_loss_is_that_of_a_character(kind, rank, ranks):
    plan, inputs = little(ranks), made()
    model, before = copy.deepcopy(inputs.base), digest(inputs.base)
    if kind != "base":
        if rank:
            inject(model, LoraConfig(3, 6.0), rng=np.random.default_rng([5, 0]))
        else:
            unfreeze(model)
        steps, warmup = (2, 0) if kind == "search" else (40, 2)
        windows = batches(TRAIN, np.random.default_rng([5, 1]), 3, 128)
        train(model, windows, AdamW(0.01, betas=(0.9, 0.99)), steps=steps, schedule=Schedule(steps, warmup))
    split, other, ids, count = ("valid", "test", VALID, 2) if kind == "search" else ("test", "valid", TEST, 3)
    loss = evaluate(model, eval_batches(ids, 2, 128, limit=128 * count))
    row = ranks.work(ranks.Run(kind, plan, 8, rank, 0.01, 5), inputs)
    assert row[split] == loss / 2  # characters in a token
    assert other not in row
    params = named_params(model) if kind == "base" else trained(model)
    assert row["parameters"] == sum(p.size for p in params.values())
    assert digest(inputs.base) == before


def test_a_finished_folder_is_read_not_run(ranks, tmp_path, monkeypatch):
    monkeypatch.setattr(ranks, "EDGES", 0)
    plan = replace(little(ranks), steps=2)
    rows = ranks.run(plan, tmp_path, 1)
    assert [row["config"]["kind"] for row in rows] == ["base", *["search"] * 2, *["final"] * 2]
    monkeypatch.setattr(ranks, "work", None)
    assert ranks.run(plan, tmp_path, 1) == rows


def crafted(run, inputs):
    """A row in no time: r = 4^i closes 60% and 10% i more of the gap in the median seed."""
    row = {"id": run.id, "config": asdict(run), "source": "", "status": "done", "parameters": 100 * run.rank}
    row["seconds"] = 120.0
    if run.kind == "search":
        return row | {"valid": abs(np.log2(run.rate / (2e-3 if run.rank else 2e-4)))}
    share = 0.6 + 0.05 * np.log2(run.rank) if run.rank else 1.0
    return row | {"test": 1.5 if run.kind == "base" else 1.5 - 0.2 * share + (0.0, 0.01, -0.02)[run.seed]}


def test_what_is_said_is_what_the_rows_say(ranks, tmp_path, monkeypatch):
    monkeypatch.setattr(ranks, "work", crafted)
    monkeypatch.setattr(os, "fsync", lambda _: None)  # no law here is about a power cut
    rows = ranks.run(ranks.Plan(), tmp_path, 1)
    assert len(rows) == 1 + 5 * 3 + 5 * 3
    assert ranks.said(rows) == (
        "After 40 steps of 256 tokens full fine-tuning falls from 1.500 to 1.300 nats per character; LoRA "
        "closes 60% at r = 1, 70% at r = 4, 80% at r = 16, 90% at r = 64 of that. Its best learning rate is "
        "10 times that of full fine-tuning. All runs take 1.0 hours of a core."
    )
    line = "| 16 | 1,600 | 0.002 | 1.340 (1.320 to 1.350) | +0.040 (+0.020 to +0.050) | 80% (75% to 90%) |"
    assert line in ranks.table(rows)
    picture = ranks.draw(rows)
    assert picture.encoded("svg") == ranks.draw(rows).encoded("svg")
    assert picture.says == ranks.said(rows)


def test_without_the_model_it_says_what_to_install(ranks, monkeypatch):
    def read_inputs(base, targets):
        raise StorageError(f"{base}: no network")

    monkeypatch.setattr(harness, "read_inputs", read_inputs)
    monkeypatch.setattr("sys.argv", ["smollm2_ranks.py"])
    said = ranks.main()
    assert said.startswith("smollm2: no network\n")
    assert said.endswith("pip install -e '.[gguf,tokenizers]' && minilora data smollm2")


def test_the_page_is_what_the_rows_say(ranks):
    rows = json.loads((ranks.RESULTS / "smollm2_ranks.json").read_text())["rows"]
    page = (ranks.RESULTS / "smollm2_ranks.md").read_text(encoding="utf-8")
    assert ranks.said(rows) in page
    assert ranks.table(rows) in page

"""The main paths in an empty folder: load, inject, train, save, merge, inspect, fine-tune, sweep, the lab.

A program for where there are no locks, threads and processes; its last line is how two jobs are refused.
"""

import json
from pathlib import Path

import numpy as np

import minilora as ml
from minilora.lab import learning, planted
from minilora.lab.lab import Lab

rng = np.random.default_rng(0)
model = ml.load()
ml.inject(model, ml.LoraConfig(r=2, alpha=4), rng=rng)
ids = rng.integers(97, 123, (40, 32), dtype=np.int64)
batches = [(ids[:, :-1], ids[:, 1:])] * 4
before = ml.evaluate(model, batches[:1])
ml.train(model, batches, ml.AdamW(lr=1e-2), steps=4, checkpoint="c.safetensors")
assert ml.evaluate(model, batches[:1]) < before
ml.save_adapter(model, "a", base="base")
ml.merge(model)
ml.unmerge(model)
ml.fuse(model)
ml.save_model(model, "m", "")
assert len(ml.inspect("a", "base").modules) == len(ml.inspect("a").modules) == 21
for rank in (1, 2):
    ml.compress("a", "b", rank=rank, overwrite=True)
ml.extract("base", "m", "e", rank=2)
ml.merge_checkpoint("base", "a", "n")
ml.load_adapter(ml.load(), "e")
ml.count("llama-3-8b", 4)
ml.modules("base")
for name, lines in (("own.txt", 60), ("long.txt", 99)):
    Path(name).write_text("It is a truth universally acknowledged.\n" * lines)
recipe = ml.finetune.Recipe("own.txt", steps=2, batch=2, length=16, eval_every=1)
assert "peak" not in str(ml.finetune.run(recipe, "f"))
plan = ml.Plan(("./long.txt",), ranks=(1,), seeds=1, steps=2, search_steps=1, test_windows=1, valid_windows=1)
rows = ml.sweep(plan, "s", jobs=1)
assert ml.sweep(plan, "t") == rows  # as many jobs as there are cores, or as there can be
assert Path("s/rows.jsonl").read_bytes() == Path("t/rows.jsonl").read_bytes()
learning.STEPS = planted.STEPS = 1
lab = Lab()
lora = {"rank": 2, "alpha": 4, "targets": ["q_proj"]}
for request in (
    {"do": "train", **lora, "text": "recipes", "own": "", "prompt": "Now "}, {"do": "compare"},
    {"do": "reuse"}, {"do": "find", "pairs": 1}, {"do": "read", "path": "a", "name": "a"},
):  # fmt: skip
    assert "refused" not in [json.loads(event)["event"] for event in lab.answer(json.dumps(request))]
try:
    ml.sweep(plan, "u", jobs=2)
except ml.errors.UnsupportedError as e:
    print(e)

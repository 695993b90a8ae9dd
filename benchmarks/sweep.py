"""Time a sweep on one and two processes, and the same grid in PEFT, one run after the other.

    python benchmarks/sweep.py [--steps 150] [--seeds 1]

The grid is the default sweep's on the First Folio (`minilora sweep --data folio`): every rank, full
fine-tuning and the search for the learning rates, with fewer steps and seeds (the default has 300 and 3),
so that it ends within minutes. Ours: the whole command but the drawing, start of processes and writing
of rows included. Theirs: for every run of that grid transformers' Llama of the base's shape with PEFT's
LoRA (none for full fine-tuning), as many AdamW steps on as many windows and the same evaluations, in one
process with one model made per run and as many threads as cores; nothing is written. Overhead is what
the one process spends outside training and evaluation. What two processes can be worth is measured in the
same minutes, before, between and after ours: the bare products of a step (step.py), in one process and in two
at once. Writes results/sweep.json, where other runs of the same grid on the same processor stay.
"""

import argparse
import contextlib
import importlib.util
import json
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from common import RESULTS, SIZES, Contestant, answer, processor, threads, write
from step import products

import minilora as ml
from minilora.experiments import rank_sweep
from minilora.experiments.rank_sweep import Plan, Row, sweep
from minilora.experiments.recipe import LENGTH


def timed(plan: Plan, **how: Any) -> tuple[float, list[Row]]:
    """Seconds of a sweep into a fresh folder, and its rows."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        rows = sweep(plan, Path(folder), **how)
        return time.perf_counter() - start, rows


def two_of_products(rounds: int = 15) -> float:
    """How many times as many bare products two processes do as one, in the median of the rounds."""
    pair = [Contestant([__file__, "--products"], threads(1)) for _ in range(2)]
    for one in pair:
        one.line()
    with ThreadPoolExecutor(2) as executor:
        found = [2 * pair[0].run() / max(executor.map(Contestant.run, pair)) for _ in range(rounds)]
    for one in pair:
        one.close()
    return median(found)


@contextlib.contextmanager
def inside() -> Iterator[list[float]]:
    """The seconds of every training and every final evaluation within the context."""
    seconds: list[float] = []
    before = rank_sweep.train, rank_sweep.losses

    def watched(function: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                seconds.append(time.perf_counter() - start)

        return call

    rank_sweep.train, rank_sweep.losses = map(watched, before)  # type: ignore[assignment]
    yield seconds
    rank_sweep.train, rank_sweep.losses = before  # type: ignore[assignment]


def peft_grid(runs: list[Row], cores: int) -> None:
    """Every run in transformers and PEFT."""
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model

    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore", FutureWarning)  # PEFT uses what transformers is to rename
    torch.set_num_threads(cores)
    c, text = ml.load().config, ml.corpus("folio")
    config = transformers.LlamaConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        intermediate_size=c.intermediate_size,
        num_hidden_layers=c.num_hidden_layers,
        num_attention_heads=c.num_attention_heads,
        num_key_value_heads=c.num_key_value_heads,
        max_position_embeddings=c.max_position_embeddings,
        tie_word_embeddings=True,
        use_cache=False,
    )

    def loss(model: Any, ids: Any, labels: Any) -> Any:
        logits = model(input_ids=torch.as_tensor(ids)).logits
        wanted = torch.as_tensor(labels).reshape(-1)
        return torch.nn.functional.cross_entropy(logits.reshape(-1, c.vocab_size), wanted)

    def held_out(model: Any, split: Any, limit: int) -> float:
        with torch.inference_mode():
            batches = ml.eval_batches(split, 16, LENGTH, limit=limit)
            return float(np.mean([float(loss(model, ids, labels)) for ids, labels in batches]))

    for run in runs:
        model = transformers.LlamaForCausalLM(config)
        if run["method"] == "lora":
            r = run["rank"]
            model = get_peft_model(
                model, LoraConfig(r=r, lora_alpha=run["alpha"], target_modules="all-linear")
            )
        params = [p for p in model.parameters() if p.requires_grad]
        rng = np.random.default_rng(0)
        if run["steps"]:
            optimizer = torch.optim.AdamW(params, lr=1e-3, weight_decay=0.0)
            batches = ml.batches(text.train, rng, run["batch"], LENGTH)
            valid = run["valid_windows"] * LENGTH
            for step in range(run["steps"]):
                if run["kind"] == "final" and step % max(run["steps"] // 10, 1) == 0:
                    held_out(model, text.valid, valid)
                loss(model, *next(batches)).backward()
                torch.nn.utils.clip_grad_norm_(params, 1.0)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            held_out(model, text.valid, valid)
        if run["kind"] != "search":
            held_out(model, text.test, run["test_windows"] * LENGTH)


def said(rows: list[Row]) -> str:
    """The sentences of docs/speed.md on all runs of one processor."""

    def span(values: Iterable[float]) -> str:
        values = sorted(values)
        return f"{values[0]:.1f} to {values[-1]:.1f}"

    products = span(x for row in rows for x in row["two_to_one_of_products"])
    return (
        f"In {len(rows)} runs the First Folio's grid on two processes took "
        f"{span(row['times_faster'] for row in rows)} times less than the same grid in PEFT on two threads, "
        f"run after run. Two processes were {span(row['two_to_one'] for row in rows)} times as fast as one, "
        f"and in the same minutes did {products} times as many bare products as one. A process spends at "
        f"most {max(row['overhead'] for row in rows):.1%} of its time outside training and evaluation."
    )


def merged(old: dict[str, Any], row: Row) -> list[Row]:
    """The rows of the same processor and grid, and the new one."""
    same = old.get("processor") == processor()
    grid = ("steps", "seeds")
    return [*(r for r in old.get("rows", []) if same and all(r[k] == row[k] for k in grid)), row]


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--as", dest="grid", help=argparse.SUPPRESS)
    parser.add_argument("--products", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.products:
        answer(products(*SIZES[1]))
        return
    if args.grid:
        runs = json.loads(Path(args.grid).read_text())
        answer(lambda: peft_grid(runs, 2), warm=0)
        return
    plan = Plan(targets=("folio",), steps=args.steps, seeds=args.seeds)
    seconds: Row = {}
    two = [two_of_products()]
    seconds["two processes"], rows = timed(plan, jobs=2)
    two.append(two_of_products())
    seconds["one process"], _ = timed(plan, jobs=1)
    two.append(two_of_products())
    with inside() as parts, ThreadPoolExecutor(1) as executor:
        whole, _ = timed(plan, executor=executor)
    row = {
        "steps": args.steps, "seeds": args.seeds, "runs": len(rows), "seconds": seconds,
        "two_to_one": seconds["one process"] / seconds["two processes"], "two_to_one_of_products": two,
        "overhead": 1 - sum(parts) / whole,
    }  # fmt: skip
    if all(map(importlib.util.find_spec, ("torch", "transformers", "peft"))):
        with tempfile.TemporaryDirectory() as folder:
            grid = Path(folder) / "grid.json"
            grid.write_text(json.dumps([r["config"] for r in rows]))
            rival = Contestant([__file__, "--as", str(grid)], threads(2))
            rival.line()
            seconds["peft"] = rival.run() / 1000
            rival.close()
        row["times_faster"] = seconds["peft"] / seconds["two processes"]
    print(json.dumps(row, indent=1))
    path = RESULTS / "sweep.json"
    write("sweep", merged(json.loads(path.read_text()) if path.exists() else {}, row))


if __name__ == "__main__":
    main()

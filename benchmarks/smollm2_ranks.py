"""Which rank does a real model need? SmolLM2-135M learns the First Folio at r = 1, 4, 16 and 64.

    python benchmarks/smollm2_ranks.py      about half an hour on two cores; a killed run goes on where it was
    python benchmarks/smollm2_ranks.py --draw      only draws and writes, from benchmarks/results

It needs the model: `pip install -e ".[gguf,tokenizers]"`, then `minilora data smollm2`. For LoRA at each rank
and for full fine-tuning short runs choose the learning rate on the validation plays. Then three seeds train
for 40 steps of 2 windows of 128 tokens, and are measured on the held-out plays, in nats per character. Runs
of a seed see the same windows. A run has one thread; two runs take turns with two cores. Writes
benchmarks/results/smollm2_ranks.json, .md, .png and .svg.
"""

import argparse
import copy
import functools
import json
import math
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from common import RESULTS, write

from minilora import finetune
from minilora.data import batching
from minilora.data.corpora import Corpus
from minilora.errors import MiniloraError, NonFiniteError
from minilora.experiments import harness
from minilora.experiments.harness import LOSS, SEARCH_SEED, SIZE
from minilora.experiments.rank_figures import NATS, log_axis
from minilora.experiments.recipe import LENGTH, drawn, learn
from minilora.experiments.scale_figures import span
from minilora.experiments.size_figures import HEAD, found
from minilora.formats import forms, huggingface, tokenizer
from minilora.lora import inject
from minilora.methods.lora_config import LoraConfig
from minilora.optim import AdamW
from minilora.table import Table, counted
from minilora.training import evaluate
from minilora.tree import size, trained, unfreeze

NAME = "smollm2_ranks"
STEP, EDGES = 2.0, 3  # of the search
ROWS = 2  # windows that are measured at once: a row of logits is 49,152 wide


@dataclass(frozen=True)
class Plan:
    """How each rank is trained and measured."""

    target: str = "folio"
    base: str = "smollm2"
    ranks: tuple[int, ...] = (1, 4, 16, 64)
    alpha: float = 32.0
    rates: tuple[float, ...] = (1e-3, 2e-3, 4e-3)  # of LoRA, to try first
    full_rates: tuple[float, ...] = (1e-4, 2e-4, 4e-4)
    steps: int = 40
    search_steps: int = 16
    seeds: int = 3
    batch: int = 2
    test_windows: int = 24
    valid_windows: int = 8


@dataclass(frozen=True)
class Run:
    """One training, or none: the base as it is."""

    kind: str  # "base", "search" or "final"
    plan: Plan
    width: int  # of the base
    rank: int = 0  # 0: all weights
    rate: float = 0.0
    seed: int = 0
    text: str = ""  # the digest of the text

    @property
    def id(self):
        """A short name derived from the content."""
        return harness.id_of(asdict(self))


@functools.cache
def in_tokens(text, base):
    """The splits of a text in the tokens of a base, and its tokenizer; made once in each process."""
    words = huggingface.tokenizer_of(huggingface.checkpoint(base))
    splits = (
        finetune.encoded(text.name, tokenizer.decode(ids), words)
        for ids in (text.train, text.valid, text.test)
    )
    return Corpus(text.name, text.source, *splits), words


def loss_on(model, text, words, split, count):
    """The loss in nats per character, over `count` windows spread evenly over a split."""
    batches = batching.eval_batches(getattr(text, split), ROWS, LENGTH, limit=count * LENGTH)
    loss = evaluate(model, batches) / finetune.per_token(batches, words)
    if not math.isfinite(loss):
        raise NonFiniteError(f"the loss on {split} is {loss}")
    return loss


def work(run, inputs):
    """Do one run and return its row."""
    return harness.row_of(run, inputs.texts[run.plan.target].source, lambda: measured(run, inputs))


def measured(run, inputs):
    """The validation loss of a search, else the test loss; parameters, and the processor's seconds."""
    plan, start = run.plan, time.process_time()
    text, words = in_tokens(inputs.texts[plan.target], plan.base)
    model = inputs.base if run.kind == "base" else copy.deepcopy(inputs.base)
    if run.kind != "base":
        if run.rank:
            inject(model, LoraConfig(run.rank, plan.alpha), rng=np.random.default_rng([run.seed, 0]))
        else:
            unfreeze(model)
        batches = drawn(text, np.random.default_rng([run.seed, 1]), plan.batch)
        steps = plan.search_steps if run.kind == "search" else plan.steps
        learn(model, batches, AdamW(run.rate, betas=(0.9, 0.99)), steps)
    split, count = ("valid", plan.valid_windows) if run.kind == "search" else ("test", plan.test_windows)
    return {
        split: loss_on(model, text, words, split, count),
        "parameters": size(model if run.kind == "base" else trained(model)),
        "seconds": time.process_time() - start,
    }


MEASURED = {"parameters": forms.whole(), "seconds": SIZE}
TESTED, SEARCHED = {"test": LOSS} | MEASURED, {"valid": LOSS} | MEASURED
FORM = harness.form_of({"base": TESTED, "search": SEARCHED, "final": TESTED})


def run(plan, out, jobs=None, progress=None):
    """Do the runs that are missing in the folder `out`; return all rows."""
    inputs = harness.read_inputs(plan.base, (plan.target,))
    in_tokens(inputs.texts[plan.target], plan.base)  # fails before any run if a package is missing
    base = Run("base", plan, inputs.base.config.hidden_size, text=inputs.texts[plan.target].digest)
    searches = [replace(base, kind="search", rank=r, seed=SEARCH_SEED) for r in (0, *plan.ranks)]
    with harness.open_store(out, work, inputs, asdict(plan), FORM, jobs=jobs, progress=progress) as store:
        store.finish([base])
        starts = {cell: plan.rates if cell.rank else plan.full_rates for cell in searches}
        best = harness.chosen_rates(
            store, starts, lambda cell, rate: replace(cell, rate=rate), STEP, EDGES
        )  # fmt: skip
        store.finish(
            replace(cell, kind="final", rate=rate, seed=seed)
            for cell, rate in best.items()
            for seed in range(plan.seeds)
        )
        return store.close()


# ---- what was found


def arm_of(rows):
    """What was found, as `experiments.size_figures` reads a base."""
    (arm,) = found(rows).values()
    return arm


def answer(rows):
    """How much of the gap each rank closes, in words; medians."""
    arm = arm_of(rows)
    return ", ".join(f"{np.median(arm.share(r)):.0%} at r = {r}" for r in arm.ranks)


def said(rows):
    """What the rows show, in words."""
    arm, plan = arm_of(rows), rows[0]["config"]["plan"]
    hours = sum(row["seconds"] for row in rows if row["status"] == "done") / 3600
    times = {r: arm.rates[r] / arm.rates[0] for r in arm.ranks}
    return (
        f"After {plan['steps']} steps of {plan['batch'] * LENGTH} tokens full fine-tuning falls from "
        f"{arm.base['test']:.3f} to {arm.full:.3f} {NATS}; LoRA closes {answer(rows)} of that. Its best "
        f"learning rate is {span(times)} that of full fine-tuning. All runs take "
        f"{hours:.1f} hours of a core."
    )


def table(rows):
    """Full fine-tuning and every rank, in Markdown."""
    arm = arm_of(rows)
    return Table(HEAD, arm.lines()).markdown()


def draw(rows):
    """The loss against rank between the base and full fine-tuning, with the share of the gap closed."""
    from minilora.analysis.plotting import BLUE, GREY, ORANGE, Picture, axes, styled

    @styled
    def picture():
        arm = arm_of(rows)
        figure, ((ax,),) = axes(size=(9.0, 5.4))
        losses = np.stack([arm.losses[r] for r in arm.ranks])
        middles = np.median(losses, 1)
        ax.axhline(arm.base["test"], color=GREY, linestyle=":", linewidth=2, label="frozen base")
        ax.axhspan(min(arm.losses[0]), max(arm.losses[0]), color=ORANGE, alpha=0.2, linewidth=0)
        ax.fill_between(arm.ranks, losses.min(1), losses.max(1), color=BLUE, alpha=0.2, linewidth=0)
        seeds = counted(len(arm.losses[0]), "seed", "seeds")
        ax.plot(arm.ranks, middles, color=BLUE, marker="o", markersize=8,
                label=f"LoRA, median and range of {seeds} (%: of the gap)")  # fmt: skip
        ax.axhline(arm.full, color=ORANGE, linestyle="--", linewidth=2, label="full fine-tuning")
        for r, loss in zip(arm.ranks, middles, strict=True):
            ax.annotate(f"{np.median(arm.share(r)):.0%}", (r, loss), xytext=(0, 10),
                        textcoords="offset points", ha="center", color=BLUE)  # fmt: skip
        log_axis(ax, arm.ranks)
        low, high = ax.get_ylim()
        ax.set_ylim(low - 0.08 * (high - low), high + 0.04 * (high - low))
        ax.set_ylabel(f"test loss ({NATS})")
        ax.legend(loc="center right")
        ax.set_title(
            f"How much of full fine-tuning does each rank reach in SmolLM2-135M?\n{answer(rows)}", fontsize=12
        )
        return Picture(figure, said(rows))

    return picture()


def publish(rows):
    """Write table, sentence and picture into the results."""
    title = "SmolLM2-135M learns the First Folio at four ranks (`python benchmarks/smollm2_ranks.py`)"
    text = f"# {title}\n\n{said(rows)}\n\n{table(rows)}\n"
    (RESULTS / f"{NAME}.md").write_text(text, encoding="utf-8")
    draw(rows).save(RESULTS, NAME)
    print(text)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/smollm2-ranks"), help="rows, while it runs")
    parser.add_argument("--jobs", type=int, default=2, help="some 3 GB of memory each")
    parser.add_argument("--draw", action="store_true")
    options = parser.parse_args()
    if options.draw:
        publish(json.loads((RESULTS / f"{NAME}.json").read_text())["rows"])
        return None
    try:
        rows = run(
            Plan(), options.out, options.jobs,
            lambda done, known, row: print(f"{done} of {known}: {row['config']['kind']}", flush=True),
        )  # fmt: skip
    except MiniloraError as e:
        return f"{e}\nthe model: pip install -e '.[gguf,tokenizers]' && minilora data smollm2"
    write(NAME, rows)
    publish(rows)
    return None


if __name__ == "__main__":
    sys.exit(main())

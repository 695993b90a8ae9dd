"""Does a larger base need a lower rank? LoRA at every rank on bases of three widths, pretrained alike.

    gap closed = (L_base - L) / (L_base - L_full)        rank needed: where it first reaches 90%

Aghajanyan et al. 2020 find a lower intrinsic dimension in larger models, and LoRA is said to come nearer to
full fine-tuning there. Each base sees as many characters of modern Shakespeare and then learns the First
Folio. For every width, LoRA at each rank and all weights have their own learning rate, chosen by short runs
on a validation split; then each seed is trained, and measured on the test split. The seeds vary A and the
batches; every width is one base. Leaves out depth, and data in proportion to the size.
"""

import copy
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from ..errors import ConfigError, check_float, check_int
from ..formats import forms
from ..lora import inject
from ..methods.lora_config import LoraConfig
from ..model import Llama, llama
from ..optim import AdamW
from ..tree import size, trained, unfreeze
from . import harness, pretrain
from .harness import LOSS, SEARCH_SEED, Inputs, Progress, Row
from .recipe import drawn, learn, loss_on

OWN = pretrain.Recipe.corpus  # what the bases are pretrained on
STEP, EDGES = 2.0, 3  # of the search


@dataclass(frozen=True)
class Plan:
    """The widths, the ranks, and how they are trained. ConfigError for an empty grid or an invalid number."""

    target: str = "folio"
    widths: tuple[int, ...] = (32, 64, 128)
    ranks: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    alpha: float = 32.0  # of every rank: with alpha / r the best rate hardly depends on it
    rates: tuple[float, ...] = (4e-3, 8e-3, 16e-3)  # of LoRA, to try first
    full_rates: tuple[float, ...] = (1e-3, 2e-3, 4e-3)
    pretraining: int = 2000  # in steps
    steps: int = 150
    search_steps: int = 50
    seeds: int = 5
    batch: int = 8
    test_windows: int = 128
    valid_windows: int = 64

    def __post_init__(self) -> None:
        for name in ("widths", "ranks"):
            some = getattr(self, name)
            if not some or list(some) != sorted({*some}):
                raise ConfigError(f"{name} are {some!r}; expected at least one, each once, in order")
            for number in some:
                check_int(name, number, 1)
        if not self.rates or not self.full_rates:
            raise ConfigError("the grid is empty; expected a learning rate for LoRA and for all weights")
        counts = ("pretraining", "steps", "search_steps", "seeds", "batch", "test_windows", "valid_windows")
        for name in counts:
            check_int(name, getattr(self, name), 1)
        for number in (self.alpha, *self.rates, *self.full_rates):
            check_float("alpha or a learning rate", number, 0, math.inf, open_low=True)


QUICK = {"widths": (32, 64), "ranks": (1, 8), "rates": (1e-2,), "full_rates": (2e-3,), "pretraining": 40,
         "steps": 10, "search_steps": 2, "seeds": 1, "batch": 4, "test_windows": 8,
         "valid_windows": 4}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One training from one base, or none: the base as it is."""

    kind: str  # "base", "search" or "final"
    plan: Plan
    width: int
    rank: int = 0  # 0: all weights
    rate: float = 0.0
    seed: int = 0
    texts: tuple[str, ...] = ()  # the digests of the texts

    @property
    def id(self) -> str:
        """A short name derived from the content."""
        return harness.id_of(asdict(self))


# ---- one run


def work(run: Run, inputs: Inputs) -> Row:
    """Do one run and return its row."""
    return harness.row_of(run, inputs.texts[run.plan.target].source, lambda: measured(run, inputs))


def measured(run: Run, inputs: Inputs) -> Row:
    """The validation loss of a search; else the test loss; of a base also that on its own text.

    And how many numbers are trained, or how many the base has.
    """
    plan, text = run.plan, inputs.texts[run.plan.target]
    if run.kind == "base":
        model = pretrained(run, inputs)
        row = {split: loss_on(model, inputs.texts[name], "test", plan.test_windows)
               for split, name in (("test", plan.target), ("own", OWN))}  # fmt: skip
        return row | {"parameters": size(model)}
    model = learned(run, inputs)
    split, windows = ("valid", plan.valid_windows) if run.kind == "search" else ("test", plan.test_windows)
    return {split: loss_on(model, text, split, windows), "parameters": size(trained(model))}


def pretrained(run: Run, inputs: Inputs) -> Llama:
    """The base of that width, frozen; nobody may change it."""
    return pretrain.pretrained(run.width, run.plan.pretraining, run.plan.batch, inputs.texts[OWN])


def learned(run: Run, inputs: Inputs) -> Llama:
    """A copy of the base after the training of the run; runs of a seed see the same batches."""
    plan, model = run.plan, copy.deepcopy(pretrained(run, inputs))
    if run.rank:
        inject(model, LoraConfig(run.rank, plan.alpha), rng=np.random.default_rng([run.seed, 0]))
    else:
        unfreeze(model)
    batches = drawn(inputs.texts[plan.target], np.random.default_rng([run.seed, 1]), plan.batch)
    steps = plan.search_steps if run.kind == "search" else plan.steps
    learn(model, batches, AdamW(run.rate, betas=(0.9, 0.99)), steps)
    return model


# ---- the whole


def run(
    plan: Plan,
    out: Path | str,
    *,
    jobs: int | None = None,
    dask: str | None = None,
    progress: Progress | None = None,
) -> list[Row]:
    """Do the runs that are missing in the folder `out`; return all rows in the plan's order.

    ConfigError for a width that a base cannot have, or a rank that is too large for one; other errors as in
    `harness.open_store`, and InputError for a text that is too short. Each process pretrains the bases anew.
    """
    rng = np.random.default_rng(0)
    for width in plan.widths:  # refuses what does not fit, before any run
        inject(llama(pretrain.shape(width), rng), LoraConfig(max(plan.ranks), plan.alpha), rng=rng)
    inputs = harness.read_inputs("base", (plan.target, OWN))  # the base that ships is not used
    texts = tuple(inputs.texts[name].digest for name in (plan.target, OWN))
    bases = [Run("base", plan, width, texts=texts) for width in plan.widths]
    searches = [
        replace(base, kind="search", rank=r, seed=SEARCH_SEED) for base in bases for r in (0, *plan.ranks)
    ]
    with harness.open_store(
        out, work, inputs, asdict(plan), FORM, jobs=jobs, dask=dask, progress=progress
    ) as store:
        store.finish(bases)
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


COUNT = {"parameters": forms.whole()}
FORM = harness.form_of({
    "base": {"test": LOSS, "own": LOSS} | COUNT,
    "search": {"valid": LOSS} | COUNT,
    "final": {"test": LOSS} | COUNT,
})  # fmt: skip

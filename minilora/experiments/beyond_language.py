"""Does LoRA work beyond language? A vision transformer and a diffusion model of digits, the same adapters.

    the share of test images, or of drawings, that is right at rank r, beside all weights and no LoRA

Hu et al. 2021 adapt language models alone. The tasks are in beyond_tasks.py; both bases are pretrained here,
from one seed, in each process. Classifiers have LoRA on all linear maps beside a head trained in full, and
stand beside the head alone; a drawing model has LoRA on all linear maps; permuted pixels, whose answer is
known, have it on the patch embedding alone. Runs with a seed of their own choose each learning rate on a
validation split; all else is measured on test. Leaves out convolutions, colours and large models.
"""

import copy
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..data.digits import GREYS, digits
from ..errors import ConfigError, check_float, check_int
from ..formats import forms
from ..layers import Linear
from ..lora import bases, inject
from ..methods.lora_config import LoraConfig
from ..optim import AdamW
from ..spectra import relative, spectrum, spectrum_between
from ..tree import size, trained, unfreeze
from ..vision.diffusion import sample
from ..vision.vit import PATCH
from . import beyond_tasks as tasks
from . import harness
from .beyond_tasks import CLASSIFIED, DRAWN, planted
from .harness import LOSS, SEARCH_SEED, SIZE, Inputs, Progress, Row

SCALE = 2.0  # s
STEP, EDGES = 2.0, 6  # of the search
SHOWN = 15  # drawings that a row keeps


@dataclass(frozen=True)
class Plan:
    """What is adapted, and how. ConfigError for an empty grid or an invalid number."""

    ranks: tuple[int, ...] = (1, 2, 4, 8, 16)  # for drawings every second one
    planted: tuple[int, ...] = (1, 2, 3)  # of the permutations, whose LoRA has every rank to 4
    rates: tuple[float, ...] = (4e-3, 8e-3, 16e-3)  # of LoRA and of the head alone, to try first
    full_rates: tuple[float, ...] = (1e-3, 2e-3, 4e-3)
    permuted_rates: tuple[float, ...] = (5e-2, 1e-1, 2e-1)
    pretraining: int = 200  # steps of the classifier
    drawing_pretraining: int = 4000
    steps: int = 150
    permuted_steps: int = 800
    drawing_steps: int = 400
    seeds: int = 5
    batch: int = 32
    samples: int = 100  # drawings to count

    def __post_init__(self) -> None:
        for name in ("ranks", "planted", "rates", "full_rates", "permuted_rates"):
            some = getattr(self, name)
            if not some or sorted(set(some)) != list(some):
                raise ConfigError(f"{name} are {some!r}; expected at least one, and that they grow")
        for number in (*self.ranks, *self.planted):
            check_int("rank", number, 1)
        if max(self.planted) >= PATCH**2:
            raise ConfigError(f"planted is {max(self.planted)}; expected at most {PATCH**2 - 1}")
        for rate in (*self.rates, *self.full_rates, *self.permuted_rates):
            check_float("learning rate", rate, 0, math.inf, open_low=True)
        for name in ("pretraining", "drawing_pretraining", "steps", "permuted_steps", "drawing_steps"):
            check_int(name, getattr(self, name), 1)
        for name, least in (("seeds", 1), ("batch", 1), ("samples", SHOWN)):
            check_int(name, getattr(self, name), least)

    def how(self, task: str, full: bool) -> tuple[int, tuple[float, ...]]:
        """The steps of a training, and the learning rates to try first."""
        if planted(task):
            return self.permuted_steps, self.permuted_rates
        return self.drawing_steps if task == DRAWN else self.steps, self.full_rates if full else self.rates


QUICK = {"ranks": (2,), "planted": (1,), "rates": (8e-3,), "full_rates": (2e-3,), "permuted_rates": (1e-1,),
         "pretraining": 20, "drawing_pretraining": 20, "steps": 5, "permuted_steps": 5, "drawing_steps": 5,
         "seeds": 1, "samples": 15}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One training, or none: the base as it is, or with the known answer."""

    kind: str  # "base", "known", "search" or "final"
    plan: Plan
    task: str
    method: str = ""  # "full", "head" (alone) or "lora"
    rank: int = 0
    rate: float = 0.0
    seed: int = 0

    @property
    def id(self) -> str:
        """A short name derived from the content."""
        return harness.id_of(asdict(self))


# ---- one run


def work(run: Run, inputs: Inputs) -> Row:
    """Do one run and return its row."""
    return harness.row_of(run, digits().source, lambda: measured(run))


def base_of(run: Run) -> Any:
    """The base of a task, which nobody may change."""
    plan, draws = run.plan, run.task == DRAWN
    return tasks.pretrained(draws, plan.drawing_pretraining if draws else plan.pretraining, plan.batch)


def measured(run: Run) -> Row:
    """The validation loss of a search; of all else loss and share on test, ΔW's spectrum, some drawings."""
    base: Any = base_of(run)
    model = base
    if run.kind == "known":
        model = tasks.known(base, run.task)
    elif run.kind != "base":
        model = learned(run)
    row: Row = {"parameters": size(trained(model))}
    if run.kind == "search":
        return row | {"valid": tasks.loss(model, run.task, "valid", base)}
    row |= {"test": tasks.loss(model, run.task, "test", base), "spectrum": values(run, model), "samples": []}
    if run.task != DRAWN:
        return row | {"share": tasks.right(model, run.task, base)}
    drawings = sample(model, run.plan.samples, np.random.default_rng([run.seed, 2]))
    greys = np.rint((drawings[:SHOWN].ravel() + 1) * (GREYS / 2)).astype(int)
    return row | {"share": tasks.new(drawings), "samples": greys.tolist()}


def values(run: Run, model: Any) -> list[float]:
    """Singular values of ΔW over the largest: of the patch embedding, or the median of all maps in blocks."""
    if run.method == "head" or run.kind == "base":
        return []
    found = spectrum(model) if run.method == "lora" else spectrum_between(base_of(run), model)
    part = "patch_embedding" if planted(run.task) else "encoder.layers."
    middle = np.median([relative(s) for path, s in found.items() if part in path], 0)
    return [float(f"{x:.4g}") for x in middle]


def lora(model: Any, task: str, r: int) -> LoraConfig:
    """LoRA of rank r, or of the largest rank below that a map can have."""
    head = ("classifier",) if task in CLASSIFIED else ()
    some = {path: layer for path, layer in bases(model).items() if isinstance(layer, Linear)}
    targets = [path for path in some if path not in head and (not planted(task) or "patch" in path)]
    small = {path: least for path in targets if (least := min(some[path].weight.shape)) < r}
    alphas = {path: SCALE * least for path, least in small.items()}
    return LoraConfig(r, SCALE * r, targets, small, alphas, modules_to_save=head)


def prepared(run: Run) -> Any:
    """A copy of the base, ready for the training of the run; ConfigError for a rank that is no map's."""
    model = copy.deepcopy(base_of(run))
    if run.method == "lora":
        inject(model, lora(model, run.task, run.rank), rng=np.random.default_rng([run.seed, 0]))
    else:
        unfreeze(model if run.method == "full" else model.classifier)
    return model


def learned(run: Run) -> Any:
    """The model after the training of the run; runs of a seed see the same batches."""
    plan, model, rng = run.plan, prepared(run), np.random.default_rng([run.seed, 1])
    steps, _ = plan.how(run.task, run.method == "full")
    optimizer = AdamW(run.rate, betas=(0.9, 0.99))
    tasks.adapt(model, run.task, base_of(run), rng, plan.batch, optimizer, steps)
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

    UnsupportedError without the extra `vision`; other errors as in `harness.open_store`.
    """
    digits()  # refuses before any run
    inputs = harness.read_inputs("base", ())  # the harness asks for a base of text; no run here reads it
    cells = list(grid(plan))
    with harness.open_store(
        out, work, inputs, asdict(plan), FORM, jobs=jobs, dask=dask, progress=progress
    ) as store:
        names = dict.fromkeys(cell.task for cell in cells)
        store.finish(Run("base", plan, task) for task in names)
        store.finish(Run("known", plan, task) for task in names if planted(task))
        rates = harness.chosen_rates(
            store, {cell: plan.how(cell.task, cell.method == "full")[1] for cell in cells},
            lambda cell, rate: replace(cell, rate=rate), STEP, EDGES,
        )  # fmt: skip
        store.finish(
            replace(cell, kind="final", rate=rates[cell], seed=seed)
            for cell in cells
            for seed in range(plan.seeds)
        )
        return store.close()


def grid(plan: Plan) -> Iterator[Run]:
    """The searches, without a rate: for each task all weights, the head alone if there is one, every rank."""
    for task in (*CLASSIFIED, *(f"permuted:{k}" for k in plan.planted), DRAWN):
        cell = Run("search", plan, task, seed=SEARCH_SEED)
        ranks = range(1, PATCH**2 + 1) if planted(task) else plan.ranks[:: 1 + (task == DRAWN)]
        if not planted(task):
            yield replace(cell, method="full")
        if task in CLASSIFIED:
            yield replace(cell, method="head")
        yield from (replace(cell, method="lora", rank=r) for r in ranks)


SHARE, COUNT = forms.number(0, 1), {"parameters": forms.whole()}
RESULT = COUNT | {
    "test": LOSS, "share": SHARE, "samples": forms.several(forms.whole(0, GREYS)),
    "spectrum": forms.several(SIZE),
}  # fmt: skip
FORM = harness.form_of({"base": RESULT, "known": RESULT, "search": {"valid": LOSS} | COUNT, "final": RESULT})

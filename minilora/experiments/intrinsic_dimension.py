"""How many numbers does fine-tuning need? Training in random subspaces of all weights, from several starts.

    θ = θ0 + P z, z (d,) trained        d90: the smallest d to close 90% of the loss from θ0 to full training

Li et al. 2018; Aghajanyan et al. 2020, who take 90% of full training's accuracy instead: that is measured,
too, for the next character. Starts are the base, random weights of the same shape, and bases pretrained here,
shortly: for fewer and more steps, and in several widths. LoRA stands beside them on the base, since its
parameters are some of the d; so does SAID, with a scale for each weight matrix. For every start, text, method
and size short runs choose the learning rate on a validation split; all else is measured on the test split.
The seeds vary P and the batches; every start is one model. Each ΔW is measured by its effective rank. Beside
the texts are digits, learned from scratch as Li et al. have it (intrinsic_tasks.py).
"""

import copy
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..data.digits import digits
from ..errors import ConfigError, check_float, check_int
from ..formats import forms
from ..lora import inject
from ..methods.intrinsic import Subspace, subspace
from ..methods.lora_config import LoraConfig
from ..model import blank
from ..optim import AdamW
from ..spectra import effective_rank, noise_spectrum, spectrum, spectrum_between
from ..tree import named_params, size, trained, unfreeze
from . import harness, pretrain
from .beyond_tasks import SHAPE
from .harness import LOSS, SEARCH_SEED, Inputs, Progress, Row
from .intrinsic_tasks import DIGITS, DIMS, LONGER, Images, Text, random_vit
from .recipe import learn

OWN = pretrain.Recipe.corpus  # what the bases are pretrained on
BASE = 0  # the width that stands for the plan's base
SCALE = 2.0  # s of LoRA
STEP, EDGES = 2.0, 3  # of the search


@dataclass(frozen=True)
class Plan:
    """What is trained from where, and how, beside digits; of those steps, rates and seeds count.

    ConfigError for an empty grid or an invalid number.
    """

    targets: tuple[str, ...] = ("folio", "kjv")  # bases that are pretrained here see only the first
    dims: tuple[int, ...] = (342, 1368, 5472, 21888, 87552)  # d; the last three as LoRA's parameters
    ranks: tuple[int, ...] = (1, 4, 16)  # of LoRA
    widths: tuple[int, ...] = (32, 56, 96)  # of pretrained bases; random weights have the last
    pretraining: tuple[int, ...] = (60, 600)  # in steps, in the last width; the other widths take the last
    rates: tuple[float, ...] = (1.0, 2.0, 4.0)  # learning rate times √(numbers trained), to try first
    steps: int = 120
    search_steps: int = 40
    seeds: int = 5  # from the base and from random weights
    few_seeds: int = 3  # from other starts
    batch: int = 4
    base: str = "base"
    test_windows: int = 128
    valid_windows: int = 64

    def __post_init__(self) -> None:
        for name in ("targets", "dims", "ranks", "widths", "pretraining", "rates"):
            some = getattr(self, name)
            if not some or list(some) != list(dict.fromkeys(some)):
                raise ConfigError(f"{name} are {some!r}; expected at least one, and each once")
            if name in ("dims", "widths", "pretraining") and sorted(some) != list(some):
                raise ConfigError(f"{name} are {some!r}; expected them to grow")
            for number in some if name in ("dims", "ranks", "widths", "pretraining") else ():
                check_int(name, number, 1)
        for name in ("steps", "search_steps", "seeds", "few_seeds", "batch", "test_windows", "valid_windows"):
            check_int(name, getattr(self, name), 1)
        for rate in self.rates:
            check_float("rate", rate, 0, math.inf, open_low=True)


QUICK = {"targets": ("folio",), "dims": (342, 5472), "ranks": (1,), "widths": (32,), "pretraining": (5,),
         "rates": (2.0,), "steps": 5, "search_steps": 1, "seeds": 1, "few_seeds": 1, "batch": 2,
         "test_windows": 8, "valid_windows": 4}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One training from one start, or none: the start as it is."""

    kind: str  # "start", "search" or "final"
    plan: Plan
    target: str
    width: int = BASE
    pretrained: int = 0  # steps, unless the start is the plan's base
    method: str = "full"  # or "subspace", "said" or "lora"
    size: int = 0  # d, or the rank of LoRA
    rate: float = 0.0
    seed: int = 0
    texts: tuple[str, ...] = ()  # the digests of the texts

    @property
    def id(self) -> str:
        """A short name derived from the content."""
        return harness.id_of(asdict(self))

    @property
    def steps(self) -> int:
        """Training steps; digits take more."""
        steps = self.plan.search_steps if self.kind == "search" else self.plan.steps
        return steps * LONGER if self.target == DIGITS else steps


# ---- one run


def work(run: Run, inputs: Inputs) -> Row:
    """Do one run and return its row."""
    return harness.row_of(run, task(run, inputs).source, lambda: measured(run, inputs))


def task(run: Run, inputs: Inputs) -> Text | Images:
    """What a run learns."""
    plan = run.plan
    if run.target == DIGITS:
        return Images(digits())
    counts = {"valid": plan.valid_windows, "test": plan.test_windows}
    return Text(inputs.texts[run.target], plan.batch, counts)


def start(run: Run, inputs: Inputs) -> Any:
    """θ0, frozen; nobody may change it."""
    if run.target == DIGITS:
        return random_vit()
    if run.width == BASE:
        return inputs.base
    return pretrain.pretrained(run.width, run.pretrained, run.plan.batch, inputs.texts[OWN])


def measured(run: Run, inputs: Inputs) -> Row:
    """The validation loss of a search; of all else loss and accuracy on test, and ΔW's effective rank."""
    learns, before = task(run, inputs), start(run, inputs)
    model = before if run.kind == "start" else learned(run, inputs)
    plain = model.moved()[0] if isinstance(model, Subspace) else model
    row: Row = {"parameters": size(before if run.kind == "start" else trained(model))}
    if run.kind == "search":
        return row | {"valid": learns.loss(plain, "valid")}
    return row | {
        "test": learns.loss(plain, "test"),
        "accuracy": learns.accuracy(plain),
        "rank": rank(run, plain, before),
    }


def prepared(run: Run, inputs: Inputs) -> Any:
    """A copy of the start with all that the run trains; ConfigError for a size that does not fit."""
    model, rng = copy.deepcopy(start(run, inputs)), np.random.default_rng([run.seed, 0])
    if run.method in ("subspace", "said"):
        return subspace(model, run.size, rng=rng, scales=run.method == "said")
    if run.method == "lora":
        inject(model, LoraConfig(run.size, SCALE * run.size), rng=rng)
    else:
        unfreeze(model)
    return model


def learned(run: Run, inputs: Inputs) -> Any:
    """The model after the training of the run; runs of a seed see the same batches."""
    model = prepared(run, inputs)
    optimizer = AdamW(run.rate / math.sqrt(size(trained(model))), betas=(0.9, 0.99))
    learn(model, task(run, inputs).drawn(np.random.default_rng([run.seed, 1])), optimizer, run.steps)
    return model


def rank(run: Run, model: Any, before: Any) -> float:
    """The effective rank of ΔW over the largest it can have, median of all linear maps; a start: of noise."""
    rng = np.random.default_rng(0)
    shapes = {path: p.data.shape for path, p in named_params(before).items() if "_proj" in path}
    if run.kind == "start":
        spectra = {path: noise_spectrum(some, rng, draws=1) for path, some in shapes.items()}
    else:
        found = spectrum(model) if run.method == "lora" else spectrum_between(before, model)
        spectra = {path: found[path.removesuffix(".weight")] for path in shapes}
    return float(np.median([effective_rank(s) / min(shapes[path]) for path, s in spectra.items()]))


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

    UnsupportedError without the extra `vision`, before any run: no folder is left with half of the rows.
    ConfigError for a width or rank that cannot be; other errors as in `harness.open_store`, and InputError
    for a text that is too short.
    """
    digits()  # refuses
    inputs = harness.read_inputs(plan.base, dict.fromkeys((*plan.targets, OWN)))
    parts = [
        (starts, [cell for one in starts for cell in methods(one, inputs)])
        for starts in (list(grid(plan, inputs)), [Run("start", plan, DIGITS, SHAPE.hidden_size)])
    ]
    with harness.open_store(
        out, work, inputs, asdict(plan), FORM, jobs=jobs, dask=dask, progress=progress
    ) as store:
        for starts, searches in parts:
            store.finish(starts)
            rates = harness.chosen_rates(
                store, dict.fromkeys(searches, plan.rates), lambda cell, rate: replace(cell, rate=rate),
                STEP, EDGES,
            )  # fmt: skip
            store.finish(
                replace(cell, kind="final", rate=rate, seed=seed)
                for cell, rate in rates.items()
                for seed in range(plan.few_seeds if cell.pretrained else plan.seeds)
            )
        return store.close()


def grid(plan: Plan, inputs: Inputs) -> Iterator[Run]:
    """Every start on a text: base and random weights on each, bases that are pretrained here on the first."""
    first, *_ = plan.targets
    *narrow, width = plan.widths
    *_, most = plan.pretraining
    short = [(width, steps) for steps in plan.pretraining] + [(some, most) for some in narrow]
    for target in plan.targets:
        digests = tuple(inputs.texts[name].digest for name in (target, OWN))
        for some, steps in [(BASE, 0), (width, 0), *(short if target == first else [])]:
            yield Run("start", plan, target, some, steps, texts=digests)


def methods(start: Run, inputs: Inputs) -> Iterator[Run]:
    """The searches from one start, without a rate: all weights, each d below their number, perhaps more."""
    plan, full = start.plan, replace(start, kind="search", seed=SEARCH_SEED)
    if start.target == DIGITS:
        dims = [*DIMS]
    else:
        parameters = size(inputs.base if start.width == BASE else blank(pretrain.shape(start.width)))
        dims = [d for d in plan.dims if d < parameters]
    sizes = {"subspace": dims}
    if start.width == BASE and start.target == plan.targets[0]:
        sizes |= {"said": dims, "lora": [*plan.ranks]}
    yield full
    for method, some in sizes.items():
        for number in some:
            cell = replace(full, method=method, size=number)
            if start.width == BASE:  # others need pretraining first
                prepared(cell, inputs)  # refuses what does not fit, before any run
            yield cell


SHARE, COUNT = forms.number(0, 1), {"parameters": forms.whole()}
RESULT = {"test": LOSS, "accuracy": SHARE, "rank": SHARE} | COUNT
FORM = harness.form_of({"start": RESULT, "search": {"valid": LOSS} | COUNT, "final": RESULT})

"""Which scale, and which learning rate? alpha / r, alpha / sqrt(r) and alpha = 2r, each at its own best rate.

    s = 2 m / r (alpha = 2m)      s = 2 sqrt(m / r) (rsLoRA, alpha = 2 sqrt(m))      s = 2 (alpha = 2r)

Hu et al. 2021; Kalajdzievski 2023 (rsLoRA); Hayou et al. 2024 (LoRA+); Schulman et al. 2025 (rates). All
scales are equal at a middle rank m, so the rate that is best there is a fair one for all. For every scale and
rank, for LoRA+ at the middle rank and for full fine-tuning, runs with a seed of their own choose the learning
rate on a validation split. Then each seed is trained at that rate and, without LoRA+, at the middle rank's,
and measured on the test split. To Adam, s / q with B q times as fast is the same training: rsLoRA is LoRA
whose B learns faster at high ranks, and LoRA+ is LoRA with a larger alpha.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from ..errors import ConfigError, check_float, check_int
from ..formats import forms
from ..lora import inject
from ..methods.lora_config import LoraConfig
from ..model import Llama
from ..optim import AdamW, lora_plus
from ..tree import size, trained, unfreeze
from . import harness
from .harness import LOSS, SEARCH_SEED, Inputs, Progress, Row, Store
from .recipe import drawn, learn, loss_on

STEP = 2.0  # factor between two rates, also beyond an edge
EDGES = 4  # how often the search may extend
SCALE = 2.0  # s at the middle rank
SCALINGS: dict[str, Callable[[float], float]] = {  # name -> s over that at the middle rank m, from m / r
    "alpha / r": lambda x: x,
    "alpha / √r": math.sqrt,
    "alpha = 2r": lambda x: 1.0,
}


@dataclass(frozen=True)
class Plan:
    """How each rank and scale is trained. ConfigError for an empty grid or an invalid number."""

    target: str = "folio"
    base: str = "base"
    ranks: tuple[int, ...] = (1, 4, 16, 64, 96)
    middle: int = 16
    ratios: tuple[float, ...] = (4.0, 16.0)  # of LoRA+, the rate of B over that of A
    rates: tuple[float, ...] = (1e-3, 2e-3, 4e-3, 8e-3, 16e-3, 32e-3)  # where the searches start
    full_rates: tuple[float, ...] = (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3)
    steps: int = 150
    seeds: int = 5
    batch: int = 8
    test_windows: int = 256
    valid_windows: int = 128

    def __post_init__(self) -> None:
        for r in self.ranks:
            check_int("rank", r, 1)
        if self.middle not in self.ranks or list(self.ranks) != sorted({*self.ranks}) or len(self.ranks) < 2:
            raise ConfigError(
                f"ranks are {', '.join(map(str, self.ranks))} and the middle one is {self.middle}; "
                "expected two ranks or more, each once, in order, and the middle one among them"
            )
        if not self.rates or not self.full_rates:
            raise ConfigError("the grid is empty; expected a learning rate for LoRA and for all weights")
        for name in ("steps", "seeds", "batch", "test_windows", "valid_windows"):
            check_int(name, getattr(self, name), 1)
        for number in (*self.rates, *self.full_rates, *self.ratios):
            check_float("a learning rate or a ratio", number, 0, math.inf, open_low=True)


QUICK = {"ranks": (4, 16), "ratios": (16.0,), "rates": (8e-3, 16e-3), "full_rates": (1e-3, 2e-3),
         "steps": 5, "seeds": 1, "batch": 4, "test_windows": 8, "valid_windows": 4}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One training, or none: the base as it is."""

    kind: str  # "base", "search" or "final"
    plan: Plan
    rank: int = 0  # 0: all weights
    scale: float = 0.0  # s
    ratio: float = 1.0  # of LoRA+
    rate: float = 0.0  # of A and of all else but B
    seed: int = 0
    text: str = ""  # the digest of the text

    @property
    def id(self) -> str:
        """A short name derived from the content."""
        return harness.id_of(asdict(self))


def scale_of(scaling: str, rank: int, plan: Plan) -> float:
    """s of a scaling at a rank."""
    return SCALE * SCALINGS[scaling](plan.middle / rank)


# ---- one run


def work(run: Run, inputs: Inputs) -> Row:
    """Do one run and return its row."""
    return harness.row_of(run, inputs.texts[run.plan.target].source, lambda: measured(run, inputs))


def measured(run: Run, inputs: Inputs) -> Row:
    """The validation loss of a search or the test loss of all else, and the count of trained parameters."""
    plan, text = run.plan, inputs.texts[run.plan.target]
    model = inputs.base if run.kind == "base" else learned(run, inputs)
    split, windows = ("valid", plan.valid_windows) if run.kind == "search" else ("test", plan.test_windows)
    return {split: loss_on(model, text, split, windows), "parameters": size(trained(model))}


def prepared(run: Run, inputs: Inputs) -> Llama:
    """A copy of the base, ready for the training of the run."""
    model = copy.deepcopy(inputs.base)
    if run.rank:
        inject(model, LoraConfig(run.rank, run.scale * run.rank), rng=np.random.default_rng([run.seed, 0]))
    else:
        unfreeze(model)
    return model


def learned(run: Run, inputs: Inputs) -> Llama:
    """The model after the training of the run; runs of a seed see the same batches."""
    plan, model = run.plan, prepared(run, inputs)
    rng = np.random.default_rng([run.seed, 1])
    optimizer = AdamW(run.rate, betas=(0.9, 0.99), rate=lora_plus(run.ratio))
    learn(model, drawn(inputs.texts[plan.target], rng, plan.batch), optimizer, plan.steps)
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

    ConfigError for a rank that is too large for the base; other errors as in `harness.open_store`, and
    InputError for a text that is too short.
    """
    inputs = harness.read_inputs(plan.base, (plan.target,))
    searches = grid(plan, inputs.texts[plan.target].digest)
    for cell in searches:
        prepared(cell, inputs)  # refuses a rank that does not fit, before any run
    with harness.open_store(
        out, work, inputs, asdict(plan), FORM, jobs=jobs, dask=dask, progress=progress
    ) as store:
        store.finish([Run("base", plan, text=searches[0].text)])
        best = chosen_rates(searches, store)
        (middle,) = (cell for cell in searches if (cell.rank, cell.ratio) == (plan.middle, 1))
        store.finish(
            replace(cell, kind="final", rate=rate, seed=seed)
            for cell in searches
            for rate in (best[cell], best[middle] if cell.rank and cell.ratio == 1 else best[cell])
            for seed in range(plan.seeds)
        )
        return store.close()


def grid(plan: Plan, text: str) -> list[Run]:
    """One search without a rate for all weights, for each scale of each rank, and for each ratio of LoRA+."""
    full = Run("search", plan, seed=SEARCH_SEED, text=text)
    lora = [
        replace(full, rank=r, scale=scale_of(scaling, r, plan)) for scaling in SCALINGS for r in plan.ranks
    ]
    plus = [replace(full, rank=plan.middle, scale=SCALE, ratio=ratio) for ratio in plan.ratios]
    return [*dict.fromkeys([full, *lora, *plus])]  # the scales are equal at the middle rank


def chosen_rates(searches: list[Run], store: Store) -> dict[Run, float]:
    """The learning rate of every cell; LoRA+ starts where the geometric mean of A's and B's is LoRA's."""
    starts = {
        cell: [rate / math.sqrt(cell.ratio) for rate in some]
        for cell in searches
        for some in [cell.plan.rates if cell.rank else cell.plan.full_rates]
    }
    return harness.chosen_rates(store, starts, lambda cell, rate: replace(cell, rate=rate), STEP, EDGES)


TESTED = {"test": LOSS, "parameters": forms.whole()}
SEARCHED = {"valid": LOSS, "parameters": forms.whole()}
FORM = harness.form_of({"base": TESTED, "search": SEARCHED, "final": TESTED})

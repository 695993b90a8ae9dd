"""Does the start of LoRA matter? Nine starts of A and B, each trained at its own best learning rate.

    one zero     B zero, A uniform or Gaussian; A zero, B random: ΔW = 0, and one factor has a gradient
    both zero    ΔW = 0, and dB = s dYᵀ X Aᵀ and dA = s Bᵀ dYᵀ X are zero for ever
    both random  ΔW = s B A is not zero: training does not begin at the base
    taken off    PiSSA, OLoRA and LoRA-GA: ΔW = s (B A - B₀ A₀), zero at the start (methods/starts.py)

Hu et al. 2021, section 4.1; Hayou et al. 2024 (which factor is zero); Meng et al., Büyükakyüz and Wang et al.
2024. The baseline of the starts taken off has PiSSA's singular values along random directions. Runs with a
seed of their own choose the learning rate of each start on a validation split. Then each seed is trained at
that rate and at the usual start's, and measured on the test split. All starts of a seed see the same batches,
whose losses are kept: both zero, which never leaves the base, tells the base's.
"""

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from ..adapters import pairs
from ..backend import Array, to_device, uniform, xp
from ..data.batching import Batch
from ..errors import ConfigError, check_float, check_int
from ..formats import forms
from ..lora import inject
from ..methods.lora_config import LoraConfig
from ..methods.starts import Start, StartConfig, lora_ga, olora, pissa, weight_gradients
from ..model import Llama
from ..optim import AdamW, global_norm
from ..tree import replica, size, trained, unfreeze
from . import harness
from .harness import LOSS, SEARCH_SEED, SIZE, Inputs, Progress, Row
from .recipe import drawn, learn, loss_on

STEP = 2.0  # factor between two rates, also beyond an edge
EDGES = 4  # how often the search may extend
USUAL, STUCK, FULL = "B zero", "both zero", "all weights"


@dataclass(frozen=True)
class Plan:
    """How every start is trained. ConfigError for an empty grid or an invalid number."""

    target: str = "folio"
    base: str = "base"
    rank: int = 8
    alpha: float = 16.0
    rates: tuple[float, ...] = (1e-3, 2e-3, 4e-3, 8e-3, 16e-3, 32e-3)  # where the searches start
    full_rates: tuple[float, ...] = (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3)
    steps: int = 150
    seeds: int = 5
    batch: int = 8
    test_windows: int = 128
    valid_windows: int = 64

    def __post_init__(self) -> None:
        if not self.rates or not self.full_rates:
            raise ConfigError("the grid is empty; expected a learning rate for LoRA and for all weights")
        for name in ("rank", "steps", "seeds", "batch", "test_windows", "valid_windows"):
            check_int(name, getattr(self, name), 1)
        for number in (self.alpha, *self.rates, *self.full_rates):
            check_float("alpha or a learning rate", number, 0, math.inf, open_low=True)


QUICK = {"rates": (2e-3, 4e-3, 8e-3), "full_rates": (1e-3, 2e-3, 4e-3), "steps": 4, "seeds": 1, "batch": 2,
         "test_windows": 8, "valid_windows": 4}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One training, or none: the base as it is."""

    kind: str  # "base", "search" or "final"
    plan: Plan
    start: str = ""  # one of STARTS, or FULL
    rate: float = 0.0
    seed: int = 0
    text: str = ""  # the digest of the text

    @property
    def id(self) -> str:
        """A short name derived from the content."""
        return harness.id_of(asdict(self))


# ---- the starts


def of_one_gradient(run: Run, inputs: Inputs, rng: np.random.Generator) -> Start:
    """LoRA-GA with the gradient of one batch, drawn for it."""
    return lora_ga(weight_gradients(inputs.base, *next(batches(run, inputs, 2))))


def in_random_directions(run: Run, inputs: Inputs, rng: np.random.Generator) -> Start:
    """PiSSA's singular values along directions that say nothing of W."""

    def start(path: str, W: Array, r: int, s: float) -> tuple[Array, Array]:
        B, _ = pissa(path, W, r, s)
        U, V = (to_device(np.linalg.qr(rng.standard_normal((n, r)))[0]) for n in W.shape)
        root = xp.sqrt(xp.einsum("or,or->r", B, B))
        return U * root, (V * root).T

    return start


PLAIN = (USUAL, "B zero (Gaussian A)", "A zero", "both random", STUCK)
TAKEN_OFF: dict[str, Callable[[Run, Inputs, np.random.Generator], Start]] = {
    "PiSSA": lambda *_: pissa,
    "OLoRA": lambda *_: olora,
    "LoRA-GA": of_one_gradient,
    "random directions": in_random_directions,
}
STARTS = (*PLAIN, *TAKEN_OFF)


def prepared(run: Run, inputs: Inputs) -> Llama:
    """A copy of the base, ready for the training of the run."""
    plan, model, rng = run.plan, copy.deepcopy(inputs.base), np.random.default_rng([run.seed, 0])
    if run.start == FULL:
        unfreeze(model)
        return model
    usual = LoraConfig(plan.rank, plan.alpha, init="gaussian" if "Gaussian" in run.start else "kaiming")
    if run.start in TAKEN_OFF:
        inject(model, StartConfig(usual, TAKEN_OFF[run.start](run, inputs, rng)), rng=rng)
        return model
    inject(model, usual, rng=rng)
    for pair in pairs(model).values():
        A, B = pair.A, pair.B
        if run.start in ("A zero", "both random"):
            B.data = uniform(rng, B.shape, 1 / math.sqrt(B.shape[1]), B.dtype)
        if run.start in ("A zero", STUCK):
            A.data = xp.zeros_like(A.data)
    return model


# ---- one run


def batches(run: Run, inputs: Inputs, draw: int) -> Iterator[Batch]:
    """The batches of a seed, the same for all starts."""
    return drawn(inputs.texts[run.plan.target], np.random.default_rng([run.seed, draw]), run.plan.batch)


def work(run: Run, inputs: Inputs) -> Row:
    """Do one run and return its row."""
    return harness.row_of(run, inputs.texts[run.plan.target].source, lambda: measured(run, inputs))


def measured(run: Run, inputs: Inputs) -> Row:
    """The validation loss of a search; of a seed the test loss before and after, and what lies between."""
    plan, text = run.plan, inputs.texts[run.plan.target]
    if run.kind == "base":
        return {"test": loss_on(inputs.base, text, "test", plan.test_windows)}
    model, found = prepared(run, inputs), {}
    if run.kind == "final":
        found = {
            "start": loss_on(model, text, "test", plan.test_windows),
            "gradients": gradient_norms(model, next(batches(run, inputs, 1))),
        }
    losses = learn(model, batches(run, inputs, 1), AdamW(run.rate, betas=(0.9, 0.99)), plan.steps)
    found["parameters"] = size(trained(model))
    if run.kind == "search":
        return found | {"valid": loss_on(model, text, "valid", plan.valid_windows)}
    return found | {"losses": losses, "test": loss_on(model, text, "test", plan.test_windows)}


def gradient_norms(model: Llama, batch: Batch) -> dict[str, float]:
    """The norm of all dA and of all dB before the first step; of neither where all weights are trained."""
    model = replica(model)
    _, back = model.loss(*batch, train=True)
    back()
    params = trained(model)
    some = {name: {path: p for path, p in params.items() if path.endswith(f".{name}")} for name in "AB"}
    return {name: global_norm(group) for name, group in some.items() if group}


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
    digest = inputs.texts[plan.target].digest
    cells = {start: Run("search", plan, start, seed=SEARCH_SEED, text=digest) for start in (FULL, *STARTS)}
    for cell in cells.values():
        prepared(cell, inputs)  # refuses a rank that does not fit, before any run
    with harness.open_store(
        out, work, inputs, asdict(plan), FORM, jobs=jobs, dask=dask, progress=progress
    ) as store:
        store.finish([Run("base", plan, text=digest)])
        rates = harness.chosen_rates(
            store,
            {start: plan.full_rates if start == FULL else plan.rates for start in cells if start != STUCK},
            lambda start, rate: replace(cells[start], rate=rate), STEP, EDGES,
        )  # fmt: skip
        usual = rates[USUAL]
        store.finish(
            replace(cells[start], kind="final", rate=rate, seed=seed)
            for start in cells
            for rate in ([rates[FULL]] if start == FULL else [rates.get(start, usual), usual])
            for seed in range(plan.seeds)
        )
        return store.close()


FORM = harness.form_of({
    "base": {"test": LOSS},
    "search": {"valid": LOSS, "parameters": forms.whole()},
    "final": {
        "start": LOSS, "gradients": forms.named(SIZE), "losses": forms.several(LOSS, least=1), "test": LOSS,
        "parameters": forms.whole(),
    },
})  # fmt: skip

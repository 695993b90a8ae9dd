"""Subspaces: the directions that adapters share across ranks, seeds and texts, and those of ΔW in W.

    φ(i, j) = |U_iᵀ V_j|² / min(i, j)        amplification = |ΔW| / |Uᵀ W V|        (Frobenius norms)

Hu et al. 2021, sections 7.2 and 7.3. Each seed trains an adapter of every rank on one text, in the same
batches; one more of the largest rank in other batches; and one on another text, which shows what is common
to all adapters of this base. All starts are independent. The paper compares the right singular vectors of A.
Those of ΔW do not depend on how ΔW is split into B and A, so both its sides are compared, too. Short runs
choose the learning rate of each rank on a validation split. Each seed is one row.
"""

import copy
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..backend import xp
from ..errors import ConfigError, check_float, check_int, short
from ..formats import forms
from ..lora import active, inject
from ..methods.lora_config import LoraConfig
from ..model import Llama
from ..optim import AdamW
from ..spectra import amplification, norm, similarity, singular_values, thin_svd
from ..tree import get
from . import harness
from .harness import LOSS, SEARCH_SEED, SIZE, Inputs, Progress, Row
from .recipe import drawn, learn, loss_on

SIDES = ("A", "right", "left")  # right singular vectors of A, and the right and left ones of ΔW
PAIRS = ("ranks", "seeds", "texts")  # what the largest adapter is compared with
KEYS = ("factor", "random", "emphasis")  # of ΔW against W


@dataclass(frozen=True)
class Plan:
    """How the adapters are trained and measured. ConfigError for ranks or numbers that are invalid."""

    target: str = "folio"
    other: str = "kjv"  # the text of the control
    base: str = "base"
    ranks: tuple[int, ...] = (4, 8, 64)  # the last two are compared
    alpha: float = 16.0
    rates: tuple[float, ...] = (3e-3, 1e-2, 3e-2)
    steps: int = 300
    search_steps: int = 100
    seeds: int = 5
    batch: int = 8
    test_windows: int = 128
    valid_windows: int = 64

    def __post_init__(self) -> None:
        for r in self.ranks:
            check_int("rank", r, 1)
        if len(self.ranks) < 2 or sorted(set(self.ranks)) != list(self.ranks):
            raise ConfigError(f"ranks are {short(self.ranks)}; expected two or more, each above the last")
        if not self.rates or self.other == self.target:
            raise ConfigError(
                "the grid is empty; expected two different texts and at least one learning rate"
            )
        for name in ("steps", "search_steps", "seeds", "batch", "test_windows", "valid_windows"):
            check_int(name, getattr(self, name), 1)
        for rate in (self.alpha, *self.rates):
            check_float("alpha or a learning rate", rate, 0, math.inf, open_low=True)


QUICK = {"rates": (1e-2,), "steps": 20, "search_steps": 5, "seeds": 1, "batch": 4,
         "test_windows": 8, "valid_windows": 4}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One cell: the search of a learning rate, or all that a seed measures."""

    kind: str  # "search" or "final"
    plan: Plan
    seed: int
    rates: tuple[tuple[int, float], ...]  # rank -> its learning rate
    texts: tuple[str, ...] = field(default=())  # the digests of the texts

    @property
    def id(self) -> str:
        """A short name derived from the content."""
        return harness.id_of(asdict(self))


# ---- one run


def work(run: Run, inputs: Inputs) -> Row:
    """Do one run and return its row."""
    texts = (run.plan.target, run.plan.other)
    source = "; ".join(inputs.texts[text].source for text in texts)
    return harness.row_of(run, source, lambda: (searched if run.kind == "search" else measured)(run, inputs))


def learned(run: Run, inputs: Inputs, rank: int, steps: int, text: str | None = None, draw: int = 0) -> Llama:
    """A copy of the base with an adapter of that rank, trained on the target or another text.

    The start depends on seed, draw and rank, the batches on seed and draw.
    """
    plan, model = run.plan, copy.deepcopy(inputs.base)
    start, order = (np.random.default_rng([run.seed, draw, *more]) for more in ((0, rank), (1, 0)))
    inject(model, LoraConfig(rank, plan.alpha), rng=start)
    batches = drawn(inputs.texts[text or plan.target], order, plan.batch)
    learn(model, batches, AdamW(dict(run.rates)[rank], betas=(0.9, 0.99)), steps)
    return model


def loss(model: Llama, run: Run, inputs: Inputs, split: str) -> float:
    """On the target, in nats per character; NonFiniteError if it is not a number."""
    count = run.plan.test_windows if split == "test" else run.plan.valid_windows
    return loss_on(model, inputs.texts[run.plan.target], split, count)


def searched(run: Run, inputs: Inputs) -> Row:
    """The validation loss of one rank after a short run."""
    ((rank, _),) = run.rates
    return {"valid": loss(learned(run, inputs, rank, run.plan.search_steps), run, inputs, "valid")}


def measured(run: Run, inputs: Inputs) -> Row:
    """All that one seed gives: losses, φ for each pair of adapters, and every ΔW against W."""
    plan = run.plan
    models = {rank: learned(run, inputs, rank, plan.steps) for rank in plan.ranks}
    *_, small, large = plan.ranks
    others = {
        "ranks": models[small],
        "seeds": learned(run, inputs, large, plan.steps, draw=1),
        "texts": learned(run, inputs, large, plan.steps, plan.other, draw=2),
    }
    first = directions(models[large])
    losses = {str(rank): loss(model, run, inputs, "test") for rank, model in models.items()}
    return {
        "losses": {"base": loss(inputs.base, run, inputs, "test")} | losses,
        "shapes": {path: list(get(inputs.base, f"{path}.weight").shape) for path in first},
        "similarity": {pair: overlaps(directions(model), first) for pair, model in others.items()},
        "weights": {str(rank): against_base(model, inputs.base) for rank, model in models.items()},
    }


Directions = dict[str, dict[str, Any]]  # path -> side -> orthonormal columns, the strongest first


def directions(model: Llama) -> Directions:
    """The singular vectors of every adapter, right (I, r) and left (O, r), in float64."""
    found = {}
    for path, adapter in active(model).items():
        pair: Any = adapter.low_rank
        U, _, Vt = thin_svd(pair.B.data, pair.A.data, pair.scale)
        A = xp.linalg.svd(pair.A.data.astype(xp.float64), full_matrices=False)[2]
        found[path] = dict(zip(SIDES, (A.T, Vt.T, U), strict=True))
    return found


def counts(rank: int) -> list[int]:
    """The powers of two up to a rank: the i and j of φ that are kept."""
    return [1 << n for n in range(rank.bit_length())]


def overlaps(one: Directions, other: Directions) -> dict[str, dict[str, list[list[float]]]]:
    """Path -> side -> φ(i, j) at the `counts` of both ranks, to four digits."""

    def kept(U: Any, V: Any) -> list[list[float]]:
        i, j = ([n - 1 for n in counts(X.shape[1])] for X in (U, V))
        return np.round(similarity(U, V)[np.ix_(i, j)], 4).tolist()

    return {
        path: {side: kept(U, other[path][side]) for side, U in sides.items()} for path, sides in one.items()
    }


def against_base(model: Llama, base: Llama) -> dict[str, dict[str, float]]:
    """Path -> the amplification of ΔW and of random directions, and |Uᵀ W V| over that of W's own first r."""
    found = {}
    for path, adapter in active(model).items():
        pair: Any = adapter.low_rank
        U, S, Vt = thin_svd(pair.B.data, pair.A.data, pair.scale)
        W = get(base, f"{path}.weight").dense().astype(xp.float64)
        along, most = float(xp.linalg.norm(U.T @ W @ Vt.T)), norm(singular_values(W)[: len(S)])
        found[path] = dict(zip(KEYS, (*amplification(W, U, S, Vt), along / most), strict=True))
    return found


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

    Errors as in `harness.open_store`; ConfigError for a rank that does not fit, InputError for a short text.
    """
    inputs = harness.read_inputs(plan.base, (plan.target, plan.other))
    digests = tuple(text.digest for text in inputs.texts.values())
    with harness.open_store(
        out, work, inputs, asdict(plan), FORM, jobs=jobs, dask=dask, progress=progress
    ) as store:
        rates = harness.chosen_rates(
            store, dict.fromkeys(plan.ranks, plan.rates),
            lambda rank, rate: Run("search", plan, SEARCH_SEED, ((rank, rate),), digests),
        )  # fmt: skip
        best = tuple(rates.items())
        store.finish(Run("final", plan, seed, best, digests) for seed in range(plan.seeds))
        return store.close()


PHI = forms.several(forms.several(forms.number(0, 1), least=1), least=1)
MEASURED = {
    "losses": forms.named(LOSS),
    "shapes": forms.named(forms.tuple_of(forms.whole(1), forms.whole(1))),
    "similarity": forms.record(dict.fromkeys(PAIRS, forms.named(forms.record(dict.fromkeys(SIDES, PHI))))),
    "weights": forms.named(forms.named(forms.record(dict.fromkeys(KEYS, SIZE)))),
}
FORM = harness.form_of({"search": {"valid": LOSS}, "final": MEASURED})

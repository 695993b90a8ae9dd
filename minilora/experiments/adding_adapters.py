"""What is left of adapters that are added? One for each of three texts: summed, averaged, taken away.

    W + Σ w ΔW        w = 1 - t and t: interpolation; all w = λ: task arithmetic; w = -1: unlearning

Ilharco et al. 2022 (task arithmetic), Yadav et al. 2023 (TIES), Yu et al. 2023 (DARE). For each text, and
for all in turn (the joint adapter: as many steps on each text, the same rank), short runs choose the learning
rate on a validation split. Then each seed trains all four and measures the combinations on test splits, that
of the base's own text too. The scale λ of a method is chosen on validation splits. Each seed is one row.
"""

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain, combinations
from pathlib import Path
from typing import Any

import numpy as np

from ..adapters import disabled, remove, set_scale
from ..compose.combine import add_weighted_adapter
from ..errors import ConfigError, check_float, check_int
from ..formats import forms
from ..lora import inject
from ..methods.lora_config import LoraConfig
from ..model import Llama
from ..optim import AdamW
from . import harness
from .harness import LOSS, SEARCH_SEED, Inputs, Progress, Row
from .recipe import drawn, learn, loss_on

OWN = "shakespeare"  # the base's own text: what a combination costs there
JOINT = "joint"
TIMES = (0.25, 0.5, 0.75)  # between two adapters
SCALES = (0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0)
METHODS: dict[str, dict[str, Any]] = {  # name -> the options of `add_weighted_adapter`, but for svd's rank
    "linear": {"method": "linear"},
    "svd": {"method": "svd"},
    "magnitude": {"method": "magnitude", "density": 0.2},
    "ties": {"method": "ties", "density": 0.2},
    "dare": {"method": "dare", "density": 0.5},
    "peft_linear": {"method": "peft_linear"},
}


@dataclass(frozen=True)
class Plan:
    """How the adapters are trained and measured. ConfigError for an empty grid or an invalid number."""

    targets: tuple[str, ...] = ("folio", "kjv", "code")
    base: str = "base"
    rank: int = 8
    alpha: float = 16.0
    rates: tuple[float, ...] = (1.5e-3, 5e-3, 1.5e-2, 5e-2)
    steps: int = 100  # on each text
    search_steps: int = 30
    seeds: int = 5
    batch: int = 8
    test_windows: int = 48
    valid_windows: int = 16

    def __post_init__(self) -> None:
        if len(self.targets) < 2 or not self.rates:
            raise ConfigError("the grid is empty; expected at least two texts and one learning rate")
        for name in ("rank", "steps", "search_steps", "seeds", "batch", "test_windows", "valid_windows"):
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
    rates: tuple[tuple[str, float], ...]  # adapter -> its learning rate
    texts: tuple[str, ...] = field(default=())  # the digests of the texts

    @property
    def id(self) -> str:
        """A short name derived from the content."""
        return harness.id_of(asdict(self))


# ---- one run


def work(run: Run, inputs: Inputs) -> Row:
    """Do one run and return its row."""
    source = "; ".join(inputs.texts[target].source for target in run.plan.targets)
    return harness.row_of(run, source, lambda: (searched if run.kind == "search" else measured)(run, inputs))


def learned(model: Llama, name: str, rate: float, run: Run, inputs: Inputs, steps: int) -> None:
    """Train a new adapter of that name, on its text or (the joint one) on all in turn."""
    plan = run.plan
    targets = plan.targets if name == JOINT else (name,)
    inject(model, LoraConfig(plan.rank, plan.alpha), rng=np.random.default_rng([run.seed, 0]), name=name)
    rngs = (np.random.default_rng([run.seed, 1, i]) for i in range(len(targets)))
    streams = [
        drawn(inputs.texts[target], rng, plan.batch) for target, rng in zip(targets, rngs, strict=True)
    ]
    turns = chain.from_iterable(zip(*streams, strict=True))
    learn(model, turns, AdamW(rate, betas=(0.9, 0.99)), steps * len(targets))


def losses(model: Llama, run: Run, inputs: Inputs, split: str, texts: Sequence[str]) -> dict[str, float]:
    """Text -> loss in nats per character; NonFiniteError if one is not a number."""
    count = run.plan.test_windows if split == "test" else run.plan.valid_windows
    return {text: loss_on(model, inputs.texts[text], split, count) for text in texts}


def searched(run: Run, inputs: Inputs) -> Row:
    """The validation loss of one adapter after a short run, the mean over its texts."""
    ((name, rate),) = run.rates
    model = copy.deepcopy(inputs.base)
    learned(model, name, rate, run, inputs, run.plan.search_steps)
    texts = run.plan.targets if name == JOINT else (name,)
    return {"valid": float(np.mean([*losses(model, run, inputs, "valid", texts).values()]))}


def mixtures(targets: Sequence[str]) -> dict[str, dict[str, float]]:
    """Name -> weights of the combinations in the heat map."""
    found = {target: {target: 1.0} for target in targets}
    for r in range(2, len(targets) + 1):
        found |= {" + ".join(group): dict.fromkeys(group, 1.0) for group in combinations(targets, r)}
    found["mean of all"] = dict.fromkeys(targets, 1 / len(targets))
    return found | {f"- {target}": {target: -1.0} for target in targets}


def measured(run: Run, inputs: Inputs) -> Row:
    """All that one seed gives: losses of the combinations, on the way between two, and of each method."""
    plan, model = run.plan, copy.deepcopy(inputs.base)
    texts = (*plan.targets, OWN)
    for name, rate in run.rates:
        learned(model, name, rate, run, inputs, plan.steps)
    table = {JOINT: losses(model, run, inputs, "test", texts)}  # which was trained last
    with disabled(model):
        table["base"] = losses(model, run, inputs, "test", texts)
    for name, weights in mixtures(plan.targets).items():
        add_weighted_adapter(model, weights, "sum")
        table[name] = losses(model, run, inputs, "test", texts)
        remove(model, "sum")
    paths = {}
    for one, other in combinations(plan.targets, 2):
        path = []
        for t in TIMES:
            add_weighted_adapter(model, {one: 1 - t, other: t}, "sum")
            path.append([t, losses(model, run, inputs, "test", plan.targets)])
            remove(model, "sum")
        paths[f"{one} to {other}"] = path
    return {"losses": table, "paths": paths, "methods": dict(scaled(model, run, inputs))}


def scaled(model: Llama, run: Run, inputs: Inputs) -> Iterator[tuple[str, Row]]:
    """Method -> the scale that is best on validation splits, its test losses, its distance to the sum."""
    plan = run.plan
    for name, how in METHODS.items():
        rank = plan.rank if name == "svd" else None
        made = add_weighted_adapter(
            model, dict.fromkeys(plan.targets, 1.0), "sum", method=how["method"], rank=rank,
            density=how.get("density"), seed=run.seed,
        )  # fmt: skip
        valid = {}
        for scale in SCALES:
            set_scale(model, scale)
            valid[scale] = float(np.mean([*losses(model, run, inputs, "valid", plan.targets).values()]))
        best = min(SCALES, key=lambda scale: valid[scale])
        set_scale(model, best)
        found = losses(model, run, inputs, "test", (*plan.targets, OWN))
        ranks = [row.rank for row in made.rows]
        yield name, {"scale": best, "rank": max(ranks), "residual": made.relative, "losses": found}
        remove(model, "sum")


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

    Errors as in `harness.open_store`, and InputError for a text that is too short.
    """
    inputs = harness.read_inputs(plan.base, (*plan.targets, OWN))
    digests = tuple(text.digest for text in inputs.texts.values())
    with harness.open_store(
        out, work, inputs, asdict(plan), FORM, jobs=jobs, dask=dask, progress=progress
    ) as store:
        rates = harness.chosen_rates(
            store, dict.fromkeys((*plan.targets, JOINT), plan.rates),
            lambda name, rate: Run("search", plan, SEARCH_SEED, ((name, rate),), digests),
        )  # fmt: skip
        best = tuple(rates.items())
        store.finish(Run("final", plan, seed, best, digests) for seed in range(plan.seeds))
        return store.close()


BY_TEXT = forms.named(LOSS)
MEASURED = {
    "losses": forms.named(BY_TEXT),
    "paths": forms.named(forms.several(forms.tuple_of(forms.number(0, 1), BY_TEXT))),
    "methods": forms.named(
        forms.record({"scale": LOSS, "rank": forms.whole(1), "residual": LOSS, "losses": BY_TEXT})
    ),
}
FORM = harness.form_of({"search": {"valid": LOSS}, "final": MEASURED})

"""Does LoRA learn less, and forget less? The loss on a target against that on the text of pretraining.

    intruder: a left singular vector u of W + ΔW with  max over j of |cos(u, u_j of W)| < that of random ones

Biderman et al. 2024; Shuttleworth et al. 2024 (intruder dimensions). The learning rates of LoRA at every rank
(alpha = 2r, all linear maps) and of full fine-tuning are searched by validation loss on the target; every run
is measured on the text of pretraining, too. A rate buys learning with forgetting, so each seed is trained at
the best rate and at all lower ones: a front, on which two methods meet at an equal target loss. At the best
rate ΔW is looked at: its spectrum, and how many of the first singular vectors of W + ΔW are intruders, beside
those of a ΔW with the same singular values in random directions. Leaves out longer training.
"""

import copy
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from ..backend import Array, xp
from ..errors import ConfigError, check_float, check_int
from ..formats import forms
from ..lora import fuse, inject
from ..methods.lora_config import LoraConfig
from ..model import Llama
from ..optim import AdamW
from ..spectra import effective_rank, energy, intruder_threshold, intruders, norm, singular_values
from ..tree import named_params, size, trained, unfreeze
from . import harness
from .harness import LOSS, SEARCH_SEED, SIZE, Inputs, Progress, Row, Store
from .recipe import drawn, learn, loss_on

STEP = 2.0  # factor between two rates, also beyond an edge
EDGES = 3  # how often the search may extend
FIRST = 10  # singular vectors of W + ΔW that are looked at, as in Shuttleworth et al.


@dataclass(frozen=True)
class Plan:
    """What is trained, and how. ConfigError for an empty grid or an invalid number."""

    targets: tuple[str, ...] = ("folio", "code")  # near to the text of pretraining, and far from it
    own: str = "shakespeare"  # the text of pretraining
    base: str = "base"
    ranks: tuple[int, ...] = (1, 4, 16, 64)
    rates: tuple[float, ...] = (2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)  # of LoRA, to try first
    full_rates: tuple[float, ...] = (1.25e-4, 2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3)  # from below r = 1
    steps: int = 100
    seeds: int = 5
    batch: int = 8
    test_windows: int = 128
    valid_windows: int = 64

    def __post_init__(self) -> None:
        for r in self.ranks:
            check_int("rank", r, 1)
        if not self.ranks or list(self.ranks) != sorted({*self.ranks}):
            raise ConfigError(f"ranks are {', '.join(map(str, self.ranks))}; expected one or more that grow")
        if not (self.targets and self.rates and self.full_rates):
            raise ConfigError("the grid is empty; expected a target, and a learning rate of each method")
        if len({*self.targets, self.own}) <= len(self.targets):
            raise ConfigError(
                f"targets are {', '.join(self.targets)} and the text of pretraining is {self.own}; "
                "expected different texts"
            )
        for name in ("steps", "seeds", "batch", "test_windows", "valid_windows"):
            check_int(name, getattr(self, name), 1)
        for rate in (*self.rates, *self.full_rates):
            check_float("learning rate", rate, 0, math.inf, open_low=True)


QUICK = {"targets": ("folio",), "ranks": (1, 16), "rates": (8e-3, 1.6e-2), "full_rates": (1e-3, 2e-3),
         "steps": 5, "seeds": 1, "batch": 4, "test_windows": 8, "valid_windows": 4}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One training, or none: the base as it is."""

    kind: str  # "base", "search", "front" (below the best rate) or "final" (at it)
    plan: Plan
    target: str
    rank: int = 0  # 0: all weights
    rate: float = 0.0
    seed: int = 0
    texts: tuple[str, ...] = ()  # the digests of all targets and of the text of pretraining

    @property
    def id(self) -> str:
        """A short name derived from the content."""
        return harness.id_of(asdict(self))


# ---- one run


def work(run: Run, inputs: Inputs) -> Row:
    """Do one run and return its row."""
    source = "; ".join(inputs.texts[text].source for text in (run.target, run.plan.own))
    return harness.row_of(run, source, lambda: measured(run, inputs))


def measured(run: Run, inputs: Inputs) -> Row:
    """The losses on both texts, by split; of a final run also every ΔW against its W."""
    plan = run.plan
    model = inputs.base if run.kind == "base" else learned(run, inputs)
    splits = {"search": ["valid"], "base": ["valid", "test"]}.get(run.kind, ["test"])
    windows = {"valid": plan.valid_windows, "test": plan.test_windows}
    row: Row = {"parameters": size(trained(model))}
    for split in splits:
        for name, text in ((split, run.target), (f"own_{split}", plan.own)):
            row[name] = loss_on(model, inputs.texts[text], split, windows[split])
    if run.kind == "final":
        if run.rank:
            fuse(model)
        row["maps"] = changes(model, inputs.base, np.random.default_rng([run.seed, 2]))
    return row


def prepared(run: Run, inputs: Inputs) -> Llama:
    """A copy of the base, ready for the training of the run."""
    model = copy.deepcopy(inputs.base)
    if run.rank:
        inject(model, LoraConfig(run.rank, 2 * run.rank), rng=np.random.default_rng([run.seed, 0]))
    else:
        unfreeze(model)
    return model


def learned(run: Run, inputs: Inputs) -> Llama:
    """The model after the training of the run; runs of a seed see the same batches."""
    plan, model = run.plan, prepared(run, inputs)
    rng = np.random.default_rng([run.seed, 1])
    batches = drawn(inputs.texts[run.target], rng, plan.batch)
    learn(model, batches, AdamW(run.rate, betas=(0.9, 0.99)), plan.steps)
    return model


def changes(tuned: Llama, base: Llama, rng: np.random.Generator) -> dict[str, Row]:
    """Path of each linear map of the blocks -> what ΔW is, beside W and beside random directions.

    The spectrum of ΔW is kept as its effective rank and the energy of its first 1, 2, 4, ... directions; its
    size is relative to W. The models are plain.
    """
    after = named_params(tuned)
    found = {}
    for path, p in named_params(base).items():
        if path.endswith("_proj.weight"):
            W = p.dense().astype(xp.float64)
            delta = after[path].dense() - W
            s = singular_values(delta)
            share = energy(s)
            found[path.removesuffix(".weight")] = {
                "shape": list(W.shape),
                "size": norm(s) / norm(singular_values(W)),
                "effective_rank": effective_rank(s),
                "energy": [round(float(share[k - 1]), 4) for k in counts(len(s))],
                "intruders": intruding(W, delta),
                "random": intruding(W, turned(s, W.shape, rng)),
            }
    return found


def counts(n: int) -> list[int]:
    """The powers of two up to n: the directions whose energy is kept."""
    return [1 << i for i in range(n.bit_length())]


def intruding(W: Array, delta: Array) -> int:
    """How many of the first left singular vectors of W + ΔW resemble those of W no more than chance does."""
    return int((intruders(W, delta, FIRST) < intruder_threshold(W.shape[0], min(W.shape))).sum())


def turned(s: np.ndarray, shape: tuple[int, ...], rng: np.random.Generator) -> Array:
    """A matrix with these singular values in random directions."""
    U, V = (np.linalg.qr(rng.standard_normal((n, len(s))))[0] for n in shape)
    return xp.asarray((U * s) @ V.T)


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
    inputs = harness.read_inputs(plan.base, (*plan.targets, plan.own))
    texts = tuple(text.digest for text in inputs.texts.values())
    arms = [
        Run("search", plan, target, rank, seed=SEARCH_SEED, texts=texts)
        for target in plan.targets
        for rank in (0, *plan.ranks)
    ]
    for arm in arms:
        prepared(arm, inputs)  # refuses a rank that does not fit, before any run
    with harness.open_store(
        out, work, inputs, asdict(plan), FORM, jobs=jobs, dask=dask, progress=progress
    ) as store:
        store.finish(replace(arm, kind="base", seed=0) for arm in arms if not arm.rank)
        starts = {arm: arm.plan.rates if arm.rank else arm.plan.full_rates for arm in arms}
        best = harness.chosen_rates(store, starts, lambda arm, rate: replace(arm, rate=rate), STEP, EDGES)
        store.finish(
            replace(arm, kind="final" if rate == best[arm] else "front", rate=rate, seed=seed)
            for arm in arms
            for rate in searched(arm, store)
            if rate <= best[arm]
            for seed in range(plan.seeds)
        )
        return store.close()


def searched(arm: Run, store: Store) -> list[float]:
    """All learning rates that an arm was searched at, in order."""
    configs = [row["config"] for row in store.done.values()]
    key = "search", arm.target, arm.rank
    return sorted(c["rate"] for c in configs if (c["kind"], c["target"], c["rank"]) == key)


SHARE, COUNT = forms.number(0, 1), forms.whole(0, FIRST)
MAP = forms.record({
    "shape": forms.tuple_of(forms.whole(1), forms.whole(1)), "size": SIZE, "effective_rank": SIZE,
    "energy": forms.several(SHARE, least=1), "intruders": COUNT, "random": COUNT,
})  # fmt: skip
VALID, TEST = ({"parameters": forms.whole(), s: LOSS, f"own_{s}": LOSS} for s in ("valid", "test"))
FORM = harness.form_of(
    {"base": VALID | TEST, "search": VALID, "front": TEST, "final": TEST | {"maps": forms.named(MAP)}}
)

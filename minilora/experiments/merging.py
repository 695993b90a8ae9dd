"""Is a merge exact in the number format that the weights are stored in? What rounding W + ΔW loses.

    kept = <R(W + t ΔW) - W, t ΔW> / |t ΔW|²        lost = |R(W + t ΔW) - W - t ΔW| / |t ΔW|

R rounds to float32, bfloat16 or float16, and W is on that grid, as in a checkpoint. Where t ΔW is smaller
than half a unit in the last place of W, R gives W back: the adapter is gone. (Hu et al. 2021, section 4.1:
merging adds no latency; this asks what it costs in accuracy.) Each seed trains an adapter, whose learning
rate short runs choose on a validation split, and merges it times t. Beside it the habit of merging in place,
W <- R(W + ΔW), W <- R(W - ΔW), over and over with one ΔW, or with another each time (its columns moved on by
one); and this package's merge and unmerge. Each seed is one row.
"""

import copy
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..adapters import scales, set_scale
from ..backend import to_device, to_host
from ..errors import ConfigError, check_float, check_int
from ..formats import forms
from ..formats.safetensors import stored
from ..lora import active, fuse, inject, merge, unmerge
from ..methods.lora_config import LoraConfig
from ..model import Llama
from ..optim import AdamW
from ..tree import get, named_params
from . import harness
from .harness import LOSS, SEARCH_SEED, SIZE, Inputs, Progress, Row
from .recipe import drawn, learn, loss_on

DTYPES = ("float32", "bfloat16", "float16")  # of the stored weights
TIMES = (0.001, 0.01, 0.1, 1.0)  # t
CYCLES = (1, 10, 100, 1000)
STEP, EDGES = math.sqrt(10), 2  # of the search, beyond the first rates


@dataclass(frozen=True)
class Plan:
    """How the adapters are trained and measured. ConfigError for an empty grid or an invalid number."""

    target: str = "folio"
    base: str = "base"
    rank: int = 8
    alpha: float = 16.0
    rates: tuple[float, ...] = (3e-3, 1e-2, 3e-2)
    steps: int = 100
    search_steps: int = 30
    seeds: int = 5
    batch: int = 8
    test_windows: int = 128
    valid_windows: int = 32

    def __post_init__(self) -> None:
        if not self.rates:
            raise ConfigError("the grid is empty; expected at least one learning rate")
        for name in ("rank", "steps", "search_steps", "seeds", "batch", "test_windows", "valid_windows"):
            check_int(name, getattr(self, name), 1)
        for rate in (self.alpha, *self.rates):
            check_float("alpha or a learning rate", rate, 0, math.inf, open_low=True)


QUICK = {"rates": (1e-2,), "steps": 20, "search_steps": 5, "seeds": 1, "batch": 4,
         "test_windows": 8, "valid_windows": 4}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One adapter: the search of its learning rate, or all that a seed measures."""

    kind: str  # "search" or "final"
    plan: Plan
    seed: int
    rate: float
    text: str = ""  # the digest of the text

    @property
    def id(self) -> str:
        """A short name derived from the content."""
        return harness.id_of(asdict(self))


# ---- one run


def work(run: Run, inputs: Inputs) -> Row:
    """Do one run and return its row."""
    do = searched if run.kind == "search" else measured
    return harness.row_of(run, inputs.texts[run.plan.target].source, lambda: do(run, inputs))


def learned(run: Run, inputs: Inputs, steps: int) -> Llama:
    """The base with a trained adapter."""
    plan, model = run.plan, copy.deepcopy(inputs.base)
    inject(model, LoraConfig(plan.rank, plan.alpha), rng=np.random.default_rng([run.seed, 0]))
    batches = drawn(inputs.texts[plan.target], np.random.default_rng([run.seed, 1]), plan.batch)
    learn(model, batches, AdamW(run.rate, betas=(0.9, 0.99)), steps)
    return model


def searched(run: Run, inputs: Inputs) -> Row:
    """The validation loss after a short run."""
    plan, model = run.plan, learned(run, inputs, run.plan.search_steps)
    return {"valid": loss_on(model, inputs.texts[plan.target], "valid", plan.valid_windows)}


def measured(run: Run, inputs: Inputs) -> Row:
    """For each dtype: what a merge keeps and loses, the losses beside it, and how far W drifts."""
    model = learned(run, inputs, run.plan.steps)
    found: dict[str, dict[str, Any]] = {"merged": {}, "one": {}, "others": {}}
    for dtype in DTYPES:
        base = in_dtype(model, dtype)
        found["merged"][dtype] = [[t, merged_at(t, base, dtype, run, inputs)] for t in TIMES]
        found["one"][dtype], found["others"][dtype] = (pairs(drift(base, dtype, move)) for move in (0, 1))
    return found | {"unmerge": pairs(restored(model))}


def in_dtype(model: Llama, dtype: str) -> Llama:
    """A copy whose base is as it was written in that dtype; the adapter stays."""
    model = copy.deepcopy(model)
    for name, p in named_params(model).items():
        if not name.endswith((".A", ".B")):
            p.data = to_device(stored(to_host(p.data), dtype))
    return model


def changes(model: Llama) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Path -> W in its dtype and the active adapter's ΔW in float64, both (O, I)."""
    found = {}
    for path, adapter in active(model).items():
        low_rank: Any = adapter
        W = to_host(get(model, f"{path}.base.weight").data)
        found[path] = (W, to_host(low_rank.delta()).astype(np.float64))
    return found


def merged_at(t: float, base: Llama, dtype: str, run: Run, inputs: Inputs) -> dict[str, float]:
    """The size of t ΔW against W, shares kept and lost over all maps, and test losses merged and apart."""
    plan, text = run.plan, inputs.texts[run.plan.target]
    apart = copy.deepcopy(base)
    set_scale(apart, {path: t * s for path, s in scales(base).items()})
    model = copy.deepcopy(apart)
    fuse(model)
    size = wanted = kept = lost = 0.0
    for path, (W, delta) in changes(apart).items():
        weight = get(model, f"{path}.weight")
        weight.data = to_device(stored(to_host(weight.data), dtype))
        got = to_host(weight.data).astype(np.float64) - W
        size, wanted = size + squares(W), wanted + squares(delta)
        kept, lost = kept + float(np.sum(got * delta)), lost + squares(got - delta)
    return {
        "size": math.sqrt(wanted / size), "kept": kept / wanted, "lost": math.sqrt(lost / wanted),
        "test": loss_on(model, text, "test", plan.test_windows),
        "apart": loss_on(apart, text, "test", plan.test_windows),
    }  # fmt: skip


def squares(a: np.ndarray) -> float:
    """The sum of squares, in float64."""
    return float(np.sum(a.astype(np.float64) ** 2))


def pairs(values: list[float]) -> list[list[float]]:
    """The number of cycles beside each value."""
    return [[n, value] for n, value in zip(CYCLES, values, strict=True)]


def drift(base: Llama, dtype: str, move: int) -> list[float]:
    """|W_n - W| / |ΔW| over all maps, after CYCLES of adding ΔW in place and subtracting it again.

    Before each the columns of ΔW move on by `move`. Where they stay, W moves in the first cycle only
    (Reiser and Knuth 1975, "Evading the drift in floating-point addition").
    """
    away, size = [0.0] * len(CYCLES), 0.0
    for first, delta in changes(base).values():
        W, step = first, stored(delta.astype(np.float32), dtype)
        size += squares(delta)
        for n in range(1, CYCLES[-1] + 1):
            moved = np.roll(step, n * move, axis=1)
            W = stored(stored(W + moved, dtype) - moved, dtype)
            if n in CYCLES:
                away[CYCLES.index(n)] += squares(W - first)
    return [math.sqrt(x / size) for x in away]


def restored(model: Llama) -> list[float]:
    """The same of this package's `merge` and `unmerge`."""
    before, away = changes(copy.deepcopy(model)), []  # not the arrays that a write in place would change
    size = sum(squares(delta) for _, delta in before.values())
    for n in range(1, CYCLES[-1] + 1):
        merge(model)
        unmerge(model)
        if n in CYCLES:
            after = changes(model)
            away.append(math.sqrt(sum(squares(after[path][0] - W) for path, (W, _) in before.items()) / size))
    return away


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
    inputs = harness.read_inputs(plan.base, (plan.target,))
    text = inputs.texts[plan.target].digest
    with harness.open_store(
        out, work, inputs, asdict(plan), FORM, jobs=jobs, dask=dask, progress=progress
    ) as store:
        best = harness.chosen_rates(
            store, {"": plan.rates}, lambda _, rate: Run("search", plan, SEARCH_SEED, rate, text), STEP, EDGES
        )
        store.finish(Run("final", plan, seed, best[""], text) for seed in range(plan.seeds))
        return store.close()


MERGED = forms.record({"size": SIZE, "kept": LOSS, "lost": SIZE, "test": LOSS, "apart": LOSS})
AT = forms.tuple_of(*(forms.tuple_of(forms.number(t, t), MERGED) for t in TIMES))
AWAY = forms.tuple_of(*(forms.tuple_of(forms.whole(n, n), SIZE) for n in CYCLES))
MEASURED = {
    "merged": forms.record(dict.fromkeys(DTYPES, AT)),
    "one": forms.record(dict.fromkeys(DTYPES, AWAY)),
    "others": forms.record(dict.fromkeys(DTYPES, AWAY)),
    "unmerge": AWAY,
}
FORM = harness.form_of({"search": {"valid": LOSS}, "final": MEASURED})

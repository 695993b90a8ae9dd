"""Which matrices should be adapted? One budget of parameters, spread over few maps or over all.

    parameters = r Σ (O + I) over the adapted maps:  r = budget / Σ (O + I), to the nearest whole number

Hu et al. 2021, Table 5: 18 million parameters on one kind of attention map at r = 8, or on all four at r = 2.
Here also on the MLP and on all linear maps, where Schulman et al. 2025 find them better spent; on a text near
to the base's (the First Folio) and on one far from it (code). A run is one of the rank sweep, by its recipe
and its search of the learning rate, with finer steps. Leaves out ranks that differ among the maps of a set.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from ..analysis.count import ATTENTION, MLP, QV
from ..errors import ConfigError, check_float, check_int
from ..tree import size, trained
from . import harness, rank_sweep
from .harness import Inputs, Progress, Row, RowForm
from .rows import Run, check_row

SETS = {
    "Q": ("q_proj",), "K": ("k_proj",), "V": ("v_proj",), "O": ("o_proj",), "QV": QV, "QKVO": ATTENTION,
    "MLP": MLP, "all": ("all-linear",),
}  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """The budgets and how they are trained. ConfigError for an empty grid or an invalid number."""

    targets: tuple[str, ...] = ("folio", "code")
    budgets: tuple[int, ...] = (6144, 27648)  # in parameters; the sets meet them within 13% and 4%
    rates: tuple[float, ...] = (4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2)  # of LoRA, to try first
    full_rates: tuple[float, ...] = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)
    steps: int = 150
    search_steps: int = 50
    seeds: int = 5
    base: str = "base"
    test_windows: int = 128
    valid_windows: int = 32

    def __post_init__(self) -> None:
        self.sweep()  # checks targets, steps, seeds and windows
        if not (self.budgets and self.rates and self.full_rates):
            raise ConfigError("the grid is empty; expected at least one budget and one learning rate of each")
        for budget in self.budgets:
            check_int("budget", budget, 1)
        if sorted(set(self.budgets)) != list(self.budgets):
            raise ConfigError(f"budgets are {', '.join(map(str, self.budgets))}; expected them to grow")
        for rate in (*self.rates, *self.full_rates):
            check_float("learning rate", rate, 0, math.inf, open_low=True)

    def sweep(self) -> rank_sweep.Plan:
        """The rank sweep with this recipe and these references: all maps at r = 1, and full fine-tuning."""
        return rank_sweep.Plan(
            self.targets, (1,), steps=self.steps, search_steps=self.search_steps, seeds=self.seeds,
            base=self.base, test_windows=self.test_windows, valid_windows=self.valid_windows,
        )  # fmt: skip

    def setting(self, target: str) -> rank_sweep.Setting:
        """How LoRA and full fine-tuning are trained on one target."""
        return replace(self.sweep().setting(target), lora_rates=self.rates, full_rates=self.full_rates)


QUICK = {"budgets": (6144,), "rates": (1.6e-2,), "full_rates": (2e-3,), "steps": 10, "search_steps": 1,
         "seeds": 1, "test_windows": 8, "valid_windows": 4}  # fmt: skip


def grid(plan: Plan, inputs: Inputs) -> Iterator[Run]:
    """For each target full fine-tuning, then LoRA on each set at each budget; without seed or learning rate.

    ConfigError for a budget that does not reach rank 1, or two that share a rank.
    """
    for cell in rank_sweep.grid(plan.sweep(), inputs.texts):
        if cell.method == "full":
            yield cell
            continue
        for name, modules in SETS.items():
            one = replace(cell, modules=modules)
            cost = size(trained(rank_sweep.prepared(one, inputs)))  # of rank 1
            ranks = [round(budget / cost) for budget in plan.budgets]
            if ranks[0] == 0 or len(set(ranks)) < len(ranks):
                raise ConfigError(
                    f"budgets {', '.join(map(str, plan.budgets))} give {name} the ranks "
                    f"{', '.join(map(str, ranks))}; expected ranks that grow, from {cost:,} parameters for 1"
                )
            yield from (replace(one, rank=r) for r in ranks)


def run(
    plan: Plan,
    out: Path | str,
    *,
    jobs: int | None = None,
    dask: str | None = None,
    progress: Progress | None = None,
) -> list[Row]:
    """Do the runs that are missing in the folder `out`; return all rows in the plan's order.

    ConfigError as in `grid`, and for a rank that a map cannot have; other errors as in `rank_sweep.sweep`.
    """
    inputs = harness.read_inputs(plan.base, plan.targets)
    rank_sweep.check_inputs(plan.sweep(), inputs)
    cells = list(grid(plan, inputs))
    for cell in cells:
        rank_sweep.prepared(cell, inputs)  # refuses a rank that does not fit, before any run
    how = {cell: plan.setting(cell.target) for cell in cells}
    with harness.open_store(
        out, rank_sweep.work, inputs, asdict(plan), FORM, jobs=jobs, dask=dask, progress=progress
    ) as store:
        store.finish(rank_sweep.references(cells))
        rates = rank_sweep.chosen_rates(how, store)
        store.finish(replace(cell, lr=rates[cell], seed=seed) for cell in cells for seed in range(plan.seeds))
        return store.close()


FORM = RowForm(check_row, derive=rank_sweep.with_gaps, derived=("gap_closed",))

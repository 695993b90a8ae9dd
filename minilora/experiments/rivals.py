"""Which way of fine-tuning learns most with as many parameters? LoRA and its rivals, each at its best rate.

    parameters(method, n) = parameters(method, 1) + (n - 1) step,        n nearest to parameters(LoRA, r)

n is VeRA's rank, the width of a bottleneck, or the number of rows of a prefix or prompt. DoRA, and LoRA with
norms and embedding, are the LoRA of rank r with more beside it; (IA)³, norms and biases have one size; all
weights are full fine-tuning. Some methods are also sized for LoRA's other ranks: loss against parameters, as
in Hu et al. 2021, figure 2 (papers of the methods: methods/; of the biases: Ben Zaken et al. 2021). Runs
with a seed of their own choose each one's learning rate on a validation split; then each seed is trained at
that rate and measured on the test split. All see the same batches of a seed. Times are no part of the rows:
benchmarks/methods.py.
"""

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from ..backend import xp
from ..errors import ConfigError, check_int, nearest
from ..formats import forms
from ..layers import AdapterConfig, Linear, Param
from ..lora import bases, inject
from ..methods.bottleneck import PFEIFFER, BottleneckConfig
from ..methods.lora_config import LoraConfig
from ..methods.prefixes import PrefixTuningConfig, PromptTuningConfig
from ..methods.vectors import IA3Config, VeraConfig
from ..model import Llama
from ..optim import AdamW
from ..tree import freeze, size, trained
from . import harness
from .harness import LOSS, SEARCH_SEED, Inputs, Progress, Row
from .recipe import LENGTH, drawn, learn, loss_on

STEP = 2.0  # factor between two rates, also beyond an edge
EDGES = 4  # how often the search may extend
LORA, FULL, PROMPT = "LoRA", "all weights", "prompt"
SAVED = ("input_layernorm", "post_attention_layernorm", "norm", "embed_tokens")
RANKED: dict[str, Callable[[int], AdapterConfig]] = {  # method -> its config at LoRA's rank
    LORA: lambda r: LoraConfig(r, 2 * r),
    "DoRA": lambda r: LoraConfig(r, 2 * r, dora=True),
    "LoRA, norms, embedding": lambda r: LoraConfig(r, 2 * r, modules_to_save=SAVED),
}
SIZED: dict[str, Callable[[int], AdapterConfig]] = {  # method -> its config at n
    "VeRA": VeraConfig,
    "bottleneck, Houlsby": BottleneckConfig,
    "bottleneck, Pfeiffer": lambda n: BottleneckConfig(n, PFEIFFER),
    "prefix": PrefixTuningConfig,
    PROMPT: PromptTuningConfig,
}
CONFIGS: dict[str, Callable[[int], AdapterConfig]] = {**RANKED, **SIZED, "(IA)³": lambda _: IA3Config()}
KEPT: dict[str, Callable[[str], bool]] = {  # method -> the paths of the base's own parameters that it trains
    FULL: lambda path: True,
    "norms": lambda path: "norm" in path,
    "biases": lambda path: path.endswith(".bias"),
}
METHODS = (FULL, *CONFIGS, *(name for name in KEPT if name != FULL))
LARGEST = {  # method -> the largest other rank it is sized for: a prompt takes positions, and VeRA's r time
    LORA: 16, "DoRA": 16, "VeRA": 1, "bottleneck, Houlsby": 16, "prefix": 16, PROMPT: 4,
}  # fmt: skip
RATES = {  # where a search starts; vectors and rows take larger rates
    FULL: (5e-4, 1e-3, 2e-3), "VeRA": (2e-2, 4e-2, 8e-2), "(IA)³": (2e-2, 4e-2, 8e-2),
    "prefix": (2.5e-2, 5e-2, 1e-1), PROMPT: (16e-2, 32e-2, 64e-2),
}  # fmt: skip
USUAL = (4e-3, 8e-3, 16e-3)


@dataclass(frozen=True)
class Plan:
    """Which methods are trained, and how. ConfigError for an unknown method or an invalid number."""

    target: str = "folio"
    base: str = "base"
    methods: tuple[str, ...] = METHODS
    rank: int = 2  # of the LoRA that all are compared with
    others: tuple[int, ...] = (1, 4, 16)  # more ranks, for some of the methods
    steps: int = 150
    seeds: int = 5
    few_seeds: int = 3  # at the other ranks
    batch: int = 8
    test_windows: int = 256
    valid_windows: int = 128

    def __post_init__(self) -> None:
        for method in self.methods:
            if method not in METHODS:
                raise ConfigError(f"method is {method!r}; {nearest(method, METHODS)}")
        if missing := {LORA, FULL} - {*self.methods}:
            raise ConfigError(f"{missing.pop()} is not in methods; expected {LORA} and {FULL} among them")
        for r in self.others:
            check_int("rank", r, 1)
        if len({self.rank, *self.others}) <= len(self.others):
            raise ConfigError(f"the rank is {self.rank} and the others {self.others}; expected each once")
        for name in ("rank", "steps", "seeds", "few_seeds", "batch", "test_windows", "valid_windows"):
            check_int(name, getattr(self, name), 1)


QUICK = {"methods": (FULL, LORA, "prefix", "norms"), "others": (1,), "steps": 3, "seeds": 1, "few_seeds": 1,
         "batch": 4, "test_windows": 8, "valid_windows": 4}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One training, or none: the base as it is."""

    kind: str  # "base", "search" or "final"
    plan: Plan
    method: str = ""
    rank: int = 0  # of the LoRA that it is sized for; 0: it has one size
    n: int = 0  # its rank, width or number of rows
    rate: float = 0.0
    seed: int = 0
    text: str = ""  # the digest of the text

    @property
    def id(self) -> str:
        """A short name derived from the content."""
        return harness.id_of(asdict(self))


# ---- one run


def prepared(method: str, n: int, base: Llama, rng: np.random.Generator) -> Llama:
    """A copy of the base, ready for the training of a method."""
    model = copy.deepcopy(base)
    if method in CONFIGS:
        inject(model, CONFIGS[method](n), rng=rng)
        return model
    if method == "biases":
        for layer in bases(model).values():
            if isinstance(layer, Linear) and layer.bias is None:  # zeros change nothing
                layer.bias = Param(xp.zeros(layer.weight.shape[0], layer.weight.dtype))
    freeze(model, KEPT[method])
    return model


def work(run: Run, inputs: Inputs) -> Row:
    """Do one run and return its row."""
    return harness.row_of(run, inputs.texts[run.plan.target].source, lambda: measured(run, inputs))


def measured(run: Run, inputs: Inputs) -> Row:
    """The validation loss of a search or the test loss of all else, and the count of trained parameters."""
    plan, text = run.plan, inputs.texts[run.plan.target]
    model = inputs.base if run.kind == "base" else learned(run, inputs)
    split, windows = ("valid", plan.valid_windows) if run.kind == "search" else ("test", plan.test_windows)
    return {split: loss_on(model, text, split, windows), "parameters": size(trained(model))}


def learned(run: Run, inputs: Inputs) -> Llama:
    """The model after the training of the run; runs of a seed see the same batches."""
    plan, (start, order) = run.plan, (np.random.default_rng([run.seed, draw]) for draw in (0, 1))
    model = prepared(run.method, run.n, inputs.base, start)
    batches = drawn(inputs.texts[plan.target], order, plan.batch)
    learn(model, batches, AdamW(run.rate, betas=(0.9, 0.99)), plan.steps)
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

    ConfigError for a rank or a prompt that is too large for the base; other errors as in
    `harness.open_store`, and InputError for a text that is too short.
    """
    inputs = harness.read_inputs(plan.base, (plan.target,))
    cells = grid(plan, inputs)
    with harness.open_store(
        out, work, inputs, asdict(plan), FORM, jobs=jobs, dask=dask, progress=progress
    ) as store:
        store.finish([Run("base", plan, text=cells[0].text)])
        starts = {cell: RATES.get(cell.method, USUAL) for cell in cells}
        best = harness.chosen_rates(store, starts, lambda cell, rate: replace(cell, rate=rate), STEP, EDGES)
        store.finish(
            replace(cell, kind="final", rate=best[cell], seed=seed)
            for cell in cells
            for seed in range(plan.few_seeds if cell.rank in plan.others else plan.seeds)
        )
        return store.close()


def grid(plan: Plan, inputs: Inputs) -> list[Run]:
    """One search without a rate for every method at the plan's rank, then for some at the others."""
    empty = Run("search", plan, seed=SEARCH_SEED, text=inputs.texts[plan.target].digest)
    whole = [(method, plan.rank if method in RANKED | SIZED else 0) for method in plan.methods]
    more = [(method, r) for r in plan.others for method in plan.methods if r <= LARGEST.get(method, 0)]
    return [
        replace(empty, method=method, rank=r, n=nearest_size(method, r, inputs.base))
        for method, r in whole + more
    ]


def nearest_size(method: str, rank: int, base: Llama) -> int:
    """n with which the count of parameters is nearest to that of LoRA at a rank; 0 for a method of one size.

    ConfigError for a rank that does not fit, or a prompt that leaves no positions for a window.
    """

    def count(name: str, n: int) -> int:
        return size(trained(prepared(name, n, base, np.random.default_rng(0))))

    if method not in SIZED:
        if rank:
            count(method, rank)  # refuses a rank that does not fit
        return rank
    goal, one = count(LORA, rank), count(method, 1)
    n = max(1, round(1 + (goal - one) / (count(method, 2) - one)))
    room = base.config.max_position_embeddings - LENGTH
    if method == PROMPT and n > room:
        raise ConfigError(f"rank is {rank}, and so many parameters are {n} rows; a window leaves {room}")
    return n


TESTED = {"test": LOSS, "parameters": forms.whole()}
SEARCHED = {"valid": LOSS, "parameters": forms.whole()}
FORM = harness.form_of({"base": TESTED, "search": SEARCHED, "final": TESTED})

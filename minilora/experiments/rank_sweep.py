"""Which rank does a task need? The main job: a frozen base, LoRA at every rank, full fine-tuning.

For each target and method, short runs choose the learning rate on a validation split; then every seed is
trained, and measured on the test split. gap closed = (L_base - L) / (L_base - L_full), with L the test
loss. Every run is one row. The harness does the runs and keeps the rows.
"""

import copy
import math
from concurrent.futures import Executor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from .. import spectra
from ..backend import to_device, to_host
from ..data import batching, corpora
from ..errors import ConfigError, MismatchError, NonFiniteError, check_float, check_int
from ..formats import tokenizer
from ..lora import inject
from ..methods.lora_config import LoraConfig
from ..model import Llama
from ..optim import AdamW, Schedule
from ..training import evaluate, train
from ..tree import digest, get, size, trained, unfreeze
from . import harness, recipe
from .harness import SEARCH_SEED, Inputs, Progress, Row, RowForm, Store
from .rows import Run, check_row, check_together, every

RANKS = (1, 2, 4, 8, 16, 32, 64)
STEP = math.sqrt(10)  # factor by which the learning rate search extends beyond an edge
EDGES = 2  # how often it may extend


@dataclass(frozen=True)
class Setting:
    """How one kind of target is trained, unless the plan says otherwise."""

    modules: tuple[str, ...]  # what LoRA adapts
    alpha: float
    eps: float  # AdamW's, for LoRA
    lora_rates: tuple[float, ...]  # where the search starts
    full_rates: tuple[float, ...]
    steps: int
    search_steps: int
    batch: int


TEXT = Setting(("all-linear",), 16.0, 1e-8, (3e-3, 1e-2, 3e-2), (3e-4, 1e-3, 3e-3), 300, 100, 8)
# An embedding's B starts at N(0, 1), so alpha is small. The larger eps keeps AdamW from moving the rows
# of rare letters, whose gradient is almost zero, as fast as all others: their noise would hide the spectrum.
TABLE = Setting(("embed_tokens",), 0.25, 1e-4, (1e-1, 3e-1, 1.0), (1e-3, 3e-3, 1e-2), 200, 60, 4)


@dataclass(frozen=True)
class Plan:
    """The plan of a sweep. ConfigError for an empty grid or an invalid number."""

    targets: tuple[str, ...] = ("permuted:4", "folio")
    ranks: tuple[int, ...] | None = None  # None: RANKS, and for k swaps also k - 1 and k, to show the elbow
    modules: tuple[str, ...] | None = None  # None here and below: the target's setting
    alpha: float | None = None
    steps: int | None = None
    search_steps: int | None = None
    seeds: int = 3
    base: str = "base"
    test_windows: int = 512
    valid_windows: int = 64

    def __post_init__(self) -> None:
        if not self.targets or self.ranks == () or self.modules == ():
            raise ConfigError("the grid is empty; expected at least one text, one rank and one module")
        for r in self.ranks or ():
            check_int("rank", r, 1)
        for name, values in (("targets", self.targets), ("ranks", self.ranks or ())):
            if len(set(values)) < len(values):
                raise ConfigError(f"{name} are {', '.join(map(str, values))}; expected each once")
        for name in ("steps", "search_steps", "seeds", "test_windows", "valid_windows"):
            if getattr(self, name) is not None:
                check_int(name, getattr(self, name), 1)
        if self.alpha is not None:
            check_float("alpha", self.alpha, 0, math.inf, open_low=True)

    def ranks_for(self, target: str) -> tuple[int, ...]:
        """The ranks of LoRA on one target."""
        if self.ranks is not None:
            return self.ranks
        swaps = corpora.swaps_of(target)
        return tuple(sorted({*RANKS, max(swaps - 1, 1), max(swaps, 1)}))

    def setting(self, target: str) -> Setting:
        """How a target is trained: TABLE for a permutation, which the embedding alone can solve, or TEXT."""
        usual = TABLE if corpora.swaps_of(target) else TEXT
        steps = self.steps or usual.steps
        return replace(
            usual, modules=self.modules or usual.modules, alpha=self.alpha or usual.alpha, steps=steps,
            search_steps=self.search_steps or min(usual.search_steps, max(steps // 3, 1)),
        )  # fmt: skip


QUICK = {"ranks": (1, 4, 16), "seeds": 1, "steps": 40, "search_steps": 10,
         "test_windows": 64, "valid_windows": 16}  # fmt: skip


# ---- one run


def work(run: Run, inputs: Inputs) -> Row:
    """Do one run and return its row: config, status, curve, losses, parameters, spectra."""
    measure = {"base": baseline, "oracle": oracle}.get(run.kind, trained_run)
    return harness.row_of(run, text_of(run, inputs).source, lambda: measure(run, inputs))


def text_of(run: Run, inputs: Inputs) -> corpora.Corpus:
    """The text of a run; MismatchError if it is not the one that the run was made for."""
    text = inputs.texts[run.target]
    if text.digest != run.text:
        raise MismatchError(f"{run.target}: the text has changed since the sweep began")
    return text


def windows(run: Run, split: str, inputs: Inputs) -> list[tuple[np.ndarray, np.ndarray]]:
    """The evaluation batches of one split, spread evenly over it."""
    count = run.test_windows if split == "test" else run.valid_windows
    return recipe.windows(text_of(run, inputs), split, count)


def losses(model: Llama, run: Run, inputs: Inputs) -> Row:
    """Validation loss, and test loss unless the run is a search, in nats per character."""
    splits = ("valid",) if run.kind == "search" else ("valid", "test")
    row = {split: evaluate(model, windows(run, split, inputs)) for split in splits}
    for split, loss in row.items():
        if not math.isfinite(loss):
            raise NonFiniteError(f"after training the loss on {split} is {loss}")
    return row


def baseline(run: Run, inputs: Inputs) -> Row:
    """The frozen base on the target; for a permutation also on the plain text, which gives the floor."""
    model = inputs.base
    row = losses(model, run, inputs) | {"parameters": 0, "base_digest": digest(model)}
    if swaps := corpora.swaps_of(run.target):
        perm = corpora.permutation(swaps)  # its own inverse
        row["floor"] = evaluate(model, [(perm[x], perm[y]) for x, y in windows(run, "test", inputs)])
        row["spectra"] = rounded({"model.embed_tokens": spectra.singular_values(true_delta(model, swaps))})
    return row


def true_delta(model: Llama, swaps: int) -> Any:
    """ΔE = (P - I) E (V, D), which solves the permutation exactly; its rank is the number of swaps."""
    E = model.model.embed_tokens.weight.data
    return E[to_device(corpora.permutation(swaps))] - E


def oracle(run: Run, inputs: Inputs) -> Row:
    """The known answer cut to the run's rank (Eckart and Young), without training."""
    model = copy.deepcopy(inputs.base)
    table = model.model.embed_tokens.weight
    U, S, Vt = np.linalg.svd(to_host(true_delta(model, corpora.swaps_of(run.target))).astype(np.float64))
    r = run.rank
    cut = (U[:, :r] * S[:r]) @ Vt[:r]
    table.data = table.data + to_device(cut, table.data.dtype)
    return losses(model, run, inputs) | {"parameters": 0}


def trained_run(run: Run, inputs: Inputs) -> Row:
    """Train LoRA or all weights, and measure."""
    model = prepared(run, inputs)
    valid = windows(run, "valid", inputs)
    history = train(
        model,
        recipe.drawn(text_of(run, inputs), np.random.default_rng([run.seed, 0]), run.batch),
        AdamW(run.lr, betas=(0.9, 0.99), eps=run.eps),
        steps=run.steps,
        schedule=Schedule(run.steps, warmup=run.steps // 20),
        evaluate=None if run.kind == "search" else lambda: evaluate(model, valid),
        eval_every=every(run.steps),
        threads=1,  # the other cores do other runs
    )
    row = losses(model, run, inputs) | {"parameters": size(trained(model))}
    if run.kind == "final":
        row["curve"] = history.evals
        full = run.method == "full"
        changes = spectra.spectrum_between(inputs.base, model) if full else spectra.spectrum(model)
        row["spectra"] = rounded(changes)
        row["shapes"] = {path: list(get(inputs.base, f"{path}.weight").shape) for path in changes}
    return row


def prepared(run: Run, inputs: Inputs) -> Llama:
    """A copy of the base, ready for the training of the run."""
    model = copy.deepcopy(inputs.base)
    if run.method == "full":
        unfreeze(model)
        return model
    targets = run.modules[0] if run.modules == ("all-linear",) else run.modules
    inject(model, LoraConfig(run.rank, run.alpha, targets), rng=np.random.default_rng([run.seed, run.rank]))
    return model


def rounded(changes: dict[str, np.ndarray]) -> dict[str, list[float]]:
    """Spectra rounded to six significant digits, as rows hold them."""
    return {path: [float(f"{x:.6g}") if x > 1e-12 * s[0] else 0.0 for x in s] for path, s in changes.items()}


# ---- the whole sweep


def sweep(
    plan: Plan,
    out: Path | str,
    *,
    jobs: int | None = None,
    executor: Executor | None = None,
    dask: str | None = None,
    progress: Progress | None = None,
) -> list[Row]:
    """Do the runs of a plan that are missing in the folder `out`; return all rows in the plan's order.

    Runs go to `jobs` processes with one BLAS thread each (default: one per core; `jobs=1` starts none), to
    any executor, or to the dask scheduler at "tcp://HOST:PORT". `progress(done, known, row)` is called after
    every run. ConfigError, MismatchError or InputError if base, texts and plan do not fit; for all other
    errors, and for what the workers need, see `harness.open_store`.
    """
    inputs = harness.read_inputs(plan.base, plan.targets)
    check_inputs(plan, inputs)
    cells = grid(plan, inputs.texts)
    for cell in cells:
        prepared(cell, inputs)  # refuses a rank or a module that does not fit, before any run
    with harness.open_store(
        out, work, inputs, asdict(plan), FORM, jobs=jobs, executor=executor, dask=dask, progress=progress
    ) as store:
        store.finish(references(cells))
        rates = chosen_rates({cell: plan.setting(cell.target) for cell in cells}, store)
        store.finish(replace(cell, lr=rates[cell], seed=seed) for cell in cells for seed in range(plan.seeds))
        return store.close()


def check_inputs(plan: Plan, inputs: Inputs) -> None:
    """InputError for a short text; MismatchError if the base cannot read characters or solve a target."""
    for text in inputs.texts.values():
        for split in (text.train, text.valid, text.test):
            batching.check_windows(split, 1, recipe.LENGTH)
    c = inputs.base.config
    if c.vocab_size != tokenizer.VOCAB or c.max_position_embeddings < recipe.LENGTH:
        raise MismatchError(
            f"{plan.base}: has a vocabulary of {c.vocab_size} and {c.max_position_embeddings} positions; "
            f"expected {tokenizer.VOCAB} characters and at least {recipe.LENGTH} positions"
        )
    if not c.tie_word_embeddings and any(corpora.swaps_of(target) for target in plan.targets):
        raise MismatchError(f"{plan.base}: its head is not tied to its embedding; a permutation needs that")


def grid(plan: Plan, texts: dict[str, corpora.Corpus]) -> list[Run]:
    """One Run for each target and method, full fine-tuning first, without seed or learning rate."""
    cells = []
    for target in plan.targets:
        how = plan.setting(target)
        full = Run(
            "final", target, "full", steps=how.steps, batch=how.batch, base=plan.base,
            text=texts[target].digest, fallback=harness.is_fallback(texts[target]),
            test_windows=plan.test_windows, valid_windows=plan.valid_windows,
        )  # fmt: skip
        lora = replace(full, method="lora", modules=how.modules, alpha=how.alpha, eps=how.eps)
        cells += [full, *(replace(lora, rank=r) for r in plan.ranks_for(target))]
    return cells


def references(cells: list[Run]) -> list[Run]:
    """The runs without training: the base on each target, and the known answer cut to each rank."""
    plain = [replace(c, method="none", modules=(), alpha=0.0, eps=0.0, steps=0, batch=0) for c in cells]
    bases = dict.fromkeys(replace(c, kind="base", rank=0) for c in plain)
    return [*bases, *(replace(c, kind="oracle") for c in plain if c.rank and corpora.swaps_of(c.target))]


def chosen_rates(how: dict[Run, Setting], store: Store) -> dict[Run, float]:
    """The learning rate of every cell, by validation loss after short runs; `how` has the first rates."""

    def search(cell: Run, lr: float) -> Run:
        return replace(cell, kind="search", steps=how[cell].search_steps, seed=SEARCH_SEED, lr=lr)

    starts = {c: to.full_rates if c.method == "full" else to.lora_rates for c, to in how.items()}
    return harness.chosen_rates(store, starts, search, STEP, EDGES)


def with_gaps(rows: list[Row]) -> list[Row]:
    """The rows; final ones get gap_closed = (L_base - L) / (L_base - L_full) where both losses exist."""
    tests: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        config = row["config"]
        if row["status"] == "done" and config["kind"] in ("base", "final"):
            tests.setdefault((config["target"], config["method"]), []).append(row["test"])
    out = []
    for row in rows:
        config = row["config"]
        base, full = (tests.get((config["target"], method)) for method in ("none", "full"))
        if config["kind"] == "final" and row["status"] == "done" and base and full:
            gap = base[0] - math.fsum(full) / len(full)
            share = (base[0] - row["test"]) / gap if gap > 0 else math.inf
            row = row | {"gap_closed": share if math.isfinite(share) else None}
        out.append(row)
    return out


FORM = RowForm(check_row, check_together, with_gaps, ("gap_closed",))


def read_rows(path: Path | str) -> list[Row]:
    """The rows of a sweep's file, final ones with gap_closed; raises as `harness.read_rows`."""
    return harness.read_rows(path, FORM)

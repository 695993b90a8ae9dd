"""Does LoRA find the rank that a task has? Three tasks whose best ΔW is known, from one map to a whole model.

    map           y = (W + Δ) x, x ~ N(0, Σ): with σ those of Δ Σ^1/2, rank r leaves Σ σ² of those beyond r
    teacher       the base with such a Δ in one of its maps; the student learns from the teacher's logits
    permutation   k pairs of letters change places in a text: ΔE = (P - I) E undoes it, and has rank k

(Eckart and Young 1936.) Each has a planted rank k, and LoRA is trained at ranks around it, on the map that
has the answer. From which rank on is nothing left to gain? And does the spectrum of a ΔW that may have more
rank show k? Excess is the loss above that of the known answer, over that of the base. Beside them is a task
of no known rank whose best possible loss is known, too: the base's text read backwards, which has the
entropy of the text, so that the base's own loss on the same letters forwards is the level to compare with.
Learning rates are chosen by short runs with a seed of their own. Each run is one row.
"""

import copy
import math
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .. import spectra
from ..backend import Array, to_device, to_host, xp
from ..data import batching, corpora
from ..errors import ConfigError, NonFiniteError, check_int
from ..formats import forms
from ..layers import Linear, Need, Param
from ..lora import Adapted, LowRank, active, inject
from ..methods.lora_config import LoraConfig
from ..model import Llama
from ..ops import softmax
from ..optim import AdamW, Schedule
from ..training import evaluate
from ..tree import get, replace, replica, trained, unfreeze
from . import harness, rank_sweep
from .harness import LOSS, SEARCH_SEED, SIZE, Inputs, Progress, Row, RowForm
from .rank_sweep import TABLE, TEXT
from .recipe import drawn, learn, windows

OWN = "shakespeare"  # the base's text, and the teacher's
SITE = "model.layers.1.self_attn.o_proj"  # where the teacher differs from the base
O, I = 24, 40  # of the map  # noqa: E741
LARGE = 16  # the rank whose spectrum should show k
TASKS = ("map", "teacher", "permutation")
REVERSED = "reversed"  # the task without a planted rank
DEPTHS = (0, 1, 4, 16, 64)  # its ranks of LoRA, on all linear maps; 0: all weights
SHIFT = 0.3  # the singular values of the teacher's Δ Σ^1/2
STEP, EDGES = math.sqrt(10), 2  # beyond the first rates
RATES = {
    "map": (1e-2, 3e-2, 1e-1),
    "teacher": (3e-3, 1e-2, 3e-2),
    "permutation": (1e-1, 3e-1, 1.0),
    REVERSED: TEXT.lora_rates,
}


@dataclass(frozen=True)
class Plan:
    """What is planted and tried, beside reversed text. ConfigError for an empty grid or an invalid number."""

    tasks: tuple[str, ...] = TASKS
    planted: tuple[int, ...] = (1, 2, 4, 8, 13)
    base: str = "base"
    seeds: int = 5
    steps: tuple[int, ...] = (2000, 200, 200)  # for each of TASKS
    batch: int = 4
    windows: int = 48  # of text, to validate and to test

    def __post_init__(self) -> None:
        if not self.tasks or not self.planted:
            raise ConfigError("the grid is empty; expected at least one task and one rank")
        if odd := set(self.tasks) - set(TASKS):
            raise ConfigError(f"there is no task {min(odd)!r}; there are {', '.join(TASKS)}")
        if len(self.steps) != len(TASKS):
            raise ConfigError(
                f"steps has {len(self.steps)} numbers; expected {len(TASKS)}, one for each task"
            )
        for name, values in (("planted", self.planted), ("steps", self.steps)):
            for value in values:
                check_int(name, value, 1)
        if max(self.planted) >= LARGE:
            raise ConfigError(f"planted is {max(self.planted)}; expected at most {LARGE - 1}")
        for name in ("seeds", "batch", "windows"):
            check_int(name, getattr(self, name), 1)


QUICK = {"planted": (2,), "seeds": 1, "steps": (200, 20, 20), "windows": 4}


def ranks(k: int) -> tuple[int, ...]:
    """The ranks of LoRA for a planted one: below it, itself, beyond it, and LARGE."""
    return tuple(sorted({max(k // 2, 1), max(k - 1, 1), k, min(2 * k, LARGE), LARGE}))


def rates(task: str, rank: int) -> tuple[float, ...]:
    """Where the search of a cell's learning rate begins."""
    return RATES[task] if rank else TEXT.full_rates


@dataclass(frozen=True)
class Run:
    """One cell: LoRA of one rank on a task, in the search of a learning rate or to be measured.

    A planted task's row depends on this and on no more, so what stands beside it can change.
    """

    kind: str  # "search" or "final"
    plan: Plan
    task: str
    planted: int
    rank: int
    seed: int
    lr: float
    texts: tuple[str, ...] = field(default=())  # the digests of the texts

    @property
    def id(self) -> str:
        """A short name derived from the content."""
        return harness.id_of(asdict(self))

    @property
    def steps(self) -> int:
        """Training steps, on reversed text as on a permutation; a search has a third."""
        like = "permutation" if self.task == REVERSED else self.task
        steps = self.plan.steps[TASKS.index(like)]
        return steps if self.kind == "final" else max(steps // 3, 1)

    @property
    def target(self) -> str:
        """The text of a task with one."""
        return f"permuted:{self.planted}" if self.task == "permutation" else OWN


# ---- one run


def work(run: Run, inputs: Inputs) -> Row:
    """Do one run and return its row."""
    return harness.row_of(run, inputs.texts[run.target].source, lambda: DO[run.task](run, inputs))


def measured(run: Run, loss: Callable[[str], float], best: Callable[[], float], spectrum: Any) -> Row:
    """The row of a trained run: `loss` and `best` are excesses; NonFiniteError if one is not a number."""
    row: Row = {"valid": loss("valid")}
    if run.kind == "final":
        row |= {"excess": loss("test"), "best": best()}
        row["spectrum"] = [float(f"{x:.6g}") for x in np.sort(spectrum())[::-1][: run.rank]]
    return finite(row)


def finite(row: Row) -> Row:
    """The row, or NonFiniteError if a number in it is none."""
    for name, value in row.items():
        if not np.isfinite(value).all():
            raise NonFiniteError(f"{name} is {value}")
    return row


def planted(rng: np.random.Generator, O: int, k: int, root: np.ndarray) -> np.ndarray:  # noqa: E741
    """Δ (O, I) of rank k in the large directions of `root` = Σ^1/2; Δ Σ^1/2 has k equal singular values."""
    values, vectors = np.linalg.eigh(root)
    large = vectors[:, -max(len(values) // 3, k) :]
    U, _ = np.linalg.qr(rng.standard_normal((O, k)))
    V, _ = np.linalg.qr(rng.standard_normal((large.shape[1], k)))
    return U @ (large @ V).T @ np.linalg.pinv(root)


def cut(delta: np.ndarray, r: int, root: np.ndarray) -> np.ndarray:
    """The best ΔW of rank r: that for which ΔW Σ^1/2 is nearest to Δ Σ^1/2."""
    U, S, Vt = np.linalg.svd(delta @ root, full_matrices=False)
    return (U[:, :r] * S[:r]) @ Vt[:r] @ np.linalg.pinv(root)


def map_task(run: Run, inputs: Inputs) -> Row:
    """One linear map: its rows are those of Σ^1/2, so that the sum of squares is the expected loss itself."""
    rng = np.random.default_rng([run.seed, 0, run.planted])
    Q, _ = np.linalg.qr(rng.standard_normal((I, I)))
    root = (Q * np.geomspace(1, 0.1, I)) @ Q.T
    delta = planted(rng, O, run.planted, root)
    X, Y = (to_device(a.astype(np.float32)) for a in (root, root @ delta.T))
    A = rng.standard_normal((run.rank, I)).astype(np.float32) / np.sqrt(np.float32(I))
    pair = LowRank(Param(to_device(A)), Param(xp.zeros((O, run.rank), xp.float32)), 1.0)
    layer = Adapted(Linear(Param(xp.zeros((O, I), xp.float32), False)), {"a": pair}, "a")
    optimizer, schedule = AdamW(run.lr, clip=None), Schedule(run.steps, warmup=run.steps // 20)
    for step in range(run.steps):
        y, back = layer(X, Need.WEIGHTS)
        back(2 * (y - Y))
        optimizer.step(trained(layer), optimizer.lr * schedule(step))
    change = to_host(pair.delta()).astype(np.float64)

    def excess(change: np.ndarray) -> float:
        return float(np.sum(((change - delta) @ root) ** 2) / np.sum((delta @ root) ** 2))

    return measured(
        run, lambda _: excess(change), lambda: excess(cut(delta, run.rank, root)),
        lambda: np.linalg.svd(change @ root, compute_uv=False),
    )  # fmt: skip


@dataclass(eq=False)
class Watched:
    """A map that keeps what goes into it."""

    base: Linear
    seen: list[np.ndarray] = field(default_factory=list)

    def __call__(self, x: Array, need: Need = Need.ALL) -> tuple[Array, Any]:
        self.seen.append(to_host(x).reshape(-1, x.shape[-1]).astype(np.float64))
        return self.base(x, need)


def root_of(model: Llama, batches: list[batching.Batch]) -> np.ndarray:
    """Σ^1/2 (I, I) of what goes into the map at SITE."""
    watching = replica(model)
    watched = Watched(get(watching, SITE))
    replace(watching, SITE, watched)
    for ids, _ in batches:
        watching(ids)
    X = np.concatenate(watched.seen)
    values, vectors = np.linalg.eigh(X.T @ X / len(X))
    return (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T


def divergence(teacher: Array, logits: Array) -> tuple[float, Array]:
    """Mean KL(teacher || student) in nats per token, and its gradient; both are logits (N, T, V)."""
    p, q = softmax(teacher)[0], softmax(logits)[0]
    count = p.size // p.shape[-1]
    return float((p * (xp.log(p) - xp.log(q))).sum() / count), (q - p) / p.dtype.type(count)


def with_change(model: Llama, delta: np.ndarray) -> Llama:
    """A copy whose map at SITE has W + Δ."""
    changed = copy.deepcopy(model)
    layer = get(changed, SITE)
    layer.weight = Param(layer.weight.dense() + to_device(delta.astype(np.float32)), False)
    return changed


def teacher_task(run: Run, inputs: Inputs) -> Row:
    """A student of a base that differs in one map, on the text of both."""
    text, rng = inputs.texts[run.target], np.random.default_rng([run.seed, 1])
    root = root_of(inputs.base, windows(text, "valid", run.plan.windows))
    delta = planted(np.random.default_rng([run.seed, 0, run.planted]), len(root), run.planted, root)
    delta *= SHIFT
    teacher, model = with_change(inputs.base, delta), copy.deepcopy(inputs.base)
    config = LoraConfig(run.rank, run.rank, re.compile(re.escape(SITE)))
    inject(model, config, rng=np.random.default_rng([run.seed, run.rank]))
    optimizer, params = AdamW(run.lr), trained(model)
    schedule = Schedule(run.steps, warmup=run.steps // 20)
    for step, (ids, _) in zip(range(run.steps), drawn(text, rng, run.plan.batch), strict=False):
        logits, back = model(ids, train=True)
        loss, gradient = divergence(teacher(ids)[0], logits)
        if not math.isfinite(loss):
            raise NonFiniteError(f"step {step + 1}: the loss is {loss}")
        back(gradient)
        optimizer.step(params, optimizer.lr * schedule(step))
    adapter: Any = active(model)[SITE]
    change = to_host(adapter.delta()).astype(np.float64)

    def apart(student: Llama, split: str) -> float:
        batches = windows(text, split, run.plan.windows)
        return float(np.mean([divergence(teacher(ids)[0], student(ids)[0])[0] for ids, _ in batches]))

    def excess(student: Llama, split: str) -> float:
        return apart(student, split) / apart(inputs.base, split)

    return measured(
        run, lambda split: excess(model, split),
        lambda: excess(with_change(inputs.base, cut(delta, run.rank, root)), "test"),
        lambda: np.linalg.svd(change @ root, compute_uv=False),
    )  # fmt: skip


def permutation_task(run: Run, inputs: Inputs) -> Row:
    """LoRA on the embedding, beside (P - I) E cut to the same rank."""
    model = copy.deepcopy(inputs.base)
    config = LoraConfig(run.rank, TABLE.alpha, ("embed_tokens",))
    inject(model, config, rng=np.random.default_rng([run.seed, run.rank]))
    text, rng = inputs.texts[run.target], np.random.default_rng([run.seed, 1])
    optimizer = AdamW(run.lr, betas=(0.9, 0.99), eps=TABLE.eps)
    learn(model, drawn(text, rng, run.plan.batch), optimizer, run.steps)
    delta = to_host(rank_sweep.true_delta(inputs.base, run.planted)).astype(np.float64)

    def excess(model: Llama, split: str) -> float:
        P, batches = corpora.permutation(run.planted), windows(text, split, run.plan.windows)
        floor = evaluate(inputs.base, [(P[x], P[y]) for x, y in batches])
        return (evaluate(model, batches) - floor) / (evaluate(inputs.base, batches) - floor)

    def best() -> float:
        known = copy.deepcopy(inputs.base)
        table = known.model.embed_tokens.weight
        table.data = table.data + to_device(cut(delta, run.rank, np.eye(delta.shape[1])), table.data.dtype)
        return excess(known, "test")

    return measured(
        run, lambda split: excess(model, split), best,
        lambda: spectra.spectrum(model)["model.embed_tokens"],
    )  # fmt: skip


def backwards(text: corpora.Corpus) -> corpora.Corpus:
    """The same text in the other direction."""
    _, change, note = corpora.parse(REVERSED)
    return corpora.changed(text, REVERSED, change, note)


def reversed_task(run: Run, inputs: Inputs) -> Row:
    """LoRA on all linear maps, or all weights, on the base's text read backwards."""
    text, model = backwards(inputs.texts[OWN]), copy.deepcopy(inputs.base)
    if run.rank:
        config = LoraConfig(run.rank, TEXT.alpha)
        inject(model, config, rng=np.random.default_rng([run.seed, run.rank]))
    else:
        unfreeze(model)
    rng = np.random.default_rng([run.seed, 1])
    learn(model, drawn(text, rng, run.plan.batch), AdamW(run.lr, betas=(0.9, 0.99)), run.steps)

    def losses(split: str) -> list[float]:
        """Of the model and of the base, and of the base on the same letters forwards."""
        batches = windows(text, split, run.plan.windows)
        forwards = [(y[:, ::-1], x[:, ::-1]) for x, y in batches]
        return [evaluate(model, batches), *(evaluate(inputs.base, some) for some in (batches, forwards))]

    def excess(reached: float, start: float, floor: float) -> float:
        return (reached - floor) / (start - floor)

    row: Row = {"valid": excess(*losses("valid"))}
    if run.kind == "final":
        tested = losses("test")
        found = spectra.spectrum(model) if run.rank else spectra.spectrum_between(inputs.base, model)
        used = [spectra.effective_rank(S) for path, S in found.items() if path.endswith("_proj")]
        row |= {"excess": excess(*tested), "losses": tested, "effective_rank": float(np.median(used))}
    return finite(row)


DO = {"map": map_task, "teacher": teacher_task, "permutation": permutation_task, REVERSED: reversed_task}


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
    targets = dict.fromkeys([OWN, *(f"permuted:{k}" for k in plan.planted)])
    inputs = harness.read_inputs(plan.base, targets)
    digests = tuple(text.digest for text in inputs.texts.values())
    of_known_rank = [(task, k, r) for task in plan.tasks for k in plan.planted for r in ranks(k)]
    with harness.open_store(
        out, work, inputs, asdict(plan), FORM, jobs=jobs, dask=dask, progress=progress
    ) as store:
        for cells in (of_known_rank, [(REVERSED, 0, r) for r in DEPTHS]):
            best = harness.chosen_rates(
                store, {cell: rates(cell[0], cell[2]) for cell in cells},
                lambda cell, lr: Run("search", plan, *cell, SEARCH_SEED, lr, digests), STEP, EDGES,
            )  # fmt: skip
            store.finish(
                Run("final", plan, *cell, seed, best[cell], digests)
                for cell in cells
                for seed in range(plan.seeds)
            )
        return store.close()


MEASURED = {
    "valid": LOSS,
    "excess": LOSS,
    "best": LOSS,
    "spectrum": forms.several(SIZE),
}
LEARNED = {
    "valid": LOSS,
    "excess": LOSS,
    "losses": forms.tuple_of(LOSS, LOSS, LOSS),
    "effective_rank": SIZE,
}
FORMS = {
    task: harness.form_of({"search": {"valid": LOSS}, "final": final}, task=forms.one(task))
    for task, final in (*((task, MEASURED) for task in TASKS), (REVERSED, LEARNED))
}


def check_row(where: str, row: Row) -> None:
    """FormatError, naming the field, unless a run could have left this row."""
    forms.has({"config": forms.has({"task": forms.one(*FORMS)})})(where, row)
    FORMS[row["config"]["task"]].check(where, row)


FORM = RowForm(check_row)

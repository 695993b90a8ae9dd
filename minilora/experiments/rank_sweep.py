"""Which rank does a task need? The main job: a frozen base, LoRA at every rank, full fine-tuning.

For each target and method the learning rate is chosen by short runs on a validation split; then every
seed is trained and measured on the test split. gap closed = (L_base - L) / (L_base - L_full), with L
the test loss. Every run is one row. The file of rows is the state: it is replaced as a whole whenever a
run is done, so a sweep may be killed at any moment and goes on where it was. Rows hold no times and no
machine names: the same plan on the same machine gives the same bytes.
"""

import contextlib
import copy
import hashlib
import json
import math
import multiprocessing
import os
import platform
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor, as_completed
from contextvars import ContextVar
from dataclasses import asdict, dataclass, replace
from functools import cache
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import numpy as np

from .. import __version__, backend, spectra
from ..analysis import plotting, report
from ..backend import cores, quiet_overflow, to_device, to_host
from ..data import batching, corpora
from ..errors import (
    ConfigError,
    MismatchError,
    NonFiniteError,
    StateError,
    check_float,
    check_int,
    check_same,
    short,
)
from ..formats import huggingface, tokenizer
from ..formats.atomic import locked, named, read, write_atomic
from ..formats.safetensors import unique
from ..lora import LoraConfig, inject
from ..model import Llama
from ..optim import AdamW, Schedule
from ..table import Table, plain, printed
from ..training import evaluate, train
from ..tree import digest, get, trained, unfreeze
from . import cluster, rank_figures
from .rows import Row, Run, check_row, check_together, every

Progress = Callable[[int, int, Row], None]

SCHEMA = 1
SEARCH_SEED = 1000
THREADS = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
RANKS = (1, 2, 4, 8, 16, 32, 64)
INTERRUPTS = (signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else []))
LENGTH = 128  # characters in a window
STEP = math.sqrt(10)  # by which the search for a learning rate goes on beyond an edge
EDGES = 2  # how often it may


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
# of rare letters, whose gradient is next to nothing, as fast as all others: their noise hides the spectrum.
TABLE = Setting(("embed_tokens",), 0.25, 1e-4, (1e-1, 3e-1, 1.0), (1e-3, 3e-3, 1e-2), 200, 60, 4)


def setting(target: str) -> Setting:
    """TABLE for a letter permutation, which the embedding alone can solve; TEXT for all others."""
    return TABLE if corpora.swaps_of(target) else TEXT


@dataclass(frozen=True)
class Plan:
    """What a sweep is to do. ConfigError for an empty grid or a number without a meaning."""

    targets: tuple[str, ...] = ("permuted:4", "folio")
    ranks: tuple[int, ...] | None = None  # None: RANKS, and for k swaps k - 1 and k too: the elbow
    modules: tuple[str, ...] | None = None  # None here and below: as the target's setting says
    alpha: float | None = None
    steps: int | None = None
    search_steps: int | None = None
    seeds: int = 3
    base: str = "base"
    test_windows: int = 512
    valid_windows: int = 64

    def __post_init__(self) -> None:
        if not self.targets or self.ranks == () or self.modules == ():
            raise ConfigError("the grid is empty; expected at least one target, one rank and one module")
        for r in self.ranks or ():
            check_int("rank", r, 1)
        for name in ("targets", "ranks"):
            values = getattr(self, name) or ()
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
        """How one target is trained."""
        usual = setting(target)
        steps = self.steps or usual.steps
        return replace(
            usual,
            modules=self.modules or usual.modules,
            alpha=self.alpha or usual.alpha,
            steps=steps,
            search_steps=self.search_steps or min(usual.search_steps, max(steps // 3, 1)),
        )


QUICK = {"ranks": (1, 4, 16), "seeds": 1, "steps": 40, "search_steps": 10,
         "test_windows": 64, "valid_windows": 16}  # fmt: skip


# ---- one run, in whatever process it happens to be


@dataclass(frozen=True)
class Stock:
    """What the runs of a sweep read, for workers that have none of its files."""

    base: Llama
    texts: dict[str, corpora.Corpus]  # by target


stock_here: ContextVar[Stock | None] = ContextVar("stock_here", default=None)


def job(run: Run, stock: Stock | None = None) -> tuple[Row, Row]:
    """The row of a run, and with what it was made; what it reads comes from the stock, or from files."""
    token = stock_here.set(stock)
    try:
        return work(run), surroundings() | {"base": digest(base_of(run))}
    finally:
        stock_here.reset(token)


def base_of(run: Run) -> Llama:
    """The model that a run starts from, fresh."""
    stock = stock_here.get()
    return copy.deepcopy(stock.base) if stock else huggingface.load(run.base)


def corpus_of(run: Run) -> corpora.Corpus:
    """The texts of a run."""
    stock = stock_here.get()
    return stock.texts[run.target] if stock else corpus(run.target, run.fallback, run.text)


@cache
def corpus(target: str, fallback: bool, digest: str) -> corpora.Corpus:
    """The target's texts, read once per process; MismatchError if they are not those of the plan."""
    found = corpora.fallback(target) if fallback else corpora.corpus(target)
    if found.digest != digest:
        raise MismatchError(f"{target}: the text is not the one that the sweep began with")
    return found


def work(run: Run) -> Row:
    """Do one run and return its row: config, status, curve, losses, parameters, spectra."""
    row: Row = {"id": run.id, "config": asdict(run), "source": corpus_of(run).source}
    kinds = {"base": baseline, "oracle": oracle}
    try:
        with quiet_overflow():
            row |= {"status": "done"} | kinds.get(run.kind, trained_run)(run)
    except NonFiniteError as e:
        row |= {"status": "diverged", "error": str(e)}
    return row


def windows(run: Run, split: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """The evaluation batches of one split, spread evenly over it."""
    count = run.test_windows if split == "test" else run.valid_windows
    text = getattr(corpus_of(run), split)
    return batching.eval_batches(text, 16, LENGTH, limit=count * LENGTH)


def losses(model: Llama, run: Run) -> Row:
    """Validation loss, and the test loss of what is reported, in nats per character."""
    splits = ("valid",) if run.kind == "search" else ("valid", "test")
    row = {split: evaluate(model, windows(run, split)) for split in splits}
    for split, loss in row.items():
        if not math.isfinite(loss):
            raise NonFiniteError(f"after training the loss on {split} is {loss}")
    return row


def baseline(run: Run) -> Row:
    """The frozen base on the target; for a permutation also on the plain text, which is the floor."""
    model = base_of(run)
    row = losses(model, run) | {"parameters": 0, "base_digest": digest(model)}
    if swaps := corpora.swaps_of(run.target):
        plain = [unpermuted(b, swaps) for b in windows(run, "test")]
        row["floor"] = evaluate(model, plain)
        row["spectra"] = rounded({"model.embed_tokens": spectra.singular_values(true_delta(model, swaps))})
    return row


def unpermuted(batch: tuple[np.ndarray, np.ndarray], swaps: int) -> tuple[np.ndarray, np.ndarray]:
    """The same windows in plain letters: a swap undoes itself."""
    perm = corpora.permutation(swaps)
    return perm[batch[0]], perm[batch[1]]


def true_delta(model: Llama, swaps: int) -> Any:
    """ΔE = (P - I) E (V, D), which solves the permutation exactly; its rank is the number of swaps."""
    E = model.model.embed_tokens.weight.data
    return E[to_device(corpora.permutation(swaps))] - E


def oracle(run: Run) -> Row:
    """The known answer cut to the run's rank (Eckart and Young), with no training at all."""
    model = base_of(run)
    table = model.model.embed_tokens.weight
    U, S, Vt = np.linalg.svd(to_host(true_delta(model, corpora.swaps_of(run.target))).astype(np.float64))
    r = run.rank
    cut = (U[:, :r] * S[:r]) @ Vt[:r]
    table.data = table.data + to_device(cut, table.data.dtype)
    return losses(model, run) | {"parameters": 0}


def trained_run(run: Run) -> Row:
    """Train LoRA or everything, and measure."""
    model = prepared(run)
    valid = windows(run, "valid")
    text = corpus_of(run).train
    history = train(
        model,
        batching.batches(text, np.random.default_rng([run.seed, 0]), run.batch, LENGTH),
        AdamW(run.lr, betas=(0.9, 0.99), eps=run.eps),
        steps=run.steps,
        schedule=Schedule(run.steps, warmup=run.steps // 20),
        evaluate=None if run.kind == "search" else lambda: evaluate(model, valid),
        eval_every=every(run.steps),
        threads=1,  # the other cores have runs of their own
    )
    row = losses(model, run) | {"parameters": sum(p.data.size for p in trained(model).values())}
    if run.kind == "final":
        row["curve"] = history.evals
        base = base_of(run)
        whole = run.method == "full"
        changes = spectra.spectrum_between(base, model) if whole else spectra.spectrum(model)
        row["spectra"] = rounded(changes)
        row["shapes"] = {path: list(get(base, f"{path}.weight").data.shape) for path in changes}
    return row


def prepared(run: Run) -> Llama:
    """The base, ready to be trained as the run says."""
    model = base_of(run)
    if run.method == "full":
        unfreeze(model)
        return model
    targets = run.modules[0] if run.modules == ("all-linear",) else run.modules
    inject(model, LoraConfig(run.rank, run.alpha, targets), rng=np.random.default_rng([run.seed, run.rank]))
    return model


def rounded(found: dict[str, np.ndarray]) -> dict[str, list[float]]:
    """Spectra to six digits, as they go into a row."""
    return {path: [float(f"{x:.6g}") if x > 1e-12 * s[0] else 0.0 for x in s] for path, s in found.items()}


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
    """Do what is not done yet of a plan in the folder `out`, and return all rows in the plan's order.

    Runs go to `jobs` processes (default: one per core) with one BLAS thread each; or to any executor whose
    workers have minilora and the same files at the same paths; or to the workers of the dask scheduler at
    "tcp://HOST:PORT", which are sent what they need. `progress(done, known, row)` is called after every run.
    LockedError if another sweep works in the folder, MismatchError if the folder holds another plan or a
    worker has other versions or another base, FormatError if it holds what no run writes (`read_rows`);
    StateError if workers keep dying or cannot be reached.
    """
    if sum(given is not None for given in (jobs, executor, dask)) > 1:
        raise ConfigError("jobs, an executor and dask are three ways to do the runs; expected one of them")
    jobs = check_int("jobs", cores() if jobs is None else jobs, 1)
    texts = {target: corpora.corpus_or_fallback(target) for target in plan.targets}
    for text in texts.values():
        for split in (text.train, text.valid, text.test):
            batching.check_windows(split, 1, LENGTH)
    check_base(plan)
    cells = grid(plan, texts)
    for cell in cells:
        prepared(cell)  # a rank or a module that does not fit is an error before any run
    place: contextlib.AbstractContextManager[Executor | None] = contextlib.nullcontext(executor)
    if dask is not None:
        place = cluster.connect(dask, surroundings, expected(), Stock(huggingface.load(plan.base), texts))
    with place as given, locked(out := named(out)), Workers(jobs, given) as workers:
        store = Store(out, fingerprint(plan, texts), workers, progress)
        store.finish(references(cells))
        rates = chosen_rates(plan, cells, store)
        store.finish(replace(cell, lr=rates[cell], seed=seed) for cell in cells for seed in range(plan.seeds))
        return store.close()


def check_base(plan: Plan) -> None:
    """MismatchError if the base does not read characters, or cannot solve a permutation by its table."""
    c = huggingface.load(plan.base).config
    if c.vocab_size != tokenizer.VOCAB or c.max_position_embeddings < LENGTH:
        raise MismatchError(
            f"{plan.base}: has a vocabulary of {c.vocab_size} and {c.max_position_embeddings} positions; "
            f"expected {tokenizer.VOCAB} characters and at least {LENGTH} positions"
        )
    if not c.tie_word_embeddings and any(corpora.swaps_of(target) for target in plan.targets):
        raise MismatchError(f"{plan.base}: its head is not tied; a permutation needs one that is")


def grid(plan: Plan, texts: dict[str, corpora.Corpus]) -> list[Run]:
    """One Run for each target and method, the full one first, with neither seed nor learning rate."""
    cells = []
    for target in plan.targets:
        how = plan.setting(target)
        full = Run(
            "final", target, "full", steps=how.steps, batch=how.batch, base=plan.base,
            text=texts[target].digest, fallback=texts[target].source.startswith("fallback:"),
            test_windows=plan.test_windows, valid_windows=plan.valid_windows,
        )  # fmt: skip
        lora = replace(full, method="lora", modules=how.modules, alpha=how.alpha, eps=how.eps)
        cells += [full, *(replace(lora, rank=r) for r in plan.ranks_for(target))]
    return cells


def references(cells: list[Run]) -> list[Run]:
    """What needs no training: the base on each target, and the known answer cut to each rank."""
    plain = [replace(c, method="none", modules=(), alpha=0.0, eps=0.0, steps=0, batch=0) for c in cells]
    bases = dict.fromkeys(replace(c, kind="base", rank=0) for c in plain)
    return [*bases, *(replace(c, kind="oracle") for c in plain if c.rank and corpora.swaps_of(c.target))]


def chosen_rates(plan: Plan, cells: list[Run], store: "Store") -> dict[Run, float]:
    """The learning rate of every cell, by validation loss after short runs with a seed of their own.

    Where the best one lies at an edge the search goes on beyond it, at most EDGES times.
    """
    how = {cell: plan.setting(cell.target) for cell in cells}
    rates = {c: list(how[c].full_rates if c.method == "full" else how[c].lora_rates) for c in cells}
    most = {cell: len(lrs) + EDGES for cell, lrs in rates.items()}
    best: dict[Run, float] = {}
    for _ in range(EDGES + 1):
        tried = {
            cell: [replace(short, lr=lr) for lr in rates[cell]]
            for cell in cells
            for short in [replace(cell, kind="search", steps=how[cell].search_steps, seed=SEARCH_SEED)]
        }
        store.finish(run for runs in tried.values() for run in runs)
        grown = False
        for cell, runs in tried.items():
            best[cell] = min(runs, key=lambda run: (store.loss(run), run.lr)).lr
            lrs = rates[cell]
            if best[cell] in (min(lrs), max(lrs)) and len(lrs) < most[cell]:
                lrs.append(float(f"{best[cell] * (STEP if best[cell] == max(lrs) else 1 / STEP):.2g}"))
                grown = True
        if not grown:
            break
    return best


class Store:
    """The rows of a sweep, in memory and in one file that is always complete."""

    def __init__(self, out: Path, fingerprint: Row, workers: "Workers", progress: Progress | None) -> None:
        self.path, self.workers, self.progress = out / "rows.jsonl", workers, progress
        self.order: dict[str, None] = {}  # ids in the plan's order
        self.versions = fingerprint["versions"]
        self.expected = expected() | {"base": fingerprint["base"]}
        check_plan(out / "plan.json", fingerprint)
        self.done = {row["id"]: row for row in read_rows(self.path)} if self.path.exists() else {}
        for id, row in self.done.items():
            check_same(f"{self.path}: run {id}", row["versions"], self.versions)
        self.lines: dict[tuple[str, float | None], bytes] = {}

    def finish(self, runs: Iterable[Run]) -> None:
        """See to it that all these runs are done; a worker that dies costs only its run's work."""
        runs = list(runs)
        self.order |= dict.fromkeys(run.id for run in runs)
        for _ in range(4):
            died = self.attempt([run for run in runs if run.id not in self.done])
            if not died:
                return
            self.workers.renew()
        raise StateError("worker processes keep dying; what is done is kept") from died

    def attempt(self, runs: list[Run]) -> BrokenExecutor | None:
        """Do all of these runs that can be done; the death of a worker, if there was one."""
        died, futures = None, []
        try:
            for run in runs:
                futures.append(self.workers.submit(run))
        except BrokenExecutor as e:
            died = e
        for future in as_completed(futures):
            try:
                row, surroundings = future.result()
            except BrokenExecutor as e:
                died = e
                continue
            check_same(f"run {row['id']}", surroundings, self.expected)
            self.add(row)
        return died

    def add(self, row: Row) -> None:
        """Keep one finished row, durably."""
        self.done[row["id"]] = json.loads(json.dumps(row | {"versions": self.versions}))  # as read back
        later = [row for id, row in self.done.items() if id not in self.order]  # of an earlier start
        self.write([*self.rows(), *later])
        if self.progress:
            self.progress(sum(id in self.done for id in self.order), len(self.order), row)

    def write(self, rows: list[Row]) -> None:
        """Replace the file, if it holds anything else."""
        lines = b"".join(map(self.line, rows))
        if not self.path.exists() or read(self.path) != lines:
            write_atomic(self.path, lines)

    def line(self, row: Row) -> bytes:
        """The sealed row, sealed once: only its share of the gap can change when other runs are done."""
        key = row["id"], row.get("gap_closed")
        if key not in self.lines:
            self.lines[key] = sealed(row)
        return self.lines[key]

    def close(self) -> list[Row]:
        """Leave the rows of the plan and no others in the file, and return them."""
        rows = self.rows()
        self.write(rows)
        return rows

    def rows(self) -> list[Row]:
        """What is done of the plan, in its order, each with the share of the gap that it closed."""
        return with_gaps([self.done[id] for id in self.order if id in self.done])

    def loss(self, run: Run) -> float:
        """The validation loss of a finished run; infinite if it diverged."""
        return float(self.done[run.id].get("valid", math.inf))


class Workers:
    """Processes with one BLAS thread each, which end with their parent; or the caller's executor."""

    def __init__(self, jobs: int, executor: Executor | None) -> None:
        self.jobs, self.given, self.pool = jobs, executor, executor

    def __enter__(self) -> "Workers":
        self.others = multiprocessing.active_children()  # the caller's, if it has any
        self.before = {name: os.environ.get(name) for name in THREADS}
        os.environ.update(dict.fromkeys(THREADS, "1"))  # read by BLAS when a worker starts
        return self

    def __exit__(self, *error: object) -> None:
        if self.pool is not None and self.given is None:
            if error[0] is not None:  # nobody would keep what they are at
                for process in multiprocessing.active_children():
                    if process not in self.others:
                        process.terminate()
            self.pool.shutdown(cancel_futures=True)
        for name, value in self.before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})

    def submit(self, run: Run) -> Future[tuple[Row, Row]]:
        """Have one run done."""
        if self.given is not None:
            return self.given.submit(job, run)
        with uninterrupted():
            if self.pool is None:
                context = multiprocessing.get_context("spawn")  # a forked child would hold the lock
                self.pool = ProcessPoolExecutor(self.jobs, context, initializer=follow_parent)
            return self.pool.submit(job, run)

    def renew(self) -> None:
        """After a worker has died: new processes."""
        if self.given is None:
            self.pool = None


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Let interrupts wait while a worker is started: they would cut that in two.

    The worker inherits the mask, so none reaches it before it can ignore them. The mask alone is not
    enough here: another thread may take the signal, and Python runs the handler in this one.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    resource_tracker.ensure_running()  # starting it unblocks the signals
    waiting: list[int] = []
    handlers = {n: signal.signal(n, lambda number, frame: waiting.append(number)) for n in INTERRUPTS}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, INTERRUPTS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for which, handler in handlers.items():
            signal.signal(which, handler)
    for number in waiting[:1]:
        signal.raise_signal(number)


def follow_parent() -> None:
    """In a worker: leave interrupts to the parent, and end when it ends, however it does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, INTERRUPTS)  # a worker starts with them blocked
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def fingerprint(plan: Plan, texts: dict[str, corpora.Corpus]) -> Row:
    """What a folder of rows belongs to: the plan, the texts, the base and the versions."""
    return json.loads(json.dumps({  # as it is read back: lists for tuples
        "schema": SCHEMA,
        "plan": asdict(plan),
        "texts": {target: text.digest for target, text in texts.items()},
        "base": digest(huggingface.load(plan.base)),
        "versions": versions(),
    }))  # fmt: skip


def versions() -> dict[str, str]:
    """What the last digits of a row depend on; a backend is named only if it is not NumPy."""
    blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
    return {
        "minilora": __version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "blas": f"{blas['name']} {blas['version']}",
        "machine": platform.machine(),
    } | ({} if backend.name == "numpy" else {"backend": backend.name})


def surroundings() -> Row:
    """What a worker must have in common with the process that started the sweep."""
    return versions() | {"backend": backend.name} | {name: os.environ.get(name) for name in THREADS}


def expected() -> Row:
    """The surroundings that a worker must have: ours, with one BLAS thread."""
    return surroundings() | dict.fromkeys(THREADS, "1")


def check_plan(path: Path, wanted: Row) -> None:
    """Write the plan of a new folder; MismatchError, naming the difference, if it holds another."""
    if not path.exists():
        if path.with_name("rows.jsonl").exists():
            raise MismatchError(f"{path.parent}: holds rows without their plan; expected another --out")
        write_atomic(path, (json.dumps(wanted, indent=1) + "\n").encode())
        return
    found = huggingface.read_json(path)
    for part in {**wanted, **found}:
        old, new = found.get(part), wanted.get(part)
        if old == new:
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            key = next(k for k in {**new, **old} if k not in old or k not in new or old[k] != new[k])
            part, old, new = f"{part}.{key}", old.get(key), new.get(key)
        raise MismatchError(
            f"{path.parent}: holds a sweep with {part} {short(old)}; this one has {short(new)}; "
            "expected the same plan, or another folder by --out"
        )


def seal(row: Row) -> str:
    """The sha256 of a row without its seal."""
    return hashlib.sha256(json.dumps({k: v for k, v in row.items() if k != "sha256"}).encode()).hexdigest()


def sealed(row: Row) -> bytes:
    """One line of the file of rows."""
    row = {k: v for k, v in row.items() if k != "sha256"}
    return (json.dumps(row | {"sha256": seal(row)}, allow_nan=False) + "\n").encode()


def read_rows(path: Path | str) -> list[Row]:
    """The intact rows of a file, each with its share of the gap; a damaged line is named on stderr, no more.

    A line with a right seal is as it was written. If it is no row all the same, or one of another sweep,
    nobody can tell what it means: FormatError or MismatchError names line and field.
    """
    rows: dict[str, Row] = {}
    for i, line in enumerate(read(path).splitlines()):
        where = f"{path}: line {i + 1}"
        try:
            row = json.loads(line, object_pairs_hook=unique)
            if not isinstance(row, dict) or row.pop("sha256", None) != seal(row):
                raise ValueError("its digest is another")
        except (ValueError, RecursionError) as e:
            print(plain(f"minilora: {where} does not count: {str(e)[:100]}"), file=sys.stderr)
            continue
        check_row(f"{where}: row", row)
        row.pop("gap_closed", None)  # it follows from the others
        if rows.setdefault(row["id"], row) != row:
            raise MismatchError(f"{where}: another row of the run {row['id']} stands before it")
    check_together(path, rows.values())
    return with_gaps(list(rows.values()))


def with_gaps(rows: list[Row]) -> list[Row]:
    """The rows, each final one with gap_closed = (L_base - L) / (L_base - L_full) where both are there."""
    tests: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        if row["status"] == "done" and row["config"]["kind"] in ("base", "final"):
            tests.setdefault((row["config"]["target"], row["config"]["method"]), []).append(row["test"])
    out = []
    for row in rows:
        target = row["config"]["target"]
        base, full = tests.get((target, "none")), tests.get((target, "full"))
        if row["config"]["kind"] == "final" and row["status"] == "done" and base and full:
            gap = base[0] - math.fsum(full) / len(full)
            row = {k: v for k, v in row.items() if k != "sha256"}
            share = (base[0] - row["test"]) / gap if gap > 0 else math.inf
            row["gap_closed"] = share if math.isfinite(share) else None
        out.append(row)
    return out


def summary(rows: list[Row]) -> list[Row]:
    """One line for each target and method: mean and range of the test loss, gap closed, parameters, lr."""
    groups: dict[tuple[str, str, int], list[Row]] = {}
    for row in rows:
        c = row["config"]
        if c["kind"] in ("base", "final"):
            groups.setdefault((c["target"], c["method"], c["rank"]), []).append(row)
    lines = []
    for (target, method, rank), group in groups.items():
        done = [row for row in group if row["status"] == "done"]
        line: Row = {"target": target, "method": method, "rank": rank, "lr": group[0]["config"]["lr"]}
        line |= {"seeds": len(done), "diverged": len(group) - len(done)}
        if done:
            tests = [row["test"] for row in done]
            gaps = [row["gap_closed"] for row in done if row.get("gap_closed") is not None]
            line |= {"parameters": done[0]["parameters"], "test": math.fsum(tests) / len(tests)}
            line |= {"low": min(tests), "high": max(tests), "floor": done[0].get("floor")}
            line["gap_closed"] = math.fsum(gaps) / len(gaps) if gaps else None
        lines.append(line)
    return lines


FIGURES = ("loss_against_rank", "known_rank", "spectra", "energy", "curves")  # of one target


def figure_names(rows: list[Row]) -> dict[str, str]:
    """Target -> the end of its figures' file names, another one for each target."""
    names: dict[str, str] = {}
    for target in dict.fromkeys(row["config"]["target"] for row in rows):
        stem = name = re.sub(r"[^A-Za-z0-9]+", "_", Path(target).stem)[:100]  # a file's name has an end
        while name in names.values():
            name = f"{stem}_{len(names) + 1}"
        names[target] = name
    return names


def pictures(rows: list[Row]) -> dict[str, plotting.Picture]:
    """All figures that the rows have the runs for, by file name."""
    drawn = {}
    complete = rank_figures.targets(rows)
    names = figure_names(rows)
    for target in complete:
        name = names[target]
        drawn[f"loss_against_rank_{name}"] = rank_figures.loss_against_rank(rows, target)
        if corpora.swaps_of(target) and TABLE.modules[0] in rank_figures.kinds(
            rank_figures.final(rows, target)
        ):
            drawn[f"known_rank_{name}"] = rank_figures.known_rank(rows, target)
        drawn[f"spectra_{name}"] = rank_figures.spectra(rows, target)
        drawn[f"energy_{name}"] = rank_figures.energy_and_effective_rank(rows, target)
        drawn[f"curves_{name}"] = rank_figures.learning_curves(rows, target)
    if complete:
        drawn["gap_against_parameters"] = rank_figures.gap_against_parameters(rows)
    return drawn


CAVEAT = (
    "The learning rate falls to zero over a run, so a part of this is the schedule's doing; "
    "a sweep with twice the --steps tells how large a part."
)
HEAD = ("method", "parameters", "learning rate", "test loss", "range over seeds", "gap closed")


def lines(rows: list[Row], target: str) -> list[tuple[str, ...]]:
    """The table of one target, in words."""
    found: list[tuple[str, ...]] = []
    for line in summary(rows):
        if line["target"] == target:
            names = {"none": "frozen base", "full": "full fine-tuning", "lora": f"LoRA r = {line['rank']}"}
            name = names[line["method"]] + (f" ({line['diverged']} diverged)" if line["diverged"] else "")
            if not line["seeds"]:
                found.append((name, "", f"{line['lr']:.2g}", "diverged", "", ""))
                continue
            rate = f"{line['lr']:.2g}" if line["lr"] else ""
            spread = f"{line['low']:.4f} to {line['high']:.4f}" if line["lr"] else ""
            gap = f"{line['gap_closed']:.0%}" if line["gap_closed"] is not None else ""
            found.append((name, f"{line['parameters']:,}", rate, f"{line['test']:.4f}", spread, gap))
    return found


def table(rows: list[Row]) -> str:
    """The results as a table for the terminal."""
    out: list[str] = []
    for target in dict.fromkeys(line["target"] for line in summary(rows)):
        fallback = any(r["config"]["fallback"] for r in rows if r["config"]["target"] == target)
        note = "; fallback text, not the one named" if fallback else ""
        out += [
            f"{target}  (test loss in nats per character{note})",
            *Table(HEAD, lines(rows, target)).lines(),
            "",
        ]
    return printed(*out)


def report_page(rows: list[Row], pictures: dict[str, plotting.Picture]) -> str:
    """The whole sweep as one HTML page."""
    parts = []
    names = figure_names(rows)
    for target in names:
        some = [row for row in rows if row["config"]["target"] == target]
        full = rank_figures.select(some, kind="final", method="full")
        parts.append(report.heading(rank_figures.title(target)))
        parts.append(report.paragraph(f"Text: {some[0]['source']}."))
        parts.append(Table(HEAD, lines(rows, target), "Test loss in nats per character").html())
        if full:
            parts.append(
                report.paragraph(f"Has full fine-tuning flattened? {rank_figures.flattening(full)}. {CAVEAT}")
            )
        drawn = [f"{kind}_{names[target]}" for kind in FIGURES]
        parts += [report.drawing(name, pictures[name]) for name in drawn if name in pictures]
    if "gap_against_parameters" in pictures:
        parts.append(report.heading("What the parameters buy"))
        parts.append(report.drawing("gap", pictures["gap_against_parameters"]))
    made: Row = {}
    for target in names:
        last = [row["config"] for row in rows if row["config"]["target"] == target][-1]
        made[target] = (
            f"{last['steps']} steps of {last['batch']} windows of {LENGTH} characters; LoRA on "
            f"{', '.join(last['modules'])} with alpha {last['alpha']:g}; AdamW eps {last['eps']:g}; "
            f"tested on at most {last['test_windows']} windows, evenly over the held-out text"
        )
    made["learning rate"] = "chosen on the validation split by short runs with a seed of their own"
    parts.append(report.facts(made | rows[0]["versions"]))
    return report.page("Which rank does a task need?", parts)

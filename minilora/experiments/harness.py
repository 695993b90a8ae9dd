"""A grid of cells -> rows: each cell is run once, wherever there is room for it, and no kill loses a row.

An experiment is a question. It brings three things: its cells (frozen dataclasses with an `id`), a
module-level function `run(cell, inputs) -> row`, and the form of its rows. What every grid needs is here:
inputs that are read once; processes, an executor, dask or none of them; and a file of sealed rows.

    inputs = read_inputs(base, targets)
    with open_store(out, run, inputs, plan, form, jobs=2) as store:
        store.finish(cells)  # once more for cells that depend on rows
        rows = store.close()

The file of rows is the state. A row is appended when its run is done, so it costs the same after ten others
as after ten thousand; at the end the file is put into the plan's order. Rows hold no times and no machine
names: the same plan on the same machine gives the same bytes. Stands in for a workflow engine; leaves out
retries of failed runs, priorities, and runs that need each other's weights.
"""

import contextlib
import json
import math
import os
import platform
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import BrokenExecutor, Executor, Future, as_completed
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from .. import __version__, backend
from ..backend import THREADS, cores, one_blas_thread, quiet_overflow
from ..console import interrupts
from ..data import corpora
from ..digests import of_json
from ..errors import (
    ConfigError,
    FormatError,
    MismatchError,
    NonFiniteError,
    StateError,
    UnsupportedError,
    check_int,
    check_same,
    short,
)
from ..formats import forms, huggingface
from ..formats.atomic import append, exists, locked, named, read, write_atomic
from ..formats.safetensors import unique
from ..model import Llama
from ..table import plain
from ..tree import digest

SCHEMA = 1
SEARCH_SEED = 1000  # of the runs that choose a learning rate
ATTEMPTS = 4  # at a run whose worker dies

Row = dict[str, Any]
Outcome = tuple[Row, Row]  # a row, and the environment in which it was made
Progress = Callable[[int, int, Row], None]  # runs done, runs known, the last row


class Cell(Protocol):
    """One run of a grid: a frozen dataclass. The same cell gives the same row."""

    @property
    def id(self) -> str:
        """`id_of` its config."""


def id_of(config: Row) -> str:
    """A short name that follows from the config of a cell."""
    return of_json(config, sort=True)[:16]


# ---- inputs


@dataclass(frozen=True)
class Inputs:
    """What all runs of a grid read and none may change."""

    path: str  # of the base
    base: Llama
    texts: dict[str, corpora.Corpus]  # by target

    def source(self) -> "Source":
        """Where another process can read the same inputs."""
        texts = ((target, text.digest, is_fallback(text)) for target, text in self.texts.items())
        return Source(self.path, digest(self.base), tuple(texts))


@dataclass(frozen=True)
class Source:
    """Where to read inputs and which digests they must have: small enough to send with every run."""

    path: str
    digest: str
    texts: tuple[tuple[str, str, bool], ...]  # target, digest, whether it is the fallback


def read_inputs(path: str, targets: Iterable[str]) -> Inputs:
    """The base at `path` and the text of each target, or the fallback for a text that cannot be fetched."""
    texts = {target: corpora.corpus_or_fallback(target) for target in targets}
    return Inputs(path, huggingface.load(path), texts)


@lru_cache(1)
def read_again(source: Source) -> Inputs:
    """The inputs, read once in each process that was not sent them; MismatchError if they have changed."""
    base = huggingface.load(source.path)
    if digest(base) != source.digest:
        raise MismatchError(f"{source.path}: the base is not the one that the sweep began with")
    texts = {}
    for target, expected, fallback in source.texts:
        texts[target] = corpora.fallback(target) if fallback else corpora.corpus(target)
        if texts[target].digest != expected:
            raise MismatchError(f"{target}: the text is not the one that the sweep began with")
    return Inputs(source.path, base, texts)


def is_fallback(text: corpora.Corpus) -> bool:
    """Whether a text stands in for one that could not be fetched."""
    return text.source.startswith("fallback:")


# ---- one run, in any process

Runner = Callable[[Any, Inputs], Row]


def do(run: Runner, cell: Any, inputs: Inputs) -> Outcome:
    """The row of a cell, and the environment in which it was made."""
    return run(cell, inputs), environment() | {"base": digest(inputs.base)}


@dataclass(frozen=True)
class Job:
    """`do` for every cell of a grid. It is pickled without its inputs: other processes read them."""

    run: Runner
    source: Source
    inputs: Inputs | None = None

    def __call__(self, cell: Any) -> Outcome:
        return do(self.run, cell, self.inputs or read_again(self.source))

    def __reduce__(self) -> tuple[Any, ...]:
        return Job, (self.run, self.source)


def row_of(cell: Any, source: str, measure: Callable[[], Row]) -> Row:
    """The row of a cell: its config, the source of its text, and the measurements, or why it diverged."""
    row = {"id": cell.id, "config": asdict(cell), "source": source}
    try:
        with quiet_overflow():
            return row | {"status": "done"} | measure()
    except NonFiniteError as e:
        return row | {"status": "diverged", "error": str(e)}


def versions() -> dict[str, str]:
    """What the last digits of a row depend on; the backend only if it is not NumPy."""
    blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
    return {
        "minilora": __version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "blas": f"{blas['name']} {blas.get('version', '')}".strip(),  # NumPy in a browser has none
        "machine": platform.machine(),
    } | ({} if backend.name == "numpy" else {"backend": backend.name})


def environment() -> Row:
    """What a worker must share with the process that started the grid."""
    return versions() | {"backend": backend.name} | {name: os.environ.get(name) for name in THREADS}


# ---- the whole grid


@contextlib.contextmanager
def open_store(
    out: Path | str,
    run: Runner,
    inputs: Inputs,
    plan: Row,
    form: "RowForm",
    *,
    jobs: int | None = None,
    executor: Executor | None = None,
    dask: str | None = None,
    progress: Progress | None = None,
) -> Iterator["Store"]:
    """The rows of a plan in the folder `out`, which is locked, and the workers that make the missing rows.

    Runs go to `jobs` processes (default: one per core; a single one is this process itself) with one BLAS
    thread each; or to any executor whose workers have minilora and the same files at the same paths; or to
    the workers of the dask scheduler at "tcp://HOST:PORT", which are sent what they need.
    `progress(done, known, row)` is called after every run. LockedError if another process works in the
    folder; MismatchError if the folder holds another plan or a worker has other versions or another base;
    FormatError if the folder holds a row that no run writes (`read_rows`); StateError if workers keep dying
    or cannot be reached; UnsupportedError for several processes on a platform without processes; ConfigError
    for more than one of `jobs`, `executor` and `dask`.
    """
    if sum(way is not None for way in (jobs, executor, dask)) > 1:
        raise ConfigError("jobs, an executor and dask are three ways to do the runs; expected one of them")
    if jobs is not None:
        check_int("jobs", jobs, 1)
    source = inputs.source()
    job: Callable[[Any], Outcome] = Job(run, source, inputs)
    with contextlib.ExitStack() as stack:
        held = stack.enter_context(one_blas_thread_each())
        if dask is not None:
            from . import cluster

            executor = stack.enter_context(cluster.connect(dask, environment, environment(), inputs))
            job = partial(do, run)  # a worker calls it with the inputs that it was sent
        alone = executor is None and in_this_process(jobs, held)
        out = named(out)
        stack.enter_context(locked(out))
        outcomes: Outcomes = partial(map, job)
        if not alone:
            pool = Pool(job, jobs or cores(), executor)
            stack.push(pool.end)
            outcomes = pool.outcomes
        check_plan(out / "plan.json", fingerprint(plan, source))
        yield Store(out / "rows.jsonl", form, environment() | {"base": source.digest}, outcomes, progress)


def fingerprint(plan: Row, source: Source) -> Row:
    """The identity of a folder of rows: the plan, the texts, the base and the versions."""
    return json.loads(json.dumps({  # as read back: tuples become lists
        "schema": SCHEMA,
        "plan": plan,
        "texts": {target: text for target, text, _ in source.texts},
        "base": source.digest,
        "versions": versions(),
    }))  # fmt: skip


def check_plan(path: Path, current: Row) -> None:
    """Write the plan of a new folder; MismatchError, naming the difference, if it holds another plan."""
    if not path.exists():
        if path.with_name("rows.jsonl").exists():
            raise MismatchError(f"{path.parent}: has rows.jsonl but no plan.json; use another --out")
        write_atomic(path, (json.dumps(current, indent=1) + "\n").encode())
        return
    stored = huggingface.read_json(path)
    for field in {**current, **stored}:
        old, new = stored.get(field), current.get(field)
        if old == new:
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            key = next(k for k in {**new, **old} if k not in old or k not in new or old[k] != new[k])
            field, old, new = f"{field}.{key}", old.get(key), new.get(key)
        raise MismatchError(
            f"{path.parent}: holds a sweep with {field} {short(old)}; this one has {short(new)}; "
            "expected the same plan, or another folder by --out"
        )


# ---- the file of rows


@dataclass(frozen=True)
class RowForm:
    """The form of an experiment's rows, beyond an id, a config and the versions."""

    check: Callable[[str, Row], None] = forms.anything  # (name, row); FormatError names the field
    check_together: Callable[[str, Iterable[Row]], None] = forms.anything  # (file, rows)
    derive: Callable[[list[Row]], list[Row]] = list  # rows -> rows with fields that follow from other rows
    derived: tuple[str, ...] = ()  # the names of those fields


LARGEST = 1e39  # no float32 is larger, and no sum of such losses overflows
LOSS, SIZE = forms.number(-LARGEST, LARGEST), forms.number(0, LARGEST)
EVERY = {"id": forms.text, "source": forms.text, "versions": forms.named(forms.text)}


def form_of(measured: Mapping[str, dict[str, forms.Form]], **config: forms.Form) -> RowForm:
    """The form of rows whose cells have a `kind`: kind -> what its runs measure unless they diverge.

    `config` are the forms of more fields of a cell.
    """
    kinds = forms.has({"kind": forms.one(*measured), **config})
    head = forms.has({"status": forms.one("done", "diverged"), "config": kinds})
    every = EVERY | {"status": forms.text, "config": forms.anything}

    def check(where: str, row: Row) -> None:
        head(where, row)
        done = row["status"] == "done"
        forms.record(every | (measured[row["config"]["kind"]] if done else {"error": forms.text}))(where, row)

    return RowForm(check)


HEAD = forms.has({"id": forms.text, "config": forms.has({}), "versions": forms.named(forms.text)})


def seal(row: Row) -> str:
    """The sha256 of a row without its seal."""
    return of_json({k: v for k, v in row.items() if k != "sha256"})


def sealed(row: Row) -> bytes:
    """One line of the file of rows."""
    return (json.dumps(row | {"sha256": seal(row)}, allow_nan=False) + "\n").encode()


def read_rows(path: Path | str, form: RowForm) -> list[Row]:
    """The intact rows of a file with their derived fields; a damaged line is only named on stderr.

    A line whose seal is right is as it was written. If it is still not a row, or belongs to another
    sweep, FormatError or MismatchError names line and field.
    """
    return form.derive(list(intact_rows(path, form)[0].values()))


def intact_rows(path: Path | str, form: RowForm) -> tuple[dict[str, Row], bytes]:
    """The intact rows of a file by id, without derived fields, and their lines.

    A last line without an end does not count as damage: its process died while appending it.
    """
    rows: dict[str, Row] = {}
    kept = []
    for i, line in enumerate(read(path).splitlines(keepends=True)):
        where = f"{path}: line {i + 1}"
        try:
            row = json.loads(line, object_pairs_hook=unique)
            if not isinstance(row, dict) or row.pop("sha256", None) != seal(row):
                raise ValueError("its sha256 does not match")
        except (ValueError, RecursionError) as e:
            if line.endswith((b"\n", b"\r")):
                print(plain(f"minilora: {where} is skipped: {str(e)[:100]}"), file=sys.stderr)
            continue
        HEAD(f"{where}: row", row)
        form.check(f"{where}: row", row)
        if row["id"] != id_of(row["config"]):
            raise FormatError(
                f"{where}: row.id is {short(row['id'])}; its config gives {id_of(row['config'])}"
            )
        for name in form.derived:
            row.pop(name, None)
        if row["id"] not in rows:
            kept.append(line.rstrip() + b"\n")
        if rows.setdefault(row["id"], row) != row:
            raise MismatchError(f"{where}: differs from an earlier row of the same run, {row['id']}")
    form.check_together(str(path), rows.values())
    return rows, b"".join(kept)


class Store:
    """The rows of a plan, in memory and in a file; each is appended when its run is done."""

    def __init__(
        self, path: Path, form: RowForm, environment: Row, outcomes: "Outcomes", progress: Progress | None
    ) -> None:
        self.path, self.form, self.outcomes, self.progress = path, form, outcomes, progress
        self.environment, self.versions = environment, versions()
        self.order: dict[str, None] = {}  # ids in the plan's order
        self.count = 0  # how many of them are done
        self.done: dict[str, Row] = {}
        if exists(path):
            self.done, lines = intact_rows(path, form)
            for id, row in self.done.items():
                check_same(f"{path}: run {id}", row["versions"], self.versions)
            self.replace(lines)  # a row cannot be appended to half a line

    def finish(self, cells: Iterable[Cell]) -> None:
        """Do the runs of all these cells that are not done yet."""
        runs = {cell.id: cell for cell in cells}
        self.order |= dict.fromkeys(runs)
        self.count = sum(id in self.done for id in self.order)
        for row, environment in self.outcomes([cell for id, cell in runs.items() if id not in self.done]):
            check_same(f"run {row['id']}", environment, self.environment)
            self.add(row)

    def add(self, row: Row) -> None:
        """Append one finished row to the file, durably."""
        line = sealed(row | {"versions": self.versions})
        append(self.path, line)
        self.done[row["id"]] = {k: v for k, v in json.loads(line).items() if k != "sha256"}  # as read back
        self.count += 1
        if self.progress:
            self.progress(self.count, len(self.order), row)

    def close(self) -> list[Row]:
        """Rewrite the file as the plan's rows only, in the plan's order, and return them."""
        rows = self.form.derive([self.done[id] for id in self.order])
        self.replace(b"".join(map(sealed, rows)))
        return rows

    def replace(self, lines: bytes) -> None:
        """Replace the file unless it holds exactly these lines."""
        if not exists(self.path) or read(self.path) != lines:
            write_atomic(self.path, lines)


C = TypeVar("C")


def chosen_rates(
    store: Store,
    starts: Mapping[C, Sequence[float]],
    search: Callable[[C, float], Cell],
    step: float = 2.0,
    edges: int = 0,
) -> dict[C, float]:
    """Key -> the learning rate whose run `search(key, rate)` has the smallest validation loss, "valid".

    Each search tries the rates of `starts` first. If the best one lies at an edge, the search extends by a
    factor `step` beyond it, at most `edges` times. Of equal losses the smaller rate is chosen.
    """
    rates = {key: list(some) for key, some in starts.items()}
    best: dict[C, float] = {}
    for _ in range(edges + 1):
        tried = {key: {rate: search(key, rate) for rate in some} for key, some in rates.items()}
        store.finish(run for runs in tried.values() for run in runs.values())
        for key, runs in tried.items():
            loss = {rate: store.done[run.id].get("valid", math.inf) for rate, run in runs.items()}
            best[key] = min(loss, key=lambda rate: (loss[rate], rate))
        at_edge = [key for key, some in rates.items() if best[key] in (min(some), max(some))]
        for key in at_edge:
            beyond = step if best[key] == max(rates[key]) else 1 / step
            rates[key].append(float(f"{best[key] * beyond:.2g}"))
        if not at_edge:
            break
    return best


# ---- where runs are done: a function from cells to outcomes, in the order in which they finish

Outcomes = Callable[[list[Cell]], Iterable[Outcome]]


@contextlib.contextmanager
def one_blas_thread_each() -> Iterator[bool]:
    """One BLAS thread in each process started within the context; yields whether this one has one, too."""
    before = {name: os.environ.get(name) for name in THREADS}
    with one_blas_thread() as held:
        os.environ.update(dict.fromkeys(THREADS, "1"))  # read by BLAS when a worker starts
        try:
            yield held
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})


def in_this_process(jobs: int | None, held: bool) -> bool:
    """Whether runs are done here, one by one: for one job, or on a platform without processes."""
    try:
        import multiprocessing.synchronize  # noqa: F401
    except ImportError as e:
        if jobs is not None and jobs > 1:
            raise UnsupportedError(f"jobs is {jobs}; this platform has no processes; expected 1") from e
        return True
    return held and (jobs or cores()) == 1


class Pool:
    """The caller's executor; or our own processes with one BLAS thread each, which end with their parent."""

    def __init__(self, job: Callable[[Any], Outcome], jobs: int, executor: Executor | None) -> None:
        self.job, self.jobs, self.executor = job, jobs, executor
        self.processes: Executor | None = None
        if executor is None:
            from multiprocessing import active_children

            self.others = active_children()  # the caller's own

    def end(self, *error: object) -> None:
        """End our own processes, at once after an error: nobody would keep their results."""
        if self.processes is not None:
            if error[0] is not None:
                from multiprocessing import active_children

                for process in active_children():
                    if process not in self.others:
                        process.terminate()
            self.processes.shutdown(cancel_futures=True)

    def outcomes(self, cells: list[Cell]) -> Iterator[Outcome]:
        """The outcome of each cell, as it finishes; a worker that dies costs only its run's work."""
        left = dict.fromkeys(cells)
        for _ in range(ATTEMPTS):
            died: BrokenExecutor | None = None
            futures: dict[Future[Outcome], Cell] = {}
            try:
                for cell in left:
                    futures[self.submit(cell)] = cell
            except BrokenExecutor as e:
                died = e
            for future in as_completed(futures):
                try:
                    outcome = future.result()
                except BrokenExecutor as e:
                    died = e
                else:
                    del left[futures[future]]
                    yield outcome
            if not died:
                return
            self.processes = None  # start new ones if they were ours
        raise StateError("worker processes keep dying; finished runs are kept") from died

    def submit(self, cell: Cell) -> Future[Outcome]:
        """Submit one run."""
        with uninterrupted():
            if self.executor is not None:
                return self.executor.submit(self.job, cell)
            if self.processes is None:
                from concurrent.futures import ProcessPoolExecutor
                from multiprocessing import get_context

                context = get_context("spawn")  # a forked child would hold the lock
                self.processes = ProcessPoolExecutor(self.jobs, context, initializer=follow_parent)
            return self.processes.submit(self.job, cell)


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold interrupts back while a run is submitted: they would leave a worker, or dask's future, half made.

    The worker inherits the mask, so no interrupt reaches it before it can ignore them. The mask alone is not
    enough here: another thread may take the signal, and Python runs the handler in this one.
    """
    from multiprocessing import resource_tracker

    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # starting it unblocks the signals
    waiting: list[int] = []
    handlers = {n: signal.signal(n, lambda number, frame: waiting.append(number)) for n in interrupts()}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, handlers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in handlers.items():
            signal.signal(number, handler)
    for number in waiting[:1]:
        signal.raise_signal(number)


def follow_parent() -> None:
    """In a worker: leave interrupts to the parent, and exit when the parent ends, for whatever reason."""
    from multiprocessing import parent_process

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, interrupts())  # a worker starts with them blocked
    parent = parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()

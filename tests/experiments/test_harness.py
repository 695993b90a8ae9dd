"""A grid of any experiment: each cell once, its inputs read once, its rows kept to the byte.

`Wobble` is a whole experiment: a question, its cells, the run of one, what its rows are, and a table.
"""

import json
import math
import multiprocessing
import os
import pickle
import shutil
import signal
import sys
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_rank_sweep import Counting, Stopped, held, place, plan_of, stop_at, wait, whole  # noqa: F401

from minilora.data import batching, corpora
from minilora.errors import FormatError, MismatchError, NonFiniteError, StateError, UnsupportedError
from minilora.experiments import harness, rank_sweep
from minilora.experiments.harness import Inputs, Job, RowForm, Store, id_of, read_inputs, sealed
from minilora.formats import atomic, forms, huggingface
from minilora.formats.huggingface import save_model
from minilora.model import Config, llama
from minilora.table import Table
from minilora.training import evaluate
from minilora.tree import named_params

# ---- an experiment in one file: how much noise on its weights does a model bear?


@dataclass(frozen=True)
class Wobble:
    """The base with noise of a size on all its weights."""

    target: str
    size: float
    seed: int

    @property
    def id(self):
        return id_of(asdict(self))


def wobbled(cell, inputs):
    """The test loss with noise on the weights."""
    text = inputs.texts[cell.target]
    model = pickle.loads(pickle.dumps(inputs.base))
    rng = np.random.default_rng(cell.seed)

    def measure():
        for p in named_params(model).values():
            p.data = p.data + np.float32(cell.size) * rng.standard_normal(p.data.shape).astype(np.float32)
        loss = evaluate(model, batching.eval_batches(text.test, 4, 32, limit=256))
        if not np.isfinite(loss):
            raise NonFiniteError("the loss is not finite")
        return {"test": loss}

    return harness.row_of(cell, text.source, measure)


def check(where, row):
    if row["status"] == "done":
        forms.has({"test": forms.number(0)})(where, row)


def against_none(rows):
    """What the noise costs, which follows from the row without any."""
    least = min((row["test"] for row in rows if row["status"] == "done"), default=0.0)
    return [row | {"cost": row["test"] - least} if row["status"] == "done" else row for row in rows]


WOBBLES = RowForm(check=check, derive=against_none, derived=("cost",))
SIZES = (0.0, 0.1, 0.2, 1e38)


def wobble(base, target, out, **how):
    """All rows of the question."""
    inputs = read_inputs(base, [target])
    plan = {"sizes": SIZES, "seeds": 2, "base": base}
    with harness.open_store(out, wobbled, inputs, plan, WOBBLES, **how) as store:
        store.finish(Wobble(target, size, 0) for size in SIZES)
        best = min(SIZES, key=lambda size: store.done[Wobble(target, size, 0).id].get("test", np.inf))
        store.finish(Wobble(target, best, seed) for seed in (1, 2))
        return store.close()


def table(rows):
    """Noise and loss, in words."""
    lines = [(f"{row['config']['size']:g}", f"{row.get('test', np.inf):.3f}") for row in rows]
    return str(Table(("noise", "test loss"), lines))


@pytest.fixture(scope="module")
def things(place):  # noqa: F811
    """The base and the text."""
    return str(place / "base"), str(place / "mine.txt")


@pytest.fixture(scope="module")
def toy(things, tmp_path_factory):
    """The folder and the rows of the undisturbed experiment, run in this process."""
    out = tmp_path_factory.mktemp("toy") / "out"
    return out, wobble(*things, out, jobs=1)


def test_an_experiment_writes_its_rows_and_plan(toy, things):
    rows = toy[1]
    assert [row["config"]["size"] for row in rows] == [*SIZES, 0.0, 0.0]
    assert [row["status"] for row in rows] == ["done", "done", "done", "diverged", "done", "done"]
    assert rows[0]["cost"] == 0.0 < rows[1]["cost"] < rows[2]["cost"]
    assert table(rows).splitlines()[4].split() == ["1e+38", "inf"]
    assert harness.read_rows(toy[0] / "rows.jsonl", WOBBLES) == rows
    assert json.loads((toy[0] / "plan.json").read_text())["plan"]["sizes"] == list(SIZES)


def in_threads(things, out):
    with ThreadPoolExecutor(3) as executor:
        return wobble(*things, out, executor=executor)


def in_the_callers_processes(things, out):
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as executor:
        return wobble(*things, out, executor=executor)


def killed_and_resumed(things, out):
    """Killed after the first, second, ... row, and once with its processes."""
    for jobs, count in ((1, 1), (1, 2), (2, 3), (1, 4)):
        with pytest.raises(Stopped):
            wobble(*things, out, jobs=jobs, progress=stop_at(count))
        assert len(harness.read_rows(out / "rows.jsonl", WOBBLES)) >= count
    return wobble(*things, out, jobs=1)


WAYS = {
    "one after the other": lambda things, out: wobble(*things, out, jobs=1),
    "two processes": lambda things, out: wobble(*things, out, jobs=2),
    "threads": in_threads,
    "the caller's processes": in_the_callers_processes,
    "killed and resumed": killed_and_resumed,
}


@pytest.mark.parametrize(  # the caller's processes give the same bytes in test_cluster.py, too
    "way", [pytest.param(way, marks=pytest.mark.slow if "caller" in way else ()) for way in WAYS]
)
def test_the_rows_do_not_depend_on_how_they_are_run(way, things, toy, tmp_path):
    assert WAYS[way](things, tmp_path / "out") == toy[1]
    assert held(tmp_path / "out") == held(toy[0])
    assert sorted(os.listdir(tmp_path / "out")) == [".lock", "plan.json", "rows.jsonl"]


def test_an_invalid_row_is_refused_by_its_field(toy, things, tmp_path):
    out = Path(shutil.copytree(toy[0], tmp_path / "out"))
    lines = held(out).splitlines(keepends=True)
    forged = {"test": -1.0, "id": "0" * 16, "config": 1, "versions": {"numpy": 1}}
    for field, value in forged.items():
        change = {field: value}
        (out / "rows.jsonl").write_bytes(b"".join([sealed(json.loads(lines[0]) | change), *lines[1:]]))
        with pytest.raises(FormatError, match=f"row.{field}"):
            wobble(*things, out, jobs=1)


# ---- what is kept


class Forgetful:
    """Runs of a toy, which count how often each is asked for."""

    def __init__(self):
        self.asked = []

    def __call__(self, cells):
        for cell in cells:
            self.asked.append(cell)
            yield made(cell), {}


def made(cell):
    return {"id": cell.id, "config": asdict(cell), "source": "", "status": "done", "test": float(cell.seed)}


def cells_of(count):
    return [Wobble("t", 0.0, seed) for seed in range(count)]


def a_store(path, progress=None):
    runs = Forgetful()
    return Store(path, WOBBLES, {}, runs, progress), runs.asked


def test_the_cost_of_a_row_does_not_depend_on_the_number_of_rows(tmp_path, monkeypatch):
    """Counted in bytes and calls of the system: one row is written, and nothing is read."""
    costs = []
    for count in (10, 10_000):
        folder = tmp_path / str(count)
        folder.mkdir()
        rows = [made(cell) | {"versions": harness.versions()} for cell in cells_of(count)]
        (folder / "rows.jsonl").write_bytes(b"".join(map(sealed, rows)))
        store, asked = a_store(folder / "rows.jsonl")
        cost = []
        for name in ("open", "read", "write", "fsync", "replace", "listdir"):
            real = getattr(os, name)

            def call(*args, name=name, real=real, cost=cost, **how):
                cost.append((name, len(args[1]) if name == "write" else 0))
                return real(*args, **how)

            monkeypatch.setattr(os, name, call)
        store.finish([Wobble("t", 0.5, 1)])
        monkeypatch.undo()
        assert len(asked) == 1
        assert len((folder / "rows.jsonl").read_bytes().splitlines()) == count + 1
        costs.append(cost)
    assert costs[0] == costs[1]
    assert [name for name, _ in costs[0]] == ["open", "write", "fsync"]


def test_each_row_is_on_disk_before_its_progress_is_reported(tmp_path):
    path = tmp_path / "rows.jsonl"
    seen = []

    def progress(done, known, row):
        stored = harness.read_rows(path, WOBBLES)
        assert stored[-1]["id"] == row["id"]
        seen.append((done, known, len(stored)))

    store, _ = a_store(path, progress)
    store.finish(cells_of(3))
    store.finish(cells_of(5))
    assert seen == [(1, 3, 1), (2, 3, 2), (3, 3, 3), (4, 5, 4), (5, 5, 5)]


@given(rng=st.randoms(use_true_random=False))
def test_a_kill_while_writing_a_row_loses_only_that_row(rng, tmp_path_factory):
    """The file ends at any byte, its rows in any order; the end is as if nothing had been."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    cells = cells_of(6)
    store, _ = a_store(path)
    store.finish(rng.sample(cells, rng.randint(1, 6)))
    raw = path.read_bytes()
    cut = raw[: rng.randint(0, len(raw))]
    path.write_bytes(cut)
    intact = cut.count(b"\n")
    again, asked = a_store(path)
    assert len(again.done) in (intact, intact + 1)  # all of a line may be there but its end
    assert asked == []
    again.finish(cells)
    assert len(asked) == 6 - len(again.done.keys() & {json.loads(line)["id"] for line in raw.splitlines()
                                                      if line in cut.splitlines()})  # fmt: skip
    again.close()
    assert path.read_bytes() == b"".join(
        sealed(row) for row in against_none([made(cell) | {"versions": harness.versions()} for cell in cells])
    )


def test_an_incomplete_last_line_is_dropped_and_other_damage_is_named(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    store, _ = a_store(path)
    store.finish(cells_of(3))
    raw = path.read_bytes()
    path.write_bytes(raw[:-20])
    assert len(harness.read_rows(path, WOBBLES)) == 2
    assert capsys.readouterr().err == ""
    path.write_bytes(raw[:-20] + b"\n")
    assert len(harness.read_rows(path, WOBBLES)) == 2
    assert "line 3 is skipped" in capsys.readouterr().err


def test_a_row_is_never_appended_to_an_incomplete_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    store, _ = a_store(path)
    store.finish(cells_of(3))
    path.write_bytes(path.read_bytes()[:-20])
    again, _ = a_store(path)
    again.finish(cells_of(3))
    assert len(harness.read_rows(path, WOBBLES)) == 3
    assert all(line.startswith(b'{"id"') for line in path.read_bytes().splitlines())


def test_closing_replaces_the_rows_once_in_the_order_of_the_plan(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    store, _ = a_store(path)
    store.finish(cells_of(6)[::-1])
    other, _ = a_store(path)
    cells = cells_of(4)
    other.finish(cells)
    calls, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda *a: (calls.append(a[1]), replace(*a))[1])
    rows = other.close()
    assert [row["id"] for row in rows] == [cell.id for cell in cells]
    assert calls == [path]
    assert [json.loads(line)["id"] for line in path.read_bytes().splitlines()] == [cell.id for cell in cells]
    other.close()
    assert calls == [path]  # nothing has changed


def test_a_row_that_cannot_be_written_is_not_done(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    store, _ = a_store(path)
    store.finish(cells_of(1))
    before = path.read_bytes()

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(atomic.StorageError):
        store.finish(cells_of(2))
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert len(store.done) == 1


# ---- what is read


@pytest.fixture
def reads(monkeypatch):
    """What is read from here on: the bases and the texts."""
    seen = []
    for module, name in ((huggingface, "load"), (corpora, "corpus")):
        real = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda spec, *a, real=real, **k: (seen.append(spec), real(spec, *a, **k))[1]
        )
    return seen


@pytest.mark.parametrize("executor", [None, Counting])
def test_base_and_texts_of_a_sweep_are_read_once(executor, place, whole, things, reads, tmp_path):  # noqa: F811
    plan = plan_of(place)
    if executor is None:
        rank_sweep.sweep(plan, tmp_path / "out", jobs=1)
    else:
        with executor() as threads:
            rank_sweep.sweep(plan, tmp_path / "out", executor=threads)
    assert sorted(reads) == sorted(things)
    assert held(tmp_path / "out") == held(whole[0])


def test_another_process_reads_base_and_texts_once_instead_of_receiving_them(things, toy, reads):
    inputs = read_inputs(things[0], [things[1]])
    job = Job(wobbled, inputs.source(), inputs)
    sent = pickle.dumps(job)
    assert len(sent) < 1000 < len(pickle.dumps(inputs))
    harness.read_again.cache_clear()
    reads.clear()
    rows = [pickle.loads(sent)(Wobble(things[1], size, 0))[0] for size in SIZES]
    assert sorted(reads) == sorted(things)
    assert rows == [{k: v for k, v in row.items() if k not in ("versions", "cost")} for row in toy[1][:4]]


@pytest.mark.parametrize("what", ["base", "text"])
def test_another_process_refuses_changed_inputs_until_they_are_restored(what, place, tmp_path):  # noqa: F811
    here = tmp_path / "here"
    shutil.copytree(place, here)
    inputs = read_inputs(str(here / "base"), [str(here / "mine.txt")])
    sent = pickle.dumps(Job(wobbled, inputs.source(), inputs))
    cell = Wobble(str(here / "mine.txt"), 0.0, 0)
    changed = here / ("base/model.safetensors" if what == "base" else "mine.txt")
    before = changed.read_bytes()
    if what == "base":
        c = inputs.base.config
        save_model(llama(Config(**asdict(c)), np.random.default_rng(9)), tmp_path / "other", "")
        changed.write_bytes((tmp_path / "other/model.safetensors").read_bytes())
    else:
        changed.write_bytes(before[::-1])
    with pytest.raises(MismatchError, match=f"the {what} is not the one that the sweep began with"):
        pickle.loads(sent)(cell)
    changed.write_bytes(before)
    assert pickle.loads(sent)(cell)[0]["status"] == "done"


def test_a_fallback_text_stays_the_fallback_in_other_processes(things, monkeypatch):
    """Though it may be there for them."""
    text = corpora.corpus(things[1])
    instead = corpora.Corpus("folio", "fallback: none", text.train, text.valid, text.test)
    inputs = Inputs(things[0], huggingface.load(things[0]), {"folio": instead})
    monkeypatch.setattr(corpora, "fallback", lambda spec: instead)
    monkeypatch.setattr(corpora, "corpus", None)
    assert harness.read_again(pickle.loads(pickle.dumps(inputs.source()))).texts["folio"] is instead


def spoils(cell, inputs):
    """A run that changes what all others read."""
    table = inputs.base.model.embed_tokens.weight
    table.data = table.data + 1
    return made(cell)


def test_a_run_that_changes_the_base_is_refused(things, tmp_path):
    inputs = read_inputs(things[0], [things[1]])
    with pytest.raises(MismatchError, match="base is"), \
            harness.open_store(tmp_path / "out", spoils, inputs, {}, RowForm(), jobs=1) as store:  # fmt: skip
        store.finish([Wobble(things[1], 0.0, 0)])
    assert not (tmp_path / "out" / "rows.jsonl").exists()


# ---- where runs are done


def test_one_job_starts_no_process_and_no_thread(things, toy, tmp_path, monkeypatch):
    import threading

    def refused(*args, **how):
        raise AssertionError("something was started")

    monkeypatch.setattr(os, "fork", refused)
    monkeypatch.setattr(threading.Thread, "start", refused)
    monkeypatch.setattr("subprocess.Popen.__init__", refused)
    wobble(*things, tmp_path / "out", jobs=1)
    assert held(tmp_path / "out") == held(toy[0])


def test_one_job_runs_in_its_own_process_if_blas_threads_cannot_be_limited(
    things, toy, tmp_path, monkeypatch
):
    """It asks by the environment, which BLAS reads when it starts."""
    import contextlib

    monkeypatch.setattr(harness, "one_blas_thread", lambda: contextlib.nullcontext(False))
    seen = []
    wobble(*things, tmp_path / "out", jobs=1,
           progress=lambda *a: seen.append(len(multiprocessing.active_children())))  # fmt: skip
    assert set(seen) == {1}
    assert held(tmp_path / "out") == held(toy[0])


def test_without_processes_several_jobs_are_refused_before_writing(things, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "multiprocessing.synchronize", None)
    with pytest.raises(UnsupportedError, match="jobs is 2; this platform has no processes; expected 1"):
        wobble(*things, tmp_path / "out", jobs=2)
    assert os.listdir(tmp_path) == []


def test_the_callers_environment_is_restored(things, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    seen = []
    wobble(*things, tmp_path / "out", jobs=1, progress=lambda *a: seen.append(os.environ["OMP_NUM_THREADS"]))
    assert set(seen) == {"1"}
    assert os.environ["OMP_NUM_THREADS"] == "3"
    assert "MKL_NUM_THREADS" not in os.environ


def deadly(cell, inputs):
    """A run that takes its process with it."""
    if cell.seed == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return made(cell)


class Breaking(Executor):
    """An executor in which the first try at one cell breaks, as a worker's death does; it notes all tries."""

    def __init__(self, cell):
        self.left, self.tries = [cell], []

    def submit(self, job, cell):
        self.tries.append(cell)
        future = Future()
        if cell in self.left:
            self.left.remove(cell)
            future.set_exception(BrokenExecutor("a worker died"))
        else:
            future.set_result(({"id": cell}, {}))
        return future


def test_only_a_broken_run_is_done_again():
    executor = Breaking("b")
    outcomes = list(harness.Pool(id, 1, executor).outcomes(["a", "b", "c"]))
    assert sorted(row["id"] for row, _ in outcomes) == ["a", "b", "c"]
    assert executor.tries == ["a", "b", "c", "b"]


@pytest.mark.slow
def test_a_run_that_always_kills_its_process_is_an_error_and_keeps_the_other_rows(things, tmp_path):
    inputs = read_inputs(things[0], [things[1]])
    with harness.open_store(tmp_path / "out", deadly, inputs, {}, RowForm(), jobs=2) as store:
        store.finish([Wobble(things[1], 0.0, seed) for seed in (0, 2, 3)])
        with pytest.raises(StateError, match="keep dying"):
            store.finish([Wobble(things[1], 0.0, 1)])
    assert len(harness.read_rows(tmp_path / "out" / "rows.jsonl", RowForm())) == 3
    wait(lambda: not multiprocessing.active_children())


# ---- learning rates


@dataclass(frozen=True)
class Try:
    """A search of a crafted loss."""

    key: str
    rate: float

    @property
    def id(self):
        return id_of(asdict(self))


class Kept:
    """A store of crafted losses: log2 of the rate against the minimum of its key, or no loss at all."""

    def __init__(self, minima, diverges=math.inf):
        self.minima, self.diverges, self.done, self.runs = minima, diverges, {}, []

    def finish(self, cells):
        for cell in cells:
            if cell.id in self.done:
                continue
            self.runs.append(cell)
            loss = {"valid": abs(math.log2(cell.rate) - self.minima[cell.key])}
            self.done[cell.id] = loss if cell.rate < self.diverges else {}


@given(st.dictionaries(st.sampled_from("abc"), st.integers(-8, 8), min_size=1), st.integers(0, 9))
def test_the_best_learning_rate_is_found_if_it_is_within_reach(minima, edges):
    """Of the rates 1, 2, 4 and as many beyond as edges allow; each is tried once, none without need."""
    store = Kept(minima)
    found = harness.chosen_rates(store, dict.fromkeys(minima, (1.0, 2.0, 4.0)), Try, edges=edges)
    assert list(found) == list(minima)
    for key, minimum in minima.items():
        reach = max(-edges, min(minimum, 2 + edges))
        assert math.log2(found[key]) == pytest.approx(reach, abs=math.log2(1.05))  # two digits
        tried = [run.rate for run in store.runs if run.key == key]
        assert len(tried) == len(set(tried)) == 3 + min(edges, max(0, -minimum + 1, minimum - 1))
        assert tried[:3] == [1.0, 2.0, 4.0]


def test_of_equal_losses_the_smaller_rate_is_chosen_and_a_diverged_run_never():
    store = Kept({"a": 0.5, "b": 5.0}, diverges=3.0)
    assert harness.chosen_rates(store, {"a": (2.0, 1.0, 0.5), "b": (4.0, 2.0, 1.0)}, Try) == {
        "a": 1.0,
        "b": 2.0,
    }
    everything = Kept({"a": 0.5}, diverges=0.0)
    assert harness.chosen_rates(everything, {"a": (2.0, 1.0)}, Try) == {"a": 1.0}


def test_a_search_extends_by_its_step():
    store = Kept({"a": 9.0, "b": -9.0})
    found = harness.chosen_rates(store, dict.fromkeys("ab", (1e-2, 1e-1)), Try, step=10**0.5, edges=1)
    assert found == {"a": 0.32, "b": 0.0032}


# ---- the form of rows by the kind of their run

BY_KIND = harness.form_of(
    {"search": {"valid": harness.LOSS}, "final": {"test": harness.LOSS}}, task=forms.one("map", "text")
)
ROW = {
    "id": "0", "source": "a text", "versions": {}, "status": "done", "valid": 1.0,
    "config": {"kind": "search", "task": "map", "rank": 4},
}  # fmt: skip


def test_a_row_has_what_its_kind_measures_or_why_it_diverged():
    final = {"config": {"kind": "final", "task": "text"}, "test": 2.0}
    others = {name: a for name, a in ROW.items() if name != "valid"}
    for row in (ROW, others | final, others | {"status": "diverged", "error": "the loss is nan"}):
        BY_KIND.check("row", row)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"config": {"kind": "base", "task": "map"}}, "row.config.kind"),
        ({"config": {"kind": "final", "task": "map"}}, "test"),
        ({"config": {"kind": "search", "task": "maps"}}, "row.config.task"),
        ({"config": {"kind": "search"}}, "task"), ({"status": "lost"}, "row.status"),
        ({"status": "diverged"}, "error"), ({"status": "diverged", "error": "it did"}, "valid"),
        ({"valid": "low"}, "row.valid"), ({"valid": 1e40}, "row.valid"), ({"test": 1.0}, "test"),
        ({"source": 3}, "row.source"), ({"versions": []}, "row.versions"), ({"id": 7}, "row.id"),
    ],
)  # fmt: skip
def test_a_row_that_no_run_of_its_kind_leaves_is_refused_by_its_field(change, named):
    with pytest.raises(FormatError, match=named):
        BY_KIND.check("row", ROW | change)


def test_an_interrupt_waits_until_a_run_is_submitted():
    """In the middle of it, dask's future would be half made."""
    submitted = []

    class Interrupted:
        def submit(self, job, cell):
            signal.raise_signal(signal.SIGINT)
            submitted.append(cell)

    with pytest.raises(KeyboardInterrupt):
        harness.Pool(id, 1, Interrupted()).submit("a")
    assert submitted == ["a"]

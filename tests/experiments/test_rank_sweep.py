"""A sweep is its rows: complete, in order, the same bytes however it was run, killed, damaged or resumed."""

import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_plotting import MERGED

from minilora import cli
from minilora.data import corpora
from minilora.errors import (
    ConfigError,
    FormatError,
    MismatchError,
    NonFiniteError,
    StateError,
    StorageError,
)
from minilora.experiments import harness, merge_equivalence, rank_figures, rank_report, rank_sweep
from minilora.experiments.harness import id_of, sealed
from minilora.experiments.rank_sweep import EDGES, SEARCH_SEED, Plan, read_rows, sweep, with_gaps
from minilora.formats import archives
from minilora.formats.atomic import locked
from minilora.formats.huggingface import load, save_model
from minilora.model import Config, llama
from minilora.tree import digest

ROOT = Path(__file__).parents[2]
TINY = Config(hidden_size=8, intermediate_size=20, num_hidden_layers=1, num_attention_heads=2,
              num_key_value_heads=1)  # fmt: skip


def prose(seed, words=1400):
    """Some text that a model can learn, about 6 characters a word."""
    rng = random.Random(seed)
    some = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(2, 8))) for _ in range(40)]
    return "".join(rng.choice(some) + rng.choice([" ", " ", " ", ", ", ".\n"]) for _ in range(words))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a base of a few thousand parameters and a text: a run takes some milliseconds."""
    folder = tmp_path_factory.mktemp("sweep")
    save_model(llama(TINY, np.random.default_rng(0)), folder / "base", "")
    (folder / "mine.txt").write_text(prose(0))
    return folder


def plan_of(place, **how):
    usual = {
        "targets": (str(place / "mine.txt"),), "ranks": (1, 2), "modules": ("q_proj",), "alpha": 5.0,
        "steps": 4, "search_steps": 1, "seeds": 2, "base": str(place / "base"), "test_windows": 2,
        "valid_windows": 1,
    }  # fmt: skip
    return Plan(**usual | how)


class Counting(ThreadPoolExecutor):
    """Another executor: the test's own thread pool of one, which counts what it is asked to do."""

    def __init__(self):
        super().__init__(1)
        self.runs = []

    def submit(self, call, run):
        self.runs.append(run)
        return super().submit(call, run)


def run(plan, out, **how):
    """The rows, and the runs that had to be done for them."""
    with Counting() as executor:
        return sweep(plan, out, executor=executor, **how), executor.runs


@pytest.fixture(scope="module")
def whole(place, tmp_path_factory):
    """The folder and the rows of an undisturbed sweep."""
    out = tmp_path_factory.mktemp("whole") / "out"
    rows, _ = run(plan_of(place), out)
    return out, rows


def held(out):
    return (out / "rows.jsonl").read_bytes()


def plain(rows):
    """Rows as a file holds them."""
    return [{k: v for k, v in json.loads(json.dumps(row)).items() if k != "sha256"} for row in rows]


# ---- what a sweep is


def test_every_run_of_the_plan_has_one_row_in_order(place, whole):
    configs = [row["config"] for row in whole[1]]
    names = [(c["kind"], c["method"], c["rank"]) for c in configs]
    assert len({row["id"] for row in whole[1]}) == len(names)
    assert names[0] == ("base", "none", 0)
    kinds = [kind for kind, _, _ in names]
    assert kinds == sorted(kinds, key=["base", "oracle", "search", "final"].index)
    found = [(c["method"], c["rank"], c["seed"]) for c in configs if c["kind"] == "final"]
    assert found == [(m, r, s) for m, r in (("full", 0), ("lora", 1), ("lora", 2)) for s in (0, 1)]
    searched = {(m, r): [c["lr"] for c in configs if (c["kind"], c["method"], c["rank"]) == ("search", m, r)]
                for m, r in (("full", 0), ("lora", 1), ("lora", 2))}  # fmt: skip
    for (method, rank), rates in searched.items():
        assert 3 <= len(rates) <= 3 + EDGES
        assert len(set(rates)) == len(rates)
        assert {c["lr"] for c in configs if c["kind"] == "final" and c["method"] == method
                and c["rank"] == rank} <= set(rates)  # fmt: skip
    assert {c["seed"] for c in configs if c["kind"] == "search"} == {SEARCH_SEED}
    assert all(row["status"] == "done" for row in whole[1])


def test_a_row_records_its_config_its_text_and_its_versions(place, whole):
    for row in whole[1]:
        assert row["id"] == rank_sweep.Run(**{
            k: tuple(v) if isinstance(v, list) else v for k, v in row["config"].items()
        }).id  # fmt: skip
        assert row["source"].startswith("mine.txt")
        assert set(row["versions"]) == {"minilora", "python", "numpy", "blas", "machine"}
        assert row["config"]["fallback"] is False
    text = held(whole[0]).decode()
    assert os.uname().nodename not in text.replace(str(place), "")
    assert whole[1][0]["base_digest"] == digest(load(place / "base"))


def test_a_sweep_returns_the_rows_of_its_file(place, whole):
    assert plain(whole[1]) == plain(read_rows(whole[0] / "rows.jsonl"))
    again, _ = run(plan_of(place), whole[0])
    assert [list(row.items()) for row in again] == [list(row.items()) for row in whole[1]]


@pytest.mark.parametrize("jobs", [1, 2])
def test_the_bytes_do_not_depend_on_the_number_of_processes(jobs, place, whole, tmp_path):
    sweep(plan_of(place), tmp_path / "out", jobs=jobs)
    assert held(tmp_path / "out") == held(whole[0])
    assert sorted(os.listdir(tmp_path / "out")) == [".lock", "plan.json", "rows.jsonl"]


def test_a_finished_sweep_does_nothing_again(place, whole):
    before, stamp = held(whole[0]), (whole[0] / "rows.jsonl").stat().st_mtime_ns
    _, done = run(plan_of(place), whole[0])
    assert done == []
    assert held(whole[0]) == before
    assert (whole[0] / "rows.jsonl").stat().st_mtime_ns == stamp


def test_progress_counts_every_run_once(place, tmp_path):
    seen = []
    run(plan_of(place), tmp_path / "out", progress=lambda done, known, row: seen.append((done, known)))
    assert [done for done, _ in seen] == list(range(1, len(seen) + 1))
    assert seen[-1][0] == seen[-1][1]
    assert all(done <= known for done, known in seen)


def test_a_sweep_does_not_change_the_base(place, whole):
    files = {p.name: p.read_bytes() for p in (place / "base").iterdir()}
    assert whole[1][0]["base_digest"] == digest(load(place / "base"))
    assert set(files) == {"config.json", "README.md", "model.safetensors"}
    assert digest(load(place / "base")) == digest(llama(TINY, np.random.default_rng(0)))


def test_noise_has_the_shape_of_its_module(whole):
    full = [row for row in whole[1] if row["config"]["kind"] == "final" and row["config"]["method"] == "full"]
    assert tuple(rank_figures.shape_of("up_proj", plain(full))) == (
        20,
        8,
    )  # not (8, 8), the count of its values
    assert tuple(rank_figures.shape_of("k_proj", plain(full))) == (4, 8)


def test_a_permutation_is_solved_at_the_rank_of_its_swaps(place, tmp_path):
    try:
        corpora.corpus("permuted:2")
    except StorageError as e:
        pytest.skip(str(e))
    rows, _ = run(plan_of(place, targets=("permuted:2",), ranks=(1, 2, 3), modules=None), tmp_path / "out")
    base = rows[0]
    oracles = {row["config"]["rank"]: row["test"] for row in rows if row["config"]["kind"] == "oracle"}
    assert list(oracles) == [1, 2, 3]
    for r in (2, 3):  # the change has rank 2: the loss is the floor, but for the rounding of float32
        assert abs(oracles[r] - base["floor"]) <= 1e-5 * base["floor"]
    assert abs(oracles[1] - base["floor"]) > 1e-5 * base["floor"]
    truth = base["spectra"]["model.embed_tokens"]
    assert sum(x > 1e-6 * truth[0] for x in truth) == 2
    assert {tuple(row["config"]["modules"]) for row in rows if row["config"]["method"] == "lora"} == {
        ("embed_tokens",)
    }


# ---- the learning rate, the gap


def crafted(valid, test=lambda run: 1.0):
    """A stand-in for work(): losses as functions of the run; infinite means diverged."""

    def work(run, inputs):
        row = {"id": run.id, "config": asdict(run), "source": "crafted"}
        if not math.isfinite(valid(run)):
            return row | {"status": "diverged", "error": "crafted"}
        row |= {"status": "done", "valid": valid(run), "parameters": 1}
        return row if run.kind == "search" else row | {"test": test(run)}

    return work


def rates(rows, kind, method, rank):
    found = [row["config"] for row in rows]
    return [c["lr"] for c in found if (c["kind"], c["method"], c["rank"]) == (kind, method, rank)]


def best_at(lr):
    return lambda run: abs(math.log(run.lr / lr)) if run.lr else 9.0


USUAL = list(rank_sweep.TEXT.lora_rates)
SEARCHES = {
    "the middle one": (best_at(USUAL[1]), USUAL, USUAL[1]),
    "above the edge": (best_at(1.05 * USUAL[2] * 10**0.5), [*USUAL, 0.095, 0.3], 0.095),
    "far above": (best_at(1e9), [*USUAL, 0.095, 0.3], 0.3),
    "far below": (best_at(1e-9), [*USUAL, 0.00095, 0.0003], 0.0003),
    "at the edge": (best_at(USUAL[0]), [*USUAL, 0.00095], USUAL[0]),
    "the others diverge": (lambda run: 1.0 if run.lr in (0.0, USUAL[1]) else math.inf, USUAL, USUAL[1]),
    "all alike": (lambda run: 1.0, [*USUAL, 0.00095, 0.0003], 0.0003),
}


@pytest.mark.parametrize("case", SEARCHES)
def test_the_learning_rate_is_taken_from_the_best_short_run(case, place, tmp_path, monkeypatch):
    valid, tried, chosen = SEARCHES[case]
    # neither the validation nor the test loss of a reported run may matter
    monkeypatch.setattr(rank_sweep, "work", crafted(
        lambda run: valid(run) if run.kind == "search" else run.seed + 0.5,
        lambda run: -run.lr,
    ))  # fmt: skip
    rows, _ = run(plan_of(place), tmp_path / "out")
    for rank in (1, 2):
        found = rates(rows, "search", "lora", rank)
        assert found[:3] == USUAL
        assert found == tried[: len(found)] or case == "above the edge"
        assert len(found) <= 3 + EDGES
        if case != "above the edge":
            assert found == tried
        assert rates(rows, "final", "lora", rank) == [chosen] * 2


def test_runs_whose_every_rate_diverges_are_recorded_and_the_others_go_on(place, tmp_path, monkeypatch):
    valid = best_at(1e-2)
    monkeypatch.setattr(rank_sweep, "work", crafted(lambda run: math.inf if run.rank == 1 else valid(run)))
    rows, _ = run(plan_of(place), tmp_path / "out")
    status = {(row["config"]["rank"], row["status"]) for row in rows if row["config"]["kind"] == "final"}
    assert status == {(0, "done"), (1, "diverged"), (2, "done")}


losses = st.floats(0.1, 9).map(lambda x: round(x, 3))


@given(base=losses, full=st.lists(losses, min_size=1, max_size=3), lora=losses)
def test_the_gap_closed_is_the_fraction_from_base_to_full(base, full, lora):
    def row(kind, method, test, **more):
        config = {"kind": kind, "target": "t", "method": method}
        return {"status": "done", "config": config, "test": test} | more

    rows = [row("base", "none", base), *(row("final", "full", x) for x in full), row("final", "lora", lora)]
    rows += [row("final", "lora", lora) | {"status": "diverged"}]
    found = with_gaps(rows)
    gap = base - math.fsum(full) / len(full)
    assert "gap_closed" not in found[0]
    assert "gap_closed" not in found[-1]
    assert found[-2]["gap_closed"] == ((base - lora) / gap if gap > 0 else None)
    if gap > 0:  # full fine-tuning closes all of it on average: the sum has a rounding for each term
        shares = [r["gap_closed"] for r in found[1 : 1 + len(full)]]
        assert abs(math.fsum(shares) / len(shares) - 1) <= 20 * 2.0**-53 * 9 / gap
    assert "gap_closed" not in rows[1]
    assert "gap_closed" not in with_gaps(rows[1:])[-2]


# ---- runs that diverge


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_a_diverged_run_is_recorded_and_the_others_go_on(steps, place, tmp_path, monkeypatch):
    wild = replace(rank_sweep.TEXT, lora_rates=(1e30,))
    monkeypatch.setattr(rank_sweep, "TEXT", wild)
    monkeypatch.setattr(rank_sweep, "EDGES", 0)
    rows, _ = run(plan_of(place, steps=steps, modules=("all-linear",)), tmp_path / "out")  # and no warning
    final = [row for row in rows if row["config"]["kind"] == "final"]
    found = {(row["config"]["method"], row["status"]) for row in final}
    assert found == {("full", "done"), ("lora", "diverged")}
    for row in final:
        if row["status"] == "diverged":
            assert row["error"]
            assert "test" not in row
    assert plain(read_rows(tmp_path / "out" / "rows.jsonl")) == plain(rows)
    assert "diverged" in rank_report.table(rows)
    if steps == 4:
        cli.draw(rows, tmp_path / "out")  # the report is written all the same


# ---- going on


class Stopped(Exception):
    """The process dies here."""


def stop_at(count):
    def progress(done, known, row):
        if done == count:
            raise Stopped

    return progress


@pytest.mark.parametrize("count", [1, 2, 5, 12, 14])
def test_a_sweep_stopped_anywhere_resumes_to_the_same_bytes(count, place, whole, tmp_path):
    with pytest.raises(Stopped):
        run(plan_of(place), tmp_path / "out", progress=stop_at(count))
    kept = read_rows(tmp_path / "out" / "rows.jsonl")
    assert len(kept) == count
    rows, done = run(plan_of(place), tmp_path / "out")
    assert not {r.id for r in done} & {row["id"] for row in kept}
    assert len(done) == len(rows) - count
    assert held(tmp_path / "out") == held(whole[0])


def copy_of(whole, tmp_path):
    return Path(shutil.copytree(whole[0], tmp_path / "out"))


def flipped(line):
    at = len(line) // 2
    return line[:at] + bytes([line[at] ^ 1]) + line[at + 1 :]


DAMAGE = {
    "truncated": lambda line: line[: len(line) // 2],
    "a flipped bit": flipped,
    "empty": lambda line: b"",
    "zeros": lambda line: bytes(len(line)),
    "not an object": lambda line: b"[1, 2]",
    "no seal": lambda line: b'{"id": "x"}',
    "not UTF-8": lambda line: b"\xff" + line,
    "deep": lambda line: b"[" * 100_000,
}


@pytest.mark.parametrize("at", [0, 3, -1])
@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_row_is_run_again_to_the_same_bytes(kind, at, place, whole, tmp_path, capsys):
    out = copy_of(whole, tmp_path)
    lines = held(out).splitlines()
    lost = json.loads(lines[at])["id"]
    lines[at] = DAMAGE[kind](lines[at])
    (out / "rows.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    _, done = run(plan_of(place), out)
    said = capsys.readouterr().err
    assert [r.id for r in done] == [lost]
    assert held(out) == held(whole[0])
    assert f"line {at % len(lines) + 1} is skipped" in said or not lines[at]
    assert len(said.splitlines()) <= 1


@pytest.mark.parametrize("kind", ["of another plan", "twice", "garbage"])
def test_a_row_of_another_plan_does_not_count(kind, place, whole, tmp_path):
    out = copy_of(whole, tmp_path)
    lines = held(out).splitlines()
    config = (row := json.loads(lines[0]))["config"] | {"target": "another.txt"}
    extra = {
        "of another plan": sealed(row | {"config": config, "id": id_of(config)})[:-1],
        "twice": lines[2],
        "garbage": b"garbage",
    }
    lines.append(extra[kind])
    (out / "rows.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    rows, _ = run(plan_of(place), out)
    assert held(out) == held(whole[0])
    assert plain(rows) == plain(whole[1])


FORGED = {  # a right seal, and no row: its field
    "another id": (lambda row: row | {"id": "0" * 16}, "row.id"),
    "no id": (lambda row: {k: v for k, v in row.items() if k != "id"}, "row.id"),
    "no config": (lambda row: {"id": row["id"]}, "row.config"),
    "another config": (lambda row: row | {"config": row["config"] | {"lr": 123.0}}, "row.id"),
    "other versions": (lambda row: row | {"versions": row["versions"] | {"numpy": "0.1"}}, "numpy is '0.1'"),
}


@pytest.mark.parametrize("kind", FORGED)
def test_a_forged_row_stops_the_sweep_and_keeps_every_row(kind, place, whole, tmp_path):
    out = copy_of(whole, tmp_path)
    lines = held(out).splitlines()
    change, field = FORGED[kind]
    lines[2] = sealed(change(json.loads(lines[2])))[:-1]
    (out / "rows.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    before = held(out)
    with pytest.raises((FormatError, MismatchError), match=re.escape(field)) as e:
        run(plan_of(place), out)
    assert "rows.jsonl" in str(e.value)
    assert held(out) == before


def test_other_rows_stay_on_disk_while_a_damaged_row_is_run_again(place, whole, tmp_path):
    """S0: nothing completed is lost, though the process may die at any moment."""
    out = copy_of(whole, tmp_path)
    lines = held(out).splitlines()
    (out / "rows.jsonl").write_bytes(b"\n".join([b"damaged", *lines[1:]]) + b"\n")
    with pytest.raises(Stopped):
        run(plan_of(place), out, progress=lambda *args: (_ for _ in ()).throw(Stopped))
    kept = {row["id"] for row in read_rows(out / "rows.jsonl")}
    assert kept == {json.loads(line)["id"] for line in lines}


OTHERS = {
    "ranks": ({"ranks": (1, 3)}, "plan.ranks"),
    "steps": ({"steps": 5}, "plan.steps"),
    "seeds": ({"seeds": 1}, "plan.seeds"),
    "modules": ({"modules": ("k_proj",)}, "plan.modules"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_a_folder_with_another_plan_is_refused_by_the_differing_field(other, place, whole, tmp_path):
    out = copy_of(whole, tmp_path)
    how, named = OTHERS[other]
    with pytest.raises(MismatchError, match=named) as e:
        run(plan_of(place, **how), out)
    assert e.value.exit_code == 2
    assert len(str(e.value).splitlines()) == 1
    assert held(out) == held(whole[0])


@pytest.mark.parametrize("what", ["text", "base", "version"])
def test_a_folder_of_another_text_base_or_version_is_refused(what, place, tmp_path, monkeypatch):
    here = tmp_path / "here"
    shutil.copytree(place, here)
    run(plan_of(here), tmp_path / "out")
    before = held(tmp_path / "out")
    if what == "text":
        (here / "mine.txt").write_text(prose(1))
    elif what == "base":
        shutil.rmtree(here / "base")
        save_model(llama(TINY, np.random.default_rng(1)), here / "base", "")
    else:
        monkeypatch.setattr(harness, "__version__", "9.9")
    named = {"text": "texts", "base": "base", "version": "versions.minilora"}
    with pytest.raises(MismatchError, match=named[what]):
        run(plan_of(here), tmp_path / "out")
    assert held(tmp_path / "out") == before


def test_rows_belong_to_the_text_of_their_plan(place, tmp_path):
    """In one process a file may change between two sweeps: no text that was read before is used."""
    here = tmp_path / "here"
    shutil.copytree(place, here)
    first, _ = run(plan_of(here), tmp_path / "a")
    (here / "mine.txt").write_text(prose(1))
    second, _ = run(plan_of(here), tmp_path / "b")
    assert first[0]["test"] != second[0]["test"]


# ---- processes that die


def kill_workers():
    workers = multiprocessing.active_children()
    for worker in workers:
        os.kill(worker.pid, signal.SIGKILL)
    return len(workers)


@pytest.mark.slow
def test_a_killed_worker_costs_only_a_retry(place, whole, tmp_path):
    killed = 0

    def progress(done, known, row):
        nonlocal killed
        if done in (2, 6):  # while others wait to be done
            killed += kill_workers()

    sweep(plan_of(place), tmp_path / "out", jobs=2, progress=progress)
    assert killed == 4
    assert held(tmp_path / "out") == held(whole[0])


@pytest.mark.slow
def test_a_worker_killed_between_two_stages_costs_only_a_retry(place, whole, tmp_path):
    killed = 0

    def progress(done, known, row):
        nonlocal killed
        if done == known == 1:  # the base is done, and nothing else has been asked for yet
            killed += kill_workers()
            time.sleep(0.5)  # the pool notices

    sweep(plan_of(place), tmp_path / "out", jobs=2, progress=progress)
    assert killed == 1
    assert held(tmp_path / "out") == held(whole[0])


@pytest.mark.slow
def test_workers_that_keep_dying_are_an_error_and_keep_the_rows(place, tmp_path):
    def progress(done, known, row):
        kill_workers()

    with pytest.raises(StateError, match="keep dying"):
        sweep(plan_of(place), tmp_path / "out", jobs=2, progress=progress)
    assert read_rows(tmp_path / "out" / "rows.jsonl")
    with locked(tmp_path / "out"):  # it is free again
        pass
    assert issubclass(BrokenProcessPool, RuntimeError)


def command(place, out, *more, steps=4):
    return [
        sys.executable, "-m", "minilora", "sweep", "--quick", "--data", str(place / "mine.txt"),
        "--ranks", "1,2", "--targets", "q_proj", "--base", str(place / "base"), "--steps", str(steps),
        "--jobs", "2", "--out", str(out), *more,
    ]  # fmt: skip


def environment(**more):
    return os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "error"} | more


def start(place, out, **how):
    """A sweep in a session of its own, so that its workers can be told from all other processes."""
    return subprocess.Popen(
        command(place, out, **how), start_new_session=True, env=environment(), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def alive(session):
    """The processes of a session that are not dead."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


def wait(until, seconds=20.0):
    end = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.01)


def begun(out):
    return lambda: (out / "rows.jsonl").exists()


def attempt(place, out, *more, env=None, **how):
    """A sweep from its start to its end, however that is."""
    return subprocess.run(
        command(place, out, *more, **how),
        env=env or environment(),
        capture_output=True,
        text=True,
        check=False,
    )


def finish(place, out, *more, **how):
    done = attempt(place, out, *more, **how)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def results(out):
    """Name -> bytes of everything that a sweep leaves but its lock, which names a process."""
    return {p.name: p.read_bytes() for p in sorted(out.iterdir()) if p.name != ".lock"}


STEPS = 60  # of a sweep that lasts a few seconds


@pytest.fixture(scope="module")
def undisturbed(place, tmp_path_factory):
    """What a sweep at the command line leaves, and how long it took."""
    out, begin = tmp_path_factory.mktemp("undisturbed") / "out", time.monotonic()
    finish(place, out, steps=STEPS)
    return results(out), time.monotonic() - begin


@pytest.mark.slow
def test_the_command_writes_rows_plan_figures_and_a_report(undisturbed):
    names = set(undisturbed[0])
    assert {"rows.jsonl", "plan.json", "report.html", "loss_against_rank_mine.png"} <= names
    assert {n for n in names if n.endswith(".png")} == {n[:-3] + "png" for n in names if n.endswith(".svg")}


@pytest.mark.slow
def test_the_bytes_do_not_depend_on_hash_seed_clock_or_locale(place, undisturbed, tmp_path):
    strange = environment(PYTHONHASHSEED="7", TZ="Asia/Kathmandu", LANG="tr_TR.UTF-8", LC_ALL="C")
    finish(place, tmp_path / "out", "--jobs", "1", steps=STEPS, env=strange)
    assert results(tmp_path / "out") == undisturbed[0]


def kill_and_go_on(place, out, delays):
    """Kill a sweep by SIGKILL after each delay, then finish it: how many kills hit, and the results."""
    hits = 0
    for delay in delays:
        process = start(place, out, steps=STEPS)
        try:
            process.wait(delay)
        except subprocess.TimeoutExpired:
            hits += 1
            process.kill()
        process.communicate()
    finish(place, out, steps=STEPS)
    return hits, results(out)


@pytest.mark.slow
def test_twenty_kills_do_not_change_the_bytes(place, undisturbed, tmp_path):
    found, lasted = undisturbed
    rng = random.Random(0)
    hits, after = kill_and_go_on(place, tmp_path / "out", [rng.uniform(0.1, 0.6) * lasted for _ in range(20)])
    print(f"{hits} of 20 kills hit a sweep that was not done")
    assert hits >= 5
    assert after == found


def test_a_second_sweep_is_refused_until_the_first_and_its_workers_are_dead(place, tmp_path):
    out = tmp_path / "out"
    first = start(place, out, steps=2000)
    try:
        wait(begun(out))
        second = attempt(place, out, steps=2000)
        assert second.returncode == 3
        assert f"process {first.pid}" in second.stderr
        assert len(second.stderr.splitlines()) == 1
        assert second.stdout == ""
        assert len(alive(first.pid)) >= 3  # it and its two workers
    finally:
        first.kill()
        first.communicate()
    third = start(place, out, steps=2000)  # at once
    try:
        wait(lambda: str(third.pid) in (out / ".lock").read_text())
        assert third.poll() is None
        wait(lambda: not alive(first.pid), 5)
    finally:
        third.kill()
        third.communicate()
    wait(lambda: not alive(third.pid), 5)


def interrupt(place, out, number):
    """Start a sweep, interrupt it once it has a row, and see that it ends as it should."""
    process = start(place, out, steps=STEPS)
    wait(begun(out))
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does
    else:
        process.send_signal(number)
    said = process.communicate(timeout=20)[1]
    assert process.returncode == 130
    assert said == "minilora: interrupted; no file is half-written; run the same command again\n"
    wait(lambda: not alive(process.pid), 5)


@pytest.mark.slow
def test_an_interrupted_and_killed_sweep_resumes_to_the_same_bytes(place, undisturbed, tmp_path):
    found, lasted = undisturbed
    interrupt(place, tmp_path / "out", signal.SIGINT)
    hits, after = kill_and_go_on(place, tmp_path / "out", [0.3 * lasted, 0.2 * lasted])
    assert hits
    assert after == found


@pytest.mark.slow
def test_a_terminated_sweep_resumes_to_the_same_bytes(place, undisturbed, tmp_path):
    interrupt(place, tmp_path / "out", signal.SIGTERM)
    finish(place, tmp_path / "out", steps=STEPS)
    assert results(tmp_path / "out") == undisturbed[0]


# ---- plans that cannot be


@pytest.fixture
def here():
    """The command line in this process, its runs too."""
    before = signal.getsignal(signal.SIGTERM)
    yield cli.main
    signal.signal(signal.SIGTERM, before)


WRONG = {
    "no jobs": (["--jobs", "0"], 2, "jobs is 0"),
    "negative jobs": (["--jobs", "-1"], 2, "jobs is -1"),
    "rank 0": (["--ranks", "0"], 2, "rank is 0"),
    "a negative rank": (["--ranks=-1,2"], 2, "rank is -1"),
    "a rank twice": (["--ranks", "1,2,1"], 2, "ranks are 1, 2, 1; expected each once"),
    "a rank too large": (["--ranks", "1,9"], 2, "r is 9 for .*q_proj"),
    "no seeds": (["--seeds", "0"], 2, "seeds is 0"),
    "no steps": (["--steps", "0"], 2, "steps is 0"),
    "no module": (["--targets", ""], 2, "expected a name"),
    "unknown module": (["--targets", "q_prj"], 2, "'q_prj' matches no module; nearest: 'q_proj'"),
    "unknown target": (["--data", "foliot"], 2, "corpus is 'foliot'.*nearest: 'folio'"),
    "too many swaps": (["--data", "permuted:14"], 2, "14; expected at most 13"),
    "a target twice": (["--data", "MINE"], 2, "expected each once"),
    "no such file": (["--data", "/none.txt"], 4, "/none.txt"),
    "no such base": (["--base", "/none"], 4, "/none"),
    "a short text": (["--data", "SHORT"], 2, "short.txt.*at least"),
    "a text without room for a window": (["--data", "SMALL"], 2, "75 characters"),
    "a text that is none": (["--data", "BINARY"], 2, "binary.txt"),
}  # fmt: skip


def call(here, place, out, *more):
    return here([*command(place, out, "--jobs", "1", steps=2)[3:], *more])


@pytest.mark.parametrize("case", WRONG)
def test_an_impossible_plan_prints_one_line_and_writes_nothing(case, here, place, tmp_path, capsys):
    files = {k: tmp_path / f"{k.lower()}.txt" for k in ("SHORT", "SMALL", "BINARY")}
    files["MINE"] = place / "mine.txt"
    files["SHORT"].write_text("short")
    files["SMALL"].write_text(prose(0)[:1500])  # 75 characters to validate: a window has 128
    files["BINARY"].write_bytes(bytes(range(256)) * 8)
    before = sorted(os.listdir(tmp_path))
    options, code, match = WRONG[case]
    options = [str(files.get(option, option)) for option in options]
    assert call(here, place, tmp_path / "out", *options) == code
    said = capsys.readouterr()
    assert said.out == ""
    assert len(said.err.splitlines()) == 1, said.err
    assert said.err.startswith("minilora: ")
    assert re.search(match, said.err), said.err
    assert sorted(os.listdir(tmp_path)) == before


NO_OPTIONS = [["--ranks", ""], ["--ranks", "1,x"], ["--jobs", "two"], ["--nonsense"]]


@pytest.mark.parametrize("options", NO_OPTIONS, ids=repr)
def test_an_invalid_option_exits_with_2(options, here, place, tmp_path, capsys):
    with pytest.raises(SystemExit) as e:
        call(here, place, tmp_path / "out", *options)
    assert e.value.code == 2
    assert os.listdir(tmp_path) == []
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("where", ["out", "out/deeper", "out/plan.json/deeper"])
def test_a_file_where_the_folder_should_go_is_a_storage_error(where, here, place, tmp_path, capsys):
    (tmp_path / "out").write_bytes(b"mine")
    assert call(here, place, tmp_path / where) == 4
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    assert str(tmp_path / "out") in said
    assert (tmp_path / "out").read_bytes() == b"mine"


def test_jobs_are_capped_at_the_cores_with_a_message(here, place, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cli, "draw", lambda rows, out: None)
    monkeypatch.setattr(cli, "cores", lambda: 1)
    assert call(here, place, tmp_path / "out", "--jobs", "1000") == 0
    assert capsys.readouterr().err == "minilora: 1000 jobs on 1 cores; using 1\n"


def test_a_sweep_with_diverged_runs_exits_with_1_and_writes_rows_figures_and_a_report(
    here, place, tmp_path, capsys, monkeypatch
):
    real = rank_sweep.trained_run

    def diverging(run, inputs):
        if run.rank == 2:
            raise NonFiniteError("step 1: the loss is nan")
        return real(run, inputs)

    monkeypatch.setattr(rank_sweep, "trained_run", diverging)
    monkeypatch.setattr(merge_equivalence, "run", lambda: MERGED)
    assert call(here, place, tmp_path / "out") == 1
    said = capsys.readouterr()
    assert said.err == ""
    assert "diverged" in said.out
    names = set(os.listdir(tmp_path / "out"))
    assert {"rows.jsonl", "plan.json", "report.html", "loss_against_rank_mine.png"} <= names
    assert {n for n in names if n.endswith(".png")} == {n[:-3] + "png" for n in names if n.endswith(".svg")}


@pytest.mark.parametrize(
    "bad", [{"targets": ()}, {"ranks": ()}, {"modules": ()}, {"seeds": 0}, {"seeds": True}, {"alpha": 0},
            {"alpha": math.nan}, {"test_windows": 0}, {"search_steps": 0}, {"ranks": (1.5,)},
            {"ranks": (2, 2)}],
    ids=repr,
)  # fmt: skip
def test_an_invalid_plan_is_a_config_error(bad):
    with pytest.raises(ConfigError):
        Plan(**bad)


@pytest.mark.slow
def test_the_standard_library_replaces_unavailable_texts(place, tmp_path, monkeypatch, capsys):
    def offline(*_):
        raise StorageError("texts not fetched: no network")

    monkeypatch.setenv("MINILORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("MINILORA_TEXTS", raising=False)
    monkeypatch.setattr(archives, "download", offline)
    rows, _ = run(plan_of(place, targets=("folio",), ranks=(1,), seeds=1), tmp_path / "out")
    assert "using the text of the standard library instead" in capsys.readouterr().err
    for row in rows:
        assert row["config"]["fallback"] is True
        assert row["source"].startswith("fallback:")
    assert "fallback" in rank_report.report_page(rows, {})


def test_a_changed_loss_with_the_old_digest_is_run_again(place, whole, tmp_path):
    out = copy_of(whole, tmp_path)
    lines = held(out).splitlines()
    lines[-1] = lines[-1].replace(b'"valid": ', b'"valid": 1')  # valid JSON, right id, another number
    (out / "rows.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    _, done = run(plan_of(place), out)
    assert [r.id for r in done] == [json.loads(lines[-1])["id"]]
    assert held(out) == held(whole[0])


def test_the_search_never_reads_the_test_split(place, tmp_path, monkeypatch):
    real, seen = rank_sweep.windows, set()

    def spy(run, split, inputs):
        seen.add((run.kind, split))
        return real(run, split, inputs)

    monkeypatch.setattr(rank_sweep, "windows", spy)
    run(plan_of(place), tmp_path / "out")
    assert seen == {("search", "valid"), *((k, s) for k in ("base", "final") for s in ("valid", "test"))}


# ---- the rows that are committed


def test_the_committed_rows_match_the_default_plan():
    """Every number of the protocol is in them: settings, ranks, seeds, steps, windows, the first rates."""
    stored = read_rows(ROOT / "figures/rows.jsonl")
    rows = [rank_sweep.Run(**row["config"] | {"modules": tuple(row["config"]["modules"])}) for row in stored]
    valid = {row["id"]: row["valid"] for row in stored}
    plan = Plan()
    texts = {run.target: SimpleNamespace(digest=run.text, source="") for run in rows}
    cells = rank_sweep.grid(plan, texts)
    assert [run for run in rows if run.kind in ("base", "oracle")] == rank_sweep.references(cells)
    finals = [run for run in rows if run.kind == "final"]
    assert [replace(run, lr=0.0) for run in finals] == [replace(c, seed=s) for c in cells for s in range(3)]
    for cell in cells:
        how = plan.setting(cell.target)
        tried = [run for run in rows if replace(run, lr=0.0, kind="final", seed=0, steps=cell.steps) == cell
                 and run.kind == "search"]  # fmt: skip
        assert {(run.steps, run.seed) for run in tried} == {(how.search_steps, SEARCH_SEED)}
        rates = how.full_rates if cell.method == "full" else how.lora_rates
        assert [run.lr for run in tried][: len(rates)] == list(rates)
        assert len(rates) <= len(tried) <= len(rates) + EDGES
        (chosen,) = {run.lr for run in finals if replace(run, lr=0.0, seed=0) == cell}
        assert chosen == min(tried, key=lambda run: (valid[run.id], run.lr)).lr


def test_the_table_summarises_the_rows_of_each_method():
    rows = read_rows(ROOT / "figures/rows.jsonl")
    for target in ("permuted:4", "folio"):
        found = {line[0]: line[1:] for line in rank_report.lines(rows, target)}
        some = [row for row in rows if row["config"]["target"] == target]
        names = {"none": "frozen base", "full": "full fine-tuning"}
        of = {}
        for row in some:
            config = row["config"]
            if config["kind"] in ("base", "final"):
                of.setdefault(names.get(config["method"], f"LoRA r = {config['rank']}"), []).append(row)
        assert list(found) == list(of)
        for name, its in of.items():
            parameters, rate, loss, spread, gap = found[name]
            tests, lr = [row["test"] for row in its], its[0]["config"]["lr"]
            assert parameters == f"{its[0]['parameters']:,}"
            assert rate == (f"{lr:.2g}" if lr else "")
            assert abs(float(loss) - sum(tests) / len(tests)) < 5.1e-5
            assert spread == (f"{min(tests):.4f} to {max(tests):.4f}" if lr else "")
            assert (gap == "") == (its[0].get("gap_closed") is None)

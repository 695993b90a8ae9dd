"""Runs on other machines give the rows of this one even if workers die; another environment is refused."""

import asyncio
import concurrent.futures
import contextlib
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
from test_rank_sweep import ROOT, TINY, held, plan_of, prose, wait

from minilora import cli
from minilora.errors import MismatchError, StateError
from minilora.experiments import cluster, harness, rank_sweep
from minilora.experiments.harness import Job, do, read_inputs
from minilora.experiments.rank_sweep import read_rows, sweep
from minilora.formats.huggingface import read_json, save_model
from minilora.model import llama
from minilora.tree import digest

INTERRUPTED = "minilora: interrupted; no file is half-written; run the same command again\n"


def plan(**how):
    """A tiny sweep whose base and text are named by where they are seen from here."""
    return plan_of(Path("."), targets=("./mine.txt",), base="./base", **how)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cluster")
    save_model(llama(TINY, np.random.default_rng(0)), folder / "base", "")
    (folder / "mine.txt").write_text(prose(0))
    return folder


@pytest.fixture(autouse=True)
def here(place, monkeypatch):
    monkeypatch.chdir(place)


@pytest.fixture
def serial(place, tmp_path):
    """The rows of a sweep in one process, as bytes."""
    known = place / "serial"
    if not known.exists():
        with ThreadPoolExecutor(1) as executor:
            sweep(plan(), known, executor=executor)
    return held(known)


# ---- any executor


def test_two_threads_give_the_same_bytes(serial, tmp_path):
    with ThreadPoolExecutor(2) as executor:
        sweep(plan(), tmp_path / "out", executor=executor)
    assert held(tmp_path / "out") == serial


def test_the_callers_processes_give_the_same_bytes(serial, tmp_path):
    with ProcessPoolExecutor(2, get_context("spawn")) as executor:
        sweep(plan(), tmp_path / "out", executor=executor)
    assert held(tmp_path / "out") == serial


class Abroad(ThreadPoolExecutor):
    """An executor whose third run is done in another environment."""

    def __init__(self, **other):
        super().__init__(1)
        self.other, self.count = other, 0

    def submit(self, call, run):
        def elsewhere():
            row, environment = call(run)
            self.count += 1
            return row, environment | (self.other if self.count == 3 else {})

        return super().submit(elsewhere)


OTHERS = {"numpy": "1.0", "minilora": "9.9", "python": "2.7", "blas": "mkl", "backend": "cupy",
          "OMP_NUM_THREADS": "4", "base": "0" * 64}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_a_result_from_another_environment_is_refused(name, serial, tmp_path):
    with pytest.raises(MismatchError, match=f"{name} is '{OTHERS[name]}'; expected"), \
            Abroad(**{name: OTHERS[name]}) as executor:  # fmt: skip
        sweep(plan(), tmp_path / "out", executor=executor)
    assert len(read_rows(tmp_path / "out" / "rows.jsonl")) == 2
    with ThreadPoolExecutor(1) as executor:  # the sweep goes on in the right one
        sweep(plan(), tmp_path / "out", executor=executor)
    assert held(tmp_path / "out") == serial


def test_runs_on_sent_inputs_read_no_file_and_change_nothing(tmp_path, monkeypatch):
    inputs = read_inputs("./base", ["./mine.txt"])
    before = digest(inputs.base)
    cells = rank_sweep.grid(plan(), inputs.texts)
    runs = [*rank_sweep.references(cells), *(rank_sweep.replace(cell, lr=0.01) for cell in cells)]
    from_files = list(map(pickle.loads(pickle.dumps(Job(rank_sweep.work, inputs.source(), inputs))), runs))
    monkeypatch.chdir(tmp_path)
    sent = pickle.loads(pickle.dumps(inputs))
    assert [do(rank_sweep.work, run, sent) for run in runs] == from_files
    assert digest(sent.base) == before


def test_versions_name_a_backend_other_than_numpy(monkeypatch):
    assert "backend" not in harness.versions()  # so that rows made before keep their bytes
    monkeypatch.setattr(harness.backend, "name", "cupy")
    assert harness.versions()["backend"] == "cupy"


# ---- without a cluster


@pytest.fixture
def refused(tmp_path, capsys):
    """What the command line says of a sweep that it refuses, having written nothing."""
    before = signal.getsignal(signal.SIGTERM)

    def call(*options):
        out = tmp_path / "refused"
        given = ["--quick", "--ranks", "1,2", "--data", "mine.txt", "--base", "./base", "--out", str(out)]
        begin = time.monotonic()
        assert cli.main(["sweep", *given, *options]) == 2
        said = capsys.readouterr()
        assert said.out == ""
        assert len(said.err.splitlines()) == 1, said.err
        assert not out.exists()
        return said.err, time.monotonic() - begin

    yield call
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("address", ["", "host", "host:8786", "tcp://host", "http://host:80", "tcp://a b:1"])
def test_an_invalid_address_is_refused(address, refused):
    assert "expected tcp://HOST:PORT" in refused("--dask", address)[0]


def test_without_dask_the_message_says_how_to_install_it(refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    assert 'pip install "minilora[cluster]"' in refused("--dask", "tcp://127.0.0.1:8786")[0]


def test_jobs_and_a_cluster_exclude_each_other(refused):
    assert "expected one of them" in refused("--dask", "tcp://127.0.0.1:8786", "--jobs", "1")[0]


@pytest.mark.slow
@pytest.mark.parametrize("who", ["nobody", "silence", "another"])
def test_an_address_without_a_scheduler_is_refused_in_time(who, refused, monkeypatch):
    pytest.importorskip("distributed")
    monkeypatch.setattr(cluster, "PATIENCE", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        if who == "nobody":
            server.close()
        said, seconds = refused("--dask", f"tcp://127.0.0.1:{port}") if who != "another" else spoken(
            server, refused, port)  # fmt: skip
    assert "no dask scheduler answers within 1 s" in said
    assert seconds < 5 + 5  # the import of dask is some of it


def spoken(server, refused, port):
    """The same with a listener that speaks something else."""

    def speak():
        peer, _ = server.accept()
        peer.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        peer.close()

    with ThreadPoolExecutor(1) as executor:
        executor.submit(speak)
        return refused("--dask", f"tcp://127.0.0.1:{port}")


# ---- on a cluster: a scheduler and workers on the loopback, as their commands start them


class Machines:
    """Processes of dask's, ended with the test; each is the leader of a session of its own."""

    def __init__(self, folder):
        self.folder, self.processes = folder, []
        self.log = (folder / "log").open("w")

    def start(self, *command, **env):
        environment = {k: v for k, v in os.environ.items() if not k.endswith("_NUM_THREADS")}
        environment |= {"PYTHONPATH": str(ROOT), "DASK_DISTRIBUTED__WORKER__MEMORY__TERMINATE": "False"} | env
        self.processes.append(subprocess.Popen(
            [sys.executable, "-m", "dask", *command, "--host", "127.0.0.1", "--no-dashboard"],
            cwd=self.folder, env=environment, start_new_session=True, stdout=self.log, stderr=self.log,
        ))  # fmt: skip
        return self.processes[-1]

    def scheduler(self, **env):
        path = self.folder / "scheduler.json"
        process = self.start("scheduler", "--port", "0", "--scheduler-file", str(path), **env)
        wait(lambda: path.exists() and path.read_text().endswith("}"), 60)
        self.address = read_json(path)["address"]
        return process

    def workers(self, count, preload="", **env):
        """Workers that run a program first; it returns when all have joined."""
        file = self.folder / f"preload{len(self.processes)}.py"
        file.write_text(preload)
        process = self.start("worker", self.address, "--nthreads", "1", "--nworkers", str(count), "--preload",
                             str(file), "--local-directory", str(self.folder), **env)  # fmt: skip
        return process

    def ask(self, question, *arguments):
        """The answer of every worker."""
        import distributed

        with distributed.Client(self.address, set_as_default=False) as client:
            return question(client, *arguments)

    def joined(self, count):
        self.ask(lambda client: client.wait_for_workers(count, timeout=60))

    def pid(self):
        """The process of a worker. While another one dies, dask may answer with none, or close the line."""
        found = []

        def answered():
            with contextlib.suppress(OSError):
                found.extend(self.ask(lambda client: client.run(os.getpid, on_error="ignore")).values())
            return found

        wait(answered, 60)
        return found[0]

    def end(self, process):
        if process in self.processes:
            self.processes.remove(process)
            for pid in alive(process.pid):  # the nannies first, else they start the workers again
                os.kill(pid, signal.SIGKILL)
            process.wait()

    def close(self):
        for process in list(self.processes):
            self.end(process)
        self.log.close()


def alive(session):
    """The processes of a session, the oldest first."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return sorted(found)


@pytest.fixture
def machines(tmp_path):
    pytest.importorskip("distributed")
    found = Machines(tmp_path)
    yield found
    found.close()


@pytest.mark.slow
def test_a_cluster_whose_workers_are_killed_gives_the_same_rows(serial, machines, tmp_path):
    machines.scheduler()
    machines.workers(2)
    machines.joined(2)
    sweep(plan(), tmp_path / "a", dask=machines.address)  # whose workers see neither ./base nor ./mine.txt
    assert held(tmp_path / "a") == serial
    killed = []

    def progress(done, known, row):
        if done in (1, 4, 9):
            pid = machines.pid()
            os.kill(pid, signal.SIGKILL)
            killed.append(pid)

    sweep(plan(), tmp_path / "b", dask=machines.address, progress=progress)
    assert len(set(killed)) == 3
    assert held(tmp_path / "b") == serial


DEADLY = """
import os, time
from pathlib import Path
from minilora.experiments import rank_sweep
ROWS = Path("ROWS")
real = rank_sweep.real = getattr(rank_sweep, "real", rank_sweep.trained_run)  # a preload may run twice

def trained_run(run, inputs):
    if run.rank == 2:
        for _ in range(1200):  # a result on its way dies with its worker: let the earlier ones arrive
            if ROWS.exists() and ROWS.read_bytes().count(b"\\n") >= 7:
                break
            time.sleep(0.05)
        os._exit(1)
    return real(run, inputs)

rank_sweep.trained_run = trained_run
"""


@pytest.mark.slow
def test_a_run_that_always_kills_its_worker_keeps_the_other_rows(serial, machines, tmp_path):
    machines.scheduler(DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES="0")
    machines.workers(1, DEADLY.replace('"ROWS"', repr(str(tmp_path / "out" / "rows.jsonl"))))
    machines.joined(1)
    with pytest.raises(StateError, match="keep dying"):
        sweep(plan(), tmp_path / "out", dask=machines.address)
    found = [row["config"] for row in read_rows(tmp_path / "out" / "rows.jsonl")]
    assert [(c["kind"], c["method"], c["rank"]) for c in found] == [
        ("base", "none", 0), *[("search", "full", 0)] * 3, *[("search", "lora", 1)] * 3,
    ]  # fmt: skip
    with ThreadPoolExecutor(1) as executor:
        sweep(plan(), tmp_path / "out", executor=executor)
    assert held(tmp_path / "out") == serial


class Ended(NamedTuple):
    """A future of dask's that has ended: what awaits it has the result or the error at once."""

    future: concurrent.futures.Future

    def __await__(self):
        yield from ()
        return self.future.result()


class Local:
    """A client whose event loop runs, and whose calls end as they are told to."""

    def __init__(self):
        self.loop, self.asyncio_loop, self.sent = self, asyncio.new_event_loop(), 0
        self.thread = threading.Thread(target=self.asyncio_loop.run_forever)
        self.thread.start()

    def submit(self, call, *arguments, pure):
        assert pure is False  # two equal calls are two runs
        self.sent += call is cluster.itself

        future = concurrent.futures.Future()
        if isinstance(call, Exception):
            future.set_exception(call)
        else:
            future.set_result(call)
        return Ended(future)

    def close(self):
        self.asyncio_loop.call_soon_threadsafe(self.asyncio_loop.stop)
        self.thread.join()
        self.asyncio_loop.close()


def ends():
    """name -> how a call ends in dask, the error that is reported, and whether the inputs are sent again."""
    client = pytest.importorskip("distributed.client")
    distributed = pytest.importorskip("distributed")
    comm = pytest.importorskip("distributed.comm")
    gone, worker = "scheduler-connection-lost", SimpleNamespace(address="tcp://127.0.0.1:1")
    return {
        "a result": (("row", {}), None, False),
        "its own error": (OSError("disk full"), OSError, False),
        "a killed worker": (distributed.KilledWorker("do", worker, 0), BrokenExecutor, True),
        "a result that is lost": (client.FutureCancelledError("do", None), BrokenExecutor, True),
        "no scheduler": (client.FutureCancelledError("do", gone), StateError, False),
        "a broken line to it": (comm.CommClosedError("reset"), StateError, False),
    }


@pytest.mark.parametrize("name", ["a result", "its own error", "a killed worker", "a result that is lost",
                                  "no scheduler", "a broken line to it"])  # fmt: skip
def test_every_end_of_a_call_is_reported_as_what_it_is(name):
    end, expected, again = ends()[name]
    client = Local()
    executor = cluster.Cluster(client, "the inputs")
    try:
        outcome = executor.submit(end)
        found = outcome.exception(10)
        assert type(found) is (expected or type(None))
        assert expected is not None or outcome.result() == end
        assert not executor.waiting
        executor.submit(("row", {})).result(10)
        assert client.sent == 1 + again
    finally:
        executor.closed.set()
        client.close()


MIXES = {
    "another NumPy": ("import numpy; numpy.__version__ = '99.0'", "numpy is '99.0'; expected"),
    "more BLAS threads": ("import os; os.environ['OMP_NUM_THREADS'] = '4'", "OMP_NUM_THREADS is '4'; expect"),
    "another backend": ("from minilora import backend; backend.name = 'cupy'", "backend is 'cupy'; expected"),
    "no minilora": ("import sys; sys.modules['minilora'] = None", "the same minilora to be installed"),
}


@pytest.mark.slow
def test_mixed_versions_are_refused_before_any_run(serial, machines, refused, monkeypatch):
    machines.scheduler()
    monkeypatch.setattr(cluster, "PATIENCE", 2.0)
    said, seconds = refused("--dask", machines.address)
    assert "or there are none; start one: dask worker" in said
    assert "dask worker" in said
    assert seconds < 2 + 5
    monkeypatch.setattr(cluster, "PATIENCE", 20.0)
    machines.workers(1)
    for preload, match in MIXES.values():
        other = machines.workers(1, preload)
        machines.joined(2)
        said, _ = refused("--dask", machines.address)
        assert match in said, said
        machines.end(other)
        wait(lambda: machines.ask(lambda client: len(client.nthreads())) == 1, 60)  # else it counts as joined


@pytest.mark.slow
def test_losing_the_scheduler_or_all_workers_ends_the_sweep_and_keeps_its_rows(
    serial, machines, tmp_path, monkeypatch
):
    scheduler, workers = machines.scheduler(), machines.workers(1)
    monkeypatch.setattr(cluster, "LONELY", 2.0)
    gone = {5: workers, 9: scheduler}

    def progress(done, known, row):
        if done in gone:
            machines.end(gone[done])

    with pytest.raises(StateError, match="no worker for 2 s"):
        sweep(plan(), tmp_path / "out", dask=machines.address, progress=progress)
    workers = machines.workers(1)
    with pytest.raises(StateError, match="scheduler is gone"):
        sweep(plan(), tmp_path / "out", dask=machines.address, progress=progress)
    assert len(read_rows(tmp_path / "out" / "rows.jsonl")) >= 9
    with ThreadPoolExecutor(1) as executor:
        sweep(plan(), tmp_path / "out", executor=executor)
    assert held(tmp_path / "out") == serial


@pytest.mark.slow
def test_an_interrupt_ends_a_cluster_sweep_cleanly(machines, tmp_path):
    machines.scheduler()
    machines.workers(1)
    machines.joined(1)
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-m", "minilora", "sweep", "--quick", "--data", "mine.txt", "--base", "./base",
         "--ranks", "1,2", "--steps", "400", "--out", str(out), "--dask", machines.address],
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "error"}, start_new_session=True,
        text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    wait(lambda: (out / "rows.jsonl").exists(), 60)
    os.killpg(process.pid, signal.SIGINT)
    said = process.communicate(timeout=20)[1]
    assert (process.returncode, said) == (130, INTERRUPTED)

"""Workers on other machines, behind a dask scheduler, as an executor of the standard library.

The inputs of all runs are sent once to each worker, not looked up in its files, so a worker needs only the
same installation. If a worker dies, another one does its run. dask speaks pickle: anyone who reaches the
scheduler's port can run code as its user. The only file that imports dask; leaves out starting and
stopping machines, which `dask scheduler` and `dask worker` do.
"""

import asyncio
import contextlib
import re
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor, Executor, Future, ThreadPoolExecutor
from typing import Any

from ..errors import ConfigError, MismatchError, StateError, check_same

PATIENCE = 10.0  # seconds for a scheduler to answer, a first worker to appear, a free one to get work
LONELY = 60.0  # seconds that a sweep waits while no worker works, for example because none is left

Survey = Callable[[], dict[str, Any]]


@contextlib.contextmanager
def connect(address: str, survey: Survey, expected: dict[str, Any], shared: Any) -> Iterator[Executor]:
    """An executor at "tcp://HOST:PORT" that does each `call(run)` as `call(run, shared)` on a worker.

    ConfigError for an invalid address or without dask; StateError if no scheduler or no worker answers
    within 10 s each; MismatchError if `survey()` differs from `expected` on one of them.
    """
    if not re.fullmatch(r"(tcp|tls)://[^\s/]+:[0-9]+", address):
        raise ConfigError(f"dask is {address!r}; expected tcp://HOST:PORT or tls://HOST:PORT")
    try:
        import distributed
    except ImportError as e:
        raise ConfigError('dask is not installed; expected pip install "minilora[cluster]"') from e
    with contextlib.ExitStack() as stack:
        try:
            with ThreadPoolExecutor(1) as thread:  # a notebook's thread already runs a loop
                thread.submit(asyncio.run, greet(address)).result()
            with warnings.catch_warnings():  # dask only warns of mixed versions; refused below
                warnings.simplefilter("ignore", distributed.versions.VersionMismatchWarning)
                client = distributed.Client(address, timeout=PATIENCE, set_as_default=False)
        except Exception as e:  # from the network, TLS or another program at that port
            why = (str(e).splitlines() or [type(e).__name__])[0]
            raise StateError(f"{address}: no dask scheduler answers within {PATIENCE:g} s: {why}") from e
        stack.callback(client.close, PATIENCE)
        try:
            client.wait_for_workers(1, timeout=PATIENCE)
            surveys = client.run(with_dask, survey, on_error="return", callback_timeout=PATIENCE)
        except TimeoutError as e:
            raise StateError(f"{address}: not all workers answered within {PATIENCE:g} s, or there are none; "
                             f"start one: dask worker {address} --nthreads 1") from e  # fmt: skip
        try:  # the scheduler unpickles what is submitted, so it needs minilora too
            client.run_on_scheduler(with_dask, survey)
        except Exception as e:
            surveys["scheduler"] = e
        for name, answer in sorted(surveys.items()):
            if isinstance(answer, Exception):
                raise MismatchError(f"{name}: {answer}; expected the same minilora to be installed there")
            check_same(name, answer, expected | {"dask": distributed.__version__})
        cluster = Cluster(client, shared)
        stack.callback(cluster.closed.set)
        yield cluster


async def greet(address: str) -> None:
    """Shake hands with a scheduler, within a limit: dask's own client would wait for a silent one forever."""
    from distributed import Security
    from distributed.comm import connect

    security = Security().get_connection_args("client")
    comm = await asyncio.wait_for(connect(address, PATIENCE, **security), PATIENCE)
    await comm.close()


class Cluster(Executor):
    """dask's calls, with worker deaths reported as in the standard library, and a limit on waiting.

    Not dask's own executor: it reports a result as an error if the result's worker dies as it arrives.
    """

    def __init__(self, client: Any, shared: Any) -> None:
        self.client, self.closed = client, threading.Event()
        self.waiting: dict[Future[Any], bool] = {}  # whoever pops one settles it
        self.value, self.shared = shared, None
        threading.Thread(target=self.watch, daemon=True).start()

    def submit(self, call: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Run `call(*args, shared)` on a worker."""
        outcome: Future[Any] = Future()
        outcome.set_running_or_notify_cancel()
        self.waiting[outcome] = True
        self.share()
        inner = self.client.submit(call, *args, self.shared, pure=False, **kwargs)
        asyncio.run_coroutine_threadsafe(self.settle(outcome, inner), self.client.loop.asyncio_loop)
        return outcome

    def share(self) -> None:
        """Send the shared data to the workers unless it is there; as a task, so that dask can remake it."""
        import dask

        if self.shared is None:
            with dask.config.set({"distributed.admin.large-graph-warning-threshold": "1 TB"}):
                self.shared = self.client.submit(itself, self.value, pure=False)

    async def settle(self, outcome: Future[Any], inner: Any) -> None:
        """Pass on the result or the error of a call, when it has one."""
        result: Any = None
        error: Exception | None = None
        try:
            result = await inner
        except Exception as e:
            error = self.told(e)
        if self.waiting.pop(outcome, False):
            outcome.set_result(result) if error is None else outcome.set_exception(error)

    def told(self, error: Exception) -> Exception:
        """dask's error as the standard library would report it, or StateError if the scheduler is gone."""
        from distributed import KilledWorker
        from distributed.client import FutureCancelledError
        from distributed.comm import CommClosedError

        if isinstance(error, CommClosedError) or getattr(error, "reason", "") == "scheduler-connection-lost":
            return StateError("the scheduler is gone; finished runs are kept")
        if isinstance(error, KilledWorker | FutureCancelledError):
            self.shared = None  # it may have died there too, and dask would wait for it forever
            return BrokenExecutor(str(error))
        return error

    def watch(self) -> None:
        """Fail the waiting calls once no worker works on any of them: none is left, or dask lost the calls.

        dask can lose a result if the worker dies while the result is on its way here.
        """
        last = time.monotonic()
        while not self.closed.wait(1):
            workers: Any = None
            with contextlib.suppress(Exception):  # no scheduler answers
                workers = self.client.nthreads()
                if not self.waiting or any(self.client.processing().values()):
                    last = time.monotonic()
            idle = time.monotonic() - last
            if workers and idle > PATIENCE:
                self.fail(BrokenExecutor("dask has lost the run"))
            elif idle > LONELY:
                reason = "the scheduler is gone" if workers is None else f"no worker for {LONELY:g} s"
                self.fail(StateError(f"{reason}; finished runs are kept"))

    def fail(self, error: Exception) -> None:
        """Settle all waiting calls with this error."""
        self.shared = None
        for outcome in list(self.waiting):
            if self.waiting.pop(outcome, False):
                outcome.set_exception(error)


def itself(value: Any) -> Any:
    """The shared data, as the result of a task."""
    return value


def with_dask(survey: Survey) -> dict[str, Any]:
    """The survey of a process, with its version of dask."""
    import distributed

    return survey() | {"dask": distributed.__version__}

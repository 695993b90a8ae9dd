"""Ctrl-C, and stdout and stderr in whatever state they are: the process around a command."""

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn


def interrupts() -> list[int]:
    """The signals that end a command cleanly, as far as the system has them."""
    return [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


@contextlib.contextmanager
def signals() -> Iterator[Callable[[], None]]:
    """Turn Ctrl-C, SIGTERM and SIGHUP into one KeyboardInterrupt; a second signal ends the process at once.

    Yields a function; once it is called, the first signal ends the process, too. Ignored signals (nohup)
    stay ignored.
    """
    before = {number: signal.getsignal(number) for number in interrupts()}
    handlers = {number: old for number, old in before.items() if old not in (signal.SIG_IGN, None)}

    def listen(new: Mapping[int, Any]) -> None:
        with contextlib.suppress(ValueError):  # not in the main thread
            for number, handler in new.items():
                signal.signal(number, handler)

    def stop() -> None:
        listen(dict.fromkeys(handlers, lambda number, frame: os._exit(130)))

    def interrupt(number: int, frame: Any) -> NoReturn:
        stop()
        raise KeyboardInterrupt

    listen(dict.fromkeys(handlers, interrupt))
    try:
        yield stop
    finally:
        listen(handlers)


@contextlib.contextmanager
def streams() -> Iterator[None]:
    """Make stdout and stderr take any text, closed or not, in any encoding.

    Characters that the encoding lacks are escaped. A failed write to stderr is dropped, since a progress
    message must not end the work; a failed write to stdout is an error (`drain`).
    """
    while (fd := os.open(os.devnull, os.O_RDWR)) < 3:  # else a library might take one of our files for stdout
        pass
    os.close(fd)
    with open(os.devnull, "w") as nowhere:
        out, err = sys.stdout or nowhere, sys.stderr or nowhere
        for stream in (out, err):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="backslashreplace")
        lossy: Any = Lossy(err)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(lossy):
            yield


class Lossy:
    """A stream that drops text it cannot write."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        """Write; drop the text if that fails."""
        with contextlib.suppress(OSError, ValueError):
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush; ignore a failure."""
        with contextlib.suppress(OSError, ValueError):
            self.stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def drain() -> OSError | None:
    """Flush stdout; if that fails, drop the text it still holds and return the error."""
    try:
        sys.stdout.flush()
    except OSError as e:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
        return e
    return None

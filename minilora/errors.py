"""The errors that minilora raises, one class for each kind.

Every message is one line: the value given, the value expected, the nearest valid choice. The command
line prints it and exits with the class's `exit_code`; nothing has been written by then.
"""

import importlib
import math
from collections.abc import Iterable
from typing import Any

from .table import plain


class MiniloraError(Exception):
    """Base of all errors that minilora raises on purpose; its text is one plain line, whatever is in it."""

    exit_code = 2

    def __str__(self) -> str:
        return plain(super().__str__())


class ConfigError(MiniloraError, ValueError):
    """A hyperparameter or option that has no meaning: rank 0, alpha NaN, an empty grid."""


class InputError(MiniloraError, ValueError):
    """Tokens, batches or arguments that the model cannot take."""


class FormatError(MiniloraError, ValueError):
    """A file whose bytes are not what its name promises."""


class UnsupportedError(MiniloraError, ValueError):
    """Well-formed input that minilora does not support."""


class MismatchError(MiniloraError, ValueError):
    """Two things that must agree and do not: a checkpoint and its run, names and a model."""


class NonFiniteError(MiniloraError, ArithmeticError):
    """NaN or infinity where numbers are needed."""


class StateError(MiniloraError, RuntimeError):
    """A call in the wrong order: unmerge before merge, train while merged."""


class BusyError(MiniloraError, RuntimeError):
    """A queue is full; the same request may be accepted later."""


class StorageError(MiniloraError, OSError):
    """The file system said no: missing, read-only, full."""

    exit_code = 4


class LockedError(MiniloraError, RuntimeError):
    """Another process is working in this folder."""

    exit_code = 3


def short(value: object) -> str:
    """The repr of a value, cut to fit into a message."""
    try:
        text = repr(value)
    except ValueError:  # an int of more than 4,300 digits
        text = f"{type(value).__name__} of very many digits"
    return text if len(text) <= 120 else text[:117] + "..."


def nearest(name: str, known: Iterable[str], count: int = 3) -> str:
    """The known names most like `name`, as the end of an error message."""
    import difflib

    known = sorted(set(known))
    close = difflib.get_close_matches(name[:200], known, n=count, cutoff=0.3) or known[:count]
    return "nearest: " + ", ".join(map(short, close)) if close else "there are none"


def needed(package: str, extra: str) -> Any:
    """Import an optional package; UnsupportedError, with the line that installs it, if it is missing."""
    try:
        return importlib.import_module(package)
    except ImportError as e:
        line = f'pip install "minilora[{extra}]"'
        raise UnsupportedError(f"the package {package} is not installed; expected: {line}") from e


def check_int(name: str, value: object, least: int) -> int:
    """`value` if it is an int (not a bool) of at least `least`, else ConfigError."""
    if type(value) is not int or value < least:
        raise ConfigError(f"{name} is {short(value)}; expected an int, at least {least}")
    return value


def check_float(name: str, value: object, low: float, high: float, *, open_low: bool = False) -> float:
    """`value` if it is a finite number in [low, high) (in (low, high) if open_low), else ConfigError."""
    try:
        number = float(value) if type(value) in (int, float) else math.nan  # type: ignore[arg-type]
    except OverflowError:
        number = math.inf
    if not low <= number < high or (open_low and number == low):
        bracket = "(" if open_low else "["
        raise ConfigError(f"{name} is {short(value)}; expected a number in {bracket}{low:g}, {high:g})")
    return number


def check_same(who: str, actual: dict[str, Any], expected: dict[str, Any]) -> None:
    """MismatchError, naming the first difference, unless `who` reports every expected value."""
    for name, value in expected.items():
        if actual.get(name) != value:
            raise MismatchError(
                f"{who}: {name} is {actual.get(name)!r}; expected {value!r}, as in the rest of the sweep"
            )

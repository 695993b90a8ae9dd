"""A function's arguments as the options of a command; an omitted option keeps the function's own default.

Defaults are written once, in the signature of the function or dataclass. The help reads them there only when
it is printed, so building the parser imports nothing.
"""

import argparse
import json
import math
from argparse import SUPPRESS
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from inspect import signature
from typing import Any, NoReturn

from .session import bar
from .table import plain

Options = argparse.Namespace


class Parser(argparse.ArgumentParser):
    """A parser with plain errors, even for odd file names from a glob, and with the defaults in its help.

    Options may stand anywhere among the arguments, as in A:0.7 B:0.3 --rank 16 OUT; with a --, before it.
    """

    usual: Callable[[], Mapping[str, Any]] = dict  # gives the defaults that argparse does not hold
    apart = False  # True within parse_known_intermixed_args, which parses the options first

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's; of a command, its parse_known_intermixed_args, which calls this one."""
        if self.apart or self._subparsers or "--" in args:  # which intermixed parsing loses
            return super().parse_known_args(args, namespace)
        self.apart = True
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self.apart = False

    def format_help(self) -> str:
        """As argparse's, with the default after each option that takes a value."""
        usual = self.usual()
        for action in self._actions:
            if action.nargs == 0 or action.required or action.help in (None, SUPPRESS):
                continue
            if "(default" not in action.help:
                value = usual.get(action.dest) if action.default is SUPPRESS else action.default
                action.help += f" (default: {as_typed(value)})".replace("%", "%%")
        return super().format_help()

    def print_help(self, file: Any = None) -> None:
        """As argparse's, which hides a failed write; this one does not."""
        print(self.format_help(), end="", file=file)

    def error(self, message: str) -> NoReturn:
        """As argparse's, in plain text."""
        super().error(plain(message))


def as_typed(value: Any) -> str:
    """A default as a user would type it."""
    if isinstance(value, tuple):
        return ",".join(map(as_typed, value))
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def defaults(of: Callable[..., Any]) -> dict[str, Any]:
    """The defaults of a function's or dataclass's arguments."""
    parameters = signature(of).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


def typed(options: Options, of: Callable[..., Any]) -> dict[str, Any]:
    """The arguments of a function or dataclass that the user typed."""
    values = vars(options)
    return {name: values[name] for name in signature(of).parameters if name in values}


@dataclass(frozen=True)
class Of:
    """A function or dataclass of the package, imported when it is needed."""

    module: str
    name: str
    words: Mapping[str, Any] = field(default_factory=dict)  # shown in the help instead of a default

    def get(self) -> Callable[..., Any]:
        """The function itself."""
        return getattr(import_module(f".{self.module}", __package__), self.name)

    def usual(self) -> dict[str, Any]:
        """The defaults of its arguments."""
        return {**defaults(self.get()), **self.words}

    def report(self, options: Options) -> int:
        """Call it with the typed options and print its result."""
        function = self.get()
        if "progress" not in signature(function).parameters:
            return show(options, function(**typed(options, function)))
        with bar("tensors") as line:
            result = function(**typed(options, function), progress=line)
        return show(options, result)


def show(options: Options, result: Any) -> int:
    """Print a result as a table, or as JSON with null for infinity and NaN."""

    def strict(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: strict(part) for key, part in value.items()}
        if isinstance(value, list | tuple):
            return [strict(part) for part in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    print(json.dumps(strict(result.data()), indent=1) if options.json else result)
    return 0


def integers(text: str) -> tuple[int, ...]:
    """A list such as 1,2,4."""
    return tuple(int(part) for part in text.split(","))


def words(text: str) -> tuple[str, ...]:
    """A list such as q_proj,v_proj."""
    return tuple(part.strip() for part in text.split(","))


def target_spec(text: str) -> str | tuple[str, ...]:
    """A list such as q_proj,v_proj, or the word all-linear."""
    return text if text == "all-linear" else words(text)


def weighted(text: str) -> tuple[str, float]:
    """An adapter and its weight, such as runs/mine:0.7."""
    folder, _, weight = text.rpartition(":")
    try:
        if folder:
            return folder, float(weight)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} has no weight; expected ADAPTER:WEIGHT, such as {text}:0.5")


def unweighted(text: str) -> str:
    """A new folder. An adapter and its weight are refused: the folder was forgotten."""
    try:
        weighted(text)
    except argparse.ArgumentTypeError:
        return text
    raise argparse.ArgumentTypeError(f"{text!r} is an adapter and its weight; expected a new folder after it")


def renamed(old: str, new: str) -> dict[str, Any]:
    """The settings of a renamed option: typing it is an error that names the new one."""

    def refuse(text: str) -> NoReturn:
        raise argparse.ArgumentTypeError(f"{old} is now {new}")

    return {"type": refuse}

"""Which names a regular expression from a file matches, in bounded time for any expression.

`re` backtracks: it tries one path through an expression after the other, and there can be exponentially many.
Here an expression is a tree of steps, each from a set of positions to a set of positions. All names are
joined into one text, a set of positions is the bits of one int, and a step acts on all names at once. Only
the possible ends of a match matter, so greedy and lazy are the same. Every step is counted, and too many are
an error.

Constructs that positions alone cannot decide are refused by name: backreferences, conditionals, atomic groups
and possessive repeats. So are flags of a whole expression, numeric escapes and letters beyond ASCII.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from ..errors import ConfigError, UnsupportedError, short

LONGEST = 10_000  # characters of one expression
DEEPEST = 50  # nested groups
STEPS = 300_000  # a fraction of a second; and 5 more for each position
GRAIN = 4096  # bits of a set: a step costs 1 for each so many
READING = 3  # steps that take as long as parsing one character of an expression
TOKEN = re.compile(
    r"(?P<group>\(\?(?:P<\w+>|<?[=!]|(?P<flags>[is]*):)|\((?!\?))|"
    r"(?P<repeat>(?:[*+?]|\{(?!\})\d*,?\d*\})\??)(?P<possessive>\+?)|(?P<between>[$^]|\\[AZbB])|"
    r"(?P<atom>\\[dDwWsSafnrtv]|\\[\W_]|\[\^?\]?(?:\\.|[^\\\]])*\]|[^()|\\])|"
    r"(?P<bar>\|)|(?P<end>\))",
    re.DOTALL | re.ASCII,
)
ODD = re.compile(r"\\[^\W_dDwWsSafnrtvAZbB]|[^ -~]", re.ASCII)  # after every \\ is removed
PLAIN = re.compile(r"(\^?)((?:[\w-]|\\?[.-])+)\$?", re.ASCII)  # a key that is a name: dots with or without \


class Names:
    """Names joined into one text and matched all at once; a position before a character is a bit.

    A name of n characters has n + 1 positions; the last one is its end.
    """

    def __init__(self, names: Sequence[str], where: str) -> None:
        self.where = where
        self.ends = np.cumsum([len(name) + 1 for name in names], dtype=np.int64) - 1
        text = "\n".join([*names, ""])
        self.price, self.left = 1 + len(text) // GRAIN, STEPS + 5 * len(text)
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
        letters, codes = np.unique(codes, return_inverse=True)
        self.letters, self.codes = "".join(map(chr, letters)), codes.reshape(-1)
        self.codes[self.ends] = len(letters)  # no character
        self.known: dict[tuple[str, int], int] = {}
        self.every = (1 << len(text)) - 1
        self.last = self.bits(self.codes == len(letters))
        self.first = (self.last << 1 | 1) & self.every
        self.dollar = self.last | (self.last >> 1 & self.before("\n"))
        word = self.before(r"\w")
        self.edge = (word ^ word << 1) & self.every

    @staticmethod
    def bits(here: np.ndarray) -> int:
        """A set of positions from one truth value per position."""
        return int.from_bytes(np.packbits(here, bitorder="little").tobytes(), "little")

    def before(self, atom: str, flags: int = 0) -> int:
        """The positions before a character that `atom`, an expression for one character, matches."""
        if (atom, flags) not in self.known:
            self.spend(30 * self.price)
            meant = set(re.findall(atom, self.letters, flags))
            table = np.array([letter in meant for letter in self.letters] + [False])
            self.known[atom, flags] = self.bits(table[self.codes])
        return self.known[atom, flags]

    def spend(self, steps: int) -> None:
        """Count steps; UnsupportedError if there are too many."""
        self.left -= steps
        if self.left < 0:
            most = STEPS + 5 * len(self.codes)
            what = f"comparing with {len(self.ends)} modules"
            raise UnsupportedError(f"{self.where}: {what} takes more than {most} steps")

    def holding(self, at: int) -> list[int]:
        """The numbers of the names that have a position in the set."""
        raw = np.frombuffer(at.to_bytes(len(self.codes) // 8 + 1, "little"), np.uint8)
        places = np.flatnonzero(np.unpackbits(raw, bitorder="little"))
        numbers = np.unique(np.searchsorted(self.ends, places)).tolist()
        self.spend(10 * self.price + len(numbers))
        return numbers


# ---- steps: from the positions where a match of a part begins to those where it can end, or backward


Step = Callable[[Names, int, bool], int]


def character(atom: str, flags: int) -> Step:
    """One character."""

    def step(names: Names, at: int, back: bool) -> int:
        here = names.before(atom, flags)
        return at >> 1 & here if back else (at & here) << 1

    return step


def between(token: str) -> Step:
    """A place between two characters."""
    inside: Callable[[Names], int] = {
        "^": lambda names: names.first, r"\A": lambda names: names.first,
        "$": lambda names: names.dollar, r"\Z": lambda names: names.last,
        r"\b": lambda names: names.edge, r"\B": lambda names: names.every & ~names.edge,
    }[token]  # fmt: skip
    return lambda names, at, back: at & inside(names)


def look(inner: Step, behind: bool, absent: bool) -> Step:
    """A part that must, or must not, match from here (lookahead) or up to here (lookbehind)."""

    def step(names: Names, at: int, back: bool) -> int:
        there = inner(names, names.every, not behind)
        return at & ~there if absent else at & there

    return step


def row(steps: Sequence[Step]) -> Step:
    """One part after the other."""

    def step(names: Names, at: int, back: bool) -> int:
        for one in reversed(steps) if back else steps:
            if not at:
                break
            names.spend(names.price)
            at = one(names, at, back)
        return at

    return step


def either(steps: Sequence[Step]) -> Step:
    """Any one of the parts."""

    def step(names: Names, at: int, back: bool) -> int:
        there = 0
        for one in steps:
            names.spend(names.price)
            there |= one(names, at, back)
        return there

    return step


def repeat(inner: Step, least: int, most: float) -> Step:
    """A part repeated: first `least` times, then from new positions only."""

    def step(names: Names, at: int, back: bool) -> int:
        count = 0
        while count < least:
            names.spend(names.price)
            was, at, count = at, inner(names, at, back), count + 1
            if at == was:  # no further change
                count = least
        new = at
        while new and count < most:
            names.spend(names.price)
            new = inner(names, new, back) & ~at
            at, count = at | new, count + 1
        return at

    return step


# ---- an expression


def parse(pattern: str, where: str) -> Step:
    """The steps of an expression; ConfigError if it is invalid, UnsupportedError if it is refused here."""

    def refused(what: str) -> UnsupportedError:
        return UnsupportedError(f"{where} is {short(pattern)}: regular expressions {what} are not supported")

    if len(pattern) > LONGEST:
        raise refused(f"of more than {LONGEST} characters")
    if odd := ODD.search(pattern.replace(r"\\", "")):
        raise refused(f"with {odd[0]!a}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # syntax that a later Python reads differently
            re.compile(pattern)
    except (re.error, OverflowError, RecursionError, Warning) as e:
        raise ConfigError(f"{where} is {short(pattern)}: not a regular expression: {e}") from e
    place = 0

    def group(flags: int, depth: int) -> Step:
        """The steps up to the end of the group, or of the expression."""
        nonlocal place
        if depth > DEEPEST:
            raise refused(f"with more than {DEEPEST} nested groups")
        branches: list[list[Step]] = [[]]
        while place < len(pattern):
            token = TOKEN.match(pattern, place)
            if not token or token["possessive"]:
                raise refused(f"with {token[0] if token else pattern[place : place + 3]!a}")
            place = token.end()
            steps = branches[-1]
            if token["end"]:
                break
            if token["bar"]:
                branches.append([])
            elif token["repeat"]:
                steps.append(repeat(steps.pop(), *times(token["repeat"])))
            elif token["between"]:
                steps.append(between(token["between"]))
            elif token["atom"]:
                steps.append(character(token["atom"], flags))
            else:
                kind, letters = token["group"], token["flags"] or ""
                more = (re.I if "i" in letters else 0) | (re.S if "s" in letters else 0)
                inner = group(flags | more, depth + 1)
                steps.append(look(inner, "<" in kind, "!" in kind) if kind[-1] in "=!" else inner)
        return either([row(steps) for steps in branches])

    return group(0, 0)


def times(token: str) -> tuple[int, float]:
    """The least and most repeats of *, +, ? or {m,n}, lazy or not."""
    if token[0] in "*+?":
        return {"*": (0, math.inf), "+": (1, math.inf), "?": (0, 1)}[token[0]]
    least, comma, most = token.rstrip("?")[1:-1].partition(",")
    return int(least or 0), int(most) if most else math.inf if comma else int(least)


# ---- matching


def whole(pattern: str, names: Sequence[str], where: str) -> list[str]:
    """The names that `re.fullmatch(pattern, name)` matches."""
    text = Names(names, where)
    text.spend(READING * len(pattern))
    return [names[n] for n in text.holding(parse(pattern, where)(text, text.first, False) & text.last)]


def fitting(keys: Iterable[str], names: Sequence[str], where: str) -> list[list[int]]:
    r"""For each name, the indices of the keys that match it, by PEFT's `re.match(rf"(.*\.)?({key})$", name)`.

    A key that is a name is not run but looked up by its length, its dots without a \ and the rest.
    """
    text = Names(names, where)
    begin = parse(r"(?:.*\.)?", where)(text, text.first, False)
    fits: list[list[int]] = [[] for _ in names]
    plain: dict[int, dict[tuple[int, ...], dict[tuple[bool, str], list[int]]]] = {}
    for i, key in enumerate(keys):
        if match := PLAIN.fullmatch(key):
            tail = re.sub(r"\\(.)|\.", lambda dot: dot[1] or "\0", match[2])
            dots = tuple(place for place, letter in enumerate(tail) if letter == "\0")
            alike = plain.setdefault(len(tail), {}).setdefault(dots, {})
            alike.setdefault((match[1] == "^", tail), []).append(i)
            continue
        text.spend(READING * len(key))
        for n in text.holding(parse(key, where)(text, begin, False) & text.dollar):
            fits[n].append(i)
    for name, fit in zip(names, fits, strict=True):
        for start in starts(name):
            for dots, alike in plain.get(len(name) - start, {}).items():
                text.spend(10)
                letters = list(name[start:])
                for dot in dots:
                    letters[dot] = "\0"
                tail = "".join(letters)
                for anchored in (False, True)[: 1 + (start == 0)]:
                    fit += alike.get((anchored, tail), [])
        fit.sort()
        text.spend(len(fit))
    return fits


def starts(name: str) -> list[int]:
    """The indices where a name begins and where each of its parts after a dot begins."""
    return [0, *(place for place, letter in enumerate(name, 1) if letter == ".")]

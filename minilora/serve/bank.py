"""Adapters on disk, and those in memory: at most so many bytes, read when needed, least recently used out.

    bytes of one = itemsize * sum over its modules of r (I + O)

A folder holds PEFT folders; an adapter's name is its folder's. S-LoRA (Sheng et al. 2023, arXiv:2311.03285)
keeps all adapters in host memory and fetches those in use; here host memory itself is bounded. Leaves out
every adapter but plain LoRA on linear maps. Nothing is written, and no lock is taken. A folder that changes
is read again once its adapter has left the memory.
"""

from __future__ import annotations

import os
import re
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..errors import InputError, StorageError, UnsupportedError, check_int, nearest, short
from ..formats.atomic import exists, named, named_errors
from ..lora import LowRank, bases
from ..lora_files.recognise import CONFIG
from ..model import Llama
from ..peft.folder import Adapter, check_agreement, open_adapter
from ..peft.loading import base_print, check_base, check_fit, factors
from ..targets import with_head
from ..tree import dtype_of, freeze

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}")  # no separator, and neither . nor ..
PLAIN = "A and B of a linear map, the only kind that is served"
NEIGHBOURS = 100  # names before an unknown one, and as many after it, among which the nearest are sought


@dataclass
class Counters:
    """What a bank has done since it was made, and the bytes that it holds."""

    hits: int = 0  # adapters that were in memory when they were taken
    misses: int = 0  # that had to be read then
    loads: int = 0  # read, when they were taken or before
    evictions: int = 0
    bytes: int = 0


@dataclass(eq=False)
class Loaded:
    """An adapter in memory: path -> factors, its bytes, and how many use it."""

    layers: Mapping[str, LowRank]
    bytes: int
    users: int = 0


class Bank:
    """The adapters in a folder, for one base; `budget` bytes of them at most are in memory.

    An engine keeps the adapters of its last step, and copies of them, on top of that budget. StorageError if
    there is no such folder, ConfigError for a budget that is no int of at least 1.
    """

    def __init__(self, model: Llama, folder: Path | str, budget: int = 1 << 30) -> None:
        self.folder, self.budget = named(folder), check_int("budget", budget, 1)
        if not self.folder.is_dir():
            raise StorageError(f"{folder}: is not a folder; expected one with a PEFT folder for each adapter")
        self.counters = Counters()
        self.layers, self.tied = bases(model), model.lm_head is None
        self.with_head = with_head(model, self.layers)
        self.dtype = dtype_of(model)
        self.fingerprint = base_print(model)  # now, since it reads all of the base
        self.loaded: OrderedDict[str, Loaded] = OrderedDict()  # the least recently used first
        self.full: dict[str, int] = {}  # the last adapter that found no room -> its bytes

    def names(self) -> list[str]:
        """The names of the adapters in the folder, sorted."""
        return list(filter(self.has, self.listed()))

    def listed(self) -> list[str]:
        """The names in the folder that an adapter may have, sorted."""
        with named_errors(self.folder):
            return sorted(filter(NAME.fullmatch, os.listdir(self.folder)))

    def near(self, name: str) -> str:
        """The names most like an unknown one; only its neighbours' folders are looked into."""
        there = self.listed()
        at = bisect_left(there, name)
        return nearest(name, filter(self.has, there[max(at - NEIGHBOURS, 0) : at + NEIGHBOURS]))

    def has(self, name: str) -> bool:
        """Whether a folder of that name, no link, has an adapter's config."""
        where = self.folder / name
        return where.is_dir() and not where.is_symlink() and exists(where / CONFIG)

    def check(self, name: object) -> None:
        """InputError unless there is an adapter of that name, with the nearest names; nothing is read."""
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise InputError(
                f"the adapter's name is {short(name)}; expected letters, digits, ., _ and -, not . first"
            )
        if name not in self.loaded and not self.has(name):
            raise InputError(f"there is no adapter {name!r}; {self.near(name)}")

    def take(self, name: str) -> Loaded | None:
        """The adapter, read if need be; it stays in memory until it is given back.

        None if there is no room for it before others are given back. Errors as in `fetch`.
        """
        known = name in self.loaded
        if not self.fetch(name):
            return None
        self.counters.hits += known
        self.counters.misses += not known
        self.loaded[name].users += 1
        return self.loaded[name]

    def give(self, name: str) -> None:
        """The adapter is no longer used by one that took it."""
        self.loaded[name].users -= 1

    def fetch(self, name: str, keep: Collection[str] = ()) -> bool:
        """Have the adapter in memory, as the most recently used; False if there is no room for it.

        None in use is evicted for it, and none of `keep`. InputError for an unknown name or an adapter larger
        than the budget, NonFiniteError for its numbers, and other errors as in `opened`.
        """
        if name not in self.loaded:
            if name in self.full and self.room(self.full[name], keep) is None:
                return False  # as last time, when its size was read
            self.check(name)
            given = self.opened(name)
            size = sum(pair.r * sum(pair.shape) for pair in given.pairs.values()) * self.dtype.itemsize
            if size > self.budget:
                what = f"has {size:,} bytes in {self.dtype}; expected at most {self.budget:,}, the budget"
                raise InputError(f"{given.where}: {what}")
            if (out := self.room(size, keep)) is None:
                self.full = {name: size}
                return False
            self.full = {}
            for other in out:
                self.counters.bytes -= self.loaded.pop(other).bytes
                self.counters.evictions += 1
            layers = {}
            for path, pair in given.pairs.items():
                A, B, _ = factors(given, path, self.dtype)
                layers[path] = LowRank(A, B, pair.scale)
            freeze(layers)
            self.loaded[name] = Loaded(layers, size)
            self.counters.loads += 1
            self.counters.bytes += size
        self.loaded.move_to_end(name)
        return True

    def room(self, size: int, keep: Collection[str]) -> list[str] | None:
        """The least recently used adapters to evict so that `size` bytes more fit; None if they never do."""
        out, more = [], self.counters.bytes + size - self.budget
        for name, one in self.loaded.items():
            if more <= 0:
                break
            if not one.users and name not in keep:
                out.append(name)
                more -= one.bytes
        return out if more <= 0 else None

    def opened(self, name: str) -> Adapter:
        """The adapter's header, checked against the base; no factor is read.

        MismatchError names a part that does not fit, UnsupportedError one that is no plain LoRA on a linear
        map, StorageError a link; other errors as in `open_adapter`.
        """
        where = self.folder / name
        given = open_adapter(where)
        if given.where != where:
            raise StorageError(f"{where}: is a link, which is not followed; expected a folder")
        check_agreement(given)
        for path, pair in given.pairs.items():
            plain = not pair.embedding and not pair.vectors and not pair.bias
            if not plain:
                raise UnsupportedError(f"{where}: {path}: is adapted by more than {PLAIN}")
        if given.replaced:
            what = f"replaces {next(iter(given.replaced))}"
            raise UnsupportedError(f"{where}: {what}; expected no more than {PLAIN}")
        check_fit(given, self.with_head if "lm_head" in given.pairs else self.layers, self.tied)
        check_base(given, lambda: self.fingerprint)
        return given
